"""Students: presets, configurations and checkpoints."""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, BertConfig, ModernBertConfig, PretrainedConfig, PreTrainedModel

from entropy_masking import storage
from entropy_masking.errors import UsageError, one_line
from entropy_masking.models.checkpoints import (
    WEIGHTS,
    has_tokenizer,
    load_config,
    load_masked_lm,
    load_tokenizer,
    local_checkpoint,
    weights_hash,
)
from entropy_masking.models.masked_positions import MaskedPositions, with_masked_positions
from entropy_masking.shards.manifests import special_ids, tokenizer_hash
from entropy_masking.shards.schema import Manifest
from train.options import SIZES

PRESETS = [*SIZES, *(f"bert-{size}" for size in SIZES)]  # ModernBERT, and BERT as Google's

SHORT = 512  # tokens of a sequence for which plain attention is chosen on a CPU


def build_student(name: str, manifest: Manifest, seed: int, trust_remote_code: bool = False) -> MaskedPositions:
    """A masked LM whose head runs on masked positions only (see ``models.masked_positions``).

    Args:
        name: a preset, a configuration (``config.json``, or a directory with one and no weights), or a checkpoint to
            train further, by path or Hub id.
        manifest: the shards to train on. A preset gets the vocabulary of their tokenizer, and every new model their
            padding token.
        seed: of the initial weights.

    Raises:
        UsageError: the checkpoint does not fit the shards, or cannot be loaded.
    """
    if name in PRESETS:
        model = _from_config(name, _preset(name, manifest), manifest, seed, trust_remote_code=False)
    else:
        path = _source(name)
        if _is_configuration(name, path):
            model = _from_config(name, load_config(path, trust_remote_code), manifest, seed, trust_remote_code)
        else:
            _check_tokenizer(name, path, manifest)
            model = load_masked_lm(path, trust_remote_code)
    if model.config.vocab_size < manifest.vocab_size:
        raise UsageError(
            f"--model {name} has {model.config.vocab_size} tokens, but the shards have {manifest.vocab_size}; "
            "use shards made with the model's tokenizer"
        )
    model = with_masked_positions(model, manifest.sequence_length, f"--model {name}")
    if not model.masked_lm.selective:
        slower = "needs whole sequences, so it runs at every position: training is slower"
        print(f"the head of {type(model).__name__} {slower}", file=sys.stderr)
    return model


def choose_attention(model: PreTrainedModel, length: int) -> None:
    """Use plain attention for training in bfloat16 on a CPU: it is two to three times as fast as the fused one.

    It keeps L² numbers a head in memory, so sequences of more than ``SHORT`` tokens keep the fused one.
    """
    if length <= SHORT:
        model.set_attn_implementation("eager")


def nearest_size(name: str, trust_remote_code: bool) -> tuple[str, bool]:
    """The size of the preset with the nearest number of weights, and whether the weights are pretrained.

    Embeddings do not count. Raises UsageError for a model that cannot be loaded.
    """
    if name in PRESETS:
        return name.removeprefix("bert-"), False
    path = _source(name)
    config = load_config(path, trust_remote_code)
    layers, width = getattr(config, "num_hidden_layers", 12), getattr(config, "hidden_size", 768)
    weights = max(1, layers * width**2)  # in proportion
    distance = {size: abs(math.log(weights / (own[0] * own[1] ** 2))) for size, own in SIZES.items()}
    return min(distance, key=lambda size: distance[size]), not _is_configuration(name, path)


def model_identity(name: str) -> str:
    """The identity of the initial weights, without the seed: a preset's name, else a hash of the files."""
    if name in PRESETS:
        return name
    path = _source(name)
    if _is_configuration(name, path):
        return storage.sha256(str(path / "config.json" if path.is_dir() else path))
    return weights_hash(path)


def _source(name: str) -> Path:
    """The file of a configuration, or the directory of a checkpoint. Raises UsageError."""
    if "/" not in name and not Path(name).exists():
        raise UsageError(
            f"--model {name} is neither a preset ({', '.join(PRESETS)}) nor a file or directory; "
            "name a model of the Hub as OWNER/NAME"
        )
    return Path(name) if Path(name).is_file() else local_checkpoint(name)


def _is_configuration(name: str, path: Path) -> bool:
    """Whether there are no weights to load: a file, or a local directory without weights in any format."""
    return path.is_file() or (Path(name).is_dir() and not any(file.suffix in WEIGHTS for file in path.iterdir()))


def _preset(name: str, manifest: Manifest) -> PretrainedConfig:
    """A ModernBERT (arXiv 2412.13663) whose layers all attend to the whole sequence, or a BERT.

    There is no dropout: each token occurs only a few times, and fine-tuning uses dropout again. A classifier on a
    ModernBERT averages its last hidden states, as the authors' checkpoints do: MLM does not train a summary in [CLS].
    """
    layers, hidden = SIZES[name.removeprefix("bert-")]
    size: dict[str, Any] = {
        "vocab_size": manifest.vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "max_position_embeddings": max(512, manifest.sequence_length),
    }
    if name.startswith("bert-"):
        size |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "intermediate_size": 4 * hidden}
        return BertConfig(**size)
    roles = {"cls": "cls", "sep": "sep", "pad": "pad", "bos": "cls", "eos": "sep"}
    size |= {f"{name}_token_id": manifest.special_ids[role] for name, role in roles.items()}
    size |= {"intermediate_size": 3 * hidden // 2, "layer_types": ["full_attention"] * layers}
    return ModernBertConfig(**size, classifier_pooling="mean")


def _from_config(
    name: str, config: PretrainedConfig, manifest: Manifest, seed: int, trust_remote_code: bool
) -> PreTrainedModel:
    # the embedding of the padding token is not trained, and RoBERTa's position ids skip this token
    config.pad_token_id = manifest.special_ids["pad"]
    torch.manual_seed(seed)
    try:
        # None, the default, asks on standard input whether to run the code
        return AutoModelForMaskedLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration may hold anything, and have its own code
        raise UsageError(f"--model {name} is not a usable configuration: {one_line(error)}") from None


def _check_tokenizer(name: str, directory: Path, manifest: Manifest) -> None:
    if has_tokenizer(directory):
        tokenizer = load_tokenizer(str(directory))
        if tokenizer_hash(tokenizer) != manifest.tokenizer_hash:
            raise UsageError(
                f"the tokenizer of --model {name} (special ids {special_ids(tokenizer)}) differs from that of "
                f"{manifest.uri}; score the corpus with the model's tokenizer"
            )
