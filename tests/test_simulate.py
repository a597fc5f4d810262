"""The simulated release: exact formats, honest labels, the same bytes, refusals."""

import re
from collections import Counter, defaultdict
from datetime import datetime, timedelta
from itertools import pairwise

import pytest

from tests.release_files import STAMP, answer_rows, log_tables, moment, one, records
from ueba_helpers.data import cert, simulate
from ueba_helpers.data.files import sha256_of
from ueba_helpers.errors import UserError

USERS, DAYS, INSIDERS = 160, 130, (6, 6, 3)
SMALL = dict(users=40, days=60, insiders=(2, 2, 1), web_rate=0.05)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "_REFERENCE_CELLS", 100_000)
        summary = simulate.simulate(folder, users=USERS, days=DAYS, insiders=INSIDERS, seed=5)
    return folder, summary


@pytest.fixture(scope="module")
def tables(release):
    connection = log_tables(release[0])
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def key(release):
    return answer_rows(release[0])


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
    assert len(insiders - gone) <= 1, "every insider leaves; a file may lag by a month"
    assert gone - insiders, "benign people leave too"
    header, *scores = (folder / "psychometric.csv").read_text().splitlines()
    assert header == "employee_name,user_id,O,C,E,A,N" and len(scores) == USERS
    assert all(re.fullmatch(r"[A-Za-z ]+,[A-Z]{3}\d{4}(,\d\d){5}", line) for line in scores)


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
    rows = records(folder / "answers" / "insiders.csv")
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
    assert summary["history_days"] >= 48
    first = datetime(2010, 1, 2)
    for rows in key.values():
        days = [(moment(row) - first).days for _, row in rows]
        assert summary["history_days"] <= min(days) and max(days) < DAYS


def test_a_full_history_exists_before_the_first_label(release, tables):
    _, summary = release
    past = tables.execute(
        f"SELECT count(*) FILTER (day < DATE '2010-01-02' + {summary['history_days']}) AS n "
        "FROM days GROUP BY who HAVING n > 0").fetchnumpy()["n"]
    assert (past >= 30).mean() > 0.85 and len(past) == USERS


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
        assert all(timedelta(0) < start - m < timedelta(days=14.5) for m in before)
        # a session begun before 07:00 may last beyond it
        assert not [m for (m,) in connects if 8 <= m.hour < 19], user
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
        assert timedelta(days=28) < end - start < timedelta(days=0.75 * 58 + 1)
    assert 0.5 < labelled["http"] / present["http"] < 0.9
    assert 0.2 < labelled["device"] / present["device"] < 0.9


def test_scenario_3_carries_the_supervisors_account(key, release):
    folder, summary = release
    supervisor_of = {}
    people = records(folder / "LDAP" / "2009-12.csv")
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
