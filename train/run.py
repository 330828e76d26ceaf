#!/usr/bin/env python3
r"""Train a masked LM on a shard directory. Masks are chosen by the teacher's scores, the student's, or at random.

python train/run.py --shards runs/scored --entropy-source parquet --output-dir runs/student
python train/run.py --shards runs/scored --entropy-source parquet --distill-weight 0.5 --output-dir runs/student-kd
python train/run.py --shards runs/scored --entropy-source self --model mini --max-steps 10000 --output-dir runs/self
python train/run.py --shards runs/tokens --entropy-source random --output-dir runs/reference
python train/run.py --shards runs/scored --entropy-source parquet --targets runs/targets --distill-weight 0.5 \
    --output-dir runs/student-exact
torchrun --nproc-per-node 2 train/run.py --shards runs/scored --entropy-source parquet --output-dir runs/student
python train/run.py --num-workers 2 --shards runs/scored --entropy-source parquet --output-dir runs/student

The same command resumes an interrupted run.
"""

import math
import os
import shutil
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the checkout

from entropy_masking.commands import console
from train.options import parse

if __name__ == "__main__":
    console.check_flags(lambda: parse(sys.argv[1:], __doc__))  # before the imports that take seconds

from transformers import SchedulerType, TrainingArguments
from transformers.utils import logging

from entropy_masking import storage
from entropy_masking.cards import model_card
from entropy_masking.shards.manifests import copy_tokenizer
from entropy_masking.summary import Summary
from train import cluster, resume
from train.arguments import global_batch, refused_by_transformers, training_arguments
from train.guard import check_finite, clean_ending, on_all_ranks, on_first_rank, writing
from train.inputs import Inputs, open_inputs
from train.outline import outline
from train.results import flops_of, identity_of_run, print_losses, print_summary, summarise
from train.student import build_student, choose_attention
from train.trainer import MaskedLMTrainer

DECAY_SHARE = 0.2  # of a run's steps, at the end of the warmup_stable_decay schedule


def main(argv: list[str] | None = None) -> None:
    options, flags = parse(sys.argv[1:] if argv is None else argv, __doc__)
    args = training_arguments(options, flags)
    rank, output = args.process_index, Path(str(args.output_dir))
    logging.disable_progress_bar()  # of reading and writing weights
    with on_all_ranks(rank):
        inputs = open_inputs(options, args)
    if options.num_workers > 1:
        return cluster.run(main, options, args)
    with on_all_ranks(rank):
        set_steps(args, inputs)
        student = build_student(options.model, inputs.manifest, args.seed, options.trust_remote_code)
        if args.use_cpu and args.bf16:
            choose_attention(student, inputs.manifest.sequence_length)
        flops = flops_of(student, options, args, inputs)
        identity = identity_of_run(options, args, inputs)
    if rank == 0:
        console.note("\n".join(outline(student, options, args, inputs)))
    with on_all_ranks(rank), refused_by_transformers():  # before anything is written or deleted
        trainer = MaskedLMTrainer(student, args, options, inputs, identity)
    if options.dry_run:
        return
    if options.eval_only:
        metrics = trainer.evaluate()
        return print_losses(metrics) if rank == 0 else None
    with on_all_ranks(rank):
        _lock = resume.lock(output) if rank == 0 else None  # until this function returns
    # torchrun may have restarted these processes: then they resume their own run
    overwrite = options.overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if on_first_rank(rank, lambda: resume.claim(output, identity, overwrite)):
        if rank == 0:
            storage.write_bytes(str(output / resume.GIVEN), options.as_yaml.encode())
        train(trainer)
        metrics = trainer.evaluate() if inputs.held_out else {}
        check_finite(student, trainer.state.global_step, output)
        on_first_rank(rank, lambda: resume.check_kept(output, identity))
        if rank == 0:
            save(trainer, summary := summarise(trainer, flops, metrics))
            print_summary(output, summary, metrics)
    elif rank == 0:
        print(f"{output} is finished already; pass --overwrite to train again")


def set_steps(args: TrainingArguments, inputs: Inputs) -> None:
    """Set the number of steps, from the epochs if it is not given, and what depends on it."""
    if args.max_steps <= 0:
        rows = sum(part.rows for part in inputs.training)
        args.max_steps = max(1, math.ceil(args.num_train_epochs * rows / global_batch(args)))
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if 0 < (getattr(args, name) or 0) < 1:  # a share; Trainer would warn on a resume that it has another number
            setattr(args, name, math.ceil(getattr(args, name) * args.max_steps))
    if args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
        left = max(0, args.max_steps - args.get_warmup_steps(args.max_steps))
        decay = min(round(DECAY_SHARE * args.max_steps), left)
        args.lr_scheduler_kwargs = {"num_decay_steps": decay, "decay_type": "linear"}


def train(trainer: MaskedLMTrainer) -> None:
    """Train from the last checkpoint to the end.

    Raises:
        RunError, KeyboardInterrupt: the run ends early, on all ranks.
    """
    rank, output = trainer.args.process_index, trainer.output
    checkpoint = on_first_rank(rank, lambda: resume.last_checkpoint(output, contents=True))
    with on_all_ranks(rank):
        resume.check_visible(output, checkpoint)
        resume.check_state(checkpoint)
    if checkpoint:
        trainer.args.eval_on_start = False  # it was evaluated when the run began
        if rank == 0:
            console.note(f"resuming from {checkpoint}")
    with clean_ending(trainer.guard):
        trainer.train(str(checkpoint) if checkpoint else None)
    if trainer.guard.stopped:
        if rank:
            raise SystemExit(143)
        state = trainer.state
        print(f"stopped after step {state.global_step} of {state.max_steps}; the same command resumes", file=sys.stderr)
        raise trainer.guard.ending()


def save(trainer: MaskedLMTrainer, summary: Summary) -> None:
    """Write the model with its tokenizer, and last the summary, which marks the run as finished. Raises RunError."""
    output = trainer.output
    with writing(f"the model to {output}", output):
        new = output / resume.UNFINISHED / "model"  # a file there is no link to a file elsewhere
        trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).save_pretrained(new)
        copy_tokenizer(trainer.manifest.uri, new)
        for file in new.iterdir():
            os.replace(file, output / file.name)
        shutil.rmtree(new.parent)
        storage.write_bytes(str(output / "README.md"), model_card(summary).encode())
        storage.write_json(str(output / resume.SUMMARY), summary.model_dump(exclude_unset=True))


if __name__ == "__main__":
    console.run(main)
