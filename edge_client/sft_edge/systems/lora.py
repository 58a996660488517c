"""From the options of LoRA to what each half is told of them."""

from __future__ import annotations

from typing import NamedTuple, Optional

from transformers import PretrainedConfig

from sft.errors import UsageError
from sft.models import Cut, Whole, build_net_1, build_net_2
from sft.models.lora import LoraSpec, add_lora, resolve_lora
from sft_edge.options import LoraOptions


class HalfLora(NamedTuple):
    """The adapters of each half; None where it is trained whole."""

    edge: Optional[LoraSpec] = None
    cloud: Optional[LoraSpec] = None


NO_LORA = HalfLora()


def whole_lora(options: LoraOptions, whole: Whole) -> Optional[LoraSpec]:
    """The adapters of a model that stays in one process; None where there are to be none.

    `whole` may be on the meta device. Raises what `resolve_lora` raises, and UsageError when only a half is meant.
    """
    if not options.lora_r:
        return None
    if options.lora_half != "both":
        raise UsageError(f"--lora-half {options.lora_half} needs two halves: leave it out with --mode local")
    return resolve_lora(options.config(), whole)


def half_lora(options: LoraOptions, whole: Whole, config: PretrainedConfig, cut: Cut, seed: int) -> HalfLora:
    """The adapters of the halves of `whole`, which is on the meta device and gets them, too.

    Raises what `resolve_lora` raises, and UsageError when a half that is meant has nothing to adapt.
    """
    if not options.lora_r:
        return NO_LORA
    net_1, net_2 = build_net_1(config, whole.head, cut), build_net_2(config, whole.head, cut)
    spec = resolve_lora(options.config(), whole)
    edge = spec.of_half(net_1, "edge") if options.on_edge else None
    cloud = spec.of_half(net_2, "cloud") if options.on_cloud else None
    if edge is not None and cloud is not None:
        add_lora(whole, spec, seed)
    elif edge is not None:
        add_lora(whole, edge, seed, among=net_1.whole_names.values())
    elif cloud is not None:
        add_lora(whole, cloud, seed, among=net_2.whole_names.values())
    return HalfLora(edge, cloud)
