"""What the hub says, in words that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, List

import huggingface_hub
import pytest

from sft.errors import CheckpointError
from sft.tensors.hub import find_model


class GatedRepoError(OSError):
    """As the hub's client calls it."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A hub whose files are in `files`; an error among them is raised."""

    class Hub:
        files: ClassVar[List[str]] = []
        error: Exception = OSError("no such repository")
        asked: ClassVar[List[bool]] = []

    def snapshot(name: str, allow_patterns: List[str], local_files_only: bool = False) -> str:
        Hub.asked.append(local_files_only)
        if local_files_only:
            if not (tmp_path / "cache").is_dir():
                raise OSError("nothing cached")
        elif not Hub.files:
            raise Hub.error
        else:
            (tmp_path / "cache").mkdir(exist_ok=True)
            for file in Hub.files:
                (tmp_path / "cache" / file).touch()
        return str(tmp_path / "cache")

    def names(_: object, name: str) -> List[str]:
        if not Hub.files:
            raise Hub.error
        return Hub.files

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", names)
    return Hub


def test_a_gated_model_says_how_it_is_got(hub: Any) -> None:
    hub.error = GatedRepoError("401 Client Error.\n\nCannot access gated repo")
    with pytest.raises(CheckpointError, match=r"gated: ask for access at https://huggingface.co/a/b, then log in"):
        find_model("a/b")


def test_more_than_the_first_line_is_told(hub: Any) -> None:
    hub.error = OSError("404 Client Error.\n\nRepository not found.\nIf it is private, log in.")
    with pytest.raises(CheckpointError, match=r"404 Client Error. Repository not found. If it is private, log in."):
        find_model("a/b")


def test_weights_of_another_kind_are_not_fetched(hub: Any, tmp_path: Path) -> None:
    hub.files = ["config.json", "pytorch_model.bin"]
    with pytest.raises(CheckpointError, match=r"as pytorch_model.bin, not as safetensors.*save_pretrained"):
        find_model("a/b")
    assert not (tmp_path / "cache").exists()
    assert find_model("a/b", weights=False) == tmp_path / "cache"


def test_a_part_in_the_cache_is_no_model(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "config.json").touch()
    hub.files = ["config.json", "model.safetensors"]
    assert (find_model("a/b") / "model.safetensors").is_file()
    hub.asked.clear()
    find_model("a/b")
    assert hub.asked == [True]
