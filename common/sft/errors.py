"""Every error this project raises on purpose; a user sees its one line, and the exit code of its class.

SFTError                        1
├── UsageError                  2   flags, configuration files
│   └── CutError                2   layer or rank out of range
├── DataError                   3   rows of the data set
├── CheckpointError             4   a model directory, missing, torn or of an unsupported kind
│   └── UnsupportedModelError   4   an architecture or head that cannot be cut
├── LinkError                   5   the cloud, or the way to it
│   ├── ServerUnavailableError  5   nobody answers
│   │   └── NotOursError        5   somebody does, who is no sft-cloud server, or none yet
│   ├── ServerFullError         5   no room for another session
│   ├── AccessError             5   the other side does not know us, or we not it: token, certificate, limits of a token
│   │   └── StaleAccessError    5   it does not know us by what the files said: what they say now may be good
│   ├── ProtocolError           5   not ours, another version, or a message that breaks the rules
│   ├── StreamBrokenError       5   the stream ended; the session may be there still
│   └── SessionLostError        5   the session ended before the run did
├── TrainingError               6   the optimizer or the loss cannot go on
│   ├── NonFiniteLossError      6   NaN or infinity
│   └── CloudMemoryError        6   the cloud's device had no memory for a step, which neither side took
├── StorageError                7   a full or read-only disk
├── VerificationError           8   `sft-edge verify` or `export` found a difference
└── UnexpectedError             1   what none of these is for: a mistake of ours, or of a library
"""

from __future__ import annotations


class SFTError(Exception):
    """Base of the tree. The message says in one line what was wrong and what to do."""

    exit_code = 1


class UsageError(SFTError):
    """A flag or a configuration file does not make sense."""

    exit_code = 2


class CutError(UsageError):
    """The split layer or the split rank is outside what the model has."""


class DataError(SFTError):
    """A data file is missing or a row of it is malformed; the message names file and line."""

    exit_code = 3


class CheckpointError(SFTError):
    """A model directory is missing, torn, or does not fit its configuration."""

    exit_code = 4


class UnsupportedModelError(CheckpointError):
    """No family file describes how to cut this architecture or head."""


class LinkError(SFTError):
    """The other side, or the way to it, failed."""

    exit_code = 5


class ServerUnavailableError(LinkError):
    """Nobody answers at the address."""


class NotOursError(ServerUnavailableError):
    """What takes connections at the address does not speak our protocol: another program, or a relay without a server
    behind it."""


class ServerFullError(LinkError):
    """The server has no room for another session, or its queue is full."""


class AccessError(LinkError):
    """One side does not accept who the other says it is, or what it asks for is not for it."""


class StaleAccessError(AccessError):
    """The other side does not let us in with what was read from files, which may say something else by now."""


class ProtocolError(LinkError):
    """The other side is not ours, speaks another version, or broke the protocol."""


class StreamBrokenError(LinkError):
    """The stream ended before its time; another may go on with the session."""


class SessionLostError(LinkError):
    """The session ended before the run did."""


class TrainingError(SFTError):
    """The optimizer or the loss cannot go on."""

    exit_code = 6


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite."""


class CloudMemoryError(TrainingError):
    """The cloud's device had no memory for a step; it is undone on the cloud, and the edge takes it no more than it."""


class StorageError(SFTError):
    """Something could not be written: a full or read-only disk."""

    exit_code = 7


class VerificationError(SFTError):
    """Split and one-process training, or a model and its export, differ by more than the tolerance."""

    exit_code = 8


class UnexpectedError(SFTError):
    """An error that nobody foresaw: a mistake of this program, or of a library that it runs on."""
