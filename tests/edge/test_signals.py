"""Ctrl-C, deferred."""

from __future__ import annotations

import signal
import threading
from typing import List

import pytest

from sft_edge.signals import interrupts_deferred


def test_it_takes_effect_at_the_end_of_the_block() -> None:
    done: List[str] = []

    def work() -> None:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("all of the block")
        done.append("nothing behind it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["all of the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_block_comes_first() -> None:
    def fail() -> None:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("the block's own")

    with pytest.raises(ValueError, match="the block's own"):
        fail()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_it_does_nothing() -> None:
    """Python allows signal handlers in the main thread only."""
    done: List[str] = []

    def work() -> None:
        with interrupts_deferred():
            done.append("worked")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["worked"]
