"""Known truth and no giveaway: metadata stay at chance, the optimum is what is claimed.

One crowded release serves most checks: a third of its people are insiders and a third of the
labels are dialled away, so that every log has labelled rows beside unlabelled ones of their kind.
"""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import GroupKFold

from tests.release_files import answer_rows, log_tables, moment, records
from ueba_helpers.data import cert, simulate, windows

CHANCE = 3.3  # standard errors: one honest check in a thousand is further from .5
HISTORY = 14  # of 60 days, so that many are judged
CROWDED = dict(users=360, days=60, insiders=(50, 40, 30), hardness=0.3, label_noise=0.3,
               history_days=HISTORY)
SMALL = dict(users=40, days=60, insiders=(2, 2, 1), web_rate=0.05)


def settings_of(**change):
    arguments = dict(users=160, days=130, insiders=(6, 6, 3), seed=0, hardness=0.3,
                     label_noise=0.0, content="few", start=None, web_rate=0.2)
    return simulate._checked(**{**arguments, **change})


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crowded") / "r4.2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "_REFERENCE_CELLS", 400_000)
        return folder, simulate.simulate(folder, seed=5, web_rate=0.2, **CROWDED)


@pytest.fixture(scope="module")
def tables(release):
    connection = log_tables(release[0])
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def key(release):
    return answer_rows(release[0])


# --- rows: nothing but behaviour gives a label away


def distance_from_chance(texts, labels, groups):
    """Return by how many standard errors a classifier's AUC differs from .5.

    Logistic regression on the tokens of each text, five folds of whole groups. The AUC is the mean
    of the folds', weighted by their pairs; its standard error is that of a rank sum without ties.
    """
    tokens = CountVectorizer(token_pattern=r"\S+", min_df=2, lowercase=False).fit_transform(texts)
    gain, spread, pairs = 0.0, 0.0, 0
    for train, held_out in GroupKFold(5, shuffle=True, random_state=0).split(tokens, groups=groups):
        model = LogisticRegression(C=0.05, max_iter=500, class_weight="balanced")
        model.fit(tokens[train], labels[train])
        truth = labels[held_out]
        ones, zeros = int(truth.sum()), int((~truth).sum())
        auc = roc_auc_score(truth, model.decision_function(tokens[held_out]))
        gain += ones * zeros * (auc - 0.5)
        spread += (ones * zeros) ** 2 * (ones + zeros + 1) / (12 * ones * zeros)
        pairs += ones * zeros
    return gain / spread**0.5


KINDS = {  # rows of one kind: the log, and what its rows have in common
    "logon": ("logon", "true"),
    "device": ("device", "true"),
    "file": ("file", "true"),
    "email": ("email", "true"),
    "job pages": ("http", "url LIKE '%WboUhagvat%'"),
    "other pages": ("http", "url NOT LIKE '%WboUhagvat%'"),
}


def rows_of_kind(tables, key, kind):
    """Return the labelled rows of one kind and up to 20 unlabelled ones each, same accounts."""
    log, condition = KINDS[kind]
    labelled = {cells[0] for rows in key.values() for name, cells in rows if name == log}
    frame = tables.execute(f"""
        SELECT *, row_number() OVER same AS rank, count(*) OVER together AS ties FROM {log}
        WINDOW same AS (PARTITION BY date ORDER BY place), together AS (PARTITION BY date)
        """).df()
    if condition != "true":
        wanted = tables.execute(f"SELECT id FROM {log} WHERE {condition}").df()["id"]
        frame = frame[frame["id"].isin(wanted)]
    frame = frame.assign(labelled=frame["id"].isin(labelled)).sort_values("place")
    mine = frame[frame["who"].isin(frame.loc[frame["labelled"], "who"])]
    others = mine[~mine["labelled"]]
    others = others.sample(min(len(others), 20 * int(mine["labelled"].sum()), 6000),
                           random_state=0)
    chosen = pd.concat([mine[mine["labelled"]], others]).sort_values("place", ignore_index=True)
    return chosen.assign(chance=np.random.default_rng(0).random(len(chosen)))


def tokens_of(row):
    """Everything of a row that is not behaviour: id, second, rank in the second, words, stem.

    How many rows share a second tells the hour, which is behaviour; so the rank is a place from 0
    to 1 that is spread over its share, and a row alone in its second may be anywhere.
    """
    parts = [f"i{k}{sign}" for k, sign in enumerate(row.id) if sign.isalnum()]
    quarter = int(4 * (row.rank - row.chance) / row.ties)
    parts += [f"s{row.date[-2:]}", f"r{quarter}", f"p{row.place % 2}"]
    found = row._asdict()
    if "content" in found:  # the hex header of a file's content says its type: left out
        parts += [f"w{word}" for word in found["content"].split() if word.islower()]
    if "filename" in found:
        parts += [f"f{k}{sign}" for k, sign in enumerate(found["filename"].split(".")[0])]
    if "size" in found:
        parts.append(f"z{found['size'][-1]}")
    if "url" in found and "WboUhagvat" in found["url"]:
        parts.append(f"u{found['url']}")
    return " ".join(parts)


def distance_of_rows(frame):
    texts = [tokens_of(row) for row in frame.itertuples()]
    return distance_from_chance(texts, frame["labelled"].to_numpy(), frame["who"].to_numpy())


LEAST_LABELLED = {"logon": 150, "device": 150, "file": 25, "email": 150, "job pages": 400,
                  "other pages": 100}


@pytest.fixture(scope="module")
def rows(tables, key):
    return {kind: rows_of_kind(tables, key, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_on_metadata_of_rows_stays_at_chance(rows, kind):
    frame = rows[kind]
    ones = int(frame["labelled"].sum())
    assert ones >= LEAST_LABELLED[kind] and (~frame["labelled"]).sum() >= ones / 2
    assert abs(distance_of_rows(frame)) < CHANCE


def test_labelled_rows_of_all_scenarios_are_among_the_classified_ones(rows, key):
    for scenario in (1, 2, 3):
        ids = {(log, cells[0]) for (s, _), rows in key.items() if s == scenario
               for log, cells in rows}
        seen = {(KINDS[kind][0], name) for kind, frame in rows.items()
                for name in frame.loc[frame["labelled"], "id"]}
        assert ids <= seen


LEAKS = {
    "id": lambda f, hit: f.assign(id=np.where(hit, "{Q" + f["id"].str[2:], f["id"])),
    "second": lambda f, hit: f.assign(date=np.where(hit, f["date"].str[:-2] + "37", f["date"])),
    "rank": lambda f, hit: f.assign(rank=np.where(hit, 1, f["rank"]),
                                    ties=np.where(hit, 4, f["ties"])),
    "words": lambda f, hit: f.assign(content=np.where(hit, f["content"] + " irreplaceable",
                                                      f["content"])),
    "file stem": lambda f, hit: f.assign(filename=np.where(hit, "X" + f["filename"].str[1:],
                                                           f["filename"])),
}


@pytest.mark.parametrize(("kind", "leak"), [
    (kind, leak) for kind in KINDS for leak in LEAKS
    if not (leak == "words" and kind in ("logon", "device"))
    and not (leak == "file stem" and kind != "file")
])
def test_the_same_classifier_finds_a_leak_planted_in_half_of_the_labelled_rows(rows, kind, leak):
    frame = rows[kind]
    # of file copies some 30 are labelled: a leak in half of them could hide, one in all cannot
    chosen = np.random.default_rng(1).random(len(frame)) < (1.0 if kind == "file" else 0.5)
    assert distance_of_rows(LEAKS[leak](frame, frame["labelled"] & chosen)) > CHANCE


def tie_distance(rank, ties):
    """Return by how many standard errors the mean place among rows of one second is off."""
    place = (rank - (ties + 1) / 2) / ties
    variance = (ties**2 - 1) / (12 * ties**2)
    return float(place.sum() / np.sqrt(variance.sum()))


@pytest.fixture(scope="module")
def tied(rows):
    """Return rank and ties of the labelled rows that share their second, over all logs."""
    frame = pd.concat([frame[frame["labelled"]] for frame in rows.values()])
    frame = frame[frame["ties"] > 1]
    assert len(frame) > 250
    return frame["rank"].to_numpy(float), frame["ties"].to_numpy(float)


def test_labelled_rows_have_no_place_of_their_own_within_a_second(tied):
    assert abs(tie_distance(*tied)) < CHANCE


@pytest.mark.parametrize("side", ["first", "last"])
def test_labelled_rows_always_first_or_last_in_a_third_of_the_ties_are_noticed(tied, side):
    rank, ties = tied
    planted = np.where(np.arange(len(rank)) % 3 == 0, 1 if side == "first" else ties, rank)
    assert abs(tie_distance(planted, ties)) > CHANCE


# --- people: nothing of who they are gives an insider away


def people(seed):
    """Return one row per account of a release's people files, with what the key makes of it."""
    settings = settings_of(seed=seed, users=360, days=60, insiders=(50, 40, 30))
    cast = simulate._cast(settings, seed)
    names = simulate._Names(settings, cast)
    return settings, cast, names


@pytest.fixture(scope="module")
def accounts(tmp_path_factory):
    parts = []
    for seed in range(8):
        settings, cast, names = people(seed)
        folder = tmp_path_factory.mktemp("people")
        simulate._write_people(folder, settings, cast, names)
        ldap = pd.DataFrame(records(folder / "LDAP" / "2009-12.csv"))
        scores = pd.DataFrame(records(folder / "psychometric.csv"))
        assert (ldap["user_id"] == scores["user_id"]).all()
        frame = pd.concat([ldap, scores[["O", "C", "E", "A", "N"]].astype(int)], axis=1)
        number = {name.decode(): n for n, name in enumerate(names.user)}
        index = frame["user_id"].map(number).to_numpy()
        scenario = np.zeros(settings.users, int)
        for incident in cast.incidents:
            scenario[incident.user] = incident.scenario
        # the president supervises supervisors: with all accounts of a story, who cannot tell one
        kept_out = [i.victim for i in cast.incidents if i.scenario == 3] + [cast.leads[0]]
        parts.append(frame.assign(
            release=seed, position=np.arange(len(frame)), scenario=scenario[index],
            admin=cast.admin[index], victim=np.isin(index, kept_out),
            pc=names.pc[index].astype(str)))
    return pd.concat(parts, ignore_index=True)


def account_tokens(row):
    """Who somebody is, in words: role, unit, names, ids, scores and position in steps."""
    first, *_, last = row.employee_name.split()
    parts = [f"role_{row.role}", f"unit_{row.functional_unit}", f"dept_{row.department}",
             f"first_{first}", f"last_{last}", f"position_{row.position // 24}",
             f"half_{row.position // 180}"]
    parts += [f"id{k}{sign}" for k, sign in enumerate(row.user_id)]
    parts += [f"pc{k}{sign}" for k, sign in enumerate(row.pc[3:])]
    parts += [f"{trait}_{getattr(row, trait) // 5}" for trait in "OCEAN"]
    return " ".join(part.replace(" ", "") for part in parts)


def distance_of_accounts(frame):
    labels = (frame["scenario"] > 0).to_numpy()
    texts = [account_tokens(row) for row in frame.itertuples()]
    return distance_from_chance(texts, labels, frame["release"].to_numpy())


PEERS = {  # scenario 3 is an administrator by its story, and its victim a supervisor
    "scenarios 1 and 2 among everybody else": lambda f: f[(f["scenario"] < 3) & ~f["victim"]],
    "scenario 3 among administrators": lambda f: f[f["admin"] & f["scenario"].isin([0, 3])],
}


@pytest.mark.parametrize("group", PEERS)
def test_a_classifier_on_who_people_are_stays_at_chance(accounts, group):
    frame = PEERS[group](accounts)
    assert (frame["scenario"] > 0).sum() >= 200 and (frame["scenario"] == 0).sum() >= 150
    assert abs(distance_of_accounts(frame)) < CHANCE


ACCOUNT_LEAKS = {
    "position": lambda f, hit: f.assign(position=np.where(hit, f["position"] // 4, f["position"])),
    "role": lambda f, hit: f.assign(role=np.where(hit, "Nurse", f["role"])),
    "department": lambda f, hit: f.assign(department=np.where(hit, "2 - Legal", f["department"])),
    "name": lambda f, hit: f.assign(employee_name=np.where(
        hit, "Ada " + f["employee_name"].str.split(n=1).str[1], f["employee_name"])),
    "account": lambda f, hit: f.assign(user_id=np.where(
        hit, f["user_id"].str[:-1] + "7", f["user_id"])),
    "workstation": lambda f, hit: f.assign(pc=np.where(hit, "PC-0" + f["pc"].str[4:], f["pc"])),
    "psychometrics": lambda f, hit: f.assign(N=np.where(hit, 49, f["N"])),
}


@pytest.mark.parametrize("group", PEERS)
@pytest.mark.parametrize("leak", ACCOUNT_LEAKS)
def test_the_same_classifier_finds_a_leak_planted_in_half_of_the_insiders(accounts, group, leak):
    frame = PEERS[group](accounts)
    chosen = np.random.default_rng(1).random(len(frame)) < 0.5
    assert distance_of_accounts(ACCOUNT_LEAKS[leak](frame, (frame["scenario"] > 0) & chosen)
                                ) > CHANCE


def shapes(urls):
    """Return the shapes of URLs, host aside: letters by case, runs of digits as one."""
    paths = [url.split("/", 3)[3].rpartition(".")[0] for url in urls]
    return {re.sub("[a-z]+", "a", re.sub("[A-Z]", "A", re.sub("[0-9]+", "9", path)))
            for path in paths}


def test_what_a_page_is_about_does_not_change_the_shape_of_its_url(tables):
    urls = [row[0] for row in tables.execute("SELECT DISTINCT url FROM http").fetchall()]
    of = {}
    for url in urls:
        of.setdefault(cert.web_category(url), []).append(url)
    everyday = shapes(of["other"])
    assert len(everyday) == 1
    for category in ("job", "leak", "hack", "cloud", "news"):
        assert shapes(of[category]) == everyday, category
    renamed = [url.replace("Job_Hunting", "JobHunting") for url in of["job"]]
    assert shapes(renamed) != everyday, "the twin: a topic without its underscore"


def test_only_the_two_stated_sites_name_a_scenario(tmp_path):
    folder = tmp_path / "easy"
    simulate.simulate(folder, hardness=0.0, seed=1, **SMALL)
    labelled = "".join(path.read_text() for path in (folder / "answers").glob("r4.2-*/*.csv"))
    visitors = {"leak": set(), "hack": set()}
    for line in (folder / "http.csv").read_text().splitlines()[1:]:
        cells = line.split(",")
        category = cert.web_category(cells[4])
        if category in visitors:
            visitors[category].add(cells[0] in labelled)
    assert visitors == {"leak": {True}, "hack": {True}}


# --- truth: causes, and the days that count


def test_causes_name_scenarios_and_many_innocent_reasons(release, key):
    folder, summary = release
    rows = records(folder / "truth" / "causes.csv")
    causes = Counter(row["cause"] for row in rows)
    assert {"night_work", "drive_backup", "job_seeker", "admin_roaming", "shared_workstation",
            "mass_mail", "deadline", *simulate.SCENARIOS} <= set(causes)
    assert {row["deviation"] for row in rows} <= set(simulate.DEVIATIONS)
    insiders = {user for _, user in key}
    victims = {row[2] for rows in key.values() for _, row in rows}
    assert {r["user"] for r in rows if r["cause"].startswith("scenario")} <= insiders | victims
    assert 0.02 <= summary["optimal"]["rare_share_of_benign_days"] <= 0.06


@pytest.fixture(scope="module")
def optimal(release, key):
    """Return truth/optimal.csv with `malicious`, from the key; innocent replies do not count."""
    frame = pd.DataFrame(records(release[0] / "truth" / "optimal.csv"))
    logs, own = {}, set()
    for (_, insider), rows in key.items():
        for log, cells in rows:
            day = cells[2], moment(cells).date().isoformat()
            logs.setdefault(day, set()).add(log)  # a supervisor may be in two incidents on a day
            own |= {day} if day[0] == insider else set()
    labelled = set(logs)
    mail_only = {day for day, kinds in logs.items() if kinds == {"email"} and day not in own}
    pairs = list(zip(frame["user"], frame["day"], strict=True))
    return frame.assign(malicious=[pair in labelled - mail_only for pair in pairs],
                        p_malicious=frame["p_malicious"].astype(float),
                        counted=frame["counted"] == "1")


@pytest.fixture(scope="module")
def built(release, tmp_path_factory):
    """Return the windows of the crowded release."""
    home = tmp_path_factory.mktemp("built")
    cert.ingest(release[0], home / "store", threads=1)
    return windows.read(windows.build(home / "store", home / "windows", threads=1,
                                      history_days=HISTORY))


def uncounted(optimal, built):
    """Return which account-days each side leaves out: (by the truth, by the windows)."""
    there = built[built["precursor"] | built["ignore"]]
    here = optimal[~optimal["counted"]]
    return set(here["user"] + "_" + here["day"]), set(there["window_id"])


def test_the_optimum_counts_the_days_that_the_windows_count(optimal, built):
    here, there = uncounted(optimal, built)
    assert here == there
    assert built["precursor"].sum() > 200 and built["ignore"].sum() > 20
    malicious = built[built["malicious"] & ~built["ignore"]]
    early = set(built.loc[~built["full_history"], "window_id"])
    assert set(malicious["window_id"]) == set(
        (optimal["user"] + "_" + optimal["day"])[optimal["malicious"]]) - early


def test_counting_by_the_story_or_everything_differs_from_the_windows(release, optimal, built):
    causes = records(release[0] / "truth" / "causes.csv")
    story = {row["user"] + "_" + row["day"] for row in causes
             if row["cause"].startswith("scenario")}
    name = optimal["user"] + "_" + optimal["day"]
    known = optimal["user"].groupby(optimal["user"]).cumcount()
    enough = known >= HISTORY
    for counted in (enough & (optimal["malicious"] | ~name.isin(story)), enough,
                    optimal["counted"] | (known == HISTORY - 1)):  # a day of history less
        here, there = uncounted(optimal.assign(counted=counted), built)
        assert len(here ^ there) > 30


def test_without_label_noise_no_incident_goes_on_after_its_last_label():
    settings = settings_of(users=360, days=60, insiders=(50, 40, 30))
    noisy = settings_of(users=360, days=60, insiders=(50, 40, 30), label_noise=0.5)
    tails = []
    for some in (settings, noisy):
        cast = simulate._cast(some, 0)
        plan = simulate._plan(some, cast, 0)
        doing = plan.incident_days & ~plan.malicious
        tails.append(sum(
            doing[i.user, np.flatnonzero(plan.malicious[i.user])[-1] + 1 :].sum()
            for i in cast.incidents if i.scenario == 2))
    assert tails[0] == 0 < tails[1]


# --- truth: the claim of the optimal rule


def macro(truth, lower, said):
    """Macro-F1 by scikit-learn from booleans: malicious, else suspicious where `lower`."""
    levels = [np.where(malicious, 2, lower.astype(int)) for malicious in (truth, said)]
    return f1_score(*levels, labels=[0, 1, 2], average="macro")


def macro_and_error(truth, lower, said, account, resamples=300):
    """Return macro-F1 and its standard error by a bootstrap over accounts."""
    account = np.unique(account, return_inverse=True)[1]
    n = account.max() + 1
    tables = np.zeros((n, 3, 3))  # one confusion matrix an account
    np.add.at(tables, (account, np.where(truth, 2, lower.astype(int)),
                       np.where(said, 2, lower.astype(int))), 1)

    def score(table):
        return np.mean(2 * table.diagonal() / (table.sum(axis=0) + table.sum(axis=1)))

    rng = np.random.default_rng(0)
    scores = [score(tables[rng.integers(0, n, n)].sum(axis=0)) for _ in range(resamples)]
    got = macro(truth, lower, said)
    assert got == pytest.approx(score(tables.sum(axis=0)))
    return got, float(np.std(scores))


def test_the_release_reaches_the_claim(release, optimal):
    claim = release[1]["optimal"]
    frame = optimal[optimal["counted"]]
    truth, account = frame["malicious"].to_numpy(), frame["user"].to_numpy()
    lower = frame["lower_risk"].to_numpy() == "suspicious"
    said = frame["p_malicious"].to_numpy() >= claim["threshold"]
    assert list(np.where(said, "malicious", frame["lower_risk"])) == list(frame["optimal_risk"])
    low, high = claim["macro_f1_interval"]
    assert low < claim["macro_f1"] < high
    got, error = macro_and_error(truth, lower, said, account)
    limit = 3 * np.hypot(error, (high - low) / 3.92)
    assert abs(got - claim["macro_f1"]) < limit < 0.08
    assert 0.8 < frame["p_malicious"].sum() / truth.sum() < 1.25, "calibrated in the large"
    shifted = np.roll(said, 1)
    assert abs(macro(truth, lower, shifted) - claim["macro_f1"]) > limit
    strict = frame["p_malicious"].to_numpy() >= 0.9
    assert abs(macro(truth, lower, strict) - claim["macro_f1"]) > limit


def populations(settings, seeds):
    """Return the counted account-days of other populations: (sample, lower risk)."""
    samples = []
    for seed in seeds:
        cast = simulate._cast(settings, seed)
        samples.append(simulate._observed(settings, cast, simulate._plan(settings, cast, seed)))
    return simulate._Sample.joined(samples)


@pytest.fixture(scope="module")
def fresh():
    """Return settings, the optimum from 16 populations, and 16 fresh populations."""
    settings = settings_of()
    return settings, simulate._optimum(settings, range(100, 116)), populations(
        settings, range(200, 216))


def off(claim, interval, sample, said):
    """Return by how many standard errors fresh data miss a claim."""
    got, error = macro_and_error(sample.malicious, sample.rare, said, sample.account)
    return (got - claim) / np.hypot(error, (interval[1] - interval[0]) / 3.92)


def test_fresh_populations_reach_the_claim(fresh):
    _, optimum, sample = fresh
    said = optimum.rule(sample.levels) >= optimum.threshold
    claim = optimum.claim
    assert claim["reference_account_days"] < len(sample.malicious) / 3
    assert abs(off(claim["macro_f1"], claim["macro_f1_interval"], sample, said)) < 3


def test_a_claim_made_on_the_populations_that_were_fitted_is_noticed(fresh):
    settings, _, sample = fresh
    seen = populations(settings, range(100, 104))
    rule = simulate._Frequencies(seen.levels, seen.malicious)
    chance = rule(seen.levels)
    grid = np.arange(0.05, 0.96, 0.025)
    tallies = [simulate._tallies(seen, chance >= cut) for cut in grid]
    claims = [float(simulate._macro_f1(table.sum(axis=0))) for table in tallies]
    best = int(np.argmax(claims))
    interval = simulate._interval(tallies[best], np.random.default_rng(0))
    said = rule(sample.levels) >= grid[best]
    assert off(claims[best], interval, sample, said) < -3


def test_the_interval_holds_the_mean_of_similar_populations(fresh):
    settings, optimum, sample = fresh
    said = optimum.rule(sample.levels) >= optimum.threshold
    tallies = simulate._tallies(sample, said)
    low, high = simulate._interval(tallies, np.random.default_rng(0))
    whole = float(simulate._macro_f1(tallies.sum(axis=0)))
    assert whole == pytest.approx(macro(sample.malicious, sample.rare, said))
    by_population = simulate._macro_f1(tallies.reshape(16, settings.users, 3, 3).sum(axis=1))
    spread = float(by_population.std(ddof=1)) / 4  # of a mean of 16, another way to the same width
    assert low < whole < high
    assert 0.5 < (high - low) / 3.92 / spread < 2


def chance_of_second_days(blind):
    """Return p_malicious of scenario 3's second days of insiders, and ROC-AUC against benign days.

    `blind` hides who stays on after the own day's end.
    """
    settings = settings_of(days=100, insiders=(0, 0, 13))

    def days(seeds):
        for seed in seeds:
            cast = simulate._cast(settings, seed)
            plan = simulate._plan(settings, cast, seed)
            if blind:
                unseen = np.zeros_like(plan.counts["stays_until"])
                plan = replace(plan, counts={**plan.counts, "stays_until": unseen})
            second = np.zeros(plan.present.shape, bool)
            for incident in cast.incidents:
                second[incident.user, incident.end] = True
            levels, _ = simulate._visible_cells(settings, plan)
            chosen = simulate._counted(settings, cast, plan)
            yield levels[:, chosen], plan.malicious[chosen], second[chosen]

    levels, malicious, _ = (np.concatenate(part, axis=-1)
                            for part in zip(*days(range(8)), strict=True))
    rule = simulate._Frequencies(levels, malicious)
    levels, malicious, second = (np.concatenate(part, axis=-1)
                                 for part in zip(*days(range(50, 54)), strict=True))
    chance, asked = rule(levels), second | ~malicious
    return np.median(chance[second]), roc_auc_score(second[asked], chance[asked])


def test_the_best_rule_sees_who_stays_on_to_use_another_account():
    chance, area = chance_of_second_days(blind=False)
    assert chance > 0.5 and area > 0.9
    chance, area = chance_of_second_days(blind=True)
    assert chance < 0.1 and area < 0.8, "the twin: nothing else tells such a day"


def surely_lower(one, other):
    """Is a claim lower than another, intervals apart?"""
    return one["macro_f1_interval"][1] < other["macro_f1_interval"][0]


@pytest.fixture(scope="module")
def claims():
    """Return claims by dial; the insiders are many, so that the intervals are narrow."""
    def claim(first=0, **dials):
        settings = settings_of(days=100, insiders=(20, 20, 10), **dials)
        return simulate._optimum(settings, range(first, first + 20)).claim

    return {
        "as it is": claim(), "again": claim(first=50), "easy": claim(hardness=0.0),
        "hard": claim(hardness=1.0), "noisy": claim(label_noise=0.5),
        "noisier": claim(label_noise=0.9),
    }


@pytest.mark.parametrize(("lower", "higher"), [
    ("hard", "as it is"), ("as it is", "easy"), ("noisy", "as it is"), ("noisier", "noisy"),
])
def test_hardness_and_label_noise_lower_the_claim(claims, lower, higher):
    assert surely_lower(claims[lower], claims[higher])
    assert not surely_lower(claims[higher], claims[lower])


def test_the_same_dials_with_other_people_do_not(claims):
    assert not surely_lower(claims["again"], claims["as it is"])
    assert not surely_lower(claims["as it is"], claims["again"])


def test_label_noise_takes_labels_away_and_hides_no_insider():
    def plans(noise):
        settings = settings_of(users=200, insiders=(8, 8, 4), label_noise=noise)
        for seed in range(4):
            cast = simulate._cast(settings, seed)
            yield cast, simulate._plan(settings, cast, seed)

    clean = sum(plan.malicious.sum() for _, plan in plans(0.0))
    noisy = list(plans(0.5))
    assert 0.4 < sum(plan.malicious.sum() for _, plan in noisy) / clean < 0.7
    for cast, plan in noisy:
        assert all(plan.malicious[incident.user].any() for incident in cast.incidents)


def test_frequencies_of_cells_are_shrunk_towards_the_coarser_cell():
    levels = np.array([[0, 0, 0, 0], [0, 0, 1, 1]])
    rule = simulate._Frequencies(levels, np.array([True, True, False, False]))
    w = simulate._BACKOFF
    assert rule(levels)[[0, 2]] == pytest.approx([(2 + 0.5 * w) / (2 + w), 0.5 * w / (2 + w)])
    assert rule(np.array([[0], [9]])) == pytest.approx([0.5])
