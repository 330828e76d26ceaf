"""The flags of train/run.py: parsed, filled in, and refused where they contradict each other, the shards or targets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser, TrainingArguments

from pipeline.checkpoints import resolve_dtype
from pipeline.cli import UsageError
from pipeline.manifests import Manifest, check_shards
from train import arguments, resume
from train.arguments import flag
from train.data import masker_of
from train.masking import MaskPolicy
from train.student import SIZES

# AdamW's learning rate with Muon beside it and alone, by size of preset; other models take those of base
MUON, MUON_LEARNING_RATE, MUON_WEIGHT_DECAY = "muon", 0.02, 0.01
LEARNING_RATES = {
    MUON: {"tiny": 4e-3, "mini": 4e-3, "small": 2e-3, "medium": 2e-3, "base": 1e-3},
    "adamw": {"tiny": 2e-3, "mini": 1e-3, "small": 5e-4, "medium": 4e-4, "base": 2e-4},
}
BATCH_SIZES = {"tiny": 32, "mini": 64, "small": 128, "medium": 128, "base": 256}  # sequences a step
DECAY_SHARE = 0.2  # of a run's steps, at the end of the warmup_stable_decay schedule

SCORE = "score the corpus with pipeline/score.py --teacher"  # how to fix shards that lack scores
EVAL_FRACTION, EVAL_STEPS = 0.01, 0.2  # shares of the shards, and of the steps between evaluations

# defaults of the mask flags that differ from MaskPolicy's, by recipe (docs/RECIPES.md has the measurements)
RECIPES: dict[str, dict[str, Any]] = {
    "default": {"warmup": 0.3, "ramp": 0.3},
    # MaskPolicy.paper(); only the ratio may be set otherwise
    "paper": {"ratio": 0.15, "hard_share": 1.0, "temperature": 0.0, "warmup": 0.0, "ramp": 0.0, "by": "entropy"},
}


@dataclass(kw_only=True)
class MaskOptions:
    """Which tokens to mask and to predict; None where the flag was not given."""

    recipe: Literal["default", "paper"] | None = field(
        default=None, metadata={"help": "paper: mask the highest entropies alone, from the first step (2605.28526)"}
    )
    mask_ratio: float | None = field(
        default=None,
        metadata={"help": f"share of the tokens of a sequence that is masked (default: {MaskPolicy.ratio})"},
    )
    predict_ratio: float | None = field(
        default=None,
        metadata={
            "help": "share of the tokens of a sequence that is predicted, at most the mask ratio (default: all masked)"
        },
    )
    hard_share: float | None = field(
        default=None,
        metadata={
            "help": f"share of a mask that is chosen by score, the rest at random (default: {MaskPolicy.hard_share})"
        },
    )
    mask_warmup: float | None = field(
        default=None,
        metadata={
            "help": f"share of the run, at its start, with random masks (default: {RECIPES['default']['warmup']})"
        },
    )
    mask_ramp: float | None = field(
        default=None,
        metadata={
            "help": "share of the run after the warm-up over which the hard share rises from 0 (default: "
            f"{RECIPES['default']['ramp']})"
        },
    )
    mask_temperature: float | None = field(
        default=None,
        metadata={
            "help": f"τ: sample from softmax(rank/τ); 0 takes the highest scores (default: {MaskPolicy.temperature})"
        },
    )
    mask_by: Literal["entropy", "surprisal", "excess"] | None = field(
        default=None,
        metadata={
            "help": "score: entropy of the prediction (default), surprisal of the token, or the student's loss minus "
            "the shards' surprisal (self only)"
        },
    )
    predict_by: Literal["random", "entropy", "surprisal", "excess"] | None = field(
        default=None, metadata={"help": "what chooses the predicted tokens among the masked ones (default: random)"}
    )
    corruption: Literal["bert", "mask-only"] | None = field(
        default=None, metadata={"help": "bert (default): 80 %% [MASK], 10 %% random, 10 %% kept; or [MASK] only"}
    )
    mask_unit: Literal["token", "word"] | None = field(
        default=None, metadata={"help": "mask token by token (default), or the pieces of a word together"}
    )


@dataclass(kw_only=True)
class Options(MaskOptions):
    """What this trainer knows beyond TrainingArguments."""

    shards: str = field(metadata={"help": "shard directory made by pipeline/score.py, a path or a URI"})
    entropy_source: Literal["random", "parquet", "self"] = field(
        metadata={"help": "mask at random, by the entropies of the shards, or by the student's own"}
    )
    model: str = field(
        default="tiny",
        metadata={"help": "tiny, mini, small, medium, base; a config.json; or a checkpoint, whose training goes on"},
    )
    targets: str | None = field(
        default=None,
        metadata={"help": "distil from this target directory, with its masks (default: from the shards)"},
    )
    distill_weight: float = field(default=0.0, metadata={"help": "α in (1 - α)·CE + α·T²·KL(teacher ‖ student)"})
    distill_temperature: float | None = field(
        default=None, metadata={"help": "distillation temperature T; the teacher's scores must include it (default: 1)"}
    )
    distill_positions: float | None = field(
        default=None,
        metadata={"help": "all (default), or a share: distil at the predicted tokens with the highest student entropy"},
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": f"Muon's learning rate, for the hidden matrices (default: {MUON_LEARNING_RATE})"},
    )
    muon_weight_decay: float | None = field(
        default=None, metadata={"help": f"Muon's weight decay (default: {MUON_WEIGHT_DECAY})"}
    )
    self_refresh: Literal["means", "step"] | None = field(
        default=None,
        metadata={
            "help": "self: running means of the scores at masked tokens, by type (default), or a forward of its own on "
            "each batch (default of --recipe paper)"
        },
    )
    eval_fraction: float | None = field(
        default=None, metadata={"help": "share of the shards held out (default: 0.01); 0 for no evaluation"}
    )
    eval_shards: str | None = field(
        default=None, metadata={"help": "evaluate on this shard directory (default: on the shards held out)"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run model code that a checkpoint brings along"})
    num_workers: int = field(
        default=1, metadata={"help": "train in N processes on a Ray cluster, one per GPU (default: in this process)"}
    )
    overwrite: bool = field(default=False, metadata={"help": "drop the run that the output directory holds"})
    muon: bool = field(default=False, init=False)  # --optim muon, which TrainingArguments does not know


def parse(argv: list[str], description: str | None) -> tuple[Options, TrainingArguments]:
    """Flags → options and training arguments, with the defaults that pretraining wants."""
    parser = HfArgumentParser(
        [Options, TrainingArguments],  # type: ignore[arg-type, list-item]
        prog="train/run.py",
        description=description,
        allow_abbrev=False,
    )
    parser.set_defaults(
        output_dir="",
        optim=None,
        learning_rate=None,
        per_device_train_batch_size=None,
        dataloader_num_workers=None,
        accelerator_config=None,
        eval_strategy=None,
        eval_on_start=None,
        per_device_eval_batch_size=64,
        num_train_epochs=1.0,
        warmup_steps=0.06,  # below 1 it is a share of all steps
        weight_decay=0.01,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        bf16=resolve_dtype("auto") == "bfloat16",
        use_cpu=not (torch.cuda.is_available() or torch.xpu.is_available()),
        logging_steps=50,
        logging_nan_inf_filter=False,  # it hides NaN, and waits for the device at each batch
        ddp_find_unused_parameters=False,  # a search at each step for what there is none of
        # all ranks wait while one a machine checks every byte of the shards; an hour is some 2 TB, and so long, too,
        # does a rank that hangs hold up a cluster of GPUs
        ddp_timeout=3_600,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
    )
    for action in parser._actions:
        if action.dest == "optim" and action.choices is not None:
            action.choices = [*action.choices, MUON]
        if action.dest == "distill_positions":
            action.type = share
    flags = vars(parser.parse_args(argv))
    size = flags["model"].removeprefix("bert-")
    if flags["optim"] is None:  # other models (configurations, checkpoints) use AdamW
        flags["optim"] = MUON if size in SIZES else TrainingArguments.optim
    if muon := flags["optim"] == MUON:
        flags["optim"] = TrainingArguments.optim  # of the parameters that are no hidden matrices
    rates = LEARNING_RATES[MUON if muon else "adamw"]
    by_size: dict[str, dict[str, Any]] = {"learning_rate": rates, "per_device_train_batch_size": BATCH_SIZES}
    for name, defaults in by_size.items():
        if flags[name] is None:
            flags[name] = defaults.get(size, defaults["base"])
    if flags["dataloader_num_workers"] is None:
        flags["dataloader_num_workers"] = 0 if flags["use_cpu"] else 2
    if flags["accelerator_config"] is None:  # copies to a device, from pinned memory, do not hold up the host
        flags["accelerator_config"] = {"non_blocking": not flags["use_cpu"]}
    if not flags["output_dir"]:
        raise UsageError("--output-dir is needed: the directory of the model to be trained")
    if "://" in flags["output_dir"]:
        raise UsageError(
            f"--output-dir {flags['output_dir']} is a URI; use a path, because checkpoints need a file system"
        )
    if flags["eval_fraction"] is None:
        flags["eval_fraction"] = 0.0 if flags["eval_shards"] else EVAL_FRACTION
    if flags["do_eval"]:
        raise UsageError("--do-eval is not used here; leave it out and set --eval-strategy")
    if flags["eval_strategy"] is None:
        evaluations: dict[str, Any] = {"eval_strategy": "no"}
        if flags["eval_fraction"] or flags["eval_shards"]:  # often enough to see that a run collapses
            evaluations = {"eval_strategy": "steps", "eval_steps": EVAL_STEPS, "eval_on_start": True}
        flags |= {name: value for name, value in evaluations.items() if flags[name] is None}
    flags["eval_on_start"] = bool(flags["eval_on_start"])
    arguments.check(flags)
    with arguments.taken():  # TrainingArguments checks itself
        options, args = parser.parse_dict(flags)
    if options.entropy_source == "self" and options.self_refresh is None:
        options.self_refresh = "step" if options.recipe == "paper" else "means"  # step is the paper's
    options.muon = muon
    if muon:
        if options.muon_learning_rate is None:
            options.muon_learning_rate = MUON_LEARNING_RATE
        if options.muon_weight_decay is None:
            options.muon_weight_decay = MUON_WEIGHT_DECAY
    arguments.check_device(args)
    return options, args


def share(text: str) -> float:
    """A share of something, or all of it."""
    return 1.0 if text == "all" else float(text)


def check(
    options: Options, args: TrainingArguments, manifest: Manifest, targets: Manifest | None, evaluated: Manifest | None
) -> None:
    """Refuse flags that contradict each other, the shards or the targets, before anything is built."""
    # every byte is checked when a run begins, by one process a machine; so it goes on at once, whatever the corpus
    begun = not options.overwrite and resume.has_begun(Path(str(args.output_dir)), manifest, targets)
    for directory in filter(None, (manifest, targets, evaluated)):
        check_shards(directory, contents=not (begun or args.local_process_index))
    source = options.entropy_source
    check_scored(options, source, manifest)
    if options.mask_unit == "word":
        masker_of(manifest, "word")
    if not 0 <= (fraction := options.eval_fraction or 0.0) < 1:
        raise UsageError(f"--eval-fraction {fraction:g} is not at least 0 and below 1")
    if evaluated and fraction:
        raise UsageError("--eval-fraction holds shards out, and --eval-shards says what is evaluated on; use one")
    if options.recipe == "paper" and options.self_refresh == "means":
        raise UsageError("--self-refresh means contradicts --recipe paper, which sets step; leave one out")
    if source != "self" and options.self_refresh is not None:
        raise UsageError("--self-refresh only applies to --entropy-source self; leave it out")
    if options.num_workers > 1 and args.world_size > 1:
        raise UsageError(
            f"--num-workers {options.num_workers} starts processes, and there are {args.world_size} already; use it "
            "without torchrun, or leave it out"
        )
    if args.n_gpu > 1 and options.num_workers < 2:
        raise UsageError(
            f"{args.n_gpu} GPUs are visible; use them with torchrun --nproc-per-node {args.n_gpu} train/run.py … or "
            f"--num-workers {args.n_gpu}, or choose one with CUDA_VISIBLE_DEVICES"
        )
    for name, wanted in (("eval_on_start", args.eval_on_start), ("eval_strategy", args.eval_strategy != "no")):
        if wanted and not (fraction or evaluated):
            raise UsageError(f"{flag(name)} needs held-out shards; set --eval-fraction above 0, or --eval-shards")
    if args.load_best_model_at_end and args.save_steps != args.eval_steps:
        raise UsageError(
            "--load-best-model-at-end needs a checkpoint of each evaluation; set --save-steps to --eval-steps"
        )
    if args.load_best_model_at_end and args.save_total_limit == 1:
        raise UsageError(
            "--save-total-limit 1 keeps only the best checkpoint with --load-best-model-at-end, so the run could not "
            "resume; use at least 2"
        )
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise UsageError("--dataloader-persistent-workers needs workers; set --dataloader-num-workers above 0")
    for name in ("muon_learning_rate", "muon_weight_decay"):
        if not options.muon and getattr(options, name) is not None:
            raise UsageError(f"{flag(name)} only applies to --optim muon; leave it out")
    for name in ("targets", "distill_temperature", "distill_positions"):
        if getattr(options, name) is not None and not options.distill_weight:
            raise UsageError(f"{flag(name)} is for distillation; set --distill-weight above 0, or leave it out")
    if options.distill_weight and not targets and not manifest.top_k:
        raise UsageError(f"{manifest.uri} has no top-k log-probabilities to distil from; {SCORE} … --top-k 16")
    taught = targets or manifest
    if options.distill_temperature not in (None, 1.0, *taught.temperatures):
        scored = ", ".join(f"{T:g}" for T in taught.temperatures)
        raise UsageError(
            f"--distill-temperature {options.distill_temperature:g} was not scored: {taught.uri} has {scored}; "
            "use one of those, or score it with pipeline/score.py --temperatures"
        )


def check_scored(options: MaskOptions, source: str, manifest: Manifest) -> None:
    """Refuse to mask, or to choose what is predicted, by scores that the shards lack."""
    if manifest.scored:
        return
    if source == "parquet":
        raise UsageError(f"{manifest.uri} has no scores (made with --teacher none); {SCORE} for parquet")
    for name in ("mask_by", "predict_by"):
        if getattr(options, name) == "excess":
            raise UsageError(
                f"{flag(name)} excess subtracts the surprisal of a reference, which {manifest.uri} lacks (made with "
                f"--teacher none); {SCORE}"
            )


def mask_policy(options: MaskOptions, source: str, seed: int, planned: bool = False) -> MaskPolicy:
    """The policy that the flags of a run name, or those of a plan, which has neither warm-up nor ramp.

    Args:
        planned: the masks are made without a run, so its progress is not known.

    Raises:
        UsageError: flags out of range, or that have no use with the others.
    """
    given = given_masks(options)
    if source == "random":
        for name in ("hard_share", "warmup", "ramp", "temperature", "by"):
            if name in given:
                raise UsageError(f"{mask_flag(name)} needs scores, and --entropy-source random has none; leave it out")
        if options.recipe:
            raise UsageError("--recipe needs scores, and --entropy-source random has none; leave it out")
        if given.get("predict_by", "random") != "random":
            raise UsageError(
                "--predict-by needs scores, and --entropy-source random has none; use --entropy-source parquet "
                "--hard-share 0"
            )
        recipe: dict[str, Any] = {"hard_share": 0.0}
    else:
        recipe = RECIPES[options.recipe or "default"]
    if options.recipe == "paper":
        if "predict_ratio" in given:
            raise UsageError(
                "--predict-ratio contradicts --recipe paper, which predicts all masked tokens; leave one out"
            )
        for name, value in recipe.items():
            if name != "ratio" and given.get(name, value) != value:
                raise UsageError(
                    f"{mask_flag(name)} {given[name]} contradicts --recipe paper, which sets {value}; leave one out"
                )
    if planned:
        for name in ("warmup", "ramp"):
            if given.get(name):
                raise UsageError(
                    f"{mask_flag(name)} depends on the length of a run, which is not known here; leave it out"
                )
        if "predict_ratio" in given:
            raise UsageError("--predict-ratio has no use in a plan, which predicts all that it masks; leave it out")
        recipe = recipe | {"warmup": 0.0, "ramp": 0.0}
    if given.get("by") == "excess" and source != "self":
        raise UsageError("--mask-by excess needs the student's own loss; use --entropy-source self")
    ratio = given.get("ratio", recipe.get("ratio", MaskPolicy.ratio))
    if "predict_by" in given and given.get("predict_ratio", ratio) == ratio:
        raise UsageError(
            "--predict-by chooses among the masked tokens; set --predict-ratio below the mask ratio, or leave it out"
        )
    if given.get("hard_share") == 0:
        for name in ("warmup", "ramp", "temperature", "by"):
            if name in given:
                raise UsageError(
                    f"{mask_flag(name)} has no use with --hard-share 0, which masks at random; leave it out"
                )
        recipe = recipe | {"warmup": 0.0, "ramp": 0.0}
    try:
        return MaskPolicy(seed=seed, **(recipe | given))
    except ValueError as error:
        raise UsageError(str(error)) from None


def given_masks(options: MaskOptions) -> dict[str, Any]:
    """The mask flags that were given, by the name that a policy has for them."""
    given = {name: getattr(options, field) for name, field in FIELDS.items()}
    return {name: value for name, value in given.items() if value is not None}


# of MaskOptions, by the name that a policy has for them
FIELDS = {name: name for name in ("hard_share", "predict_ratio", "predict_by", "corruption")}
FIELDS |= {name: f"mask_{name}" for name in ("ratio", "warmup", "ramp", "temperature", "by", "unit")}


def mask_flag(name: str) -> str:
    """The flag of a field of MaskPolicy."""
    return flag(FIELDS[name])
