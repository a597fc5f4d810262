"""The shared prefix gives the log-probabilities and gradients of the plain forward."""

import pytest
import torch
from peft import get_peft_model

from tests.tiny import policy
from ueba_helpers.rl.policies import Critic, lora_config
from ueba_helpers.rl.prefix import (
    backbone_of,
    completion_states,
    group_prompts,
    plain_states,
    shareable,
    token_log_probs,
)
from ueba_helpers.rl.rollouts import pad_left, pad_right
from ueba_helpers.rl.settings import PolicySettings


def ragged_batch(groups=3, size=4, vocabulary=250, seed=0):
    """Return left-padded prompts repeated `size` times and right-padded ragged completions."""
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (groups,), generator=draws)
    prompts = [torch.randint(3, vocabulary, (int(n),), generator=draws).tolist() for n in lengths]
    rows = [p for p in prompts for _ in range(size)]
    lengths = torch.randint(1, 9, (len(rows),), generator=draws)
    completions = [torch.randint(3, vocabulary, (int(n),), generator=draws).tolist()
                   for n in lengths]
    return *pad_left(rows, 0), *pad_right(completions, 0)


def loss_and_gradient(model, states_of, batch, weights):
    model.zero_grad()
    states = states_of(backbone_of(model), *batch)
    log_probs, _ = token_log_probs(states, model.get_output_embeddings(), batch[2], batch[3])
    (log_probs * weights).sum().backward()
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                          for p in model.parameters()])
    return log_probs.detach(), gradient


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("groups, size", [(3, 4), (5, 1), (1, 6)])
@pytest.mark.parametrize("lora", [False, True])
def test_log_probs_and_gradients_equal_the_plain_forward(groups, size, lora):
    model, _ = policy()
    if lora:
        model = get_peft_model(model, lora_config(PolicySettings(lora_rank=4)))
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide an adapter left out
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    batch = ragged_batch(groups, size)
    weights = torch.randn(batch[2].shape, generator=torch.Generator().manual_seed(2))
    plain, plain_gradient = loss_and_gradient(model, plain_states, batch, weights)
    shared, shared_gradient = loss_and_gradient(model, completion_states, batch, weights)
    assert (plain - shared).abs().max() < 1e-5
    assert relative(shared_gradient, plain_gradient) < 1e-5


def shift_positions(monkeypatch, backbone, *, prompt):
    """Add one to the positions of the continuation, and to the prompt's where `prompt`."""
    forward = backbone.forward

    def shifted(*, position_ids, past_key_values, **inputs):
        if prompt or past_key_values.get_seq_length():
            position_ids = position_ids + 1
        return forward(position_ids=position_ids, past_key_values=past_key_values, **inputs)

    monkeypatch.setattr(backbone, "forward", shifted)


@pytest.mark.parametrize("flaw", ["mask dropped", "tokens rolled", "positions shifted",
                                  "gradient cut"])
def test_the_comparison_rejects_broken_prefixes(flaw, monkeypatch):
    model, _ = policy()
    batch = ragged_batch()
    weights = torch.randn(batch[2].shape, generator=torch.Generator().manual_seed(2))

    def broken(backbone, prompt_ids, prompt_mask, completion_ids, completion_mask):
        if flaw == "mask dropped":
            prompt_mask = torch.ones_like(prompt_mask)
        if flaw == "gradient cut":
            with torch.no_grad():
                states = completion_states(backbone, prompt_ids, prompt_mask, completion_ids,
                                           completion_mask)
            return states.requires_grad_()
        if flaw == "tokens rolled":
            completion_ids = completion_ids.roll(1, 1)
        return completion_states(backbone, prompt_ids, prompt_mask, completion_ids,
                                 completion_mask)

    plain, plain_gradient = loss_and_gradient(model, plain_states, batch, weights)
    if flaw == "positions shifted":
        shift_positions(monkeypatch, backbone_of(model), prompt=False)
    other, other_gradient = loss_and_gradient(model, broken, batch, weights)
    if flaw == "gradient cut":
        assert (plain - other).abs().max() < 1e-5
    else:
        assert (plain - other).abs().max() > 1e-4
    assert relative(other_gradient, plain_gradient) > 1e-3


def test_only_the_distance_of_prompt_and_continuation_counts(monkeypatch):
    """The other side of "positions shifted": a shift of the prompt as well changes nothing."""
    model, _ = policy()
    batch = ragged_batch()
    weights = torch.randn(batch[2].shape, generator=torch.Generator().manual_seed(2))
    plain, plain_gradient = loss_and_gradient(model, plain_states, batch, weights)
    shift_positions(monkeypatch, backbone_of(model), prompt=True)
    other, other_gradient = loss_and_gradient(model, completion_states, batch, weights)
    assert (plain - other).abs().max() < 1e-5
    assert relative(other_gradient, plain_gradient) < 1e-5


def test_padding_width_changes_nothing():
    model, _ = policy()
    prompt_ids, prompt_mask, ids, mask = ragged_batch()
    pad = torch.nn.functional.pad
    wide = (pad(prompt_ids, (5, 0)), pad(prompt_mask, (5, 0)), pad(ids, (0, 3)), pad(mask, (0, 3)))
    narrow = completion_states(backbone_of(model), prompt_ids, prompt_mask, ids, mask)
    padded = completion_states(backbone_of(model), *wide)[:, : ids.size(1)]
    inside = mask.bool()
    assert (narrow[inside] - padded[inside]).abs().max() < 1e-5


def test_the_critic_values_are_those_of_the_plain_forward():
    model, _ = policy()
    critic = Critic(backbone_of(model))
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    batch = ragged_batch()
    shared, plain = critic(*batch), critic(*batch, shared_prefix=False)
    assert ((shared - plain) * batch[3]).abs().max() < 1e-5


def test_each_distinct_prompt_is_run_once():
    prompt_ids, prompt_mask, _, _ = ragged_batch(groups=3, size=4)
    groups = group_prompts(prompt_ids, prompt_mask)
    assert groups.ids.size(0) == 3
    assert groups.index.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_gradient_checkpointing_takes_the_plain_path():
    model, _ = policy()
    assert shareable(model) is None
    model.gradient_checkpointing_enable()
    model.train()
    assert "checkpointing" in shareable(model)


def test_entropy_of_a_uniform_distribution_is_the_log_of_the_vocabulary():
    head = torch.nn.Linear(4, 10, bias=False)
    torch.nn.init.zeros_(head.weight)
    ids, mask = torch.tensor([[1, 2, 0]]), torch.tensor([[1, 1, 0]])
    log_probs, entropy = token_log_probs(torch.randn(1, 3, 4), head, ids, mask, entropy=True)
    expected = torch.log(torch.tensor(10.0))
    assert torch.allclose(entropy, torch.tensor([[expected, expected, 0.0]]), atol=1e-6)
    assert torch.allclose(log_probs, torch.tensor([[-expected, -expected, 0.0]]), atol=1e-6)




@pytest.mark.parametrize("name, value", [
    ("final_logit_softcapping", 30.0), ("logits_scaling", 8.0), ("logit_scale", 0.0625)])
def test_a_factor_or_cap_behind_the_head_is_not_shared(name, value):
    model, _ = policy()
    setattr(model.config, name, value)
    assert name in shareable(model) and name in shareable(model, gradients=False)
    setattr(model.config, name, 1.0)
    assert shareable(model) is None


def test_the_logits_of_granite_are_not_the_heads():
    from transformers import GraniteConfig, GraniteForCausalLM

    model = GraniteForCausalLM(GraniteConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, logits_scaling=8.0, pad_token_id=0)).eval()
    ids = torch.arange(3, 9).unsqueeze(0)
    with torch.no_grad():
        head = model.get_output_embeddings()(backbone_of(model)(ids).last_hidden_state)
        assert (model(ids).logits - head).abs().max() > 1e-2
    assert "logits_scaling" in shareable(model)


def test_a_sliding_window_is_not_shared_however_the_config_says_it():
    from transformers import MistralConfig, MistralForCausalLM

    def mistral(window):
        return MistralForCausalLM(MistralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, sliding_window=window, pad_token_id=0))

    assert "sliding window" in shareable(mistral(4), gradients=False)
    assert shareable(mistral(None)) is None
    model, _ = policy()
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert "sliding window" in shareable(model)


def test_a_learned_prompt_is_not_shared():
    from peft import PromptTuningConfig

    model = get_peft_model(policy()[0], PromptTuningConfig(task_type="CAUSAL_LM",
                                                           num_virtual_tokens=2))
    assert "learned prompt" in shareable(model)
    adapted = get_peft_model(policy()[0], lora_config(PolicySettings(lora_rank=4)))
    assert shareable(adapted) is None
