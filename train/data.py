"""Shards → batches: a shuffle that is a pure function of (seed, epoch, global batch), so a run resumes by index.

Decoding Parquet takes most of the time, so ranks and loader workers must share it. Each of them always prepares the
same part of the global batches. So each part has its own lanes of the epoch, and a process decodes only its lanes.

Shapes: B rows of a batch, L tokens, P predicted positions of a row, T tokens that a teacher names.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from entropy_masking import storage
from entropy_masking.errors import RunError
from entropy_masking.masking.masker import Masker
from entropy_masking.masking.noise import hash_order
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards.parquet import ROW_GROUP
from entropy_masking.shards.read import Rows, read_block, read_targets, to_tensors
from entropy_masking.shards.schema import Manifest
from entropy_masking.shards.targets import input_crc32
from train.progress import score_sums
from train.split import Part

LANES_OF_BATCH = 8  # lanes that feed a global batch: up to so many ranks share the decoding
TURNS = 4  # batches until the same lanes feed one again: up to so many workers of a rank share the decoding
LANES = LANES_OF_BATCH * TURNS
REMOTE_READS = 8  # row groups that are read at once from an object store: eight answers take as long as one
ORDER_STREAM = 1


class TrainingSequences(Dataset[dict[str, Tensor]]):
    """The sequences of a whole run, epoch after epoch, as a map from the position in the run to a sequence.

    Order of an epoch: row groups are shuffled, then the rows of each. This sequence of rows is cut into ``LANES``
    lanes, whose lengths differ by at most an eighth of a batch. Each eighth of a global batch takes the next rows of
    one lane, and four consecutive batches use all lanes. So a batch has rows of about eight row groups, and four
    batches of about 32.

    Example: an epoch has 64 rows, and a batch has 8. Each of the 32 lanes has two rows: lane i has rows 2i and 2i + 1.
    Batches 0 to 3 take the even rows: 0, 2, … 14; 16, 18, … 30; 32, … 46; 48, … 62. Batches 4 to 7 take the odd rows.

    A row group is decoded when its first row is needed, into the memory of one that its lane has passed. So memory does
    not grow with the corpus: it holds one row group per lane that this process reads, and those of one batch.

    Args:
        parts: the rows to train on.
        columns: the columns to read besides ``sequence_id`` and ``input_ids``.
        size: sequences of the whole run.
        batch: sequences of a global batch; the order depends on it, but not on how ranks and workers share it.
        seed: of the order.
        prepare: turns a raw batch into the inputs of the model, in the loader worker. A raw batch has ``input_ids``
            [B, L], ``sequence_id``, ``epoch`` and ``progress`` (place in the run, from 0 to 1) [B], and by ``columns``
            ``entropy``, ``surprisal`` and ``temperature_lse`` [B, L] and ``topk_*`` [B, L, k].
        targets: a target directory; its rows are added to the raw batch (see ``read_targets``). Then ``epoch``, which
            decides the mask, is the variant e mod R.
        temperature: T of the targets' top k.
    """

    def __init__(
        self,
        manifest: Manifest,
        parts: list[Part],
        columns: Sequence[str],
        *,
        size: int,
        batch: int,
        seed: int,
        prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        targets: Manifest | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.manifest, self.columns, self.targets, self.temperature = manifest, columns, targets, temperature
        self.size, self.batch, self.seed, self.prepare = size, batch, seed, prepare
        self.target_shards = {entry.index: entry for entry in targets.shards} if targets else {}
        self.groups = [(part.entry, group, rows) for part in parts for group, rows in part.groups()]
        self.sizes = [rows.stop - rows.start for *_, rows in self.groups]
        self.rows = sum(self.sizes)
        # lane i takes the positions from borders[i] to borders[i + 1] of every TURNS batches
        self.borders = [-(-lane * batch // LANES_OF_BATCH) for lane in range(LANES + 1)]
        self._order_of: tuple[int, list[int], list[int], list[int]] | None = None  # of the epoch used last
        self._reading: dict[int, tuple[int, int]] = {}  # by lane: (epoch, row group)
        self._decoded: dict[tuple[int, int], Rows] = {}  # by (epoch, row group)
        self._free: list[Rows] = []  # memory of row groups that are no longer needed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """The batch at these positions of the run."""
        places = [self._locate(index) for index in indices]
        self._decode(places)
        parts: list[Rows] = []
        for (epoch, _, group), run in groupby(places, key=lambda place: place[:3]):
            offsets = [offset for *_, offset in run]
            part = {name: array[offsets] for name, array in self._decoded[epoch, group].items()}
            parts.append(part | {"epoch": np.full(len(offsets), self._mask_epoch(epoch), np.int64)})
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        progress_B = torch.tensor(indices, dtype=torch.float64) / self.size
        return self.prepare(to_tensors(joined) | {"progress": progress_B})

    def _mask_epoch(self, epoch: int) -> int:
        return epoch % self.targets.masks["variants"] if self.targets and self.targets.masks else epoch

    def _locate(self, index: int) -> tuple[int, int, int, int]:
        """(epoch, lane, row group, offset in the shuffled row group) of a position of the run."""
        epoch = index // self.rows
        order, starts, firsts = self._order(epoch)
        lane = index % self.borders[-1] * LANES_OF_BATCH // self.batch
        row = firsts[lane] + self._fed(lane, index) - self._fed(lane, epoch * self.rows)
        place = bisect_right(starts, row) - 1
        return epoch, lane, order[place], row - starts[place]

    def _fed(self, lane: int, index: int) -> int:
        """How many positions before this one take their row from a lane."""
        cycles, rest = divmod(index, self.borders[-1])
        first, last = self.borders[lane : lane + 2]
        return cycles * (last - first) + min(max(rest - first, 0), last - first)

    def _order(self, epoch: int) -> tuple[list[int], list[int], list[int]]:
        """The row groups of an epoch in their order, the first row of each, and the first row of each lane."""
        if not self._order_of or self._order_of[0] != epoch:
            order = hash_order(self.seed, ORDER_STREAM, epoch, size=len(self.groups)).tolist()
            starts = np.cumsum([0, *(self.sizes[group] for group in order)])[:-1].tolist()
            before, after = ([self._fed(lane, e * self.rows) for lane in range(LANES)] for e in (epoch, epoch + 1))
            firsts = np.cumsum([0, *np.subtract(after, before)])[:-1].tolist()
            self._order_of = epoch, order, starts, firsts
        return self._order_of[1:]

    def _decode(self, places: list[tuple[int, int, int, int]]) -> None:
        """Forget the row groups that no lane needs any more, then decode those of these places."""
        self._reading |= {lane: (epoch, group) for epoch, lane, group, _ in places}
        needed = {(epoch, group) for epoch, _, group, _ in places}
        kept = needed | set(self._reading.values())
        self._free += [self._decoded.pop(key) for key in self._decoded.keys() - kept]
        new = sorted(needed - self._decoded.keys())
        memory = [self._free.pop() if self._free else {} for _ in new]
        with ThreadPoolExecutor(REMOTE_READS if storage.is_remote(self.manifest.uri) else 1) as pool:
            read = pool.map(lambda key, rows: self._read(key[0], key[1], rows), new, memory)
            self._decoded |= zip(new, read, strict=True)  # raises the errors of reads

    def _read(self, epoch: int, group: int, memory: Rows) -> Rows:
        """The shuffled rows of a row group, joined with their targets, in the memory of an earlier one if there is one.

        Raises RunError like ``read_block``.
        """
        entry, block, own = self.groups[group]
        rows = read_block(self.manifest, entry, self.columns, block)
        if self.targets:
            variant, target_entry = self._mask_epoch(epoch), self.target_shards[entry.index]
            rows |= read_targets(self.targets, target_entry, rows, block, variant, self.temperature)
        shuffled = own.start + hash_order(self.seed, ORDER_STREAM, epoch, group, size=self.sizes[group]).numpy()
        # new arrays for each row group would fragment the heap
        memory = memory or {name: np.empty((ROW_GROUP, *array.shape[1:]), array.dtype) for name, array in rows.items()}
        for name, array in rows.items():
            # with mode="raise", numpy would write through a copy
            array.take(shuffled, 0, out=memory[name][: len(shuffled)], mode="clip")
        return memory


class PrepareBatch:
    """Prepares a raw batch in a loader worker. A class, because it is pickled for workers that are not forked.

    Args:
        by_student: the batch is masked later, on the device, by the student's scores.
        padded: whether batches get an attention mask; None gives one to batches with padding.
    """

    def __init__(self, masker: Masker, policy: MaskPolicy, by_student: bool, padded: bool | None) -> None:
        self.masker, self.policy, self.by_student, self.padded = masker, policy, by_student, padded

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["padded"] = self.masker.attention_mask(batch) is not None if self.padded is None else self.padded
        if "excess" in (self.policy.by, self.policy.predict_by) and "surprisal" in batch:
            batch["reference"] = batch["surprisal"]
        if self.by_student:
            batch.pop("surprisal", None)
            batch["all_random"] = not self.policy.share_at(batch["progress"]).any()  # here it waits for no device
            # a GPU may not support every integer type
            return batch | {name: batch[name].long() for name in ("topk_ids",) if name in batch}
        masked: dict[str, Any] = self.masker(batch, self.policy)
        if (by := self.policy.by) in batch and not self.policy.uniform:
            candidates_BL = self.masker.candidates(batch["input_ids"])
            masked["score_sums"] = score_sums(by, batch[by], candidates_BL, masked["positions_BP"])
        return masked | _targets(batch, masked) if "input_crc32" in batch else masked


def whole_batch(batch: Any) -> Any:
    """Collator: the dataset already returns batches."""
    return batch


def _targets(batch: dict[str, Tensor], masked: dict[str, Tensor]) -> dict[str, Tensor]:
    """The targets of a masked batch. Raises RunError if the teacher saw other inputs or other masked positions."""
    crc32_B = torch.from_numpy(input_crc32(masked["input_ids"].numpy()).astype(np.int64))
    same_B = (crc32_B == batch["input_crc32"]) & (masked["positions_BP"] == batch["target_positions"]).all(1)
    if not same_B.all():
        sequence = int(batch["sequence_id"][~same_B][0])
        raise RunError(
            f"the targets of sequence {sequence} were made for another masked input; make targets for these shards "
            "with pipeline/score.py --mask-source"
        )
    shapes = {"teacher_ids": "BPT", "teacher_logprobs": "BPT", "temperature_lse": "BP"}
    return {f"{name}_{shape}": batch[name] for name, shape in shapes.items() if name in batch}
