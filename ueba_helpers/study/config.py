"""The experimental design as one table of profiles.

In: a profile's name, or the path of a TOML file that changes one. Out: a frozen `Profile` that
composes every setting of the study, from the size of the simulated organisation to the two
trainers. Refuses unknown names, impossible values, and PPO and GRPO settings whose controlled
variables differ. Free of torch; `check_device` alone imports it, and only for profiles that need a
GPU.
"""

import importlib
import importlib.util
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

from ueba_helpers.errors import UserError, require
from ueba_helpers.rl.settings import (
    GRPOSettings,
    PolicySettings,
    PPOSettings,
    RLSettings,
    SFTSettings,
)
from ueba_helpers.task.rewards import ASKED
from ueba_helpers.task.verdicts import STYLES

LEAST_INSIDERS = 4  # of one scenario: below it `splits.assign` leaves dev or test without any
ALERT_BUDGETS = (1.0, 2.0, 5.0)  # alerts per 1,000 account-days; the middle one stands for all


@dataclass(frozen=True, kw_only=True)
class SimulateSettings:
    """How large the simulated organisation is, and how hard it is to read.

    `insiders` counts the people of scenarios 1, 2 and 3. `web_rate` scales the web log, which is
    nine tenths of all rows. `hardness` at 0: only insiders visit leak and keylogger sites, as in
    r4.2; up to 1: more and closer innocent look-alikes, benign visits to those sites, incidents
    that leave fewer traces.
    """

    users: int = 400
    days: int = 150
    insiders: tuple[int, int, int] = (24, 24, 12)
    web_rate: float = 1.0
    hardness: float = 0.3
    label_noise: float = 0.0

    def __post_init__(self):
        require(len(self.insiders) == 3 and min(self.insiders) >= 0 and sum(self.insiders) >= 1,
                "insiders", self.insiders,
                "three counts of 0 and more (scenarios 1, 2, 3), at least one insider in all")
        require(self.users >= 20 and self.users >= 3 * sum(self.insiders), "users", self.users,
                f"20 and more, and at least three times the insiders ({3 * sum(self.insiders)})")
        require(self.days >= 60, "days", self.days,
                "60 and more (weeks of history come before the first label)")
        require(0.01 <= self.web_rate <= 5, "web_rate", self.web_rate, "0.01 to 5")
        require(0 <= self.hardness <= 1, "hardness", self.hardness, "0 to 1")
        require(0 <= self.label_noise <= 0.9, "label_noise", self.label_noise, "0 to 0.9")


@dataclass(frozen=True, kw_only=True)
class WindowSettings:
    """How account-days are described: days of own past, and how rare a deviation has to be.

    Days with fewer than `history_days` active days before them are neither trained nor judged on.
    """

    deviation_share: float = 0.03
    history_days: int = 30
    min_history: int = 10

    def __post_init__(self):
        require(0 < self.deviation_share < 1, "deviation_share", self.deviation_share,
                "between 0 and 1")
        require(self.history_days >= 1, "history_days", self.history_days, "1 and more")
        require(1 <= self.min_history <= self.history_days, "min_history", self.min_history,
                f"1 to history_days ({self.history_days})")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What the metrics are computed on: the same windows for every detector.

    `headline_per_class` windows of each risk level make the balanced sample, `n_benign` benign
    days the natural one; the `dev_` pair says the same for the dev split. `bootstrap` counts the
    resamples of users behind each interval; `alert_budgets` are alerts per 1,000 account-days.
    """

    headline_per_class: int = 120
    n_benign: int = 600
    dev_per_class: int = 60
    dev_benign: int = 300
    base_rate: float = 0.0029
    bootstrap: int = 1000
    alert_budgets: tuple[float, ...] = ALERT_BUDGETS
    batch_size: int = 64

    def __post_init__(self):
        for name in ("headline_per_class", "n_benign", "dev_per_class", "dev_benign",
                     "bootstrap", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 and more")
        require(0 < self.base_rate < 1, "base_rate", self.base_rate, "between 0 and 1")
        require(bool(self.alert_budgets) and all(0 < n <= 1000 for n in self.alert_budgets),
                "alert_budgets", self.alert_budgets,
                "above 0, to 1000 alerts per 1,000 account-days")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One way to run the whole study.

    `sft` is the cold start that RL begins from; `sft_all` is its rival, SFT on all labels. One
    rival of two cannot equal both: in `laptop` its `examples` are set so that it takes the mean of
    PPO's and GRPO's processor seconds, as the published run measured them. `minutes` says how long
    each stage is expected to take before a first run has measured it; a stage is stopped at
    `limit_seconds`. `style` and `confidence` say what the prompts ask a verdict to be;
    demonstrations then have it too.
    """

    name: str
    about: str
    simulate: SimulateSettings
    windows: WindowSettings = WindowSettings()
    evaluation: EvaluationSettings
    policy: PolicySettings
    sft: SFTSettings
    sft_all: SFTSettings
    ppo: PPOSettings
    grpo: GRPOSettings
    max_items: int = 14
    style: str = "evidence_first"
    confidence: bool = False
    memory_limit: str = "1GB"
    minutes: Mapping[str, float] = field(hash=False)
    least_limit_minutes: float = 10.0
    file: str = field(default="", compare=False)  # where it was read, empty if it is one of ours

    def __post_init__(self):
        require(self.max_items >= 1, "max_items", self.max_items, "1 and more")
        require(self.style in STYLES, "style", self.style, ", ".join(map(repr, STYLES)))
        asked, wanted = ASKED.get(self.grpo.rewards, (None, None))
        if asked and getattr(self, asked) != wanted:
            raise UserError(f"Profile {self.name}: rewards={self.grpo.rewards!r} scores what the "
                            f"prompts do not ask for: it needs {asked} = {json.dumps(wanted)}.")
        size = re.fullmatch(r"(\d+(?:\.\d+)?) ?[KMGT]i?B", self.memory_limit, re.IGNORECASE)
        require(size is not None and float(size[1]) > 0, "memory_limit", self.memory_limit,
                "sizes like '1GB' or '800MB'")
        require(0 < self.least_limit_minutes < math.inf, "least_limit_minutes",
                self.least_limit_minutes, "numbers above 0")
        require(self.windows.history_days <= self.simulate.days // 2, "windows.history_days",
                self.windows.history_days, f"1 to {self.simulate.days // 2}, half of simulate.days "
                "(an account works five days of seven, and some must be left to judge; for a "
                "longer release of your own raise simulate.days as well)")
        require(max(self.simulate.insiders) >= LEAST_INSIDERS, "simulate.insiders",
                self.simulate.insiders, f"counts of which one is {LEAST_INSIDERS} and more (a "
                "scenario is dealt to four groups of users, of which dev and test need an insider)")
        for name in RLSettings.controlled():
            ppo, grpo = getattr(self.ppo, name), getattr(self.grpo, name)
            if ppo != grpo:
                raise UserError(f"Profile {self.name}: {name} is a controlled variable, but PPO "
                                f"has {ppo!r} and GRPO {grpo!r}. Give both the same value.")

    @property
    def needs_gpu(self) -> bool:
        """Whether the policy can only be trained on a CUDA device."""
        return self.policy.backend == "unsloth" or self.policy.dtype == "bfloat16"

    @property
    def needs_hub(self) -> bool:
        """Whether the policy is a model of the Hugging Face hub, so that the hub may be asked."""
        name = self.policy.name
        return name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()

    def expected_seconds(self, stage: str) -> float:
        """Return the time one stage is expected to take, in seconds."""
        return 60.0 * self.minutes.get(stage, self.minutes["other"])

    def limit_seconds(self, stage: str) -> float:
        """Return when one stage is stopped: four times what is expected, in seconds."""
        return max(4 * self.expected_seconds(stage), 60.0 * self.least_limit_minutes)

    def as_dict(self) -> dict:
        """Return the settings as plain values, ready for JSON: all that a result follows from.

        What a profile says of itself, where it was read, and how long its stages may take is left
        out: a corrected forecast makes no other study.
        """
        return {name: value for name, value in asdict(self).items() if name not in _NO_SETTING}


_NO_SETTING = ("about", "file", "minutes", "least_limit_minutes")


def _rl(**controlled) -> dict:
    """Return both trainers with the same controlled variables."""
    warmup = controlled.pop("critic_warmup_steps")
    return {"ppo": PPOSettings(**controlled, critic_warmup_steps=warmup),
            "grpo": GRPOSettings(**controlled)}


# `laptop` simulates more insiders than r4.2 has: differences on dev and test users are then told
# apart from the luck of who was drawn. Weights restore the natural base rate all the same.
# The cold starts are held back by their labels: of a suspicious or malicious day, `downgrade` of
# the demonstrations say one level less, as an analyst who under-reports would.
_PROFILES = (
    Profile(
        name="smoke", about="every notebook in a few minutes: checks that all runs, proves nothing",
        simulate=SimulateSettings(users=40, days=60, insiders=(4, 4, 2), web_rate=0.2),
        windows=WindowSettings(history_days=15, min_history=10),  # of 60 days some must be judged
        evaluation=EvaluationSettings(headline_per_class=10, n_benign=24, dev_per_class=6,
                                      dev_benign=16, bootstrap=60),
        policy=PolicySettings(vocab_size=1024, hidden_size=64, layers=2),
        sft=SFTSettings(examples=192, epochs=4, batch_size=8, learning_rate=5e-3,
                        downgrade=0.35),
        sft_all=SFTSettings(examples=192, epochs=1, batch_size=8),
        **_rl(steps=4, prompts_per_step=4, num_generations=4, micro_batch_prompts=4, save_steps=2,
              critic_warmup_steps=1),
        minutes={"data": 0.4, "cold_start": 0.3, "03_reward_design": 0.7,
                 "04_sft_and_model_selection": 0.3, "05_ppo_training": 0.5, "06_grpo_training": 0.4,
                 "07_comparison": 0.4, "other": 0.25},
        least_limit_minutes=5.0,
    ),
    Profile(
        name="laptop", about="the default: two CPU cores, offline, a tiny policy made on the spot",
        simulate=SimulateSettings(users=800, days=120, insiders=(80, 80, 40), web_rate=0.5),
        evaluation=EvaluationSettings(n_benign=400, dev_per_class=120, dev_benign=200),
        policy=PolicySettings(max_prompt_tokens=320),
        sft=SFTSettings(examples=3000, epochs=2, batch_size=8, learning_rate=3e-3,
                        downgrade=0.5, prompt_loss=True),
        sft_all=SFTSettings(examples=2920, epochs=1, batch_size=8, learning_rate=1e-3,
                            prompt_loss=True),
        **_rl(steps=60, learning_rate=2e-4, save_steps=20, critic_warmup_steps=6),
        max_items=8,
        minutes={"data": 1.5, "cold_start": 5.3, "02_baselines": 1.5, "03_reward_design": 3.5,
                 "04_sft_and_model_selection": 6.0, "05_ppo_training": 6.5,
                 "06_grpo_training": 4.2, "07_comparison": 3.5, "09_error_analysis": 2.0,
                 "other": 0.5},
        least_limit_minutes=30.0,  # a shared machine may be several times slower
    ),
    Profile(
        name="gpu", about="Qwen3 4B with LoRA on one CUDA device, through Unsloth",
        simulate=SimulateSettings(users=1000, days=300, insiders=(30, 30, 10)),
        evaluation=EvaluationSettings(headline_per_class=200, n_benign=1500, dev_per_class=100,
                                      dev_benign=600, batch_size=128),
        policy=PolicySettings(name="Qwen/Qwen3-4B-Instruct-2507", backend="unsloth",
                              max_prompt_tokens=1024, max_completion_tokens=192, lora_rank=32,
                              dtype="bfloat16"),
        sft=SFTSettings(examples=500, epochs=1, batch_size=16, learning_rate=1e-4, downgrade=0.3),
        sft_all=SFTSettings(examples=4000, epochs=1, batch_size=16, learning_rate=1e-4),
        **_rl(steps=200, prompts_per_step=16, num_generations=8, micro_batch_prompts=4,
              learning_rate=1e-5, save_steps=25, critic_warmup_steps=10),
        max_items=24, memory_limit="4GB",
        minutes={"data": 15.0, "cold_start": 15.0, "04_sft_and_model_selection": 60.0,
                 "05_ppo_training": 240.0, "06_grpo_training": 180.0,
                 "07_comparison": 45.0, "other": 20.0},
        least_limit_minutes=60.0,
    ),
    Profile(
        name="gpu-large", about="the same with more prompts, completions and steps, for 80 GB",
        simulate=SimulateSettings(users=1000, days=501, insiders=(30, 30, 10)),
        evaluation=EvaluationSettings(headline_per_class=250, n_benign=3000, dev_per_class=120,
                                      dev_benign=1000, batch_size=256),
        policy=PolicySettings(name="Qwen/Qwen3-4B-Instruct-2507", backend="unsloth",
                              max_prompt_tokens=1536, max_completion_tokens=256, lora_rank=64,
                              dtype="bfloat16"),
        sft=SFTSettings(examples=1000, epochs=1, batch_size=32, learning_rate=1e-4,
                        downgrade=0.3),
        sft_all=SFTSettings(examples=12000, epochs=1, batch_size=32, learning_rate=1e-4),
        **_rl(steps=500, prompts_per_step=32, num_generations=16, micro_batch_prompts=4,
              learning_rate=1e-5, save_steps=25, critic_warmup_steps=20),
        max_items=24, memory_limit="8GB",
        minutes={"data": 30.0, "cold_start": 40.0, "04_sft_and_model_selection": 120.0,
                 "05_ppo_training": 900.0, "06_grpo_training": 700.0,
                 "07_comparison": 90.0, "other": 30.0},
        least_limit_minutes=120.0,
    ),
)

PROFILES: Mapping[str, Profile] = {entry.name: entry for entry in _PROFILES}


def profile(name: str) -> Profile:
    """Return the profile of that name, or that of a TOML file, if the name ends in .toml.

    Such a file names the profile it starts from and the settings it changes. A section is a
    settings class; `rl` stands for what PPO and GRPO have in common:

        extends = "laptop"
        max_items = 6
        confidence = true
        [policy]
        lora_rank = 8
        [rl]
        rewards = "ueba_calibrated"
        [ppo]
        lam = 0.95

    Raises `UserError` for an unknown name and for a file that cannot be read, with the field.

    >>> profile("laptop").grpo.num_generations
    8
    """
    if name.endswith(".toml"):
        return _read_profile(Path(name).expanduser())
    if name not in PROFILES:
        raise UserError(f"Unknown profile {name!r}. Legal profiles: {', '.join(PROFILES)}, or the "
                        "path of a .toml file that extends one.")
    return PROFILES[name]


_OF_THE_FILE = ("name", "about", "file", "minutes")  # of a profile, and not for a file to change


def _read_profile(path: Path) -> Profile:
    try:
        asked = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such profile file.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot be read as TOML: {error}.") from None
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", path.stem) or path.stem in PROFILES:
        raise UserError(f"{path}: the file gives the profile its name, which has to be lower-case "
                        f"letters, digits, - and _, and none of {', '.join(PROFILES)}. "
                        "Rename the file.")
    base = asked.pop("extends", None)
    if not isinstance(base, str) or base not in PROFILES:
        raise UserError(f"{path}: extends is {base!r}; it has to be one of "
                        f"{', '.join(map(repr, PROFILES))}.")
    for section in ("rl", "ppo", "grpo"):
        if isinstance(asked.get(section), dict) and "seed" in asked[section]:
            raise UserError(f"{path}: {section}.seed is the study's seed and not a profile's: give "
                            "--seed (make study SEED=).")
    common = asked.pop("rl", {})
    if common:
        for method in ("ppo", "grpo"):
            asked[method] = _merged(path, method, common, asked.get(method, {}))
    try:
        changed = _changed(PROFILES[base], asked, "")
        _check_checkpoint(changed.policy.name, path.parent)
        return replace(changed, name=path.stem, about=f"{path.name}, extends {base}",
                       file=str(path.resolve()))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _check_checkpoint(name: str, beside: Path) -> None:
    """Refuse a local checkpoint that is not there, or whose place depends on who reads the file.

    The command line, its stages and the notebooks read a profile file in folders of their own.
    """
    local = Path(name).expanduser()
    if Path(name).is_absolute():
        if not (local / "config.json").is_file():
            raise UserError(f"policy.name: {name} holds no config.json, so it is no checkpoint. "
                            "Give the folder that save_pretrained wrote.")
    elif name.startswith((".", "~")) or local.is_dir() or (beside / local).is_dir():
        raise UserError(f"policy.name is {name!r}; give the whole path of a local checkpoint, "
                        f"such as {(beside / local).resolve()}.")


def _merged(path: Path, method: str, common: object, own: object) -> dict:
    """Return the section of one method with the common settings in it."""
    if not isinstance(common, dict) or not isinstance(own, dict):
        raise UserError(f"{path}: rl, ppo and grpo are sections: write [rl] on a line of its own.")
    unknown = sorted(set(common) - set(RLSettings.controlled()))
    if unknown:
        raise UserError(f"{path}: rl.{unknown[0]} is not a setting that PPO and GRPO share. "
                        f"These are: {', '.join(RLSettings.controlled())}.")
    return {**common, **own}


def _changed(settings, asked: dict, section: str):
    """Return settings with the asked values, each of the type of the one it replaces.

    TOML knows no None: `false` stands for it where a setting may be absent.
    """
    kinds = {entry.name: entry.type for entry in fields(settings)}
    legal = [entry.name for entry in fields(settings) if section or entry.name not in _OF_THE_FILE]
    values = {}
    for name, value in asked.items():
        place = f"{section}{name}"
        if name not in legal:
            names = ", ".join(legal) if section else f"extends, rl, {', '.join(legal)}"
            raise UserError(f"{place} is not a setting. Legal here: {names}.")
        present = getattr(settings, name)
        if is_dataclass(present):
            if not isinstance(value, dict):
                raise UserError(f"{place} is a section: write [{place}] on a line of its own.")
            values[name] = _changed(present, value, f"{place}.")
        else:
            optional = "None" in str(kinds[name])
            values[name] = None if optional and value is False else _of_type(present, value, place)
    try:
        return replace(settings, **values)
    except UserError as error:
        raise UserError(f"{section}{error}") from None


def _of_type(present: object, value: object, place: str) -> object:
    """Return a value read from TOML as the type of the one it replaces."""
    number = type(value) in (int, float)
    if isinstance(present, tuple):
        if isinstance(value, list) and value and all(type(x) in (int, type(present[0]))
                                                     for x in value):
            return tuple(value)
        wanted = "a list of " + ("whole " if type(present[0]) is int else "") + "numbers"
    elif present is None or type(present) is float:
        if number:
            return float(value)
        wanted = "a number"
    elif type(value) is type(present):
        return value
    else:
        wanted = {int: "a whole number", bool: "true or false", str: "a text in quotes"}[
            type(present)]
    raise UserError(f"{place} is {value!r}; it has to be {wanted}.")


def check_device(chosen: Profile) -> None:
    """Raise `UserError` with everything that this machine lacks to train the profile's policy.

    Returns silently for a profile that runs on a CPU, without importing torch.
    """
    if not chosen.needs_gpu:
        return
    missing = []
    if importlib.util.find_spec("torch") is None:
        missing.append("PyTorch (package torch)")
    elif not importlib.import_module("torch").cuda.is_available():
        missing.append("a CUDA device that PyTorch can see (`nvidia-smi` lists the cards; "
                       "a CPU build of torch sees none)")
    if chosen.policy.backend == "unsloth":
        missing.extend(f"the package {name} (pip install -r requirements-gpu.txt)"
                       for name in ("unsloth", "bitsandbytes")
                       if importlib.util.find_spec(name) is None)
    if missing:
        lines = "".join(f"\n  - {item}" for item in missing)
        raise UserError(f"Profile {chosen.name} trains {chosen.policy.name} on a GPU. "
                        f"This machine lacks:{lines}\n"
                        "Choose --profile laptop to run the study on a CPU.")
