"""The study as data: its scales, its regimes, and the architecture of all its models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import ModernBertConfig

LENGTH = 128  # tokens of a sequence


@dataclass(frozen=True)
class Scale:
    """What differs between a trial of minutes, a study of hours on a CPU, and one on a GPU.

    ``student`` and ``reference``: layers and width. ``documents``: those that students read, the first of the articles,
    ``epochs`` times; None for all of them. ``batch``: sequences a step, of both. ``seeds`` of pretraining: of the main
    regimes, and of ``others``.
    """

    student: tuple[int, int]
    reference: tuple[int, int]
    vocab_size: int
    batch: int
    learning_rate: float
    reference_epochs: int
    documents: int | None
    epochs: int
    seeds: tuple[int, ...]
    others: tuple[int, ...]


SCALES = {
    # shows that it works, and nothing else
    "trial": Scale((2, 64), (2, 128), 128, 16, 2e-3, 1, 40, 1, (1,), ()),
    "cpu": Scale((2, 128), (4, 256), 8192, 16, 2e-3, 1, 400, 3, (1, 2, 3), (1,)),
    "gpu": Scale((4, 512), (8, 512), 30_522, 64, 1e-3, 10, None, 10, (1, 2, 3, 4, 5), (1, 2, 3)),
}


def architecture(layers: int, width: int, vocab_size: int, tokenizer: Any) -> ModernBertConfig:
    """ModernBERT (arXiv 2412.13663), which at this size learns more than the words' frequencies within a few million
    tokens; a BERT of 2×128 or 4×256 does not. All of its layers attend to all of the 128 tokens.
    """
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    return ModernBertConfig(
        vocab_size=vocab_size,
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=3 * width // 2,
        num_attention_heads=width // 64,
        max_position_embeddings=LENGTH,
        local_attention=LENGTH,
        global_attn_every_n_layers=1,
        bos_token_id=special["cls_token_id"],
        eos_token_id=special["sep_token_id"],
        **special,
    )


@dataclass(frozen=True)
class Regime:
    """A row of the study: the flags of train/run.py that set it apart.

    ``targets`` names the plan whose exact targets it distils from. ``replicated`` regimes have more pretraining seeds.
    ``glue``: fine-tuned at all, with two seeds a model if there are several models. ``equal_cost``: trained for as many
    steps more as the scores and targets of parquet+kd cost.
    """

    name: str
    flags: str
    shards: str = "scored"
    targets: str | None = None
    replicated: bool = False
    glue: bool = True
    equal_cost: bool = False


DISTIL = "--distill-weight 0.5"
REGIMES = (
    Regime("random", "--entropy-source random", replicated=True),
    # the learning rate of its only step is 0
    Regime("untrained", "--entropy-source random --max-steps 1 --warmup-steps 1", replicated=True),
    Regime("random-equal-cost", "--entropy-source random", replicated=True, equal_cost=True),
    Regime("random+kd", f"--entropy-source random {DISTIL}", targets="random"),
    Regime("parquet", "--entropy-source parquet", replicated=True),
    Regime("parquet-warm", "--entropy-source parquet --mask-temperature 1"),
    Regime("parquet-floor", "--entropy-source parquet --mask-floor 0.25"),
    Regime("parquet+kd", f"--entropy-source parquet {DISTIL}", targets="parquet", replicated=True),
    Regime("parquet+kd-scan", f"--entropy-source parquet {DISTIL}"),
    Regime("parquet-full", "--entropy-source parquet", shards="scored-full"),
    Regime("self-step", "--entropy-source self --self-refresh step", replicated=True),
    Regime("self-step-warm", "--entropy-source self --self-refresh step --mask-temperature 1"),
    Regime("self-lagged", "--entropy-source self --self-refresh lagged"),
    Regime("self-lagged-warm", "--entropy-source self --self-refresh lagged --mask-temperature 1"),
    Regime("self-step+kd", f"--entropy-source self --self-refresh step {DISTIL}"),
    Regime("parquet-low", "--entropy-source parquet --mask-band 0 0.33", glue=False),
    Regime("parquet-mid", "--entropy-source parquet --mask-band 0.33 0.67", glue=False),
    Regime("parquet-high", "--entropy-source parquet --mask-band 0.67 1", glue=False),
)
