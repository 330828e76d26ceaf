"""What a run reads besides its shards, opened, and refused where it does not fit them."""

from __future__ import annotations

from pipeline.cli import UsageError
from pipeline.manifests import Manifest, read_manifest
from train.masking import MaskPolicy
from train.options import RECIPES, Options, given_masks, mask_flag


def open_targets(options: Options, manifest: Manifest) -> Manifest:
    """The target directory of a run.

    Raises:
        UsageError: no target directory, or one for other shards or another source of entropy.
    """
    uri, source = str(options.targets), options.entropy_source
    if source == "self":
        raise UsageError("--targets needs masks that are known beforehand, which --entropy-source self has none of")
    targets = read_manifest(uri, kind="targets")
    if not _is_plan(targets):
        raise UsageError(f"the manifest of {uri} does not say for which masks it was made; make it anew")
    assert targets.masks
    if targets.sequences_hash != manifest.sequences_hash:
        raise UsageError(f"--targets {uri} was made for other sequences than {manifest.uri}; plan and score them anew")
    rows, variants = {entry.index: entry.rows for entry in targets.shards}, targets.masks["variants"]
    for entry in manifest.shards:
        if rows.get(entry.index, 0) != entry.rows * variants:
            raise UsageError(f"--targets {uri} lacks rows for {entry.file} of {manifest.uri}; plan and score it")
    if (planned := targets.masks["source"]) != source:
        raise UsageError(f"--targets {uri} was planned with --entropy-source {planned}; use that, or plan anew")
    return targets


def _is_plan(targets: Manifest) -> bool:
    plan, length = targets.masks or {}, targets.sequence_length
    try:
        positions = min(MaskPolicy.from_json(plan["policy"]).positions(length), length)
        return plan["positions"] == positions and plan["variants"] >= 1 and "source" in plan
    except (KeyError, TypeError, ValueError):
        return False


def planned_policy(options: Options, targets: Manifest) -> MaskPolicy:
    """The masks that targets were made for, their seed among it.

    Raises:
        UsageError: a mask flag was given that differs.
    """
    policy = MaskPolicy.from_json((targets.masks or {})["policy"])
    recipe = RECIPES["paper"] if options.recipe == "paper" else {}
    for name, value in (recipe | given_masks(options)).items():
        if value != (planned := getattr(policy, name)):
            raise UsageError(
                f"{mask_flag(name)} {value} is not {planned}, which {targets.uri} was planned with; leave it out"
            )
    return policy


def open_evaluated(options: Options, manifest: Manifest) -> Manifest:
    """Open the directory of ``--eval-shards``.

    Raises:
        UsageError: no shard directory, that of the training, or one of another tokenizer or length.
    """
    uri = str(options.eval_shards)
    evaluated = read_manifest(uri)
    if evaluated.tokenizer_hash != manifest.tokenizer_hash:
        raise UsageError(f"--eval-shards {uri} was made with another tokenizer than {manifest.uri}; use that of both")
    if evaluated.sequence_length != manifest.sequence_length:
        raise UsageError(
            f"--eval-shards {uri} has sequences of {evaluated.sequence_length} tokens, {manifest.uri} of "
            f"{manifest.sequence_length}; make them alike"
        )
    # however it was cut
    if evaluated.sequences_hash == manifest.sequences_hash or _files(evaluated) & _files(manifest):
        raise UsageError(f"--eval-shards {uri} holds what is trained on; name other text, or use --eval-fraction")
    return evaluated


def _files(manifest: Manifest) -> set[str]:
    """Content hashes of the text that the sequences were made of."""
    corpus = manifest.fingerprint["corpus"]
    return set(corpus.get("sequences", corpus).get("files", {}).values())
