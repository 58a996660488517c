"""What an edge says to a server that lies, and what of the edge such a server gets to see.

    python bench/lying_server.py

A server that passes every call on to a real one and changes what comes back: answers by the table of
tests/end_to_end/test_lying_server.py, downloads and openings by those below. `sft-edge train` runs against it, with the
labels on the cloud and with them at home, and its exit code and its one line are printed. Then runs with names, paths
and labels that can be told from anything else, which are looked for in every byte that left. Exit code 1 where an edge
ended with a traceback, with another code than it should or with more than a line, or where something was found.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from end_to_end.test_lying_server import LIES
from support.jobs import Job, flags, sst2
from support.servers import start_server
from support.tiny import make_tiny_model

from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import CLIENT_OPTIONS, SERVER_OPTIONS
from sft_cloud.options import LimitOptions
from sft_edge.cli import main as edge

Change = Callable[[Iterable[bytes]], Iterable[bytes]]
"""Of all answers of a call."""

MANY = (1 << 32) - 1
SECRETS = ("verysecretpositive", "verysecretnegative", "averysecretplace")
"""Names of classes, and of a directory."""


def each(change: Callable[[Any], object], kind: type) -> Change:
    """Every answer, parsed and changed in place."""

    def changed(answers: Iterable[bytes]) -> Iterator[bytes]:
        for data in answers:
            answer = kind.FromString(data)
            change(answer)
            yield answer.SerializeToString()

    return changed


def opening(**fields: object) -> Change:
    """OpenSession answers with these fields."""

    def change(response: pb.OpenSessionResponse) -> None:
        for name in fields:
            response.ClearField(name)
        response.MergeFrom(pb.OpenSessionResponse(**fields))

    return each(change, pb.OpenSessionResponse)


def download(change: Callable[[bytes], Iterable[bytes]]) -> Change:
    """The file that is downloaded, changed as a whole."""

    def changed(answers: Iterable[bytes]) -> Iterator[bytes]:
        content = b"".join(pb.DownloadWeightsResponse.FromString(data).data for data in answers)
        for part in change(content):
            for start in range(0, len(part), 1 << 20):
                yield pb.DownloadWeightsResponse(data=part[start : start + (1 << 20)]).SerializeToString()

    return changed


def _without_end(content: bytes) -> Iterator[bytes]:
    yield content
    for _ in range(600):
        yield bytes(1 << 20)


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], Iterator[bytes]]:
    def changed(content: bytes) -> Iterator[bytes]:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        yield len(text).to_bytes(8, "little") + text + content[8 + size :]

    return changed


def _renamed(header: dict[str, Any]) -> None:
    header["../../evil"] = header.pop(sorted(header)[0])


def _reshaped(header: dict[str, Any]) -> None:
    header[sorted(set(header) - {"__metadata__"})[0]]["shape"] = [MANY, MANY]


OTHERS: dict[str, tuple[str, Change]] = {
    "a download of nine bytes": ("DownloadWeights", download(lambda content: [b"nine byte"])),
    "a download of 600 MiB more": ("DownloadWeights", download(_without_end)),
    "half a download": ("DownloadWeights", download(lambda content: [content[: len(content) // 2]])),
    "an empty download": ("DownloadWeights", download(lambda content: [])),
    "a download with a header of 2^63 bytes": ("DownloadWeights", download(lambda content: [b"\xff" * 7 + b"\x7f"])),
    "a download of a tensor of another name": ("DownloadWeights", download(_header(_renamed))),
    "a download of a tensor of another shape": ("DownloadWeights", download(_header(_reshaped))),
    "a download of NaN": ("DownloadWeights", download(lambda c: [c[:-4096], b"\xff" * min(4096, len(c))])),
    "a pickle for a download": ("DownloadWeights", download(lambda content: [b"\x80\x04\x95posix" * 1000])),
    "a session that goes on from step 7": ("OpenSession", opening(next_step=7)),
    "a session's name of 100 kB": ("OpenSession", opening(session_id="s" * 100_000)),
    "control characters for a session's name": ("OpenSession", opening(session_id="s\x1b[2J")),
    "blobs are missing that nobody offered": ("OpenSession", opening(session_id="", missing_blobs=["f" * 64])),
    "a million blobs are missing": ("OpenSession", opening(session_id="", missing_blobs=["f" * 64] * 100_000)),
    "neither a session nor blobs": ("OpenSession", opening(session_id="", missing_blobs=[])),
    "garbage for an opening": ("OpenSession", lambda answers: [b"\xff\xff\xff"]),
    "garbage for an answer": ("Train", lambda answers: [b"\xff\xff\xff"]),
    "no answer, and the end": ("Train", lambda answers: []),
    "the same answer for ever": ("Train", lambda answers: [next(iter(answers))] * 1000),
}
"""Which method's answers, and what becomes of them."""

TABLE = {**{f"answers: {name}": ("Train", each(lie, pb.CloudMessage)) for name, lie in LIES.items()}, **OTHERS}


class Liar(grpc.GenericRpcHandler):
    """Passes calls on, bytes as they are, but for one method's answers."""

    def __init__(self, address: str) -> None:
        self.lie: tuple[str, Change] | None = None
        self.seen: list[bytes] = []
        self._channel = grpc.insecure_channel(address, options=CLIENT_OPTIONS)
        self._server = grpc.server(ThreadPoolExecutor(64), handlers=[self], options=SERVER_OPTIONS)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """See grpc.GenericRpcHandler."""

        def passed_on(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            self.seen.append(str(context.invocation_metadata()).encode())
            call = self._channel.stream_stream(details.method)(self._noted(messages))
            context.add_callback(call.cancel)
            answers: Iterable[bytes] = call
            if self.lie is not None and details.method.endswith("/" + self.lie[0]):
                answers = self.lie[1](call)
            try:
                yield from answers
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())

        return grpc.stream_stream_rpc_method_handler(passed_on)

    def close(self) -> None:
        """No more calls."""
        self._server.stop(0).wait()
        self._channel.close()

    def _noted(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        for data in messages:
            self.seen.append(data)
            yield data


def main() -> int:
    """Prints the table, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="lies whose names hold this")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        scratch = Path(name)
        cloud = start_server(scratch / "state", 500, LimitOptions(opens_per_minute=100_000))
        stack.callback(cloud.stop, 0)
        liar = Liar(cloud.address)
        stack.callback(liar.close)
        model, job = make_tiny_model(scratch / "tiny", layers=3), sst2(scratch)
        wrong = [
            name for name, lie in TABLE.items() if only in name and not _lied_to(liar, lie, job, model, scratch, name)
        ]
        liar.lie = None
        wrong += [what for what in _looked_for(liar, scratch) if what]
    print(f"\n{len(TABLE)} lies; wrong: {', '.join(wrong) or 'nothing'}")
    return 1 if wrong else 0


def _lied_to(liar: Liar, lie: tuple[str, Change], job: Job, model: Path, scratch: Path, name: str) -> bool:
    right, said = True, []
    for labels in ("cloud", "local"):
        liar.lie = lie
        out = scratch / f"out-{list(TABLE).index(name)}-{labels}"
        options = {"labels": labels, "max_steps": 3, "max_grad_norm": 1.0, "reconnect_timeout": "0s"}
        code, stderr = _edge(job.flags(**options, model=model, server=liar.address, output_dir=out))
        lines = [line for line in stderr.splitlines() if ": error: " in line or "Traceback" in line]
        told = lines[-1].partition(": error: ")[2] if lines else ""
        said.append(f"{code} {told[:110]}".strip())
        right &= code in (0, 5, 6) and "Traceback" not in stderr and len(lines) == (code != 0)
        right &= all(line.isprintable() and len(line) < 1500 for line in lines)
    both = said[0] if said[0] == said[1] else " / ".join(said)
    print(f"| {name} | {both} |{'' if right else ' **wrong**'}", flush=True)
    return right


def _edge(arguments: list[str]) -> tuple[int, str]:
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        code = edge(["train", *arguments])
    return code, stderr.getvalue()


def _looked_for(liar: Liar, scratch: Path) -> Iterator[str]:
    """Runs whose names nobody else has; what of them was found in what left."""
    place = scratch / SECRETS[2]
    model = make_tiny_model(place / "model", layers=3)
    rows = [json.dumps({"text": "a film", "label": SECRETS[number % 2]}) for number in range(16)]
    for name in ("train", "dev"):
        (place / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    ways = {"a model in a directory": {"model": model}}
    ways["a configuration"] = {"from_config": model / "config.json", "tokenizer_name": model}
    for what, way in ways.items():
        for labels in ("cloud", "local"):
            liar.seen.clear()
            common = {"task": "text", "data_dir": place}
            arguments = flags(
                **way, **common, labels=labels, split_layer=2, split_rank=4, max_steps=3, device="cpu", save_steps=2,
                server=liar.address, output_dir=place / f"out-{labels}-{len(what)}",
            )  # fmt: skip
            code, _ = _edge(arguments)
            left = b"\n".join(liar.seen)
            kept = b"\n".join(path.read_bytes() for path in (scratch / "state").rglob("*") if path.is_file())
            found = [secret for secret in SECRETS if secret.encode() in left + kept]
            labelled = labels == "local" and any(_has_labels(data) for data in liar.seen)
            wrong = code != 0 or bool(found) or labelled
            told = f"{', '.join(found) or 'no name'} found; labels {'found' if labelled else 'where they should be'}"
            print(f"| what leaves: {what}, labels {labels} | {code}, {len(left)} bytes: {told} |", flush=True)
            yield f"{what}, labels {labels}" if wrong else ""


def _has_labels(data: bytes) -> bool:
    with contextlib.suppress(Exception):
        return pb.EdgeMessage.FromString(data).forward.HasField("labels")
    return False


if __name__ == "__main__":
    sys.exit(main())
