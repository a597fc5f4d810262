"""The sweep: which settings a value changes, and its results, with runs that were never trained."""

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from tests.scripts import benchmark
from ueba_helpers.errors import UserError
from ueba_helpers.rl.settings import ARMS
from ueba_helpers.study.config import profile

LAPTOP = profile("laptop")


@pytest.fixture(scope="module")
def bench():
    return benchmark("sweep")


class ToyStudy:
    """Answers for runs whose macro-F1 falls with the KL coefficient; counts what is asked."""

    def __init__(self, folder: Path):
        self.profile, self.seed, self.folder, self.asked = LAPTOP, 3, folder, []

    def short_run(self, method, **changes):
        from dataclasses import replace

        replace(getattr(self.profile, method), **changes)  # refuses what is not possible
        self.asked.append((method, changes))
        path = self.folder / f"{method}-{len(self.asked)}"
        path.mkdir()
        last = 0.8 - changes.get("kl_coef", 0.1)
        (path / "held_out.jsonl").write_text("".join(
            json.dumps({"step": step, "macro_f1": f1}) + "\n"
            for step, f1 in ((30, last), (0, 0.4), (10, 0.5))))
        steps = pd.DataFrame({"reward": [0.1] * 2 + [0.5] * 6 + [0.7] * 2,
                              "kl_to_reference/per_completion": [0.0] * 8 + [2.0] * 2})
        if changes.get("kl_coef") == 0:  # no reference, so nothing is measured against one
            steps["kl_to_reference/per_completion"] = None
        if method == "ppo":
            steps["critic/explained_variance"] = 0.3
        return SimpleNamespace(path=path, name=path.name, metrics=lambda: steps, resources=lambda: {
            "completions": 640, "wall_seconds_training": 12.0})


def test_every_usual_value_of_every_sweep_is_possible(bench, tmp_path):
    study = ToyStudy(tmp_path)
    for name, (methods, values) in bench.SWEEPS.items():
        for method in methods:
            for value in values:
                study.short_run(method, **bench.changes(name, value, getattr(LAPTOP, method)))
    assert set(bench.SWEEPS["arms"][1]) == {bench.OWN, *ARMS}


@pytest.mark.parametrize("size", [2, 4, 16, 64])
def test_another_group_size_leaves_the_completions_of_a_step_alone(bench, size):
    changed = bench.changes("group_size", size, LAPTOP.grpo)
    own = LAPTOP.grpo
    assert changed["num_generations"] == size
    for prompts in ("prompts_per_step", "micro_batch_prompts"):
        assert changed[prompts] * size == getattr(own, prompts) * own.num_generations


@pytest.mark.parametrize(("name", "value", "word"), [
    ("group_size", 7, "divide"), ("group_size", 0, "divide"), ("arms", "ppo", "Legal arms")])
def test_what_is_not_possible_is_said(bench, name, value, word):
    with pytest.raises(UserError, match=word):
        bench.changes(name, value, LAPTOP.grpo)


def test_values_are_read_as_their_settings_type(bench):
    assert bench.value_of("group_size", "4") == 4
    assert bench.value_of("kl_coef", "0.1") == 0.1
    assert bench.value_of("arms", "rloo") == "rloo"
    with pytest.raises(UserError, match="numbers like"):
        bench.value_of("lam", "much")


def test_a_sweep_writes_what_each_run_came_to_and_draws_it(bench, tmp_path, monkeypatch, capsys):
    study = ToyStudy(tmp_path)
    monkeypatch.setattr(bench, "open_study", lambda *arguments: study)
    out = tmp_path / "results" / "sweep.json"
    assert bench.main(["kl_coef", "--values", "0", "0.2", "--out", str(out)]) == 0
    assert study.asked == [(method, {"kl_coef": value}) for method in ("ppo", "grpo")
                           for value in (0.0, 0.2)]
    found = json.loads(out.read_text())
    assert found["planned"] == len(found["rows"]) == 4
    first = found["rows"][0]
    assert first["macro_f1_first"] == 0.4 and first["macro_f1_last"] == pytest.approx(0.8)
    assert found["rows"][1]["macro_f1_last"] == pytest.approx(0.6)
    assert (first["reward_first"], first["reward_last"]) == pytest.approx((0.1, 0.7))
    assert first["completions"] == 640 and first["seed"] == 3
    assert [row["kl_last"] for row in found["rows"]] == [None, 2.0] * 2, "no reference, no KL"
    assert "explained_variance_last" in first
    assert "explained_variance_last" not in found["rows"][2]
    assert out.with_suffix(".png").stat().st_size > 5000
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_stopped_sweep_has_written_the_runs_that_were_complete(bench, tmp_path, monkeypatch):
    study = ToyStudy(tmp_path)
    trained = study.short_run

    def interrupted(method, **changes):
        if len(study.asked) == 2:
            raise KeyboardInterrupt
        return trained(method, **changes)

    monkeypatch.setattr(study, "short_run", interrupted)
    monkeypatch.setattr(bench, "open_study", lambda *arguments: study)
    out = tmp_path / "sweep.json"
    with pytest.raises(KeyboardInterrupt):
        bench.main(["lam", "--out", str(out)])
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 2 < found["planned"] == 4


def test_bad_arguments_end_with_two_before_anything_runs(bench, tmp_path, monkeypatch, capsys):
    study = ToyStudy(tmp_path)
    monkeypatch.setattr(bench, "open_study", lambda *arguments: study)
    assert bench.main(["group_size", "--values", "4", "7"]) == 2
    assert "divide" in capsys.readouterr().err
    assert bench.main(["lam", "--methods", "grpo"]) == 2
    assert study.asked == []


def test_the_figure_has_a_point_per_run_in_the_order_of_the_values(bench):
    rows = [{"method": "ppo", "value": value, "seed": seed, "macro_f1_last": f1, "reward_last": 0.,
             "kl_last": 1.} for seed in (0, 1) for value, f1 in ((1.0, .5), (0.0, .7))]
    ax = bench.draw("lam", rows).axes[0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1.0", "0.0"]
    points, line = ax.get_lines()
    assert list(points.get_xdata()) == [0, 1, 0, 1]
    assert list(line.get_ydata()) == pytest.approx([.5, .7])
