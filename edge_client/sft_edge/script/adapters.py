"""The adapters that a script has put on its model with peft, before the model is cut.

They are read off the model's layers, not matched by patterns once more. peft is not imported here: that takes seconds,
and whoever has made such a model has it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, Mapping, Optional

from torch import nn

from sft.errors import UsageError
from sft.models import Net2, whole_name
from sft.models.lora import LoraSpec, check_lora_config

_NAME = "default"  # as peft calls an adapter that is given no name


def without_peft(model: nn.Module) -> nn.Module:
    """The model that a PeftModel is around; any other model as it is."""
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    base: nn.Module = model.get_base_model()
    return base


def adapters_of(model: Any) -> Optional[LoraSpec]:
    """The adapters of a script's model, W's among them, without `modules_to_save`; None where there are none.

    Raises UsageError unless they are LoRA's, one to a module, named "default", and as `sft.models.lora` can follow.
    """
    peft: Any = sys.modules.get("peft")
    if peft is None:
        return None
    tuner_layer: Any = sys.modules["peft.tuners.tuners_utils"].BaseTunerLayer
    layers = {
        whole_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, tuner_layer) and ".original_module." not in name
    }
    if not layers and not isinstance(model, peft.PeftModel):
        return None
    configs = model.peft_config
    if list(configs) != [_NAME]:
        raise UsageError(f"the model has adapters {', '.join(configs)}: only one can be trained, named '{_NAME}'")
    config = configs[_NAME]
    check_lora_config(config)
    if any(layer.merged or layer.disable_adapters for layer in layers.values()):
        raise UsageError("the model's adapters are merged or disabled: unmerge_adapter() and enable them first")
    ranks = {name: layer.r[_NAME] for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[_NAME] for name, layer in layers.items()}
    return LoraSpec(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        init_lora_weights=config.init_lora_weights,
        target_modules=list(layers),
        rank_pattern={name: r for name, r in ranks.items() if r != config.r},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha},
    )


def adapters_of_cloud(adapters: LoraSpec, net_2: Net2, live: Mapping[str, nn.Parameter]) -> Optional[LoraSpec]:
    """Those of net_2's modules, and which modules are trained beside them; None where net_2 has no adapter.

    `live` are the parameters of the script's model, under whole-model names. Raises UsageError for an adapter on what
    both halves need.
    """
    own = net_2.whole_parameters()
    trained = {name.rpartition(".")[0] for name in own if name not in live or live[name].requires_grad}
    shared = {name.rpartition(".")[0] for name, parameter in own.items() if not parameter.requires_grad}
    modules = {name.rpartition(".")[0] for name in own}
    for name in adapters.target_modules:
        if name in shared:
            raise UsageError(f"LoRA: both halves need '{name}', so it can have no adapter")
    if modules.isdisjoint(adapters.target_modules):
        return None
    return replace(adapters.of_half(net_2, "cloud"), modules_to_save=sorted(trained))
