"""Questions put to trained policies, and to a training: what changes if one thing is changed?

In: windows and, for each way of writing them, the policy's predictions. Out: tables of paired
differences with 95 % intervals from a bootstrap over users. An attack is measured against a
harmless text in the same place (`attacked_windows`, `attack_flips`); what a policy knows by heart
shows as a gain from real names on the users it was trained on that the others lack (`named_rows`,
`name_gains`). What a setting of PPO does shows in short runs from one start (`short_arms`,
`arm_table`). Refused: predictions for other windows than were asked about.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from ueba_helpers.data.records import read_rows
from ueba_helpers.data.windows import Window
from ueba_helpers.errors import UserError
from ueba_helpers.rl.settings import PolicySettings, PPOSettings
from ueba_helpers.study.evaluation import difference_verdict, percentile_interval, user_draws
from ueba_helpers.task import injections
from ueba_helpers.task.prompts import fit_budget, keep_items, prompt_dataset

HARMLESS = "quarterly report.doc"
NAMINGS = ("codes", "other codes", "names")


def user_by_user(windows: pd.DataFrame, n: int) -> pd.DataFrame:
    """Return up to `n` rows of a table with the column user, from as many users as possible.

    Users give a row each in turn: first everybody's first one, in the order of the table.
    """
    turn = windows.groupby("user").cumcount().to_numpy()
    return windows.iloc[np.argsort(turn, kind="stable")[:n]]


def attacked_windows(windows: Sequence[Window], *, places: Sequence[str],
                     texts: Sequence[str] = injections.INJECTIONS, rounds: int | None = None
                     ) -> tuple[list[Window], pd.DataFrame]:
    """Return windows to ask about and a table that says what each of them is.

    First the windows as they are; then, for each place, every window with a harmless text in that
    place; then the attacks, `rounds` times the suite (`injections.planted`). Table columns: place
    ("" for the clean ones), kind ("clean", "control" or a kind of injection), origin (index of the
    clean window), user.
    """
    made, rows = list(windows), [("", "clean", i) for i in range(len(windows))]
    for place in places:
        for i, window in enumerate(windows):
            made.append(injections.plant(window, HARMLESS, place=place))
            rows.append((place, "control", i))
    for i, place, text, window in injections.planted(windows, places=places, injections=texts,
                                                     rounds=rounds):
        made.append(window)
        rows.append((place, injections.INJECTION_KINDS.get(text, "other"), i))
    asked = pd.DataFrame(rows, columns=["place", "kind", "origin"])
    asked["user"] = [window.user for window in made]
    return made, asked


def attack_flips(asked: pd.DataFrame, risk: Sequence[str], *, by: str = "place",
                 seed: int = 0, resamples: int = 1000) -> pd.DataFrame:
    """Return how many verdicts attacks changed, one row per place (or per `kind`).

    `risk` holds the risks said about the windows of `attacked_windows`, in their order. Columns:
    attacks, attack (share of changed verdicts), control (the same for the harmless text in the same
    window and place), beyond (their difference) with low and high, alarms (attacks on days that
    were called malicious before), talked_down (share of these that no longer are) and
    talked_down_control (the same for the harmless text; both NaN without an alarm).
    """
    risk = np.asarray(risk, str)
    if len(risk) != len(asked):
        raise UserError(f"attack_flips: {len(risk)} verdicts for {len(asked)} windows; predict all "
                        "windows that attacked_windows returned, in their order.")
    before = risk[asked["origin"].to_numpy()]
    rows = asked.assign(flip=(risk != before).astype(float),
                        down=np.where(before == "malicious", risk != "malicious", np.nan))
    control = rows[rows["kind"] == "control"].set_index(["place", "origin"])[["flip", "down"]]
    attacks = rows[~rows["kind"].isin(("clean", "control"))]
    attacks = attacks.join(control.set_axis(["control", "down_control"], axis=1),
                           on=["place", "origin"])
    made = []
    for key, part in attacks.groupby(by, sort=False):
        beyond = part["flip"] - part["control"]
        low, high = _interval(beyond.to_numpy(), part["user"], seed, resamples, 0.95)
        made.append({by: key, "attacks": len(part), "attack": part["flip"].mean(),
                     "control": part["control"].mean(), "beyond": beyond.mean(), "low": low,
                     "high": high, "alarms": int(part["down"].notna().sum()),
                     "talked_down": part["down"].mean(),
                     "talked_down_control": part["down_control"].mean()})
    return pd.DataFrame(made).set_index(by)


def named_rows(windows: Sequence[Window], key: str, *, max_items: int,
               count_tokens: Callable[[list[dict]], int] | None = None,
               budget: int | None = None, **options: object) -> dict[str, list[dict]]:
    """Return the prompt rows of the same windows under each of `NAMINGS`.

    "codes" are those of the study's key, "other codes" those of another key, "names" the real
    accounts and hosts. All three show the same items: as many as fit the budget in each of them.
    `options` are those of `prompts.prompt_dataset`.
    """
    keys = dict(zip(NAMINGS, (key, f"{key} another", None), strict=True))
    windows = [keep_items(window, max_items) for window in windows]
    if count_tokens is not None and budget is not None:
        for value in keys.values():
            windows = [fit_budget(window, count_tokens, budget, max_items=max_items,
                                  pseudonym_key=value, **options) for window in windows]
    return {name: prompt_dataset(windows, max_items=max_items, pseudonym_key=value, **options)
            for name, value in keys.items()}


def name_gains(said: Mapping[str, pd.DataFrame], seen: Collection[str], *, margin: float = 0.05,
               seed: int = 0, resamples: int = 1000, level: float = 0.95) -> pd.DataFrame:
    """Return what other codes, and real names, change in the share of right verdicts.

    `said` maps each of `NAMINGS` to the predictions of one policy for the same windows; `seen` are
    the users it was trained on. An invalid verdict is wrong. One row per (naming, group), group
    "seen", "unseen" or "seen - unseen": windows, users, right (share under "codes"), gain, low,
    high, verdict. Each gain is paired within a window and its interval resamples users; that of the
    last group joins the other two (Zou and Donner 2008). The verdict is that of
    `evaluation.difference_verdict` with this margin. Knowing accounts by heart would be a gain from
    names on seen users, beyond that on unseen ones.
    """
    codes = said["codes"]
    right = {name: (table["risk"] == table["label"]).to_numpy(float)
             for name, table in said.items()}
    for name, table in said.items():
        if list(table["window_id"]) != list(codes["window_id"]):
            raise UserError(f"name_gains: the predictions with {name!r} are of other windows than "
                            "those with 'codes'; ask about the same windows in the same order.")
    known = codes["user"].isin(set(seen)).to_numpy()
    made = []
    for name in NAMINGS[1:]:
        gain = right[name] - right["codes"]
        parts = {}
        for group, rows in (("seen", known), ("unseen", ~known)):
            users = codes.loc[rows, "user"]
            parts[group] = {
                "windows": int(rows.sum()), "users": users.nunique(),
                "right": _mean(right["codes"][rows]), "gain": _mean(gain[rows]),
                "intervals": [_interval(gain[rows], users, seed, resamples, share)
                              for share in (level, 2 * level - 1)]}
        parts["seen - unseen"] = _apart(parts["seen"], parts["unseen"])
        for group, part in parts.items():
            (low, high), narrow = part.pop("intervals")
            made.append({"naming": name, "group": group, **part, "low": low, "high": high,
                         "verdict": difference_verdict((low, high), narrow, margin)})
    return pd.DataFrame(made).set_index(["naming", "group"])


def short_arms(arms: Mapping[str, PPOSettings], start: Path | str, rows: Sequence[Mapping],
               policy: PolicySettings, *, watched: Sequence[Mapping], scratch: Path | str,
               thresholds: Mapping[str, float] | None = None
               ) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Train PPO once per arm from one checkpoint, as an exhibit; return what the runs logged.

    `arms` maps names to settings; all train on the prompt rows `rows` and are judged greedily on
    `watched` at step 0, half-way and at the end. Returned are the steps (rows of metrics.jsonl) and
    the scores (macro_f1 and more at each judged step), both with the columns method (the arm) and
    seed, and the alarms (`alarm_table`). `thresholds` are fields of `monitors.Thresholds`, to fit
    so short runs. The runs lie in the folder `scratch` while they last; nothing of them is kept.
    Raises `UserError` if there is no arm.
    """
    from ueba_helpers.rl import recipes

    if not arms:
        raise UserError("short_arms: there is no arm; name at least one with its settings.")
    steps, scores, rang = [], [], []
    for name, arm in arms.items():
        judged: list[dict] = []
        with TemporaryDirectory(prefix="scratch-", dir=scratch) as folder:
            recipes.ppo(start, folder, rows, arm, policy, held_out=watched,
                        evaluate_every=max(1, arm.steps // 2),
                        on_held_out=lambda step, values, into=judged: into.append(
                            {"step": step, **values}))
            written = read_rows(Path(folder) / "metrics.jsonl")
        steps.append(pd.DataFrame(written).assign(method=name, seed=arm.seed))
        scores.append(pd.DataFrame(judged).assign(method=name, seed=arm.seed))
        rang.append(alarm_table(name, written, judged, thresholds=thresholds,
                                num_generations=arm.num_generations))
    return tuple(pd.concat(part, ignore_index=True) for part in (steps, scores, rang))


def alarm_table(run: str, rows: Iterable[Mapping], held_out: Iterable[Mapping], *,
                num_generations: int, thresholds: Mapping[str, float] | None = None
                ) -> pd.DataFrame:
    """Return the alarms of a run, one row each: run, name, step, message, severity.

    `rows` are those of metrics.jsonl, `held_out` those with step and macro_f1; `thresholds` are
    fields of `monitors.Thresholds`, the usual ones if none are given. See `monitors.alarms`.
    """
    from ueba_helpers.rl import monitors

    found = monitors.alarms(rows, held_out, num_generations=num_generations,
                            thresholds=monitors.Thresholds(**(thresholds or {})))
    table = pd.DataFrame(map(vars, found), columns=["name", "step", "message", "severity"])
    table.insert(0, "run", run)
    return table


def arm_table(steps: pd.DataFrame, scores: pd.DataFrame, alarms: pd.DataFrame) -> pd.DataFrame:
    """Return how each arm of `short_arms` fared, one row per arm.

    Columns: lowest_explained_variance (of the critic, over all steps), macro_f1_first and
    macro_f1_last (on the watched windows), alarms (their names, or "none").
    """
    rang = {arm: ", ".join(sorted(set(part["name"]))) for arm, part in alarms.groupby("run")}
    critic = steps.groupby("method", sort=False)["critic/explained_variance"].min()
    judged = scores.sort_values("step", kind="stable").groupby("method")["macro_f1"]
    return pd.DataFrame({"lowest_explained_variance": critic, "macro_f1_first": judged.first(),
                         "macro_f1_last": judged.last()}).reindex(critic.index).assign(
        alarms=[rang.get(arm, "none") for arm in critic.index])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _interval(values: np.ndarray, users: pd.Series, seed: int, resamples: int,
              level: float) -> tuple[float, float]:
    """Return the interval of the mean of values `(N,)` in [-1, 1] from resampled users."""
    if len(values) == 0:
        return float("nan"), float("nan")
    codes, names = pd.factorize(users, sort=True)
    draws = user_draws(len(names), resamples=resamples, seed=seed)
    drawn = (draws @ np.bincount(codes, values)) / (draws @ np.bincount(codes))
    return percentile_interval(drawn, level=level, users=len(names), limits=(-1.0, 1.0))


def _apart(a: Mapping, b: Mapping) -> dict:
    """Return the difference of two groups of users, its intervals from theirs."""
    intervals = []
    for (a_low, a_high), (b_low, b_high) in zip(a["intervals"], b["intervals"], strict=True):
        below = np.hypot(a["gain"] - a_low, b_high - b["gain"])
        above = np.hypot(a_high - a["gain"], b["gain"] - b_low)
        gain = a["gain"] - b["gain"]
        intervals.append((gain - below, gain + above))
    return {"windows": a["windows"] + b["windows"], "users": a["users"] + b["users"],
            "right": a["right"] - b["right"], "gain": gain, "intervals": intervals}
