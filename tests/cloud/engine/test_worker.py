"""The thread that owns the device."""

import threading
import weakref

import pytest
import torch

from sft.errors import ServerFullError, ServerUnavailableError
from sft_cloud.engine.worker import DeviceWorker

CPU = torch.device("cpu")


@pytest.fixture
def worker():
    worker = DeviceWorker(CPU, capacity=2, threads=1)
    yield worker
    worker.shutdown()


class Gate:
    """Work that runs until it is let go."""

    def __init__(self):
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.entered.set()
        return self.opened.wait(30)


@pytest.fixture
def busy(worker):
    """A gate at which the worker waits."""
    gate = Gate()
    worker.submit(gate)
    assert gate.entered.wait(30)
    yield gate
    gate.opened.set()


def test_everything_runs_in_order_on_one_thread(worker, busy):
    ran = []
    futures = [worker.submit(lambda name=name: (ran.append(name), threading.get_ident())[1]) for name in "ab"]
    busy.opened.set()
    threads = {future.result(30) for future in futures}
    assert ran == ["a", "b"]
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


def test_errors_come_back_and_the_worker_goes_on(worker):
    with pytest.raises(ZeroDivisionError):
        worker.submit(lambda: 1 / 0).result(30)
    assert worker.submit(lambda: 1).result(30) == 1


def test_a_full_queue_refuses(worker, busy):
    waiting = [worker.submit(lambda: "done") for _ in range(2)]
    with pytest.raises(ServerFullError, match="queue is full"):
        worker.submit(lambda: "too much")
    busy.opened.set()
    assert [future.result(30) for future in waiting] == ["done", "done"]


def test_cancelled_work_does_not_run(worker, busy):
    ran = []
    future = worker.submit(lambda: ran.append(1))
    assert future.cancel()
    busy.opened.set()
    worker.submit(lambda: None).result(30)
    assert ran == []


def test_shutdown_finishes_what_runs_and_fails_what_waits(worker, busy):
    ran = []
    waiting = worker.submit(lambda: ran.append(1))
    stopping = threading.Thread(target=worker.shutdown)
    stopping.start()
    with pytest.raises(ServerUnavailableError):
        waiting.result(30)
    assert stopping.is_alive()  # for what runs is not interrupted
    busy.opened.set()
    stopping.join(30)
    assert not stopping.is_alive()
    with pytest.raises(ServerUnavailableError):
        worker.submit(lambda: None)
    worker.shutdown()  # a second time does nothing
    assert ran == []


def test_an_idle_worker_holds_no_work(worker):
    class Weights:
        pass

    weights, gone = Weights(), threading.Event()
    weakref.finalize(weights, gone.set)
    worker.submit(lambda weights=weights: None).result(30)
    del weights
    assert gone.wait(30)
