"""`bench/plan_check.py`: what it says of settings that are none; it trains nothing here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from sft.errors import UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        import plan_check

        yield plan_check


def test_a_setting_that_is_none(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan_check.py", "--settings", "sft/five/8/int8"])
    assert script.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "plan_check: --settings sft/five/8/int8: give mode/block/rank/codec, such as sft/5/8/int8"


def test_a_setting_that_the_plan_has_not(script: Any) -> None:
    plans = {script.Setting("frozen", 2, 0, "int8"): 1.0, script.Setting("local"): 2.0}
    script.check_planned([script.Setting.named("frozen/2/0/int8"), script.Setting.named("local")], plans)
    with pytest.raises(
        UsageError, match="--settings frozen/7/0/int8: the plan has no such way; it has frozen/2/0/int8"
    ):
        script.check_planned([script.Setting.named("frozen/7/0/int8")], plans)
