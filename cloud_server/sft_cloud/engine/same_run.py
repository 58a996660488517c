"""What a session that goes on must have in common with the one that was saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import DecodeError

from sft.errors import CheckpointError
from sft.models.checked_config import other_setting
from sft.v1 import split_training_pb2 as pb
from sft_cloud.errors import PreconditionError

SESSION = "session.pb"
"""The file with the request that opened the session."""

_NOT_COMPARED = (
    # Of the attempt, not of the run:
    "request_id",
    "resume_from",
    "run_id",
    "only_check",
    # Never on a disk, nor does anything that is trained depend on it:
    "keep_key",
    # What a checkpoint takes the place of. Two machines do not decompose alike, and need not:
    "weights_sha256",
    "factors_sha256",
    "model_name",
    "package_version",
)


def check_same_run(files: Mapping[str, Path], request: pb.OpenSessionRequest) -> None:
    """Raises PreconditionError where a request asks for another session than the one that was saved."""
    try:
        saved = pb.OpenSessionRequest.FromString(files[SESSION].read_bytes())
    except (KeyError, DecodeError) as error:
        raise CheckpointError("the cloud's half of the checkpoint does not say how its session was opened") from error
    for field in request.DESCRIPTOR.fields:
        if field.name in _NOT_COMPARED:
            continue
        if field.name == "config_json":
            differing = other_setting(*(json.loads(each.config_json) for each in (saved, request)))
            what = f"config_json (its '{differing[:80]}')" if differing else ""
        else:
            what = field.name if getattr(saved, field.name) != getattr(request, field.name) else ""
        if what:
            raise PreconditionError(
                f"the run whose checkpoint is to be resumed was opened with another {what}; the two halves do not "
                "belong together"
            )
