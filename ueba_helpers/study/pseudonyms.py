"""The key behind the account codes of a study: public for simulated accounts, a secret for others.

In: the folder of a study's prepared data, which holds real names anyway. Out: the key for
`task.prompts`. The key file stays in that folder and nothing that leaves a study (reports,
published runs) carries it; what a run records of it is `fingerprint`, which turns nothing back.
Refused: a key file that is damaged.
"""

import contextlib
import hashlib
import os
import re
import secrets
from pathlib import Path

from ueba_helpers.errors import UserError
from ueba_helpers.task.prompts import SIMULATED_KEY

KEY_FILE = "pseudonyms.key"


def study_key(home: Path | str, *, simulated: bool) -> str:
    """Return the key of a study; the first call on real data draws 256 random bits and keeps them.

    Simulated accounts need no secret: they share `SIMULATED_KEY`, so that equal seeds give equal
    bytes. To repeat a study of real data byte for byte elsewhere, copy its key file first. Raises
    `UserError` if the file holds anything else than a key.
    """
    if simulated:
        return SIMULATED_KEY
    path = Path(home) / KEY_FILE
    if not path.exists():
        _keep(path, secrets.token_hex(32))
    found = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{64}", found):
        raise UserError(f"{path}: holds no key of 64 hexadecimal digits. Put the study's key file "
                        "back, or delete it and every run of this study to begin anew.")
    return found


def _keep(path: Path, key: str) -> None:
    """Write a key that only this account can read; the first of two processes wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(file, key.encode() + b"\n")  # one write: too short to be cut
        os.close(file)


def fingerprint(key: str) -> str:
    """Return eight characters that tell keys apart, for the configuration of a run.

    >>> fingerprint("study")
    '0d52f2a7'
    """
    return hashlib.sha256(b"pseudonyms:" + key.encode()).hexdigest()[:8]
