"""What is trained is decided before the cut: the cloud has read it then."""

from __future__ import annotations

import weakref
from typing import Mapping

from torch import nn

from sft.errors import UsageError
from sft.graphs.on_cloud import stand_ins


class TrainedFlags:
    """`requires_grad` of a cut model's parameters, as it was when the model was cut."""

    def __init__(self, model: nn.Module, gone: Mapping[str, nn.Parameter]) -> None:
        """`gone`: what the model had by these names, and a script may still hold."""
        both = (*model.named_parameters(), *stand_ins(model).items(), *gone.items())
        self._flags = [(name, weakref.ref(p), p.requires_grad) for name, p in both]

    def check(self) -> None:
        """Raises UsageError where one has changed since: whoever means both halves reaches the edge's alone."""
        for name, reference, flag in self._flags:
            parameter = reference()
            if parameter is not None and parameter.requires_grad != flag:
                raise UsageError(
                    f"requires_grad of '{name}' has become {parameter.requires_grad} since the model was cut, which "
                    "the cloud does not hear of: set it before, or give what is to rest a parameter group of its own, "
                    "and that a learning rate of 0"
                )
