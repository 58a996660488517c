"""`resolve_lora`, where scripts import it from; the code is in `sft.models.lora`."""

from sft.models.lora import resolve_lora

__all__ = ["resolve_lora"]
