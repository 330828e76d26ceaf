"""Students: the head on masked positions only gives the loss and gradients of the whole head, for any architecture."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_scoring_maths import ARCHITECTURES, LENGTH, PAD, SMALL, VOCAB, sequences
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AlbertConfig, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, DebertaV2Config, EsmConfig
from transformers.modeling_outputs import MaskedLMOutput

import train.run
from pipeline.cli import UsageError
from pipeline.entropy import entropy
from pipeline.manifests import read_manifest
from train.distill import distillation
from train.masking import IGNORED, Masker, MaskPolicy
from train.student import student_scores, with_masked_positions

ROWS, TOP = 6, 5
OTHERS = {
    "albert": AlbertConfig(**SMALL, embedding_size=16, intermediate_size=64, max_position_embeddings=LENGTH),
    "deberta-v2": DebertaV2Config(
        **SMALL,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    ),
    # adds a bias after the projection, outside of it
    "esm": EsmConfig(
        **SMALL,
        intermediate_size=64,
        max_position_embeddings=LENGTH + 2,
        mask_token_id=4,
        token_dropout=False,
        position_embedding_type="absolute",
    ),
}


class MixingHead(nn.Module):
    """A head that looks at the whole sequence."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden_BLH: Tensor) -> Tensor:
        return self.head(hidden_BLH + hidden_BLH.mean(1, keepdim=True))


class Mixing(BertForMaskedLM):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = MixingHead(self.cls)

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.head.predictions.decoder


def masked_batch(distil: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    raw = {
        "input_ids": torch.from_numpy(sequences(ROWS).astype("int64")),
        "sequence_id": torch.arange(ROWS),
        "epoch": torch.zeros(ROWS, dtype=torch.long),
        "entropy": torch.rand(ROWS, LENGTH, generator=generator),
    }
    if distil:
        log_p = torch.randn(ROWS, LENGTH, VOCAB, generator=generator).log_softmax(-1).topk(TOP)
        lse = torch.rand(ROWS, LENGTH, generator=generator)
        raw |= {"topk_ids": log_p.indices, "topk_logprobs": log_p.values, "temperature_lse": lse}
    masker = Masker(vocab_size=VOCAB, special_token_ids=[0, 1, 2, 3, 4], mask_id=4, pad_id=PAD)
    batch = masker(raw, MaskPolicy(ratio=0.3))
    assert (batch["positions_BK"] == IGNORED).any(), "a short row is part of the test"
    return batch


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(3)
    config = (ARCHITECTURES | OTHERS).get(name, ARCHITECTURES["bert"])
    model = Mixing(config) if name == "mixing" else AutoModelForMaskedLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(2)
        if parameter.shape == (VOCAB,):
            parameter.data.normal_()
    return model.eval()


@pytest.mark.parametrize(
    "name, alpha, T",
    [
        *((name, 0.4, 2.0) for name in (*ARCHITECTURES, *OTHERS, "mixing")),
        *((name, *loss) for name in ("bert", "mixing") for loss in ((0.0, 1.0), (0.4, 1.0))),
    ],
)
def test_sparse_head_equals_full_head(name: str, alpha: float, T: float) -> None:
    plain = model_of(name)
    sparse = with_masked_positions(copy.deepcopy(plain))
    assert sparse.sparse_head == (name != "mixing")
    batch = masked_batch(distil=True)
    if T == 1:
        del batch["temperature_lse_BK"]
    found = sparse(**batch, distill_weight=alpha, distill_temperature=T)
    unlabelled = {name: batch[name] for name in ("input_ids", "attention_mask", "positions_BK")}
    assert sparse(**unlabelled)["logits"].shape == (ROWS, batch["positions_BK"].shape[1], VOCAB)

    logits_BLV = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    where_BK = batch["positions_BK"].clamp_min(0)
    logits_NV = logits_BLV[torch.arange(ROWS)[:, None], where_BK].flatten(0, 1)
    labels_N = batch["labels_BK"].flatten()
    count = labels_N.numel()
    expected = F.cross_entropy(logits_NV, labels_N, reduction="sum") / count
    said = batch["teacher_ids_BKT"].flatten(0, 1), batch["teacher_logprobs_BKT"].flatten(0, 1)
    lse_N = batch["temperature_lse_BK"].flatten() if T != 1 else None
    kl_N = distillation(logits_NV, *said, T, lse_N)
    expected = (1 - alpha) * expected + alpha * kl_N[labels_N >= 0].sum() / count
    torch.testing.assert_close(found["loss"], expected, atol=1e-5, rtol=0)

    found["loss"].backward()
    expected.backward()
    for (label, ours), theirs in zip(sparse.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=label)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS, "mixing"])
def test_without_positions_it_is_the_model_itself(name: str) -> None:
    plain = model_of(name)
    sparse = with_masked_positions(copy.deepcopy(plain))
    batch = masked_batch()
    sparse(**batch)
    ids, attention = batch["input_ids"], batch["attention_mask"]
    expected = plain(input_ids=ids, attention_mask=attention).logits
    assert torch.equal(sparse(input_ids=ids, attention_mask=attention).logits, expected)
    assert type(sparse).__name__ == type(plain).__name__ and isinstance(sparse, type(plain))
    assert list(sparse.state_dict()) == list(plain.state_dict())


def test_a_failed_forward_leaves_no_positions_behind() -> None:
    sparse = with_masked_positions(model_of("bert"))
    batch = masked_batch()
    with pytest.raises(IndexError):
        sparse(**(batch | {"input_ids": batch["input_ids"] + VOCAB}))
    assert sparse(input_ids=batch["input_ids"]).logits.shape == (ROWS, LENGTH, VOCAB)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS, "mixing"])
@pytest.mark.parametrize("positions_at_a_time", [1, 7, 10_000])
def test_student_scores_are_those_of_the_plain_forward(
    monkeypatch: pytest.MonkeyPatch, name: str, positions_at_a_time: int
) -> None:
    monkeypatch.setattr("train.student.LOGITS_PER_CHUNK", {"cpu": positions_at_a_time * VOCAB})
    plain = model_of(name)
    student = with_masked_positions(copy.deepcopy(plain)).train()
    ids_BL = torch.from_numpy(sequences(ROWS).astype("int64"))
    attention_BL = (ids_BL != PAD).long()
    found = student_scores(student, ids_BL, attention_BL)
    logits = plain.double()(input_ids=ids_BL, attention_mask=attention_BL).logits
    real = attention_BL.bool()
    surprisal_BL = -logits.log_softmax(-1).gather(-1, ids_BL[:, :, None]).squeeze(-1)
    torch.testing.assert_close(found["entropy"][real].double(), entropy(logits)[real], atol=1e-4, rtol=0)
    torch.testing.assert_close(found["surprisal"][real].double(), surprisal_BL[real], atol=1e-4, rtol=0)
    assert student.training and not found["entropy"].requires_grad


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS, "mixing"])
def test_scoring_beside_training_changes_neither_loss_nor_gradients(name: str) -> None:
    alone = with_masked_positions(model_of(name))
    beside = with_masked_positions(model_of(name))
    batch = masked_batch()
    scored_BR = torch.tensor([3, 5, 9]).expand(ROWS, 3)
    expected, found = alone(**batch), beside(**batch, scored_BR=scored_BR)
    torch.testing.assert_close(found["loss"], expected["loss"], atol=1e-6, rtol=0)
    full = student_scores(with_masked_positions(model_of(name)), batch["input_ids"], batch["attention_mask"])
    for score in ("entropy", "surprisal"):
        torch.testing.assert_close(found[score], full[score].gather(1, scored_BR), atol=1e-5, rtol=1e-5)
    expected["loss"].backward()
    found["loss"].backward()
    for (label, ours), theirs in zip(beside.named_parameters(), alone.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5, msg=label)


def test_a_head_that_needs_whole_sequences_is_told(capsys: pytest.CaptureFixture) -> None:
    with_masked_positions(model_of("bert").train())
    assert capsys.readouterr().err == ""
    plain = model_of("mixing").train()
    state = torch.get_rng_state()
    student = with_masked_positions(plain)
    message = capsys.readouterr().err
    assert message == "the head of Mixing needs whole sequences: it runs at every position, masked or not\n"
    assert student.training and torch.equal(torch.get_rng_state(), state)


def test_a_model_without_logits_for_each_token_is_refused() -> None:
    class Pooled(BertForMaskedLM):
        def forward(self, *args: Any, **others: Any) -> MaskedLMOutput:
            return MaskedLMOutput(logits=super().forward(*args, **others).logits.mean(1))

    with pytest.raises(UsageError, match=r"Pooled gives no logits for each token .*\[2, 211\]"):
        with_masked_positions(Pooled(ARCHITECTURES["bert"]))


# --- through the command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["electra", "modernbert", "deberta-v2", "roberta"])
def test_other_architectures_train(scored: Path, tmp_path: Path, name: str) -> None:
    """From a configuration as people have it: made for another vocabulary's padding."""
    manifest = read_manifest(str(scored))
    config = (ARCHITECTURES | OTHERS)[name].to_dict() | {"vocab_size": manifest.vocab_size, "pad_token_id": 1}
    config["max_position_embeddings"] = manifest.sequence_length + 1  # RoBERTa's begin behind the padding token's
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--entropy-source", "self", "--self-warmup-steps", 1, "--model", tmp_path / "config.json", "--seed", 3]
    sizes = ["--max-steps", 2, "--per-device-train-batch-size", 8, "--eval-fraction", 0.2, "--bf16", "false"]
    train.run.main([str(flag) for flag in ("--shards", scored, "--output-dir", tmp_path / "out", *flags, *sizes)])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 2 and 0 < summary["eval_loss"] < 2 * torch.tensor(manifest.vocab_size).log()
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert type(model) is type(model_of(name))
    assert model.config.pad_token_id == manifest.special_ids["pad"]
