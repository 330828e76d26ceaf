"""Fine-tunes one model on one task with one seed, in a plain loop.

Shapes: N rows, B rows of a batch, L tokens, C classes.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedModel, get_scheduler, set_seed

from entropy_masking.errors import RunError, UsageError
from entropy_masking.models.checkpoints import load_config, load_model, safetensors_files
from glue import metrics
from glue.batches import TaskTokens, Tokens, batches_by_length, shuffled_batches
from glue.protocols import RECIPE, Settings
from glue.tasks import GLUE, Task

# names of dropout in configurations; pretraining sets it to 0
DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"),
    *("embedding_dropout", "mlp_dropout", "classifier_dropout"),
)
EVAL_BATCH = 128


def check_model(directory: Path, length: int, trust_remote_code: bool) -> None:
    """Raises UsageError if a model cannot be fine-tuned on sequences of ``length`` tokens."""
    safetensors_files(directory)
    config = load_config(directory, trust_remote_code)
    tuned = [name for name in config.architectures or [] if "ForSequenceClassification" in name]
    if tuned:
        raise UsageError(
            f"{directory} is already fine-tuned ({tuned[0]}); use the pretrained model, from which all tasks start"
        )
    longest = positions(load_classifier(directory, GLUE["rte"], 0.0, trust_remote_code))
    if not 8 <= length <= (longest or length):
        allowed = f"8 to {longest}, the positions of {directory}" if longest else "at least 8"
        raise UsageError(f"--max-length {length} is out of range; use {allowed}")


def positions(model: PreTrainedModel) -> int | None:
    """Length of the longest sequence; RoBERTa never uses its first positions, up to the padding's."""
    embeddings = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and "position" in name
    ]
    return min(embeddings, default=getattr(model.config, "max_position_embeddings", None))


def finetune(
    directory: Path,
    tokens: TaskTokens,
    settings: Settings,
    seed: int,
    advance: Callable[[int], None],
    trust_remote_code: bool = False,
) -> tuple[dict[str, float], bool]:
    """Fine-tune on the training rows, and evaluate on the evaluation rows.

    Args:
        directory: checkpoint of a masked LM.
        tokens: encoded by the model's own tokenizer.
        seed: of the new head, the order of rows and the dropout. Models of one architecture get the same ones.
        advance: called with the number of rows of each step.

    Returns:
        The metrics, and whether the model collapsed: it predicts the same for every row of an evaluation.

    Raises:
        RunError: the model diverged.
    """
    task, device = tokens.task, torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    set_seed(seed)
    model = load_classifier(directory, task, settings.dropout, trust_remote_code).to(device)
    train(model, as_seen_by(model, tokens.train), settings, seed, advance)
    values: dict[str, float] = {}
    collapsed = False
    for suffix, rows in tokens.evaluations.items():
        logits_NC = predict(model, as_seen_by(model, rows), settings.dtype)
        if not np.isfinite(logits_NC).all():
            raise RunError(
                "the logits are not finite after fine-tuning at a learning rate of "
                f"{settings.learning_rate:g}; lower --learning-rate"
            )
        predictions_N = logits_NC.argmax(1) if task.labels else logits_NC[:, 0]
        own = metrics.evaluate(task.metrics, rows.labels, predictions_N)
        values |= {name + suffix: value for name, value in own.items()}
        collapsed = collapsed or metrics.collapsed(predictions_N)
    return values, collapsed


def train(model: PreTrainedModel, rows: Tokens, settings: Settings, seed: int, advance: Callable[[int], None]) -> None:
    """AdamW with warm-up and clipped gradients, as ``RECIPE`` says; the weights stay float32."""
    steps = settings.epochs * math.ceil(len(rows) / settings.batch_size)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]  # biases and norms
    groups = [{"params": decayed, "weight_decay": RECIPE["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, fused=model.device.type in ("cpu", "cuda"))
    schedule = get_scheduler(settings.scheduler, optimizer, math.ceil(RECIPE["warmup"] * steps), steps)
    regression = rows.labels.dtype.kind == "f"
    labels_N = torch.from_numpy(rows.labels).to(model.device, torch.float32 if regression else torch.int64)
    model.train()
    for epoch in range(settings.epochs):
        for batch in shuffled_batches(rows.lengths, settings.batch_size, RECIPE["pool"], (seed, epoch)):
            logits_BC = classify(model, rows.batch(batch), settings.dtype)
            labels_B = labels_N[torch.from_numpy(batch).to(model.device)]
            loss = F.mse_loss(logits_BC[:, 0], labels_B) if regression else F.cross_entropy(logits_BC, labels_B)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE["clip_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(len(batch))


@torch.no_grad()
def predict(model: PreTrainedModel, rows: Tokens, dtype: str) -> np.ndarray:
    """Logits [N, C] float32 of all rows, in the order of the rows."""
    model.eval()
    batches = batches_by_length(np.arange(len(rows)), rows.lengths, EVAL_BATCH)
    sorted_NC = torch.cat([classify(model, rows.batch(batch), dtype) for batch in batches]).cpu().numpy()
    return sorted_NC[np.argsort(np.concatenate(batches))]


def classify(model: PreTrainedModel, batch: dict[str, Tensor], dtype: str) -> Tensor:
    """Logits [B, C] float32; ``dtype`` is that of the matrix products."""
    inputs = {name: tensor_BL.to(model.device, non_blocking=True) for name, tensor_BL in batch.items()}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        return model(**inputs).logits.float()


def as_seen_by(model: PreTrainedModel, rows: Tokens) -> Tokens:
    """Rows without segments if the model does not use them: RoBERTa has one segment, DistilBERT none."""
    several = (getattr(model.config, "type_vocab_size", None) or 0) > 1
    takes = several and "token_type_ids" in inspect.signature(model.forward).parameters
    return rows if takes else replace(rows, segments=None)


def load_classifier(directory: Path, task: Task, dropout: float, trust_remote_code: bool = False) -> Any:
    """The encoder with a new head, in float32, with dropout.

    Raises UsageError if the model has no classification form, or if weights are missing or not finite.
    """
    config = load_config(directory, trust_remote_code)
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    config.num_labels = len(task.labels) or 1
    config.problem_type = "single_label_classification" if task.labels else "regression"
    config.id2label = dict(enumerate(task.labels)) or {0: "score"}
    config.label2id = {name: number for number, name in config.id2label.items()}
    model, missing = load_model(AutoModelForSequenceClassification, directory, config, trust_remote_code)
    encoder = f"{model.base_model_prefix}."
    if lost := [name for name in missing if name.startswith(encoder) and "pooler" not in name]:
        raise UsageError(f"{directory} lacks weights of its encoder ({lost[0]}); use a complete checkpoint")
    if broken := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise UsageError(f"{directory} has weights that are not finite ({broken[0]}); use another checkpoint")
    return model
