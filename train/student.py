"""Students: sizes, loading, and the MLM head on the masked positions only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, BertConfig, PretrainedConfig, PreTrainedModel

from pipeline import storage
from pipeline.checkpoints import load_config, load_masked_lm, load_tokenizer, local_checkpoint, max_length, weights_hash
from pipeline.cli import UsageError
from pipeline.entropy import entropy_and_surprisal
from pipeline.manifests import Manifest, special_ids, tokenizer_hash
from train.distill import masked_lm_loss

# Google's BERT miniatures (Turc et al. 2019, arXiv 1908.08962): layers, hidden size
PRESETS = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "medium": (8, 512), "base": (12, 768)}
PROBE = 16  # tokens of a row on which a new student's head is tried out
# what a forward raises that was not made for such input
UNFIT = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
LOGITS_PER_CHUNK = {"cpu": 1 << 23, "cuda": 1 << 28}  # of scores, which take no gradient


def build_student(name: str, manifest: Manifest, seed: int, trust_remote_code: bool = False) -> Any:
    """A masked LM whose head runs on masked positions only (see ``MaskedPositions``).

    Args:
        name: a preset, a configuration (``config.json``, or a directory with one and no weights), or a checkpoint by
            path or Hub id, whose training goes on.
        manifest: the shards to train on; a preset takes its vocabulary from their tokenizer, and any new model the
            padding token.
        seed: of the initial weights.

    Raises:
        UsageError: the checkpoint does not fit the shards, or cannot be loaded.
    """
    if name in PRESETS:
        model = _from_config(name, _preset(name, manifest), manifest, seed)
    elif name.endswith(".json") and Path(name).is_file():
        model = _from_config(name, load_config(Path(name), trust_remote_code), manifest, seed)
    else:
        if "/" not in name and not Path(name).exists():
            raise UsageError(f"--model {name} is no preset ({', '.join(PRESETS)}), file, directory or Hub id")
        directory = local_checkpoint(name)
        if list(directory.glob("*.safetensors")):
            _check_tokenizer(name, directory, manifest)
            model = load_masked_lm(directory, trust_remote_code)
        else:
            model = _from_config(name, load_config(directory, trust_remote_code), manifest, seed)
    if model.config.vocab_size < manifest.vocab_size:
        raise UsageError(
            f"--model {name} has {model.config.vocab_size} tokens, the shards {manifest.vocab_size}; "
            "use shards made with the model's tokenizer"
        )
    longest = max_length(model.config)
    if longest and manifest.sequence_length > longest:
        raise UsageError(f"the shards have {manifest.sequence_length} tokens a sequence, --model {name} only {longest}")
    return with_masked_positions(model)


def model_identity(name: str) -> str:
    """What decides the initial weights besides the seed: a preset's name, else a hash of configuration and weights.

    Raises:
        UsageError: as ``build_student``, which is to be called first.
    """
    if name in PRESETS:
        return name
    path = Path(name) if Path(name).is_file() else local_checkpoint(name)
    if path.is_dir() and list(path.glob("*.safetensors")):
        return weights_hash(path)
    return storage.sha256(str(path / "config.json" if path.is_dir() else path))


def _preset(name: str, manifest: Manifest) -> BertConfig:
    layers, hidden = PRESETS[name]
    return BertConfig(
        vocab_size=manifest.vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        max_position_embeddings=max(512, manifest.sequence_length),
        hidden_dropout_prob=0.0,  # each token is seen a few times only; fine-tuning puts dropout back
        attention_probs_dropout_prob=0.0,
    )


def _from_config(name: str, config: PretrainedConfig, manifest: Manifest, seed: int) -> PreTrainedModel:
    config.pad_token_id = manifest.special_ids["pad"]  # whose embedding is not trained, nor counted by RoBERTa
    torch.manual_seed(seed)
    try:
        return AutoModelForMaskedLM.from_config(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"--model {name} is no configuration that a model can be made of: {reason}") from None


def _check_tokenizer(name: str, directory: Path, manifest: Manifest) -> None:
    if any((directory / file).exists() for file in ("tokenizer.json", "vocab.txt", "vocab.json")):
        tokenizer = load_tokenizer(str(directory))
        if tokenizer_hash(tokenizer) != manifest.tokenizer_hash:
            raise UsageError(
                f"--model {name} was trained with another tokenizer (special ids {special_ids(tokenizer)}) than the "
                f"shards {manifest.uri}; score the corpus with the model's tokenizer"
            )


class MaskedPositions:
    """Mixed into a masked LM: with ``positions_BK`` the head runs only there, and the forward returns the loss.

    The encoder's output is narrowed by a hook, so that the model's own head does the rest: this holds for any
    architecture whose forward is encoder, head. For others the head runs everywhere, and its logits are narrowed.
    Without ``positions_BK`` the forward is the model's own. Another hook takes what goes into the vocabulary projection
    at ``scored_BR`` out of the way of gradients; where there is no such module, their logits are narrowed as well.
    """

    sparse_head = True  # the head can run at some positions alone
    parted_head = True  # its projection is a module of its own
    _positions_BP: Tensor | None = None  # those that the head gets to see: K masked, then R scored
    _masked = 0  # K
    _features_BRH: Tensor | None = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        positions_BK: Tensor | None = None,
        labels_BK: Tensor | None = None,
        teacher_ids_BKT: Tensor | None = None,
        teacher_logprobs_BKT: Tensor | None = None,
        temperature_lse_BK: Tensor | None = None,
        scored_BR: Tensor | None = None,
        distill_weight: float = 0.0,
        distill_temperature: float = 1.0,
        **others: Any,
    ) -> Any:
        """Loss of a masked batch, a mean over B·K positions.

        Args:
            input_ids: corrupted tokens [B, L].
            positions_BK: masked positions; negative ones are ignored.
            labels_BK: hidden tokens, -100 where ignored.
            teacher_ids_BKT, teacher_logprobs_BKT: the teacher's top T at those positions; needed if ``distill_weight``.
            temperature_lse_BK: lse_T of the teacher there (``train.distill``); needed if T is not 1.
            scored_BR: positions that are not masked, whose scores are wanted; at negative ones they mean nothing.
            distill_weight: α in ``(1 - α)·CE + α·T²·KL(teacher ‖ student)``.
            distill_temperature: T of both distributions in the KL.

        Returns:
            ``{"loss": scalar}``, or without labels ``{"logits": logits_BKV}``; and for ``scored_BR`` ``"entropy"`` and
            ``"surprisal"`` [B, R], float32, in nats, without gradient.
        """
        own_forward: Callable[..., Any] = super().forward  # type: ignore[misc]
        if positions_BK is None:
            return own_forward(input_ids=input_ids, attention_mask=attention_mask, **others)
        K = positions_BK.shape[1]
        positions_BP = positions_BK if scored_BR is None else torch.cat([positions_BK, scored_BR], dim=1)
        positions_BP = positions_BP.clamp_min(0)
        self._positions_BP, self._masked = (positions_BP if self.sparse_head else None), K
        try:
            logits = own_forward(input_ids=input_ids, attention_mask=attention_mask).logits
        finally:
            features_BRH, self._positions_BP, self._features_BRH = self._features_BRH, None, None
        logits_BPV = logits if self.sparse_head else _at(logits, positions_BP)
        logits_BKV = logits_BPV[:, :K]
        # logits that nobody asked for would be copied to float32 by autocast
        output: dict[str, Tensor] = {} if labels_BK is not None else {"logits": logits_BKV}
        if scored_BR is not None and input_ids is not None:
            tokens_BR = input_ids.gather(1, positions_BP[:, K:])
            if features_BRH is None:
                found = entropy_and_surprisal(logits_BPV[:, K:].detach().flatten(0, 1), tokens_BR.flatten())
                output["entropy"], output["surprisal"] = (score_N.view_as(tokens_BR) for score_N in found)
            else:
                output["entropy"], output["surprisal"] = _scores(self, features_BRH, tokens_BR)
        if labels_BK is not None:
            loss_N = masked_lm_loss(
                logits_BKV.flatten(0, 1),
                labels_BK.flatten(),
                None if teacher_ids_BKT is None else teacher_ids_BKT.flatten(0, 1),
                None if teacher_logprobs_BKT is None else teacher_logprobs_BKT.flatten(0, 1),
                distill_weight,
                distill_temperature,
                None if temperature_lse_BK is None else temperature_lse_BK.flatten(),
            )
            # a constant denominator: the mean is the same however a batch is split among steps and ranks
            output["loss"] = loss_N.sum() / labels_BK.numel()
        return output


def with_masked_positions(model: Any) -> Any:
    """Give a masked LM the forward of ``MaskedPositions``. It keeps its class name, so it is saved as what it was.

    Whether its head can run on some positions alone is tried out on a few tokens; where it cannot, that is said in one
    line, and it runs everywhere.

    Raises:
        UsageError: the model gives no logits [B, L, V] for input_ids and an attention mask.
    """

    def narrow(module: Any, args: Any, output: Any) -> Any:
        if model._positions_BP is not None:
            output.last_hidden_state = _at(output.last_hidden_state, model._positions_BP)
        return output

    def part(module: Any, args: Any) -> Any:
        K = model._masked
        if model.parted_head and model._positions_BP is not None and model._positions_BP.shape[1] > K:
            model._features_BRH = args[0][:, K:].detach()
            return args[0][:, :K]
        return None

    name = type(model).__name__
    model.base_model.register_forward_hook(narrow)
    if model.get_output_embeddings() is not None:
        model.get_output_embeddings().register_forward_pre_hook(part)
    model.__class__ = type(name, (MaskedPositions, type(model)), {"__module__": type(model).__module__})
    with torch.no_grad(), _on_trial(model):
        model.sparse_head, model.parted_head = _try_head(model)
    if not model.sparse_head:
        print(f"the head of {name} needs whole sequences: it runs at every position, masked or not", file=sys.stderr)
    return model


def _at(hidden_BLH: Tensor, positions_BK: Tensor) -> Tensor:
    rows_B1 = torch.arange(len(hidden_BLH), device=hidden_BLH.device)[:, None]
    return hidden_BLH[rows_B1, positions_BK]


def _try_head(model: Any) -> tuple[bool, bool]:
    """Whether the logits at some positions stay the same when the head runs there alone; and when it is parted."""
    ids_BL = torch.arange(2 * PROBE, device=model.device).view(2, PROBE) % model.config.vocab_size
    positions_BK = torch.tensor([[1, 2, 5], [0, 3, PROBE - 1]], device=model.device)
    inputs = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}
    try:
        logits_BLV = model(**inputs).logits
        if logits_BLV.shape != (*ids_BL.shape, model.config.vocab_size):
            raise ValueError(f"their shape is {list(logits_BLV.shape)}")
    except UNFIT as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{type(model).__name__} gives no logits for each token of a batch ({reason}); use another masked LM"
        ) from None
    expected_BKV, scored_BK = _at(logits_BLV, positions_BK), positions_BK.flip(1)
    tokens_BK = ids_BL.gather(1, scored_BK)
    scores_N = entropy_and_surprisal(_at(logits_BLV, scored_BK).flatten(0, 1), tokens_BK.flatten())
    sparse = parted = True
    try:
        found = model(**inputs, positions_BK=positions_BK)
        sparse = _same(found["logits"], expected_BKV)
        found = model(**inputs, positions_BK=positions_BK, scored_BR=scored_BK)
        parted = _same(found["logits"], expected_BKV)
        parted &= all(_same(found[n].flatten(), s) for n, s in zip(("entropy", "surprisal"), scores_N, strict=True))
    except UNFIT:
        sparse = parted = False
    return sparse, sparse and parted


def _same(found: Tensor, expected: Tensor) -> bool:
    nearly = 1e-3 * float(expected.abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=nearly)


@contextmanager
def _on_trial(model: Any) -> Iterator[None]:
    """A model as it may be once it is trained: without dropout, its vocabulary's biases not zero. Then as it was."""
    was_training = model.training
    model.eval()
    biases = [parameter for parameter in model.parameters() if parameter.shape == (model.config.vocab_size,)]
    before = [bias.clone() for bias in biases]
    for bias in biases:
        bias.copy_(torch.linspace(-1, 1, len(bias)))
    try:
        yield
    finally:
        for bias, values in zip(biases, before, strict=True):
            bias.copy_(values)
        model.train(was_training)


@torch.no_grad()
def _scores(model: Any, features_BRH: Tensor, tokens_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and surprisal [B, R] from what goes into the vocabulary projection; never are all logits alive."""
    rows = max(1, LOGITS_PER_CHUNK["cuda" if features_BRH.is_cuda else "cpu"] // model.config.vocab_size)
    project = model.get_output_embeddings()
    parts_NH, parts_N = features_BRH.flatten(0, 1).split(rows), tokens_BR.flatten().split(rows)
    found = [entropy_and_surprisal(project(part_NH), part_N) for part_NH, part_N in zip(parts_NH, parts_N, strict=True)]
    entropy_N, surprisal_N = (torch.cat(column) for column in zip(*found, strict=True))
    return entropy_N.view_as(tokens_BR), surprisal_N.view_as(tokens_BR)


@torch.no_grad()
def student_scores(model: Any, input_ids_BL: Tensor, attention_BL: Tensor | None) -> dict[str, Tensor]:
    """The model's predictive ``entropy`` and its ``surprisal`` at the actual tokens [B, L], float32, in nats.

    On the batch as it is, nothing hidden, and without dropout; a few rows at a time where the head cannot be parted.
    """
    was_training = model.training
    model.eval()
    B, L = input_ids_BL.shape
    position_L, rows = torch.arange(L, device=input_ids_BL.device), B
    if not model.parted_head:
        rows = max(1, LOGITS_PER_CHUNK["cuda" if input_ids_BL.is_cuda else "cpu"] // (L * model.config.vocab_size))
    found: dict[str, list[Tensor]] = {"entropy": [], "surprisal": []}
    for start in range(0, B, rows):
        ids_RL = input_ids_BL[start : start + rows]
        attention_RL = None if attention_BL is None else attention_BL[start : start + rows]
        all_RL = position_L.expand_as(ids_RL)
        output = model(ids_RL, attention_RL, positions_BK=all_RL[:, :0], scored_BR=all_RL)
        for name, chunks in found.items():
            chunks.append(output[name])
    model.train(was_training)
    return {name: torch.cat(chunks) for name, chunks in found.items()}
