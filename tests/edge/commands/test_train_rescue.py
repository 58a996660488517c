"""Whatever raises inside a run, of whatever class: the model of the last whole step is kept, and the error says so."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Callable, List, Tuple

import pytest
from support.jobs import JOBS, STEADY, read_json, same_bits, weights_of
from support.tiny import make_tiny_model

from sft_edge.cli import main
from sft_edge.commands.train import attempt, job, train
from sft_edge.model_files import saved
from sft_edge.model_files.saved import load_model
from sft_edge.systems.local import LocalSystem

STEPS = 3
ERRORS = [
    IndexError("index out of range in self"),
    UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"),
    MemoryError(),
    AssertionError(),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", layers=2)


@pytest.fixture
def trained(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Tuple[int, str]]:
    """Trains into tmp_path / "out", temporary directories in tmp_path / "tmp"; gives exit code and the last line."""
    the_job = JOBS["sst2"](tmp_path / "data")

    def run(**options: object) -> Tuple[int, str]:
        values = {"mode": "local", "model": model, "split_layer": None, "output_dir": tmp_path / "out", **STEADY}
        code = main(["train", *the_job.flags(**{**values, "max_steps": STEPS, **options})])
        told = capsys.readouterr().err.splitlines()
        return code, told[-1].split("error: ", 1)[-1] if code else ""

    return run


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def raising(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, error: BaseException, call: int, calls: int = 1
) -> List[int]:
    """That call of the function raises, and the next ones do if `calls` is more; gives the calls that did."""
    real, count, fired = getattr(owner, name), [0], []

    def instead(*arguments: object, **settings: object) -> object:
        count[0] += 1
        if call <= count[0] < call + calls:
            fired.append(count[0])
            raise error
        return real(*arguments, **settings)

    monkeypatch.setattr(owner, name, instead)
    return fired


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_in_a_step(
    trained: Callable[..., Tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception,
) -> None:
    with monkeypatch.context() as patch:
        fired = raising(patch, LocalSystem, "forward_backward", error, call=3)
        code, line = trained()
    assert fired == [3]
    assert code == 1
    assert line.endswith(f"; the model as of step 2 is in {tmp_path / 'out'}")
    assert type(error).__name__ in line or line.startswith("out of memory; smaller")
    load_model(tmp_path / "out")
    assert read_json(tmp_path / "out" / "trainer_state.json")["global_step"] == 2
    if isinstance(error, IndexError):
        kept = weights_of(tmp_path / "out")
        assert trained(max_steps=2, output_dir=tmp_path / "two") == (0, "")
        assert same_bits(kept, weights_of(tmp_path / "two"))


@pytest.mark.parametrize(
    ("owner", "name"),
    [(train, "evaluate"), (attempt, "model_card"), (attempt, "ledger_lines"), (attempt, "all_results")],
)
def test_at_the_end(
    trained: Callable[..., Tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: object, name: str
) -> None:
    """In the last evaluation, and in what is told of the run when its model is saved already."""
    fired = raising(monkeypatch, owner, name, IndexError("index out of range in self"), call=1, calls=9)
    code, line = trained()
    assert fired
    assert code == 1
    assert line.startswith("IndexError: index out of range in self; this is a bug: please report it")
    assert line.endswith(f"is in {tmp_path / 'out'}")
    load_model(tmp_path / "out")


def test_a_library_that_ends_the_process(
    trained: Callable[..., Tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    raising(monkeypatch, LocalSystem, "forward_backward", SystemExit(3), call=3)
    with pytest.raises(SystemExit, match="3"):
        trained()
    load_model(tmp_path / "out")
    assert read_json(tmp_path / "out" / "trainer_state.json")["global_step"] == 2


@pytest.mark.parametrize("error", ERRORS[:2], ids=lambda error: type(error).__name__)
def test_while_the_model_is_saved(
    trained: Callable[..., Tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp: Path,
    tmp_path: Path,
    error: Exception,
) -> None:
    """As by a tokenizer that cannot write there. The model goes to a temporary directory."""
    fired = raising(monkeypatch, saved, "_write_beside", error, call=2)  # the first call tries before training
    code, line = trained()
    assert fired == [2]
    assert code == 1
    (rescue,) = tmp.iterdir()
    assert line.endswith(f"; the model was saved in {rescue} instead")
    load_model(rescue)
    assert read_json(rescue / "all_results.json")["train_steps"] == STEPS
    assert not list((tmp_path / "out").glob("*"))


def test_ctrl_c_that_cannot_save_says_so(
    trained: Callable[..., Tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp: Path
) -> None:
    fired = raising(monkeypatch, LocalSystem, "forward_backward", KeyboardInterrupt(), call=2)
    raising(monkeypatch, saved, "_write_beside", OSError(28, "No space left on device"), call=2, calls=9)
    code, line = trained()
    assert fired == [2]
    assert code == 7
    assert "No space left on device" in line


# What only the end would find out.


@pytest.mark.parametrize("error", [ValueError("not fit for JSON"), OSError(36, "File name too long")])
def test_what_cannot_be_saved_is_not_trained(
    trained: Callable[..., Tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    raising(monkeypatch, saved, "_write_beside", error, call=1)
    monkeypatch.setattr(LocalSystem, "forward_backward", None)
    code, line = trained()
    assert code == 7
    assert str(error) in line
    assert not (tmp_path / "out").exists()


def test_what_judges_the_model_is_not_installed(
    trained: Callable[..., Tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, job, "evaluate_with", ImportError("No module named 'sklearn'"), call=1)
    monkeypatch.setattr(LocalSystem, "forward_backward", None)
    code, line = trained()
    assert (code, line) == (
        2,
        "task sst2 is judged with a package that is not installed here: No module named 'sklearn'",
    )


@pytest.mark.parametrize("name", ["caf\udce9", "runs/\udcff/out"])
def test_an_output_directory_whose_name_is_not_utf_8(trained: Callable[..., Tuple[int, str]], name: str) -> None:
    assert trained(logging_dir=name) == (
        2,
        f"--logging-dir {name!a}: its name is not UTF-8, which what writes there needs; choose another",
    )
    code, line = trained(output_dir=name)
    assert code == 2
    assert line == f"--output-dir {name!a}: its name is not UTF-8, which what writes there needs; choose another"


def test_a_token_that_the_model_does_not_have(
    trained: Callable[..., Tuple[int, str]], model: Path, tmp_path: Path
) -> None:
    """It has as many as there are, but one of them has a higher number."""
    config = json.loads((model / "config.json").read_text())
    tokens = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    film = tokens["film"]
    changed = (model / "tokenizer.json").read_text().replace(f'"film": {film}', f'"film": {config["vocab_size"] + 7}')
    (tmp_path / "gap").mkdir()
    (tmp_path / "gap" / "tokenizer.json").write_text(changed)
    (tmp_path / "gap" / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text())
    code, line = trained(tokenizer_name=tmp_path / "gap")
    assert code in (2, 3)
    assert str(config["vocab_size"] + 7) in line
