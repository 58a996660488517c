"""From options to a system ready to train: one of the three, with its optimizer, and a cloud where it needs one."""

from __future__ import annotations

import contextlib
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Mapping, Optional, Sequence, Tuple

from torch import Tensor

from sft.batch import Batch
from sft.cli.devices import find_device
from sft.models import Cut, build_whole
from sft.models.lora import add_lora
from sft.models.weights import fill
from sft.optim.spec import make_optimizer
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import codecs_named
from sft_edge.link import Left, Link, Meter, retry_policy_of, transport_of
from sft_edge.model_files import Source
from sft_edge.options import CutOptions, LinkOptions, RunOptions
from sft_edge.systems.cloud_process import CloudProcess
from sft_edge.systems.halves import check_kept, halve, optimizer_spec, whole_tensors
from sft_edge.systems.local import LocalSystem
from sft_edge.systems.lora import half_lora, whole_lora
from sft_edge.systems.split import open_split_system
from sft_edge.systems.system import System


def cut_of(options: CutOptions, source: Source) -> Optional[Cut]:
    """The cut that the options mean for a model; None where it stays in one piece, as the library has it.

    A model that is decomposed already is trained on as it is: in one process without being told where. Raises CutError
    for another cut.
    """
    if not options.is_cut:
        return source.cut
    mode = "sl" if options.cuts_between_blocks else "sft"
    rank = options.split_rank if mode == "sft" else 0
    cut = Cut(mode, int(options.split_layer or 0), rank, options.residual)
    check_kept(source, cut)
    return cut


@contextmanager
def open_system(
    source: Source,
    head: str,
    options: RunOptions,
    calibration: Sequence[Batch] = (),
    on_status: Callable[[str], None] = lambda text: None,
    run_id: str = "",
    resume_from: Sequence[pb.CheckpointId] = (),
    checkpoint_store: Optional[Path] = None,
    on_link: Callable[[Link], None] = lambda link: None,
    keep_in: Optional[Path] = None,
    keep_key: bytes = b"",
    tables: Optional[Mapping[str, Tensor]] = None,
    left: Optional[Tuple[Left, int]] = None,
    meter: Optional[Meter] = None,
) -> Iterator[System]:
    """The system for the block; the session, and a cloud that was started for it, end with the block.

    `calibration`: what a low-rank residual or a codec is fitted to; `on_status` is told what a broken link is waiting
    for; `run_id`: whose checkpoints are saved, if any are; `resume_from`: those of which it may go on, see
    `halve`; `checkpoint_store`: where a cloud that is started for it keeps its halves; `on_link`, `keep_in` and `left`
    as `open_split_system` has them; `keep_key`: with which the cloud is to keep activations, if it is; `tables`: of a
    codec that was fitted earlier in the run; `meter`: counts what crosses.

    Raises what building, connecting and opening a session raise: CutError, CheckpointError, UsageError, LinkError.
    """
    cut, device = cut_of(options.cut, source), find_device(options.training.device)
    whole = build_whole(source.config, head, cut)
    if options.cut.mode == "local":
        adapters = whole_lora(options.lora, whole)
        # What goes on from a checkpoint takes all values from there.
        tensors = [] if resume_from else whole_tensors(whole, source, cut, options.training.seed, calibration)
        fill(whole, tensors, options.training.seed, device)
        if adapters is not None:
            add_lora(whole, adapters, options.training.seed)
        optimizer = make_optimizer(optimizer_spec(options.optimizer, whole), whole.whole_parameters())
        yield LocalSystem(whole, optimizer, options.training.seed)
        return
    assert cut is not None  # every other mode is cut
    lora = half_lora(options.lora, whole, source.config, cut, options.training.seed)
    spec = optimizer_spec(options.optimizer, whole)
    with _server(options.link, checkpoint_store) as address:
        start = halve(
            source,
            head,
            cut,
            spec,
            options.training.seed,
            codecs_named(options.cut.wire_dtype, options.cut.codec, options.cut.gradient_codec),
            freeze_edge=options.cut.freeze_edge,
            calibration=calibration,
            lora=lora,
            run_id=run_id,
            resume_from=resume_from,
            tables=tables,
        )
        start.request.keep_key = keep_key
        transport, policy = transport_of(address, options.link, meter), retry_policy_of(options.link)
        system = open_split_system(
            start,
            device,
            transport,
            policy,
            on_status,
            options.link.labels,
            on_link,
            keep_in,
            left,
            expects=lambda result_bytes: None if meter is None else meter.expect(result_bytes),
        )
        del start  # what the blobs read from may be half a model
        with system.link, contextlib.ExitStack() as stack:
            if system.kept is not None:
                stack.callback(system.kept.close)
            yield system


@contextmanager
def _server(link: LinkOptions, checkpoint_store: Optional[Path]) -> Iterator[str]:
    if link.server is not None:
        yield link.server
        return
    store = [] if checkpoint_store is None else ["--checkpoint-store", str(checkpoint_store)]
    with CloudProcess(store) as cloud:
        yield cloud.address
