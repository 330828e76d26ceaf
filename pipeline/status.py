#!/usr/bin/env python3
"""Show the progress of a scoring job, running, dead or finished, from its records. Needs no cluster and no model.

python pipeline/status.py runs/scored
python pipeline/status.py s3://bucket/scored --json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the checkout

from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.commands.flags import Parser
from entropy_masking.errors import RunError, UsageError, one_line
from entropy_masking.shards import commit, costs, manifests
from entropy_masking.shards.schema import Attempt, Record, Run

RECENT_SECONDS = 300.0  # the current rate covers the last five minutes, or twice the time of the slowest shard
NAMED = 20  # most workers and shards that are listed


def main(argv: list[str] | None = None) -> None:
    parser = Parser("pipeline/status.py", __doc__)
    parser.add_argument("directory", help="shard directory of a run, a path or a URI")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    try:
        report = status(storage.absolute(args.directory), time.time())
    except PermissionError:
        raise
    except OSError as error:
        raise RunError(f"cannot read {args.directory}: {one_line(error)}") from None
    print(json.dumps(report, indent=1) if args.json else to_text(report))


def status(directory: str, now: float) -> dict[str, object]:
    """The progress according to the records at ``now`` (seconds of the epoch). Raises UsageError without a run."""
    manifest, run = manifests.find_manifest(directory), manifests.read_json_file(Run, manifests.run_uri(directory))
    done = commit.done_records(directory, run) if run else {}
    if manifest:
        planned, shards_done, totals = manifest.planned_shards, len(manifest.shards), manifest.totals
    elif run:
        planned, shards_done, totals = run.shards, len(done), costs.totals(list(done.values()))
    else:
        raise UsageError(f"{directory} is not a shard directory; name the --output of a pipeline/score.py run")
    records = list(done.values())
    rate = recent_rate(records, now)
    tokens, unit = amount(totals)
    left = tokens / shards_done * (planned - shards_done) if shards_done else None
    return {
        "directory": directory,
        "finished": bool(manifest),
        "shards": planned,
        "done": shards_done,
        "failed": manifest.failed if manifest else {},
        "unfinished_attempts": {} if manifest else unfinished_attempts(directory, {record.file for record in records}),
        "seconds_since_last_shard": round(max(0.0, now - max(r.ended for r in records)), 1) if records else None,
        "unit": unit,
        "tokens": tokens,
        "mean_entropy": totals["entropy_sum"] / totals["scored_tokens"] if totals["entropy_sum"] else None,
        "tokens_per_second_now": None if manifest else round(rate, 1),
        "tokens_per_second": round(tokens / max(totals["seconds"], 1e-3), 1),
        "eta_seconds": round(left / rate) if left is not None and rate and not manifest else None,
        "totals": totals,
        "workers": costs.worker_costs(records),
    }


def recent_rate(records: list[Record], now: float) -> float:
    """Tokens per second of recently committed shards, from the start of the first of them until now."""
    if not records:
        return 0.0
    window = max(RECENT_SECONDS, 2 * max(record.seconds for record in records))
    recent = [record for record in records if now - record.ended <= window]
    started = max(now - window, min((record.ended - record.seconds for record in recent), default=now))
    return sum(record.tokens_or_positions for record in recent) / max(now - started, 1e-3)


def unfinished_attempts(directory: str, done: set[str]) -> dict[str, int]:
    """Attempts of the newest run by shard file: attempts in progress, and attempts that ended without a shard."""
    infos = storage.list_files(storage.join(directory, commit.ATTEMPTS))
    newest, attempts = "", {}
    for info in sorted(infos, key=lambda info: info.mtime_ns or 0, reverse=True):
        attempt = commit.read_if_valid(Attempt, storage.join(directory, commit.ATTEMPTS, info.base_name))
        file = info.base_name.replace(".json", ".parquet")
        newest = newest or (attempt.run if attempt else "")  # None: the attempt has ended meanwhile
        if attempt and attempt.run == newest and file not in done:
            attempts[file] = attempt.attempts
    return dict(sorted(attempts.items()))


def to_text(report: dict[str, Any]) -> str:
    """The status as text."""
    unit, ago, share = report["unit"], report["seconds_since_last_shard"], report["done"] / max(report["shards"], 1)
    last = f", the last one {duration(ago)} ago" if ago is not None else ""
    state = "finished" if report["finished"] else "unfinished"
    lines = [f"{report['directory']}: {state}, {report['done']:,} of {report['shards']:,} shards ({share:.0%}){last}"]
    lines += [line("given up", f"{name}: {reason}") for name, reason in list(report["failed"].items())[:NAMED]]
    if attempts := [f"{name} ({n})" for name, n in report["unfinished_attempts"].items()]:
        lines.append(line("begun, attempt", ", ".join(attempts[:NAMED]) + " …" * (len(attempts) > NAMED)))
    if not report["finished"]:
        eta = report["eta_seconds"]
        lines.append(line(f"{unit}/s now", f"{report['tokens_per_second_now']:,.0f}"))
        lines.append(line("ETA", duration(eta) if eta is not None else "unknown: no shard lately"))
    lines += totals_lines(report["totals"])
    for name, cost in list(report["workers"].items())[:NAMED]:
        busy = cost["forward_seconds"] / max(cost["seconds"], 1e-3)
        speed = f"{cost['tokens_per_second']:,.0f} {unit}/s, {busy:.0%} in the model"
        lines.append(f"  {name}: {cost['shards']:,} shards, {speed}")
    if len(report["workers"]) > NAMED:
        lines.append(f"  and {len(report['workers']) - NAMED} more workers")
    return "\n".join(lines)


def totals_lines(totals: dict[str, Any]) -> list[str]:
    """The contents and costs of shards, from the totals of a manifest, as lines."""
    tokens, unit = amount(totals)
    lines = [line(unit, f"{tokens:,}")]
    if totals["entropy_sum"]:
        lines.append(line("mean entropy", f"{totals['entropy_sum'] / totals['scored_tokens']:.3f} nats"))
    workers = f"{totals['workers']} worker{'s' * (totals['workers'] != 1)}: {totals['worker_seconds']:,.1f} in all"
    lines.append(line("seconds", f"{totals['seconds']:,.1f} ({workers})"))
    lines.append(line(f"{unit}/s in all", f"{tokens / max(totals['seconds'], 1e-3):,.0f}"))
    if totals["flops"]:
        spent = f"{totals['utilisation']:.0%} of the workers' seconds, {totals['flops']:.3g} FLOPs"
        lines.append(line("in the model", spent))
    if totals["rescued_shards"]:
        lines.append(line("smaller batches", f"{totals['rescued_shards']} shards, for lack of memory"))
    lines.append(line("bytes", f"{totals['bytes']:,} ({totals['bytes'] / max(tokens, 1):.2f} a {unit[:-1]})"))
    if read := totals["documents"] - totals["rejected"]:
        mean = f"{max(1, round((tokens - 2 * totals['sequences']) / read) - 1):,} tokens on average"
        most = f", {longest:,} at most" if (longest := totals.get("longest_document")) else ""
        lines.append(line("documents", f"{read:,}, {mean}{most}"))
    reasons = ", ".join(f"{count} {reason}" for reason, count in totals["rejected_reasons"].items())
    listed = f" ({reasons}), listed in _records/" if reasons else ""
    return [*lines, line("rejected documents", f"{totals['rejected']:,}{listed}")]


def amount(totals: dict[str, int]) -> tuple[int, str]:
    """The scored amount and its unit: tokens, or positions for targets, which hold no tokens."""
    is_targets = totals["scored_tokens"] and not totals["tokens"]
    return (totals["scored_tokens"], "positions") if is_targets else (totals["tokens"], "tokens")


def line(name: str, text: str) -> str:
    return f"  {name:<19} {text}"


def duration(seconds: float) -> str:
    """``12 s``, ``3 min``, ``2.5 h``, ``4.0 d``."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < most:
            return f"{seconds / size:.{int(unit == 'h')}f} {unit}"
    return f"{seconds / 86400:.1f} d"


if __name__ == "__main__":
    console.run(main)
