"""Entropy, surprisal and top-k against a slow float64 reference: one masked position at a time, full softmax."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import ARCHITECTURES, CLS, LENGTH, MASK, PAD, SEP, UNK, VOCAB, sequences
from torch import Tensor
from torch.distributions import Categorical
from transformers import AutoConfig, AutoModelForMaskedLM

from entropy_masking import entropy
from entropy_masking.shards.schema import Manifest
from pipeline.teacher import Teacher

TOP_K = 8


def save_random_model(config: AutoConfig, directory: Path) -> Path:
    torch.manual_seed(1)
    model = AutoModelForMaskedLM.from_config(config)
    for parameter in model.parameters():  # the initial weights alone would make every prediction near uniform
        parameter.data.mul_(3)
    model.save_pretrained(directory)
    return directory


def teacher(directory: Path, compile: bool = False, **settings: Any) -> Teacher:
    settings = {"passes": 7, "batch_tokens": 8192, "dtype": "float32", "context": "masked"} | settings
    fields = {
        **{"sequence_length": LENGTH, "vocab_size": VOCAB, "top_k": TOP_K, "temperatures": []},
        **{"special_ids": {"mask": MASK, "pad": PAD}, "special_token_ids": [PAD, UNK, CLS, SEP, MASK]},
    }
    passes = settings["passes"] if settings["context"] == "masked" else 1
    manifest = Manifest.model_construct(**(fields | settings | {"passes": passes}), fingerprint=settings)
    return Teacher(manifest, directory, compile=compile)


def reference(directory: Path, ids_NL: np.ndarray, hide: bool) -> dict[tuple[int, int], torch.Tensor]:
    """float64 log-probabilities [V] of each scored position, from the model's own full forward."""
    model = AutoModelForMaskedLM.from_pretrained(directory).double().eval()
    found = {}
    for row, ids_L in enumerate(torch.from_numpy(ids_NL.astype(np.int64))):
        for position in range(LENGTH):
            if ids_L[position] < 5:
                continue
            inputs_1L = ids_L.clone()[None]
            if hide:
                inputs_1L[0, position] = MASK
            with torch.no_grad():
                logits_V = model(inputs_1L, attention_mask=(inputs_1L != PAD).long()).logits[0, position]
            found[row, position] = logits_V.log_softmax(-1)
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("context", ["masked", "full"])
def test_scores_equal_the_float64_reference(tmp_path: Path, name: str, context: str) -> None:
    directory = save_random_model(ARCHITECTURES[name], tmp_path)
    ids_NL = sequences(4)
    scores = teacher(directory, context=context, passes=LENGTH, batch_tokens=5 * LENGTH).score(ids_NL)
    expected = reference(directory, ids_NL, hide=context == "masked")

    scored_NL = ~np.isnan(scores["entropy"])
    assert {tuple(where) for where in np.argwhere(scored_NL).tolist()} == expected.keys()
    assert (~np.isnan(scores["surprisal"]) == scored_NL).all()
    for (row, position), log_p_V in expected.items():
        assert scores["entropy"][row, position] == pytest.approx(float(-(log_p_V.exp() * log_p_V).sum()), abs=1e-4)
        actual = int(ids_NL[row, position])
        assert scores["surprisal"][row, position] == pytest.approx(-float(log_p_V[actual]), abs=1e-4)
        ids_K = torch.from_numpy(scores["topk_ids"][row, position]).long()
        log_p_K = torch.from_numpy(scores["topk_logprobs"][row, position]).double()
        torch.testing.assert_close(log_p_K, log_p_V[ids_K], atol=1e-4, rtol=0)
        torch.testing.assert_close(log_p_V[ids_K], log_p_V.topk(TOP_K).values, atol=1e-4, rtol=0)


def test_masked_context_hides_the_other_positions_of_the_pass_too(tmp_path: Path) -> None:
    """With P = 3 the position i is predicted with every j ≡ i (mod 3) hidden, and nothing else."""
    directory = save_random_model(ARCHITECTURES["bert"], tmp_path)
    ids_NL = sequences(2)
    scores = teacher(directory, passes=3, batch_tokens=64).score(ids_NL)
    model = AutoModelForMaskedLM.from_pretrained(directory).double().eval()
    for group in range(3):
        inputs_NL = torch.from_numpy(ids_NL.astype(np.int64))
        hidden_NL = (inputs_NL >= 5) & (torch.arange(LENGTH) % 3 == group)
        with torch.no_grad():
            logits = model(inputs_NL.masked_fill(hidden_NL, MASK), attention_mask=(inputs_NL != PAD).long()).logits
        expected = Categorical(logits=logits[hidden_NL]).entropy()
        found = torch.from_numpy(scores["entropy"])[hidden_NL].double()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("context", ["masked", "full"])
def test_compiled_scores_are_those_of_eager_code(tmp_path: Path, context: str) -> None:
    directory = save_random_model(ARCHITECTURES["bert"], tmp_path)
    ids_NL = sequences(7)
    settings = {"context": context, "batch_tokens": 3 * LENGTH, "temperatures": [2.0]}
    eager, compiled = (teacher(directory, **settings, compile=compile).score(ids_NL) for compile in (False, True))
    np.testing.assert_array_equal(np.isnan(eager["entropy"]), np.isnan(compiled["entropy"]))
    np.testing.assert_allclose(eager["entropy"], compiled["entropy"], atol=1e-4)
    np.testing.assert_allclose(eager["topk_logprobs"], compiled["topk_logprobs"], atol=1e-4)
    np.testing.assert_allclose(eager["temperature_lse_2"], compiled["temperature_lse_2"], atol=1e-4)


def test_temperatures_give_the_softened_distribution(tmp_path: Path) -> None:
    """log p at T is log p / T less what is stored, against the float64 softmax of z / T."""
    directory = save_random_model(ARCHITECTURES["bert"], tmp_path)
    ids_NL = sequences(3)
    scores = teacher(directory, passes=LENGTH, temperatures=[0.5, 1.0, 3.0]).score(ids_NL)
    assert scores.keys() - {"entropy", "surprisal", "topk_ids", "topk_logprobs"} == {
        "temperature_lse_0.5",
        "temperature_lse_3",
    }
    for (row, position), log_p_V in reference(directory, ids_NL, hide=True).items():
        ids_K = torch.from_numpy(scores["topk_ids"][row, position]).long()
        for temperature in (0.5, 3.0):
            lse = scores[f"temperature_lse_{temperature:g}"][row, position]
            found_K = scores["topk_logprobs"][row, position] / temperature - lse
            expected_K = (log_p_V / temperature).log_softmax(-1)[ids_K].numpy()
            np.testing.assert_allclose(found_K, expected_K, atol=1e-4)


def test_given_positions_are_scored_in_the_given_inputs(tmp_path: Path) -> None:
    directory = save_random_model(ARCHITECTURES["bert"], tmp_path)
    inputs_NL = sequences(5)
    positions_NK = np.array([[1, 2, 6], [3, 9, -1], [22, -1, -1], [-1, -1, -1], [4, 5, 13]])
    for row, positions in enumerate(positions_NK):
        inputs_NL[row, positions[positions >= 0]] = MASK
    targets = teacher(directory, batch_tokens=2 * LENGTH).score(inputs_NL, positions_NK)
    model = AutoModelForMaskedLM.from_pretrained(directory).double().eval()
    ids_NL = torch.from_numpy(inputs_NL.astype(np.int64))
    with torch.no_grad():
        log_p_NLV = model(ids_NL, attention_mask=(ids_NL != PAD).long()).logits.log_softmax(-1)
    for row, place in np.ndindex(*positions_NK.shape):
        found_T = targets["topk_logprobs"][row, place]
        if positions_NK[row, place] < 0:
            assert np.isnan(found_T).all() and not targets["topk_ids"][row, place].any()
            continue
        log_p_V = log_p_NLV[row, positions_NK[row, place]]
        np.testing.assert_allclose(found_T, log_p_V.topk(TOP_K).values.numpy(), atol=1e-4)
        ids_T = torch.from_numpy(targets["topk_ids"][row, place]).long()
        np.testing.assert_allclose(log_p_V[ids_T].numpy(), found_T, atol=1e-4)


def test_flops_are_those_of_the_products(tmp_path: Path) -> None:
    """By hand: four H×H and two H×I products a layer, attention, the head's transform and the vocabulary."""
    directory = save_random_model(ARCHITECTURES["bert"], tmp_path)
    scorer = teacher(directory, passes=3)
    ids_NL = sequences(4)
    scorer.score(ids_NL)
    H, I, layers, L = 32, 64, 2, LENGTH  # noqa: E741
    encoder = layers * (2 * L * (4 * H * H + 2 * H * I) + 2 * 2 * L * L * H)
    head = 2 * H * H + 2 * H * VOCAB
    assert scorer.flops == 4 * 3 * encoder + int((ids_NL >= 5).sum()) * head


def test_full_context_of_a_masked_lm_sees_the_token(tmp_path: Path) -> None:
    directory = save_random_model(ARCHITECTURES["bert"], tmp_path)
    ids_NL = sequences(3)
    masked, full = (teacher(directory, context=context).score(ids_NL)["entropy"] for context in ("masked", "full"))
    assert not np.allclose(masked, full, equal_nan=True, atol=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(tmp_path: Path, dtype: str) -> None:
    directory = save_random_model(ARCHITECTURES["bert"], tmp_path)
    ids_NL = sequences(6)
    exact, half = teacher(directory).score(ids_NL), teacher(directory, dtype=dtype).score(ids_NL)
    difference = np.abs(exact["entropy"] - half["entropy"])[~np.isnan(exact["entropy"])]
    assert 0 < difference.max() < 0.3
    assert half["entropy"].dtype == np.float32


def test_rows_that_pad_the_embedding_are_no_tokens(tmp_path: Path) -> None:
    """A model with more logits than the tokenizer has tokens predicts among the tokens only."""
    directory = save_random_model(ARCHITECTURES["bert"], tmp_path)
    ids_NL = sequences(2) % 100
    scores = teacher(directory, vocab_size=100, passes=LENGTH).score(ids_NL)
    assert scores["topk_ids"].max() < 100
    for (row, position), log_p_V in reference(directory, ids_NL, hide=True).items():
        log_p_V = (log_p_V[:100] - log_p_V[:100].logsumexp(0)).double()
        assert scores["entropy"][row, position] == pytest.approx(float(-(log_p_V.exp() * log_p_V).sum()), abs=1e-4)


def test_top_k_breaks_ties_by_lower_id() -> None:
    z_NV = torch.tensor(
        [[1.0, 3.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]
    )
    assert entropy.top_k_ids(z_NV, 2).tolist() == [[1, 2], [0, 1], [0, 1]]
    assert entropy.top_k_ids(z_NV, 5).tolist() == [[1, 2, 3, 5, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert entropy.top_k_ids(z_NV, 6).tolist()[0] == [1, 2, 3, 5, 4, 0]
    assert entropy.top_k_ids(z_NV, 0).shape == (3, 0)
    z_NV = torch.randint(0, 6, (200, 50)).float()
    # among more ids the groups of neighbours come in
    many_NV = torch.randint(-3, 4, (50, 30522)).float()
    many_NV[::2] += torch.randn(25, 30522)
    for k in (1, 16):
        expected = many_NV.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(entropy.top_k_ids(many_NV, k), expected)
    for k in (1, 7, 49, 50):
        assert torch.equal(entropy.top_k_ids(z_NV, k), z_NV.sort(dim=-1, descending=True, stable=True).indices[:, :k])


def test_entropy_limits() -> None:
    def of(logits_1V: Tensor) -> Tensor:
        return entropy.entropy_and_surprisal(logits_1V, torch.zeros(1, dtype=torch.int64))[0]

    certain_1V = torch.zeros(1, 1000)
    certain_1V[0, 3] = 1e4
    assert of(torch.zeros(1, 1000)).item() == pytest.approx(np.log(1000), abs=1e-5)
    assert of(certain_1V).item() == 0
    assert of(torch.tensor([[0.0, 0.0, -torch.inf]])).item() == pytest.approx(np.log(2), abs=1e-6)
    assert of(torch.randn(1, 50).bfloat16()).dtype == torch.float32


def test_a_row_is_reduced_alike_alone_and_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    z_NV, targets_N = torch.randn(37, 3000) * 4, torch.arange(37)
    at_once = entropy.score(z_NV, targets_N, TOP_K, (2.0,))
    monkeypatch.setattr(entropy, "IN_CACHE", 3000 * 4)
    for found, expected in zip(entropy.score(z_NV, targets_N, TOP_K, (2.0,)), at_once, strict=True):
        assert torch.equal(found, expected)
