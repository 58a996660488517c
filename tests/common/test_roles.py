"""`SFTOptimizer` finds the side that its role names, and says what is in the way."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from torch import nn

from sft import SFTOptimizer, optimizer
from sft.client.credentials import ClientOptions
from sft.errors import UsageError
from sft.optimizer import SplitOptions


class EntryPoint:
    """Of role cloud; loading it runs `code`."""

    name = "cloud"

    def __init__(self, code: str) -> None:
        self._code = code

    def load(self) -> object:
        exec(self._code, {})
        raise AssertionError("the code was to fail")


def refusal(monkeypatch: pytest.MonkeyPatch, entry_points: List[EntryPoint]) -> str:
    monkeypatch.setattr(optimizer, "_entry_points", lambda: entry_points)
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError) as caught:
        SFTOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), role="cloud", model=model, split_at="", split_rank=1)
    return str(caught.value)


def test_a_script_s_options_are_a_client_s() -> None:
    options = optimizer.SplitOptions(server="host:1", tls_ca="ca.pem", token_file="token", insecure=True)
    assert options.as_options(ClientOptions) == ClientOptions(
        "host:1", tls_ca=Path("ca.pem"), token_file=Path("token"), insecure=True
    )


def test_arguments_and_options_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is said twice, for who reads the call and for who reads the options; and each is handed on."""
    parameters = inspect.signature(SFTOptimizer).parameters
    options = {field.name: field for field in dataclasses.fields(SplitOptions)}
    assert list(parameters) == ["optimizer", "role", "model", *options]
    for name, field in options.items():
        assert (parameters[name].default, parameters[name].annotation) == (field.default, field.type), name
    told: List[SplitOptions] = []
    monkeypatch.setattr(optimizer, "_find_role", lambda name: lambda optimizer, model, options: told.append(options))
    model = nn.Linear(2, 2)
    values: Dict[str, Any] = {name: object() for name in options}
    SFTOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), role="edge", model=model, **values)
    assert told == [SplitOptions(**values)]


ADVICE = ": pip install 'split-fine-tuning[cloud]' (Python 3.10 or newer)"


@pytest.mark.parametrize("code", ["import grpc_nowhere.health", "a b"])
def test_what_an_installation_mends(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    said = refusal(monkeypatch, [EntryPoint(code)])
    assert said.startswith("role 'cloud' cannot be had here (")
    assert said.endswith(ADVICE)
    assert refusal(monkeypatch, []) == f"role 'cloud' is not installed{ADVICE}"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12: cannot open shared"),
        ("import sft.nowhere", "No module named 'sft.nowhere'"),
        ("from sft.errors import Nowhere", "cannot import name 'Nowhere'"),
        ("import mine", "mine needs a GPU"),
    ],
)
def test_what_it_does_not_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, says: str) -> None:
    (tmp_path / "mine.py").write_text("raise ImportError('mine needs a GPU')")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = refusal(monkeypatch, [EntryPoint(code)])
    assert said.startswith(f"role 'cloud' cannot be had here ({says}")
    assert "pip install" not in said
    assert "mine" not in sys.modules
