"""What a code takes of the edge, apart from the steps that it is in: a hundredth of one, which no two steps show."""

from __future__ import annotations

import time
from typing import List

import torch

from sft.batch import Batch
from sft.wire.codec.elements import decode_tensor, encode_tensor
from sft.wire.codec.packing import pack
from sft_edge.systems import SplitSystem, System

_REPEATS = 5


def coding_seconds(system: System, batch: Batch) -> float:
    """Of writing the activation of a batch, and of reading its gradient where one comes; the median of a few. 0 where
    nothing crosses."""
    if not isinstance(system, SplitSystem):
        return 0.0
    net_1, codecs = system.net_1, system.codecs
    net_1.eval()
    with torch.no_grad():
        a_TR = pack(net_1(batch.inputs, batch.lengths), batch.lengths)
    trained = any(parameter.requires_grad for parameter in net_1.parameters())
    gradient = encode_tensor(a_TR, codecs.gradient, rounding=0) if trained else None
    taken: List[float] = []
    while len(taken) <= _REPEATS:
        began = time.perf_counter()
        encode_tensor(a_TR, codecs.activation, codes=codecs.codes)
        if gradient is not None:
            decode_tensor(gradient, a_TR.device)
        taken.append(time.perf_counter() - began)
    return sorted(taken[1:])[_REPEATS // 2]  # in the first one memory is made ready
