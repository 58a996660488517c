"""What transformers makes of exports in its own process: pipelines, base models, training, and saving again."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Iterator

import pytest
import torch
import transformers
from support.opened import code_copied_to

from sft.models import Cut
from sft_edge.model_files import DENSE, FACTORED

CUT = Cut("sft", 2, 4)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[None]:
    with code_copied_to(tmp_path / "modules"):
        yield


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("family", "form"), [("bert", DENSE), ("distilbert", FACTORED), ("gpt2", FACTORED)])
def test_a_pipeline_and_saving_again(write: Callable[..., Path], tmp_path: Path, family: str, form: str) -> None:
    trust = {"trust_remote_code": True}
    # Under names of their own: older releases know code by its directory's name, and this process stays.
    to, second = tmp_path / f"first-{family}", tmp_path / f"second-{family}"
    write(form, family=family, cut=CUT).rename(to)
    first = transformers.pipeline("text-classification", str(to), device="cpu", **trust)
    texts = ["a good film", "the worst plot of all in it"]
    told = first(texts, batch_size=2, truncation=True)
    assert {one["label"] for one in told} <= {"negative", "positive"}
    first.save_pretrained(str(second))
    assert (second / "modeling_sft.py").exists()
    again = transformers.pipeline("text-classification", str(second), device="cpu", **trust)
    assert again(texts, batch_size=2, truncation=True) == told


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", [DENSE, FACTORED])
@pytest.mark.parametrize("family", ["bert", "opt"])
def test_the_base_model_alone(write: Callable[..., Path], tmp_path: Path, family: str, form: str) -> None:
    """Its layer is the trained one, and not a new one of random numbers; also after it was saved again."""
    trust = {"trust_remote_code": True}
    to, second = tmp_path / f"base-{family}-{form}", tmp_path / f"again-{family}-{form}"
    write(form, family=family, cut=CUT).rename(to)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(str(to), **trust).eval()
    base, report = transformers.AutoModel.from_pretrained(str(to), output_loading_info=True, **trust)
    assert not report["missing_keys"]
    base.save_pretrained(str(second))
    again = transformers.AutoModel.from_pretrained(str(second), **trust)
    ids = torch.randint(5, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inside, *alone = (model.eval()(input_ids=ids) for model in (whole.base_model, base, again))
    assert all(one.last_hidden_state.equal(inside.last_hidden_state) for one in alone)


@pytest.mark.usefixtures("here")
def test_a_pipeline_of_features(write: Callable[..., Path], tmp_path: Path) -> None:
    to = write(FACTORED, cut=CUT).rename(tmp_path / "features")
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(str(to), trust_remote_code=True).eval()
    pipe = transformers.pipeline("feature-extraction", str(to), device="cpu", trust_remote_code=True)
    with torch.no_grad():
        inside = whole.base_model(**pipe.tokenizer("a good film", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(torch.tensor(pipe("a good film")), inside)


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "opt", "llama"])
@pytest.mark.parametrize("residual", ["none", "low-rank"])
def test_it_can_be_trained_further(write: Callable[..., Path], family: str, residual: str) -> None:
    to = write(FACTORED, family=family, cut=Cut("sft", 2, 4, residual))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(to), trust_remote_code=True).train()
    ids = torch.randint(5, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    factors = [parameter for name, parameter in model.named_parameters() if ".ffn2." in name]
    assert len(factors) == 1
    assert factors[0].grad is not None
    assert factors[0].grad.abs().max() > 0
