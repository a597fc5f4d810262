"""Evaluation by hand on tiny tables, against scikit-learn, and against wrong twins of itself."""

import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support

from ueba_helpers.data import cert, simulate, splits, windows
from ueba_helpers.errors import UserError
from ueba_helpers.study import config, evaluation
from ueba_helpers.task import baselines
from ueba_helpers.task.verdicts import RISKS, render_verdict

FAST = {"resamples": 50, "seed": 0}


def tables(rows, *, detector="a", seed=0, split="dev"):
    """Return predictions, truth and sample from (user, label, said, score, weight) rows and more.

    Each row is a dict; what it leaves out takes the plainest value.
    """
    predictions, truth, sample = [], [], []
    for i, row in enumerate(rows):
        window = row.get("window_id", f"W{i:04d}")
        day = pd.Timestamp(row.get("day", "2010-07-01")).date()
        label, said = row["label"], row.get("said", row["label"])
        predictions.append({
            "detector": detector, "seed": seed, "window_id": window, "user": row["user"],
            "day": day, "split": split, "label": label, "risk": said,
            "score": row.get("score", RISKS.index(said) / 2 if said in RISKS else -1.0),
            "features": row.get("features", []), "evidence": row.get("evidence", []),
            "valid": said != "invalid", "seconds": 0.01})
        truth.append({
            "window_id": window, "user": row["user"], "day": day, "risk": label,
            "malicious": label == "malicious", "scenario": row.get("scenario", 0),
            "incident": row.get("incident"), "precursor": row.get("precursor", False),
            "ignore": row.get("ignore", False), "evidence_truth": row.get("truth", []),
            "dont_care": row.get("dont_care", []), "feature_truth": row.get("feature_truth", [])})
        sample.append({"window_id": window, "split": split, "headline": row.get("headline", True),
                       "weight_natural": row.get("weight", 1.0), "stratum": 0})
    return pd.DataFrame(predictions), pd.DataFrame(truth), pd.DataFrame(sample)


def random_rows(n=300, users=40, seed=0, skill=1.0):
    """Return rows whose users differ in difficulty, so that a user's days are correlated."""
    draw = np.random.default_rng(seed)
    hard = draw.normal(size=users)
    rows = []
    for i in range(n):
        user = int(draw.integers(users))
        level = int(draw.choice(3, p=[0.5, 0.3, 0.2]))
        score = skill * level + hard[user] + draw.normal()
        said = "invalid" if draw.random() < 0.03 else RISKS[int(np.clip(round(score), 0, 2))]
        rows.append({"user": f"U{user:02d}", "label": RISKS[level], "said": said,
                     "score": round(float(score), 1), "weight": float(draw.choice([1, 5, 30])),
                     "incident": f"I{user}" if level == 2 else None, "scenario": 1 + user % 3,
                     "day": f"2010-07-{1 + i % 28:02d}"})
    return rows


def value(metrics, name, column="value"):
    found = metrics.loc[metrics["metric"] == name, column]
    assert len(found) == 1, name
    return found.iloc[0]


def evaluated(rows, **options):
    return evaluation.evaluate(*tables(rows), **{**FAST, **options})


# ------------------------------------------------------------------ known truth

def known_truth(folder, chances):
    """Write truth/optimal.csv and return tables of six judged days of one account."""
    labels = ["malicious", "malicious", "suspicious", "suspicious", "normal", "normal"]
    lower = ["suspicious", "normal", "normal", "normal", "suspicious", "suspicious"]
    days = [f"2010-07-{day:02d}" for day in range(1, 7)]
    rows = [{"user": "U00", "day": day, "label": label, "window_id": f"U00_{day}"}
            for day, label in zip(days, labels, strict=True)]
    (folder / "truth").mkdir(parents=True)
    lines = ["user,day,p_malicious,optimal_risk,lower_risk,counted"] + [
        f"U00,{day},{p},malicious,{below},1"
        for day, p, below in zip(days, chances, lower, strict=True)]
    (folder / "truth" / "optimal.csv").write_text("\n".join(lines) + "\n")
    return tables(rows)


def test_the_best_rule_cuts_where_macro_f1_is_highest_and_below_says_what_is_visible(tmp_path):
    _, truth, sample = known_truth(tmp_path, [0.4, 0.4, 0.5, 0.2, 0.1, 0.1])
    best = evaluation.best_possible(tmp_path, truth, sample, split="dev").set_index("day")["risk"]
    # From .4 on one suspicious day is called malicious; from .5 on both malicious ones are missed.
    assert list(best) == ["malicious", "malicious", "malicious", "suspicious", "normal", "normal"]
    metrics = evaluation.evaluate(evaluation.best_possible(
        tmp_path, truth, sample, split="dev"), truth, sample, **FAST)
    assert value(metrics, "macro_f1") == pytest.approx((4 / 5 + 2 / 3 + 1) / 3)
    assert value(metrics, "pr_auc") == pytest.approx(2 / 3)


def test_a_rule_that_is_never_wrong_reaches_one_and_a_shifted_one_does_not(tmp_path):
    reached = {}
    for name, chances in {"right": [0.9, 0.8, 0.1, 0.1, 0.1, 0.1],
                          "shifted": [0.1, 0.9, 0.8, 0.1, 0.1, 0.1]}.items():
        _, truth, sample = known_truth(tmp_path / name, chances)
        best = evaluation.best_possible(tmp_path / name, truth, sample, split="dev")
        metrics = evaluation.evaluate(best, truth, sample, **FAST)
        reached[name] = value(metrics, "macro_f1"), value(metrics, "pr_auc")
    assert reached["right"] == (1, 1) and max(reached["shifted"]) < 0.9


def test_a_release_without_known_truth_or_without_a_judged_window_is_refused(tmp_path):
    _, truth, sample = known_truth(tmp_path, [0.5] * 6)
    with pytest.raises(UserError, match="Only a simulated release"):
        evaluation.best_possible(tmp_path / "elsewhere", truth, sample, split="dev")
    other = truth.assign(window_id=truth["window_id"].replace("U00_2010-07-03", "U01_2010-07-03"))
    with pytest.raises(UserError, match=r"lacks windows.*U01_2010-07-03"):
        evaluation.best_possible(tmp_path, other, sample.assign(window_id=other["window_id"]),
                                 split="dev")


def test_only_evaluation_reads_the_known_truth():
    package = Path(evaluation.__file__).parents[1]
    readers = {path.name for path in package.rglob("*.py")
               if re.search(r"optimal\.csv|causes\.csv", path.read_text())}
    assert readers == {"simulate.py", "evaluation.py"}, "simulate.py writes it"


# ------------------------------------------------------------------ risk levels

def test_headline_metrics_by_hand():
    metrics = evaluated([
        {"user": "A", "label": "normal"},
        {"user": "A", "label": "normal", "said": "suspicious"},
        {"user": "B", "label": "suspicious"},
        {"user": "B", "label": "malicious", "said": "invalid"},
        {"user": "C", "label": "malicious"},
        {"user": "C", "label": "normal", "said": "malicious", "headline": False},
    ])
    assert value(metrics, "accuracy") == pytest.approx(3 / 5)
    # F1: normal 2*1/(2+1), suspicious 2*1/(1+2), malicious 2*1/(2+1)
    assert value(metrics, "macro_f1") == pytest.approx(2 / 3)
    assert value(metrics, "precision_suspicious") == pytest.approx(1 / 2)
    assert value(metrics, "recall_malicious") == pytest.approx(1 / 2)
    assert value(metrics, "valid_rate") == pytest.approx(4 / 5)
    assert value(metrics, "macro_f1", "n") == 5
    assert value(metrics, "accuracy_natural") == pytest.approx(3 / 6)


def test_class_metrics_agree_with_scikit_learn_and_weights_matter():
    rows = random_rows()
    predictions, _truth, sample = tables(rows)
    metrics = evaluated(rows)
    said, label = predictions["risk"], predictions["label"]
    expected = f1_score(label, said, labels=list(RISKS), average="macro", zero_division=0)
    assert value(metrics, "macro_f1") == pytest.approx(expected, abs=1e-12)
    precision, recall, f1, _ = precision_recall_fscore_support(
        label, said, labels=list(RISKS), zero_division=0)
    for i, risk in enumerate(RISKS):
        assert value(metrics, f"precision_{risk}") == pytest.approx(precision[i], abs=1e-12)
        assert value(metrics, f"recall_{risk}") == pytest.approx(recall[i], abs=1e-12)
        assert value(metrics, f"f1_{risk}") == pytest.approx(f1[i], abs=1e-12)
    weighted = f1_score(label, said, labels=list(RISKS), average="macro", zero_division=0,
                        sample_weight=sample["weight_natural"])
    assert value(metrics, "macro_f1_natural") == pytest.approx(weighted, abs=1e-12)
    # Broken twins: invalid rows dropped, weights ignored.
    kept = said != "invalid"
    dropped = f1_score(label[kept], said[kept], labels=list(RISKS), average="macro")
    assert abs(dropped - value(metrics, "macro_f1")) > 1e-3
    assert abs(expected - value(metrics, "macro_f1_natural")) > 1e-3


def test_confusion_counts_every_headline_row_and_has_an_invalid_column():
    rows = random_rows(60)
    table = evaluation.confusion(*tables(rows))
    assert list(table.columns) == [*RISKS, "invalid"]
    assert table.to_numpy().sum() == 60
    assert table["invalid"].sum() == sum(row["said"] == "invalid" for row in rows)
    assert table.loc["normal", "malicious"] == sum(
        row["label"] == "normal" and row["said"] == "malicious" for row in rows)
    natural = evaluation.confusion(*tables(rows), natural=True)
    assert natural.to_numpy().sum() == pytest.approx(sum(row["weight"] for row in rows))


def test_flagged_shares_weigh_each_benign_day_by_the_days_it_stands_for():
    rows = [{"user": "A", "label": "normal", "said": "malicious", "weight": 1.0},
            {"user": "A", "label": "normal", "weight": 9.0},
            {"user": "B", "label": "suspicious", "said": "malicious", "weight": 5.0},
            {"user": "B", "label": "malicious", "weight": 50.0},  # no benign day
            {"user": "C", "label": "normal", "said": "malicious", "weight": 0.0},
            {"user": "C", "label": "normal", "said": "malicious", "weight": 7.0, "ignore": True},
            {"user": "C", "label": "normal", "said": "invalid", "weight": 15.0}]
    reason = pd.Series({"W0000": "late", "W0001": "late", "W0003": "late", "W0009": "not judged"})
    joined = {"a": evaluation.join(*tables(rows))}
    joined["b"] = joined["a"].assign(risk="malicious")
    table = evaluation.flagged_shares(joined, reason)
    assert list(table.index) == ["nothing unusual", "late"] and table.index.name == "reason"
    assert table["days"].tolist() == [20.0, 10.0] and table["sampled"].tolist() == [2, 2]
    assert table["a"].tolist() == pytest.approx([0.25, 0.1])
    assert table["b"].tolist() == [1.0, 1.0]
    late = joined["a"].iloc[:2]
    assert (late["risk"] == "malicious").mean() == 0.5, "broken twin: days that count once each"
    with pytest.raises(UserError, match="W0000"):
        evaluation.flagged_shares(joined, pd.concat([reason, reason.iloc[:1]]))
    with pytest.raises(UserError, match="b was judged on other windows"):
        evaluation.flagged_shares({**joined, "b": joined["b"].iloc[1:]}, reason)
    with pytest.raises(UserError, match="at least one"):
        evaluation.flagged_shares({}, reason)


# ------------------------------------------------------------------ ranking

def test_average_precision_agrees_with_scikit_learn_under_weights_and_ties():
    draw = np.random.default_rng(3)
    for _ in range(20):
        n = 80
        score = draw.integers(0, 12, n) / 4.0
        positive = draw.random(n) < 0.3
        weight = draw.choice([0.0, 0.3, 1.0, 40.0], n)
        if not (weight * positive).any():
            continue
        got = evaluation.average_precision(score, positive, weight)
        assert got == pytest.approx(
            average_precision_score(positive, score, sample_weight=weight), abs=1e-12)
    # Broken twins: unweighted, and ties broken by the order of rows.
    unweighted = average_precision_score(positive, score)
    assert abs(unweighted - got) > 1e-3
    untied = score - 1e-9 * np.arange(n)
    assert abs(average_precision_score(positive, untied, sample_weight=weight) - got) > 1e-4


def test_pr_auc_restores_the_population_from_a_weighted_sample():
    draw = np.random.default_rng(0)
    n = 60_000
    positive = draw.random(n) < 0.005
    score = draw.normal(size=n) + 2.5 * positive
    full = average_precision_score(positive, score)
    hard = score > np.quantile(score, 0.98)
    taken = positive | hard | (draw.random(n) < 0.02)
    weight = np.where(positive | hard, 1.0, (~positive & ~hard).sum()
                      / (taken & ~positive & ~hard).sum())
    got = evaluation.average_precision(score[taken], positive[taken], weight[taken])
    assert got == pytest.approx(full, abs=0.01)
    unweighted = evaluation.average_precision(score[taken], positive[taken])
    assert abs(unweighted - full) > 0.01 or taken.mean() > 0.9


@pytest.fixture(scope="module")
def organisation(tmp_path_factory):
    """Simulated windows with splits, and the study's own sampling score."""
    folder = tmp_path_factory.mktemp("organisation")
    simulate.simulate(folder / "r4.2", users=120, days=90, seed=1, insiders=(10, 10, 6),
                      web_rate=0.05)
    cert.ingest(folder / "r4.2", folder / "store", threads=1)
    table = windows.read(windows.build(folder / "store", folder / "windows", threads=1,
                                       history_days=15))  # so that most days are judged
    table = table.merge(splits.assign(windows.users_table(table), seed=0,
                                      shares=(("rl", 0.5), ("test", 0.5))), on="user")
    train_users = sorted(set(table.loc[table["split"] == "train", "user"]))
    return table, baselines.hardness_score(table, train_users, seed=0)


@pytest.mark.parametrize("detector", ["rules", "logistic_regression", "isolation_forest"])
def test_the_interval_of_a_sampled_pr_auc_holds_the_full_one(organisation, detector):
    """A tenth of the benign days, eight draws; the twin forgets what the sampled days stand for."""
    table, hardness = organisation
    clear = table[~(table["ignore"] | table["precursor"])]
    train = clear[clear["split"] == "train"]
    model = baselines.fit_thresholds(baselines.fit(train, detector=detector, seed=0), train)
    said = baselines.predict(model, table[table["split"] == "test"], split="test")
    truth = windows.truth_table(table, pd.DataFrame({"window_id": []}))

    def drawn(n_benign, seed):
        return splits.evaluation_sample(table, hardness, split="test", headline_per_class=5,
                                        n_benign=n_benign, seed=seed)

    def pr_auc(sample):
        asked = said[said["window_id"].isin(sample["window_id"])]
        metrics = evaluation.evaluate(asked, truth, sample, resamples=200, seed=0)
        return [value(metrics, "pr_auc", column) for column in ("value", "low", "high")]

    everything = drawn(10**6, 0)
    assert (everything["stratum"] > 0).sum() > 2500
    full, _, _ = pr_auc(everything)
    for seed in range(8):
        sample = drawn(300, seed)
        _, low, high = pr_auc(sample)
        assert low <= full <= high
        unweighted = sample.assign(weight_natural=(sample["weight_natural"] > 0).astype(float))
        _, low, high = pr_auc(unweighted)
        assert not low <= full <= high


def test_the_alert_budgets_are_one_two_and_five_and_two_stands_for_all():
    for chosen in config.PROFILES.values():
        budgets = chosen.evaluation.alert_budgets
        assert budgets == (1, 2, 5) and sorted(budgets)[len(budgets) // 2] == 2
    metrics = set(evaluated(random_rows(60))["metric"])
    for what in ("recall", "precision", "insiders_found", "days_until_found"):
        assert {f"{what}_at_{budget}" for budget in (1, 2, 5)} <= metrics
    assert "recall_at_20" not in metrics


def test_ranking_metrics_by_hand_at_natural_weights():
    metrics = evaluated([
        {"user": "A", "label": "malicious", "said": "malicious", "score": 0.9},
        {"user": "B", "label": "normal", "said": "malicious", "score": 0.8},
        {"user": "C", "label": "malicious", "said": "suspicious", "score": 0.7},
        {"user": "D", "label": "normal", "said": "normal", "score": 0.1, "weight": 997.0},
    ], budgets=(1, 2, 3, 4))
    assert value(metrics, "base_rate") == pytest.approx(0.002)
    assert value(metrics, "pr_auc") == pytest.approx((1 + 2 / 3) / 2)
    assert [value(metrics, f"recall_at_{b}") for b in (1, 2, 3, 4)] == pytest.approx(
        [0.5, 0.5, 1, 1])
    assert [value(metrics, f"precision_at_{b}") for b in (1, 2, 3, 4)] == pytest.approx(
        [1, 1 / 2, 2 / 3, 2 / 4])


def test_a_budget_inside_a_tie_takes_the_expected_value_over_random_orders():
    rows = [{"user": "A", "label": "malicious", "said": "malicious", "score": 0.5}]
    rows += [{"user": "B", "label": "normal", "said": "malicious", "score": 0.5}] * 3
    rows = [dict(row) for row in rows]
    rows.append({"user": "C", "label": "normal", "score": 0.0, "weight": 996.0})
    metrics = evaluated(rows, budgets=(2,))
    assert value(metrics, "recall_at_2") == pytest.approx(0.5)  # 2 alerts among 4 equal rows
    assert value(metrics, "precision_at_2") == pytest.approx(0.25)


def test_ignored_days_weigh_nothing_and_precursors_have_a_row_of_their_own():
    rows = [
        {"user": "A", "label": "malicious", "said": "malicious", "score": 0.9, "weight": 0.5},
        {"user": "A", "label": "suspicious", "said": "malicious", "score": 0.95,
         "precursor": True},
        {"user": "B", "label": "normal", "said": "malicious", "score": 0.97, "ignore": True},
        {"user": "C", "label": "normal", "score": 0.1, "weight": 99.5},
    ]
    metrics = evaluated(rows)
    assert value(metrics, "pr_auc") == pytest.approx(1.0)
    assert value(metrics, "base_rate") == pytest.approx(0.005)
    assert value(metrics, "pr_auc_precursors") == pytest.approx(1.0)
    missed = [dict(row) for row in rows]
    missed[1]["score"] = 0.0
    metrics = evaluated(missed)
    assert value(metrics, "pr_auc") == pytest.approx(1.0)
    # The precursor ranks last: recall 1/2 at precision 1, then 1 at 1/100.5 of the weight.
    assert value(metrics, "pr_auc_precursors") == pytest.approx((1 + 1 / 100.5) / 2)
    # Broken twin: a precursor counted as benign would cost precision.
    benign = [dict(row) for row in rows]
    benign[1]["precursor"] = False
    assert value(evaluated(benign), "pr_auc") < 0.6


def test_an_invalid_verdict_ranks_below_every_valid_one_whatever_its_score():
    rows = [{"user": "A", "label": "malicious", "said": "invalid", "score": 99.0},
            {"user": "B", "label": "malicious", "score": -3.0},
            {"user": "C", "label": "normal", "score": -5.0, "weight": 8.0}]
    metrics = evaluated(rows)
    assert value(metrics, "pr_auc") == pytest.approx((1 + 2 / 10) / 2)
    assert np.isnan(value(metrics, "brier"))  # valid scores are no probabilities


def test_calibration_by_hand():
    rows = [{"user": "A", "label": "malicious", "said": "malicious", "score": 0.95},
            {"user": "B", "label": "normal", "said": "malicious", "score": 0.85},
            {"user": "C", "label": "normal", "score": 0.05, "weight": 2.0}]
    metrics = evaluated(rows)
    assert value(metrics, "brier") == pytest.approx((0.05**2 + 0.85**2 + 2 * 0.05**2) / 4)
    assert value(metrics, "ece") == pytest.approx((0.05 + 0.85 + 2 * 0.05) / 4)


def test_curves_run_through_the_metrics():
    rows = random_rows(200)
    curve = evaluation.budget_curve(*tables(rows), budgets=(1, 5, 10, 1000), **FAST)
    metrics = evaluated(rows)
    assert curve.set_index("budget").loc[5, "recall"] == pytest.approx(
        value(metrics, "recall_at_5"))
    assert curve["recall"].iloc[-1] == pytest.approx(1.0)
    assert curve["recall"].is_monotonic_increasing
    precision = evaluation.precision_recall_curve(*tables(rows), **FAST)
    assert precision["precision"].iloc[-1] >= value(metrics, "base_rate") - 1e-12
    assert precision["precision"].mean() == pytest.approx(value(metrics, "pr_auc"), abs=0.02)
    inside = precision.dropna()
    assert (inside["low"] <= inside["high"]).all()


# ------------------------------------------------------------------ evidence and features

CITED = [
    # cited, truth, don't-care, hit rate, F1
    (["e1", "e2"], ["e1", "e2"], [], 1.0, 1.0),
    (["e1"], ["e1", "e2"], [], 0.5, 2 / 3),
    (["e1", "e3"], ["e1", "e2"], [], 0.5, 0.5),
    (["e1", "e3"], ["e1", "e2"], ["e3"], 0.5, 2 / 3),
    (["e1", "e1"], ["e1", "e2"], ["e1"], 0.5, 2 / 3),
    ([], ["e1"], [], 0.0, 0.0),
    ([], [], [], np.nan, 1.0),
    (["e1"], [], [], np.nan, 0.0),
    (["e1"], [], ["e1"], np.nan, 1.0),
]


@pytest.mark.parametrize(("cited", "truth", "free", "hit", "f1"), CITED)
def test_evidence_scores_by_table(cited, truth, free, hit, f1):
    assert evaluation.evidence_scores(cited, truth, free) == pytest.approx((hit, f1), nan_ok=True)


def test_basis_support_averages_over_verdicts_that_cite():
    rows = [{"user": name, "label": label, "said": said, "truth": ["e1"]} for name, label, said in (
        ("A", "malicious", "malicious"), ("B", "suspicious", "malicious"),
        ("C", "normal", "normal"), ("D", "malicious", "invalid"))]
    predictions, truth, sample = tables(rows)
    said = {"A": (["e1"], "e1 22:14 device"), "B": (["e2"], "e2 22:14 device"), "C": ([], "calm")}
    predictions["completion"] = [
        render_verdict(risk="malicious" if said[user][0] else "normal", evidence=said[user][0],
                       features=["usual_hours", "usual_web"], basis=said[user][1])
        if user in said else "?" for user in predictions["user"]]
    asked = [{"window_id": window, "evidence_ids": ["e1", "e2"], "style": "evidence_first",
              "item_text": {"e1": "e1 22:14 device pc1", "e2": "e2 09:00 device pc1"}}
             for window in predictions["window_id"]]
    found = evaluation.basis_supports(predictions, asked)
    by_user = dict(zip(predictions["user"], found, strict=True))
    assert [by_user[name] for name in "AB"] == [1, 0] and np.isnan([by_user[n] for n in "CD"]).all()
    metrics = evaluation.evaluate(predictions.assign(basis_support=found), truth, sample, **FAST)
    assert value(metrics, "basis_support") == 0.5 and value(metrics, "basis_support", "n") == 2
    assert np.nan_to_num(found).mean() == 0.25, "the twin: silence and no verdict are no claims"
    silent = predictions.drop(columns="completion")
    assert np.isnan(evaluation.basis_supports(silent, asked)).all(), "a classical detector"
    with pytest.raises(UserError, match="lack judged windows"):
        evaluation.basis_supports(predictions, asked[1:])


def test_evidence_and_features_average_over_the_right_windows():
    rows = [
        {"user": "A", "label": "malicious", "evidence": ["e1"], "truth": ["e1", "e2"],
         "features": ["x", "y"], "feature_truth": ["x", "z"]},
        {"user": "B", "label": "suspicious", "said": "invalid", "evidence": [], "truth": ["e1"],
         "feature_truth": ["x"]},
        {"user": "C", "label": "normal", "evidence": [], "features": ["x"],
         "feature_truth": ["x"]},
        {"user": "D", "label": "normal", "said": "invalid", "evidence": []},
    ]
    metrics = evaluated(rows)
    assert value(metrics, "evidence_hit_rate") == pytest.approx((0.5 + 0) / 2)
    assert value(metrics, "evidence_f1") == pytest.approx((2 / 3 + 0) / 2)
    # The invalid verdict about a normal day cites nothing, and still earns nothing.
    assert value(metrics, "evidence_f1_all") == pytest.approx((2 / 3 + 0 + 1 + 0) / 4)
    assert value(metrics, "feature_agreement") == pytest.approx((1 / 2 + 0 + 1 + 0) / 4)
    assert value(metrics, "feature_precision") == pytest.approx((1 / 2 + 0 + 1 + 0) / 4)
    assert value(metrics, "evidence_hit_rate", "n") == 2
    assert np.isnan(value(metrics, "basis_support")), "no basis was looked up"
    counts = evaluation.evidence_counts(*tables(rows))
    assert counts.loc["malicious"].tolist() == [1, 1, 0, 0]
    assert counts.loc["suspicious"].tolist() == [0, 1, 0, 0]


# ------------------------------------------------------------------ insiders

def test_insiders_and_days_until_found_by_hand():
    def day(user, label, date, score, **more):
        return {"user": user, "label": label, "day": date, "score": score,
                "said": "malicious" if score > 0.5 else "normal", **more}

    rows = [
        day("A", "malicious", "2010-07-01", 0.2, incident="I1", scenario=2),
        day("A", "malicious", "2010-07-05", 0.9, incident="I1", scenario=2),
        day("B", "malicious", "2010-07-02", 0.1, incident="I2", scenario=1),
        # A supervisor's account, abused: flagged there, the insider C counts as found.
        day("C", "malicious", "2010-07-03", 0.1, incident="I3", scenario=3),
        day("D", "malicious", "2010-07-04", 0.8, incident="I3", scenario=3),
        day("E", "normal", "2010-07-04", 0.0, weight=995.0),
    ]
    table = evaluation.insiders_found(*tables(rows), budget=2).set_index("incident")
    assert table["found"].to_dict() == {"I1": True, "I2": False, "I3": True}
    assert table.loc["I1", "days_until_found"] == 4
    assert table.loc["I3", "days_until_found"] == 1
    metrics = evaluated(rows, budgets=(1, 2))
    assert value(metrics, "insiders_found_at_2") == pytest.approx(2 / 3)
    assert value(metrics, "insiders_found_at_1") == pytest.approx(1 / 3)
    assert value(metrics, "insiders_found_scenario_2_at_1") == 1.0
    assert value(metrics, "insiders_found_scenario_1_at_2") == 0.0
    assert value(metrics, "days_until_found_at_2") == pytest.approx(2.5)
    assert value(metrics, "insiders_found_scenario_3_at_2", "n") == 1


def test_a_constant_score_finds_nobody():
    rows = [dict(row, score=0.5) for row in random_rows(100)]
    assert not evaluation.insiders_found(*tables(rows), budget=10)["found"].any()


# ------------------------------------------------------------------ intervals

def test_intervals_are_deterministic_and_do_not_depend_on_the_order_of_rows():
    rows = random_rows()
    predictions, truth, sample = tables(rows)
    first = evaluation.evaluate(predictions, truth, sample, **FAST)
    shuffled = evaluation.evaluate(predictions.sample(frac=1, random_state=1),
                                   truth.sample(frac=1, random_state=2),
                                   sample.sample(frac=1, random_state=3), **FAST)
    pd.testing.assert_frame_equal(first, shuffled, check_exact=True)
    other = evaluation.evaluate(predictions, truth, sample, resamples=50, seed=1)
    assert value(other, "macro_f1", "low") != value(first, "macro_f1", "low")
    assert value(other, "macro_f1") == value(first, "macro_f1")


def test_intervals_match_a_plain_loop_over_resampled_users():
    rows = random_rows(120, users=12)
    predictions, _truth, sample = tables(rows)
    users = sorted(predictions["user"].unique())
    draws = evaluation.user_draws(len(users), resamples=40, seed=0)
    macro, area = [], []
    for draw in draws:
        times = predictions["user"].map(dict(zip(users, draw, strict=True))).to_numpy(int)
        again = predictions.loc[predictions.index.repeat(times)]
        weight = sample["weight_natural"].loc[again.index]
        macro.append(f1_score(again["label"], again["risk"], labels=list(RISKS),
                              average="macro", zero_division=0))
        lowest = predictions.loc[predictions["valid"], "score"].min() - 1
        area.append(average_precision_score(
            again["label"] == "malicious", again["score"].where(again["valid"], lowest),
            sample_weight=weight))
    metrics = evaluated(rows, resamples=40)
    for name, values in (("macro_f1", macro), ("pr_auc", area)):
        low, high = np.quantile(values, [0.025, 0.975])
        assert value(metrics, name, "low") == pytest.approx(low, abs=1e-9)
        assert value(metrics, name, "high") == pytest.approx(high, abs=1e-9)


def test_resampling_users_is_wider_than_resampling_rows_where_users_differ():
    draw = np.random.default_rng(0)
    rows = []
    for user in range(20):
        right = draw.random() < 0.5
        rows += [{"user": f"U{user:02d}", "label": "normal",
                  "said": "normal" if right else "suspicious"} for _ in range(15)]
    rows += [{"user": "Z", "label": "malicious"}, {"user": "Z", "label": "suspicious"}]
    by_user = evaluated(rows, resamples=400)
    alone = [dict(row, user=f"R{i:03d}") for i, row in enumerate(rows)]
    by_row = evaluated(alone, resamples=400)

    def width(metrics):
        return value(metrics, "accuracy", "high") - value(metrics, "accuracy", "low")

    assert value(by_user, "accuracy") == value(by_row, "accuracy")
    assert width(by_user) > 2.5 * width(by_row)  # about the square root of 15


def test_the_users_of_one_incident_are_drawn_together():
    """Insider and supervisor judged alike are one story: twice the rows, no more evidence."""
    draw = np.random.default_rng(0)
    rows = []
    for i in range(30):
        said = "malicious" if draw.random() < 0.6 else "normal"
        for user in (f"INS{i:02d}", f"SUP{i:02d}"):
            rows += [{"user": user, "label": "malicious", "said": said, "incident": f"I{i:02d}",
                      "score": i + draw.random()},
                     {"user": user, "label": "normal", "score": i + draw.random()}]
    predictions, truth, sample = tables(rows)

    def width(truth, name):
        metrics = evaluation.evaluate(predictions, truth, sample, resamples=1000, seed=0)
        return value(metrics, name, "high") - value(metrics, name, "low")

    share = np.mean([row["said"] == "malicious" for row in rows[::4]])
    exact = 2 * 1.96 * (share * (1 - share) / 30) ** 0.5
    assert width(truth, "recall_malicious") == pytest.approx(exact, rel=0.15)
    apart = truth.assign(incident=None)  # broken twin: as if they were strangers
    for name in ("recall_malicious", "pr_auc"):
        assert width(apart, name) < 0.85 * width(truth, name)
    curves = [evaluation.budget_curve(predictions, part, sample, budgets=(100,), **FAST)
              for part in (truth, apart)]
    assert curves[1]["high"][0] - curves[1]["low"][0] < curves[0]["high"][0] - curves[0]["low"][0]


def test_clusters_join_users_through_incidents_and_leave_the_others_alone():
    users = ["D", "A", "B", "B", "C", "E", "C", "F"]
    incidents = [None, None, "I1", np.nan, "I1", "I2", "I2", "I3"]
    # A; B, C and E (C is in two incidents); D; F: in the order of their first names.
    assert evaluation.clusters(users, incidents).tolist() == [2, 0, 1, 1, 1, 1, 1, 3]
    assert evaluation.clusters(users, [None] * 8).tolist() == [3, 0, 1, 1, 2, 4, 2, 5]


def test_incidents_are_counted_where_a_malicious_headline_day_is_judged():
    rows = [{"user": "A", "label": "malicious", "incident": "I1"},
            {"user": "B", "label": "malicious", "incident": "I1"},
            {"user": "C", "label": "malicious", "incident": "I2", "headline": False},
            {"user": "C", "label": "normal"},
            {"user": "D", "label": "normal", "incident": "I3", "precursor": True},
            {"user": "E", "label": "malicious", "incident": "I4"}]
    assert evaluation.incidents_judged(*tables(rows)[1:]) == 2
    assert evaluation.incidents_judged(*tables(rows[:2])[1:]) == 1
    assert evaluation.incidents_judged(*tables(rows[2:5])[1:]) == 0


def test_what_no_user_contradicts_is_as_certain_as_their_number_allows():
    rows = [{"user": f"U{i:02d}", "label": "malicious" if i < 8 else "normal", "score": 40.0 - i,
             "evidence": ["e1"] if i < 5 else [], "truth": ["e1"] if i < 5 else [],
             "incident": f"I{i}" if i < 8 else None} for i in range(40)]
    metrics = evaluated(rows, budgets=(250,))

    def ends(name):
        return value(metrics, name, "low"), value(metrics, name, "high")

    for name, users in (("macro_f1", 40), ("valid_rate", 40), ("recall_malicious", 8),
                        ("precision_normal", 32), ("f1_malicious", 8), ("pr_auc", 8),
                        ("insiders_found_at_250", 8), ("evidence_hit_rate", 5)):
        # Were a share of 1 - low of them wrong, that many right ones would come this rarely.
        assert ends(name) == pytest.approx((0.025 ** (1 / users), 1.0)), name
    silent = evaluated([dict(row, said="normal") for row in rows])
    assert value(silent, "precision_malicious", "high") == pytest.approx(1 - 0.025 ** (1 / 8))
    assert value(silent, "recall_malicious", "low") == 0
    assert value(metrics, "days_until_found_at_250", "high") == 0, "days are no share"
    curve = evaluation.precision_recall_curve(*tables(rows), **FAST)
    assert curve["low"].to_numpy() == pytest.approx(0.025 ** (1 / 8))
    assert evaluation.percentile_interval(np.full(9, 0.1 + 0.2), users=3)[0] == 0, "clipped"
    varied = np.r_[np.ones(99), 0.5]
    assert evaluation.percentile_interval(varied, users=3) == (1, 1), "only where all agree"


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = row_wise = 0
    users, days = 30, 6
    for trial in range(200):
        draw = np.random.default_rng(trial)
        right = np.where(draw.random((users, 1)) < 2 / 3,  # users differ: mean 2/3
                         draw.random((users, days)) < 0.9, draw.random((users, days)) < 0.2)
        truth = 0.9 * 2 / 3 + 0.2 / 3
        draws = evaluation.user_draws(users, resamples=300, seed=trial)
        low, high = evaluation.percentile_interval(draws @ right.sum(1) / (draws.sum(1) * days))
        covered += low <= truth <= high
        rows = evaluation.user_draws(users * days, resamples=300, seed=trial)
        low, high = evaluation.percentile_interval(rows @ right.ravel() / (users * days))
        row_wise += low <= truth <= high
    assert 0.89 <= covered / 200 <= 0.98
    assert row_wise / 200 < 0.8  # the broken twin: rows resampled as if they were independent


def test_a_sample_of_six_hundred_windows_takes_less_than_two_seconds():
    given = tables(random_rows(650, users=100))
    started = time.process_time()
    evaluation.evaluate(*given, resamples=1000)
    assert time.process_time() - started < 2.0


def test_metrics_without_a_basis_are_nan_and_never_zero():
    metrics = evaluated([{"user": "A", "label": "normal"}, {"user": "B", "label": "normal"}])
    assert value(metrics, "macro_f1") == 1.0  # classes that do not occur are left out
    for name in ("recall_malicious", "pr_auc", "recall_at_1", "evidence_hit_rate",
                 "insiders_found_at_1", "days_until_found_at_1"):
        assert np.isnan(value(metrics, name)), name


# ------------------------------------------------------------------ refusals

def _given():
    return tables(random_rows(30))


REFUSED = {
    "a missing column": (lambda p, t, s: (p.drop(columns="score"), t, s), "score"),
    "a missing truth column": (lambda p, t, s: (p, t.drop(columns="ignore"), s), "ignore"),
    "a missing weight": (lambda p, t, s: (p, t, s.drop(columns="weight_natural")),
                         "weight_natural"),
    "a missing prediction": (lambda p, t, s: (p.iloc[1:], t, s), "W0000"),
    "a prediction too many": (lambda p, t, s: (p, t, s.iloc[1:]), "W0000"),
    "a window twice": (lambda p, t, s: (pd.concat([p, p.iloc[[3]]]), t, s), "W0003"),
    "truth for other windows": (lambda p, t, s: (p, t.iloc[:-1], s), "W0029"),
    "a foreign label": (lambda p, t, s: (p, t.assign(risk="normal"), s), "label"),
    "another user": (lambda p, t, s: (p.assign(user="X"), t, s), "user"),
    "an unknown risk": (lambda p, t, s: (p.assign(risk="critical"), t, s), "risk"),
    "valid against risk": (lambda p, t, s: (p.assign(valid=~p["valid"]), t, s), "valid"),
    "a score that is no number": (lambda p, t, s: (p.assign(score=np.nan), t, s), "score"),
    "a negative weight": (lambda p, t, s: (p, t, s.assign(weight_natural=-1.0)),
                          "weight_natural"),
    "no rows": (lambda p, t, s: (p.iloc[:0], t, s), "no rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mismatched_tables_are_refused_by_name(case):
    change, named = REFUSED[case]
    with pytest.raises(UserError, match=named):
        evaluation.evaluate(*change(*_given()), **FAST)


def test_budgets_out_of_range_are_refused():
    for budgets in ((), (0,), (1001,)):
        with pytest.raises(UserError, match="budgets"):
            evaluation.evaluate(*_given(), budgets=budgets, **FAST)


# ------------------------------------------------------------------ comparison

def _seeds(detector, skill, seeds=(0, 1, 2), n=300):
    """Return predictions of one detector for several seeds on the same windows and truth."""
    parts, truth, sample = [], None, None
    base = random_rows(n)
    for seed in seeds:
        draw = np.random.default_rng([seed, len(detector)])
        rows = [dict(row, said=row["label"] if draw.random() < skill else RISKS[draw.integers(3)])
                for row in base]
        rows = [dict(row, score=RISKS.index(row["said"]) + draw.random()) for row in rows]
        predictions, truth, sample = tables(rows, detector=detector, seed=seed)
        parts.append(predictions)
    return pd.concat(parts, ignore_index=True), truth, sample


def test_comparison_table_takes_its_interval_from_seeds_or_from_users():
    many, truth, sample = _seeds("ppo", 0.8)
    one, _, _ = _seeds("rules", 0.6, seeds=(0,))
    metrics = evaluation.evaluate(pd.concat([many, one]), truth, sample, **FAST)
    table = evaluation.comparison_table(metrics, names=("macro_f1", "accuracy"))
    assert table["detector"].tolist() == ["ppo", "rules"]
    assert table["interval"].tolist() == ["seeds", "users"]
    values = metrics.loc[(metrics["detector"] == "ppo") & (metrics["metric"] == "macro_f1"),
                         "value"]
    assert table.loc[0, ["macro_f1", "macro_f1_low", "macro_f1_high"]].tolist() == pytest.approx(
        evaluation.seed_interval(values))
    rules = metrics[(metrics["detector"] == "rules") & (metrics["metric"] == "macro_f1")].iloc[0]
    assert table.loc[1, "macro_f1_low"] == rules["low"]
    text = evaluation.readable(table)
    assert "macro_f1_low" not in text
    assert text.loc[1, "macro_f1"].startswith(f"{rules['value']:.3f} [")
    with pytest.raises(UserError, match="nonsense"):
        evaluation.comparison_table(metrics, names=("nonsense",))
    with pytest.raises(UserError, match="more than once"):
        evaluation.comparison_table(pd.concat([metrics, metrics]))


def test_a_paired_difference_is_antisymmetric_and_narrower_than_an_unpaired_one():
    a, truth, sample = _seeds("good", 0.8, seeds=(0,), n=600)
    # b errs where a errs, and on a few windows more.
    b = a.assign(detector="less")
    spoiled = b.index[::12]
    b.loc[spoiled, "risk"] = b.loc[spoiled, "label"].map(
        {"normal": "suspicious", "suspicious": "normal", "malicious": "normal"})
    options = {"resamples": 300, "seed": 0}
    there = evaluation.paired_difference(a, b, truth, sample, **options)
    back = evaluation.paired_difference(b, a, truth, sample, **options)
    assert there.value == pytest.approx(-back.value)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert (there.verdict, back.verdict) == ("better", "worse")
    metrics = [evaluation.evaluate(t, truth, sample, **options) for t in (a, b)]
    widths = [value(m, "macro_f1", "high") - value(m, "macro_f1", "low") for m in metrics]
    assert there.high - there.low < 0.7 * np.hypot(*widths)
    assert there.covers == "users" and np.isnan(there.p_seeds)
    assert there.value == pytest.approx(value(metrics[0], "macro_f1")
                                        - value(metrics[1], "macro_f1"))


def test_a_detector_against_itself_is_equivalent_and_seeds_are_paired():
    a, truth, sample = _seeds("ppo", 0.8)
    same = evaluation.paired_difference(a, a.assign(detector="copy"), truth, sample,
                                        resamples=100)
    bound = 1 - 0.025 ** (1 / 40)  # 40 users, none of whom differs
    assert (same.value, same.low, same.high) == pytest.approx((0, -bound, bound))
    assert same.verdict == "inconclusive", "so few users cannot show that all others are alike"
    assert same.covers == "users and seeds" and same.p_seeds == same.p_users == 1.0
    narrow = 1 - 0.05 ** (1 / 40)
    for margin, verdict in ((0.99 * narrow, "inconclusive"), (1.01 * narrow, "equivalent")):
        assert evaluation.paired_difference(a, a.assign(detector="copy"), truth, sample,
                                            margin=margin, resamples=100).verdict == verdict
    # Broken twin: seeds resampled apart would leave their spread in the difference.
    other = a.assign(detector="copy", seed=a["seed"] + 10)
    apart = evaluation.paired_difference(a, other, truth, sample, resamples=100)
    assert apart.high - apart.low > 0.005


def test_a_difference_that_is_the_same_for_every_user_is_no_certainty_either():
    rows = [{"user": f"U{i}", "label": "normal"} for i in range(5)]
    a, truth, sample = tables(rows)
    b, _, _ = tables([dict(row, said="suspicious") for row in rows])
    found = evaluation.paired_difference(a, b, truth, sample, metric="accuracy", resamples=50)
    assert found.value == 1 and (found.low, found.high) == pytest.approx((0.025 ** (1 / 5), 1))
    assert found.verdict == "better" and found.p_users == 0
    a, truth, sample = tables([{"user": "A", "label": "malicious", "incident": "I1"}])
    late = evaluation.paired_difference(a, a, truth, sample, metric="days_until_found_at_1000",
                                        resamples=50)
    assert (late.low, late.high) == (0, 0), "days are no share"


def test_the_p_over_users_belongs_to_the_interval_over_users():
    a, truth, sample = _seeds("good", 0.8, seeds=(0,))
    for skill in (0.3, 0.6, 0.75, 0.8, 0.85):
        b, _, _ = _seeds("other", skill, seeds=(0,))
        found = evaluation.paired_difference(a, b, truth, sample, resamples=400)
        p = found.p_users
        assert 0 < p <= 1
        if not 0.04 < p < 0.06:
            assert (p < 0.05) == (found.low > 0 or found.high < 0)
    assert p > 0.05, "the last two are about as good as each other"
    # Where all resamples agree, the interval at level 1 - p ends at zero.
    p = evaluation._p_of_no_difference(np.full(50, 0.1), 20)
    low, _ = evaluation.percentile_interval(np.full(50, 0.1), level=1 - p, users=20,
                                            limits=(-1.0, 1.0))
    assert p == pytest.approx(2 * 0.9**20) and low == pytest.approx(0)


def test_differences_looked_at_together_are_corrected_together():
    def found(p, verdict):
        return evaluation.Difference("m", 0.1, 0.01, 0.2, verdict, 0.02, 0.95, "users", 1,
                                     float("nan"), p)

    alone = [found(0.03, "better"), found(0.01, "worse"), found(0.9, "equivalent")]
    together = evaluation.corrected(alone)
    assert [one.p_users for one in together] == pytest.approx([0.06, 0.03, 0.9])
    assert [one.verdict for one in together] == ["inconclusive", "worse", "equivalent"]
    assert evaluation.corrected(alone[:1])[0] == alone[0], "one alone needs no correction"
    with_gap = evaluation.corrected([found(float("nan"), "inconclusive"), found(0.03, "better")])
    assert np.isnan(with_gap[0].p_users) and with_gap[1].verdict == "inconclusive"


def test_over_seeds_students_p_goes_with_students_interval():
    rng = np.random.default_rng(3)
    for _ in range(40):
        found = evaluation.compare_seeds(rng.normal(0.02, 0.01, 4), np.zeros(4))
        assert found.p == found.p_student and np.isnan(found.p_users)
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
    both = [evaluation.compare_seeds([0.05, 0.051, 0.056], [0.0, 0.0, 0.0])] * 20
    assert both[0].verdict == "better" and both[0].p == pytest.approx(0.00130, abs=1e-4)
    assert {one.verdict for one in evaluation.corrected(both[:5])} == {"better"}
    assert {one.verdict for one in evaluation.corrected(both * 3)} == {"inconclusive"}
    assert evaluation.student_p([0.0, 0.0]) == 1 and np.isnan(evaluation.student_p([0.3]))


def test_a_paired_difference_takes_ranking_and_insider_metrics_and_refuses_unknown_ones():
    a, truth, sample = _seeds("good", 0.9, seeds=(0,))
    b, _, _ = _seeds("worse", 0.3, seeds=(0,))
    for metric in ("pr_auc", "recall_at_20", "insiders_found_at_100", "accuracy_natural"):
        found = evaluation.paired_difference(a, b, truth, sample, metric=metric, resamples=50)
        assert found.value > 0, metric
    for metric in ("nonsense", "recall_at_x"):
        with pytest.raises(UserError, match=metric):
            evaluation.paired_difference(a, b, truth, sample, metric=metric, resamples=10)
    with pytest.raises(UserError, match="one detector"):
        evaluation.paired_difference(pd.concat([a, b]), b, truth, sample)


def test_difference_verdicts_by_table():
    verdict = evaluation.difference_verdict
    assert verdict((0.03, 0.09), (0.04, 0.08), 0.02) == "better"
    assert verdict((-0.09, -0.03), (-0.08, -0.04), 0.02) == "worse"
    assert verdict((-0.03, 0.03), (-0.019, 0.019), 0.02) == "equivalent"
    assert verdict((-0.03, 0.03), (-0.025, 0.019), 0.02) == "inconclusive"
    assert verdict((0.001, 0.012), (0.002, 0.01), 0.02) == "equivalent"
    assert verdict((np.nan, np.nan), (np.nan, np.nan), 0.02) == "inconclusive"
    with pytest.raises(UserError, match="margin"):
        verdict((0, 1), (0, 1), 0.0)


def test_the_equivalence_claim_is_rarely_made_at_the_margin_itself():
    draw = np.random.default_rng(0)
    claims = 0
    for _ in range(400):
        a = draw.normal(0.02, 0.01, 8)  # the true difference is the margin
        claims += evaluation.compare_seeds(a, np.zeros(8), margin=0.02).verdict == "equivalent"
    assert claims / 400 < 0.08  # alpha is .05
    wrong = sum(abs(draw.normal(0.02, 0.01, 8).mean()) < 0.02 for _ in range(400))
    assert wrong / 400 > 0.3  # the broken twin: the mean alone within the margin


# ------------------------------------------------------------------ two detectors together

def test_an_ensemble_says_the_graver_risk_of_the_same_window():
    said = [("normal", "normal"), ("normal", "suspicious"), ("malicious", "suspicious"),
            ("invalid", "normal"), ("invalid", "invalid")]
    a, b = (tables([{"user": "A", "label": "normal", "said": pair[i], "evidence": ["e1"]}
                    for pair in said], detector=name)[0] for i, name in enumerate("ab"))
    expected = ["normal", "suspicious", "malicious", "normal", "invalid"]
    both = evaluation.graver(a, b.iloc[::-1], name="two")  # whatever the order of the rows
    assert both["risk"].tolist() == expected
    assert both["valid"].tolist() == [True] * 4 + [False]
    assert set(both["detector"]) == {"two"} and both["evidence"].tolist() == [[]] * 5
    assert set(both["score"]) == {0.0} and a["evidence"].tolist() == [["e1"]] * 5
    twin = [max(pair) for pair in zip(a["risk"], b["risk"], strict=True)]  # broken: by alphabet
    assert twin != expected
    with pytest.raises(UserError, match="W0004"):
        evaluation.graver(a, b.iloc[:4])
    with pytest.raises(UserError, match="a holds windows more than once: W0000"):
        evaluation.graver(pd.concat([a, a.iloc[:1]]), b)


def test_an_ensemble_gains_where_each_misses_what_the_other_sees():
    labels = ["malicious"] * 40 + ["normal"] * 40 + ["suspicious"] * 40
    rows = [{"user": f"U{i % 20}", "label": label} for i, label in enumerate(labels)]

    def detector(name, misses):
        return tables([row | {"said": "normal" if row["label"] != "normal" and misses(i)
                              else row["label"]} for i, row in enumerate(rows)], detector=name)

    a, truth, sample = detector("a", lambda i: i % 4 == 0)
    other, same = (detector(name, misses)[0] for name, misses in (
        ("b", lambda i: i % 4 == 1), ("b", lambda i: i % 4 == 0)))
    table = evaluation.ensemble_gains(a, other, truth, sample, **FAST)
    assert list(table.index) == ["a", "b", "either"]
    assert table.loc["either", "macro_f1"] == 1 and table["macro_f1"].iloc[0] == pytest.approx(
        f1_score(labels, a["risk"], average="macro"))
    assert table.loc["a", "gain"] == pytest.approx(1 - table.loc["a", "macro_f1"])
    gain = evaluation.paired_difference(evaluation.graver(a, other), a, truth, sample, **FAST)
    assert (gain.low, gain.high) == tuple(table.loc["a", ["low", "high"]])
    assert table["verdict"].tolist()[:2] == ["better", "better"]
    assert table.loc["either", ["gain", "low", "high", "verdict"]].isna().all()
    twin = evaluation.ensemble_gains(a, same, truth, sample, **FAST)  # both miss the same days
    assert twin["gain"].iloc[0] == 0 and twin["verdict"].iloc[0] != "better"


# ------------------------------------------------------------------ statistics of seeds

def test_seed_interval_is_students_and_one_seed_has_none():
    mean, low, high = evaluation.seed_interval([0.5, 0.6, 0.7, 0.8])
    half = 3.182446 * np.std([0.5, 0.6, 0.7, 0.8], ddof=1) / 2
    assert (mean, low, high) == pytest.approx((0.65, 0.65 - half, 0.65 + half), abs=1e-6)
    normal = 1.96 * np.std([0.5, 0.6, 0.7, 0.8], ddof=1) / 2
    assert high - mean > 1.5 * normal  # the broken twin: a normal quantile
    assert np.isnan(evaluation.seed_interval([0.5])[1:]).all()
    with pytest.raises(UserError):
        evaluation.seed_interval([])


def test_sign_flip_p_by_enumeration():
    assert evaluation.sign_flip_p([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 64)
    assert evaluation.sign_flip_p([1.0, -1.0]) == 1.0
    # |sum| >= 4 among the signs of 1, 2, 3: +-6, and +-4 (signs of 1 flipped): 4 of 8.
    assert evaluation.sign_flip_p([-1.0, 2.0, 3.0]) == pytest.approx(4 / 8)
    with pytest.raises(UserError):
        evaluation.sign_flip_p([])


def test_compare_seeds_pairs_the_seeds():
    a, b = [0.60, 0.70, 0.80, 0.90], [0.55, 0.66, 0.75, 0.84]
    paired = evaluation.compare_seeds(a, b)
    assert paired.verdict == "better" and paired.value == pytest.approx(0.05)
    shuffled = evaluation.compare_seeds(a, b[::-1])
    assert shuffled.verdict == "inconclusive"
    assert paired.p_seeds == pytest.approx(2 / 16)
    with pytest.raises(UserError, match="seeds"):
        evaluation.compare_seeds([1.0], [1.0, 2.0])


def test_mcnemar_counts_only_discordant_windows():
    a = np.array([True] * 8 + [False] * 2 + [True] * 50)
    b = np.array([False] * 8 + [True] * 2 + [True] * 50)
    expected = 2 * sum([1, 10, 45]) / 2**10
    assert evaluation.mcnemar_p(a, b) == pytest.approx(expected)
    assert evaluation.mcnemar_p(a, a) == 1.0
