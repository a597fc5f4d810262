"""The runner: what is skipped, what runs again, and an exit that can be trusted."""

import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ueba_helpers.errors import UserError
from ueba_helpers.study import pipeline
from ueba_helpers.study.config import profile
from ueba_helpers.study.pipeline import (
    BEFORE_NOTEBOOKS,
    NOTEBOOKS,
    PARAMETERS,
    Stage,
    check_parameters,
    executed_path,
    failing_cell,
    notebook_fingerprint,
    read_record,
    run_stages,
    select,
    stage_environment,
    stage_key,
    study_stages,
)

TOY = '''
import os, signal, sys, time
from pathlib import Path
from ueba_helpers.errors import UserError

def copy(study, source, target, log):
    """Write a file made of another one, and count the call."""
    text = Path(study, source).read_text().upper() if source else "start"
    Path(study, target).write_text(text)
    with open(log, "a") as stream:
        stream.write(target + "\\n")

def returns_path(folder):
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "rows.csv").write_text("1")
    return [folder]

def fail(study): raise KeyError("no such window")
def refuse(study): raise UserError("DATA: logon.csv: line 1: wrong header")
def leave(study): os._exit(0)
def be_killed(study): os.kill(os.getpid(), signal.SIGKILL)
def meet(study, own, other):
    """Succeed only while another stage is running as well."""
    Path(study, own).write_text("here")
    for _ in range(200):
        if Path(study, other).exists():
            return
        time.sleep(0.1)
    raise TimeoutError(f"{other} never came")
def say_threads(study, name):
    Path(study, name).write_text(os.environ["OMP_NUM_THREADS"])
def wait(study):
    Path(study, "pid").write_text(str(os.getpid()))
    time.sleep(600)
'''


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "toy_stages.py").write_text(TOY)
    return {**stage_environment(threads=1), "PYTHONPATH": str(tmp_path)}


@pytest.fixture
def study(tmp_path):
    return tmp_path / "study"


def calls(tmp_path, study, function="copy", **parameters):
    return Stage(name=function, call=f"toy_stages:{function}", limit_seconds=600,
                 parameters=parameters or {"study": str(study)}, locations=("study",))


@pytest.fixture
def chain(tmp_path, study):
    """Three stages in a row, each writing the file that the next one reads."""
    log = str(tmp_path / "calls.txt")
    names = ["first", "second", "third"]
    return [Stage(name=name, call="toy_stages:copy", limit_seconds=600,
                  needs=tuple(names[:number][-1:]), locations=("study", "log"),
                  parameters={"study": str(study), "source": names[number - 1] if number else "",
                              "target": name, "log": log})
            for number, name in enumerate(names)]


def statuses(outcomes):
    return {outcome.name: outcome.status for outcome in outcomes}


def write_notebook(path, *cells, parameters=("PROFILE", "SEED")):
    notebook = new_notebook(metadata={"kernelspec": {
        "name": "python3", "display_name": "Python 3", "language": "python"}})
    tagged = new_code_cell("\n".join(f"{name} = 0" for name in parameters))
    tagged.metadata.tags = ["parameters"]
    notebook.cells = [new_markdown_cell("# A toy"), tagged,
                      *(new_code_cell(cell) for cell in cells)]
    nbformat.write(notebook, path)
    return Stage(name=path.stem, notebook=path, parameters={"PROFILE": "smoke", "SEED": 7},
                 limit_seconds=600)


# ------------------------------------------------------------ the graph

def meeting(study, own, other, **changes):
    return Stage(name=own, call="toy_stages:meet", limit_seconds=600, locations=("study",),
                 parameters={"study": str(study), "own": own, "other": other}, **changes)


def test_stages_that_do_not_need_each_other_run_side_by_side(study, environment, tmp_path):
    pair = [meeting(study, "a", "b"), meeting(study, "b", "a")]
    ticks = []
    done = run_stages(pair, study=study, environment=environment, jobs=2, tick=ticks.append)
    assert statuses(done) == {"a": "done", "b": "done"}
    assert any("1/2 a" in line and "2/2 b" in line for line in ticks)
    other = tmp_path / "other"
    pair = [meeting(other, "a", "b"), meeting(other, "b", "a")]
    alone = run_stages(pair, study=other, environment=environment, jobs=1)
    assert statuses(alone) == {"a": "failed", "b": "not run"}, "the twin: one at a time"


def test_a_failure_lets_its_neighbour_end_and_starts_nothing_more(study, environment, tmp_path):
    stages = [replace(calls(tmp_path, study, "fail"), name="a"),
              meeting(study, "b", "told"), meeting(study, "c", "c", needs=("b",))]

    def tell(line):  # b waits for this file, and so outlasts a
        if "failed" in line:
            (study / "told").write_text("here")

    done = run_stages(stages, study=study, environment=environment, jobs=2, tell=tell)
    assert statuses(done) == {"a": "failed", "b": "done", "c": "not run"}
    on = run_stages(stages, study=study, environment=environment, jobs=2, keep_going=True)
    assert statuses(on) == {"a": "failed", "b": "unchanged", "c": "done"}


def test_kernels_side_by_side_do_not_share_their_sockets(tmp_path, study):
    """Two notebooks that wait for each other: each kernel must answer its own client."""
    meet = """
    import time
    from pathlib import Path
    Path({own!r}).write_text("here")
    for _ in range(600):
        if Path({other!r}).exists():
            break
        time.sleep(0.1)
    else:
        raise TimeoutError
    """
    marks = [str(tmp_path / f"mark-{n}") for n in (0, 1)]
    stages = [write_notebook(tmp_path / f"0{n}_toy.ipynb", textwrap.dedent(meet).format(
        own=marks[n], other=marks[1 - n])) for n in (0, 1)]
    done = run_stages([replace(stage, limit_seconds=150) for stage in stages], study=study, jobs=2)
    assert statuses(done) == {"00_toy": "done", "01_toy": "done"}


def test_nothing_runs_beside_a_stage_that_is_alone(study, environment):
    pair = [meeting(study, "a", "b", alone=True), meeting(study, "b", "b")]
    done = run_stages(pair, study=study, environment=environment, jobs=2, keep_going=True)
    assert statuses(done) == {"a": "failed", "b": "done"}, "the first waited for the other in vain"
    seconds = {"a": 10, "b": 10}
    assert pipeline.planned_seconds(pair, seconds, 2) == 20
    assert pipeline.planned_seconds([replace(pair[0], alone=False), pair[1]], seconds, 2) == 10


def test_a_stage_has_its_own_number_of_threads(study, environment):
    stages = [Stage(name=name, call="toy_stages:say_threads", threads=threads,
                    parameters={"study": str(study), "name": name}, locations=("study",))
              for name, threads in (("own", 3), ("default", None))]
    run_stages(stages, study=study, environment=environment)
    assert {name: (study / name).read_text() for name in ("own", "default")} == {
        "own": "3", "default": "1"}
    planned = {stage.name: stage for stage in study_stages(
        profile("smoke"), seed=0, data="", runs=study, notebooks=study, jobs=2)}
    alone = {name for name, stage in planned.items() if stage.alone}
    assert alone == {*BEFORE_NOTEBOOKS, "07_comparison"}
    both = planned["05_ppo_training"].threads, planned["06_grpo_training"].threads
    assert both[0] == both[1] <= planned["cold_start"].threads


def test_the_longest_way_to_the_end_goes_first(study, environment):
    order = []
    stages = [meeting(study, "short", "short", expected_seconds=1),
              meeting(study, "early", "early", expected_seconds=1),
              meeting(study, "late", "late", expected_seconds=100, needs=("early",))]
    run_stages(stages, study=study, environment=environment, jobs=1, tell=order.append)
    started = [line.split()[1] for line in order if "started" in line]
    assert started == ["early", "late", "short"]
    seconds = {stage.name: stage.expected_seconds for stage in stages}
    assert pipeline.planned_seconds(stages, seconds, 1) == 102
    assert pipeline.planned_seconds(stages, seconds, 2) == 101

def test_a_second_run_skips_all_and_a_changed_output_runs_only_what_reads_it(
        chain, study, environment, tmp_path):
    assert statuses(run_stages(chain, study=study, environment=environment)) == dict.fromkeys(
        ("first", "second", "third"), "done")
    assert (study / "third").read_text() == "START"
    again = run_stages(chain, study=study, environment=environment)
    assert statuses(again) == dict.fromkeys(("first", "second", "third"), "unchanged")

    # The first stage changes but writes the same bytes: nothing after it has to run.
    changed = [replace(chain[0], inputs={"code": "new"}), *chain[1:]]
    assert statuses(run_stages(changed, study=study, environment=environment)) == {
        "first": "done", "second": "unchanged", "third": "unchanged"}

    # A file that is gone is made again, and what reads it stays as it is.
    (study / "second").unlink()
    assert statuses(run_stages(changed, study=study, environment=environment)) == {
        "first": "unchanged", "second": "done", "third": "unchanged"}
    written = (tmp_path / "calls.txt").read_text().split()
    assert written == ["first", "second", "third", "first", "second"]


def test_force_repeats_what_is_asked_for_and_not_what_it_needs(chain, study, environment):
    run_stages(chain, study=study, environment=environment)
    outcomes = run_stages(chain, study=study, only=["second"], force=True,
                          environment=environment)
    assert statuses(outcomes) == {"first": "unchanged", "second": "done"}


def test_a_dry_run_runs_nothing_and_says_what_would(chain, study, environment, tmp_path):
    lines = []
    outcomes = run_stages(chain, study=study, start="second", dry_run=True, tell=lines.append)
    assert statuses(outcomes) == dict.fromkeys(("first", "second", "third"), "would run")
    assert "would run (about 1:00)" in lines[0]
    assert not study.exists()


def test_a_failure_stops_the_rest_and_keep_going_runs_what_does_not_need_it(
        chain, study, environment, tmp_path):
    broken = [calls(tmp_path, study, "fail"), chain[0], replace(chain[1], needs=("fail",))]
    outcomes = run_stages(broken, study=study, environment=environment)
    assert statuses(outcomes) == {"fail": "failed", "first": "not run", "second": "not run"}
    assert outcomes[0].message == "KeyError: 'no such window'"
    assert "no such window" in outcomes[0].path.read_text()  # the log, with its traceback
    outcomes = run_stages(broken, study=study, keep_going=True, environment=environment)
    assert statuses(outcomes) == {"fail": "failed", "first": "done", "second": "not run"}
    assert not all(outcome.ok for outcome in outcomes)


@pytest.mark.parametrize(("function", "message"), [
    ("leave", "ended with status 0 and left no result"),
    ("be_killed", "killed by signal 9"),
])
def test_a_process_that_dies_without_a_word_has_failed(study, environment, tmp_path, function,
                                                       message):
    outcome, = run_stages([calls(tmp_path, study, function)], study=study,
                          environment=environment)
    assert outcome.status == "failed"
    assert message in outcome.message


def test_bad_input_is_told_as_such_and_leaves_no_study_behind(study, environment, tmp_path):
    outcome, = run_stages([calls(tmp_path, study, "refuse")], study=study,
                          environment=environment)
    assert outcome.user_error
    assert outcome.message == "DATA: logon.csv: line 1: wrong header"
    assert not study.exists()


def test_a_stage_at_its_limit_is_stopped_with_its_process(study, environment, tmp_path):
    seen = set()
    stage = replace(calls(tmp_path, study, "wait"), limit_seconds=3.0)
    outcome, = run_stages([stage], study=study, environment=environment,
                          tick=lambda line: seen.update(psutil.Process().children()))
    assert outcome.status == "failed"
    assert "stopped at its limit of 0:03" in outcome.message
    assert seen
    assert not any(process.is_running() for process in seen)


def test_paths_that_a_stage_returns_are_watched_wherever_they_lie(study, environment, tmp_path):
    folder = tmp_path / "elsewhere"
    stage = Stage(name="data", call="toy_stages:returns_path", limit_seconds=600,
                  parameters={"folder": str(folder)})
    run_stages([stage], study=study, environment=environment)
    assert list(read_record(study, "data")["products"]) == [
        os.path.relpath(folder / "rows.csv", study)]
    (folder / "rows.csv").unlink()
    assert statuses(run_stages([stage], study=study, environment=environment)) == {"data": "done"}


def test_two_runners_never_work_on_one_study(chain, study, environment):
    study.mkdir()
    with pipeline._lock(study), pytest.raises(UserError, match="Another process works on"):
        run_stages(chain, study=study, environment=environment)
    assert statuses(run_stages(chain[:1], study=study, environment=environment))


def test_expected_time_is_last_times_time(chain, study, environment):
    lines, ticks = [], []
    assert pipeline.expected(chain[0], study) == 60.0
    outcome, = run_stages(chain[:1], study=study, environment=environment, tell=lines.append,
                          tick=ticks.append)
    assert lines[0] == " 1/1 first  started (about 1:00, stopped at 10:00)"
    assert f"done {pipeline.clock(outcome.seconds)}" in lines[1]
    assert "of about 1:00" in ticks[0]
    assert pipeline.expected(chain[0], study) == outcome.seconds > 0


# ------------------------------------------------------------ selection and names

STAGES = [Stage(name="data"), Stage(name="01_a", needs=("data",)),
          Stage(name="02_b", needs=("data",)), Stage(name="03_c", needs=("data", "01_a"))]


@pytest.mark.parametrize(("asked", "selected", "forced"), [
    ({}, ["data", "01_a", "02_b", "03_c"], {"data", "01_a", "02_b", "03_c"}),
    ({"only": ["03"]}, ["data", "01_a", "03_c"], {"03_c"}),
    ({"only": ["notebooks/02_b.ipynb"]}, ["data", "02_b"], {"02_b"}),
    ({"start": "02_b"}, ["data", "01_a", "02_b", "03_c"], {"02_b", "03_c"}),
])
def test_a_selection_takes_along_what_it_needs(asked, selected, forced):
    stages, names = select(STAGES, **asked)
    assert [stage.name for stage in stages] == selected
    assert names == forced


def test_a_study_in_an_impossible_place_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    data = Stage(name="data", call="os:getcwd")
    for dry_run in (False, True):
        with pytest.raises(UserError, match=r"file is no folder.* --runs"):
            pipeline.run_stages([data], study=tmp_path / "file" / "study", dry_run=dry_run)
    pipeline._check_place(tmp_path / "new" / "study")


@pytest.mark.parametrize("asked", [{"only": ["04"]}, {"start": "0"}, {"only": [""]},
                                   {"only": ["01"], "start": "02"}])
def test_an_unknown_or_ambiguous_name_is_refused(asked):
    with pytest.raises(UserError, match=r"Legal names: data, 01_a|nothing to run"):
        select(STAGES, **asked)


def test_a_stage_cannot_need_a_later_one():
    with pytest.raises(ValueError, match="03_c needs 01_a"):
        select([STAGES[0], STAGES[3], STAGES[1]])


def test_every_need_in_the_table_is_an_earlier_stage():
    names = list(NOTEBOOKS)
    assert names == sorted(names)
    for name, needs in NOTEBOOKS.items():
        assert set(needs) <= {*BEFORE_NOTEBOOKS, *names[:names.index(name)]}


def test_the_study_begins_with_the_data_and_hashes_all_it_depends_on(tmp_path):
    stages = study_stages(profile("smoke"), seed=3, data="", runs=tmp_path, notebooks=tmp_path)
    assert [stage.name for stage in stages] == [*BEFORE_NOTEBOOKS, *NOTEBOOKS]
    assert stages[0].parameters == {"profile": "smoke", "seed": 3, "data": "",
                                    "runs": str(tmp_path)}
    for stage in stages[:2]:
        module, _, function = stage.call.partition(":")
        signature = inspect.signature(getattr(importlib.import_module(module), function))
        signature.bind(**stage.parameters)
    assert stages[1].needs == ("data",) and "versions" in stages[1].inputs
    for stage in stages[2:]:
        assert tuple(stage.parameters) == PARAMETERS
        assert {"settings", "data", "code", "versions"} == set(stage.inputs)
        assert "data" in stage.needs


# ------------------------------------------------------------ keys

def test_the_key_follows_cells_and_tags_and_not_outputs_or_places(tmp_path):
    stage = write_notebook(tmp_path / "01_toy.ipynb", "x = 1")
    stage = replace(stage, parameters={**stage.parameters, "RUNS": "/here"}, locations=("RUNS",))
    key = stage_key(stage, tmp_path)
    notebook = nbformat.read(stage.notebook, as_version=4)
    notebook.cells[2].execution_count = 3
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="hello")]
    notebook.metadata["toc"] = {"shown": True}
    nbformat.write(notebook, stage.notebook)
    moved = replace(stage, parameters={**stage.parameters, "RUNS": "/there"})
    assert stage_key(moved, tmp_path) == key
    assert stage_key(replace(stage, parameters={**stage.parameters, "SEED": 8}), tmp_path) != key
    notebook.cells[2].metadata.tags = ["report"]
    nbformat.write(notebook, stage.notebook)
    assert stage_key(stage, tmp_path) != key
    before = notebook_fingerprint(stage.notebook)
    notebook.cells[2].source = "x = 2"
    nbformat.write(notebook, stage.notebook)
    assert notebook_fingerprint(stage.notebook) != before


# ------------------------------------------------------------ parameters

def test_an_unknown_notebook_parameter_is_refused_by_name(tmp_path, study):
    stage = write_notebook(tmp_path / "01_toy.ipynb", parameters=("PROFILE",))
    with pytest.raises(UserError, match=r"01_toy\.ipynb: unknown notebook parameter SEED"):
        run_stages([stage], study=study)
    assert not study.exists()
    check_parameters(stage.notebook, ["PROFILE"])


@pytest.mark.parametrize(("text", "message"), [
    (None, "does not exist"), ("{}", "is not a notebook"), ("[1]", "is not a notebook")])
def test_a_file_that_is_no_notebook_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "01_toy.ipynb").write_text(text)
    with pytest.raises(UserError, match=f"01_toy.ipynb.*{message}"):
        check_parameters(tmp_path / "01_toy.ipynb", [])


# ------------------------------------------------------------ notebooks

def test_a_notebook_runs_with_its_parameters_and_leaves_a_copy_and_a_page(
        tmp_path, study, environment):
    stage = write_notebook(
        tmp_path / "01_toy.ipynb",
        "import os\nprint(PROFILE, SEED, os.environ['HF_HUB_OFFLINE'])",
        "from ipykernel.connect import get_connection_info\n"
        "import json; print(json.loads(get_connection_info())['transport'], os.getcwd())")
    outcome, = run_stages([stage], study=study, environment=environment)
    assert outcome.ok, outcome.message
    text = executed_path(study, "01_toy").read_text()
    assert "smoke 7 1" in text
    assert "ipc" in text
    assert str(tmp_path) in text
    assert "smoke 7 1" in (study / "html" / "01_toy.html").read_text()
    assert {path.name for path in (study / "notebooks").iterdir()} == {"01_toy.ipynb"}
    assert read_record(study, "01_toy")["peak_rss_bytes"] > 30 << 20
    assert statuses(run_stages([stage], study=study)) == {"01_toy": "unchanged"}


@pytest.mark.parametrize(("cell", "message"), [
    ("raise ValueError('first\\nand last line')",
     "ValueError: first and last line in code cell 4 of 5 (`raise ValueError("),
    ("import os; os._exit(0)", "the kernel died"),
    ("raise SystemExit(0)", "in code cell 4 of 5 (`raise SystemExit(0)`)"),
    ("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", "killed by signal 9"),
])
def test_a_failing_notebook_is_kept_under_another_name_and_named_by_cell(
        tmp_path, study, environment, cell, message):
    stage = write_notebook(tmp_path / "01_toy.ipynb", "x = 1", cell, "y = 2")
    (study / "notebooks").mkdir(parents=True)
    executed_path(study, "01_toy").write_text("the last good one")
    outcome, = run_stages([stage], study=study, environment=environment)
    assert outcome.status == "failed"
    assert message in outcome.message
    assert "code cell 4 of 5" in outcome.message  # parameters appear twice in executed copies
    assert outcome.path == study / "notebooks" / "01_toy.failed.ipynb"
    assert outcome.path.exists()
    assert executed_path(study, "01_toy").read_text() == "the last good one"
    assert read_record(study, "01_toy")["key"] is None


def test_bad_input_inside_a_notebook_is_told_as_such(tmp_path, study, environment):
    (study / "notebooks").mkdir(parents=True)
    raised = "from ueba_helpers.errors import UserError", "raise UserError('rows: no windows')"
    lines = []
    outcome, = run_stages([write_notebook(tmp_path / "01_toy.ipynb", *raised)], study=study,
                          environment=environment, tell=lines.append)
    assert outcome.user_error and outcome.message.startswith("rows: no windows in code cell 4 of 4")
    assert f"open {study / 'notebooks' / '01_toy.failed.ipynb'}" in lines[-1]
    outcome, = run_stages([write_notebook(tmp_path / "01_toy.ipynb", "raise ValueError('x')")],
                          study=study, environment=environment)
    assert outcome.status == "failed" and not outcome.user_error


def test_papermills_word_alone_would_not_show_where_a_kernel_died(tmp_path):
    def cell(source, *, started="1", answered=True, count=1):
        execution = {"shell.execute_reply": "2"} if answered else {}
        return {"cell_type": "code", "source": source, "execution_count": count, "outputs": [],
                "metadata": {"execution": execution, "papermill": {
                    "status": "completed", "exception": False, "start_time": started}}}

    path = tmp_path / "dead.ipynb"
    dead = [cell("x = 1"), cell("", answered=False), cell("die()", answered=False),
            cell("never()", started=None, answered=False, count=None)]
    path.write_text(json.dumps({"cells": dead}))
    assert failing_cell(path) == "code cell 3 of 4 (`die()`)"
    path.write_text(json.dumps({"cells": dead[:2]}))
    assert failing_cell(path) is None


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_runner_that_is_ended_leaves_no_process_behind(tmp_path, study, environment, ending):
    code = ("import sys; from pathlib import Path; "
            "from ueba_helpers.study.pipeline import Stage, run_stages, stage_environment; "
            f"stage = Stage(name='wait', call='toy_stages:wait', "
            f"parameters={{'study': {str(study)!r}}}); "
            f"run_stages([stage], study={str(study)!r})")
    # A suite started in the background by a shell inherits an ignored SIGINT, and so would this.
    runner = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    pid = wait_for(lambda: int((study / "pid").read_text()))
    runner.send_signal(ending)
    runner.wait(timeout=120)
    assert runner.returncode != 0
    assert wait_for(lambda: not psutil.pid_exists(pid) or None)


@pytest.mark.slow
def test_a_killed_runner_takes_a_busy_kernel_along(tmp_path, study, environment):
    pid_file = tmp_path / "kernel.pid"
    stage = write_notebook(
        tmp_path / "01_toy.ipynb",
        f"import os; open({str(pid_file)!r}, 'w').write(str(os.getpid()))",
        "while True: sum(range(10**6))")
    code = ("from pathlib import Path; "
            "from ueba_helpers.study.pipeline import Stage, run_stages; "
            f"run_stages([Stage(name='01_toy', notebook=Path({str(stage.notebook)!r}), "
            f"parameters={{'SEED': 1}})], study={str(study)!r})")
    runner = subprocess.Popen([sys.executable, "-c", code], env=environment)
    kernel = wait_for(lambda: int(pid_file.read_text()), seconds=300)
    runner.kill()
    runner.wait()
    assert wait_for(lambda: not psutil.pid_exists(kernel) or None)


def wait_for(look, seconds=120.0):
    """Return the first result of `look` that is neither None nor an error."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if (found := look()) is not None:
                return found
        except (OSError, ValueError):
            pass
        time.sleep(0.2)
    raise AssertionError(f"nothing after {seconds} seconds")


def test_the_environment_of_a_stage_is_offline_and_has_fixed_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MPLBACKEND", "agg")
    environment = stage_environment()
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "3"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["TOKENIZERS_PARALLELISM"] == "false"
    assert environment["JUPYTER_PREFER_ENV_PATH"] == "1"
    assert "MPLBACKEND" not in environment  # the kernel chooses inline figures
    assert stage_environment(offline=False, threads=2)["HF_HUB_OFFLINE"] == "0"
    assert stage_environment(threads=2)["OMP_NUM_THREADS"] == "2"


def test_the_repository_has_the_notebooks_folder():
    assert pipeline.notebooks_folder() == Path(pipeline.__file__).parents[2] / "notebooks"
