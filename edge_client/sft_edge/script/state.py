"""`state_dict` of a cut model and of its optimizer: of both halves; the cloud's part is fetched and brought back."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Sequence, Tuple

import torch
from safetensors.torch import load
from torch import Tensor, nn

from sft.errors import ProtocolError, UsageError
from sft.optim.listed import counted, has_modes, is_training
from sft.optim.spec import OptimizerSpec, groups_to_proto, make_optimizer
from sft.optim.state import checked_state as checked_optimizer_state
from sft.tensors.stream import in_memory, safetensors_chunks, safetensors_size, sha256_of
from sft.v1 import split_training_pb2 as pb
from sft_edge.link import NUMBERS, Blob, checked_state, checked_weights, could_be_state
from sft_edge.script.crossing import LinkCross
from sft_edge.script.cut_model import CutModel
from sft_edge.script.gradients import PARAMETER_NAME


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """Raises UsageError when the state of a parameter is not of its shape; torch does not look."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                _check_shape(key, value, tuple(parameter.shape))


class CloudState:
    """The cloud's weights and optimizer state, as tensors that pass by."""

    def __init__(
        self,
        cross: LinkCross,
        shapes: Mapping[str, Tuple[int, ...]],
        cut_model: CutModel,
        spec: OptimizerSpec,
    ) -> None:
        """`shapes` of net_2's parameters, by names in the whole model; `cut_model`: how the script's has them;
        `spec`: the cloud's optimizer."""
        self._cross = cross
        self._shapes = shapes
        # Without memory: what the cloud's keeps is to be known before anything is sent that it would refuse.
        self._parameters = {name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in shapes.items()}
        self._likeness = make_optimizer(spec.restricted_to(shapes), self._parameters)
        self._script_names = {name: cut_model.script_name(name) for name in shapes}
        self._other_names = dict(cut_model.other_names)
        self._has_optimizer_state = False

    def follow(self, model: nn.Module) -> None:
        """From now on the model's `state_dict` is that of both halves, and `load_state_dict` loads both."""
        model._register_state_dict_hook(self._add_to)  # type: ignore[no-untyped-call]
        model._register_load_state_dict_pre_hook(self._take_from)  # type: ignore[no-untyped-call]

    def optimizer_state(self) -> Dict[str, Tensor]:
        """That of the cloud's optimizer; empty, and nothing is asked for, when no step was taken yet."""
        if self._cross.step == 0 and not self._has_optimizer_state:
            return {}
        return self._download(optimizer_state=True)

    def load_optimizer_state(self, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Brings back what `optimizer_state` gave, and `check_optimizer_state` has seen.

        `optimizer` is the edge's, whose state is loaded: what its groups count, those of the cloud's do, too.
        """
        if tensors:
            self._upload(tensors, optimizer_state=True, counts=groups_to_proto(counted(optimizer)))
            self._has_optimizer_state = True
        elif has_modes(optimizer):
            self._cross.link.average(not is_training(optimizer))

    def check_optimizer_state(self, tensors: Mapping[str, Tensor], has_stepped: bool) -> None:
        """Raises UsageError for a state that is not of this cloud's half; empty ones are from before the first step.

        `has_stepped` says whether the edge's, which comes with it, is from after that.
        """
        if not tensors:
            if has_stepped:
                raise UsageError("this state_dict lacks the key 'cloud', so it is of one half; save both together")
            if self._cross.step > 0 or self._has_optimizer_state:
                raise UsageError("this state_dict is from before the first step; open a new session to begin again")
        for key, tensor in tensors.items():
            name, has_name, _ = key.rpartition("/")
            if has_name and name not in self._shapes:
                raise UsageError(f"this state_dict is of another model or cut: '{name}' is not trained on the cloud")
            if has_name:
                _check_shape(key, tensor, self._shapes[name])
        if tensors:
            try:
                checked_optimizer_state(self._likeness, self._parameters, tensors, other_release=True)
            except ProtocolError as error:
                raise UsageError(f"this state_dict is none of this optimizer's: {error}") from error

    def _add_to(self, model: nn.Module, state_dict: Dict[str, Any], prefix: str, _: Any) -> None:
        del state_dict[prefix + PARAMETER_NAME]
        for name, tensor in self._download(optimizer_state=False).items():
            state_dict[prefix + self._script_names[name]] = tensor
        for other, name in self._other_names.items():
            state_dict[prefix + other] = state_dict[prefix + self._script_names[name]]

    def _take_from(
        self,
        state_dict: Dict[str, Any],
        prefix: str,
        _: Any,
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
    ) -> None:
        """Takes the cloud's part, so that torch does not look for a place for it here."""
        state_dict[prefix + PARAMETER_NAME] = self._cross.gradients.parameter.detach().clone()
        keys = {name: prefix + own for name, own in self._script_names.items()}
        given = {name: state_dict.pop(key) for name, key in keys.items() if key in state_dict}
        wrong = []
        for other, name in self._other_names.items():
            tensor = state_dict.pop(prefix + other, None)  # what an earlier release wrote has one of the names
            if tensor is not None and not _is_same(tensor, given.setdefault(name, tensor)):
                wrong.append(f"{prefix}{other} and {keys[name]} are one parameter, and differ in the state_dict")
        missing_keys.extend(key for name, key in keys.items() if name not in given)
        wrong += [
            f"size mismatch for {keys[name]}: {list(tensor.shape)} in the state_dict, "
            f"{list(self._shapes[name])} on the cloud"
            for name, tensor in given.items()
            if tuple(tensor.shape) != self._shapes[name]
        ]
        error_msgs.extend(wrong)
        if given and not wrong:
            if len(given) < len(self._shapes):
                given = {**self._download(optimizer_state=False), **given}
            self._upload({name: tensor.float() for name, tensor in given.items()}, optimizer_state=False)

    def _download(self, optimizer_state: bool) -> Dict[str, Tensor]:
        self._cross.check_halves()
        self._cross.catch_up()
        chunks = self._cross.link.weights(optimizer_state)
        if optimizer_state:
            return dict(load(b"".join(checked_state(chunks, self._shapes))))
        return dict(load(b"".join(checked_weights(chunks, self._shapes, NUMBERS))))

    def _upload(
        self, tensors: Mapping[str, Tensor], optimizer_state: bool, counts: Sequence[pb.GroupArguments] = ()
    ) -> None:
        self._cross.drop_waiting()
        stored = in_memory({name: tensor.detach() for name, tensor in tensors.items()})
        blob = Blob(safetensors_size(stored), lambda: safetensors_chunks(stored))
        self._cross.link.load_state(blob, sha256_of(stored), optimizer_state, counts)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Of weights that diverged, too."""
    if one is other:
        return True
    return one.shape == other.shape and torch.allclose(one.float().cpu(), other.float().cpu(), 0, 0, equal_nan=True)


def _check_shape(key: str, tensor: Tensor, shape: Tuple[int, ...]) -> None:
    if not could_be_state(tensor.shape, shape):
        raise UsageError(
            f"this state_dict is of another model or cut: '{key}' has shape {list(tensor.shape)}, its parameter "
            f"{list(shape)}"
        )
