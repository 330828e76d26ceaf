"""Fine-tuning one model on one task with one seed, by transformers.Trainer."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from glue import metrics
from glue.tasks import Split, Task, TaskData
from pipeline.checkpoints import load_config, max_length, safetensors_files
from pipeline.cli import UsageError

DROPOUT = 0.1
# what encoders call it; pretraining sets it to 0
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


@dataclass(frozen=True)
class Settings:
    """One way to fine-tune. ``scheduler`` by transformers' name; AdamW, weight decay 0.01, 6 % warm-up throughout.

    ``limit_train``: only so many training rows, drawn by a fixed seed; None for all.
    """

    learning_rate: float
    epochs: int
    batch_size: int
    scheduler: str = "linear"
    max_length: int = 128
    dropout: float = DROPOUT
    dtype: str = "float32"
    limit_train: int | None = None


@dataclass(frozen=True)
class Result:
    """``collapsed``: the model says the same of every row; ``constant_score``: what the best such model scores."""

    metrics: dict[str, float]
    collapsed: bool
    constant_score: float
    train_rows: int
    eval_rows: int

    @property
    def score(self) -> float:
        return metrics.score(self.metrics)


def check_model(directory: Path, length: int) -> None:
    """Refuse what is no pretrained encoder of ``length`` tokens: a pickle, no masked LM, fine-tuned already, too short.

    Raises:
        UsageError: says which.
    """
    safetensors_files(directory)
    config = load_config(directory)
    tuned = [name for name in config.architectures or [] if "ForSequenceClassification" in name]
    if tuned:
        raise UsageError(
            f"{directory} is fine-tuned already ({tuned[0]}); every task starts from the pretrained model, "
            "RTE, MRPC and STS-B never from MNLI"
        )
    longest = max_length(config) or length
    if not 8 <= length <= longest:
        raise UsageError(f"--max-length {length} must be between 8 and {longest}, the positions of {directory}")


def finetune(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    settings: Settings,
    seed: int,
    advance: Callable[[int], None],
) -> Result:
    """Fine-tune on the training rows and evaluate on the others.

    Args:
        directory: checkpoint of a masked LM.
        seed: of the new head, the order of rows and the dropout.
        advance: told the number of rows as they are trained on.

    Raises:
        UsageError: the checkpoint's encoder does not load whole.
    """
    train = limited(data.train, settings.limit_train)
    set_seed(seed)
    model = load_classifier(directory, data.task, settings.dropout)
    with tempfile.TemporaryDirectory() as temporary:
        arguments = TrainingArguments(
            output_dir=temporary,
            learning_rate=settings.learning_rate,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=128,
            lr_scheduler_type=settings.scheduler,
            warmup_steps=0.06,  # below 1 it is a share of all steps
            weight_decay=0.01,
            bf16=settings.dtype == "bfloat16",
            use_cpu=not torch.accelerator.is_available(),
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=encode(train, tokenizer, settings.max_length),  # type: ignore[arg-type]
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[_Advance(advance, settings.batch_size)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        values: dict[str, float] = {}
        constant = False
        for suffix, split in data.evaluations.items():
            rows: Any = encode(split, tokenizer, settings.max_length)
            logits_NC = np.asarray(trainer.predict(rows).predictions)
            predictions = logits_NC.argmax(1) if data.task.labels else logits_NC[:, 0]
            found = metrics.evaluate(data.task.metrics, split.labels, predictions)
            values |= {name + suffix: value for name, value in found.items()}
            constant = constant or metrics.collapsed(predictions)
    labels = [split.labels for split in data.evaluations.values()]
    constant_score = metrics.constant_score(data.task.metrics, labels, len(data.task.labels))
    return Result(values, constant, constant_score, len(train.labels), sum(map(len, labels)))


def limited(split: Split, rows: int | None) -> Split:
    """At most ``rows`` rows, the same whatever the seed of the run."""
    if rows is None or rows >= len(split.labels):
        return split
    kept = np.sort(np.random.default_rng(0).permutation(len(split.labels))[:rows])
    return Split([[texts[row] for row in kept] for texts in split.texts], split.labels[kept])


def trained_rows(data: TaskData, settings: Settings) -> int:
    """Rows that ``finetune`` reports to ``advance`` in all, to the last batch's rounding."""
    rows = min(len(data.train.labels), settings.limit_train or len(data.train.labels))
    return settings.epochs * math.ceil(rows / settings.batch_size) * settings.batch_size


def load_classifier(directory: Path, task: Task, dropout: float) -> Any:
    """The encoder with a new head; dropout is put back.

    Raises:
        UsageError: weights of the encoder are missing.
    """
    config = load_config(directory)
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    config.num_labels = len(task.labels) or 1
    config.problem_type = "single_label_classification" if task.labels else "regression"
    config.id2label = dict(enumerate(task.labels)) or {0: "score"}
    config.label2id = {name: number for number, name in config.id2label.items()}
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        directory, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    encoder = f"{model.base_model_prefix}."
    lost = [name for name in loading["missing_keys"] if name.startswith(encoder) and "pooler" not in name]
    if lost:
        raise UsageError(f"{directory} lacks weights of its encoder ({lost[0]}); use a complete checkpoint")
    return model


def encode(split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """Token ids of a text or a pair, cut to ``max_length``; padding is the collator's."""
    encoded = tokenizer(*split.texts, truncation=True, max_length=max_length)
    labels = split.labels.astype(np.float32) if split.labels.dtype.kind == "f" else split.labels
    rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    return [row | {"labels": label} for row, label in zip(rows, labels.tolist(), strict=True)]


class _Advance(TrainerCallback):
    def __init__(self, advance: Callable[[int], None], batch_size: int) -> None:
        self.advance, self.batch_size = advance, batch_size

    def on_step_end(self, *args: Any, **others: Any) -> None:
        self.advance(self.batch_size)
