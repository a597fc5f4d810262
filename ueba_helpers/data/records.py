"""JSON lines with a `step`: one row per step, cut back where a resumed run begins.

In and out: mappings of plain values. A last line that a killed process was writing is left out when
read and dropped when cut.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from ueba_helpers.data.files import atomic_path


def plain(value: object) -> object:
    """Return a number as JSON writes it; what is not finite becomes None.

    >>> plain(2), plain(0.5), plain(float("nan")), plain("kl")
    (2, 0.5, None, 'kl')
    """
    if isinstance(value, bool | str | list | tuple) or value is None:
        return value
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if isinstance(value, int) else number


def append_row(path: Path | str, row: Mapping) -> None:
    """Append one row as one line."""
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(_line(row))


def read_rows(path: Path | str) -> list[dict]:
    """Return the whole rows of a file, none if there is no file."""
    path, rows = Path(path), []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def cut_rows(path: Path | str, last_step: int) -> list[dict]:
    """Drop the rows behind `last_step`, atomically; return those that are left."""
    kept = [row for row in read_rows(path) if row["step"] <= last_step]
    if Path(path).exists():
        with atomic_path(path) as temporary:
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
    return kept


def _line(row: Mapping) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
