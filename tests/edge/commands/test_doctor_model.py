"""What `sft-edge doctor` finds out by asking as a run would ask."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import pytest
from support.scripted_cloud import ScriptedCloud, serving
from support.tiny import tiny_config

from sft.v1 import split_training_pb2 as pb
from sft_edge.commands.doctor.model import look_at_model, step_bytes
from sft_edge.link import GrpcTransport
from sft_edge.options import DoctorOptions
from sft_edge.systems import mean_row_bytes


@pytest.mark.parametrize(
    ("wire_dtype", "verdict", "says"),
    [("float32", "ok", "drawn from the seed"), (None, "failed", "does not know the codec int8; have it updated")],
)
def test_a_cloud_of_before_codecs(tmp_path: Path, wire_dtype: Optional[str], verdict: str, says: str) -> None:
    tiny_config().save_pretrained(tmp_path)
    cloud = ScriptedCloud()
    cloud.codecs = []
    options = DoctorOptions(from_config=tmp_path / "config.json", wire_dtype=wire_dtype)  # type: ignore[arg-type]  # any of them
    with serving(cloud) as address:
        (found,) = look_at_model(options, GrpcTransport(address), None)
    assert (found.verdict, says in found.found) == (verdict, True)


@pytest.mark.parametrize("knows", [True, False])
def test_a_codec_whose_tables_only_a_run_has(tmp_path: Path, knows: bool) -> None:
    tiny_config().save_pretrained(tmp_path)
    cloud = ScriptedCloud()
    if not knows:
        cloud.codecs.remove(pb.DATA_TYPE_FITTED)
    options = DoctorOptions(from_config=tmp_path / "config.json", mode="sl", codec="fitted")
    with serving(cloud) as address:
        (found,) = look_at_model(options, GrpcTransport(address), None)
    assert found.verdict == ("ok" if knows else "failed")
    assert ("does not know the codec fitted" in found.found) is not knows
    (request,) = cloud.requests
    assert not request.activation_codec, "which would need tables"
    B, S = options.per_device_train_batch_size, options.max_seq_length
    assert step_bytes(options) == (int(B * S * mean_row_bytes(32)), 0), "what it is fitted to is not trained"
    for codec, size in ((None, 32 + 1), ("fitted", mean_row_bytes(32)), ("float16", 2 * 32)):
        options = DoctorOptions(from_config=tmp_path / "config.json", mode="frozen", codec=codec)
        assert step_bytes(options) == (int(B * S * size), 0)
    options = DoctorOptions(from_config=tmp_path / "config.json", mode="sl")
    assert step_bytes(options) == (B * S * 32 * 4, B * S * 32 * 4)
