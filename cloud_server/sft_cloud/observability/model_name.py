"""What people read as the name of a session's model."""

from __future__ import annotations

import json

from sft.v1 import split_training_pb2 as pb


def model_name(request: pb.OpenSessionRequest) -> str:
    """The name that the edge gives; its kind where it has none, as from a configuration or a directory; the layer that
    is cut of a script's own model. The request has been found sound.
    """
    if request.model_name or request.cut.layer_name:
        return request.model_name or request.cut.layer_name
    return str(json.loads(request.config_json or "{}").get("model_type", ""))
