"""The core on a CPU and, where there is one (`make test-gpu`), on a CUDA device.

Tolerances in bfloat16, whose numbers have 8 bits: log-probabilities to 0.1 nat, gradients to 5 %.
"""

import pytest
import torch
from peft import get_peft_model

from tests.test_prefix import loss_and_gradient, ragged_batch, relative
from tests.test_trainers import ARMS, flat, length_reward, make, rollout_of
from tests.tiny import DEVICES, policy
from ueba_helpers.rl.policies import lora_config
from ueba_helpers.rl.prefix import completion_states, plain_states
from ueba_helpers.rl.settings import PolicySettings

TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (0.1, 0.05)}  # nats, relative gradient
on_each_device = pytest.mark.parametrize("device", DEVICES)
in_each_type = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])


def moved_to(device, dtype):
    return policy()[0].to(device, dtype)


@on_each_device
@in_each_type
def test_the_shared_prefix_equals_the_plain_forward(device, dtype):
    model = moved_to(device, dtype)
    batch = [part.to(device) for part in ragged_batch()]
    weights = torch.randn(batch[2].shape, generator=torch.Generator().manual_seed(2)).to(device)
    plain, plain_gradient = loss_and_gradient(model, plain_states, batch, weights)
    shared, shared_gradient = loss_and_gradient(model, completion_states, batch, weights)
    nats, share = TOLERANCE[dtype]
    assert (plain - shared).abs().max() < nats
    assert relative(shared_gradient.float(), plain_gradient.float()) < share
    rolled = [*batch[:2], batch[2].roll(1, 1), batch[3]]  # the twin: a token too late
    other, other_gradient = loss_and_gradient(model, completion_states, rolled, weights)
    assert (plain - other).abs().max() > nats
    assert relative(other_gradient.float(), plain_gradient.float()) > share


@on_each_device
@in_each_type
@pytest.mark.parametrize("arm", ARMS)
def test_the_ratio_is_one_right_after_sampling(arm, device, dtype, tmp_path):
    trainer = make(arm, tmp_path, model=moved_to(device, dtype), use_cpu=device == "cpu")
    rollout = rollout_of(trainer)
    mask = rollout["completion_mask"]
    nats = TOLERANCE[dtype][0]

    def largest_log_ratio():
        scored = trainer._rollout_log_probs(trainer.model, rollout)
        return ((scored - rollout["sampling_per_token_logps"]) * mask).abs().max()

    assert largest_log_ratio() < nats
    trainer.temperature = 0.5  # the twin: scored at another temperature
    assert largest_log_ratio() > nats


@on_each_device
def test_a_lora_policy_and_its_critic_share_what_is_frozen(device, tmp_path):
    model = get_peft_model(policy()[0].to(device), lora_config(PolicySettings(lora_rank=4)))
    trainer = make("ppo", tmp_path, model=model, reward=length_reward, use_cpu=device == "cpu",
                   kl_coef=0.02)
    base = {p.data_ptr() for p in trainer.model.parameters() if not p.requires_grad}
    frozen = [p for p in trainer.critic.parameters() if not p.requires_grad]
    assert frozen and all(p.data_ptr() in base for p in frozen)
    before = [flat(trainer.model), flat(trainer.critic)]
    trainer.train()
    assert not torch.equal(before[0], flat(trainer.model))
    assert not torch.equal(before[1], flat(trainer.critic))
