#!/usr/bin/env python3
"""How far a scoring job is, running, dead or finished, from what it has committed: needs no cluster and no model.

python pipeline/status.py runs/scored
python pipeline/status.py s3://bucket/scored --json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.errors import RunError, UsageError
from entropy_masking.shards import commit, manifests, parquet

RECENT_SECONDS = 300.0  # the rate now is that of the last five minutes, or of as long as two shards take
NAMED = 20  # workers and shards at most that are listed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="pipeline/status.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", help="shard directory of a run, a path or a URI")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    try:
        found = status(storage.absolute(args.directory), time.time())
    except OSError as error:
        raise RunError(f"cannot read {args.directory}: {' '.join(str(error).split())[:300]}") from None
    print(json.dumps(found, indent=1) if args.json else to_text(found))


def status(directory: str, now: float) -> dict[str, Any]:
    """What a directory's records say at ``now`` (seconds of the epoch).

    Raises:
        UsageError: no shard directory, or one whose own account cannot be read.
    """
    manifest = _read(manifests.manifest_uri(directory), ("planned_shards", "shards", "failed", "totals"))
    run = _read(manifests.run_uri(directory), ("fingerprint", "shards"))
    done = commit.done_records(directory, run["shards"], storage.sha256_json(run["fingerprint"])) if run else {}
    if manifest:
        planned, shards_done, totals = manifest["planned_shards"], len(manifest["shards"]), manifest["totals"]
    elif run:
        planned, shards_done, totals = run["shards"], len(done), commit.totals(list(done.values()))
    else:
        raise UsageError(f"{directory} is no shard directory; name the --output of a pipeline/score.py run")
    # plans and targets hold no tokens of their own: there the work is counted in positions
    unit = "positions" if done and not any(record["tokens"] for record in done.values()) else "tokens"
    records = [record | {"tokens": record["tokens"] or record["scored_tokens"]} for record in done.values()]
    rate = recent_rate(records, now)
    tokens = totals["tokens"] or totals["scored_tokens"]
    left = tokens / shards_done * (planned - shards_done) if shards_done else None
    ends = [finished_at(record) for record in records]
    return {
        "directory": directory,
        "finished": bool(manifest),
        "shards": planned,
        "done": shards_done,
        "failed": manifest["failed"] if manifest else {},
        "unfinished_attempts": {} if manifest else unfinished_attempts(directory, set(done)),
        "seconds_since_last_shard": round(max(0.0, now - max(ends)), 1) if ends else None,
        "unit": unit,
        "tokens": tokens,
        "mean_entropy": totals["entropy_sum"] / totals["scored_tokens"] if totals["entropy_sum"] else None,
        "tokens_per_second_now": None if manifest else round(rate, 1),
        "tokens_per_second": round(tokens / max(totals["seconds"], 1e-3), 1),
        "eta_seconds": round(left / rate) if left is not None and rate and not manifest else None,
        "totals": totals,
        "workers": commit.worker_costs(records),
    }


def _read(uri: str, needed: tuple[str, ...]) -> dict[str, Any] | None:
    """The JSON object at ``uri``, if there is one. Raises UsageError if it lacks what is needed."""
    try:
        found = storage.read_json(uri)
        return {name: found[name] for name in needed}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{uri} cannot be read as JSON of a scoring run; run pipeline/score.py again") from None


def finished_at(record: dict[str, Any]) -> float:
    return datetime.fromisoformat(record["finished_at"]).timestamp()


def recent_rate(records: list[dict[str, Any]], now: float) -> float:
    """Tokens a second of the shards that were committed lately, from the start of the first of them until now."""
    if not records:
        return 0.0
    window = max(RECENT_SECONDS, 2 * max(record["seconds"] for record in records))
    recent = [record for record in records if now - finished_at(record) <= window]
    started = max(now - window, min((finished_at(r) - r["seconds"] for r in recent), default=now))
    return sum(record["tokens"] for record in recent) / max(now - started, 1e-3)


def unfinished_attempts(directory: str, done: set[int]) -> dict[str, int]:
    """Attempts of the newest run by shard: those that are under way, and those that ended without a shard."""
    infos = storage.list_files(storage.join(directory, "_attempts"))
    newest, attempts = "", {}
    for info in sorted(infos, key=lambda info: info.mtime_ns or 0, reverse=True):
        try:
            note = storage.read_json(storage.join(directory, "_attempts", info.base_name))
            newest = newest or note["run"]
            index = int(info.base_name.removeprefix("part-").removesuffix(".json"))
            if note["run"] == newest and index not in done:
                attempts[parquet.shard_file(index)] = int(note["attempts"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            continue  # it ended meanwhile
    return dict(sorted(attempts.items()))


def to_text(found: dict[str, Any]) -> str:
    """The status as a person reads it."""
    totals, unit = found["totals"], found["unit"]
    ago = found["seconds_since_last_shard"]
    last = f", the last one {duration(ago)} ago" if ago is not None else ""
    share = found["done"] / max(found["shards"], 1)
    state = "finished" if found["finished"] else "unfinished"
    lines = [f"{found['directory']}: {state}, {found['done']:,} of {found['shards']:,} shards ({share:.0%}){last}"]

    def line(name: str, text: str) -> None:
        lines.append(f"  {name:<19} {text}")

    for name, reason in list(found["failed"].items())[:NAMED]:
        line("given up", f"{name}: {reason}")
    if attempts := [f"{name} ({n})" for name, n in found["unfinished_attempts"].items()]:
        line("begun, attempt", ", ".join(attempts[:NAMED]) + " …" * (len(attempts) > NAMED))
    line(unit, f"{found['tokens']:,}")
    if found["mean_entropy"] is not None:
        line("mean entropy", f"{found['mean_entropy']:.3f} nats")
    if not found["finished"]:
        line(f"{unit}/s now", f"{found['tokens_per_second_now']:,.0f}")
        eta = duration(found["eta_seconds"]) if found["eta_seconds"] is not None else "unknown: no shard lately"
        line("ETA", eta)
    line(f"{unit}/s in all", f"{found['tokens_per_second']:,.0f}")
    line("worker-seconds", f"{totals['worker_seconds']:,.1f} of {totals['workers']} workers")
    if totals["flops"]:
        line("in the model", f"{totals['utilisation']:.0%} of them, {totals['flops']:.3g} FLOPs")
    line("bytes", f"{totals['bytes']:,} ({totals['bytes'] / max(found['tokens'], 1):.2f} a {unit[:-1]})")
    reasons = ", ".join(f"{count} {reason}" for reason, count in totals["rejected_reasons"].items())
    line("rejected documents", f"{totals['rejected']:,}{f' ({reasons})' if reasons else ''}")
    for name, cost in list(found["workers"].items())[:NAMED]:
        busy = cost["forward_seconds"] / max(cost["seconds"], 1e-3)
        speed = f"{cost['tokens_per_second']:,.0f} {unit}/s, {busy:.0%} in the model"
        lines.append(f"  {name}: {cost['shards']:,} shards, {speed}")
    if len(found["workers"]) > NAMED:
        lines.append(f"  and {len(found['workers']) - NAMED} more workers")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """``12 s``, ``3 min``, ``2.5 h``, ``4.0 d``."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < most:
            return f"{seconds / size:.{int(unit == 'h')}f} {unit}"
    return f"{seconds / 86400:.1f} d"


if __name__ == "__main__":
    console.run(main)
