#!/usr/bin/env python3
"""How good the cheap form of self-masking is: `lagged` against `step` and `random`, at equal steps.

    python bench/refresh.py --shards runs/tokens --output runs/refresh
    python bench/refresh.py --shards runs/tokens --model mini --steps 2000 --seeds 1 2 3 --output runs/refresh

Trains each by train/run.py (the same command goes on where it stopped), then looks at the checkpoints: what `lagged`
has kept of a sample of its sequences, ranked against what a fresh forward of the same checkpoint says, and against the
run that made a fresh forward each step. Prints a table, seed by seed as its rounds, and as the last line the same as
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM
from transformers.utils import logging

from bench.table import Row, keep_buffers, print_table, row
from pipeline import cli
from pipeline.cli import RunError
from pipeline.manifests import Manifest, read_manifest
from train.data import Columns, masker_of, read_rows, split_shards, to_tensors
from train.masking import MaskPolicy, select_positions
from train.noise import hash_order
from train.options import REFRESH_EVERY
from train.selfmask import ScoreMemory, Visited
from train.student import student_scores, with_masked_positions
from train.trainer import SELF_SCORES
from train.watch import mask_overlap, rank_correlation

REGIMES = {
    "random": ["--entropy-source", "random"],
    "step": ["--entropy-source", "self", "--self-refresh", "step"],
    "lagged": ["--entropy-source", "self", "--self-refresh", "lagged"],
}
HELD_OUT = 0.1
BATCH = 32  # sequences of a forward here


def main() -> None:
    args = parse()
    keep_buffers()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()  # of reading weights
    for seed in args.seeds:
        for regime in REGIMES:
            train(args, regime, seed)
    manifest = read_manifest(args.shards)
    entries, _ = split_shards(manifest, HELD_OUT)
    found: dict[str, list[float]] = defaultdict(list)
    for seed in args.seeds:
        for regime in REGIMES:
            summary = json.loads((directory(args, regime, seed) / "summary.json").read_text())
            found[f"{regime} eval loss"].append(summary["eval_loss"])
        for step in checkpoints(args):
            for name, value in compare(args, manifest, entries, seed, step).items():
                found[f"{name} {step}"].append(value)
    units = defaultdict(lambda: "rank correlation", {"eval loss": "nats", "overlap": "of a mask"})
    rows: dict[str, Row] = {}
    for name, values in found.items():
        unit = next((unit for word, unit in units.items() if word in name), "rank correlation")
        budget = 0.9 if name == f"kept to fresh {args.steps}" else None
        rows[name.replace(" ", "_")] = row(np.array(values), unit, at_least=budget)
    print_table(rows, vars(args))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shards", required=True, help="shard directory to train on")
    add("--output", required=True, help="directory of the runs")
    add("--model", default="tiny", help="as for train/run.py (default: tiny)")
    add("--steps", type=cli.positive, default=800, help="of each run (default: 800)")
    add("--batch", type=cli.positive, default=32, help="sequences a step (default: 32)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--looks", type=cli.positive, default=4, help="checkpoints looked at in a run (default: 4)")
    add("--sample", type=cli.positive, default=256, help="sequences looked at (default: 256)")
    add("--every", type=cli.positive, default=REFRESH_EVERY, help="--self-refresh-every of lagged")
    add("--mask-temperature", default="1", help="of step and lagged (default: 1; from random weights 0 teaches little)")
    add("--threads", type=cli.positive, default=1)
    return parser.parse_args()


def directory(args: argparse.Namespace, regime: str, seed: int) -> Path:
    return Path(args.output) / f"{regime}-{seed}"


def checkpoints(args: argparse.Namespace) -> list[int]:
    every = args.steps // args.looks
    return [every * look for look in range(1, args.looks)] + [args.steps]


def train(args: argparse.Namespace, regime: str, seed: int) -> None:
    """One run, unless it is finished already."""
    flags = ["--shards", args.shards, "--model", args.model, "--seed", seed, "--eval-fraction", HELD_OUT]
    flags += ["--max-steps", args.steps, "--per-device-train-batch-size", args.batch, "--logging-steps", 50]
    flags += ["--save-steps", args.steps // args.looks, "--save-total-limit", 2 * args.looks, *REGIMES[regime]]
    flags += ["--mask-temperature", args.mask_temperature] if regime != "random" else []
    flags += ["--self-refresh-every", args.every] if regime == "lagged" else []
    flags += ["--output-dir", directory(args, regime, seed)]
    command = [sys.executable, ROOT / "train" / "run.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    ran = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RunError(f"{regime} with seed {seed} failed: {' '.join(ran.stderr.split())[-500:]}")
    print(ran.stdout.splitlines()[0], file=sys.stderr, flush=True)


def compare(args: argparse.Namespace, manifest: Manifest, entries: list[Any], seed: int, step: int) -> dict[str, float]:
    """What `lagged` has kept at a step against fresh forwards, over a sample of the sequences trained on."""
    batch = sample(manifest, entries, args.sample)
    ids_BL = batch["input_ids"]
    candidates_BL = masker_of(manifest).candidates(ids_BL)
    lagged, stepped = (directory(args, name, seed) / f"checkpoint-{step}" for name in ("lagged", "step"))
    masks = MaskPolicy().positions(manifest.sequence_length)
    rows = sum(entry.rows for entry in entries)
    memory = ScoreMemory(rows, manifest.sequence_length, manifest.vocab_size, args.every)
    visited = Visited(entries, masks, memory)
    visited.load(torch.load(lagged / SELF_SCORES, weights_only=True))
    row_B = visited.rows_of(batch["sequence_id"].numpy())
    maps = {
        "kept": memory.estimate(row_B, ids_BL),
        "fresh": fresh(lagged, ids_BL, manifest.special_ids["pad"]),
        "step": fresh(stepped, ids_BL, manifest.special_ids["pad"]),
    }
    types = ScoreMemory(1, manifest.sequence_length, manifest.vocab_size, args.every)
    types.load({name: value for name, value in memory.state().items() if name != "rest_NL"})
    maps["types"] = types.estimate(torch.zeros_like(row_B), ids_BL)

    def mask(name: str) -> Tensor:
        return select_positions(maps[name], candidates_BL, batch["sequence_id"], torch.zeros_like(row_B), MaskPolicy())

    found = {}
    for one, other in (("kept", "fresh"), ("types", "fresh"), ("kept", "step"), ("fresh", "step")):
        rho_B, known_B = rank_correlation(maps[one], maps[other], candidates_BL)
        found[f"{one} to {other}"] = float(rho_B[known_B].mean())
    for other in ("fresh", "step"):
        found[f"overlap kept, {other}"] = float(mask_overlap(mask("kept"), mask(other))[0].mean())
    return found


def sample(manifest: Manifest, entries: list[Any], size: int) -> dict[str, Tensor]:
    """The same sequences for every run and step."""
    tensors = [to_tensors(read_rows(manifest, entry, Columns())) for entry in entries]
    together = {name: torch.cat([each[name] for each in tensors]) for name in ("sequence_id", "input_ids")}
    chosen = hash_order(0, size=len(together["sequence_id"]))[:size]
    return {name: tensor[chosen] for name, tensor in together.items()}


def fresh(checkpoint: Path, ids_NL: Tensor, pad_id: int) -> Tensor:
    """Entropies [N, L] by a forward of a checkpoint on the sequences as they are."""
    model = with_masked_positions(AutoModelForMaskedLM.from_pretrained(checkpoint).eval())
    parts = [student_scores(model, ids_BL, (ids_BL != pad_id).long())["entropy"] for ids_BL in ids_NL.split(BATCH)]
    return torch.cat(parts)


if __name__ == "__main__":
    cli.run(main)
