"""Language models to train: a tiny one made on the spot, a hub or local checkpoint, Unsloth.

In: `PolicySettings`, and for the tiny model the texts its tokenizer is fitted on. Out: an ordinary
Transformers checkpoint folder, loaded by the same code whatever its origin; LoRA on request; a
critic with the policy's backbone. Refused: a checkpoint that does not exist, a backend that this
machine cannot run, and remote code.
"""

import copy
import math
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from ueba_helpers.data.files import atomic_path
from ueba_helpers.data.seeding import derived_seed
from ueba_helpers.errors import UserError
from ueba_helpers.rl.prefix import backbone_of, completion_states, plain_states
from ueba_helpers.rl.settings import TINY_POSITIONS, PolicySettings

# One bar per checkpoint says nothing about a study, and fills notebooks and logs.
disable_progress_bar()

REFERENCE_ADAPTER = "ref"  # TRL's name for it

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Qwen's turn markup without its tool branches: role, newline, content, end of turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Words may hold digits and underscores, so that item ids (e12), hosts and feature names can
# become single tokens; numbers stay in pairs, so that an hour is one token, with its space.
_WORDS = r" ?\p{L}[\p{L}\p{N}_]*| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"


@contextmanager
def seeded_torch(seed: int):
    """Run a block under its own torch seed and leave the global random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed % 2**63)
        yield


def make_tiny(folder: Path | str, texts: Iterable[str], settings: PolicySettings, *,
              seed: int) -> Path:
    """Write an untrained Qwen3-shaped checkpoint with its own byte-level BPE into `folder`.

    `texts` are training users' prompts and verdicts: the tokenizer sees nothing else. An
    existing checkpoint is kept.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    tokenizer = _tiny_tokenizer(texts, settings.vocab_size)
    heads = max(2, settings.hidden_size // 32)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size, num_hidden_layers=settings.layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), head_dim=32,
        max_position_embeddings=TINY_POSITIONS, tie_word_embeddings=True, attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, use_cache=True,
    )
    with seeded_torch(derived_seed(seed, "tiny policy weights")):
        model = Qwen3ForCausalLM(config)
    with atomic_path(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
    return folder


def _tiny_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, TURN_START, TURN_END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*texts, "system\nuser\nassistant\n"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=TURN_END,
                                   additional_special_tokens=[TURN_START], padding_side="left")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def load_tokenizer(checkpoint: Path | str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint, padding on the left as generation needs it."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(_existing(checkpoint), padding_side="left")
    except OSError as error:
        raise UserError(_not_found(checkpoint)) from error
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(f"{checkpoint}: the tokenizer has no padding token of its own; set "
                        "pad_token in its tokenizer_config.json to a token that is not the "
                        "end-of-turn token.")
    return tokenizer


def load_policy(checkpoint: Path | str, settings: PolicySettings) -> PreTrainedModel:
    """Return the causal language model of a checkpoint, with LoRA where the settings ask for it.

    `checkpoint` is a folder or a hub name. Only safetensors are read.
    """
    if settings.backend == "unsloth":
        return _load_unsloth(checkpoint, settings)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            _existing(checkpoint), dtype=getattr(torch, settings.dtype), use_safetensors=True,
            device_map={"": 0} if torch.cuda.is_available() else None)
    except OSError as error:
        raise UserError(_not_found(checkpoint)) from error
    if settings.lora_rank:
        model = get_peft_model(model, lora_config(settings))
    return model


def lora_config(settings: PolicySettings) -> LoraConfig:
    """Return adapters on all linear layers, alpha twice the rank, without dropout."""
    return LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank,
                      target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")


def _not_found(checkpoint: Path | str) -> str:
    return (f"{checkpoint} is neither a folder with a safetensors checkpoint nor a hub model that "
            "can be loaded from here: check the name, and the network if it is a hub name.")


def _existing(checkpoint: Path | str) -> str:
    path = Path(checkpoint)
    looks_local = path.is_absolute() or str(checkpoint).startswith(".") or path.exists()
    if looks_local and not (path / "config.json").exists():
        raise UserError(f"{path}: no config.json there; give a folder with a Transformers "
                        "checkpoint or a hub name such as Qwen/Qwen3-4B-Instruct-2507.")
    return str(checkpoint)


def _load_unsloth(checkpoint: Path | str, settings: PolicySettings) -> PreTrainedModel:
    if not torch.cuda.is_available():
        raise UserError("backend='unsloth' needs a CUDA device and none is visible: use profile "
                        "'laptop', or backend='transformers'.")
    # TRL's classes are imported first: Unsloth replaces those imported after it.
    from trl import GRPOTrainer
    from unsloth import FastLanguageModel

    if GRPOTrainer.__module__ != "trl.trainer.grpo_trainer":
        raise UserError("unsloth was imported before TRL and replaced its GRPOTrainer: start a "
                        "fresh process and import ueba_helpers.rl first.")
    length = settings.max_prompt_tokens + settings.max_completion_tokens
    model, _ = FastLanguageModel.from_pretrained(
        model_name=_existing(checkpoint), max_seq_length=length, load_in_4bit=False,
        dtype=getattr(torch, settings.dtype))
    if settings.lora_rank:
        config = lora_config(settings)
        model = FastLanguageModel.get_peft_model(
            model, r=config.r, lora_alpha=config.lora_alpha, lora_dropout=0.0,
            use_gradient_checkpointing=False)
    for module in model.modules():  # or its training forward drops the padding mask
        module._unsloth_keep_padding_mask = True
    return model


class Critic(nn.Module):
    """A backbone and a scalar head: the value of the state before each completion token.

    The head is float32 and starts at zero, so that the first values are zero whatever the
    backbone (details in Huang et al. 2024, arXiv:2403.17031).
    """

    def __init__(self, backbone: PreTrainedModel):
        super().__init__()
        self.backbone = backbone
        self.head = value_head(backbone.config.get_text_config().hidden_size)
        self.head.to(next(backbone.parameters()).device)
        self.value_range: tuple[float, float] | None = None  # of one that was trained on logits

    def forward(self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor,
                completion_mask: Tensor, *, shared_prefix: bool = True) -> Tensor:
        """Return values `(B, T)`; entry t belongs to the state before token t."""
        states_of = completion_states if shared_prefix else plain_states
        states = states_of(self.backbone, prompt_ids, prompt_mask, completion_ids,
                           completion_mask)
        return values_of(self.head, states)


class _Float32Linear(nn.Linear):
    """A linear map that stays float32 where autocast lowers every other one."""

    def forward(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return super().forward(states.float())


def value_head(hidden_size: int) -> nn.Linear:
    """Return a float32 linear map from a hidden state to its value, zero at the start."""
    head = _Float32Linear(hidden_size, 1, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def values_of(head: nn.Module, states: Tensor) -> Tensor:
    """Return `(B, T)` float32 values of `(B, T, H)` states."""
    return head(states).squeeze(-1)


def values_of_logits(logits: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Return the values that logits stand for: where in the range of returns each one lies.

    >>> values_of_logits(torch.zeros(1), (-1.0, 3.0))
    tensor([1.])
    """
    low, high = value_range
    return low + (high - low) * logits.sigmoid()


def add_reference_adapter(policy: PeftModel) -> None:
    """Keep the adapter a policy arrives with as its frozen reference, beside the trained one."""
    active = policy.active_adapter
    if REFERENCE_ADAPTER not in policy.peft_config:
        policy.add_adapter(REFERENCE_ADAPTER, policy.peft_config[active])
    for name, parameter in policy.named_parameters():
        if f".{active}." in name:
            kept = policy.get_parameter(name.replace(f".{active}.", f".{REFERENCE_ADAPTER}."))
            kept.data.copy_(parameter.data)
            kept.requires_grad_(False)


def make_critic(policy: PreTrainedModel) -> Critic:
    """Return a critic whose backbone starts as a copy of the policy's.

    All of it is trainable, or, where the policy carries adapters, its own copy of them over the
    same frozen weights: a critic of billions of weights then costs an adapter and a head.
    """
    source, adapted = backbone_of(policy), isinstance(policy, PeftModel)
    frozen = {id(p): p for p in source.parameters() if adapted and not p.requires_grad}
    backbone = copy.deepcopy(source, frozen)
    for module in backbone.modules():  # the critic reads no reference
        if isinstance(module, BaseTunerLayer):
            module.delete_adapter(REFERENCE_ADAPTER)  # nothing where there is none
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(not adapted or "lora_" in name)
    return Critic(backbone)


def parameter_count(model: nn.Module, *, trainable: bool = False) -> int:
    """Return the number of parameters, or of those that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes the tensors hold; a storage that several share is counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def perplexity(mean_negative_log_prob: float) -> float:
    """Return exp of a mean negative log-probability in nats, without overflow.

    >>> perplexity(0.0)
    1.0
    """
    return math.exp(min(mean_negative_log_prob, 700.0))
