"""The identity of a run in ``run.json``, and its results and costs in ``summary.json``."""

import json
import math
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

from transformers import TrainingArguments

from entropy_masking.commands.mask_flags import FIELDS
from entropy_masking.models.flops import forward_flops, training_flops
from entropy_masking.models.masked_positions import MaskedPositions
from entropy_masking.shards.schema import Manifest
from entropy_masking.summary import Directory, Summary
from train import resume
from train.arguments import global_batch
from train.evaluation import DECILES, token_counts, unigram_loss
from train.inputs import Inputs
from train.options import Options, TrainerFlags
from train.student import model_identity
from train.trainer import MaskedLMTrainer

MAX_POINTS = 200  # of a curve in a summary
# These flags may change on resume. Some do not decide what is learned. The others only set the number of steps and the
# global batch, which are compared separately.
FREE_OPTIONS = {"overwrite", "dry_run", "eval_only", "argv", "as_yaml"}
FREE_OPTIONS |= {"trust_remote_code", "num_workers", "eval_shards", "recipe"}
FREE_PREFIXES = (  # of flags of Trainer
    *("output_dir", "num_train_epochs", "max_steps", "per_device_", "gradient_accumulation_", "logging_", "report_to"),
    *("eval_", "save_", "dataloader_", "ddp_"),
)


def identity_of_run(options: Options, args: TrainingArguments, inputs: Inputs) -> dict[str, object]:
    """All that decides what is learned: flags, and hashes of the data and the model. As ``run.json`` has it.

    Runs of one identity may share a directory.
    """
    own = {name: value for name, value in asdict(options).items() if name not in FREE_OPTIONS}
    masks = {FIELDS.get(name, f"mask_{name}"): value for name, value in asdict(inputs.policy).items()}
    run = {
        "shards": inputs.manifest.fingerprint_hash,
        "targets": inputs.targets and inputs.targets.fingerprint_hash,
        "model": model_identity(options.model),
        "steps": args.max_steps,
        "global_batch": global_batch(args),
        "ordered_by": resume.BY_LANES,
    }
    if options.eval_fraction:
        run["held_out_by"] = resume.DOCUMENTS
    values = args.to_dict()
    of_trainer = {f.name: values[f.name] for f in fields(TrainerFlags) if not f.name.startswith(FREE_PREFIXES)}
    return json.loads(json.dumps(own | masks | run | of_trainer, default=str))


def flops_of(student: MaskedPositions, options: Options, args: TrainingArguments, inputs: Inputs) -> int:
    """FLOPs of the whole run, on all devices."""
    batch, length, policy = global_batch(args), inputs.manifest.sequence_length, inputs.policy
    chosen_by_student = not policy.predicts_all and (
        policy.predict_by == "excess" or (options.entropy_source == "self" and policy.predict_by != "random")
    )
    fresh_steps = 0
    if options.self_refresh == "step" and not policy.uniform:
        fresh_steps = args.max_steps - math.ceil(policy.warmup * args.max_steps)
    return training_flops(
        *forward_flops(student.masked_lm, length),
        sequences=args.max_steps * batch,
        predicted=policy.max_predicted(length),
        scored=policy.max_masked(length) if chosen_by_student else 0,
        fresh=fresh_steps * batch,
        length=length,
    )


def summarise(trainer: MaskedLMTrainer, flops: int, metrics: dict[str, float]) -> Summary:
    """The results of a finished run."""
    options, args, inputs, log = trainer.options, trainer.args, trainer.inputs, trainer.state.log_history
    manifest, targets, reads_scores = inputs.manifest, inputs.targets, bool(trainer.sequences.columns)
    seconds, tokens = trainer.report.seconds(), args.max_steps * global_batch(args) * manifest.sequence_length
    scored = [manifest] * reads_scores + ([targets] if targets else [])
    guess = unigram_loss(token_counts(manifest, inputs.training), token_counts(inputs.evaluated, inputs.held_out))
    return Summary(
        regime=options.entropy_source + ("+kd" if options.distill_weight else ""),
        model=options.model,
        steps=args.max_steps,
        tokens=tokens,
        seconds=round(seconds, 2),
        tokens_per_second=round(tokens / seconds, 1),
        train_loss=next((entry["loss"] for entry in reversed(log) if "loss" in entry), None),
        eval_loss=metrics.get("eval_loss"),
        eval_accuracy=metrics.get("eval_accuracy"),
        eval_positions=metrics.get("eval_positions"),
        eval_unigram_loss=guess if metrics else None,
        eval_loss_by_entropy_decile=deciles_of(metrics),
        training_flops=flops,
        scoring_seconds=sum((directory.totals["worker_seconds"] for directory in scored), 0.0),
        scoring_flops=sum(directory.totals["flops"] for directory in scored),
        shards=costs(manifest, context=manifest.context, teacher=manifest.teacher, scores_read=reads_scores),
        targets=costs(targets, **targets.masks or {}) if targets else None,
        eval_shards=costs(inputs.eval_shards) if inputs.eval_shards else None,
        seed=args.seed,
        warnings=list(trainer.collapse.by_sign.values()),
        history=curve(log),
        flags=trainer.identity,
        versions={name: version(name) for name in ("torch", "transformers", "accelerate", "pyarrow")},
    )


def deciles_of(metrics: dict[str, float]) -> list[float | None] | None:
    """The held-out loss by decile of the entropy; None if the shards have no entropies."""
    deciles = [metrics.get(f"eval_loss_decile_{decile}") for decile in range(1, DECILES + 1)]
    return deciles if any(deciles) else None


def costs(manifest: Manifest, **others: object) -> Directory:
    """The identity and the costs of a directory, for a comparison that cannot read the directory."""
    names = ("uri", "fingerprint_hash", "sequences_hash", "passes", "sequence_length")
    totals = {name: manifest.totals[name] for name in ("sequences", "bytes", "flops", "worker_seconds")}
    return Directory.model_validate({name: getattr(manifest, name) for name in names} | totals | others)


def curve(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """The held-out losses of a Trainer's log as a curve: ``step``, ``seconds`` of training and ``eval_loss``.

    At most ``MAX_POINTS`` points, spread evenly, with the last one.
    """
    seconds: dict[float, float] = {}
    for entry in log:  # a run that began with an older version has them in an entry before that of the evaluation
        if "train_seconds" in entry:
            seconds.setdefault(entry["step"], round(entry["train_seconds"], 2))
    # the last step may have two evaluations
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry and entry["step"] in seconds}
    stride = max(1, math.ceil(len(losses) / MAX_POINTS))
    steps = reversed(sorted(losses)[::-stride])
    return [{"step": step, "seconds": seconds[step], "eval_loss": losses[step]} for step in steps]


def print_summary(output: Path, summary: Summary, metrics: dict[str, float]) -> None:
    print(f"{output}: {summary.regime}, {summary.steps} steps, {summary.tokens:,} tokens")
    print(f"  seconds     {summary.seconds:,.1f}")
    print(f"  tokens/s    {summary.tokens_per_second:,.0f}")
    print_losses(metrics)
    if summary.learned_little:
        print(
            f"warning: the token frequencies alone give a loss of {summary.eval_unigram_loss:.2f} nats, so this model "
            "has learned little; train it longer before it scores text"
        )


def print_losses(metrics: dict[str, float]) -> None:
    """Print the result of an evaluation, if there was one."""
    if metrics:
        print(f"  eval loss   {metrics['eval_loss']:.4f} nats over {metrics['eval_positions']:,} masked tokens")
    if deciles := deciles_of(metrics):
        print(f"  by decile   {' '.join(f'{loss:.2f}' for loss in deciles if loss is not None)} (easy → hard)")
