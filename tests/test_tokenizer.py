"""tokenizer.py as its users run it."""

from __future__ import annotations

import sys
from pathlib import Path

from harness import ROOT, refused, run
from transformers import AutoTokenizer

COMMAND = [sys.executable, ROOT / "pipeline" / "tokenizer.py"]


def test_it_loads_and_is_reproducible(work: Path, tmp_path: Path) -> None:
    flags = ["--corpus", work / "corpus.jsonl", "--vocab-size", 250]
    assert "250 tokens from 400 documents" in run(*COMMAND, *flags, "--output", tmp_path / "one")
    run(*COMMAND, *flags, "--output", tmp_path / "two")
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer.is_fast and len(tokenizer) == 250
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]
    encoded = tokenizer("ABCDE", "fgh").input_ids
    assert encoded[0] == 2 and encoded.count(3) == 2 and encoded[-1] == 3
    assert tokenizer.decode(tokenizer("Abcde fghab").input_ids, skip_special_tokens=True) == "abcde fghab"

    assert "made already" in run(*COMMAND, *flags, "--output", tmp_path / "one")
    flags[-1] = 260
    assert "made from something else" in refused(*COMMAND, *flags, "--output", tmp_path / "one")


def test_sizes_that_do_not_fit_the_corpus(work: Path, tmp_path: Path) -> None:
    flags = ["--corpus", work / "corpus.jsonl", "--output", tmp_path / "out", "--vocab-size"]
    assert "too small" in refused(*COMMAND, *flags, 10)
    message = refused(*COMMAND, *flags, 1_000_000)
    assert "choose at most" in message
    most = int(message.rpartition("choose at most ")[2])
    run(*COMMAND, *flags, most)


def test_case_may_be_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Some Words in Any Case\n" * 20)
    flags = ["--corpus", tmp_path / "a.txt", "--vocab-size", 40, "--no-lowercase"]
    run(*COMMAND, *flags, "--output", tmp_path / "cased")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cased")
    assert tokenizer.decode(tokenizer("Some Case", add_special_tokens=False).input_ids) == "Some Case"
