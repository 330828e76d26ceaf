#!/usr/bin/env python3
"""How fast each regime trains, against the stock Trainer with its collator and against each other.

    python bench/training.py --shards runs/scored
    python bench/training.py --shards runs/scored --model mini --batch 64 --steps 20 --rounds 5

The shards need entropies and top-k log-probabilities. Every contestant trains the same model on the same shards in a
process of its own, in turns, with one dtype, number of threads and malloc; a ratio is of one round's times. Where the
time of a step goes comes from a pass of its own, since a GPU has to be waited for after each part. Prints a table with
the budgets, and as the last line the same as one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers import DataCollatorForLanguageModeling, Trainer

import train.run
from bench.table import Row, keep_buffers, peak_flops, print_table, row
from entropy_masking.commands import console
from entropy_masking.errors import RunError
from entropy_masking.masking.masker import IGNORED_LABEL, Masker
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.models.checkpoints import resolve_dtype
from entropy_masking.models.flops import forward_flops, training_flops
from entropy_masking.shards.manifests import Manifest, load_tokenizer, read_manifest
from entropy_masking.shards.read import Columns, masker_of
from train.data import TrainingSequences
from train.options import parse as parse_run
from train.student import build_student

AT_ONCE = ["--mask-warmup", "0", "--mask-ramp", "0"]
OURS = {
    "random": ["--entropy-source", "random"],
    "parquet": ["--entropy-source", "parquet", *AT_ONCE],
    "parquet_kd": ["--entropy-source", "parquet", "--distill-weight", "0.5", *AT_ONCE],
    "self": ["--entropy-source", "self", *AT_ONCE],
    "self_step": ["--entropy-source", "self", "--self-refresh", "step", *AT_ONCE],
    "excess": [
        "--entropy-source",
        "parquet",
        "--hard-share",
        "0",
        "--predict-ratio",
        "0.075",
        "--predict-by",
        "excess",
    ],
    "muon": ["--entropy-source", "random", "--optim", "muon"],
}
CONTESTANTS = ["stock", *OURS]
BUDGETS = {"parquet": 1.05, "parquet_kd": 1.05, "self": 1.02, "self_step": None, "excess": None, "muon": None}
WARMUP = 3  # steps that are not counted: allocations, compilation
PARTS = ("load", "mask", "encoder", "head", "backward", "optimizer")


def main() -> None:
    args = parse()
    keep_buffers()
    if args.child:
        print(json.dumps(train_once(args)))
        return
    rounds = [{name: in_a_process(name) for name in CONTESTANTS} for _ in range(args.rounds)]
    taken_apart = {name: in_a_process(name, "--parts") for name in [*CONTESTANTS, "stock_same_masks"]}
    columns = {name: [each[name] for each in rounds] for name in CONTESTANTS}
    rates = {name: np.array([each["tokens_per_second"] for each in found]) for name, found in columns.items()}
    rows = {name: row(rates[name], "tokens/s") for name in CONTESTANTS}
    rows["random_to_stock"] = row(rates["random"] / rates["stock"], "×", at_least=2)
    for name, most in BUDGETS.items():
        rows[f"{name}_step_to_random"] = row(rates["random"] / rates[name], "× the time", at_most=most)
    for name, found in columns.items():
        rows[f"{name}_peak_memory"] = row(np.array([each["peak_bytes"] for each in found]) / 2**20, "MiB")
    rows["loss_difference"] = row(same_losses(taken_apart["stock_same_masks"], taken_apart["random"]), "nats")
    for name in CONTESTANTS:
        for part, seconds in taken_apart[name]["parts"].items():
            if seconds:
                rows[f"{name}_{part}"] = row(seconds * 1e3, "ms a step")
    rows |= utilisation(args, columns)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    del args.child, args.parts
    print_table(rows, vars(args) | {"device": device})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
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
    args = parser.parse_args()
    args.dtype = resolve_dtype(args.dtype)
    return args


def in_a_process(name: str, *flags: str) -> dict[str, Any]:
    """What ``train_once`` finds of a contestant: in its own process, so that its memory is its own."""
    ran = subprocess.run([sys.executable, *sys.argv, "--child", name, *flags], capture_output=True, text=True)
    if ran.returncode:
        raise RunError(f"{name} failed: {' '.join(ran.stderr.split())[-500:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def same_losses(stock: dict[str, Any], ours: dict[str, Any]) -> np.ndarray:
    """The largest difference of a step's loss, the head at all positions or at the masked ones, on the same masks.

    Batches with a padded row are left out: ours is a mean over a constant number of positions, there is one less.
    """
    steps = [step for step, whole in enumerate(stock["whole"][: len(stock["losses"])]) if whole]
    return np.abs(np.array(stock["losses"])[steps] - np.array(ours["losses"])[steps]).max()


def utilisation(args: argparse.Namespace, columns: dict[str, list[dict[str, Any]]]) -> dict[str, Row]:
    """FLOPs of a step of ours, and on a GPU the share of its peak that they are."""
    peak, goal = peak_flops(args.dtype), 0.45 if args.model == "base" else None
    found = {}
    for name in ("random", "parquet_kd"):
        flops, seconds = columns[name][0]["flops"], np.array([each["seconds_per_step"] for each in columns[name]])
        found[f"{name}_flops"] = row(flops, "FLOPs a step")
        share = row(flops / seconds / peak, "of the peak", at_least=goal) if peak else Row(None, "of the peak")
        found[f"{name}_share_of_peak"] = share
    return found


# --- one contestant --------------------------------------------------------------------------------------------------


def train_once(args: argparse.Namespace) -> dict[str, Any]:
    """Train some steps, and say how long a step takes, and the peak of memory; or what of it which part, and losses."""
    torch.set_num_threads(args.threads)
    clock = Clock(args.parts, last=WARMUP + args.steps)
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
        flags = ["--shards", args.shards, "--model", args.model, "--output-dir", output, "--optim", "adamw_torch_fused"]
        flags += ["--per-device-train-batch-size", args.batch, "--max-steps", WARMUP + args.steps + 1]
        # a loss is asked of the device only where it is looked at
        flags += ["--logging-steps", 1 if args.parts else 1 << 20, "--save-strategy", "no", "--eval-fraction", "0"]
        flags += ["--bf16", args.dtype == "bfloat16"] + ["--torch-compile"] * args.torch_compile
        ours = [str(flag) for flag in [*flags, *OURS.get(args.child, OURS["random"])]]
        with clock.running():
            if args.child in OURS:
                clock.wrap(TrainingSequences, "__getitems__", "load")
                clock.wrap(Masker, "__call__", "mask")
                train.run.main(ours)
            else:
                train_stock(ours, clock, same_masks=args.child == "stock_same_masks")
    seconds = (clock.until - clock.since) / args.steps
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    manifest = read_manifest(args.shards)
    return {
        "seconds_per_step": seconds,
        "tokens_per_second": args.batch * manifest.sequence_length / seconds,
        "parts": clock.parts(),
        "losses": clock.losses,
        "whole": clock.whole,
        "peak_bytes": peak,
        "flops": training_flops(
            *forward_flops(build_student(args.model, manifest, seed=0).masked_lm, manifest.sequence_length),
            sequences=args.batch,
            predicted=MaskPolicy().positions(manifest.sequence_length),
        ),
    }


def train_stock(flags: list[str], clock: Clock, same_masks: bool) -> None:
    """``transformers.Trainer`` as run_mlm.py has it: its collator, the head at every position, the same arguments.

    Args:
        same_masks: in place of the stock collator's masks those of our random regime.
    """
    import datasets

    options, arguments = parse_run(flags, None)
    manifest = read_manifest(options.shards)
    student = build_student(options.model, manifest, arguments.seed)
    files = [manifest.shard_uri(entry) for entry in manifest.shards]
    rows = datasets.load_dataset("parquet", data_files=files, split="train", columns=["input_ids"])
    tokenizer = load_tokenizer(manifest.uri)
    collate: Callable[..., Any] = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MaskPolicy.ratio)
    if same_masks:
        rows, collate = our_masks(manifest, arguments, clock.whole), lambda batch: batch
    else:
        clock.wrap(DataCollatorForLanguageModeling, "torch_call", "mask")
        clock.wrap(type(rows), "__getitems__", "load")
    arguments.train_sampling_strategy = "sequential" if same_masks else "random"
    Trainer(student, arguments, train_dataset=rows, data_collator=collate).train()


def our_masks(manifest: Manifest, arguments: Any, whole: list[bool]) -> TrainingSequences:
    """The batches of our random regime as the stock forward takes them; ``whole`` notes which have no padded row."""
    masker, policy = masker_of(manifest), MaskPolicy.random(seed=arguments.seed)

    def prepare(raw: dict[str, Any]) -> dict[str, Any]:
        masked = masker(raw, policy)
        labels_BL = torch.full_like(masked["input_ids"], IGNORED_LABEL)
        real_BP = masked["labels_BP"] != IGNORED_LABEL
        whole.append(bool(real_BP.all()))
        rows_BK = torch.arange(len(labels_BL))[:, None].expand_as(real_BP)
        labels_BL[rows_BK[real_BP], masked["positions_BP"][real_BP]] = masked["labels_BP"][real_BP]
        return {"input_ids": masked["input_ids"], "labels": labels_BL}

    size = arguments.max_steps * arguments.train_batch_size
    shards = [entry for entry in manifest.shards if entry.rows]
    return TrainingSequences(manifest, shards, Columns(), size=size, seed=arguments.seed, prepare=prepare)


class Clock:
    """How long the counted steps take together, and if asked for their parts.

    Wraps the parts of a step to add up their seconds; what a part calls of another is the other's alone.
    """

    def __init__(self, parts: bool, last: int) -> None:
        self.wants_parts, self.last = parts, last
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.counted: dict[str, float] = {}
        self.steps = 0
        self.since = self.until = 0.0
        self.losses: list[float] = []
        self.whole: list[bool] = []
        self.stack: list[float] = []  # seconds of the parts within the one that is open
        self.undo: list[Callable[[], None]] = []

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
                took = now() - started
                self.seconds[part] += took - self.stack.pop()
                if self.stack:
                    self.stack[-1] += took

        setattr(owner, name, timed)
        self.undo.append(lambda: setattr(owner, name, method))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what is common to all contestants, a step beginning where Trainer begins it."""
        training_step, log = Trainer.training_step, Trainer.log

        def step(trainer: Any, model: Any, *args: Any, **others: Any) -> Any:
            if not self.steps and not trainer.args.torch_compile:  # what is compiled is one piece
                base = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
                self.wrap(base.base_model, "forward", "encoder")
                self.wrap(base, "forward", "head")
            if self.steps == WARMUP:
                self.since, self.counted = now(), dict(self.seconds)
            if self.steps == self.last:
                self.until, self.counted = now(), {part: self.seconds[part] - self.counted[part] for part in PARTS}
            self.steps += 1
            return training_step(trainer, model, *args, **others)

        def note(trainer: Any, logs: dict[str, float], *args: Any, **others: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])
            log(trainer, logs, *args, **others)

        Trainer.training_step, Trainer.log = step, note  # type: ignore[method-assign]
        self.wrap(Accelerator, "backward", "backward")
        self.wrap(AcceleratedOptimizer, "step", "optimizer")
        try:
            yield
        finally:
            Trainer.training_step, Trainer.log = training_step, log  # type: ignore[method-assign]
            for undo in reversed(self.undo):
                undo()

    def parts(self) -> dict[str, float]:
        """Seconds a step of each part, over the counted steps."""
        return {part: seconds / (self.last - WARMUP) for part, seconds in self.counted.items()}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    console.run(main)
