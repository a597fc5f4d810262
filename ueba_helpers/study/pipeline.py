"""The study as a graph of stages: data, cold start, notebooks, each in a process of its own.

In: stages (a notebook or a function, what they need, what they depend on) and a study folder.
Out: executed notebooks under `notebooks/`, their HTML under `html/`, one record per stage under
`stages/`, one `Outcome` per stage. A stage is skipped when it is complete and unchanged: the
record's key hashes the notebook's source, its parameters, the inputs, the package's code and the
files that the stages it needs have written. Refuses unknown names, notebooks without the study's
parameters, and a study folder that another process works on.

Stages that do not need each other run side by side where there are cores for it: a tiny policy
gains little from a second thread, a second stage gains more. Stages that all others wait for, or
that wait for all others, run alone on all cores. Which they are is fixed, so that a stage has the
same number of threads, and gives the same numbers, each time.

A stage counts as done only if its process exits with 0, says so in its status file, and leaves an
executed notebook without an error: a dead kernel marks every cell "completed", so the notebook
alone proves nothing. The executed notebook takes its place only then; a failed one is kept
beside it as `<name>.failed.ipynb`.

`python -m ueba_helpers.study.pipeline JOB.json` is the process of one stage.
"""

import fcntl
import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ueba_helpers.data.files import atomic_path, write_json
from ueba_helpers.errors import UserError
from ueba_helpers.study.config import Profile
from ueba_helpers.study.runs import (
    PACKAGE,
    available_cpus,
    code_fingerprint,
    content_hash,
    data_hash,
    file_fingerprint,
    package_versions,
    tree_rss_bytes,
)

DATA_STAGE, START_STAGE = BEFORE_NOTEBOOKS = "data", "cold_start"

# The course in reading order: each notebook, and the stages whose results it reads.
NOTEBOOKS: Mapping[str, tuple[str, ...]] = {
    "00_start_here": (),
    "01_data_exploration": (),
    "02_baselines": (),
    "03_reward_design": (START_STAGE,),
    "04_sft_and_model_selection": (START_STAGE, "02_baselines"),
    "05_ppo_training": (START_STAGE,),
    "06_grpo_training": (START_STAGE,),
    "07_comparison": ("02_baselines", "04_sft_and_model_selection", "05_ppo_training",
                      "06_grpo_training"),
    "09_error_analysis": ("07_comparison",),
    "appendix_policy_gradients_from_scratch": (),
}

COMPARISON = "07_comparison"  # writes the table; alone, as nearly all others have ended by then

PARAMETERS = ("PROFILE", "SEED", "DATA", "RUNS")

# Files of a study that no stage reads, or that differ between two equal runs.
_NO_PRODUCT_FOLDERS = {"notebooks", "html", "logs", "stages", "figures", "checkpoints"}
_NO_PRODUCT_FILES = ("timings.jsonl", "resources.json", "provenance.json", "report.html",
                     "seconds.json")

_SOCKET_PATH_LIMIT = 100  # a Unix socket's path ends at 104 (macOS) or 108 bytes (Linux)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the graph: a notebook, or a function named `package.module:function`.

    `needs` names earlier stages; `inputs` are hashes of whatever else the result depends on;
    `locations` names the parameters that are mere paths, which do not count for the key. A
    function is called with the parameters as keywords and may return the paths it wrote. Nothing
    runs beside a stage that is `alone`; `threads` overrides what the environment says.
    """

    name: str
    notebook: Path | None = None
    call: str = ""
    parameters: Mapping[str, object] = field(default_factory=dict)
    locations: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    expected_seconds: float = 60.0
    limit_seconds: float = 3600.0
    alone: bool = False
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a stage: done, unchanged, failed, not run or (in a dry run) would run."""

    name: str
    status: str
    seconds: float = 0.0
    message: str = ""
    path: Path | None = None
    user_error: bool = False

    @property
    def ok(self) -> bool:
        return self.status in ("done", "unchanged", "would run")


# ---------------------------------------------------------------- the study's graph

def notebooks_folder() -> Path:
    """Return the folder of the course; `UserError` if the package lies outside its repository."""
    folder = PACKAGE.parent / "notebooks"
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist. Run the study from a checkout of the project, "
                        "installed with `pip install --no-deps -e .`.")
    return folder


def study_stages(chosen: Profile, *, seed: int, data: Path | str, runs: Path | str,
                 notebooks: Path | str | None = None, jobs: int = 1) -> list[Stage]:
    """Return the stages of the whole study in order: data, cold start, every notebook.

    The cores (or OMP_NUM_THREADS of them) are shared by `jobs` stages that run at a time.
    """
    cores = _own_threads()
    shared = max(1, cores // jobs)
    folder = Path(notebooks) if notebooks is not None else notebooks_folder()
    data = Path(data).resolve() if str(data) else ""
    parameters = {"PROFILE": chosen.file or chosen.name, "SEED": seed, "DATA": str(data),
                  "RUNS": str(Path(runs).resolve())}
    settings = content_hash(chosen.as_dict(), 16)
    found = data_hash(chosen, seed=seed, data=data)
    versions = content_hash(package_versions())
    code = notebook_code_fingerprint()
    before = {
        DATA_STAGE: ("prepare", (), {"code": code_fingerprint(
            "data", "task", "rl/policies.py", "study/stages.py")}),
        START_STAGE: ("train_cold_start", (DATA_STAGE,), {"code": code, "versions": versions})}
    stages = [Stage(
        name=name, call=f"ueba_helpers.study.stages:{function}", needs=needs,
        parameters={key.lower(): value for key, value in parameters.items()},
        locations=("data", "runs"), inputs={"settings": settings, "data": found, **inputs},
        expected_seconds=chosen.expected_seconds(name), limit_seconds=chosen.limit_seconds(name),
        alone=True, threads=cores)
        for name, (function, needs, inputs) in before.items()]
    for name, needs in NOTEBOOKS.items():
        stages.append(Stage(
            name=name, notebook=folder / f"{name}.ipynb", parameters=parameters,
            locations=("DATA", "RUNS"), needs=(DATA_STAGE, *needs),
            inputs={"settings": settings, "data": found, "code": code, "versions": versions},
            expected_seconds=chosen.expected_seconds(name),
            limit_seconds=chosen.limit_seconds(name), alone=name == COMPARISON,
            threads=cores if name == COMPARISON else shared))
    return stages


def notebook_code_fingerprint() -> str:
    """Return the hash of the code a notebook can reach: all but the runner and the report.

    Nor does config.py count: its settings do, by their values, and its forecasts change no result.
    """
    study = sorted(f"study/{path.name}" for path in (PACKAGE / "study").glob("*.py")
                   if path.name not in ("pipeline.py", "report.py", "config.py"))
    return code_fingerprint("data", "task", "rl", "errors.py", *study)


def notebook_fingerprint(path: Path | str) -> str:
    """Return a hash of a notebook's cells; outputs, counts and editor metadata do not count."""
    notebook = read_notebook(path)
    return content_hash([[cell["cell_type"], "".join(cell["source"]),
                          sorted(cell.get("metadata", {}).get("tags", []))]
                         for cell in notebook["cells"]], 16)


def read_notebook(path: Path | str) -> dict:
    """Return a notebook as plain JSON; `UserError` if there is none."""
    try:
        notebook = json.loads(Path(path).read_text(encoding="utf-8"))
        notebook["cells"]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Restore it from the repository.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a notebook ({error}).") from error
    return notebook


def check_parameters(path: Path | str, parameters: Iterable[str]) -> None:
    """Raise `UserError` unless the cell tagged `parameters` has every one of these names.

    Papermill itself only warns, and the notebook would run with its defaults.
    """
    import logging

    import papermill

    read_notebook(path)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    known = papermill.inspect_notebook(str(path))
    unknown = [name for name in parameters if name not in known]
    if unknown:
        raise UserError(
            f"{path}: unknown notebook parameter {', '.join(unknown)}. Its cell tagged "
            f"'parameters' has {', '.join(known) or 'none'}; add the name there.")


def resolve(name: str, names: Sequence[str]) -> str:
    """Return the one stage that is called `name` or begins with it.

    >>> resolve("05", ["04_sft", "05_ppo"])
    '05_ppo'
    """
    name = Path(name).name.removesuffix(".ipynb")
    matches = [known for known in names if known == name] or [
        known for known in names if name and known.startswith(name)]
    if len(matches) != 1:
        raise UserError(f"Unknown notebook {name!r}. Legal names: {', '.join(names)}.")
    return matches[0]


def select(stages: Sequence[Stage], *, only: Sequence[str] = (),
           start: str | None = None) -> tuple[list[Stage], set[str]]:
    """Return the stages to look at, in order, and the names that were asked for.

    `only` asks for those stages, `start` for that one and all after it, neither for all. What they
    need is looked at as well, and runs only where it is not complete.
    """
    names = [stage.name for stage in stages]
    for position, stage in enumerate(stages):
        late = [need for need in stage.needs if need not in names[:position]]
        if late:
            raise ValueError(f"{stage.name} needs {', '.join(late)}, not among earlier stages")
    asked = {resolve(name, names) for name in only} if only else set(names)
    if start is not None:
        asked &= set(names[names.index(resolve(start, names)):])
    if not asked:
        raise UserError("--only and --from together leave nothing to run. Give one of them.")
    wanted = set(asked)
    for stage in reversed(stages):
        if stage.name in wanted:
            wanted.update(stage.needs)
    return [stage for stage in stages if stage.name in wanted], asked


# ---------------------------------------------------------------- records

def stage_key(stage: Stage, study: Path) -> str:
    """Return the hash of everything a stage's result depends on."""
    parameters = {key: value for key, value in stage.parameters.items()
                  if key not in stage.locations}
    upstream = {need: content_hash(read_record(study, need).get("products", {}), 16)
                for need in stage.needs}
    return content_hash({
        "source": notebook_fingerprint(stage.notebook) if stage.notebook else stage.call,
        "parameters": parameters, "inputs": stage.inputs, "upstream": upstream}, 32)


def read_record(study: Path | str, name: str) -> dict:
    """Return the record of a stage's last run, empty if there is none that can be read."""
    try:
        return json.loads((Path(study) / "stages" / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def executed_path(study: Path | str, name: str) -> Path:
    """Return where the executed copy of a notebook lies."""
    return Path(study) / "notebooks" / f"{name}.ipynb"


def is_current(stage: Stage, study: Path | str, key: str) -> bool:
    """Return whether a stage is complete and unchanged: same key, and all its files are there."""
    record = read_record(study, stage.name)
    if record.get("key") != key:
        return False
    if stage.notebook and not executed_path(study, stage.name).exists():
        return False
    return all((Path(study) / path).exists() for path in record["products"])


def _snapshot(study: Path) -> dict[str, tuple[int, int]]:
    """Return modification time and size of the files that stages hand on to each other."""
    found = {}
    for folder, folders, files in os.walk(study):
        folders[:] = [name for name in folders
                      if name not in _NO_PRODUCT_FOLDERS and not name.startswith(".")]
        for name in files:
            if name.endswith(_NO_PRODUCT_FILES) or name.startswith("."):
                continue
            path = Path(folder) / name
            with suppress(FileNotFoundError):  # a stage that runs beside this one replaces files
                stat = path.stat()
                found[str(path.relative_to(study))] = (stat.st_mtime_ns, stat.st_size)
    return found


def _products(stage: Stage, study: Path, before: Mapping, returned: Iterable[str]) -> dict:
    """Return what a stage has written, by path: files changed by this run or an earlier one."""
    after = _snapshot(study)
    paths = {path for path, stamp in after.items() if before.get(path) != stamp}
    paths.update(path for path in read_record(study, stage.name).get("products", {})
                 if (study / path).exists())
    for path in map(Path, returned):
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        paths.update(os.path.relpath(file, study) for file in files if file.is_file())
    written = {}
    for path in sorted(paths):
        with suppress(FileNotFoundError):
            written[path] = file_fingerprint(study / path)
    return written


# ---------------------------------------------------------------- running

def run_stages(stages: Sequence[Stage], *, study: Path | str, only: Sequence[str] = (),
               start: str | None = None, force: bool = False, keep_going: bool = False,
               dry_run: bool = False, environment: Mapping[str, str] | None = None,
               profile_file: str = "", jobs: int = 1,
               tell: Callable[[str], None] = lambda line: None,
               tick: Callable[[str], None] = lambda line: None) -> list[Outcome]:
    """Run the stages that are not complete and unchanged; return one outcome for each.

    `force` repeats the stages asked for (not what they need). After a failure nothing else runs,
    or with `keep_going` all that does not need the failed stage; stages that run already go on to
    their end. `profile_file` is copied into the study, where its stages read it. At most `jobs` run
    at a time. `tell` gets one line per event, `tick` the line of the running stages several times a
    second. Raises `UserError` before the first stage starts if a notebook is missing or lacks a
    parameter, or if another process holds the study.
    """
    study = Path(study).resolve()
    selected, asked = select(stages, only=only, start=start)
    for stage in selected:
        if stage.notebook:
            check_parameters(stage.notebook, stage.parameters)
    made = [path for path in (study, *study.parents) if not path.exists()]
    _check_place(study)
    if dry_run:
        return _Schedule(selected, asked, study=study, force=force, keep_going=keep_going,
                         dry_run=True, environment=None, jobs=1, tell=tell, tick=tick).run()
    try:
        study.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{study} cannot be made ({error.strerror}). Choose another --runs."
                        ) from None
    with _lock(study):
        if profile_file:
            with atomic_path(study / Path(profile_file).name) as kept:
                shutil.copyfile(profile_file, kept)
        outcomes = _Schedule(selected, asked, study=study, force=force, keep_going=keep_going,
                             dry_run=False, environment=environment, jobs=jobs, tell=tell,
                             tick=tick).run()
    if made and outcomes[0].user_error:  # bad input leaves nothing half-written behind
        shutil.rmtree(study)
        with suppress(OSError):  # the first that holds something else, and all above it, stay
            for folder in made[1:]:
                folder.rmdir()
    return outcomes


def _check_place(study: Path) -> None:
    """Refuse a place for the study that is no folder or cannot be written to."""
    place = next(path for path in (study, *study.parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        what = "is no folder" if not place.is_dir() else "cannot be written to"
        raise UserError(f"{place} {what}, so no study can be kept in {study}. Choose another "
                        "--runs.")


class _Schedule:
    """Which stage runs when: those whose needs are met, the longest way to the end first."""

    def __init__(self, selected, asked, *, study, force, keep_going, dry_run, environment, jobs,
                 tell, tick):
        self.selected, self.asked, self.study = selected, asked, study
        self.force, self.keep_going, self.dry_run = force, keep_going, dry_run
        self.environment, self.jobs, self.tell, self.tick = environment, jobs, tell, tick
        width = max(len(stage.name) for stage in selected)
        self.labels = {stage.name: f"{position:2d}/{len(selected)} {stage.name:<{width}}"
                       for position, stage in enumerate(selected, start=1)}
        self.way = _seconds_to_the_end(
            selected, {stage.name: expected(stage, study) for stage in selected})
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict[Future, Stage] = {}
        self.lines: dict[str, str] = {}
        self.stopped = False
        self.interrupted = threading.Event()

    def run(self) -> list[Outcome]:
        """Run every stage or say why not; return the outcomes in the order of the stages."""
        with ThreadPoolExecutor(max_workers=self.jobs) as pool:
            try:
                while len(self.outcomes) < len(self.selected):
                    waiting = [stage for stage in self._open() if not self._settled(stage)]
                    waiting.sort(key=lambda stage: -self.way[stage.name])
                    for stage in waiting:
                        if not _may_start(stage, self.running.values(), self.jobs):
                            break
                        self.running[pool.submit(self._run, stage)] = stage
                    for future in wait(self.running, return_when=FIRST_COMPLETED).done:
                        self._keep(self.running.pop(future), future.result())
            except BaseException:
                self.interrupted.set()  # whoever watches a process ends it
                raise
        return [self.outcomes[stage.name] for stage in self.selected]

    def _open(self) -> Iterator[Stage]:
        """Yield the stages without an outcome whose needs have one, running ones left out."""
        for stage in self.selected:
            if (stage.name not in self.outcomes and stage not in self.running.values()
                    and all(need in self.outcomes for need in stage.needs)):
                yield stage

    def _settled(self, stage: Stage) -> bool:
        """Keep the outcome of a stage that no process has to run for; return whether it is one."""
        needs = [self.outcomes[need] for need in stage.needs]
        changed = any(outcome.status == "would run" for outcome in needs)
        if self.stopped or not all(outcome.ok for outcome in needs):
            outcome = Outcome(name=stage.name, status="not run")
        elif (not (self.force and stage.name in self.asked) and not changed
              and is_current(stage, self.study, stage_key(stage, self.study))):
            outcome = Outcome(name=stage.name, status="unchanged",
                              path=_path_of(stage, self.study))
        elif self.dry_run:
            outcome = Outcome(name=stage.name, status="would run",
                              seconds=expected(stage, self.study))
        else:
            return False
        self._keep(stage, outcome)
        return True

    def _run(self, stage: Stage) -> Outcome:
        environment = stage_environment() if self.environment is None else self.environment
        if stage.threads:
            environment = {**environment, **_thread_counts(stage.threads)}
        return _run_one(stage, self.study, environment=environment,
                        label=self.labels[stage.name], interrupted=self.interrupted,
                        tell=self.tell, tick=functools.partial(self._tick, stage.name))

    def _tick(self, name: str, line: str) -> None:
        self.lines[name] = line
        self.tick(" | ".join(list(self.lines.values())))

    def _keep(self, stage: Stage, outcome: Outcome) -> None:
        self.outcomes[stage.name] = outcome
        self.lines.pop(stage.name, None)
        self.stopped |= outcome.status == "failed" and not self.keep_going
        self.tell(_line(self.labels[stage.name], outcome))


def planned_seconds(stages: Sequence[Stage], seconds: Mapping[str, float], jobs: int) -> float:
    """Return when the last of the stages will end, if each takes its `seconds`, `jobs` at a time.

    >>> a, b = Stage(name="a"), Stage(name="b")
    >>> planned_seconds([a, b], {"a": 3, "b": 2}, 1), planned_seconds([a, b], {"a": 3, "b": 2}, 2)
    (5.0, 3.0)
    """
    way = _seconds_to_the_end(stages, seconds)
    by_name = {stage.name: stage for stage in stages}
    now, running, ended = 0.0, {}, set()
    while len(ended) < len(stages):
        waiting = [stage.name for stage in stages if stage.name not in running.keys() | ended
                   and ended.issuperset(stage.needs)]
        for name in sorted(waiting, key=lambda name: -way[name]):
            if not _may_start(by_name[name], [by_name[other] for other in running], jobs):
                break
            running[name] = now + seconds[name]
        first = min(running, key=running.get)
        now = running.pop(first)
        ended.add(first)
    return float(now)


def _may_start(stage: Stage, running: Collection[Stage], jobs: int) -> bool:
    """Return whether a stage may run beside those that are running."""
    if not running:
        return True
    return len(running) < jobs and not (stage.alone or any(other.alone for other in running))


def _seconds_to_the_end(stages: Sequence[Stage], seconds: Mapping[str, float]
                        ) -> dict[str, float]:
    """Return how long each stage and the longest chain of stages behind it are expected to take."""
    way: dict[str, float] = {}
    for stage in reversed(stages):
        behind = [way[other.name] for other in stages if stage.name in other.needs]
        way[stage.name] = seconds[stage.name] + max(behind, default=0.0)
    return way


def _path_of(stage: Stage, study: Path) -> Path | None:
    return executed_path(study, stage.name) if stage.notebook else None


def _line(label: str, outcome: Outcome) -> str:
    line = f"{label}  {outcome.status}"
    if outcome.status == "would run":
        return f"{line} (about {clock(outcome.seconds)})"
    if outcome.status in ("done", "failed"):
        line += f" {clock(outcome.seconds)}"
    if outcome.message:
        line += f": {outcome.message}"
    if outcome.status == "failed" and outcome.path and not (  # the log of bad input says no more
            outcome.user_error and outcome.path.suffix == ".log"):
        line += f"\n      open {outcome.path}"
    return line


def clock(seconds: float) -> str:
    """Return a duration as minutes and seconds.

    >>> clock(62.4), clock(3725)
    ('1:02', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def expected(stage: Stage, study: Path | str) -> float:
    """Return how long a stage will take, in seconds: as long as last time, else as planned."""
    return read_record(study, stage.name).get("seconds", stage.expected_seconds)


@contextmanager
def _lock(study: Path) -> Iterator[None]:
    with open(study / ".lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"Another process works on {study}. Wait for it to end, or give this "
                            "study another --seed, --profile or --runs.") from None
        yield


def default_jobs(chosen: Profile) -> int:
    """Return how many stages run at a time: two on a CPU with two cores or more, one on a GPU."""
    return 1 if chosen.needs_gpu else min(2, available_cpus())


def _own_threads() -> int:
    """Return OMP_NUM_THREADS, else how many cores this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS") or str(available_cpus())
    if not asked.isdecimal() or int(asked) < 1:
        raise UserError(f"OMP_NUM_THREADS={asked!r} is not possible: set it to a whole number of 1 "
                        "and more, or unset it.")
    return int(asked)


def _thread_counts(count: int) -> dict[str, str]:
    return {f"{library}_NUM_THREADS": str(count) for library in ("OMP", "MKL", "OPENBLAS")}


def stage_environment(*, offline: bool = True, threads: int | None = None) -> dict[str, str]:
    """Return the environment of a stage's process: offline, quiet, with a fixed thread count.

    `threads` defaults to OMP_NUM_THREADS, else to the cores this process may use.
    """
    count = threads or _own_threads()
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    environment |= {
        **_thread_counts(count),
        "TOKENIZERS_PARALLELISM": "false", "JUPYTER_PREFER_ENV_PATH": "1", "PYTHONHASHSEED": "0",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment[name] = "1" if offline else "0"
    return environment


def _run_one(stage, study, *, environment, label, interrupted, tell, tick) -> Outcome:
    about, key = expected(stage, study), stage_key(stage, study)
    for folder in ("notebooks", "html", "logs", "stages"):
        (study / folder).mkdir(exist_ok=True)
    partial = study / "notebooks" / f".{stage.name}.partial.ipynb"
    html = study / "html" / f".{stage.name}.partial.html"
    failed = study / "notebooks" / f"{stage.name}.failed.ipynb"
    log = study / "logs" / f"{stage.name}.log"
    before = _snapshot(study)
    # From here on the old record must not pass for complete; its time still serves the forecast.
    write_json(study / "stages" / f"{stage.name}.json",
               {**read_record(study, stage.name), "key": None, "seconds": about})
    tell(f"{label}  started (about {clock(about)}, stopped at {clock(stage.limit_seconds)})")
    scratch = Path(tempfile.mkdtemp(prefix="ueba-", dir=_short_temporary_folder()))
    try:
        job = {"call": stage.call, "parameters": dict(stage.parameters),
               "notebook": str(stage.notebook.resolve()) if stage.notebook else None,
               "partial": str(partial), "html": str(html), "scratch": str(scratch)}
        write_json(scratch / "job.json", job)
        ended = _watch_process(
            scratch / "job.json", log=log, limit=stage.limit_seconds, interrupted=interrupted,
            environment=environment,
            tick=lambda elapsed: tick(f"{label}  {clock(elapsed)} of about {clock(about)}"))
        status = _read_status(scratch / "status.json")
        message = _why_not_done(stage, ended, status, partial)
        if message is None:
            if stage.notebook:
                os.replace(html, study / "html" / f"{stage.name}.html")
                os.replace(partial, executed_path(study, stage.name))
                failed.unlink(missing_ok=True)
            write_json(study / "stages" / f"{stage.name}.json", {
                "key": key, "seconds": ended.seconds, "peak_rss_bytes": ended.peak_rss_bytes,
                "products": _products(stage, study, before, status.get("returned", []))})
            peak = f"peak memory {ended.peak_rss_bytes / 2**30:.1f} GiB"
            return Outcome(name=stage.name, status="done", seconds=ended.seconds, message=peak,
                           path=_path_of(stage, study))
        if partial.exists():
            os.replace(partial, failed)
        return Outcome(name=stage.name, status="failed", seconds=ended.seconds, message=message,
                       path=failed if stage.notebook and failed.exists() else log,
                       user_error="user_error" in status)
    finally:
        partial.unlink(missing_ok=True)
        html.unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)


def _short_temporary_folder() -> str | None:
    """Return /tmp where it can be used: kernel sockets need short paths."""
    return "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else None


@dataclass(frozen=True)
class _Ended:
    returncode: int
    seconds: float
    peak_rss_bytes: int
    out_of_time: bool


def _watch_process(job: Path, *, log: Path, limit: float, interrupted: threading.Event,
                   environment: Mapping[str, str], tick: Callable[[float], None]) -> _Ended:
    """Run one stage's process to its end, its limit or an interruption; leave none behind."""
    began, peak, out_of_time, sampled = time.monotonic(), 0, False, 0.0
    family: set[psutil.Process] = set()
    # The temporary folders that Jupyter would otherwise share with the user's own sessions.
    environment = {**environment, "JUPYTER_RUNTIME_DIR": str(job.parent),
                   "IPYTHONDIR": str(job.parent / "ipython")}
    with open(log, "w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "ueba_helpers.study.pipeline", str(job)],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment,
            start_new_session=True)
        try:
            watched = psutil.Process(process.pid)
            while process.poll() is None and not interrupted.is_set():
                elapsed = time.monotonic() - began
                if elapsed > limit:
                    out_of_time = True
                    break
                if elapsed - sampled > 0.5 or not sampled:
                    sampled = max(elapsed, 1e-9)
                    peak = max(peak, tree_rss_bytes(watched))
                    family.update(_descendants(watched))
                    tick(elapsed)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                family.update(_descendants(watched))
                process.kill()
            process.wait()
            _end(family)
    return _Ended(process.returncode, time.monotonic() - began, peak, out_of_time)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _end(family: Iterable[psutil.Process]) -> None:
    """Kill what is left of a process's descendants (a kernel outlives its killed client)."""
    for member in family:
        try:
            member.kill()
        except psutil.Error:
            continue


def _read_status(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _why_not_done(stage: Stage, ended: _Ended, status: Mapping, partial: Path) -> str | None:
    """Return why a stage failed, or None if every sign says that it is done."""
    where = failing_cell(partial) if stage.notebook and partial.exists() else None
    place = f" in {where}" if where else ""
    if ended.out_of_time:
        return (f"stopped at its limit of {clock(stage.limit_seconds)}{place}; a profile file may "
                "raise least_limit_minutes")
    if "error" in status:
        return f"{status['error']}{place}"
    if ended.returncode < 0:
        return (f"its process was killed by signal {-ended.returncode}{place} "
                "(signal 9 often means that memory ran out)")
    if ended.returncode or not status.get("ok"):
        return f"its process ended with status {ended.returncode} and left no result{place}"
    if stage.notebook and where:
        return f"an error{place}"
    if stage.notebook and not partial.exists():
        return "its process left no executed notebook"
    return None


def failing_cell(path: Path | str) -> str | None:
    """Return the first failing code cell of an executed notebook, in words; None if none failed.

    Without an error it is the cell whose end the kernel never reported: there the kernel died or a
    limit struck, and papermill's own status says "completed" all the same.
    """
    try:
        cells = [cell for cell in json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
                 if cell["cell_type"] == "code"]
    except (OSError, ValueError, KeyError):
        return None
    failed = [number for number, cell in enumerate(cells, start=1)
              if cell["metadata"].get("papermill", {}).get("exception")
              or any(output["output_type"] == "error" for output in cell["outputs"])]
    if not failed:
        failed = [number for number, cell in enumerate(cells, start=1) if _was_cut_off(cell)]
    if not failed:
        return None
    source = "".join(cells[failed[0] - 1]["source"]).strip().splitlines()
    return f"code cell {failed[0]} of {len(cells)} (`{source[0][:60] if source else ''}`)"


def _was_cut_off(cell: Mapping) -> bool:
    """Return whether a cell was started and the kernel never answered that it had finished."""
    started = cell["metadata"].get("papermill", {}).get("start_time")
    answered = "shell.execute_reply" in cell["metadata"].get("execution", {})
    return bool(started) and not answered and bool("".join(cell["source"]).strip())


# ---------------------------------------------------------------- the process of one stage

def _main(job_path: str) -> int:
    """Run one job; write status.json beside it; return the exit status."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    status_path = Path(job_path).parent / "status.json"
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        returned = _execute_notebook(job) if job["notebook"] else _call(job)
    except UserError as error:
        write_json(status_path, {"error": str(error), "user_error": True})
        return 2
    except Exception as error:
        import traceback

        traceback.print_exc()
        status = {"error": describe_error(error)}
        if getattr(error, "ename", None) == UserError.__name__:  # raised in a notebook's kernel
            status |= {"error": error.evalue, "user_error": True}
        write_json(status_path, status)
        return 2 if "user_error" in status else 1
    write_json(status_path, {"ok": True, "returned": returned})
    return 0


def _die_with_parent(parent: int) -> None:
    """End this process and its kernel when the runner is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    _end(_descendants(psutil.Process()))
    os._exit(1)


def _call(job: Mapping) -> list[str]:
    module, _, function = job["call"].partition(":")
    returned = getattr(importlib.import_module(module), function)(**job["parameters"])
    if returned is None:
        return []
    return [str(Path(path).resolve())
            for path in ([returned] if isinstance(returned, str | Path) else returned)]


def _execute_notebook(job: Mapping) -> list[str]:
    import papermill
    from jupyter_client.manager import AsyncKernelManager

    class SocketFileKernelManager(AsyncKernelManager):
        """Talk to the kernel through socket files: parallel runs cannot race for ports."""

        def _transport_default(self):
            return "ipc"

        def _ip_default(self):
            return sockets  # the library's own would be the same file for kernels side by side

    sockets = str(Path(job["scratch"]) / "kernel")
    short = len(f"{sockets}-5") <= _SOCKET_PATH_LIMIT
    papermill.execute_notebook(
        job["notebook"], job["partial"], parameters=job["parameters"], kernel_name="python3",
        language="python", progress_bar=False, cwd=str(Path(job["notebook"]).parent),
        start_timeout=180, iopub_timeout=180,
        kernel_manager_class=SocketFileKernelManager if short else AsyncKernelManager)
    _write_html(job["partial"], job["html"], title=Path(job["notebook"]).stem)
    return []


def _write_html(notebook: str, html: str, *, title: str) -> None:
    import nbformat
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter(embed_images=True).from_notebook_node(
        nbformat.read(notebook, as_version=4), resources={"metadata": {"name": title}})
    Path(html).write_text(body, encoding="utf-8")


def describe_error(error: BaseException) -> str:
    """Return an exception as one line: for a notebook, the error its cell raised.

    >>> describe_error(KeyError("risk"))
    "KeyError: 'risk'"
    """
    import papermill.exceptions
    from nbclient.exceptions import DeadKernelError

    if isinstance(error, papermill.exceptions.PapermillExecutionError):
        text = f"{error.ename}: {error.evalue}"
    elif isinstance(error, DeadKernelError):
        text = "the kernel died (memory ran out, or the process was ended)"
    else:
        text = f"{type(error).__name__}: {error}"
    text = " ".join(_ANSI.sub("", text).split())
    return text if len(text) <= 400 else f"{text[:150]} ... {text[-240:]}"


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
