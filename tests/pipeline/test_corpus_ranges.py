"""Files that are read from their start, as compressed files and CSV: shards of the size asked, each byte read once."""

import bz2
import gzip
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pytest
from harness import SCORE
from in_process import tokenize_here
from killing import end_of, hashes, kill_with_children, records, start, wait_for
from texts import texts_of

import pipeline.worker
from entropy_masking.shards.manifests import read_manifest
from pipeline.corpus import content, formats, ranges, tables
from pipeline.corpus.plan import plan_corpus
from pipeline.corpus.ranges import FileRange
from pipeline.corpus.readers import Rejects

TOKENS = 2000  # of a shard
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.fixture(scope="module")
def lines(work: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (work / "corpus.jsonl").read_text().splitlines()]


def write(path: Path, texts: list[str]) -> Path:
    """A file of the form and the compression that its name says, with a broken and a blank line after each tenth."""
    name, delimiter = path.name, "\t" if ".tsv" in path.name else ","
    rows = []
    for number, text in enumerate(texts):
        if ".jsonl" in name:
            rows += [json.dumps({"text": text})] + ['{"text": "half', ""] * (number % 10 == 9)
        elif ".txt" in name:
            rows += [text, " "]
        else:
            rows += [f'{number}{delimiter}"{text}"'] + [f"{number}{delimiter}x{delimiter}y", ""] * (number % 10 == 9)
    header = [f"id{delimiter}text"] if ".csv" in name or ".tsv" in name else []
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""]("\n".join(header + rows).encode()))
    return path


@pytest.mark.parametrize("form", ["jsonl", "txt", "csv", "tsv"])
def test_a_compressed_file_gives_the_shards_of_the_plain_one(
    work: Path, tmp_path: Path, lines: list[str], form: str
) -> None:
    found = {}
    for ending in COMPRESS if form == "jsonl" else ("", ".gz"):
        path = write(tmp_path / f"a.{form}{ending}", lines)
        output = tokenize_here(path, work / "tokenizer", tmp_path / f"{form}{ending}", "--shard-tokens", TOKENS)
        found[ending] = hashes(output)
        sizes = [entry.tokens for entry in read_manifest(str(output)).shards]
        assert len(sizes) > 5 and max(sizes) < 2 * min(sizes), sizes
    assert all(other == found[""] for other in found.values())


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv", "a.tsv.zst"])
def test_rejects_have_their_line_in_the_file(tmp_path: Path, lines: list[str], name: str) -> None:
    path, rejects = write(tmp_path / name, lines[:200]), Rejects()
    corpus = plan_corpus(str(path), shard_tokens=500)
    assert len(corpus.shards) > 5 and len(texts_of(corpus, rejects)) == 200
    start, reason = (11, "broken JSON") if "jsonl" in name else (12, "broken CSV row")
    expected = [{"file": str(path), "line": line, "reason": reason} for line in range(start, start + 240, 12)]
    assert rejects.listed == expected and rejects.documents == 220


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv"])
def test_a_run_reads_a_file_once(
    work: Path, tmp_path: Path, lines: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = list[int]()

    def open_binary(file_range: FileRange, start: int = 0) -> BinaryIO:
        opened.append(start)
        return ranges.open_binary(file_range, start)

    for module in (formats, tables):
        monkeypatch.setattr(module, "open_binary", open_binary)
    output = tokenize_here(
        write(tmp_path / name, lines), work / "tokenizer", tmp_path / "out", "--shard-tokens", TOKENS
    )
    assert opened == [0, 0], "once for the first lines, once for the documents"
    assert len(read_manifest(str(output)).shards) > 5


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv"])
@pytest.mark.parametrize("failures", [1, 3])
def test_an_error_in_a_shard_costs_no_other_shard(
    work: Path, tmp_path: Path, lines: list[str], name: str, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flags = write(tmp_path / name, lines), ("--shard-tokens", TOKENS, "--max-failed-shards", 1)
    expected = hashes(tokenize_here(path, work / "tokenizer", tmp_path / "expected", *flags))
    calls, pack = iter(range(100)), pipeline.worker.pack

    def failing(documents: Iterator[Any], *others: Any) -> Any:
        if 2 <= next(calls) < 2 + failures:
            next(documents)
            raise RuntimeError("a fault")
        return pack(documents, *others)

    monkeypatch.setattr(pipeline.worker, "pack", failing)
    found = hashes(tokenize_here(path, work / "tokenizer", tmp_path / "out", *flags))
    assert len(expected) - len(found) == (failures == 3) and found.items() <= expected.items()
    assert ("part-00002.parquet" in found) == (failures == 1)


@pytest.mark.parametrize("gap", [slice(0, 3), slice(3, 5), slice(5, None)])
def test_shards_that_are_missing_are_made_again(work: Path, tmp_path: Path, lines: list[str], gap: slice) -> None:
    path, output = write(tmp_path / "a.jsonl.gz", lines), tmp_path / "out"
    expected = hashes(tokenize_here(path, work / "tokenizer", output, "--shard-tokens", TOKENS))
    for record in sorted((output / "_records").glob("part-*"))[gap]:
        record.unlink()
    (output / "manifest.json").unlink()
    assert hashes(tokenize_here(path, work / "tokenizer", output, "--shard-tokens", TOKENS)) == expected


def killed_and_resumed(work: Path, tmp_path: Path, lines: list[str], *flags: str, kill: str) -> None:
    path = write(tmp_path / "a.jsonl.gz", [" ".join(lines)] * 60)
    arguments = ["--corpus", path, "--teacher", "none", "--tokenizer", work / "tokenizer", "--output", tmp_path / "out"]
    process = start([*SCORE, *map(str, arguments), "--shard-tokens", "10000", *flags])
    first = wait_for(process, lambda: records(tmp_path / "out"))[0]
    if kill == "worker":
        os.kill(int(first["worker"].rpartition(":")[2]), signal.SIGKILL)
        end_of(process)
        assert len({record["worker"] for record in records(tmp_path / "out")}) == 2
    else:
        kill_with_children(process)
        assert not (tmp_path / "out" / "manifest.json").exists()
        tokenize_here(path, work / "tokenizer", tmp_path / "out", "--shard-tokens", 10000)
    expected = tokenize_here(path, work / "tokenizer", tmp_path / "expected", "--shard-tokens", 10000)
    assert len(hashes(expected)) > 20 and hashes(tmp_path / "out") == hashes(expected)


def test_a_run_killed_in_the_middle_of_a_file(work: Path, tmp_path: Path, lines: list[str]) -> None:
    killed_and_resumed(work, tmp_path, lines, "--backend", "local", kill="driver")


@pytest.mark.exhaustive
@pytest.mark.parametrize("kill", ["worker", "driver"])
def test_ray_killed_in_the_middle_of_a_file(work: Path, tmp_path: Path, lines: list[str], kill: str) -> None:
    killed_and_resumed(work, tmp_path, lines, "--workers", "1", kill=kill)


def test_an_array_is_cut_between_its_elements(tmp_path: Path) -> None:
    elements: list[Any] = [{"text": f"number {number} " * 30} for number in range(100)]
    elements[50] = 7
    path, rejects = tmp_path / "a.json", Rejects()
    path.write_text(json.dumps(elements))
    corpus = plan_corpus(str(path), shard_tokens=500)
    assert len(corpus.shards) > 10 and len(texts_of(corpus, rejects)) == 99
    assert [(entry["line"], entry["reason"]) for entry in rejects.listed] == [(51, "not a JSON object")]


def test_broken_rows_are_read_again_only_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these rows opens a quotation mark that no later one closes."""
    monkeypatch.setattr(tables, "READ_AGAIN", 4)
    path, row, good = tmp_path / "a.csv", 'x","y\n', '1,"two\nlines"\n'
    path.write_text("id,text\n" + row * 3000 + good * 5000)
    read, reader, rejects = 0, tables.csv.reader, Rejects()

    def counting(rows: Iterator[str], **dialect: Any) -> Iterator[list[str]]:
        def counted() -> Iterator[str]:
            nonlocal read
            for line in rows:
                read += len(line)
                yield line

        return reader(counted(), **dialect)

    monkeypatch.setattr(tables.csv, "reader", counting)
    corpus = plan_corpus(str(path), max_document_bytes=50_000)
    assert read < 1000 and set(texts_of(corpus, rejects)) == {"two\nlines"}
    assert 3000 <= rejects.reasons["broken CSV row"] < 4000
    assert read < 6 * path.stat().st_size + 100_000


def test_long_files_are_identified_by_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    data = bytearray(b"text\n\n" * 20_000)

    def identity(**options: Any) -> Any:
        path.write_bytes(data)
        return plan_corpus(str(path), **options).identity["files"]

    whole = identity()
    monkeypatch.setattr(content, "HASHED", 1000)
    monkeypatch.setattr(content, "SAMPLE", 100)
    sampled = identity()
    assert identity(hash_corpus=True) == whole != sampled
    data[5000:5004] = b"TEXT"  # between two samples
    assert identity() == sampled and identity(hash_corpus=True) != whole
    data[-6:-2] = b"TEXT"
    changed = identity()
    assert changed != sampled
    data += b"more"
    assert identity() != changed
