"""What opens sessions: for edges with any model of the library, here; a script's host has an opener of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from sft.v1 import split_training_pb2 as pb
from sft_cloud.engine.build import Built, adapt, build, objects_bytes, session_in_pieces
from sft_cloud.engine.request import SessionSpec, check_request
from sft_cloud.engine.saved_session import Checkpoints, restore_in_pieces
from sft_cloud.engine.tables import missing_tables
from sft_cloud.engine.turns import Gone, Turns, in_pieces
from sft_cloud.engine.weights import WeightsFinder
from sft_cloud.engine.worker import Run
from sft_cloud.errors import PreconditionError
from sft_cloud.identity import Identity
from sft_cloud.memory import Kind, MemoryBudget
from sft_cloud.session import Session
from sft_cloud.storage import BlobStore, KeptRows, KeptStore


class Opener(Protocol):
    """Makes sessions; called in any thread."""

    @property
    def device(self) -> torch.device:
        """On which they compute."""

    @property
    def budget(self) -> MemoryBudget:
        """What all that the server holds for its callers has to fit into."""

    @property
    def checkpoints(self) -> Checkpoints | None:
        """Where they are saved; None where they are not."""

    def open(
        self, request: pb.OpenSessionRequest, owner: Identity, run: Run, gone: Gone | None = None
    ) -> Session | list[str]:
        """A session as the request of `owner` wants it, or the hashes of the blobs of `owner` that are missing;
        always these, be they none, for a request that only checks. The device is touched in `run`; once the caller has
        `gone` nothing more is begun.

        Every field is checked here; raises as `Engine.open` does.
        """


class TransformersOpener:
    """For any model that `sft.models` can cut."""

    def __init__(
        self,
        device: torch.device,
        store: BlobStore,
        weights: WeightsFinder,
        checkpoints: Checkpoints | None = None,
        budget: MemoryBudget | None = None,
        kept: KeptStore | None = None,
        only_torch: bool = False,
    ) -> None:
        """Without `checkpoints` no run goes on; all of the server takes at most the `budget`; `kept`: where activations
        are kept, if they are; `only_torch`: whether optimizers of other packages are refused."""
        self._only_torch = only_torch
        self._kept = kept
        self.device = device
        self._store = store
        self._weights = weights
        self._turns = Turns()
        self.checkpoints = checkpoints
        self.budget = MemoryBudget() if budget is None else budget

    def open(
        self, request: pb.OpenSessionRequest, owner: Identity, run: Run, gone: Gone | None = None
    ) -> Session | list[str]:
        """See Opener."""
        gone = Gone() if gone is None else gone
        with self._turns.of(owner.name, gone):
            try:
                spec = check_request(request, self._only_torch)
            finally:
                torch.empty(0)  # a call of torch is where who builds may rest, also after what turned out to be nothing
        with self.budget.charge(Kind.BUILDS, objects_bytes(spec), owner):
            return self._open(request, owner, spec, run, gone)

    def _open(
        self, request: pb.OpenSessionRequest, owner: Identity, spec: SessionSpec, run: Run, gone: Gone
    ) -> Session | list[str]:
        store = self._store.of(owner)
        with self._turns.of(owner.name, gone):
            built = build(spec, self.device)
        owner.limits.check_rank(built.net_2.width)
        if request.resume_from:
            return self._resume(request, owner, spec, built, run, gone)
        tensors, missing = self._weights.find(spec, built.net_2, store)
        missing += missing_tables(spec, store.find)
        if missing or request.only_check:
            return missing
        with self._turns.of(owner.name, gone):
            adapt(spec, built)
            made = session_in_pieces(spec, built, tensors, self.device, store.find, self.budget, owner)
            session = in_pieces(run, made)
        session.kept = self._keeps(request, owner)
        return session

    def _resume(
        self, request: pb.OpenSessionRequest, owner: Identity, spec: SessionSpec, built: Built, run: Run, gone: Gone
    ) -> Session | list[str]:
        if self.checkpoints is None:
            raise PreconditionError("this server keeps no checkpoints")
        with self.checkpoints.find(request, owner) as files:
            store = self._store.of(owner)
            missing = missing_tables(spec, store.find)
            if missing or request.only_check:
                return missing
            kept = self._keeps(request, owner, files)
            with self._turns.of(owner.name, gone):
                adapt(spec, built)
                # Filled from the seed: whatever that gives is replaced, to the last parameter.
                made = session_in_pieces(spec, built, [], self.device, store.find, self.budget, owner)
                session = in_pieces(run, made)
                in_pieces(run, restore_in_pieces(session, files))
            session.kept = kept
            return session

    def _keeps(
        self, request: pb.OpenSessionRequest, owner: Identity, saved: Mapping[str, Path] | None = None
    ) -> KeptRows | None:
        if self._kept is None or not request.keep_key:
            return None
        return self._kept.open(owner, request.keep_key, saved, request.run_id)
