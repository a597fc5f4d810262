"""Publish a finished study: runs without weights, table and figure, into results/ and the README.

    python benchmarks/publish_study.py runs/laptop-seed0-1a2b3c4d

Copies comparison.csv and every complete run (weights left out) to results/<study>/, draws the
figure of the table, and replaces the README's answer between its two markers. The numbers come
from the files; nothing is typed.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from ueba_helpers.errors import UserError
from ueba_helpers.study import figures, report
from ueba_helpers.study.runs import RunFolder, publish

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args()
    table = report.read_comparison(args.study)
    if table is None:
        raise UserError(f"{args.study} has no comparison.csv: run notebook 07 first.")
    target = args.results / args.study.name
    target.mkdir(parents=True, exist_ok=True)
    commits = set()
    for path in sorted(args.study.glob("*-seed*/predictions.parquet")):
        run = RunFolder(path.parent)
        publish(run, target)
        commits.add(json.loads((run.path / "provenance.json").read_text())["commit"][:10])
    for name in ("comparison.csv", "verdict.json"):
        if (args.study / name).exists():
            shutil.copyfile(args.study / name, target / name)
    axes = figures.interval_plot(table, "macro_f1", label="macro-F1 on the test sample")
    axes.figure.savefig(target / "macro_f1.png", dpi=130, bbox_inches="tight")
    plt.close(axes.figure)
    args.readme.write_text(_with_answer(args.readme.read_text(), table, target, commits))
    return 0


def _with_answer(readme: str, table, target: Path, commits: set[str]) -> str:
    head = " | ".join(report.COMPARISON_COLUMNS.values())
    lines = [f"| {head} |", "|" + "---|" * len(report.COMPARISON_COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in report.headline_rows(table)]
    verdict = target / "verdict.json"
    said = json.loads(verdict.read_text())["sentence"] if verdict.exists() else ""
    origin = (f"Study `{target.name}`, simulated data, one seed, test users, 95 % intervals over "
              f"users; code of commit {', '.join(sorted(commits))}; files in "
              f"[{target.as_posix()}]({target.as_posix()}).")
    figure = f"![macro-F1]({target.as_posix()}/macro_f1.png)"
    block = "\n".join([BEGIN, said, "", *lines, "", figure, "", origin, END])
    return re.sub(f"{BEGIN}.*{END}", lambda _: block, readme, flags=re.DOTALL)


if __name__ == "__main__":
    sys.exit(main())
