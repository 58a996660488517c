"""What one caller that has models built, as fast as it may, leaves of another's training; exit 1 below a half.

python bench/openers.py [--seconds 10] [--blocks 256] [--openers 8] [--threads 1] [--open]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import grpc
from attack_tools import SECONDS, opened, serving
from support.tiny import make_tiny_model
from support.tiny_edge import TinyEdge, attach
from support.tls import make_token
from transformers import AutoConfig

from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingStub

LEAST_RATIO = 0.5


def main() -> int:
    """Measures a good session's rate alone, beside the openers, and alone again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--blocks", type=int, default=256)
    parser.add_argument("--openers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--open", action="store_true", help="open sessions, drawn from a seed, not only check")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        model = make_tiny_model(root / "tiny", "bert", layers=3)
        config = AutoConfig.from_pretrained(
            model,
            num_labels=3,
            problem_type="single_label_classification",
            trust_remote_code=False,
            local_files_only=True,
        )
        edge = TinyEdge(model, config)
        flags = [f"--threads={options.threads}", "--insecure", "--idle-timeout=1m"]
        with serving(root / "server", flags) as server:
            good, other = (stub(server.address, make_token(server.tokens, name)) for name in ("good", "other"))
            training = Training(good, edge)
            quiet = training.rate(options.seconds)
            with Openers(other, edge, options.blocks, options.openers, options.open) as openers:
                time.sleep(1.0)
                beside = training.rate(options.seconds)
            again = training.rate(options.seconds)
    ratio = 2 * beside / (quiet + again)
    print(
        f"alone {quiet:.1f} and {again:.1f} steps/s; beside {options.openers} openers {beside:.1f}; ratio {ratio:.2f}"
    )
    print(f"what the openers got in {options.seconds + 1:.0f} s: {dict(openers.got)}")
    return 0 if ratio >= LEAST_RATIO else 1


def stub(address: str, token: str) -> SplitTrainingStub:
    """Of a caller, over loopback."""

    class WithToken(grpc.AuthMetadataPlugin):
        def __call__(self, context: object, callback: grpc.AuthMetadataPluginCallback) -> None:
            callback((("authorization", f"Bearer {token}"),), None)

    credentials = grpc.composite_channel_credentials(
        grpc.local_channel_credentials(), grpc.metadata_call_credentials(WithToken())
    )
    return SplitTrainingStub(grpc.secure_channel(address, credentials, [("grpc.use_local_subchannel_pool", 1)]))


class Training:
    """A session that takes one step after the other."""

    def __init__(self, stub: SplitTrainingStub, edge: TinyEdge) -> None:
        self._edge = edge
        self._changed = threading.Condition()
        self._next: pb.EdgeMessage | None = attach(opened(stub, edge))
        self._answers = stub.Train(iter(self._take, None))
        next(self._answers)
        self._step = 0

    def rate(self, seconds: float) -> float:
        """Steps a second, for so long."""
        began, first = time.monotonic(), self._step
        while time.monotonic() - began < seconds:
            commit = self._edge.commit_part(self._step - 1) if self._step else None
            message = self._edge.forward(self._step, commit=commit)
            self._step += 1
            message.number = message.answered = self._step
            message.answered -= 1
            with self._changed:
                self._next = message
                self._changed.notify()
            next(self._answers)
        return (self._step - first) / (time.monotonic() - began)

    def _take(self) -> pb.EdgeMessage:
        with self._changed:
            self._changed.wait_for(lambda: self._next is not None)
            message, self._next = self._next, None
            assert message is not None
            return message


class Openers:
    """Threads that ask again and again whether a model of so many blocks could be opened, or open it."""

    def __init__(self, stub: SplitTrainingStub, edge: TinyEdge, blocks: int, count: int, opens: bool) -> None:
        values = {**json.loads(edge.config.to_json_string(use_diff=False)), "num_hidden_layers": blocks}
        self._request = edge.request(config_json=json.dumps(values), only_check=not opens)
        if opens:  # each ends the session before
            cut = pb.Cut(mode=pb.MODE_SL, split_layer=1, residual=pb.RESIDUAL_NONE)
            for name, value in {"weights_sha256": "", "factors_sha256": "", "run_id": "0" * 32}.items():
                setattr(self._request, name, value)
            self._request.cut.CopyFrom(cut)
            for group, name in zip(
                self._request.optimizer.groups, ("classifier.weight", "classifier.bias"), strict=True
            ):
                group.parameter_names[:] = [name]
        self._stub = stub
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(count)]
        self.got: Counter[str] = Counter()
        """What was answered, and how often."""

    def __enter__(self) -> Openers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                self._stub.OpenSession(self._request, timeout=SECONDS)
                self.got["OK"] += 1
            except grpc.RpcError as error:
                self.got[f"{error.code().name}: {str(error.details())[:90]}"] += 1
                self._stop.wait(0.5)  # it is told how long to wait, but is in a hurry


if __name__ == "__main__":
    sys.exit(main())
