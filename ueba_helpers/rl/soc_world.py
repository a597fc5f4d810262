"""A security operations centre small enough to solve: every value and gradient is an exact sum.

An analyst reads a day of three observations, writes for each whether it is evidence, and then
dismisses or escalates the day. That is a completion of four tokens of two kinds, so a day has
sixteen of them, and what an estimator of the policy gradient gives on average is a weighted sum
over all. The policy is a table of logits, one row per state; a state is a day and what has been
written about it so far, as a language model sees it.

In: a `World`, logits `(..., S, 2)` (leading dimensions are policies side by side) and rows, the
indices of completions. Out: probabilities, values, gradients, float64 throughout. `N` counts the
completions of all days, `S` the states, `T` the four tokens, `B` drawn completions, `D` the days.
Pure functions; only `draw` is random, by the generator that it is given.

What is simpler than in the study: each batch holds every day equally often, all completions have
one length, and nothing is shared between states.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

ITEMS, ACTIONS = 3, 2
SKIP, CITE = DISMISS, ESCALATE = range(ACTIONS)
LENGTH = ITEMS + 1

# Per day: which observations look odd, which belong to a theft. A late shift looks like one.
DAYS = {"quiet": ((0, 0, 0), (0, 0, 0)), "theft": ((1, 0, 1), (1, 0, 1)),
        "late shift": ((1, 1, 0), (0, 0, 0))}
MISSED, FALSE_ALARM, RIGHT, PER_ITEM = -1.0, -0.5, 0.5, 1 / 6


@dataclass(frozen=True)
class World:
    """All completions: their days `(N,)`, states and actions `(N, T)` and rewards `(N,)`.

    `odd` `(S,)` is what the state's next observation looks like (zero where the day is judged),
    `cited` `(S,)` how many items have been cited on the way to it, `step` `(S,)` the token.
    """

    names: tuple[str, ...]
    days: Tensor
    states: Tensor
    actions: Tensor
    rewards: Tensor
    odd: Tensor
    cited: Tensor
    step: Tensor

    @property
    def n_states(self) -> int:
        return self.odd.numel()

    @property
    def mask(self) -> Tensor:
        """Ones `(N, T)`: no completion ends early."""
        return torch.ones(self.states.shape, dtype=torch.float64)


def soc_world() -> World:
    """Return the world of `DAYS`.

    A wrong decision earns `MISSED` or `FALSE_ALARM`, whatever was cited. A right one earns `RIGHT`
    and, per observation, `PER_ITEM` more or less by whether it was cited exactly if it belongs to
    a theft: the best completion of each day earns 1.

    >>> world = soc_world(); world.rewards.view(3, -1).max(1).values
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    written = list(itertools.product(range(ACTIONS), repeat=LENGTH))
    days, states, rewards, odd, cited, step = [], [], [], [], [], []
    for day, (looks, truth) in enumerate(DAYS.values()):
        prefixes = [prefix for t in range(LENGTH)
                    for prefix in itertools.product(range(ACTIONS), repeat=t)]
        index = {prefix: len(odd) + i for i, prefix in enumerate(prefixes)}
        odd += [(*looks, 0)[len(prefix)] for prefix in prefixes]
        cited += [sum(prefix) for prefix in prefixes]
        step += [len(prefix) for prefix in prefixes]
        days += [day] * len(written)
        states += [[index[actions[:t]] for t in range(LENGTH)] for actions in written]
        rewards += [_reward(actions, truth) for actions in written]
    return World(names=tuple(DAYS), days=torch.tensor(days), states=torch.tensor(states),
                 actions=torch.tensor(written * len(DAYS)),
                 rewards=torch.tensor(rewards, dtype=torch.float64), odd=torch.tensor(odd),
                 cited=torch.tensor(cited), step=torch.tensor(step))


def _reward(actions: tuple[int, ...], truth: tuple[int, ...]) -> float:
    *cites, decision = actions
    if decision != int(any(truth)):
        return MISSED if any(truth) else FALSE_ALARM
    right = sum(said == true for said, true in zip(cites, truth, strict=True))
    return RIGHT + PER_ITEM * (2 * right - ITEMS)


def analyst(world: World, *, generator: torch.Generator, policies: int | None = None) -> Tensor:
    """Return logits `(S, 2)`, or `(policies, S, 2)`, of analysts who go by looks, roughly.

    They cite what looks odd and escalate what they cited, each habit blurred by normal noise.
    """
    shape = (world.n_states,) if policies is None else (policies, world.n_states)
    habit = torch.where(world.step == ITEMS, world.cited - 1.0, 2.0 * world.odd - 1.0)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    lean = (habit + noise) / 2
    return torch.stack([-lean, lean], -1)


def log_probs(world: World, logits: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return token log-probabilities `(..., B, T)` of the completions `rows`, of all by default.

    Differentiable in the logits; `rows` `(..., B)` has the leading dimensions of the logits.
    """
    every = logits.log_softmax(-1)[..., world.states, world.actions]
    if rows is None:
        return every
    return every.gather(-2, rows.unsqueeze(-1).expand(*rows.shape, LENGTH))


def chances(world: World, logits: Tensor) -> Tensor:
    """Return the probability `(..., N)` of each completion among those of all days, all alike."""
    return log_probs(world, logits).sum(-1).exp() / len(world.names)


def expected_reward(world: World, logits: Tensor) -> Tensor:
    """Return J = E[R] `(...)`, the exact objective, differentiable in the logits."""
    return chances(world, logits) @ world.rewards


def visits(world: World, logits: Tensor) -> Tensor:
    """Return d(s) `(..., S)`, the chance that a completion passes each state; sums to T."""
    return chances(world, logits) @ _passed(world)


def _passed(world: World) -> Tensor:
    return one_hot(world.states, world.n_states).sum(1).double()


def values(world: World, logits: Tensor) -> Tensor:
    """Return V(s) = E[R | s] `(..., S)`: the reward comes at the end and is not discounted."""
    weight = chances(world, logits)
    return (weight * world.rewards) @ _passed(world) / (weight @ _passed(world))


def action_values(world: World, logits: Tensor) -> Tensor:
    """Return Q(s, a) = E[R | s, a] `(..., S, 2)`."""
    weight = chances(world, logits)
    taken = one_hot(world.states * ACTIONS + world.actions,
                    world.n_states * ACTIONS).sum(1).double()
    return ((weight * world.rewards) @ taken / (weight @ taken)).unflatten(-1, (-1, ACTIONS))


def exact_gradient(world: World, logits: Tensor) -> Tensor:
    """Return the gradient of J `(..., S, 2)` by the policy gradient theorem.

    For a table of softmax logits it is d(s) pi(a|s) (Q(s, a) - V(s)) (Sutton et al. 2000, "Policy
    gradient methods for reinforcement learning with function approximation", theorem 1).
    """
    advantages = action_values(world, logits) - values(world, logits).unsqueeze(-1)
    return visits(world, logits).unsqueeze(-1) * logits.softmax(-1) * advantages


def fisher(world: World, logits: Tensor, step: Tensor) -> Tensor:
    """Return F x `(..., S, 2)` for a step x: KL(pi || pi of logits + x) is x F x / 2 for small x.

    Per state F = d(s) (diag pi - pi pi'), the constraint of TRPO to second order (Schulman et al.
    2015, arXiv:1502.05477, appendix C).
    """
    policy = logits.softmax(-1)
    centred = step - (policy * step).sum(-1, keepdim=True)
    return visits(world, logits).unsqueeze(-1) * policy * centred


def natural_gradient(world: World, logits: Tensor) -> Tensor:
    """Return the x `(..., S, 2)` that solves F x = gradient of J: here Q(s, a) - V(s) itself."""
    return action_values(world, logits) - values(world, logits).unsqueeze(-1)


def trust_region_step(world: World, logits: Tensor, delta: float) -> Tensor:
    """Return TRPO's step `(S, 2)` for one policy: as far as KL = `delta` nats, to second order.

    x = sqrt(2 delta / (g F^-1 g)) F^-1 g, with g the exact gradient (Schulman et al. 2015,
    arXiv:1502.05477, appendix C); no line search follows.
    """
    natural = natural_gradient(world, logits)
    return natural * (2 * delta / (exact_gradient(world, logits) * natural).sum()).sqrt()


def divergence(world: World, old: Tensor, new: Tensor) -> Tensor:
    """Return the exact KL(old || new) in nats per completion `(...)`."""
    weight = chances(world, old)
    return (weight * (log_probs(world, old) - log_probs(world, new)).sum(-1)).sum(-1)


def draw(world: World, logits: Tensor, group_size: int, *, generator: torch.Generator) -> Tensor:
    """Return rows `(..., B)`: `group_size` completions of every day, those of a day together."""
    of_day = chances(world, logits).unflatten(-1, (len(world.names), -1))
    flat = torch.multinomial(of_day.flatten(0, -2), group_size, replacement=True,
                             generator=generator)
    first = torch.arange(len(world.names)).unsqueeze(-1) * of_day.size(-1)
    return (flat.view(*of_day.shape[:-1], group_size) + first).flatten(-2)


def policy_gradient(world: World, logits: Tensor, rows: Tensor, advantages: Tensor,
                    weights: Tensor | None = None) -> Tensor:
    """Return the estimate `(..., S, 2)`: the mean over rows of sum_t A_t grad log pi(a_t|s_t).

    `advantages` `(..., B, T)` count as constants, as in REINFORCE (Williams 1992). `weights`
    `(..., B)` that sum to one replace the mean, so that with all completions and their `chances`
    the estimate is its own exact expectation.
    """
    share = 1 / rows.size(-1) if weights is None else weights.unsqueeze(-1)
    taken = (world.states * ACTIONS + world.actions)[rows].flatten(-2)
    pushed = torch.zeros((*rows.shape[:-1], world.n_states * ACTIONS), dtype=torch.float64)
    pushed = pushed.scatter_add(-1, taken, (share * advantages).flatten(-2))
    pushed = pushed.unflatten(-1, (-1, ACTIONS))
    # grad log pi(a|s) is one at a's logit, minus pi at each logit of the state
    return pushed - logits.softmax(-1) * pushed.sum(-1, keepdim=True)


def critic_error(world: World, logits: Tensor, critic: Tensor) -> Tensor:
    """Return the root mean square error `(...)` of values `(..., S)` over the states passed."""
    share = visits(world, logits) / LENGTH
    return (share * (critic - values(world, logits)) ** 2).sum(-1).sqrt()


def gradient_error(estimates: Tensor, exact: Tensor, weights: Tensor | None = None
                   ) -> dict[str, float]:
    """Return how estimates `(R, S, 2)` of a gradient `(S, 2)` are wrong, in units of its norm.

    `bias` is the length of their mean's error, `noise` the root mean square distance to that mean:
    the mean of n estimates is off by sqrt(bias^2 + noise^2 / n). `cosine` is that of their mean
    with the exact gradient: below one no step length makes up for the bias. With `weights` `(R,)`,
    the chances of all that can be drawn, all three are exact; without them the estimates are
    draws, and the part of the bias that their number makes by chance is taken off.
    """
    estimates, exact = estimates.flatten(1), exact.flatten()
    share = torch.full((len(estimates),), 1 / len(estimates), dtype=torch.float64) \
        if weights is None else weights
    mean, size = share @ estimates, exact.norm()
    variance = share @ (estimates - mean).square().sum(1)
    squared = (mean - exact).square().sum()
    if weights is None:
        variance = variance * len(estimates) / (len(estimates) - 1)
        squared = (squared - variance / len(estimates)).clamp(min=0)
    return {"bias": float(squared.sqrt() / size), "noise": float(variance.sqrt() / size),
            "cosine": float(torch.cosine_similarity(mean, exact, dim=0))}


def enumerated_error(world: World, logits: Tensor, advantages: Tensor,
                     drawn_by: Tensor | None = None) -> dict[str, float]:
    """Return the exact `gradient_error` of one completion's estimate, all of them weighed.

    `advantages` `(N, T)` are those of every completion. `drawn_by` are the logits of the policy
    that draws the completions, by default the one whose gradient is asked for.
    """
    rows = torch.arange(len(world.rewards)).unsqueeze(1)
    each = policy_gradient(world, logits.expand(len(rows), -1, -1), rows, advantages.unsqueeze(1))
    return gradient_error(each, exact_gradient(world, logits),
                          chances(world, logits if drawn_by is None else drawn_by))
