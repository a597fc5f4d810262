"""The simulated release: exact formats, r4.2's facts, honest labels, no accidental giveaway."""

import csv
import re
from collections import Counter, defaultdict
from datetime import datetime, timedelta
from itertools import pairwise

import duckdb
import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict

from ueba_helpers.data import cert, simulate
from ueba_helpers.data.files import sha256_of
from ueba_helpers.errors import UserError

USERS, DAYS, INSIDERS = 160, 130, (6, 6, 3)
SMALL = dict(users=40, days=60, insiders=(2, 2, 1), web_rate=0.05)
STAMP = "%m/%d/%Y %H:%M:%S"
ID = r"\{[A-Z]\d[A-Z]\d-[A-Z]\d[A-Z]{2}\d{2}[A-Z]{2}-\d{4}[A-Z]{4}\}"
HEAD = ID + r",(0[1-9]|1[0-2])/[0-3]\d/20\d\d [0-2]\d:[0-5]\d:[0-5]\d,[A-Z]{3}\d{4},PC-\d{4},"
ADDRESS = r"[\w.]+@[\w.]+"
LIST = rf"{ADDRESS}(;{ADDRESS})*"
LINE = {
    "logon": HEAD + r"(Logon|Logoff)",
    "device": HEAD + r"(Connect|Disconnect)",
    "file": HEAD + r"[A-Z0-9]{8}\.(doc|pdf|jpg|zip|txt|exe),([0-9A-F]{2}(-[0-9A-F]{2})+ )?[a-z ]+",
    "email": HEAD + rf"{LIST},({LIST})?,({LIST})?,{ADDRESS},\d+,[0-9],[a-z ]+",
    "http": HEAD + r"http://[\w.-]+/\w+/\w+/[A-Za-z]+\d+\.(php|asp|aspx|htm|html|jsp),[a-z ]+",
}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "r4.2"
    summary = simulate.simulate(folder, users=USERS, days=DAYS, insiders=INSIDERS, seed=5)
    return folder, summary


@pytest.fixture(scope="module")
def tables(release):
    folder, _ = release
    connection = duckdb.connect()
    for log in simulate.LOGS:
        connection.execute(
            f'CREATE TABLE {log} AS SELECT *, "user" AS who, row_number() OVER () AS place, '
            f"strptime(date, '{STAMP}') AS moment FROM read_csv('{folder}/{log}.csv', "
            "header = true, all_varchar = true, quote = '', nullstr = 'NEVER')"
        )
    days = " UNION ALL ".join(f"SELECT who, moment::DATE AS day FROM {log}"
                              for log in simulate.LOGS)
    connection.execute(f"CREATE TABLE days AS SELECT who, day, count(*) AS n FROM ({days}) "
                       "GROUP BY ALL")
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def key(release):
    """Return {(scenario, insider): [(log, row as a list of cells)]} from the answer files."""
    folder, _ = release
    found = {}
    for path in sorted((folder / "answers").glob("r4.2-*/*.csv")):
        _, scenario, user = path.stem.split("-")
        rows = [line.split(",") for line in path.read_text().splitlines()]
        found[int(scenario), user] = [(row[0], row[1:]) for row in rows]
    return found


def one(tables, query):
    return tables.execute(query).fetchone()[0]


def moment(row):
    return datetime.strptime(row[1], STAMP)


# --- formats


@pytest.mark.parametrize("log", simulate.LOGS)
def test_every_line_has_the_exact_format_and_times_never_go_back(release, log):
    folder, summary = release
    pattern, ids, last, lines = re.compile(LINE[log]), set(), "", 0
    with open(folder / f"{log}.csv", encoding="ascii", newline="") as stream:
        assert next(stream) == simulate.HEADERS[log] + "\n"
        for lines, line in enumerate(stream, start=1):
            assert line.endswith("\n")
            if lines % 7 == 1 or log != "http":
                assert pattern.fullmatch(line[:-1]), line
            stamp = line[31:35] + line[25:30] + line[35:44]
            assert stamp >= last
            last = stamp
            ids.add(line[:24])
    assert lines == summary["rows"][log] == len(ids)


@pytest.mark.parametrize(
    "broken",
    [
        "{A1B2-C3DE45FG-6789HIJK},1/2/2010 07:00:00,ABC1234,PC-1234,Logon",
        "{A1B2-C3DE45FG-6789HIJK},01/02/2010 07:00:00,AB1234,PC-1234,Logon",
        "{A1B2-C3DE45FG-67890IJK},01/02/2010 07:00:00,ABC1234,PC-1234,Logon",
        '"{A1B2-C3DE45FG-6789HIJK}",01/02/2010 07:00:00,ABC1234,PC-1234,Logon',
        "{A1B2-C3DE45FG-6789HIJK},01/02/2010 07:00:00,ABC1234,PC-1234,Connect",
    ],
)
def test_the_format_check_rejects_broken_lines(broken):
    assert not re.fullmatch(LINE["logon"], broken)


def test_people_files_name_everybody_and_lose_the_leavers(release, key):
    folder, _ = release
    months = sorted(path.stem for path in (folder / "LDAP").glob("*.csv"))
    assert months == ["2009-12", "2010-01", "2010-02", "2010-03", "2010-04", "2010-05"]
    staff, names = {}, set()
    for month in months:
        with open(folder / "LDAP" / f"{month}.csv", encoding="ascii") as stream:
            assert next(stream) == ("employee_name,user_id,email,role,business_unit,"
                                    "functional_unit,department,team,supervisor\n")
            rows = [line.rstrip("\n").split(",") for line in stream]
        assert {len(row) for row in rows} == {9}
        staff[month] = {row[1]: row for row in rows}
        names |= {row[0] for row in rows}
        assert all(row[2] == row[0].replace(" ", ".") + "@dtaa.com" for row in rows)
        assert all(not row[8] or row[8] in names for row in rows)
    assert len(staff["2009-12"]) == USERS
    for early, late in pairwise(months):
        assert set(staff[late]) <= set(staff[early]), "nobody joins"
        assert all(staff[late][user] == staff[early][user] for user in staff[late])
    insiders = {user for _, user in key}
    for (_, user), rows in key.items():
        own = [moment(row) for _, row in rows]
        assert user in staff[min(own).strftime("%Y-%m")] or min(own).month == max(own).month
    gone = set(staff["2010-01"]) - set(staff["2010-05"])
    assert len(insiders & gone) >= 0.8 * len(insiders)
    assert gone - insiders, "benign people leave too"
    header, *scores = (folder / "psychometric.csv").read_text().splitlines()
    assert header == "employee_name,user_id,O,C,E,A,N" and len(scores) == USERS
    assert all(re.fullmatch(r"[A-Za-z ]+,[A-Z]{3}\d{4}(,\d\d){5}", line) for line in scores)


# --- r4.2's facts


def facts(tables, summary):
    """Return rows (fact, r4.2, lowest, highest, got)."""
    def mode_share(log, condition="true"):
        return one(tables, f"""
            WITH n AS (SELECT who, moment::DATE d, count(*) k FROM {log} WHERE {condition}
                       GROUP BY ALL), m AS (SELECT who, mode(k) usual FROM n GROUP BY who)
            SELECT avg((k = usual)::INT) FROM n JOIN m USING (who)""")

    balance = """SELECT {} FROM (SELECT who, moment::DATE d,
        count(*) FILTER (activity = 'Logon') a, count(*) FILTER (activity = 'Logoff') b
        FROM logon GROUP BY ALL)"""
    per_day = "SELECT avg(k) FROM (SELECT day, count(*) k FROM days WHERE {} GROUP BY day)"
    weekend = "dayofweek(day) IN (0, 6)"
    n_domains = """SELECT count(DISTINCT split_part(x, '@', 2)) FROM (
        SELECT unnest(string_split("to" || ';' || cc || ';' || bcc, ';')) x FROM email
    ) WHERE x <> ''"""
    pcs = "FROM (SELECT who, count(DISTINCT pc) k FROM logon GROUP BY who)"
    shape = "len(string_split(\"to\", ';'))"
    account_days = summary["account_days"]
    return [
        ("events per user-day, median", 110, 100, 120, one(tables, "SELECT median(n) FROM days")),
        ("events per user-day, mean", 98, 88, 108, one(tables, "SELECT avg(n) FROM days")),
        ("events per user-day, most", 225, 150, 260, one(tables, "SELECT max(n) FROM days")),
        ("share active on a weekday", 0.906, 0.85, 0.96,
         one(tables, per_day.format("NOT " + weekend)) / USERS),
        ("share active on a weekend day", 0.048, 0.01, 0.09,
         one(tables, per_day.format(weekend)) / USERS),
        ("logons per user-day", 1.42, 1.25, 1.65,
         one(tables, "SELECT count(*) FROM logon WHERE activity = 'Logon'") / account_days),
        ("days with unequal logons and logoffs", 0.26, 0.21, 0.31,
         one(tables, balance.format("avg((a <> b)::INT)"))),
        ("of these, a logoff missing", 0.99, 0.9, 1.0,
         one(tables, balance.format("avg((a > b)::INT) FILTER (a <> b)"))),
        ("logons before 07:00 or from 19:00", 0.067, 0.04, 0.10,
         one(tables, "SELECT avg((hour(moment) < 7 OR hour(moment) >= 19)::INT) FROM logon "
             "WHERE activity = 'Logon'")),
        ("logons on second 00", 0.71, 0.68, 0.74,
         one(tables, "SELECT avg((second(moment) = 0)::INT) FROM logon "
             "WHERE activity = 'Logon'")),
        ("days at the own http mode", 0.947, 0.90, 0.98, mode_share("http")),
        ("days at the own email mode", 0.88, 0.82, 0.94, mode_share("email")),
        ("days at the own logon mode", 0.81, 0.74, 0.88,
         mode_share("logon", "activity = 'Logon'")),
        ("days at the own device mode", 0.51, 0.38, 0.64, mode_share("device")),
        ("users with one PC", 0.679, 0.55, 0.8, one(tables, f"SELECT avg((k = 1)::INT) {pcs}")),
        ("users who roam", 0.040, 0.02, 0.07, one(tables, f"SELECT avg((k > 50)::INT) {pcs}")),
        ("PCs beyond one a user", 3, 0, 3,
         one(tables, "SELECT count(DISTINCT pc) FROM logon") - USERS),
        ("users who ever use a drive", 0.265, 0.2, 0.36,
         one(tables, "SELECT count(DISTINCT who) FROM device") / USERS),
        ("device events per user-day", 1.23, 0.6, 1.8,
         summary["rows"]["device"] / account_days),
        ("file copies per user-day", 1.35, 0.6, 2.0, summary["rows"]["file"] / account_days),
        ("emails per user-day", 7.96, 7, 9, summary["rows"]["email"] / account_days),
        ("mails from @dtaa.com", 0.62, 0.58, 0.66,
         one(tables, "SELECT avg((\"from\" LIKE '%@dtaa.com')::INT) FROM email")),
        ("mails with cc", 0.38, 0.35, 0.41,
         one(tables, "SELECT avg((cc <> '')::INT) FROM email")),
        ("mails with bcc", 0.16, 0.14, 0.18,
         one(tables, "SELECT avg((bcc <> '')::INT) FROM email")),
        ("most addresses in to", 13, 12, 13, one(tables, f"SELECT max({shape}) FROM email")),
        ("mean size of a mail", 30_000, 27_000, 33_000,
         one(tables, "SELECT avg(size::INT) FROM email")),
        ("recipient domains with dtaa.com", 22, 22, 22, one(tables, n_domains)),
        ("http rows repeated", 0.0022, 0.001, 0.004,
         one(tables, "SELECT sum(k - 1) FROM (SELECT count(*) k FROM http GROUP BY who, date, url)"
             ) / summary["rows"]["http"]),
        ("different job pages", 16, 16, 16,
         one(tables, "SELECT count(DISTINCT url) FROM http WHERE url LIKE '%WboUhagvat%'")),
        ("users who ever read job pages", 0.5, 0.3, 0.95,
         one(tables, "SELECT count(DISTINCT who) FROM http WHERE url LIKE '%WboUhagvat%'") / USERS),
    ]


def missed(rows):
    return [fact for fact, _, low, high, got in rows if not low <= got <= high]


def test_marginal_facts_are_r4_2s(release, tables, capsys):
    rows = facts(tables, release[1])
    with capsys.disabled():
        print(f"\n{'fact':40} {'r4.2':>10} {'got':>10}")
        for fact, target, _, _, got in rows:
            print(f"{fact:40} {target:>10.4g} {float(got):>10.4g}")
    assert not missed(rows)


def test_the_facts_table_notices_a_release_that_is_off(release, tables):
    doubled = dict(release[1], account_days=2 * release[1]["account_days"])
    assert {"logons per user-day", "emails per user-day"} <= set(missed(facts(tables, doubled)))


def test_holidays_and_midnight_look_like_r4_2(tables):
    ordinary = one(tables, "SELECT count(*) FROM days WHERE day = DATE '2010-01-20'")
    holiday = one(tables, "SELECT count(*) FROM days WHERE day = DATE '2010-01-18'")
    assert holiday < 0.15 * ordinary
    assert one(tables, "SELECT count(*) FROM logon WHERE activity = 'Logoff' AND "
               "hour(moment) < 3") > 10, "evenings run past midnight for benign people too"


# --- labels


def test_every_labelled_row_stands_in_its_log_word_for_word(release, key):
    folder, summary = release
    wanted = defaultdict(set)
    for rows in key.values():
        for log, row in rows:
            wanted[log].add(",".join(row))
    for log, lines in wanted.items():
        with open(folder / f"{log}.csv", encoding="ascii") as stream:
            found = {line.rstrip("\n") for line in stream} & lines
        assert found == lines
    assert sum(len(rows) for rows in key.values()) == summary["answer_rows"]
    assert Counter(scenario for scenario, _ in key) == dict(zip((1, 2, 3), INSIDERS, strict=True))


def test_insiders_csv_names_the_files_and_keeps_other_releases_apart(release, key):
    folder, _ = release
    with open(folder / "answers" / "insiders.csv", encoding="ascii") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) > len(key) and {row["dataset"] for row in rows} > {"4.2"}
    ours = [row for row in rows if row["dataset"] == "4.2"]
    assert {(int(row["scenario"]), row["user"]) for row in ours} == set(key)
    for row in ours:
        assert row["details"] == f"r4.2-{row['scenario']}-{row['user']}.csv"
        own = sorted(moment(cells) for _, cells in key[int(row["scenario"]), row["user"]])
        assert [datetime.strptime(row[end], STAMP) for end in ("start", "end")] == [
            own[0], own[-1]]


def test_labels_leave_history_before_them_and_stay_inside_the_release(release, key):
    _, summary = release
    assert summary["history_days"] >= 40
    first = datetime(2010, 1, 2)
    for rows in key.values():
        days = [(moment(row) - first).days for _, row in rows]
        assert summary["history_days"] <= min(days) and max(days) < DAYS


def test_scenario_1_begins_at_night_before_its_labels(key, tables):
    for (scenario, user), rows in key.items():
        if scenario != 1:
            continue
        kinds = Counter(log for log, _ in rows)
        assert set(kinds) == {"logon", "device", "http"}
        assert all("wikileaks.org" in row[4] for log, row in rows if log == "http")
        start = min(moment(row) for _, row in rows)
        connects = tables.execute(
            "SELECT moment FROM device WHERE who = ? AND activity = 'Connect'", [user]
        ).fetchall()
        before = [m for (m,) in connects if m < start]
        assert before, "the key misses the first nights"
        assert all(timedelta(days=0.5) < start - m < timedelta(days=14.5) for m in before)
        assert all(m.hour >= 19 or m.hour < 4 for (m,) in connects)
        nights = one(tables, f"SELECT count(*) FROM logon WHERE who = '{user}' AND activity = "
                     f"'Logon' AND hour(moment) >= 19 AND moment < TIMESTAMP '{min(before)}' "
                     "- INTERVAL 1 DAY")
        assert nights <= 2, "evenings were no habit"


def test_scenario_2_is_partly_labelled_and_ends_with_the_drive(key, tables):
    labelled = Counter()
    present = Counter()
    for (scenario, user), rows in key.items():
        if scenario != 2:
            continue
        assert {log for log, _ in rows} <= {"http", "email", "device"}
        assert all("WboUhagvat" in row[4] for log, row in rows if log == "http")
        assert all(any(d in row[4] for d in cert.COMPETITOR_DOMAINS)
                   for log, row in rows if log == "email")
        start, end = min(moment(r) for _, r in rows), max(moment(r) for _, r in rows)
        span = f"who = '{user}' AND moment BETWEEN TIMESTAMP '{start}' AND TIMESTAMP '{end}'"
        labelled.update(log for log, _ in rows)
        present["http"] += one(
            tables, f"SELECT count(*) FROM http WHERE {span} AND url LIKE '%WboUhagvat%'")
        present["device"] += one(tables, f"SELECT count(*) FROM device WHERE {span}")
        drive = [moment(row) for log, row in rows if log == "device"]
        assert min(drive) > start + 0.5 * (end - start), "the drive comes last"
        assert timedelta(days=30) < end - start < timedelta(days=75)
    assert 0.5 < labelled["http"] / present["http"] < 0.9
    assert 0.2 < labelled["device"] / present["device"] < 0.9


def test_scenario_3_carries_the_supervisors_account(key, release):
    folder, summary = release
    supervisor_of = {}
    with open(folder / "LDAP" / "2009-12.csv", encoding="ascii") as stream:
        people = list(csv.DictReader(stream))
    ids = {row["employee_name"]: row["user_id"] for row in people}
    for row in people:
        supervisor_of[row["user_id"]] = ids.get(row["supervisor"])
    replies = 0
    for (scenario, user), rows in key.items():
        if scenario != 3:
            continue
        kinds = Counter(log for log, _ in rows)
        assert (kinds["device"], kinds["file"], kinds["email"]) == (4, 1, 5)
        assert kinds["logon"] in (5, 6), "six, or a logoff is missing as on any day"
        assert 4 <= kinds["http"] <= 6
        assert all(cert.web_category(row[4]) == "hack" for log, row in rows if log == "http")
        assert all(row[4].endswith(".exe") for log, row in rows if log == "file")
        victim = supervisor_of[user]
        others = [(log, row) for log, row in rows if row[2] != user]
        assert Counter(log for log, _ in others) == {"logon": 2, "email": 3}
        mass = [row for log, row in others if log == "email" and row[2] == victim]
        assert len(mass) >= 2 and len(mass[0][4].split(";")) >= 10
        days = sorted({moment(row).date() for _, row in rows})
        assert days[1] - days[0] == timedelta(days=1) and len(days) == 2
        replies += len({row[2] for _, row in others} - {victim})
    assert summary["malicious_account_days"]["scenario_3"] == 3 * INSIDERS[2]


def test_account_days_of_the_key_are_the_planned_ones(key, release):
    counts = Counter()
    for (scenario, insider), rows in key.items():
        pairs = {(row[2], moment(row).date()) for _, row in rows}
        mail_only = {
            pair for pair in pairs if pair[0] != insider
            and {log for log, row in rows if (row[2], moment(row).date()) == pair} == {"email"}
        }
        counts[f"scenario_{scenario}"] += len(pairs - mail_only)
    assert counts == release[1]["malicious_account_days"]


def test_the_release_is_read_back_as_r4_2_without_a_bad_row(tmp_path):
    summary = simulate.simulate(tmp_path / "release", seed=3, **SMALL)
    manifest = cert.ingest(tmp_path / "release", tmp_path / "store")
    assert manifest["release"] == "r4.2" and manifest["rows"]["quarantined"] == 0
    assert {log: got["stored"] for log, got in manifest["logs"].items()} == summary["rows"]
    planned = sum(summary["malicious_account_days"].values())
    assert planned <= manifest["positive_days"]["account"] <= planned + SMALL["insiders"][2]


# --- nothing but behaviour gives a label away


def chance_auc(texts, labels, groups):
    """AUC of a classifier on characters of ids and times and on words, folds by user."""
    counts = CountVectorizer(token_pattern=r"\S+", min_df=3).fit_transform(texts)
    folds = GroupKFold(5)
    model = LogisticRegression(C=0.05, max_iter=300, class_weight="balanced")
    score = cross_val_predict(model, counts, labels, groups=groups, cv=folds,
                              method="predict_proba")[:, 1]
    return roc_auc_score(labels, score)


def metadata(row, place):
    """Everything of a web row that is not behaviour: id letters, second, order, page, words."""
    head, day_second = row[0], row[1][-2:]
    letters = [f"i{k}{sign}" for k, sign in enumerate(head) if sign.isalnum()]
    words = [f"w{word}" for word in row[5].split()]
    return " ".join([*letters, f"s{day_second}", f"p{place % 2}", f"u{row[4]}", *words])


@pytest.fixture(scope="module")
def job_rows(key, tables):
    labelled = {row[0] for (s, _), rows in key.items() if s == 2
                for log, row in rows if log == "http"}
    rows = tables.execute("SELECT id, date, \"user\", pc, url, content, place FROM http "
                          "WHERE url LIKE '%WboUhagvat%'").fetchall()
    labels = np.array([row[0] in labelled for row in rows])
    assert 200 < labels.sum() < len(rows) - 200
    return rows, labels


def test_a_classifier_on_metadata_and_words_stays_at_chance(job_rows):
    rows, labels = job_rows
    texts = [metadata(row, row[6]) for row in rows]
    assert 0.42 < chance_auc(texts, labels, [row[2] for row in rows]) < 0.58


def test_the_same_classifier_finds_a_planted_giveaway(job_rows):
    rows, labels = job_rows
    planted = ["irreplaceable" if label and i % 3 == 0 else "" for i, label in enumerate(labels)]
    texts = [f"{metadata(row, row[6])} {word}" for row, word in zip(rows, planted, strict=True)]
    assert chance_auc(texts, labels, [row[2] for row in rows]) > 0.6


def test_places_among_rows_of_one_second_are_random_for_insiders(key, tables):
    insiders = ",".join(f"'{user}'" for _, user in key)
    share, n = tables.execute(f"""
        SELECT avg((place = first)::INT - 1.0 / k), count(*) FROM (
            SELECT who, place, min(place) OVER w AS first, count(*) OVER w AS k FROM http
            WINDOW w AS (PARTITION BY date))
        WHERE k > 1 AND who IN ({insiders})""").fetchone()
    assert n > 5000 and abs(share) < 4 * 0.5 / n**0.5


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


# --- known truth


def test_causes_name_scenarios_and_many_innocent_reasons(release, key):
    folder, summary = release
    with open(folder / "truth" / "causes.csv", encoding="ascii") as stream:
        rows = list(csv.DictReader(stream))
    causes = Counter(row["cause"] for row in rows)
    assert {"night_work", "drive_backup", "job_seeker", "admin_roaming", "mass_mail", "deadline",
            *simulate.SCENARIOS} <= set(causes)
    assert {row["deviation"] for row in rows} <= set(simulate.DEVIATIONS)
    insiders = {user for _, user in key}
    victims = {row[2] for rows in key.values() for _, row in rows}
    assert {r["user"] for r in rows if r["cause"].startswith("scenario")} <= insiders | victims
    assert 0.03 <= summary["optimal"]["rare_share_of_benign_days"] <= 0.06


def optimum(release, key):
    """Return p_malicious and truth of the account-days the optimum counts."""
    folder, _ = release
    truth = {(row[2], moment(row).date().isoformat()) for rows in key.values() for _, row in rows}
    with open(folder / "truth" / "causes.csv", encoding="ascii") as stream:
        incident = {(r["user"], r["day"]) for r in csv.DictReader(stream)
                    if r["cause"].startswith("scenario")}
    with open(folder / "truth" / "optimal.csv", encoding="ascii") as stream:
        rows = list(csv.DictReader(stream))
    assert [r["day"] for r in rows] == sorted(r["day"] for r in rows)
    seen, p, y = Counter(), [], []
    for row in rows:
        pair = row["user"], row["day"]
        seen[row["user"]] += 1
        if seen[row["user"]] > 10 and (pair in truth or pair not in incident):
            p.append(float(row["p_malicious"]))
            y.append(pair in truth)
    return np.array(p), np.array(y), len(rows)


def f1(said, truth):
    return 2 * np.sum(said & truth) / (said.sum() + truth.sum())


def test_the_optimal_rule_reaches_what_the_simulator_claims(release, key):
    claim = release[1]["optimal"]
    p, y, n = optimum(release, key)
    assert n == release[1]["account_days"]
    assert abs(f1(p >= claim["threshold"], y) - claim["malicious_f1"]) < 0.12
    assert 0.7 < p.sum() / y.sum() < 1.4, "probabilities are calibrated in the large"
    assert 0.75 < claim["macro_f1"] < 0.97
    shifted = np.roll(p, 1)
    assert abs(f1(shifted >= claim["threshold"], y) - claim["malicious_f1"]) > 0.3


def plans(seeds=range(4), **change):
    arguments = dict(users=200, days=120, insiders=(8, 8, 4), hardness=0.3, label_noise=0.0)
    arguments.update(change)
    settings = simulate._checked(
        seed=0, content="few", start=None, web_rate=0.1, **arguments)
    for seed in seeds:
        yield settings, simulate._plan(settings, simulate._cast(settings, seed), seed)


def test_label_noise_takes_labels_away_and_hides_no_insider():
    clean = sum(plan.malicious.sum() for _, plan in plans())
    noisy = [plan for _, plan in plans(label_noise=0.5)]
    assert 0.4 < sum(plan.malicious.sum() for plan in noisy) / clean < 0.7
    assert all(plan.malicious.any(axis=1).sum() >= 20 for plan in noisy)


def test_harder_releases_have_a_lower_ceiling():
    def ceiling(hardness):
        samples = [simulate._observed(*pair) for pair in plans(range(8), hardness=hardness)]
        levels, malicious, rare = (
            np.concatenate(column, axis=-1) for column in zip(*samples, strict=True))
        chance = simulate._Frequencies(levels, malicious)(levels)
        return max(simulate._macro_f1(malicious, rare, chance >= cut)
                   for cut in np.arange(0.1, 0.9, 0.1))

    easy, hard = ceiling(0.0), ceiling(1.0)
    assert hard < easy - 0.05


def test_frequencies_of_cells_are_shrunk_towards_the_coarser_cell():
    levels = np.array([[0, 0, 0, 0], [0, 0, 1, 1]])
    rule = simulate._Frequencies(levels, np.array([True, True, False, False]))
    w = simulate._BACKOFF
    assert rule(levels)[[0, 2]] == pytest.approx([(2 + 0.5 * w) / (2 + w), 0.5 * w / (2 + w)])
    assert rule(np.array([[0], [9]])) == pytest.approx([0.5])


# --- sameness, refusals, atomic output


def digests(folder):
    return {str(p.relative_to(folder)): sha256_of(p) for p in sorted(folder.rglob("*.*"))
            if p.is_file()}


def test_same_arguments_same_bytes_and_another_seed_other_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        simulate.simulate(tmp_path / name, seed=seed, **SMALL)
    first, again, other = (digests(tmp_path / name) for name in "abc")
    assert first == again and len(first) > 15
    assert not set(first.values()) & set(other.values())


def test_web_rate_scales_pages_alone_and_content_full_is_longer(tmp_path):
    low = simulate.simulate(tmp_path / "low", seed=2, **SMALL)["rows"]
    high = simulate.simulate(tmp_path / "high", seed=2, **{**SMALL, "web_rate": 0.2})["rows"]
    simulate.simulate(tmp_path / "full", seed=2, content="full", **SMALL)
    assert 2.5 < high["http"] / low["http"] < 4.5
    assert abs(high["email"] / low["email"] - 1) < 0.05
    sizes = [(tmp_path / name / "http.csv").stat().st_size for name in ("low", "full")]
    assert sizes[1] > 3 * sizes[0]


def test_a_release_without_insiders_is_possible(tmp_path):
    summary = simulate.simulate(tmp_path / "calm", users=20, days=40, insiders=(0, 0, 0),
                                web_rate=0.05)
    assert summary["answer_rows"] == 0
    assert not list((tmp_path / "calm" / "answers").glob("r4.2-*/*.csv"))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("users", dict(users=5)), ("users", dict(users=10**6)), ("users", dict(users=40.0)),
        ("days", dict(days=10)), ("days", dict(days=True)), ("seed", dict(seed=-1)),
        ("hardness", dict(hardness=1.2)), ("hardness", dict(hardness=float("nan"))),
        ("label_noise", dict(label_noise=1.0)), ("content", dict(content="all")),
        ("web_rate", dict(web_rate=0)), ("start", dict(start="2010-13-01")),
        ("start", dict(start=5)), ("insiders", dict(insiders=(30, 30, 30))),
        ("insiders", dict(insiders=(1, 2))), ("insiders", dict(insiders="123")),
        ("insiders[1]", dict(insiders=(1, -1, 1))), ("insiders[2]", dict(insiders=(0, 0, 6))),
    ],
)
def test_impossible_arguments_name_the_field_and_write_nothing(tmp_path, field, change):
    with pytest.raises(UserError, match=re.escape(field)):
        simulate.simulate(tmp_path / "out", **{**SMALL, **change})
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_kept_and_a_finished_one_returned(tmp_path):
    done = simulate.simulate(tmp_path / "out", **SMALL)
    stamp = (tmp_path / "out" / "http.csv").stat().st_mtime_ns
    assert simulate.simulate(tmp_path / "out", **SMALL) == done
    assert (tmp_path / "out" / "http.csv").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="other parameters"):
        simulate.simulate(tmp_path / "out", seed=9, **SMALL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="not a simulation"):
        simulate.simulate(tmp_path / "mine", **SMALL)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_an_interrupted_simulation_leaves_nothing_behind(tmp_path):
    def stop(done, total):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.simulate(tmp_path / "out", progress=stop, **SMALL)
    assert not list(tmp_path.iterdir())
