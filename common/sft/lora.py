"""The name under which docs/lora.md has always told scripts to import it; the code is `sft.models.lora`."""

from sft.models.lora import resolve_lora

__all__ = ["resolve_lora"]
