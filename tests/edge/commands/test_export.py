"""`sft-edge export`: what it says, what it refuses, and that it then leaves nothing."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import pytest
from support.jobs import error_line, flags
from support.saved import save_tiny
from support.tiny import make_tiny_model

from sft.models import Cut
from sft_edge.cli import main
from sft_edge.commands.export import export as export_module
from sft_edge.commands.export.check import Answer, Question

CUT = Cut("sft", 2, 4)

Run = Callable[..., Tuple[int, str, str]]

PLAIN = (
    "plain: not a trained model: it holds no sft.json, as sft-edge train writes it, and no config.json of a model with "
    "a head"
)


@pytest.fixture
def export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; gives exit code, standard output and the line of the error."""

    def run(**options: object) -> Tuple[int, str, str]:
        capsys.readouterr()
        code = main(["export", *flags(**{"model": tmp_path / "model", "to": tmp_path / "to", **options})])
        told = capsys.readouterr()
        return code, told.out, error_line(told.err) if code else ""

    return run


@pytest.fixture(scope="module")
def answered() -> Dict[str, List[Answer]]:
    """By what was asked."""
    return {}


@pytest.fixture(autouse=True)
def a_process_for_each_content(answered: Dict[str, List[Answer]], monkeypatch: pytest.MonkeyPatch) -> None:
    """An export of the same bytes is not opened again: a process that imports transformers takes seconds."""

    def ask(questions: Sequence[Question], ask: Any = export_module.ask_elsewhere) -> List[Answer]:
        asked = hashlib.sha256()
        for question in questions:
            asked.update(repr(question._replace(model=Path())).encode())
            for path in sorted(question.model.iterdir()):
                asked.update(path.name.encode() + path.read_bytes())
        key = asked.hexdigest()
        if key not in answered:
            answered[key] = ask(questions)
        return answered[key]

    monkeypatch.setattr(export_module, "ask_elsewhere", ask)


# The command.


@pytest.mark.slow
def test_the_command(tmp_path: Path, export: Run) -> None:
    save_tiny(tmp_path / "model", cut=CUT)
    code, told, _ = export(to=tmp_path / "deep" / "to")
    assert code == 0
    assert "BertForSequenceClassification, dense, " in told
    assert "largest difference of 32 logits from the trained model's" in told
    assert f"AutoModelForSequenceClassification.from_pretrained('{tmp_path}/deep/to', trust_remote_code=True)" in told
    to = tmp_path / "deep" / "to"
    names = {"README.md", "config.json", "model.safetensors", "modeling_sft.py", "tokenizer.json"}
    assert names <= set(os.listdir(str(to)))
    assert not [name for name in os.listdir(str(to)) if name.startswith(".")]
    assert str(tmp_path) not in "".join(path.read_text() for path in to.iterdir() if path.suffix != ".safetensors")
    assert "trust_remote_code=True" in (to / "README.md").read_text()


@pytest.mark.slow
def test_the_report_as_json(tmp_path: Path, export: Run) -> None:
    save_tiny(tmp_path / "model", cut=CUT)
    (tmp_path / "to").mkdir()
    code, told, _ = export(factored=True, json=True)
    report = json.loads(told)
    assert code == 0
    assert report == {
        "directory": str(tmp_path / "to"),
        "architecture": "BertForSequenceClassification",
        "opened_with": "AutoModelForSequenceClassification",
        "form": "factored",
        "trust_remote_code": True,
        "weight_bytes": (tmp_path / "to" / "model.safetensors").stat().st_size,
        "logits_compared": 32,
        "max_logit_difference": pytest.approx(0, abs=1e-5),
        "tolerance": 1e-5,
    }


# What is refused, and leaves nothing.


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"dense": True, "factored": True}, 2, "only one of --dense and --factored may be given"),
        ({"factored": True}, 2, "--factored: no layer of this model was decomposed; leave it out"),
        ({"to": "full"}, 2, "--to full is not empty; name another"),
        ({"to": "full/file"}, 2, "--to full/file is not a directory"),
        (
            {"to": "full/file/to"},
            7,
            "cannot write full/file/to: Not a directory; free some space or choose another --to",
        ),
        (
            {"model": "plain"},
            4,
            PLAIN,
        ),
        ({"model": None}, 2, "--model must be given"),
    ],
    ids=str,
)
def test_what_makes_no_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Run, options: dict, code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    make_tiny_model(tmp_path / "plain", layers=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert export(**{"to": "to", **options}) == (code, "", says)
    assert not (tmp_path / "to").exists()
    assert os.listdir(str(tmp_path / "full")) == ["file"]


@pytest.mark.slow
@pytest.mark.parametrize(("difference", "there"), [(1e-3, True), (float("nan"), False)])
def test_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Run, difference: float, there: bool
) -> None:
    save_tiny(tmp_path / "model", cut=CUT)
    if there:
        (tmp_path / "to").mkdir()

    def wrong(*arguments: Any, ask: Any = export_module.ask_here) -> Answer:
        answer: Answer = ask(*arguments)
        return answer._replace(logits=[x + difference for x in answer.logits])

    monkeypatch.setattr(export_module, "ask_here", wrong)
    code, told, said = export()
    assert (code, told) == (8, "")
    if there:
        assert said.startswith("nothing was exported: a logit differs from the trained model's by ")
        assert said.endswith("over 0.0001; --factored rounds nothing")
    else:
        assert said.startswith("nothing was exported: logits are not finite, so they cannot be compared; the weights ")
        assert "--factored" not in said
    assert (tmp_path / "to").exists() == there
    assert not there or os.listdir(str(tmp_path / "to")) == []


@pytest.mark.slow
def test_a_base_model_that_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Run) -> None:
    save_tiny(tmp_path / "model", cut=CUT)

    def wrong(*arguments: Any, ask: Any = export_module.ask_elsewhere) -> List[Answer]:
        return [answer._replace(base_difference=float("nan")) for answer in ask(*arguments)]

    monkeypatch.setattr(export_module, "ask_elsewhere", wrong)
    code, told, said = export()
    assert (code, told) == (8, "")
    assert said.startswith("nothing was exported: a hidden state of the base model, as AutoModel opens it, differs ")
    assert not (tmp_path / "to").exists()


def test_a_link_to_nothing(tmp_path: Path, export: Run) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "to").symlink_to(tmp_path / "nowhere")
    assert export() == (2, "", f"--to {tmp_path / 'to'} is not a directory")
    assert (tmp_path / "to").is_symlink()


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Run) -> None:
    save_tiny(tmp_path / "model")
    usage = shutil.disk_usage(str(tmp_path))._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, _, said = export()
    assert code == 7
    assert said.startswith(f"--to {tmp_path / 'to'}: the model needs ")
    assert said.endswith(" bytes, the disk has 1,000 free")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("most_bytes_in_a_file", [100_000, 3000, 300])
def test_a_disk_that_fills_up(tmp_path: Path, export: Run, most_bytes_in_a_file: int) -> None:
    save_tiny(tmp_path / "model")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes_in_a_file, hard))
    try:
        code, _, said = export(to=tmp_path / "deep" / "to")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 7
    assert said.startswith(f"cannot write {tmp_path}/deep/to")
    assert said.endswith("File too large; free some space or choose another --to")
    assert not (tmp_path / "deep").exists()


def test_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    save_tiny(tmp_path / "model")
    monkeypatch.setattr(export_module, "ask_elsewhere", interrupt)
    assert main(["export", *flags(model=tmp_path / "model", to=tmp_path / "to")]) == 130
    assert not (tmp_path / "to").exists()
