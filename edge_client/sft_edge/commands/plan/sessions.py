"""A few steps of a run, taken for their times: by the real halves, with weights that are drawn, on made-up batches."""

from __future__ import annotations

import secrets
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

import torch

from sft.batch import Batch
from sft.cli.devices import find_device
from sft.optim.gradients import clip_scale
from sft_edge.commands.plan.coding import coding_seconds
from sft_edge.commands.plan.memory import begin_peak
from sft_edge.commands.plan.rows import Batches
from sft_edge.link import Meter
from sft_edge.model_files import Source
from sft_edge.options import CutOptions, RunOptions
from sft_edge.systems import FIT_TOKENS, System, open_system
from sft_edge.training import peak_memory_bytes

_FEWEST, _MOST, _ENOUGH_SECONDS = 3, 8, 1.5
"""Steps that are timed of one length, and for how long; the first is not, as memory is made ready in it."""

_KEY_BYTES = 32


class Sample(NamedTuple):
    """What one step took, in seconds and bytes; of several the medians."""

    edge: float
    """Of the edge; where it need not wait for the cloud, with what it does meanwhile."""
    processor: float
    cloud: float
    link: float
    """All else until the answers were here."""
    sent: float
    received: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.edge + self.cloud + self.link


class Taken(NamedTuple):
    """What a session has shown, by padded length."""

    first: Dict[int, Sample]
    later: Dict[int, Sample]
    """From the second epoch on, where that is something else."""
    memory: float
    """Bytes of this process at its largest, on the longest batches."""
    is_ahead: bool
    """Whether steps need not wait for those before."""
    sends_once: bool
    """Whether the cloud keeps what the first epoch sends."""
    coding: float
    """Seconds that the edge writes and reads of each step on the longest batches, in the first epoch."""
    tables_bytes: float
    """Of a codec that was fitted."""


@dataclass(frozen=True)
class Trial:
    """What is tried: everything but the cut."""

    source: Source
    head: str
    options: RunOptions
    address: str
    """Of the cloud."""
    batches: Batches
    on_status: Callable[[str], None]
    meter: Optional[Meter] = None
    """By which all that crosses is held to a rate."""

    def take(self, cut: CutOptions, lengths: Sequence[int]) -> Taken:
        """Opens a session, takes steps on batches of these padded lengths, and closes it. Raises any SFTError."""
        given = self.options
        link = given.link if cut.mode == "local" else replace(given.link, server=self.address)
        # Steps of a rate of 0 take as long, and weights that are drawn stay what they are, whatever rate is given.
        optimizer = replace(given.optimizer, learning_rate=0.0, factor_learning_rate=None)
        options = given._replace(cut=cut, link=link, optimizer=optimizer)
        # No weights leave the device, nor what the cloud may have of them; the name does: access may hang on it.
        source = replace(self.source, checkpoint=None, cut=None)
        keeps = cut.activations == "keep-on-cloud"
        begin_peak()
        with tempfile.TemporaryDirectory(prefix="sft-edge-plan-") as directory, open_system(
            source,
            self.head,
            options,
            self._calibration(cut),
            self.on_status,
            keep_in=Path(directory) / "activations" if cut.activations == "keep-on-edge" else None,
            keep_key=secrets.token_bytes(_KEY_BYTES) if keeps else b"",
            meter=self.meter,
        ) as system:
            return self._take(system, cut, lengths)

    def _take(self, system: System, cut: CutOptions, lengths: Sequence[int]) -> Taken:
        steps = _Steps(system, self.options)
        first: Dict[int, Sample] = {}
        later: Dict[int, Sample] = {}
        for length in sorted(lengths, reverse=True):  # so that memory is there for all from the first on
            seen: List[List[Batch]] = []
            samples: List[Sample] = []
            while len(samples) <= _FEWEST or (
                len(samples) <= _MOST and sum(sample.seconds for sample in samples) < _ENOUGH_SECONDS
            ):
                group = range(len(samples) * self.batches.in_step, (len(samples) + 1) * self.batches.in_step)
                seen.append([self.batches.made_up(length, number) for number in group])
                samples.append(steps.take(seen[-1]))
            first[length] = _median(samples[1:])
            later[length] = first[length]
            if cut.freeze_edge and cut.activations != "resend":
                later[length] = _median([steps.take(batches) for batches in seen][1:])
        device = find_device(self.options.training.device)
        peak = peak_memory_bytes(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
        coding = coding_seconds(system, self.batches.made_up(max(lengths), 0)) * self.batches.in_step
        tables = sum(x.numel() * x.element_size() for x in system.codec_tables.values())
        return Taken(first, later, peak, system.sends_ahead, system.sends_rows_once, coding, tables)

    def _calibration(self, cut: CutOptions) -> List[Batch]:
        if cut.codec != "fitted" and cut.residual != "low-rank":
            return []
        length = self.batches.measured[-1]
        count = -(-FIT_TOKENS // self.batches.tokens_of(length)) if cut.codec == "fitted" else 1
        return [self.batches.made_up(length, -2 - number) for number in range(count)]


class _Steps:
    """One after the other, each timed."""

    def __init__(self, system: System, options: RunOptions) -> None:
        self._system = system
        self._max_grad_norm = options.optimizer.max_grad_norm
        self._device = find_device(options.training.device)
        self._step = 0

    def take(self, batches: Sequence[Batch]) -> Sample:
        busy, began = time.process_time(), time.perf_counter()
        meanwhile = self._send(batches) if self._system.sends_ahead else self._train(batches)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds, processor = time.perf_counter() - began, time.process_time() - busy
        record = list(self._system.ledger)[-1]
        self._step += 1
        away = record.cloud + record.uplink_wait
        sent, received = record.traffic.bytes_sent, record.traffic.bytes_received
        return Sample(seconds - away + meanwhile, processor, record.cloud, record.uplink_wait, sent, received)

    def _train(self, batches: Sequence[Batch]) -> float:
        system, step = self._system, self._step
        for index, batch in enumerate(batches):
            system.forward_backward(batch, step, index, 1 / len(batches))
        system.update(step, clip_scale(system.gradient_norm(), self._max_grad_norm))
        return 0.0

    def _send(self, batches: Sequence[Batch]) -> float:
        """As where steps are sent ahead, but for the next one; gives the time that this computes while it waits."""
        sent = self._system.send(self._step, ahead=False)
        for index, batch in enumerate(batches):
            sent.forward(batch, index, 1 / len(batches))
        rates = [float(group["lr"]) for group in self._system.optimizer.param_groups]
        sent.update(rates, self._max_grad_norm)
        busy = time.process_time()
        sent.settle()
        return (time.process_time() - busy) / torch.get_num_threads()


def _median(samples: Sequence[Sample]) -> Sample:
    """Of each figure: now and then one is far off."""
    return Sample(*(sorted(figure)[len(samples) // 2] for figure in zip(*samples)))
