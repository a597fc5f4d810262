"""PPO and GRPO: probes that only learning can pass, laws of the loss, exact resume, bad rewards."""

import functools
import math
from itertools import chain

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PrinterCallback, TrainerCallback

from tests.tiny import DEVICES, policy, probe_policy
from ueba_helpers.data.seeding import generator
from ueba_helpers.errors import UserError
from ueba_helpers.rl.advantages import gae, terminal_rewards
from ueba_helpers.rl.checkpoints import is_whole
from ueba_helpers.rl.policies import lora_config
from ueba_helpers.rl.settings import PolicySettings
from ueba_helpers.rl.trainers import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer

ARMS = {"grpo": (GRPOTrainer, GRPOConfig), "ppo": (PPOTrainer, PPOConfig)}


def prompts(count=8):
    """Return alternating questions, each with one right first word."""
    words = ["red", "blue"]
    return Dataset.from_list([
        {"prompt": [{"role": "user", "content": words[i % 2]}],
         "answer": ["yes", "no"][i % 2]} for i in range(count)])


def text_of(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


def first_token_reward(completions, answer, **kwargs):
    return [float(text_of(c).strip().startswith(a))
            for c, a in zip(completions, answer, strict=True)]


def length_reward(completions, **kwargs):
    """A reward that differs between completions from the first step on."""
    return [len(text_of(c)) % 5 / 4 for c in completions]


def constant_reward(completions, **kwargs):
    return [0.7] * len(completions)


def make(arm, folder, reward=length_reward, steps=4, model=None, source=policy, count=8,
         **changes):
    trainer_class, config_class = ARMS[arm]
    base, tokenizer = source()
    settings = dict(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=16,
        num_generations=4, max_completion_length=3, learning_rate=1e-2, disable_tqdm=True,
        save_strategy="no", seed=3, kl_coef=0.0)
    settings.update(changes)
    trainer = trainer_class(model=model or base, reward_funcs=reward,
                            args=config_class(**settings), train_dataset=prompts(count),
                            processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def flat(module):
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def history(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("arm", ARMS)
def test_two_prompts_with_one_right_word_each_are_learned(arm, device, tmp_path):
    trainer = make(arm, tmp_path, reward=first_token_reward, steps=80, source=probe_policy,
                   per_device_train_batch_size=64, num_generations=16, max_completion_length=1,
                   learning_rate=5e-3, use_cpu=device == "cpu")
    assert trainer.model.device.type == device
    trainer.train()
    rewards = history(trainer, "reward")
    assert sum(rewards[:5]) / 5 < 0.3
    assert sum(rewards[-5:]) / 5 > 0.9


@pytest.mark.parametrize("arm", ARMS)
def test_the_probe_is_not_learned_when_answers_are_shuffled(arm, tmp_path):
    """The broken twin of the probe: no first word is right for a prompt more often than chance."""
    def unrelated(completions, **kwargs):
        return [float(i % 4 == 0) for i in range(len(completions))]

    trainer = make(arm, tmp_path, reward=[unrelated, first_token_reward], steps=80,
                   source=probe_policy, per_device_train_batch_size=64, num_generations=16,
                   max_completion_length=1, learning_rate=5e-3, reward_weights=[1.0, 0.0])
    trainer.train()
    right = history(trainer, "rewards/first_token_reward/mean")
    assert sum(right[-5:]) / 5 < 0.5


def test_grpo_does_not_move_under_a_constant_reward(tmp_path):
    trainer = make("grpo", tmp_path, reward=constant_reward)
    before = flat(trainer.model)
    trainer.train()
    assert torch.equal(before, flat(trainer.model))


def test_the_critic_learns_a_constant_reward(tmp_path):
    trainer = make("ppo", tmp_path, reward=constant_reward, steps=60, num_generations=2,
                   critic_warmup_steps=60, critic_learning_rate=1e-2)
    before = flat(trainer.model)
    trainer.train()
    assert abs(history(trainer, "critic/value_mean")[-1] - 0.7) < 0.1
    assert torch.equal(before, flat(trainer.model)), "the policy is frozen during warm-up"


def test_without_warm_up_the_policy_moves(tmp_path):
    """The broken twin of the frozen policy above."""
    trainer = make("ppo", tmp_path, critic_warmup_steps=0)
    before = flat(trainer.model)
    trainer.train()
    assert not torch.equal(before, flat(trainer.model))


def gradients(trainer):
    """Return policy and critic gradients and the metrics of the first step, before the update."""
    taken = {}

    class Take(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            taken["policy"] = torch.cat([p.grad.flatten() for p in trainer.model.parameters()
                                         if p.grad is not None])
            if trainer._name == "PPO":
                taken["critic"] = torch.cat([p.grad.flatten() for p in trainer.critic.parameters()
                                             if p.grad is not None])

    trainer.add_callback(Take())
    trainer.train()
    return taken


def ragged(arm, folder, **changes):
    """Return a trainer whose completions differ in length and whose reference is not its policy.

    Its `lengths` list takes the completions' lengths of each micro-batch.
    """
    settings = {"steps": 1, "max_grad_norm": 1e9, "kl_coef": 0.2, "max_completion_length": 12}
    trainer = make(arm, folder, source=probe_policy, **(settings | changes))
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer._reference.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
        if arm == "ppo":  # a head of zeros would keep gradients from the critic's trunk
            trainer.critic.head.weight.normal_(generator=draws)
    trainer.lengths, compute_loss = [], trainer._compute_loss

    def watched(model, inputs):
        trainer.lengths.append(inputs["completion_mask"].sum(1).tolist())
        return compute_loss(model, inputs)

    trainer._compute_loss = watched
    return trainer


def apart(found, expected):
    """Return the relative difference of two gradients by network."""
    assert found.keys() == expected.keys()
    return {name: ((found[name] - expected[name]).norm() / expected[name].norm()).item()
            for name in expected}


QUARTERS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
HALVES = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("placement, changes", [
    ("reward", QUARTERS), ("reward", HALVES), ("reward", {"shared_prefix": False}),
    ("loss", QUARTERS)])
def test_gradients_do_not_depend_on_micro_batches_or_prefix(arm, placement, changes, tmp_path):
    common = {"kl_placement": placement} | ({"value_clip": 0.2} if arm == "ppo" else {})
    whole = ragged(arm, tmp_path / "whole", **common)
    parts = ragged(arm, tmp_path / "parts", **common, **changes)
    parts.use_sampler = whole.use_sampler  # the same completions, scored another way
    expected, found = gradients(whole), gradients(parts)
    assert len(whole.lengths) == 1
    assert len(parts.lengths) == changes.get("gradient_accumulation_steps", 1)
    assert sorted(chain(*parts.lengths)) == sorted(chain(*whole.lengths))
    assert all(len(set(lengths)) > 1 for lengths in parts.lengths), "ragged within a micro-batch"
    if len(parts.lengths) > 1:
        assert len({sum(lengths) for lengths in parts.lengths}) > 1, "and between micro-batches"
    for trainer in (whole, parts):
        assert abs(history(trainer, "kl_to_reference/per_token")[0]) > 0.05
    assert expected["policy"].norm() > 1e-3
    for network, difference in apart(found, expected).items():
        assert difference < 1e-4, network


@pytest.mark.parametrize("arm", ARMS)
def test_a_mean_over_each_micro_batch_depends_on_its_size(arm, tmp_path):
    """The broken twin of the invariance above: every micro-batch divides by its own tokens."""
    def own_mean(values, inputs):
        return values.sum() / inputs["completion_mask"].sum() / 4

    whole = ragged(arm, tmp_path / "whole", loss_type="bnpo")
    parts = ragged(arm, tmp_path / "parts", loss_type="bnpo", **QUARTERS)
    if arm == "ppo":
        parts._token_mean = own_mean  # of the critic's loss, which `loss_type` does not reach
    for network, difference in apart(gradients(parts), gradients(whole)).items():
        assert difference > 1e-2, network


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("changes", [{"loss_type": "grpo"}, {"kl_coef": 0.4}])
def test_a_mean_of_sequence_means_or_another_kl_gives_other_gradients(arm, changes, tmp_path):
    """The broken twin: the rollouts tell per-sequence means, and KL weights, apart."""
    expected = gradients(ragged(arm, tmp_path / "a"))
    found = gradients(ragged(arm, tmp_path / "b", **changes))
    assert apart(found, expected)["policy"] > 1e-2


def test_another_seed_gives_other_gradients(tmp_path):
    """The broken twin of the invariance above: the comparison can tell gradients apart."""
    a = gradients(make("grpo", tmp_path / "a", steps=1, max_grad_norm=1e9))
    b = gradients(make("grpo", tmp_path / "b", steps=1, max_grad_norm=1e9, seed=4))
    assert (a["policy"] - b["policy"]).norm() / a["policy"].norm() > 1e-2


@pytest.mark.parametrize("arm", ARMS)
def test_the_ratio_is_one_right_after_sampling(arm, tmp_path):
    trainer = make(arm, tmp_path, steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    rollout = trainer._generate_and_score_completions(batch)
    scored = trainer._rollout_log_probs(trainer.model, rollout)
    mask = rollout["completion_mask"]
    log_ratio = (scored - rollout["sampling_per_token_logps"]) * mask
    assert log_ratio.abs().max() < 1e-5
    trainer.temperature = 0.7  # the broken twin: scored at another temperature
    other = trainer._rollout_log_probs(trainer.model, rollout)
    assert ((other - rollout["sampling_per_token_logps"]) * mask).abs().max() > 1e-2


def moves(trainer):
    """Return, per optimiser step, whether the policy and the critic moved."""
    rows = []
    modules = {"policy": trainer.model, **({"critic": trainer.critic}
                                           if isinstance(trainer, PPOTrainer) else {})}
    last = {name: flat(module) for name, module in modules.items()}

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            now = {name: flat(module) for name, module in modules.items()}
            rows.append({name: not torch.equal(last[name], now[name]) for name in modules})
            last.update(now)

    trainer.add_callback(Watch())
    trainer.train()
    return {name: [row[name] for row in rows] for name in modules}


def stirred(trainer):
    """Return the trainer with a shared critic whose first values are not zero."""
    torch.nn.init.normal_(trainer.critic.weight, generator=torch.Generator().manual_seed(1))
    return trainer


@pytest.mark.parametrize("warm_up, policy_moves", [(2, [False, False]), (1, [False, True])])
def test_a_shared_critic_leaves_the_policy_alone_in_its_warm_up(warm_up, policy_moves, tmp_path):
    trainer = make("ppo", tmp_path, critic="shared", steps=2, critic_warmup_steps=warm_up,
                   weight_decay=0.1)
    assert moves(stirred(trainer)) == {"policy": policy_moves, "critic": [True] * 2}


@pytest.mark.parametrize("loss", ["both", "policy", "value"])
def test_without_warm_up_either_loss_of_a_shared_critic_moves_the_policy(loss, tmp_path):
    """The broken twin: neither the policy's loss nor the critic's is idle by chance."""
    trainer = make("ppo", tmp_path, critic="shared", steps=2, critic_warmup_steps=0,
                   vf_coef=0.0 if loss == "policy" else 1.0)
    if loss == "value":
        advantages = trainer._advantages
        trainer._advantages = lambda *args: 0 * advantages(*args)
    assert moves(stirred(trainer)) == {"policy": [True] * 2, "critic": [loss != "policy"] * 2}


SIXTHS = [6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]


@pytest.mark.parametrize("frozen, rising, policy_course, critic_course", [
    # The policy waits at its start and has come as far as the critic at the end: of its four
    # steps each is one and a half of the schedule's six.
    (2, 0, [1, 1, 1, 0.75, 0.5, 0.25], SIXTHS),
    (2, 2, [0, 0, 0, 0.75, 0.75, 0.375], [0, 0.5, 1, 0.75, 0.5, 0.25]),
    (0, 0, SIXTHS, SIXTHS)])  # the twin: without a warm-up of the critic nothing waits
def test_learning_rates_of_policy_and_critic_by_hand(frozen, rising, policy_course, critic_course,
                                                     tmp_path):
    trainer = make("ppo", tmp_path, steps=6, critic_warmup_steps=frozen, warmup_steps=rising,
                   lr_scheduler_type="linear", learning_rate=1e-3, critic_learning_rate=4e-3)
    used = []

    class Take(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            used.append([group["lr"] for group in trainer.optimizer.param_groups])

    trainer.add_callback(Take())
    trainer.train()
    assert {id(p) for p in trainer.optimizer.param_groups[-1]["params"]} == {
        id(p) for p in trainer.critic.parameters()}
    *of_policy, of_critic = zip(*used, strict=True)
    assert of_policy
    for course in of_policy:
        assert course == pytest.approx([1e-3 * x for x in policy_course], abs=1e-12)
    assert of_critic == pytest.approx([4e-3 * x for x in critic_course], abs=1e-12)
    if frozen:
        unstretched = [1, 1, *SIXTHS[:4]]
        for wrong in (SIXTHS, unstretched, critic_course):
            assert of_policy[0] != pytest.approx([1e-3 * x for x in wrong], abs=1e-6)
        for wrong in (policy_course, [0.25 * x for x in critic_course]):
            assert of_critic != pytest.approx([4e-3 * x for x in wrong], abs=1e-6)


class StepMetrics(TrainerCallback):
    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            self.rows.append({k: v for k, v in logs.items()
                              if "time" not in k and "per_second" not in k})


@pytest.mark.parametrize("arm", ARMS)
def test_resuming_from_a_checkpoint_is_exact(arm, tmp_path):
    changes = {"steps": 6, "save_strategy": "steps", "save_steps": 3, "kl_coef": 0.05,
               "num_iterations": 1}
    if arm == "ppo":
        changes["critic_warmup_steps"] = 2
    whole = make(arm, tmp_path / "run", **changes)
    metrics = StepMetrics()
    whole.add_callback(metrics)
    whole.train()
    again = make(arm, tmp_path / "run", **changes)
    resumed = StepMetrics()
    again.add_callback(resumed)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert torch.equal(flat(whole.model), flat(again.model))
    if arm == "ppo":
        assert torch.equal(flat(whole.critic), flat(again.critic))
    assert resumed.rows == metrics.rows[3:]
    fresh = make(arm, tmp_path / "other", **{**changes, "seed": 9})
    fresh.train()
    assert not torch.equal(flat(whole.model), flat(fresh.model)), "the comparison can fail"


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("group", [1, 4])
def test_both_critics_train_with_any_group_size(critic, group, tmp_path):
    trainer = make("ppo", tmp_path, critic=critic, num_generations=group, steps=3,
                   scale_rewards="whiten", count=16)
    trainer.train()
    assert all(math.isfinite(x) for x in history(trainer, "critic/value_loss"))
    assert history(trainer, "critic/grad_norm")[0] > 0


@pytest.mark.parametrize("arm", ARMS)
def test_lora_trains_adapters_and_takes_the_base_as_reference(arm, tmp_path):
    base, _ = policy()
    model = get_peft_model(base, lora_config(PolicySettings(lora_rank=4)))
    trainer = make(arm, tmp_path, model=model, kl_coef=0.05, steps=5, num_generations=4)
    assert isinstance(trainer.model, PeftModel) and trainer._reference is None
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer.train()
    kl = history(trainer, "kl_to_reference/per_completion")
    assert kl[0] == pytest.approx(0, abs=1e-5) and abs(kl[-1]) > 1e-4
    assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if n in frozen)


def test_kl_in_the_loss_uses_the_same_reference(tmp_path):
    trainer = make("grpo", tmp_path, kl_coef=0.5, kl_placement="loss", steps=4)
    assert trainer.beta == 0.5
    trainer.train()
    assert history(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert history(trainer, "kl")[-1] > 0


def string_reward(completions, **kwargs):
    return ["good"] * len(completions)


def nan_reward(completions, **kwargs):
    return [float("nan")] * len(completions)


def short_reward(completions, **kwargs):
    return [1.0]


def raising_reward(completions, **kwargs):
    raise KeyError("risk")


@pytest.mark.parametrize("reward, word", [
    (string_reward, "'good'"), (nan_reward, "nan"), (short_reward, "1 values for 16"),
    (raising_reward, "KeyError")])
def test_a_bad_reward_function_is_named(reward, word, tmp_path):
    with pytest.raises(UserError, match=reward.__name__) as caught:
        make("grpo", tmp_path, reward=reward).train()
    assert word in str(caught.value)


def test_a_reward_of_none_carries_no_signal(tmp_path):
    def sometimes(completions, **kwargs):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    trainer = make("grpo", tmp_path, reward=sometimes)
    before = flat(trainer.model)
    trainer.train()
    assert torch.equal(before, flat(trainer.model))


@pytest.mark.parametrize("changes, word", [
    ({"beta": 0.1, "kl_coef": 0.2}, "kl_coef"), ({"kl_placement": "both"}, "kl_placement"),
    ({"scale_rewards": "whiten"}, "scale_rewards"),
    ({"scale_rewards": "group", "kl_coef": 0.1}, "scale_rewards='group'")])
def test_impossible_settings_name_their_field(changes, word, tmp_path):
    with pytest.raises(UserError, match=word):
        GRPOConfig(output_dir=str(tmp_path), **changes)


def test_a_dataset_smaller_than_one_rollout_is_refused(tmp_path):
    with pytest.raises(UserError, match="one rollout takes 4"):
        make("grpo", tmp_path, count=2).train()


def test_a_dataset_without_prompts_is_refused(tmp_path):
    base, tokenizer = policy()
    with pytest.raises(UserError, match="no column `prompt`; it has question, answer"):
        GRPOTrainer(base, length_reward, GRPOConfig(output_dir=str(tmp_path)),
                    prompts().rename_column("prompt", "question"), processing_class=tokenizer)


@pytest.mark.parametrize("network", ["policy", "critic"])
def test_a_gradient_of_nan_never_reaches_the_weights(network, tmp_path):
    trainer = make("ppo", tmp_path)
    module = {"policy": trainer.model, "critic": trainer.critic}[network]
    before = flat(trainer.model)
    next(module.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match=f"gradient of the {network} is not finite at step 0"):
        trainer.train()
    assert torch.equal(before, flat(trainer.model))


@pytest.mark.parametrize("value", [0.5, math.nan, math.inf])
def test_a_reward_model_that_goes_wrong_is_named(value, tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"_name_or_path": "runs/scorer", "pad_token_id": 0})()
            self.head = torch.nn.Linear(1, 1)

        def forward(self, input_ids, **inputs):
            logits = torch.full((input_ids.size(0), 1), value)
            return type("Output", (), {"logits": logits})()

    base, tokenizer = policy()
    trainer = GRPOTrainer(
        base, [Model(), length_reward], GRPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4,
            num_generations=4, max_completion_length=3, save_strategy="no", disable_tqdm=True),
        prompts(), processing_class=tokenizer, reward_processing_classes=[tokenizer, None])
    if math.isfinite(value):
        trainer.train()
        assert history(trainer, "rewards/scorer/mean") == [value]
    else:
        with pytest.raises(UserError, match="reward model scorer returned a value that is not"):
            trainer.train()


async def slow_reward(completions, **kwargs):
    return length_reward(completions)


def plain(dataset):
    """Return the dataset with prompts of text in place of messages."""
    return dataset.map(lambda row: {"prompt": row["prompt"][0]["content"]})


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("changes", [
    {"plain": True}, {"reward": slow_reward}, {"reward": [length_reward, constant_reward],
                                               "reward_weights": [0.5, 2.0]},
    {"log_completions": True, "num_completions_to_print": 1}, {"eval_strategy": "steps"},
    {"steps_per_generation": 2, "per_device_train_batch_size": 8}, {"num_iterations": 2},
    {"delta": 3.0}, {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    {"mask_truncated_completions": True}, {"top_p": 0.9}, {"loss_type": "dr_grpo"},
    {"vllm_mode": "server", "vllm_server_port": 1}], ids=lambda changes: next(iter(changes)))
def test_what_trl_accepts_trains(changes, arm, tmp_path):
    changes = dict(changes)
    text, judged = changes.pop("plain", False), "eval_strategy" in changes
    if judged:
        changes |= {"eval_steps": 1, "per_device_eval_batch_size": 4, "num_generations_eval": 2}
    trainer_class, config_class = ARMS[arm]
    base, tokenizer = policy()
    data = plain(prompts()) if text else prompts()
    settings = {"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 16,
                "num_generations": 4, "max_completion_length": 3, "learning_rate": 1e-2,
                "disable_tqdm": True, "save_strategy": "no", "seed": 3, **changes}
    reward = settings.pop("reward", length_reward)
    trainer = trainer_class(base, reward, config_class(**settings), data,
                            data.select(range(4)) if judged else None, tokenizer)
    trainer.remove_callback(PrinterCallback)
    before = flat(trainer.model)
    trainer.train()
    assert not torch.equal(before, flat(trainer.model))
    rewards = history(trainer, "reward")
    shared = {"steps_per_generation", "num_iterations"} & set(changes)  # one rollout, two steps
    assert len(rewards) == (1 if shared else 2) and all(0 <= value <= 2.4 for value in rewards)
    assert len(history(trainer, "eval_reward")) == (2 if judged else 0)


def kl_gradient_by_hand(found, trainer, rollout, mask):
    """Of k3 times the ratio, at a ratio of one: the mean of (log p - log r) grad log p."""
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
    attention = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
    log_policy = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention,
                                                            mask.size(1))[0]
    with torch.no_grad():
        distance = log_policy - trainer._rollout_log_probs(trainer._reference, rollout)
    trainer.model.zero_grad()
    (trainer.beta * (distance * log_policy * mask).sum() / mask.sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert expected.norm() > 1e-3
    assert ((found - expected).norm() / expected.norm()).item() < 1e-4


@pytest.mark.parametrize("arm", ARMS)
def test_the_kl_in_the_loss_has_the_gradient_of_the_kl(arm, tmp_path):
    def found(**changes):
        trainer = make(arm, tmp_path, kl_coef=0.3, kl_placement="loss", **changes)
        with torch.no_grad():  # the reference is what the policy was
            for p in trainer.model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        trainer.current_gradient_accumulation_steps = 1
        rollout = rollout_of(trainer)
        rollout["advantages"] = 0 * rollout["advantages"]
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, rollout).backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        return gradient, trainer, rollout, rollout["completion_mask"].float()

    kl_gradient_by_hand(*found())
    with pytest.raises(AssertionError):
        kl_gradient_by_hand(*found(use_bias_correction_kl=False))


@pytest.mark.parametrize("entropy_coef", [0.0, 0.5])
def test_the_policy_loss_is_logged_without_the_entropy_bonus(entropy_coef, tmp_path):
    trainer = make("grpo", tmp_path, steps=1, entropy_coef=entropy_coef)
    trainer.train()
    assert len(history(trainer, "policy_loss")) == 1
    assert abs(history(trainer, "policy_loss")[0]) < 1e-6, "advantages of a group sum to zero"
    assert (abs(history(trainer, "loss")[0]) > 0.1) == bool(entropy_coef)


def test_a_prompt_longer_than_the_context_is_refused(tmp_path):
    trainer = make("grpo", tmp_path)
    trainer.model.config.max_position_embeddings = 5
    with pytest.raises(UserError, match="context of 5"):
        trainer.train()


def test_a_critic_of_another_vocabulary_is_refused(tmp_path):
    from transformers import Qwen3Config, Qwen3Model

    from ueba_helpers.rl.policies import Critic

    other = Critic(Qwen3Model(Qwen3Config(vocab_size=77, hidden_size=32, intermediate_size=32,
                                          num_hidden_layers=1, num_attention_heads=2,
                                          num_key_value_heads=1, head_dim=16)))
    base, tokenizer = policy()
    with pytest.raises(UserError, match="77"):
        PPOTrainer(base, first_token_reward,
                   PPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4),
                   train_dataset=prompts(), processing_class=tokenizer, value_model=other)


# -- the reference ---------------------------------------------------------------------------------

def trained_adapter():
    """Return a policy whose adapter says something else than its base."""
    model = get_peft_model(policy()[0], lora_config(PolicySettings(lora_rank=4)))
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=draws)
    return model


@pytest.mark.parametrize("placement, key", [
    ("reward", "kl_to_reference/per_completion"), ("loss", "kl")])
def test_a_policy_that_arrives_with_an_adapter_is_its_own_reference(placement, key, tmp_path):
    trainer = make("grpo", tmp_path, model=trained_adapter(), kl_coef=0.05, steps=3,
                   kl_placement=placement)
    trainer.train()
    kl = history(trainer, key)
    assert kl[0] == pytest.approx(0, abs=1e-5) and abs(kl[-1]) > 1e-4
    model = trained_adapter()  # the broken twin: without adapters it is another policy
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    assert (model(ids).logits - base).abs().max() > 0.1


@pytest.mark.parametrize("arm", ARMS)
def test_resuming_adapters_is_exact(arm, tmp_path):
    changes = {"steps": 4, "save_strategy": "steps", "save_steps": 2, "kl_coef": 0.05}
    whole = make(arm, tmp_path, model=trained_adapter(), **changes)
    whole.train()
    again = make(arm, tmp_path, model=trained_adapter(), **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(flat(whole.model), flat(again.model))
    if arm == "ppo":
        assert torch.equal(flat(whole.critic), flat(again.critic))
        assert not any(".ref." in name for name, _ in whole.critic.named_parameters())


@pytest.mark.parametrize("changes, word", [
    ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32"),
    ({"sync_ref_model": True}, "sync_ref_model"),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation")])
def test_what_the_reference_or_the_reward_sum_cannot_hold_is_refused(changes, word, tmp_path):
    with pytest.raises(UserError, match=word):
        make("grpo", tmp_path, kl_coef=0.1, **changes)


# -- draws and resuming ----------------------------------------------------------------------------

def test_rollouts_of_one_step_have_draws_of_their_own(tmp_path):
    trainer = make("grpo", tmp_path, steps=2, per_device_train_batch_size=4,
                   gradient_accumulation_steps=4, steps_per_generation=1)
    seen, uniforms = [], trainer._uniforms
    trainer._uniforms = lambda rows: seen.append(uniforms(rows)) or seen[-1]
    trainer.train()
    assert len(seen) == 8
    assert len({draws.tobytes() for draws in seen}) == 8
    first = generator(3, "rollouts", 1).random(seen[4].shape)
    assert (seen[4] == first).all(), "the first of a step is addressed by the step alone"


TWO_PASSES = {"num_iterations": 2, "save_strategy": "steps", "kl_coef": 0.05, "save_steps": 3}


@pytest.mark.parametrize("arm", ARMS)
def test_resuming_with_two_passes_over_a_rollout_is_exact(arm, tmp_path):
    whole = make(arm, tmp_path, steps=6, **TWO_PASSES)
    whole.train()
    saved = sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))
    assert saved == ["checkpoint-4", "checkpoint-6"], "step 3 lies inside a rollout"
    again = make(arm, tmp_path, steps=6, **TWO_PASSES)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(flat(whole.model), flat(again.model))
    if arm == "ppo":
        assert torch.equal(flat(whole.critic), flat(again.critic))


def test_a_checkpoint_inside_a_rollout_is_not_resumed_from(tmp_path):
    make("grpo", tmp_path, steps=3, **TWO_PASSES).train()
    again = make("grpo", tmp_path, steps=6, **TWO_PASSES)
    with pytest.raises(UserError, match=r"step 3 .* inside a rollout"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_checkpoint_before_stays_until_the_new_one_is_sealed(tmp_path, monkeypatch):
    from ueba_helpers.rl import trainers

    sealed, seen = trainers.seal, []

    def watched(folder):
        seen.append([f.name for f in sorted(tmp_path.glob("checkpoint-*")) if is_whole(f)])
        sealed(folder)

    monkeypatch.setattr(trainers, "seal", watched)
    trainer = make("grpo", tmp_path, steps=3, save_strategy="steps", save_steps=1,
                   save_total_limit=1)
    trainer.train()
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"]]
    assert [f.name for f in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


# -- the critic's gradients ------------------------------------------------------------------------

def test_no_gradient_of_the_critic_outlives_its_step(tmp_path):
    """Five micro-batches an epoch in steps of two: the third step of an epoch has one."""
    trainer = make("ppo", tmp_path, steps=6, per_device_train_batch_size=4, count=5,
                   gradient_accumulation_steps=2, steps_per_generation=1)
    left = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            left.append(any(p.grad is not None for p in trainer.critic.parameters()))

    trainer.add_callback(Watch())
    trainer.train()
    assert left == [False] * 6


def test_the_loss_scale_is_taken_off_once(tmp_path):
    trainer = make("ppo", tmp_path, steps=1, max_grad_norm=0.01)
    calls, clip = [], trainer.accelerator.clip_grad_norm_
    trainer.accelerator.clip_grad_norm_ = lambda *args: calls.append(1) or clip(*args)
    taken = gradients(trainer)
    assert len(calls) == 1
    assert taken["critic"].norm() == pytest.approx(0.01, rel=1e-3)


def test_an_optimiser_of_the_user_trains_the_critic_too(tmp_path):
    base, tokenizer = policy()
    args = PPOConfig(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8,
                     max_completion_length=3, save_strategy="no", disable_tqdm=True)

    def built(scheduler):
        optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3)
        return PPOTrainer(base, length_reward, args, prompts(), None, tokenizer,
                          optimizers=(optimizer, scheduler and scheduler(optimizer)))

    trainer = built(None)
    before = flat(trainer.critic)
    trainer.train()
    assert not torch.equal(before, flat(trainer.critic))
    with pytest.raises(UserError, match="optimizers"):
        built(lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1)).train()


# -- holding still, warming up, another value loss -------------------------------------------------

@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("target_kl, policy_moves", [
    (1e-9, [True, False, False] * 2), (1e9, [True] * 6), (None, [True] * 6)])
def test_a_policy_beyond_the_target_kl_stands_still_until_the_next_rollout(
        target_kl, policy_moves, arm, tmp_path):
    trainer = make(arm, tmp_path, steps=6, num_iterations=3, target_kl=target_kl,
                   weight_decay=0.1)
    found = moves(trainer)
    assert found["policy"] == policy_moves
    if arm == "ppo":
        assert found["critic"] == [True] * 6
    if target_kl is not None:
        assert history(trainer, "stands_still") == [float(not moved) for moved in policy_moves]


@pytest.mark.parametrize("until, policy_moves", [
    (None, [False] * 3 + [True]), (0.99, [False] * 3 + [True]), (-1e9, [True] * 4)])
def test_explained_variance_may_end_the_warm_up(until, policy_moves, tmp_path):
    trainer = make("ppo", tmp_path, critic_warmup_steps=3, critic_warmup_until=until)
    assert moves(trainer) == {"policy": policy_moves, "critic": [True] * 4}


@pytest.mark.parametrize("until, course", [(None, [0, 0, 0, 0]), (-1e9, [0, 0.5, 1, 0.5])])
def test_the_policys_learning_rate_rises_from_the_end_of_the_warm_up(until, course, tmp_path):
    trainer = make("ppo", tmp_path, critic_warmup_steps=3, critic_warmup_until=until,
                   warmup_steps=2, lr_scheduler_type="linear", learning_rate=1e-3)
    trainer.train()
    assert history(trainer, "learning_rate") == pytest.approx([1e-3 * x for x in course])


@pytest.mark.parametrize("warm", [True, False])
def test_a_checkpoint_remembers_whether_the_warm_up_is_over(warm, tmp_path):
    trainer, other = (make("ppo", tmp_path / name, critic_warmup_steps=3) for name in "ab")
    trainer._warm_at, other._warm_at = (0, None) if warm else (None, 0)
    trainer.save_beside_policy(tmp_path)
    other.load_beside_policy(tmp_path)
    assert other._warm_at == trainer._warm_at and other._warming_up is not warm


def cross_entropy_by_hand(errors):
    """Of a logit of 0 (one half) and returns at 1, 3 and -1 times 0.5 in a range of -1 to 1."""
    found = errors(torch.zeros(1, 3), {"returns": torch.tensor([[0.5, 1.5, -0.5]])})
    half = math.log(2)  # whatever the target: -q log .5 - (1 - q) log .5
    assert found[0].tolist() == [pytest.approx([half] * 3)]
    outputs = torch.tensor([[2.0, 2.0, 2.0]], requires_grad=True)
    found = errors(outputs, {"returns": torch.tensor([[0.5, 1.5, -0.5]])})
    found[0].sum().backward()
    said = 1 / (1 + math.exp(-2))
    assert outputs.grad[0].tolist() == pytest.approx([said - 0.75, said - 1, said - 0.25])


def test_the_critic_may_learn_by_cross_entropy(tmp_path):
    trainer = make("ppo", tmp_path, critic_loss="bce", reward=constant_reward, steps=60,
                   num_generations=2, critic_warmup_steps=60, critic_learning_rate=1e-2)
    cross_entropy_by_hand(trainer._value_errors)
    with pytest.raises(AssertionError):
        cross_entropy_by_hand(lambda out, batch: trainer._value_errors(
            out, {"returns": -batch["returns"]}))
    trainer.args.value_range = (-2.0, 2.0)
    with pytest.raises(AssertionError):
        cross_entropy_by_hand(trainer._value_errors)
    trainer.args.value_range = (-1.0, 1.0)
    trainer.train()
    assert abs(history(trainer, "critic/value_mean")[-1] - 0.7) < 0.1
    assert abs(history(trainer, "critic/value_mean")[0] - 0.7) > 0.2, "it had to be learned"


@pytest.mark.parametrize("changes, word", [
    ({"critic_loss": "mae"}, "critic_loss"), ({"critic_loss": "bce", "value_clip": 0.5},
                                              "value_clip"),
    ({"value_range": (1.0, 0.0)}, "value_range"), ({"target_kl": 0.0}, "target_kl"),
    ({"length_adaptive_alpha": 0.0}, "length_adaptive_alpha")])
def test_impossible_settings_of_the_critic_name_their_field(changes, word, tmp_path):
    with pytest.raises(UserError, match=word):
        PPOConfig(output_dir=str(tmp_path), **changes)


def test_policy_and_critic_have_their_own_limit_of_gradients(tmp_path):
    taken = gradients(make("ppo", tmp_path, steps=1, max_grad_norm=0.01,
                           critic_max_grad_norm=0.002))
    assert taken["policy"].norm() == pytest.approx(0.01, rel=1e-3)
    assert taken["critic"].norm() == pytest.approx(0.002, rel=1e-3)


def test_a_lambda_by_length_reaches_the_advantages(tmp_path):
    def found(**changes):
        trainer = make("ppo", tmp_path, scale_rewards="none", max_completion_length=6, **changes)
        with torch.no_grad():
            trainer.critic.head.weight.normal_(generator=torch.Generator().manual_seed(0))
        return rollout_of(trainer)

    plain, adaptive = found(), found(length_adaptive_alpha=0.5)
    lengths = adaptive["completion_mask"].sum(1)
    for row in range(len(lengths)):
        lam = max(0.0, 1 - 1 / (0.5 * float(lengths[row])))
        part = slice(row, row + 1)
        expected, _ = gae(
            terminal_rewards(plain["returns"][part, 0], plain["completion_mask"][part]),
            plain["values"][part], plain["completion_mask"][part], 1.0, lam)
        assert torch.allclose(adaptive["advantages"][part], expected, atol=1e-5)
    assert not torch.allclose(adaptive["advantages"], plain["advantages"], atol=1e-3)
    assert torch.equal(adaptive["returns"], plain["returns"]), "the critic's targets stay"


@pytest.mark.parametrize("changes, expected", [
    ({"baseline": "none"}, [0.7] * 16), ({"baseline": "leave_one_out"}, [0.0] * 16),
    ({"baseline_floor": 0.9}, [-0.2] * 16), ({}, [0.0] * 16)])
def test_the_baseline_is_a_setting_of_grpo(changes, expected, tmp_path):
    trainer = make("grpo", tmp_path, reward=constant_reward, scale_rewards="none", **changes)
    assert rollout_of(trainer)["advantages"].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("changes, word", [
    ({"baseline": "median"}, "baseline"), ({"baseline": "none", "baseline_floor": 0.0},
                                           "baseline_floor")])
def test_impossible_baselines_name_their_field(changes, word, tmp_path):
    with pytest.raises(UserError, match=word):
        GRPOConfig(output_dir=str(tmp_path), **changes)


# -- rewards ---------------------------------------------------------------------------------------

def rollout_of(trainer):
    trainer.model.train()
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def holes(completions, **kwargs):
    return [[1.0, None, 0.0, None][i % 4] for i in range(len(completions))]


@pytest.mark.parametrize("scale, sizes", [("none", 0.5), ("group", 0.5 / (0.5 ** 0.5 + 1e-4))])
def test_unscorable_completions_enter_neither_mean_nor_deviation(scale, sizes, tmp_path):
    trainer = make("grpo", tmp_path, reward=holes, scale_rewards=scale)
    found = rollout_of(trainer)["advantages"].view(-1, 4)
    assert torch.allclose(found, torch.tensor([sizes, 0, -sizes, 0]).expand_as(found))


def test_penalties_of_unscorable_completions_move_no_other(tmp_path):
    trainer = make("grpo", tmp_path, reward=holes, kl_coef=0.1, scale_rewards="none")
    token_kl = trainer._token_kl

    def watched(rollout, mask):
        kl = token_kl(rollout, mask)
        kl[1::2] = 7 * mask[1::2]  # the unscorable ones
        return kl

    trainer._token_kl = watched
    found = rollout_of(trainer)["advantages"].view(-1, 4)
    assert torch.allclose(found, torch.tensor([0.5, 0, -0.5, 0]).expand_as(found), atol=1e-5)


def test_whitening_leaves_unscorable_completions_out(tmp_path):
    trainer = make("ppo", tmp_path, reward=holes, num_generations=4, scale_rewards="whiten")
    rollout = rollout_of(trainer)
    inside = rollout["value_mask"].bool()
    found = rollout["advantages"][inside]
    assert found.mean().abs() < 1e-5 and abs(found.std() - 1) < 1e-4
    assert (rollout["advantages"][~inside] == 0).all() and inside.any() and not inside.all()


@pytest.mark.parametrize("arm", ARMS)
def test_logged_advantages_are_those_trained_on(arm, tmp_path):
    trainer = make(arm, tmp_path, num_generations=4, scale_rewards="batch")
    rollout = rollout_of(trainer)
    found = rollout["advantages"]
    if arm == "ppo":
        mask = rollout["completion_mask"]
        found = (found * mask).sum(1) / mask.sum(1)
    assert list(trainer._logs["advantages"]) == pytest.approx(found.tolist(), abs=1e-6)


class Scorer:
    """A reward function that is an object."""

    def __init__(self, value):
        self.value = value

    def __call__(self, completions, **kwargs):
        if isinstance(self.value, Exception):
            raise self.value
        return [self.value] * len(completions)


async def raising_async(completions, **kwargs):
    raise KeyError("risk")


def filled(completions, value, **kwargs):
    return [value] * len(completions)


@pytest.mark.parametrize("reward, words", [
    (Scorer("good"), "Scorer .*'good'"), (Scorer(KeyError("risk")), "Scorer raised KeyError"),
    (functools.partial(filled, value="good"), "filled .*'good'"),
    (raising_async, "raising_async raised KeyError"),
    (lambda completions, **kwargs: np.float64(1), "float64"),
    (lambda completions, **kwargs: np.ones((len(completions), 1)), r"\[1.0\]")])
def test_every_kind_of_bad_reward_function_is_named(reward, words, tmp_path):
    with pytest.raises(UserError, match=words):
        rollout_of(make("grpo", tmp_path, reward=reward))


@pytest.mark.parametrize("reward", [
    lambda completions, **kwargs: np.linspace(0, 1, len(completions)),
    lambda completions, **kwargs: list(np.linspace(0, 1, len(completions), dtype=np.float32)),
    lambda completions, **kwargs: list(torch.linspace(0, 1, len(completions)))])
def test_rewards_may_be_arrays_and_their_scalars(reward, tmp_path):
    trainer = make("grpo", tmp_path, reward=reward)
    rollout_of(trainer)
    assert trainer._rewards_per_func[:, 0].tolist() == pytest.approx(
        np.linspace(0, 1, 16).tolist())


# -- arguments -------------------------------------------------------------------------------------

def test_arguments_come_in_the_order_of_trl(tmp_path):
    base, tokenizer = policy()
    args = GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=8)
    train, held_out = prompts(8), prompts(4)
    trainer = GRPOTrainer(base, length_reward, args, train, held_out, tokenizer)
    assert len(trainer.train_dataset) == 8 and len(trainer.eval_dataset) == 4
    assert trainer.processing_class is tokenizer


def test_a_config_of_trl_is_told_from_ours(tmp_path):
    base, tokenizer = policy()
    with pytest.raises(UserError, match=r"a ueba_helpers\.rl\.trainers\.GRPOConfig.* a trl\."):
        GRPOTrainer(base, length_reward, trl.GRPOConfig(output_dir=str(tmp_path), bf16=False),
                    prompts(), processing_class=tokenizer)


def test_a_value_model_without_a_backbone_is_refused(tmp_path):
    base, tokenizer = policy()
    with pytest.raises(UserError, match=r"value_model is a Linear .*backbone"):
        PPOTrainer(base, length_reward,
                   PPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4), prompts(),
                   processing_class=tokenizer, value_model=torch.nn.Linear(2, 2))


@pytest.mark.parametrize("arm, changes, word", [
    ("ppo", {}, "critic"), ("grpo", {"kl_coef": 0.1}, "kl_placement")])
def test_images_are_refused_where_they_would_be_dropped(arm, changes, word, tmp_path, monkeypatch):
    from ueba_helpers.rl import trainers

    start = trainers.trl.GRPOTrainer.__init__

    def with_images(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self._is_vlm = True

    monkeypatch.setattr(trainers.trl.GRPOTrainer, "__init__", with_images)
    with pytest.raises(UserError, match=word):
        make(arm, tmp_path, **changes)
    make("grpo", tmp_path, kl_coef=0.1, kl_placement="loss")


def test_the_kl_is_of_the_policy_that_is_updated_not_of_another_engines_numbers(tmp_path):
    trainer = make("grpo", tmp_path, kl_coef=0.1)
    zeros = torch.zeros(2, 3)
    rollout = {"sampling_per_token_logps": zeros - 9, "old_per_token_logps": zeros - 1,
               "ref_per_token_logps": zeros - 2}
    assert torch.equal(trainer._token_kl(rollout, zeros + 1), zeros + 1)


def test_the_largest_ratio_of_a_step_is_not_averaged(tmp_path):
    trainer = make("grpo", tmp_path, steps=1)
    trainer.model.train()
    trainer._metrics["train"]["ratio/max"] = [1.0, 3.0, 2.0]
    logs = {}
    trainer.log(logs)
    assert logs["ratio/max"] == 3.0


def test_only_a_shared_critic_keeps_hidden_states(tmp_path):
    kept = {}
    for critic in ("separate", "shared"):
        trainer = make("ppo", tmp_path, critic=critic, steps=1)
        trainer.train()
        kept[critic] = "states" in trainer._scored
    assert kept == {"separate": False, "shared": True}


def test_every_rank_has_written_before_a_checkpoint_is_sealed(tmp_path, monkeypatch):
    from ueba_helpers.rl import trainers

    trainer = make("grpo", tmp_path, steps=1, save_strategy="steps", save_steps=1)
    order, saved, seal = [], trainer._save_rng_state, trainers.seal
    trainer._save_rng_state = lambda folder: order.append("write") or saved(folder)
    wait = trainer.accelerator.wait_for_everyone
    trainer.accelerator.wait_for_everyone = lambda: order.append("wait") or wait()
    monkeypatch.setattr(trainers, "seal", lambda folder: order.append("seal") or seal(folder))
    trainer.train()
    assert order[order.index("write"):order.index("seal") + 1] == ["write", "wait", "seal"]


@pytest.mark.parametrize("changes, warned", [
    ({"gradient_checkpointing": True}, 1), ({"shared_prefix": False}, 0), ({}, 0)])
def test_an_unwanted_plain_path_is_told_once(changes, warned, tmp_path, monkeypatch):
    from ueba_helpers.rl import trainers

    told = []
    monkeypatch.setattr(trainers.logger, "warning", lambda *words, **_: told.append(words[0]))
    trainer = make("grpo", tmp_path, **changes)
    assert len([words for words in told if "prompts are not shared" in words]) == warned
    assert (trainer._why_plain is None) == (not changes)
