"""Parses the flags of train/run.py, and refuses numbers out of range and flags that contradict others."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from entropy_masking.commands.flags import Parser, Rule, check_rules, flag
from entropy_masking.commands.mask_flags import MAX_SEED
from entropy_masking.errors import UsageError
from train.flags import GROUPS, MUON, SIZES, Options, TrainerFlags

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
        ("warmup_steps save_total_limit", 0, MAX_STEPS),
        ("max_steps limit sequences", 1, MAX_STEPS),
        ("per_device_train_batch_size per_device_eval_batch_size", 1, MAX_BATCH),
        ("gradient_accumulation_steps num_workers", 1, MAX_BATCH),
        ("num_train_epochs", ABOVE_0, 10**9),
        ("ddp_timeout", 1, 10**9),
        ("dataloader_num_workers", 0, 1024),
        ("distill_weight", 0, 1),
        ("distill_positions", ABOVE_0, 1),
        ("distill_temperature", ABOVE_0, MAX),
    )
    for name in names.split()
}


def parse(argv: list[str], description: str | None) -> tuple[Options, TrainerFlags]:
    """The flags as they are given. Raises UsageError for unknown flags and wrong values."""
    parser = Parser("train/run.py", description, GROUPS)
    parser.usage = "%(prog)s --shards DIR --entropy-source SOURCE --output-dir DIR …"
    parser.add_fields(Options)
    parser.add_fields(TrainerFlags)
    given = vars(parser.parse_args(argv))
    options = Options(**{own.name: given.pop(own.name) for own in fields(Options) if own.init})
    flags = TrainerFlags(**given)
    options.argv, options.as_yaml = parser.argv, parser.to_yaml()
    check_ranges(vars(options) | vars(flags))
    if "://" in flags.output_dir:
        raise UsageError(f"--output-dir {flags.output_dir} is a URI; use a path: checkpoints need a file system")
    options.muon = flags.optim == MUON or (flags.optim is None and options.model.removeprefix("bert-") in SIZES)
    check_rules(vars(options) | vars(flags), rules(options, flags))
    return options, flags


def check_ranges(flags: Mapping[str, Any]) -> None:
    """Refuse numbers out of range. Raises UsageError."""
    for name, value in flags.items():
        low, high = RANGES.get(name, (0, 0))
        if name in RANGES and value is not None and not low <= value <= high:
            shown = f"{value:g}" if isinstance(value, float) else value
            least = "more than 0" if low == ABOVE_0 else f"at least {low:g}"
            most = {MAX: "", BELOW_1: " and less than 1"}.get(high, f" and at most {high:.10g}")
            raise UsageError(f"{flag(name)} {shown} is out of range; use {least}{most}")


def rules(options: Options, flags: TrainerFlags) -> list[Rule]:
    """The flags that contradict others or have no effect with them."""
    paper = "{flag} {given} contradicts --recipe paper, which sets {value}; leave one out"
    two_places = "{flag} and --eval-shards both choose the text to evaluate on; use one"
    fix = "leave it out, or change the other flag"
    held_out = "without held-out text (--eval-fraction above 0, or --eval-shards)"
    evaluates = bool(options.eval_shards) or options.eval_fraction != 0
    no_effect: list[tuple[bool, str, dict[str, object]]] = [
        (options.entropy_source != "self", "without --entropy-source self", {"self_refresh": None}),
        (options.hard_share == 0, "with --hard-share 0", {"self_refresh": None}),
        (not options.muon, "without --optim muon", {"muon_learning_rate": None, "muon_weight_decay": None}),
        (not evaluates, held_out, {"eval_strategy": "no", "eval_on_start": False, "eval_steps": None}),
        (not evaluates, held_out, {"eval_only": False} | _defaults("per_device_eval_batch_size")),
        (flags.eval_strategy == "no", "with --eval-strategy no", {"eval_steps": None}),
        (flags.save_strategy == "no", "with --save-strategy no", _defaults("save_steps", "save_total_limit")),
        (options.dry_run, "with --dry-run", {"num_workers": 1}),
        (bool(flags.max_steps), "with --max-steps", _defaults("num_train_epochs")),
        (flags.lr_scheduler_type == "constant", "with --lr-scheduler-type constant", _defaults("warmup_steps")),
        (not options.distill_weight, "without --distill-weight", {"targets": None, "distill_temperature": 1}),
        (not options.distill_weight, "without --distill-weight", {"distill_positions": 1}),
    ]
    return [
        (options.recipe == "paper", {"self_refresh": "step"}, paper),
        (bool(options.eval_shards), {"eval_fraction": 0.0}, two_places),
        *((holds, allowed, f"{{flag}} has no effect {case}; {fix}") for holds, case, allowed in no_effect),
    ]


def _defaults(*names: str) -> dict[str, object]:
    """The values of Trainer's flags that are not given."""
    return {name: getattr(TrainerFlags, name) for name in names}
