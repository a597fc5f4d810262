"""The README names what is there: every module, every notebook, every command it tells to type."""

import os
import re
import subprocess
import sys
from pathlib import Path

from ueba_helpers import cli
from ueba_helpers.study.pipeline import NOTEBOOKS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def modules_missing(readme: str) -> list[str]:
    """Return the modules that the tree does not name on the line of their folder."""
    missing = []
    for folder in ("data", "task", "rl", "study"):
        line = re.search(rf"^ +{folder}/ +(.*)$", readme, re.MULTILINE)
        named = set(re.findall(r"\w+", line[1])) if line else set()
        there = {path.stem for path in (ROOT / "ueba_helpers" / folder).glob("*.py")}
        missing += [f"{folder}/{name}" for name in there - named - {"__init__"}]
    return sorted(missing)


def test_the_tree_names_every_module():
    assert modules_missing(README) == []
    assert modules_missing(README.replace("injections, ", "")) == ["task/injections"]


def test_every_notebook_is_listed_with_its_path():
    assert re.findall(r"\(notebooks/(\w+)\.ipynb\)", README) == list(NOTEBOOKS)


def test_the_targets_and_commands_it_tells_to_type_exist(capsys):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = set(re.findall(r"`?make ([a-z-]+)", README))
    assert {"study", "test"} <= told <= targets
    for command in set(re.findall(r"`ueba ([a-z]+)", README)):
        try:
            cli.main([command, "--help"])
        except SystemExit as ended:
            assert ended.code == 0, command
        assert f"ueba {command}" in capsys.readouterr().out


def study_command(*arguments):
    """Return what `make study` would run, under a shell that gives make nothing of its own."""
    clean = {name: value for name, value in os.environ.items()
             if name not in ("JOBS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL")}
    shown = subprocess.run(["make", "-n", "study", f"PYTHON={sys.executable}", *arguments],
                           cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout
    return shown[shown.index("ueba study"):].split()


def test_make_study_hands_on_what_it_is_given():
    assert "--jobs" not in study_command(), "the study's own default, which knows the device"
    given = study_command("JOBS=1", "SEED=3", "ONLY=05", "DATA=/r4.2")
    for option, value in (("--jobs", '"1"'), ("--seed", '"3"'), ("--only", '"05"'),
                          ("--data", '"/r4.2"')):
        assert given[given.index(option) + 1] == value


def test_the_answer_has_its_markers_for_publishing():
    assert README.count("<!-- results:begin -->") == README.count("<!-- results:end -->") == 1
