"""A thin ``transformers.Trainer``: the entropy source, evaluation by entropy decile, checkpoints that appear whole."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
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
from train import evaluation, resume
from train.data import Columns, TrainingSequences, columns_of, masker_of
from train.guard import Guard, check_finite, heed_parent_only, together, writing
from train.masking import Masker, MaskPolicy
from train.optimizer import MuonAdamW, hidden_matrices
from train.selfmask import TypeMeans
from train.student import student_scores
from train.watch import CollapseWatch, ProgressReport, Watch, score_sums, type_concentration

SELF_SCORES = "self_scores.pt"  # of a checkpoint: the running means of a run with self-masking


class MaskedLMTrainer(Trainer):
    """Trains a student (``train.student``) on the sequences of a shard directory.

    Where the order of a run is concerned it is one epoch of Trainer over a dataset as long as the run, in sequence: the
    dataset itself knows the epochs, so that resuming is an index.

    Args:
        evaluated, held_out: the directory that is evaluated on, and its shards.
        source: ``random``, ``parquet`` (the shards' scores) or ``self`` (the student's).
        policy: which positions to mask and to predict; ``random`` needs a hard share of 0.
        distill_weight: α of the distillation loss; above 0 reads the targets or, without, the shards' top-k.
        distill_temperature: T of the distillation loss.
        distill_share: share of the predicted positions that is distilled.
        targets: a target directory for the very masks of ``policy``.
        fresh_scores: with ``self``, score each batch in a forward of its own instead of by running means.
        muon: learning rate and weight decay of Muon, which then trains the hidden matrices.
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
        distill_share: float = 1.0,
        targets: Manifest | None = None,
        fresh_scores: bool = False,
        muon: tuple[float, float] | None = None,
    ) -> None:
        self.muon = muon
        self.manifest, self.evaluated, self.held_out = manifest, evaluated, held_out
        self.source, self.policy = source, policy
        self.loss_flags = {
            "distill_weight": distill_weight,
            "distill_temperature": distill_temperature,
            "distill_share": distill_share,
            "predict_by": policy.predict_by,
            "predictions": policy.predictions(manifest.sequence_length),
        }
        self.watch, self.masker = Watch(), masker_of(manifest, policy.unit)
        guard = Guard(Path(str(args.output_dir)))  # before the report, which has to know what it decides
        # compiled models are to see one shape: an attention mask always, or never
        some_padded = any(entry.tokens < entry.rows * manifest.sequence_length for entry in shards)
        padded = some_padded if args.torch_compile else None
        sequences = TrainingSequences(
            manifest,
            shards,
            columns_of(policy, source, top_k=distill_weight > 0 and targets is None, temperature=distill_temperature),
            size=args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            prepare=_Prepare(self.masker, policy, source == "self", padded),
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
        self.collapse = CollapseWatch(policy, manifest.vocab_size)
        self.add_callback(self.collapse)
        self.device_masker = self.masker.to(self.args.device)
        self.means: TypeMeans | None = None
        if source == "self" and not fresh_scores:
            self.means = TypeMeans(manifest.vocab_size, self.args.device, self._sum_over_ranks)
        self.masked_V = torch.zeros(manifest.vocab_size, dtype=torch.int64, device=self.args.device)
        self.guard = guard
        self.saving_to: Path | None = None
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, or Muon with Trainer's AdamW for what is no hidden matrix."""
        if not self.muon or self.optimizer is not None:
            return super().create_optimizer(model)
        model = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        hidden = hidden_matrices(model)
        rest = [(n, p) for n, p in model.named_parameters() if p.requires_grad and all(p is not h for h in hidden)]
        decaying, (_, adamw) = self.get_decay_parameter_names(model), self.get_optimizer_cls_and_kwargs(self.args)
        others = [
            {
                "params": [p for n, p in rest if (n in decaying) == decays],
                "weight_decay": decays * self.args.weight_decay,
            }
            for decays in (True, False)
        ]
        self.optimizer = MuonAdamW(
            hidden,
            others,
            muon_learning_rate=self.muon[0],
            muon_weight_decay=self.muon[1],
            adamw=adamw,
        )
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a batch that a loader worker has masked or, with ``self``, of a raw one, masked on the device."""
        masked = self.mask_by_student(inputs) if self.source == "self" else dict(inputs)
        for name, sum_and_count in masked.pop("watched", {}).items():
            self.watch.add_sums(name, sum_and_count)
        labels_N = masked["labels_BP"].flatten()
        self.masked_V.scatter_add_(0, labels_N.clamp_min(0), (labels_N >= 0).long())
        output = model(**masked, **self.loss_flags, measure=self.means is not None)
        if self.means:
            name = "entropy" if self.policy.by == "entropy" else "surprisal"
            self.means.add(self.state.global_step, output["tokens"], output[name])
        return (output["loss"], output) if return_outputs else output["loss"]

    def mask_by_student(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Mask by the student's scores: running means, or of a forward of its own once the warm-up is over."""
        ids_BL, by = batch["input_ids"], self.policy.by
        random = batch.pop("random")
        score_BL = torch.zeros_like(ids_BL, dtype=torch.float64)
        if self.means:
            self.means.absorb(before=self.state.global_step)
            score_BL = self.means.of(ids_BL)
        elif not random:
            student = self.accelerator.unwrap_model(self.model)
            scores = student_scores(student, ids_BL, self.device_masker.attention_mask(batch))
            score_BL = scores["entropy" if by == "entropy" else "surprisal"].double()
        name, watched_BL = "entropy" if by == "entropy" else "surprisal", score_BL
        if by == "excess":
            score_BL = score_BL - batch["reference"]
        masked: dict[str, Any] = self.device_masker(batch | {"score": score_BL}, self.policy)
        candidates_BL = self.device_masker.candidates(ids_BL)
        if random:  # nothing is counted, but under a name: at the end of the warm-up ranks may differ
            candidates_BL = torch.zeros_like(candidates_BL)
        masked["watched"] = score_sums(name, watched_BL, candidates_BL, masked["positions_BP"])
        return masked

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        if self.args.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A logged loss comes with the seconds so far, and the means of what was watched since the last one."""
        if "loss" in logs:
            self._note_seconds()
            logs |= self.watch.means(lambda sums: self.accelerator.reduce(sums, "sum"))
            if self.policy.uses_scores:
                logs["mask_concentration"] = type_concentration(self._sum_over_ranks(self.masked_V.clone()))
            self.masked_V.zero_()
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
        labels_BP = batch.pop("labels_BP")
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        with self.compute_loss_context_manager():
            logits_BPV = model(**self._prepare_inputs(batch))["logits"].float().cpu()
        model.train(was_training)
        return evaluation.outcomes(logits_BPV, labels_BP, batch["positions_BP"], raw)

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
        """Also keeps the running means of self-masking."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.means:
            state = self.means.state()
            if self.args.should_save:
                torch.save(state, Path(output_dir) / SELF_SCORES)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.means:
            self.means.load(torch.load(Path(resume_from_checkpoint) / SELF_SCORES, weights_only=True))

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
    """What a loader worker does with a raw batch; a class, because workers may have to be sent it.

    Args:
        by_student: the batch is masked later, on the device, by the student's scores.
    """

    def __init__(self, masker: Masker, policy: MaskPolicy, by_student: bool, padded: bool | None) -> None:
        self.masker, self.policy, self.by_student, self.padded = masker, policy, by_student, padded

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["padded"] = self.masker.attention_mask(batch) is not None if self.padded is None else self.padded
        if "excess" in (self.policy.by, self.policy.predict_by) and "surprisal" in batch:
            batch["reference"] = batch["surprisal"]
        if self.by_student:
            batch.pop("surprisal", None)
            batch["random"] = not self.policy.share_at(batch["progress"]).any()  # known here, without a wait
            # a GPU may not know every type of integer
            return batch | {name: batch[name].long() for name in ("topk_ids",) if name in batch}
        masked: dict[str, Any] = self.masker(batch, self.policy)
        if (by := self.policy.by) in batch and not self.policy.uniform:
            candidates_BL = self.masker.candidates(batch["input_ids"])
            masked["watched"] = score_sums(by, batch[by], candidates_BL, masked["positions_BP"])
        return masked | _targets(batch, masked) if "input_crc32" in batch else masked


def _targets(batch: dict[str, Tensor], masked: dict[str, Tensor]) -> dict[str, Tensor]:
    """The teacher's part of a batch that was joined with targets, once its input is known to be what the teacher saw.

    Raises:
        RunError: an input or its masked positions are not those of the targets.
    """
    crc32_B = torch.from_numpy(input_crc32(masked["input_ids"].numpy()).astype(np.int64))
    same_B = (crc32_B == batch["input_crc32"]) & (masked["positions_BP"] == batch["planned_positions"]).all(1)
    if not same_B.all():
        sequence = int(batch["sequence_id"][~same_B][0])
        raise RunError(
            f"the masked input of sequence {sequence} is not the one that its targets were made for; plan the masks of "
            "these shards with train/plan.py and score them anew"
        )
    names = {"teacher_ids": "teacher_ids_BPT", "teacher_logprobs": "teacher_logprobs_BPT"}
    names |= {"temperature_lse": "temperature_lse_BP"}
    return {name: batch[raw] for raw, name in names.items() if raw in batch}


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collator: the dataset hands out batches."""
    return batch
