"""Where in a verdict a baseline foresees the reward: fresh rollouts, values on them, and places.

In: a policy with prompt rows, or a critic. Out: a `Sample` of rewarded completions, a critic's
values `(B, T)` on it, and the explained variance at four places of the verdict (NaN where fewer
than two completions come so far). What a state is truly worth is the mean reward of continuations
that the policy draws from it (`state_values`); `exact_credit` has them before and after the tokens
at the four places, and `advantage_errors` and `value_errors` hold estimators against it. `B`
counts completions, those of one prompt stand together; `T` counts their tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ueba_helpers.data.seeding import generator
from ueba_helpers.rl.advantages import explained_variance
from ueba_helpers.rl.policies import Critic, values_of_logits
from ueba_helpers.rl.rollouts import end_tokens, generate, pad_left, pad_right, tokenize_prompts
from ueba_helpers.task.rewards import TRAINABLE, ueba_reward

PLACES = ("first token", "evidence written", "before the risk", "verdict written")
_EVIDENCE, _AFTER_EVIDENCE, _BEFORE_RISK = '"evidence"', '"features"', '"risk": "'

Reward = Callable[..., list[float]]  # of completions and the prompt rows' columns


def trained_on(rewards: str) -> Reward:
    """Return the reward of what a policy may be trained on: the weighted sum of its terms.

    >>> trained_on("broken_any_mention")(["normal?"], label=["normal"], evidence_ids=[[]])
    [1.0]
    """
    def reward(completions, **columns):
        terms = [[weight * value for value in term(completions, **columns)]
                 for term, weight in TRAINABLE[rewards]]
        return [math.fsum(row) for row in zip(*terms, strict=True)]
    return reward


@dataclass(frozen=True)
class Sample:
    """Completions with their rewards `(B,)` in float64, and the mask `(B, T)` of their tokens."""

    rows: list[dict]
    prompts: list[list[int]]
    ids: list[list[int]]
    pieces: list[list[str]]
    rewards: Tensor
    mask: Tensor
    pad_token_id: int

    @property
    def places(self) -> Tensor:
        """The tokens `(B, 4)` that `PLACES` stand before; -1 where there is no risk."""
        found = [verdict_places(pieces) or (-1,) * len(PLACES) for pieces in self.pieces]
        return torch.tensor(found, dtype=torch.long).reshape(-1, len(PLACES))

    def part(self, indices: Sequence[int]) -> "Sample":
        """Return some of the completions, in that order; `T` stays as it is."""
        return replace(self, rows=[self.rows[i] for i in indices],
                       prompts=[self.prompts[i] for i in indices],
                       ids=[self.ids[i] for i in indices],
                       pieces=[self.pieces[i] for i in indices],
                       rewards=self.rewards[list(indices)], mask=self.mask[list(indices)])


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], *,
           group_size: int, seed: int, max_new_tokens: int, reward: Reward = ueba_reward,
           temperature: float = 1.0) -> Sample:
    """Return `group_size` completions of each prompt row, drawn at a temperature and rewarded."""
    repeated = [row for row in rows for _ in range(group_size)]
    prompts = [ids for ids in tokenize_prompts(tokenizer, [row["prompt"] for row in rows])
               for _ in range(group_size)]
    draws = generator(seed, "credit rollouts").random((len(prompts), max_new_tokens))
    done = generate(model, prompts, max_new_tokens=max_new_tokens, uniforms=draws,
                    temperature=temperature,
                    eos_token_ids=end_tokens(model, tokenizer), pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(done.ids, skip_special_tokens=True)
    columns = {name: [row[name] for row in repeated] for name in rows[0]}
    return Sample(
        rows=repeated, prompts=prompts, ids=done.ids,
        pieces=[[tokenizer.decode([token]) for token in ids] for ids in done.ids],
        rewards=torch.tensor(reward(texts, **columns), dtype=torch.float64),
        mask=pad_right(done.ids, tokenizer.pad_token_id)[1].double(),
        pad_token_id=tokenizer.pad_token_id)


@torch.no_grad()
def values(critic: Critic, drawn: Sample, *, batch_size: int = 64) -> Tensor:
    """Return the critic's values `(B, T)` in float64, zero behind a completion's end."""
    device = next(critic.parameters()).device
    found = torch.zeros_like(drawn.mask)
    for start in range(0, len(drawn.ids), batch_size):
        part = slice(start, start + batch_size)
        ids, mask = pad_right(drawn.ids[part], drawn.pad_token_id, device)
        left = pad_left(drawn.prompts[part], drawn.pad_token_id, device)
        said = critic(*left, ids, mask).double().cpu()
        found[part, :ids.size(1)] = said if critic.value_range is None else values_of_logits(
            said, critic.value_range)
    return found * drawn.mask


def verdict_places(pieces: Sequence[str]) -> tuple[int, ...] | None:
    """Return the token that each of `PLACES` stands before, given the text of the tokens.

    The places are the first token, the end of the evidence, the risk's value and the last token,
    whether the risk is said first or last. None for a completion without features after its
    evidence or without a risk.

    >>> verdict_places(['{"evidence": [', 'e1', '], ', '"features": [], ', '"risk": "', 'normal',
    ...                 '"}', '<end>'])
    (0, 3, 5, 7)
    >>> verdict_places(["normal"]) is None
    True
    """
    text = "".join(pieces)
    evidence, risk = text.find(_EVIDENCE), text.find(_BEFORE_RISK)
    features = text.find(_AFTER_EVIDENCE, evidence)
    if min(evidence, features, risk) < 0 or len(text) == risk + len(_BEFORE_RISK):
        return None
    ends = np.cumsum([len(piece) for piece in pieces])
    inner = np.searchsorted(ends, [features, risk + len(_BEFORE_RISK)], side="right")
    return (0, *map(int, inner), len(pieces) - 1)


def explained_by_place(baseline: Tensor, drawn: Sample) -> list[float]:
    """Return which share of the rewards' variance a baseline `(B, T)` explains at each place.

    Over the completions that come as far as a risk, NaN if they are fewer than two; see
    `advantages.explained_variance`.
    """
    places = drawn.places
    whole = places[:, -1] >= 0
    if whole.sum() < 2:
        return [math.nan] * len(PLACES)
    there = baseline[whole].gather(1, places[whole])
    rewards = drawn.rewards[whole]
    return [float(explained_variance(column, rewards, torch.ones_like(rewards)))
            for column in there.unbind(1)]


@dataclass(frozen=True)
class ExactCredit:
    """Values before and after the tokens at `PLACES`, all `(B, 4)`; NaN where there is no risk.

    `before_error` and `after_error` are the standard errors of these means of finite many draws.
    The exact advantage of a token is Q(s, a) - V(s) = `after` - `before`: what is to be expected
    once it is written, less what was.
    """

    places: Tensor
    before: Tensor
    before_error: Tensor
    after: Tensor
    after_error: Tensor


def exact_credit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, drawn: Sample, *,
                 draws: int, seed: int, max_new_tokens: int, reward: Reward = ueba_reward,
                 temperature: float = 1.0, batch_size: int = 32) -> ExactCredit:
    """Return the values around the tokens at `PLACES` by `draws` continuations of each prefix.

    Monte Carlo values of prefixes are those of VinePPO (Kazemnejad et al. 2024, arXiv:2410.01679,
    section 4), there of reasoning steps. For the arguments see `state_values`.
    """
    places = drawn.places
    behind = torch.where(places < 0, places, places + 1)
    values, errors = state_values(
        model, tokenizer, drawn, torch.cat([places, behind], 1), draws=draws, seed=seed,
        max_new_tokens=max_new_tokens, reward=reward, temperature=temperature,
        batch_size=batch_size)
    (before, after), (before_error, after_error) = values.chunk(2, 1), errors.chunk(2, 1)
    return ExactCredit(places, before, before_error, after, after_error)


@torch.no_grad()
def state_values(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, drawn: Sample,
                 tokens: Tensor, *, draws: int, seed: int, max_new_tokens: int,
                 reward: Reward = ueba_reward, temperature: float = 1.0, batch_size: int = 32
                 ) -> tuple[Tensor, Tensor]:
    """Return the values of the states before `tokens` `(B, K)` and their standard errors.

    The value of a state is the mean reward of `draws` (2 and more) continuations of the prefix,
    each cut where the rollout would have been, at `max_new_tokens` of the whole completion. After
    a completion's last token it is its reward, with error zero; a negative token gives NaN.
    `batch_size` prefixes are continued at a time and share nothing: it changes speed alone.
    """
    if draws < 2:
        raise ValueError(f"draws={draws} is not possible: a standard error needs 2 and more")
    lengths = torch.tensor([len(ids) for ids in drawn.ids]).unsqueeze(1)
    ended = tokens == lengths
    values = torch.where(ended, drawn.rewards.unsqueeze(1), torch.nan).double()
    errors = torch.where(ended, 0.0, torch.nan).double()
    open_states = ((tokens >= 0) & ~ended).T.nonzero().tolist()  # those of a column are alike long
    ends = end_tokens(model, tokenizer)
    for start in range(0, len(open_states), batch_size):
        chunk = [(row, column) for column, row in open_states[start:start + batch_size]]
        prefixes = [drawn.ids[row][:int(tokens[row, column])] for row, column in chunk]
        room = [max_new_tokens - len(prefix) for prefix in prefixes]
        uniforms = np.concatenate([
            generator(seed, f"continuations {column}", row).random((draws, max_new_tokens))
            for row, column in chunk])[:, :max(room)]
        # Equal neighbours are decoded together, so that one prefill serves all its draws.
        done = generate(model, [drawn.prompts[row] + prefix for (row, _), prefix in zip(
            chunk, prefixes, strict=True) for _ in range(draws)], max_new_tokens=max(room),
            uniforms=uniforms, temperature=temperature, eos_token_ids=ends,
            pad_token_id=drawn.pad_token_id)
        written = [prefixes[i // draws] + ids[:room[i // draws]]
                   for i, ids in enumerate(done.ids)]
        repeated = [drawn.rows[row] for row, _ in chunk for _ in range(draws)]
        rewards = torch.tensor(reward(
            tokenizer.batch_decode(written, skip_special_tokens=True),
            **{name: [row[name] for row in repeated] for name in repeated[0]}),
            dtype=torch.float64).view(-1, draws)
        rows, columns = torch.tensor(chunk).unbind(1)
        values[rows, columns] = rewards.mean(1)
        errors[rows, columns] = rewards.std(1) / draws ** 0.5
    return values, errors


def advantage_errors(estimates: Tensor, exact: ExactCredit) -> list[float]:
    """Return the mean square error of advantages `(B, T)` at each of `PLACES`.

    Against Q(s, a) - V(s), what `exact` itself is off by taken away; below zero by chance alone.
    NaN where no completion comes as far as a risk.
    """
    return _mean_square_error(estimates, exact.places, exact.after - exact.before,
                              exact.after_error ** 2 + exact.before_error ** 2)


def value_errors(baseline: Tensor, exact: ExactCredit) -> list[float]:
    """Return the mean square error of a baseline `(B, T)` at each of `PLACES`, against V(s)."""
    return _mean_square_error(baseline, exact.places, exact.before, exact.before_error ** 2)


def _mean_square_error(found: Tensor, places: Tensor, true: Tensor, noise: Tensor) -> list[float]:
    whole = places[:, -1] >= 0
    there = found[whole].gather(1, places[whole])
    return ((there - true[whole]) ** 2 - noise[whole]).mean(0).tolist()
