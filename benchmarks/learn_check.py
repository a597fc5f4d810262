"""Is learning real? SFT start, PPO and GRPO over six seeds, with intervals over seeds.

    python benchmarks/learn_check.py --profile laptop --seeds 14 15 16 17 18 19 --runs runs

Each seed is a study of its own: another simulated organisation, another split, other training
randomness. Judged on the dev sample of held-out users (the test users stay closed). Seeds 0 to 13
are left out by default: settings were chosen or tried on their organisations. Asked for:
every policy gives at least 0.97 valid verdicts; PPO and GRPO each gain at least 0.05 macro-F1 over
the SFT start; macro-F1 and the mean reward of valid verdicts both rise, with 95 % Student intervals
over seeds above zero. Exits 1 where one of these does not hold. Complete runs are reused.
The result names the settings and the code it was measured with.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import f1_score

from ueba_helpers.data.files import write_json
from ueba_helpers.errors import UserError
from ueba_helpers.study.config import check_device, profile
from ueba_helpers.study.evaluation import seed_interval
from ueba_helpers.study.runs import code_fingerprint, content_hash, provenance
from ueba_helpers.study.stages import Study, open_study
from ueba_helpers.task.rewards import ueba_reward
from ueba_helpers.task.verdicts import RISKS

LEAST_VALID, LEAST_GAIN = 0.97, 0.05
COMMITTED = "benchmarks/results/learn_check.json"


def judged(study: Study, method: str) -> dict:
    """Return macro-F1, valid share, reward among valid verdicts and recalls on the headline."""
    sample = study.sample("dev")
    wanted = set(sample.loc[sample["headline"], "window_id"])
    table = study.judged(method)
    rows = {row["window_id"]: row for row in study.judged_rows("dev")}
    table = table[table["window_id"].isin(wanted)]
    columns = pd.DataFrame([rows[name] for name in table["window_id"]])
    rewards = np.array(ueba_reward(list(table["completion"]), **{
        name: columns[name].tolist() for name in columns if name != "prompt"}))
    valid = table["valid"].to_numpy(bool)
    return {"macro_f1": float(f1_score(table["label"], table["risk"], labels=list(RISKS),
                                       average="macro", zero_division=0)),
            "reward": float(rewards.mean()),
            "valid": float(valid.mean()), "windows": len(table),
            "reward_of_valid": float(rewards[valid].mean()) if valid.any() else float("nan"),
            **{f"recall_{risk}": float((table.loc[table["label"] == risk, "risk"] == risk).mean())
               for risk in RISKS}}


def default_out(profile_name: str, runs: str) -> Path:
    """Return where the result goes: the committed file is of the profile laptop alone."""
    return Path(COMMITTED) if profile_name == "laptop" else (
        Path(runs) / f"learn_check-{profile_name}.json")


def main() -> int:
    try:
        return _check()
    except UserError as error:
        sys.stderr.write(f"learn_check: {error}\n")
        return 2


def _check() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(14, 20)))
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--out", help=f"default: {COMMITTED} for the profile laptop, "
                        "<runs>/learn_check-<profile>.json for another")
    args = parser.parse_args()
    if len(set(args.seeds)) < 2:
        parser.error("an interval over seeds needs at least two different ones")
    chosen = profile(args.profile)
    check_device(chosen)
    per_seed = {}
    for seed in args.seeds:
        study = open_study(args.profile, seed, "", args.runs)
        per_seed[seed] = {}
        for method in ("sft", "grpo", "ppo"):
            per_seed[seed][method] = {**judged(study, method),
                                      "seconds": study.costs(method)["wall_seconds_training"]}
            print(seed, method, {k: round(v, 3) for k, v in per_seed[seed][method].items()},
                  flush=True)
    made_by = {"settings": content_hash(chosen.as_dict(), 16),
               "code": code_fingerprint("data", "task", "rl"), "commit": provenance()["commit"]}
    result = {"profile": args.profile, "made_by": made_by, "seeds": args.seeds, "runs": per_seed,
              "gains": {}}
    holds = {f"{method} valid": all(runs[method]["valid"] >= LEAST_VALID
                                    for runs in per_seed.values())
             for method in ("sft", "grpo", "ppo")}
    for method in ("grpo", "ppo"):
        for metric in ("macro_f1", "reward_of_valid", "reward"):
            gains = [runs[method][metric] - runs["sft"][metric] for runs in per_seed.values()]
            mean, low, high = seed_interval(gains)
            result["gains"][f"{method} {metric}"] = {
                "mean": mean, "low": low, "high": high, "by_seed": gains}
            holds[f"{method} {metric} above zero"] = bool(low > 0)
            if metric == "macro_f1":
                holds[f"{method} gains 0.05"] = mean >= LEAST_GAIN
    result["holds"] = holds
    write_json(args.out or default_out(chosen.name, args.runs), json.loads(json.dumps(result)))
    print(json.dumps({"gains": result["gains"], "holds": holds}, indent=2))
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
