"""`save_pretrained` of a cut model: a directory that opens as the model that was trained, both halves of it.

Its weights are those of `state_dict()`, by the same names, so that transformers' `Trainer` goes on from what it saved.
The library has no such architecture: a modeling file travels with them, as with `sft-edge export --factored`.

Adapters are merged: no checkpoint that they could be put on has the factors that were trained beside them. To go on
from there, what was trained stands unmerged in a file beside, which `load_adapter` reads.
"""

from __future__ import annotations

import copy
import inspect
import types
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from sft.errors import UsageError
from sft.models import Cut, build_whole, live_parameters, whole_name
from sft.models.adapters import is_adapter
from sft.models.lora import LoraSpec, add_lora, merged_tensors
from sft.tensors.pretrained import index_file, single_file
from sft_edge.files import write_json
from sft_edge.model_files import FACTORED, ModelingFile

UNMERGED_FILE = "adapter_model.safetensors"
"""What was trained of a model with adapters, by the names of `state_dict()`. A Trainer looks for this name."""


class Saving:
    """What a cut model saves."""

    def __init__(self, library: Any, head: str, cut: Cut, adapters: Optional[LoraSpec]) -> None:
        """`library`: the model, not cut yet, with `adapters`."""
        self._head, self._cut, self._adapters = head, cut, adapters
        self._frozen = {name for name, parameter in live_parameters(library).items() if not parameter.requires_grad}
        config = copy.deepcopy(library.config)
        self._in_place_of_w = ModelingFile(config, head, cut, FACTORED).in_place_of_w()

    def follow(self, model: Any) -> None:
        """From now on `model.save_pretrained(...)` saves the whole model, and `load_state_dict` takes what it wrote.

        `model` is the library's, or a PeftModel around it; the arguments are those of the library's `save_pretrained`.
        """
        signature = inspect.signature(PreTrainedModel.save_pretrained)

        def save_pretrained(self_: Any, *args: Any, **kwargs: Any) -> None:
            named: Dict[str, Any] = dict(signature.bind(self_, *args, **kwargs).arguments)
            named.pop(next(iter(named)))  # the model
            named.update(named.pop("kwargs", {}))
            state_dict: Optional[Mapping[str, Tensor]] = named.pop("state_dict", None)
            self._save(self_, self_.state_dict() if state_dict is None else state_dict, named)

        model.save_pretrained = types.MethodType(save_pretrained, model)
        model._register_load_state_dict_pre_hook(self._drop)
        if self._adapters is not None:
            model.load_adapter = types.MethodType(_load_adapter, model)

    def _save(self, model: Any, state_dict: Mapping[str, Tensor], arguments: Dict[str, Any]) -> None:
        # Peft keeps what `modules_to_save` are copies of.
        state_dict = {name: tensor for name, tensor in state_dict.items() if ".original_module." not in name}
        whole = self._whole(model, {whole_name(name): tensor for name, tensor in state_dict.items()})
        whole.save_pretrained(**arguments)
        if self._adapters is not None and arguments.get("is_main_process", True):
            on_edge = dict(model.named_parameters())
            trained = {
                name: tensor.detach().contiguous()
                for name, tensor in state_dict.items()
                if (on_edge[name].requires_grad if name in on_edge else whole_name(name) not in self._frozen)
            }
            _save_beside(trained, Path(arguments["save_directory"]))

    def _whole(self, model: Any, state_dict: Dict[str, Tensor]) -> Any:
        """The model in one piece, of the class that opens what it saves; `state_dict` by names in the whole model."""
        config = copy.deepcopy(model.config)
        if any(map(is_adapter, state_dict)):
            state_dict = self._merged(config, state_dict)
        whole = ModelingFile(config, self._head, self._cut, FACTORED).model()
        odd = whole.load_state_dict({**state_dict, **self._in_place_of_w}, strict=False, assign=True)
        for name in (*odd.missing_keys, *odd.unexpected_keys):
            has = "lacks" if name in odd.missing_keys else "has, and the model has not,"
            raise UsageError(f"save_pretrained: state_dict {has} '{name}'; leave it out, or give model.state_dict()")
        if model.can_generate():
            whole.generation_config = model.generation_config
        return whole

    def _merged(self, config: PretrainedConfig, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
        assert self._adapters is not None
        net = build_whole(config, self._head, self._cut)
        add_lora(net, self._adapters.of_half(net, "edge"), seed=0)
        net.load_state_dict({own: state_dict[whole] for own, whole in net.whole_names.items()}, assign=True)
        return {tensor.name: tensor.read() for tensor in merged_tensors(net)}

    def _drop(self, state_dict: Dict[str, Any], prefix: str, *_: Any) -> None:
        for name in self._in_place_of_w:
            if prefix + name in state_dict and not state_dict[prefix + name].numel():
                del state_dict[prefix + name]


def _save_beside(trained: Dict[str, Tensor], directory: Path) -> None:
    save_file(trained, str(directory / UNMERGED_FILE))
    whole = directory / single_file("model")
    if whole.is_file():  # a Trainer would load what is merged into the model that has adapters, name by name
        part = f"{whole.stem}-00001-of-00001{whole.suffix}"
        with safe_open(str(whole), "pt") as file:
            weight_map = dict.fromkeys(file.keys(), part)
        index = {"metadata": {"total_size": whole.stat().st_size}, "weight_map": weight_map}
        write_json(directory / index_file("model"), index)
        whole.rename(directory / part)


def _load_adapter(model: Any, model_id: Any, *_: Any, **__: Any) -> None:
    """In the place of peft's: how transformers' `Trainer` goes on from a checkpoint of a model with adapters."""
    path = Path(str(model_id)) / UNMERGED_FILE
    if not path.is_file():
        raise UsageError(f"load_adapter: there is no {path}; a cut model takes what its own save_pretrained wrote")
    model.load_state_dict(load_file(str(path)), strict=False)
