"""Opens the session of a script's model, when an edge comes that has cut the same one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sft.errors import ProtocolError, ServerFullError
from sft.optim.listed import has_modes, name_has_modes
from sft.tensors.stream import in_memory, sha256_of
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import codecs_of
from sft_cloud.engine import Gone, Run, check_version
from sft_cloud.errors import PreconditionError
from sft_cloud.identity import Identity
from sft_cloud.memory import MemoryBudget, MemoryShare
from sft_cloud.script.hosted_model import ADVICE, HostedModel
from sft_cloud.session import Session
from sft_cloud.storage import BlobStore, check_sha256, read_blob


class ScriptOpener:
    """One model and the script's own optimizer over it; see `sft_cloud.engine.opener.Opener`."""

    def __init__(
        self,
        hosted: HostedModel,
        optimizer: torch.optim.Optimizer,
        groups: Sequence[Sequence[str]],
        store: BlobStore,
        is_over: Callable[[], bool] = lambda: False,
        budget: MemoryBudget | None = None,
    ) -> None:
        """`groups`: names of the parameters that each group of `optimizer` trains; `is_over`: whether an edge has been
        here and gone; `budget`: what all that the edge asks for has to fit into, beside the model.
        """
        self.budget = MemoryBudget() if budget is None else budget
        self.device = hosted.device
        self.checkpoints = None  # see `open`
        self._hosted = hosted
        self._optimizer = optimizer
        self._groups = groups
        self._store = store
        self._is_over = is_over
        self._session: Session | None = None

    def open(
        self, request: pb.OpenSessionRequest, owner: Identity, run: Run, gone: Gone | None = None
    ) -> Session | list[str]:
        """See Opener. The model has the edge's weights from then on.

        Raises ServerFullError once an edge has begun: what the model has learned from it is not overwritten.
        """
        check_version(request)
        if request.resume_from:
            raise PreconditionError("a script's cloud keeps no checkpoints; save the optimizer's state_dict instead")
        self._check_free()
        if codecs_of(request).needs_tables:
            raise ProtocolError("a script's cloud does not know the codec fitted, which is for `sft-edge train`")
        store = self._store.of(owner)
        half = run(lambda: self._hosted.make_half(request))
        self._check_optimizer(request.optimizer)
        tensors: dict[str, Tensor] = {}
        missing = _find(store, request.factors_sha256, self._hosted.factors, tensors)
        # The model's own weights count if they are the edge's, to the last bit.
        if request.weights_sha256 != run(self._hash):
            missing += _find(store, request.weights_sha256, self._hosted.tensors, tensors)
        if missing or request.only_check:
            return missing

        def begin() -> Session:
            self._check_free()  # once more: messages are handled on this thread, too, so none comes in between
            self._load(tensors)
            self._session = Session(
                half, self._optimizer, request.seed, store.find, MemoryShare(self.budget, caller=owner)
            )
            return self._session

        return run(begin)

    def _check_free(self) -> None:
        if self._is_over() or (self._session is not None and self._session.has_begun):
            raise ServerFullError("the cloud's script trains with one edge, and that has come already")

    def _check_optimizer(self, theirs: pb.Optimizer) -> None:
        if name_has_modes(theirs.name) is not has_modes(self._optimizer):
            raise ProtocolError(
                f"the edge's optimizer is {theirs.name[:80]}, the cloud's {type(self._optimizer).__name__}: both are "
                f"schedule-free, or none is; {ADVICE}"
            )
        if len(theirs.groups) != len(self._groups):
            raise ProtocolError(
                f"the edge's optimizer has {len(theirs.groups)} parameter groups, the cloud's {len(self._groups)}; "
                f"each takes its learning rate from the edge's: {ADVICE}"
            )
        for index, (group, own) in enumerate(zip(theirs.groups, self._groups, strict=True)):
            differing = sorted(set(group.parameter_names) ^ set(own))
            if differing:
                has, lacks = ("edge", "cloud") if differing[0] not in own else ("cloud", "edge")
                raise ProtocolError(
                    f"parameter '{differing[0][:200]}' is trained in group {index} of the {has}'s optimizer, but not "
                    f"of the {lacks}'s; {ADVICE}"
                )

    def _hash(self) -> str:
        tensors = in_memory(dict(self._hosted.tensors))
        return sha256_of(tensors) if tensors else ""

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        trained = {name for names in self._groups for name in names}
        with torch.no_grad():
            for name, tensor in tensors.items():
                {**self._hosted.tensors, **self._hosted.factors}[name].copy_(tensor)
        for name, parameter in self._hosted.parameters.items():
            parameter.requires_grad_(name in trained)  # no gradients, and no part in their norm, for nothing


def _find(store: BlobStore, sha256: str, wanted: Mapping[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Adds a blob's tensors to `found`; returns its hash if it is missing. Raises ProtocolError."""
    if not wanted and not sha256:
        return []
    path = store.find(check_sha256(sha256))
    if path is None:
        return [sha256]
    tensors = read_blob(path)
    odd = sorted(tensors.keys() ^ wanted.keys())
    if odd:
        where = "the cloud's model lacks" if odd[0] in tensors else "the edge's model lacks"
        raise ProtocolError(f"{where} '{odd[0][:200]}' above the cut; {ADVICE}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ProtocolError(
                f"'{name}' has shape {list(tensor.shape)} on the edge, {list(wanted[name].shape)} on the cloud; "
                f"{ADVICE}"
            )
    found.update(tensors)
    return []
