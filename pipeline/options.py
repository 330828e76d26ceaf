"""The flags of pipeline/score.py, parsed, filled in and checked against each other."""

import argparse
from dataclasses import dataclass
from typing import Any, Literal

import psutil

from entropy_masking.commands import ray_cluster
from entropy_masking.commands.flags import Parser, Rule, check_rules, not_negative, option, positive, positive_float
from entropy_masking.commands.mask_flags import MAX_SEED, MaskOptions, mask_policy
from entropy_masking.errors import UsageError
from entropy_masking.masking.policy import MaskPolicy
from pipeline.corpus.plan import UNITS
from pipeline.corpus.ranges import MAX_DOCUMENT_BYTES

SEED = 42  # by default, as in a training run
VARIANTS = 4  # by default, if epochs have different masks
MAX_VARIANTS = 1 << 16  # they fit a uint16
# what --help shows; --help-all shows the other flags too
GROUPS = {
    "text": "corpus text_column document limit_documents tokenizer sequence_length",
    "teacher and scores": "teacher context passes top_k dtype batch_tokens temperatures",
    "targets of distillation": "mask_source variants mask_seed sample_k",
    "output and workers": "output shard_tokens backend workers gpus_per_worker max_failed_shards",
}
# defaults of the flags that need a teacher
SCORING: dict[str, object] = {
    **{"context": "masked", "passes": 7, "top_k": 16, "dtype": "auto", "batch_tokens": 8192, "temperatures": [1.0]},
    **{"mask_source": None, "sample_k": None, "gpus_per_worker": None},
    **{"torch_compile": False, "trust_remote_code": False},
}


@dataclass(kw_only=True)
class TargetOptions(MaskOptions):
    """Which masked inputs to score."""

    mask_source: Literal["random", "parquet"] | None = option(
        "make distillation targets: mask the shards of --corpus as a student will, at random or by their scores "
        "(parquet), and score the masked positions"
    )
    variants: int | None = option(
        f"masks per sequence, R; epoch e has mask e mod R (default: {VARIANTS}, or 1 if all masks are the same)"
    )
    mask_seed: int | None = option(f"seed of the masks, independent of train/run.py --seed (default: {SEED})")


def parse(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    """Flags → settings; ``policy`` (the masks to score) replaces the mask flags. Raises UsageError."""
    parser = Parser("pipeline/score.py", description, GROUPS)
    parser.usage = "%(prog)s --corpus TEXT --teacher MODEL --output DIR …"
    add_flags(parser)
    parser.add_fields(TargetOptions)
    args = parser.parse_args(argv)
    args.as_yaml = parser.to_yaml()
    options = TargetOptions(**{name: getattr(args, name) for name in TargetOptions.__dataclass_fields__})
    args.policy = policy_of(options)
    if args.policy:
        args.variants = args.variants or (1 if args.policy.repeats() else VARIANTS)
    fill_in(args)
    return args


def policy_of(options: TargetOptions) -> MaskPolicy | None:
    """The masks to score, if any. Raises UsageError: mask flags that are out of range or contradict each other."""
    needs = "{flag} needs --mask-source, which names the source of the masks"
    check_rules(vars(options), [(not options.mask_source, dict.fromkeys(vars(options)), needs)])  # None is the default
    if not options.mask_source:
        return None
    seed = SEED if options.mask_seed is None else options.mask_seed
    if options.variants is not None and not 1 <= options.variants <= MAX_VARIANTS:
        raise UsageError(f"--variants {options.variants} is not between 1 and {MAX_VARIANTS}")
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"--mask-seed {seed} is not between 0 and {MAX_SEED}")
    return mask_policy(options, options.mask_source, seed, source_flag="--mask-source")


def add_flags(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--corpus",
        required=True,
        help="docstrings, files, a directory, a glob, hf:NAME[:CONFIG[:SPLIT]] or a shard directory",
    )
    add("--teacher", required=True, help="masked LM by path or Hub id; none writes tokens without scores")
    add("--output", required=True, help="shard directory to write, a path or an object-store URI")
    add("--tokenizer", help="path or Hub id (default: the teacher's, or that of a corpus which is a shard directory)")
    add_text_flags(parser)
    add("--sequence-length", type=positive, help="tokens per sequence, special tokens included (default: 128)")
    add("--context", choices=["masked", "full"], help="masked (default) masks the scored position, full does not")
    add("--passes", type=positive, help="with --context masked: P passes, each masks one position in P (default: 7)")
    add("--top-k", type=not_negative, help="most probable tokens to store per position; 0 for none (default: 16)")
    add(
        "--sample-k",
        type=positive,
        help="with --mask-source: store N sampled tokens in place of the top k, with weights that are p on average",
    )
    dtypes = ["auto", "bfloat16", "float16", "float32"]
    add("--dtype", choices=dtypes, help="dtype of the encoder; auto (default): bfloat16 if the hardware has it")
    add("--batch-tokens", type=positive, help="tokens in one forward (default: 8192)")
    add("--shard-tokens", type=positive, help="approximate tokens per shard (default: 262144)")
    add("--temperatures", type=temperatures, help="temperatures at which a student can distil, as in 1,2 (default: 1)")
    add("--workers", type=positive, help="maximum number of actors (default: as many as fit the cluster)")
    add("--gpus-per-worker", type=positive_float, help="GPUs of an actor, may be a fraction (default: 1 if any)")
    add("--cpus-per-worker", type=positive, help="cores of an actor without GPU (default: 1; --backend local: all)")
    add("--torch-compile", action="store_true", default=None, help="compile the model: pays on a GPU in a long run")
    add("--backend", choices=["ray", "local"], default="ray", help="local scores in this process")
    add("--max-attempts", type=positive, default=3, help="attempts before a shard is given up (default: 3)")
    add("--max-failed-shards", type=not_negative, default=0, help="failed shards that a run tolerates (default: 0)")
    add(
        "--shard-timeout",
        type=positive_float,
        help="seconds to read, score or write a shard, then its worker is ended",
    )
    add("--trust-remote-code", action="store_true", default=None, help="run model code from the checkpoint")


def add_text_flags(parser: Parser) -> None:
    """The flags that say how to read a corpus of text."""
    add = parser.add_argument
    add("--text-column", help="column or key of the text (default: text)")
    add("--document", choices=UNITS, help="unit of a document in plain-text files (default: paragraph)")
    add("--limit-documents", type=positive, help="only the first N documents of the corpus")
    add("--max-document-bytes", type=positive, help=f"reject a longer document (default: {MAX_DOCUMENT_BYTES:,})")
    add("--hash-corpus", action="store_true", default=None, help="hash local files above 1 GiB as a whole, not samples")


def text_options(args: argparse.Namespace) -> dict[str, Any]:
    """The values of these flags, for ``plan_corpus``."""
    names = ("text_column", "document", "limit_documents", "max_document_bytes", "hash_corpus")
    return {name: getattr(args, name) for name in names}


def fill_in(args: argparse.Namespace) -> None:
    """Set the defaults that depend on other flags. Raises UsageError if flags contradict each other."""
    no_teacher = "{flag} needs a teacher, but --teacher is none; leave {flag} out"
    one_pass = "--passes only applies to --context masked; leave it out with --context full"
    masked = "--mask-source says what the teacher sees; leave out --context and --passes"
    not_masked = "--sample-k needs --mask-source; use --top-k for scores of all tokens"
    sampled = "--sample-k replaces --top-k, at temperature 1; leave out --top-k and --temperatures"
    no_targets = "--mask-source stores only the teacher's predictions; set --top-k above 0"
    no_top_k = "--temperatures apply to the top-k; set --top-k above 0"
    one_worker = "--backend local has one worker, this process; leave out {flag} or use --backend ray"
    rules: list[Rule] = [
        (args.teacher == "none", dict.fromkeys(SCORING), no_teacher),
        (args.context == "full", {"passes": None}, one_pass),
        (bool(args.policy), {"context": None, "passes": None}, masked),
        (not args.policy, {"sample_k": None}, not_masked),
        (bool(args.sample_k), {"top_k": None, "temperatures": [1.0]}, sampled),
        (args.top_k == 0, {"mask_source": None}, no_targets),
        (args.top_k == 0, {"temperatures": [1.0]}, no_top_k),
        (args.backend == "local", {"workers": 1, "gpus_per_worker": None}, one_worker),
    ]
    check_rules(vars(args), rules)
    args.top_k = args.sample_k or args.top_k
    for name, default in SCORING.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.cpus_per_worker = args.cpus_per_worker or (cores() if args.backend == "local" else 1)
    ray_cluster.check_kept("--output", args.output)


def cores() -> int:
    """Physical cores of this machine; hyper-threads if it does not say."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def temperatures(text: str) -> list[float]:
    """argparse type of ``1,2``: positive numbers, ascending, 1 always among them."""
    return sorted({positive_float(part) for part in text.split(",")} | {1.0})
