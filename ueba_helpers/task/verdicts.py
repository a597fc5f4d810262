"""The answer contract: from a completion to a `Verdict`, strictly, and never by an exception.

In: any string and the ids of the items that the prompt showed. Out: a frozen `Verdict`, valid or
with one named problem out of `PROBLEMS`. Refused (as a named problem): anything that is not one
JSON object with exactly the fields of `VerdictModel`; duplicate keys, extra text, a second object,
unknown labels, features or ids, text that is too long or too deeply nested.

`VerdictModel` is the one source of the contract: the JSON schema for constrained decoding
(`verdict_schema`) and the format section of the prompt (`format_section`) are derived from it.
`parse_verdict` repeats its rules by hand, because rewards call it on every completion and pydantic
is too slow there; tests hold the two together.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from ueba_helpers.data.windows import FEATURES, RISKS

STYLES = ("evidence_first", "risk_first", "think")
MAX_EVIDENCE = 8
MIN_FEATURES, MAX_FEATURES = 2, 4
MAX_BASIS = 240
MAX_VERDICT_CHARS = 2_000
MAX_THOUGHT_CHARS = 4_000

# Printable ASCII without quotes, backslashes and brackets: no second object, no markup and no
# template marker can hide inside the basis, and every line of a prompt can still be quoted.
BASIS_PATTERN = r"^[!#-;=?-Z^-z|~][ !#-;=?-Z^-z|~]*$"
_BASIS = re.compile(BASIS_PATTERN[:-1] + r"\Z")
_ID_PATTERN = r"^e[1-9][0-9]{0,2}$"
# `$` is the end in ECMA-262 and in pydantic, but in Python also the place before a last line break;
# no spelling of the end is common to all, so that the schema forbids the line break by itself.
_ONE_LINE = {"not": {"pattern": "\n"}}

PROBLEMS = (
    "empty", "too_long", "too_nested", "not_json", "not_object", "not_finite", "extra_text",
    "two_objects", "duplicate_key", "unknown_key", "missing_key", "wrong_type",
    "unknown_evidence", "repeated_evidence", "too_many_evidence", "unknown_feature",
    "repeated_feature", "feature_count", "empty_basis", "long_basis", "basis_characters",
    "unknown_risk", "confidence_range", "missing_thought", "long_thought",
)


class VerdictModel(BaseModel):
    """One verdict on one account-day, the evidence before the judgement."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    evidence: list[Annotated[str, Field(pattern=_ID_PATTERN,
                                        json_schema_extra=_ONE_LINE)]] = Field(
        max_length=MAX_EVIDENCE, json_schema_extra={"uniqueItems": True},
        description="item ids, [] on a normal day")
    features: list[Literal[FEATURES]] = Field(
        min_length=MIN_FEATURES, max_length=MAX_FEATURES, json_schema_extra={"uniqueItems": True},
        description="names")
    basis: str = Field(
        min_length=1, max_length=MAX_BASIS, pattern=BASIS_PATTERN, json_schema_extra=_ONE_LINE,
        description="times and hosts of these items")
    risk: Literal[RISKS] = Field(description="the judgement")
    confidence: float = Field(
        default=None, ge=0, le=1, allow_inf_nan=False, validate_default=False,
        description="optional: the chance that risk is right")

    @field_validator("evidence", "features")
    @classmethod
    def _no_repetition(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("an entry is repeated")
        return value

    @field_validator("evidence")
    @classmethod
    def _shown(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if info.context and not set(value) <= set(info.context["evidence_ids"]):
            raise ValueError("an id is not in the window")
        return value


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a completion said; an invalid one has `risk == "invalid"` and names its problem."""

    risk: str
    features: tuple[str, ...]
    evidence: tuple[str, ...]
    basis: str
    confidence: float | None
    valid: bool
    problem: str | None


class _DuplicateKey(ValueError):
    pass


class _NotFinite(ValueError):
    pass


def _unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _DuplicateKey
    return found


def _refuse_constant(name: str) -> None:
    raise _NotFinite(name)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
_SPACE = " \t\r\n"
_REQUIRED = frozenset(name for name, field in VerdictModel.model_fields.items()
                      if field.is_required())
_ALLOWED = frozenset(VerdictModel.model_fields)
_FEATURES = frozenset(FEATURES)
_RISKS = frozenset(RISKS)
_THOUGHT = re.compile(r"\A\s*<think>(.*?)</think>", re.DOTALL)


def parse_verdict(text: str, evidence_ids: Collection[str], *, think: bool = False) -> Verdict:
    """Return the verdict in `text`; never raises on a string, whatever it holds.

    `evidence_ids` are the ids that the prompt showed. With `think` one `<think>...</think>` block
    must stand before the object. White space around the object is allowed, nothing else is. The
    order of the keys is free (risk first is an ablation, not a mistake).

    >>> parse_verdict('{"evidence": [], "features": ["usual_hours", "usual_web"], '
    ...               '"basis": "as always.", "risk": "normal"}', ["e1"]).risk
    'normal'
    >>> parse_verdict('{"risk": "normal", "risk": "malicious"}', ["e1"]).problem
    'duplicate_key'
    """
    if think:
        thought, text = split_thought(text)
        if thought is None:
            return _invalid("missing_thought" if text.strip(_SPACE) else "empty")
        if len(thought) > MAX_THOUGHT_CHARS:
            return _invalid("long_thought")
    if len(text) > MAX_VERDICT_CHARS:
        return _invalid("too_long")
    text = text.strip(_SPACE)
    if not text:
        return _invalid("empty")
    if text.count("{") > 16 or text.count("[") > 16:
        return _invalid("too_nested")
    if text[0] != "{":
        return _invalid(_what_else(text))
    try:
        found, end = _DECODER.raw_decode(text)
    except _DuplicateKey:
        return _invalid("duplicate_key")
    except _NotFinite:
        return _invalid("not_finite")
    except ValueError:
        return _invalid("not_json")
    if end != len(text):
        rest = text[end:].lstrip(_SPACE)
        return _invalid("two_objects" if rest[0] == "{" else "extra_text")
    problem = _problem(found, evidence_ids)
    if problem is not None:
        return _invalid(problem)
    confidence = found.get("confidence")
    return Verdict(found["risk"], tuple(found["features"]), tuple(found["evidence"]),
                   found["basis"], None if confidence is None else float(confidence), True, None)


def _invalid(problem: str) -> Verdict:
    return _INVALID[problem]


_INVALID = {name: Verdict("invalid", (), (), "", None, False, name) for name in PROBLEMS}


def _what_else(text: str) -> str:
    """Name what a text that does not open with a brace is."""
    try:
        _, end = _DECODER.raw_decode(text)
    except _NotFinite:
        return "not_finite"
    except ValueError:
        return "extra_text" if "{" in text else "not_json"
    if end == len(text):
        return "not_object"
    return "extra_text"


def _problem(found: dict, evidence_ids: Collection[str]) -> str | None:
    keys = found.keys()
    if not keys <= _ALLOWED:
        return "unknown_key"
    if not keys >= _REQUIRED:
        return "missing_key"
    evidence, features = found["evidence"], found["features"]
    basis, risk = found["basis"], found["risk"]
    if (type(evidence) is not list or type(features) is not list or type(basis) is not str
            or type(risk) is not str):
        return "wrong_type"
    for entry in evidence:
        if type(entry) is not str:
            return "wrong_type"
        if entry not in evidence_ids:
            return "unknown_evidence"
    for entry in features:
        if type(entry) is not str:
            return "wrong_type"
        if entry not in _FEATURES:
            return "unknown_feature"
    if len(set(evidence)) != len(evidence):
        return "repeated_evidence"
    if len(evidence) > MAX_EVIDENCE:
        return "too_many_evidence"
    if len(set(features)) != len(features):
        return "repeated_feature"
    if not MIN_FEATURES <= len(features) <= MAX_FEATURES:
        return "feature_count"
    if len(basis) > MAX_BASIS:
        return "long_basis"
    if _BASIS.match(basis) is None:
        return "basis_characters" if basis.strip() else "empty_basis"
    if risk not in _RISKS:
        return "unknown_risk"
    if "confidence" in found:
        confidence = found["confidence"]
        if type(confidence) not in (float, int):
            return "wrong_type"
        if not 0 <= confidence <= 1:
            return "confidence_range"
    return None


def split_thought(text: str) -> tuple[str | None, str]:
    """Return the leading `<think>` block's inside (None if there is none) and the rest.

    >>> split_thought("<think>e3 is odd</think> {}")
    ('e3 is odd', ' {}')
    >>> split_thought("{}")
    (None, '{}')
    """
    found = _THOUGHT.match(text)
    return (None, text) if found is None else (found.group(1), text[found.end():])


def render_verdict(*, evidence: Sequence[str], features: Sequence[str], basis: str, risk: str,
                   confidence: float | None = None, style: str = "evidence_first",
                   thought: str | None = None) -> str:
    """Return the canonical JSON of a verdict; raises `ValueError` on one that is not valid.

    Keys stand in the model's order (`style="risk_first"` moves the risk to the front); with
    `style="think"` the `thought` comes before the object.

    >>> render_verdict(evidence=["e2"], features=["new_workstation", "usual_web"],
    ...                basis="e2 22:14 logon pc2.", risk="suspicious")
    '{"evidence": ["e2"], "features": ["new_workstation", "usual_web"], "basis": "e2 22:14 logon \
pc2.", "risk": "suspicious"}'
    """
    fields = {"evidence": list(evidence), "features": list(features), "basis": basis, "risk": risk}
    if confidence is not None:
        fields["confidence"] = confidence
    problem = _problem(fields, evidence)
    if problem is not None:
        raise ValueError(f"not a valid verdict ({problem}): {fields}")
    body = json.dumps({name: fields[name] for name in field_order(style) if name in fields})
    return f"<think>{thought or ''}</think>{body}" if style == "think" else body


def field_order(style: str = "evidence_first") -> tuple[str, ...]:
    """Return the keys of a verdict in the order in which a style says them.

    >>> field_order("risk_first")[0]
    'risk'
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {STYLES}, got {style!r}")
    names = tuple(VerdictModel.model_fields)
    if style == "risk_first":
        return ("risk", *(name for name in names if name != "risk"))
    return names


def verdict_schema(evidence_ids: Sequence[str] | None = None, *, style: str = "evidence_first",
                   confidence: bool = False) -> dict:
    """Return the JSON schema of the object, for constrained decoding.

    With `evidence_ids` only these ids can be cited; without `confidence` the optional field is
    left out. Properties stand in the order of the style.
    """
    schema = VerdictModel.model_json_schema()
    names = [name for name in field_order(style) if confidence or name != "confidence"]
    properties = {name: dict(schema["properties"][name]) for name in names}
    for entry in properties.values():
        entry.pop("default", None)
    if evidence_ids is not None:
        known = list(evidence_ids)
        properties["evidence"]["items"] = {"type": "string", "enum": known}
        properties["evidence"]["maxItems"] = min(MAX_EVIDENCE, len(known))
    required = [name for name in names if name in _REQUIRED or confidence]
    return {"type": "object", "properties": properties, "required": required,
            "additionalProperties": False}


def format_section(*, style: str = "evidence_first", confidence: bool = False,
                   list_features: bool = False) -> str:
    """Return the part of the prompt that states the contract, derived from the schema.

    `list_features` adds the vocabulary: needed by a policy that was never trained on verdicts,
    left out for one that learns the names in its cold start.
    """
    properties = verdict_schema(style=style, confidence=confidence)["properties"]
    slots = ", ".join(f'"{name}": {_slot(entry)}' for name, entry in properties.items())
    lines = []
    if style == "think":
        lines.append("Think first inside <think></think>.")
    lines.append(f"Answer with one JSON object only: {{{slots}}}")
    if list_features:
        lines.append("Features: " + " ".join(properties["features"]["items"]["enum"]))
    return "\n".join(lines)


def _slot(entry: dict) -> str:
    about = entry["description"]
    if "enum" in entry:
        return "|".join(f'"{value}"' for value in entry["enum"])
    if entry["type"] == "array":
        return f"[{entry.get('minItems', 0)}-{entry['maxItems']} {about}]"
    if entry["type"] == "string":
        return f'"{entry["minLength"]}-{entry["maxLength"]} characters: {about}"'
    return f"{entry['minimum']:g}-{entry['maximum']:g} ({about})"
