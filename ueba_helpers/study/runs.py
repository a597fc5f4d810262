"""Run folders: what one training or scoring run writes, and how it is found again.

In: a method, its configuration, a seed and the fingerprint of the data. Out: a `RunFolder` whose
name follows from them. The files of a run:

    config.json           method, seed, configuration, data hash
    provenance.json       commit, versions, device, threads, code hash
    metrics.jsonl         one line a step, fixed keys, no times: the same seed gives the same bytes
    timings.jsonl         one line a step: the times
    completions.parquet   the text the policy wrote
    checkpoints/ adapter/ weights (never published)
    resources.json        wall, CPU and GPU seconds, peak memory, summed over resumed sessions
    predictions.parquet   written last: a run is complete if and only if it exists

Refuses the same name with another configuration. A run made by other code is not resumed and not
returned: it is set aside as `<name>.previous`, and the run begins again.
"""

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import pandas as pd
import psutil

from ueba_helpers.data import cert
from ueba_helpers.data.files import atomic_path, write_json
from ueba_helpers.data.records import append_row, cut_rows, plain, read_rows
from ueba_helpers.errors import UserError
from ueba_helpers.study.config import Profile

PACKAGE = Path(__file__).resolve().parent.parent

PREDICTION_COLUMNS = ("detector", "seed", "window_id", "user", "day", "split", "label", "risk",
                      "score", "features", "evidence", "valid", "seconds")

WEIGHT_FOLDERS = ("checkpoints", "adapter", "policy", "policies", "model", "critic")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

# Tables with one row per account-day or per completion: derived from the release's own rows.
ROW_TABLES = ("predictions.parquet", "completions.parquet")

# A metric whose name holds one of these is a time, and belongs into timings.jsonl.
TIME_WORDS = ("time", "seconds", "runtime", "per_second", "flos")

# What a resumed session measures for the run and not for itself.
_OF_THE_WHOLE_RUN = ("steps", "tokens", "completions", "wall_seconds_training")

_VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "pandas",
             "pyarrow", "duckdb", "scikit-learn", "unsloth", "vllm")

_SAMPLE_BYTES = 1 << 20


# ---------------------------------------------------------------- names and fingerprints

def content_hash(value: object, length: int = 8) -> str:
    """Return a short hash of a JSON-like value; the order of its keys does not count.

    >>> content_hash({"a": 1, "b": (2, 3)}) == content_hash({"b": [2, 3], "a": 1})
    True
    >>> content_hash({"a": 1}) == content_hash({"a": 1.5})
    False
    """
    text = json.dumps(value, sort_keys=True, allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def file_fingerprint(path: Path | str) -> str:
    """Return a hash of a file's size, first and last megabyte: fast for a log of any length."""
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        digest.update(stream.read(_SAMPLE_BYTES))
        if size > _SAMPLE_BYTES:
            stream.seek(max(_SAMPLE_BYTES, size - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def data_hash(chosen: Profile, *, seed: int, data: Path | str = "") -> str:
    """Return the eight characters that name the data a study runs on.

    With an empty `data` they stand for the simulator's settings, its code and the seed; else for
    the names, sizes and ends of the CSV files under the folder, wherever it lies, or for the
    manifest of an event store. Raises `UserError` if `data` is no folder or holds no CSV file.
    """
    if str(data) == "":
        return content_hash({"simulate": chosen.as_dict()["simulate"], "seed": seed,
                             "history_days": chosen.windows.history_days,
                             "code": code_fingerprint("data/simulate.py", "data/cert.py")})
    folder = Path(data)
    if not folder.exists():
        raise UserError(f"DATA: the path {folder} does not exist. Give the folder of the CERT "
                        "r4.2 CSV files, or leave DATA empty to simulate one.")
    if not folder.is_dir():
        raise UserError(f"DATA: {folder} is a file. Give the folder that holds logon.csv.")
    if cert.is_store(folder):
        return content_hash({"store": file_fingerprint(folder / "manifest.json")})
    places = [folder, folder.resolve().parent / "answers"]  # the key may lie beside the release
    files = {f"{place.name}/{file.relative_to(place).as_posix()}" if place != folder
             else file.relative_to(folder).as_posix(): file
             for place in places for pattern in ("*.csv", "*.csv.gz")
             for file in place.rglob(pattern)}
    if not any("/" not in name for name in files):
        raise UserError(f"DATA: {folder} holds no CSV file. Give the folder that holds logon.csv "
                        "(unpack r4.2.tar.bz2 first).")
    return content_hash({name: file_fingerprint(files[name]) for name in sorted(files)})


def study_folder(chosen: Profile, *, seed: int, data: Path | str, runs: Path | str) -> Path:
    """Return `runs/<profile>-seed<seed>-<data hash>`, where one study keeps all it writes."""
    return Path(runs) / f"{chosen.name}-seed{seed}-{data_hash(chosen, seed=seed, data=data)}"


class _WithoutDocstrings(ast.NodeTransformer):
    def _strip(self, node):
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node

    visit_Module = visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _strip


def source_fingerprint(text: str) -> str:
    """Return a hash of what Python source does: comments, docstrings and layout do not count.

    >>> source_fingerprint("x = 1  # one") == source_fingerprint("x=1")
    True
    >>> source_fingerprint("x = 1") == source_fingerprint("x = 2")
    False
    """
    tree = _WithoutDocstrings().visit(ast.parse(text))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


@lru_cache(maxsize=512)
def _fingerprint_at(path: Path, changed_ns: int, size: int) -> str:
    return source_fingerprint(path.read_text(encoding="utf-8"))


def code_fingerprint(*parts: str, package: Path = PACKAGE) -> str:
    """Return a hash of the code under the named folders or files of the package.

    `parts` are relative to `package`; none at all means the whole package. Edits of comments and
    docstrings change nothing, so that they never cost a training run.
    """
    files: set[Path] = set()
    for part in parts or (".",):
        path = package / part
        files.update(path.rglob("*.py") if path.is_dir() else [path] if path.exists() else [])
    hashes = {}
    for file in sorted(files):
        stat = file.stat()
        hashes[file.relative_to(package).as_posix()] = _fingerprint_at(
            file, stat.st_mtime_ns, stat.st_size)
    return content_hash(hashes, 16)


def provenance(*, data: str | None = None, simulated: bool = True) -> dict:
    """Return where a run comes from: commit, versions, device, threads, code and data hash."""
    repository = PACKAGE.parent
    status = _git("status", "--porcelain", cwd=repository)
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_available()
    return {
        "commit": _git("rev-parse", "HEAD", cwd=repository),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": package_versions(),
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "threads": torch.get_num_threads() if torch is not None
        else int(os.environ.get("OMP_NUM_THREADS") or available_cpus()),
        "code": code_fingerprint("data", "task", "rl"),
        "data_hash": data,
        "simulated": simulated,
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that numbers depend on."""
    return {name: version for name in _VERSIONS if (version := installed_version(name))}


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def available_cpus() -> int:
    """Return the number of CPU cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git(*arguments: str, cwd: Path) -> str | None:
    try:
        done = subprocess.run(("git", *arguments), cwd=cwd, capture_output=True, text=True,
                              timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# ---------------------------------------------------------------- the run folder

class RunFolder:
    """One run on disk; `RunFolder.open` makes it or finds it again."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    @classmethod
    def open(cls, runs: Path | str, method: str, *, configuration: Mapping, seed: int,
             data: str = "", simulated: bool = True, name: str | None = None) -> "RunFolder":
        """Return the run of this method, configuration, seed and data; begin it if it is new.

        `configuration` is any JSON-like mapping (`dataclasses.asdict` of a settings class). The
        folder is `runs/<method>-<hash>-seed<seed>` unless a `name` is given. Raises `UserError`
        if that folder belongs to another configuration.
        """
        if not re.fullmatch(r"[A-Za-z0-9_.+]+", method):
            raise UserError(f"method={method!r} cannot name a folder: use letters, digits, "
                            "'_', '.' and '+'.")
        config = {"method": method, "seed": seed, "configuration": dict(configuration),
                  "data_hash": data}
        config = json.loads(json.dumps(config, allow_nan=False, default=str))
        short = content_hash({key: config[key] for key in ("configuration", "data_hash")})
        run = cls(Path(runs) / (name or f"{method}-{short}-seed{seed}"))
        if run.path.exists():
            run._check(config)
        if run.path.exists() and run._made_by_other_code():
            run._set_aside()
        if not (run.path / "provenance.json").exists():
            run.path.mkdir(parents=True, exist_ok=True)
            write_json(run.path / "config.json", config)
            write_json(run.path / "provenance.json", provenance(data=data, simulated=simulated))
        return run

    def _check(self, config: Mapping) -> None:
        if not (self.path / "config.json").exists():
            if any(self.path.iterdir()):
                raise UserError(f"{self.path} holds files but no config.json, so it is no run. "
                                "Move it away or choose another runs folder.")
            return
        found = _read_json(self.path / "config.json")
        different = _differences(found, config)
        if different:
            listed = "; ".join(f"{key}: {old!r} there, {new!r} here"
                               for key, old, new in different[:5])
            raise UserError(f"{self.path} was made with another configuration ({listed}). "
                            "Delete or rename that folder, or give this run another name.")

    def _made_by_other_code(self) -> bool:
        path = self.path / "provenance.json"
        return path.exists() and _read_json(path).get("code") != code_fingerprint(
            "data", "task", "rl")

    def _set_aside(self) -> None:
        previous = self.path.with_name(self.path.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(self.path, previous)

    def __repr__(self) -> str:
        return f"RunFolder({self.name}, {'complete' if self.complete else 'incomplete'})"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def complete(self) -> bool:
        """Whether the run has finished: its predictions are written last."""
        return (self.path / "predictions.parquet").exists()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def config(self) -> dict:
        return _read_json(self.path / "config.json")

    def log(self, *, resumed_step: int = 0) -> "MetricsLog":
        """Return the writer of metrics.jsonl and timings.jsonl, cut back to the resumed step."""
        return MetricsLog(self.path, resumed_step=resumed_step)

    def metrics(self) -> pd.DataFrame:
        """Return metrics.jsonl as a table, one row per step (empty if nothing is logged)."""
        return pd.DataFrame(read_rows(self.path / "metrics.jsonl"))

    def timings(self) -> pd.DataFrame:
        """Return timings.jsonl as a table, one row per step (empty if nothing is logged)."""
        return pd.DataFrame(read_rows(self.path / "timings.jsonl"))

    def add_completions(self, rows: pd.DataFrame, *, resumed_step: int | None = None) -> None:
        """Append rows (with a column `step`) to completions.parquet, atomically.

        The file is written anew each time, so call this once per checkpoint, not once per step.
        With `resumed_step`, rows of later steps that an interrupted session left are dropped.
        """
        path = self.path / "completions.parquet"
        if path.exists():
            before = pd.read_parquet(path)
            if resumed_step is not None:
                before = before[before["step"] <= resumed_step]
            rows = pd.concat([before, rows], ignore_index=True) if len(before) else rows
        write_parquet(path, rows)

    def completions(self) -> pd.DataFrame:
        return pd.read_parquet(self.path / "completions.parquet")

    def add_resources(self, measured: Mapping) -> dict:
        """Merge one session's measurements into resources.json and return the sum.

        Numbers named `peak_*` or `threads` keep their maximum; those in `_OF_THE_WHOLE_RUN` are
        totals already and take the newest value, like everything that is no number; other
        numbers are added.
        """
        path = self.path / "resources.json"
        total = _read_json(path) if path.exists() else {}
        for key, value in measured.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if (key not in total or not number or total[key] is None
                    or key in _OF_THE_WHOLE_RUN):
                total[key] = value
            elif key.startswith("peak_") or key == "threads":
                total[key] = max(total[key], value)
            else:
                total[key] += value
        write_json(path, total)
        return total

    def resources(self) -> dict:
        path = self.path / "resources.json"
        return _read_json(path) if path.exists() else {}

    def finish(self, predictions: pd.DataFrame) -> pd.DataFrame:
        """Write predictions.parquet, which completes the run, and return the table.

        Raises `ValueError` if a column of the predictions table is missing or no row is there.
        """
        missing = [name for name in PREDICTION_COLUMNS if name not in predictions]
        if missing:
            raise ValueError(f"predictions lack the columns {', '.join(missing)}")
        if predictions.empty:
            raise ValueError("predictions hold no row: nothing was evaluated")
        ordered = [*PREDICTION_COLUMNS,
                   *(name for name in predictions if name not in PREDICTION_COLUMNS)]
        write_parquet(self.path / "predictions.parquet", predictions[ordered])
        return self.predictions()

    def predictions(self) -> pd.DataFrame:
        """Return the predictions table; `UserError` if the run is not complete."""
        if not self.complete:
            raise UserError(f"{self.path} is not complete: it has no predictions.parquet yet. "
                            "Run the notebook that makes it first.")
        return pd.read_parquet(self.path / "predictions.parquet")


def _differences(found: object, wanted: object, prefix: str = "") -> list[tuple]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        rows = []
        for key in sorted(set(found) | set(wanted)):
            rows += _differences(found.get(key), wanted.get(key),
                                 f"{prefix}.{key}" if prefix else str(key))
        return rows
    return [] if found == wanted else [(prefix, found, wanted)]


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Delete the folder it lies in to make "
                        "it again.") from error


def write_parquet(path: Path | str, table: pd.DataFrame) -> None:
    """Write a table as Parquet, atomically, without its index."""
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)


# ---------------------------------------------------------------- metrics

class MetricsLog:
    """Append one line per step to metrics.jsonl, and the times to timings.jsonl.

    The first row fixes the keys; a later row with others raises `ValueError`. Opening the log cuts
    both files back to `resumed_step`, so that a resumed run ends with the bytes of an
    uninterrupted one. Non-finite numbers become null.
    """

    def __init__(self, folder: Path | str, *, resumed_step: int = 0):
        self.metrics_path = Path(folder) / "metrics.jsonl"
        self.timings_path = Path(folder) / "timings.jsonl"
        self.step = resumed_step
        self._keys: tuple[str, ...] | None = None
        kept = cut_rows(self.metrics_path, resumed_step)
        cut_rows(self.timings_path, resumed_step)
        if kept:
            self._keys = tuple(kept[-1])[1:]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one step's values; the names that are times go to timings.jsonl by themselves."""
        if step <= self.step:
            raise ValueError(f"step {step} is logged already (the last one is {self.step})")
        written = {key: plain(value) for key, value in values.items()}
        metrics = {key: written[key] for key in sorted(written) if not is_time(key)}
        timings = {key: written[key] for key in sorted(written) if is_time(key)}
        if self._keys is None:
            self._keys = tuple(metrics)
        if tuple(metrics) != self._keys:
            odd = sorted(set(metrics) ^ set(self._keys))
            raise ValueError(f"step {step}: the keys of metrics.jsonl are fixed by its first row; "
                             f"missing or new: {', '.join(odd)}")
        append_row(self.metrics_path, {"step": step, **metrics})
        append_row(self.timings_path, {"step": step, **timings})
        self.step = step


def is_time(name: str) -> bool:
    """Return whether a metric of that name is a time, which differs from run to run.

    >>> is_time("step_time"), is_time("train_samples_per_second"), is_time("entropy")
    (True, True, False)
    >>> is_time("sometimes_right"), is_time("completions/mean_terminated_length")
    (False, False)
    """
    words = re.split(r"[/_\s]", name)
    return any(set(word.split("_")) <= set(words) for word in TIME_WORDS)


# ---------------------------------------------------------------- resources

class ResourceMonitor:
    """Measure what a block costs; `.result` holds the numbers afterwards.

    wall_seconds, cpu_seconds (this process, its threads and its finished children), peak_rss_bytes
    (this process and its children, sampled every `interval` seconds, so shorter peaks may be
    missed), threads, and with a CUDA device peak_gpu_bytes and gpu_seconds (wall time while
    PyTorch holds memory on the card). PyTorch is asked only if it is imported already.

    >>> with ResourceMonitor() as monitor:
    ...     total = sum(range(1000))
    >>> monitor.result["wall_seconds"] >= 0 and monitor.result["peak_rss_bytes"] > 0
    True
    """

    def __init__(self, *, interval: float = 0.2):
        self.interval = interval
        self.result: dict = {}
        self._peak = 0
        self._gpu_seconds = 0.0
        self._stop = threading.Event()

    def __enter__(self) -> "ResourceMonitor":
        self._stop.clear()
        self._peak, self._gpu_seconds = 0, 0.0
        torch = _cuda()
        if torch is not None:
            torch.cuda.reset_peak_memory_stats()
        self._process = psutil.Process()
        self._sample()
        self._wall, self._cpu = time.perf_counter(), _cpu_seconds()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exception) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        torch = sys.modules.get("torch")
        self.result = {
            "wall_seconds": time.perf_counter() - self._wall,
            "cpu_seconds": _cpu_seconds() - self._cpu,
            "peak_rss_bytes": self._peak,
            "threads": torch.get_num_threads() if torch is not None else available_cpus(),
        }
        torch = _cuda()
        if torch is not None:
            self.result["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
            self.result["gpu_seconds"] = self._gpu_seconds

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()
            torch = _cuda()
            if torch is not None and torch.cuda.memory_allocated() > 0:
                self._gpu_seconds += self.interval

    def _sample(self) -> None:
        self._peak = max(self._peak, tree_rss_bytes(self._process))


def _cuda():
    """Return torch if it is imported and has started CUDA, else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def tree_rss_bytes(process: psutil.Process) -> int:
    """Return the resident memory of a process and all its descendants, in bytes (0 if gone)."""
    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.Error:
            continue
    return total


# ---------------------------------------------------------------- publishing

def publish(run: RunFolder, results: Path | str) -> Path:
    """Copy a complete run into `results` without weights, and return the copy.

    Of a run on a real release (not simulated), the tables with one row per account-day or
    completion stay behind as well, since its licence forbids passing rows on; published.json says
    what was left out. Raises `UserError` for an incomplete run.
    """
    if not run.complete:
        raise UserError(f"{run.path} is not complete, so it cannot be published. Finish it first.")
    simulated = _read_json(run.path / "provenance.json").get("simulated", False)
    left_out = []
    target = Path(results) / run.name
    with atomic_path(target) as temporary:
        temporary.mkdir()
        for file in sorted(run.path.rglob("*")):
            inside = file.relative_to(run.path)
            if not file.is_file() or inside.parts[0].startswith("."):
                continue
            weights = inside.parts[0] in WEIGHT_FOLDERS or file.suffix in WEIGHT_SUFFIXES
            if weights or (not simulated and file.name in ROW_TABLES):
                left_out.append(inside.as_posix())
                continue
            (temporary / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, temporary / inside)
        write_json(temporary / "published.json", {"left_out": left_out, "simulated": simulated})
    return target
