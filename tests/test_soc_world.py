"""The enumerable world: its exact values and gradients against other ways to the same numbers.

Every check is a function of the implementation, so that broken ones can be put through it.
"""

import itertools
import math

import pytest
import torch

from tests.test_advantages import close, rejects
from ueba_helpers.rl import soc_world as library
from ueba_helpers.rl.advantages import (
    baselined,
    gae,
    group_relative,
    kl_estimate,
    leave_one_out,
    terminal_rewards,
)

WORLD = library.soc_world()
N, S, T = len(WORLD.rewards), WORLD.n_states, library.LENGTH
EVERY = torch.arange(N)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


LOGITS = library.analyst(WORLD, generator=seeded())
OTHER = library.analyst(WORLD, generator=seeded(1))
V = library.values(WORLD, LOGITS)


# -- the world ------------------------------------------------------------------------------------

def test_a_day_has_all_sixteen_completions_and_states_are_what_was_written_before():
    assert (N, S, T) == (48, 45, 4)
    for row in range(N):
        for t in range(T):
            alike = (WORLD.days == WORLD.days[row]) & (
                WORLD.actions[:, :t] == WORLD.actions[row, :t]).all(1)
            assert torch.equal(WORLD.states[:, t] == WORLD.states[row, t], alike)
            state = WORLD.states[row, t]
            assert WORLD.step[state] == t
            assert WORLD.cited[state] == WORLD.actions[row, :t].sum()


def rewards_by_hand(reward_of):
    theft, quiet = (1, 0, 1), (0, 0, 0)
    assert reward_of((1, 0, 1, 1), theft) == pytest.approx(1)
    assert reward_of((1, 1, 1, 1), theft) == pytest.approx(.5 + 1 / 6)
    assert reward_of((0, 1, 0, 1), theft) == pytest.approx(0)
    assert reward_of((1, 0, 1, 0), theft) == -1
    assert reward_of((0, 0, 0, 0), quiet) == pytest.approx(1)
    assert reward_of((1, 1, 0, 0), quiet) == pytest.approx(.5 - 1 / 6)
    assert reward_of((0, 0, 0, 1), quiet) == -.5


def test_rewards_by_hand():
    def found(actions, truth):
        name = next(name for name, (_, true) in library.DAYS.items() if true == truth)
        row = (WORLD.days == WORLD.names.index(name)) & (
            WORLD.actions == torch.tensor(actions)).all(1)
        return float(WORLD.rewards[row])

    rewards_by_hand(found)
    rejects(rewards_by_hand, lambda a, truth: found((*a[:3], 1 - a[3]), truth))
    rejects(rewards_by_hand, lambda a, truth: found((a[1], a[2], a[0], a[3]), truth))


def test_an_analyst_cites_what_looks_odd_and_escalates_what_it_cited():
    chance = library.analyst(WORLD, generator=seeded(), policies=4000).softmax(-1)[..., 1].mean(0)
    reading = WORLD.step < library.ITEMS
    assert chance[reading & (WORLD.odd == 1)].min() > .6
    assert chance[reading & (WORLD.odd == 0)].max() < .4
    judging = WORLD.step == library.ITEMS
    assert chance[judging & (WORLD.cited == 3)].min() > chance[judging & (WORLD.cited == 0)].max()


# -- exact values and gradients -------------------------------------------------------------------

def satisfies_bellman(values_of):
    """V(s) = sum_a pi(a|s) V(s a), the reward at the end: the tree walked backwards."""
    policy, found = LOGITS.softmax(-1), values_of(WORLD, LOGITS)
    last = WORLD.states[:, -1]
    for state in range(S):
        rows = (WORLD.states == state).any(1)
        if WORLD.step[state] == library.ITEMS:
            expected = (policy[state, WORLD.actions[last == state, -1]]
                        * WORLD.rewards[last == state]).sum()
        else:
            t = int(WORLD.step[state])
            following = {int(WORLD.actions[i, t]): int(WORLD.states[i, t + 1])
                         for i in rows.nonzero().flatten()}
            expected = sum(policy[state, a] * found[after] for a, after in following.items())
        close(found[state], expected, 1e-12)


def test_values_satisfy_the_bellman_equation():
    satisfies_bellman(library.values)
    rejects(satisfies_bellman, lambda w, x: -library.values(w, x))
    rejects(satisfies_bellman, lambda w, x: library.values(w, x).roll(1))
    rejects(satisfies_bellman, lambda w, x: library.values(w, 0 * x))
    close(library.action_values(WORLD, LOGITS)[..., 0] * LOGITS.softmax(-1)[:, 0]
          + library.action_values(WORLD, LOGITS)[..., 1] * LOGITS.softmax(-1)[:, 1], V, 1e-12)


def is_the_derivative_by_autograd(gradient_of):
    leaf = LOGITS.clone().requires_grad_()
    exact, = torch.autograd.grad(library.expected_reward(WORLD, leaf), leaf)
    assert exact.norm() > .1
    close(gradient_of(WORLD, LOGITS), exact, 1e-12)


def is_the_derivative_by_differences(gradient_of):
    h, shifts = 1e-5, torch.eye(2 * S, dtype=torch.float64).view(-1, S, 2)
    up, down = (library.expected_reward(WORLD, LOGITS + sign * h * shifts) for sign in (1, -1))
    close(gradient_of(WORLD, LOGITS), ((up - down) / (2 * h)).view(S, 2), 1e-8)


BROKEN_GRADIENTS = {
    "sign flipped": lambda w, x: -library.exact_gradient(w, x),
    "without visits": lambda w, x: library.exact_gradient(w, x) / library.visits(
        w, x).unsqueeze(-1),
    "without pi": lambda w, x: library.exact_gradient(w, x) / x.softmax(-1),
    "of another policy": lambda w, x: library.exact_gradient(w, OTHER),
    "without the value": lambda w, x: (library.visits(w, x).unsqueeze(-1) * x.softmax(-1)
                                       * library.action_values(w, x))}


@pytest.mark.parametrize("check", [is_the_derivative_by_autograd, is_the_derivative_by_differences])
@pytest.mark.parametrize("broken", BROKEN_GRADIENTS.values(), ids=BROKEN_GRADIENTS)
def test_the_exact_gradient_is_the_derivative_of_the_expected_reward(check, broken):
    check(library.exact_gradient)
    rejects(check, broken)


def test_policies_side_by_side_do_not_depend_on_each_other():
    both = torch.stack([LOGITS, OTHER])
    for function in (library.expected_reward, library.values, library.action_values,
                     library.exact_gradient, library.visits, library.chances):
        together = function(WORLD, both)
        close(together[0], function(WORLD, LOGITS), 1e-12)
        close(together[1], function(WORLD, OTHER), 1e-12)
        assert not torch.allclose(together[0], together[1])


# -- how far a step goes --------------------------------------------------------------------------

def is_the_kl(divergence):
    direct = sum(float(p * (math.log(p) - math.log(q))) for p, q in zip(
        library.chances(WORLD, LOGITS), library.chances(WORLD, OTHER), strict=True))
    assert direct > .1
    close(divergence(WORLD, LOGITS, OTHER), direct, 1e-12)


def test_the_divergence_is_the_kl_over_whole_completions():
    is_the_kl(library.divergence)
    rejects(is_the_kl, lambda w, p, q: library.divergence(w, q, p))
    rejects(is_the_kl, lambda w, p, q: library.divergence(w, p, q) / T)
    estimated = kl_estimate(library.log_probs(WORLD, LOGITS), library.log_probs(WORLD, OTHER))
    close(library.chances(WORLD, LOGITS) @ estimated.sum(1),
          library.divergence(WORLD, LOGITS, OTHER), 1e-12)


def is_the_kl_to_second_order(product):
    step = 1e-3 * OTHER
    quadratic = (step * product(WORLD, LOGITS, step)).sum() / 2
    assert float(quadratic) == pytest.approx(
        float(library.divergence(WORLD, LOGITS, LOGITS + step)), rel=1e-2)


def solves_the_fisher_system(natural):
    close(library.fisher(WORLD, LOGITS, natural(WORLD, LOGITS)),
          library.exact_gradient(WORLD, LOGITS), 1e-12)


def test_the_natural_gradient_solves_the_constraint_of_trpo():
    is_the_kl_to_second_order(library.fisher)
    rejects(is_the_kl_to_second_order, lambda w, x, step: 2 * library.fisher(w, x, step))
    rejects(is_the_kl_to_second_order, lambda w, x, step: library.visits(w, x).unsqueeze(-1) * step)
    solves_the_fisher_system(library.natural_gradient)
    rejects(solves_the_fisher_system, library.exact_gradient)
    rejects(solves_the_fisher_system, lambda w, x: -library.natural_gradient(w, x))


def reaches_the_allowed_kl(step_of):
    for delta in (1e-3, 1e-4):
        reached = library.divergence(WORLD, LOGITS, LOGITS + step_of(WORLD, LOGITS, delta))
        assert float(reached) == pytest.approx(delta, rel=.05)


def test_a_trust_region_step_goes_as_far_as_it_may_and_gains_more_than_the_gradient():
    reaches_the_allowed_kl(library.trust_region_step)
    rejects(reaches_the_allowed_kl, lambda w, x, d: library.trust_region_step(w, x, 2 * d))
    rejects(reaches_the_allowed_kl, lambda w, x, d: library.exact_gradient(w, x) * d ** .5)
    step, g = library.trust_region_step(WORLD, LOGITS, 1e-4), library.exact_gradient(WORLD, LOGITS)
    alike = g * (2e-4 / (g * library.fisher(WORLD, LOGITS, g)).sum()).sqrt()
    reaches_the_allowed_kl(lambda w, x, d: alike * (d / 1e-4) ** .5)
    assert library.expected_reward(WORLD, LOGITS + step) > library.expected_reward(
        WORLD, LOGITS + alike)


def critic_errors_by_hand(error):
    weights = library.chances(WORLD, LOGITS)
    off = torch.linspace(-1, 1, S, dtype=torch.float64)
    squared = sum(w * (off[s] ** 2).mean() for w, s in zip(weights, WORLD.states, strict=True))
    close(error(WORLD, LOGITS, V + off), squared ** .5, 1e-12)


def test_the_error_of_a_critic_counts_states_as_often_as_they_are_passed():
    critic_errors_by_hand(library.critic_error)
    rejects(critic_errors_by_hand, lambda w, x, v: library.critic_error(w, 0 * x, v))
    rejects(critic_errors_by_hand, lambda w, x, v: (v - library.values(w, x)).square().mean() ** .5)


# -- draws and estimates --------------------------------------------------------------------------

def draws_are_as_probable_as_the_policy_says(draw):
    rows = draw(WORLD, LOGITS, 20_000)
    close(rows.bincount(minlength=N) / len(rows), library.chances(WORLD, LOGITS), 6e-3)


def test_draws_follow_the_policy_and_groups_share_a_day():
    draws_are_as_probable_as_the_policy_says(
        lambda w, x, size: library.draw(w, x, size, generator=seeded()))
    rejects(draws_are_as_probable_as_the_policy_says,
            lambda w, x, size: library.draw(w, 0 * x, size, generator=seeded()))
    rejects(draws_are_as_probable_as_the_policy_says,
            lambda w, x, size: library.draw(w, x, size, generator=seeded()).roll(1) % 16)
    rows = library.draw(WORLD, torch.stack([LOGITS] * 5), 8, generator=seeded())
    assert rows.shape == (5, 24)
    assert torch.equal(WORLD.days[rows], torch.arange(3).repeat_interleave(8).expand(5, -1))
    again = library.draw(WORLD, torch.stack([LOGITS] * 5), 8, generator=seeded())
    assert torch.equal(rows, again)
    assert not torch.equal(rows, library.draw(WORLD, torch.stack([LOGITS] * 5), 8,
                                              generator=seeded(2)))


def estimates_by_autograd(estimate):
    rows = library.draw(WORLD, LOGITS, 4, generator=seeded())
    weight = torch.randn(len(rows), T, generator=seeded(3), dtype=torch.float64)
    leaf = LOGITS.clone().requires_grad_()
    loss = (weight * library.log_probs(WORLD, leaf, rows)).sum() / len(rows)
    expected, = torch.autograd.grad(loss, leaf)
    close(estimate(WORLD, LOGITS, rows, weight), expected, 1e-12)
    both = estimate(WORLD, torch.stack([OTHER, LOGITS]), torch.stack([rows.flip(0), rows]),
                    torch.stack([weight.flip(0), weight]))
    close(both[1], expected, 1e-12)


def test_an_estimate_is_the_gradient_of_weighted_log_probabilities():
    estimates_by_autograd(library.policy_gradient)
    rejects(estimates_by_autograd, lambda w, x, r, a: -library.policy_gradient(w, x, r, a))
    rejects(estimates_by_autograd, lambda w, x, r, a: library.policy_gradient(w, x, r, a.flip(-1)))
    rejects(estimates_by_autograd, lambda w, x, r, a: library.policy_gradient(w, 0 * x, r, a))


def expected_estimate(advantages):
    return library.policy_gradient(WORLD, LOGITS, EVERY, advantages,
                                   library.chances(WORLD, LOGITS))


def is_unbiased(advantages):
    close(expected_estimate(advantages), library.exact_gradient(WORLD, LOGITS), 1e-12)


def with_critic(critic, lam):
    return gae(terminal_rewards(WORLD.rewards, WORLD.mask), critic[WORLD.states], WORLD.mask,
               1., lam)[0]


@pytest.mark.parametrize(("critic", "lam"), [
    (0 * V, 1.), (V.roll(5), 1.), (V, 1.), (V, .7), (V, 0.)])
def test_the_estimators_of_the_library_are_unbiased_here(critic, lam):
    is_unbiased(with_critic(critic, lam))


@pytest.mark.parametrize("advantages", [
    with_critic(V.roll(5), 0.), -with_critic(V, 1.), with_critic(V, 1.).flip(1),
    2 * with_critic(V, 1.)], ids=["wrong critic", "sign flipped", "tokens swapped", "scaled"])
def test_biased_estimators_are_told_from_unbiased_ones(advantages):
    with pytest.raises(AssertionError):
        is_unbiased(advantages)


def expected_over_pairs(advantages_of):
    """Return the exact expectation of a group estimator with G = 2, over all pairs of a day."""
    chance = library.chances(WORLD, LOGITS) * 3
    total = torch.zeros(S, 2, dtype=torch.float64)
    for day in range(3):
        rows = EVERY[WORLD.days == day]
        for i, j in itertools.product(rows.tolist(), repeat=2):
            pair = torch.tensor([i, j])
            a = advantages_of(WORLD.rewards[pair]).unsqueeze(1).expand(-1, T)
            total += (chance[i] * chance[j] / 3) * library.policy_gradient(WORLD, LOGITS, pair, a)
    return total


def test_group_baselines_by_enumeration_and_what_the_error_says_of_them():
    exact = library.exact_gradient(WORLD, LOGITS)
    close(expected_over_pairs(lambda r: leave_one_out(r, 2)), exact, 1e-12)
    close(expected_over_pairs(lambda r: group_relative(r, 2)), exact / 2, 1e-12)
    divided = expected_over_pairs(lambda r: group_relative(r, 2, "group"))
    assert library.gradient_error(divided.unsqueeze(0), exact, torch.ones(1).double()
                                  )["cosine"] < .99


# -- errors ---------------------------------------------------------------------------------------

def errors_by_hand(error):
    """Two estimates, (3, 4) and (5, 8), of (3, 4): mean (4, 6), bias (1, 2), each (1, 2) off."""
    exact = torch.tensor([[3., 4.]], dtype=torch.float64)
    estimates = torch.stack([exact, exact + torch.tensor([[2., 4.]])])
    found = error(estimates, exact, torch.tensor([.5, .5], dtype=torch.float64))
    assert found["bias"] == pytest.approx(5 ** .5 / 5)
    assert found["noise"] == pytest.approx(5 ** .5 / 5)
    assert found["cosine"] == pytest.approx((4 * 3 + 6 * 4) / (52 ** .5 * 5))


def test_errors_by_hand():
    errors_by_hand(library.gradient_error)
    rejects(errors_by_hand, lambda e, x, w: library.gradient_error(e, 2 * x, w))
    rejects(errors_by_hand, lambda e, x, w: library.gradient_error(e.flip(-1), x, w))
    rejects(errors_by_hand, lambda e, x, w: library.gradient_error(e[:1], x, w[:1] * 2))


def drawn_error_is_the_enumerated_one(error):
    """REINFORCE on the first day alone, 20,000 completions against the weighted sum of all."""
    exact, many = library.exact_gradient(WORLD, LOGITS), LOGITS.expand(20_000, S, 2)
    rows = library.draw(WORLD, many, 1, generator=seeded())[:, 0]
    weight = 3 * library.chances(WORLD, LOGITS) * (WORLD.days == 0)
    a = baselined(WORLD.rewards, 1, "none").unsqueeze(1).expand(-1, T)
    each = library.policy_gradient(WORLD, LOGITS.expand(N, S, 2), EVERY.unsqueeze(1),
                                   a.unsqueeze(1))
    enumerated = library.gradient_error(each, exact, weight)
    drawn = error(each[rows], exact)
    for name, value in enumerated.items():
        assert drawn[name] == pytest.approx(value, abs=.03 * max(1, enumerated["noise"])), name


def test_errors_of_draws_are_those_of_the_enumeration():
    drawn_error_is_the_enumerated_one(library.gradient_error)
    rejects(drawn_error_is_the_enumerated_one,
            lambda e, x: library.gradient_error(2 * e, x))
    rejects(drawn_error_is_the_enumerated_one,
            lambda e, x: library.gradient_error(e.roll(1, 1), x))


def test_an_unbiased_estimator_shows_no_bias_however_noisy_it_is():
    exact = library.exact_gradient(WORLD, LOGITS)
    noise = torch.randn(4000, S, 2, generator=seeded(4), dtype=torch.float64)
    found = library.gradient_error(exact + noise, exact)
    raw = float((noise.mean(0)).norm() / exact.norm())
    assert found["bias"] < .4 * raw, "the part that chance makes is taken off"


def importance_weights_are_unbiased(weights_of):
    """Completions of another policy, weighed by pi / pi_old of the whole completion."""
    now, old = library.log_probs(WORLD, LOGITS), library.log_probs(WORLD, OTHER)
    a = weights_of((now - old).exp()) * with_critic(V, 1.)
    assert library.enumerated_error(WORLD, LOGITS, a, OTHER)["bias"] < 1e-10


def test_the_error_of_old_completions_by_enumeration():
    importance_weights_are_unbiased(lambda ratio: ratio.prod(1, keepdim=True))
    rejects(importance_weights_are_unbiased, lambda ratio: ratio)
    rejects(importance_weights_are_unbiased, lambda ratio: ratio.prod(1, keepdim=True) ** .25)
    rejects(importance_weights_are_unbiased, lambda ratio: 1 / ratio.prod(1, keepdim=True))
    on_policy = library.enumerated_error(WORLD, LOGITS, with_critic(V, 1.))
    assert on_policy["bias"] < 1e-10 and on_policy["cosine"] == pytest.approx(1)
