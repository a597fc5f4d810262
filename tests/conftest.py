"""What every test shares: no network, few threads, and one small simulated release.

The fixtures go the way of the data: `release` (a CERT folder) -> `store` (event store) ->
`windows_folder` -> `windows_table`, `evidence_table` -> `windows`.
"""

import importlib.util
import os
from pathlib import Path

import pytest

# Before any heavy library is imported. One thread each: two workers share two cores.
os.environ.update({
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false", "JUPYTER_PREFER_ENV_PATH": "1", "MPLBACKEND": "agg",
})
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config, items):
    """Skip tests marked `gpu` where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or (config.option.markexpr or "").count("not gpu"):
        return
    if importlib.util.find_spec("torch") and importlib.import_module("torch").cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def release(tmp_path_factory) -> Path:
    """A simulated CERT r4.2 folder: 40 users, 60 days, five insiders, a thin web log."""
    from ueba_helpers.data.simulate import simulate

    folder = tmp_path_factory.mktemp("simulated") / "r4.2"
    simulate(folder, users=40, days=60, seed=0, insiders=(2, 2, 1), web_rate=0.2)
    return folder


@pytest.fixture(scope="session")
def store(release, tmp_path_factory) -> Path:
    """The release as an event store."""
    from ueba_helpers.data.cert import ingest

    folder = tmp_path_factory.mktemp("ingested") / "store"
    ingest(release, folder, threads=1)
    return folder


@pytest.fixture(scope="session")
def windows_folder(store, tmp_path_factory) -> Path:
    """The folder of the built windows; deviations are fitted on all users."""
    from ueba_helpers.data import windows

    folder = tmp_path_factory.mktemp("built") / "windows"
    windows.build(store, folder, threads=1)
    return folder


@pytest.fixture(scope="session")
def windows_table(windows_folder):
    """One row per account-day."""
    import pandas as pd

    return pd.read_parquet(windows_folder / "windows.parquet")


@pytest.fixture(scope="session")
def evidence_table(store, windows_table):
    """The evidence items of every malicious day and of 60 others."""
    import pandas as pd

    from ueba_helpers.data import windows

    malicious = windows_table[windows_table["malicious"]]
    others = windows_table[~windows_table["malicious"]].iloc[::25].head(60)
    return windows.evidence(store, pd.concat([malicious, others]), max_items=14)


@pytest.fixture(scope="session")
def windows(windows_table, evidence_table):
    """The `Window` objects of the days in `evidence_table`."""
    from ueba_helpers.data import windows

    shown = windows_table[windows_table["window_id"].isin(evidence_table["window_id"])]
    return windows.load(shown, evidence_table)
