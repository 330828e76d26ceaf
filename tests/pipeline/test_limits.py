"""Memory is bounded by settings, whatever a document is or a file claims. Nothing is dropped without being counted."""

import gzip
import json
import random
import re
import resource
import struct
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import SCORE
from in_process import tokenize_here
from texts import texts_of
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from entropy_masking.errors import UsageError
from pipeline import tokenizer as tokenizer_command
from pipeline.corpus import packing
from pipeline.corpus.packing import pack, pieces, splits_at_spaces, text_tokenizer, tokenize
from pipeline.corpus.plan import plan_corpus
from pipeline.corpus.ranges import FileRange
from pipeline.corpus.readers import Document, Rejects

MOST = 100
SHORT, FULL, LONG = "a short one", "x" * MOST, "y" * (MOST + 1)
TEXTS = [SHORT, LONG, FULL, "z" * 5000, SHORT]
GOOD = [SHORT, FULL, SHORT]
WORDS = ["the", "word", "of", "time", "people", "water", "long", "very", "after", "called", "most", "know"]


def forms(root: Path) -> dict[str, Path]:
    """``TEXTS`` in every form, a document in each line of plain text."""
    objects, plain = [json.dumps({"t": text}) for text in TEXTS], "".join(text + "\n" for text in TEXTS)
    files = {"lf.txt": plain, "crlf.txt": plain.replace("\n", "\r\n"), "a.jsonl": "\n".join(objects)}
    files |= {"a.csv": "t\n" + plain, "a.tsv": "t\r\n" + plain.replace("\n", "\r\n")}
    for name, text in files.items():
        (root / name).write_bytes(text.encode())
    (root / "a.txt.gz").write_bytes(gzip.compress(plain.encode()))
    pq.write_table(pa.table({"t": TEXTS}), root / "a.parquet")
    pq.write_table(pa.table({"t": pa.array(TEXTS).dictionary_encode()}), root / "dictionary.parquet")
    return {name: root / name for name in (*files, "a.txt.gz", "a.parquet", "dictionary.parquet")}


@pytest.mark.parametrize("shard_tokens", [1, 40, 1 << 20])
def test_a_longer_document_is_rejected_and_counted(tmp_path: Path, shard_tokens: int) -> None:
    for name, path in forms(tmp_path).items():
        plain, rejects = ".txt" in name, Rejects()
        most = MOST + len('{"t": ""}') * (name == "a.jsonl")  # a line there has more than the text
        corpus = plan_corpus(
            str(path),
            text_column=None if plain else "t",
            document="line" if plain else None,
            shard_tokens=shard_tokens,
            max_document_bytes=most,
        )
        assert texts_of(corpus, rejects) == GOOD, name
        assert rejects.documents == len(TEXTS), name
        assert rejects.report()["reasons"] == {f"longer than {most} bytes": 2}, name
        first = 2 + name.endswith(("csv", "tsv"))
        if len(corpus.shards) == 1:
            assert [entry["line"] for entry in rejects.listed] == [first, first + 2], name


def test_a_longer_paragraph_or_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(["one\ntwo", "word\n" * 30, f"x\n{LONG}\ny", " " * 5000 + "x", "last"]))
    for shard_tokens in (1, 1 << 20):
        rejects = Rejects()
        corpus = plan_corpus(str(path), document="paragraph", shard_tokens=shard_tokens, max_document_bytes=MOST)
        assert texts_of(corpus, rejects) == ["one two", "last"]
        assert rejects.report()["reasons"] == {"longer than 100 bytes": 3}
    (tmp_path / "b.txt").write_text(FULL)
    rejects = Rejects()
    assert texts_of(plan_corpus(str(tmp_path), document="file", max_document_bytes=MOST), rejects) == [FULL]
    assert rejects.report()["count"] == 1


def test_a_longer_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": FULL}]))
    with pytest.raises(UsageError, match=r"a JSON array of more than 100 bytes; convert it to JSON lines"):
        plan_corpus(str(path), max_document_bytes=MOST)
    assert texts_of(plan_corpus(str(path), max_document_bytes=2 * MOST)) == [FULL]


def test_the_limit_in_both_commands(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "a.jsonl"
    longest = max(map(len, (work / "corpus.jsonl").read_bytes().splitlines()))
    corpus.write_bytes((work / "corpus.jsonl").read_bytes() + b'{"text": "' + b"abc " * longest + b'"}\n')
    limit = ["--max-document-bytes", str(longest)]
    tokenize_here(corpus, work / "tokenizer", tmp_path / "out", *limit)
    assert f"rejected documents  1 (1 longer than {longest:,} bytes)" in capsys.readouterr().out
    record = json.loads((tmp_path / "out/_records/part-00000.json").read_text())["rejected"]
    assert record["listed"] == [{"file": str(corpus), "line": 401, "reason": f"longer than {longest:,} bytes"}]
    with pytest.raises(UsageError, match="max_document_bytes"):
        tokenize_here(corpus, work / "tokenizer", tmp_path / "out")
    flags = ["--corpus", str(corpus), "--vocab-size", "200", "--output", str(tmp_path / "made"), *limit]
    tokenizer_command.main(flags)
    assert f"(1 rejected, the first in {corpus}, line 401: longer than" in capsys.readouterr().out
    with pytest.raises(UsageError, match="above 2 GiB"):
        plan_corpus(str(corpus), max_document_bytes=10**30)


ODD = [
    "a",
    "Bc",
    "z9",
    " ",
    " ",
    " ",
    "  ",
    "\n",
    "\t",
    "'s",
    "-",
    "é",
    "e\u0301",
    "\u0301",
    "語",
    "\u3000",
    "\xa0",
    "Σ",
]
ODD += ["\x01", "\u200b", "İ", "ﬁ", "각", "हिन्दी", "ที่", "😀", "²", "_", "\u00ad", "[MASK]", "<\u0338", "foo", " x y "]


def made_tokenizers() -> dict[str, tuple[Tokenizer, bool]]:
    """Tokenizers, and whether each surely splits at spaces."""
    texts = ["".join(ODD) + " " + " ".join(WORDS)] * 5
    made: dict[str, tuple[Tokenizer, bool]] = {}
    for kind, size in (("wordpiece", 150), ("bpe", 300)):
        for name, backend_of, known in [
            ("as made", lambda backend: backend, True),
            ("runs of spaces", lambda backend: backend.add_tokens(["   ", "foo"]), kind == "bpe"),
            ("two words", lambda backend: backend.add_tokens(["x y"]), False),
            ("strips", lambda backend: backend.add_tokens([AddedToken("foo", rstrip=True)]), False),
            ("cleans", lambda b: setattr(b, "normalizer", normalizers.BertNormalizer()), kind == "wordpiece"),
            ("NFKC", lambda backend: setattr(backend, "normalizer", normalizers.NFKC()), False),
            ("metaspace", lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Metaspace(split=False)), False),
        ]:
            backend = text_tokenizer(tokenizer_command.train(texts, size, kind))
            backend_of(backend)
            made[f"{kind}, {name}"] = backend, known
    return made


def test_a_document_in_pieces_has_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tokenizer is one of which this is not known, and gets the document in one go."""
    choose, cuts = random.Random(0), 0
    for name, (backend, known) in made_tokenizers().items():
        assert splits_at_spaces(backend) == known, name
        for _ in range(60):
            document = Document("".join(choose.choices(ODD, k=choose.randint(1, 80))), FileRange("a", "parquet"), 1)
            monkeypatch.setattr(packing, "PIECE", 1 << 20)
            whole = [ids.tolist() for ids in tokenize([document], backend, Rejects())]
            monkeypatch.setattr(packing, "PIECE", 1)
            assert [ids.tolist() for ids in tokenize([document], backend, Rejects())] == whole, (name, document.text)
            parts = pieces(document, known, Rejects())
            assert "".join(parts) == document.text and (known or len(parts) == 1)
            cuts += len(parts) - 1
    assert cuts > 500


def test_a_text_without_a_place_to_cut(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = text_tokenizer(AutoTokenizer.from_pretrained(work / "tokenizer"))
    monkeypatch.setattr(packing, "PIECE", 16)
    range_, rejects = FileRange("a", "parquet", max_bytes=8 * 80), Rejects()
    texts = ["-" * 80, "abcde " * 100, "-" * 81, "ab"]
    found = list(tokenize([Document(text, range_, 1) for text in texts], backend, rejects))
    assert len(found) == 3 and len(found[0]) == 80
    assert rejects.report()["reasons"] == {"longer than 80 bytes without a place to cut": 1}


def test_a_shard_of_too_many_tokens_is_refused(monkeypatch: pytest.MonkeyPatch, work: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(packing, "MAX_SHARD_TOKENS", 1000)
    with pytest.raises(UsageError, match=r"more than 1,000 tokens; lower --shard-tokens"):
        tokenize_here(work / "corpus.jsonl", work / "tokenizer", tmp_path / "out")
    assert pack([], 8, 1, 2, 0).shape == (0, 8)


def varint(number: int) -> bytes:
    """As in a footer of Parquet."""
    number, digits = 2 * number, bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


@pytest.mark.parametrize(
    "what, claim, sentence",
    [
        ("rows", 10**9, "claims 1,000,000,000 rows .*, more than a file of .* bytes can hold"),
        ("rows", 2000, "has fewer rows than its footer claims"),
        ("bytes", 10**15, "more than a file of .* bytes can hold"),
        ("bytes", -1, "impossible numbers"),
    ],
)
def test_what_a_footer_claims_is_checked(tmp_path: Path, what: str, claim: int, sentence: str) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{number} {' '.join(WORDS)}" for number in range(1234)]})
    pq.write_table(table, path, use_dictionary=False, compression="none")
    true = 1234 if what == "rows" else pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    data = path.read_bytes()
    size = struct.unpack("<I", data[-8:-4])[0]
    claimed = varint(claim) if claim >= 0 else varint(true - 1)[:1].replace(varint(true - 1)[:1], b"\x01")
    footer = data[-8 - size : -8].replace(varint(true), claimed)
    path.write_bytes(data[: -8 - size] + footer + struct.pack("<I", len(footer)) + b"PAR1")
    with pytest.raises(UsageError, match=sentence):
        texts_of(plan_corpus(str(path)))


def test_rows_that_take_no_space(tmp_path: Path) -> None:
    """A billion equal rows are no corpus; a million are several shards."""
    column = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int8()), 10**6), ["a text"])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert len(plan_corpus(str(tmp_path / "a.parquet"), shard_tokens=10_000).shards) == 25
    pq.write_table(pa.table({"text": pa.nulls(1 << 21, pa.string())}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="claims 2,097,152 rows"):
        plan_corpus(str(tmp_path / "b.parquet"))


def test_memory_is_bounded(work: Path, tmp_path: Path) -> None:
    """A document of 40 MB, a gibibyte of zeros and a longer text in one line, with 2.5 GB of address space."""
    corpus = tmp_path / "texts"
    corpus.mkdir()
    prose = " ".join(random.Random(0).choices(WORDS, k=400_000))
    (corpus / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (prose, prose * 20)))
    with pa.CompressedOutputStream(str(corpus / "zeros.jsonl.zst"), "zstd") as stream:
        for _ in range(1 << 6):
            stream.write(bytes(1 << 24))
    flags = ["--corpus", corpus, "--teacher", "none", "--tokenizer", work / "tokenizer", "--backend", "local"]
    ended = subprocess.run(
        [*SCORE, *map(str, flags), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2_500_000_000, resource.RLIM_INFINITY)),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"rejected documents  2 \(2 longer than 33,554,432 bytes\)", ended.stdout), ended.stdout
