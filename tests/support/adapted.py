"""Models with peft's adapters, and a script that trains them."""

from __future__ import annotations

from typing import Any, Dict, List

import torch
from peft import LoraConfig, get_peft_model
from support.script import batches, tiny_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

STEPS = 4
TASKS = {
    "sequence-classification": "SEQ_CLS",
    "question-answering": "QUESTION_ANS",
    "causal-lm": "CAUSAL_LM",
    "token-classification": "TOKEN_CLS",
    "masked-lm": None,  # peft knows none
}


def adapted(family: str = "bert", head: str = "sequence-classification", **settings: Any) -> Any:
    """A peft model whose adapters have learned something already."""
    base = tiny_model(family, head)
    values: Dict[str, Any] = {"task_type": TASKS[head], "r": 4, "lora_alpha": 8, **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(base, LoraConfig(fan_in_fan_out=family == "gpt2", **values))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "lora_embedding_A" in name:
                    parameter.normal_(0, 0.1)
    return model.train()


def script(model: Any, optimizer: Any, travels: bool = True) -> List[Tensor]:
    """Accumulates, clips, looks at the model in between."""
    seen = []
    data = batches(2 * STEPS, model.get_base_model() if hasattr(model, "get_base_model") else model)
    for index, batch in enumerate(data):
        labels = {} if travels else {"labels": batch.pop("labels")}
        output = model(**batch)
        if travels:
            loss = output.loss
        elif output.logits.dim() == 3:
            loss = cross_entropy(output.logits[:, :-1].flatten(0, 1), labels["labels"][:, 1:].flatten())
        else:
            loss = cross_entropy(output.logits, labels["labels"])
        (loss / 2).backward()
        if index % 2:
            seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.3).detach())
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                seen.append(model(**batch, **labels).loss)
            model.train()
    return seen


def trained(model: Any) -> List[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model), lr=1e-1, momentum=0.9)
