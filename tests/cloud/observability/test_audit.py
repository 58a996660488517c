"""Who did what, one JSON object a line."""

import json
import os

import pytest

from sft.errors import StorageError
from sft_cloud.observability import audit
from sft_cloud.observability.audit import AuditLog


class Clock:
    now = 1_700_000_000.25

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


@pytest.fixture
def log(path, clock):
    return AuditLog(path, clock)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def test_an_event_is_a_line(log, path):
    log.write("opened", "alice", "ipv4:192.0.2.1:50000", session="abcd1234", split_rank=8)
    log.write("closed", "alice", "-", session="abcd1234", reason="the edge closed it")
    assert lines(path) == [
        {
            "time": "2023-11-14T22:13:20.250+00:00",
            "who": "alice",
            "peer": "ipv4:192.0.2.1:50000",
            "what": "opened",
            "session": "abcd1234",
            "split_rank": 8,
        },
        {
            "time": "2023-11-14T22:13:20.250+00:00",
            "who": "alice",
            "peer": "-",
            "what": "closed",
            "session": "abcd1234",
            "reason": "the edge closed it",
        },
    ]


def test_only_the_owner_of_the_file_reads_it(log, path):
    assert path.stat().st_mode & 0o777 == 0o600


def test_it_goes_on_where_it_was(log, path, clock):
    log.write("opened", "alice", "-")
    AuditLog(path, clock).write("closed", "alice", "-")
    assert [line["what"] for line in lines(path)] == ["opened", "closed"]


@pytest.mark.parametrize(
    "text", ['line\nline {"what": "opened"}', "\r\x1b[2J\x00", "\u2028\u202e", "\ud800", "é" * 1000]
)
def test_text_from_outside_stays_in_its_line(log, path, text):
    log.write("refused", text, text, reason=text)
    (line,) = lines(path)
    assert len(line["reason"]) <= audit.MAX_TEXT
    assert line["what"] == "refused"


def test_a_file_that_is_moved_away_is_made_anew(log, path):
    log.write("opened", "alice", "-")
    path.rename(path.with_suffix(".1"))
    log.write("closed", "alice", "-")
    assert [line["what"] for line in lines(path)] == ["closed"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_refusals_do_not_fill_the_disk(log, path, clock):
    for _ in range(1000):
        log.write("refused", "mallory", "-", reason="no")
    log.write("opened", "alice", "-")
    assert len(lines(path)) == audit.REFUSALS_PER_SECOND + 1
    clock.now += 1
    log.write("refused", "mallory", "-", reason="no")
    log.write("refused", "mallory", "-", reason="no")
    assert [line.get("left_out_before") for line in lines(path)[-2:]] == [1000 - audit.REFUSALS_PER_SECOND, None]


def test_a_file_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    with pytest.raises(StorageError, match="cannot write the audit log"):
        AuditLog(tmp_path / "missing" / "audit.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_said_once_and_the_server_goes_on(path, log, caplog):
    path.unlink()
    path.symlink_to("/dev/full")
    for _ in range(3):
        log.write("opened", "alice", "-")
    assert caplog.text.count("the audit log cannot be written") == 1


def test_without_a_file_nothing_is_written():
    AuditLog(None).write("opened", "alice", "-")
