"""A masked LM as a teacher: loading it safely, and scoring sequences in a chosen context. See docs/scoring.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from pipeline import entropy, storage
from pipeline.cli import UsageError
from pipeline.shards import Scores

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LOGITS_PER_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}  # float32 logits at a time: they stay in the cache, fill the GPU
ROBERTA_LIKE = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "longformer", "mpnet"}


def local_checkpoint(name: str) -> Path:
    """Directory of a checkpoint: a local one, or a Hub snapshot of its configuration, tokenizer and safetensors.

    Raises:
        UsageError: neither a local directory nor a Hub repository that can be reached.
    """
    if Path(name).is_dir():
        return Path(name).absolute()
    if name.startswith(("/", ".", "~")):
        raise UsageError(f"there is no model directory {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors", "*.py"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"{name} is neither a local directory nor a model that the Hub gives: {reason}") from None


def safetensors_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint.

    Raises:
        UsageError: there are no safetensors (a pickle can run code when it is loaded, so none is ever opened).
    """
    if files := sorted(directory.glob("*.safetensors")):
        return files
    pickles = sorted(f.name for f in directory.iterdir() if f.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if not pickles:
        raise UsageError(f"{directory} holds no model weights (*.safetensors)")
    raise UsageError(
        f"{directory} holds only a pickle checkpoint ({pickles[0]}), which can run code when loaded; if you trust it, "
        f"convert it once with AutoModelForMaskedLM.from_pretrained('{directory}').save_pretrained('NEW_DIR')"
    )


def weights_hash(directory: Path) -> str:
    """Hash of a checkpoint's configuration and weights. Raises UsageError as ``safetensors_files``."""
    files = safetensors_files(directory)
    config = json.loads((directory / "config.json").read_text())
    config.pop("transformers_version", None)
    return storage.sha256_json([config, *(storage.sha256(str(file)) for file in files)])


def load_config(directory: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a masked LM.

    Raises:
        UsageError: unreadable, wants remote code that was not allowed, or an architecture without a masked-LM form.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it brings its own code; pass --trust-remote-code if you trust it"
        raise UsageError(f"cannot read a model configuration in {directory}: {reason[:300]}") from None
    remote = "AutoModelForMaskedLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not (remote and trust_remote_code):
        raise UsageError(f"{directory} is a {config.model_type} model, which has no masked-LM head; use a masked LM")
    return config


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A fast tokenizer by local directory or Hub id.

    Raises:
        UsageError: there is none, or only a slow one.
    """
    directory = local_checkpoint(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"cannot load a tokenizer from {name}: {' '.join(str(error).split())[:300]}") from None
    if not tokenizer.is_fast:
        raise UsageError(f"{name} has only a slow tokenizer; save a fast one (tokenizer.json) there")
    return tokenizer


def max_length(config: PretrainedConfig) -> int | None:
    """Longest sequence that the model has positions for; RoBERTa's positions start behind the padding id."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in ROBERTA_LIKE:
        return positions - (config.pad_token_id or 0) - 1
    return positions


def load_masked_lm(directory: Path, trust_remote_code: bool = False) -> Any:
    """Load a masked LM in float32, from safetensors only.

    Raises:
        UsageError: no safetensors, no masked-LM architecture, or weights of the MLM head missing.
    """
    config = load_config(directory, trust_remote_code)
    safetensors_files(directory)
    logging.disable_progress_bar()  # one bar a model load is noise, in a log most of all
    try:
        model, info = AutoModelForMaskedLM.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"cannot load the weights in {directory}: {' '.join(str(error).split())[:300]}") from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UsageError(
            f"{directory} has no trained MLM head: {len(missing)} weights are missing ({', '.join(missing[:2])}…); "
            "use a checkpoint saved from a masked LM"
        )
    return model


def resolve_dtype(name: str) -> str:
    """``auto`` is bfloat16 if this machine has a GPU or a CPU with native support, else float32."""
    if name != "auto":
        return name
    native = torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


class Teacher:
    """Scores sequences with a masked LM.

    The encoder runs under autocast in ``dtype``; the vocabulary projection multiplies in float32, because logits
    rounded to bfloat16 tie neighbours among the most probable tokens. The head runs on the scored positions only, and
    its logits exist for a few hundred positions at a time.

    Args:
        directory: checkpoint of any ``AutoModelForMaskedLM`` whose forward is encoder, head.
        mask_id: the [MASK] token.
        pad_id: the padding token.
        special_ids: tokens that are never scored.
        vocab_size: tokens of the tokenizer; logits beyond (rows that only pad the embedding) are cut off.
        context: ``masked`` (a position is scored in the pass that hides it) or ``full`` (nothing is hidden).
        passes: P; pass g hides the positions i with i mod P = g.
        top_k: how many log-probabilities to keep.
        batch_tokens: tokens in one forward.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
    """

    def __init__(
        self,
        directory: Path,
        *,
        mask_id: int,
        pad_id: int,
        special_ids: list[int],
        vocab_size: int,
        context: str = "masked",
        passes: int = 7,
        top_k: int = 16,
        batch_tokens: int = 8192,
        dtype: str = "float32",
        trust_remote_code: bool = False,
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_masked_lm(directory, trust_remote_code).eval().to(self.device)
        self.mask_id, self.pad_id = mask_id, pad_id
        self.special_ids, self.vocab_size = np.array(special_ids), vocab_size
        self.context, self.passes = context, passes if context == "masked" else 1
        self.top_k, self.batch_tokens, self.dtype = top_k, batch_tokens, DTYPES[dtype]
        self.model, self.decoder = _cut_decoder(model)
        self._select: tuple[Tensor, Tensor] | None = None
        model.base_model.register_forward_hook(self._keep_selected)

    def _keep_selected(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the encoder: hand only the scored positions on to the head."""
        rows, columns = self._select or (None, None)
        output.last_hidden_state = output.last_hidden_state[rows, columns]
        return output

    @torch.inference_mode()
    def score(self, input_ids_NL: np.ndarray) -> Scores:
        """Score N sequences of L tokens; special tokens and padding stay NaN (top-k: id 0, NaN).

        The batches are a function of (N, L, P) alone, so the same sequences always give the same bits on the same
        hardware, whoever scores them.
        """
        N, L = input_ids_NL.shape
        ids_NL = input_ids_NL.astype(np.int64)
        candidates_NL = ~np.isin(ids_NL, self.special_ids)
        scores = Scores(
            entropy_NL=np.full((N, L), np.nan, np.float32),
            surprisal_NL=np.full((N, L), np.nan, np.float32),
            topk_ids_NLK=np.zeros((N, L, self.top_k), np.int32),
            topk_logprobs_NLK=np.full((N, L, self.top_k), np.nan, np.float32),
        )
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            for sequences_R, passes_R in self._batches(N, L):
                scored_RL = candidates_NL[sequences_R]
                if self.context == "masked":
                    scored_RL = scored_RL & (np.arange(L) % self.passes == passes_R[:, None])
                rows, columns = np.nonzero(scored_RL)
                if not len(rows):
                    continue
                ids_RL = ids_NL[sequences_R]
                targets = ids_RL[rows, columns]
                if self.context == "masked":
                    ids_RL[rows, columns] = self.mask_id
                results = self._forward(ids_RL, rows, columns, targets)
                where = sequences_R[rows], columns
                for array, result in zip(vars(scores).values(), results, strict=True):
                    array[where] = result
        return scores

    def _batches(self, N: int, L: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(sequence, pass) pairs in order, cut into forwards of at most ``batch_tokens`` tokens."""
        rows = max(1, self.batch_tokens // L)
        for start in range(0, N * self.passes, rows):
            pairs_R = np.arange(start, min(start + rows, N * self.passes))
            yield pairs_R // self.passes, pairs_R % self.passes

    def _forward(
        self, ids_RL: np.ndarray, rows: np.ndarray, columns: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Entropy, surprisal, top-k ids and log-probabilities of the positions (rows, columns)."""
        ids = torch.from_numpy(ids_RL).to(self.device)
        padding_RL = ids_RL == self.pad_id
        attention = torch.from_numpy((~padding_RL).astype(np.int64)).to(self.device) if padding_RL.any() else None
        self._select = torch.from_numpy(rows).to(self.device), torch.from_numpy(columns).to(self.device)
        features_NH = self.model(input_ids=ids, attention_mask=attention).logits
        targets_N = torch.from_numpy(targets).to(self.device)
        chunk = max(1, LOGITS_PER_CHUNK[self.device.type] // self.decoder.out_features)
        parts = []
        with torch.autocast(self.device.type, enabled=False):
            for start in range(0, len(targets), chunk):
                logits_CV = self.decoder(features_NH[start : start + chunk].float())[:, : self.vocab_size]
                parts.append(entropy.score(logits_CV, targets_N[start : start + chunk], self.top_k))
        return tuple(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))


def _cut_decoder(model: Any) -> tuple[nn.Module, nn.Linear]:
    """Take the vocabulary projection out of a masked LM, so that its ``logits`` are the projection's inputs."""
    decoder = model.get_output_embeddings()
    if decoder is None or model.base_model is model:
        raise UsageError(f"{type(model).__name__} is not an encoder with an MLM head on top; use another teacher")
    name = next(name for name, module in model.named_modules() if module is decoder)
    model.set_submodule(name, nn.Identity())
    return model, decoder
