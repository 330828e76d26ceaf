"""Entropy masking in anyone's ``transformers.Trainer``: rows with scores → stock batches. See docs/own-loop.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropy_masking.masking.masker import IGNORED_LABEL, Masker
from entropy_masking.masking.noise import sequence_hash
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.words import continuing_tokens


class EntropyMaskingCollator(TrainerCallback):
    """In place of ``DataCollatorForLanguageModeling``, for rows that bring their scores.

    A row's mask depends on the policy, its id and the epoch alone: not on the batch, its padding or the loader worker.
    Pass the collator to Trainer as a callback too, so that the masks change with the epoch; otherwise set ``epoch``
    yourself. Set ``remove_unused_columns=False``, or Trainer drops the scores.

    Args:
        tokenizer: for its special tokens and, with the word unit, which tokens go on with a word.
        policy: which positions to mask, by entropy or by surprisal.
        pad_to_multiple_of: of the batch's length.

    Raises:
        ValueError: a tokenizer without [MASK] or padding, or, with the word unit, one that does not tell words apart;
            or a policy with a warm-up or ramp, or that chooses what is predicted by another score than what is masked.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, policy: MaskPolicy | None = None, pad_to_multiple_of: int = 1
    ) -> None:
        if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError("this tokenizer has no mask or no padding token; use one of a masked language model")
        self.policy, self.pad_to_multiple_of = policy or MaskPolicy(), pad_to_multiple_of
        if not self.policy.predicts_all and self.policy.predict_by not in ("random", self.policy.by):
            raise ValueError(
                f"rows bring {self.policy.by} only, so {self.policy.predict_by} cannot choose the predicted positions; "
                "use random or the same score"
            )
        if self.policy.warmup or self.policy.ramp:
            raise ValueError("a collator does not know how far the run is; set the policy's warmup and ramp to 0")
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # loader workers may outlive an epoch
        self.masker = Masker(
            vocab_size=len(tokenizer),
            special_token_ids=tokenizer.all_special_ids,
            mask_id=tokenizer.mask_token_id,
            pad_id=tokenizer.pad_token_id,
            continues_V=continuing_tokens(tokenizer, len(tokenizer)) if self.policy.unit == "word" else None,
        )

    @property
    def epoch(self) -> int:
        """Which mask of a row it gets."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Mask a batch.

        Args:
            rows: of ``datasets``, in any of its formats: input_ids [l]; entropy or surprisal [l] in nats, as the policy
                says (NaN where there is none); and, where rows have an id of their own, sequence_id (int). Other
                columns are left out.

        Returns:
            input_ids, attention_mask and labels (-100 where nothing is hidden), int64 [B, L] with L the longest row.

        Raises:
            ValueError: a row lacks its scores, or has not as many as tokens.
        """
        ids_BL = _padded([row["input_ids"] for row in rows], torch.int64, self.masker.pad_id)
        L = ids_BL.shape[1]
        length = -(-L // self.pad_to_multiple_of) * self.pad_to_multiple_of
        # two more, cut off below: k assumes a special token at both ends, which rows of other people may not have
        ids_BL = F.pad(ids_BL, (0, length + 2 - L), value=self.masker.pad_id)
        attended_BL = ids_BL != self.masker.pad_id
        batch = {"input_ids": ids_BL, "sequence_id": self._sequence_ids(rows, ids_BL, attended_BL)}
        batch["epoch"] = torch.full((len(rows),), self.epoch)
        if self.policy.uses_scores:
            scores_BL = self._scores(rows)
            batch[self.policy.by] = F.pad(scores_BL, (0, length + 2 - L), value=torch.nan)
        masked = self.masker(batch, self.policy)
        labels_BL = torch.full_like(ids_BL, IGNORED_LABEL)
        # an ignored position (-1) writes to the last column, which is cut off
        labels_BL.scatter_(1, masked["positions_BP"] % (length + 2), masked["labels_BP"])
        found = {"input_ids": masked["input_ids"], "attention_mask": attended_BL.long(), "labels": labels_BL}
        return {name: tensor_BL[:, :length].contiguous() for name, tensor_BL in found.items()}

    def _scores(self, rows: Sequence[dict[str, Any]]) -> Tensor:
        name = self.policy.by
        for row in rows:
            if name not in row:
                raise ValueError(
                    f"a row has no {name}, only {', '.join(row)}; give Trainer's arguments remove_unused_columns=False"
                )
            if len(row[name]) != len(row["input_ids"]):
                raise ValueError(f"a row has {len(row['input_ids'])} tokens and {len(row[name])} numbers of {name}")
        return _padded([row[name] for row in rows], torch.float32, torch.nan)

    def _sequence_ids(self, rows: Sequence[dict[str, Any]], ids_BL: Tensor, attended_BL: Tensor) -> Tensor:
        if all("sequence_id" in row for row in rows):
            return torch.tensor([int(row["sequence_id"]) for row in rows])
        return sequence_hash(ids_BL, attended_BL)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.epoch = int(state.epoch or 0)


def _padded(rows: list[Any], dtype: torch.dtype, value: float) -> Tensor:
    return pad_sequence([torch.as_tensor(row, dtype=dtype) for row in rows], batch_first=True, padding_value=value)
