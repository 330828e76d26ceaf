"""A ``transformers.Trainer`` that masks batches, evaluates by entropy decile, and writes checkpoints atomically.

Shapes: B rows, L tokens, P predicted positions of a row, V vocabulary, N positions of a batch.
"""

import shutil
import time
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from entropy_masking.errors import RunError
from entropy_masking.masking.masker import Masker
from entropy_masking.masking.type_means import TypeMeans
from entropy_masking.models.masked_positions import MaskedPositions, student_scores
from entropy_masking.shards.read import columns_of, masker_of
from train import evaluation, resume
from train.arguments import global_batch
from train.data import PrepareBatch, TrainingSequences, whole_batch
from train.guard import Guard, check_finite, ignore_signals_of_group, on_all_ranks, reading, writing
from train.inputs import Inputs
from train.optimizer import MuonAdamW, hidden_matrices
from train.options import Options
from train.progress import CollapseWarnings, ProgressReport, score_sums, type_concentration

SELF_SCORES = "self_scores.pt"  # in a checkpoint: the running means of a run with self-masking


class MaskedLMTrainer(Trainer):
    """Trains a student (``train.student``) on the sequences of a shard directory.

    To Trainer a run is one epoch: the dataset has the sequences of all epochs, in order. So a run resumes by index.
    """

    # the loss of a batch is a mean over a constant number of positions, so gradient accumulation has to average
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: MaskedPositions,
        args: TrainingArguments,
        options: Options,
        inputs: Inputs,
        identity: dict[str, object],  # of the run, see ``train.results``
    ) -> None:
        self.options, self.inputs, self.identity = options, inputs, identity
        self.manifest, self.policy = inputs.manifest, inputs.policy
        self.score_name = "surprisal" if self.policy.by == "excess" else self.policy.by  # of the student's predictions
        self.masker = masker_of(self.manifest, self.policy.unit)
        self.output = Path(str(args.output_dir))
        self.guard = Guard(self.output)  # before the report, which reads its decisions
        self.report = ProgressReport(self.manifest.sequence_length)
        in_text = 0.0
        if self.policy.uses_scores:
            in_text = type_concentration(torch.from_numpy(evaluation.token_counts(self.manifest, inputs.training)))
        self.collapse = CollapseWarnings(self.policy, in_text)
        self.sequences = training_sequences(args, options, inputs, self.masker)
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.sequences,
            eval_dataset=inputs.held_out or None,  # Trainer requires one; evaluate() does not use it
            callbacks=[self.guard, self.report, self.collapse],
            optimizer_cls_and_kwargs=muon_and_adamw(model, args, options) if options.muon else None,
        )
        self.remove_callback(PrinterCallback)
        model.register_load_state_dict_post_hook(_ignore_missing_tied_weights)
        self.device_masker = self.masker.to(args.device)
        # (sum, count) of the scores since the last log, on the device, so that nothing waits for it
        self.score_sums: defaultdict[str, Tensor | float] = defaultdict(float)
        self.predicted_V = torch.zeros(self.manifest.vocab_size, dtype=torch.int64, device=args.device)
        self.type_means: TypeMeans | None = None
        if options.self_refresh == "means":
            self.type_means = TypeMeans(self.manifest.vocab_size, args.device, self.accelerator.reduce)

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The batches of the dataset, in its order. Workers use no random generator, so they need no seeds."""
        loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=self.args.train_batch_size,
            collate_fn=whole_batch,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            worker_init_fn=ignore_signals_of_group,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: object, **__: object) -> Tensor:
        """Loss of a batch that a loader worker has masked or, with ``self``, of a raw batch that is masked here."""
        masked = self.mask_by_student(inputs) if self.options.entropy_source == "self" else dict(inputs)
        for name, sum_and_count in masked.pop("score_sums", {}).items():
            self.score_sums[name] += sum_and_count
        labels_N = masked["labels_BP"].flatten()
        self.predicted_V.scatter_add_(0, labels_N.clamp_min(0), (labels_N >= 0).long())
        output = model(
            **masked,
            predict_by=self.policy.predict_by,
            predictions=self.policy.max_predicted(self.manifest.sequence_length),
            distill_weight=self.options.distill_weight,
            distill_temperature=self.options.distill_temperature,
            distill_share=self.options.distill_positions,
            measure=self.type_means is not None,
        )
        if self.type_means:
            self.type_means.add(self.state.global_step, output["tokens"], output[self.score_name])
        return output["loss"]

    def mask_by_student(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Mask by the student's scores: running means, or the scores of an extra forward after the warm-up."""
        ids_BL, all_random = batch["input_ids"], batch.pop("all_random")
        student_BL = torch.zeros_like(ids_BL, dtype=torch.float64)
        if self.type_means:
            self.type_means.update(before=self.state.global_step)
            student_BL = self.type_means.scores_of(ids_BL)
        elif not all_random:
            student, attention_BL = self.accelerator.unwrap_model(self.model), self.device_masker.attention_mask(batch)
            student_BL = student_scores(student, ids_BL, attention_BL)[self.score_name].double()
        score_BL = student_BL - batch["reference"] if self.policy.by == "excess" else student_BL
        masked: dict[str, Any] = self.device_masker(batch | {"score": score_BL}, self.policy)
        # during the warm-up the sums are 0 but present, so that all ranks reduce the same names
        counted_BL = self.device_masker.candidates(ids_BL) & (not all_random)
        masked["score_sums"] = score_sums(self.score_name, student_BL, counted_BL, masked["positions_BP"])
        return masked

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a loss with the means of scores and the concentration of masks since the last one."""
        if "loss" in logs:
            sums = self.accelerator.reduce(dict(sorted(self.score_sums.items())))
            logs |= {name: float(total / count) for name, (total, count) in sums.items() if count}
            self.score_sums.clear()
            if self.policy.uses_scores:
                logs["mask_concentration"] = type_concentration(self.accelerator.reduce(self.predicted_V))
            self.predicted_V.zero_()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Cross-entropy (nats) and accuracy on the held-out sequences under one fixed random mask.

        These are means over all masked positions and, if the shards have entropies, over each decile of the entropy,
        because easy tokens dominate the mean over all positions.
        """
        started, train_seconds = time.monotonic(), self.report.seconds()
        evaluated, args = self.inputs.evaluated, self.args
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        read = ["entropy"] * evaluated.scored
        batches = evaluation.batches(evaluated, self.inputs.held_out, read, args.eval_batch_size)
        own = [
            evaluation.outcomes(model, self.masker, batch, self.compute_loss_context_manager)
            for batch in islice(batches, args.process_index, None, args.world_size)
        ]
        model.train()
        columns = [np.concatenate(column) for column in zip(*gather_object(own), strict=True)]
        metrics = {f"eval_{name}": v for name, v in evaluation.metrics(columns, evaluated.scored).items()}
        metrics |= {"train_seconds": train_seconds, "eval_seconds": round(time.monotonic() - started, 3)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, *arguments: Any) -> None:
        """Save in another directory, and rename the checkpoint when it is whole on all ranks.

        There is no public hook: the event ``on_save`` comes after a save, so a rank would not learn that another one
        failed.

        Raises:
            AllRanksFailed: the weights are not finite, the checkpoint cannot be written, or the directory was deleted.
        """
        rank, unfinished = self.args.process_index, self.output / resume.UNFINISHED
        name = f"checkpoint-{self.state.global_step}"
        check_finite(self.accelerator.unwrap_model(self.model), self.state.global_step, self.output)
        self.log({"train_seconds": self.report.seconds()})  # for a resumed run
        means = self.type_means.state() if self.type_means else None  # on all ranks, which add up their sums
        self.args.output_dir = str(unfinished)
        try:
            with on_all_ranks(rank), writing(name, self.output):
                super()._save_checkpoint(*arguments)
                if means and self.args.should_save:
                    torch.save(means, unfinished / name / SELF_SCORES)
            with on_all_ranks(rank), writing(name, self.output):
                if self.args.should_save:
                    resume.check_kept(self.output, self.identity)
                    resume.complete(self.output, name, self.args.save_total_limit)
        except RunError:
            shutil.rmtree(unfinished, ignore_errors=True)  # it may fill the disk
            raise
        finally:
            self.args.output_dir = str(self.output)

    def _load_from_checkpoint(self, checkpoint: str, *others: Any) -> None:
        """Load the weights, and the running means of a run with self-masking. Raises AllRanksFailed."""
        with reading(self.output):
            super()._load_from_checkpoint(checkpoint, *others)
            if self.type_means:
                self.type_means.load(torch.load(Path(checkpoint, SELF_SCORES), weights_only=True))

    def _load_optimizer_and_scheduler(self, *arguments: Any) -> None:
        with reading(self.output):
            super()._load_optimizer_and_scheduler(*arguments)

    def _load_rng_state(self, *arguments: Any) -> None:
        with reading(self.output):
            super()._load_rng_state(*arguments)


def training_sequences(args: TrainingArguments, options: Options, inputs: Inputs, masker: Masker) -> TrainingSequences:
    """The dataset of a whole run."""
    manifest, policy, source = inputs.manifest, inputs.policy, options.entropy_source
    # a compiled model should get one shape: always or never an attention mask
    padded = any(part.has_padding(manifest.sequence_length) for part in inputs.training)
    top_k = options.distill_weight > 0 and inputs.targets is None
    return TrainingSequences(
        manifest,
        inputs.training,
        columns_of(policy, source, top_k=top_k, temperature=options.distill_temperature),
        size=args.max_steps * global_batch(args),
        batch=global_batch(args),
        seed=args.seed if args.data_seed is None else args.data_seed,
        prepare=PrepareBatch(masker, policy, source == "self", padded if args.torch_compile else None),
        targets=inputs.targets,
        temperature=options.distill_temperature,
    )


def muon_and_adamw(
    model: nn.Module, args: TrainingArguments, options: Options
) -> tuple[type[MuonAdamW], dict[str, object]]:
    """The class and the arguments of ``--optim muon`` for Trainer, which adds its own parameter groups."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    muon = {"lr": options.muon_learning_rate, "weight_decay": options.muon_weight_decay, "dtype": dtype}
    _, adamw = Trainer.get_optimizer_cls_and_kwargs(args)
    return MuonAdamW, {"matrices": hidden_matrices(model), "muon": muon, **adamw}


def _ignore_missing_tied_weights(model: nn.Module, keys: Any) -> None:
    """Do not report tied weights as missing: checkpoints leave them out."""
    tied = getattr(model, "all_tied_weights_keys", {})
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in tied]
