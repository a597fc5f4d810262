"""Windows: daily behaviour, own past, labels, deviations and evidence, on a hand-made release."""

import json
import os
import shutil
import subprocess
import sys
from datetime import date, datetime, timedelta
from statistics import mean, median

import numpy as np
import pandas as pd
import pytest

from ueba_helpers.data import cert, windows
from ueba_helpers.data.windows import (
    BEHAVIOUR_FEATURES,
    DEVIATION_RULES,
    DEVIATIONS,
    FEATURES,
    PAST_FEATURES,
    RULE_FEATURES,
    WEEK_FEATURES,
)
from ueba_helpers.errors import UserError
from ueba_helpers.task import baselines, prompts

START = date(2010, 3, 1)  # a Monday
HEADERS = {
    "logon": "id,date,user,pc,activity",
    "device": "id,date,user,pc,activity",
    "file": "id,date,user,pc,filename,content",
    "email": "id,date,user,pc,to,cc,bcc,from,size,attachments,content",
    "http": "id,date,user,pc,url,content",
}
LDAP = "employee_name,user_id,email,role,business_unit,functional_unit,department,team,supervisor"


class Release:
    """Rows of a small made-up release; every method adds one row and returns its id."""

    def __init__(self):
        self.rows = {log: [] for log in HEADERS}
        self.answers = {}
        self.roles = {"2010-02": "Clerk"}

    def _add(self, log, user, moment, *cells):
        number = sum(map(len, self.rows.values())) + 1
        name = f"{{A0A0-A0AA00AA-{number:04d}AAAA}}"
        pc = cells[0]
        row = [name, moment.strftime("%m/%d/%Y %H:%M:%S"), user, pc, *map(str, cells[1:])]
        self.rows[log].append((moment, row))
        return log, row

    def logon(self, user, moment, pc="PC-0001", activity="Logon"):
        return self._add("logon", user, moment, pc, activity)

    def drive(self, user, moment, pc="PC-0001", minutes=20):
        connect = self._add("device", user, moment, pc, "Connect")
        self._add("device", user, moment + timedelta(minutes=minutes), pc, "Disconnect")
        return connect

    def copy(self, user, moment, name="AAAA1111.doc", pc="PC-0001"):
        return self._add("file", user, moment, pc, name, "D0-CF words")

    def mail(self, user, moment, to=("Ann.B.Cook@dtaa.com",), attachments=0, pc="PC-0001"):
        return self._add("email", user, moment, pc, ";".join(to), "", "",
                         "Own.E.Name@dtaa.com", 30000, attachments, "words")

    def web(self, user, moment, url="http://google.com/News_today/words/nnnn1.htm", pc="PC-0001"):
        return self._add("http", user, moment, pc, url, "words")

    def label(self, insider, scenario, row):
        self.answers.setdefault((insider, scenario), []).append(row)

    def write(self, folder):
        (folder / "LDAP").mkdir(parents=True)
        for log, rows in self.rows.items():
            lines = [HEADERS[log]] + [",".join(row) for _, row in sorted(rows)]
            if rows:
                (folder / f"{log}.csv").write_text("\n".join(lines) + "\n")
        users = sorted({row[2] for rows in self.rows.values() for _, row in rows})
        for month, role in self.roles.items():
            lines = [LDAP] + [f"Own E Name,{user},Own.{user}@dtaa.com,{role},1,,,,"
                              for user in users]
            (folder / "LDAP" / f"{month}.csv").write_text("\n".join(lines) + "\n")
        lines = ["employee_name,user_id,O,C,E,A,N"] + [f"N,{user},1,2,3,4,5" for user in users]
        (folder / "psychometric.csv").write_text("\n".join(lines) + "\n")
        answers = folder / "answers"
        answers.mkdir()
        lines = ["dataset,scenario,details,user,start,end"]
        for (insider, scenario), rows in self.answers.items():
            name = f"r4.2-{scenario}-{insider}.csv"
            (answers / f"r4.2-{scenario}").mkdir(exist_ok=True)
            text = "\n".join(",".join([log, *row]) for log, row in rows)
            (answers / f"r4.2-{scenario}" / name).write_text(text + "\n")
            days = [row[1] for _, row in rows]
            lines.append(f"4.2,{scenario},{name},{insider},{min(days)},{max(days)}")
        (answers / "insiders.csv").write_text("\n".join(lines) + "\n")
        return folder


def at(day, hour, minute=0):
    return datetime(START.year, START.month, START.day) + timedelta(
        days=day, hours=hour, minutes=minute
    )


LEAK = "http://wikileaks.org/Topic/words/jbeqf1.htm"
JOB = "http://monster.com/Topic/words/WboUhagvat1.htm"
HACK = "http://best-spy-soft.com/Topic/words/jbeqf1.htm"
OUT = ("friend@gmail.com",)
RIVAL = ("someone@boeing.com",)
OWN_PC = {"AAA0001": "PC-0001", "BBB0002": "PC-0002", "CCC0003": "PC-0003", "VVV0004": "PC-0004",
          "ZZZ0005": "PC-0005", "YYY0006": "PC-0006"}


def made_up():
    """Six accounts, 57 days. AAA: scenario 1, BBB: 2, CCC: 3 with victim VVV and replier ZZZ."""
    release = Release()
    release.roles = {"2010-02": "Before", "2010-03": "During", "2010-04": "After"}
    for number, (user, pc) in enumerate(OWN_PC.items()):
        rng = np.random.default_rng([7, number])
        for day in range(57):
            if day % 7 > 4 or (user == "YYY0006" and day in (10, 11)):
                continue
            release.logon(user, at(day, 8, int(rng.integers(0, 40))), pc)
            if rng.random() < 0.7:
                release.logon(user, at(day, 17, int(rng.integers(0, 40))), pc, "Logoff")
            for _ in range(rng.integers(0, 3)):
                release.mail(user, at(day, 9, int(rng.integers(0, 59))), pc=pc)
            for _ in range(rng.integers(1, 5)):
                release.web(user, at(day, 10 + int(rng.integers(0, 6)), 5), pc=pc)
            if user == "YYY0006" and rng.random() < 0.5:
                release.drive(user, at(day, 11), pc)
                for _ in range(rng.integers(0, 4)):
                    release.copy(user, at(day, 11, 3), pc=pc)
    # Scenario 1: two drive nights before the first labelled one, and one far too early.
    for day in (15, 43):
        release.logon("AAA0001", at(day, 22), "PC-0001")
        release.drive("AAA0001", at(day, 22, 10), "PC-0001")
    for day in (45, 46):
        rows = [release.logon("AAA0001", at(day, 22), "PC-0001"),
                release.drive("AAA0001", at(day, 22, 10), "PC-0001"),
                release.web("AAA0001", at(day, 22, 20), LEAK, "PC-0001")]
        for row in rows:
            release.label("AAA0001", 1, row)
    # Scenario 2: labelled job pages and mail, unlabelled drive and job days between and after.
    for day in (36, 37, 42):
        release.label("BBB0002", 2, release.web("BBB0002", at(day, 13), JOB, "PC-0002"))
    release.label("BBB0002", 2, release.mail("BBB0002", at(42, 14), RIVAL, pc="PC-0002"))
    release.web("BBB0002", at(38, 13), JOB, "PC-0002")
    release.drive("BBB0002", at(39, 13), "PC-0002")
    release.drive("BBB0002", at(42, 15), "PC-0002")
    release.mail("BBB0002", at(35, 14), RIVAL, pc="PC-0002")
    release.mail("BBB0002", at(41, 14), RIVAL, pc="PC-0002")
    release.web("BBB0002", at(44, 13), JOB, "PC-0002")
    release.mail("BBB0002", at(45, 14), RIVAL, pc="PC-0002")
    # Scenario 3: a hacking page, next day the supervisor's account; an innocent reply.
    release.label("CCC0003", 3, release.web("CCC0003", at(43, 11), HACK, "PC-0003"))
    release.label("CCC0003", 3, release.logon("CCC0003", at(44, 9), "PC-0004"))
    release.label("CCC0003", 3, release.logon("VVV0004", at(44, 9, 30), "PC-0004"))
    everybody = tuple(f"Ann.{c}.Cook@dtaa.com" for c in "ABCDEFGHIJKL")
    release.label("CCC0003", 3, release.mail("VVV0004", at(44, 9, 40), everybody, pc="PC-0004"))
    release.label("CCC0003", 3, release.mail("ZZZ0005", at(44, 10), pc="PC-0005"))
    # Innocent: a job page and a colleague's PC.
    release.web("YYY0006", at(49, 12), JOB, "PC-0006")
    release.logon("YYY0006", at(50, 12), "PC-0005")
    return release


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The made-up release, its store, windows, and the evidence of every day."""
    folder = tmp_path_factory.mktemp("made_up")
    release = made_up()
    release.write(folder / "release")
    cert.ingest(folder / "release", folder / "store", threads=1, buckets=3)
    windows.build(folder / "store", folder / "windows", deviation_share=0.05, threads=1)
    table = windows.read(folder / "windows")
    items = windows.evidence(folder / "store", table, threads=1)
    return {"folder": folder, "release": release, "store": folder / "store", "table": table,
            "items": items, "out": folder / "windows"}


def row_of(table, user, day):
    found = table[table["window_id"] == f"{user}_{START + timedelta(days=day)}"]
    assert len(found) == 1
    return found.iloc[0]


# ---------------------------------------------------------------------------------------------
# Behaviour and the own past


def test_a_day_counts_its_own_events_and_the_hours_seven_and_nineteen_are_the_border(tmp_path):
    release = Release()
    user = "AAA0001"
    for hour, minute in ((6, 59), (7, 0), (18, 59), (19, 0)):
        release.logon(user, at(0, hour, minute))
        release.web(user, at(0, hour, minute))
    release.logon(user, at(0, 19, 30), activity="Logoff")
    release.drive(user, at(0, 6, 30))
    release.drive(user, at(0, 12), pc="PC-0002")
    release.copy(user, at(0, 12, 5), "AAAA0001.exe")
    release.copy(user, at(0, 12, 5), "AAAA0002.doc")
    release.mail(user, at(0, 10), attachments=2)
    release.mail(user, at(0, 10), (*OUT, "Ann.B.Cook@dtaa.com"), attachments=3)
    release.mail(user, at(0, 10), RIVAL, attachments=4)
    for url in (JOB, JOB, LEAK, HACK, "http://dropbox.com/Topic/words/jbeqf1.htm"):
        release.web(user, at(0, 13), url)
    release.write(tmp_path / "release")
    cert.ingest(tmp_path / "release", tmp_path / "store", threads=1)
    row = windows.behaviour(tmp_path / "store", threads=1).iloc[0]
    expected = dict(
        n_logon=4, n_logoff=1, n_after_hours_logon=2, first_hour=6.5, last_hour=19.5, n_pcs=2,
        n_new_pcs=0, n_device=2, n_device_after_hours=1, n_file=2, n_file_exe=1, n_email=3,
        n_email_external=2, n_email_competitor=1, email_size=90000, attachments=9,
        max_recipients=2, n_http=9, n_http_after_hours=2, n_http_job=2, n_http_leak=1,
        n_http_hack=1, n_http_cloud=1,
    )
    assert set(expected) == set(BEHAVIOUR_FEATURES)
    assert {name: row[name] for name in expected} == expected
    assert row["external_attachments"] == 7
    assert (row["early_logon"], row["late_logon"]) == (6 + 59 / 60, 19.0)


def by_hand(table, *, include_today=False, history_days=30):
    """Past and week columns again, in plain Python from the daily behaviour of the table."""
    rows = []
    for _, days in table.sort_values("day").groupby("user"):
        days = days.to_dict("records")
        for i, today in enumerate(days):
            stop = i + 1 if include_today else i
            past = days[max(0, stop - history_days):stop]
            week = [d for d in days[:stop] if 0 <= (today["day"] - d["day"]).days <= 7]

            def total(name, among):
                return sum(d[name] for d in among)

            def days_with(name, among=past):
                return sum(d[name] > 0 for d in among)

            def average(name, among=past):
                return mean(d[name] for d in among) if among else 0.0

            rows.append(dict(
                window_id=today["window_id"], past_days=len(past),
                past_first_hour=median(d["first_hour"] for d in past) if past else np.nan,
                past_last_hour=median(d["last_hour"] for d in past) if past else np.nan,
                past_device_days=days_with("n_device"), past_files=average("n_file"),
                past_email=average("n_email"), past_email_external=average("n_email_external"),
                past_http=average("n_http"), past_job_days=days_with("n_http_job"),
                past_competitor_days=days_with("n_email_competitor"),
                past_after_hours_days=days_with("n_after_hours_logon"),
                week_device=total("n_device", week), week_files=total("n_file", week),
                week_after_hours=total("n_after_hours_logon", week),
                week_job=total("n_http_job", week),
                week_competitor=total("n_email_competitor", week),
                week_new_pcs=total("n_new_pcs", week),
                past_max_files=max((d["n_file"] for d in past), default=0),
                past_max_recipients=max((d["max_recipients"] for d in past), default=0),
                past_leak_days=days_with("n_http_leak"), past_hack_days=days_with("n_http_hack"),
                past_device=total("n_device", past),
            ))
    return pd.DataFrame(rows).set_index("window_id")


def test_past_and_week_columns_equal_a_plain_python_count_of_strictly_earlier_days(world):
    table = world["table"].set_index("window_id", drop=False)
    expected = by_hand(table)
    got = table.loc[expected.index, list(expected.columns)].astype(float)
    np.testing.assert_allclose(got, expected.astype(float), atol=1e-9)
    missing = set(PAST_FEATURES + WEEK_FEATURES) - set(expected.columns)
    assert missing == {"past_pcs"}

    twin = by_hand(table, include_today=True)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(got, twin.loc[got.index].astype(float), atol=1e-9)


def pcs_by_hand(world, table, history_days):
    """Different PCs of logons and drives on the last `history_days` active days, by window."""
    used = {}
    for log in ("logon", "device"):
        for moment, row in world["release"].rows[log]:
            used.setdefault((row[2], moment.date()), set()).add(row[3])
    found = {}
    for user, days in table.sort_values("day").groupby("user"):
        days = [day.date() for day in pd.to_datetime(days["day"])]
        for i, day in enumerate(days):
            past = days[max(0, i - history_days):i]
            found[f"{user}_{day}"] = len(set().union(*(used.get((user, d), ()) for d in past)))
    return pd.Series(found)


def test_pcs_of_the_past_are_those_of_the_history_and_no_older_ones(world):
    table = windows.behaviour(world["store"], history_days=5, min_history=3, threads=1)
    got = table.set_index("window_id")["past_pcs"]
    expected = pcs_by_hand(world, table, 5)
    assert set(expected) == {0, 1, 2}
    assert (got == expected.reindex(got.index)).all()
    assert row_of(table, "YYY0006", 51)["past_pcs"] == 2
    assert row_of(table, "AAA0001", 56)["past_pcs"] == 1
    everything = pcs_by_hand(world, table, 10**6)
    assert not (got == everything.reindex(got.index)).all(), "the twin: all earlier days"


def test_history_is_the_last_history_days_active_days(world):
    table = windows.behaviour(world["store"], users=["YYY0006"], history_days=5, min_history=3,
                              threads=1)
    expected = by_hand(table, history_days=5)
    got = table.set_index("window_id").loc[expected.index, list(expected.columns)]
    np.testing.assert_allclose(got.astype(float), expected.astype(float), atol=1e-9)
    assert table["past_days"].tolist()[:7] == [0, 1, 2, 3, 4, 5, 5]
    assert table["enough_history"].tolist()[:5] == [False, False, False, True, True]


def test_a_new_workstation_is_one_the_account_never_used_on_an_earlier_day(world):
    table = world["table"]
    assert row_of(table, "YYY0006", 0)["n_new_pcs"] == 0  # nothing to compare with
    assert row_of(table, "YYY0006", 50)["n_new_pcs"] == 1
    assert row_of(table, "YYY0006", 51)["n_new_pcs"] == 0
    assert row_of(table, "YYY0006", 51)["week_new_pcs"] == 1
    assert row_of(table, "CCC0003", 44)["n_new_pcs"] == 1


def test_role_comes_from_a_month_strictly_before_the_day(world):
    table = world["table"]
    march = table[pd.to_datetime(table["day"]).dt.month == 3]
    april = table[pd.to_datetime(table["day"]).dt.month == 4]
    assert set(march["role"]) == {"Before"} and set(march["ldap_month"]) == {"2010-02"}
    assert set(april["role"]) == {"During"} and set(april["ldap_month"]) == {"2010-03"}


@pytest.fixture(scope="module")
def late_ldap(tmp_path_factory):
    """Windows of a release whose first LDAP months are missing: it begins with March 2010."""
    folder = tmp_path_factory.mktemp("late_ldap")
    release = made_up()
    release.roles = {"2010-03": "During", "2010-04": "After"}
    release.write(folder / "release")
    cert.ingest(folder / "release", folder / "store", threads=1)
    windows.build(folder / "store", folder / "windows", threads=1)
    return folder / "store", windows.read(folder / "windows")


def test_without_an_earlier_ldap_month_the_role_is_unknown(late_ldap):
    store, table = late_ldap
    march = pd.to_datetime(table["day"]).dt.month == 3
    assert set(table.loc[march, "role"]) == {windows.UNKNOWN_ROLE}
    assert set(table.loc[march, "department"]) == {""}
    assert table.loc[march, "ldap_month"].isna().all() and march.any()
    assert set(table.loc[~march, "role"]) == {"During"}
    assert set(table.loc[~march, "ldap_month"]) == {"2010-03"}
    # A day of March from a store cut after it: the same, without a month to know the role from.
    again = windows.behaviour(store, before="2010-03-20", threads=1)
    assert set(again["role"]) == {windows.UNKNOWN_ROLE} and again["ldap_month"].isna().all()


def test_prompts_and_detectors_cope_with_an_unknown_role(late_ldap):
    store, table = late_ldap
    day = table[table["role"] == windows.UNKNOWN_ROLE].head(3)
    items = windows.evidence(store, day, threads=1)
    for window in windows.load(day, items):
        head = prompts.window_messages(window)[1]["content"].splitlines()[0]
        assert head.split(" ")[1:-1] == [windows.UNKNOWN_ROLE] and "  " not in head
    model = baselines.fit(table, detector="gradient_boosting", seed=0)
    assert np.isfinite(baselines.scores(model, day)[0]).all()


def test_a_day_built_from_a_store_cut_after_it_is_the_same_day(world):
    full = world["table"].set_index("window_id")
    for day in (30, 44):
        cut = START + timedelta(days=day + 1)
        again = windows.behaviour(world["store"], before=str(cut), threads=1)
        again = again.set_index("window_id")
        assert len(again) == (pd.to_datetime(full["day"]).dt.date < cut).sum()
        names = [*BEHAVIOUR_FEATURES, *PAST_FEATURES, *WEEK_FEATURES, *RULE_FEATURES]
        np.testing.assert_allclose(full.loc[again.index, names].astype(float),
                                   again[names].astype(float))


@pytest.mark.parametrize("buckets", [1, 5])
def test_the_number_of_buckets_and_threads_changes_nothing(world, tmp_path, buckets):
    cert.ingest(world["folder"] / "release", tmp_path / "store", threads=1, buckets=buckets)
    windows.build(tmp_path / "store", tmp_path / "windows", deviation_share=0.05, threads=2)
    again = windows.read(tmp_path / "windows")
    pd.testing.assert_frame_equal(comparable(again), comparable(world["table"]))
    items = windows.evidence(tmp_path / "store", again, threads=2)
    pd.testing.assert_frame_equal(items, world["items"])


def comparable(table):
    lists = {name: ["|".join(values) for values in table[name]]
             for name in ("deviations", "feature_truth")}
    return table.assign(**lists)


# ---------------------------------------------------------------------------------------------
# Labels


def days_where(table, mask):
    chosen = table[mask]
    return {(user, (pd.Timestamp(day).date() - START).days)
            for user, day in zip(chosen["user"], chosen["day"], strict=True)}


KEY = {("AAA0001", 45), ("AAA0001", 46), ("BBB0002", 36), ("BBB0002", 37), ("BBB0002", 42),
       ("CCC0003", 43), ("CCC0003", 44)}
OTHER_ACCOUNTS = {("VVV0004", 44), ("ZZZ0005", 44)}


def test_labels_join_on_calendar_dates_in_both_views(world):
    table = world["table"]
    assert days_where(table, table["malicious"]) == KEY | OTHER_ACCOUNTS
    assert days_where(table, table["malicious_insider"]) == KEY
    assert days_where(table, table["ignore"] & table["full_history"]) == {("ZZZ0005", 44)}
    assert set(table.loc[table["malicious"], "risk"]) == {"malicious"}
    assert row_of(table, "VVV0004", 44)["incident"] == "CCC0003"
    assert row_of(table, "VVV0004", 44)["scenario"] == 3
    assert set(table.loc[table["incident"].isna(), "scenario"]) == {0}
    counts = windows.read_manifest(world["out"])["counts"]
    assert counts["malicious"] == counts["key_account_days"] == 9
    assert counts["malicious_insider"] == counts["key_insider_days"] == 7


@pytest.mark.parametrize("table", ["key_days", "insider_days"])
def test_a_join_shifted_by_five_days_as_in_a_known_mistake_stops_the_build(
    world, tmp_path, monkeypatch, table
):
    load = windows._load_side_tables

    def shifted(connection):
        load(connection)
        connection.execute(f"UPDATE {table} SET day = day + 5")

    monkeypatch.setattr(windows, "_load_side_tables", shifted)
    with pytest.raises(UserError, match="differ from the answer key"):
        windows.build(world["store"], tmp_path / "windows", threads=1)
    assert not (tmp_path / "windows" / "manifest.json").exists()
    assert list((tmp_path / "windows").iterdir()) == []


def test_key_days_without_an_event_are_counted_and_warned_of(world, tmp_path):
    short, = windows.read_manifest(world["out"])["warnings"]
    assert short.startswith("2 of 9 labelled account-days have fewer than 30 active days")
    shutil.copytree(world["folder"] / "release", tmp_path / "release")
    day = (START + timedelta(days=44)).strftime("%m/%d/%Y")
    for log in HEADERS:
        path = tmp_path / "release" / f"{log}.csv"
        kept = [line for line in path.read_text().splitlines(keepends=True)
                if not (day in line and "VVV0004" in line)]
        path.write_text("".join(kept))
    cert.ingest(tmp_path / "release", tmp_path / "store", threads=1)
    windows.build(tmp_path / "store", tmp_path / "windows", threads=1)
    manifest = windows.read_manifest(tmp_path / "windows")
    assert manifest["counts"]["key_account_days_without_events"] == 1
    assert manifest["counts"]["key_account_days"] == manifest["counts"]["malicious"] + 1 == 9
    assert manifest["counts"]["key_insider_days_without_events"] == 0
    assert len(manifest["warnings"]) == 2 and "1 of 9" in manifest["warnings"][0]


PRECURSORS = {
    ("AAA0001", 43),  # drive at night within 14 days before the label; day 15 is too early
    # Job page, drive, mail to a competitor inside the span; days 35, 44 and 45 lie outside it.
    ("BBB0002", 38), ("BBB0002", 39), ("BBB0002", 41),
}


def test_days_of_an_incident_that_the_key_leaves_out_are_precursors(world, tmp_path, monkeypatch):
    table = world["table"]
    assert days_where(table, table["precursor"]) == PRECURSORS
    assert not (table["precursor"] & table["malicious"]).any()
    # The twin forgets mail: the day with nothing else becomes a plain negative.
    sql = windows._window_sql
    monkeypatch.setattr(windows, "_window_sql", lambda *given: sql(*given).replace(
        " OR d.n_email_competitor > 0", ""))
    twin = windows.behaviour(world["store"], users=["BBB0002"], threads=1)
    twin["day"] = pd.to_datetime(twin["day"]).dt.date
    assert days_where(twin, twin["precursor"]) == {("BBB0002", 38), ("BBB0002", 39)}


def test_an_insider_acting_only_through_another_account_counts_in_the_insider_view(tmp_path):
    release = Release()
    for user in ("AAA0001", "VVV0004"):
        for day in range(3):
            release.logon(user, at(day, 8))
    release.label("AAA0001", 3, release.web("AAA0001", at(1, 9), HACK))
    release.label("AAA0001", 3, release.logon("VVV0004", at(2, 9)))
    release.write(tmp_path / "release")
    cert.ingest(tmp_path / "release", tmp_path / "store", threads=1)
    table = windows.read(windows.build(tmp_path / "store", tmp_path / "windows", threads=1))
    assert days_where(table, table["malicious"]) == {("AAA0001", 1), ("VVV0004", 2)}
    assert days_where(table, table["malicious_insider"]) == {("AAA0001", 1), ("AAA0001", 2)}
    assert days_where(table, table["precursor"]) == {("AAA0001", 2)}
    counts = windows.read_manifest(tmp_path / "windows")["counts"]
    assert counts["key_insider_days"] == counts["malicious_insider"] == 2
    table = windows.behaviour(tmp_path / "store", history_days=1, min_history=1, threads=1)
    table = table[table["full_history"]]
    account, insider = (windows.ranking_truth(table, view=view) for view in ("account", "insider"))
    assert days_where(table, account["ignore"].to_numpy()) == {("AAA0001", 2)}
    assert days_where(table, insider["ignore"].to_numpy()) == {("VVV0004", 2)}


def test_the_two_views_ignore_what_they_cannot_judge(world):
    table = windows.behaviour(world["store"], history_days=20, threads=1)
    account = windows.ranking_truth(table)
    insider = windows.ranking_truth(table, view="insider")
    positive = account["positive"].to_numpy()
    assert days_where(table, positive) == KEY | {("VVV0004", 44)}
    assert days_where(table, insider["positive"].to_numpy()) == KEY
    ignored = days_where(table, insider["ignore"].to_numpy())
    assert ignored >= OTHER_ACCOUNTS and ("BBB0002", 38) in ignored
    assert not (account["positive"] & account["ignore"]).any()
    short = table["past_days"] < 20
    assert account["ignore"][short].all() and insider["ignore"][short].all()
    with pytest.raises(ValueError, match="view"):
        windows.ranking_truth(table, view="people")


def test_no_visible_column_changes_when_the_answer_key_is_taken_away(world, tmp_path):
    shutil.copytree(world["folder"] / "release", tmp_path / "release")
    shutil.rmtree(tmp_path / "release" / "answers")
    cert.ingest(tmp_path / "release", tmp_path / "store", threads=1, buckets=3)
    windows.build(tmp_path / "store", tmp_path / "windows", deviation_share=0.05, threads=1)
    blind = windows.read(tmp_path / "windows")
    answers = ["malicious", "malicious_insider", "scenario", "incident", "precursor", "ignore",
               "risk"]
    a, b = (comparable(t).drop(columns=answers) for t in (blind, world["table"]))
    pd.testing.assert_frame_equal(a, b)
    assert not blind["malicious"].any()
    items = windows.evidence(tmp_path / "store", blind, threads=1)
    hidden = ["labelled", "dont_care"]
    pd.testing.assert_frame_equal(items.drop(columns=hidden), world["items"].drop(columns=hidden))
    with pytest.raises(AssertionError):
        pd.testing.assert_frame_equal(items, world["items"])


# ---------------------------------------------------------------------------------------------
# Deviations, risk, features


def test_only_days_with_a_full_history_are_judged_and_it_is_equally_long_on_all(world, tmp_path):
    for days in (20, 30):
        table = windows.behaviour(world["store"], history_days=days, threads=1)
        judged = table[~table["ignore"]]
        assert len(judged) > 10 and set(judged["past_days"]) == {days}
        assert (table["full_history"] == (table["past_days"] == days)).all()
        first = table.sort_values("day").groupby("user").head(days)
        assert first["ignore"].all()
    # Labels stand on all days of the key; those on early ones are counted.
    made = windows.build(world["store"], tmp_path / "windows", history_days=30, threads=1)
    table, counts = windows.read(made), windows.read_manifest(made)["counts"]
    early = table["malicious"] & ~table["full_history"]
    assert early.any() and counts["malicious_short_history"] == early.sum()
    assert counts["short_history"] == (~table["full_history"]).sum()
    assert counts["judged"] == (~table["ignore"] & ~table["precursor"]).sum()


def test_a_deviation_is_rare_among_training_days_with_enough_history(world):
    fit = windows.read_manifest(world["out"])["fit"]
    assert set(fit["kinds"]) == set(DEVIATIONS) == set(DEVIATION_RULES)
    known = world["table"][world["table"]["enough_history"]]
    assert fit["days"] == len(known)
    for kind, found in fit["kinds"].items():
        assert found["level"] in DEVIATION_RULES[kind].levels
        share = np.mean([kind in kinds for kinds in known["deviations"]])
        assert found["share"] == pytest.approx(share) and share < 0.05
        lower = [level for level in DEVIATION_RULES[kind].levels if level < found["level"]]
        assert all(fit["shares"][str(level)] >= 0.05 for level in lower for fit in [found])
    early = world["table"][~world["table"]["enough_history"]]
    assert sum(map(len, early["deviations"])) == 0


def test_levels_rise_until_they_are_rare_and_common_kinds_are_dropped():
    days = pd.DataFrame({name: 0.0 for name in
                         (*BEHAVIOUR_FEATURES, *PAST_FEATURES, *WEEK_FEATURES, *RULE_FEATURES)},
                        index=range(100))
    days["user"], days["enough_history"], days["past_days"] = "AAA0001", True, 30.0
    days["n_http_job"] = [1.0] * 8 + [3.0] * 2 + [0.0] * 90  # 10 % have 1, 2 % have 3
    days["n_http_leak"] = 9.0  # everybody, at every level
    fit = windows.fit_deviations(days, ["AAA0001"], share=0.03)["kinds"]
    assert fit["job_search"]["level"] == 2 and fit["job_search"]["share"] == 0.02
    assert fit["leak_site"]["level"] is None
    stricter = windows.fit_deviations(days, ["AAA0001"], share=0.02)["kinds"]
    assert stricter["job_search"]["level"] == 5


def test_levels_do_not_know_the_days_of_held_out_accounts(world):
    table = world["table"]
    training = ["AAA0001", "BBB0002", "YYY0006"]
    fit = windows.fit_deviations(table, training, share=0.05)
    changed = table.copy()
    held_out = ~changed["user"].isin(training)
    changed.loc[held_out, "n_http_job"] = 50.0
    assert windows.fit_deviations(changed, training, share=0.05) == fit
    assert windows.fit_deviations(changed, list(OWN_PC), share=0.05) != windows.fit_deviations(
        table, list(OWN_PC), share=0.05)


def test_risk_follows_the_key_first_and_deviations_second(world):
    table = world["table"]
    expected = np.where(table["malicious"], "malicious",
                        np.where(table["deviations"].map(len) > 0, "suspicious", "normal"))
    assert (table["risk"] == expected).all()
    assert list(row_of(table, "YYY0006", 49)["deviations"]) == ["job_search"]
    assert list(row_of(table, "YYY0006", 50)["deviations"]) == ["new_workstation"]
    assert "leak_site" in row_of(table, "AAA0001", 45)["deviations"]
    assert "leak_site" in row_of(table, "AAA0001", 46)["deviations"] or (
        row_of(table, "AAA0001", 46)["past_leak_days"] == 1)
    again = windows.label(table, windows.read_manifest(world["out"])["fit"])
    assert (again["risk"].to_numpy() == table["risk"].to_numpy()).all()


def test_every_day_has_two_to_four_features_that_hold_by_their_rules(world, windows_table):
    for table in (world["table"], windows_table):
        assert table["feature_truth"].map(len).between(2, 4).all()
        assert set().union(*table["feature_truth"]) <= set(FEATURES)
        said = table["feature_truth"].map(set)
        hours = said.map(lambda names: len(names & {"usual_hours", "after_hours_logon"}))
        assert (hours <= 1).all()
        drive = table["n_device"] > 0
        assert not (said.map(lambda names: "no_removable_media" in names) & drive).any()
    table = world["table"]
    assert list(row_of(table, "AAA0001", 45)["feature_truth"])[:2] == [
        "leak_site", "after_hours_logon"]
    assert "mass_mail" in row_of(table, "VVV0004", 44)["feature_truth"]
    assert set(row_of(table, "ZZZ0005", 37)["feature_truth"]) >= {"usual_hours", "own_workstation"}


def test_relabel_changes_levels_and_risk_and_nothing_else(world, tmp_path):
    shutil.copytree(world["out"], tmp_path / "windows")
    manifest = windows.relabel(tmp_path / "windows", ["YYY0006", "ZZZ0005"], threads=1)
    assert manifest["fit"]["users"] == ["YYY0006", "ZZZ0005"]
    assert windows.read_manifest(tmp_path / "windows") == json.loads(json.dumps(manifest))
    again = windows.read(tmp_path / "windows")
    dropped = ["deviations", "risk"]
    pd.testing.assert_frame_equal(comparable(again).drop(columns=dropped),
                                  comparable(world["table"]).drop(columns=dropped))
    direct = windows.build(world["store"], tmp_path / "direct", deviation_share=0.05, threads=1,
                           train_users=["ZZZ0005", "YYY0006"])
    pd.testing.assert_frame_equal(comparable(windows.read(direct)), comparable(again))
    assert windows.read_manifest(direct) == windows.read_manifest(tmp_path / "windows")


# ---------------------------------------------------------------------------------------------
# Evidence


def items_of(world, user, day):
    items = world["items"]
    return items[items["window_id"] == f"{user}_{START + timedelta(days=day)}"]


def test_the_items_of_a_leak_night_tell_what_was_seen(world):
    items = items_of(world, "AAA0001", 45)
    labelled = items[items["labelled"]]
    assert labelled["kind"].tolist() == ["logon", "device", "http"]
    logon, device, web = labelled.to_dict("records")
    assert (logon["start"], logon["pc"]) == ("22:00", "PC-0001")
    assert logon["facts"][:2] == ["own pc", "after hours"]
    assert logon["facts"][2].endswith("hours after usual")
    assert (device["start"], device["end"], device["n"]) == ("22:10", "22:30", 1)
    assert device["facts"] == ["own pc", "after hours", "rare"]
    assert web["detail"] == "leak" and web["facts"] == ["after hours", "first time"]
    assert items["item"].tolist() == [f"e{i + 1}" for i in range(len(items))]
    assert items["start"].tolist() == sorted(items["start"])


def test_every_event_stands_in_exactly_one_item(world):
    listed = [(item.kind, event) for item in world["items"].itertuples()
              for event in item.event_ids]
    assert len(listed) == len(set(listed))
    logs = {"logoff": "logon"}
    got = {(logs.get(kind, kind), event) for kind, event in listed}
    expected = {(log, row[0]) for log, rows in world["release"].rows.items() for _, row in rows}
    assert got == expected
    assert (world["items"]["dropped"] == 0).all()


def test_items_built_from_a_store_cut_after_the_day_are_the_same(world):
    day = START + timedelta(days=45)
    shown = world["table"][world["table"]["day"].astype(str) == str(day)]
    items = world["items"][world["items"]["window_id"].isin(shown["window_id"])]

    def cut():
        return windows.evidence(world["store"], shown, before=str(day + timedelta(days=1)),
                                threads=1)

    pd.testing.assert_frame_equal(cut(), items.reset_index(drop=True))
    with pytest.raises(AssertionError):  # a store cut before the day knows nothing of it
        pd.testing.assert_frame_equal(
            windows.evidence(world["store"], shown, before=str(day), threads=1),
            items.reset_index(drop=True))


def test_labelled_items_hold_key_rows_and_nothing_else_does(world):
    key = {(log, row[0]) for rows in world["release"].answers.values() for log, row in rows}
    for item in world["items"].itertuples():
        log = "logon" if item.kind == "logoff" else item.kind
        assert item.labelled == any((log, event) in key for event in item.event_ids)


def test_an_id_is_joined_with_its_log_since_ids_repeat_between_files(tmp_path):
    release = Release()
    row = release.logon("AAA0001", at(0, 8))
    other = release.web("AAA0001", at(0, 9))
    other[1][0] = row[1][0]  # the same id in another file
    release.label("AAA0001", 1, row)
    release.write(tmp_path / "release")
    cert.ingest(tmp_path / "release", tmp_path / "store", threads=1)
    windows.build(tmp_path / "store", tmp_path / "windows", threads=1)
    items = windows.evidence(tmp_path / "store", windows.read(tmp_path / "windows"), threads=1)
    assert dict(zip(items["kind"], items["labelled"], strict=True)) == {
        "logon": True, "http": False}


def test_unlabelled_events_of_the_incident_are_dont_care_and_others_are_not(world):
    before = items_of(world, "AAA0001", 43)  # precursor: night logon and drive
    assert before.loc[before["dont_care"], "kind"].tolist() == ["logon", "device"]
    job_day = items_of(world, "BBB0002", 42)
    assert job_day.loc[job_day["dont_care"], "kind"].tolist() == ["device"]
    assert not world["items"].loc[world["items"]["labelled"], "dont_care"].any()
    innocent = world["items"]["window_id"].str.startswith("YYY0006")
    assert not world["items"].loc[innocent, "dont_care"].any()


def test_every_deviation_is_carried_by_an_item_and_every_malicious_day_has_evidence(
    world, windows_table, evidence_table
):
    for table, items in ((world["table"], world["items"]), (windows_table, evidence_table)):
        carried = items.groupby("window_id")["deviation"].agg(lambda lists: set().union(*lists))
        shown = table[table["window_id"].isin(items["window_id"])]
        for row in shown.itertuples():
            assert carried[row.window_id] == set(row.deviations)
        truth = windows.truth_table(shown, items)
        assert (truth["evidence_truth"].map(len).gt(0) == (truth["risk"] != "normal")).all()


def test_item_features_include_the_days_alarming_features(world):
    shown = world["items"].groupby("window_id")["features"].agg(lambda lists: set().union(*lists))
    alarming = set(DEVIATIONS)
    for row in world["table"].itertuples():
        assert set(row.feature_truth) & alarming <= shown[row.window_id]


def test_too_many_items_lose_the_least_informative_and_say_so(world):
    table = world["table"]
    day = table[table["window_id"] == row_of(table, "AAA0001", 45)["window_id"]]
    whole = windows.evidence(world["store"], day, threads=1)
    few = windows.evidence(world["store"], day, max_items=3, threads=1)
    assert (few["dropped"] == len(whole) - 3).all() and len(few) == 3
    assert few["kind"].tolist() == ["logon", "device", "http"] and few["labelled"].all()
    assert few["item"].tolist() == ["e1", "e2", "e3"]
    assert windows.load(day, few)[0].dropped == len(whole) - 3


def kept_events(window, number, worth):
    """Return the events of a window's `number` most informative items, in their order."""
    ranked = sorted(window.evidence, key=lambda item: -worth(item))[:number]
    return [item.events for item in window.evidence if item in ranked]


@pytest.mark.parametrize("number", [2, 4])
def test_a_day_a_prompt_and_the_order_of_informativeness_drop_the_same_items(world, number):
    table = world["table"]
    long = [w for w in windows.load(table, world["items"]) if len(w.evidence) > number]
    assert len(long) > 50
    few = {w.window_id: w for w in windows.load(table, windows.evidence(
        world["store"], table, max_items=number, threads=1))}
    twin = 0
    for window in long:
        got = few[window.window_id]
        assert [item.events for item in got.evidence] == kept_events(
            window, number, windows.informativeness)
        shown = prompts.keep_items(window, number)
        assert [item.events for item in shown.evidence] == [item.events for item in got.evidence]
        assert shown.dropped == got.dropped
        assert [item.id for item in got.evidence] == [f"e{i + 1}" for i in range(number)]
        twin += [item.events for item in got.evidence] != kept_events(
            window, number, lambda item: -windows.informativeness(item))
    assert twin > len(long) / 2  # the reversed order keeps others


def test_a_roaming_day_is_cut_by_what_is_visible_not_by_its_label(tmp_path):
    release = Release()
    for day in range(12):
        release.logon("AAA0001", at(day, 8))
    rows = [release.logon("AAA0001", at(12, 8 + i % 4, i), pc=f"PC-{i + 10:04d}")
            for i in range(30)]
    release.label("AAA0001", 3, rows[0])
    release.write(tmp_path / "release")
    cert.ingest(tmp_path / "release", tmp_path / "store", threads=1)
    windows.build(tmp_path / "store", tmp_path / "windows", threads=1)
    day = windows.read(tmp_path / "windows").iloc[[-1]]
    items = windows.evidence(tmp_path / "store", day, max_items=10, threads=1)
    release.answers = {("AAA0001", 3): [rows[-1]]}
    shutil.rmtree(tmp_path / "release")
    release.write(tmp_path / "release")
    cert.ingest(tmp_path / "release", tmp_path / "store", threads=1)
    again = windows.evidence(tmp_path / "store", day, max_items=10, threads=1)
    pd.testing.assert_frame_equal(items.drop(columns="labelled"), again.drop(columns="labelled"))
    assert len(items) == 10 and (items["dropped"] == 20).all()


def test_a_missing_disconnect_and_a_session_over_noon_stay_one_item_each(tmp_path):
    release = Release()
    release.drive("AAA0001", at(0, 11, 50), minutes=30)
    release._add("device", "AAA0001", at(0, 14), "PC-0001", "Connect")
    release._add("device", "AAA0001", at(1, 9), "PC-0001", "Disconnect")
    release.write(tmp_path / "release")
    cert.ingest(tmp_path / "release", tmp_path / "store", threads=1)
    windows.build(tmp_path / "store", tmp_path / "windows", threads=1)
    items = windows.evidence(tmp_path / "store", windows.read(tmp_path / "windows"), threads=1)
    got = items[["start", "end", "n", "detail"]].to_numpy().tolist()
    assert got == [["11:50", "12:20", 1, ""], ["14:00", "14:00", 1, "no disconnect"],
                   ["09:00", "09:00", 1, "no connect"]]


def test_loading_gives_frozen_windows_whose_truth_follows_the_risk(world):
    loaded = {window.window_id: window for window in windows.load(world["table"], world["items"])}
    assert list(loaded) == world["table"]["window_id"].tolist()
    for window in loaded.values():
        true = [item for item in window.evidence if item.truth]
        assert not any(item.dont_care for item in true)
        assert (len(true) > 0) == (window.risk != "normal")
    night = loaded[f"AAA0001_{START + timedelta(days=45)}"]
    assert [item.kind for item in night.evidence if item.truth] == ["logon", "device", "http"]
    assert set(night.past) == set(PAST_FEATURES) and set(night.week) == set(WEEK_FEATURES)
    with pytest.raises(AttributeError):
        night.risk = "normal"
    truth = windows.truth_table(world["table"], world["items"])
    row = truth[truth["window_id"] == night.window_id].iloc[0]
    assert row["evidence_truth"] == [item.id for item in night.evidence if item.truth]


def test_the_users_table_ties_the_abused_account_to_the_incident(world):
    users = windows.users_table(world["table"])
    ties = {tuple(row) for row in users.itertuples(index=False)}
    assert ties == {("AAA0001", "AAA0001", 1), ("BBB0002", "BBB0002", 2),
                    ("CCC0003", "CCC0003", 3), ("VVV0004", "CCC0003", 3),
                    ("ZZZ0005", "CCC0003", 3), ("YYY0006", None, 0)}


# ---------------------------------------------------------------------------------------------
# Size, interruption, bad input


def test_a_simulated_release_has_the_days_of_its_key_and_few_suspicious_ones(windows_table, store):
    with cert.Store(store).connect() as connection:
        key = {f"{user}_{day}" for user, day in connection.execute(
            "SELECT DISTINCT user, date::DATE::VARCHAR FROM answers").fetchall()}
        events = sum(connection.execute(f"SELECT count(*) FROM {log}").fetchone()[0]
                     for log in windows.LOGS)
    assert set(windows_table.loc[windows_table["malicious"], "window_id"]) == key
    counted = windows_table[["n_logon", "n_logoff", "n_file", "n_email", "n_http"]].sum().sum()
    with cert.Store(store).connect() as connection:
        device = connection.execute("SELECT count(*) FROM device").fetchone()[0]
    assert counted == events - device
    benign = windows_table[~windows_table["malicious"] & windows_table["enough_history"]]
    assert 0.01 < (benign["risk"] == "suspicious").mean() < 0.10
    assert windows_table["window_id"].is_unique


def test_an_unfinished_build_is_refused_and_a_second_build_mends_it(world, tmp_path):
    out = tmp_path / "windows"

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        windows.build(world["store"], out, threads=1, progress=stop)
    assert list(out.iterdir()) == []
    with pytest.raises(UserError, match="no complete windows"):
        windows.read(out)
    windows.build(world["store"], out, deviation_share=0.05, threads=1)
    pd.testing.assert_frame_equal(comparable(windows.read(out)), comparable(world["table"]))
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "windows.parquet"]


def test_what_a_killed_build_left_behind_is_swept_and_a_living_one_keeps_its_parts(world, tmp_path):
    out = tmp_path / "windows"
    code = ("import os, sys; from ueba_helpers.data import windows\n"
            "windows.build(sys.argv[1], sys.argv[2], threads=1, "
            "progress=lambda done, total: os.kill(os.getpid(), 9))")
    killed = subprocess.run([sys.executable, "-c", code, str(world["store"]), str(out)],
                            check=False)
    assert killed.returncode == -9
    left = list(out.iterdir())
    assert len(left) == 1 and any(left[0].iterdir())
    living = out / f"{windows._PARTS}{os.getppid()}-abc"
    living.mkdir()
    windows.build(world["store"], out, deviation_share=0.05, threads=1)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [living.name, "manifest.json", "windows.parquet"])
    pd.testing.assert_frame_equal(comparable(windows.read(out)), comparable(world["table"]))


@pytest.mark.parametrize(("settings", "named"), [
    ({"deviation_share": 0.0}, "deviation_share"), ({"deviation_share": 1.5}, "deviation_share"),
    ({"history_days": 0}, "history_days"), ({"min_history": 31}, "min_history"),
    ({"min_history": 0}, "min_history"), ({"train_users": []}, "train_users"),
    ({"train_users": ["QQQ9999"]}, "QQQ9999"), ({"memory_limit": "much"}, "--memory-limit"),
    ({"threads": 0}, "threads"),
])
def test_impossible_settings_are_refused_by_name(world, tmp_path, settings, named):
    with pytest.raises(UserError, match=named):
        windows.build(world["store"], tmp_path / "windows", **settings)
    assert not (tmp_path / "windows" / "manifest.json").exists()


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="ingest"):
        windows.build(tmp_path, tmp_path / "windows")
    assert not (tmp_path / "windows").exists()


def test_evidence_of_no_day_is_an_empty_table_and_a_repeated_day_is_refused(world):
    table = world["table"]
    empty = windows.evidence(world["store"], table.head(0), threads=1)
    assert len(empty) == 0 and list(empty.columns) == list(windows.EVIDENCE_COLUMNS)
    with pytest.raises(ValueError, match="twice"):
        windows.evidence(world["store"], table.iloc[[0, 0]])
    with pytest.raises(UserError, match="max_items"):
        windows.evidence(world["store"], table.head(1), max_items=0)
