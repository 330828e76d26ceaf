"""The flags of train/run.py, its own and those of Trainer, parsed and filled in."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments

from entropy_masking.commands.console import Rule, check_rules, option
from entropy_masking.commands.mask_flags import OptionsParser, TrainingMaskOptions
from entropy_masking.errors import UsageError
from entropy_masking.models.checkpoints import resolve_dtype
from train.arguments import BY_METRIC, TrainerFlags, check_ranges, training_arguments
from train.student import SIZES

# AdamW's learning rate, beside Muon and alone, by size of the preset; other models use that of base
MUON, MUON_LEARNING_RATE, MUON_WEIGHT_DECAY = "muon", 0.02, 0.01
LEARNING_RATES = {
    MUON: {"tiny": 4e-3, "mini": 4e-3, "small": 2e-3, "medium": 2e-3, "base": 1e-3},
    "adamw": {"tiny": 2e-3, "mini": 1e-3, "small": 5e-4, "medium": 4e-4, "base": 2e-4},
}
ADAMW = ("adamw_torch", "adamw_torch_fused", None)  # None is the default, one of them
WITHOUT_ADAM = ("sgd", "adagrad", "rmsprop", "adafactor")  # optimizers that do not read AdamW's flags
BATCH_SIZES = {"tiny": 32, "mini": 64, "small": 128, "medium": 128, "base": 256}  # per device
EVAL_FRACTION, EVAL_STEPS = 0.01, 0.2  # shares of the shards, and of the steps between evaluations
SAVE_STEPS = 500


@dataclass(kw_only=True)
class Options(TrainingMaskOptions):
    """The flags of train/run.py besides TrainerFlags."""

    shards: str = option("shard directory made by pipeline/score.py, a path or a URI", MISSING)
    entropy_source: Literal["random", "parquet", "self"] = option(
        "mask at random, by the scores of the shards (parquet), or by the student's own (self)", MISSING
    )
    model: str = option(
        "tiny (default), mini, small, medium, base, bert-tiny … bert-base; a config.json; or a checkpoint",
        "tiny",
    )
    targets: str | None = option("distil from this target directory, with its masks (default: from the shards)")
    distill_weight: float = option("weight α in (1 - α)·CE + α·T²·KL(teacher ‖ student) (default: 0)", 0.0)
    distill_temperature: float = option("T, one of the scores' --temperatures (default: 1)", 1.0)
    distill_positions: float = option(
        "distil at this share of the predicted tokens, those with the highest student entropy (default: 1)", 1.0
    )
    muon_learning_rate: float | None = option(
        f"Muon's learning rate, for the hidden matrices (default: {MUON_LEARNING_RATE})"
    )
    muon_weight_decay: float | None = option(f"Muon's weight decay (default: {MUON_WEIGHT_DECAY})")
    self_refresh: Literal["means", "step"] | None = option(
        "scores for --entropy-source self. means (default): running means of the scores of masked tokens by type; "
        "step (default of --recipe paper): scores of an extra forward on each batch"
    )
    eval_fraction: float | None = option("share of the shards to hold out (default: 0.01); 0 for no evaluation")
    eval_shards: str | None = option("evaluate on this shard directory (default: on held-out shards)")
    trust_remote_code: bool = option("run model code from the checkpoint", False)
    num_workers: int = option("train in N processes on a Ray cluster, one per GPU (default: in this process)", 1)
    overwrite: bool = option("delete the run in the output directory, and start again", False)
    muon: bool = field(default=False, init=False)  # --optim muon, which TrainingArguments does not know


def parse(argv: list[str], description: str | None) -> tuple[Options, TrainingArguments]:
    """Flags → options and training arguments. Raises UsageError for unknown or unsupported flags and wrong values."""
    parser = OptionsParser(
        [Options, TrainerFlags],
        prog="train/run.py",
        usage="%(prog)s --shards DIR --entropy-source SOURCE --output-dir DIR …",
        description=description,
        allow_abbrev=False,
    )
    options, flags, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise UsageError(_unsupported(unknown[0]) or parser.unknown(unknown[0]))
    check_ranges(vars(options) | vars(flags))
    if "://" in flags.output_dir:
        raise UsageError(f"--output-dir {flags.output_dir} is a URI; use a path: checkpoints need a file system")
    options.muon = flags.optim == MUON or (flags.optim is None and _size(options) in SIZES)
    check_rules(vars(options) | vars(flags), rules(options, flags))
    fill_in(options, flags)
    return options, training_arguments(flags)


def _unsupported(text: str) -> str | None:
    name = text.partition("=")[0]
    if name.lstrip("-").replace("-", "_").removeprefix("no_") not in TrainingArguments.__dataclass_fields__:
        return None
    return f"{name} of transformers.TrainingArguments is not supported; --help lists the supported flags"


def rules(options: Options, flags: TrainerFlags) -> list[Rule]:
    """The flags that contradict others or have no effect with them."""
    paper = "{flag} {given} contradicts --recipe paper, which sets {value}; leave one out"
    of_self = "{flag} only applies to --entropy-source self; leave it out"
    at_random = "{flag} has no effect with --hard-share 0, which masks at random; leave it out"
    of_muon = "{flag} only applies to --optim muon; leave it out"
    of_adam = f"{{flag}} has no effect with --optim {flags.optim}; leave it out"
    no_arguments = "{flag} has no effect with Muon and AdamW; leave it out, or use another --optim"
    two_places = "{flag} and --eval-shards both choose the shards to evaluate on; use one"
    held_out = "{flag} needs held-out shards; set --eval-fraction above 0, or --eval-shards"
    evaluations = "{flag} needs evaluations during the run; leave out --eval-strategy no"
    checkpoints = "{flag} needs checkpoints; leave out --save-strategy no"
    steps = "--load-best-model-at-end needs a checkpoint at each evaluation; set {flag} to {value:g}, or leave it out"
    limit = "{flag} {given} keeps only the best checkpoint at the end of a run, not the last; use at least 2"
    best = "{flag} only applies to --load-best-model-at-end; leave it out"
    unlogged = "{flag} has no effect with --logging-strategy no; leave one out"
    unreported = "{flag} names a run for --report-to; set it too, or leave {flag} out"
    two_lengths = "{flag} has no effect with --max-steps; leave one out"
    no_warmup = f"{{flag}} has no effect with --lr-scheduler-type {flags.lr_scheduler_type}; leave it out"
    distillation = "{flag} needs distillation; set --distill-weight above 0, or leave it out"
    evaluates = bool(options.eval_shards) or options.eval_fraction != 0
    takes_best, by_metric = flags.load_best_model_at_end, flags.lr_scheduler_type in BY_METRIC
    not_best, silent = {"load_best_model_at_end": False}, flags.logging_strategy == "no"
    return [
        (options.recipe == "paper", {"self_refresh": "step"}, paper),
        (options.entropy_source != "self", {"self_refresh": None}, of_self),
        (options.hard_share == 0, {"self_refresh": None}, at_random),
        (not options.muon, {"muon_learning_rate": None, "muon_weight_decay": None}, of_muon),
        (options.muon or flags.optim in ADAMW, {"optim_args": None}, no_arguments),
        (bool(options.eval_shards), {"eval_fraction": 0.0}, two_places),
        (not evaluates, {"eval_strategy": "no", "eval_on_start": False, "eval_steps": None, **not_best}, held_out),
        (not evaluates, _defaults("eval_delay", "per_device_eval_batch_size"), held_out),
        (flags.eval_strategy == "no", {"eval_steps": None, "eval_delay": 0, **not_best}, evaluations),
        (flags.save_strategy == "no", not_best | _defaults("save_steps", "save_total_limit"), checkpoints),
        (silent, {"logging_first_step": False}, unlogged),
        (silent and flags.eval_strategy != "steps", _defaults("logging_steps"), unlogged),  # --eval-steps reads it too
        (flags.report_to == "none", {"run_name": None}, unreported),
        (bool(flags.max_steps), _defaults("num_train_epochs"), two_lengths),
        (by_metric or flags.lr_scheduler_type == "constant", _defaults("warmup_steps"), no_warmup),
        (flags.optim in WITHOUT_ADAM, _defaults("adam_beta1", "adam_beta2", "adam_epsilon"), of_adam),
        (takes_best and flags.eval_steps is not None, {"save_steps": flags.eval_steps}, steps),
        (takes_best and flags.save_total_limit == 1, {"save_total_limit": None}, limit),
        (not (takes_best or by_metric), {"metric_for_best_model": None}, best),
        (not options.distill_weight, {"targets": None, "distill_temperature": 1, "distill_positions": 1}, distillation),
    ]


def _defaults(*names: str) -> dict[str, object]:
    """The values of Trainer's flags that are not given."""
    return {name: getattr(TrainerFlags, name) for name in names}


def fill_in(options: Options, flags: TrainerFlags) -> None:
    """Set the defaults that depend on the model, on other flags and on the machine."""
    size = _size(options)
    if options.muon:
        flags.optim = TrainingArguments.optim  # for the other parameters
        _set_missing(options, muon_learning_rate=MUON_LEARNING_RATE, muon_weight_decay=MUON_WEIGHT_DECAY)
    _set_missing(flags, optim=TrainingArguments.optim)  # of configurations and checkpoints too
    rates = LEARNING_RATES[MUON if options.muon else "adamw"]
    _set_missing(flags, learning_rate=rates.get(size, rates["base"]))
    _set_missing(flags, per_device_train_batch_size=BATCH_SIZES.get(size, BATCH_SIZES["base"]))
    _set_missing(flags, bf16=not flags.fp16 and resolve_dtype("auto") == "bfloat16")
    _set_missing(flags, use_cpu=not (torch.cuda.is_available() or torch.xpu.is_available()))
    _set_missing(flags, dataloader_num_workers=0 if flags.use_cpu else 2)
    _set_missing(options, eval_fraction=0.0 if options.eval_shards else EVAL_FRACTION)
    if takes_best := flags.load_best_model_at_end:  # it compares checkpoints
        _set_missing(flags, eval_steps=flags.save_steps)
    if flags.eval_strategy is None and (options.eval_fraction or options.eval_shards):
        # often enough to notice a collapse
        _set_missing(flags, eval_strategy="steps", eval_steps=EVAL_STEPS, eval_on_start=True)
    _set_missing(flags, eval_strategy="no", eval_on_start=False)
    _set_missing(flags, save_steps=(flags.eval_steps or flags.logging_steps) if takes_best else SAVE_STEPS)
    if options.entropy_source == "self":
        _set_missing(options, self_refresh="step" if options.recipe == "paper" else "means")  # the paper has step


def _size(options: Options) -> str:
    return options.model.removeprefix("bert-")


def _set_missing(flags: Options | TrainerFlags, **defaults: object) -> None:
    for name, value in defaults.items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
