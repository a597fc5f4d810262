"""Who trains and who tests: splits by incident and by time, samples with weights, leakage audits.

In: the windows table and the accounts in it. Out: an assignment user -> (split, part), class-
balanced training samples, an evaluation sample whose weights restore the natural base rate, and
audit tables with one row per check. Refused with a `UserError`: shares that are no shares, a class
or a split with nothing in it, scores that do not fit the windows.

Audits look at labels of training and dev accounts alone. Those of test accounts stay closed: they
are compared with the answer key, and nothing about them is reported but that they differ.

Days flagged `ignore` or `precursor` (see `windows`) are neither drawn nor weighed: a day whose
account has no full history yet is benign for certain, as labels begin later, and would be known by
its `past_days`.

An incident is never cut: the insider, the supervisor whose account was abused, and anybody else
with a labelled row of it go to one side together (accounts in two incidents join them). Groups are
dealt scenario by scenario, so that each split gets its share of each scenario. With few insiders
of a scenario a split may hold one or none: `scenario_table` counts them, and results for fewer
than five are descriptive.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score

from ueba_helpers.data.cert import Store
from ueba_helpers.data.seeding import generator
from ueba_helpers.data.windows import (
    BEHAVIOUR_FEATURES,
    PAST_FEATURES,
    RISKS,
    RULE_FEATURES,
    WEEK_FEATURES,
    behaviour,
    evidence,
    label,
)
from ueba_helpers.errors import UserError

SPLITS = ("train", "dev", "test")
SHARES = (("cold", 0.25), ("rl", 0.35), ("dev", 0.15), ("test", 0.25))
DESCRIPTIVE_BELOW = 5  # incidents of one scenario in a split
_CALENDAR_SHARE = 0.727  # 2011-01-01 in r4.2's 501 days


# ---------------------------------------------------------------------------------------------
# Splits


def assign(
    windows_users: pd.DataFrame,
    *,
    seed: int,
    shares: Sequence[tuple[str, float]] = SHARES,
) -> pd.DataFrame:
    """Return user, split, part for every account, dealt by incident and stratified by scenario.

    `windows_users` has columns user, incident (None for most), scenario; see
    `windows.users_table`. `shares` gives the parts "dev", "test" and any training parts
    ("cold", "rl"), summing to 1. The same seed and accounts give the same assignment in whatever
    order the rows come. Raises `UserError` for other shares, and for a table without accounts.
    """
    names = [name for name, _ in shares]
    sizes = np.array([share for _, share in shares], float)
    if len(set(names)) < len(names) or sizes.min() < 0 or abs(sizes.sum() - 1) > 1e-6:
        raise UserError(f"shares={tuple(shares)!r}: give distinct parts with shares that sum to 1.")
    if len(windows_users) == 0:
        raise UserError("windows_users is empty: build windows first.")
    groups = _incident_groups(windows_users)
    rows = []
    for scenario in sorted({group.scenario for group in groups}):
        stratum = [group for group in groups if group.scenario == scenario]
        order = generator(seed, f"splits.assign scenario {scenario}").permutation(len(stratum))
        counts = _deal(len(stratum), sizes)
        parts = np.repeat(np.arange(len(names)), counts)
        for place, part in zip(order, parts, strict=True):
            rows += [(user, names[part]) for user in stratum[place].users]
    table = pd.DataFrame(rows, columns=["user", "part"]).sort_values("user", ignore_index=True)
    table["split"] = np.where(table["part"].isin(SPLITS), table["part"], "train")
    return table[["user", "split", "part"]]


@dataclass(frozen=True)
class _Group:
    """Accounts that must stay together, and the rarest scenario among them (0 for none)."""

    users: tuple[str, ...]
    scenario: int


def _incident_groups(windows_users: pd.DataFrame) -> list[_Group]:
    """Return connected accounts, in the order of their first name."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    scenario_of: dict[str, int] = {}
    users = sorted(set(windows_users["user"]))
    for user in users:
        root(f"user {user}")
    known = windows_users[windows_users["incident"].notna()]
    for row in known.itertuples(index=False):
        ends = sorted((root(f"user {row.user}"), root(f"incident {row.incident}")))
        parent[ends[1]] = ends[0]
        scenario_of[row.user] = max(scenario_of.get(row.user, 0), int(row.scenario))
    members: dict[str, list[str]] = {}
    for user in users:
        members.setdefault(root(f"user {user}"), []).append(user)
    groups = [_Group(tuple(names), max(scenario_of.get(name, 0) for name in names))
              for names in members.values()]
    return sorted(groups, key=lambda group: group.users[0])


def _deal(n: int, shares: np.ndarray) -> np.ndarray:
    """Return whole counts that sum to `n`, nearest to `shares`: largest remainder, later first.

    >>> _deal(10, np.array([.25, .35, .15, .25])).tolist()
    [2, 3, 2, 3]
    """
    exact = n * shares
    counts = np.floor(exact + 1e-9).astype(int)
    left = n - counts.sum()
    by_remainder = np.argsort(np.round(exact - counts, 9), kind="stable")[::-1]
    counts[by_remainder[:left]] += 1
    return counts


def by_time(
    windows: pd.DataFrame, *, cut: str | None = None, dev_share: float = 0.2
) -> pd.DataFrame:
    """Return window_id, split, straddles: days before `cut` train (its end is dev), the rest test.

    The default cut leaves 72.7 % of the calendar before it, which is 2011-01-01 on r4.2. The last
    `dev_share` of the days before the cut are dev. Accounts occur on both sides, and test days
    know their own earlier past, as they would in use; `straddles` marks days of incidents with
    malicious days in more than one split. Raises `UserError` if a side would be empty.
    """
    days = pd.to_datetime(windows["day"])
    first, last = days.min(), days.max()
    if cut is None:
        moment = first + pd.Timedelta(days=round(_CALENDAR_SHARE * (last - first).days))
    else:
        try:
            moment = pd.Timestamp(cut)
        except ValueError:
            raise UserError(f"cut={cut!r}: write a date as YYYY-MM-DD.") from None
    if not 0 <= dev_share < 1:
        raise UserError(f"dev_share={dev_share!r}: give a share of at least 0 and below 1.")
    if not first < moment <= last:
        raise UserError(f"cut={moment:%Y-%m-%d} leaves one side empty: the windows run from "
                        f"{first:%Y-%m-%d} to {last:%Y-%m-%d}.")
    dev_from = moment - pd.Timedelta(days=int(dev_share * (moment - first).days))
    split = np.select([days >= moment, days >= dev_from], ["test", "dev"], "train")
    table = pd.DataFrame({"window_id": windows["window_id"].to_numpy(), "split": split})
    positive = windows["malicious"].to_numpy(bool)
    incident = windows["incident"].astype(object).to_numpy()
    sides = pd.Series(split[positive]).groupby(pd.Series(incident[positive])).nunique()
    cut_ones = set(sides.index[sides > 1])
    table["straddles"] = [name in cut_ones for name in incident]
    return table


def scenario_table(windows: pd.DataFrame, assignment: pd.DataFrame) -> pd.DataFrame:
    """Return, per split and scenario, accounts, incidents, malicious days, and `descriptive`.

    `descriptive` is true where fewer than five incidents make any rate anecdotal.
    """
    bare = windows.drop(columns=["split", "part"], errors="ignore")
    joined = bare.merge(assignment[["user", "split"]], on="user", validate="many_to_one")
    marked = joined[joined["malicious"]]
    grid = pd.MultiIndex.from_product([SPLITS, (1, 2, 3)], names=["split", "scenario"])
    table = marked.groupby(["split", "scenario"]).agg(
        accounts=("user", "nunique"), incidents=("incident", "nunique"),
        malicious_days=("window_id", "size")).reindex(grid, fill_value=0).reset_index()
    table["descriptive"] = table["incidents"] < DESCRIPTIVE_BELOW
    return table


# ---------------------------------------------------------------------------------------------
# Samples


def balanced(
    windows: pd.DataFrame, *, n: int, seed: int, parts: Sequence[str]
) -> pd.DataFrame:
    """Return `n` windows of the given parts, a third of each risk level, shuffled; for training.

    `windows` must carry the column `part` (merge `assign`'s result on user). Precursor and ignored
    days are left out: every day drawn has a full history. Malicious days are taken incident by
    incident in turn, so that a long incident does not crowd out short ones; the other classes at
    random. A class with fewer days than a third of `n` is repeated whole, as evenly as possible;
    `repeat` counts from 0. Raises `UserError` if a class has no day in these parts.
    """
    if "part" not in windows.columns:
        raise UserError("balanced: the windows lack the column 'part'; merge the assignment on "
                        "'user' first.")
    if n < len(RISKS):
        raise UserError(f"n={n!r}: give at least {len(RISKS)}, one window of each risk level.")
    rng = generator(seed, "splits.balanced " + " ".join(sorted(parts)))
    pool = windows[windows["part"].isin(list(parts)) & ~windows["precursor"] & ~windows["ignore"]]
    pool = pool.sort_values("window_id", ignore_index=True)
    chosen = []
    for risk, wanted in zip(RISKS[::-1], _deal(n, np.full(3, 1 / 3)), strict=True):
        rows = np.flatnonzero(pool["risk"] == risk)
        if len(rows) == 0:
            raise UserError(f"balanced: no {risk} day in the parts {', '.join(parts)}.")
        order = rng.permutation(rows)
        if risk == "malicious":
            order = order[_in_turn(pool["incident"].to_numpy(object)[order])]
        index = np.arange(wanted)
        chosen.append(pd.DataFrame({"row": order[index % len(order)],
                                    "repeat": index // len(order)}))
    picks = pd.concat(chosen, ignore_index=True)
    picks = picks.iloc[rng.permutation(len(picks))]
    sample = pool.iloc[picks["row"].to_numpy()].reset_index(drop=True)
    return sample.assign(repeat=picks["repeat"].to_numpy())


def _in_turn(keys: np.ndarray) -> np.ndarray:
    """Return an order that takes one of each key before a second of any.

    >>> _in_turn(np.array(["a", "a", "a", "b"])).tolist()
    [0, 3, 1, 2]
    """
    rank = pd.Series(keys).groupby(keys).cumcount().to_numpy()
    return np.argsort(rank, kind="stable")


def evaluation_sample(
    windows: pd.DataFrame,
    score: Sequence[float] | pd.Series,
    *,
    split: str,
    headline_per_class: int,
    n_benign: int,
    seed: int,
    base_rate: float | None = 0.0029,
) -> pd.DataFrame:
    """Return window_id, split, headline, weight_natural, stratum for one split's evaluation.

    `windows` must carry the column `split`; `score` (higher = more malicious, from a detector
    fitted on training users) is aligned with `windows`, or a Series indexed by window_id.
    Everything the natural weights stand for:
      stratum 0    all malicious days, with one common weight such that their weighted share is
                   `base_rate` (None: weight 1, the split's own rate);
      stratum 1    the hardest benign days, a third of `n_benign`: all of them, weight 1;
      stratum 2 …  the other benign days by falling score, in strata that grow fourfold, sampled
                   evenly, weight = days in the stratum / days sampled (Horvitz-Thompson);
      stratum -1   weight 0: days taken for the headline alone, precursor days and innocent replies.
    Days without a full history are not in the table.
    `headline` marks `headline_per_class` days of each risk level (fewer if there are not so many),
    drawn at random within the class. Raises `UserError` for a missing column, a split without
    malicious or benign days, or scores that are missing or not finite.
    """
    if "split" not in windows.columns:
        raise UserError("evaluation_sample: the windows lack the column 'split'; merge the "
                        "assignment on 'user' first.")
    if headline_per_class < 0 or n_benign < 1:
        raise UserError(f"headline_per_class={headline_per_class!r}, n_benign={n_benign!r}: give "
                        "at least 0 and 1.")
    if base_rate is not None and not 0 < base_rate < 1:
        raise UserError(f"base_rate={base_rate!r}: give a share between 0 and 1, or None.")
    values = _aligned_score(windows, score)
    inside = (windows["split"] == split).to_numpy()
    table = windows.loc[inside].assign(_score=values[inside])
    table = table.sort_values("window_id", ignore_index=True)
    left_out = (table["precursor"] | table["ignore"]).to_numpy(bool)
    positive = table["malicious"].to_numpy(bool) & ~left_out
    benign = ~table["malicious"].to_numpy(bool) & ~left_out
    if not positive.any() or not benign.any():
        raise UserError(f"evaluation_sample: split {split!r} needs malicious and benign days, it "
                        f"has {positive.sum()} and {benign.sum()}.")
    rng = generator(seed, f"splits.evaluation_sample {split}")
    weight, stratum = np.zeros(len(table)), np.full(len(table), -1)
    ranked = rng.permutation(np.flatnonzero(benign))
    ranked = ranked[np.argsort(-table["_score"].to_numpy()[ranked], kind="stable")]
    for number, (members, take) in enumerate(_strata(ranked, n_benign), start=1):
        drawn = members if take == len(members) else rng.choice(members, take, replace=False)
        weight[drawn] = len(members) / take
        stratum[drawn] = number
    benign_weight = benign.sum()
    common = 1.0
    if base_rate is not None:
        common = base_rate / (1 - base_rate) * benign_weight / positive.sum()
    weight[positive], stratum[positive] = common, 0
    headline = np.zeros(len(table), bool)
    for risk in RISKS:
        rows = np.flatnonzero((table["risk"] == risk).to_numpy() & ~left_out)
        headline[rng.permutation(rows)[:headline_per_class]] = True
    keep = headline | (weight > 0) | (left_out & table["full_history"].to_numpy(bool))
    sample = pd.DataFrame({
        "window_id": table["window_id"], "split": split, "headline": headline,
        "weight_natural": weight, "stratum": stratum,
    })
    return sample[keep].reset_index(drop=True)


def _aligned_score(windows: pd.DataFrame, score: Sequence[float] | pd.Series) -> np.ndarray:
    if isinstance(score, pd.Series) and not score.index.equals(windows.index):
        missing = ~windows["window_id"].isin(score.index)
        if missing.any():
            raise UserError(f"evaluation_sample: {missing.sum()} windows have no score, the first "
                            f"is {windows['window_id'][missing].iloc[0]}.")
        score = score.reindex(windows["window_id"])
    values = np.asarray(score, float)
    if values.shape != (len(windows),) or not np.isfinite(values).all():
        raise UserError(f"evaluation_sample: give one finite score per window, got shape "
                        f"{values.shape} for {len(windows)} windows.")
    return values


def _strata(ranked: np.ndarray, n: int) -> list[tuple[np.ndarray, int]]:
    """Return (members, how many to draw) of each stratum, hardest first; draws sum to min(n, all).

    >>> [(len(m), k) for m, k in _strata(np.arange(100), 30)]
    [(10, 10), (40, 10), (50, 10)]
    """
    if len(ranked) <= n:
        return [(ranked, len(ranked))]
    hard = max(1, n // 3)
    edges, size = [hard], hard
    while edges[-1] < len(ranked):
        size *= 4
        edges.append(min(edges[-1] + size, len(ranked)))
    if len(edges) > 2 and edges[-1] - edges[-2] < (edges[-2] - edges[-3]) / 4:
        del edges[-2]  # a sliver joins its neighbour
    blocks = [ranked[a:b] for a, b in pairwise(edges)]
    left, result = n - hard, [(ranked[:hard], hard)]
    for i, block in enumerate(blocks):
        take = min(len(block), left // (len(blocks) - i)) if i < len(blocks) - 1 else left
        take = max(1, min(take, len(block)))
        left -= take
        result.append((block, take))
    return result


# ---------------------------------------------------------------------------------------------
# Audits

Detector = Callable[[pd.DataFrame, pd.DataFrame], np.ndarray]
OUTCOMES = ("passed", "failed", "not judged")
_NUMBERS = (*BEHAVIOUR_FEATURES, *PAST_FEATURES, *WEEK_FEATURES)
_CHECKED = (*_NUMBERS, *RULE_FEATURES, "enough_history", "full_history")
_HISTORIES = tuple(name for name in (*PAST_FEATURES, *WEEK_FEATURES, *RULE_FEATURES)
                   if name.startswith(("past_", "week_")))
_CHECKED_WORDS = ("role", "department", "ldap_month")
_CHECKED_ITEMS = ("item", "kind", "start", "end", "pc", "detail", "n", "facts", "event_ids",
                  "deviation", "features", "dropped")
_LABELS = ("malicious", "malicious_insider", "scenario", "incident", "risk")
_TRAITS = ("O", "C", "E", "A", "N")
_MOST_ROWS = 2000
_PERMUTATIONS = 4
_FEWEST = 5  # insiders (or labelled events, incidents) without which a check is not judged
_FEW_ACCOUNTS = 10  # in which a number must vary before its trend is judged
_DRAWS = 20_000


def audit(
    windows: pd.DataFrame,
    assignment: pd.DataFrame,
    *,
    seed: int = 0,
    store: Path | str | None = None,
    manifest: dict | None = None,
    items: pd.DataFrame | None = None,
    max_items: int = 24,
    listing: Sequence[str] = (),
    detectors: Mapping[str, Detector] | None = None,
) -> pd.DataFrame:
    """Return check, outcome, got, limit, detail: one row per leakage audit.

    `assignment` has user, split, part. With the event `store` the audits also rebuild sampled days
    from a store cut off after them, compare labels with the answer key, and look at event ids and
    psychometrics; with the windows' `manifest` they check whom the deviation levels were fitted
    on; with `items`, the evidence of some windows made with `max_items`, they rebuild evidence
    too. `listing` names the accounts in the order of the release's directory. `detectors` maps
    names to functions (training windows, held-out windows `(M,)`) -> scores `(M,)`: the label
    permutation runs each of them. `outcome` is "passed" while `got` is at most `limit`, else
    "failed", or "not judged" (`got` is NaN) where there is too little data; `detail` says why.
    """
    windows = windows.drop(columns=["split", "part"], errors="ignore")
    joined = windows.merge(assignment[["user", "split", "part"]], on="user", how="left")
    opened = joined[joined["split"].isin(["train", "dev"])]
    rows = [
        _user_overlap(assignment),
        _unassigned(joined),
        _cut_incidents(joined),
        _ldap_months(windows),
        *_permuted_labels(opened, seed, detectors or {}),
        _account_names(_people(opened), seed),
        _metadata(_people(opened), seed, store=store, listing=listing),
        *_weekdays(opened),
        _roles(opened, seed),
        *_calendar(opened),
        _near_duplicates(joined),
    ]
    if manifest is not None:
        rows.append(_fitted_on_training(manifest, assignment))
    if store is not None:
        settings = (manifest or {}).get("settings", {})
        rows.append(_rebuilt_days(windows, store, settings, seed))
        if manifest is not None and items is not None:
            rows.append(_rebuilt_items(windows, items, store, manifest, max_items, seed))
        rows += [_key_days(windows, store),
                 _event_ids(store, sorted(set(opened["user"])), seed)]
    return pd.DataFrame(rows, columns=["check", "outcome", "got", "limit", "detail"])


def complaints(audited: pd.DataFrame) -> list[str]:
    """Return one sentence for each audit that failed or was not judged, in their order."""
    return [f"audit {row.outcome}: {row.check} ({row.detail.removeprefix('not judged: ')})"
            for row in audited.itertuples() if row.outcome != "passed"]


def _row(check: str, got: float, limit: float, detail: str) -> dict:
    return {"check": check, "outcome": "passed" if got <= limit else "failed", "got": float(got),
            "limit": float(limit), "detail": detail}


def _cannot_tell(check: str, why: str) -> dict:
    return {"check": check, "outcome": "not judged", "got": float("nan"), "limit": float("nan"),
            "detail": f"not judged: {why}"}


def _user_overlap(assignment: pd.DataFrame) -> dict:
    sides = assignment.drop_duplicates(["user", "split", "part"]).groupby("user").size()
    return _row("account in one split only", (sides > 1).sum(), 0,
                f"{len(sides)} accounts, parts {', '.join(sorted(set(assignment['part'])))}")


def _unassigned(joined: pd.DataFrame) -> dict:
    missing = joined["split"].isna()
    return _row("every window assigned", missing.sum(), 0,
                f"{joined['user'].nunique()} accounts with windows")


def _cut_incidents(joined: pd.DataFrame) -> dict:
    known = joined[joined["incident"].notna()]
    sides = known.drop_duplicates(["incident", "split", "part"]).groupby("incident").size()
    return _row("incident in one split only", (sides > 1).sum(), 0, f"{len(sides)} incidents")


def _ldap_months(windows: pd.DataFrame) -> dict:
    month = pd.to_datetime(windows["day"]).dt.strftime("%Y-%m")
    used = windows["ldap_month"]
    late = used.notna() & (used >= month)
    return _row("no LDAP month of the day or later", late.sum(), 0,
                f"{used.isna().sum()} of {len(windows)} days have no earlier month, so no role")


def _permuted_labels(opened: pd.DataFrame, seed: int,
                     detectors: Mapping[str, Detector]) -> list[dict]:
    """Labels dealt anew among training and dev days must not be predictable on dev.

    A day keeps its features and takes all label columns of another day. Detectors that learn no
    label meet the dealt labels on dev alone, so one that reads a label column is found as well.
    """
    title = "permuted labels at chance"
    if not detectors:
        return [_cannot_tell(title, "no detector was given")]
    rng = generator(seed, "splits.audit permutation")
    usable = opened[~opened["precursor"] & ~opened["ignore"]]
    sides = [_thinned(usable[usable["split"] == name], rng) for name in ("train", "dev")]
    pool = pd.concat(sides).drop_duplicates("window_id").set_index("window_id", drop=False)
    labels = pool[[name for name in _LABELS if name in pool]]
    found = {name: [] for name in detectors}
    spread = []
    for i in range(1 + _PERMUTATIONS):
        order = rng.permutation(len(pool)) if i else np.arange(len(pool))
        dealt = pool.assign(**{name: labels[name].to_numpy()[order] for name in labels})
        train, held_out = (dealt.loc[side["window_id"]] for side in sides)
        y = held_out["malicious"].to_numpy(bool)
        if y.all() or not y.any() or train["malicious"].nunique() < 2:
            return [_cannot_tell(f"{title}: {name}", "no malicious day in training or dev")
                    for name in detectors]
        spread.append(_chance_spread(y.sum(), (~y).sum()))
        for name, detector in detectors.items():
            found[name].append(roc_auc_score(y, detector(train, held_out)))
    limit = 4 * float(np.mean(spread[1:])) / np.sqrt(_PERMUTATIONS)
    return [_row(f"{title}: {name}", abs(np.mean(aucs[1:]) - 0.5), limit,
                 f"distance from .5 of the ROC-AUC on dev, mean of {_PERMUTATIONS} permutations "
                 f"({np.mean(aucs[1:]):.3f}); limit four standard errors; true labels give "
                 f"{aucs[0]:.3f}") for name, aucs in found.items()]


def _thinned(part: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Return all malicious rows and enough others, at most `_MOST_ROWS` rows."""
    if len(part) <= _MOST_ROWS:
        return part
    positive = np.flatnonzero(part["malicious"])[: _MOST_ROWS // 2]
    negative = np.flatnonzero(~part["malicious"])
    drawn = rng.choice(negative, min(len(negative), _MOST_ROWS - len(positive)), replace=False)
    return part.iloc[np.sort(np.concatenate([positive, drawn]))]


def _chance_spread(positive: int, negative: int) -> float:
    """Return the standard deviation of ROC-AUC for scores that know nothing (Mann-Whitney)."""
    return float(np.sqrt((1 / positive + 1 / negative + 1 / (positive * negative)) / 12))


def _guess(check: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, what: str, *,
           strata: np.ndarray | None = None) -> dict:
    """Judge whether a random forest tells `y` `(N,)` from `x` `(N, F)`, in pairs of a stratum."""
    strata = np.zeros(len(y), int) if strata is None else strata
    sizes = {value: (int(y[strata == value].sum()), int((~y[strata == value]).sum()))
             for value in np.unique(strata)}
    compared = {value: size for value, size in sizes.items() if min(size) > 0}
    if min(sum(size[side] for size in compared.values()) for side in (0, 1)) < _FEWEST:
        return _cannot_tell(check, f"fewer than {_FEWEST} of the {what} are labelled "
                                   f"({y.sum()} of {len(y)})")
    scores = _cross_scores(x, y, rng)
    pairs = {value: a * b for value, (a, b) in compared.items()}
    total = sum(pairs.values())
    area = sum(n * roc_auc_score(y[strata == value], scores[strata == value])
               for value, n in pairs.items()) / total
    variance = sum((n * _chance_spread(*compared[value])) ** 2 for value, n in pairs.items())
    return _row(check, area, 0.5 + 3.5 * np.sqrt(variance) / total,
                f"ROC-AUC of a random forest, {y.sum()} of {len(y)} {what}")


def _cross_scores(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return five-fold random-forest scores `(N,)`, folds stratified."""
    folds = np.empty(len(y), int)
    for value in (False, True):
        rows = rng.permutation(np.flatnonzero(y == value))
        folds[rows] = np.arange(len(rows)) % 5
    scores = np.empty(len(y))
    for fold in range(5):
        forest = RandomForestClassifier(
            60, min_samples_leaf=5, random_state=int(rng.integers(2**31)))
        forest.fit(x[folds != fold], y[folds != fold])
        scores[folds == fold] = forest.predict_proba(x[folds == fold])[:, -1]
    return scores


def _characters(names: Sequence[str]) -> np.ndarray:
    width = max(map(len, names))
    return np.array([[ord(c) for c in name.ljust(width)] for name in names], float)


def _people(opened: pd.DataFrame) -> pd.DataFrame:
    """Return role, department, insider by account, without those that an insider abused."""
    people = opened.sort_values("day").groupby("user").agg(
        role=("role", "last"), department=("department", "last"),
        insider=("malicious_insider", "any"), tied=("incident", "count"))
    return people[people["insider"] | (people["tied"] == 0)]


def _account_names(people: pd.DataFrame, seed: int) -> dict:
    """The name of an account must not tell an insider."""
    return _guess("account name says nothing", _characters(people.index.tolist()),
                  people["insider"].to_numpy(bool), generator(seed, "splits.audit names"),
                  "accounts")


def _metadata(people: pd.DataFrame, seed: int, *, store: Path | str | None,
              listing: Sequence[str]) -> dict:
    """Who an account is, and its place in lists, must not tell an insider.

    One classifier on role, department, the traits of the psychometric table, the place in the
    listing and the characters of the name. Accounts are compared with others of their kind,
    administrators or not: scenario 3 is an administrator's by its definition.
    """
    columns = [pd.factorize(people[name], sort=True)[0] for name in ("role", "department")]
    columns += list(_characters(people.index.tolist()).T)
    if store is not None:
        with Store(store).connect() as connection:
            traits = connection.execute("FROM psychometric").df().set_index("user")
        columns += list(traits.reindex(people.index)[list(_TRAITS)].fillna(0).to_numpy(float).T)
    if len(listing):
        places = pd.Series(np.arange(len(listing), dtype=float), index=list(listing))
        columns.append(places.groupby(level=0).first().reindex(people.index).fillna(-1).to_numpy())
    return _guess("metadata says nothing", np.column_stack(columns).astype(float),
                  people["insider"].to_numpy(bool), generator(seed, "splits.audit metadata"),
                  "accounts", strata=(people["role"] == "ITAdmin").to_numpy(int))


def _weekdays(opened: pd.DataFrame) -> list[dict]:
    """Incidents of a scenario must begin at weekends as often as judged days fall on them.

    By distinct incidents, which the pooled days of all scenarios would hide. Weekend or not is all
    that a prompt says: r4.2's ten incidents of scenario 3 all begin on a Thursday.
    """
    usable = opened[~opened["precursor"] & ~opened["ignore"]]
    usable = usable.assign(weekday=np.where(usable["weekday"] >= 5, "weekend", "weekday"))
    shares = usable["weekday"].value_counts(normalize=True)
    first = usable[usable["malicious"]].sort_values("day").groupby("incident").first()
    rows = []
    for scenario in (1, 2, 3):
        begun = first.loc[first["scenario"] == scenario, "weekday"].value_counts()
        rows.append(_drawn_from(
            f"weekend says nothing: scenario {scenario}", begun.reindex(shares.index, fill_value=0),
            shares, f"incidents of scenario {scenario} by their first day",
            lambda n, rng: rng.multinomial(n, shares.to_numpy(), size=_DRAWS)))
    return rows


def _roles(opened: pd.DataFrame, seed: int) -> dict:
    """Insiders of scenarios 1 and 2 must have the roles of everybody; 3 is an administrator's."""
    people = _people(opened)
    third = set(opened.loc[opened["malicious_insider"] & (opened["scenario"] == 3), "user"])
    people = people[~people.index.isin(third)]
    everybody = people["role"].value_counts()
    insiders = people.loc[people["insider"], "role"].value_counts()
    return _drawn_from(
        "role says nothing: scenarios 1 and 2", insiders.reindex(everybody.index, fill_value=0),
        everybody / max(1, len(people)), "insiders of scenarios 1 and 2 by role",
        lambda n, rng: rng.multivariate_hypergeometric(
            everybody.to_numpy(), n, size=_DRAWS, method="marginals"), seed=seed)


def _drawn_from(check: str, got: pd.Series, shares: pd.Series, what: str,
                draw: Callable[[int, np.random.Generator], np.ndarray], *, seed: int = 0) -> dict:
    """Judge whether counts `got` could be one of `draw`'s, by chi-square over `shares`.

    The p-value is the rank among the drawn, so it is right for few counts as well.
    """
    n = int(got.sum())
    if n < _FEWEST:
        return _cannot_tell(check, f"fewer than {_FEWEST} {what} ({n})")
    expected = n * shares.to_numpy(float)

    def distance(counts: np.ndarray) -> np.ndarray:
        return ((counts - expected) ** 2 / expected).sum(axis=-1)

    drawn = distance(draw(n, generator(seed, f"splits.audit {check}")))
    p = (1 + (drawn >= distance(got.to_numpy()) - 1e-9).sum()) / (1 + len(drawn))
    return _row(check, 1 - p, 0.999, f"1 - p of a chi-square test, {n} {what}; most often "
                                     f"{got.idxmax()} ({got.max()})")


def _calendar(opened: pd.DataFrame) -> list[dict]:
    """No number about the past may tell when a day is: earlier days are benign for certain.

    Whatever counts over all earlier days grows with the calendar. Within each account without an
    incident, later judged days are told from earlier ones by one number at a time (ROC-AUC, mean
    over the accounts in which it varies), on either side of the middle day and of the first label.
    The number that is furthest beyond its own limit is reported.
    """
    told = opened.groupby("user")["incident"].transform("count") > 0
    usable = opened[~told & ~opened["precursor"] & ~opened["ignore"]]
    days = pd.to_datetime(usable["day"])
    labelled = pd.to_datetime(opened.loc[opened["malicious"], "day"])
    cuts = {"the middle": days.quantile(0.5), "the first label": labelled.min()}
    rows = []
    for side, cut in cuts.items():
        areas = _areas_within(usable["user"], usable[list(_HISTORIES)], (days >= cut).to_numpy())
        judged = areas.loc[:, areas.count() >= _FEW_ACCOUNTS]
        check = f"calendar says nothing: before {side}"
        if judged.empty:
            rows.append(_cannot_tell(check, f"fewer than {_FEW_ACCOUNTS} accounts with days on "
                                            "both sides"))
            continue
        distance = (judged.mean() - 0.5).abs()
        # A few accounts can agree by chance, and then seem to differ little.
        limit = 0.1 + 3.5 * judged.std().clip(lower=0.2) / np.sqrt(judged.count())
        worst = (distance - limit).idxmax()
        rows.append(_row(check, distance[worst], limit[worst],
                         f"distance from .5 of the ROC-AUC of {worst}, mean of "
                         f"{judged[worst].count()} accounts ({judged[worst].mean():.3f})"))
    return rows


def _areas_within(users: pd.Series, numbers: pd.DataFrame, later: np.ndarray) -> pd.DataFrame:
    """Return ROC-AUC of `later` days by account and number, NaN where a number never varies.

    Accounts with fewer than `_FEWEST` days on either side are left out.
    """
    sides = pd.Series(later, users.index).groupby(users).agg(["sum", "size"])
    many = sides["sum"].to_numpy()[:, None]
    few = sides["size"].to_numpy()[:, None] - many
    by_user = numbers.fillna(-1).groupby(users)
    ranks = by_user.rank()[later].groupby(users[later]).sum().reindex(sides.index)
    areas = (ranks - many * (many + 1) / 2) / np.maximum(many * few, 1)
    enough = (np.minimum(many, few) >= _FEWEST)
    return areas.where((by_user.max() > by_user.min()) & enough)


def _near_duplicates(joined: pd.DataFrame) -> dict:
    """Held-out days that look like a training day in every number, roughly rounded."""
    rounded = joined[list(_NUMBERS)].copy()
    for name in _NUMBERS:
        if name.endswith("_hour"):
            rounded[name] = rounded[name].fillna(-1).round()
        else:
            rounded[name] = (2 * np.log2(1 + rounded[name].fillna(0))).round()
    keys = pd.util.hash_pandas_object(rounded.astype("int32"), index=False)
    train = (joined["split"] == "train").to_numpy()
    held_out = joined["split"].isin(["dev", "test"]).to_numpy()
    check = "near-duplicates across splits"
    if not held_out.any():
        return _cannot_tell(check, "no held-out windows")
    twin = held_out & keys.isin(set(keys[train])).to_numpy()
    dev = twin & (joined["split"] == "dev").to_numpy()
    return _row(check, twin.sum() / held_out.sum(), 0.02,
                f"{twin.sum()} of {held_out.sum()} held-out days; of {dev.sum()} on dev "
                f"{int((dev & joined['malicious'].to_numpy(bool)).sum())} malicious")


def _fitted_on_training(manifest: dict, assignment: pd.DataFrame) -> dict:
    training = set(assignment.loc[assignment["split"] == "train", "user"])
    users = manifest["fit"]["users"]
    if users is None:
        held_out = len(set(assignment["user"]) - training)
        return _row("deviation levels from training accounts", held_out, 0,
                    "fitted on all accounts; call windows.relabel with the training accounts")
    return _row("deviation levels from training accounts", len(set(users) - training), 0,
                f"fitted on {len(users)} accounts")


def _next_day(day: pd.Timestamp) -> str:
    return (day + pd.Timedelta(days=1)).strftime("%Y-%m-%d")


def _rebuilt(store, settings: dict, day: pd.Timestamp, ids: Sequence[str],
             users: Sequence[str]) -> pd.DataFrame:
    """Return the windows `ids` of one day from a store without anything later, in that order."""
    again = behaviour(
        store, users=list(users), before=_next_day(day),
        **{key: settings[key] for key in ("history_days", "min_history") if key in settings})
    again = again[pd.to_datetime(again["day"]) == day].set_index("window_id", drop=False)
    return again.reindex(list(ids))


def _rebuilt_days(windows: pd.DataFrame, store: Path | str, settings: dict, seed: int) -> dict:
    """Days built again from a store without anything later must come out the same."""
    rng = generator(seed, "splits.audit rebuilt")
    days = pd.to_datetime(windows["day"])
    calendar = np.sort(days.unique())
    wrong, compared, columns = 0, 0, set()
    for share in (0.3, 0.6, 0.9):
        day = pd.Timestamp(calendar[int(share * (len(calendar) - 1))])
        there = windows[days == day].sort_values("user")
        there = there.iloc[np.sort(rng.permutation(len(there))[:25])]
        again = _rebuilt(store, settings, day, there["window_id"], there["user"])
        differ = pd.DataFrame(index=there.index)
        for name in _CHECKED:
            a, b = there[name].to_numpy(float), again[name].to_numpy(float)
            differ[name] = ~np.isclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
        for name in _CHECKED_WORDS:
            differ[name] = there[name].fillna("").to_numpy() != again[name].fillna("").to_numpy()
        wrong += int(differ.any(axis=1).sum())
        compared += len(differ)
        columns |= set(differ.columns[differ.any()])
    return _row("nothing later in a baseline", wrong, 0,
                f"{compared} days rebuilt" + (f"; differ in {', '.join(sorted(columns))}"
                                              if columns else ""))


def _rebuilt_items(windows: pd.DataFrame, items: pd.DataFrame, store: Path | str, manifest: dict,
                   max_items: int, seed: int) -> dict:
    """Evidence made again from a store without anything later must read the same.

    The three days with the most windows in `items`, at most 25 windows each.
    """
    rng = generator(seed, "splits.audit items")
    shown = windows[windows["window_id"].isin(items["window_id"])].sort_values("window_id")
    days = pd.to_datetime(shown["day"])
    wrong, compared, columns = 0, 0, set()
    for day in days.value_counts(sort=False).sort_index().nlargest(3).index:
        there = shown[days == day]
        there = there.iloc[np.sort(rng.permutation(len(there))[:25])]
        again = _rebuilt(store, manifest["settings"], day, there["window_id"], there["user"])
        again = label(again.dropna(subset="window_id").infer_objects(), manifest["fit"])
        made = evidence(store, again, max_items=max_items, before=_next_day(day))
        for name in there["window_id"]:
            said, true = (table.loc[table["window_id"] == name, list(_CHECKED_ITEMS)]
                          for table in (items, made))
            differ = {column for column in _CHECKED_ITEMS
                      if _plain(said[column]) != _plain(true[column])}
            wrong += bool(differ)
            columns |= differ
        compared += len(there)
    return _row("nothing later in evidence", wrong, 0,
                f"evidence of {compared} days made again" + (
                    f"; differs in {', '.join(sorted(columns))}" if columns else ""))


def _plain(values: pd.Series) -> list:
    """Return a column's values as a list, arrays of names as tuples."""
    return [value if isinstance(value, str) or np.isscalar(value) else tuple(value)
            for value in values]


def _key_days(windows: pd.DataFrame, store: Path | str) -> dict:
    """Malicious windows are exactly the answer key's account-days that have events."""
    with Store(store).connect() as connection:
        key = {f"{user}_{day}" for user, day in connection.execute(
            "SELECT DISTINCT user, date::DATE::VARCHAR FROM answers").fetchall()}
    malicious = set(windows.loc[windows["malicious"], "window_id"])
    there = key & set(windows["window_id"])
    return _row("labels equal the answer key", len(malicious ^ there) + len(key - there), 0,
                f"{len(windows)} windows compared, {len(key - there)} days of the key have none")


def _event_ids(store: Path | str, users: Sequence[str], seed: int) -> dict:
    """The id string of an event must not tell whether the key lists it (same accounts, logs)."""
    rng = generator(seed, "splits.audit ids")
    known = pd.DataFrame({"user": list(users)}, dtype=object)
    with Store(store).connect() as connection:
        connection.register("known", known)
        key = "(SELECT log, id, user FROM answers WHERE user IN (SELECT user FROM known))"
        labelled = [row[0] for row in connection.execute(
            f"SELECT DISTINCT id FROM {key} ORDER BY 1").fetchall()]
        events = " UNION ALL ".join(f"SELECT id, user, '{log}' AS log FROM {log}"
                                    for log in ("logon", "device", "email"))
        other = [row[0] for row in connection.execute(
            f"SELECT DISTINCT id FROM ({events}) WHERE user IN (SELECT user FROM {key}) "
            f"AND (log, id) NOT IN (SELECT (log, id) FROM {key}) ORDER BY hash(id), id "
            "LIMIT 1000").fetchall()]
    picked = rng.permutation(len(labelled))[:1000]
    names = [labelled[i] for i in picked] + other
    y = np.arange(len(names)) < len(picked)
    return _guess("event id says nothing", _characters(names or [""]), y, rng, "events")
