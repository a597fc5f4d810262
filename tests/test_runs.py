"""Run folders: found again by configuration, complete only at the end, the same bytes twice."""

import ast
import json
import mmap
import os

import pandas as pd
import pytest

from ueba_helpers.errors import UserError
from ueba_helpers.study import runs
from ueba_helpers.study.config import profile
from ueba_helpers.study.runs import (
    MetricsLog,
    ResourceMonitor,
    RunFolder,
    code_fingerprint,
    data_hash,
    file_fingerprint,
    publish,
    source_fingerprint,
    study_folder,
)

CONFIGURATION = {"steps": 4, "learning_rate": 1e-4, "insiders": (1, 2, 3)}


def open_run(folder, **changes):
    settings = {"configuration": CONFIGURATION, "seed": 0, "data": "abc"} | changes
    return RunFolder.open(folder, "ppo", **settings)


def predictions(rows=2):
    return pd.DataFrame({
        "detector": "ppo", "seed": 0, "window_id": [f"AAA0001_2010-06-{n + 1:02d}"
                                                    for n in range(rows)],
        "user": "AAA0001", "day": "2010-06-01", "split": "test", "label": "normal",
        "risk": "normal", "score": 0.1, "features": [["usual_hours"]] * rows,
        "evidence": [[]] * rows, "valid": True, "seconds": 0.1})


# ------------------------------------------------------------ names

def test_a_runs_name_says_method_and_seed_and_follows_from_the_configuration(tmp_path):
    run = open_run(tmp_path)
    assert run.name.startswith("ppo-")
    assert run.name.endswith("-seed0")
    assert open_run(tmp_path).name == run.name
    changed = [open_run(tmp_path, configuration={**CONFIGURATION, "steps": 5}),
               open_run(tmp_path, data="abd"), open_run(tmp_path, seed=1)]
    assert len({run.name, *(other.name for other in changed)}) == 4


def test_a_run_writes_its_configuration_and_where_it_comes_from(tmp_path):
    run = open_run(tmp_path)
    assert run.config == {"method": "ppo", "seed": 0, "data_hash": "abc",
                          "configuration": {**CONFIGURATION, "insiders": [1, 2, 3]}}
    origin = json.loads((run.path / "provenance.json").read_text())
    assert origin["data_hash"] == "abc"
    assert origin["simulated"] is True
    assert origin["threads"] >= 1
    assert origin["versions"]["numpy"]
    assert {"commit", "dirty", "device", "code", "python"} <= set(origin)


def test_the_same_name_with_another_configuration_is_refused_by_field(tmp_path):
    open_run(tmp_path, name="mine")
    with pytest.raises(UserError, match=r"mine was made .*configuration\.steps: 4 there, 5 here"):
        open_run(tmp_path, name="mine", configuration={**CONFIGURATION, "steps": 5})
    assert open_run(tmp_path, name="mine").config["configuration"]["steps"] == 4


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"no config\.json"):
        open_run(tmp_path, name="mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_method_that_cannot_name_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot name a folder"):
        RunFolder.open(tmp_path, "../ppo", configuration={}, seed=0)


def test_a_configuration_that_is_not_a_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        open_run(tmp_path, configuration={"learning_rate": float("nan")})


def test_a_run_of_other_code_is_set_aside_and_not_returned(tmp_path, monkeypatch):
    run = open_run(tmp_path)
    run.finish(predictions())
    assert open_run(tmp_path).complete
    monkeypatch.setattr(runs, "code_fingerprint", lambda *parts: "other code")
    again = open_run(tmp_path)
    assert not again.complete
    assert RunFolder(f"{run.path}.previous").complete


# ------------------------------------------------------------ completeness and resume

def test_a_run_is_complete_only_when_its_predictions_are_there(tmp_path):
    run = open_run(tmp_path)
    assert not run.complete
    with pytest.raises(UserError, match="not complete"):
        run.predictions()
    run.finish(predictions())
    assert open_run(tmp_path).complete
    assert len(open_run(tmp_path).predictions()) == 2


@pytest.mark.parametrize("spoil", [lambda table: table.drop(columns="score"),
                                   lambda table: table.iloc[:0]])
def test_predictions_without_a_column_or_a_row_do_not_complete_a_run(tmp_path, spoil):
    run = open_run(tmp_path)
    with pytest.raises(ValueError, match="predictions"):
        run.finish(spoil(predictions()))
    assert not run.complete


def test_a_failed_write_of_predictions_leaves_nothing_behind(tmp_path, monkeypatch):
    run = open_run(tmp_path)

    def killed(self, path, **_options):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", killed)
    with pytest.raises(OSError, match="no space"):
        run.finish(predictions())
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "provenance.json"]


# ------------------------------------------------------------ metrics

def write_steps(log, first, last):
    for step in range(first, last + 1):
        log.write(step, {"reward": step / 3, "kl": 1e-5 * step, "step_time": os.getpid() + step})


def test_a_resumed_metrics_file_has_the_bytes_of_an_uninterrupted_one(tmp_path):
    whole, resumed = open_run(tmp_path / "a"), open_run(tmp_path / "b")
    write_steps(whole.log(), 1, 6)
    write_steps(resumed.log(), 1, 5)
    with open(resumed.path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 6, "kl": 0.0')  # killed while writing
    assert (resumed.path / "metrics.jsonl").read_bytes() != (
        whole.path / "metrics.jsonl").read_bytes()
    write_steps(resumed.log(resumed_step=3), 4, 6)
    for name in ("metrics.jsonl", "timings.jsonl"):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_resuming_without_the_cut_would_not_give_those_bytes(tmp_path):
    log = MetricsLog(tmp_path)
    write_steps(log, 1, 5)
    with pytest.raises(ValueError, match="step 4 is logged already"):
        write_steps(log, 4, 6)


def test_metrics_hold_no_times_and_timings_hold_nothing_else(tmp_path):
    MetricsLog(tmp_path).write(1, {"reward": 1, "step_time": 2.5, "train_runtime": 9.0,
                                   "entropy": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "entropy": null, "reward": 1}\n')
    assert (tmp_path / "timings.jsonl").read_text() == (
        '{"step": 1, "step_time": 2.5, "train_runtime": 9.0}\n')


@pytest.mark.parametrize("values", [{"reward": 1.0}, {"reward": 1.0, "kl": 0.0, "loss": 0.0}])
def test_the_first_row_fixes_the_keys_also_across_a_resume(tmp_path, values):
    MetricsLog(tmp_path).write(1, {"reward": 1.0, "kl": 0.0})
    log = MetricsLog(tmp_path, resumed_step=1)
    with pytest.raises(ValueError, match=r"keys of metrics\.jsonl are fixed"):
        log.write(2, values)
    log.write(2, {"kl": 0.5, "reward": 1.0})
    assert RunFolder(tmp_path).metrics()["kl"].tolist() == [0.0, 0.5]


def test_numbers_of_any_library_are_written_alike(tmp_path):
    import numpy as np

    for place, value in (("a", 0.25), ("b", np.float32(0.25))):
        (tmp_path / place).mkdir()
        MetricsLog(tmp_path / place).write(1, {"reward": value})
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (
        tmp_path / "b/metrics.jsonl").read_bytes()


def test_completions_of_an_interrupted_session_are_cut_back(tmp_path):
    run = open_run(tmp_path)
    run.add_completions(pd.DataFrame({"step": [1, 2, 3], "text": ["a", "b", "c"]}))
    run.add_completions(pd.DataFrame({"step": [3, 4], "text": ["C", "D"]}), resumed_step=2)
    assert run.completions()["text"].tolist() == ["a", "b", "C", "D"]


# ------------------------------------------------------------ resources

def test_resources_add_times_and_keep_peaks(tmp_path):
    run = open_run(tmp_path)
    run.add_resources({"wall_seconds": 2.0, "peak_rss_bytes": 9, "threads": 2, "note": "first"})
    run.add_resources({"wall_seconds": 3.0, "peak_rss_bytes": 5, "threads": 2, "tokens": 7})
    assert run.resources() == {"wall_seconds": 5.0, "peak_rss_bytes": 9, "threads": 2,
                               "note": "first", "tokens": 7}


def test_the_monitor_sees_memory_that_a_block_takes_and_gives_back():
    with ResourceMonitor(interval=0.01) as quiet:
        pass
    # New pages of its own: the heap may hold as much from earlier tests and take none. So many that
    # what earlier tests give back meanwhile does not hide them.
    with ResourceMonitor(interval=0.01) as busy, mmap.mmap(-1, 480 << 20) as block:
        for _ in range(480):
            block.write(b"x" * (1 << 20))
        for _ in range(10):
            sum(block[::4096])
    assert busy.result["peak_rss_bytes"] - quiet.result["peak_rss_bytes"] > 320 << 20
    assert busy.result["wall_seconds"] > 0
    assert busy.result["cpu_seconds"] > quiet.result["cpu_seconds"]


# ------------------------------------------------------------ fingerprints

def test_comments_and_docstrings_leave_the_code_hash_alone_and_code_does_not():
    source = 'def f(x):\n    """Twice."""\n    return 2 * x\n'
    assert source_fingerprint(source) == source_fingerprint(
        "def f(x):\n    # doubled\n    return 2*x\n")
    assert source_fingerprint(source) != source_fingerprint(source.replace("2 *", "3 *"))
    assert source_fingerprint('def f():\n    """Only words."""\n') == source_fingerprint(
        "def f():\n    pass\n")


def test_the_code_hash_of_a_part_sees_only_that_part(tmp_path):
    for name in ("data", "rl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "room.py").write_text("x = 1\n")
    before = code_fingerprint("data", package=tmp_path), code_fingerprint("rl", package=tmp_path)
    (tmp_path / "rl" / "room.py").write_text("x = 22\n")
    after = code_fingerprint("data", package=tmp_path), code_fingerprint("rl", package=tmp_path)
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_the_whole_package_can_be_hashed():
    for path in runs.PACKAGE.rglob("*.py"):
        ast.parse(path.read_text())
    assert len(code_fingerprint()) == 16


def test_a_file_fingerprint_sees_both_ends_and_the_size(tmp_path):
    path = tmp_path / "log.csv"
    content = bytearray(3 << 20)
    path.write_bytes(content)
    seen = {file_fingerprint(path)}
    for position in (0, len(content) - 1):
        changed = content.copy()
        changed[position] = 1
        path.write_bytes(changed)
        seen.add(file_fingerprint(path))
    path.write_bytes(content + b"\0")
    seen.add(file_fingerprint(path))
    assert len(seen) == 4


def test_the_data_hash_follows_content_and_not_the_place(tmp_path):
    for place in ("here", "there"):
        folder = tmp_path / place / "r4.2"
        (folder / "LDAP").mkdir(parents=True)
        (folder / "logon.csv").write_text("id,date,user,pc,activity\n")
        (folder / "LDAP" / "2010-01.csv").write_text("employee_name\n")
    chosen = profile("smoke")
    here, there = tmp_path / "here/r4.2", tmp_path / "there/r4.2"
    assert data_hash(chosen, seed=0, data=here) == data_hash(chosen, seed=1, data=there)
    (tmp_path / "there" / "answers").mkdir()
    (tmp_path / "there" / "answers" / "insiders.csv").write_text("dataset\n")
    assert data_hash(chosen, seed=0, data=here) != data_hash(chosen, seed=0, data=there)


def test_simulated_data_differ_by_profile_and_seed(tmp_path):
    names = {study_folder(profile(name), seed=seed, data="", runs=tmp_path)
             for name in ("smoke", "laptop") for seed in (0, 1)}
    assert len({str(name).rpartition("-")[2] for name in names}) == 4
    assert study_folder(profile("smoke"), seed=3, data="", runs=tmp_path).name.startswith(
        "smoke-seed3-")


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: None, "does not exist"),
    (lambda path: path.write_text("x"), "is a file"),
    (lambda path: path.mkdir(), "holds no CSV file"),
])
def test_a_data_path_that_cannot_be_read_is_refused(tmp_path, make, message):
    make(tmp_path / "r4.2")
    with pytest.raises(UserError, match=f"DATA: .*r4.2.*{message}"):
        data_hash(profile("smoke"), seed=0, data=tmp_path / "r4.2")


# ------------------------------------------------------------ publishing

@pytest.mark.parametrize("simulated", [True, False])
def test_publishing_leaves_weights_behind_and_rows_of_a_real_release_too(tmp_path, simulated):
    run = open_run(tmp_path / "runs", simulated=simulated)
    run.log().write(1, {"reward": 1.0})
    run.add_completions(pd.DataFrame({"step": [1], "text": ["{}"]}))
    for inside in ("checkpoints/checkpoint-1/trainer_state.json", "adapter/adapter_config.json",
                   "model.safetensors", "samples/note.txt"):
        (run.path / inside).parent.mkdir(parents=True, exist_ok=True)
        (run.path / inside).write_text("{}")
    with pytest.raises(UserError, match="not complete"):
        publish(run, tmp_path / "results")
    run.finish(predictions())
    copy = publish(run, tmp_path / "results")
    found = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    rows = {"predictions.parquet", "completions.parquet"}
    assert found == {"config.json", "provenance.json", "metrics.jsonl", "timings.jsonl",
                     "samples/note.txt", "published.json"} | (rows if simulated else set())
    left_out = set(json.loads((copy / "published.json").read_text())["left_out"])
    assert left_out & rows == (set() if simulated else rows)
    assert publish(run, tmp_path / "results") == copy  # again, over the first copy
