"""Publish a finished study: runs without weights, table and figure, into results/ and the README.

    python benchmarks/publish_study.py runs/laptop-seed0-1a2b3c4d

Copies what notebook 07 handed on (comparison.csv, comparison.json, metrics.csv, verdict.json) and
the runs that its table rests on (weights left out) to results/<study>/, draws the figure of the
table, and replaces the README's answer between its two markers. The numbers and the sentences (PPO
against GRPO, both against their rivals, what became of their citations) come from the files;
nothing is typed. Refused, before anything is written: a study without a verdict, its rivals or its
metrics, a verdict on another table, a run that is not complete, a README without the markers.
"""

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from ueba_helpers.data.files import atomic_path
from ueba_helpers.errors import UserError
from ueba_helpers.study import comparison, figures, report
from ueba_helpers.study.runs import RunFolder, publish

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args(arguments)
    try:
        _publish(args.study.resolve(), args.results, args.readme)
    except UserError as error:
        sys.stderr.write(f"publish_study: {error}\n")
        return 2
    return 0


def _publish(study: Path, results: Path, readme: Path) -> None:
    verdict, made_by = comparison.read_verdict(study), comparison.read_made_by(study)
    table = comparison.read_comparison(study)
    runs = [RunFolder(study / name) for name in made_by["runs"]]
    if "rivals" not in verdict or not (study / comparison.METRICS).exists():
        raise UserError(f"{study.name} lacks {comparison.METRICS} or the rivals in its verdict: "
                        "notebook 07 has changed since. Run it with --only 07_comparison --force.")
    unfinished = [run.name for run in runs if not run.complete]
    if unfinished:
        raise UserError(f"{', '.join(unfinished)} is not complete: run the study again.")
    text = readme.read_text(encoding="utf-8")
    if text.find(BEGIN) < 0 or text.find(END) < text.find(BEGIN):
        raise UserError(f"{readme} lacks the lines {BEGIN} and {END}, between which the answer "
                        "stands: put them back.")
    target = results / study.name
    with atomic_path(target) as temporary:  # takes the place of an earlier run of this study whole
        temporary.mkdir()
        for run in runs:
            publish(run, temporary)
        for name in ("comparison.csv", "comparison.json", "verdict.json", comparison.METRICS):
            shutil.copyfile(study / name, temporary / name)
        axes = figures.interval_plot(table, "macro_f1",
                                     label="Macro-F1 on the balanced test sample, 95 % interval")
        axes.figure.savefig(temporary / "macro_f1.png", dpi=130, bbox_inches="tight")
        plt.close(axes.figure)
    folder = os.path.relpath(target, readme.parent)
    block = answer(table, verdict, made_by, _commits(runs), folder=Path(folder).as_posix())
    with atomic_path(readme) as temporary:
        temporary.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: block, text, flags=re.DOTALL),
                             encoding="utf-8")


def _commits(runs: list[RunFolder]) -> list[str]:
    """Return the commits that the runs were made by, each said to be changed where it was."""
    found = [json.loads((run.path / "provenance.json").read_text(encoding="utf-8"))
             for run in runs]
    return sorted({f"`{(one['commit'] or 'unknown')[:10]}`"
                   + (" with uncommitted changes" if one["dirty"] else "") for one in found})


def answer(table, verdict: dict, made_by: dict, commits: list[str], *, folder: str) -> str:
    """Return the README's answer between its markers: sentences, table, figure, origin."""
    head = " | ".join(comparison.COMPARISON_COLUMNS.values())
    lines = [f"| {head} |", "|" + "---|" * len(comparison.COMPARISON_COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in report.headline_rows(table)]
    seeds = ", ".join(verdict["seeds"])
    origin = (
        f"Profile `{made_by['profile']}`, {'simulated' if verdict['simulated'] else 'real'} data. "
        f"The table is of seed {made_by['seed']}, the sentences above it of seed"
        f"{'s' if len(verdict['seeds']) > 1 else ''} {seeds}. Test users; in brackets the 95 % "
        "interval over users. Seconds: fitting or training until the dev sample is judged; "
        "sft_all, ppo and grpo begin where sft ends, so theirs come on top. Classical detectors "
        f"cite no evidence. Code of commit {', '.join(commits)}; files in [{folder}]({folder}).")
    figure = f"![Macro-F1 of every detector]({folder}/macro_f1.png)"
    said = "\n\n".join([verdict["sentence"], *(verdict[part]["sentence"]
                                              for part in ("citations", "rivals"))])
    return "\n".join([BEGIN, said, "", *lines, "", figure, "", origin, END])


if __name__ == "__main__":
    sys.exit(main())
