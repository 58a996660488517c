"""A model and its halves: what runs the library's forward, from token ids or from the activation.

Shape suffixes: B batch, S sequence, D model width, R split rank, C labels, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional

import torch
from torch import Tensor, nn

from sft.batch import attention_mask
from sft.errors import UsageError
from sft.models.families.family import Family
from sft.models.losses import head_loss
from sft.models.split_layer import Reached


class Output(NamedTuple):
    """What a head gives."""

    loss: Optional[Tensor]
    """0-dim, see `sft.models.losses.head_loss`; None without labels."""

    logits: Tensor
    """As `sft.models.losses.head_loss` takes them."""


class TiedHead(NamedTuple):
    """A head that the library ties to the embeddings, and a cut unties: it starts as a copy."""

    head: str
    """The head's parameter, in the whole model."""

    embedding: str
    """The one that it is a copy of."""

    module: nn.Module
    """Holds the latter, on the meta device."""


class Net(nn.Module):
    """A model or a half of one, built by the library; its parameters know their names in the whole model."""

    def __init__(self, library_model: Any, family: Family, head: str) -> None:
        super().__init__()
        self.model = library_model
        self.family = family
        self.head = head
        self.whole_names: Dict[str, str] = {}
        """Own parameter name -> name in the whole model, such as `bert.encoder.layer.4.output.dense.ffn1.weight`."""
        self.untied: List[TiedHead] = []  # one or none; in a list, as a module's attribute would be its child
        """The head, if this net has one that the cut untied."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def whole_parameters(self) -> Dict[str, nn.Parameter]:
        """The parameters under their names in the whole model."""
        return {self.whole_names[name]: parameter for name, parameter in self.named_parameters()}

    def other_names(self) -> Dict[str, str]:
        """Of tied parameters: names in the whole model beside those of `whole_parameters`, which are the values."""
        known = {id(parameter): self.whole_names[name] for name, parameter in self.named_parameters()}
        every = self.model.named_parameters(remove_duplicate=False)
        return {name: known[id(parameter)] for name, parameter in every if f"model.{name}" not in self.whole_names}

    def _inputs(self, inputs: Dict[str, Tensor], lengths: List[int]) -> Dict[str, Any]:
        # A tokenizer may make token types for a model that has none, or only one.
        if getattr(self.model.config, "type_vocab_size", 0) < 2:
            inputs = {name: x_BS for name, x_BS in inputs.items() if name != "token_type_ids"}
        named: Dict[str, Any] = {name: x.to(self.device) for name, x in inputs.items()}
        padded_length = next(iter(named.values())).shape[1]
        named["attention_mask"] = attention_mask(lengths, padded_length).to(self.device)
        if self.family.decoder:
            named["use_cache"] = False
        return named

    def _head(self, inputs: Dict[str, Any], lengths: List[int], labels: Dict[str, Tensor]) -> Output:
        if self.head == "question-answering":
            output = self.model(**inputs)
            logits = torch.stack([output.start_logits, output.end_logits], dim=-1)
        elif self.head == "sequence-classification" and self.family.decoder:
            # The library would look for the last token in token ids, which the cloud does not have.
            hidden_BSD = self.model.base_model(**inputs)[0]
            last_B = torch.tensor(lengths, device=hidden_BSD.device) - 1
            logits = self.model.score(hidden_BSD[torch.arange(len(lengths), device=hidden_BSD.device), last_B])
        elif self.head == "multiple-choice":  # one choice each: which belong together is for who has the labels
            logits = self.model(**{name: x.unsqueeze(1) for name, x in inputs.items()}).logits
        else:
            logits = self.model(**inputs).logits
        if not labels:
            return Output(None, logits)
        labels = {name: label.to(logits.device) for name, label in labels.items()}
        return Output(head_loss(self.head, self.model.config.problem_type, logits, labels, lengths), logits)


class Whole(Net):
    """The model in one piece, decomposed or not."""

    def forward(self, inputs: Dict[str, Tensor], lengths: List[int], labels: Dict[str, Tensor]) -> Output:
        """`inputs`: (B, S) each, as in `sft.batch.Batch`; `labels` may be empty."""
        return self._head(self._inputs(inputs, lengths), lengths, labels)


class Net1(Net):
    """The edge's half: token ids to the activation that crosses the wire."""

    def forward(self, inputs: Dict[str, Tensor], lengths: List[int]) -> Tensor:
        """`inputs`: (B, S) each. Returns a_BSR (`sft`) or h_BSD (`sl`); rows of padding mean nothing.

        Raises UsageError where gradients were lost on the way.
        """
        named = self._inputs(inputs, lengths)
        try:
            a: Tensor = self.model(**named)[0]
        except Reached as reached:
            a = reached.x
            trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
            if trains and not a.requires_grad:
                raise UsageError(
                    "the model is cut inside a block, which reentrant gradient checkpointing cannot leave; enable "
                    'checkpointing with the arguments {"use_reentrant": False}'
                ) from None
        return a.reshape(*named["attention_mask"].shape, -1)


class Net2(Net):
    """The cloud's half: the activation to loss and logits."""

    def __init__(self, library_model: Any, family: Family, head: str, entry: nn.Module, width: int) -> None:
        super().__init__(library_model, family, head)
        self.entry = entry
        self.width = width
        """R for `sft`, D for `sl`."""

    def forward(self, a_BSR: Tensor, lengths: List[int], labels: Dict[str, Tensor]) -> Output:
        """`a_BSR` on the device of the parameters; `labels` may be empty."""
        return self._head(self._inputs({"inputs_embeds": self.entry(a_BSR)}, lengths), lengths, labels)

    def hidden(self, a_BSR: Tensor, lengths: List[int]) -> Any:
        """Of a body: the library's own output, `last_hidden_state` (B, S, D) and, where it has a pooler, its output."""
        return self.model(**self._inputs({"inputs_embeds": self.entry(a_BSR)}, lengths))
