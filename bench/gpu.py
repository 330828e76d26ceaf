#!/usr/bin/env python3
"""All that a GPU has to show, with made weights and made text; bench/gpu.sh runs this.

Each part is a process with a time limit. Rows that a stopped part has printed count. Prints a table with the budgets,
and as its last line the same as one JSON object, which --output gets after each part.

Shapes: N positions, V vocabulary, K tokens that a teacher names.
"""

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])
NEEDED = ("accelerate", "numpy", "pyarrow", "pydantic", "torch", "transformers")
if missing := [name for name in NEEDED if not find_spec(name)]:
    print(f"error: bench/gpu.sh needs {' and '.join(missing)}; run pip install {' '.join(missing)}", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import train.run
from bench.commands import ROOT, new_parser
from bench.table import Row, device_name, in_turns, peak_bytes, print_table, reset_peak, row, to_json
from entropy_masking import entropy, storage
from entropy_masking.commands import console
from entropy_masking.errors import RunError, UsageError
from entropy_masking.losses import masked_lm_loss
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards.manifests import read_manifest
from entropy_masking.shards.parquet import SCORE_COLUMNS, TOP_K_COLUMNS
from entropy_masking.shards.read import masker_of, read_rows, to_tensors
from train.trainer import MaskedLMTrainer

SECONDS = 520.0  # of all parts
SAVE_STEPS, STEPS = 10, 30  # of the run that is killed
SPECIAL = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
# the most wanted come first
CONTESTANTS = ["random", "parquet_kd", "self", "parquet", "random_kd", "self_kd", "stock", "muon"]
POLICIES = (
    MaskPolicy.random(),
    MaskPolicy(),
    MaskPolicy.paper(),
    MaskPolicy(unit="word", by="surprisal", corruption="mask-only"),
    MaskPolicy(ratio=0.4, warmup=0.2, ramp=0.5, predict_ratio=0.2, predict_by="entropy"),
)


class Size(NamedTuple):
    """How large the models and the text are."""

    vocabulary: int  # words
    text: int  # words
    teacher: dict[str, int]  # fields of BertConfig, whose defaults are 12×768
    students: dict[str, int]  # presets, with the sequences of a step
    steps: int  # of a measured training run
    batch_tokens: int
    tokens: int  # that are scored in a round
    dtype: str


TOY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SIZES = {
    "full": Size(30_517, 1_000_000, {}, {"base": 256, "small": 128}, 20, 32_768, 65_536, "bfloat16"),
    "toy": Size(500, 10_000, TOY, {"tiny": 8}, 2, 1024, 1024, "float32"),
}


def main() -> None:
    args = parse()
    if args.part:
        return print_table(MEASURED[args.part](SIZES[args.size], args.work), {})
    started, rows = time.monotonic(), dict[str, Row]()
    versions = {name: version(name) for name in ("torch", "transformers")}
    settings: dict[str, Any] = {"size": args.size, "device": device_name(), **versions, "seconds": {}, "failed": {}}
    with tempfile.TemporaryDirectory() as work:
        environment = os.environ | {"TORCH_COMPILE_DISABLE": str(int(args.size == "toy"))}  # a CPU compiles for minutes
        for name, (limit, command) in parts(args.size, Path(work)).items():
            begun = time.monotonic()
            left = SECONDS - (begun - started)
            print(f"{begun - started:3.0f} s: {name}", file=sys.stderr, flush=True)
            found, failure = run_part(command, max(0, min(limit, left)), environment)
            rows |= {f"{name}_{own}": line for own, line in found.items()}
            settings["seconds"][name] = round(time.monotonic() - begun, 1)
            if failure:
                settings["failed"][name] = failure
            if args.output:
                storage.write_bytes(str(args.output.absolute()), f"{to_json(rows, settings)}\n".encode())
    print_table(rows, settings)
    if settings["failed"]:
        raise RunError(f"{', '.join(settings['failed'])} failed or took too long, as the last line says")


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, help="file for the JSON object")
    add("--size", choices=SIZES, default="full", help="full (default), or toy, which tests this bench on a CPU")
    add("--part", choices=MEASURED, help=argparse.SUPPRESS)
    add("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.size == "full" and not torch.cuda.is_available():
        raise UsageError("torch sees no GPU here; use a machine with one, or test this bench with --size toy")
    return args


def parts(name: str, work: Path) -> dict[str, tuple[float, list[object]]]:
    """The limit in seconds and the command of each part. What needs compilation comes last."""
    size, shards = SIZES[name], work / "scored"
    own = [__file__, "--size", name, "--work", work, "--part"]
    common = ["--teacher", work / "teacher", "--dtype", size.dtype, "--batch-tokens", size.batch_tokens]
    score = [ROOT / "pipeline" / "score.py", *common, "--corpus", work / "text.jsonl", "--backend", "local"]
    scoring = [ROOT / "bench" / "scoring.py", *common, "--shards", shards, "--tokens", size.tokens, "--rounds", 3]
    training = [ROOT / "bench" / "training.py", "--shards", shards, "--dtype", size.dtype, "--rounds", 1]
    training += ["--steps", size.steps, "--contestants", *CONTESTANTS]
    students = {model: [*training, "--model", model, "--batch", batch] for model, batch in size.students.items()}
    return {
        "inputs": (60, [*own, "inputs"]),
        "shards": (90, [*score, "--output", shards]),
        "maths": (60, [*own, "maths"]),
        "scoring": (60, scoring),
        **{model: (100, command) for model, command in students.items()},
        "evaluation": (45, [*own, "evaluation"]),
        "resume": (90, [*own, "resume"]),
        "scoring_compiled": (90, [*scoring, "--torch-compile"]),
        **{f"{model}_compiled": (150, [*command, "--torch-compile"]) for model, command in students.items()},
    }


def run_part(command: list[object], seconds: float, environment: dict[str, str]) -> tuple[dict[str, Row], str | None]:
    """The rows that a part printed last, and why it failed if it did. A part without seconds ends at once."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        words = [sys.executable, *map(str, command)]
        process = subprocess.Popen(words, stdout=output, stderr=errors, start_new_session=True, env=environment)
        failure = None
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            failure = f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its loader workers
        if process.wait() and not failure:
            errors.seek(0)
            failure = f"exit code {process.returncode}: {' '.join(errors.read().split())[-500:]}"
        output.seek(0)
        found = [json.loads(line) for line in output if line.startswith("{") and line.endswith("}\n")]
    last = found[-1] if found else {"rows": {}, "settings": {}}
    failed = [f"{name}: {reason}" for name, reason in last["settings"].get("failed", {}).items()]
    return {name: Row(**line) for name, line in last["rows"].items()}, failure or "; ".join(failed) or None


def inputs(size: Size, work: Path) -> dict[str, Row]:
    """Write a tokenizer of whole words, a teacher with random weights, and a text of random words."""
    words = [*SPECIAL.values(), *(f"w{number}" for number in range(size.vocabulary))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL).save_pretrained(work / "teacher")
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(words), **size.teacher)).save_pretrained(work / "teacher")
    numbers = size.vocabulary ** np.random.default_rng(0).random(size.text)  # the frequency falls as 1 / rank
    texts = [" ".join(f"w{number:.0f}" for number in document - 1) for document in np.split(numbers, size.text // 250)]
    (work / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {}


def maths(size: Size, work: Path) -> dict[str, Row]:
    """Entropies and losses on the device against float64 on the CPU; top k and masks against the CPU's, to the bit."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator, V = torch.Generator().manual_seed(0), len(SPECIAL) + size.vocabulary
    logits_NV, labels_N = 4 * torch.randn(512, V, generator=generator), torch.randint(V, (512,), generator=generator)
    exact = entropy.score(logits_NV.double(), labels_N, 16, [2.0])
    found = entropy.score(logits_NV.to(device), labels_N.to(device), 16, [2.0])
    teacher = labels_N, exact.topk_ids_NK, exact.topk_logprobs_NK.float()
    right = exact._asdict() | losses(logits_NV.double(), *teacher)
    own = found._asdict() | losses(logits_NV.to(device), *(tensor.to(device) for tensor in teacher))
    errors = {name: float((own[name].cpu() - values).abs().max()) for name, values in right.items()}
    rows = {f"{name}_error": row(error, "nats", at_most=1e-4) for name, error in errors.items() if "ids" not in name}
    ties_NV = logits_NV.bfloat16().float()
    ids_NK = ties_NV.sort(dim=1, descending=True, stable=True).indices[:, :16]
    rows["top_k_same"] = share([entropy.top_k_ids(ties_NV.to(device), 16).cpu().equal(ids_NK)])
    manifest = read_manifest(str(work / "scored"))
    masker = masker_of(manifest)
    masker.continues_V = torch.arange(manifest.vocab_size) % 4 == 3
    batch = to_tensors(read_rows(manifest, manifest.shards[0], [*SCORE_COLUMNS, *TOP_K_COLUMNS], [0]))
    progress_B = torch.arange(len(batch["sequence_id"])) / len(batch["sequence_id"])
    batch |= {"progress": progress_B, "epoch": (3 * progress_B).long(), "padded": torch.tensor(True)}
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    pairs = [(masker(batch, policy), masker.to(device)(moved, policy)) for policy in POLICIES]
    bits = [[masked[name].cpu().numpy().tobytes() for name in pair[0]] for pair in pairs for masked in pair]  # with NaN
    rows["masks_same"] = share([here == there for here, there in zip(bits[::2], bits[1::2], strict=True)])
    return rows


def losses(logits_NV: Tensor, labels_N: Tensor, ids_NK: Tensor, logprobs_NK: Tensor) -> dict[str, Tensor]:
    """The loss with distillation [N], and the gradient of its sum [N, V]."""
    loss_N = masked_lm_loss(logits_NV.requires_grad_(), labels_N, ids_NK, logprobs_NK, distill_weight=0.5)
    return {"loss": loss_N.detach(), "gradient": torch.autograd.grad(loss_N.sum(), logits_NV)[0]}


def share(same: list[bool]) -> Row:
    return row(sum(same) / len(same), "of all are equal", at_least=1)


def evaluation(size: Size, work: Path) -> dict[str, Row]:
    """The speed of an evaluation on nine tenths of the text, and its memory."""
    model, rows = next(iter(size.students)), dict[str, Row]()
    evaluate = MaskedLMTrainer.evaluate

    def timed(trainer: MaskedLMTrainer) -> dict[str, float]:
        reset_peak()
        (seconds,) = in_turns({model: partial(evaluate, trainer)}, 3).values()
        tokens = sum(part.rows for part in trainer.inputs.held_out) * trainer.manifest.sequence_length
        rows[model] = row(tokens / seconds, "tokens/s")
        rows[f"{model}_peak_memory"] = row(peak_bytes() / 2**20, "MiB")
        return evaluate(trainer)

    MaskedLMTrainer.evaluate = timed  # type: ignore[method-assign, assignment]
    flags = ["--shards", work / "scored", "--entropy-source", "random", "--model", model, "--output-dir", work / "none"]
    with contextlib.redirect_stdout(io.StringIO()):
        train.run.main([str(flag) for flag in (*flags, "--eval-only", "--eval-fraction", 0.9)])
    return rows


def resume(size: Size, work: Path) -> dict[str, Row]:
    """A run that is killed after its first checkpoint and continued, against one that was not, to the bit."""
    whole, killed = work / "whole", work / "killed"
    flags = ["--shards", work / "scored", "--entropy-source", "parquet", "--distill-weight", 0.5, "--eval-fraction", 0]
    flags += ["--model", list(size.students)[-1], "--max-steps", STEPS, "--save-steps", SAVE_STEPS]
    flags += ["--logging-steps", 1, "--full-determinism", "--output-dir"]
    command = [sys.executable, ROOT / "train" / "run.py", *map(str, flags)]
    run_to_its_end([*command, whole])
    process = subprocess.Popen([*command, killed], stderr=subprocess.DEVNULL)
    while process.poll() is None and not (killed / f"checkpoint-{SAVE_STEPS}").exists():
        time.sleep(0.001)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        raise RunError("the run ended before it was killed")
    run_to_its_end([*command, killed])
    logs = [storage.read_json(str(run / f"checkpoint-{STEPS}" / "trainer_state.json")) for run in (whole, killed)]
    pairs = zip(*([entry for entry in log["log_history"] if "loss" in entry] for log in logs), strict=True)
    same = [one["loss"] == other["loss"] and one["grad_norm"] == other["grad_norm"] for one, other in pairs]
    weights = [(run / "model.safetensors").read_bytes() for run in (whole, killed)]
    return {"steps_same": share(same[SAVE_STEPS:]), "weights_same": share([weights[0] == weights[1]])}


def run_to_its_end(command: list[str | Path]) -> None:
    """Run a command, and show its stderr as that of this part. Raises RunError if it fails."""
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise RunError(f"{command[1]} failed")


MEASURED = {"inputs": inputs, "maths": maths, "evaluation": evaluation, "resume": resume}

if __name__ == "__main__":
    console.run(main)
