"""Devices by name."""

import pytest
import torch

from sft.cli.devices import check_device, find_device
from sft.errors import UsageError


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 2)
    found = {name: str(find_device(name)) for name in ("cpu", "auto", "cuda", "cuda:1")}
    assert found == {"cpu": "cpu", "auto": "cuda:0", "cuda": "cuda:0", "cuda:1": "cuda:1"}
    pretend(monkeypatch, 0)
    assert find_device("auto") == torch.device("cpu")


def test_the_device_that_this_machine_has() -> None:
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:x", "cpu:0:1", "", "cuda:-1", "CPU", "cuda:\u0661", "cuda:1\n"])
def test_devices_that_have_no_such_name(name: str) -> None:
    for look in (check_device, find_device):
        with pytest.raises(UsageError, match=r"^--device must be auto, cpu, cuda or cuda:N, not "):
            look(name)


@pytest.mark.parametrize("gpus", [0, 2])
def test_devices_that_are_not_here(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    pretend(monkeypatch, gpus)
    check_device("cuda:2")
    match = f"^--device cuda:2: this machine has {gpus} CUDA devices; try --device auto$"
    with pytest.raises(UsageError, match=match):
        find_device("cuda:2")
