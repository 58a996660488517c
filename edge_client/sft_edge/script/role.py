"""Role edge: a script's model cut in place, its optimizer over net_1, and a session in which the cloud has net_2."""

from __future__ import annotations

import atexit
import logging
import math
import weakref
from contextlib import contextmanager, suppress
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
from torch import nn
from transformers import PreTrainedModel

from sft.client.credentials import ClientOptions, read_credentials
from sft.errors import LinkError, UsageError
from sft.graphs.wrappers import check_wrappers, uncompiled
from sft.models import Cut, is_stock
from sft.optim.listed import has_modes, is_training, set_training
from sft.optim.script import has_stepped
from sft.optim.spec import check_change, groups_to_proto
from sft.optimizer import Role, SplitOptions
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import Codecs, codecs_named
from sft_edge.link import GrpcTransport, Link, RetryPolicy, check_mixed, session_request
from sft_edge.script.adapters import without_peft
from sft_edge.script.crossing import LinkCross
from sft_edge.script.cut_model import CutModel
from sft_edge.script.decomposed import decompose
from sft_edge.script.flags import TrainedFlags
from sft_edge.script.gradients import PARAMETER_NAME
from sft_edge.script.optimizer import ScriptGroups, arguments_of
from sft_edge.script.other_optimizers import refuse_others
from sft_edge.script.state import CloudState, check_state
from sft_edge.script.transformers_model import TransformersModel
from sft_edge.script.unseen_changes import UnseenChanges

_log = logging.getLogger("sft_edge")


class EdgeRole(Role):
    """Algorithm 1 on the edge, driven by somebody else's loop."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, options: SplitOptions) -> None:
        """Opens the session and then cuts the model. Raises UsageError, CutError, UnsupportedModelError, LinkError."""
        codecs = _check(options)
        if hasattr(model, PARAMETER_NAME):
            raise UsageError("this model is cut already; load it again to cut it again")
        model = uncompiled(model, _log)
        check_wrappers(model)
        groups = ScriptGroups(optimizer, model)
        cut_model = _cut_model(model, options)
        spec = groups.spec(cut_model)
        shapes = {tensor.name: tensor.shape for tensor in (*cut_model.cloud_tensors, *cut_model.cloud_factors)}
        seed = torch.initial_seed() if options.seed is None else options.seed
        request, blobs = session_request(
            cut_model.request_fields(),
            spec,
            seed,
            codecs,
            cut_model.cloud_tensors,
            cut_model.cloud_factors,
        )
        transport = options.transport or GrpcTransport(
            str(options.server),
            options.connect_timeout_seconds,
            credentials=read_credentials(options.as_options(ClientOptions), dashes=""),
        )
        policy = RetryPolicy(
            options.reply_timeout_seconds,
            options.connect_timeout_seconds,
            options.reconnect_timeout_seconds,
            options.wait_seconds,
        )
        link = Link(transport, request, blobs, policy, _tell)
        self._opened = link.open()  # from here on nothing is left that could be wrong
        before = dict(model.named_parameters())
        try:
            self._cross = LinkCross(link, codecs, next(model.parameters()).device, seed)
            self._cross.takes_modes = self._opened.takes_modes
            parameters = cut_model.install(self._cross)
            model.register_parameter(PARAMETER_NAME, self._cross.gradients.parameter)
            groups.swap(parameters, self._cross.gradients.parameter)
        except BaseException:
            link.close()
            raise
        kept = set(map(id, model.parameters()))
        gone = {name: parameter for name, parameter in before.items() if id(parameter) not in kept}
        refuse_others(optimizer, gone.values(), self._cross.gradients.parameter, until_end_of=self._cross)
        self._flags = TrainedFlags(model, gone)
        del before, gone  # their memory is to be free
        own = weakref.ref(optimizer)
        self._cross.on_undone = lambda: _zero(own())
        weakref.finalize(self._cross, link.abandon)  # both model and optimizer hold it
        atexit.register(_close, weakref.ref(self))  # a script in the form of Listing 1 just ends
        self.optimizer = optimizer
        self._state = CloudState(self._cross, {name: shapes[name] for name in cut_model.cloud_names}, cut_model, spec)
        self._state.follow(model)
        ffn_1 = parameters[f"{cut_model.layer_name}.ffn1.weight"]
        self._unseen = UnseenChanges(model, ffn_1)
        if not ffn_1.requires_grad or all(ffn_1 is not p for g in optimizer.param_groups for p in g["params"]):
            how = "in no group of the optimizer" if ffn_1.requires_grad else "frozen"
            _tell(
                f"the layer that is cut, '{cut_model.layer_name}', is {how}, and its factors with it: nothing makes "
                "up for what its decomposition drops; leave it trained"
            )
        self._on_cloud = arguments_of(optimizer)
        self._skipped, self._undone = False, 0
        self._cloud_trains = is_training(optimizer)
        if has_modes(optimizer):
            link.average(not self._cloud_trains)
        role = weakref.ref(self)
        self._cross.check_halves = lambda: _check_halves(role())
        self._title = f"role='edge', server={options.server!r}, {cut_model.describe()}"

    @staticmethod
    def decompose(model: nn.Module, options: SplitOptions) -> None:
        """See Role."""
        decompose(model, options)

    def step(self, closure: Optional[Callable[[], Any]]) -> Any:
        """Algorithm 1, lines 13 and 14. The edge's half first: if that raises, neither half takes the step."""
        self._skipped = True
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _check_halves(self)
        if not is_training(self.optimizer):
            raise UsageError("the optimizer is in eval mode: call optim.train() before training goes on")
        self._flags.check()
        clip_scale = self._cross.ready()
        arguments = arguments_of(self.optimizer)
        rates = [float(own["lr"]) for own in arguments]
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise UsageError(f"learning rates must be finite and not negative; they are {rates}")
        changed = _changed(arguments, self._on_cloud)
        check_mixed(self._opened, changed)
        try:
            with self._cross.gradients.hidden():
                self.optimizer.step()
        finally:
            self._unseen.accept()
        self._cross.commit(rates, clip_scale, changed)
        self._on_cloud = arguments
        self._skipped, self._undone = False, self._cross.undone
        return loss

    @property
    def step_was_skipped(self) -> bool:  # type: ignore[override]  # an attribute there
        """See Role. Also for a step that the cloud has undone for want of memory, before it was asked to take it."""
        return self._skipped or self._cross.undone != self._undone

    def zero_grad(self, set_to_none: bool) -> None:
        """See Role. The cloud's are forgotten with the parameter that stands for them."""
        self.optimizer.zero_grad(set_to_none)

    def set_training(self, training: bool) -> None:
        """See Role. Results of the model from before cannot be gone backward through any more."""
        if is_training(self.optimizer) is self._cloud_trains is training or not has_modes(self.optimizer):
            return
        self._cross.drop_waiting()
        with self._without_cloud_gradients():
            set_training(self.optimizer, training)
        self._unseen.accept()
        self._cross.link.average(not training)
        self._cloud_trains = training

    def state_dict(self) -> Dict[str, Any]:
        """See Role. Without the keys `cloud` and `cloud_draws` before the first step."""
        with self._without_cloud_gradients():
            state_dict = self.optimizer.state_dict()
        cloud, draws = self._state.optimizer_state(), self._cross.draws
        state_dict = {**state_dict, "cloud": cloud} if cloud else state_dict
        return {**state_dict, "cloud_draws": {"seed": draws.seed, "step": draws.step}} if draws.step else state_dict

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """See Role. Where the cloud's part cannot be loaded, the edge's is what it was."""
        state_dict = dict(state_dict)
        cloud, draws = state_dict.pop("cloud", {}), _draws(state_dict.pop("cloud_draws", None))
        of_edge = state_dict.get("state", {})
        self._state.check_optimizer_state(cloud, any(map(has_stepped, of_edge.values())))
        with self._without_cloud_gradients():
            before = self.optimizer.state_dict()
            self.optimizer.load_state_dict(state_dict)
            try:
                check_state(self.optimizer)
                self._state.load_optimizer_state(cloud, self.optimizer)
            except BaseException:
                self.optimizer.load_state_dict(before)
                raise
        self._cloud_trains = is_training(self.optimizer)
        if draws is not None:
            self._cross.draw_as(draws)

    def serve(self, address: str, on_ready: Optional[Callable[[str], None]] = None) -> None:
        """Refused."""
        raise UsageError("role 'edge' does not serve; call serve() in the script that runs with role='cloud'")

    def close(self) -> None:
        """See Role. The cloud takes the last step, too, if it has not heard of it yet: its script may keep its half."""
        if not self._cross.is_closed:
            self._cross.link.hurry()  # a script that ends must not wait for a cloud that has gone
            with suppress(LinkError):  # then there is no session left to end
                self._cross.link.flush()  # what became of gradients since does not matter any more
        self._cross.is_closed = True
        self._cross.link.close()

    def describe(self) -> str:
        """See Role."""
        return self._title

    @contextmanager
    def _without_cloud_gradients(self) -> Iterator[None]:
        """States are those of real parameters."""
        parameter = self._cross.gradients.parameter
        self.optimizer.param_groups[0]["params"].pop()
        self.optimizer.state.pop(parameter, None)  # an empty one, where somebody has switched a schedule-free one alone
        try:
            yield
        finally:
            self.optimizer.param_groups[0]["params"].append(parameter)


def _tell(text: str) -> None:
    if text:
        _log.warning("%s", text)


def _zero(optimizer: Optional[torch.optim.Optimizer]) -> None:
    if optimizer is not None:
        optimizer.zero_grad(set_to_none=True)


def _check_halves(role: Optional[EdgeRole]) -> None:
    if role is None:
        return
    if is_training(role.optimizer) is not role._cloud_trains:
        raise UsageError(
            "the optimizer that is wrapped was switched, which moves the weights of the edge alone: call "
            "train()/eval() of the SFTOptimizer"
        )
    role._unseen.check()


def _close(role: weakref.ReferenceType[EdgeRole]) -> None:
    still = role()
    if still is not None:
        still.close()


def _check(options: SplitOptions) -> Codecs:
    if options.server is None and options.transport is None:
        raise UsageError("role 'edge' needs the cloud's address: server='HOST:PORT'")
    if options.seed is not None and not 0 <= options.seed < 1 << 64:
        raise UsageError(f"seed must be from 0 to 2**64 - 1, not {options.seed}")
    for name in ("connect_timeout_seconds", "reply_timeout_seconds"):
        if not getattr(options, name) > 0:
            raise UsageError(f"{name} must be above 0, not {getattr(options, name)}")
    for name in ("reconnect_timeout_seconds", "wait_seconds"):
        if not getattr(options, name) >= 0:
            raise UsageError(f"{name} must be 0 or more, not {getattr(options, name)}")
    if options.calibration is not None and options.residual != "low-rank":
        raise UsageError("calibration is for residual='low-rank'; leave it out")
    codecs = codecs_named(options.wire_dtype, options.codec, options.gradient_codec)
    if codecs.needs_tables:
        raise UsageError("codec='fitted' is for `sft-edge train --freeze-edge`; choose another, such as 'int8'")
    return codecs


def _cut_model(model: nn.Module, options: SplitOptions) -> CutModel:
    library = without_peft(model)
    if library is not model and not isinstance(library, PreTrainedModel):
        raise UsageError(
            f"adapters of peft are for the library's models with a head, not for a {type(library).__name__}: train "
            "that whole, without them"
        )
    if library is not model or is_stock(library):
        if options.split_at is not None:
            raise UsageError("a transformers model is cut at a block: give split_layer=1 or higher, not split_at")
        if options.split_layer is None:
            raise UsageError("split_layer must be given: the block, counted from 1, in which the model is cut")
        return TransformersModel(
            model,
            options.split_layer,
            options.split_rank,
            options.residual,
            options.calibration or (),
            options.model_name,
        )
    if options.model_name is not None:
        raise UsageError("model_name is for transformers models; leave it out")
    if options.split_layer is not None:
        from sft_edge.script.body_model import BodyModel

        if isinstance(model, PreTrainedModel):
            kind = type(model).__name__
            _tell(f"of this {kind} more than weights is its own: only the same script with role='cloud' can host it")
        cut = Cut("sft", options.split_layer, options.split_rank, options.residual)
        return BodyModel(model, cut, options.calibration or (), options.split_at)
    from sft_edge.script.graph_model import GraphModel

    if options.split_at is None:
        raise UsageError("split_at must be given: the name of the nn.Linear that is cut, such as 'blocks.5.mlp.fc2'")
    return GraphModel(model, options.split_at, options.split_rank, options.residual)


def _draws(saved: Any) -> Optional[pb.Draws]:
    """Of a state_dict; None where it has none, as one of an earlier release. Raises UsageError."""
    if saved is None:
        return None
    try:
        return pb.Draws(seed=saved["seed"], step=saved["step"])
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(f"this state_dict's 'cloud_draws' is none of SFTOptimizer's: {error}") from error


def _changed(arguments: List[Dict[str, Any]], before: List[Dict[str, Any]]) -> List[pb.GroupArguments]:
    """What each group's settings have become since `before`, learning rates aside; nothing where nothing has.

    Raises UsageError for what the cloud would not take.
    """
    changes = [
        {name: value for name, value in now.items() if name != "lr" and value != then.get(name)}
        for now, then in zip(arguments, before)
    ]
    if not any(changes):
        return []
    for change, then in zip(changes, before):
        for name, value in change.items():
            check_change(then, name, value)
    return groups_to_proto(changes)
