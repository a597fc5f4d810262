"""Stages: samples that keep splits apart, rows that match their windows, complete runs reused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from ueba_helpers.data import splits, windows
from ueba_helpers.data.files import write_json
from ueba_helpers.errors import UserError
from ueba_helpers.rl.settings import SFTSettings
from ueba_helpers.study import stages
from ueba_helpers.study.config import profile


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return stages.open_study("smoke", 0, "", str(tmp_path_factory.mktemp("runs")))


def test_training_and_judged_windows_share_no_account(study):
    judged = set(pd.concat([study.sample(s) for s in stages.SPLITS])["window_id"])
    users = study.windows.set_index("window_id")["user"]
    trained = {name: set(users[study.training_windows(name)["window_id"]])
               for name in ("cold", "rl", "all")}
    assert not trained["cold"] & trained["rl"], "cold start and RL use disjoint accounts"
    assert not trained["cold"] & set(users[list(judged)])
    assert not (trained["all"] | trained["rl"]) & set(users[list(judged)])
    assert trained["cold"] & trained["all"], "the same comparison can find a shared account"


def test_prompts_and_demonstrations_have_what_the_profile_asks_for(study, monkeypatch):
    from ueba_helpers.task.verdicts import parse_verdict

    asking = dataclasses.replace(study.profile, style="think", confidence=True)
    for chosen, asked in ((asking, True), (study.profile, False)):
        other = dataclasses.replace(study, profile=chosen)
        monkeypatch.setitem(vars(other), "home", study.home)
        shown = other.demonstrations("cold", SFTSettings(downgrade=0.4))
        for row in shown:
            told = row["prompt"][0]["content"]
            assert ("<think>" in told) == ("confidence" in told) == asked
            assert (row["style"] == "think") == row["confidence"] == asked
            said = parse_verdict(row["completion"], row["evidence_ids"], think=asked)
            assert said.valid and (said.confidence is not None) == asked
    honest = [parse_verdict(row["completion"], row["evidence_ids"], think=True)
              for row in dataclasses.replace(study, profile=asking).demonstrations(
                  "cold", SFTSettings())]
    assert {verdict.confidence for verdict in honest} == {1.0}


def test_a_simulated_release_tells_why_innocent_days_deviate(study):
    found = study.reasons()
    assert found.name == "innocent cause" and found.index.is_unique
    days = study.windows.set_index("window_id")
    known = found.index.intersection(days.index)
    assert len(known) > 20 and days.loc[known, "risk"].ne("malicious").any()
    assert set(found) != set(days["role"]), "the twin: what a real release would tell"


def test_dev_and_test_samples_share_no_account(study):
    users = study.windows.set_index("window_id")["user"]
    dev, test = (set(users[study.sample(split)["window_id"]]) for split in stages.SPLITS)
    assert dev and test and not dev & test


def test_the_ceiling_is_that_of_the_judged_days_and_a_given_store_has_none(study):
    simulated = json.loads(next(Path(study.runs).glob("data/*/simulation.json")).read_text())
    assert simulated["parameters"]["history_days"] == study.profile.windows.history_days == 15
    for split in stages.SPLITS:
        best = study.best_possible(split=split)
        assert set(best["window_id"]) == set(study.sample(split)["window_id"])
    known = pd.read_csv(next(Path(study.runs).glob("data/*/truth/optimal.csv")))
    counted = set((known["user"] + "_" + known["day"])[known["counted"] == 1])
    table = study.windows
    assert counted == set(table.loc[~(table["ignore"] | table["precursor"]), "window_id"])
    given = stages.Study(study.profile, 0, str(study.home / "store"), study.runs)
    assert given.best_possible() is None


def test_no_precursor_or_ignored_day_is_trained_on(study):
    for name in ("cold", "rl", "all"):
        table = study.training_windows(name)
        assert not (table["ignore"] | table["precursor"]).any()


def test_rows_follow_the_order_of_their_windows_and_repeat_with_them(study):
    table = study.training_windows("cold").head(5)
    table = pd.concat([table, table.head(2)], ignore_index=True)
    rows = study.rows(table)
    assert [row["window_id"] for row in rows] == list(table["window_id"])
    assert [row["label"] for row in rows] == list(table["risk"])


def test_prompts_hold_no_label_no_date_and_no_real_account(study):
    for row in study.judged_rows("dev")[:30]:
        user = row["prompt"][1]["content"]
        assert row["user"] not in user and str(row["day"]) not in user
        assert not any(risk in user for risk in ("malicious", "suspicious"))


def test_demonstrations_say_the_truth_unless_they_are_held_back(study):
    honest = study.demonstrations("cold", SFTSettings())
    assert all(f'"risk": "{row["label"]}"' in row["completion"] for row in honest)
    lowered = study.demonstrations("cold", SFTSettings(downgrade=1.0))
    assert not any('"risk": "malicious"' in row["completion"] for row in lowered)


def test_the_tokenizer_is_fitted_on_cold_start_accounts_only(study, monkeypatch):
    seen = []
    monkeypatch.setattr(stages.prompts, "target_verdict",
                        lambda window, **options: seen.append(window.user) or "")
    study._tokenizer_texts()
    assert set(seen) == set(study.training_windows("cold")["user"])


def test_prepared_data_are_returned_and_changed_settings_prepare_anew(study):
    marker = study.home / "samples.json"
    before = marker.stat().st_mtime_ns
    stages.prepare_data(profile("smoke"), 0, "", study.runs)
    assert marker.stat().st_mtime_ns == before
    known = stages._read(marker)
    write_json(marker, {**known, "settings": {}})
    stages.prepare_data(profile("smoke"), 0, "", study.runs)
    assert stages._read(marker)["settings"] == known["settings"]


def test_unknown_names_are_refused_with_the_legal_ones(study):
    with pytest.raises(UserError, match="dev, test"):
        study.sample("train")
    with pytest.raises(UserError, match="sft, sft_all, ppo, grpo"):
        study.run("dpo")
    with pytest.raises(UserError, match="gradient_boosting"):
        study.baseline("oracle")


def test_a_run_takes_the_seed_of_the_study(study):
    settings = stages.replace_seed(study.profile.ppo, 7)
    assert settings.seed == 7
    assert stages.replace_seed(study.profile.sft, 7) == study.profile.sft
    assert dataclasses.asdict(settings) != dataclasses.asdict(study.profile.ppo)


def test_seeds_of_one_release_judge_the_same_days_of_the_same_people(study, tmp_path):
    """Or the test users of one seed would be the training users of the next."""
    store = str(study.home / "store")
    first, second = (stages.open_study("smoke", seed, store, str(tmp_path)) for seed in (0, 1))
    split = [pd.read_parquet(each.home / "splits.parquet") for each in (first, second)]
    assert split[0].equals(split[1])
    for name in stages.SPLITS:
        assert first.sample(name).equals(second.sample(name))
    assert not first.training_windows("rl").equals(second.training_windows("rl"))
    users = windows.users_table(first.windows)
    assert not splits.assign(users, seed=1).equals(split[1]), "the twin: a split by seed differs"


def test_the_watched_days_are_spread_over_accounts(study, monkeypatch):
    sample = pd.concat([study.sample(split) for split in stages.SPLITS])  # more accounts than dev
    monkeypatch.setattr(stages.Study, "sample", lambda self, split: sample)
    judged = set(sample.loc[sample["headline"], "window_id"])
    table = study.windows[study.windows["window_id"].isin(judged)].sort_values("window_id")
    accounts = table.groupby("risk")["user"].nunique()
    assert accounts.min() >= 2
    watched = pd.DataFrame(study._watched(per_class=2))
    assert set(watched["window_id"]) <= judged and len(watched) == 6
    assert (watched.groupby("label")["user"].nunique() == 2).all()
    first = table.groupby("risk").head(2)
    assert (first.groupby("risk")["user"].nunique() < 2).any(), "the twin: the first rows"


def test_the_cold_start_from_random_weights_trains_all_of_them(study, monkeypatch):
    """With adapters on a random base it would hardly learn; they come with RL."""
    seen = []

    def record(start, out, rows, settings, policy, **_):
        seen.append(policy.lora_rank)
        raise InterruptedError
    monkeypatch.setattr("ueba_helpers.rl.recipes.sft", record)
    for name, rank in (("tiny", 0), (study.base_policy, 4)):
        policy = dataclasses.replace(study.profile.policy, lora_rank=4, name=name)
        adapted = stages.Study(dataclasses.replace(study.profile, policy=policy), study.seed,
                               study.data, study.runs)
        with pytest.raises(InterruptedError):
            adapted.run("sft")
        assert seen[-1] == rank, "of a checkpoint that can read, adapters are enough"


def test_a_release_without_a_log_is_told_before_anything_else(release, tmp_path, capsys,
                                                              monkeypatch):
    copy = tmp_path / "given"
    shutil.copytree(release, copy, ignore=shutil.ignore_patterns("http.csv"))
    audit = pd.DataFrame([{"check": "any", "outcome": "passed", "detail": ""}])
    monkeypatch.setattr(stages, "_audit", lambda *_: audit)  # slow, and not asked about here
    monkeypatch.setattr(stages, "_samples", lambda *_: {})
    home = stages.prepare_data(profile("smoke"), 0, str(copy), str(tmp_path / "runs"))
    warnings = json.loads((home / "samples.json").read_text())["warnings"]
    assert warnings[0].startswith("THE RELEASE HAS NO http.csv. ")
    assert capsys.readouterr().err.startswith("warning: THE RELEASE HAS NO http.csv. ")
    assert stages.lacking({"logs": {"logon": {}, "http": {}}})[0].startswith(
        "THE RELEASE HAS NO device.csv, file.csv, email.csv. ")
