"""The flags of train/run.py, its own and those of Trainer: their ranges, and which of them contradict others."""

import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from entropy_masking.commands.flags import Parser, Rule, check_rules, flag, option
from entropy_masking.commands.mask_flags import MAX_SEED, TrainingMaskOptions
from entropy_masking.errors import UsageError

# layers and hidden size of Google's BERT miniatures (Turc et al. 2019, arXiv 1908.08962)
SIZES = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "medium": (8, 512), "base": (12, 768)}
MUON, MUON_LEARNING_RATE, MUON_WEIGHT_DECAY = "muon", 0.02, 0.01
BY_SIZE = "(default: by the size of the model)"


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
    eval_fraction: float | None = option("share of the documents to hold out (default: 0.01); 0 for no evaluation")
    eval_shards: str | None = option("evaluate on this shard directory (default: on held-out documents)")
    trust_remote_code: bool = option("run model code from the checkpoint", False)
    num_workers: int = option("train in N processes on a Ray cluster, one per GPU (default: in this process)", 1)
    dry_run: bool = option("print what the run would do, and stop", False)
    eval_only: bool = option("only evaluate the model, which is not changed", False)
    overwrite: bool = option("delete the run in the output directory, and start again", False)
    muon: bool = field(default=False, init=False)  # --optim muon, which TrainingArguments does not know
    argv: list[str] = field(default_factory=list, init=False)  # the flags of --config and of the command line
    as_yaml: str = field(default="", init=False)  # the same as a file for --config


@dataclass(kw_only=True)
class TrainerFlags:
    """The supported flags of transformers.TrainingArguments, with defaults for pretraining."""

    output_dir: str = option("directory of the trained model, its checkpoints and its summary", MISSING)
    max_steps: int | None = option("steps of the run (default: from the epochs)")
    num_train_epochs: float = option("epochs of the run, unless --max-steps is given (default: 1)", 1.0)
    per_device_train_batch_size: int | None = option(f"sequences per batch of a device {BY_SIZE}")
    gradient_accumulation_steps: int = option("batches per step on each device (default: 1)", 1)
    per_device_eval_batch_size: int = option("sequences per batch in an evaluation (default: 64)", 64)

    optim: Literal["muon", "adamw_torch", "adamw_torch_fused"] | None = option(
        "optimizer (default: muon for presets, otherwise AdamW)"
    )
    learning_rate: float | None = option(
        f"AdamW's peak learning rate; beside Muon, that of embeddings, norms and biases {BY_SIZE}"
    )
    weight_decay: float = option("AdamW's weight decay (default: 0.01)", 0.01)
    adam_beta1: float = option("AdamW's β1 (default: 0.9)", 0.9)
    adam_beta2: float = option("AdamW's β2 (default: 0.98)", 0.98)
    adam_epsilon: float = option("AdamW's ε (default: 1e-6)", 1e-6)
    max_grad_norm: float = option("clip gradients to this norm; 0 for no clipping (default: 1)", 1.0)
    lr_scheduler_type: Literal[
        "linear", "cosine", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup", "warmup_stable_decay"
    ] = option("learning-rate schedule (default: linear)", "linear")
    warmup_steps: float = option("steps of learning-rate warm-up; below 1 a share of all steps (default: 0.06)", 0.06)

    bf16: bool | None = option("train in bfloat16 (default: if the hardware has it)")
    fp16: bool = option("train in float16", False)
    tf32: bool | None = option("multiply float32 matrices in TF32")
    activation_checkpointing: bool | None = option("compute activations twice to save memory")
    torch_compile: bool = option("compile the model", False)

    logging_steps: float = option("log every N steps; below 1 a share of all steps (default: 50)", 50)
    report_to: str = option("another place to log, e.g. tensorboard (default: none)", "none")
    eval_strategy: Literal["no", "steps"] | None = option(
        "whether to evaluate during the run (default: steps, if there is held-out text)"
    )
    eval_steps: float | None = option("evaluate every N steps; below 1 a share of all steps (default: 0.2)")
    eval_on_start: bool | None = option("evaluate before the first step (default: yes, if --eval-strategy is steps)")
    save_strategy: Literal["no", "steps"] = option("whether to save checkpoints (default: steps)", "steps")
    save_steps: float = option("save a checkpoint every N steps; below 1 a share of all steps (default: 500)", 500)
    save_total_limit: int | None = option("checkpoints to keep; 0 for all (default: 2)", 2)

    seed: int = option("seed of the weights and of the masks (default: 42)", 42)
    data_seed: int | None = option("seed of the order of the sequences (default: --seed)")
    full_determinism: bool = option("use deterministic kernels only, which are slower", False)
    use_cpu: bool | None = option("train on the CPU (default: without CUDA and XPU)")
    dataloader_num_workers: int | None = option(
        "processes that read and mask the next batches (default: 2; 0 on a CPU)"
    )
    ddp_timeout: int = option("seconds that a process waits for the others (default: 3600)", 3_600)


# what --help shows; --help-all shows the other flags too
GROUPS = {
    "data": "shards entropy_source targets eval_shards eval_fraction output_dir overwrite dry_run eval_only",
    "model and length": "model max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps",
    "masks": "recipe mask_ratio hard_share mask_temperature mask_warmup mask_ramp mask_by mask_unit corruption",
    "predictions and distillation": "predict_ratio predict_by distill_weight distill_temperature distill_positions",
    "optimization": "optim learning_rate muon_learning_rate weight_decay warmup_steps lr_scheduler_type bf16 seed",
    "logs, evaluations and checkpoints": "logging_steps report_to eval_steps save_steps save_total_limit",
    "several processes": "num_workers",
}

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


def check_ranges(given: Mapping[str, Any]) -> None:
    """Refuse numbers out of range. Raises UsageError."""
    for name, value in given.items():
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
