"""The README.md of a shard directory and of a student: metadata of the Hugging Face Hub, and a few facts."""

from collections.abc import Mapping

from entropy_masking.shards.schema import Manifest
from entropy_masking.summary import Summary
from entropy_masking.text import inline


def dataset_card(manifest: Manifest) -> str:
    """The card with which ``datasets.load_dataset(DIRECTORY)`` finds the shards among the other files."""
    totals = manifest.totals
    facts: dict[str, object] = {
        "sequences": f"{totals['sequences']:,} of {manifest.sequence_length} tokens",
        "teacher": manifest.teacher,
    }
    if manifest.kind == "sequences":
        facts |= {"tokens": f"{totals['tokens']:,}", "context": manifest.context, "passes": manifest.passes}
    if manifest.masks:
        facts |= {name: manifest.masks[name] for name in ("source", "variants", "policy")}
    title = "Masked tokens with a teacher's predictions" if manifest.masks else "Tokens with predictive entropies"
    files = "configs:\n- config_name: default\n  data_files: part-*.parquet\n"
    return _card(files, title if manifest.teacher else "Tokens", facts)


def model_card(summary: Summary) -> str:
    """The card of a student: its data, masks, teacher, costs and losses."""
    shards, flags = summary.shards, summary.flags or {}
    names = ("entropy_source", "mask_ratio", "hard_share", "mask_temperature", "mask_warmup", "mask_ramp", "mask_by")
    facts = {
        "regime": summary.regime,
        "model": summary.model,
        "training": f"{summary.steps:,} steps, {summary.tokens:,} tokens, seed {summary.seed}",
        "shards": shards and shards.uri,
        "teacher": shards and (shards.scores_read or summary.targets) and shards.teacher,
        "distillation weight": flags.get("distill_weight"),
        "masks": ", ".join(f"{name.replace('_', ' ')} {flags[name]}" for name in names if name in flags),
        "FLOPs of training": f"{summary.training_flops:.3g}",
        "FLOPs of scoring": f"{summary.scoring_flops:.3g}",
        "held-out loss": summary.eval_loss and f"{summary.eval_loss:.4f} nats, accuracy {summary.eval_accuracy:.1%}",
        "warnings": "; ".join(summary.warnings or []),
    }
    limits = "\nThe held-out loss is measured under random masks. The model was not tested otherwise.\n"
    return _card("library_name: transformers\npipeline_tag: fill-mask\n", "A masked language model", facts) + limits


def _card(metadata: str, title: str, facts: Mapping[str, object]) -> str:
    lines = "".join(f"- {name}: {inline(value)}\n" for name, value in facts.items() if value)
    return f"---\n{metadata}tags:\n- masked-language-modeling\n---\n\n# {title}\n\n{lines}"
