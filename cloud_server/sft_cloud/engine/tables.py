"""The tables of a codec that an edge has fitted: a blob of its own, which a session reads when it is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from sft.errors import ProtocolError
from sft.wire.codec.elements import Codecs
from sft.wire.codec.fitted import most_bytes
from sft_cloud.engine.request import SessionSpec
from sft_cloud.storage import read_blob

_COPIES = 6
"""Of the file: as it is, and in float32, which is four times as large, and what is looked at on the way."""

_BESIDE_BYTES = 10 << 20
"""For what distributions are looked up by, whatever the width, while it is made."""


def missing_tables(spec: SessionSpec, find_blob: Callable[[str], Path | None]) -> list[str]:
    """The hash of the tables that the session needs and that are not here."""
    sha256 = spec.codec_tables_sha256
    return [sha256] if sha256 and find_blob(sha256) is None else []


def tables_bytes(spec: SessionSpec, width: int, find_blob: Callable[[str], Path | None]) -> int:
    """What the tables take, for rows of such a width. Raises ProtocolError where they cannot be any."""
    path = _path(spec, find_blob)
    if path is None:
        return 0
    size = path.stat().st_size
    if size > most_bytes(width):
        raise ProtocolError(f"a codec's tables for rows of {width} elements take at most {most_bytes(width)} bytes")
    return _COPIES * size + _BESIDE_BYTES


def with_tables(spec: SessionSpec, width: int, find_blob: Callable[[str], Path | None], device: torch.device) -> Codecs:
    """The codecs of the session, the tables read. Raises ProtocolError for what are none, or of another width."""
    path = _path(spec, find_blob)
    if path is None:
        return spec.codecs
    codecs = spec.codecs.with_tables(read_blob(path), device)
    codecs.codes[codecs.activation].row_bytes(width)  # refuses another width
    return codecs


def _path(spec: SessionSpec, find_blob: Callable[[str], Path | None]) -> Path | None:
    if not spec.codec_tables_sha256:
        return None
    path = find_blob(spec.codec_tables_sha256)
    if path is None:
        raise ProtocolError("the tables of the codec have gone; ask again")
    return path
