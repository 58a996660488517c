"""What looks after things goes on doing so."""

import threading

import torch
from support.calls import SECONDS

from sft_cloud import server as serve
from sft_cloud.background import repeat
from sft_cloud.service.registry import Registry


def test_an_error_is_logged_and_ends_nothing(caplog):
    stop, calls = threading.Event(), []

    def work():
        calls.append(None)
        if len(calls) == 1:
            raise KeyError("a bug")
        stop.set()

    thread = threading.Thread(target=repeat, args=(work, 0.001, stop), daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert len(calls) == 2
    assert "KeyError: 'a bug'" in caplog.text


def test_nothing_is_done_once_it_is_over():
    stop = threading.Event()
    stop.set()
    repeat(lambda: 1 / 0, 0.0, stop)


def test_the_housekeeper_outlives_an_error(tmp_path, monkeypatch):
    looks, again = [], threading.Event()

    def reap(registry):
        looks.append(None)
        if len(looks) == 1:
            raise KeyError("a bug")
        again.set()

    monkeypatch.setattr(Registry, "reap", reap)
    monkeypatch.setattr(serve, "_HOUSEKEEPING_SECONDS", 0.01)
    server = serve.CloudServer("127.0.0.1", 0, torch.device("cpu"), tmp_path, None, 1, 1)
    try:
        assert again.wait(SECONDS)
    finally:
        server.stop(grace_seconds=0)
