"""A scoring run: its settings, checked and resolved, and the fingerprint of everything that determines its bytes."""

import argparse
import uuid
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from entropy_masking import storage
from entropy_masking.commands.mask_flags import check_scored
from entropy_masking.errors import UsageError
from entropy_masking.models import checkpoints
from entropy_masking.models.masked_lm import MaskedLM
from entropy_masking.shards import manifests, parquet
from entropy_masking.shards.fields import Fingerprint, Masks
from entropy_masking.shards.read import masker_of
from entropy_masking.shards.schema import Manifest, Run
from pipeline.corpus.plan import Corpus
from pipeline.corpus.ranges import FileRange

Shard = tuple[int, list[FileRange]]  # index and ranges
PACKAGES = ("torch", "transformers", "tokenizers", "pyarrow", "ray")  # whose versions the manifest names


@dataclass(frozen=True)
class Job:
    """The settings that a worker needs besides the shard descriptor; plain data.

    Attributes:
        manifest: that of the directory to write, with an empty list of shards.
        run_id: a name for this run of the command; attempts are counted per run.
        sequences: the shards whose tokens are scored, if the corpus is a shard directory.
        threads: torch threads of a CPU worker.
        max_attempts: a shard is given up after this many attempts that failed or ended their worker.
        shard_timeout: seconds after which the worker of a shard counts as hung and is ended.
    """

    manifest: Manifest
    run_id: str
    sequences: Manifest | None
    trust_remote_code: bool
    threads: int
    max_attempts: int
    shard_timeout: float | None

    @property
    def output(self) -> str:
        """The shard directory to write, an absolute path or a URI."""
        return self.manifest.uri

    @cached_property
    def run(self) -> Run:
        """What the directory says about this run."""
        return Run(fingerprint=self.manifest.fingerprint, shards=self.manifest.planned_shards)


@dataclass(frozen=True)
class Failure:
    """Why a shard was not committed. ``usage``: the user can correct it; ``fatal``: all other shards would fail too."""

    index: int
    error: str
    usage: bool = False
    fatal: bool = False
    traceback: str = ""


def choose_tokenizer(tokenizer: str | None, teacher: str, corpus: Corpus) -> PreTrainedTokenizerBase:
    """The tokenizer of a run: that of the corpus if it is a shard directory, else the given one, else the teacher's.

    Raises:
        UsageError: there is none, there are two, or it lacks special tokens of a masked LM.
    """
    if corpus.from_shards:
        if tokenizer:
            raise UsageError(f"{corpus.from_shards.uri} brings its own tokenizer; leave out --tokenizer")
        return manifests.shard_tokenizer(corpus.from_shards.uri)
    if not tokenizer and teacher == "none":
        raise UsageError("--teacher none needs --tokenizer (make one with pipeline/tokenizer.py)")
    loaded = checkpoints.load_tokenizer(tokenizer or teacher)
    if missing := {"pad", "cls", "sep", "mask"} - manifests.special_ids(loaded).keys():
        problem = f"the tokenizer {tokenizer or teacher} has no {', '.join(sorted(missing))} token"
        raise UsageError(f"{problem}; use one of a masked LM")
    return loaded


def new_job(args: argparse.Namespace, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Job:
    """Check the flags of ``score.py`` against the corpus, the tokenizer and the teacher.

    Raises:
        UsageError: a flag contradicts one of them.
    """
    length = sequence_length(args.sequence_length, corpus)
    fingerprint: Fingerprint = {
        "schema_version": parquet.SCHEMA_VERSION,
        "corpus": corpus.identity,
        "tokenizer": manifests.tokenization_hash(tokenizer),
        "sequence_length": length,
    }
    if args.policy:
        sequences = check_masks(args, corpus)
        masks: Masks = {"source": args.mask_source, "policy": asdict(args.policy), "variants": args.variants}
        masks["positions"] = args.policy.max_masked(length)  # K, the most masked positions of a sequence
        fingerprint |= {"masked": sequences.fingerprint_hash, "masks": masks}
    teacher = None
    if args.teacher != "none":
        teacher = checkpoints.local_checkpoint(args.teacher)
        check_teacher(teacher, args, tokenizer)
        fingerprint |= {
            "teacher": checkpoints.weights_hash(teacher),
            "context": "targets" if args.policy else args.context,
            "passes": min(args.passes, length) if args.context == "masked" and not args.policy else 1,
            "top_k": args.top_k,
            "sampled": args.sample_k is not None,
            "temperatures": args.temperatures,
            "dtype": args.dtype,
            "batch_tokens": args.batch_tokens,
            "compile": args.torch_compile,
        }
    manifest = manifests.new_manifest(
        storage.absolute(args.output),
        Run(fingerprint=fingerprint, shards=len(corpus.shards)),
        tokenizer,
        teacher=str(teacher) if teacher and Path(args.teacher).is_dir() else args.teacher if teacher else None,
        failed=corpus.from_shards.failed if corpus.from_shards else {},
        versions={name: version(name) for name in PACKAGES if find_spec(name)},
    )
    return Job(
        manifest=manifest,
        run_id=uuid.uuid4().hex,
        sequences=corpus.from_shards,
        trust_remote_code=args.trust_remote_code,
        threads=args.cpus_per_worker,
        max_attempts=args.max_attempts,
        shard_timeout=args.shard_timeout,
    )


def check_masks(args: argparse.Namespace, corpus: Corpus) -> Manifest:
    """The shards whose sequences are masked. Raises UsageError if they lack scores that the policy needs."""
    if not (sequences := corpus.from_shards):
        raise UsageError(f"--mask-source masks a shard directory, which {args.corpus} is not; score the text first")
    check_scored(args.policy, args.mask_source, sequences)
    masker_of(sequences, args.policy.unit)
    return sequences


def sequence_length(asked: int | None, corpus: Corpus) -> int:
    given = corpus.from_shards.sequence_length if corpus.from_shards else None
    if given and asked not in (None, given):
        raise UsageError(f"the corpus holds sequences of {given} tokens; leave out --sequence-length")
    length = given or asked or 128
    if length < 8:
        raise UsageError(f"--sequence-length {length} is too short; use at least 8")
    return length


def check_teacher(teacher: Path, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher that does not fit the tokenizer or the flags, by its configuration and tokenizer alone."""
    config = checkpoints.load_config(teacher, args.trust_remote_code)
    size = manifests.vocabulary_size(tokenizer)
    if size > config.vocab_size:
        problem = f"the tokenizer has {size} tokens, but {args.teacher} predicts only {config.vocab_size}"
        raise UsageError(f"{problem}; use the tokenizer that the teacher was trained with")
    if args.sample_k and args.sample_k >= size:
        raise UsageError(f"--sample-k {args.sample_k} is not below the vocabulary's {size} tokens; use --top-k {size}")
    if not 0 <= args.top_k <= size:
        raise UsageError(f"--top-k {args.top_k} is not between 0 and the vocabulary's {size} tokens")
    if checkpoints.has_tokenizer(teacher):
        own = checkpoints.load_tokenizer(str(teacher))
        if manifests.tokenizer_hash(own) != manifests.tokenizer_hash(tokenizer):
            problem = f"the tokenizer does not fit {args.teacher}, which was trained with another vocabulary"
            raise UsageError(f"{problem}; use the teacher's own tokenizer")


def check_teacher_runs(job: Job) -> None:
    """Load the teacher and run it on sequences of the job's length. Raises UsageError if it cannot be used."""
    if teacher := job.manifest.teacher:
        model = checkpoints.load_masked_lm(checkpoints.local_checkpoint(teacher), job.trust_remote_code).eval()
        MaskedLM(model, job.manifest.sequence_length, teacher)
