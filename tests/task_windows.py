"""Windows made on the spot for the tests of the task floor: no logs, no store, all classes."""

from ueba_helpers.data.seeding import generator
from ueba_helpers.data.windows import PAST_FEATURES, WEEK_FEATURES, Evidence, Window

USUAL = ("usual_hours", "own_workstation", "no_removable_media", "usual_web")


def make_item(number, kind, start, end, pc, *, detail="", n=1, facts=(), truth=False,
              dont_care=False):
    """Return one evidence item with made-up event ids."""
    return Evidence(f"e{number}", kind, start, end, pc, detail, n, tuple(facts),
                    (f"{{X{number}}}",), truth, dont_care)


def make_window(risk="malicious", *, seed=0, user="ABC0001", items=10, spread=False):
    """Return a window of the given risk: routine in the day, and what stands out in the night.

    With `spread` what stands out can be any item: times and places are drawn, so that no position
    gives the truth away.
    """
    draw = generator(seed, f"window {risk}")
    planned = []

    def add(kind, hour, pc, **fields):
        planned.append(dict(fields, kind=kind, hour=hour, pc=pc))

    own = "PC-1234"
    add("logon", 7, own, facts=("own pc",))
    for k in range(items - 5):
        kind = ("http", "email", "http", "email")[k % 4]
        detail = {"http": ("other", "news", "social"), "email": ("internal", "external")}[kind]
        add(kind, 8 + k, own, detail=str(draw.choice(detail)), n=int(draw.integers(1, 30)),
            facts=("own pc",))
    add("logoff", 17, own, facts=("own pc",))
    features = USUAL
    if risk == "malicious":
        add("logon", 22, "PC-9876", facts=("new pc", "after hours"), truth=True)
        add("device", 22, "PC-9876", facts=("after hours",), truth=True)
        add("http", 23, "PC-9876", detail="leak", n=3, facts=("after hours",), truth=True)
        features = ("leak_site", "removable_media_new", "after_hours_logon", "new_workstation")
    elif risk == "suspicious":
        add("http", 18, own, detail="job", n=4, facts=("own pc",), truth=True)
        features = ("job_search", "usual_hours", "own_workstation", "no_removable_media")
    if spread:
        hours = sorted(draw.choice(24, size=len(planned), replace=False))
        places = draw.permutation(len(planned))
        planned = [planned[place] | {"hour": int(hour)}
                   for place, hour in zip(places, hours, strict=True)]
    found = tuple(_item(i, draw, **fields) for i, fields in enumerate(planned, 1))
    past = dict.fromkeys(PAST_FEATURES, 0.0) | {
        "past_days": 21.0, "past_first_hour": 7.9, "past_last_hour": 17.5, "past_pcs": 1.0,
        "past_email": float(draw.integers(2, 20)), "past_http": float(draw.integers(10, 90))}
    week = dict.fromkeys(WEEK_FEATURES, 0.0)
    day = f"2010-07-{1 + seed % 28:02d}"
    return Window(f"{user}_{day}", user, day, int(draw.integers(7)), "ITAdmin", "2 - Research",
                  past, week, found, risk, features)


def _item(number, draw, *, kind, hour, pc, **fields):
    start = f"{hour:02d}:{draw.integers(60):02d}"
    return make_item(number, kind, start, start, pc, **fields)


def make_windows(n=90, *, seed=0, spread=False):
    """Return class-balanced windows of as many accounts."""
    risks = ("normal", "suspicious", "malicious")
    return [make_window(risks[i % 3], seed=seed + i, user=f"ABC{i:04d}", spread=spread)
            for i in range(n)]
