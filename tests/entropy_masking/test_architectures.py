"""Every architecture of AutoModelForMaskedLM is scored and trained, or refused in one sentence."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

import pipeline.score
import train.run
from entropy_masking.errors import UsageError

WITH_IMAGES = {"modernvbert", "ultravbert"}  # their vision models cannot be made small by these settings
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
ENCODER_DECODER = {
    "d_model": 64,
    **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 128))},
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
REFUSED = {
    "perceiver": ["does not give logits for each token", "does not give logits for each token"],
    "reformer": ["cannot be trained on sequences of 32 tokens"],  # in training its length is a multiple of 64
}
XLM = {"emb_dim": 64, "n_layers": 2, "n_heads": 2}
SETTINGS = {
    **dict.fromkeys(("bart", "mbart", "mvp"), ENCODER_DECODER),
    "convbert": SMALL | {"embedding_size": 64},
    "deberta": SMALL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": SMALL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 32},
    "distilbert": {"dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128},
    "electra": SMALL | {"embedding_size": 64},
    "esm": SMALL | {"mask_token_id": 4, "position_embedding_type": "rotary"},
    "flaubert": XLM,
    "funnel": {
        "d_model": 64,
        "n_head": 2,
        "d_head": 32,
        "d_inner": 128,
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
    },
    "longformer": SMALL | {"attention_window": 16},
    "luke": SMALL | {"entity_vocab_size": 10, "entity_emb_size": 32},
    "mobilebert": SMALL | {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "neomme": SMALL | {"num_key_value_heads": 2},
    "nystromformer": SMALL | {"segment_means_seq_len": 64},
    "perceiver": {"num_latents": 8, "d_latents": 64, "d_model": 64, "num_self_attends_per_block": 2},
    "reformer": SMALL | {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32], "local_attn_chunk_length": 16},
    "squeezebert": SMALL | {"embedding_size": 64},
    "xlm": XLM,
    "xmod": SMALL | {"languages": ["en_XX"], "default_language": "en_XX"},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() - WITH_IMAGES))
def test_scored_and_trained_or_refused(work: Path, scored: Path, tmp_path: Path, kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    torch.manual_seed(0)
    settings = SETTINGS.get(kind, SMALL) | {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    settings |= {"n_words": len(tokenizer), "pad_index": 0} if kind == "xlm" else {"pad_token_id": 0}
    AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    score = ["--corpus", scored, "--teacher", tmp_path / "model", "--output", tmp_path / "scored"]
    score += ["--backend", "local", "--dtype", "float32", "--passes", 2]
    run = ["--shards", scored, "--model", tmp_path / "model", "--entropy-source", "random", "--max-steps", 2]
    run += ["--per-device-train-batch-size", 4, "--output-dir", tmp_path / "run", "--bf16", "false"]
    refusals = []
    for main, flags in ((pipeline.score.main, score), (train.run.main, run)):
        try:
            main([str(flag) for flag in flags])
        except UsageError as error:
            refusals.append(str(error))
    refused = REFUSED.get(kind, [])
    assert len(refusals) == len(refused) and all(part in text for part, text in zip(refused, refusals, strict=True))
    assert refused or (tmp_path / "scored" / "manifest.json").exists()
    assert refused or (tmp_path / "run" / "summary.json").exists()
