"""Bytes and seconds of a run."""

import queue
import socket
import subprocess
import sys
import threading
import tracemalloc
from concurrent import futures
from contextlib import suppress
from dataclasses import replace

import grpc
import pytest

from sft.wire.ledger import PHASES, Ledger, StepRecord, Traffic, framed_size, plain_split_bytes


def record(step, **changes):
    one = StepRecord(step, 2, Traffic(100, 90, 120, 110), plain_bytes=9120, edge_forward=0.25, cloud=0.5)
    return replace(one, **changes)


@pytest.mark.parametrize(
    ("message_bytes", "expected"),
    # The prefix of 5 counts towards the frame of 16,384.
    [(0, 5 + 9), (1, 6 + 9), (16_379, 16_384 + 9), (16_380, 16_385 + 18), (1 << 20, (1 << 20) + 5 + 65 * 9)],
)
def test_framed_size(message_bytes, expected):
    assert framed_size(message_bytes) == expected


def test_plain_split_bytes_are_those_of_the_paper():
    # The paper's example: 32 sequences of 66 tokens, width 768, float32: 6.5 MB each way.
    assert plain_split_bytes(32, 66, 768) == 2 * 6_488_064


def test_training_and_evaluation_do_not_mix():
    ledger = Ledger()
    ledger.add(record(0))
    ledger.add_evaluation(Traffic(1000, 2000, 3000, 4000), samples=7)
    ledger.add_evaluation(Traffic(1, 2, 3, 4), samples=1)
    ledger.add(record(1, traffic=Traffic(1, 2, 3, 4), samples=1))
    assert ledger.traffic == Traffic(101, 92, 123, 114)
    assert ledger.evaluation == Traffic(1001, 2002, 3003, 4004)
    assert (len(ledger), ledger.samples, ledger.evaluation_samples) == (2, 3, 8)


def test_the_reduction_is_plain_split_learning_over_our_payload():
    ledger = Ledger()
    ledger.add(record(0, plain_bytes=19_000))
    ledger.add_evaluation(Traffic(1000, 2000, 3000, 4000), samples=7)
    ledger.add(record(1, plain_bytes=0))
    assert ledger.wire_reduction() == 19_000 / (2 * 190)


def test_one_process_has_no_reduction():
    ledger = Ledger()
    assert ledger.wire_reduction() is None
    ledger.add(StepRecord(0, samples=2, edge_forward=1.0))
    assert ledger.wire_reduction() is None


def test_records_come_back_as_they_were():
    records = [record(0), record(1, edge_backward=0.125, uplink_wait=3.0), StepRecord(5, samples=1)]
    ledger = Ledger()
    for one in records:
        ledger.add(one)
    assert list(ledger) == records


def test_phases():
    ledger = Ledger()
    for step in range(20):
        ledger.add(record(step, edge_forward=float(step + 1), cloud=70.0, uplink_wait=19.5))
    rows = {row.name: row for row in ledger.phases()}
    assert tuple(rows) == PHASES
    assert rows["edge_forward"] == ("edge_forward", 210.0, 0.105, 10.5, 10.0, 19.0)
    assert rows["cloud"] == ("cloud", 1400.0, 0.7, 70.0, 70.0, 70.0)
    assert rows["edge_backward"] == ("edge_backward", 0.0, 0.0, 0.0, 0.0, 0.0)
    assert sum(row.share for row in rows.values()) == pytest.approx(1.0)


def test_a_run_without_steps_has_rows_of_zeros():
    assert [row[1:] for row in Ledger().phases()] == [(0.0,) * 5] * len(PHASES)


def test_twenty_thousand_steps_take_little_memory():
    ledger, one = Ledger(), record(1 << 40)
    tracemalloc.start()
    try:
        for _ in range(20_000):
            ledger.add(one)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 2_400_000


def test_the_ledger_needs_no_torch():
    code = "import sys, sft.wire.ledger; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


class Relay:
    """A TCP relay that counts the bytes of each direction."""

    def __init__(self, port):
        self.counts = [0, 0]
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        near, _ = self._listener.accept()
        far = socket.create_connection(self._target)
        with near, far:
            back = threading.Thread(target=self._pump, args=(far, near, 1))
            back.start()
            self._pump(near, far, 0)
            back.join()

    def _pump(self, source, target, direction):
        with suppress(OSError):  # either end may hang up first
            while True:
                data = source.recv(1 << 16)
                if not data:
                    break
                self.counts[direction] += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self):
        self._listener.close()
        self._threads[0].join()


def test_framed_size_is_what_grpc_puts_on_the_connection():
    server = grpc.server(futures.ThreadPoolExecutor(1))
    echo = grpc.stream_stream_rpc_method_handler(lambda messages, context: messages)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Echo": echo}),))
    relay = Relay(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{relay.port}") as channel:
        outgoing = queue.Queue()
        replies = channel.stream_stream("/test/Echo")(iter(outgoing.get, None))
        outgoing.put(b"the headers of the stream go with it")
        next(replies)
        for message_bytes in (100, 16_379, 16_380, 400_000):
            before, rounds = list(relay.counts), 20
            for _ in range(rounds):
                outgoing.put(bytes(message_bytes))
                next(replies)
            for direction in (0, 1):
                counted = (relay.counts[direction] - before[direction]) / rounds
                expected = framed_size(message_bytes)
                assert expected * 0.999 <= counted <= expected + 35
        outgoing.put(None)
        assert list(replies) == []
    server.stop(None).wait()
    relay.close()
