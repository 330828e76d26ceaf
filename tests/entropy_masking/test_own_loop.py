"""The parts of train/ in other people's loops: docs/own-loop.md as it stands there, and the collator."""

import math
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from harness import ROOT
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, TrainerState

from entropy_masking.masking.collator import EntropyMaskingCollator
from entropy_masking.masking.masker import IGNORED_LABEL
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED
from entropy_masking.shards.manifests import read_manifest
from entropy_masking.shards.parquet import TOP_K_COLUMNS
from entropy_masking.shards.read import masker_of, read_rows, to_tensors

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-loop.md").read_text(), re.S)


@pytest.fixture
def run_block(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a block of the document where `runs/scored` is; returns its variables."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "scored").symlink_to(scored)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(number: int) -> dict[str, Any]:
        variables: dict[str, Any] = {}
        torch.manual_seed(0)
        exec(BLOCKS[number], variables)
        return variables

    return run


def test_the_document_has_an_example_of_each() -> None:
    assert len(BLOCKS) == 3
    for block, part in zip(BLOCKS, ("masker(", "distillation(", "EntropyMaskingCollator("), strict=True):
        assert part in block


def test_masking_plain_tensors(run_block: Any, capsys: pytest.CaptureFixture) -> None:
    found = run_block(0)
    positions_BK, ids_BL = found["masked"]["positions_BP"], found["ids_BL"]
    assert positions_BK.shape == (2, 2) and (positions_BK[1] == IGNORED).sum() == 1
    expected = ids_BL.gather(1, positions_BK.clamp_min(0)).masked_fill(positions_BK == IGNORED, IGNORED_LABEL)
    assert torch.equal(found["masked"]["labels_BP"], expected)
    assert str(positions_BK) in capsys.readouterr().out


def test_a_batch_without_what_its_policy_reads_is_refused(run_block: Any) -> None:
    example = run_block(0)
    masker, batch = example["masker"], example["batch"]
    for policy, lacking in (
        (MaskPolicy(by="surprisal"), "surprisal to mask by; add it, or mask at random"),
        (MaskPolicy(by="excess"), "excess to mask by"),
        (MaskPolicy(warmup=0.3), "progress for a warm-up or a ramp; add it, or set both to 0"),
        (MaskPolicy(ramp=0.3), "progress for a warm-up or a ramp"),
        (MaskPolicy(predict_ratio=0.1, predict_by="excess"), "reference to predict by excess"),
    ):
        with pytest.raises(ValueError, match=f"the batch has no {lacking}"):
            masker(batch, policy)
    progress_B = torch.zeros(2)
    assert "labels_BP" in masker(batch | {"progress": progress_B}, MaskPolicy(warmup=0.3))
    assert "labels_BP" in masker(batch, MaskPolicy.random(warmup=0.3, by="excess"))


def test_distilling(run_block: Any, scored: Path) -> None:
    """The loop's last batch holds what the shards say of the positions that the trainer's own loader would hide."""
    found = run_block(1)
    assert math.isfinite(float(found["loss"].detach())) and float(found["kl_N"].detach().mean()) > 0
    manifest = read_manifest(str(scored))
    raw: dict[str, list[torch.Tensor]] = {}
    for entry in manifest.shards:
        for name, tensor in to_tensors(read_rows(manifest, entry, ["entropy", *TOP_K_COLUMNS])).items():
            raw.setdefault(name, []).append(tensor)
    rows = {name: torch.cat(tensors) for name, tensors in raw.items()}
    expected = masker_of(manifest)(rows | {"epoch": torch.zeros_like(rows["sequence_id"])}, MaskPolicy())
    order = {sequence: row for row, sequence in enumerate(rows["sequence_id"].tolist())}
    where = torch.tensor([order[sequence] for sequence in found["batch"]["sequence_id"].tolist()])
    for name in ("input_ids", "positions_BP", "labels_BP", "teacher_ids_BPT", "teacher_logprobs_BPT"):
        torch.testing.assert_close(found["masked"][name], expected[name][where], equal_nan=True)


def test_the_stock_trainer(run_block: Any) -> None:
    trainer = run_block(2)["trainer"]
    assert trainer.state.global_step == 2
    assert all(math.isfinite(entry["train_loss"]) for entry in trainer.state.log_history if "train_loss" in entry)


# --- the collator ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(work: Path) -> Any:
    return AutoTokenizer.from_pretrained(work / "tokenizer")


def rows_of(tokenizer: Any, count: int = 24) -> list[dict[str, Any]]:
    """Rows of 5 to 60 tokens; every third without special tokens at its ends."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(count):
        length = int(random.integers(5, 60))
        ids = random.integers(5, len(tokenizer), length).tolist()
        if number % 3:
            ids = [tokenizer.cls_token_id, *ids[1:-1], tokenizer.sep_token_id]
        entropy = (8 * random.random(length)).tolist()
        rows.append({"input_ids": ids, "entropy": entropy, "sequence_id": number})
    return rows


def hidden(batch: dict[str, torch.Tensor]) -> list[dict[int, int]]:
    """Position → label, row by row."""
    return [
        {position: label for position, label in enumerate(row) if label != IGNORED_LABEL}
        for row in batch["labels"].tolist()
    ]


@pytest.mark.parametrize("unit", ["token", "word"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"hard_share": 0.4}, {"hard_share": 0.0}])
def test_a_row_is_masked_alike_beside_any_other(tokenizer: Any, unit: str, settings: dict[str, float]) -> None:
    rows = rows_of(tokenizer)
    collator = EntropyMaskingCollator(tokenizer, MaskPolicy.paper(**settings, unit=unit), pad_to_multiple_of=8)
    batch = collator(rows)
    shape = (len(rows), -(-max(len(row["input_ids"]) for row in rows) // 8) * 8)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert all(tensor.shape == shape and tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    special = set(tokenizer.all_special_ids)
    for number, (row, labels) in enumerate(zip(rows, hidden(batch), strict=True)):
        candidates = [p for p, token in enumerate(row["input_ids"]) if token not in special]
        assert len(labels) == max(1, round(0.15 * len(candidates)))
        assert all(row["input_ids"][position] == label for position, label in labels.items())
        inputs = batch["input_ids"][number, : len(row["input_ids"])].tolist()
        assert all(inputs[p] == token for p, token in enumerate(row["input_ids"]) if p not in labels)
        alone = collator([row])
        assert hidden(alone) == [labels]
        assert alone["input_ids"][0, : len(inputs)].tolist() == inputs
        if not settings and unit == "token":
            highest = sorted(candidates, key=lambda p: -row["entropy"][p])[: len(labels)]
            assert set(labels) == set(highest)


def test_rows_in_every_format_with_an_id_or_known_by_their_tokens(tokenizer: Any) -> None:
    collator = EntropyMaskingCollator(tokenizer, MaskPolicy.paper(temperature=1.0))
    rows = rows_of(tokenizer)
    nameless = datasets.Dataset.from_list(rows).remove_columns("sequence_id")
    expected = collator(list(nameless))
    assert hidden(expected) != hidden(collator(rows))
    for kind in ("numpy", "torch"):
        found = collator(list(nameless.with_format(kind)))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    loader = DataLoader(nameless, batch_size=len(rows), collate_fn=collator, num_workers=1)
    assert torch.equal(next(iter(loader))["labels"], expected["labels"])


def test_it_follows_the_epochs_as_a_callback(tokenizer: Any) -> None:
    collator = EntropyMaskingCollator(tokenizer, MaskPolicy.random())
    rows = rows_of(tokenizer)
    by_epoch = []
    for epoch in (0.0, 1.0, 1.4):
        collator.on_epoch_begin(None, TrainerState(epoch=epoch), None)
        by_epoch.append(hidden(collator(rows)))
    assert collator.epoch == 1 and by_epoch[0] != by_epoch[1] == by_epoch[2]


def test_by_surprisal(tokenizer: Any) -> None:
    rows = rows_of(tokenizer)
    by_entropy = EntropyMaskingCollator(tokenizer)(rows)
    renamed = [{"surprisal": row["entropy"]} | {n: row[n] for n in ("input_ids", "sequence_id")} for row in rows]
    collator = EntropyMaskingCollator(tokenizer, MaskPolicy(by="surprisal"))
    assert torch.equal(collator(renamed)["labels"], by_entropy["labels"])
    with pytest.raises(ValueError, match=r"no surprisal, only input_ids, entropy, sequence_id; .*remove_unused"):
        collator(rows)
    with pytest.raises(ValueError, match=r"a row has \d+ tokens and 2 numbers of surprisal"):
        collator([renamed[0] | {"surprisal": [1.0, 2.0]}])
    with pytest.raises(ValueError, match=r"set the policy's warmup and ramp to 0"):
        EntropyMaskingCollator(tokenizer, MaskPolicy(warmup=0.3))
    with pytest.raises(ValueError, match="excess needs the student's loss, which a collator does not know"):
        EntropyMaskingCollator(tokenizer, MaskPolicy(by="excess"))
    chosen = MaskPolicy.random(ratio=0.5, predict_ratio=0.1, predict_by="entropy")
    labels_BL = EntropyMaskingCollator(tokenizer, chosen)(rows)["labels"]
    few = EntropyMaskingCollator(tokenizer, MaskPolicy.random(ratio=0.1))(rows)["labels"]
    assert torch.equal((labels_BL != -100).sum(1), (few != -100).sum(1)), "a tenth is predicted, of a half"
    uniform = EntropyMaskingCollator(tokenizer, MaskPolicy.random())
    assert hidden(uniform([{"input_ids": row["input_ids"]} for row in rows]))


def test_a_tokenizer_without_a_mask_is_refused(work: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask"):
        EntropyMaskingCollator(tokenizer)
