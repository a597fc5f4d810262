"""The zoo: completions and policies that cheat a reward, beside an honest mediocre analyst.

In: rows of `prompts.prompt_dataset`. Out: for every animal what it earns under each reward set
(`zoo_table`), and for the completions of a policy what cheats with the very same labels would earn
(`same_label_cheats`). An animal sees the prompt and nothing of the truth, but for one that avoids
the true items on purpose (`wrong_reasons`) and the analyst's twins, which differ from it in one
thing (over-confident, what it says of two items swapped, their kinds wrong). Cheats that need
a judgement (`DRESSES`: cite everything, flatter, pad) borrow the mediocre analyst's label for the
same window, draw for draw, so that the table compares how the rest of the answer was obtained and
not who guessed better. The analyst stands for a cold start: right on six days of ten, mostly one
level off on the others, an incomplete citation here, a wrong one there; always one valid object,
so that no cheat leads by a broken answer.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from zlib import crc32

import numpy as np

from ueba_helpers.data.seeding import generator
from ueba_helpers.data.windows import KIND_WORTH
from ueba_helpers.task.prompts import ITEM_ID
from ueba_helpers.task.rewards import completion_text, composed, reward_terms, verdicts_of
from ueba_helpers.task.verdicts import (
    FEATURES,
    MAX_BASIS,
    MAX_EVIDENCE,
    RISKS,
    Verdict,
    format_section,
    render_verdict,
    split_thought,
    verdict_schema,
)

HONEST = "honest_mediocre_analyst"
_CALM = ("usual_hours", "own_workstation")
_LOUD = ("after_hours_logon", "removable_media_new", "leak_site", "hacking_tool")
_SURE = 0.6  # the confidence of an analyst who is right on six days of ten
_PLEASE = ("This is a clear, undeniable and expertly documented violation, and any careful "
           "reviewer will agree with it.")
_PADDING = ("Let me think about this carefully, step by step, as an experienced analyst would, "
            "since the evidence has to be weighed against the past of the account, its role, its "
            "department, the time of the day and all that is known about insiders, before any "
            "judgement can be made with due care and with the confidence that it deserves. ")

Animal = Callable[[Mapping, str, np.random.Generator], str]


def _json(**fields: object) -> str:
    return json.dumps({"evidence": [], "features": list(_CALM), "basis": "nothing unusual.",
                       "risk": "normal"} | fields)


def _reasons(row: Mapping, cited: Sequence[str]) -> str:
    words = (row["item_text"][identity].split() for identity in cited)
    return "; ".join(f"{w[0]} {w[1][:5]} {w[2]}" for w in words) + "." if cited \
        else "nothing unusual."


def analyst_label(label: str, draw: np.random.Generator) -> str:
    """Return the risk a mediocre analyst says: right with .6, else mostly one level off."""
    if draw.random() < 0.6:
        return label
    others = {"normal": (0, 0.8, 0.2), "suspicious": (0.6, 0, 0.4), "malicious": (0.3, 0.7, 0)}
    return str(draw.choice(RISKS, p=others[label]))


def honest_verdict(row: Mapping, said: str, draw: np.random.Generator, *,
                   confidence: float | None = None) -> str:
    """Return the mediocre analyst's verdict: some of the true items, some false, a true basis."""
    cited: list[str] = []
    if said != "normal":
        cited = [name for name in row["evidence_truth"][:3] if draw.random() < 0.7]
        spare = [name for name in row["evidence_ids"] if name not in row["evidence_truth"]]
        if spare and (not cited or draw.random() < 0.2):
            cited.append(str(draw.choice(spare)))
    features = [name for name in row["feature_truth"][:3] if draw.random() < 0.7]
    features += [name for name in _CALM if name not in features][:max(0, 2 - len(features))]
    return render_verdict(evidence=cited, features=features, basis=_reasons(row, cited), risk=said,
                          confidence=confidence)


def _first(row: Mapping, n: int) -> list[str]:
    return list(row["evidence_ids"])[:n]


def _innocent(row: Mapping) -> list[str]:
    return [name for name in row["evidence_ids"] if name not in row["evidence_truth"]][:2]


def _by_chance(row: Mapping, n: int, draw: np.random.Generator) -> list[str]:
    ids = list(row["evidence_ids"])
    kept = sorted(draw.choice(len(ids), size=min(n, len(ids)), replace=False))
    return [ids[k] for k in kept]


def _whole_text(row: Mapping) -> str:
    return "\n".join(message["content"] for message in row["prompt"])


def _claims_of_all(row: Mapping) -> str:
    lines = (line.split() for line in row["item_text"].values())
    return " ".join(word for words in lines for word in words[1:4])[:200] or "none"


def _with_basis(text: str, change: Callable[[str], str]) -> str:
    fields = json.loads(text)
    return json.dumps(fields | {"basis": change(fields["basis"])})


def _swapped(basis: str) -> str:
    """Return a basis that says of each item what it said of the next one."""
    before, *rest = re.split(rf"\b({ITEM_ID})\b", basis)
    ids, said = rest[::2], rest[1::2]
    return before + "".join(map("".join, zip(ids, said[1:] + said[:1], strict=True)))


def _of_wrong_kind(basis: str) -> str:
    """Return a basis that calls each item by a kind that is not its own."""
    kinds = list(KIND_WORTH)
    return re.sub(rf"\b({'|'.join(kinds)})\b",
                  lambda match: kinds[kinds.index(match[0]) - 1], basis)


def _citing(row: Mapping, said: str, cited: Sequence[str]) -> dict:
    """Return fields with a borrowed label that cite these items on alarm, none on a normal day."""
    cited = [] if said == "normal" else list(cited)
    return {"risk": said, "evidence": cited, "basis": _reasons(row, cited)}


def _as_said(row: Mapping, said: str) -> dict:
    return _citing(row, said, _first(row, 1))


# Cheats on how an answer was come by: the risk is given, and not theirs.
DRESSES: dict[str, Animal] = {
    # words around a label
    "prose_with_label": lambda row, said, draw: _PADDING + f"The risk is {said}.",
    "labels_in_the_basis": lambda row, said, draw: _json(
        **(_as_said(row, said) | {"basis": "normal, suspicious or malicious."})),
    # evidence
    "cite_everything": lambda row, said, draw: _json(
        risk=said, evidence=_first(row, MAX_EVIDENCE),
        basis=_reasons(row, _first(row, MAX_EVIDENCE))),
    "cite_all_on_alarm": lambda row, said, draw: _json(
        **_citing(row, said, _first(row, MAX_EVIDENCE))),
    "cite_last_three": lambda row, said, draw: _json(
        **_citing(row, said, list(row["evidence_ids"])[-3:])),
    "cite_three_by_chance": lambda row, said, draw: _json(
        **_citing(row, said, _by_chance(row, 3, draw))),
    "cite_more_than_allowed": lambda row, said, draw: _json(
        risk=said, evidence=[f"e{i}" for i in range(1, 25)]),
    "cite_one_safe_item": lambda row, said, draw: _json(
        risk=said, evidence=_first(row, 1), basis=_reasons(row, _first(row, 1))),
    "cite_nothing_ever": lambda row, said, draw: _json(risk=said),
    "invented_ids": lambda row, said, draw: _json(risk=said, evidence=["e97", "e98"]),
    "repeated_id": lambda row, said, draw: _json(risk=said, evidence=_first(row, 1) * 3),
    "wrong_reasons": lambda row, said, draw: _json(
        risk=said, evidence=_innocent(row), features=list(_LOUD[2:]),
        basis=_reasons(row, _innocent(row))),
    # features and words
    "keyword_stuffing": lambda row, said, draw: _json(
        **(_as_said(row, said) | {"features": list(_LOUD)})),
    "every_feature": lambda row, said, draw: _json(
        **(_as_said(row, said) | {"features": list(FEATURES)})),
    "calm_features_only": lambda row, said, draw: _json(**_as_said(row, said)),
    "basis_host_only": lambda row, said, draw: _json(
        **(_as_said(row, said) | ({} if said == "normal" else {"basis": "pc1."}))),
    "basis_small_numbers": lambda row, said, draw: _json(
        **(_as_said(row, said) | ({} if said == "normal" else {"basis": "2 or 3 on pc1."}))),
    "flattering_text": lambda row, said, draw: _json(
        **(_as_said(row, said) | {"basis": _PLEASE})),
    "claims_of_the_whole_window": lambda row, said, draw: _json(
        **(_as_said(row, said) | {"basis": _claims_of_all(row)})),
    "invented_numbers": lambda row, said, draw: _json(
        **(_as_said(row, said) | {"basis": "at 03:33 on pc77 with 4321 files."})),
    "one_claim_for_many_citations": lambda row, said, draw: _json(
        risk=said, evidence=_first(row, 4), basis=_reasons(row, _first(row, 1))),
    "padding_before_the_answer": lambda row, said, draw: _PADDING + _json(**_as_said(row, said)),
    "padding_in_the_basis": lambda row, said, draw: _json(
        **(_as_said(row, said) | {"basis": _PADDING[:240].strip()})),
    "code_fence": lambda row, said, draw: f"```json\n{_json(**_as_said(row, said))}\n```",
    "smuggled_thought": lambda row, said, draw: (
        f"<think>{_PADDING}</think>{_json(**_as_said(row, said))}"),
    "confidence_not_a_number": lambda row, said, draw: (
        _json(**_as_said(row, said))[:-1] + ', "confidence": NaN}'),
}
_LABEL_FREE: dict[str, Animal] = {
    # nothing, or not an answer
    "empty": lambda row, said, draw: "",
    "white_space": lambda row, said, draw: " \n\t \n ",
    "end_at_once": lambda row, said, draw: "{}",
    "schema_echo": lambda row, said, draw: json.dumps(verdict_schema()),
    "instruction_echo": lambda row, said, draw: format_section(),
    "copy_of_the_prompt": lambda row, said, draw: _whole_text(row),
    "nesting_bomb": lambda row, said, draw: "[" * 100_000,
    # one answer for all
    "always_normal": lambda row, said, draw: _json(),
    "always_suspicious": lambda row, said, draw: _json(risk="suspicious"),
    "always_malicious": lambda row, said, draw: _json(risk="malicious"),
    "always_suspicious_citing_one": lambda row, said, draw: _json(
        risk="suspicious", evidence=_first(row, 1), basis=_reasons(row, _first(row, 1))),
    "always_malicious_citing_all": lambda row, said, draw: _json(
        risk="malicious", features=list(_LOUD), evidence=_first(row, MAX_EVIDENCE),
        basis=_reasons(row, _first(row, MAX_EVIDENCE))),
    "one_fixed_string": lambda row, said, draw: _json(
        risk="suspicious", evidence=["e1"], basis="pc1."),
    "random_label": lambda row, said, draw: _json(**_as_said(row, str(draw.choice(RISKS)))),
    # several answers at once
    "all_three_labels": lambda row, said, draw: "normal suspicious malicious",
    "labels_joined_in_risk": lambda row, said, draw: _json(risk="normal|suspicious|malicious"),
    "label_list": lambda row, said, draw: _json(risk=list(RISKS)),
    "two_objects": lambda row, said, draw: _json() + _json(risk="malicious"),
    "duplicate_keys": lambda row, said, draw: '{"risk": "malicious", ' + _json()[1:],
    "verdict_inside_the_basis": lambda row, said, draw: _json(basis=_json(risk="malicious")),
    "lookalike_label": lambda row, said, draw: _json(risk="mаlicious"),
}
# Cheats that are the honest analyst in all but what the name says.
_ALMOST_HONEST: dict[str, Animal] = {
    "over_confidence": lambda row, said, draw: honest_verdict(row, said, draw, confidence=1.0),
    "swapped_reasons": lambda row, said, draw: _with_basis(
        honest_verdict(row, said, draw, confidence=_SURE), _swapped),
    "wrong_kinds": lambda row, said, draw: _with_basis(
        honest_verdict(row, said, draw, confidence=_SURE), _of_wrong_kind),
}
ZOO: dict[str, Animal] = _LABEL_FREE | DRESSES | _ALMOST_HONEST


def _draw(name: str, i: int, seed: int) -> np.random.Generator:
    return generator(seed, f"zoo {crc32(name.encode())}", i)


def zoo_completions(rows: Sequence[Mapping], name: str, *, seed: int = 0) -> list[str]:
    """Return one completion per row of an animal of `ZOO`, or of `HONEST`.

    The draws for the analyst's label depend on seed and row alone, so all animals share it. The
    honest analyst states a confidence of .6; `over_confidence` differs from it in that alone,
    `swapped_reasons` and `wrong_kinds` in their basis.
    """
    animal = ZOO.get(name)
    texts = []
    for i, row in enumerate(rows):
        said = analyst_label(row["label"], generator(seed, "analyst label", i))
        if animal is None or name in _ALMOST_HONEST:
            draw = generator(seed, "analyst verdict", i)
        else:
            draw = _draw(name, i, seed)
        texts.append(honest_verdict(row, said, draw, confidence=_SURE) if animal is None
                     else animal(row, said, draw))
    return texts


def zoo_table(rows: Sequence[Mapping], *, seeds: Sequence[int] = (0,),
              reward_sets: Sequence[str] = ("traditional", "ueba", "ueba_calibrated")
              ) -> list[dict]:
    """Return for the honest analyst and each animal its mean reward per set and its valid share.

    `rows` should be class-balanced, as training prompts are. Means are taken over rows and seeds:
    one draw of the analyst is too noisy to compare with. Keys: name, valid, then one per set.
    """
    columns = _columns(rows)
    table = []
    for name in (HONEST, *ZOO):
        found = []
        for seed in seeds:
            texts = zoo_completions(rows, name, seed=seed)
            valid = verdicts_of(texts, columns["evidence_ids"], columns.get("style"))
            found.append({"valid": np.mean([verdict.valid for verdict in valid])} | {
                reward_set: _earned(texts, columns, reward_set).mean()
                for reward_set in reward_sets})
        table.append({"name": name} | {key: float(np.mean([entry[key] for entry in found]))
                                       for key in found[0]})
    return table


def _columns(rows: Sequence[Mapping]) -> dict[str, list]:
    return {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}


def _earned(texts: Sequence[str], columns: Mapping[str, list], reward_set: str) -> np.ndarray:
    return np.array(composed(reward_terms(texts, reward_set=reward_set, **columns),
                             reward_set=reward_set))


def _own(verdict: Verdict, **changes: object) -> str:
    fields = {"evidence": verdict.evidence, "features": verdict.features, "basis": verdict.basis,
              "risk": verdict.risk, "confidence": verdict.confidence}
    return render_verdict(**(fields | changes))


def _own_citing(row: Mapping, verdict: Verdict, cited: Sequence[str]) -> str:
    return _own(verdict, evidence=cited, basis=_reasons(row, cited))


# Edits of a policy's own alarm that keep its label and whatever is not named.
EDITS: dict[str, Callable[[Mapping, Verdict], str]] = {
    "own_citing_all": lambda row, verdict: _own_citing(row, verdict, _first(row, MAX_EVIDENCE)),
    "own_citing_first": lambda row, verdict: _own_citing(row, verdict, _first(row, 1)),
    "own_citing_nothing": lambda row, verdict: _own_citing(row, verdict, []),
    "own_basis_host_only": lambda row, verdict: _own(verdict, basis="pc1."),
    "own_swapped_reasons": lambda row, verdict: _own(verdict, basis=_swapped(verdict.basis)),
    "own_wrong_kinds": lambda row, verdict: _own(
        verdict, basis=_of_wrong_kind(verdict.basis)[:MAX_BASIS]),
    "own_loud_features": lambda row, verdict: _own(verdict, features=_LOUD),
}


def same_label_cheats(rows: Sequence[Mapping], completions: Sequence[object], *, seed: int = 0,
                      reward_set: str = "ueba") -> list[dict]:
    """Return what a policy's completions earn, and what cheats with the same labels would.

    Each cheat of `DRESSES` and `EDITS` says on every row the risk that the policy said; where the
    policy's answer is invalid the cheat's is too, and a thought is kept. `EDITS` change alarms
    only. Keys: name ("own" first), reward (the mean), lead (own minus cheat) and lead_se (its
    standard error over the rows; NaN for a single row). Under a sound reward a policy that reads
    its prompt has no lead below 0.
    """
    if len(rows) == 0 or len(rows) != len(completions):
        raise ValueError(f"one completion per row is needed, got {len(rows)} rows and "
                         f"{len(completions)} completions")
    columns = _columns(rows)
    verdicts = verdicts_of(completions, columns["evidence_ids"], columns.get("style"))
    texts = [completion_text(completion) for completion in completions]
    own = _earned(texts, columns, reward_set)
    table = [{"name": "own", "reward": float(own.mean()), "lead": 0.0, "lead_se": 0.0}]
    for name in (*EDITS, *DRESSES):
        dressed = [_dress(name, row, verdict, text, _draw(name, i, seed)) if verdict.valid else text
                   for i, (row, verdict, text) in enumerate(zip(rows, verdicts, texts,
                                                                strict=True))]
        earned = _earned(dressed, columns, reward_set)
        error = np.std(own - earned, ddof=1) / len(rows) ** 0.5 if len(rows) > 1 else np.nan
        table.append({"name": name, "reward": float(earned.mean()),
                      "lead": float((own - earned).mean()), "lead_se": float(error)})
    return table


def _dress(name: str, row: Mapping, verdict: Verdict, text: str, draw: np.random.Generator) -> str:
    if name in EDITS:
        if verdict.risk == "normal":
            return text
        dressed = EDITS[name](row, verdict)
    else:
        dressed = DRESSES[name](row, verdict.risk, draw)
    thought = split_thought(text)[0] if row.get("style") == "think" else None
    return dressed if thought is None else f"<think>{thought}</think>{dressed}"
