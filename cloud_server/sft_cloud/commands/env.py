"""`sft-cloud env`: what a bug report needs to know of this machine."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from sft.cli.environment import as_text, environment
from sft.cli.options import parse


@dataclass(frozen=True)
class EnvOptions:
    """What is told."""

    json: bool = False
    """write it as JSON"""


def env_command(prog: str, argv: list[str]) -> int:
    """Say what a bug report needs to know of this machine; no secrets."""
    (options,) = parse([EnvOptions], argv, prog, env_command.__doc__)
    found = environment()
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if options.json else as_text(found))
    return 0
