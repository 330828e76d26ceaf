"""Whatever bytes a file has, a reader gives documents, counts rejected ones, or refuses the file in one sentence."""

import bz2
import gzip
import io
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from texts import texts_of

from entropy_masking.errors import UsageError
from pipeline.corpus.plan import plan_corpus
from pipeline.corpus.readers import Rejects

MOST, MEMORY = 64, 1 << 20  # bytes of a document; KiB that the readers may need
FORMS = {"a.txt": ("line", "paragraph", "file")} | dict.fromkeys(("a.jsonl", "a.json", "a.csv", "a.tsv"), (None,))
PIECES = [b"\n", b"\r\n", b"\r", b" ", b"\0", b"\xef\xbb\xbf", b"\xff", b"text", b'{"text": "', b'"}', b'"', b"[", b"]"]
PIECES += [b",", b"\t", b"{", b"}", b"1e999", b"9" * 5000, b"\\ud800", b"x" * MOST, b"x" * (MOST + 1), b"[" * 3000]
PIECES += ["語".encode(), b'{"text": "good"}\n', b"\xe2\x80\xa8", b"null", b"text\n", b"one\n\ntwo\n", b"\x1f\x8b"]
SEEDS = [
    b"",
    b"\n" * 1000,
    b"\0" * 1000,
    b"x" * 1000,
    b"text\n" + b'"' * 999,
    b'text\n"' + b"a\n" * 500,
    b'[{"text": "x"},' + b" " * 999,
    b"[" * 5000,
    b'[{"text": "' + b"x" * 999,
    b'{"text": ' * 600,
    b"text\n" + b"," * 1000,
    b"\r" * 1000 + b"x",
    b'{"text": ' + b"9" * 5000 + b"}\n",
    b"text,text\nx,y\n",
]


def parquet() -> bytes:
    buffer = io.BytesIO()
    texts = ["one", None, "", "x" * MOST, "y" * 99, "two", "two"]
    pq.write_table(pa.table({"text": texts, "id": range(7)}), buffer, row_group_size=3)
    return buffer.getvalue()


PARQUET = parquet()


def check(path: Path, data: bytes, unit: str | None = None) -> None:
    """Read a file, in one shard and in many."""
    path.write_bytes(data)
    found = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for shard_tokens in (4, 1 << 20):
        rejects = Rejects()
        try:
            corpus = plan_corpus(str(path), document=unit, shard_tokens=shard_tokens, max_document_bytes=MOST)
            texts = texts_of(corpus, rejects)
        except UsageError as refused:
            assert len(str(refused).splitlines()) == 1 and path.name in str(refused), refused
            found.append(["refused"])
            continue
        assert all(0 < len(text.encode()) <= MOST for text in texts)
        assert len(texts) + rejects.reasons.total() == rejects.documents
        found.append([*texts, rejects.documents])
    assert found[0] == found[1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


@pytest.mark.parametrize("seed", SEEDS, ids=range(len(SEEDS)))
def test_hostile_files(tmp_path: Path, seed: bytes) -> None:
    for name, units in FORMS.items():
        for unit in units:
            check(tmp_path / name, seed, unit)
            check(tmp_path / f"{name}.gz", gzip.compress(seed), unit)
    check(tmp_path / "a.parquet", PARQUET[:40] + seed + PARQUET[40:])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name, unit", [(name, unit) for name, units in FORMS.items() for unit in units])
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=4)), max_size=30).map(b"".join))
def test_any_bytes(tmp_path: Path, name: str, unit: str | None, data: bytes) -> None:
    check(tmp_path / name, data, unit)


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
CHANGES = st.lists(st.tuples(st.integers(0, len(PARQUET) - 1), st.integers(0, 255)), max_size=6)


@pytest.mark.exhaustive
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES, cut=st.integers(0, len(PARQUET)))
def test_any_parquet_file(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(PARQUET)
    for place, value in changes:
        data[place] = value
    check(tmp_path / "a.parquet", bytes(data[:cut] if cut % 8 == 0 else data))


@pytest.mark.exhaustive
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES, cut=st.integers(0, 200), codec=st.sampled_from(list(COMPRESS)))
def test_any_compressed_file(tmp_path: Path, changes: list[tuple[int, int]], cut: int, codec: str) -> None:
    data = bytearray(COMPRESS[codec](b'{"text": "good"}\n{"text": "bad\n' * 20))
    for place, value in changes:
        data[place % len(data)] = value
    check(tmp_path / f"a.jsonl.{codec}", bytes(data[:cut] if cut % 4 == 0 else data))
