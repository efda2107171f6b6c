"""Which linear layers of an inference copy compute from weights in oneDNN's own layout, and which rows are kept."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, nn

from vpd.rollout.onednn_linear import rearrange_linears


class RearrangedWeights:
    """The linear layers of an inference copy that compute from weights in oneDNN's own layout.

    Such a layer never reads its ``weight``, the rows as PyTorch stores them. The rows are kept only where something
    else reads them: another module that is tied to the layer, the model that the copy was made of, or a forward
    (:meth:`keep_rows`).

    Args:
        network: The inference copy, whose linear layers are replaced where the CPU gains from it.
        source: The model that the copy was made of.
    """

    def __init__(self, network: nn.Module, source: nn.Module) -> None:
        self._layers = rearrange_linears(network)
        users = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
        of_source = {id(parameter) for parameter in source.parameters()}
        self._without_rows = {
            f"{name}.weight"
            for name, layer in self._layers.items()
            if users[id(layer.weight)] == 1 and id(layer.weight) not in of_source
        }

    @property
    def leaves_rows_out(self) -> bool:
        """Whether the rows of any layer are not kept."""
        return bool(self._without_rows)

    def keep_rows(self) -> None:
        """Keep the rows of all layers from the next update on."""
        self._without_rows.clear()

    def take(self, name: str, target: Tensor, source: Tensor) -> bool:
        """Take over the weight ``source`` into the layer that has the parameter ``name``, if its rows are not kept.

        Returns:
            Whether the weight was taken. If not, the caller copies the rows, and :meth:`rearrange_rows` reads them.
        """
        if name not in self._without_rows:
            return False
        target.data = target.data.new_empty(0)
        self._layers[name.removesuffix(".weight")].rearrange(source)
        return True

    def rearrange_rows(self) -> None:
        """Rearrange the weights of all layers whose rows are kept."""
        for name, layer in self._layers.items():
            if f"{name}.weight" not in self._without_rows:
                layer.rearrange(layer.weight)

    def free(self) -> None:
        """Give up all rearranged weights; the layers compute nothing until the weights are rearranged anew."""
        for layer in self._layers.values():
            layer.release()
