"""Role cloud: a script's model cut in place to net_2, its optimizer over that, and the service for one edge."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from sft.client.address import split_address
from sft.errors import LinkError, SessionLostError, UsageError
from sft.files.temporary import TemporaryDirectory
from sft.graphs.wrappers import check_wrappers, uncompiled
from sft.models import Cut, is_stock
from sft.optimizer import Role, SplitOptions
from sft_cloud.access import make_access
from sft_cloud.engine import make_budget, uploads
from sft_cloud.options import LimitOptions, ServeOptions, ServerAccess
from sft_cloud.script.body_host import BodyHost
from sft_cloud.script.graph_host import GraphHost
from sft_cloud.script.hosted_model import HostedModel
from sft_cloud.script.opener import ScriptOpener
from sft_cloud.script.optimizer import names_of, swap
from sft_cloud.script.transformers_host import TransformersHost
from sft_cloud.server import CloudServer
from sft_cloud.service import DONE, Entry

_log = logging.getLogger("sft_cloud")

_TERMINATED = 128 + signal.SIGTERM


class CloudRole(Role):
    """Algorithm 1 on the cloud, with a model and an optimizer that are somebody else's."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, options: SplitOptions) -> None:
        """Cuts the model. Raises UsageError, CutError, UnsupportedModelError; model and optimizer are then as before.

        What of the options is for the edge is left unread, so that a script can give both roles the same.
        """
        self._access_options = options.as_options(ServerAccess)
        model = uncompiled(model, _log)
        check_wrappers(model)
        names = names_of(optimizer, model)
        self._hosted = _cut(model, options)
        self._groups = swap(optimizer, names, self._hosted)
        self.optimizer = optimizer
        self._has_served = False
        where = "split_layer" if options.split_layer is not None else "split_at"
        self._title = f"role='cloud', {where}={getattr(options, where)!r}, split_rank={options.split_rank}"

    def serve(self, address: str, on_ready: Callable[[str], None] | None = None) -> None:
        """See Role. `on_ready` is told the address, in which port 0 has become a free one.

        Ctrl-C and SIGTERM end it in order, as KeyboardInterrupt and SystemExit. Raises UsageError for an address that
        makes no sense, SFTError for one that is taken, LinkError when the session ends because something went wrong.
        """
        if self._has_served:
            raise UsageError(
                "this model was trained with an edge already; make model and optimizer anew to serve again"
            )
        host, port = split_address(address, "address", listens=True)
        access = make_access(self._access_options, host, dashes="")
        done = threading.Event()
        ends: list[LinkError | None] = []

        def on_close(entry: Entry, reason: str) -> None:
            if entry.was_attached:
                lost = SessionLostError(f"the session did not get through: {reason}")
                ends.append(None if reason == DONE else lost)
                done.set()

        with TemporaryDirectory("sft-cloud-script-") as state_dir, _terminable():
            options, limits = ServeOptions(host, port, state_dir=Path(state_dir), max_sessions=1), LimitOptions()
            store = uploads(options, limits)
            budget = make_budget(limits, self._hosted.device)
            opener = ScriptOpener(self._hosted, self.optimizer, self._groups, store, done.is_set, budget)
            server = CloudServer(options, limits, access, opener=opener, on_close=on_close, dashes="")
            try:
                if on_ready is not None:
                    on_ready(server.address)
                done.wait()
                self._has_served = True
            finally:
                server.stop()
        if ends[0] is not None:
            raise ends[0]

    def step(self, closure: Callable[[], Any] | None) -> NoReturn:
        """Refused, as everything that the edge does."""
        raise UsageError("role 'cloud' is driven by the edge: call serve(), which returns when the edge is done")

    def zero_grad(self, set_to_none: bool) -> None:
        """Nothing: gradients come and go with the edge's steps."""

    def set_training(self, training: bool) -> None:
        """Nothing: the edge says what this half's does."""

    def state_dict(self) -> dict[str, Any]:
        """Of this half's optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refused."""
        raise UsageError("the state of both halves is loaded on the edge, with its load_state_dict")

    def close(self) -> None:
        """Nothing: the session is over when `serve` returns."""

    def describe(self) -> str:
        """See Role."""
        return self._title


def _cut(model: Any, options: SplitOptions) -> HostedModel:
    kind = type(model).__name__
    if kind.startswith("PeftModel"):
        raise UsageError(
            f"a script hosts no {kind}: adapters are for `sft-cloud serve`, and for library models with a head"
        )
    if is_stock(model):
        if options.split_at is not None or options.split_layer is None:
            raise UsageError("a transformers model is cut at a block: give split_layer=1 or higher, not split_at")
        return TransformersHost(model, options.split_layer, options.split_rank, options.residual)
    if options.split_layer is not None:
        return BodyHost(model, Cut("sft", options.split_layer, options.split_rank, options.residual), options.split_at)
    if options.split_at is None:
        raise UsageError(f"a {kind} is cut at a layer: give split_at='NAME', the name of an nn.Linear")
    return GraphHost(model, options.split_at, options.split_rank, options.residual)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, where nobody else has taken it and Python can."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(*_: object) -> NoReturn:
        raise SystemExit(_TERMINATED)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
