#!/usr/bin/env python3
"""How near scoring comes to the teacher's own forward, what a job adds to it, and how small its shards are.

    python bench/scoring.py --teacher bert-base-uncased --corpus docstrings
    python bench/scoring.py --teacher runs/reference --corpus 'text/*.parquet' --job-seconds 60

Everything is measured side by side in one run, in turns, with one dtype, number of threads and malloc. Prints a table
with the budgets, and as its last line the same as one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

import pipeline.score
import train.plan
from bench.table import Row, device_name, in_turns, keep_buffers, last_line, now, parser, peak_flops, print_table, row
from entropy_masking.commands import console
from entropy_masking.errors import UsageError
from entropy_masking.models.checkpoints import load_masked_lm, load_tokenizer, local_checkpoint, resolve_dtype
from entropy_masking.models.flops import forward_flops
from entropy_masking.shards import commit, parquet
from entropy_masking.shards.manifests import read_manifest, read_table, special_ids
from entropy_masking.shards.parquet import column_2d
from pipeline.corpus.packing import pack, tokenize
from pipeline.corpus.plan import plan_corpus
from pipeline.corpus.readers import Rejects, read_documents
from pipeline.teacher import DTYPES, Teacher

BATCH, TOP_K, TARGET_TOP_K = 32, 16, 12  # sequences of the straightforward script, as scripts have it
MASKS = ["--mask-temperature", "1", "--mask-ratio", "0.15", "--variants", "4"]
SHARDS = 10  # of the job


def main() -> None:
    args = parse()
    keep_buffers()
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.teacher)
    teachers = {context: load_teacher(tokenizer, context, args) for context in ("masked", "full")}
    _, documents = read_texts(args, tokenizer, args.tokens + args.sequence_length)
    ids_NL = sequences(documents, tokenizer, args)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        rows = speeds(teachers, tokenizer, ids_NL, args, work)
        rows |= costs(teachers, rows, args)
        if args.job_seconds:
            tokens = round(args.job_seconds * (rows["ours_masked"].value or 0))
            texts, _ = read_texts(args, tokenizer, tokens)
            rows |= overhead(teachers["masked"], texts, tokens, args, work)
        texts, _ = read_texts(args, tokenizer, args.size_tokens)
        rows |= sizes(texts, args, work)
    settings = {"device": device_name(), "passes": teachers["masked"].passes, "measured_tokens": ids_NL.size}
    print_table(rows, vars(args) | settings)


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    add = flags.add_argument
    add("--teacher", required=True, help="masked LM by path or Hub id")
    add("--corpus", required=True, help="texts, as for pipeline/score.py; its first documents are scored")
    add("--text-column", default="text")
    add("--sequence-length", type=console.positive, default=128)
    add("--batch-tokens", type=console.positive, default=8192, help="tokens in one of our forwards (default: 8192)")
    add("--dtype", choices=["auto", *DTYPES], default="auto")
    add("--threads", type=console.positive, default=1, help="torch threads of every contestant (default: 1)")
    add("--tokens", type=console.positive, default=2048, help="text scored in each round (default: 2048)")
    add("--rounds", type=console.positive, default=4)
    add("--job-seconds", type=float, default=300, help="about how long the job takes, 0 for none (default: 300)")
    add("--size-tokens", type=console.positive, default=16384, help="text whose shards are weighed (default: 16384)")
    args = flags.parse_args()
    args.dtype = resolve_dtype(args.dtype)
    return args


# --- what is scored --------------------------------------------------------------------------------------------------


def read_texts(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, tokens: int
) -> tuple[list[str], list[np.ndarray]]:
    """The first documents of the corpus that have so many tokens, as texts and as ids."""
    corpus, rejects = plan_corpus(args.corpus, text_column=args.text_column), Rejects()
    if corpus.from_shards:
        raise UsageError(
            f"{args.corpus} is a shard directory; name texts, because the bench also measures their reading"
        )
    texts: list[str] = []
    encoded: list[np.ndarray] = []
    total = 0
    for ranges in corpus.shards:
        for document in read_documents(ranges, args.text_column, rejects):
            texts.append(document.text)
            for ids in tokenize([document], tokenizer, rejects):
                encoded.append(ids)
                total += len(ids) + 1
            if total >= tokens:
                return texts, encoded
    return texts, encoded


def sequences(documents: list[np.ndarray], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> np.ndarray:
    """Ids [N, L] of ``--tokens`` tokens, none of them padding."""
    special = special_ids(tokenizer)
    ids_NL = pack(documents, args.sequence_length, special["cls"], special["sep"], special["pad"])
    ids_NL = ids_NL[(ids_NL != special["pad"]).all(1)][: max(1, args.tokens // args.sequence_length)]
    if not len(ids_NL):
        raise UsageError(f"{args.corpus} has fewer tokens than one sequence; name a larger corpus")
    return ids_NL


def write_texts(texts: list[str], path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def load_teacher(tokenizer: PreTrainedTokenizerBase, context: str, args: argparse.Namespace) -> Teacher:
    special = special_ids(tokenizer)
    return Teacher(
        local_checkpoint(args.teacher),
        mask_id=special["mask"],
        pad_id=special["pad"],
        special_ids=sorted(set(tokenizer.all_special_ids)),
        vocab_size=len(tokenizer),
        context=context,
        top_k=TOP_K,
        batch_tokens=args.batch_tokens,
        dtype=args.dtype,
        length=args.sequence_length,
    )


# --- speed -----------------------------------------------------------------------------------------------------------


def speeds(
    teachers: dict[str, Teacher],
    tokenizer: PreTrainedTokenizerBase,
    ids_NL: np.ndarray,
    args: argparse.Namespace,
    work: Path,
) -> dict[str, Row]:
    """Ours, the bare forwards, the straightforward script and minicons in turns; a ratio is of one round's times."""
    model = load_masked_lm(local_checkpoint(args.teacher)).eval()
    model.to(teachers["full"].device)
    contestants: dict[str, Callable[[], object]] = {}
    for context, teacher in teachers.items():
        contestants |= {
            f"ours_{context}": partial(teacher.score, ids_NL),
            f"bare_{context}": partial(bare_forwards, teacher, prepare(teacher, ids_NL)),
            f"naive_{context}": partial(naive_script, model, teacher, ids_NL, work / "naive.parquet"),
        }
    if minicons := minicons_scorer(model, tokenizer, teachers["masked"], ids_NL[0]):
        contestants["minicons"] = minicons
    seconds = in_turns(contestants, args.rounds)
    tokens = dict.fromkeys(contestants, ids_NL.size) | {"minicons": ids_NL.shape[1]}
    rates = {name: tokens[name] / seconds[name] for name in contestants}
    rows = {name: row(rates[name], "tokens/s") for name in contestants}
    for context in teachers:
        ours = rates[f"ours_{context}"]
        rows[f"ours_to_bare_{context}"] = row(ours / rates[f"bare_{context}"], "×", at_least=0.9)
        rows[f"ours_to_naive_{context}"] = row(ours / rates[f"naive_{context}"], "×", at_least=3)
    if minicons:
        passes = int((~np.isin(ids_NL[0], [tokenizer.cls_token_id, tokenizer.sep_token_id])).sum())
        ours, theirs = teachers["masked"].passes * rates["ours_masked"], passes * rates["minicons"]
        rows["ours_encoder"], rows["minicons_encoder"] = row(ours, "tokens/s"), row(theirs, "tokens/s")
        rows["ours_to_minicons_encoder"] = row(ours / theirs, "×", at_least=1)
        rows["ours_to_minicons"] = row(rates["ours_masked"] / rates["minicons"], "×")
    return rows


def autocast(teacher: Teacher) -> torch.autocast:
    return torch.autocast(teacher.device.type, teacher.dtype, enabled=teacher.dtype != torch.float32)


def prepare(teacher: Teacher, ids_NL: np.ndarray) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """The inputs and scored positions of the forwards that the context needs, on the device."""
    on = teacher._to_device
    return [(on(batch.ids_RL), (on(batch.rows), on(batch.columns))) for batch in teacher._scan(ids_NL, None)]


@torch.inference_mode()
def bare_forwards(teacher: Teacher, batches: list[tuple[Tensor, tuple[Tensor, Tensor]]]) -> None:
    """Encoder forwards, and the head on each scored position once; the logits are dropped."""
    for ids_RL, select in batches:
        with autocast(teacher):
            features_NH = teacher.masked_lm.features(ids_RL, None, select)
        for chunk_CH in features_NH.split(teacher._chunk):
            teacher._project(chunk_CH, teacher.projection.bias)


@torch.no_grad()
def naive_script(model: PreTrainedModel, teacher: Teacher, ids_NL: np.ndarray, path: Path) -> None:
    """What people write: full logits, softmax, entropy, topk, Python lists, Parquet; once for each pass."""
    names = ["input_ids", "entropy", "surprisal", "topk_ids", "topk_logprobs"]
    for first in range(teacher.passes):
        rows: list[dict[str, list[float]]] = []
        for start in range(0, len(ids_NL), BATCH):
            actual = torch.from_numpy(ids_NL[start : start + BATCH].astype(np.int64)).to(teacher.device)
            inputs = actual.clone()
            if teacher.context == "masked":
                inputs[:, first :: teacher.passes] = teacher.mask_id
            with autocast(teacher):
                logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits
            p = logits.float().softmax(-1)
            log_p = p.log()
            entropy = -(p * log_p).sum(-1)
            surprisal = -log_p.gather(-1, actual[..., None]).squeeze(-1)
            top = log_p.topk(teacher.top_k)
            columns = [actual, entropy, surprisal, top.indices.flatten(1), top.values.flatten(1)]
            for values in zip(*(column.tolist() for column in columns), strict=True):
                rows.append(dict(zip(names, values, strict=True)))
        pq.write_table(pa.Table.from_pylist(rows), path)


def minicons_scorer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, teacher: Teacher, ids_L: np.ndarray
) -> Callable[[], object] | None:
    """minicons' surprisals of one sequence, in which it masks one token a pass; None where it is not installed."""
    try:
        from minicons.scorer import MaskedLMScorer
    except ImportError:
        print("minicons is not installed and left out: pip install 'entropy-masking[bench]'", file=sys.stderr)
        return None
    scorer = MaskedLMScorer(model, str(model.device), tokenizer=tokenizer)
    ids_1L = torch.from_numpy(ids_L.astype(np.int64))[None].to(teacher.device)
    encoding = BatchEncoding({"input_ids": ids_1L, "attention_mask": torch.ones_like(ids_1L)})

    def score() -> object:
        with autocast(teacher):
            return scorer.compute_stats(scorer.prepare_text(encoding))

    return score


def costs(teachers: dict[str, Teacher], rows: dict[str, Row], args: argparse.Namespace) -> dict[str, Row]:
    """FLOPs of a token, and on a GPU their share of its peak."""
    peak, costs = peak_flops(args.dtype), {}
    for context, teacher in teachers.items():
        encoder, head = forward_flops(teacher.masked_lm, args.sequence_length)
        flops = encoder * teacher.passes / args.sequence_length + head
        share = flops * (rows[f"ours_{context}"].value or 0) / peak if peak else None
        costs[f"flops_{context}"], costs[f"share_of_peak_{context}"] = (
            row(flops, "FLOPs/token"),
            Row(share, "of the peak"),
        )
    return costs


# --- a job and its shards --------------------------------------------------------------------------------------------


def overhead(teacher: Teacher, texts: list[str], tokens: int, args: argparse.Namespace, work: Path) -> dict[str, Row]:
    """A job of one worker on Ray: its seconds outside the model by its own records, and against a loop here.

    Trust the first figure: the loop runs after the job, when the machine may be busier or idler.
    """
    job: list[object] = ["--workers", 1, "--cpus-per-worker", args.threads, "--shard-tokens", max(1, tokens // SHARDS)]
    job += ["--sequence-length", args.sequence_length, "--top-k", TOP_K]
    flags = scoring(write_texts(texts, work / "job.jsonl"), work / "job", args)
    last_line("the job of the bench", ROOT / "pipeline" / "score.py", *flags, *job)
    manifest = read_manifest(str(work / "job"))
    seconds = 0.0
    for entry in manifest.shards:
        ids_NL = column_2d(read_table(manifest, entry, ["input_ids"]), "input_ids", manifest.sequence_length)
        started = now()
        teacher.score(ids_NL)
        seconds += now() - started
    records = list(commit.read_records(manifest.uri).values())
    begun = min(record.ended - record.seconds for record in records)
    wall = max(record.ended for record in records) - begun  # of the one worker, its pauses included
    job_rate, loop_rate = manifest.totals["tokens"] / wall, manifest.totals["tokens"] / seconds
    return {
        "job_seconds": row(wall, "s"),
        "job_shards": row(len(manifest.shards), "shards"),
        "job_outside_model": row(1 - manifest.totals["forward_seconds"] / wall, "of the worker's time", at_most=0.03),
        "job": row(job_rate, "tokens/s"),
        "loop": row(loop_rate, "tokens/s"),
        "job_to_loop": row(job_rate / loop_rate, "×", at_least=0.97),
    }


def sizes(texts: list[str], args: argparse.Namespace, work: Path) -> dict[str, Row]:
    """Bytes a token of a scan shard, of the same as fp32 and int64, and of exact targets with their scan."""
    scan, plan, targets = work / "scan", work / "plan", work / "targets"
    one = ["--shard-tokens", 1 << 30, "--sequence-length", args.sequence_length, "--top-k", TOP_K, "--backend", "local"]
    quietly(pipeline.score.main, *scoring(write_texts(texts, work / "sizes.jsonl"), scan, args), *one)
    quietly(train.plan.main, "--shards", scan, "--entropy-source", "parquet", *MASKS, "--output", plan)
    masks = ["--masks", plan, "--top-k", TARGET_TOP_K, "--backend", "local"]
    quietly(pipeline.score.main, *scoring(scan, targets, args), *masks)

    manifest = read_manifest(str(scan))
    (entry,) = manifest.shards
    whole = read_table(manifest, entry, parquet.schema(manifest.vocab_size, scored=True, top_k=TOP_K).names)
    plain = whole.drop_columns(list(parquet.TOP_K_COLUMNS))
    plain_bytes = len(parquet.to_parquet(parquet.row_groups(plain)))
    target_bytes = read_manifest(str(targets), kind="targets").totals["bytes"]
    return {
        "scan_top_k_bytes": row(entry.bytes / entry.tokens, "B/token"),
        "scan_bytes": row(plain_bytes / entry.tokens, "B/token", at_most=5.1),
        "wide_scan_top_k_bytes": row(wide_bytes(whole) / entry.tokens, "B/token"),
        "wide_scan_bytes": row(wide_bytes(plain) / entry.tokens, "B/token"),
        "targets_bytes": row(target_bytes / entry.tokens, "B/token"),
        "targets_and_scan_bytes": row((target_bytes + plain_bytes) / entry.tokens, "B/token", at_most=24),
    }


def scoring(corpus: Path, output: Path, args: argparse.Namespace) -> list[object]:
    """Flags of pipeline/score.py for the teacher as it is measured here."""
    named = ["--corpus", corpus, "--teacher", args.teacher, "--output", output]
    return [*named, "--dtype", args.dtype, "--batch-tokens", args.batch_tokens, "--cpus-per-worker", args.threads]


def quietly(main: Callable[[list[str]], Any], *flags: object) -> None:
    """Call an entry point without its summary and progress."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main([str(flag) for flag in flags])


def wide_bytes(table: pa.Table) -> int:
    """Bytes of the same content as pyarrow writes it by default, as float32 and int64."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.cast(pa.schema([pa.field(field.name, wide_type(field.type)) for field in table.schema])), sink)
    return sink.getvalue().size


def wide_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(wide_type(kind.value_type))
    return pa.float32() if pa.types.is_floating(kind) else pa.int64()


if __name__ == "__main__":
    console.run(main)
