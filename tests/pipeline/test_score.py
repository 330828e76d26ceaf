"""score.py as its users run it: in a process of its own, on Ray and locally, killed and resumed, and misused."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import ray
import torch
from harness import LENGTH, TOP_K, command, refused, run, save_bert
from in_process import RANDOM, score_here, tokenize_here, train_here
from transformers import AutoModelForMaskedLM, AutoTokenizer, GPT2Config

import pipeline.score
from entropy_masking import codes
from entropy_masking.errors import UsageError
from entropy_masking.shards import manifests, parquet
from pipeline import backends


def hashes(directory: Path) -> dict[str, str]:
    return {entry.file: entry.sha256 for entry in manifests.read_manifest(str(directory)).shards}


def test_shards_hold_the_contract(work: Path, scored: Path) -> None:
    manifest = manifests.read_manifest(str(scored))
    assert len(manifest.shards) > 5
    assert manifest.totals["documents"] == 400
    tokenizer = AutoTokenizer.from_pretrained(scored / "tokenizer")
    for entry in manifest.shards:
        table = pq.read_table(scored / entry.file)
        assert table.schema == parquet.schema_of(manifest)
        ids_NL = parquet.column_2d(table, "input_ids", LENGTH)
        entropy_NL = parquet.column_2d(table, "entropy", LENGTH).astype(np.float64)
        log_p_NLK = codes.decode(parquet.column_2d(table, "topk_logprobs", LENGTH * TOP_K).reshape(-1, LENGTH, TOP_K))
        special_NL = np.isin(ids_NL, tokenizer.all_special_ids)
        assert (np.isnan(entropy_NL) == special_NL).all()
        assert (np.isnan(log_p_NLK).all(-1) == special_NL).all()
        assert (entropy_NL[~special_NL] >= 0).all() and (entropy_NL[~special_NL] <= np.log(len(tokenizer)) + 0.01).all()
        assert (np.diff(log_p_NLK[~special_NL]) <= 0).all()
        expected_ids = (entry.index << 32) + np.arange(entry.rows)
        assert table["sequence_id"].to_pylist() == expected_ids.tolist()
        assert (ids_NL[:, 0] == tokenizer.cls_token_id).all()
        assert (ids_NL[:-1] != tokenizer.pad_token_id).all()


def test_stored_scores_are_those_of_the_model_but_for_rounding(work: Path) -> None:
    sizes = ["--sequence-length", LENGTH, "--passes", LENGTH, "--top-k", TOP_K, "--limit-documents", 5]
    exact = score_here(work / "corpus.jsonl", work / "teacher", work / "exact", *sizes)
    manifest = manifests.read_manifest(str(exact))
    table = manifests.read_table(manifest, manifest.shards[0], ["input_ids", "entropy", "topk_ids", "topk_logprobs"])
    ids_NL = torch.from_numpy(parquet.column_2d(table, "input_ids", LENGTH).astype(np.int64))
    entropy_NL = parquet.column_2d(table, "entropy", LENGTH)
    log_p_NLK = codes.decode(parquet.column_2d(table, "topk_logprobs", LENGTH * TOP_K).reshape(-1, LENGTH, TOP_K))
    topk_NLK = parquet.column_2d(table, "topk_ids", LENGTH * TOP_K).reshape(-1, LENGTH, TOP_K).astype(np.int64)
    model = AutoModelForMaskedLM.from_pretrained(work / "teacher").double().eval()
    for position in range(1, LENGTH - 1):
        if ids_NL[0, position] < 5:
            continue
        inputs_1L = ids_NL[:1].clone()
        inputs_1L[0, position] = manifest.special_ids["mask"]
        with torch.no_grad():
            log_p_V = model(inputs_1L).logits[0, position].log_softmax(-1).numpy()
        entropy = -(np.exp(log_p_V) * log_p_V).sum()
        assert abs(entropy - entropy_NL[0, position]) <= 1e-4 + np.spacing(np.float16(entropy))
        expected_K = np.sort(log_p_V)[::-1][:TOP_K]
        tolerance_K = 1e-4 + np.sqrt(-expected_K / 4600)  # half a step of 8 bits
        assert (np.abs(log_p_NLK[0, position] - expected_K) <= tolerance_K).all()
        assert (np.abs(log_p_V[topk_NLK[0, position]] - expected_K) < 1e-4).all()


def test_polars_and_datasets_open_the_shards(scored: Path) -> None:
    frame = pl.read_parquet(scored / "part-*.parquet")
    assert frame.schema["entropy"] == pl.List(pl.Float16) and frame.schema["input_ids"] == pl.List(pl.UInt16)
    rows = datasets.load_dataset("parquet", data_files=str(scored / "part-*.parquet"), split="train")
    assert len(rows) == len(frame) == manifests.read_manifest(str(scored)).totals["sequences"]
    assert len(rows[0]["topk_ids"]) == LENGTH * TOP_K


def test_ray_writes_the_same_bytes(work: Path, scored: Path) -> None:
    output = run(*command(work, work / "ray", "--workers", "2"))
    assert hashes(work / "ray") == hashes(scored)
    assert "tokens/s" in output and "mean entropy" in output
    assert "starting Ray on this machine" in output and "waiting for workers to load the teacher" in output


def test_lost_or_foreign_files_are_scored_again(work: Path, scored: Path, tmp_path: Path) -> None:
    """What a zombie leaves does no harm: its shard again, a half-written temporary file, a file nobody asked for."""
    directory = Path(shutil.copytree(scored, tmp_path / "damaged"))
    (directory / "part-00001.parquet").unlink()
    (directory / "part-00002.parquet").write_bytes(b"half a file")
    (directory / "_records" / "part-00003.json").write_text('{"index": 3')
    (directory / "part-00004.parquet").write_bytes((scored / "part-00004.parquet").read_bytes())
    (directory / ".part-00004.parquet.0123.tmp").write_bytes(b"half")
    (directory / "part-99999.parquet").write_bytes(b"stray")
    assert "(3 scored now)" in run(*command(work, directory, "--backend", "local"))
    assert hashes(directory) == hashes(scored) and not list(directory.rglob("*.tmp"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_repeated_run_keeps_its_dtype(work: Path, tmp_path: Path, dtype: str) -> None:
    run = work / "corpus.jsonl", work / "teacher", tmp_path, "--sequence-length", LENGTH, "--dtype"
    score_here(*run, dtype)
    (tmp_path / "part-00000.parquet").unlink()
    score_here(*run, "auto")
    assert manifests.read_manifest(str(tmp_path)).fingerprint["dtype"] == dtype


def test_a_shard_directory_is_a_corpus(work: Path, scored: Path) -> None:
    """Tokens first, scores later: same tokens, ids and scores as in one go."""
    sizes = ["--sequence-length", LENGTH, "--shard-tokens", 1500]
    tokens = tokenize_here(work / "corpus.jsonl", work / "tokenizer", work / "tokens", *sizes)
    manifest = manifests.read_manifest(str(tokens))
    assert not manifest.scored and manifest.top_k == 0
    assert pq.read_schema(tokens / "part-00000.parquet").names == ["sequence_id", "input_ids"]
    again = ["--top-k", TOP_K, "--batch-tokens", 1024]
    score_here(tokens, work / "teacher", work / "rescored", *again)
    assert hashes(work / "rescored") == hashes(scored)


def test_rejected_documents_are_counted_and_listed(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (work / "corpus.jsonl").read_bytes().splitlines()[:40]
    bad = [b'{"text": "half', b'{"text": "\xff\xfe"}', b'{"text": null}', b'{"text": ""}', b'{"other": 1}', b"[1]"]
    (tmp_path / "mixed.jsonl").write_bytes(b"\n".join([*good[:20], *bad, *good[20:]]) + b"\n")
    score_here(tmp_path / "mixed.jsonl", work / "teacher", tmp_path / "out", "--sequence-length", LENGTH)
    assert "rejected documents  6" in capsys.readouterr().out
    record = json.loads((tmp_path / "out/_records/part-00000.json").read_text())
    assert [entry["line"] for entry in record["rejected"]["listed"]] == [21, 22, 23, 24, 25, 26]
    (tmp_path / "clean.jsonl").write_bytes(b"\n".join(good) + b"\n")
    score_here(tmp_path / "clean.jsonl", work / "teacher", tmp_path / "clean", "--sequence-length", LENGTH)
    assert list(hashes(tmp_path / "out").values()) == list(hashes(tmp_path / "clean").values())


def test_mistakes_get_one_sentence(work: Path, scored: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    local = ["--backend", "local", "--sequence-length", LENGTH]

    def score(corpus: object, teacher: object, *more: object) -> str:
        flags = ["--corpus", corpus, "--teacher", teacher, "--output", tmp_path / "out", *local, *more]
        with pytest.raises(UsageError) as caught:
            pipeline.score.main([str(flag) for flag in flags])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    corpus, teacher = work / "corpus.jsonl", work / "teacher"
    assert "missing.jsonl" in score(tmp_path / "missing.jsonl", teacher)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no parquet PAR1")
    assert "broken.parquet" in score(tmp_path / "broken.parquet", teacher)
    assert "--text-column" in score(corpus, teacher, "--text-column", "body")
    (tmp_path / "blank.txt").write_text("\n \n\n")
    assert "no usable text" in score(tmp_path / "blank.txt", teacher)
    assert "needs --tokenizer" in score(corpus, "none")
    assert "--passes" in score(corpus, teacher, "--context", "full", "--passes", 3)
    assert "needs a teacher" in score(corpus, "none", "--tokenizer", work / "tokenizer", "--top-k", 3)
    assert "--trust-remote-code needs a teacher" in score(corpus, "none", "--trust-remote-code")

    assert "--top-k 5000" in score(corpus, teacher, "--top-k", 5000)
    long = refused(*command(work, tmp_path / "long", "--sequence-length", "65"))
    assert "cannot be run on sequences of 65 tokens" in long and not (tmp_path / "long").exists()
    assert "no model directory" in score(corpus, tmp_path / "nowhere")
    save_bert(tmp_path / "headless", tokenizer, head=False)
    assert "no trained MLM head" in score(corpus, tmp_path / "headless", "--output", tmp_path / "out2")
    shutil.copytree(teacher, tmp_path / "narrow")
    config = json.loads((teacher / "config.json").read_text())
    (tmp_path / "narrow" / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    assert "but its configuration asks for [48" in score(corpus, tmp_path / "narrow", "--output", tmp_path / "out3")
    GPT2Config(vocab_size=300).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").write_bytes(b"")
    assert "no masked-LM head" in score(corpus, tmp_path / "gpt2", "--tokenizer", work / "tokenizer")

    other = AutoTokenizer.from_pretrained(work / "tokenizer")
    other.add_tokens(["zzzz"])
    other.save_pretrained(tmp_path / "other")
    assert "predicts only" in score(corpus, teacher, "--tokenizer", tmp_path / "other")
    swap_two_words(work / "tokenizer", tmp_path / "swapped")
    assert "does not fit" in score(corpus, teacher, "--tokenizer", tmp_path / "swapped")
    assert "passes: 7 → 5" in refused(*command(work, scored, "--passes", "5"))
    message = score(corpus, teacher, "--tempratures", 2)
    assert "--tempratures is not a flag of pipeline/score.py; the nearest is --temperatures" in message
    assert "usage" not in message


def test_a_cluster_that_is_not_there(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert "nothing answers at 127.0.0.1:9" in refused(*command(work, tmp_path / "out"))


def swap_two_words(source: Path, target: Path) -> None:
    """A tokenizer of the same size whose ids mean something else."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    definition = json.loads((source / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (target / "tokenizer.json").write_text(json.dumps(definition))


def test_nothing_unsafe_by_default(work: Path, scored: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    save_bert(pickled, AutoTokenizer.from_pretrained(work / "tokenizer"))
    model = AutoModelForMaskedLM.from_pretrained(pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pickle.*save_pretrained"):
        score_here(work / "corpus.jsonl", pickled, tmp_path / "out", "--sequence-length", LENGTH)

    manifest = json.loads((scored / "manifest.json").read_text())
    manifest["shards"][0]["file"] = "../../etc/part-00000.parquet"
    (tmp_path / "forged").mkdir()
    (tmp_path / "forged" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"the file of shard 0 is part-00000.parquet, not '../../etc"):
        train_here(tmp_path / "forged", tmp_path / "student", *RANDOM)


def node(name: str, **resources: float) -> dict[str, object]:
    return {"NodeID": name, "Alive": True, "Resources": resources}


NODES: list[tuple[list[dict[str, object]], float | None, tuple[int, dict[str, float]]]] = [
    ([node("head"), node("small", CPU=4), node("large", CPU=16)], None, (10, {"num_cpus": 2})),
    ([node("head")], None, (1, {"num_cpus": 1})),  # nodes are added when they are asked for
    ([node("gpus", CPU=16, GPU=8)], None, (8, {"num_gpus": 1})),
    ([node("gpus", CPU=16, GPU=8)], 0.7, (8, {"num_gpus": 0.7})),  # a share does not span two GPUs
    ([node("gpus", CPU=16, GPU=8), node("more", GPU=3)], 2, (5, {"num_gpus": 2})),
]


@pytest.mark.parametrize(("nodes", "gpus", "expected"), NODES)
def test_workers_that_fit_a_cluster(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, object]],
    gpus: float | None,
    expected: tuple[int, dict[str, float]],
) -> None:
    """Two hyper-threads a core on the node with the most CPUs, which alone is asked."""
    asked: list[str] = []
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 99.0, "GPU": 99.0})
    monkeypatch.setattr(backends, "_threads_per_core", lambda name: asked.append(name) or 2.0)
    assert backends._fit(1, gpus) == expected
    assert asked == (["large"] if len(nodes) == 3 else [])


def test_a_fraction_of_gpus_above_1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [node("gpus", CPU=16, GPU=8)])
    with pytest.raises(UsageError, match=r"--gpus-per-worker 1\.5 is neither a whole number nor below 1"):
        backends._fit(1, 1.5)
