#!/usr/bin/env python3
"""How fast each regime trains, against the stock Trainer with its collator and against each other.

    python bench/training.py --shards runs/scored
    python bench/training.py --shards runs/scored --model mini --batch 64 --steps 20 --rounds 5

The shards need entropies and top-k log-probabilities. Every contestant trains the same model on the same shards in a
process of its own, in turns, with one dtype, number of threads and malloc; a ratio is of one round's times. An extra
pass of each contestant times the parts of a step, because it has to wait for a GPU after each part. Prints a table with
the budgets, and as the last line the same as one JSON object.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import train.run
from bench.table import Row, device_name, keep_buffers, last_line, now, parser, peak_flops, print_table, row
from entropy_masking.commands import console
from entropy_masking.masking.masker import IGNORED_LABEL, Masker
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.models.checkpoints import resolve_dtype
from entropy_masking.models.flops import forward_flops, training_flops
from entropy_masking.shards.manifests import Manifest, load_tokenizer, read_manifest
from entropy_masking.shards.read import Columns
from train.data import TrainingSequences, masker_of
from train.options import parse as parse_run
from train.student import build_student

AT_ONCE = "--mask-warmup 0 --mask-ramp 0"
OURS = {
    "random": "--entropy-source random",
    "parquet": f"--entropy-source parquet {AT_ONCE}",
    "parquet_kd": f"--entropy-source parquet --distill-weight 0.5 {AT_ONCE}",
    "self": f"--entropy-source self {AT_ONCE}",
    "self_step": f"--entropy-source self --self-refresh step {AT_ONCE}",
    "excess": "--entropy-source parquet --hard-share 0 --predict-ratio 0.075 --predict-by excess",
    "muon": "--entropy-source random --optim muon",
}
STOCK_SAME_MASKS = "stock_same_masks"  # the stock Trainer with the masks of our random regime
BUDGETS = {"parquet": 1.05, "parquet_kd": 1.05, "self": 1.02, "self_step": None, "excess": None, "muon": None}
WARMUP = 3  # steps that are not counted: allocations, compilation
PARTS = ("load", "mask", "encoder", "head", "backward", "optimizer")

Runs = dict[str, list[dict[str, Any]]]  # what ``train_once`` gives in each round, by contestant


def main() -> None:
    args = parse()
    keep_buffers()
    if args.child:
        print(json.dumps(train_once(args)))
        return
    runs: Runs = {name: [] for name in ("stock", *OURS)}
    for _ in range(args.rounds):
        for name, results in runs.items():
            results.append(json.loads(last_line(name, *sys.argv, "--child", name)))
    names = [*runs, STOCK_SAME_MASKS]
    parts = {name: json.loads(last_line(name, *sys.argv, "--child", name, "--parts")) for name in names}
    rates = {name: values(runs, name, "tokens_per_second") for name in runs}
    rows = {name: row(rates[name], "tokens/s") for name in runs}
    rows["random_to_stock"] = row(rates["random"] / rates["stock"], "×", at_least=2)
    for name, most in BUDGETS.items():
        rows[f"{name}_step_to_random"] = row(rates["random"] / rates[name], "× the time", at_most=most)
    rows |= {f"{name}_peak_memory": row(values(runs, name, "peak_bytes") / 2**20, "MiB") for name in runs}
    rows["loss_difference"] = row(loss_difference(parts[STOCK_SAME_MASKS], parts["random"]), "nats")
    for name in runs:
        timed = {part: seconds for part, seconds in parts[name]["parts"].items() if seconds}
        rows |= {f"{name}_{part}": row(seconds * 1e3, "ms a step") for part, seconds in timed.items()}
    rows |= utilisation(args, runs)
    del args.child, args.parts
    print_table(rows, vars(args) | {"device": device_name()})


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    add = flags.add_argument
    add("--shards", required=True, help="shard directory with entropies and top-k log-probabilities")
    add("--model", default="mini", help="as for train/run.py (default: mini)")
    add("--batch", type=console.positive, default=64, help="sequences a step (default: 64)")
    add("--steps", type=console.positive, default=12, help="measured steps of a round (default: 12)")
    add("--rounds", type=console.positive, default=3)
    add("--threads", type=console.positive, default=1, help="torch threads of every contestant (default: 1)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of every contestant's autocast")
    add("--torch-compile", action="store_true", help="compile the model of every contestant")
    add("--child", help=argparse.SUPPRESS)
    add("--parts", action="store_true", help=argparse.SUPPRESS)
    args = flags.parse_args()
    args.dtype = resolve_dtype(args.dtype)
    return args


def values(runs: Runs, name: str, measure: str) -> np.ndarray:
    return np.array([result[measure] for result in runs[name]])


def loss_difference(stock: dict[str, Any], ours: dict[str, Any]) -> float:
    """The largest difference of a step's loss on the same masks, in nats: the head everywhere or at masked positions.

    Batches with a padded row are left out: there our mean divides by more positions than the stock one.
    """
    steps = [step for step, whole in enumerate(stock["whole"][: len(stock["losses"])]) if whole]
    return np.abs(np.array(stock["losses"])[steps] - np.array(ours["losses"])[steps]).max()


def utilisation(args: argparse.Namespace, runs: Runs) -> dict[str, Row]:
    """FLOPs of a step of ours, and on a GPU their share of its peak."""
    peak, goal = peak_flops(args.dtype), 0.45 if args.model == "base" else None
    rows = {}
    for name in ("random", "parquet_kd"):
        flops, seconds = runs[name][0]["flops"], values(runs, name, "seconds_per_step")
        rows[f"{name}_flops"] = row(flops, "FLOPs a step")
        share = row(flops / seconds / peak, "of the peak", at_least=goal) if peak else Row(None, "of the peak")
        rows[f"{name}_share_of_peak"] = share
    return rows


# --- one contestant --------------------------------------------------------------------------------------------------


def train_once(args: argparse.Namespace) -> dict[str, Any]:
    """Train some steps; returns the time of a step, peak memory and FLOPs, and with ``--parts`` the parts' times."""
    torch.set_num_threads(args.threads)
    clock = Clock(args.parts, last=WARMUP + args.steps)
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
        flags = ["--shards", args.shards, "--model", args.model, "--output-dir", output, "--optim", "adamw_torch_fused"]
        flags += ["--per-device-train-batch-size", args.batch, "--max-steps", WARMUP + args.steps + 1]
        # a logged loss makes the run wait for the device
        flags += ["--logging-steps", 1 if args.parts else 1 << 20, "--save-strategy", "no", "--eval-fraction", "0"]
        flags += ["--bf16", args.dtype == "bfloat16"] + ["--torch-compile"] * args.torch_compile
        ours = [*map(str, flags), *OURS.get(args.child, OURS["random"]).split()]
        with clock.running():
            if args.child in OURS:
                clock.wrap(TrainingSequences, "__getitems__", "load")
                clock.wrap(Masker, "__call__", "mask")
                train.run.main(ours)
            else:
                train_stock(ours, clock, same_masks=args.child == STOCK_SAME_MASKS)
    seconds = (clock.until - clock.since) / args.steps
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    manifest = read_manifest(args.shards)
    length = manifest.sequence_length
    forward = forward_flops(build_student(args.model, manifest, seed=0).masked_lm, length)
    return {
        "seconds_per_step": seconds,
        "tokens_per_second": args.batch * length / seconds,
        "parts": {part: total / args.steps for part, total in clock.counted.items()},
        "losses": clock.losses,
        "whole": clock.whole,
        "peak_bytes": peak,
        "flops": training_flops(*forward, sequences=args.batch, predicted=MaskPolicy().positions(length)),
    }


def train_stock(flags: list[str], clock: Clock, same_masks: bool) -> None:
    """``transformers.Trainer`` as run_mlm.py has it: its collator, the head at every position, the same arguments.

    Args:
        same_masks: use the masks of our random regime instead of the stock collator's.
    """
    options, arguments = parse_run(flags, None)
    manifest = read_manifest(options.shards)
    student = build_student(options.model, manifest, arguments.seed)
    if same_masks:
        rows, collate = our_masks(manifest, arguments, clock.whole), lambda batch: batch
        arguments.train_sampling_strategy = "sequential"
    else:
        files = [manifest.shard_uri(entry) for entry in manifest.shards]
        rows = datasets.load_dataset("parquet", data_files=files, split="train", columns=["input_ids"])
        collate = DataCollatorForLanguageModeling(load_tokenizer(manifest.uri), mlm_probability=0.15)
        arguments.train_sampling_strategy = "random"
        clock.wrap(DataCollatorForLanguageModeling, "torch_call", "mask")
        clock.wrap(type(rows), "__getitems__", "load")
    Trainer(student, arguments, train_dataset=rows, data_collator=collate).train()


def our_masks(manifest: Manifest, arguments: TrainingArguments, whole: list[bool]) -> TrainingSequences:
    """The batches of our random regime for the stock forward; ``whole`` records which have no padded row."""
    masker, policy = masker_of(manifest), MaskPolicy.random(seed=arguments.seed)

    def prepare(raw: dict[str, Any]) -> dict[str, Any]:
        masked = masker(raw, policy)
        labels_BL = torch.full_like(masked["input_ids"], IGNORED_LABEL)
        rows, slots = (masked["labels_BP"] != IGNORED_LABEL).nonzero(as_tuple=True)
        whole.append(len(rows) == masked["labels_BP"].numel())
        labels_BL[rows, masked["positions_BP"][rows, slots]] = masked["labels_BP"][rows, slots]
        return {"input_ids": masked["input_ids"], "labels": labels_BL}

    size = arguments.max_steps * arguments.train_batch_size
    shards = [entry for entry in manifest.shards if entry.rows]
    return TrainingSequences(manifest, shards, Columns(), size=size, seed=arguments.seed, prepare=prepare)


class Clock:
    """Times the counted steps, and on request their parts.

    It wraps the parts of a step and adds up their seconds. Time in a part that another part calls counts for the inner
    one alone.
    """

    def __init__(self, parts: bool, last: int) -> None:
        self.wants_parts, self.last = parts, last
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.counted: dict[str, float] = {}
        self.steps = 0
        self.since = self.until = 0.0
        self.losses: list[float] = []
        self.whole: list[bool] = []
        self.stack: list[float] = []  # seconds of the parts within each open part
        self.undo = contextlib.ExitStack()

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Count the seconds of a method."""
        if not self.wants_parts:
            return
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*args: Any, **others: Any) -> Any:
            self.stack.append(0.0)
            started = now()
            try:
                return method(*args, **others)
            finally:
                seconds = now() - started
                self.seconds[part] += seconds - self.stack.pop()
                if self.stack:
                    self.stack[-1] += seconds

        self.replace(owner, name, timed)

    def replace(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        self.undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, method)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time what is common to all contestants; a step begins where Trainer begins it."""
        training_step, log = Trainer.training_step, Trainer.log

        def step(trainer: Trainer, model: Any, *args: Any, **others: Any) -> Any:
            if not self.steps and not trainer.args.torch_compile:  # a compiled model has no parts
                base = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
                self.wrap(base.base_model, "forward", "encoder")
                self.wrap(base, "forward", "head")
            if self.steps == WARMUP:
                self.since, self.counted = now(), dict(self.seconds)
            if self.steps == self.last:
                self.until, self.counted = now(), {part: self.seconds[part] - self.counted[part] for part in PARTS}
            self.steps += 1
            return training_step(trainer, model, *args, **others)

        def log_loss(trainer: Trainer, logs: dict[str, float], *args: Any, **others: Any) -> None:
            self.losses += [logs["loss"]] if "loss" in logs else []
            log(trainer, logs, *args, **others)

        with self.undo:
            self.replace(Trainer, "training_step", step)
            self.replace(Trainer, "log", log_loss)
            self.wrap(Accelerator, "backward", "backward")
            self.wrap(AcceleratedOptimizer, "step", "optimizer")
            yield


if __name__ == "__main__":
    console.run(main)
