"""Which baseline knows what a verdict is worth? Critic and group against exact advantages.

    python benchmarks/credit_check.py --profile laptop --seed 0 --runs runs [--risk-first]

Reads a finished study (what is missing is trained). PPO's policy writes one group of completions
for each of some dev windows; `draws` continuations of each prefix say what the states around four
tokens of a verdict are worth (`credit.exact_credit`). Against them stand the critic that the run
ended with, the group's mean, the mean of the others, and one number for all. Written are a JSON and
a figure beside it:

- `value_errors`: mean square error of the baseline against V(s), by place;
- `advantage_errors`: the same of the advantage against Q(s, a) - V(s). What the rest of the
  completion adds by chance is in all of them at lambda 1;
- `completions_needed`: advantage errors over that of the critic, averaged over the places: how many
  completions make up for one of the critic's. `seconds_needed` weighs them by what a completion
  cost in each method's training;
- `differences`: leave-one-out's advantage error less the critic's, 95 % interval over windows.

With `--risk-first` a second cold start learns to say the risk before the evidence, and `decided`
says which share of the rewards' variance is settled at each place, in either order. Exact to within
the chance of the draws, whose part is taken off. Refused: equal rewards, and fewer than two
completions with a risk.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ueba_helpers.data.files import write_json
from ueba_helpers.data.seeding import generator
from ueba_helpers.errors import UserError
from ueba_helpers.rl import credit, recipes
from ueba_helpers.rl.advantages import gae, group_relative, leave_one_out, terminal_rewards
from ueba_helpers.rl.policies import load_policy, load_tokenizer
from ueba_helpers.rl.settings import PPOSettings
from ueba_helpers.study import figures
from ueba_helpers.study.probes import user_by_user
from ueba_helpers.study.runs import code_fingerprint, content_hash, provenance
from ueba_helpers.study.stages import Study, open_study, replace_seed

COMPARED = {"critic": "ppo", "group mean": "grpo", "leave-one-out": "grpo"}  # whose seconds count


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--windows", type=int, default=120, help="dev windows, a third per risk")
    parser.add_argument("--draws", type=int, default=32, help="continuations of each prefix")
    parser.add_argument("--risk-first", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/credit_check.json"))
    args = parser.parse_args(arguments)
    try:
        study = open_study(args.profile, args.seed, args.data, args.runs)
        result = check(study, windows=args.windows, draws=args.draws, risk_first=args.risk_first)
    except UserError as error:
        sys.stderr.write(f"credit_check: {error}\n")
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    draw(result).savefig(args.out.with_suffix(".png"), dpi=130, bbox_inches="tight")
    print(json.dumps({name: result[name] for name in (
        "completions_needed", "seconds_needed", "differences")}, indent=2))
    return 0


def check(study: Study, *, windows: int, draws: int, risk_first: bool = False) -> dict:
    """Return what the module says, ready for JSON."""
    settings, run = study.profile.ppo, study.run("ppo")
    known = known_credit(study, study.policy("ppo"), windows=windows, draws=draws)
    critic = recipes.load_trained_critic(run.path, study.start_of("ppo"), study.profile.policy)
    began = time.perf_counter()
    V = credit.values(critic, known.drawn)
    seconds = {**known.seconds, "critic": time.perf_counter() - began}
    baselines, estimates = estimators(known.drawn, V, settings)
    kept = {name: x[known.first] for name, x in estimates.items()}
    errors = {name: credit.advantage_errors(x, known.exact) for name, x in kept.items()}
    needed = {name: float(np.mean(errors[name]) / np.mean(errors["critic"])) for name in COMPARED}
    costs = {method: study.costs(method) for method in set(COMPARED.values())}
    paid = {method: cost["wall_seconds_training"] / cost["completions"]
            for method, cost in costs.items()}
    result = {
        "profile": study.profile.name, "seed": study.seed,
        "made_by": {"settings": content_hash(study.profile.as_dict(), 16),
                    "code": code_fingerprint("data", "task", "rl"),
                    "commit": provenance()["commit"]},
        "windows": len(known.first), "group_size": settings.num_generations, "draws": draws,
        "completions_with_a_risk": int((known.exact.places[:, -1] >= 0).sum()),
        "reward_variance": float(known.drawn.rewards.var()), "seconds": seconds,
        "value_errors": {name: by_place(credit.value_errors(x[known.first], known.exact))
                         for name, x in baselines.items()},
        "advantage_errors": {name: by_place(x) for name, x in errors.items()},
        "completions_needed": needed, "seconds_per_completion": paid,
        "seconds_needed": {name: needed[name] * paid[method] / paid["ppo"]
                           for name, method in COMPARED.items()},
        "differences": differences(kept["leave-one-out"], kept["critic"], known.exact,
                                   seed=study.seed)}
    if risk_first:
        other = known_credit(study, risk_first_policy(study), windows=windows, draws=draws,
                             style="risk_first")
        start = known_credit(study, study.policy("sft"), windows=windows, draws=draws)
        result["decided"] = {"evidence first": decided(start), "risk first": decided(other)}
    return result


def by_place(found: Sequence[float]) -> dict[str, float]:
    return dict(zip(credit.PLACES, found, strict=True))


@dataclass(frozen=True)
class Known:
    """Groups of completions, of each group's `first` the exact credit, and the seconds it took."""

    drawn: credit.Sample
    first: list[int]
    exact: credit.ExactCredit
    seconds: dict[str, float]


def known_credit(study: Study, policy: tuple, *, windows: int, draws: int,
                 style: str = "") -> Known:
    """Draw a group of completions per dev window and the exact credit of each group's first one."""
    sample = study.sample("dev")
    wanted = sample.loc[sample["headline"], "window_id"]
    table = study.windows[study.windows["window_id"].isin(wanted)]
    few = [user_by_user(days, max(1, windows // 3)) for _, days in table.groupby("risk")]
    rows, group = study.rows(pd.concat(few), style=style), study.profile.ppo.num_generations
    settings = study.profile.ppo
    drawing = {"seed": study.seed, "temperature": settings.temperature,
               "max_new_tokens": study.profile.policy.max_completion_tokens,
               "reward": credit.trained_on(settings.rewards)}
    began = time.perf_counter()
    drawn = credit.sample(*policy, rows, group_size=group, **drawing)
    sampled = time.perf_counter()
    if drawn.rewards.var() < 1e-6:
        raise UserError("All completions earn alike: there is no credit to assign. Take a policy "
                        "that has learned to give verdicts (the profile smoke's may not have).")
    first = list(range(0, len(drawn.ids), group))
    exact = credit.exact_credit(*policy, drawn.part(first), draws=draws, **drawing)
    if (exact.places[:, -1] >= 0).sum() < 2:
        raise UserError("Fewer than two completions come as far as a risk: there is no place to "
                        "compare at. Take more windows, or a policy that gives verdicts.")
    return Known(drawn, first, exact, {"sampling": sampled - began,
                                       "continuations": time.perf_counter() - sampled})


def estimators(drawn: credit.Sample, V: torch.Tensor, settings: PPOSettings
               ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return baselines and advantages by name, all `(B, T)`, in reward units."""
    G, R, mask = settings.num_generations, drawn.rewards, drawn.mask
    relative = {"group mean": group_relative(R, G), "leave-one-out": leave_one_out(R, G),
                "one number": R - R.mean()}
    baselines = {"critic": V, **{name: (R - a).unsqueeze(1) * mask
                                 for name, a in relative.items()}}
    ends = terminal_rewards(R, mask)
    estimates = {"critic": gae(ends, V, mask, 1.0, 1.0)[0],
                 **{name: a.unsqueeze(1) * mask for name, a in relative.items()},
                 "critic, lambda .95": gae(ends, V, mask, 1.0, 0.95)[0]}
    return baselines, estimates


def differences(one: torch.Tensor, other: torch.Tensor, exact: credit.ExactCredit, *, seed: int,
                resamples: int = 1000) -> dict[str, float]:
    """Return the difference of two advantages' mean errors, and its interval over windows."""
    def mean(rows) -> float:
        part = credit.ExactCredit(**{name: x[rows] for name, x in vars(exact).items()})
        return float(np.mean(credit.advantage_errors(one[rows], part))
                     - np.mean(credit.advantage_errors(other[rows], part)))

    whole = (exact.places[:, -1] >= 0).nonzero().flatten().numpy()
    rng = generator(seed, "credit check")
    drawn = [mean(torch.as_tensor(rng.choice(whole, len(whole)))) for _ in range(resamples)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"leave-one-out less critic": mean(torch.as_tensor(whole)), "low": float(low),
            "high": float(high)}


def decided(known: Known) -> dict[str, float]:
    """Return the share of the rewards' variance that is settled before each place."""
    whole = known.exact.places[:, -1] >= 0
    before, noise = known.exact.before[whole], known.exact.before_error[whole] ** 2
    total = known.drawn.rewards[known.first][whole].var()
    return by_place(((before.var(0) - noise.mean(0)) / total.clamp(min=1e-12)).tolist())


def risk_first_policy(study: Study) -> tuple:
    """Return a cold start that says the risk first, trained like the study's own, and kept."""
    chosen, out = study.profile, study.path / "risk_first"
    settings, policy = replace_seed(chosen.sft, study.seed), chosen.policy
    if policy.name == "tiny":
        policy = replace(policy, lora_rank=0)
    if not (out / "policy").exists():
        recipes.sft(study.base_policy, out,
                    study.demonstrations("cold", settings, style="risk_first"), settings, policy,
                    seed=study.seed)
        recipes.drop_checkpoints(out)
    return load_policy(out / "policy", replace(policy, lora_rank=0)), load_tokenizer(out / "policy")


def draw(result: Mapping) -> Figure:
    """Return the figure of a result: errors by place, and what is decided where."""
    named = {"value": result["value_errors"], "advantage": result["advantage_errors"]}
    if "decided" in result:
        named["share"] = result["decided"]
    labels = {"value": "Mean square error of V", "advantage": "Mean square error of A",
              "share": "Share of the reward decided"}
    fig, axes = plt.subplots(1, len(named), figsize=(6.4 * len(named), 3.6), layout="constrained")
    for ax, (kind, table) in zip(axes, named.items(), strict=True):
        figures.grouped_bars(pd.DataFrame(table).reindex(credit.PLACES), label=labels[kind], ax=ax)
        ax.legend(frameon=False, fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
        ax.tick_params(axis="x", labelsize=8)
    return fig


if __name__ == "__main__":
    sys.exit(main())
