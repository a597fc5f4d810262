"""Policies small enough for tests: one with a byte-level tokenizer, one with eleven words."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ueba_helpers.rl.policies import (
    CHAT_TEMPLATE,
    PAD,
    TURN_END,
    TURN_START,
    load_policy,
    load_tokenizer,
    make_tiny,
    seeded_torch,
)
from ueba_helpers.rl.settings import PolicySettings

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SETTINGS = PolicySettings(vocab_size=512, hidden_size=32, layers=2)
TEXTS = ["red blue green yes no maybe answer the question about colours"] * 20
WORDS = ["system", "user", "assistant", "\n", "red", "blue", "yes", "no"]


@functools.cache
def checkpoint() -> Path:
    """Return the folder of a fresh tiny checkpoint, made once per test run."""
    return make_tiny(Path(tempfile.mkdtemp(prefix="tiny-policy-")) / "policy", TEXTS, SETTINGS,
                     seed=0)


def policy():
    """Return a new copy of the tiny model and its tokenizer."""
    return load_policy(checkpoint(), SETTINGS), load_tokenizer(checkpoint())


def probe_policy():
    """Return a model over eleven words: a right answer is found by chance once in eleven."""
    vocabulary = {word: i for i, word in enumerate([PAD, TURN_START, TURN_END, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\n"), behavior="isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=TURN_END,
                                   additional_special_tokens=[TURN_START], padding_side="left")
    fast.chat_template = CHAT_TEMPLATE
    config = Qwen3Config(vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64,
                         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         head_dim=16, pad_token_id=0, eos_token_id=2, bos_token_id=None,
                         tie_word_embeddings=False)
    with seeded_torch(0):
        model = Qwen3ForCausalLM(config).to(torch.float32)
    return model, fast
