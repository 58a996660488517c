"""A SentenceTransformer as a function of tensors: it is called with a dictionary, which its modules hand on.

Its first module runs a transformers model and decides by sizes of what that returns, which no graph holds: the
transformers model is called in its place, and what follows it is given hidden states and mask, and nothing else.
"""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple

from torch import Tensor, nn

from sft.errors import CutError
from sft.graphs.trace import Inputs

_TAKEN = ("input_ids", "attention_mask", "token_type_ids")
_OUTPUT = "sentence_embedding"


def is_sentence_model(model: nn.Module) -> bool:
    """Whether it is one of sentence-transformers' bi-encoders."""
    return any(
        kind.__name__ == "SentenceTransformer" and kind.__module__.startswith("sentence_transformers.")
        for kind in type(model).__mro__
    )


def embedding_dimension(model: Any) -> int:
    """Of a sentence model's embeddings, before it is cut."""
    newer = getattr(model, "get_embedding_dimension", None)
    return int((newer or model.get_sentence_embedding_dimension)() or 0)


class SentenceInputs(Inputs):
    """What the dictionary has. Raises CutError for a model whose first module is not text through a base model."""

    def __init__(self, model: nn.Module, body_name: str) -> None:
        super().__init__(model)
        self.required = ["input_ids", "attention_mask"]
        self.defaults: Dict[str, Any] = dict.fromkeys(_TAKEN[len(self.required) :])
        first = next(model.children())
        body = model.get_submodule(body_name)
        of_text = getattr(first, "modality_config", {"text": {}}).get("text", {"method": ""})
        output = of_text.get("method_output_name", "last_hidden_state")
        is_usual = of_text.get("method", "forward") == "forward" and output in (
            "last_hidden_state",
            ["last_hidden_state"],
            ("last_hidden_state",),
        )
        if body not in first.children() or not is_usual:
            raise CutError(
                f"this {type(model).__name__} begins with a {type(first).__name__}, not with token embeddings of a "
                "transformers model: only such models are cut"
            )
        self._needs_prompts = any(getattr(module, "include_prompt", True) is False for module in model.children())

        def forward(
            model: nn.Module, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Optional[Tensor] = None
        ) -> Any:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            returned = body(input_ids=input_ids, attention_mask=attention_mask, **types)
            features = {"token_embeddings": returned.last_hidden_state, "attention_mask": attention_mask}
            for module in list(model.children())[1:]:
                features = module(features)
            return features[_OUTPUT]

        self.forward = forward

    def bind(self, model: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Dict[str, Any]:
        """See Inputs."""
        bound = self.signature.bind(model, *args, **kwargs).arguments
        features = dict(list(bound.values())[1])
        given = {name: features.pop(name) for name in _TAKEN if features.get(name) is not None}
        if self._needs_prompts and features.get("prompt_length"):
            raise CutError("the pooling of this model leaves the prompt out, which no module above the cut sees")
        odd = sorted(name for name, value in features.items() if isinstance(value, Tensor) and name != "prompt_length")
        if odd or features.get("modality", "text") != "text":
            raise CutError(f"{odd[0] if odd else 'modality'} cannot be given to a model that is cut: give texts alone")
        if len(given) < len(self.required):
            raise CutError(
                "a model that is cut is called with input_ids and attention_mask, as its tokenizer makes them"
            )
        return given

    def returned(self, args: Tuple[Any, ...], kwargs: Dict[str, Any], output: Any) -> Any:
        """See Inputs: the dictionary, with the embedding."""
        features = kwargs.get("input", args[0] if args else None)
        assert features is not None
        features[_OUTPUT] = output
        return features
