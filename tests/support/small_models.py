"""Small models of several architectures, and sequences of their tokens."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
)

VOCAB, LENGTH = 211, 24
PAD, UNK, CLS, SEP, MASK = range(5)
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": PAD}
ARCHITECTURES = {
    "bert": BertConfig(**SMALL, intermediate_size=64, max_position_embeddings=LENGTH),
    "roberta": RobertaConfig(**SMALL, intermediate_size=64, max_position_embeddings=LENGTH + 1),
    "distilbert": DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    "electra": ElectraConfig(**SMALL, embedding_size=16, intermediate_size=64),
    "modernbert": ModernBertConfig(
        **SMALL, intermediate_size=64, cls_token_id=CLS, sep_token_id=SEP, bos_token_id=CLS, eos_token_id=SEP
    ),
}


def sequences(rows: int, seed: int = 0) -> np.ndarray:
    """[CLS] tokens [SEP], a [SEP] inside, and a padded last block."""
    ids_NL = np.random.default_rng(seed).integers(5, VOCAB, (rows, LENGTH))
    ids_NL[:, 0], ids_NL[:, -1], ids_NL[0, 7] = CLS, SEP, SEP
    ids_NL[-1, 14], ids_NL[-1, 15:] = SEP, PAD
    return ids_NL.astype(np.uint32)


def save_roberta(directory: Path, texts: list[str]) -> Path:
    """A small RoBERTa for 512 tokens, with random weights and RoBERTa's kind of tokenizer, a byte-level BPE."""
    backend = ByteLevelBPETokenizer()
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend.train_from_iterator(texts, vocab_size=300, special_tokens=special_tokens, show_progress=False)
    directory.mkdir()
    backend.save_model(str(directory))
    tokenizer = RobertaTokenizer.from_pretrained(directory)
    tokenizer.save_pretrained(directory)
    sizes = SMALL | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = RobertaConfig(**sizes, intermediate_size=64, max_position_embeddings=514)
    RobertaForMaskedLM(config).save_pretrained(directory)
    return directory
