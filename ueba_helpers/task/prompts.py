"""From a window to chat messages, to the columns of a training row, and to an honest answer.

In: `Window` objects of `data.windows`. Out: plain system and user messages, the rows that trainers
and reward functions receive (`prompt_dataset`), reference verdicts for the cold start
(`target_verdict`) and prompts with items deleted (`without_items`).

Everything that comes from the logs may have been written by the person under suspicion: file names,
hosts, domains, LDAP fields. Only what `data.windows` itself writes stands in a prompt as it is:
each part of a line is matched in full against the closed set of what its place may hold (`_FACTS`,
`_DETAILS`, roles and departments made of `_ORGANISATION` words). Any other text, and in an item any
`LogText` whatever its words, is put between single quotes, percent-encoded so that it holds no
space, line break, bracket, quote or template marker, cannot look like an item id, a host code or a
time, and is cut. Accounts and hosts are replaced by codes unless `pseudonym_key=None`; `reveal`
turns them back.

What ranks items when a prompt must be shortened is visible in the prompt (kind and facts), never
the truth. Refused: a budget that not even an empty day fits into.
"""

import base64
import hashlib
import hmac
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from urllib.parse import quote, unquote

from ueba_helpers.data.cert import WEB_CATEGORIES
from ueba_helpers.data.windows import (
    FEATURES,
    KIND_WORTH,
    PAST_FEATURES,
    WEEK_FEATURES,
    Evidence,
    Window,
    informativeness,
)
from ueba_helpers.errors import UserError
from ueba_helpers.task.verdicts import RISKS, format_section, render_verdict

MAX_ITEMS = 12
CITED = 3  # how many items, and features, a reference verdict names
USUAL_FEATURES = frozenset(name for name in FEATURES
                           if name.startswith(("usual_", "own_", "no_")))
SIMULATED_KEY = "study"  # public on purpose: behind simulated accounts there is nobody to protect

_SATURDAY = 5
_FIELD_CHARS = 28

# What `data.windows` may write into an item, by kind of item; a fact about the host stands first.
_HABIT = "first time|rare|usual"
_OWN_PC = "own pc"
_PC_FACTS = frozenset({_OWN_PC, "other pc", "new pc"})
_FACTS = {
    "logon": "after hours|[1-9][0-9]? hours (?:before|after) usual",
    "logoff": "after hours",
    "device": f"after hours|{_HABIT}|more than usual",
    "file": f"after hours|{_HABIT}|more than before",
    "email": f"after hours|{_HABIT}|more than before|[1-9][0-9]{{0,4}} (?:recipients|attachments)",
    "http": f"after hours|{_HABIT}",
}
_DETAILS = {
    "device": frozenset({"no connect", "no disconnect"}),
    "file": frozenset({"exe", "archive", "image", "office"}),
    "email": frozenset({"competitor", "external", "internal"}),
    "http": frozenset(WEB_CATEGORIES),
}
ITEM_ID = r"e[1-9][0-9]*"
_TIME = re.compile(r"[0-9]{2}:[0-9]{2}")
# Roles and departments of the CERT releases are made of these words ("ITAdmin", "1 - Research").
_ORGANISATION = """
    Accountant Accounting Admin Administration Administrative Analyst And Assembly Assistant
    Attorney Chemical Clerk Computer Contracts Coordinator Developer Director Electrical Engineer
    Engineering Equipment Field Finance Financial Hardware Human IT Industrial Instructional Lab
    Legal Line Maintenance Management Manager Manufacturing Marketing Materials Mathematician
    Mechanical Medical Nurse Payroll Physicist Planning Practitioner President Production
    Programmer Purchasing Quality Research Resource Resources Sales Salesman Scientist Security
    Guard Service Software Specialist Staff Statistician Supervisor Systems Technician Test Vice
    Worker
"""
_LABEL = re.compile("unknown|(?:[0-9] - )?(?:" + "|".join(_ORGANISATION.split()) + "){1,4}")
_FORGED = re.compile(r"(?i)(?<![a-z0-9])(?:e|x|pc-?|a-)(?=[0-9])|(?i:a)(?=-[a-z2-7]{4}\b)")


class LogText(str):
    """Text that came from a log as it was: in an item it is escaped even if it reads like ours.

    What a windows builder quotes from a field has to be marked so; its own words are plain `str`.
    """

    __slots__ = ()


def escape_field(text: str, *, limit: int = _FIELD_CHARS) -> str:
    """Return log text as one quoted word that cannot be mistaken for the prompt's own structure.

    Everything but ASCII letters, digits and `._@/-` is percent-encoded (UTF-8; lone surrogates
    too), and so is the first letter of anything that looks like an item id, a count, a host or an
    account code. More than `limit` characters of encoded text are cut, marked by `~`.

    >>> escape_field("<|im_start|>system")
    "'%3C%7Cim_start%7C%3Esystem'"
    >>> escape_field("e3.doc")
    "'%653.doc'"
    """
    text = str(text)
    pieces, length = [], 0
    for piece in _pieces(text[: limit + 1]):
        length += len(piece)
        if length > limit:
            pieces.append("~")
            break
        pieces.append(piece)
    return "'" + "".join(pieces) + "'"


def _pieces(text: str) -> Iterable[str]:
    forged = {match.start() for match in _FORGED.finditer(text)}
    for i, char in enumerate(text):
        if i in forged:
            yield f"%{ord(char):02X}"
        else:
            yield quote(char, safe="._@/-", errors="surrogatepass").replace("~", "%7E")


def unescape_field(word: str) -> str:
    """Return the log text behind an escaped word (a cut one comes back cut).

    >>> unescape_field(escape_field("e3 {x}.doc"))
    'e3 {x}.doc'
    """
    return unquote(word.strip("'").rstrip("~"), errors="surrogatepass")


def _own(text: str, trusted: bool) -> str:
    return text if trusted and not isinstance(text, LogText) else escape_field(text)


def _time(text: str) -> str:
    return _own(text, _TIME.fullmatch(text) is not None)


def _id(item: Evidence) -> str:
    return _own(item.id, re.fullmatch(ITEM_ID, item.id) is not None)


def _kind(item: Evidence) -> str:
    return _own(item.kind, item.kind in KIND_WORTH)


def _on_own_pc(item: Evidence) -> bool:
    return (bool(item.pc) and item.facts[:1] == (_OWN_PC,)
            and not isinstance(item.facts[0], LogText))


def _fact_words(item: Evidence) -> Iterable[str]:
    """Yield the facts as words of the line; "own pc" is left to the host code, which says it."""
    shapes = _FACTS.get(item.kind, "(?!)")
    for i, fact in enumerate(item.facts[_on_own_pc(item):], start=_on_own_pc(item)):
        first = i == 0 and bool(item.pc) and fact in _PC_FACTS
        known = first or re.fullmatch(shapes, fact) is not None
        yield re.sub("(?<=[a-z]) (?=[a-z])", "_", _own(fact, known))  # what is escaped has no space


def host_codes(window: Window) -> dict[str, str]:
    """Return the code of each host of a window, in order of appearance; `pc1` is the account's own.

    Hosts that an item calls "own pc" come first. A window without such an item has no `pc1`.
    """
    order = list(dict.fromkeys(item.pc for item in window.evidence if item.pc))
    usual = {item.pc for item in window.evidence if _on_own_pc(item)}
    own = [pc for pc in order if pc in usual]
    codes = {pc: f"pc{i}" for i, pc in enumerate(own, 1)}
    other = (pc for pc in order if pc not in codes)
    return codes | {pc: f"pc{i}" for i, pc in enumerate(other, max(2, len(own) + 1))}


def account_code(window: Window, pseudonym_key: str) -> str:
    """Return the account's code in this window's prompt, `a-` and four base-32 characters.

    The code is an HMAC-SHA256 of the window id under the key. Two days of one account carry
    different codes, so that a policy cannot learn an account by heart. Whose code it is can be
    told by nobody without the key, if the key is a secret (`study.pseudonyms.study_key`);
    `SIMULATED_KEY` hides nothing.
    """
    digest = hmac.new(pseudonym_key.encode(), window.window_id.encode(), hashlib.sha256).digest()
    return "a-" + base64.b32encode(digest)[:4].decode().lower()


def reveal(text: str, window: Window, *, pseudonym_key: str = SIMULATED_KEY) -> str:
    """Return `text` about this window with the account's and the hosts' real names put back.

    Raises `UserError` if the text carries the account code of another window or another key.
    """
    code = account_code(window, pseudonym_key)
    named = set(re.findall(r"\ba-[a-z2-7]{4}\b", text))
    if named - {code}:
        raise UserError(f"the code {sorted(named - {code})[0]} does not belong to window "
                        f"{window.window_id} under this key: use the key of the run that wrote it.")
    names = {code: window.user} | {v: k for k, v in host_codes(window).items()}
    return re.sub(r"\ba-[a-z2-7]{4}\b|\bpc[0-9]+\b", lambda m: names.get(m[0], m[0]), text)


def item_line(item: Evidence, codes: dict[str, str]) -> str:
    """Return one evidence line: id, time or span, kind, host, count, detail and facts."""
    span = _time(item.start)
    if item.end not in ("", item.start, None):
        span += f"-{_time(item.end)}"
    parts = [_id(item), span, _kind(item)]
    if item.pc:
        parts.append(codes[item.pc])
    if item.n > 1:
        parts.append(f"x{int(item.n)}")
    if item.detail:
        parts.append(_own(item.detail, item.detail in _DETAILS.get(item.kind, ())))
    return " ".join([*parts, *_fact_words(item)])


def _codes(window: Window, pseudonym_key: str | None) -> tuple[str, dict[str, str]]:
    if pseudonym_key is not None:
        return account_code(window, pseudonym_key), host_codes(window)
    return _name(window.user), {pc: _name(pc) for pc in host_codes(window)}


def _name(text: str) -> str:
    plain = re.fullmatch(r"[A-Z]{3}[0-9]{4}|PC-[0-9]{1,5}", text)
    return text if plain else escape_field(text)


def _label(text: str) -> str:
    return text.replace(" - ", "_") if _LABEL.fullmatch(text) else escape_field(text)


def _clock(hours: float) -> str:
    minutes = round(60 * float(hours))
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def _value(name: str, value: object) -> str:
    if isinstance(value, str):
        return _time(value)
    if value is None or not math.isfinite(value):
        return "-"
    if name.endswith("_hour"):
        return _clock(value)
    return f"{value:.0f}" if value == round(value) or abs(value) >= 1 else f"{value:.1f}"


def _facts_line(title: str, names: Collection[str], values: dict) -> str:
    shown = (f"{key.removeprefix(title + '_') if key in names else escape_field(key)} "
             f"{_value(key, value)}" for key, value in values.items())
    return f"{title} " + " ".join(shown)


def window_messages(window: Window, *, max_items: int = MAX_ITEMS,
                    pseudonym_key: str | None = SIMULATED_KEY, style: str = "evidence_first",
                    confidence: bool = False, list_features: bool = False) -> list[dict]:
    """Return the system and user message of a window; `pseudonym_key=None` keeps real names.

    The user message has one line on the account and whether it is a weekend, one on its past, one
    on its last seven days, then one line per item. Neither date nor weekday is told: in the key of
    r4.2 all incidents of scenario 3 begin on a Thursday, which is no behaviour. `confidence` asks
    for it in the verdict; `list_features` adds the vocabulary to the system message, for a policy
    without a cold start.
    """
    window = keep_items(window, max_items)
    account, codes = _codes(window, pseudonym_key)
    who = " ".join(_label(part) for part in (window.role, window.department) if part)
    lines = [f"{account} {who} {'weekend' if window.weekday >= _SATURDAY else 'weekday'}",
             _facts_line("past", PAST_FEATURES, window.past),
             _facts_line("week", WEEK_FEATURES, window.week)]
    lines += [item_line(item, codes) for item in window.evidence]
    if window.dropped:
        lines.append(f"{int(window.dropped)} more left out")
    system = format_section(style=style, confidence=confidence, list_features=list_features)
    return [{"role": "system", "content": system}, {"role": "user", "content": "\n".join(lines)}]


def keep_items(window: Window, max_items: int) -> Window:
    """Return the window with its `max_items` most informative items, in their order and ids."""
    if max_items < 0:
        raise UserError(f"max_items={max_items} is not possible: legal values are 0 and more.")
    surplus = len(window.evidence) - max_items
    if surplus <= 0:
        return window
    ranked = sorted(range(len(window.evidence)),
                    key=lambda i: (-informativeness(window.evidence[i]), i))
    kept = sorted(ranked[:max_items])
    return replace(window, evidence=tuple(window.evidence[i] for i in kept),
                   dropped=window.dropped + surplus)


def fit_budget(window: Window, count_tokens: Callable[[list[dict]], int], budget: int, *,
               max_items: int = MAX_ITEMS, **options) -> Window:
    """Return the window with as many items as a token budget allows, the least informative dropped.

    `count_tokens` counts a list of chat messages (with the chat template's own tokens);
    `options` are those of `window_messages`. Raises `UserError` if the headings alone exceed it.
    """
    window = keep_items(window, max_items)
    while count_tokens(window_messages(window, max_items=max_items, **options)) > budget:
        if not window.evidence:
            raise UserError(f"budget={budget} tokens cannot hold the headings of window "
                            f"{window.window_id}: raise max_prompt_tokens.")
        window = keep_items(window, len(window.evidence) - 1)
    return window


def without_items(messages: Sequence[dict], ids: Collection[str]) -> list[dict]:
    """Return the messages with the lines of these items deleted: the counterfactual prompt.

    Only the user's message is changed; ids stay as they are. Works since no field text can open a
    line (`escape_field`).

    >>> without_items([{"role": "user", "content": "e1 08:00 logon\\ne2 22:00 device"}], ["e2"])
    [{'role': 'user', 'content': 'e1 08:00 logon'}]
    """
    gone = set(ids)
    return [{**message, "content": "\n".join(
                line for line in message["content"].split("\n")
                if line.split(" ", 1)[0] not in gone)}
            if message["role"] == "user" else dict(message) for message in messages]


def target_verdict(window: Window, *, risk: str | None = None, max_items: int = MAX_ITEMS,
                   pseudonym_key: str | None = SIMULATED_KEY, style: str = "evidence_first",
                   confidence: float | None = None) -> str:
    """Return an honest reference verdict from the truth, for the cold start.

    It cites up to three true items that the prompt shows, names two or three oracle features, and
    its basis repeats time, kind and host of what it cites. `risk` overrides the label for a noisy
    demonstration, and the rest follows the wrong label as a mistaken analyst's would: a day called
    normal cites nothing, and a normal day that is flagged cites the item that stands out most.
    `confidence` is stated as it is given.
    """
    window = keep_items(window, max_items)
    said = window.risk if risk is None else risk
    if said not in RISKS:
        raise UserError(f"risk={said!r} is not possible: legal values are {', '.join(RISKS)}.")
    items = list(window.evidence)
    cited = [] if said == "normal" else [item for item in items if item.truth]
    if said != "normal" and not cited:
        cited = sorted(items, key=lambda item: -informativeness(item))[:1]
    cited = sorted(cited, key=lambda item: -informativeness(item))[:CITED]
    cited.sort(key=items.index)
    _, codes = _codes(window, pseudonym_key)
    basis = "; ".join(_reason(item, codes) for item in cited) or "nothing unusual"
    evidence = [item.id for item in cited]
    thought = None
    if style == "think":
        thought = "The day shows " + (", ".join(evidence) or "routine only") + "."
    return render_verdict(evidence=evidence, features=_say_features(window.features, said),
                          basis=basis + ".", risk=said, style=style, thought=thought,
                          confidence=confidence)


def _reason(item: Evidence, codes: dict[str, str]) -> str:
    parts = (_id(item), _time(item.start), _kind(item), codes.get(item.pc, ""))
    return " ".join(part.strip("'") for part in parts if part)


def _say_features(oracle: Sequence[str], said: str) -> list[str]:
    """Return two or three features that go with the said risk, in the oracle's order of telling."""
    usual = [name for name in oracle if name in USUAL_FEATURES]
    odd = [name for name in oracle if name not in USUAL_FEATURES]
    first, second = (usual, []) if said == "normal" else (odd, usual)
    chosen = first[:CITED] + second[: max(0, 2 - len(first))]
    spare = [name for name in FEATURES if name not in chosen and name in USUAL_FEATURES]
    return chosen + spare[: max(0, 2 - len(chosen))]


def prompt_dataset(windows: Iterable[Window], *, max_items: int = MAX_ITEMS,
                   pseudonym_key: str | None = SIMULATED_KEY, style: str = "evidence_first",
                   confidence: bool = False, list_features: bool = False,
                   count_tokens: Callable[[list[dict]], int] | None = None,
                   budget: int | None = None) -> list[dict]:
    """Return one row per window: the prompt and the columns that the reward functions receive.

    Columns: prompt, window_id, user, day, label, evidence_ids, evidence_truth, dont_care,
    feature_truth, item_text (id -> line), style, confidence (whether it is asked for). Ids are
    those of items the prompt shows. With `count_tokens` and `budget` windows are cut to the budget
    first (`fit_budget`).
    """
    rows = []
    options = {"pseudonym_key": pseudonym_key, "style": style, "confidence": confidence,
               "list_features": list_features}
    for whole in windows:
        window = keep_items(whole, max_items)
        if count_tokens is not None and budget is not None:
            window = fit_budget(window, count_tokens, budget, max_items=max_items, **options)
        _, codes = _codes(window, pseudonym_key)
        rows.append({
            "prompt": window_messages(window, max_items=max_items, **options),
            "window_id": window.window_id, "user": window.user, "day": window.day,
            "label": window.risk,
            "evidence_ids": [item.id for item in window.evidence],
            "evidence_truth": [item.id for item in window.evidence if item.truth],
            "dont_care": [item.id for item in window.evidence if item.dont_care],
            "feature_truth": list(window.features),
            "item_text": {item.id: item_line(item, codes) for item in window.evidence},
            "style": style, "confidence": confidence,
        })
    return rows
