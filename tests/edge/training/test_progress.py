"""How a run tells how far it is."""

import io
import os
import sys

import pytest
from rich.console import Console

from sft.errors import StorageError, UsageError
from sft_edge.training.progress import Progress, TensorBoard, TerminalProgress, open_progress


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def follow(progress, clock, steps, seconds=0.5, wire_bytes=12_900, total_steps=200):
    progress.start(total_steps)
    for step in range(1, steps + 1):
        clock.now += seconds
        progress.step(step, loss=1 / step, wire_bytes=wire_bytes)


def test_a_plain_line_every_logging_steps_and_at_the_end():
    stream, clock = io.StringIO(), Clock()
    with Progress(50, stream, clock) as progress:
        follow(progress, clock, steps=120, total_steps=120)
    assert stream.getvalue().splitlines() == [
        "step 50/120  loss 0.0200  2 steps/s  12.9 kB/step  35s left",
        "step 100/120  loss 0.0100  2 steps/s  12.9 kB/step  10s left",
        "step 120/120  loss 0.0083  2 steps/s  12.9 kB/step  0s left",
    ]


def test_speed_and_bytes_are_of_the_last_steps():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100, stream, clock)
    follow(progress, clock, steps=50, seconds=10.0, wire_bytes=10**9)
    for step in range(51, 101):
        clock.now += 0.25
        progress.step(step, loss=0.5, wire_bytes=2000)
    assert stream.getvalue() == "step 100/200  loss 0.5000  4 steps/s  2 kB/step  25s left\n"


def test_a_run_that_goes_on_counts_from_where_it_was():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(50, stream, clock)
    progress.start(200, first_step=140)
    for step in range(141, 151):
        clock.now += 2.0
        progress.step(step, loss=0.5, wire_bytes=100)
    assert stream.getvalue() == "step 150/200  loss 0.5000  0.5 steps/s  100 B/step  1m40s left\n"


def test_one_process_tells_no_bytes():
    stream, clock = io.StringIO(), Clock()
    follow(Progress(10, stream, clock), clock, steps=10, wire_bytes=0)
    assert stream.getvalue() == "step 10/200  loss 0.1000  2 steps/s  1m35s left\n"


def test_a_clock_that_stands_still_is_no_trouble():
    stream, clock = io.StringIO(), Clock()
    follow(Progress(10, stream, clock), clock, steps=10, seconds=0.0)
    assert stream.getvalue() == "step 10/200  loss 0.1000  inf steps/s  12.9 kB/step  0s left\n"


def test_log_entries_and_status_are_lines():
    stream = io.StringIO()
    with Progress(10, stream) as progress:
        progress.status("reconnecting")
        progress.log({"eval_accuracy": 0.8211009, "eval_samples": 872, "step": 200})
        progress.status("")
    assert stream.getvalue() == "reconnecting\neval_accuracy 0.8211  eval_samples 872  step 200\n"


def test_a_terminal_shows_the_bar_and_log_lines_above_it():
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=140, color_system=None, legacy_windows=False)
    with TerminalProgress(50, console, clock) as progress:
        progress.status("connecting")
        follow(progress, clock, steps=120, total_steps=120)
        progress.log({"eval_accuracy": 0.5})
    text = stream.getvalue()
    assert text.index("connecting") < text.index("training")
    assert "120/120  loss 0.0083  2 steps/s  12.9 kB/step  0s left" in text
    assert text.index("eval_accuracy 0.5\n") < text.rindex("120/120")


def test_a_terminal_is_not_drawn_more_often_than_anyone_can_read():
    drawn = []
    for seconds in (0.001, 1.0):
        stream, clock = io.StringIO(), Clock()
        console = Console(file=stream, force_terminal=True, width=140, color_system=None)
        with TerminalProgress(50, console, clock) as progress:
            follow(progress, clock, steps=100, seconds=seconds, total_steps=100)
        drawn.append(stream.getvalue().count("loss"))
    assert drawn[0] < 10
    assert drawn[1] >= 100


def test_a_pipe_gets_lines_and_a_terminal_gets_the_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    assert type(open_progress(50, stream=io.StringIO())) is Progress
    master, slave = os.openpty()
    with open(slave, "w") as terminal:
        assert type(open_progress(50, stream=terminal)) is TerminalProgress
        assert type(open_progress(50, disable_tqdm=True, stream=terminal)) is Progress
        monkeypatch.setenv("TERM", "dumb")
        assert type(open_progress(50, stream=terminal)) is Progress
    os.close(master)


def read_scalars(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_log_history(tmp_path):
    pytest.importorskip("tensorboard")
    with TensorBoard(tmp_path / "runs") as board:
        board.log(50, {"loss": 0.5, "epoch": 0.25, "step": 50, "note": "text"})
        board.log(100, {"loss": 0.25, "eval_f1": 0.75})
    expected = {"train/loss": [(50, 0.5), (100, 0.25)], "eval/f1": [(100, 0.75)]}
    assert read_scalars(tmp_path / "runs") == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_logging_dir_that_cannot_be_is_a_storage_error(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot write --logging-dir .*runs: "):
        TensorBoard(tmp_path / "runs")


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard" or "utils.tensorboard" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # how Python is told that a module does not exist
    with pytest.raises(UsageError, match=r"--report-to tensorboard needs .*: pip install tensorboard"):
        TensorBoard(tmp_path)
