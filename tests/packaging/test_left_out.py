"""`bench/left_out.py`: each task on record against what the others say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft.plan.expected import Recorded

ROOT = Path(__file__).parents[2]
WAY = ("frozen", 0, "int8")


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        import left_out

        yield left_out


def of(task: str, *points: float, depth: float = 0.5) -> list[Recorded]:
    return [Recorded(task, depth, one) for one in points]


def test_a_task_is_held_against_the_others_alone(script: Any) -> None:
    """Of a and b the mean is -1 and the interval 6.314 * (2 * 1.5)^0.5 wide to either side: c is nowhere near."""
    held = list(script.left_out({WAY: [*of("a", 0.0), *of("b", -2.0), *of("c", -5.0, -30.0)]}))
    (c,) = [one for one in held if one.task == "c"]
    assert c.expected.points == pytest.approx(-1.0)
    assert c.expected.spread == pytest.approx(6.314 * 3.0**0.5)
    assert c.within == 1
    assert script.table_of(held).rows[-1] == ["c", "frozen int8", "0.50", "-5.0, -30.0", "-1.0 +/- 10.9", "1 of 2"]
    assert script.summary(held).startswith(
        "3 of 4 runs, 75%, are within the interval, which 90% are to be; 0 of 3 ways"
    )


def test_without_two_other_tasks_there_is_no_interval(script: Any) -> None:
    held = list(script.left_out({WAY: [*of("a", 0.0), *of("b", -2.0)], ("sft", 8, "int8"): of("a", -1.0, depth=0.8)}))
    assert [one.within for one in held] == [None, None, None]
    assert [row[4] for row in script.table_of(held).rows] == ["-2.0 +/- ?", "-", "+0.0 +/- ?"]
    assert script.summary(held).startswith("nothing can be said: 3 of 3 ways have no interval")


def test_that_of_the_package_and_another(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([]) == 0
    assert "tasks are on record" in capsys.readouterr().out
    (tmp_path / "record.json").write_text(json.dumps({"runs": 3}))
    assert script.main(["--record", str(tmp_path / "record.json")]) == 4
    assert capsys.readouterr().err.startswith("left_out: ")
