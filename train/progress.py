"""The output of a run while it trains: progress, losses, and the development of its masks.

Shapes: B rows, L tokens, K masked positions of a row, V vocabulary.
"""

import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropy_masking.commands import console
from entropy_masking.masking.policy import SCORES, MaskPolicy
from entropy_masking.masking.selection import IGNORED
from train.arguments import global_batch

RISES, MIN_RISE = 3, 0.1  # warn after RISES evaluations in a row that are MIN_RISE nats above the lowest loss
MAX_CONCENTRATION = 0.1  # in text, two tokens have the same type with a probability of about 0.01
MAX_RATIO = 3  # to the concentration of the text, which is higher for a small vocabulary
REMEDY = "let scores choose fewer tokens: a smaller --hard-share, or a longer --mask-warmup"
# a loss has other causes too
IF_BETTER = f"if a run with --entropy-source random does better, {REMEDY}; otherwise lower the learning rate"
SHOWN = [prefix + name for name in SCORES for prefix in ("", "masked_")]  # logged values that the console shows too
MIN_TOKENS = 100  # fewer tokens do not give the concentration


def score_sums(name: str, score_BL: Tensor, candidates_BL: Tensor, positions_BK: Tensor) -> dict[str, Tensor]:
    """(sum, count) [2] float64 of the scores of all candidates and, as ``masked_…``, of the masked positions."""
    known_BL = candidates_BL & ~score_BL.isnan()
    where_BK = positions_BK.clamp_min(0)
    masked_BK = (positions_BK != IGNORED) & known_BL.gather(1, where_BK)
    return {
        name: _sum_and_count(score_BL, known_BL),
        f"masked_{name}": _sum_and_count(score_BL.gather(1, where_BK), masked_BK),
    }


def _sum_and_count(values: Tensor, where: Tensor) -> Tensor:
    return torch.stack([values.double().where(where, 0.0).sum(), where.sum().double()])


def type_concentration(count_V: Tensor) -> float:
    """Σ n_t (n_t − 1) / (n (n − 1)) over the types of n tokens: the probability that two of them have the same type.

    0 for fewer than ``MIN_TOKENS`` tokens.
    """
    n, count_V = int(count_V.sum()), count_V.double()
    return float((count_V * (count_V - 1)).sum()) / (n * (n - 1)) if n >= MIN_TOKENS else 0.0


class CollapseWarnings(TrainerCallback):
    """Warns if masking may make a run worse, once per sign. ``by_sign`` holds the warnings so far.

    Args:
        concentration: of the training text, see ``type_concentration``; masks concentrate if theirs is much higher.
    """

    def __init__(self, policy: MaskPolicy, concentration: float = 0.0) -> None:
        self.policy, self.concentration = policy, concentration
        self.by_sign: dict[str, str] = {}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Check the whole history, which includes that before a resume."""
        if not self.policy.uses_scores:
            return
        warmup = self.policy.warmup * state.max_steps
        for sign, sentence in collapse_signs(state.log_history, warmup, self.concentration):
            if sign not in self.by_sign:
                self.by_sign[sign] = f"{sentence}; {REMEDY if sign == 'concentration' else IF_BETTER}"
                if state.is_world_process_zero:
                    print(f"warning: {self.by_sign[sign]}", file=sys.stderr, flush=True)


def collapse_signs(history: list[dict[str, float]], warmup: float, in_text: float = 0.0) -> Iterator[tuple[str, str]]:
    """Name and sentence of each sign of a collapse in Trainer's history after ``warmup`` steps, in the order of steps.

    The held-out loss stays above its lowest value, which the warm-up may have reached, for several evaluations; or the
    masks concentrate on a few token types, much more than the text does.

    Args:
        in_text: the concentration of the text.
    """
    lowest, above, evaluated = math.inf, 0, -1.0
    for entry in history:
        step, loss, concentration = entry["step"], entry.get("eval_loss"), entry.get("mask_concentration", 0.0)
        if loss is not None and step != evaluated:  # a run is evaluated once more at its end
            evaluated = step
            above = above + 1 if loss > lowest + MIN_RISE and step >= warmup else 0
            lowest = min(lowest, loss)
            if above == RISES:
                where = f"{RISES} evaluations in a row up to step {step}"
                yield "rise", f"the held-out loss was above its lowest value, {lowest:.2f} nats, at {where}"
        if concentration > max(MAX_CONCENTRATION, MAX_RATIO * in_text) and step >= warmup:
            pairs = f"two masked tokens had the same type with a probability of {concentration:.0%}"
            yield "concentration", f"at step {step} {pairs}, so the masks concentrate on a few types"


class ProgressReport(TrainerCallback):
    """A bar on a terminal or lines in a log, and the losses; counts the seconds of training over all sessions."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.before, self.started = 0.0, time.monotonic()
        self.progress: console.Progress | None = None

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        self.before = max((entry.get("train_seconds", 0.0) for entry in state.log_history), default=0.0)
        self.started = time.monotonic()
        self.tokens_per_step = global_batch(args) * self.sequence_length
        if state.is_world_process_zero:
            total, done = state.max_steps * self.tokens_per_step, state.global_step * self.tokens_per_step
            self.progress = console.Progress(total, "tok", "training", done=done).__enter__()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        self.started += event["metrics"]["eval_seconds"]  # evaluation is not training

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.progress:
            self.progress.advance(self.tokens_per_step)
        # a logged loss is a mean since the last log: with a log at every checkpoint, a resume does not change it
        if control.should_save or control.should_training_stop:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        if not self.progress:
            return
        logs, step = event["logs"], f"step {state.global_step}/{state.max_steps}"
        if "loss" in logs:
            shown = [f"{name.replace('_', ' ')} {logs[name]:.2f}" for name in logs if name in SHOWN]
            losses = f"loss {logs['loss']:.4f}, lr {logs['learning_rate']:.2e}"
            console.note(f"{step}: {', '.join([losses, *shown])}")
        elif "eval_loss" in logs:
            accuracy = f"accuracy {logs['eval_accuracy']:.1%}"
            console.note(f"{step}: held-out loss {logs['eval_loss']:.4f} nats, {accuracy}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.progress:
            self.progress.__exit__(None, None, None)
