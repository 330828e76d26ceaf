"""Entropy masking in anyone's ``transformers.Trainer``: rows with scores → stock batches. See docs/own-loop.md.

Shapes: B rows, l tokens of one row, L tokens of the longest row, P predicted positions.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropy_masking.masking.masker import IGNORED_LABEL, Masker
from entropy_masking.masking.noise import sequence_hash
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.words import continuing_tokens
from entropy_masking.shards.manifests import vocabulary_size

Row = Mapping[str, Sequence[float] | Tensor]  # a row of ``datasets``, in any of its formats


class EntropyMaskingCollator(TrainerCallback):
    """Replaces ``DataCollatorForLanguageModeling`` for rows with scores.

    A row's mask depends on the policy, the row, its id and the epoch: not on the batch, its padding or the worker.
    Pass the collator to Trainer as a callback too, so that the masks change with the epoch; otherwise set ``epoch``
    yourself. Set ``remove_unused_columns=False``, or Trainer drops the scores.

    Args:
        tokenizer: defines the special tokens and, for the word unit, the tokens that continue a word.
        policy: which positions to mask, by entropy or by surprisal.
        pad_to_multiple_of: the length of a batch is a multiple of this.

    Attributes:
        epoch: each epoch has its own masks.

    Raises:
        ValueError: the tokenizer has no [MASK] or padding token, or does not mark words (word unit). Or the policy has
            a warm-up or a ramp, masks by excess, or masks and predicts by different scores.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, policy: MaskPolicy | None = None, pad_to_multiple_of: int = 1
    ) -> None:
        if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError("this tokenizer has no mask or no padding token; use one of a masked language model")
        self.policy, self.pad_to_multiple_of = policy or MaskPolicy(), pad_to_multiple_of
        if self.policy.uses_scores and self.policy.by == "excess":
            raise ValueError("excess needs the student's loss, which a collator does not know; use another score")
        if not self.policy.predicts_all and self.policy.predict_by not in ("random", self.policy.by):
            raise ValueError(
                f"rows have only {self.policy.by}, so {self.policy.predict_by} cannot choose the predicted positions; "
                "use random or the same score"
            )
        if self.policy.warmup or self.policy.ramp:
            raise ValueError("a collator does not know the progress of the run; set the policy's warmup and ramp to 0")
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # loader workers may outlive an epoch
        size = vocabulary_size(tokenizer)
        self.masker = Masker(
            vocab_size=size,
            special_token_ids=tokenizer.all_special_ids,
            mask_id=tokenizer.mask_token_id,
            pad_id=tokenizer.pad_token_id,
            continues_V=continuing_tokens(tokenizer, size) if self.policy.unit == "word" else None,
        )

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: object
    ) -> None:
        self.epoch = int(state.epoch or 0)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Mask a batch.

        Args:
            rows: with input_ids [l]; the policy's score (entropy or surprisal) [l] in nats, NaN where there is none;
                and sequence_id (int) if rows have ids. Other columns are ignored.

        Returns:
            input_ids, attention_mask and labels (-100 where nothing is masked), int64 [B, L], with L rounded up to a
            multiple of ``pad_to_multiple_of``.

        Raises:
            ValueError: a row lacks its scores, or has a different number of scores than tokens.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        # two extra columns, cut off below: K assumes special tokens at both ends, and these rows may have none
        ids_BL = _padded(rows, "input_ids", length + 2, torch.int64, self.masker.pad_id)
        attended_BL = ids_BL != self.masker.pad_id
        if all("sequence_id" in row for row in rows):
            sequence_id_B = torch.tensor([row["sequence_id"] for row in rows])
        else:
            sequence_id_B = sequence_hash(ids_BL, attended_BL)
        batch = {"input_ids": ids_BL, "sequence_id": sequence_id_B, "epoch": self._epoch.expand(len(rows))}
        if self.policy.uses_scores:
            _check_scores(rows, self.policy.by)
            batch[self.policy.by] = _padded(rows, self.policy.by, length + 2, torch.float32, torch.nan)
        masked = self.masker(batch, self.policy)
        labels_BL = torch.full_like(ids_BL, IGNORED_LABEL)
        # an ignored position (-1) writes to the last column, which is cut off
        labels_BL.scatter_(1, masked["positions_BP"] % (length + 2), masked["labels_BP"])
        output = {"input_ids": masked["input_ids"], "attention_mask": attended_BL.long(), "labels": labels_BL}
        return {name: tensor_BL[:, :length].contiguous() for name, tensor_BL in output.items()}


def _check_scores(rows: Sequence[Row], name: str) -> None:
    for row in rows:
        if name not in row:
            problem = f"a row has no {name}, only {', '.join(row)}"
            raise ValueError(f"{problem}; give Trainer's arguments remove_unused_columns=False")
        if len(row[name]) != len(row["input_ids"]):
            raise ValueError(f"a row has {len(row['input_ids'])} tokens and {len(row[name])} numbers of {name}")


def _padded(rows: Sequence[Row], name: str, length: int, dtype: torch.dtype, value: float) -> Tensor:
    columns = [torch.as_tensor(row[name], dtype=dtype) for row in rows]
    column_BL = pad_sequence(columns, batch_first=True, padding_value=value)
    return F.pad(column_BL, (0, length - column_BL.shape[1]), value=value)
