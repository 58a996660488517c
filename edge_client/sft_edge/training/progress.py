"""How far a run is: a bar on a terminal, a quiet line every `logging_steps` steps elsewhere; and TensorBoard."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Callable, Deque, Mapping, Optional, Tuple, Type

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from sft.errors import StorageError, UsageError
from sft.printable import format_bytes, format_seconds, format_value

_WINDOW_STEPS = 50
"""Speed and bytes are means over so many steps: steady enough to read, soon right after the link changes."""

_REDRAW_SECONDS = 0.1


class Progress:
    """Follows a run and writes plain lines. A context manager; `open_progress` picks the kind that suits the stream."""

    def __init__(self, logging_steps: int, stream: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._logging_steps = logging_steps
        self._stream = stream
        self._clock = clock
        self._total_steps = 0
        self._marks: Deque[Tuple[int, float, int]] = deque(maxlen=_WINDOW_STEPS + 1)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.stop()

    def start(self, total_steps: int, first_step: int = 0) -> None:
        """Training begins; `first_step` steps were done before, by an earlier run."""
        self._total_steps = total_steps
        self._marks.clear()
        self._marks.append((first_step, self._clock(), 0))

    def step(self, step: int, loss: float, wire_bytes: int = 0) -> None:
        """So many steps are done; the last had this loss and moved so many bytes, both ways."""
        self._marks.append((step, self._clock(), wire_bytes))
        if step % self._logging_steps == 0 or step == self._total_steps:
            self._line(f"step {self._figures(loss)}")

    def log(self, values: Mapping[str, Any]) -> None:
        """Writes an entry of the log history, such as the result of an evaluation."""
        self._line("  ".join(f"{name} {format_value(value)}" for name, value in values.items()))

    def note(self, text: str) -> None:
        """Writes a line that stays, about the whole run."""
        self._line(text)

    def status(self, text: str) -> None:
        """Tells what the run is about beside steps, such as `evaluating`; an empty text ends it."""
        if text:
            self._line(text)

    def stop(self) -> None:
        """Ends the display."""

    def _figures(self, loss: float) -> str:
        """Where the run is, with speed and bytes as means over the last steps, and the time left at that speed."""
        (first_step, begin, _), (step, now, _) = self._marks[0], self._marks[-1]
        speed = (step - first_step) / (now - begin) if now > begin else math.inf
        parts = [f"{step}/{self._total_steps}", f"loss {loss:.4f}"]
        parts.append(f"{speed:.3g} steps/s" if speed < 100 else f"{speed:.0f} steps/s")
        wire_bytes = [mark[2] for mark in list(self._marks)[1:]]
        if any(wire_bytes):
            parts.append(f"{format_bytes(sum(wire_bytes) / len(wire_bytes))}/step")
        if speed:
            parts.append(f"{format_seconds((self._total_steps - step) / speed)} left")
        return "  ".join(parts)

    def _line(self, text: str) -> None:
        with suppress(OSError):  # who has nobody to tell trains on
            self._stream.write(text + "\n")
            self._stream.flush()


class TerminalProgress(Progress):
    """The same as a bar that stays on the last line of a terminal, log lines scrolling above it."""

    def __init__(self, logging_steps: int, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging_steps, console.file, clock)
        self._drawn = -math.inf
        # Drawn by hand: a thread that draws would be in the way of DataLoader workers, which are forked later.
        columns = (TextColumn("{task.fields[status]}"), BarColumn(), TextColumn("{task.fields[figures]}"))
        self._bar = RichProgress(*columns, console=console, auto_refresh=False)
        self._task = self._bar.add_task("", total=None, status="starting", figures="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def start(self, total_steps: int, first_step: int = 0) -> None:
        super().start(total_steps, first_step)
        self._bar.update(self._task, total=total_steps, completed=first_step)
        self.status("")

    def step(self, step: int, loss: float, wire_bytes: int = 0) -> None:
        now = self._clock()
        self._marks.append((step, now, wire_bytes))
        draw = now - self._drawn >= _REDRAW_SECONDS or step == self._total_steps
        if draw:
            self._drawn = now
            self._bar.update(self._task, completed=step, figures=self._figures(loss), refresh=True)

    def status(self, text: str) -> None:
        self._bar.update(self._task, status=text or "training", refresh=True)

    def stop(self) -> None:
        self._bar.stop()

    def _line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


def open_progress(logging_steps: int, disable_tqdm: bool = False, stream: Optional[IO[str]] = None) -> Progress:
    """A bar where `stream` (stderr) is a terminal that can show one, plain lines elsewhere or where disabled."""
    stream = sys.stderr if stream is None else stream
    console = Console(file=stream)
    if disable_tqdm or not console.is_terminal or console.is_dumb_terminal:
        return Progress(logging_steps, stream)
    return TerminalProgress(logging_steps, console)


class TensorBoard:
    """Writes the log history where TensorBoard reads it. A context manager."""

    def __init__(self, logging_dir: Path, first_step: int = 0) -> None:
        """A run that goes on from `first_step` has what is there after it forgotten.

        Raises UsageError without the package and StorageError where the directory cannot be written.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError("--report-to tensorboard needs a package: pip install tensorboard") from error
        try:
            self._writer = SummaryWriter(str(logging_dir), purge_step=first_step + 1 if first_step else None)
        except OSError as error:
            raise StorageError(f"cannot write --logging-dir {logging_dir}: {error.strerror}") from error

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._writer.close()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers of an entry of the log history: `eval_f1` becomes `eval/f1`, `loss` becomes `train/loss`."""
        for name, value in values.items():
            if isinstance(value, (int, float)) and name not in ("step", "epoch"):
                tag = "eval/" + name[len("eval_") :] if name.startswith("eval_") else "train/" + name
                self._writer.add_scalar(tag, value, step)
