"""`sft-edge env`: what a bug report needs to know of this machine."""

from __future__ import annotations

import sys

from sft.cli.environment import as_text, environment
from sft_edge.files import json_text
from sft_edge.options import EnvOptions


def env(options: EnvOptions) -> None:
    """Prints it. A library that is missing or broken is said in its line."""
    found = environment()
    sys.stdout.write(json_text(found) if options.json else as_text(found))
