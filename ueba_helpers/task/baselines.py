"""Classical detectors on the same windows: the bar that a language model has to clear.

In: the windows table (one row per account-day, the columns of `ueba_helpers.data.windows`).
Out: the predictions table that every detector of the study hands over. Refuses unknown detectors,
missing columns, training rows without a malicious day, and predictions without thresholds.

- `rules`: what a security operations centre would write; each rule has stated points, their sum
  is the score.
- `keyword`: visits to a leak site or a hacking-tool site and nothing else. It shows what the
  give-away strings of the release are worth.
- `isolation_forest`: unsupervised, on the training users' days (Liu et al. 2008).
- `logistic_regression` and `gradient_boosting`: supervised on the three risk levels.

Everything is fitted on the rows given to `fit`, so the same detector can be trained on all days
of the training users or on exactly the windows that a policy saw. Two thresholds chosen on dev
turn scores into risk levels: malicious when `score` reaches the upper one, else suspicious when
`alarm` reaches the lower one. For the supervised detectors `score` is P(malicious) and `alarm` is
P(suspicious or malicious); the others have one score for both.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier, IsolationForest
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from threadpoolctl import threadpool_limits

from ueba_helpers.data.seeding import derived_seed, generator
from ueba_helpers.data.windows import BEHAVIOUR_FEATURES, PAST_FEATURES, WEEK_FEATURES
from ueba_helpers.errors import UserError
from ueba_helpers.task.verdicts import RISKS

DETECTORS = ("rules", "keyword", "isolation_forest", "logistic_regression", "gradient_boosting")
SUPERVISED = ("logistic_regression", "gradient_boosting")
FEATURE_COLUMNS = (*BEHAVIOUR_FEATURES, *PAST_FEATURES, *WEEK_FEATURES)
PREDICTION_COLUMNS = ("detector", "seed", "window_id", "user", "day", "split", "label", "risk",
                      "score", "features", "evidence", "valid", "seconds")
NORMAL, SUSPICIOUS, MALICIOUS = RISKS
_MOST_CANDIDATES = 256
_KNOWN_AFTER_DAYS = 10  # an account's habits are unknown before that many active days
_RARE_SHARE = 0.1  # a habit shown on more of the past days than this excuses a deviation


@dataclass(frozen=True)
class Rule:
    """One line of a security operations centre's rule book: `points` when `fires` is true."""

    name: str
    points: float
    about: str
    fires: Callable[[pd.DataFrame], pd.Series]


def _unusual(windows: pd.DataFrame, habit: str) -> pd.Series:
    """Return where the account has a past to speak of, and the habit on few of its days."""
    return ((windows["past_days"] >= _KNOWN_AFTER_DAYS)
            & (windows[habit] <= _RARE_SHARE * windows["past_days"]))


RULES = (
    Rule("leak_site", 5, "a visit to a leak site", lambda w: w.n_http_leak > 0),
    Rule("hacking_tool", 5, "a visit to a keylogger or hacking-tool site",
         lambda w: w.n_http_hack > 0),
    Rule("night_drive_without_habit", 4,
         "removable media outside hours, on a known account with neither habit",
         lambda w: (w.n_device_after_hours > 0) & _unusual(w, "past_device_days")
         & _unusual(w, "past_after_hours_days")),
    Rule("drive_on_new_pc", 3, "removable media on a day with a new PC",
         lambda w: (w.n_device > 0) & (w.n_new_pcs > 0)),
    Rule("drive_while_job_hunting", 2, "removable media, and job pages within the week",
         lambda w: (w.n_device > 0) & (w.n_http_job + w.week_job > 0)),
    Rule("job_hunting_with_competitor", 2, "job pages, and mail to a competitor, within the week",
         lambda w: (w.n_http_job + w.week_job > 0)
         & (w.n_email_competitor + w.week_competitor > 0)),
    Rule("bulk_copy", 2, "at least 10 files copied, and three times the usual day",
         lambda w: (w.n_file >= 10) & (w.n_file >= 3 * w.past_files.fillna(0))),
    Rule("executable_copy", 2, "an executable copied to removable media",
         lambda w: w.n_file_exe > 0),
    Rule("mass_mail", 1, "one mail to at least 10 recipients", lambda w: w.max_recipients >= 10),
    Rule("new_competitor_mail", 1, "mail to a competitor, by a known account without the habit",
         lambda w: (w.n_email_competitor > 0) & _unusual(w, "past_competitor_days")),
    Rule("first_drive", 1, "removable media, on a known account without the habit",
         lambda w: (w.n_device > 0) & _unusual(w, "past_device_days")),
    Rule("night_logon_without_habit", 1,
         "a logon outside hours, on a known account without the habit",
         lambda w: (w.n_after_hours_logon > 0) & _unusual(w, "past_after_hours_days")),
)


@dataclass(frozen=True)
class Baseline:
    """A fitted detector; `thresholds` (lower, upper) are None until `fit_thresholds`."""

    detector: str
    seed: int
    estimator: object
    rows: int
    thresholds: tuple[float, float] | None = None


def rule_hits(windows: pd.DataFrame) -> pd.DataFrame:
    """Return which rule fires on which window: one boolean column per rule, index as given."""
    _require_columns(windows, FEATURE_COLUMNS, "windows")
    return pd.DataFrame({rule.name: rule.fires(windows).fillna(False).astype(bool)
                         for rule in RULES}, index=windows.index)


def fit(train: pd.DataFrame, *, detector: str, seed: int) -> Baseline:
    """Return `detector` fitted on exactly the rows of `train`, one account-day per row.

    Give it days of training users only, without the days flagged `ignore` or `precursor` unless
    they are wanted as examples of their `risk`. Repeated rows count as often as they occur.
    Rules and keyword learn nothing; the isolation forest reads no label. Raises `UserError` for
    an unknown detector, missing columns, no rows, or no malicious or no other day to learn from.
    """
    if detector not in DETECTORS:
        raise UserError(f"Unknown detector {detector!r}. Legal detectors: {', '.join(DETECTORS)}.")
    _require_columns(train, FEATURE_COLUMNS, "train")
    if len(train) == 0:
        raise UserError("train has no rows: give the windows of the training users.")
    estimator = None
    state = derived_seed(seed, f"baseline {detector}") % 2**32
    if detector == "isolation_forest":
        estimator = make_pipeline(
            SimpleImputer(strategy="median", keep_empty_features=True),
            IsolationForest(n_estimators=200, random_state=state))
        _fitted(estimator, _matrix(train), None)
    elif detector in SUPERVISED:
        _require_columns(train, ("risk",), "train")
        _require_risks(train["risk"], "train")
        estimator = _fitted(_classifier(detector, state), _matrix(train),
                            train["risk"].to_numpy(str))
    return Baseline(detector, seed, estimator, len(train))


def scores(model: Baseline, windows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return `score` and `alarm`, `(N,)` each: higher means more malicious, more unusual.

    Supervised: P(malicious) and P(suspicious or malicious). Rules: the sum of points. Keyword:
    the number of give-away visits. Isolation forest: the anomaly score in (0, 1].
    """
    _require_columns(windows, FEATURE_COLUMNS, "windows")
    if len(windows) == 0:
        return np.zeros(0), np.zeros(0)
    if model.detector == "rules":
        score = rule_hits(windows).to_numpy(float) @ np.array([rule.points for rule in RULES])
    elif model.detector == "keyword":
        score = (windows["n_http_leak"] + windows["n_http_hack"]).to_numpy(float)
    elif model.detector == "isolation_forest":
        score = -model.estimator.score_samples(_matrix(windows))
    else:
        probability = dict(zip(model.estimator.classes_,
                               _probabilities(model.estimator, _matrix(windows)).T,
                               strict=True))
        nothing = np.zeros(len(windows))
        score = probability.get(MALICIOUS, nothing)
        return score, score + probability.get(SUSPICIOUS, nothing)
    return score, score


def fit_and_score(train: pd.DataFrame, held_out: pd.DataFrame, *, detector: str,
                  seed: int) -> np.ndarray:
    """Return the scores of `held_out`, `(N,)`, from `detector` fitted on `train`.

    This is how the label permutation of the leakage audits meets a detector: `held_out` carries
    dealt labels, so a detector that reads them shows.
    """
    return scores(fit(train, detector=detector, seed=seed), held_out)[0]


def fit_thresholds(model: Baseline, dev: pd.DataFrame, *,
                   weights: str | np.ndarray = "balanced") -> Baseline:
    """Return the model with the two thresholds that give the highest macro-F1 on `dev`.

    `weights`: "balanced" lets each risk level count the same, as in the headline sample; an array
    `(N,)` of row weights, for instance the natural ones, chooses thresholds for those. The search
    is exhaustive over midpoints between scores (at most 256 quantiles of each score); among equal
    pairs the one with the fewest alerts is taken.
    """
    _require_columns(dev, ("risk",), "dev")
    _require_risks(dev["risk"], "dev")
    labels = dev["risk"].map(RISKS.index).to_numpy(int)
    if isinstance(weights, str):
        if weights != "balanced":
            raise UserError(f"weights={weights!r} is not possible: give 'balanced' or an array "
                            "with one number per row of dev.")
        weights = 1.0 / np.bincount(labels, minlength=len(RISKS))[labels]
    weights = np.asarray(weights, float)
    if weights.shape != (len(dev),) or not (weights >= 0).all() or weights.sum() == 0:
        raise UserError(f"weights must hold one number of 0 and more for each of the {len(dev)} "
                        "rows of dev, and not only zeros.")
    score, alarm = scores(model, dev)
    upper, lower = _candidates(score), _candidates(alarm)
    macro_f1 = _macro_f1_grid(labels, weights, np.searchsorted(upper, score, side="right"),
                              np.searchsorted(lower, alarm, side="right"),
                              (len(upper), len(lower)))
    best = np.argwhere(macro_f1 >= macro_f1.max() - 1e-12)[-1]
    return replace(model, thresholds=(float(lower[best[1]]), float(upper[best[0]])))


def predict(model: Baseline, windows: pd.DataFrame, *, split: str) -> pd.DataFrame:
    """Return the predictions table, one row per window in the order given.

    `features` and `evidence` are empty (a classical detector cites nothing), `valid` is True,
    `seconds` the mean time per window. Raises `UserError` without thresholds.
    """
    if model.thresholds is None:
        raise UserError(f"{model.detector} has no thresholds yet: choose them on dev with "
                        "fit_thresholds before predict.")
    _require_columns(windows, ("window_id", "user", "day", "risk"), "windows")
    started = time.perf_counter()
    score, alarm = scores(model, windows)
    lower, upper = model.thresholds
    risk = np.select([score >= upper, alarm >= lower], [MALICIOUS, SUSPICIOUS], NORMAL)
    seconds = (time.perf_counter() - started) / max(1, len(windows))
    return pd.DataFrame({
        "detector": model.detector, "seed": model.seed,
        "window_id": windows["window_id"].to_numpy(), "user": windows["user"].to_numpy(),
        "day": windows["day"].to_numpy(), "split": split, "label": windows["risk"].to_numpy(),
        "risk": risk, "score": score.astype(float),
        "features": [[] for _ in range(len(windows))],
        "evidence": [[] for _ in range(len(windows))],
        "valid": True, "seconds": seconds,
    }, columns=list(PREDICTION_COLUMNS))


def jitter_counts(windows: pd.DataFrame, *, seed: int, rows: str = "benign") -> pd.DataFrame:
    """Return a copy whose daily counts moved by -1, 0 or +1, each with the same chance.

    r4.2 is clockwork: most benign days repeat their user's own counts exactly, which makes "the
    count changed" unrealistically telling. A count of zero stays zero and a positive one stays
    positive: the jitter invents no drive and erases no visit. `rows` is "benign" (days without an
    answer-key row, as published results have it) or "all" (the label cannot show in the jitter).
    """
    if rows not in ("benign", "all"):
        raise UserError(f"rows={rows!r} is not possible: legal values are 'benign' and 'all'.")
    counts = [name for name in BEHAVIOUR_FEATURES if name.startswith("n_")]
    _require_columns(windows, counts, "windows")
    jittered = windows.copy()
    values = windows[counts].to_numpy(float)
    moved = np.maximum(
        values + generator(seed, "jitter of counts").integers(-1, 2, size=values.shape), 1.0)
    chosen = values > 0
    if rows == "benign":
        _require_columns(windows, ("malicious",), "windows")
        chosen &= ~windows["malicious"].to_numpy(bool)[:, None]
    jittered[counts] = np.where(chosen, moved, values)
    return jittered


def hardness_score(windows: pd.DataFrame, train_users: list[str], *, seed: int,
                   folds: int = 5) -> np.ndarray:
    """Return P(malicious) `(N,)` for strata of benign days: no row is scored by its own label.

    Gradient boosting (malicious or not) on the days of `train_users`, without those flagged
    `ignore` or `precursor`. Days of other users are scored by the model of all training users;
    a training user's days by a model of the other folds, where an insider and the account abused
    in the same incident stay together.
    """
    needed = ("user", "malicious", "incident", "ignore", "precursor", *FEATURE_COLUMNS)
    _require_columns(windows, needed, "windows")
    known = windows["user"].isin(set(train_users)).to_numpy()
    labels = windows["malicious"].to_numpy(bool)
    usable = known & ~(windows["ignore"] | windows["precursor"]).to_numpy(bool)
    groups = _incident_groups(windows)
    positives = len(np.unique(groups[usable & labels]))
    if positives < 2 or not (usable & ~labels).any():
        raise UserError("hardness_score needs training users with malicious days of at least two "
                        f"incidents and benign days, found {positives} incidents: simulate more "
                        "insiders or give another split.")
    matrix = _matrix(windows)
    state = derived_seed(seed, "hardness") % 2**32
    hardness = np.full(len(windows), np.nan)

    def fill(learned: np.ndarray, scored: np.ndarray) -> None:
        if scored.any():
            fitted = _fitted(_boosting(state), matrix[learned], labels[learned])
            hardness[scored] = _probabilities(fitted, matrix[scored])[:, 1]

    fill(usable, ~known)
    places = np.flatnonzero(usable)
    cut = StratifiedGroupKFold(min(folds, positives), shuffle=True, random_state=state)
    for learned, held_out in cut.split(places, labels[places], groups[places]):
        mask = np.zeros(len(windows), bool)
        mask[places[learned]] = True
        fill(mask, known & np.isin(groups, groups[places[held_out]]) & np.isnan(hardness))
    only_ignored = known & np.isnan(hardness)  # users without one usable day: nobody learned them
    fill(usable & ~np.isin(groups, groups[only_ignored]), only_ignored)
    return hardness


def _fitted(estimator, matrix: np.ndarray, labels: np.ndarray | None):
    """Fit on one thread: the same sums on every machine, and on busy cores twenty times faster."""
    with threadpool_limits(limits=1):
        return estimator.fit(matrix, labels)


def _probabilities(estimator, matrix: np.ndarray) -> np.ndarray:
    with threadpool_limits(limits=1):
        return estimator.predict_proba(matrix)


def _classifier(detector: str, state: int):
    if detector == "gradient_boosting":
        return _boosting(state)
    return make_pipeline(
        SimpleImputer(strategy="median", keep_empty_features=True, add_indicator=True),
        FunctionTransformer(_signed_log), StandardScaler(),
        LogisticRegression(C=1.0, class_weight="balanced", max_iter=2000, random_state=state))


def _boosting(state: int) -> HistGradientBoostingClassifier:
    return HistGradientBoostingClassifier(
        learning_rate=0.1, max_iter=120, max_leaf_nodes=15, min_samples_leaf=10,
        l2_regularization=1.0, early_stopping=False, random_state=state)


def _signed_log(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.log1p(np.abs(values))


def _matrix(windows: pd.DataFrame) -> np.ndarray:
    return windows[list(FEATURE_COLUMNS)].to_numpy(float)


def _incident_groups(windows: pd.DataFrame) -> np.ndarray:
    """Return one group per row: the user's incident where there is one, else the user."""
    incident = windows["user"].map(windows.dropna(subset="incident").groupby("user")["incident"]
                                   .first())
    return incident.where(incident.notna(), windows["user"]).to_numpy(str)


def _candidates(values: np.ndarray) -> np.ndarray:
    """Return ascending thresholds: below all, midpoints of neighbours, and above all."""
    unique = np.unique(values)
    if len(unique) > _MOST_CANDIDATES:
        unique = np.unique(np.quantile(values, np.linspace(0, 1, _MOST_CANDIDATES),
                                       method="nearest"))
    return np.concatenate([[-np.inf], (unique[1:] + unique[:-1]) / 2, [np.inf]])


def _macro_f1_grid(labels: np.ndarray, weights: np.ndarray, upper_passed: np.ndarray,
                   lower_passed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return macro-F1 for every pair (upper, lower) of candidates.

    `upper_passed[i]` counts the upper candidates that row i reaches, `lower_passed[i]` the lower
    ones. Confusion counts for all pairs come from one cumulative histogram per class.
    """
    f1 = []
    histograms = np.zeros((len(RISKS), shape[0] + 1, shape[1] + 1))
    np.add.at(histograms, (labels, upper_passed, lower_passed), weights)
    totals = histograms.sum((1, 2))[:, None, None]
    # Row i stays below candidate k when it reaches at most k candidates (k from 0).
    below = histograms.cumsum(1)[:, :-1]
    normal = below.cumsum(2)[:, :, :-1]
    not_malicious = np.broadcast_to(below.sum(2, keepdims=True), normal.shape)
    said = (normal, not_malicious - normal, totals - not_malicious)
    for level, counts in enumerate(said):
        denominator = counts.sum(0) + totals[level]
        f1.append(np.divide(2 * counts[level], denominator, out=np.zeros_like(denominator),
                            where=denominator > 0))
    return np.mean(f1, axis=0)


def _require_columns(table: pd.DataFrame, names, what: str) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise UserError(f"{what} lacks the columns {', '.join(missing)}: give a table built by "
                        "windows.build.")


def _require_risks(risks: pd.Series, what: str) -> None:
    unknown = sorted(set(risks) - set(RISKS))
    if unknown:
        raise UserError(f"{what}: column risk holds {unknown[0]!r}; legal values are "
                        f"{', '.join(RISKS)}.")
    present = set(risks)
    if MALICIOUS not in present or len(present) < 2:
        raise UserError(f"{what}: column risk must hold malicious and other days, found only "
                        f"{', '.join(sorted(present)) or 'nothing'}: give more users.")
