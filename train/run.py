#!/usr/bin/env python3
"""Train a masked LM on scored shards; which tokens to hide comes from the shards, from the student, or from chance.

python train/run.py --shards runs/scored --entropy-source parquet --output-dir runs/student
python train/run.py --shards runs/scored --entropy-source parquet --distill-weight 0.5 --output-dir runs/student-kd
python train/run.py --shards runs/scored --entropy-source self --model mini --max-steps 10000 --output-dir runs/self
python train/run.py --shards runs/tokens --entropy-source random --output-dir runs/reference
python train/run.py --shards runs/scored --entropy-source parquet --targets runs/targets --distill-weight 0.5 \
    --output-dir runs/student-exact
torchrun --nproc-per-node 2 train/run.py --shards runs/scored --entropy-source parquet --output-dir runs/student
python train/run.py --num-workers 2 --shards runs/scored --entropy-source parquet --output-dir runs/student

Besides the flags below it takes those of transformers.TrainingArguments, with defaults for pretraining. The same
command resumes a run that was cut short.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import SchedulerType, TrainingArguments, set_seed
from transformers.utils import logging

from pipeline import cli, storage
from pipeline.manifests import Manifest, copy_tokenizer, read_manifest
from train import arguments, cluster, resume
from train.data import columns_of, split_shards
from train.evaluation import DECILES
from train.flops import forward_flops, training_flops
from train.guard import check_finite, in_one_sentence, on_first, together, writing
from train.inputs import open_evaluated, open_targets, planned_policy
from train.masking import MaskPolicy
from train.options import DECAY_SHARE, FIELDS, Options, check, mask_policy, parse
from train.student import build_student, model_identity
from train.trainer import MaskedLMTrainer
from train.watch import curve


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options, args = parse(argv, __doc__)
    rank, output, source = args.process_index, Path(str(args.output_dir)), options.entropy_source
    logging.disable_progress_bar()  # of reading and writing weights
    with together(rank):
        manifest = read_manifest(options.shards)
        targets = open_targets(options, manifest) if options.targets else None
        evaluated = open_evaluated(options, manifest) if options.eval_shards else None
        check(options, args, manifest, targets, evaluated)
        policy = planned_policy(options, targets) if targets else mask_policy(options, source, args.seed)
    if options.num_workers > 1:
        return cluster.run(main, argv, options, args)
    with together(rank):
        train_shards, held_out = split_shards(manifest, options.eval_fraction or 0.0)
        if evaluated:
            held_out = [entry for entry in evaluated.shards if entry.rows]
        set_steps(options, args, sum(entry.rows for entry in train_shards))
        student = build_student(options.model, manifest, args.seed, options.trust_remote_code)
        flops = flops_of(student, options, args, policy, manifest.sequence_length)
        flags = deciding_flags(options, args, policy, manifest, targets, evaluated)
    set_seed(args.seed)
    with together(rank), arguments.taken():  # before anything is written, or dropped
        trainer = MaskedLMTrainer(
            student,
            args,
            manifest=manifest,
            shards=train_shards,
            evaluated=evaluated or manifest,
            held_out=held_out,
            source=source,
            policy=policy,
            distill_weight=options.distill_weight,
            distill_temperature=options.distill_temperature or 1.0,
            targets=targets,
            distill_share=options.distill_positions or 1.0,
            fresh_scores=options.self_refresh == "step",
            muon=(options.muon_learning_rate or 0.0, options.muon_weight_decay or 0.0) if options.muon else None,
        )
        try_out(trainer)
    with together(rank):
        _lock = resume.lock(output) if rank == 0 else None  # until this function returns
    # torchrun may restart the processes of this run; a restart must not overwrite what they have trained
    overwrite = options.overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if not on_first(rank, lambda: resume.claim(output, flags, overwrite)):
        if rank == 0:
            print(f"{output} is finished already; pass --overwrite to train it again")
        return
    checkpoint = on_first(rank, lambda: resume.last_checkpoint(output, contents=True))
    with together(rank):
        resume.check_visible(output, checkpoint)
    if checkpoint:
        args.eval_on_start = False  # it was evaluated when the run began
        if rank == 0:
            print(f"resuming from {checkpoint}", file=sys.stderr)
    with in_one_sentence(trainer.guard):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.guard.stopped:
        stop(trainer)
    seconds = trainer.train_seconds()
    metrics = trainer.evaluate() if held_out else {}
    check_finite(student, trainer.state.global_step, output)
    if rank == 0:
        with writing(f"the model to {output}", output):
            trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).save_pretrained(output)
            copy_tokenizer(manifest.uri, output)
            log = trainer.state.log_history
            summary = summarise(
                options,
                args,
                policy,
                manifest,
                targets,
                evaluated,
                flags,
                log,
                seconds,
                flops,
                metrics,
                trainer.collapse.warnings,
            )
            storage.write_json(str(output / resume.SUMMARY), summary)  # last: it marks the run as finished
        print_summary(output, summary)


def try_out(trainer: MaskedLMTrainer) -> None:
    """Make what training makes first, so that flags it cannot be made of are known; training makes its own."""
    trainer.get_train_dataloader()
    trainer.create_optimizer_and_scheduler(trainer.args.max_steps)
    trainer.optimizer = trainer.lr_scheduler = None


def stop(trainer: MaskedLMTrainer) -> None:
    """End as SIGTERM asked for, once all ranks have what they need to go on. Raises Terminated."""
    state = trainer.state
    if not trainer.is_world_process_zero():
        raise SystemExit(143)
    print(f"stopped after step {state.global_step} of {state.max_steps}; the same command goes on", file=sys.stderr)
    raise cli.Terminated


def set_steps(options: Options, args: TrainingArguments, rows: int) -> None:
    """Set the number of steps from the epochs where it is not given, and the decay of warmup_stable_decay."""
    if args.max_steps <= 0:
        args.max_steps = max(1, math.ceil(args.num_train_epochs * rows / global_batch(args)))
    if args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
        decay = {"num_decay_steps": round(DECAY_SHARE * args.max_steps), "decay_type": "linear"}
        args.lr_scheduler_kwargs = decay | (args.lr_scheduler_kwargs or {})  # type: ignore[operator]


def global_batch(args: TrainingArguments) -> int:
    """Sequences a step, over all devices."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def deciding_flags(
    options: Options,
    args: TrainingArguments,
    policy: MaskPolicy,
    manifest: Manifest,
    targets: Manifest | None,
    evaluated: Manifest | None,
) -> dict[str, Any]:
    """Everything that decides what is learned; two runs with the same may share a directory."""
    free = ("overwrite", "trust_remote_code", "num_workers", "eval_shards", "recipe")
    own = {name: value for name, value in asdict(options).items() if name not in free}
    masks = {FIELDS.get(name, f"mask_{name}"): value for name, value in policy.to_json().items()}
    run = {
        "shards": manifest.fingerprint_hash,
        "targets": targets and targets.fingerprint_hash,
        "model": model_identity(options.model),
        "distill_temperature": options.distill_temperature or 1.0,
        "distill_positions": options.distill_positions or 1.0,
        "steps": args.max_steps,
        "global_batch": global_batch(args),
    }
    if args.load_best_model_at_end or args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
        run["eval_shards"] = evaluated and evaluated.fingerprint_hash
    return own | masks | run | resume.deciding(args.to_dict())


def flops_of(student: Any, options: Options, args: TrainingArguments, policy: MaskPolicy, length: int) -> int:
    """FLOPs of the whole run, on all devices."""
    batch = global_batch(args)
    chosen_by_student = not policy.predicts_all and (
        policy.predict_by == "excess" or (options.entropy_source == "self" and policy.predict_by != "random")
    )
    fresh = 0
    if options.entropy_source == "self" and options.self_refresh == "step" and not policy.uniform:
        fresh = args.max_steps - math.ceil(policy.warmup * args.max_steps)
    return training_flops(
        *forward_flops(student, length),
        sequences=args.max_steps * batch,
        predicted=min(policy.predictions(length), length),
        scored=min(policy.positions(length), length) if chosen_by_student else 0,
        fresh=fresh * batch,
        length=length,
    )


def bill(manifest: Manifest) -> dict[str, Any]:
    """What a directory is, and what it cost: whoever compares runs may not have it at hand."""
    return {
        "uri": manifest.uri,
        "fingerprint_hash": manifest.fingerprint_hash,
        "sequences_hash": manifest.sequences_hash,
        "passes": manifest.passes,
        "sequences": manifest.totals["sequences"],
        "sequence_length": manifest.sequence_length,
        "bytes": manifest.totals["bytes"],
        "flops": manifest.totals["flops"],
        "worker_seconds": manifest.totals["worker_seconds"],
    }


def summarise(
    options: Options,
    args: TrainingArguments,
    policy: MaskPolicy,
    manifest: Manifest,
    targets: Manifest | None,
    evaluated: Manifest | None,
    flags: dict[str, Any],
    log: list[dict[str, Any]],
    seconds: float,
    flops: int,
    metrics: dict[str, float],
    warnings: list[str],
) -> dict[str, Any]:
    tokens = args.max_steps * global_batch(args) * manifest.sequence_length
    read = columns_of(policy, options.entropy_source, top_k=options.distill_weight > 0 and not targets)
    uses_scan = read.entropy or read.surprisal or read.top_k
    scores = [manifest] * uses_scan + ([targets] if targets else [])
    deciles = [metrics.get(f"eval_loss_decile_{decile}") for decile in range(1, DECILES + 1)]
    return {
        "regime": options.entropy_source + ("+kd" if options.distill_weight else ""),
        "model": options.model,
        "steps": args.max_steps,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "train_loss": next((entry["loss"] for entry in reversed(log) if "loss" in entry), None),
        "eval_loss": metrics.get("eval_loss"),
        "eval_accuracy": metrics.get("eval_accuracy"),
        "eval_positions": metrics.get("eval_positions"),
        "eval_loss_by_entropy_decile": deciles if any(deciles) else None,
        "training_flops": flops,
        "scoring_seconds": sum((each.totals["worker_seconds"] for each in scores), 0.0),
        "scoring_flops": sum(each.totals["flops"] for each in scores),
        "shards": bill(manifest) | {"context": manifest.context, "teacher": manifest.teacher, "scores_read": uses_scan},
        "targets": targets and bill(targets) | (targets.masks or {}),
        "eval_shards": evaluated and bill(evaluated),
        "seed": args.seed,
        "warnings": warnings,
        "history": curve(log),
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
