"""The modeling file that travels with a model whose architecture the library does not have."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterator

import torch
from torch import Tensor
from transformers import PretrainedConfig

from sft.files.temporary import TemporaryDirectory
from sft.models import HEADS, Cut, Undrawn, build_whole, ffn_out_name, head_named, heads_of, is_body
from sft.models.families.catalogue import family_of
from sft.models.split_layer import AwaitingResidual

DENSE, FACTORED = "dense", "factored"
"""What stands where W was: one matrix, or three."""

_FOR_MYPY = "# mypy: allow-untyped-calls\n"
_FOR_RUFF = "  # noqa: F401"  # what is put in uses all that is imported
_IMPORT = "from sft.models.split_layer import AwaitingResidual\n"

_modules: Dict[str, ModuleType] = {}
"""By their code."""


class ModelingFile:
    """`modeling_sft.py`, which is written for one of BERT's classes, for the class of a decomposed model."""

    name = "modeling_sft.py"

    def __init__(self, config: PretrainedConfig, head: str, cut: Cut, form: str) -> None:
        """`config`: the library's own, of the model before the cut; `head` may be a body; `form`: DENSE or FACTORED."""
        self._config = config
        self._body = head_named(head).options if is_body(head) else None
        head = heads_of(config)[0] if is_body(head) else head  # beside which the file has the base model, too
        model = build_whole(config, head).model
        self._base_prefix = f"{model.base_model_prefix}."
        self._class, self._base_class = type(model).__name__, type(model.base_model).__name__
        self._auto_class: str = HEADS[head].auto_class.__name__
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
        source = pkgutil.get_data(__package__, self.name)  # not imported: it brings the library's BERT along
        assert source is not None
        text = source.decode("utf-8")
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
        layer = self._layer if self._body is None else self._layer[len(self._base_prefix) :]
        return {f"{layer}.weight": torch.empty(0)}

    @contextmanager
    def model(self) -> Iterator[Any]:
        """For the block: a model of the file's own class, without memory. Its `save_pretrained` is the library's, which
        writes the file, too. Raises OSError."""
        fields = self.config_fields()
        del fields["model_type"]  # the class has it
        values = self._config.to_dict()
        del values["model_type"]
        with _imported(self.text(), self.name) as module:
            config = getattr(module, f"Split{type(self._config).__name__}").from_dict({**values, **fields})
            name = self._class if self._body is None else f"Split{self._base_class}"
            with torch.device("meta"), Undrawn():
                model = getattr(module, name)(config, **(self._body or {}))
            yield model


@contextmanager
def _imported(code: str, name: str) -> Iterator[ModuleType]:
    """Code as a module of this process, once; for the block as a file, too, which the library copies where it saves."""
    with TemporaryDirectory("sft-modeling-") as place:
        path = Path(place) / name
        path.write_text(code, encoding="utf-8")
        if code not in _modules:
            # The library takes the last part of a module's name for that of its file.
            spec = importlib.util.spec_from_file_location(f"sft_modeling_{len(_modules)}.{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[module.__name__] = module
            spec.loader.exec_module(module)
            _modules[code] = module
        _modules[code].__file__ = str(path)
        yield _modules[code]
