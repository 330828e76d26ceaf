"""What the flags of run.py choose: the model, the optimizer and its schedule. Wrong values are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import RANDOM, SELF, train_here, weights
from transformers import BertConfig, BertForMaskedLM

from entropy_masking.errors import UsageError
from entropy_masking.shards.manifests import read_manifest
from train.arguments import LEARNING_RATES, PRETRAINED_RATE, training_arguments
from train.options import MUON, parse


def test_other_models_by_configuration(scored: Path, tmp_path: Path) -> None:
    vocabulary = read_manifest(str(scored)).vocab_size
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=vocabulary, **sizes).save_pretrained(tmp_path / "shape")
    train_here(scored, tmp_path / "one", *RANDOM, "--max-steps", 1, "--model", tmp_path / "shape")
    config = tmp_path / "shape" / "config.json"
    train_here(scored, tmp_path / "two", *RANDOM, "--max-steps", 1, "--model", config)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    BertConfig(vocab_size=100, **sizes).save_pretrained(tmp_path / "narrow")
    with pytest.raises(UsageError, match="has 100 tokens"):
        train_here(scored, tmp_path / "three", *RANDOM, "--max-steps", 1, "--model", tmp_path / "narrow")
    (tmp_path / "odd.json").write_text('{"model_type": "bert", "hidden_size": "a"}')
    with pytest.raises(UsageError, match=r"cannot read a model configuration in .*odd\.json: .*hidden_size"):
        train_here(scored, tmp_path / "four", *RANDOM, "--max-steps", 1, "--model", tmp_path / "odd.json")


@pytest.mark.parametrize(
    "odd", [{"hidden_size": 33}, {"num_attention_heads": 0}, {"hidden_size": -4}, {"hidden_act": "x"}]
)
def test_a_configuration_that_makes_no_model_is_refused(scored: Path, tmp_path: Path, odd: dict[str, Any]) -> None:
    config = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 5000} | odd
    (tmp_path / "odd.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"odd\.json is not a usable configuration") as caught:
        train_here(scored, tmp_path / "out", *RANDOM, "--model", tmp_path / "odd.json", "--max-steps", 1)
    assert "\n" not in str(caught.value)


def test_learning_rate_and_batch_follow_the_size_of_the_model(tmp_path: Path) -> None:
    """The last --model counts. A checkpoint has a lower learning rate than random weights."""
    shape = BertConfig(vocab_size=10, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, intermediate_size=8)
    shape.save_pretrained(tmp_path / "shape")
    BertForMaskedLM(shape).save_pretrained(tmp_path / "checkpoint")
    needed = ["--shards", "S", *RANDOM, "--output-dir", "O"]
    adamw = LEARNING_RATES["adamw"]
    for more, rate, batch, muon in (
        (["--model", "tiny", "--model=base"], LEARNING_RATES[MUON]["base"], 256, 0.02),
        (["--model=base", "--model", "bert-tiny"], LEARNING_RATES[MUON]["tiny"], 32, 0.02),
        (["--model", f"{tmp_path}/shape"], adamw["mini"], 64, None),
        (["--model", f"{tmp_path}/checkpoint"], PRETRAINED_RATE, 64, None),
        (["--model", f"{tmp_path}/checkpoint", "--optim", "muon"], LEARNING_RATES[MUON]["mini"], 64, 0.02),
        (["--model", "mini", "--learning-rate", "0.5", "--muon-learning-rate", "0.1"], 0.5, 64, 0.1),
        (["--model", "mini", "--optim", "adamw_torch"], adamw["mini"], 64, None),
    ):
        options, given = parse([*needed, *more], None)
        args = training_arguments(options, given)
        assert (args.learning_rate, args.per_device_train_batch_size) == (rate, batch)
        assert (options.muon, options.muon_learning_rate) == (muon is not None, muon)


# --- values that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([*RANDOM, "--distill-weight", 0.5], "needs top-k log-probabilities"),
        ([*SELF, "--optim", "adamw_torch", "--muon-weight-decay", 0], "has no effect without --optim muon"),
        ([*SELF, "--distill-positions", 0.5], "--distill-positions has no effect without"),
        ([*SELF, "--distill-weight", 2], "--distill-weight 2 is out of range"),
        ([*SELF, "--seed=-1"], "--seed -1 is out of range; use at least 0 and at most 4294967295"),
        ([*SELF, "--seed", 5_000_000_000], "--seed 5000000000"),
        ([*SELF, "--learning-rate=-1"], "--learning-rate -1 is out of range; use at least 0"),
        ([*SELF, "--learning-rate", "nan"], "--learning-rate nan is out of range"),
        ([*SELF, "--weight-decay=-1"], "--weight-decay -1 is out of range"),
        ([*SELF, "--adam-beta2", 1], "--adam-beta2 1 is out of range; use at least 0 and less"),
        ([*SELF, "--per-device-train-batch-size", 0], "--per-device-train-batch-size 0"),
        ([*SELF, "--num-train-epochs", 0], "--num-train-epochs 0 is out of range; use more"),
        ([*SELF, "--max-steps", 0], "--max-steps 0 is out of range; use at least 1"),
        ([*SELF, "--eval-fraction", 1], "--eval-fraction"),
        ([*SELF, "--eval-fraction", 0, "--eval-strategy", "steps"], "no effect without held-out text"),
        ([*SELF, "--model", "huge"], "neither a preset"),
        ([*SELF, "--model", "./nowhere"], "nowhere"),
        ([*SELF, "--output-dir", ""], "--output-dir is empty; give it a value"),
    ],
)
def test_mistakes_are_one_sentence(tokens: Path, tmp_path: Path, flags: list[object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        train_here(tokens, tmp_path / "out", "--max-steps", 1, *flags)
    assert "\n" not in str(caught.value)
