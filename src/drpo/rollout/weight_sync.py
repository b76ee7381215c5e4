"""The weights as another program reads them: under the names, and in the shapes, of a checkpoint on disk."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from drpo.errors import InputError
from drpo.model.loading import named_tensors


class WeightSync:
    """Turns a policy's state into the tensors of a checkpoint of the same model.

    Args:
        model: tells the names, and how transformers rearranged its parameters while it loaded them (the experts of a
            mixture of experts are stacked, for one).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._names = tuple(named_tensors(model))

    def checkpoint(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors, by their names in a checkpoint; a tied head has none of its own.

        Args:
            state: every parameter and persistent buffer by its name in the transformers model.

        Raises:
            InputError: one is missing.

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
        ours = {name: state[name].detach() for name in self._names}
        return dict(revert_weight_conversion(self._model, ours))
