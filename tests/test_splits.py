"""Splits, samples and leakage audits: by hand, by law, and with planted leaks to be found."""

import functools
import json
import shutil
import zlib

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from ueba_helpers.data import cert, splits, windows
from ueba_helpers.data.windows import (
    BEHAVIOUR_FEATURES,
    PAST_FEATURES,
    RULE_FEATURES,
    WEEK_FEATURES,
)
from ueba_helpers.errors import UserError
from ueba_helpers.study import stages
from ueba_helpers.study.config import profile
from ueba_helpers.task import baselines

NUMBERS = (*BEHAVIOUR_FEATURES, *PAST_FEATURES, *WEEK_FEATURES, *RULE_FEATURES)


def accounts(benign=100, per_scenario=(8, 8, 8)):
    """A users table: insiders of three scenarios, each third one's victim, benign accounts."""
    rows, number = [], 0
    for scenario, count in enumerate(per_scenario, start=1):
        for _ in range(count):
            insider = f"INS{number:04d}"
            rows.append((insider, insider, scenario))
            if scenario == 3:
                rows.append((f"VIC{number:04d}", insider, 3))
            number += 1
    rows += [(f"BEN{i:04d}", None, 0) for i in range(benign)]
    return pd.DataFrame(rows, columns=["user", "incident", "scenario"])


def days_of(users, *, days=40, seed=0):
    """A windows table: malicious days show in `n_http_job`, suspicious ones in `n_device`."""
    rng = np.random.default_rng(seed)
    first = users.drop_duplicates("user").reset_index(drop=True)
    n = len(first) * days
    who = np.repeat(np.arange(len(first)), days)
    table = pd.DataFrame(rng.gamma(2.0, 1.0, (n, len(NUMBERS))), columns=list(NUMBERS))
    table["user"] = first["user"].to_numpy()[who]
    day = np.tile(np.arange(days), len(first))
    table["day"] = (pd.Timestamp("2010-03-01") + pd.to_timedelta(day, unit="D")).date
    table["window_id"] = table["user"] + "_" + table["day"].astype(str)
    table["weekday"] = pd.to_datetime(table["day"]).dt.day_of_week
    incident = first["incident"].to_numpy(object)[who]
    length = np.where(first["scenario"] == 2, 8, 2)[who]
    start = np.repeat([20 + zlib.crc32(str(name).encode()) % 11 for name in incident[::days]], days)
    known = pd.notna(incident)
    table["malicious"] = known & (day >= start) & (day < start + length)
    table["incident"] = np.where(table["malicious"], incident, None)
    table["scenario"] = np.where(table["malicious"], first["scenario"].to_numpy()[who], 0)
    table["precursor"] = known & (day == start - 1)
    table["malicious_insider"] = table["malicious"] & (table["user"] == table["incident"])
    table["ignore"] = table["malicious"] & table["user"].str.startswith("VIC") & (day > start)
    odd = rng.random(n) < 0.04
    table["n_http_job"] += 3.0 * table["malicious"]
    table["n_device"] += 9.0 * odd
    table["risk"] = np.where(table["malicious"], "malicious",
                             np.where(odd, "suspicious", "normal"))
    table["role"], table["department"], table["ldap_month"] = "Clerk", "", "2010-02"
    table["past_days"] = np.minimum(day, 12)
    table["enough_history"] = True
    table["full_history"] = table["past_days"] == 12
    table["ignore"] |= ~table["full_history"]
    return table


@pytest.fixture(scope="module")
def people():
    return accounts()


@pytest.fixture(scope="module")
def assignment(people):
    return splits.assign(people, seed=3)


@pytest.fixture(scope="module")
def table(people, assignment):
    return days_of(people).merge(assignment, on="user", validate="many_to_one")


# ---------------------------------------------------------------------------------------------
# Assignment


def test_every_account_has_one_split_and_one_part(people, assignment):
    assert sorted(assignment["user"]) == sorted(set(people["user"]))
    assert set(assignment["split"]) == {"train", "dev", "test"}
    pairs = set(assignment[["split", "part"]].itertuples(index=False, name=None))
    assert pairs == {("train", "cold"), ("train", "rl"), ("dev", "dev"), ("test", "test")}


def part_of_incidents(people, assignment):
    joined = people[people["incident"].notna()].merge(assignment, on="user")
    return joined.groupby("incident")["part"].nunique()


def test_an_insider_and_the_abused_account_stay_together(people, assignment):
    assert (part_of_incidents(people, assignment) == 1).all()
    # The twin deals accounts one by one.
    rng = np.random.default_rng(0)
    twin = assignment.assign(part=rng.permutation(assignment["part"]))
    assert not (part_of_incidents(people, twin) == 1).all()


def test_accounts_joined_through_two_incidents_stay_together():
    users = pd.DataFrame({
        "user": ["A", "V", "V", "B", "W", "B", *[f"X{i}" for i in range(20)]],
        "incident": ["A", "A", "B", "B", "C", "C", *[None] * 20],
        "scenario": [1, 1, 3, 3, 3, 3, *[0] * 20],
    })
    for seed in range(8):
        parts = splits.assign(users, seed=seed).set_index("user")["part"]
        assert parts[["A", "V", "B", "W"]].nunique() == 1


def test_each_scenario_is_dealt_by_the_stated_shares(people):
    counts = []
    for seed in range(5):
        joined = people[people["user"].str.startswith("INS")].merge(
            splits.assign(people, seed=seed), on="user")
        counts.append(joined.groupby(["scenario", "part"]).size())
    for got in counts:
        for scenario in (1, 2, 3):
            assert got[scenario].to_dict() == {"cold": 2, "rl": 3, "dev": 1, "test": 2}
    benign = people[people["incident"].isna()].merge(splits.assign(people, seed=0), on="user")
    assert benign["part"].value_counts().to_dict() == {"cold": 25, "rl": 35, "dev": 15, "test": 25}


def test_the_seed_decides_and_the_order_of_rows_does_not(people, assignment):
    shuffled = people.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(splits.assign(shuffled, seed=3), assignment)
    assert not splits.assign(people, seed=4).equals(assignment)


@pytest.mark.parametrize("shares", [
    (("cold", 0.5), ("test", 0.4)), (("cold", 0.5), ("cold", 0.5)),
    (("cold", 1.2), ("test", -0.2)),
])
def test_shares_that_are_no_shares_are_refused(people, shares):
    with pytest.raises(UserError, match="shares"):
        splits.assign(people, seed=0, shares=shares)
    with pytest.raises(UserError, match="empty"):
        splits.assign(people.head(0), seed=0)


def test_few_incidents_of_a_scenario_are_called_descriptive(table, assignment):
    counted = splits.scenario_table(table, assignment).set_index(["split", "scenario"])
    assert counted.loc[("train", 2), "incidents"] == 5 and not counted.loc[
        ("train", 2), "descriptive"]
    assert counted.loc[("dev", 3), "incidents"] == 1 and counted.loc[("dev", 3), "descriptive"]
    assert counted.loc[("dev", 3), "accounts"] == 2  # the insider and the victim
    assert counted["malicious_days"].sum() == table["malicious"].sum()


# ---------------------------------------------------------------------------------------------
# By time


def test_the_time_split_puts_every_day_before_the_cut_in_training_or_dev(table):
    split = splits.by_time(table, cut="2010-03-31")
    days = pd.to_datetime(table["day"])
    assert ((split["split"] == "test") == (days >= "2010-03-31").to_numpy()).all()
    assert ((split["split"] == "dev") == days.between("2010-03-25", "2010-03-30").to_numpy()).all()
    assert (split["window_id"].to_numpy() == table["window_id"].to_numpy()).all()


def test_incidents_on_both_sides_of_the_cut_are_marked(table):
    cut = pd.Timestamp("2010-03-26")
    split = splits.by_time(table, cut=str(cut.date()), dev_share=0)
    marked = table[table["malicious"]]
    late = pd.to_datetime(marked["day"]) >= cut
    both = set(marked.loc[late, "incident"]) & set(marked.loc[~late, "incident"])
    assert 0 < len(both) < marked["incident"].nunique()
    assert (split["straddles"].to_numpy() == table["incident"].isin(both).to_numpy()).all()


def test_the_default_cut_is_new_year_2011_on_the_calendar_of_r42():
    days = pd.date_range("2010-01-02", "2011-05-17").date
    frame = pd.DataFrame({"window_id": days.astype(str), "day": days, "malicious": False,
                          "incident": None})
    split = splits.by_time(frame)
    assert split.loc[split["split"] == "test", "window_id"].min() == "2011-01-01"


@pytest.mark.parametrize("cut", ["2010-03-01", "2011-01-01", "soon"])
def test_a_cut_outside_the_days_is_refused(table, cut):
    with pytest.raises(UserError, match="cut"):
        splits.by_time(table, cut=cut)


# ---------------------------------------------------------------------------------------------
# Training samples


def test_a_balanced_sample_has_equal_classes_and_repeats_only_what_is_rare(table):
    sample = splits.balanced(table, n=600, seed=0, parts=("rl",))
    assert sample["risk"].value_counts().to_dict() == {
        "normal": 200, "suspicious": 200, "malicious": 200}
    assert set(sample["part"]) == {"rl"}
    assert not (sample["precursor"] | sample["ignore"]).any()
    times = sample.groupby(["risk", "window_id"]).size()
    pool = table[(table["part"] == "rl") & ~table["precursor"] & ~table["ignore"]]
    for risk in ("normal", "suspicious", "malicious"):
        available = (pool["risk"] == risk).sum()
        assert len(times[risk]) == min(available, 200)
        assert times[risk].max() - times[risk].min() <= 1
    assert (times["malicious"] > 1).any() and (times["normal"] == 1).all()
    assert sample.groupby("window_id")["repeat"].apply(lambda r: sorted(r) == list(range(len(r)))
                                                       ).all()


def test_malicious_days_are_taken_incident_by_incident(table):
    sample = splits.balanced(table, n=27, seed=0, parts=("rl",))
    incidents = sample.loc[sample["malicious"], "incident"]
    assert len(incidents) == 9 and incidents.nunique() == 9  # nine incidents in the part


def test_the_sample_follows_the_seed_and_not_the_order_of_rows(table):
    first = splits.balanced(table, n=90, seed=1, parts=("cold",))
    again = splits.balanced(table.sample(frac=1, random_state=5), n=90, seed=1, parts=("cold",))
    assert first["window_id"].tolist() == again["window_id"].tolist()
    other = splits.balanced(table, n=90, seed=2, parts=("cold",))
    assert first["window_id"].tolist() != other["window_id"].tolist()
    assert first["risk"].tolist() != sorted(first["risk"])


def test_a_balanced_sample_that_cannot_be_drawn_is_refused(table):
    with pytest.raises(UserError, match="no malicious day"):
        splits.balanced(table[~table["malicious"]], n=9, seed=0, parts=("rl",))
    with pytest.raises(UserError, match="'part'"):
        splits.balanced(table.drop(columns="part"), n=9, seed=0, parts=("rl",))
    with pytest.raises(UserError, match="n=2"):
        splits.balanced(table, n=2, seed=0, parts=("rl",))


# ---------------------------------------------------------------------------------------------
# The evaluation sample


def hardness(table):
    return (table["n_http_job"] + 0.2 * table["n_device"]).to_numpy()


def sampled(table, **changes):
    settings = {"split": "test", "headline_per_class": 20, "n_benign": 150, "seed": 0} | changes
    return splits.evaluation_sample(table, hardness(table), **settings)


def test_the_evaluation_sample_holds_every_malicious_day_and_the_hardest_benign_ones(table):
    sample = sampled(table).set_index("window_id")
    test = table[table["split"] == "test"].set_index("window_id")
    left_out = test["precursor"] | test["ignore"]
    positive = test.index[test["malicious"] & ~left_out]
    assert (sample.loc[positive, "stratum"] == 0).all()
    assert (sample.loc[test.index[left_out & test["full_history"]], "weight_natural"] == 0).all()
    benign = test[~test["malicious"] & ~left_out].assign(score=hardness)
    hardest = benign.nlargest(50, "score").index
    assert (sample.loc[hardest, "weight_natural"] == 1).all()
    assert (sample.loc[hardest, "stratum"] == 1).all()
    assert ((sample["stratum"] > 0) & (sample["weight_natural"] > 0)).sum() == 150
    assert set(sample.index) <= set(test.index[test["full_history"]])


def test_the_weights_restore_the_count_of_benign_days_and_the_base_rate(table):
    test = table[(table["split"] == "test") & ~table["precursor"] & ~table["ignore"]]
    benign = (~test["malicious"]).sum()
    for rate in (0.0029, 0.05):
        sample = sampled(table, base_rate=rate)
        weight = sample.groupby(sample["stratum"] == 0)["weight_natural"].sum()
        assert weight[False] == pytest.approx(benign)
        assert weight[True] / weight.sum() == pytest.approx(rate)
    natural = sampled(table, base_rate=None)
    assert (natural.loc[natural["stratum"] == 0, "weight_natural"] == 1).all()


def test_the_headline_is_balanced_and_free_of_days_nobody_can_judge(table):
    sample = sampled(table).merge(table[["window_id", "risk", "precursor", "ignore"]])
    head = sample[sample["headline"]]
    assert head["risk"].value_counts().to_dict() == {
        "normal": 20, "suspicious": 20, "malicious": 20}
    assert not (head["precursor"] | head["ignore"]).any()
    few = sampled(table, headline_per_class=10_000).merge(table[["window_id", "risk"]])
    assert few.loc[few["headline"], "risk"].value_counts()["malicious"] < 10_000


def test_a_small_split_is_taken_whole_with_weight_one(table):
    sample = sampled(table, n_benign=10**6)
    assert (sample.loc[sample["stratum"] == 1, "weight_natural"] == 1).all()
    assert sample["stratum"].max() == 1


def test_scores_may_come_by_window_id_and_must_be_there_and_finite(table):
    score = pd.Series(hardness(table), index=table["window_id"].to_numpy())
    by_id = splits.evaluation_sample(table, score.sample(frac=1, random_state=0), split="test",
                                     headline_per_class=20, n_benign=150, seed=0)
    pd.testing.assert_frame_equal(by_id, sampled(table))
    with pytest.raises(UserError, match="no score"):
        splits.evaluation_sample(table, score.iloc[5:], split="test", headline_per_class=1,
                                 n_benign=9, seed=0)
    with pytest.raises(UserError, match="finite"):
        splits.evaluation_sample(table, np.full(len(table), np.nan), split="test",
                                 headline_per_class=1, n_benign=9, seed=0)


@pytest.mark.parametrize(("changes", "named"), [
    ({"split": "holdout"}, "holdout"), ({"n_benign": 0}, "n_benign"),
    ({"base_rate": 1.0}, "base_rate"), ({"headline_per_class": -1}, "headline_per_class"),
])
def test_an_impossible_evaluation_sample_is_refused(table, changes, named):
    with pytest.raises(UserError, match=named):
        sampled(table, **changes)


# ---------------------------------------------------------------------------------------------
# Audits: clean data passes, each planted leak is found


DETECTORS = {name: functools.partial(baselines.fit_and_score, detector=name, seed=0)
             for name in ("keyword", "logistic_regression")}


def checks(*arguments, **options):
    return splits.audit(*arguments, **options).set_index("check")


def failed(result):
    return set(result.index[result["outcome"] == "failed"])


@pytest.fixture(scope="module")
def simulated(windows_table, store):
    users = windows.users_table(windows_table)
    assignment = splits.assign(users, seed=0)
    return windows_table, assignment, store


def test_clean_windows_pass_every_audit(table, assignment):
    result = checks(table, assignment, detectors=DETECTORS)
    assert failed(result) == {"account name says nothing",  # INS and VIC do tell
                              "metadata says nothing"}  # and so they do here
    assert set(result["outcome"]) == {"passed", "failed"}
    told = result.loc["permuted labels at chance: logistic_regression", "detail"]
    assert float(told.rpartition(" ")[2]) > 0.8  # true labels can be learned


def test_simulated_windows_pass_the_audits_that_read_the_store(simulated, windows_folder,
                                                                evidence_table):
    table, assignment, store = simulated
    result = checks(table, assignment, store=store, items=evidence_table, max_items=14,
                    manifest=windows.read_manifest(windows_folder))
    names = ["account in one split only", "incident in one split only",
             "no LDAP month of the day or later", "nothing later in a baseline",
             "nothing later in evidence", "labels equal the answer key", "event id says nothing"]
    assert set(result.loc[names, "outcome"]) == {"passed"}, result
    # The fixture fits the deviation levels on everybody: that must show.
    assert failed(result) >= {"deviation levels from training accounts"}


def test_too_few_insiders_are_said_to_be_not_judged(simulated):
    table, assignment, store = simulated
    assert table.loc[table["malicious_insider"], "user"].nunique() <= 5
    result = checks(table, assignment, store=store)
    for name in ("metadata says nothing", "account name says nothing",
                 "role says nothing: scenarios 1 and 2",
                 *(f"weekend says nothing: scenario {k}" for k in (1, 2, 3))):
        assert result.loc[name, "outcome"] == "not judged" and np.isnan(result.loc[name, "got"])
        assert result.loc[name, "detail"].startswith("not judged: fewer than 5")
    lines = splits.complaints(result.reset_index())
    assert any(line.startswith("audit not judged: metadata says nothing (fewer than 5")
               for line in lines)
    assert len(lines) == (result["outcome"] != "passed").sum()


def test_no_audit_but_that_of_the_key_reads_a_label_of_a_test_account(table, assignment):
    told = ["malicious", "malicious_insider", "risk", "scenario", "incident"]
    rng = np.random.default_rng(0)

    def mixed(split):
        twin = table.copy()
        rows = np.flatnonzero((twin["split"] == split) & ~twin["precursor"] & ~twin["ignore"])
        twin.loc[rows, ["malicious", "malicious_insider", "risk"]] = twin.loc[
            rng.permutation(rows), ["malicious", "malicious_insider", "risk"]].to_numpy()
        return twin.astype({"malicious": bool, "malicious_insider": bool})

    assert set(told) <= set(table.columns)
    plain = checks(table, assignment, detectors=DETECTORS)
    pd.testing.assert_frame_equal(checks(mixed("test"), assignment, detectors=DETECTORS), plain)
    assert not checks(mixed("dev"), assignment, detectors=DETECTORS).equals(plain)  # the twin


def test_an_account_in_two_splits_is_found(table, assignment):
    twin = pd.concat([assignment, assignment.head(1).assign(split="test", part="test"),
                      assignment.head(1).assign(split="train", part="rl")])
    assert "account in one split only" in failed(checks(table, twin))


def test_an_account_without_split_is_found(table, assignment):
    assert checks(table, assignment.iloc[3:]).loc["every window assigned", "got"] > 0


def test_an_incident_cut_in_two_is_found(table, assignment):
    twin = assignment.copy()
    victim = twin["user"].str.startswith("VIC")
    insiders = twin["user"].isin(twin.loc[victim, "user"].str.replace("VIC", "INS"))
    twin.loc[victim, ["split", "part"]] = ["test", "test"]
    twin.loc[insiders, ["split", "part"]] = ["train", "rl"]
    result = checks(table, twin)
    assert result.loc["incident in one split only", "got"] == 8
    assert "incident in one split only" in failed(result)


def test_an_ldap_month_of_the_day_itself_is_found(table, assignment):
    late = table["day"].astype(str) >= "2010-04-05"
    twin = table.assign(ldap_month=np.where(late, "2010-04", table["ldap_month"]))
    assert checks(twin, assignment).loc["no LDAP month of the day or later", "got"] == late.sum()
    # The account's first month is no excuse where it is the day's own.
    first = table.assign(ldap_month="2010-03")
    assert checks(first, assignment).loc["no LDAP month of the day or later", "got"] > 0


def test_a_role_from_the_first_month_wherever_it_lies_is_found_twice(
    tmp_path, release, monkeypatch
):
    """The release lacks its first two LDAP months, and the twin reads the first it finds."""
    folder = tmp_path / "release"
    shutil.copytree(release, folder)
    for path in sorted((folder / "LDAP").glob("*.csv"))[:2]:
        path.unlink()
    cert.ingest(folder, tmp_path / "store", threads=1)

    def audited():
        table = windows.behaviour(tmp_path / "store", threads=1)
        return (splits._ldap_months(table)["outcome"],
                splits._rebuilt_days(table, tmp_path / "store", {}, 0)["outcome"])

    assert audited() == ("passed", "passed")
    sql = windows._window_sql
    excuse = ("coalesce(before.{0}, (SELECT arg_min({0}, month) FROM ldap_months AS l "
              "WHERE l.user = d.user){1})")

    def with_excuse(*given):
        return (sql(*given)
                .replace("coalesce(before.role, 'unknown')", excuse.format("role", ", 'unknown'"))
                .replace("before.month AS ldap_month", excuse.format("month", "")
                         + " AS ldap_month"))

    monkeypatch.setattr(windows, "_window_sql", with_excuse)
    assert audited() == ("failed", "failed")


@pytest.mark.parametrize("leak", ["today in the past", "the whole period", "role of tomorrow"])
def test_a_baseline_that_knows_later_events_is_found(simulated, leak):
    table, _, store = simulated
    twin = table.copy()
    if leak == "today in the past":
        twin["past_email"] += 0.01 * (twin["n_email"] - twin["past_email"])
    elif leak == "the whole period":
        twin["past_http"] = twin.groupby("user")["n_http"].transform("mean")
    else:
        twin["role"] = twin["role"] + " (leaves)"
    assert splits._rebuilt_days(twin, store, {}, 0)["outcome"] == "failed"
    assert splits._rebuilt_days(table, store, {}, 0)["outcome"] == "passed"


def test_evidence_that_knows_later_events_is_found(simulated, windows_folder):
    table, _, store = simulated
    manifest = windows.read_manifest(windows_folder)
    shown = table[pd.to_datetime(table["day"]).isin(
        pd.to_datetime(table["day"]).drop_duplicates().sort_values().iloc[[20, 30, 40]])]

    def outcome(items):
        return splits._rebuilt_items(table, items, store, manifest, 14, 0)["outcome"]

    items = windows.evidence(store, shown, max_items=14, threads=1)
    assert outcome(items) == "passed"
    # The twin's habits are those of the whole period: "first time" turns into "usual".
    users = table.groupby("user")
    habits = {past: shown["user"].map(users[today].agg(lambda counts: (counts > 0).sum()))
              for past, today in (("past_device_days", "n_device"), ("past_job_days", "n_http_job"),
                                  ("past_competitor_days", "n_email_competitor"))}
    twin = windows.evidence(store, shown.assign(**habits), max_items=14, threads=1)
    assert outcome(twin) == "failed"


def test_labels_that_miss_days_of_the_key_are_found(simulated):
    table, _, store = simulated
    shifted = table.assign(malicious=table.groupby("user")["malicious"].shift(5, fill_value=False))
    assert splits._key_days(shifted, store)["outcome"] == "failed"
    assert splits._key_days(table, store)["got"] == 0


def seen_in_training(train, held_out):
    """A detector that remembers: it finds held-out days again if training holds them."""
    model = KNeighborsClassifier(1).fit(train[list(NUMBERS)], train["malicious"])
    return model.predict_proba(held_out[list(NUMBERS)])[:, 1]


def test_a_detector_that_sees_held_out_days_in_training_fails_the_permutation(table, assignment):
    held_out = assignment[assignment["split"] == "dev"]
    twin = pd.concat([assignment, held_out.assign(split="train", part="rl")])
    name, detectors = "permuted labels at chance: memory", {"memory": seen_in_training}
    clean = checks(table, assignment, detectors=detectors).loc[name]
    leaky = checks(table, twin, detectors=detectors).loc[name]
    assert clean["outcome"] == "passed" and leaky["outcome"] == "failed" and leaky["got"] > 0.2


def test_without_a_detector_the_permutation_is_not_judged(table, assignment):
    assert checks(table, assignment).loc["permuted labels at chance", "outcome"] == "not judged"


NEUTRAL = {name: f"ACC{i:04d}" for i, name in enumerate(np.random.default_rng(0).permutation(
    accounts()["user"].drop_duplicates().to_numpy()))}


def renamed(table):
    return table.assign(user=table["user"].map(NEUTRAL), incident=table["incident"].map(NEUTRAL))


def test_account_names_that_tell_the_insiders_are_found(table):
    # The made-up names do: INS and VIC are malicious. Neutral names pass.
    named, neutral = (splits._people(rows) for rows in (table, renamed(table)))
    assert splits._account_names(named, 0)["outcome"] == "failed"
    assert splits._account_names(neutral, 0)["outcome"] == "passed"


def judged_metadata(table, **options):
    return splits._metadata(splits._people(table), 0, **{"store": None, "listing": ()} | options)


def test_metadata_that_tell_the_insiders_are_found_one_by_one(table):
    """Role, department, name and the place in the listing, planted in turn; clean ones pass."""
    table = renamed(table)
    insiders = set(table.loc[table["malicious_insider"], "user"])
    users = sorted(set(table["user"]))
    rng = np.random.default_rng(3)
    chance = {user: rng.choice(["Clerk", "Salesman", "Engineer"]) for user in users}
    table["role"] = table["user"].map(chance)
    listing = rng.permutation(users).tolist()
    clean = judged_metadata(table, listing=listing)
    assert clean["outcome"] == "passed", clean
    tell = table["user"].isin(insiders)
    odd = table["role"].where(~tell, "Engineer")
    ordered = sorted(users, key=lambda user: (user not in insiders, user))
    planted = (
        (table.assign(role=odd), listing),
        (table.assign(department=np.where(tell, "3 - Yard", "2 - Office")), listing),
        (table, ordered),
        (table.assign(user=table["user"].where(~tell, "Z" + table["user"].str[1:])), listing),
    )
    for twin, places in planted:
        assert judged_metadata(twin, listing=places)["outcome"] == "failed"


def test_psychometrics_that_tell_the_insiders_are_found(simulated, tmp_path):
    table, _, store = simulated
    # Every account of the small release that ever shows a deviation plays an insider here.
    odd = table.groupby("user")["deviations"].agg(lambda kinds: sum(map(len, kinds)))
    players = set(odd.nlargest(12).index)
    table = table.assign(malicious_insider=table["user"].isin(players), incident=None)
    shutil.copytree(store, tmp_path / "store")
    path = tmp_path / "store" / "psychometric.parquet"
    traits = pd.read_parquet(path)
    clean = judged_metadata(table, store=store)
    traits["N"] = np.where(traits["user"].isin(players), 50, 12).astype(traits["N"].dtype)
    traits["A"] = np.where(traits["user"].isin(players), 10, 40).astype(traits["A"].dtype)
    traits.to_parquet(path)
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    manifest["files"]["psychometric.parquet"] = path.stat().st_size
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    planted = judged_metadata(table, store=tmp_path / "store")
    assert clean["outcome"] == "passed" and planted["outcome"] == "failed"


def test_an_administrator_is_compared_with_administrators(table):
    """Scenario 3 is an administrator's: the role alone is no leak, but it is one elsewhere."""
    table = renamed(table)
    scenario = table[table["malicious_insider"]].groupby("user")["scenario"].max()
    admins = set(scenario.index[scenario == 3]) | set(sorted(set(table["user"]) - set(
        scenario.index))[:6])
    by_definition = table.assign(role=np.where(table["user"].isin(admins), "ITAdmin", "Clerk"))
    assert judged_metadata(by_definition)["outcome"] == "passed"
    elsewhere = by_definition.assign(role=by_definition["role"].replace("ITAdmin", "Nurse"))
    assert judged_metadata(elsewhere)["got"] > judged_metadata(by_definition)["got"] + 0.05


def weekdays(table):
    return [row["outcome"] for row in splits._weekdays(table)]


def test_a_weekday_on_which_one_scenario_begins_is_found(table):
    assert weekdays(table) == ["passed"] * 3
    # As in r4.2, and then worse: all incidents of scenario 3 begin on the same day of the week.
    first = table["incident"].map(table[table["malicious"]].groupby("incident")["day"].min())
    third = (table["scenario"] == 3) & table["malicious"] & (table["day"] == first)
    thursdays = table.assign(weekday=table["weekday"].where(~third, 3))
    assert weekdays(thursdays) == ["passed"] * 3, "prompts do not tell a Thursday from a Monday"
    told = table.assign(weekday=table["weekday"].where(~third, 5))
    assert weekdays(told) == ["passed", "passed", "failed"]


def test_too_few_incidents_to_judge_a_weekday_by_are_said_to_be_so(table):
    kept = ["INS0016", "INS0017", "INS0018", "INS0019"]
    few = table[(table["scenario"] != 3) | table["incident"].isin(kept)]
    assert weekdays(few) == ["passed", "passed", "not judged"]
    assert "fewer than 5" in splits._weekdays(few)[2]["detail"]


def test_roles_that_scenarios_1_and_2_never_have_are_found(table):
    table = renamed(table)
    scenario = table[table["malicious_insider"]].groupby("user")["scenario"].max()
    users = sorted(set(table["user"]) - set(scenario.index[scenario == 3]))
    roles = dict(zip(users, np.random.default_rng(0).permutation(len(users)) % 2, strict=True))
    fair = table.assign(role=table["user"].map(roles).map({0: "Clerk", 1: "Manager"}).fillna(
        "ITAdmin"))
    assert splits._roles(fair, 0)["outcome"] == "passed"
    insider = fair["user"].isin(scenario.index[scenario < 3])
    told = fair.assign(role=fair["role"].where(~insider, "Clerk"))
    assert splits._roles(told, 0)["outcome"] == "failed"


def calendar(table):
    rows = splits._calendar(table)
    assert [row["check"].rpartition(" before ")[2] for row in rows] == [
        "the middle", "the first label"]
    return [row["outcome"] for row in rows], " ".join(row["detail"] for row in rows)


def test_a_number_about_the_past_that_grows_with_the_calendar_is_found(table):
    outcomes, _ = calendar(table)
    assert outcomes == ["passed", "passed"]
    sorted_days = table.sort_values(["user", "day"])
    since_ever = sorted_days.groupby("user")["n_file"].cumsum()
    for name in ("past_pcs", "past_device", "week_files"):
        outcomes, detail = calendar(sorted_days.assign(**{name: since_ever}))
        assert outcomes == ["failed", "failed"] and f"of {name}," in detail
        outcomes, _ = calendar(sorted_days.assign(**{name: 100 - since_ever}))
        assert outcomes == ["failed", "failed"], "one that falls tells as much"


def test_days_without_a_full_history_would_tell_that_they_are_early(table):
    everything = table.assign(ignore=False, past_days=(
        pd.to_datetime(table["day"]) - pd.Timestamp("2010-03-01")).dt.days.clip(upper=30))
    outcomes, detail = calendar(everything)
    assert outcomes == ["failed", "failed"] and "of past_days," in detail


def test_growth_that_few_accounts_show_is_not_judged(table):
    few = [f"BEN000{i}" for i in range(9)]
    grows = table.sort_values(["user", "day"]).assign(past_pcs=np.arange(len(table)))
    assert calendar(grows[grows["user"].isin([*few, "INS0000"])])[0] == ["not judged"] * 2
    enough = [*few, "BEN0009", "INS0000"]
    assert calendar(grows[grows["user"].isin(enough)])[0] == ["failed"] * 2
    assert calendar(table[table["user"].isin(enough)])[0] == ["passed"] * 2


def test_areas_within_accounts_equal_scikit_learns(table):
    few = table[table["user"].isin(["BEN0000", "BEN0001"])].sort_values("window_id")
    few = few.assign(n_file=few["n_file"].round(), flat=1.0)
    later = (pd.to_datetime(few["day"]) >= "2010-03-20").to_numpy()
    areas = splits._areas_within(few["user"], few[["n_file", "n_http", "flat"]], later)
    for user, rows in few.groupby("user"):
        for name in ("n_file", "n_http"):
            expected = roc_auc_score(later[(few["user"] == user).to_numpy()], rows[name])
            assert areas.loc[user, name] == pytest.approx(expected)
    assert areas["flat"].isna().all(), "what never varies tells nothing"


def test_a_day_without_a_full_history_is_neither_trained_nor_judged_on(table):
    short = set(table.loc[~table["full_history"], "window_id"])
    assert len(short) > 1000
    assert not short & set(splits.balanced(table, n=600, seed=0, parts=("rl",))["window_id"])
    sample = sampled(table, n_benign=10**6, headline_per_class=10**6)
    assert not short & set(sample["window_id"])
    benign = table[(table["split"] == "test") & ~table["malicious"] & table["full_history"]
                   & ~table["precursor"]]
    assert sample.loc[sample["stratum"] > 0, "weight_natural"].sum() == len(benign)


def test_training_days_copied_into_the_test_accounts_are_counted(table, assignment):
    twin = table.copy()
    numbers = [name for name in NUMBERS if name in twin]
    source = np.flatnonzero(twin["split"] == "train")[:300]
    target = np.flatnonzero(twin["split"] == "test")[:300]
    twin.loc[target, numbers] = twin.loc[source, numbers].to_numpy()
    row = checks(twin, assignment).loc["near-duplicates across splits"]
    assert row["outcome"] == "failed" and row["detail"].startswith("300 of")
    assert "of 0 on dev 0 malicious" in row["detail"]  # labels of test days are not counted
    assert checks(table, assignment).loc["near-duplicates across splits", "got"] == 0


def test_levels_fitted_on_a_held_out_account_are_found(table, assignment):
    training = assignment.loc[assignment["split"] == "train", "user"].tolist()
    manifest = {"fit": {"users": training}, "settings": {}}
    name = "deviation levels from training accounts"
    assert checks(table, assignment, manifest=manifest).loc[name, "outcome"] == "passed"
    held_out = assignment.loc[assignment["split"] == "dev", "user"].iloc[0]
    manifest = {"fit": {"users": [*training, held_out]}, "settings": {}}
    assert checks(table, assignment, manifest=manifest).loc[name, "got"] == 1


def test_telling_event_ids_are_found():
    rng = np.random.default_rng(0)
    ids = [f"{{{''.join(rng.choice(list('ABC123'), 8))}}}" for _ in range(600)]
    labels = np.arange(600) < 200
    marked = [("{Z" + name[2:]) if flag else name for name, flag in zip(ids, labels, strict=True)]
    for names, outcome in ((ids, "passed"), (marked, "failed")):
        row = splits._guess("event id", splits._characters(names), labels,
                            np.random.default_rng(1), "events")
        assert row["outcome"] == outcome


def test_prepared_data_say_which_audits_failed_or_could_not_be_judged(
    tmp_path, monkeypatch, capsys
):
    asked = {}

    def planted(windows_, assignment, **options):
        asked.update(options)
        return pd.DataFrame([splits._row("clean", 0, 0, ""),
                             splits._row("names", 0.9, 0.6, "ROC-AUC"),
                             splits._cannot_tell("roles", "fewer than 5 insiders")])

    monkeypatch.setattr(splits, "audit", planted)
    home = stages.prepare_data(profile("smoke"), 0, "", str(tmp_path))
    said = ["audit failed: names (ROC-AUC)", "audit not judged: roles (fewer than 5 insiders)"]
    known = json.loads((home / "samples.json").read_text())
    assert known["warnings"] == said
    assert known["audits"] == {"passed": 1, "failed": 1, "not judged": 1}
    assert [line for line in capsys.readouterr().err.splitlines()
            if line.startswith("warning: ")] == [f"warning: {line}" for line in said]
    # Every detector of the study is permuted, the listing and the evidence are there.
    assert set(asked["detectors"]) == set(baselines.DETECTORS)
    assert set(asked["listing"]) >= set(asked["items"]["window_id"].str[:7])
    assert asked["store"] == home / "store" and "fit" in asked["manifest"]
