"""Rewards: from completions and the truth of their windows to named terms.

In: completions (strings or chat messages) and the columns of `prompts.prompt_dataset`, in TRL's
signature `(completions, **columns) -> list[float]`. Out: one float per completion and term.
Refused: a cost matrix under which some constant verdict pays (`CostMatrix`).

The UEBA set. `ueba_format` is a gate: an invalid verdict earns -1 there and 0 from every other
term. `ueba_accuracy` pays by an asymmetric cost matrix, `ueba_evidence` for citing the items that
show it (no more than chance leaves over, so that citing everything or anything blindly pays
nothing) and naming the features that the oracle names, `ueba_basis` for a basis that gives times
and counts of true items. `ueba_reward` is exactly the weighted sum; its weights keep it in [-1, 1]
and an invalid verdict below every valid one. On balanced prompts no constant verdict earns more
than 0: for `ueba_accuracy` this follows from the matrix, for the sum tests search the verdicts
that name a fixed label, features, ids and basis.

The traditional set (accuracy, format, reasoning length) is what such rewards usually grow from:
lenient extraction, additive format, length as a stand-in for reasoning. `BROKEN_REWARDS` are
mistakes to learn from; never train on them for another reason.

Training prompts are class-balanced (`splits.balanced`) and the evaluation is at the natural base
rate. The cost matrix is therefore checked under balanced thirds and corrects for no imbalance: two
corrections at once would count the rare class twice.
"""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ueba_helpers.data.windows import KIND_WORTH
from ueba_helpers.errors import UserError
from ueba_helpers.task.prompts import ITEM_ID, USUAL_FEATURES
from ueba_helpers.task.verdicts import (
    FEATURES,
    MAX_FEATURES,
    MAX_THOUGHT_CHARS,
    MAX_VERDICT_CHARS,
    RISKS,
    Verdict,
    parse_verdict,
    split_thought,
)

INVALID_REWARD = -1.0
ENOUGH_EVIDENCE = 3  # citing this many true items counts as full recall
EVIDENCE_SHARE = 0.7  # of ueba_evidence; the rest is agreement of the features
USUAL_WEIGHT = 0.25  # of a feature that says "as always", against 1 for one that says "odd"
MIN_THOUGHT_WORDS = 3  # different words of a thought
MIN_WORD_SHARE = 0.25  # of them that are common English words or words of the task
COUNT_WEIGHT = 0.5  # of a count in a basis, against 1 for a time and 0 for a host alone
SILENT_BRIER = -0.25  # what a verdict without confidence earns: that of "I cannot say", 0.5

Completion = str | Sequence[Mapping[str, str]]
RewardFunction = Callable[..., list[float]]


@dataclass(frozen=True)
class CostMatrix:
    """What a said risk earns given the true one: `values[truth][said]` in the order of `RISKS`.

    Checked at construction: entries in [-1, 1], the truth earns most in its row, calling a
    malicious day normal costs strictly most of all, and every constant verdict has an expected
    value of at most 0 under `prior` (the class shares of the training prompts; thirds when they
    are balanced). Raises `UserError` otherwise.

    >>> CostMatrix()("malicious", "normal")
    -1.0
    >>> [round(value, 3) for value in CostMatrix().constant_values()]
    [-0.2, -0.133, -0.133]
    """

    values: tuple[tuple[float, float, float], ...] = (
        (1.0, -0.6, -0.8),
        (-0.6, 1.0, -0.6),
        (-1.0, -0.8, 1.0),
    )
    prior: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)

    def __post_init__(self):
        values = tuple(tuple(float(value) for value in row) for row in self.values)
        prior = tuple(float(share) for share in self.prior)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "prior", prior)
        if len(values) != 3 or any(len(row) != 3 for row in values):
            raise UserError("CostMatrix.values must have three rows of three numbers, one per "
                            f"risk in the order {', '.join(RISKS)}.")
        if not all(-1 <= value <= 1 for row in values for value in row):
            raise UserError("CostMatrix.values must lie between -1 and 1.")
        if len(prior) != 3 or not all(share >= 0 for share in prior) \
                or not math.isclose(sum(prior), 1, abs_tol=1e-6):
            raise UserError(f"CostMatrix.prior={prior} must hold three shares that sum to 1.")
        for i, row in enumerate(values):
            if any(row[i] <= value for j, value in enumerate(row) if j != i):
                raise UserError(f"CostMatrix.values: in the row of true {RISKS[i]} days the true "
                                "label must earn more than the others.")
        others = [value for i, row in enumerate(values) for j, value in enumerate(row)
                  if (i, j) != (2, 0)]
        if any(value <= values[2][0] for value in others):
            raise UserError("CostMatrix.values: calling a malicious day normal must cost most.")
        for said, value in zip(RISKS, self.constant_values(), strict=True):
            if value > 1e-9:
                raise UserError(f"CostMatrix: saying {said} on every day earns {value:.3f} on "
                                f"average under the prior {prior}; every constant verdict must "
                                "earn at most 0: lower the column's entries or balance the "
                                "training prompts.")

    def __call__(self, truth: str, said: str) -> float:
        """Return the value of saying `said` on a day that is `truth`."""
        return self.values[RISKS.index(truth)][RISKS.index(said)]

    def constant_values(self) -> tuple[float, float, float]:
        """Return the expected value of each constant verdict under the prior."""
        return tuple(sum(share * row[j] for share, row in zip(self.prior, self.values, strict=True))
                     for j in range(3))


COSTS = CostMatrix()


def completion_text(completion: Completion | None) -> str:
    """Return the text of a completion: a string, or the last of its chat messages.

    A message may be a plain string, and its content a list of parts, of which the text counts.
    Whatever holds no text (None, NaN, an empty list) is the empty string.

    >>> completion_text([{"role": "assistant", "content": "{}"}])
    '{}'
    >>> completion_text([{"content": [{"type": "text", "text": "{}"}]}])
    '{}'
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping) or not isinstance(completion, Iterable):
        return _message_text(completion)
    messages = list(completion)
    return _message_text(messages[-1]) if messages else ""


def _message_text(message: object) -> str:
    content = message.get("content") if isinstance(message, Mapping) else message
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        return ""
    parts = (part.get("text") if isinstance(part, Mapping) else part for part in content)
    return "".join(part for part in parts if isinstance(part, str))


@functools.lru_cache(maxsize=16_384)
def _parse_cached(text: str, ids: tuple[str, ...], think: bool) -> Verdict:
    return parse_verdict(text, ids, think=think)


def verdicts_of(completions: Sequence[Completion], evidence_ids: Sequence[Sequence[str]],
                style: Sequence[str] | None = None) -> list[Verdict]:
    """Return the parsed verdict of each completion; `style` "think" expects a `<think>` block."""
    found = []
    for i, completion in enumerate(completions):
        text = completion_text(completion)
        think = style is not None and style[i] == "think"
        if len(text) > MAX_VERDICT_CHARS + MAX_THOUGHT_CHARS:
            found.append(parse_verdict(text, (), think=think))  # too long to keep in the cache
        else:
            found.append(_parse_cached(text, tuple(evidence_ids[i]), think))
    return found


# --- one verdict against the truth of its window -------------------------------------------------

def evidence_hit_rate(cited: Sequence[str], truth: Sequence[str]) -> float:
    """Return the share of the true items that are cited, in [0, 1]; NaN if there are none.

    This measures and pays nothing: citing everything would earn 1.

    >>> evidence_hit_rate(["e1", "e9"], ["e1", "e3"])
    0.5
    """
    true = set(truth)
    return len(set(cited) & true) / len(true) if true else math.nan


def evidence_credit(said: str, cited: Sequence[str], truth: Sequence[str],
                    dont_care: Sequence[str] = ()) -> float:
    """Return the F1 of the cited items, in [0, 1]; don't-care items are not counted.

    Recall counts up to `ENOUGH_EVIDENCE` true items, since a verdict is short. Where nothing is
    to be cited (normal days) the empty set earns 1 if the day is called normal, and any citation
    or any alarm earns 0: an alarm must cite. A day called normal has nothing to cite: 0.

    >>> evidence_credit("malicious", ["e1", "e2"], ["e1"])
    0.6666666666666666
    >>> evidence_credit("normal", [], []), evidence_credit("suspicious", [], [])
    (1.0, 0.0)
    """
    counted = set(cited) - (set(dont_care) - set(truth))
    if not truth:
        return float(not counted and said == "normal")
    hits = len(counted & set(truth))
    if not hits or said == "normal":
        return 0.0
    precision = hits / len(counted)
    recall = min(1.0, hits / min(len(set(truth)), ENOUGH_EVIDENCE))
    return 2 * precision * recall / (precision + recall)


def evidence_beyond_chance(said: str, cited: Sequence[str], truth: Sequence[str],
                           shown: Sequence[str], dont_care: Sequence[str] = ()) -> float:
    """Return the F1 of the cited items, but no more than chance leaves over, in [-1, 1].

    The bound is an informedness (Youden 1950; Powers, arXiv:2010.16061): recall minus a cost per
    false item, set so that items drawn blindly from the `shown` ones gain as much as they cost.
    Citing all of them therefore earns at most 0, a blind guess nothing on average, and the F1
    alone would pay both. Every true item (up to `ENOUGH_EVIDENCE`) raises the score, every false
    one lowers it, and all true items without a false one earn 1. Where every item is true or
    nothing is to be cited there is nothing to tell apart, and the F1 stands. Who calls the day
    normal and cites all the same earns at most 0.

    >>> evidence_beyond_chance("malicious", ["e1"], ["e1"], ["e1", "e2", "e3"])
    1.0
    >>> evidence_beyond_chance("malicious", ["e1", "e2", "e3"], ["e1"], ["e1", "e2", "e3"])
    0.0
    """
    f1 = evidence_credit(said, cited, truth, dont_care)
    innocent = set(shown) - set(dont_care) - set(truth)
    if not truth or not innocent:
        return f1
    truth, cited = set(truth), set(cited)
    enough = min(len(truth), ENOUGH_EVIDENCE)
    recall = min(1.0, len(cited & truth) / enough)
    cost = len(truth) / enough / len(innocent)
    return min(f1, max(-1.0, recall - cost * len(cited & innocent)))


def feature_credit(said: Sequence[str], oracle: Sequence[str]) -> float:
    """Return the weighted F1 of the named features against the oracle's, in [0, 1].

    Features that say "as always" weigh a quarter, so that naming what is true of everybody cannot
    stand in for naming what is odd. Recall counts the oracle's four weightiest, as many as a
    verdict can hold.

    >>> feature_credit(["usual_hours", "usual_web"], ["usual_hours", "usual_web"])
    1.0
    """
    said, oracle = set(said), set(oracle)
    if not said or not oracle:
        return 0.0
    hits = sum(_weight(name) for name in said & oracle)
    weights = sorted((_weight(name) for name in oracle), reverse=True)[:MAX_FEATURES]
    recall = min(1.0, hits / sum(weights))
    precision = hits / sum(_weight(name) for name in said)
    return 0.0 if not hits else 2 * precision * recall / (precision + recall)


def _weight(feature: str) -> float:
    return USUAL_WEIGHT if feature in USUAL_FEATURES else 1.0


_CLAIM = re.compile(r"(?<![\w:])[0-9]{1,2}:[0-9]{2}(?![\w:])|\bpc-?[0-9]+\b"
                    r"|(?<![\w:.%-])x?[0-9]+(?![\w:%]|\.[0-9])", re.IGNORECASE)


_ID = re.compile(rf"\b({ITEM_ID})\b")
_KIND = re.compile(rf"\b(?:{'|'.join(KIND_WORTH)})\b")


@functools.lru_cache(maxsize=32_768)
def claims(text: str) -> frozenset[str]:
    """Return the times, hosts and counts that a text names, in one spelling.

    >>> sorted(claims("e3 22:14-22:40 file PC2 x12 doc"))
    ['12', '22:14', '22:40', 'pc2']
    """
    found = (match.lower() for match in _CLAIM.findall(text))
    return frozenset(claim.removeprefix("x").replace("pc-", "pc") for claim in found)


@functools.lru_cache(maxsize=32_768)
def attributed(basis: str) -> Mapping[str, tuple[frozenset[str], frozenset[str]]]:
    """Return the claims and the kinds of item that a basis states of each id it names.

    A statement belongs to the id it follows. What stands before the first id is stated of no item
    in particular and has the key "".

    >>> {name: sorted(of | kinds) for name, (of, kinds) in attributed("e3 22:14 file; e7").items()}
    {'e3': ['22:14', 'file'], 'e7': []}
    """
    before, *rest = _ID.split(basis)
    said = {"": before}
    for identity, text in zip(rest[::2], rest[1::2], strict=True):
        said[identity] = f"{said.get(identity, '')} {text}"
    found = {identity: (claims(text), frozenset(_KIND.findall(text.lower())))
             for identity, text in said.items()}
    return {identity: parts for identity, parts in found.items() if identity or any(parts)}


def baseless_numbers(text: str, cited: Sequence[str]) -> int:
    """Count what looks like a fact and is none: ids that are not cited, other runs of digits.

    >>> baseless_numbers("e3 22:14 pc2; e9 -4321 files 99%", ["e3"])
    3
    """
    foreign = sum(identity not in cited for identity in _ID.findall(text))
    rest = _CLAIM.sub(" ", _ID.sub(" ", text))
    return foreign + len(re.findall(r"[0-9]+(?:[.:,][0-9]+)*", rest))


def claim_support(verdict: Verdict, item_text: Mapping[str, str | None]) -> float:
    """Return the share of a basis's claims that stand in the items it cites, in [0, 1].

    Claims are times, hosts and counts; each has to stand in the line of the cited item it is stated
    of (`attributed`; before the first id in any cited line). Any other number, an id that is not
    cited and a kind of item that is not that item's count as claims that stand nowhere; a right
    kind counts as none, since there are few. Without claims 0. Whether an item is a true one plays
    no part.
    """
    if not verdict.evidence or not claims(verdict.basis):
        return 0.0
    lines = {identity: item_text.get(identity) or "" for identity in verdict.evidence}
    backed = total = 0
    for identity, (named, kinds) in attributed(verdict.basis).items():
        about = [lines[one] for one in ([identity] if identity else lines) if one in lines]
        backed += sum(any(claim in claims(line) for line in about) for claim in named)
        total += len(named) + len(kinds.difference(*(line.split()[2:3] for line in about)))
    return backed / (total + baseless_numbers(verdict.basis, verdict.evidence))


def basis_support(verdict: Verdict, item_text: Mapping[str, str | None], truth: Sequence[str],
                  dont_care: Sequence[str] = ()) -> float:
    """Return how well the basis states true items that the verdict cites, in [0, 1].

    `claim_support`, times the mean over the counted citations of what the basis states of each: 1
    for a true item with its time, `COUNT_WEIGHT` for one with only its count (a small number is
    soon guessed), 0 for one with its host alone (most items share it) and for a false item. So a
    basis that gives two items each other's times or kinds loses. Don't-care items are not counted.
    A basis is worth no more than the citations it rests on (`evidence_beyond_chance`): reciting the
    whole window earns 0. Without claims it earns 1 if the verdict cites nothing, calls the day
    normal and nothing was to be cited; else 0, and so does any citation where nothing was to be
    cited.

    Words that are no claim are not read: an invented story around true times is not told apart.
    """
    if not verdict.evidence:
        silent = not claims(verdict.basis) and not baseless_numbers(verdict.basis, ())
        return float(silent and not truth and verdict.risk == "normal")
    counted = set(verdict.evidence) - (set(dont_care) - set(truth))
    if not claims(verdict.basis) or not truth or not counted:
        return 0.0
    shown = [identity for identity, line in item_text.items() if line is not None]
    worth = evidence_beyond_chance(verdict.risk, verdict.evidence, truth, shown, dont_care)
    if worth <= 0:
        return 0.0
    said = attributed(verdict.basis)
    of_any = said[""][0] if "" in said else frozenset()
    facts = sum(max(map(_fact_weight, claims(item_text.get(one) or "").intersection(
                    of_any | (said[one][0] if one in said else frozenset()))), default=0.0)
                for one in counted.intersection(truth))
    return min(worth, claim_support(verdict, item_text) * facts / len(counted))


def _fact_weight(claim: str) -> float:
    if ":" in claim:
        return 1.0
    return 0.0 if claim.startswith("pc") else COUNT_WEIGHT


# --- the UEBA terms ------------------------------------------------------------------------------

def ueba_format(completions: Sequence[Completion], *, evidence_ids: Sequence[Sequence[str]],
                style: Sequence[str] | None = None, **columns: object) -> list[float]:
    """Return 0 for a valid verdict and -1 for an invalid one: a gate, nothing to be farmed."""
    return [0.0 if verdict.valid else INVALID_REWARD
            for verdict in verdicts_of(completions, evidence_ids, style)]


def accuracy_with(costs: CostMatrix) -> RewardFunction:
    """Return `ueba_accuracy` under a cost matrix."""
    def ueba_accuracy(completions: Sequence[Completion], *, label: Sequence[str],
                      evidence_ids: Sequence[Sequence[str]], style: Sequence[str] | None = None,
                      **columns: object) -> list[float]:
        """Return the cost matrix's value of the said risk, in [-1, 1]; 0 for an invalid verdict.

        The label alone counts. Paying a right alarm in proportion to its citations was tried: it
        costs the risk level whose evidence is hardest to find (`benchmarks/README.md`).
        """
        return [costs(truth, verdict.risk) if verdict.valid else 0.0 for verdict, truth in
                zip(verdicts_of(completions, evidence_ids, style), label, strict=True)]
    return ueba_accuracy


ueba_accuracy = accuracy_with(COSTS)


def ueba_evidence(completions: Sequence[Completion], *, evidence_ids: Sequence[Sequence[str]],
                  evidence_truth: Sequence[Sequence[str]], feature_truth: Sequence[Sequence[str]],
                  dont_care: Sequence[Sequence[str]] | None = None,
                  style: Sequence[str] | None = None, **columns: object) -> list[float]:
    """Return .7 x the score of the citations + .3 x agreement of the features, in [-.7, 1]."""
    rewards = []
    for i, verdict in enumerate(verdicts_of(completions, evidence_ids, style)):
        if not verdict.valid:
            rewards.append(0.0)
            continue
        cited = evidence_beyond_chance(
            verdict.risk, verdict.evidence, evidence_truth[i], evidence_ids[i],
            dont_care[i] if dont_care is not None else ())
        named = feature_credit(verdict.features, feature_truth[i])
        rewards.append(EVIDENCE_SHARE * cited + (1 - EVIDENCE_SHARE) * named)
    return rewards


def ueba_basis(completions: Sequence[Completion], *, evidence_ids: Sequence[Sequence[str]],
               evidence_truth: Sequence[Sequence[str]],
               item_text: Sequence[Mapping[str, str | None] | str],
               dont_care: Sequence[Sequence[str]] | None = None,
               style: Sequence[str] | None = None, **columns: object) -> list[float]:
    """Return how well the basis states the true items cited, in [0, 1] (`basis_support`).

    `item_text` maps ids to lines; JSON text of such a mapping is read too.
    """
    spared = dont_care if dont_care is not None else [()] * len(completions)
    return [basis_support(verdict, json.loads(lines) if isinstance(lines, str) else lines, truth,
                          spare) if verdict.valid else 0.0
            for verdict, lines, truth, spare in
            zip(verdicts_of(completions, evidence_ids, style), item_text, evidence_truth, spared,
                strict=True)]


def ueba_brier(completions: Sequence[Completion], *, label: Sequence[str],
               evidence_ids: Sequence[Sequence[str]], style: Sequence[str] | None = None,
               **columns: object) -> list[float]:
    """Return minus the Brier score of `confidence` in the said risk, in [-1, 0].

    A proper scoring rule (Brier 1950; as a reward RLCR, arXiv:2507.16806). Saying no confidence
    earns what saying .5 earns, so that silence does not pay.
    """
    rewards = []
    for verdict, truth in zip(verdicts_of(completions, evidence_ids, style), label, strict=True):
        if not verdict.valid:
            rewards.append(0.0)
        elif verdict.confidence is None:
            rewards.append(SILENT_BRIER)
        else:
            rewards.append(-(verdict.confidence - (verdict.risk == truth)) ** 2)
    return rewards


def overlength_penalty(limit: int, margin: int) -> RewardFunction:
    """Return a term that falls from 0 at `limit - margin` tokens to -1 at `limit` and beyond.

    The soft overlong punishment of DAPO (arXiv:2503.14476, eq. 13).
    """
    if not 0 < margin <= limit:
        raise UserError(f"margin={margin} is not possible: legal values are 1 to limit ({limit}).")

    def overlength(completions: Sequence[Completion], *, completion_ids: Sequence[Sequence[int]],
                   **columns: object) -> list[float]:
        return [-min(1.0, max(0.0, (len(ids) - limit + margin) / margin))
                for ids in completion_ids]
    return overlength


_LETTERS = re.compile(r"[^\W\d_]")
_PLAIN_WORD = re.compile(r"[A-Za-z]{2,}")
_COMMON_WORDS = """
    the and of on in at is was were to no not for with this that as by it its from all are be has
    have had but so than then there which who here only while an also or any one day days
    account night logon logoff device file files email http page pages host drive past week routine
    evidence
"""
_TASK_WORDS = (frozenset(_COMMON_WORDS.split()) | frozenset(RISKS)
               | frozenset(word for name in FEATURES for word in name.split("_")))


def think_language(completions: Sequence[Completion], *, evidence_ids: Sequence[Sequence[str]],
                   style: Sequence[str], **columns: object) -> list[float]:
    """Return a penalty for a thought that is not in the prompt's language, in [-1, 0].

    One less than the share of its letters that are plain Latin ones, times how many different words
    it has (full from `MIN_THOUGHT_WORDS` on), times how many of these are common English words or
    words of the task (full from `MIN_WORD_SHARE` on): neither one letter nor a cipher escapes it,
    and no thought earns anything. 0 for an invalid verdict. Language consistency as in DeepSeek-R1
    (arXiv:2501.12948), where a mixture of scripts is the known drift.
    """
    rewards = []
    for i, verdict in enumerate(verdicts_of(completions, evidence_ids, style)):
        if not verdict.valid:
            rewards.append(0.0)
            continue
        thought = split_thought(completion_text(completions[i]))[0] or ""
        letters = _LETTERS.findall(thought)
        words = {word.lower() for word in _PLAIN_WORD.findall(thought)}
        if not words:
            rewards.append(-1.0)
            continue
        latin = sum(map(str.isascii, letters)) / len(letters)
        known = len(words & _TASK_WORDS) / len(words)
        rewards.append(latin * min(1.0, len(words) / MIN_THOUGHT_WORDS)
                       * min(1.0, known / MIN_WORD_SHARE) - 1.0)
    return rewards


def think_length(completions: Sequence[Completion], *, evidence_ids: Sequence[Sequence[str]],
                 style: Sequence[str], **columns: object) -> list[float]:
    """Return a penalty for thoughts above 60 words, -1 from 120 words on, in [-1, 0]."""
    rewards = []
    for i, verdict in enumerate(verdicts_of(completions, evidence_ids, style)):
        thought, _ = split_thought(completion_text(completions[i]))
        words = len((thought or "").split())
        rewards.append(-min(1.0, max(0.0, (words - 60) / 60)) if verdict.valid else 0.0)
    return rewards


# --- the traditional set -------------------------------------------------------------------------

_SAID = re.compile(r'"?risk"?\s*[:=]\s*"?(normal|suspicious|malicious)', re.IGNORECASE)
_LABEL = re.compile(r"\b(normal|suspicious|malicious)\b", re.IGNORECASE)


def lenient_risk(text: str) -> str | None:
    """Return the risk as lenient extraction finds it: a risk field, else the last label named.

    >>> lenient_risk("It may look normal, yet it is Malicious!")
    'malicious'
    """
    found = _SAID.findall(text) or _LABEL.findall(text)
    return found[-1].lower() if found else None


def accuracy_reward(completions: Sequence[Completion], *, label: Sequence[str],
                    **columns: object) -> list[float]:
    """Return 1 if the leniently extracted label is right, else 0 (traditional)."""
    return [float(lenient_risk(completion_text(completion)) == truth)
            for completion, truth in zip(completions, label, strict=True)]


def format_reward(completions: Sequence[Completion], **columns: object) -> list[float]:
    """Return 1 if something between braces names a risk, else 0 (traditional, lenient)."""
    return [float(bool(re.search(r'\{[^{}]*"risk"[^{}]*\}', completion_text(completion)[:20_000])))
            for completion in completions]


def reasoning_reward(completions: Sequence[Completion], **columns: object) -> list[float]:
    """Return the number of words over 40, at most 1: length in place of reasoning (traditional)."""
    return [min(1.0, len(_PLAIN_WORD.findall(completion_text(completion)[:20_000])) / 40)
            for completion in completions]


# --- deliberately broken rewards, for teaching ---------------------------------------------------

_PARTIAL = (1.0, 0.75, 0.0)  # by distance on the risk scale


def broken_partial_credit(completions: Sequence[Completion], *, label: Sequence[str],
                          evidence_ids: Sequence[Sequence[str]],
                          style: Sequence[str] | None = None, **columns: object) -> list[float]:
    """Return 1 for the right level, .75 for one level off, 0 for two: partial credit, broken.

    Always saying the middle label earns 5/6 under balanced thirds, more than an analyst who knows
    the answer on four days of ten and guesses on the others (.8): doubt is best sat out.
    """
    return [_PARTIAL[abs(RISKS.index(verdict.risk) - RISKS.index(truth))] if verdict.valid else 0.0
            for verdict, truth in
            zip(verdicts_of(completions, evidence_ids, style), label, strict=True)]


def broken_any_mention(completions: Sequence[Completion], *, label: Sequence[str],
                       **columns: object) -> list[float]:
    """Return 1 if the right label occurs anywhere: naming all three labels always wins."""
    return [float(truth in completion_text(completion).lower())
            for completion, truth in zip(completions, label, strict=True)]


def broken_evidence_recall(completions: Sequence[Completion], *,
                           evidence_ids: Sequence[Sequence[str]],
                           evidence_truth: Sequence[Sequence[str]],
                           style: Sequence[str] | None = None, **columns: object) -> list[float]:
    """Return the share of true items cited, with no cost of false ones: cite everything wins."""
    return [len(set(verdict.evidence) & set(truth)) / len(truth) if truth else 1.0
            for verdict, truth in
            zip(verdicts_of(completions, evidence_ids, style), evidence_truth, strict=True)]


# --- sets ----------------------------------------------------------------------------------------

UEBA_TERMS: tuple[tuple[RewardFunction, float], ...] = (
    (ueba_format, 1.0), (ueba_accuracy, 0.7), (ueba_evidence, 0.2), (ueba_basis, 0.1))
TRADITIONAL_TERMS: tuple[tuple[RewardFunction, float], ...] = (
    (accuracy_reward, 1.0), (format_reward, 0.5), (reasoning_reward, 0.5))
BROKEN_REWARDS: dict[str, RewardFunction] = {
    "broken_partial_credit": broken_partial_credit,
    "broken_any_mention": broken_any_mention,
    "broken_evidence_recall": broken_evidence_recall,
}
REWARD_SETS: dict[str, tuple[tuple[RewardFunction, float], ...]] = {
    "ueba": UEBA_TERMS,
    "traditional": TRADITIONAL_TERMS,
    "ueba_calibrated": (*UEBA_TERMS, (ueba_brier, 0.1)),
    "ueba_think": (*UEBA_TERMS, (think_language, 0.05), (think_length, 0.1)),
}

# What the prompts have to ask for where a set scores it, by columns of `prompts.prompt_dataset`.
ASKED: dict[str, tuple[str, object]] = {"ueba_calibrated": ("confidence", True),
                                        "ueba_think": ("style", "think")}

# What a policy may be trained on: the sets, and for exhibits each broken reward by itself.
TRAINABLE: dict[str, tuple[tuple[RewardFunction, float], ...]] = {
    **REWARD_SETS, "reasoning_length": ((reasoning_reward, 1.0),),
    **{name: ((reward, 1.0),) for name, reward in BROKEN_REWARDS.items()}}


def reward_terms(completions: Sequence[Completion], *, reward_set: str = "ueba",
                 **columns: object) -> dict[str, list[float]]:
    """Return each term of a set, unweighted, by the function's name."""
    return {term.__name__: term(completions, **columns) for term, _ in REWARD_SETS[reward_set]}


def composed(terms: Mapping[str, Sequence[float]], *, reward_set: str = "ueba") -> list[float]:
    """Return the weighted sum of terms as `reward_terms` gives them."""
    weights = {term.__name__: weight for term, weight in REWARD_SETS[reward_set]}
    return [math.fsum(weights[name] * value for name, value in zip(terms, row, strict=True))
            for row in zip(*terms.values(), strict=True)]


def ueba_reward(completions: Sequence[Completion], **columns: object) -> list[float]:
    """Return the composed UEBA reward, exactly the weighted sum of its terms, in [-1, 1]."""
    return composed(reward_terms(completions, **columns))


def traditional_reward(completions: Sequence[Completion], **columns: object) -> list[float]:
    """Return the composed traditional reward, in [0, 2]."""
    return composed(reward_terms(completions, reward_set="traditional", **columns),
                    reward_set="traditional")


# --- detectors of hacks --------------------------------------------------------------------------

def label_entropy(risks: Sequence[str]) -> float:
    """Return the entropy of the said risks in nats: near 0 when a policy says one thing only.

    >>> label_entropy(["normal", "normal"])
    0.0
    """
    counts = Counter(risks)
    total = sum(counts.values())
    return sum(-n / total * math.log(n / total) for n in counts.values()) + 0.0


def citations_per_answer(verdicts: Sequence[Verdict]) -> float:
    """Return the mean number of cited items over the valid verdicts (NaN if there are none)."""
    counts = [len(verdict.evidence) for verdict in verdicts if verdict.valid]
    return sum(counts) / len(counts) if counts else math.nan


def labels_per_answer(completions: Sequence[Completion]) -> float:
    """Return the mean number of different risk labels that a completion names; 1 is right."""
    named = [len({label.lower() for label in _LABEL.findall(completion_text(completion))})
             for completion in completions]
    return sum(named) / len(named) if named else math.nan


def copy_rate(completion: str, prompt: str, *, words: int = 6) -> float:
    """Return the share of a completion's runs of `words` words that stand in the prompt, in [0, 1].

    >>> copy_rate("a b c d", "x a b c d y", words=3)
    1.0
    """
    said, shown = completion.split(), prompt.split()
    runs = {tuple(said[i:i + words]) for i in range(len(said) - words + 1)}
    there = {tuple(shown[i:i + words]) for i in range(len(shown) - words + 1)}
    return len(runs & there) / len(runs) if runs else 0.0
