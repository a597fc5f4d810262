"""Rewards: by hand, by law, against the zoo, and with broken twins that the checks reject."""

import codecs
import functools
import itertools
import math
import random
import re
import time
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.task_windows import make_window, make_windows
from ueba_helpers.data.windows import FEATURES
from ueba_helpers.errors import UserError
from ueba_helpers.task import rewards
from ueba_helpers.task.prompts import ITEM_ID, prompt_dataset, target_verdict
from ueba_helpers.task.rewards import (
    BROKEN_REWARDS,
    REWARD_SETS,
    CostMatrix,
    basis_support,
    claims,
    composed,
    evidence_beyond_chance,
    evidence_credit,
    feature_credit,
    reward_terms,
    traditional_reward,
    ueba_accuracy,
    ueba_basis,
    ueba_brier,
    ueba_evidence,
    ueba_format,
    ueba_reward,
)
from ueba_helpers.task.verdicts import RISKS, parse_verdict, render_verdict
from ueba_helpers.task.zoo import (
    DRESSES,
    EDITS,
    HONEST,
    ZOO,
    analyst_label,
    same_label_cheats,
    zoo_completions,
    zoo_table,
)

CALM = ["usual_hours", "own_workstation"]


def verdict(risk="normal", evidence=(), features=CALM, basis="nothing unusual.", **more):
    """Return the text of a valid verdict."""
    return render_verdict(risk=risk, evidence=list(evidence), features=list(features), basis=basis,
                          **more)


def columns_of(windows):
    """Return what a trainer hands to the reward functions for these windows."""
    rows = prompt_dataset(windows)
    return {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}


@pytest.fixture(scope="module")
def balanced():
    return make_windows(90, spread=True)


# --- twins: the terms as they are without what keeps cheats out ---


def plain_evidence(completions, *, evidence_ids, evidence_truth, feature_truth, dont_care,
                   **columns):
    """Return the evidence term with the F1 alone, which chance and all items share in."""
    return [.7 * evidence_credit(said.risk, said.evidence, truth, spared)
            + .3 * feature_credit(said.features, features) if said.valid else 0.0
            for said, truth, spared, features in
            zip(rewards.verdicts_of(completions, evidence_ids), evidence_truth, dont_care,
                feature_truth, strict=True)]


def plain_support(said, lines):
    """Return the share of claims that the cited lines show, be they true or just a host."""
    named = claims(said.basis)
    if not said.evidence:
        return float(not named and said.risk == "normal")
    shown = set().union(*(claims(lines[name] or "") for name in said.evidence))
    return len(named & shown) / max(len(named), len(said.evidence))


def plain_basis(completions, *, evidence_ids, item_text, **columns):
    """Return the basis term blind to truth and kind of claim."""
    return [plain_support(said, lines) if said.valid else 0.0 for said, lines in
            zip(rewards.verdicts_of(completions, evidence_ids), item_text, strict=True)]


PLAIN_TERMS = ((ueba_format, 1.0), (ueba_accuracy, .7), (plain_evidence, .2), (plain_basis, .1))


# --- the cost matrix ---


def test_every_constant_verdict_loses_under_the_training_prior():
    values = CostMatrix().constant_values()
    by_hand = [(1 - .6 - 1) / 3, (-.6 + 1 - .8) / 3, (-.8 - .6 + 1) / 3]
    assert values == pytest.approx(by_hand) and max(values) <= 0


def test_the_reward_of_a_constant_policy_is_the_matrix_column(balanced):
    columns = columns_of(balanced)
    for said, expected in zip(RISKS, CostMatrix().constant_values(), strict=True):
        got = ueba_accuracy([verdict(said)] * len(balanced), **columns)
        assert np.mean(got) == pytest.approx(expected)
    partial = BROKEN_REWARDS["broken_partial_credit"]  # the twin: the middle label pays
    assert np.mean(partial([verdict("suspicious")] * len(balanced), **columns)) > .6


@pytest.mark.parametrize(("values", "prior", "message"), [
    (((1, 0, 0), (0, 1, 0), (-1, 0, 1)), None, "every constant verdict"),
    (((1, .5, -1), (-1, 1, -1), (-1.0, .5, 1)), None, "must cost most"),
    (((1, .5, -.9), (-.9, 1, -.9), (-1, .5, 1)), None, "suspicious on every day"),
    (None, (.9, .05, .05), "normal on every day"),
    (((1, -.5, -1), (-.6, 1, -.5), (-1, -.7, 1)), None, "must cost most"),
    (((1, -.5, -.8), (-.6, -.6, -.5), (-1, -.7, 1)), None, "true suspicious days"),
    (((2, -.5, -.8), (-.6, 1, -.5), (-1, -.7, 1)), None, "between -1 and 1"),
    (((1, math.nan, -.8), (-.6, 1, -.5), (-1, -.7, 1)), None, "between -1 and 1"),
    (((1, -.5), (-.6, 1)), None, "three rows"),
    (None, (.5, .5, .5), "sum to 1"), (None, (1.5, -.25, -.25), "sum to 1"),
])
def test_a_cost_matrix_that_can_be_farmed_is_refused(values, prior, message):
    given = {name: value for name, value in (("values", values), ("prior", prior)) if value}
    with pytest.raises(UserError, match=message):
        CostMatrix(**given)


def test_a_matrix_for_another_prior_can_be_used_as_a_term(balanced):
    costs = CostMatrix(values=((1, -.9, -.9), (-.9, 1, -.9), (-1, -.9, 1)), prior=(.4, .3, .3))
    term = rewards.accuracy_with(costs)
    columns = columns_of(balanced[:3])
    assert term([verdict("normal")] * 3, **columns) == [1.0, -.9, -1.0]
    assert term.__name__ == "ueba_accuracy"


CONSTANT_CITATIONS = [(), ("e1",), ("e2",), ("e3",), ("e1", "e2"), ("e1", "e3"), ("e2", "e3"),
                      ("e1", "e2", "e3"), tuple(f"e{i}" for i in range(1, 9))]


def best_constant(windows, terms):
    """Return the most that any constant verdict earns, each class counting a third.

    A constant verdict has one label, features, ids and basis for all days: the bases are a host, a
    small number with it, and the commonest time of the items that show something.
    """
    columns = columns_of(windows)
    shares = np.array([1 / (3 * columns["label"].count(label)) for label in columns["label"]])
    oracles = Counter()
    for share, oracle in zip(shares, columns["feature_truth"], strict=True):
        oracles[tuple(oracle)] += share
    found = sorted(
        (sum(share * feature_credit(features, oracle) for oracle, share in oracles.items()),
         features)
        for k in (2, 3, 4) for features in itertools.combinations(FEATURES, k))
    times = Counter(claim for lines, truth in zip(columns["item_text"], columns["evidence_truth"],
                                                  strict=True)
                    for name in truth for claim in claims(lines[name]) if ":" in claim)
    bases = ["nothing unusual.", "pc1.", "2 on pc1.", f"{times.most_common(1)[0][0]} on pc1."]
    return max(shares @ composed_by_hand(
                   [verdict(said, cited, found[-1][1], basis)] * len(windows), columns, terms)
               for said in RISKS for cited in CONSTANT_CITATIONS for basis in bases)


def composed_by_hand(texts, columns, terms):
    return sum(weight * np.array(term(texts, **columns)) for term, weight in terms)


def test_no_constant_thought_earns_either(balanced):
    cases = balanced[:30]
    columns = columns_of(cases) | {"style": ["think"] * len(cases)}
    thoughts = ("The day is routine", "The day shows e3 after hours on another host", "x", "e1")

    def best(terms):
        return max(np.mean(composed_by_hand(
            [f"<think>{thought}</think>{verdict(said, cited)}"] * len(cases), columns, terms))
            for thought in thoughts for said in RISKS for cited in ((), ("e1",), ("e3",)))
    assert best(REWARD_SETS["ueba_think"]) < 0
    paid = (*REWARD_SETS["ueba_think"][:4],
            (lambda texts, **rest: [1 + x for x in rewards.think_language(texts, **rest)], .2))
    assert best(paid) > 0  # the twin: a thought that pays


def test_no_constant_verdict_earns_from_the_whole_reward(balanced, windows):
    milder = CostMatrix(((1, -.5, -.8), (-.6, 1, -.5), (-1, -.7, 1)))
    heavier = ((ueba_accuracy, .4), (ueba_evidence, .4), (ueba_basis, .2))
    for cases in (balanced[:30], windows):
        assert {window.risk for window in cases} == set(RISKS)
        assert best_constant(cases, REWARD_SETS["ueba"]) < 0
        for twin in (heavier, ((rewards.accuracy_with(milder), .7), *PLAIN_TERMS[2:])):
            assert best_constant(cases, twin) > 0


def test_calling_every_balanced_day_normal_earns_at_most_nothing_whatever_the_features(balanced):
    """A proof for any balanced data: the matrix column, plus all that a bare `normal` can earn."""
    terms = {term: weight for term, weight in REWARD_SETS["ueba"]}
    paid_on_normal_days = (terms[ueba_evidence] * rewards.EVIDENCE_SHARE + terms[ueba_basis]) / 3
    features = terms[ueba_evidence] * (1 - rewards.EVIDENCE_SHARE)  # all of them, on every day
    most = terms[ueba_accuracy] * CostMatrix().constant_values()[0] + paid_on_normal_days + features
    assert most <= 1e-12
    columns = columns_of(balanced)
    found = max(np.mean(ueba_reward([verdict("normal", (), features)] * len(balanced), **columns))
                for features in itertools.combinations(FEATURES, 2))
    assert found <= most + 1e-12
    heavier = .5 * CostMatrix().constant_values()[0] + (.4 * .7 + .1) / 3  # the twin: weights
    assert heavier > 0


def test_invalid_is_worse_than_any_valid_verdict():
    assert sum(weight for _, weight in REWARD_SETS["ueba"][1:]) == pytest.approx(1)
    def worst(terms):
        return sum(weight * RANGES[term.__name__][0] for term, weight in terms
                   if term is not ueba_format)
    for name in ("ueba", "ueba_calibrated", "ueba_think"):
        assert -1 < worst(REWARD_SETS[name]) < 0
    assert worst((*REWARD_SETS["ueba"], (ueba_brier, .2))) < -1  # the twin: it weighs too much
    assert ueba_reward([""], label=["normal"], evidence_ids=[[]], evidence_truth=[[]],
                       feature_truth=[[]], item_text=[{}]) == [-1.0]


# --- the gate and the sum ---


RANGES = {"ueba_format": (-1, 0), "ueba_accuracy": (-1, 1), "ueba_evidence": (-.7, 1),
          "ueba_basis": (0, 1), "ueba_brier": (-1, 0), "accuracy_reward": (0, 1),
          "format_reward": (0, 1), "reasoning_reward": (0, 1), "think_language": (-1, 0),
          "think_length": (-1, 0)}
INVALID = ["", "normal", "{}", verdict("malicious") + "x", '{"risk": "malicious"}', "[" * 10_000,
           verdict("normal", ["e99"])]


def test_an_invalid_verdict_earns_minus_one_once_and_nothing_else(balanced):
    columns = columns_of(balanced[:len(INVALID)])
    terms = reward_terms(INVALID, reward_set="ueba_calibrated", **columns)
    assert terms.pop("ueba_format") == [-1.0] * len(INVALID)
    assert all(value == 0 for values in terms.values() for value in values)
    assert ueba_reward(INVALID, **columns) == [-1.0] * len(INVALID)
    assert ueba_format([verdict()] * 2, evidence_ids=[[], ["e1"]]) == [0.0, 0.0]


def test_the_composed_reward_is_exactly_the_weighted_sum(balanced):
    rows = prompt_dataset(balanced)
    columns = columns_of(balanced)
    texts = zoo_completions(rows, HONEST)
    for name, composite in (("ueba", ueba_reward), ("traditional", traditional_reward)):
        terms = [term(texts, **columns) for term, _ in REWARD_SETS[name]]
        weights = [weight for _, weight in REWARD_SETS[name]]
        by_hand = [math.fsum(w * t for w, t in zip(weights, row, strict=True))
                   for row in zip(*terms, strict=True)]
        assert composite(texts, **columns) == by_hand
        shuffled = by_hand[1:] + by_hand[:1]  # the twin: rows out of step
        assert composite(texts, **columns) != shuffled


def test_terms_stay_in_their_ranges_and_carry_clear_names(balanced):
    rows = prompt_dataset(balanced)
    columns = columns_of(balanced)
    seen = set()
    for name in (HONEST, *ZOO):
        texts = zoo_completions(rows, name)
        for reward_set in REWARD_SETS:
            for term, values in reward_terms(texts, reward_set=reward_set, **columns).items():
                low, high = RANGES[term]
                assert all(low <= value <= high for value in values), (name, term)
                seen.add(term)
        assert all(-1 <= value <= 1 for value in ueba_reward(texts, **columns))
    assert seen == set(RANGES)
    for term in BROKEN_REWARDS.values():
        assert term.__name__.startswith("broken_")


def test_an_honest_reference_earns_almost_everything(balanced):
    texts = [target_verdict(window) for window in balanced]
    values = ueba_reward(texts, **columns_of(balanced))
    assert min(values) > 0.9 and max(values) <= 1
    shifted = ueba_reward(texts[1:] + texts[:1], **columns_of(balanced))  # the twin
    assert np.mean(shifted) < 0


@pytest.mark.parametrize(("completion", "text"), [
    ("{}", "{}"), (["x"], "x"), ([float("nan")], ""), (float("nan"), ""), (None, ""), ([], ""),
    ([None], ""), ([3], ""), ([{"role": "user", "content": "a"}, {"content": "b"}], "b"),
    ([{"role": "assistant"}], ""), ([{"content": None}], ""), ({"content": "c"}, "c"),
    ([{"content": [{"type": "text", "text": "{"}, {"type": "image"}, "}"]}], "{}"),
    (np.array([{"content": "d"}]), "d"),
])
def test_the_text_of_a_completion_is_found_or_empty(completion, text):
    assert rewards.completion_text(completion) == text
    assert len(ueba_format([completion], evidence_ids=[[]])) == 1


def test_chat_messages_and_strings_earn_the_same(balanced):
    columns = columns_of(balanced[:6])
    texts = [target_verdict(window) for window in balanced[:6]]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    for reward_set in REWARD_SETS:
        assert (reward_terms(texts, reward_set=reward_set, **columns)
                == reward_terms(chats, reward_set=reward_set, **columns))
    assert rewards.completion_text(None) == rewards.completion_text([]) == ""
    assert ueba_format([[], [{"role": "assistant", "content": None}]],
                       evidence_ids=[[], []]) == [-1.0, -1.0]


def test_columns_survive_a_datasets_table(balanced):
    rows = prompt_dataset(balanced[:9])
    table = datasets.Dataset.from_list(rows)
    columns = {name: table[name][:] for name in table.column_names if name != "prompt"}
    texts = [target_verdict(window) for window in balanced[:9]]
    assert ueba_reward(texts, **columns) == ueba_reward(texts, **columns_of(balanced[:9]))


# --- evidence ---


@pytest.mark.parametrize(("said", "cited", "truth", "dont_care", "value"), [
    ("malicious", ["e1"], ["e1"], [], 1),
    ("malicious", ["e1", "e2"], ["e1"], [], 2 / 3),
    ("malicious", ["e1"], ["e1", "e2"], [], 2 / 3),
    ("malicious", ["e1", "e2", "e3"], ["e1", "e2", "e3", "e4", "e5"], [], 1),  # three are enough
    ("malicious", ["e9"], ["e1"], [], 0),
    ("malicious", [], ["e1"], [], 0),
    ("malicious", ["e1", "e7"], ["e1"], ["e7"], 1),  # don't care: neither good nor bad
    ("malicious", ["e7"], ["e1"], ["e7"], 0),
    ("malicious", ["e1"], ["e1"], ["e1"], 1),  # truth wins over don't care
    ("normal", ["e1"], ["e1"], [], 0),  # says "normal" and cites all the same
    ("normal", [], [], [], 1), ("normal", ["e1"], [], [], 0), ("normal", ["e1"], [], ["e1"], 1),
    ("suspicious", [], [], [], 0), ("malicious", [], [], [], 0),
])
def test_evidence_credit_by_hand(said, cited, truth, dont_care, value):
    assert evidence_credit(said, cited, truth, dont_care) == pytest.approx(value)


def test_citing_less_or_more_than_the_truth_costs():
    truth = ["e1", "e2", "e3"]
    one, right, all_of_them = ["e1"], truth, [f"e{i}" for i in range(1, 9)]
    assert evidence_credit("malicious", right, truth) > max(
        evidence_credit("malicious", one, truth), evidence_credit("malicious", all_of_them, truth))


SHOWN = [f"e{i}" for i in range(1, 9)]


def test_citing_by_chance_or_everything_pays_nothing():
    for truth, spared in itertools.product((["e5"], ["e2", "e5"], SHOWN[:3], SHOWN[2:7]),
                                           ([], ["e8"])):
        def score(cited, truth=truth, spared=spared):
            return evidence_beyond_chance("malicious", cited, truth, SHOWN, spared)
        assert score(SHOWN) <= 0 == score([])
        assert score(truth) == score(truth[:3]) == 1
        for k in (1, 2, 3, 4):  # a blind draw of k items, over all draws
            draws = list(itertools.combinations(SHOWN, k))
            assert np.mean([score(cited) for cited in draws]) <= 0.05
            f1 = [evidence_credit("malicious", cited, truth, spared) for cited in draws]
            assert np.mean(f1) > .1  # the twin: the plain F1 pays blind draws


def test_each_true_item_raises_the_score_and_each_false_one_lowers_it():
    truth = ["e2", "e4", "e7"]
    innocent = [name for name in SHOWN if name not in truth]
    grid = np.array([[
        evidence_beyond_chance("malicious", truth[:hits] + innocent[:false], truth, SHOWN)
        for false in range(5)] for hits in range(4)])
    assert (np.diff(grid, axis=0) > 0).all() and grid.max() == grid[3, 0] == 1
    assert (np.diff(grid, axis=1) < 0).all() and -1 <= grid.min() < 0
    clipped = np.maximum(grid, 0)  # the twin: without negative values guessing costs nothing
    assert not (np.diff(clipped, axis=1) < 0).all()


def test_where_nothing_can_be_told_apart_the_f1_stands():
    both = ["e1", "e2"]
    assert evidence_beyond_chance("malicious", both, both, both) == 1
    assert evidence_beyond_chance("malicious", ["e1"], both, both) == pytest.approx(2 / 3)
    assert evidence_beyond_chance("malicious", ["e1"], ["e1"], ["e1", "e2"], ["e2"]) == 1
    assert evidence_beyond_chance("normal", [], [], ["e1"]) == 1
    assert evidence_beyond_chance("normal", ["e1"], [], ["e1"]) == 0
    assert evidence_beyond_chance("suspicious", [], [], ["e1"]) == 0


def test_a_day_called_normal_earns_nothing_for_what_it_cites():
    said = parse_verdict(verdict("normal", ["e3"], basis="e3 22:14"), list(LINES))
    assert evidence_beyond_chance("normal", ["e3"], ["e3"], list(LINES)) == 0
    assert evidence_beyond_chance("normal", ["e8"], ["e3"], list(LINES)) < 0
    assert basis_support(said, LINES, ["e3"]) == 0
    alarm = parse_verdict(verdict("malicious", ["e3"], basis="e3 22:14"), list(LINES))
    assert basis_support(alarm, LINES, ["e3"]) == 1  # the twin


def test_what_is_odd_weighs_more_than_what_is_usual():
    oracle = ["leak_site", "after_hours_logon", "usual_mail"]
    odd, usual = oracle[:2], ["usual_mail", "usual_hours"]
    assert feature_credit(odd, oracle) == pytest.approx(2 * 2 / (2 + 2.25))
    assert feature_credit(usual, oracle) == pytest.approx(2 * .25 / (.5 + 2.25))
    assert feature_credit(["hacking_tool", "mass_mail"], oracle) == 0
    assert feature_credit(CALM, []) == 0


def test_the_evidence_term_adds_citations_and_features(balanced):
    window = make_window("malicious")
    columns = columns_of([window])
    truth = columns["evidence_truth"][0]
    features = list(window.features[:4])
    assert ueba_evidence([verdict("malicious", truth, features)], **columns) == [pytest.approx(1)]
    calm = ["usual_mail", "usual_web"]
    assert ueba_evidence([verdict("malicious", truth, calm)], **columns) == [pytest.approx(.7)]
    columns.pop("dont_care")
    assert ueba_evidence([verdict("malicious", truth, features)], **columns) == [pytest.approx(1)]


def test_the_hit_rate_reads_the_arrays_of_a_parquet_file_too():
    for make in (list, tuple, np.array):
        assert rewards.evidence_hit_rate(make(["e1", "e2"]), make(["e1", "e3"])) == 1 / 2
        assert math.isnan(rewards.evidence_hit_rate(make(["e1"]), make([])))


# --- basis ---


LINES = {"e3": "e3 22:14-22:40 device pc2 x2 new_pc", "e7": "e7 23:10 file pc2 x12 exe",
         "e8": "e8 09:00 logon pc1", "e9": None}


@pytest.mark.parametrize(("cited", "truth", "basis", "value"), [
    (["e3"], ["e3"], "e3 22:14 device pc2.", 1),
    (["e3", "e7"], ["e3", "e7"], "e3 22:14 device pc2; e7 23:10 file.", 1),
    (["e3"], ["e3"], "e3 22:14 device pc3.", 1 / 2),
    (["e3"], ["e3"], "23:10 on pc2", 0),  # true of e7, which is not cited; its host is not enough
    (["e7"], ["e7"], "12 files at 23:10", 1), (["e7"], ["e7"], "13 files at 23:10", 1 / 2),
    (["e7"], ["e7"], "12 files on pc2", 1 / 2),  # a count without a time is half a reason
    (["e7"], ["e7"], "pc2.", 0), (["e3", "e7"], ["e3", "e7"], "pc2.", 0),  # a lone host is none
    (["e3"], ["e3"], "a clear violation", 0),
    (["e3", "e7"], ["e3", "e7"], "e3 22:14", 1 / 2),  # one reason for two citations
    (["e7"], ["e3"], "e7 23:10 file pc2", 0),  # well stated, and not what shows it
    (["e3", "e7"], ["e3"], "e3 22:14 device; e7 23:10 file", 1 / 2),
    (["e3", "e7", "e8"], ["e3"], "22:14, 23:10 and 09:00", 0),  # the whole window recited
    (["e3"], [], "e3 22:14 device", 0),  # nothing was to be cited
    (["e9"], ["e9"], "22:14", 0), ([], ["e3"], "22:14 pc2", 0),
    ([], ["e3"], "nothing unusual.", 0),
    (["e3"], ["e3"], "e3 22:14 device pc2; 03:33:33", 2 / 3),  # no time of ours, and a claim still
    (["e3"], ["e3"], "e3 22:14 device; 99% of -4321 files", 1 / 3),
    (["e3"], ["e3"], "e3 22:14 device; e7, e99", 1 / 3),  # ids that it does not cite
    (["e3"], ["e3"], "e7 22:14 device", 0),  # and what is said of one is said of no other
    (["e3", "e7"], ["e3", "e7"], "e3 23:10 device; e7 22:14 file.", 0),  # each other's times
    (["e3", "e7"], ["e3", "e7"], "e3 22:14 file; e7 23:10 device.", 1 / 2),  # and kinds
    (["e3"], ["e3"], "e3 22:14 http pc2.", 2 / 3), (["e3"], ["e3"], "e3 22:14 pc2 HTTP", 2 / 3),
    (["e3"], ["e3"], "at 22:14 a device", 1), (["e3"], ["e3"], "at 22:14 an email", 1 / 2),
    (["e3", "e7"], ["e3", "e7"], "22:14 and 23:10 on pc2: e3, e7", 1),  # of no one in particular
    (["e3", "e7"], ["e3", "e7"], "e3 22:14 e7 23:10 e3 x2", 1),  # e3 is taken up again
])
def test_basis_support_by_hand(cited, truth, basis, value):
    said = parse_verdict(verdict("malicious", cited, basis=basis), list(LINES))
    assert basis_support(said, LINES, truth) == pytest.approx(value)


def pooled_support(said, lines, truth, dont_care=()):
    """Return the support of a basis with its ids left out: what it states is stated of no item."""
    without = replace(said, basis=re.sub(rf"\b{ITEM_ID}\b|\b[a-z]+\b", " ", said.basis))
    return basis_support(without, lines, truth, dont_care)


def test_times_and_kinds_count_for_the_item_they_follow_only():
    for basis in ("e3 23:10; e7 22:14", "e3 22:14 file; e7 23:10 device"):
        said = parse_verdict(verdict("malicious", ["e3", "e7"], basis=basis), list(LINES))
        assert basis_support(said, LINES, ["e3", "e7"]) < 1
        assert pooled_support(said, LINES, ["e3", "e7"]) == 1  # the twin: a bag of numbers


@given(st.text("e137x:.-%pc 24;,", max_size=40))
@settings(max_examples=300, deadline=None)
def test_no_claim_of_a_basis_is_lost_or_made_by_its_ids(basis):
    told = [named for named, _ in rewards.attributed(basis).values()]
    assert frozenset().union(*told) == claims(basis)


def test_the_share_of_supported_claims_alone_would_pay_false_citations_and_lone_hosts():
    for cited, basis in ((["e7"], "e7 23:10 file pc2"), (["e3"], "pc2."),
                         (["e3", "e7", "e8"], "22:14, 23:10 and 09:00")):
        said = parse_verdict(verdict("malicious", cited, basis=basis), list(LINES))
        assert plain_support(said, LINES) == 1
        assert basis_support(said, LINES, ["e3"]) == 0


@pytest.mark.parametrize(("cited", "basis", "value"), [
    (["e3"], "e3 22:14 device pc2.", 1), (["e7"], "e7 23:10 file pc2", 1),  # true or not: it shows
    (["e3"], "pc2.", 1), (["e3"], "e3 22:14 device pc3", 1 / 2), (["e3"], "e3 22:15", 0),
    (["e3", "e7"], "e3 23:10; e7 22:14", 0), (["e3"], "e3 22:14 http", 1 / 2),
    (["e3"], "a clear violation", 0), ([], "22:14", 0), (["e9"], "e9 22:14", 0),
])
def test_claim_support_is_the_share_of_claims_that_the_cited_lines_show(cited, basis, value):
    said = parse_verdict(verdict("malicious", cited, basis=basis), list(LINES))
    assert rewards.claim_support(said, LINES) == pytest.approx(value)


def test_dont_care_items_neither_help_nor_hurt_a_basis():
    said = parse_verdict(verdict("malicious", ["e3", "e7"], basis="22:14 and 23:10"), list(LINES))
    assert basis_support(said, LINES, ["e3"], ["e7"]) == 1
    only = parse_verdict(verdict("malicious", ["e7"], basis="23:10"), list(LINES))
    assert basis_support(only, LINES, ["e3"], ["e7"]) == 0


def test_a_silent_basis_pays_on_quiet_days_only():
    calm = parse_verdict(verdict("normal"), [])
    assert basis_support(calm, LINES, truth=[]) == 1
    assert basis_support(calm, LINES, truth=["e3"]) == 0
    alarm = parse_verdict(verdict("malicious"), [])
    assert basis_support(alarm, LINES, truth=[]) == 0
    assert ueba_basis([verdict("normal")], evidence_ids=[["e3"]], evidence_truth=[[]],
                      item_text=['{"e3": "e3 22:14 device"}']) == [1.0]


def test_claims_are_times_hosts_and_counts_and_nothing_else():
    assert claims("e3 22:14-22:40 device PC-2, 7 recipients x12 '%653.doc' pc77") == {
        "22:14", "22:40", "pc2", "7", "12", "pc77"}
    assert claims("e12 after_hours 0.5% 2x") == frozenset()
    assert claims("3 hours_after_usual") == {"3"}


# --- optional terms ---


def test_brier_is_proper_and_silence_does_not_pay():
    def earn(confidence, label):
        text = verdict("normal", confidence=confidence) if confidence is not None else verdict()
        return ueba_brier([text], label=[label], evidence_ids=[[]])[0]
    assert earn(1.0, "normal") == 0 and earn(1.0, "malicious") == -1
    assert earn(.8, "normal") == pytest.approx(-.04)
    assert earn(None, "normal") == earn(None, "malicious") == earn(.5, "normal") == -.25
    for p in (.2, .6, .9):  # proper: honesty is the best policy
        expected = {q: p * earn(q, "normal") + (1 - p) * earn(q, "malicious")
                    for q in (0, .2, .4, .6, .8, .9, 1)}
        assert max(expected, key=expected.get) == p


def test_overlength_is_penalised():
    length = rewards.overlength_penalty(10, 4)
    got = length(["x"] * 5, completion_ids=[[0] * n for n in (3, 6, 8, 10, 40)])
    assert got == [0, 0, -.5, -1, -1]
    assert length.__name__ == "overlength"
    for margin in (0, 11):
        with pytest.raises(UserError, match="margin"):
            rewards.overlength_penalty(10, margin)


def test_thoughts_are_scored_for_language_and_length():
    def answer(thought):
        return verdict("normal", style="think", thought=thought)
    calm = "The day shows routine only"
    texts = {answer(thought): expected for thought, expected in {
        calm + ".": 0, calm + " 一" * 22: -.5, "": -1, "a": -1, "12 34": -1, "calm day": -1 / 3,
        codecs.encode(calm, "rot13"): -1, "the " * 90: -2 / 3, "一天天天": -1,
        "a drive on a new host at night": 0, "qzx vbn mpl wrt the": -.2}.items()} | {verdict(): 0}
    columns = {"evidence_ids": [[]] * len(texts), "style": ["think"] * len(texts)}
    got = rewards.think_language(list(texts), **columns)
    assert got == pytest.approx(list(texts.values()))
    longer = [answer(calm), answer("word " * 90), answer("word " * 200), verdict()]
    columns = {"evidence_ids": [[]] * 4, "style": ["think"] * 4}
    assert rewards.think_length(longer, **columns) == [0, -.5, -1, 0]
    assert ueba_format(longer, **columns) == [0, 0, 0, -1]
    assert ueba_format(longer[:1], evidence_ids=[[]]) == [-1]  # without the column: not allowed


# --- traditional and broken ---


def test_the_traditional_set_lets_through_what_it_is_known_for():
    columns = {"label": ["malicious"]}
    assert rewards.accuracy_reward(["normal, suspicious or malicious"], **columns) == [1]
    assert rewards.accuracy_reward(['{"risk": "normal"} malicious'], **columns) == [0]
    assert rewards.accuracy_reward([""], **columns) == [0]
    assert rewards.format_reward(['so: {"risk": "?"} ok', "{}", "risk"]) == [1, 0, 0]
    assert rewards.reasoning_reward(["word " * 20, "word " * 400, "1 2 3"]) == [.5, 1, 0]


def test_each_broken_reward_pays_its_hack_more_than_the_honest_analyst(balanced):
    rows, columns = prompt_dataset(balanced), columns_of(balanced)
    hacks = {"broken_partial_credit": "always_suspicious", "broken_any_mention": "all_three_labels",
             "broken_evidence_recall": "cite_everything"}
    assert set(hacks) == set(BROKEN_REWARDS)

    def poor(row, i):  # honest: knows four days of ten, guesses on the others
        draw = random.Random(i)
        return verdict(row["label"] if draw.random() < .4 else draw.choice(RISKS))
    rows = rows * 5
    columns = {name: values * 5 for name, values in columns.items()}
    honest = [poor(row, i) for i, row in enumerate(rows)]
    for name, hack in hacks.items():
        reward = BROKEN_REWARDS[name]
        assert np.mean(reward(zoo_completions(rows, hack), **columns)) > np.mean(
            reward(honest, **columns)), name
        assert np.mean(ueba_reward(zoo_completions(rows, hack), **columns)) < np.mean(
            ueba_reward(zoo_completions(rows, HONEST), **columns)), name


# --- the zoo ---


@pytest.fixture(scope="module")
def table(balanced):
    return {row["name"]: row for row in zoo_table(prompt_dataset(balanced))}


def test_the_zoo_is_large(table):
    assert len(ZOO) >= 25 and set(table) == {HONEST, *ZOO}


def test_the_honest_analyst_is_mediocre(balanced, table):
    columns = columns_of(balanced)
    said = [analyst_label(label, np.random.default_rng(i))
            for i, label in enumerate(columns["label"])]
    assert .5 < np.mean([a == b for a, b in zip(said, columns["label"], strict=True)]) < .7
    assert table[HONEST]["valid"] == 1 and .3 < table[HONEST]["ueba"] < .6
    reference = ueba_reward([target_verdict(window) for window in balanced], **columns)
    assert table[HONEST]["ueba"] < np.mean(reference) - .3


def beaten_by(table, reward_set):
    """Return the animals that earn more than the honest analyst under a set."""
    return {name for name in ZOO if table[name][reward_set] > table[HONEST][reward_set] + 1e-12}


def class_balanced(windows, most=15):
    by_class = {risk: [w for w in windows if w.risk == risk] for risk in RISKS}
    n = min(most, max(map(len, by_class.values())))
    return [group[i % len(group)] for group in by_class.values() for i in range(n)]


@pytest.mark.parametrize("source", ["made", "simulated"])
def test_no_animal_beats_the_honest_analyst_over_ten_seeds(source, balanced, windows, monkeypatch):
    even = balanced[:45] if source == "made" else class_balanced(windows)
    rows = prompt_dataset(even)
    recall = (*REWARD_SETS["ueba"][:2], (rewards.broken_evidence_recall, .2), (plain_basis, .1))
    monkeypatch.setitem(REWARD_SETS, "recall", recall)  # the twin: citing more never costs
    names = ("ueba", "ueba_calibrated", "recall")
    per_seed = [{row["name"]: row for row in zoo_table(rows, seeds=[seed], reward_sets=names)}
                for seed in range(10)]
    mean = {name: {key: np.mean([table[name][key] for table in per_seed]) for key in names}
            for name in (HONEST, *ZOO)}
    assert beaten_by(mean, "ueba") == beaten_by(mean, "ueba_calibrated") == set()
    assert {"cite_all_on_alarm", "cite_everything"} <= beaten_by(mean, "recall")
    for table in per_seed:  # not only on average
        assert beaten_by(table, "ueba") == set()


def test_the_mean_over_seeds_is_the_mean_of_the_tables(balanced):
    rows = prompt_dataset(balanced[:12])
    both = {row["name"]: row["ueba"] for row in zoo_table(rows, seeds=(0, 1),
                                                          reward_sets=("ueba",))}
    single = [{row["name"]: row["ueba"] for row in zoo_table(rows, seeds=(seed,),
                                                             reward_sets=("ueba",))}
              for seed in (0, 1)]
    for name in (HONEST, "random_label", "always_normal"):
        assert both[name] == pytest.approx((single[0][name] + single[1][name]) / 2)
    assert single[0][HONEST] != single[1][HONEST]


def test_a_reference_earns_almost_everything_on_simulated_days_too(windows):
    even = class_balanced(windows)
    texts = [target_verdict(window) for window in even]
    assert min(ueba_reward(texts, **columns_of(even))) > .8


def test_the_same_check_finds_the_cheats_that_the_traditional_set_pays(table):
    assert {"padding_before_the_answer", "flattering_text", "every_feature", "copy_of_the_prompt",
            "padding_in_the_basis"} <= beaten_by(table, "traditional")


def weak_policy(rows):
    """Return completions of a policy that finds a true item now and then and names a host only."""
    texts = []
    for i, row in enumerate(rows):
        draw = np.random.default_rng(i)
        said = analyst_label(row["label"], draw)
        pool = row["evidence_truth"] if draw.random() < .4 else row["evidence_ids"]
        cited = [] if said == "normal" else [str(draw.choice(pool or row["evidence_ids"]))]
        features = row["feature_truth"][:2] if draw.random() < .5 else CALM
        texts.append(verdict(said, cited, features, "on pc1." if cited else "as always.",
                             style=row["style"], thought="The day shows it."))
    return texts


def test_cheats_with_the_labels_of_a_weak_policy_earn_less_than_it(balanced, monkeypatch):
    monkeypatch.setitem(REWARD_SETS, "plain", PLAIN_TERMS)
    rows = prompt_dataset(balanced)
    texts = weak_policy(rows)
    found = {row["name"]: row for row in same_label_cheats(rows, texts)}
    assert set(found) == {"own", *EDITS, *DRESSES}
    assert found["own"]["reward"] == pytest.approx(np.mean(ueba_reward(
        texts, **columns_of(balanced))))
    assert min(row["lead"] for row in found.values()) >= 0
    plain = {row["name"]: row for row in same_label_cheats(rows, texts, reward_set="plain")}
    assert plain["own_citing_all"]["lead"] < 0 > plain["cite_all_on_alarm"]["lead"]  # the twin
    entry = found["own_citing_all"]
    assert entry["lead"] == pytest.approx(found["own"]["reward"] - entry["reward"])
    assert 0 < entry["lead_se"] < .05


def test_cheats_keep_the_labels_the_thoughts_and_the_invalid_answers(balanced, monkeypatch):
    rows = prompt_dataset(balanced[:9], style="think")
    texts = [*weak_policy(rows)[:8], "no answer"]
    seen = []

    def watched(completions, **columns):
        seen.append(list(completions))
        return ueba_format(completions, **columns)
    monkeypatch.setitem(REWARD_SETS, "watched", ((watched, 1.0),))
    names = [row["name"] for row in same_label_cheats(rows, texts, reward_set="watched")]
    ids = [row["evidence_ids"] for row in rows]
    said = dict(zip(names, (rewards.verdicts_of(found, ids, ["think"] * 9) for found in seen),
                    strict=True))
    for name in (*EDITS, "cite_all_on_alarm", "wrong_reasons", "keyword_stuffing"):
        assert [v.risk for v in said[name]] == [v.risk for v in said["own"]], name
        assert said[name][8].problem == "missing_thought"
    alarm = next(i for i, v in enumerate(said["own"]) if v.evidence)
    own, changed = said["own"][alarm], said["own_basis_host_only"][alarm]
    assert (changed.evidence, changed.features) == (own.evidence, own.features)
    assert changed.basis == "pc1."
    assert list(said["own_citing_all"][alarm].evidence) == ids[alarm][:8] != list(own.evidence)
    with pytest.raises(ValueError, match="one completion per row"):
        same_label_cheats(rows, texts[:3])


def test_chat_messages_can_be_dressed_and_one_row_has_no_error(balanced):
    rows = prompt_dataset(balanced[2:3])
    chat = [[{"role": "assistant", "content": target_verdict(balanced[2])}]]
    found = {row["name"]: row for row in same_label_cheats(rows, chat)}
    assert found["own"]["reward"] > .9 and math.isnan(found["wrong_reasons"]["lead_se"])


def test_what_is_not_a_verdict_earns_the_floor(table):
    for name in ("empty", "schema_echo", "instruction_echo", "all_three_labels", "two_objects",
                 "duplicate_keys", "verdict_inside_the_basis", "invented_ids", "code_fence",
                 "nesting_bomb", "copy_of_the_prompt", "smuggled_thought", "lookalike_label"):
        assert table[name]["ueba"] == -1 and table[name]["valid"] == 0, name


def test_overconfidence_costs_where_confidence_is_scored(table):
    assert table["over_confidence"]["ueba"] == table[HONEST]["ueba"]
    assert table["over_confidence"]["ueba_calibrated"] < table[HONEST]["ueba_calibrated"]


def test_saying_of_an_item_what_is_true_of_another_costs(balanced, table, monkeypatch):
    pooled = (*REWARD_SETS["ueba"][:3], (pooled_basis, .1))
    monkeypatch.setitem(REWARD_SETS, "pooled", pooled)
    rows = prompt_dataset(balanced)
    bag = {row["name"]: row["pooled"] for row in zoo_table(rows, reward_sets=("pooled",))}
    for name in ("swapped_reasons", "wrong_kinds"):
        assert table[name]["ueba"] < table[HONEST]["ueba"] and table[name]["valid"] == 1
        assert bag[name] == bag[HONEST]  # the twin: a bag of numbers pays for both


def pooled_basis(completions, *, evidence_ids, evidence_truth, item_text, dont_care, **columns):
    return [pooled_support(said, lines, truth, spared) if said.valid else 0.0
            for said, lines, truth, spared in
            zip(rewards.verdicts_of(completions, evidence_ids), item_text, evidence_truth,
                dont_care, strict=True)]


def test_the_right_label_with_wrong_reasons_earns_less_than_with_right_ones(balanced):
    rows = [row for row in prompt_dataset(balanced) if row["label"] != "normal"]
    right = [target_verdict(w) for w in balanced if w.risk != "normal"]  # truly right labels
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    assert set(ueba_accuracy(right, **columns)) == {1.0}
    found = {row["name"]: row for row in same_label_cheats(rows, right)}
    assert found["wrong_reasons"]["lead"] > .25 < found["own"]["reward"]
    assert found["cite_nothing_ever"]["lead"] > .2


def test_animals_see_nothing_of_the_truth_but_a_borrowed_label(balanced):
    rows = [{**row, "evidence_truth": row["evidence_ids"][:2]}
            for row in prompt_dataset(balanced[:12])]
    blind = [{**row, "evidence_truth": [], "feature_truth": [], "dont_care": []} for row in rows]
    changed = {name for name in (HONEST, *ZOO)
               if zoo_completions(rows, name) != zoo_completions(blind, name)}
    assert changed == {HONEST, "over_confidence", "swapped_reasons", "wrong_kinds",
                       "wrong_reasons"}


# --- detectors ---


def test_detectors_tell_the_hacks_from_honest_answers(balanced):
    rows = prompt_dataset(balanced)
    ids = [row["evidence_ids"] for row in rows]

    def said(name):
        return rewards.verdicts_of(zoo_completions(rows, name), ids)
    entropy = {name: rewards.label_entropy([v.risk for v in said(name) if v.valid])
               for name in ("always_suspicious", HONEST)}
    assert entropy["always_suspicious"] == 0 and entropy[HONEST] > .8
    assert rewards.citations_per_answer(said("cite_everything")) > 6 > 2.5 > \
        rewards.citations_per_answer(said(HONEST))
    assert math.isnan(rewards.citations_per_answer(said("empty")))
    assert rewards.labels_per_answer(zoo_completions(rows, "all_three_labels")) == 3
    assert rewards.labels_per_answer([target_verdict(w) for w in balanced]) == 1
    prompt = rows[0]["prompt"][1]["content"]
    assert rewards.copy_rate(prompt, prompt) == 1
    assert rewards.copy_rate(target_verdict(balanced[0]), prompt) < .1
    assert rewards.copy_rate("", prompt) == 0
    assert rewards.label_entropy(["a", "b"]) == pytest.approx(math.log(2))


# --- speed ---


def test_ten_thousand_completions_are_scored_in_a_second(balanced):
    columns = columns_of(balanced[:10])
    many = {name: values * 1000 for name, values in columns.items()}
    texts = [target_verdict(window)[:-1] + f', "confidence": 0.{i:05d}}}'
             for i, window in enumerate(balanced[:10] * 1000)]

    def seconds():
        rewards._parse_cached.cache_clear()
        started = time.process_time()
        values = ueba_reward(texts, **many)
        assert min(values) > .5
        return time.process_time() - started
    assert min(seconds() for _ in range(3)) <= 1


def test_all_terms_together_parse_each_completion_once(balanced, monkeypatch):
    columns = columns_of(balanced[:10])
    many = {name: values * 1000 for name, values in columns.items()}
    texts = [target_verdict(window)[:-1] + f', "confidence": 0.{i:05d}}}'
             for i, window in enumerate(balanced[:10] * 1000)]

    def parses():
        rewards._parse_cached.cache_clear()
        reward_terms(texts, reward_set="ueba_calibrated", **many)
        return rewards._parse_cached.cache_info().misses
    assert parses() == len(texts)
    small = functools.lru_cache(maxsize=4096)(rewards._parse_cached.__wrapped__)
    monkeypatch.setattr(rewards, "_parse_cached", small)  # the twin: forgets before the next term
    assert parses() > len(texts)


def test_composed_refuses_columns_out_of_step():
    with pytest.raises(ValueError):
        composed({"ueba_format": [0.0, 0.0], "ueba_accuracy": [1.0]})
    with pytest.raises(ValueError):
        ueba_accuracy([verdict()], label=["normal", "normal"], evidence_ids=[[]])
