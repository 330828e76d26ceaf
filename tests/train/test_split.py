"""What is trained on and what is held out: whole documents, in the asked share, the same for every directory."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import LENGTH
from in_process import RANDOM, score_here, tokenize_here, train_here

from entropy_masking.errors import UsageError
from entropy_masking.masking.noise import hashes
from entropy_masking.shards.manifests import Manifest, read_manifest
from entropy_masking.shards.read import read_rows
from train.data import TrainingSequences, whole_batch
from train.evaluation import batches
from train.split import PLACE, SEED, Part, Split, split

Row = tuple[int, int]  # shard, row


def documents_of(manifest: Manifest) -> dict[Row, set[Row]]:
    """The documents with tokens in each row, found by walking through every token. A document is (shard, number)."""
    documents: dict[Row, set[Row]] = {}
    sep, pad = manifest.special_ids["sep"], manifest.special_ids["pad"]
    for entry in manifest.shards:
        number = 0
        for row, ids in enumerate(read_rows(manifest, entry, [])["input_ids"].tolist()):
            own = documents.setdefault((entry.index, row), set())
            inner = ids[1 : ids.index(pad)] if pad in ids else ids[1:]
            for token in inner[:-1]:
                if token == sep:
                    number += 1
                else:
                    own.add((entry.index, number))
    return documents


def rows_of(parts: list[Part]) -> set[Row]:
    return {(part.entry.index, row) for part in parts for row in range(part.start, part.stop)}


def check(manifest: Manifest, made: Split) -> tuple[set[Row], set[Row]]:
    """No document on both sides; at most two rows are left out for each held-out part."""
    documents, training, held_out = documents_of(manifest), rows_of(made.training), rows_of(made.held_out)
    sides = [set().union(*(documents[row] for row in rows)) for rows in (training, held_out)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert not training & held_out
    assert len(documents) - len(training) - len(held_out) <= 2 * len(made.held_out)
    return training, held_out


@pytest.fixture(scope="module")
def directories(work: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The world's 400 documents as directories of 1, a few and many shards."""
    root = tmp_path_factory.mktemp("directories")
    sizes = ("--sequence-length", LENGTH, "--shard-tokens")
    return {
        tokens: tokenize_here(work / "corpus.jsonl", work / "tokenizer", root / str(tokens), *sizes, tokens)
        for tokens in (1_000_000, 10_000, 800)
    }


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.5])
def test_the_share_holds_for_any_number_of_shards(directories: dict[int, Path], fraction: float) -> None:
    for directory in directories.values():
        manifest = read_manifest(str(directory))
        made = split(manifest, fraction)
        training, held_out = check(manifest, made)
        assert 0.8 < len(held_out) / (len(training) + len(held_out)) / fraction < 1.2, len(manifest.shards)
        tokens = [sum(part.tokens for part in parts) for parts in (made.training, made.held_out)]
        assert 0.8 < tokens[1] / sum(tokens) / fraction < 1.2
        assert not made.cut


def test_a_large_corpus_holds_out_whole_shards(directories: dict[int, Path]) -> None:
    manifest = read_manifest(str(directories[800]))
    made = split(manifest, 0.7)
    assert len(made.held_out) == round(0.7 * len(manifest.shards)) == 18
    assert all(part.rows == part.entry.rows for part in made.held_out)
    assert split(manifest, 0) == Split([Part(entry, 0, entry.rows) for entry in manifest.shards], [])


def test_the_block_of_a_shard_does_not_depend_on_the_others(directories: dict[int, Path]) -> None:
    manifest = read_manifest(str(directories[10_000]))
    made = split(manifest, 0.3)
    for lost in manifest.shards:
        left = [entry for entry in manifest.shards if entry is not lost]
        fewer = split(manifest.model_copy(update={"shards": left}), 0.3)
        for now, before in ((fewer.training, made.training), (fewer.held_out, made.held_out)):
            assert now == [part for part in before if part.entry.index != lost.index]


def test_scored_shards_hold_out_the_same_rows_as_their_tokens(
    directories: dict[int, Path], work: Path, tmp_path: Path
) -> None:
    scored = score_here(directories[10_000], work / "teacher", tmp_path / "scored", "--passes", 1)
    splits = [split(read_manifest(str(directory)), 0.1) for directory in (directories[10_000], scored)]
    assert rows_of(splits[0].held_out) == rows_of(splits[1].held_out)
    assert rows_of(splits[0].training) == rows_of(splits[1].training)


def test_a_run_trains_on_every_row_but_the_held_out_ones(directories: dict[int, Path]) -> None:
    manifest = read_manifest(str(directories[10_000]))
    made = split(manifest, 0.1)
    rows = sum(part.rows for part in made.training)
    dataset = TrainingSequences(manifest, made.training, [], size=2 * rows, batch=8, seed=0, prepare=whole_batch)
    epochs = torch.tensor([dataset[index]["sequence_id"].item() for index in range(2 * rows)]).reshape(2, rows)
    for epoch in epochs.tolist():
        assert sorted((number >> 32, number & 0xFFFFFFFF) for number in epoch) == sorted(rows_of(made.training))
    evaluated = np.concatenate([batch["sequence_id"] for batch in batches(manifest, made.held_out, [], 7)])
    assert [(number >> 32, number & 0xFFFFFFFF) for number in evaluated.tolist()] == sorted(rows_of(made.held_out))


def test_padding_is_found_in_the_part_that_has_it(directories: dict[int, Path]) -> None:
    manifest = read_manifest(str(directories[10_000]))
    pad, found = manifest.special_ids["pad"], set()
    for entry in manifest.shards:
        ids_NL = read_rows(manifest, entry, [])["input_ids"]
        for start, stop in ((0, entry.rows), (0, entry.rows - 1), (entry.rows - 1, entry.rows)):
            padded = bool((ids_NL[start:stop] == pad).any())
            assert Part(entry, start, stop).has_padding(LENGTH) == padded
            found.add(padded)
    assert found == {True, False}


def test_held_out_text_without_a_token_to_predict(directories: dict[int, Path], work: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "語 学 校"}\n' * 50)
    other = tokenize_here(tmp_path / "text.jsonl", work / "tokenizer", tmp_path / "other", "--sequence-length", LENGTH)
    with pytest.raises(UsageError, match=r"the held-out text of .*other has only special tokens, such as \[UNK\]"):
        train_here(directories[10_000], tmp_path / "out", *RANDOM, "--eval-fraction", 0, "--eval-shards", other)


def test_long_documents_are_kept_whole_or_cut(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nine short documents and a long one, or a single one."""
    lines = [json.loads(line)["text"] for line in (work / "corpus.jsonl").read_text().splitlines()]
    few = [*lines[:5], " ".join(lines[5:200]), *lines[200:204]]
    for name, texts, cut in (("few", few, None), ("one", [" ".join(lines)], 1)):
        corpus = tmp_path / f"{name}.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        shards = tokenize_here(corpus, work / "tokenizer", tmp_path / name, "--sequence-length", LENGTH)
        manifest = read_manifest(str(shards))
        made = split(manifest, 0.1)
        share = sum(part.rows for part in made.held_out) / manifest.totals["sequences"]
        assert 0.05 < share < 0.2 and (cut is None or made.cut == cut)
        if not made.cut:
            check(manifest, made)
    train_here(shards, tmp_path / "out", *RANDOM, "--eval-fraction", 0.1, "--max-steps", 1)
    printed = capsys.readouterr().err
    assert "held out to evaluate on; 1 of 1 blocks cut from longer documents, whose rest trains" in printed


def test_a_block_is_not_empty_if_only_the_last_row_has_a_border(work: Path, tmp_path: Path) -> None:
    long = " ".join(json.loads(line)["text"] for line in (work / "corpus.jsonl").read_text().splitlines()[:200])
    corpus = tmp_path / "text.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in (long, "a")))
    shards = tokenize_here(corpus, work / "tokenizer", tmp_path / "shards", "--sequence-length", LENGTH)
    manifest = read_manifest(str(shards))
    rows = manifest.totals["sequences"]
    assert [len(documents) for documents in documents_of(manifest).values()] == [1] * (rows - 1) + [2]
    place = int(hashes(SEED, PLACE, of_N=torch.tensor([0])))
    # the planned block takes the last rows of the shard
    number = next(number for number in range(1, rows) if place % (rows - number + 1) == rows - number)
    made = split(manifest, number / rows)
    assert [(part.start, part.stop) for part in made.held_out] == [(rows - number, rows)] and made.cut == 1


def test_too_little_text_is_refused(work: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "one sentence"}\n')
    shards = tokenize_here(tmp_path / "text.jsonl", work / "tokenizer", tmp_path / "shards")
    with pytest.raises(UsageError, match=r"too little text to hold out 0\.01 of it; use more text"):
        split(read_manifest(str(shards)), 0.01)


def test_a_run_that_held_out_whole_shards_is_refused(directories: dict[int, Path], tmp_path: Path) -> None:
    """Runs of earlier versions did, so resuming one would train on its held-out text."""
    flags = [directories[10_000], tmp_path / "out", *RANDOM, "--max-steps", 1]
    train_here(*flags, "--eval-fraction", 0.1)
    file = tmp_path / "out" / "run.json"
    old = json.loads(file.read_text())
    assert old.pop("held_out_by") == "documents"
    file.write_text(json.dumps(old))
    with pytest.raises(UsageError, match="held_out_by: whole shards → documents"):
        train_here(*flags, "--eval-fraction", 0.1)
    train_here(*flags, "--eval-fraction", 0, "--overwrite")
    train_here(*flags, "--eval-fraction", 0)  # a run that held out nothing is the same in each version
