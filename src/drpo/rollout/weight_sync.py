"""Weights for another program: with the names and shapes of a checkpoint on disk."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from drpo.errors import InputError
from drpo.model.loading import named_tensors


class WeightSync:
    """Converts a policy's state into the tensors of a checkpoint of the same model.

    Args:
        model: provides the names, and how transformers rearranged the parameters at loading (for example, it stacks the
            experts of a mixture).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._names = tuple(named_tensors(model))

    def checkpoint(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors, by their names in a checkpoint, without a tied head.

        Args:
            state: every parameter and persistent buffer by its name in the transformers model.

        Raises:
            InputError: a tensor is missing.

        Example:
            >>> from drpo.model.loading import tiny
            >>> model, _ = tiny()
            >>> tensors = WeightSync(model).checkpoint(dict(model.named_parameters()))
            >>> "model.embed_tokens.weight" in tensors, "lm_head.weight" in tensors
            (True, False)
        """
        for name in self._names:
            if name not in state:
                raise InputError(f"weights for the rollout engine lack {name!r}")
        tensors = {name: state[name].detach() for name in self._names}
        return dict(revert_weight_conversion(self._model, tensors))
