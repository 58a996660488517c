"""A command line: its commands, and how one of them ends."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Callable, List, Mapping, Optional, Sequence

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
    # Or gRPC's own notes, of each handshake that fails, would stand between our lines.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed, as of some services: nobody listens, and that is no error
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for as long as we run
    if getattr(sys.stdout, "errors", None) == "strict":  # as stderr does: a name that cannot be shown is no error
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        (sys.stdout if arguments else sys.stderr).write(_overview(prog, commands) + "\n")
        return 0 if arguments else UsageError.exit_code
    name = arguments[0]
    if name == "--version":
        sys.stdout.write(f"{prog} {__version__}\n")
        return 0
    if name not in commands:
        known = ", ".join(commands)
        return _fail(prog, UsageError(f"there is no command {name!r}; the commands are {known}"))
    full_name = f"{prog} {name}"
    try:
        code = commands[name](full_name, arguments[1:])
        # A reader that has gone, as in `sft-edge predict ... | head`, must show here and not at interpreter exit.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        sys.stderr.write(f"{full_name}: interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _settle_stdout()
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if isinstance(error, OSError):
            _settle_stdout()
        told = explained(error)
        if isinstance(told, UnexpectedError):
            traceback.print_exc()
        return _fail(full_name, told)


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
        return SFTError(f"out of memory ({says[:200]}); smaller batches and shorter sequences take less")
    kind = type(error).__name__
    return UnexpectedError(f"{kind}: {says[:300]}; this is a bug: please report it, with the traceback above this line")


def _overview(prog: str, commands: Mapping[str, Command]) -> str:
    width = max(len(name) for name in commands)
    lines = [f"usage: {prog} COMMAND [options]", "", "commands:"]
    for name, command in commands.items():
        lines.append(f"  {name:{width}}  {(command.__doc__ or '').strip().splitlines()[0]}")
    return "\n".join(lines + ["", f"{prog} COMMAND --help shows the options of a command."])


def _settle_stdout() -> None:
    """Writes what stdout still holds or, where that fails, drops it: Python would complain of it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(name: str, error: SFTError) -> int:
    sys.stderr.write(f"{name}: error: {printable(str(error))}\n")
    return error.exit_code
