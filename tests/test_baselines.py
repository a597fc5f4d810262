"""Classical detectors: what they learn, what they must not see, and what they hand over."""

import functools

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, f1_score

from ueba_helpers.data import splits
from ueba_helpers.data.windows import BEHAVIOUR_FEATURES, PAST_FEATURES, WEEK_FEATURES
from ueba_helpers.errors import UserError
from ueba_helpers.task import baselines
from ueba_helpers.task.verdicts import RISKS

COUNTS = [name for name in BEHAVIOUR_FEATURES if name.startswith("n_")]


def quiet_day(**changes):
    """Return one ordinary account-day with a past, and what is changed in it."""
    row = dict.fromkeys((*BEHAVIOUR_FEATURES, *PAST_FEATURES, *WEEK_FEATURES), 0.0)
    row.update(n_logon=2, n_logoff=2, first_hour=8, last_hour=17, n_pcs=1, n_email=8, n_http=60,
               max_recipients=2, past_days=30, past_first_hour=8, past_last_hour=17, past_pcs=1,
               past_email=8, past_http=60)
    row.update(changes)
    return row


def synthetic_windows(users=60, days=30, *, insiders=12, seed=0):
    """Return a windows table: insiders copy files to a drive at night on their last five days."""
    draw = np.random.default_rng(seed)
    rows = []
    for u in range(users):
        user = f"U{u:03d}"
        for d in range(days):
            row = quiet_day(
                n_email=8 + draw.integers(-2, 3), n_http=60 + draw.integers(-9, 10),
                first_hour=8 + draw.normal(0, 0.3), last_hour=17 + draw.normal(0, 0.5),
                past_device_days=3.0 if u % 4 == 0 else 0.0)
            night, drive = draw.random() < 0.05, draw.random() < 0.04
            insider = u < insiders and d >= days - 5
            if night:
                row.update(n_after_hours_logon=1, last_hour=21.0)
            if drive:
                row.update(n_device=1, n_file=2)
            if insider:
                row.update(n_after_hours_logon=1, last_hour=22.0 + draw.random(), n_device=2,
                           n_device_after_hours=2, n_file=12, n_http_leak=u % 3 == 0)
            malicious = insider and draw.random() < 0.9
            row.update(user=user, day=pd.Timestamp("2010-03-01") + pd.Timedelta(days=d),
                       window_id=f"{user}_{d:02d}", malicious=malicious,
                       incident=f"I{u}" if u < insiders else None, ignore=False,
                       precursor=bool(u < insiders and d == days - 6),
                       risk="malicious" if malicious else "suspicious" if night or drive
                       else "normal")
            rows.append(row)
    table = pd.DataFrame(rows)
    return table.astype(dict.fromkeys(baselines.FEATURE_COLUMNS, float))


@pytest.fixture(scope="module")
def table():
    return synthetic_windows()


@pytest.fixture(scope="module")
def parts(table):
    """Train, dev and test rows by user; every second insider is learned from."""
    number = table["user"].str[1:].astype(int)
    return table[number % 2 == 0], table[number % 4 == 1], table[number % 4 == 3]


@pytest.fixture(scope="module")
def fitted(parts):
    train, dev, _ = parts
    return {name: baselines.fit_thresholds(baselines.fit(train, detector=name, seed=0), dev)
            for name in baselines.DETECTORS}


# ------------------------------------------------------------------ rules and keywords

RULE_DAYS = {
    "leak_site": {"n_http_leak": 1},
    "hacking_tool": {"n_http_hack": 2},
    "night_drive_without_habit": {"n_device_after_hours": 1, "past_after_hours_days": 3},
    "drive_on_new_pc": {"n_device": 1, "n_new_pcs": 1, "past_device_days": 9},
    "drive_while_job_hunting": {"n_device": 1, "week_job": 3, "past_device_days": 9},
    "job_hunting_with_competitor": {"week_job": 9, "n_email_competitor": 1,
                                    "past_competitor_days": 5},
    "bulk_copy": {"n_file": 12, "past_files": 4},
    "executable_copy": {"n_file_exe": 1},
    "mass_mail": {"max_recipients": 10},
    "new_competitor_mail": {"n_email_competitor": 1},
    "first_drive": {"n_device": 1},
    "night_logon_without_habit": {"n_after_hours_logon": 1},
}


@pytest.mark.parametrize("name", RULE_DAYS)
def test_each_rule_fires_on_its_own_day_and_stays_silent_on_a_quiet_one(name):
    hits = baselines.rule_hits(pd.DataFrame([quiet_day(**RULE_DAYS[name]), quiet_day()]))
    assert hits.loc[0, name]
    assert [rule for rule in hits if hits.loc[0, rule]] == [name]
    assert not hits.loc[1].any()


def test_habits_excuse_and_an_unknown_past_proves_nothing():
    excused = pd.DataFrame([
        quiet_day(n_device=1, past_device_days=5),
        quiet_day(n_device=1, past_days=3),  # nobody knows this account yet
        quiet_day(n_after_hours_logon=1, past_after_hours_days=4),  # 4 of 30 days: a habit
        quiet_day(n_file=12, past_files=5),
        quiet_day(n_file=12, past_files=np.nan, past_days=0),
    ])
    assert baselines.rule_hits(excused).sum(axis=1).tolist() == [0, 0, 0, 0, 1]


def test_the_score_of_the_rules_is_the_sum_of_their_points(table):
    assert [rule.name for rule in baselines.RULES] == list(RULE_DAYS)
    model = baselines.fit(table, detector="rules", seed=0)
    days = pd.DataFrame([quiet_day(n_http_leak=1, n_file_exe=1), quiet_day(n_device=1)])
    score, alarm = baselines.scores(model, days)
    assert score.tolist() == [7, 1] and alarm.tolist() == [7, 1]


def test_keyword_sees_leak_and_hacking_sites_only(table):
    model = baselines.fit(table, detector="keyword", seed=0)
    days = pd.DataFrame([quiet_day(n_http_leak=2), quiet_day(n_http_hack=1),
                         quiet_day(n_device=9, n_http_job=50)])
    assert baselines.scores(model, days)[0].tolist() == [2, 1, 0]


# ------------------------------------------------------------------ fitting and predicting

def test_every_detector_hands_over_the_predictions_table(fitted, parts):
    test = parts[2].sample(frac=1, random_state=0)  # any order, any index
    for name, model in fitted.items():
        predictions = baselines.predict(model, test, split="test")
        assert list(predictions.columns) == list(baselines.PREDICTION_COLUMNS)
        assert predictions["window_id"].tolist() == test["window_id"].tolist()
        assert predictions["label"].tolist() == test["risk"].tolist()
        assert set(predictions["risk"]) <= set(RISKS), name
        assert predictions["valid"].all() and np.isfinite(predictions["score"]).all()
        assert predictions["features"].map(len).sum() == 0
        assert predictions["evidence"].map(len).sum() == 0
        assert (predictions["seconds"] > 0).all() and predictions["seconds"].nunique() == 1
        assert (predictions["detector"] == name).all() and (predictions["split"] == "test").all()


def test_each_detector_ranks_malicious_days_above_chance_on_unseen_users(fitted, parts):
    test = parts[2]
    base = test["malicious"].mean()
    area = {name: average_precision_score(test["malicious"], baselines.scores(model, test)[0])
            for name, model in fitted.items()}
    assert min(area.values()) > 3 * base, area
    assert area["gradient_boosting"] > 0.8 and area["logistic_regression"] > 0.8


def permuted(parts, fit_and_score):
    """Audit rows, by detector, of labels dealt anew among training and held-out days."""
    train, dev, test = parts
    opened = pd.concat([train.assign(split="train"), dev.assign(split="dev"),
                        test.assign(split="dev")])
    rows = splits._permuted_labels(opened, 0, {
        name: functools.partial(fit_and_score, detector=name, seed=0)
        for name in baselines.DETECTORS})
    return {row["check"].rpartition(" ")[2]: row for row in rows}


def test_dealt_labels_bring_every_detector_to_chance_within_four_standard_errors(parts):
    rows = permuted(parts, baselines.fit_and_score)
    assert {name: row["outcome"] for name, row in rows.items()} == dict.fromkeys(
        baselines.DETECTORS, "passed")
    assert all(0 < row["limit"] < 0.15 for row in rows.values())  # narrow enough to find a leak
    assert all(float(row["detail"].rpartition(" ")[2]) > 0.6 for row in rows.values())


def seen_before(train, held_out, *, detector, seed):
    """The twin learns from the held-out days too."""
    return baselines.fit_and_score(pd.concat([train] + 3 * [held_out]), held_out,
                                   detector=detector, seed=seed)


def label_read(train, held_out, *, detector, seed):
    """The twin lets the answer into its score."""
    score = baselines.fit_and_score(train, held_out, detector=detector, seed=seed)
    return score + 0.5 * score.std() * held_out["malicious"].to_numpy(float)


@pytest.mark.parametrize(("leak", "found"), [(seen_before, baselines.SUPERVISED),
                                             (label_read, baselines.DETECTORS)])
def test_a_detector_that_leaks_does_not_come_down_to_chance(parts, leak, found):
    rows = permuted(parts, leak)
    assert {name for name, row in rows.items() if row["outcome"] == "failed"} == set(found)


def test_the_isolation_forest_reads_no_label(parts):
    train, _, test = parts
    blind = train.drop(columns=["risk", "malicious"])
    scores = [baselines.scores(baselines.fit(rows, detector="isolation_forest", seed=0), test)[0]
              for rows in (train, blind)]
    np.testing.assert_array_equal(*scores)


def test_same_seed_same_scores_and_the_seed_is_used(parts):
    train, _, test = parts
    for name in ("isolation_forest", "gradient_boosting"):
        once, again, other = (
            baselines.scores(baselines.fit(train, detector=name, seed=seed), test)[0]
            for seed in (0, 0, 1))
        np.testing.assert_array_equal(once, again)
        if name == "isolation_forest":
            assert (once != other).any()


def test_supervised_scores_are_probabilities_of_malicious_and_of_not_normal(fitted, parts):
    model = fitted["gradient_boosting"]
    score, alarm = baselines.scores(model, parts[2])
    probability = model.estimator.predict_proba(
        parts[2][list(baselines.FEATURE_COLUMNS)].to_numpy(float))
    classes = list(model.estimator.classes_)
    np.testing.assert_allclose(score, probability[:, classes.index("malicious")])
    np.testing.assert_allclose(alarm, 1 - probability[:, classes.index("normal")], atol=1e-12)


def test_a_training_set_without_suspicious_days_still_gives_a_detector(parts):
    train = parts[0][parts[0]["risk"] != "suspicious"]
    score, alarm = baselines.scores(baselines.fit(train, detector="gradient_boosting", seed=0),
                                    parts[2])
    np.testing.assert_array_equal(score, alarm)


def test_missing_history_is_no_error(fitted, parts):
    test = parts[2].head(20).copy()
    test[list(PAST_FEATURES)] = np.nan
    for model in fitted.values():
        assert np.isfinite(baselines.predict(model, test, split="test")["score"]).all()


# ------------------------------------------------------------------ thresholds

def _macro_f1(labels, score, alarm, lower, upper, weights):
    said = np.select([score >= upper, alarm >= lower], ["malicious", "suspicious"], "normal")
    return f1_score(labels, said, labels=list(RISKS), average="macro", sample_weight=weights,
                    zero_division=0)


@pytest.mark.parametrize("name", ["rules", "gradient_boosting"])
@pytest.mark.parametrize("weighting", ["balanced", "natural"])
def test_no_pair_of_thresholds_beats_the_chosen_one_on_dev(fitted, parts, name, weighting):
    dev = parts[1].sample(120, random_state=1)
    assert dev["risk"].nunique() == 3
    natural = np.where(dev["risk"] == "normal", 20.0, 1.0)
    weights = (1 / dev["risk"].map(dev["risk"].value_counts()).to_numpy(float)
               if weighting == "balanced" else natural)
    model = baselines.fit_thresholds(fitted[name], dev,
                                     weights=natural if weighting == "natural" else "balanced")
    score, alarm = baselines.scores(model, dev)
    labels = dev["risk"].to_numpy(str)
    lower, upper = model.thresholds
    chosen = _macro_f1(labels, score, alarm, lower, upper, weights)
    every = [_macro_f1(labels, score, alarm, low, up, weights)
             for up in [*np.quantile(score, np.linspace(0, 1, 16)), np.inf]
             for low in [*np.quantile(alarm, np.linspace(0, 1, 16)), np.inf]]
    assert chosen >= max(every) - 1e-12
    assert chosen > np.median(every) + 0.05  # an arbitrary pair is not good enough


def test_thresholds_follow_the_weights_they_are_chosen_for(fitted, parts):
    # Half of the unusual days are called normal: the levels overlap in score.
    doubted = (parts[1]["risk"] == "suspicious") & (np.arange(len(parts[1])) % 2 == 0)
    dev = parts[1].assign(risk=parts[1]["risk"].where(~doubted, "normal"))
    heavy = np.where(dev["risk"] == "normal", 1000.0, 1.0)
    balanced = baselines.fit_thresholds(fitted["isolation_forest"], dev)
    natural = baselines.fit_thresholds(balanced, dev, weights=heavy)
    alerts = [(baselines.predict(model, dev, split="dev")["risk"] != "normal").sum()
              for model in (balanced, natural)]
    assert alerts[1] < alerts[0]


# ------------------------------------------------------------------ jitter

def test_jitter_moves_benign_counts_by_at_most_one_and_invents_nothing(table):
    jittered = baselines.jitter_counts(table, seed=0)
    change = (jittered[COUNTS] - table[COUNTS]).to_numpy()
    assert set(np.unique(change)) == {-1, 0, 1}
    benign = ~table["malicious"].to_numpy()
    assert (change[~benign] == 0).all()
    assert ((jittered[COUNTS] > 0) == (table[COUNTS] > 0)).all(axis=None)
    large = (table["n_http"] > 5).to_numpy() & benign
    moved = change[large, COUNTS.index("n_http")]
    assert abs(np.mean(moved == 0) - 1 / 3) < 0.05 and abs(moved.mean()) < 0.06
    others = [name for name in table if name not in COUNTS]
    pd.testing.assert_frame_equal(jittered[others], table[others])
    everyone = baselines.jitter_counts(table, seed=0, rows="all")
    assert (everyone.loc[~benign, COUNTS] != table.loc[~benign, COUNTS]).any(axis=None)
    pd.testing.assert_frame_equal(jittered, baselines.jitter_counts(table, seed=0))
    assert not jittered.equals(baselines.jitter_counts(table, seed=1))


# ------------------------------------------------------------------ hardness

def test_hardness_never_scores_a_row_by_its_own_label():
    table = synthetic_windows(users=24, days=16, insiders=8)
    train_users = [f"U{u:03d}" for u in range(24) if u % 4]
    hardness = baselines.hardness_score(table, train_users, seed=0)
    assert hardness.shape == (len(table),) and np.isfinite(hardness).all()
    assert average_precision_score(table["malicious"], hardness) > 0.5

    def with_labels_of(user):
        changed = table.copy()
        rows = changed["user"] == user
        changed.loc[rows, "malicious"] = ~changed.loc[rows, "malicious"]
        return changed, rows.to_numpy()

    # Labels of an unknown user change nothing at all, those of a training user other rows only.
    changed, _ = with_labels_of("U000")
    np.testing.assert_array_equal(
        baselines.hardness_score(changed, train_users, seed=0), hardness)
    changed = table.assign(malicious=table["malicious"].where(table["user"] != "U009", True))
    inside = baselines.hardness_score(changed, train_users, seed=0)
    own = (table["user"] == "U009").to_numpy()
    assert inside[own].mean() < 0.3  # its days called malicious, yet unknown to their model
    model = baselines.fit(changed.assign(risk=np.where(changed["malicious"], "malicious",
                                                       "normal")),
                          detector="gradient_boosting", seed=0)
    assert baselines.scores(model, changed)[0][own].mean() > 0.6  # the broken twin: not held out


def test_hardness_keeps_an_incident_in_one_fold_and_needs_two():
    table = synthetic_windows(users=24, days=16, insiders=8)
    everyone = sorted(table["user"].unique())
    # The victim U010 shares the incident of U001: their rows are exact twins.
    twin = table[table["user"] == "U001"].assign(user="U010")
    twin["window_id"] = twin["window_id"].str.replace("U001", "U010")
    paired = pd.concat([table[table["user"] != "U010"], twin], ignore_index=True)
    paired.loc[paired["user"].isin(["U001", "U010"]), "malicious"] = True
    hardness = baselines.hardness_score(paired, everyone, seed=0)
    assert hardness[(paired["user"] == "U001").to_numpy()][:10].mean() < 0.5
    apart = paired.assign(incident=paired["incident"].where(paired["user"] != "U010", "other"))
    leaked = baselines.hardness_score(apart, everyone, seed=0)
    assert leaked[(paired["user"] == "U001").to_numpy()][:10].mean() > 0.8
    with pytest.raises(UserError, match="two incidents"):
        baselines.hardness_score(table, ["U001", "U020"], seed=0)


# ------------------------------------------------------------------ refusals

def test_refusals_name_what_is_wrong(fitted, parts):
    train, dev, test = parts
    with pytest.raises(UserError, match="Unknown detector 'forest'"):
        baselines.fit(train, detector="forest", seed=0)
    with pytest.raises(UserError, match="n_device"):
        baselines.fit(train.drop(columns="n_device"), detector="rules", seed=0)
    with pytest.raises(UserError, match="no rows"):
        baselines.fit(train.iloc[:0], detector="isolation_forest", seed=0)
    with pytest.raises(UserError, match="risk"):
        baselines.fit(train[train["risk"] == "normal"], detector="gradient_boosting", seed=0)
    with pytest.raises(UserError, match="critical"):
        baselines.fit(train.assign(risk="critical"), detector="gradient_boosting", seed=0)
    unset = baselines.fit(train, detector="rules", seed=0)
    with pytest.raises(UserError, match="fit_thresholds"):
        baselines.predict(unset, test, split="test")
    with pytest.raises(UserError, match="weights"):
        baselines.fit_thresholds(unset, dev, weights="even")
    with pytest.raises(UserError, match="weights"):
        baselines.fit_thresholds(unset, dev, weights=np.ones(3))
    with pytest.raises(UserError, match="window_id"):
        baselines.predict(fitted["rules"], test.drop(columns="window_id"), split="test")
    with pytest.raises(UserError, match="rows="):
        baselines.jitter_counts(test, seed=0, rows="some")


# ------------------------------------------------------------------ on windows from a release

def test_baselines_run_on_windows_built_from_a_release(windows_table):
    for name in baselines.DETECTORS:
        model = baselines.fit_thresholds(
            baselines.fit(windows_table, detector=name, seed=0), windows_table)
        predictions = baselines.predict(model, windows_table, split="dev")
        assert predictions["window_id"].is_unique and np.isfinite(predictions["score"]).all()
    rules = baselines.rule_hits(windows_table)
    assert rules.loc[windows_table["malicious"].to_numpy()].any(axis=1).mean() > rules.loc[
        ~windows_table["malicious"].to_numpy()].any(axis=1).mean()
