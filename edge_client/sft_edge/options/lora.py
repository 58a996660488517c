"""The options of LoRA, and the peft configuration that they mean. This module imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, List, Literal

from sft.cli.options import at_least, flag
from sft.errors import UsageError


@dataclass
class LoraOptions:
    """LoRA: adapters are trained in the place of the weights. Needs the `peft` extra."""

    lora_r: int = 0
    """rank of the adapters; 0 trains the weights themselves"""

    lora_alpha: int = 8
    """adapters are multiplied by it, and divided by their rank"""

    lora_dropout: float = 0.0
    """dropout of what goes into an adapter"""

    lora_target_modules: List[str] = field(default_factory=list)
    """ends of the names of what gets an adapter, or all-linear; without them what peft adapts in the architecture"""

    use_rslora: bool = False
    """divide by the root of the rank instead"""

    lora_half: Literal["both", "edge", "cloud"] = "both"
    """whose weights get adapters; the other half is trained whole"""

    def __post_init__(self) -> None:
        at_least(self, 0, "lora_r")
        at_least(self, 1, "lora_alpha")
        if not (0 <= self.lora_dropout < 1 and math.isfinite(self.lora_dropout)):
            raise UsageError(f"--lora-dropout must be 0 or more and below 1, not {self.lora_dropout}")
        for one in fields(self):
            default = [] if one.default is MISSING else one.default
            if self.lora_r == 0 and getattr(self, one.name) != default:
                raise UsageError(f"{flag(one.name)} needs --lora-r, the rank of the adapters")

    @property
    def on_edge(self) -> bool:
        """Whether the edge's half gets adapters."""
        return self.lora_r > 0 and self.lora_half != "cloud"

    @property
    def on_cloud(self) -> bool:
        """Whether the cloud's half gets adapters."""
        return self.lora_r > 0 and self.lora_half != "edge"

    def config(self) -> Any:
        """The `peft.LoraConfig`. Raises UsageError when peft is not installed."""
        from sft.models.lora import import_peft

        names = self.lora_target_modules
        return import_peft().LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if names == ["all-linear"] else names or None,
            use_rslora=self.use_rslora,
        )
