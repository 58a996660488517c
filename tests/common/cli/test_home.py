"""`~` is a home directory in every option that is a path, wherever it stands."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import List, Optional

import pytest

from sft.cli.options import Option, at_home, options_of, parse
from sft.client.credentials import ClientOptions
from sft.errors import UsageError
from sft.optimizer import SplitOptions
from sft_edge import options as edge_options
from sft_edge.options import TRAIN_OPTIONS

MAY_BE_PATHS = ("model", "tokenizer_name", "resume_from_checkpoint")
"""Text that may be something else, too."""


@dataclasses.dataclass
class Car:
    """The car."""

    manual: Optional[Path] = None
    parts: List[Path] = dataclasses.field(default_factory=list)
    fuel: str = "water"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def every_option() -> List[Option]:
    kinds = [getattr(edge_options, name) for name in edge_options.__all__ if name.endswith("Options")]
    kinds = [kind for kind in kinds if dataclasses.is_dataclass(kind) and "RunOptions" not in kind.__name__]
    return [option for kind in (*kinds, *TRAIN_OPTIONS, ClientOptions) for option in options_of(kind)]


def test_what_may_be_a_path_says_so() -> None:
    mine = [option for option in every_option() if option.name in MAY_BE_PATHS]
    assert all(option.names_place or option.type is Path for option in mine)
    assert not any(option.names_place for option in every_option() if option.name not in MAY_BE_PATHS)


def test_flags_lists_and_files(home: Path) -> None:
    (home / "car.yaml").write_text("manual: ~/manual\nparts: [~/wheel, ~]\nfuel: ~/not/a/path\n")
    (car,) = parse([Car], ["--config", "~/car.yaml"], "car")
    assert (car.manual, car.parts, car.fuel) == (home / "manual", [home / "wheel", home], "~/not/a/path")
    (car,) = parse([Car], ["--manual=~/other", "--parts", "~/a", "b/~", "./~c"], "car")
    assert (car.manual, car.parts) == (home / "other", [home / "a", Path("b/~"), Path("./~c")])


def test_a_home_that_nobody_knows() -> None:
    with pytest.raises(UsageError, match=r"^--manual: no home directory is known for '~nobody-such/x'; a folder of"):
        parse([Car], ["--manual", "~nobody-such/x"], "car")


def test_a_script_s_files_are_at_home_too(home: Path) -> None:
    options = SplitOptions(tls_ca="~/ca.pem", token_file="~/token").as_options(ClientOptions)
    assert (options.tls_ca, options.token_file) == (home / "ca.pem", home / "token")
    assert at_home("x~", "where") == "x~"
