"""What a training run is set to: the controlled variables, and what PPO and GRPO add to them.

Free of torch, so that tables of settings can be read without loading it. `RLSettings` holds every
variable that the comparison keeps equal; the subclasses hold only what differs between the two
algorithms (a test asserts it). Impossible values raise `UserError` at construction, with the
field's name and the legal range.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from ueba_helpers.errors import UserError, require
from ueba_helpers.task.rewards import TRAINABLE


class _Settings:
    """Whole numbers are whole and numbers finite, before a field's own range is looked at."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                require(type(value) is int, field.name, value, "whole numbers")
            elif field.type is float or (field.type == float | None and value is not None):
                require(type(value) in (int, float) and math.isfinite(value), field.name, value,
                        "finite numbers")


TINY_POSITIONS = 4096  # tokens of prompt and completion that the tiny policy can number


@dataclass(frozen=True, kw_only=True)
class PolicySettings(_Settings):
    """Which language model is trained, and how much of it."""

    name: str = "tiny"  # "tiny", a hub name or a local checkpoint folder
    backend: str = "transformers"  # "transformers" or "unsloth"
    vocab_size: int = 2048  # tiny only
    hidden_size: int = 128  # tiny only
    layers: int = 4  # tiny only
    max_prompt_tokens: int = 352
    max_completion_tokens: int = 64
    lora_rank: int = 0  # 0 trains all weights
    dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        require(self.backend in ("transformers", "unsloth"), "backend", self.backend,
                "'transformers' and 'unsloth'")
        require(self.dtype in ("float32", "bfloat16"), "dtype", self.dtype,
                "'float32' and 'bfloat16'")
        require(self.vocab_size >= 512, "vocab_size", self.vocab_size, "512 and more")
        require(self.hidden_size >= 32 and self.hidden_size % 32 == 0, "hidden_size",
                self.hidden_size, "multiples of 32")
        require(self.layers >= 1, "layers", self.layers, "1 and more")
        require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "0 (full training) and more")
        require(self.max_prompt_tokens >= 64, "max_prompt_tokens", self.max_prompt_tokens,
                "64 and more")
        require(self.max_completion_tokens >= 16, "max_completion_tokens",
                self.max_completion_tokens, "16 and more")
        require(self.name != "tiny"
                or self.max_prompt_tokens + self.max_completion_tokens <= TINY_POSITIONS,
                "max_prompt_tokens", self.max_prompt_tokens, "64 and more, with "
                f"max_completion_tokens ({self.max_completion_tokens}) at most {TINY_POSITIONS} "
                "for the tiny policy")


@dataclass(frozen=True, kw_only=True)
class SFTSettings(_Settings):
    """The cold start: how many verdicts it sees, and how wrong their risk labels are.

    `downgrade` is the chance that the label of a demonstration is one level too low (an analyst
    who under-reports), `label_noise` the chance that it is drawn at random. With `prompt_loss`
    the prompts are learned too, as a language model learns its corpus: so a policy that begins
    with random weights comes to read the log it is to judge. A pretrained one can read already.
    """

    examples: int = 2000
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-3
    downgrade: float = 0.0
    label_noise: float = 0.0
    prompt_loss: bool = False
    save_steps: int = 250

    def __post_init__(self):
        super().__post_init__()
        require(self.examples >= 1, "examples", self.examples, "1 and more")
        require(self.epochs >= 1, "epochs", self.epochs, "1 and more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 and more")
        require(0 < self.learning_rate < 1, "learning_rate", self.learning_rate,
                "between 0 and 1")
        require(self.save_steps >= 1, "save_steps", self.save_steps, "1 and more")
        for name in ("downgrade", "label_noise"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")


@dataclass(frozen=True, kw_only=True)
class RLSettings(_Settings):
    """Everything PPO and GRPO have in common: the controlled variables of the comparison."""

    steps: int = 100
    prompts_per_step: int = 8
    num_generations: int = 8
    learning_rate: float = 1e-4
    lr_schedule: str = "linear"
    lr_warmup_share: float = 0.15  # of the steps: the learning rate rises from 0
    temperature: float = 1.0
    num_iterations: int = 1
    micro_batch_prompts: int = 8
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 0.02
    kl_placement: str = "reward"
    scale_rewards: str = "batch"
    max_grad_norm: float = 1.0
    loss_type: str = "dapo"  # the token mean over the batch; "grpo" means sequences first
    importance_sampling_level: str = "token"
    target_kl: float | None = None
    missing_eos_penalty: float = 0.5
    rewards: str = "ueba"
    shared_prefix: bool = True
    save_steps: int = 25
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        require(self.steps >= 1, "steps", self.steps, "1 and more")
        require(self.prompts_per_step >= 1, "prompts_per_step", self.prompts_per_step,
                "1 and more")
        require(self.num_generations >= self.smallest_group, "num_generations",
                self.num_generations, f"{self.smallest_group} and more")
        require(0 < self.learning_rate < 1, "learning_rate", self.learning_rate,
                "between 0 and 1")
        require(self.lr_schedule in ("constant", "linear", "cosine"), "lr_schedule",
                self.lr_schedule, "'constant', 'linear' and 'cosine'")
        require(0 <= self.lr_warmup_share < 1, "lr_warmup_share", self.lr_warmup_share,
                "0 to below 1")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.num_iterations >= 1, "num_iterations", self.num_iterations, "1 and more")
        require(self.micro_batch_prompts >= 1
                and self.prompts_per_step % self.micro_batch_prompts == 0,
                "micro_batch_prompts", self.micro_batch_prompts,
                f"divisors of prompts_per_step ({self.prompts_per_step})")
        require(0 < self.clip_low < 1, "clip_low", self.clip_low, "between 0 and 1")
        require(self.clip_high > 0, "clip_high", self.clip_high, "above 0")
        require(self.kl_coef >= 0, "kl_coef", self.kl_coef, "0 and more")
        require(self.kl_placement in ("reward", "loss"), "kl_placement", self.kl_placement,
                "'reward' and 'loss'")
        require(self.scale_rewards in ("none", "group", "batch"), "scale_rewards",
                self.scale_rewards, "'none', 'group' and 'batch'")
        require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "above 0")
        require(self.missing_eos_penalty >= 0, "missing_eos_penalty", self.missing_eos_penalty,
                "0 and more")
        require(not (self.scale_rewards == "group" and self.kl_placement == "reward"
                     and self.kl_coef > 0), "scale_rewards", self.scale_rewards,
                "'none' and 'batch' while the KL is part of the reward (in a group whose rewards "
                "are all equal the deviation is that of the KL alone, and dividing by it blows "
                "noise up)")
        require(self.loss_type in ("dapo", "grpo", "bnpo", "dr_grpo"), "loss_type", self.loss_type,
                "'dapo', 'grpo', 'bnpo' and 'dr_grpo'")
        require(self.importance_sampling_level in ("token", "sequence"),
                "importance_sampling_level", self.importance_sampling_level,
                "'token' and 'sequence'")
        require(self.importance_sampling_level == "token" or self.loss_type == "grpo", "loss_type",
                self.loss_type, "'grpo' while importance_sampling_level is 'sequence' (the other "
                "losses count a sequence's ratio once per token)")
        require(self.target_kl is None or self.target_kl > 0, "target_kl", self.target_kl,
                "None and numbers above 0")
        require(self.rewards in TRAINABLE, "rewards", self.rewards,
                ", ".join(map(repr, TRAINABLE)))
        require(self.save_steps >= 1 and self.save_steps % self.num_iterations == 0, "save_steps",
                self.save_steps, f"multiples of num_iterations ({self.num_iterations}): a resumed "
                "run begins with a new rollout")

    smallest_group = 1

    @classmethod
    def controlled(cls) -> tuple[str, ...]:
        """Return the names of the variables that the comparison keeps equal."""
        return tuple(field.name for field in fields(RLSettings))


@dataclass(frozen=True, kw_only=True)
class GRPOSettings(RLSettings):
    """GRPO: the group's mean is the baseline (Shao et al. 2024, arXiv:2402.03300).

    Or the mean of the others (`baseline="leave_one_out"`), or nothing ("none", REINFORCE).
    `baseline_floor` is the least reward of a right answer, below which the mean is no baseline.
    """

    baseline: str = "group"
    baseline_floor: float | None = None

    smallest_group = 2

    def __post_init__(self):
        super().__post_init__()
        require(self.baseline in ("none", "group", "leave_one_out"), "baseline", self.baseline,
                "'none', 'group' and 'leave_one_out'")
        require(self.baseline_floor is None or self.baseline == "group", "baseline_floor",
                self.baseline_floor, f"None with baseline={self.baseline!r}")


# What each published relative of GRPO changes of the main contrast's settings. They differ from
# PPO in more than the baseline, so they stand beside the comparison and not in it.
ARMS: Mapping[str, Mapping] = {
    "grpo_published": {"scale_rewards": "group", "kl_placement": "loss", "kl_coef": 0.04,
                       "loss_type": "grpo"},  # Shao et al. 2024, arXiv:2402.03300
    "dr_grpo": {"scale_rewards": "none", "loss_type": "dr_grpo"},  # arXiv:2503.20783
    "rloo": {"baseline": "leave_one_out", "scale_rewards": "none"},  # arXiv:2402.14740
    "gspo": {"importance_sampling_level": "sequence", "loss_type": "grpo"},  # arXiv:2507.18071
    "reinforce": {"baseline": "none", "scale_rewards": "none"},
}


def arm(name: str, base: GRPOSettings) -> GRPOSettings:
    """Return the settings of a named arm, everything else as in `base`.

    >>> arm("rloo", GRPOSettings()).baseline
    'leave_one_out'
    """
    if name not in ARMS:
        raise UserError(f"Unknown arm {name!r}. Legal arms: {', '.join(ARMS)}.")
    return replace(base, **ARMS[name])


@dataclass(frozen=True, kw_only=True)
class PPOSettings(RLSettings):
    """PPO: a learned critic is the baseline (Schulman et al. 2017, arXiv:1707.06347)."""

    critic: str = "separate"
    critic_learning_rate_ratio: float = 5.0
    critic_warmup_steps: int = 10
    critic_warmup_until: float | None = None  # explained variance that ends the warm-up early
    critic_max_grad_norm: float | None = None  # None: max_grad_norm
    critic_loss: str = "mse"
    value_range: tuple[float, float] = (-1.0, 1.0)  # of returns, for critic_loss "bce"
    gamma: float = 1.0
    lam: float = 1.0
    critic_lam: float = 1.0
    length_adaptive_alpha: float | None = None  # lambda by length, in place of lam
    value_clip: float | None = 0.5

    def __post_init__(self):
        super().__post_init__()
        require(self.scale_rewards != "group", "scale_rewards", self.scale_rewards,
                "'none' and 'batch' (a group whose rewards are equal has no deviation to divide "
                "PPO's advantages by)")
        require(self.critic in ("separate", "shared"), "critic", self.critic,
                "'separate' and 'shared'")
        require(self.critic_learning_rate_ratio > 0, "critic_learning_rate_ratio",
                self.critic_learning_rate_ratio, "above 0")
        require(0 <= self.critic_warmup_steps < self.steps, "critic_warmup_steps",
                self.critic_warmup_steps, f"0 and more, below steps ({self.steps})")
        require(0 < self.gamma <= 1, "gamma", self.gamma, "above 0, to 1")
        require(0 <= self.lam <= 1, "lam", self.lam, "0 to 1")
        require(0 <= self.critic_lam <= 1, "critic_lam", self.critic_lam, "0 to 1")
        for name in ("length_adaptive_alpha", "critic_max_grad_norm"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "None and numbers above 0")
        require(self.critic_warmup_until is None or self.critic_warmup_until < 1,
                "critic_warmup_until", self.critic_warmup_until, "None and numbers below 1")
        require(self.critic_loss in ("mse", "bce"), "critic_loss", self.critic_loss,
                "'mse' and 'bce'")
        require(self.critic_loss == "mse" or self.value_clip is None, "value_clip",
                self.value_clip, "None with critic_loss='bce'")
        require(len(self.value_range) == 2 and all(map(math.isfinite, self.value_range))
                and self.value_range[0] < self.value_range[1], "value_range", self.value_range,
                "two finite numbers, the first below the second")
        require(self.value_clip is None or self.value_clip > 0, "value_clip", self.value_clip,
                "None and numbers above 0")
