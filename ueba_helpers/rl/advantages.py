"""From rewards to advantages: the whole difference between GRPO and PPO, side by side.

In: sequence rewards `(B,)` or token rewards and values `(B, T)` with a completion mask.
Out: advantages of the same shape. `B` counts completions, completions of one prompt stand together
in groups of `group_size`; `T` counts completion tokens. A sequence reward of NaN stands for a
completion that could not be scored. Pure tensor functions without state; they refuse a batch that
does not divide into groups and a scale they do not know.
"""

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-4  # added to a standard deviation, as in TRL's GRPOTrainer
SCALES = ("none", "group", "batch")
BASELINES = ("none", "group", "leave_one_out")


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape (B,), got {tuple(rewards.shape)}")
    if group_size < 1 or rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not divide into groups of {group_size}")
    return rewards.view(-1, group_size)


def _mean(x: Tensor) -> Tensor:
    return (x.nanmean if x.isnan().any() else x.mean)(-1, keepdim=True)


def _deviation(x: Tensor) -> Tensor:
    """Return the unbiased deviation over the last dimension, NaN left out; of one value, zero."""
    if not x.isnan().any():
        return x.std(-1) if x.size(-1) > 1 else torch.zeros_like(x[..., 0])
    squares = ((x - _mean(x)) ** 2).nansum(-1)
    return (squares / ((~x.isnan()).sum(-1) - 1).clamp(min=1)).sqrt()


def reward_scale(rewards: Tensor, group_size: int, scale: str = "none") -> Tensor:
    """Return the divisor `(B,)` of the advantages: one, the group's or the batch's deviation.

    The deviation is the unbiased one plus `EPSILON`; a single value has deviation zero, NaN is
    left out.

    >>> reward_scale(torch.tensor([1., 1., 0., 0.]), 4, "none")
    tensor([1., 1., 1., 1.])
    """
    groups = _groups(rewards, group_size)
    if scale == "none":
        return torch.ones_like(rewards)
    if scale == "group":
        return _deviation(groups).repeat_interleave(group_size) + EPSILON
    if scale == "batch":
        return (_deviation(rewards) + EPSILON).expand_as(rewards)
    raise ValueError(f"scale={scale!r} is unknown: legal values are {', '.join(SCALES)}")


def group_relative(rewards: Tensor, group_size: int, scale: str = "none",
                   floor: float | None = None) -> Tensor:
    """Return rewards minus their group's mean, divided by a deviation (GRPO).

    `scale="group"` is the published form, A = (r - mean) / std (Shao et al. 2024,
    arXiv:2402.03300, section 4.1.2); `"none"` leaves the division out (Dr. GRPO, Liu et al. 2025,
    arXiv:2503.20783); `"batch"` divides by the deviation of the whole batch. A reward of NaN is
    left out of mean and deviation, its advantage is zero.

    `floor` is the least reward of a right answer: the baseline never lies below it, so that under
    graded rewards a wrong answer gains nothing from its group being worse (CoRPO,
    arXiv:2511.04439). The advantages of a group then no longer sum to zero.

    >>> group_relative(torch.tensor([1., 1., 0., 0.]), 4)
    tensor([ 0.5000,  0.5000, -0.5000, -0.5000])
    >>> group_relative(torch.tensor([-.2, -1., -1., -1.]), 4)
    tensor([ 0.6000, -0.2000, -0.2000, -0.2000])
    >>> group_relative(torch.tensor([-.2, -1., -1., -1.]), 4, floor=0.)
    tensor([-0.2000, -1.0000, -1.0000, -1.0000])
    """
    groups = _groups(rewards, group_size)
    baseline = _mean(groups)
    centred = (groups - (baseline if floor is None else baseline.clamp(min=floor))).reshape(-1)
    return (centred / reward_scale(rewards, group_size, scale)).masked_fill(rewards.isnan(), 0.0)


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Return rewards minus the mean of the *other* rewards of the group (RLOO).

    A_i = r_i - mean of r_j over j != i (Ahmadian et al. 2024, arXiv:2402.14740, equation 6):
    G / (G - 1) times the group-relative advantage without scaling. A reward of NaN is left out; it
    and a reward without another one beside it have advantage zero.

    >>> leave_one_out(torch.tensor([1., 0., 0., 0.]), 4)
    tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
    """
    if group_size < 2:
        raise ValueError(f"leave-one-out needs groups of at least 2, got {group_size}")
    groups = _groups(rewards, group_size)
    counted = (~groups.isnan()).sum(1, keepdim=True)
    others = (groups.nansum(1, keepdim=True) - groups) / (counted - 1)
    alone = groups.isnan() | (counted < 2)
    return (groups - others).masked_fill(alone, 0.0).reshape(-1)


def baselined(rewards: Tensor, group_size: int, baseline: str = "group", scale: str = "none",
              floor: float | None = None) -> Tensor:
    """Return rewards minus one of `BASELINES`, divided by one of `SCALES`.

    Together with `gae` this is the way from REINFORCE (no baseline) by the group's mean (GRPO) and
    the mean of the others (RLOO) to a critic (PPO). `floor` is that of `group_relative`.

    >>> baselined(torch.tensor([1., 0.]), 2, "none")
    tensor([1., 0.])
    """
    if baseline == "group":
        return group_relative(rewards, group_size, scale, floor)
    if baseline == "leave_one_out":
        advantages = leave_one_out(rewards, group_size)
    elif baseline == "none":
        advantages = rewards.nan_to_num(nan=0.0)
    else:
        raise ValueError(f"baseline={baseline!r} is unknown: legal values are "
                         f"{', '.join(BASELINES)}")
    return advantages / reward_scale(rewards, group_size, scale)


def length_adaptive_lambda(mask: Tensor, alpha: float) -> Tensor:
    """Return lambda `(B,)` that grows with the length of a completion, 1 - 1 / (alpha L).

    L counts the masked-in tokens (VAPO, arXiv:2504.05118, section 4.2): the share of the terminal
    reward that reaches a completion's first tokens then depends less on how long it is. Very short
    ones have lambda zero at the least.

    >>> length_adaptive_lambda(torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]), 0.5)
    tensor([0.5000, 0.0000])
    """
    return (1 - 1 / (alpha * mask.sum(1).clamp(min=1))).clamp(min=0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
        ) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates and the critic's targets, both `(B, T)`.

    delta_t = r_t + gamma V_(t+1) - V_t and A_t = delta_t + gamma lam A_(t+1) (Schulman et al.
    2016, arXiv:1506.02438, equation 16), `lam` one number or one per completion `(B,)`;
    `values[:, t]` is the value of the state *before*
    token t, the value after the last masked-in token is zero. Returns are A + V, before any
    whitening. Outside the mask both are zero.

    >>> a, r = gae(torch.tensor([[0., 1.]]), torch.tensor([[.5, .5]]), torch.ones(1, 2), 1., 1.)
    >>> a, r
    (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))
    """
    if not rewards.shape == values.shape == mask.shape or rewards.dim() != 2:
        raise ValueError("rewards, values and mask must share one (B, T) shape, got "
                         f"{tuple(rewards.shape)}, {tuple(values.shape)}, {tuple(mask.shape)}")
    inside = mask.bool()
    mask = mask.to(rewards.dtype)
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    following_value = torch.zeros_like(rewards[:, 0])
    following_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        estimate = delta + gamma * lam * following_advantage
        advantages[:, t] = estimate * mask[:, t]
        # A masked-out token (padding, or a tool's words between the policy's own) is stepped over.
        following_advantage = torch.where(inside[:, t], estimate, following_advantage)
        following_value = torch.where(inside[:, t], values[:, t], following_value)
    return advantages, (advantages + values) * mask


def terminal_rewards(scores: Tensor, mask: Tensor) -> Tensor:
    """Return `(B, T)` rewards that are zero but for `scores` on each row's last masked-in token.

    >>> terminal_rewards(torch.tensor([2., 3.]), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    tensor([[0., 2., 0.],
            [0., 0., 3.]])
    """
    positions = torch.arange(mask.size(1), device=mask.device)
    last = (positions * mask.long()).max(1).values
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    return rewards.scatter(1, last.unsqueeze(1), scores.unsqueeze(1)) * mask


def whiten(x: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = torch.sum) -> Tensor:
    """Return x with mean zero and variance one over the mask, zero outside it.

    The variance is the unbiased one and 1e-8 is added to it, as in TRL 1.12's `masked_whiten`.
    `total` sums a scalar, over all ranks where a batch is spread over several.

    >>> whiten(torch.tensor([[1., 3., 99.]]), torch.tensor([[1, 1, 0]]))
    tensor([[-0.7071,  0.7071,  0.0000]])
    """
    mask = mask.to(x.dtype)
    count = total(mask.sum())
    if count < 2:
        raise ValueError("whitening needs at least two values inside the mask")
    mean = total((x * mask).sum()) / count
    variance = total(((x - mean) ** 2 * mask).sum()) / (count - 1)
    return ((x - mean) * torch.rsqrt(variance + 1e-8) * mask).to(x.dtype)


def kl_estimate(log_policy: Tensor, log_reference: Tensor, estimator: str = "k1") -> Tensor:
    """Return per-token estimates of KL(policy || reference) for tokens drawn from the policy.

    With x = log policy - log reference: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x
    (Schulman 2020, "Approximating KL divergence"). k1 and k3 are unbiased, k3 is never negative.

    >>> kl_estimate(torch.tensor([0.]), torch.tensor([-1.]), "k1")
    tensor([1.])
    """
    x = log_policy - log_reference
    if estimator == "k1":
        return x
    if estimator == "k2":
        return x * x / 2
    if estimator == "k3":
        return torch.exp(-x) - 1 + x
    raise ValueError(f"estimator={estimator!r} is unknown: legal values are k1, k2, k3")


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns) over the mask; 0 where returns do not vary.

    Measured around the residual's own mean, so that a constant offset of the critic costs
    nothing: one is perfect, zero no better than a constant, below zero worse.

    >>> r = torch.tensor([[1., 2., 3.]]); explained_variance(r + 1, r, torch.ones(1, 3))
    tensor(1.)
    """
    inside = mask.bool()
    targets, residuals = returns[inside], (returns - values)[inside]
    if targets.numel() < 2:
        return torch.zeros((), device=values.device)
    total = targets.var(correction=0)
    explained = 1 - residuals.var(correction=0) / total.clamp(min=1e-12)
    return torch.where(total > 1e-8, explained, torch.zeros_like(explained))
