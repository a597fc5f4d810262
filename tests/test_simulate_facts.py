"""The simulated release has r4.2's facts: small releases row by row, the full size by its plan.

A fact is a tuple (what, r4.2's value, least and most allowed, got). The allowed range reaches at
least three standard deviations of what other seeds give to either side of r4.2's value, at the
size that is measured, and a few per cent where seeds hardly differ. Facts about the whole period,
such as who ever reads job pages, are checked at the full size only.
"""

from dataclasses import replace
from datetime import date, timedelta
from itertools import pairwise

import numpy as np
import pytest

from tests.release_files import log_tables, one, records
from ueba_helpers.data import simulate

USERS, DAYS, INSIDERS = 160, 130, (6, 6, 3)
SEEDS = range(4)  # of the full size; what few people decide is averaged over them
NEW_YEAR = (date(2011, 1, 1) - simulate.DEFAULT_START).days


def show(capsys, title, rows):
    with capsys.disabled():
        print(f"\n{title:46} {'r4.2':>10} {'allowed':>21} {'got':>10}")
        for fact, target, low, high, got in rows:
            allowed = f"{low:.4g} to {high:.4g}"
            print(f"{fact:46} {target:>10.4g} {allowed:>21} {float(got):>10.4g}")


def missed(rows):
    return {fact for fact, _, low, high, got in rows if not low <= got <= high}


# --- row by row


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["as r4.2", "harder"])
def release(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "r4.2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "_REFERENCE_CELLS", 100_000)
        simulate.simulate(folder, users=USERS, days=DAYS, insiders=INSIDERS, seed=5,
                          hardness=request.param)
    return folder


@pytest.fixture(scope="module")
def tables(release):
    connection = log_tables(release)
    people = records(release / "LDAP" / "2009-12.csv")
    connection.execute("CREATE TABLE people (who VARCHAR, role VARCHAR)")
    connection.executemany("INSERT INTO people VALUES (?, ?)", [
        [row["user_id"], row["role"]] for row in people])
    yield connection
    connection.close()


def row_facts(tables):
    def mode_share(log, condition="true"):
        return one(tables, f"""
            WITH n AS (SELECT who, moment::DATE d, count(*) k FROM {log} WHERE {condition}
                       GROUP BY ALL), m AS (SELECT who, mode(k) usual FROM n GROUP BY who)
            SELECT avg((k = usual)::INT) FROM n JOIN m USING (who)""")

    def rows_of(log, condition="true"):
        return one(tables, f"SELECT count(*) FROM {log} WHERE {condition}")

    balance = """SELECT {} FROM (SELECT who, moment::DATE d,
        count(*) FILTER (activity = 'Logon') a, count(*) FILTER (activity = 'Logoff') b
        FROM logon GROUP BY ALL)"""
    per_day = ("SELECT coalesce(avg(k), 0) FROM (SELECT day, count(*) k FROM days WHERE {} "
               "GROUP BY day)")
    weekend = "dayofweek(day) IN (0, 6)"
    n_domains = """SELECT count(DISTINCT split_part(x, '@', 2)) FROM (
        SELECT unnest(string_split("to" || ';' || cc || ';' || bcc, ';')) x FROM email
    ) WHERE x <> ''"""
    pcs = "FROM (SELECT who, count(DISTINCT pc) k FROM logon GROUP BY who) JOIN people USING (who)"
    shape = "len(string_split(\"to\", ';'))"
    account_days = rows_of("days")
    return [
        ("events per user-day, median", 110, 100, 120, one(tables, "SELECT median(n) FROM days")),
        ("events per user-day, mean", 98, 88, 108, one(tables, "SELECT avg(n) FROM days")),
        ("events per user-day, most", 225, 150, 260, one(tables, "SELECT max(n) FROM days")),
        ("share active on a weekday", 0.906, 0.85, 0.96,
         one(tables, per_day.format("NOT " + weekend)) / USERS),
        ("share active on a weekend day", 0.048, 0.01, 0.09,
         one(tables, per_day.format(weekend)) / USERS),
        ("logons per user-day", 1.42, 1.25, 1.65,
         rows_of("logon", "activity = 'Logon'") / account_days),
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
        ("users with more than 50 PCs", 0.040, 0.02, 0.07,
         one(tables, f"SELECT avg((k > 50)::INT) {pcs}")),
        ("most PCs of anybody but an ITAdmin", 50, 2, 50,
         one(tables, f"SELECT max(k) {pcs} WHERE role <> 'ITAdmin'")),
        ("PCs beyond one a user", 3, 2, 3,
         one(tables, "SELECT count(DISTINCT pc) FROM logon") - USERS),
        ("users who ever use a drive", 0.265, 0.2, 0.36,
         one(tables, "SELECT count(DISTINCT who) FROM device") / USERS),
        ("device events per user-day", 1.23, 0.5, 2.0, rows_of("device") / account_days),
        ("file copies per user-day", 1.35, 0.8, 1.9, rows_of("file") / account_days),
        ("emails per user-day", 7.96, 7, 9, rows_of("email") / account_days),
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
             ) / rows_of("http")),
        ("different job pages", 16, 16, 16,
         one(tables, "SELECT count(DISTINCT url) FROM http WHERE url LIKE '%WboUhagvat%'")),
    ]


def test_marginal_facts_are_r4_2s(tables, capsys):
    rows = row_facts(tables)
    show(capsys, f"fact, {USERS} users and {DAYS} days", rows)
    assert not missed(rows)


ROW_TWINS = {
    "UPDATE days SET n = n + 40": {"events per user-day, median", "events per user-day, mean"},
    "DELETE FROM days WHERE dayofweek(day) IN (0, 6) AND hash(who) % 20 > 0 OR hash(who) % 8 = 0":
        {"share active on a weekday", "share active on a weekend day"},
    "DELETE FROM logon WHERE activity = 'Logoff' AND hash(id) % 3 = 0":
        {"days with unequal logons and logoffs"},
    "UPDATE logon SET moment = moment + INTERVAL 20 SECOND": {"logons on second 00"},
    "UPDATE logon SET moment = moment + INTERVAL 3 HOUR": {"logons before 07:00 or from 19:00"},
    "DELETE FROM http WHERE hash(id) % 50 = 0":
        {"days at the own http mode"},
    "DELETE FROM email WHERE hash(id) % 5 = 0":
        {"days at the own email mode", "emails per user-day"},
    "UPDATE logon SET pc = 'PC-' || hash(pc) % 100": {"PCs beyond one a user"},
    "UPDATE logon SET pc = 'PC-' || hash(id) % 200":
        {"users with one PC", "users with more than 50 PCs", "most PCs of anybody but an ITAdmin"},
    "DELETE FROM device WHERE hash(who) % 2 = 0":
        {"users who ever use a drive", "device events per user-day"},
    "UPDATE email SET \"from\" = who || '@dtaa.com', cc = '', bcc = 'a@b.com', size = '9000'":
        {"mails from @dtaa.com", "mails with cc", "mails with bcc", "mean size of a mail",
         "recipient domains with dtaa.com"},
    "UPDATE http SET date = id": {"http rows repeated"},
}


@pytest.mark.parametrize("damage", ROW_TWINS)
def test_the_row_facts_notice_a_release_that_is_off(tables, damage):
    tables.execute("BEGIN")
    try:
        tables.execute(damage)
        assert missed(row_facts(tables)) >= ROW_TWINS[damage]
    finally:
        tables.execute("ROLLBACK")


def test_holidays_and_midnight_look_like_r4_2(tables):
    ordinary = one(tables, "SELECT count(*) FROM days WHERE day = DATE '2010-01-20'")
    holiday = one(tables, "SELECT count(*) FROM days WHERE day = DATE '2010-01-18'")
    assert holiday < 0.15 * ordinary
    assert one(tables, "SELECT count(*) FROM logon WHERE activity = 'Logoff' AND "
               "hour(moment) < 3") > 10, "evenings run past midnight for benign people too"


# --- the full size, by its plan


def full_size(seed):
    settings = simulate._checked(1000, 501, seed, (30, 30, 10), 0.0, 0.0, "few", None, 1.0)
    cast = simulate._cast(settings, seed)
    return settings, cast, simulate._plan(settings, cast, seed)


@pytest.fixture(scope="module")
def plans():
    return [full_size(seed) for seed in SEEDS]


def mode_share(counts):
    """Return the share of user-days with any at which a user's count is that user's mode."""
    hits, total = 0, 0
    for row in counts.astype(int):
        row = row[row > 0]
        if len(row):
            hits += np.bincount(row).max()
            total += len(row)
    return hits / total


def connections(plan):
    return plan.counts["connects"] + plan.counts["late_drive"] + plan.counts["roam_drive"]


def plan_facts(settings, cast, plan):
    """Return {fact: (r4.2, least, most, got)} of what the plan decides at the full size."""
    counts, active = plan.counts, plan.counts["active"]
    dates = [settings.start + timedelta(days=day) for day in range(settings.days)]
    weekday = np.array([day.weekday() < 5 for day in dates])
    present = active.sum(axis=0)
    web = sum(counts[name].astype(int) for name in
              ("http", "late_web", "job", "leak", "hack", "late_leak"))
    mail = sum(counts[name].astype(int) for name in ("mail", "competitor", "mass", "attach"))
    logons = (1 + counts["unlocks"] + counts["late"] + counts["roam"] + (counts["shared"] > 0)
              + counts["visit"]) * active
    connects = connections(plan)
    benign = np.ones(settings.users, bool)
    benign[[incident.user for incident in cast.incidents]] = False
    rows = {
        "user-days": (330_452, 322_000, 339_000, active.sum()),
        "active users on a weekday": (906, 885, 920, present[weekday].mean()),
        "active users on a weekend day": (48, 28, 68, present[~weekday].mean()),
        "active users on 2010-07-05 and 2010-11-25": (
            47, 28, 68, np.mean([present[dates.index(date(2010, 7, 5))],
                                 present[dates.index(date(2010, 11, 25))]])),
        "http rows": (28_434_423, 27_200_000, 29_700_000, web.sum()),
        "mails": (2_629_979, 2_500_000, 2_760_000, mail.sum()),
        "logons": (470_591, 445_000, 515_000, logons.sum()),
        "logons before 07:00 or from 19:00": (0.067, 0.05, 0.084, (
            ((counts["start"] < 7 * simulate.HOUR) & active).sum() + counts["late"].sum()
            ) / logons.sum()),
        "connections of a drive": (202_690, 160_000, 240_000, connects.sum()),
        "file copies": (445_581, 350_000, 530_000, counts["files"].sum()),
        "days at the own http mode": (0.947, 0.93, 0.965, mode_share(web)),
        "days at the own email mode": (0.88, 0.86, 0.90, mode_share(mail)),
        "days at the own logon mode": (0.81, 0.78, 0.84, mode_share(logons)),
        "days at the own device mode": (0.51, 0.46, 0.58, mode_share(connects)),
        "users who ever use a drive": (265, 235, 300, (connects.sum(axis=1) > 0).sum()),
        "benign users who read job pages: most": (
            0.5, 0.5, 1.0, (counts["job"][benign].sum(axis=1) > 0).mean()),
        "leavers": (155, 155, 155, (cast.leave < settings.days).sum()),
        "insiders among the leavers": (
            70, 70, 70, (cast.leave[~benign] < settings.days).sum()),
    }
    rows.update(label_facts(settings, cast, plan))
    return rows


def label_facts(settings, cast, plan):
    """Return the facts of the answer key, as far as the plan decides them."""
    counts, labelled = plan.counts, plan.labelled
    of = {scenario: [i for i in cast.incidents if i.scenario == scenario] for scenario in (1, 2, 3)}
    days = {s: np.array([plan.malicious[i.user].sum() for i in of[s]]) for s in of}
    known = [np.flatnonzero(plan.malicious[i.user])[[0, -1]] for s in of for i in of[s]]
    first, last = np.array(known).T
    leads, early = [], 0
    for incident in of[1]:
        begin = np.flatnonzero(labelled["late"][incident.user])[0]
        before = counts["late_drive"][incident.user, :begin]
        leads.append(begin - np.append(np.flatnonzero(before), begin)[0])
        early += before.sum()

    def within(values):
        return sum(int(values[incident.user, begin : end + 1].sum()) for incident, begin, end
                   in zip(of[2], first[30:60], last[30:60], strict=True))

    spans = (last - first)[30:60]
    nights = [counts["late_start"][i.user][labelled["late"][i.user]] for i in of[1]]
    visits, drive = within(counts["job"]), 2 * within(connections(plan))
    return {
        "labelled days of insiders, scenario 1": (85, 69, 101, days[1].sum()),
        "labelled days of insiders, scenario 2": (861, 811, 911, days[2].sum()),
        "labelled days of insiders, scenario 3": (20, 20, 20, days[3].sum()),
        "labelled days an insider, scenario 1, mean": (2.83, 2.3, 3.37, days[1].mean()),
        "labelled days an insider, scenario 2, mean": (28.7, 27.0, 30.4, days[2].mean()),
        "labelled days an insider, scenario 3, mean": (2, 2, 2, days[3].mean()),
        "account-days in the key": (
            986, 910, 1060, plan.malicious.sum() + len(of[3])),  # with the innocent replies
        "labelled days before 2011": (
            0.747, 0.62, 0.87, plan.malicious[:, :NEW_YEAR].sum() / plan.malicious.sum()),
        "insiders labelled wholly before 2011": (52, 41, 63, (last < NEW_YEAR).sum()),
        "insiders labelled on both sides": (
            4, 0, 11, ((first < NEW_YEAR) & (last >= NEW_YEAR)).sum()),
        "first labelled day of the release": (159, 159, 175, first.min()),
        "last labelled day of the release": (482, 465, 483, last.max()),
        "scenario 1, night sessions labelled": (69, 53, 85, sum(
            labelled["late"][i.user].sum() for i in of[1])),
        "scenario 1, unlabelled connections before": (190, 110, 270, early),
        "scenario 1, days of the first before, median": (2, 1, 3.5, np.median(leads)),
        "scenario 1, days of the first before, least": (0.6, 0.5, 2, min(leads)),
        "scenario 1, days of the first before, most": (14, 5, 14.5, max(leads)),
        "scenario 1, nights begun before 07:00, share": (
            0.5, 0.35, 0.65, (np.concatenate(nights) < 7 * simulate.HOUR).mean()),
        "scenario 2, days from first to last label, least": (44, 44, 54, spans.min()),
        "scenario 2, days from first to last label, median": (56, 54, 57.5, np.median(spans)),
        "scenario 2, days from first to last label, most": (58, 56, 58, spans.max()),
        "scenario 2, job visits in the span": (5359, 4850, 5900, visits),
        "scenario 2, visits on labelled days, share": (
            0.698, 0.62, 0.77, within(counts["job"] * labelled["web_mail"]) / visits),
        "scenario 2, device events in the span": (6720, 4850, 8600, drive),
        "scenario 2, device events on labelled days, share": (
            0.388, 0.30, 0.50, 2 * within(counts["connects"] * labelled["drive"]) / drive),
        "scenario 2, labelled mails": (
            420, 330, 480, within(counts["competitor"] * labelled["web_mail"])),
    }


def mean_facts(plans):
    """Return the facts with `got` averaged over seeds."""
    found = [plan_facts(*plan) for plan in plans]
    return [(fact, *found[0][fact][:3], np.mean([some[fact][3] for some in found]))
            for fact in found[0]]


def test_the_plan_of_the_full_size_has_r4_2s_facts(plans, capsys):
    rows = mean_facts(plans)
    show(capsys, f"fact, full size, mean of {len(plans)} seeds", rows)
    assert not missed(rows)


def with_counts(plan, **change):
    return replace(plan, counts={**plan.counts, **change})


def everything_labelled(cast, plan):
    """Label whole stories, as if the key had no gaps."""
    malicious = plan.malicious | plan.incident_days
    labelled = {name: np.broadcast_to(malicious, malicious.shape) for name in plan.labelled}
    return cast, replace(plan, malicious=malicious, labelled=labelled)


def later(cast, plan):
    """Let every label, and all else, happen 110 days later."""
    def roll(values):
        return np.roll(values, 110, axis=1)

    return cast, replace(
        plan, malicious=roll(plan.malicious),
        counts={name: roll(values) for name, values in plan.counts.items()},
        labelled={name: roll(values) for name, values in plan.labelled.items()})


FULL_TWINS = {
    "nobody at weekends": (
        lambda c, p: (c, with_counts(p, active=p.counts["active"] & (
            p.counts["active"].sum(axis=0) > 100))),
        {"active users on a weekend day", "active users on 2010-07-05 and 2010-11-25"}),
    "a tenth more of everything": (
        lambda c, p: (c, with_counts(p, **{
            name: np.round(1.1 * p.counts[name] + 0.5).astype(int)
            for name in ("http", "mail", "unlocks")})),
        {"http rows", "mails", "logons"}),
    "counts that are no habit": (
        lambda c, p: (c, with_counts(p, **{
            name: p.counts[name] + np.arange(501) % 3 for name in ("http", "mail", "connects")})),
        {"days at the own http mode", "days at the own email mode", "users who ever use a drive",
         "days at the own device mode", "connections of a drive"}),
    "job pages for a third": (
        lambda c, p: (c, with_counts(p, job=p.counts["job"] * (np.arange(1000) % 3 == 0)[:, None])),
        {"benign users who read job pages: most", "scenario 2, job visits in the span"}),
    "nobody leaves": (
        lambda c, p: (replace(c, leave=c.leave + 501), p),
        {"leavers", "insiders among the leavers"}),
    "a key without gaps": (
        everything_labelled,
        {"labelled days of insiders, scenario 2", "labelled days an insider, scenario 2, mean",
         "labelled days of insiders, scenario 1", "account-days in the key",
         "scenario 2, visits on labelled days, share", "scenario 2, labelled mails",
         "scenario 2, device events on labelled days, share"}),
    "nights without a drive, but one": (
        lambda c, p: (c, with_counts(p, late_drive=(p.counts["late_drive"] > 0).astype(int))),
        {"scenario 1, unlabelled connections before"}),
    "incidents of another length": (
        lambda c, p: (c, replace(p, malicious=p.malicious | np.roll(p.malicious, 9, axis=1))),
        {"scenario 2, days from first to last label, median",
         "scenario 2, days from first to last label, most"}),
    "evenings only": (
        lambda c, p: (c, with_counts(p, late_start=np.maximum(
            p.counts["late_start"], simulate._EVENING))),
        {"scenario 1, nights begun before 07:00, share"}),
    "months later": (
        later, {"labelled days before 2011", "insiders labelled wholly before 2011",
                "first labelled day of the release", "last labelled day of the release"}),
}


@pytest.mark.parametrize("twin", FULL_TWINS)
def test_the_facts_of_the_full_size_notice_a_plan_that_is_off(plans, twin):
    damage, expected = FULL_TWINS[twin]
    damaged = [(settings, *damage(cast, plan)) for settings, cast, plan in plans[:2]]
    assert missed(mean_facts(damaged)) >= expected


# --- the full size: workstations and people files


@pytest.fixture(scope="module")
def full(plans):
    settings, cast, plan = plans[0]
    return settings, cast, plan, simulate._Names(settings, cast)


def workstations(settings, cast, plan, names):
    """Return the pairs (user, machine) of the full size, own machines included."""
    writer = simulate._DayWriter(settings, cast, plan, names, {})
    for day in range(settings.days):
        writer._elsewhere(simulate.generator(settings.seed, "tests.elsewhere", day), day)
    own = np.arange(settings.users)
    users, machines = (np.concatenate([own, *(part[i] for part in writer.parts["logon"])])
                       for i in (0, 1))
    return np.unique(np.stack([users, machines]), axis=1)


def workstation_facts(pairs, admin):
    users, machines = pairs
    each = np.bincount(users, minlength=len(admin))
    owners = [int((machines == len(admin) + n).sum()) for n in range(3)]
    return [
        ("workstations", 1003, 1003, 1003, len(np.unique(machines))),
        ("users with one PC", 679, 635, 723, (each == 1).sum()),
        ("ITAdmins", 40, 40, 40, admin.sum()),
        ("PCs of an ITAdmin, least", 165, 100, 330, each[admin].min()),
        ("PCs of an ITAdmin, mean", 545, 480, 610, each[admin].mean()),
        ("PCs of an ITAdmin, most", 720, 650, 790, each[admin].max()),
        ("PCs of anybody else, most", 50, 2, 50, each[~admin].max()),
        ("users of the first PC without an owner", 264, 222, 306, owners[0]),
        ("users of the second", 137, 105, 169, owners[1]),
        ("users of the third", 4, 1, 11, owners[2]),
    ]


@pytest.fixture(scope="module")
def pairs(full):
    return workstations(*full)


def test_workstations_of_the_full_size_are_used_as_in_r4_2(full, pairs, capsys):
    rows = workstation_facts(pairs, full[1].admin)
    show(capsys, "fact, workstations at the full size", rows)
    assert not missed(rows)


@pytest.mark.parametrize(("damage", "expected"), [
    (lambda u, m, admin: (u, np.where(m >= 1000, 1000 + u % 3, m)),
     {"users of the first PC without an owner", "users of the third"}),
    (lambda u, m, admin: (u, np.where(admin[u], np.minimum(m, 300), m)),
     {"PCs of an ITAdmin, mean", "PCs of an ITAdmin, most"}),
    (lambda u, m, admin: (np.where(admin[u], np.flatnonzero(admin)[0], u), m),
     {"PCs of an ITAdmin, least", "PCs of an ITAdmin, most"}),
    (lambda u, m, admin: (np.where(admin[u], (u + 1) % 1000, u), m),
     {"PCs of anybody else, most", "PCs of an ITAdmin, least"}),
    (lambda u, m, admin: (u, np.minimum(m, 999)), {"workstations", "users of the second"}),
])
def test_the_workstation_facts_notice_other_habits(full, pairs, damage, expected):
    admin = full[1].admin
    damaged = np.unique(np.stack(damage(*pairs, admin)), axis=1)
    assert missed(workstation_facts(damaged, admin)) >= expected


@pytest.fixture(scope="module")
def ldap(full, tmp_path_factory):
    """Return {month: [rows]} of the full size, and {user: month of the last day at work}."""
    settings, cast, plan, names = full
    folder = tmp_path_factory.mktemp("people")
    simulate._write_people(folder, settings, cast, names)
    months = {path.stem: records(path) for path in sorted((folder / "LDAP").glob("*.csv"))}
    last = settings.days - 1 - np.argmax(plan.present[:, ::-1], axis=1)
    return months, {
        names.user[user].decode(): (settings.start + timedelta(days=int(day))).strftime("%Y-%m")
        for user, day in enumerate(last)}


def ldap_facts(months, last_month):
    names = [{row["user_id"] for row in rows} for rows in months.values()]
    gone = names[0] - names[-1]
    vanished = {user: min(month for month, listed in zip(months, names, strict=True)
                          if user not in listed) for user in gone}
    roles = [row["role"] for row in next(iter(months.values()))]
    return [
        ("LDAP months", 18, 18, 18, len(months)),
        ("people in the first month", 1000, 1000, 1000, len(names[0])),
        ("people in the last month", 845, 845, 848, len(names[-1])),
        ("people who come back or join", 0, 0, 0, sum(
            len(late - early) for early, late in pairwise(names))),
        ("leavers gone from the month they leave in", 152 / 155, 0.94, 1.0,
         np.mean([vanished[user] == last_month[user] for user in gone])),
        ("roles", 42, 40, 42, len(set(roles))),
        ("ProductionLineWorker", 180, 140, 220, roles.count("ProductionLineWorker")),
        ("Technician", 157, 119, 195, roles.count("Technician")),
        ("Salesman", 149, 112, 186, roles.count("Salesman")),
        ("SoftwareEngineer", 42, 22, 62, roles.count("SoftwareEngineer")),
        ("ITAdmin", 40, 40, 40, roles.count("ITAdmin")),
    ]


def test_people_of_the_full_size_leave_as_in_r4_2(ldap, capsys):
    rows = ldap_facts(*ldap)
    show(capsys, "fact, people files at the full size", rows)
    assert not missed(rows)


def test_the_people_facts_notice_a_lag_of_a_month_and_somebody_who_joins(ldap):
    months, last_month = ldap
    names = list(months)
    lagged = {month: months[names[max(0, n - 1)]] for n, month in enumerate(names)}
    assert missed(ldap_facts(lagged, last_month)) >= {"leavers gone from the month they leave in"}
    joined = {**months, names[0]: months[names[0]][:-1]}
    assert {"people in the first month", "people who come back or join"} <= missed(
        ldap_facts(joined, last_month))
    workers = {month: [{**row, "role": row["role"].replace("Salesman", "Technician")}
                       for row in rows] for month, rows in months.items()}
    assert {"Salesman", "Technician"} <= missed(ldap_facts(workers, last_month))


def test_night_workers_begin_before_the_day_as_often_as_insiders_do(plans):
    for _, cast, plan in plans:
        counts = plan.counts
        usual = counts["late"] & cast.habits["night"][:, None] & ~plan.incident_days
        early = counts["late_start"] < 7 * simulate.HOUR
        assert 0.4 < early[usual].mean() < 0.55
        end = counts["late_start"] + counts["late_seconds"]
        before = counts["late"] & early
        assert (end < counts["start"])[before].all() and (counts["late_seconds"] > 0)[before].all()


def weekend_shares(plans):
    """Return the weekend's share of scenario 1's labelled nights, that of nights of people who
    have weekends off, and that of all user-days."""
    nights, off, everything = np.zeros((3, 2))
    for settings, cast, plan in plans:
        weekend = np.array([(settings.start + timedelta(days=day)).weekday() >= 5
                            for day in range(settings.days)])
        for incident in cast.incidents:
            labelled = plan.labelled["late"][incident.user]
            found = labelled[weekend].sum(), labelled.sum()
            nights += found
            if not cast.habits["weekend"][incident.user]:
                off += found
        everything += plan.present[:, weekend].sum(), plan.present.sum()
    return [share[0] / share[1] for share in (nights, off, everything)]


def test_nights_of_scenario_1_fall_at_weekends_as_often_as_other_work():
    def plans(weekend_night):
        settings = simulate._checked(300, 150, 0, (60, 0, 0), 0.3, 0.0, "few", None, 0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simulate, "_WEEKEND_NIGHT", weekend_night)
            for seed in range(12):
                cast = simulate._cast(settings, seed)
                yield settings, cast, simulate._plan(settings, cast, seed)

    nights, off, everything = weekend_shares(plans(simulate._WEEKEND_NIGHT))
    assert 0.01 < everything < 0.04 and 0.5 < nights / everything < 2
    assert off > 0.005
    assert weekend_shares(plans(0.0))[1] < 0.005, "the twin: who has weekends off stays at home"


def test_the_second_day_of_scenario_3_ends_in_the_late_afternoon_or_evening(plans):
    begun = np.concatenate([
        [plan.counts["late_start"][i.user, i.end] for i in cast.incidents if i.scenario == 3]
        for _, cast, plan in plans]) / simulate.HOUR
    assert begun.min() >= 16.5 and begun.max() < 19.5
    assert (begun < 19).any() and (begun >= 19).any()


def test_insiders_and_their_key_fit_the_full_size(plans):
    for settings, cast, plan in plans:
        assert [i.scenario for i in cast.incidents] == [1] * 30 + [2] * 30 + [3] * 10
        assert simulate._malicious_by_scenario(cast, plan)["scenario_3"] == 30
        assert len({i.user for i in cast.incidents}) == 70
        assert all(settings.history <= i.start <= i.end <= settings.last_incident_day
                   for i in cast.incidents)
