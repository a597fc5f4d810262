"""PPO against TRL 1.12's own PPOTrainer, on two fixed batches; by hand the rest.

By hand: the advantages of GRPO and PPO with the KL in the reward, and the clipped branches.

The reference numbers are recorded by `tests/fixtures/make_trl_ppo_fixture.py`. Where TRL 1.12 puts
a completion's score on the first padding after its end ("ragged"), the same sums are asked of the
pure functions with a mask one token longer; the trainer itself scores the last token.
"""

import json
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from ueba_helpers.rl import advantages as estimators
from ueba_helpers.rl.policies import Critic
from ueba_helpers.rl.trainers import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 1e-5  # relative, in the Euclidean norm
ALL = load_file(FIXTURES / "trl_ppo_1_12.safetensors")
FACTS = json.loads((FIXTURES / "trl_ppo_1_12.json").read_text(encoding="utf-8"))
SETTINGS = FACTS["settings"]
PAD, EOS = FACTS["architecture"]["pad_token_id"], FACTS["architecture"]["eos_token_id"]


def stored(prefix):
    """Return the fixture's tensors whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in ALL.items()
            if name.startswith(prefix)}


def tokenizer():
    size = FACTS["architecture"]["vocab_size"]
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)),
                                   pad_token="<pad>", eos_token="<eos>", padding_side="left")


def set_policy(model, name):
    model.load_state_dict(stored(f"weights.{name}."), strict=False)  # the head is tied


def set_critic(critic, name):
    weights = stored(f"weights.{name}.")
    critic.head.weight.data.copy_(weights.pop("score.weight"))
    critic.backbone.load_state_dict({key.removeprefix("model."): x for key, x in weights.items()})


ARMS = {"grpo": (GRPOTrainer, GRPOConfig), "ppo": (PPOTrainer, PPOConfig)}


def make(arm, folder, **settings):
    """Return our trainer of the fixture's size; its reference is the fixture's."""
    trainer_class, config_class = ARMS[arm]
    config = Qwen3Config(**FACTS["architecture"])
    model = Qwen3ForCausalLM(config)
    set_policy(model, "reference")
    critic = {"value_model": Critic(Qwen3Model(config))} if arm == "ppo" else {}
    trainer = trainer_class(
        model, lambda completions, **_: [0.0] * len(completions),
        config_class(output_dir=str(folder), max_completion_length=8, use_cpu=True, **settings),
        processing_class=tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": "w2"}] * 16), **critic)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def trainer_like_trl(folder, **changes):
    """Return our trainer with TRL 1.12's settings."""
    settings = {
        "per_device_train_batch_size": len(ALL["full.scores"]), "num_generations": FACTS["group"],
        "temperature": SETTINGS["temperature"], "kl_coef": SETTINGS["kl_coef"],
        "epsilon": SETTINGS["cliprange"], "epsilon_high": SETTINGS["cliprange"],
        "value_clip": SETTINGS["cliprange_value"], "vf_coef": SETTINGS["vf_coef"],
        "gamma": SETTINGS["gamma"], "lam": SETTINGS["lam"], "critic_lam": SETTINGS["lam"],
        "missing_eos_penalty": SETTINGS["missing_eos_penalty"], "scale_rewards": "whiten",
        **changes}
    return make("ppo", folder, **settings)


def rollout_of(batch):
    """Return the fixture's batch as TRL's GRPOTrainer hands a rollout over."""
    prompts, completions = ALL[f"{batch}.prompt_ids"], ALL[f"{batch}.completion_ids"]
    mask = (completions != PAD).long()
    return {"prompt_ids": prompts, "prompt_mask": (prompts != PAD).long(),
            "completion_ids": completions, "completion_mask": mask,
            "num_items_in_batch": mask.sum(), "advantages": torch.zeros(len(prompts))}


def score(trainer, batch, monkeypatch):
    """Return what the trainer makes of the fixture's completions, with the rollout's weights."""
    set_policy(trainer.model, "rollout.policy")
    set_critic(trainer.critic, "rollout.value")
    rollout = rollout_of(batch)
    trainer._rewards_per_func = ALL[f"{batch}.scores"].unsqueeze(1)
    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions",
                        lambda self, inputs: rollout)
    scored = trainer._generate_and_score_completions([])
    scored["old_per_token_logps"] = trainer._rollout_log_probs(trainer.model, rollout)
    return scored


def update(trainer, scored):
    """Return losses and gradients of the update's weights on a scored rollout."""
    set_policy(trainer.model, "policy")
    set_critic(trainer.critic, "value")
    trainer.model.zero_grad()
    trainer.critic.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer._compute_loss(trainer.model, scored)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    value_loss = metrics["critic/value_loss"]
    tokens = scored["num_items_in_batch"] / scored["value_mask"].sum()  # the loss's own divisor
    return {
        "policy loss": (loss - trainer.args.vf_coef * value_loss / tokens).detach(),
        "value loss": torch.tensor(value_loss),
        "policy clipped": metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"],
        "value clipped": metrics["critic/clip_ratio"], "metrics": metrics,
        "policy gradient": torch.cat([p.grad.flatten() for _, p in
                                      sorted(trainer.model.named_parameters())]),
        "value gradient": torch.cat(
            [trainer.critic.head.weight.grad.flatten(),
             *(p.grad.flatten() for _, p in sorted(trainer.critic.backbone.named_parameters()))]),
    }


def expected(batch):
    """Return TRL 1.12's losses and gradients in the shape of `update`."""
    results = FACTS["results"][batch]
    policy, value = stored(f"{batch}.gradients.policy."), stored(f"{batch}.gradients.value.")
    head = value.pop("score.weight")
    return {
        "policy loss": torch.tensor(results["loss/policy_avg"]),
        "value loss": torch.tensor(results["loss/value_avg"]),
        "policy clipped": results["policy/clipfrac_avg"],
        "value clipped": results["val/clipfrac_avg"],
        "policy gradient": torch.cat([x.flatten() for _, x in sorted(policy.items())]),
        "value gradient": torch.cat([head.flatten(), *(x.flatten() for _, x
                                                       in sorted(value.items()))]),
    }


def distance(found, reference):
    """Return the relative difference of two tensors."""
    return ((found - reference).norm() / reference.norm()).item()


QUANTITIES = ("policy loss", "value loss", "policy gradient", "value gradient")


def test_whitened_advantages_and_returns_are_those_of_trl(tmp_path, monkeypatch):
    scored = score(trainer_like_trl(tmp_path), "full", monkeypatch)
    assert distance(scored["values"], ALL["full.rollout_values"]) < TOLERANCE
    assert distance(scored["returns"], ALL["full.returns"]) < TOLERANCE
    assert distance(scored["advantages"], ALL["full.whitened_advantages"]) < TOLERANCE


@pytest.mark.parametrize("wrong", [
    {"lam": 1.0}, {"gamma": 0.9}, {"kl_coef": 0.0}, {"missing_eos_penalty": 0.0},
    {"temperature": 1.0}, {"scale_rewards": "none"}])
def test_advantages_under_another_setting_are_not(wrong, tmp_path, monkeypatch):
    scored = score(trainer_like_trl(tmp_path, **wrong), "full", monkeypatch)
    assert distance(scored["advantages"], ALL["full.whitened_advantages"]) > 100 * TOLERANCE


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_losses_and_gradients_are_those_of_trl(shared_prefix, tmp_path, monkeypatch):
    trainer = trainer_like_trl(tmp_path, shared_prefix=shared_prefix)
    found, reference = update(trainer, score(trainer, "full", monkeypatch)), expected("full")
    for name in QUANTITIES:
        assert distance(found[name], reference[name]) < TOLERANCE, name


@pytest.mark.parametrize("wrong, broken", [
    ({"epsilon": 0.3}, "policy gradient"), ({"epsilon_high": 0.3}, "policy gradient"),
    ({"value_clip": None}, "value gradient"), ({"vf_coef": 0.11}, "value gradient"),
    ({"temperature": 1.0}, "policy gradient")])
def test_losses_and_gradients_under_another_setting_are_not(wrong, broken, tmp_path, monkeypatch):
    trainer = trainer_like_trl(tmp_path, **wrong)
    found = update(trainer, score(trainer, "full", monkeypatch))
    assert distance(found[broken], expected("full")[broken]) > 100 * TOLERANCE


def test_clipped_shares_are_those_of_trl(tmp_path, monkeypatch):
    trainer = trainer_like_trl(tmp_path)
    found, reference = update(trainer, score(trainer, "full", monkeypatch)), expected("full")
    for name in ("policy clipped", "value clipped"):
        assert found[name] == pytest.approx(reference[name], abs=1e-6)
        assert 0.1 < reference[name] < 0.9, "the fixture must meet both branches"
    assert found["metrics"]["clip_ratio/low_mean"] > 0.05
    assert found["metrics"]["clip_ratio/high_mean"] > 0.05


# -- completions of several lengths: the score on the first padding -----------------------------

def one_longer(mask):
    """Return the mask with the first padding after each completion taken in."""
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1)


def scored_after_end(trainer, monkeypatch, mask_of=one_longer):
    """Return the ragged rollout with TRL 1.12's reward position, from the pure functions."""
    scored = score(trainer, "ragged", monkeypatch)
    mask = scored["completion_mask"].float()
    longer = mask_of(mask)
    rewards, _ = trainer._scores(scored)
    del scored["old_per_token_logps"]
    penalties = trainer.args.kl_coef * trainer._token_kl(scored, mask)
    values = trainer._values(scored, longer).detach()
    advantages, returns = estimators.gae(
        estimators.terminal_rewards(rewards, longer) - penalties, values, longer,
        trainer.args.gamma, trainer.args.lam)
    scored |= {"values": values, "returns": returns, "value_mask": longer,
               "advantages": estimators.whiten(advantages, mask),
               "old_per_token_logps": trainer._rollout_log_probs(trainer.model, scored)}
    # The trainer divides the value loss by the policy's tokens, TRL 1.12 by the value mask's.
    trainer.args.vf_coef = SETTINGS["vf_coef"] * (mask.sum() / longer.sum()).item()
    return scored


def test_ragged_completions_agree_with_the_score_after_the_end(tmp_path, monkeypatch):
    trainer = trainer_like_trl(tmp_path)
    scored = scored_after_end(trainer, monkeypatch)
    assert distance(scored["values"], ALL["ragged.rollout_values"]) < TOLERANCE
    assert distance(scored["returns"], ALL["ragged.returns"]) < TOLERANCE
    assert distance(scored["advantages"], ALL["ragged.whitened_advantages"]) < TOLERANCE
    found, reference = update(trainer, scored), expected("ragged")
    for name in QUANTITIES:
        assert distance(found[name], reference[name]) < TOLERANCE, name
    for name in ("policy clipped", "value clipped"):
        assert found[name] == pytest.approx(reference[name], abs=1e-6)


def test_ragged_completions_disagree_with_the_score_on_the_last_token(tmp_path, monkeypatch):
    trainer = trainer_like_trl(tmp_path)
    scored = scored_after_end(trainer, monkeypatch, mask_of=lambda mask: mask)
    assert distance(scored["advantages"], ALL["ragged.whitened_advantages"]) > 0.01


def test_a_mean_of_sequence_means_is_not_the_loss_of_trl(tmp_path, monkeypatch):
    trainer = trainer_like_trl(tmp_path, loss_type="grpo")
    found = update(trainer, scored_after_end(trainer, monkeypatch))
    difference = distance(found["policy gradient"], expected("ragged")["policy gradient"])
    assert difference > 100 * TOLERANCE


def test_whitening_over_the_padding_is_not_that_of_trl(tmp_path, monkeypatch):
    trainer = trainer_like_trl(tmp_path)
    scored = scored_after_end(trainer, monkeypatch)
    padded = estimators.whiten(scored["advantages"], torch.ones_like(scored["advantages"]))
    inside = scored["completion_mask"].float()
    assert distance(padded * inside, ALL["ragged.whitened_advantages"]) > 100 * TOLERANCE


# -- the KL in the reward, by hand ---------------------------------------------------------------

KL_COEF, GAMMA, LAM = 0.2, 0.9, 0.8
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
SCORES = torch.tensor([1.0, 0.0, 0.5, -1.0])
# Outside the mask stand numbers that would be seen if they counted.
SAMPLED = torch.tensor([[-1, -2, -1], [-.5, -1, 9], [-2, 9, 9], [-1, -1, -1]])
REFERENCE = torch.tensor([[-1.5, -1, -3], [-1, -3, -7], [-1, -7, -7], [-2, -1.5, -3]])
TOKEN_KL = torch.tensor([[.5, -1, 2], [.5, 2, 0], [-1, 0, 0], [1, .5, 2]])
VALUES = torch.tensor([[.5, .2, .1], [0, .4, 0], [.3, 0, 0], [-.2, .1, .6]])
# SCORES - 0.2 (1.5, 2.5, -1, 3.5) = (0.7, -0.5, 0.7, -1.7): squares around the mean of -0.2 sum to
# 3.96, over 3 degrees of freedom.
SCALE = 1.32 ** 0.5 + 1e-4
CENTRED = torch.tensor([.6, -.6, 1.2, -1.2])  # by pairs, whose means are 0.1 and -0.5
# Token rewards are (-.1, .2, .6), (-.1, -.4), (.7), (-.2, -.1, -1.4), and A = delta + 0.72 A'.
GAE = torch.tensor([[-.096, .45, .5], [-.316, -.8, 0], [.4, 0, 0], [-.702, -1.1, -2]])
RETURNS = torch.tensor([[.404, .65, .6], [-.316, -.4, 0], [.7, 0, 0], [-.902, -1, -1.4]])
# With a lambda of one: the discounted sums of the token rewards.
RETURNS_AT_1 = torch.tensor([[.566, .74, .6], [-.46, -.4, 0], [.7, 0, 0], [-1.424, -1.36, -1.4]])


def score_by_hand(arm, folder, monkeypatch, **changes):
    """Return the scored rollout of the numbers above, under the settings a study leaves alone."""
    if arm == "ppo":
        changes = {"gamma": GAMMA, "lam": LAM, "critic_lam": LAM} | changes
    trainer = make(arm, folder, per_device_train_batch_size=4, num_generations=2,
                   kl_coef=KL_COEF, **changes)
    assert (trainer.args.kl_placement, trainer.args.scale_rewards) == ("reward", "batch")
    rollout = {"prompt_ids": torch.full((4, 1), 2), "prompt_mask": torch.ones(4, 1).long(),
               "completion_ids": torch.full((4, 3), 5) * MASK, "completion_mask": MASK,
               "num_items_in_batch": MASK.sum(), "advantages": torch.zeros(4),
               "sampling_per_token_logps": SAMPLED}

    def log_probs(model, batch):
        assert model is trainer._reference and batch is rollout
        return REFERENCE

    trainer._rewards_per_func = SCORES.unsqueeze(1)
    trainer._rollout_log_probs = log_probs
    trainer._rollout_values = lambda batch, mask: VALUES
    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions",
                        lambda self, inputs: rollout)
    scored = trainer._generate_and_score_completions([])
    metrics = trainer._metrics["train"]
    assert metrics["kl_to_reference/per_completion"] == [pytest.approx(6.5 / 4)]
    assert metrics["kl_to_reference/per_token"] == [pytest.approx(6.5 / 9)]
    return scored


def by_formula(arm, flaw=None):
    """Return the advantages from the pure functions, right without a flaw."""
    mask = MASK.float()
    kl = TOKEN_KL
    if flaw == "k3":
        kl = estimators.kl_estimate(SAMPLED, REFERENCE, "k3") * mask
    if flaw == "averaged":
        kl = kl / mask.sum(1, keepdim=True)
    if flaw == "padding counted":
        kl = SAMPLED - REFERENCE
    penalties = {"plus": -KL_COEF, "no KL": 0.0}.get(flaw, KL_COEF) * kl
    totals = SCORES - penalties.sum(1)
    scale = estimators.reward_scale(totals, 2, "batch")
    if arm == "grpo":
        advantages = estimators.group_relative(totals, 2, "batch")
        return advantages * scale ** 2 if flaw == "multiplied" else advantages
    scale = scale.unsqueeze(1)
    rewards = estimators.terminal_rewards(SCORES, mask) - penalties
    advantages = estimators.gae(rewards, VALUES, mask, GAMMA, LAM)[0]
    return advantages * scale if flaw == "multiplied" else advantages / scale


def test_grpo_takes_the_kl_of_the_completion_off_its_reward(tmp_path, monkeypatch):
    advantages = score_by_hand("grpo", tmp_path, monkeypatch)["advantages"]
    assert distance(advantages, CENTRED / SCALE) < TOLERANCE
    assert distance(advantages, by_formula("grpo")) < TOLERANCE


def test_ppo_takes_the_kl_of_each_token_off_its_reward(tmp_path, monkeypatch):
    scored = score_by_hand("ppo", tmp_path, monkeypatch)
    assert distance(scored["advantages"], GAE / SCALE) < TOLERANCE
    assert distance(scored["advantages"], by_formula("ppo")) < TOLERANCE
    assert distance(scored["returns"], RETURNS) < TOLERANCE


@pytest.mark.parametrize("arm", ARMS)
def test_another_kl_or_scale_would_be_noticed(arm):
    """The twin: none of these formulas gives the numbers worked out by hand."""
    right = {"grpo": CENTRED, "ppo": GAE}[arm] / SCALE
    assert distance(by_formula(arm), right) < TOLERANCE
    for flaw in ("plus", "no KL", "averaged", "k3", "padding counted", "multiplied"):
        assert distance(by_formula(arm, flaw), right) > 0.05, flaw


def test_the_critic_s_own_lambda_changes_its_targets_only(tmp_path, monkeypatch):
    scored = score_by_hand("ppo", tmp_path, monkeypatch, critic_lam=1.0)
    assert distance(scored["returns"], RETURNS_AT_1) < TOLERANCE
    assert distance(scored["advantages"], GAE / SCALE) < TOLERANCE
    # The twin: targets of the policy's lambda, and advantages of the critic's, are others.
    assert distance(RETURNS, RETURNS_AT_1) > 0.05
    assert distance((RETURNS_AT_1 - VALUES) / SCALE, GAE / SCALE) > 0.05


# -- the branches by hand ------------------------------------------------------------------------

POLICY_BRANCHES = [  # ratio, advantage, loss = -min(ratio A, clip(ratio, .8, 1.28) A), clipped
    (1.5, 2.0, -2.56, True), (0.5, 2.0, -1.0, False), (1.5, -2.0, 3.0, False),
    (0.5, -2.0, 1.6, True), (1.25, 2.0, -2.5, False), (0.9, -2.0, 1.8, False)]


def one_token(trainer, ratio, advantage):
    """Return a rollout of one token whose ratio to the present policy is given."""
    set_policy(trainer.model, "policy")
    set_critic(trainer.critic, "value")
    whole = rollout_of("full")
    batch = {name: whole[name][:1] for name in ("prompt_ids", "prompt_mask")} | {
        name: whole[name][:1, :1] for name in ("completion_ids", "completion_mask")}
    now = trainer._rollout_log_probs(trainer.model, batch)
    mask = batch["completion_mask"].float()
    return batch | {
        "num_items_in_batch": torch.tensor(1), "advantages": torch.tensor([[advantage]]),
        "old_per_token_logps": now - torch.tensor(ratio).log(), "value_mask": mask,
        "values": 0 * mask, "returns": 0 * mask}


@pytest.mark.parametrize("ratio, advantage, loss, clipped", POLICY_BRANCHES)
def test_the_clipped_branches_of_the_policy_by_hand(ratio, advantage, loss, clipped, tmp_path):
    trainer = trainer_like_trl(tmp_path, epsilon=0.2, epsilon_high=0.28, vf_coef=0.0)
    found = trainer._compute_loss(trainer.model, one_token(trainer, ratio, advantage))
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-5)
    gradient = sum(p.grad.abs().sum() for p in trainer.model.parameters())
    assert (gradient.item() == 0) is clipped


@pytest.mark.parametrize("delta, loss, clipped", [(3.0, 6.0, True), (None, 10.0, False)])
def test_dual_clip_bounds_the_ratio_of_a_bad_token(delta, loss, clipped, tmp_path):
    """-min(min(5, delta) A, 1.28 A) with A = -2 (Ye et al. 2020, arXiv:1912.09729)."""
    trainer = trainer_like_trl(tmp_path, epsilon=0.2, epsilon_high=0.28, vf_coef=0.0, delta=delta)
    found = trainer._compute_loss(trainer.model, one_token(trainer, 5.0, -2.0))
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-4)
    gradient = sum(p.grad.abs().sum() for p in trainer.model.parameters())
    assert (gradient.item() == 0) is clipped


def test_the_table_of_branches_tells_other_surrogates_apart():
    for wrong in (lambda r, a: -r * a, lambda r, a: -min(max(r, 0.8), 1.28) * a,
                  lambda r, a: -max(r * a, min(max(r, 0.8), 1.28) * a)):
        assert any(abs(wrong(r, a) - loss) > 0.1 for r, a, loss, _ in POLICY_BRANCHES)


VALUE_BRANCHES = [  # value (before: 0), return, loss = max of both halved squares, clipped
    (1.0, 2.0, 1.62, True), (1.0, -1.0, 2.0, False), (-1.0, -2.0, 1.62, True),
    (0.1, 2.0, 1.805, False), (1.0, 0.1, 0.405, False)]


def value_loss(trainer, value, target):
    """Return the value loss for a critic that says `value` everywhere, and its gradient."""
    batch = one_token(trainer, 1.0, 0.0)
    torch.nn.init.zeros_(trainer.critic.head.weight)
    torch.nn.init.constant_(trainer.critic.head.bias, value)
    batch["returns"] = torch.tensor([[target]])
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), trainer.critic.head.bias.grad.item()


@pytest.mark.parametrize("value, target, loss, clipped", VALUE_BRANCHES)
def test_the_clipped_branches_of_the_value_by_hand(value, target, loss, clipped, tmp_path):
    found, gradient = value_loss(trainer_like_trl(tmp_path, vf_coef=1.0), value, target)
    assert found == pytest.approx(loss, abs=1e-5)
    assert gradient == pytest.approx(0.0 if clipped else value - target, abs=1e-5)


def test_an_unclipped_value_loss_would_be_noticed(tmp_path):
    value, target, loss, _ = VALUE_BRANCHES[0]
    found, _ = value_loss(trainer_like_trl(tmp_path, vf_coef=1.0, value_clip=None), value, target)
    assert abs(found - loss) > 0.1
