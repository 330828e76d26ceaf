"""The flags of train/run.py, its own and those of Trainer, parsed and filled in."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from dataclasses import MISSING, dataclass, field
from typing import Literal, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from entropy_masking.commands.console import option
from entropy_masking.commands.mask_flags import MaskOptions
from entropy_masking.errors import UsageError
from entropy_masking.models.checkpoints import resolve_dtype
from train.arguments import TrainerFlags, check_ranges, training_arguments
from train.student import SIZES

# AdamW's learning rate, beside Muon and alone, by size of the preset; other models use that of base
MUON, MUON_LEARNING_RATE, MUON_WEIGHT_DECAY = "muon", 0.02, 0.01
LEARNING_RATES = {
    MUON: {"tiny": 4e-3, "mini": 4e-3, "small": 2e-3, "medium": 2e-3, "base": 1e-3},
    "adamw": {"tiny": 2e-3, "mini": 1e-3, "small": 5e-4, "medium": 4e-4, "base": 2e-4},
}
BATCH_SIZES = {"tiny": 32, "mini": 64, "small": 128, "medium": 128, "base": 256}  # per device
EVAL_FRACTION, EVAL_STEPS = 0.01, 0.2  # shares of the shards, and of the steps between evaluations


@dataclass(kw_only=True)
class Options(MaskOptions):
    """The flags of train/run.py besides TrainerFlags."""

    shards: str = option("shard directory made by pipeline/score.py, a path or a URI", MISSING)
    entropy_source: Literal["random", "parquet", "self"] = option(
        "mask at random, by the scores of the shards (parquet), or by the student's own (self)", MISSING
    )
    model: str = option("tiny (default), mini, small, medium, base; a config.json; or a checkpoint", "tiny")
    targets: str | None = option("distil from this target directory, with its masks (default: from the shards)")
    distill_weight: float = option("α in (1 - α)·CE + α·T²·KL(teacher ‖ student) (default: 0)", 0.0)
    distill_temperature: float = option("T, one of the scores' --temperatures (default: 1)", 1.0)
    distill_positions: float = option(
        "distil at this share of the predicted tokens, those with the highest student entropy (default: 1)", 1.0
    )
    muon_learning_rate: float | None = option(
        f"Muon's learning rate, for the hidden matrices (default: {MUON_LEARNING_RATE})"
    )
    muon_weight_decay: float | None = option(f"Muon's weight decay (default: {MUON_WEIGHT_DECAY})")
    self_refresh: Literal["means", "step"] | None = option(
        "with self: running means of the scores of masked tokens by type (means, default), or an extra forward on each "
        "batch (step, default of --recipe paper)"
    )
    eval_fraction: float | None = option("share of the shards to hold out (default: 0.01); 0 for no evaluation")
    eval_shards: str | None = option("evaluate on this shard directory (default: on held-out shards)")
    trust_remote_code: bool = option("run model code from the checkpoint", False)
    num_workers: int = option("train in N processes on a Ray cluster, one per GPU (default: in this process)", 1)
    overwrite: bool = option("drop the run in the output directory", False)
    muon: bool = field(default=False, init=False)  # --optim muon, which TrainingArguments does not know


class Parser(HfArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(argv: list[str], description: str | None) -> tuple[Options, TrainingArguments]:
    """Flags → options and training arguments. Raises UsageError for unknown or unsupported flags and wrong values."""
    parser = Parser(
        [Options, TrainerFlags],  # type: ignore[list-item]
        usage="train/run.py --shards DIR --entropy-source SOURCE --output-dir DIR …",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options, flags, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise UsageError(_unsupported(unknown[0]))
    check_ranges(vars(options) | vars(flags))
    if "://" in flags.output_dir:
        raise UsageError(f"--output-dir {flags.output_dir} is a URI; use a path: checkpoints need a file system")
    fill_in(options, flags)
    return options, training_arguments(flags)


def _unsupported(text: str) -> str:
    name = text.partition("=")[0]
    if name.lstrip("-").replace("-", "_").removeprefix("no_") in TrainingArguments.__dataclass_fields__:
        return f"{name} of transformers.TrainingArguments is not supported; --help lists the supported flags"
    return f"{name} is not a flag of train/run.py; --help lists its flags"


def fill_in(options: Options, flags: TrainerFlags) -> None:
    """Set the defaults that depend on the model, on other flags and on the machine."""
    size = options.model.removeprefix("bert-")
    if flags.optim is None:  # other models (configurations, checkpoints) use AdamW
        flags.optim = MUON if size in SIZES else TrainingArguments.optim
    options.muon = flags.optim == MUON
    if options.muon:
        flags.optim = TrainingArguments.optim  # for the other parameters
        _set_missing(options, muon_learning_rate=MUON_LEARNING_RATE, muon_weight_decay=MUON_WEIGHT_DECAY)
    rates = LEARNING_RATES[MUON if options.muon else "adamw"]
    _set_missing(flags, learning_rate=rates.get(size, rates["base"]))
    _set_missing(flags, per_device_train_batch_size=BATCH_SIZES.get(size, BATCH_SIZES["base"]))
    _set_missing(flags, bf16=not flags.fp16 and resolve_dtype("auto") == "bfloat16")
    _set_missing(flags, use_cpu=not (torch.cuda.is_available() or torch.xpu.is_available()))
    _set_missing(flags, dataloader_num_workers=0 if flags.use_cpu else 2)
    _set_missing(options, eval_fraction=0.0 if options.eval_shards else EVAL_FRACTION)
    if flags.eval_strategy is None and (options.eval_fraction or options.eval_shards):
        # often enough to notice a collapse
        _set_missing(flags, eval_strategy="steps", eval_steps=EVAL_STEPS, eval_on_start=True)
    _set_missing(flags, eval_strategy="no", eval_on_start=False)
    if options.entropy_source == "self":
        _set_missing(options, self_refresh="step" if options.recipe == "paper" else "means")  # the paper has step


def _set_missing(flags: Options | TrainerFlags, **defaults: object) -> None:
    for name, value in defaults.items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
