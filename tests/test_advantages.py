"""Advantages, KL estimators and policy gradients: by hand, by law and by enumeration.

Every check is a function of the implementation, so that deliberately broken ones can be put
through the same check, which must reject them.
"""

import itertools

import pytest
import torch

from ueba_helpers.rl import advantages as library
from ueba_helpers.rl.advantages import (
    EPSILON,
    explained_variance,
    gae,
    group_relative,
    kl_estimate,
    leave_one_out,
    reward_scale,
    terminal_rewards,
    whiten,
)


def rejects(check, broken):
    with pytest.raises(AssertionError):
        check(broken)


def close(a, b, tolerance=1e-6):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    assert a.shape == b.shape and (a - b).abs().max() < tolerance, f"{a} is not {b}"


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- groups ---------------------------------------------------------------------------------------

def groups_by_hand(relative):
    close(relative(torch.tensor([3., 1., 5., 5.]), 2), [1., -1., 0., 0.])
    close(relative(torch.tensor([4., 0., 1., 1.]), 4), [2.5, -1.5, -.5, -.5])


@pytest.mark.parametrize("broken", [
    lambda r, g: -group_relative(r, g),
    lambda r, g: r - r.mean(),
    lambda r, g: group_relative(r, g).roll(1),
    lambda r, g: group_relative(r.view(g, -1).T.reshape(-1), g),
], ids=["sign flipped", "mean of the batch", "shifted", "groups interleaved"])
def test_group_advantages_by_hand(broken):
    groups_by_hand(group_relative)
    rejects(groups_by_hand, broken)


def scales_by_hand(relative):
    rewards = torch.tensor([3., 1., 5., 5.])
    group = 1 / (2 ** .5 + EPSILON)
    batch = 1 / ((11 / 3) ** .5 + EPSILON)  # mean 3.5, squares 0.25 + 6.25 + 2.25 + 2.25 over 3
    close(relative(rewards, 2, "group"), [group, -group, 0., 0.])
    close(relative(rewards, 2, "batch"), [batch, -batch, 0., 0.])


@pytest.mark.parametrize("broken", [
    lambda r, g, s: group_relative(r, g, "none"),
    lambda r, g, s: group_relative(r, g, {"group": "batch", "batch": "group"}[s]),
    lambda r, g, s: group_relative(r, g) / (r.view(-1, g).std(1, correction=0)
                                            .repeat_interleave(g) + EPSILON),
], ids=["no division", "scales swapped", "biased deviation"])
def test_scaled_advantages_by_hand(broken):
    scales_by_hand(group_relative)
    rejects(scales_by_hand, broken)


def sums_to_zero(relative):
    for size, scale in itertools.product((2, 3, 8), library.SCALES):
        found = relative(draws(size * 5, seed=size) + 3, size, scale)
        assert found.abs().max() > 0.1
        close(found.view(-1, size).sum(1), [0.] * 5, 1e-10)


def test_advantages_of_a_group_sum_to_zero():
    sums_to_zero(group_relative)
    rejects(sums_to_zero, lambda r, g, s: r - r.mean())
    rejects(sums_to_zero, lambda r, g, s: r / reward_scale(r, g, s))


def is_scaled_group_relative(baseline):
    for size in (2, 4, 7):
        rewards = draws(size * 3, seed=size)
        close(baseline(rewards, size), group_relative(rewards, size) * size / (size - 1), 1e-12)


def test_leave_one_out_is_a_multiple_of_group_relative():
    close(leave_one_out(torch.tensor([3., 1., 2., 2.]), 4), [4 / 3, -4 / 3, 0., 0.])
    is_scaled_group_relative(leave_one_out)
    rejects(is_scaled_group_relative, group_relative)


def floor_by_hand(relative):
    """Right is 0.5 and more: .3 beside -1 is wrong, only less so."""
    rewards = torch.tensor([.3, -1., -1., -1., 1., 1., 1., -1.])
    close(relative(rewards, 4, "none", .5), [-.2, -1.5, -1.5, -1.5, .5, .5, .5, -1.5])


def test_a_floor_under_the_baseline_pays_no_wrong_answer():
    floor_by_hand(group_relative)
    rejects(floor_by_hand, lambda r, g, s, floor: group_relative(r, g, s))
    rejects(floor_by_hand, lambda r, g, s, floor: group_relative(r.clamp(min=floor), g, s))
    assert group_relative(torch.tensor([.3, -1., -1., -1.]), 4)[0] > 0, "what the floor is for"


def test_leave_one_out_leaves_out_what_was_not_scored():
    nan = float("nan")
    close(leave_one_out(torch.tensor([1., nan, 0., nan, 3., nan, nan, nan]), 4),
          [1., 0., -1., 0., 0., 0., 0., 0.])
    filled = leave_one_out(torch.tensor([1., 0., 0., 0.]), 4)
    assert filled[0] == 1 and filled[2] != -1, "a zero is not a hole"


def way_from_reinforce(baselined):
    rewards = draws(12, seed=7)
    close(baselined(rewards, 4, "none"), rewards)
    close(baselined(rewards, 4), group_relative(rewards, 4))
    close(baselined(rewards, 4, "leave_one_out"), leave_one_out(rewards, 4))
    deviation = rewards.view(3, 4).std(1).repeat_interleave(4) + EPSILON
    close(baselined(rewards, 4, "leave_one_out", "group"), leave_one_out(rewards, 4) / deviation)
    close(baselined(rewards, 4, "none", "batch"), rewards / (rewards.std() + EPSILON))
    zeros, mask = torch.zeros(12, 5, dtype=torch.float64), torch.ones(12, 5)
    at_v_zero, _ = gae(terminal_rewards(rewards, mask), zeros, mask, 1., 1.)
    close(at_v_zero, baselined(rewards, 4, "none").unsqueeze(1) * mask)


def test_one_switch_walks_from_reinforce_to_grpo():
    way_from_reinforce(library.baselined)
    rejects(way_from_reinforce, lambda r, g, b="group", s="none": group_relative(r, g, s))
    rejects(way_from_reinforce, lambda r, g, b="group", s="none": library.baselined(r, g, b))


@pytest.mark.parametrize("scale", library.SCALES)
def test_equal_rewards_give_no_advantage(scale):
    assert torch.equal(group_relative(torch.full((6,), 0.5), 3, scale), torch.zeros(6))


@pytest.mark.parametrize("call, word", [
    (lambda: group_relative(torch.zeros(5), 2), "groups of 2"),
    (lambda: group_relative(torch.zeros(2, 2), 2), r"\(B,\)"),
    (lambda: group_relative(torch.zeros(4), 2, "std"), "std"),
    (lambda: leave_one_out(torch.zeros(4), 1), "at least 2"),
    (lambda: gae(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, 2), 1., 1.), "shape"),
    (lambda: gae(torch.zeros(3), torch.zeros(3), torch.ones(3), 1., 1.), "shape"),
    (lambda: whiten(torch.zeros(1, 3), torch.tensor([[1, 0, 0]])), "two values"),
    (lambda: kl_estimate(torch.zeros(1), torch.zeros(1), "k4"), "k4")])
def test_impossible_input_is_named(call, word):
    with pytest.raises(ValueError, match=word):
        call()


# -- generalised advantage estimates --------------------------------------------------------------

def gae_by_hand(estimate):
    """Rewards 0, 0, 4 and values 1, 2, 3, the last token of the second row padded with rubbish."""
    rewards = torch.tensor([[0., 0., 4.], [0., 4., 7.]])
    values = torch.tensor([[1., 2., 3.], [1., 2., 9.]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    # gamma 1: deltas 1, 1, 1 and 1, 2; each advantage is delta + .5 times the next.
    advantages, returns = estimate(rewards, values, mask, 1., .5)
    close(advantages, [[1.75, 1.5, 1.], [2., 2., 0.]])
    close(returns, [[2.75, 3.5, 4.], [3., 4., 0.]])
    # gamma .5, lambda 1: deltas 0, -.5, 1 and 0, 2.
    advantages, returns = estimate(rewards, values, mask, .5, 1.)
    close(advantages, [[0., 0., 1.], [1., 2., 0.]])
    close(returns, [[1., 2., 4.], [2., 4., 0.]])


def shifted_values(rewards, values, mask, gamma, lam):
    """Take values[:, t] for the state *after* token t."""
    before = torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], 1)
    return gae(rewards, before, mask, gamma, lam)


@pytest.mark.parametrize("broken", [
    shifted_values,
    lambda r, v, m, g, lam: gae(r, v, torch.ones_like(m), g, lam),
    lambda r, v, m, g, lam: gae(r, v, m, lam, g),
    lambda r, v, m, g, lam: gae(r, -v, m, g, lam),
    lambda r, v, m, g, lam: (gae(r, v, m, g, lam)[0], gae(r, v, m, g, lam)[0]),
    lambda r, v, m, g, lam: tuple(x.flip(1) for x in gae(r.flip(1), v.flip(1), m.flip(1), g, lam)),
], ids=["index shifted", "mask dropped", "gamma and lambda swapped", "sign flipped",
        "returns without the value", "time reversed"])
def test_gae_by_hand(broken):
    gae_by_hand(gae)
    rejects(gae_by_hand, broken)


def ragged(rows=6, width=7):
    """Return rewards, values and a right-padded mask, with rubbish in the padding."""
    lengths = torch.tensor([1 + (3 * i) % width for i in range(rows)])
    mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
    return draws(rows, width, seed=1), draws(rows, width, seed=2), mask


def reward_to_go(rewards, mask):
    return (rewards * mask).flip(1).cumsum(1).flip(1) * mask


def is_return_minus_value(estimate):
    rewards, values, mask = ragged()
    advantages, returns = estimate(rewards, values, mask, 1., 1.)
    close(advantages, (reward_to_go(rewards, mask) - values) * mask, 1e-12)
    close(returns, reward_to_go(rewards, mask), 1e-12)


def test_with_gamma_and_lambda_one_advantages_are_return_minus_value():
    is_return_minus_value(gae)
    rejects(is_return_minus_value, shifted_values)
    rejects(is_return_minus_value, lambda r, v, m, g, lam: gae(r, v, m, g, .95))
    rejects(is_return_minus_value,
            lambda r, v, m, g, lam: gae(r, v, torch.ones_like(m), g, lam))


def test_with_lambda_zero_advantages_are_one_step_errors():
    rewards, values, mask = ragged()
    following = torch.cat([values[:, 1:] * mask[:, 1:], torch.zeros_like(values[:, :1])], 1)
    expected = (rewards + .9 * following - values) * mask
    close(gae(rewards, values, mask, .9, 0.)[0], expected, 1e-12)
    assert (gae(rewards, values, mask, .9, .1)[0] - expected).abs().max() > 1e-2


def test_a_critic_of_zeros_gives_the_reward_to_go():
    rewards, values, mask = ragged()
    expected = reward_to_go(rewards, mask)
    close(gae(rewards, torch.zeros_like(values), mask, 1., 1.)[0], expected, 1e-12)
    assert (gae(rewards, values, mask, 1., 1.)[0] - expected).abs().max() > 1e-2


def critic_at_group_mean_is_grpo(place):
    scores, (_, _, mask) = draws(6, seed=3), ragged()
    baseline = scores.view(-1, 3).mean(1).repeat_interleave(3).unsqueeze(1).expand(6, 7)
    advantages, _ = gae(place(scores, mask), baseline, mask, 1., 1.)
    close(advantages, group_relative(scores, 3).unsqueeze(1) * mask, 1e-12)


def test_ppo_with_the_critic_at_the_group_mean_is_grpo_without_std():
    critic_at_group_mean_is_grpo(terminal_rewards)
    rejects(critic_at_group_mean_is_grpo, lambda s, m: terminal_rewards(s, torch.ones_like(m)))
    rejects(critic_at_group_mean_is_grpo, lambda s, m: s.unsqueeze(1) * m)


def lambda_of_each_row(estimate):
    rewards, values, mask = ragged()
    lams = torch.linspace(0, 1, 6, dtype=torch.float64)
    together = estimate(rewards, values, mask, .9, lams)
    for i in range(6):
        row = slice(i, i + 1)
        alone = gae(rewards[row], values[row], mask[row], .9, float(lams[i]))
        for a, b in zip(together, alone, strict=True):
            close(a[row], b, 1e-12)


def test_each_completion_may_have_its_own_lambda():
    lambda_of_each_row(gae)
    rejects(lambda_of_each_row, lambda r, v, m, g, lam: gae(r, v, m, g, lam.flip(0)))
    rejects(lambda_of_each_row, lambda r, v, m, g, lam: gae(r, v, m, g, float(lam.mean())))


def lambda_by_length(adaptive):
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    close(adaptive(mask, 1.0), [.75, .5, 0.])
    close(adaptive(mask, 0.5), [.5, 0., 0.])


def test_longer_completions_have_a_larger_lambda():
    lambda_by_length(library.length_adaptive_lambda)
    rejects(lambda_by_length, lambda m, a: 1 - 1 / (a * m.sum(1).clamp(min=1)))
    rejects(lambda_by_length, lambda m, a: library.length_adaptive_lambda(torch.ones_like(m), a))


def padding_changes_nothing(estimate):
    rewards, values, mask = ragged()
    narrow = estimate(rewards, values, mask, .9, .8)
    rubbish = torch.full((6, 3), 1e3, dtype=torch.float64)
    wide = estimate(torch.cat([rewards, rubbish], 1), torch.cat([values, rubbish], 1),
                    torch.cat([mask, torch.zeros(6, 3, dtype=torch.long)], 1), .9, .8)
    for a, b in zip(narrow, wide, strict=True):
        close(a, b[:, :7], 1e-12)
        close(b[:, 7:], torch.zeros(6, 3))
        close(a[~mask.bool()], torch.zeros(int((1 - mask).sum())))


def test_advantages_do_not_depend_on_padding():
    padding_changes_nothing(gae)
    rejects(padding_changes_nothing, lambda r, v, m, g, lam: gae(r, v, torch.ones_like(m), g, lam))


def test_rows_do_not_depend_on_each_other():
    rewards, values, mask = ragged()
    together = gae(rewards, values, mask, .9, .8)[0]
    for i in range(6):
        close(gae(rewards[i:i + 1], values[i:i + 1], mask[i:i + 1], .9, .8)[0], together[i:i + 1],
              1e-12)


def terminal_by_hand(place):
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    close(place(torch.tensor([2., 3., 4.]), mask), [[0., 2., 0.], [0., 0., 3.], [0., 0., 0.]])


def test_terminal_rewards_stand_on_the_last_token_inside_the_mask():
    terminal_by_hand(terminal_rewards)
    rejects(terminal_by_hand, lambda s, m: terminal_rewards(s, torch.ones_like(m)))
    rejects(terminal_by_hand, lambda s, m: terminal_rewards(s, m).roll(-1, 1))
    rejects(terminal_by_hand, lambda s, m: s.unsqueeze(1) * m)


# -- whitening and explained variance -------------------------------------------------------------

def _without_shift(x, mask):
    """Divide by the deviation and keep the mean: what a flag the wrong way round does."""
    inside = x[mask.bool()]
    return x * torch.rsqrt(inside.var() + 1e-8) * mask


def whitening_by_hand(normalise):
    x, mask = torch.tensor([[1., 3., 99.], [5., 99., 99.]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    close(normalise(x, mask), [[-1., 0., 0.], [1., 0., 0.]])  # mean 3, unbiased deviation 2


def whitening_by_law(normalise):
    _, x, mask = ragged()
    found = normalise(3 * x + 5, mask)
    inside = found[mask.bool()]
    close([inside.mean(), inside.var()], [0., 1.], 1e-6)
    close(found[~mask.bool()], torch.zeros(int((1 - mask).sum())))
    close(found, normalise(x, mask), 1e-6)


@pytest.mark.parametrize("check", [whitening_by_hand, whitening_by_law])
def test_whitening(check):
    def biased(x, mask):
        mean = x[mask.bool()].mean()
        return (x - mean) / x[mask.bool()].std(correction=0) * mask

    check(whiten)
    rejects(check, biased)
    rejects(check, lambda x, m: whiten(x, torch.ones_like(m)))
    rejects(check, _without_shift)
    rejects(check, lambda x, m: (x - (x * m).mean()) * m)


def test_whitening_keeps_the_sign():
    rejects(whitening_by_hand, lambda x, m: -whiten(x, m))


def variance_by_hand(measure):
    returns, mask = torch.tensor([[1., 2., 3., 50.]]), torch.tensor([[1, 1, 1, 0]])

    def of(values):
        return float(measure(torch.tensor([[*values, -50.]]), returns, mask))

    assert of([1., 2., 3.]) == pytest.approx(1)
    assert of([7., 8., 9.]) == pytest.approx(1), "an offset costs nothing"
    assert of([2., 2., 2.]) == pytest.approx(0)
    assert of([3., 2., 1.]) == pytest.approx(-3)  # residuals -2, 0, 2: variance 4 x that of returns
    assert of([1., 2., 2.]) == pytest.approx(1 - (2 / 9) / (2 / 3))


def test_explained_variance_by_hand():
    variance_by_hand(explained_variance)
    rejects(variance_by_hand, lambda v, r, m: explained_variance(v, r, torch.ones_like(m)))
    rejects(variance_by_hand, lambda v, r, m: explained_variance(r, v, m))
    rejects(variance_by_hand, lambda v, r, m: explained_variance(-v, r, m))
    rejects(variance_by_hand,
            lambda v, r, m: 1 - (r - v)[m.bool()].square().mean() / r[m.bool()].var(correction=0))


def test_explained_variance_of_constant_returns_is_zero():
    mask = torch.ones(1, 3)
    for returns in (torch.full((1, 3), .7), torch.full((1, 1), 1.)):
        values = torch.zeros_like(returns)
        assert explained_variance(values, returns, mask[:, :returns.size(1)]) == 0


# -- KL by enumeration ----------------------------------------------------------------------------

POLICY = torch.tensor([4., -.5, .3, .8, -1.2, 0.], dtype=torch.float64).log_softmax(-1)
REFERENCE = torch.tensor([.3, .2, -.1, .4, 0., -.2], dtype=torch.float64).log_softmax(-1)


def kl(p, q):
    return float((p.exp() * (p - q)).sum())


def expected(estimator, p=POLICY, q=REFERENCE, kind="k1"):
    return float((p.exp() * estimator(p, q, kind)).sum())


def unbiased(kind):
    def check(estimator):
        assert kl(POLICY, REFERENCE) > .5, "far from zero, where the estimators differ"
        assert expected(estimator, kind=kind) == pytest.approx(kl(POLICY, REFERENCE), rel=1e-12)
    return check


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_the_kl_on_average(kind):
    unbiased(kind)(kl_estimate)
    rejects(unbiased(kind), lambda p, q, kind: kl_estimate(q, p, kind))
    rejects(unbiased(kind), lambda p, q, kind: kl_estimate(p, q, "k2"))
    rejects(unbiased(kind), lambda p, q, kind: -kl_estimate(p, q, kind))
    # the log ratio taken the other way round inside k3, as published code has it: chi2 minus KL
    rejects(unbiased(kind), lambda p, q, kind: torch.exp(p - q) - 1 - (p - q))


def test_the_direction_is_policy_to_reference():
    there, back = kl(POLICY, REFERENCE), kl(REFERENCE, POLICY)
    assert abs(there - back) > .05, "the two directions can be told apart"
    for kind in ("k1", "k3"):
        assert expected(kl_estimate, kind=kind) == pytest.approx(there, rel=1e-12)
        assert abs(expected(kl_estimate, kind=kind) - back) > .05
        assert expected(kl_estimate, REFERENCE, POLICY, kind) == pytest.approx(back, rel=1e-12)


def near_zero(estimator):
    for size in (.02, .01):
        q = (POLICY + size * REFERENCE).log_softmax(-1)
        assert expected(estimator, POLICY, q, "k2") == pytest.approx(kl(POLICY, q), rel=.02)


def test_k2_is_close_to_the_kl_near_zero_and_only_there():
    near_zero(kl_estimate)
    rejects(near_zero, lambda p, q, kind: 2 * kl_estimate(p, q, kind))
    rejects(near_zero, lambda p, q, kind: kl_estimate(p, q, "k1").abs())
    far = expected(kl_estimate, kind="k2")
    assert abs(far / kl(POLICY, REFERENCE) - 1) > .02


def test_k2_and_k3_are_never_negative_and_k3_varies_less_than_k1():
    for kind in ("k2", "k3"):
        assert kl_estimate(POLICY, REFERENCE, kind).min() >= 0
    assert kl_estimate(POLICY, REFERENCE, "k1").min() < 0
    q = (POLICY + .2 * REFERENCE).log_softmax(-1)
    spread = [(POLICY.exp() * (kl_estimate(POLICY, q, kind) - kl(POLICY, q)) ** 2).sum()
              for kind in ("k1", "k3")]
    assert spread[1] < spread[0]


# -- policy gradients by enumeration --------------------------------------------------------------

V = 3  # tokens; completions of two tokens, so nine in all
COMPLETIONS = list(itertools.product(range(V), repeat=2))
ROWS = torch.tensor(COMPLETIONS)
MASK = torch.ones(len(COMPLETIONS), 2, dtype=torch.long)
SCORES = draws(len(COMPLETIONS), seed=5) * 2
BETA = .3


def logits():
    """Return leaf logits of the first token `(V,)` and of the second given the first `(V, V)`."""
    return draws(V, seed=6).requires_grad_(), draws(V, V, seed=7).requires_grad_()


def log_probs(first, second):
    """Return `(9, 2)` token log-probabilities of all completions."""
    return torch.stack([first.log_softmax(-1)[ROWS[:, 0]],
                        second.log_softmax(-1)[ROWS[:, 0], ROWS[:, 1]]], 1)


REFERENCE_LOG_PROBS = log_probs(draws(V, seed=8), draws(V, V, seed=9))


def gradient(objective):
    """Return the gradient of an objective of the token log-probabilities, as one vector."""
    leaves = logits()
    return torch.cat([g.flatten() for g in torch.autograd.grad(objective(log_probs(*leaves)),
                                                               leaves)])


def exact_gradient(beta=0.):
    """Return the gradient of E[score] - beta KL(policy || reference), differentiated exactly."""
    def objective(token_log_probs):
        sequence = token_log_probs.sum(1)
        kl_of_sequence = sequence - REFERENCE_LOG_PROBS.sum(1)
        return (sequence.exp() * (SCORES - beta * kl_of_sequence)).sum()
    return gradient(objective)


def expected_policy_gradient(advantages_of):
    """Return E[sum_t A_t grad log pi(a_t)], summed over all completions by their probability."""
    def objective(token_log_probs):
        fixed = token_log_probs.detach()
        weight = fixed.sum(1).exp().unsqueeze(1)
        return (weight * advantages_of(fixed) * token_log_probs).sum()
    return gradient(objective)


def exact_values(fixed):
    """Return the true values `(9, 2)` of the states before each token."""
    weight = fixed.sum(1).exp()
    whole = (weight * SCORES).sum().expand(len(COMPLETIONS))
    given_first = torch.stack([(weight * SCORES)[ROWS[:, 0] == token].sum()
                               / weight[ROWS[:, 0] == token].sum() for token in range(V)])
    return torch.stack([whole, given_first[ROWS[:, 0]]], 1)


def is_unbiased(advantages_of, beta=0.):
    exact = exact_gradient(beta)
    assert exact.norm() > .1
    close(expected_policy_gradient(advantages_of), exact, 1e-10)


def with_critic(values_of, lam):
    return lambda fixed: gae(terminal_rewards(SCORES, MASK), values_of(fixed), MASK, 1., lam)[0]


ANY_VALUES = draws(V, seed=10)


def some_values(fixed):
    """Values that depend on the state alone, and are wrong."""
    return torch.stack([torch.full((len(COMPLETIONS),), .4, dtype=torch.float64),
                        ANY_VALUES[ROWS[:, 0]]], 1)


def values_of_the_action(fixed):
    """A baseline that knows the token it is the baseline of: the index shifted by one."""
    return torch.stack([ANY_VALUES[ROWS[:, 0]], ANY_VALUES[ROWS[:, 1]]], 1)


@pytest.mark.parametrize("values_of, lam", [
    (lambda fixed: torch.zeros_like(fixed), 1.), (some_values, 1.), (exact_values, 1.),
    (exact_values, .7), (exact_values, 0.)])
def test_the_expected_gradient_is_the_exact_one(values_of, lam):
    """Any critic with lambda 1, and the true values with any lambda (Schulman et al. 2016)."""
    is_unbiased(with_critic(values_of, lam))


@pytest.mark.parametrize("broken", [
    with_critic(some_values, 0.), with_critic(values_of_the_action, 1.),
    lambda fixed: -with_critic(exact_values, 1.)(fixed),
    lambda fixed: with_critic(exact_values, 1.)(fixed).flip(1),
    lambda fixed: _without_shift(with_critic(exact_values, 1.)(fixed), MASK),
], ids=["wrong critic with lambda 0", "index shifted", "sign flipped", "tokens swapped",
        "rescaled"])
def test_biased_gradients_are_told_from_exact_ones(broken):
    rejects(is_unbiased, broken)


def with_kl(kind, *, flipped=False):
    def advantages_of(fixed):
        pair = (REFERENCE_LOG_PROBS, fixed) if flipped else (fixed, REFERENCE_LOG_PROBS)
        penalty = BETA * kl_estimate(*pair, kind)
        return gae(terminal_rewards(SCORES, MASK) - penalty, some_values(fixed), MASK, 1., 1.)[0]
    return advantages_of


def test_k1_in_the_reward_gives_the_gradient_of_the_kl():
    def check(advantages_of):
        is_unbiased(advantages_of, BETA)

    assert (exact_gradient(BETA) - exact_gradient()).norm() > .1
    check(with_kl("k1"))
    rejects(check, with_kl("k2"))
    rejects(check, with_kl("k3"))
    rejects(check, with_kl("k1", flipped=True))
    rejects(check, with_critic(some_values, 1.))


def expected_group_gradient(advantages_of):
    """Return the expected gradient over all pairs of completions of one prompt (G = 2)."""
    def objective(token_log_probs):
        sequence = token_log_probs.sum(1)
        total = 0.
        for i, j in itertools.product(range(len(COMPLETIONS)), repeat=2):
            weight = (sequence[i] + sequence[j]).detach().exp()
            a = advantages_of(torch.stack([SCORES[i], SCORES[j]]))
            total = total + weight * (a[0] * sequence[i] + a[1] * sequence[j]) / 2
        return total
    return gradient(objective)


def group_gradient_is(factor):
    def check(advantages_of):
        close(expected_group_gradient(advantages_of), factor * exact_gradient(), 1e-10)
    return check


def test_leave_one_out_is_unbiased_and_the_group_mean_shrinks_by_g_minus_one_over_g():
    group_gradient_is(1.)(lambda r: leave_one_out(r, 2))
    group_gradient_is(.5)(lambda r: group_relative(r, 2))
    rejects(group_gradient_is(1.), lambda r: group_relative(r, 2))
    rejects(group_gradient_is(1.), lambda r: leave_one_out(r, 2).flip(0))
    rejects(group_gradient_is(1.), lambda r: r - r.max())


def test_dividing_by_the_groups_deviation_turns_the_gradient():
    """Published GRPO does not climb the expected reward: no factor makes up for the division."""
    found = expected_group_gradient(lambda r: group_relative(r, 2, "group"))
    exact = exact_gradient()
    assert torch.cosine_similarity(found, exact, dim=0) < .999
    plain = expected_group_gradient(lambda r: group_relative(r, 2))
    assert torch.cosine_similarity(plain, exact, dim=0) > 1 - 1e-10


def test_a_reward_that_is_not_there_enters_neither_mean_nor_deviation():
    nan = float("nan")
    rewards = torch.tensor([1., nan, 0., nan, 3., 3., nan, 0.])
    close(group_relative(rewards, 4), [.5, 0., -.5, 0., 1., 1., 0., -2.])
    whole = torch.tensor([1., 0., 3., 3., 0.])
    close(reward_scale(rewards, 4, "group"),
          [whole[:2].std() + 1e-4] * 4 + [whole[2:].std() + 1e-4] * 4)
    close(reward_scale(rewards, 4, "batch"), [whole.std() + 1e-4] * 8)
    for scale in ("none", "group", "batch"):
        assert torch.equal(group_relative(torch.full((4,), nan), 2, scale), torch.zeros(4))
    with pytest.raises(AssertionError):  # the twin: a mean in its place makes the deviation small
        close(reward_scale(torch.tensor([1., .5, 0., .5]), 4, "group")[:1],
              [whole[:2].std() + 1e-4])
