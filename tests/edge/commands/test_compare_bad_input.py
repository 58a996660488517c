"""What `sft-edge compare` refuses, each in one line with its exit code, and what hostile runs get."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Callable, List, Optional, Tuple

import pytest
from support.jobs import error_line, read_json
from support.left_by_runs import leave_run

from sft_edge.cli import main
from sft_edge.commands.compare import files
from sft_edge.files import write_json


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return leave_run(tmp_path / "run")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def ask(code: int, *arguments: object) -> str:
        assert main(["compare", *map(str, arguments)]) == code
        told = capsys.readouterr()
        assert told.out == ""
        return error_line(told.err)

    return ask


def test_what_is_no_run(tmp_path: Path, run: Path, refused: Callable[..., str]) -> None:
    assert refused(4, run, tmp_path / "gone") == f"{tmp_path / 'gone'} is not there: name what a run left"
    assert "is not a directory" in refused(4, run, run / "ledger.csv")
    (tmp_path / "empty").mkdir()
    assert "empty is no run: it holds neither all_results.json nor trainer_state.json" in refused(4, tmp_path / "empty")
    assert refused(4, tmp_path).endswith(f"there are runs in it: name {run}")
    assert refused(2) == "--runs must be given"


def test_a_run_twice(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert refused(2, run, run) == f"{run} is named twice"
    (tmp_path / "link").symlink_to(run)
    assert refused(2, run, tmp_path / "link") == f"{tmp_path / 'link'} is named twice"
    many = [leave_run(tmp_path / f"{index}", steps=1, planned=1, scores=(1.0,)) for index in range(2)] * 21
    assert "no more than 40" in refused(2, *many)


def test_a_baseline_that_is_none_of_them(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert refused(2, run, "--baseline", tmp_path) == f"--baseline {tmp_path} is none of the runs that are named"


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"a": 1}}', "[" * 100_000, "\x00", '{"a": "\\ud800"', "nul", b"\xff\xfe"],
    ids=["torn", "list", "more", "deep", "zero", "half", "word", "bytes"],
)
@pytest.mark.parametrize("name", ["all_results.json", "options.json"])
def test_a_file_that_is_not_what_it_should_be(
    run: Path, refused: Callable[..., str], name: str, content: str | bytes
) -> None:
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refused(4, run).startswith(f"{run / name} is not ")


@pytest.mark.parametrize("content", ["", "step,bytes_sent\n1,2\n", "bytes_sent,bytes_received\n1,-2\n1\n"])
def test_a_ledger_that_is_none(run: Path, refused: Callable[..., str], content: str) -> None:
    (run / "ledger.csv").write_text(content)
    if content:
        assert refused(4, run) == f"{run / 'ledger.csv'} is not what sft-edge train writes"
    else:
        assert main(["compare", str(run)]) == 0


def test_files_beyond_all_measure(run: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LEDGER_BYTES", 10)
    assert "ledger.csv has" in refused(4, run)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)
    assert "no more than 10 are read of such a file" in refused(4, run)


def test_files_that_are_there_or_cannot_be(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert refused(2, run, "--html", page) == f"--html {page} is there already; name another, or add --overwrite"
    assert page.read_text() == "mine"
    assert refused(2, run, "--svg", tmp_path) == f"--svg {tmp_path} is a directory; name a file"
    assert f"{page} is not a directory" in refused(2, run, "--svg", page / "c.svg")
    assert "name the same file" in refused(2, run, "--svg", tmp_path / "c", "--html", tmp_path / "c")
    assert main(["compare", str(run), "--html", str(page), "--overwrite"]) == 0
    assert page.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "no permission to write" in refused(2, run, "--html", tmp_path / "locked" / "c.html")


def test_a_disk_that_takes_nothing(
    run: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    told = refused(7, run, "--html", tmp_path / "c.html")
    assert told == f"cannot write --html {tmp_path / 'c.html'}: No space left on device; name another place"
    assert not (tmp_path / "c.html").exists()


EVIL = "</style></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x1b[31m\u202e"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: List[Tuple[str, Optional[str]]] = []

    def handle_starttag(self, tag: str, attributes: List[Tuple[str, Optional[str]]]) -> None:
        self.found += [(tag, None), *((f"@{name}", value) for name, value in attributes)]


def test_what_a_hostile_run_says_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = leave_run(tmp_path / "good"), leave_run(tmp_path / EVIL.replace("/", "|"))
    for name in ("options.json", "sft.json"):
        write_json(bad / name, {**read_json(bad / name), EVIL: EVIL * 1000, "task": EVIL, "mode": [EVIL]})
    for name in ("all_results.json", "trainer_state.json"):
        changed = json.dumps(read_json(bad / name)).replace("eval_accuracy", f"eval_{json.dumps(EVIL)[1:-1]}")
        (bad / name).write_text(changed)
    page, picture = tmp_path / "c.html", tmp_path / "c.svg"
    assert main(["compare", str(bad), str(good), "--html", str(page), "--svg", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    tags = Tags()
    text = page.read_text(encoding="utf-8")
    tags.feed(text)
    names = {name for name, _ in tags.found}
    assert not names & {"script", "img", "@onerror", "@href", "@src", "link", "iframe"}
    assert "&lt;script&gt;" in text
    assert (
        "@content",
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'",
    ) in tags.found
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert len(text) < 200_000
    assert {element.tag.rpartition("}")[2] for element in ElementTree.parse(str(picture)).iter()} <= {
        "svg", "style", "rect", "g", "line", "text", "polyline", "polygon", "path", "title",
    }  # fmt: skip


@pytest.mark.parametrize(
    "value", ["1e400", "-1e308", "1e17", "NaN", '"x"', "true", "null", "{}", "9" * 5000, "-1", "0", "5e-324"]
)
def test_numbers_that_nothing_can_be_done_with(
    tmp_path: Path, run: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = leave_run(tmp_path / "other")
    for name in ("all_results.json", "trainer_state.json"):
        content = read_json(other / name)
        marked = {key: "MARK" if isinstance(one, (int, float)) else one for key, one in content.items()}
        if "log_history" in marked:
            marked["log_history"] = [
                {**entry, "loss": "MARK", "eval_accuracy": "MARK"} for entry in marked["log_history"]
            ]
        (other / name).write_text(json.dumps(marked).replace('"MARK"', value))
    for pair in ([run, other], [other, run], [other]):
        arguments = ["compare", *map(str, pair), "--svg", str(tmp_path / "c.svg"), "--overwrite"]
        assert main([*arguments, "--json"]) == 0
        json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
        assert main(arguments) == 0
        capsys.readouterr()
        ElementTree.parse(str(tmp_path / "c.svg"))
