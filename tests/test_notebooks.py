"""The whole study, in profile smoke: every notebook from a fresh kernel, top to bottom."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from ueba_helpers.study.pipeline import NOTEBOOKS
from ueba_helpers.study.report import COMPARISON_COLUMNS

DETECTORS = {"rules", "gradient_boosting", "sft", "ppo", "grpo"}


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


def test_every_notebook_runs_and_the_report_is_written(studied):
    done, folder = studied
    executed = {path.stem for path in (folder / "notebooks").glob("*.ipynb")}
    assert executed == set(NOTEBOOKS)
    report = (folder / "report.html").read_text()
    assert report.count("data:image/png;base64,") >= len(NOTEBOOKS) - 2
    assert str(folder / "report.html") in done.stdout


def test_the_table_has_every_detector_and_column(studied):
    _, folder = studied
    table = pd.read_csv(folder / "comparison.csv")
    assert set(COMPARISON_COLUMNS) <= set(table.columns)
    assert set(table["detector"]) >= DETECTORS
    assert table["macro_f1"].between(0, 1).all() and table["pr_auc"].between(0, 1).all()
    assert (table.loc[table["detector"].isin({"sft", "ppo", "grpo"}), "seconds"] > 0).all()


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
    assert "unchanged" in done.stdout.lower() or "skip" in done.stdout.lower()
