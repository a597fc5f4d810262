"""What notebook 07 hands on: studies are pooled only if equal, the verdict says what was found."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from tests.scripts import benchmark
from ueba_helpers.errors import UserError
from ueba_helpers.study import comparison
from ueba_helpers.study.config import profile
from ueba_helpers.study.evaluation import Difference
from ueba_helpers.study.runs import PACKAGE

MADE_BY = {"profile": "smoke", "seed": 0, "data": "simulated", "settings": "s", "code": "c",
           "versions": "v"}


def table(ppo=0.6, grpo=0.5):
    row = dict.fromkeys(comparison.COMPARISON_COLUMNS, 0.25) | {"seconds": 60.0, "incidents": 12}
    return pd.DataFrame([row | {"detector": "ppo", "macro_f1": ppo, "macro_f1_low": ppo - 0.1,
                                "macro_f1_high": ppo + 0.1, "left_over": 1.0},
                         row | {"detector": "grpo", "macro_f1": grpo}])


def write_study(runs, name="smoke-seed0-aaaaaaaa", **changes):
    folder = runs / name
    folder.mkdir(parents=True)
    comparison.write_comparison(folder, table(), made_by={**MADE_BY, **changes}, runs=["ppo-1"],
                                metrics=pd.DataFrame({"metric": ["accuracy"], "value": [0.5]}))
    return folder


def difference(value=0.1, low=0.05, high=0.15, verdict="better"):
    return Difference("macro_f1", value, low, high, verdict, 0.02, 0.95, "users", 1, float("nan"))


def away(low=0.05):
    """Return differences from the cold start: both moved, or with a `low` below 0 neither."""
    return dict.fromkeys(("ppo", "grpo"), difference(0.1, low))


def pooled(*values, sft=0.2, valid=0.99, incidents=12, cited=(0.3, 0.4, 0.4)):
    """Return what `pool` gives for seeds 0, 1, ... with these pairs of PPO and GRPO.

    `cited` are the evidence hit rates of PPO, GRPO and the cold start.
    """
    return pd.DataFrame(values, columns=["ppo", "grpo"], index=range(len(values))).assign(
        sft=sft, valid=valid, incidents=incidents,
        **{f"{name}_cited": rate for name, rate in zip(("ppo", "grpo", "sft"), cited, strict=True)})


def ruled(*values, over_users=None, from_start=None, reasons=None, simulated=True, **options):
    return comparison.verdict(pooled(*values, **options), over_users or difference(),
                              from_start or away(), reasons or away(-0.01), simulated=simulated)


# ------------------------------------------------------------ which studies are pooled

def test_a_study_that_differs_in_the_seed_alone_is_pooled(tmp_path):
    own = write_study(tmp_path)
    write_study(tmp_path, "smoke-seed2-cccccccc", seed=2)
    write_study(tmp_path, "smoke-seed1-bbbbbbbb", seed=1)
    write_study(tmp_path, "laptop-seed3-dddddddd", profile="laptop", seed=3)
    kept, left_out = comparison.siblings(own, MADE_BY)
    assert list(kept) == [1, 2] and left_out == {}
    assert kept[1].loc["ppo", "macro_f1"] == 0.6
    assert "left_over" not in kept[1], "only the headline's columns are handed on"
    assert kept[1].loc["ppo", "incidents"] == 12, "but how many incidents were judged is"


@pytest.mark.parametrize("field", ["profile", "data", "settings", "code", "versions"])
def test_a_study_made_otherwise_is_left_out_and_said_so(tmp_path, field):
    own = write_study(tmp_path)
    write_study(tmp_path, "smoke-seed1-bbbbbbbb", seed=1, **{field: "other"})
    kept, left_out = comparison.siblings(own, MADE_BY)
    assert kept == {}
    assert left_out == {"smoke-seed1-bbbbbbbb": f"made with other {field}"}


def test_unfinished_changed_and_doubled_studies_are_left_out_with_the_reason(tmp_path):
    own = write_study(tmp_path)
    (tmp_path / "smoke-seed1-unfinished").mkdir()
    old = write_study(tmp_path, "smoke-seed2-unsigned", seed=2)
    (old / "comparison.json").unlink()
    changed = write_study(tmp_path, "smoke-seed3-changed", seed=3)
    table(0.9, 0.1).to_csv(changed / "comparison.csv", index=False)
    damaged = write_study(tmp_path, "smoke-seed4-damaged", seed=4)
    (damaged / "comparison.json").write_text("{")
    write_study(tmp_path, "smoke-seed0-copy")
    kept, left_out = comparison.siblings(own, MADE_BY)
    assert kept == {}
    for name, reason in {"smoke-seed1-unfinished": "comparison.csv is missing",
                         "smoke-seed2-unsigned": "comparison.json is missing",
                         "smoke-seed3-changed": "belongs to another table",
                         "smoke-seed4-damaged": "cannot be read",
                         "smoke-seed0-copy": "seed 0 is there already"}.items():
        assert reason in left_out.pop(name)
    assert left_out == {}


def test_reasons_name_no_path_of_this_machine(tmp_path):
    own = write_study(tmp_path)
    (tmp_path / "smoke-seed1-unfinished").mkdir()
    assert str(tmp_path) not in json.dumps(comparison.siblings(own, MADE_BY)[1])


def test_settings_code_and_data_all_count(monkeypatch, tmp_path):
    chosen = profile("smoke")
    base = comparison.made_by(chosen, seed=0)
    assert comparison.made_by(chosen, seed=1) == {**base, "seed": 1}
    other = dataclasses.replace(chosen, max_items=chosen.max_items + 1)
    assert comparison.made_by(other, seed=0)["settings"] != base["settings"]
    (tmp_path / "logon.csv").write_text("id\n")
    assert comparison.made_by(chosen, seed=0, data=tmp_path)["data"] != base["data"]
    for part in comparison._CODE:
        assert (PACKAGE / part).exists(), part
    monkeypatch.setattr(comparison, "_CODE", comparison._CODE[:-1])
    assert comparison.made_by(chosen, seed=0)["code"] != base["code"]


def test_the_versions_are_those_of_the_runs_and_of_now(tmp_path, monkeypatch):
    chosen, now = profile("smoke"), {"torch": "2.13.0"}
    monkeypatch.setattr(comparison, "package_versions", lambda: now)

    def versions(*trained_under):
        runs = [tmp_path / f"run-{i}" for i in range(len(trained_under))]
        for run, found in zip(runs, trained_under, strict=True):
            run.mkdir(exist_ok=True)
            (run / "provenance.json").write_text(json.dumps({"versions": found}))
        return comparison.made_by(chosen, seed=0, runs=runs)["versions"]

    same = versions(now, now)
    assert versions(now, {"torch": "2.12.0"}) != same, "trained before an upgrade"
    assert versions({"torch": "2.12.0"}, now) != versions(now, {"torch": "2.12.0"})
    silent = [tmp_path / "run-0", tmp_path / "silent"]
    assert versions(now, now) == comparison.made_by(chosen, seed=0, runs=silent)["versions"]
    monkeypatch.setattr(comparison, "package_versions", lambda: {"torch": "2.14.0"})
    assert versions(now, now) != same, "judged after an upgrade"


# ------------------------------------------------------------ the verdict

def test_tables_are_pooled_with_their_lowest_valid_share_and_their_incidents():
    tables = {seed: pd.DataFrame(
        {"macro_f1": [0.2, 0.6, 0.5], "valid_rate": [0.1, 0.99, valid], "incidents": count,
         "evidence_hit_rate": [0.4, 0.3, 0.35]},
        index=["sft", "ppo", "grpo"]) for seed, valid, count in ((3, 0.98, 12), (1, 0.4, 15))}
    found = comparison.pool(tables)
    assert list(found.index) == [1, 3] and found.loc[1].to_dict() == {
        "ppo": 0.6, "grpo": 0.5, "sft": 0.2, "ppo_cited": 0.3, "grpo_cited": 0.35,
        "sft_cited": 0.4, "valid": 0.4, "incidents": 15}
    assert found.loc[3, "valid"] == 0.98, "the cold start's share does not count"
    said = comparison.verdict(found, difference(), away(), away(), simulated=True)
    assert said["verdict"] == "inconclusive" and (said["valid"], said["incidents"]) == (0.4, 12)
    assert "40 % of the verdicts" in said["sentence"], "whatever the study of seed 3 says alone"


def test_one_seed_speaks_of_two_runs_and_names_no_better_method():
    found = ruled((0.6, 0.5))
    assert (found["verdict"], found["scope"], found["simulated"]) == ("better", "runs", True)
    assert found["better"] is None
    for words in ("**This PPO run judged better than this GRPO run**.", "simulated data",
                  "PPO 0.600, GRPO 0.500", "95 % interval [+0.050, +0.150]", "one seed 0",
                  "not covered", "±0.02"):
        assert words in found["sentence"]
    assert found["p_seeds"] is None
    worse = ruled((0.5, 0.6), over_users=difference(-0.1, -0.15, -0.05, "worse"), simulated=False)
    assert worse["better"] is None and "real data" in worse["sentence"]
    assert worse["sentence"].startswith("**This GRPO run judged better than this PPO run**.")


def test_several_seeds_that_agree_speak_of_the_methods():
    found = ruled((0.60, 0.50), (0.61, 0.50), (0.62, 0.53))
    assert (found["verdict"], found["scope"], found["better"]) == ("better", "methods", "ppo")
    assert found["sentence"].startswith("**PPO is better than GRPO**.")
    back = ruled((0.50, 0.60), (0.50, 0.61), (0.53, 0.62))
    assert (back["better"], back["sentence"][:27]) == ("grpo", "**GRPO is better than PPO**")


def test_several_seeds_on_real_data_need_their_shared_test_users_to_agree(monkeypatch):
    seeds, unsure = ((0.60, 0.50), (0.61, 0.50), (0.62, 0.53)), difference(0.1, -0.1, 0.3,
                                                                          "inconclusive")
    agreed = ruled(*seeds, simulated=False)
    assert agreed["better"] == "ppo" and "which share their test users" in agreed["sentence"]
    alone = ruled(*seeds, over_users=unsure, simulated=False)
    assert (alone["verdict"], alone["better"]) == ("inconclusive", None)
    simulated = ruled(*seeds, over_users=unsure)  # each seed has drawn its own
    assert simulated["better"] == "ppo" and "share" not in simulated["sentence"]
    monkeypatch.setattr(comparison, "_confirmed", lambda found, *_: found)
    assert ruled(*seeds, over_users=unsure, simulated=False)["better"] == "ppo", "the broken twin"


def test_several_seeds_speak_for_seeds_whatever_one_seed_said():
    found = ruled((0.60, 0.50), (0.50, 0.55), (0.52, 0.50))
    gaps = np.array([0.10, -0.05, 0.02])
    half = 4.302652729911275 * gaps.std(ddof=1) / 3**0.5  # Student's t, two degrees of freedom
    assert found["verdict"] == "inconclusive" and found["better"] is None
    assert (found["low"], found["high"]) == pytest.approx((gaps.mean() - half,
                                                           gaps.mean() + half))
    assert "cannot tell PPO and GRPO apart**" in found["sentence"]
    assert "seeds 0, 1, 2" in found["sentence"] and "p = 0.750" in found["sentence"]
    assert found["seeds"]["1"] == {"ppo": 0.5, "grpo": 0.55, "sft": 0.2}


def test_the_interval_that_rules_on_equivalence_stands_in_the_sentence():
    found = ruled((0.60, 0.601), (0.61, 0.612), (0.62, 0.62))
    gaps = np.array([-0.001, -0.002, 0.0])
    half = 2.919985580353726 * gaps.std(ddof=1) / 3**0.5  # Student's t, 90 %, two degrees
    assert found["verdict"] == "equivalent"
    assert (found["narrow_low"], found["narrow_high"]) == pytest.approx(
        (gaps.mean() - half, gaps.mean() + half))
    assert "90 % interval [-0.003, +0.001], which rules on that" in found["sentence"]
    assert "90 %" not in ruled((0.6, 0.5))["sentence"]


def test_mostly_invalid_verdicts_decide_nothing():
    found = ruled((0.6, 0.5), valid=0.49)
    assert found["verdict"] == "inconclusive" and found["better"] is None
    assert "49 % of the verdicts" in found["sentence"]
    assert ruled((0.6, 0.5), valid=0.51)["verdict"] == "better"
    seeds = ((0.60, 0.50), (0.61, 0.50), (0.62, 0.53))
    assert ruled(*seeds, valid=[0.99, 0.49, 0.99])["verdict"] == "inconclusive", "at one seed"


def test_few_incidents_decide_nothing():
    found = ruled((0.6, 0.5), incidents=9)
    assert found["verdict"] == "inconclusive" and found["incidents"] == 9
    assert found["sentence"].startswith("**Inconclusive: fewer than 10 incidents are judged (9)**.")
    assert ruled((0.6, 0.5), incidents=10)["verdict"] == "better"
    seeds = ((0.60, 0.50), (0.61, 0.50), (0.62, 0.53))
    assert ruled(*seeds, incidents=[12, 9, 12])["verdict"] == "inconclusive", "at one seed"


def test_two_that_may_have_learned_nothing_are_not_called_equivalent():
    same = difference(0.001, -0.01, 0.012, "equivalent")
    found = ruled((0.6, 0.6), over_users=same)
    assert found["verdict"] == "equivalent"
    assert found["sentence"].startswith("**This PPO run and this GRPO run judged equally well**.")
    stuck = away(-0.05)
    for moved, ruling in (({}, "inconclusive"), ({"ppo": difference()}, "equivalent"),
                          ({"grpo": difference(-0.1, -0.15, -0.05)}, "equivalent")):
        found = ruled((0.6, 0.6), over_users=same, from_start=stuck | moved)
        assert found["verdict"] == ruling
        assert ("moved away from the cold start" in found["sentence"]) == (not moved)
    assert found["from_start"]["grpo"] == {"difference": -0.1, "low": -0.15, "high": -0.05}
    assert ruled((0.6, 0.5), from_start=stuck)["verdict"] == "better", "they differ all the same"
    seeds = ((0.60, 0.601), (0.61, 0.611), (0.62, 0.621))
    assert ruled(*seeds, from_start=stuck)["verdict"] == "equivalent", "seeds are asked, not users"
    found = ruled(*seeds, sft=[0.61, 0.60, 0.62])
    assert found["verdict"] == "inconclusive" and "cold start**" in found["sentence"]


def test_labels_that_get_better_do_not_hide_citations_that_get_worse():
    fell = {"ppo": difference(-0.124, -0.18, -0.07), "grpo": difference(-0.02, -0.08, 0.04)}
    found = ruled((0.6, 0.6), reasons=fell, cited=(0.272, 0.376, 0.396))["citations"]
    assert "**PPO: labels better, citations worse**" in found["sentence"]
    assert "cited 0.396 to 0.272, difference -0.124, 95 % interval [-0.180, -0.070])" in (
        found["sentence"])
    assert "**GRPO: labels better, citations not shown to have changed**" in found["sentence"]
    assert (found["ppo"]["changed"], found["ppo"]["low"]) == ("worse", -0.18)
    rose = ruled((0.6, 0.6), reasons=away(), from_start=away(-0.05))["citations"]
    assert "labels not shown to have changed, citations better" in rose["sentence"]


def test_several_seeds_speak_for_the_citations_too():
    many = ruled((0.60, 0.50), (0.61, 0.50), (0.62, 0.53), cited=(
        [0.20, 0.21, 0.22], [0.30, 0.45, 0.44], [0.40, 0.40, 0.42]))["citations"]
    gaps = np.array([-0.20, -0.19, -0.20])
    half = 4.302652729911275 * gaps.std(ddof=1) / 3**0.5  # Student's t, two degrees of freedom
    assert many["ppo"]["low"] == pytest.approx(gaps.mean() - half)
    assert (many["ppo"]["changed"], many["grpo"]["changed"]) == (
        "worse", "not shown to have changed"), "whatever one seed's users said"


def test_a_study_too_small_for_any_interval_is_inconclusive():
    unknown = difference(0.0, float("nan"), float("nan"), "inconclusive")
    found = ruled((0.3, 0.3), over_users=unknown, incidents=2, valid=float("nan"),
                  from_start={"ppo": unknown, "grpo": unknown},
                  reasons={"ppo": unknown, "grpo": unknown})
    assert found["citations"]["ppo"]["changed"] == "not shown to have changed"
    assert found["verdict"] == "inconclusive" and found["low"] is None and found["valid"] is None
    json.dumps(found, allow_nan=False)


def test_a_verdict_belongs_to_its_table(tmp_path):
    folder = write_study(tmp_path)
    with pytest.raises(UserError, match=r"smoke-seed0-aaaaaaaa/verdict\.json is missing"):
        comparison.read_verdict(folder)
    comparison.write_verdict(folder, {"sentence": "Both."})
    assert comparison.read_verdict(folder)["sentence"] == "Both."
    comparison.write_comparison(folder, table(0.9), made_by=MADE_BY, runs=[])
    with pytest.raises(UserError, match="belongs to another table"):
        comparison.read_verdict(folder)


# ------------------------------------------------------------ rivals

def p_of(value, p):
    """Return a difference in macro-F1 over users, clear of zero, with this p."""
    return Difference("macro_f1", value, value - 0.03, value + 0.03,
                      "better" if value > 0 else "worse", 0.02, 0.95, "users", 1, float("nan"), p)


def against(ps=(0.001, 0.001, 0.001, 0.001), tables=None, simulated=True, incidents=12,
            values=(-0.05, -0.09, -0.05, -0.09)):
    pairs = [(name, rival) for name in ("ppo", "grpo") for rival in comparison.RIVALS]
    tables = tables or {0: rival_table(incidents=incidents)}
    return comparison.against_rivals(
        tables, dict(zip(pairs, map(p_of, values, ps), strict=True)), simulated=simulated)


def rival_table(ppo=0.78, grpo=0.78, incidents=12, sft_all=0.83, boosting=0.87):
    return pd.DataFrame({"macro_f1": [ppo, grpo, sft_all, boosting], "incidents": incidents},
                        index=["ppo", "grpo", *comparison.RIVALS])


def ruled_against(found) -> list[str]:
    return [row["verdict"] for row in found["differences"]]


def test_both_methods_meet_both_rivals_in_one_sentence_with_its_numbers():
    found = against()
    assert ruled_against(found) == ["worse"] * 4
    assert [(row["method"], row["rival"]) for row in found["differences"]][:2] == [
        ("ppo", "sft_all"), ("ppo", "gradient_boosting_same_windows")]
    assert found["sentence"].startswith(
        "**PPO and GRPO judged worse than SFT on all labels; PPO and GRPO judged worse than "
        "gradient boosting on the same windows** in macro-F1: PPO minus SFT on all labels -0.050 "
        "[-0.080, -0.020]; ")
    assert "over the test users of seed 0; verdicts by Holm's p for 4" in found["sentence"]
    json.dumps(found, allow_nan=False)


def test_four_differences_must_each_be_surer_than_one_alone(monkeypatch):
    ps = (0.03, 0.001, 0.04, 0.9)

    def rulings():
        return ruled_against(against(ps, values=(0.05, 0.05, 0.05, 0.05)))

    assert rulings() == ["inconclusive", "better", "inconclusive", "inconclusive"]
    found = against(ps)
    assert [row["p"] for row in found["differences"]] == pytest.approx([0.09, 0.004, 0.09, 0.9])
    assert "PPO and GRPO could not be told from SFT on all labels" in found["sentence"]
    assert "PPO judged worse than gradient boosting on the same windows" in found["sentence"]
    monkeypatch.setattr(comparison, "corrected", list)  # each by itself, as if asked for alone
    assert rulings() == ["better"] * 4


def test_against_rivals_several_seeds_are_students_and_holms(monkeypatch):
    tables = {seed: rival_table(0.78 + gap, 0.80 - 6 * gap) for seed, gap in (
        (0, 0.0), (1, 0.004), (2, -0.004))}
    found = against(tables=tables, values=(0.5, 0.5, 0.5, 0.5))
    assert ruled_against(found) == ["worse", "worse", "inconclusive", "inconclusive"]
    first = found["differences"][0]
    error = 0.004 / 3**0.5
    assert (first["difference"], first["low"]) == pytest.approx(
        (-0.05, -0.05 - 4.302652729911275 * error))
    assert "over the seeds 0, 1, 2" in found["sentence"]
    monkeypatch.setattr(comparison, "corrected", list)
    assert ruled_against(against(tables=tables, values=(0.5, 0.5, 0.5, 0.5)))[3] == "worse"


def test_seeds_on_real_data_share_their_users_and_need_their_interval_too():
    tables = {seed: rival_table(0.78 + gap, 0.78 - gap) for seed, gap in (
        (0, 0.0), (1, 0.002), (2, -0.002))}
    unsure = [p_of(-0.05, 0.3) for _ in range(4)]
    unsure = [Difference(**{**vars(one), "verdict": "inconclusive"}) for one in unsure]
    pairs = [(name, rival) for name in ("ppo", "grpo") for rival in comparison.RIVALS]
    over_users = dict(zip(pairs, unsure, strict=True))
    for simulated, ruling in ((True, "worse"), (False, "inconclusive")):
        found = comparison.against_rivals(tables, over_users, simulated=simulated)
        assert ruled_against(found) == [ruling] * 4


def test_against_rivals_too_few_incidents_decide_nothing():
    found = against(incidents=9)
    assert ruled_against(found) == ["inconclusive"] * 4
    assert "fewer than 10 incidents are judged" in found["sentence"]


# ------------------------------------------------------------ what it cost

def bill(sft_all=190.0, unit="cpu_seconds"):
    costs = {name: {"steps": 1, "tokens": 100.0, unit: seconds, "wall_seconds_training": 1.0}
             for name, seconds in (("sft", 700.0), ("sft_all", sft_all), ("ppo", 220.0),
                                   ("grpo", 160.0))}
    return comparison.equal_compute(costs)


def test_sft_on_all_labels_equals_the_mean_of_both_and_neither_of_them():
    spent, shares, sentence = bill()
    assert shares["cpu_seconds"].tolist() == pytest.approx([190 / 220, 190 / 160, 1.0])
    assert list(spent.index) == ["sft", "sft_all", "ppo", "grpo"]
    assert sentence.startswith("SFT on all labels had equal compute: 1.00 times the mean processor "
                               "seconds of PPO and GRPO, 0.86 times PPO's, 1.19 times GRPO's")
    for seconds, word in ((208.0, "had equal"), (210.0, "**not**"), (170.0, "**not**")):
        assert word in bill(seconds)[2]
    assert "GPU seconds" in bill(unit="gpu_seconds")[2]


# ------------------------------------------------------------ publishing

@pytest.fixture(scope="module")
def publisher():
    return benchmark("publish_study")


@pytest.fixture
def finished(tmp_path):
    """A finished study with one complete run, one set aside, and a README with the markers."""
    study = write_study(tmp_path / "runs")
    comparison.write_verdict(study, ruled((0.6, 0.5)) | {"rivals": against()})
    for name in ("ppo-1", "ppo-1.previous"):
        (study / name / "policy").mkdir(parents=True)
        (study / name / "policy" / "model.safetensors").write_text("weights")
        (study / name / "predictions.parquet").write_text("rows")
        (study / name / "provenance.json").write_text(json.dumps(
            {"commit": "0123456789abcdef", "dirty": True, "simulated": True}))
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- results:begin -->\nold\n<!-- results:end -->\n## Next\n")
    return study, readme


def published(publisher, study, readme):
    return publisher.main([str(study), "--results", str(readme.parent / "results"), "--readme",
                           str(readme)])


def test_publishing_writes_sentence_table_figure_and_origin(publisher, finished):
    study, readme = finished
    assert published(publisher, study, readme) == 0
    text, target = readme.read_text(), readme.parent / "results" / study.name
    assert text.startswith("# Title\n<!-- results:begin -->\n**This PPO run judged better than")
    assert text.endswith("<!-- results:end -->\n## Next\n") and "\nold\n" not in text
    assert "\n\nFrom the cold start on: **PPO: labels better, citations not shown to have" in text
    assert "| detector | macro-F1 | PR-AUC at the natural base rate | valid format rate |" in text
    assert "| ppo | 0.600 [0.500, 0.700] | 0.250 |" in text
    figure = f"results/{study.name}/macro_f1.png"
    assert f"({figure})" in text and (readme.parent / figure).stat().st_size > 1000
    assert "simulated data" in text and "`0123456789` with uncommitted changes" in text
    assert str(readme.parent) not in text
    assert {path.name for path in target.iterdir()} == {
        "ppo-1", "comparison.csv", "comparison.json", "metrics.csv", "verdict.json",
        "macro_f1.png"}
    assert "\n\n**PPO and GRPO judged worse than SFT on all labels" in text
    assert not list(target.rglob("*.safetensors"))
    assert published(publisher, study, readme) == 0 and readme.read_text() == text


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda study, readme: (study / "verdict.json").unlink(), "verdict.json is missing"),
    (lambda study, readme: (study / "comparison.csv").unlink(), "comparison.csv is missing"),
    (lambda study, readme: table(0.9).to_csv(study / "comparison.csv", index=False),
     "belongs to another table"),
    (lambda study, readme: (study / "metrics.csv").unlink(), "lacks metrics.csv"),
    (lambda study, readme: comparison.write_verdict(study, ruled((0.6, 0.5))), "lacks metrics.csv"),
    (lambda study, readme: (study / "ppo-1" / "predictions.parquet").unlink(),
     "ppo-1 is not complete"),
    (lambda study, readme: readme.write_text("# Title\n"), "lacks the lines"),
])
def test_what_cannot_be_published_is_refused_before_anything_is_written(
        publisher, finished, spoil, message, capsys):
    study, readme = finished
    spoil(study, readme)
    before = readme.read_text()
    assert published(publisher, study, readme) == 2
    assert message in capsys.readouterr().err
    assert readme.read_text() == before and not (readme.parent / "results").exists()
