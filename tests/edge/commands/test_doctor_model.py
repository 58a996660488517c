"""What `sft-edge doctor` finds out by asking as a run would ask."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import pytest
from support.scripted_cloud import ScriptedCloud, serving
from support.tiny import tiny_config

from sft_edge.commands.doctor.model import look_at_model
from sft_edge.link import GrpcTransport
from sft_edge.options import DoctorOptions


@pytest.mark.parametrize(
    ("codec", "verdict", "says"),
    [(None, "ok", "drawn from the seed"), ("int8", "failed", "does not know the codec int8; leave it out")],
)
def test_a_cloud_of_before_codecs(tmp_path: Path, codec: Optional[str], verdict: str, says: str) -> None:
    tiny_config().save_pretrained(tmp_path)
    cloud = ScriptedCloud()
    cloud.codecs = []
    options = DoctorOptions(from_config=tmp_path / "config.json", codec=codec)  # type: ignore[arg-type]  # any of them
    with serving(cloud) as address:
        (found,) = look_at_model(options, GrpcTransport(address), None)
    assert (found.verdict, says in found.found) == (verdict, True)
