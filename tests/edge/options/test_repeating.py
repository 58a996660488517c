"""What a run leaves of its options is a configuration that repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import pytest
from support.jobs import run_options

from sft.cli.options import parse
from sft_edge.files import write_json
from sft_edge.options import TRAIN_OPTIONS, RunOptions, repeatable


@pytest.mark.parametrize(
    "values",
    [
        {"mode": "sft", "learning_rate": 3e-5, "labels": "local", "gradient_codec": "int4"},
        {"mode": "sl", "split_layer": 1, "freeze_edge": True, "activations": "keep-on-edge", "codec": "fitted"},
        {"mode": "frozen", "data_dir": Path("a b"), "max_train_samples": 3, "wire_dtype": "bfloat16"},
        {"mode": "local", "split_layer": None, "lora_r": 4, "lora_target_modules": ["query", "value"]},
    ],
    ids=lambda values: values["mode"],
)
def test_the_file_gives_the_same_options(tmp_path: Path, values: Dict[str, Any]) -> None:
    given = run_options(**values, output_dir=tmp_path / "out", logging_dir=tmp_path / "logs")
    write_json(tmp_path / "options.json", repeatable(given))
    again = RunOptions(*parse(TRAIN_OPTIONS, ["--config", str(tmp_path / "options.json")], "train"))
    assert (again.training.output_dir, again.logging.logging_dir) == (None, None)
    given.training.output_dir = given.logging.logging_dir = None
    for ours, theirs in zip(again[:-1], given[:-1]):
        assert ours == theirs
    assert again.link.labels == given.link.labels


def test_nobody_learns_from_it_where_the_server_is_or_what_opens_it(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "token").chmod(0o600)
    text = str(repeatable(run_options(server="my-host:1234", token_file=tmp_path / "token", output_dir=tmp_path / "o")))
    assert "seed" in text
    assert not [word for word in ("my-host", "token_file", "secret", str(tmp_path)) if word in text]
