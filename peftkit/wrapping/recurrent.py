"""The adapted recurrent layer: what wrapping makes of an nn.LSTM, nn.GRU or nn.RNN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from peftkit.kernels.torch_private import own_parameters
from peftkit.wrapping.layer import AdaptedParameters


class AdaptedRecurrent(AdaptedParameters):
    """An adapted LSTM, GRU or RNN: the fused function that torch calls gets W + ΔW of every weight.

    Torch keeps a list of the weights beside the parameters, and makes it anew where they are no longer the same. Here
    the list is what the parameters are read as, at every call. On a GPU it is not one run of memory, as cuDNN likes it.
    """

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        own, reads = own_parameters(self), self.adapter_state.reads
        return [self.effective(name) if name in reads else own.get(name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Sequence[Tensor | None]) -> None:
        del value  # what the parameters are read as; the list is kept for when the adapters are gone
        own = own_parameters(self)
        self.__dict__["_flat_weights"] = [own.get(name) for name in self._flat_weights_names]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a parameter in place of another without a look at the weights.

        RNNBase would put it into a list of the weights too, for which all are read: fully_shard, which gathers one
        after another, has only some of them then.
        """
        own = self.__dict__.get("_parameters", {})  # a module that is being made has none yet
        if isinstance(value, nn.Parameter) and name in own:
            own[name] = value
        else:
            nn.Module.__setattr__(self, name, value)

    def _weights_have_changed(self) -> bool:
        return False

    def flatten_parameters(self) -> None:
        """Do nothing: W + ΔW is not kept."""
