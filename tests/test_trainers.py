"""PPO and GRPO: probes that only learning can pass, laws of the loss, exact resume, bad rewards."""

import math
from itertools import chain

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback

from tests.tiny import policy, probe_policy
from ueba_helpers.errors import UserError
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


@pytest.mark.parametrize("arm", ARMS)
def test_two_prompts_with_one_right_word_each_are_learned(arm, tmp_path):
    trainer = make(arm, tmp_path, reward=first_token_reward, steps=80, source=probe_policy,
                   per_device_train_batch_size=64, num_generations=16, max_completion_length=1,
                   learning_rate=5e-3)
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
            if "critic" in vars(trainer).get("_modules", {}) or trainer._name == "PPO":
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


def moved(trainer):
    """Train; return for each step whether the policy moved and whether the critic did."""
    last, rows = [flat(trainer.model), flat(trainer.critic)], []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            now = [flat(trainer.model), flat(trainer.critic)]
            rows.append([not torch.equal(a, b) for a, b in zip(last, now, strict=True)])
            last[:] = now

    torch.nn.init.normal_(trainer.critic.weight, generator=torch.Generator().manual_seed(1))
    last[1] = flat(trainer.critic)
    trainer.add_callback(Watch())
    trainer.train()
    return rows


@pytest.mark.parametrize("warm_up, policy_moves", [(2, [False, False]), (1, [False, True])])
def test_a_shared_critic_leaves_the_policy_alone_in_its_warm_up(warm_up, policy_moves, tmp_path):
    rows = moved(make("ppo", tmp_path, critic="shared", steps=2, critic_warmup_steps=warm_up,
                      weight_decay=0.1))
    assert rows == [[policy, True] for policy in policy_moves]


@pytest.mark.parametrize("loss", ["both", "policy", "value"])
def test_without_warm_up_either_loss_of_a_shared_critic_moves_the_policy(loss, tmp_path):
    """The broken twin: neither the policy's loss nor the critic's is idle by chance."""
    trainer = make("ppo", tmp_path, critic="shared", steps=2, critic_warmup_steps=0,
                   vf_coef=0.0 if loss == "policy" else 1.0)
    if loss == "value":
        advantages = trainer._advantages
        trainer._advantages = lambda *args: 0 * advantages(*args)
    assert moved(trainer) == [[True, loss != "policy"]] * 2


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
    from peft import get_peft_model

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
    ({"scale_rewards": "whiten"}, "scale_rewards")])
def test_impossible_settings_name_their_field(changes, word, tmp_path):
    with pytest.raises(UserError, match=word):
        GRPOConfig(output_dir=str(tmp_path), **changes)


def test_a_dataset_smaller_than_one_rollout_is_refused(tmp_path):
    with pytest.raises(UserError, match="one rollout takes 4"):
        make("grpo", tmp_path, count=2).train()


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
