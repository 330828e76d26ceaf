"""What a run shows while it trains: its progress, its losses, and what becomes of its masks."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline import cli
from train.masking import IGNORED, MaskPolicy

MOST_POINTS = 200  # of a curve in a run's summary
RISES, LEAST_RISE = 3, 0.1  # warn when this many evaluations in a row are this many nats above the lowest loss
MOST_CONCENTRATED = 0.1  # in text, two tokens have the same type with a probability of about 0.01
LEAST_TOKENS = 100  # to estimate it from


class Watch:
    """Running means, as sums on the device that computes them: nobody waits for them until they are logged."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, where: Tensor) -> None:
        """Count the values where ``where``, a bool of their shape."""
        self.add_sums(name, torch.stack([values.double().where(where, 0.0).sum(), where.sum().double()]))

    def add_sums(self, name: str, sum_and_count: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + sum_and_count

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means of what has been counted, and start afresh.

        Args:
            reduce: from a rank's sums to those of all of them.
        """
        names = sorted(self.sums)
        if not names:
            return {}
        sums_N2 = reduce(torch.stack([self.sums[name] for name in names])).tolist()
        self.sums = {}
        return {name: total / count for name, (total, count) in zip(names, sums_N2, strict=True) if count}


def score_sums(name: str, score_BL: Tensor, candidates_BL: Tensor, positions_BK: Tensor) -> dict[str, Tensor]:
    """(sum, count) [2] float64 of the scores, of all candidates and, as ``masked_…``, of the masked positions."""
    watch = Watch()
    known_BL = candidates_BL & ~score_BL.isnan()
    watch.add(name, score_BL, known_BL)
    where_BK = positions_BK.clamp_min(0)
    masked_BK = (positions_BK != IGNORED) & known_BL.gather(1, where_BK)
    watch.add(f"masked_{name}", score_BL.gather(1, where_BK), masked_BK)
    return watch.sums


def type_concentration(count_V: Tensor) -> float:
    """Σ n_t (n_t − 1) / (n (n − 1)) over the types of n tokens: the probability that two of them have the same type.

    0 for fewer than ``LEAST_TOKENS`` tokens, which tell nothing.
    """
    n, count_V = int(count_V.sum()), count_V.double()
    return float((count_V * (count_V - 1)).sum()) / (n * (n - 1)) if n >= LEAST_TOKENS else 0.0


def curve(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The losses of a Trainer's log as a curve: ``step``, ``seconds`` of training and ``loss`` or ``eval_loss``.

    Of each kind at most ``MOST_POINTS``, evenly among its steps, the last one included.
    """
    seconds: dict[int, float] = {}
    for entry in log:
        if "train_seconds" in entry:
            seconds.setdefault(entry["step"], round(entry["train_seconds"], 2))  # an evaluation does not count
    points = []
    for name in ("loss", "eval_loss"):
        # the last step may be evaluated twice
        found = list({entry["step"]: entry for entry in log if name in entry and entry["step"] in seconds}.values())
        stride = -(-len(found) // MOST_POINTS) or 1
        for entry in found[::-stride]:
            points.append({"step": entry["step"], "seconds": seconds[entry["step"]], name: entry[name]})
    return sorted(points, key=lambda point: point["step"])


class CollapseWatch(TrainerCallback):
    """Warns when masking makes a run worse, once per sign.

    Three signs, after the warm-up of the masks: the held-out loss stays above its lowest value for several evaluations;
    it is worse than a uniform guess; or the masks concentrate on a few token types.

    Attributes:
        warnings: those printed so far.
    """

    def __init__(self, policy: MaskPolicy, vocab_size: int) -> None:
        self.policy, self.guess = policy, math.log(vocab_size)
        self.warnings: list[str] = []

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **others: Any
    ) -> None:
        """Looks at the whole history, which a resumed run has too."""
        said, self.warnings = self.warnings, self.found(state.log_history, state.max_steps)
        for warning in self.warnings:
            if warning not in said and state.is_world_process_zero:
                print(f"warning: {warning}", file=sys.stderr, flush=True)

    def found(self, history: list[dict[str, Any]], max_steps: int) -> list[str]:
        """The warnings for a history of Trainer, at most one per sign."""
        if not self.policy.uses_scores:
            return []
        late = [entry for entry in history if entry["step"] >= self.policy.warmup * max_steps]
        signs: dict[str, str] = {}
        lowest, above = math.inf, 0
        for entry in late:
            step, loss = entry["step"], entry.get("eval_loss")
            if loss is not None:
                above = above + 1 if loss > lowest + LEAST_RISE else 0
                lowest = min(lowest, loss)
                if above == RISES:
                    signs.setdefault(
                        "rise",
                        f"the held-out loss was above its lowest value, {lowest:.2f} nats, at {RISES} evaluations in a "
                        f"row up to step {step}",
                    )
                if step and loss > self.guess + LEAST_RISE:  # random weights start a little above it
                    signs.setdefault(
                        "guess",
                        f"the held-out loss at step {step}, {loss:.2f} nats, is worse than a uniform guess, "
                        f"{self.guess:.2f}",
                    )
            if entry.get("mask_concentration", 0.0) > MOST_CONCENTRATED:
                signs.setdefault(
                    "concentration",
                    f"at step {step} two predicted tokens had the same type with a probability of "
                    f"{entry['mask_concentration']:.0%}, so the masks concentrate on a few types",
                )
        return [f"{sign}; use a smaller --hard-share or a longer --mask-warmup" for sign in signs.values()]


class ProgressReport(TrainerCallback):
    """A bar on a terminal, lines in a log, and the losses; counts a run's seconds of training, of all its sessions."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.before, self.started = 0.0, time.monotonic()
        self.progress: cli.Progress | None = None

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.before = max((entry.get("train_seconds", 0.0) for entry in state.log_history), default=0.0)
        self.started = time.monotonic()
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.tokens_per_step = batch * self.sequence_length
        if state.is_world_process_zero:
            total, done = state.max_steps * self.tokens_per_step, state.global_step * self.tokens_per_step
            self.progress = cli.Progress(total, "tok", "training", done=done).__enter__()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **others: Any
    ) -> None:
        self.started += metrics["eval_seconds"]  # an evaluation is no training

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if self.progress:
            self.progress.advance(self.tokens_per_step)
        # a logged loss is a mean since the last one: logged at every checkpoint, it is the same after a resume
        if args.logging_strategy != "no" and (control.should_save or control.should_training_stop):
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **others: Any
    ) -> None:
        if not self.progress or not logs:
            return
        if "loss" in logs:
            self.progress.note(
                f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}, lr {logs['learning_rate']:.2e}"
            )
        elif "eval_loss" in logs:
            self.progress.note(
                f"step {state.global_step}/{state.max_steps}: held-out loss {logs['eval_loss']:.4f} nats, "
                f"accuracy {logs['eval_accuracy']:.1%}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        if self.progress:
            self.progress.__exit__(None, None, None)
