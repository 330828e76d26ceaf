"""Documents → sequences of tokens; and the docstrings, a corpus that is on every machine."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from texts import texts_of
from transformers import AutoTokenizer

from entropy_masking.commands import docstrings
from entropy_masking.errors import UsageError
from pipeline.corpus.packing import pack, text_tokenizer, tokenize
from pipeline.corpus.plan import plan_corpus
from pipeline.corpus.readers import Reader, Rejects, read_documents


def slow_pack(documents: list[list[int]], length: int) -> list[list[int]]:
    stream = [token for number, ids in enumerate(documents) for token in ([] if number == 0 else [2]) + ids]
    blocks = [stream[i : i + length - 2] for i in range(0, len(stream), length - 2)]
    return [[1, *block, 2] + [0] * (length - 2 - len(block)) for block in blocks]


@pytest.mark.parametrize("length", [8, 9, 32])
def test_packing(length: int) -> None:
    rng = np.random.default_rng(length)
    for _ in range(50):
        documents = [rng.integers(5, 99, rng.integers(1, 40)).tolist() for _ in range(rng.integers(1, 12))]
        ids_NL = pack((np.array(ids, np.uint32) for ids in documents), length, cls_id=1, sep_id=2, pad_id=0)
        assert ids_NL.tolist() == slow_pack(documents, length)
    assert pack([], length, 1, 2, 0).shape == (0, length)


def test_special_tokens_written_out_in_a_text_are_text(work: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    (tmp_path / "a.txt").write_text("abcde [MASK] fghab [SEP]\n\nabcde\n")
    rejects = Rejects()
    documents = read_documents(plan_corpus(str(tmp_path / "a.txt")).shards[0], Reader(), rejects)
    backend = text_tokenizer(tokenizer)
    backend.enable_truncation(99)
    first, second = tokenize(documents, backend, rejects)
    assert backend.truncation, "another thread may be encoding, so the options stay as they are"
    assert not set(first.tolist()) & ({tokenizer.mask_token_id, tokenizer.sep_token_id})
    assert len(first) > len(second) > 0


def test_docstrings_are_parsed_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts that share no file and no text, the same each time, short and repeated ones left out."""
    package = tmp_path / "site" / "demo_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    for number in range(40):
        body = f'"""Module {number}. {"What it does is told at some length. " * 5}"""\n'
        body += f'def f():\n    """Function of {number}. {"Its use is explained here in full. " * 5}"""\n'
        body += 'def g():\n    """Short."""\n'
        body += f'def h():\n    """{"The same in every file, so kept only once. " * 5}"""\n'
        (package / f"m{number}.py").write_text(body)
    (package / "broken.py").write_text("def (")
    (package / "tests").mkdir()
    (package / "tests" / "t.py").write_text(f'"""{"Tests are left out of the corpus. " * 9}"""')
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(docstrings, "PACKAGES", ("demo_package", "not_installed"))
    monkeypatch.setattr(docstrings, "packages_distributions", lambda: {name: [name] for name in docstrings.PACKAGES})
    monkeypatch.setattr(docstrings, "version", lambda distribution: "1")
    results = []
    for cache in ("one", "two"):
        monkeypatch.setenv("ENTROPY_MASKING_CACHE", str(tmp_path / cache))
        results.append({part: path.read_bytes() for part, path in docstrings.materialise().items()})
    assert results[0] == results[1]
    parts = {part: pq.read_table(path).to_pylist() for part, path in docstrings.materialise().items()}
    texts = {part: {row["text"] for row in rows} for part, rows in parts.items()}
    assert len(texts["pretrain"] | texts["pairs"]) == len(parts["pretrain"]) + len(parts["pairs"]) == 81
    assert parts["pairs"] and not texts["pretrain"] & texts["pairs"]
    assert not [text for text in texts["pretrain"] | texts["pairs"] if "Tests are left" in text or "Short" in text]
    for number in range(40):
        homes = {part for part in texts for text in texts[part] if text.split(".")[0].endswith(f" {number}")}
        assert len(homes) == 1, "a file's docstrings are in one part"
    assert len(texts_of(plan_corpus("docstrings"))) == len(parts["pretrain"])


def test_docstrings_without_a_place_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("ENTROPY_MASKING_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(docstrings, "PACKAGES", ())
    with pytest.raises(UsageError, match=r"Not a directory; set ENTROPY_MASKING_CACHE"):
        docstrings.materialise()
