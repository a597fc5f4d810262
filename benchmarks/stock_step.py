"""Measure one optimiser step of stock TRL: GRPO (any version), or the PPO that 1.12.0 still had.

In: a JSON `Workload` as the only argument. Out: one JSON line. Imports nothing of this package, so
that it runs in an environment with another TRL.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import trl
from datasets import Dataset
from rl_workload import (
    DEVICE,
    DTYPE,
    Workload,
    adapters,
    check_length,
    checkpoint,
    machine,
    matmul_rate,
    measure,
    policy,
    prompt_dataset,
    prompt_ids,
    report,
    spread_reward,
    stopwatch,
    time_parts,
    tokenizer,
)
from torch import nn


def grpo(work: Workload, folder: Path) -> tuple[int, dict]:
    source, parameters = checkpoint(work, folder / "model")
    trainer = trl.GRPOTrainer(
        model=policy(source, work), reward_funcs=spread_reward,
        args=trl.GRPOConfig(**work.grpo_settings(folder / "run"), beta=work.kl_coef,
                            scale_rewards="batch"),
        train_dataset=prompt_dataset(work), processing_class=tokenizer(work))
    result = measure(trainer, work, time_parts(trainer))
    check_length(trainer, work)
    return parameters, result


class FreeReward(nn.Module):
    """A reward model in the shape TRL 1.12 asks for that costs nothing: the token id over 1,000."""

    base_model_prefix = "backbone"

    class Backbone(nn.Module):
        def forward(self, input_ids, **kwargs):
            states = input_ids.unsqueeze(-1).float() / 1000
            return type("Output", (), {"hidden_states": [states]})()

    def __init__(self):
        super().__init__()
        self.backbone, self.score = self.Backbone(), nn.Identity()


def ppo(work: Workload, folder: Path) -> tuple[int, dict]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import trl.experimental.ppo.ppo_trainer as module
    from transformers import Qwen3ForSequenceClassification

    source, parameters = checkpoint(work, folder / "model")
    value = Qwen3ForSequenceClassification.from_pretrained(
        source, num_labels=1, dtype=DTYPE).to(DEVICE)
    rows = [ids for ids in prompt_ids(work) for _ in range(work.group)]
    # LoRA: TRL wraps the policy itself and takes the base as reference.
    plain = Workload(**{**vars(work), "lora_rank": 0})
    trainer = module.PPOTrainer(
        args=module.PPOConfig(
            **work.common_settings(folder / "run"), num_mini_batches=1, num_ppo_epochs=1,
            total_episodes=work.rows * (work.steps + 1), response_length=work.completion_tokens,
            local_rollout_forward_batch_size=16 if DEVICE == "cuda" else work.rows,
            num_sample_generations=0, stop_token="eos", kl_coef=work.kl_coef, lam=0.95,
            cliprange_value=0.2, vf_coef=0.1),
        processing_class=tokenizer(work), model=policy(source, plain), ref_model=None,
        reward_model=FreeReward(), value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in rows]),
        peft_config=adapters(work) if work.lora_rank else None)
    generation, widths = [], set()
    generate = stopwatch(module.batch_generation, generation)

    def watched(model, queries, *args):
        ids, logits = generate(model, queries, *args)
        widths.add(ids.shape[1] - queries.shape[1])
        return ids, logits

    module.batch_generation = watched
    result = measure(trainer, work, {"generation": generation})
    if widths != {work.completion_tokens}:
        raise SystemExit(f"completions had {sorted(widths)} tokens")
    return parameters, result


def main() -> None:
    work = Workload(**json.loads(sys.argv[1]))
    if work.subject == "machine":
        print(json.dumps({**machine(), "trl": trl.__version__, "flop_per_second": matmul_rate()}))
        return
    torch.manual_seed(work.seed)
    with tempfile.TemporaryDirectory() as folder:
        parameters, result = {"stock GRPO": grpo, "TRL 1.12 PPO": ppo}[work.subject](
            work, Path(folder))
    report(work, parameters, {**result, "trl": trl.__version__})


if __name__ == "__main__":
    main()
