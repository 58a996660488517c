"""trl's `SFTTrainer`: its loss is made of what each label scores, and a cut model's head is on the cloud.

It replaces the forward of its model by one that, asked with `fused_lm_head=True`, runs the base model and the head
itself, so that no logits are ever held. A cut model answers that call as the patched forward would.

Source: `add_fused_lm_head` of https://github.com/huggingface/trl.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Dict

from torch import Tensor

from sft.batch import IGNORED


class FusedHead:
    """What trl has made of a model."""

    def __init__(self, forward: Any) -> None:
        """`forward`: of a model that `sft.models.has_fused_head`."""
        self._output: Any = forward.__func__.__globals__["FusedCausalLMOutput"]

    def output(self, scores_BS3: Tensor, y_BS: Tensor) -> Any:
        """Of `sft.models.losses.token_scores`: all but the last place, which predicts nothing; `y_BS` not shifted."""
        mask = y_BS[:, 1:] != IGNORED
        log_probs, entropy, is_top1 = scores_BS3[:, :-1].unbind(-1)
        known: Dict[str, Any] = {
            "loss": -log_probs.sum() / mask.sum().clamp(min=1),
            "log_probs": log_probs,
            "entropy": entropy.detach(),
            "is_top1": is_top1.detach() > 0,
            "label_mask": mask,
        }
        return self._output(**{field.name: known.get(field.name) for field in fields(self._output)})
