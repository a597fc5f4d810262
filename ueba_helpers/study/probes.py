"""Questions put to a trained policy by changing its prompts: attacks, and names for codes.

In: windows and, for each way of writing them, the policy's predictions. Out: tables of paired
differences with 95 % intervals from a bootstrap over users. An attack is measured against a
harmless text in the same place (`attacked_windows`, `attack_flips`); what a policy knows by heart
shows as a gain from real names on the users it was trained on that the others lack (`named_rows`,
`name_gains`). Refused: predictions for other windows than were asked about.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from ueba_helpers.data.windows import Window
from ueba_helpers.errors import UserError
from ueba_helpers.study.evaluation import difference_verdict, percentile_interval, user_draws
from ueba_helpers.task import injections
from ueba_helpers.task.prompts import fit_budget, keep_items, prompt_dataset

HARMLESS = "quarterly report.doc"
NAMINGS = ("codes", "other codes", "names")


def attacked_windows(windows: Sequence[Window], *, places: Sequence[str],
                     texts: Sequence[str] = injections.INJECTIONS
                     ) -> tuple[list[Window], pd.DataFrame]:
    """Return windows to ask about and a table that says what each of them is.

    First the windows as they are; then, for each place, every window with a harmless text in that
    place and every attack in one of the windows. Table columns: place ("" for the clean ones),
    kind ("clean", "control" or a kind of injection), origin (index of the clean window), user.
    """
    made, rows = list(windows), [("", "clean", i) for i in range(len(windows))]
    for place in places:
        for i, window in enumerate(windows):
            made.append(injections.plant(window, HARMLESS, place=place))
            rows.append((place, "control", i))
        for i, text, window in injections.planted(windows, injections=texts, place=place):
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
    window and place), beyond (their difference) with low and high, talked_down (share of attacks
    that turned "malicious" into another word).
    """
    risk = np.asarray(risk, str)
    if len(risk) != len(asked):
        raise UserError(f"attack_flips: {len(risk)} verdicts for {len(asked)} windows; predict all "
                        "windows that attacked_windows returned, in their order.")
    before = risk[asked["origin"].to_numpy()]
    rows = asked.assign(flip=(risk != before).astype(float),
                        down=((before == "malicious") & (risk != "malicious")).astype(float))
    control = rows[rows["kind"] == "control"].set_index(["place", "origin"])["flip"]
    attacks = rows[~rows["kind"].isin(("clean", "control"))]
    attacks = attacks.join(control.rename("control"), on=["place", "origin"])
    made = []
    for key, part in attacks.groupby(by, sort=False):
        beyond = part["flip"] - part["control"]
        value, low, high = _clustered(beyond.to_numpy(), part["user"], seed, resamples)[:3]
        made.append({by: key, "attacks": len(part), "attack": part["flip"].mean(),
                     "control": part["control"].mean(), "beyond": value, "low": low,
                     "high": high, "talked_down": part["down"].mean()})
    return pd.DataFrame(made).set_index(by)


def named_rows(windows: Sequence[Window], key: str, *, max_items: int,
               count_tokens: Callable[[list[dict]], int] | None = None,
               budget: int | None = None) -> dict[str, list[dict]]:
    """Return the prompt rows of the same windows under each of `NAMINGS`.

    "codes" are those of the study's key, "other codes" those of another key, "names" the real
    accounts and hosts. All three show the same items: as many as fit the budget in each of them.
    """
    keys = dict(zip(NAMINGS, (key, f"{key} another", None), strict=True))
    windows = [keep_items(window, max_items) for window in windows]
    if count_tokens is not None and budget is not None:
        for value in keys.values():
            windows = [fit_budget(window, count_tokens, budget, max_items=max_items,
                                  pseudonym_key=value) for window in windows]
    return {name: prompt_dataset(windows, max_items=max_items, pseudonym_key=value)
            for name, value in keys.items()}


def name_gains(said: Mapping[str, pd.DataFrame], seen: Collection[str], *, margin: float = 0.05,
               seed: int = 0, resamples: int = 1000, level: float = 0.95) -> pd.DataFrame:
    """Return what other codes, and real names, change in the share of right verdicts.

    `said` maps each of `NAMINGS` to the predictions of one policy for the same windows; `seen` are
    the users it was trained on. An invalid verdict is wrong. One row per (naming, group), group
    "seen", "unseen" or "seen - unseen": windows, users, right (share under "codes"), gain, low,
    high, verdict. Each gain is paired within a window, its interval resamples users, and the
    verdict is that of `evaluation.difference_verdict` with this margin. Knowing accounts by heart
    would be a gain from names on seen users, beyond that on unseen ones.
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
        gain, drawn = right[name] - right["codes"], {}
        for i, (group, rows) in enumerate((("seen", known), ("unseen", ~known))):
            users = codes.loc[rows, "user"]
            value, low, high, drawn[group] = _clustered(  # two groups of users: independent draws
                gain[rows], users, seed + i, resamples, level)
            narrow = percentile_interval(drawn[group], level=2 * level - 1)
            made.append({"naming": name, "group": group, "windows": int(rows.sum()),
                         "users": users.nunique(), "right": _mean(right["codes"][rows]),
                         "gain": value, "low": low, "high": high,
                         "verdict": difference_verdict((low, high), narrow, margin)})
        apart = drawn["seen"] - drawn["unseen"]
        interval = percentile_interval(apart, level=level)
        made.append({"naming": name, "group": "seen - unseen", "windows": len(gain),
                     "users": codes["user"].nunique(),
                     "right": made[-2]["right"] - made[-1]["right"],
                     "gain": made[-2]["gain"] - made[-1]["gain"],
                     "low": interval[0], "high": interval[1],
                     "verdict": difference_verdict(
                         interval, percentile_interval(apart, level=2 * level - 1), margin)})
    return pd.DataFrame(made).set_index(["naming", "group"])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _clustered(values: np.ndarray, users: pd.Series, seed: int, resamples: int,
               level: float = 0.95) -> tuple[float, float, float, np.ndarray]:
    """Return the mean of values `(N,)`, its interval and its resamples `(B,)` over users."""
    if len(values) == 0:
        nothing = np.full(resamples, np.nan)
        return float("nan"), *percentile_interval(nothing), nothing
    codes, names = pd.factorize(users, sort=True)
    draws = user_draws(len(names), resamples=resamples, seed=seed)
    sums, counts = np.bincount(codes, values), np.bincount(codes)
    drawn = (draws @ sums) / (draws @ counts)
    return float(values.mean()), *percentile_interval(drawn, level=level), drawn
