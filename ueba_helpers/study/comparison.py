"""What notebook 07 hands on: the table of detectors, what made it, and the verdict on PPO and GRPO.

In: the table that the test users gave, and the difference between the two methods. Out, in the
study's folder:

    metrics.csv           every metric of every detector, one a row, with its interval
    comparison.csv        one row per detector, the columns of the headline table, and how many
                          incidents were judged
    comparison.json       what made it: profile, seed, data, hashes of settings, code and versions,
                          the run folders it rests on, and the hash of the table itself
    verdict.json          PPO against GRPO as one sentence, with the numbers behind it; `scope` says
                          whether it is about the methods (several seeds) or two runs (one seed);
                          `citations` says in another how their evidence changed from the cold
                          start, `rivals` how both judge beside what was trained on labels

Studies are pooled over seeds only if all of this but the seed is equal; `siblings` says of every
other study why it is left out. Refused with a `UserError`: a table without the columns of the
headline, a study without a verdict, and a verdict on another table than the one beside it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from ueba_helpers.data.files import atomic_path, sha256_of, write_json
from ueba_helpers.data.records import plain
from ueba_helpers.errors import UserError
from ueba_helpers.study.config import Profile
from ueba_helpers.study.evaluation import Difference, compare_seeds, corrected
from ueba_helpers.study.runs import (
    code_fingerprint,
    content_hash,
    data_hash,
    package_versions,
)
from ueba_helpers.study.stages import GBOOST_SAME

# The columns of comparison.csv that the headline table shows, with their headings. A column
# <name>_low and <name>_high beside a metric is its 95 % interval.
COMPARISON_COLUMNS = {
    "detector": "detector",
    "macro_f1": "macro-F1",
    "pr_auc": "PR-AUC at the natural base rate",
    "valid_rate": "valid format rate",
    "evidence_hit_rate": "evidence hit rate",
    "seconds": "seconds",
    "peak_memory_gib": "peak memory (GiB)",
}
LEAST_VALID = 0.5  # of the verdicts of both: below it a comparison compares formats
EQUAL_WITHIN = 0.1  # of the mean compute of PPO and GRPO, which sft_all is set to take
LEAST_INCIDENTS = 10  # judged: below it a comparison tells of these insiders, not of others

RIVALS = ("sft_all", GBOOST_SAME)  # trained on labels, where PPO and GRPO have rewards

METRICS = "metrics.csv"
_TABLE, _MADE_BY, _VERDICT = "comparison.csv", "comparison.json", "verdict.json"
_SAME = ("profile", "data", "settings", "code", "versions")  # in all studies that are pooled
_BESIDE = "incidents"  # a column of comparison.csv that the headline does not show
_CODE = ("data", "task", "rl", "study/comparison.py", "study/evaluation.py",  # the settings of
         "study/pseudonyms.py", "study/runs.py", "study/stages.py")  # config.py count by value
_AGAIN = "Run it with --only 07_comparison --force."


def made_by(chosen: Profile, *, seed: int, data: Path | str = "",
            runs: Sequence[Path | str] = ()) -> dict:
    """Return what a study's numbers follow from: profile, seed, data, settings, code, versions.

    Simulated data are named as such, since they follow from settings, code and seed. The versions
    are those that judge now, and those that each of the run folders `runs` was trained under.
    """
    return {"profile": chosen.name, "seed": seed,
            "data": data_hash(chosen, seed=seed, data=data) if data else "simulated",
            "settings": content_hash(chosen.as_dict(), 16), "code": code_fingerprint(*_CODE),
            "versions": content_hash([package_versions(), *map(_trained_under, runs)])}


def _trained_under(run: Path | str) -> dict[str, str]:
    """Return the versions a run says it was trained under; those of now if it says nothing."""
    path = Path(run) / "provenance.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found.get("versions") or package_versions()


def write_comparison(study: Path | str, table: pd.DataFrame, *, made_by: Mapping,
                     runs: Sequence[str], metrics: pd.DataFrame | None = None) -> None:
    """Write the columns of the headline with their intervals, the incidents, and what made them.

    `runs` are the names of the run folders that the table rests on; `metrics`, all that `evaluate`
    found, go to a file of their own.
    """
    study = Path(study)
    if metrics is not None:
        with atomic_path(study / METRICS) as temporary:
            metrics.to_csv(temporary, index=False)
    kept = [name for column in (*COMPARISON_COLUMNS, _BESIDE)
            for name in (column, f"{column}_low", f"{column}_high") if name in table]
    with atomic_path(study / _TABLE) as temporary:
        table[kept].to_csv(temporary, index=False)
    write_json(study / _MADE_BY, {**made_by, "runs": list(runs),
                                  "table": sha256_of(study / _TABLE)})


def read_comparison(study: Path | str) -> pd.DataFrame | None:
    """Return comparison.csv, or None if notebook 07 has not written it yet.

    Raises `UserError` if a column of the headline table is missing.
    """
    study = Path(study)
    if not (study / _TABLE).exists():
        return None
    table = pd.read_csv(study / _TABLE)
    missing = [name for name in COMPARISON_COLUMNS if name not in table]
    if missing:
        raise UserError(f"{study.name}/{_TABLE} lacks the columns {', '.join(missing)}. {_AGAIN}")
    return table


def read_made_by(study: Path | str) -> dict:
    """Return comparison.json; `UserError` if it is missing or belongs to another table."""
    return _beside_table(Path(study), _MADE_BY)


def siblings(study: Path | str, made_by: Mapping) -> tuple[dict[int, pd.DataFrame],
                                                          dict[str, str]]:
    """Return the tables of studies that differ in the seed alone, and why others are left out.

    Looks at the folders beside `study` that carry the name of its profile. The first mapping goes
    from seeds to tables (detectors as index), the second from folder names to reasons.
    """
    study = Path(study)
    kept, left_out = {}, {}
    for folder in sorted(study.parent.glob(f"{made_by['profile']}-seed*")):
        if folder == study or not folder.is_dir():
            continue
        reason = _why_not(folder, made_by, {made_by["seed"], *kept})
        if reason:
            left_out[folder.name] = reason
        else:
            kept[read_made_by(folder)["seed"]] = read_comparison(folder).set_index("detector")
    return dict(sorted(kept.items())), left_out


def _why_not(folder: Path, wanted: Mapping, seeds: set[int]) -> str | None:
    try:
        found = read_made_by(folder)
        read_comparison(folder)
    except UserError as error:
        return str(error).removeprefix(f"{folder.name}/")
    different = [name for name in _SAME if found.get(name) != wanted[name]]
    if different:
        return f"made with other {', '.join(different)}"
    if found["seed"] in seeds:
        return f"seed {found['seed']} is there already"
    return None


def pool(tables: Mapping[int, pd.DataFrame]) -> pd.DataFrame:
    """Return one row per seed from comparison tables (detectors as index), in order of the seeds.

    Columns: the macro-F1 of ppo, grpo and sft; ppo_cited, grpo_cited and sft_cited, their evidence
    hit rates; `valid`, the lower of the shares of valid verdicts of PPO and GRPO; `incidents`, how
    many were judged.
    """
    rows = {seed: {**{name: float(table.loc[name, "macro_f1"]) for name in _POOLED},
                   **{f"{name}_cited": float(table.loc[name, "evidence_hit_rate"])
                      for name in _POOLED},
                   "valid": float(table.loc[["ppo", "grpo"], "valid_rate"].min()),
                   _BESIDE: int(table[_BESIDE].min())} for seed, table in sorted(tables.items())}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("seed")


def verdict(pooled: pd.DataFrame, over_users: Difference, from_start: Mapping[str, Difference],
            cited: Mapping[str, Difference], *, simulated: bool) -> dict:
    """Return what can be said of PPO and GRPO in macro-F1, as one sentence and its numbers.

    `pooled` comes from `pool`; `over_users` is PPO minus GRPO on the test users of this study's
    seed, and `from_start` maps both to their differences from `sft`, where they began; `cited` does
    so for the evidence hit rate, which `citations` puts into words. With two or more seeds all
    intervals are Student's over seeds and the verdict is about the methods; with one they are
    bootstraps over users and it is about two runs, so `better` names no method. Seeds on real data
    share their test users, so there each verdict needs the interval over users too.

    Nothing is concluded if, at any seed, fewer than `LEAST_VALID` of the verdicts of one of them
    are valid, or fewer than `LEAST_INCIDENTS` incidents are judged. Nor are two called equivalent
    that both may be where they began: that would be true of any two that learned nothing.
    """
    several = len(pooled) > 1
    found = _confirmed(_over_seeds(pooled["ppo"], pooled["grpo"], over_users), over_users,
                       simulated)
    moves = {name: _over_seeds(pooled[name], pooled["sft"], from_start[name])
             for name in ("ppo", "grpo")}
    reasons = _why_inconclusive(pooled, found, moves)
    ruling = "inconclusive" if reasons else found.verdict
    said = _SAID["methods" if several else "runs"][ruling]
    means = pooled.mean()
    seeds = ", ".join(map(str, pooled.index))
    shared = "" if simulated else ", which share their test users"
    covers = (f"over the seeds {seeds}{shared}, sign-flip p = {found.p_seeds:.3f}" if several else
              f"over the test users of the one seed {seeds}; how training seeds differ is not "
              "covered")
    sentence = (
        f"**{said}{': ' if reasons else ''}{'; '.join(reasons)}**. Macro-F1 on the test users of "
        f"{'simulated' if simulated else 'real'} data: PPO {means['ppo']:.3f}, GRPO "
        f"{means['grpo']:.3f}, difference {found.value:+.3f}, {100 * found.level:g} % interval "
        f"[{found.low:+.3f}, {found.high:+.3f}] ({covers}). A difference within "
        f"±{found.margin:g} counts as none" + (
            f", and the {100 * (2 * found.level - 1):g} % interval [{found.narrow[0]:+.3f}, "
            f"{found.narrow[1]:+.3f}], which rules on that, lies within it."
            if ruling == "equivalent" else "."))
    numbers = {"ppo": means["ppo"], "grpo": means["grpo"], "sft": means["sft"],
               **_numbers(found), "narrow_low": found.narrow[0], "narrow_high": found.narrow[1],
               "level": found.level, "margin": found.margin,
               "p_seeds": found.p_seeds, "valid": pooled["valid"].min()}
    return {"sentence": sentence, "verdict": ruling, "scope": "methods" if several else "runs",
            "metric": "macro_f1", "simulated": simulated, "incidents": int(pooled[_BESIDE].min()),
            "better": {"better": "ppo", "worse": "grpo"}.get(ruling) if several else None,
            "seeds": {str(seed): {name: float(row[name]) for name in _POOLED}
                      for seed, row in pooled.iterrows()},
            "from_start": {name: _plain(_numbers(move)) for name, move in moves.items()},
            "citations": citations(pooled, moves, cited), **_plain(numbers)}


def citations(pooled: pd.DataFrame, moves: Mapping[str, Difference],
              cited: Mapping[str, Difference]) -> dict:
    """Return how the evidence that PPO and GRPO cite changed from the cold start, in words.

    `moves` maps both to what became of their macro-F1 and `cited`, for one seed, to what became of
    the share of true evidence items they cite. Each counts as changed if its interval excludes 0:
    labels can get better while reasons get worse, and one sentence on labels would hide it.
    """
    means, said, numbers = pooled.mean(), [], {}
    for name in ("ppo", "grpo"):
        found = _over_seeds(pooled[f"{name}_cited"], pooled["sft_cited"], cited[name])
        said.append(f"**{name.upper()}: labels {_changed(moves[name])}, citations "
                    f"{_changed(found)}** (share of the true evidence items cited "
                    f"{means['sft_cited']:.3f} to {means[f'{name}_cited']:.3f}, difference "
                    f"{found.value:+.3f}, {100 * found.level:g} % interval [{found.low:+.3f}, "
                    f"{found.high:+.3f}])")
        numbers[name] = {"changed": _changed(found), **_plain(_numbers(found))}
    return {"sentence": f"From the cold start on: {'; '.join(said)}.", **numbers}


def _changed(found: Difference) -> str:
    return "better" if found.low > 0 else "worse" if found.high < 0 else "not shown to have changed"


def _over_seeds(a: Sequence[float], b: Sequence[float], at_one_seed: Difference) -> Difference:
    """Return a minus b `(S,)` over the seeds; with one seed what its users say."""
    return compare_seeds(a, b, metric=at_one_seed.metric, margin=at_one_seed.margin,
                         level=at_one_seed.level) if len(a) > 1 else at_one_seed


def against_rivals(tables: Mapping[int, pd.DataFrame],
                   over_users: Mapping[tuple[str, str], Difference], *, simulated: bool) -> dict:
    """Return how PPO and GRPO judge beside their rivals in macro-F1: a sentence and its numbers.

    `tables` maps seeds to comparison tables (detectors as index); `over_users` maps (method, rival)
    to the difference on the test users of this study's seed. As in `verdict`, several seeds are
    Student's and one is a bootstrap over users; the p of all differences are Holm's. Nothing is
    concluded from fewer than `LEAST_INCIDENTS` incidents at any seed. Seeds on real data share
    their test users, so there each verdict needs the interval over users as well.
    """
    several = len(tables) > 1
    scores = pd.DataFrame({seed: table["macro_f1"] for seed, table in sorted(tables.items())})
    found = corrected([_over_seeds(scores.loc[a], scores.loc[b], one)
                       for (a, b), one in over_users.items()])
    few = min(int(table[_BESIDE].min()) for table in tables.values()) < LEAST_INCIDENTS
    rulings, rows = {}, []
    for (pair, alone), one in zip(over_users.items(), found, strict=True):
        rulings[pair] = "inconclusive" if few else _confirmed(one, alone, simulated).verdict
        rows.append({"method": pair[0], "rival": pair[1], **_plain(_numbers(one)),
                     "p": plain(float(one.p)), "verdict": rulings[pair]})
    seeds = ", ".join(map(str, sorted(tables)))
    numbers = "; ".join(f"{_NAMES[a]} minus {_NAMES[b]} {one.value:+.3f} [{one.low:+.3f}, "
                        f"{one.high:+.3f}]" for (a, b), one in zip(over_users, found, strict=True))
    shared = "" if simulated else ", which share their test users"
    covers = f"over the seeds {seeds}{shared}" if several else (
        f"over the test users of seed {seeds}")
    sentence = (f"**{_ruled_together(rulings)}** in macro-F1"
                + (f" (fewer than {LEAST_INCIDENTS} incidents are judged)" if few else "")
                + f": {numbers} (95 % intervals {covers}; verdicts by "
                  f"Holm's p for {len(found)}).")
    return {"sentence": sentence, "differences": rows}


def _confirmed(found: Difference, over_users: Difference, simulated: bool) -> Difference:
    """Return a difference whose verdict does not rest on one choice of test users.

    Studies of one real release share their test users, whatever the seed: that others would have
    been drawn is in no interval over seeds, so the one over users has to say the same.
    """
    sure = simulated or found.verdict == over_users.verdict
    return found if sure else replace(found, verdict="inconclusive")


def _ruled_together(rulings: Mapping[tuple[str, str], str]) -> str:
    """Return the rulings in words, PPO and GRPO in one clause where they fared alike."""
    clauses = []
    for rival in dict.fromkeys(rival for _, rival in rulings):
        fared: dict[str, list[str]] = {}
        for (method, other), ruling in rulings.items():
            if other == rival:
                fared.setdefault(ruling, []).append(_NAMES[method])
        clauses += [f"{' and '.join(names)} {_FARED[ruling]} {_NAMES[rival]}"
                    for ruling, names in fared.items()]
    return "; ".join(clauses)


_NAMES = {"ppo": "PPO", "grpo": "GRPO", "sft_all": "SFT on all labels",
          GBOOST_SAME: "gradient boosting on the same windows"}
_FARED = {"better": "judged better than", "worse": "judged worse than",
          "equivalent": "judged as well as", "inconclusive": "could not be told from"}


_POOLED = ("ppo", "grpo", "sft")
_SAID = {
    "methods": {"better": "PPO is better than GRPO", "worse": "GRPO is better than PPO",
                "equivalent": "PPO and GRPO are equivalent", "inconclusive": "Inconclusive"},
    "runs": {"better": "This PPO run judged better than this GRPO run",
             "worse": "This GRPO run judged better than this PPO run",
             "equivalent": "This PPO run and this GRPO run judged equally well",
             "inconclusive": "Inconclusive"}}


def _why_inconclusive(pooled: pd.DataFrame, found: Difference,
                      moves: Mapping[str, Difference]) -> list[str]:
    """Return why nothing is concluded, in words; no reason means that something is."""
    reasons = []
    if not (valid := pooled["valid"].min()) >= LEAST_VALID:  # NaN counts as too few
        reasons.append(f"only {100 * valid:.0f} % of the verdicts of one of them are valid")
    if (incidents := pooled[_BESIDE].min()) < LEAST_INCIDENTS:
        reasons.append(f"fewer than {LEAST_INCIDENTS} incidents are judged ({incidents})")
    undecided = found.verdict not in ("better", "worse")
    if undecided and not any(move.low > 0 or move.high < 0 for move in moves.values()):
        reasons.append("neither is shown to have moved away from the cold start")
    if found.verdict == "inconclusive" and not reasons:
        reasons.append("this study cannot tell "
                       + ("PPO and GRPO" if len(pooled) > 1 else "the two runs") + " apart")
    return reasons


def _numbers(found: Difference) -> dict[str, float]:
    return {"difference": found.value, "low": found.low, "high": found.high}


def _plain(numbers: Mapping[str, float]) -> dict:
    return {name: plain(float(value)) for name, value in numbers.items()}


def equal_compute(costs: Mapping[str, Mapping]) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return what each training took, sft_all's shares of PPO's and GRPO's bill, and a sentence.

    `costs` maps sft, sft_all, ppo and grpo to what their runs took. One rival of two cannot cost as
    much as both: it is compared with their mean, in GPU seconds where there is a GPU, and a
    difference of at most `EQUAL_WITHIN` counts as equal.
    """
    unit = "GPU seconds" if "gpu_seconds" in costs["ppo"] else "processor seconds"
    seconds = "gpu_seconds" if "gpu_seconds" in costs["ppo"] else "cpu_seconds"
    spent = pd.DataFrame(costs).T.reindex(columns=[
        "steps", "completions", "tokens", seconds, "wall_seconds_training"]).astype(float)
    both = spent.loc[["ppo", "grpo"]]
    shares = spent.loc["sft_all"] / pd.concat([both, both.mean().to_frame("their mean").T])
    shares.index = "sft_all / " + shares.index
    to_ppo, to_grpo, to_mean = shares[seconds]
    word = "equal" if abs(to_mean - 1) <= EQUAL_WITHIN else "**not** equal"
    sentence = (
        f"SFT on all labels had {word} compute: {to_mean:.2f} times the mean {unit} of PPO and "
        f"GRPO, {to_ppo:.2f} times PPO's, {to_grpo:.2f} times GRPO's; and "
        f"{shares['tokens'].iloc[-1]:.2f} times their mean number of tokens.")
    return spent, shares[["tokens", seconds]], sentence


def write_verdict(study: Path | str, found: Mapping) -> None:
    """Write verdict.json for the comparison.csv that lies there."""
    study = Path(study)
    write_json(study / _VERDICT, {**found, "table": sha256_of(study / _TABLE)})


def read_verdict(study: Path | str) -> dict:
    """Return verdict.json; `UserError` if it is missing or belongs to another table."""
    return _beside_table(Path(study), _VERDICT)


def _beside_table(study: Path, name: str) -> dict:
    for file in (_TABLE, name):
        if not (study / file).exists():
            raise UserError(f"{study.name}/{file} is missing: notebook 07 writes it. {_AGAIN}")
    try:
        found = json.loads((study / name).read_text(encoding="utf-8"))
        belongs = found["table"] == sha256_of(study / _TABLE)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{study.name}/{name} cannot be read ({type(error).__name__}: {error}). "
                        f"{_AGAIN}") from error
    if not belongs:
        raise UserError(f"{study.name}/{name} belongs to another table than the {_TABLE} beside "
                        f"it. {_AGAIN}")
    return found
