"""Any module of a script, cut at a named `nn.Linear`; the same script with `role="cloud"` has the other half.

Labels always stay on the edge: the loss is the script's own.
"""

from __future__ import annotations

import logging
from typing import Any, Dict, List, Mapping, Sequence

from torch import Tensor, nn

from sft.errors import CutError, UsageError
from sft.graphs.cut import GraphCut, cut
from sft.models.decompose import decompose
from sft.tensors.stream import StoredTensor, in_memory
from sft.wire.cut import layer_cut_to_proto
from sft_edge.script.cut_model import Cross, CutModel, other_modes
from sft_edge.script.forward import replace_forward

_log = logging.getLogger("sft_edge")


class GraphModel(CutModel):
    """A module that torch.fx can trace down to the layer."""

    def __init__(self, model: nn.Module, layer_name: str, split_rank: int, residual: str = "none") -> None:
        """Raises CutError and UsageError; the model is as it was."""
        if residual != "none":
            raise CutError(
                f"a module of a script is cut without its residual, as in the paper; residual={residual!r} is "
                "for transformers models"
            )
        if "forward" in vars(model):
            raise UsageError(
                f"the forward of this {type(model).__name__} was replaced; wrap it before anything else does"
            )
        self._model, self.layer_name = model, layer_name
        self._cut: GraphCut = cut(model, layer_name, split_rank)
        layer = self._cut.layer
        factors = decompose(layer.weight.T, split_rank)
        self._u_FR = factors.u_FR
        cloud: Dict[str, Tensor] = {
            f"{layer_name}.ffn2.weight": factors.s_RR.T.contiguous(),
            f"{layer_name}.ffn3.weight": factors.v_RD.T.contiguous(),
        }
        if layer.bias is not None:
            cloud[f"{layer_name}.ffn3.bias"] = layer.bias.detach().clone()
        self.cloud_factors: List[StoredTensor] = list(in_memory(cloud))
        self.cloud_tensors: List[StoredTensor] = list(in_memory(self._cut.upper_tensors()))
        self.cloud_names = sorted([*cloud, *self._cut.upper_names])
        self.other_names = self._cut.other_names
        self.factor_names: Mapping[str, Sequence[str]] = self._cut.factor_names

    def request_fields(self) -> Dict[str, Any]:
        """See CutModel."""
        return {"cut": layer_cut_to_proto(self._cut.layer_name, self._cut.split_rank)}

    def describe(self) -> str:
        """See CutModel."""
        return str(self._cut)

    def install(self, cross: Cross) -> Dict[str, nn.Parameter]:
        """See CutModel."""
        upper = self._cut.upper_modules()
        ffn_1 = self._cut.keep_net_1()
        ffn_1.weight.data.copy_(self._u_FR.T)
        for tied in self._cut.tied:
            _log.warning("%s", tied)
        self.cloud_tensors, self.cloud_factors = [], []  # what the model does not hold any more nobody shall

        def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            def there_and_back(activation: Tensor, variant: int) -> Tensor:
                others = other_modes(upper, model.training)
                outputs = cross(activation, training=model.training, variant=variant, other_mode=others).outputs
                assert outputs is not None  # labels stay
                return outputs

            return self._cut.run(there_and_back, args, kwargs)

        replace_forward(self._model, forward)
        return dict(self._model.named_parameters())
