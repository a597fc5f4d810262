"""The loader: a good folder is stored exactly, a bad row is kept apart, a bad folder refused."""

import codecs
import csv
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.cert_folder import (
    HEADERS,
    USERS,
    event_id,
    log_lines,
    write_answers,
    write_folder,
    write_lines,
)
from ueba_helpers.data import cert
from ueba_helpers.errors import UserError

ROWS = 12


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "release", rows=ROWS)


def rows_of(store: Path, query: str) -> list[tuple]:
    with cert.Store(store).connect(threads=1) as connection:
        return connection.execute(query).fetchall()


def quarantined(store: Path) -> list[dict]:
    with open(store / "quarantine.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def contents(store: Path) -> dict[str, str]:
    """Every file of a store with the hash of its bytes."""
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


def tables(store: Path) -> dict[str, list[tuple]]:
    """Every table of a store as sorted rows: equal for equal content, however it is laid out."""
    return {
        name: sorted(map(repr, rows_of(store, f"SELECT * FROM {name}")))
        for name in (*cert.LOGS, *cert.SMALL_TABLES)
    }


def lenient(release: Path, store: Path, **options) -> dict:
    return cert.ingest(release, store, max_quarantine_share=1.0, allow_truncated=True, threads=1,
                       **options)


def accounted(part: dict) -> bool:
    """Whether every row read of a file is stored, quarantined, or of another release."""
    return part["read"] == part["stored"] + part["quarantined"] + part.get("other_releases", 0)


def replace_line(path: Path, number: int, line: str | bytes) -> None:
    """Put another line at a line number (1 is the header)."""
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join(lines))


# --- a valid folder -------------------------------------------------------------------------------


def test_a_valid_folder_is_stored_row_by_row(folder, tmp_path):
    manifest = cert.ingest(folder, tmp_path / "store")
    assert {log: part["stored"] for log, part in manifest["logs"].items()} == dict.fromkeys(
        cert.LOGS, ROWS
    )
    for log in cert.LOGS:
        given_ids = {line.split(",")[0] for line in log_lines(log, ROWS)}
        assert {row[0] for row in rows_of(tmp_path / "store", f"SELECT id FROM {log}")} == given_ids
    assert quarantined(tmp_path / "store") == []
    assert manifest["release"] == "r4.2"
    assert manifest["users"] == 3 and manifest["warnings"] == []


def test_the_columns_of_an_event_mean_what_the_file_says(folder, tmp_path):
    cert.ingest(folder, tmp_path / "store")
    moment = datetime(2010, 3, 1, 8, 1)
    assert rows_of(tmp_path / "store", "SELECT * EXCLUDE (bucket) FROM logon ORDER BY date")[1] == (
        event_id("logon", 1), moment, "BBB0002", "PC-0002", "Logoff",
    )
    assert rows_of(
        tmp_path / "store", "SELECT filename, extension FROM file ORDER BY date LIMIT 2"
    ) == [("F0000000.doc", "doc"), ("F0000001.EXE", "exe")]
    # The actor is `user`, not the address in `from`; recipients count over to, cc and bcc.
    assert rows_of(
        tmp_path / "store",
        'SELECT "user", "from", n_to, n_external, n_competitor, n_recipients, size, attachments'
        " FROM email ORDER BY date LIMIT 2",
    ) == [
        ("AAA0001", "Ada.A@comcast.net", 2, 1, 1, 2, 20_000, 0),
        ("BBB0002", "Ada.A@comcast.net", 2, 1, 1, 3, 20_001, 1),
    ]
    assert rows_of(
        tmp_path / "store", "SELECT domain, topic, category FROM http ORDER BY date LIMIT 3"
    ) == [
        ("example.org", "news", "news"), ("boeing.com", "jobhunting", "job"),
        ("facebook.com", "friends", "social"),
    ]


def test_no_page_or_message_text_reaches_the_store(folder, tmp_path):
    cert.ingest(folder, tmp_path / "store")
    with cert.Store(tmp_path / "store").connect() as connection:
        for log in cert.LOGS:
            columns = [row[0] for row in connection.execute(f"DESCRIBE {log}").fetchall()]
            assert columns == [*cert.EVENT_COLUMNS[log], "bucket"]
            kinds = dict(connection.execute(f"DESCRIBE {log}").fetchall()[i][:2] for i in range(4))
            assert kinds["date"] == "TIMESTAMP"


def test_the_answer_key_is_read_for_dataset_4_2_only(folder, tmp_path):
    manifest = cert.ingest(folder, tmp_path / "store")
    # The key also holds a row of r2 (dates not padded) and one of r6.2 with a broken date.
    assert manifest["insiders"] == {"1": 1, "2": 1, "3": 1}
    assert manifest["tables"]["insiders"]["other_releases"] == 2
    # AAA0001 has rows on two days, BBB0002 on one; the third insider acts on the accounts
    # of CCC0013 (03/01) and AAA0001 (03/03): five pairs in either view.
    assert manifest["positive_days"] == {"account": 5, "insider": 5}
    assert rows_of(
        tmp_path / "store",
        'SELECT log, "user", strftime(date, \'%d\') FROM answers WHERE insider = \'CCC0013\''
        " ORDER BY log",
    ) == [("http", "AAA0001", "03"), ("logon", "CCC0013", "01")]
    assert manifest["answers_unmatched"] == {}


def test_the_two_views_of_positive_days_differ_where_an_insider_uses_another_account(
    folder, tmp_path
):
    # The insider's own account and the victim's on one day: two account-days, one insider-day.
    # Beside them three days of the other insiders, the same in both views.
    logon = log_lines("logon", ROWS)
    path = folder / "answers" / "r4.2-3" / "r4.2-3-CCC0013.csv"
    write_lines(path, None, [f"logon,{logon[4]}", f"logon,{logon[5]}"])
    manifest = cert.ingest(folder, tmp_path / "store")
    assert manifest["positive_days"] == {"account": 5, "insider": 4}
    rows = rows_of(
        tmp_path / "store",
        'SELECT count(DISTINCT "user"), count(DISTINCT insider) FROM answers WHERE scenario = 3',
    )
    assert rows == [(2, 1)]


INSIDERS, MISSED = "answers/insiders.csv", "r4.2-2-BBB0002.csv"


def miswrite_insider(folder: Path, dataset: str) -> None:
    """Give insider BBB0002's row of the key another dataset."""
    path = folder / INSIDERS
    path.write_text(path.read_text().replace("4.2,2,", f"{dataset},2,"))


def insider_is_missed(release: Path, store: Path) -> bool:
    """Whether the loss of insider BBB0002 shows: in the quarantine, the warnings, the counts."""
    manifest = lenient(release, store)
    part = manifest["tables"]["insiders"]
    refused = [(row["file"], row["line"]) for row in quarantined(store)]
    return (
        refused == [(INSIDERS, "4")]
        and any(MISSED in warning for warning in manifest["warnings"])
        and accounted(part)
        and (part["read"], part["stored"], part["other_releases"]) == (5, 2, 2)
    )


@pytest.mark.parametrize(
    "dataset", ["42", "", "4,2", "4.20", "7.1", "4.1", "r5.2", "rr4.2", "\u0664.2"]
)
def test_an_insider_of_a_miswritten_dataset_is_missed_aloud(folder, tmp_path, dataset):
    miswrite_insider(folder, dataset)
    with pytest.raises(UserError, match=r"insiders\.csv: 1 of 3 rows .*first: line 4"):
        cert.ingest(folder, tmp_path / "store")
    assert insider_is_missed(folder, tmp_path / "store")


def test_passing_over_every_other_dataset_would_lose_an_insider(folder, tmp_path, monkeypatch):
    """The twin: a reader that takes whatever is not 4.2 for another release."""
    miswrite_insider(folder, "42")
    monkeypatch.setattr(cert, "_is_other_release", lambda cells: cells[0] != "4.2")
    assert not insider_is_missed(folder, tmp_path / "store")


@pytest.mark.parametrize("dataset", [name for name in cert.DATASETS if name != "4.2"])
def test_rows_of_the_other_known_releases_are_passed_over_and_counted(folder, tmp_path, dataset):
    with open(folder / INSIDERS, "a") as stream:
        stream.write(f"{dataset},4,r{dataset}-4.csv,no user,no date,8/1/2010 9:00:00\n")
    manifest = cert.ingest(folder, tmp_path / "store")
    assert manifest["tables"]["insiders"] == {
        "read": 6, "stored": 3, "quarantined": 0, "other_releases": 3,
    }
    assert manifest["rows"]["other_releases"] == 3 and accounted(manifest["rows"])
    assert manifest["warnings"] == []


def test_an_answer_file_that_the_key_does_not_name_is_told(folder, tmp_path):
    store = tmp_path / "store"
    assert cert.ingest(folder, store)["warnings"] == []
    stray = folder / "answers" / "r4.2-2" / "r4.2-2-ZZZ0009.csv"
    write_lines(stray, None, [f"http,{log_lines('http', 12)[4]}"])
    for _ in range(2):  # a store that is used again keeps its warning
        manifest = cert.ingest(folder, store)
        (warning,) = manifest["warnings"]
        assert "answers/r4.2-2/r4.2-2-ZZZ0009.csv was left out: no good row" in warning
        assert manifest["answer_files_left_out"] == ["answers/r4.2-2/r4.2-2-ZZZ0009.csv"]
        assert manifest["tables"]["answers"]["stored"] == 7
    stray.rename(folder / "answers" / "r4.2-2-BBB0002.csv")
    (warning,) = cert.ingest(folder, store)["warnings"]
    assert "was left out: answers/r4.2-2/r4.2-2-BBB0002.csv is used" in warning


@pytest.mark.parametrize("name", ["insiders.csv", "r4.2-1-AAA0001.csv"])
def test_a_row_of_the_key_lost_on_the_way_is_noticed(folder, tmp_path, monkeypatch, name):
    def dropping(self, source, real=cert._Ingest.small_lines):
        lines, *rest = real(self, source)
        return (lines[:-1] if source.path.name == name else lines), *rest

    monkeypatch.setattr(cert._Ingest, "small_lines", dropping)
    with pytest.raises(RuntimeError, match=rf"{name}: \d rows read but"):
        lenient(folder, tmp_path / "store")


# The facts of a real release the size of the fixture. Insider CCC0013 acts on two accounts in one
# day, so that the two views of a positive day differ.
TOY_FACTS = {
    "rows": dict.fromkeys(cert.LOGS, ROWS), "insiders": {"1": 1, "2": 1, "3": 1},
    "positive_days": {"account": 6, "insider": 5},
}


@pytest.fixture
def real_folder(folder, monkeypatch) -> Path:
    """The fixture in the part of the real release."""
    logon, http = log_lines("logon", ROWS), log_lines("http", ROWS)
    acts = [f"logon,{logon[5]}", f"logon,{logon[4]}", f"http,{http[6]}"]
    write_lines(folder / "answers" / "r4.2-3" / "r4.2-3-CCC0013.csv", None, acts)
    monkeypatch.setattr(cert, "R4_2_FACTS", TOY_FACTS)
    return folder


def test_the_facts_of_the_real_release_are_those_published():
    facts = cert.R4_2_FACTS
    assert facts["positive_days"] == {"account": 986, "insider": 966}
    assert sum(facts["rows"].values()) == 32_770_222 and set(facts["rows"]) == set(cert.LOGS)
    assert sum(facts["insiders"].values()) == 70


def test_the_real_release_is_known_by_its_rows_and_its_key_checked(real_folder, tmp_path):
    manifest = cert.ingest(real_folder, tmp_path / "store")
    assert manifest["real_release"]
    assert manifest["positive_days"] == TOY_FACTS["positive_days"]
    (real_folder / "http.csv").unlink()  # a subset is known by the logs that are there
    assert cert.ingest(real_folder, tmp_path / "store")["real_release"]
    for log in ("logon", "device", "file", "email"):
        write_lines(real_folder / f"{log}.csv", HEADERS[log], log_lines(log, ROWS + 3))
    assert not cert.ingest(real_folder, tmp_path / "store")["real_release"]


def test_a_log_of_the_real_release_that_is_cut_at_a_line_end_is_told(real_folder, tmp_path):
    write_lines(real_folder / "device.csv", HEADERS["device"], log_lines("device", ROWS - 2))
    manifest = cert.ingest(real_folder, tmp_path / "store")
    assert manifest["real_release"]
    (warning,) = manifest["warnings"]
    assert warning.startswith("device.csv: 10 rows, but 12 in the real release")


def shift_day(folder: Path) -> None:
    path = folder / "answers" / "r4.2-1" / "r4.2-1-AAA0001.csv"
    path.write_text(path.read_text().replace("03/02/2010", "03/06/2010", 1).replace(
        "03/01/2010", "03/07/2010", 1))


def drop_insider(folder: Path) -> None:
    path = folder / INSIDERS
    path.write_text(re.sub("4.2,2,.*\n", "", path.read_text()))


@pytest.mark.parametrize("damage, words", [
    (lambda folder: (folder / "answers" / "r4.2-2" / MISSED).unlink(),
     ["positive_days are {'account': 5, 'insider': 4}",
      "expected {'account': 6, 'insider': 5}", f"{MISSED} of insider BBB0002 is missing"]),
    (shift_day, ["positive_days are {'account': 7, 'insider': 6}"]),
    (drop_insider, ["insiders are {'1': 1, '3': 1}, expected {'1': 1, '2': 1, '3': 1}"]),
])
def test_a_key_that_is_not_the_real_one_stops_the_real_release_only(
    real_folder, tmp_path, monkeypatch, damage, words
):
    damage(real_folder)
    with pytest.raises(UserError) as refused:
        lenient(real_folder, tmp_path / "store", allow_partial=True)
    for word in words:
        assert word in str(refused.value)
    assert not (tmp_path / "store").exists()
    monkeypatch.undo()  # with the true facts this is some other release
    assert not lenient(real_folder, tmp_path / "store", allow_partial=True)["real_release"]


def test_the_two_views_must_not_be_taken_for_each_other(real_folder, tmp_path, monkeypatch):
    """The twin: facts with the two views exchanged refuse the good key."""
    exchanged = {**TOY_FACTS, "positive_days": {"account": 5, "insider": 6}}
    monkeypatch.setattr(cert, "R4_2_FACTS", exchanged)
    with pytest.raises(UserError, match=r"positive_days are \{'account': 6, 'insider': 5\}"):
        cert.ingest(real_folder, tmp_path / "store")


def test_the_real_logs_without_a_key_are_read_with_a_warning(real_folder, tmp_path):
    shutil.rmtree(real_folder / "answers")
    assert cert.ingest(real_folder, tmp_path / "store")["real_release"]


def test_the_events_of_a_part_are_sorted_by_account_and_time(folder, tmp_path):
    shuffled = log_lines("logon", 300)
    random.Random(0).shuffle(shuffled)
    write_lines(folder / "logon.csv", HEADERS["logon"], shuffled)
    cert.ingest(folder, tmp_path / "store", buckets=2)
    seen = set()
    for path in sorted((tmp_path / "store" / "events" / "logon").rglob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        keys = [(row["user"], row["date"]) for row in rows]
        assert keys == sorted(keys)
        accounts = {user for user, _ in keys}
        assert not accounts & seen, "an account is in two parts"
        seen |= accounts
    assert seen == set(USERS)


def test_a_packed_folder_gives_the_same_tables(folder, tmp_path):
    cert.ingest(folder, tmp_path / "plain")
    for path in sorted(folder.rglob("*.csv")):
        (path.parent / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    cert.ingest(folder, tmp_path / "packed")
    assert tables(tmp_path / "plain") == tables(tmp_path / "packed")


def test_answers_beside_the_folder_are_found(tmp_path):
    release = write_folder(tmp_path / "given" / "r4.2", rows=ROWS, answers=False)
    write_answers(tmp_path / "given" / "answers")
    assert cert.ingest(release, tmp_path / "store")["insiders"] == {"1": 1, "2": 1, "3": 1}


@pytest.mark.parametrize(
    "missing, told",
    [
        ("http.csv", "http.csv is missing"),
        ("email.csv", "email.csv is missing"),
        ("psychometric.csv", "psychometric.csv is missing"),
        ("answers", "answers/insiders.csv is missing"),
    ],
)
def test_what_is_missing_but_not_needed_is_a_warning(folder, tmp_path, missing, told):
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    manifest = cert.ingest(folder, tmp_path / "store")
    assert any(told in warning for warning in manifest["warnings"]), manifest["warnings"]
    for name in (*cert.LOGS, *cert.SMALL_TABLES):
        rows_of(tmp_path / "store", f"SELECT count(*) FROM {name}")


def test_an_insider_without_an_answer_file_does_not_become_benign_unasked(folder, tmp_path):
    (folder / "answers" / "r4.2-2" / "r4.2-2-BBB0002.csv").unlink()
    told = r"r4\.2-2-BBB0002\.csv of insider BBB0002 is missing, so the days count as benign"
    with pytest.raises(UserError, match=rf"insiders\.csv: {told}.*--allow-partial"):
        cert.ingest(folder, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    manifest = cert.ingest(folder, tmp_path / "store", allow_partial=True)
    assert any(re.search(told, warning) for warning in manifest["warnings"])
    assert manifest["insiders"] == {"1": 1, "2": 1, "3": 1}


@pytest.mark.parametrize("last, told", [
    ("2010-04", []), ("2010-05", ["2010-04.csv"]), ("2010-06", ["2010-04.csv, 2010-05.csv"]),
])
def test_months_missing_between_the_first_and_the_last_are_named(folder, tmp_path, last, told):
    shutil.copy(folder / "LDAP" / "2010-03.csv", folder / "LDAP" / f"{last}.csv")
    warnings = cert.ingest(folder, tmp_path / "store")["warnings"]
    named = [warning for warning in warnings if "between the first and the last" in warning]
    assert [line.split(": ")[1].split(" missing")[0] for line in named] == told


def test_a_missing_log_is_an_empty_view_with_the_same_columns(folder, tmp_path):
    cert.ingest(folder, tmp_path / "full")
    for log in cert.LOGS[1:]:
        (folder / f"{log}.csv").unlink()
    cert.ingest(folder, tmp_path / "store")
    for log in cert.LOGS[1:]:
        assert rows_of(tmp_path / "store", f"SELECT * FROM {log}") == []
        described = rows_of(tmp_path / "store", f"DESCRIBE {log}")
        assert described == rows_of(tmp_path / "full", f"DESCRIBE {log}")


def test_answer_rows_that_are_in_no_log_are_counted(folder, tmp_path):
    write_lines(folder / "logon.csv", HEADERS["logon"], log_lines("logon", ROWS)[3:])
    manifest = cert.ingest(folder, tmp_path / "store")
    assert manifest["answers_unmatched"] == {"logon": 2}
    assert manifest["answers_differing"] == []
    assert "2 rows of the answer key are in no log: {'logon': 2}" in manifest["warnings"]


KEY_CHANGES = [  # what is changed in the key's row of device event 3; how the list shows it
    ("03/02/2010", "03/06/2010", "2010-03-06 08:03:00 AAA0001 PC-0001"),
    ("08:03:00", "08:03:01", "2010-03-02 08:03:01 AAA0001 PC-0001"),
    ("AAA0001", "BBB0002", "2010-03-02 08:03:00 BBB0002 PC-0001"),
    ("PC-0001", "PC-0009", "2010-03-02 08:03:00 AAA0001 PC-0009"),
]


@pytest.mark.parametrize("old, new", [(r",[A-Z]{2}([A-Z]\d{4}),PC", r",QQ\1,PC"),
                                      (r"/2010 ", "/2011 ")])
def test_logs_of_another_release_under_the_key_of_r4_2_are_refused(release, tmp_path, old, new):
    """As r4.1 in a folder of another name: the same headers, other people or other days."""
    other = tmp_path / "other"
    shutil.copytree(release, other)
    path = other / "logon.csv"
    path.write_text(re.sub(old, new, path.read_text()))
    with pytest.raises(UserError, match="not of the release that the key belongs to") as refused:
        cert.ingest(other, tmp_path / "store", threads=1)
    assert "logon.csv" in str(refused.value)
    assert cert.ingest(release, tmp_path / "store", threads=1)["answers_unmatched"] == {}


def read_until_refused(release, other, tmp_path, monkeypatch):
    """Refuse the part of a release whose logons end with January; return the logs that were read.
    """
    shutil.copytree(release, other)
    lines = (other / "logon.csv").read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.split(",")[1][:2] in ("da", "01")]
    assert 1 < len(kept) < len(lines)
    (other / "logon.csv").write_text("".join(kept))
    read = []
    log = cert._Ingest.log
    with monkeypatch.context() as patch:
        patch.setattr(cert._Ingest, "log", lambda self, name: read.append(name) or log(self, name))
        with pytest.raises(UserError, match=r"only a part of it.*--allow-partial"):
            cert.ingest(other, tmp_path / "store", threads=1)
    return read


def test_a_part_of_a_release_is_refused_before_the_longer_logs_are_read(
    release, tmp_path, monkeypatch
):
    other = tmp_path / "other"
    assert read_until_refused(release, other, tmp_path, monkeypatch) == ["logon"]
    manifest = cert.ingest(other, tmp_path / "store", threads=1, allow_partial=True)
    assert manifest["answers_unmatched"].keys() == {"logon"}
    assert manifest["answers_unmatched"]["logon"] > 5
    assert any("rows of the answer key are in no log" in told for told in manifest["warnings"])


def test_the_twin_that_compares_last_reads_them_all(release, tmp_path, monkeypatch):
    compare, waiting = cert._Ingest.compare_with_key, []
    unmatched = cert._Ingest.unmatched

    def last(self, answers):
        for name, bad in waiting:
            compare(self, name, bad)
        return unmatched(self, answers)

    monkeypatch.setattr(cert._Ingest, "compare_with_key",
                        lambda self, name, bad: waiting.append((name, bad)))
    monkeypatch.setattr(cert._Ingest, "unmatched", last)
    assert read_until_refused(release, tmp_path / "other", tmp_path, monkeypatch) == [*cert.LOGS]


def change_key(folder: Path, old: str, new: str) -> None:
    path = folder / "answers" / "r4.2-1" / "r4.2-1-AAA0001.csv"
    line = f"device,{log_lines('device', ROWS)[3]}"
    assert line in path.read_text()
    path.write_text(path.read_text().replace(line, line.replace(old, new)))


def told_to_differ(manifest: dict, key: str) -> bool:
    event = "2010-03-02 08:03:00 AAA0001 PC-0001"
    return (
        manifest["answers_unmatched"] == {"device": 1}
        and manifest["answers_differing"] == [{
            "log": "device", "insider": "AAA0001", "id": event_id("device", 3), "key": key,
            "event": event,
        }]
        and any(f"{key} in the key, {event} in the log" in told for told in manifest["warnings"])
    )


@pytest.mark.parametrize("old, new, key", KEY_CHANGES)
def test_an_answer_row_that_differs_from_its_event_is_listed(folder, tmp_path, old, new, key):
    change_key(folder, old, new)
    assert told_to_differ(cert.ingest(folder, tmp_path / "store"), key)


@pytest.mark.parametrize("old, new, key", KEY_CHANGES)
def test_matching_by_id_alone_would_not_see_it(folder, tmp_path, monkeypatch, old, new, key):
    """The twin: the key and the log compared in their ids only."""
    change_key(folder, old, new)
    monkeypatch.setattr(cert, "_EVENT_HEADER", ("id",))
    manifest = cert.ingest(folder, tmp_path / "store")
    assert not told_to_differ(manifest, key) and manifest["answers_unmatched"] == {}


def test_the_list_of_differing_answer_rows_is_bounded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cert, "MAX_DIFFERING", 2)
    path = folder / "answers" / "r4.2-1" / "r4.2-1-AAA0001.csv"
    path.write_text(path.read_text().replace("PC-0001", "PC-0009"))
    manifest = cert.ingest(folder, tmp_path / "store")
    assert manifest["answers_unmatched"] == {"logon": 1, "device": 2, "http": 1}
    assert [row["log"] for row in manifest["answers_differing"]] == ["logon", "device"]
    assert any("4 rows of the answer key differ" in told for told in manifest["warnings"])


def test_accounts_without_an_ldap_row_are_counted(folder, tmp_path):
    line = log_lines("logon", 1)[0].replace("AAA0001", "ZZZ9999").replace("A1BC", "Z1BC")
    with open(folder / "logon.csv", "a") as stream:
        stream.write(line + "\n")
    manifest = cert.ingest(folder, tmp_path / "store")
    assert manifest["users_without_ldap"] == 1 and manifest["logs"]["logon"]["users"] == 4


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logon.csv", "email.csv", "LDAP/2010-02.csv"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(folder, tmp_path, name):
    cert.ingest(folder, tmp_path / "before")
    path = folder / name
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
    cert.ingest(folder, tmp_path / "after")
    assert tables(tmp_path / "before") == tables(tmp_path / "after")
    assert quarantined(tmp_path / "after") == []


@pytest.mark.parametrize("block", [1, 7, 64, 1000, 1 << 20])
def test_the_size_of_a_block_changes_nothing(folder, tmp_path, monkeypatch, block):
    replace_line(folder / "http.csv", 5, "half a row")
    replace_line(folder / "http.csv", 8, "x" * 3000)
    replace_line(folder / "http.csv", 11, "")
    monkeypatch.setattr(cert, "MAX_LINE_BYTES", 2000)
    monkeypatch.setattr(cert, "BLOCK_BYTES", block)
    lenient(folder, tmp_path / "store")
    assert [(row["line"], row["reason"]) for row in quarantined(tmp_path / "store")] == [
        ("5", "expected 6 columns, found 1"),
        ("8", "the line is longer than 2000 bytes"),
        ("11", "the line is empty"),
    ]
    assert len(rows_of(tmp_path / "store", "SELECT id FROM http")) == ROWS - 3


def test_a_very_long_line_is_not_held_in_memory(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cert, "MAX_LINE_BYTES", 2000)
    monkeypatch.setattr(cert, "BLOCK_BYTES", 512)
    longest = 0

    def watched(block, table, real=cert._batches):
        nonlocal longest
        longest = max(longest, len(block.data))
        return real(block, table)

    monkeypatch.setattr(cert, "_batches", watched)
    replace_line(folder / "http.csv", 3, b"y" * 100_000)
    lenient(folder, tmp_path / "store")
    assert longest < 4000
    assert [row["line"] for row in quarantined(tmp_path / "store")] == ["3"]


def test_a_last_line_without_line_end_is_kept_only_if_it_is_known_to_be_whole(folder, tmp_path):
    for name in ("logon.csv", "http.csv"):
        path = folder / name
        path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    manifest = lenient(folder, tmp_path / "store")
    # "Logoff" ends the row for certain; the text of a page may have been cut.
    assert manifest["logs"]["logon"]["stored"] == ROWS
    assert manifest["logs"]["http"]["stored"] == ROWS - 1
    assert [(row["file"], row["line"]) for row in quarantined(tmp_path / "store")] == [
        ("http.csv", str(ROWS + 1))
    ]
    assert sum("no line end" in warning for warning in manifest["warnings"]) == 2


def test_a_control_character_in_a_last_line_without_line_end_is_seen(folder, tmp_path):
    """Nothing before the last line differs from a clean file here, not even the count of feeds."""
    path = folder / "logon.csv"
    path.write_bytes(path.read_bytes()[:-2] + b"\0f")
    lenient(folder, tmp_path / "store")
    (row,) = quarantined(tmp_path / "store")
    assert (row["line"], row["reason"]) == (str(ROWS + 1), "the line holds a NUL byte")


def test_a_file_cut_inside_its_last_line_loses_that_row_only_and_says_so(folder, tmp_path):
    path = folder / "logon.csv"
    path.write_bytes(path.read_bytes()[:-4])
    manifest = lenient(folder, tmp_path / "store")
    assert manifest["logs"]["logon"] | {"users": 0} == manifest["logs"]["logon"] | {
        "users": 0, "read": ROWS, "stored": ROWS - 1, "quarantined": 1,
    }
    assert [row["line"] for row in quarantined(tmp_path / "store")] == [str(ROWS + 1)]


def cut(path: Path, length: int, *, pack: bool) -> Path:
    """Drop the last bytes of a file, and pack it if told so; return where it is then."""
    data = path.read_bytes()[:-length]
    if not pack:
        path.write_bytes(data)
        return path
    path.unlink()
    packed = path.parent / f"{path.name}.gz"
    packed.write_bytes(gzip.compress(data))
    return packed


CUT_FILES = [
    ("logon.csv", 4, "the file ends within a row"),
    ("http.csv", 30, "the file ends with"),
    ("http.csv", 1, "the file ends without a line end"),  # the text may go on
    ("file.csv", 60, "the file ends within a row"),
    ("LDAP/2010-03.csv", 40, "the file ends within a row"),
    ("answers/r4.2-1/r4.2-1-AAA0001.csv", 70, "the file ends within a row"),
]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name, length, words", CUT_FILES)
def test_a_file_that_ends_within_a_row_is_refused_unless_told_otherwise(
    folder, tmp_path, name, length, words, pack
):
    path = cut(folder / name, length, pack=pack)
    n_line_ends = (gzip.decompress if pack else bytes)(path.read_bytes()).count(b"\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as refused:
        cert.ingest(folder, tmp_path / "store", max_quarantine_share=1.0)
    message = str(refused.value)
    assert f"{path}: line {n_line_ends + 1}: {words}" in message
    assert "--allow-truncated" in message and "--data STORE" in message
    assert sorted(tmp_path.iterdir()) == before
    manifest = lenient(folder, tmp_path / "store")
    assert len(quarantined(tmp_path / "store")) == manifest["rows"]["quarantined"] == 1
    assert all(map(accounted, [*manifest["logs"].values(), manifest["tables"]["answers"]]))


@pytest.mark.parametrize("pack", [False, True])
def test_a_complete_last_row_without_a_line_end_is_not_refused(folder, tmp_path, pack):
    """The broken twin of a cut file: only the line end is gone, and every row is stored."""
    for name in ("logon.csv", "answers/r4.2-1/r4.2-1-AAA0001.csv"):
        cut(folder / name, 1, pack=pack)
    manifest = cert.ingest(folder, tmp_path / "store")
    assert manifest["logs"]["logon"]["stored"] == ROWS
    assert manifest["rows"]["quarantined"] == 0


def test_a_repeated_last_row_without_a_line_end_is_not_taken_for_a_cut_one(folder, tmp_path):
    path = folder / "logon.csv"
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines()[-1])
    manifest = cert.ingest(folder, tmp_path / "store", max_quarantine_share=0.5)
    assert manifest["logs"]["logon"]["quarantined"] == 1


# --- bad rows -------------------------------------------------------------------------------------

GOOD = {log: log_lines(log, ROWS)[4] for log in cert.LOGS}
STEM, REST = GOOD["logon"].rsplit(",", 1)
MAIL = GOOD["email"].split(",")


def mail(**fields: str) -> str:
    cells = dict(zip(HEADERS["email"].split(","), MAIL, strict=True)) | fields
    return ",".join(cells.values())


BAD_ROWS = [
    ("logon", "", "the line is empty"),
    ("logon", STEM, "expected 5 columns, found 4"),
    ("logon", GOOD["logon"] + ",extra", "expected 5 columns, found 6"),
    ("http", GOOD["http"] + ", with a comma", "expected 6 columns, found 7"),
    ("logon", GOOD["logon"].replace("A1BC22DE", "A1BC22D"), "id is not"),
    ("logon", GOOD["logon"].replace("{", "").replace("}", ""), "id is not"),
    ("logon", GOOD["logon"].replace("03/02/2010", "3/2/2010"), "date is not"),
    ("logon", GOOD["logon"].replace("03/02/2010", "2010-03-02"), "date is not"),
    ("logon", GOOD["logon"].replace("03/02/2010", "13/02/2010"), "date is not"),
    ("logon", GOOD["logon"].replace("03/02/2010", "02/30/2010"), "date is not"),
    ("logon", GOOD["logon"].replace("03/02/2010", "03/02/1010"), "date is not"),
    ("logon", GOOD["logon"].replace("03/02/2010", " 3/02/2010"), "date is not"),
    ("logon", GOOD["logon"].replace("08:04:00", "08:04:0 "), "date is not"),
    ("logon", GOOD["logon"].replace("08:04:00", "24:04:00"), "date is not"),
    ("logon", GOOD["logon"].replace("08:04:00", "08:04"), "date is not"),
    ("logon", GOOD["logon"].replace("BBB0002", "DTAA/BBB0002"), "user is not"),
    ("logon", GOOD["logon"].replace("BBB0002", "bbb0002"), "user is not"),
    ("logon", GOOD["logon"].replace("BBB0002", ""), "user is not"),
    ("logon", GOOD["logon"].replace("PC-0002", "PC-02"), "pc is not"),
    ("logon", STEM + ",Insert", "activity is not Logon or Logoff"),
    ("device", STEM.replace("L7O1", "D7E1") + ",Logon", "activity is not Connect or Disconnect"),
    ("file", GOOD["file"].replace("F0000004.EXE", ""), "filename is empty"),
    ("email", mail(to=""), "to holds no list"),
    ("email", mail(to="a@b.com|c@d.com"), "to holds no list"),
    ("email", mail(to="nobody"), "to holds no list"),
    ("email", mail(cc="nobody"), "cc is not"),
    ("email", mail(bcc="a@b.com;;c@d.com"), "bcc is not"),
    ("email", mail(**{"from": ""}), "from is not an address"),
    ("email", mail(size="-5"), "size is negative"),
    ("email", mail(size="5.5"), "size is not a whole number"),
    ("email", mail(size="1e3"), "size is not a whole number"),
    ("email", mail(size=""), "size is not a whole number"),
    ("email", mail(attachments="-1"), "attachments is negative"),
    ("email", mail(attachments="R:\\a.doc"), "attachments is not a whole number"),
    ("http", GOOD["http"].replace("http://", ""), "url has no"),
    ("http", GOOD["http"].replace("boeing.com", ""), "url has no"),
    ("http", GOOD["http"].replace("few words", '"few words"'), "the line holds a quote"),
    ("http", GOOD["http"].replace("few", "few\0"), "the line holds a NUL byte"),
    ("http", GOOD["http"].replace("few", "few\x07"), "the line holds a control character"),
    ("http", GOOD["http"].replace("few", "few\rmore"), "the line holds a control character"),
    ("http", GOOD["http"].replace("few", "caf\xe9").encode("latin-1"), "the line is not UTF-8"),
    ("http", "x" * (1 << 20) + "y", "the line is longer than"),
    ("logon", log_lines("logon", 1)[0], "id occurs earlier in the file"),
    ("http", HEADERS["http"], "id is not"),
]


@pytest.mark.parametrize(
    "log, line, reason", BAD_ROWS, ids=[f"{case[0]}: {case[2]} {i}" for i, case in
                                        enumerate(BAD_ROWS)]
)
def test_a_bad_row_is_kept_apart_with_its_line_and_reason(tmp_path, log, line, reason):
    folder = write_folder(tmp_path / "release", rows=ROWS, logs=(log,), answers=False)
    replace_line(folder / f"{log}.csv", 6, line)
    manifest = lenient(folder, tmp_path / "store")
    (row,) = quarantined(tmp_path / "store")
    assert (row["file"], row["line"]) == (f"{log}.csv", "6")
    assert row["reason"].startswith(reason)
    assert len(row["text"]) <= cert.QUARANTINE_TEXT * 4
    assert "words" not in row["text"] and "http://" not in row["text"]
    assert manifest["logs"][log]["read"] == ROWS
    assert manifest["logs"][log]["stored"] == ROWS - 1
    assert event_id(log, 4) not in {r[0] for r in rows_of(tmp_path / "store",
                                                          f"SELECT id FROM {log}")}


@pytest.mark.parametrize(
    "log, line",
    [
        ("logon", GOOD["logon"]),
        ("logon", GOOD["logon"].replace("03/02/2010", "02/28/2010")),
        ("email", mail(to="a@b.com;", cc="c@d.org;e@f.net")),
        ("email", mail(size="0", attachments="0")),
        ("http", GOOD["http"].replace("http://", "https://")),
        ("http", GOOD["http"].replace("few words", "")),
        ("http", GOOD["http"].replace("few", "caf\xe9")),
    ],
)
def test_an_unusual_but_valid_row_is_stored(tmp_path, log, line):
    """The other side of the table above: what is refused there is refused for its fault."""
    folder = write_folder(tmp_path / "release", rows=ROWS, logs=(log,), answers=False)
    replace_line(folder / f"{log}.csv", 6, line)
    assert cert.ingest(folder, tmp_path / "store")["logs"][log]["stored"] == ROWS


def test_a_quoted_field_with_a_line_break_is_two_bad_rows_never_a_merged_one(folder, tmp_path):
    start, words = GOOD["http"].rsplit(",", 1)
    replace_line(folder / "http.csv", 6, f'{start},"{words}\nmore, words"')
    manifest = lenient(folder, tmp_path / "store")
    assert [row["line"] for row in quarantined(tmp_path / "store")] == ["6", "7"]
    assert manifest["logs"]["http"]["read"] == ROWS + 1
    assert manifest["logs"]["http"]["stored"] == ROWS - 1


def test_of_rows_with_one_id_the_first_in_the_file_is_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cert, "BLOCK_BYTES", 300)
    lines = log_lines("logon", ROWS)
    other = lines[9].replace(event_id("logon", 9), event_id("logon", 2))
    again = lines[10].replace(event_id("logon", 10), event_id("logon", 2))
    lines[9], lines[10] = other, again
    write_lines(folder / "logon.csv", HEADERS["logon"], lines)
    lenient(folder, tmp_path / "store")
    refused = quarantined(tmp_path / "store")
    assert [(row["line"], row["text"]) for row in refused] == [("11", other), ("12", again)]
    kept = rows_of(
        tmp_path / "store", f"SELECT date FROM logon WHERE id = '{event_id('logon', 2)}'"
    )
    assert kept == [(datetime(2010, 3, 1, 8, 2),)]


def test_a_bad_row_does_not_make_a_later_good_one_a_duplicate(folder, tmp_path):
    lines = log_lines("logon", ROWS)
    lines.insert(0, lines[3].replace("Logoff", "Nothing"))
    write_lines(folder / "logon.csv", HEADERS["logon"], lines)
    assert lenient(folder, tmp_path / "store")["logs"]["logon"]["stored"] == ROWS


def test_one_id_in_two_files_is_no_duplicate(folder, tmp_path):
    lines = [line.replace("{D7E1", "{L7O1") for line in log_lines("device", ROWS)]
    write_lines(folder / "device.csv", HEADERS["device"], lines)
    assert cert.ingest(folder, tmp_path / "store")["rows"]["quarantined"] == 0


@pytest.mark.parametrize(
    "name, line, reason",
    [
        ("LDAP/2010-02.csv", "Cora Cleo Cole,ccc13,a@dtaa.com,Salesman,1,,,,Ada", "user_id is not"),
        ("LDAP/2010-02.csv", "Ada Alma Abel,AAA0001,a@dtaa.com,Salesman,1,,,,Ada", "user occurs"),
        ("LDAP/2010-02.csv", "Cora,CCC0013", "expected 9 columns, found 2"),
        ("LDAP/2010-02.csv", "Cora,CCC0013,nowhere,Salesman,1,,,,Ada", "email is not"),
        ("psychometric.csv", "Cora,CCC0013,1,2,x,4,5", "E is not a whole number"),
        ("answers/insiders.csv", "4.2,3,a.csv,CCC0013,/21/2011 11:43:39,x", "start or end"),
        ("answers/insiders.csv", "4.2,9,a.csv,CCC0013,x,x", "scenario is not 1, 2 or 3"),
        ("answers/insiders.csv", "4.2,3", "expected 6 columns, found 2"),
    ],
)
def test_a_bad_row_of_a_small_table_is_kept_apart(folder, tmp_path, name, line, reason):
    replace_line(folder / name, 4, line)
    manifest = lenient(folder, tmp_path / "store")
    (row,) = quarantined(tmp_path / "store")
    assert (row["file"], row["line"]) == (name, "4") and row["reason"].startswith(reason)
    assert all(map(accounted, manifest["tables"].values()))


@pytest.mark.parametrize(
    "line, reason",
    [
        ("logon,{X},03/01/2010 08:00:00,AAA0001,PC-0001,Logon", "id is not"),
        ("web,x", "expected at least 6 columns"),
        (f"web,{GOOD['logon']}", "the first column is not the name of a log"),
        (f"logon,{GOOD['logon'].replace('03/02', '3/2')}", "date is not"),
        (f"logon,{log_lines('logon', 1)[0]}", "id occurs earlier"),
    ],
)
def test_a_bad_row_of_the_answer_key_stops_the_ingest_unless_told_otherwise(
    folder, tmp_path, line, reason
):
    replace_line(folder / "answers" / "r4.2-1" / "r4.2-1-AAA0001.csv", 2, line)
    with pytest.raises(UserError, match=re.escape("r4.2-1-AAA0001.csv")):
        cert.ingest(folder, tmp_path / "store")
    manifest = lenient(folder, tmp_path / "store")
    assert manifest["tables"]["answers"]["quarantined"] == 1
    (row,) = quarantined(tmp_path / "store")
    assert row["line"] == "2" and row["reason"].startswith(reason)


def test_more_bad_rows_than_allowed_stop_the_ingest_and_name_file_line_and_reason(
    folder, tmp_path
):
    write_lines(folder / "logon.csv", HEADERS["logon"], log_lines("logon", 200))
    replace_line(folder / "logon.csv", 51, "junk")
    replace_line(folder / "logon.csv", 81, GOOD["logon"].replace("PC-", "XX-"))
    assert cert.ingest(folder, tmp_path / "one percent")["logs"]["logon"]["quarantined"] == 2
    replace_line(folder / "logon.csv", 91, "junk")
    with pytest.raises(UserError) as stopped:
        cert.ingest(folder, tmp_path / "store")
    message = str(stopped.value)
    assert "logon.csv: 3 of 200 rows (1.5%) are bad, more than the 1.0% allowed" in message
    assert "2 x expected 5 columns, found 1 (first: line 51)" in message
    assert "1 x pc is not" in message
    assert not (tmp_path / "store").exists()


def test_rows_lost_on_the_way_are_noticed(folder, tmp_path, monkeypatch):
    """A reader that drops a row must not pass the accounting."""

    def dropping(block, table, real=cert._batches):
        for batch in real(block, table):
            yield batch.slice(1)

    monkeypatch.setattr(cert, "_batches", dropping)
    with pytest.raises(RuntimeError, match=r"3 rows read but 2 stored and 0 quarantined"):
        cert.ingest(folder, tmp_path / "store")
    assert not (tmp_path / "store").exists()


# --- bad folders ----------------------------------------------------------------------------------


def swap_header(name: str, header: str):
    return lambda folder: replace_line(folder / name, 1, header)


def write(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def remove(name: str):
    def act(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def several(*acts):
    return lambda folder: [act(folder) for act in acts]


BAD_FOLDERS = {
    "missing": (lambda folder: shutil.rmtree(folder), ["no such folder"]),
    "a file": (
        lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
        ["is a file, not a folder"],
    ),
    "no logs": (
        several(*(remove(f"{log}.csv") for log in cert.LOGS)),
        ["holds none of the logs", "logon.csv"],
    ),
    "no LDAP": (remove("LDAP"), ["LDAP: missing"]),
    "empty LDAP": (
        several(remove("LDAP/2010-02.csv"), remove("LDAP/2010-03.csv")), ["holds no month file"],
    ),
    "wrong header": (
        swap_header("logon.csv", "time,who,where,what"),
        ["logon.csv, line 1: wrong header", "id,date,user,pc,activity"],
    ),
    "shuffled columns": (
        swap_header("logon.csv", "date,id,user,pc,activity"), ["logon.csv, line 1: wrong header"],
    ),
    "no header": (
        lambda folder: write_lines(folder / "logon.csv", None, log_lines("logon", ROWS)),
        ["logon.csv, line 1: wrong header"],
    ),
    "quoted header": (
        swap_header("logon.csv", '"id","date","user","pc","activity"'),
        ["logon.csv quotes its fields"],
    ),
    "empty log": (
        lambda folder: write_lines(folder / "device.csv", HEADERS["device"], []),
        ["device.csv: holds no rows"],
    ),
    "a log of no bytes": (write("device.csv", b""), ["device.csv: is empty"]),
    "UTF-16": (
        write("logon.csv", (HEADERS["logon"] + "\n").encode("utf-16")), ["is UTF-16"],
    ),
    "one endless line": (write("logon.csv", b"x" * 200_000), ["logon.csv, line 1: wrong header"]),
    "damaged gz": (
        several(
            lambda folder: (folder / "logon.csv.gz").write_bytes(
                gzip.compress((folder / "logon.csv").read_bytes() * 50)[:-40]
            ),
            remove("logon.csv"),
        ),
        ["logon.csv.gz: the compressed file is damaged or ends early"],
    ),
    "no gz at all": (
        several(write("logon.csv.gz", b"plain text"), remove("logon.csv")),
        ["logon.csv.gz: the compressed file is damaged"],
    ),
    "wrong header of the answer key": (
        swap_header("answers/insiders.csv", "a,b"), ["insiders.csv, line 1: wrong header"],
    ),
    "an empty answer file": (
        write("answers/r4.2-2/r4.2-2-BBB0002.csv", b""), ["r4.2-2-BBB0002.csv: holds no rows"],
    ),
    "an unreadable date format": (
        lambda folder: write_lines(
            folder / "logon.csv", HEADERS["logon"],
            [line.replace("03/0", "3/0") for line in log_lines("logon", ROWS)],
        ),
        ["logon.csv: 12 of 12 rows (100.0%) are bad", "date is not"],
    ),
    "a log twice in one file": (
        lambda folder: write_lines(
            folder / "logon.csv", HEADERS["logon"], log_lines("logon", ROWS) * 2
        ),
        ["12 of 24 rows (50.0%) are bad", "id occurs earlier in the file (first: line 14)"],
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_refused_with_one_message_and_nothing_is_left(folder, tmp_path, case):
    damage, expected = BAD_FOLDERS[case]
    damage(folder)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as refused:
        cert.ingest(folder, tmp_path / "store", threads=1)
    for words in expected:
        assert words in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before


R5_EMAIL = "id,date,user,pc,to,cc,bcc,from,activity,size,attachments,content"
R5_LDAP = HEADERS["ldap"].replace("role,", "role,projects,")
OTHER_RELEASES = {
    "r1": (
        {"http.csv": "{H},01/04/2010 08:00:00,DTAA/AAA0001,PC-0001,http://a.com",
         "LDAP/2010-02.csv": "employee_name,user_id,Domain,Email,Role"},
        ["CERT r1,", "http.csv has no header row"],
    ),
    "r2": (
        {"email.csv": "id,date,to,from", "LDAP/2010-02.csv": "employee_name,user_id,email,role"},
        ["CERT r2,", "email.csv lacks user, pc"],
    ),
    "r3": (
        {"email.csv": "id,date,to,from,size,attachments,content"},
        ["CERT r3,", "email.csv lacks user, pc, cc, bcc"],
    ),
    "r5": (
        {"device.csv": "id,date,user,pc,file_tree,activity", "email.csv": R5_EMAIL,
         "LDAP/2010-02.csv": R5_LDAP},
        ["CERT r5,", "device.csv has file_tree", "LDAP/2010-02.csv has projects"],
    ),
    "r6": (
        {"http.csv": "id,date,user,pc,url,activity,content",
         "file.csv": "id,date,user,pc,filename,activity,to_removable_media,"
                     "from_removable_media,content"},
        ["CERT r6,", "http.csv has activity", "from_removable_media"],
    ),
    # http.csv of r4 and of r5 have one header; without it nothing tells r5 from r6.
    "r5 or r6": (
        {"LDAP/2010-02.csv": R5_LDAP, "http.csv": None},
        ["CERT r5 or r6,", "LDAP/2010-02.csv has projects"],
    ),
}


@pytest.mark.parametrize("name", OTHER_RELEASES)
def test_another_release_is_refused_by_name_with_what_differs(folder, tmp_path, name):
    headers, expected = OTHER_RELEASES[name]
    for path, header in headers.items():
        if header is None:
            (folder / path).unlink()
        else:
            replace_line(folder / path, 1, header)
    with pytest.raises(UserError) as refused:
        cert.recognise(folder)
    for words in expected:
        assert words in str(refused.value)
    assert "only r4.2 is read" in str(refused.value)


def test_the_headers_of_r4_2_are_recognised(folder):
    assert cert.recognise(folder) == "r4.2"


@pytest.mark.parametrize("name", ["r4.1", "r5.2", "r6.2", "r3.1"])
def test_a_folder_named_after_another_release_is_refused(folder, name):
    named = folder.rename(folder.parent / name)
    with pytest.raises(UserError, match=f"the folder is named {name}"):
        cert.recognise(named)


def test_the_folder_above_the_release_is_met_with_a_hint(folder, tmp_path):
    with pytest.raises(UserError, match=r"perhaps .*release"):
        cert.recognise(tmp_path)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"memory_limit": "much"}, "--memory-limit 'much' is not a size"),
        ({"threads": 0}, "--threads must be at least 1"),
        ({"max_quarantine_share": 2}, "--max-bad must be within 0 and 1"),
        ({"buckets": 0}, "buckets must be within 1 and 100"),
    ],
)
def test_an_impossible_option_is_refused_with_its_range(folder, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        cert.ingest(folder, tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


def test_an_empty_log_is_accepted_when_told_so(folder, tmp_path):
    write_lines(folder / "device.csv", HEADERS["device"], [])
    manifest = cert.ingest(folder, tmp_path / "store", allow_empty=True)
    assert manifest["logs"]["device"]["read"] == 0
    assert any("device.csv: holds no rows" in warning for warning in manifest["warnings"])
    assert rows_of(tmp_path / "store", "SELECT * FROM device") == []


def test_a_log_of_bad_rows_only_is_accepted_when_told_so(folder, tmp_path):
    write_lines(folder / "http.csv", HEADERS["http"], ["junk"] * 5)
    manifest = lenient(folder, tmp_path / "store")
    assert manifest["logs"]["http"]["quarantined"] == 5
    assert rows_of(tmp_path / "store", "SELECT * FROM http") == []


# --- the target: whole, reused, replaced ----------------------------------------------------------


def test_a_folder_that_is_not_a_store_is_never_overwritten(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not an event store, so it is not overwritten"):
        cert.ingest(folder, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        cert.ingest(folder, tmp_path / "file")
    for inside in (folder, folder.parent):
        with pytest.raises(UserError, match="must not be the release folder"):
            cert.ingest(folder, inside)


def test_an_unchanged_store_is_used_again_and_a_changed_one_rebuilt(folder, tmp_path):
    store = tmp_path / "store"
    first = cert.ingest(folder, store)
    written = (store / "manifest.json").stat().st_ino
    assert json.loads((store / "manifest.json").read_text()) == first

    def again(**options) -> bool:
        """Ingest once more; say whether the store was written anew."""
        nonlocal written
        cert.ingest(folder, store, **options)
        now = (store / "manifest.json").stat().st_ino
        rebuilt, written = now != written, now
        return rebuilt

    assert not again()
    assert not again(memory_limit="500MB", threads=1)
    os.utime(folder / "logon.csv", ns=(1, 1))
    assert not again(), "the same bytes at another time are the same file"
    line = log_lines("logon", ROWS)[0]
    replace_line(folder / "logon.csv", 2, line.replace("Logon", "Logof") + "f")
    replace_line(folder / "logon.csv", 3, log_lines("logon", ROWS)[1].replace("off", "on"))
    assert again(), "another content is another release"
    assert again(max_quarantine_share=0.5)
    (store / "events" / "logon" / "bucket=01" / "part-0.parquet").unlink()
    assert again(max_quarantine_share=0.5), "a store that lost a file is built again"
    (folder / "answers" / "r4.2-2" / "r4.2-2-BBB0002.csv").unlink()
    assert again(allow_partial=True)


def test_the_same_release_gives_the_same_bytes(folder, tmp_path):
    write_lines(folder / "http.csv", HEADERS["http"], log_lines("http", 600))
    cert.ingest(folder, tmp_path / "a")
    cert.ingest(folder, tmp_path / "b", threads=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    replace_line(folder / "http.csv", 7, log_lines("http", 700)[-1])
    cert.ingest(folder, tmp_path / "c")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_a_failure_at_the_last_step_leaves_the_old_store_whole(folder, tmp_path, monkeypatch):
    store = tmp_path / "store"
    cert.ingest(folder, store)
    before, names = contents(store), sorted(os.listdir(tmp_path))
    write_lines(folder / "logon.csv", HEADERS["logon"], log_lines("logon", 40))

    def full(*_):
        raise OSError(28, "No space left on device", "manifest.json")

    monkeypatch.setattr(cert, "write_json", full)
    with pytest.raises(UserError, match="No space left on device"):
        cert.ingest(folder, store)
    assert contents(store) == before and sorted(os.listdir(tmp_path)) == names


def test_a_file_that_changes_while_it_is_read_is_refused(folder, tmp_path, monkeypatch):
    def meddling(block, table, real=cert._batches):
        if table.name == "email":
            with open(folder / "email.csv", "a") as stream:
                stream.write("more\n")
        return real(block, table)

    monkeypatch.setattr(cert, "_batches", meddling)
    with pytest.raises(UserError, match=r"email\.csv: changed while it was read"):
        lenient(folder, tmp_path / "store")


def test_two_ingests_do_not_write_one_store_at_once(folder, tmp_path):
    with (
        cert._only_writer(tmp_path / "store"),
        pytest.raises(UserError, match="another ingest is writing it"),
    ):
        cert.ingest(folder, tmp_path / "store")
    cert.ingest(folder, tmp_path / "store")


def test_an_incomplete_store_is_not_opened(folder, tmp_path):
    with pytest.raises(UserError, match="no such event store"):
        cert.Store(tmp_path / "store")
    cert.ingest(folder, tmp_path / "store")
    assert cert.Store(tmp_path / "store").buckets == 4
    (tmp_path / "store" / "answers.parquet").unlink()
    with pytest.raises(UserError, match="files are missing or cut"):
        cert.Store(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no manifest\.json"):
        cert.Store(tmp_path / "store")


MANIFEST_FAULTS = [
    *((key, None) for key in cert._MANIFEST_TYPES),
    ("options", []), ("buckets", "4"), ("buckets", 0), ("files", {"answers.parquet": "big"}),
    ("sources", {"logon.csv": {"bytes": 3}}), ("sources", {"logon.csv": 3}), ("warnings", {}),
    ("rows", {"read": 3}), ("logs", {"logon": 7}), ("tables", {"ldap": {"read": 1}}),
]


@pytest.mark.parametrize("key, value", MANIFEST_FAULTS)
def test_a_store_of_a_damaged_manifest_is_refused_with_one_message(folder, tmp_path, key, value):
    store = tmp_path / "store"
    manifest = cert.ingest(folder, store)
    assert cert._well_formed(manifest), "the fault below is the only one"
    manifest.pop(key)
    if value is not None:
        manifest[key] = value
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="whole manifest"):
        cert.ingest(folder, store)
    with pytest.raises(UserError, match=r"no manifest\.json of an event store"):
        cert.Store(store)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"kind": "photographs"}', "[" * 100_000])
def test_a_folder_of_another_manifest_is_not_overwritten(folder, tmp_path, text):
    store = tmp_path / "store"
    store.mkdir()
    (store / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="not an event store, so it is not overwritten"):
        cert.ingest(folder, store)
    assert (store / "manifest.json").read_text() == text


def test_a_store_of_another_version_is_written_anew(folder, tmp_path):
    store = tmp_path / "store"
    cert.ingest(folder, store)
    before = contents(store)
    (store / "manifest.json").write_text(json.dumps({"kind": cert.STORE_KIND, "version": 0}))
    with pytest.raises(UserError, match="another version"):
        cert.Store(store)
    cert.ingest(folder, store)
    assert contents(store) == before


def refuse(name: str, monkeypatch, real):
    """Make a method of paths refuse the file `name` as the system would."""
    def refusing(self, *args, **kwargs):
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, real.__name__, refusing)


@pytest.mark.parametrize("name, method", [
    ("release", Path.exists), ("logon.csv", Path.is_file), ("LDAP", Path.iterdir),
    ("insiders.csv", Path.is_file), ("http.csv", Path.stat), ("store", Path.exists),
])
def test_what_may_not_be_read_or_written_is_told_by_name(
    folder, tmp_path, monkeypatch, name, method
):
    refuse(name, monkeypatch, method)
    with pytest.raises(UserError, match=rf"{re.escape(name)}: permission denied\. Change its"):
        cert.ingest(folder, tmp_path / "store")


def test_recognising_words_its_errors_too(folder, monkeypatch):
    refuse("LDAP", monkeypatch, Path.iterdir)
    with pytest.raises(UserError, match="LDAP: permission denied"):
        cert.recognise(folder)


@pytest.mark.parametrize("error, words", [
    (duckdb.InternalException("what"), "store: DuckDB cannot go on: what"),
    (duckdb.IOException("no space"), "store: cannot be read or written: no space"),
    (duckdb.OutOfMemoryException("full"), "a memory limit of 1GB is too small"),
])
def test_what_duckdb_refuses_is_one_message(folder, tmp_path, monkeypatch, error, words):
    def failing(*_):
        raise error

    monkeypatch.setattr(cert._Ingest, "ldap", failing)
    with pytest.raises(UserError, match=words):
        cert.ingest(folder, tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]


@pytest.mark.parametrize("error, seen", [
    (RuntimeError("Query interrupted"), KeyboardInterrupt), (RuntimeError("other"), RuntimeError),
    (BrokenPipeError(), BrokenPipeError),
])
def test_an_interrupt_and_a_defect_are_no_mistakes_of_the_user(
    folder, tmp_path, monkeypatch, error, seen
):
    def failing(*_):
        raise error

    monkeypatch.setattr(cert._Ingest, "ldap", failing)
    with pytest.raises(seen):
        cert.ingest(folder, tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]


def test_a_damaged_table_of_a_store_is_one_message(folder, tmp_path):
    cert.ingest(folder, tmp_path / "store")
    path = tmp_path / "store" / "ldap.parquet"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(UserError, match="store: "):
        cert.Store(tmp_path / "store").connect()


def test_a_part_is_found_from_the_account(folder, tmp_path):
    cert.ingest(folder, tmp_path / "store", buckets=4)
    store = cert.Store(tmp_path / "store")
    for user, bucket in rows_of(tmp_path / "store", 'SELECT DISTINCT "user", bucket FROM http'):
        assert store.bucket_of(user) == bucket
        assert Path(store.path("http", bucket=bucket)).parent.is_dir()
    with pytest.raises(ValueError, match="log must be one of"):
        store.path("printer")


def test_progress_is_told_to_the_given_function(folder, tmp_path):
    told = []
    cert.ingest(folder, tmp_path / "store", progress=told.append)
    assert any("http.csv" in line for line in told)
    cert.ingest(folder, tmp_path / "store", progress=told.append)
    assert "used as it is" in told[-1]


# --- the web --------------------------------------------------------------------------------------

HOSTS = st.sampled_from(
    (*cert._DOMAIN_CATEGORY, *cert.COMPETITOR_DOMAINS, "example.org", "spykeylogger.net")
)
URLS = st.builds(
    "http{}://{}{}{}/{}".format,
    st.sampled_from(["", "s"]),
    st.sampled_from(["", "www.", "jobs.", "not"]),
    HOSTS,
    st.sampled_from(["", "/Some_Topic/word", "/wboUhagvat/x"]),
    st.sampled_from(["", "WboUhagvat12.htm", "arjf3.php", "xarjf3.php", "x/y", "NEWS", "ARJF.x",
                     "arjf", "arjf?q=/WboUhagvat9.htm", "Fcbegf_yrnthr88.asp", "9.jsp",
                     "caf\u00e9"]),
)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(URLS, min_size=1, max_size=30))
def test_the_store_gives_a_url_the_category_of_web_category(tmp_path_factory, urls):
    base = tmp_path_factory.mktemp("web")
    folder = write_folder(base / "release", logs=(), answers=False)
    lines = [
        f"{event_id('http', n)},03/01/2010 08:00:00,AAA0001,PC-0001,{url},words"
        for n, url in enumerate(urls)
    ]
    write_lines(folder / "http.csv", HEADERS["http"], lines)
    cert.ingest(folder, base / "store", threads=1, buckets=1)
    stored = rows_of(base / "store", "SELECT domain, topic, category FROM http ORDER BY id")
    assert stored == [
        (cert.web_domain(url), cert.web_topic(url), cert.web_category(url)) for url in urls
    ]
    shutil.rmtree(base)


TOPICS = {  # the topic of a URL: ROT13 by hand
    "http://boeing.com/WboUhagvat77.htm": "jobhunting",
    "https://www.a.org/Some_Topic/word/arjf12.html": "news",
    "http://a.org/Some_Topic/word/Fcbegf_yrnthr1904.aspx": "sports_league",
    "http://a.org/Some_Topic/word/NEJF12.html": "arws",
    "http://arjf.org": "", "http://arjf.org/": "", "http://a.org/Some_Topic/word/12.html": "",
    "http://a.org/Some_Topic/word/arjf": "news", "http://a.org/arjf/x1.htm": "k",
}


def topics_are_read(folder: Path, store: Path) -> bool:
    lines = [
        f"{event_id('http', n)},03/01/2010 08:00:00,AAA0001,PC-0001,{url},words"
        for n, url in enumerate(TOPICS)
    ]
    write_lines(folder / "http.csv", HEADERS["http"], lines)
    lenient(folder, store)
    stored = [row[0] for row in rows_of(store, "SELECT topic FROM http ORDER BY id")]
    return stored == list(TOPICS.values()) == [cert.web_topic(url) for url in TOPICS]


def test_the_topic_of_a_url_is_decoded(folder, tmp_path):
    assert topics_are_read(folder, tmp_path / "store")


@pytest.mark.parametrize("decoded", [cert._LETTERS.lower(), cert._DECODED[1:] + "n"])
def test_a_wrong_decoding_would_be_seen(folder, tmp_path, monkeypatch, decoded):
    """The twins: letters left as they are, and letters moved by fourteen."""
    monkeypatch.setattr(cert, "_DECODED", decoded)
    assert not topics_are_read(folder, tmp_path / "store")


def test_every_table_of_domains_leads_to_its_category_and_none_is_in_two():
    groups = {
        "leak": cert.LEAK_DOMAINS, "hack": cert.KEYLOGGER_DOMAINS, "job": cert.JOB_DOMAINS,
        "cloud": cert.CLOUD_DOMAINS, "social": cert.SOCIAL_DOMAINS, "news": cert.NEWS_DOMAINS,
    }
    everything = [domain for domains in groups.values() for domain in domains]
    assert len(everything) == len(set(everything))
    for category, domains in groups.items():
        assert category in cert.WEB_CATEGORIES
        assert {cert.web_category(f"http://{d}/Topic/word/k1.htm") for d in domains} == {category}
    assert cert.web_category("http://example.org/Topic/word/k1.htm") == "other"


# --- fuzzing: a second reader, row by row in plain Python, must agree -----------------------------


def plain_verdicts(data: bytes, log: str) -> dict[int, bool]:
    """Return {line number: whether the row is good}, read the slow and simple way."""
    lines = data.split(b"\n")
    ended = lines[-1] == b""
    lines = lines[1:-1] if ended else lines[1:]
    seen: set[str] = set()
    verdicts = {}
    for number, raw in enumerate(lines, start=2):
        last = number == len(lines) + 1 and not ended
        good, identity = _plain_row(raw.removesuffix(b"\r"), log)
        if last and log not in ("logon", "device"):
            good = False
        verdicts[number] = good and identity not in seen
        if good:
            seen.add(identity)
    return verdicts


def _plain_row(raw: bytes, log: str) -> tuple[bool, str]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return False, ""
    if any(ord(c) < 32 or c == '"' for c in text) or len(raw) > cert.MAX_LINE_BYTES:
        return False, ""
    names = HEADERS[log].split(",")
    cells = text.split(",")
    if len(cells) != len(names):
        return False, ""
    row = dict(zip(names, cells, strict=True))
    patterns = {
        "id": r"\{[A-Z0-9]{4}-[A-Z0-9]{8}-[A-Z0-9]{8}\}",
        "user": r"[A-Z]{3}[0-9]{4}",
        "pc": r"PC-[0-9]{4}",
        "date": r"\d\d/\d\d/20\d\d \d\d:\d\d:\d\d",
        "activity": {"logon": "Logon|Logoff", "device": "Connect|Disconnect"}.get(log),
        "size": r"\d{1,12}",
        "attachments": r"\d{1,6}",
        "to": r"[^@;\s]+@[^@;\s]+(;[^@;\s]+@[^@;\s]+)*;?",
        "cc": r"([^@;\s]+@[^@;\s]+(;[^@;\s]+@[^@;\s]+)*;?)?",
        "bcc": r"([^@;\s]+@[^@;\s]+(;[^@;\s]+@[^@;\s]+)*;?)?",
        "from": r"[^@;\s]+@[^@;\s]+",
        "url": r"https?://[^/\s].*",
    }
    for name, value in row.items():
        if patterns.get(name) and not re.fullmatch(patterns[name], value, re.ASCII):
            return False, ""
    try:
        datetime.strptime(row["date"], "%m/%d/%Y %H:%M:%S")
    except ValueError:
        return False, ""
    if log == "file" and row["filename"].strip(" ") == "":
        return False, ""
    return True, row["id"]


SPLINTERS = st.sampled_from(
    [b"", b",", b'"', b"\n", b"\r\n", b"\r", b"\0", b"\xe9", b"\xc3\xa9", codecs.BOM_UTF8, b";",
     b" ", b"\t", b"-1", b"0", b"9" * 20, b"x" * 5000, b"@", b"{", b"\n\n", b'a,"b\nc"',
     b"3/1/2010 8:00:00", b"DTAA/", b"2010-03-01", b"\xff\xfe", b"\x1f\x8b", b"\xe2\x80\xa8"]
)
SPLINTERS = SPLINTERS | st.binary(max_size=6)
CUTS = st.tuples(st.integers(0, 10_000), st.integers(0, 40), SPLINTERS)
LINE_MOVES = st.sampled_from(
    ["none", "none", "none", "shuffle", "repeat", "crlf", "cut", "reverse", "transplant"]
)


def whole(log: str) -> bytes:
    return "".join(f"{line}\n" for line in [HEADERS[log], *log_lines(log, ROWS)]).encode()


def damaged(log: str, other: str, cuts: list, place: str, move: str, seed: int) -> bytes:
    """Return a log's bytes after a move of its lines and some cuts, the first at `place`."""
    lines = log_lines(log, ROWS)
    if move == "shuffle":
        random.Random(seed).shuffle(lines)
    elif move == "repeat":
        lines += lines[seed % ROWS :][:3]
    elif move == "reverse":
        lines[seed % ROWS] = ",".join(reversed(lines[seed % ROWS].split(",")))
    elif move == "transplant":
        lines.insert(seed % ROWS, log_lines(other, ROWS)[seed % 7])
    head, body = HEADERS[log].encode() + b"\n", ("\n".join(lines) + "\n").encode()
    if move == "crlf":
        body = body.replace(b"\n", b"\r\n")
    elif move == "cut":
        body = body[: max(1, len(body) - seed % 200)]
    for number, (at, length, splinter) in enumerate(cuts):
        if number == 0 and place == "header":
            at %= len(head) + 1
            head = head[:at] + splinter + head[at + length :]
        else:
            at %= len(body) + 1
            body = body[:at] + splinter + body[at + length :]
    return head + body


def has_header(data: bytes, log: str) -> bool:
    line = data.split(b"\n")[0].removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")
    return [cell.strip() for cell in line.split(",")] == HEADERS[log].split(",")


def lines_in(data: bytes) -> int:
    """Return how many lines a file has; a last one without a line end counts."""
    return data.count(b"\n") + (data != b"" and not data.endswith(b"\n"))


def fuzz(base: Path, log: str, other: str, data: bytes, block: int) -> str:
    """Ingest a damaged log beside a good one of the same ids; compare with the plain reader."""
    folder = base / "release"
    folder.mkdir()
    (folder / f"{log}.csv").write_bytes(data)
    beside = [line.replace(event_id(other, n), event_id(log, n))
              for n, line in enumerate(log_lines(other, ROWS))]
    write_lines(folder / f"{other}.csv", HEADERS[other], beside)
    people = ["Ada,AAA0001,a@dtaa.com,Salesman,1,,,,Ada"]
    write_lines(folder / "LDAP" / "2010-02.csv", HEADERS["ldap"], people)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cert, "BLOCK_BYTES", block)
        patch.setattr(cert, "MAX_LINE_BYTES", 4000)
        expected = plain_verdicts(data, log)
        if not has_header(data, log):
            with pytest.raises(UserError, match=rf"{log}\.csv"):
                lenient(folder, base / "store", allow_empty=True, buckets=1)
            assert not (base / "store").exists()
            return "refused"
        manifest = lenient(folder, base / "store", allow_empty=True, buckets=1)
    part = manifest["logs"][log]
    assert part["read"] == part["stored"] + part["quarantined"] == len(expected)
    assert part["read"] == lines_in(data) - 1  # counted from the bytes alone
    assert manifest["logs"][other]["read"] == manifest["logs"][other]["stored"] == ROWS
    refused = {(row["file"], int(row["line"])) for row in quarantined(base / "store")}
    assert refused == {(f"{log}.csv", number) for number, good in expected.items() if not good}
    stored = {row[0] for row in rows_of(base / "store", f"SELECT id FROM {log}")}
    raw = [b"", *data.split(b"\n")]
    assert stored == {raw[n].split(b",")[0].decode() for n, good in expected.items() if good}
    kept = {row[0] for row in rows_of(base / "store", f"SELECT id FROM {other}")}
    assert kept == {event_id(log, number) for number in range(ROWS)}
    return "read with bad rows" if refused else "read"


FUZZED = given(
    logs=st.permutations(cert.LOGS),
    cuts=st.lists(CUTS, max_size=4),
    place=st.sampled_from(["body", "body", "body", "header"]),
    move=LINE_MOVES,
    seed=st.integers(0, 1000),
    block=st.sampled_from([64, 700, 1 << 20]),
)


def run_fuzz(tmp_path_factory, examples: int) -> None:
    """Fuzz at least `examples` different damaged files, and count what becomes of them."""
    files: set[bytes] = set()
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=examples * 7 // 5, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )
    @FUZZED
    def one(logs, cuts, place, move, seed, block):
        log, other = logs[:2]
        data = damaged(log, other, cuts, place, move, seed)
        assume(data != whole(log))
        files.add(data)
        base = tmp_path_factory.mktemp("fuzz")
        outcomes[fuzz(base, log, other, data, block)] += 1
        shutil.rmtree(base)

    one()
    assert len(files) >= examples, len(files)
    for outcome in ("refused", "read with bad rows", "read"):
        assert outcomes[outcome] >= examples // 25, outcomes


def test_fifty_damaged_files_are_read_as_a_plain_reader_reads_them(tmp_path_factory):
    run_fuzz(tmp_path_factory, 50)


@pytest.mark.slow
def test_five_hundred_damaged_files_are_read_as_a_plain_reader_reads_them(tmp_path_factory):
    run_fuzz(tmp_path_factory, 500)


def test_the_plain_reader_tells_a_loader_that_misreads_quotes(tmp_path, monkeypatch):
    """The fuzzing above can fail: a loader that lets quotes pass is found out."""
    data = damaged("http", "logon", [(len(GOOD["http"]) - 3, 0, b'"')], "body", "none", 0)
    (tmp_path / "good").mkdir()
    assert fuzz(tmp_path / "good", "http", "logon", data, 700) == "read with bad rows"
    monkeypatch.setattr(cert, "_QUOTE", cert._GOOD)
    with pytest.raises(AssertionError):
        fuzz(tmp_path, "http", "logon", data, 700)


def test_the_fuzzing_tells_a_loader_that_reads_under_a_wrong_header(tmp_path, monkeypatch):
    """Another twin: columns in another order, taken for the right ones."""
    data = damaged("logon", "device", [(0, 7, b"date,id")], "header", "none", 0)
    (tmp_path / "good").mkdir()
    assert fuzz(tmp_path / "good", "logon", "device", data, 700) == "refused"
    monkeypatch.setattr(cert, "_recognise", lambda found: "r4.2")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        fuzz(tmp_path, "logon", "device", data, 700)


def test_the_fuzzing_tells_a_loader_that_takes_ids_for_unique_over_all_files(
    tmp_path, monkeypatch
):
    def over_all(self, source, table, stage, read, bad, real=cert._Ingest.duplicates):
        real(self, source, table, stage, read, bad)
        earlier = [path for path in (self.folder / "events").glob("*/*/*.parquet")]
        if not earlier:
            return self.count("duplicates")
        known = cert._parquet(self.folder / "events" / "*" / "*")
        self.connection.execute(
            f"INSERT INTO duplicates SELECT line FROM {cert._parquet(stage / 'bucket=*')}"
            f" WHERE id IN (SELECT id FROM {known})")
        return self.quarantine(source, "SELECT line, 'twice' AS reason, '' AS text FROM duplicates")

    data = damaged("logon", "device", [(3, 1, b"")], "body", "none", 0)
    (tmp_path / "good").mkdir()
    assert fuzz(tmp_path / "good", "logon", "device", data, 700) == "read with bad rows"
    monkeypatch.setattr(cert._Ingest, "duplicates", over_all)
    with pytest.raises(AssertionError):
        fuzz(tmp_path, "logon", "device", data, 700)


@pytest.mark.parametrize("target", ["LDAP/2010-02.csv", "psychometric.csv", "answers/insiders.csv",
                                    "answers/r4.2-1/r4.2-1-AAA0001.csv"])
@settings(max_examples=8, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))
@given(cuts=st.lists(CUTS, min_size=1, max_size=3))
def test_a_damaged_small_file_gives_a_store_or_one_message(tmp_path_factory, target, cuts):
    base = tmp_path_factory.mktemp("small")
    folder = write_folder(base / "release", rows=1, logs=("logon",))
    path = folder / target
    data = path.read_bytes()
    for at, length, splinter in cuts:
        at %= len(data) + 1
        data = data[:at] + splinter + data[at + length :]
    assume(data != path.read_bytes())
    path.write_bytes(data)
    try:
        manifest = lenient(folder, base / "store")
    except UserError as refused:
        assert path.name in str(refused)
        assert not (base / "store").exists()
    else:
        assert all(map(accounted, manifest["tables"].values()))
        kind = {"LDAP": "ldap", "answers/r4.2-1": "answers"}.get(str(Path(target).parent),
                                                                 path.stem)
        files = {"ldap": "LDAP/*.csv", "answers": "answers/r4.2-*/*.csv"}.get(kind, target)
        there = [lines_in(file.read_bytes()) for file in folder.glob(files)]
        headers = 0 if kind == "answers" else len(there)
        assert manifest["tables"][kind]["read"] == sum(there) - headers
    shutil.rmtree(base)


# --- kills ----------------------------------------------------------------------------------------

# Ingests in forked children that end at once before or after a chosen step: a rename, the writing
# of the manifest and, for "all" steps, a removal of a folder. Printed: the fate of each child.
CRASHES = """
import contextlib, json, os, shutil, sys
from pathlib import Path
from ueba_helpers.data import cert

release, base, writer, kinds, steps = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]


@contextlib.contextmanager
def in_place(store):
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir()
    yield store


def ingest(store, die_at=None, **options):
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(write_end)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, os.read(read_end, 99).decode()
    met = 0

    def step():
        nonlocal met
        if met == die_at:
            os._exit(9)
        met += 1

    def watched(real):
        def call(*args, **kwargs):
            step()
            result = real(*args, **kwargs)
            step()
            return result
        return call

    if writer == "in place":
        cert._replacing = in_place
    os.replace, cert.write_json = watched(os.replace), watched(cert.write_json)
    if steps == "all":
        shutil.rmtree = watched(shutil.rmtree)
    try:
        cert.ingest(release, store, threads=1, **options)
        os.write(write_end, str(met).encode())
        os._exit(0)
    finally:
        os._exit(1)


fates = {}
for kind in kinds.split():
    def prepared(name):
        store = base / name / "store"
        if kind == "over":  # a store of other options stands there
            assert ingest(store, buckets=1)[0] == 0
        return store
    for at in range(int(ingest(prepared(kind + "-whole"))[1])):
        fates[f"{kind}-{at}"] = ingest(prepared(f"{kind}-{at}"), at)[0]
print(json.dumps(fates))
"""


def crash_everywhere(
    release: Path, base: Path, kinds: str, steps: str, *, writer: str = "beside", at_least: int = 8
) -> list[str]:
    """Return what is wrong after ingests that ended at every step, and a second ingest each."""
    cert.ingest(release, base / "undisturbed", threads=1)
    expected = contents(base / "undisturbed")
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, release, base, writer, kinds, steps], check=True,
        capture_output=True, text=True,
    )
    fates, faults = json.loads(done.stdout), []
    assert set(fates.values()) == {9}, "every step is met, and the child ends there"
    assert len(fates) >= at_least, fates
    for name in fates:
        store = base / name / "store"
        try:
            if store.exists():
                cert.Store(store)
            cert.ingest(release, store, threads=1)
        except UserError as error:
            faults.append(f"{name}: {error}")
            continue
        if contents(store) != expected:
            faults.append(f"{name}: another store")
        if (left := sorted(path.name for path in store.parent.iterdir())) != ["store"]:
            faults.append(f"{name}: left {left}")
    return faults


@pytest.fixture
def small_release(tmp_path) -> Path:
    release = write_folder(tmp_path / "release", rows=ROWS, logs=("logon",))
    shutil.rmtree(release / "answers")
    return release


def test_an_ingest_that_dies_at_a_rename_is_made_good_by_a_second_one(small_release, tmp_path):
    # the manifest written and moved into place, the old store put aside, the new one moved in
    assert crash_everywhere(small_release, tmp_path / "stores", "over", "renames") == []


@pytest.mark.slow
def test_an_ingest_that_dies_at_any_step_is_made_good_by_a_second_one(folder, tmp_path):
    base = tmp_path / "stores"
    assert crash_everywhere(folder, base, "fresh over", "all", at_least=50) == []


def test_an_ingest_into_its_target_would_not_be(small_release, tmp_path):
    """The twin: a writer without a folder beside its target."""
    base = tmp_path / "stores"
    assert crash_everywhere(
        small_release, base, "fresh", "renames", writer="in place", at_least=4) != []


def test_a_sweep_leaves_the_folder_of_an_ingest_at_work(folder, tmp_path):
    store = tmp_path / "store"
    cert.ingest(folder, store)
    with cert._only_writer(store):
        (tmp_path / ".store.ingest-new").mkdir()
        cert.ingest(folder, store)
        assert (tmp_path / ".store.ingest-new").exists()
    (tmp_path / ".store.lock").touch()
    cert.ingest(folder, store)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release", "store"]


@pytest.mark.slow
def test_an_ingest_killed_at_any_point_is_made_good_by_a_second_one(tmp_path):
    folder = write_folder(tmp_path / "release", rows=1)
    for log in ("logon", "http"):
        lines = [
            line.replace("-A1BC22DE-", f"-A{part:03d}22DE-")
            for part in range(60)
            for line in log_lines(log, 900)
        ]
        write_lines(folder / f"{log}.csv", HEADERS[log], lines)
    store = tmp_path / "stores" / "store"
    command = [
        sys.executable, "-c",
        "import sys; from ueba_helpers.data.cert import ingest; ingest(sys.argv[1], sys.argv[2])",
    ]
    began = time.monotonic()
    subprocess.run([*command, folder, tmp_path / "undisturbed"], check=True)
    whole = time.monotonic() - began
    expected = contents(tmp_path / "undisturbed")
    rng, killed, disturbed = random.Random(0), 0, 0
    for attempt in range(12):
        if attempt % 3 == 2:
            # A store of other options stands there: the killed ingest is to replace it.
            cert.ingest(folder, store, buckets=1)
        process = subprocess.Popen([*command, folder, store])
        time.sleep(rng.uniform(0.1, 1.0) * whole)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        disturbed += any(p.name.startswith(".store.ingest") for p in store.parent.glob(".*"))
        if store.exists():
            cert.Store(store)  # Whatever stands there is whole.
        subprocess.run([*command, folder, store], check=True)
        assert contents(store) == expected
        assert sorted(p.name for p in store.parent.iterdir()) == ["store"]
        if attempt % 2:
            shutil.rmtree(store)
    assert killed >= 4 and disturbed >= 1, "the kills came too late to test anything"
