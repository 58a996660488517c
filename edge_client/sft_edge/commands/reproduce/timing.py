"""`sft-edge reproduce timing`: the paper's estimate, and what this device and the way to a server give in its place."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from typing import Any, Dict, List, NamedTuple, Optional

import torch
from transformers import AutoConfig, AutoModel

from sft.cli.devices import find_device
from sft.errors import LinkError
from sft.models import max_positions
from sft.models.cut import blocks_of
from sft.models.families.catalogue import family_of
from sft.printable import format_bytes
from sft_edge.commands.doctor.server import Way, measure
from sft_edge.commands.reproduce import paper
from sft_edge.commands.reproduce.equations import (
    LINES,
    Estimate,
    corrected,
    from_its_inputs,
    printed,
    remarks,
    step_bytes,
)
from sft_edge.commands.reproduce.tables import Table, markdown, print_table
from sft_edge.files import write_file, write_json
from sft_edge.link import transport_of
from sft_edge.model_files import open_model
from sft_edge.options import LinkOptions, ReproduceOptions

_PROBE_SECONDS = 60.0
_ENOUGH_SECONDS = 10.0
_FEWEST, _MOST = 3, 30
"""Iterations that are timed, of which the median counts."""


class _Shape(NamedTuple):
    config: Any
    name: str

    @property
    def blocks(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def width(self) -> int:
        return int(self.config.hidden_size)


def timing(options: ReproduceOptions, link: LinkOptions) -> int:
    """Measures, prints the table, and writes it. Raises any SFTError."""
    assert options.output_dir is not None
    device = find_device(options.device)
    shape = _shape_of(options.model)
    way = _way_to(link)
    edge_block = 1000 * block_seconds(shape.config, device)
    measured = _estimate(shape, edge_block, way).values()
    columns = {
        "printed": printed(),
        "from its inputs": from_its_inputs(),
        "corrected": corrected(),
        "measured": measured,
    }
    rows = [[LINES[name], *(_number(values[name]) for values in columns.values())] for name in LINES]
    table = Table("Eq. 5 to 12", ["", *columns], rows)
    print_table(table)
    notes = [f"{about}: {says}" for about, says in remarks().items()]
    notes += list(_said_of_measured(shape, device, link, way))
    for note in notes:
        sys.stdout.write(f"{note}\n")
    write_json(options.output_dir / "timing.json", {"columns": columns, "notes": notes, "way": way and way._asdict()})
    text = markdown(table) + "\n" + "".join(f"- {note}\n" for note in notes)
    write_file(options.output_dir / "timing.md", [text.encode("utf-8")])
    sys.stdout.write(f"saved in {options.output_dir}: timing.md, timing.json\n")
    return 0


def block_seconds(config: Any, device: torch.device) -> float:
    """Forward and backward of one block with random weights, of a batch of the paper's shape: the median.

    `config`: of the model. Its dropout is on, as in training. Raises UnsupportedModelError.
    """
    family = family_of(config)
    length = min(paper.SEQUENCE, max_positions(config))
    alone = copy.deepcopy(config)
    alone.num_hidden_layers = 1
    auto_model: Any = AutoModel
    base = auto_model.from_config(alone, trust_remote_code=False).to(device).train()
    block = blocks_of(base, family)[0]
    given: Dict[str, Any] = {}

    def note(_: Any, arguments: Any, keywords: Any) -> None:
        given.update(arguments=arguments, keywords=keywords)

    hook = block.register_forward_pre_hook(note, with_kwargs=True)
    ids_BS = torch.ones(paper.BATCH, length, dtype=torch.long, device=device)
    with torch.no_grad():
        base(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS))  # masks and positions are the library's
    hook.remove()
    h_BSD, *others = given["arguments"] or (given["keywords"].pop("hidden_states"),)
    seconds: List[float] = []
    while len(seconds) <= _FEWEST or (len(seconds) <= _MOST and sum(seconds) < _ENOUGH_SECONDS):
        began = _now(device)
        out = block(h_BSD.detach().requires_grad_(), *others, **given["keywords"])
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        seconds.append(_now(device) - began)
    return statistics.median(seconds[1:])  # the first one also makes the gradients


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _shape_of(model: Optional[str]) -> _Shape:
    if model is None:
        return _Shape(AutoConfig.for_model("bert"), "BERT-base's shape")
    return _Shape(open_model(model, None, {}).config, model)


def _way_to(link: LinkOptions) -> Optional[Way]:
    """Raises LinkError where the server cannot be asked."""
    if link.server is None:
        return None
    transport = transport_of(link.server, link)
    try:
        findings, way = measure(transport.inquiry(_PROBE_SECONDS))
    finally:
        transport.close()
    if way is None:
        raise LinkError(f"{findings[0].found}; `sft-edge doctor --server {link.server}` finds out why")
    return way


def _estimate(shape: _Shape, edge_block: float, way: Optional[Way]) -> Estimate:
    """As the paper's: as many blocks on the cloud, which is so many times as fast."""
    on_cloud = min(paper.BLOCKS - paper.EDGE_BLOCKS, shape.blocks)
    sl_bytes, sft_bytes = step_bytes(shape.width), step_bytes(paper.RANK)
    return Estimate(
        edge_block,
        edge_block / paper.SLOWER,
        shape.blocks,
        shape.blocks - on_cloud,
        sl_bytes,
        sft_bytes,
        _milliseconds(way, sl_bytes),
        _milliseconds(way, sft_bytes),
    )


def _milliseconds(way: Optional[Way], both_ways: int) -> Optional[float]:
    """Of a step: there and back, half of the bytes each way."""
    if way is None:
        return None
    half = both_ways / 2
    return 1000 * (way.delay_seconds + half / way.up_bytes_per_second + half / way.down_bytes_per_second)


def _said_of_measured(shape: _Shape, device: torch.device, link: LinkOptions, way: Optional[Way]) -> List[str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    on_cloud = min(paper.BLOCKS - paper.EDGE_BLOCKS, shape.blocks)
    said = [
        f"measured: a block of {shape.name} on this device ({name}), batch {paper.BATCH}, "
        f"{paper.SEQUENCE} tokens, forward and backward; times {shape.blocks} blocks, {on_cloud} of them on the cloud, "
        f"which is taken to be {paper.SLOWER} times as fast, as in the paper"
    ]
    if way is None:
        said.append("the way is not measured: --server HOST:PORT names a server to try it with")
    else:
        said.append(
            f"the way to {link.server}: {1000 * way.delay_seconds:.2f} ms there and back, "
            f"{format_bytes(way.up_bytes_per_second)}/s up, {format_bytes(way.down_bytes_per_second)}/s down"
        )
    return said


def _number(value: Optional[float]) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
