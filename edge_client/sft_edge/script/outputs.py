"""What a cut transformers model returns: the library's own output class, as the whole model would."""

from __future__ import annotations

import typing
from typing import Any, Dict, Iterator, Optional, Tuple, Type, Union

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import ModelOutput

_USUAL: Dict[str, Type[ModelOutput]] = {
    "sequence-classification": SequenceClassifierOutput,
    "question-answering": QuestionAnsweringModelOutput,
    "causal-lm": CausalLMOutputWithPast,
    "token-classification": TokenClassifierOutput,
    "multiple-choice": MultipleChoiceModelOutput,
    "masked-lm": MaskedLMOutput,
}


def output_class(model: PreTrainedModel, head: str) -> Type[ModelOutput]:
    """What the forward of the model's class says that it returns."""
    try:
        annotation = typing.get_type_hints(type(model).forward).get("return")
    except (NameError, TypeError):  # an annotation that this Python cannot evaluate
        annotation = None
    return next(_output_classes(annotation), _USUAL[head])


def make_output(
    output: Type[ModelOutput], head: str, loss: Optional[Tensor], logits: Optional[Tensor], as_dict: bool
) -> Union[ModelOutput, Tuple[Tensor, ...]]:
    """`logits` as in `sft.models.losses.head_loss`; a tuple, unless `as_dict`, of those that are there."""
    named = {"loss": loss, "logits": logits}
    if head == "question-answering" and logits is not None:
        named = {"loss": loss, "start_logits": logits[..., 0], "end_logits": logits[..., 1]}
    if as_dict:
        return output(**named)
    return tuple(tensor for tensor in named.values() if tensor is not None)


def _output_classes(annotation: Any) -> Iterator[Type[ModelOutput]]:
    for one in typing.get_args(annotation) or (annotation,):
        if isinstance(one, type) and issubclass(one, ModelOutput):
            yield one
