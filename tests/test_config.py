"""Profiles: legal ones compose, impossible ones are refused by field and range."""

import dataclasses
import json
import subprocess
import sys

import pandas as pd
import pytest

from ueba_helpers.data import splits
from ueba_helpers.errors import UserError
from ueba_helpers.rl.settings import (
    ARMS,
    GRPOSettings,
    PPOSettings,
    RLSettings,
    SFTSettings,
    arm,
)
from ueba_helpers.study import config
from ueba_helpers.study.comparison import made_by
from ueba_helpers.study.config import PROFILES, EvaluationSettings, SimulateSettings, profile
from ueba_helpers.study.runs import PACKAGE


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_keeps_the_controlled_variables_equal(name):
    chosen = profile(name)
    for variable in RLSettings.controlled():
        assert getattr(chosen.ppo, variable) == getattr(chosen.grpo, variable)


def test_the_check_of_controlled_variables_rejects_an_unequal_pair():
    chosen = profile("laptop")
    with pytest.raises(UserError, match=r"learning_rate .* PPO has 0\.5 and GRPO"):
        dataclasses.replace(chosen, ppo=dataclasses.replace(chosen.ppo, learning_rate=0.5))


def test_ppo_and_grpo_differ_only_by_what_their_classes_add():
    own = {field.name for field in dataclasses.fields(PPOSettings)} - set(RLSettings.controlled())
    assert own == {"critic", "critic_learning_rate_ratio", "critic_warmup_steps",
                   "critic_warmup_until", "critic_max_grad_norm", "critic_loss", "value_range",
                   "gamma", "lam", "critic_lam", "length_adaptive_alpha", "value_clip"}
    assert {field.name for field in dataclasses.fields(GRPOSettings)} == {
        *RLSettings.controlled(), "baseline", "baseline_floor"}


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_changes_what_it_names_and_can_be_trained(name, tmp_path):
    from ueba_helpers.rl.recipes import _shared_config
    from ueba_helpers.rl.trainers import GRPOConfig

    base = profile("laptop").grpo
    changed = arm(name, base)
    assert {field for field in vars(base) if getattr(base, field) != getattr(changed, field)} == {
        field for field, value in ARMS[name].items() if getattr(base, field) != value} != set()
    config = GRPOConfig(**_shared_config(tmp_path, changed, profile("laptop").policy))
    assert (config.loss_type, config.scale_rewards) == (changed.loss_type, changed.scale_rewards)
    assert config.beta == (0.04 if name == "grpo_published" else 0)
    assert config.importance_sampling_level == ("sequence" if name == "gspo" else "token")


def test_an_unknown_arm_is_refused_with_the_legal_names():
    with pytest.raises(UserError, match=r"'ppo'.*grpo_published, dr_grpo, rloo, gspo, reinforce"):
        arm("ppo", profile("laptop").grpo)


def test_false_in_a_file_takes_away_what_may_be_absent(tmp_path):
    name = _written(tmp_path, 'extends = "laptop"\n[ppo]\ncritic_loss = "bce"\n'
                              'value_clip = false\nvalue_range = [-1.5, 1.0]\n')
    chosen = profile(name).ppo
    assert (chosen.value_clip, chosen.value_range) == (None, (-1.5, 1.0))
    for line, word in (("critic_loss = \"bce\"", "value_clip"), ("lam = false", "ppo.lam"),
                       ("value_range = [1.0, 0.0]", "value_range"),
                       ("critic_loss = \"mae\"", "critic_loss"),
                       ("critic_warmup_until = 1.0", "critic_warmup_until")):
        with pytest.raises(UserError, match=word):
            profile(_written(tmp_path, f'extends = "laptop"\n[ppo]\n{line}\n'))


@pytest.mark.parametrize("changes, word", [
    ({"importance_sampling_level": "sequence"}, "loss_type"), ({"target_kl": 0.0}, "target_kl"),
    ({"loss_type": "sum"}, "loss_type"), ({"lr_warmup_share": 1.0}, "lr_warmup_share"),
    ({"baseline": "median"}, "baseline"), ({"baseline_floor": float("nan")}, "baseline_floor"),
    ({"baseline_floor": "x"}, "baseline_floor"),
    ({"baseline": "none", "baseline_floor": 0.0}, "baseline_floor")])
def test_impossible_settings_of_an_arm_name_their_field(changes, word):
    with pytest.raises(UserError, match=word):
        GRPOSettings(**changes)


def test_an_unknown_profile_is_refused_with_the_legal_names():
    with pytest.raises(UserError, match=r"'huge'.*smoke, laptop, gpu, gpu-large"):
        profile("huge")


def _written(folder, text, name="mine.toml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path):
    name = _written(tmp_path, 'extends = "smoke"\nmax_items = 6\n[simulate]\ninsiders = [3, 4, 1]\n'
                              '[policy]\nlora_rank = 8\n[rl]\nrewards = "traditional"\n'
                              'learning_rate = 1e-3\n[ppo]\nlam = 0.9\n')
    chosen, base = profile(name), profile("smoke")
    assert (chosen.name, chosen.max_items, chosen.simulate.insiders) == ("mine", 6, (3, 4, 1))
    assert chosen.policy == dataclasses.replace(base.policy, lora_rank=8)
    both = {"rewards": "traditional", "learning_rate": 1e-3}
    assert chosen.grpo == dataclasses.replace(base.grpo, **both)
    assert chosen.ppo == dataclasses.replace(base.ppo, **both, lam=0.9)
    assert (chosen.sft, chosen.windows, chosen.minutes) == (base.sft, base.windows, base.minutes)


def test_where_a_profile_was_read_changes_no_hash_and_reaches_the_notebooks(tmp_path):
    from ueba_helpers.study.pipeline import study_stages

    (tmp_path / "elsewhere").mkdir()
    here, there = (profile(_written(folder, 'extends = "smoke"\n'))
                   for folder in (tmp_path, tmp_path / "elsewhere"))
    assert here.file != there.file and here == there and here.as_dict() == there.as_dict()
    for stage in study_stages(here, seed=0, data="", runs=tmp_path):
        given = {key.upper(): value for key, value in stage.parameters.items()}
        assert profile(given["PROFILE"]) == here


def _settings_hash(chosen):
    return made_by(chosen, seed=0)["settings"]


def test_a_longer_limit_or_another_forecast_makes_no_other_study(tmp_path):
    from ueba_helpers.study.pipeline import stage_key, study_stages

    chosen = profile(_written(tmp_path, 'extends = "smoke"\n'))
    patient = profile(_written(tmp_path, 'extends = "smoke"\nleast_limit_minutes = 180\n'))
    patient = dataclasses.replace(patient, about="other words", minutes={"other": 9.0})
    assert patient.limit_seconds("data") > chosen.limit_seconds("data")
    assert _settings_hash(patient) == _settings_hash(chosen)
    keys = [[stage_key(stage, tmp_path) for stage in study_stages(
        one, seed=0, data="", runs=tmp_path)] for one in (chosen, patient)]
    assert keys[0] == keys[1]
    for changed in ({"max_items": 6}, {"memory_limit": "2GB"}, {"name": "other"},
                    {"windows": config.WindowSettings()}):
        assert _settings_hash(dataclasses.replace(chosen, **changed)) != _settings_hash(chosen)


@pytest.mark.parametrize(("text", "said"), [
    ("[rl]\nsteps = 4\n", "extends is None"),
    ('extends = "huge"\n', "extends is 'huge'"),
    ('extends = "smoke"\nsteps = 4\n', "steps is not a setting"),
    ('extends = "smoke"\nname = "x"\n', "name is not a setting"),
    ('extends = "smoke"\n[grpo]\nlamda = 1\n', r"grpo\.lamda is not a setting"),
    ('extends = "smoke"\n[rl]\nlam = 1\n', r"rl\.lam is not a setting"),
    ('extends = "smoke"\nrl = 3\n', "rl, ppo and grpo are sections"),
    ('extends = "smoke"\npolicy = 3\n', "policy is a section"),
    ('extends = "smoke"\n[rl]\nsteps = "many"\n', r"ppo\.steps is 'many'.*a whole number"),
    ('extends = "smoke"\n[rl]\nsteps = true\n', r"ppo\.steps is True.*a whole number"),
    ('extends = "smoke"\n[simulate]\ninsiders = 3\n', r"simulate\.insiders is 3.*a list"),
    ('extends = "smoke"\n[rl]\nsteps = 1\n', r"ppo\.critic_warmup_steps=1 is not possible"),
    ('extends = "smoke"\n[ppo]\nsteps = 9\n', "steps is a controlled variable"),
    ('extends = "smoke"\n[rl]\nrewards = "ueba_think"\n', r'ueba_think.*style = "think"'),
    ('extends = "smoke"\n[rl]\nrewards = "ueba_calibrated"\n', r"needs confidence = true"),
    ('extends = "smoke"\nstyle = "loud"\n', "style='loud' is not possible.*'risk_first'"),
    ('extends = "smoke"\n[rl]\nseed = 7\n', r"rl\.seed .* give --seed"),
    ('extends = "smoke"\n[ppo]\nseed = 7\n', r"ppo\.seed .* give --seed"),
    ('extends = "smoke"\nmemory_limit = "lots"\n', r"memory_limit='lots'.*'1GB'"),
    ('extends = "smoke"\nmemory_limit = "0GB"\n', "memory_limit='0GB'"),
    ('extends = "smoke"\nleast_limit_minutes = -4\n', r"least_limit_minutes=-4\.0.*above 0"),
    ('extends = "smoke"\nleast_limit_minutes = inf\n', "least_limit_minutes=inf"),
    ('extends = "smoke"\n[windows]\nhistory_days = 31\n', r"windows\.history_days=31.*1 to 30"),
    ('extends = "smoke"\n[simulate]\ninsiders = [3, 3, 3]\n', r"simulate\.insiders=\(3, 3, 3\)"),
    ('extends = "smoke"\n[simulate]\nweb_rate = 6\n', r"simulate\.web_rate=6\.0.*0\.01 to 5"),
    ('extends = "smoke"\n[evaluation]\nalert_budgets = [2, 5000]\n',
     r"evaluation\.alert_budgets=.*to 1000"),
    ('extends = "smoke"\n[policy]\nmax_prompt_tokens = 4033\n',
     r"policy\.max_prompt_tokens=4033.*64.*4096"),
    ('extends = "smoke"\n[rl\n', r"cannot be read as TOML.*line 2"),
])
def test_a_profile_file_that_cannot_be_is_refused_by_file_and_field(tmp_path, text, said):
    with pytest.raises(UserError, match=rf"mine\.toml: .*{said}"):
        profile(_written(tmp_path, text))


@pytest.mark.parametrize(("asked", "rewards"), [('style = "think"', "ueba_think"),
                                                ("confidence = true", "ueba_calibrated")])
def test_what_a_reward_scores_can_be_asked_for(tmp_path, asked, rewards):
    chosen = profile(_written(
        tmp_path, f'extends = "smoke"\n{asked}\n[rl]\nrewards = "{rewards}"\n'))
    assert chosen.ppo.rewards == chosen.grpo.rewards == rewards


def test_a_local_checkpoint_is_named_by_its_whole_path_and_has_to_be_there(tmp_path, monkeypatch):
    def read(name):
        return profile(_written(tmp_path, f'extends = "smoke"\n[policy]\nname = "{name}"\n'))

    here = tmp_path / "models" / "qwen"
    here.mkdir(parents=True)
    for relative in ("models/qwen", "./models/qwen", "../nope", "~/nope"):
        with pytest.raises(UserError, match=rf"policy\.name is '{relative}'; give the whole path"):
            read(relative)
    with pytest.raises(UserError, match=r"policy\.name: .*qwen holds no config\.json"):
        read(here)
    (here / "config.json").write_text("{}")
    monkeypatch.chdir("/")
    assert read(here).policy.name == str(here)
    assert read("somebody/some-model").needs_hub


def test_the_largest_legal_values_are_taken(tmp_path):
    chosen = profile(_written(tmp_path, (
        'extends = "smoke"\nmemory_limit = "1.5 GiB"\n[windows]\nhistory_days = 30\n'
        '[simulate]\ninsiders = [0, 4, 0]\nweb_rate = 5\n'
        '[evaluation]\nalert_budgets = [1000]\n[policy]\nmax_prompt_tokens = 4032\n')))
    assert chosen.policy.max_prompt_tokens + chosen.policy.max_completion_tokens == 4096
    profile(_written(tmp_path, 'extends = "gpu"\n[policy]\nmax_prompt_tokens = 9000\n'))


@pytest.mark.parametrize("insiders", range(1, 40))
def test_a_scenario_reaches_dev_and_test_if_and_only_if_it_has_the_least_insiders(insiders):
    users = pd.DataFrame({"user": [f"u{i:02}" for i in range(insiders)],
                          "incident": range(insiders), "scenario": 2})
    parts = splits.assign(users, seed=0)["part"]
    assert (parts.nunique() == len(splits.SHARES)) == (insiders >= config.LEAST_INSIDERS)


def test_a_profile_file_takes_no_name_of_ours_and_has_to_exist(tmp_path):
    with pytest.raises(UserError, match="Rename the file"):
        profile(_written(tmp_path, 'extends = "smoke"\n', "laptop.toml"))
    with pytest.raises(UserError, match=r"none\.toml: there is no such profile file"):
        profile(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(("settings", "values", "field"), [
    (SimulateSettings, {"users": 10}, "users"),
    (SimulateSettings, {"users": 30, "insiders": (5, 5, 1)}, "users"),
    (SimulateSettings, {"days": 59}, "days"),
    (SimulateSettings, {"web_rate": 0.0}, "web_rate"),
    (SimulateSettings, {"hardness": 1.1}, "hardness"),
    (SimulateSettings, {"insiders": (1, 2)}, "insiders"),
    (SimulateSettings, {"insiders": (0, 0, 0)}, "insiders"),
    (SimulateSettings, {"label_noise": 0.95}, "label_noise"),
    (config.WindowSettings, {"min_history": 31}, "min_history"),
    (config.WindowSettings, {"deviation_share": 0.0}, "deviation_share"),
    (EvaluationSettings, {"bootstrap": 0}, "bootstrap"),
    (EvaluationSettings, {"base_rate": 1.0}, "base_rate"),
    (EvaluationSettings, {"alert_budgets": ()}, "alert_budgets"),
    (PPOSettings, {"steps": 5, "critic_warmup_steps": 5}, "critic_warmup_steps"),
    (PPOSettings, {"steps": 2.5}, "steps"),
    (PPOSettings, {"steps": True}, "steps"),
    (GRPOSettings, {"temperature": float("inf")}, "temperature"),
    (GRPOSettings, {"kl_coef": float("nan")}, "kl_coef"),
    (SFTSettings, {"save_steps": 0}, "save_steps"),
])
def test_an_impossible_value_names_its_field_and_the_legal_range(settings, values, field):
    with pytest.raises(UserError, match=f"^{field}=.*legal values are"):
        settings(**values)


def _share_of_rl(examples):
    """Return sft_all's processor seconds over the mean of PPO's and GRPO's, as published."""
    shares = []
    for study in (PACKAGE.parent / "results").glob("laptop-seed*"):
        run = {json.loads((path / "config.json").read_text())["method"]: path
               for path in study.iterdir() if path.is_dir()}
        spent = {name: json.loads((path / "resources.json").read_text())["cpu_seconds"]
                 for name, path in run.items()}
        seen = json.loads((run["sft_all"] / "config.json").read_text())["configuration"]
        each = spent["sft_all"] / seen["settings"]["examples"]
        shares.append(2 * each * examples / (spent["ppo"] + spent["grpo"]))
    return sum(shares) / len(shares)


def test_sft_on_all_labels_takes_the_compute_of_the_mean_of_ppo_and_grpo():
    examples = profile("laptop").sft_all.examples
    assert profile("laptop").sft_all.epochs == 1
    assert _share_of_rl(examples) == pytest.approx(1, abs=0.1)
    assert _share_of_rl(1.2 * examples) != pytest.approx(1, abs=0.1), "a fifth more is not equal"


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_becomes_json_and_its_plan_covers_every_stage(name):
    chosen = profile(name)
    assert json.loads(json.dumps(chosen.as_dict()))["policy"]["name"] == chosen.policy.name
    from ueba_helpers.study.pipeline import BEFORE_NOTEBOOKS, NOTEBOOKS

    stages = {*BEFORE_NOTEBOOKS, *NOTEBOOKS}
    assert set(chosen.minutes) - {"other"} <= stages
    for stage in stages:
        assert 0 < chosen.expected_seconds(stage) < chosen.limit_seconds(stage)


def test_smoke_plans_at_most_four_minutes_and_laptop_at_most_twenty_five():
    from ueba_helpers.study.pipeline import planned_seconds, study_stages

    for name, minutes in (("smoke", 4), ("laptop", 25)):
        stages = study_stages(profile(name), seed=0, data="", runs=".")
        planned = {stage.name: stage.expected_seconds for stage in stages}
        assert planned_seconds(stages, planned, 2) <= 60 * minutes
        assert planned_seconds(stages, planned, 1) == pytest.approx(sum(planned.values()))


def test_only_hub_models_need_the_hub_and_only_gpu_profiles_a_gpu(tmp_path, monkeypatch):
    assert {name for name in PROFILES if profile(name).needs_hub} == {"gpu", "gpu-large"}
    assert {name for name in PROFILES if profile(name).needs_gpu} == {"gpu", "gpu-large"}
    chosen = profile("laptop")
    named = dataclasses.replace(chosen, policy=dataclasses.replace(chosen.policy,
                                                                   name="runs/policy"))
    assert named.needs_hub  # as good as any owner/name
    (tmp_path / "runs" / "policy").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not named.needs_hub  # a checkpoint on this machine


def test_a_gpu_profile_without_a_gpu_says_all_that_is_missing(monkeypatch):
    class NoCuda:
        class cuda:
            @staticmethod
            def is_available():
                return False

    monkeypatch.setattr(config.importlib, "import_module", lambda name: NoCuda)
    monkeypatch.setattr(config.importlib.util, "find_spec",
                        lambda name: object() if name == "torch" else None)
    with pytest.raises(UserError) as refusal:
        config.check_device(profile("gpu"))
    for missing in ("Qwen/Qwen3-4B-Instruct-2507", "CUDA device", "package unsloth",
                    "bitsandbytes", "--profile laptop"):
        assert missing in str(refusal.value)


def test_checking_a_cpu_profile_imports_no_torch():
    code = ("import sys; from ueba_helpers.study.config import *; "
            "check_device(profile('laptop')); sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
