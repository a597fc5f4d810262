"""Recipes: demonstrations held back as stated, runs that resume and repeat byte for byte."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import SETTINGS, TEXTS, checkpoint, policy
from ueba_helpers.errors import UserError
from ueba_helpers.rl import recipes
from ueba_helpers.rl.checkpoints import SEAL_FILE, is_whole, latest_checkpoint
from ueba_helpers.rl.policies import load_policy
from ueba_helpers.rl.rollouts import tokenize_prompts
from ueba_helpers.rl.settings import GRPOSettings, PolicySettings, PPOSettings, SFTSettings
from ueba_helpers.study import evaluation
from ueba_helpers.task.verdicts import render_verdict

POLICY = PolicySettings(vocab_size=512, hidden_size=32, layers=2, max_completion_tokens=16)
LABELS = ("normal", "suspicious", "malicious")
BOTH = {"grpo": (recipes.grpo, GRPOSettings), "ppo": (recipes.ppo, PPOSettings)}


def rows(count=16):
    """Return prompt rows with every column that the rewards read."""
    return [{"prompt": [{"role": "user", "content": TEXTS[0].split()[i % 8]}],
             "window_id": f"w{i}", "user": f"u{i % 4}", "day": "2010-07-01",
             "label": LABELS[i % 3], "evidence_ids": ["e1", "e2"], "evidence_truth": ["e1"],
             "dont_care": [], "feature_truth": ["usual_hours", "own_workstation"],
             "item_text": {"e1": "e1 08:00 logon pc1", "e2": "e2 09:00 http pc1"},
             "style": "evidence_first"} for i in range(count)]


def train(method, out, *, seed=0, steps=4, **changes):
    recipe, settings = BOTH[method]
    changes.setdefault("save_steps", 2)
    if method == "ppo":
        changes.setdefault("critic_warmup_steps", 1)
    policy_settings = changes.pop("policy_settings", POLICY)
    return recipe(checkpoint(), out, rows(), settings(
        steps=steps, prompts_per_step=2, num_generations=4, micro_batch_prompts=2,
        learning_rate=1e-3, seed=seed, **changes), policy_settings, held_out=rows(6),
        evaluate_every=2)


def weights(folder):
    return torch.cat([p.detach().flatten() for p in load_policy(folder, POLICY).parameters()])


def test_labels_are_lowered_and_shuffled_as_often_as_stated():
    labels = ["malicious"] * 4000 + ["normal"] * 4000
    said = recipes.demonstrated_labels(labels, SFTSettings(downgrade=0.3, label_noise=0.2), seed=1)
    lowered = sum(s == "suspicious" for s in said[:4000]) / 4000
    kept = sum(s == "normal" for s in said[4000:]) / 4000
    assert lowered == pytest.approx(0.8 * 0.3 + 0.2 / 3, abs=0.03)
    assert kept == pytest.approx(0.8 + 0.2 / 3, abs=0.03), "normal has no lower level"
    clean = recipes.demonstrated_labels(labels, SFTSettings(), seed=1)
    assert clean == labels
    kept_all = sum(label == "suspicious" for label in clean[:4000]) / 4000
    assert kept_all != pytest.approx(0.8 * 0.3 + 0.2 / 3, abs=0.03), "the check can fail"


def test_sft_learns_the_demonstrations_word_for_word(tmp_path):
    answer = render_verdict(evidence=[], features=["usual_hours", "own_workstation"],
                            basis="nothing.", risk="normal")
    shown = [{**row, "completion": answer} for row in rows(8)]
    losses = []
    settings = SFTSettings(examples=8, epochs=200, batch_size=8, learning_rate=1e-2)
    policy_settings = PolicySettings(vocab_size=512, hidden_size=32, layers=2)
    trained = recipes.sft(checkpoint(), tmp_path, shown, settings, policy_settings, seed=0,
                          on_step=lambda step, values: losses.append(values["loss"]))
    assert losses[-1] < 0.1 < 3 < losses[0]
    assert not torch.equal(weights(trained.policy), weights(checkpoint()))


def short_sft(out, **changes):
    """Nine steps on ten demonstrations with changed settings; the run and its losses by step."""
    answer = render_verdict(evidence=[], features=["usual_hours", "own_workstation"],
                            basis="nothing.", risk="normal")
    settings = SFTSettings(examples=10, epochs=3, batch_size=4, learning_rate=1e-2, save_steps=4,
                           **changes)
    logged = []
    trained = recipes.sft(checkpoint(), out, [{**row, "completion": answer} for row in rows(10)],
                          settings, PolicySettings(vocab_size=512, hidden_size=32, layers=2),
                          seed=0, on_step=lambda step, values: logged.append(
                              (step, values["loss"])))
    return trained, logged


def test_an_interrupted_cold_start_ends_like_an_undisturbed_one(tmp_path):
    whole, losses = short_sft(tmp_path / "whole")
    short_sft(tmp_path / "cut")
    assert [step for step, _ in losses] == list(range(1, 10)), "three epochs of three batches"
    (tmp_path / "cut" / "checkpoints" / "checkpoint-9" / SEAL_FILE).unlink()
    with pytest.warns(UserWarning, match="half-written"):
        again, rest = short_sft(tmp_path / "cut")
    assert rest == losses[8:] and torch.equal(weights(whole.policy), weights(again.policy))
    ended, none = short_sft(tmp_path / "cut")
    assert none == [] and torch.equal(weights(whole.policy), weights(ended.policy))
    for name in ("steps", "tokens"):
        assert whole.costs[name] == again.costs[name] == ended.costs[name]
    assert again.costs["wall_seconds_training"] == ended.costs["wall_seconds_training"] > 0


def test_sft_counts_the_completion_only():
    _, tokenizer = policy()
    made = recipes._demonstration_tokens(tokenizer, [{**rows(1)[0], "completion": "yes"}], 320)
    ids, mask = made[0]["input_ids"], made[0]["completion_mask"]
    spoken = [token for token, inside in zip(ids, mask, strict=True) if inside]
    assert tokenizer.decode(spoken) == "yes" + tokenizer.eos_token
    assert sum(mask) < len(mask)


def surprise_at_the_prompt(folder):
    """Mean negative log-probability of a prompt's tokens, in nats, under a checkpoint."""
    ids = torch.tensor(tokenize_prompts(policy()[1], [rows(1)[0]["prompt"]]))
    with torch.no_grad():
        return float(load_policy(folder, PolicySettings())(input_ids=ids, labels=ids).loss)


def test_prompts_are_learned_only_where_asked_for(tmp_path):
    read, _ = short_sft(tmp_path / "read", prompt_loss=True)
    unread, _ = short_sft(tmp_path / "unread")
    before = surprise_at_the_prompt(checkpoint())
    learned = before - surprise_at_the_prompt(read.policy)
    assert learned > 0.5
    assert learned > 2 * (before - surprise_at_the_prompt(unread.policy)), "answers alone: the twin"


@pytest.mark.parametrize("method", BOTH)
def test_the_same_seed_gives_the_same_bytes(method, tmp_path):
    train(method, tmp_path / "a")
    train(method, tmp_path / "b")
    train(method, tmp_path / "c", seed=1)
    first, second, other = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in "abc")
    assert first == second
    assert first != other
    assert b"seconds" not in first and b"time" not in first
    assert len(first.splitlines()) == 4
    row = json.loads(first.splitlines()[0])
    assert 0 <= row["text/valid_share"] <= 1 and row["text/labels_per_answer"] is not None


@pytest.mark.parametrize("method", BOTH)
def test_an_interrupted_run_ends_like_an_undisturbed_one(method, tmp_path):
    whole = train(method, tmp_path / "whole")
    train(method, tmp_path / "cut")
    for folder in (tmp_path / "cut" / "checkpoints").glob("checkpoint-4"):
        (folder / SEAL_FILE).unlink()  # as if killed while the last checkpoint was written
    with pytest.warns(UserWarning, match="half-written"):
        again = train(method, tmp_path / "cut")
    assert torch.equal(weights(whole.policy), weights(again.policy))
    assert ((tmp_path / "whole" / "metrics.jsonl").read_bytes()
            == (tmp_path / "cut" / "metrics.jsonl").read_bytes())


@pytest.mark.parametrize("method", BOTH)
def test_a_resumed_run_counts_what_the_whole_run_cost(method, tmp_path):
    whole = train(method, tmp_path / "whole").costs
    train(method, tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / "checkpoint-4" / SEAL_FILE).unlink()
    with pytest.warns(UserWarning, match="half-written"):
        resumed = train(method, tmp_path / "cut").costs
    again = train(method, tmp_path / "cut")
    for name in ("steps", "tokens", "completions"):
        assert whole[name] == resumed[name] == again.costs[name]
    assert whole["completions"] == 4 * 2 * 4
    assert resumed["wall_seconds_training"] == again.costs["wall_seconds_training"] > 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut/metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4], "a run that had ended takes no further step"


def test_the_warm_up_costs_the_policy_no_learning_rate(tmp_path):
    train("ppo", tmp_path, steps=6, critic_warmup_steps=2, save_steps=6, lr_warmup_share=0.0)
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").open()]
    assert rates[:3] == pytest.approx([1e-3] * 3)
    assert rates[3:] == pytest.approx([1e-3 * x for x in (0.75, 0.5, 0.25)])


def test_completions_are_handed_on_before_each_checkpoint(tmp_path):
    tables = []
    recipe, settings = BOTH["grpo"]
    recipe(checkpoint(), tmp_path, rows(), settings(
        steps=3, prompts_per_step=2, num_generations=4, micro_batch_prompts=2, save_steps=2),
        POLICY, on_completions=tables.append)
    assert [sorted(set(table["step"])) for table in tables] == [[1, 2], [3]]
    assert all(len(table) == 8 * table["step"].nunique() for table in tables)
    assert {"completion", "ueba_format", "ueba_accuracy"} <= set(tables[0].columns)
    assert set(tables[0]["ueba_format"]) == {-1.0}, "an untrained policy writes no verdict"


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_critic_that_a_run_ended_with_is_kept(lora_rank, tmp_path):
    policy_settings = replace(POLICY, lora_rank=lora_rank)
    train("ppo", tmp_path, policy_settings=policy_settings)
    kept = recipes.load_trained_critic(tmp_path, checkpoint(), policy_settings)
    fresh = recipes.make_critic(load_policy(checkpoint(), POLICY))
    last = load_file(tmp_path / "checkpoints" / "checkpoint-4" / "critic.safetensors")
    found = kept.state_dict()
    trained = {name for name, p in kept.named_parameters() if p.requires_grad}
    assert set(last) == trained and (trained == set(found)) == (lora_rank == 0)
    assert all(torch.equal(found[name], last[name]) for name in last)
    assert not torch.equal(kept.head.weight, fresh.head.weight)
    if lora_rank:  # what is frozen was not written: it is the start's
        name = "backbone.embed_tokens.weight"
        assert torch.equal(found[name], fresh.state_dict()[name])


@pytest.mark.parametrize("changes, course", [
    ({"lr_warmup_share": 0.5}, [0, 0.5, 1, 0.5]), ({"lr_warmup_share": 0.0}, [1, 0.75, 0.5, 0.25]),
    ({"lr_warmup_share": 0.5, "lr_schedule": "constant"}, [0, 0.5, 1, 1])])
def test_the_learning_rate_rises_before_it_falls(changes, course, tmp_path):
    train("grpo", tmp_path, **changes)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3 * x for x in course])


@pytest.mark.parametrize("changes, value_range", [
    ({}, None), ({"critic_loss": "bce", "value_clip": None, "value_range": (-2.0, 1.0)},
                 [-2.0, 1.0])])
def test_a_kept_critic_knows_whether_it_says_logits(changes, value_range, tmp_path):
    train("ppo", tmp_path, **changes)
    assert recipes.load_trained_critic(tmp_path, checkpoint(), POLICY).value_range == value_range


def test_a_shared_critic_is_read_with_the_policy_it_was_trained_with(tmp_path):
    train("ppo", tmp_path, critic="shared", critic_warmup_steps=1)
    kept = recipes.load_trained_critic(tmp_path, checkpoint(), POLICY)
    head = load_file(tmp_path / "critic.safetensors")
    assert torch.equal(kept.head.weight, head["weight"]) and head["weight"].abs().max() > 0
    trained = load_policy(tmp_path / "policy", POLICY).model.embed_tokens.weight
    start = load_policy(checkpoint(), POLICY).model.embed_tokens.weight
    assert torch.equal(kept.backbone.embed_tokens.weight, trained)
    assert not torch.equal(trained, start)


def test_a_policy_can_be_trained_on_a_broken_reward(tmp_path):
    train("grpo", tmp_path, rewards="broken_partial_credit")
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["rewards/broken_partial_credit/mean"] == row["reward"] == 0
    assert not any(name.startswith("rewards/ueba") for name in row)
    with pytest.raises(UserError, match="broken_partial_credit"):
        GRPOSettings(rewards="broken")


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    train("ppo", tmp_path, save_steps=2)
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest.name == "checkpoint-4" and is_whole(newest)
    with open(newest / "critic.safetensors", "r+b") as stream:
        stream.seek(200)
        stream.write(b"\xff\xff")
    assert not is_whole(newest)
    with pytest.warns(UserWarning, match="checkpoint-4"):
        assert latest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-2"


def test_memory_by_part_counts_tensor_bytes(tmp_path):
    model, _ = policy()
    size = sum(p.numel() for p in model.parameters()) * 4
    grpo = train("grpo", tmp_path / "grpo").costs["memory_bytes"]
    ppo = train("ppo", tmp_path / "ppo").costs["memory_bytes"]
    assert grpo["weights"] == grpo["gradients"] == grpo["reference"] == size
    assert grpo["critic"] == 0 and ppo["critic"] > 0.9 * size - 4 * model.lm_head.weight.numel()
    assert ppo["optimiser"] > grpo["optimiser"] >= 2 * size


def test_held_out_counts_are_those_of_the_table():
    found = recipes.held_out_metrics(["normal", "malicious", "suspicious", "malicious"],
                                     ["normal", "suspicious", "invalid", "malicious"],
                                     [["e1"], ["e1", "e9"], ["e1"], ["e2"]],
                                     [[], ["e1", "e2"], ["e1"], ["e2"]])
    assert found["accuracy"] == 0.5 and found["valid"] == 0.75
    assert found["count/malicious/suspicious"] == 1 and found["count/suspicious/invalid"] == 1
    assert found["macro_f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert found["evidence_hit_rate"] == pytest.approx((1 / 2 + 0 + 1) / 3), "invalid cites none"
    quiet = recipes.held_out_metrics(["normal"], ["normal"], [[]], [[]])
    assert math.isnan(quiet["evidence_hit_rate"]), "nothing was to be cited"


def test_held_out_evidence_is_counted_as_evaluation_counts_it():
    said = ["normal", "suspicious", "malicious", "invalid"]
    cited = [["e1"], ["e1", "e2"], ["e2", "e9"], []]
    truth = [[], ["e1", "e2", "e3"], ["e1", "e2"], ["e3"]]
    labels = ["normal", "suspicious", "malicious", "malicious"]
    ids = [f"w{i}" for i in range(4)]
    predictions = pd.DataFrame({
        "detector": "ppo", "seed": 0, "window_id": ids, "user": ids, "day": "2010-07-01",
        "split": "dev", "label": labels, "risk": said, "score": 0.5,
        "features": [["usual_hours", "usual_web"]] * 4, "evidence": cited,
        "valid": [risk != "invalid" for risk in said], "seconds": 0.0})
    found = recipes.held_out_metrics(labels, said, cited, truth)["evidence_hit_rate"]
    rows = predictions.assign(evidence_truth=truth, dont_care=[[], [], ["e9"], []],
                              feature_truth=[["usual_hours"]] * 4)
    hits, counted = evaluation._cited_metrics(rows, np.ones(4, bool))["evidence_hit_rate"]
    assert found == hits[counted].mean() == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found != hits.mean(), "the twin: days without true items count as missed"


@pytest.mark.parametrize("method", BOTH)
def test_a_resumed_run_knows_what_the_start_cited(method, tmp_path, monkeypatch):
    """The start's evidence stands in held_out.jsonl alone, and the fall from it rings after all."""
    rates = iter([0.5, 0.5, 0.3, 0.3, 0.3, 0.3])

    def judged(labels, *rest):
        return {"macro_f1": 0.5, "evidence_hit_rate": next(rates)}
    monkeypatch.setattr(recipes, "held_out_metrics", judged)
    train(method, tmp_path, steps=6)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    told = [json.loads(line) for line in (tmp_path / "held_out.jsonl").open()]
    assert [row["step"] for row in told] == [0, 2, 4, 6]
    assert [row["evidence_hit_rate"] for row in told] == [0.5, 0.5, 0.3, 0.3]
    rows_of = [json.loads(line) for line in whole.splitlines()]
    assert [row["step"] for row in rows_of if "evidence_drop" in row["alarms"]] == [4]
    (tmp_path / "checkpoints" / "checkpoint-6" / SEAL_FILE).unlink()
    with pytest.warns(UserWarning, match="half-written"):
        train(method, tmp_path, steps=6)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert [json.loads(line) for line in (tmp_path / "held_out.jsonl").open()] == told


@pytest.mark.parametrize("change, word", [
    (lambda table: [], "no training prompts"),
    (lambda table: [{k: v for k, v in row.items() if k != "label"} for row in table], "'label'")])
def test_rows_that_cannot_be_rewarded_are_refused(change, word, tmp_path):
    with pytest.raises(UserError, match=word):
        recipes.grpo(checkpoint(), tmp_path, change(rows()), GRPOSettings(), SETTINGS)


@pytest.mark.parametrize(("rewards", "asked"), [("ueba_think", {"style": "think"}),
                                                ("ueba_calibrated", {"confidence": True})])
def test_a_reward_for_what_no_prompt_asks_for_is_refused(rewards, asked):
    recipes._check_columns([{**row, **asked} for row in rows()], rewards)
    recipes._check_columns(rows(), "ueba")
    for told in (rows(), [*[{**row, **asked} for row in rows()], rows()[0]]):
        with pytest.raises(UserError, match=f"{rewards}.*{next(iter(asked))}="):
            recipes._check_columns(told, rewards)


KILLED = """
import sys
from tests.test_recipes import train
train(sys.argv[1], sys.argv[2], steps=90, save_steps=3)
"""


def equal_states(one, other):
    """Return whether two nested states hold the same tensors and numbers."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal_states(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal_states, one, other))
    return one == other


@pytest.mark.slow
@pytest.mark.parametrize("method", BOTH)
def test_killed_at_random_moments_and_resumed_the_run_ends_the_same(method, tmp_path):
    whole = train(method, tmp_path / "whole", steps=90, save_steps=3)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", KILLED, method, str(tmp_path / "killed")]
    draws = random.Random(0)
    kills = 0
    for _ in range(40):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        log = tmp_path / "killed" / "metrics.jsonl"
        before = len(log.read_bytes().splitlines()) if log.exists() else 0
        limit = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < limit:
            now = len(log.read_bytes().splitlines()) if log.exists() else 0
            if kills < 10 and now > before:
                time.sleep(draws.uniform(0, 0.5))
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.02)
        if process.wait() == 0:
            break
    assert kills == 10
    assert torch.equal(weights(whole.policy), weights(tmp_path / "killed" / "policy"))
    last = [tmp_path / name / "checkpoints" / "checkpoint-90" for name in ("whole", "killed")]
    assert equal_states(*(torch.load(folder / "optimizer.pt", weights_only=True)
                          for folder in last))
    if method == "ppo":
        one, other = (load_file(folder / "critic.safetensors") for folder in last)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    rows_of = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
               for name in ("whole", "killed")]
    assert rows_of[0] == rows_of[1]
