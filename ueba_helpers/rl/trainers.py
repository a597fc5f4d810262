"""PPO and GRPO over one trainer: same rollouts, same rewards, same loss, another baseline.

In: what TRL's `GRPOTrainer` takes (model, reward functions, dataset with a `prompt` column,
tokenizer), for PPO optionally a `value_model`. Out: a trained policy, TRL's metrics and the ones
named below. `PPOTrainer` and `GRPOTrainer` differ in `_advantages` and in what the critic adds;
everything else is `PolicyGradientTrainer`, a subclass of TRL's trainer (1.14.2), whose clipped
surrogate takes advantages per completion `(B,)` or per token `(B, T)`.

Differences from the papers: one epoch over each rollout by default; the token mean over the whole
batch instead of the mean of sequence means (DAPO, arXiv:2503.14476, section 3.3); KL as k1 inside
the reward by default, per token for PPO and summed over the completion for GRPO. Completions that
hit the length limit count as ended, with `missing_eos_penalty` taken off their reward. With one
optimiser step per rollout the ratio is exactly one and no clip range acts: both are then plain
on-policy actor updates that differ in the baseline.

Refused: reward functions that raise, return the wrong number of values, NaN or anything but
numbers; group sizes that do not divide the batch; prompts longer than the context; a critic that
reads another vocabulary; resuming from inside a rollout, which no checkpoint holds.
"""

import copy
import math
import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import trl
from accelerate.logging import get_logger
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length, rotate_checkpoints
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import (
    RepeatSampler,
    get_callable_name,
    is_async_callable,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
    use_adapter,
)

from ueba_helpers.data.seeding import derived_seed, generator
from ueba_helpers.errors import UserError
from ueba_helpers.rl import advantages as estimators
from ueba_helpers.rl.checkpoints import load_critic, save_critic, seal
from ueba_helpers.rl.policies import (
    REFERENCE_ADAPTER,
    add_reference_adapter,
    make_critic,
    value_head,
    values_of,
    values_of_logits,
)
from ueba_helpers.rl.prefix import backbone_of, completion_states, shareable, token_log_probs
from ueba_helpers.rl.rollouts import generate

logger = get_logger(__name__)


@dataclass
class PolicyGradientConfig(trl.GRPOConfig):
    """TRL's GRPOConfig with the KL field, the reward checks and the speed switches of both.

    `kl_coef` and `kl_placement` replace TRL's `beta`: "reward" subtracts `kl_coef` times k1 from
    the reward, "loss" adds `kl_coef` times bias-corrected k3 to the loss. Setting `beta` is the
    same as `kl_coef=beta, kl_placement="loss"`.
    """

    kl_coef: float = field(default=0.0, metadata={"help": "Weight of the KL to the reference."})
    kl_placement: str = field(default="reward", metadata={"help": "'reward' or 'loss'."})
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Taken off the reward of a completion without an end."})
    target_kl: float | None = field(default=None, metadata={
        "help": "Approximate KL to the sampling policy, nats per token, at which it stands still "
                "until the next rollout."})
    shared_prefix: bool = field(
        default=True, metadata={"help": "Run a prompt once for all its completions."})
    loss_type: str = field(default="dapo", metadata={"help": "Token mean over the batch."})
    scale_rewards: str = field(default="batch", metadata={"help": "'none', 'group', 'batch'."})
    use_bias_correction_kl: bool = field(default=True, metadata={"help": "See TRL."})
    bf16: bool | None = field(default=False, metadata={"help": "Autocast to bfloat16."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "See Transformers."})
    logging_steps: float = field(default=1, metadata={"help": "Optimiser steps per log line."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "See Transformers."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "See Transformers."})
    report_to: str = field(default="none", metadata={"help": "See Transformers."})

    _scales = ("none", "group", "batch")

    def __post_init__(self):
        if self.beta:
            if self.kl_coef and (self.kl_placement, self.kl_coef) != ("loss", self.beta):
                raise UserError(f"beta={self.beta} and kl_coef={self.kl_coef} both weigh the KL: "
                                "set kl_coef and kl_placement only.")
            self.kl_coef, self.kl_placement = self.beta, "loss"
        if self.kl_placement not in ("reward", "loss"):
            raise UserError(f"kl_placement={self.kl_placement!r} is not possible: legal values "
                            "are 'reward' and 'loss'.")
        if self.kl_coef < 0:
            raise UserError(f"kl_coef={self.kl_coef} is not possible: legal values are 0 and more.")
        if self.target_kl is not None and self.target_kl <= 0:
            raise UserError(f"target_kl={self.target_kl} is not possible: legal values are None "
                            "and numbers above 0.")
        self.beta = self.kl_coef if self.kl_placement == "loss" else 0.0
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise UserError(f"multi_objective_aggregation={self.multi_objective_aggregation!r} is "
                            "not possible: rewards are weighed and summed first, as with "
                            "'sum_then_normalize'.")
        if self.sync_ref_model:
            raise UserError("sync_ref_model=True is not possible: the KL is to the policy that "
                            "training began with, which stays as it is.")
        scale = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)
        if scale == "group" and self.kl_coef and self.kl_placement == "reward":
            raise UserError("scale_rewards='group' is not possible with kl_placement='reward': in "
                            "a group whose rewards are all equal the deviation is that of the KL "
                            "alone, and dividing by it blows noise up. Use 'batch' or 'none', or "
                            "kl_placement='loss'.")
        if scale not in self._scales:
            raise UserError(f"scale_rewards={scale!r} is not possible: legal values are "
                            f"{', '.join(map(repr, self._scales))}.")
        super().__post_init__()


@dataclass
class GRPOConfig(PolicyGradientConfig):
    """Settings of GRPO: the baseline is the mean of the group's rewards.

    Beside "group" there are "leave_one_out", the mean of the others (RLOO), and "none"
    (REINFORCE). `baseline_floor` is the least reward of a right answer, below which the group's
    mean is no baseline (`advantages.group_relative`).
    """

    baseline: str = field(default="group", metadata={
        "help": "'none', 'group' or 'leave_one_out'."})
    baseline_floor: float | None = field(default=None, metadata={
        "help": "Least reward of a right answer."})

    def __post_init__(self):
        if self.baseline not in estimators.BASELINES:
            raise UserError(f"baseline={self.baseline!r} is not possible: legal values are "
                            f"{', '.join(map(repr, estimators.BASELINES))}.")
        if self.baseline_floor is not None and self.baseline != "group":
            raise UserError(f"baseline_floor={self.baseline_floor} belongs to baseline='group', "
                            f"not to {self.baseline!r}: leave it out.")
        super().__post_init__()


@dataclass
class PPOConfig(PolicyGradientConfig):
    """Settings of PPO: the baseline is a critic.

    `critic` is "separate" (a backbone of its own) or "shared" (a head on the policy's hidden
    state, whose loss, weighed by `vf_coef`, also reaches the policy's trunk). During the first
    `critic_warmup_steps` optimiser steps only the critic learns, or until its explained variance
    exceeds `critic_warmup_until`, if that comes first. `critic_loss="bce"` reads the critic's
    output z as a logit of where in `value_range` the return lies: -q log s(z) - (1 - q) log s(-z)
    with q = (R - low) / (high - low), between 0 and 1, and s the logistic function.
    `length_adaptive_alpha` replaces `lam` by 1 - 1 / (alpha length) (VAPO).
    `scale_rewards="whiten"` gives token advantages mean zero and variance one over the batch; the
    other scales divide by the same deviation of sequence rewards as in GRPO. Not a group's: PPO's
    advantages of a group whose rewards are equal need not be zero, and its deviation is.
    """

    num_generations: int | None = field(default=1, metadata={"help": "Completions per prompt."})
    critic: str = field(default="separate", metadata={"help": "'separate' or 'shared'."})
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Default: five times the policy's."})
    critic_warmup_steps: int = field(default=0, metadata={"help": "Steps with a frozen policy."})
    critic_warmup_until: float | None = field(
        default=None, metadata={"help": "Explained variance that ends the warm-up early."})
    critic_max_grad_norm: float | None = field(
        default=None, metadata={"help": "Default: the policy's."})
    critic_loss: str = field(default="mse", metadata={"help": "'mse' or 'bce'."})
    value_range: tuple[float, float] = field(
        default=(-1.0, 1.0), metadata={"help": "Least and largest return, for 'bce'."})
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=1.0, metadata={"help": "GAE's lambda for the policy."})
    critic_lam: float = field(default=1.0, metadata={"help": "Lambda of the critic's targets."})
    length_adaptive_alpha: float | None = field(
        default=None, metadata={"help": "Lambda by length, in place of lam."})
    value_clip: float | None = field(default=None, metadata={"help": "Clip range of values."})
    vf_coef: float = field(default=1.0, metadata={"help": "Weight of the value loss."})

    _scales = ("none", "batch", "whiten")

    def __post_init__(self):
        wanted = self.num_generations
        if self.critic not in ("separate", "shared"):
            raise UserError(f"critic={self.critic!r} is not possible: legal values are "
                            "'separate' and 'shared'.")
        if self.critic_loss not in ("mse", "bce"):
            raise UserError(f"critic_loss={self.critic_loss!r} is not possible: legal values are "
                            "'mse' and 'bce'.")
        if self.critic_loss == "bce" and self.value_clip is not None:
            raise UserError(f"value_clip={self.value_clip} belongs to critic_loss='mse', not to "
                            "'bce': leave it out.")
        if (len(self.value_range) != 2 or not all(map(math.isfinite, self.value_range))
                or self.value_range[0] >= self.value_range[1]):
            raise UserError(f"value_range={self.value_range} is not possible: give two finite "
                            "numbers, the first below the second.")
        if self.length_adaptive_alpha is not None and self.length_adaptive_alpha <= 0:
            raise UserError(f"length_adaptive_alpha={self.length_adaptive_alpha} is not possible: "
                            "legal values are None and numbers above 0.")
        if self.num_generations == 1:
            # TRL refuses groups of one, which GRPO's baseline needs and PPO's does not: satisfy
            # its check with a legal divisor, then restore.
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            world = int(os.environ.get("WORLD_SIZE", "1"))
            batch = self.generation_batch_size or self.per_device_train_batch_size * steps * world
            if batch < 2:
                raise UserError("per_device_train_batch_size times gradient_accumulation_steps "
                                f"is {batch}: PPO needs at least 2 completions per step.")
            self.num_generations = batch
            self.num_generations_eval = self.num_generations_eval or 1
        super().__post_init__()
        self.num_generations = wanted
        if self.critic_learning_rate is None:
            self.critic_learning_rate = 5 * self.learning_rate
        if self.critic_max_grad_norm is None:
            self.critic_max_grad_norm = self.max_grad_norm


def _checked(reward_func: Callable) -> Callable:
    """Return the reward function with its output checked; the error names the function."""
    name = get_callable_name(reward_func)

    @contextmanager
    def named():
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"reward function {name} raised {type(error).__name__}: {error}"
                            ) from error

    def check(found, expected):
        values = found.tolist() if isinstance(found, Tensor | np.ndarray) else found
        if not isinstance(values, list | tuple):
            raise UserError(f"reward function {name} returned {type(found).__name__}: it must "
                            "return a list with one number or None per completion.")
        if len(values) != expected:
            raise UserError(f"reward function {name} returned {len(values)} values for "
                            f"{expected} completions.")
        return [_number(value, name, i) for i, value in enumerate(values)]

    if is_async_callable(reward_func):
        async def checked(*args, **kwargs):
            with named():
                values = await reward_func(*args, **kwargs)
            return check(values, len(kwargs["completions"]))
    else:
        def checked(*args, **kwargs):
            with named():
                values = reward_func(*args, **kwargs)
            return check(values, len(kwargs["completions"]))
    checked.__name__ = name
    return checked


def _number(value, name: str, row: int) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"reward function {name} returned {value!r} for completion {row}: "
                        "values must be finite numbers or None.")
    return number


class PolicyGradientTrainer(trl.GRPOTrainer):
    """What PPO and GRPO share: rollouts, rewards, reference, shared prefix, clipped surrogate."""

    def __init__(self, model, reward_funcs=None, args=None, *others, **kwargs):
        if args is None:
            args = self.config_class(output_dir=f"runs/{self._name.lower()}")
        if not isinstance(args, self.config_class):
            wanted, got = self.config_class, type(args)
            raise UserError(f"args must be a {wanted.__module__}.{wanted.__name__}, got a "
                            f"{got.__module__}.{got.__name__}.")
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        funcs = [_checked(f) if callable(f) and not isinstance(f, nn.Module) else f
                 for f in funcs if f is not None]
        if args.kl_coef and isinstance(model, PeftModel):
            add_reference_adapter(model)
        # TRL would read a second copy of the weights from disk for the reference; the copy is
        # made in memory below, so that a model without a folder can be trained too.
        wanted_beta, args.beta = args.beta, 0.0
        super().__init__(model, funcs, args, *others, **kwargs)
        self.args.beta = self.beta = wanted_beta
        self.scale_rewards = "none"  # of TRL's own advantages, which _advantages replaces
        columns = getattr(self.train_dataset, "column_names", None)  # unknown for a stream
        if columns is not None and "prompt" not in columns:
            raise UserError("train_dataset has no column `prompt`; it has "
                            f"{', '.join(columns)}. Rename the one that holds the prompts.")
        self.use_sampler = self._can_sample_here()
        self._why_plain = self._reason_for_plain_path()
        if self._why_plain and args.shared_prefix:
            logger.warning(f"prompts are not shared: {self._why_plain}")
        if args.kl_coef and args.kl_placement == "reward":
            self._refuse_images("kl_placement='reward': its reference")
        self._redirect = _ForwardRedirection()
        self._reference = None
        if args.kl_coef and not isinstance(self._bare_model(), PeftModel):
            if args.cast_lm_head_to_fp32:
                raise UserError("cast_lm_head_to_fp32=True is not possible with kl_coef > 0: the "
                                "head of the reference, a copy, would compute with the policy's "
                                "weights.")
            reference = copy.deepcopy(self._bare_model()).requires_grad_(False).eval()
            self._reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
            self.ref_model = self._reference if self.beta else None
        self._rewards_per_func: Tensor | None = None
        self._scored: dict[str, Tensor] = {}
        self._evaluation_draws = 0
        self._rollout_calls = (-1, 0)  # the optimiser step and how often it has sampled
        self._step_kl: list[float] = []  # approximate KL of the micro-batches of this step
        self._stands_still = False  # until the next rollout
        self.add_callback(_StepBoundaries(self))

    config_class = PolicyGradientConfig
    _keeps_states = False  # whether a critic reads the hidden states of the scored tokens

    def _refuse_images(self, blind: str) -> None:
        if self._is_vlm:
            raise UserError(f"a processing_class for images cannot be used with {blind} would not "
                            "see them.")

    def _bare_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    def _reason_for_plain_path(self) -> str | None:
        if not self.args.shared_prefix:
            return "shared_prefix is off"
        if self.use_liger_kernel:
            return "the Liger kernel computes log-probabilities itself"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "sharded weights need the model's own forward"
        if self.args.gradient_checkpointing:  # switched on later, by train()
            return "gradient checkpointing keeps no cache"
        return shareable(self._bare_model())

    def _can_sample_here(self) -> bool:
        plain = (self.top_p in (None, 1.0) and not self.top_k and self.min_p in (None, 0.0)
                 and self.repetition_penalty in (None, 1.0) and not self.args.generation_kwargs)
        return (plain and self.args.shared_prefix and not self.use_vllm
                and not self.use_transformers_continuous_batching and not self._is_vlm
                and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
                and not self.args.gradient_checkpointing
                # a block mask keeps the completions of a prompt apart
                and self._bare_model().config._attn_implementation in ("sdpa", "eager")
                and shareable(self._bare_model()) is None)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        return self.accelerator.reduce(x.detach().double().reshape(1), reduction="sum")[0]

    def _log(self, name: str, value: Tensor | float) -> None:
        self._metrics[self._mode][name].append(float(value))

    def _get_train_sampler(self, dataset=None):
        dataset = self.train_dataset if dataset is None else dataset
        per_step = self.args.generation_batch_size // self.num_generations
        if len(dataset) < per_step:
            raise UserError(f"train_dataset has {len(dataset)} prompts and one rollout takes "
                            f"{per_step}: give more prompts or a smaller batch.")
        return _AddressedRepeatSampler(
            self, data_source=dataset, mini_repeat_count=self.num_generations,
            batch_size=per_step, repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset, seed=self.args.seed)

    # -- rollout ------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch):
        # TRL shuffles single completions before it cuts a rollout into micro-batches, which tears
        # groups apart. Whole groups are shuffled here instead; advantages are computed before.
        if self._mode == "eval":
            return self._generate_and_score_completions(generation_batch)
        every = self.args.steps_per_generation * self.num_iterations
        if self._step % every == 0 or self._buffered_inputs is None:
            self._stands_still = False
            batch = self._generate_and_score_completions(generation_batch)
            batch = split_pixel_values_by_grid(batch)
            if self.args.steps_per_generation > 1:
                batch = _shuffle_groups(batch, self.num_generations,
                                        generator(self.args.seed, "shuffle groups",
                                                  self.state.global_step))
            parts = split_tensor_dict(batch, self.args.steps_per_generation)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(part) for part in parts]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _tokenize_prompts(self, prompts):
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        limit = self._bare_model().config.get_text_config().max_position_embeddings
        longest = max(len(ids) for ids in prompt_ids)
        if longest + self.max_completion_length > limit:
            raise UserError(f"a prompt of {longest} tokens and max_completion_length="
                            f"{self.max_completion_length} exceed the model's context of {limit} "
                            "tokens: shorten the prompts.")
        return prompt_ids, images, fields

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations,
                              has_tool_images=False):
        if not self.use_sampler or images is not None or multimodal_fields:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields,
                                                 num_generations, has_tool_images)
        uniforms = self._uniforms(len(prompt_ids))
        with self.accelerator.autocast():
            done = generate(self._bare_model(), prompt_ids,
                            max_new_tokens=self.max_completion_length,
                            eos_token_ids=self.eos_token_ids,
                            pad_token_id=self._tokenizer.pad_token_id,
                            temperature=self.temperature, uniforms=uniforms)
        return done.ids, done.log_probs

    def _uniforms(self, rows: int) -> np.ndarray:
        """Return this rank's draws `(rows, max_completion_length)` of the next call."""
        step, ranks = self.state.global_step, self.accelerator.num_processes
        if self._mode == "train":
            at, calls = self._rollout_calls
            call = calls if at == step else 0
            self._rollout_calls = (step, call + 1)
            draws = generator(self.args.seed, f"rollouts {call}" if call else "rollouts", step)
            # Turns with tools sample fewer rows, on each rank another number of them.
            rows_per_rank = max(rows, self.args.generation_batch_size // ranks)
        else:
            self._evaluation_draws += 1
            draws = generator(self.args.seed, f"evaluation rollouts {step}",
                              self._evaluation_draws)
            rows_per_rank = rows
        first = self.accelerator.process_index * rows_per_rank
        uniforms = draws.random((first + rows, self.max_completion_length))
        return uniforms[first:]

    def evaluate(self, *args, **kwargs):
        self._evaluation_draws = 0
        return super().evaluate(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for name, func, column in zip(self.reward_func_names, self.reward_funcs, rewards.T,
                                      strict=True):
            # Of a function NaN stands for None; of a model it is a number gone wrong.
            if isinstance(func, nn.Module) and not torch.isfinite(column).all():
                raise UserError(f"reward model {name} returned a value that is not finite: check "
                                "its weights and its dtype.")
        self._rewards_per_func = rewards
        return rewards

    def _generate_and_score_completions(self, inputs):
        rollout = super()._generate_and_score_completions(inputs)
        mask = _loss_mask(rollout)
        scores, scorable = self._scores(rollout)
        token_kl = self._token_kl(rollout, mask)
        in_reward = self.args.kl_coef if self.args.kl_placement == "reward" else 0.0
        advantages = self._advantages(rollout, mask, scores, scorable, in_reward * token_kl)
        keep = scorable.float() if advantages.dim() == 1 else scorable.float().unsqueeze(1)
        rollout["advantages"] = advantages * keep
        self._log_advantages(rollout["advantages"], mask)
        count = self._sum_over_ranks(mask.new_tensor(float(mask.size(0))))
        tokens = self._sum_over_ranks(mask.sum())
        if self.args.kl_coef and not self._is_vlm:  # else a logged zero would be a lie
            total = self._sum_over_ranks(token_kl.sum())
            self._log("kl_to_reference/per_completion", total / count)
            self._log("kl_to_reference/per_token", total / tokens)
        self._log("advantages/absolute_mean",
                  self._sum_over_ranks((rollout["advantages"].abs() * mask).sum()
                                       if advantages.dim() == 2 else
                                       (rollout["advantages"].abs() * mask.sum(1)).sum()) / tokens)
        return rollout

    def _log_advantages(self, advantages: Tensor, mask: Tensor) -> None:
        """Put ours, a completion's mean where there is one per token, in place of TRL's."""
        if advantages.dim() == 2:
            advantages = (advantages * mask).sum(1) / mask.sum(1).clamp(min=1)
        found, logged = self.accelerator.gather(advantages).tolist(), self._logs["advantages"]
        for _ in range(min(len(found), len(logged))):
            logged.pop()
        logged.extend(found)

    def _group_size(self) -> int:
        return self.num_generations if self._mode == "train" else self.num_generations_eval

    def _scores(self, rollout) -> tuple[Tensor, Tensor]:
        """Return this rank's weighted reward sums `(B,)`, NaN without any, and where there is one.
        """
        weighted = self._rewards_per_func * self.reward_weights.to(self.accelerator.device)
        unscorable = torch.isnan(weighted).all(1)
        totals = weighted.nansum(1)
        if not torch.isfinite(totals).all():
            raise UserError("the weighted sum of the rewards is not finite: check the reward "
                            f"models and reward_weights={self.reward_weights.tolist()}.")
        rows = rollout["completion_ids"].size(0)
        here = slice(self.accelerator.process_index * rows,
                     (self.accelerator.process_index + 1) * rows)
        scores = totals.masked_fill(unscorable, math.nan)[here].clone()
        if self.args.missing_eos_penalty:
            ends = torch.tensor(self.eos_token_ids, device=scores.device)
            ended = (torch.isin(rollout["completion_ids"], ends)
                     & rollout["completion_mask"].bool()).any(1)
            scores -= self.args.missing_eos_penalty * (~ended).float()
        return scores, ~unscorable[here]

    def _token_kl(self, rollout, mask) -> Tensor:
        """Return k1 per token `(B, T)`, log policy minus log reference at rollout time."""
        if not self.args.kl_coef or self._is_vlm:
            return torch.zeros_like(mask)
        log_policy = rollout.get("old_per_token_logps")
        if log_policy is None:  # of the same policy, unless another engine sampled
            log_policy = rollout.get("sampling_per_token_logps")
        if log_policy is None:
            log_policy = self._rollout_log_probs(self.model, rollout)
        log_reference = rollout.get("ref_per_token_logps")
        if log_reference is None:
            bare, context = self._bare_model(), nullcontext()
            if self._reference is None:
                arrived = REFERENCE_ADAPTER in bare.peft_config
                context = use_adapter(bare, REFERENCE_ADAPTER if arrived else None)
            with context:
                log_reference = self._rollout_log_probs(self._reference or self.model, rollout)
        return estimators.kl_estimate(log_policy, log_reference, "k1") * mask

    def _rollout_log_probs(self, model, rollout) -> Tensor:
        with torch.no_grad():
            ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
            attention = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
            return self._get_per_token_logps_and_entropies(
                model, ids, attention, rollout["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size)[0]

    def _gathered_returns(self, scores: Tensor, penalties: Tensor) -> Tensor:
        """Return every rank's sequence rewards, the KL of the whole completion taken off."""
        return self.accelerator.gather(scores - penalties.sum(1))

    def _of_this_rank(self, gathered: Tensor, rows: int) -> Tensor:
        start = self.accelerator.process_index * rows
        return gathered[start:start + rows]

    def _advantages(self, rollout, mask, scores, scorable, penalties) -> Tensor:
        raise NotImplementedError("PPOTrainer and GRPOTrainer each say what their baseline is")

    # -- checkpoints --------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        # Trainer would delete the checkpoint before this one while this one is not sealed yet.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # other ranks write their random states
        if self.args.should_save:
            run = Path(self._get_output_dir(trial=trial))
            folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.save_beside_policy(folder)
            seal(folder)
            # By number: two checkpoints of a quick run may have one time.
            rotate_checkpoints(str(run), limit, self.state.best_model_checkpoint, use_mtime=False)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        bare = self._bare_model()
        if isinstance(bare, PeftModel) and REFERENCE_ADAPTER in bare.peft_config:
            # Of several adapters Trainer reads those in folders of their own: the reference alone.
            bare.load_adapter(resume_from_checkpoint, bare.active_adapter, is_trainable=True)

    def save_beside_policy(self, folder: Path | str) -> None:
        """Write what the algorithm trains beside the policy into a folder (PPO's critic)."""

    def load_beside_policy(self, folder: Path | str) -> None:
        """Read what `save_beside_policy` wrote."""

    def zero_beside_policy(self) -> None:
        """Clear the gradients of what is trained beside the policy."""

    # -- log-probabilities and loss -----------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep,
                                           batch_size=None, compute_entropy=False,
                                           compute_aux_loss=False, **multimodal):
        special = compute_aux_loss or any(
            value is not None for name, value in multimodal.items()
            if name not in ("num_images", "num_tiles"))
        if self._why_plain or special:
            result = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size,
                compute_entropy=compute_entropy, compute_aux_loss=compute_aux_loss, **multimodal)
            self._scored = {"log_probs": result[0].detach()}
            return result
        bare = self.accelerator.unwrap_model(model)
        cut = input_ids.size(1) - logits_to_keep
        rows = batch_size or input_ids.size(0)
        log_probs, entropies, states = [], [], []
        for start in range(0, input_ids.size(0), rows):
            chunk = slice(start, start + rows)
            prompt = input_ids[chunk, :cut], attention_mask[chunk, :cut]
            completion, mask = input_ids[chunk, cut:], attention_mask[chunk, cut:]
            with self.accelerator.autocast():
                state = completion_states(backbone_of(bare), *prompt, completion, mask)
                chosen, entropy = token_log_probs(
                    state, bare.get_output_embeddings(), completion, mask,
                    temperature=self.temperature, entropy=compute_entropy,
                    entropy_gradient=self._entropy_bonus_enabled)
            log_probs.append(chosen)
            entropies.append(entropy)
            states.append(state)
        result = torch.cat(log_probs)
        self._scored = {"log_probs": result.detach()}
        if self._keeps_states:
            self._scored["states"] = torch.cat(states)
        return result, torch.cat(entropies) if compute_entropy else None, None

    def log(self, logs, start_time=None):
        for metrics in self._metrics.values():  # TRL logs the mean of what it finds here
            if metrics.get("ratio/max"):
                metrics["ratio/max"] = [max(metrics["ratio/max"])]
        super().log(logs, start_time)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        bare = self.accelerator.unwrap_model(model)
        if model is bare or self._why_plain:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # A wrapped model must be entered through its wrapper, or gradients are not synchronised.
        return self._redirect(model, bare, self._compute_loss, bare, inputs)

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if not torch.isfinite(loss):
            raise UserError(f"the policy loss is {loss.item()} at step {self.state.global_step}: "
                            "training stops before the weights are harmed; lower learning_rate.")
        if not self._entropy_bonus_enabled:  # TRL then logs the loss without the bonus
            self._log("policy_loss",
                      self._sum_over_ranks(loss.detach()) / self.accelerator.num_processes)
        old = inputs.get("old_per_token_logps")
        if old is None:  # one update per rollout: the sampler's own are the same policy's
            old = inputs.get("sampling_per_token_logps")
        new = self._scored["log_probs"]
        mask = _loss_mask(inputs)
        old = new if old is None else old
        largest = ((new - old) * mask).max().exp()
        self._log("ratio/max", self.accelerator.gather(largest).max())
        kl = self._sum_over_ranks((estimators.kl_estimate(old, new, "k3") * mask).sum())
        kl = kl / self._sum_over_ranks(mask.sum())
        self._log("approx_kl", kl)
        if self._mode == "train" and self.args.target_kl is not None:
            self._step_kl.append(float(kl))
        return loss

    def _clip_grad_norm(self, model):
        return self._finite(super()._clip_grad_norm(model), "policy", "learning_rate")

    def _finite(self, norm, network: str, rate: str):
        """Return a gradient's norm; raise before an optimiser step that would spread NaN."""
        # fp16's loss scaler leaves such a step out itself and goes on with a smaller scale
        if self.accelerator.scaler is None and not math.isfinite(float(norm)):
            raise UserError(f"the gradient of the {network} is not finite at step "
                            f"{self.state.global_step}: training stops before the weights are "
                            f"harmed; lower {rate}.")
        return norm

    def _hold_at_target_kl(self) -> None:
        """Drop the policy's gradients of a step that begins beyond the target KL.

        The rest of the rollout is left unused as well; the critic goes on. Without gradients
        neither the momentum of the optimiser nor its weight decay moves a weight.
        """
        seen, self._step_kl = self._step_kl, []
        if self.args.target_kl is None:
            return
        self._stands_still |= bool(seen) and sum(seen) / len(seen) > self.args.target_kl
        if self._stands_still:
            for parameter in self._bare_model().parameters():
                parameter.grad = None
        self._log("stands_still", float(self._stands_still))

    def _token_mean(self, values: Tensor, inputs) -> Tensor:
        """Return the sum over this micro-batch divided by the tokens of the whole step."""
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self._mode == "train":
            tokens = tokens * (self.current_gradient_accumulation_steps
                               / self.args.steps_per_generation)
        return values.sum() / tokens


class _AddressedRepeatSampler(RepeatSampler):
    """TRL's sampler with the order of an epoch derived from (seed, epoch).

    TRL's own draws each epoch from one running generator, so that a run resumed after its first
    epoch would see other prompts.
    """

    def __init__(self, trainer: "PolicyGradientTrainer", **kwargs):
        super().__init__(**kwargs)
        self._trainer = trainer

    def __iter__(self):
        if self.shuffle:
            batches = len(self) // (self.batch_size * self.mini_repeat_count)
            steps = math.ceil(batches / self._trainer.args.gradient_accumulation_steps)
            epoch = self._trainer.state.global_step // steps
            self.generator.manual_seed(derived_seed(self.seed, "prompt order", epoch))
        return super().__iter__()


class _StepBoundaries(TrainerCallback):
    """Hold at the target KL, clear the critic's gradients, save only where a rollout is used up.

    A checkpoint holds no rollout: training resumed inside one would draw another. The last step
    is saved wherever it falls, to be used and not to be resumed from.
    """

    def __init__(self, trainer: PolicyGradientTrainer):
        self._trainer, self._due = trainer, False

    def _rollout_steps(self) -> int:
        return self._trainer.args.steps_per_generation * self._trainer.num_iterations

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        trainer = self._trainer
        trainer._step, trainer._buffered_inputs, self._due = 0, None, False
        trainer.zero_beside_policy()
        accumulation = args.gradient_accumulation_steps
        steps = state.global_step
        if has_length(train_dataloader):
            steps %= math.ceil(len(train_dataloader) / accumulation)
        if steps * accumulation % self._rollout_steps():
            raise UserError(f"a checkpoint of step {state.global_step} cannot be resumed from: it "
                            f"lies inside a rollout of {self._rollout_steps()} micro-batches "
                            "(steps_per_generation times num_iterations). Resume from an earlier "
                            "one.")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._trainer._hold_at_target_kl()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._trainer.zero_beside_policy()  # Trainer zeroes `model`, which it is no part of

    def on_step_end(self, args, state, control, **kwargs):
        self._due = self._due or control.should_save
        used_up = self._trainer._step % self._rollout_steps() == 0
        control.should_save = self._due and (used_up or state.global_step >= state.max_steps)
        self._due = self._due and not control.should_save


def _loss_mask(batch) -> Tensor:
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).float()


def _shuffle_groups(batch: dict, group_size: int, draws) -> dict:
    """Return the batch with its groups of neighbouring rows in another order."""
    rows = batch["completion_ids"].size(0)
    if rows % group_size:
        return batch  # groups spread over ranks: order carries no meaning, leave it
    groups = torch.as_tensor(draws.permutation(rows // group_size))
    order = (groups.unsqueeze(1) * group_size + torch.arange(group_size)).reshape(-1)

    def reorder(value):
        if isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == rows:
            return value[order.to(value.device)]
        if isinstance(value, list) and len(value) == rows:
            return [value[i] for i in order.tolist()]
        return value
    return {key: reorder(value) for key, value in batch.items()}


class GRPOTrainer(PolicyGradientTrainer):
    """Group relative policy optimisation: the baseline is made of the group's rewards."""

    _tag_names = ("trl", "grpo", "ueba")
    _name = "GRPO"
    config_class = GRPOConfig

    def _advantages(self, rollout, mask, scores, scorable, penalties):
        totals = self._gathered_returns(scores, penalties)
        args = self.args
        advantages = estimators.baselined(totals, self._group_size(), args.baseline,
                                          args.scale_rewards, args.baseline_floor)
        return self._of_this_rank(advantages, scores.numel())


_LEAST_SCALE = 1e-3  # in reward units
_SEQUENCES = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


class PPOTrainer(PolicyGradientTrainer):
    """Proximal policy optimisation: the baseline is a critic, advantages come from GAE.

    `value_model` is a module called like `policies.Critic`; without one, a critic is made whose
    backbone starts as a copy of the policy's.
    """

    _tag_names = ("trl", "ppo", "ueba")
    _name = "PPO"
    config_class = PPOConfig

    def __init__(self, model, reward_funcs=None, args=None, *others,
                 value_model: nn.Module | None = None, **kwargs):
        super().__init__(model, reward_funcs, args, *others, **kwargs)
        self._refuse_images("PPO: its critic")
        bare = self._bare_model()
        if self._keeps_states:
            if value_model is not None:
                raise UserError("value_model is given and critic='shared' needs none: set "
                                "critic='separate'.")
            if self._why_plain:
                raise UserError("critic='shared' reads the policy's hidden states, which the plain "
                                f"path does not hand over ({self._why_plain}): use "
                                "critic='separate'.")
            critic = value_head(bare.config.get_text_config().hidden_size)
        else:
            critic = make_critic(bare) if value_model is None else value_model
            if not isinstance(getattr(critic, "backbone", None), PreTrainedModel | PeftModel):
                raise UserError(f"value_model is a {type(critic).__name__} without a transformer "
                                "as its `backbone`: give a ueba_helpers.rl.policies.Critic, or a "
                                "module that is called like it.")
            vocabulary = bare.get_input_embeddings().num_embeddings
            found = critic.backbone.get_input_embeddings().num_embeddings
            if found != vocabulary:
                raise UserError(f"value_model reads a vocabulary of {found} tokens, the policy "
                                f"one of {vocabulary}: both must share a tokenizer.")
        self.critic = self.accelerator.prepare_model(critic.to(self.accelerator.device))
        self._warm_at: int | None = None  # the step at which explained variance ended the warm-up

    @property
    def _keeps_states(self) -> bool:
        return self.args.critic == "shared"

    @property
    def _warming_up(self) -> bool:
        return self.state.global_step < self._policy_begins()

    def _policy_begins(self) -> int:
        """Return the optimiser step from which on the policy learns."""
        return self.args.critic_warmup_steps if self._warm_at is None else self._warm_at

    def _outputs(self, batch, states: Tensor | None = None) -> Tensor:
        """Return what the critic says `(B, T)`: values, or logits with `critic_loss="bce"`."""
        if self._keeps_states:
            return values_of(self.critic, states)
        with self.accelerator.autocast():
            values = self.critic(batch["prompt_ids"], batch["prompt_mask"],
                                 batch["completion_ids"], batch["completion_mask"],
                                 shared_prefix=self._why_plain is None)
        return values.float()

    def _values(self, batch, mask, states: Tensor | None = None) -> Tensor:
        values = self._outputs(batch, states)
        if self.args.critic_loss == "bce":
            values = values_of_logits(values, self.args.value_range)
        return values * mask

    def _rollout_values(self, rollout, mask) -> Tensor:
        states = None
        if self._keeps_states:
            self._rollout_log_probs(self.model, rollout)
            states = self._scored["states"]
        rows = self.args.per_device_train_batch_size
        parts = [slice(i, i + rows) for i in range(0, mask.size(0), rows)]
        with torch.no_grad():
            return torch.cat([self._values(
                {name: rollout[name][part] for name in _SEQUENCES}, mask[part],
                None if states is None else states[part]) for part in parts])

    def _advantages(self, rollout, mask, scores, scorable, penalties):
        values = self._rollout_values(rollout, mask)
        rewards = estimators.terminal_rewards(scores.where(scorable, 0.0), mask) - penalties
        args = self.args
        lam = args.lam if args.length_adaptive_alpha is None else (
            estimators.length_adaptive_lambda(mask, args.length_adaptive_alpha))
        advantages, returns = estimators.gae(rewards, values, mask, args.gamma, lam)
        if args.critic_lam != args.lam or args.length_adaptive_alpha is not None:
            returns = estimators.gae(rewards, values, mask, args.gamma, args.critic_lam)[1]
        rollout["values"], rollout["returns"] = values, returns
        rollout["value_mask"] = mask * scorable.float().unsqueeze(1)
        self._log_critic(values, returns, rollout["value_mask"])
        if args.scale_rewards == "whiten":
            if self._sum_over_ranks(rollout["value_mask"].sum()) < 2:
                return torch.zeros_like(advantages)  # nothing could be scored
            return estimators.whiten(advantages, rollout["value_mask"],
                                     total=self._sum_over_ranks)
        totals = self._gathered_returns(scores, penalties)
        scale = estimators.reward_scale(totals, self._group_size(), args.scale_rewards)
        # Rewards that are all but equal have no deviation to divide by; R - V need not be small.
        scale = scale.where(scale > _LEAST_SCALE, 1.0)
        return advantages / self._of_this_rank(scale, scores.numel()).unsqueeze(1)

    def _log_critic(self, values, returns, mask) -> None:
        width = torch.tensor([values.size(1)], device=values.device)
        width = int(self.accelerator.gather(width).max())
        gathered = [self.accelerator.gather(nn.functional.pad(x, (0, width - x.size(1))))
                    for x in (values, returns, mask)]
        values, returns, mask = gathered
        inside = mask.bool()
        explained = float(estimators.explained_variance(*gathered))
        self._log("critic/explained_variance", explained)
        until = self.args.critic_warmup_until
        if (self._mode == "train" and self._warming_up and until is not None
                and explained > until):
            self._warm_at = self.state.global_step
        self._log("critic/value_mean", values[inside].mean())
        self._log("critic/return_mean", returns[inside].mean())

    def _compute_loss(self, model, inputs):
        warming_up = self._mode == "train" and self._warming_up
        shared = self._keeps_states
        frozen = warming_up and not shared
        with torch.no_grad() if frozen else nullcontext():
            policy_loss = super()._compute_loss(model, inputs)
        mask = inputs["value_mask"]
        states = self._scored["states"] if shared else None
        if warming_up and shared:
            states, policy_loss = states.detach(), policy_loss.detach()
        errors, clipped = self._value_errors(self._outputs(inputs, states), inputs)
        value_loss = self._token_mean(errors * mask, inputs)
        if not torch.isfinite(value_loss):
            raise UserError(f"the value loss is {value_loss.item()} at step "
                            f"{self.state.global_step}: lower critic_learning_rate.")
        tokens = self._sum_over_ranks(mask.sum()).clamp(min=1)
        self._log("critic/value_loss", self._sum_over_ranks((errors * mask).sum()) / tokens)
        self._log("critic/clip_ratio", self._sum_over_ranks((clipped * mask).sum()) / tokens)
        self._log("critic/warming_up", float(warming_up))
        return (0.0 if frozen else policy_loss) + self.args.vf_coef * value_loss

    def _value_errors(self, outputs: Tensor, inputs) -> tuple[Tensor, Tensor]:
        """Return the value loss of each token `(B, T)` and where the clip range acts."""
        returns = inputs["returns"]
        unclipped = torch.zeros_like(outputs)
        if self.args.critic_loss == "bce":
            low, high = self.args.value_range
            target = ((returns - low) / (high - low)).clamp(0.0, 1.0)
            return nn.functional.binary_cross_entropy_with_logits(
                outputs, target, reduction="none"), unclipped
        errors = (outputs - returns) ** 2
        if self.args.value_clip is None:
            return 0.5 * errors, unclipped
        near = inputs["values"] + (outputs - inputs["values"]).clamp(
            -self.args.value_clip, self.args.value_clip)
        errors_near = (near - returns) ** 2
        return 0.5 * torch.maximum(errors, errors_near), (errors_near > errors).float()

    # -- the critic's optimiser group, gradients and checkpoints --------------------------------

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        absent = [p for p in self.critic.parameters() if p.requires_grad and id(p) not in known]
        if absent:
            if self.lr_scheduler is not None:
                raise UserError("optimizers=(optimizer, scheduler) leaves out the critic's "
                                "weights, and a scheduler takes no new group: give "
                                "(optimizer, None).")
            optimizer.add_param_group({"params": absent, "lr": self.args.critic_learning_rate,
                                       "weight_decay": 0.0})
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        # The policy's schedule waits for the warm-up and then runs through all of its course, so
        # that frozen steps cost it no learning rate; the critic's (the last group) begins at once.
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.critic_warmup_steps and isinstance(scheduler,
                                                        torch.optim.lr_scheduler.LambdaLR):
            course = scheduler.lr_lambdas[0]

            def delayed(step):
                frozen = self._policy_begins()
                return course(max(0, step - frozen) * num_training_steps
                              / max(1, num_training_steps - frozen))
            scheduler.lr_lambdas[:-1] = [delayed] * (len(scheduler.lr_lambdas) - 1)
        return scheduler

    def zero_beside_policy(self):
        self.critic.zero_grad(set_to_none=True)

    def _clip_grad_norm(self, model):
        policy_norm = super()._clip_grad_norm(model)
        # With fp16 the line above took the loss scale off both; Accelerate refuses to do it twice.
        norm = nn.utils.clip_grad_norm_(self.critic.parameters(), self.args.critic_max_grad_norm)
        self._log("critic/grad_norm", self._finite(norm, "critic", "critic_learning_rate"))
        return policy_norm

    def save_beside_policy(self, folder):
        args = self.args
        save_critic(self.accelerator.unwrap_model(self.critic), folder, warm_at=self._warm_at,
                    value_range=args.value_range if args.critic_loss == "bce" else None)

    def load_beside_policy(self, folder):
        self._warm_at = load_critic(self.accelerator.unwrap_model(self.critic), folder)["warm_at"]

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_beside_policy(checkpoint)
