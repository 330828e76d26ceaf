"""Flags of transformers.TrainingArguments that have no use here, or are out of range, refused before they do harm."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from entropy_masking.errors import UsageError, one_line

# flags of TrainingArguments that have no use here, and the value that they keep
FIXED: dict[str, Any] = {
    "train_sampling_strategy": "sequential",  # the dataset knows the order
    "remove_unused_columns": False,
    "label_smoothing_factor": 0.0,
    "auto_find_batch_size": False,
    "ignore_data_skip": False,
    "resume_from_checkpoint": None,  # the same command resumes
    "save_only_model": False,  # a run could not go on from it
    "save_on_each_node": False,  # a checkpoint is one directory that all nodes see
    "logging_nan_inf_filter": False,
    "restore_callback_states_from_checkpoint": False,  # one that SIGTERM made says stop
    "disable_tqdm": True,  # the trainer draws its own bar
    "do_train": False,
    "do_predict": False,
    "prediction_loss_only": False,
    "eval_do_concat_batches": True,
    "eval_use_gather_object": False,
    "eval_accumulation_steps": None,
    "include_for_metrics": [],
    "batch_eval_metrics": False,
    "label_names": None,
    "length_column_name": "length",
    "fsdp": None,  # encoders fit a device
    "deepspeed": None,
    "parallelism_config": None,
    "optim_target_modules": None,  # for optimizers of low rank, to fine-tune with
    "use_liger_kernel": False,  # it has none for the sparse head
    "push_to_hub": False,
    "debug": None,  # what it hooks into is not how this model is called
    "bf16_full_eval": False,  # evaluation is computed as training is
    "fp16_full_eval": False,
}
# ranges of numbers that would fail late or, worse, not at all
MOST_SEED = (1 << 32) - 1
MOST_STEPS, MOST_BATCH = 10**12, 10**6  # above them numbers overflow
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, MOST_SEED),
    "data_seed": (0, MOST_SEED),
    "learning_rate": (0, sys.float_info.max),
    "weight_decay": (0, sys.float_info.max),
    "muon_learning_rate": (0, sys.float_info.max),
    "muon_weight_decay": (0, sys.float_info.max),
    "adam_beta1": (0, math.nextafter(1, 0)),
    "adam_beta2": (0, math.nextafter(1, 0)),
    "adam_epsilon": (0, sys.float_info.max),
    "max_grad_norm": (0, sys.float_info.max),
    "num_train_epochs": (sys.float_info.min, 10**9),
    "max_steps": (1, MOST_STEPS),
    "warmup_steps": (0, MOST_STEPS),
    "logging_steps": (sys.float_info.min, MOST_STEPS),
    "save_steps": (sys.float_info.min, MOST_STEPS),
    "eval_steps": (sys.float_info.min, MOST_STEPS),
    "save_total_limit": (0, MOST_STEPS),
    "per_device_train_batch_size": (1, MOST_BATCH),
    "per_device_eval_batch_size": (1, MOST_BATCH),
    "gradient_accumulation_steps": (1, MOST_BATCH),
    "dataloader_num_workers": (0, 1024),
    "dataloader_prefetch_factor": (1, 1024),
    "ddp_timeout": (1, 10**9),
    "num_workers": (1, MOST_BATCH),
    "distill_weight": (0, 1),
    "distill_temperature": (sys.float_info.min, sys.float_info.max),
    "distill_positions": (sys.float_info.min, 1),
}


BEST_METRICS = ("loss", "accuracy")  # of an evaluation


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check(flags: dict[str, Any]) -> None:
    """Refuse flags, as they were parsed, that have no use here or are out of range. Raises UsageError."""
    for name, value in FIXED.items():
        if flags[name] != value:
            raise UsageError(f"{flag(name)} has no use here; leave it out")
    for name in ("logging_strategy", "save_strategy", "eval_strategy"):
        if flags[name] == "epoch":
            raise UsageError(f"{flag(name)} epoch is at the end of the run, whatever its epochs; use steps")
    if flags["save_strategy"] == "best":
        raise UsageError("--save-strategy best leaves nothing to go on from; use --load-best-model-at-end")
    if (metric := flags["metric_for_best_model"]) and metric.removeprefix("eval_") not in BEST_METRICS:
        raise UsageError(f"--metric-for-best-model {metric} is none of {', '.join(BEST_METRICS)}; use one")
    if mode := flags["torch_compile_mode"]:
        from torch._inductor import list_mode_options  # takes seconds

        if mode not in (modes := list_mode_options()):
            raise UsageError(f"--torch-compile-mode {mode} is none of {', '.join(modes)}; use one")
    for name in ("targets", "eval_shards"):
        if flags[name] == "":
            raise UsageError(f"{flag(name)} is empty; name a directory, or leave it out")
    epochs = {"max_steps": TrainingArguments.max_steps}  # the value that says: by epochs
    for name, (low, high) in RANGES.items():
        value = flags[name]
        if value not in (None, epochs.get(name)) and not low <= value <= high:
            shown = f"{value:g}" if isinstance(value, float) else value
            raise UsageError(f"{flag(name)} {shown} is out of range; use {_range(low, high)}")


def _range(low: float, high: float) -> str:
    """A range in words; its open ends are the nearest numbers of the machine."""
    least = "more than 0" if low == sys.float_info.min else f"at least {low:g}"
    if high == sys.float_info.max:
        return least
    return f"{least} and {'less than 1' if high == math.nextafter(1, 0) else f'at most {high:.10g}'}"


def check_device(args: TrainingArguments) -> None:
    """Refuse a device that cannot make the masks, and settings that change what a batch is. Raises UsageError."""
    if args.device.type == "mps":
        raise UsageError("--use-cpu false would train on Apple's GPU, which has no float64 for the masks; leave it out")
    config: Any = args.accelerator_config
    allowed = type(config)(non_blocking=config.non_blocking).to_dict()
    if any(value != allowed[name] for name, value in config.to_dict().items()):
        raise UsageError("--accelerator-config may say non_blocking only; the rest changes what a batch is")


@contextmanager
def taken() -> Iterator[None]:
    """Say in one sentence what transformers, or what it leans on, has against a flag.

    Raises:
        UsageError: it has something.
    """
    try:
        yield
    except (ValueError, ImportError, RuntimeError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        if is_of_device(error):
            raise
        raise UsageError(f"transformers takes no such flags: {one_line(error)}") from None


def is_of_device(error: Exception) -> bool:
    """Whether an error comes from a device or from another rank, whatever was being done."""
    return isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | dist.DistError) or "gloo" in str(error)
