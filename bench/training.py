#!/usr/bin/env python3
"""How fast each regime trains, against the stock Trainer with its collator and against the other regimes.

    python bench/training.py --shards runs/scored

The shards need entropies and top-k log-probabilities. Every contestant trains the same model on the same shards in a
process of its own, with one dtype, number of threads and malloc. Each runs beside `random`, and a ratio compares the
two; on a GPU they run one after the other. A separate pass measures the parts of a step, because it waits for the GPU
after each of them. Prints a table with the budgets, and as the last line the same as one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import resource
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers import DataCollatorForLanguageModeling, Trainer

import train.run
from bench.commands import keep_buffers, measure_in_child, new_parser
from bench.recipes import AT_ONCE
from bench.table import Row, device_name, now, peak_flops, print_table, row
from entropy_masking.commands import console
from entropy_masking.commands.flags import positive
from entropy_masking.masking.masker import Masker
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.models.checkpoints import resolve_dtype
from entropy_masking.models.flops import forward_flops, training_flops
from entropy_masking.shards.manifests import read_manifest, shard_tokenizer
from train.arguments import training_arguments
from train.data import TrainingSequences
from train.options import parse as parse_run
from train.student import build_student

CONTESTANTS = {  # flags of train/run.py
    "stock": "--entropy-source random",
    "random": "--entropy-source random",
    "parquet": f"--entropy-source parquet {AT_ONCE}",
    "parquet_kd": f"--entropy-source parquet --distill-weight 0.5 {AT_ONCE}",
    "self": f"--entropy-source self {AT_ONCE}",
    "self_step": f"--entropy-source self --self-refresh step {AT_ONCE}",
    "excess": "--entropy-source parquet --hard-share 0 --predict-ratio 0.15 --predict-by excess",
    "muon": "--entropy-source random --optim muon",
}
BUDGETS = {"parquet": 1.05, "parquet_kd": 1.05, "self": 1.02}  # of the time of random
COUNTED = ("random", "parquet_kd")  # their FLOPs are printed: one forward, and the head at the masked positions
WARMUP = 3  # steps that are not counted: allocations, compilation
PARTS = ("load", "mask", "encoder", "head", "backward", "optimizer")


def main() -> None:
    args = parse()
    keep_buffers()
    if args.child:
        print(json.dumps(train_once(args)))
        return
    # at the same time, so that other work on the machine slows both; a GPU has room for one
    pool = ThreadPoolExecutor(1 if torch.cuda.is_available() else 2)
    peak, goal = peak_flops(args.dtype), 0.45 if args.model == "base" else None
    rows: dict[str, Row] = {}
    for name in [name for name in CONTESTANTS if name != "random"]:
        pair = "random", name
        rounds = [list(pool.map(functools.partial(measure_in_child, "--child"), pair)) for _ in range(args.rounds)]
        seconds = np.array([[result["seconds"] for result in results] for results in rounds]).T
        for contestant, own, result in zip(pair, seconds, rounds[0], strict=True):
            rows[contestant] = row(result["tokens"] / own, "tokens/s")
            rows[f"{contestant}_peak_memory"] = row(result["peak_bytes"] / 2**20, "MiB")
            if contestant in COUNTED:
                rows[f"{contestant}_flops"] = row(result["flops"], "FLOPs a step")
            if contestant in COUNTED and peak:
                rows[f"{contestant}_share_of_peak"] = row(result["flops"] / own / peak, "of the peak", at_least=goal)
        rows[f"{name}_step_to_random"] = row(seconds[1] / seconds[0], "× the time", at_most=BUDGETS.get(name))
    rows["random_to_stock"] = row(rows["stock_step_to_random"].value, "×", at_least=2)
    for name in CONTESTANTS:
        for part, part_seconds in measure_in_child("--child", name, "--parts")["parts"].items():
            if part_seconds:
                rows[f"{name}_{part}"] = row(part_seconds * 1e3, "ms a step")
    del args.child, args.parts
    print_table(rows, vars(args) | {"device": device_name()})


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
    add("--child", help=argparse.SUPPRESS)
    add("--parts", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = resolve_dtype(args.dtype)
    return args


def train_once(args: argparse.Namespace) -> dict[str, Any]:
    """Train some steps: seconds, tokens and FLOPs of a step, its parts in seconds, and the peak of memory in bytes."""
    torch.set_num_threads(args.threads)
    clock = Clock(args.steps, args.parts)
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
        flags = ["--shards", args.shards, "--model", args.model, "--output-dir", output, "--optim", "adamw_torch_fused"]
        flags += ["--per-device-train-batch-size", args.batch, "--max-steps", WARMUP + args.steps + 1]
        # to log a loss is to wait for the device
        flags += ["--logging-steps", 1 << 20, "--save-strategy", "no", "--eval-fraction", "0"]
        flags += ["--bf16", args.dtype == "bfloat16"] + ["--torch-compile"] * args.torch_compile
        if args.parts:  # a worker's time would not be part of the step, and a fork cannot wait for the GPU
            flags += ["--dataloader-num-workers", 0]
        line = [str(flag) for flag in flags] + CONTESTANTS[args.child].split()
        if args.child == "stock":
            train_stock(line, clock)
        else:
            clock.wrap(TrainingSequences, "__getitems__", "load")
            clock.wrap(Masker, "__call__", "mask")
            train.run.main(line)
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    manifest = read_manifest(args.shards)
    length = manifest.sequence_length
    encoder, head = forward_flops(build_student(args.model, manifest, seed=0).masked_lm, length)
    return {
        "seconds": clock.seconds / args.steps,
        "tokens": args.batch * length,
        "parts": {part: seconds / args.steps for part, seconds in clock.parts.items()},
        "peak_bytes": peak,
        "flops": training_flops(encoder, head, sequences=args.batch, predicted=MaskPolicy().max_masked(length)),
    }


def train_stock(line: list[str], clock: Clock) -> None:
    """``transformers.Trainer`` as run_mlm.py uses it: its collator, the head at every position, the same arguments."""
    options, given = parse_run(line, None)
    arguments = training_arguments(options, given)
    manifest = read_manifest(options.shards)
    student = build_student(options.model, manifest, arguments.seed)
    files = [manifest.shard_uri(entry) for entry in manifest.shards]
    rows = datasets.load_dataset("parquet", data_files=files, split="train", columns=["input_ids"])
    collator = DataCollatorForLanguageModeling(shard_tokenizer(manifest.uri), mlm_probability=MaskPolicy.ratio)
    clock.wrap(DataCollatorForLanguageModeling, "torch_call", "mask")
    clock.wrap(type(rows), "__getitems__", "load")
    Trainer(student, arguments, train_dataset=rows, data_collator=collator).train()


class Clock:
    """Counts the seconds of steps and parts of steps. It patches classes for good, because a process trains once."""

    def __init__(self, steps: int, by_part: bool) -> None:
        self.by_part = by_part
        self.seconds = 0.0
        self.parts: dict[str, float] = {}
        self.running = dict.fromkeys(PARTS, 0.0)
        self.inner: list[float] = []  # of each part that is open: seconds of the parts within it
        self.step = 0
        training_step = Trainer.training_step

        def timed(trainer: Trainer, model: Any, *args: Any, **others: Any) -> Any:
            if not self.step and not trainer.args.torch_compile:  # a compiled model has no parts
                base = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
                self.wrap(base.base_model, "forward", "encoder")
                self.wrap(base, "forward", "head")
            if self.step == WARMUP:
                self.seconds = -now()
                self.running = dict.fromkeys(PARTS, 0.0)
            if self.step == WARMUP + steps:
                self.seconds += now()
                self.parts = dict(self.running)
            self.step += 1
            return training_step(trainer, model, *args, **others)

        Trainer.training_step = timed  # type: ignore[method-assign]
        self.wrap(Accelerator, "backward", "backward")
        self.wrap(AcceleratedOptimizer, "step", "optimizer")

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Count the seconds of a method, without those of the parts that it calls."""
        if not self.by_part:
            return
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*args: Any, **others: Any) -> Any:
            self.inner.append(0.0)
            started = now()
            result = method(*args, **others)
            seconds = now() - started
            self.running[part] += seconds - self.inner.pop()
            if self.inner:
                self.inner[-1] += seconds
            return result

        setattr(owner, name, timed)


if __name__ == "__main__":
    console.run(main)
