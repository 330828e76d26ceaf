"""The same documents in every form of text."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.plan import Corpus
from pipeline.corpus.readers import Reader, Rejects, read_documents

TEXTS = [f"document {number}: " + "wörd naïve 語 " * (number % 7 + 1) + "." for number in range(60)]


def texts_of(corpus: Corpus, rejects: Rejects | None = None) -> list[str]:
    rejects, reader = rejects or Rejects(), Reader()
    return [document.text for ranges in corpus.shards for document in read_documents(ranges, reader, rejects)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write_forms(root: Path) -> dict[str, Path]:
    """The same documents in every form: in plain text as paragraphs, some of several lines."""
    lines = "\n \n\n".join(text.replace(" wörd", "\n   wörd") for text in TEXTS).encode()
    bom, array = b"\xef\xbb\xbf", json.dumps([{"text": text} for text in TEXTS], indent=1).encode()
    data = {"a.txt": lines, "a.md": bom + lines, "a.jsonl": bom + jsonl(TEXTS)}
    data |= {"a.json": jsonl(TEXTS), "array.json": bom + array}
    forms = {name: root / name for name in (*data, "a.txt.gz", "a.jsonl.zst")}
    for name, content in data.items():
        forms[name].write_bytes(content)
    forms["a.txt.gz"].write_bytes(gzip.compress(lines))
    forms["a.jsonl.zst"].write_bytes(pa.compress(jsonl(TEXTS), codec="zstd", asbytes=True))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(root / name, "w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *(["1", text] for text in TEXTS)])
        forms[name] = root / name
    texts = pa.array(TEXTS)
    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.large_string())]
    for kind in kinds:
        forms[f"{kind}"] = root / f"{kind.id}.parquet"
        table = pa.table({"text": texts.cast(kind), "id": list(range(60))})
        pq.write_table(table, forms[f"{kind}"], row_group_size=7)
    forms["a.parquet"] = (root / f"{kinds[0].id}.parquet").rename(root / "a.parquet")
    del forms["string"]
    return forms
