"""Measure simulating, ingesting and building windows as the data grows, each in a fresh process.

In: options (see --help). Out: a JSON file with the machine's facts and every measurement, a plot
beside it, and markdown tables on the screen. A measurement that fails, or windows whose totals
differ from those of the pandas way, are named there and in the JSON, and the exit status is 1.
Refuses, with exit status 2: too little free space, sizes the simulator cannot make.

Scale 16 is the size of CERT r4.2: 1,000 users and 501 days, 32.8 million rows. Users and days both
grow with the square root of the scale, so that a cost quadratic in either would show. Beside
`ingest` and `windows` stands what people write first, on the same files: read every log in chunks
with pandas, parse the dates, count per user and day, merge. It exists in two sizes: row counts
only; and the behaviour columns of `PANDAS_COLUMNS`. Both check nothing of a row, keep no event ids,
and have no past, no labels and no store: they do less than ingest and windows.

A measurement is wall and CPU seconds around the call (imports excluded), the peak resident memory
of the process and its children (imports included), on the first `--threads` cores. The files'
pages are dropped from the page cache before each measurement on Linux (unless --warm).
"""

import argparse
import json
import math
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

HERE = Path(__file__).parent
FULL_SCALE, FULL_USERS, FULL_DAYS, FULL_INSIDERS = 16, 1000, 501, (30, 30, 10)
ROWS_PER_ACCOUNT_DAY = 66
BYTES_PER_ROW = 250  # release, store and what ingest keeps meanwhile
LOGS = ("logon", "device", "file", "email", "http")
SIMULATE, INGEST, WINDOWS = "simulate", "ingest", "windows"
COUNTS, DAY_FEATURES = "pandas chunks, counts", "pandas chunks, day features"
SUBJECTS = (SIMULATE, INGEST, WINDOWS, COUNTS, DAY_FEATURES)
PAIR = "ingest + windows"
PANDAS_COLUMNS = (
    "n_logon", "n_logoff", "n_after_hours_logon", "n_pcs", "n_device", "n_device_after_hours",
    "n_file", "n_email", "n_email_external", "n_email_competitor", "email_size", "attachments",
    "n_http", "n_http_after_hours", "n_http_job", "n_http_leak", "n_http_hack", "n_http_cloud",
)
GB = 10**9


# --- what runs in the fresh process ---------------------------------------------------------------


def simulate(work: dict, folder: Path) -> dict:
    from ueba_helpers.data import simulate as simulator

    def run():
        return simulator.simulate(folder / "release", users=work["users"], days=work["days"],
                                  insiders=work["insiders"], seed=work["seed"])

    measured, summary = timed(run)
    return {**measured, "rows": sum(summary["rows"].values()),
            "bytes": size_of(folder / "release")}


def ingest(work: dict, folder: Path) -> dict:
    from ueba_helpers.data import cert

    measured, manifest = timed(lambda: cert.ingest(
        folder / "release", folder / "store", memory_limit=work["memory_limit"],
        threads=work["threads"]))
    return {**measured, "rows": sum(part["read"] for part in manifest["logs"].values()),
            "quarantined": manifest["rows"]["quarantined"], "bytes": size_of(folder / "store")}


def windows(work: dict, folder: Path) -> dict:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from ueba_helpers.data import windows as builder

    measured, out = timed(lambda: builder.build(
        folder / "store", folder / "windows", memory_limit=work["memory_limit"],
        threads=work["threads"]))
    table = pq.read_table(out / "windows.parquet", columns=list(PANDAS_COLUMNS))
    return {**measured, "account_days": table.num_rows, "bytes": size_of(out),
            "totals": {name: int(pc.sum(table[name]).as_py()) for name in PANDAS_COLUMNS}}


def pandas_way(work: dict, folder: Path) -> dict:
    """Read each log in chunks, count per user and day, merge chunks, then merge logs."""
    import pandas as pd

    from ueba_helpers.data import cert

    features = work["subject"] == DAY_FEATURES
    uses = {"logon": ["activity"], "device": ["activity"], "http": ["url"],
            "email": ["to", "cc", "bcc", "size", "attachments"]} if features else {}
    rivals = "|".join(domain.replace(".", r"\.") for domain in cert.COMPETITOR_DOMAINS)
    host_category: dict[str, str | None] = {}

    def category_of(hosts):
        for host in hosts.unique():
            if host not in host_category:
                host_category[host] = cert.domain_category(host)
        return hosts.map(host_category)

    def columns_of(log: str, chunk, after):
        if not features:
            return {f"n_{log}": 1}
        if log == "logon":
            on = chunk["activity"] == "Logon"
            return {"n_logon": on, "n_logoff": ~on, "n_after_hours_logon": on & after}
        if log == "device":
            on = chunk["activity"] == "Connect"
            return {"n_device": on, "n_device_after_hours": on & after}
        if log == "file":
            return {"n_file": 1}
        if log == "email":
            listed = (chunk["to"] + ";" + chunk["cc"] + ";" + chunk["bcc"]).str.lower()
            inside = listed.str.count(rf"@{cert.ORGANISATION_DOMAIN}(?:;|$)".replace(".", r"\."))
            return {"n_email": 1, "n_email_external": listed.str.count("@") > inside,
                    "n_email_competitor": listed.str.contains(rf"@(?:{rivals})(?:;|$)"),
                    "email_size": chunk["size"], "attachments": chunk["attachments"]}
        url = chunk["url"].str.lower()
        category = category_of(url.str.split("/", n=3).str[2].str.removeprefix("www."))
        slug = url.str.contains("/wbouhagvat", regex=False)
        told = category.isin(["leak", "hack"])
        return {"n_http": 1, "n_http_after_hours": after,
                "n_http_job": ((category == "job") | slug) & ~told,
                "n_http_leak": category == "leak", "n_http_hack": category == "hack",
                "n_http_cloud": (category == "cloud") & ~slug}

    def run():
        merged, machines, rows = [], [], 0
        for log in LOGS:
            parts = []
            pcs = ["pc"] if features and log in ("logon", "device") else []
            for chunk in pd.read_csv(
                    folder / "release" / f"{log}.csv", chunksize=500_000, keep_default_na=False,
                    usecols=["date", "user", *pcs, *uses.get(log, ())]):
                date = pd.to_datetime(chunk["date"], format="%m/%d/%Y %H:%M:%S")
                after = (date.dt.hour < 7) | (date.dt.hour >= 19)
                table = pd.DataFrame({"user": chunk["user"], "day": date.dt.normalize()})
                if pcs:
                    machines.append(table.assign(pc=chunk["pc"]).drop_duplicates())
                table = table.assign(**columns_of(log, chunk, after))
                parts.append(table.groupby(["user", "day"]).sum())
                rows += len(chunk)
            merged.append(pd.concat(parts).groupby(level=["user", "day"]).sum())
        if machines:
            distinct = pd.concat(machines).drop_duplicates()
            merged.append(distinct.groupby(["user", "day"]).size().to_frame("n_pcs"))
        return pd.concat(merged, axis=1).fillna(0).astype("int64").sort_index(), rows

    measured, (days, rows) = timed(run)
    totals = {name: int(total) for name, total in days.sum().items()}
    return {**measured, "rows": rows, "account_days": len(days), "totals": totals,
            "pandas": pd.__version__}


def timed(run) -> tuple[dict, object]:
    """Return wall and CPU seconds of a call (its child processes included), and its result."""
    def cpu():
        uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(use.ru_utime + use.ru_stime for use in uses)

    began, cpu_began = time.perf_counter(), cpu()
    result = run()
    return {"seconds": time.perf_counter() - began, "cpu_seconds": cpu() - cpu_began}, result


def own_peak_bytes() -> int:
    """Return the peak resident memory of this process since it began its program."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would also count the parent at the moment of the fork
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def drop_pages(folder: Path) -> None:
    """Ask the system to forget the cached pages of all files in a folder (Linux)."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(work: dict) -> None:
    """Do one measurement in this process and print it as one JSON line."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:work["threads"]])
    run = {SIMULATE: simulate, INGEST: ingest, WINDOWS: windows}.get(work["subject"], pandas_way)
    result = run(work, Path(work["folder"]))
    print(json.dumps({**result, "peak_bytes": own_peak_bytes()}), flush=True)


# --- what starts the processes --------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scales", nargs="+", type=float, default=[1, 4, 16], metavar="N",
                        help="sizes in sixteenths of r4.2 (default: 1 4 16)")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS),
                        metavar="NAME", help=f"of: {'; '.join(SUBJECTS)}")
    parser.add_argument("--rounds", type=int, default=1,
                        help="processes per measurement, the subjects taking turns (simulate: one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="threads and cores (default: 2)")
    parser.add_argument("--memory-limit", default="1GB", help="DuckDB's (default: 1GB)")
    parser.add_argument("--warm", action="store_true",
                        help="leave the files in the page cache between measurements")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "bench_data",
                        help="folder for the data, removed after each scale "
                             "(default: runs/bench_data; about 8 GB at scale 16)")
    parser.add_argument("--time-limit", type=float,
                        help="begin no further measurement after so many seconds")
    parser.add_argument("--resume", action="store_true",
                        help="keep what the JSON file already holds")
    parser.add_argument("--out", type=Path, help="JSON file (default: under benchmarks/results)")
    parser.add_argument("--quick", action="store_true",
                        help="100 users and 40 days only, to see that all works")
    args = parser.parse_args()
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    args.work = args.work.resolve()
    args.sizes = {"quick": (100, 40)} if args.quick else {
        f"{scale:g}": (round(FULL_USERS * side), round(FULL_DAYS * side))
        for scale in sorted(args.scales) if (side := math.sqrt(max(scale, 0) / FULL_SCALE)) >= 0}
    for scale, (users, days) in args.sizes.items():
        if not (60 <= users <= 9000 and 40 <= days <= 1500):
            parser.error(f"--scales {scale} means {users} users and {days} days; "
                         "give scales from 0.11 to 140")
    return args


class Failed(Exception):
    """A measurement's process ended with an error; the message is its last line."""


def child(work: dict, folder: Path) -> dict:
    """Run a measurement in a process of its own and return its JSON line and its peak memory."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(work["threads"]), "PYTHONHASHSEED": "0"}
    command = [sys.executable, __file__, "--measure", json.dumps({**work, "folder": str(folder)})]
    peak = 0
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors, env=environment)
        try:
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                peak = max(peak, tree_bytes(watched))
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        errors.seek(0)
        if process.returncode:
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise Failed(f"{last} (exit status {process.returncode})".replace(str(folder), "..."))
        result = json.loads(said.read().strip().splitlines()[-1])
    return {**result, "peak_bytes": max(peak, result["peak_bytes"])}


def tree_bytes(process: psutil.Process) -> int:
    """Return the resident memory of a process and everything it started."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def plan(args: argparse.Namespace, scale: str) -> list[dict]:
    """Return the workloads of one scale in order; ingest and windows come before pandas."""
    users, days = args.sizes[scale]
    insiders = [max(1, round(n * users / FULL_USERS)) for n in FULL_INSIDERS]
    return [{
        "subject": subject, "scale": scale, "users": users, "days": days, "insiders": insiders,
        "seed": args.seed, "threads": args.threads, "memory_limit": args.memory_limit,
        "cold": sys.platform == "linux" and not args.warm, "round": number,
    } for number in range(args.rounds) for subject in SUBJECTS
        if subject in args.subjects and (subject != SIMULATE or number == 0)]


def same_work(measurement: dict, work: dict) -> bool:
    return all(measurement.get(name) == value for name, value in work.items())


def rows_of(measurements: list[dict], scale: str) -> int:
    """Return the rows of a scale's release as some measurement counted them, else 0."""
    return max((m.get("rows", 0) for m in measurements if m["scale"] == scale), default=0)


def summary(measurements: list[dict]) -> list[dict]:
    """Return a row per scale and subject: medians over rounds, growth against the smallest."""
    cells: dict[tuple[str, str], list[dict]] = {}
    for one in measurements:
        cells.setdefault((one["scale"], one["subject"]), []).append(one)
    for scale in dict.fromkeys(scale for scale, _ in cells):
        parts = [cells.get((scale, name), []) for name in (INGEST, WINDOWS)]
        cells[scale, PAIR] = [{
            **second, "peak_bytes": max(first["peak_bytes"], second["peak_bytes"]),
            "bytes": first["bytes"] + second["bytes"],
            "load": max(first["load"], second["load"]),
            **{name: first[name] + second[name] for name in ("seconds", "cpu_seconds")},
        } for first in parts[0] for second in parts[1] if first["round"] == second["round"]]
    rows = []
    for (scale, subject), rounds in cells.items():
        if not rounds:
            continue
        seconds = [one["seconds"] for one in rounds]
        n = rows_of(measurements, scale)
        rows.append({
            "scale": scale, "users": rounds[0]["users"], "days": rounds[0]["days"],
            "subject": subject, "rows": n, "rounds": len(rounds),
            "seconds": statistics.median(seconds), "low_s": min(seconds), "high_s": max(seconds),
            "cpu_s": statistics.median(one["cpu_seconds"] for one in rounds),
            "peak_bytes": max(one["peak_bytes"] for one in rounds),
            "rows_per_s": n / statistics.median(seconds),
            "bytes": rounds[0].get("bytes"), "account_days": rounds[0].get("account_days"),
            "load": max(one["load"] for one in rounds)})
    order = {name: place for place, name in enumerate((*SUBJECTS[:3], PAIR, *SUBJECTS[3:]))}
    rows.sort(key=lambda row: (row["rows"], order[row["subject"]]))
    for row in rows:
        pair = find(rows, row["scale"], PAIR)
        least = next(r for r in rows if r["subject"] == row["subject"])
        for name, of in (("times_slower_than_ours", "seconds"), ("times_our_cpu", "cpu_s")):
            compared = pair is not None and row["subject"] in (COUNTS, DAY_FEATURES)
            row[name] = row[of] / pair[of] if compared else None
        # 1 means linear: seconds grow as rows to this power
        row["growth_power"] = None if least["rows"] in (0, row["rows"]) else (
            math.log(row["seconds"] / least["seconds"]) / math.log(row["rows"] / least["rows"]))
    return rows


def find(rows: list[dict], scale: str, subject: str) -> dict | None:
    return next((r for r in rows if (r["scale"], r["subject"]) == (scale, subject)), None)


def limits(rows: list[dict]) -> list[dict]:
    """Return what was asked for at r4.2's size, and what was measured.

    The growth power is the slope of log seconds over log rows from the smallest scale on; 1 means
    linear.
    """
    full = f"{FULL_SCALE:g}"
    asked = [(SIMULATE, "seconds", "at most", 480, 1), (SIMULATE, "peak_bytes", "at most", 3, GB),
             (PAIR, "seconds", "at most", 360, 1), (PAIR, "peak_bytes", "at most", 4, GB),
             (COUNTS, "times_slower_than_ours", "at least", 3, 1),
             (DAY_FEATURES, "times_slower_than_ours", "at least", 3, 1),
             *((subject, "growth_power", "at most", 1.1, 1)
               for subject in (SIMULATE, INGEST, WINDOWS, PAIR))]
    found = []
    for subject, name, side, limit, unit in asked:
        row = find(rows, full, subject)
        if row and row[name] is not None:
            got = row[name] / unit
            fact = name.replace("peak_bytes", "peak GB").replace("_", " ")
            found.append({"subject": subject, "fact": fact, "limit": f"{side} {limit}",
                          "got": got, "met": got <= limit if side == "at most" else got >= limit})
    return found


def disagreements(measurements: list[dict]) -> list[str]:
    """Name every total that the pandas way and the windows count differently."""
    told = []
    for one in measurements:
        ours = next((m for m in measurements
                     if m["subject"] == WINDOWS and m["scale"] == one["scale"]), None)
        if ours is None or one["subject"] not in (COUNTS, DAY_FEATURES):
            continue
        pairs = {"account_days": (one["account_days"], ours["account_days"])}
        if one["subject"] == DAY_FEATURES:
            pairs |= {name: (one["totals"][name], ours["totals"][name]) for name in PANDAS_COLUMNS}
        else:  # rows of the two logs whose every row is one event in both
            pairs |= {name: (one["totals"][name], ours["totals"][name])
                      for name in ("n_file", "n_email", "n_http")}
        told += [f"scale {one['scale']}, {one['subject']}: {name} is {theirs}, in windows {own}"
                 for name, (theirs, own) in pairs.items() if theirs != own]
    return told


def number(value, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def table(rows: list[dict]) -> str:
    """Return the rows as a markdown table."""
    lines = ["| scale | users x days | rows | what | s (range) | CPU s | rows/s | peak GB | "
             "GB written | x ours | x our CPU | growth power | load before |", "|---" * 13 + "|"]
    for row in rows:
        lines.append("| " + " | ".join([
            row["scale"], f"{row['users']} x {row['days']}", f"{row['rows']:,}", row["subject"],
            f"{number(row['seconds'])} ({number(row['low_s'])}-{number(row['high_s'])})",
            number(row["cpu_s"]), number(row["rows_per_s"], 0), number(row["peak_bytes"] / GB),
            number(row["bytes"] and row["bytes"] / GB), number(row["times_slower_than_ours"]),
            number(row["times_our_cpu"]), number(row["growth_power"]),
            number(row["load"], 1)]) + " |")
    return "\n".join(lines)


def limits_table(found: list[dict]) -> str:
    lines = ["| at r4.2's size | asked | got | met |", "|---|---|---|---|"]
    lines += [f"| {one['subject']}: {one['fact']} | {one['limit']} | {number(one['got'])} | "
              f"{'yes' if one['met'] else 'NO'} |" for one in found]
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Draw seconds and rows per second over rows."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for subject in dict.fromkeys(row["subject"] for row in rows):
        line = [row for row in rows if row["subject"] == subject]
        for axis, name in zip(panels, ("seconds", "rows_per_s"), strict=True):
            axis.plot([row["rows"] for row in line], [row[name] for row in line], marker="o",
                      label=subject)
    panels[0].set(xlabel="rows", ylabel="seconds", xscale="log", yscale="log")
    panels[1].set(xlabel="rows", ylabel="rows per second", xscale="log", ylim=(0, None))
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def machine(threads: int) -> dict:
    """Return what a reader needs to know of the machine; no names or paths."""
    import duckdb
    import numpy
    import pyarrow

    facts = {
        "system": platform.system(), "architecture": platform.machine(),
        "python": platform.python_version(), "duckdb": duckdb.__version__,
        "numpy": numpy.__version__, "pyarrow": pyarrow.__version__, "cores": os.cpu_count(),
        "threads": threads, "memory_gib": round(psutil.virtual_memory().total / 2**30, 1)}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines()
                 if line.startswith("model name")]
        facts["cpu"] = names[0] if names else platform.processor()
    return facts


def write(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def short_of_space(args: argparse.Namespace, scales: list[str]) -> str | None:
    """Return what to tell where the largest scale still to measure does not fit."""
    needed, scale = max(
        (args.sizes[s][0] * args.sizes[s][1] * ROWS_PER_ACCOUNT_DAY * BYTES_PER_ROW, s)
        for s in scales)
    free = shutil.disk_usage(args.work).free + size_of(args.work)
    if free >= needed:
        return None
    return (f"scale {scale} needs about {needed / GB:.1f} GB in {args.work}, "
            f"{free / GB:.1f} GB are free: make room, name a folder on another disk with --work, "
            "or choose smaller --scales")


def prepared(work: dict, folder: Path) -> None:
    """Put in place what a measurement reads, and remove what it writes; nothing here is timed."""
    subject = work["subject"]
    needs = {SIMULATE: (), WINDOWS: (SIMULATE, INGEST)}.get(subject, (SIMULATE,))
    made = {SIMULATE: "release", INGEST: "store", WINDOWS: "windows"}
    if subject in made:
        shutil.rmtree(folder / made[subject], ignore_errors=True)
    marks = {SIMULATE: folder / "release" / "simulation.json",
             INGEST: folder / "store" / "manifest.json"}
    for need in needs:
        if not marks[need].exists():
            child({**work, "subject": need}, folder)
    if work["cold"] and subject != SIMULATE:
        drop_pages(folder / ("store" if subject == WINDOWS else "release"))


def main() -> int:
    args = options()
    started = time.monotonic()
    out = args.out or HERE / "results" / f"bench_data{'_quick' if args.quick else ''}.json"
    measurements, failures = [], []
    if args.resume and out.exists():
        measurements = json.loads(out.read_text(encoding="utf-8"))["measurements"]
    todo = {scale: [work for work in plan(args, scale)
                    if not any(same_work(kept, work) for kept in measurements)]
            for scale in args.sizes}
    todo = {scale: works for scale, works in todo.items() if works}
    facts = machine(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if todo and (problem := short_of_space(args, list(todo))):
        print(f"bench_data: {problem}", file=sys.stderr)
        return 2

    def result() -> dict:
        rows = summary(measurements)
        return {"machine": facts, "measurements": measurements, "failures": failures,
                "disagreements": disagreements(measurements), "summary": rows,
                "limits": limits(rows)}

    late = False
    for scale, works in todo.items():
        users, days = args.sizes[scale]
        folder = args.work / f"{users}x{days}_seed{args.seed}"
        folder.mkdir(exist_ok=True)
        for place, work in enumerate(works, 1):
            late = args.time_limit and time.monotonic() - started > args.time_limit
            if late:
                break
            name = f"scale {scale}, {place}/{len(works)} {work['subject']}"
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                prepared(work, folder)
                load = os.getloadavg()[0]
                measured = {**work, **child(work, folder), "load": load}
            except Failed as failure:
                failures.append({**work, "error": str(failure)})
                print(f"{name}: FAILED: {failure}", file=sys.stderr)
            else:
                measurements.append(measured)
                print(f"{name}: {measured['seconds']:.1f} s, "
                      f"{measured['peak_bytes'] / GB:.2f} GB", file=sys.stderr, flush=True)
            write(out, result())
        if late:
            print("time limit reached: repeat with --resume", file=sys.stderr)
            break
        shutil.rmtree(folder)
    final = result()
    if measurements:
        write(out, final)
        plot(final["summary"], out.with_suffix(".png"))
        print(f"{facts.get('cpu', facts['architecture'])}, {args.threads} of {facts['cores']} "
              f"cores, {facts['memory_gib']} GiB\n")
        print(table(final["summary"]))
        if final["limits"]:
            print("\n" + limits_table(final["limits"]))
    for told in final["disagreements"]:
        print(f"totals differ: {told}", file=sys.stderr)
    return 1 if failures or final["disagreements"] else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(json.loads(sys.argv[2]))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child ends as well
        sys.exit(main())
