"""The credit benchmark's arithmetic, fed with invented completions and values."""

import math

import pandas as pd
import pytest
import torch

from tests.scripts import benchmark
from tests.test_credit import VERDICT, written
from ueba_helpers.rl import credit
from ueba_helpers.study.config import profile

SETTINGS = profile("smoke").ppo  # groups of four


@pytest.fixture(scope="module")
def bench():
    return benchmark("credit_check")


def exact_of(drawn, before, after):
    """Return credit known without error: columns `before` and `after` hold the four places."""
    none = torch.zeros_like(before)
    return credit.ExactCredit(drawn.places, before, none, after, none)


def at_lambda_one(baselines, estimates, drawn):
    for name, baseline in baselines.items():
        expected = (drawn.rewards.unsqueeze(1) - baseline) * drawn.mask
        torch.testing.assert_close(estimates[name], expected)


def test_at_lambda_one_every_advantage_is_the_reward_less_its_baseline(bench):
    drawn = written(*[VERDICT] * 7, "no", rewards=[0., 1., 1., 0., .5, .2, .1, -1.])
    V = torch.rand(drawn.mask.shape, generator=torch.Generator().manual_seed(0)).double()
    V = V * drawn.mask
    baselines, estimates = bench.estimators(drawn, V, SETTINGS)
    at_lambda_one(baselines, estimates, drawn)
    assert set(estimates) - set(baselines) == {"critic, lambda .95"}
    with pytest.raises(AssertionError):
        at_lambda_one({"critic, lambda .95": V}, estimates, drawn)
    with pytest.raises(AssertionError):
        at_lambda_one({"group mean": baselines["leave-one-out"]}, estimates, drawn)
    assert baselines["leave-one-out"][0, 0] == pytest.approx(2 / 3)  # of 1, 1 and 0


def test_the_difference_is_that_of_the_errors_with_an_interval_over_windows(bench):
    drawn = written(*[VERDICT] * 6, "no")
    before = torch.zeros(7, 4, dtype=torch.float64)
    exact = exact_of(drawn, before, before + 1)  # every advantage is one
    right = torch.ones(drawn.mask.shape, dtype=torch.float64)
    off = right + torch.arange(7, dtype=torch.float64).unsqueeze(1)
    found = bench.differences(off, right, exact, seed=0, resamples=200)
    # the seventh has no risk; the others are off by 0 to 5
    assert found["leave-one-out less critic"] == pytest.approx(sum(k * k for k in range(6)) / 6)
    assert found["low"] < found["leave-one-out less critic"] < found["high"]
    swapped = bench.differences(right, off, exact, seed=0, resamples=200)
    assert swapped["low"] == pytest.approx(-found["high"])
    alike = bench.differences(off, off, exact, seed=0, resamples=200)
    assert alike["low"] == alike["high"] == 0


def test_what_is_decided_grows_from_nothing_to_all(bench):
    drawn = written(*[VERDICT] * 4, rewards=[0., 1., 2., 3.])
    half = 1.5 + (drawn.rewards - 1.5) / 2
    before = torch.stack([torch.full_like(half, 1.5), half, half, drawn.rewards], 1)
    known = bench.Known(drawn, [0, 1, 2, 3], exact_of(drawn, before, before), {})
    assert list(bench.decided(known)) == list(credit.PLACES)
    assert list(bench.decided(known).values()) == pytest.approx([0, 1 / 4, 1 / 4, 1])
    noisy = credit.ExactCredit(drawn.places, before, torch.full_like(before, .5), before, before)
    shares = bench.decided(bench.Known(drawn, [0, 1, 2, 3], noisy, {})).values()
    assert list(shares) == pytest.approx([x - .25 / (5 / 3) for x in (0, 1 / 4, 1 / 4, 1)])


def test_the_figure_has_a_panel_per_question_and_a_bar_per_estimator(bench):
    table = {name: bench.by_place([.1, .2, .3, math.nan]) for name in bench.COMPARED}
    result = {"value_errors": table, "advantage_errors": table,
              "decided": {"evidence first": bench.by_place([0, .2, .4, 1])}}
    axes = bench.draw(result).axes
    assert len(axes) == 3
    assert [len(ax.containers) for ax in axes] == [3, 3, 1]
    assert [text.get_text() for text in axes[0].get_xticklabels()] == list(credit.PLACES)
    del result["decided"]
    assert len(bench.draw(result).axes) == 2
    heights = [bar.get_height() for bar in axes[0].containers[0]]
    assert pd.Series(heights[:3]).tolist() == pytest.approx([.1, .2, .3])


def test_a_study_that_cannot_be_opened_is_said_and_writes_nothing(bench, tmp_path, capsys):
    out = tmp_path / "credit.json"
    assert bench.main(["--profile", "none", "--out", str(out)]) == 2
    assert "Unknown profile" in capsys.readouterr().err
    assert not out.exists()
