"""Whether a script's model is still what it was loaded from: then the cloud may have its half, as it may of a run's."""

from __future__ import annotations

from typing import Any, List, Tuple

from sft.errors import CheckpointError
from sft.models import Net2
from sft.models.weights import live_tensors, pretrained_tensors
from sft.tensors.hub import find_model
from sft.tensors.pretrained import PretrainedWeights
from sft.tensors.stream import StoredTensor
from sft_edge.model_files import told_name


def by_origin(library: Any, net_2: Net2) -> Tuple[str, List[StoredTensor], List[StoredTensor]]:
    """What the cloud may know the model by, net_2's tensors as they were published, and those of this script alone,
    such as a head that it has drawn.

    `net_2` is a half of `library`, which is not cut yet. Nothing is fetched. Where one number is not as it was
    published, or nobody knows what was, all tensors are those that the model has now, in the place of the published.
    """
    name, live = str(library.config._name_or_path), live_tensors(library, net_2)
    try:
        published = pretrained_tensors(net_2, PretrainedWeights(find_model(name, download=False)))
    except (CheckpointError, OSError):
        return "", live, []  # a name that is nothing here may be a path from elsewhere
    now = {tensor.name: tensor for tensor in live}
    if all(tensor.read().float().equal(now.pop(tensor.name).read().float().cpu()) for tensor in published):
        return told_name(name), published, [now[name] for name in sorted(now)]
    return told_name(name), live, []
