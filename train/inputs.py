"""Opens the inputs of a run, and refuses flags that contradict them or each other."""

from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments

from entropy_masking.commands.mask_flags import (
    RECIPES,
    check_scored,
    given_masks,
    how_to_score,
    mask_flag,
    mask_policy,
)
from entropy_masking.errors import UsageError
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards.faults import check_shards
from entropy_masking.shards.manifests import read_manifest
from entropy_masking.shards.schema import Manifest
from train import resume
from train.evaluation import token_counts
from train.options import Options
from train.split import Part, all_rows, split


@dataclass(frozen=True)
class Inputs:
    """The data of a run."""

    manifest: Manifest  # of --shards
    targets: Manifest | None  # of --targets
    eval_shards: Manifest | None  # of --eval-shards
    evaluated: Manifest  # the directory of ``held_out``
    policy: MaskPolicy  # which positions to mask and to predict
    training: list[Part]  # the rows to train on
    held_out: list[Part]  # the rows to evaluate on
    cut: int  # held-out parts that are a passage of a longer document


def open_inputs(options: Options, args: TrainingArguments) -> Inputs:
    """Open the inputs. Raises UsageError if one cannot be read, or flags contradict them or each other."""
    manifest, source = read_manifest(options.shards), options.entropy_source
    targets = open_targets(options.targets, manifest, source) if options.targets else None
    eval_shards = open_eval_shards(options.eval_shards, manifest) if options.eval_shards else None
    # one process per machine checks every byte, and only when a run begins, so that a run resumes at once
    resumes = not options.overwrite and resume.has_checkpoint(Path(str(args.output_dir)), manifest, targets)
    for directory in filter(None, (manifest, targets, eval_shards)):
        check_shards(directory, contents=not (resumes or args.local_process_index))
    policy = policy_of(options, targets) if targets else mask_policy(options, source, args.seed)
    check_scored(policy, source, manifest)
    check_machine_and_scores(options, args, targets or manifest)
    rows = split(manifest, options.eval_fraction or 0.0)
    held_out, evaluated = (all_rows(eval_shards), eval_shards) if eval_shards else (rows.held_out, manifest)
    if held_out and not token_counts(evaluated, held_out).any():
        fix = "evaluate on other text with --eval-shards, or not at all with --eval-fraction 0"
        raise UsageError(f"the held-out text of {evaluated.uri} has only special tokens, such as [UNK]; {fix}")
    return Inputs(manifest, targets, eval_shards, evaluated, policy, rows.training, held_out, rows.cut)


def check_machine_and_scores(options: Options, args: TrainingArguments, teacher: Manifest) -> None:
    """Refuse flags that contradict the machine or the scores in ``teacher``, the targets or the shards.

    Raises UsageError.
    """
    workers, ranks, gpus = options.num_workers, args.world_size, args.n_gpu
    if workers > 1 and ranks > 1:
        started = f"which has started {ranks} processes"
        raise UsageError(f"--num-workers {workers} has no effect under torchrun, {started}; leave it out")
    if workers == 1 and gpus > 1:
        use = f"torchrun --nproc-per-node {gpus} train/run.py … or --num-workers {gpus}"
        raise UsageError(f"{gpus} GPUs are visible; use them with {use}, or choose one with CUDA_VISIBLE_DEVICES")
    if not options.distill_weight:
        return
    if not options.targets and not teacher.top_k:
        fix = f"{how_to_score(teacher.uri)} --top-k 16"
        raise UsageError(f"--distill-weight needs top-k log-probabilities, but {teacher.uri} has none; {fix}")
    if (T := options.distill_temperature) not in (1.0, *teacher.temperatures):
        scored = ", ".join(f"{temperature:g}" for temperature in teacher.temperatures)
        again = f"score again with --temperatures {T:g}{' and --top-k' if teacher.sampled else ''}"
        fix = f"use one of these, or {again}"
        raise UsageError(f"--distill-temperature {T:g} is not among the temperatures of {teacher.uri}: {scored}; {fix}")


def open_targets(uri: str, manifest: Manifest, source: str) -> Manifest:
    """A target directory. Raises UsageError if it was made for other shards or another entropy source, or is broken."""
    if source == "self":
        raise UsageError(
            "--targets needs masks that are known before the run, but --entropy-source self makes them during the run; "
            "leave --targets out"
        )
    targets = read_manifest(uri, kind="targets")
    assert targets.masks
    fix = f"make targets with pipeline/score.py --mask-source … --corpus {manifest.uri}"
    if targets.sequences_hash != manifest.sequences_hash:
        raise UsageError(f"--targets {uri} was made for other sequences than {manifest.uri}; {fix}")
    rows, variants = {entry.index: entry.rows for entry in targets.shards}, targets.masks["variants"]
    for entry in manifest.shards:
        if rows.get(entry.index, 0) != entry.rows * variants:
            raise UsageError(f"--targets {uri} lacks rows for {entry.file} of {manifest.uri}; {fix}")
    if (masked_by := targets.masks["source"]) != source:
        raise UsageError(f"--targets {uri} was made with --mask-source {masked_by}; use --entropy-source {masked_by}")
    return targets


def policy_of(options: Options, targets: Manifest) -> MaskPolicy:
    """The policy of targets, with its seed. Raises UsageError if a mask flag or the recipe differs."""
    policy = MaskPolicy(**(targets.masks or {})["policy"])
    recipe, given = RECIPES["paper"] if options.recipe == "paper" else {}, given_masks(options)
    for name, value in (recipe | given).items():
        if value != (of_targets := getattr(policy, name)):
            cause = mask_flag(name) if name in given else "--recipe"
            ours = f"{mask_flag(name)} {value}{'' if name in given else ' of --recipe paper'}"
            said = f"{ours} differs from {of_targets} in --targets {targets.uri}"
            raise UsageError(f"{said}; leave {cause} out")
    return policy


def open_eval_shards(uri: str, manifest: Manifest) -> Manifest:
    """Shards of other text to evaluate on. Raises UsageError for training text, another tokenizer or another length."""
    evaluated = read_manifest(uri)
    if evaluated.tokenizer_hash != manifest.tokenizer_hash:
        raise UsageError(f"--eval-shards {uri} and {manifest.uri} have different tokenizers; use the same one")
    own, length = evaluated.sequence_length, manifest.sequence_length
    if own != length:
        raise UsageError(
            f"--eval-shards {uri} has sequences of {own} tokens, {manifest.uri} of {length}; use the same length"
        )
    # the same text, even if it was cut differently
    if evaluated.sequences_hash == manifest.sequences_hash or _files(evaluated) & _files(manifest):
        raise UsageError(f"--eval-shards {uri} holds text of --shards; name other text, or use --eval-fraction")
    return evaluated


def _files(manifest: Manifest) -> set[str]:
    """Content hashes of the text files of the sequences."""
    corpus = manifest.fingerprint["corpus"]
    return set(corpus.get("sequences", corpus).get("files", {}).values())
