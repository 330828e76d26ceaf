"""Exact targets: score.py --mask-source and run.py --targets, against the teacher online."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from harness import LENGTH, SCORE, TRAIN, refused, run, save_bert
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoTokenizer, BertForMaskedLM

import pipeline.score
import train.run
from entropy_masking import storage
from entropy_masking.errors import RunError, UsageError
from entropy_masking.masking.masker import IGNORED_LABEL
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards import manifests, parquet
from entropy_masking.shards.read import Columns, masker_of, read_rows, to_tensors
from entropy_masking.shards.targets import input_crc32, row_groups, rows_of, targets_schema
from train.data import PrepareBatch, TrainingSequences
from train.trainer import MaskedLMTrainer

SEED, ALPHA, TOP_K = 3, 0.5, 8
HARDEST = ["--mask-source", "parquet", "--hard-share", 1, "--mask-temperature", 1]
MASKS = [*HARDEST, "--mask-seed", SEED]
PARQUET = ["--entropy-source", "parquet"]
AT_ONCE = ["--hard-share", 1, "--mask-warmup", 0, "--mask-ramp", 0]
DISTIL = ["--distill-weight", ALPHA]
SMALL = ["--per-device-train-batch-size", 8, "--eval-fraction", 0.2, "--bf16", "false", "--seed", SEED]


def score(corpus: object, teacher: Path, output: Path, *flags: object) -> Path:
    """score.py's main in this process."""
    named = ["--corpus", corpus, "--teacher", teacher, "--output", output, "--backend", "local", "--dtype", "float32"]
    pipeline.score.main([str(flag) for flag in (*named, "--batch-tokens", 2048, *flags)])
    return output


def masked(sequences: Path, teacher: Path, output: Path, *flags: object) -> manifests.Manifest:
    """The manifest of targets with little in them."""
    return manifests.read_manifest(str(score(sequences, teacher, output, "--top-k", 1, *flags)), kind="targets")


def train_here(sequences: Path, output: Path, *flags: object) -> dict[str, Any]:
    """run.py's main in this process; returns the summary."""
    train.run.main([str(flag) for flag in ("--shards", sequences, "--output-dir", output, *SMALL, *flags)])
    return json.loads((output / "summary.json").read_text())


def losses(output: Path, steps: int) -> np.ndarray:
    """The logged loss of every step."""
    state = json.loads((output / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    found = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
    assert list(found) == list(range(1, steps + 1))
    return np.array(list(found.values()))


@pytest.fixture(scope="module")
def teacher(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that is sure of something: with weights as they are initialised all tokens are about as likely."""
    directory = tmp_path_factory.mktemp("sure") / "teacher"
    save_bert(directory, AutoTokenizer.from_pretrained(work / "tokenizer"))
    model = BertForMaskedLM.from_pretrained(directory)
    model.cls.predictions.transform.LayerNorm.weight.data.mul_(20)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(scope="module")
def scan(work: Path, teacher: Path, root: Path) -> Path:
    corpus, flags = work / "corpus.jsonl", ["--limit-documents", 170, "--shard-tokens", 800]
    sizes = ["--sequence-length", LENGTH, "--passes", 2, "--top-k", TOP_K, "--temperatures", "1,2"]
    return score(corpus, teacher, root / "scan", *flags, *sizes)


@pytest.fixture(scope="module")
def dense(scan: Path, teacher: Path, root: Path) -> Path:
    """Targets with the whole vocabulary."""
    V = manifests.read_manifest(str(scan)).vocab_size
    return score(scan, teacher, root / "dense", *MASKS, "--top-k", V, "--temperatures", "1,2")


@pytest.fixture(scope="module")
def sparse(scan: Path, teacher: Path, root: Path) -> Path:
    return score(scan, teacher, root / "sparse", *MASKS, "--top-k", TOP_K, "--temperatures", "1,2")


# --- the masks -------------------------------------------------------------------------------------------------------


def test_targets_are_of_what_the_trainer_would_mask(scan: Path, sparse: Path) -> None:
    manifest, sequences = manifests.read_manifest(str(sparse), kind="targets"), manifests.read_manifest(str(scan))
    policy = MaskPolicy.paper(ratio=0.3, temperature=1.0, seed=SEED)
    assert manifest.masks == {
        **{"source": "parquet", "policy": policy.to_json()},
        **{"variants": 4, "positions": policy.positions(LENGTH)},
    }
    assert manifest.sequences_hash == sequences.sequences_hash
    assert [entry.index for entry in manifest.shards] == [entry.index for entry in sequences.shards]
    masker = masker_of(sequences)
    for entry, whole in zip(manifest.shards, sequences.shards, strict=True):
        table = pq.read_table(sparse / entry.file)
        assert table.schema == targets_schema(sequences.vocab_size, [1.0, 2.0])
        rows, raw = rows_of(table, policy.positions(LENGTH)), read_rows(sequences, whole, Columns(entropy=True))
        assert entry.rows == len(table) == 4 * whole.rows
        for variant in range(4):
            epoch = torch.full((whole.rows,), variant)
            batch = masker(to_tensors(raw) | {"epoch": epoch}, policy)
            own = rows.variant_N == variant
            np.testing.assert_array_equal(rows.sequence_id_N[own], raw["sequence_id"])
            np.testing.assert_array_equal(rows.positions_NK[own], batch["positions_BP"])
            np.testing.assert_array_equal(rows.crc32_N[own], input_crc32(batch["input_ids"].numpy()))


def test_one_row_group_is_one_variant_of_one_row_group_of_sequences(scan: Path, teacher: Path, root: Path) -> None:
    manifest = masked(scan, teacher, root / "random", "--mask-source", "random", "--variants", 3)
    for entry in manifest.shards:
        with pq.ParquetFile(root / "random" / entry.file) as file:
            assert file.num_row_groups == 3 * -(-entry.rows // (3 * parquet.ROW_GROUP))
            for group in range(file.num_row_groups):
                assert set(file.read_row_group(group)["variant"].to_pylist()) == {group % 3}


def test_as_many_variants_as_differ(scan: Path, teacher: Path, tmp_path: Path) -> None:
    for name, flags, variants in (
        ("sorted", ["--mask-source", "parquet", "--recipe", "paper"], 1),
        ("share", ["--mask-source", "parquet"], 4),
        ("random", ["--mask-source", "random"], 4),
    ):
        manifest = masked(scan, teacher, tmp_path / name, *flags)
        assert manifest.masks and manifest.masks["variants"] == variants
        json.loads((tmp_path / name / "manifest.json").read_text(), parse_constant=pytest.fail)  # no Infinity
    assert MaskPolicy.from_json(manifest.masks["policy"]) == MaskPolicy.random(seed=42)


def test_a_run_that_was_cut_short_goes_on(
    scan: Path, teacher: Path, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, output = ["--top-k", TOP_K, "--temperatures", "1,2"], tmp_path / "targets"
    original = pipeline.score.local_records

    def cut_short(job: Any, todo: list[Any]) -> Iterator[Any]:
        yield from original(job, todo[:2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.score, "local_records", cut_short)
        score(scan, teacher, output, *MASKS, *flags)
    with pytest.raises(UsageError, match=r"unfinished \(2 of \d+ shards\); run the same .*--mask-source"):
        manifests.read_manifest(str(output), kind="targets")
    records = {path: path.read_text() for path in (output / "_records").glob("part-*.json")}
    resumed = manifests.read_manifest(str(score(scan, teacher, output, *MASKS, *flags)), kind="targets")
    whole = manifests.read_manifest(str(sparse), kind="targets")
    assert [entry.sha256 for entry in resumed.shards] == [entry.sha256 for entry in whole.shards]
    assert len(records) == 2 and all(path.read_text() == text for path, text in records.items())
    with pytest.raises(UsageError, match=r"policy\.temperature: 1.0 → 2.0"):
        score(scan, teacher, output, *MASKS, *flags, "--mask-temperature", 2)


def test_a_shard_without_text_has_no_targets(work: Path, teacher: Path, tmp_path: Path) -> None:
    lines = (work / "corpus.jsonl").read_text().splitlines()[:40]
    for name, text in (("a", lines[:20]), ("b", ['{"text": ""}'] * 300), ("c", lines[20:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(text))
    corpus = ",".join(f"{tmp_path}/{name}.jsonl" for name in "abc")
    sizes = ["--sequence-length", LENGTH, "--shard-tokens", 500]
    directory = score(corpus, teacher, tmp_path / "scan", *sizes, "--passes", 2)
    targets = masked(directory, teacher, tmp_path / "targets", *MASKS)
    rows = {entry.index: 4 * entry.rows for entry in manifests.read_manifest(str(directory)).shards}
    assert {entry.index: entry.rows for entry in targets.shards} == rows and 0 in rows.values()


def test_mistakes_in_masks(work: Path, scan: Path, teacher: Path, sparse: Path, tmp_path: Path) -> None:
    random, masks = ["--mask-source", "random"], ["--mask-source", "parquet"]
    tokens = tmp_path / "tokens"
    run(*SCORE, "--corpus", scan, "--teacher", "none", "--output", tokens, "--backend", "local")
    for corpus, flags, sentence in (
        (scan, [*random, "--hard-share", 0.5], "--hard-share needs scores, and --mask-source random has none"),
        (scan, [*masks, "--mask-warmup", 0.1], "--mask-warmup depends on the length of a run, which is not known here"),
        (scan, [*masks, "--mask-ramp", 0.1], "--mask-ramp depends on the length of a run"),
        (scan, [*masks, "--predict-ratio", 0.1], "--predict-ratio has no effect here, because all masked"),
        (scan, [*masks, "--predict-by", "entropy"], "--predict-by has no effect here, because all masked .*; leave it"),
        (
            scan,
            [*random, "--predict-by", "entropy"],
            "--predict-by has no effect here, because all masked .*; leave it",
        ),
        (scan, [*masks, "--variants", 0], "--variants 0"),
        (scan, [*masks, "--variants", 1 << 17], "--variants 131072"),
        (scan, [*masks, "--mask-seed=-1"], "--mask-seed -1"),
        (scan, ["--mask-ratio", 0.2], "--mask-ratio needs --mask-source"),
        (scan, ["--variants", 2], "--variants needs --mask-source"),
        (scan, [*masks, "--context", "masked"], "--mask-source says what the teacher sees; leave out --context"),
        (scan, [*masks, "--passes", 3], "leave out --context and --passes"),
        (scan, [*masks, "--top-k", 0], "set --top-k above 0"),
        (work / "corpus.jsonl", masks, "--mask-source masks a shard directory, which .* is not"),
        (tokens, masks, "has no scores"),
        (sparse, masks, "holds targets, not sequences"),
    ):
        with pytest.raises(UsageError, match=sentence) as caught:
            score(corpus, teacher, tmp_path / "out", *flags)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    none = ["--corpus", scan, "--teacher", "none", "--output", tmp_path / "out"]
    assert "--mask-source needs a teacher" in refused(*SCORE, *none, *masks)


# --- as with the teacher online --------------------------------------------------------------------------------------


def logits_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The student's at the masked positions [B, P, V], which it gives where there are no labels."""
    return model(**{name: value for name, value in inputs.items() if name != "labels_BP"})["logits"]


class Online:
    """In place of the trainer's loss: the teacher, in memory, on the very inputs of the student."""

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
    scan: Path, teacher: Path, dense: Path, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, T: int
) -> None:
    steps = 100
    flags = [*PARQUET, "--max-steps", steps, "--logging-steps", 1, "--save-steps", steps]
    flags += ["--model", "bert-tiny", "--optim", "adamw_torch", "--learning-rate", 1e-3]  # rounding drifts less
    distil = [*DISTIL, *(["--distill-temperature", T] if T != 1 else [])]
    summary = train_here(scan, tmp_path / "dense", *flags, "--targets", dense, *distil)
    train_here(scan, tmp_path / "sparse", *flags, "--targets", sparse, *distil)
    for name, top_k in (("online", None), ("online-sparse", TOP_K)):
        with monkeypatch.context() as patch:
            online = Online(teacher, T, top_k)
            patch.setattr(MaskedLMTrainer, "compute_loss", lambda *args, online=online, **more: online(*args, **more))
            train_here(scan, tmp_path / name, *flags, *AT_ONCE, "--mask-temperature", 1)
    found = {path.name: losses(path, steps) for path in tmp_path.iterdir()}
    np.testing.assert_allclose(found["dense"], found["online"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found["sparse"], found["online-sparse"], atol=5e-4, rtol=0)  # halves move the tail too
    assert np.abs(found["sparse"] - found["online"]).max() > 0.01, "truncation is seen, so the tolerance says something"
    assert summary["regime"] == "parquet+kd" and summary["targets"]["variants"] == 4
    totals = [manifests.read_manifest(str(scan)).totals, manifests.read_manifest(str(dense), kind="targets").totals]
    assert summary["scoring_seconds"] == pytest.approx(sum(each["worker_seconds"] for each in totals))
    assert summary["scoring_flops"] == sum(each["flops"] for each in totals)


@pytest.mark.parametrize("T", [1, 2])
def test_without_targets_the_scan_is_distilled(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, T: int
) -> None:
    """The loss of the first step by hand, from the files of the scan."""
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
    summary = train_here(scan, tmp_path / "out", *PARQUET, *DISTIL, "--distill-temperature", T, "--max-steps", 1)
    batch, logits_BKV, manifest = batches[0], outputs[0], manifests.read_manifest(str(scan))
    total = 0.0
    for row, sequence in enumerate(batch["sequence_id"].tolist()):
        entry = next(entry for entry in manifest.shards if entry.index == sequence >> 32)
        table = pq.read_table(scan / entry.file).slice(sequence & 0xFFFFFFFF, 1)
        ids_LK = np.array(table["topk_ids"][0].as_py()).reshape(LENGTH, TOP_K)
        log_p_LK = np.array(table["topk_logprobs"][0].as_py(), float).reshape(LENGTH, TOP_K)
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


# --- which variant, resuming, refusing -------------------------------------------------------------------------------


def test_epochs_take_the_variants_in_turn(scan: Path, teacher: Path, tmp_path: Path) -> None:
    masks = [*HARDEST, "--variants", 2, "--mask-seed", 9]
    directory = score(scan, teacher, tmp_path / "targets", *masks, "--top-k", TOP_K)
    manifest, targets = manifests.read_manifest(str(scan)), manifests.read_manifest(str(directory), kind="targets")
    N = manifest.totals["sequences"]
    sequences = TrainingSequences(
        manifest, manifest.shards, Columns(), size=3 * N, seed=0, prepare=lambda batch: batch, targets=targets
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
    summary = train_here(scan, tmp_path / "out", *PARQUET, "--targets", directory, *DISTIL, *sizes)
    assert summary["flags"]["mask_seed"] == 9 and summary["seed"] == SEED


def test_a_run_with_targets_resumes_to_the_same_weights(scan: Path, sparse: Path, tmp_path: Path) -> None:
    flags = [*PARQUET, "--targets", sparse, *DISTIL, "--max-steps", 20, "--save-steps", 10]
    whole = train_here(scan, tmp_path / "whole", *flags, "--dataloader-num-workers", 1)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-20")
    for name in ("summary.json", "model.safetensors"):
        (tmp_path / "resumed" / name).unlink()
    resumed = train_here(scan, tmp_path / "resumed", *flags)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("resumed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed["train_loss"] == whole["train_loss"] is not None


def changed(targets: Path, directory: Path, name: str, change: Callable[[pa.Array], pa.Array]) -> Path:
    """A copy of targets with another column ``name``, whose manifest fits the files all the same."""
    shutil.copytree(targets, directory, ignore=shutil.ignore_patterns("part-*.json"))
    manifest = json.loads((directory / "manifest.json").read_text())
    for entry in manifest["shards"]:
        table = pq.read_table(directory / entry["file"])
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), change(table[name].combine_chunks()))
        data = parquet.to_parquet(row_groups(table, rows_of(table, LENGTH)))
        (directory / entry["file"]).write_bytes(data)
        entry |= {"bytes": len(data), "sha256": storage.sha256_bytes(data)}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


@pytest.mark.parametrize("workers", [0, 1])
def test_targets_for_another_input_end_the_run(scan: Path, sparse: Path, tmp_path: Path, workers: int) -> None:
    directory = changed(sparse, tmp_path / "targets", "input_crc32", pc.bit_wise_not)
    flags = ["--shards", scan, *SMALL, *PARQUET, *DISTIL, "--targets", directory, "--max-steps", 2]
    flags += ["--output-dir", tmp_path / "out", "--dataloader-num-workers", workers]
    if workers:
        output = run(*TRAIN, *flags, code=1)
        assert "Traceback" not in output
        (failure,) = [line for line in output.splitlines() if line.startswith("failed: ")]
        assert "the targets of sequence" in failure and "make targets for these shards" in failure
    else:
        with pytest.raises(RunError, match=r"^the targets of sequence \d+ were made for another masked input"):
            train.run.main([str(flag) for flag in flags])


def test_targets_for_another_scan_end_the_run(scan: Path, work: Path, sparse: Path, tmp_path: Path) -> None:
    """The same sequences with other entropies: nothing in the manifests says so, only the inputs."""
    rescored = score(scan, work / "teacher", tmp_path / "rescored", "--passes", 2)
    with pytest.raises(RunError, match="the targets of sequence"):
        train_here(rescored, tmp_path / "out", *PARQUET, "--targets", sparse, *DISTIL, "--max-steps", 1)


def test_rows_out_of_place_end_the_run(scan: Path, sparse: Path, tmp_path: Path) -> None:
    def turn(variant: pa.Array) -> pa.Array:
        return variant.take(pa.array(range(len(variant))[::-1]))

    directory = changed(sparse, tmp_path / "targets", "variant", turn)
    with pytest.raises(RunError, match="does not hold the rows of its manifest"):
        train_here(scan, tmp_path / "out", *PARQUET, "--targets", directory, *DISTIL, "--max-steps", 1)


def test_targets_that_do_not_fit_are_refused(
    scan: Path, scored: Path, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = tmp_path / "lacking"
    shutil.copytree(sparse, lacking)
    manifest = json.loads((lacking / "manifest.json").read_text())
    (lacking / "manifest.json").write_text(
        json.dumps(manifest | {"shards": manifest["shards"][1:], "failed": {"part-00000.parquet": "it hung"}})
    )
    vague = tmp_path / "vague"
    shutil.copytree(sparse, vague)
    (vague / "manifest.json").write_text(json.dumps(manifest | {"masks": {"variants": 4}}))
    targets = ["--targets", sparse]
    for sequences, flags, sentence in (
        (scan, [*PARQUET, *DISTIL, *targets, "--mask-ratio", 0.2], "--mask-ratio 0.2 differs from 0.3"),
        (scan, [*PARQUET, *DISTIL, *targets, "--mask-temperature", 0], "--mask-temperature 0.0 differs from 1.0"),
        (scan, [*PARQUET, *DISTIL, *targets, "--hard-share", 0.3], "--hard-share 0.3 differs from 1.0"),
        (
            scan,
            [*PARQUET, *DISTIL, *targets, "--recipe", "paper"],
            "--mask-ratio 0.15 of --recipe paper .*; leave --recipe out",
        ),
        (scan, [*PARQUET, *DISTIL, *targets, "--corruption", "mask-only"], "--corruption mask-only differs from bert"),
        (scan, ["--entropy-source", "random", *DISTIL, *targets], "made with --mask-source parquet"),
        (scan, ["--entropy-source", "self", *DISTIL, *targets], "masks that are known before the run"),
        (scan, [*PARQUET, *targets], "--targets needs distillation"),
        (scan, [*PARQUET, "--distill-temperature", 2], "--distill-temperature needs distillation"),
        (scan, [*PARQUET, *DISTIL, *targets, "--distill-temperature", 3], r"3 was not scored: .* has 1, 2;"),
        (scored, [*PARQUET, *DISTIL, "--distill-temperature", 2], r"2 was not scored: .* has 1;"),
        (scored, [*PARQUET, *DISTIL, *targets], "made for other sequences"),
        (scan, [*PARQUET, *DISTIL, "--targets", scan], "holds sequences, not targets"),
        (scan, [*PARQUET, *DISTIL, "--targets", lacking], "lacks rows for part-00000.parquet"),
        (scan, [*PARQUET, *DISTIL, "--targets", vague], "does not name the masks"),
        (sparse, PARQUET, "holds targets, not sequences"),
    ):
        with pytest.raises(UsageError, match=sentence) as caught:
            train_here(sequences, tmp_path / "out", *flags, "--max-steps", 1)
        assert "\n" not in str(caught.value)
    same = ["--mask-temperature", 1, "--mask-ratio", 0.3, *AT_ONCE, "--corruption", "bert"]
    monkeypatch.setattr("train.progress.MOST_CONCENTRATED", -1.0)  # every mask is suspicious
    summary = train_here(scan, tmp_path / "out", *PARQUET, *DISTIL, *targets, *same, "--max-steps", 1)
    assert all(warning.endswith("; make targets with a smaller --hard-share") for warning in summary["warnings"])
    assert summary["warnings"] and summary["flags"]["mask_temperature"] == 1
    assert summary["flags"]["targets"] == manifests.read_manifest(str(sparse), kind="targets").fingerprint_hash


def test_a_run_that_ended_without_a_shard(scan: Path, teacher: Path, tmp_path: Path) -> None:
    """Its targets and its students go without it too, and the others keep their names."""
    directory = tmp_path / "scan"
    shutil.copytree(scan, directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    lost = manifest["shards"].pop(1)["file"]
    (directory / "manifest.json").write_text(json.dumps(manifest | {"failed": {lost: "it hung"}}))
    (directory / lost).unlink()
    masks = ["--mask-source", "parquet", "--variants", 1]
    targets = score(directory, teacher, tmp_path / "targets", *masks, "--top-k", TOP_K)
    made = manifests.read_manifest(str(targets), kind="targets")
    assert made.failed == {lost: "it hung"}
    assert [entry.file for entry in made.shards] == [entry["file"] for entry in manifest["shards"]]
    train_here(directory, tmp_path / "out", *PARQUET, *DISTIL, "--targets", targets, "--max-steps", 2)
    with pytest.raises(UsageError, match=f"lacks rows for {lost}"):
        train_here(scan, tmp_path / "more", *PARQUET, *DISTIL, "--targets", targets, "--max-steps", 2)
