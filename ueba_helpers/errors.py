"""The one exception for mistakes a user can mend.

`UserError` carries one clear message that names the file, line or field and what to do about it.
The command line prints the message without a traceback and exits with status 2.
"""


class UserError(ValueError):
    """A mistake in input or configuration, worded for the person who can mend it."""


def require(condition: bool, field: str, value: object, legal: str) -> None:
    """Raise `UserError` with the field's name and legal range unless the condition holds."""
    if not condition:
        raise UserError(f"{field}={value!r} is not possible: legal values are {legal}.")
