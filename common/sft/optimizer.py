"""`SFTOptimizer`: two lines in a script of anybody's, and its model trains across edge and cloud.

    optim = torch.optim.AdamW(model.parameters(), lr=5e-5)
    optim = SFTOptimizer(optim, role="edge", model=model, server="host:50051", split_layer=11, split_rank=8)

Here is the face, a `torch.optim.Optimizer`; what it does is its role's. A side's package registers its role under the
entry point group `sft.roles`, so nothing here imports a side.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Dict, Iterable, List, NoReturn, Optional, Type, TypeVar

import torch
from torch import nn

from sft.cli.options import at_home
from sft.errors import UsageError

ROLES_GROUP = "sft.roles"
"""Entry point group in which a side's package registers its role."""

_INSTALL = {
    "edge": "pip install 'split-fine-tuning[edge]'",
    "cloud": "pip install 'split-fine-tuning[cloud]' (Python 3.10 or newer)",
}

_FILES = ("tls_ca", "tls_cert", "tls_key", "tls_client_ca", "token_file", "tokens")
"""Fields of `SplitOptions` that name files."""

T = TypeVar("T")


@dataclass(frozen=True)
class SplitOptions:
    """How a script's model is split; what `SFTOptimizer` was given."""

    server: Optional[str] = None
    """HOST:PORT of the cloud; only role edge has it."""

    split_layer: Optional[int] = None
    """For a transformers model, or a module around one: the paper's l, counted from 1."""

    split_rank: int = 8
    """The paper's R: width of what crosses the wire."""

    split_at: Optional[str] = None
    """For any other module, on both sides: the `nn.Linear` that is cut; with `split_layer`, the model in it."""

    residual: str = "none"
    """What becomes of the residual around the layer that is cut: `none` as in the paper, or `low-rank`."""

    calibration: Optional[Iterable[Dict[str, torch.Tensor]]] = None
    """For `residual="low-rank"`: a few batches as the model takes them, to which the low rank is fitted."""

    wire_dtype: str = "float32"
    """Type of tensors on the wire, where `codec` says nothing of them: `float32`, `bfloat16` or `float16`."""

    codec: Optional[str] = None
    """How activations are written on the wire: one of those, or `int8` or `int4` with a scale for every 64 elements."""

    gradient_codec: Optional[str] = None
    """How their gradients are, which come back; None is as `codec`. `int8` and `int4` round them by chance."""

    connect_timeout_seconds: float = 20.0
    """How long to look for the server."""

    reply_timeout_seconds: float = 600.0
    """How long an answer of the cloud may take."""

    reconnect_timeout_seconds: float = 1800.0
    """How long to try to mend a link that broke; 0 gives up at once."""

    wait_seconds: float = 0.0
    """How long to wait, at the start, for a server that is absent or full; 0 raises at once."""

    seed: Optional[int] = None
    """Of the cloud's dropout; None is `torch.initial_seed()`."""

    model_name: Optional[str] = None
    """What the cloud is told a transformers model is called: a hub id, or a directory of its --model-dir. None tells it
    the id of a model that is on the hub, and nothing of a directory."""

    tls: Optional[bool] = None
    """Role edge: whether calls are encrypted; None encrypts them except to this machine itself."""

    tls_ca: Optional[str] = None
    """Role edge: PEM file of the CA that the server's certificate must come from; None is the system's."""

    tls_cert: Optional[str] = None
    """PEM file with this side's certificate: the client's, or the server's."""

    tls_key: Optional[str] = None
    """PEM file with the private key of `tls_cert`."""

    tls_client_ca: Optional[str] = None
    """Role cloud: PEM file of the CA whose client certificates are asked for."""

    token_file: Optional[str] = None
    """Role edge: file with the token that lets it in; None takes that of the environment variable SFT_TOKEN."""

    tokens: Optional[str] = None
    """Role cloud: file of `sft-cloud token create`; only who has a token in it is let in."""

    insecure: bool = False
    """Role edge: send the token although calls are not encrypted. Role cloud: serve other machines without TLS and
    tokens."""

    transport: Any = None
    """A `sft_edge.link.transport.Transport` to use instead of gRPC to `server`."""

    def as_options(self, kind: Type[T]) -> T:
        """A command's options, all of which have fields of their name here, as this script gives them: how a client
        shows who it is, or how a server is protected.
        """
        values = {field.name: getattr(self, field.name) for field in fields(kind)}  # type: ignore[arg-type]
        files = {name: Path(at_home(str(values[name]), name)) for name in _FILES if values.get(name) is not None}
        return kind(**{**values, **files})


class Role(ABC):
    """One side of a split model behind an `SFTOptimizer`."""

    optimizer: torch.optim.Optimizer
    """The script's own, which holds the parameters of this side's half."""

    step_was_skipped: bool = False
    """Whether the last step was not taken, on neither side."""

    @abstractmethod
    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, options: SplitOptions) -> None:
        """Splits. Raises UsageError, CutError, UnsupportedModelError; role edge LinkError, too."""

    @abstractmethod
    def step(self, closure: Optional[Callable[[], Any]]) -> Any:
        """As in `torch.optim.Optimizer`, for both halves; returns what the closure returned."""

    @abstractmethod
    def zero_grad(self, set_to_none: bool) -> None:
        """As in `torch.optim.Optimizer`, for both halves."""

    @abstractmethod
    def set_training(self, training: bool) -> None:
        """Of a schedule-free optimizer: both halves' weights to where they train, or to their average. Else nothing."""

    @abstractmethod
    def state_dict(self) -> Dict[str, Any]:
        """The state of the optimizer of both halves."""

    @abstractmethod
    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; raises what torch's own raises when it does not fit."""

    @abstractmethod
    def serve(self, address: str, on_ready: Optional[Callable[[str], None]] = None) -> None:
        """Role cloud: serves one edge at `address` and returns when it is done. Role edge raises UsageError."""

    @staticmethod
    def decompose(model: nn.Module, options: SplitOptions) -> None:
        """See SFTOptimizer; role edge alone does."""
        raise UsageError("a model is decomposed on the edge")

    @abstractmethod
    def close(self) -> None:
        """Ends the session. Idempotent."""

    @abstractmethod
    def describe(self) -> str:
        """For `repr`: role and cut."""


class SFTOptimizer(torch.optim.Optimizer):
    """Wraps the optimizer of a training script, and trains its model split between an edge and a cloud.

    A `torch.optim.Optimizer` like the one it wraps: schedulers, gradient scalers, `clip_grad_norm_`, hooks and
    frameworks take it for one. `docs/optimizer.md` says what they see of the cloud's half.

    A context manager; the session ends with the block, with `close`, or when optimizer and model are garbage.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        role: str,
        *,
        model: nn.Module,
        server: Optional[str] = None,
        split_layer: Optional[int] = None,
        split_rank: int = 8,
        split_at: Optional[str] = None,
        residual: str = "none",
        calibration: Optional[Iterable[Dict[str, torch.Tensor]]] = None,
        wire_dtype: str = "float32",
        codec: Optional[str] = None,
        gradient_codec: Optional[str] = None,
        connect_timeout_seconds: float = 20.0,
        reply_timeout_seconds: float = 600.0,
        reconnect_timeout_seconds: float = 1800.0,
        wait_seconds: float = 0.0,
        seed: Optional[int] = None,
        model_name: Optional[str] = None,
        tls: Optional[bool] = None,
        tls_ca: Optional[str] = None,
        tls_cert: Optional[str] = None,
        tls_key: Optional[str] = None,
        tls_client_ca: Optional[str] = None,
        token_file: Optional[str] = None,
        tokens: Optional[str] = None,
        insecure: bool = False,
        transport: Any = None,
    ) -> None:
        """Cuts `model` in place and swaps the parameter groups of `optimizer` for those of this side's half.

        `optimizer`: one of torch.optim's, or of the few others that docs/optimizer.md names, over parameters of
        `model`, fresh: before its first step. `role`: `edge` or
        `cloud`. Everything else is a field of `SplitOptions`.

        Raises UsageError (CutError among them) when arguments, model and optimizer do not fit together,
        UnsupportedModelError, and LinkError when the cloud cannot be had; model and optimizer are then as they were.
        """
        given = dict(locals())  # by name: those of SplitOptions, and a test keeps it so
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UsageError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
        if isinstance(optimizer, SFTOptimizer):
            raise UsageError("this optimizer is an SFTOptimizer already; wrap a model and its optimizer once")
        if not isinstance(model, nn.Module):
            raise UsageError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        options = SplitOptions(**{field.name: given[field.name] for field in fields(SplitOptions)})
        self._role: Role = _find_role(role)(optimizer, model, options)
        # Not Optimizer.__init__, which would make groups and state of its own. What its methods need besides:
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._patch_step_function()  # has `step` run the hooks

    @staticmethod
    def decompose(
        model: nn.Module,
        split_layer: int,
        split_rank: int = 8,
        residual: str = "none",
        calibration: Optional[Iterable[Dict[str, torch.Tensor]]] = None,
        split_at: Optional[str] = None,
    ) -> None:
        """For a script that loads weights before it makes its optimizer: decomposes a transformers model in place. It
        computes what both halves will, and its `state_dict` has the names that it has when `SFTOptimizer` has cut it
        with the same arguments. Raises UsageError, CutError and UnsupportedModelError."""
        cut = SplitOptions(None, split_layer, split_rank, split_at, residual, calibration)
        _find_role("edge").decompose(model, cut)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The script's own optimizer; it holds this side's half."""
        return self._role.optimizer

    @property
    def param_groups(self) -> List[Dict[str, Any]]:
        """Of the script's own optimizer. Settings in them hold on both sides; parameters are this side's."""
        return self._role.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: List[Dict[str, Any]]) -> None:
        self._role.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """Of the script's own optimizer: this side's half."""
        return self._role.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self._role.optimizer.state = state

    @property
    def defaults(self) -> Dict[str, Any]:
        """Of the script's own optimizer."""
        return self._role.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: Dict[str, Any]) -> None:
        self._role.optimizer.defaults = defaults

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last `step` raised before it was taken: then neither side took it."""
        return self._role.step_was_skipped

    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """One step on both sides. `closure` evaluates the model again and returns the loss; it is called once.

        Raises LinkError when the cloud cannot take the step, UsageError when there is nothing to take it with, and
        NonFiniteLossError when the cloud's gradients are not finite.
        """
        return self._role.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of both halves."""
        self._role.zero_grad(set_to_none)

    def train(self) -> None:
        """Of a schedule-free optimizer: moves the weights of both halves to where they train. Else nothing.

        Raises LinkError when the session is over.
        """
        self._role.set_training(True)

    def eval(self) -> None:
        """As `train`, to the average of the weights: for evaluation, and before they are saved."""
        self._role.set_training(False)

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        """Refused: the cloud made its optimizer with the groups that there were. Raises UsageError."""
        raise UsageError("the model is cut already; add every parameter group before SFTOptimizer wraps the optimizer")

    def state_dict(self) -> Dict[str, Any]:
        """The state of both halves, that of the cloud under the key `cloud`, on the CPU."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self._role.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """What `state_dict` gave, of this session or another one of the same model, cut and groups."""
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._role.load_state_dict(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def serve(self, address: str, on_ready: Optional[Callable[[str], None]] = None) -> None:
        """Role cloud: hosts this script's half at HOST:PORT for one edge, and returns when that is done.

        `on_ready` is called with the address once edges can connect; port 0 has become a free one there.
        """
        self._role.serve(address, on_ready)

    def close(self) -> None:
        """Ends the session: the cloud forgets its half, the model does not run any more. Idempotent."""
        self._role.close()

    def __enter__(self) -> SFTOptimizer:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SFTOptimizer({self._role.describe()}, {self._role.optimizer!r})"

    def __getstate__(self) -> NoReturn:
        raise UsageError("an SFTOptimizer cannot be pickled or copied: it holds a session; save its state_dict()")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.__getstate__()


def _find_role(name: str) -> Type[Role]:
    if name not in _INSTALL:
        raise UsageError(f"role must be 'edge' or 'cloud', not {name!r}")
    for entry_point in _entry_points():
        if entry_point.name == name:
            try:
                role: Type[Role] = entry_point.load()
            except (ImportError, SyntaxError) as error:
                advice = f": {_INSTALL[name]}" if _is_not_installed(error) else ""
                raise UsageError(f"role {name!r} cannot be had here ({error}){advice}") from error
            return role
    raise UsageError(f"role {name!r} is not installed: {_INSTALL[name]}")


def _is_not_installed(error: Exception) -> bool:
    """Whether what is missing is another's package; or the cloud's code was read by the edge's old Python."""
    if not isinstance(error, ModuleNotFoundError):
        return isinstance(error, SyntaxError)
    package = (error.name or "").partition(".")[0]
    return package not in ("", "sft", "sft_edge", "sft_cloud")


def _entry_points() -> Iterable[Any]:
    if sys.version_info >= (3, 10):
        return metadata.entry_points(group=ROLES_GROUP)
    return metadata.entry_points().get(ROLES_GROUP, ())
