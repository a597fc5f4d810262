"""Figures are tested by the data they draw, not by their pixels."""

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from scipy import stats

from ueba_helpers.errors import UserError
from ueba_helpers.study import evaluation, figures
from ueba_helpers.task.verdicts import RISKS


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def ax():
    return plt.subplots()[1]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def history(seeds=3, methods=("ppo", "grpo")):
    return pd.DataFrame([
        {"method": method, "seed": seed, "step": step, "completions": 64 * step,
         "reward": step + 10 * i + seed, "explained_variance": step / 10 - 0.2}
        for i, method in enumerate(methods) for seed in range(seeds) for step in range(5)])


# ------------------------------------------------------------------ training

def test_learning_curves_draw_the_mean_and_students_band_over_seeds(ax):
    drawn = figures.learning_curves(history(), "reward", ax=ax)
    assert drawn is ax
    means = [line for line in ax.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in means] == ["ppo (3 seeds)", "grpo (3 seeds)"]
    np.testing.assert_allclose(means[0].get_ydata(), np.arange(5) + 1)
    np.testing.assert_allclose(means[1].get_xdata(), 64 * np.arange(5))
    half = stats.t.ppf(0.975, 2) * 1 / 3**0.5
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((1 - half, 5 + half))
    assert ax.get_xlabel() == "Generated completions" and ax.get_ylabel() == "Mean reward"


def test_a_single_seed_is_drawn_without_a_band_and_says_so(ax):
    figures.learning_curves(history(seeds=1), "reward", x="step", ax=ax)
    assert not ax.collections
    assert legend(ax)[0] == "ppo (1 seed, no interval)"


def test_panels_share_one_legend_and_keep_their_limits():
    axes = figures.learning_panels([
        (history(), "reward", None, (-1, 2)), (history(), "explained_variance", "EV", None),
        (history(), "reward", "again", None), (history(), "reward", "last", None)], x="step")
    assert [ax.get_ylabel() for ax in axes] == ["Mean reward", "EV", "again", "last"]
    assert axes[0].get_ylim() == (-1, 2) != axes[2].get_ylim()
    assert [ax.get_legend() is None for ax in axes] == [False, True, True, True]
    assert [ax.axison for ax in axes[0].figure.axes] == [True] * 4 + [False] * 2
    np.testing.assert_allclose(axes[1].lines[-1].get_ydata(), np.arange(5) / 10 - 0.2)
    at_zero = [any(set(line.get_ydata()) == {0} for line in ax.lines) for ax in axes]
    assert at_zero == [False, True, False, False], "only where 0 says something"


def test_explained_variance_shows_its_landmarks(ax):
    figures.explained_variance(history(methods=("ppo",)), ax=ax)
    flat = {line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1}
    assert {0, 1} <= flat
    assert ax.get_ylim()[0] <= -0.2 and ax.get_ylim()[1] > 1


def test_reward_terms_stack_gains_up_costs_down_and_sum_to_the_line(ax):
    terms = pd.DataFrame({"step": range(10), "accuracy": 0.5, "kl": -0.2, "format": 0.1})
    figures.reward_terms(terms, bins=5, ax=ax)
    line = next(line for line in ax.lines if line.get_label() == "sum")
    np.testing.assert_allclose(line.get_ydata(), 0.4)
    np.testing.assert_allclose(line.get_xdata(), [0.5, 2.5, 4.5, 6.5, 8.5])
    tops = [bar.get_y() + bar.get_height() for bar in ax.patches]
    assert max(tops) == pytest.approx(0.6) and min(tops) == pytest.approx(-0.2)
    with pytest.raises(UserError, match="no reward term"):
        figures.reward_terms(terms[["step"]])


def test_grouped_bars_stand_side_by_side_and_are_cut_at_the_limits(ax):
    table = pd.DataFrame({"ppo": [0.2, -3.0], "grpo": [0.4, np.nan]}, index=["start", "end"])
    figures.grouped_bars(table, label="Explained variance", limits=(-1, 1), ax=ax)
    assert [bar.get_height() for bar in ax.patches[:3]] == [0.2, -1.0, 0.4]
    middles = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
    assert middles == pytest.approx([-0.2, 0.8, 0.2, 1.2])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["start", "end"]
    assert legend(ax) == ["ppo", "grpo"] and ax.get_ylim() == (-1, 1)
    assert to_hex(ax.patches[2].get_facecolor()) == figures.NAMED_COLOURS["grpo"]


def test_lying_bars_have_the_tables_first_row_and_column_on_top(ax):
    def order(axes):
        """Return (height up the page, width, colour) of the bars, from the top down."""
        bars = [(axes.transData.transform((0, bar.get_y()))[1], bar.get_width(),
                 to_hex(bar.get_facecolor())) for bar in axes.patches]
        return [(width, colour) for _, width, colour in sorted(bars, reverse=True)]

    table = pd.DataFrame({"ppo": [0.2, -0.3], "grpo": [0.4, 0.1]},
                         index=pd.Index(["late", "roaming"], name="innocent cause"))
    figures.lying_bars(table, label="Share", ax=ax)
    ppo, grpo = (figures.NAMED_COLOURS[name] for name in table)
    assert order(ax) == [(0.2, ppo), (0.4, grpo), (-0.3, ppo), (0.1, grpo)]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["late", "roaming"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Share", "Innocent cause")
    assert legend(ax) == ["ppo", "grpo"]
    twin = table.plot.barh()  # broken: the table upside down
    assert [width for width, _ in order(twin)] != [width for width, _ in order(ax)]
    with pytest.raises(UserError, match="no rows"):
        figures.lying_bars(table.iloc[:0], label="Share")


def test_token_heatmap_colours_every_token_by_the_sign_of_its_value(ax):
    tokens = ["{", '"risk"', ": ", '"normal"', "}"]
    figures.token_heatmap(tokens, [-1, 0, 0.5, 1, -0.5], ax=ax, width=12)
    boxes = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert [text.get_text() for text in ax.texts] == tokens
    assert len(boxes) == 5 and boxes[0].get_width() == 1 and boxes[1].get_width() == 6
    red, blue = boxes[3].get_facecolor(), boxes[0].get_facecolor()
    assert red[0] > red[2] and blue[2] > blue[0]
    assert to_hex(boxes[1].get_facecolor()) == to_hex(plt.get_cmap("RdBu_r")(0.5))
    assert {box.get_y() for box in boxes} == {0, 1}  # the line broke at 12 characters
    with pytest.raises(UserError, match="one number per token"):
        figures.token_heatmap(tokens, [1, 2])
    odd = figures.token_heatmap(["\n", "\u65e5x", "\ufffd"], [0, 1, 2])
    assert [text.get_text() for text in odd.texts] == ["⏎", "·x", "·"]


def test_token_layers_paint_one_completion_several_times_on_one_scale(ax):
    def painted(axes):
        return [to_hex(patch.get_facecolor()) for patch in axes.patches]

    tokens = ["{", '"risk"', "}"]
    layers = {"value": np.array([0.0, 1.0, 2.0, 9.0]), "advantage": np.array([-1.0, 0.0, 1.0, 9.0])}
    figures.token_layers(tokens, layers, ax=ax)
    assert [text.get_text() for text in ax.texts] == ["value", *tokens, "advantage", *tokens]
    found = painted(ax)
    assert len(found) == 6 and found[0] == found[4] and found[1] == found[5]
    twin = [colour for values in layers.values()  # broken: a scale of its own for each layer
            for colour in painted(figures.token_heatmap(tokens, values[:3]))]
    assert twin[1] != twin[5]
    with pytest.raises(UserError, match="one number per token"):
        figures.token_layers(tokens, {"value": np.zeros(2)})


# ------------------------------------------------------------------ evaluation

def test_confusion_heatmap_shows_counts_and_shares_of_the_true_level(ax):
    counts = pd.DataFrame([[8, 1, 1, 0], [0, 3, 0, 1], [0, 0, 0, 0]], index=RISKS,
                          columns=evaluation.SAID)
    figures.confusion_heatmap(counts, ax=ax)
    np.testing.assert_allclose(np.asarray(ax.collections[0].get_array()).reshape(3, 4),
                               [[0.8, 0.1, 0.1, 0], [0, 0.75, 0, 0.25], [0, 0, 0, 0]])
    assert ax.texts[0].get_text() == "8\n80%"
    assert [t.get_text() for t in ax.get_xticklabels()] == list(evaluation.SAID)
    assert ax.get_ylabel() == "True risk"


def _curve(x, y):
    values = np.array([0.2, 0.5, 0.9])
    return pd.DataFrame({x: [1.0, 2.0, 5.0], y: values, "low": values - 0.1,
                         "high": values + 0.1})


def test_curves_carry_bands_and_axis_units(ax):
    figures.budget_recall({"ppo": _curve("budget", "recall")}, ax=ax)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.2, 0.5, 0.9])
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.1, 1.0))
    assert "per 1,000 account-days" in ax.get_xlabel() and ax.get_xscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "5"]
    other = figures.precision_recall({"a": _curve("recall", "precision")}, base_rate=0.0029)
    assert any("0.29%" in text.get_text() for text in other.texts)
    with pytest.raises(UserError, match="low"):
        figures.budget_recall({"ppo": _curve("budget", "recall").drop(columns="low")})


def test_interval_plot_draws_each_interval_and_marks_a_missing_one(ax):
    table = pd.DataFrame({"detector": ["rules", "ppo"], "macro_f1": [0.5, 0.7],
                          "macro_f1_low": [0.4, np.nan], "macro_f1_high": [0.65, np.nan]})
    figures.interval_plot(table, "macro_f1", reference=0.6, margin=0.02, ax=ax)
    spans = [tuple(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2]
    assert (0.4, 0.65) in spans
    points = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in points] == [0.5, 0.7]
    assert points[1].get_markerfacecolor() == "white"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["rules", "ppo"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the table's first row is on top
    with pytest.raises(UserError, match="macro_f1_high"):
        figures.interval_plot(table.drop(columns="macro_f1_high"), "macro_f1")


def ends(ax):
    return [tuple(np.round(path.vertices[:, 1], 3)) for lines in ax.collections
            for path in lines.get_paths()]


def test_interval_groups_put_versions_side_by_side_with_their_intervals(ax):
    table = pd.DataFrame({"detector": ["rules", "ppo"] * 2, "version": ["raw"] * 2 + ["jitter"] * 2,
                          "value": [0.5, 0.7, 0.4, 0.6]})
    table = table.assign(low=table["value"] - 0.1, high=table["value"] + 0.2)
    table.loc[3, ["low", "high"]] = np.nan  # ppo, jitter: no interval
    figures.interval_groups(table, group="version", label="Recall", limits=(0, 1), ax=ax)
    points = {(round(x, 3), y): line.get_markerfacecolor() for line in ax.lines
              for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert set(points) == {(-0.165, 0.5), (0.835, 0.7), (0.165, 0.4), (1.165, 0.6)}
    assert [place for place, face in points.items() if face == "white"] == [(1.165, 0.6)]
    assert ends(ax) == [(0.4, 0.7), (0.6, 0.9), (0.3, 0.6)], "none for the row without one"
    twin = plt.subplots()[1]  # broken: bars as long above the value as below it
    half = (table["high"] - table["low"]) / 2
    twin.vlines(range(4), table["value"] - half, table["value"] + half)
    assert ends(twin)[:3] != ends(ax)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["rules", "ppo"]
    assert legend(ax) == ["raw", "jitter"] and ax.get_ylim() == (0, 1)
    with pytest.raises(UserError, match="version"):
        figures.interval_groups(table.drop(columns="version"), group="version")


def test_evidence_confusion_draws_shares_that_fill_the_bar(ax):
    counts = pd.DataFrame([[0, 0, 3, 1], [2, 2, 0, 0], [0, 0, 0, 0]], index=RISKS,
                          columns=["hit", "missed", "wrong", "dont_care"])
    figures.evidence_confusion(counts, ax=ax)
    ends = {}
    for bar in ax.patches:
        middle = round(bar.get_y() + bar.get_height() / 2)
        ends[middle] = max(ends.get(middle, 0), bar.get_x() + bar.get_width())
    assert ends == pytest.approx({0: 1.0, 1: 1.0, 2: 0.0})


def test_resource_bars_stack_the_parts_and_name_the_unit(ax):
    table = pd.DataFrame({"method": ["ppo", "grpo"], "weights": [16, 16], "critic": [64, np.nan]})
    figures.resource_bars(table, unit="Tensor memory (MB)", ax=ax)
    assert [round(bar.get_width()) for bar in ax.patches] == [16, 16, 64, 0]
    assert [text.get_text() for text in ax.texts] == ["80", "16"]
    assert ax.get_xlabel() == "Tensor memory (MB)" and legend(ax) == ["weights", "critic"]


def test_side_by_side_draws_each_table_in_its_panel_with_one_legend():
    counts = {name: pd.DataFrame([[hit, 4 - hit, 0, 0]] * 3, index=RISKS,
                                 columns=["hit", "missed", "wrong", "dont_care"])
              for name, hit in (("ppo", 1), ("grpo", 3))}
    axes = figures.side_by_side(figures.evidence_confusion, counts, size=(5, 3))
    assert [ax.get_ylabel() for ax in axes] == ["True risk (ppo)", "True risk (grpo)"]
    assert [ax.get_legend() is None for ax in axes] == [False, True]
    assert tuple(axes[0].figure.get_size_inches()) == (10, 3)
    widths = [ax.patches[0].get_width() for ax in axes]
    assert widths == [0.25, 0.75], "each panel has its own table"
    twin = figures.side_by_side(figures.evidence_confusion, dict.fromkeys(counts, counts["ppo"]))
    assert [ax.patches[0].get_width() for ax in twin] != widths  # broken: one table twice


# ------------------------------------------------------------------ the data

def test_class_balance_states_the_base_rate_of_each_split(ax):
    counts = pd.DataFrame([[960, 30, 10], [99, 0, 1]], index=["train", "dev"], columns=RISKS)
    figures.class_balance(counts, ax=ax)
    assert sorted(bar.get_height() for bar in ax.patches) == [0, 1, 10, 30, 99, 960]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["train\nbase rate 1.00%",
                                                            "dev\nbase rate 1.00%"]
    assert ax.get_yscale() == "log"


def test_event_density_leaves_empty_hours_blank(ax):
    figures.event_density(pd.DataFrame([[0, 5], [100, 1]], index=["Mon", "Sun"], columns=[8, 9]),
                          ax=ax)
    drawn = np.ma.filled(ax.collections[0].get_array().astype(float), np.nan).reshape(2, 2)
    assert np.isnan(drawn[0, 0]) and drawn[1, 0] == 100


def events():
    return pd.DataFrame({
        "date": pd.to_datetime(["2010-07-01 12:00", "2010-07-03 23:00", "2010-07-03 08:00"]),
        "log": ["logon", "device", "logon"], "labelled": [False, True, False]})


def test_user_timeline_puts_logs_in_lanes_days_across_and_hours_up(ax):
    figures.user_timeline(events(), ax=ax)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["logon", "device"]
    plain, evidence, marks = ax.lines[-3:]
    np.testing.assert_allclose(plain.get_xdata(), [0, 2])
    np.testing.assert_allclose(plain.get_ydata(), [1.06 + 0.44, 1.06 + 0.88 * 8 / 24])
    np.testing.assert_allclose(evidence.get_xdata(), [2])
    np.testing.assert_allclose(evidence.get_ydata(), [0.06 + 0.88 * 23 / 24])
    assert list(marks.get_xdata()) == [2]
    shaded = [(p.get_y(), p.get_y() + p.get_height()) for p in ax.patches]
    assert len(shaded) == 4  # two stretches out of hours in each of two lanes
    assert any(low <= evidence.get_ydata()[0] <= high for low, high in shaded)
    assert not any(low <= plain.get_ydata()[0] <= high for low, high in shaded)
    assert "answer-key row" in legend(ax)


def test_day_timeline_draws_every_item_once_and_hides_none(ax):
    items = pd.DataFrame(
        [("e1", "logon", "08:00", "08:00", False), ("e2", "http", "08:00", "12:00", False),
         ("e3", "http", "09:00", "10:00", False), ("e4", "device", "22:00", "23:30", True)],
        columns=["item", "kind", "start", "end", "labelled"]).assign(detail="")
    figures.day_timeline(items, cited=["e4"], ax=ax)
    bars = {text.get_text(): bar for text, bar in zip(ax.texts, ax.patches[2:], strict=True)}
    assert set(bars) == {"e1", "e2", "e3", "e4"}
    assert (bars["e4"].get_x(), bars["e4"].get_width()) == pytest.approx((22.0, 1.5))
    assert to_hex(bars["e4"].get_facecolor()) == figures.PALETTE[3]
    assert to_hex(bars["e4"].get_edgecolor()) == "#000000"
    assert bars["e2"].get_y() + bars["e2"].get_height() <= bars["e3"].get_y()


def test_scenario_days_group_incidents_and_keep_the_kinds_apart(ax):
    days = pd.DataFrame([("I2", 2, 0, "malicious"), ("I2", 2, -3, "precursor"),
                         ("I1", 1, 0, "malicious"), ("I1", 1, 4, "other")],
                        columns=["incident", "scenario", "offset", "kind"])
    figures.scenario_days(days, ax=ax)
    drawn = {c.get_label(): c.get_offsets().data.tolist() for c in ax.collections}
    assert sorted(drawn["labelled malicious"]) == [[0, 0], [0, 1]]
    assert drawn["precursor: same behaviour, not labelled"] == [[-3, 1]]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["scenario 1", "scenario 2"]


# ------------------------------------------------------------------ for all figures

def test_a_name_keeps_its_colour_whatever_stands_beside_it():
    assert figures.colours(["grpo", "ppo"])["ppo"] == figures.colours(["ppo", "x"])["ppo"]
    chosen = figures.colours(["ppo", "grpo", "a", "b", "c"])
    assert len(set(chosen.values())) == 5


def test_drawing_changes_neither_tables_nor_settings():
    before = dict(matplotlib.rcParams)
    table = events()
    copy = table.copy(deep=True)
    figures.user_timeline(table)
    figures.learning_curves(history(), "reward")
    pd.testing.assert_frame_equal(table, copy)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("draw", [
    lambda: figures.learning_curves(history().drop(columns="seed"), "reward"),
    lambda: figures.learning_curves(history().iloc[:0], "reward"),
    lambda: figures.user_timeline(events().drop(columns="date")),
    lambda: figures.resource_bars(pd.DataFrame({"method": ["ppo"]}), unit="s"),
    lambda: figures.evidence_confusion(pd.DataFrame({"hit": [1]})),
])
def test_tables_without_what_they_need_are_refused(draw):
    with pytest.raises(UserError):
        draw()


def test_the_tables_of_evaluation_go_straight_into_the_figures():
    draw = np.random.default_rng(0)
    windows = [f"W{i:03d}" for i in range(60)]
    label = np.array(RISKS)[np.arange(60) % 3]
    users = [f"U{i % 12}" for i in range(60)]
    day = pd.Timestamp("2010-07-01").date()
    truth = pd.DataFrame({
        "window_id": windows, "user": users, "day": day, "risk": label,
        "malicious": label == "malicious", "scenario": 1,
        "incident": [u if r == "malicious" else None for u, r in zip(users, label, strict=True)],
        "precursor": False, "ignore": False, "evidence_truth": [["e1"]] * 60,
        "dont_care": [[]] * 60, "feature_truth": [[]] * 60})
    sample = pd.DataFrame({"window_id": windows, "split": "dev", "headline": True,
                           "weight_natural": 1.0, "stratum": 0})
    predictions = pd.DataFrame({
        "detector": "ppo", "seed": 0, "window_id": windows, "user": users, "day": day,
        "split": "dev", "label": label, "risk": label, "score": draw.random(60),
        "features": [[]] * 60, "evidence": [["e1"]] * 60, "valid": True, "seconds": 0.1})
    given, fast = (predictions, truth, sample), {"resamples": 20}
    table = evaluation.comparison_table(evaluation.evaluate(*given, **fast))
    for axes in (
            figures.interval_plot(table, "macro_f1"),
            figures.confusion_heatmap(evaluation.confusion(*given)),
            figures.evidence_confusion(evaluation.evidence_counts(*given)),
            figures.budget_recall({"ppo": evaluation.budget_curve(*given, **fast)}),
            figures.precision_recall({"ppo": evaluation.precision_recall_curve(*given, **fast)})):
        axes.figure.canvas.draw()
        assert axes.get_xlabel()
