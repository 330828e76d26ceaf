"""Finds and loads checkpoints of masked LMs and tokenizers: no pickles, and remote code only if it is trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from entropy_masking import storage
from entropy_masking.errors import UsageError, one_line
from entropy_masking.mkl import choose_kernels

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}  # suffixes; all but the first are pickles
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")

choose_kernels()  # before any computation in threads


def local_checkpoint(name: str) -> Path:
    """Directory of a checkpoint: a local one, or a Hub snapshot of its configuration, tokenizer and safetensors.

    Raises UsageError for a name that is neither a local directory nor a Hub repository that can be reached.
    """
    if (directory := Path(storage.local_path(name))).is_dir():
        storage.check_plain(directory)
        return directory.absolute()
    if name.startswith(("/", ".", "~")):
        raise UsageError(f"there is no model directory {name}; name an existing one, or a model on the Hub")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors", "*.py"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"{name} is neither a local directory nor an available model on the Hub: {reason}") from None


def safetensors_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint. Raises UsageError if there are no safetensors.

    A pickle can run code when it is loaded, so none is ever opened.
    """
    if files := sorted(directory.glob("*.safetensors")):
        return files
    raise UsageError(
        f"{directory} has no model weights in safetensors; if you trust its pickle, which can run code when loaded, "
        "convert it once with AutoModelForMaskedLM.from_pretrained('MODEL').save_pretrained('NEW_DIR')"
    )


def weights_hash(directory: Path) -> str:
    """Hash of a checkpoint's configuration, weights and own code.

    Raises UsageError like ``safetensors_files``, and for a broken configuration.
    """
    files = safetensors_files(directory)
    try:
        config = dict(storage.read_json(str(directory / "config.json")))
    except (ValueError, TypeError) as error:
        raise UsageError(f"cannot read a model configuration in {directory}: {one_line(error)}") from None
    config.pop("transformers_version", None)
    if "auto_map" in config:  # it brings its own code
        files += sorted(directory.glob("*.py"))
    return storage.sha256_json([config, *(storage.sha256(str(file)) for file in files)])


def load_config(directory: Path, trust_remote_code: bool = False) -> transformers.PretrainedConfig:
    """The configuration of a masked LM.

    Raises UsageError if it is unreadable, needs remote code that is not trusted, or has no masked-LM architecture.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration of others may raise anything, such as RecursionError
        reason = one_line(error)
        if directory.is_dir() and not (directory / "config.json").exists():
            reason = "it has no config.json, so it holds no model"
        elif "trust_remote_code" in str(error):
            reason = "it brings its own code; pass --trust-remote-code if you trust it"
        raise UsageError(f"cannot read a model configuration in {directory}: {reason}") from None
    remote = "AutoModelForMaskedLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not (remote and trust_remote_code):
        raise UsageError(f"{directory} is a {config.model_type} model, which has no masked-LM head; use a masked LM")
    return config


def has_tokenizer(directory: Path) -> bool:
    return any(any(directory.glob(pattern)) for pattern in TOKENIZER_FILES)


def load_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """A fast tokenizer by local directory or Hub id. Its own code never runs.

    Raises UsageError if there is none, or only a slow one or one with its own code.
    """
    directory = local_checkpoint(name)
    # without these files transformers.AutoTokenizer builds a tokenizer of special tokens from config.json alone
    if not has_tokenizer(directory):
        names = ", ".join(TOKENIZER_FILES)
        raise UsageError(f"{name} holds no tokenizer ({names}); save the model's tokenizer there")
    try:
        # None, the default, asks on standard input whether to run the code
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = "it brings its own code" if "trust_remote_code" in str(error) else one_line(error)
        raise UsageError(f"cannot load the tokenizer in {name} ({reason}); save a fast tokenizer there") from None
    if not tokenizer.is_fast:
        raise UsageError(f"{name} has only a slow tokenizer; save a fast one (tokenizer.json) there")
    return tokenizer


def load_masked_lm(directory: Path, trust_remote_code: bool = False) -> transformers.PreTrainedModel:
    """Load a masked LM in float32, from safetensors only.

    Raises UsageError if it has no safetensors or no masked-LM architecture, or if weights of the MLM head are missing.
    """
    config = load_config(directory, trust_remote_code)
    safetensors_files(directory)
    model, missing = load_model(transformers.AutoModelForMaskedLM, directory, config, trust_remote_code)
    if missing:
        problem = f"{directory} has no trained MLM head: {len(missing)} weights are missing ({', '.join(missing[:2])}…)"
        raise UsageError(f"{problem}; use a checkpoint saved from a masked LM")
    return model


def load_model(
    loader: Any, directory: Path, config: transformers.PretrainedConfig, trust_remote_code: bool
) -> tuple[Any, list[str]]:
    """A model in float32, and the names of the weights that its safetensors lack.

    Raises UsageError if the model cannot be loaded.

    Args:
        loader: a class of transformers such as ``AutoModelForMaskedLM``.
    """
    logging.disable_progress_bar()  # a bar for each loaded model only fills the log
    options = {"config": config, "dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # the error of transformers does not name them
    try:
        model, info = loader.from_pretrained(directory, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # such as ZeroDivisionError for a configuration without attention heads
        raise UsageError(f"cannot load the model in {directory}: {one_line(error)}") from None
    if wrong := sorted(info["mismatched_keys"]):
        name, found, expected = wrong[0]
        problem = f"{name} in {directory} has the shape {[*found]}, but its configuration asks for {[*expected]}"
        raise UsageError(f"{problem}; restore the config.json that belongs to the weights")
    return model, sorted(info["missing_keys"])


def resolve_dtype(name: str) -> str:
    """``auto`` is bfloat16 if this machine has a GPU or a CPU with native support, else float32."""
    if name != "auto":
        return name
    native = torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"
