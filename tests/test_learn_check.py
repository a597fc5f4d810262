"""The learning check: what is committed is of the profile laptop, whatever else is checked."""

from pathlib import Path

import pytest

from tests.scripts import BENCHMARKS, benchmark


@pytest.fixture(scope="module")
def learn_check():
    return benchmark("learn_check")


def test_another_profile_than_laptop_leaves_the_committed_result_alone(learn_check):
    committed = BENCHMARKS.parent / learn_check.COMMITTED
    assert committed.exists(), "the broken twin: a default that nobody committed"
    assert BENCHMARKS.parent / learn_check.default_out("laptop", "runs") == committed
    assert learn_check.default_out("smoke", "runs") == Path("runs/learn_check-smoke.json")
