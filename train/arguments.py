"""The flags of train/run.py → Trainer's arguments: defaults by model and machine, and the fixed settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from entropy_masking.errors import UsageError, one_line
from entropy_masking.models.checkpoints import resolve_dtype
from train.options import MUON, MUON_LEARNING_RATE, MUON_WEIGHT_DECAY, Options, TrainerFlags
from train.student import nearest_size

# AdamW's learning rate, beside Muon and alone, by size; other models use those of the nearest size
LEARNING_RATES = {
    MUON: {"tiny": 4e-3, "mini": 4e-3, "small": 2e-3, "medium": 2e-3, "base": 1e-3},
    "adamw": {"tiny": 2e-3, "mini": 1e-3, "small": 5e-4, "medium": 4e-4, "base": 2e-4},
}
PRETRAINED_RATE = 5e-5  # AdamW's, to train a checkpoint further
BATCH_SIZES = {"tiny": 32, "mini": 64, "small": 128, "medium": 128, "base": 256}  # per device
EVAL_FRACTION, EVAL_STEPS = 0.01, 0.2  # the share of the documents to hold out, and of the steps between evaluations
# settings of transformers that a run cannot vary
FIXED = {
    "disable_tqdm": True,  # the trainer draws its own bar
    "logging_nan_inf_filter": False,  # it would hide NaN, and wait for the device at each batch
    "ddp_find_unused_parameters": False,  # it would search at each step; there are none
}


def training_arguments(options: Options, flags: TrainerFlags) -> TrainingArguments:
    """Trainer's arguments. Fills in the defaults that depend on the model and the machine, also in ``options``.

    Raises UsageError if transformers refuses the flags, or the device cannot compute masks.
    """
    fill_in(options, flags)
    given = asdict(flags) | {"max_steps": flags.max_steps or TrainingArguments.max_steps}
    # the host does not wait for copies from pinned memory to a device
    given["accelerator_config"] = {"non_blocking": not flags.use_cpu}
    with refused_by_transformers():  # TrainingArguments checks its fields
        args = TrainingArguments(**(given | FIXED))
    if flags.fp16 and args.device.type == "cpu":
        raise UsageError("--fp16 has no effect on a CPU; leave it out")
    if args.device.type == "mps":
        raise UsageError("--use-cpu false would train on Apple's GPU, which has no float64 for the masks; leave it out")
    return args


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


def fill_in(options: Options, flags: TrainerFlags) -> None:
    """Set the defaults that depend on the model, on other flags and on the machine."""
    size, pretrained = nearest_size(options.model, options.trust_remote_code)
    if options.muon:
        flags.optim = None  # AdamW, for the other parameters
        _set_missing(options, muon_learning_rate=MUON_LEARNING_RATE, muon_weight_decay=MUON_WEIGHT_DECAY)
    rates = LEARNING_RATES[MUON if options.muon else "adamw"]
    _set_missing(flags, learning_rate=PRETRAINED_RATE if pretrained and not options.muon else rates[size])
    _set_missing(flags, optim=TrainingArguments.optim, per_device_train_batch_size=BATCH_SIZES[size])
    _set_missing(flags, bf16=not flags.fp16 and resolve_dtype("auto") == "bfloat16")
    _set_missing(flags, use_cpu=not (torch.cuda.is_available() or torch.xpu.is_available()))
    _set_missing(flags, dataloader_num_workers=0 if flags.use_cpu else 2)
    _set_missing(options, eval_fraction=0.0 if options.eval_shards else EVAL_FRACTION)
    # often enough to notice a collapse
    held_out = options.eval_fraction or options.eval_shards
    _set_missing(flags, eval_strategy="steps" if held_out else "no", eval_steps=EVAL_STEPS)
    _set_missing(flags, eval_on_start=flags.eval_strategy == "steps")
    if options.entropy_source == "self":
        _set_missing(options, self_refresh="step" if options.recipe == "paper" else "means")  # our reading of the paper


def _set_missing(flags: Options | TrainerFlags, **defaults: object) -> None:
    for name, value in defaults.items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
