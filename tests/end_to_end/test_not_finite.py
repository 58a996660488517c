"""Numbers that are none: training stops before they spread, and what is kept is the last model that could be had."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.jobs import Job, error_line, flags, read_json
from support.tiny import make_tiny_model

from sft_edge.cli import main
from sft_edge.model_files.saved import load_model


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("mode", "freeze_edge"), [("local", False), ("sl", False), ("sft", False), ("sl", True)], ids=str
)
def test_a_loss_that_is_not_finite(
    failing: Callable[..., tuple[int, str]], job: Job, model: Path, tmp_path: Path, mode: str, freeze_edge: bool
) -> None:
    """What is left is the model after the last step that could be taken."""
    wild = {"optim": "SGD", "learning_rate": 1e30, "max_grad_norm": 0}
    code, line = failing(mode=mode, freeze_edge=freeze_edge, **wild)
    assert code == 6
    found = re.fullmatch(
        r"the (loss|norm of the gradient) is (nan|inf) at step (\d+); a lower --learning-rate or a longer warm-up may "
        r"help; the model as of step (\d+) is in (.*)",
        line,
    )
    assert found
    steps = int(found[4])
    assert int(found[3]) == steps + 1
    assert found[5] == str(tmp_path / "out")
    state = read_json(tmp_path / "out" / "trainer_state.json")
    assert state["global_step"] == read_json(tmp_path / "out" / "all_results.json")["train_steps"] == steps >= 1
    assert len(state["log_history"]) == steps
    load_model(tmp_path / "out")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode", ["local", "sl", "sft"])
def test_weights_that_are_not_finite(
    failing: Callable[..., tuple[int, str]],
    job: Job,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mode: str,
) -> None:
    """From the start: nothing is learned, and neither evaluation nor prediction make something up."""
    sick = make_tiny_model(tmp_path / "sick", layers=3)
    tensors = load_file(sick / "model.safetensors")
    tensors["encoder.layer.2.output.dense.bias"][0] = math.inf
    save_file(tensors, sick / "model.safetensors", {"format": "pt"})
    code, line = failing(model=sick, mode=mode)
    assert code == 6
    assert line.startswith("the loss is nan at step 1; ")
    assert line.endswith(f"the model as of step 0 is in {tmp_path / 'out'}")
    assert read_json(tmp_path / "out" / "all_results.json")["train_loss"] is None
    assert main(["predict", "--model", str(tmp_path / "out"), "--text", "a film"]) == 6
    assert "NaN or infinite" in error_line(capsys.readouterr().err)
    assert main(["evaluate", *flags(model=tmp_path / "out", data_dir=job.data_dir)]) == 6


def test_the_last_step_spoils_the_model(failing: Callable[..., tuple[int, str]], job: Job, tmp_path: Path) -> None:
    """Found by the evaluation at the end, when training is over: the model is kept for who wants to look at it."""
    code, line = failing(optim="SGD", learning_rate=1e38, max_grad_norm=0, max_steps=1)
    assert code == 6
    assert line.startswith("the model's outputs are NaN or infinite")
    assert line.endswith(f"the model as of step 1 is in {tmp_path / 'out'}")
    load_model(tmp_path / "out")
