#!/usr/bin/env python3
"""Train a masked LM on scored shards; which tokens to hide comes from the shards, from the student, or from chance.

python train/run.py --shards runs/scored --entropy-source parquet --output-dir runs/student
python train/run.py --shards runs/scored --entropy-source parquet --distill-weight 0.5 --output-dir runs/student-kd
python train/run.py --shards runs/scored --entropy-source self --model mini --max-steps 10000 --output-dir runs/self
python train/run.py --shards runs/tokens --entropy-source random --output-dir runs/reference

Besides the flags below it takes those of transformers.TrainingArguments, with defaults for pretraining. The same
command resumes a run that was cut short.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.utils import logging

from pipeline import cli, storage
from pipeline.cli import UsageError
from pipeline.shards import Manifest, check_shards, copy_tokenizer, read_manifest
from pipeline.teacher import resolve_dtype
from train import resume
from train.data import split_shards
from train.masking import MaskPolicy
from train.student import build_student
from train.trainer import DECILES, MaskedLMTrainer

# learning rate and sequences a step, by preset; other models take those of base
LEARNING_RATES = {"tiny": 1e-3, "mini": 1e-3, "small": 5e-4, "medium": 4e-4, "base": 2e-4}
BATCH_SIZES = {"tiny": 32, "mini": 64, "small": 128, "medium": 128, "base": 256}


@dataclass
class Options:
    """What this trainer knows beyond TrainingArguments."""

    shards: str = field(metadata={"help": "shard directory made by pipeline/score.py, a path or a URI"})
    entropy_source: Literal["random", "parquet", "self"] = field(
        metadata={"help": "mask at random, by the entropies of the shards, or by the student's own"}
    )
    model: str = field(
        default="tiny",
        metadata={"help": "tiny, mini, small, medium, base; a config.json; or a checkpoint, whose training goes on"},
    )
    mask_ratio: float = field(default=0.15, metadata={"help": "share of the tokens of a sequence that is hidden"})
    mask_temperature: float | None = field(
        default=None, metadata={"help": "0 (default) hides the highest entropies, inf any, between it is sampled"}
    )
    mask_band: list[float] | None = field(
        default=None, metadata={"metavar": "Q", "help": "hide only within this quantile range of entropy: LO HI"}
    )
    mask_floor: float | None = field(
        default=None, metadata={"help": "share of the hidden tokens that is drawn uniformly (default: 0)"}
    )
    corruption: Literal["bert", "mask-only"] = field(
        default="bert", metadata={"help": "80 %% [MASK], 10 %% random, 10 %% kept; or [MASK] only"}
    )
    distill_weight: float = field(default=0.0, metadata={"help": "α in (1 - α)·CE + α·KL(teacher ‖ student)"})
    self_warmup_steps: int | None = field(
        default=None, metadata={"help": "self: steps masked at random first (default: a tenth of all)"}
    )
    eval_fraction: float = field(default=0.01, metadata={"help": "share of the shards held out; 0 for no evaluation"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run model code that a checkpoint brings along"})
    overwrite: bool = field(default=False, metadata={"help": "drop the run that the output directory holds"})


def main(argv: list[str] | None = None) -> None:
    options, args = parse(sys.argv[1:] if argv is None else argv)
    logging.disable_progress_bar()  # of reading and writing weights
    manifest = read_manifest(options.shards)
    check(options, args, manifest)
    policy = mask_policy(options, args.seed)
    train_shards, held_out = split_shards(manifest, options.eval_fraction)
    set_steps(options, args, sum(entry.rows for entry in train_shards))

    student = build_student(options.model, manifest, args.seed, options.trust_remote_code)
    output, flags = Path(str(args.output_dir)), deciding_flags(options, args, manifest)
    with args.main_process_first(local=False):
        if not resume.claim(output, flags, options.overwrite):
            print(f"{output} is finished already; pass --overwrite to train it again")
            return
    set_seed(args.seed)
    trainer = MaskedLMTrainer(
        student,
        args,
        manifest=manifest,
        shards=train_shards,
        held_out=held_out,
        source=options.entropy_source,
        policy=policy,
        distill_weight=options.distill_weight,
        self_warmup_steps=options.self_warmup_steps or 0,
    )
    checkpoint = resume.last_checkpoint(output)
    if checkpoint and trainer.is_world_process_zero():
        print(f"resuming from {checkpoint}", file=sys.stderr)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = trainer.train_seconds()
    metrics = trainer.evaluate() if held_out else {}
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).save_pretrained(output)
        copy_tokenizer(manifest.uri, output)
        summary = summarise(options, args, manifest, flags, trainer.state.log_history, seconds, metrics)
        storage.write_json(str(output / resume.SUMMARY), summary)  # last: it marks the run as finished
        print_summary(output, summary)


def parse(argv: list[str]) -> tuple[Options, TrainingArguments]:
    """Flags → options and training arguments, with the defaults that pretraining wants."""
    parser = HfArgumentParser(
        [Options, TrainingArguments],  # type: ignore[arg-type, list-item]
        prog="train/run.py",
        description=__doc__,
        allow_abbrev=False,
    )
    preset = next((argv[i + 1] for i, arg in enumerate(argv[:-1]) if arg == "--model"), Options.model)
    preset = next((arg.partition("=")[2] for arg in argv if arg.startswith("--model=")), preset)
    bfloat16 = resolve_dtype("auto") == "bfloat16"
    parser.set_defaults(
        output_dir="",
        learning_rate=LEARNING_RATES.get(preset, LEARNING_RATES["base"]),
        per_device_train_batch_size=BATCH_SIZES.get(preset, BATCH_SIZES["base"]),
        per_device_eval_batch_size=64,
        num_train_epochs=1.0,
        warmup_steps=0.06,  # below 1 it is a share of all steps
        weight_decay=0.01,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        bf16=bfloat16,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=50,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,  # the trainer draws its own bar
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
    )
    try:
        options, args = parser.parse_args_into_dataclasses(argv)
    except (ValueError, ImportError) as error:  # TrainingArguments checks itself
        raise UsageError(" ".join(str(error).split())) from None
    if not args.output_dir:
        raise UsageError("--output-dir is needed: the directory of the model to be trained")
    return options, args


def check(options: Options, args: TrainingArguments, manifest: Manifest) -> None:
    """Refuse flags that contradict each other or the shards, before anything is built."""
    check_shards(manifest)
    source, again = options.entropy_source, "score the corpus with pipeline/score.py --teacher"
    if not 0 <= options.distill_weight <= 1:
        raise UsageError(f"--distill-weight {options.distill_weight:g} is not between 0 and 1")
    if source == "parquet" and not manifest.scored:
        raise UsageError(f"{manifest.uri} has no entropies (made with --teacher none); {again} for parquet")
    if options.distill_weight and not manifest.top_k:
        raise UsageError(f"{manifest.uri} has no top-k log-probabilities to distil from; {again} … --top-k 16")
    if not 0 <= options.eval_fraction < 1:
        raise UsageError(f"--eval-fraction {options.eval_fraction:g} is not at least 0 and below 1")
    if source != "self" and options.self_warmup_steps is not None:
        raise UsageError("--self-warmup-steps only applies to --entropy-source self; leave it out")
    for name in ("mask_temperature", "mask_band", "mask_floor"):
        if source == "random" and getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} ranks by entropy, which --entropy-source random has none of; leave it out")
    if options.mask_band and len(options.mask_band) != 2:
        raise UsageError("--mask-band takes two quantiles, as in --mask-band 0.5 1")
    if args.eval_strategy != "no" and not options.eval_fraction:
        raise UsageError("--eval-strategy needs held-out shards; set --eval-fraction above 0")
    fixed = {
        "train_sampling_strategy": "sequential",  # the dataset knows the order
        "remove_unused_columns": False,
        "label_smoothing_factor": 0.0,
        "auto_find_batch_size": False,
        "ignore_data_skip": False,
        "resume_from_checkpoint": None,  # the same command resumes
    }
    for name, value in fixed.items():
        if getattr(args, name) != value:
            raise UsageError(f"--{name.replace('_', '-')} has no use here; leave it out")


def mask_policy(options: Options, seed: int) -> MaskPolicy:
    low, high = options.mask_band or (0.0, 1.0)
    temperature = math.inf if options.entropy_source == "random" else options.mask_temperature or 0.0
    try:
        return MaskPolicy(
            options.mask_ratio, temperature, (low, high), options.mask_floor or 0.0, options.corruption, seed
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def set_steps(options: Options, args: TrainingArguments, rows: int) -> None:
    """Turn epochs into steps, where no number of steps is given, and the self-masking warm-up with them."""
    if args.max_steps <= 0:
        args.max_steps = max(1, math.ceil(args.num_train_epochs * rows / global_batch(args)))
    if options.entropy_source == "self" and options.self_warmup_steps is None:
        options.self_warmup_steps = args.max_steps // 10


def global_batch(args: TrainingArguments) -> int:
    """Sequences a step, over all devices."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def deciding_flags(options: Options, args: TrainingArguments, manifest: Manifest) -> dict[str, Any]:
    """Everything that decides what is learned; two runs with the same may share a directory."""
    own = {name: value for name, value in asdict(options).items() if name not in ("shards", "overwrite")}
    run = {"shards": manifest.fingerprint_hash, "steps": args.max_steps, "global_batch": global_batch(args)}
    return own | run | resume.deciding(args.to_dict())


def summarise(
    options: Options,
    args: TrainingArguments,
    manifest: Manifest,
    flags: dict[str, Any],
    history: list[dict[str, Any]],
    seconds: float,
    metrics: dict[str, float],
) -> dict[str, Any]:
    tokens = args.max_steps * global_batch(args) * manifest.sequence_length
    uses_scores = options.entropy_source == "parquet" or options.distill_weight > 0
    deciles = [metrics.get(f"eval_loss_decile_{decile}") for decile in range(1, DECILES + 1)]
    return {
        "regime": options.entropy_source + ("+kd" if options.distill_weight else ""),
        "model": options.model,
        "steps": args.max_steps,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "train_loss": next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
        "eval_loss": metrics.get("eval_loss"),
        "eval_accuracy": metrics.get("eval_accuracy"),
        "eval_positions": metrics.get("eval_positions"),
        "eval_loss_by_entropy_decile": deciles if manifest.scored and metrics else None,
        "scoring_seconds": manifest.totals["worker_seconds"] if uses_scores else 0.0,
        "shards": {
            "uri": manifest.uri,
            "fingerprint_hash": manifest.fingerprint_hash,
            "context": manifest.context,
            "teacher": manifest.teacher,
        },
        "seed": args.seed,
        "flags": flags,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "pyarrow")},
    }


def print_summary(output: Path, summary: dict[str, Any]) -> None:
    print(f"{output}: {summary['regime']}, {summary['steps']} steps, {summary['tokens']:,} tokens")
    print(f"  seconds     {summary['seconds']:,.1f}")
    print(f"  tokens/s    {summary['tokens_per_second']:,.0f}")
    if summary["eval_loss"] is not None:
        print(f"  eval loss   {summary['eval_loss']:.4f} nats over {summary['eval_positions']:,} masked tokens")
    if deciles := summary["eval_loss_by_entropy_decile"]:
        print(f"  by decile   {' '.join(f'{loss:.2f}' for loss in deciles if loss is not None)} (easy → hard)")


if __name__ == "__main__":
    cli.run(main)
