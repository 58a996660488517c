"""What the other side says can neither write to a terminal what it likes nor be too large to show."""

from __future__ import annotations

import math

import pytest

from sft.printable import (
    MAX_SECONDS,
    MAX_TEXT,
    counted,
    finite,
    format_bytes,
    format_seconds,
    printable,
    tidied,
    told_by,
)
from sft.v1 import split_training_pb2 as pb


def test_one_is_no_more_than_one():
    assert [counted(count, "run") for count in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a sentence, Zo\u00eb's", "a sentence, Zo\u00eb's"),
        ("\x1b[2J\x1b]0;title\x07", "?[2J?]0;title?"),
        ("one\nline\r\n  of\ttext", "one line of text"),
        ("\u202egnp.exe", "?gnp.exe"),
        ("\ud800", "?"),
        ("", ""),
    ],
    ids=ascii,
)
def test_texts(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_what_a_library_says_is_said_so_that_it_can_be_understood() -> None:
    assert told_by(ValueError("no\n\tsense")) == printable("no\n\tsense")
    assert told_by(KeyError("gelu_9")) == "there is no 'gelu_9'"
    assert told_by(KeyError()) == "KeyError"


def test_numbers() -> None:
    assert [finite(number) for number in (1.5, -2.0, math.nan)] == [1.5, -2.0, 0.0]
    assert [finite(number) for number in (math.inf, -math.inf, 1e300)] == [MAX_SECONDS, -MAX_SECONDS, MAX_SECONDS]


def test_every_part_of_an_answer_is_tidied_and_the_answer_itself_left() -> None:
    limits = pb.CallerLimits(models=["bert-*", "\x1b[31m"], steps_per_second=math.nan, max_sessions=3)
    session = pb.SessionStatus(owner="\x1b[2J\nben", model_name="a" * 1000, age_seconds=math.inf, next_step=2)
    said = pb.StatusResponse(caller="\x07", uptime_seconds=math.inf, stopping=True, sessions=[session], limits=limits)
    tidy = tidied(said)
    assert (tidy.caller, tidy.uptime_seconds, tidy.stopping) == ("?", MAX_SECONDS, True)
    assert (tidy.sessions[0].owner, tidy.sessions[0].model_name) == ("?[2J ben", "a" * MAX_TEXT)
    assert (tidy.sessions[0].age_seconds, tidy.sessions[0].next_step) == (MAX_SECONDS, 2)
    assert list(tidy.limits.models) == ["bert-*", "?[31m"]
    assert (tidy.limits.steps_per_second, tidy.limits.max_sessions) == (0.0, 3)
    assert said.caller == "\x07"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (12_900, "12.9 kB"),
        (999_600, "1 MB"),
        (6.5e6, "6.5 MB"),
        (3e15, "3e+03 TB"),
    ],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (80, "1m20s"), (7500, "2h05m"), (400_000, "111h06m")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
