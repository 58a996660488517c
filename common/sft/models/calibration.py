"""What the cut that keeps a low-rank residual is fitted to: the output of block l, before its norm, on real tokens.

Shape suffixes: B batch, S sequence, T tokens without padding, D model width.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from sft.batch import Batch
from sft.errors import UsageError
from sft.models.cut import blocks_of, replace_module
from sft.models.nets import Net1
from sft.models.split_layer import Probe


class Moments(NamedTuple):
    """First and second moments, float64 on the CPU."""

    mean_D: Tensor
    covariance_DD: Tensor


def output_moments(net: Net1, split_layer: int, batches: Sequence[Batch]) -> Moments:
    """Moments of y = x W + b + residual of block `split_layer`, over the tokens of the batches.

    `net` holds that block undecomposed and is left as it was. It runs without dropout, in float32. Raises UsageError
    without batches.
    """
    count, mean_D, covariance_DD = 0, torch.zeros(()), torch.zeros(())
    with _probed(net, split_layer), torch.no_grad(), torch.autocast(net.device.type, enabled=False):
        for batch in batches:
            y_BSD = net(batch.inputs, batch.lengths)
            rows = [row_SD[:length] for row_SD, length in zip(y_BSD, batch.lengths)]
            y_TD = torch.cat(rows).to("cpu", torch.float64)
            # Merged batch by batch (Chan et al., 1979): a residual stream's mean can be far larger than its spread.
            total = count + len(y_TD)
            shift_D = y_TD.mean(0) - mean_D
            centred_TD = y_TD - y_TD.mean(0)
            between_DD = torch.outer(shift_D, shift_D) * (count * len(y_TD) / total)
            covariance_DD = covariance_DD + centred_TD.T @ centred_TD + between_DD
            mean_D = mean_D + shift_D * (len(y_TD) / total)
            count = total
    if count == 0:
        raise UsageError("a low-rank residual is fitted to data: give batches to calibrate with")
    return Moments(mean_D, covariance_DD / count)


@contextmanager
def _probed(net: Net1, split_layer: int) -> Iterator[None]:
    block = blocks_of(net.model, net.family)[split_layer - 1]
    w = block.get_submodule(net.family.ffn_out)
    trained = [module for module in net.modules() if module.training]
    net.eval()
    replace_module(block, net.family.ffn_out, Probe(w))
    try:
        yield
    finally:
        replace_module(block, net.family.ffn_out, w)
        _train(trained)


def _train(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        module.training = True
