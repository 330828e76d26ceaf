"""Small models of several architectures, and sequences of their tokens."""

from __future__ import annotations

import numpy as np
from transformers import BertConfig, DistilBertConfig, ElectraConfig, ModernBertConfig, RobertaConfig

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
