"""Masking by words and by surprisal: against a slow reference, on every kind of tokenizer, on the command line."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rows import CLS, MASK, PAD, SEP, VOCAB, K, L, as_sets, candidates, entropies, keys
from test_targets import score
from tokenizers import (
    BertWordPieceTokenizer,
    ByteLevelBPETokenizer,
    CharBPETokenizer,
    SentencePieceBPETokenizer,
    SentencePieceUnigramTokenizer,
    Tokenizer,
    models,
)
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train.run
from entropy_masking.errors import UsageError
from entropy_masking.masking import noise, words
from entropy_masking.masking.masker import Masker
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED, select_positions
from entropy_masking.shards.manifests import read_manifest

paper = MaskPolicy.paper

# --- words -----------------------------------------------------------------------------------------------------------


def words_of(candidate: list[bool], continues: list[bool], without: set[int] = frozenset()) -> list[list[int]]:
    """Pieces word by word: a candidate that is still there, and those directly after it that go on with it."""
    words: list[list[int]] = []
    for position, is_candidate in enumerate(candidate):
        if is_candidate and position not in without:
            if continues[position] and words and words[-1][-1] == position - 1:
                words[-1].append(position)
            else:
                words.append([position])
    return words


def slow_words(
    score: list[float],
    candidate: list[bool],
    continues: list[bool],
    draw: list[float],
    hard_draw: list[float],
    policy: MaskPolicy,
) -> set[int]:
    """The documented rule, word after word, in Python: the uniform part, then the hard part of what is left."""
    score = [-math.inf if math.isnan(h) else h for h in score]
    count = sum(candidate)
    left = min(count, max(1, round(policy.ratio * count)), policy.positions(len(score)))
    taken: set[int] = set()

    def fill(room: int, key_of_words: Any, key_of_pieces: Any) -> None:
        """Keys: from scores by place to what is sorted by, ascending."""
        words = words_of(candidate, continues, taken)
        key = key_of_words({word[0]: sum(score[p] for p in word) / len(word) for word in words})
        for word in sorted(words, key=lambda w: key(w[0])):
            if len(taken) + len(word) <= room:
                taken.update(word)
        pieces = [p for p, is_candidate in enumerate(candidate) if is_candidate and p not in taken]
        pieces.sort(key=key_of_pieces({p: score[p] for p in pieces}))
        taken.update(pieces[: room - len(taken)])

    def by_chance(scores: dict[int, float]) -> Any:
        return lambda p: (-draw[p], p)

    def by_score(scores: dict[int, float]) -> Any:
        below = {p: sum(o < s for o in scores.values()) for p, s in scores.items()}
        rank = {p: (below[p] + below[p] + list(scores.values()).count(s) + 1) / 2 for p, s in scores.items()}

        def key(p: int) -> tuple[float, float, int]:
            gumbel = -math.log(-math.log(hard_draw[p]))
            hard = rank[p] / len(scores) + policy.temperature * gumbel if policy.temperature else scores[p]
            return -hard, -draw[p], p

        return key

    fill(left - round(policy.hard_share * left), by_chance, by_chance)
    if policy.hard_share:
        fill(left, by_score, by_score)
    return taken


def word_batch(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, candidates, continues) with ties, unscored pieces, padding, and words of 1 to many pieces."""
    random = np.random.default_rng(seed)
    score_BL = torch.from_numpy(random.integers(0, 12, (rows, length)) / 4.0)
    candidates_BL = candidates(rows, length)
    candidates_BL &= torch.from_numpy(random.random((rows, length)) > 0.05)
    for row in range(0, rows, 5):
        candidates_BL[row, random.integers(0, length) :] = False
    score_BL[torch.from_numpy(random.random((rows, length)) < 0.03)] = torch.nan
    continues_BL = torch.from_numpy(random.random((rows, length)) < random.choice([0.2, 0.6, 0.9], (rows, 1)))
    return score_BL, candidates_BL, continues_BL


WORDS = [
    {},
    {"temperature": 0.2},
    {"hard_share": 0.0},
    {"hard_share": 0.0, "ratio": 1},
    {"ratio": 0.4, "hard_share": 0.35},
    {"ratio": 0.3, "temperature": 0.5, "hard_share": 0.5},
    {"ratio": 0.02},
    {"ratio": 0.9, "hard_share": 0.8},
]


@pytest.mark.parametrize("length", [8, 41, 128])
@pytest.mark.parametrize("settings", WORDS)
def test_words_are_taken_by_the_documented_rule(settings: dict, length: int) -> None:
    rows = 60
    policy = paper(**settings, seed=length, unit="word")
    score_BL, candidates_BL, continues_BL = word_batch(rows, length, seed=length)
    sequence_B, epoch_B = keys(rows, epoch=2)
    positions_BK = select_positions(score_BL, candidates_BL, sequence_B, epoch_B, policy, continues_BL)
    draw_BL, hard_draw_BL = (
        noise.noise(policy.seed, stream, epoch_B, sequence_B, torch.arange(length))
        for stream in (noise.SELECTION, noise.HARD)
    )
    as_tokens = select_positions(score_BL, candidates_BL, sequence_B, epoch_B, replace(policy, unit="token"))
    assert torch.equal((positions_BK != IGNORED).sum(1), (as_tokens != IGNORED).sum(1)), "exactly k, as by tokens"
    columns = (score_BL, candidates_BL, continues_BL, draw_BL, hard_draw_BL)
    for row, chosen in enumerate(as_sets(positions_BK)):
        assert chosen == slow_words(*(column_BL[row].tolist() for column_BL in columns), policy), row


def test_words_of_one_piece_are_tokens() -> None:
    score_BL, candidates_BL, _ = word_batch(200, 64, seed=3)
    alone_BL = torch.zeros_like(candidates_BL)
    for settings in WORDS:
        by_word = select_positions(score_BL, candidates_BL, *keys(200), paper(**settings, unit="word"), alone_BL)
        assert torch.equal(by_word, select_positions(score_BL, candidates_BL, *keys(200), paper(**settings)))


def test_a_round_of_taking_words_that_never_fit_ends() -> None:
    """Sizes 1, 16, 1, 15 …: each round takes one word and meets one that is too large."""
    sizes = [size for large in range(16, 1, -1) for size in (1, large)]
    size_BL = torch.zeros(1, sum(sizes), dtype=torch.float64)
    size_BL[0, : len(sizes)] = torch.tensor(sizes)
    for room in range(sum(sizes) + 1):
        expected, left = [], room
        for size in sizes:
            expected.append(size <= left)
            left -= size if size <= left else 0
        assert words.take_while_it_fits(size_BL, torch.tensor([[room]]))[0, : len(sizes)].tolist() == expected


def test_most_words_are_masked_whole_and_the_word_unit_needs_words() -> None:
    score_BL, candidates_BL, continues_BL = word_batch(500, 128, seed=8)
    policy = paper(unit="word", temperature=0.3)
    chosen = as_sets(select_positions(score_BL, candidates_BL, *keys(500), policy, continues_BL))
    whole = broken = 0
    for row in range(500):
        for word in words_of(candidates_BL[row].tolist(), continues_BL[row].tolist()):
            hidden = len(chosen[row] & set(word))
            whole, broken = whole + (hidden == len(word)), broken + (0 < hidden < len(word))
    assert broken < 0.1 * whole
    with pytest.raises(ValueError, match="word unit needs"):
        select_positions(score_BL, candidates_BL, *keys(500), policy)


TEXTS = ["the unbelievable cat sat on the mat, naïvely\n", "unbelievers like cats' mats\tand dogs"] * 20


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer of each kind, in which few words are one token."""
    tokenizer = {
        "wordpiece": BertWordPieceTokenizer,
        "byte-level": ByteLevelBPETokenizer,
        "sentencepiece-bpe": SentencePieceBPETokenizer,
        "sentencepiece-unigram": SentencePieceUnigramTokenizer,
    }[kind]()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    size = {"byte-level": 275, "wordpiece": 56}.get(kind, 45)
    tokenizer.train_from_iterator(TEXTS, vocab_size=size, special_tokens=special, show_progress=False)
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **roles)


@pytest.mark.parametrize("kind", ["wordpiece", "byte-level", "sentencepiece-bpe", "sentencepiece-unigram"])
def test_which_tokens_go_on_with_a_word(kind: str) -> None:
    tokenizer = trained(kind)
    tokenizer.add_tokens(["##dogs"])
    continues_V = words.continuing_tokens(tokenizer, len(tokenizer) + 3)
    assert continues_V.dtype == torch.bool and continues_V.shape == (len(tokenizer) + 3,)
    assert not continues_V[tokenizer.all_special_ids].any() and not continues_V[-4:].any(), "added tokens and no tokens"
    ids = tokenizer("the unbelievable cats like the naïve mats", add_special_tokens=False).input_ids
    assert len(ids) > 12
    groups = words_of([True] * len(ids), continues_V[ids].tolist())
    found = [tokenizer.decode([ids[p] for p in group]).strip().replace(" ", "") for group in groups]
    expected = ["the", "unbelievable", "cats", "like", "the", "naïve", "mats"]
    assert found == ([word.replace("ï", "i") for word in expected] if kind == "wordpiece" else expected)


def test_tokens_that_do_not_say_are_refused() -> None:
    """Whole words by another mark (</w> at their end), none at all, or no fast tokenizer."""
    end = CharBPETokenizer()
    end.train_from_iterator(TEXTS, vocab_size=60, show_progress=False)
    plain = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    for backend in (end._tokenizer, plain):
        with pytest.raises(ValueError, match="do not mark which of them continue a word") as caught:
            words.continuing_tokens(PreTrainedTokenizerFast(tokenizer_object=backend), 60)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="object"):
        words.continuing_tokens(object(), 60)  # type: ignore[arg-type]


def test_a_masker_hides_words_by_their_surprisal() -> None:
    rows = 40
    ids_BL = torch.randint(5, VOCAB, (rows, L), generator=torch.Generator().manual_seed(4))
    ids_BL[:, 0], ids_BL[:, -1] = CLS, SEP
    continues_V = torch.arange(VOCAB) >= 120
    masker = Masker(
        vocab_size=VOCAB, special_token_ids=[PAD, CLS, SEP, MASK], mask_id=MASK, pad_id=PAD, continues_V=continues_V
    )
    sequence_B, epoch_B = keys(rows)
    raw = {"input_ids": ids_BL, "sequence_id": sequence_B, "epoch": epoch_B, "surprisal": entropies(rows)}
    policy = paper(unit="word", by="surprisal")
    expected = select_positions(entropies(rows), candidates(rows), *keys(rows), policy, continues_V[ids_BL])
    assert torch.equal(masker(raw, policy)["positions_BP"], expected)
    with pytest.raises(KeyError, match="entropy"):
        masker(raw, paper())


@pytest.mark.parametrize("unit", ["token", "word"])
def test_on_an_accelerator_nothing_is_waited_for(unit: str) -> None:
    """Tensors of torch's `meta` device have no values: whatever wants to look at one fails."""
    masker = Masker(
        vocab_size=VOCAB,
        special_token_ids=[PAD, CLS, SEP, MASK],
        mask_id=MASK,
        pad_id=PAD,
        continues_V=torch.arange(VOCAB) >= 120,
    )
    moved = masker.to("meta")
    assert masker.special_V.device.type == "cpu" and moved.special_V.device.type == "meta"
    sequence_B, epoch_B = keys(6)
    raw = {"input_ids": torch.full((6, L), 9), "sequence_id": sequence_B, "epoch": epoch_B, "entropy": entropies(6)}
    raw |= {"reference": entropies(6), "progress": torch.linspace(0, 1, 6, dtype=torch.float64)}
    raw |= {"topk_ids": torch.ones(6, L, 4, dtype=torch.long), "topk_logprobs": torch.zeros(6, L, 4)}
    batch = {name: tensor.to("meta") for name, tensor in raw.items()}
    for settings in (
        {},
        {"temperature": 0.5, "hard_share": 0.7, "warmup": 0.1, "ramp": 0.5},
        {"hard_share": 0.0, "predict_ratio": 0.1},
        {"predict_ratio": 0.1, "predict_by": "entropy"},
        {"predict_ratio": 0.1, "predict_by": "excess"},
    ):
        policy = paper(**settings, unit=unit)
        masked = moved(batch, policy)
        predicted = 3 if "predict_ratio" in settings and settings.get("predict_by") != "excess" else K
        assert masked["positions_BP"].shape == (6, predicted) and masked["attention_mask"].shape == (6, L)
        assert "attention_mask" not in moved(batch | {"padded": False}, policy)
        on_cpu = masker(raw, policy)
        assert torch.equal(on_cpu["positions_BP"], masker(raw | {"padded": True}, policy)["positions_BP"])
        assert {n: (tensor.shape, tensor.dtype) for n, tensor in masked.items() if n != "attention_mask"} == {
            n: (tensor.shape, tensor.dtype) for n, tensor in on_cpu.items()
        }


# --- through the command line ----------------------------------------------------------------------------------------

HARDEST = ["--hard-share", 1, "--mask-temperature", 0]
WORDS_BY_SURPRISAL = ["--mask-unit", "word", "--mask-by", "surprisal", "--mask-ratio", 0.3]
WORDS_BY_SURPRISAL += [*HARDEST, "--mask-warmup", 0, "--mask-ramp", 0]


def train_here(shards: Path, output: Path, *flags: object) -> dict[str, Any]:
    sizes = ["--max-steps", 3, "--per-device-train-batch-size", 8, "--eval-fraction", 0.2, "--bf16", "false"]
    train.run.main([str(flag) for flag in ("--shards", shards, "--output-dir", output, *sizes, *flags)])
    return json.loads((output / "summary.json").read_text())


@pytest.fixture
def masked_batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], dict[str, Tensor], MaskPolicy]]:
    """What every masker is given, and what it gives."""
    seen = []
    original = Masker.__call__

    def spy(masker: Masker, batch: dict[str, Tensor], policy: MaskPolicy) -> dict[str, Tensor]:
        seen.append((batch, original(masker, batch, policy), policy))
        return seen[-1][1]

    monkeypatch.setattr(Masker, "__call__", spy)
    return seen


def test_a_run_and_targets_mask_the_words_of_the_shards_surprisals(
    work: Path, scored: Path, tmp_path: Path, masked_batches: list
) -> None:
    parquet = ["--entropy-source", "parquet", *WORDS_BY_SURPRISAL, "--seed", 3]
    summary = train_here(scored, tmp_path / "out", *parquet)
    assert (summary["flags"]["mask_unit"], summary["flags"]["mask_by"]) == ("word", "surprisal")
    policy = paper(ratio=0.3, unit="word", by="surprisal", seed=3)
    trained = [(batch, masked) for batch, masked, used in masked_batches if used == policy]
    assert len(trained) == 3
    tokenizer = AutoTokenizer.from_pretrained(scored / "tokenizer")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))

    table = pa.concat_tables(pq.read_table(file) for file in sorted(scored.glob("part-*.parquet")))
    rows = {row["sequence_id"]: row for row in table.select(["sequence_id", "input_ids", "surprisal"]).to_pylist()}
    hidden = {
        sequence: positions
        for batch, masked in trained
        for sequence, positions in zip(batch["sequence_id"].tolist(), as_sets(masked["positions_BP"]), strict=True)
    }
    for sequence, positions in hidden.items():
        ids, surprisal = rows[sequence]["input_ids"], [float(x) for x in rows[sequence]["surprisal"]]
        keyed = (torch.tensor([0]), torch.tensor([sequence]))
        (draw,) = noise.noise(3, noise.SELECTION, *keyed, torch.arange(len(ids))).tolist()
        continues = [tokens[token].startswith("##") for token in ids]
        assert positions == slow_words(surprisal, [token >= 5 for token in ids], continues, draw, draw, policy)

    masks = ["--mask-source", "parquet", *WORDS_BY_SURPRISAL, "--mask-seed", 3]
    directory = score(scored, work / "teacher", tmp_path / "targets", *masks)
    manifest = read_manifest(str(directory), kind="targets")
    assert manifest.masks and MaskPolicy.from_json(manifest.masks["policy"]) == policy
    targets = pa.concat_tables(pq.read_table(file) for file in sorted(directory.glob("part-*.parquet")))
    for row in targets.to_pylist():
        assert hidden.get(row["sequence_id"], set(row["positions"])) == set(row["positions"])


def test_a_student_masks_by_its_own_surprisal(scored: Path, tmp_path: Path, masked_batches: list) -> None:
    """By a forward of its own; and by what it could still learn, which is less what the shards' teacher knows."""
    for by in ("surprisal", "excess"):
        flags = ["--entropy-source", "self", "--self-refresh", "step", "--mask-by", by, *HARDEST]
        train_here(scored, tmp_path / by, *flags, "--mask-warmup", 0.3, "--mask-ramp", 0)
        warm_up, *later = (seen for seen in masked_batches if seen[2].by == by)
        known_BL = warm_up[0].get("reference", torch.zeros(1))
        assert not (warm_up[0]["score"] + known_BL).nan_to_num().any() and len(later) == 2
        for batch, masked, policy in later:
            assert policy == paper(ratio=0.3, by=by, warmup=0.3, seed=42) and "padded" in batch
            assert ("reference" in batch) == (by == "excess")
            special_BL = batch["input_ids"] < 5
            for row, chosen in enumerate(as_sets(masked["positions_BP"])):
                rest = {p for p in range(special_BL.shape[1]) if not special_BL[row, p]} - chosen
                score_L = batch["score"][row]
                assert min(score_L[list(chosen)]) >= max(score_L[list(rest)])


def test_mistakes_are_one_sentence(work: Path, scored: Path, tmp_path: Path) -> None:
    blind, unscored = tmp_path / "blind", tmp_path / "unscored"
    for directory in (blind, unscored):
        shutil.copytree(scored, directory)
    manifest = json.loads((scored / "manifest.json").read_text())
    (unscored / "manifest.json").write_text(json.dumps(manifest | {"scored": False}))
    # the same tokens with the same ids, but a tokenizer that takes each for a whole word
    backend = json.loads((blind / "tokenizer" / "tokenizer.json").read_text())
    backend["model"] = {"type": "WordLevel", "vocab": backend["model"]["vocab"], "unk_token": "[UNK]"}
    (blind / "tokenizer" / "tokenizer.json").write_text(json.dumps(backend))
    settings = json.loads((blind / "tokenizer" / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (blind / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    random = ["--entropy-source", "random"]
    for shards, source, flags, sentence in (
        (scored, "parquet", ["--mask-ratio", 0], "mask ratio 0 is not above 0"),
        (scored, "parquet", ["--mask-ratio", 1.2], "mask ratio 1.2 is not above 0"),
        (scored, "random", ["--mask-by", "surprisal"], "--mask-by needs scores, and --(entropy|mask)-source random"),
        (scored, "parquet", ["--mask-by", "entropy", "--hard-share", 0], "--mask-by has no effect with --hard-share 0"),
        (scored, "parquet", ["--mask-by", "excess"], "--mask-by excess needs the student's own loss"),
        (unscored, "parquet", ["--mask-by", "surprisal"], "has no scores"),
        (blind, "random", ["--mask-unit", "word"], "do not mark which of them continue a word"),
    ):
        named = ["--shards", shards, "--output-dir", tmp_path / "out"]
        with pytest.raises(UsageError, match=sentence) as caught:
            train.run.main([str(flag) for flag in (*named, "--entropy-source", source, *flags)])
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
        with pytest.raises(UsageError, match=sentence) as caught:
            score(shards, work / "teacher", tmp_path / "out", "--mask-source", source, *flags)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--mask-unit: invalid choice: 'letter'"):
        train.run.main(["--shards", str(scored), *random, "--output-dir", "o", "--mask-unit", "letter"])
