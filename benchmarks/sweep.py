"""Sweep one setting of PPO and GRPO from a study's cold start: one run per value, method and seed.

    python benchmarks/sweep.py kl_coef --profile laptop --seeds 0 --runs runs [--values 0 .1]

| sweep | what changes | of |
|---|---|---|
| group_size | completions per prompt, 2 to 16, at equal completions per step | both |
| kl_coef | weight of the KL to the cold start, 0 to .5 | both |
| lam | GAE's lambda | PPO |
| critic_warmup_steps | steps with a frozen policy | PPO |
| arms | the published relatives of GRPO (`settings.ARMS`), beside the study's own | GRPO |

Every run is kept in the study's folder: a complete one is reused, an interrupted one resumes, and
the JSON is written anew after each, so that a sweep may be stopped and started again at will. It
holds, per run, the reward (first and last fifth of the steps), macro-F1 on a slice of dev windows
(before and after), KL, explained variance and seconds; a figure lies beside it. A smaller group
reads the same prompts several times (in `laptop` G = 2 four times), a larger one a part of them.
Refused: a setting that is not possible, and a group size that does not divide a step's completions.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ueba_helpers.data.files import write_json
from ueba_helpers.data.records import plain, read_rows
from ueba_helpers.errors import UserError
from ueba_helpers.rl.settings import ARMS, RLSettings
from ueba_helpers.study import figures
from ueba_helpers.study.runs import RunFolder, code_fingerprint, content_hash, provenance
from ueba_helpers.study.stages import Study, open_study

BOTH, OWN = ("ppo", "grpo"), "as in the study"
SWEEPS: Mapping[str, tuple[tuple[str, ...], tuple]] = {
    "group_size": (BOTH, (2, 4, 8, 16)),
    "kl_coef": (BOTH, (0.0, 0.02, 0.1, 0.5)),
    "lam": (("ppo",), (0.0, 0.8, 0.95, 1.0)),
    "critic_warmup_steps": (("ppo",), (0, 3, 6, 12)),
    "arms": (("grpo",), (OWN, *ARMS)),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--values", nargs="+", help="instead of the usual ones")
    parser.add_argument("--methods", nargs="+", choices=BOTH)
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", default="")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/sweep_<sweep>.json")
    args = parser.parse_args(arguments)
    out = args.out or Path(f"benchmarks/results/sweep_{args.sweep}.json")
    methods, usual = SWEEPS[args.sweep]
    methods = [name for name in methods if name in (args.methods or methods)]
    try:
        values = [value_of(args.sweep, text) for text in args.values] if args.values else usual
        if not methods:
            raise UserError(f"The sweep {args.sweep} is one of {SWEEPS[args.sweep][0]} alone.")
        studies = [open_study(args.profile, seed, args.data, args.runs) for seed in args.seeds]
        jobs = [(study, method, value, changes(args.sweep, value, getattr(study.profile, method)))
                for study in studies for method in methods for value in values]
        run_jobs(args.sweep, jobs, out)
    except UserError as error:
        sys.stderr.write(f"sweep: {error}\n")
        return 2
    return 0


def value_of(sweep: str, text: str) -> object:
    """Return a value as its setting's type."""
    if sweep == "arms":
        return text
    try:
        return type(SWEEPS[sweep][1][0])(text)
    except ValueError:
        raise UserError(f"{sweep}={text!r} is not possible: legal values are numbers like "
                        f"{', '.join(map(str, SWEEPS[sweep][1]))}.") from None


def changes(sweep: str, value, settings: RLSettings) -> dict:
    """Return the settings that one value of a sweep changes.

    A group of another size leaves the completions of a step and of a micro-batch as they are.
    """
    if sweep == "arms":
        if value != OWN and value not in ARMS:
            raise UserError(f"Unknown arm {value!r}. Legal arms: {OWN}, {', '.join(ARMS)}.")
        return dict(ARMS.get(value, {}))
    if sweep != "group_size":
        return {sweep: value}
    step = settings.prompts_per_step * settings.num_generations
    micro = settings.micro_batch_prompts * settings.num_generations
    if value < 1 or micro % value:
        raise UserError(f"group_size={value} is not possible: legal values divide the {micro} "
                        "completions of a micro-batch.")
    return {"num_generations": value, "prompts_per_step": step // value,
            "micro_batch_prompts": micro // value}


def run_jobs(name: str, jobs: Sequence[tuple[Study, str, object, dict]], out: Path) -> None:
    """Run what is missing; write JSON and figure after each run."""
    rows: list[dict] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    for study, method, value, changed in jobs:
        run = study.short_run(method, **changed)
        rows.append({"method": method, "value": value, "seed": study.seed, "run": run.name,
                     **outcome(run)})
        print(json.dumps(rows[-1]), flush=True)
        write_json(out, {
            "sweep": name, "profile": study.profile.name, "planned": len(jobs), "rows": rows,
            "made_by": {"settings": content_hash(study.profile.as_dict(), 16),
                        "code": code_fingerprint("data", "task", "rl"),
                        "commit": provenance()["commit"]}})
        drawn = draw(name, rows)
        drawn.savefig(out.with_suffix(".png"), dpi=130, bbox_inches="tight")
        plt.close(drawn)


def outcome(run: RunFolder) -> dict[str, float | None]:
    """Return what a run came to: rewards and macro-F1 before and after, KL, seconds.

    None stands for what was not measured: without a reference there is no KL to it.
    """
    steps, costs = run.metrics(), run.resources()
    judged = pd.DataFrame(read_rows(run.path / "held_out.jsonl")).sort_values("step")
    fifth = max(1, len(steps) // 5)
    found = {"reward_first": steps["reward"].head(fifth).mean(),
             "reward_last": steps["reward"].tail(fifth).mean(),
             "macro_f1_first": judged["macro_f1"].iloc[0],
             "macro_f1_last": judged["macro_f1"].iloc[-1],
             "kl_last": steps["kl_to_reference/per_completion"].tail(fifth).mean(),
             "completions": costs["completions"], "seconds": costs["wall_seconds_training"]}
    if "critic/explained_variance" in steps:
        found["explained_variance_last"] = steps["critic/explained_variance"].tail(fifth).mean()
    return {key: plain(float(value)) for key, value in found.items()}


def draw(name: str, rows: Sequence[Mapping]) -> Figure:
    """Return the figure: what each value came to, a point per run and a line through the means."""
    table = pd.DataFrame(rows)
    table["kl_last"] = pd.to_numeric(table["kl_last"])  # None where there is no reference
    order = list(dict.fromkeys(table["value"]))
    panels = {"macro_f1_last": "Macro-F1 on held-out windows", "reward_last": "Mean reward",
              "kl_last": figures.LABELS["kl"]}
    fig, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.4),
                             layout="constrained")
    for ax, (column, label) in zip(axes, panels.items(), strict=True):
        for method, part in table.groupby("method", sort=False):
            places = part["value"].map(order.index)
            colour = figures.colours([method])[method]
            ax.plot(places, part[column], ".", color=colour)
            means = part.groupby(places)[column].mean()
            ax.plot(means.index, means, color=colour, linewidth=1, label=method,
                    linestyle="" if name == "arms" else "-")
        ax.set_xticks(np.arange(len(order)), [str(value) for value in order],
                      rotation=20 if name == "arms" else 0)
        ax.set(xlabel=name, ylabel=label)
    axes[0].legend(frameon=False)
    return fig


if __name__ == "__main__":
    sys.exit(main())
