"""What a run will do, in a few lines that are printed before its first step."""

from pathlib import Path

from transformers import TrainingArguments

from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.models.masked_positions import MaskedPositions
from entropy_masking.shards.read import columns_of
from entropy_masking.shards.spread import entropy_spread, spread_words
from train import resume
from train.arguments import global_batch
from train.inputs import Inputs
from train.options import Options

FEW_STEPS = 100


def outline(student: MaskedPositions, options: Options, args: TrainingArguments, inputs: Inputs) -> list[str]:
    """What a run does, and warnings about its length; of an evaluation only the data and the model."""
    manifest, batch = inputs.manifest, global_batch(args)
    tokens, held_out = (sum(part.tokens for part in parts) for parts in (inputs.training, inputs.held_out))
    sequences = sum(part.rows for part in inputs.training)
    evaluated = ""
    if inputs.eval_shards:
        evaluated = f", {held_out:,} of {inputs.eval_shards.uri} to evaluate on"
    elif held_out:
        evaluated = f", {held_out:,} ({held_out / (tokens + held_out):.1%}) held out to evaluate on"
    if inputs.cut:
        evaluated += f"; {inputs.cut} of {len(inputs.held_out)} blocks cut from longer documents, whose rest trains"
    weights = sum(parameter.numel() for parameter in student.parameters())
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    rate = f"learning rate {args.learning_rate:g}"
    if options.muon:
        rate = f"learning rates {options.muon_learning_rate:g} (Muon) and {args.learning_rate:g} (AdamW)"
    if args.lr_scheduler_type != "constant":
        rate += f", warm-up of {args.get_warmup_steps(args.max_steps)} steps"
    distils = f"distils with weight {options.distill_weight:g}" if options.distill_weight else "no distillation"
    scores = []
    if "entropy" in columns_of(inputs.policy, options.entropy_source) and (spread := entropy_spread(manifest)):
        scores = [f"scores  entropies of {manifest.teacher}, {spread_words(*spread)}"]
    lines = [
        f"data    {tokens:,} tokens of {manifest.uri} to train on{evaluated}",
        f"model   {options.model}, {weights:,} weights, on {args.device.type} in {dtype}",
        f"steps   {args.max_steps:,} of {batch} sequences ({batch * manifest.sequence_length:,} tokens), "
        f"{args.max_steps * batch / sequences:.2f} epochs; {rate}",
        f"masks   {mask_words(inputs.policy, options.entropy_source)}; {distils}",
        *scores,
        f"output  {args.output_dir}{'' if options.overwrite else progress(Path(str(args.output_dir)))}",
    ]
    if options.eval_only:
        return lines[:2]
    if args.max_steps < FEW_STEPS:
        fix = "use more text, more epochs or a smaller --per-device-train-batch-size"
        lines.append(f"warning: {args.max_steps} steps are few for a masked LM; {fix}")
    return lines


def progress(output: Path) -> str:
    """How far the run in a directory is."""
    if (output / resume.SUMMARY).exists():
        return ", which holds a finished run"
    checkpoint = resume.last_checkpoint(output)
    return f", resumes from {checkpoint.name}" if checkpoint else ""


def mask_words(policy: MaskPolicy, source: str = "parquet") -> str:
    """The masks of a policy in words."""
    units = "tokens, in whole words" if policy.unit == "word" else "tokens"
    if policy.uniform:
        how = "at random"
    else:
        whose = "the student's own" if source == "self" else "the teacher's"
        choice = "the highest" if policy.temperature == 0 else f"sampled with τ = {policy.temperature:g}"
        how = f"{policy.hard_share:.0%} of the masks by {whose} {policy.by} ({choice})"
        how += ", the others at random" if policy.hard_share < 1 else ""
        if policy.warmup or policy.ramp:
            how += f"; all at random for {policy.warmup:.0%} of the steps, then a ramp over {policy.ramp:.0%}"
    if not policy.predicts_all:
        how += f"; {policy.predict_ratio:.0%} predicted, chosen by {policy.predict_by}"
    return f"{policy.ratio:.0%} of the {units}, {how}"
