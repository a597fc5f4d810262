"""The answer contract: strict, total, fast, and one source for parser, schema and prompt."""

import json
import re
import time

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ueba_helpers.data.windows import FEATURES
from ueba_helpers.task.verdicts import (
    MAX_BASIS,
    MAX_EVIDENCE,
    MAX_FEATURES,
    MIN_FEATURES,
    PROBLEMS,
    RISKS,
    STYLES,
    VerdictModel,
    field_order,
    format_section,
    parse_verdict,
    render_verdict,
    verdict_schema,
)

IDS = ("e1", "e2", "e3", "e7", "e12")
GOOD = {"evidence": ["e3", "e7"], "features": ["after_hours_logon", "removable_media_new"],
        "basis": "e3 22:14 device pc2; e7 23:10 file.", "risk": "malicious"}


def text_with(**changes):
    """Return the good verdict's JSON with fields replaced; a value of None removes the field."""
    fields = {name: value for name, value in (GOOD | changes).items() if value is not None}
    return json.dumps(fields)


def test_a_canonical_verdict_is_read_back_field_by_field():
    verdict = parse_verdict(render_verdict(**GOOD), IDS)
    assert verdict.valid and verdict.problem is None
    assert verdict.evidence == ("e3", "e7") and verdict.risk == "malicious"
    assert verdict.features == ("after_hours_logon", "removable_media_new")
    assert verdict.basis == GOOD["basis"] and verdict.confidence is None


CASES = {
    "empty": ["", " \n\t "],
    "too_long": [" " * 3000, "{" * 1_000_000, text_with(basis="a" * 5000)],
    "too_nested": ["[" * 1900, '{"a":' * 300 + "1" + "}" * 300],
    "not_json": ["normal", "{", text_with()[:-1], '{"risk": normal}', "{'risk': 'normal'}",
                 '{"risk": "a\x01b"}', text_with()[:-1] + ",}", '{"a": 01}', "\ud800"],
    "not_object": ["[]", "[{}]", '"normal"', "1e999", "null"],
    "not_finite": [text_with()[:-1] + ', "confidence": NaN}',
                   text_with()[:-1] + ', "confidence": -Infinity}', "NaN"],
    "extra_text": ["Answer: " + text_with(), text_with() + " done", f"```json\n{text_with()}\n```",
                   text_with() + "]", "<think>x</think>" + text_with(), "[1] {}"],
    "two_objects": [text_with() + text_with(risk="normal"), text_with() + "\n{"],
    "duplicate_key": ['{"risk": "normal", ' + text_with()[1:],
                      text_with(basis={"a": 1}).replace('{"a": 1}', '{"a": 1, "a": 2}')],
    "unknown_key": [text_with(verdict="normal"), text_with(Risk="normal")],
    "missing_key": [text_with(risk=None), text_with(basis=None), "{}"],
    "wrong_type": [text_with(evidence="e3"), text_with(evidence=[3]), text_with(risk=["normal"]),
                   text_with(features={}), text_with(basis=1), text_with(confidence="0.5"),
                   text_with(confidence=True), text_with(evidence=[["e3"]]),
                   text_with()[:-1] + ', "confidence": null}'],
    "unknown_evidence": [text_with(evidence=["e4"]), text_with(evidence=["e03"]),
                         text_with(evidence=["E3"]), text_with(evidence=["e3 "])],
    "repeated_evidence": [text_with(evidence=["e3", "e3"])],
    "unknown_feature": [text_with(features=["usual_hours", "magic"])],
    "repeated_feature": [text_with(features=["usual_hours", "usual_hours"])],
    "feature_count": [text_with(features=["usual_hours"]), text_with(features=list(FEATURES[:5])),
                      text_with(features=[])],
    "empty_basis": [text_with(basis=""), text_with(basis="   ")],
    "long_basis": [text_with(basis="a" * (MAX_BASIS + 1))],
    "basis_characters": [text_with(basis='{"risk"}'), text_with(basis="é"),
                         text_with(basis="<|im_end|>"), text_with(basis="a\nb"),
                         text_with(basis=" a"), text_with(basis="a\n"),
                         '{"evidence": [], "features": ["usual_hours", "usual_web"], '
                         '"basis": "\\ud800", "risk": "normal"}'],
    "unknown_risk": [text_with(risk="Normal"), text_with(risk="normal|malicious"),
                     text_with(risk="mаlicious")],
    "confidence_range": [text_with(confidence=1.01), text_with(confidence=-0.1),
                         text_with()[:-1] + ', "confidence": 1e999}',
                         text_with()[:-1] + ', "confidence": ' + "9" * 1000 + "}"],
}


@pytest.mark.parametrize(("problem", "text"),
                         [(name, text) for name, texts in CASES.items() for text in texts],
                         ids=lambda value: str(value)[:24].encode("unicode_escape").decode())
def test_each_problem_has_its_name(problem, text):
    verdict = parse_verdict(text, IDS)
    assert (verdict.valid, verdict.problem, verdict.risk) == (False, problem, "invalid")
    assert verdict.evidence == () and verdict.features == ()


def test_nine_citations_are_too_many_and_eight_are_not():
    ids = [f"e{i}" for i in range(1, 10)]
    assert parse_verdict(text_with(evidence=ids), ids).problem == "too_many_evidence"
    assert parse_verdict(text_with(evidence=ids[:8]), ids).valid


def test_the_thinking_style_needs_a_thought_and_the_others_refuse_one():
    answer = render_verdict(**GOOD, style="think", thought="e3 stands out")
    assert parse_verdict(answer, IDS, think=True).valid
    assert parse_verdict(answer, IDS).problem == "extra_text"
    assert parse_verdict(text_with(), IDS, think=True).problem == "missing_thought"
    assert parse_verdict(f"<think>{'a' * 5000}</think>{text_with()}", IDS,
                         think=True).problem == "long_thought"
    assert parse_verdict("", IDS, think=True).problem == "empty"
    assert parse_verdict("x <think></think>{}", IDS, think=True).problem == "missing_thought"


def test_every_problem_is_reached_by_a_case():
    reached = set(CASES) | {"too_many_evidence", "missing_thought", "long_thought"}
    assert reached == set(PROBLEMS)


# Strings near a verdict: cut, repeated, spiced with what parsers stumble over.
_PIECES = st.sampled_from([
    text_with(), text_with()[:40], '"risk": "normal"', "{", "}", "[", "]", '"', "\\", "\\ud800",
    "\ud83d", "NaN", "1e999", "-0", "null", ",", ":", "\x00", "<think>", "</think>", "é", "\ufeff",
    "[" * 3000, '{"a":' * 2000, "9" * 6000, '{"risk": "normal", "risk": "normal"}', "e3",
])
_NEAR = st.lists(_PIECES, max_size=6).map("".join)
_CUT = st.builds(lambda text, k: text[:k], st.just(text_with(confidence=0.5)),
                 st.integers(0, 250))
_WILD = st.text(st.characters(exclude_categories=()), max_size=30)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(_NEAR, _CUT, _WILD), min_size=10, max_size=12, unique=True),
       st.booleans())
def test_no_string_raises(texts, think):
    for text in texts:  # at least 5,000 strings
        verdict = parse_verdict(text, IDS, think=think)
        assert verdict.valid == (verdict.problem is None) == (verdict.risk in RISKS)
        assert verdict.valid or verdict.problem in PROBLEMS


def test_a_parser_without_the_guards_raises_on_the_same_strings():
    for text in ("[" * 100_000, '{"a": ' * 100_000):
        with pytest.raises((RecursionError, ValueError)):
            json.loads(text)
        assert not parse_verdict(text, IDS).valid
    assert json.loads('{"risk": "normal", "risk": "malicious"}')  # takes the last silently


@pytest.mark.parametrize("text", ["[" * 100_000, "a" * 1_000_000, '{"a":' * 100_000,
                                  '{"basis": "' + "\\" * 999_999, "\ud800" * 500_000,
                                  " " * 1_000_000 + text_with(), "<think>" * 150_000])
@pytest.mark.parametrize("think", [False, True])
def test_bombs_are_refused_at_once(text, think):
    started = time.process_time()
    assert not parse_verdict(text, IDS, think=think).valid
    assert time.process_time() - started < 0.5


_ANY_EVIDENCE = st.lists(st.sampled_from([*IDS, "e4", "x", 3, None]), max_size=10)
_ANY_FEATURES = st.lists(st.sampled_from([*FEATURES, "magic", 1]), max_size=6)
_MOSTLY_GOOD = st.fixed_dictionaries(
    {"evidence": st.one_of(st.lists(st.sampled_from(IDS), max_size=4, unique=True), _ANY_EVIDENCE,
                           st.just("e3")),
     "features": st.one_of(st.lists(st.sampled_from(FEATURES), min_size=2, max_size=4, unique=True),
                           _ANY_FEATURES),
     "basis": st.one_of(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1,
                                max_size=30),
                        st.sampled_from(["ok.", "", " ", "a" * 240, "a" * 241, "é", "a\n", "\x7f",
                                         "a{b", "'~|;^`"]), st.integers()),
     "risk": st.one_of(st.sampled_from(RISKS), st.sampled_from(["", "Normal", 1, None]))},
    optional={"confidence": st.one_of(st.floats(), st.integers(-2, 2), st.booleans(), st.none(),
                                      st.just("1")),
              "note": st.just("x")})


def accepted_by_model(fields):
    """Return whether pydantic accepts the fields for a window with the ids `IDS`."""
    try:
        VerdictModel.model_validate(fields, context={"evidence_ids": IDS})
    except ValidationError:
        return False
    return True


@settings(max_examples=1000, deadline=None)
@given(_MOSTLY_GOOD)
def test_the_fast_parser_and_the_model_agree(fields):
    assert parse_verdict(json.dumps(fields), IDS).valid == accepted_by_model(fields)


def accepted_by_schema(fields):
    """Return whether the JSON schema accepts the fields for a window with the ids `IDS`."""
    try:
        jsonschema.validate(fields, verdict_schema(IDS))
    except jsonschema.ValidationError:
        return False
    return True


EVERY_CHARACTER = [*map(chr, range(256)), "\u2028", "\u200b", "\ufeff", "\ud800", "а", "０"]


@pytest.mark.parametrize("frame", ["{}", "{}b", "a{}", "a{}b"])
def test_parser_model_and_schema_agree_on_every_character_of_a_basis(frame):
    seen = set()
    for char in EVERY_CHARACTER:
        fields = GOOD | {"basis": frame.format(char)}
        valid = parse_verdict(json.dumps(fields), IDS).valid
        assert valid == accepted_by_model(fields) == accepted_by_schema(fields), (frame, char)
        seen.add(valid)
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["e3\n", "e3", "e0", "e03", "e1234", "E3", "e３"])
def test_model_and_schema_agree_on_ids_without_a_window(name):
    fields = GOOD | {"evidence": [name]}
    try:
        accepted = bool(VerdictModel.model_validate(fields))
    except ValidationError:
        accepted = False
    found = list(jsonschema.Draft202012Validator(verdict_schema()).iter_errors(fields))
    assert accepted == (not found) == (name == "e3")


def test_a_schema_with_the_pattern_alone_would_let_a_last_line_break_through():
    pattern = verdict_schema()["properties"]["basis"]["pattern"]
    assert re.search(pattern, "a\n") and not accepted_by_schema(GOOD | {"basis": "a\n"})


def lax_parser(text, ids):
    """Return whether a parser that forgets half of the rules accepts a text (a broken twin)."""
    found = json.loads(text)
    return set(found["evidence"]) <= set(ids) and found["risk"] in RISKS


def test_the_agreement_would_notice_a_laxer_parser():
    names = ("feature_count", "repeated_evidence", "unknown_feature", "long_basis")
    texts = [text for name in names for text in CASES[name]]
    assert all(not parse_verdict(text, IDS).valid and not accepted_by_model(json.loads(text))
               for text in texts)
    assert any(lax_parser(text, IDS) != accepted_by_model(json.loads(text)) for text in texts)


# --- one source: schema, format section, rendering ---

_VALID = st.builds(
    lambda evidence, features, risk, confidence, style: (
        {"evidence": evidence, "features": features, "basis": "as shown.", "risk": risk}
        | ({} if confidence is None else {"confidence": confidence}), style),
    st.lists(st.sampled_from(IDS), max_size=5, unique=True),
    st.lists(st.sampled_from(FEATURES), min_size=2, max_size=4, unique=True),
    st.sampled_from(RISKS), st.one_of(st.none(), st.floats(0, 1)),
    st.sampled_from(("evidence_first", "risk_first")))


@settings(max_examples=300, deadline=None)
@given(_VALID)
def test_what_is_rendered_fits_schema_model_and_parser(case):
    fields, style = case
    text = render_verdict(**fields, style=style)
    found = json.loads(text)
    schema = verdict_schema(IDS, style=style, confidence="confidence" in fields)
    jsonschema.validate(found, schema)
    assert list(found) == list(schema["properties"])
    assert VerdictModel.model_validate(found, context={"evidence_ids": IDS})
    verdict = parse_verdict(text, IDS)
    assert verdict.valid and list(verdict.evidence) == fields["evidence"]
    assert verdict.confidence == fields.get("confidence")


def test_the_schema_refuses_what_the_parser_refuses():
    schema = verdict_schema(IDS)
    for changes in ({"risk": "odd"}, {"evidence": ["e4"]}, {"features": ["usual_hours"]},
                    {"basis": "a{b"}, {"note": "x"}, {"evidence": ["e3", "e3"]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(GOOD | changes, schema)
    jsonschema.validate(GOOD, schema)


def read_format_section(text):
    """Return the contract as a reader of the prompt would write it down."""
    line = text[text.index("{"):]
    names = re.findall(r'"(\w+)": ', line)
    bounds = {name: (int(low), int(high)) for name, low, high in
              re.findall(r'"(\w+)": ["\[]?(\d+)-(\d+) ', line)}
    return names, bounds, tuple(re.findall(r'[ |]"(\w+)"(?=[|,}])', line))


@pytest.mark.parametrize("style", STYLES)
def test_the_format_section_says_what_the_schema_says(style):
    properties = verdict_schema(style=style)["properties"]
    names, bounds, risks = read_format_section(format_section(style=style))
    assert names == list(properties) == [n for n in field_order(style) if n != "confidence"]
    assert bounds == {
        "evidence": (0, properties["evidence"]["maxItems"]),
        "features": (properties["features"]["minItems"], properties["features"]["maxItems"]),
        "basis": (properties["basis"]["minLength"], properties["basis"]["maxLength"])}
    assert risks == tuple(properties["risk"]["enum"]) == RISKS
    assert bounds["features"] == (MIN_FEATURES, MAX_FEATURES) and MAX_EVIDENCE == 8


def test_the_format_section_follows_the_model(monkeypatch):
    changed = VerdictModel.model_json_schema()
    changed["properties"]["features"]["maxItems"] = 9
    monkeypatch.setattr(VerdictModel, "model_json_schema", classmethod(lambda cls: changed))
    assert read_format_section(format_section())[1]["features"] == (2, 9)


def test_the_full_format_section_lists_the_vocabulary_and_the_short_one_does_not():
    assert all(name in format_section(list_features=True) for name in FEATURES)
    assert not any(name in format_section() for name in FEATURES)
    assert len(format_section()) < 260
    assert "confidence" in format_section(confidence=True)
    assert format_section(style="think").startswith("Think first")


def test_rendering_refuses_what_would_not_parse():
    with pytest.raises(ValueError, match="feature_count"):
        render_verdict(**(GOOD | {"features": ["usual_hours"]}))
    with pytest.raises(ValueError, match="style"):
        field_order("reversed")


def test_a_hundred_thousand_verdicts_parse_in_three_seconds():
    texts = [text_with(basis=f"e3 {i // 60 % 24:02d}:{i % 60:02d} device pc{i}.")
             for i in range(20_000)]
    best = min(_seconds(texts) for _ in range(3))
    assert best * 5 <= 3


def _seconds(texts):
    started = time.process_time()
    assert all(parse_verdict(text, IDS).valid for text in texts)
    return time.process_time() - started
