"""The flags of train/run.py: parsed, filled in, and refused where they contradict each other, the shards or targets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser, TrainingArguments

from pipeline import storage
from pipeline.checkpoints import resolve_dtype
from pipeline.cli import UsageError
from pipeline.manifests import Manifest, check_shards
from train import arguments, resume
from train.arguments import flag
from train.data import masker_of
from train.masking import MaskPolicy

# learning rate and sequences a step, by preset; other models take those of base
LEARNING_RATES = {"tiny": 1e-3, "mini": 1e-3, "small": 5e-4, "medium": 4e-4, "base": 2e-4}
BATCH_SIZES = {"tiny": 32, "mini": 64, "small": 128, "medium": 128, "base": 256}

SCORE = "score the corpus with pipeline/score.py --teacher"  # the mend of shards that lack something
REFRESH_EVERY = 8
EVAL_FRACTION = 0.01


@dataclass(kw_only=True)
class MaskOptions:
    """Which tokens to hide; None where the flag was not given."""

    mask_ratio: float | None = field(
        default=None, metadata={"help": "share of the tokens of a sequence that is hidden (default: 0.15)"}
    )
    mask_temperature: float | None = field(
        default=None, metadata={"help": "0 (default) hides the highest entropies, inf any, between it is sampled"}
    )
    mask_band: list[float] | None = field(
        default=None, metadata={"metavar": "Q", "help": "hide only within this quantile range of entropy: LO HI"}
    )
    mask_floor: float | None = field(
        default=None, metadata={"help": "share of the hidden tokens that is drawn uniformly (default: 0)"}
    )
    corruption: Literal["bert", "mask-only"] | None = field(
        default=None, metadata={"help": "bert (default): 80 %% [MASK], 10 %% random, 10 %% kept; or [MASK] only"}
    )
    mask_unit: Literal["token", "word"] | None = field(
        default=None, metadata={"help": "hide token by token (default), or the pieces of a word together"}
    )
    mask_by: Literal["entropy", "surprisal"] | None = field(
        default=None, metadata={"help": "rank by the entropy of the prediction (default), or the token's surprisal"}
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
        metadata={"help": "distil from these (pipeline/score.py --masks), with their masks (default: from the shards)"},
    )
    distill_weight: float = field(default=0.0, metadata={"help": "α in (1 - α)·CE + α·T²·KL(teacher ‖ student)"})
    distill_temperature: float | None = field(
        default=None, metadata={"help": "T of both distributions, one that was scored (default: 1)"}
    )
    self_warmup_steps: int | None = field(
        default=None, metadata={"help": "self: steps masked at random first (default: a tenth of all)"}
    )
    self_refresh: Literal["step", "lagged"] | None = field(
        default=None,
        metadata={
            "help": "self: a forward of its own each step (default), or scores kept since a sequence's last visit"
        },
    )
    self_refresh_every: int | None = field(
        default=None, metadata={"help": f"lagged: a visit scores one in so many positions (default: {REFRESH_EVERY})"}
    )
    export_entropies: str | None = field(
        default=None, metadata={"help": "self: at the end write the student's entropies as a shard directory, here"}
    )
    eval_fraction: float | None = field(
        default=None, metadata={"help": "share of the shards held out (default: 0.01); 0 for no evaluation"}
    )
    eval_shards: str | None = field(
        default=None, metadata={"help": "evaluate on this shard directory (default: on the shards held out)"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run model code that a checkpoint brings along"})
    num_workers: int = field(
        default=1, metadata={"help": "train in so many processes on a Ray cluster, one a GPU (default: in this one)"}
    )
    overwrite: bool = field(default=False, metadata={"help": "drop the run that the output directory holds"})


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
        learning_rate=None,
        per_device_train_batch_size=None,
        dataloader_num_workers=None,
        accelerator_config=None,
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
    flags = vars(parser.parse_args(argv))
    by_preset: dict[str, dict[str, Any]] = {"learning_rate": LEARNING_RATES, "per_device_train_batch_size": BATCH_SIZES}
    for name, defaults in by_preset.items():
        if flags[name] is None:
            flags[name] = defaults.get(flags["model"], defaults["base"])
    if flags["dataloader_num_workers"] is None:
        flags["dataloader_num_workers"] = 0 if flags["use_cpu"] else 2
    if flags["accelerator_config"] is None:  # copies to a device, from pinned memory, do not hold up the host
        flags["accelerator_config"] = {"non_blocking": not flags["use_cpu"]}
    if not flags["output_dir"]:
        raise UsageError("--output-dir is needed: the directory of the model to be trained")
    if "://" in flags["output_dir"]:
        raise UsageError(f"--output-dir {flags['output_dir']} is no path; checkpoints need a file system")
    if flags["eval_fraction"] is None:
        flags["eval_fraction"] = 0.0 if flags["eval_shards"] else EVAL_FRACTION
    arguments.check(flags)
    with arguments.taken():  # TrainingArguments checks itself
        options, args = parser.parse_dict(flags)
    arguments.check_device(args)
    return options, args


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
    for name in ("self_warmup_steps", "self_refresh", "self_refresh_every", "export_entropies"):
        if source != "self" and getattr(options, name) is not None:
            raise UsageError(f"{flag(name)} only applies to --entropy-source self; leave it out")
    if options.self_refresh_every is not None and options.self_refresh != "lagged":
        raise UsageError("--self-refresh-every only applies to --self-refresh lagged; leave it out")
    if options.self_refresh == "lagged" and options.mask_band:
        raise UsageError("--mask-band needs scores of every position, which --self-refresh step has; use that")
    if options.export_entropies and options.self_refresh == "lagged" and options.mask_by == "surprisal":
        raise UsageError("--export-entropies has none of a run that keeps surprisals; use --self-refresh step")
    if options.num_workers > 1 and args.world_size > 1:
        raise UsageError(
            f"--num-workers {options.num_workers} starts processes, and there are {args.world_size} already; use it "
            "without torchrun, or leave it out"
        )
    exported = options.export_entropies
    if exported and storage.absolute(exported) == storage.absolute(str(args.output_dir)):
        raise UsageError("--export-entropies is the --output-dir; choose another directory for the entropies")
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
            "--save-total-limit 1 leaves --load-best-model-at-end no checkpoint but the best one, so no run could go "
            "on; use at least 2"
        )
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise UsageError("--dataloader-persistent-workers needs workers; set --dataloader-num-workers above 0")
    if args.do_eval and args.eval_strategy == "no":
        raise UsageError("--do-eval has no use here; --eval-fraction holds shards out, --eval-strategy says when")
    for name in ("targets", "distill_temperature"):
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
    """Refuse to mask by scores that the shards lack."""
    if source == "parquet" and not manifest.scored:
        lacking = "surprisals" if options.mask_by == "surprisal" else "entropies"
        raise UsageError(f"{manifest.uri} has no {lacking} (made with --teacher none); {SCORE} for parquet")
    run = manifest.fingerprint.get("run") or {}  # that exported them
    if source == "parquet" and options.mask_by == "surprisal" and run.get("self_refresh") == "lagged":
        raise UsageError(f"{manifest.uri} has no surprisals (kept by --self-refresh lagged); use --mask-by entropy")


def mask_policy(options: MaskOptions, source: str, seed: int) -> MaskPolicy:
    """The policy that the flags of a run, or of a plan, name.

    Raises:
        UsageError: flags out of range, or that have no use with the others.
    """
    for name in ("mask_temperature", "mask_band", "mask_floor", "mask_by"):
        if source == "random" and getattr(options, name) is not None:
            by = options.mask_by or "entropy"
            raise UsageError(f"{flag(name)} ranks by {by}, which --entropy-source random has none of; leave it out")
    for name in ("mask_band", "mask_floor", "mask_by"):
        if options.mask_temperature == math.inf and getattr(options, name) is not None:
            raise UsageError(f"{flag(name)} has no use with --mask-temperature inf, which hides any; leave it out")
    if source == "self" and options.mask_temperature == math.inf:
        raise UsageError("--mask-temperature inf hides any tokens, whatever the scores; use --entropy-source random")
    if options.mask_band and len(options.mask_band) != 2:
        raise UsageError("--mask-band takes two quantiles, as in --mask-band 0.5 1")
    random = {"temperature": math.inf} if source == "random" else {}
    try:
        return MaskPolicy(seed=seed, **(given_masks(options) | random))
    except ValueError as error:
        raise UsageError(str(error)) from None


def given_masks(options: MaskOptions) -> dict[str, Any]:
    """The mask flags that were given, by the name that a policy has for them."""
    given = {
        "ratio": options.mask_ratio,
        "temperature": options.mask_temperature,
        "band": options.mask_band and tuple(options.mask_band),
        "floor": options.mask_floor,
        "corruption": options.corruption,
        "unit": options.mask_unit,
        "by": options.mask_by,
    }
    return {name: value for name, value in given.items() if value is not None}
