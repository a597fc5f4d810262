"""Files that are whole or absent, whatever ends the process that writes them."""

import subprocess
import sys

import pytest

from ueba_helpers.data import files

KILLED = """
import os, sys
from ueba_helpers.data import files

with files.atomic_path(sys.argv[1]) as temporary:
    temporary.mkdir()
    (temporary / "half").write_text("x")
    os._exit(9)
"""


@pytest.fixture
def sleeper():
    """A process that is alive during the test."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.communicate(b"\n")


def names_after_a_kill(folder, alive: int) -> set[str]:
    """Kill a writer of `data`, then write `data` again beside the partials of others."""
    killed = subprocess.run([sys.executable, "-c", KILLED, folder / "data"], check=False)
    assert killed.returncode == 9
    (left,) = folder.iterdir()
    assert left.name.endswith(".partial") and (left / "half").exists()
    (folder / f".data.{alive}.partial").write_text("another writer is at it")
    other = left.rename(folder / left.name.replace(".data.", ".data.csv."))
    left.mkdir()
    (folder / ".data.notes.partial").write_text("not ours")
    with files.atomic_path(folder / "data") as temporary:
        temporary.write_text("whole")
    assert (folder / "data").read_text() == "whole"
    known = {other.name: "other target", f".data.{alive}.partial": "other writer"}
    return {known.get(path.name, path.name) for path in folder.iterdir()}


EXPECTED = {"other writer", "other target", ".data.notes.partial", "data"}


def test_a_write_sweeps_what_a_killed_writer_of_the_same_target_left(tmp_path, sleeper):
    assert names_after_a_kill(tmp_path, sleeper.pid) == EXPECTED


@pytest.mark.parametrize("exists", [True, False])
def test_a_sweep_of_nothing_or_of_everything_would_be_seen(
    tmp_path, sleeper, monkeypatch, exists
):
    """The twins: partials are all kept, or those of living processes removed as well."""
    monkeypatch.setattr(files.psutil, "pid_exists", lambda pid: exists)
    assert names_after_a_kill(tmp_path, sleeper.pid) != EXPECTED


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failure_leaves_the_old_content(tmp_path, kind):
    def fill(path, text):
        if kind == "folder":
            path.mkdir()
            path = path / "inside"
        path.write_text(text)

    for text in ("old", "new"):
        with files.atomic_path(tmp_path / "data") as temporary:
            fill(temporary, text)
    with pytest.raises(ZeroDivisionError), files.atomic_path(tmp_path / "data") as temporary:
        fill(temporary, "broken")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    kept = tmp_path / "data" / "inside" if kind == "folder" else tmp_path / "data"
    assert kept.read_text() == "new"
