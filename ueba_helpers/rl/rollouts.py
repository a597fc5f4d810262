"""Windows to completions to verdicts: the one road for training and evaluation.

In: a causal language model and prompts as token ids. Out: completions with the log-probabilities
they were sampled at, and the predictions table of a detector. Each prompt is prefilled and its
keys are stored once for all its completions; prompts whose completions have ended leave the batch.

Sampling inverts the cumulative distribution with one uniform number per (completion, token),
drawn beforehand: a completion depends on its own numbers and nothing else, neither on its
neighbours in the batch nor on how the batch is cut over devices. Top-k, top-p and repetition
penalties are left out on purpose: training scores the distribution that was sampled.
"""

import re
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from ueba_helpers.errors import UserError
from ueba_helpers.rl.prefix import (
    PromptGroups,
    backbone_of,
    continued_states,
    group_prompts,
    prefill,
    shareable,
)
from ueba_helpers.rl.prefix import token_log_probs as log_probs_of
from ueba_helpers.task.verdicts import RISKS, Verdict, parse_verdict

_ROOM = 16  # steps of decoding that a cache layer makes room for at a time


@dataclass(frozen=True)
class Completions:
    """Token ids without padding (an end-of-turn token included) and their log-probabilities."""

    ids: list[list[int]]
    log_probs: list[list[float]]


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu"
             ) -> tuple[Tensor, Tensor]:
    """Return ids and mask `(B, P)`, both long, padded on the left; masks come from lengths.

    >>> pad_left([[1], [2, 3]], 0)[0].tolist()
    [[0, 1], [2, 3]]
    """
    ids, mask = pad_right([row[::-1] for row in rows], pad_id, device)
    return ids.flip(1), mask.flip(1)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu"
              ) -> tuple[Tensor, Tensor]:
    """Return ids and mask `(B, T)`, both long, padded on the right; masks come from lengths.

    >>> pad_right([[1], [2, 3]], 0)[1].tolist()
    [[1, 0], [1, 1]]
    """
    width = max(1, max(len(row) for row in rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
             eos_token_ids: Sequence[int], pad_token_id: int, temperature: float = 1.0,
             uniforms: np.ndarray | None = None) -> Completions:
    """Complete each prompt (token ids); equal neighbours share one prefill and one cache row.

    With `uniforms` `(B, max_new_tokens)` in [0, 1) tokens are sampled at `temperature`; without
    it the most probable token is taken and log-probabilities are at temperature 1.
    """
    if uniforms is not None and uniforms.shape != (len(prompts), max_new_tokens):
        raise ValueError(f"uniforms must have shape {(len(prompts), max_new_tokens)}, got "
                         f"{uniforms.shape}")
    with _evaluating(model):
        begun = _begin(model, prompts, pad_token_id)
        return _decode(model, begun, max_new_tokens, eos_token_ids, temperature, uniforms)


@contextmanager
def _evaluating(model: PreTrainedModel):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class _Begun:
    """Prompts that have been run: their groups, keys and values by layer, and last states."""

    groups: PromptGroups
    keys_values: list[tuple[Tensor, Tensor]]
    last: Tensor

    def cache(self) -> DynamicCache:
        """Return a cache of its own: what is added to it leaves the prompts' keys as they are."""
        cache = DynamicCache()
        cache.layers = [_RoomyLayer() for _ in self.keys_values]
        for layer, (keys, values) in zip(cache.layers, self.keys_values, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return cache


class _RoomyLayer(DynamicLayer):
    """A cache layer with room for further tokens: `torch.cat` would copy all keys at each one."""

    def __init__(self):
        super().__init__()
        self._rooms: list[Tensor] | None = None

    def update(self, key_states, value_states, *args, **kwargs):
        """Write the new keys and values behind the old ones and return views of all."""
        used, new = self.keys.size(-2), key_states.size(-2)
        if self._rooms is None or self._rooms[0].size(-2) < used + new:
            old = self.keys, self.values
            self._rooms = [x.new_empty(*x.shape[:-2], used + _ROOM * new, x.size(-1)) for x in old]
            for room, kept in zip(self._rooms, old, strict=True):
                room[..., :used, :] = kept
        for room, added in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., used:used + new, :] = added
        self.keys, self.values = (room[..., :used + new, :] for room in self._rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of `indices`, in tensors of their own."""
        super().batch_select_indices(indices)
        self._rooms = None


def _begin(model, prompts, pad_token_id) -> _Begun:
    if reason := shareable(model, gradients=False):
        raise UserError(f"{type(model).__name__} cannot be sampled or scored with a shared prefix: "
                        f"{reason}. Use a model without it.")
    groups = group_prompts(*pad_left(prompts, pad_token_id, next(model.parameters()).device))
    cache, last = prefill(backbone_of(model), groups)
    return _Begun(groups, [(layer.keys, layer.values) for layer in cache.layers], last)


def _decode(model, begun: _Begun, max_new_tokens, eos_token_ids, temperature, uniforms):
    """Decode all completions of a prompt in one row `(N, W)`, W the largest group.

    The keys of a prompt are stored once. Each step adds W keys to a row, one per completion, and
    a mask lets completion w see the prompt and every W-th key from its own first one on.
    """
    backbone, head = backbone_of(model), model.get_output_embeddings()
    groups, cache, states = begun.groups, begun.cache(), begun.last
    device, total = groups.ids.device, groups.index.numel()
    eos_ids = torch.tensor(list(eos_token_ids), device=device)
    sizes = groups.index.bincount()
    width = int(sizes.max())
    slots = torch.arange(width, device=device)
    alive = slots < sizes.unsqueeze(1)
    first = (sizes.cumsum(0) - sizes).unsqueeze(1)
    rows = first + slots
    states = states.expand(-1, width, -1)
    positions = groups.mask.sum(1, keepdim=True).expand(-1, width)
    mask = groups.mask if width == 1 else _bias(groups.mask.bool(), model.dtype)[
        :, None, None].expand(-1, 1, width, -1)
    own = groups.mask.new_ones(1, 1) if width == 1 else _bias(
        slots == slots.unsqueeze(1), model.dtype)[None, None]
    draws = None if uniforms is None else torch.as_tensor(uniforms, device=device)
    ids: list[list[int]] = [[] for _ in range(total)]
    log_probs: list[list[float]] = [[] for _ in range(total)]
    for step in range(max_new_tokens):
        logits = head(states[alive]).float()
        scaled = (logits if draws is None else logits / temperature).log_softmax(-1)
        chosen = scaled.argmax(-1) if draws is None else _invert(scaled.exp(),
                                                                 draws[rows[alive], step])
        values = scaled.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        for row, token, value in zip(rows[alive].tolist(), chosen.tolist(), values.tolist(),
                                     strict=True):
            ids[row].append(token)
            log_probs[row].append(value)
        tokens = torch.zeros_like(rows).masked_scatter(alive, chosen)
        alive = alive.masked_scatter(alive, ~torch.isin(chosen, eos_ids))
        keep = alive.any(1)
        if step + 1 == max_new_tokens or not keep.any():
            break
        if not keep.all():
            cache.batch_select_indices(keep.nonzero().squeeze(-1))
            alive, rows, tokens, mask, positions = (
                x[keep] for x in (alive, rows, tokens, mask, positions))
        mask = torch.cat([mask, own.expand(*mask.shape[:-1], -1)], -1)
        states = backbone(input_ids=tokens, attention_mask=mask, position_ids=positions,
                          past_key_values=cache, use_cache=True).last_hidden_state
        positions = positions + 1
    return Completions(ids, log_probs)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what attention adds to its scores: zero where `seen`, else the least number."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
        ~seen, torch.finfo(dtype).min)


def _invert(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Return the first token whose cumulative probability exceeds the draw, `(B,)`."""
    cumulative = probabilities.double().cumsum(-1)
    target = draws.double() * cumulative[:, -1]  # the sum misses one by rounding
    tokens = torch.searchsorted(cumulative, target.unsqueeze(-1), right=True).squeeze(-1)
    return tokens.clamp(max=probabilities.size(-1) - 1)


def tokenize_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[dict]], *,
                     max_prompt_tokens: int | None = None) -> list[list[int]]:
    """Return the token ids of chat prompts, ready for the assistant's turn.

    A prompt over the limit raises: windows are cut to the budget before (prompts.fit_budget).
    """
    rows = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True,
                                         tokenize=True, return_dict=True)["input_ids"]
    for i, row in enumerate(rows):
        if max_prompt_tokens is not None and len(row) > max_prompt_tokens:
            raise UserError(f"prompt {i} has {len(row)} tokens, max_prompt_tokens is "
                            f"{max_prompt_tokens}: lower max_items or raise the limit.")
    return rows


@torch.no_grad()
def risk_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                prompts: Sequence[Sequence[int]], texts: Sequence[str], *,
                batch_size: int = 32) -> np.ndarray:
    """Return P(label) `(N, 3)` over the three whole risk labels, teacher-forced.

    Each text is cut behind the last `"risk": "`, whatever its spacing; the log-probabilities of
    the three labels with the closing quote are summed over their tokens and normalised. A text
    without a risk value gets NaN.
    """
    return np.concatenate([np.empty((0, len(RISKS))), *(
        _risk_scores(model, tokenizer,
                     _begin(model, prompts[start:start + batch_size], tokenizer.pad_token_id),
                     texts[start:start + batch_size])
        for start in range(0, len(texts), batch_size))])


def _risk_scores(model, tokenizer, begun: _Begun, texts: Sequence[str]) -> np.ndarray:
    """Return the scores of one text per prompt that `_begin` was given."""
    stems = [_before_risk(text) for text in texts]
    jobs = [i for i, stem in enumerate(stems) if stem is not None]
    scores = np.full((len(texts), len(RISKS)), np.nan)
    if not jobs:
        return scores
    answers, cuts = [], []
    for i in jobs:
        stem_ids = tokenizer(stems[i], add_special_tokens=False)["input_ids"]
        spelled = [tokenizer(stems[i] + risk + '"', add_special_tokens=False)["input_ids"]
                   for risk in RISKS]
        answers += spelled
        cuts += [min(_shared(stem_ids, whole) for whole in spelled)] * len(RISKS)
    groups, device = begun.groups, begun.last.device
    chosen = groups.index[torch.tensor(jobs, device=device)].repeat_interleave(len(RISKS))
    ids, mask = pad_right(answers, tokenizer.pad_token_id, device)
    states = continued_states(backbone_of(model), replace(groups, index=chosen), begun.cache(),
                              begun.last, ids, mask)
    values, _ = log_probs_of(states, model.get_output_embeddings(), ids, mask)
    counted = torch.arange(ids.size(1), device=device) >= torch.tensor(
        cuts, device=device).unsqueeze(1)
    totals = (values * counted).sum(1).view(-1, len(RISKS))
    scores[jobs] = totals.softmax(-1).cpu().double().numpy()
    return scores


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts begin with in common."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                min(len(a), len(b)))


_RISK_VALUE = re.compile(r'"risk"\s*:\s*"')


def _before_risk(text: str) -> str | None:
    found = list(_RISK_VALUE.finditer(text))
    return text[: found[-1].end()] if found else None


def _malicious_score(verdict: Verdict, probabilities: np.ndarray) -> float:
    if not verdict.valid:
        return -1.0
    if np.isnan(probabilities).any():  # a valid object that spells its key with escapes
        return float(verdict.risk == "malicious")
    return float(probabilities[RISKS.index("malicious")])


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the tokenizer's and those of the generation config."""
    configured = model.generation_config.eos_token_id
    more = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, *(token for token in more if token is not None)})


@torch.no_grad()
def predict(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], *,
            detector: str, seed: int, split: str, max_new_tokens: int,
            batch_size: int = 64) -> pd.DataFrame:
    """Return the predictions table of a policy, decoded greedily, one row per prompt.

    `rows` are those of `prompts.prompt_dataset`. The score is P(malicious) among the three labels
    after the policy's own evidence; an invalid verdict scores -1, below every valid one.
    `seconds` is the mean time per window.
    """
    ends = end_tokens(model, tokenizer)
    prompts = tokenize_prompts(tokenizer, [row["prompt"] for row in rows])
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    texts = [""] * len(rows)
    probabilities = np.full((len(rows), len(RISKS)), np.nan)
    started = time.perf_counter()
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            chunk = order[start:start + batch_size]
            begun = _begin(model, [prompts[i] for i in chunk], tokenizer.pad_token_id)
            done = _decode(model, begun, max_new_tokens, ends, 1.0, None)
            said = tokenizer.batch_decode(done.ids, skip_special_tokens=True)
            probabilities[chunk] = _risk_scores(model, tokenizer, begun, said)
            for i, text in zip(chunk, said, strict=True):
                texts[i] = text
    verdicts = [parse_verdict(text, row["evidence_ids"],
                              think=row.get("style") == "think")
                for text, row in zip(texts, rows, strict=True)]
    seconds = (time.perf_counter() - started) / max(1, len(rows))
    return pd.DataFrame({
        "detector": detector, "seed": seed,
        "window_id": [row["window_id"] for row in rows],
        "user": [row["user"] for row in rows],
        "day": list(pd.to_datetime([row["day"] for row in rows]).date),
        "split": split, "label": [row["label"] for row in rows],
        "risk": [v.risk if v.valid else "invalid" for v in verdicts],
        "score": [_malicious_score(v, p)
                  for v, p in zip(verdicts, probabilities, strict=True)],
        "features": [list(v.features) if v.valid else [] for v in verdicts],
        "evidence": [list(v.evidence) if v.valid else [] for v in verdicts],
        "valid": [v.valid for v in verdicts], "seconds": seconds,
        "problem": [v.problem or "" for v in verdicts], "completion": texts,
    })
