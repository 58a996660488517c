"""What a server says, checked before anything is made of it: it may be any server, and of any mind.

Tensors are checked where they are decoded, and files while they arrive. Losses, logits, gradients and weights may be
any numbers, not finite ones among them: what becomes of a run with these, the run decides.
"""

from __future__ import annotations

import re
from typing import Collection, Iterable, Union

from sft.errors import ProtocolError, UsageError
from sft.optim.spec import holds_mixed
from sft.printable import MAX_SECONDS, said
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.rows import name_of


def check_codecs(response: pb.OpenSessionResponse, request: pb.OpenSessionRequest) -> None:
    """Raises UsageError where a codec was asked for that the cloud does not know, as a release before codecs."""
    for option, codec in (("codec", request.activation_codec), ("gradient codec", request.gradient_codec)):
        if codec and codec not in response.codecs:
            raise UsageError(
                f"the cloud (release {said(response.package_version[:20])}) does not know the {option} "
                f"{name_of(codec)}; have it updated, or give no codec, and wire dtype float32"
            )


def check_mixed(
    response: pb.OpenSessionResponse, groups: Iterable[Union[pb.ParameterGroup, pb.GroupArguments]]
) -> None:
    """Raises UsageError for settings of the optimizer that the cloud would leave out, as a release before `mixed`."""
    if not response.takes_mixed and holds_mixed(groups):
        raise UsageError(
            f"the cloud (release {said(response.package_version[:20])}) takes no None among the numbers of an "
            "optimizer's setting, such as Adafactor's eps; have it updated, or give numbers alone"
        )


def check_missing(response: pb.OpenSessionResponse, offered: Collection[str]) -> None:
    """Raises ProtocolError for blobs that were not `offered`."""
    for sha256 in response.missing_blobs:
        if sha256 not in offered:
            raise ProtocolError(f"the cloud asks for a blob that was never offered: {said(sha256[:64])}")


def check_opened(response: pb.OpenSessionResponse, steps: Collection[int]) -> None:
    """Raises ProtocolError for a session that does not begin at one of the `steps`."""
    if not re.fullmatch(r"[ -~]{1,256}", response.session_id):
        raise ProtocolError("the cloud opened a session whose name is none")
    if response.next_step not in steps:
        raise ProtocolError(f"the cloud would go on from step {response.next_step}, which was not asked for")


def check_answer(answer: pb.CloudMessage) -> None:
    """Raises ProtocolError for numbers that cannot be true."""
    if not 0 <= answer.cloud_seconds <= MAX_SECONDS:  # nor for NaN
        raise ProtocolError(f"the cloud says that it worked for {answer.cloud_seconds} seconds")
    for norm in (
        answer.result.squared_gradient_norm,
        answer.result.own_squared_norm,
        answer.committed.squared_gradient_norm,
    ):
        if norm < 0:
            raise ProtocolError(f"the cloud sent {norm} for the square of a norm")
    saved = answer.checkpoint_saved
    if answer.HasField("checkpoint_saved") and not (saved.error or re.fullmatch(r"[0-9a-f]{64}", saved.id.sha256)):
        raise ProtocolError("the cloud saved a checkpoint, and did not say which")
