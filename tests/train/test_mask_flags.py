"""The mask flags of run.py and score.py: words and surprisal as the shards and the student score them, and mistakes."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from in_process import PARQUET, RANDOM, SEED, SELF, score_here, train_here
from rows import as_sets, slow_words
from torch import Tensor
from transformers import AutoTokenizer

from entropy_masking.errors import UsageError
from entropy_masking.masking import noise
from entropy_masking.masking.masker import Masker
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards.manifests import read_manifest

paper = MaskPolicy.paper

STEPS = ["--max-steps", 3]
HARDEST = ["--hard-share", 1, "--mask-temperature", 0]
WORDS_BY_SURPRISAL = ["--mask-unit", "word", "--mask-by", "surprisal", "--mask-ratio", 0.3]
WORDS_BY_SURPRISAL += HARDEST
AT_ONCE = ["--mask-warmup", 0, "--mask-ramp", 0]


@pytest.fixture
def masked_batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], dict[str, Tensor], MaskPolicy]]:
    """The batch, the masked batch and the policy of every call of a masker."""
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
    summary = train_here(scored, tmp_path / "out", *STEPS, *PARQUET, *WORDS_BY_SURPRISAL, *AT_ONCE)
    assert (summary["flags"]["mask_unit"], summary["flags"]["mask_by"]) == ("word", "surprisal")
    policy = paper(ratio=0.3, unit="word", by="surprisal", seed=SEED)
    trained = [(batch, masked) for batch, masked, used in masked_batches if used == policy]
    assert len(trained) == 3
    tokenizer = AutoTokenizer.from_pretrained(scored / "tokenizer")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))

    table = pa.concat_tables(pq.read_table(file) for file in sorted(scored.glob("part-*.parquet")))
    rows = {row["sequence_id"]: row for row in table.select(["sequence_id", "input_ids", "surprisal"]).to_pylist()}
    masked_of = {
        sequence: positions
        for batch, masked in trained
        for sequence, positions in zip(batch["sequence_id"].tolist(), as_sets(masked["positions_BP"]), strict=True)
    }
    for sequence, positions in masked_of.items():
        ids, surprisal = rows[sequence]["input_ids"], [float(x) for x in rows[sequence]["surprisal"]]
        keyed = (torch.tensor([0]), torch.tensor([sequence]))
        (draw,) = noise.noise(SEED, noise.SELECTION, *keyed, torch.arange(len(ids))).tolist()
        continues = [tokens[token].startswith("##") for token in ids]
        assert positions == slow_words(surprisal, [token >= 5 for token in ids], continues, draw, draw, policy)

    masks = ["--mask-source", "parquet", *WORDS_BY_SURPRISAL, "--mask-seed", SEED]
    directory = score_here(scored, work / "teacher", tmp_path / "targets", *masks)
    manifest = read_manifest(str(directory), kind="targets")
    assert manifest.masks and MaskPolicy(**manifest.masks["policy"]) == policy
    targets = pa.concat_tables(pq.read_table(file) for file in sorted(directory.glob("part-*.parquet")))
    for row in targets.to_pylist():
        assert masked_of.get(row["sequence_id"], set(row["positions"])) == set(row["positions"])


def test_a_student_masks_by_its_own_surprisal(scored: Path, tmp_path: Path, masked_batches: list) -> None:
    """By a forward of its own. The excess is that surprisal minus the one of the shards' teacher."""
    for by in ("surprisal", "excess"):
        flags = [*SELF, "--self-refresh", "step", "--mask-by", by, *HARDEST]
        train_here(scored, tmp_path / by, *STEPS, *flags, "--mask-warmup", 0.3, "--mask-ramp", 0)
        warm_up, *later = (seen for seen in masked_batches if seen[2].by == by)
        known_BL = warm_up[0].get("reference", torch.zeros(1))
        assert not (warm_up[0]["score"] + known_BL).nan_to_num().any() and len(later) == 2
        for batch, masked, policy in later:
            assert policy == paper(ratio=0.3, by=by, warmup=0.3, seed=SEED) and "padded" in batch
            assert ("reference" in batch) == (by == "excess")
            special_BL = batch["input_ids"] < 5
            for row, chosen in enumerate(as_sets(masked["positions_BP"])):
                rest = {p for p in range(special_BL.shape[1]) if not special_BL[row, p]} - chosen
                score_L = batch["score"][row]
                assert min(score_L[list(chosen)]) >= max(score_L[list(rest)])


def test_mistakes_in_both_commands_are_one_sentence(work: Path, scored: Path, tokens: Path, tmp_path: Path) -> None:
    blind = Path(shutil.copytree(scored, tmp_path / "blind"))
    # the same tokens with the same ids, but for this tokenizer each token is a whole word
    backend = json.loads((blind / "tokenizer" / "tokenizer.json").read_text())
    backend["model"] = {"type": "WordLevel", "vocab": backend["model"]["vocab"], "unk_token": "[UNK]"}
    (blind / "tokenizer" / "tokenizer.json").write_text(json.dumps(backend))
    settings = json.loads((blind / "tokenizer" / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (blind / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    for shards, source, flags, sentence in (
        (scored, "parquet", ["--mask-ratio", 0], "--mask-ratio 0 is out of range; use more than 0"),
        (scored, "parquet", ["--mask-ratio", 1.2], "--mask-ratio 1.2 is out of range; use more than 0"),
        (scored, "random", ["--mask-by", "surprisal"], "--mask-by needs scores, and --(entropy|mask)-source random"),
        (scored, "parquet", ["--mask-by", "entropy", "--hard-share", 0], "--mask-by has no effect with --hard-share 0"),
        (tokens, "parquet", ["--mask-by", "surprisal"], "has no scores"),
        (blind, "random", ["--mask-unit", "word"], "do not mark which of them continue a word"),
    ):
        with pytest.raises(UsageError, match=sentence) as caught:
            train_here(shards, tmp_path / "out", "--entropy-source", source, *flags)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
        with pytest.raises(UsageError, match=sentence) as caught:
            score_here(shards, work / "teacher", tmp_path / "out", "--mask-source", source, *flags)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--mask-by excess needs the student's own loss"):
        train_here(scored, tmp_path / "out", *PARQUET, "--mask-by", "excess")
    with pytest.raises(UsageError, match="--mask-unit: invalid choice: 'letter'"):
        train_here(scored, tmp_path / "out", *RANDOM, "--mask-unit", "letter")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (PARQUET, "has no scores"),
        ([*RANDOM, "--mask-temperature", 1], "--mask-temperature needs scores, and"),
        ([*RANDOM, "--hard-share", 0], "--hard-share needs scores, and --entropy-source random"),
        ([*RANDOM, "--mask-warmup", 0.1], "--mask-warmup needs scores"),
        ([*RANDOM, "--mask-ramp", 0], "--mask-ramp needs scores"),
        ([*RANDOM, "--recipe", "default"], "--recipe needs scores, and"),
        (
            [*RANDOM, "--predict-ratio", 0.1, "--predict-by", "entropy"],
            "--predict-by needs scores, .*use --entropy-source parquet --hard-share 0",
        ),
        ([*RANDOM, "--predict-by", "random"], "set --predict-ratio below the mask ratio"),
        ([*SELF, "--hard-share", 1.1], "--hard-share 1.1 is out of range; use at least 0 and at most 1"),
        ([*SELF, "--hard-share=-0.1"], "--hard-share -0.1 is out of range; use at least 0 and at most 1"),
        ([*SELF, "--mask-warmup", 1], "--mask-warmup 1 is out of range; use at least 0 and less than 1"),
        ([*SELF, "--mask-warmup", 0.8], "--mask-ramp 0.3 is out of range; .* at most 1 - warm-up = 0.2, a share"),
        ([*SELF, "--mask-ramp", 5], "--mask-ramp 5 is out of range; use at least 0 and at most 1"),
        ([*SELF, "--mask-temperature", "inf"], "--mask-temperature inf is out of range; .* a hard share of 0"),
        ([*SELF, "--hard-share", 0, "--mask-ramp", 0.1], "--mask-ramp has no effect with"),
        ([*SELF, "--predict-ratio", 0.4], "--predict-ratio 0.4 is out of range; .* at most the mask ratio 0.3"),
        ([*SELF, "--predict-by", "entropy"], "--predict-by chooses among the masked tokens"),
        ([*SELF, "--mask-by", "excess"], "--mask-by excess needs the surprisal of a reference, but .* has no scores"),
        (
            [*SELF, "--predict-ratio", 0.1, "--predict-by", "excess"],
            "--predict-by excess needs the surprisal of a reference, but .* has no scores",
        ),
        (
            [*SELF, "--recipe", "paper", "--hard-share", 0.3],
            "--hard-share 0.3 contradicts --recipe paper, which sets 1",
        ),
        ([*SELF, "--recipe", "paper", "--predict-ratio", 0.05], "--predict-ratio contradicts --recipe paper"),
        ([*SELF, "--recipe", "paper", "--self-refresh", "means"], "--self-refresh means contradicts --recipe paper"),
        ([*SELF, "--predict-ratio", 0.3, "--predict-by", "entropy"], "set --predict-ratio below the mask ratio"),
        ([*RANDOM, "--self-refresh", "step"], "--self-refresh has no effect without --entropy-source self"),
    ],
)
def test_mistakes_in_a_run_are_one_sentence(tokens: Path, tmp_path: Path, flags: list[object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        train_here(tokens, tmp_path / "out", *STEPS, *flags)
    assert "\n" not in str(caught.value)
