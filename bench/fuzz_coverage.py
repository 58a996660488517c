"""Coverage-guided fuzzing of what the cloud does with bytes from outside, without a server: bench/fuzz.py runs it.

    python bench/fuzz_coverage.py SCRATCH [libFuzzer's options, such as -max_total_time=60]

The first byte of an input says what the others are: a message of a session, a request to open one, or a blob. Whatever
is raised beside this project's own errors ends it, with the input.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402  # not instrumented, nor is what it brings
import transformers  # noqa: E402, F401

with atheris.instrument_imports(include=["sft", "sft_cloud"]):
    from sft.errors import SFTError
    from sft.v1 import split_training_pb2 as pb
    from sft_cloud.admission.wire_check import check_wire
    from sft_cloud.engine.build import build, make_session
    from sft_cloud.engine.request import check_request
    from sft_cloud.session.session import Session, State
    from sft_cloud.storage.blobs import read_blob

from fuzz import tiny_edge  # noqa: E402
from google.protobuf.message import DecodeError  # noqa: E402
from support.mutations import Mutator  # noqa: E402
from support.tiny_edge import TinyEdge  # noqa: E402

CPU = torch.device("cpu")
MESSAGE, REQUEST, BLOB = 0, 1, 2
MESSAGES_A_SESSION = 200


class Target:
    """Takes inputs one after another; the session is made anew when it is of no more use."""

    def __init__(self, edge: TinyEdge, scratch: Path) -> None:
        self._edge = edge
        self._blob = scratch / f"{'0' * 64}.safetensors"
        self._session: Session | None = None
        self._handled = 0

    def __call__(self, data: bytes) -> None:
        """One input."""
        kind, data = (data[0] % 3 if data else MESSAGE), data[1:]
        try:
            if kind == MESSAGE:
                check_wire(data, pb.EdgeMessage.DESCRIPTOR)
                self._handle(pb.EdgeMessage.FromString(data))
            elif kind == REQUEST:
                check_wire(data, pb.OpenSessionRequest.DESCRIPTOR)
                build(check_request(pb.OpenSessionRequest.FromString(data)), CPU)
            else:
                self._blob.write_bytes(data)
                read_blob(self._blob)
        except (SFTError, DecodeError):
            pass

    def _handle(self, message: pb.EdgeMessage) -> None:
        if self._session is None or self._session.state is State.FAILED or self._handled >= MESSAGES_A_SESSION:
            spec = check_request(self._edge.request())
            tensors = [*self._edge.weights, *self._edge.factors]
            self._session, self._handled = make_session(spec, build(spec, CPU), tensors, CPU), 0
        self._handled += 1
        # A step that goes on, so that what is found is not only that another is next.
        if message.HasField("forward") and message.step == 0:
            message.step = self._session.next_step
        self._session.handle(message)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Another input, by the structure of the message in it where there is one, else as libFuzzer likes."""
    kind = data[0] % 3 if data else MESSAGE
    if kind != BLOB and seed % 4:
        message = pb.EdgeMessage() if kind == MESSAGE else pb.OpenSessionRequest()
        try:
            message.ParseFromString(data[1:])
        except DecodeError:
            pass
        else:
            return bytes([kind]) + Mutator(seed).mutated(message)[: max_size - 1]
    mutated: bytes = atheris.Mutate(data, max_size)
    return mutated


def write_corpus(edge: TinyEdge, directory: Path) -> None:
    """Sound inputs to begin with."""
    directory.mkdir()
    messages = [edge.forward(0), edge.unlabelled(0), edge.evaluate(), edge.commit(0), edge.forward(0, loss_scale=0.0)]
    messages += [edge.backward(0, 0, torch.ones(3, 3)), pb.EdgeMessage(gradient_scale=0.5)]
    messages.append(pb.EdgeMessage(load_state=pb.LoadState(sha256="0" * 64)))
    inputs = [bytes([MESSAGE]) + message.SerializeToString() for message in messages]
    inputs.append(bytes([REQUEST]) + edge.request().SerializeToString())
    inputs += [bytes([BLOB]) + content for content in edge.blobs().values()]
    for number, content in enumerate(inputs):
        (directory / str(number)).write_bytes(content)


def main() -> None:
    """Runs until libFuzzer's options say that it is enough."""
    scratch = Path(sys.argv[1])
    edge = tiny_edge(scratch / "tiny for coverage")
    write_corpus(edge, scratch / "corpus")
    options = [sys.argv[0], *sys.argv[2:], "-max_len=40000", "-timeout=60", "-rss_limit_mb=6000"]
    torch.set_num_threads(1)
    arguments = [*options, f"-artifact_prefix={scratch}/", str(scratch / "corpus")]
    atheris.Setup(arguments, Target(edge, scratch), custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
