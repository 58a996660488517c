"""What looks after things goes on doing so."""

import threading

from support.calls import SECONDS

from sft_cloud.background import repeat


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
