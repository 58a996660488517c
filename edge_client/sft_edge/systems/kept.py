"""What a frozen edge makes of a batch, computed in the first epoch and looked up in all others."""

from __future__ import annotations

import hashlib
from itertools import accumulate
from pathlib import Path
from typing import Callable, List, Optional

import torch

from sft.batch import Batch
from sft.models import Net1
from sft.wire.codec.elements import Codecs, row_ends
from sft.wire.codec.packing import pack
from sft.wire.codec.rows import name_of
from sft_edge.systems.cache import ActivationCache, keys_of
from sft_edge.systems.crossing import Activation


class KeptActivations:
    """Of one net_1 in one run, in a file.

    The last bits of a sequence's activation depend on the batch it is computed in. So what is kept is of the first
    batch that it was in, and that counts: a run that lost the file, and makes it anew in the same order, has the same
    bits.
    """

    def __init__(
        self,
        path: Path,
        run_id: str,
        width: int,
        codecs: Codecs,
        on_status: Callable[[str], None] = lambda text: None,
        leaves: int = 0,
    ) -> None:
        """`run_id`: another run has other batches; `width` of the activation; `codecs`: as it is written on the wire,
        which is how it is kept; `on_status` and `leaves` as ActivationCache has them.
        """
        self._path = path
        self._run_id = run_id
        self._width = width
        self._codecs = codecs
        self._on_status = on_status
        self._leaves = leaves
        self._cache: Optional[ActivationCache] = None

    on_cloud = False

    def activation(self, net_1: Net1, batch: Batch) -> Activation:
        """Of a batch, without dropout and gradient. `net_1` has its final weights. Raises StorageError."""
        if self._cache is None:
            self._cache = ActivationCache(self._path, self._content(net_1), self._on_status, self._leaves)
        keys = keys_of(batch)
        rows = self._cache.find(keys)
        if rows is None:
            computed = self._computed(net_1, batch)
            self._cache.add(keys, computed)
            rows = self._cache.find(keys) or computed
        shape_only = torch.empty(sum(batch.lengths), self._width, device="meta")
        padded_length = next(iter(batch.inputs.values())).shape[1]
        return Activation(shape_only, batch.lengths, padded_length, b"".join(rows))

    def close(self) -> None:
        """The file stays."""
        if self._cache is not None:
            self._cache.close()

    def _computed(self, net_1: Net1, batch: Batch) -> List[bytes]:
        return computed_rows(net_1, batch, self._codecs)

    def _content(self, net_1: Net1) -> str:
        digest = hashlib.sha256(f"{torch.__version__} {net_1.device.type}".encode())
        for name, x in (*sorted(net_1.whole_parameters().items()), *sorted(self._codecs.tables.items())):
            digest.update(name.encode())
            digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return f"{self._run_id} {name_of(self._codecs.activation)} {self._width} {digest.hexdigest()}"


def computed_rows(net_1: Net1, batch: Batch, codecs: Codecs) -> List[bytes]:
    """What a net_1 that is frozen makes of each sequence of a batch, as the wire has it."""
    net_1.eval()
    with torch.no_grad():
        a_BSR = net_1(batch.inputs, batch.lengths)
    packed = Activation(pack(a_BSR, batch.lengths), batch.lengths, a_BSR.shape[1]).encoded(codecs).packed
    row_end = row_ends(packed, packed.data, sum(batch.lengths), codecs.codes)
    ends = [row_end[tokens - 1] for tokens in accumulate(batch.lengths)]
    return [packed.data[begin:end] for begin, end in zip([0, *ends], ends)]
