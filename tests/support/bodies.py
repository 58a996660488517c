"""Modules of people's own around a base model of transformers."""

from __future__ import annotations

import copy
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
from support.tiny import tiny_config
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForSequenceClassification, BertModel, BertPreTrainedModel

from sft import SFTOptimizer

B, S, C, D = 4, 7, 3, 32
LENGTHS = (7, 3, 5, 6)
CUT: Dict[str, Any] = {"split_layer": 2, "split_rank": 8}


def config_of(family: str, **overrides: Any) -> Any:
    """Three blocks, no dropout, and weights that all matter."""
    config = tiny_config(family, 3, initializer_range=0.2, **overrides)
    for name in vars(config):
        if name in ("dropout", "attention_dropout") or name.endswith(("pdrop", "dropout_prob", "_dropout")):
            setattr(config, name, 0.0)
    return config


class Mean(nn.Module):
    """A masked mean over tokens and a head; the loss beside the logits where labels are given."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.encoder = AutoModel.from_config(config)
        self.drop, self.norm = nn.Dropout(0.0), nn.BatchNorm1d(D)
        self.classifier = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, C))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Optional[Tensor] = None) -> Any:
        mask = attention_mask.unsqueeze(-1).float()
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        logits = self.classifier(self.norm(self.drop(pooled)))
        if labels is None:
            return logits
        loss_fct = nn.CrossEntropyLoss()
        return loss_fct(logits.view(-1, C), labels.view(-1)), logits


class First(nn.Module):
    """The first token's state, by the tuple that older scripts take."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"bert": AutoModel.from_config(config)})
        self.out = nn.Linear(D, C)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.inner["bert"](ids, mask, return_dict=False)[0]
        return self.out(functional.relu(hidden[:, 0]))


class Pooled(nn.Module):
    """The library's pooler, and no mask."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.bert, self.out = BertModel(config), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Any:
        return {"scores": self.out(self.bert(x).pooler_output)}


class Tagger(BertPreTrainedModel):
    """A class of one's own of the library's kind, with a row for each token."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(D, C)
        self.post_init()

    def forward(
        self, input_ids: Optional[Tensor] = None, attention_mask: Optional[Tensor] = None,
        labels: Optional[Tensor] = None, return_dict: Optional[bool] = None,
    ) -> Any:  # fmt: skip
        outputs = self.bert(input_ids, attention_mask=attention_mask, return_dict=return_dict)
        logits = self.classifier(outputs[0])
        loss = None
        if labels is not None:
            loss = nn.CrossEntropyLoss()(logits.view(-1, C), labels.view(-1))
        return {"loss": loss, "logits": logits}


def replaced_head(config: Any) -> Any:
    """A library model with a head of one's own in the place of its own."""
    model = AutoModelForSequenceClassification.from_config(config)
    model.classifier = nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.Linear(16, C))
    return model


def made(make: Any, family: str = "bert", seed: int = 0, **overrides: Any) -> Any:
    """The same weights on both sides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(config_of(family, num_labels=C, **overrides)).train()


def batches(count: int, padded: bool = True) -> Iterator[Tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Ids, mask, a label for each text, and one for each token."""
    for index in range(count):
        draw = torch.Generator().manual_seed(index)
        mask = (torch.arange(S)[None] < torch.tensor(LENGTHS)[:, None]).long() if padded else torch.ones(B, S).long()
        ids = torch.randint(5, 40, (B, S), generator=draw) * mask
        tags = torch.randint(0, C, (B, S), generator=draw).masked_fill(mask == 0, -100)
        yield ids, mask, torch.randint(0, C, (B,), generator=draw), tags


def one_machine(model: nn.Module, **options: Any) -> Any:
    """What both halves of a model compute, in one process."""
    whole = copy.deepcopy(model)
    SFTOptimizer.decompose(whole, **{**CUT, **options})
    return whole


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
