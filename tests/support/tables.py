"""Tables of shards with other values, as if they had been written so."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from entropy_masking.shards import parquet
from entropy_masking.shards.schema import ShardEntry


def recommitted(entry: ShardEntry, table: pa.Table, groups: list[pa.Table] | None = None) -> tuple[ShardEntry, bytes]:
    """What a shard would be that was written so."""
    data = parquet.to_parquet(groups or parquet.row_groups(table))
    fields = {"rows": len(table), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return entry.model_copy(update=fields), data


def rewrite(directory: Path, entries: list[ShardEntry], failed: dict[str, str]) -> None:
    """Give the manifest of a directory other shards, and the totals of these."""
    manifest = json.loads((directory / "manifest.json").read_text())
    names = {"sequences": "rows", **{name: name for name in ("tokens", "scored_tokens", "bytes", "entropy_sum")}}
    sums = {name: sum(getattr(entry, field) for entry in entries) for name, field in names.items()}
    manifest |= {"shards": [entry.model_dump() for entry in entries], "totals": manifest["totals"] | sums}
    (directory / "manifest.json").write_text(json.dumps(manifest | {"failed": failed}))


def give_up(directory: Path, *files: str) -> Path:
    """Make shards of a directory missing, as if they could not be scored."""
    manifest = json.loads((directory / "manifest.json").read_text())
    entries = [ShardEntry.model_validate(entry) for entry in manifest["shards"] if entry["file"] not in files]
    rewrite(directory, entries, manifest["failed"] | dict.fromkeys(files, "it hung"))
    for file in files:
        (directory / file).unlink()
    return directory


def replace_list(table: pa.Table, name: str, values: np.ndarray, lengths: np.ndarray | None = None) -> pa.Table:
    """The table with other values in a list column [rows, …], or with rows of the given lengths."""
    field = table.schema.field(name)
    if lengths is None:
        lengths = np.full(len(table), values.reshape(len(table), -1).shape[1])
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    flat = pa.array(values.reshape(-1).astype(field.type.value_type.to_pandas_dtype()))
    column = pa.ListArray.from_arrays(offsets, flat, type=field.type)
    return table.set_column(table.schema.get_field_index(name), field, column)
