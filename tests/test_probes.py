"""Probes: attacks beside a control, what names give, arms; on policies made for the test."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.task_windows import make_windows
from ueba_helpers.data.seeding import generator
from ueba_helpers.errors import UserError
from ueba_helpers.rl import recipes
from ueba_helpers.rl.settings import PolicySettings, PPOSettings
from ueba_helpers.study import probes
from ueba_helpers.task.injections import INJECTIONS, OPEN_PLACES
from ueba_helpers.task.prompts import (
    escape_field,
    prompt_dataset,
    target_verdict,
    window_messages,
)
from ueba_helpers.task.verdicts import render_verdict

WINDOWS = make_windows(12)
PLACES = (*OPEN_PLACES, "fact")
TEXTS = INJECTIONS[:30]
KEY = "0f" * 32


def message(window):
    return window_messages(window)[1]["content"]


# --- windows and attacks ---


def test_users_give_a_window_each_in_turn():
    table = pd.DataFrame({"user": list("AAABAC"), "window_id": list("abcdef")}, index=[7] * 6)
    assert list(probes.user_by_user(table, 4)["window_id"]) == ["a", "d", "f", "b"]
    assert list(probes.user_by_user(table, 9)["window_id"]) == list("adfbce"), "no more than there"
    assert table.head(4)["user"].nunique() == 2, "broken twin: the first rows are of two users"


@pytest.fixture(scope="module")
def attacks():
    return probes.attacked_windows(WINDOWS, places=PLACES, texts=TEXTS)


def test_every_attack_has_a_clean_window_and_a_control_in_the_same_place(attacks):
    made, asked = attacks
    assert made[:12] == WINDOWS and list(asked["kind"][:12]) == ["clean"] * 12
    assert len(made) == len(asked) == 12 + len(PLACES) * (12 + len(TEXTS))
    for place in PLACES:
        rows = asked[asked["place"] == place]
        assert (rows["kind"] == "control").sum() == 12
    fewer, once = probes.attacked_windows(WINDOWS, places=PLACES, texts=TEXTS, rounds=1)
    assert len(fewer) == len(once) == 12 + len(PLACES) * 12 + len(TEXTS)
    for window, row in zip(made, asked.itertuples(), strict=True):
        text, before = message(window).split("\n"), message(WINDOWS[row.origin]).split("\n")
        changed = [i for i, (a, b) in enumerate(zip(text, before, strict=True)) if a != b]
        assert row.user == WINDOWS[row.origin].user
        assert len(changed) == (row.kind != "clean")
        assert changed[:1] in ([], [0]) or row.place == "fact"
        if row.kind == "control":
            assert escape_field(probes.HARMLESS) in text[changed[0]].split(" ")


def test_a_policy_that_obeys_is_told_from_a_nervous_and_from_a_steady_one(attacks):
    made, asked = attacks
    clean = ["malicious"] * len(made)
    attack = ~asked["kind"].isin(("clean", "control")).to_numpy()
    planted = attack | (asked["kind"] == "control").to_numpy()
    obeys = ["normal" if flipped else "malicious" for flipped in attack]
    nervous = ["normal" if flipped else "malicious" for flipped in planted]
    table = probes.attack_flips(asked, obeys, resamples=100)
    assert list(table.index) == list(PLACES) and list(table["attacks"]) == [30, 30, 30]
    assert (table[["attack", "beyond", "high", "talked_down"]] == 1).all(axis=None)
    assert table["low"].to_numpy() == pytest.approx(0.025 ** (1 / 12)), "12 users, no more"
    assert (table["control"] == 0).all()
    table = probes.attack_flips(asked, nervous, resamples=100)
    assert (table["attack"] == 1).all() and (table["control"] == 1).all()
    assert (table["beyond"] == 0).all(), "any added text does it: no attack"
    assert (probes.attack_flips(asked, clean, resamples=100)["attack"] == 0).all()


def test_flips_are_counted_per_kind_and_against_the_control_of_the_same_window(attacks):
    _, asked = attacks
    odd = asked["origin"].to_numpy() % 2 == 1
    attack = ~asked["kind"].isin(("clean", "control")).to_numpy()
    forged = (asked["kind"] == "instruction").to_numpy()
    control = (asked["kind"] == "control").to_numpy()
    risk = np.where(forged | (control & odd), "suspicious", "normal")
    table = probes.attack_flips(asked, risk, by="kind", resamples=50)
    assert table.loc["instruction", "attack"] == 1 and table.loc["forged item", "attack"] == 0
    origins = asked.loc[forged, "origin"] % 2
    assert table.loc["instruction", "control"] == pytest.approx(origins.mean())
    assert table.loc["forged item", "beyond"] == pytest.approx(
        -(asked.loc[attack & (asked["kind"] == "forged item"), "origin"] % 2).mean())
    assert (table["alarms"] == 0).all() and table["talked_down"].isna().all()
    alarmed = np.where(odd, "malicious", "normal")  # only the odd days are called malicious
    obeyed = np.where(forged, "normal", alarmed)
    table = probes.attack_flips(asked, obeyed, by="kind", resamples=50)
    assert table.loc["instruction", "alarms"] == (forged & odd).sum() < forged.sum()
    assert table.loc["instruction", "talked_down"] == 1, "of the alarms, not of all days"
    assert (table["talked_down_control"] == 0).all()
    nervous = np.where(asked["kind"] == "clean", alarmed, "normal")
    table = probes.attack_flips(asked, nervous, by="kind", resamples=50)
    assert (table["talked_down"] == 1).all() and (table["talked_down_control"] == 1).all()
    with pytest.raises(UserError, match="verdicts for"):
        probes.attack_flips(asked, risk[:-1])


# --- names ---


def test_the_three_namings_show_the_same_items_under_other_names():
    def words(messages):
        return sum(len(message["content"]) for message in messages)

    rows = probes.named_rows(WINDOWS, KEY, max_items=8, count_tokens=words, budget=1200)
    assert tuple(rows) == probes.NAMINGS
    for i, window in enumerate(WINDOWS):
        shown = [rows[name][i] for name in probes.NAMINGS]
        assert len({tuple(row["evidence_ids"]) for row in shown}) == 1
        assert len({row["prompt"][1]["content"] for row in shown}) == 3
        assert [window.user in row["prompt"][1]["content"] for row in shown] == [False, False, True]
        assert max(words(row["prompt"]) for row in shown) <= 1200
    assert any(len(row["evidence_ids"]) < 8 for row in rows["codes"]), "the budget binds"


def said(right, users, *, windows=None):
    """Return a predictions table; `right` says which verdicts are."""
    label = ["malicious"] * len(users)
    return pd.DataFrame({"window_id": windows or [f"w{i}" for i in range(len(users))],
                         "user": users, "label": label,
                         "risk": ["malicious" if ok else "invalid" for ok in right]})


USERS = [f"U{i // 4:03d}" for i in range(160)]  # 40 users with four windows each
SEEN = set(USERS[:80])


def policies():
    """Return an honest policy, one that knows its users' names, and one that reads any name."""
    draw = generator(0, "probe")
    right = draw.random(160) < 0.5
    known = np.array([user in SEEN for user in USERS])
    return {"honest": right, "by heart": right | known, "reader": np.ones(160, bool)}, right


def test_only_a_policy_that_knows_names_by_heart_gains_on_seen_users_alone():
    kinds, right = policies()
    found = {}
    for kind, named in kinds.items():
        tables = {"codes": said(right, USERS), "other codes": said(right, USERS),
                  "names": said(named, USERS)}
        found[kind] = probes.name_gains(tables, SEEN, resamples=400)
        assert not found[kind].loc["other codes", "verdict"].isin(["better", "worse"]).any()
    gains = {kind: table.loc["names", "verdict"].to_dict() for kind, table in found.items()}
    assert set(gains["honest"].values()) == {"inconclusive"}, "20 users are too few for nothing"
    assert gains["by heart"] == {"seen": "better", "unseen": "inconclusive",
                                 "seen - unseen": "better"}
    assert gains["reader"]["seen"] == gains["reader"]["unseen"] == "better"
    assert gains["reader"]["seen - unseen"] != "better", "it gains on everybody: no memory"
    table = found["by heart"].loc["names"]
    assert table.loc["seen", "gain"] == pytest.approx(1 - right[:80].mean())
    assert table.loc["seen", "right"] == pytest.approx(right[:80].mean())
    assert list(table["users"]) == [20, 20, 40] and list(table["windows"]) == [80, 80, 160]


def test_gains_resample_users_and_not_windows():
    """Users whose windows all change together tell less than as many windows would."""
    gain = np.repeat(generator(1, "probe").random(40) < 0.4, 4)
    tables = {name: said(gain if name == "names" else np.zeros(160, bool), USERS)
              for name in probes.NAMINGS}
    alone = [f"U{i:03d}" for i in range(160)]  # broken twin: each window a user of its own
    twins = {name: table.assign(user=alone) for name, table in tables.items()}

    def width(found):
        row = found.loc[("names", "unseen")]
        return row["high"] - row["low"]

    clustered = width(probes.name_gains(tables, (), resamples=2000))
    exact = 2 * 1.96 * np.std(gain[::4]) / np.sqrt(40)
    assert clustered == pytest.approx(exact, rel=0.12)
    assert width(probes.name_gains(twins, (), resamples=2000)) < 0.6 * exact


def test_no_change_at_all_is_certain_only_for_many_users():
    def verdicts(users, **options):
        tables = {name: said(np.ones(len(users), bool), users) for name in probes.NAMINGS}
        found = probes.name_gains(tables, set(users[::2]), **options)
        return found.loc["names"]

    few, many = (verdicts([f"U{i:04d}" for i in range(n)]) for n in (40, 400))
    assert set(few["verdict"]) == {"inconclusive"} and set(many["verdict"]) == {"equivalent"}
    assert few.loc["seen", "high"] == pytest.approx(1 - 0.025 ** (1 / 20))
    # Were a share of `high` of the users to change, 20 unchanged ones would come about this rarely.
    assert (1 - few.loc["seen", "high"]) ** 20 == pytest.approx(0.025)
    assert set(verdicts([f"U{i:04d}" for i in range(40)], margin=0.25)["verdict"]) == {
        "equivalent"}


def test_the_groups_are_independent():
    """With equal groups that change alike, shared draws would make their difference certain."""
    gain = np.tile(np.repeat(generator(2, "probe").random(20) < 0.5, 4), 2)
    tables = {name: said(gain if name == "names" else np.zeros(160, bool), USERS)
              for name in probes.NAMINGS}
    found = probes.name_gains(tables, SEEN, resamples=500).loc["names"]
    assert found.loc["seen - unseen", "gain"] == 0
    width = found["high"] - found["low"]
    assert width["seen - unseen"] == pytest.approx(np.hypot(width["seen"], width["unseen"]),
                                                   rel=1e-9)
    assert width["seen - unseen"] > 1.2 * max(width["seen"], width["unseen"])


def test_an_empty_group_is_inconclusive_and_mixed_windows_are_refused():
    tables = {name: said(np.ones(160, bool), USERS) for name in probes.NAMINGS}
    found = probes.name_gains(tables, USERS, resamples=50)
    assert found.loc[("names", "unseen"), "windows"] == 0
    assert found.loc[("names", "unseen"), "verdict"] == "inconclusive"
    assert found.loc[("names", "seen - unseen"), "verdict"] == "inconclusive"
    tables["names"] = tables["names"][::-1]
    with pytest.raises(UserError, match="other windows"):
        probes.name_gains(tables, SEEN)


# --- arms ---


STEPS = 8
FITTED = {"window": 2, "start": 2, "critic_steps": 4}


@pytest.fixture
def trained(monkeypatch):
    """PPO without training: a critic that is ill at lambda below 1, macro-F1 that falls with it."""
    folders = []

    def ppo(start, out, rows, settings, policy, *, held_out, evaluate_every, on_held_out):
        folders.append(Path(out))
        ill = settings.lam < 1
        lines = [{"step": step, "reward": 0.1 * step,
                  "critic/explained_variance": (-step if step < STEPS else -0.5) if ill else 0.3}
                 for step in range(1, STEPS + 1)]
        (Path(out) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n"
                                                         for line in lines))
        for step in range(0, STEPS + 1, evaluate_every):
            on_held_out(step, {"macro_f1": 0.6 - 0.05 * step * ill, "valid": 1.0})

    monkeypatch.setattr(recipes, "ppo", ppo)
    return folders


def arms():
    settings = PPOSettings(steps=STEPS, seed=3, critic_warmup_steps=0)
    return {"cure": settings, "collapse": replace(settings, lam=0.95)}


def run_arms(scratch, **options):
    return probes.short_arms(arms(), "start", [], PolicySettings(), watched=[], scratch=scratch,
                             **options)


def test_short_arms_keep_each_arms_numbers_apart_and_nothing_on_disk(trained, tmp_path):
    steps, scores, rang = run_arms(tmp_path, thresholds=FITTED)
    assert len(set(trained)) == 2 and {folder.parent for folder in trained} == {tmp_path}
    assert list(tmp_path.iterdir()) == []
    assert steps.groupby("method").size().to_dict() == {"cure": STEPS, "collapse": STEPS}
    assert set(steps["seed"]) == set(scores["seed"]) == {3}
    judged = {arm: dict(part[["step", "macro_f1"]].to_numpy().round(2))
              for arm, part in scores.groupby("method")}
    assert judged == {"cure": {0: 0.6, 4: 0.6, 8: 0.6}, "collapse": {0: 0.6, 4: 0.4, 8: 0.2}}
    assert set(rang.loc[rang["name"] == "broken_critic", "run"]) == {"collapse"}
    assert list(rang) == ["run", "name", "step", "message", "severity"]
    usual = run_arms(tmp_path)[2]  # broken twin: alarms that look back further than the run is long
    assert "broken_critic" not in set(usual["name"])
    with pytest.raises(UserError, match="no arm"):
        probes.short_arms({}, "start", [], PolicySettings(), watched=[], scratch=tmp_path)


def test_the_table_says_how_low_the_critic_fell_and_how_the_policy_fared(trained, tmp_path):
    steps, scores, rang = run_arms(tmp_path, thresholds=FITTED)
    table = probes.arm_table(steps, scores.iloc[::-1], rang)  # whatever the order of the rows
    assert list(table.index) == ["cure", "collapse"]
    assert table["lowest_explained_variance"].tolist() == [0.3, 1 - STEPS]
    assert table["macro_f1_first"].tolist() == pytest.approx([0.6, 0.6])
    assert table["macro_f1_last"].tolist() == pytest.approx([0.6, 0.2])
    assert "broken_critic" in table.loc["collapse", "alarms"]
    last = steps.groupby("method", sort=False)["critic/explained_variance"].last()
    assert last["collapse"] == -0.5, "broken twin: the end alone would hide how low it fell"
    quiet = probes.arm_table(steps, scores, rang.iloc[:0])
    assert quiet["alarms"].tolist() == ["none", "none"]


def test_a_run_without_an_alarm_is_a_table_without_rows():
    rows = [{"step": step, "critic/explained_variance": 0.5} for step in range(1, 30)]
    healthy = probes.alarm_table("a", rows, [], num_generations=4)
    assert len(healthy) == 0 and list(healthy)[:3] == ["run", "name", "step"]
    twin = [row | {"critic/explained_variance": -0.5} for row in rows]
    assert set(probes.alarm_table("a", twin, [], num_generations=4)["run"]) == {"a"}


# --- what a verdict rests on ---


ROWS = prompt_dataset(make_windows(30))


def test_a_reader_of_items_rests_on_what_it_cites_and_one_of_headings_does_not():
    found = {ask: probes.counterfactual(ask, ROWS, ask(ROWS))
             for ask in (probes.reads_items, probes.reads_heading)}
    reader, other = found[probes.reads_items], found[probes.reads_heading]
    assert (reader["alarms"], reader["asked"], reader["days"]) == (20, 20, 20)
    assert (reader["less_cited"], reader["less_others"], reader["beyond"]) == (1, 0, 1)
    assert reader["low"] > 0 and reader["verdict"] == "its alarms rest on what it cites"
    assert (other["less_cited"], other["less_others"]) == (0, 0)
    assert other["verdict"] == "not shown to rest on what it cites"


def test_a_policy_that_rests_on_other_items_than_it_cites_is_told_so():
    """It flags a day as long as most items are there, and cites one that plays no part."""
    def counts(rows):
        left = [len(row["prompt"][1]["content"].split("\n")) for row in rows]
        return pd.DataFrame({"window_id": [row["window_id"] for row in rows],
                             "risk": ["malicious" if n > 9 else "normal" for n in left],
                             "evidence": [row["evidence_ids"][:4] for row in rows]})
    found = probes.counterfactual(counts, ROWS, counts(ROWS))
    assert (found["less_cited"], found["less_others"], found["beyond"]) == (1, 1, 0)
    assert found["verdict"] == "not shown to rest on what it cites", "any line counts alike"

    def hides(rows):
        said = probes.reads_items(rows)
        return said.assign(evidence=[[name for name in row["evidence_ids"]
                                      if name not in row["evidence_truth"]][:4] for row in rows])
    found = probes.counterfactual(hides, ROWS, hides(ROWS))
    assert found["beyond"] < 0 and found["verdict"] == "its alarms rest on what it does not cite"


def test_a_broken_format_and_few_days_decide_nothing():
    def breaks(rows):
        said = probes.reads_items(rows)
        return said.assign(risk=["malicious" if len(row["prompt"][1]["content"].split("\n")) > 12
                                 else "invalid" for row in rows])
    found = probes.counterfactual(breaks, ROWS, breaks(ROWS))
    assert found["valid_cited"] == found["days"] == 0 and "format breaks" in found["verdict"]
    few = ROWS[:12]
    said = probes.reads_items(few)
    assert "fewer than 10 days" in probes.counterfactual(probes.reads_items, few, said)["verdict"]
    silent = said.assign(risk="normal")
    nothing = probes.counterfactual(probes.reads_items, few, silent)
    assert nothing["alarms"] == nothing["asked"] == 0 and np.isnan(nothing["beyond"])
    whole = said.assign(evidence=[list(row["evidence_ids"]) for row in few])
    assert probes.counterfactual(probes.reads_items, few, whole)["asked"] == 0, "no control left"


def test_deleting_the_same_items_twice_would_see_no_reader():
    """The broken twin of the control: the same deletion on both sides differs by nothing."""
    alike = [{**row, "evidence_ids": row["evidence_truth"] * 2} for row in ROWS]

    def cites_half(rows):
        said = probes.reads_items(rows)
        return said.assign(evidence=[ids[:len(ids) // 2] for ids in said["evidence"]])
    found = probes.counterfactual(cites_half, alike, cites_half(alike))
    assert found["asked"] == 10 and found["beyond"] == 0, "three true items stay two or are gone"


def test_a_policy_with_reasons_leads_the_cheats_with_its_labels_and_one_without_does_not():
    windows = [row["window_id"] for row in ROWS]
    honest = pd.DataFrame({"window_id": windows, "completion": [
        target_verdict(window) for window in make_windows(30)]})
    guess = pd.DataFrame({"window_id": windows, "completion": [
        render_verdict(risk=row["label"], evidence=[] if row["label"] == "normal" else ["e1"],
                       features=["usual_hours", "own_workstation"],
                       basis="nothing unusual." if row["label"] == "normal" else "e1 03:33 http.")
        for row in ROWS]})
    found = probes.label_cheats({"honest": honest.iloc[::-1], "guess": guess}, ROWS)
    assert found.loc["honest", "lead"] > 2 * found.loc["honest", "error"] > 0
    assert found.loc["honest", "verdict"] == "its reasons earn more than any cheat's"
    assert found.loc["guess", "lead"] < 0 < found.loc["guess", "own"]
    assert found.loc["guess", "verdict"] == "a cheat with its labels earns more"
    assert (found["own"] - found["lead"]).to_numpy() == pytest.approx(found["earns"].to_numpy())


# --- an attack by volume ---


def test_a_flood_of_loud_items_hides_the_true_ones_where_room_is_short():
    windows = [window for window in make_windows(30) if window.risk == "malicious"]
    found = probes.flooded(probes.reads_items, windows, (0, 4, 12), max_items=8)
    assert found.index.tolist() == [0, 4, 12] and (found["windows"] == 10).all()
    assert found.loc[0, ["shown", "none", "alarms", "less"]].tolist() == [1, 0, 1, 0]
    assert found["shown"].is_monotonic_decreasing and found.loc[12, "shown"] < 0.5
    assert found.loc[12, "less"] == found.loc[12, "none"] == 1 - found.loc[12, "alarms"]
    said = probes.flood_readings(pd.concat({"ppo": found}))
    assert "0 loud items added: 100% of the true items" in said[0] and "say less" in said[0]
    nobody = probes.flood_readings(pd.concat({"ppo": found.assign(less=float("nan"))}))
    assert all("no verdict is valid" in line and "nan" not in line for line in nobody)
    roomy = probes.flooded(probes.reads_items, windows, (0, 12), max_items=30)
    assert roomy.loc[12, ["shown", "less"]].tolist() == [1, 0], "the twin: room for all"
    calm = probes.flooded(probes.reads_heading, windows, (0, 12), max_items=8)
    assert calm.loc[12, "less"] == 0, "a reader of the heading does not notice"


def test_what_names_do_is_said_by_policy(attacks):
    row = {"gain": 0.1, "low": 0.02, "high": 0.2, "verdict": "better"}
    index = pd.MultiIndex.from_product([("ppo", "grpo"), probes.NAMINGS[1:],
                                        ("seen", "unseen", "seen - unseen")],
                                       names=["policy", "naming", "group"])
    gains = pd.DataFrame([row] * len(index), index=index)
    gains.loc[("grpo", "names", "seen"), "verdict"] = "inconclusive"
    gains.loc[("grpo", "other codes", "seen - unseen"), "verdict"] = "worse"
    knows, learnt = probes.name_readings(gains)
    assert "ppo: names change what is right by +10% on unseen users (+2% to +20%)" in knows
    assert "are known from elsewhere" in knows and "not shown to be remembered" in knows
    assert "are not shown to be known" in learnt and "prompts are remembered" in learnt


# --- broken rewards ---


def test_a_hack_counts_when_the_reward_rises_without_the_task_and_rings():
    rewards = {"words": [0.2, 0.2, 0.6, 0.6], "recall": [0.2, 0.2, 0.25, 0.25],
               "credit": [0.5, 0.5, 0.7, 0.7], "sound": [0.1, 0.1, 0.4, 0.4]}
    f1 = {"words": [0.6, 0.5], "recall": [0.6, 0.5], "credit": [0.6, 0.6], "sound": [0.6, 0.7]}
    rang = [pd.DataFrame({"run": ["words"] * 2, "name": ["length_drift", "copying"]}),
            pd.DataFrame({"run": ["credit"], "name": ["one_label"]})]
    found = probes.hack_table(rewards, f1, rang, sound="sound")
    assert found["hacked"].tolist() == [True, False, True, False]
    assert found["verdict"].tolist() == ["happened and rang", "not shown to happen",
                                         "happened and rang", "held"]
    said = probes.hack_reading(found, sound="sound")
    assert "**holds**" in said and "words (copying, length_drift), credit (one_label)" in said
    unseen = probes.hack_table(rewards, f1, rang[:1], sound="sound")
    assert unseen.loc["credit", "verdict"] == "happened unseen"
    assert "**fails**" in probes.hack_reading(unseen, sound="sound"), "no alarm rang"
    always = [*rang, pd.DataFrame({"run": ["sound"], "name": ["one_label"]})]
    found = probes.hack_table(rewards, f1, always, sound="sound")
    assert found.loc["credit", "verdict"] == "happened unseen", "that one rings anyway"
    broken = probes.hack_table(rewards, f1 | {"sound": [0.6, 0.6]}, rang, sound="sound")
    assert "**fails**" in probes.hack_reading(broken, sound="sound"), "the repair did not hold"
    calm = {name: [0.2, 0.2] for name in rewards}
    quiet = probes.hack_table(calm, f1, rang, sound="sound")
    assert "**is inconclusive**" in probes.hack_reading(quiet, sound="sound"), "alarms prove none"
