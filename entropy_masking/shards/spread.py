"""Whether the scores of a shard directory tell tokens apart."""

import numpy as np

from entropy_masking.shards.manifests import read_table, sampled
from entropy_masking.shards.parquet import column_2d
from entropy_masking.shards.schema import Manifest

NARROW = 1.0  # nats between the quantiles; a teacher that has learned its language has 5 or more


def entropy_spread(manifest: Manifest) -> tuple[float, float] | None:
    """The 10 % and the 90 % quantile of a sample of the entropies, in nats; None if there are none."""
    entropies = [np.empty(0, np.float32)]
    for entry in sampled([entry for entry in manifest.shards if entry.scored_tokens]):
        table = read_table(manifest, entry, ["entropy"], [0])
        entropies.append(column_2d(table, "entropy", manifest.sequence_length).astype(np.float32).ravel())
    known = np.concatenate(entropies)
    known = known[~np.isnan(known)]
    return (float(np.quantile(known, 0.1)), float(np.quantile(known, 0.9))) if len(known) else None


def spread_words(low: float, high: float, measure: str = "entropy") -> str:
    """The quantiles in words, with a warning if those of the entropy are near each other."""
    words = f"80 % between {low:.2f} and {high:.2f} nats"
    if measure != "entropy" or high - low >= NARROW:
        return words
    return f"{words}: they hardly differ, so they rank tokens poorly; check the teacher, and --context"
