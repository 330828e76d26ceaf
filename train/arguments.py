"""The supported flags of transformers.TrainingArguments, the ranges of all numbers, and the fixed settings."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import SchedulerType, TrainingArguments

from entropy_masking.commands.console import flag, option
from entropy_masking.commands.mask_flags import MAX_SEED
from entropy_masking.errors import UsageError, one_line

BY_PRESET = "(default: by preset; that of base for other models)"


def switch(help: str) -> Any:
    """A flag that is true, false, or None if it is not given."""
    return option(help, nargs="?", const=True)


@dataclass(kw_only=True)
class TrainerFlags:
    """The supported flags of transformers.TrainingArguments, with defaults for pretraining."""

    output_dir: str = option("directory of the trained model, its checkpoints and its summary", MISSING)
    max_steps: int | None = option("steps of the run (default: from the epochs)")
    num_train_epochs: float = option("epochs of the run, unless --max-steps is given (default: 1)", 1.0)
    per_device_train_batch_size: int | None = option(f"sequences per batch of a device {BY_PRESET}")
    gradient_accumulation_steps: int = option("batches per step on each device (default: 1)", 1)
    per_device_eval_batch_size: int = option("sequences per batch in an evaluation (default: 64)", 64)

    optim: str | None = option("muon (default for presets), or the name of an optimizer of transformers")
    optim_args: str | None = option("arguments of the optimizer: name=value,…")
    learning_rate: float | None = option(
        f"peak learning rate of --optim; beside Muon, that of embeddings, norms and biases {BY_PRESET}"
    )
    weight_decay: float = option("weight decay of AdamW, or of --optim (default: 0.01)", 0.01)
    adam_beta1: float = option("AdamW's β1 (default: 0.9)", 0.9)
    adam_beta2: float = option("AdamW's β2 (default: 0.98)", 0.98)
    adam_epsilon: float = option("AdamW's ε (default: 1e-6)", 1e-6)
    max_grad_norm: float = option("clip gradients to this norm; 0 for no clipping (default: 1)", 1.0)
    lr_scheduler_type: str = option("name of a learning-rate schedule of transformers (default: linear)", "linear")
    lr_scheduler_kwargs: str | None = option("arguments of the schedule, as a JSON object")
    warmup_steps: float = option("steps of learning-rate warm-up; below 1 a share of all steps (default: 0.06)", 0.06)

    bf16: bool | None = switch("train in bfloat16 (default: if the hardware has it)")
    fp16: bool = option("train in float16", False)
    tf32: bool | None = switch("multiply float32 matrices in TF32")
    activation_checkpointing: bool | None = switch("compute activations twice to save memory")
    torch_compile: bool = option("compile the model", False)
    torch_compile_backend: str | None = option("backend of the compiler")
    torch_compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = (
        option("mode of the compiler")
    )

    logging_strategy: Literal["no", "steps"] = option("whether to log the loss (default: steps)", "steps")
    logging_steps: float = option("log every N steps; below 1 a share of all steps (default: 50)", 50)
    logging_first_step: bool = option("also log the first step", False)
    report_to: str = option("another place to log, e.g. tensorboard (default: none)", "none")
    run_name: str | None = option("name of the run for --report-to")
    eval_strategy: Literal["no", "steps"] | None = option(
        "whether to evaluate every --eval-steps (default: at the start and after each fifth of the run)"
    )
    eval_steps: float | None = option(
        "evaluate every N steps; below 1 a share of all steps (default: 0.2; with --eval-strategy steps, as "
        "--logging-steps)"
    )
    eval_delay: float = option("steps before the first evaluation (default: 0)", 0)
    eval_on_start: bool | None = switch("evaluate before the first step (default: yes, without --eval-strategy)")
    save_strategy: Literal["no", "steps"] = option("whether to save checkpoints (default: steps)", "steps")
    save_steps: float | None = option(
        "save a checkpoint every N steps; below 1 a share of all steps (default: 500, or as --eval-steps with "
        "--load-best-model-at-end)"
    )
    save_total_limit: int | None = option("checkpoints to keep; 0 for all (default: 2)", 2)
    load_best_model_at_end: bool = option("end with the checkpoint of the best evaluation", False)
    metric_for_best_model: Literal["loss", "accuracy"] | None = option("metric of the best evaluation (default: loss)")

    seed: int = option("seed of the weights and of the masks (default: 42)", 42)
    data_seed: int | None = option("seed of the order of the sequences (default: --seed)")
    full_determinism: bool = option("use deterministic kernels only, which are slower", False)
    use_cpu: bool | None = switch("train on the CPU (default: without CUDA and XPU)")
    dataloader_num_workers: int | None = option("processes that mask the next batches (default: 2; 0 on a CPU)")
    dataloader_prefetch_factor: int | None = option("batches that each of these processes keeps ready (default: 2)")
    ddp_backend: Literal["nccl", "gloo", "mpi", "xccl"] | None = option("communication backend (default: by device)")
    # all ranks wait while one process per machine checks every byte of the shards, about 2 TB per hour; a cluster waits
    # as long for a rank that hangs
    ddp_timeout: int = option("seconds that a process waits for the others (default: 3600)", 3_600)


# settings of transformers that a run cannot vary
FIXED = {
    "disable_tqdm": True,  # the trainer draws its own bar
    "logging_nan_inf_filter": False,  # it would hide NaN, and wait for the device at each batch
    "ddp_find_unused_parameters": False,  # it would search at each step; there are none
}
# prefixes of flags that may change on resume; the global batch is checked separately
FREE = (
    *("output_dir", "num_train_epochs", "max_steps", "per_device_", "gradient_accumulation_", "logging_", "report_to"),
    *("run_name", "eval_", "save_", "dataloader_", "ddp_"),
)
# schedules that follow the metric of evaluations
BY_METRIC = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
# ranges of numbers; a number outside would fail late or, worse, not at all
MAX_STEPS, MAX_BATCH = 10**12, 10**6  # above them numbers overflow
ABOVE_0, BELOW_1, MAX = sys.float_info.min, math.nextafter(1, 0), sys.float_info.max
RANGES: dict[str, tuple[float, float]] = {
    name: (low, high)
    for names, low, high in (
        ("seed data_seed", 0, MAX_SEED),
        ("learning_rate weight_decay muon_learning_rate muon_weight_decay adam_epsilon max_grad_norm", 0, MAX),
        ("adam_beta1 adam_beta2 eval_fraction", 0, BELOW_1),
        ("logging_steps save_steps eval_steps", ABOVE_0, MAX_STEPS),
        ("warmup_steps save_total_limit eval_delay", 0, MAX_STEPS),
        ("max_steps limit sequences", 1, MAX_STEPS),
        ("per_device_train_batch_size per_device_eval_batch_size", 1, MAX_BATCH),
        ("gradient_accumulation_steps num_workers", 1, MAX_BATCH),
        ("num_train_epochs", ABOVE_0, 10**9),
        ("ddp_timeout", 1, 10**9),
        ("dataloader_num_workers", 0, 1024),
        ("dataloader_prefetch_factor", 1, 1024),
        ("distill_weight", 0, 1),
        ("distill_positions", ABOVE_0, 1),
        ("distill_temperature", ABOVE_0, MAX),
    )
    for name in names.split()
}


def check_ranges(flags: dict[str, Any]) -> None:
    """Refuse empty texts and numbers out of range. Raises UsageError."""
    for name, value in flags.items():
        if value == "":
            raise UsageError(f"{flag(name)} is empty; give it a value, or leave it out")
        low, high = RANGES.get(name, (0, 0))
        if name in RANGES and value is not None and not low <= value <= high:
            shown = f"{value:g}" if isinstance(value, float) else value
            least = "more than 0" if low == ABOVE_0 else f"at least {low:g}"
            most = {MAX: "", BELOW_1: " and less than 1"}.get(high, f" and at most {high:.10g}")
            raise UsageError(f"{flag(name)} {shown} is out of range; use {least}{most}")


def training_arguments(flags: TrainerFlags) -> TrainingArguments:
    """Trainer's arguments. Raises UsageError if transformers refuses the flags, or the device cannot compute masks."""
    given = asdict(flags) | {"max_steps": flags.max_steps or TrainingArguments.max_steps}
    # the host does not wait for copies from pinned memory to a device
    given["accelerator_config"] = {"non_blocking": not flags.use_cpu}
    with refused_by_transformers():  # TrainingArguments checks its fields
        args = TrainingArguments(**(given | FIXED))
    if args.device.type == "mps":
        raise UsageError("--use-cpu false would train on Apple's GPU, which has no float64 for the masks; leave it out")
    return args


def deciding_arguments(args: TrainingArguments) -> dict[str, object]:
    """The flags of Trainer that determine what is learned."""
    values = args.to_dict()
    return {name: values[name] for name in TrainerFlags.__dataclass_fields__ if not name.startswith(FREE)}


def global_batch(args: TrainingArguments) -> int:
    """Sequences per step on all devices."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


@contextmanager
def refused_by_transformers() -> Iterator[None]:
    """Turn an error by which transformers, or a library below it, refuses a flag into a UsageError."""
    try:
        yield
    except (ValueError, ImportError, RuntimeError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        if is_of_device(error):
            raise
        raise UsageError(f"transformers does not accept the flags: {one_line(error)}") from None


def is_of_device(error: Exception) -> bool:
    """Whether an error comes from a device or from another rank."""
    return isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | dist.DistError) or "gloo" in str(error)
