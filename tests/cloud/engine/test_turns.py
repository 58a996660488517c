"""Models are built one at a time, callers in turn, and training goes on meanwhile."""

import json
import threading
import time

import pytest
import torch

from sft.errors import ProtocolError, ServerUnavailableError
from sft_cloud.engine.build import build, session_in_pieces
from sft_cloud.engine.opener import TransformersOpener
from sft_cloud.engine.request import check_request
from sft_cloud.engine.turns import REST, SLICE_SECONDS, Gone, Paced, Turns, in_pieces
from sft_cloud.engine.weights import WeightsFinder
from sft_cloud.engine.worker import DeviceWorker, at_once
from sft_cloud.identity import ANONYMOUS
from sft_cloud.memory import Kind, MemoryBudget
from sft_cloud.storage import BlobStore

CPU = torch.device("cpu")
SECONDS = 30


def test_callers_have_their_turn_one_after_the_other():
    turns, order, threads = Turns(), [], []

    def take(caller):
        with turns.of(caller):
            order.append(caller)

    with turns.of("first"):
        for caller in ("many", "many", "many", "few"):
            threads.append(threading.Thread(target=take, args=(caller,)))
            threads[-1].start()
            while sum(map(len, turns._waiting.values())) < len(threads):
                pass
    for thread in threads:
        thread.join(SECONDS)
    assert order == ["many", "few", "many", "many"]
    with turns.of("last"):
        pass


def in_line(turns):
    with turns._lock:
        return sum(map(len, turns._waiting.values()))


def test_who_has_gone_stands_in_nobody_s_way():
    turns, gone, came = Turns(), Gone(), []

    def take(caller, gone=None):
        try:
            with turns.of(caller, gone):
                came.append(caller)
        except ServerUnavailableError:
            came.append(f"{caller} has gone")

    with turns.of("first"):
        threads = [threading.Thread(target=take, args=("same", gone)), threading.Thread(target=take, args=("same",))]
        for number, thread in enumerate(threads):
            thread.start()
            until = time.monotonic() + SECONDS
            while in_line(turns) <= number:
                assert time.monotonic() < until
        gone.goes()
        threads[0].join(SECONDS)
        assert (came, in_line(turns)) == (["same has gone"], 1)
    threads[1].join(SECONDS)
    take("last", gone)
    with turns.of("last"):
        assert came[1:] == ["same", "last has gone"]


def test_a_request_whose_call_was_cancelled_waits_no_more(server, connect, edge):
    stub, turns = connect(server.address), server.engine._opener._turns
    with turns.of("first"):
        for only_check in (True, False):
            call = stub.OpenSession.future(edge.request(only_check=only_check), timeout=SECONDS)
            while not in_line(turns):
                pass
            call.cancel()
            until = time.monotonic() + SECONDS
            while in_line(turns):
                assert time.monotonic() < until
    assert set(stub.OpenSession(edge.request(), timeout=SECONDS).missing_blobs) == set(edge.blobs())


@pytest.mark.parametrize("others_train", [True, False])
def test_who_builds_pauses_while_others_train(edge, others_train):
    pauses = []
    with Paced(at_once, lambda: others_train, pauses.append) as paced:
        build(check_request(edge.request()), CPU)
        built = len(pauses)
        paced.run(lambda: None)
    assert (built > 0, len(pauses) > built) == (others_train, others_train)
    assert all(pause >= REST * SLICE_SECONDS for pause in pauses[:built])


def test_who_asks_for_nothing_that_can_be_built_pauses_too(edge, tmp_path):
    opener, pauses = TransformersOpener(CPU, BlobStore(tmp_path), WeightsFinder(tmp_path)), []
    values = {**json.loads(edge.request().config_json), "num_labels": 4000, "max_position_embeddings": 1 << 40}
    paced = Paced(at_once, lambda: True, lambda _: pauses.append(opener._turns._is_taken))
    with paced, pytest.raises(ProtocolError, match="max_position_embeddings"):
        opener.open(edge.request(config_json=json.dumps(values)), ANONYMOUS, paced.run)
    assert pauses[-1:] == [True]  # with its turn: one caller's many requests pause one after the other


def test_others_have_the_device_between_the_pieces_of_a_session(edge):
    spec, between = check_request(edge.request()), []

    def run(work):
        between.append(None)
        return work()

    pieces = session_in_pieces(spec, build(spec, CPU), [*edge.weights, *edge.factors], CPU, lambda _: None, None)
    assert in_pieces(run, pieces).next_step == 0
    assert len(between) > 1


def test_a_model_is_built_while_the_device_is_busy(edge, tmp_path):
    opener = TransformersOpener(CPU, BlobStore(tmp_path), WeightsFinder(tmp_path))
    worker, goes_on = DeviceWorker(CPU, 2), threading.Event()
    worker.submit(lambda: goes_on.wait(SECONDS))
    try:
        missing = opener.open(edge.request(only_check=True), ANONYMOUS, worker.run)
        assert set(missing) == set(edge.blobs())
        assert not goes_on.is_set()
    finally:
        goes_on.set()
        worker.shutdown()


def test_what_building_takes_is_in_the_budget(edge):
    spec = check_request(edge.request())
    budget = MemoryBudget(1 << 30)
    pieces = session_in_pieces(spec, build(spec, CPU), [*edge.weights, *edge.factors], CPU, lambda _: None, budget)
    next(pieces)
    assert budget.held()[Kind.BUILDS] > 0
    pieces.close()
    assert budget.held_bytes == 0
