"""From hostile log files to prompts: nothing that a person under suspicion writes is believed.

A simulated release is rewritten: on malicious days every file name, page, address and content, and
in every month every role and department, becomes a text of the injection suite. The release goes
the way of all data (ingest, windows, evidence, prompts) and comes out as the clean one does.
"""

import itertools
import re
import shutil
from dataclasses import replace

import pandas as pd
import pytest

from tests.test_prompts import is_safe
from tests.tiny import checkpoint
from ueba_helpers.data import cert, windows
from ueba_helpers.errors import UserError
from ueba_helpers.rl.policies import load_tokenizer
from ueba_helpers.task import prompts
from ueba_helpers.task.injections import INJECTIONS
from ueba_helpers.task.prompts import escape_field, prompt_dataset, target_verdict, unescape_field
from ueba_helpers.task.verdicts import parse_verdict

# What of an injection a line of a log can hold: no quote, comma, control character or half
# character. The ingest refuses the rest (`test_what_no_line_may_hold_is_refused`).
STORABLE = [text for injection in INJECTIONS
            if (text := re.sub("[\x00-\x1f\x7f\",\ud800-\udfff]", "", injection).strip())]
FIELDS = {"file": (4, 5), "http": (4, 5), "email": (4, 5, 6, 10)}  # what a person writes, by column
DAY = slice(6, 10), slice(0, 2), slice(3, 5)


def hostile_field(log, column, old, text):
    """Return the injection as it fits the field; what the study reads of a field is kept."""
    if log == "file" and column == 4:
        return f"{text}.{old.rpartition('.')[2]}"
    if log == "http" and column == 4:
        return f"{old}/{text}"
    if log == "email" and column in (4, 5, 6):
        local = re.sub(r"[@;\s]", "", text)[:200] or "x"
        return ";".join(f"{local}@{address.rpartition('@')[2]}" for address in old.split(";")
                        if address)
    return text


def rewritten(line, log, texts):
    cells = line.split(",")
    return ",".join(hostile_field(log, i, cell, next(texts)) if i in FIELDS[log] else cell
                    for i, cell in enumerate(cells))


def edit(path, change):
    """Rewrite the lines of a file below its header."""
    header, *lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    path.write_bytes("".join(f"{line}\n" for line in [header, *map(change, lines)]).encode())


def malicious_days(release):
    lines = [line.split(",") for path in (release / "answers").glob("r4.2-*/*.csv")
             for line in path.read_text().splitlines()]
    return {(cells[3], "-".join(cells[2][part] for part in DAY)) for cells in lines}


def make_hostile(release, folder):
    """Copy a release with injections in every field that people write; return the folder."""
    shutil.copytree(release, folder)
    texts, days = itertools.cycle(STORABLE), malicious_days(release)
    for log in FIELDS:
        edit(folder / f"{log}.csv", lambda line, log=log: rewritten(line, log, texts)
             if (line.split(",")[2], "-".join(line.split(",")[1][part] for part in DAY)) in days
             else line)
    for path in sorted((folder / "LDAP").glob("*.csv")):
        again = itertools.cycle(STORABLE)  # the same texts for an account in every month
        edit(path, lambda line, again=again: ",".join(
            next(again) if i in (3, 6) else cell for i, cell in enumerate(line.split(","))))
    return folder


@pytest.fixture(scope="module")
def hostile_release(release, tmp_path_factory):
    return make_hostile(release, tmp_path_factory.mktemp("hostile") / "r4.2")


@pytest.fixture(scope="module")
def hostile_store(hostile_release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "store"
    cert.ingest(hostile_release, folder, threads=1)
    return folder


@pytest.fixture(scope="module")
def pairs(release, windows_table, store, hostile_store, tmp_path_factory):
    """Every malicious window and one of each other account, clean and hostile, side by side."""
    folder = tmp_path_factory.mktemp("hostile") / "windows"
    windows.build(hostile_store, folder, threads=1)
    table = pd.read_parquet(folder / "windows.parquet")
    late = windows_table.groupby("user").tail(1)["window_id"]
    wanted = {*windows_table.loc[windows_table["malicious"], "window_id"], *late}
    made = []
    for source, rows in ((store, windows_table), (hostile_store, table)):
        rows = rows[rows["window_id"].isin(wanted)].sort_values("window_id")
        made.append(windows.load(rows, windows.evidence(source, rows, max_items=14)))
    return list(zip(*made, strict=True))


def message(window):
    return prompts.window_messages(window)[1]["content"]


def shown_ids(window):
    return [item.id for item in prompts.keep_items(window, prompts.MAX_ITEMS).evidence]


def caught(pairs, write=message):
    """Return how many hostile windows have a prompt that the safety check rejects."""
    return sum(not is_safe(write(bad), shown_ids(clean), message(clean)) for clean, bad in pairs)


def test_the_injections_are_in_the_logs_and_in_the_store(hostile_release, hostile_store, pairs):
    assert len(STORABLE) >= 0.9 * len(INJECTIONS) and len(pairs) > 50
    for log in FIELDS:
        text = (hostile_release / f"{log}.csv").read_text(encoding="utf-8")
        found = sum(words in text or re.sub(r"[@;\s]", "", words)[:200] in text
                    for words in STORABLE)
        assert found >= 15, (log, found)
    with cert.Store(hostile_store).connect() as connection:
        names = {name for name, in connection.execute("SELECT filename FROM file").fetchall()}
        columns = {log: {name for name, *_ in connection.execute(f"DESCRIBE {log}").fetchall()}
                   for log in FIELDS}
    stored = {text for text in STORABLE if any(name.startswith(text) for name in names)}
    assert len(stored) >= 10
    assert not {"content", "url", "to", "cc", "bcc"} & set().union(*columns.values())
    assert {bad.role for _, bad in pairs} | {bad.department for _, bad in pairs} >= {*STORABLE[:40]}


def test_hostile_fields_change_nothing_but_the_words_of_the_heading(pairs):
    """File names, pages, addresses and contents end at the windows: classes and counts leave."""
    for clean, bad in pairs:
        assert replace(bad, role=clean.role, department=clean.department) == clean
        assert bad.role != clean.role and bad.department != clean.department
    clean, _ = pairs[0]
    twin = replace(clean, evidence=tuple(replace(item, detail="x") for item in clean.evidence))
    assert twin != clean, "the comparison sees the evidence"


def test_no_prompt_believes_them(pairs):
    assert caught(pairs) == 0
    for _, bad in pairs:
        words = message(bad).split("\n")[0].split(" ")
        assert words[1:-1] == [escape_field(bad.role), escape_field(bad.department)]
        assert bad.role.startswith(unescape_field(words[1]))


def test_ids_verdicts_and_rewards_columns_are_those_of_the_clean_release(pairs):
    clean = prompt_dataset([window for window, _ in pairs])
    hostile = prompt_dataset([window for _, window in pairs])
    for (window, bad), one, other in zip(pairs, clean, hostile, strict=True):
        differ = {name for name in one if one[name] != other[name]}
        assert differ == {"prompt"}, "ids, truth and item lines are the same"
        assert target_verdict(bad) == target_verdict(window)
        assert parse_verdict(target_verdict(bad), other["evidence_ids"]).valid
    forged = re.sub(r'"e\d+"', '"e99"', target_verdict(pairs[0][0], risk="malicious"), count=1)
    assert parse_verdict(forged, clean[0]["evidence_ids"]).problem == "unknown_evidence"


def special_tokens(tokenizer, content):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=True,
                                        return_dict=True)["input_ids"]
    return [token for token in ids if token in set(tokenizer.all_special_ids)]


def test_no_template_marker_becomes_a_special_token(pairs):
    tokenizer = load_tokenizer(checkpoint())
    expected = special_tokens(tokenizer, "hello")
    assert 1 < len(expected) < 5
    assert all(special_tokens(tokenizer, message(bad)) == expected for _, bad in pairs)
    raw = [special_tokens(tokenizer, f"{bad.role} {bad.department}") for _, bad in pairs]
    assert sum(found != expected for found in raw) >= 2, "unescaped they would open turns"


def test_a_prompt_writer_that_does_not_escape_is_caught(pairs, monkeypatch):
    monkeypatch.setattr(prompts, "escape_field", lambda text, **_: str(text))
    assert caught(pairs) >= 0.9 * len(pairs)


def quoting_names(window, names):
    """Break the rule that fields end at the windows: name the first file of each file item."""
    return replace(window, evidence=tuple(
        replace(item, facts=(*item.facts, names[item.events[0]])) if item.kind == "file" else item
        for item in window.evidence))


def test_windows_that_quoted_file_names_would_still_be_escaped(pairs, hostile_store, monkeypatch):
    with cert.Store(hostile_store).connect() as connection:
        names = dict(connection.execute("SELECT id, filename FROM file").fetchall())
    shown = [[prompts.keep_items(window, prompts.MAX_ITEMS) for window in pair]
             for pair in pairs if pair[0].risk == "malicious"]
    leaky = [(clean, quoting_names(bad, names)) for clean, bad in shown
             if any(item.kind == "file" for item in clean.evidence)]
    assert len(leaky) >= 5
    assert caught(leaky) == 0
    monkeypatch.setattr(prompts, "escape_field", lambda text, **_: str(text))
    assert caught(leaky) == len(leaky)


def test_a_forged_host_never_reaches_the_store(release, tmp_path):
    """Hosts and ids have one form; a row with another is refused, and many stop the ingest."""
    folder = tmp_path / "r4.2"
    shutil.copytree(release, folder)
    days, texts = malicious_days(release), itertools.cycle(STORABLE)
    edit(folder / "device.csv", lambda line: ",".join(
        next(texts) if i == 3 else cell for i, cell in enumerate(line.split(",")))
        if (line.split(",")[2], "-".join(line.split(",")[1][part] for part in DAY)) in days
        else line)
    with pytest.raises(UserError, match=r"device\.csv: .* are bad, .* pc is not PC-"):
        cert.ingest(folder, tmp_path / "strict", threads=1)
    cert.ingest(folder, tmp_path / "store", threads=1, max_quarantine_share=0.5)
    refused = pd.read_csv(tmp_path / "store" / "quarantine.csv")
    assert set(refused["reason"]) == {"pc is not PC- and four digits"} and len(refused) >= 10
    with cert.Store(tmp_path / "store").connect() as connection:
        hosts = {pc for pc, in connection.execute("SELECT DISTINCT pc FROM device").fetchall()}
    assert all(re.fullmatch("PC-[0-9]{4}", host) for host in hosts)


@pytest.mark.parametrize("text", ['x"y', "x,y", "x\x00y", "x\x1b[2Ky", "x\ry"])
def test_what_no_line_may_hold_is_refused(text, tmp_path):
    from tests.cert_folder import event_id, write_folder

    folder = write_folder(tmp_path / "r4.2")
    path = folder / "file.csv"
    lines = path.read_text().split("\n")
    cells = lines[1].split(",")
    lines[1] = ",".join([*cells[:4], text + ".doc", cells[5]])
    path.write_bytes("\n".join(lines).encode())
    cert.ingest(folder, tmp_path / "store", threads=1, max_quarantine_share=0.1)
    with cert.Store(tmp_path / "store").connect() as connection:
        kept = {name for name, in connection.execute("SELECT id FROM file").fetchall()}
    assert kept == {event_id("file", number) for number in range(1, 120)}
