"""The options of `sft-edge export`. This module imports nothing heavy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sft.errors import UsageError


@dataclass
class ExportOptions:
    """The export."""

    model: Path
    """directory that `sft-edge train` wrote"""

    to: Path
    """directory that the exported model becomes; a new one, or an empty one"""

    dense: bool = False
    """one matrix where the layer was decomposed, the product of the three; what is done without --factored, too"""

    factored: bool = False
    """keep the three layers of the decomposition, which are smaller than one matrix"""

    json: bool = False
    """write the report as JSON"""

    def __post_init__(self) -> None:
        if self.dense and self.factored:
            raise UsageError("only one of --dense and --factored may be given")
        if os.path.lexists(str(self.to)) and not self.to.is_dir():  # a link to nothing is no directory either
            raise UsageError(f"--to {self.to} is not a directory")
        if self.to.is_dir() and any(self.to.iterdir()):
            raise UsageError(f"--to {self.to} is not empty; name another")
