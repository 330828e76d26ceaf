"""One adapter for any masked LM: its encoder and head at chosen positions, for teachers and students alike.

Shapes: B rows, L tokens, K chosen positions of a row, N chosen positions, H width of the projection's input,
V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from entropy_masking.errors import UsageError, one_line

Select = tuple[Tensor, Tensor]  # rows and columns of positions, two index tensors of one shape

# errors of a forward that does not support such input
FORWARD_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, AssertionError)


class MaskedLM:
    """Runs a masked LM at chosen positions.

    If the head works position by position, it runs only at these positions: a hook selects them from the encoder's
    output. A head that needs whole sequences runs at every position, and the logits are selected afterwards. A test
    forward on rows of this length decides.

    Args:
        model: an ``AutoModelForMaskedLM``; it keeps its class, its weights and its forward.
        length: L, tokens of a sequence.
        name: of the model, for messages.

    Attributes:
        selective: the head can run at chosen positions alone.
        projection: the vocabulary projection if its input is available at the chosen positions (this implies
            ``selective``), else None.

    Raises:
        UsageError: the model gives no logits [B, L, V] for rows of this length.
    """

    def __init__(self, model: PreTrainedModel, length: int, name: str = "") -> None:
        self.model: Any = model  # transformers annotates ``to`` wrongly
        self.forward = model.forward
        self.selective, self.projection = True, self._hook_projection()
        self._select: Select | None = None
        model.base_model.register_forward_hook(self._select_positions)
        with torch.no_grad(), _as_if_trained(model):
            self._choose_forward(length, name or type(model).__name__)

    def features(self, input_ids: Tensor, attention_mask: Tensor | None, select: Select) -> Tensor:
        """The input of ``project`` at the chosen positions: [*select, H], or the logits if there is no projection."""
        if not self.selective:
            return self._run(input_ids, attention_mask)[select]
        if select[0].ndim > 1:
            return self._run(input_ids, attention_mask, select)
        rows_1N, columns_1N = select[0][None], select[1][None]  # some heads accept only three dimensions
        return self._run(input_ids, attention_mask, (rows_1N, columns_1N))[0]

    def project(self, features: Tensor) -> Tensor:
        """Features [..., H] → logits [..., V]."""
        return features if self.projection is None else self.projection(features)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None, select: Select) -> Tensor:
        """The logits at the chosen positions: [*select, V]."""
        return self.project(self.features(input_ids, attention_mask, select))

    def _run(self, input_ids: Tensor, attention_mask: Tensor | None, select: Select | None = None) -> Tensor:
        self._select = select
        try:
            return self.forward(input_ids=input_ids, attention_mask=attention_mask, return_dict=True).logits
        finally:
            self._select = None

    def _hook_projection(self) -> nn.Linear | None:
        """Make the vocabulary projection return its input while positions are selected; returns the projection."""
        projection = self.model.get_output_embeddings()
        if not isinstance(projection, nn.Linear):
            return None
        project = projection.forward

        def forward(features: Tensor) -> Tensor:
            return project(features) if self._select is None or self.projection is None else features

        projection.forward = forward  # type: ignore[method-assign, assignment]
        return projection

    def _select_positions(
        self, module: nn.Module, inputs: tuple[object, ...], output: ModelOutput | tuple[Tensor, ...]
    ) -> ModelOutput | tuple[Tensor, ...]:
        if self._select is None:
            return output
        if isinstance(output, tuple):
            return (output[0][self._select], *output[1:])
        output["last_hidden_state"] = output["last_hidden_state"][self._select]
        return output

    def check_training(self, length: int, name: str) -> None:
        """Run a forward as in training, where some models accept fewer lengths. Raises UsageError if it fails.

        It changes neither the model nor the random state.
        """
        ids_BL = self._test_rows(length)
        before = [buffer.clone() for buffer in self.model.buffers()]
        was_training = self.model.training
        self.model.train()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[ids_BL.device] if ids_BL.is_cuda else []):
                self._run(ids_BL, torch.ones_like(ids_BL))
        except FORWARD_ERRORS as error:
            problem = f"{name} cannot be trained on sequences of {length} tokens ({one_line(error)[:200]})"
            raise UsageError(f"{problem}; use sequences of another length, or another model") from None
        finally:
            self.model.train(was_training)
            with torch.no_grad():
                for buffer, values in zip(self.model.buffers(), before, strict=True):
                    buffer.copy_(values)

    def _test_rows(self, length: int) -> Tensor:
        """Two rows [2, L] of different tokens."""
        # without padding, to which RoBERTa gives no position: its last positions must be tried too
        ids_L = torch.arange(2 * length, device=self.model.device) % (self.model.config.vocab_size - 1)
        return (ids_L + (ids_L >= (self.model.config.pad_token_id or 0))).view(2, length)

    def _choose_forward(self, length: int, name: str) -> None:
        """Choose the cheapest forward that gives the logits of the plain model. Raises UsageError if there is none."""
        device, V = self.model.device, self.model.config.vocab_size
        ids_BL = self._test_rows(length)
        mask_BL = torch.ones_like(ids_BL)
        columns_BK = torch.tensor([[1, 2, length // 2], [0, 3, length - 1]], device=device).clamp_max(length - 1)
        select = torch.tensor([[0], [1]], device=device).expand_as(columns_BK), columns_BK
        try:
            logits_BLV = self._run(ids_BL, mask_BL)
        except FORWARD_ERRORS as error:
            problem = f"{name} cannot be run on sequences of {length} tokens ({one_line(error)[:200]})"
            raise UsageError(f"{problem}; use shorter sequences, or another masked LM") from None
        if logits_BLV.shape != (2, length, V):
            problem = f"{name} does not give logits for each token of a batch (their shape is {list(logits_BLV.shape)})"
            raise UsageError(f"{problem}; use another masked LM")
        if not logits_BLV.isfinite().all():
            return  # they cannot be compared; the run that uses them ends with its own error
        for projection, selective in ((self.projection, True), (None, True), (None, False)):
            self.projection, self.selective = projection, selective
            with suppress(*FORWARD_ERRORS):
                chosen_BKV, expected_BKV = self.logits(ids_BL, mask_BL, select), logits_BLV[select]
                nearly = 1e-3 * float(expected_BKV.abs().max())
                if chosen_BKV.shape == expected_BKV.shape and (chosen_BKV - expected_BKV).abs().max() <= nearly:
                    return
        raise UsageError(f"{name} gives different logits each time for the same batch; use another masked LM")


@contextmanager
def _as_if_trained(model: PreTrainedModel) -> Iterator[None]:
    """Make a new model resemble a trained one for the test: no dropout, non-zero vocabulary biases. Restores both."""
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
