"""Credit within a verdict: places found in tokens, values as the critic gives them, shares.

Monte Carlo values are held against exact ones: of the policy of eleven words all completions can be
written down.
"""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tiny import policy, probe_policy
from ueba_helpers.rl import credit
from ueba_helpers.rl.policies import make_critic, seeded_torch
from ueba_helpers.task.rewards import TRAINABLE, ueba_reward
from ueba_helpers.task.verdicts import render_verdict

VERDICT = render_verdict(evidence=["e1"], features=["usual_hours", "own_workstation"],
                         basis="e1 08:00 logon pc1.", risk="suspicious")


def rows(count=3):
    return [{"prompt": [{"role": "user", "content": "red blue green"[: 4 * (i + 1)]}],
             "window_id": f"w{i}", "user": f"u{i}", "day": "2010-07-01", "label": "suspicious",
             "evidence_ids": ["e1", "e2"], "evidence_truth": ["e1"], "dont_care": [],
             "feature_truth": ["usual_hours", "own_workstation"],
             "item_text": {"e1": "e1 08:00 logon pc1", "e2": "e2 09:00 http pc1"},
             "style": "evidence_first"} for i in range(count)]


def draw(**changes):
    return credit.sample(*policy(), **{"rows": rows(), "group_size": 4, "seed": 0,
                                       "max_new_tokens": 12, **changes})


def written(*texts, rewards=None):
    """Return a sample of these texts, cut into pieces of seven characters."""
    pieces = [[text[i:i + 7] for i in range(0, len(text), 7)] for text in texts]
    width = max(map(len, pieces))
    mask = torch.tensor([[float(t < len(row)) for t in range(width)] for row in pieces])
    rewards = torch.arange(len(texts)) if rewards is None else torch.tensor(rewards)
    return credit.Sample(rows=[], prompts=[], ids=[[0] * len(row) for row in pieces],
                         pieces=pieces, rewards=rewards.double(), mask=mask.double(),
                         pad_token_id=0)


@pytest.mark.parametrize("length", [1, 2, 5, 11])
def test_places_are_found_however_the_text_is_cut_into_tokens(length):
    pieces = [VERDICT[i:i + length] for i in range(0, len(VERDICT), length)]
    first, evidence, risk, last = credit.verdict_places([*pieces, "<end>"])
    assert (first, last) == (0, len(pieces))
    before = "".join(pieces[:evidence])
    assert '"e1"]' in before + pieces[evidence] and '"features' not in before
    before = "".join(pieces[:risk])
    assert "susp" not in before and "s" in pieces[risk]
    assert '"risk": "s' in before + pieces[risk]


def test_places_are_found_where_the_risk_is_said_first():
    verdict = render_verdict(evidence=["e1"], features=["usual_hours", "own_workstation"],
                             basis="e1 08:00 logon pc1.", risk="suspicious", style="risk_first")
    pieces = [verdict[i:i + 3] for i in range(0, len(verdict), 3)]
    first, evidence, risk, last = credit.verdict_places(pieces)
    assert first == 0 < risk < evidence < last == len(pieces) - 1
    assert '"risk": "s' in "".join(pieces[:risk + 1]) and "susp" not in "".join(pieces[:risk])
    assert '"e1"]' in "".join(pieces[:evidence + 1])
    assert '"features' not in "".join(pieces[:evidence])


@pytest.mark.parametrize("text", ["", "no", '{"risk": "normal", "features": []}',
                                  '{"features": [], "risk": "', '{"features": []}'])
def test_what_is_no_verdict_has_no_places(text):
    assert credit.verdict_places([text]) is None


def test_groups_share_a_prompt_and_are_rewarded_as_in_training():
    drawn = draw()
    assert drawn.prompts[0] == drawn.prompts[3] != drawn.prompts[4]
    assert drawn.mask.sum(1).tolist() == [len(ids) for ids in drawn.ids]
    _, tokenizer = policy()
    texts = tokenizer.batch_decode(drawn.ids, skip_special_tokens=True)
    columns = {name: [row[name] for row in drawn.rows] for name in drawn.rows[0]}
    assert drawn.rewards.tolist() == ueba_reward(texts, **columns)
    assert draw().ids == drawn.ids != draw(seed=1).ids


@pytest.mark.parametrize("rewards", sorted(TRAINABLE))
def test_rewards_and_temperature_are_those_of_the_run(rewards):
    drawn, columns = draw(reward=credit.trained_on(rewards), temperature=0.5), {}
    for name in drawn.rows[0]:
        columns[name] = [row[name] for row in drawn.rows]
    _, tokenizer = policy()
    texts = tokenizer.batch_decode(drawn.ids, skip_special_tokens=True)
    expected = sum(weight * np.array(term(texts, **columns)) for term, weight in TRAINABLE[rewards])
    np.testing.assert_allclose(drawn.rewards, expected, atol=1e-12)
    assert draw().ids != drawn.ids, "another temperature, other completions"
    assert draw(temperature=0.5).ids == drawn.ids, "what is paid changes nothing that is drawn"


def test_another_set_of_rewards_pays_the_same_completions_otherwise():
    paid = [draw(reward=credit.trained_on(name)).rewards for name in ("traditional", "ueba")]
    assert (paid[0] != paid[1]).any()


def test_values_are_the_critics_whatever_the_batch():
    drawn = draw()
    critic = make_critic(policy()[0])
    assert (credit.values(critic, drawn) == 0).all(), "the head starts at zero"
    with seeded_torch(0), torch.no_grad():
        critic.head.weight.normal_()
    together, alone = (credit.values(critic, drawn, batch_size=size) for size in (64, 1))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together[0, 0] != together[4, 0], "another prompt has another value"
    assert (together[drawn.mask == 0] == 0).all()
    other_prompts = credit.Sample(**{**vars(drawn), "prompts": drawn.prompts[::-1]})
    assert not torch.allclose(credit.values(critic, other_prompts), together, atol=1e-3)


def test_a_baseline_that_knows_the_reward_from_one_place_on_explains_it_there():
    drawn = written(*[VERDICT] * 6)
    known = drawn.rewards.unsqueeze(1).repeat(1, drawn.mask.size(1))
    place = drawn.places[0, 2]
    late = known.clone()
    late[:, :place] = 0.3
    assert credit.explained_by_place(late, drawn) == pytest.approx([0, 0, 1, 1])
    late[:, :place + 1] = 0.3  # one token later it is too late for the third place
    assert credit.explained_by_place(late, drawn) == pytest.approx([0, 0, 0, 1])
    assert max(credit.explained_by_place(-known, drawn)) < -1


def test_completions_without_a_risk_are_left_out():
    drawn = written(VERDICT, "no", VERDICT, rewards=[0.0, -9.0, 1.0])
    known = drawn.rewards.unsqueeze(1).repeat(1, drawn.mask.size(1))
    known[1] = 5.0  # far off, where nothing is counted
    assert credit.explained_by_place(known, drawn) == pytest.approx([1, 1, 1, 1])
    alone = credit.explained_by_place(known[:2], written(VERDICT, "no"))
    assert len(alone) == 4 and all(math.isnan(share) for share in alone)


# -- exact credit by continuations ----------------------------------------------------------------

LONGEST, DRAWS = 3, 400


def word_rewards(texts, label, **columns):
    """Depends on every word, on their order and on the row."""
    worth = {"red": 1.0, "yes": 0.5, "no": -1.0, "blue": -0.5}
    return [sum(worth.get(word, 0.1) * (1 + k) for k, word in enumerate(text.split()))
            * (1 if mine == "suspicious" else -2) for text, mine in zip(texts, label, strict=True)]


@functools.cache
def probe_sample():
    """Two prompts, three completions each, of up to three words of eleven."""
    two = rows(2)
    two[1]["label"], two[1]["prompt"] = "normal", [{"role": "user", "content": "blue"}]
    model, tokenizer = probe_policy()
    return credit.sample(model, tokenizer, two, group_size=3, seed=1, max_new_tokens=LONGEST,
                         reward=word_rewards)


@torch.no_grad()
def enumerated_value(row: int, length: int) -> float:
    """Return the value of a completion's prefix as a sum over all its continuations."""
    model, tokenizer = probe_policy()
    drawn, words = probe_sample(), model.config.vocab_size

    def value(prefix):
        if len(prefix) == LONGEST or (prefix and prefix[-1] == tokenizer.eos_token_id):
            text = tokenizer.decode(prefix, skip_special_tokens=True)
            return word_rewards([text], [drawn.rows[row]["label"]])[0]
        logits = model(torch.tensor([drawn.prompts[row] + prefix])).logits[0, -1]
        return sum(p * value([*prefix, word])
                   for word, p in enumerate(logits.double().softmax(-1).tolist()))

    assert words == 11
    return value(drawn.ids[row][:length])


def every_state():
    """Return the states before each token, the last of them behind the end; -1 beyond it."""
    lengths = torch.tensor([len(ids) for ids in probe_sample().ids]).unsqueeze(1)
    tokens = torch.arange(LONGEST + 1).expand(len(lengths), -1)
    return torch.where(tokens <= lengths, tokens, -1)


@functools.cache
def enumerated_values():
    tokens = every_state()
    return torch.tensor([[enumerated_value(row, t) if t >= 0 else math.nan
                          for t in line] for row, line in enumerate(tokens.tolist())])


def drawn_values(tokens=None, **changes):
    drawn = changes.pop("drawn", probe_sample())
    return credit.state_values(*probe_policy(), drawn, every_state() if tokens is None else tokens,
                               **{"draws": DRAWS, "seed": 0, "max_new_tokens": LONGEST,
                                  "reward": word_rewards, "batch_size": 8, **changes})


def are_the_enumerated_values(values_of):
    values, errors = values_of()
    exact = enumerated_values()
    assert torch.equal(values.isnan(), exact.isnan())
    seen = ~exact.isnan()
    assert ((values - exact)[seen].abs() <= 4.5 * errors[seen] + 1e-5).all()
    assert exact[seen].std() > 5 * errors[seen].max(), "states differ by more than the error"


def one_later():
    values, errors = drawn_values()
    return values.roll(-1, 1), errors


def prompts_swapped():
    drawn = probe_sample()
    return replace(drawn, rows=drawn.rows[::-1])


@pytest.mark.parametrize("broken", [
    one_later, lambda: drawn_values(torch.where(every_state() >= 0, 0, -1)),
    lambda: drawn_values(drawn=prompts_swapped()),
    lambda: drawn_values(reward=lambda texts, **rest: [
        -x for x in word_rewards(texts, **rest)]),
    lambda: drawn_values(max_new_tokens=LONGEST + 2)],
    ids=["index shifted", "prefix dropped", "rows swapped", "sign flipped", "continued too long"])
def test_values_by_continuations_are_the_enumerated_ones(broken):
    are_the_enumerated_values(drawn_values)
    with pytest.raises(AssertionError):
        are_the_enumerated_values(broken)


def test_behind_the_last_token_the_value_is_the_reward_and_elsewhere_its_mean():
    values, errors = drawn_values(draws=4)
    drawn = probe_sample()
    for row, ids in enumerate(drawn.ids):
        assert values[row, len(ids)] == drawn.rewards[row] and errors[row, len(ids)] == 0
        assert values[row, len(ids) + 1:].isnan().all()
    assert (errors[:, 0] > 0).all()
    exact = enumerated_values()
    assert exact[0, 0] == pytest.approx(exact[1, 0]), "completions of a prompt begin alike"


def test_values_do_not_depend_on_the_batch_and_do_on_the_seed():
    together, alone = (drawn_values(draws=4, batch_size=size)[0] for size in (64, 1))
    torch.testing.assert_close(together, alone, equal_nan=True)
    other = drawn_values(draws=4, seed=1)[0]
    assert not torch.allclose(together, other, equal_nan=True)
    with pytest.raises(ValueError, match="2 and more"):
        drawn_values(draws=1)


def test_a_part_of_a_sample_is_what_was_drawn():
    whole, part = probe_sample(), probe_sample().part([4, 1])
    for i, row in enumerate((4, 1)):
        assert part.ids[i] == whole.ids[row] and part.prompts[i] == whole.prompts[row]
        assert part.rows[i] is whole.rows[row] and part.pieces[i] == whole.pieces[row]
        assert part.rewards[i] == whole.rewards[row]
        assert torch.equal(part.mask[i], whole.mask[row])


def errors_by_hand(advantage_errors, value_errors):
    """One completion: values .5 and 1 around its second token, .25 and .75 at the other places."""
    exact = credit.ExactCredit(
        places=torch.tensor([[0, 1, 2, 3], [-1, -1, -1, -1]]),
        before=torch.tensor([[.25, .5, .25, .25], [math.nan] * 4]),
        before_error=torch.tensor([[.0, .3, .0, .0], [math.nan] * 4]),
        after=torch.tensor([[.75, 1., .75, .75], [math.nan] * 4]),
        after_error=torch.tensor([[.0, .4, .0, .0], [math.nan] * 4]))
    found = torch.tensor([[.5, 1.5, .5, 0.], [9., 9., 9., 9.]])
    assert advantage_errors(found, exact) == pytest.approx([0, 1 - .25, 0, .25])
    assert value_errors(found, exact) == pytest.approx([.0625, 1 - .09, .0625, .0625])


def test_errors_by_hand():
    errors_by_hand(credit.advantage_errors, credit.value_errors)
    for broken in (lambda x, e: credit.advantage_errors(-x, e),
                   lambda x, e: credit.advantage_errors(x.roll(1, 1), e),
                   credit.value_errors):
        with pytest.raises(AssertionError):
            errors_by_hand(broken, credit.value_errors)
    with pytest.raises(AssertionError):
        errors_by_hand(credit.advantage_errors, credit.advantage_errors)


def test_the_true_values_have_no_error_but_chance_and_a_constant_has():
    """The noise of finite many draws is taken off; else the true values would seem wrong."""
    exact, states = enumerated_values()[:, :LONGEST], every_state()[:, :LONGEST]
    whole = (states >= 0).all(1)
    values, errors = drawn_values(draws=16)
    part = credit.ExactCredit(states[whole], values[whole, :LONGEST], errors[whole, :LONGEST],
                              values[whole, 1:], errors[whole, 1:])
    true = credit.value_errors(exact[whole].double(), part)
    raw = ((exact - values[:, :LONGEST])[whole] ** 2).mean(0)
    assert max(map(abs, true)) < raw.max()
    constant = credit.value_errors(torch.full_like(exact, 5.0)[whole].double(), part)
    assert min(constant) > 10 * max(map(abs, true))


def test_a_critic_that_was_trained_on_logits_still_gives_values():
    drawn = draw()
    critic = make_critic(policy()[0])
    torch.nn.init.constant_(critic.head.bias, 2.0)
    plain = credit.values(critic, drawn)
    critic.value_range = (-1.0, 3.0)
    inside = drawn.mask.bool()
    found = credit.values(critic, drawn)[inside]
    assert torch.allclose(found, torch.full_like(found, -1 + 4 / (1 + math.exp(-2))), atol=1e-6)
    assert torch.allclose(plain[inside], torch.full_like(found, 2.0)), "the twin: values as said"
