"""Attacks on a server's memory by tenants within their limits, each a function that goes on until it is told to stop.

bench/shared_server.py runs them all at once; bench/attacks.py each for a moment.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from half_sent import HalfSent
from support.calls import Stream, open_session
from support.tiny import make_tiny_model
from support.tiny_edge import TOKENS, TinyEdge, attach
from transformers import AutoConfig

from sft.models import Cut
from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingStub

TRAIN = "/sft.v1.SplitTraining/Train"
HOLD_SECONDS = 5.0
"""For which an attacker holds what it has got, before it begins anew: a server has to give back, too."""
PAUSE_SECONDS = 0.6
"""Between two requests to open a session: an attacker stays within what it may ask in a minute."""


class Target(NamedTuple):
    """A server, as a tenant reaches it."""

    connect: Callable[[], grpc.Channel]
    half_sent: Callable[[str], HalfSent]
    """Begins a call of a method by hand."""


@dataclass
class Tally:
    """What an attack got: how often each."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, call: Callable[[], str]) -> bool:
        """Counts what `call` says, or how it was refused; returns whether it got through."""
        try:
            self.counts[call()] += 1
        except grpc.RpcError as error:
            self.counts[f"{error.code().name}: {' '.join(str(error.details()).split())[:70]}"] += 1
            return False
        return True


class Models(NamedTuple):
    """What attackers know of models."""

    llama: TinyEdge
    wide: TinyEdge
    """Its net_2 takes some 30 MiB, and a graph of it in half precision half as much."""
    talker: TinyEdge
    """A row of logits for each of its tokens is 120 kB."""
    quarter: TinyEdge
    """Its session takes some 90 MiB: a quarter of what a server with 640 MiB has for its callers."""


def make_models(directory: Path) -> Models:
    """Reads them where they have been made already."""

    def config(name: str, family: str, layers: int, **values: object) -> AutoConfig:
        if not (directory / name).is_dir():
            make_tiny_model(directory / name, family, layers=layers, **values)
        return AutoConfig.from_pretrained(
            directory / name,
            num_labels=3,
            problem_type="single_label_classification",
            trust_remote_code=False,
            local_files_only=True,
            **values,
        )

    wide = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    long = {"max_position_embeddings": 1024, "vocab_size": 30_000}
    return Models(
        TinyEdge(directory / "llama", config("llama", "llama", 2), cut=Cut("sft", 1, 4)),
        TinyEdge(directory / "wide", config("wide", "bert", 5, **wide), cut=Cut("sft", 1, 4), lengths=(1,)),
        TinyEdge(
            directory / "talker", config("talker", "llama", 2, **long), TOKENS, Cut("sft", 1, 4), lengths=(512,) * 2
        ),
        TinyEdge(directory / "quarter", config("quarter", "bert", 4, **wide), cut=Cut("sft", 1, 4)),
    )


def trains(channel: grpc.Channel, models: Models) -> str:
    """What a tenant that wants no more than its part gets, beside any of these."""
    stub, edge = SplitTrainingStub(channel), models.quarter
    began = time.monotonic()
    stream = Stream(stub, attach(open_session(stub, edge)))
    next(stream.call)
    for step in range(3):
        if stream.ask(edge.forward(step)).HasField("step_skipped"):
            stream.end()
            return "another's step was SKIPPED"
        stream.ask(edge.commit(step))
    stream.end()
    return f"another trains {'soon' if time.monotonic() - began < 20 else 'LATE'}"


def padded(target: Target, models: Models, tally: Tally, over: threading.Event) -> None:
    """A1: configurations whose padding token asks for an embedding of millions of rows."""
    stub = SplitTrainingStub(target.connect())
    config = json.loads(models.llama.request().config_json)
    open_session(stub, models.llama)  # uploads what there is to upload
    rows = 8_000_000
    while not over.wait(PAUSE_SECONDS):
        text = json.dumps({**config, "vocab_size": rows + 1, "pad_token_id": rows})

        def opened(text: str = text) -> str:
            session_id = stub.OpenSession(models.llama.request(config_json=text), timeout=60).session_id
            messages = [attach(session_id), pb.EdgeMessage(close=pb.Close())]
            list(stub.Train(iter(messages), timeout=60))
            return "opened"

        tally.add(opened)
        rows = 28_000_000 - rows


def waiting(target: Target, models: Models, tally: Tally, over: threading.Event) -> None:
    """A2: 64 forwards of one token under autocast, each of which keeps a half-precision copy of the weights."""
    stub = SplitTrainingStub(target.connect())
    while not over.wait(PAUSE_SECONDS):

        def held() -> str:
            stream = Stream(stub, attach(open_session(stub, models.wide)))
            next(stream.call)
            for number in range(64):
                message = models.wide.unlabelled(0, number, autocast=pb.DATA_TYPE_BFLOAT16)
                if stream.ask(message).HasField("step_skipped"):
                    stream.end()
                    return f"the step was skipped after about {number // 10 * 10} graphs"
            over.wait(HOLD_SECONDS)
            stream.end()
            return "64 graphs held"

        tally.add(held)


def unacknowledged(target: Target, models: Models, tally: Tally, over: threading.Event) -> None:
    """A3: eight sessions at a time, each with an answer of 120 MB that it never says it has."""
    stub = SplitTrainingStub(target.connect())
    while not over.wait(PAUSE_SECONDS):
        held: list[Stream] = []

        def answered(held: list[Stream] = held) -> str:
            held.append(Stream(stub, attach(open_session(stub, models.talker))))
            next(held[-1].call)
            size = held[-1].ask(models.talker.evaluate()).ByteSize()
            return f"an answer of {size >> 20} MiB"

        for _ in range(8):
            tally.add(answered)
        over.wait(HOLD_SECONDS)
        for stream in held:
            with suppress(grpc.RpcError):
                stream.end()


def half_sent(target: Target, models: Models, tally: Tally, over: threading.Event) -> None:
    """A4: six streams, each with most of a message of 200 MiB, whole or in parts, and then silence."""
    stub = SplitTrainingStub(target.connect())
    sessions: list[str] = []
    total, size = 200 << 20, 1 << 20
    first = pb.EdgeMessage(part=pb.Part(data=bytes(size), total_bytes=total)).SerializeToString()
    later = pb.EdgeMessage(part=pb.Part(data=bytes(size))).SerializeToString()

    def opened() -> str:
        sessions.append(open_session(stub, models.llama))
        return "opened"

    while not over.wait(PAUSE_SECONDS):
        while len(sessions) < 6 and tally.add(opened):
            pass
        calls = [target.half_sent(TRAIN) for _ in sessions]
        for number, call in enumerate(calls):
            call.message(attach(sessions[number]).SerializeToString())
            if number % 2:
                call.begin(total)
            sent = 0
            while sent < total - size and not call.ended and not over.is_set():
                taken = call.send(bytes(size), 2.0) if number % 2 else call.message(later if sent else first, 2.0)
                sent += taken
                if taken < size:
                    break
            held = "nothing" if not sent else f"about {1 << max(0, (sent >> 20).bit_length() - 1)} MiB"
            way = "in one" if number % 2 else "in parts"
            tally.counts[f"{way}: {held} taken, then {call.ended or 'no more'}"] += 1
        over.wait(HOLD_SECONDS)
        for call in calls:
            tally.counts[f"after a while: {call.look(0.1) or 'still there'}"] += 1
            call.close()


def unread(target: Target, models: Models, tally: Tally, over: threading.Event) -> None:
    """A5: twenty downloads begun, and not read."""
    stub = SplitTrainingStub(target.connect())
    while not over.wait(PAUSE_SECONDS):
        session: list[str] = []

        def opened(session: list[str] = session) -> str:
            session.append(open_session(stub, models.wide))
            return "opened"

        if not tally.add(opened):
            continue
        request = pb.DownloadWeightsRequest(session_id=session[0])
        calls = [stub.DownloadWeights(request, timeout=120) for _ in range(20)]
        over.wait(HOLD_SECONDS)
        for call in calls:
            code = call.code() if call.done() else None
            tally.counts["begun" if code is None else f"{code.name}: {str(call.details())[:70]}"] += 1
            call.cancel()
        messages = [attach(session[0]), pb.EdgeMessage(close=pb.Close())]
        with suppress(grpc.RpcError):
            list(stub.Train(iter(messages), timeout=60))


def sessions(target: Target, models: Models, tally: Tally, over: threading.Event) -> None:
    """As many sessions as there is memory for, of two sizes, each with a graph that waits, kept."""
    stub = SplitTrainingStub(target.connect())
    while not over.wait(PAUSE_SECONDS):
        held: list[Stream] = []

        def opened(edge: TinyEdge, held: list[Stream] = held) -> str:
            held.append(Stream(stub, attach(open_session(stub, edge))))
            next(held[-1].call)
            held[-1].ask(edge.unlabelled(0))
            return "opened"

        for edge in (models.wide, models.talker):
            while len(held) < 16 and not over.is_set() and tally.add(partial(opened, edge)):
                pass
        over.wait(HOLD_SECONDS)
        for stream in held:
            with suppress(grpc.RpcError):
                stream.end()


ATTACKS: dict[str, Callable[[Target, Models, Tally, threading.Event], None]] = {
    "A1 padded": padded,
    "A2 waiting": waiting,
    "A3 unacknowledged": unacknowledged,
    "A4 half-sent": half_sent,
    "A5 unread": unread,
    "sessions": sessions,
}
