"""Credit within a verdict: places found in tokens, values as the critic gives them, shares."""

import math

import numpy as np
import pytest
import torch

from tests.tiny import policy
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
    drawn, columns = draw(rewards=rewards, temperature=0.5), {}
    for name in drawn.rows[0]:
        columns[name] = [row[name] for row in drawn.rows]
    _, tokenizer = policy()
    texts = tokenizer.batch_decode(drawn.ids, skip_special_tokens=True)
    expected = sum(weight * np.array(term(texts, **columns)) for term, weight in TRAINABLE[rewards])
    np.testing.assert_allclose(drawn.rewards, expected, atol=1e-12)
    assert draw(rewards=rewards).ids != drawn.ids, "another temperature, other completions"
    assert draw(temperature=0.5).ids == drawn.ids, "what is paid changes nothing that is drawn"


def test_another_set_of_rewards_pays_the_same_completions_otherwise():
    assert (draw(rewards="traditional").rewards != draw(rewards="ueba").rewards).any()


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
