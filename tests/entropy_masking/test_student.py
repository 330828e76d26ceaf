"""Students: the head on masked positions only gives the loss and gradients of the whole head, for any architecture."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import ARCHITECTURES, LENGTH, PAD, SMALL, VOCAB, sequences
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F
from transformers import AlbertConfig, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, DebertaV2Config, EsmConfig
from transformers.modeling_outputs import MaskedLMOutput

import train.run
from entropy_masking.errors import UsageError
from entropy_masking.losses import distillation
from entropy_masking.masking.masker import Masker
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED
from entropy_masking.models import checkpoints
from entropy_masking.models.masked_positions import MEASURED_EVERY, student_scores, with_masked_positions
from entropy_masking.shards.manifests import read_manifest
from train.student import SHORT, build_student, choose_attention, model_identity

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
    batch = masker(raw, MaskPolicy.paper(ratio=0.3))
    assert (batch["positions_BP"] == IGNORED).any(), "a short row is part of the test"
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
    sparse = with_masked_positions(copy.deepcopy(plain), LENGTH)
    assert sparse.masked_lm.selective == (name != "mixing")
    batch = masked_batch(distil=True)
    if T == 1:
        del batch["temperature_lse_BP"]
    found = sparse(**batch, distill_weight=alpha, distill_temperature=T)
    unlabelled = {name: batch[name] for name in ("input_ids", "attention_mask", "positions_BP")}
    assert sparse(**unlabelled)["logits"].shape == (ROWS, batch["positions_BP"].shape[1], VOCAB)

    logits_BLV = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    where_BK = batch["positions_BP"].clamp_min(0)
    logits_NV = logits_BLV[torch.arange(ROWS)[:, None], where_BK].flatten(0, 1)
    labels_N = batch["labels_BP"].flatten()
    count = labels_N.numel()
    expected = F.cross_entropy(logits_NV, labels_N, reduction="sum") / count
    said = batch["teacher_ids_BPT"].flatten(0, 1), batch["teacher_logprobs_BPT"].flatten(0, 1)
    lse_N = batch["temperature_lse_BP"].flatten() if T != 1 else None
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
    sparse = with_masked_positions(copy.deepcopy(plain), LENGTH)
    batch = masked_batch()
    sparse(**batch)
    ids, attention = batch["input_ids"], batch["attention_mask"]
    expected = plain(input_ids=ids, attention_mask=attention).logits
    assert torch.equal(sparse(input_ids=ids, attention_mask=attention).logits, expected)
    assert type(sparse).__name__ == type(plain).__name__ and isinstance(sparse, type(plain))
    assert list(sparse.state_dict()) == list(plain.state_dict())


def test_a_failed_forward_leaves_no_positions_behind() -> None:
    sparse = with_masked_positions(model_of("bert"), LENGTH)
    batch = masked_batch()
    with pytest.raises(IndexError):
        sparse(**(batch | {"input_ids": batch["input_ids"] + VOCAB}))
    assert sparse(input_ids=batch["input_ids"]).logits.shape == (ROWS, LENGTH, VOCAB)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS, "mixing"])
@pytest.mark.parametrize("positions_at_a_time", [1, 7, 10_000])
def test_student_scores_are_those_of_the_plain_forward(
    monkeypatch: pytest.MonkeyPatch, name: str, positions_at_a_time: int
) -> None:
    monkeypatch.setattr(
        "entropy_masking.models.masked_positions.LOGITS_PER_CHUNK", {"cpu": positions_at_a_time * VOCAB}
    )
    plain = model_of(name)
    student = with_masked_positions(copy.deepcopy(plain), LENGTH).train()
    ids_BL = torch.from_numpy(sequences(ROWS).astype("int64"))
    attention_BL = (ids_BL != PAD).long()
    found = student_scores(student, ids_BL, attention_BL)
    logits = plain.double()(input_ids=ids_BL, attention_mask=attention_BL).logits
    real = attention_BL.bool()
    surprisal_BL = -logits.log_softmax(-1).gather(-1, ids_BL[:, :, None]).squeeze(-1)
    entropy_BL = Categorical(logits=logits).entropy()
    torch.testing.assert_close(found["entropy"][real].double(), entropy_BL[real], atol=1e-4, rtol=0)
    torch.testing.assert_close(found["surprisal"][real].double(), surprisal_BL[real], atol=1e-4, rtol=0)
    assert student.training and not found["entropy"].requires_grad


def choosing_batch() -> dict[str, torch.Tensor]:
    """All masked positions, some of which the student is to predict, with what a teacher and a reference say there."""
    batch = masked_batch(distil=True)
    real_B1 = (batch["positions_BP"] != IGNORED).sum(1, keepdim=True)
    generator = torch.Generator().manual_seed(6)
    reference_BP = 8 * torch.rand(batch["positions_BP"].shape, generator=generator)
    return batch | {"predicted_B1": (real_B1 / 2).round().clamp_min(1), "reference_BP": reference_BP}


def said_by(plain: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, entropy and surprisal at the masked positions, from the full head."""
    logits_BLV = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits_BKV = logits_BLV[torch.arange(ROWS)[:, None], batch["positions_BP"].clamp_min(0)]
    log_q_BKV = logits_BKV.detach().double().log_softmax(-1)
    surprisal_BK = -log_q_BKV.gather(-1, batch["labels_BP"].clamp_min(0)[..., None]).squeeze(-1)
    return logits_BKV, -(log_q_BKV.exp() * log_q_BKV).sum(-1), surprisal_BK


def highest(score_K: Tensor, real_K: Tensor, count: int) -> list[int]:
    places = sorted(real_K.nonzero().flatten().tolist(), key=lambda place: -float(score_K[place]))
    return sorted(places[:count])


@pytest.mark.parametrize("by", ["excess", "entropy", "surprisal"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "esm", "mixing"])
def test_the_student_predicts_what_it_chooses(name: str, by: str) -> None:
    """Positions, loss and gradients are those of the full head at the highest scores alone."""
    plain = model_of(name)
    student, batch, alpha, T = with_masked_positions(copy.deepcopy(plain), LENGTH), choosing_batch(), 0.4, 2.0
    assert (student.masked_lm.projection is None) == (name in ("esm", "mixing"))
    P = int(batch["predicted_B1"].max())
    losses = {"distill_weight": alpha, "distill_temperature": T}
    found = student(**batch, **losses, predict_by=by, predictions=P, measure=True)
    logits_BKV, entropy_BK, surprisal_BK = said_by(plain, batch)
    real_BK = batch["labels_BP"] >= 0
    for score, expected_BK in (("entropy", entropy_BK), ("surprisal", surprisal_BK)):
        torch.testing.assert_close(found[score].double()[real_BK], expected_BK[real_BK], atol=1e-4, rtol=0)
    assert torch.equal(found["tokens"], batch["labels_BP"]) and not found["entropy"].requires_grad
    # as it says them itself: some differ by less than they are rounded
    score_BK = found["entropy" if by == "entropy" else "surprisal"] - (by == "excess") * batch["reference_BP"]
    expected = torch.zeros(())
    for row in range(ROWS):
        where = highest(score_BK[row], real_BK[row], int(batch["predicted_B1"][row]))
        logits_NV, labels_N = logits_BKV[row, where], batch["labels_BP"][row, where]
        said = (batch[n][row, where] for n in ("teacher_ids_BPT", "teacher_logprobs_BPT"))
        kl_N = distillation(logits_NV, *said, T, batch["temperature_lse_BP"][row, where])
        expected = expected + (1 - alpha) * F.cross_entropy(logits_NV, labels_N, reduction="sum") + alpha * kl_N.sum()
    expected = expected / (ROWS * P)
    torch.testing.assert_close(found["loss"], expected, atol=1e-5, rtol=0)
    found["loss"].backward()
    expected.backward()
    for (label, ours), theirs in zip(student.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=label)


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.01, 0.4, 1.0])
@pytest.mark.parametrize("name", ["bert", "modernbert", "mixing"])
def test_a_share_of_the_predicted_positions_is_distilled(name: str, share: float, T: float) -> None:
    """Those of the student's highest entropies, at least one a row; the others have the cross-entropy alone."""
    plain = model_of(name)
    student, batch, alpha = with_masked_positions(copy.deepcopy(plain), LENGTH), masked_batch(distil=True), 0.4
    if T == 1:
        del batch["temperature_lse_BP"]
    losses = {"distill_weight": alpha, "distill_temperature": T, "distill_share": share}
    found = student(**batch, **losses)["loss"]
    logits_BKV, entropy_BK, _ = said_by(plain, batch)
    real_BK = batch["labels_BP"] >= 0
    total, distilled = torch.zeros(()), 0
    for row in range(ROWS):
        taught = highest(entropy_BK[row], real_BK[row], max(1, round(share * int(real_BK[row].sum()))))
        distilled += len(taught)
        for place in real_BK[row].nonzero().flatten().tolist():
            logits_1V = logits_BKV[row, place][None]
            ce = F.cross_entropy(logits_1V, batch["labels_BP"][row, place][None])
            if place in taught:
                said = (batch[n][row, place][None] for n in ("teacher_ids_BPT", "teacher_logprobs_BPT"))
                lse_1 = batch["temperature_lse_BP"][row, place][None] if T != 1 else None
                ce = (1 - alpha) * ce + alpha * distillation(logits_1V, *said, T, lse_1)[0]
            total = total + ce
    assert distilled >= ROWS and (distilled < real_BK.sum()) == (share < 1)
    expected = total / batch["labels_BP"].numel()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found.backward()
    expected.backward()
    for (label, ours), theirs in zip(student.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=label)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS, "mixing"])
def test_measuring_beside_training_changes_neither_loss_nor_gradients(name: str) -> None:
    alone, beside, plain = (with_masked_positions(model_of(name), LENGTH) for _ in range(3))
    batch = masked_batch()
    expected, found = alone(**batch), beside(**batch, measure=True)
    assert torch.equal(found["loss"], expected["loss"])
    _, entropy_BK, surprisal_BK = said_by(plain, batch)
    assert torch.equal(found["tokens"], batch["labels_BP"][:, ::MEASURED_EVERY])
    for score, scores_BK in (("entropy", entropy_BK), ("surprisal", surprisal_BK)):
        real_BM = found["tokens"] >= 0
        expected_BM = scores_BK[:, ::MEASURED_EVERY]
        torch.testing.assert_close(found[score].double()[real_BM], expected_BM[real_BM], atol=1e-4, rtol=0)
    expected["loss"].backward()
    found["loss"].backward()
    for ours, theirs in zip(beside.parameters(), alone.parameters(), strict=True):
        assert theirs.grad is None or torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS, "mixing"])
def test_plain_attention_changes_rounding_only(name: str) -> None:
    student = with_masked_positions(model_of(name), LENGTH)
    ids_BL = torch.from_numpy(sequences(ROWS).astype("int64"))
    kept_BL = ids_BL != PAD
    before_BLV = student(input_ids=ids_BL, attention_mask=kept_BL.long())["logits"]
    fused = student.config._attn_implementation
    choose_attention(student, SHORT + 1)
    assert student.config._attn_implementation == fused
    choose_attention(student, LENGTH)
    assert student.config._attn_implementation == "eager"
    after_BLV = student(input_ids=ids_BL, attention_mask=kept_BL.long())["logits"]
    assert torch.allclose(before_BLV[kept_BL], after_BLV[kept_BL], atol=1e-4)


def test_the_trial_leaves_a_model_as_it_was() -> None:
    for name in ("bert", "mixing"):
        plain = model_of(name).train()
        before, state = copy.deepcopy(plain.state_dict()), torch.get_rng_state()
        student = with_masked_positions(plain, LENGTH)
        assert student.training and torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(student.state_dict()[key], value) for key, value in before.items())


def test_a_head_that_needs_whole_sequences_is_told(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    manifest = read_manifest(str(scored))
    config = BertConfig(**SMALL | {"vocab_size": manifest.vocab_size}, intermediate_size=64)
    config.save_pretrained(tmp_path)
    build_student(str(tmp_path / "config.json"), manifest, 0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(AutoModelForMaskedLM, "from_config", lambda config, trust_remote_code: Mixing(config))
    build_student(str(tmp_path / "config.json"), manifest, 0)
    message = capsys.readouterr().err
    assert message == "the head of Mixing needs whole sequences, so it runs at every position: training is slower\n"


def test_a_model_without_logits_for_each_token_is_refused() -> None:
    class Pooled(BertForMaskedLM):
        def forward(self, *args: Any, **others: Any) -> MaskedLMOutput:
            return MaskedLMOutput(logits=super().forward(*args, **others).logits.mean(1))

    with pytest.raises(UsageError, match=r"Pooled does not give logits for each token .*\[2, 211\]"):
        with_masked_positions(Pooled(ARCHITECTURES["bert"]), LENGTH)


# --- through the command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["electra", "modernbert", "deberta-v2", "roberta"])
def test_other_architectures_train(scored: Path, tmp_path: Path, name: str) -> None:
    """From a configuration as people have it: made for another vocabulary's padding."""
    manifest = read_manifest(str(scored))
    config = (ARCHITECTURES | OTHERS)[name].to_dict() | {"vocab_size": manifest.vocab_size, "pad_token_id": 1}
    config["max_position_embeddings"] = manifest.sequence_length + 1  # RoBERTa's begin behind the padding token's
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--entropy-source", "self", "--self-refresh", "step", "--model", tmp_path / "config.json", "--seed", 3]
    flags += ["--predict-ratio", 0.1, "--predict-by", "excess", "--mask-ramp", 0]
    sizes = ["--max-steps", 2, "--per-device-train-batch-size", 8, "--eval-fraction", 0.2, "--bf16", "false"]
    train.run.main([str(flag) for flag in ("--shards", scored, "--output-dir", tmp_path / "out", *flags, *sizes)])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 2 and 0 < summary["eval_loss"] < 2 * torch.tensor(manifest.vocab_size).log()
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert type(model) is type(model_of(name))
    assert model.config.pad_token_id == manifest.special_ids["pad"]


def test_a_pickle_checkpoint_is_refused_not_trained_from_random_weights(
    scored: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the Hub, whose pickles are not downloaded: only its configuration arrives."""
    (tmp_path / "config.json").write_bytes((work / "teacher" / "config.json").read_bytes())
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *_, **__: tmp_path)
    build_student(str(tmp_path), read_manifest(str(scored)), 0)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    for name in (str(tmp_path), "some/model"):
        with pytest.raises(UsageError, match=r"has no model weights in safetensors; .* pickle, .*save_pretrained"):
            build_student(name, read_manifest(str(scored)), 0)
        with pytest.raises(UsageError, match="has no model weights in safetensors"):
            model_identity(name)
