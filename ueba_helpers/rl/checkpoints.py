"""Checkpoints that are whole or passed over: a seal of hashes, and the critic's weights.

In: the folder Transformers' Trainer has just written. Out: the same folder with `sealed.json`, and
for PPO `critic.safetensors`. A folder without a seal, or with a file that does not match it, is no
checkpoint to resume from.
"""

import json
import warnings
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ueba_helpers.data.files import atomic_path, sha256_of, write_json
from ueba_helpers.errors import UserError

CRITIC_FILE = "critic.safetensors"
SEAL_FILE = "sealed.json"


def seal(folder: Path | str) -> None:
    """Write the hashes of a checkpoint's files, last: without them it counts as half-written."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL_FILE)
    write_json(folder / SEAL_FILE,
               {path.relative_to(folder).as_posix(): sha256_of(path) for path in files})


def is_whole(folder: Path | str) -> bool:
    """Return whether every file of a sealed checkpoint is there, byte for byte."""
    folder = Path(folder)
    try:
        expected = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        return bool(expected) and all(
            sha256_of(folder / name) == digest for name, digest in expected.items())
    except (OSError, ValueError):
        return False


def latest_checkpoint(output_dir: Path | str) -> Path | None:
    """Return the newest whole checkpoint; damaged ones are named in a warning and passed over."""
    steps = {int(folder.name.rpartition("-")[2]): folder
             for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
             if folder.name.rpartition("-")[2].isdigit()}
    for step in sorted(steps, reverse=True):
        if is_whole(steps[step]):
            return steps[step]
        warnings.warn(f"checkpoint {steps[step]} is damaged or half-written: it is passed over",
                      stacklevel=2)
    return None


def save_critic(critic: nn.Module, folder: Path | str, **facts) -> None:
    """Write the critic's weights into a folder, as safetensors; frozen ones are the policy's.

    `facts`, plain values, go into the file's header; `load_critic` returns them.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    frozen = _frozen(critic)
    state = {name: tensor.detach().contiguous().cpu()
             for name, tensor in critic.state_dict().items() if name not in frozen}
    with atomic_path(Path(folder) / CRITIC_FILE) as temporary:
        save_file(state, temporary, metadata={"facts": json.dumps(facts)})


def load_critic(critic: nn.Module, folder: Path | str) -> dict:
    """Read the critic's weights from a folder; return the facts saved with them."""
    path = Path(folder) / CRITIC_FILE
    if not path.exists():
        raise UserError(f"{path} is missing: there is no critic in this folder.")
    missing, unexpected = critic.load_state_dict(load_file(path), strict=False)
    if unexpected or set(missing) - _frozen(critic):
        raise UserError(f"{path} holds the weights of another critic: "
                        f"{sorted({*unexpected, *missing} - _frozen(critic))[0]} does not fit.")
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("facts", "{}"))


def is_shared_critic(folder: Path | str) -> bool:
    """Return whether the critic in a folder is a head alone, on the policy's hidden states."""
    path = Path(folder) / CRITIC_FILE
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as file:
        return not any(name.startswith("backbone.") for name in file.keys())  # noqa: SIM118


def _frozen(critic: nn.Module) -> set[str]:
    return {name for name, parameter in critic.named_parameters() if not parameter.requires_grad}
