"""What the server looks at from time to time: it goes on looking, until it stops."""

import threading

import pytest
from support.calls import SECONDS
from support.servers import start_server

from sft_cloud import server as serve
from sft_cloud.admission.deadlines import Deadlines
from sft_cloud.service.registry import Registry


def test_an_error_is_logged_and_ends_nothing(caplog):
    stop, calls = threading.Event(), []

    def work():
        calls.append(None)
        if len(calls) == 1:
            raise KeyError("a bug")
        stop.set()

    thread = threading.Thread(target=serve.repeat, args=(work, 0.001, stop), daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert len(calls) == 2
    assert "KeyError: 'a bug'" in caplog.text


def test_nothing_is_done_once_it_is_over():
    stop = threading.Event()
    stop.set()
    serve.repeat(lambda: 1 / 0, 0.0, stop)


@pytest.mark.parametrize(
    ("owner", "name", "seconds"), [(Registry, "reap", "SESSIONS_SECONDS"), (Deadlines, "look", "WAITS_SECONDS")]
)
def test_a_server_looks_on_after_an_error_and_until_it_stops(tmp_path, monkeypatch, owner, name, seconds):
    looks, again = [], threading.Event()

    def look(_):
        looks.append(None)
        if len(looks) == 1:
            raise KeyError("a bug")
        again.set()

    monkeypatch.setattr(owner, name, look)
    monkeypatch.setattr(serve, seconds, 0.01)
    server = start_server(tmp_path, 1)
    try:
        assert again.wait(SECONDS)
    finally:
        server.stop(grace_seconds=0)
    assert not any(thread.is_alive() for thread in server._threads)
