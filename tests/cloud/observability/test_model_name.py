"""What people read as the name of a session's model."""

import json

import pytest

from sft.v1 import split_training_pb2 as pb
from sft_cloud.observability import AuditLog, CallRecord, model_name

CONFIG = json.dumps({"model_type": "llama", "vocab_size": 10})


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (pb.OpenSessionRequest(model_name="bert-base-uncased", config_json=CONFIG), "bert-base-uncased"),
        (pb.OpenSessionRequest(config_json=CONFIG), "llama"),
        (pb.OpenSessionRequest(config_json=CONFIG, resume_from=[pb.CheckpointId(step=3)]), "llama"),
        (pb.OpenSessionRequest(cut=pb.Cut(layer_name="blocks.3.ffn")), "blocks.3.ffn"),
        (pb.OpenSessionRequest(cut=pb.Cut(layer_name="blocks.3.ffn"), config_json="{"), "blocks.3.ffn"),
        (pb.OpenSessionRequest(), ""),
    ],
)
def test_a_session_has_the_name_that_the_edge_gives_or_says_what_it_is(request_, name):
    assert model_name(request_) == name


def test_the_audit_log_names_a_model_without_a_name_once_it_is_opened(tmp_path):
    path = tmp_path / "audit.jsonl"
    record = CallRecord(AuditLog(path), "/sft.v1.SplitTraining/OpenSession", "-")
    record.requested(pb.OpenSessionRequest(config_json=CONFIG))
    record.answered(pb.OpenSessionResponse(session_id="0123456789abcdef"))
    assert json.loads(path.read_text())["model"] == "llama"
