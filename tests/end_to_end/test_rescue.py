"""An error that nobody foresaw, in a run whose other half is on a cloud: both halves are saved, of one step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import Job, read_json, same_bits, weights_of

from sft_edge.model_files.saved import load_model
from sft_edge.systems import crossing
from sft_edge.systems import split as split_system

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("module", "place", "steps"),
    [
        (split_system, "scale_gradients", 3),
        (crossing, "encode_activation", 3),
        (crossing, "decode_tensor", 3),
        (split_system, "decode_logits", 5),
    ],
)
def test_anywhere(
    failing: Callable[..., tuple[int, str]],
    job: Job,
    model: Path,
    first_steps: Callable[..., dict[str, torch.Tensor]],
    tmp_path: Path,
    at_call: Callable[..., None],
    module: Any,
    place: str,
    steps: int,
) -> None:
    """Before the commit, before a micro-batch is sent, after it was answered; and in the evaluation at the end."""

    def fail() -> None:
        raise IndexError("of nobody's making")

    at_call(1 if place == "decode_logits" else 4, module, place, fail)
    code, line = failing(max_steps=5)
    assert code == 1
    assert "IndexError: of nobody's making" in line
    assert line.endswith(f"the model as of step {steps} is in {tmp_path / 'out'}")
    load_model(tmp_path / "out")
    assert read_json(tmp_path / "out" / "trainer_state.json")["global_step"] == steps
    assert same_bits(weights_of(tmp_path / "out"), first_steps(steps, job, model=model))
