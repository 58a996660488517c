"""trl's `SFTTrainer`: its loss is made of what each label scores, and a cut model's head is on the cloud.

It replaces the forward of its model by one that, asked with `fused_lm_head=True`, runs the base model and the head
itself, so that no logits are ever held. A cut model answers that call as the patched forward would.

Source: `add_fused_lm_head` of https://github.com/huggingface/trl.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any, Dict, Optional

from torch import Tensor

from sft.batch import IGNORED
from sft.errors import UsageError

_SCORED = ("log_probs", "entropy", "is_top1")


class FusedHead:
    """What trl has made of a model."""

    def __init__(self, forward: Any) -> None:
        """`forward`: of a model that `sft.models.has_fused_head`."""
        self._output: Any = forward.__func__.__globals__["FusedCausalLMOutput"]
        asked = inspect.getclosurevars(forward.__func__).nonlocals
        strange = sorted(set(asked.get("outputs", ())).difference(_SCORED))
        if asked.get("temperature", 1.0) != 1.0 or strange:
            wants = strange[0] if strange else f"a temperature of {asked['temperature']}"
            raise UsageError(f"of trl's trainers SFTTrainer alone takes a cut model: this one wants {wants}")

    def output(self, scores_BS3: Tensor, y_BS: Tensor, items_in_batch: Optional[float]) -> Any:
        """Of `sft.models.losses.token_scores`: all but the last place, which predicts nothing; `y_BS` not shifted.

        `items_in_batch`: what the loss is divided by; None is the number of labels.
        """
        mask = y_BS[:, 1:] != IGNORED
        log_probs, entropy, is_top1 = scores_BS3[:, :-1].unbind(-1)
        known: Dict[str, Any] = {
            "loss": -log_probs.sum() / (mask.sum().clamp(min=1) if items_in_batch is None else items_in_batch),
            "log_probs": log_probs,
            "entropy": entropy.detach(),
            "is_top1": is_top1.detach() > 0,
            "label_mask": mask,
        }
        return self._output(**{field.name: known.get(field.name) for field in fields(self._output)})
