"""Whether what was computed split is what one machine computes, but for rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def assert_close(one: Any, other: Any) -> None:
    """Tensors, or lists of them."""
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def assert_same_state(model: nn.Module, whole: nn.Module) -> None:
    """All weights and buffers, by the same names."""
    state, expected = model.state_dict(), whole.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
