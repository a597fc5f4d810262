"""The data benchmark: its verdict on growth, fed with invented measurements."""

import pytest

from tests.scripts import benchmark


@pytest.fixture(scope="module")
def bench():
    return benchmark("bench_data")


def verdicts(bench, power: float) -> dict[str, bool]:
    """Judge subjects whose seconds grow as rows to a power: {subject: met}."""
    measurements = [
        {"scale": scale, "subject": subject, "users": 1, "days": 1, "round": 0, "load": 0.0,
         "rows": size * 1_000_000, "seconds": float(size) ** power, "cpu_seconds": 1.0,
         "peak_bytes": 1, "bytes": 1, "account_days": 1}
        for scale, size in (("1", 1), ("4", 4), ("16", 16))
        for subject in (bench.SIMULATE, bench.INGEST, bench.WINDOWS)
    ]
    found = bench.limits(bench.summary(measurements))
    growth = [one for one in found if one["fact"] == "growth power"]
    assert all(one["limit"] == "at most 1.1" for one in growth)
    assert all(one["got"] == pytest.approx(power) for one in growth)
    return {one["subject"]: one["met"] for one in growth}


@pytest.mark.parametrize(("power", "met"), [(0.8, True), (1.0, True), (1.09, True), (1.2, False),
                                            (2.0, False)])
def test_cost_that_grows_faster_than_the_rows_misses_the_limit(bench, power, met):
    subjects = (bench.SIMULATE, bench.INGEST, bench.WINDOWS, bench.PAIR)
    assert verdicts(bench, power) == dict.fromkeys(subjects, met)
