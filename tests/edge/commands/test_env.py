"""`sft-edge env`: what a bug report needs to know of a machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest
import torch
import transformers
from support.jobs import error_line

import sft.cli.environment as environment
from sft.version import __version__
from sft_edge.cli import main

LIBRARIES = ["torch", "transformers", "tokenizers", "safetensors", "numpy", "grpcio", "protobuf", "peft"]
SECRETS = {
    "SFT_TOKEN": "sft_ab12_c0ffee",
    "HF_TOKEN": "hf_c0ffee",
    "https_proxy": "http://alice:c0ffee@proxy.example:8080",
    "CUDA_VISIBLE_DEVICES": "/home/alice/c0ffee",
}


def rows_of(text: str) -> Dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition("  ") for line in text.splitlines())}


def test_everything_is_told_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert list(rows)[:10] == ["package", "python", *LIBRARIES]
    assert list(rows)[10:15] == ["system", "cpus", "memory", "threads", "cuda"]
    assert rows["package"] == __version__
    assert rows["torch"] == torch.__version__
    assert rows["transformers"] == transformers.__version__
    assert rows["python"].startswith("{}.{}.{} ".format(*sys.version_info))
    assert rows["cpus"].startswith(f"{os.cpu_count()}, of which ")
    assert rows["memory"].endswith("GB")
    assert rows["threads"].startswith(f"{torch.get_num_threads()} within")


def test_everything_is_told_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["env", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["libraries"]) == LIBRARIES
    assert told["libraries"]["torch"] == {"version": torch.__version__, "error": None}
    assert told["torch"]["threads"]["within"] == torch.get_num_threads()
    assert len(told["torch"]["devices"]) == torch.cuda.device_count()
    assert told["memory_bytes"] > 2**28
    assert told["variables"]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_no_secret_is_told(
    flags: List[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOMETHING_ELSE", "c0ffee")
    assert main(["env", *flags]) == 0
    told = capsys.readouterr().out
    assert "c0ffee" not in told
    assert "alice" not in told
    assert "SOMETHING_ELSE" not in told
    assert all(name in told for name in SECRETS)


def run_with(directory: Path, home: Path, *flags: str) -> Tuple[str, str]:
    """Of a process that finds the modules in `directory` before all others."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(directory), *sys.path]), "HOME": str(home)}
    command = [sys.executable, "-m", "sft_edge", "env", *flags]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_what_is_broken_is_told_in_its_line(tmp_path: Path) -> None:
    """And says neither whose directory it is in, nor keeps the rest from being told."""
    home = tmp_path / "alice"
    (tmp_path / "torch.py").write_text(f"raise OSError('{home}/lib/libtorch.so: cannot open shared object\\nfile')")
    (tmp_path / "transformers.py").write_text(
        "raise RuntimeError('see /home/bob/notes.txt: or /Users/Carol Smith/notes.txt')"
    )
    (tmp_path / "peft.py").write_text("import a_module_that_nobody_has")
    out, errors = run_with(tmp_path, home)
    assert errors == ""
    rows = rows_of(out)
    lost = "cannot be imported: OSError: …/libtorch.so: cannot open shared object file"
    assert rows["torch"].partition(", but ")[2] == lost
    assert rows["transformers"].endswith("but cannot be imported: RuntimeError: see …/notes.txt: or …/notes.txt")
    assert "but cannot be imported: ModuleNotFoundError: No module named 'a_module_that_nobody_has'" in rows["peft"]
    assert rows["numpy"][0].isdigit()
    assert "threads" not in rows
    assert "cuda" not in rows


@pytest.mark.first_only
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not work: AttributeError: module 'torch' has no attribute 'backends'"),
        ("raise SystemExit('no /srv/alice/gpu')", "cannot be imported: SystemExit: no …/gpu"),
    ],
    ids=["half there", "ends the process"],
)
def test_a_torch_that_is_none(tmp_path: Path, content: Optional[str], said: str) -> None:
    """As an interrupted `pip uninstall` leaves it, and worse."""
    stub = tmp_path / ("torch.py" if content else "torch/__init__.py")
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(content or "")
    out, errors = run_with(tmp_path, tmp_path)
    assert errors == ""
    rows = rows_of(out)
    assert rows["torch"].endswith(said)
    assert rows["numpy"][0].isdigit()
    assert "threads" not in rows


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/scratch/alice/env/lib/x.so", "…/x.so"),
        ("/Users/Carol Smith/x.so", "…/x.so"),
        ("C:\\Users\\dave\\x.dll", "…/x.dll"),
        ("/home/alice/", "…/"),
        ("in '/home/alice/a' and \"/mnt/d/bob/b\"", "in '…/a' and \"…/b\""),
        ("and/or", "and/or"),
        ("CUDA 11.4/8600", "CUDA 11.4/8600"),
    ],
)
def test_of_a_path_its_end_is_told(path: str, told: str) -> None:
    assert environment._anonymous(path) == told


def test_what_is_not_installed_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_LIBRARIES", {"torch": "torch", "nobody-has-this": "nobody_has_this"})
    assert main(["env", "--json"]) == 0
    told: Dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["libraries"]["nobody-has-this"] == {"version": None, "error": "not installed"}
    assert main(["env"]) == 0
    assert rows_of(capsys.readouterr().out)["nobody-has-this"] == "not installed"


def test_a_gpu_and_a_driver_that_complains(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory, major, minor = "Some GPU", 8_000_000_000, 7, 2

    monkeypatch.setattr(torch.version, "cuda", "11.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 8600)
    assert main(["env"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["cuda"] == "11.4, cuDNN 8600"
    assert rows["cuda:0"] == "Some GPU, 8 GB, compute capability 7.2"

    def fails(index: int) -> None:
        raise RuntimeError("CUDA driver error\nof /home/alice/x")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fails)
    assert main(["env"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["cuda"] == "11.4, but RuntimeError: CUDA driver error of …/x"
    assert "cuda:0" not in rows


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--json", "perhaps"], "--json: 'perhaps' is neither true nor false"),
        (["--verbose"], "unrecognized arguments: --verbose; see sft-edge env --help"),
        (["torch"], "unrecognized arguments: torch; see sft-edge env --help"),
        (["--config", "no-such-file.yaml"], "--config no-such-file.yaml: No such file or directory"),
    ],
)
def test_bad_input(flags: List[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", *flags]) == 2
    assert error_line(capsys.readouterr().err) == said
