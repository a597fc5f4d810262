"""The work of every RL measurement: a random Qwen3, fixed prompts, completions of one length.

In: a `Workload`. Out: a checkpoint folder, tokenizer, prompts and reward, and the timing of steps.
Needs torch, transformers and datasets only, so that other versions of TRL can be measured too.

Completions have one length by construction: the end-of-turn id lies one above the model's
vocabulary, so no sampler can draw it.
"""

import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

SHAPES = {  # hidden, layers, MLP, heads, key-value heads, head size, vocabulary
    "tiny": (128, 4, 384, 4, 2, 32, 2048),
    "small": (512, 7, 1536, 16, 8, 32, 4096),
    "0.6B": (1024, 28, 3072, 16, 8, 128, 151936),
    "1.7B": (2048, 28, 6144, 16, 8, 128, 151936),
}
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One measurement: what is run, on what, how often."""

    subject: str
    model: str = "tiny"
    prompt_tokens: int = 200
    prompts: int = 8
    group: int = 8
    completion_tokens: int = 64
    micro_batch: int = 8  # completions per forward and backward
    steps: int = 3  # measured, after one that is not
    seed: int = 0
    kl_coef: float = 0.04
    lora_rank: int = 0
    seconds: float = 600.0  # no further step is begun after this many

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def unique_tokens(self) -> int:
        """Tokens of a step, each prompt counted once."""
        return self.prompts * self.prompt_tokens + self.rows * self.completion_tokens

    def common_settings(self, folder: Path) -> dict:
        """Return the training arguments that all trainers share."""
        return {
            "output_dir": str(folder), "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": self.rows // self.micro_batch, "seed": self.seed,
            "learning_rate": 1e-6, "lr_scheduler_type": "constant", "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": CUDA,
            "gradient_checkpointing": False, "use_cpu": not CUDA, "dataloader_pin_memory": False,
            "temperature": 1.0,
        }

    def grpo_settings(self, folder: Path) -> dict:
        """Return what stock and our trainers share over GRPOConfig."""
        return self.common_settings(folder) | {
            "max_steps": self.steps + 1, "num_generations": self.group,
            "max_completion_length": self.completion_tokens, "loss_type": "dapo",
            "epsilon": 0.2, "epsilon_high": 0.28,
        }


def checkpoint(work: Workload, folder: Path) -> tuple[Path, int]:
    """Write a model with random weights; return its folder and number of parameters."""
    hidden, layers, mlp, heads, kv_heads, head, vocabulary = SHAPES[work.model]
    torch.manual_seed(work.seed)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers,
        intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head, tie_word_embeddings=True, max_position_embeddings=4096, pad_token_id=0,
        eos_token_id=vocabulary, bos_token_id=None)
    with torch.device(DEVICE):
        model = Qwen3ForCausalLM(config).to(DTYPE)
    model.save_pretrained(folder)
    return folder, sum(p.numel() for p in model.parameters())


def policy(folder: Path, work: Workload) -> torch.nn.Module:
    """Load the model, with adapters where the workload asks for them."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=DTYPE).to(DEVICE)
    if work.lora_rank:
        from peft import get_peft_model

        model = get_peft_model(model, adapters(work))
    return model


def adapters(work: Workload):
    """Return adapters on all linear layers, alpha twice the rank."""
    from peft import LoraConfig

    return LoraConfig(r=work.lora_rank, lora_alpha=2 * work.lora_rank, lora_dropout=0.0,
                      target_modules="all-linear", task_type="CAUSAL_LM")


def tokenizer(work: Workload) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one word per id; the end-of-turn id is out of the model's reach."""
    vocabulary = SHAPES[work.model][-1]
    words = {f"w{i}": i for i in range(1, vocabulary)} | {"<pad>": 0, "<eos>": vocabulary}
    fast = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>",
                                   padding_side="left")


def prompt_ids(work: Workload) -> list[list[int]]:
    """Return distinct prompts of the wanted length."""
    draws = torch.Generator().manual_seed(work.seed)
    return torch.randint(1, SHAPES[work.model][-1], (work.prompts, work.prompt_tokens),
                         generator=draws).tolist()


def prompt_dataset(work: Workload) -> Dataset:
    """Return the prompts as plain text."""
    return Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in row)}
                              for row in prompt_ids(work)])


def spread_reward(completions, **columns) -> list[float]:
    """A reward that costs nothing and differs between completions."""
    return [len(completion) % 7 / 6 for completion in completions]


class Enough(Exception):
    """Raised to leave a training loop whose measured steps are done."""


class StepClock(TrainerCallback):
    """Keep the time between the ends of optimiser steps; the first step is not measured."""

    def __init__(self, work: Workload):
        self.work, self.ends, self.cpu_ends = work, [], []
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        wait()
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())
        measured = len(self.ends) - 1
        late = self.ends[-1] - self.started > self.work.seconds
        if measured >= self.work.steps or (measured >= 1 and late):
            raise Enough

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]

    @property
    def cpu_seconds(self) -> list[float]:
        """Processor time of the steps over all threads: hardly moved by other programs."""
        return [b - a for a, b in zip(self.cpu_ends, self.cpu_ends[1:], strict=False)]


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def stopwatch(function, durations: list[float]):
    """Return the function with its wall time appended to `durations` at each call."""
    def timed(*args, **kwargs):
        wait()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        wait()
        durations.append(time.perf_counter() - start)
        return result
    return timed


def time_parts(trainer) -> dict[str, list[float]]:
    """Time a GRPO-like trainer's generation and whole rollout."""
    parts = {"generation": [], "rollout": []}
    for part, method in (("generation", "_generate_single_turn"),
                         ("rollout", "_generate_and_score_completions")):
        setattr(trainer, method, stopwatch(getattr(trainer, method), parts[part]))
    return parts


def measure(trainer, work: Workload, parts: dict[str, list[float]]) -> dict:
    """Train until the clock has enough steps; return seconds and memory."""
    clock = StepClock(work)
    trainer.add_callback(clock)
    before = peak_bytes()
    clock.started = time.perf_counter()
    load = os.getloadavg()[0]
    with contextlib.suppress(Enough):
        trainer.train()
    return {
        "seconds": clock.seconds, "step": statistics.median(clock.seconds),
        "cpu_seconds": clock.cpu_seconds,
        **{part: statistics.median(values[1:]) for part, values in parts.items() if values[1:]},
        "peak_bytes": peak_bytes(), "peak_bytes_before_training": before,
        "load_before": load,
    }


def check_length(trainer, work: Workload) -> None:
    """Refuse a measurement whose completions were not all of the wanted length."""
    lengths = {row[key] for row in trainer.state.log_history for key in row
               if key in ("completions/min_length", "completions/max_length")}
    if lengths and lengths != {work.completion_tokens}:
        raise SystemExit(f"completions had {sorted(lengths)} tokens, "
                         f"wanted {work.completion_tokens}")


def peak_bytes() -> int:
    """Return the peak of GPU memory allocated, or of this process's resident memory."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss may start at the parent's peak
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def matmul_rate(seconds: float = 2.0) -> float:
    """Return the FLOP per second of square products, the best of many, in the training type."""
    size = 8192 if CUDA else 1024
    a, b = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    a @ b
    while time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def machine() -> dict:
    """Return what a reader needs to know of the machine; no names or paths."""
    facts = {
        "system": platform.system(), "architecture": platform.machine(),
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "device": DEVICE, "dtype": str(DTYPE)[6:],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines()
                 if line.startswith("model name")]
        facts["cpu"] = names[0] if names else platform.processor()
    if CUDA:
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
                  "driver": subprocess.run(
                      ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                      capture_output=True, text=True, check=False).stdout.split("\n")[0]}
    return facts


def report(work: Workload, parameters: int, result: dict) -> None:
    """Print one JSON line, which the parent reads."""
    print(json.dumps({**asdict(work), "parameters": parameters,
                      "unique_tokens": work.unique_tokens, **result}), flush=True)
