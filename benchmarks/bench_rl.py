"""Measure whole optimiser steps of our GRPO and PPO beside stock TRL, each in a fresh process.

In: options (see --help). Out: a JSON file with the machine's facts and every measurement, a plot
beside it, and a markdown table on the screen. A measurement that fails is named in the table and
in the JSON, and the exit status is 1.

A step is: generate, score under policy and reference (and critic), one update over the batch. The
bound is unique tokens (a prompt counted once for its completions) x 6 FLOP x parameters (the
critic's included) over the machine's measured matmul rate.

`--trl112-python` names the Python of an environment with trl==1.12.0, the last release with a
PPOTrainer (tests/fixtures/make_trl_ppo_fixture.py says how to make one).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
OURS = ("GRPO", "PPO, separate critic", "PPO, shared critic", "GRPO, plain path")
STOCK_GRPO, TRL_112 = "stock GRPO", "TRL 1.12 PPO"
COLUMNS = ("model", "prompt_tokens", "group", "subject")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", metavar="NAME",
                        help="tiny, small, 0.6B, 1.7B (default: tiny small; on CUDA 0.6B 1.7B)")
    parser.add_argument("--prompts", nargs="+", type=int, default=[200, 800, 1600],
                        help="prompt lengths in tokens")
    parser.add_argument("--groups", nargs="+", type=int, default=[8],
                        help="completions per prompt; others than the first are measured at the "
                             "middle prompt length of the first model only")
    parser.add_argument("--prompts-per-step", type=int, default=8)
    parser.add_argument("--completion-tokens", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=8, help="completions per backward")
    parser.add_argument("--subjects", nargs="+", metavar="NAME",
                        choices=(*OURS, STOCK_GRPO, TRL_112),
                        help=f"of: {'; '.join((*OURS, STOCK_GRPO, TRL_112))}")
    parser.add_argument("--steps", type=int, default=3, help="measured steps per process")
    parser.add_argument("--rounds", type=int, default=1,
                        help="processes per measurement, the subjects taking turns")
    parser.add_argument("--lora-rank", type=int, help="default: 0; on CUDA 32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--trl112-python", metavar="PATH", type=Path)
    parser.add_argument("--seconds", type=float, default=600,
                        help="a process begins no further step after so many")
    parser.add_argument("--time-limit", type=float,
                        help="begin no further measurement after so many seconds")
    parser.add_argument("--resume", action="store_true",
                        help="keep what the JSON file already holds")
    parser.add_argument("--out", type=Path, help="JSON file (default: under benchmarks/results)")
    parser.add_argument("--quick", action="store_true",
                        help="one step of the tiny model at 200 tokens, to see that all works")
    args = parser.parse_args()
    from rl_workload import SHAPES  # brings torch, which --help does not need

    if args.quick:
        args.models, args.prompts, args.groups = args.models or ["tiny"], [200], args.groups[:1]
        args.steps = args.rounds = 1
    unknown = sorted(set(args.models or ()) - set(SHAPES))
    if unknown:
        parser.error(f"--models {unknown[0]}: there are {', '.join(SHAPES)}")
    python = args.trl112_python
    if python and not (python.is_file() and os.access(python, os.X_OK)):
        parser.error(f"--trl112-python {python}: no program; name bin/python of that environment")
    if not python and TRL_112 in (args.subjects or ()):
        parser.error(f"--subjects {TRL_112}: needs --trl112-python")
    for group in args.groups:
        if args.micro_batch % group and group % args.micro_batch:
            parser.error(f"--micro-batch {args.micro_batch} and a group of {group} do not divide")
    return args


class Failed(Exception):
    """A measurement's process ended with an error; the message is its last line."""


def child(script: str, python: Path | str, threads: int | None, **work) -> dict:
    """Run a measurement in a process of its own and return its JSON line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                   "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run([str(python), str(HERE / script), json.dumps(work)], text=True,
                          capture_output=True, env=environment, check=False)
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def plan(args: argparse.Namespace) -> list[dict]:
    """Return the workloads in the order they are measured: subjects side by side."""
    subjects = args.subjects or [
        "GRPO", STOCK_GRPO, "PPO, separate critic", "PPO, shared critic",
        *([TRL_112] if args.trl112_python else [])]
    middle = sorted(args.prompts)[len(args.prompts) // 2]
    points = [(model, prompt, args.groups[0]) for model in args.models for prompt in args.prompts]
    points += [(args.models[0], middle, group) for group in args.groups[1:]]
    return [{
        "subject": subject, "model": model, "prompt_tokens": prompt, "group": group,
        "prompts": args.prompts_per_step, "completion_tokens": args.completion_tokens,
        "micro_batch": max(args.micro_batch, group), "steps": args.steps, "seed": args.seed,
        "lora_rank": args.lora_rank, "seconds": args.seconds,
    } for model, prompt, group in points for _ in range(args.rounds) for subject in subjects]


def where(measurement: dict) -> tuple:
    return tuple(measurement[name] for name in COLUMNS)


def gather(measurements: list[dict]) -> dict[tuple, dict]:
    """Return one entry per (model, prompt, group, subject): medians over rounds."""
    cells: dict[tuple, list[dict]] = {}
    for measurement in measurements:
        cells.setdefault(where(measurement), []).append(measurement)
    merged = {}
    for key, rounds in cells.items():
        seconds = [s for one in rounds for s in one["seconds"]]
        merged[key] = {
            "step": statistics.median(seconds), "low": min(seconds), "high": max(seconds),
            "peak_bytes": max(one["peak_bytes"] for one in rounds),
            "growth_bytes": max(one["peak_bytes"] - one["peak_bytes_before_training"]
                                for one in rounds),
            "parameters": rounds[0]["parameters"] + rounds[0].get("critic_parameters", 0),
            "unique_tokens": rounds[0]["unique_tokens"],
            "cpu": statistics.median(s for one in rounds for s in one["cpu_seconds"]),
            **{part: statistics.median(one[part] for one in rounds)
               for part in ("generation", "rollout") if all(part in one for one in rounds)}}
        if key[-1] == TRL_112:  # its value model is a second copy of the policy
            merged[key]["parameters"] *= 2
    return merged


def summary(measurements: list[dict], rate: float) -> list[dict]:
    """Return table rows: seconds, parts, speed against the stock trainer, share of the bound."""
    merged = gather(measurements)
    rows = []
    for (model, prompt, group, subject), cell in merged.items():
        here = (model, prompt, group)
        stock = merged.get((*here, STOCK_GRPO if "GRPO" in subject else TRL_112))
        grpo = merged.get((*here, "GRPO"))
        bound = 6 * cell["unique_tokens"] * cell["parameters"] / rate
        rollout = cell.get("rollout")
        rows.append({
            "model": model, "prompt_tokens": prompt, "group": group, "subject": subject,
            "step_s": cell["step"], "low_s": cell["low"], "high_s": cell["high"],
            "cpu_s": cell["cpu"],
            "generation_s": cell.get("generation"),
            "scoring_s": None if rollout is None else rollout - cell["generation"],
            "update_s": None if rollout is None else cell["step"] - rollout,
            "times_faster_than_stock": stock and stock["step"] / cell["step"],
            "times_the_cost_of_grpo": grpo and cell["step"] / grpo["step"],
            "peak_mib": cell["peak_bytes"] / 2**20,
            "growth_mib": cell["growth_bytes"] / 2**20, "bound_s": bound,
            "share_of_bound": bound / cell["step"]})
    return rows


def table(rows: list[dict]) -> str:
    """Return the rows as a markdown table."""
    def number(value, digits=2):
        return "" if value is None else f"{value:.{digits}f}"

    lines = ["| model | prompt | G | trainer | s/step (range) | CPU s | generation | scoring | "
             "update | x stock | cost / GRPO | peak MiB | of it in training | share of bound |",
             "|---" * 14 + "|"]
    for row in rows:
        lines.append("| " + " | ".join([
            row["model"], str(row["prompt_tokens"]), str(row["group"]), row["subject"],
            f"{number(row['step_s'])} ({number(row['low_s'])}-{number(row['high_s'])})",
            number(row["cpu_s"]), number(row["generation_s"]), number(row["scoring_s"]),
            number(row["update_s"]),
            number(row["times_faster_than_stock"]), number(row["times_the_cost_of_grpo"]),
            number(row["peak_mib"], 0), number(row["growth_mib"], 0),
            number(row["share_of_bound"], 3)]) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Draw seconds per step over prompt length, group size and model size."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    first = rows[0]
    axes_of = [("prompt_tokens", "prompt tokens", {"model": first["model"],
                                                   "group": first["group"]}),
               ("group", "completions per prompt G", {"model": first["model"]}),
               ("model", "model", {"group": first["group"]})]
    lengths = sorted({row["prompt_tokens"] for row in rows})
    middle = lengths[len(lengths) // 2]
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, (column, label, fixed) in zip(panels, axes_of, strict=True):
        fixed = fixed if column == "prompt_tokens" else {**fixed, "prompt_tokens": middle}
        chosen = [row for row in rows if all(row[k] == v for k, v in fixed.items())]
        for subject in dict.fromkeys(row["subject"] for row in chosen):
            line = [row for row in chosen if row["subject"] == subject]
            if column != "model":
                line.sort(key=lambda row: row[column])
            axis.plot([str(row[column]) for row in line], [row["step_s"] for row in line],
                      marker="o", label=subject)
        axis.set(xlabel=label, ylabel="seconds per optimiser step", yscale="log",
                 title=", ".join(f"{k.replace('_', ' ')} {v}" for k, v in fixed.items()))
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def main() -> int:
    args = options()
    started = time.monotonic()
    facts = child("stock_step.py", sys.executable, args.threads, subject="machine")
    cuda = facts["device"] == "cuda"
    args.models = args.models or (["0.6B", "1.7B"] if cuda else ["tiny", "small"])
    args.lora_rank = args.lora_rank if args.lora_rank is not None else 32 if cuda else 0
    out = args.out or HERE / "results" / f"bench_rl{'_gpu' if cuda else ''}.json"
    measurements = []
    if args.resume and out.exists():
        measurements = json.loads(out.read_text(encoding="utf-8"))["measurements"]
    todo, failures = plan(args), []
    for kept in measurements:  # each covers one round of its place
        match = next((w for w in todo if all(kept.get(k) == v for k, v in w.items()
                                             if k not in ("steps", "seconds"))), None)
        if match:
            todo.remove(match)

    def result() -> dict:
        return {"machine": facts, "measurements": measurements, "failures": failures,
                "summary": summary(measurements, facts["flop_per_second"])}

    for number, work in enumerate(todo, 1):
        name = f"{work['model']}, {work['prompt_tokens']} tokens, G {work['group']}: " \
               f"{work['subject']}"
        if args.time_limit and time.monotonic() - started > args.time_limit:
            print(f"time limit reached, {len(todo) - number + 1} left: repeat with --resume",
                  file=sys.stderr)
            break
        ours = work["subject"] in OURS
        python = args.trl112_python if work["subject"] == TRL_112 else sys.executable
        try:
            measured = child("our_step.py" if ours else "stock_step.py", python, args.threads,
                             **work)
        except Failed as failure:
            failures.append({**work, "error": str(failure)})
            print(f"{number}/{len(todo)} {name}: FAILED: {failure}", file=sys.stderr)
        else:
            measurements.append(measured)
            print(f"{number}/{len(todo)} {name}: {measured['step']:.2f} s a step", file=sys.stderr)
        write(out, result())
    if measurements:
        write(out, result())
        plot(result()["summary"], out.with_suffix(".png"))
        print(f"{facts.get('gpu', facts.get('cpu'))}, {facts['dtype']}, {facts['threads']} "
              f"threads, {facts['flop_per_second'] / 1e9:.0f} GFLOP/s measured\n")
        print(table(result()["summary"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
