"""The whole study, in profile smoke: every notebook from a fresh kernel, top to bottom.

And, without running them, that each chapter has what a chapter is made of.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from ueba_helpers.study.comparison import COMPARISON_COLUMNS, read_made_by, read_verdict
from ueba_helpers.study.pipeline import BEFORE_NOTEBOOKS, NOTEBOOKS, notebooks_folder
from ueba_helpers.study.stages import CLASSICAL, GBOOST_SAME, POLICIES

DETECTORS = [*CLASSICAL, GBOOST_SAME, *POLICIES]
CHAPTERS = [name for name in NOTEBOOKS if not name.startswith("00")]
FIGURE = re.compile(r"^plt\.show\(\)$", re.MULTILINE)  # each shows one figure


# ------------------------------------------------------------ what a chapter is made of

def read(name: str) -> dict:
    return json.loads((notebooks_folder() / f"{name}.ipynb").read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def reported_figures(notebook: dict) -> int:
    """Return how many figures the cells tagged `report` show."""
    return sum(len(FIGURE.findall(source(cell))) for cell in notebook["cells"]
               if cell["cell_type"] == "code" and "report" in cell["metadata"].get("tags", []))


def chapter_faults(notebook: dict) -> list[str]:
    """Return which parts are missing: question, by-hand part with a check, figure, break."""
    cells = notebook["cells"]
    faults = []
    if not source(cells[0]).splitlines()[0].endswith("?"):
        faults.append("the title asks no question")
    by_hand = [i for i, cell in enumerate(cells) if re.search(r"\bby.hand\b", source(cell), re.I)]
    if not by_hand or not _checked(cells[by_hand[0]:]):
        faults.append("nothing is computed by hand and checked")
    if not reported_figures(notebook):
        faults.append("no figure goes into the report")
    headings = [i for i, cell in enumerate(cells) if source(cell).startswith("## ")]
    broken = [i for i in headings if source(cells[i]).startswith("## Try to break it\n")]
    if len(broken) != 1:
        faults.append("there is no one section '## Try to break it'")
    elif not _checked(cells[broken[0]:min(i for i in headings if i > broken[0])]):
        faults.append("the section '## Try to break it' asserts nothing")
    return faults


def _checked(cells: list[dict]) -> bool:
    return any(re.search(r"^\s*assert ", source(cell), re.MULTILINE) for cell in cells
               if cell["cell_type"] == "code")


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_asks_computes_by_hand_draws_and_tries_to_break_it(name):
    assert chapter_faults(read(name)) == []


@pytest.mark.parametrize(("what", "pattern", "instead", "fault"), [
    ("markdown", r"^(# .*)\?$", r"\1.", "asks no question"),
    ("markdown", r"(?i)by.hand", "at once", "by hand"),
    ("code", r"^plt\.show\(\)$", "", "no figure"),
    ("markdown", r"## Try to break it", "## Try it", "no one section"),
    ("code", r"^( *)assert ", r"\1_ = ", "asserts nothing"),
])
def test_a_chapter_without_one_of_its_parts_does_not_pass(what, pattern, instead, fault):
    notebook = copy.deepcopy(read("07_comparison"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == what or fault == "by hand":
            cell["source"] = re.sub(pattern, instead, source(cell), flags=re.MULTILINE)
    assert any(fault in found for found in chapter_faults(notebook))


# ------------------------------------------------------------ the study in profile smoke

@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def studied(runs) -> tuple[subprocess.CompletedProcess, Path]:
    """Return the finished process of `ueba study --profile smoke`, and its study folder."""
    done = run_study(runs)
    folders = list(runs.glob("smoke-*"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert len(folders) == 1
    return done, folders[0]


def run_study(runs: Path, *options: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "ueba_helpers", "study", "--profile", "smoke", "--runs", str(runs),
         *options], capture_output=True, text=True, timeout=1500, env=environment)


def test_every_notebook_runs_and_the_report_shows_each_of_its_figures(studied):
    done, folder = studied
    executed = {path.stem for path in (folder / "notebooks").glob("*.ipynb")}
    assert executed == set(NOTEBOOKS)
    report = (folder / "report.html").read_text()
    expected = {name: reported_figures(read(name)) for name in NOTEBOOKS}
    shown = {name: len(list((folder / "figures").glob(f"{name}-*.png"))) for name in NOTEBOOKS}
    assert shown == expected
    assert report.count("data:image/png;base64,") == sum(expected.values()) > len(NOTEBOOKS)
    assert str(folder / "report.html") in done.stdout


def test_the_table_has_every_detector_and_column_and_its_verdict(studied):
    _, folder = studied
    table = pd.read_csv(folder / "comparison.csv")
    assert set(COMPARISON_COLUMNS) <= set(table.columns)
    assert list(table["detector"]) == DETECTORS
    assert table["macro_f1"].between(0, 1).all() and table["pr_auc"].between(0, 1).all()
    assert table["evidence_hit_rate"].notna().tolist() == [
        name in POLICIES for name in DETECTORS]
    assert (table["seconds"] > 0).all()
    trained = table.set_index("detector").loc[list(POLICIES)]
    assert (trained["peak_memory_gib"] > 0).all()
    verdict, made_by = read_verdict(folder), read_made_by(folder)
    assert verdict["simulated"] and list(verdict["seeds"]) == ["0"]
    macro_f1 = table.set_index("detector")["macro_f1"]
    assert verdict["difference"] == pytest.approx(macro_f1["ppo"] - macro_f1["grpo"])
    assert all((folder / name / "predictions.parquet").exists() for name in made_by["runs"])


def test_executed_notebooks_name_no_path_of_this_machine_and_no_warning(studied):
    _, folder = studied
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        said = "".join("".join(output.get("text", [])) for output in outputs)
        assert not re.search(r"(?:[A-Za-z]*Warning:|Traceback)", said), path.name
        assert str(Path.home()) + "/" not in said, path.name
        assert not any(output.get("name") == "stderr" for output in outputs), path.name


def test_a_second_run_has_nothing_to_do(studied, runs):
    done = run_study(runs)
    assert done.returncode == 0, done.stderr[-2000:]
    stages = re.findall(r"^ *\d+/(\d+) (\S+) +(\w+)", done.stdout + done.stderr, re.MULTILINE)
    assert [name for _, name, _ in stages] == [*BEFORE_NOTEBOOKS, *NOTEBOOKS]
    assert {status for _, _, status in stages} == {"unchanged"}
    assert {total for total, _, _ in stages} == {str(len(NOTEBOOKS) + len(BEFORE_NOTEBOOKS))}
