"""Write a CERT r4.2 folder that never existed: its files and quirks, any size, known truth.

In: sizes and dials (`simulate`). Out: the five logs, LDAP months, `psychometric.csv`, `answers/`,
`simulation.json`, and `truth/` (why each unusual day happened, and the best possible risk), which
only evaluation may read. Refused, with the field's name and its legal range: sizes that cannot hold
the insiders asked for, dials outside their range, an output folder that holds something else.

How a release is made
  1. `_cast` draws the people: teams and supervisors, administrators, habits, leavers, insiders.
  2. `_plan` draws, for every account and day, how often each behaviour happens (visits to job
     pages, drive connections, late sessions, ...). Benign people and insiders share one set of
     behaviours, so an insider's day differs by what is done, never by how a row is written.
  3. `_DayWriter` turns one day of the plan into rows, in time order, ties in random order; ids are
     random. State between days is only the rows of sessions that run past midnight.

Where the labels come from: rows of an insider's incident, with r4.2's gaps. Scenario 1's night
sessions before the labelled start are unlabelled; in scenario 2 three tenths of the days between
the first and the last of the incident are unlabelled, a few rows on the other days, all file
copies and the ordinary use of the drive; scenario 3 labels rows of the supervisor's account and
one innocent reply. `label_noise` removes further whole days from the key.

The strings that give a label away, as in r4.2: a leak site (scenario 1) and a keylogger site
(scenario 3). With `hardness` 0 nobody else visits them; as it grows benign people do too, part of
scenario 1's sessions leave the site out, benign look-alikes multiply and come closer, and incident
visits replace ordinary ones instead of adding to a clockwork count. Nothing else (ids, seconds,
order, file names, content) depends on the label.

`truth/optimal.csv`: p_malicious = P(the key labels this account-day | what the day, the last seven
days and the own past visibly show), where "visibly show" is the cell of `_visible_cells` (job
pages, mail to competitors, drive use, evenings, staying on, new workstations, leak and hacking
sites, mass mail, file copies; each in a few steps). The probability is the frequency of the cell in
other populations drawn from the same `_cast` and `_plan` with other seeds, each level of detail
shrunk with weight `_BACKOFF` towards the coarser one. Assumptions: the cells are all that can be
seen (finer detail, such as minutes, is ignored, so the ceiling is slightly low); the prior is that
of the simulated population, not r4.2's .29 %. `counted` is 1 on the days that are judged: a full
history (`history_days` active days behind the day, as in `windows`), and not among the days that
`windows` sets aside (an incident's behaviour which the key leaves out between the labels or just
before them; innocent replies). What label noise hides after the last label stays a plain negative
there, and so it does here.

`optimal_risk` is malicious where p_malicious reaches the threshold, else `lower_risk`: suspicious
where a behaviour is rare in the account's own past, else normal. Half of the other populations give
the frequencies, a quarter the threshold (the best macro-F1), the last quarter the claim in
`simulation.json`: `optimal.macro_f1` with its 95 % bootstrap interval over accounts. The two lower
levels are a function of what is visible, so a study with its own rule for them should take
p_malicious >= `optimal.threshold` from here and the lower levels from its rule.
"""

import calendar
import codecs
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ueba_helpers.data.cert import (
    CLOUD_DOMAINS,
    COMPETITOR_DOMAINS,
    JOB_DOMAINS,
    KEYLOGGER_DOMAINS,
    LEAK_DOMAINS,
    NEWS_DOMAINS,
    SOCIAL_DOMAINS,
)
from ueba_helpers.data.files import atomic_path, write_json
from ueba_helpers.data.seeding import generator
from ueba_helpers.errors import UserError

FORMAT_VERSION = 4
LOGS = ("logon", "device", "file", "email", "http")
HEADERS = {
    "logon": "id,date,user,pc,activity",
    "device": "id,date,user,pc,activity",
    "file": "id,date,user,pc,filename,content",
    "email": "id,date,user,pc,to,cc,bcc,from,size,attachments,content",
    "http": "id,date,user,pc,url,content",
}
SCENARIOS = ("scenario_1", "scenario_2", "scenario_3")
CONSUMER_DOMAINS = (
    "gmail.com", "yahoo.com", "hotmail.com", "aol.com", "comcast.net", "msn.com", "verizon.net",
    "cox.net", "bellsouth.net", "sbcglobal.net", "earthlink.net", "juno.com", "charter.net",
    "optonline.net", "netzero.com",
)
DEFAULT_START = date(2010, 1, 2)
DAY = 86_400
HOUR = 3_600
_EVENING = 19 * HOUR
_BACKOFF = 3.0
_RARE_SHARE = 0.05
_WEEKEND_NIGHT = 0.03  # a free day of scenario 1: weekends are then as common as in other work
_MIN_PAST = 10
_REFERENCE_CELLS = 3_600_000
_RESAMPLES = 500

_FIRST = str.split(
    "Aaron Abel Ada Adele Alan Alma Amber Amos Anika Ansel Arden Aria Asher Avery Basil Beata "
    "Blake Boris Brenna Bryce Caleb Cara Carmen Cedric Chase Clara Cody Cora Cyrus Dana Daria "
    "Dean Delia Devin Diana Dora Drew Edith Eldon Elena Eli Emery Enid Erica Ethan Faye Felix "
    "Flora Frank Gavin Gemma Giles Grace Grant Hanna Harold Hazel Hector Hope Hugo Ida Imani "
    "Ingrid Irene Ivan Jade Jasper Joel Jonas Judith Kai Karen Keith Kira Lars Laura Leah Leo "
    "Lydia Mabel Marcus Marta Miles Mina Nadia Neil Nora Olga Omar Oscar Paige Petra Quinn Ralph "
    "Rhea Rosa Rufus Sasha Selma Simon Stella Tara Tobias Ulrich Una Vera Victor Wade Wanda "
    "Xavier Yara Yusuf Zane Zelda"
)
_LAST = str.split(
    "Abbott Acosta Adkins Albright Ames Ashby Atwood Baird Barlow Bauer Beckett Benson Bishop "
    "Blair Bolton Bowers Brandt Briggs Burke Byrd Calder Carver Chandler Clay Cobb Conway Craig "
    "Crosby Dalton Daniels Decker Dixon Doyle Draper Duarte Eaton Elliott Emerson Ewing Farrell "
    "Fields Finley Foster Frost Gaines Garner Gibbs Goodwin Grady Greer Hale Hardin Hayes Hobbs "
    "Holt Horne Hurst Ibarra Ingram Irwin Jarvis Jensen Joyce Kemp Kerr Kirby Knox Lamb Lang "
    "Larkin Lloyd Lowe Macias Mays Mercer Mills Monroe Nash Newton Nolan Norris Oakley Odom "
    "Olsen Ortega Osborn Parks Patel Payne Pratt Quigley Quinlan Ramsey Reese Rivers Rowe Rush "
    "Sampson Savage Shaw Short Slater Stark Strong Talley Thorne Todd Travis Upton Usher Vance "
    "Vaughn Velez Wagner Walsh Webb Weeks Wiley Xiong Yates York Zamora Ziegler"
)
_WORDS = str.split(
    "account agenda analysis annual approve archive assembly audit balance battery board bridge "
    "budget build bulletin cabin calendar campaign capacity cargo carrier catalog center change "
    "chart claim client coast column committee component contract control cost course cycle data "
    "delivery demand design detail device display district draft drive effort energy engine entry "
    "equipment estimate event export factory field figure filter flight forecast format forum "
    "frame freight fuel gallery garden global grade growth guide harbor history holiday housing "
    "impact index industry input invoice island issue item journal kitchen label labor land launch "
    "layer league letter level library link list load local lunch machine major manual margin "
    "market material measure meeting memo metal method model module monitor motor museum network "
    "notice office option order outlet output owner panel paper part party patent period permit "
    "phase plan plant plate policy port price print process product profile project proposal "
    "quality quarter quote radio range rate record region release repair report request research "
    "result review river road route sample schedule school season section sector series service "
    "shift signal site sketch source standard station status steel stock storage storm street "
    "student study summary supply survey system table target team test theater ticket title tour "
    "track trade traffic training transit travel trend truck unit update vendor version village "
    "volume wage warehouse water weather week window winter yield zone"
)
_JOB_WORDS = str.split(
    "resume salary interview position opening hiring career skills benefits apply"
)
_JOB_TOPIC = "Job_Hunting"
_TOPICS = (
    "News_Today", "Sports_League", "Weather_Map", "Travel_Guide", "Music_Review", "Film_Archive",
    "Recipe_Book", "Health_Notes", "Garden_Forum", "Car_Market", "House_Listing", "Stock_Chart",
    "Science_Journal", "History_Page", "Game_Guide", "Photo_Album", "Shop_Catalog", "School_Board",
)
_WEB_OTHER = (
    "google.com", "wikipedia.org", "amazon.com", "ebay.com", "espn.go.com", "imdb.com", "bing.com",
    "ask.com", "netflix.com", "target.com", "walmart.com", "bestbuy.com", "yelp.com", "webmd.com",
    "weather.com", "mapquest.com", "flickr.com", "youtube.com", "hulu.com", "pandora.com",
    "ehow.com", "about.com", "answers.com", "chase.com", "paypal.com", "ups.com", "fedex.com",
    "expedia.com", "allrecipes.com", "instructables.com",
)
_EXTENSIONS = ("doc", "pdf", "jpg", "zip", "txt", "exe")
_EXTENSION_SHARES = np.array([0.42, 0.22, 0.16, 0.12, 0.08, 0.0])
_EXE = _EXTENSIONS.index("exe")
_HEX_HEADERS = {
    "doc": "D0-CF-11-E0-A1-B1-1A-E1", "pdf": "25-50-44-46-2D", "jpg": "FF-D8", "txt": "",
    "zip": "50-4B-03-04-14", "exe": "4D-5A-90-00-03-00-00-00",
}
_ROLES = (
    ("ProductionLineWorker", 180), ("Technician", 157), ("Salesman", 149), ("SoftwareEngineer", 42),
    ("ElectricalEngineer", 34), ("MechanicalEngineer", 30), ("SystemsEngineer", 26),
    ("IndustrialEngineer", 20), ("Engineer", 20), ("TestEngineer", 18), ("Scientist", 18),
    ("Mathematician", 14), ("Physicist", 12), ("MaterialsEngineer", 12), ("ComputerScientist", 12),
    ("SoftwareQualityEngineer", 12), ("SoftwareDeveloper", 12), ("ComputerProgrammer", 12),
    ("ChemicalEngineer", 8), ("Statistician", 8), ("FieldServiceEngineer", 8),
    ("HardwareEngineer", 8), ("Accountant", 8), ("FinancialAnalyst", 8), ("AssemblySupervisor", 8),
    ("SecurityGuard", 8), ("Nurse", 6), ("NursePractitioner", 4), ("InstructionalCoordinator", 6),
    ("HumanResourceSpecialist", 8), ("PurchasingClerk", 8), ("Attorney", 4), ("LabManager", 4),
    ("EquipmentMaintenance", 6), ("AdministrativeAssistant", 24), ("AdministrativeStaff", 14),
)
_LEAD_ROLES = ("Manager", "Director", "VicePresident", "ProductionSupervisor")
_FUNCTIONAL_UNITS = (
    ("1 - Administration", ("1 - HumanResources", "2 - Legal", "3 - Security")),
    ("2 - ResearchAndEngineering", ("1 - Research", "2 - Engineering", "3 - SoftwareManagement")),
    ("3 - Manufacturing", ("1 - ManufacturingEngineering", "2 - Assembly", "3 - LabManagement")),
    ("4 - Finance", ("1 - Accounting", "2 - Planning")),
    ("5 - SalesAndMarketing", ("1 - Sales", "2 - FieldService")),
    ("6 - PurchasingAndContracts", ("1 - Purchasing", "2 - Contracts")),
)
DEVIATIONS = (
    "after_hours_logon", "new_workstation", "removable_media_new", "removable_media_increase",
    "bulk_file_copy", "executable_copy", "job_search", "competitor_mail", "external_attachments",
    "mass_mail", "leak_site", "hacking_tool",
)


@dataclass(frozen=True)
class _Settings:
    """The arguments of `simulate` after checking."""

    users: int
    days: int
    seed: int
    insiders: tuple[int, int, int]
    hardness: float
    label_noise: float
    content: str
    start: date
    web_rate: float
    history_days: int

    @property
    def history(self) -> int:
        """Days before the first label: r4.2's share of the period, at least 48 where it fits.

        In 48 days nearly everybody has the 30 active days that make a full history in `windows`.
        """
        return max(round(0.317 * self.days), min(48, round(0.45 * self.days)))

    @property
    def last_incident_day(self) -> int:
        """The last day of the last incident: r4.2's labels end 18 days before the release."""
        return self.days - max(3, round(0.036 * self.days))

    @property
    def compression(self) -> float:
        """By how much scenario 2's eight weeks shrink so that they fit a short period."""
        return min(1.0, (self.days - self.history) / 110)

    @property
    def team_size(self) -> int:
        return max(4, min(12, self.users // max(2, self.insiders[2] + 1)))

    @property
    def teams(self) -> int:
        return max(1, self.users // self.team_size)

    def parameters(self) -> dict:
        return {
            "format_version": FORMAT_VERSION,
            "users": self.users,
            "days": self.days,
            "seed": self.seed,
            "insiders": list(self.insiders),
            "hardness": self.hardness,
            "label_noise": self.label_noise,
            "content": self.content,
            "start": self.start.isoformat(),
            "web_rate": self.web_rate,
            "history_days": self.history_days,
        }


@dataclass
class _Incident:
    """One insider's story: days are counted from the first day of the release."""

    user: int
    scenario: int
    start: int
    end: int
    victim: int = -1
    replier: int = -1


@dataclass
class _Cast:
    """The people as numbers: arrays of shape (users,), and the incidents."""

    team: np.ndarray
    supervisor: np.ndarray
    leads: np.ndarray
    admin: np.ndarray
    leave: np.ndarray
    incidents: list[_Incident]
    habits: dict[str, np.ndarray]


@dataclass
class _Plan:
    """How often each behaviour happens: arrays of shape (users, days); and why."""

    counts: dict[str, np.ndarray]
    labelled: dict[str, np.ndarray]
    malicious: np.ndarray
    present: np.ndarray
    incident_days: np.ndarray
    causes: list[tuple[np.ndarray, str, str]] = field(default_factory=list)


def simulate(
    out: Path | str,
    *,
    users: int = 400,
    days: int = 150,
    seed: int = 0,
    insiders: Sequence[int] = (24, 24, 12),
    hardness: float = 0.3,
    label_noise: float = 0.0,
    content: str = "few",
    start: date | str | None = None,
    web_rate: float = 1.0,
    history_days: int = 30,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Write a simulated CERT r4.2 release into the folder `out` and return what was written.

    `insiders` counts scenarios 1, 2, 3. `hardness` (0 to 1) goes from r4.2-like to hard.
    `label_noise` (0 to .9) is the share of incident days, of scenarios 1 and 2, that the key misses
    beyond r4.2's own gaps. `content` is "few" (words) or "full" (about 500 bytes). `web_rate`
    scales the volume of http. `history_days` (10 and more) is that of the windows to be judged; it
    changes `truth/` alone. `progress(done, total)` is called after each day.

    The folder appears whole or not at all; one that already holds this very simulation is left as
    it is. The same arguments give the same bytes. Raises `UserError`, naming the field and its
    legal range, for impossible arguments, and for a folder that holds anything else.
    """
    settings = _checked(
        users, days, seed, insiders, hardness, label_noise, content, start, web_rate, history_days
    )
    out = Path(out)
    finished = _existing(out, settings)
    if finished is not None:
        return finished
    cast = _cast(settings, settings.seed)
    plan = _plan(settings, cast, settings.seed)
    with atomic_path(out) as folder:
        folder.mkdir(parents=True)
        names = _Names(settings, cast)
        _write_people(folder, settings, cast, names)
        key, rows = _write_logs(folder, settings, cast, plan, names, progress)
        _write_answers(folder, settings, cast, names, key)
        claim = _write_truth(folder, settings, cast, plan, names)
        summary = {
            "parameters": settings.parameters(),
            "rows": rows,
            "answer_rows": sum(len(entries) for entries in key),
            "account_days": int(plan.present.sum()),
            "malicious_account_days": _malicious_by_scenario(cast, plan),
            "history_days": settings.history,
            "optimal": claim,
        }
        write_json(folder / "simulation.json", summary)
    return summary


def _checked(users, days, seed, insiders, hardness, label_noise, content, start, web_rate,
             history_days=30):
    def whole(name, value, low, high):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise UserError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
        if not low <= value <= high:
            raise UserError(f"{name} must lie between {low} and {high}, got {value}")
        return int(value)

    def share(name, value, low, high):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UserError(f"{name} must be a number, got {value!r}") from None
        if not low <= number <= high:  # also refuses NaN
            raise UserError(f"{name} must lie between {low} and {high}, got {value}")
        return number

    users = whole("users", users, 20, 9000)
    days = whole("days", days, 40, 1500)
    seed = whole("seed", seed, 0, 2**63 - 1)
    hardness = share("hardness", hardness, 0.0, 1.0)
    label_noise = share("label_noise", label_noise, 0.0, 0.9)
    web_rate = share("web_rate", web_rate, 0.01, 5.0)
    history_days = whole("history_days", history_days, _MIN_PAST, days)
    if content not in ("few", "full"):
        raise UserError(f"content must be 'few' or 'full', got {content!r}")
    if start is None:
        start = DEFAULT_START
    elif isinstance(start, str):
        try:
            start = date.fromisoformat(start)
        except ValueError:
            raise UserError(f"start must be a date written YYYY-MM-DD, got {start!r}") from None
    elif isinstance(start, datetime) or not isinstance(start, date):
        raise UserError(f"start must be a date or YYYY-MM-DD, got {start!r}")
    if not 1990 <= start.year <= 2090:
        raise UserError(f"start must lie in the years 1990 to 2090, got {start.isoformat()}")
    if isinstance(insiders, str) or not isinstance(insiders, Sequence) or len(insiders) != 3:
        raise UserError(
            f"insiders must be three whole numbers (scenarios 1, 2, 3), got {insiders!r}"
        )
    counts = tuple(whole(f"insiders[{i}]", n, 0, users) for i, n in enumerate(insiders))
    if sum(counts) > users // 3:
        raise UserError(
            f"insiders must add up to at most a third of users ({users // 3} of {users}), "
            f"got {sum(counts)}"
        )
    if counts[2] > users // 12:
        raise UserError(
            f"insiders[2] must be at most a twelfth of users ({users // 12} of {users}): every "
            f"scenario 3 needs its own administrator and supervisor, got {counts[2]}"
        )
    return _Settings(
        users, days, seed, counts, hardness, label_noise, content, start, web_rate, history_days
    )


def _existing(out: Path, settings: _Settings) -> dict | None:
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"{out} is a file; name a folder that does not exist yet")
    if not any(out.iterdir()):
        return None
    try:
        summary = json.loads((out / "simulation.json").read_text(encoding="utf-8"))
        same = summary["parameters"] == settings.parameters()
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{out} already holds files that are not a simulation; name another folder"
        ) from None
    if not same:
        raise UserError(
            f"{out} already holds a simulation with other parameters "
            f"({json.dumps(summary['parameters'])}); delete it or name another folder"
        )
    return summary


# --- people ---------------------------------------------------------------------------------------


def _cast(settings: _Settings, seed: int) -> _Cast:
    rng = generator(seed, "simulate.cast")
    users, hard = settings.users, settings.hardness
    team = rng.permutation(np.arange(users) % settings.teams)
    order = np.argsort(team, kind="stable")
    first_of_team = np.searchsorted(team[order], np.arange(settings.teams))
    leads = order[first_of_team]
    supervisor = leads[team]
    supervisor[leads] = leads[0]
    is_lead = np.zeros(users, bool)
    is_lead[leads] = True

    staff = np.flatnonzero(~is_lead)
    rank = np.empty(users, int)
    rank[staff] = rng.permutation(len(staff))
    by_team: dict[int, int] = {}
    round_of = {}
    for user in staff[np.argsort(rank[staff])]:
        round_of[user] = by_team.get(team[user], 0)
        by_team[team[user]] = round_of[user] + 1
    n_admin = max(round(0.04 * users), math.ceil(2.2 * settings.insiders[2]), 1)
    roaming = sorted(staff, key=lambda u: (round_of[u], rank[u]))[:n_admin]
    admin = np.zeros(users, bool)
    admin[roaming] = True

    one, two, three = settings.insiders
    inside_three = sorted(roaming, key=lambda u: (round_of[u], rank[u]))[:three]
    # Whatever the role: it must not prove anybody innocent. The president supervises the leads.
    taken = np.zeros(users, bool)
    taken[[leads[0], *inside_three, *supervisor[list(inside_three)]]] = True
    ordinary = rng.permutation(np.flatnonzero(~taken))
    inside_one, inside_two = ordinary[:one], ordinary[one : one + two]
    insider = np.zeros(users, bool)
    insider[list(inside_three)] = True
    insider[inside_one] = True
    insider[inside_two] = True
    n_insiders = one + two + three

    def some(share):
        return rng.random(users) < share

    drive_share = max(0.18, (0.265 * users - n_insiders) / (users - n_insiders))
    drive = some(drive_share * 0.80)
    drive[inside_two] = rng.random(two) < 0.50
    occasional = some(drive_share * 0.20 / (1 - drive_share * 0.80)) & ~drive
    night = some(0.075)
    early = some(0.05) & ~night
    for quiet in (drive, occasional, night, early):
        quiet[inside_one] = False
    occasional[list(inside_three)] = True
    regular = rng.random(users)
    shared_pc = some(0.275) & ~admin
    habits = {
        "drive": drive,
        "occasional_drive": occasional,
        "drive_rate": np.where(regular < 0.8, rng.uniform(0.6, 0.97, users),
                               rng.uniform(0.08, 0.4, users)),
        "connects": rng.integers(1, 10, users),
        "files": rng.uniform(0.8, 3.0, users),
        "backup": drive & some(0.15),
        "backup_day": rng.integers(0, 5, users),
        "night": night,
        "night_rate": rng.uniform(0.15, 0.6, users),
        "weekend": some(0.052),
        "start": np.where(
            early, rng.uniform(5.4, 6.8, users), np.clip(rng.normal(8.2, 0.6, users), 7.2, 9.8)
        ),
        "hours": rng.uniform(8.2, 9.6, users),
        "http": np.where(some(0.22), rng.uniform(15, 70, users),
                         np.clip(rng.normal(102, 12, users), 60, 190)),
        "mail": np.clip(rng.normal(8.0, 3.0, users), 1, 20).round(),
        "unlocks": rng.choice([0, 1, 2], users, p=[0.82, 0.14, 0.04]),
        "shared_pc": shared_pc,
        "visitor": some(np.where(shared_pc, 0.40, 0.025)) & ~admin,
        "shared_rate": rng.uniform(0.02, 0.15, users),
        "roam_rate": np.where(admin, rng.uniform(1.9, 3.4, users), 0.0),
        "seeker": some(0.05 + 0.24 * hard),
        "partner": some(0.12),
        "mass_mailer": (is_lead & some(0.25)) | some(0.012),
        "attacher": some(0.06),
        "curious": some(0.10 * hard),
        "tool_reader": admin & some(0.5 * hard),
        "casual_job": some(0.75),
        "is_lead": is_lead,
    }
    habits["seeker"][inside_two] = False
    staying = [int(lead) for lead in leads if not insider[lead]]
    incidents = _incidents(settings, rng, inside_one, inside_two, inside_three, supervisor, staying)
    leave = np.full(users, settings.days + 400)
    for incident in incidents:
        gap = {1: rng.integers(2, 9), 2: rng.integers(1, 4), 3: rng.integers(1, 3)}
        # every insider is gone before the release ends
        leave[incident.user] = min(incident.end + int(gap[incident.scenario]), settings.days - 1)
    benign = rng.permutation(np.flatnonzero(~insider & ~is_lead))
    n_leavers = max(1, round(0.085 * users * min(1.0, settings.days / 501)))
    leavers = benign[:n_leavers]
    leave[leavers] = rng.integers(settings.history, settings.days, len(leavers))
    return _Cast(team, supervisor, leads, admin, leave, incidents, habits)


def _incidents(settings, rng, inside_one, inside_two, inside_three, supervisor, repliers):
    first, last = settings.history, settings.last_incident_day
    found = []

    def one_of(choices):
        """Pick one, more often an early one: three quarters of r4.2's labels lie in 2010."""
        return int(choices[int(len(choices) * rng.random() ** 1.4)])

    for user in inside_one:
        span = int(rng.integers(3, 10))
        begin = one_of(range(first + 1, max(first + 2, last - span)))
        found.append(_Incident(int(user), 1, begin, min(begin + span, last)))
    for user in inside_two:
        # r4.2: 44 to 58 days, the median 56
        span = max(8, round((44 + 14 * rng.random() ** 0.13) * settings.compression))
        begin = one_of(range(first, max(first + 1, last - span)))
        found.append(_Incident(int(user), 2, begin, min(begin + span, last)))
    taken: dict[int, set[int]] = {}
    for user in inside_three:
        victim = int(supervisor[user])
        others = [lead for lead in repliers if lead != victim]
        replier = int(rng.choice(others)) if others else victim
        workdays = [
            d for d in range(first, last - 1)
            if _is_workday(settings, d) and _is_workday(settings, d + 1)
            and not {d, d + 1} & taken.get(victim, set())
        ]
        begin = one_of(workdays)
        taken.setdefault(victim, set()).update((begin, begin + 1))
        found.append(_Incident(int(user), 3, begin, begin + 1, victim, replier))
    return found


@functools.cache
def _holidays(year: int) -> frozenset[date]:
    """Return the days off of a United States employer in one year."""

    def nth(month, weekday, n):
        days = [d for d in calendar.Calendar().itermonthdates(year, month)
                if d.month == month and d.weekday() == weekday]
        return days[n]

    def observed(day):
        return day + timedelta({5: -1, 6: 1}.get(day.weekday(), 0))

    fixed = {observed(date(year, m, d)) for m, d in ((1, 1), (7, 4), (12, 25))}
    return frozenset(fixed | {nth(1, 0, 2), nth(5, 0, -1), nth(9, 0, 0), nth(11, 3, 3)})


def _is_workday(settings: _Settings, day: int) -> bool:
    when = settings.start + timedelta(days=day)
    return when.weekday() < 5 and when not in _holidays(when.year)


# --- plan -----------------------------------------------------------------------------------------


def _plan(settings: _Settings, cast: _Cast, seed: int) -> _Plan:
    rng = generator(seed, "simulate.plan")
    users, days, hard = settings.users, settings.days, settings.hardness
    shape = (users, days)
    habit = {name: values[:, None] for name, values in cast.habits.items()}
    workday = np.array([_is_workday(settings, d) for d in range(days)])[None, :]
    weekday = np.array([(settings.start + timedelta(days=d)).weekday() for d in range(days)])
    day = np.arange(days)[None, :]
    employed = day < cast.leave[:, None]
    # Who works nights comes in at a weekend now and then, and so may scenario 1.
    seldom = np.where(habit["night"], 0.03, 0.001)
    chance = np.where(workday, 0.972, np.where(habit["weekend"], 0.93, seldom))
    active = (rng.random(shape) < chance) & employed
    weekends = generator(seed, "simulate.weekends")
    for incident in cast.incidents:
        if incident.scenario == 1:
            span = slice(max(0, incident.start - 3), incident.end + 1)
            comes = weekends.random(days) < _WEEKEND_NIGHT
            active[incident.user, span] |= (comes & ~workday[0])[span]
        if incident.scenario == 3:
            active[[incident.user, incident.victim, incident.replier], incident.start] = True
            active[[incident.user, incident.victim, incident.replier], incident.start + 1] = True
    causes: list[tuple[np.ndarray, str, str]] = []

    def happens(rate):
        return (rng.random(shape) < rate) & active

    def noisy(mode, at_mode, low, high):
        change = rng.integers(low, high + 1, shape)
        change = np.where(change == 0, 1, change)
        kept = rng.random(shape) < at_mode
        return np.where(kept, mode, np.maximum(mode + change, 0)) * active

    counts: dict[str, np.ndarray] = {}
    mode = np.maximum(1, np.round(habit["http"] * settings.web_rate))
    counts["http"] = noisy(mode, 0.968, -6, 8).astype(np.int32)
    counts["mail"] = noisy(habit["mail"], 0.92, -2, 3).astype(np.int16)
    counts["unlocks"] = noisy(habit["unlocks"], 0.86, -1, 1).astype(np.int8)
    counts["start"] = (
        np.clip(habit["start"] + rng.normal(0, 0.17, shape), 4.0, 12.0) * HOUR
    ).astype(np.int32)
    counts["end"] = np.clip(
        counts["start"] + (habit["hours"] + rng.normal(0, 0.25, shape)) * HOUR, 0, 18.9 * HOUR
    ).astype(np.int32)

    # Evenings: a habit, a department's deadline, or one late day.
    deadline_day = rng.random((settings.teams, days)) < 0.012
    deadline = deadline_day[cast.team]
    by_habit = happens(np.where(habit["night"], habit["night_rate"], 0))
    by_deadline = happens(np.where(deadline, 0.35, 0)) & ~by_habit
    by_chance = happens(0.006) & ~by_habit & ~by_deadline
    late = by_habit | by_deadline | by_chance
    causes += [
        (by_habit, "night_work", "after_hours_logon"),
        (by_deadline, "deadline", "after_hours_logon"),
        (by_chance, "late_evening", "after_hours_logon"),
    ]
    counts["late_start"] = rng.integers(int(19.2 * HOUR), int(23.6 * HOUR), shape).astype(np.int32)
    counts["late_seconds"] = rng.integers(HOUR // 2, int(2.6 * HOUR), shape).astype(np.int32)
    _early_half(seed, counts, by_deadline | by_chance)

    # Drives: habit, weekly backup, a project with more of it, a first time.
    used = happens(np.where(habit["drive"], habit["drive_rate"], 0))
    connects = np.where(rng.random(shape) < 0.42, habit["connects"],
                        np.maximum(1, habit["connects"] + rng.integers(-2, 3, shape))) * used
    backup = habit["backup"] & (weekday[None, :] == habit["backup_day"]) & active
    project = np.zeros(shape, bool)
    for user in np.flatnonzero(cast.habits["drive"]):
        if rng.random() < 0.35 + 0.4 * hard:
            begin = int(rng.integers(0, days))
            project[user, begin : begin + int(rng.integers(3, 11))] = True
    once = happens(np.where(habit["occasional_drive"], 4 / (0.66 * days), 0))
    insider_users = np.array([i.user for i in cast.incidents if i.scenario < 3], int)

    # Job pages: most people now and then, seekers for weeks, some with mail to a competitor.
    casual = happens(np.where(habit["casual_job"], 0.009, 0))
    seeking = np.zeros(shape, bool)
    handover = np.zeros(shape, bool)
    for user in np.flatnonzero(cast.habits["seeker"]):
        span = max(6, round(float(rng.uniform(25, 70)) * settings.compression))
        begin = int(rng.integers(-span // 3, days))
        seeking[user, max(0, begin) : max(0, begin + span)] = True
        if rng.random() < 0.3 + 0.5 * hard:
            stop = max(1, begin + span)
            handover[user, max(0, stop - int(rng.integers(3, 9))) : stop] = True
    project |= handover & habit["drive"]
    sought = happens(np.where(seeking, 0.45 + 0.35 * hard, 0))
    project &= active
    project[insider_users] = False
    counts["job"] = (
        casual * rng.integers(1, 4, shape) + sought * (1 + rng.poisson(2.2 + 1.6 * hard, shape))
    ).astype(np.int16)
    causes += [(casual & ~sought, "casual_job", "job_search"), (sought, "job_seeker", "job_search")]
    partner = happens(np.where(habit["partner"], 0.12, 0))
    stray = happens(0.004)
    applied = happens(np.where(seeking, 0.10 + 0.30 * hard, 0))
    counts["competitor"] = (partner | stray | applied).astype(np.int8)
    causes += [
        (partner, "partner_mail", "competitor_mail"),
        (stray & ~partner, "partner_mail", "competitor_mail"),
        (applied & ~partner & ~stray, "job_seeker", "competitor_mail"),
    ]
    boost = 1 + rng.poisson(np.broadcast_to(1.0 + 0.5 * habit["connects"], shape))
    connects = connects + (project & habit["drive"]) * boost + once * rng.integers(1, 3, shape)
    connects = np.where(backup, np.maximum(connects, 1), connects)
    connects = np.where(active, connects, 0)
    files = rng.poisson(habit["files"] * connects)
    files = files + backup * rng.integers(10, 40, shape)
    files = files + (project & (connects > 0)) * rng.poisson(6, shape)
    bulk = happens(0.012) & (connects > 0)
    files = files + bulk * rng.integers(10, 30, shape)
    executable = happens(np.where(habit["drive"], 0.012, 0)) & (connects > 0)
    causes += [
        (backup, "drive_backup", "bulk_file_copy"),
        (project & (connects > 0), "drive_project", "removable_media_increase"),
        (once, "first_drive", "removable_media_new"),
        (bulk, "drive_backup", "bulk_file_copy"),
        (executable, "software_copy", "executable_copy"),
    ]
    late_drive = late & (rng.random(shape) < np.where(habit["drive"], 0.25, 0.03 + 0.05 * hard))
    borrowed = habit["drive"] | habit["occasional_drive"]
    late_drive &= borrowed
    causes.append((late_drive & late, "night_work", "removable_media_increase"))
    nights = generator(seed, "simulate.nights")
    late_connects = late_drive * (1 + nights.poisson(0.6, shape))

    # Workstations: administrators everywhere, shared machines, one visit to a colleague's.
    counts["roam"] = (rng.poisson(np.broadcast_to(habit["roam_rate"], shape)) * active).astype(
        np.int16
    )
    counts["shared"] = _shared_machines(seed, happens(
        np.where(habit["shared_pc"], habit["shared_rate"], 0)))
    counts["shared_first"] = _first_uses(counts["shared"])
    counts["visit"] = happens(np.where(habit["visitor"], 0.025, 0))
    counts["roam_drive"] = (
        happens(np.where(cast.admin[:, None], 0.03 + 0.05 * hard, 0)) & (counts["roam"] > 0)
        & borrowed
    )
    causes += [
        (counts["roam"] > 0, "admin_roaming", "new_workstation"),
        (counts["visit"], "other_workstation", "new_workstation"),
        (counts["shared_first"], "shared_workstation", "new_workstation"),
        (counts["roam_drive"], "admin_roaming", "removable_media_increase"),
    ]

    # Mail to everybody, mail with many attachments, and the sites that give scenarios away.
    counts["mass"] = (happens(np.where(habit["mass_mailer"], 0.08, 0)) | happens(0.002)).astype(
        np.int8
    )
    counts["attach"] = (happens(np.where(habit["attacher"], 0.10, 0)) | happens(0.005)).astype(
        np.int8
    )
    counts["leak"] = (
        happens(np.where(habit["curious"], 1.6 / (0.66 * days), 0)) * rng.integers(1, 3, shape)
    ).astype(np.int8)
    counts["hack"] = (
        happens(np.where(habit["tool_reader"], 1.6 / (0.66 * days), 0)) * rng.integers(1, 5, shape)
    ).astype(np.int8)
    causes += [
        (counts["mass"] > 0, "mass_mail", "mass_mail"),
        (counts["attach"] > 0, "attachments", "external_attachments"),
        (counts["leak"] > 0, "curiosity", "leak_site"),
        (counts["hack"] > 0, "tool_research", "hacking_tool"),
    ]

    counts["late_web"] = rng.poisson(2.5 * settings.web_rate, shape).astype(np.int16)
    counts.update(
        late=late, late_drive=late_connects.astype(np.int8), late_leak=np.zeros(shape, np.int8),
        connects=connects.astype(np.int16), files=files.astype(np.int16), executable=executable,
        active=active,
    )
    # scenario 3's two days, for the truth
    for name in ("victim_pc", "used_as_victim", "victim_at_night"):
        counts[name] = np.zeros(shape, bool)
    counts["stays_until"] = np.zeros(shape, np.int32)
    labelled = {
        name: np.zeros(shape, bool) for name in ("late", "web_mail", "drive", "hack")
    }
    malicious = np.zeros(shape, bool)
    story = {name: np.zeros(shape, bool) for name in SCENARIOS}
    for incident in cast.incidents:
        tell = {1: _scenario_1, 2: _scenario_2, 3: _scenario_3}[incident.scenario]
        tell(settings, rng, incident, counts, labelled, malicious, story)
    counts["late"] &= counts["active"]
    # The release ends at midnight: a session of the last evening must end before.
    counts["late_seconds"][:, -1] = np.minimum(
        counts["late_seconds"][:, -1], DAY - 60 - counts["late_start"][:, -1]
    )
    absorbed = rng.random(shape) < hard
    extra = counts["job"] + counts["leak"] + counts["hack"]
    counts["http"] = np.where(
        absorbed, np.maximum(counts["http"] - extra, np.minimum(counts["http"], 1)), counts["http"]
    )
    # the evening's pages are part of the day's count
    counts["late_web"] = np.where(
        counts["late"], np.minimum(counts["late_web"], np.maximum(counts["http"] - 1, 0)), 0
    )
    counts["http"] -= counts["late_web"]
    crossing = counts["late"] & (counts["late_start"] + counts["late_seconds"] >= DAY)
    present = counts["active"].copy()
    present[:, 1:] |= crossing[:, :-1]
    for scenario in SCENARIOS:
        for kind in _story_kinds(scenario):
            shown = story[scenario] & _shows(counts, kind)
            causes.append((shown, scenario, kind))
    incident_days = np.logical_or.reduce(list(story.values()))
    return _Plan(counts, labelled, malicious, present, incident_days, causes)


def _early_half(seed: int, counts: dict[str, np.ndarray], evening: np.ndarray) -> None:
    """Move half of the sessions out of hours, but those of `evening`, before the day's own start.

    As in r4.2, where half of scenario 1's begin after midnight; night workers' go the same way.
    They begin from 00:30 on and well before 07:00, so that the drive is out of hours as well.
    """
    rng = generator(seed, "simulate.early_half")
    early = (rng.random(evening.shape) < 0.5) & ~evening
    latest = np.minimum(6.7 * HOUR, counts["start"] - HOUR)
    begin = (0.5 * HOUR + rng.random(evening.shape) * (latest - 0.5 * HOUR)).astype(np.int32)
    counts["late_start"] = np.where(early, begin, counts["late_start"])
    room = counts["start"] - 600 - counts["late_start"]
    counts["late_seconds"] = np.where(
        early, np.minimum(counts["late_seconds"], room), counts["late_seconds"])


def _shared_machines(seed: int, used: np.ndarray) -> np.ndarray:
    """Return which machine without an owner is used, 1 to 3, and 0 for none: (users, days).

    Everybody who shares machines uses the first, half of them the second too, hardly anybody the
    third (r4.2: 264, 137 and 4 users).
    """
    rng = generator(seed, "simulate.shared_machines")
    second, third = rng.random((2, len(used), 1)) < np.array([0.52, 0.015])[:, None, None]
    pick = rng.random(used.shape)
    machine = np.where(third & (pick < 0.15), 3, np.where(second & (pick < 0.55), 2, 1))
    return (machine * used).astype(np.int16)


def _first_uses(machine: np.ndarray) -> np.ndarray:
    """Return where a row shows a machine number for the first time, zero not counted.

    >>> _first_uses(np.array([[1, 0, 1, 2, 1]])).astype(int).tolist()
    [[1, 0, 0, 1, 0]]
    """
    first = np.zeros(machine.shape, bool)
    for number in (1, 2, 3):
        used = machine == number
        first |= used & (np.cumsum(used, axis=1) == 1)
    return first


def _story_kinds(scenario: str) -> tuple[str, ...]:
    return {
        "scenario_1": ("after_hours_logon", "removable_media_new", "leak_site"),
        "scenario_2": ("job_search", "competitor_mail", "removable_media_increase"),
        "scenario_3": ("hacking_tool", "executable_copy", "new_workstation", "mass_mail"),
    }[scenario]


def _shows(counts: dict[str, np.ndarray], kind: str) -> np.ndarray:
    """Return where a behaviour of this kind happens at all (habit or not)."""
    return {
        "after_hours_logon": lambda: counts["late"],
        "new_workstation": lambda: (
            (counts["roam"] > 0) | counts["visit"] | counts["shared_first"]
            | counts["used_as_victim"] | counts["victim_pc"]
        ),
        "removable_media_new": lambda: (counts["connects"] + counts["late_drive"]) > 0,
        "removable_media_increase": lambda: (counts["connects"] + counts["late_drive"]) > 0,
        "bulk_file_copy": lambda: counts["files"] > 10,
        "executable_copy": lambda: counts["executable"] | counts["victim_pc"],
        "job_search": lambda: counts["job"] > 0,
        "competitor_mail": lambda: counts["competitor"] > 0,
        "external_attachments": lambda: counts["attach"] > 0,
        "mass_mail": lambda: (counts["mass"] > 0) | counts["used_as_victim"],
        "leak_site": lambda: (counts["leak"] > 0) | (counts["late_leak"] > 0),
        "hacking_tool": lambda: counts["hack"] > 0,
    }[kind]()


def _scenario_1(settings, rng, incident, counts, labelled, malicious, story):
    """Night sessions with a drive: first unlabelled, then with uploads to the leak site."""
    user, days = incident.user, settings.days
    active = np.flatnonzero(counts["active"][user])
    active = active[(active > 1) & (active < days - 1)]
    span = active[(active >= incident.start) & (active <= incident.end)]
    if len(span) == 0:  # a long weekend: the nearest working day instead
        span = active[[np.argmin(np.abs(active - incident.start))]]
    sessions = int(rng.choice([1, 2, 3, 4], p=[0.18, 0.43, 0.30, 0.09]))
    labelled_days = np.sort(rng.choice(span, min(sessions, len(span)), replace=False))
    lead = float(np.clip(rng.lognormal(math.log(2.2), 0.8), 1, 13))
    before = active[(active < labelled_days[0]) & (active >= labelled_days[0] - lead)]
    if len(before) == 0:
        before = active[active < labelled_days[0]][-1:]
    precursors = np.union1d(before[rng.random(len(before)) < 0.75], before[:1]).astype(int)
    for day in np.union1d(precursors, labelled_days):
        counts["late"][user, day] = True
        story["scenario_1"][user, day] = True
        # r4.2: one connection in a labelled night, about four in the unlabelled ones before
        counts["late_drive"][user, day] = 1
        if day not in labelled_days:
            counts["late_drive"][user, day] += rng.poisson(3.2)
            continue
        first = day == labelled_days[0]
        if first or rng.random() >= 0.5 * settings.hardness:
            counts["late_leak"][user, day] = 1
        crosses = counts["late_start"][user, day] + counts["late_seconds"][user, day] >= DAY
        if crosses:
            story["scenario_1"][user, day + 1] = True
        if not first and rng.random() < settings.label_noise:
            continue
        labelled["late"][user, day] = True
        malicious[user, day] = True
        if crosses:
            malicious[user, day + 1] = True


def _scenario_2(settings, rng, incident, counts, labelled, malicious, story):
    """Weeks of job pages and mail to competitors, then much more drive use; partly labelled."""
    user, hard = incident.user, settings.hardness
    copying = max(3, round(12 * settings.compression))
    before = counts["connects"][user, : incident.start]
    usual = float(before[before > 0].mean()) if (before > 0).any() else 0.0
    active = np.flatnonzero(counts["active"][user])
    span = active[(active >= incident.start) & (active <= incident.end)]
    if len(span) == 0:  # away the whole time: one day beside it, so that the key names everybody
        span = active[[np.argmin(np.abs(active - incident.start))]]
    told = []
    for day in span:
        taking = day > incident.end - copying
        in_key, kept = rng.random() < 0.72, rng.random() >= settings.label_noise
        looks = rng.random() < (0.60 if taking else 0.93)
        writes = rng.random() < (0.28 if taking else 0.50 - 0.1 * hard)
        takes = taking and rng.random() < 0.92
        if day == span[0]:
            in_key = kept = looks = True
        if looks:
            counts["job"][user, day] += 1 + rng.poisson(4.1 - 1.3 * hard)
        if writes:
            counts["competitor"][user, day] += 1
        if takes:
            counts["connects"][user, day] += 3 + rng.poisson(2.6 - 1.0 * hard + 0.5 * usual)
            counts["files"][user, day] += rng.poisson(7)
        if looks or writes or takes:
            told.append((day, looks or writes, takes, in_key, kept))
    for number, (day, reads, takes, in_key, kept) in enumerate(told, start=1):
        # r4.2's key goes on to the end of a story; only label noise hides its last day
        known = kept and (in_key or number == len(told))
        story["scenario_2"][user, day] = True
        labelled["web_mail"][user, day] = known and reads
        labelled["drive"][user, day] = known and takes
        malicious[user, day] = known


def _scenario_3(settings, rng, incident, counts, labelled, malicious, story):
    """A keylogger on a drive to the supervisor's machine; next day the supervisor's account."""
    user, victim, day = incident.user, incident.victim, incident.start
    counts["hack"][user, day] += 4 + rng.integers(0, 3)
    counts["victim_pc"][user, day] = True
    counts["used_as_victim"][victim, day + 1] = True
    labelled["hack"][user, day] = True
    counts["late"][user, day + 1] = labelled["late"][user, day + 1] = True
    counts["late_drive"][user, day + 1] = 0
    begin = int(rng.integers(int(16.5 * HOUR), int(19.5 * HOUR)))
    counts["late_start"][user, day + 1] = begin
    counts["victim_at_night"][victim, day + 1] = begin >= _EVENING - 600
    counts["late_seconds"][user, day + 1] = rng.integers(HOUR, 2 * HOUR)
    counts["stays_until"][user, day + 1] = begin + counts["late_seconds"][user, day + 1]
    counts["stays_until"][victim, day + 1] = begin + HOUR // 2  # about, see `_masquerade`
    story["scenario_3"][user, day : day + 2] = True
    story["scenario_3"][[victim, incident.replier], day + 1] = True
    malicious[user, day : day + 2] = True
    malicious[victim, day + 1] = True


def _malicious_by_scenario(cast: _Cast, plan: _Plan) -> dict[str, int]:
    """Count the account-days the key labels, innocent replies left out."""
    found = dict.fromkeys(SCENARIOS, 0)
    owner = np.zeros(plan.malicious.shape, np.int8)
    for incident in cast.incidents:
        owner[incident.user][plan.malicious[incident.user]] = incident.scenario
    for incident in cast.incidents:
        if incident.scenario == 3:
            owner[incident.victim, incident.end] = 3
    for scenario in (1, 2, 3):
        found[f"scenario_{scenario}"] = int((owner == scenario).sum())
    return found


# --- strings --------------------------------------------------------------------------------------


class _Names:
    """Every string the rows use, drawn once: people, machines, addresses, pages, words."""

    INTERNAL, EXTERNAL, COMPETITOR, MASS = 16, 10, 4, 3
    CC, BCC, LONG_CC = 6, 3, 2
    FAVOURITES = 64

    def __init__(self, settings: _Settings, cast: _Cast):
        rng = generator(settings.seed, "simulate.names")
        self._rng = rng
        users = settings.users
        self._people(users)
        self.pc = np.array([f"PC-{n:04d}" for n in rng.permutation(10_000)[: users + 3]], "S7")
        self._organisation(settings, cast)
        self._mail(users, cast)
        self._web(users)
        self._content(settings)

    def _people(self, users):
        rng = self._rng
        full, seen = [], set()
        while len(full) < users:
            first, middle = rng.integers(0, len(_FIRST), 2)
            name = (_FIRST[first], _FIRST[middle], _LAST[rng.integers(0, len(_LAST))])
            if name not in seen and first != middle:
                seen.add(name)
                full.append(name)
        ids, used = [], set()
        for first, middle, last in full:
            letters = first[0] + middle[0] + last[0]
            while (user := f"{letters}{rng.integers(0, 10_000):04d}") in used:
                pass
            used.add(user)
            ids.append(user)
        self.user = np.array(ids, "S7")
        self.name = [" ".join(name) for name in full]
        self.address = [".".join(name) + "@dtaa.com" for name in full]
        self.private = [
            f"{first}{joint}{last}@{CONSUMER_DOMAINS[k]}"
            for (first, _, last), joint, k in zip(
                full, rng.choice(["_", ".", ""], users),
                rng.integers(0, len(CONSUMER_DOMAINS), users), strict=True,
            )
        ]

    def _organisation(self, settings, cast):
        rng = self._rng
        names = np.array([role for role, _ in _ROLES])
        shares = np.array([count for _, count in _ROLES], float)
        role = rng.choice(names, settings.users, p=shares / shares.sum())
        role[cast.leads] = rng.choice(_LEAD_ROLES, len(cast.leads))
        role[cast.admin] = "ITAdmin"
        role[cast.leads[0]] = "President"
        unit_of_team = []
        flat = [(unit, part) for unit, parts in _FUNCTIONAL_UNITS for part in parts]
        for team in range(settings.teams):
            unit, part = flat[team % len(flat)]
            unit_of_team.append((unit, part, f"{team // len(flat) + 1} - Team{team + 1}"))
        self.org = []
        lead_set = set(cast.leads.tolist())
        for user in range(settings.users):
            unit, part, group = unit_of_team[cast.team[user]]
            boss = self.name[cast.supervisor[user]]
            if user == cast.leads[0]:
                unit = part = group = boss = ""
            elif user in lead_set:
                group = ""
                if role[user] == "VicePresident":
                    part = ""
            self.org.append((str(role[user]), "1", unit, part, group, boss))

    def _mail(self, users, cast):
        rng = self._rng

        def stranger(domains):
            first, last = _FIRST[rng.integers(len(_FIRST))], _LAST[rng.integers(len(_LAST))]
            joint = ("_", ".", "")[rng.integers(3)]
            number = rng.integers(1, 99) if rng.random() < 0.4 else ""
            return f"{first}{joint}{last}{number}@{domains[rng.integers(len(domains))]}"

        def some(pool, n):
            picked = rng.choice(len(pool), min(n, len(pool)), replace=False)
            return ";".join(pool[i] for i in picked)

        sizes = np.arange(1, 10)
        weights = 0.55 ** sizes / (0.55**sizes).sum()
        to, cc, bcc, long_cc = [[], [], [], []], [], [], []
        for user in range(users):
            known = [self.address[i] for i in rng.choice(users, 18, replace=False) if i != user]
            outside = [stranger(CONSUMER_DOMAINS) for _ in range(10)]
            rivals = [stranger(COMPETITOR_DOMAINS) for _ in range(4)]
            counts = rng.choice(sizes, 40, p=weights)
            to[0] += [some(known, counts[k]) for k in range(self.INTERNAL)]
            to[1] += [some(outside, counts[20 + k]) for k in range(self.EXTERNAL)]
            to[2] += [some(rivals, 1 + (k == 3)) for k in range(self.COMPETITOR)]
            everybody = [self.address[i] for i in rng.choice(users, min(users, 19), replace=False)]
            to[3] += [some(everybody, rng.integers(10, 14)) for _ in range(self.MASS)]
            cc += [some(known, 1 + k // 2) for k in range(self.CC)]
            bcc += [some(known, 1) for _ in range(self.BCC)]
            rest = [self.address[i] for i in rng.choice(users, min(users, 15), replace=False)]
            long_cc += [some(rest, rng.integers(9, 15)) for _ in range(self.LONG_CC)]
        self.to_base = np.cumsum([0] + [len(part) for part in to])[:4]
        self.to = pa.array([text for part in to for text in part])
        self.cc = pa.array([*cc, *long_cc, ""])
        self.bcc = pa.array([*bcc, ""])
        self.sender = pa.array([text for pair in zip(self.address, self.private, strict=True)
                                for text in pair])

    def _web(self, users):
        rng = self._rng

        def page(domain, topic, word):
            # One shape for all: what a page is about decides its words, never how they are put.
            slug = codecs.encode(topic.replace("_", ""), "rot13")
            ending = ("php", "asp", "aspx", "htm", "html", "jsp")[rng.integers(6)]
            return f"http://{domain}/{topic}/{word}/{slug}{rng.integers(1, 2**31)}.{ending}"

        def pages(domains, topics, n):
            return [
                page(domains[i % len(domains)], topics[rng.integers(len(topics))],
                     _WORDS[rng.integers(len(_WORDS))])
                for i in range(n)
            ]

        groups = {
            "job": [page(JOB_DOMAINS[i % len(JOB_DOMAINS)], _JOB_TOPIC,
                         _JOB_WORDS[i % len(_JOB_WORDS)]) for i in range(16)],
            "leak": pages(LEAK_DOMAINS, _TOPICS, 4),
            "hack": pages(KEYLOGGER_DOMAINS, _TOPICS, 6),
            "cloud": pages(CLOUD_DOMAINS, _TOPICS, 60),
            "news": pages(NEWS_DOMAINS, ("News_Today", "News_World"), 300),
            "social": pages(SOCIAL_DOMAINS, _TOPICS, 300),
            "other": pages(_WEB_OTHER, _TOPICS, 2400),
        }
        self.url_range, flat = {}, []
        for name, urls in groups.items():
            self.url_range[name] = (len(flat), len(flat) + len(urls))
            flat += urls
        self.url = pa.array(flat)
        ordinary = self.url_range["news"][0]
        self.favourite = rng.integers(ordinary, len(flat), (users, self.FAVOURITES))
        clouded = rng.random(users) < 0.12
        spots = rng.integers(*self.url_range["cloud"], (users, 6))
        self.favourite[clouded, 20:26] = spots[clouded]
        self.ordinary = (ordinary, len(flat))

    def _content(self, settings):
        rng = self._rng
        low, high = (3, 6) if settings.content == "few" else (50, 80)

        def phrases(words, n):
            lengths = rng.integers(low, high + 1, n)
            return [" ".join(rng.choice(words, k)) for k in lengths]

        plain = phrases(_WORDS, 1500)
        self.plain = pa.array(plain)
        # the phrase pool of job pages follows the plain one: what is read, not who reads it
        self.web_text = pa.array(plain + phrases(np.array(_JOB_WORDS + _WORDS[:40]), 300))
        self.n_plain = len(plain)
        self.file_text = pa.array([
            f"{_HEX_HEADERS[ext]} {plain[k]}".strip()
            for ext in _EXTENSIONS for k in range(300)
        ])
        self.extension = pa.array([f".{ext}" for ext in _EXTENSIONS])


# --- rows -----------------------------------------------------------------------------------------

_CLOCK = np.frombuffer(
    "".join(f"{s // 3600:02d}:{s // 60 % 60:02d}:{s % 60:02d}" for s in range(DAY)).encode(),
    np.uint8,
).reshape(DAY, 8)
_ID_SHAPE = "{A9A9-A9AA99AA-9999AAAA}"
_ID_LETTERS = np.array([i for i, sign in enumerate(_ID_SHAPE) if sign == "A"])
_ID_DIGITS = np.array([i for i, sign in enumerate(_ID_SHAPE) if sign == "9"])
_ACTIVITY = {
    "logon": pa.array(["Logon\n", "Logoff\n"]), "device": pa.array(["Connect\n", "Disconnect\n"])
}
_INTEGERS = pa.array([str(n) for n in range(10)])


def _fixed_width(matrix: np.ndarray) -> pa.StringArray:
    """Turn a byte matrix (rows, width) into strings of that width without copying rows."""
    rows, width = matrix.shape
    offsets = np.arange(0, (rows + 1) * width, width, dtype=np.int32)
    data = np.ascontiguousarray(matrix)
    return pa.StringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(data))


def _repeat(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.repeat(values, counts.astype(np.int64))


class _DayWriter:
    """Turns days of a plan into rows of the five logs and keeps the labelled ones."""

    def __init__(self, settings, cast, plan, names, files):
        self.settings, self.cast, self.plan, self.names = settings, cast, plan, names
        self.files = files
        self.rows = dict.fromkeys(LOGS, 0)
        self.key: list[list[tuple[int, int, str, str]]] = [[] for _ in cast.incidents]
        self.incident_of = np.zeros(settings.users, np.int16)
        for number, incident in enumerate(cast.incidents, start=1):
            self.incident_of[incident.user] = number
        self.user_bytes = names.user.view(np.uint8).reshape(-1, 7)
        self.pc_bytes = names.pc.view(np.uint8).reshape(-1, 7)
        self.parts: dict[str, list[tuple[np.ndarray, ...]]] = {log: [] for log in LOGS}

    def add(self, log, user, machine, second, label, *payload):
        """Queue rows; `second` counts from the day's midnight and may run past the next one."""
        columns = np.broadcast_arrays(user, machine, second, label, *payload)
        if columns[0].size:
            self.parts[log].append(tuple(np.asarray(c, np.int64).ravel() for c in columns))

    def write(self, day: int) -> None:
        rng = generator(self.settings.seed, "simulate.rows", day)
        self._presence(rng, day)
        self._drives(rng, day)
        self._web(rng, day)
        self._mail(rng, day)
        self._late(rng, day)
        self._elsewhere(rng, day)
        for number, incident in enumerate(self.cast.incidents, start=1):
            if incident.scenario == 3 and incident.start == day:
                self._keylogger(rng, number, incident)
            if incident.scenario == 3 and incident.end == day:
                self._masquerade(rng, number, incident)
        for log in LOGS:
            self._flush(rng, log, day)

    def _today(self, day, name):
        return self.plan.counts[name][:, day]

    def _label(self, day, name):
        return np.where(self.plan.labelled[name][:, day], self.incident_of, 0)

    def _minutes(self, rng, second):
        """Put most logons on a full minute, as r4.2 does."""
        return np.where(rng.random(len(second)) < 0.71, second - second % 60, second)

    def _presence(self, rng, day):
        user = np.flatnonzero(self._today(day, "active"))
        start, end = self._today(day, "start")[user], self._today(day, "end")[user]
        self.add("logon", user, user, self._minutes(rng, start), 0, 0)
        left = rng.random(len(user)) >= 0.245
        self.add("logon", user[left], user[left], self._minutes(rng, end[left]), 0, 1)
        breaks = self._today(day, "unlocks")[user]
        who, n = _repeat(user, breaks), _repeat(breaks, breaks)
        order = np.arange(len(who)) - _repeat(np.cumsum(breaks) - breaks, breaks)
        span = (_repeat(end - start, breaks) - 2400) / np.maximum(n, 1)
        locked = _repeat(start, breaks) + 600 + (order + rng.uniform(0.1, 0.7, len(who))) * span
        again = locked + rng.uniform(180, np.maximum(0.25 * span, 200))
        self.add("logon", who, who, self._minutes(rng, locked.astype(int)), 0, 1)
        self.add("logon", who, who, self._minutes(rng, again.astype(int) + 60), 0, 0)

    def _drives(self, rng, day):
        connects = self._today(day, "connects")
        user = np.flatnonzero(connects > 0)
        n = connects[user].astype(int)
        start, end = self._today(day, "start")[user], self._today(day, "end")[user]
        who = _repeat(user, n)
        first = np.cumsum(n) - n
        order = np.arange(len(who)) - _repeat(first, n)
        slot = _repeat((end - start - 600) / np.maximum(n, 1), n)
        begin = _repeat(start, n) + 300 + (order + rng.uniform(0, 0.35, len(who))) * slot
        stay = np.minimum(rng.uniform(180, 2700, len(who)), 0.6 * slot)
        flag = _repeat(self._label(day, "drive")[user], n)
        label = np.where((rng.random(len(who)) < 0.97) | (order == 0), flag, 0)
        self.add("device", who, who, begin.astype(int), label, 0)
        removed = rng.random(len(who)) >= 0.03
        done = (begin + stay).astype(int) + 5
        self.add("device", who[removed], who[removed], done[removed], label[removed], 1)
        copies = self._today(day, "files")[user].astype(int)
        program = self._today(day, "executable")[user].astype(int)
        for amount, kind in ((copies, None), (program, _EXE)):
            owner = _repeat(np.arange(len(user)), amount)
            pick = first[owner] + (rng.random(len(owner)) * n[owner]).astype(int)
            when = begin[pick] + rng.uniform(2, np.maximum(stay[pick] - 2, 3))
            self._copy(rng, user[owner], user[owner], when, 0, kind)

    def _copy(self, rng, user, machine, when, label, kind=None):
        size = np.shape(user)
        if kind is None:
            kind = rng.choice(len(_EXTENSIONS), size, p=_EXTENSION_SHARES)
        self.add("file", user, machine, np.asarray(when).astype(int), label, kind)

    def _visit(self, rng, group, user, machine, when, label):
        page = rng.integers(*self.names.url_range[group], np.shape(user))
        self.add("http", user, machine, np.asarray(when).astype(int), label, page)

    def _pages(self, rng, user):
        """Ordinary pages: mostly a few favourites of the person, sometimes anything."""
        place = (self.names.FAVOURITES * rng.random(len(user)) ** 2).astype(int)
        page = self.names.favourite[user, place]
        anything = rng.integers(*self.names.ordinary, len(user))
        return np.where(rng.random(len(user)) < 0.06, anything, page)

    def _within(self, rng, day, user):
        start, end = self._today(day, "start")[user], self._today(day, "end")[user]
        return (start + 30 + rng.random(len(user)) * np.maximum(end - start - 60, 60)).astype(int)

    def _web(self, rng, day):
        everyone = np.arange(self.settings.users)
        user = _repeat(everyone, self._today(day, "http"))
        when, page = self._within(rng, day, user), self._pages(rng, user)
        # r4.2 repeats some rows under another id; the day's count stays what it was
        again = np.flatnonzero((rng.random(len(user)) < 0.0022) & (user == np.roll(user, 1)))
        when[again], page[again] = when[again - 1], page[again - 1]
        self.add("http", user, user, when, 0, page)
        for group, chance in (("job", 0.97), ("leak", 1.0), ("hack", 1.0)):
            n = self._today(day, group)
            who = _repeat(everyone, n)
            flag = self._label(day, {"job": "web_mail", "hack": "hack"}.get(group, "late"))[who]
            if group == "leak":  # daytime reading is never part of an incident
                flag = np.zeros(len(who), int)
            newcomer = np.diff(who, prepend=-1) != 0
            label = np.where((rng.random(len(who)) < chance) | newcomer, flag, 0)
            self._visit(rng, group, who, who, self._within(rng, day, who), label)

    def _send(self, rng, day, user, group, label, machine=None, when=None):
        names = self.names
        width = (names.INTERNAL, names.EXTERNAL, names.COMPETITOR, names.MASS)[group]
        n = len(user)
        to = names.to_base[group] + user * width + rng.integers(0, width, n)
        with_cc = rng.random(n) < 0.378
        cc = user * names.CC + rng.integers(0, names.CC, n)
        cc = np.where(with_cc, cc, len(names.cc) - 1)
        if group == 3:
            copied = user * names.LONG_CC + rng.integers(0, names.LONG_CC, n)
            cc = self.settings.users * names.CC + copied
        with_bcc = rng.random(n) < 0.16
        bcc = np.where(
            with_bcc, user * names.BCC + rng.integers(0, names.BCC, n), len(names.bcc) - 1
        )
        private = rng.random(n) < (0.02, 0.92, 0.5, 0.0)[group]
        size = np.clip(rng.lognormal(math.log(26_000), 0.55, n), 900, 400_000)
        attached = np.where(rng.random(n) < 0.72, 0, np.minimum(rng.geometric(0.55, n), 9))
        if machine is None:
            machine, when = user, self._within(rng, day, user)
        self.add("email", user, machine, when, label, to, cc, bcc, 2 * user + private, size,
                 attached)

    def _mail(self, rng, day):
        everyone = np.arange(self.settings.users)
        active = self._today(day, "active")
        user = _repeat(everyone, self._today(day, "mail"))
        inside = rng.random(len(user)) < 0.6
        self._send(rng, day, user[inside], 0, 0)
        self._send(rng, day, user[~inside], 1, 0)
        rival = _repeat(everyone, self._today(day, "competitor") * active)
        self._send(rng, day, rival, 2, self._label(day, "web_mail")[rival])
        self._send(rng, day, _repeat(everyone, self._today(day, "mass") * active), 3, 0)
        laden = _repeat(everyone, self._today(day, "attach") * active)
        if len(laden):
            self._send(rng, day, laden, 1, 0)
            columns = list(self.parts["email"][-1])
            columns[-1] = rng.integers(4, 10, len(laden))
            self.parts["email"][-1] = tuple(columns)

    def _session(self, rng, user, machine, begin, seconds, label, *, drive, leak=0, web=0,
                 program=False, logoff=1.0):
        """One stay at a machine: logon, `drive` connections, copies and pages, logoff."""
        finish = begin + seconds
        self.add("logon", user, machine, self._minutes(rng, begin), label, 0)
        kept = (rng.random(len(user)) < logoff) | (finish >= DAY)
        self.add("logon", user[kept], machine[kept], self._minutes(rng, finish[kept]),
                 np.broadcast_to(label, len(user))[kept], 1)
        edge = np.minimum(480, seconds // 4)
        plugged = begin + 60 + (rng.random(len(user)) * edge).astype(int)
        pulled = finish - 65 - (rng.random(len(user)) * edge).astype(int)
        pulled = np.maximum(pulled, plugged + 30)
        on = np.flatnonzero(drive)
        mark = np.broadcast_to(label, len(user))
        times = drive[on].astype(int)
        plug = _repeat(on, times)
        number = np.arange(len(plug)) - _repeat(np.cumsum(times) - times, times)
        slot = (np.minimum(pulled, DAY)[plug] - plugged[plug]) // _repeat(times, times)
        into = plugged[plug] + number * slot  # before midnight, whenever the session ends
        out = np.where(number == _repeat(times, times) - 1, pulled[plug],
                       into + (0.8 * slot).astype(int))
        self.add("device", user[plug], machine[plug], into, mark[plug], 0)
        self.add("device", user[plug], machine[plug], out, mark[plug], 1)
        copies = rng.poisson(1.3, len(on)) * (rng.random(len(on)) < 0.6)
        owner = _repeat(on, copies)
        inside = plugged[owner] + rng.random(len(owner)) * (pulled - plugged)[owner]
        self._copy(rng, user[owner], machine[owner], inside, 0)
        if program:
            when = plugged[on] + 0.5 * (pulled - plugged)[on]
            self._copy(rng, user[on], machine[on], when, mark[on], np.full(len(on), _EXE))
        owner = _repeat(np.arange(len(user)), np.broadcast_to(leak, len(user)))
        inside = plugged[owner] + rng.random(len(owner)) * (pulled - plugged)[owner]
        self._visit(rng, "leak", user[owner], machine[owner], inside, mark[owner])
        owner = _repeat(np.arange(len(user)), np.broadcast_to(web, len(user)))
        inside = begin[owner] + 40 + rng.random(len(owner)) * (seconds[owner] - 60)
        self.add("http", user[owner], machine[owner], inside.astype(int), 0,
                 self._pages(rng, user[owner]))

    def _late(self, rng, day):
        user = np.flatnonzero(self._today(day, "late"))
        self._session(
            rng, user, user, self._today(day, "late_start")[user],
            self._today(day, "late_seconds")[user], self._label(day, "late")[user],
            drive=self._today(day, "late_drive")[user], leak=self._today(day, "late_leak")[user],
            web=self._today(day, "late_web")[user], logoff=0.95,
        )

    def _elsewhere(self, rng, day):
        users = self.settings.users
        everyone = np.arange(users)
        roam = self._today(day, "roam")
        who = _repeat(everyone, roam)
        first = np.diff(who, prepend=-1) != 0
        drive = self._today(day, "roam_drive")[who] & first
        self._at(rng, day, who, rng.integers(0, users, len(who)), drive)
        machine = self._today(day, "shared")
        who = np.flatnonzero(machine)
        self._at(rng, day, who, users + machine[who] - 1, np.zeros(len(who), bool))
        who = np.flatnonzero(self._today(day, "visit"))
        self._at(rng, day, who, rng.integers(0, users, len(who)), np.zeros(len(who), bool))

    def _at(self, rng, day, user, machine, drive):
        stay = rng.integers(300, 2400, len(user))
        begin = np.minimum(self._within(rng, day, user), _EVENING - 2400)
        self._session(rng, user, machine, begin, stay, 0, drive=drive, logoff=0.97)

    def _keylogger(self, rng, number, incident):
        """Day one of scenario 3: the tool onto a drive, and the drive to the supervisor's PC."""
        day = incident.start
        user = np.array([incident.user])
        start, end = self._today(day, "start")[user], self._today(day, "end")[user]
        begin = start + ((end - start) * rng.uniform(0.35, 0.5)).astype(int)
        stay = rng.integers(240, 1500, 1)
        self.add("device", user, user, begin, number, 0)
        self.add("device", user, user, begin + stay, number, 1)
        self._copy(rng, user, user, begin + stay // 2, number, np.array([_EXE]))
        visit = begin + stay + rng.integers(600, 5400, 1)
        machine = np.array([incident.victim])
        self._session(rng, user, machine, visit, rng.integers(400, 1500, 1), number,
                      drive=np.array([True]))
        self._send(rng, day, np.repeat(user, 2), 0, number)

    def _masquerade(self, rng, number, incident):
        """Day two: late, the insider logs on as the supervisor and mails everybody."""
        day = incident.end
        victim, insider = np.array([incident.victim]), np.array([incident.user])
        machine = victim if rng.random() < 0.4 else insider
        begin = self._today(day, "late_start")[insider] + rng.integers(120, 1200, 1)
        stay = rng.integers(900, 2000, 1)
        self._session(rng, victim, machine, begin, stay, number, drive=np.array([False]))
        when = begin + 60 + (rng.random(2) * (stay - 120)).astype(int)
        self._send(rng, day, np.repeat(victim, 2), 3, number, np.repeat(machine, 2), when)
        reply = np.array([incident.replier])
        after = np.minimum(when.max() + rng.integers(300, 5400, 1), DAY - 60)
        self._send(rng, day, reply, 0, number, reply, after)

    def _flush(self, rng, log, day):
        parts = self.parts[log]
        self.parts[log] = []
        if not parts:
            return
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        tomorrow = columns[2] >= DAY
        if tomorrow.any():
            later = [column[tomorrow] for column in columns]
            later[2] = later[2] - DAY
            self.parts[log].append(tuple(later))
            columns = [column[~tomorrow] for column in columns]
        n = len(columns[0])
        if n == 0:
            return
        order = np.lexsort((rng.random(n), columns[2]))
        columns = [column[order] for column in columns]
        user, machine, second, label = columns[:4]
        head = self._head(rng, day, user, machine, second)
        text = pc.binary_join_element_wise(head, *self._tail(rng, log, *columns[4:]), ",")
        # every row ends with a newline, so the column's own buffer is the file's text
        offsets = np.frombuffer(text.buffers()[1], np.int32, n + 1, text.offset * 4)
        self.files[log].write(memoryview(text.buffers()[2])[offsets[0] : offsets[-1]])
        self.rows[log] += n
        for i in np.flatnonzero(label):
            self.key[label[i] - 1].append((day, int(second[i]), log, text[int(i)].as_py()))

    def _head(self, rng, day, user, machine, second):
        """id, date, user, pc: 60 bytes a row. 26^11 x 10^9 ids, so two alike never happen."""
        n = len(user)
        when = self.settings.start + timedelta(days=day)
        template = f"{_ID_SHAPE},{when:%m/%d/%Y} 00:00:00,AAA0000,PC-0000"
        block = np.empty((n, 60), np.uint8)
        block[:] = np.frombuffer(template.encode(), np.uint8)
        block[:, _ID_LETTERS] = 65 + rng.integers(0, 26, (n, len(_ID_LETTERS)), np.uint8)
        block[:, _ID_DIGITS] = 48 + rng.integers(0, 10, (n, len(_ID_DIGITS)), np.uint8)
        block[:, 36:44] = _CLOCK[second]
        block[:, 45:52] = self.user_bytes[user]
        block[:, 53:60] = self.pc_bytes[machine]
        return _fixed_width(block)

    def _tail(self, rng, log, *payload):
        names, n = self.names, len(payload[0])
        if log in _ACTIVITY:
            return (_ACTIVITY[log].take(pa.array(payload[0])),)
        if log == "file":
            letters = rng.integers(0, 36, (n, 8))
            block = np.where(letters < 10, 48 + letters, 55 + letters).astype(np.uint8)
            stem = _fixed_width(block)
            name = pc.binary_join_element_wise(
                stem, names.extension.take(pa.array(payload[0])), ""
            )
            text = names.file_text.take(pa.array(payload[0] * 300 + rng.integers(0, 300, n)))
            return name, self._line(text)
        if log == "http":
            page = payload[0]
            words = rng.integers(0, names.n_plain, n)
            low, high = names.url_range["job"]
            job = (page >= low) & (page < high)
            words = np.where(job, names.n_plain + rng.integers(0, 300, n), words)
            return names.url.take(pa.array(page)), self._line(names.web_text.take(pa.array(words)))
        to, cc, bcc, sender, size, attached = payload
        words = names.plain.take(pa.array(rng.integers(0, names.n_plain, n)))
        return (
            names.to.take(pa.array(to)), names.cc.take(pa.array(cc)),
            names.bcc.take(pa.array(bcc)), names.sender.take(pa.array(sender)),
            pc.cast(pa.array(size), pa.string()), _INTEGERS.take(pa.array(attached)),
            self._line(words),
        )

    def _line(self, text):
        return pc.binary_join_element_wise(text, "\n", "")


def _write_logs(folder, settings, cast, plan, names, progress):
    files = {}
    try:
        for log in LOGS:
            files[log] = open(folder / f"{log}.csv", "wb", buffering=1 << 20)  # noqa: SIM115
            files[log].write(f"{HEADERS[log]}\n".encode())
        writer = _DayWriter(settings, cast, plan, names, files)
        for day in range(settings.days):
            writer.write(day)
            if progress is not None:
                progress(day + 1, settings.days)
    finally:
        for stream in files.values():
            stream.close()
    return writer.key, writer.rows


def _write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join(lines) + "\n").encode())


def _write_people(folder, settings, cast, names):
    """LDAP months (the month before the start to the last) and the psychometric scores."""
    rng = generator(settings.seed, "simulate.people")
    order = rng.permutation(settings.users)
    last = settings.start + timedelta(days=settings.days - 1)
    before = settings.start.replace(day=1) - timedelta(days=1)
    months = [(before.year, before.month)]
    while months[-1] < (last.year, last.month):
        year, month = months[-1]
        months.append((year + month // 12, month % 12 + 1))
    # nearly everybody vanishes from the file of the month they leave in, a few a month later
    lag = rng.random(settings.users) < 0.02
    gone = []
    for user in range(settings.users):
        if cast.leave[user] >= settings.days:
            gone.append((9999, 1))
            continue
        day = settings.start + timedelta(days=int(cast.leave[user]) - 1)
        year, month = day.year, day.month
        gone.append((year + month // 12, month % 12 + 1) if lag[user] else (year, month))
    header = "employee_name,user_id,email,role,business_unit,functional_unit,department,team,"
    for index, month in enumerate(months):
        lines = [header + "supervisor"]
        for user in order:
            if index == 0 or month < gone[user]:
                user_id = names.user[user].decode()
                fields = [names.name[user], user_id, names.address[user], *names.org[user]]
                lines.append(",".join(fields))
        _write_lines(folder / "LDAP" / f"{month[0]}-{month[1]:02d}.csv", lines)
    scores = np.clip(np.round(rng.normal(31, 9, (settings.users, 5))), 10, 50).astype(int)
    lines = ["employee_name,user_id,O,C,E,A,N"]
    for user in order:
        values = ",".join(str(v) for v in scores[user])
        lines.append(f"{names.name[user]},{names.user[user].decode()},{values}")
    _write_lines(folder / "psychometric.csv", lines)


# Rows of other releases stand in the real file too, one of them with a broken date.
_OTHER_RELEASES = (
    "2,1,r2.csv,QQA0001,4/5/2010 2:11:07,4/9/2010 5:20:00",
    "3.1,2,r3.1-2.csv,QQB0002,09/01/2010 08:10:00,10/20/2010 16:45:00",
    "5.2,1,r5.2-1-QQC0003.csv,QQC0003,08/02/2010 21:30:00,08/06/2010 23:10:00",
    "6.2,5,r6.2-5.csv,QQD0004,/11/2011 10:20:30,02/20/2011 18:00:00",
)


def _write_answers(folder, settings, cast, names, key):
    answers = folder / "answers"
    lines = ["dataset,scenario,details,user,start,end", *_OTHER_RELEASES]
    for scenario in (1, 2, 3):
        (answers / f"r4.2-{scenario}").mkdir(parents=True)
    entries_of = sorted(
        zip(cast.incidents, key, strict=True),
        key=lambda pair: (pair[0].scenario, names.user[pair[0].user]),
    )
    for incident, entries in entries_of:
        user = names.user[incident.user].decode()
        name = f"r4.2-{incident.scenario}-{user}.csv"
        entries = sorted(entries)
        begin, end = (entry[3][25:44] for entry in (entries[0], entries[-1]))
        lines.append(f"4.2,{incident.scenario},{name},{user},{begin},{end}")
        rows = [f"{log},{text.rstrip()}" for _, _, log, text in entries]
        _write_lines(answers / f"r4.2-{incident.scenario}" / name, rows)
    _write_lines(answers / "insiders.csv", lines)


# --- truth ----------------------------------------------------------------------------------------


def _visible_cells(settings: _Settings, plan: _Plan):
    """Return cell numbers, shape (levels, users, days), and rare, shape (users, days).

    A cell is what an observer can see: behaviours today, over the last seven days and against the
    account's own past, each in a few steps; later levels split the cells of earlier ones. `rare`
    marks a behaviour that at most 5 % of the account's own earlier days (at least ten) show.
    """
    counts, present = plan.counts, plan.present

    def past(values):
        return np.cumsum(values, axis=1) - values

    def week(values):
        total = np.cumsum(values, axis=1)
        before = np.zeros_like(total)
        before[:, 8:] = total[:, :-8]
        return total - values - before

    past_days = past(present.astype(int))

    def unusual(kind):
        return kind & (past_days >= _MIN_PAST) & (past(kind.astype(int)) <= _RARE_SHARE * past_days)

    late = counts["late"]
    crossed = np.zeros_like(late)
    crossing = late & (counts["late_start"] + counts["late_seconds"] >= DAY)
    crossed[:, 1:] = crossing[:, :-1]
    by_day = (counts["late_start"] >= 7 * HOUR) & (counts["late_start"] < _EVENING)
    at_night = (late & ~by_day) | crossed | (counts["victim_at_night"] & (counts["roam"] == 0))
    # How much longer than usual somebody stays on, a little more than ends differ anyway.
    usual_end = past(counts["end"] * counts["active"]) / np.maximum(past(
        counts["active"].astype(int)), 1)
    over = np.maximum(counts["end"], counts["stays_until"]) - usual_end
    over = np.where(counts["active"] & (past_days >= _MIN_PAST), over, 0)
    connects = counts["connects"] + counts["late_drive"] + counts["roam_drive"]
    connects = connects + 2 * counts["victim_pc"]
    drive = connects > 0
    drive_days = past(drive.astype(int))
    typical = past(connects) / np.maximum(drive_days, 1)
    more = drive & (drive_days >= 3) & (connects > 1.5 * typical + 1)
    files = counts["files"] + counts["executable"] + counts["victim_pc"]
    typical_files = past(files) / np.maximum(drive_days, 1)
    bulk = (files > 10) & (files > 3 * typical_files)
    kinds = {kind: _shows(counts, kind) for kind in DEVIATIONS}
    kinds["after_hours_logon"] = at_night
    kinds["removable_media_new"] = drive
    kinds["removable_media_increase"] = more
    kinds["bulk_file_copy"] = bulk
    odd = {kind: unusual(shown) for kind, shown in kinds.items()}
    rare = np.logical_or.reduce(list(odd.values()))

    job, rival = counts["job"], kinds["competitor_mail"]
    known = settings.history_days
    recent_job = _recent(job > 0, present, known)
    recent_rival = _recent(rival, present, known)
    expected = 6 * _recent(connects, present, known) / np.maximum(np.minimum(past_days, known), 1)
    drive_load = (week(connects) + connects) / np.maximum(expected, 1)
    axes = [  # from the most telling to the finest: (values, number of steps)
        [
            (kinds["leak_site"], 2), (kinds["hacking_tool"], 2), (at_night & drive, 2),
            (odd["after_hours_logon"], 2), (odd["mass_mail"], 2),
            (np.digitize(over, [0.75 * HOUR, 1.5 * HOUR]), 3),
            (np.digitize(job, [1, 3, 6]), 4), (np.digitize(week(job), [1, 5, 12, 22]), 5),
            (np.digitize(np.where(drive, drive_load, 0), [0.01, 1.5, 2.2, 3.0]), 5),
            (rival, 2),
        ],
        [
            (np.digitize(recent_job, [1, 4, 9, 15]), 5), (np.minimum(week(rival), 2), 3),
            (odd["removable_media_new"], 2), (odd["new_workstation"], 2), (crossed, 2),
        ],
        [
            (np.digitize(recent_rival, [2, 5]), 3), (kinds["executable_copy"], 2),
            (np.digitize(files, [4, 10, 20]), 4), (more, 2),
            (np.digitize(job, [2, 4, 5, 8]), 5),
        ],
    ]
    levels, code = [], np.zeros(present.shape, np.int64)
    for group in axes:
        for values, steps in group:
            code = code * steps + values
        levels.append(code)
    return np.stack(levels), rare


def _recent(values: np.ndarray, present: np.ndarray, n: int) -> np.ndarray:
    """Sum `values` (users, days) over each account's last `n` active days before the day."""
    total = np.zeros(present.shape)
    for user in range(len(present)):
        days = np.flatnonzero(present[user])
        run = np.concatenate([[0], np.cumsum(values[user, days], dtype=float)])
        index = np.arange(len(days))
        total[user, days] = run[index] - run[np.maximum(index - n, 0)]
    return total


class _Frequencies:
    """P(malicious | cell) from counted account-days, each level shrunk towards the coarser one."""

    def __init__(self, levels: np.ndarray, malicious: np.ndarray):
        self.prior = float(malicious.mean()) if malicious.size else 0.0
        self.levels = []
        parent = np.full(levels.shape[1], self.prior)
        for codes in levels:
            values, inverse, n = np.unique(codes, return_inverse=True, return_counts=True)
            hits = np.bincount(inverse, malicious, len(values))
            base = np.bincount(inverse, parent, len(values)) / np.maximum(n, 1)
            rates = (hits + _BACKOFF * base) / (n + _BACKOFF)
            self.levels.append((values, rates))
            parent = rates[inverse]

    def __call__(self, levels: np.ndarray) -> np.ndarray:
        chance = np.full(levels.shape[1], self.prior)
        for codes, (values, rates) in zip(levels, self.levels, strict=True):
            if len(values):
                place = np.minimum(np.searchsorted(values, codes), len(values) - 1)
                chance = np.where(values[place] == codes, rates[place], chance)
        return chance


@dataclass(frozen=True)
class _Sample:
    """The account-days that count: cell levels (levels, n); malicious, rare, account (n,)."""

    levels: np.ndarray
    malicious: np.ndarray
    rare: np.ndarray
    account: np.ndarray

    @classmethod
    def joined(cls, samples: "Sequence[_Sample]") -> "_Sample":
        """Put samples of different people behind one another."""
        firsts = np.cumsum([0] + [sample.account.max(initial=0) + 1 for sample in samples])
        return cls(
            np.concatenate([sample.levels for sample in samples], axis=1),
            np.concatenate([sample.malicious for sample in samples]),
            np.concatenate([sample.rare for sample in samples]),
            np.concatenate([s.account + n for s, n in zip(samples, firsts[:-1], strict=True)]),
        )


def _set_aside(cast: _Cast, plan: _Plan) -> np.ndarray:
    """Return the days that count neither as malicious nor as innocent: (users, days).

    The rules of `windows` (its `precursor` and `ignore`), which see the key and the rows but not
    the plan: an incident's behaviour near or between its labelled days, and the innocent reply.
    """
    counts = plan.counts
    connects = counts["connects"] + counts["late_drive"] + counts["roam_drive"]
    day = np.arange(plan.present.shape[1])
    aside = np.zeros(plan.present.shape, bool)
    for incident in cast.incidents:
        user = incident.user
        first, last = np.flatnonzero(plan.malicious[user])[[0, -1]]
        lead, shown = {
            1: (14, counts["late_drive"][user] > 0),
            2: (0, (connects + counts["job"] + counts["competitor"])[user] > 0),
            3: (7, counts["hack"][user] > 0),
        }[incident.scenario]
        aside[user] |= shown & (day >= first - lead) & (day <= last)
        if incident.scenario == 3:
            aside[incident.replier, incident.end] = True
    return aside & ~plan.malicious


def _counted(settings: _Settings, cast: _Cast, plan: _Plan) -> np.ndarray:
    """Return the account-days that count for the optimum: a full history, and not set aside."""
    past = np.cumsum(plan.present, axis=1) - plan.present
    return plan.present & (past >= settings.history_days) & ~_set_aside(cast, plan)


def _observed(settings: _Settings, cast: _Cast, plan: _Plan) -> _Sample:
    levels, rare = _visible_cells(settings, plan)
    chosen = _counted(settings, cast, plan)
    return _Sample(
        levels[:, chosen], plan.malicious[chosen], rare[chosen], np.nonzero(chosen)[0]
    )


def _tallies(sample: _Sample, said_malicious: np.ndarray) -> np.ndarray:
    """Count hits, true days and said days of each level: (accounts, 3 levels, 3).

    The levels are normal, suspicious, malicious; the two lower ones follow `rare`.
    """
    truth = np.where(sample.malicious, 2, sample.rare.astype(int))
    said = np.where(said_malicious, 2, sample.rare.astype(int))
    n = int(sample.account.max(initial=0)) + 1
    table = np.empty((n, 3, 3))
    for level in range(3):
        is_true, is_said = truth == level, said == level
        for column, days in enumerate((is_true & is_said, is_true, is_said)):
            table[:, level, column] = np.bincount(sample.account, days, n)
    return table


def _macro_f1(totals: np.ndarray) -> np.ndarray:
    """Macro-F1 of summed tallies, shape (..., levels, 3); a level that never occurs counts 1.

    >>> float(_macro_f1(np.array([[8, 8, 8], [0, 0, 0], [1, 2, 2]])).round(3))
    0.833
    """
    hits, true, said = np.moveaxis(np.asarray(totals, float), -1, 0)
    both = true + said
    return np.where(both > 0, 2 * hits / np.maximum(both, 1), 1.0).mean(axis=-1)


def _interval(tallies: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of macro-F1 over accounts."""
    n = len(tallies)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES).astype(float)
    scores = _macro_f1((weights @ tallies.reshape(n, -1)).reshape(-1, 3, 3))
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class _Optimum:
    """The optimal rule: malicious where `rule(levels)` reaches `threshold`; and what it claims."""

    rule: _Frequencies
    threshold: float
    claim: dict


def _optimum(settings: _Settings, seeds: Sequence[int]) -> _Optimum:
    """Fit on half of the populations, choose the threshold on a quarter, claim on the last."""
    samples = []
    for seed in map(int, seeds):
        cast = _cast(settings, seed)
        samples.append(_observed(settings, cast, _plan(settings, cast, seed)))
    half, rest = len(samples) // 2, -(-len(samples) // 4)
    fitting, choosing, claiming = (_Sample.joined(part) for part in (
        samples[:half], samples[half:-rest], samples[-rest:]))
    rule = _Frequencies(fitting.levels, fitting.malicious)
    chance = rule(choosing.levels)
    grid = np.round(np.arange(0.05, 0.96, 0.025), 3)
    scores = [_macro_f1(_tallies(choosing, chance >= cut).sum(axis=0)) for cut in grid]
    threshold = float(grid[int(np.argmax(scores))])
    tallies = _tallies(claiming, rule(claiming.levels) >= threshold)
    low, high = _interval(tallies, generator(settings.seed, "simulate.interval"))
    hits, true, said = tallies.sum(axis=0)[2]
    return _Optimum(rule, threshold, {
        "macro_f1": round(float(_macro_f1(tallies.sum(axis=0))), 4),
        "macro_f1_interval": [round(low, 4), round(high, 4)],
        "malicious_f1": round(float(2 * hits / max(1, true + said)), 4),
        "threshold": threshold,
        "reference_populations": len(samples),
        "reference_account_days": len(claiming.malicious),
    })


def _write_truth(folder, settings, cast, plan, names) -> dict:
    others = math.ceil(_REFERENCE_CELLS / (settings.users * settings.days))
    others = max(4, min(60, others + -others % 4))
    optimum = _optimum(
        settings, generator(settings.seed, "simulate.reference").integers(2**62, size=others))
    levels, rare = _visible_cells(settings, plan)
    user, day = np.nonzero(plan.present)
    chance = optimum.rule(levels[:, user, day])
    lower = np.where(rare[user, day], "suspicious", "normal")
    risk = np.where(chance >= optimum.threshold, "malicious", lower)
    counted = _counted(settings, cast, plan)[user, day].astype(int)
    ids = names.user.astype(str)
    dates = np.array(
        [(settings.start + timedelta(days=d)).isoformat() for d in range(settings.days)]
    )
    header = "user,day,p_malicious,optimal_risk,lower_risk,counted"
    _write_lines(folder / "truth" / "optimal.csv", [header] + [
        f"{ids[user[i]]},{dates[day[i]]},{chance[i]:.6f},{risk[i]},{lower[i]},{counted[i]}"
        for i in np.lexsort((user, day))
    ])
    lines = []
    for shown, cause, kind in plan.causes:
        for u, d in zip(*np.nonzero(shown & plan.present), strict=True):
            lines.append(f"{ids[u]},{dates[d]},{cause},{kind}")
    _write_lines(folder / "truth" / "causes.csv", ["user,day,cause,deviation", *sorted(set(lines))])
    ordinary = plan.present & ~plan.incident_days
    return {
        **optimum.claim,
        "rare_share_of_benign_days": round(float(np.mean(rare[ordinary])), 4),
    }
