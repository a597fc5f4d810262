"""Alarms ring for sick curves and stay silent for healthy ones; metrics files are exact."""

import json
import math

import pytest
from transformers import TrainerCallback

from tests.test_trainers import make
from ueba_helpers.data.records import read_rows
from ueba_helpers.errors import UserError
from ueba_helpers.rl.monitors import (
    ALARMS,
    METRICS,
    TIMINGS,
    HealthMonitor,
    MetricsWriter,
    Thresholds,
    alarms,
    describe,
    metric_keys,
    repetition_share,
    text_metrics,
    unique_share,
    upper_length,
    with_text_metrics,
)


def curve(length=60, **changes):
    """Return rows of a healthy run; a change is a constant or a function of the step."""
    healthy = {
        "loss": 0.1, "grad_norm": 0.5, "entropy": 2.0, "frac_reward_zero_std": 0.2,
        "reward": lambda i: 0.2 + i / 200, "completions/mean_length": 40.0,
        "completions/clipped_ratio": 0.02, "kl_to_reference/per_completion": lambda i: i / 50,
        "clip_ratio/region_mean": 0.05, "ratio/max": 1.4, "critic/explained_variance": 0.4,
        "critic/value_mean": 0.3, "critic/return_mean": 0.35, "critic/grad_norm": 0.8,
        "critic/value_loss": 0.1, "text/label_entropy": 0.9, "text/unique_share": 0.8,
        "text/repetition": 0.05, "text/copy_rate": 0.1, "text/labels_per_answer": 1.0,
        "text/valid_share": 0.98, "text/cited_share": 0.25,
        "text/same_citation": 0.2,
    }
    columns = {**healthy, **changes}
    return [{"step": i, **{key: value(i) if callable(value) else value
                           for key, value in columns.items()}} for i in range(1, length + 1)]


def names(rows, held_out=(), **options):
    return [alarm.name for alarm in alarms(rows, held_out, **options)]


def test_a_healthy_run_raises_nothing():
    held_out = [{"step": i, "macro_f1": 0.4 + i / 200, "evidence_hit_rate": 0.4}
                for i in range(0, 61, 10)]
    assert names(curve(), held_out, num_generations=8) == []


def spike(at, value, usual):
    return lambda i: value if i == at else usual


# Each curve, and its twin on the healthy side of the threshold.
SICK = {
    "not_finite": ({"grad_norm": spike(30, math.nan, 0.5)}, {"grad_norm": spike(30, 0.6, 0.5)}),
    "broken_critic": ({"critic/explained_variance": -0.1},
                      {"critic/explained_variance": lambda i: 0.1 if i % 20 == 0 else -0.1}),
    "value_gap": ({"critic/value_mean": 0.9}, {"critic/value_mean": 0.8}),
    "entropy_collapse": ({"entropy": lambda i: 2.0 if i < 30 else 0.39},
                         {"entropy": lambda i: 2.0 if i < 30 else 0.41}),
    "kl": ({"kl_to_reference/per_completion": 10.1}, {"kl_to_reference/per_completion": 9.9}),
    "length_drift": ({"completions/mean_length": lambda i: 40 if i < 30 else 81},
                     {"completions/mean_length": lambda i: 40 if i < 30 else 79}),
    "dead_groups": ({"frac_reward_zero_std": 0.71}, {"frac_reward_zero_std": 0.69}),
    "clipping": ({"clip_ratio/region_mean": 0.21}, {"clip_ratio/region_mean": 0.19}),
    "ratio": ({"ratio/max": spike(30, 10.5, 1.2)}, {"ratio/max": spike(30, 9.5, 1.2)}),
    "truncation": ({"completions/clipped_ratio": 0.3}, {"completions/clipped_ratio": 0.2}),
    "gradient": ({"grad_norm": lambda i: 0.5 if i < 40 else 2.6},
                 {"grad_norm": lambda i: 0.5 if i < 40 else 2.4}),
    "critic_gradient": ({"critic/grad_norm": lambda i: 0.8 if i < 40 else 4.1},
                        {"critic/grad_norm": lambda i: 0.8 if i < 40 else 3.9}),
    "one_label": ({"text/label_entropy": 0.49}, {"text/label_entropy": 0.51}),
    "all_labels": ({"text/labels_per_answer": 1.6}, {"text/labels_per_answer": 1.4}),
    "invalid": ({"text/valid_share": 0.79}, {"text/valid_share": 0.81}),
    "citing": ({"text/cited_share": 0.71}, {"text/cited_share": 0.69}),
    "same_citation": ({"text/same_citation": 0.51}, {"text/same_citation": 0.49}),
    "sameness": ({"text/unique_share": 0.05}, {"text/unique_share": 0.2}),
    "repetition": ({"text/repetition": 0.6}, {"text/repetition": 0.4}),
    "copying": ({"text/copy_rate": 0.6}, {"text/copy_rate": 0.4}),
}


@pytest.mark.parametrize("name", SICK)
def test_each_alarm_rings_beyond_its_threshold_and_not_before(name):
    beyond, before = SICK[name]
    assert names(curve(**beyond)) == [name]
    assert names(curve(**before)) == []


def test_every_alarm_is_tested():
    assert {*SICK, "hack_suspicion", "held_out_drop", "evidence_drop"} == set(ALARMS)


def test_a_short_length_is_a_drift_too():
    assert names(curve(**{"completions/mean_length": lambda i: 40 if i < 30 else 19})) == [
        "length_drift"]


def test_a_reward_that_rises_without_the_task_is_suspected():
    flat = [{"step": i, "macro_f1": 0.5} for i in range(10, 61, 10)]
    assert names(curve(), flat) == ["hack_suspicion"]
    assert alarms(curve(), flat)[0].step == 40, "three evaluations after the first"
    assert names(curve(reward=0.4), flat) == [], "a reward that stays is no hack"
    assert names(curve(), flat[:3]) == [], "too few evaluations to judge"


def test_a_fall_on_held_out_windows_rings_whatever_the_reward_does():
    fell = [{"step": 10, "macro_f1": 0.5}, {"step": 20, "macro_f1": 0.6},
            {"step": 30, "macro_f1": 0.49}]
    assert names(curve(), fell) == names(curve(reward=0.1), fell) == ["held_out_drop"]
    assert alarms(curve(), fell)[0].step == 30
    assert names(curve(), [*fell[:2], {"step": 30, "macro_f1": 0.51}]) == []


def cited(*rates):
    """Return held-out results from step 0 on: better and better labels, these hit rates."""
    return [{"step": 10 * i, "macro_f1": 0.6 + i / 100, "evidence_hit_rate": rate}
            for i, rate in enumerate(rates)]


def test_right_labels_for_wrong_reasons_ring_when_less_evidence_is_cited():
    fell = cited(0.40, 0.30, 0.30)
    assert [(alarm.name, alarm.step) for alarm in alarms(curve(), fell)] == [("evidence_drop", 20)]
    assert names(curve(), cited(0.40, 0.33, 0.33)) == []
    assert names(curve(), cited(0.40, 0.20, 0.45, 0.40)) == ["evidence_drop"]
    assert names(curve(), cited(0.40, 0.25, 0.40)) == [], "one poor judgement is noise"
    assert names(curve(), fell[1:]) == [], "the twin: what was cited at the start is forgotten"
    labels_alone = [{**row, "evidence_hit_rate": 0.4} for row in fell]
    assert names(curve(), labels_alone) == [], "the twin: macro-F1 alone sees a healthy run"
    assert names(curve(), cited(math.nan, math.nan)) == [], "no true item, nothing to cite"


def test_a_habit_of_citing_the_same_ids_is_told_from_one_that_was_always_there():
    def risen(start, end):
        return curve(**{"text/same_citation": lambda i: start if i < 30 else end})
    assert names(risen(0.12, 0.26)) == names(risen(0.19, 0.39)) == ["same_citation"]
    assert "at the start 12%" in alarms(risen(0.12, 0.26))[0].message
    assert names(risen(0.12, 0.24)) == names(risen(0.20, 0.39)) == []
    assert names(curve(**{"text/same_citation": 0.39})) == [], "the twin: a level alone"


def test_verdicts_full_of_citations_and_fixed_ones_are_told_from_honest_ones():
    shown = [f"e{i}" for i in range(1, 13)]

    def measured(*cited):
        texts = [VERDICT.replace('"e1", "e2"', ", ".join(f'"{name}"' for name in ids))
                 % "malicious" for ids in cited]
        return text_metrics(texts, [""] * len(texts), evidence_ids=[shown] * len(texts))
    full = measured(*[shown[:8]] * 4)  # a verdict holds eight of twelve
    fixed = measured(["e5"], ["e5"], ["e5"], ["e2"])
    honest = measured(["e5"], ["e2", "e3"], ["e7"], ["e2"])
    assert (full["text/cited_share"], fixed["text/same_citation"]) == (1, 0.75)
    assert names(curve(**{"text/cited_share": full["text/cited_share"]})) == ["citing"]
    assert names(curve(**{"text/same_citation": fixed["text/same_citation"]})) == ["same_citation"]
    assert names(curve(**{key: honest[key] for key in (
        "text/cited_share", "text/same_citation")})) == []
    calm = text_metrics([VERDICT % "normal"], [""], evidence_ids=[shown])
    assert math.isnan(calm["text/same_citation"]), "no alarm, no citation to compare"


def test_groups_of_one_are_never_dead():
    assert names(curve(frac_reward_zero_std=1.0), num_generations=1) == []
    assert names(curve(frac_reward_zero_std=1.0), num_generations=8) == ["dead_groups"]


def test_small_gradients_may_grow():
    """Five times almost nothing is no explosion."""
    assert names(curve(grad_norm=lambda i: 0.01 if i < 40 else 0.9)) == []


def test_an_alarm_rings_once_and_again_after_it_ceased():
    twice = curve(**{"ratio/max": lambda i: 20.0 if i in (10, 11, 12, 30) else 1.0})
    assert [(a.name, a.step) for a in alarms(twice)] == [("ratio", 10), ("ratio", 30)]


def test_steps_without_a_rollout_are_passed_over():
    """With several iterations per rollout every other row has no rollout metrics."""
    key = "kl_to_reference/per_completion"
    gaps = curve(**{key: lambda i: 12.0 if i % 2 else None})
    assert [(a.name, a.step) for a in alarms(gaps)] == [("kl", 9)]


def test_messages_are_words_with_numbers():
    alarm = alarms(curve(**{"kl_to_reference/per_completion": 12.5}))[0]
    assert alarm.severity == "critical" and alarm.step == 5
    assert "12.5 nats per completion" in alarm.message


@pytest.mark.parametrize("changes", [{"window": 0}, {"kl": -1.0}, {"window": 2.5},
                                     {"ratio": math.nan}])
def test_impossible_thresholds_name_their_field(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        Thresholds(**changes)


def test_an_unknown_alarm_to_stop_on_is_refused():
    with pytest.raises(UserError, match="boredom"):
        HealthMonitor(stop_on=["boredom"])


# -- the files ------------------------------------------------------------------------------------

ARM_CHANGES = {"grpo": {}, "ppo": {"critic_warmup_steps": 1, "value_clip": 0.5}}


def train(arm, folder, *, steps=4, resume=None, monitor=None, held_out=None, **changes):
    """Train a tiny policy with the monitors on; return the folder's metrics path."""
    settings = {"kl_coef": 0.05, "save_steps": 2, **ARM_CHANGES[arm]}
    trainer = make(arm, folder / "checkpoints", steps=steps, **{**settings, **changes})
    path = folder / "metrics.jsonl"
    monitor = monitor or HealthMonitor(metrics_path=path)
    if held_out:
        trainer.add_callback(HandOver(monitor, held_out))
    writer = MetricsWriter(path, folder / "timings.jsonl", monitor=monitor,
                           keys=metric_keys(arm, ["length_reward"]))
    trainer.add_callback(writer)
    trainer.add_callback(monitor)
    trainer.train(resume_from_checkpoint=resume)
    return path


class HandOver(TrainerCallback):
    def __init__(self, monitor, values):
        self.monitor, self.values = monitor, values

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.values:
            self.monitor.add_held_out(state.global_step, self.values[state.global_step])


@pytest.mark.parametrize("arm", ARM_CHANGES)
def test_identical_runs_write_identical_bytes_and_every_key_is_defined(arm, tmp_path, caplog):
    judged = {2: {"macro_f1": 0.4, "evidence_hit_rate": 0.3}}
    first = train(arm, tmp_path / "a", held_out=judged)
    second = train(arm, tmp_path / "b", held_out=judged)
    assert first.read_bytes() == second.read_bytes()
    rows = read_rows(first)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(list(row) == ["step", *metric_keys(arm, ["length_reward"])] for row in rows)
    assert [row["held_out/macro_f1"] for row in rows] == [None, 0.4, None, None]
    assert [row["held_out/evidence_hit_rate"] for row in rows] == [None, 0.3, None, None]
    assert all(row["reward"] is not None and row["alarms"] is not None for row in rows)
    assert "not written" not in caplog.text, "every metric of the trainer is among the keys"
    for key in rows[0]:
        definition, unit = describe(key)
        assert definition.endswith(".") and unit
    other = train(arm, tmp_path / "c", seed=4)
    assert other.read_bytes() != first.read_bytes(), "the comparison can fail"


def test_times_go_to_their_own_file(tmp_path):
    path = train("grpo", tmp_path)
    rows = read_rows(tmp_path / "timings.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(set(row) == set(TIMINGS) and row["seconds"] > 0 for row in rows)
    assert rows[0]["tokens_per_second"] == pytest.approx(
        read_rows(path)[0]["num_tokens"] / rows[0]["seconds"])
    assert not any("time" in key.split("_") or "second" in key for key in read_rows(path)[0])


def test_a_kl_in_the_loss_has_a_key_of_its_own(tmp_path, caplog):
    trainer = make("grpo", tmp_path, steps=1, kl_coef=0.1, kl_placement="loss")
    path = tmp_path / "metrics.jsonl"
    keys = metric_keys("grpo", ["length_reward"], kl_in_loss=True)
    assert set(keys) - set(metric_keys("grpo", ["length_reward"])) == {"kl"}
    trainer.add_callback(MetricsWriter(path, tmp_path / "timings.jsonl", keys=keys))
    trainer.train()
    assert read_rows(path)[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert "not written" not in caplog.text


@pytest.mark.parametrize("arm", ARM_CHANGES)
def test_a_resumed_run_ends_with_the_bytes_of_an_undisturbed_one(arm, tmp_path):
    """The alarm that holds from step 1 on must not ring again after the resume."""
    def monitor(folder):
        return HealthMonitor(Thresholds(window=1, truncated_share=0.5),
                             metrics_path=folder / "metrics.jsonl")

    whole = train(arm, tmp_path / "whole", monitor=monitor(tmp_path / "whole"))
    path = train(arm, tmp_path / "cut", steps=3, monitor=monitor(tmp_path / "cut"),
                 save_strategy="steps")
    assert len(read_rows(path)) == 3
    with open(path, "a") as stream:
        stream.write('{"step": 4, "rew')  # the line of a process killed while writing
    checkpoint = tmp_path / "cut" / "checkpoints" / "checkpoint-2"
    train(arm, tmp_path / "cut", resume=str(checkpoint), monitor=monitor(tmp_path / "cut"))
    assert path.read_bytes() == whole.read_bytes()
    assert read_rows(whole)[0]["alarms"] == ["truncation"]
    assert [row["step"] for row in read_rows(tmp_path / "cut" / "timings.jsonl")] == [1, 2, 3, 4]


def test_a_monitor_without_its_past_rings_again(tmp_path):
    """The broken twin of the resume above."""
    limits = Thresholds(window=1, truncated_share=0.5)
    path = train("grpo", tmp_path, steps=2, monitor=HealthMonitor(limits), save_strategy="steps")
    train("grpo", tmp_path, resume=str(tmp_path / "checkpoints" / "checkpoint-2"),
          monitor=HealthMonitor(limits))
    assert [row["alarms"] for row in read_rows(path)] == [["truncation"], [], ["truncation"], []]


def test_a_fresh_run_begins_a_fresh_file(tmp_path):
    train("grpo", tmp_path, steps=3)
    assert len(read_rows(train("grpo", tmp_path, steps=2))) == 2


def test_metrics_that_end_before_the_resumed_step_are_refused(tmp_path):
    path = train("grpo", tmp_path, steps=2, save_strategy="steps")
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(UserError, match="ends at step 1"):
        train("grpo", tmp_path, resume=str(tmp_path / "checkpoints" / "checkpoint-2"))


def test_a_trainer_that_skips_steps_in_its_log_is_refused(tmp_path):
    with pytest.raises(UserError, match="logging_steps"):
        train("grpo", tmp_path, logging_steps=2)


def test_steps_without_a_rollout_have_the_same_keys(tmp_path):
    rows = read_rows(train("grpo", tmp_path, num_iterations=2))
    assert rows[1]["reward"] is None and rows[1]["entropy"] is not None
    assert list(rows[0]) == list(rows[1])


def test_an_undefined_key_is_refused(tmp_path):
    with pytest.raises(KeyError, match="mood"):
        MetricsWriter(tmp_path / "m", tmp_path / "t", keys=["mood"])


def test_a_metric_outside_the_keys_is_named_once(tmp_path, caplog):
    trainer = make("grpo", tmp_path, steps=2)
    trainer.add_callback(MetricsWriter(tmp_path / "m.jsonl", tmp_path / "t.jsonl",
                                       keys=["reward", "loss"]))
    trainer.train()
    assert list(read_rows(tmp_path / "m.jsonl")[0]) == ["step", "loss", "reward"]
    messages = [r.message for r in caplog.records if "not written" in r.message]
    assert len(messages) == 1 and "entropy" in messages[0]


def test_an_alarm_can_stop_a_run(tmp_path, caplog):
    caplog.set_level("INFO")
    limits = Thresholds(window=2, truncated_share=0.5)
    monitor = HealthMonitor(limits, stop_on=["truncation"])
    path = train("grpo", tmp_path / "stopped", monitor=monitor)
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    assert [alarm.name for alarm in monitor.alarms] == ["truncation"]
    assert "hit the length limit" in caplog.text
    unheeded = HealthMonitor(limits, stop_on=["kl"])
    assert len(read_rows(train("grpo", tmp_path / "whole", monitor=unheeded))) == 4


def test_what_was_raised_online_is_what_the_file_tells(tmp_path):
    limits = Thresholds(window=1, truncated_share=0.5, kl=0.01)
    monitor = HealthMonitor(limits)
    path = train("ppo", tmp_path, monitor=monitor)
    assert monitor.alarms == alarms(read_rows(path), thresholds=limits, num_generations=4)
    assert monitor.alarms and monitor.alarms != alarms(read_rows(path))


def test_metrics_are_defined_in_one_sentence_each():
    for name, (definition, unit) in {**METRICS, **TIMINGS}.items():
        assert definition[0].isupper() and definition.endswith("."), name
        assert definition.count(". ") == 0 and unit, name
    with pytest.raises(KeyError, match="mood"):
        describe("mood")


# -- the text -------------------------------------------------------------------------------------

VERDICT = ('{"evidence": ["e1", "e2"], "features": ["usual_hours", "usual_web"], '
           '"basis": "e1 as always.", "risk": "%s"}')


def test_text_metrics_by_hand():
    completions = [VERDICT % "normal", VERDICT % "normal", VERDICT % "malicious", "one two one"]
    shown = [["e1", "e2"], ["e1", "e2", "e3", "e4"], ["e1", "e2"], ["e1", "e2"]]
    found = text_metrics(completions, ["one two one"] * 4, evidence_ids=shown)
    assert found["text/citations"] == 2
    assert found["text/valid_share"] == 0.75
    assert found["text/unique_share"] == 0.75
    assert found["text/cited_share"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["text/labels_per_answer"] == 0.75
    assert found["text/label_entropy"] == pytest.approx(
        math.log(3) - 2 / 3 * math.log(2)), "what is invalid says no risk"
    assert found["text/repetition"] == 0
    assert found["text/copy_rate"] == 0, "three words hold no run of six"
    assert set(found) == {key for key in METRICS if key.startswith("text/")}


def test_copying_the_prompt_is_measured_on_chat_messages():
    prompt = [{"role": "system", "content": "one two three four"},
              {"role": "user", "content": "five six seven"}]
    copied = [{"role": "assistant", "content": "two three four five six seven"}]
    own = [{"role": "assistant", "content": "seven six five four three two"}]
    for completion, rate in ((copied, 1.0), (own, 0.0)):
        assert text_metrics([completion], [prompt], evidence_ids=[[]])["text/copy_rate"] == rate


def test_repetition_tells_a_loop_from_a_list():
    assert repetition_share("so on and " * 50) > 0.9
    assert repetition_share(" ".join(map(str, range(150)))) == 0


def test_extremes_of_the_text_measures():
    assert unique_share([]) == 1.0 and upper_length([]) == 0.0
    assert upper_length([7]) == 7.0
    assert math.isnan(text_metrics([""], [""], evidence_ids=[[]])["text/citations"])


def test_text_metrics_reach_the_metrics_file_through_a_reward_function(tmp_path):
    def length_reward(completions, evidence_ids=None, **kwargs):
        return [float(len(c[0]["content"])) for c in completions]

    measured = with_text_metrics(length_reward)
    assert measured.__name__ == "length_reward"
    trainer = make("grpo", tmp_path, reward=measured, steps=2)
    trainer.train_dataset = trainer.train_dataset.add_column("evidence_ids", [["e1"]] * 8)
    keys = metric_keys("grpo", ["length_reward"], text=True)
    trainer.add_callback(MetricsWriter(tmp_path / "m.jsonl", tmp_path / "t.jsonl", keys=keys))
    trainer.train()
    row = read_rows(tmp_path / "m.jsonl")[0]
    assert row["text/valid_share"] == 0 and row["text/citations"] is None
    assert 0 < row["text/unique_share"] <= 1
    assert row["completions/p95_length"] == row["completions/max_length"] == 3
    assert json.loads((tmp_path / "m.jsonl").read_text().splitlines()[0]) == row
    alone = [[{"role": "assistant", "content": "four"}]]
    assert measured(alone) == length_reward(alone) == [4.0]
