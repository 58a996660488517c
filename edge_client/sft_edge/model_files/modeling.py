"""The modeling file that travels with a model whose architecture the library does not have."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, Dict

import torch
from torch import Tensor
from transformers import PretrainedConfig

from sft.models import Cut, Undrawn, build_whole, ffn_out_name
from sft.models.families.catalogue import AUTO_CLASSES, family_of
from sft.models.split_layer import AwaitingResidual
from sft_edge.model_files import modeling_sft

DENSE, FACTORED = "dense", "factored"
"""What stands where W was: one matrix, or three."""

_FOR_MYPY = "# mypy: allow-untyped-calls\n"
_FOR_RUFF = "  # noqa: F401"  # what is put in uses all that is imported
_IMPORT = "from sft.models.split_layer import AwaitingResidual\n"


class ModelingFile:
    """`modeling_sft.py`, which is written for one of BERT's classes, for the class of a decomposed model."""

    name = "modeling_sft.py"

    def __init__(self, config: PretrainedConfig, head: str, cut: Cut, form: str) -> None:
        """`config`: the library's own, of the model before the cut; `form`: DENSE or FACTORED."""
        self._config = config
        model = build_whole(config, head).model
        self._class, self._base_class = type(model).__name__, type(model.base_model).__name__
        self._auto_class: str = AUTO_CLASSES[head].__name__
        self._layer = ffn_out_name(config, head, cut.split_layer)
        family = family_of(config)
        moves_dropout = cut.residual != "full" and family.ffn_dropout is not None
        self._split = {
            "form": form,
            "layer": self._layer,
            "residual": cut.residual,
            "rank": cut.split_rank,
            "dropout": f"{self._layer[: -len(family.ffn_out)]}{family.ffn_dropout}" if moves_dropout else None,
        }

    def text(self) -> str:
        """Its content. What the model was trained with is put in where it is imported, so the two cannot differ."""
        text = inspect.getsource(modeling_sft)
        for old, new in (
            (_FOR_MYPY, ""),
            (_FOR_RUFF, ""),
            (_IMPORT, "\n" + inspect.getsource(AwaitingResidual)),
            ("AutoModelForSequenceClassification", self._auto_class),
            ("BertForSequenceClassification", self._class),
            ("BertModel", self._base_class),
            ("BertConfig", type(self._config).__name__),
            ("sft-bert", f"sft-{self._config.model_type}"),
        ):
            if old not in text:
                raise AssertionError(f"'{old}' is not in the file that exports are made from")
            text = text.replace(old, new)
        return text

    def config_fields(self) -> Dict[str, Any]:
        """What config.json says beside, or instead of, the library's own: that this file is to be run, and how."""
        module = self.name[: -len(".py")]
        return {
            "model_type": f"sft-{self._config.model_type}",
            "auto_map": {
                "AutoConfig": f"{module}.Split{type(self._config).__name__}",
                "AutoModel": f"{module}.Split{self._base_class}",
                self._auto_class: f"{module}.{self._class}",
            },
            "sft": self._split,
        }

    def in_place_of_w(self) -> Dict[str, Tensor]:
        """What the file of weights holds under W's name, so that the library's own class refuses it."""
        return {f"{self._layer}.weight": torch.empty(0)}

    def model(self) -> Any:
        """A model of the file's own class, without memory; its `save_pretrained`, which is the library's, writes the
        file, too."""
        module = _imported(self.text(), self.name)
        fields = self.config_fields()
        del fields["model_type"]  # the class has it
        values = copy.deepcopy(self._config).to_dict()
        del values["model_type"]
        config = getattr(module, f"Split{type(self._config).__name__}").from_dict({**values, **fields})
        with torch.device("meta"), Undrawn():
            return getattr(module, self._class)(config)


@functools.lru_cache(maxsize=None)
def _imported(code: str, name: str) -> ModuleType:
    """Code as a module of this process, from a file: the library copies that to where it saves a model."""
    place = tempfile.TemporaryDirectory(prefix="sft_modeling_")
    path = Path(place.name) / name
    path.write_text(code, encoding="utf-8")
    # The library takes the last part of the name for that of the file.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["_place"] = place  # it is there as long as the module
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module
