"""What a frozen edge makes of a sequence, kept on the cloud: its rows cross once, from then on its number does."""

from __future__ import annotations

from typing import Callable, Dict, List, Mapping, Optional

import torch
from torch import Tensor

from sft.batch import Batch
from sft.errors import CheckpointError
from sft.models import Net1
from sft.wire.codec.elements import Codecs
from sft.wire.protocol import MAX_KEPT_SEQUENCES
from sft_edge.systems.cache import KEY_BYTES, keys_of
from sft_edge.systems.crossing import Activation
from sft_edge.systems.kept import computed_rows

_KEY, _SEQUENCES, _IS_FULL = "key", "sequences", "is_full"
"""Of what a checkpoint holds: the key that the cloud keeps rows with; a hash of each sequence, in the order of numbers;
whether the cloud keeps no more."""

_EVALUATION = b"evaluation"


class KeptOnCloud:
    """Of one net_1 in one session.

    What the cloud does not hold of a batch is computed together, and padded as the batch is: the last bits depend on
    that. So what counts is the batch that a sequence was first in.
    """

    on_cloud = True

    def __init__(
        self,
        key: bytes,
        kept: Optional[int],
        width: int,
        codecs: Codecs,
        keeps_only: Callable[[], Optional[int]],
        on_status: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`key`: that the session was opened with; `kept`: how many sequences it held then, which `load_state` names,
        None for all that it names; `width` of the activation; `codecs`: as it is written on the wire; `keeps_only`: see
        `Link`; `on_status` is told when the cloud keeps no more.
        """
        self._key = key
        self._kept = kept
        self._width = width
        self._codecs = codecs
        self._keeps_only = keeps_only
        self._on_status = on_status
        self._numbers: Dict[bytes, int] = {}  # in the order of the numbers, which is from 1 on
        self._is_full = False
        self._lacks = False

    @property
    def is_whole(self) -> bool:
        """Whether the cloud holds everything that was sent in the run."""
        return not (self._is_full or self._lacks)

    def activation(self, net_1: Net1, batch: Batch, is_evaluation: bool = False) -> Activation:
        """Of a batch, without dropout and gradient, with the rows that the cloud lacks alone.

        Sequences of evaluation are others, whatever their tokens: how a run is evaluated is nothing to its training. Of
        more sequences than the cloud looks up at once, none is kept.
        """
        self._hear()
        keys = keys_of(batch, _EVALUATION if is_evaluation else b"")
        takes = len(keys) <= MAX_KEPT_SEQUENCES
        kept = [self._numbers.get(key, 0) if takes else 0 for key in keys]
        new = {key: index for index, key in reversed(list(enumerate(keys))) if not kept[index]}  # where each is first
        rows = self._computed(net_1, batch, sorted(new.values()))
        keep = [0] * len(keys)
        if takes and not self._is_full:
            for index in rows:
                keep[index] = self._numbers[keys[index]] = len(self._numbers) + 1
        padded_length = next(iter(batch.inputs.values())).shape[1]
        return Activation(
            torch.empty(sum(batch.lengths), self._width, device="meta"),
            batch.lengths,
            padded_length,
            b"".join(rows[new[key]] for key, number in zip(keys, kept) if not number),
            keep if any(keep) else (),
            kept if any(kept) else (),
        )

    def saved_state(self) -> Dict[str, Tensor]:
        """For a checkpoint. Not for everybody: it has the key."""
        self._hear()
        sequences = _tensor(b"".join(self._numbers)).reshape(-1, KEY_BYTES)
        return {_KEY: _tensor(self._key), _SEQUENCES: sequences, _IS_FULL: torch.tensor([self._is_full])}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on where `saved_state` was given. Raises CheckpointError where the cloud holds other sequences."""
        known = len(state[_SEQUENCES])
        if self._kept is None:
            self._kept = known
        if self._kept > known:
            raise CheckpointError(f"the cloud holds {self._kept} sequences of this run, where {known} were sent")
        self._lacks = self._kept < known
        keys = state[_SEQUENCES].numpy().tobytes()
        places = range(0, KEY_BYTES * self._kept, KEY_BYTES)
        self._numbers = {keys[at : at + KEY_BYTES]: number for number, at in enumerate(places, 1)}
        self._is_full = bool(state[_IS_FULL].item())

    def __len__(self) -> int:
        """Sequences that the cloud holds, or will."""
        return len(self._numbers)

    def forget_after(self, number: int) -> None:
        """What was to be kept since there were so many never went to the cloud."""
        self._numbers = {key: own for key, own in self._numbers.items() if own <= number}

    def close(self) -> None:
        """Nothing is left here."""

    def _hear(self) -> None:
        """What the cloud has said of what it keeps."""
        limit = self._keeps_only()
        if limit is None or (self._is_full and limit >= len(self._numbers)):
            return
        self._is_full = True
        self._numbers = {key: number for key, number in self._numbers.items() if number <= limit}
        self._on_status(
            f"the cloud has no room for more activations than those of {limit} sequences: others are sent again in "
            "every epoch"
        )

    def _computed(self, net_1: Net1, batch: Batch, indices: List[int]) -> Dict[int, bytes]:
        """The rows of these sequences of a batch, as the wire has them."""
        if not indices:
            return {}
        inputs = {name: ids_BS[indices] for name, ids_BS in batch.inputs.items()}
        some = Batch(inputs, [batch.lengths[index] for index in indices], {})
        return dict(zip(indices, computed_rows(net_1, some, self._codecs)))


def key_of(state: Mapping[str, Tensor]) -> bytes:
    """That rows were kept with, from a checkpoint."""
    return state[_KEY].numpy().tobytes()


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
