"""The state of an optimizer as tensors with names, for the way to an edge and back, and for checkpoints.

Of parameter `p`, what the optimizer keeps as `exp_avg` is the tensor `p/exp_avg`. What is no tensor (a count of steps,
for some optimizers) is in the tensor `scalars`: UTF-8 JSON, from parameter to name to value.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import math
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Dict, FrozenSet, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from sft.errors import ProtocolError, UsageError
from sft.optim.listed import set_training, without_overrides
from sft.tensors.stream import StoredTensor, copied

SCALARS = "scalars"

MAX_SCALARS_BYTES = 16 << 20
"""Of the JSON: some 300,000 parameters with two numbers each."""

_DECIDING: Dict[str, Tuple[Any, ...]] = {"momentum": (0.0, 0.5), "amsgrad": (False, True), "centered": (False, True)}
"""Settings that decide what torch's optimizers keep of a parameter."""


def stored_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> List[StoredTensor]:
    """As `live_state`, but reading a tensor copies it to the CPU as it is then."""
    return [copied(tensor) for tensor in live_state(optimizer, parameters)]


def live_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> List[StoredTensor]:
    """What the optimizer knows of `parameters`, sorted; reading a tensor gives the one that the next step changes.

    Raises UsageError when there is something that is neither a tensor nor a number.
    """
    stored: List[StoredTensor] = []
    scalars: Dict[str, Dict[str, Any]] = {}
    for name, parameter in sorted(parameters.items()):
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if isinstance(value, Tensor):
                stored.append(live_tensor(f"{name}/{key}", value))
            elif value is None or isinstance(value, (bool, int, float)):
                scalars.setdefault(name, {})[key] = value
            else:
                kind = type(optimizer).__name__
                raise UsageError(f"the state of {kind} holds '{key}', a {type(value).__name__}, which cannot be sent")
    text = torch.tensor(list(json.dumps(scalars).encode()), dtype=torch.uint8)
    return [*stored, live_tensor(SCALARS, text)]


def live_tensor(name: str, tensor: Tensor) -> StoredTensor:
    """A tensor that reading gives as it is."""
    return StoredTensor(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def checked_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    other_release: bool = False,
) -> Dict[str, Any]:
    """What `optimizer.load_state_dict` takes, from the tensors that `stored_state` gave.

    `other_release`: the optimizer that it is for may be of another release of torch, where a count is a number or a
    tensor. Parameters may be on the meta device.

    Raises ProtocolError when they are not of an optimizer over these parameters.
    """
    states = _scalars(tensors)
    for name, tensor in tensors.items():
        if name != SCALARS:
            owner, _, key = name.rpartition("/")
            states.setdefault(owner, {})[key] = tensor
    strangers = sorted(states.keys() - parameters.keys())
    if strangers:
        raise ProtocolError(
            f"the optimizer's state names a parameter '{strangers[0][:200]}' that this half does not have"
        )
    by_index = _by_index(optimizer, {id(parameters[name]): state for name, state in states.items()})
    samples = _Samples(optimizer, other_release)
    for name, state in states.items():
        samples.check(name, parameters[name], state)
    return by_index


def state_bytes(optimizer: torch.optim.Optimizer, groups: Optional[Sequence[Mapping[str, Any]]] = None) -> int:
    """Bytes of all that the optimizer will keep of its parameters, which may be on the meta device.

    `groups`: other settings for the same parameters. Raises ProtocolError when it cannot step with them.
    """
    samples, total = _Samples(optimizer, other_release=False), 0
    for group in optimizer.param_groups if groups is None else groups:
        kept: Dict[_Sizes, List[Any]] = {}
        for parameter in group["params"]:
            sizes = samples.sizes_for(parameter)
            if sizes not in kept:
                settings = {name: value for name, value in group.items() if name != "params"}
                kept[sizes] = list(samples._after_step(settings, _sample(parameter, sizes), {}).values())
            own = _stands_for(sizes, parameter)
            for value in kept[sizes]:
                if isinstance(value, Tensor):
                    total += value.element_size() * torch.Size([own.get(n, n) for n in value.shape]).numel()
    return total


def copied_state(state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """What `checked_state` gave, with memory of its own in the place of a file's."""
    copy_of: Dict[str, Any] = {}
    for _ in state_in_pieces(state_dict, copy_of):
        pass
    return copy_of


def state_in_pieces(state_dict: Dict[str, Any], copy_of: Dict[str, Any]) -> Iterator[None]:
    """As `copied_state`, into an empty dictionary, parameter by parameter: others may compute where it yields."""
    state: Dict[int, Dict[str, Any]] = {}
    copy_of.update({**state_dict, "state": state})
    for index, of_parameter in state_dict["state"].items():
        state[index] = {
            key: value.clone() if isinstance(value, Tensor) else value for key, value in of_parameter.items()
        }
        yield


def group_settings(optimizer: torch.optim.Optimizer) -> List[Dict[str, Any]]:
    """The settings of every parameter group that JSON holds as they are, learning rates among them; tuples as lists."""
    return [
        {name: value for name, value in group.items() if name != "params" and _is_plain(value)}
        for group in optimizer.param_groups
    ]


def set_group_settings(optimizer: torch.optim.Optimizer, settings: List[Dict[str, Any]]) -> None:
    """Puts back what `group_settings` gave. Raises ProtocolError when it is of another optimizer."""
    if [sorted(group) for group in group_settings(optimizer)] != [sorted(group) for group in settings]:
        raise ProtocolError("the settings of the optimizer's groups are not those of an optimizer like this one")
    for group, values in zip(optimizer.param_groups, settings):
        for name, value in values.items():
            group[name] = tuple(value) if isinstance(value, list) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(number, (int, float)) for number in value)
    return isinstance(value, (bool, int, float, str))


def _scalars(tensors: Mapping[str, Tensor]) -> Dict[str, Dict[str, Any]]:
    text = tensors.get(SCALARS)
    try:
        if text is None or text.dtype != torch.uint8 or text.dim() != 1:
            raise ValueError("it is missing")
        if text.numel() > MAX_SCALARS_BYTES:
            raise ValueError("it is too large")
        states: Dict[str, Dict[str, Any]] = json.loads(text.numpy().tobytes())
        for state in states.values():
            if not all(value is None or isinstance(value, (bool, int, float)) for value in state.values()):
                raise ValueError("it holds something else than numbers")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"the blob holds no optimizer state: '{SCALARS}' is not what it should be") from error
    return states


def _kind(value: Any, sizes: Mapping[int, int] = MappingProxyType({})) -> str:
    """`sizes`: what those of a sample stand for."""
    if isinstance(value, Tensor):
        shape = [sizes.get(size, size) for size in value.shape]
        return f"a {'floating-point ' * value.is_floating_point()}tensor of shape {shape}"
    return "a number" if isinstance(value, (int, float)) else "nothing"


def _is_count(value: Any) -> bool:
    return not value.dim() if isinstance(value, Tensor) else isinstance(value, (int, float))


_Sizes = Tuple[int, ...]

_LARGE_SIZES: Dict[int, _Sizes] = {1: (4099,), 2: (67, 71), 3: (17, 19, 23), 4: (5, 7, 11, 13), 5: (3, 5, 7, 11, 13)}
"""By the number of dimensions: samples of which eight bits are kept of each number."""

_BLOCKS = (256, 2048)
"""Numbers that share a scale then, in releases of bitsandbytes."""


def _large_from(optimizer: Any) -> float:
    """How large a parameter is, at least, of which an optimizer of bitsandbytes keeps eight bits for each number."""
    args = getattr(optimizer, "args", None)
    return getattr(args, "min_8bit_size", math.inf) if getattr(args, "optim_bits", None) == 8 else math.inf


def _stands_for(sizes: _Sizes, parameter: nn.Parameter) -> Dict[int, int]:
    """What the sizes in the state of a sample are in the parameter's."""
    own = dict(zip(sizes, parameter.shape))
    if sizes in _LARGE_SIZES.values():
        own.update({-(-math.prod(sizes) // block): -(-parameter.numel() // block) for block in _BLOCKS})
    return own


class _Samples:
    """What an optimizer keeps of a parameter: found by stepping another one like it with a few elements only.

    A schedule may have changed settings since a state was saved, as it may on one machine: what such settings make an
    optimizer keep may be there or not, as long as it can step with the rest.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, other_release: bool) -> None:
        self._other_release = other_release
        self._class: Any = type(optimizer)
        self._defaults = optimizer.defaults
        self._large = _large_from(optimizer)
        self._groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        self._states: Dict[Tuple[int, _Sizes], List[Dict[str, Any]]] = {}  # by group and shape of the sample
        self._steps: Dict[Tuple[int, _Sizes, FrozenSet[str]], bool] = {}  # likewise, and by what is kept

    def sizes_for(self, parameter: nn.Parameter) -> _Sizes:
        """The shape of what stands for a parameter.

        No two sizes are the same, nor 1, so that those in the state tell which of the parameter's they stand for.
        """
        if parameter.numel() >= self._large and parameter.dim() in _LARGE_SIZES:
            return _LARGE_SIZES[parameter.dim()]
        return tuple(range(2, 2 + parameter.dim()))

    def check(self, name: str, parameter: nn.Parameter, state: Mapping[str, Any]) -> None:
        """Raises ProtocolError for a state that is none of this parameter's, whatever the settings."""
        group = self._groups[id(parameter)]
        sizes = self.sizes_for(parameter)
        key = id(group), sizes
        if key not in self._states:
            self._states[key] = [self._after_step(s, _sample(parameter, sizes), {}) for s in _variants(group)]
        own = _stands_for(sizes, parameter)
        kinds: Dict[str, List[str]] = {}
        for variant in self._states[key]:
            for of, value in variant.items():
                kinds.setdefault(of, []).append(_kind(value, own))
        for of, value in state.items():
            if of not in kinds:
                raise ProtocolError(f"the optimizer's state holds '{of[:80]}' for '{name}', unlike that of its class")
            if _kind(value) not in kinds[of] and not (self._other_release and _is_count(value)):
                raise ProtocolError(f"the optimizer's '{of}' for '{name}' is {_kind(value)}, not {kinds[of][0]}")
        kept = frozenset(of for of, value in state.items() if value is not None)
        known = (id(group), sizes, kept)
        if known not in self._steps:
            self._steps[known] = self._can_step(group, _sample(parameter, sizes), key, kept)
        if not self._steps[known]:
            lost = sorted(self._states[key][0].keys() - kept)
            raise ProtocolError(f"the optimizer's state lacks '{lost[0] if lost else 'a part'}' for '{name}'")

    def _can_step(self, group: Dict[str, Any], sample: Tensor, key: Tuple[int, _Sizes], kept: FrozenSet[str]) -> bool:
        """Whether there are settings to go on with."""
        if not kept:
            return True  # as in an optimizer that is new
        everything = {of: value for variant in self._states[key] for of, value in variant.items()}
        state = {of: everything[of] for of in kept}
        for settings in _variants(group):
            with suppress(ProtocolError):
                self._after_step(settings, sample, state)
                return True
        return False

    def _after_step(self, settings: Dict[str, Any], sample: Tensor, state: Mapping[str, Any]) -> Dict[str, Any]:
        """What is kept of the sample after a step from `state`."""
        sample = nn.Parameter(sample.clone())
        sample.grad = torch.ones_like(sample)
        known = inspect.signature(self._class).parameters
        try:
            # The constructor takes fewer settings together than a schedule may set one by one.
            own = self._class([sample], **{n: v for n, v in self._defaults.items() if n in known})
            own.param_groups[0].update(settings)
            set_training(own, True)
            own.state[sample].update({of: copy.deepcopy(value) for of, value in state.items()})
            with without_overrides():
                own.step()
        except Exception as error:  # whatever a script's own class may raise
            raise ProtocolError(f"what {self._class.__name__} keeps cannot be found out: {error}") from error
        return dict(own.state[sample])


def _sample(parameter: nn.Parameter, sizes: Iterable[int]) -> Tensor:
    return torch.zeros(tuple(sizes), dtype=parameter.dtype, device="cpu" if parameter.is_meta else parameter.device)


def _variants(group: Mapping[str, Any]) -> Iterator[Dict[str, Any]]:
    """The settings of a group, and these with others that decide what is kept."""
    settings = {name: value for name, value in group.items() if name != "params"}
    deciding = {name: values for name, values in _DECIDING.items() if name in settings}
    yield settings
    for values in itertools.product(*deciding.values()):
        yield {**settings, **dict(zip(deciding, values))}


def _by_index(optimizer: torch.optim.Optimizer, states: Mapping[int, Dict[str, Any]]) -> Dict[str, Any]:
    # As torch counts: group after group.
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strangers = states.keys() - {id(parameter) for parameter in held}
    if strangers:
        raise ProtocolError("the optimizer's state is of a parameter that it does not train")
    by_index = {index: states[id(parameter)] for index, parameter in enumerate(held) if id(parameter) in states}
    groups = optimizer.state_dict()["param_groups"]
    return {"state": by_index, "param_groups": groups}
