"""A command line: its commands, and how one of them ends."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from contextlib import suppress
from typing import IO, Any, Callable, List, Mapping, Optional, Sequence

from sft.errors import SFTError, StorageError, UnexpectedError, UsageError
from sft.printable import printable
from sft.version import __version__

Command = Callable[[str, List[str]], int]
"""A subcommand: takes its full name (`sft-edge train`) and its arguments, returns the exit code. The first line of its
docstring is its help."""

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def run(prog: str, commands: Mapping[str, Command], argv: Optional[Sequence[str]] = None) -> int:
    """Runs the command that the first argument names and returns the exit code of the process.

    An error, wherever it comes from, becomes one line on stderr and the exit code of its class; one that nobody foresaw
    has its traceback above that line.
    """
    _open_streams()
    # Or gRPC's own notes, of each handshake that fails, would stand between our lines.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if getattr(sys.stdout, "errors", None) == "strict":  # as stderr does: a name that cannot be shown is no error
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    arguments = list(sys.argv[1:] if argv is None else argv)
    full_name = f"{prog} {arguments[0]}" if arguments and arguments[0] in commands else prog
    try:
        try:
            code = _run(prog, full_name, commands, arguments)
        except SystemExit:  # of --help
            sys.stdout.flush()
            raise
        # A reader that has gone, as in `sft-edge predict ... | head`, must show here and not at interpreter exit.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _tell(f"{full_name}: interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _settle(sys.stdout)
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if isinstance(error, OSError):
            _settle(sys.stdout)
        told = explained(error)
        if isinstance(told, UnexpectedError):
            with suppress(OSError):
                traceback.print_exc()
        return _fail(full_name, told)
    finally:
        _settle(sys.stderr)


def _run(prog: str, full_name: str, commands: Mapping[str, Command], arguments: List[str]) -> int:
    _check_process()
    if not arguments or arguments[0] in ("-h", "--help"):
        (sys.stdout if arguments else sys.stderr).write(_overview(prog, commands) + "\n")
        return 0 if arguments else UsageError.exit_code
    if arguments[0] == "--version":
        sys.stdout.write(f"{prog} {__version__}\n")
        return 0
    if arguments[0] not in commands:
        known = ", ".join(commands)
        raise UsageError(f"there is no command {arguments[0]!r}; the commands are {known}")
    return commands[arguments[0]](full_name, arguments[1:])


def _check_process() -> None:
    """Raises UsageError where a library would end the process, with words that nobody understands."""
    if sys.flags.optimize > 1:
        raise UsageError("Python's -OO, or PYTHONOPTIMIZE=2, leaves out what transformers reads: run without it")
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the working folder is gone: change to one that is there") from None


def _open_streams() -> None:
    """Those of the three that the process was started without lead nowhere: as under a supervisor that closes them.

    Before anything else is opened, which would get their numbers, and what C libraries write to standard error.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            else:
                os.set_inheritable(number, True)
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            options: Any = {"mode": "r" if number == 0 else "w", "encoding": "utf-8", "errors": "backslashreplace"}
            setattr(sys, name, open(number, closefd=False, **options))  # noqa: SIM115  # as long as the process


def explained(error: Exception) -> SFTError:
    """What a user is told of an error: itself, if it is one of ours."""
    if isinstance(error, SFTError):
        return error
    says = " ".join(str(error).split())
    if isinstance(error, OSError):
        where, reason = error.filename or "the output", error.strerror or error
        if error.errno not in _DISK_ERRORS:
            return SFTError(f"{where}: {reason}")
        return StorageError(f"cannot write {where}: {reason}; free some space and run again")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's: it is not imported here
        detail = f" ({says[:200]})" if says else ""
        return SFTError(f"out of memory{detail}; smaller batches and shorter sequences take less")
    kind = type(error).__name__
    return UnexpectedError(f"{kind}: {says[:300]}; this is a bug: please report it, with the traceback above this line")


def _overview(prog: str, commands: Mapping[str, Command]) -> str:
    width = max(len(name) for name in commands)
    lines = [f"usage: {prog} COMMAND [options]", "", "commands:"]
    for name, command in commands.items():
        lines.append(f"  {name:{width}}  {(command.__doc__ or '').strip().splitlines()[0]}")
    return "\n".join(lines + ["", f"{prog} COMMAND --help shows the options of a command."])


def _settle(stream: IO[str]) -> None:
    """Writes what the stream still holds or, where that fails, drops it: Python would complain of it again at exit."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _tell(line: str) -> None:
    with suppress(OSError):  # the exit code is left to tell it
        sys.stderr.write(line + "\n")


def _fail(name: str, error: SFTError) -> int:
    _tell(f"{name}: error: {printable(str(error))}")
    return error.exit_code
