"""Every way to train that the options leave open."""

from __future__ import annotations

from typing import Any, List, Sequence, Tuple

from sft.cli.whole_or_auto import is_auto
from sft.errors import CutError, UsageError
from sft.models import Cut, build_net_1
from sft_edge.model_files import Source
from sft_edge.options import CutOptions, RunOptions, check_together
from sft_edge.systems import cut_of

MODES = ("sft", "sl", "frozen", "local")
RANKS = (8, 16, 32)
"""The paper's."""

CODECS = ("int8", "float32", "int4", "fitted")


def ways(options: RunOptions, source: Source, head: str, modes: Sequence[str] = MODES) -> List[CutOptions]:
    """All cuts that `train` takes and that have what is given; `modes`: those to choose from where none is.

    Raises UsageError where there is none: what is wrong with the last.
    """
    given, found = options.cut, []
    wrong = UsageError("no way to train has all that is given of the cut")
    layers, ranks = _layers(options, source, head), _ranks(options, source, head)
    for mode in modes if is_auto(given.mode) else [given.mode]:
        for layer in layers if mode != "local" else [None]:
            for rank in ranks if mode == "sft" else [CutOptions.split_rank]:
                for codec in _codecs(given, mode):
                    try:
                        found.append(_way(options, source, mode, layer, rank, codec))
                    except UsageError as error:
                        wrong = error
    if not found:
        raise wrong
    return found


def _way(options: RunOptions, source: Source, mode: Any, layer: Any, rank: Any, codec: Any) -> CutOptions:
    """Raises UsageError where it is none."""
    given = options.cut
    cut = CutOptions(
        mode, layer, rank, given.residual, given.freeze_edge, given.activations, given.wire_dtype, codec,
        given.gradient_codec,
    )  # fmt: skip
    if mode != "local":
        cut_of(cut, source)
        check_together(cut, options.link, options.training, options.lora, options.budget)
    elif options.training.detach:
        raise UsageError("--detach needs --mode sft, sl or frozen: in one process nobody is left to go on")
    elif options.lora.lora_r and options.lora.lora_half != "both":
        raise UsageError(f"--lora-half {options.lora.lora_half} needs two halves")
    return cut


def _codecs(given: CutOptions, mode: str) -> Sequence[Any]:
    if mode == "local":
        return [None]
    return CODECS if given.codec == "auto" else [given.codec]


def _layers(options: RunOptions, source: Source, head: str) -> Sequence[int]:
    """Raises CutError for one that is given and that the model does not have."""
    given, blocks = options.cut.split_layer, int(source.config.num_hidden_layers)
    if given is None:
        return []
    if not is_auto(given):
        build_net_1(source.config, head, Cut("sl", given))
        return [given]
    try:
        build_net_1(source.config, head, Cut("sl", 1))
    except CutError:  # there are models that need a second block on the edge
        return range(2, blocks + 1)
    return range(1, blocks + 1)


def _ranks(options: RunOptions, source: Source, head: str) -> Sequence[int]:
    """Raises CutError for one that is given and that the model does not have."""
    given, last, residual = options.cut.split_rank, int(source.config.num_hidden_layers), options.cut.residual
    if not is_auto(given):
        if options.cut.mode in ("sft", "auto"):
            build_net_1(source.config, head, Cut("sft", last, given, residual))
        return [given]
    found = []
    for rank in RANKS:
        try:
            build_net_1(source.config, head, Cut("sft", last, rank, "none" if residual == "full" else residual))
        except CutError:
            continue
        found.append(rank)
    return found


def ends(layers: Sequence[int]) -> Tuple[int, int]:
    """The two blocks, or the same twice, that are measured for cuts at these: what is between is on the line through
    them, and so is the last one of the model, which leaves the cloud little to measure."""
    low, high = min(layers), max(layers)
    return low, max(low, high - 1) if high - low > 1 else high
