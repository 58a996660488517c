"""Modes and dropout of a transformers model's blocks, of which the cloud's are built from the configuration and follow
the model: what a script does to the block that is cut it means of those above it, too, which it cannot reach."""

from __future__ import annotations

from typing import Any

from torch import nn

from sft.errors import UsageError
from sft.models import Cut, family_of

_OF_HEADS = ("classifier_dropout", "qa_dropout", "seq_classif_dropout", "summary_first_dropout")
"""Settings that say nothing of the blocks."""


class BlockModes:
    """Of the block that is cut; blocks below it are the edge's alone."""

    def __init__(self, base: Any, name: str, cut: Cut) -> None:
        """`base`: the base model, cut, called `name` in the script's model."""
        place = f"{family_of(base.config).blocks}.{cut.split_layer - 1}"
        inside = dict(base.get_submodule(place).named_modules(prefix=f"{name}.{place}"))
        self._dropouts = {own: (one, one.p) for own, one in inside.items() if isinstance(one, nn.Dropout)}
        self._modules = {name: base, f"{name}.{place}": inside[f"{name}.{place}"]}
        self._modules.update((own, one) for own, (one, _) in self._dropouts.items())
        settings = [p for key, p in base.config.to_dict().items() if "drop" in key and key not in _OF_HEADS]
        self._draws = any(isinstance(p, (int, float)) and p > 0 for p in settings)

    def check(self, training: bool) -> None:
        """Raises UsageError where one has become another than the cloud's, which are in the mode `training`."""
        for name, (module, p) in self._dropouts.items():
            if module.p != p:
                raise UsageError(
                    f"p of '{name}' has become {module.p} since the model was cut, which the cloud does not hear of: "
                    "make the model of a config that says so"
                )
        for name, module in self._modules.items():
            if self._draws and module.training is not training:
                raise UsageError(
                    f"'{name}' and the model around it are not both in train() or eval() mode, and the cloud's blocks "
                    "follow the latter: call train() or eval() of the model, or make it of a config with a dropout of 0"
                )
