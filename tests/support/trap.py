"""A teacher that fails as teachers do: remote code, copied beside a checkpoint by ``save_trap``.

Its forward looks for [UNK], which only a document with a foreign letter has, so a test decides which shard fails.
"""

import json
import os
import shutil
import time
from pathlib import Path

import torch
from transformers import BertForMaskedLM

UNKNOWN, CLS = 1, 2  # the ids of [UNK] and [CLS] in tokenizers that pipeline/tokenizer.py trains


class TrapForMaskedLM(BertForMaskedLM):
    def forward(self, input_ids=None, **others):
        if not os.path.exists(self.config.hurry):
            time.sleep(self.config.seconds_a_forward)
        # rows of text begin with [CLS], those of the trial when a model is loaded do not
        if ((input_ids == UNKNOWN).any(1) & (input_ids[:, 0] == CLS)).any():
            if self.config.trap == "exit":
                os._exit(7)
            elif self.config.trap == "hang":
                time.sleep(10_000)
            elif self.config.trap == "memory" and len(input_ids) > self.config.rows_that_fit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            elif self.config.trap == "error":
                raise ValueError("a kernel that was never written")
            elif self.config.trap == "nan":
                self.get_input_embeddings().weight.data.fill_(float("nan"))
        return super().forward(input_ids=input_ids, **others)


def save_trap(
    teacher: Path, directory: Path, trap: str, seconds_a_forward: float = 0.0, rows_that_fit: int = 0
) -> Path:
    """The checkpoint ``teacher`` with the code of this file; to be loaded with --trust-remote-code.

    Its forwards take their time until a file ``hurry`` lies beside the directory.
    """
    shutil.copytree(teacher, directory)
    shutil.copy(__file__, directory / "trap.py")
    config = json.loads((directory / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForMaskedLM": "trap.TrapForMaskedLM"}, "architectures": ["TrapForMaskedLM"]}
    config |= {"trap": trap, "seconds_a_forward": seconds_a_forward, "rows_that_fit": rows_that_fit}
    config |= {"hurry": str(directory.parent / "hurry")}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
