"""The command `ueba`: study, simulate, ingest, estimate, doctor.

In: arguments. Out: files, a few lines on the terminal, and an exit status: 0 done, 1 a stage or a
check failed, 2 a mistake the user can mend (one message on stderr, no traceback), 130 interrupted.
Heavy libraries are imported by the command that needs them.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ueba_helpers.errors import UserError
from ueba_helpers.study.config import PROFILES, check_device, profile

# Weights of the hub models that profiles name, for the estimate.
HUB_PARAMETERS = {"Qwen/Qwen3-4B-Instruct-2507": 4.02e9}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    if arguments is None:  # the real command line: leave no kernel behind when ended
        signal.signal(signal.SIGTERM, _terminated)
    try:
        return options.command(options)
    except UserError as error:
        _say(f"ueba {options.name}: {error}", stream=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has gone (ueba study | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        _say(f"\nueba {options.name}: interrupted. The same command goes on from here.",
             stream=sys.stderr)
        return 130


def _terminated(_number, _frame) -> None:
    """Leave through the `finally` blocks, so that no kernel is left behind."""
    raise SystemExit(143)


def _say(text: str, *, stream=None, end: str = "\n") -> None:
    stream = stream or sys.stdout
    stream.write(text + end)
    stream.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ueba", description="PPO against GRPO on CERT r4.2 insider-threat data.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    study = _command(commands, "study", _study, "run the whole study and write its report")
    _study_options(study)
    study.add_argument("--only", action="append", default=[], metavar="NOTEBOOK",
                       help="this notebook, and what it needs where that is not complete; may be "
                            "repeated; the number is enough (05)")
    study.add_argument("--from", dest="start", metavar="NOTEBOOK",
                       help="this notebook and all after it")
    study.add_argument("--force", action="store_true", help="repeat what is asked for even if it "
                       "is complete and unchanged; training that is complete is kept (remove its "
                       "run folder to repeat that too)")
    study.add_argument("--keep-going", action="store_true", help="after a failure, go on with all "
                       "that does not need the failed notebook")
    study.add_argument("--jobs", type=int, metavar="N", help="stages that run at a time, each with "
                       "its share of the cores (default: 2, or 1 on a GPU)")
    study.add_argument("--dry-run", action="store_true", help="show what would run, and how long")

    simulate = _command(commands, "simulate", _simulate, "write a CERT r4.2 folder that never "
                        "existed, with answers")
    simulate.add_argument("folder", type=Path, metavar="DIR")
    simulate.add_argument("--r4.2", action="store_true", dest="like_r4_2",
                          help="the size and mix of r4.2: 1000 users, 501 days, 30, 30 and 10 "
                               "insiders (3, 3 and 1 %% of users), hardness 0; other options given "
                               "beside it go first")
    simulate.add_argument("--users", type=int, help="default: 400")
    simulate.add_argument("--days", type=int, help="default: 150")
    simulate.add_argument("--seed", type=int, default=0, help="default: 0")
    simulate.add_argument("--insiders", type=_three_counts, metavar="A,B,C",
                          help="insiders of scenarios 1, 2, 3 (default: 6, 6 and 3 %% of users, "
                               "more than in r4.2, so that a small release has some to learn from)")
    simulate.add_argument("--hardness", type=float,
                          help="0: only insiders visit leak and keylogger sites, as in r4.2; up to "
                               "1: more and closer innocent look-alikes, benign visits to those "
                               "sites, incidents that leave fewer traces (default: 0.3)")
    simulate.add_argument("--label-noise", type=float, default=0.0,
                          help="share of the incident days of scenarios 1 and 2 that the answers "
                               "leave out beyond r4.2's own gaps, 0 to 0.9 (default: 0)")
    simulate.add_argument("--web-rate", type=float, default=1.0,
                          help="volume of http.csv, 1 as in r4.2 (default: 1)")
    simulate.add_argument("--content", choices=("few", "full"), default="few",
                          help="how many words the content fields hold (default: few)")
    simulate.add_argument("--json", action="store_true", help="print the summary as JSON")

    ingest = _command(commands, "ingest", _ingest, "validate a CERT r4.2 folder and read it into "
                      "a Parquet event store")
    ingest.add_argument("folder", type=Path, metavar="DIR")
    ingest.add_argument("--out", type=Path, required=True, metavar="STORE")
    ingest.add_argument("--memory-limit", default="1GB",
                        help="for DuckDB, for instance 4GB (default: 1GB)")
    ingest.add_argument("--threads", type=int, default=2, help="default: 2")
    ingest.add_argument("--max-bad", type=float, default=0.01, metavar="SHARE",
                        help="share of bad rows in a file that stops the ingest (default: 0.01)")
    ingest.add_argument("--allow-empty", action="store_true", help="accept a log without rows")
    ingest.add_argument("--allow-truncated", action="store_true",
                        help="put a last row that is cut into quarantine, instead of stopping")
    ingest.add_argument("--allow-partial", action="store_true",
                        help="read logs that lack events of the answer key, and a key that lacks "
                             "the file of an insider it lists, instead of stopping")
    ingest.add_argument("--json", action="store_true", help="print the manifest as JSON")

    estimate = _command(commands, "estimate", _estimate, "say how long a profile will take and "
                        "what memory it needs")
    _study_options(estimate)

    _command(commands, "doctor", _doctor, "check Python, packages, threads, CUDA and disk")
    return parser


def _command(commands, name: str, function, about: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
    parser.set_defaults(command=function)
    return parser


def _study_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="laptop", metavar="NAME",
                        help=f"one of {', '.join(PROFILES)}, or a .toml file that extends one "
                             "(default: laptop)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--data", type=_given, default="", metavar="DIR",
                        help="folder of the CERT r4.2 CSV files, or a store that `ueba ingest` "
                             "made of it (default: simulate one)")
    parser.add_argument("--runs", type=_folder, default=Path("runs"), metavar="DIR",
                        help="where studies are kept (default: runs)")


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("give the name of a folder")
    return Path(text)


def _given(text: str) -> str:
    """Return a path with ~ for the home folder resolved, as make and some shells leave it."""
    return str(Path(text).expanduser()) if text else ""


def _three_counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if len(counts) != 3 or min(counts) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not three counts such as 24,24,12")
    return counts


# ---------------------------------------------------------------- study

class _Progress:
    """Lines of a study: one that is rewritten on a terminal, one a minute elsewhere."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.width = 0
        self.last = time.monotonic()

    def tell(self, line: str) -> None:
        self.clear()
        _say(line, stream=self.stream)
        self.last = time.monotonic()

    def tick(self, line: str) -> None:
        if self.stream.isatty():
            _say("\r" + line.ljust(self.width), stream=self.stream, end="")
            self.width = len(line)
        elif time.monotonic() - self.last >= 60:
            self.tell(line)

    def clear(self) -> None:
        if self.width:
            _say("\r" + " " * self.width + "\r", stream=self.stream, end="")
            self.width = 0


def _study(options: argparse.Namespace) -> int:
    from ueba_helpers.study import pipeline, report, runs

    chosen = _checked_profile(options)
    if not options.dry_run:
        check_device(chosen)
    jobs = pipeline.default_jobs(chosen) if options.jobs is None else options.jobs
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: give a whole number of 1 and more.")
    study = runs.study_folder(chosen, seed=options.seed, data=options.data, runs=options.runs)
    given = chosen.file
    if given:  # every stage reads it again: from the study, which keeps it as it is now
        chosen = replace(chosen, file=str((study / Path(given).name).resolve()))
    stages = pipeline.study_stages(chosen, seed=options.seed, data=options.data,
                                   runs=options.runs, jobs=jobs)
    pipeline.select(stages, only=options.only, start=options.start)  # refused before a word
    progress = _Progress()
    progress.tell(f"study {study} (profile {chosen.name}: {chosen.about})")
    began = time.monotonic()
    try:
        outcomes = pipeline.run_stages(
            stages, study=study, only=options.only, start=options.start, force=options.force,
            keep_going=options.keep_going, dry_run=options.dry_run,
            environment=pipeline.stage_environment(offline=not chosen.needs_hub),
            profile_file=given, jobs=jobs, tell=progress.tell, tick=progress.tick)
    finally:
        progress.clear()
    if options.dry_run:
        total = pipeline.planned_seconds(
            stages, {stage.name: 0.0 for stage in stages}
            | {outcome.name: outcome.seconds for outcome in outcomes}, jobs)
        progress.tell(f"about {pipeline.clock(total)} in all, {jobs} at a time where they do not "
                      "need each other; nothing was run")
        return 0
    refused = next((outcome for outcome in outcomes if outcome.user_error), None)
    if refused is not None and not study.exists():
        raise UserError(refused.message)
    ok = all(outcome.ok for outcome in outcomes)
    progress.tell(f"{'done' if ok else 'failed'} after "
                  f"{pipeline.clock(time.monotonic() - began)}")
    _print_report(study, stages, chosen, options, outcomes, report, pipeline)
    if refused is not None:
        raise UserError(refused.message)
    return 0 if ok else 1


def _print_report(study, stages, chosen, options, outcomes, report, pipeline) -> None:
    names = [stage.name for stage in stages if stage.notebook]
    made = {stage.name for stage in stages
            if pipeline.is_current(stage, study, pipeline.stage_key(stage, study))}
    table = report.read_comparison(study)
    warnings = [f"{outcome.name}: {outcome.status}. {outcome.message}".rstrip()
                for outcome in outcomes if not outcome.ok]
    absent = [name for name in names if name not in made]
    if absent:
        warnings.append(f"Without an up-to-date result: {', '.join(absent)}.")
    if table is not None and pipeline.COMPARISON not in made:
        warnings.append(f"The table is that of an earlier {pipeline.COMPARISON}: code, settings or "
                        f"inputs have changed since. Run --only {pipeline.COMPARISON}.")
    samples = study / "data" / "samples.json"
    if samples.exists():  # what the reader must know before trusting a result
        warnings += [f"Data: {line}" for line in
                     json.loads(samples.read_text(encoding="utf-8"))["warnings"]]
    for line in warnings:
        _say(f"warning: {line}")
    data = options.data or "a simulated organisation"
    path = report.build_report(
        study, [name for name in names if name in made], warnings=warnings,
        subtitle=f"Profile {chosen.name}, seed {options.seed}, data: {data}.")
    if table is not None:
        _say("\n" + report.headline_text(table) + "\n")
    _say(f"report: {path}")


def _checked_profile(options: argparse.Namespace):
    if options.seed < 0:
        raise UserError(f"--seed {options.seed} is not possible: legal values are 0 and more.")
    return profile(options.profile)


# ---------------------------------------------------------------- data

def _simulate(options: argparse.Namespace) -> int:
    from ueba_helpers.data.simulate import simulate

    sizes = _sizes(options)
    progress = _Progress(sys.stderr)
    try:
        summary = simulate(options.folder, **sizes, seed=options.seed,
                           label_noise=options.label_noise, web_rate=options.web_rate,
                           content=options.content, progress=_share_told(progress))
    except BrokenPipeError:  # whoever read the progress has gone
        raise
    except OSError as error:
        raise UserError(f"{options.folder}: cannot be written ({error.filename or ''}: "
                        f"{error.strerror or error}). Name a folder that can be.") from error
    finally:
        progress.clear()
    if options.json:
        _say(json.dumps(summary, indent=2, sort_keys=True, default=str))
    else:
        rows = summary.get("rows", {})
        total = sum(rows.values()) if isinstance(rows, dict) else rows
        _say(f"{options.folder}: {total:,} rows, {sizes['users']} users, {sizes['days']} days, "
             f"{sum(sizes['insiders'])} insiders")
    return 0


def _sizes(options: argparse.Namespace) -> dict:
    """Return users, days, insiders and hardness: as given, else r4.2's or those of a small one."""
    preset = {"users": 1000, "days": 501, "hardness": 0.0} if options.like_r4_2 else {
        "users": 400, "days": 150, "hardness": 0.3}
    sizes = {name: value if getattr(options, name) is None else getattr(options, name)
             for name, value in preset.items()}
    percents = (3, 3, 1) if options.like_r4_2 else (6, 6, 3)
    share = tuple(max(1, sizes["users"] * percent // 100) for percent in percents)
    return {**sizes, "insiders": options.insiders or share}


def _share_told(progress: _Progress, now=time.monotonic):
    """Return a callback (days done, days in all) that tells the share and the time left."""
    from ueba_helpers.study.pipeline import clock

    began = now()

    def told(done: int, total: int) -> None:
        left = (now() - began) * (total - done) / done
        progress.tick(f"simulate: {done:,} of {total:,} days, {done / total:.0%}, "
                      + (f"about {clock(left)} left" if done < total else "now answers and truth"))

    return told


def _ingest(options: argparse.Namespace) -> int:
    from ueba_helpers.data.cert import ingest

    progress = _Progress(sys.stderr)
    written = options.out / "manifest.json"
    before = written.read_bytes() if written.is_file() else None
    try:
        manifest = ingest(options.folder, options.out, memory_limit=options.memory_limit,
                          threads=options.threads, max_quarantine_share=options.max_bad,
                          allow_empty=options.allow_empty,
                          allow_truncated=options.allow_truncated,
                          allow_partial=options.allow_partial, progress=progress.tick)
    finally:
        progress.clear()
    if before not in (None, written.read_bytes()):
        _say(f"warning: {options.out} held the store of other files or options, now replaced",
             stream=sys.stderr)
    if options.json:
        _say(json.dumps(manifest, indent=2, sort_keys=True, default=str))
        return 0
    rows = manifest["rows"]
    _say(f"{options.out}: {rows['stored']:,} of {rows['read']:,} rows stored, "
         f"{rows['quarantined']:,} bad rows in quarantine.csv, {rows['other_releases']:,} rows of "
         "other releases in the answer key passed over")
    for warning in manifest["warnings"]:
        _say(f"warning: {warning}", stream=sys.stderr)
    return 0


# ---------------------------------------------------------------- estimate and doctor

def _estimate(options: argparse.Namespace) -> int:
    from ueba_helpers.study import pipeline, runs

    chosen = _checked_profile(options)
    stages = pipeline.study_stages(chosen, seed=options.seed, data=options.data,
                                   runs=options.runs)
    study = runs.study_folder(chosen, seed=options.seed, data=options.data, runs=options.runs)
    _say(f"profile {chosen.name}: {chosen.about}")
    seconds = {stage.name: pipeline.expected(stage, study) for stage in stages}
    for stage in stages:
        measured = "seconds" in pipeline.read_record(study, stage.name)
        _say(f"  {stage.name:<28} {pipeline.clock(seconds[stage.name]):>8}  "
             f"{'as last time' if measured else 'planned'}")
    jobs = pipeline.default_jobs(chosen)
    total = pipeline.planned_seconds(stages, seconds, jobs)
    beside = f"  {jobs} at a time where they do not need each other" if jobs > 1 else ""
    _say(f"  {'all':<28} {pipeline.clock(total):>8}{beside}")
    parameters = policy_parameters(chosen.policy)
    if parameters is None:
        _say(f"policy {chosen.policy.name}: size unknown before it is loaded")
        return 0
    _say(f"policy {chosen.policy.name}: {parameters / 1e6:,.1f} M parameters; weights, gradients, "
         f"optimiser, critic and reference together about "
         f"{training_bytes(chosen.policy, parameters) / 2**30:.2f} GiB, activations apart")
    return 0


def policy_parameters(policy) -> float | None:
    """Return the number of a policy's parameters; None if it is not known before loading.

    For the tiny Qwen3 with tied embeddings it is exact, once its tokenizer fills the vocabulary:
    V*H embeddings, and per layer the projections of queries and outputs, of half as many keys and
    values, a gated feed-forward network of width 3*H, and the norms.
    """
    if policy.name != "tiny":
        return HUB_PARAMETERS.get(policy.name)
    width, head = policy.hidden_size, 32
    heads = max(2, width // head)
    attention = 2 * width * heads * head + 2 * width * max(1, heads // 2) * head
    layer = attention + 9 * width * width + 2 * width + 2 * head
    return policy.vocab_size * width + policy.layers * layer + width


def training_bytes(policy, parameters: float) -> float:
    """Return the bytes of all resident tensors but activations.

    Full training: policy and critic hold weights, gradients and two Adam moments, the reference
    weights only. LoRA: one frozen base serves all three; of the adapters (about rank / 1000 of the
    weights at width 2,500) policy and critic hold all four.
    """
    size = {"float32": 4, "bfloat16": 2}[policy.dtype]
    if policy.lora_rank == 0:
        return parameters * size * (4 + 4 + 1)
    adapter = parameters * policy.lora_rank / 4000
    return parameters * size + 2 * adapter * 4 * 4


def _doctor(_options: argparse.Namespace) -> int:
    from ueba_helpers.study.runs import PACKAGE, available_cpus, installed_version

    problems = 0

    def check(name: str, found: str, good: bool, advice: str = "") -> None:
        nonlocal problems
        problems += not good
        _say(f"{'ok  ' if good else 'FAIL'}  {name:<14} {found}"
             f"{'' if good or not advice else ' -> ' + advice}")

    version = sys.version_info
    check("python", platform.python_version(), (3, 11) <= version < (3, 14),
          "use Python 3.11, 3.12 or 3.13")
    pins = _pins(PACKAGE.parent / "requirements.txt")
    wrong = [f"{name} {found or 'absent'}, pinned {pin}" for name, pin in pins.items()
             if (found := installed_version(name)) is None or found.split("+")[0] != pin]
    check("packages", "; ".join(wrong[:8]) if wrong else f"{len(pins)} as pinned" if pins
          else "no requirements.txt beside the package", not wrong,
          "pip install -r requirements.txt")
    if installed_version("torch") is None:
        check("torch", "absent", False, "pip install torch==2.13.0")
    else:
        torch = importlib.import_module("torch")
        check("torch", f"{torch.__version__}, {torch.get_num_threads()} threads on "
              f"{available_cpus()} cores", torch.get_num_threads() <= available_cpus(),
              "set OMP_NUM_THREADS to the number of cores")
        cuda = torch.cuda.is_available()
        check("cuda", torch.cuda.get_device_name(0) if cuda
              else "none: profiles smoke and laptop only", True)
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    check("disk", f"{free:.0f} GiB free here", free >= 5, "the laptop study needs about 5 GiB")
    _say("everything is in order" if not problems else f"{problems} to mend")
    return 1 if problems else 0


def _pins(path: Path) -> dict[str, str]:
    """Return the pinned version of each package in a requirements file (empty without one)."""
    if not path.exists():
        return {}
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


if __name__ == "__main__":
    sys.exit(main())
