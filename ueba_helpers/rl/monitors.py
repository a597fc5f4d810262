"""Training health: what every metric means, when a curve is ill, and the files the curves live in.

In: the rows of `metrics.jsonl` (one dict per optimiser step, TRL's names where TRL has one) and,
where a run is judged on held-out windows, macro-F1 and the evidence hit rate. Out: `Alarm`s in
plain words, the files `metrics.jsonl` and `timings.jsonl`, and measures of the completions' text.

Refused: thresholds that cannot be, names of alarms that do not exist, a trainer that does not log
every step, a metrics file that ends before the resumed step.
"""

import functools
import logging
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path

from transformers import TrainerCallback

from ueba_helpers.data.records import append_row, cut_rows, plain, read_rows
from ueba_helpers.errors import UserError
from ueba_helpers.task.rewards import (
    Completion,
    RewardFunction,
    citations_per_answer,
    completion_text,
    copy_rate,
    label_entropy,
    labels_per_answer,
    verdicts_of,
)
from ueba_helpers.task.verdicts import MAX_EVIDENCE

logger = logging.getLogger(__name__)

# -- what is written ------------------------------------------------------------------------------

# Name -> (definition, unit). A name with a star stands for one metric per reward function.
METRICS: dict[str, tuple[str, str]] = {
    "step": ("Optimiser steps taken.", "steps"),
    "epoch": ("Passes over the training prompts.", "epochs"),
    "learning_rate": ("Learning rate of the policy.", "1"),
    "num_tokens": ("Prompt and completion tokens so far, a prompt once per completion.", "tokens"),
    "policy_loss": ("Clipped surrogate, token mean over the batch, plus KL where it is placed in "
                    "the loss; a micro-batch's share, averaged over micro-batches.",
                    "reward units"),
    "loss": ("Policy loss (clipped surrogate, plus KL where it is placed in the loss), plus the "
             "weighted value loss for PPO.", "reward units"),
    "grad_norm": ("Norm of the policy's gradient before clipping.", "reward units"),
    "reward": ("Mean over completions of the weighted sum of the reward functions, before any KL "
               "or missing-end penalty.", "reward units"),
    "reward_std": ("Standard deviation of that sum over the batch.", "reward units"),
    "rewards/*/mean": ("Mean of one reward function, unweighted.", "reward units"),
    "rewards/*/std": ("Standard deviation of one reward function, unweighted.", "reward units"),
    "frac_reward_zero_std": ("Share of groups whose completions all earn the same; 1 where groups "
                             "have one completion.", "share"),
    "advantages/absolute_mean": ("Mean absolute advantage over tokens, after scaling.", "1"),
    "entropy": ("Mean entropy of the policy's next-token distribution over completion tokens.",
                "nats per token"),
    "kl": ("Mean k3 estimate of the KL to the reference, the one in the loss.", "nats per token"),
    "kl_to_reference/per_completion": ("Mean over completions of the summed k1 estimate of "
                                       "KL(policy || reference).", "nats per completion"),
    "kl_to_reference/per_token": ("The same sum divided by the number of tokens.",
                                  "nats per token"),
    "approx_kl": ("Mean k3 estimate of the KL between the sampling policy and the updated one.",
                  "nats per token"),
    "stands_still": ("One where the policy was held at the target KL.", "share of steps"),
    "ratio/max": ("Largest probability ratio of updated to sampling policy of any token.", "1"),
    "clip_ratio/low_mean": ("Share of tokens clipped at the lower bound.", "share"),
    "clip_ratio/high_mean": ("Share of tokens clipped at the upper bound.", "share"),
    "clip_ratio/region_mean": ("Share of tokens clipped at either bound.", "share"),
    "clip_ratio/low_min": ("Smallest share of tokens clipped at the lower bound in one "
                           "completion.", "share"),
    "clip_ratio/high_max": ("Largest share of tokens clipped at the upper bound in one "
                            "completion.", "share"),
    "completions/mean_length": ("Mean length of the completions.", "tokens"),
    "completions/min_length": ("Shortest completion.", "tokens"),
    "completions/max_length": ("Longest completion.", "tokens"),
    "completions/p95_length": ("Length that 95 % of the completions do not exceed.", "tokens"),
    "completions/clipped_ratio": ("Share of completions cut off by the length limit.", "share"),
    "completions/mean_terminated_length": ("Mean length of the completions that ended by "
                                           "themselves; 0 if none did.", "tokens"),
    "completions/min_terminated_length": ("Shortest completion that ended by itself.", "tokens"),
    "completions/max_terminated_length": ("Longest completion that ended by itself.", "tokens"),
    "critic/explained_variance": ("Share of the variance of the returns over tokens that the "
                                  "values explain: 1 is perfect, 0 no better than a constant.",
                                  "1"),
    "critic/value_mean": ("Mean value over completion tokens.", "reward units"),
    "critic/return_mean": ("Mean return over completion tokens.", "reward units"),
    "critic/value_loss": ("Half the mean squared error of the values, clipped where asked; their "
                          "cross-entropy in nats with critic_loss 'bce'.",
                          "squared reward units"),
    "critic/clip_ratio": ("Share of tokens whose value error is the clipped one.", "share"),
    "critic/grad_norm": ("Norm of the critic's gradient before clipping.", "reward units"),
    "critic/warming_up": ("One while only the critic learns.", "share of micro-batches"),
    "text/repetition": ("Mean share of a completion's word triples that it has said before.",
                        "share"),
    "text/unique_share": ("Distinct completions over completions.", "share"),
    "text/label_entropy": ("Entropy of the risks that valid verdicts say.", "nats"),
    "text/labels_per_answer": ("Mean number of different risk labels a completion names.",
                               "labels"),
    "text/valid_share": ("Share of completions that are valid verdicts.", "share"),
    "text/citations": ("Mean number of items that a valid verdict cites.", "items"),
    "text/cited_share": ("Mean number of items that a valid verdict cites, over what it could: "
                         "those shown, and no more than a verdict may hold.", "share"),
    "text/same_citation": ("Share of the alarms that cite the commonest set of ids.", "share"),
    "text/copy_rate": ("Mean share of a completion's runs of six words that stand in its prompt.",
                       "share"),
    "held_out/macro_f1": ("Macro-F1 on held-out windows, on steps where it is measured.", "1"),
    "held_out/evidence_hit_rate": ("Share of the true items of held-out windows that are cited, "
                                   "mean over windows that have any; invalid verdicts cite none.",
                                   "share"),
    "alarms": ("Names of the alarms that begin at this step.", "names"),
}

# What goes to timings.jsonl instead: it differs between two identical runs.
TIMINGS: dict[str, tuple[str, str]] = {
    "step": METRICS["step"],
    "seconds": ("Wall-clock time of the optimiser step, rollout included, evaluation not.",
                "seconds"),
    "tokens_per_second": ("Prompt and completion tokens of the step's rollout over its seconds.",
                          "tokens per second"),
}

_SHARED = (
    "epoch", "learning_rate", "num_tokens", "loss", "policy_loss", "grad_norm", "reward",
    "reward_std", "frac_reward_zero_std", "advantages/absolute_mean", "entropy",
    "kl_to_reference/per_completion", "kl_to_reference/per_token", "approx_kl", "ratio/max",
    "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "clip_ratio/low_min",
    "clip_ratio/high_max", "completions/mean_length", "completions/min_length",
    "completions/max_length", "completions/clipped_ratio", "completions/mean_terminated_length",
    "completions/min_terminated_length", "completions/max_terminated_length",
    "held_out/macro_f1", "held_out/evidence_hit_rate", "alarms",
)
HELD_OUT = ("macro_f1", "evidence_hit_rate")  # what is watched of held-out windows
_CRITIC = tuple(name for name in METRICS if name.startswith("critic/"))
_TEXT = (*(name for name in METRICS if name.startswith("text/")), "completions/p95_length")
_TIME_KEYS = ("step_time", "total_flos", "train_runtime", "train_samples_per_second",
              "train_steps_per_second")


def describe(name: str) -> tuple[str, str]:
    """Return a metric's definition and unit; raises `KeyError` for a name that is not written.

    >>> describe("entropy")[1]
    'nats per token'
    >>> describe("rewards/ueba_format/mean")[1]
    'reward units'
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, about in METRICS.items():
        if "*" in pattern and fnmatchcase(name, pattern):
            return about
    raise KeyError(f"{name} is no metric: see METRICS")


def metric_keys(method: str, reward_functions: Iterable[str], *, kl_in_loss: bool = False,
                target_kl: bool = False, text: bool = False) -> tuple[str, ...]:
    """Return the fixed keys of a method's metrics.jsonl, sorted, without `step`.

    `method` is "ppo" or "grpo", `reward_functions` the names of the reward functions, `target_kl`
    whether one is set, `text` whether one function is wrapped by `with_text_metrics`.

    >>> "critic/value_mean" in metric_keys("ppo", ["ueba_format"])
    True
    >>> "critic/value_mean" in metric_keys("grpo", ["ueba_format"])
    False
    """
    if method not in ("ppo", "grpo"):
        raise ValueError(f"method={method!r} is unknown: legal values are 'ppo' and 'grpo'")
    keys = {*_SHARED, *(_CRITIC if method == "ppo" else ()), *(_TEXT if text else ())}
    keys |= {f"rewards/{name}/{part}" for name in reward_functions for part in ("mean", "std")}
    keys |= {name for name, wanted in (("kl", kl_in_loss), ("stands_still", target_kl)) if wanted}
    return tuple(sorted(keys))


# -- alarms ---------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """When a curve counts as ill. Means run over the last `window` steps that have a value."""

    window: int = 5  # own choice: one step's estimate is noisy
    start: int = 5  # own choice: steps that make up the value at the start
    critic_steps: int = 20  # explained variance below 0 this long is a broken critic (own practice)
    value_gap: float = 0.5  # own choice: a quarter of the reward's range [-1, 1]
    entropy_share: float = 0.2  # of the start; entropy law of Cui et al. 2025, arXiv:2505.22617
    kl: float = 10.0  # nats per completion: TRL's PPO guide, "ideally between 0 and 10"; folklore
    length_factor: float = 2.0  # own choice, up or down from the start
    dead_groups: float = 0.7  # own practice; rewards give no gradient (DAPO, arXiv:2503.14476)
    clip_share: float = 0.2  # 5 to 20 % is usual; above it most of the update is thrown away
    ratio: float = 10.0  # upper end of dual-clip constants in use (3 to 10)
    truncated_share: float = 0.25  # own choice
    gradient_factor: float = 5.0  # one published divergence grew 6-fold (NeMo-RL issue 3412)
    gradient_floor: float = 1.0  # own choice: the usual clipping norm; smaller ones do no harm
    gradient_history: int = 20  # own choice: steps whose median is the usual norm
    held_out_patience: int = 3  # own choice: evaluations compared with the latest
    reward_rise: float = 0.05  # own choice, in reward units
    macro_f1_rise: float = 0.005  # own choice
    held_out_drop: float = 0.1  # own choice: twice the error of macro-F1 on a hundred windows
    evidence_drop: float = 0.08  # own choice: five of sixty windows
    label_entropy: float = 0.5  # nats; balanced labels have 1.10, one at 85 % 0.52 (own choice)
    labels_per_answer: float = 1.5  # an answer has one label (own choice)
    valid_share: float = 0.8  # own choice; a good start has 0.97
    cited_share: float = 0.7  # own choice: honest verdicts cite up to three of eight items
    same_citation: float = 0.5  # own choice: what is odd stands at another place every day
    same_citation_factor: float = 2.0  # own choice: up from the start, and above the least
    same_citation_least: float = 0.25  # own choice: less is no habit worth a warning
    unique_share: float = 0.1  # own choice: all of G = 8 completions equal gives 0.125
    repetition: float = 0.5  # own choice
    copy_rate: float = 0.5  # own choice

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise UserError(f"{field.name}={value!r} is not possible: legal values are 0 and "
                                "more.")
            if field.type is int and (value < 1 or value != int(value)):
                raise UserError(f"{field.name}={value!r} is not possible: legal values are whole "
                                "numbers from 1.")


@dataclass(frozen=True)
class Alarm:
    """One curve that became ill at `step`; severity is "warning" or "critical"."""

    name: str
    step: int
    message: str
    severity: str


def _number(value: object) -> float | None:
    """Return a finite float, or None."""
    if value is None or isinstance(value, str | list | tuple):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


class Health:
    """The state that alarms are raised from: feed it the rows of a run in order.

    An alarm is returned at the step where its condition begins to hold, and again only after the
    condition has ceased. `num_generations` tells groups of one (PPO), which are never dead.
    """

    def __init__(self, thresholds: Thresholds | None = None, *,
                 num_generations: int | None = None):
        self.thresholds = thresholds or Thresholds()
        self.num_generations = num_generations
        limits = self.thresholds
        kept = max(limits.window + limits.gradient_history, limits.critic_steps)
        self._new_series = functools.partial(deque, maxlen=kept)
        self._series: dict[str, deque[float]] = {}
        self._first: dict[str, list[float]] = {}
        self._held_out: deque[tuple[float | None, float]] = deque(
            maxlen=limits.held_out_patience + 1)
        self._best = -math.inf  # macro-F1 on held-out windows
        self._hit_rates: list[float] = []  # of evidence on them
        self._row: Mapping = {}
        self._active: set[str] = set()

    def begin(self, held_out: Mapping) -> None:
        """Take the held-out results of the policy that training begins from."""
        self._judged(held_out)

    def update(self, row: Mapping, *, held_out: Mapping | None = None) -> tuple[Alarm, ...]:
        """Take one step's row (with `step`) and return the alarms that begin with it.

        `held_out` holds macro_f1 and evidence_hit_rate where the step was followed by a judgement
        on held-out windows; what it lacks is taken from the row.
        """
        self._row = row
        for key, value in row.items():
            number = _number(value)
            if number is None or (key == "grad_norm" and row.get("critic/warming_up")):
                continue  # a frozen policy's norm is 0 and says nothing of the usual one
            self._series.setdefault(key, self._new_series()).append(number)
            first = self._first.setdefault(key, [])
            if len(first) < self.thresholds.start:
                first.append(number)
        own = {name: row.get(f"held_out/{name}") for name in HELD_OUT}
        macro_f1 = self._judged(own | dict(held_out or {}))
        if macro_f1 is not None:
            reward = self._series.get("reward")
            recent = None if not reward else statistics.fmean(
                list(reward)[-self.thresholds.window:])
            self._held_out.append((recent, macro_f1))
        found = {name: message for name, (_, check) in _CHECKS.items() if (message := check(self))}
        begun = [name for name in found if name not in self._active]
        self._active = set(found)
        return tuple(Alarm(name, int(row["step"]), found[name], _CHECKS[name][0])
                     for name in begun)

    def _judged(self, held_out: Mapping) -> float | None:
        macro_f1, hit_rate = (_number(held_out.get(name)) for name in HELD_OUT)
        self._best = max(self._best, -math.inf if macro_f1 is None else macro_f1)
        if hit_rate is not None:
            self._hit_rates.append(hit_rate)
        return macro_f1

    def _mean(self, key: str) -> float | None:
        values = self._series.get(key, ())
        window = self.thresholds.window
        return statistics.fmean(list(values)[-window:]) if len(values) >= window else None

    def _start(self, key: str) -> float | None:
        """Return the mean at the start, once the latest window lies wholly behind it."""
        first = self._first.get(key, ())
        enough = len(self._series.get(key, ())) >= min(
            self.thresholds.start + self.thresholds.window, self._new_series().maxlen)
        full = len(first) == self.thresholds.start
        return statistics.fmean(first) if full and enough else None

    def _not_finite(self) -> str | None:
        keys = [key for key in ("loss", "grad_norm", "critic/grad_norm", "critic/value_loss")
                if key in self._row and _number(self._row[key]) is None]
        if keys:
            return (f"{', '.join(keys)} is not a finite number: the weights are about to be "
                    "harmed. Stop and lower the learning rate.")
        return None

    def _broken_critic(self) -> str | None:
        steps = self.thresholds.critic_steps
        latest = list(self._series.get("critic/explained_variance", ()))[-steps:]
        if len(latest) == steps and max(latest) < 0:
            return (f"The critic's explained variance has been below zero for {steps} steps (now "
                    f"{latest[-1]:.2f}): its values are worse than a constant. Give it a longer "
                    "warm-up or another learning rate.")
        return None

    def _value_gap(self) -> str | None:
        steps = self.thresholds.critic_steps
        values = list(self._series.get("critic/value_mean", ()))[-steps:]
        returns = list(self._series.get("critic/return_mean", ()))[-steps:]
        if len(values) < steps or len(returns) < steps:
            return None
        gaps = [value - target for value, target in zip(values, returns, strict=True)]
        if (min(map(abs, gaps)) > self.thresholds.value_gap
                and (max(gaps) < 0 or min(gaps) > 0)):
            return (f"The critic's mean value ({values[-1]:.2f}) has stayed far from the mean "
                    f"return ({returns[-1]:.2f}) for {steps} steps: it does not follow the "
                    "rewards.")
        return None

    def _entropy_collapse(self) -> str | None:
        start, now = self._start("entropy"), self._mean("entropy")
        if start is None or now is None or not now < self.thresholds.entropy_share * start:
            return None
        return (f"Entropy fell from {start:.3g} to {now:.3g} nats per token: the policy hardly "
                "explores any more.")

    def _length_drift(self) -> str | None:
        start = self._start("completions/mean_length")
        now = self._mean("completions/mean_length")
        factor = self.thresholds.length_factor
        if not start or now is None or start / factor <= now <= start * factor:
            return None
        return (f"Completions went from {start:.0f} to {now:.0f} tokens on average: check that "
                "length itself is not what pays.")

    def _dead_groups(self) -> str | None:
        now = self._mean("frac_reward_zero_std")
        if self.num_generations == 1 or now is None or now <= self.thresholds.dead_groups:
            return None
        return (f"In {now:.0%} of the groups all completions earn the same, so that only the KL "
                "tells them apart: choose prompts of another difficulty or larger groups.")

    def _ratio(self) -> str | None:
        now = _number(self._row.get("ratio/max"))
        if now is None or now <= self.thresholds.ratio:
            return None
        return (f"A token became {now:.1f} times as probable within one rollout: the sampled "
                "completions no longer stand for the policy.")

    def _gradient_of(self, key: str, network: str) -> str | None:
        limits = self.thresholds
        values = list(self._series.get(key, ()))
        if len(values) < limits.window + limits.gradient_history:
            return None
        now = statistics.fmean(values[-limits.window:])
        before = values[-limits.window - limits.gradient_history:-limits.window]
        usual = statistics.median(before)
        if now <= max(limits.gradient_factor * usual, limits.gradient_floor):
            return None
        return (f"The {network}'s gradient norm rose from {usual:.3g} to {now:.3g}: training is "
                "becoming unstable.")

    def _gradient(self) -> str | None:
        return self._gradient_of("grad_norm", "policy")

    def _critic_gradient(self) -> str | None:
        return self._gradient_of("critic/grad_norm", "critic")

    def _hack(self) -> str | None:
        if len(self._held_out) <= self.thresholds.held_out_patience:
            return None
        (reward, f1), (reward_now, f1_now) = self._held_out[0], self._held_out[-1]
        if reward is None or reward_now is None:
            return None
        rises = reward_now - reward > self.thresholds.reward_rise
        if not rises or f1_now - f1 > self.thresholds.macro_f1_rise:
            return None
        return (f"The reward rose from {reward:.2f} to {reward_now:.2f} while macro-F1 on "
                f"held-out windows went from {f1:.3f} to {f1_now:.3f}: the policy may earn "
                "reward without doing the task. Read some completions.")

    def _held_out_drop(self) -> str | None:
        if not self._held_out:
            return None
        now = self._held_out[-1][1]
        if self._best - now <= self.thresholds.held_out_drop:
            return None
        return (f"Macro-F1 on held-out windows fell from {self._best:.3f} to {now:.3f}: the policy "
                "unlearns the task. Go back to an earlier checkpoint and read what it says now.")

    def _evidence_drop(self) -> str | None:
        """Compare means of two judgements in a row, since one is noisy; the start stands alone."""
        rates = self._hit_rates
        means = [statistics.fmean(rates[max(0, i - 1):i + 1]) for i in range(len(rates))]
        if not means or max(means) - means[-1] <= self.thresholds.evidence_drop:
            return None
        return (f"The share of true items cited on held-out windows fell from {max(means):.3f} to "
                f"{means[-1]:.3f}: labels may be right for wrong reasons. Read what is cited, and "
                "give reasons more weight.")

    def _same_citation(self) -> str | None:
        limits = self.thresholds
        now, start = self._mean("text/same_citation"), self._start("text/same_citation")
        if now is None:
            return None
        risen = (start is not None and now > limits.same_citation_least
                 and now > limits.same_citation_factor * start)
        if not risen and now <= limits.same_citation:
            return None
        return (f"{now:.0%} of the alarms cite the same ids, whatever the prompt"
                + (f" (at the start {start:.0%})" if risen else "")
                + ": evidence is guessed by its place. Check that a right label for wrong reasons "
                "does not pay.")


def _beyond(key: str, limit: str, message: str, *, below: bool = False
            ) -> Callable[[Health], str | None]:
    """Return the check of a curve's latest mean against a threshold, `below` it or above.

    `limit` is a field of `Thresholds`; the message may name `now` and `limit`.
    """
    def check(health: Health) -> str | None:
        now, bound = health._mean(key), getattr(health.thresholds, limit)
        if now is None or not (now < bound if below else now > bound):
            return None
        return message.format(now=now, limit=bound)
    return check


_CHECKS: dict[str, tuple[str, Callable[[Health], str | None]]] = {
    "not_finite": ("critical", Health._not_finite),
    "broken_critic": ("critical", Health._broken_critic),
    "value_gap": ("warning", Health._value_gap),
    "entropy_collapse": ("critical", Health._entropy_collapse),
    "kl": ("critical", _beyond(
        "kl_to_reference/per_completion", "kl",
        "The policy is {now:.1f} nats per completion away from the reference (limit {limit:g}): "
        "check that held-out results still follow the reward.")),
    "length_drift": ("warning", Health._length_drift),
    "dead_groups": ("warning", Health._dead_groups),
    "clipping": ("warning", _beyond(
        "clip_ratio/region_mean", "clip_share",
        "{now:.0%} of the tokens are clipped: the update is too large. Lower the learning rate or "
        "the number of iterations.")),
    "ratio": ("warning", Health._ratio),
    "truncation": ("warning", _beyond(
        "completions/clipped_ratio", "truncated_share",
        "{now:.0%} of the completions hit the length limit: raise max_completion_tokens or punish "
        "the missing end.")),
    "gradient": ("critical", Health._gradient),
    "critic_gradient": ("critical", Health._critic_gradient),
    "hack_suspicion": ("critical", Health._hack),
    "held_out_drop": ("critical", Health._held_out_drop),
    "evidence_drop": ("warning", Health._evidence_drop),
    "one_label": ("warning", _beyond(
        "text/label_entropy", "label_entropy",
        "Nearly all verdicts say the same risk (entropy {now:.2f} nats): check that no constant "
        "answer pays.", below=True)),
    "all_labels": ("warning", _beyond(
        "text/labels_per_answer", "labels_per_answer",
        "A completion names {now:.1f} different risks: a reward that looks for the right word "
        "anywhere is paid by naming them all.")),
    "invalid": ("warning", _beyond(
        "text/valid_share", "valid_share",
        "Only {now:.0%} of the completions are valid verdicts: the format is being forgotten, or "
        "does not pay.", below=True)),
    "citing": ("warning", _beyond(
        "text/cited_share", "cited_share",
        "Verdicts cite {now:.0%} of the items they could: check that false citations cost "
        "something.")),
    "same_citation": ("warning", Health._same_citation),
    "sameness": ("warning", _beyond(
        "text/unique_share", "unique_share",
        "Only {now:.0%} of the completions differ from each other.", below=True)),
    "repetition": ("warning", _beyond(
        "text/repetition", "repetition",
        "{now:.0%} of what a completion says it has said before: it is looping.")),
    "copying": ("warning", _beyond(
        "text/copy_rate", "copy_rate",
        "{now:.0%} of a completion is copied from its prompt, word for word.")),
}
ALARMS: tuple[str, ...] = tuple(_CHECKS)


def alarms(rows: Iterable[Mapping], held_out: Iterable[Mapping] = (), *,
           thresholds: Thresholds | None = None, num_generations: int | None = None
           ) -> list[Alarm]:
    """Return the alarms of a whole run, in order: what `HealthMonitor` raised while it ran.

    `rows` are those of metrics.jsonl; `held_out` rows (`step`, `macro_f1`, `evidence_hit_rate`)
    count at their step, 0 for the start, and replace what `rows` say of it.

    >>> sick = [{"step": i, "kl_to_reference/per_completion": 2.0 * i} for i in range(1, 10)]
    >>> [(alarm.name, alarm.step) for alarm in alarms(sick)]
    [('kl', 8)]
    """
    health = Health(thresholds, num_generations=num_generations)
    judged = {int(row["step"]): row for row in held_out}
    found: list[Alarm] = []
    health.begin(judged.get(0, {}))
    for row in rows:
        found.extend(health.update(row, held_out=judged.get(row["step"])))
    return found


class HealthMonitor(TrainerCallback):
    """Raise alarms while a run is under way: log them, and stop the run on those in `stop_on`.

    `metrics_path` is where the run's metrics.jsonl lies: a resumed run reads its past there, so
    that it raises what an undisturbed one would. A run that was stopped by an alarm and is resumed
    goes on as long as the same alarm holds. Held-out results are handed over by `add_held_out`,
    in `on_step_end` at the latest, to count for that step; those of the start (step 0), which no
    row of metrics.jsonl holds, before `on_train_begin`, also when a run is resumed.
    """

    def __init__(self, thresholds: Thresholds | None = None, *, stop_on: Iterable[str] = (),
                 metrics_path: Path | str | None = None):
        stop_on = frozenset(stop_on)
        if unknown := sorted(stop_on - set(ALARMS)):
            raise UserError(f"stop_on names {', '.join(unknown)}: known alarms are "
                            f"{', '.join(ALARMS)}.")
        self.thresholds = thresholds or Thresholds()
        self.stop_on = stop_on
        self.metrics_path = None if metrics_path is None else Path(metrics_path)
        self.alarms: list[Alarm] = []
        self._held_out: dict[int, dict[str, float]] = {}
        self._health = Health(self.thresholds)
        self._observed: tuple[int, tuple[Alarm, ...]] = (0, ())

    def add_held_out(self, step: int, found: Mapping) -> None:
        """Hand over what was measured on held-out windows (`HELD_OUT`) after step `step`."""
        self._held_out[step] = {name: found.get(name) for name in HELD_OUT}

    def held_out_at(self, step: int) -> dict[str, float]:
        """Return what was handed over for a step; nothing where nothing was."""
        return self._held_out.get(step, {})

    def observe(self, step: int, logs: Mapping) -> tuple[Alarm, ...]:
        """Return the alarms that begin at `step`; a second call for the same step repeats them."""
        if self._observed[0] != step:
            found = self._health.update({**logs, "step": step}, held_out=self.held_out_at(step))
            self._observed = (step, found)
            self.alarms.extend(found)
            for alarm in found:
                logger.info("step %d, %s: %s", alarm.step, alarm.name, alarm.message)
        return self._observed[1]

    def on_train_begin(self, args, state, control, **kwargs):
        """Start afresh, or from the metrics of the steps before a resume."""
        self._health = Health(self.thresholds, num_generations=args.num_generations)
        self._health.begin(self.held_out_at(0))
        self._observed, self.alarms = (0, ()), []
        if self.metrics_path is not None and state.global_step:
            for row in read_rows(self.metrics_path):
                if row["step"] <= state.global_step:
                    self.alarms.extend(self._health.update(row))

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Look at one step's metrics."""
        if _is_training_row(logs):
            found = self.observe(state.global_step, logs)
            if any(alarm.name in self.stop_on for alarm in found):
                control.should_training_stop = True
        return control


# -- metrics.jsonl and timings.jsonl --------------------------------------------------------------

def _is_training_row(logs: Mapping | None) -> bool:
    return bool(logs) and "loss" in logs and "grad_norm" in logs


class MetricsWriter(TrainerCallback):
    """Write one JSON line per optimiser step: metrics by fixed keys, times into another file.

    `keys` come from `metric_keys`; a key without a value at a step is null, floats are written by
    `repr`, non-finite ones as null. Identical runs write identical bytes to `path`. At the start
    both files are cut back to the step the run resumes at (0 for a fresh run). A trainer's metric
    outside `keys` is left out, with one warning. With `monitor` the row names the alarms that
    begin and the held-out results of the step; the monitor must be a callback too.

    Raises `UserError` when the trainer does not log every step, or when the file ends before the
    resumed step.
    """

    def __init__(self, path: Path | str, timings_path: Path | str, *, keys: Sequence[str],
                 monitor: HealthMonitor | None = None):
        self.path, self.timings_path = Path(path), Path(timings_path)
        self.keys = tuple(sorted(set(keys) - {"step"}))
        for key in self.keys:
            describe(key)
        self.monitor = monitor
        self._warned: set[str] = set()
        self._started = self._seconds = 0.0
        self._tokens = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Cut both files back to the step at which training begins."""
        if args.logging_strategy != "steps" or args.logging_steps != 1:
            raise UserError(f"logging_steps={args.logging_steps} with logging_strategy="
                            f"{str(args.logging_strategy)!r}: metrics.jsonl holds every step, set "
                            "logging_steps=1 and logging_strategy='steps'.")
        self._tokens = float(state.num_input_tokens_seen)
        if not state.is_world_process_zero:
            return
        kept = cut_rows(self.path, state.global_step)
        last = kept[-1]["step"] if kept else 0
        cut_rows(self.timings_path, state.global_step)
        if last != state.global_step:
            raise UserError(f"{self.path} ends at step {last} and training resumes at step "
                            f"{state.global_step}: begin the run again, or resume at or before "
                            f"step {last}.")

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock, before callbacks that were added later judge held-out windows."""
        self._seconds = time.perf_counter() - self._started

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append the step's line to both files."""
        if not (_is_training_row(logs) and state.is_world_process_zero):
            return
        seconds, step = self._seconds, state.global_step
        row = {key: plain(logs.get(key)) for key in self.keys}
        if self.monitor is not None:
            judged = self.monitor.held_out_at(step)
            row |= {f"held_out/{name}": plain(judged.get(name)) for name in HELD_OUT}
            row["alarms"] = [alarm.name for alarm in self.monitor.observe(step, logs)]
        unknown = set(logs) - set(self.keys) - set(_TIME_KEYS) - self._warned
        if unknown:
            self._warned |= unknown
            logger.warning("not written to %s: %s", self.path.name, ", ".join(sorted(unknown)))
        append_row(self.path, {"step": step, **{key: row[key] for key in self.keys}})
        total = float(logs.get("num_tokens", self._tokens))
        tokens, self._tokens = total - self._tokens, total
        append_row(self.timings_path, {"step": step, "seconds": seconds,
                                       "tokens_per_second": tokens / seconds if tokens else None})


# -- measures of the text -------------------------------------------------------------------------

def repetition_share(text: str, *, words: int = 3) -> float:
    """Return the share of a text's runs of `words` words that it has said before, in [0, 1].

    >>> repetition_share("a b c a b c", words=3)
    0.25
    >>> repetition_share("a b", words=3)
    0.0
    """
    said = text.split()
    runs = Counter(tuple(said[i:i + words]) for i in range(len(said) - words + 1))
    total = sum(runs.values())
    return (total - len(runs)) / total if total else 0.0


def unique_share(texts: Sequence[str]) -> float:
    """Return the number of distinct texts over that of texts, in (0, 1]; 1 for none.

    >>> unique_share(["a", "a", "b", "a"])
    0.5
    """
    return len(set(texts)) / len(texts) if texts else 1.0


def upper_length(lengths: Sequence[int], *, share: float = 0.95) -> float:
    """Return the smallest length that a share of the completions does not exceed.

    >>> upper_length(range(1, 21))
    19.0
    """
    ordered = sorted(lengths)
    return float(ordered[math.ceil(share * len(ordered)) - 1]) if ordered else 0.0


def text_metrics(completions: Sequence[Completion], prompts: Sequence[Completion], *,
                 evidence_ids: Sequence[Sequence[str]], style: Sequence[str] | None = None
                 ) -> dict[str, float]:
    """Return the `text/` metrics of a batch of completions (NaN where nothing can be measured).

    `prompts` are strings or lists of chat messages, one per completion.

    >>> found = text_metrics(["no", "no"], ["say no", "say no"], evidence_ids=[[], []])
    >>> found["text/unique_share"], found["text/valid_share"]
    (0.5, 0.0)
    """
    texts = [completion_text(completion) for completion in completions]
    shown = [prompt if isinstance(prompt, str)
             else " ".join(str(message.get("content") or "") for message in prompt)
             for prompt in prompts]
    verdicts = verdicts_of(completions, evidence_ids, style)
    cited = [len(verdict.evidence) / min(len(ids), MAX_EVIDENCE)
             for verdict, ids in zip(verdicts, evidence_ids, strict=True) if verdict.valid and ids]
    alarmed = Counter(frozenset(verdict.evidence) for verdict in verdicts
                      if verdict.valid and verdict.risk != "normal")
    count = max(1, len(texts))
    return {
        "text/repetition": math.fsum(map(repetition_share, texts)) / count,
        "text/unique_share": unique_share(texts),
        "text/label_entropy": label_entropy([v.risk for v in verdicts if v.valid])
        if any(verdict.valid for verdict in verdicts) else math.nan,
        "text/labels_per_answer": labels_per_answer(completions),
        "text/valid_share": sum(verdict.valid for verdict in verdicts) / count,
        "text/citations": citations_per_answer(verdicts),
        "text/cited_share": statistics.fmean(cited) if cited else math.nan,
        "text/same_citation": max(alarmed.values()) / alarmed.total() if alarmed else math.nan,
        "text/copy_rate": math.fsum(map(copy_rate, texts, shown)) / count,
    }


def with_text_metrics(reward_function: RewardFunction) -> RewardFunction:
    """Return the reward function, which now also logs the text metrics of what it scores.

    Wrap one function of a set. The rewards stay as they are; the metrics go through the
    `log_metric` that TRL's trainer hands to reward functions, and without one are left out.
    """
    @functools.wraps(reward_function)
    def measured(completions, *, log_metric=None, **columns):
        if log_metric is not None:
            found = text_metrics(completions, columns["prompts"],
                                 evidence_ids=columns["evidence_ids"], style=columns.get("style"))
            if "completion_ids" in columns:
                found["completions/p95_length"] = upper_length(
                    [len(ids) for ids in columns["completion_ids"]])
            for name, value in found.items():
                log_metric(name, value)
        return reward_function(completions, log_metric=log_metric, **columns)
    return measured
