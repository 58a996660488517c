"""What opens sessions: for edges with any model of the library, here; a script's host has an opener of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from sft.models import Net2
from sft.v1 import split_training_pb2 as pb
from sft_cloud.engine.build import build, make_session
from sft_cloud.engine.request import SessionSpec, check_request
from sft_cloud.engine.saved_session import Checkpoints, restore
from sft_cloud.engine.weights import WeightsFinder
from sft_cloud.engine.worker import Worker
from sft_cloud.errors import PreconditionError
from sft_cloud.identity import Identity
from sft_cloud.session import MemoryBudget, Session
from sft_cloud.storage import BlobStore

T = TypeVar("T")


class Opener(Protocol):
    """Makes sessions; called in any thread."""

    def open(self, request: pb.OpenSessionRequest, owner: Identity) -> Session | list[str]:
        """A session as the request of `owner` wants it, or the hashes of the blobs of `owner` that are missing;
        always these, be they none, for a request that only checks.

        Every field is checked here, since anybody may have written it: raises PreconditionError for an edge of another
        protocol version and other SFTErrors for fields that make no sense.
        """


class TransformersOpener:
    """For any model that `sft.models` can cut."""

    def __init__(
        self,
        worker: Worker,
        store: BlobStore,
        weights: WeightsFinder,
        checkpoints: Checkpoints | None = None,
        budget: MemoryBudget | None = None,
    ) -> None:
        """What touches the device runs on `worker`; without `checkpoints` no run goes on; all sessions together take at
        most the `budget`.
        """
        self._worker = worker
        self._store = store
        self._weights = weights
        self._checkpoints = checkpoints
        self._budget = budget

    def open(self, request: pb.OpenSessionRequest, owner: Identity) -> Session | list[str]:
        """See Opener."""
        spec, device, store = check_request(request), self._worker.device, self._store.of(owner)
        net_2 = self._run(lambda: build(spec, device))
        owner.limits.check_rank(net_2.width)
        if request.resume_from:
            return self._resume(request, owner, spec, net_2)
        tensors, missing = self._weights.find(spec, net_2, store)
        if missing or request.only_check:
            return missing
        return self._run(lambda: make_session(spec, net_2, tensors, device, store.find, self._budget))

    def _resume(self, request: pb.OpenSessionRequest, owner: Identity, spec: SessionSpec, net_2: Net2) -> Session:
        if self._checkpoints is None:
            raise PreconditionError("this server keeps no checkpoints")
        with self._checkpoints.find(request, owner) as files:

            def work() -> Session:
                # Filled from the seed: whatever that gives is replaced, to the last parameter.
                session = make_session(spec, net_2, [], self._worker.device, self._store.of(owner).find, self._budget)
                restore(session, files)
                return session

            return self._run(work)

    def _run(self, work: Callable[[], T]) -> T:
        return self._worker.submit(work).result()
