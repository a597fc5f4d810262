"""Each method of the study as one call: from a checkpoint and rows of prompts to a new checkpoint.

In: a start (checkpoint folder or hub name), rows as `prompts.prompt_dataset` gives them, settings,
and where to write. Out: an ordinary Transformers checkpoint in `out/policy` (adapters are merged
after SFT and kept apart in `out/adapter` after RL), for RL `metrics.jsonl` and `timings.jsonl`,
for PPO `critic.safetensors`, and the measured costs. A run that was interrupted goes on from its
newest whole checkpoint.

Refused: an unknown method, rows without the columns the rewards read, prompts over the limit.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from sklearn.metrics import confusion_matrix, f1_score
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from ueba_helpers.data.files import atomic_path, write_json
from ueba_helpers.data.records import append_row, cut_rows, plain, read_rows
from ueba_helpers.data.seeding import generator
from ueba_helpers.errors import UserError
from ueba_helpers.rl.checkpoints import is_shared_critic, latest_checkpoint, load_critic, seal
from ueba_helpers.rl.monitors import (
    HealthMonitor,
    MetricsWriter,
    metric_keys,
    with_text_metrics,
)
from ueba_helpers.rl.policies import (
    REFERENCE_ADAPTER,
    Critic,
    load_policy,
    load_tokenizer,
    make_critic,
    tensor_bytes,
)
from ueba_helpers.rl.prefix import backbone_of
from ueba_helpers.rl.rollouts import predict, tokenize_prompts
from ueba_helpers.rl.settings import (
    GRPOSettings,
    PolicySettings,
    PPOSettings,
    RLSettings,
    SFTSettings,
)
from ueba_helpers.rl.trainers import (
    GRPOConfig,
    GRPOTrainer,
    PolicyGradientTrainer,
    PPOConfig,
    PPOTrainer,
)
from ueba_helpers.task.rewards import ASKED, TRAINABLE, evidence_hit_rate
from ueba_helpers.task.verdicts import RISKS

disable_progress_bars()  # of datasets.map, which draws one per notebook cell

OnStep = Callable[[int, Mapping[str, float]], None]

REWARD_COLUMNS = ("prompt", "window_id", "label", "evidence_ids", "evidence_truth", "dont_care",
                  "feature_truth", "item_text", "style")


@dataclass(frozen=True)
class Trained:
    """A trained policy's folder and what it cost: seconds, tokens, completions, bytes by part."""

    policy: Path
    costs: dict


def demonstrated_labels(labels: Sequence[str], settings: SFTSettings, *, seed: int) -> list[str]:
    """Return the risk that each demonstration says: the truth, held back as the settings ask.

    A label becomes one level lower with chance `downgrade` (an analyst who under-reports), then
    any label with chance `label_noise`.

    >>> demonstrated_labels(["malicious"], SFTSettings(downgrade=1.0), seed=0)
    ['suspicious']
    """
    draws = generator(seed, "demonstrated labels")
    said = []
    for label in labels:
        level = RISKS.index(label)
        lower, other, any_level = draws.random(), draws.random(), int(draws.integers(len(RISKS)))
        level = max(0, level - 1) if lower < settings.downgrade else level
        said.append(RISKS[any_level if other < settings.label_noise else level])
    return said


def sft(start: Path | str, out: Path | str, rows: Sequence[Mapping], settings: SFTSettings,
        policy: PolicySettings, *, seed: int, on_step: OnStep | None = None) -> Trained:
    """Train on demonstrations (`prompt` messages and a `completion` text) by TRL's SFTTrainer.

    Loss on the completion, with `prompt_loss` on the prompt too; with `lora_rank` adapters are
    trained and merged at the end.
    """
    out = Path(out)
    tokenizer = load_tokenizer(start)
    model = load_policy(start, policy)
    data = Dataset.from_list(_demonstration_tokens(tokenizer, rows, policy.max_prompt_tokens))
    config = SFTConfig(
        output_dir=str(out / "checkpoints"), num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=20, weight_decay=0.0, seed=seed,
        adam_beta2=0.95,  # a memory of 20 steps: the tiny policy's whole training is 750
        completion_only_loss=not settings.prompt_loss, max_length=None, save_strategy="steps",
        save_steps=settings.save_steps, save_total_limit=2, **_quiet(log_steps=on_step is not None))
    clock = _Clock()
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer,
                         callbacks=[clock, *([_Steps(on_step, "loss")] if on_step else [])])
    trainer.remove_callback(PrinterCallback)
    begun_at = _train(trainer, settings.epochs * math.ceil(len(data) / settings.batch_size))
    costs = {"wall_seconds_training": clock.seconds + (clock.read(begun_at) if begun_at else 0.0),
             "steps": trainer.state.global_step,
             "tokens": settings.epochs * sum(map(len, data["input_ids"])),
             "memory_bytes": memory_by_part(trainer)}
    trained = trainer.model
    if isinstance(trained, PeftModel):
        trained = trained.merge_and_unload()
    return Trained(save_policy(trained, tokenizer, out / "policy"), costs)


def _demonstration_tokens(tokenizer, rows: Sequence[Mapping], max_prompt_tokens: int
                          ) -> list[dict]:
    """Return `input_ids` and `completion_mask` of whole demonstrations, the end of turn included.

    TRL would render the chat template row by row, which takes longer than a tiny policy's epoch.
    """
    prompts = tokenize_prompts(tokenizer, [row["prompt"] for row in rows],
                               max_prompt_tokens=max_prompt_tokens)
    answers = tokenizer([row["completion"] for row in rows], add_special_tokens=False)["input_ids"]
    return [{"input_ids": [*prompt, *answer, tokenizer.eos_token_id],
             "completion_mask": [0] * len(prompt) + [1] * (len(answer) + 1)}
            for prompt, answer in zip(prompts, answers, strict=True)]


def ppo(start: Path | str, out: Path | str, rows: Sequence[Mapping], settings: PPOSettings,
        policy: PolicySettings, **options) -> Trained:
    """Train a policy by PPO against a critic; see `reinforce` for the options."""
    config = _shared_config(out, settings, policy)
    config |= {"critic": settings.critic, "gamma": settings.gamma, "lam": settings.lam,
               "critic_learning_rate": settings.learning_rate
               * settings.critic_learning_rate_ratio,
               **{name: getattr(settings, name) for name in (
                   "critic_warmup_steps", "critic_warmup_until", "critic_max_grad_norm",
                   "critic_loss", "value_range", "critic_lam", "length_adaptive_alpha",
                   "value_clip")},
               "vf_coef": 1.0 if settings.critic == "separate" else 0.1}
    return reinforce(PPOTrainer, PPOConfig(**config), start, out, rows, settings, policy,
                     **options)


def grpo(start: Path | str, out: Path | str, rows: Sequence[Mapping], settings: GRPOSettings,
         policy: PolicySettings, **options) -> Trained:
    """Train a policy by GRPO against what its group earned (`GRPOSettings.baseline`).

    See `reinforce` for the options.
    """
    config = GRPOConfig(**_shared_config(out, settings, policy), baseline=settings.baseline,
                        baseline_floor=settings.baseline_floor)
    return reinforce(GRPOTrainer, config, start, out, rows, settings, policy, **options)


METHODS = {"ppo": ppo, "grpo": grpo}


def _quiet(*, log_steps: bool) -> dict:
    return {"disable_tqdm": True, "report_to": "none", "logging_steps": 1,
            "use_cpu": not torch.cuda.is_available(),  # float64 is used, which Apple's GPUs lack
            "logging_strategy": "steps" if log_steps else "no", "bf16": False,
            "gradient_checkpointing": False, "dataloader_pin_memory": False}


def _shared_config(out: Path | str, settings: RLSettings, policy: PolicySettings) -> dict:
    """Return the controlled variables in TRL's words: the same for PPO and GRPO."""
    rows = settings.micro_batch_prompts * settings.num_generations
    return _quiet(log_steps=True) | {
        "output_dir": str(Path(out) / "checkpoints"), "max_steps": settings.steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": settings.prompts_per_step // settings.micro_batch_prompts,
        "num_generations": settings.num_generations, "num_iterations": settings.num_iterations,
        "max_completion_length": policy.max_completion_tokens,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": (settings.lr_schedule if settings.lr_schedule != "constant"
                              else "constant_with_warmup"),
        "warmup_steps": round(settings.lr_warmup_share * settings.steps),
        "temperature": settings.temperature, "epsilon": settings.clip_low,
        "epsilon_high": settings.clip_high, "kl_coef": settings.kl_coef,
        "kl_placement": settings.kl_placement, "scale_rewards": settings.scale_rewards,
        "max_grad_norm": settings.max_grad_norm, "loss_type": settings.loss_type,
        "importance_sampling_level": settings.importance_sampling_level,
        "target_kl": settings.target_kl,
        "missing_eos_penalty": settings.missing_eos_penalty,
        "shared_prefix": settings.shared_prefix, "weight_decay": 0.0, "seed": settings.seed,
        "save_strategy": "steps", "save_steps": settings.save_steps, "save_total_limit": 3,
        "remove_unused_columns": False,
        "reward_weights": [weight for _, weight in TRAINABLE[settings.rewards]],
    }


def reinforce(trainer_class: type[PolicyGradientTrainer], config, start: Path | str,
              out: Path | str, rows: Sequence[Mapping], settings: RLSettings,
              policy: PolicySettings, *, held_out: Sequence[Mapping] = (),
              evaluate_every: int = 20, on_held_out: OnStep | None = None,
              stop_on: Sequence[str] = (),
              on_completions: Callable[[pd.DataFrame], None] | None = None,
              callbacks: Sequence[TrainerCallback] = ()) -> Trained:
    """Train by a policy-gradient trainer; `held_out` rows are judged greedily as it learns.

    Writes into `out`: `metrics.jsonl` (fixed keys, alarms among them), `timings.jsonl`, and
    `held_out.jsonl` with the `held_out_metrics` at step 0 and every `evaluate_every` steps, which
    `on_held_out` receives too. A reward that rises while these do not is a hack and rings an alarm;
    so does evidence that is cited less and less. Alarms named in `stop_on` end the training.
    `on_completions` receives what the policy wrote since the last checkpoint, just before the next:
    step, completion, reward terms.
    """
    out = Path(out)
    _check_columns(rows, settings.rewards)
    tokenizer = load_tokenizer(start)
    tokenize_prompts(tokenizer, [row["prompt"] for row in rows],
                     max_prompt_tokens=policy.max_prompt_tokens)
    model = load_policy(start, policy)
    first, *others = (term for term, _ in TRAINABLE[settings.rewards])
    trainer = trainer_class(
        model=model, reward_funcs=[with_text_metrics(first), *others],
        args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{name: row[name] for name in REWARD_COLUMNS}
                                         for row in rows]),
        callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    metrics = out / "metrics.jsonl"
    monitor = HealthMonitor(stop_on=stop_on, metrics_path=metrics)
    trainer.add_callback(MetricsWriter(
        metrics, out / "timings.jsonl", monitor=monitor,
        keys=metric_keys(trainer._name.lower(), trainer.reward_func_names,
                         kl_in_loss=bool(trainer.beta), target_kl=settings.target_kl is not None,
                         text=True)))
    if held_out:
        trainer.add_callback(_HeldOut(trainer, tokenizer, held_out, policy, evaluate_every,
                                      monitor, out / "held_out.jsonl", on_held_out))
    trainer.add_callback(monitor)  # after what judges the start, which it begins from
    if on_completions:
        trainer.add_callback(_Completions(trainer, on_completions))
    _train(trainer, settings.steps)
    trainer.save_beside_policy(out)
    folder = save_policy(trainer.accelerator.unwrap_model(trainer.model), tokenizer,
                         out / ("adapter" if policy.lora_rank else "policy"))
    return Trained(folder, _costs(trainer, out / "timings.jsonl"))


def _check_columns(rows: Sequence[Mapping], rewards: str) -> None:
    if not rows:
        raise UserError("there are no training prompts: give rows of prompts.prompt_dataset.")
    missing = [name for name in REWARD_COLUMNS if name not in rows[0]]
    if missing:
        raise UserError(f"training rows lack the column {missing[0]!r}: the rewards read "
                        f"{', '.join(REWARD_COLUMNS)}.")
    asked, wanted = ASKED.get(rewards, (None, None))
    if asked and any(row.get(asked) != wanted for row in rows):
        raise UserError(f"rewards={rewards!r} scores what the prompts do not ask for: make them "
                        f"with {asked}={wanted!r} (prompts.prompt_dataset).")


def save_policy(model: PreTrainedModel, tokenizer, folder: Path | str) -> Path:
    """Write a policy (or its adapters) and its tokenizer as an ordinary checkpoint, atomically."""
    folder = Path(folder)
    with atomic_path(folder) as temporary:
        if isinstance(model, PeftModel):  # not the reference beside it
            model.save_pretrained(temporary, selected_adapters=[model.active_adapter])
        else:
            model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
    return folder


def load_trained(folder: Path | str, start: Path | str, policy: PolicySettings
                 ) -> PreTrainedModel:
    """Return a trained policy: a whole checkpoint, or adapters on top of `start`."""
    if not (Path(folder) / "adapter_config.json").exists():
        return load_policy(folder, PolicySettings(**{**vars(policy), "lora_rank": 0}))
    base = load_policy(start, PolicySettings(**{**vars(policy), "lora_rank": 0}))
    return PeftModel.from_pretrained(base, folder)


def load_trained_critic(out: Path | str, start: Path | str, policy: PolicySettings) -> Critic:
    """Return the critic that a PPO run in `out` ended with.

    A shared one reads the hidden states of the trained policy.
    """
    if is_shared_critic(out):
        trained = Path(out) / ("adapter" if policy.lora_rank else "policy")
        critic = Critic(backbone_of(load_trained(trained, start, policy)))
        facts = load_critic(critic.head, out)
    else:
        critic = make_critic(load_policy(start, policy))
        facts = load_critic(critic, out)
    critic.value_range = facts.get("value_range")
    return critic.eval()


def drop_checkpoints(out: Path | str) -> None:
    """Remove the training state of a finished run; the policy stays."""
    shutil.rmtree(Path(out) / "checkpoints", ignore_errors=True)


def memory_by_part(trainer) -> dict[str, int]:
    """Return the bytes of tensors by part: weights, gradients, optimiser, critic, reference.

    Gradients are those of the trained parameters, which exist during the backward pass and are
    released after the step.
    """
    bare = trainer.accelerator.unwrap_model(trainer.model)
    reference = {name: tensor for name, tensor in bare.named_parameters()
                 if f".{REFERENCE_ADAPTER}." in name}
    parts = {"weights": tensor_bytes(tensor for name, tensor in bare.named_parameters()
                                     if name not in reference),
             "gradients": sum(p.numel() * p.element_size() for p in bare.parameters()
                              if p.requires_grad),
             "critic": 0, "critic_gradients": 0, "reference": tensor_bytes(reference.values())}
    if isinstance(trainer, PPOTrainer):
        critic = list(trainer.critic.parameters())
        shared = {id(p) for p in bare.parameters()}
        parts["critic"] = tensor_bytes(p for p in critic if id(p) not in shared)
        parts["critic_gradients"] = sum(p.numel() * p.element_size() for p in critic
                                        if p.requires_grad)
    if isinstance(trainer, PolicyGradientTrainer) and trainer._reference is not None:
        parts["reference"] = tensor_bytes(trainer._reference.parameters())
    states = trainer.optimizer.state.values() if trainer.optimizer else ()
    parts["optimiser"] = tensor_bytes(value for state in states for value in state.values()
                                      if isinstance(value, torch.Tensor))
    return parts


def _train(trainer: Trainer, steps: int) -> Path | None:
    """Train to the last step; return the newest whole checkpoint that training began from."""
    checkpoint = latest_checkpoint(trainer.args.output_dir)
    if checkpoint and int(checkpoint.name.rpartition("-")[2]) >= steps:
        # Killed after the last checkpoint: Trainer would train one step more than was asked for.
        trainer._load_from_checkpoint(str(checkpoint))
        if isinstance(trainer, PolicyGradientTrainer):
            trainer.load_beside_policy(checkpoint)
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return checkpoint


class _Clock(TrainerCallback):
    """Count a session's seconds of training, and seal each checkpoint with those so far."""

    file = "seconds.json"

    def __init__(self):
        self.seconds, self._before, self._at = 0.0, 0.0, 0.0

    def read(self, checkpoint: Path) -> float:
        """Return the seconds of all sessions up to a checkpoint."""
        return json.loads((checkpoint / self.file).read_text(encoding="utf-8"))["seconds"]

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self._before = self.read(_checkpoint_folder(args, state))
        self._at = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds, self._at = self.seconds + now - self._at, now

    def on_save(self, args, state, control, **kwargs):
        folder = _checkpoint_folder(args, state)
        write_json(folder / self.file, {"seconds": self._before + self.seconds})
        seal(folder)


def _checkpoint_folder(args, state) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


class _Steps(TrainerCallback):
    """Hand each step's logged values on; `key` tells a step's line from other lines."""

    def __init__(self, on_step: OnStep, key: str):
        self.on_step, self.key = on_step, key

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.key in logs:
            self.on_step(state.global_step, dict(logs))


def _costs(trainer: PolicyGradientTrainer, timings: Path) -> dict:
    """Return what the whole run cost, sessions before an interruption included.

    The seconds are those of the optimiser steps with their rollouts; judging held-out windows,
    saving and loading are left out.
    """
    args, state = trainer.args, trainer.state
    rollouts = state.global_step / (args.num_iterations * args.steps_per_generation
                                    / args.gradient_accumulation_steps)
    return {"wall_seconds_training": sum(row["seconds"] for row in read_rows(timings)),
            "steps": state.global_step, "tokens": int(state.num_input_tokens_seen),
            "completions": round(rollouts * args.generation_batch_size),
            "memory_bytes": memory_by_part(trainer)}


class _Completions(TrainerCallback):
    """Collect each step's completions and hand them on before a checkpoint is saved."""

    def __init__(self, trainer, report):
        self.trainer, self.report, self.tables = trainer, report, []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in logs:
            return
        written = self.trainer._logs
        self.tables.append(pd.DataFrame({"step": state.global_step,
                                         "completion": list(written["completion"]),
                                         **{name: list(values) for name, values
                                            in written["rewards"].items()}}))
        if control.should_save or state.global_step >= args.max_steps:
            self.report(pd.concat(self.tables, ignore_index=True))
            self.tables = []


class _HeldOut(TrainerCallback):
    """Judge held-out windows greedily before training and every few steps, and write it down."""

    def __init__(self, trainer, tokenizer, rows, policy, every, monitor, path, report):
        self.trainer, self.tokenizer, self.rows = trainer, tokenizer, rows
        self.policy, self.every, self.monitor = policy, every, monitor
        self.path, self.report = path, report

    def on_train_begin(self, args, state, control, **kwargs):
        begun = state.global_step or -1  # a fresh run judges the start itself
        for row in read_rows(self.path):
            if row["step"] <= begun:
                self.monitor.add_held_out(row["step"], row)
        if state.is_world_process_zero:
            cut_rows(self.path, begun)
        if state.global_step == 0:
            self._judge(state)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == args.max_steps:
            self._judge(state)

    def _judge(self, state) -> None:
        step = state.global_step
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        table = predict(model, self.tokenizer, self.rows, detector="", seed=0, split="",
                        max_new_tokens=self.policy.max_completion_tokens)
        found = held_out_metrics(table["label"], table["risk"], table["evidence"],
                                 [row["evidence_truth"] for row in self.rows])
        self.monitor.add_held_out(step, found)
        if state.is_world_process_zero:
            append_row(self.path, {"step": step,
                                   **{key: plain(found[key]) for key in sorted(found)}})
        if self.report:
            self.report(step, found)


def held_out_metrics(labels: Sequence[str], said: Sequence[str], cited: Sequence[Sequence[str]],
                     truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return macro-F1, accuracy, valid share, evidence hit rate, counts `count/<label>/<said>`.

    An invalid verdict counts as wrong for its class, as a hit for none and as citing nothing. The
    evidence hit rate is the mean of `rewards.evidence_hit_rate` over windows with true items.

    >>> held_out_metrics(["normal", "malicious"], ["normal", "invalid"], [[], []],
    ...                  [[], ["e1"]])["accuracy"]
    0.5
    """
    labels, said = list(labels), list(said)
    options = [*RISKS, "invalid"]
    counts = confusion_matrix(labels, said, labels=options)
    hits = [evidence_hit_rate(items if risk != "invalid" else (), true)
            for risk, items, true in zip(said, cited, truth, strict=True) if len(true)]
    metrics = {"macro_f1": float(f1_score(labels, said, labels=list(RISKS), average="macro",
                                          zero_division=0)),
               "accuracy": float(np.mean([a == b for a, b in zip(labels, said, strict=True)])),
               "valid": float(np.mean([b != "invalid" for b in said])),
               "evidence_hit_rate": float(np.mean(hits)) if hits else math.nan}
    metrics |= {f"count/{label}/{other}": int(counts[i, j])
                for i, label in enumerate(RISKS) for j, other in enumerate(options)}
    return metrics
