"""Distillation of targets: as with the teacher online, variant by variant; targets that do not fit are refused."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from harness import LENGTH, ROOT, TRAIN, run
from in_process import MASKS, PARQUET, RANDOM, SEED, SELF, SMALL, score_here, train_here
from tables import give_up, recommitted, rewrite
from torch.nn import functional as F
from transformers import BertForMaskedLM

from entropy_masking import codes
from entropy_masking.errors import RunError, UsageError
from entropy_masking.masking.masker import IGNORED_LABEL
from entropy_masking.shards import manifests
from entropy_masking.shards.targets import predictions_of, row_groups, rows_of
from train.data import PrepareBatch, TrainingSequences, whole_batch
from train.split import all_rows
from train.trainer import MaskedLMTrainer

ALPHA, TOP_K = 0.5, 8
DISTIL = ["--distill-weight", ALPHA]
VERIFY = [sys.executable, str(ROOT / "pipeline" / "verify.py")]
AT_ONCE = ["--hard-share", 1, "--mask-warmup", 0, "--mask-ramp", 0]


# --- as with the teacher online --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense_targets(sharp: Path, sharp_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets with the whole vocabulary."""
    V = manifests.read_manifest(str(sharp)).vocab_size
    output = tmp_path_factory.mktemp("dense") / "targets"
    return score_here(sharp, sharp_teacher, output, *MASKS, "--top-k", V, "--temperatures", "1,2")


def losses(output: Path, steps: int) -> np.ndarray:
    """The logged loss of every step."""
    state = json.loads((output / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    by_step = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
    assert list(by_step) == list(range(1, steps + 1))
    return np.array(list(by_step.values()))


def logits_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The student's logits at the masked positions [B, P, V], which it returns if there are no labels."""
    return model(**{name: value for name, value in inputs.items() if name != "labels_BP"})["logits"]


class Online:
    """In place of the trainer's loss: the teacher, in memory, on exactly the inputs of the student."""

    def __init__(self, teacher: Path, T: float, top_k: int | None) -> None:
        self.teacher, self.T, self.top_k = BertForMaskedLM.from_pretrained(teacher).eval(), T, top_k

    def __call__(self, trainer: MaskedLMTrainer, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        labels_N = inputs["labels_BP"].flatten()
        logits_NV = logits_of(model, inputs).flatten(0, 1)
        rows_B1, where_BK = torch.arange(len(inputs["input_ids"]))[:, None], inputs["positions_BP"].clamp_min(0)
        with torch.no_grad():
            logits_BLV = self.teacher(inputs["input_ids"], attention_mask=inputs.get("attention_mask")).logits
        teacher_NV = logits_BLV[rows_B1, where_BK].flatten(0, 1)
        log_p_NV, log_q_NV = (teacher_NV / self.T).log_softmax(1), (logits_NV / self.T).log_softmax(1)
        if self.top_k is None:
            kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(1)
        else:
            ids_NK = teacher_NV.topk(self.top_k).indices
            p_NK, q_NK = log_p_NV.gather(1, ids_NK).exp(), log_q_NV.gather(1, ids_NK).exp()
            rest_p_N, rest_q_N = 1 - p_NK.sum(1), 1 - q_NK.sum(1)
            kl_N = (p_NK * (p_NK / q_NK).log()).sum(1) + rest_p_N * (rest_p_N / rest_q_N).log()
        ce_N = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED_LABEL, reduction="none")
        kl_N = kl_N.masked_fill(labels_N == IGNORED_LABEL, 0)
        return ((1 - ALPHA) * ce_N + ALPHA * self.T**2 * kl_N).mean()


@pytest.mark.parametrize("T", [1, 2])
def test_targets_teach_as_the_teacher_online_does(
    sharp: Path,
    sharp_teacher: Path,
    dense_targets: Path,
    sharp_targets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    T: int,
) -> None:
    steps = 100
    flags = [*PARQUET, "--max-steps", steps, "--logging-steps", 1, "--save-steps", steps]
    flags += ["--model", "bert-tiny", "--optim", "adamw_torch", "--learning-rate", 1e-3]  # rounding drifts less
    distil = [*DISTIL, *(["--distill-temperature", T] if T != 1 else [])]
    summary = train_here(sharp, tmp_path / "dense", *flags, "--targets", dense_targets, *distil)
    train_here(sharp, tmp_path / "sparse", *flags, "--targets", sharp_targets, *distil)
    for name, top_k in (("online", None), ("online-sparse", TOP_K)):
        with monkeypatch.context() as patch:
            online = Online(sharp_teacher, T, top_k)
            patch.setattr(MaskedLMTrainer, "compute_loss", lambda *args, online=online, **more: online(*args, **more))
            train_here(sharp, tmp_path / name, *flags, *AT_ONCE, "--mask-temperature", 1)
    dense, sparse, online, online_sparse = (
        losses(tmp_path / name, steps) for name in ("dense", "sparse", "online", "online-sparse")
    )
    np.testing.assert_allclose(dense, online, atol=2e-3, rtol=0)  # log-probabilities are rounded to 8 bits
    np.testing.assert_allclose(sparse, online_sparse, atol=2e-3, rtol=0)
    assert np.abs(sparse - online).max() > 0.01, "the tolerance is far below the effect of truncation"
    assert summary["regime"] == "parquet+kd" and summary["targets"]["variants"] == 4
    read = [manifests.read_manifest(str(sharp)), manifests.read_manifest(str(dense_targets), kind="targets")]
    totals = [manifest.totals for manifest in read]
    assert summary["scoring_seconds"] == pytest.approx(sum(part["worker_seconds"] for part in totals))
    assert summary["scoring_flops"] == sum(part["flops"] for part in totals)


def test_sampled_targets_are_unbiased(
    sharp: Path, sharp_teacher: Path, dense_targets: Path, sharp_targets: Path, tmp_path: Path
) -> None:
    """Over all positions, each token has the same mass as in the whole distributions; the top k leave some out."""
    flags = [*MASKS, "--sample-k", TOP_K]
    sampled = score_here(sharp, sharp_teacher, tmp_path / "sampled", *flags)
    again = score_here(sharp, sharp_teacher, tmp_path / "again", *flags, "--workers", 1, "--cpus-per-worker", 2)
    assert (sampled / "part-00000.parquet").read_bytes() == (again / "part-00000.parquet").read_bytes()
    assert "no faults" in run(*VERIFY, sampled, "--deep")
    masses = []
    for directory in (dense_targets, sampled, sharp_targets):
        manifest = manifests.read_manifest(str(directory), kind="targets")
        mass_V = np.zeros(manifest.vocab_size)
        for entry in manifest.shards:
            table, K = pq.read_table(directory / entry.file), (manifest.masks or {})["positions"]
            predictions = predictions_of(table, K, manifest.top_k, [], manifest.sampled)
            p_NKk = np.nan_to_num(np.exp(predictions["topk_logprobs"]))
            if manifest.sampled:
                np.testing.assert_allclose(p_NKk.sum(-1)[p_NKk.any(-1)], 1, atol=1e-5)
            mass_V += np.bincount(predictions["topk_ids"].ravel(), p_NKk.ravel(), manifest.vocab_size)
        masses.append(mass_V / mass_V.sum())
    exact_V, sampled_V, top_V = masses
    assert np.abs(sampled_V - exact_V).sum() < 0.05 < 0.15 < np.abs(top_V - exact_V).sum()
    summary = train_here(sharp, tmp_path / "out", *PARQUET, "--targets", sampled, *DISTIL, "--max-steps", 2)
    assert summary["regime"] == "parquet+kd" and np.isfinite(summary["train_loss"])


@pytest.mark.parametrize("T", [1, 2])
def test_without_targets_the_scores_of_the_shards_are_distilled(
    sharp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, T: int
) -> None:
    """The loss of the first step by hand, from the files of the shards."""
    batches, outputs = [], []

    def prepare(self: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batches.append(batch | masked_by(self, batch))
        return masked_by(self, batch)

    def compute_loss(trainer: MaskedLMTrainer, model: Any, inputs: dict[str, Any], *args: Any, **more: Any) -> Any:
        outputs.append(logits_of(model, inputs).detach().double())
        return loss_of(trainer, model, inputs, *args, **more)

    masked_by, loss_of = PrepareBatch.__call__, MaskedLMTrainer.compute_loss
    monkeypatch.setattr(PrepareBatch, "__call__", prepare)
    monkeypatch.setattr(MaskedLMTrainer, "compute_loss", compute_loss)
    summary = train_here(sharp, tmp_path / "out", *PARQUET, *DISTIL, "--distill-temperature", T, "--max-steps", 1)
    batch, logits_BKV, manifest = batches[0], outputs[0], manifests.read_manifest(str(sharp))
    total = 0.0
    for row, sequence in enumerate(batch["sequence_id"].tolist()):
        entry = next(entry for entry in manifest.shards if entry.index == sequence >> 32)
        table = pq.read_table(sharp / entry.file).slice(sequence & 0xFFFFFFFF, 1)
        ids_LK = np.array(table["topk_ids"][0].as_py()).reshape(LENGTH, TOP_K)
        log_p_LK = codes.decode(np.array(table["topk_logprobs"][0].as_py()).reshape(LENGTH, TOP_K)).astype(float)
        lse_L = np.array(table["temperature_lse_2"][0].as_py(), float) if T == 2 else np.zeros(LENGTH)
        for place, position in enumerate(batch["positions_BP"][row].tolist()):
            if position >= 0:
                p_K = np.exp(log_p_LK[position] / T - lse_L[position])
                q_V = (logits_BKV[row, place] / T).softmax(0).numpy()
                q_K = q_V[ids_LK[position]]
                kl = (p_K * np.log(p_K / q_K)).sum() + (1 - p_K.sum()) * np.log((1 - p_K.sum()) / (1 - q_K.sum()))
                ce = -float(logits_BKV[row, place].log_softmax(0)[batch["labels_BP"][row, place]])
                total += (1 - ALPHA) * ce + ALPHA * T**2 * kl
    assert summary["train_loss"] == pytest.approx(total / batch["positions_BP"].numel(), abs=1e-5)


# --- epochs and shards -----------------------------------------------------------------------------------------------


def test_epochs_take_the_variants_in_turn(sharp: Path, sharp_teacher: Path, tmp_path: Path) -> None:
    masks = [*MASKS, "--variants", 2, "--mask-seed", 9]
    directory = score_here(sharp, sharp_teacher, tmp_path / "targets", *masks, "--top-k", TOP_K)
    manifest = manifests.read_manifest(str(sharp))
    targets = manifests.read_manifest(str(directory), kind="targets")
    N = manifest.totals["sequences"]
    sequences = TrainingSequences(
        manifest, all_rows(manifest), [], size=3 * N, batch=64, seed=0, prepare=whole_batch, targets=targets
    )
    batch = sequences.__getitems__(list(range(3 * N)))
    assert batch["epoch"].tolist() == [0] * N + [1] * N + [0] * N
    tables = {entry.index: pq.read_table(directory / entry.file) for entry in targets.shards}
    stored = {
        (sequence, variant): (positions, crc32, ids)
        for table in tables.values()
        for sequence, variant, positions, crc32, ids in zip(
            *(table[name].to_pylist() for name in ("sequence_id", "variant", "positions", "input_crc32", "topk_ids")),
            strict=True,
        )
    }
    for row, key in enumerate(zip(batch["sequence_id"].tolist(), batch["epoch"].tolist(), strict=True)):
        positions, crc32, ids = stored[key]
        assert batch["target_positions"][row, : len(positions)].tolist() == positions
        assert batch["input_crc32"][row] == crc32
        assert batch["teacher_ids"][row, : len(positions)].flatten().tolist() == ids
    # through the trainer, which computes its masks: three epochs, with a seed that is not that of the masks
    sizes = ["--per-device-train-batch-size", 64, "--max-steps", 3 * N // 64 + 1]
    summary = train_here(sharp, tmp_path / "out", *PARQUET, "--targets", directory, *DISTIL, *sizes)
    assert summary["flags"]["mask_seed"] == 9 and summary["seed"] == SEED


def test_a_shard_that_was_given_up_has_no_targets(sharp: Path, sharp_teacher: Path, tmp_path: Path) -> None:
    """A run trains without it, and the other shards keep their names."""
    directory, lost = Path(shutil.copytree(sharp, tmp_path / "shards")), "part-00001.parquet"
    give_up(directory, lost)
    manifest = json.loads((directory / "manifest.json").read_text())
    masks = ["--mask-source", "parquet", "--variants", 1]
    targets = score_here(directory, sharp_teacher, tmp_path / "targets", *masks, "--top-k", TOP_K)
    made = manifests.read_manifest(str(targets), kind="targets")
    assert made.failed == {lost: "it hung"}
    assert [entry.file for entry in made.shards] == [entry["file"] for entry in manifest["shards"]]
    train_here(directory, tmp_path / "out", *PARQUET, *DISTIL, "--targets", targets, "--max-steps", 2)
    with pytest.raises(UsageError, match=f"lacks rows for {lost}"):
        train_here(sharp, tmp_path / "more", *PARQUET, *DISTIL, "--targets", targets, "--max-steps", 2)


# --- targets that do not fit -----------------------------------------------------------------------------------------


def changed(targets: Path, directory: Path, name: str, change: Callable[[pa.Array], pa.Array]) -> Path:
    """A copy of targets with another column ``name``. Its manifest fits its files."""
    shutil.copytree(targets, directory, ignore=shutil.ignore_patterns("part-*.json"))
    manifest, entries = manifests.read_manifest(str(directory), kind="targets"), []
    for entry in manifest.shards:
        table = pq.read_table(directory / entry.file)
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), change(table[name].combine_chunks()))
        entry, data = recommitted(entry, table, row_groups(table, rows_of(table, LENGTH)))
        (directory / entry.file).write_bytes(data)
        entries.append(entry)
    rewrite(directory, entries, manifest.failed)
    return directory


@pytest.mark.parametrize("workers", [0, 1])
def test_targets_for_another_input_end_the_run(sharp: Path, sharp_targets: Path, tmp_path: Path, workers: int) -> None:
    directory = changed(sharp_targets, tmp_path / "targets", "input_crc32", pc.bit_wise_not)
    flags = [*PARQUET, *DISTIL, "--targets", directory, "--max-steps", 2, "--dataloader-num-workers", workers]
    if workers:
        output = run(*TRAIN, "--shards", sharp, "--output-dir", tmp_path / "out", *SMALL, *flags, code=1)
        assert "Traceback" not in output
        (failure,) = [line for line in output.splitlines() if line.startswith("failed: ")]
        assert "the targets of sequence" in failure and "make targets for these shards" in failure
    else:
        with pytest.raises(RunError, match=r"^the targets of sequence \d+ were made for another masked input"):
            train_here(sharp, tmp_path / "out", *flags)


def test_targets_for_other_scores_end_the_run(sharp: Path, work: Path, sharp_targets: Path, tmp_path: Path) -> None:
    """The same sequences with other entropies: the manifests fit, only the inputs differ."""
    rescored = score_here(sharp, work / "teacher", tmp_path / "rescored", "--passes", 2)
    with pytest.raises(RunError, match="the targets of sequence"):
        train_here(rescored, tmp_path / "out", *PARQUET, "--targets", sharp_targets, *DISTIL, "--max-steps", 1)


def test_rows_out_of_place_end_the_run(sharp: Path, sharp_targets: Path, tmp_path: Path) -> None:
    def turn(variant: pa.Array) -> pa.Array:
        return variant.take(pa.array(range(len(variant))[::-1]))

    directory = changed(sharp_targets, tmp_path / "targets", "variant", turn)
    with pytest.raises(RunError, match="does not match its sequences; make it again"):
        train_here(sharp, tmp_path / "out", *PARQUET, "--targets", directory, *DISTIL, "--max-steps", 1)


def test_targets_that_do_not_fit_are_refused(sharp: Path, scored: Path, sharp_targets: Path, tmp_path: Path) -> None:
    lacking, vague = (Path(shutil.copytree(sharp_targets, tmp_path / name)) for name in ("lacking", "vague"))
    manifest = json.loads((lacking / "manifest.json").read_text())
    give_up(lacking, "part-00000.parquet")
    (vague / "manifest.json").write_text(json.dumps(manifest | {"masks": manifest["masks"] | {"positions": 1}}))
    targets = ["--targets", sharp_targets]
    for sequences, flags, sentence in (
        (sharp, [*PARQUET, *DISTIL, *targets, "--mask-ratio", 0.2], "--mask-ratio 0.2 differs from 0.3"),
        (sharp, [*PARQUET, *DISTIL, *targets, "--mask-temperature", 0], "--mask-temperature 0.0 differs from 1.0"),
        (sharp, [*PARQUET, *DISTIL, *targets, "--hard-share", 0.3], "--hard-share 0.3 differs from 1.0"),
        (sharp, [*PARQUET, *DISTIL, *targets, "--recipe", "paper"], "--mask-ratio 0.15 .*; leave --recipe out"),
        (sharp, [*PARQUET, *DISTIL, *targets, "--corruption", "mask-only"], "--corruption mask-only differs from bert"),
        (sharp, [*RANDOM, *DISTIL, *targets], "made with --mask-source parquet"),
        (sharp, [*SELF, *DISTIL, *targets], "masks that are known before the run, but --entropy-source self"),
        (sharp, [*PARQUET, *targets], "--targets has no effect without --distill-weight"),
        (sharp, [*PARQUET, "--distill-temperature", 2], "--distill-temperature has no effect without --dis"),
        (sharp, [*PARQUET, *DISTIL, *targets, "--distill-temperature", 3], r"-temperature 3 is not among .*: 1, 2;"),
        (scored, [*PARQUET, *DISTIL, "--distill-temperature", 2], r"-temperature 2 is not among .*: 1;"),
        (scored, [*PARQUET, *DISTIL, *targets], "made for other sequences"),
        (sharp, [*PARQUET, *DISTIL, "--targets", sharp], "holds sequences, not targets"),
        (sharp, [*PARQUET, *DISTIL, "--targets", lacking], "lacks rows for part-00000.parquet"),
        (sharp, [*PARQUET, *DISTIL, "--targets", vague], "does not match its fingerprint in masks"),
        (sharp_targets, PARQUET, "holds targets, not sequences"),
    ):
        with pytest.raises(UsageError, match=sentence) as caught:
            train_here(sequences, tmp_path / "out", *flags, "--max-steps", 1)
        assert "\n" not in str(caught.value)
    same = ["--mask-temperature", 1, "--mask-ratio", 0.3, *AT_ONCE, "--corruption", "bert"]
    summary = train_here(sharp, tmp_path / "out", *PARQUET, *DISTIL, *targets, *same, "--max-steps", 1)
    assert summary["flags"]["mask_temperature"] == 1
    assert summary["flags"]["targets"] == manifests.read_manifest(str(sharp_targets), kind="targets").fingerprint_hash
