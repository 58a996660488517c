"""`save_pretrained` of a cut model: a directory that opens as the model that was trained, both halves of it.

Its weights are those of `state_dict()`, by the same names, so that transformers' `Trainer` goes on from what it saved.
The library has no such architecture: a modeling file travels with them, as with `sft-edge export --factored`.

Adapters are merged: the factors that were trained beside them are in no other checkpoint, so adapters alone could be
put on none. To go on from there, what was trained stands unmerged in a file beside, which `load_adapter` reads.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import types
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Collection, Dict, Iterator, Mapping, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sft.errors import StorageError, UsageError
from sft.files.temporary import TemporaryDirectory
from sft.models import Cut, build_whole, whole_name
from sft.models.lora import LoraSpec, add_lora, merged_tensors
from sft.printable import told_by
from sft.tensors.pretrained import index_file, single_file
from sft_edge.files import json_text
from sft_edge.model_files import FACTORED, ModelingFile, remove_model

UNMERGED_FILE = "adapter_model.safetensors"
"""What was trained of a model with adapters, by the names of `state_dict()`. A Trainer looks for this name."""

_OF_PEFT = ("selected_adapters", "save_embedding_layers", "path_initial_model_for_weight_conversion")
"""Arguments of its `save_pretrained` that say nothing of a whole model."""


class Saving:
    """What a cut model saves, and loads again."""

    def __init__(
        self,
        model: Any,
        head: str,
        cut: Cut,
        adapters: Optional[LoraSpec],
        names: Collection[str],
        frozen: Collection[str],
        tied: Mapping[str, str],
    ) -> None:
        """`model` as the script has it; `adapters`: those that it had before the cut. `names`: those of `state_dict()`;
        `frozen`: what was not trained before the cut, by names in the whole model; `tied`: other names there of what is
        tied within the head, with those that `names` has. The library ties nothing where the head is untied."""
        self._model, self._head, self._cut, self._adapters = model, head, cut, adapters
        # Peft keeps what `modules_to_save` are copies of.
        self._names = {name for name in names if ".original_module." not in name}
        self._tied = tied
        self._trained = {name for name in self._names if whole_name(name) not in frozen}

    def follow(self, model: Any) -> None:
        """From now on `model.save_pretrained(...)` saves the whole model, and `load_state_dict` takes what it wrote.

        `model` is the script's, or the library's inside it. Its arguments stay what they were.
        """

        @functools.wraps(getattr(type(model), "load_adapter", type(model).save_pretrained))
        def load_adapter(_: Any, model_id: Any, adapter_name: Optional[str] = None, *args: Any, **kwargs: Any) -> None:
            self._load_adapter(Path(str(model_id)), adapter_name)

        model.save_pretrained = _SavePretrained(model, self._save)
        model._register_load_state_dict_pre_hook(self._drop_beside)
        if self._adapters is not None:
            model.load_adapter = types.MethodType(load_adapter, model)

    def _save(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Optional[Mapping[str, Tensor]] = None,
        push_to_hub: bool = False,
        **more: Any,
    ) -> None:
        if push_to_hub:
            raise UsageError("save_pretrained(push_to_hub=True) is not for a cut model: call model.push_to_hub(...)")
        if more.get("selected_adapters") not in (None, ["default"]):
            raise UsageError("save_pretrained: all adapters are merged; leave selected_adapters out")
        more = {name: value for name, value in more.items() if name not in _OF_PEFT}
        if not is_main_process:
            return
        state_dict = self._state() if state_dict is None else state_dict
        state_dict = {name: tensor for name, tensor in state_dict.items() if ".original_module." not in name}
        for name in sorted(self._names ^ state_dict.keys()):
            has = "lacks" if name in self._names else "has, and the model has not,"
            raise UsageError(f"save_pretrained: state_dict {has} '{name}'; leave it out, or give model.state_dict()")
        directory = Path(save_directory)
        with _disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(".sft-aside-", directory) as aside:
                self._write(Path(aside), state_dict, more)
                remove_model(directory)
                for path in sorted(Path(aside).iterdir()):
                    os.replace(str(path), str(directory / path.name))

    def _state(self) -> Mapping[str, Tensor]:
        state: Mapping[str, Tensor] = self._model.state_dict()
        return state

    def _write(self, directory: Path, state_dict: Mapping[str, Tensor], arguments: Dict[str, Any]) -> None:
        config = copy.deepcopy(self._model.config)
        tensors = {whole_name(name): tensor for name, tensor in state_dict.items()}
        tensors.update({other: tensors[name].clone() for other, name in self._tied.items()})
        if self._adapters is not None:
            tensors = self._merged(config, self._adapters, tensors)
            if "safe_serialization" in inspect.signature(PreTrainedModel.save_pretrained).parameters:
                arguments = {**arguments, "safe_serialization": True}  # what stands beside is, too
        with self._file(config).model() as whole:
            _fill(whole, {**tensors, **self._file(config).in_place_of_w()})
            if self._model.can_generate():
                whole.generation_config = self._model.generation_config
            whole.save_pretrained(str(directory), **arguments)
        if self._adapters is not None:
            trained = {
                name: tensor.detach().contiguous() for name, tensor in state_dict.items() if name in self._trained
            }
            save_file(trained, str(directory / UNMERGED_FILE))
            if not isinstance(self._model, PreTrainedModel):
                _in_parts(directory)

    def _file(self, config: PretrainedConfig) -> ModelingFile:
        return ModelingFile(config, self._head, self._cut, FACTORED)

    def _merged(self, config: PretrainedConfig, adapters: LoraSpec, tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
        net = build_whole(config, self._head, self._cut)
        adapters = adapters.of_modules(net)
        if adapters.target_modules:  # that of W is in its factors
            add_lora(net, adapters, seed=0)
        tied = net.other_names()  # older releases tie within a head that is untied, too
        own = {own: tensors[whole] for own, whole in net.whole_names.items()}
        _fill(net, {**own, **{f"model.{other}": tensors[name] for other, name in tied.items()}})
        for other, name in tied.items():  # which that has parted
            parent, _, child = other.rpartition(".")
            setattr(net.model.get_submodule(parent), child, net.model.get_parameter(name))
        merged = {tensor.name: tensor.read() for tensor in merged_tensors(net)}
        return {**merged, **{other: merged[name].clone() for other, name in tied.items()}}

    def _load_adapter(self, directory: Path, adapter_name: Optional[str]) -> None:
        """In the place of peft's: how a Trainer goes on from a checkpoint of a model with adapters."""
        path = directory / UNMERGED_FILE
        if adapter_name not in (None, "default"):
            raise UsageError(f"load_adapter: a cut model has one adapter, 'default', and takes no '{adapter_name}'")
        if not path.is_file():
            raise UsageError(f"load_adapter: there is no {path}; a cut model takes what its own save_pretrained wrote")
        tensors = load_file(str(path))
        for name in sorted(self._trained ^ tensors.keys()):
            has = "lacks" if name in self._trained else "has, and this model has not,"
            raise UsageError(f"load_adapter: {path} is of another model or cut: it {has} '{name}'")
        self._model.load_state_dict(tensors, strict=False)

    def _drop_beside(self, state_dict: Dict[str, Any], prefix: str, *_: Any) -> None:
        for name in self._tied:
            state_dict.pop(prefix + name, None)
        for name in self._file(self._model.config).in_place_of_w():
            tensor = state_dict.get(prefix + name)
            if tensor is not None and not tensor.numel():
                if self._adapters is not None:
                    raise UsageError("these weights have their adapters merged: call model.load_adapter(DIR) instead")
                del state_dict[prefix + name]


class _SavePretrained:
    """`save_pretrained` of one model object, with the arguments of its class's.

    A copy of a model that is decomposed, and not cut, gets one of its own, and so does one that was pickled: what saves
    is found by attributes, where a closure would hold the model that the copy was made of.
    """

    def __init__(self, model: Any, saves: Callable[..., None]) -> None:
        """`saves`: a method, which gets what was given, by name."""
        self._model, self._saves = model, saves

    @property
    def __wrapped__(self) -> Any:
        """The class's, for `inspect.signature`."""
        return types.MethodType(type(self._model).save_pretrained, self._model)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        named: Dict[str, Any] = dict(inspect.signature(self).bind(*args, **kwargs).arguments)
        named.update(named.pop("kwargs", {}))
        self._saves(**named)


class _BodySaving(Saving):
    """Of the base model inside a module that is cut, whose `state_dict` has the cloud's part, too."""

    def __init__(self, model: nn.Module, body_name: str, head: str, cut: Cut, names: Collection[str]) -> None:
        super().__init__(model.get_submodule(body_name), head, cut, None, names, (), {})
        self._outer = model
        self._within = f"{body_name}."

    def _state(self) -> Mapping[str, Tensor]:
        return {
            name[len(self._within) :]: tensor
            for name, tensor in self._outer.state_dict().items()
            if name.startswith(self._within)
        }


def follow_body(
    model: nn.Module, body_name: str, head: str, cut: Cut, names: Collection[str], is_cut: bool = True
) -> None:
    """`Saving.follow` of a base model inside a module, and of the module, if it is of a class of the library's kind:
    what saves the former, such as sentence-transformers, saves all of it.

    `names`: those of the whole body's `state_dict()`; `is_cut`: not decomposed alone.
    """
    body: Any = model.get_submodule(body_name)
    if is_cut:
        _BodySaving(model, body_name, head, cut, names).follow(body)
    else:
        Saving(body, head, cut, None, names, (), {}).follow(body)
    if isinstance(model, PreTrainedModel) and "save_pretrained" not in vars(model):
        layer = next(name for name in names if name.endswith(".ffn1.weight"))
        _Unopenable(model, f"{body_name}.{layer[: -len('.ffn1.weight')]}.weight").follow()


class _Unopenable:
    """Saving of a class of the script's own: its weights the class does not open by itself, as it would draw a new
    layer in the place of the one that was cut."""

    def __init__(self, model: Any, w_name: str) -> None:
        self._model, self._w_name = model, w_name

    def follow(self) -> None:
        """From now on `save_pretrained` of the model does so."""
        self._model.save_pretrained = _SavePretrained(self._model, self._save)
        self._model._register_load_state_dict_pre_hook(self._drop)

    def _save(self, state_dict: Optional[Mapping[str, Tensor]] = None, **more: Any) -> None:
        state = {**(self._model.state_dict() if state_dict is None else state_dict), self._w_name: torch.empty(0)}
        type(self._model).save_pretrained(self._model, state_dict=state, **more)

    def _drop(self, state_dict: Dict[str, Any], prefix: str, *_: Any) -> None:
        state_dict.pop(prefix + self._w_name, None)


def follow_modules(model: nn.Module, modules: Mapping[str, nn.Module], dimension: int) -> None:
    """From now on `model.save(...)` of sentence-transformers, and `save_pretrained`, save all of `modules`, those that
    the model had before it was cut, of which some are on the cloud. `dimension`: of its embeddings then."""
    gone = {name: module for name, module in modules.items() if name not in model._modules}

    def with_all(saves: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(saves)
        def save(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            state, left = self.state_dict(), dict(self._modules)
            for name, module in gone.items():
                own = {key[len(name) + 1 :]: x for key, x in state.items() if key.startswith(f"{name}.")}
                module.load_state_dict(own)
            self._modules.update(modules)
            try:
                for name in modules:  # in their order
                    self._modules[name] = self._modules.pop(name)
                return saves(self, *args, **kwargs)
            finally:
                self._modules.clear()
                self._modules.update(left)

        return save

    for name in ("get_sentence_embedding_dimension", "get_embedding_dimension"):
        if hasattr(model, name):
            setattr(model, name, functools.partial(int, dimension))
    for name in ("save", "save_pretrained"):
        setattr(model, name, types.MethodType(with_all(getattr(type(model), name)), model))


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise UsageError(f"save_pretrained: state_dict is not this model's: {told_by(error)}") from error


def _in_parts(directory: Path) -> None:
    """Weights in one file become one of one part: a Trainer would load such a file into a PeftModel, name by name."""
    whole = directory / single_file("model")
    if whole.is_file():
        part = f"{whole.stem}-00001-of-00001{whole.suffix}"
        with safe_open(str(whole), "pt") as file:
            weight_map: Dict[str, str] = dict.fromkeys(file.keys(), part)
        index = {"metadata": {"total_size": whole.stat().st_size}, "weight_map": weight_map}
        (directory / index_file("model")).write_text(json_text(index), encoding="utf-8")
        whole.rename(directory / part)


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"save_pretrained: cannot write {directory}: {told_by(error)}; free some space, or give another directory"
        ) from error
