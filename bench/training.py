#!/usr/bin/env python3
"""How fast each regime trains, against the stock Trainer with its collator and against the other regimes.

    python bench/training.py --shards runs/scored

The shards need entropies and top-k log-probabilities. Every contestant trains the same model on the same shards, with
one dtype, number of threads and malloc, in turns in one process; a ratio compares it with `random` in the same round.
Prints a JSON object after each contestant, at the end a table with the budgets, and the same as one JSON object.
"""

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, Trainer

import train.run
from bench.commands import keep_buffers, new_parser
from bench.recipes import AT_ONCE
from bench.table import GOAL, Row, device_name, now, peak_bytes, peak_flops, print_table, reset_peak, row, to_json
from entropy_masking.commands import console
from entropy_masking.commands.flags import positive
from entropy_masking.errors import RunError, one_line
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.models.checkpoints import resolve_dtype
from entropy_masking.models.flops import forward_flops, training_flops
from entropy_masking.shards.manifests import read_manifest, shard_tokenizer
from entropy_masking.shards.read import read_rows
from train.arguments import training_arguments
from train.options import parse as parse_run
from train.student import build_student

CONTESTANTS = {  # flags of train/run.py
    "random": "--entropy-source random",
    "stock": "--entropy-source random",
    "random_kd": "--entropy-source random --distill-weight 0.5",
    "parquet": f"--entropy-source parquet {AT_ONCE}",
    "parquet_kd": f"--entropy-source parquet --distill-weight 0.5 {AT_ONCE}",
    "self": f"--entropy-source self {AT_ONCE}",
    "self_kd": f"--entropy-source self --distill-weight 0.5 {AT_ONCE}",
    "self_step": f"--entropy-source self --self-refresh step {AT_ONCE}",
    "excess": "--entropy-source parquet --hard-share 0 --predict-ratio 0.15 --predict-by excess",
    "muon": "--entropy-source random --optim muon",
}
BUDGETS = {"parquet": 1.05, "parquet_kd": 1.05, "self": 1.02}  # of the time of random
UNCOUNTED = ("stock", "self_step", "excess")  # the others have one forward, and the head at the masked positions
WARMUP = 3  # steps that are not counted: allocations, compilation
TRAINING_STEP = Trainer.training_step


def main() -> None:
    args = parse()
    keep_buffers()
    settings = vars(args) | {"device": device_name(), "failed": {}}
    flops, tokens = size_of_step(args)
    seconds: dict[str, dict[int, float]] = {}  # by contestant and round
    rows: dict[str, Row] = {}
    rounds = [(number, name) for number in range(args.rounds) for name in args.contestants]
    for number, name in [(0, "random"), *rounds]:  # the first warms the process up; its result is replaced
        torch.compiler.reset()  # else a new model counts as a recompilation of the previous one
        reset_peak()
        try:
            seconds.setdefault(name, {})[number] = train_once(name, args)
            rows |= rows_of(name, seconds, flops, tokens, args)
        except RuntimeError as error:  # such as a lack of memory; the others may fit
            if name == "random":
                raise RunError(f"training with random masks failed: {one_line(error)}") from None
            settings["failed"][name] = one_line(error)
        print(to_json(rows, settings), flush=True)
    print_table(rows, settings)


def rows_of(
    name: str, times: dict[str, dict[int, float]], flops: int, tokens: int, args: argparse.Namespace
) -> dict[str, Row]:
    """The rounds of a contestant, and its time beside that of ``random`` in the same rounds."""
    seconds, beside = (np.array([times[own][number] for number in times[name]]) for own in (name, "random"))
    rows = {name: row(tokens / seconds, "tokens/s")}
    if torch.cuda.is_available():
        rows[f"{name}_peak_memory"] = row(peak_bytes() / 2**20, "MiB")
    if name not in UNCOUNTED:
        rows[f"{name}_flops"] = row(flops, "FLOPs a step")
        if peak := peak_flops(args.dtype):
            goal = GOAL if args.model == "base" else None
            rows[f"{name}_share_of_peak"] = row(flops / seconds / peak, "of the peak", at_least=goal)
    if name != "random":
        rows[f"{name}_step_to_random"] = row(seconds / beside, "× the time", at_most=BUDGETS.get(name))
    if name == "stock":
        rows["random_to_stock"] = row(seconds / beside, "×", at_least=2)
    return rows


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--shards", required=True, help="shard directory with entropies and top-k log-probabilities")
    add("--model", default="mini", help="as for train/run.py (default: mini)")
    add("--batch", type=positive, default=64, help="sequences a step (default: 64)")
    add("--steps", type=positive, default=12, help="measured steps of a round (default: 12)")
    add("--rounds", type=positive, default=4)
    add("--threads", type=positive, default=1, help="torch threads of every contestant (default: 1)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of every contestant's autocast")
    add("--torch-compile", action="store_true", help="compile the model of every contestant")
    names = list(CONTESTANTS)
    add("--contestants", nargs="+", choices=names, default=names, help="which to train beside random (default: all)")
    args = parser.parse_args()
    args.contestants = list(dict.fromkeys(["random", *args.contestants]))
    args.dtype = resolve_dtype(args.dtype)
    return args


def size_of_step(args: argparse.Namespace) -> tuple[int, int]:
    """FLOPs and tokens of a step."""
    manifest = read_manifest(args.shards)
    length = manifest.sequence_length
    encoder, head = forward_flops(build_student(args.model, manifest, seed=0).masked_lm, length)
    predicted = MaskPolicy().max_masked(length)
    return training_flops(encoder, head, sequences=args.batch, predicted=predicted), args.batch * length


def train_once(name: str, args: argparse.Namespace) -> float:
    """Train some steps: seconds of a step."""
    torch.set_num_threads(args.threads)
    times = clock(args.steps)
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
        flags = ["--shards", args.shards, "--model", args.model, "--output-dir", output, "--optim", "adamw_torch_fused"]
        flags += ["--per-device-train-batch-size", args.batch, "--max-steps", WARMUP + args.steps + 1]
        # to log a loss is to wait for the device
        flags += ["--logging-steps", 1 << 20, "--save-strategy", "no", "--eval-fraction", "0"]
        flags += ["--bf16", args.dtype == "bfloat16"] + ["--torch-compile"] * args.torch_compile
        line = [str(flag) for flag in flags] + CONTESTANTS[name].split()
        train_stock(line) if name == "stock" else train.run.main(line)
    return (times[1] - times[0]) / args.steps


def train_stock(line: list[str]) -> None:
    """``transformers.Trainer`` as run_mlm.py uses it: its collator, the head at every position, the same arguments.

    The rows are in memory, so reading takes no time.
    """
    options, given = parse_run(line, None)
    arguments = training_arguments(options, given)
    manifest = read_manifest(options.shards)
    student = build_student(options.model, manifest, arguments.seed)
    rows = [
        {"input_ids": ids} for entry in manifest.shards for ids in read_rows(manifest, entry, [])["input_ids"].tolist()
    ]
    collator = DataCollatorForLanguageModeling(shard_tokenizer(manifest.uri), mlm_probability=MaskPolicy.ratio)
    Trainer(student, arguments, train_dataset=rows, data_collator=collator).train()


def clock(steps: int) -> list[float]:
    """The times at which the steps to measure begin and end, once Trainer has taken them."""
    times: list[float] = []
    numbers = itertools.count()

    def timed(trainer: Trainer, *args: Any, **others: Any) -> Tensor:
        if next(numbers) in (WARMUP, WARMUP + steps):
            times.append(now())
        return TRAINING_STEP(trainer, *args, **others)

    Trainer.training_step = timed  # type: ignore[method-assign]
    return times


if __name__ == "__main__":
    console.run(main)
