"""Files that are either whole or absent: atomic writes and content hashes."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling of `path` (file or folder) that takes its place on success.

    On an exception the temporary one is removed and `path` stays as it was. What processes that
    were killed left of the same target is removed first (processes of this machine: two machines
    must not write one target).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_dir() and path.exists():
            _remove(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def _sweep(path: Path) -> None:
    """Remove the temporary siblings of `path` whose process is gone."""
    for left in path.parent.iterdir():
        owner = re.fullmatch(re.escape(f".{path.name}.") + r"(\d{1,9})\.partial", left.name)
        if owner and not psutil.pid_exists(int(owner[1])):
            with suppress(FileNotFoundError):  # another process sweeps as well
                _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as indented JSON with sorted keys, atomically; NaN is refused."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, default=str) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of(path: Path | str, *, chunk_bytes: int = 1 << 20) -> str:
    """Return the SHA-256 of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()
