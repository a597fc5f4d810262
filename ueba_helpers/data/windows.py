"""Events to account-day windows: behaviour, own past, labels, deviations and evidence items.

In: an event store (`cert.ingest`). Out: `windows.parquet`, one row per account and day with at
least one event, and for chosen windows the evidence items a prompt shows. Refused with a
`UserError`: an incomplete store, training users nobody has heard of, impossible settings.

Everything is SQL in DuckDB, one bucket of users at a time: each event is read once, nothing loops
over events, and memory is bounded by one bucket. The stated rules, all past-only:

  day, hour       calendar day and hour of `date`; after hours: before 07:00 or from 19:00 on.
  history         the account's last `history_days` active days before the day (fewer at first);
                  an active day has at least one event. `past_*` columns describe it and nothing
                  before it: a count over all earlier days would grow with the calendar, and a low
                  one say "before the first label".
  week            the seven calendar days before the day (`week_*`), today excluded.
  new workstation a PC the account never logged on to, nor plugged a drive in, on an earlier day.
  deviation       a behaviour far from the own history (`DEVIATION_RULES`) at a level that fewer
                  than `deviation_share` of the training users' days reach. The level is the lowest
                  of a short ladder; a kind common at every level is dropped. Accounts with fewer
                  than `min_history` active days behind them have no deviation.
  risk            malicious: the day holds an answer-key row of this account. Otherwise suspicious
                  where a deviation was found, normal where none was.
  role            of the newest LDAP month strictly before the day's month; `UNKNOWN_ROLE`, with no
                  department, where there is none.

Labels join on (log, id) and calendar days, never on day numbers. Two views of the key: `malicious`
counts the row's own account (986 days on r4.2); `malicious_insider` the insider (966), also where
that day's labelled rows were all made through another account. `precursor` marks days of an
incident that the key leaves out: the scenario's behaviour on the insider's own account (scenario
1: drive after hours from 14 days before the first label; 2: drive, job pages or mail to a
competitor between the labels; 3: hacking pages from 7 days before, drive or programs between the
labels), and the insider's own day while acting through another account. The tail stays out: the
same behaviour after the last label (scenario 2 goes on for some days) is a plain negative, since
the key gives no end to count to. `ignore` marks days that nobody is trained or judged on: days
before the account's history is full (`full_history` says so: `past_days` reaches `history_days`),
and days whose labelled rows are mail only and written by somebody else than the insider (innocent
replies). A release begins with weeks that hold no label at all, so where a short history were
judged, its length alone would prove a day benign. Every build compares its labels with the key,
account-day by account-day, in both views.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pandas as pd

from ueba_helpers.data.cert import LOGS, Store
from ueba_helpers.data.files import atomic_path, write_json
from ueba_helpers.errors import UserError

FORMAT_VERSION = 3
RISKS = ("normal", "suspicious", "malicious")
UNKNOWN_ROLE = "unknown"
_FEW_USERS = 50
_PARTS = ".parts-"  # prefix of the folder a build works in, followed by its process
DAY_STARTS, DAY_ENDS = 7, 19  # hours; outside is "after hours"

BEHAVIOUR_FEATURES = (
    "n_logon", "n_logoff", "n_after_hours_logon", "first_hour", "last_hour", "n_pcs", "n_new_pcs",
    "n_device", "n_device_after_hours", "n_file", "n_file_exe", "n_email", "n_email_external",
    "n_email_competitor", "email_size", "attachments", "max_recipients", "n_http",
    "n_http_after_hours", "n_http_job", "n_http_leak", "n_http_hack", "n_http_cloud",
)
PAST_FEATURES = (
    "past_days", "past_first_hour", "past_last_hour", "past_pcs", "past_device_days", "past_files",
    "past_email", "past_email_external", "past_http", "past_job_days", "past_competitor_days",
    "past_after_hours_days",
)
WEEK_FEATURES = (
    "week_device", "week_files", "week_after_hours", "week_job", "week_competitor", "week_new_pcs",
)
# Needed by the deviation rules and shown in evidence facts; past-only like the rest.
RULE_FEATURES = (
    "early_logon", "late_logon", "external_attachments", "past_hour_low", "past_hour_high",
    "past_device", "past_max_files", "past_exe_days", "past_max_recipients",
    "past_max_attachments", "past_leak_days", "past_hack_days",
)
MEANING = {
    "past_days": "active days in the history (at most history_days, so many on a judged day)",
    "past_first_hour": "median hour of the first event of a past day",
    "past_last_hour": "median hour of the last event of a past day",
    "past_pcs": "different PCs used on past days",
    "past_device_days": "past days with a removable drive",
    "past_files": "files copied to a drive per past day (mean)",
    "past_email": "mails sent per past day (mean)",
    "past_email_external": "mails to outside addresses per past day (mean)",
    "past_http": "web pages per past day (mean)",
    "past_job_days": "past days with a job page",
    "past_competitor_days": "past days with a mail to a competitor",
    "past_after_hours_days": "past days with an after-hours logon",
    "week_device": "drive connections in the last seven days",
    "week_files": "files copied to a drive in the last seven days",
    "week_after_hours": "after-hours logons in the last seven days",
    "week_job": "job pages in the last seven days",
    "week_competitor": "mails to competitors in the last seven days",
    "week_new_pcs": "PCs used for the first time in the last seven days",
}
FEATURES = (
    "usual_hours", "own_workstation", "usual_web", "usual_mail", "no_removable_media",
    "usual_removable_media", "after_hours_logon", "new_workstation", "removable_media_new",
    "removable_media_increase", "bulk_file_copy", "executable_copy", "job_search",
    "competitor_mail", "external_attachments", "mass_mail", "leak_site", "hacking_tool",
)
DEVIATIONS = FEATURES[6:]


@dataclass(frozen=True)
class DeviationRule:
    """How far a day is from the account's own past, as SQL, and the levels that may be fitted.

    `strength` is 0 where the behaviour is absent or usual; `unit` says what it counts.
    """

    strength: str
    levels: tuple[float, ...]
    unit: str


DEVIATION_RULES: Mapping[str, DeviationRule] = {
    "after_hours_logon": DeviationRule(
        "greatest(coalesce(past_hour_low - early_logon, 0), "
        "coalesce(late_logon - past_hour_high, 0), 0)",
        (2, 3, 4, 5, 6, 8),
        "hours by which an after-hours logon lies outside the middle 80 % of own past hours",
    ),
    "new_workstation": DeviationRule(
        "CASE WHEN past_pcs <= 1 + 0.1 * past_days THEN n_new_pcs ELSE 0 END",
        (1, 2, 3, 5, 10),
        "PCs never used before, where the past days saw at most one and one for each ten days",
    ),
    "removable_media_new": DeviationRule(
        "CASE WHEN past_device_days = 0 THEN n_device ELSE 0 END",
        (1, 2, 3, 5, 8),
        "drive connections, with no drive in the history",
    ),
    "removable_media_increase": DeviationRule(
        "CASE WHEN n_device > 0 AND past_device_days > 0 AND week_device + n_device >= 4 "
        "THEN (week_device + n_device) / greatest(1, 6 * past_device / past_days) ELSE 0 END",
        (2, 2.5, 3, 3.5, 4, 5),
        "drive connections today and in the last seven days over six average days of the past",
    ),
    "bulk_file_copy": DeviationRule(
        "CASE WHEN n_file >= 6 THEN n_file / greatest(3, past_max_files) ELSE 0 END",
        (1.5, 2, 3, 4, 6, 8),
        "files copied to a drive (6 and more) over the most of any past day (at least 3)",
    ),
    "executable_copy": DeviationRule(
        "CASE WHEN past_exe_days = 0 THEN n_file_exe ELSE 0 END",
        (1, 2, 3, 5),
        "programs copied to a drive, with none in the history",
    ),
    "job_search": DeviationRule(
        "CASE WHEN past_job_days <= 0.1 * past_days THEN n_http_job ELSE 0 END",
        (1, 2, 3, 5, 8, 12),
        "job pages, where at most a tenth of the past days had one",
    ),
    "competitor_mail": DeviationRule(
        "CASE WHEN past_competitor_days <= 0.1 * past_days THEN n_email_competitor ELSE 0 END",
        (1, 2, 3, 5),
        "mails to competitors, where at most a tenth of the past days had one",
    ),
    "external_attachments": DeviationRule(
        "external_attachments / greatest(2, past_max_attachments)",
        (2, 3, 4, 6),
        "attachments sent outside over the most of any past day (at least 2)",
    ),
    "mass_mail": DeviationRule(
        "max_recipients / greatest(4, past_max_recipients)",
        (1.5, 2, 3, 4, 6),
        "recipients of one mail over the most of any past mail (at least 4)",
    ),
    "leak_site": DeviationRule(
        "CASE WHEN past_leak_days = 0 THEN n_http_leak ELSE 0 END",
        (1, 2, 3, 5),
        "pages of a leak site, with none in the history",
    ),
    "hacking_tool": DeviationRule(
        "CASE WHEN past_hack_days = 0 THEN n_http_hack ELSE 0 END",
        (1, 2, 3, 5),
        "pages about hacking tools, with none in the history",
    ),
}
assert tuple(DEVIATION_RULES) == DEVIATIONS



def _reached(kind: str) -> str:
    return f"s_{kind} >= {DEVIATION_RULES[kind].levels[0]}"


_ODD_HOURS = (
    f"n_after_hours_logon > 0 AND (NOT enough_history OR {_reached('after_hours_logon')} "
    "OR past_after_hours_days <= 0.1 * past_days)"
)
# What a day can be said to show, in the order of telling (the first four are the truth). The
# conditions use behaviour and past alone, at the lowest level of a rule; `s_*` are strengths.
# One name about hours and one about drives hold on every day, so two can always be said.
_FEATURE_RULES = {
    "leak_site": "n_http_leak > 0",
    "hacking_tool": "n_http_hack > 0",
    "executable_copy": "n_file_exe > 0",
    "mass_mail": _reached("mass_mail"),
    "competitor_mail": "n_email_competitor > 0",
    "job_search": "n_http_job > 0",
    "bulk_file_copy": _reached("bulk_file_copy"),
    "removable_media_new": "n_device + n_file > 0 AND past_device_days = 0",
    "removable_media_increase": _reached("removable_media_increase"),
    "after_hours_logon": _ODD_HOURS,
    "new_workstation": "n_new_pcs > 0",
    "external_attachments": _reached("external_attachments"),
    "usual_removable_media": "n_device + n_file > 0 AND past_device_days > 0 "
    f"AND NOT {_reached('removable_media_increase')}",
    "usual_hours": f"NOT ({_ODD_HOURS})",
    "own_workstation": "n_pcs > 0 AND n_new_pcs = 0",
    "no_removable_media": "n_device = 0 AND n_file = 0",
    "usual_web": "n_http > 0 AND n_http_job = 0 AND n_http_leak = 0 AND n_http_hack = 0",
    "usual_mail": f"n_email > 0 AND n_email_competitor = 0 AND NOT {_reached('mass_mail')} "
    f"AND NOT {_reached('external_attachments')}",
}
assert set(_FEATURE_RULES) == set(FEATURES)

_EXECUTABLE = "('exe', 'dll', 'msi', 'bat', 'com', 'scr', 'jar', 'vbs', 'ps1', 'cmd', 'sys')"
_WINDOW_COLUMNS = (
    "window_id", "user", "day", "weekday", "role", "department", "ldap_month", "enough_history",
    "full_history",
    *BEHAVIOUR_FEATURES, *PAST_FEATURES, *WEEK_FEATURES, *RULE_FEATURES,
    "malicious", "malicious_insider", "scenario", "incident", "precursor", "ignore",
)


@dataclass(frozen=True)
class Evidence:
    """One condensed, dated line of a window that stands for one or more raw events.

    `start` and `end` are "HH:MM"; `facts` are short visible statements about the day and the own
    past; `events` are raw event ids; `truth` and `dont_care` belong to the answer, not the prompt.
    """

    id: str
    kind: str
    start: str
    end: str
    pc: str
    detail: str
    n: int
    facts: tuple[str, ...]
    events: tuple[str, ...]
    truth: bool
    dont_care: bool


@dataclass(frozen=True)
class Window:
    """One account on one day, with its own past, its last week and its evidence items.

    `past` and `week` map the names of `PAST_FEATURES` and `WEEK_FEATURES` to numbers; a median
    hour is NaN where there is no past. `dropped` counts evidence items left out for length.
    """

    window_id: str
    user: str
    day: str
    weekday: int
    role: str
    department: str
    past: dict
    week: dict
    evidence: tuple[Evidence, ...]
    risk: str
    features: tuple[str, ...]
    dropped: int = 0


# ---------------------------------------------------------------------------------------------
# Reading the store


def _quoted(value: object) -> str:
    return str(value).replace("'", "''")


def _view_part(connection, buckets: Iterable[int], *, where: str = "true") -> None:
    """Make the views `part_logon` … `part_http` of some buckets, with `h` (hour) and `day`."""
    listed = ", ".join(str(int(bucket)) for bucket in buckets)
    for log in LOGS:
        connection.execute(
            f"CREATE OR REPLACE TEMP VIEW part_{log} AS SELECT * EXCLUDE (bucket), "
            "date::DATE AS day, (epoch(date::TIME) / 3600.0)::DOUBLE AS h "
            f"FROM {log} WHERE bucket IN ({listed}) AND {where}"
        )


def _seen(where: str, before: str | None) -> str:
    """Return a condition on events, cut to those before a date where one is given."""
    return where if before is None else f"{where} AND date < DATE '{_quoted(before)}'"


_AFTER = f"(h < {DAY_STARTS} OR h >= {DAY_ENDS})"
_HOURS = "min(h) AS first_hour, max(h) AS last_hour"
_DAILY_SQL = f"""
WITH parts AS (
    SELECT user, day, {_HOURS},
        count(*) FILTER (activity = 'Logon') AS n_logon,
        count(*) FILTER (activity = 'Logoff') AS n_logoff,
        count(*) FILTER (activity = 'Logon' AND {_AFTER}) AS n_after_hours_logon,
        min(h) FILTER (activity = 'Logon' AND h < {DAY_STARTS}) AS early_logon,
        max(h) FILTER (activity = 'Logon' AND h >= {DAY_ENDS}) AS late_logon
    FROM part_logon GROUP BY user, day
  UNION ALL BY NAME
    SELECT user, day, {_HOURS},
        count(*) FILTER (activity = 'Connect') AS n_device,
        count(*) FILTER (activity = 'Connect' AND {_AFTER}) AS n_device_after_hours
    FROM part_device GROUP BY user, day
  UNION ALL BY NAME
    SELECT user, day, {_HOURS}, count(*) AS n_file,
        count(*) FILTER (extension IN {_EXECUTABLE}) AS n_file_exe
    FROM part_file GROUP BY user, day
  UNION ALL BY NAME
    SELECT user, day, {_HOURS}, count(*) AS n_email,
        count(*) FILTER (n_external > 0) AS n_email_external,
        count(*) FILTER (n_competitor > 0) AS n_email_competitor,
        sum(size) AS email_size, sum(attachments) AS attachments,
        coalesce(sum(attachments) FILTER (n_external > 0), 0) AS external_attachments,
        max(n_recipients) AS max_recipients
    FROM part_email GROUP BY user, day
  UNION ALL BY NAME
    SELECT user, day, {_HOURS}, count(*) AS n_http,
        count(*) FILTER ({_AFTER}) AS n_http_after_hours,
        count(*) FILTER (category = 'job') AS n_http_job,
        count(*) FILTER (category = 'leak') AS n_http_leak,
        count(*) FILTER (category = 'hack') AS n_http_hack,
        count(*) FILTER (category = 'cloud') AS n_http_cloud
    FROM part_http GROUP BY user, day
  UNION ALL BY NAME
    SELECT user, day, count(*) AS n_pcs, list(pc) AS pcs,
        count(*) FILTER (day = first_day) AS n_first_pcs
    FROM (SELECT user, day, pc, min(day) OVER (PARTITION BY user, pc) AS first_day
          FROM (SELECT user, day, pc FROM part_logon UNION SELECT user, day, pc FROM part_device))
    GROUP BY user, day
),
daily AS (
    SELECT user, day, min(first_hour) AS first_hour, max(last_hour) AS last_hour,
        min(early_logon) AS early_logon, max(late_logon) AS late_logon,
        any_value(pcs) AS pcs, {{sums}}
    FROM parts GROUP BY user, day
),
numbered AS (
    SELECT *, row_number() OVER (PARTITION BY user ORDER BY day) AS active_day FROM daily
),
counted AS (
    SELECT *, CASE WHEN active_day = 1 THEN 0 ELSE n_first_pcs END AS n_new_pcs FROM numbered
)
SELECT user || '_' || strftime(day, '%Y-%m-%d') AS window_id, user, day,
    (isodow(day) - 1)::TINYINT AS weekday,
    n_logon, n_logoff, n_after_hours_logon, first_hour, last_hour, n_pcs, n_new_pcs, n_device,
    n_device_after_hours, n_file, n_file_exe, n_email, n_email_external, n_email_competitor,
    email_size, attachments, max_recipients, n_http, n_http_after_hours, n_http_job, n_http_leak,
    n_http_hack, n_http_cloud, early_logon, late_logon, external_attachments,
    count(*) OVER history AS past_days,
    median(first_hour) OVER history AS past_first_hour,
    median(last_hour) OVER history AS past_last_hour,
    quantile_cont(first_hour, 0.1) OVER history AS past_hour_low,
    quantile_cont(last_hour, 0.9) OVER history AS past_hour_high,
    list_unique(flatten(list(pcs) OVER history)) AS past_pcs,
    {{past}},
    coalesce(sum(n_device) OVER week, 0) AS week_device,
    coalesce(sum(n_file) OVER week, 0) AS week_files,
    coalesce(sum(n_after_hours_logon) OVER week, 0) AS week_after_hours,
    coalesce(sum(n_http_job) OVER week, 0) AS week_job,
    coalesce(sum(n_email_competitor) OVER week, 0) AS week_competitor,
    coalesce(sum(n_new_pcs) OVER week, 0) AS week_new_pcs
FROM counted
WINDOW
    history AS (PARTITION BY user ORDER BY day ROWS BETWEEN {{history_days}} PRECEDING
                AND 1 PRECEDING),
    week AS (PARTITION BY user ORDER BY day RANGE BETWEEN INTERVAL 7 DAYS PRECEDING
             AND INTERVAL 1 DAY PRECEDING)
"""
_SUMMED = (
    "n_logon", "n_logoff", "n_after_hours_logon", "n_pcs", "n_first_pcs", "n_device",
    "n_device_after_hours", "n_file", "n_file_exe", "n_email", "n_email_external",
    "n_email_competitor", "email_size", "attachments", "external_attachments", "max_recipients",
    "n_http", "n_http_after_hours", "n_http_job", "n_http_leak", "n_http_hack", "n_http_cloud",
)
_PAST_DAYS_WITH = {
    "past_device_days": "n_device > 0", "past_job_days": "n_http_job > 0",
    "past_competitor_days": "n_email_competitor > 0",
    "past_after_hours_days": "n_after_hours_logon > 0",
    "past_exe_days": "n_file_exe > 0", "past_leak_days": "n_http_leak > 0",
    "past_hack_days": "n_http_hack > 0",
}
_PAST_VALUES = {
    "past_files": "avg(n_file)", "past_email": "avg(n_email)",
    "past_email_external": "avg(n_email_external)", "past_http": "avg(n_http)",
    "past_device": "sum(n_device)", "past_max_files": "max(n_file)",
    "past_max_recipients": "max(max_recipients)",
    "past_max_attachments": "max(external_attachments)",
}


def _daily_sql(history_days: int) -> str:
    past = [f"count(*) FILTER ({rule}) OVER history AS {name}"
            for name, rule in _PAST_DAYS_WITH.items()]
    past += [f"coalesce({value} OVER history, 0) AS {name}"
             for name, value in _PAST_VALUES.items()]
    sums = ", ".join(f"coalesce(sum({name}), 0)::DOUBLE AS {name}" for name in _SUMMED)
    return _DAILY_SQL.format(sums=sums, past=",\n    ".join(past), history_days=int(history_days))


def _window_sql(daily: str, min_history: int, history_days: int) -> str:
    """Return the SQL of whole windows from a relation of daily rows, the LDAP and the key.

    LDAP: the newest row of the user in a month strictly before the day's, or nothing.
    """
    numbers = (*BEHAVIOUR_FEATURES, *PAST_FEATURES, *WEEK_FEATURES, *RULE_FEATURES)
    columns = ", ".join(
        f"d.{name}::DOUBLE AS {name}" if name in ("past_first_hour", "past_last_hour",
                                                  "past_hour_low", "past_hour_high",
                                                  "early_logon", "late_logon")
        else f"coalesce(d.{name}, 0)::DOUBLE AS {name}"
        for name in numbers
    )
    return f"""
    WITH d AS ({daily}),
    placed AS (
        SELECT d.*, coalesce(before.role, '{UNKNOWN_ROLE}') AS role,
            coalesce(before.department, '') AS department, before.month AS ldap_month
        FROM d
        ASOF LEFT JOIN ldap_months AS before
            ON d.user = before.user AND strftime(d.day, '%Y-%m') > before.month
    )
    SELECT d.window_id, d.user, d.day, d.weekday, d.role, d.department, d.ldap_month,
        d.past_days >= {int(min_history)} AS enough_history,
        d.past_days >= {int(history_days)} AS full_history, {columns},
        key.user IS NOT NULL AS malicious,
        own.insider IS NOT NULL AS malicious_insider,
        coalesce(key.scenario, own.scenario, span.scenario, 0)::TINYINT AS scenario,
        coalesce(key.insider, own.insider, span.insider) AS incident,
        key.user IS NULL AND (own.insider IS NOT NULL OR span.insider IS NOT NULL) AS precursor,
        d.past_days < {int(history_days)}
            OR coalesce(key.mail_only AND NOT key.by_insider, false) AS ignore
    FROM placed AS d
    LEFT JOIN key_days AS key ON d.user = key.user AND d.day = key.day
    LEFT JOIN insider_days AS own ON d.user = own.insider AND d.day = own.day
    LEFT JOIN (
        SELECT d.window_id, min(s.scenario) AS scenario, min(s.insider) AS insider
        FROM d JOIN key_spans AS s ON d.user = s.insider AND d.day <= s.last_day AND CASE s.scenario
            WHEN 1 THEN d.day >= s.first_day - 14 AND d.n_device_after_hours > 0
            WHEN 2 THEN d.day >= s.first_day
                AND (d.n_device > 0 OR d.n_http_job > 0 OR d.n_email_competitor > 0)
            ELSE d.day >= s.first_day - 7 AND (d.n_http_hack > 0 OR (d.day >= s.first_day
                AND (d.n_device > 0 OR d.n_file_exe > 0))) END
        GROUP BY d.window_id
    ) AS span ON d.window_id = span.window_id
    """


def _load_side_tables(connection) -> None:
    """Make the small tables of LDAP months and of the answer key in memory."""
    connection.execute(
        "CREATE TEMP TABLE ldap_months AS SELECT month, user, min(role) AS role, "
        "min(department) AS department FROM ldap GROUP BY month, user"
    )
    connection.execute(
        "CREATE TEMP TABLE key_rows AS SELECT insider, scenario::TINYINT AS scenario, "
        "log, id, date::DATE AS day, user FROM answers"
    )
    connection.execute(
        "CREATE TEMP TABLE key_days AS SELECT user, day, min(insider) AS insider, "
        "min(scenario) AS scenario, bool_or(user = insider) AS by_insider, "
        "bool_and(log = 'email') AS mail_only FROM key_rows GROUP BY user, day"
    )
    connection.execute(
        "CREATE TEMP TABLE insider_days AS SELECT insider, day, min(scenario) AS scenario "
        "FROM key_rows GROUP BY insider, day"
    )
    connection.execute(
        "CREATE TEMP TABLE key_spans AS SELECT insider, min(scenario) AS scenario, "
        "min(day) AS first_day, max(day) AS last_day FROM key_rows GROUP BY insider"
    )


def _open(store: Path | str, memory_limit: str, threads: int):
    """Return the store and a connection to it with the side tables."""
    store = Store(store)
    connection = store.connect(memory_limit=memory_limit, threads=threads)
    connection.execute("SET preserve_insertion_order=false")
    _load_side_tables(connection)
    return store, connection


def behaviour(
    store: Path | str,
    *,
    users: Sequence[str] | None = None,
    before: str | None = None,
    history_days: int = 30,
    min_history: int = 10,
    memory_limit: str = "1GB",
    threads: int = 2,
) -> pd.DataFrame:
    """Return window rows (without deviations) from a store cut down to `users` and `before`.

    `before` is a date: events on it and later are hidden, as are the LDAP months from that of its
    eve on; answers are left as they are. The leakage audit compares a day built from everything
    with the same day built from nothing later. Raises `UserError` for an incomplete store.
    """
    where = "true"
    if users is not None:
        listed = ", ".join(f"'{_quoted(user)}'" for user in users) or "''"
        where = f"user IN ({listed})"
    where = _seen(where, before)
    frames = []
    store, connection = _open(store, memory_limit, threads)
    passes = [[bucket] for bucket in range(store.buckets)]
    if users is not None and len(users) <= _FEW_USERS:
        passes = [sorted({store.bucket_of(user) for user in users})]
    with connection:
        if before is not None:
            connection.execute(
                "DELETE FROM ldap_months WHERE month >= strftime(?::DATE - 1, '%Y-%m')", [before]
            )
        for buckets in passes:
            _view_part(connection, buckets, where=where)
            frames.append(
                connection.execute(
                    _window_sql(_daily_sql(history_days), min_history, history_days)).df()
            )
    frame = pd.concat(frames, ignore_index=True)
    return frame[list(_WINDOW_COLUMNS)].sort_values(["user", "day"], ignore_index=True)


def build(
    store: Path | str,
    out: Path | str,
    *,
    deviation_share: float = 0.03,
    history_days: int = 30,
    min_history: int = 10,
    memory_limit: str = "1GB",
    threads: int = 2,
    train_users: Iterable[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `out/windows.parquet` and, last, `out/manifest.json`; return `out`.

    Deviation levels are fitted on `train_users`, or on every user where none are given (the
    manifest says which): call `relabel` once the splits are known. `progress(done, total)` counts
    buckets. Account-days of the key on which the account has no event have no window; the manifest
    counts them and warns. Raises `UserError` for an incomplete store, unknown training users,
    settings outside their range, and labels that differ from the key. An interrupted build leaves
    no manifest and can simply be repeated; what a killed one left behind is swept away.
    """
    out = Path(out)
    _check_settings(deviation_share, history_days, min_history)
    store, connection = _open(store, memory_limit, threads)
    out.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    (out / "manifest.json").unlink(missing_ok=True)
    sql = _window_sql(_daily_sql(history_days), min_history, history_days)
    users = None if train_users is None else sorted(set(train_users))
    prefix = f"{_PARTS}{os.getpid()}-"
    with tempfile.TemporaryDirectory(dir=out, prefix=prefix) as name, connection:
        parts = Path(name)
        connection.execute(f"SET temp_directory='{_quoted(parts / 'spill')}'")
        for bucket in range(store.buckets):
            _view_part(connection, [bucket])
            target = _quoted(parts / f"{bucket:04d}.parquet")
            connection.execute(f"COPY ({sql}) TO '{target}' (FORMAT parquet)")
            if progress is not None:
                progress(bucket + 1, store.buckets)
        connection.execute(
            f"CREATE TEMP VIEW raw AS SELECT * FROM read_parquet('{_quoted(parts)}/*.parquet')"
        )
        fitted = _fit(connection, "raw", users, deviation_share)
        key_counts = _compare_with_key(connection, "raw")
        _write_labelled(connection, "raw", fitted, out)
        counts = _counts(connection, out) | key_counts
    unseen = counts["key_account_days_without_events"]
    warnings = [] if not unseen else [
        f"{unseen} of {counts['key_account_days']} account-days of the answer key have no event in "
        "these logs, so no window: is a log missing or cut?"]
    if counts["malicious_short_history"]:
        warnings.append(
            f"{counts['malicious_short_history']} of {counts['malicious']} labelled account-days "
            f"have fewer than {history_days} active days before them and are not judged: lower "
            "history_days if that is many")
    write_json(out / "manifest.json", {
        "format_version": FORMAT_VERSION,
        "settings": {"deviation_share": deviation_share, "history_days": history_days,
                     "min_history": min_history},
        "fit": fitted,
        "counts": counts,
        "warnings": warnings,
    })
    return out


def _sweep(out: Path) -> None:
    """Remove the parts of builds whose process is gone; a living one keeps its own."""
    for path in out.glob(f"{_PARTS}*"):
        if not _alive(int(path.name.removeprefix(_PARTS).partition("-")[0])):
            shutil.rmtree(path)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # builds of one process follow each other
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, under another account
    return True


def _compare_with_key(connection, relation: str) -> dict[str, int]:
    """Return the key's account-days; `UserError` where the labelled windows are others.

    Both views, read from the answers anew. Days of the key without a window are counted apart.
    """
    counts = {}
    for view, flag, owner in (("account", "malicious", "user"),
                              ("insider", "malicious_insider", "insider")):
        days, unseen, lost, strange, example = connection.execute(f"""
            WITH key AS (SELECT DISTINCT {owner} AS user, date::DATE AS day FROM answers),
            both_sides AS (
                SELECT coalesce(k.user, w.user) AS user, coalesce(k.day, w.day) AS day,
                    k.user IS NOT NULL AS in_key, w.{flag} AS labelled
                FROM key AS k FULL JOIN (SELECT user, day, {flag} FROM {relation}) AS w
                    ON k.user = w.user AND k.day = w.day
            )
            SELECT count(*) FILTER (in_key), count(*) FILTER (in_key AND labelled IS NULL),
                count(*) FILTER (in_key AND NOT labelled),
                count(*) FILTER (NOT in_key AND labelled),
                min(user || ' on ' || day) FILTER (in_key <> labelled)
            FROM both_sides""").fetchone()
        if lost or strange:
            raise UserError(
                f"The labels of the windows differ from the answer key ({view} view): {lost} of "
                f"its {days} account-days are not labelled, {strange} others are, the first is "
                f"{example}. Ingest the release again; its answers and logs do not fit together.")
        counts |= {f"key_{view}_days": days, f"key_{view}_days_without_events": unseen}
    return counts


def relabel(
    out: Path | str,
    train_users: Iterable[str],
    *,
    deviation_share: float | None = None,
    memory_limit: str = "1GB",
    threads: int = 2,
) -> dict:
    """Fit the deviation levels on training users, rewrite `risk` and truth, return the manifest.

    Behaviour, past and the key's labels stay as built. Raises `UserError` where `out` holds no
    complete windows or a training user is unknown.
    """
    out = Path(out)
    manifest = read_manifest(out)
    share = manifest["settings"]["deviation_share"] if deviation_share is None else deviation_share
    _check_settings(share, manifest["settings"]["history_days"],
                    manifest["settings"]["min_history"])
    with _connection() as connection:
        connection.execute(f"SET memory_limit='{_quoted(memory_limit)}'")
        connection.execute(f"SET threads={int(threads)}")
        connection.execute(
            "CREATE TEMP VIEW raw AS SELECT * EXCLUDE (deviations, feature_truth, risk) FROM "
            f"read_parquet('{_quoted(out / 'windows.parquet')}')"
        )
        fitted = _fit(connection, "raw", sorted(set(train_users)), share)
        if fitted == manifest["fit"]:
            return manifest
        (out / "manifest.json").unlink()
        _write_labelled(connection, "raw", fitted, out)
        manifest["fit"] = fitted
        manifest["settings"]["deviation_share"] = share
        manifest["counts"] |= _counts(connection, out)
    write_json(out / "manifest.json", manifest)
    return manifest


def read_manifest(out: Path | str) -> dict:
    """Return the manifest of built windows; raises `UserError` where the build is incomplete."""
    path = Path(out) / "manifest.json"
    if not path.exists() or not path.with_name("windows.parquet").exists():
        raise UserError(f"{out} holds no complete windows: build them again from the event store.")
    return json.loads(path.read_text(encoding="utf-8"))


def read(out: Path | str, *, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the windows of a complete build as a table, ordered by user and day."""
    read_manifest(out)
    return pd.read_parquet(Path(out) / "windows.parquet",
                           columns=None if columns is None else list(columns))


def users_table(windows: pd.DataFrame) -> pd.DataFrame:
    """Return user, incident, scenario: one row per (account, incident), or one without incident.

    This is what `splits.assign` needs: an abused supervisor's account carries the insider's
    incident, and an account in two incidents has two rows.

    >>> frame = pd.DataFrame({"user": ["A", "A", "B"], "incident": [None, "A", None],
    ...                       "scenario": [0, 2, 0]})
    >>> users_table(frame).values.tolist()
    [['A', 'A', 2], ['B', None, 0]]
    """
    known = windows[windows["incident"].notna()][["user", "incident", "scenario"]]
    known = known.drop_duplicates(["user", "incident"])
    rest = sorted(set(windows["user"]) - set(known["user"]))
    plain = pd.DataFrame({"user": rest, "incident": [None] * len(rest), "scenario": 0})
    table = pd.concat([known.astype({"incident": object}), plain], ignore_index=True)
    table["incident"] = table["incident"].astype(object).where(table["incident"].notna(), None)
    table["scenario"] = table["scenario"].astype("int8")
    return table.sort_values(["user", "incident"], ignore_index=True)


# ---------------------------------------------------------------------------------------------
# Deviations and labels


def _check_settings(deviation_share: float, history_days: int, min_history: int) -> None:
    if not 0 < deviation_share < 1:
        raise UserError(f"deviation_share={deviation_share!r}: give a share between 0 and 1.")
    if history_days < 1:
        raise UserError(f"history_days={history_days!r}: give at least 1 day.")
    if not 1 <= min_history <= history_days:
        raise UserError(f"min_history={min_history!r}: give 1 to history_days ({history_days}).")


def _strength_columns() -> str:
    return ", ".join(
        f"CASE WHEN enough_history THEN {rule.strength} ELSE 0 END::DOUBLE AS s_{kind}"
        for kind, rule in DEVIATION_RULES.items()
    )


def _fit(connection, relation: str, users: list[str] | None, share: float) -> dict:
    """Return, for each kind, the lowest level that fewer than `share` of training days reach."""
    where = "enough_history"
    if users is not None:
        if not users:
            raise UserError("train_users is empty: name at least one training user.")
        frame = pd.DataFrame({"user": users})
        connection.register("training_frame", frame)
        connection.execute("CREATE OR REPLACE TEMP TABLE training AS SELECT * FROM training_frame")
        connection.unregister("training_frame")
        unknown = connection.execute(
            f"SELECT user FROM training WHERE user NOT IN (SELECT DISTINCT user FROM {relation}) "
            "ORDER BY 1"
        ).fetchall()
        if unknown:
            raise UserError(
                f"train_users: {len(unknown)} have no window, the first is {unknown[0][0]!r}."
            )
        where += " AND user IN (SELECT user FROM training)"
    counts = ", ".join(
        f"count(*) FILTER (s_{kind} >= {level}) AS c_{kind}_{i}"
        for kind, rule in DEVIATION_RULES.items() for i, level in enumerate(rule.levels)
    )
    row = connection.execute(
        f"SELECT count(*) AS days, {counts} FROM (SELECT *, {_strength_columns()} FROM {relation} "
        f"WHERE {where})"
    )
    values = dict(zip([item[0] for item in row.description], row.fetchone(), strict=True))
    days = values["days"]
    kinds = {}
    for kind, rule in DEVIATION_RULES.items():
        shares = [values[f"c_{kind}_{i}"] / max(days, 1) for i in range(len(rule.levels))]
        chosen = next((i for i, got in enumerate(shares) if got < share), None)
        kinds[kind] = {
            "level": None if chosen is None else rule.levels[chosen],
            "share": None if chosen is None else shares[chosen],
            "shares": dict(zip(map(str, rule.levels), shares, strict=True)),
            "unit": rule.unit,
        }
    return {"deviation_share": share, "users": users, "days": days, "kinds": kinds,
            "fitted_on": "all users" if users is None else f"{len(users)} training users"}


def fit_deviations(
    windows: pd.DataFrame, train_users: Iterable[str], *, share: float = 0.03
) -> dict:
    """Return the fitted deviation levels: for each kind `level`, `share`, `shares`, `unit`.

    A kind's level is the lowest of its ladder that fewer than `share` of the training users' days
    with enough history reach; None where every level is that common.
    """
    with _connection() as connection:
        connection.register("given", windows)
        return _fit(connection, "given", sorted(set(train_users)), share)


def _connection() -> duckdb.DuckDBPyConnection:
    """Open a database in memory that draws no progress bar into a notebook."""
    connection = duckdb.connect()
    connection.execute("SET enable_progress_bar = false")
    return connection


def label(windows: pd.DataFrame, fitted: Mapping) -> pd.DataFrame:
    """Return `windows` with `deviations`, `feature_truth` and `risk` from fitted levels."""
    bare = windows.drop(columns=["deviations", "feature_truth", "risk"], errors="ignore")
    with _connection() as connection:
        connection.register("given", bare)
        return connection.execute(_label_sql("given", fitted)).df()


def _label_sql(relation: str, fitted: Mapping) -> str:
    found = ", ".join(
        f"CASE WHEN s_{kind} >= {fitted['kinds'][kind]['level']} THEN '{kind}' END"
        for kind in DEVIATION_RULES if fitted["kinds"][kind]["level"] is not None
    )
    shown = ", ".join(f"CASE WHEN {rule} THEN '{name}' END"
                      for name, rule in _FEATURE_RULES.items())
    return f"""
    SELECT * EXCLUDE ({", ".join(f"s_{kind}" for kind in DEVIATION_RULES)}),
        CASE WHEN malicious THEN 'malicious' WHEN len(deviations) > 0 THEN 'suspicious'
             ELSE 'normal' END AS risk
    FROM (SELECT *, list_filter([{found}]::VARCHAR[], lambda x: x IS NOT NULL) AS deviations,
              list_filter([{shown}]::VARCHAR[], lambda x: x IS NOT NULL)[:4] AS feature_truth
          FROM (SELECT *, {_strength_columns()} FROM {relation}))
    ORDER BY user, day
    """


def _write_labelled(connection, relation: str, fitted: Mapping, out: Path) -> None:
    with atomic_path(out / "windows.parquet") as temporary:
        connection.execute(
            f"COPY ({_label_sql(relation, fitted)}) TO '{_quoted(temporary)}' "
            "(FORMAT parquet, COMPRESSION zstd, PRESERVE_ORDER true)"
        )


def _counts(connection, out: Path) -> dict:
    """Return what the windows hold."""
    path = _quoted(out / "windows.parquet")
    row = connection.execute(f"""
        SELECT count(*) AS windows, count(DISTINCT user) AS users,
            min(day)::VARCHAR AS first_day, max(day)::VARCHAR AS last_day,
            count(*) FILTER (malicious) AS malicious,
            count(*) FILTER (malicious_insider) AS malicious_insider,
            count(*) FILTER (precursor) AS precursor, count(*) FILTER (ignore) AS ignore,
            count(*) FILTER (NOT full_history) AS short_history,
            count(*) FILTER (malicious AND NOT full_history) AS malicious_short_history,
            count(*) FILTER (NOT precursor AND NOT ignore) AS judged,
            count(*) FILTER (risk = 'suspicious') AS suspicious,
            count(*) FILTER (risk = 'normal') AS normal,
            count(*) FILTER (malicious AND scenario = 1) AS malicious_scenario_1,
            count(*) FILTER (malicious AND scenario = 2) AS malicious_scenario_2,
            count(*) FILTER (malicious AND scenario = 3) AS malicious_scenario_3
        FROM read_parquet('{path}')""")
    counts = dict(zip([item[0] for item in row.description], row.fetchone(), strict=True))
    return counts


def ranking_truth(windows: pd.DataFrame, *, view: str = "account") -> pd.DataFrame:
    """Return window_id, positive, ignore for ranking metrics in one view of the answer key.

    "account": positive where the row's own account is labelled; innocent replies are ignored.
    "insider": positive on the insider's own account; every other account's labelled day is
    ignored. Precursor days and days with a short history are ignored in both. Raises `ValueError`
    for another view.
    """
    if view not in ("account", "insider"):
        raise ValueError(f"view must be 'account' or 'insider', got {view!r}")
    if view == "account":
        positive = windows["malicious"] & ~windows["ignore"]
    else:
        positive = windows["malicious_insider"] & windows["full_history"]
    ignore = (windows["precursor"] | windows["malicious"] | ~windows["full_history"]) & ~positive
    return pd.DataFrame({"window_id": windows["window_id"], "positive": positive,
                         "ignore": ignore})


# ---------------------------------------------------------------------------------------------
# Evidence

EVIDENCE_COLUMNS = (
    "window_id", "item", "kind", "start", "end", "pc", "detail", "n", "facts", "event_ids",
    "labelled", "dont_care", "deviation", "features", "dropped",
)
_PART = ("CASE WHEN h < 7 THEN 'night' WHEN h < 12 THEN 'morning' "
         "WHEN h < 19 THEN 'afternoon' ELSE 'evening' END")
_LONG_PART = "CASE WHEN h < 7 THEN 'night' WHEN h < 19 THEN 'day' ELSE 'evening' END"
_MAIN_PC_DAYS = 60
_PASS_WINDOWS = 5000
_EVENTS_SQL = f"""
CREATE OR REPLACE TEMP TABLE events AS
WITH w AS (SELECT window_id, user, day FROM wanted),
sessions AS (
    SELECT w.window_id, d.*,
        sum((activity = 'Connect')::INT) OVER (
            PARTITION BY d.user, d.day, d.pc ORDER BY d.date, d.activity, d.id
            ROWS UNBOUNDED PRECEDING) AS session
    FROM part_device AS d JOIN w ON d.user = w.user AND d.day = w.day
)
SELECT window_id, 'logon' AS log, lower(activity) AS kind, {_PART} AS part, pc AS place, pc,
    '' AS class, date, h, id, 1 AS counted, 0 AS recipients, 0 AS attached
FROM part_logon JOIN w USING (user, day)
UNION ALL
SELECT window_id, 'device', 'device',
    first_value({_PART}) OVER (PARTITION BY window_id, pc, session ORDER BY date, activity, id),
    pc, pc, '', date, h, id, (activity = 'Connect')::INT, 0, 0
FROM sessions
UNION ALL
SELECT window_id, 'file', 'file', {_PART}, pc, pc,
    CASE WHEN extension IN {_EXECUTABLE} THEN 'exe'
         WHEN extension IN ('zip', 'rar', '7z', 'tar', 'gz') THEN 'archive'
         WHEN extension IN ('jpg', 'jpeg', 'png', 'gif', 'bmp') THEN 'image'
         ELSE 'office' END,
    date, h, id, 1, 0, 0
FROM part_file JOIN w USING (user, day)
UNION ALL
SELECT window_id, 'email', 'email', {_LONG_PART}, '', pc,
    CASE WHEN n_competitor > 0 THEN 'competitor' WHEN n_external > 0 THEN 'external'
         ELSE 'internal' END,
    date, h, id, 1, n_recipients, attachments
FROM part_email JOIN w USING (user, day)
UNION ALL
SELECT window_id, 'http', 'http', {_PART}, '', pc,
    CASE WHEN category IN ('job', 'leak', 'hack', 'cloud') THEN category ELSE 'other' END,
    date, h, id, 1, 0, 0
FROM part_http JOIN w USING (user, day)
"""
_PCS_SQL = f"""
CREATE OR REPLACE TEMP TABLE pc_past AS
WITH used AS (SELECT DISTINCT user, day, pc FROM part_logon
              UNION SELECT DISTINCT user, day, pc FROM part_device),
first_use AS (SELECT user, pc, min(day) AS first_day FROM used GROUP BY user, pc),
main AS (
    SELECT window_id, arg_max(pc, (n, pc)) AS main_pc FROM (
        SELECT w.window_id, u.pc, count(*) AS n
        FROM wanted AS w JOIN used AS u
            ON w.user = u.user AND u.day < w.day AND u.day >= w.day - {_MAIN_PC_DAYS}
        GROUP BY w.window_id, u.pc)
    GROUP BY window_id
)
SELECT w.window_id, f.pc,
    CASE WHEN f.pc = main.main_pc THEN 'own pc' WHEN f.first_day < w.day THEN 'other pc'
         WHEN w.past_days > 0 THEN 'new pc' END AS pc_fact
FROM wanted AS w JOIN first_use AS f ON w.user = f.user AND f.first_day <= w.day
LEFT JOIN main ON w.window_id = main.window_id
"""


def _fact(condition: str, text: str) -> str:
    return f"CASE WHEN {condition} THEN {text} END"


def _of_kind(kind: str, *, klass: str | None = None) -> str:
    return f"kind = '{kind}'" + ("" if klass is None else f" AND class = '{klass}'")


def _habit_fact(condition: str, days: str) -> str:
    """Say how often past days had this: never before, on at most a tenth of them, or more."""
    return _fact(f"({condition}) AND past_days > 0",
                 f"CASE WHEN {days} = 0 THEN 'first time' WHEN {days} <= 0.1 * past_days "
                 "THEN 'rare' ELSE 'usual' END")


def _peak_fact(condition: str, today: str, peak: str) -> str:
    return _fact(f"({condition}) AND past_days > 0 AND {today} > {peak}", "'more than before'")


_SENT_OUT = "kind = 'email' AND class <> 'internal' AND attached > 0"
# Short statements about the day and the own past; a prompt shows them as they are.
_FACTS = (
    _fact("kind IN ('logon', 'device') OR (kind = 'file' AND pc_fact = 'new pc')", "pc_fact"),
    _fact("after_hours", "'after hours'"),
    _fact("kind = 'logon' AND first_h < 7 AND past_hour_low - first_h >= 1",
          "printf('%d hours before usual', floor(past_hour_low - first_h)::INT)"),
    _fact("kind = 'logon' AND last_h >= 19 AND last_h - past_hour_high >= 1",
          "printf('%d hours after usual', floor(last_h - past_hour_high)::INT)"),
    _habit_fact("kind = 'device'", "past_device_days"),
    _fact(f"kind = 'device' AND {_reached('removable_media_increase')}", "'more than usual'"),
    _habit_fact(_of_kind("file", klass="exe"), "past_exe_days"),
    _peak_fact("kind = 'file'", "n_file", "past_max_files"),
    _habit_fact(_of_kind("email", klass="competitor"), "past_competitor_days"),
    _fact("kind = 'email' AND recipients > 4", "printf('%d recipients', recipients)"),
    _peak_fact("kind = 'email' AND recipients > 4", "recipients", "past_max_recipients"),
    _fact(_SENT_OUT, "printf('%d attachments', attached)"),
    _peak_fact(_SENT_OUT, "external_attachments", "past_max_attachments"),
    _habit_fact(_of_kind("http", klass="job"), "past_job_days"),
    _habit_fact(_of_kind("http", klass="leak"), "past_leak_days"),
    _habit_fact(_of_kind("http", klass="hack"), "past_hack_days"),
)
# Which items carry a deviation of the day, and which items show a feature.
_CARRIES = {
    "after_hours_logon": "kind = 'logon' AND after_hours AND outside >= s_after_hours_logon - 1e-6",
    "new_workstation": "kind = 'logon' AND pc_fact = 'new pc' "
    "OR kind = 'device' AND pc_fact = 'new pc'",
    "removable_media_new": "kind = 'device'",
    "removable_media_increase": "kind = 'device'",
    "bulk_file_copy": "kind = 'file'",
    "executable_copy": _of_kind("file", klass="exe"),
    "job_search": _of_kind("http", klass="job"),
    "competitor_mail": _of_kind("email", klass="competitor"),
    "external_attachments": _SENT_OUT,
    "mass_mail": "kind = 'email' AND recipients = max_recipients",
    "leak_site": _of_kind("http", klass="leak"),
    "hacking_tool": _of_kind("http", klass="hack"),
}
_SHOWS = {
    **_CARRIES,
    "after_hours_logon": "kind = 'logon' AND after_hours",
    "usual_hours": "kind IN ('logon', 'logoff') AND NOT after_hours",
    "own_workstation": "kind = 'logon' AND pc_fact IN ('own pc', 'other pc')",
    "usual_web": _of_kind("http", klass="other"),
    "usual_mail": "kind = 'email' AND class <> 'competitor'",
    "usual_removable_media": "kind = 'device'",
}
_SCENARIO_KINDS = (
    "CASE scenario WHEN 1 THEN kind IN ('device', 'file') OR kind = 'logon' AND after_hours "
    "OR kind = 'http' AND class = 'leak' "
    "WHEN 2 THEN kind IN ('device', 'file') OR kind = 'http' AND class = 'job' "
    "OR kind = 'email' AND class = 'competitor' "
    "ELSE kind IN ('device', 'file') OR kind = 'http' AND class = 'hack' END"
)
KIND_WORTH = {"device": 4, "file": 4, "logon": 2, "email": 2, "http": 1, "logoff": 0}
_DETAIL_WORTH = {"leak": 20, "hack": 20, "exe": 15, "job": 10, "competitor": 10, "cloud": 5,
                 "external": 2}
_ROUTINE_FACTS = frozenset({"own pc", "other pc", "usual", "recipients", "attachments"})


def informativeness(item: Evidence) -> int:
    """Return how much an item shows beyond routine: from what its line shows, never the truth.

    Whatever has room for some items only (a day's evidence, a prompt's token budget, a verdict's
    citations) takes those with the highest number. Reads `kind`, `detail` and `facts`.
    """
    odd = sum(fact.lstrip("0123456789 ") not in _ROUTINE_FACTS for fact in item.facts)
    return 10 * odd + _DETAIL_WORTH.get(item.detail, 0) + KIND_WORTH.get(item.kind, 1)


def _listed(cases: Iterable[str]) -> str:
    return f"list_filter([{', '.join(cases)}]::VARCHAR[], lambda x: x IS NOT NULL)"


def _items_sql() -> str:
    deviations = _listed(
        f"CASE WHEN list_contains(deviations, '{kind}') AND ({rule}) THEN '{kind}' END"
        for kind, rule in _CARRIES.items()
    )
    features = _listed(
        f"CASE WHEN ({_FEATURE_RULES[name]}) AND ({rule}) THEN '{name}' END"
        for name, rule in _SHOWS.items()
    )
    return f"""
    WITH grouped AS (
        SELECT e.window_id, kind, part, place, class, min(date) AS started, max(date) AS ended,
            min(h) AS first_h, max(h) AS last_h,
            arg_min(pc, (date, e.id)) AS pc,
            greatest(sum(counted), 1)::INT AS n, sum(counted) = 0 AS unopened,
            count(*) AS rows, bool_and(e.log = 'device' AND counted = 1) AS unclosed,
            max(recipients)::INT AS recipients, sum(attached)::INT AS attached,
            list(e.id ORDER BY date, e.id) AS event_ids,
            bool_or(k.id IS NOT NULL) AS labelled,
            bool_or({_AFTER}) AS after_hours
        FROM events AS e LEFT JOIN (SELECT DISTINCT log, id FROM key_rows) AS k
            ON e.log = k.log AND e.id = k.id
        GROUP BY e.window_id, kind, part, place, class
    ),
    known AS (
        SELECT g.*, w.* EXCLUDE (window_id, user, pc), p.pc_fact,
            CASE WHEN kind = 'logon' AND after_hours THEN greatest(
                coalesce(CASE WHEN first_h < {DAY_STARTS} THEN past_hour_low - first_h END, 0),
                coalesce(CASE WHEN last_h >= {DAY_ENDS} THEN last_h - past_hour_high END, 0))
            ELSE 0 END AS outside
        FROM grouped AS g JOIN (SELECT *, NULL AS pc FROM wanted) AS w USING (window_id)
        LEFT JOIN pc_past AS p ON p.window_id = g.window_id AND p.pc = g.pc
    ),
    described AS (
        SELECT *,
            CASE kind WHEN 'device' THEN CASE WHEN unopened THEN 'no connect'
                    WHEN unclosed THEN 'no disconnect' ELSE '' END
                WHEN 'http' THEN class WHEN 'email' THEN class WHEN 'file' THEN class
                ELSE '' END AS detail,
            {_listed(_FACTS)} AS facts,
            {deviations} AS deviation,
            {features} AS features,
            incident IS NOT NULL AND NOT labelled AND ({_SCENARIO_KINDS}) AS dont_care,
            CASE kind WHEN 'logon' THEN 0 WHEN 'device' THEN 1 WHEN 'file' THEN 2
                WHEN 'http' THEN 3 WHEN 'email' THEN 4 ELSE 5 END AS kind_order
        FROM known
    )
    SELECT window_id, kind, strftime(started, '%H:%M') AS start, strftime(ended, '%H:%M') AS "end",
        pc, detail, n, facts, event_ids, labelled, dont_care, deviation, features
    FROM described ORDER BY window_id, started, kind_order, class, place, part
    """


def _most_informative(items: pd.DataFrame, max_items: int) -> pd.DataFrame:
    """Return at most `max_items` items of each window, numbered in time order; `dropped` counts."""
    items = items.assign(worth=[informativeness(item) for item in items.itertuples()])
    ranked = items.sort_values("worth", ascending=False, kind="stable")
    kept = ranked.groupby("window_id").head(max_items).sort_index()
    total = items.groupby("window_id").size()
    number = kept.groupby("window_id").cumcount() + 1
    return kept.assign(
        item="e" + number.astype(str),
        dropped=(kept["window_id"].map(total) - max_items).clip(lower=0).astype("int32"))


def evidence(
    store: Path | str,
    windows: pd.DataFrame,
    *,
    max_items: int = 24,
    before: str | None = None,
    memory_limit: str = "1GB",
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Return the evidence items of the given window rows only, in time order within a window.

    Columns (`EVIDENCE_COLUMNS`): window_id, item ("e1" …), kind (logon, logoff, device, file,
    email, http), start and end "HH:MM", pc, detail, n (events; connections for device), facts,
    event_ids, labelled (holds an answer-key row), dont_care (unlabelled, but of the incident's
    behaviour), deviation (kinds of the day that this item shows), features, dropped (items of the
    window beyond `max_items`, least informative first, judged by what is visible). Only buckets
    with a wanted account are read; events on the date `before` and later are hidden. Raises
    `UserError` for an incomplete store.
    """
    if max_items < 1:
        raise UserError(f"max_items={max_items!r}: give at least 1.")
    if windows["window_id"].duplicated().any():
        raise ValueError("evidence: the windows hold a window_id twice; drop duplicates first")
    if len(windows) == 0:
        return pd.DataFrame({name: [] for name in EVIDENCE_COLUMNS})
    needed = ["window_id", "user", "day", "enough_history", "scenario", "incident", "deviations",
              *BEHAVIOUR_FEATURES, *PAST_FEATURES, *WEEK_FEATURES, *RULE_FEATURES]
    frames = []
    store, connection = _open(store, memory_limit, threads)
    with connection:
        given = windows[needed].assign(
            day=pd.to_datetime(windows["day"]).dt.strftime("%Y-%m-%d"),
            incident=windows["incident"].astype(object).where(windows["incident"].notna(), None),
            deviations=["|".join(kinds) for kinds in windows["deviations"]],
        )
        connection.register("given", given)
        connection.execute(
            "CREATE TEMP TABLE asked AS SELECT * REPLACE (day::DATE AS day, incident::VARCHAR "
            "AS incident, string_split(deviations, '|') AS deviations), "
            f"{_strength_columns()} FROM given"
        )
        connection.unregister("given")
        passes = _passes(windows["user"], store)
        for done, (buckets, users) in enumerate(passes, start=1):
            listed = ", ".join(f"'{_quoted(user)}'" for user in users)
            _view_part(connection, buckets, where=_seen(f"user IN ({listed})", before))
            connection.execute("CREATE OR REPLACE TEMP TABLE wanted AS SELECT * FROM asked "
                               f"WHERE user IN ({listed})")
            connection.execute(_EVENTS_SQL)
            connection.execute(_PCS_SQL)
            frames.append(_most_informative(connection.execute(_items_sql()).df(), max_items))
            if progress is not None:
                progress(done, len(passes))
    frame = pd.concat(frames).sort_values("window_id", kind="stable", ignore_index=True)
    for name in ("facts", "event_ids", "deviation", "features"):
        frame[name] = [list(values) for values in frame[name]]
    frame["pc"] = frame["pc"].fillna("")
    return frame[list(EVIDENCE_COLUMNS)]


def _passes(users: pd.Series, store: Store) -> list[tuple[list[int], list[str]]]:
    """Return (buckets, accounts) read together: whole buckets, about `_PASS_WINDOWS` windows."""
    counts = users.value_counts().sort_index()
    buckets = pd.Series([store.bucket_of(user) for user in counts.index], dtype=int)
    windows = pd.Series(counts.to_numpy()).groupby(buckets).sum()
    number = (windows.cumsum() - windows) // _PASS_WINDOWS
    names = pd.Series(counts.index).groupby(buckets).apply(list)
    return [(list(group), [name for bucket in group for name in names[bucket]])
            for _, group in windows.index.to_series().groupby(number)]


def _truth_of(risk: str, labelled: bool, deviation: Sequence[str]) -> bool:
    return labelled if risk == "malicious" else risk == "suspicious" and len(deviation) > 0


def load(windows: pd.DataFrame, items: pd.DataFrame) -> list[Window]:
    """Return the windows as objects with their evidence, in the order of `windows`.

    An item is true evidence where the day is malicious and the item holds a labelled row, or the
    day is suspicious and the item shows a deviation; true evidence is never "don't care".
    """
    risk_of = dict(zip(windows["window_id"], windows["risk"], strict=True))
    by_window: dict[str, list[Evidence]] = {name: [] for name in risk_of}
    dropped: dict[str, int] = {}
    for row in items.itertuples(index=False):
        risk = risk_of.get(row.window_id)
        if risk is None:
            continue
        truth = _truth_of(risk, bool(row.labelled), row.deviation)
        by_window[row.window_id].append(Evidence(
            id=row.item, kind=row.kind, start=row.start, end=row.end, pc=row.pc,
            detail=row.detail, n=int(row.n), facts=tuple(row.facts), events=tuple(row.event_ids),
            truth=truth, dont_care=bool(row.dont_care) and not truth,
        ))
        dropped[row.window_id] = int(row.dropped)
    made = []
    for row in windows.to_dict("records"):
        name = row["window_id"]
        made.append(Window(
            window_id=name, user=row["user"], day=pd.Timestamp(row["day"]).strftime("%Y-%m-%d"),
            weekday=int(row["weekday"]), role=row["role"], department=row["department"],
            past={key: float(row[key]) for key in PAST_FEATURES},
            week={key: float(row[key]) for key in WEEK_FEATURES},
            evidence=tuple(by_window[name]), risk=row["risk"],
            features=tuple(row["feature_truth"]), dropped=dropped.get(name, 0),
        ))
    return made


def truth_table(windows: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """Return one row of answers per window: risk, key facts, and the ids of true evidence.

    Columns: window_id, user, day, risk, malicious, scenario, incident, precursor, ignore,
    evidence_truth, dont_care and feature_truth (lists of ids or names). Evaluation and rewards
    read this; prompts never do.
    """
    loaded = load(windows, items)
    columns = ["window_id", "user", "day", "risk", "malicious", "scenario", "incident",
               "precursor", "ignore"]
    table = windows[columns].reset_index(drop=True).copy()
    table["evidence_truth"] = [[e.id for e in w.evidence if e.truth] for w in loaded]
    table["dont_care"] = [[e.id for e in w.evidence if e.dont_care] for w in loaded]
    table["feature_truth"] = [list(w.features) for w in loaded]
    return table
