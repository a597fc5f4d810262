"""Tables to axes: every figure of the study, drawn from numbers that were computed elsewhere.

In: a table and, optionally, the matplotlib axes to draw on. Out: the axes, so that a figure can be
restyled, combined and tested without pixels. Nothing here computes a metric, reads a file or
changes matplotlib's settings. Refused with a `UserError`: a table without the columns it needs,
and points without intervals where an estimate is compared.

Colours are seaborn's `colorblind` palette; a detector or risk level keeps its colour in all
figures. Bands and whiskers are 95 % intervals; where one seed gives no interval the legend says
so. Titles are left to the caller.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, TwoSlopeNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from scipy import stats

from ueba_helpers.errors import UserError

PALETTE = tuple(sns.color_palette("colorblind").as_hex())
GREY, LIGHT = "#6b6b6b", "#e6e6e6"
NAMED_COLOURS = {
    "ppo": PALETTE[0], "grpo": PALETTE[1], "sft": PALETTE[2], "sft_all": PALETTE[8],
    "untrained": PALETTE[7], "gradient_boosting": PALETTE[3],
    "gradient_boosting_same_windows": "#8a4b1f", "rules": "#333333",
    "logistic_regression": PALETTE[4], "isolation_forest": PALETTE[6], "keyword": PALETTE[9],
    "cure": PALETTE[2], "collapse": PALETTE[3], "before warm-up": "#b0b0b0",
    "normal": PALETTE[2], "suspicious": PALETTE[8], "malicious": PALETTE[3], "invalid": PALETTE[7],
}
LABELS = {
    "completions": "Generated completions", "step": "Training step", "seconds": "Wall time (s)",
    "tokens": "Tokens, a prompt counted per completion", "gpu_seconds": "GPU time (s)",
    "reward": "Mean reward",
    "macro_f1": "Macro-F1", "macro_f1_natural": "Macro-F1 at natural weights",
    "accuracy": "Accuracy", "valid_rate": "Valid format rate",
    "pr_auc": "PR-AUC at the natural base rate",
    "pr_auc_precursors": "PR-AUC, precursors as positives",
    "evidence_hit_rate": "Evidence hit rate", "evidence_f1": "Evidence F1",
    "basis_support": "Basis support",
    "kl": "KL to the reference (nats per completion)", "entropy": "Entropy (nats per token)",
    "explained_variance": "Explained variance of the critic",
    "recall_at_2": "Recall at 2 alerts per 1,000 account-days",
}
LANES = ("logon", "device", "file", "email", "http")
DAY_STARTS, DAY_ENDS = 7, 19  # hours; what lies outside is shaded


def colours(names: Sequence[str]) -> dict[str, str]:
    """Return one colour per name: a known name's own, the others in order from what is left.

    >>> colours(["ppo", "mine"])["ppo"] == colours(["grpo", "ppo"])["ppo"]
    True
    """
    names = list(dict.fromkeys(names))
    chosen = {name: NAMED_COLOURS[name] for name in names if name in NAMED_COLOURS}
    free = [colour for colour in PALETTE if colour not in chosen.values()] or list(PALETTE)
    for i, name in enumerate(name for name in names if name not in chosen):
        chosen[name] = free[i % len(free)]
    return chosen


# --------------------------------------------------------------------------- training

def learning_curves(history: pd.DataFrame, metric: str, *, x: str = "completions",
                    by: str = "method", ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draw a metric over completions, steps or seconds: one line per method, mean over seeds.

    `history` has the columns `by`, seed, `x` and `metric`. The band is Student's 95 % interval
    over seeds at each x that two or more seeds share; thin lines are the seeds. For an x that
    differs between seeds (seconds), give every seed the same number of rows: rows are matched by
    position and x is their mean.
    """
    _require(history, (by, "seed", x, metric), "history")
    ax = _axes(ax)
    history = history.dropna(subset=[x, metric])
    chosen = colours(history[by])
    for method, rows in history.groupby(by, sort=False):
        runs = [run.sort_values(x) for _, run in rows.groupby("seed")]
        colour = chosen[method]
        if len(runs) == 1:
            ax.plot(runs[0][x], runs[0][metric], color=colour,
                    label=f"{method} (1 seed, no interval)")
            continue
        shared = min(len(run) for run in runs)
        places = np.mean([run[x].to_numpy(float)[:shared] for run in runs], axis=0)
        values = np.array([run[metric].to_numpy(float)[:shared] for run in runs])
        half = (stats.t.ppf(0.975, len(runs) - 1) * values.std(axis=0, ddof=1)
                / len(runs) ** 0.5)
        mean = values.mean(axis=0)
        ax.fill_between(places, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        for run in runs:
            ax.plot(run[x], run[metric], color=colour, alpha=0.3, linewidth=0.7)
        ax.plot(places, mean, color=colour, label=f"{method} ({len(runs)} seeds)")
    ax.set_xlabel(_label(x))
    ax.set_ylabel(label or _label(metric))
    ax.legend(frameon=False)
    return _clean(ax)


def learning_panels(panels: Sequence[tuple], *, x: str = "completions",
                    columns: int = 3) -> np.ndarray:
    """Draw several metrics side by side; return their axes, row by row, with one legend.

    `panels` holds (history, metric, label, limits of the axis): see `learning_curves`. A label of
    None is the metric's own, limits of None are found from the data. A panel of explained variance
    has a line at 0, where the critic is no better than a constant.
    """
    rows = -(-len(panels) // columns)
    _, grid = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained",
                           squeeze=False)
    for ax in grid.flat[len(panels):]:
        ax.set_axis_off()
    axes = grid.flatten()[:len(panels)]
    for ax, (history, metric, label, limits) in zip(axes, panels, strict=True):
        if metric.endswith("explained_variance"):
            ax.axhline(0, color=GREY, linewidth=0.8)
        learning_curves(history, metric, x=x, label=label, ax=ax)
        if limits is not None:
            ax.set_ylim(limits)
        ax.yaxis.label.set_size("small")
        if ax is not axes[0]:
            ax.get_legend().remove()
    return axes


def explained_variance(history: pd.DataFrame, *, x: str = "step", by: str = "method",
                       column: str = "explained_variance", ax: Axes | None = None) -> Axes:
    """Draw the critic's explained variance with its two landmarks: 1 is perfect, 0 a constant."""
    ax = learning_curves(history, column, x=x, by=by, ax=ax, label=LABELS["explained_variance"])
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.axhline(0, color=GREY, linewidth=0.8)
    lowest = float(history[column].min())
    ax.set_ylim(max(-1.0, min(-0.1, 1.1 * lowest)), 1.05)
    right = ax.get_xlim()[1]
    ax.text(right, 0, "no better than a constant ", ha="right", va="bottom", color=GREY,
            fontsize="small")
    return ax


def reward_terms(terms: pd.DataFrame, *, x: str = "step", bins: int = 20,
                 ax: Axes | None = None) -> Axes:
    """Draw the weighted reward terms as a stack, gains above zero and costs below.

    `terms` has the column `x` and one column per term, already weighted, so that a row sums to
    its reward. Rows are averaged in at most `bins` equal stretches of x; the line is the sum.
    """
    _require(terms, (x,), "terms")
    names = [name for name in terms.columns if name != x]
    if not names:
        raise UserError(f"terms holds no reward term beside {x}: give one column per term.")
    ax = _axes(ax)
    stretches = np.array_split(np.unique(terms[x]), min(bins, terms[x].nunique()))
    groups = [terms[terms[x].isin(stretch)] for stretch in stretches]
    places = np.array([stretch.mean() for stretch in stretches])
    values = np.array([group[names].mean().to_numpy(float) for group in groups])
    width = 0.9 * (np.diff(places).min() if len(places) > 1 else 1.0)
    above, below = np.zeros(len(places)), np.zeros(len(places))
    chosen = colours(names)
    for name, column in zip(names, values.T, strict=True):
        bottom = np.where(column >= 0, above, below)
        ax.bar(places, column, width, bottom=bottom, color=chosen[name], label=name)
        above += np.maximum(column, 0)
        below += np.minimum(column, 0)
    ax.plot(places, values.sum(1), color="black", marker="o", markersize=3, linewidth=1,
            label="sum")
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set_xlabel(_label(x))
    ax.set_ylabel("Weighted reward per completion")
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _clean(ax)


def grouped_bars(table: pd.DataFrame, *, label: str, x_label: str = "",
                 limits: tuple[float, float] | None = None, ax: Axes | None = None) -> Axes:
    """Draw one group of bars per row of a table, one bar per column; NaN is left out.

    Bars are cut at `limits`, the ends of the axis.
    """
    ax = _axes(ax, size=(8, 3.2))
    width = 0.8 / len(table.columns)
    chosen = colours(table.columns)
    for i, name in enumerate(table.columns):
        places = np.arange(len(table)) + (i - (len(table.columns) - 1) / 2) * width
        heights = table[name].to_numpy(float)
        ax.bar(places, heights if limits is None else heights.clip(*limits), 0.95 * width,
               color=chosen[name], label=name)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set_xticks(range(len(table)), list(table.index))
    ax.set_ylim(limits)
    ax.set_xlabel(x_label)
    ax.set_ylabel(label)
    ax.legend(frameon=False, ncols=len(table.columns), loc="lower center", bbox_to_anchor=(0.5, 1))
    return _clean(ax)


def lying_bars(table: pd.DataFrame, *, label: str, ax: Axes | None = None) -> Axes:
    """Draw one group of lying bars per row of a table, one bar per column, the first row on top.

    The name of the table's index, if it has one, stands beside the rows. Raises `UserError` for a
    table without rows.
    """
    _require(table, (), "table")
    ax = _axes(ax, size=(8, 0.8 + 0.42 * len(table)))
    width = 0.8 / len(table.columns)
    chosen = colours(table.columns)
    for i, name in enumerate(table.columns):
        places = np.arange(len(table)) + (i - (len(table.columns) - 1) / 2) * width
        ax.barh(places, table[name].to_numpy(float), 0.95 * width, color=chosen[name], label=name)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_yticks(range(len(table)), list(table.index))
    ax.invert_yaxis()
    ax.set_xlabel(label)
    ax.set_ylabel("" if table.index.name is None else _label(table.index.name))
    ax.legend(frameon=False, ncols=len(table.columns), loc="lower center", bbox_to_anchor=(0.5, 1))
    return _clean(ax)


def token_heatmap(tokens: Sequence[Sequence[str]] | Sequence[str], values, *,
                  label: str = "Advantage", names: Sequence[str] | None = None, width: int = 88,
                  limit: float | None = None, ax: Axes | None = None) -> Axes:
    """Draw completions as text, each token on the colour of its value (advantage, value, ...).

    `tokens`: one list of strings, or several completions; `values`: numbers of the same shape.
    Blue is below zero, red above, on a scale symmetric about zero up to `limit`. A line holds
    `width` characters; what no font is sure to have is shown as a dot.
    """
    if tokens and isinstance(tokens[0], str):
        tokens, values = [tokens], [values]
    values = [np.asarray(row, float) for row in values]
    if [len(row) for row in tokens] != [len(row) for row in values]:
        raise UserError("values must hold one number per token of each completion.")
    lines = max(1, sum(_wrapped(row, width)[-1][0] + 1 for row in tokens if len(row)))
    ax = _axes(ax, size=(9, 0.6 + 0.28 * (lines + len(tokens))))
    largest = limit or max((float(np.abs(row).max()) for row in values if len(row)), default=1.0)
    norm = TwoSlopeNorm(0, -(largest or 1.0), largest or 1.0)
    shades = plt.get_cmap("RdBu_r")
    line = 0
    for i, (row, numbers) in enumerate(zip(tokens, values, strict=True)):
        if names is not None:
            ax.text(0, line + 0.55, names[i], fontsize=8, color=GREY, va="center")
            line += 1
        placed = _wrapped(row, width)
        for (down, left, text), number in zip(placed, numbers, strict=True):
            shade = shades(norm(number))
            ax.add_patch(Rectangle((left, line + down), len(text), 0.94, color=shade, linewidth=0))
            dark = np.dot(shade[:3], (0.299, 0.587, 0.114)) < 0.5
            ax.text(left + len(text) / 2, line + down + 0.5, text, ha="center", va="center",
                    family="monospace", fontsize=7.5, color="white" if dark else "black")
        line += (placed[-1][0] if placed else 0) + 1.3
    ax.set_xlim(0, width)
    ax.set_ylim(line, 0)
    ax.set_axis_off()
    ax.figure.colorbar(plt.cm.ScalarMappable(norm, shades), ax=ax, label=label, fraction=0.03,
                       pad=0.01, aspect=12)
    return ax


def token_layers(tokens: Sequence[str], layers: Mapping[str, np.ndarray], *,
                 label: str = "Advantage", width: int = 88, ax: Axes | None = None) -> Axes:
    """Draw one completion several times, each time on the colours of one layer of values.

    `layers` maps names, which stand above the lines, to values `(T,)` for T tokens; what lies
    behind the last token (padding) is left out. All layers share one scale: see `token_heatmap`.
    Raises `UserError` for a layer with fewer values than tokens.
    """
    return token_heatmap([tokens] * len(layers),
                         [np.asarray(values, float)[:len(tokens)] for values in layers.values()],
                         label=label, names=list(layers), width=width, ax=ax)


def _wrapped(tokens: Sequence[str], width: int) -> list[tuple[int, int, str]]:
    """Return (line, column, shown text) of each token when lines break at `width` characters."""
    placed, line, column = [], 0, 0
    for token in tokens:
        text = token.replace("\n", "⏎").replace("Ġ", " ") or "∅"
        text = "".join(c if (c.isascii() and c.isprintable()) or c in "⏎∅" else "·" for c in text)
        if column and column + len(text) > width:
            line, column = line + 1, 0
        placed.append((line, column, text))
        column += len(text)
    return placed


# --------------------------------------------------------------------------- evaluation

def confusion_heatmap(confusion: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw a confusion table: colour is the share of its row, text the count and that share."""
    ax = _axes(ax, size=(4.6, 3.4))
    counts = confusion.to_numpy(float)
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    text = [[f"{count:,.0f}\n{share:.0%}" for count, share in zip(*row, strict=True)]
            for row in zip(counts, shares, strict=True)]
    sns.heatmap(shares, annot=text, fmt="", vmin=0, vmax=1, cmap="Blues", linewidths=1, ax=ax,
                xticklabels=list(confusion.columns), yticklabels=list(confusion.index),
                cbar_kws={"label": "Share of the true level"})
    ax.set_xlabel("Risk said")
    ax.set_ylabel("True risk")
    ax.tick_params(length=0)
    plt.setp(ax.get_xticklabels(), rotation=20, ha="right")
    plt.setp(ax.get_yticklabels(), rotation=0)
    return ax


def precision_recall(curves: Mapping[str, pd.DataFrame], *, base_rate: float | None = None,
                     ax: Axes | None = None) -> Axes:
    """Draw precision over recall with bands, one curve per detector.

    `curves` maps detectors to tables of `evaluation.precision_recall_curve`. The dotted line is
    the base rate: what guessing gives.
    """
    ax = _banded(curves, "recall", "precision", ax, drawstyle="steps-pre", step="pre")
    if base_rate is not None:
        ax.axhline(base_rate, color=GREY, linestyle=":", linewidth=1)
        ax.text(0, base_rate, f" base rate {base_rate:.2%}", ha="left", va="bottom", color=GREY,
                fontsize="small")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("Recall of malicious account-days")
    ax.set_ylabel("Precision at the natural base rate")
    return ax


def budget_recall(curves: Mapping[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """Draw recall over the analyst's budget of alerts with bands, one curve per detector.

    `curves` maps detectors to tables of `evaluation.budget_curve`. The budget axis is logarithmic.
    """
    ax = _banded(curves, "budget", "recall", ax, marker="o", markersize=3)
    ticks = sorted({value for curve in curves.values() for value in curve["budget"]})
    ax.set_xscale("log")
    kept = [tick for tick in ticks if tick in (0.5, 1, 2, 5, 10, 20, 50, 100)] or ticks
    ax.set_xticks(kept, [f"{tick:g}" for tick in kept])
    ax.minorticks_off()
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("Budget (alerts per 1,000 account-days)")
    ax.set_ylabel("Recall of malicious account-days")
    return ax


def _banded(curves, x, y, ax, *, step=None, **line) -> Axes:
    ax = _axes(ax)
    chosen = colours(list(curves))
    for detector, curve in curves.items():
        _require(curve, (x, y, "low", "high"), f"the curve of {detector}")
        ax.fill_between(curve[x], curve["low"], curve["high"], color=chosen[detector], alpha=0.15,
                        linewidth=0, step=step)
        ax.plot(curve[x], curve[y], color=chosen[detector], label=detector, **line)
    ax.legend(frameon=False)
    return _clean(ax)


def interval_plot(table: pd.DataFrame, metric: str, *, by: str = "detector",
                  reference: float | None = None, margin: float | None = None,
                  label: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw estimates with intervals, one row per detector, in the table's order (a forest plot).

    `table` has the columns `by`, `metric`, `<metric>_low` and `<metric>_high`, as
    `evaluation.comparison_table` gives. `reference` draws a line (zero for differences), `margin`
    shades what counts as no difference about it. A row without an interval is drawn hollow.
    """
    low, high = f"{metric}_low", f"{metric}_high"
    _require(table, (by, metric, low, high), "table")
    ax = _axes(ax, size=(6, 0.8 + 0.38 * len(table)))
    if reference is not None:
        ax.axvline(reference, color=GREY, linewidth=0.8)
        if margin is not None:
            ax.axvspan(reference - margin, reference + margin, color=LIGHT, zorder=0, linewidth=0)
    chosen = colours(table[by])
    for place, (_, row) in enumerate(table.iterrows()):
        known = bool(np.isfinite([row[low], row[high]]).all())
        colour = chosen[row[by]]
        if known:
            ax.plot([row[low], row[high]], [place, place], color=colour, linewidth=2.5,
                    solid_capstyle="butt")
        ax.plot(row[metric], place, "o", color=colour, markerfacecolor=colour if known else "white")
        ax.annotate(f"{row[metric]:.3f}" + ("" if known else " (no interval)"),
                    (row[metric], place), xytext=(0, 5), textcoords="offset points", ha="center",
                    va="bottom", fontsize="x-small")
    ax.set_yticks(range(len(table)), list(table[by]))
    ax.set_ylim(len(table) - 0.5, -0.7)
    ax.margins(x=0.12)
    ax.set_xlabel(label or _label(metric))
    return _clean(ax)


def interval_groups(table: pd.DataFrame, *, group: str, by: str = "detector",
                    label: str = "Value", limits: tuple[float, float] | None = None,
                    ax: Axes | None = None) -> Axes:
    """Draw estimates with intervals, one place per detector and side by side within it.

    `table` has the columns `by` (the places), `group` (what stands side by side there), value,
    low and high, as `evaluation.evaluate` gives them; both orders are the table's. A row whose
    interval is NaN is drawn hollow, one whose value is NaN not at all. `limits` are the ends of the
    value axis. Raises `UserError` for a table without a column or rows.
    """
    _require(table, (by, group, "value", "low", "high"), "table")
    ax = _axes(ax, size=(6, 3.6))
    places, names = list(table[by].unique()), list(table[group].unique())
    chosen = colours(names)
    for i, name in enumerate(names):
        rows = table[table[group] == name]
        across = rows[by].map(places.index) + 0.66 / len(names) * (i - (len(names) - 1) / 2)
        known = rows[["low", "high"]].notna().all(axis=1)
        for part, face in ((known, chosen[name]), (~known, "white")):
            ax.plot(across[part], rows.loc[part, "value"], "o", color=chosen[name],
                    markerfacecolor=face)
        ax.vlines(across[known], rows.loc[known, "low"], rows.loc[known, "high"],
                  colors=chosen[name], linewidth=2)
    ax.set_xticks(range(len(places)), [str(place).replace("_", "\n") for place in places])
    ax.set_ylim(limits)
    ax.set_ylabel(textwrap.fill(label, 32))
    handles = [Line2D([], [], color=chosen[name], marker="o", linestyle="", label=name)
               for name in names]
    ax.legend(handles=handles, frameon=False, ncols=len(names), loc="lower center",
              bbox_to_anchor=(0.5, 1))
    return _clean(ax)


def evidence_confusion(counts: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw which evidence was cited, per true risk level, as shares of one bar.

    `counts` comes from `evaluation.evidence_counts`: hit, missed, wrong and dont_care items.
    """
    parts = {"hit": ("true evidence, cited", PALETTE[2]), "missed": ("true evidence, not cited",
             LIGHT), "wrong": ("cited, but no evidence", PALETTE[3]),
             "dont_care": ("cited, don't-care", PALETTE[7])}
    _require(counts, tuple(parts), "counts")
    ax = _axes(ax, size=(6.5, 2.6))
    totals = counts[list(parts)].sum(axis=1).to_numpy(float)
    left = np.zeros(len(counts))
    for name, (label, colour) in parts.items():
        share = np.divide(counts[name].to_numpy(float), totals, out=np.zeros(len(counts)),
                          where=totals > 0)
        ax.barh(range(len(counts)), share, left=left, color=colour, label=label,
                edgecolor="white")
        for place, (number, width) in enumerate(zip(counts[name], share, strict=True)):
            if width > 0.04:
                ax.text(left[place] + width / 2, place, f"{number:,}", ha="center", va="center",
                        fontsize="small")
        left += share
    ax.set_yticks(range(len(counts)), list(counts.index))
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xlabel("Share of evidence items (numbers: items)")
    ax.set_ylabel("True risk")
    ax.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return _clean(ax)


def resource_bars(resources: pd.DataFrame, *, unit: str, by: str = "method",
                  ax: Axes | None = None) -> Axes:
    """Draw memory or time by part, one stacked bar per method.

    `resources` has the column `by` and one column per part (weights, gradients, optimiser,
    critic, ...; or rollouts, rewards, update, ...), all in `unit`, which labels the axis. The sum
    stands behind each bar.
    """
    _require(resources, (by,), "resources")
    parts = [name for name in resources.columns if name != by]
    if not parts:
        raise UserError(f"resources holds no part beside {by}: give one column per part.")
    ax = _axes(ax, size=(7, 1.2 + 0.5 * len(resources)))
    left = np.zeros(len(resources))
    for i, part in enumerate(parts):
        width = resources[part].fillna(0).to_numpy(float)
        ax.barh(range(len(resources)), width, left=left, label=part, edgecolor="white",
                color=PALETTE[i % len(PALETTE)])
        left += width
    for place, total in enumerate(left):
        ax.annotate(f"{total:,.3g}" if total < 1000 else f"{total:,.0f}", (total, place),
                    xytext=(4, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(resources)), list(resources[by]))
    ax.invert_yaxis()
    ax.set_xlim(0, 1.12 * max(left.max(), 1e-9))
    ax.set_xlabel(unit)
    ax.legend(frameon=False, ncols=min(4, len(parts)), loc="lower center", bbox_to_anchor=(0.5, 1))
    return _clean(ax)


# --------------------------------------------------------------------------- the data

def class_balance(counts: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how many account-days of each risk level a split holds, on a logarithmic axis.

    `counts`: one row per split (its index names them), one column per risk level. The base rate,
    the share of malicious account-days, stands above the last bar of each split.
    """
    _require(counts, ("malicious",), "counts")
    ax = _axes(ax, size=(6, 3.4))
    width = 0.8 / len(counts.columns)
    chosen = colours(counts.columns)
    for i, risk in enumerate(counts.columns):
        places = np.arange(len(counts)) + (i - (len(counts.columns) - 1) / 2) * width
        bars = ax.bar(places, counts[risk], width * 0.95, color=chosen[risk], label=risk)
        ax.bar_label(bars, [f"{value:,.0f}" for value in counts[risk]], fontsize="x-small")
    base = counts["malicious"] / counts.sum(axis=1)
    ax.set_yscale("log")
    ax.set_ylim(0.8, 4 * max(1, counts.to_numpy(float).max()))
    ax.set_xticks(range(len(counts)), [f"{split}\nbase rate {rate:.2%}"
                                       for split, rate in base.items()])
    ax.set_ylabel("Account-days (logarithmic)")
    ax.legend(frameon=False, ncols=len(counts.columns), loc="lower center",
              bbox_to_anchor=(0.5, 1))
    return _clean(ax)


def event_density(counts: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw events by weekday (rows) and hour (columns) as a heat-map, colour logarithmic."""
    ax = _axes(ax, size=(7, 2.8))
    values = counts.to_numpy(float)
    sns.heatmap(np.ma.filled(np.ma.masked_less_equal(values, 0), np.nan), ax=ax, cmap="viridis",
                norm=LogNorm(max(1.0, np.nanmin(values[values > 0], initial=1.0)),
                             max(2.0, values.max())),
                xticklabels=list(counts.columns), yticklabels=list(counts.index),
                cbar_kws={"label": "Events (logarithmic)"})
    ax.set_xlabel("Hour of day")
    ax.set_ylabel("")
    ax.tick_params(length=0)
    plt.setp(ax.get_yticklabels(), rotation=0)
    return ax


def user_timeline(events: pd.DataFrame, *, hours: tuple[float, float] = (DAY_STARTS, DAY_ENDS),
                  ax: Axes | None = None) -> Axes:
    """Draw an account's weeks as swim lanes: one lane per log, days across, hours up each lane.

    `events`: date (timestamp), log, and optionally labelled (bool, drawn as evidence marks).
    Out-of-hours time is shaded in every lane; days with a labelled event are marked at the top.
    """
    _require(events, ("date", "log"), "events")
    ax = _axes(ax, size=(9, 4.6))
    lanes = _lanes(events["log"])
    dates = pd.to_datetime(events["date"])
    first = dates.min().normalize()
    across = (dates.dt.normalize() - first).dt.days.to_numpy(float)
    hour = (dates - dates.dt.normalize()).dt.total_seconds().to_numpy(float) / 3600
    lane = events["log"].map({name: i for i, name in enumerate(lanes)}).to_numpy(float)
    up = len(lanes) - 1 - lane + 0.06 + 0.88 * hour / 24
    labelled = (events["labelled"].to_numpy(bool) if "labelled" in events
                else np.zeros(len(events), bool))
    for i in range(len(lanes)):
        bottom = len(lanes) - 1 - i
        for start, end in ((0, hours[0]), (hours[1], 24)):
            ax.axhspan(bottom + 0.06 + 0.88 * start / 24, bottom + 0.06 + 0.88 * end / 24,
                       color=LIGHT, linewidth=0, zorder=0)
        if i:
            ax.axhline(bottom + 1, color=GREY, linewidth=0.6)
    ax.plot(across[~labelled], up[~labelled], ".", color=PALETTE[0], markersize=3, alpha=0.6)
    ax.plot(across[labelled], up[labelled], "D", color=PALETTE[3], markersize=5,
            markeredgecolor="white", markeredgewidth=0.5)
    days = np.unique(across[labelled])
    ax.plot(days, np.full(len(days), len(lanes) + 0.12), "v", color=PALETTE[3], markersize=5)
    ax.set_ylim(0, len(lanes) + 0.25)
    ax.set_yticks([len(lanes) - 1 - i + 0.5 for i in range(len(lanes))], lanes)
    last = int(across.max())
    every = max(1, int(np.ceil((last + 1) / 10)))
    ticks = range(0, last + 1, every)
    ax.set_xticks(list(ticks), [(first + pd.Timedelta(days=t)).strftime("%d %b") for t in ticks])
    ax.set_xlim(-0.7, last + 0.7)
    ax.set_xlabel("Day (within a lane: 0 h at the bottom, 24 h at the top)")
    _timeline_legend(ax, labelled.any())
    return _clean(ax)


def day_timeline(items: pd.DataFrame, *, hours: tuple[float, float] = (DAY_STARTS, DAY_ENDS),
                 cited: Sequence[str] = (), ax: Axes | None = None) -> Axes:
    """Draw one window's evidence items as swim lanes over the hours of the day.

    `items`: item, kind, start and end ("HH:MM"), detail, and optionally labelled (bool). Each
    item is a bar with its id; evidence is red, items in `cited` have a black frame.
    """
    _require(items, ("item", "kind", "start", "end", "detail"), "items")
    ax = _axes(ax, size=(9, 3.6))
    lanes = _lanes(items["kind"])
    for start, end in ((0, hours[0]), (hours[1], 24)):
        ax.axvspan(start, end, color=LIGHT, linewidth=0, zorder=0)
    rows = list(items.sort_values(["start", "end"]).itertuples())
    levels, depth = _levels(rows)
    for row, level in zip(rows, levels, strict=True):
        start, width = _clock(row.start), _width(row)
        labelled = bool(getattr(row, "labelled", False))
        step = 0.84 / depth[row.kind]
        height = min(0.26, 0.9 * step)
        middle = lanes.index(row.kind) + 0.08 + step * (level + 0.5)
        ax.add_patch(Rectangle((start, middle - height / 2), width, height, zorder=2,
                               facecolor=PALETTE[3] if labelled else PALETTE[0],
                               edgecolor="black" if row.item in cited else "none", linewidth=1.4))
        ax.text(start + width + 0.06, middle, row.item, va="center", fontsize=7)
    for i in range(1, len(lanes)):
        ax.axhline(i, color=GREY, linewidth=0.6)
    ax.set_xlim(0, 24)
    ax.set_xticks(range(0, 25, 3))
    ax.set_ylim(len(lanes), 0)
    ax.set_yticks([i + 0.5 for i in range(len(lanes))], lanes)
    ax.set_xlabel("Hour of day")
    handles = [Patch(color=PALETTE[0], label="event"), Patch(color=PALETTE[3], label="evidence"),
               Patch(color=LIGHT, label="out of hours")]
    if len(cited):
        handles.append(Patch(facecolor="white", edgecolor="black", label="cited"))
    ax.legend(handles=handles, frameon=False, ncols=len(handles), loc="lower center",
              bbox_to_anchor=(0.5, 1))
    return _clean(ax)


def scenario_days(days: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw each insider's days about the first labelled one: what the key says and leaves out.

    `days`: incident, scenario, offset (days from the first labelled day), kind ("malicious",
    "precursor" or "other"). One line per incident, grouped by scenario.
    """
    _require(days, ("incident", "scenario", "offset", "kind"), "days")
    order = days.drop_duplicates("incident").sort_values(["scenario", "incident"])
    ax = _axes(ax, size=(8, 1 + 0.13 * len(order)))
    place = {incident: i for i, incident in enumerate(order["incident"])}
    styles = {"other": (LIGHT, "active, not in the incident"),
              "precursor": (PALETTE[8], "precursor: same behaviour, not labelled"),
              "malicious": (PALETTE[3], "labelled malicious")}
    for kind, (colour, label) in styles.items():
        rows = days[days["kind"] == kind]
        ax.scatter(rows["offset"], rows["incident"].map(place), marker="s", s=9, color=colour,
                   label=label, linewidths=0)
    ticks = []
    for scenario, rows in order.groupby("scenario"):
        places = [place[incident] for incident in rows["incident"]]
        ticks.append((np.mean(places), f"scenario {scenario}"))
        if min(places):
            ax.axhline(min(places) - 0.5, color=GREY, linewidth=0.6)
    ax.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_xlabel("Days from the first labelled day")
    ax.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1),
              fontsize="small", markerscale=2)
    return _clean(ax)


# --------------------------------------------------------------------------- several panels

def side_by_side(draw: Callable[..., Axes], tables: Mapping[str, pd.DataFrame], *,
                 size: tuple[float, float] = (5, 3.4)) -> np.ndarray:
    """Draw one table per panel by a function of this module; return the axes, in order.

    `tables` maps the names that stand beside the panels' y-axes to what `draw` takes; `size` is one
    panel's width and height in inches. A legend is shown once, in the first panel.
    """
    _, grid = plt.subplots(1, len(tables), figsize=(size[0] * len(tables), size[1]),
                           layout="constrained", squeeze=False)
    for ax, (name, table) in zip(grid[0], tables.items(), strict=True):
        draw(table, ax=ax)
        ax.set_ylabel(f"{ax.get_ylabel()} ({name})")
        if ax is not grid[0, 0] and ax.get_legend():
            ax.get_legend().remove()
    return grid[0]


# --------------------------------------------------------------------------- shared

def _axes(ax: Axes | None, *, size: tuple[float, float] = (6, 3.8)) -> Axes:
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _clean(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " ").capitalize())


def _lanes(logs: pd.Series) -> list[str]:
    found = set(logs)
    return [name for name in LANES if name in found] + sorted(found - set(LANES))


def _levels(rows) -> tuple[list[int], dict[str, int]]:
    """Return a level for each item so that none hides another, and each lane's depth."""
    free: dict[str, list[float]] = {}
    levels = []
    for row in rows:
        ends = free.setdefault(row.kind, [])
        start = _clock(row.start)
        level = next((i for i, end in enumerate(ends) if end <= start), len(ends))
        ends[level:level + 1] = [start + _width(row) + 0.7]  # room for the item's id
        levels.append(level)
    return levels, {kind: len(ends) for kind, ends in free.items()}


def _width(row) -> float:
    return max(_clock(row.end) - _clock(row.start), 0.18)


def _clock(text: str) -> float:
    """Return the hour of "HH:MM" as a number."""
    hour, minute = text.split(":")
    return int(hour) + int(minute) / 60


def _timeline_legend(ax: Axes, labelled: bool) -> None:
    handles = [Line2D([], [], color=PALETTE[0], marker=".", linestyle="", label="event"),
               Patch(color=LIGHT, label="out of hours")]
    if labelled:
        handles.insert(1, Line2D([], [], color=PALETTE[3], marker="D", linestyle="",
                                 label="answer-key row"))
    ax.legend(handles=handles, frameon=False, ncols=len(handles), loc="lower center",
              bbox_to_anchor=(0.5, 1))


def _require(table: pd.DataFrame, names: Sequence[str], what: str) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise UserError(f"{what} lacks the columns {', '.join(missing)}. It has "
                        + textwrap.shorten(", ".join(map(str, table.columns)), 200) + ".")
    if len(table) == 0:
        raise UserError(f"{what} has no rows: there is nothing to draw.")
