"""Two gloo ranks: both end with the same networks, and with those of one rank on the same batch.

Run as `python -m tests.test_ranks OUT` under `torch.distributed.run`, the module is the worker:
it trains every case for two steps; each rank writes its networks before and after.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.test_trainers import length_reward, make
from tests.tiny import probe_policy
from ueba_helpers.rl.policies import lora_config
from ueba_helpers.rl.settings import PolicySettings

ROWS = 16  # completions per optimiser step over all ranks
PPO = {"arm": "ppo", "scale_rewards": "whiten", "value_clip": 0.2, "lam": 0.95}
CASES = {
    "grpo": {"arm": "grpo"},
    "grpo, two micro-batches a step": {"arm": "grpo", "accumulate": 2},
    "grpo, a group over both ranks": {"arm": "grpo", "num_generations": 16},
    "grpo, two passes over a rollout": {"arm": "grpo", "num_iterations": 2},
    "grpo, adapters": {"arm": "grpo", "adapters": True},
    "ppo": PPO,
    "ppo, two micro-batches a step": {**PPO, "accumulate": 2},
    "ppo, single completions": {**PPO, "num_generations": 1},
    "ppo, shared critic": {**PPO, "critic": "shared"},
    "ppo, warm-up": {**PPO, "critic_warmup_steps": 1},
    "ppo, plain path": {**PPO, "shared_prefix": False},
}
TWINS = {  # deliberately wrong: each of the two comparisons must reject its own
    "ppo, whitened per rank": {**PPO, "twin": "whitened per rank"},
    "ppo, critic without synchronisation": {**PPO, "twin": "no synchronisation"},
}


def prepared(folder, arm, accumulate=1, adapters=False, twin=None, **changes):
    """Return this rank's trainer of one case, ready for its two steps."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    model = None
    if adapters:
        from peft import get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(probe_policy()[0], lora_config(PolicySettings(lora_rank=4)))
    settings = {"steps": 2, "kl_coef": 0.05, "learning_rate": 1e-3, "adam_epsilon": 1e-4,
                "gradient_accumulation_steps": accumulate,
                "per_device_train_batch_size": ROWS // ranks // accumulate, **changes}
    trainer = make(arm, folder, reward=length_reward, source=probe_policy, model=model, count=32,
                   **settings)
    # The plain path would let Transformers sample with the global random state, per rank.
    trainer.use_sampler = True
    if twin == "whitened per rank":
        trainer._sum_over_ranks = lambda x: x.detach()
    if twin == "no synchronisation":
        trainer.critic = trainer.accelerator.unwrap_model(trainer.critic)
    return trainer


def trainable(trainer) -> dict[str, torch.Tensor]:
    """Return a copy of the trained weights of all networks, by network and name."""
    networks = {"policy": trainer._bare_model()}
    if trainer._name == "PPO":
        networks["critic"] = trainer.accelerator.unwrap_model(trainer.critic)
    return {f"{network}.{name}": tensor.detach().clone()
            for network, module in networks.items()
            for name, tensor in module.named_parameters() if tensor.requires_grad}


def work(out: Path) -> None:
    rank = os.environ.get("RANK", "0")
    for number, case in enumerate((CASES | TWINS).values()):
        trainer = prepared(out / "runs", **case)
        before = trainable(trainer)
        trainer.train()
        after = trainable(trainer)
        save_file({f"{when}.{name}": tensor for when, weights in
                   (("before", before), ("after", after)) for name, tensor in weights.items()},
                  out / f"case-{number}-rank-{rank}.safetensors")


def launch(out: Path, ranks: int) -> dict[tuple[str, int], dict[str, torch.Tensor]]:
    """Train every case on so many ranks; return the weights by case and rank."""
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
         str(ranks), "-m", "tests.test_ranks", str(out)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
             "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"})
    assert done.returncode == 0, done.stderr[-4000:]
    return {(name, rank): load_file(out / f"case-{number}-rank-{rank}.safetensors")
            for number, name in enumerate(CASES | TWINS) for rank in range(ranks)}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("ranks") / "one", 1)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("ranks") / "two", 2)


def identical(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def update(weights, network):
    """Return what training added to a network, flat."""
    names = [name for name in weights if name.startswith(f"before.{network}")]
    return torch.cat([(weights[name.replace("before", "after", 1)] - weights[name]).flatten()
                      for name in names])


def difference(found, expected, network):
    """Return how far two updates of a network are apart, relative to the expected one."""
    found, expected = update(found, network), update(expected, network)
    return ((found - expected).norm() / expected.norm()).item()


def networks_of(case):
    return ["policy", "critic"] if case.startswith("ppo") else ["policy"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_both_ranks_end_with_identical_networks(two_ranks, case):
    assert identical(two_ranks[case, 0], two_ranks[case, 1])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_result_of_one(one_rank, two_ranks, case):
    for network in networks_of(case):
        assert difference(two_ranks[case, 0], one_rank[case, 0], network) < 1e-5, network


@pytest.mark.slow
def test_a_critic_without_synchronisation_is_noticed(two_ranks):
    case = "ppo, critic without synchronisation"
    assert not identical(two_ranks[case, 0], two_ranks[case, 1])


@pytest.mark.slow
def test_whitening_per_rank_is_noticed(one_rank, two_ranks):
    case = "ppo, whitened per rank"
    assert difference(two_ranks[case, 0], one_rank["ppo", 0], "policy") > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_moves_every_network(one_rank, case):
    """The comparisons above are divided by these movements."""
    for network in networks_of(case):
        assert update(one_rank[case, 0], network).abs().max() > 1e-4, network


if __name__ == "__main__":
    work(Path(sys.argv[1]))
