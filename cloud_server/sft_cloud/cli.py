"""The command line `sft-cloud`."""

from __future__ import annotations

from collections.abc import Sequence

from sft.cli.run import run
from sft_cloud.commands.certs import certs_command
from sft_cloud.commands.env import env_command
from sft_cloud.commands.serve import serve_command
from sft_cloud.commands.status import status_command
from sft_cloud.commands.token import token_command

COMMANDS = {
    "serve": serve_command,
    "status": status_command,
    "token": token_command,
    "certs": certs_command,
    "env": env_command,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code of the process."""
    return run("sft-cloud", COMMANDS, argv)
