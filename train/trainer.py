"""A thin ``transformers.Trainer``: the entropy source, evaluation by entropy decile, checkpoints that appear whole."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from pipeline.cli import RunError
from pipeline.manifests import Manifest, ShardEntry
from pipeline.masks import input_crc32
from train import evaluation, export, resume
from train.data import Columns, TrainingSequences, masker_of
from train.guard import Guard, check_finite, heed_parent_only, together, writing
from train.masking import IGNORED, Masker, MaskPolicy
from train.selfmask import Visited, turns
from train.student import student_scores
from train.watch import ProgressReport, Watch, mask_overlap, rank_correlation, score_sums

LAST = -1e4  # nats: a score that is ranked behind all others
SELF_SCORES = "self_scores.pt"  # of a checkpoint: what a run with self-masking keeps of its sequences


class MaskedLMTrainer(Trainer):
    """Trains a student (``train.student``) on the sequences of a shard directory.

    Where the order of a run is concerned it is one epoch of Trainer over a dataset as long as the run, in sequence: the
    dataset itself knows the epochs, so that resuming is an index.

    Args:
        evaluated, held_out: the directory that is evaluated on, and its shards.
        source: ``random``, ``parquet`` (the shards' entropies) or ``self`` (the student's, on the unmasked batch).
        policy: which positions to mask; ``random`` needs τ = ∞.
        distill_weight: α of the distillation loss; above 0 reads the targets or, without, the shards' top-k.
        distill_temperature: T of the distillation loss.
        targets: a target directory for the very masks of ``policy``.
        self_warmup_steps: with ``self``, mask at random for so many steps, while the student knows nothing.
        visited: with ``self``, what is kept of the sequences; with a memory of scores, those rank the tokens, without
            one a forward of its own does.
    """

    # the loss of a batch is a mean over a constant number of positions, so gradient accumulation has to average
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        manifest: Manifest,
        shards: list[ShardEntry],
        evaluated: Manifest,
        held_out: list[ShardEntry],
        source: str,
        policy: MaskPolicy,
        distill_weight: float = 0.0,
        distill_temperature: float = 1.0,
        targets: Manifest | None = None,
        self_warmup_steps: int = 0,
        visited: Visited | None = None,
    ) -> None:
        self.manifest, self.evaluated, self.held_out = manifest, evaluated, held_out
        self.source, self.policy = source, policy
        self.distill_weight, self.distill_temperature = distill_weight, distill_temperature
        self.self_warmup_steps, self.visited, self.watch = self_warmup_steps, visited, Watch()
        self.masker = masker_of(manifest, policy.unit)
        guard = Guard(Path(str(args.output_dir)))  # before the report, which has to know what it decides
        # compiled models are to see one shape: an attention mask always, or never
        some_padded = any(entry.tokens < entry.rows * manifest.sequence_length for entry in shards)
        padded = some_padded if args.torch_compile else None
        sequences = TrainingSequences(
            manifest,
            shards,
            Columns(
                **{policy.by: source == "parquet" or bool(visited and manifest.scored)},
                top_k=distill_weight > 0 and targets is None,
                temperature=distill_temperature,
            ),
            size=args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            prepare=_Prepare(self.masker, None if source == "self" else policy, padded),
            targets=targets,
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=sequences,
            eval_dataset=held_out or None,  # type: ignore[arg-type]  # read by evaluate() alone
            data_collator=_as_it_is,  # type: ignore[arg-type]
            callbacks=[guard, ProgressReport(manifest.sequence_length)],
        )
        self.device_masker = self.masker.to(self.args.device)
        self.guard = guard
        self.saving_to: Path | None = None
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a batch that a loader worker has masked or, with ``self``, of a raw one, masked on the device."""
        masked = self.mask_by_student(inputs) if self.visited else dict(inputs)
        for name, sum_and_count in masked.pop("watched", {}).items():
            self.watch.add_sums(name, sum_and_count)
        output = model(**masked, distill_weight=self.distill_weight, distill_temperature=self.distill_temperature)
        if self.visited:
            self._note_visit(inputs, masked, output)
        return (output["loss"], output) if return_outputs else output["loss"]

    def mask_by_student(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Mask by the student's scores, kept or fresh, at random during the warm-up; and watch what becomes of it."""
        assert self.visited
        ids_BL, memory, by = batch["input_ids"], self.visited.memory, self.policy.by
        warming = self.state.global_step < self.self_warmup_steps
        self.visited.absorb(before=self.state.global_step)
        sequence_id_B, ids_on_host_BL = batch["on_host"]
        row_B = self.visited.rows_of(sequence_id_B)
        score_BL = None
        if memory:
            score_BL = _sent(memory.estimate(row_B, torch.from_numpy(ids_on_host_BL)), ids_BL.device)
        elif not warming:
            student = self.accelerator.unwrap_model(self.model)
            score_BL = student_scores(student, ids_BL, self.device_masker.attention_mask(batch))[by]
        policy = replace(self.policy, temperature=float("inf"), band=(0.0, 1.0)) if warming else self.policy
        candidates_BL, ranked_BL = self.device_masker.candidates(ids_BL), score_BL
        if memory and score_BL is not None:
            turn_BR = turns(batch["sequence_id"], batch["epoch"], ids_BL.shape[1], memory.every)
            turn_BL = torch.zeros_like(candidates_BL).scatter(1, turn_BR.clamp_min(0), True)
            ranked_BL = score_BL.masked_fill(turn_BL, LAST)
        masked: dict[str, Any] = self.device_masker(batch if ranked_BL is None else batch | {by: ranked_BL}, policy)

        positions_BK = masked["positions_BK"]
        if memory:
            visible_BL = candidates_BL.scatter(1, positions_BK.clamp_min(0), False)
            masked["scored_BR"] = turn_BR.where(visible_BL.gather(1, turn_BR.clamp_min(0)), IGNORED)
        before_BK = _sent(self.visited.last_NK[row_B].long(), ids_BL.device)
        self.watch.add("mask_overlap", *mask_overlap(positions_BK, before_BK))
        if score_BL is not None and not (memory and memory.level.isnan()):
            masked["watched"] = score_sums(by, score_BL, candidates_BL, positions_BK)
            if by in batch:
                rho_B, known_B = rank_correlation(score_BL, batch[by], candidates_BL)
                self.watch.add("teacher_rank_correlation", rho_B, known_B)
        return masked

    def _note_visit(self, batch: dict[str, Any], masked: dict[str, Tensor], output: dict[str, Tensor]) -> None:
        """All ranks keep what each has seen: a sequence's next visit may be to another."""
        assert self.visited
        visit = {"sequence_id": batch["sequence_id"], "epoch": batch["epoch"], "positions_BK": masked["positions_BK"]}
        if self.visited.memory:
            visit |= {"input_ids": batch["input_ids"], "scored_BR": masked["scored_BR"]}
            visit["score_BR"] = output[self.policy.by]
        self.visited.note(self.state.global_step, self.accelerator.gather(visit))

    def export_entropies(self, empty: Manifest, entries: list[ShardEntry]) -> None:
        """Write the student's entropies as a shard directory: those kept of the shards trained on, or fresh ones."""
        assert self.visited
        self.visited.absorb()
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        kept = export.kept_scores(self.visited, entries) if self.visited.memory else None
        score = kept or export.fresh_scores(student, self.masker.pad_id, self.args.eval_batch_size)
        export.write(empty, self.manifest, score, self.args.process_index, self.args.world_size)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            export.finish(empty)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A logged loss comes with the seconds so far, and the means of what was watched since the last one."""
        if "loss" in logs:
            self._note_seconds()
            logs |= self.watch.means(lambda sums: self.accelerator.reduce(sums, "sum"))
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Cross-entropy (nats) and accuracy on the held-out sequences under one fixed random mask.

        Overall, and where the shards have entropies by their decile over the masked positions: a model trained on hard
        tokens is judged unfairly by the easy ones alone.
        """
        started = time.monotonic()
        self._note_seconds()
        rank, ranks = self.args.process_index, self.args.world_size
        own = [self._evaluate_batch(b) for number, b in enumerate(self._held_out_batches()) if number % ranks == rank]
        columns = [np.concatenate(column) for column in zip(*gather_object(own), strict=True)]
        metrics = {
            f"{metric_key_prefix}_{name}": value
            for name, value in evaluation.metrics(columns, self.evaluated.scored).items()
        }
        metrics[f"{metric_key_prefix}_seconds"] = round(time.monotonic() - started, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_batches(self) -> Iterator[dict[str, Tensor]]:
        columns = Columns(entropy=self.evaluated.scored)
        return evaluation.batches(self.evaluated, self.held_out, columns, self.args.eval_batch_size)

    def _evaluate_batch(self, raw: dict[str, Tensor]) -> tuple[np.ndarray, ...]:
        batch = evaluation.masked(self.masker, raw)
        labels_BK = batch.pop("labels_BK")
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        with self.compute_loss_context_manager():
            logits_BKV = model(**self._prepare_inputs(batch))["logits"].float().cpu()
        model.train(was_training)
        return evaluation.outcomes(logits_BKV, labels_BK, batch["positions_BK"], raw)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's loader; its workers draw nothing at random, so they need no seeds."""
        loader: Any = super().get_train_dataloader()
        # accelerate's is a loader around one; a resumed run takes the settings of the outer
        loader.worker_init_fn = loader.base_dataloader.worker_init_fn = heed_parent_only
        return loader

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.saving_to or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save elsewhere until the checkpoint is whole on all ranks; then it gets its name.

        Also keeps the seconds trained so far, in the state's history, for a run that is resumed.

        Raises:
            Agreed: the weights are not finite, or the checkpoint cannot be written.
        """
        output, name = Path(str(self.args.output_dir)), f"checkpoint-{self.state.global_step}"
        check_finite(self.accelerator.unwrap_model(model), self.state.global_step, output)
        self._note_seconds()
        rank, self.saving_to = self.args.process_index, output / resume.UNFINISHED
        try:
            with together(rank), writing(name, output):
                super()._save_checkpoint(model, trial)
                self.state.best_model_checkpoint = None  # it is known by its step, wherever the directory lies later
                if self.args.should_save:
                    self.state.save_to_json(str(self.saving_to / name / TRAINER_STATE_NAME))
            with together(rank), writing(name, output):
                if self.args.should_save:
                    resume.complete(output, name, self.args.save_total_limit, self._best_checkpoint())
        except RunError:
            shutil.rmtree(self.saving_to, ignore_errors=True)  # it may be what fills the disk
            raise
        finally:
            self.saving_to = None

    def _best_checkpoint(self) -> str | None:
        """The name of the checkpoint that is to be the model in the end, if it need not be the last."""
        step = self.state.best_global_step if self.args.load_best_model_at_end else None
        return f"checkpoint-{step}" if step else None

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if (best := self._best_checkpoint()) and not self.guard.stopped:
            checkpoint = Path(str(self.args.output_dir)) / best
            self.state.best_model_checkpoint = str(checkpoint) if checkpoint.exists() else None
        return super()._finalize_training(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Also keeps what self-masking knows of the sequences."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.visited:
            state = self.visited.state()
            if self.args.should_save:
                torch.save(state, Path(output_dir) / SELF_SCORES)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.visited:
            self.visited.load(torch.load(Path(resume_from_checkpoint) / SELF_SCORES, weights_only=True))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Checkpoints leave out weights that are another's, as the decoder's are the embedding's: no news."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _note_seconds(self) -> None:
        """An entry of its own in the history: a logged loss is the same in every run, its seconds are not."""
        self.state.log_history.append({"step": self.state.global_step, "train_seconds": self.train_seconds()})

    def train_seconds(self) -> float:
        """Seconds in ``train``, over all sessions of the run."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, ProgressReport)).seconds()


class _Prepare:
    """What a loader worker does with a raw batch; a class, because workers may have to be sent it."""

    def __init__(self, masker: Masker, policy: MaskPolicy | None, padded: bool | None) -> None:
        self.masker, self.policy, self.padded = masker, policy, padded

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["padded"] = self.masker.attention_mask(batch) is not None if self.padded is None else self.padded
        if self.policy is None:  # masked by the student later: a GPU may not know every type of integer
            raw: dict[str, Any] = batch | {name: batch[name].long() for name in ("topk_ids",) if name in batch}
            # nor need it be asked for what is known here: arrays stay on the host; copies, as tensors move when sent
            raw["on_host"] = tuple(batch[name].numpy().copy() for name in ("sequence_id", "input_ids"))
            return raw
        masked: dict[str, Any] = self.masker(batch, self.policy)
        if (by := self.policy.by) in batch:
            candidates_BL = self.masker.candidates(batch["input_ids"])
            masked["watched"] = score_sums(by, batch[by], candidates_BL, masked["positions_BK"])
        return masked | _targets(batch, masked) if "input_crc32" in batch else masked


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on its way to the device; from pinned memory, or the host would wait for the device."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _targets(batch: dict[str, Tensor], masked: dict[str, Tensor]) -> dict[str, Tensor]:
    """The teacher's part of a batch that was joined with targets, once its input is known to be what the teacher saw.

    Raises:
        RunError: an input or its masked positions are not those of the targets.
    """
    crc32_B = torch.from_numpy(input_crc32(masked["input_ids"].numpy()).astype(np.int64))
    same_B = (crc32_B == batch["input_crc32"]) & (masked["positions_BK"] == batch["planned_positions"]).all(1)
    if not same_B.all():
        sequence = int(batch["sequence_id"][~same_B][0])
        raise RunError(
            f"the masked input of sequence {sequence} is not the one that its targets were made for; plan the masks of "
            "these shards with train/plan.py and score them anew"
        )
    names = {"teacher_ids": "teacher_ids_BKT", "teacher_logprobs": "teacher_logprobs_BKT"}
    names |= {"temperature_lse": "temperature_lse_BK"}
    return {name: batch[raw] for raw, name in names.items() if raw in batch}


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collator: the dataset hands out batches."""
    return batch
