#!/usr/bin/env python3
"""Read a shard directory again (sequences or targets) and name all of its faults.

    python pipeline/verify.py runs/scored
    python pipeline/verify.py runs/scored --deep
    python pipeline/verify.py runs/scored --teacher bert-base-uncased --sample 32

Checks sizes, checksums, columns, row counts, sequence ids, records, manifest and tokenizer. --deep also checks every
value, --teacher scores some sequences again. The exit code is 0 without faults, 1 with faults. See docs/shards.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the checkout

from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.commands.flags import Parser, flag, positive
from entropy_masking.errors import UsageError
from entropy_masking.shards import manifests
from entropy_masking.shards.faults import Depth, Fault, faults, repair, rescored_faults
from entropy_masking.shards.schema import Manifest

if TYPE_CHECKING:
    from pipeline.teacher import Teacher

SAMPLE = 8  # sequences to score again


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    directory = storage.absolute(args.directory)
    manifest = manifests.find_manifest(directory) or manifests.read_manifest(directory)  # the latter says why not
    teacher = load_teacher(args, manifest) if args.teacher else None
    depth = Depth.VALUES if args.deep else Depth.TABLES
    with console.Progress(sum(entry.bytes for entry in manifest.shards), "B", "verifying") as progress:
        faulty = print_faults(manifest, faults(manifest, depth, progress.advance))
    if teacher:
        sound = [entry for entry in manifest.shards if entry.file not in faulty]
        faulty += print_faults(manifest, rescored_faults(manifest, sound, teacher.score, args.sample))
    print(summary(manifest, len(faulty), args))
    return int(bool(faulty))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("pipeline/verify.py", __doc__)
    add = parser.add_argument
    add("directory", help="shard directory, a path or a URI")
    add("--deep", action="store_true", help="check every value, not only the files")
    add("--teacher", help="the masked LM that scored the shards, by path or Hub id: score some sequences again")
    add("--sample", type=positive, help=f"how many sequences to score again (default: {SAMPLE})")
    add("--trust-remote-code", action="store_true", help="run model code that a checkpoint brings along")
    args = parser.parse_args(argv)
    for name in ("sample", "trust_remote_code"):
        if getattr(args, name) and not args.teacher:
            raise UsageError(f"{flag(name)} needs --teacher; name the teacher that scored the shards")
    args.sample = args.sample or SAMPLE
    return args


def load_teacher(args: argparse.Namespace, manifest: Manifest) -> Teacher:
    """The teacher that scored the sequences, with the same settings. Raises UsageError if none or another one did."""
    from entropy_masking.models.checkpoints import local_checkpoint, weights_hash
    from pipeline.teacher import Teacher

    if manifest.kind != "sequences" or not manifest.scored:
        raise UsageError(f"{manifest.uri} holds no sequences with scores; leave out --teacher")
    directory = local_checkpoint(args.teacher)
    if weights_hash(directory) != manifest.fingerprint.get("teacher"):
        problem = f"the weights of --teacher {args.teacher} did not score {manifest.uri}"
        raise UsageError(f"{problem}; use the same checkpoint")
    return Teacher(manifest, directory, trust_remote_code=args.trust_remote_code)


def print_faults(manifest: Manifest, faults: Iterable[Fault]) -> list[str]:
    """Print faults with their repair as they are found; returns their files."""
    faulty = []
    for file, fault in faults:
        print(f"{file}: {fault}; {repair(manifest, (file, fault))}")
        faulty.append(file)
    return faulty


def summary(manifest: Manifest, count: int, args: argparse.Namespace) -> str:
    """One line about the checks and their outcome."""
    done, rows = len(manifest.shards), sum(entry.rows for entry in manifest.shards)
    state = f"{len(manifest.failed)} shards were given up; " if manifest.failed else ""
    checked = "every value" if args.deep else "files"
    checked += f" and {args.sample} sequences with the teacher" if args.teacher else ""
    outcome = f"{count:,} fault{'s' * (count != 1)}" if count else "no faults"
    return f"{args.directory}: {state}{done:,} shards, {rows:,} rows of {manifest.kind}, checked {checked}: {outcome}"


if __name__ == "__main__":
    console.run(main)
