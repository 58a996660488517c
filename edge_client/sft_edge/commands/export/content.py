"""What an export consists of: configuration, weights, tokenizer, and code where the library's own does not do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import torch
from torch import Tensor, nn

from sft.errors import UsageError
from sft.models import HEADS, Cut, build_whole, ffn_out_name
from sft.printable import told_by
from sft.tensors.stream import StoredTensor, in_memory, safetensors_chunks, safetensors_size
from sft_edge.files import storage_errors, write_file, write_json
from sft_edge.model_files import FACTORED, ModelingFile, SavedModel

_LEFT_OUT = ("_name_or_path", "_attn_implementation_autoset", "dtype", "pretraining_tp")
"""Of the configuration: what speaks of this machine, and what this package sets whether a model has it or not."""


class Export:
    """A trained model on its way out of this package."""

    def __init__(self, saved: SavedModel, form: str) -> None:
        """`form` is "dense" or "factored". Raises UsageError for a model that has no factors."""
        self._net, self.description = saved.net, saved.description
        cut = self.description.cut
        if cut is None and form == FACTORED:
            raise UsageError("--factored: no layer of this model was decomposed; leave it out")
        self.form: Optional[str] = None if cut is None else form
        """What stands where W was; None where W does."""
        self._code: Optional[ModelingFile] = None
        if cut is not None and (form == FACTORED or cut.residual != "full"):
            self._code = ModelingFile(self._net.model.config, self.description.head, cut, form)
        self.auto_class: str = HEADS[self.description.head].auto_class.__name__
        self.architecture = type(self._net.model).__name__
        self.tensors: Sequence[StoredTensor] = in_memory(self._parameters(cut))
        self.tokenizer = self._prepared(copy.deepcopy(saved.tokenizer))

    @property
    def has_code(self) -> bool:
        """Whether a modeling file travels along: where the library's own class does not compute what the model does."""
        return self._code is not None

    def size(self) -> int:
        """Bytes of the file of weights, which is all but nothing of the whole."""
        return safetensors_size(self.tensors)

    def write(self, directory: Path) -> None:
        """Everything but the card, into an empty directory. Raises StorageError."""
        write_file(directory / "model.safetensors", safetensors_chunks(self.tensors))
        with storage_errors(directory):
            try:
                self.tokenizer.save_pretrained(str(directory))
            except Exception as error:
                if type(error) is not Exception:
                    raise
                raise OSError(0, told_by(error)) from error  # how the tokenizers package tells of a full disk
        tokenizer_class = _class_for_all_releases(directory / "tokenizer_config.json")
        if self._code is not None:
            write_file(directory / self._code.name, [self._code.text().encode()])
        write_json(directory / "config.json", {**self._config(), "tokenizer_class": tokenizer_class})

    def _parameters(self, cut: Optional[Cut]) -> Dict[str, Tensor]:
        parameters: Dict[str, Tensor] = {name: x.detach() for name, x in self._net.whole_parameters().items()}
        if not self._net.model.config.tie_word_embeddings:  # then the library ties nothing, within a head neither
            parameters.update({other: parameters[name].clone() for other, name in self._net.other_names().items()})
        if cut is None:
            return parameters
        if self._code is not None:
            parameters.update(self._code.in_place_of_w())
        if self.form == FACTORED:
            return parameters
        layer = ffn_out_name(self._net.model.config, self.description.head, cut.split_layer)
        u, s, v = (parameters.pop(f"{layer}.ffn{number}.weight").double().T for number in (1, 2, 3))
        w = (u @ s @ v).to(torch.float32)  # (F, D)
        stock = build_whole(self._net.model.config, self.description.head).model.get_submodule(layer)
        transposed = self.has_code or isinstance(stock, nn.Linear)  # GPT-2's holds the matrix itself
        place = f"{layer}.dense" if self.has_code else layer
        parameters[f"{place}.weight"] = w.T.contiguous() if transposed else w
        if f"{layer}.ffn3.bias" in parameters:
            parameters[f"{place}.bias"] = parameters.pop(f"{layer}.ffn3.bias")
        return parameters

    def _prepared(self, tokenizer: Any) -> Any:
        """Makes what this package does by itself the tokenizer's own habit."""
        tokenizer.model_max_length = min(tokenizer.model_max_length, self.description.max_seq_length)
        if self._net.family.decoder and tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # padding is never read, but there must be some
        if self.description.head != "causal-lm":
            tokenizer.padding_side = "right"
        if getattr(self._net.model.config, "type_vocab_size", 0) < 2:
            names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
            tokenizer.model_input_names = names
            tokenizer.init_kwargs["model_input_names"] = names
        return tokenizer

    def _config(self) -> Dict[str, Any]:
        """The content of config.json."""
        config = copy.deepcopy(self._net.model.config)
        if self.description.label_names is not None:
            config.id2label = dict(enumerate(self.description.label_names))
            config.label2id = {name: index for index, name in enumerate(self.description.label_names)}
        config.problem_type = self.description.problem_type
        if self._net.family.decoder:
            config.pad_token_id = self.tokenizer.pad_token_id  # by it the library finds the last token to classify
        config.architectures = [self.architecture]
        content: Dict[str, Any] = json.loads(config.to_json_string())
        content = {name: value for name, value in content.items() if name not in _LEFT_OUT}
        content["torch_dtype"] = "float32"  # all releases understand the older name
        if self._code is not None:
            content.update(self._code.config_fields())
        return content


def _class_for_all_releases(path: Path) -> str:
    """The tokenizer's class. Newer releases call that of any fast one by a name that older ones do not know."""
    content = json.loads(path.read_text(encoding="utf-8"))
    name = str(content["tokenizer_class"])
    if name == "TokenizersBackend":
        name = "PreTrainedTokenizerFast"
        write_json(path, {**content, "tokenizer_class": name})
    return name
