"""Names of files that packages which know UTF-8 alone, as tokenizers and safetensors do, can open."""

from __future__ import annotations

import os
from pathlib import Path


def is_utf8(path: Path) -> bool:
    """Whether the name, as the file system has it, is UTF-8 text that is the same to every package."""
    try:
        return os.fsencode(path) == str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
