"""The learning check: what is committed is of the profile laptop, whatever else is checked."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "learn_check.py"


@pytest.fixture(scope="module")
def learn_check():
    spec = importlib.util.spec_from_file_location("learn_check", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_profile_than_laptop_leaves_the_committed_result_alone(learn_check):
    committed = PATH.parents[1] / learn_check.COMMITTED
    assert committed.exists(), "the broken twin: a default that nobody committed"
    assert PATH.parents[1] / learn_check.default_out("laptop", "runs") == committed
    assert learn_check.default_out("smoke", "runs") == Path("runs/learn_check-smoke.json")
