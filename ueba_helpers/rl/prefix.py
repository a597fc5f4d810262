"""The shared prefix: a prompt that G completions have in common is run once, with its gradients.

In: left-padded prompts `(B, P)` of which neighbouring rows may be equal, right-padded completions
`(B, T)`. Out: hidden states `(B, T, H)`; entry t is the state from which token t is drawn, so the
same tensor serves the policy's log-probabilities, the reference's and the critic's values.

Each distinct prompt passes through the backbone once; its keys and values are repeated for the
group and stay in the graph, so the backward pass too meets the prompt once. Results equal those
of the plain forward up to rounding (tests/test_prefix.py). What cannot hold a cache (gradient
checkpointing, multimodal inputs, custom attention masks) must take the plain path: `shareable`
says why.
"""

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class PromptGroups:
    """Distinct neighbouring prompts `(N, P)`, their mask, and the group of each row `(B,)`."""

    ids: Tensor
    mask: Tensor
    index: Tensor


def group_prompts(prompt_ids: Tensor, prompt_mask: Tensor) -> PromptGroups:
    """Fold equal neighbouring rows of left-padded prompts into one, trimming common padding.

    >>> g = group_prompts(torch.tensor([[0, 5], [0, 5], [6, 7]]),
    ...                   torch.tensor([[0, 1], [0, 1], [1, 1]]))
    >>> g.ids.tolist(), g.index.tolist()
    ([[0, 5], [6, 7]], [0, 0, 1])
    """
    used = prompt_mask.bool().any(0)
    start = int(used.long().argmax())
    prompt_ids, prompt_mask = prompt_ids[:, start:], prompt_mask[:, start:]
    same = torch.zeros(prompt_ids.size(0), dtype=torch.bool, device=prompt_ids.device)
    same[1:] = ((prompt_ids[1:] == prompt_ids[:-1]) & (prompt_mask[1:] == prompt_mask[:-1])).all(1)
    index = (~same).long().cumsum(0) - 1
    return PromptGroups(prompt_ids[~same], prompt_mask[~same], index)


def backbone_of(model: nn.Module) -> nn.Module:
    """Return the transformer below the language-model head, with adapters left in place."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner.base_model if isinstance(inner, PreTrainedModel) else inner


# What Transformers' models do to logits between the head and the softmax, by configuration field.
_BEHIND_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier",
                "logits_mup_width_multiplier", "logits_soft_cap", "output_logit_soft_cap",
                "output_multiplier")


def shareable(model: nn.Module, *, gradients: bool = True) -> str | None:
    """Return why the prefix of this model cannot be shared, or None where it can.

    Without `gradients` only what also stands against sampling and scoring counts.
    """
    backbone = backbone_of(model)
    if not isinstance(backbone, PreTrainedModel):
        return f"{type(backbone).__name__} is not a Transformers model"
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "a learned prompt is put before the words by the adapter's own forward"
    if backbone.is_gradient_checkpointing and backbone.training:
        return "gradient checkpointing keeps no cache"
    config = backbone.config.get_text_config()
    for name in _BEHIND_HEAD:
        if getattr(config, name, None) not in (None, 0, 1):
            return f"{name}={getattr(config, name)} changes logits behind the head"
    # Models older than `layer_types` say by `sliding_window` alone that all layers have one.
    layer_types = getattr(config, "layer_types", None) or [
        "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]
    if set(layer_types) != {"full_attention"}:
        return "a sliding window or a recurrent layer forgets part of the prompt"
    if gradients and ("unsloth" in type(backbone).__module__
                      or "unsloth" in backbone.forward.__module__):
        return "Unsloth's forward takes no cache with gradients"
    return None


def prefill(backbone: nn.Module, groups: PromptGroups) -> tuple[DynamicCache, Tensor]:
    """Run each of N distinct prompts once; return their cache and last states `(N, 1, H)`."""
    cache = DynamicCache(config=backbone.config)
    positions = (groups.mask.long().cumsum(1) - 1).clamp(min=0)
    output = backbone(input_ids=groups.ids, attention_mask=groups.mask, position_ids=positions,
                      past_key_values=cache, use_cache=True)
    if cache.get_seq_length() != groups.ids.size(1):
        raise RuntimeError(f"{type(backbone).__name__} filled no cache: take the plain path")
    return cache, output.last_hidden_state[:, -1:]


def completion_states(backbone: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor,
                      completion_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """Return `(B, T, H)` states: entry t has seen the prompt and the completion before token t."""
    groups = group_prompts(prompt_ids, prompt_mask)
    return continued_states(backbone, groups, *prefill(backbone, groups), completion_ids,
                            completion_mask)


def continued_states(backbone: nn.Module, groups: PromptGroups, cache: DynamicCache, last: Tensor,
                     completion_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """Return what `completion_states` does from prompts that `prefill` has run; uses `cache` up."""
    if not torch.equal(groups.index, torch.arange(groups.ids.size(0), device=last.device)):
        cache.batch_select_indices(groups.index)
        last = last[groups.index]
    steps = completion_ids.size(1) - 1
    if steps == 0:
        return last
    mask = torch.cat([groups.mask[groups.index], completion_mask[:, :steps]], 1)
    lengths = groups.mask.long().sum(1)[groups.index]
    positions = lengths.unsqueeze(1) + torch.arange(steps, device=lengths.device)
    output = backbone(input_ids=completion_ids[:, :steps], attention_mask=mask,
                      position_ids=positions, past_key_values=cache, use_cache=True)
    return torch.cat([last, output.last_hidden_state], 1)


def plain_states(backbone: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor,
                 completion_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """Return what `completion_states` returns, with every row's prompt run on its own."""
    ids = torch.cat([prompt_ids, completion_ids], 1)
    mask = torch.cat([prompt_mask, completion_mask], 1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    output = backbone(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.last_hidden_state[:, -completion_ids.size(1) - 1:-1]


def token_log_probs(states: Tensor, head: nn.Module, completion_ids: Tensor, mask: Tensor, *,
                    temperature: float = 1.0, entropy: bool = False,
                    entropy_gradient: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities `(B, T)` of the tokens and, if asked, entropies, in nats.

    Logits are computed for masked-in tokens only, divided by the temperature the tokens were
    sampled at, and normalised in float32. Outside the mask both are zero.
    """
    inside = mask.bool()
    logits = head(states[inside]).float() / temperature
    log_probs = logits.log_softmax(-1)
    targets = completion_ids[inside].unsqueeze(-1)
    chosen = log_probs.gather(-1, targets).squeeze(-1)
    spread = None
    if entropy:
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            per_token = -(log_probs.exp() * log_probs).sum(-1)
        spread = per_token.new_zeros(mask.shape).masked_scatter(inside, per_token)
    return chosen.new_zeros(mask.shape).masked_scatter(inside, chosen), spread
