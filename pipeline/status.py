#!/usr/bin/env python3
"""Show the progress of a scoring job, running, dead or finished, from its records. Needs no cluster and no model.

python pipeline/status.py runs/scored
python pipeline/status.py s3://bucket/scored --json
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the checkout

from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.commands.flags import Parser
from entropy_masking.errors import UsageError
from entropy_masking.shards import commit, costs, manifests
from entropy_masking.shards.schema import Attempt, Run

NAMED = 20  # most shards that are listed


def main(argv: list[str] | None = None) -> None:
    parser = Parser("pipeline/status.py", __doc__)
    parser.add_argument("directory", help="shard directory of a run, a path or a URI")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    report = status(storage.absolute(args.directory), time.time())
    print(json.dumps(report, indent=1) if args.json else to_text(report))


def status(directory: str, now: float) -> dict[str, object]:
    """The progress according to the records at ``now`` (seconds of the epoch). Raises UsageError without a run."""
    manifest, run = manifests.find_manifest(directory), manifests.read_json_file(Run, manifests.run_uri(directory))
    if not manifest and not run:
        raise UsageError(f"{directory} is not a shard directory; name the --output of a pipeline/score.py run")
    records = list(commit.done_records(directory, run).values()) if run else []
    planned = manifest.planned_shards if manifest else run.shards if run else 0
    done, totals = (len(manifest.shards), manifest.totals) if manifest else (len(records), costs.totals(records))
    tokens, unit = amount(totals)
    return {
        "directory": directory,
        "finished": bool(manifest),
        "shards": planned,
        "done": done,
        "failed": manifest.failed if manifest else {},
        "unfinished_attempts": {} if manifest else unfinished_attempts(directory, {record.file for record in records}),
        "seconds_since_last_shard": round(max(0.0, now - max(r.ended for r in records)), 1) if records else None,
        "unit": unit,
        "tokens": tokens,
        "tokens_per_second": round(tokens / max(totals["seconds"], 1e-3), 1),
        "remaining_seconds": round(totals["seconds"] / done * (planned - done)) if done and not manifest else None,
        "totals": totals,
    }


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
    ago, share = report["seconds_since_last_shard"], report["done"] / max(report["shards"], 1)
    last = f", the last one {duration(ago)} ago" if ago is not None else ""
    state = "finished" if report["finished"] else "unfinished"
    lines = [f"{report['directory']}: {state}, {report['done']:,} of {report['shards']:,} shards ({share:.0%}){last}"]
    lines += [line("given up", f"{name}: {reason}") for name, reason in list(report["failed"].items())[:NAMED]]
    if attempts := [f"{name} ({n})" for name, n in report["unfinished_attempts"].items()]:
        lines.append(line("begun, attempt", ", ".join(attempts[:NAMED]) + " …" * (len(attempts) > NAMED)))
    if (left := report["remaining_seconds"]) is not None:
        lines.append(line("remaining", f"{duration(left)} of work at the rate of the finished shards"))
    return "\n".join([*lines, *totals_lines(report["totals"])])


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
