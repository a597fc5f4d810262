"""Measure one optimiser step of our GRPO or PPO.

In: a JSON `Workload` as the only argument. Out: one JSON line.
"""

import json
import sys
import tempfile
from pathlib import Path

import trl
from rl_workload import (
    Workload,
    check_length,
    checkpoint,
    measure,
    policy,
    prompt_dataset,
    report,
    spread_reward,
    time_parts,
    tokenizer,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from ueba_helpers.rl.trainers import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer

# GRPO as the stock trainer is asked for it (KL in the loss); PPO as TRL 1.12 (KL in the reward).
PPO = {"kl_placement": "reward", "scale_rewards": "whiten", "lam": 0.95, "critic_lam": 0.95,
       "value_clip": 0.2, "vf_coef": 0.1}
SUBJECTS = {
    "GRPO": (GRPOTrainer, GRPOConfig, {"kl_placement": "loss"}),
    "GRPO, plain path": (GRPOTrainer, GRPOConfig,
                         {"kl_placement": "loss", "shared_prefix": False}),
    "PPO, separate critic": (PPOTrainer, PPOConfig, {**PPO, "critic": "separate"}),
    "PPO, shared critic": (PPOTrainer, PPOConfig, {**PPO, "critic": "shared"}),
}


def main() -> None:
    work = Workload(**json.loads(sys.argv[1]))
    trainer_class, config_class, settings = SUBJECTS[work.subject]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source, parameters = checkpoint(work, folder / "model")
        trainer = trainer_class(
            policy(source, work), spread_reward,
            config_class(**work.grpo_settings(folder / "run"), kl_coef=work.kl_coef, **settings),
            train_dataset=prompt_dataset(work), processing_class=tokenizer(work))
        result = measure(trainer, work, time_parts(trainer))
        check_length(trainer, work)
    critic = 0
    if isinstance(trainer, PPOTrainer):
        critic = sum(p.numel() for p in trainer.critic.parameters())
    report(work, parameters, {**result, "critic_parameters": critic, "trl": trl.__version__})


if __name__ == "__main__":
    main()
