"""LoRA on a model or on either half: peft's layers, under whole-model names.

peft says which modules an adapter is for by patterns of names. The names of a half are not those of the whole model, so
`resolve_lora` matches the patterns once, on the whole model, and what goes to the halves is the list of modules that
came out. Each half then has peft put its layers in their places; how they are drawn depends on the seed and on the
module's name in the whole model alone, so that both halves, and one process, draw the same.

Source: https://arxiv.org/abs/2106.09685; https://huggingface.co/docs/peft/package_reference/lora.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Callable, Collection, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sft.errors import ProtocolError, UsageError
from sft.models.adapters import ADAPTER, draw_adapter, set_adapters
from sft.models.cut import Undrawn
from sft.models.heads import HEADS
from sft.models.nets import Net
from sft.models.seeding import seeded
from sft.tensors.stream import StoredTensor

_CPU = torch.device("cpu")
_MAX_RANK, _MAX_ALPHA, _MAX_MODULES, _MAX_JSON_CHARACTERS = 1024, 1e6, 1 << 14, 1 << 22

_ADAPTABLE = (nn.Linear, nn.Embedding, Conv1D)
_USUAL_TARGETS = (
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q_proj", "v_proj"),
    ("q_lin", "v_lin"),
    ("c_attn",),
)
"""Names of the projections that peft adapts where it knows the architecture, for those that it does not know."""

_RESOLVED = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
_TAKEN = ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern", "bias")
_SAYS_NOTHING = (
    *("peft_type", "auto_mapping", "peft_version", "task_type", "base_model_name_or_path", "revision"),
    "fan_in_fan_out",  # the layer's type says it
)


@dataclass(frozen=True)
class LoraSpec:
    """A LoraConfig for one model, whose fields these are: with lists of modules in the place of patterns.

    Raises UsageError for values out of range.
    """

    r: int
    """Rank of the adapters."""

    lora_alpha: float
    """An adapter is multiplied by `lora_alpha / r`, or by `lora_alpha / sqrt(r)`."""

    lora_dropout: float
    """Dropout of what goes into an adapter."""

    use_rslora: bool
    """Whether it is the root."""

    init_lora_weights: Union[bool, str]
    """True: A is drawn as a Linear's weight is; "gaussian": from a normal distribution. B is 0 in any case."""

    target_modules: List[str]
    """Those that get an adapter, by their names in the whole model."""

    modules_to_save: List[str] = field(default_factory=list)
    """Those that are trained whole; what is in neither list is frozen."""

    rank_pattern: Dict[str, int] = field(default_factory=dict)
    """Ranks of target modules whose rank is not `r`."""

    alpha_pattern: Dict[str, float] = field(default_factory=dict)
    """Likewise."""

    def __post_init__(self) -> None:
        for rank in (self.r, *_dict(self, "rank_pattern").values()):
            if type(rank) is not int or not 1 <= rank <= _MAX_RANK:
                raise UsageError(f"LoRA: a rank must be from 1 to {_MAX_RANK}, not {rank!r}")
        for alpha in (self.lora_alpha, *_dict(self, "alpha_pattern").values()):
            if type(alpha) not in (int, float) or not 0 < alpha <= _MAX_ALPHA:
                raise UsageError(f"LoRA: lora_alpha must be above 0 and at most {_MAX_ALPHA:,.0f}, not {alpha!r}")
        if type(self.lora_dropout) not in (int, float) or not 0 <= self.lora_dropout < 1:
            raise UsageError(f"LoRA: lora_dropout must be 0 or more and below 1, not {self.lora_dropout!r}")
        if type(self.use_rslora) is not bool:
            raise UsageError(f"LoRA: use_rslora must be true or false, not {self.use_rslora!r}")
        if self.init_lora_weights is not True and self.init_lora_weights != "gaussian":
            raise UsageError(f'LoRA: init_lora_weights can be True or "gaussian", not {self.init_lora_weights!r}')
        for names in (self.target_modules, self.modules_to_save):
            if type(names) is not list or len(names) > _MAX_MODULES:
                raise UsageError(f"LoRA: a list of at most {_MAX_MODULES} modules was expected")
            for name in names:
                if type(name) is not str or not re.fullmatch(r"\w+(\.\w+)*", name):
                    raise UsageError(f"LoRA: {str(name)[:80]!r} is not the name of a module")
        strangers = {*self.rank_pattern, *self.alpha_pattern} - set(self.target_modules)
        if strangers:
            raise UsageError(f"LoRA: {min(strangers)[:80]!r} has a rank or alpha of its own, but is no target module")

    def of_half(self, net: Net, side: str) -> LoraSpec:
        """What concerns the modules of one half, which `side` names: "edge" or "cloud".

        Raises UsageError when no target module is among them.
        """
        of_half = self.of_modules(net)
        if not of_half.target_modules:
            raise UsageError(
                f"LoRA: the {side}'s half has none of the target modules ({_last_parts(self.target_modules)}); "
                f"it has {_adaptable(net)}: name others, cut elsewhere, or leave LoRA to the other half"
            )
        return of_half

    def of_modules(self, net: Net) -> LoraSpec:
        """What concerns the modules that a net has."""
        modules = _modules(net)
        return replace(
            self,
            target_modules=[name for name in self.target_modules if name in modules],
            modules_to_save=[name for name in self.modules_to_save if name in modules],
            rank_pattern={name: r for name, r in self.rank_pattern.items() if name in modules},
            alpha_pattern={name: alpha for name, alpha in self.alpha_pattern.items() if name in modules},
        )


def import_peft() -> Any:
    """The module `peft`. Raises UsageError when it is not installed: no other part of this package needs it."""
    try:
        return importlib.import_module("peft")  # not above: it takes seconds
    except ImportError as error:
        raise UsageError("LoRA needs peft: pip install 'split-fine-tuning[peft]'") from error


def check_lora_config(config: Any) -> None:
    """Raises UsageError for what is no `peft.LoraConfig`, and for settings that a split model cannot follow."""
    peft = import_peft()
    default = peft.LoraConfig()
    if not isinstance(config, peft.LoraConfig) or config.peft_type != default.peft_type:
        raise UsageError(f"LoRA is configured by a peft.LoraConfig, not by a {type(config).__name__}")
    if config.bias != "none":
        raise UsageError(f"LoRA: bias={config.bias!r} cannot be merged into the model that is saved; leave it 'none'")
    if config.inference_mode:
        raise UsageError("LoRA: inference_mode=True trains nothing; leave it False")
    for one in fields(default):
        if one.name not in (*_RESOLVED, *_TAKEN, *_SAYS_NOTHING) and (
            getattr(config, one.name) != getattr(default, one.name)
        ):
            raise UsageError(f"LoRA: {one.name} is not supported in a split model; leave it at its default")


def resolve_lora(config: Any, whole: Net) -> LoraSpec:
    """What `config`, a `peft.LoraConfig`, means for this model, which may be on the meta device.

    Without target modules they are those that peft chooses for the architecture, else the projections of the attention.
    FFN-1 to FFN-3 are trained whole, and so is what peft trains whole for the head. Raises UsageError when peft is not
    installed, for settings that a split model cannot follow, and when no module matches.
    """
    check_lora_config(config)
    modules = {name: module for name, module in whole.model.named_modules() if name}
    leaves = _modules(whole)
    endings = (*(config.modules_to_save or ()), *HEADS[whole.head].trained_whole)
    saved = [name for name in modules if name.endswith(endings)]
    saved = [leaf for leaf in leaves if any(f"{leaf}.".startswith(f"{name}.") for name in saved)]
    saved += [leaf for leaf in leaves if re.search(r"\.ffn[123]$", leaf) and leaf not in saved]
    matches = _matcher(config, whole)
    targets = []
    for name, module in modules.items():
        if name in saved or f"{name}.ffn1" in leaves or not matches(name, module):
            continue  # among the rest, where W was: its three layers are trained whole
        if not isinstance(module, _ADAPTABLE):
            raise UsageError(
                f"LoRA: target module '{name}' is a {type(module).__name__}, for which there is no adapter"
            )
        targets.append(name)
    if not targets:
        raise UsageError(f"LoRA: no module matches {config.target_modules}; this model has {_adaptable(whole)}")
    _refuse_tied(whole.model, targets)
    return LoraSpec(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        init_lora_weights=config.init_lora_weights,
        target_modules=targets,
        modules_to_save=saved,
        rank_pattern=_of_patterns(config.rank_pattern, targets),
        alpha_pattern=_of_patterns(config.alpha_pattern, targets),
    )


def adapter_shapes(net: Net, spec: LoraSpec) -> Dict[str, Tuple[int, ...]]:
    """Shape of every parameter that `add_lora` would add. Raises UsageError for modules that have no adapter."""
    shapes: Dict[str, Tuple[int, ...]] = {}
    modules = _modules(net)
    for name in spec.target_modules:
        module: Any = net.get_submodule(modules[name]) if name in modules else None
        if not isinstance(module, _ADAPTABLE):
            raise UsageError(f"LoRA: this half has no module '{name}' that an adapter is for")
        r, (rows, columns) = spec.rank_pattern.get(name, spec.r), module.weight.shape
        if isinstance(module, nn.Linear):
            rows, columns = columns, rows
        part = "lora_embedding_{}.default" if isinstance(module, nn.Embedding) else "lora_{}.default.weight"
        shapes[f"{name}.{part.format('A')}"] = (r, rows)
        shapes[f"{name}.{part.format('B')}"] = (columns, r)
    return shapes


def add_lora(
    net: Net,
    spec: LoraSpec,
    seed: int,
    among: Optional[Collection[str]] = None,
    values: Sequence[StoredTensor] = (),
) -> None:
    """Puts adapters into a net, after `sft.models.weights.fill`, and freezes what they stand for.

    Or on the meta device, in any thread: `sft.models.weights.fill` and `draw_adapters` then give all of it values.

    `among` are the parameters that this is about, of all that the net has: the others are left as they are. W of an
    adapted module keeps its whole-model name; its adapter's parameters are called as peft calls them, such as
    `bert.encoder.layer.4.attention.self.query.lora_A.default.weight`. Those that `values` hold are not drawn.

    Raises UsageError when peft is not installed, or the net has no module of one of the names.
    """
    peft = import_peft()
    modules = _modules(net)
    unknown = [name for name in (*spec.target_modules, *spec.modules_to_save) if name not in modules]
    if unknown:
        raise UsageError(f"LoRA: this half has no module '{unknown[0]}'")
    among = set(net.whole_names.values() if among is None else among)
    trained = {own: parameter.requires_grad for own, parameter in net.named_parameters()}
    whole_names = dict(net.whole_names)
    own_names = {name: modules[name] for name in spec.target_modules}
    config = peft.LoraConfig(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        use_rslora=spec.use_rslora,
        init_lora_weights=spec.init_lora_weights,
        target_modules=list(own_names.values()),
        rank_pattern={own_names[name]: rank for name, rank in spec.rank_pattern.items()},
        alpha_pattern={own_names[name]: alpha for name, alpha in spec.alpha_pattern.items()},
        fan_in_fan_out=any(isinstance(net.get_submodule(own), Conv1D) for own in own_names.values()),
    )
    with ExitStack() as stack:  # peft draws, too; ours replace it
        if net.device.type == "meta":  # nothing is drawn, in any thread
            stack.enter_context(torch.device("meta"))
            stack.enter_context(Undrawn())
        else:
            stack.enter_context(seeded(_CPU, seed, "lora"))
        try:
            peft.inject_adapter_in_model(config, net, ADAPTER)
        except (TypeError, ValueError) as error:
            raise UsageError(f"LoRA: {' '.join(str(error).split())}") from error
    net.whole_names = {}
    for name, own in own_names.items():
        draw_adapter(net.get_submodule(own), spec.init_lora_weights, seed, name)
    parents = {own: name for name, own in own_names.items()}
    for own, parameter in net.named_parameters():
        before = own.replace(".base_layer.", ".")
        if before in whole_names:
            name = net.whole_names[own] = whole_names[before]
            saved = name.rpartition(".")[0] in spec.modules_to_save
            parameter.requires_grad_(trained[before] and (saved or name not in among))
        else:
            parent = re.split(r"\.lora_", own)[0]
            net.whole_names[own] = parents[parent] + own[len(parent) :]
            parameter.requires_grad_(True)
    set_adapters(net, values)


def merged_tensors(net: Net) -> List[StoredTensor]:
    """The net's parameters under whole-model names, with adapters added to what they adapt; sorted by name.

    The sums are made as they are read, and the net stays as it is. Without adapters these are its parameters.
    """
    layers = {f"{name}.": module for name, module in net.named_modules() if hasattr(module, "get_delta_weight")}
    tensors = []
    for own, parameter in net.named_parameters():
        layer = next((name for name in _prefixes(own) if name in layers), None)
        if layer is None or own.startswith(f"{layer}base_layer."):
            adapter = layers[layer] if layer is not None and own.endswith(".weight") else None
            read = _reader(parameter, adapter)
            tensors.append(StoredTensor(net.whole_names[own], parameter.dtype, tuple(parameter.shape), read))
    return sorted(tensors, key=lambda tensor: tensor.name)


def lora_to_json(spec: LoraSpec) -> str:
    """For the wire."""
    return json.dumps(asdict(spec), separators=(",", ":"))


def lora_from_json(text: str) -> LoraSpec:
    """From the wire, where anybody may have written it. Raises ProtocolError; `add_lora` checks the names."""
    if len(text) > _MAX_JSON_CHARACTERS:
        raise ProtocolError(f"lora_json has {len(text)} characters; at most {_MAX_JSON_CHARACTERS} are accepted")
    try:
        values = json.loads(text)
        known = {one.name for one in fields(LoraSpec)}
        if not isinstance(values, dict) or set(values) != known:
            raise ProtocolError(f"lora_json must be an object of {', '.join(sorted(known))}")
        return LoraSpec(**values)
    except (UsageError, ValueError, RecursionError) as error:
        raise ProtocolError(f"lora_json: {' '.join(str(error).split())[:300]}") from error


def _refuse_tied(model: nn.Module, targets: List[str]) -> None:
    owners: Dict[int, List[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    for shared in owners.values():
        for name in shared:
            if len(shared) > 1 and name in targets:
                others = ", ".join(other for other in shared if other != name)
                raise UsageError(f"LoRA: '{name}' shares its weight with {others}, which an adapter would not change")


def _matcher(config: Any, whole: Net) -> Callable[[str, nn.Module], bool]:
    """Whether the configuration means a module, by peft's own rules."""
    if config.target_modules == "all-linear":
        outputs = whole.model.get_output_embeddings()
        return lambda _, module: isinstance(module, (nn.Linear, Conv1D)) and module is not outputs
    config = copy.copy(config)
    config.modules_to_save = None  # left out before
    if config.target_modules is None:
        config.target_modules = set(_usual_targets(whole))
    exists = importlib.import_module("peft.tuners.tuners_utils").check_target_module_exists
    return lambda name, _: bool(exists(config, name))


def _usual_targets(whole: Net) -> Collection[str]:
    known = importlib.import_module("peft.utils").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    names: Optional[Collection[str]] = known.get(whole.model.config.model_type)
    last_parts = {name.rpartition(".")[2] for name in _modules(whole)}
    return names or next((usual for usual in _USUAL_TARGETS if last_parts.issuperset(usual)), ())


def _of_patterns(patterns: Dict[str, Any], targets: List[str]) -> Dict[str, Any]:
    found = {}
    for name in targets:
        pattern = next((one for one in patterns or {} if re.match(rf"(.*\.)?({one})$", name)), None)
        if pattern is not None:
            found[name] = patterns[pattern]
    return found


def _reader(parameter: nn.Parameter, adapter: Any) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with torch.no_grad():
            merged: Tensor = parameter + adapter.get_delta_weight(ADAPTER)
            return merged

    return parameter.detach if adapter is None else read


def _modules(net: Net) -> Dict[str, str]:
    """Of every module that has parameters of its own: its name in the whole model -> its name in this one."""
    return {whole.rpartition(".")[0]: own.rpartition(".")[0] for own, whole in net.whole_names.items()}


def _prefixes(own: str) -> List[str]:
    parts = own.split(".")
    return [".".join(parts[:end]) + "." for end in range(1, len(parts))]


def _adaptable(net: Net) -> str:
    modules = _modules(net)
    return _last_parts([name for name, own in modules.items() if isinstance(net.get_submodule(own), _ADAPTABLE)])


def _last_parts(names: Collection[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _dict(spec: LoraSpec, name: str) -> Dict[str, Any]:
    values = getattr(spec, name)
    if type(values) is not dict:
        raise UsageError(f"LoRA: {name} must be an object, not {values!r}")
    return dict(values)
