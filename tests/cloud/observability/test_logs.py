"""One line an event, whatever is in it."""

import json
import logging
import sys

import pytest

from sft_cloud.observability.logs import JsonFormatter, TextFormatter, set_up_logging


def record(event="session opened", exc_info=None, **fields):
    made = logging.LogRecord("sft_cloud.service.servicer", logging.INFO, "file.py", 1, event, (), exc_info)
    made.created = 0.5
    if fields:
        made.fields = fields
    return made


def test_text():
    line = TextFormatter().format(record(session="Xy_1", seconds=1.5, device="cuda:0"))
    assert line == "1970-01-01T00:00:00.500+00:00 INFO session opened session=Xy_1 seconds=1.5 device=cuda:0"


def test_what_an_edge_sent_cannot_forge_a_line():
    line = TextFormatter().format(record(edge="1.0\nERROR all is lost", model="a b=c"))
    assert line.endswith(r'edge="1.0\nERROR all is lost" model="a b=c"')
    assert len(line.splitlines()) == 1


def test_json():
    entry = json.loads(JsonFormatter().format(record(session="Xy_1", steps=3)))
    assert entry == {
        "time": "1970-01-01T00:00:00.500+00:00",
        "level": "info",
        "logger": "sft_cloud.service.servicer",
        "event": "session opened",
        "session": "Xy_1",
        "steps": 3,
    }


def test_tracebacks():
    try:
        raise ValueError("wrong")
    except ValueError:
        made = record("internal error", sys.exc_info())
    assert TextFormatter().format(made).endswith("ValueError: wrong")
    line = JsonFormatter().format(made)
    assert "ValueError: wrong" in json.loads(line)["traceback"]
    assert len(line.splitlines()) == 1


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    root.handlers[:] = []
    yield root
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_set_up_writes_to_stderr_from_the_level_on(root_logger, capsys, log_format):
    set_up_logging("warning", log_format)
    logging.getLogger("sft_cloud").info("quiet")
    logging.getLogger("sft_cloud").warning("loud")
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert "loud" in line
    assert line.startswith("{") is (log_format == "json")
