"""A model as trl's SFTTrainer leaves it, without trl: a forward of the same shape, in a module of such a name."""

from __future__ import annotations

import sys
import types
from typing import Any

SHAPE = """
import functools, types
from dataclasses import dataclass
from transformers.utils import ModelOutput

@dataclass
class FusedCausalLMOutput(ModelOutput):
    loss: object = None
    log_probs: object = None
    entropy: object = None
    log_sum_sq_probs: object = None
    is_top1: object = None
    label_mask: object = None

def add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy", "is_top1")):
    original = model.forward

    @functools.wraps(type(model).forward)
    def fused(self, *args, fused_lm_head=False, **kwargs):
        assert not fused_lm_head, f"it would run the base model, and the head itself: {outputs} at {temperature}"
        return original(*args, **kwargs)

    model.forward = types.MethodType(fused, model)
"""


def with_fused_head(model: Any, **asked: Any) -> Any:
    """The same object; `asked` as of trl's `add_fused_lm_head`."""
    module = types.ModuleType("trl.trainer.shape")
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # where a dataclass looks for its own
    try:
        exec(SHAPE, module.__dict__)
    finally:
        del sys.modules[module.__name__]
    assert before is None
    module.add_fused_lm_head(model, **asked)
    return model
