"""Where in a verdict a baseline foresees the reward: fresh rollouts, values on them, and places.

In: a policy with prompt rows, or a critic. Out: a `Sample` of rewarded completions, a critic's
values `(B, T)` on it, and the explained variance at four places of the verdict (NaN where fewer
than two completions come so far). `B` counts completions, those of one prompt stand together; `T`
counts their tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ueba_helpers.data.seeding import generator
from ueba_helpers.rl.advantages import explained_variance
from ueba_helpers.rl.policies import Critic
from ueba_helpers.rl.rollouts import end_tokens, generate, pad_left, pad_right, tokenize_prompts
from ueba_helpers.task.rewards import TRAINABLE

PLACES = ("first token", "evidence written", "before the risk", "verdict written")
_AFTER_EVIDENCE, _BEFORE_RISK = '"features"', '"risk": "'


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


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], *,
           group_size: int, seed: int, max_new_tokens: int, rewards: str = "ueba",
           temperature: float = 1.0) -> Sample:
    """Return `group_size` completions of each prompt row, drawn and rewarded as in training.

    `rewards` names what a policy may be trained on (`rewards.TRAINABLE`); each reward is exactly
    the weighted sum of its terms.
    """
    repeated = [row for row in rows for _ in range(group_size)]
    prompts = [ids for ids in tokenize_prompts(tokenizer, [row["prompt"] for row in rows])
               for _ in range(group_size)]
    draws = generator(seed, "credit rollouts").random((len(prompts), max_new_tokens))
    done = generate(model, prompts, max_new_tokens=max_new_tokens, uniforms=draws,
                    temperature=temperature,
                    eos_token_ids=end_tokens(model, tokenizer), pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(done.ids, skip_special_tokens=True)
    columns = {name: [row[name] for row in repeated] for name in rows[0]}
    terms = [[weight * value for value in term(texts, **columns)]
             for term, weight in TRAINABLE[rewards]]
    return Sample(
        rows=repeated, prompts=prompts, ids=done.ids,
        pieces=[[tokenizer.decode([token]) for token in ids] for ids in done.ids],
        rewards=torch.tensor([math.fsum(row) for row in zip(*terms, strict=True)],
                             dtype=torch.float64),
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
        found[part, :ids.size(1)] = critic(*left, ids, mask).double().cpu()
    return found * drawn.mask


def verdict_places(pieces: Sequence[str]) -> tuple[int, ...] | None:
    """Return the token that each of `PLACES` stands before, given the text of the tokens.

    The places are the first token, the end of the evidence, the risk's value and the last token.
    None for a completion without features after its evidence or without a risk after those.

    >>> verdict_places(['{"evidence": [', 'e1', '], ', '"features": [], ', '"risk": "', 'normal',
    ...                 '"}', '<end>'])
    (0, 3, 5, 7)
    >>> verdict_places(["normal"]) is None
    True
    """
    text = "".join(pieces)
    features = text.find(_AFTER_EVIDENCE)
    risk = text.find(_BEFORE_RISK, max(0, features))
    if features < 0 or risk < 0 or len(text) == risk + len(_BEFORE_RISK):
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
