"""The stages of the study: each makes its files or finds them made.

In: a profile, a seed, a release (or none) and a folder for runs. Out: a `Study`, whose methods
return tables and run folders; whatever is missing is made first, so that a notebook opened alone
does what the whole pipeline would. Data and the answer key go one way: windows, splits, samples,
prompts, runs, predictions. Only `Study.judged(split="test")` opens the test users.

Refused: a split the study does not have, and a release without any insider.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd

from ueba_helpers.data import cert, simulate, splits, windows
from ueba_helpers.data.files import write_json
from ueba_helpers.data.windows import Window
from ueba_helpers.errors import UserError
from ueba_helpers.study import evaluation, pseudonyms
from ueba_helpers.study.config import Profile, check_device
from ueba_helpers.study.config import profile as profile_named
from ueba_helpers.study.probes import user_by_user
from ueba_helpers.study.runs import (
    ResourceMonitor,
    RunFolder,
    code_fingerprint,
    content_hash,
    data_hash,
    study_folder,
    write_parquet,
)
from ueba_helpers.task import baselines, prompts

SPLITS = ("dev", "test")
CLASSICAL = baselines.DETECTORS
GBOOST_SAME = "gradient_boosting_same_windows"  # trained on exactly the windows of PPO and GRPO
POLICIES = ("sft", "sft_all", "ppo", "grpo")

Progress = Callable[[str], None] | None


def prepare_data(chosen: Profile, seed: int, data: str, runs: str, *,
                 progress: Progress = None) -> Path:
    """Simulate a release unless one is given, read it, build windows, splits and samples.

    `data` may also be a store that `ueba ingest` wrote: it is used where it lies, not copied.

    Returns the study's data folder; `samples.json`, written last, says that it is complete. It also
    holds what a reader must know before trusting a result: warnings of the loader and of the
    windows, and leakage audits that failed or had too little to judge. They go to standard error
    too, each on a line.
    """
    say = progress or (lambda message: None)
    home = study_folder(chosen, seed=seed, data=data, runs=runs) / "data"
    settings = {"windows": asdict(chosen.windows), "evaluation": asdict(chosen.evaluation),
                "needed": _windows_needed(chosen), "seed": seed, "max_items": chosen.max_items,
                "code": code_fingerprint("data", "task/baselines.py")}
    if _read(home / "samples.json").get("settings") == json.loads(json.dumps(settings)):
        return home
    release = _release(chosen, seed, data, runs)
    if data:
        cert.check_answers(release)
    else:
        say("simulating a release")
        simulate.simulate(release, seed=seed, history_days=chosen.windows.history_days,
                          **asdict(chosen.simulate))
    say("reading the release")
    ingested = _stored(release, home / "store", chosen.memory_limit)
    say("building windows")
    windows.build(home / "store", home / "windows", memory_limit=chosen.memory_limit,
                  **asdict(chosen.windows))
    users = windows.users_table(windows.read(home / "windows",
                                             columns=["user", "incident", "scenario"]))
    if users["incident"].notna().sum() == 0:
        raise UserError(f"{release}: no insider of the answer key acts in these logs, so nothing "
                        "can be learned or judged. Check the answers folder.")
    # Another seed simulates other people. Of a given release there is one split and one sample to
    # judge: else the test users of one seed would be the training users of the next.
    judged_seed = 0 if data else seed
    assigned = splits.assign(users, seed=judged_seed)
    write_parquet(home / "splits.parquet", assigned)
    train_users = assigned.loc[assigned["split"] == "train", "user"]
    windows.relabel(home / "windows", train_users, memory_limit=chosen.memory_limit)
    table = windows.read(home / "windows").merge(assigned, on="user", validate="many_to_one")
    say("drawing samples")
    counts = _samples(home, chosen, table, list(train_users), seed, judged_seed)
    say("auditing")
    manifest = windows.read_manifest(home / "windows")
    audit = _audit(home, chosen, table, assigned, manifest, release, seed)
    warnings = [*lacking(ingested), *ingested["warnings"], *manifest["warnings"],
                *splits.complaints(audit)]
    sys.stderr.writelines(f"warning: {line}\n" for line in warnings)
    write_json(home / "samples.json", {"settings": settings, "counts": counts,
                                       "release": str(release), "warnings": warnings,
                                       "audits": audit["outcome"].value_counts().to_dict()})
    return home


def _release(chosen: Profile, seed: int, data: str, runs: str) -> Path:
    """Return the folder of the given release, or of the simulated one."""
    return Path(data) if data else Path(runs) / "data" / (
        f"r4.2-{data_hash(chosen, seed=seed, data='')}")


def lacking(manifest: Mapping) -> list[str]:
    """Return the warning that goes before all others: of the logs that the release does not have.

    >>> lacking({"logs": dict.fromkeys(cert.LOGS)})
    []
    """
    missing = [f"{name}.csv" for name in cert.LOGS if name not in manifest["logs"]]
    return [f"THE RELEASE HAS NO {', '.join(missing)}. What happened there counts as not having "
            "happened, for every detector and for the evidence: no figure of this study can be set "
            "beside one of a whole release."] if missing else []


def prepare(profile: str, seed: int, data: str, runs: str) -> Path:
    """Make the data and the untrained policy, which stages running side by side both begin from."""
    study = open_study(profile, seed, data, runs)
    home = study.home
    if study.profile.policy.name == "tiny":
        study.base_policy  # noqa: B018 - made on first use
    return home


def train_cold_start(profile: str, seed: int, data: str, runs: str) -> Path:
    """Train the cold start, from which every later stage goes on; return its run folder."""
    return open_study(profile, seed, data, runs).run("sft").path


def _stored(release: Path, store: Path, memory_limit: str) -> dict:
    """Read a release into `store`, or link a store that is given; return its manifest."""
    if not cert.is_store(release):
        return cert.ingest(release, store, memory_limit=memory_limit)
    manifest = cert.Store(release).manifest
    store.parent.mkdir(parents=True, exist_ok=True)
    store.unlink(missing_ok=True)
    store.symlink_to(release.resolve(), target_is_directory=True)
    return manifest


def _audit(home: Path, chosen: Profile, table: pd.DataFrame, assigned: pd.DataFrame,
           manifest: Mapping, release: Path, seed: int) -> pd.DataFrame:
    """Run the leakage audits, the label permutation with every classical detector; keep them."""
    audit = splits.audit(
        table, assigned, seed=seed, store=home / "store", manifest=manifest,
        items=pd.read_parquet(home / "items.parquet"), max_items=chosen.max_items,
        listing=_listing(release),
        detectors={name: functools.partial(baselines.fit_and_score, detector=name, seed=seed)
                   for name in CLASSICAL})
    write_parquet(home / "audit.parquet", audit)
    return audit


def _listing(release: Path) -> list[str]:
    """Return the accounts in the order of the release's first LDAP month; a store keeps none."""
    if cert.is_store(release):
        return []
    first = min((release / "LDAP").glob("[0-9]*.csv*"), key=lambda path: path.name)
    return pd.read_csv(first, usecols=["user_id"], dtype=str, encoding_errors="replace",
                       on_bad_lines="skip")["user_id"].dropna().tolist()


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _windows_needed(chosen: Profile) -> dict[str, int]:
    rl = chosen.grpo.steps * chosen.grpo.prompts_per_step
    return {"cold": chosen.sft.examples, "all": chosen.sft_all.examples, "rl": rl}


def _samples(home: Path, chosen: Profile, table: pd.DataFrame, train_users: list[str],
             seed: int, judged_seed: int) -> dict:
    """Write which windows are trained on and judged, with their evidence and truth."""
    clear = table[~(table["ignore"] | table["precursor"])]
    needed = _windows_needed(chosen)
    training = {
        "cold": splits.balanced(clear, n=needed["cold"], seed=seed, parts=("cold",)),
        "rl": splits.balanced(clear, n=needed["rl"], seed=seed, parts=("rl",)),
        "all": splits.balanced(clear, n=needed["all"], seed=seed, parts=("cold", "rl")),
    }
    order = pd.concat([pd.DataFrame({"purpose": name, "window_id": rows["window_id"].to_numpy()})
                       for name, rows in training.items()], ignore_index=True)
    write_parquet(home / "training.parquet", order)
    hardness = baselines.hardness_score(table, train_users, seed=judged_seed)
    sizes = {"dev": (chosen.evaluation.dev_per_class, chosen.evaluation.dev_benign),
             "test": (chosen.evaluation.headline_per_class, chosen.evaluation.n_benign)}
    judged = pd.concat([
        splits.evaluation_sample(table, hardness, split=split, headline_per_class=per_class,
                                 n_benign=benign, seed=judged_seed,
                                 base_rate=chosen.evaluation.base_rate)
        for split, (per_class, benign) in sizes.items()], ignore_index=True)
    write_parquet(home / "judged.parquet", judged)
    wanted = table[table["window_id"].isin({*order["window_id"], *judged["window_id"]})]
    items = windows.evidence(home / "store", wanted, max_items=chosen.max_items)
    write_parquet(home / "items.parquet", items)
    write_parquet(home / "truth.parquet", windows.truth_table(wanted, items))
    return {"windows": len(table), **{k: len(v) for k, v in training.items()},
            "judged": judged["split"].value_counts().to_dict()}


@dataclass(frozen=True)
class Study:
    """One study on disk: profile, seed and data, and everything made from them."""

    profile: Profile
    seed: int
    data: str
    runs: str

    @functools.cached_property
    def path(self) -> Path:
        """The folder of this study."""
        return study_folder(self.profile, seed=self.seed, data=self.data, runs=self.runs)

    @functools.cached_property
    def home(self) -> Path:
        """The folder of the prepared data."""
        return prepare_data(self.profile, self.seed, self.data, self.runs)

    @functools.cached_property
    def _prepared(self) -> str:
        """A hash of what the windows and samples were made with."""
        return content_hash(_read(self.home / "samples.json")["settings"])

    @functools.cached_property
    def store(self) -> cert.Store:
        """The event store, for questions about raw events."""
        return cert.Store(self.home / "store")

    @functools.cached_property
    def windows(self) -> pd.DataFrame:
        """Every account-day with its features, labels and split."""
        assigned = pd.read_parquet(self.home / "splits.parquet")
        return windows.read(self.home / "windows").merge(assigned, on="user")

    @functools.cached_property
    def items(self) -> pd.DataFrame:
        """The evidence items of the windows that are trained on or judged."""
        return pd.read_parquet(self.home / "items.parquet")

    @functools.cached_property
    def truth(self) -> pd.DataFrame:
        """The answers to those windows; evaluation's side of the table."""
        return pd.read_parquet(self.home / "truth.parquet")

    @functools.cached_property
    def audit(self) -> pd.DataFrame:
        """The leakage audits of this data."""
        return pd.read_parquet(self.home / "audit.parquet")

    def reasons(self) -> pd.Series:
        """Return why innocent days deviate, by window_id.

        A simulated release tells the cause (name "innocent cause"); of a real one only the role of
        the account is known (name "role").
        """
        known = evaluation.innocent_causes(_read(self.home / "samples.json")["release"])
        return self.windows.set_index("window_id")["role"] if known is None else known

    def sample(self, split: str) -> pd.DataFrame:
        """Return the windows of a split that every detector is judged on, with their weights."""
        _check_split(split)
        table = pd.read_parquet(self.home / "judged.parquet")
        return table[table["split"] == split].reset_index(drop=True)

    def training_windows(self, purpose: str) -> pd.DataFrame:
        """Return the windows of a training set ("cold", "rl" or "all"), in its order."""
        order = pd.read_parquet(self.home / "training.parquet")
        order = order.loc[order["purpose"] == purpose, "window_id"]
        return self.windows.set_index("window_id", drop=False).loc[order].reset_index(drop=True)

    # -- prompts ------------------------------------------------------------------------------

    @functools.cached_property
    def pseudonym_key(self) -> str:
        """The key of this study's account codes: a secret where the accounts are real."""
        return pseudonyms.study_key(self.home, simulated=not self.data)

    @functools.cached_property
    def prompt_options(self) -> dict:
        """What the prompts show and ask for, as options of `task.prompts`."""
        chosen = self.profile
        return {"max_items": chosen.max_items, "style": chosen.style,
                "confidence": chosen.confidence}

    def _loaded(self, table: pd.DataFrame) -> list[Window]:
        unique = table.drop_duplicates("window_id")
        items = self.items[self.items["window_id"].isin(unique["window_id"])]
        by_id = {window.window_id: window for window in windows.load(unique, items)}
        return [by_id[name] for name in table["window_id"]]

    def rows(self, table: pd.DataFrame, *, style: str = "") -> list[dict]:
        """Return the prompt rows of windows, cut to the policy's token budget, in their order.

        `style` is one of `verdicts.STYLES`, what a verdict says first; the profile's if empty.
        """
        from ueba_helpers.rl.policies import load_tokenizer

        tokenizer = load_tokenizer(self.base_policy)
        unique = table.drop_duplicates("window_id")

        def count_tokens(messages: list[dict]) -> int:
            return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                                     tokenize=True, return_dict=True)["input_ids"])

        made = prompts.prompt_dataset(
            self._loaded(unique), count_tokens=count_tokens, pseudonym_key=self.pseudonym_key,
            budget=self.profile.policy.max_prompt_tokens,
            **self.prompt_options | ({"style": style} if style else {}))
        by_id = dict(zip(unique["window_id"], made, strict=True))
        return [by_id[name] for name in table["window_id"]]

    def judged_rows(self, split: str) -> list[dict]:
        """Return the prompt rows of a split's sample."""
        return self.rows(self._sampled(split))

    def _sampled(self, split: str) -> pd.DataFrame:
        wanted = self.sample(split)["window_id"]
        return self.windows.set_index("window_id", drop=False).loc[wanted].reset_index(drop=True)

    def demonstrations(self, purpose: str, settings, *, style: str = "") -> list[dict]:
        """Return prompt rows with a `completion`: the reference verdict under the said label.

        Where confidence is asked for, all state the share of the said labels that are right.
        `style` is that of `rows`.
        """
        from ueba_helpers.rl.recipes import demonstrated_labels

        table = self.training_windows(purpose)
        said = demonstrated_labels(table["risk"], settings, seed=self.seed)
        rows = self.rows(table, style=style)
        shown = [prompts.keep_items(window, len(row["evidence_ids"]))
                 for window, row in zip(self._loaded(table), rows, strict=True)]
        right = sum(a == b for a, b in zip(said, table["risk"], strict=True)) / len(said)
        options = {**self.prompt_options, "pseudonym_key": self.pseudonym_key,
                   "confidence": round(right, 2) if self.profile.confidence else None,
                   **({"style": style} if style else {})}
        return [{**row, "completion": prompts.target_verdict(window, risk=risk, **options)}
                for row, window, risk in zip(rows, shown, said, strict=True)]

    # -- policies -----------------------------------------------------------------------------

    @functools.cached_property
    def base_policy(self) -> str:
        """The untrained policy: a folder made on the spot, a local checkpoint or a hub name."""
        settings = self.profile.policy
        if settings.name != "tiny":
            return settings.name
        from ueba_helpers.rl.policies import make_tiny

        texts = self._tokenizer_texts()
        name = content_hash({"policy": asdict(settings), "texts": texts, "seed": self.seed})
        return str(make_tiny(self.path / "policies" / f"tiny-{name}", texts, settings,
                             seed=self.seed))

    def _tokenizer_texts(self) -> list[str]:
        """Training users' prompts and verdicts; no other text shapes the tokenizer."""
        loaded = self._loaded(self.training_windows("cold").drop_duplicates("window_id"))
        options = {**self.prompt_options, "pseudonym_key": self.pseudonym_key}
        sure = {"confidence": 0.5 if self.profile.confidence else None}
        return [text for window in loaded for text in (
            *(message["content"] for message in prompts.window_messages(window, **options)),
            prompts.target_verdict(window, **options | sure))]

    def run(self, method: str) -> RunFolder:
        """Return the complete run of "sft", "sft_all", "ppo" or "grpo"; train it if it is not.

        Each ends by judging the dev sample: predictions.parquet makes the run complete.
        """
        if method not in POLICIES:
            raise UserError(f"Unknown method {method!r}. Legal methods: {', '.join(POLICIES)}.")
        return self._completed(method, replace_seed(getattr(self.profile, method), self.seed))

    def short_run(self, method: str, **changes) -> RunFolder:
        """Return the complete run of PPO or GRPO with changed settings, such as a broken reward.

        For exhibits: it begins from the cold start, is watched more closely and judged on a slice
        of the dev sample only.
        """
        return self._completed(method, replace_seed(
            replace(getattr(self.profile, method), **changes), self.seed), exhibit=True)

    def _completed(self, method: str, settings, *, exhibit: bool = False) -> RunFolder:
        check_device(self.profile)
        configuration = {"settings": asdict(settings), "policy": asdict(self.profile.policy),
                         **self.prompt_options, "samples": self._prepared,
                         "base": Path(self.base_policy).name}
        if method != "sft":
            configuration["start"] = self.run("sft").name
        if self.data:
            configuration["pseudonyms"] = pseudonyms.fingerprint(self.pseudonym_key)
        name = f"exhibit_{method}" if exhibit else method
        folder = RunFolder.open(self.path, name, configuration=configuration, seed=self.seed,
                                data=data_hash(self.profile, seed=self.seed, data=self.data),
                                simulated=not self.data)
        if not folder.complete:
            self._train(method, folder, settings, exhibit)
        return folder

    def start_of(self, method: str) -> str:
        """Return the checkpoint a method's training begins from."""
        return self.base_policy if method == "sft" else str(self.run("sft").path / "policy")

    def _train(self, method: str, folder: RunFolder, settings, exhibit: bool) -> None:
        from ueba_helpers.rl import recipes
        from ueba_helpers.rl.checkpoints import latest_checkpoint

        start = self.start_of(method)
        checkpoint = latest_checkpoint(folder.checkpoints)
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        watched = self._watched(20 if exhibit else 30) if method in recipes.METHODS else []
        with ResourceMonitor() as monitor:
            if method in recipes.METHODS:
                earlier = [step]  # rows behind the resumed step are dropped, once
                trained = recipes.METHODS[method](
                    start, folder.path, self.rows(self.training_windows("rl")), settings,
                    self.profile.policy, held_out=watched,
                    evaluate_every=max(1, settings.steps // (4 if exhibit else 6)),
                    on_completions=lambda rows: folder.add_completions(
                        rows, resumed_step=earlier.pop() if earlier else None))
            else:
                purpose = "cold" if method == "sft" else "all"
                policy = self.profile.policy
                if method == "sft" and policy.name == "tiny":
                    # From random weights: all of them learn. Adapters come with the next stage.
                    policy = replace(policy, lora_rank=0)
                trained = recipes.sft(start, folder.path, self.demonstrations(purpose, settings),
                                      settings, policy, seed=self.seed,
                                      on_step=folder.log().write)
        folder.add_resources({**monitor.result, **trained.costs})
        rows = watched if exhibit else self.judged_rows("dev")
        folder.finish(self._predicted(method, folder, rows, "dev"))
        recipes.drop_checkpoints(folder.path)

    def _watched(self, per_class: int) -> list[dict]:
        """A slice of the dev sample's headline windows, the same for every method."""
        sample = self.sample("dev")
        wanted = sample.loc[sample["headline"], "window_id"]
        table = self.windows[self.windows["window_id"].isin(wanted)].sort_values("window_id")
        # The first rows alone would be a handful of insiders'.
        few = [user_by_user(days, per_class) for _, days in table.groupby("risk")]
        return self.rows(pd.concat(few, ignore_index=True))

    def policy(self, method: str):
        """Return a trained policy and its tokenizer ("base" is the untrained one)."""
        from ueba_helpers.rl.policies import load_policy, load_tokenizer

        if method == "base":
            settings = replace(self.profile.policy, lora_rank=0)
            return (load_policy(self.base_policy, settings), load_tokenizer(self.base_policy))
        return self._trained_policy(method, self.run(method))

    def _trained_policy(self, method: str, folder: RunFolder):
        from ueba_helpers.rl import recipes
        from ueba_helpers.rl.policies import load_tokenizer

        path = folder.adapter if folder.adapter.exists() else folder.path / "policy"
        model = recipes.load_trained(path, self.start_of(method), self.profile.policy)
        return model, load_tokenizer(path)

    def _predicted(self, method: str, folder: RunFolder, rows: list[dict], split: str
                   ) -> pd.DataFrame:
        from ueba_helpers.rl.rollouts import predict

        model, tokenizer = self._trained_policy(method, folder)
        return predict(model, tokenizer, rows, detector=method,
                       seed=self.seed, split=split,
                       max_new_tokens=self.profile.policy.max_completion_tokens,
                       batch_size=self.profile.evaluation.batch_size)

    # -- predictions --------------------------------------------------------------------------

    def judged(self, detector: str, *, split: str = "dev") -> pd.DataFrame:
        """Return a detector's predictions on a split's sample; make them if they are missing.

        "test" is for notebook 07: everything before it reports dev.
        """
        _check_split(split)
        if detector in POLICIES:
            folder = self.run(detector)
            if split == "dev":
                return folder.predictions()
            path = folder.path / "test" / "predictions.parquet"
            if not path.exists():
                write_parquet(path, self._predicted(detector, folder, self.judged_rows(split),
                                                    split))
            return pd.read_parquet(path)
        return self._judged_baseline(detector, split)

    def baseline(self, detector: str) -> baselines.Baseline:
        """Return a classical detector, fitted on training users, its thresholds chosen on dev."""
        if detector not in (*CLASSICAL, GBOOST_SAME):
            raise UserError(f"Unknown detector {detector!r}. Legal detectors: "
                            f"{', '.join((*CLASSICAL, GBOOST_SAME, *POLICIES))}.")
        if detector == GBOOST_SAME:
            train = pd.concat([self.training_windows("cold"), self.training_windows("rl")])
            model = baselines.fit(train, detector="gradient_boosting", seed=self.seed)
        else:
            table = self.windows
            clear = table[(table["split"] == "train") & ~(table["ignore"] | table["precursor"])]
            model = baselines.fit(clear, detector=detector, seed=self.seed)
        dev = self.sample("dev")
        headline = dev.loc[dev["headline"], "window_id"]
        return baselines.fit_thresholds(
            model, self.windows[self.windows["window_id"].isin(headline)])

    def _judged_baseline(self, detector: str, split: str) -> pd.DataFrame:
        path = self.path / "baselines" / f"{detector}-{split}.parquet"
        marker = path.with_suffix(".json")
        current = {"judged": content_hash(self.sample(split).to_csv()),
                   "prepared": self._prepared, "code": code_fingerprint("data", "task")}
        if not path.exists() or _read(marker) != current:
            started = time.perf_counter()
            table = baselines.predict(self.baseline(detector), self._sampled(split), split=split)
            table["detector"] = detector
            write_parquet(path, table)
            write_json(marker, current)
            write_json(path.with_name(f"{detector}-{split}-seconds.json"),
                       {"wall_seconds": time.perf_counter() - started})
        return pd.read_parquet(path)

    def evaluate(self, detectors: Sequence[str], *, split: str = "dev") -> pd.DataFrame:
        """Return the metrics of detectors on a split, with intervals over users."""
        judged = pd.concat([self.judged(name, split=split) for name in detectors],
                           ignore_index=True)
        settings = self.profile.evaluation
        return evaluation.evaluate(judged, self.truth, self.sample(split), seed=self.seed,
                                   budgets=settings.alert_budgets, resamples=settings.bootstrap)

    def best_possible(self, *, split: str = "dev") -> pd.DataFrame | None:
        """Return what the best rule says about a split's sample; None where no truth is known."""
        _check_split(split)
        release = _release(self.profile, self.seed, self.data, self.runs)
        if not (release / "truth").is_dir():
            return None
        return evaluation.best_possible(release, self.truth, self.sample(split), split=split)

    def costs(self, detector: str) -> Mapping[str, float]:
        """Return what a detector cost: seconds, peak memory in bytes, tokens, completions."""
        if detector in POLICIES:
            return self.run(detector).resources()
        return _read(self.path / "baselines" / f"{detector}-dev-seconds.json")


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"Unknown split {split!r}. Legal splits: {', '.join(SPLITS)}.")


def replace_seed(settings, seed: int):
    """Return RL settings under the study's seed; SFT settings, which have none, as they are."""
    return replace(settings, seed=seed) if "seed" in vars(settings) else settings


def open_study(profile: str, seed: int = 0, data: str = "", runs: str = "../runs") -> Study:
    """Return the study of a notebook's parameters (PROFILE, SEED, DATA, RUNS)."""
    return Study(profile_named(profile), int(seed), str(Path(data).resolve()) if data else "",
                 str(Path(runs).resolve()))
