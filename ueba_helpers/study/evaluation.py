"""From the predictions table to metrics with intervals: the same road for every detector.

In: predictions (any number of detectors and seeds), the truth table of the windows, and the
evaluation sample with its weights. Out: one tidy table of metrics with 95 % intervals, and the
tables behind the figures. Refuses tables that do not match, naming the column or the windows: a
missing prediction would flatter the detector. Evaluation never learns where a row came from.

Conventions, the same for all detectors:

- An invalid verdict is wrong: it is a miss of its class, its evidence and features earn 0, and it
  ranks lowest (all invalid verdicts tie below the smallest valid score).
- *Headline* metrics are computed on the rows marked `headline`, each counting once. *Natural*
  metrics use `weight_natural`, so that the weighted rows stand for all account-days.
- The positive class of every ranking metric is `malicious`. Days flagged `ignore` or `precursor`
  weigh nothing in natural metrics; `pr_auc_precursors` counts precursors as positives, each with
  the mean weight of a malicious day.
- Rows with equal scores are one step of a ranking: average precision takes the whole step, and
  recall and precision at a budget take the expected value over random orders within it.
- Intervals are percentiles of a bootstrap over users (a user's days are correlated); the users of
  one incident are drawn together (`clusters`). Detectors on the same sample and seed share their
  draws, so their intervals are paired. Insiders found and days until found resample insiders
  instead, for the alerts of the full sample. Where all resamples of a share agree, the interval is
  as wide as the number of users leaves open (`percentile_interval`), not of no width.
- A class that occurs neither in the truth nor in the answers of a resample is left out of its
  macro-F1; on the full sample this is scikit-learn's value whenever all classes occur.

Statistics follow Miller (arXiv:2411.00640: clustered errors, paired differences), Schuirmann (1987:
equivalence by two one-sided tests) and Holm (1979: several comparisons at once).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ueba_helpers.data.seeding import generator
from ueba_helpers.errors import UserError
from ueba_helpers.study.config import ALERT_BUDGETS
from ueba_helpers.task.rewards import claim_support, evidence_hit_rate
from ueba_helpers.task.verdicts import RISKS, parse_verdict

MALICIOUS = RISKS[-1]
SAID = (*RISKS, "invalid")
SCENARIOS = (1, 2, 3)
KEYS = ("detector", "seed", "split")
COMPARED = ("macro_f1", "pr_auc", "valid_rate", "evidence_hit_rate")
_PREDICTION_COLUMNS = ("detector", "seed", "window_id", "user", "split", "label", "risk", "score",
                       "features", "evidence", "valid")
_TRUTH_COLUMNS = ("window_id", "user", "day", "risk", "malicious", "scenario", "incident",
                  "precursor", "ignore", "evidence_truth", "dont_care", "feature_truth")
_SAMPLE_COLUMNS = ("window_id", "split", "headline", "weight_natural", "stratum")
_CELLS = 4_000_000  # resamples times rows held at once: 32 MB an array


# --------------------------------------------------------------------------- the metrics table

def evaluate(predictions: pd.DataFrame, truth: pd.DataFrame, sample: pd.DataFrame, *,
             budgets: Sequence[float] = ALERT_BUDGETS, resamples: int = 1000, seed: int = 0,
             level: float = 0.95) -> pd.DataFrame:
    """Return one row per detector, seed, split and metric: value, low, high, n.

    `predictions` is the predictions table, of one or several detectors, seeds and splits;
    `sample` names the windows of each split that must have been predicted. `n` counts what the
    metric rests on: windows, or insiders. A metric that its sample cannot give (no malicious day,
    scores outside 0 to 1 for calibration) is NaN, never 0. Raises `UserError` for mismatched
    tables. Columns: detector, seed, split, sample, metric, value, low, high, n.
    """
    _require(predictions, _PREDICTION_COLUMNS, "predictions")
    _check_budgets(budgets)
    tables = []
    for keys, rows in predictions.groupby(list(KEYS), sort=False):
        joined = join(rows, truth, sample)
        metrics = _metrics(joined, budgets=budgets, resamples=resamples, seed=seed, level=level)
        for name, value in zip(reversed(KEYS), reversed(keys), strict=True):
            metrics.insert(0, name, value)
        tables.append(metrics)
    if not tables:
        raise UserError("predictions has no rows: nothing to evaluate.")
    return pd.concat(tables, ignore_index=True)


def join(predictions: pd.DataFrame, truth: pd.DataFrame, sample: pd.DataFrame) -> pd.DataFrame:
    """Return the sample's rows with truth and predictions of one detector, seed and split.

    One row per window of the sample, sorted by window_id, so that no result depends on the order
    of a table. Raises `UserError` naming the column or up to five windows that do not match.
    """
    _require(predictions, _PREDICTION_COLUMNS, "predictions")
    _require(truth, _TRUTH_COLUMNS, "truth")
    _require(sample, _SAMPLE_COLUMNS, "sample")
    for name in KEYS:
        if predictions[name].nunique() != 1:
            raise UserError(f"predictions holds {predictions[name].nunique()} values of {name}: "
                            "give one detector, seed and split at a time.")
    split = predictions["split"].iloc[0]
    sample = sample[sample["split"] == split]
    for table, what in ((predictions, "predictions"), (truth, "truth"), (sample, "sample")):
        _refuse(table.loc[table["window_id"].duplicated(), "window_id"],
                f"{what} holds windows more than once")
    wanted, said = set(sample["window_id"]), set(predictions["window_id"])
    _refuse(wanted - said, f"the sample of split {split} holds windows without a prediction")
    _refuse(said - wanted, f"predictions holds windows outside the sample of split {split}")
    _refuse(wanted - set(truth["window_id"]), "truth lacks windows of the sample")
    rows = (sample[list(_SAMPLE_COLUMNS)]
            .merge(truth[list(_TRUTH_COLUMNS)], on="window_id")
            .merge(predictions[[c for c in (*_PREDICTION_COLUMNS, "basis_support")
                                if c != "split" and c in predictions]],
                   on="window_id", suffixes=("", "_said"))
            .sort_values("window_id", ignore_index=True))
    _refuse(rows.loc[rows["user"] != rows["user_said"], "window_id"],
            "column user differs between predictions and truth")
    _refuse(rows.loc[rows["label"] != rows["risk"], "window_id"],
            "column label of predictions differs from risk of truth")
    rows = rows.drop(columns=["user_said", "label"]).rename(
        columns={"risk": "label", "risk_said": "risk"})
    _refuse(rows.loc[~rows["risk"].isin(SAID), "window_id"],
            f"column risk holds values other than {', '.join(SAID)}")
    valid = rows["valid"].astype(bool)
    _refuse(rows.loc[valid == (rows["risk"] == "invalid"), "window_id"],
            "column valid contradicts column risk")
    scores = rows["score"].to_numpy(float)
    _refuse(rows.loc[valid & ~np.isfinite(scores), "window_id"],
            "column score is not a finite number")
    weight = rows["weight_natural"].to_numpy(float)
    _refuse(rows.loc[~(np.isfinite(weight) & (weight >= 0)), "window_id"],
            "column weight_natural is not a number of 0 and more")
    rows["valid"] = valid
    for name in ("headline", "malicious", "precursor", "ignore"):
        rows[name] = rows[name].astype(bool)
    lowest = scores[valid].min() if valid.any() else 0.0
    rows["score"] = np.where(valid, scores, lowest - 1.0)
    rows["weight_natural"] = np.where(rows["ignore"] | rows["precursor"], 0.0, weight)
    return rows


@dataclass(frozen=True)
class _Measure:
    """One metric: its sample, value, resampled values `(B,)`, and what it rests on.

    `n` counts windows (or insiders), `users` the resampled units among them; None: no share.
    """

    sample: str
    value: float
    resampled: np.ndarray
    n: int
    users: int | None

    def interval(self, level: float) -> tuple[float, float]:
        return percentile_interval(self.resampled, level=level, users=self.users)


def _measured(rows: pd.DataFrame, *, budgets, resamples, seed) -> dict[str, _Measure]:
    """Return every metric by name."""
    codes = clusters(rows["user"], rows["incident"])
    users = codes.max() + 1
    draws = user_draws(users, resamples=resamples, seed=seed)
    headline = rows["headline"].to_numpy(bool)
    weight = rows["weight_natural"].to_numpy(float)
    result = {}
    for sample, weights, ending in (("headline", headline.astype(float), ""),
                                    ("natural", weight, "_natural")):
        counts = _confusion_by_user(rows, weights, codes, users)
        points, resampled = _class_metrics(counts.sum(0)[None]), _class_metrics(draws @ counts)
        for name in points if sample == "headline" else ("macro_f1", "accuracy"):
            result[name + ending] = _Measure(
                sample, points[name][0], resampled[name], (weights > 0).sum(),
                _users(codes, (weights > 0) & _concerned(rows, name)))
    for name, (values, counted) in _cited_metrics(rows, headline).items():
        totals = np.stack([np.bincount(codes[counted], values[counted], users),
                           np.bincount(codes[counted], minlength=users)], axis=1)
        above, below = (np.vstack([totals.sum(0), draws @ totals])).T
        shares = _ratio(above, below)
        result[name] = _Measure("headline", shares[0], shares[1:], counted.sum(),
                                _users(codes, counted))
    for name, measure in _ranking_metrics(rows, codes, draws, budgets).items():
        result[name] = _Measure("natural", *measure)
    for name, measure in _insider_metrics(rows, budgets, resamples, seed).items():
        result[name] = _Measure("insiders", *measure)
    return result


def _concerned(rows: pd.DataFrame, metric: str) -> np.ndarray:
    """Return which rows `(N,)` a metric of one risk level is about; all of them for others."""
    kind, _, risk = metric.partition("_")
    if risk not in RISKS:
        return np.ones(len(rows), bool)
    is_so = (rows["label"] == risk).to_numpy()
    return is_so if kind == "recall" else is_so | (rows["risk"] == risk).to_numpy()


def _users(codes: np.ndarray, counted: np.ndarray) -> int:
    return np.unique(codes[counted]).size


def _metrics(rows: pd.DataFrame, *, budgets, resamples, seed, level) -> pd.DataFrame:
    measured = _measured(rows, budgets=budgets, resamples=resamples, seed=seed)
    return pd.DataFrame(
        [(found.sample, name, float(found.value), *found.interval(level), int(found.n))
         for name, found in measured.items()],
        columns=["sample", "metric", "value", "low", "high", "n"])


# --------------------------------------------------------------------------- resampling

def clusters(users: Sequence[str], incidents: Sequence[str | None]) -> np.ndarray:
    """Return the number of each row's cluster `(N,)`: a user, or all the users of an incident.

    An insider and the supervisor whose account was abused tell one story, so they are drawn
    together, with all their days. Numbered by the names of their first users.

    >>> clusters(["A", "B", "B", "C"], [None, "I1", None, "I1"]).tolist()
    [0, 1, 1, 1]
    """
    names, codes = np.unique(np.asarray(users, str), return_inverse=True)
    incident, kinds = pd.factorize(pd.Series(incidents, dtype=object))
    known = incident >= 0
    ends = codes[known], len(names) + incident[known]
    size = len(names) + len(kinds)
    links = coo_array((np.ones(known.sum()), ends), shape=(size, size))
    _, group = connected_components(links, directed=False)
    return pd.factorize(group[:len(names)])[0][codes]


def incidents_judged(truth: pd.DataFrame, sample: pd.DataFrame) -> int:
    """Return how many clusters have a malicious day among a sample's headline windows.

    As many independent stories stand behind what is said of malicious days; `sample` is of one
    split.
    """
    _require(truth, _TRUTH_COLUMNS, "truth")
    _require(sample, _SAMPLE_COLUMNS, "sample")
    rows = sample[["window_id", "headline"]].merge(truth, on="window_id")
    codes = clusters(rows["user"], rows["incident"])
    return _users(codes, (rows["headline"].astype(bool) & rows["malicious"]).to_numpy(bool))


def user_draws(users: int, *, resamples: int, seed: int) -> np.ndarray:
    """Return how often each user is drawn, `(B, U)`: each row sums to U (cluster bootstrap).

    >>> user_draws(3, resamples=2, seed=0).sum(1).tolist()
    [3.0, 3.0]
    """
    draw = generator(seed, "bootstrap over users")
    return draw.multinomial(users, np.full(users, 1 / users), size=resamples).astype(float)


def percentile_interval(values: np.ndarray, *, level: float = 0.95, users: int | None = None,
                        limits: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
    """Return the central interval of resampled values `(B,)`, NaN ones left out.

    Both ends are NaN when fewer than half of the resamples gave a value. With `users`, for shares
    and their differences: where all resamples agree they show no doubt at all, so the ends then lie
    the largest share of users away that may differ and yet be missed among so many ("rule of
    three"), within `limits`.

    >>> percentile_interval(np.arange(101.0), level=0.5)
    (25.0, 75.0)
    >>> [round(end, 3) for end in percentile_interval(np.ones(100), users=20)]
    [0.832, 1.0]
    """
    known = _known(values)
    if len(known) == 0 or 2 * len(known) < len(values):
        return float("nan"), float("nan")
    if users is not None and _all_equal(known):
        missed = 1 - ((1 - level) / 2) ** (1 / users)
        return (float(max(known[0] - missed, limits[0])),
                float(min(known[0] + missed, limits[1])))
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _known(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, float)
    return values[~np.isnan(values)]


def _all_equal(values: np.ndarray) -> bool:
    return bool(np.ptp(values) < 1e-12)  # sums of equal shares differ in their last digits


# --------------------------------------------------------------------------- risk levels

def _confusion_by_user(rows, weights, codes, users) -> np.ndarray:
    """Return weighted counts `(U, 3 * 4)` of (label, said) per user."""
    cell = (rows["label"].map(RISKS.index).to_numpy(int) * len(SAID)
            + rows["risk"].map(SAID.index).to_numpy(int))
    size = len(RISKS) * len(SAID)
    return np.bincount(codes * size + cell, weights, users * size).reshape(users, size)


def _class_metrics(confusions: np.ndarray) -> dict[str, np.ndarray]:
    """Return metrics `(B,)` each from flattened confusions `(B, 12)`."""
    table = confusions.reshape(-1, len(RISKS), len(SAID))
    right = np.diagonal(table[:, :, :len(RISKS)], axis1=1, axis2=2)
    true, said = table.sum(2), table[:, :, :len(RISKS)].sum(1)
    f1 = _ratio(2 * right, true + said)
    metrics = {"macro_f1": _row_mean(f1), "accuracy": _ratio(right.sum(1), true.sum(1)),
               "valid_rate": _ratio(said.sum(1), true.sum(1))}
    recall = _ratio(right, true)
    precision = np.where(said > 0, _ratio(right, said), np.where(true > 0, 0.0, np.nan))
    for level, risk in enumerate(RISKS):
        metrics[f"precision_{risk}"] = precision[:, level]
        metrics[f"recall_{risk}"] = recall[:, level]
        metrics[f"f1_{risk}"] = f1[:, level]
    return metrics


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


def _row_mean(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0.0).sum(1), known.sum(1).astype(float))


def confusion(predictions: pd.DataFrame, truth: pd.DataFrame, sample: pd.DataFrame, *,
              natural: bool = False) -> pd.DataFrame:
    """Return the counts (or natural weights) of each label (rows) said as each risk (columns).

    Three rows, four columns: the fourth is `invalid`.
    """
    rows = join(predictions, truth, sample)
    weights = rows["weight_natural" if natural else "headline"].to_numpy(float)
    counts = _confusion_by_user(rows, weights, np.zeros(len(rows), int), 1)
    table = counts.reshape(len(RISKS), len(SAID))
    return pd.DataFrame(table if natural else table.astype(int),
                        index=pd.Index(RISKS, name="label"), columns=pd.Index(SAID, name="said"))


def best_possible(release: Path | str, truth: pd.DataFrame, sample: pd.DataFrame, *,
                  split: str) -> pd.DataFrame:
    """Return the predictions of the best rule for a simulated release: what can be reached at all.

    The score is `p_malicious` of the release's `truth/optimal.csv`, which no detector may read: how
    often a day that shows the same is malicious (see `data.simulate`; finer detail is left out, so
    a detector may come out slightly above). The risk is malicious from the cut on that gives the
    highest macro-F1 on the headline rows; below it, it is the stated function of the visible that
    the two lower levels are. Raises `UserError` where the release has no known truth, or none of a
    judged window.
    """
    path = Path(release) / "truth" / "optimal.csv"
    if not path.exists():
        raise UserError(f"{path}: missing. Only a simulated release says what can be reached.")
    known = pd.read_csv(path, dtype={"user": str, "day": str})
    known.index = known["user"] + "_" + known["day"]
    judged = sample.loc[sample["split"] == split, "window_id"]
    rows = truth[truth["window_id"].isin(judged)].sort_values("window_id", ignore_index=True)
    _refuse(set(rows["window_id"]) - set(known.index), f"{path} lacks windows of the sample")
    known = known.loc[rows["window_id"]]
    chance = known["p_malicious"].to_numpy(float)
    lower = np.where(rows["malicious"], known["lower_risk"], rows["risk"])
    headline = rows["window_id"].isin(sample.loc[sample["headline"], "window_id"]).to_numpy()
    label = rows["risk"].map(RISKS.index).to_numpy(int)

    def macro_f1(cut: float) -> float:
        said = np.where(chance >= cut, MALICIOUS, lower)
        cells = label * len(SAID) + pd.Series(said).map(SAID.index).to_numpy(int)
        counts = np.bincount(cells[headline], minlength=len(RISKS) * len(SAID)).astype(float)
        return float(_class_metrics(counts)["macro_f1"][0])

    # the highest of several equal cuts: the fewest alerts
    cut = max(sorted(set(chance[headline]) | {np.inf}, reverse=True), key=macro_f1)
    return pd.DataFrame({
        "detector": "best_possible", "seed": 0, "window_id": rows["window_id"],
        "user": rows["user"], "day": rows["day"], "split": split, "label": rows["risk"],
        "risk": np.where(chance >= cut, MALICIOUS, lower), "score": chance,
        "features": [[] for _ in chance], "evidence": [[] for _ in chance], "valid": True,
        "seconds": 0.0})


def innocent_causes(release: Path | str) -> pd.Series | None:
    """Return why innocent days of a simulated release deviate, by window_id; of a real one None.

    Read from `truth/causes.csv`, which no detector may read; of two causes of a day the first.
    """
    path = Path(release) / "truth" / "causes.csv"
    if not path.exists():
        return None
    known = pd.read_csv(path).drop_duplicates(["user", "day"])
    return known["cause"].set_axis(known["user"] + "_" + known["day"]).rename("innocent cause")


def flagged_shares(joined: Mapping[str, pd.DataFrame], reason: pd.Series) -> pd.DataFrame:
    """Return the shares of benign account-days called malicious, by the reason a day stands out.

    `joined` maps detectors to tables of `join` for one sample; `reason` has windows in its index,
    and one it lacks has the reason "nothing unusual". One row per reason, most days first: a column
    per detector (share at natural weights), days (benign account-days that the sample stands for)
    and sampled (those it holds: of few, a share says little). Raises `UserError` for a window with
    two reasons and for tables of different windows.
    """
    if not joined:
        raise UserError("flagged_shares needs the rows of at least one detector.")
    _refuse(reason.index[reason.index.duplicated()], "reason holds windows more than once")
    windows = set(next(iter(joined.values()))["window_id"])
    shares = {}
    for detector, rows in joined.items():
        _refuse(windows ^ set(rows["window_id"]), f"{detector} was judged on other windows")
        benign = rows[~rows["malicious"] & (rows["weight_natural"] > 0)]
        why = benign["window_id"].map(reason).fillna("nothing unusual").rename("reason")
        days = benign["weight_natural"].groupby(why).sum()
        alarms = benign["weight_natural"].where(benign["risk"] == MALICIOUS, 0.0)
        shares[detector] = alarms.groupby(why).sum() / days
    return pd.DataFrame(shares).assign(days=days, sampled=why.groupby(why).size()).sort_values(
        "days", ascending=False, kind="stable")


# --------------------------------------------------------------------------- what was cited

def evidence_scores(cited: Sequence[str], truth: Sequence[str],
                    dont_care: Sequence[str] = ()) -> tuple[float, float]:
    """Return hit rate (share of truth items cited) and F1 of one verdict's evidence.

    Don't-care items neither help nor cost. For an empty truth the hit rate is NaN and F1 is 1 if
    nothing is cited, else 0: citing an innocent event is a mistake.

    >>> evidence_scores(["e1", "e2", "e9"], ["e1", "e3"], ["e9"])
    (0.5, 0.5)
    >>> evidence_scores([], [])
    (nan, 1.0)
    """
    true = set(truth)
    said = set(cited) - (set(dont_care) - true)
    hits = len(said & true)
    f1 = 2 * hits / (len(said) + len(true)) if true else float(not said)
    return evidence_hit_rate(cited, truth), f1


def basis_supports(predictions: pd.DataFrame, rows: Sequence[Mapping]) -> np.ndarray:
    """Return how much of what each basis claims stands in the items it cites, `(N,)` in [0, 1].

    `rows` are the prompt rows of the windows (`Study.judged_rows`): only they know the lines that
    were shown. NaN where nothing valid was cited, and for detectors that write nothing. See
    `rewards.claim_support`; as the column basis_support of predictions it becomes a metric.
    Raises `UserError` if rows lack a window that was judged.
    """
    asked = {row["window_id"]: row for row in rows}
    _refuse(set(predictions["window_id"]) - set(asked), "the prompt rows lack judged windows")
    found = np.full(len(predictions), np.nan)
    if "completion" not in predictions:
        return found
    for i, (window, text) in enumerate(zip(predictions["window_id"], predictions["completion"],
                                           strict=True)):
        if isinstance(text, str):
            row = asked[window]
            said = parse_verdict(text, row["evidence_ids"], think=row["style"] == "think")
            if said.evidence:
                found[i] = claim_support(said, row["item_text"])
    return found


def _cited_metrics(rows, headline) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return values `(N,)` and which rows count `(N,)` for each metric of cited items."""
    valid = rows["valid"].to_numpy(bool)
    evidence = np.array([evidence_scores(*row) for row in zip(
        rows["evidence"], rows["evidence_truth"], rows["dont_care"], strict=True)]).reshape(-1, 2)
    features = np.zeros((len(rows), 2))
    for i, (said, true) in enumerate(zip(rows["features"], rows["feature_truth"], strict=True)):
        both = len(set(said) & set(true))
        features[i] = (2 * both / max(1, len(set(said)) + len(set(true))),
                       both / max(1, len(set(said))))
    has_truth = ~np.isnan(evidence[:, 0])
    support = (rows["basis_support"].to_numpy(float) if "basis_support" in rows
               else np.full(len(rows), np.nan))
    hits, f1 = np.where(valid & has_truth, evidence[:, 0], 0.0), np.where(valid, evidence[:, 1], 0)
    return {
        "evidence_hit_rate": (hits, headline & has_truth),
        "evidence_f1": (f1, headline & has_truth),
        "evidence_f1_all": (f1, headline),
        "basis_support": (np.nan_to_num(support), headline & ~np.isnan(support)),
        "feature_agreement": (np.where(valid, features[:, 0], 0.0), headline),
        "feature_precision": (np.where(valid, features[:, 1], 0.0), headline),
    }


def evidence_counts(predictions: pd.DataFrame, truth: pd.DataFrame,
                    sample: pd.DataFrame) -> pd.DataFrame:
    """Return how many items of headline windows were hit, missed, wrongly cited or don't-care.

    One row per true risk level; the items of invalid verdicts are missed. Counts are items.
    """
    rows = join(predictions, truth, sample)
    rows = rows[rows["headline"].astype(bool)]
    table = pd.DataFrame(0, index=pd.Index(RISKS, name="label"),
                         columns=["hit", "missed", "wrong", "dont_care"])
    for label, valid, cited, true, free in zip(
            rows["label"], rows["valid"], rows["evidence"], rows["evidence_truth"],
            rows["dont_care"], strict=True):
        said, true = set(cited) if valid else set(), set(true)
        free = set(free) - true
        table.loc[label] += [len(said & true), len(true - said), len(said - true - free),
                             len(said & free)]
    return table


# --------------------------------------------------------------------------- ranking

@dataclass(frozen=True)
class _Ranking:
    """Cumulative weights down a ranking, `(B, K)` for K steps of equal scores."""

    scores: np.ndarray  # (K,)
    positive: np.ndarray
    all: np.ndarray

    def average_precision(self) -> np.ndarray:
        """Return sum of precision times the gain in recall, `(B,)`; NaN without positives."""
        gain = np.diff(self.positive, axis=1, prepend=0)
        precision = np.nan_to_num(_ratio(self.positive, self.all))
        return _ratio((precision * gain).sum(1), self.positive[:, -1])

    def at_budget(self, per_thousand: float) -> tuple[np.ndarray, np.ndarray]:
        """Return expected recall and precision `(B,)` when that many days are alerted."""
        limit = self.all[:, -1] * per_thousand / 1000
        whole = (self.all <= limit[:, None]).sum(1)
        last = self.all.shape[1] - 1
        row = np.arange(len(limit))
        below_all = np.where(whole > 0, self.all[row, whole - 1], 0.0)
        below = np.where(whole > 0, self.positive[row, whole - 1], 0.0)
        step = np.minimum(whole, last)
        share = np.nan_to_num(_ratio(limit - below_all, self.all[row, step] - below_all))
        found = below + share * (self.positive[row, step] - below)
        return _ratio(found, self.positive[:, -1]), _ratio(found, limit)


def _rank(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> _Ranking:
    """Rank rows by score, highest first, under row weights `(B, N)`; equal scores are one step."""
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    weights = weights[:, order]
    sums = [np.add.reduceat(part, starts, axis=1).cumsum(1)
            for part in (weights * positive[order], weights)]
    return _Ranking(ordered[starts], *sums)


def average_precision(score: np.ndarray, positive: np.ndarray,
                      weights: np.ndarray | None = None) -> float:
    """Return weighted average precision of scores `(N,)` for boolean positives `(N,)`.

    >>> average_precision(np.array([3.0, 2.0, 1.0]), np.array([True, False, True]))
    0.8333333333333333
    """
    weights = np.ones(len(score)) if weights is None else np.asarray(weights, float)
    ranking = _rank(np.asarray(score, float), np.asarray(positive, bool), weights[None])
    return float(ranking.average_precision()[0])


def _ranking_metrics(rows, codes, draws, budgets):
    score, positive = rows["score"].to_numpy(float), rows["malicious"].to_numpy(bool)
    weight = rows["weight_natural"].to_numpy(float)
    with_precursors, either = _precursors_as_positives(rows)

    def measured(multiples: np.ndarray) -> dict[str, np.ndarray]:
        """Return every ranking metric for row multiples `(B, N)`."""
        weights = multiples * weight
        ranking = _rank(score, positive, weights)
        result = {"base_rate": _ratio(weights @ positive, weights.sum(1)),
                  "pr_auc": ranking.average_precision(),
                  "pr_auc_precursors": _rank(score, either, multiples * with_precursors)
                  .average_precision()}
        for budget in budgets:
            recall, precision = ranking.at_budget(budget)
            result[f"recall_at_{budget:g}"] = recall
            result[f"precision_at_{budget:g}"] = precision
        result["brier"], result["ece"] = _calibration(rows, weights)
        return result

    points = measured(np.ones((1, len(rows))))
    size = max(1, _CELLS // len(rows))
    parts = [measured(draws[start:start + size][:, codes])
             for start in range(0, len(draws), size)]
    counted = {"pr_auc_precursors": with_precursors > 0}
    found = {"pr_auc": positive, "pr_auc_precursors": either,
             **{f"recall_at_{budget:g}": positive for budget in budgets}}
    result = {}
    for name in points:
        rests = counted.get(name, weight > 0)
        result[name] = (points[name][0], np.concatenate([part[name] for part in parts]),
                        rests.sum(), _users(codes, rests & found.get(name, True)))
    return result


def _precursors_as_positives(rows) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and positives `(N,)` that count precursor days as malicious ones."""
    positive = rows["malicious"].to_numpy(bool)
    precursor = rows["precursor"].to_numpy(bool) & ~positive
    weight = rows["weight_natural"].to_numpy(float)
    usual = weight[positive & (weight > 0)]
    return (np.where(precursor, usual.mean() if len(usual) else 1.0, weight),
            positive | precursor)


def _calibration(rows, weights, bins: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Return Brier score and expected calibration error of the score as P(malicious), `(B,)`.

    Over valid verdicts only; NaN unless their scores lie in 0 to 1. ECE: ten bins of equal width.
    """
    valid = rows["valid"].to_numpy(bool)
    score = rows["score"].to_numpy(float)[valid]
    nothing = np.full(len(weights), np.nan)
    if len(score) == 0 or score.min() < 0 or score.max() > 1:
        return nothing, nothing
    hit = rows["malicious"].to_numpy(float)[valid]
    weights = weights[:, valid]
    total = weights.sum(1)
    within = np.eye(bins)[np.minimum((score * bins).astype(int), bins - 1)]
    gap = np.abs((weights * (score - hit)) @ within).sum(1)
    return _ratio(weights @ (score - hit) ** 2, total), _ratio(gap, total)


def precision_recall_curve(predictions: pd.DataFrame, truth: pd.DataFrame, sample: pd.DataFrame,
                           *, points: int = 101, resamples: int = 500, seed: int = 0,
                           level: float = 0.95) -> pd.DataFrame:
    """Return precision with its interval on an even grid of recall, at the natural base rate.

    Columns recall, precision, low, high. Precision at a recall is that of the first step of the
    ranking that reaches it; the area under it is not exactly the average precision.
    """
    rows = join(predictions, truth, sample)
    grid = np.linspace(0, 1, points)[1:]
    score, positive = rows["score"].to_numpy(float), rows["malicious"].to_numpy(bool)

    def measured(weights):
        ranking = _rank(score, positive, weights)
        recall = _ratio(ranking.positive, ranking.positive[:, -1:].repeat(
            ranking.all.shape[1], axis=1))
        precision = _ratio(ranking.positive, ranking.all)
        result = np.full((len(weights), len(grid)), np.nan)
        for i in range(len(weights)):
            if ranking.positive[i, -1] > 0:
                reached = np.searchsorted(recall[i], grid - 1e-9)
                result[i] = precision[i, np.minimum(reached, recall.shape[1] - 1)]
        return result

    return _curve(rows, measured, {"recall": grid}, "precision", resamples, seed, level)


def budget_curve(predictions: pd.DataFrame, truth: pd.DataFrame, sample: pd.DataFrame, *,
                 budgets: Sequence[float] = (0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50),
                 resamples: int = 500, seed: int = 0, level: float = 0.95) -> pd.DataFrame:
    """Return recall of malicious days with its interval at each budget of alerts.

    Columns budget (alerts per 1,000 account-days), recall, low, high.
    """
    _check_budgets(budgets)
    rows = join(predictions, truth, sample)
    score, positive = rows["score"].to_numpy(float), rows["malicious"].to_numpy(bool)

    def measured(weights):
        ranking = _rank(score, positive, weights)
        return np.stack([ranking.at_budget(budget)[0] for budget in budgets], axis=1)

    return _curve(rows, measured, {"budget": np.asarray(budgets, float)}, "recall", resamples,
                  seed, level)


def _curve(rows, measured, x, name, resamples, seed, level) -> pd.DataFrame:
    codes = clusters(rows["user"], rows["incident"])
    weight = rows["weight_natural"].to_numpy(float)
    draws = user_draws(codes.max() + 1, resamples=resamples, seed=seed)
    users = _users(codes, (weight > 0) & rows["malicious"].to_numpy(bool))
    size = max(1, _CELLS // len(rows))
    resampled = np.concatenate([measured(draws[start:start + size][:, codes] * weight)
                                for start in range(0, len(draws), size)])
    ends = [percentile_interval(column, level=level, users=users) for column in resampled.T]
    return pd.DataFrame({**x, name: measured(weight[None])[0],
                         "low": [low for low, _ in ends], "high": [high for _, high in ends]})


# --------------------------------------------------------------------------- insiders

def insiders_found(predictions: pd.DataFrame, truth: pd.DataFrame, sample: pd.DataFrame, *,
                   budget: float = 2.0) -> pd.DataFrame:
    """Return which insiders are flagged within an alert budget, and when.

    One row per incident with a malicious day in the sample: incident, scenario, days (malicious
    account-days), first_day, found, found_day, days_until_found (calendar days from the first
    malicious day to the first flagged one). Days are flagged from the highest score down; a step
    of equal scores that no longer fits the budget is left out entirely.
    """
    _check_budgets([budget])
    return _insiders(join(predictions, truth, sample), budget)


def _insiders(rows: pd.DataFrame, budget: float) -> pd.DataFrame:
    score = rows["score"].to_numpy(float)
    positive = (rows["malicious"] & rows["incident"].notna() & ~rows["ignore"]
                & ~rows["precursor"]).to_numpy(bool)
    ranking = _rank(score, positive, rows["weight_natural"].to_numpy(float)[None])
    fits = ranking.all[0] <= ranking.all[0, -1] * budget / 1000
    threshold = ranking.scores[fits][-1] if fits.any() else np.inf
    days = rows[positive].assign(day=pd.to_datetime(rows.loc[positive, "day"]))
    flagged = days["valid"] & (days["score"] >= threshold)
    days["found_day"] = days["day"].where(flagged)  # NaT where it was not
    table = days.groupby("incident").agg(scenario=("scenario", "max"), days=("day", "size"),
                                         first_day=("day", "min"),
                                         found_day=("found_day", "min")).reset_index()
    table["found"] = table["found_day"].notna()
    table["days_until_found"] = (table["found_day"] - table["first_day"]).dt.days
    return table[["incident", "scenario", "days", "first_day", "found", "found_day",
                  "days_until_found"]]


def _insider_metrics(rows, budgets, resamples, seed):
    result = {}
    for budget in budgets:
        table = _insiders(rows, budget)
        for scenario in (None, *SCENARIOS):
            part = table if scenario is None else table[table["scenario"] == scenario]
            name = f"insiders_found_at_{budget:g}"
            if scenario is not None:
                name = f"insiders_found_scenario_{scenario}_at_{budget:g}"
            found = part["found"].to_numpy(float)
            value = found.mean() if len(found) else np.nan
            result[name] = (value, _resampled(found, np.mean, resamples, seed), len(part),
                            len(part))
        late = table["days_until_found"].to_numpy(float)
        known = late[~np.isnan(late)]
        result[f"days_until_found_at_{budget:g}"] = (
            np.median(known) if len(known) else np.nan,
            _resampled(late, np.nanmedian, resamples, seed), len(known), None)
    return result


def _resampled(values, statistic, resamples, seed) -> np.ndarray:
    """Return a statistic of resampled insiders, `(B,)`; NaN where there is nothing to measure."""
    if len(values) == 0 or np.isnan(values).all():
        return np.full(resamples, np.nan)
    places = generator(seed, "bootstrap over insiders").integers(
        len(values), size=(resamples, len(values)))
    drawn = values[places]
    some = ~np.isnan(drawn).all(1)
    result = np.full(resamples, np.nan)
    result[some] = statistic(drawn[some], axis=1)
    return result


# --------------------------------------------------------------------------- comparison

def comparison_table(metrics: pd.DataFrame, *, names: Sequence[str] = COMPARED,
                     level: float = 0.95) -> pd.DataFrame:
    """Return one row per detector and split with each metric's mean and interval.

    `metrics` comes from `evaluate`. With two or more seeds the interval is Student's over seeds
    (column `interval` says "seeds"), with one seed the bootstrap over users ("users"): the two
    answer different questions and are never mixed in a row. Columns: detector, split, seeds,
    interval, then for each name: name, name_low, name_high. Detectors keep their order.
    """
    _require(metrics, ("detector", "seed", "split", "metric", "value", "low", "high"), "metrics")
    _refuse(set(names) - set(metrics["metric"]), "metrics lacks the metrics", what="metrics")
    _refuse(metrics.loc[metrics.duplicated([*KEYS, "metric"]), "metric"],
            "metrics holds metrics more than once", what="metrics")
    table = []
    for (detector, split), rows in metrics.groupby(["detector", "split"], sort=False):
        seeds = rows["seed"].nunique()
        line = {"detector": detector, "split": split, "seeds": seeds,
                "interval": "seeds" if seeds > 1 else "users"}
        for name in names:
            found = rows[rows["metric"] == name]
            if len(found) != seeds:
                raise UserError(f"metrics: {detector} on {split} has {name} for {len(found)} of "
                                f"its {seeds} seeds: evaluate all seeds in the same way.")
            if seeds > 1:
                value, low, high = seed_interval(found["value"], level=level)
            else:
                value, low, high = found[["value", "low", "high"]].iloc[0]
            line.update({name: value, f"{name}_low": low, f"{name}_high": high})
        table.append(line)
    return pd.DataFrame(table)


def readable(table: pd.DataFrame, *, digits: int = 3) -> pd.DataFrame:
    """Return a comparison table with each interval written into its cell, ready to show.

    >>> readable(pd.DataFrame({"detector": ["a"], "x": [.5], "x_low": [.4], "x_high": [.61]}))
      detector                     x
    0        a  0.500 [0.400, 0.610]
    """
    names = [name for name in table if f"{name}_low" in table and f"{name}_high" in table]
    ends = {f"{name}_{end}" for name in names for end in ("low", "high")}
    shown = table[[name for name in table if name not in ends]].copy()
    for name in names:
        shown[name] = [
            "" if np.isnan(value) else f"{value:.{digits}f}" if np.isnan(low)
            else f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
            for value, low, high in zip(table[name], table[f"{name}_low"], table[f"{name}_high"],
                                        strict=True)]
    return shown


@dataclass(frozen=True)
class Difference:
    """One detector's metric minus another's, with what can be said about it.

    `low`, `high`: the interval at `level`; `verdict`: see `difference_verdict`; `margin`: the
    largest difference that counts as none; `covers`: what was resampled ("users", "seeds" or
    "users and seeds"); `p_seeds`: the sign-flip permutation test over seeds, NaN below two;
    `p_users`: the two-sided p of no difference that belongs to an interval over users, else NaN;
    `narrow`: the interval at level 1 - 2 alpha, which rules on equivalence; `p_student`: the p that
    belongs to Student's interval over seeds, else NaN.
    """

    metric: str
    value: float
    low: float
    high: float
    verdict: str
    margin: float
    level: float
    covers: str
    seeds: int
    p_seeds: float
    p_users: float = float("nan")
    narrow: tuple[float, float] = (float("nan"), float("nan"))
    p_student: float = float("nan")

    @property
    def p(self) -> float:
        """The p that belongs to the interval: over seeds Student's, else that over users."""
        return self.p_student if self.covers == "seeds" else self.p_users


def paired_difference(a: pd.DataFrame, b: pd.DataFrame, truth: pd.DataFrame,
                      sample: pd.DataFrame, *, metric: str = "macro_f1", margin: float = 0.02,
                      resamples: int = 1000, seed: int = 0, level: float = 0.95) -> Difference:
    """Return metric(a) - metric(b), resampling users for both at once (and seeds).

    `a` and `b` are predictions tables of one detector each on the same split, with one or several
    seeds; the same seeds are compared pairwise, different ones by their means. `metric` is any
    name that `evaluate` gives, with any budget behind `_at_`. With fewer than about
    five seeds the interval over seeds is too narrow: read `p_seeds` beside it.
    """
    paired = set(a["seed"]) == set(b["seed"])
    values, points, users = [], [], []
    for table, what in ((a, "a"), (b, "b")):
        if table["detector"].nunique() != 1 or table["split"].nunique() != 1:
            raise UserError(f"{what} must hold one detector and one split, found "
                            f"{table['detector'].nunique()} and {table['split'].nunique()}.")
        runs = [_one_metric(join(rows, truth, sample), metric, resamples, seed)
                for _, rows in table.groupby("seed")]
        points.append(np.array([float(run.value) for run in runs]))
        values.append(np.stack([run.resampled for run in runs], axis=1))  # (B, seeds)
        users += [run.users for run in runs]
    if a["split"].iloc[0] != b["split"].iloc[0]:
        raise UserError(f"a is of split {a['split'].iloc[0]}, b of {b['split'].iloc[0]}: "
                        "compare predictions for the same windows.")
    draw = generator(seed, "bootstrap over seeds")
    drawn = []
    chosen = None
    for resampled in values:
        if chosen is None or not paired:
            chosen = draw.integers(resampled.shape[1], size=resampled.shape)
        drawn.append(np.take_along_axis(resampled, chosen, axis=1).mean(1))
    differences = drawn[0] - drawn[1]
    fewest = None if None in users else min(users)
    (low, high), narrow = (
        percentile_interval(differences, level=share, users=fewest, limits=(-1.0, 1.0))
        for share in (level, 2 * level - 1))
    seeds = min(len(part) for part in points)
    p = sign_flip_p(points[0] - points[1]) if paired and seeds > 1 else float("nan")
    return Difference(metric, float(points[0].mean() - points[1].mean()), low, high,
                      difference_verdict((low, high), narrow, margin), margin, level,
                      "users and seeds" if max(map(len, points)) > 1 else "users", seeds, p,
                      float("nan") if np.isnan(low) else _p_of_no_difference(differences, fewest),
                      narrow)


def _p_of_no_difference(differences: np.ndarray, users: int | None) -> float:
    """Return the two-sided p of no difference, from the resamples `(B,)` of its interval.

    Where they all agree, the p at which `percentile_interval` would just hold zero.
    """
    known = _known(differences)
    if users is not None and _all_equal(known):
        return float(min(1.0, 2 * (1 - abs(known[0])) ** users))
    beyond = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * (1 + beyond) / (1 + len(known))))


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """Return differences that are looked at together: their `p` after Holm, verdicts by it.

    Better and worse stay only where the adjusted p is below 1 - `level`. Equivalence is left as it
    is: each was asked for by itself.
    """
    result = []
    for found, p in zip(differences, holm([one.p for one in differences]), strict=True):
        name = "p_student" if found.covers == "seeds" else "p_users"
        unsure = found.verdict in ("better", "worse") and not p < 1 - found.level
        result.append(replace(found, verdict="inconclusive" if unsure else found.verdict,
                              **{name: p}))
    return result


def _one_metric(rows, metric, resamples, seed) -> _Measure:
    """Return one metric, resampled with the draws every detector shares."""
    _name, _, budget = metric.partition("_at_")
    budgets = [float(budget)] if budget.replace(".", "", 1).isdigit() else []
    if budgets:
        _check_budgets(budgets)
    measured = _measured(rows, budgets=budgets, resamples=resamples, seed=seed)
    if metric not in measured:
        raise UserError(f"Unknown metric {metric!r}. Legal metrics: {', '.join(measured)}, and "
                        "recall_at_<budget>, precision_at_<budget>, insiders_found_at_<budget>.")
    return measured[metric]


def difference_verdict(interval: tuple[float, float], narrow: tuple[float, float],
                       margin: float) -> str:
    """Return "equivalent", "better", "worse" or "inconclusive" for a difference.

    Equivalent (two one-sided tests, Schuirmann 1987): the `narrow` interval, at level 1 - 2 alpha
    (90 % for alpha .05), lies within -margin to margin. It comes first: a difference that is
    certain but smaller than the margin does not count. Better or worse: the `interval`, at level
    1 - alpha, excludes zero.

    >>> difference_verdict((-0.01, 0.012), (-0.008, 0.01), 0.02)
    'equivalent'
    >>> difference_verdict((0.01, 0.09), (0.02, 0.08), 0.02)
    'better'
    """
    if margin <= 0:
        raise UserError(f"margin={margin!r} is not possible: legal values are above 0.")
    if np.isnan([*interval, *narrow]).any():
        return "inconclusive"
    if -margin < narrow[0] and narrow[1] < margin:
        return "equivalent"
    if interval[0] > 0:
        return "better"
    if interval[1] < 0:
        return "worse"
    return "inconclusive"


# --------------------------------------------------------------------------- two detectors together

def graver(a: pd.DataFrame, b: pd.DataFrame, *, name: str = "either") -> pd.DataFrame:
    """Return the predictions of an ensemble of two detectors, which says the graver of both risks.

    `a` and `b` are predictions tables of one detector and seed each for the same windows; the
    ensemble is invalid only where both are, has their order from `a`, and neither ranks nor cites.
    Raises `UserError` naming windows that one of them lacks or that occur more than once.
    """
    for table, what in ((a, "a"), (b, "b")):
        _require(table, _PREDICTION_COLUMNS, what)
        _refuse(table.loc[table["window_id"].duplicated(), "window_id"],
                f"{what} holds windows more than once")
    _refuse(set(a["window_id"]) ^ set(b["window_id"]), "only one of a and b has these windows")
    grave = ("invalid", *RISKS).index
    other = a["window_id"].map(b.set_index("window_id")["risk"])
    risk = [max(pair, key=grave) for pair in zip(a["risk"], other, strict=True)]
    nothing = [[] for _ in risk]
    return a.assign(detector=name, risk=risk, valid=[said != "invalid" for said in risk], score=0.0,
                    features=nothing, evidence=nothing)


def ensemble_gains(a: pd.DataFrame, b: pd.DataFrame, truth: pd.DataFrame, sample: pd.DataFrame, *,
                   resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return macro-F1 of two detectors and of their ensemble (`graver`), and what it gains.

    One row per detector, the ensemble ("either") last: macro_f1, then the gain of the ensemble over
    this detector with low, high and verdict of `paired_difference`, NaN for the ensemble itself.
    """
    both = graver(a, b)
    made = []
    for table in (a, b, both):
        counts = confusion(table, truth, sample).to_numpy(float).reshape(1, -1)
        line = {"detector": table["detector"].iloc[0],
                "macro_f1": _class_metrics(counts)["macro_f1"][0]}
        if table is not both:
            gain = paired_difference(both, table, truth, sample, resamples=resamples, seed=seed)
            line |= {"gain": gain.value, "low": gain.low, "high": gain.high,
                     "verdict": gain.verdict}
        made.append(line)
    return pd.DataFrame(made).set_index("detector")


# --------------------------------------------------------------------------- statistics of seeds

def seed_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float, float]:
    """Return mean, low and high of one number per seed: Student's t interval.

    With one seed the ends are NaN: nothing is known about other seeds.

    >>> [round(x, 3) for x in seed_interval([0.6, 0.7, 0.8])]
    [0.7, 0.452, 0.948]
    """
    values = np.asarray(values, float)
    if len(values) == 0:
        raise UserError("seed_interval needs at least one value.")
    mean = float(values.mean())
    if len(values) == 1:
        return mean, float("nan"), float("nan")
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return mean, float(mean - half), float(mean + half)


def compare_seeds(a: Sequence[float], b: Sequence[float], *, metric: str = "metric",
                  margin: float = 0.02, level: float = 0.95) -> Difference:
    """Return the mean of paired differences a - b `(S,)`, Student's interval and p over seeds.

    Value s of `a` and `b` belongs to the same seed. The interval covers seeds only.
    """
    if len(a) != len(b):
        raise UserError(f"a has {len(a)} seeds, b has {len(b)}: give the same seeds, in order.")
    differences = np.asarray(a, float) - np.asarray(b, float)
    value, low, high = seed_interval(differences, level=level)
    narrow = seed_interval(differences, level=2 * level - 1)[1:]
    p = sign_flip_p(differences) if len(differences) > 1 else float("nan")
    return Difference(metric, value, low, high, difference_verdict((low, high), narrow, margin),
                      margin, level, "seeds", len(differences), p, narrow=narrow,
                      p_student=student_p(differences))


def student_p(differences: Sequence[float]) -> float:
    """Return the two-sided p of paired differences `(S,)` by Student's t; NaN below two.

    >>> round(student_p([0.1, 0.2, 0.3]), 4)
    0.0742
    """
    differences = np.asarray(differences, float)
    if len(differences) < 2:
        return float("nan")
    error = differences.std(ddof=1) / len(differences) ** 0.5
    if error == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return float(2 * stats.t.sf(abs(differences.mean()) / error, len(differences) - 1))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the exact two-sided p of paired differences `(S,)` under all 2**S sign flips.

    The smallest possible p is 2 / 2**S: .25 for three seeds, .031 for six.

    >>> sign_flip_p([0.1, 0.2, 0.3])
    0.25
    """
    differences = np.asarray(differences, float)
    if not 1 <= len(differences) <= 20:
        raise UserError(f"sign_flip_p takes 1 to 20 differences, got {len(differences)}.")
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(differences))))
    flipped = np.abs(signs @ differences)
    return float(np.mean(flipped >= abs(differences.sum()) - 1e-12))


def mcnemar_p(a_right: np.ndarray, b_right: np.ndarray) -> float:
    """Return the exact two-sided p of McNemar's test for two detectors on the same windows.

    Booleans `(N,)`: was the verdict right? It ignores that a user's windows are correlated, so it
    is a cross-check of `paired_difference`, not a substitute.

    >>> mcnemar_p(np.array([1, 1, 1, 0], bool), np.array([0, 0, 0, 0], bool))
    0.25
    """
    only_a = int(np.sum(a_right & ~b_right))
    only_b = int(np.sum(b_right & ~a_right))
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for several comparisons (Holm 1979), in the order given.

    One that is NaN stays so and counts as a comparison.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    result = np.empty(len(p))
    result[order] = np.minimum(adjusted, 1.0)
    return result.tolist()


# --------------------------------------------------------------------------- refusals

def _require(table: pd.DataFrame, names: Sequence[str], what: str) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise UserError(f"{what} lacks the columns {', '.join(missing)}.")


def _refuse(found, message: str, *, what: str = "windows") -> None:
    found = sorted(map(str, set(found)))
    if found:
        named = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise UserError(f"{message}: {named} ({len(found)} {what}). Give tables made for the same "
                        "sample.")


def _check_budgets(budgets: Sequence[float]) -> None:
    if len(budgets) == 0 or min(budgets) <= 0 or max(budgets) > 1000:
        raise UserError(f"budgets={list(budgets)!r} is not possible: legal values are above 0, to "
                        "1000 alerts per 1,000 account-days.")
