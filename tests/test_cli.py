"""The command `ueba`: exit statuses, messages, and the lines a study ends with."""

import io
import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from ueba_helpers import cli
from ueba_helpers.errors import UserError
from ueba_helpers.rl.settings import PolicySettings
from ueba_helpers.study import pipeline, runs, stages
from ueba_helpers.study.config import profile
from ueba_helpers.study.pipeline import Stage, stage_environment
from ueba_helpers.study.report import COMPARISON_COLUMNS

TOY = '''
from pathlib import Path
from ueba_helpers.errors import UserError

def compare(study, table):
    Path(study, "comparison.csv").write_text(table)

def fail(study, table): raise RuntimeError("the critic diverged")
def refuse(study, table): raise UserError("DATA: http.csv: line 7: 4 fields, not 6")
def refuse_late(study, table):
    compare(study, table)
    raise UserError("evaluation.alert_budgets: 5000")
'''


@pytest.fixture
def toy_study(tmp_path, monkeypatch):
    """Put a study of one toy stage in the place of the real one; return how to choose it."""
    (tmp_path / "toy_commands.py").write_text(TOY)
    row = dict.fromkeys(COMPARISON_COLUMNS, 0.25) | {"detector": "grpo", "seconds": 60}
    study = runs.study_folder(profile("smoke"), seed=0, data="", runs=tmp_path / "runs")

    def choose(function, **inputs):
        stage = Stage(name="07_comparison", call=f"toy_commands:{function}", limit_seconds=600,
                      inputs=inputs,
                      parameters={"study": str(study),
                                  "table": pd.DataFrame([row]).to_csv(index=False)})
        monkeypatch.setattr(pipeline, "study_stages", lambda *_, **__: [stage])
        monkeypatch.setattr(pipeline, "stage_environment", lambda **__: {
            **stage_environment(threads=1), "PYTHONPATH": str(tmp_path)})
        return ["study", "--profile", "smoke", "--runs", str(tmp_path / "runs")], study

    return choose


def test_a_study_ends_with_its_table_and_the_path_of_its_report(toy_study, capsys):
    arguments, study = toy_study("compare")
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == f"report: {study / 'report.html'}"
    heading = next(line for line in shown if line.startswith("detector"))
    for column in ("macro-F1", "PR-AUC", "valid format", "evidence hit rate", "seconds", "GiB"):
        assert column in heading
    assert shown[shown.index(heading) + 1].startswith("grpo")
    assert "<td>grpo</td>" in (study / "report.html").read_text()
    assert cli.main(arguments) == 0
    assert "unchanged" in capsys.readouterr().out


def test_a_failed_stage_gives_status_one_and_says_what_to_open(toy_study, capsys):
    arguments, study = toy_study("fail")
    assert cli.main(arguments) == 1
    shown = capsys.readouterr()
    assert "RuntimeError: the critic diverged" in shown.out
    assert f"open {study / 'logs' / '07_comparison.log'}" in shown.out
    assert "Traceback" not in shown.out + shown.err
    assert "the critic diverged" in (study / "report.html").read_text()


def test_bad_input_inside_a_stage_gives_status_two_and_its_message(toy_study, capsys):
    arguments, study = toy_study("refuse")
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == "ueba study: DATA: http.csv: line 7: 4 fields, not 6\n"
    assert not study.parent.exists(), "nor the folder of studies, which was made for this one"


def test_a_late_refusal_reports_what_there_is_and_gives_status_two(toy_study, capsys):
    arguments, study = toy_study("refuse_late")
    study.mkdir(parents=True)  # earlier stages have been here
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err == "ueba study: evaluation.alert_budgets: 5000\n"
    assert f"report: {study / 'report.html'}" in shown.out


def stale_is_told(toy_study, monkeypatch, capsys) -> bool:
    """Whether a table of an earlier state is shown as such, on the terminal and in the report."""
    arguments, study = toy_study("compare", code="before")
    assert cli.main(arguments) == 0
    fresh = capsys.readouterr().out, (study / "report.html").read_text()
    arguments, study = toy_study("compare", code="after")
    monkeypatch.setattr(pipeline, "run_stages", lambda *_, **__: [])  # asked for something else
    assert cli.main(arguments) == 0
    stale = capsys.readouterr().out, (study / "report.html").read_text()
    told = "The table is that of an earlier 07_comparison"
    assert all("grpo" in text for text in (*fresh, *stale))
    return all(told in text for text in stale) and not any(told in text for text in fresh)


def test_a_table_of_an_earlier_state_is_told_to_be_one(toy_study, monkeypatch, capsys):
    assert stale_is_told(toy_study, monkeypatch, capsys)


def test_a_record_with_any_key_taken_for_current_is_seen(toy_study, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "is_current", lambda stage, study, key: bool(
        pipeline.read_record(study, stage.name).get("key")))
    assert not stale_is_told(toy_study, monkeypatch, capsys)


def test_a_profile_file_is_kept_as_the_study_began_with_it(tmp_path, monkeypatch):
    """Every notebook reads the file again: an edit on the way must not reach half of them."""
    given, seen = tmp_path / "mine.toml", []
    given.write_text('extends = "smoke"\nmax_items = 6\n', encoding="utf-8")

    def stop(stages, _asked, **_):
        seen.extend(stages)
        raise UserError("far enough")
    monkeypatch.setattr(pipeline, "_Schedule", stop)
    command = ["study", "--profile", str(given), "--runs", str(tmp_path / "runs")]
    assert cli.main(command) == 2
    given.write_text('extends = "smoke"\nmax_items = 5\n', encoding="utf-8")
    for stage in seen:
        read = {key.upper(): value for key, value in stage.parameters.items()}["PROFILE"]
        assert read != str(given) and profile(read).max_items == 6
    assert cli.main(["study", "--profile", read, *command[3:]]) == 2, "what was kept is a profile"
    assert profile(read).max_items == 6
    assert cli.main(command) == 2 and profile(read).max_items == 5, "the next study begins anew"
    (tmp_path / "file").touch()
    elsewhere = [*command[:-1], str(tmp_path / "file" / "runs")]
    assert cli.main(elsewhere) == 2, "a place that cannot be made is refused as for other profiles"


def test_a_dry_run_writes_nothing(toy_study, capsys):
    arguments, study = toy_study("compare")
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert "nothing was run" in capsys.readouterr().out
    assert not study.exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["study", "--profile", "huge"], "Unknown profile 'huge'. Legal profiles: smoke"),
    (["study", "--jobs", "0"], "--jobs 0: give a whole number of 1 and more"),
    (["study", "--runs", "/proc/none/of/this"], "Choose another --runs"),
    (["study", "--seed", "-1"], "--seed -1 is not possible"),
    (["study", "--data", "/no/such/r4.2"], "the path /no/such/r4.2 does not exist"),
    (["study", "--only", "99_dessert"], "Unknown notebook '99_dessert'"),
    (["estimate", "--profile", "huge"], "Unknown profile 'huge'"),
    (["ingest", "/no/such/r4.2", "--out", "store"], "/no/such/r4.2"),
    (["simulate", "out", "--users", "3"], "users"),
    (["simulate", os.devnull + "/x"], f"{os.devnull}/x: cannot be written"),
])
def test_a_mistake_gives_one_message_and_status_two(arguments, message, capsys, tmp_path,
                                                    monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith(f"ueba {arguments[0]}: ")
    assert "Traceback" not in shown.err
    assert shown.out == "" or "--runs" in arguments, "not a word before the refusal"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asked", ["abc", "0", "-2", "1.5"])
def test_an_impossible_number_of_threads_is_refused_by_name(asked, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert cli.main(["study", "--profile", "smoke", "--runs", str(tmp_path / "runs")]) == 2
    assert f"OMP_NUM_THREADS='{asked}' is not possible" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["dance"], ["simulate"], ["study", "--seed", "x"],
                                       ["simulate", "out", "--insiders", "1,2"]])
def test_arguments_that_cannot_be_parsed_give_status_two(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: ueba" in capsys.readouterr().err


def test_an_interrupt_gives_status_130(monkeypatch, capsys):
    def interrupted(_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_doctor", interrupted)
    assert cli.main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_statuses_reach_the_shell_and_a_defect_gives_status_one(tmp_path):
    def status(*arguments, environment=None):
        return subprocess.run([sys.executable, "-m", "ueba_helpers", *arguments], check=False,
                              capture_output=True, cwd=tmp_path, env=environment).returncode

    assert status("study", "--help") == 0
    assert status("study", "--profile", "huge") == 2
    (tmp_path / "sitecustomize.py").write_text(
        "import ueba_helpers.cli as cli\n"
        "def _doctor(options): raise ZeroDivisionError\n"
        "cli._doctor = _doctor\n")
    assert status("doctor", environment={**os.environ, "PYTHONPATH": str(tmp_path)}) == 1


def test_simulate_and_ingest_do_what_they_say(tmp_path, capsys):
    release, store = tmp_path / "r4.2", tmp_path / "store"
    assert cli.main(["simulate", str(release), "--users", "24", "--days", "45", "--seed", "1",
                     "--insiders", "1,1,1", "--web-rate", "0.1"]) == 0
    assert "24 users, 45 days, 3 insiders" in capsys.readouterr().out
    assert {"logon.csv", "http.csv", "LDAP", "answers"} <= {
        path.name for path in release.iterdir()}
    assert cli.main(["ingest", str(release), "--out", str(store), "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    rows = manifest["rows"]
    assert rows["quarantined"] == 0 and rows["other_releases"] > 0
    assert rows["read"] == rows["stored"] + rows["other_releases"] > 1000
    assert (store / "manifest.json").exists()


def simulated_with(arguments, monkeypatch) -> dict:
    """Run `ueba simulate` with a simulator that only notes what it is given."""
    from ueba_helpers.data import simulate

    given = {}
    monkeypatch.setattr(simulate, "simulate",
                        lambda folder, **options: given.update(options) or {"rows": {}})
    assert cli.main(["simulate", "out", *arguments]) == 0
    return {name: given[name] for name in ("users", "days", "insiders", "hardness")}


@pytest.mark.parametrize(("arguments", "sizes"), [
    ([], (400, 150, (24, 24, 12), 0.3)),
    (["--users", "100"], (100, 150, (6, 6, 3), 0.3)),
    (["--r4.2"], (1000, 501, (30, 30, 10), 0.0)),
    (["--r4.2", "--users", "500", "--hardness", "1"], (500, 501, (15, 15, 5), 1.0)),
    (["--r4.2", "--days", "90", "--insiders", "0,0,1"], (1000, 90, (0, 0, 1), 0.0)),
])
def test_simulate_has_a_preset_of_the_size_and_mix_of_r4_2(arguments, sizes, monkeypatch, capsys):
    given = simulated_with(arguments, monkeypatch)
    assert given == dict(zip(("users", "days", "insiders", "hardness"), sizes, strict=True))
    assert f"{sizes[0]} users, {sizes[1]} days, {sum(sizes[2])} insiders" in capsys.readouterr().out


def test_the_help_of_simulate_gives_ranges_that_the_simulator_accepts(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["simulate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "0 to 0.9" in shown and "incident days of scenarios 1 and 2" in shown
    folder = tmp_path / "out"
    for option, value in (("--label-noise", "0.91"), ("--hardness", "1.01")):
        assert cli.main(["simulate", str(folder), option, value]) == 2
        assert "must lie between 0.0 and" in capsys.readouterr().err


def time_left_is_told(share_told) -> bool:
    """Whether a simulation of ten days, three seconds each, tells its share and time left."""
    terminal, seconds = Terminal(), iter(range(0, 100, 3))
    told = share_told(cli._Progress(terminal), lambda: next(seconds))
    for day in range(1, 11):
        told(day, 10)
    lines = [line.strip() for line in terminal.getvalue().split("\r")[1:]]
    return (
        lines[0] == "simulate: 1 of 10 days, 10%, about 0:27 left"
        and lines[7] == "simulate: 8 of 10 days, 80%, about 0:06 left"
        and lines[9] == "simulate: 10 of 10 days, 100%, now answers and truth"
    )


def test_simulate_tells_the_share_done_and_the_time_left():
    assert time_left_is_told(cli._share_told)


def test_a_time_left_that_takes_the_past_for_the_future_is_seen():
    def twin(progress, now):
        began = now()
        return lambda done, total: progress.tick(
            f"simulate: {done} of {total} days, {done / total:.0%}, "
            f"about 0:{now() - began:02d} left")

    assert not time_left_is_told(twin)


def test_simulate_shows_its_progress_on_standard_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    release = tmp_path / "r4.2"
    assert cli.main(["simulate", str(release), "--users", "24", "--days", "40", "--seed", "1",
                     "--insiders", "1,1,1", "--web-rate", "0.1"]) == 0
    shown = sys.stderr.getvalue()
    assert shown.count("\rsimulate: ") == 40 and "20 of 40 days, 50%, about 0:0" in shown
    assert shown.endswith("\r") and "simulate:" not in capsys.readouterr().out


def test_simulate_sweeps_what_a_killed_one_left(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".r4.2.{ended.pid}.partial"
    left.mkdir()
    (left / "http.csv").write_text("id")
    assert cli.main(["simulate", str(tmp_path / "r4.2"), "--users", "24", "--days", "40",
                     "--insiders", "1,1,1", "--web-rate", "0.1"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["r4.2"]


def test_ingest_of_another_release_is_refused_and_leaves_no_store(release, tmp_path, capsys):
    copy = tmp_path / "release"
    shutil.copytree(release, copy)
    lines = (copy / "device.csv").read_text().splitlines()
    lines[0] = "id,date,user,pc,file_tree,activity"
    (copy / "device.csv").write_text("\n".join(lines) + "\n")
    assert cli.main(["ingest", str(copy), "--out", str(tmp_path / "store")]) == 2
    assert "device.csv" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("flags, status", [([], 2), (["--allow-truncated"], 0)])
def test_a_cut_log_stops_the_ingest_unless_its_flag_is_given(release, tmp_path, capsys, flags,
                                                             status):
    copy, store = tmp_path / "release", tmp_path / "store"
    shutil.copytree(release, copy)
    log = copy / "logon.csv"
    log.write_bytes(log.read_bytes()[:-4])
    assert cli.main(["ingest", str(copy), "--out", str(store), *flags]) == status
    assert ("--allow-truncated" in capsys.readouterr().err) is (status == 2)
    assert store.exists() is (status == 0)


@pytest.mark.parametrize("made", ["release", "store"])
def test_a_study_of_data_without_answers_stops_before_it_reads_the_logs(release, tmp_path, made,
                                                                        monkeypatch):
    given = tmp_path / "without"
    shutil.copytree(release, given, ignore=shutil.ignore_patterns("answers"))
    if made == "store":
        assert cli.main(["ingest", str(given), "--out", str(tmp_path / "store")]) == 0
        given = tmp_path / "store"
    monkeypatch.setattr(stages.cert, "ingest", None)
    with pytest.raises(UserError, match=r"answers/insiders\.csv is missing"):
        stages.prepare_data(profile("smoke"), 0, str(given), str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def small_store(tmp_path_factory):
    """A simulated release of the size of the smoke profile, and a store made of it."""
    folder = tmp_path_factory.mktemp("data")
    assert cli.main(["simulate", str(folder / "r4.2"), "--users", "40", "--days", "60",
                     "--insiders", "4,4,2", "--web-rate", "0.2"]) == 0
    assert cli.main(["ingest", str(folder / "r4.2"), "--out", str(folder / "store")]) == 0
    return folder / "r4.2", folder / "store"


def test_a_study_takes_a_store_as_it_is_and_gets_the_windows_of_its_release(small_store, tmp_path,
                                                                            monkeypatch):
    release, store = small_store
    audit = pd.DataFrame([{"check": "any", "outcome": "passed", "detail": ""}])
    monkeypatch.setattr(stages, "_audit", lambda *_: audit)  # slow, and not asked about here
    home = stages.prepare_data(profile("smoke"), 0, str(release), str(tmp_path / "runs"))
    monkeypatch.setattr(stages.cert, "ingest", None)
    taken = stages.prepare_data(profile("smoke"), 0, str(store), str(tmp_path / "runs"))
    assert taken != home and (taken / "store").resolve() == store.resolve()
    for name in ("splits.parquet", "judged.parquet", "items.parquet", "training.parquet"):
        pd.testing.assert_frame_equal(pd.read_parquet(taken / name), pd.read_parquet(home / name))


def test_the_hash_of_a_store_follows_its_manifest(small_store, tmp_path):
    _, store = small_store
    copy = tmp_path / "moved"
    shutil.copytree(store, copy)

    def named(folder):
        return runs.data_hash(profile("smoke"), seed=0, data=folder)

    assert named(copy) == named(store)
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text().replace("r4.2", "r9"))
    assert named(copy) != named(store)


# ------------------------------------------------------------ estimate and doctor

@pytest.mark.parametrize("settings", [
    PolicySettings(vocab_size=512, hidden_size=32, layers=1),
    PolicySettings(vocab_size=1024, hidden_size=96, layers=2),
])
def test_the_estimate_counts_every_parameter_of_the_tiny_policy(settings):
    from transformers import AutoModelForCausalLM

    from ueba_helpers.rl.policies import Qwen3Config

    heads = max(2, settings.hidden_size // 32)
    model = AutoModelForCausalLM.from_config(Qwen3Config(
        vocab_size=settings.vocab_size, hidden_size=settings.hidden_size, head_dim=32,
        intermediate_size=3 * settings.hidden_size, num_hidden_layers=settings.layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2),
        tie_word_embeddings=True))
    assert cli.policy_parameters(settings) == sum(
        weights.numel() for weights in model.parameters())


def test_full_training_needs_nine_copies_and_an_unknown_model_has_no_estimate():
    assert cli.training_bytes(PolicySettings(), 1000) == 1000 * 4 * 9
    lora = PolicySettings(lora_rank=32, dtype="bfloat16")
    assert 2000 < cli.training_bytes(lora, 1000) < 2000 * 1.5
    assert cli.policy_parameters(PolicySettings(name="somebody/some-model")) is None


def test_estimate_lists_every_stage_and_their_sum(capsys, tmp_path):
    assert cli.main(["estimate", "--profile", "laptop", "--runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [
        *pipeline.BEFORE_NOTEBOOKS, *pipeline.NOTEBOOKS, "all"]
    assert "1.0 M parameters" in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_doctor_finds_a_package_that_is_not_as_pinned(monkeypatch, capsys):
    assert cli.main(["doctor"]) == 0
    assert "everything is in order" in capsys.readouterr().out
    true_version = runs.installed_version
    monkeypatch.setattr(runs, "installed_version",
                        lambda name: "0.0.1" if name == "trl" else true_version(name))
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "trl 0.0.1, pinned 1.14.2" in shown
    assert "1 to mend" in shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_rewrites_one_line_on_a_terminal_and_is_quiet_elsewhere():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = cli._Progress(stream)
        progress.tell("started")
        progress.tick("0:01 of about 1:00")
        progress.tick("0:02")
        progress.tell("done")
    assert file.getvalue() == "started\ndone\n"
    assert terminal.getvalue().count("\n") == 2
    assert terminal.getvalue().endswith("\r" + " " * 4 + "\rdone\n")


def test_user_errors_are_values_that_tests_can_tell_apart():
    assert issubclass(UserError, ValueError)
