"""Read and validate a CERT r4.2 folder into a Parquet event store.

Comes in: a folder with any of `logon.csv device.csv file.csv email.csv http.csv` (plain or `.gz`),
`LDAP/YYYY-MM.csv`, `psychometric.csv`, and `answers/` beside or inside it.
Goes out: a store folder, `events/<log>/bucket=NN/*.parquet` sorted by account and time, the small
tables, `quarantine.csv` with file, line, reason and the first columns of every refused row, and
`manifest.json`, written last. `Store` opens it.
Refuses: other releases (recognised by header and named), wrong or missing headers, empty logs, a
file that ends within a row, a log of which more than a stated share of rows is bad, or many events
of the answer key are missing, and a key without the file of an insider it lists.
Page and message texts (`content`) are never stored, nor whole URLs. What is kept of a bad row ends
before the first column of text, addresses or URLs, at 80 characters; a line that is no row at all
is cut as if it were one, so 80 characters of stray text may stay. Of a page, its host, the topic
its URL names (decoded) and a category are kept. The category is the page's only flag; r4.2 has no
column that tells an upload from a visit.

How it stays exact and small. Bytes are cut into lines and fields here, with NumPy, because r4.2 has
no quotes and no embedded commas: a line with a quote, a control character, bytes that are not UTF-8
or the wrong number of commas is a bad row by definition, and no CSV dialect has to be guessed. The
fields go to DuckDB as Arrow string views over the block that was read (nothing is copied, one block
is in memory at a time), and SQL checks and types them. Every line after the header counts as one
row read, and rows read = rows stored + rows quarantined is asserted for each file.
"""

import codecs
import contextlib
import csv
import fcntl
import functools
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ueba_helpers.data.files import sha256_of, write_json
from ueba_helpers.errors import UserError

LOGS = ("logon", "device", "file", "email", "http")
ORGANISATION_DOMAIN = "dtaa.com"
DATE_FORMAT = "%m/%d/%Y %H:%M:%S"

# What the real r4.2 holds. The two views of a positive day: the account, the insider.
R4_2_FACTS = {
    "rows": {
        "logon": 854_859, "device": 405_380, "file": 445_581, "email": 2_629_979,
        "http": 28_434_423,
    },
    "insiders": {"1": 30, "2": 30, "3": 10},
    "positive_days": {"account": 986, "insider": 966},
}
# The releases that the one insiders.csv of all of them names.
DATASETS = ("1", "2", "3.1", "3.2", "4.1", "4.2", "5.1", "5.2", "6.1", "6.2")

# Scenario 1 uploads to a leak site.
LEAK_DOMAINS = ("wikileaks.org",)
# Scenario 3 fetches a keylogger; any domain with "keylog" in it counts as well.
KEYLOGGER_DOMAINS = (
    "actualkeylogger.com",
    "best-spy-soft.com",
    "dailykeylogger.com",
    "keylogpc.com",
    "refog.com",
    "relytec.com",
    "softactivity.com",
    "spectorsoft.com",
    "webwatchernow.com",
    "wellresearchedreviews.com",
)
# Pure job boards. Job pages on other sites (competitors, portals) are known by their slug.
JOB_DOMAINS = (
    "careerbuilder.com",
    "indeed.com",
    "job-hunt.org",
    "jobhuntersbible.com",
    "monster.com",
    "simplyhired.com",
)
# Competitors and partners: as mail recipients, and as sites that carry job pages.
COMPETITOR_DOMAINS = (
    "boeing.com",
    "harris.com",
    "hp.com",
    "lockheedmartin.com",
    "northropgrumman.com",
    "raytheon.com",
)
CLOUD_DOMAINS = (
    "4shared.com",
    "dropbox.com",
    "filefreak.com",
    "fileserve.com",
    "filestube.com",
    "mediafire.com",
    "megaupload.com",
    "rapidshare.com",
)
SOCIAL_DOMAINS = (
    "badoo.com",
    "facebook.com",
    "flickr.com",
    "linkedin.com",
    "match.com",
    "myspace.com",
    "plentyoffish.com",
    "reddit.com",
    "tagged.com",
    "tumblr.com",
    "twitter.com",
    "youtube.com",
)
NEWS_DOMAINS = (
    "bbc.co.uk",
    "cnn.com",
    "foxnews.com",
    "huffingtonpost.com",
    "nytimes.com",
    "reuters.com",
    "usatoday.com",
    "washingtonpost.com",
    "wsj.com",
)
WEB_CATEGORIES = ("job", "leak", "hack", "cloud", "social", "news", "other")
# What a page's topic begins with, and the category that gives it: the topics known to decide one.
TOPIC_CATEGORIES = {"jobhunting": "job", "news": "news"}

_DOMAIN_CATEGORY = {
    **dict.fromkeys(LEAK_DOMAINS, "leak"),
    **dict.fromkeys(KEYLOGGER_DOMAINS, "hack"),
    **dict.fromkeys(JOB_DOMAINS, "job"),
    **dict.fromkeys(CLOUD_DOMAINS, "cloud"),
    **dict.fromkeys(SOCIAL_DOMAINS, "social"),
    **dict.fromkeys(NEWS_DOMAINS, "news"),
}

STORE_KIND = "cert-event-store"
STORE_VERSION = 2
BLOCK_BYTES = 8 << 20
MAX_LINE_BYTES = 1 << 20
QUARANTINE_TEXT = 80  # of a bad row: id, date, user and pc, which take 60
MAX_DIFFERING = 100
# Of the key's rows of one log: the most that may have no equal event, as a share and as a count.
MOST_UNMATCHED, FEW_UNMATCHED = 0.05, 5

Progress = Callable[[str], None]


# --- the web: what a URL is about -----------------------------------------------------------------


def web_domain(url: str) -> str:
    """Return the lower-case host of a URL without a leading `www.`.

    >>> web_domain("http://www.Monster.com/Topic/word/WboUhagvat12.html")
    'monster.com'
    """
    host = url.lower().split("/")[2] if url.count("/") >= 2 else ""
    return host.removeprefix("www.")


def domain_category(domain: str) -> str | None:
    """Return the category of a host from the tables of this module, subdomains included, or None.

    >>> domain_category("jobs.monster.com"), domain_category("free-keylogger.net")
    ('job', 'hack')
    >>> domain_category("example.org") is None
    True
    """
    if "keylog" in domain:
        return "hack"
    parts = domain.split(".")
    for start in range(len(parts) - 1):
        category = _DOMAIN_CATEGORY.get(".".join(parts[start:]))
        if category is not None:
            return category
    return None


def web_topic(url: str) -> str:
    """Return the topic words of a URL, decoded, in lower case; "" where it names none.

    r4.2 writes http://domain/Topic/keyword/<slug><number>.<ending>; the slug is ROT13.

    >>> web_topic("http://boeing.com/Some_Topic/word/WboUhagvat1904.htm"), web_topic("http://a.com")
    ('jobhunting', '')
    """
    parts = url.split("/")
    slug = re.match(_SLUG, parts[-1])[0] if len(parts) > 3 else ""
    return slug.translate(str.maketrans(_LETTERS, _DECODED))


def web_category(url: str) -> str:
    """Return the topic category of a URL, one of `WEB_CATEGORIES`.

    A leak or keylogger host decides first, then a topic of job hunting, then the host tables, then
    a news topic.

    >>> web_category("http://boeing.com/WboUhagvat1904.htm")
    'job'
    >>> web_category("http://wikileaks.org/Some_Topic/word/arjf12.php")
    'leak'
    >>> web_category("http://example.org/Some_Topic/word/arjf12.php")
    'news'
    """
    host = domain_category(web_domain(url))
    if host in ("leak", "hack"):
        return host
    topic = web_topic(url)
    named = next((c for word, c in TOPIC_CATEGORIES.items() if topic.startswith(word)), None)
    if named == "job":
        return "job"
    return host or named or "other"


_SLUG = "[^0-9.?#]*"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_DECODED = codecs.encode(_LETTERS, "rot13").lower()
_SLUG_SQL = (
    # "https://" has eight signs, and a host has at least one
    f"CASE WHEN contains(substr(url, 9), '/') THEN regexp_extract(split_part(url, '/', -1),"
    f" '^{_SLUG}') ELSE '' END"
)
_HOST_SQL = "CASE WHEN contains(domain, 'keylog') THEN 'hack' {} END".format(" ".join(
    f"WHEN domain = '{domain}' OR ends_with(domain, '.{domain}') THEN '{category}'"
    for domain, category in _DOMAIN_CATEGORY.items()
))
_NAMED_SQL = "CASE {} END".format(" ".join(
    f"WHEN starts_with(topic, '{word}') THEN '{category}'"
    for word, category in TOPIC_CATEGORIES.items()
))
_CATEGORY_SQL = (
    "CASE WHEN host IN ('leak', 'hack') THEN host WHEN named = 'job' THEN 'job'"
    " ELSE coalesce(host, named, 'other') END"
)


# --- the files of a release -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """One kind of CSV file: its header, the checks on each row, and what is kept of a row.

    `checks` are (SQL condition that makes a row bad, reason) in order; `stored` are (column, SQL
    expression). `key` is unique inside a file. `closed` says that the last column is checked
    against a list, so that a last line without a line end can still be known to be whole.
    """

    name: str
    header: tuple[str, ...]
    used: tuple[str, ...]
    checks: tuple[tuple[str, str], ...]
    stored: tuple[tuple[str, str], ...]
    key: str = "id"
    closed: bool = False

    @property
    def plain_columns(self) -> int:
        """How many leading columns hold no text, addresses or URLs: all that is kept of a bad row.
        """
        return next((i for i, name in enumerate(self.header) if name in ("to", "url", "content")),
                    len(self.header))


_ADDRESS = "[^@;\\s]+@[^@;\\s]+"
_ADDRESS_LIST = f"{_ADDRESS}(;{_ADDRESS})*;?"
_USER = "[A-Z]{3}[0-9]{4}"
_DATE_REASON = "date is not MM/DD/YYYY HH:MM:SS in the years 2000 to 2099"
_DATE_SQL = f"try_strptime(date, '{DATE_FORMAT}')"
_EVENT_CHECKS = (
    (
        "NOT regexp_full_match(id, '\\{[A-Z0-9]{4}-[A-Z0-9]{8}-[A-Z0-9]{8}\\}')",
        "id is not of the form {A9A9-A9AA99AA-9999AAAA}",
    ),
    # try_strptime alone lets spaces stand for digits.
    (
        "moment IS NULL OR NOT regexp_full_match(date,"
        " '[0-9]{2}/[0-9]{2}/20[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}')",
        _DATE_REASON,
    ),
    (f"NOT regexp_full_match(\"user\", '{_USER}')", "user is not three capitals and four digits"),
    ("NOT regexp_full_match(pc, 'PC-[0-9]{4}')", "pc is not PC- and four digits"),
)
_EVENT_STORED = (("id", "id"), ("date", "moment"), ("user", '"user"'), ("pc", "pc"))
_EVENT_HEADER = ("id", "date", "user", "pc")


def _activity_table(name: str, activities: tuple[str, str]) -> _Table:
    allowed = ", ".join(f"'{activity}'" for activity in activities)
    return _Table(
        name=name,
        header=(*_EVENT_HEADER, "activity"),
        used=(*_EVENT_HEADER, "activity"),
        checks=(
            *_EVENT_CHECKS,
            (f"activity NOT IN ({allowed})", f"activity is not {' or '.join(activities)}"),
        ),
        stored=(*_EVENT_STORED, ("activity", "activity")),
        closed=True,
    )


_RECIPIENTS = (
    "list_filter(string_split(concat_ws(';', \"to\", cc, bcc), ';'), lambda a: a <> '')"
)
_COMPETITORS = ", ".join(f"'{domain}'" for domain in COMPETITOR_DOMAINS)

_TABLES = {
    "logon": _activity_table("logon", ("Logon", "Logoff")),
    "device": _activity_table("device", ("Connect", "Disconnect")),
    "file": _Table(
        name="file",
        header=(*_EVENT_HEADER, "filename", "content"),
        used=(*_EVENT_HEADER, "filename"),
        checks=(*_EVENT_CHECKS, ("trim(filename) = ''", "filename is empty")),
        stored=(
            *_EVENT_STORED,
            ("filename", "filename"),
            ("extension", "lower(regexp_extract(filename, '\\.([^.]+)$', 1))"),
        ),
    ),
    "email": _Table(
        name="email",
        header=(
            *_EVENT_HEADER, "to", "cc", "bcc", "from", "size", "attachments", "content",
        ),
        used=(*_EVENT_HEADER, "to", "cc", "bcc", "from", "size", "attachments"),
        checks=(
            *_EVENT_CHECKS,
            (f"NOT regexp_full_match(\"to\", '{_ADDRESS_LIST}')", "to holds no list of addresses"),
            (f"NOT regexp_full_match(cc, '({_ADDRESS_LIST})?')", "cc is not a list of addresses"),
            (f"NOT regexp_full_match(bcc, '({_ADDRESS_LIST})?')", "bcc is not a list of addresses"),
            (f"NOT regexp_full_match(\"from\", '{_ADDRESS}')", "from is not an address"),
            ("regexp_full_match(size, '-[0-9]+')", "size is negative"),
            ("NOT regexp_full_match(size, '[0-9]{1,12}')", "size is not a whole number"),
            ("regexp_full_match(attachments, '-[0-9]+')", "attachments is negative"),
            ("NOT regexp_full_match(attachments, '[0-9]{1,6}')",
             "attachments is not a whole number"),
        ),
        stored=(
            *_EVENT_STORED,
            ("from", '"from"'),
            ("n_to", "CAST(len(list_filter(string_split(\"to\", ';'), lambda a: a <> ''))"
                     " AS INTEGER)"),
            ("n_external", f"CAST(len(list_filter({_RECIPIENTS}, lambda a:"
                           f" NOT ends_with(lower(a), '@{ORGANISATION_DOMAIN}'))) AS INTEGER)"),
            ("n_competitor", f"CAST(len(list_filter({_RECIPIENTS}, lambda a:"
                             f" lower(split_part(a, '@', 2)) IN ({_COMPETITORS}))) AS INTEGER)"),
            ("n_recipients", f"CAST(len({_RECIPIENTS}) AS INTEGER)"),
            ("size", "TRY_CAST(size AS BIGINT)"),
            ("attachments", "TRY_CAST(attachments AS INTEGER)"),
        ),
    ),
    "http": _Table(
        name="http",
        header=(*_EVENT_HEADER, "url", "content"),
        used=(*_EVENT_HEADER, "url"),
        checks=(
            *_EVENT_CHECKS,
            ("NOT regexp_matches(url, '^https?://[^/\\s]')", "url has no http:// and host"),
        ),
        stored=(
            *_EVENT_STORED,
            ("domain", "regexp_replace(split_part(lower(url), '/', 3), '^www\\.', '')"),
            ("slug", _SLUG_SQL),
        ),
    ),
}

_LDAP_FIELDS = (
    "email", "role", "business_unit", "functional_unit", "department", "team", "supervisor",
)
_LDAP = _Table(
    name="ldap",
    header=("employee_name", "user_id", *_LDAP_FIELDS),
    used=("employee_name", "user_id", *_LDAP_FIELDS),
    checks=(
        (f"NOT regexp_full_match(user_id, '{_USER}')",
         "user_id is not three capitals and four digits"),
        ("trim(employee_name) = ''", "employee_name is empty"),
        (f"NOT regexp_full_match(email, '{_ADDRESS}')", "email is not an address"),
        ("trim(role) = ''", "role is empty"),
    ),
    stored=(
        ("user", "user_id"),
        ("employee_name", "employee_name"),
        *((name, name) for name in _LDAP_FIELDS),
    ),
    key="user",
)
_TRAITS = ("O", "C", "E", "A", "N")
_PSYCHOMETRIC = _Table(
    name="psychometric",
    header=("employee_name", "user_id", *_TRAITS),
    used=("user_id", *_TRAITS),
    checks=(
        (f"NOT regexp_full_match(user_id, '{_USER}')",
         "user_id is not three capitals and four digits"),
        *((f"NOT regexp_full_match({t}, '[0-9]{{1,3}}')", f"{t} is not a whole number")
          for t in _TRAITS),
    ),
    stored=(("user", "user_id"), *((t, f"TRY_CAST({t} AS INTEGER)") for t in _TRAITS)),
    key="user",
)

# Which releases carry which header: (header, releases). Facts about the public releases.
_R = ("r1", "r2", "r3", "r4", "r5", "r6")
_EMAIL_R5 = (
    *_EVENT_HEADER, "to", "cc", "bcc", "from", "activity", "size", "attachments", "content",
)
_FILE_R5 = (
    *_EVENT_HEADER, "filename", "activity", "to_removable_media", "from_removable_media",
    "content",
)
_HEADERS: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "logon": ((_TABLES["logon"].header, _R),),
    "device": (
        (_TABLES["device"].header, ("r1", "r2", "r3", "r4")),
        ((*_EVENT_HEADER, "file_tree", "activity"), ("r5", "r6")),
    ),
    "file": (
        (_TABLES["file"].header, ("r3", "r4")),
        (_FILE_R5, ("r5", "r6")),
    ),
    "email": (
        (_TABLES["email"].header, ("r4",)),
        (("id", "date", "to", "from"), ("r2",)),
        (("id", "date", "to", "from", "size", "attachments", "content"), ("r3",)),
        (_EMAIL_R5, ("r5", "r6")),
    ),
    "http": (
        (_TABLES["http"].header, ("r2", "r3", "r4", "r5")),
        ((*_EVENT_HEADER, "url"), ("r1",)),
        ((*_EVENT_HEADER, "url", "activity", "content"), ("r6",)),
    ),
    "ldap": (
        (_LDAP.header, ("r3", "r4")),
        (("employee_name", "user_id", "Domain", "Email", "Role"), ("r1",)),
        (("employee_name", "user_id", "email", "role"), ("r2",)),
        (("employee_name", "user_id", "email", "role", "projects", *_LDAP_FIELDS[2:]),
         ("r5", "r6")),
    ),
    "psychometric": ((_PSYCHOMETRIC.header, _R[1:]),),
}


@dataclass(frozen=True)
class _Source:
    """One file of the release: where it is and what it is called in messages."""

    path: Path
    label: str
    kind: str
    month: str = ""


@dataclass
class _Release:
    """The files found in a release folder."""

    folder: Path
    logs: dict[str, _Source] = field(default_factory=dict)
    ldap: list[_Source] = field(default_factory=list)
    psychometric: _Source | None = None
    answers: Path | None = None
    insiders: _Source | None = None
    warnings: list[str] = field(default_factory=list)

    def tables(self) -> list[_Source]:
        rest = [self.psychometric] if self.psychometric else []
        return [*self.logs.values(), *self.ldap, *rest]

    def answer_files(self) -> list[_Source]:
        if self.answers is None:
            return []
        paths = sorted(self.answers.glob("r4.2-*/*.csv*")) + sorted(
            self.answers.glob("r4.2-*.csv*")
        )
        wanted = [p for p in paths if re.search(r"\.csv(\.gz)?$", p.name)]
        return [_Source(p, f"answers/{p.relative_to(self.answers)}", "answers") for p in wanted]


def _find(folder: Path) -> _Release:
    if not folder.exists():
        raise UserError(
            f"{folder}: no such folder. Give the folder that holds logon.csv, http.csv, LDAP/ ..."
            " of CERT r4.2."
        )
    if not folder.is_dir():
        raise UserError(
            f"{folder}: is a file, not a folder. Unpack the release and give its folder."
        )
    found = _Release(folder)
    for name in LOGS:
        path = _one_of(folder, f"{name}.csv", found.warnings)
        if path is not None:
            found.logs[name] = _Source(path, path.name, name)
    if not found.logs:
        below = next((p.parent for p in sorted(folder.glob("*/logon.csv*"))), None)
        raise UserError(
            f"{folder}: holds none of the logs "
            + ", ".join(f"{name}.csv" for name in LOGS)
            + " (plain or .gz). Give the release folder itself"
            + (f", perhaps {below}." if below else ".")
        )
    for name in LOGS:
        if name not in found.logs:
            found.warnings.append(f"{name}.csv is missing: its events are absent from the store")
    _find_ldap(folder, found)
    psychometric = _one_of(folder, "psychometric.csv", found.warnings)
    if psychometric is None:
        found.warnings.append("psychometric.csv is missing: its table is empty")
    else:
        found.psychometric = _Source(psychometric, psychometric.name, "psychometric")
    beside = (folder.absolute().parent / "answers", folder.resolve().parent / "answers")
    for place in (folder / "answers", *beside):
        insiders = _one_of(place, "insiders.csv", found.warnings)
        if insiders is not None:
            found.answers = place
            found.insiders = _Source(insiders, f"answers/{insiders.name}", "insiders")
            break
    else:
        found.warnings.append(
            "answers/insiders.csv is missing beside and inside the folder: no day can be labelled"
        )
    return found


def _find_ldap(folder: Path, found: _Release) -> None:
    ldap = folder / "LDAP"
    if not ldap.is_dir():
        raise UserError(
            f"{ldap}: missing. The monthly LDAP files (LDAP/2009-12.csv ...) give roles and"
            " supervisors; copy the folder from the release."
        )
    months: dict[str, Path] = {}
    for path in sorted(ldap.iterdir()):
        match = re.fullmatch(r"(\d{4}-(?:0[1-9]|1[0-2]))\.csv(\.gz)?", path.name)
        if match is None:
            if not path.name.startswith("."):
                found.warnings.append(f"LDAP/{path.name} is not a month file and was left out")
        elif match[1] in months:
            found.warnings.append(f"LDAP/{path.name} was left out: {months[match[1]].name} is used")
        else:
            months[match[1]] = path
    if not months:
        raise UserError(f"{ldap}: holds no month file such as 2009-12.csv.")
    found.ldap = [_Source(p, f"LDAP/{p.name}", "ldap", m) for m, p in sorted(months.items())]
    absent = [month for month in _months(min(months), max(months)) if month not in months]
    if absent:
        found.warnings.append(
            f"LDAP: {', '.join(f'{month}.csv' for month in absent)} missing between the first and"
            " the last month: the newest month before stands in for it"
        )


def _months(first: str, last: str) -> list[str]:
    """Return the months from `first` to `last`, both included.

    >>> _months("2009-11", "2010-02")
    ['2009-11', '2009-12', '2010-01', '2010-02']
    """
    low, high = (12 * int(month[:4]) + int(month[5:]) - 1 for month in (first, last))
    return [f"{n // 12:04d}-{n % 12 + 1:02d}" for n in range(low, high + 1)]


def _one_of(folder: Path, name: str, warnings: list[str]) -> Path | None:
    plain, packed = folder / name, folder / f"{name}.gz"
    if plain.is_file():
        if packed.is_file():
            warnings.append(f"{packed.name} was left out: {plain.name} is used")
        return plain
    return packed if packed.is_file() else None


# --- bytes to lines to fields ---------------------------------------------------------------------


class _Reader:
    """The bytes of a file, unpacked where it ends in .gz, with the SHA-256 of the file as it is."""

    def __init__(self, source: _Source):
        self.source = source
        self.digest = hashlib.sha256()
        self.raw_bytes = 0
        try:
            self._raw = open(source.path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{source.path}: cannot be read ({error.strerror}).") from error
        packed = source.path.name.endswith(".gz")
        self._stream = gzip.GzipFile(fileobj=_Tap(self)) if packed else _Tap(self)

    def read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{self.source.path}: the compressed file is damaged or ends early ({error})."
                " Copy it again."
            ) from error
        except OSError as error:
            raise UserError(f"{self.source.path}: cannot be read ({error.strerror}).") from error

    def read_raw(self, size: int) -> bytes:
        data = self._raw.read(size)
        self.digest.update(data)
        self.raw_bytes += len(data)
        return data

    def sha256(self) -> str:
        while self.read_raw(BLOCK_BYTES):
            pass
        return self.digest.hexdigest()

    def close(self) -> None:
        self._raw.close()


class _Tap(io.RawIOBase):
    def __init__(self, reader: _Reader):
        self._reader = reader

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._reader.read_raw(size)


def _header_of(source: _Source) -> tuple[bytes, bytes]:
    """Return (first line without mark and line end, the bytes that follow in the first block)."""
    reader = _Reader(source)
    try:
        return _cut_header(reader, source)
    finally:
        reader.close()


def _cut_header(reader: _Reader, source: _Source) -> tuple[bytes, bytes]:
    data = b""
    while b"\n" not in data and len(data) < 65_536:
        more = reader.read(65_536)
        if not more:
            break
        data += more
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{source.path}: is UTF-16. Save it as UTF-8, as r4.2 is published.")
    line, _, rest = data.partition(b"\n")
    return line.removeprefix(codecs.BOM_UTF8).removesuffix(b"\r"), rest


@dataclass
class _Block:
    """Whole lines of a file; `too_long` marks the beginning of one line that is not kept whole."""

    data: bytes
    first_line: int
    ended: bool = True
    too_long: bool = False

    @functools.cached_property
    def n_lines(self) -> int:
        line_ends = np.count_nonzero(np.frombuffer(self.data, np.uint8) == 10)
        return 1 if self.too_long else int(line_ends) + (not self.ended)


def _blocks(reader: _Reader, rest: bytes, first_line: int) -> Iterator[_Block]:
    """Cut a file into blocks of whole lines; a line that is too long comes as a block of its own.

    Memory: two blocks and one line of at most `MAX_LINE_BYTES`, whatever the file holds.
    """
    line = first_line
    while True:
        data = reader.read(BLOCK_BYTES)
        if not data:
            break
        rest += data
        cut = rest.rfind(b"\n") + 1
        if cut:
            block, rest = _Block(rest[:cut], line), rest[cut:]
            yield block
            line += block.n_lines
        if len(rest) > MAX_LINE_BYTES:
            head, rest, ended = _skip_line(reader, rest)
            yield _Block(head, line, ended=ended, too_long=True)
            line += 1
    cut = rest.rfind(b"\n") + 1
    if cut:
        block = _Block(rest[:cut], line)
        yield block
        line += block.n_lines
    if rest[cut:]:
        yield _Block(rest[cut:], line, ended=False)


def _skip_line(reader: _Reader, rest: bytes) -> tuple[bytes, bytes, bool]:
    head = rest[:QUARANTINE_TEXT]
    while True:
        data = reader.read(BLOCK_BYTES)
        if not data:
            return head, b"", False
        _, end, after = data.partition(b"\n")
        if end:
            return head, after, True


_GOOD, _COLUMNS, _EMPTY, _UTF8, _QUOTE, _CONTROL, _NUL, _LONG, _TAIL = range(9)


def _reason(code: int, expected: int, commas: int) -> str:
    return {
        _COLUMNS: f"expected {expected} columns, found {commas + 1}",
        _EMPTY: "the line is empty",
        _UTF8: "the line is not UTF-8",
        _QUOTE: "the line holds a quote, which r4.2 never uses",
        _CONTROL: "the line holds a control character",
        _NUL: "the line holds a NUL byte",
        _LONG: f"the line is longer than {MAX_LINE_BYTES} bytes",
        _TAIL: "the last line has no line end and may be cut short",
    }[code]


def _printable(data: bytes, columns: int) -> str:
    """Return the first columns of a bad line as one line of text, odd bytes written as escapes."""
    kept = b",".join(data[:QUARANTINE_TEXT].split(b",", columns)[:columns])
    text = kept.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# For each of the three words of a short value and each length 0-12: the bits that belong to it.
_MASKS = np.array(
    [[(1 << 8 * min(max(n - 4 * word, 0), 4)) - 1 for n in range(13)] for word in range(3)], "<u4"
)


def _string_views(padded: np.ndarray, block: pa.Buffer, starts: np.ndarray, ends: np.ndarray):
    """Return an Arrow string_view array over `block[starts:ends]` without copying long values.

    Shapes: `starts`, `ends` (n,), byte offsets; `padded` is the block plus 16 spare bytes.
    Arrow columnar format, variable-size binary view layout: 16 bytes for each value, the length,
    then the value itself up to 12 bytes, or its first 4 bytes, buffer number and offset.
    """
    count = len(starts)
    lengths = ends - starts
    # The four bytes that begin at every offset, as one number each.
    fours = np.ndarray((len(padded) - 3,), "<u4", padded, strides=(1,))
    words = np.zeros((count, 4), "<u4")
    words[:, 0] = lengths
    words[:, 1] = fours[starts]
    words[:, 3] = starts
    short = slice(None) if (lengths <= 12).all() else np.flatnonzero(lengths <= 12)
    for word in range(3):
        words[short, 1 + word] = fours[starts[short] + 4 * word] & _MASKS[word, lengths[short]]
    views = pa.py_buffer(words)
    return pa.Array.from_buffers(pa.string_view(), count, [None, views, block])


def _schema(table: _Table) -> pa.Schema:
    names = [*table.used, "text", "problem"]
    return pa.schema([("line", pa.int64()), *((name, pa.string_view()) for name in names)])


def _batches(block: _Block, table: _Table) -> Iterator[pa.RecordBatch]:
    """Turn one block into record batches: the lines that can be cut into fields, and the others."""
    data, width = block.data, len(table.header)
    padded = np.frombuffer(data + bytes(16), np.uint8)
    buffer = padded[: len(data)]
    ends = np.flatnonzero(buffer == 10)
    n_line_feeds = len(ends)
    if not block.ended or block.too_long:
        ends = np.append(ends, len(data))
    starts = np.concatenate(([0], ends[:-1] + 1))
    count = len(ends)
    code = np.zeros(count, np.uint8)
    # A carriage return before the line end belongs to the line end.
    returns = (ends > starts) & (buffer[np.maximum(ends - 1, 0)] == 13)
    ends = ends - returns
    commas = np.flatnonzero(buffer == 44)
    first = np.searchsorted(commas, starts)
    n_commas = np.diff(np.append(first, len(commas)))

    def lines_of(positions: np.ndarray) -> np.ndarray:
        line = np.searchsorted(starts, positions, side="right") - 1
        return line[positions < ends[line]]

    code[n_commas != width - 1] = _COLUMNS
    code[ends == starts] = _EMPTY
    if len(buffer) and buffer.max() >= 128:
        code[_not_utf8(data, buffer, starts, ends, lines_of)] = _UTF8
    if b'"' in data:
        code[lines_of(np.flatnonzero(buffer == 34))] = _QUOTE
    if np.count_nonzero(buffer < 32) > n_line_feeds:
        low = np.flatnonzero((buffer < 32) & (buffer != 10))
        code[lines_of(low)] = _CONTROL
        code[lines_of(low[buffer[low] == 0])] = _NUL
    code[ends - starts > MAX_LINE_BYTES] = _LONG
    if block.too_long:
        code[-1] = _LONG
    elif not block.ended and code[-1] == _GOOD and not table.closed:
        code[-1] = _TAIL

    good = np.flatnonzero(code == _GOOD)
    schema = _schema(table)
    shared = pa.py_buffer(data)
    if len(good):
        cuts = commas[first[good, None] + np.arange(width - 1)]
        left = {name: cuts[:, i - 1] + 1 for i, name in enumerate(table.header) if i}
        left[table.header[0]] = starts[good]
        right = {name: cuts[:, i] for i, name in enumerate(table.header[:-1])}
        right[table.header[-1]] = ends[good]
        columns = [pa.array(good + block.first_line)]
        columns += [_string_views(padded, shared, left[n], right[n]) for n in table.used]
        columns.append(_string_views(padded, shared, starts[good], ends[good]))
        columns.append(pa.nulls(len(good), pa.string_view()))
        yield pa.RecordBatch.from_arrays(columns, schema=schema)
    bad = np.flatnonzero(code)
    for part in np.array_split(bad, -(-len(bad) // 10_000)) if len(bad) else ():
        empty = pa.nulls(len(part), pa.string_view())
        text = [_printable(data[starts[i] : ends[i]], table.plain_columns) for i in part]
        why = [_reason(int(code[i]), width, int(n_commas[i])) for i in part]
        columns = [pa.array(part + block.first_line), *([empty] * len(table.used))]
        columns += [pa.array(text, pa.string_view()), pa.array(why, pa.string_view())]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _not_utf8(data, buffer, starts, ends, lines_of) -> list[int]:
    try:
        data.decode("utf-8")
        return []
    except UnicodeDecodeError:
        pass
    bad = []
    for line in np.unique(lines_of(np.flatnonzero(buffer >= 128))):
        try:
            data[starts[line] : ends[line]].decode("utf-8")
        except UnicodeDecodeError:
            bad.append(int(line))
    return bad


class _Scan:
    """One pass over one file: record batches out, and afterwards its rows, hash and failure."""

    def __init__(self, source: _Source, table: _Table, progress: Progress | None = None):
        self.source, self.table, self.progress = source, table, progress
        self.rows = 0
        self.sha256 = ""
        self.failure: Exception | None = None
        self.unended = False

    def reader(self) -> pa.RecordBatchReader:
        return pa.RecordBatchReader.from_batches(_schema(self.table), self._run())

    def _run(self) -> Iterator[pa.RecordBatch]:
        # DuckDB pulls this from its own thread and wraps what is raised: keep the original.
        try:
            yield from self._lines()
        except Exception as error:
            self.failure = error
            raise

    def _lines(self) -> Iterator[pa.RecordBatch]:
        total = max(self.source.path.stat().st_size, 1)
        reader = _Reader(self.source)
        began = told = time.monotonic()
        try:
            _, rest = _cut_header(reader, self.source)
            for block in _blocks(reader, rest, 2):
                # Counted from the bytes, not from the batches: what is lost on the way shows.
                self.rows += block.n_lines
                yield from _batches(block, self.table)
                self.unended = self.unended or not block.ended
                now = time.monotonic()
                if self.progress and now - told > 2:
                    told = now
                    self.progress(
                        f"{self.source.label}: {self.rows:,} rows read,"
                        f" {reader.raw_bytes / total:.0%},"
                        f" {self.rows / (now - began):,.0f} rows/s"
                    )
            self.sha256 = reader.sha256()
        finally:
            reader.close()


# --- recognising the release ----------------------------------------------------------------------


def recognise(release: Path | str) -> str:
    """Return "r4.2" for a folder whose files all have r4.2's headers.

    Raises `UserError` that names the release seen and what differs for r1, r2, r3, r5 and r6, and
    the file and the expected header for anything else. r4.1 has the same headers; it is told from
    r4.2 by the folder's name here, and by the answer key once its first log is read.
    """
    release = Path(release)
    with _mendable(release, ""):
        return _recognise(_find(release))


def check_answers(data: Path | str) -> None:
    """Raise `UserError` if a release, or a store made of one, has no answers/insiders.csv."""
    data = Path(data)
    if is_store(data):
        labels = Store(data).manifest["sources"]
        present = any(label.startswith("answers/insiders.csv") for label in labels)
    else:
        with _mendable(data, ""):
            present = _find(data).insiders is not None
    if not present:
        raise UserError(
            f"{data}: answers/insiders.csv is missing, beside and inside the folder, so no day can"
            " be labelled. Copy the answers folder of the release to it"
            + (", and ingest again." if is_store(data) else ".")
        )


def _recognise(found: _Release) -> str:
    named = re.fullmatch(r"r(\d\.\d|\d)", found.folder.resolve().name)
    if named and named[1] not in ("4.2", "4"):
        raise UserError(
            f"{found.folder}: the folder is named r{named[1]}; this reads CERT r4.2. The answer key"
            " of r4.2 must not be joined to another release. Rename the folder if it is r4.2."
        )
    differing: list[set[str]] = []
    alike: list[set[str]] = []
    differences = []
    for source in found.tables():
        expected = _HEADERS[source.kind][0][0]
        line = _header_of(source)[0].decode("utf-8", "replace")
        seen = tuple(cell.strip().strip('"') for cell in line.split(","))
        if seen == expected and '"' not in line:
            alike.append(set(_HEADERS[source.kind][0][1]))
            continue
        known = [releases for header, releases in _HEADERS[source.kind] if header == seen]
        if not known and source.kind == "http" and len(seen) == 5 and "://" in line:
            known = [("r1",)]
            seen = ("no header row",)
        if known:
            differing.append(set(known[0]))
            differences.append(_difference(source, seen, expected, quoted='"' in line))
        else:
            if not line.strip():
                raise UserError(
                    f"{source.path}: is empty, without even a header row. Copy it again, or"
                    " remove it if the log is meant to be absent."
                )
            raise UserError(
                f"{source.path}, line 1: wrong header {line[:120]!r}; r4.2 has"
                f" {','.join(expected)!r}. Restore the header row and the column order."
            )
    if not differences:
        return "r4.2"
    if (found.folder / "decoy_file.csv").exists():
        alike.append({"r5", "r6"})
    # The files that differ name the release; the others narrow it down where they agree with it.
    possible = set.union(*differing)
    for releases in (*differing, *alike):
        possible = possible & releases or possible
    raise UserError(
        f"{found.folder}: this looks like CERT {' or '.join(sorted(possible))}, and only r4.2 is"
        " read. "
        + "; ".join(differences[:4])
        + ". Point the study at r4.2."
    )


def _difference(source: _Source, seen: tuple, expected: tuple, *, quoted: bool) -> str:
    extra = [name for name in seen if name not in expected]
    missing = [name for name in expected if name not in seen]
    parts = []
    if seen == ("no header row",):
        return f"{source.label} has no header row and no column content"
    if extra:
        parts.append("has " + ", ".join(extra))
    if missing:
        parts.append("lacks " + ", ".join(missing))
    if quoted:
        parts.append("quotes its fields")
    return f"{source.label} {' and '.join(parts) or 'differs'}"


# --- the ingest -----------------------------------------------------------------------------------


def _or_else(flag: str) -> str:
    """Return how to be told otherwise: the flag, and how a study comes by what it gives."""
    return (
        f"or accept it by `ueba ingest DIR --out STORE {flag}` (a study reads what that writes:"
        " `ueba study --data STORE`)."
    )


def _quote(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"


class _Ingest:
    """One ingest into one temporary folder. Every method adds to the manifest's parts."""

    def __init__(
        self,
        found: _Release,
        folder: Path,
        connection: duckdb.DuckDBPyConnection,
        options: dict,
        tell: Progress | None,
    ):
        self.found, self.folder, self.connection, self.tell = found, folder, connection, tell
        self.options = options
        self.share, self.buckets = options["max_quarantine_share"], options["buckets"]
        self.work = folder / ".work"
        self.work.mkdir()
        self.warnings = list(found.warnings)
        self.sources: dict[str, dict] = {}
        self.left_out: list[str] = []
        self.lost: dict[str, int] = {}  # rows of the key without an equal event, by log
        self.differing: list[dict] = []
        self.connection.execute("SET preserve_insertion_order = false")
        # Each thread holds this many rows back for each part; the default fills the memory.
        self.connection.execute("SET partitioned_write_flush_threshold = 20000")
        self.connection.execute(
            "CREATE TABLE quarantine (file VARCHAR, line BIGINT, reason VARCHAR, text VARCHAR)"
        )

    # reading one file of any kind

    def scan(self, source: _Source, table: _Table, sink: Callable[[str], str]) -> _Scan:
        """Check and type every row of a file; `sink(query)` gives the statement that stores them.

        The query's columns: line, the stored ones, reason (null for a good row), text, bucket.
        """
        cases = " ".join(f"WHEN {test} THEN {_quote(reason)}" for test, reason in table.checks)
        stored = ", ".join(f'{sql} AS "{name}"' for name, sql in table.stored)
        bucket = f"CAST(right(\"user\", 4) AS INTEGER) % {self.buckets}"
        lines = f"(SELECT *, {_DATE_SQL} AS moment FROM lines)" if "date" in table.used else "lines"
        kept = f"array_to_string(string_split(text, ',')[:{table.plain_columns}], ',')"
        query = (
            f"SELECT * EXCLUDE (text), CASE WHEN reason IS NULL THEN {bucket} ELSE -1 END AS"
            f" bucket, CASE WHEN reason IS NOT NULL THEN left({kept}, {QUARANTINE_TEXT}) END"
            " AS text"
            f" FROM (SELECT line, {stored}, text, coalesce(problem, CASE {cases} END) AS reason"
            f" FROM {lines})"
        )
        before = source.path.stat()
        scan = _Scan(source, table, self.tell)
        self.connection.register("lines", scan.reader())
        try:
            self.connection.execute(sink(query))
        except duckdb.Error as error:
            if scan.failure is not None:
                raise scan.failure from error
            raise
        finally:
            self.connection.unregister("lines")
        self.used(source, before, scan.sha256)
        if scan.unended:
            self.warnings.append(f"{source.label}: the last line has no line end; is the file cut?")
        return scan

    def check_end(self, source: _Source, last: int) -> None:
        """Refuse a file without a final line end of which the row in line `last` is a bad one."""
        found = self.connection.execute(
            "SELECT reason FROM quarantine WHERE file = ? AND line = ?"
            " AND NOT contains(reason, 'occurs earlier')", [source.label, last]
        ).fetchall()
        if not found or self.options["allow_truncated"]:
            return
        if found[0][0] == _reason(_TAIL, 0, 0):
            raise UserError(
                f"{source.path}: line {last}: the file ends without a line end, so its last row may"
                " be cut: copy it again, end the line if it is whole,"
                f" {_or_else('--allow-truncated')}"
            )
        raise UserError(
            f"{source.path}: line {last}: the file ends within a row, so the copy is not complete:"
            f" copy it again, {_or_else('--allow-truncated')}"
        )

    def used(self, source: _Source, before: os.stat_result, sha256: str) -> None:
        """Note the file that was read, as it was before; refuse it if it changed meanwhile."""
        after = source.path.stat()
        size, moment = before.st_size, before.st_mtime_ns
        if (size, moment) != (after.st_size, after.st_mtime_ns):
            raise UserError(f"{source.path}: changed while it was read. Wait, and ingest again.")
        self.sources[source.label] = {"bytes": size, "mtime_ns": moment, "sha256": sha256}

    def quarantine(self, source: _Source, query: str) -> int:
        """Move the bad rows of `query` (line, reason, text) to the quarantine; return how many."""
        before = self.count("quarantine")
        self.connection.execute(
            f"INSERT INTO quarantine SELECT {_quote(source.label)}, line, reason, text"
            f" FROM ({query})"
        )
        return self.count("quarantine") - before

    def count(self, relation: str) -> int:
        return self.connection.execute(f"SELECT count(*) FROM {relation}").fetchall()[0][0]

    def check_share(self, source: _Source, read: int, bad: int) -> None:
        if read == 0 and not self.options["allow_empty"]:
            raise UserError(
                f"{source.path}: holds no rows after its header. Copy it again, remove the file if"
                f" the log is meant to be absent, {_or_else('--allow-empty')}"
            )
        if read == 0:
            self.warnings.append(f"{source.label}: holds no rows")
        if bad <= self.share * read:
            return
        reasons = self.connection.execute(
            "SELECT reason, count(*) AS n, min(line) AS line FROM quarantine WHERE file = ?"
            " GROUP BY reason ORDER BY n DESC, reason LIMIT 3",
            [source.label],
        ).fetchall()
        detail = "; ".join(f"{n:,} x {why} (first: line {line})" for why, n, line in reasons)
        raise UserError(
            f"{source.path}: {bad:,} of {read:,} rows ({bad / read:.1%}) are bad, more than the"
            f" {self.share:.1%} allowed: {detail}. Mend the file, {_or_else('--max-bad SHARE')}"
        )

    # the five logs

    def log(self, name: str) -> dict:
        source, table = self.found.logs[name], _TABLES[name]
        stage = self.work / name
        scan = self.scan(
            source,
            table,
            lambda query: f"COPY ({query}) TO {_quote(stage)} (FORMAT parquet,"
            " COMPRESSION snappy, PARTITION_BY (bucket))",
        )
        if self.tell:
            self.tell(f"{source.label}: {scan.rows:,} rows read; checking ids and sorting")
        bad = 0
        if any(stage.glob("bucket=-1/*.parquet")):
            bad = self.quarantine(
                source, f"SELECT line, reason, text FROM {_parquet(stage / 'bucket=-1')}"
            )
        if scan.unended:
            self.check_end(source, scan.rows + 1)
        bad += self.duplicates(source, table, stage, scan.rows, bad)
        self.check_share(source, scan.rows, bad)
        columns, joined = ", ".join(f'"{column}"' for column, _ in table.stored), ""
        if name == "http":
            self.web_tables(stage)
            columns = columns.replace('"slug"', f"topic, {_CATEGORY_SQL} AS category")
            joined = "LEFT JOIN hosts USING (domain) LEFT JOIN topics USING (slug)"
        stored = 0
        for part in sorted(stage.glob("bucket=*")):
            number = int(part.name.removeprefix("bucket="))
            if number < 0:
                continue
            target = self.folder / "events" / name / f"bucket={number:02d}"
            target.mkdir(parents=True)
            stored += self.connection.execute(
                f"COPY (SELECT {columns} FROM {_parquet(part)} {joined} WHERE line NOT IN"
                " (SELECT line FROM duplicates) ORDER BY user, date, line)"
                f" TO {_quote(target / 'part-0.parquet')}"
                " (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)"
            ).fetchall()[0][0]
        shutil.rmtree(stage, ignore_errors=True)
        _assert_accounted(source, scan.rows, stored, bad)
        return {"read": scan.rows, "stored": stored, "quarantined": bad, **self.span(name)}

    def span(self, name: str) -> dict:
        folder = self.folder / "events" / name
        if not any(folder.glob("*/*.parquet")):
            return {"users": 0, "first": None, "last": None}
        users, first, last = self.connection.execute(
            "SELECT count(DISTINCT user), min(date), max(date) FROM"
            f" {_parquet(folder / '*')}"
        ).fetchall()[0]
        return {"users": users, "first": _iso(first), "last": _iso(last)}

    def web_tables(self, stage: Path) -> None:
        """Make the tables `hosts` (domain, host) and `topics` (slug, topic, named) of this log.

        Decoding is slow by DuckDB's measure, so it is done once for each slug, not for each row.
        """
        self.connection.execute(
            "CREATE OR REPLACE TABLE hosts (domain VARCHAR, host VARCHAR);"
            "CREATE OR REPLACE TABLE topics (slug VARCHAR, topic VARCHAR, named VARCHAR)"
        )
        if not any(stage.glob("bucket=[0-9]*/*.parquet")):
            return
        pages = _parquet(stage / "bucket=[0-9]*")
        self.connection.execute(
            f"INSERT INTO hosts SELECT domain, {_HOST_SQL} FROM (SELECT DISTINCT domain"
            f" FROM {pages})"
        )
        self.connection.execute(
            f"INSERT INTO topics SELECT slug, topic, {_NAMED_SQL} FROM (SELECT slug,"
            f" translate(slug, '{_LETTERS}', '{_DECODED}') AS topic FROM (SELECT DISTINCT slug"
            f" FROM {pages}))"
        )

    def duplicates(self, source: _Source, table: _Table, stage: Path, read: int, bad: int) -> int:
        """Make the table `duplicates` (line) of rows whose id came earlier in the same file.

        Eight bytes a row: the hashes of all ids are sorted, and only ids whose hash occurs twice
        are compared as text. The first row in file order is kept.
        """
        self.connection.execute("CREATE OR REPLACE TABLE duplicates (line BIGINT)")
        if not any(stage.glob("bucket=[0-9]*/*.parquet")):
            return 0
        rows = _parquet(stage / "bucket=[0-9]*")
        hashes = np.empty(read - bad, np.uint64)
        end = 0
        result = self.connection.sql(f"SELECT hash({table.key}) FROM {rows}")
        for batch in result.to_arrow_reader(1 << 17):
            part = batch.column(0).to_numpy()
            hashes[end : end + len(part)] = part
            end += len(part)
        assert end == len(hashes), (end, len(hashes))
        hashes.sort()
        twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        del hashes
        if not len(twice):
            return 0
        self.connection.register("twice", pa.table({"h": twice}))
        self.connection.execute(
            f"INSERT INTO duplicates SELECT line FROM (SELECT line, row_number() OVER (PARTITION BY"
            f" {table.key} ORDER BY line) AS k FROM {rows} WHERE hash({table.key}) IN"
            " (SELECT h FROM twice)) WHERE k > 1"
        )
        self.connection.unregister("twice")
        count = self.count("duplicates")
        reason = _quote(f"{table.key} occurs earlier in the file")
        if count + bad > self.share * read:
            # The ingest stops here: name the lines, do not read the file again for their text.
            self.quarantine(source, f"SELECT line, {reason} AS reason, '' AS text FROM duplicates")
            return count
        lines = np.sort(self.connection.execute("SELECT line FROM duplicates").fetchnumpy()["line"])
        self.connection.register(
            "texts", pa.RecordBatchReader.from_batches(
                _TEXT, _texts_of(source, table, np.asarray(lines)))
        )
        self.quarantine(source, f"SELECT line, {reason} AS reason, text FROM texts")
        self.connection.unregister("texts")
        return count

    # the small tables

    def ldap(self) -> dict:
        self.connection.execute("CREATE OR REPLACE TABLE months AS SELECT '' AS month, * FROM"
                                f" ({_empty_table(_LDAP)})")
        totals = {"read": 0, "stored": 0, "quarantined": 0}
        for source in self.found.ldap:
            counts = self.small(source, _LDAP)
            self.connection.execute(
                f"INSERT INTO months SELECT {_quote(source.month)}, * FROM good"
            )
            totals = {key: totals[key] + counts[key] for key in totals}
        self.write("SELECT * FROM months ORDER BY month, user", "ldap")
        months = [source.month for source in self.found.ldap]
        return {**totals, "months": len(months), "first": months[0], "last": months[-1]}

    def psychometric(self) -> dict:
        if self.found.psychometric is None:
            self.write(_empty_table(_PSYCHOMETRIC), "psychometric")
            return {"read": 0, "stored": 0, "quarantined": 0}
        counts = self.small(self.found.psychometric, _PSYCHOMETRIC)
        self.write("SELECT * FROM good ORDER BY user", "psychometric")
        return counts

    def small(self, source: _Source, table: _Table) -> dict:
        """Read a file that fits in memory into the tables `good`; the first of a key is kept."""
        scan = self.scan(source, table, lambda query: f"CREATE OR REPLACE TABLE part AS {query}")
        self.connection.execute(
            f"UPDATE part SET reason = '{table.key} occurs earlier in the file' FROM (SELECT line"
            f" AS place, row_number() OVER (PARTITION BY {table.key} ORDER BY line) AS k FROM part"
            " WHERE reason IS NULL) AS seen WHERE line = place AND k > 1"
        )
        bad = self.quarantine(
            source, "SELECT line, reason, coalesce(text, '') AS text FROM part WHERE reason"
            " IS NOT NULL"
        )
        if scan.unended:
            self.check_end(source, scan.rows + 1)
        self.check_share(source, scan.rows, bad)
        columns = ", ".join(f'"{name}"' for name, _ in table.stored)
        self.connection.execute(
            f"CREATE OR REPLACE TABLE good AS SELECT {columns} FROM part WHERE reason IS NULL"
        )
        stored = self.count("good")
        _assert_accounted(source, scan.rows, stored, bad)
        return {"read": scan.rows, "stored": stored, "quarantined": bad}

    def write(self, query: str, name: str) -> None:
        target = self.folder / f"{name}.parquet"
        self.connection.execute(f"COPY ({query}) TO {_quote(target)} (FORMAT parquet)")

    # the answer key

    def answers(self) -> tuple[dict, dict]:
        insiders, insider_counts = self.read_insiders()
        labels: list[tuple] = []
        counts = {"read": 0, "stored": 0, "quarantined": 0}
        files: dict[str, _Source] = {}
        for source in self.found.answer_files():
            used = files.setdefault(source.path.name.removesuffix(".gz"), source)
            if used is not source:
                self.leave_out(source, f"was left out: {used.label} is used")
        for insider, scenario, details in insiders:
            source = files.pop(details, None)
            if source is None:
                benign = f"{details} of insider {insider} is missing, so the days count as benign"
                if not self.options["allow_partial"]:
                    raise UserError(
                        f"{self.found.insiders.path}: {benign}. Copy the file from the answers of"
                        f" the release, {_or_else('--allow-partial')}"
                    )
                self.warnings.append(f"answers: {benign}")
                continue
            good, read = self.read_answers(source, insider, scenario)
            labels += good
            counts["read"] += read
            counts["stored"] += len(good)
            counts["quarantined"] += read - len(good)
        for source in files.values():
            self.leave_out(source, "was left out: no good row of dataset 4.2 in insiders.csv names"
                           " it, so its days stay unlabelled")
        names = ("insider", "scenario", "log", "id", "date", "user", "pc")
        types = (pa.string(), pa.int64(), pa.string(), pa.string(), pa.timestamp("us"),
                 pa.string(), pa.string())
        pq.write_table(_rows_table(labels, names, types), self.folder / "answers.parquet")
        return insider_counts, counts

    def leave_out(self, source: _Source, why: str) -> None:
        """Note an answer file that is there and is not read."""
        self.left_out.append(source.label)
        self.warnings.append(f"{source.label} {why}")

    def read_insiders(self) -> tuple[list[tuple], dict]:
        """Return (user, scenario, details) of r4.2's insiders, and the counts of the file's rows.

        read = stored + quarantined + other_releases: a row belongs to another release only where
        it names a known one.
        """
        source, rows, known = self.found.insiders, [], []
        counts = {"read": 0, "stored": 0, "quarantined": 0, "other_releases": 0}
        header = ["dataset", "scenario", "details", "user", "start", "end"]
        if source is not None:
            lines, n_lines, unended = self.small_lines(source)
            if not lines or _cells(lines[0]) != header:
                raise UserError(
                    f"{source.path}, line 1: wrong header; r4.2 has {','.join(header)!r}."
                )
            counts["read"] = n_lines - 1
            for number, line in enumerate(lines[1:], start=2):
                cells = _cells(line)
                # The dataset decides first: rows of other releases have dates of other forms.
                if _is_other_release(cells):
                    counts["other_releases"] += 1
                    continue
                problem = _insider_problem(cells, {row[0] for row in rows})
                if problem:
                    self.refuse(source, number, problem, line)
                    counts["quarantined"] += 1
                    continue
                rows.append((cells[3], int(cells[1]), _date(cells[4]), _date(cells[5])))
                known.append((cells[3], int(cells[1]), cells[2]))
            counts["stored"] = len(rows)
            if unended:
                self.check_end(source, n_lines)
            _assert_accounted(source, counts["read"], len(rows) + counts["other_releases"],
                              counts["quarantined"])
            if counts["quarantined"]:
                self.check_share(source, len(rows) + counts["quarantined"], counts["quarantined"])
            if not rows:
                self.warnings.append("answers/insiders.csv names no insider of dataset 4.2")
        types = (pa.string(), pa.int64(), pa.timestamp("us"), pa.timestamp("us"))
        table = _rows_table(sorted(rows), ("user", "scenario", "start", "end"), types)
        pq.write_table(table, self.folder / "insiders.parquet")
        return sorted(known), counts

    def read_answers(self, source: _Source, insider: str, scenario: int) -> tuple[list, int]:
        """Return the good rows of one answer file, and how many rows it has."""
        good, bad, seen = [], 0, set()
        lines, read, unended = self.small_lines(source)
        for number, line in enumerate(lines, start=1):
            cells = [cell.strip() for cell in line.split(",", 5)]
            problem = _answer_problem(cells)
            if problem is None and tuple(cells[:2]) in seen:
                problem = "id occurs earlier in the file"
            if problem:
                self.refuse(source, number, problem, line)
                bad += 1
            else:
                log, identity, date, user, pc = cells[:5]
                good.append((insider, scenario, log, identity, _date(date), user, pc))
                seen.add((log, identity))
        if unended:
            self.check_end(source, read)
        _assert_accounted(source, read, len(good), bad)
        self.check_share(source, read, bad)
        return good, read

    def small_lines(self, source: _Source) -> tuple[list[str], int, bool]:
        """Return a file's lines, their number counted from its bytes, and if the last has no end.
        """
        before = source.path.stat()
        reader = _Reader(source)
        try:
            data = b"".join(iter(lambda: reader.read(BLOCK_BYTES), b""))
            self.used(source, before, reader.sha256())
        finally:
            reader.close()
        unended = not data.endswith(b"\n") and data != b""
        count = data.count(b"\n") + unended
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "backslashreplace")
        lines = text.split("\n")
        lines = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
        return lines, count, unended

    def refuse(self, source: _Source, line: int, reason: str, text: str) -> None:
        self.connection.execute(
            "INSERT INTO quarantine VALUES (?, ?, ?, ?)",
            [source.label, line, reason, _printable(text.encode(), 4)],
        )

    # the end

    def manifest(self, release: str, logs: dict, tables: dict) -> dict:
        connection = self.connection
        self.connection.execute(
            "COPY (SELECT * FROM quarantine ORDER BY file, line) TO"
            f" {_quote(self.folder / 'quarantine.csv')} (FORMAT csv, HEADER true)"
        )
        reasons: dict[str, dict[str, int]] = {}
        for file, reason, count in connection.execute(
            "SELECT file, reason, count(*) FROM quarantine GROUP BY ALL ORDER BY ALL"
        ).fetchall():
            reasons.setdefault(file, {})[reason] = count
        answers = f"read_parquet({_quote(self.folder / 'answers.parquet')})"
        account, insider = connection.execute(
            "SELECT count(DISTINCT (user, CAST(date AS DATE))),"
            f" count(DISTINCT (insider, CAST(date AS DATE))) FROM {answers}"
        ).fetchall()[0]
        scenarios = connection.execute(
            f"SELECT scenario, count(*) FROM read_parquet("
            f"{_quote(self.folder / 'insiders.parquet')}) GROUP BY ALL ORDER BY ALL"
        ).fetchall()
        views = [
            f"SELECT DISTINCT user FROM {_parquet(self.folder / 'events' / name / '*')}"
            for name in logs
            if logs[name]["stored"]
        ]
        users = without = 0
        if views:
            users, without = connection.execute(
                f"SELECT count(*), count(*) FILTER (user NOT IN (SELECT user FROM"
                f" read_parquet({_quote(self.folder / 'ldap.parquet')}))) FROM"
                f" ({' UNION '.join(views)})"
            ).fetchall()[0]
        if without:
            self.warnings.append(f"{without} users of the logs are in no LDAP month")
        unmatched, differing = self.unmatched(answers)
        insiders = {str(scenario): count for scenario, count in scenarios}
        days = {"account": account, "insider": insider}
        real = self.compare_with_real(logs, insiders, days)
        quarantined = self.count("quarantine")
        if quarantined:
            self.warnings.append(f"{quarantined:,} bad rows were left out, see quarantine.csv")
        firsts = [part["first"] for part in logs.values() if part["first"]]
        lasts = [part["last"] for part in logs.values() if part["last"]]
        self.connection.close()
        shutil.rmtree(self.work)
        files = {
            str(path.relative_to(self.folder)): path.stat().st_size
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }
        return {
            "kind": STORE_KIND,
            "version": STORE_VERSION,
            "release": release,
            "options": self.options,
            "buckets": self.buckets,
            "sources": self.sources,
            "logs": logs,
            "tables": tables,
            "rows": {
                key: sum(part[key] for part in (*logs.values(), *tables.values()))
                for key in ("read", "stored", "quarantined")
            } | {"other_releases": tables["insiders"]["other_releases"]},
            "quarantine_reasons": reasons,
            "users": users,
            "users_without_ldap": without,
            "first": min(firsts, default=None),
            "last": max(lasts, default=None),
            "real_release": real,
            "insiders": insiders,
            "positive_days": days,
            "answers_unmatched": unmatched,
            "answers_differing": differing,
            "answer_files_left_out": self.left_out,
            "files": files,
            "warnings": self.warnings,
        }

    def compare_with_key(self, name: str, quarantined: int) -> None:
        """Compare the key's rows of one log with its stored events in id, date, user and pc.

        Notes how many have no equal event, and of those whose id is there with another date, user
        or pc, each as {log, insider, id, key, event}.
        Raises `UserError` where more than 5 % of them, and more than five, have no equal event:
        r4.1, and r3 without email, have r4.2's headers and pass until here. Called as soon as a log
        is read, so that hours of web pages are not read in vain.
        """
        execute = self.connection.execute
        execute(
            "CREATE OR REPLACE TEMP TABLE key AS SELECT * FROM"
            f" read_parquet({_quote(self.folder / 'answers.parquet')}) WHERE log = '{name}'"
        )
        events = self.folder / "events" / name
        if not any(events.glob("*/*.parquet")):
            return
        equal = " AND ".join(f"e.{column} = k.{column}" for column in _EVENT_HEADER)
        # The events of the key's ids first: joined the other way round, all would be held.
        execute(
            "CREATE OR REPLACE TEMP TABLE known AS SELECT id, date, user, pc FROM"
            f" {_parquet(events / '*')} WHERE id IN (SELECT id FROM key)"
        )
        execute(
            "CREATE OR REPLACE TEMP TABLE lost AS SELECT * FROM key AS k"
            f" WHERE NOT EXISTS (SELECT 1 FROM known AS e WHERE {equal})"
        )
        rows = execute(
            "SELECT k.insider, k.id, concat_ws(' ', k.date, k.user, k.pc),"
            " concat_ws(' ', e.date, e.user, e.pc)"
            " FROM lost AS k JOIN known AS e USING (id) ORDER BY k.insider, k.date, k.id"
        ).fetchall()
        of_key, lost = self.count("key"), self.count("lost")
        unexplained = lost - quarantined
        if (unexplained > max(FEW_UNMATCHED, MOST_UNMATCHED * of_key)
                and not self.options["allow_partial"]):
            raise UserError(
                f"{self.found.logs[name].path}: {lost:,} of the {of_key:,} rows that"
                f" the answer key has of this log have no equal event in it"
                ": these logs are not of the release that the key belongs to, or only a part of"
                " it. r4.1 and r3 look like r4.2 from outside. Point at the folder of r4.2,"
                f" copy its {self.found.logs[name].path.name} and answers again,"
                f" {_or_else('--allow-partial')}"
            )
        self.lost[name] = lost
        self.differing += [
            {"log": name, "insider": insider, "id": identity, "key": key, "event": event}
            for insider, identity, key, event in rows
        ]

    def unmatched(self, answers: str) -> tuple[dict[str, int], list[dict]]:
        """Return how many rows of the key have no equal event, by log, and the differing; warn.

        Of the differing ones, the first `MAX_DIFFERING`.
        """
        counts = dict(self.connection.execute(
            f"SELECT log, count(*) FROM {answers} GROUP BY log").fetchall())
        missing = {name: self.lost.get(name, counts[name]) for name in LOGS if name in counts}
        differ = [row["log"] for row in self.differing]
        absent = {name: count - differ.count(name) for name, count in missing.items()}
        absent = {name: count for name, count in absent.items() if count}
        if absent:
            self.warnings.append(
                f"{sum(absent.values())} rows of the answer key are in no log: {absent}"
            )
        if differ:
            first = self.differing[0]
            self.warnings.append(
                f"{len(differ)} rows of the answer key differ from the event of that id in date,"
                f" user or pc, for instance {first['log']} {first['id']}: {first['key']} in the"
                f" key, {first['event']} in the log"
            )
        return ({name: count for name, count in missing.items() if count},
                self.differing[:MAX_DIFFERING])

    def compare_with_real(self, logs: dict, insiders: dict, days: dict) -> bool:
        """Say whether this is the real r4.2 (a log of its number of rows) and check its labels.

        Raises `UserError` where the real release's key does not give its insiders and days.
        """
        facts = R4_2_FACTS
        same = [name for name, part in logs.items() if part["read"] == facts["rows"][name]]
        for name in logs if same else ():
            if name not in same:
                self.warnings.append(
                    f"{self.found.logs[name].label}: {logs[name]['read']:,} rows, but"
                    f" {facts['rows'][name]:,} in the real release, which"
                    f" {', '.join(same)} agree with; is it whole?"
                )
        if same and self.found.insiders is not None:
            for what, got in (("insiders", insiders), ("positive_days", days)):
                if got != facts[what]:
                    raise UserError(
                        f"{self.found.answers}: {what} are {got}, expected {facts[what]}: the rows"
                        f" of {', '.join(same)} are those of the real r4.2, the answer key is not."
                        " Copy the answers again. (Warnings so far: "
                        f"{'; '.join(self.warnings) or 'none'}.)"
                    )
        return bool(same)


_TEXT = pa.schema([("line", pa.int64()), ("text", pa.string())])


def _texts_of(source: _Source, table: _Table, lines: np.ndarray) -> Iterator[pa.RecordBatch]:
    """Read a file again for the text of some lines, given sorted line numbers."""
    reader = _Reader(source)
    try:
        _, rest = _cut_header(reader, source)
        for block in _blocks(reader, rest, 2):
            parts = block.data.split(b"\n") if not block.too_long else [block.data]
            low, high = np.searchsorted(lines, (block.first_line, block.first_line + len(parts)))
            # The block after the last line end is empty and belongs to the next block.
            wanted = [n for n in lines[low:high].tolist() if parts[n - block.first_line]]
            texts = [_printable(parts[n - block.first_line].removesuffix(b"\r"),
                                table.plain_columns) for n in wanted]
            if wanted:
                yield pa.RecordBatch.from_arrays([pa.array(wanted), pa.array(texts)], schema=_TEXT)
    finally:
        reader.close()


def _parquet(folder: Path) -> str:
    return f"read_parquet({_quote(folder / '*.parquet')}, hive_partitioning = false)"


def _empty_table(table: _Table) -> str:
    columns = ", ".join(f'{sql} AS "{name}"' for name, sql in table.stored)
    given = ", ".join(f"'' AS \"{name}\"" for name in table.used)
    return f"SELECT {columns} FROM (SELECT {given}) WHERE false"


def _rows_table(rows: Iterable[tuple], names: Sequence[str], types: Sequence) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [() for _ in names]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
    return pa.table(dict(zip(names, arrays, strict=True)))


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(sep=" ")


def _cells(line: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line.replace("\0", "\\x00")]), [])]
    except csv.Error:
        return []


def _date(text: str) -> datetime | None:
    """Return the moment written as MM/DD/YYYY HH:MM:SS, zero-padded, of 2000-2099, or None.

    >>> _date("02/03/2010 04:05:06")
    datetime.datetime(2010, 2, 3, 4, 5, 6)
    >>> _date("2/3/2010 4:05:06") is None
    True
    """
    text = text.strip()
    if not re.fullmatch(r"\d\d/\d\d/20\d\d \d\d:\d\d:\d\d", text, re.ASCII):
        return None
    try:
        return datetime.strptime(text, DATE_FORMAT)
    except ValueError:
        return None


def _is_other_release(cells: list[str]) -> bool:
    """Say whether a row of insiders.csv is of another known release and names no file of r4.2."""
    others = set(DATASETS) - {"4.2"}
    return (
        len(cells) == 6 and cells[0].removeprefix("r") in others
        and not cells[2].startswith("r4.2-")
    )


def _insider_problem(cells: list[str], users: set[str]) -> str | None:
    if len(cells) != 6:
        return f"expected 6 columns, found {len(cells)}"
    if cells[0].removeprefix("r") not in DATASETS:
        return f"dataset is none of {', '.join(DATASETS)}"
    if cells[0].removeprefix("r") != "4.2":
        return "dataset is another release, but details names a file of r4.2"
    if cells[1] not in ("1", "2", "3"):
        return "scenario is not 1, 2 or 3"
    if not re.fullmatch(_USER, cells[3]):
        return "user is not three capitals and four digits"
    if cells[3] in users:
        return "user occurs earlier in the file"
    start, end = _date(cells[4]), _date(cells[5])
    if start is None or end is None:
        return "start or end is not MM/DD/YYYY HH:MM:SS"
    return "end is before start" if end < start else None


def _answer_problem(cells: list[str]) -> str | None:
    if len(cells) < 6:
        return f"expected at least 6 columns, found {len(cells)}"
    if cells[0] not in LOGS:
        return "the first column is not the name of a log"
    if not re.fullmatch(r"\{[A-Z0-9]{4}-[A-Z0-9]{8}-[A-Z0-9]{8}\}", cells[1]):
        return "id is not of the form {A9A9-A9AA99AA-9999AAAA}"
    if _date(cells[2]) is None:
        return _DATE_REASON
    if not re.fullmatch(_USER, cells[3]):
        return "user is not three capitals and four digits"
    if not re.fullmatch(r"PC-\d{4}", cells[4], re.ASCII):
        return "pc is not PC- and four digits"
    return None


def _assert_accounted(source: _Source, read: int, stored: int, quarantined: int) -> None:
    if read != stored + quarantined:
        raise RuntimeError(
            f"{source.label}: {read} rows read but {stored} stored and {quarantined} quarantined"
        )


def _connect(memory_limit: str, threads: int, spill: Path | None) -> duckdb.DuckDBPyConnection:
    if threads < 1:
        raise UserError(f"--threads must be at least 1, got {threads}.")
    connection = duckdb.connect()
    try:
        connection.execute(f"SET memory_limit = {_quote(memory_limit)}")
    except duckdb.Error as error:
        connection.close()
        raise UserError(
            f"--memory-limit {memory_limit!r} is not a size; write it like 1GB or 800MB."
        ) from error
    connection.execute(f"SET threads = {int(threads)}")
    connection.execute("SET enable_progress_bar = false")  # ours tells how far it is
    if spill is not None:
        connection.execute(f"SET temp_directory = {_quote(spill)}")
    return connection


def ingest(
    release: Path | str,
    store: Path | str,
    *,
    memory_limit: str = "1GB",
    threads: int = 2,
    max_quarantine_share: float = 0.01,
    allow_empty: bool = False,
    allow_truncated: bool = False,
    allow_partial: bool = False,
    buckets: int | None = None,
    progress: Progress | None = None,
) -> dict:
    """Read a CERT r4.2 folder into an event store and return its manifest.

    A complete store of the same files (name, size, and time or hash) and options is returned as it
    is. Otherwise the store is built in a hidden sibling folder and takes the place of the old one
    at the end: whatever happens, `store` is the old one, the new one, or absent, never half of one.
    `max_quarantine_share` (0-1) is the share of bad rows of a file above which the ingest stops;
    `allow_empty` accepts a log without rows, `allow_truncated` quarantines a last row that is cut;
    `allow_partial` accepts logs that lack events of the answer key, such as the first months only,
    and a key that lacks the file of an insider it lists;
    `buckets` (default 16, 4 for small folders) is the number of parts by account; `memory_limit` is
    DuckDB's, beside about 300 MB of this process.

    Raises `UserError` for everything a user can mend: missing folder, other release, wrong header,
    empty or cut log, too many bad rows, a target that is not an event store, no space left.
    """
    release, store = Path(release), Path(store)
    if not 0 <= max_quarantine_share <= 1:
        raise UserError(f"--max-bad must be within 0 and 1, got {max_quarantine_share}.")
    if buckets is not None and not 1 <= buckets <= 100:
        raise UserError(f"buckets must be within 1 and 100, got {buckets}.")
    with _mendable(store, memory_limit):
        found = _find(release)
        name = _recognise(found)
        _check_target(release, store)
        size = sum(source.path.stat().st_size for source in found.tables())
        options = {
            "max_quarantine_share": max_quarantine_share,
            "allow_empty": allow_empty,
            "allow_truncated": allow_truncated,
            "allow_partial": allow_partial,
            "buckets": buckets or (16 if size > 64 << 20 else 4),
        }
        ready = _reusable(found, store, options)
        if ready is not None:
            _sweep(store)
            if progress:
                progress(f"{store}: complete and unchanged, used as it is")
            return ready
        with _only_writer(store), _replacing(store) as folder:
            connection = _connect(memory_limit, threads, folder / ".work" / "spill")
            with contextlib.closing(connection):
                work = _Ingest(found, folder, connection, options, progress)
                manifest = _fill(work, name)
            write_json(folder / "manifest.json", manifest)
        return manifest


@contextlib.contextmanager
def _mendable(path: Path, memory_limit: str) -> Iterator[None]:
    """Turn what the system and DuckDB refuse into one `UserError`; `path` is where, if unknown."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"a memory limit of {memory_limit} is too small for this release: raise it by"
            f" --memory-limit. ({error})"
        ) from error
    except duckdb.IOException as error:
        raise UserError(f"{path}: cannot be read or written: {error}") from error
    except duckdb.Error as error:
        raise UserError(f"{path}: DuckDB cannot go on: {error}") from error
    except RuntimeError as error:
        if str(error) == "Query interrupted":  # so DuckDB words Ctrl-C
            raise KeyboardInterrupt from error
        raise
    except BrokenPipeError:  # whoever read the progress has gone
        raise
    except PermissionError as error:
        raise UserError(
            f"{error.filename or path}: permission denied. Change its permissions, or copy it."
        ) from error
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}.") from error


def _fill(work: _Ingest, name: str) -> dict:
    tables = {"ldap": work.ldap(), "psychometric": work.psychometric()}
    tables["insiders"], tables["answers"] = work.answers()
    logs = {}
    for log in (log for log in LOGS if log in work.found.logs):
        logs[log] = work.log(log)
        work.compare_with_key(log, logs[log]["quarantined"])
    return work.manifest(name, logs, tables)


def _check_target(release: Path, store: Path) -> None:
    if store.resolve() == release.resolve() or store.resolve() in release.resolve().parents:
        raise UserError(f"{store}: the store must not be the release folder or hold it.")
    if not store.exists():
        return
    if not store.is_dir():
        raise UserError(f"{store}: is a file; name a folder for the store.")
    if any(store.iterdir()) and _read_manifest(store) is None:
        raise UserError(
            f"{store}: is not empty and not an event store, so it is not overwritten (an event"
            " store has a whole manifest.json). Name another folder, or remove it yourself."
        )


_MANIFEST_TYPES = {
    "release": str, "options": dict, "buckets": int, "sources": dict, "logs": dict, "tables": dict,
    "rows": dict, "files": dict, "insiders": dict, "positive_days": dict,
    "answer_files_left_out": list, "warnings": list,
}


def _read_manifest(store: Path) -> dict | None:
    """Return the manifest of a store of any version, or None: absent, damaged, or another thing."""
    try:
        manifest = json.loads((store / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or manifest.get("kind") != STORE_KIND:
        return None
    if manifest.get("version") == STORE_VERSION and not _well_formed(manifest):
        return None
    return manifest


def _well_formed(manifest: dict) -> bool:
    """Say whether all that is read from a manifest is there and of its type."""
    if not all(isinstance(manifest.get(key), kind) for key, kind in _MANIFEST_TYPES.items()):
        return False
    parts = [*manifest["logs"].values(), *manifest["tables"].values(), manifest["rows"]]
    counts = ("read", "stored", "quarantined")
    return (
        manifest["buckets"] > 0
        and all(isinstance(size, int) for size in manifest["files"].values())
        and all(isinstance(known, dict) and {"bytes", "mtime_ns", "sha256"} <= set(known)
                for known in manifest["sources"].values())
        and all(isinstance(part, dict) and all(isinstance(part.get(key), int) for key in counts)
                for part in parts)
    )


def _whole(store: Path, manifest: dict) -> bool:
    for name, size in manifest["files"].items():
        path = store / name
        if not path.is_file() or path.stat().st_size != size:
            return False
    return True


def _reusable(found: _Release, store: Path, options: dict) -> dict | None:
    manifest = _read_manifest(store)
    if manifest is None or manifest.get("version") != STORE_VERSION:
        return None
    if manifest["options"] != options or not _whole(store, manifest):
        return None
    sources = found.tables()
    if found.insiders is not None:
        sources += [found.insiders, *found.answer_files()]
    seen = {source.label: source.path for source in sources}
    used = manifest["sources"]
    if set(seen) != {*used, *manifest["answer_files_left_out"]}:
        return None
    for label, known in used.items():
        status = seen[label].stat()
        if status.st_size != known["bytes"]:
            return None
        same_time = status.st_mtime_ns == known["mtime_ns"]
        if not same_time and sha256_of(seen[label]) != known["sha256"]:
            return None
    return manifest


@contextlib.contextmanager
def _only_writer(store: Path) -> Iterator[None]:
    """Hold the right to write `store`; the system releases it even if this process is killed."""
    store.parent.mkdir(parents=True, exist_ok=True)
    path = _lock_of(store)
    while True:
        handle = open(path, "w")  # noqa: SIM115
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.close()
            raise UserError(f"{store}: another ingest is writing it; wait for it.") from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                break
        handle.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        handle.close()


def _lock_of(store: Path) -> Path:
    return store.parent / f".{store.name}.lock"


@contextlib.contextmanager
def _replacing(store: Path) -> Iterator[Path]:
    """Yield a fresh sibling folder that takes the place of `store` at the end, in one step.

    Folders left by attempts that were killed are removed first; the caller is the only writer.
    """
    folder, old = _attempts(store)
    for left in (folder, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        folder.mkdir()
        yield folder
        if store.exists():
            os.replace(store, old)
        os.replace(folder, store)
    finally:
        for left in (folder, old):
            shutil.rmtree(left, ignore_errors=True)


def _attempts(store: Path) -> tuple[Path, Path]:
    """Return the folder that is filled and the one an old store is put aside in."""
    return tuple(store.parent / f".{store.name}.ingest-{part}" for part in ("new", "old"))


def _sweep(store: Path) -> None:
    """Remove what a killed attempt left beside a store, unless another ingest writes it now."""
    left = [path for path in (*_attempts(store), _lock_of(store)) if path.exists()]
    if left:
        with contextlib.suppress(UserError), _only_writer(store):
            for path in _attempts(store):
                shutil.rmtree(path, ignore_errors=True)


# --- the store ------------------------------------------------------------------------------------

_TEXT_COLUMNS = {"id": "VARCHAR", "date": "TIMESTAMP", "user": "VARCHAR", "pc": "VARCHAR"}
EVENT_COLUMNS = {
    "logon": {**_TEXT_COLUMNS, "activity": "VARCHAR"},
    "device": {**_TEXT_COLUMNS, "activity": "VARCHAR"},
    "file": {**_TEXT_COLUMNS, "filename": "VARCHAR", "extension": "VARCHAR"},
    "email": {
        **_TEXT_COLUMNS,
        "from": "VARCHAR",
        "n_to": "INTEGER",
        "n_external": "INTEGER",
        "n_competitor": "INTEGER",
        "n_recipients": "INTEGER",
        "size": "BIGINT",
        "attachments": "INTEGER",
    },
    "http": {**_TEXT_COLUMNS, "domain": "VARCHAR", "topic": "VARCHAR", "category": "VARCHAR"},
}
SMALL_TABLES = ("ldap", "psychometric", "insiders", "answers")


def is_store(path: Path | str) -> bool:
    """Say whether a folder is an event store written by `ingest`, of any version."""
    return _read_manifest(Path(path)) is not None


class Store:
    """An event store written by `ingest`, opened for reading.

    `manifest` is the dict of manifest.json. Raises `UserError` if the folder is no complete store.
    """

    def __init__(self, path: Path | str):
        self.root = Path(path)
        if not self.root.is_dir():
            raise UserError(f"{self.root}: no such event store. Write it with `ueba ingest`.")
        manifest = _read_manifest(self.root)
        if manifest is None:
            raise UserError(
                f"{self.root}: has no manifest.json of an event store; the ingest is not complete."
                " Run `ueba ingest` again."
            )
        if manifest.get("version") != STORE_VERSION:
            raise UserError(
                f"{self.root}: was written by another version of the loader. Run `ueba ingest`"
                " again."
            )
        if not _whole(self.root, manifest):
            raise UserError(f"{self.root}: files are missing or cut. Run `ueba ingest` again.")
        self.manifest = manifest

    @property
    def buckets(self) -> int:
        """Number of parts by account."""
        return self.manifest["buckets"]

    def bucket_of(self, user: str) -> int:
        """Return the part that holds an account's events: its four digits modulo `buckets`."""
        return int(user[3:]) % self.buckets

    def path(self, log: str, *, bucket: int | None = None) -> str:
        """Return the glob of a log's Parquet files, of one part or of all."""
        if log not in LOGS:
            raise ValueError(f"log must be one of {LOGS}, got {log!r}")
        part = "*" if bucket is None else f"{bucket:02d}"
        return str(self.root / "events" / log / f"bucket={part}" / "*.parquet")

    def connect(
        self, *, memory_limit: str = "1GB", threads: int = 2
    ) -> duckdb.DuckDBPyConnection:
        """Return a DuckDB connection with a view for each log and each small table.

        Views of logs end with the column `bucket` (int), so that `WHERE bucket = 3` opens only the
        files of that part. A log that the release lacks is an empty view with the right columns.
        """
        connection = _connect(memory_limit, threads, None)
        with _mendable(self.root, memory_limit), contextlib.ExitStack() as failed:
            failed.callback(connection.close)
            for log in LOGS:
                connection.execute(f"CREATE VIEW {log} AS {self._events(log)}")
            for name in SMALL_TABLES:
                file = _quote(self.root / f"{name}.parquet")
                connection.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet({file})")
            failed.pop_all()
        return connection

    def _events(self, log: str) -> str:
        if self.manifest["logs"].get(log, {}).get("stored"):
            return (
                f"SELECT * FROM read_parquet({_quote(self.path(log))}, hive_partitioning = true,"
                " hive_types = {'bucket': INTEGER})"
            )
        columns = ", ".join(
            f'CAST(NULL AS {kind}) AS "{name}"' for name, kind in EVENT_COLUMNS[log].items()
        )
        return f"SELECT {columns}, CAST(NULL AS INTEGER) AS bucket WHERE false"
