"""`sft-cloud` without its memory of answers, for bench/protection.py to compare with: a message that comes twice counts
twice. Takes the arguments of `sft-cloud`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from sft.v1 import split_training_pb2 as pb
from sft_cloud.cli import main
from sft_cloud.service.exactly_once import ExactlyOnce


def forgetful(
    self: ExactlyOnce, message: pb.EdgeMessage, work: Callable[[], pb.CloudMessage], is_left: bool = False
) -> tuple[pb.CloudMessage, bool]:
    """In the place of `apply`: checks and remembers nothing."""
    answer = work()
    answer.number = self.last_number = message.number
    return answer, False


if __name__ == "__main__":
    ExactlyOnce.apply = forgetful  # type: ignore[method-assign]
    sys.exit(main())
