"""Exports that are opened in the process of the tests."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import pytest
import transformers


@contextmanager
def code_copied_to(directory: Path) -> Iterator[None]:
    """Code that travels with a model leaves nothing in the user's cache, nor in `sys.path`."""
    path = list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        for module in (transformers.dynamic_module_utils, transformers.utils, transformers.utils.hub):
            if hasattr(module, "HF_MODULES_CACHE"):
                patch.setattr(module, "HF_MODULES_CACHE", str(directory))
        yield
    sys.path[:] = path
