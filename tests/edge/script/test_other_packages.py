"""Optimizers of other packages than torch, and torch's Adafactor: as on one machine, over both halves."""

from __future__ import annotations

import io
from typing import Any, Callable, Dict, List

import pytest
import torch
from support.script import Wire, assert_same_training, batches, one_machine, tiny_model, wrap
from torch import nn
from transformers.optimization import Adafactor

from sft.errors import UsageError
from sft.models import Cut
from sft.v1 import split_training_pb2 as pb

Make = Callable[[Any], torch.optim.Optimizer]

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")


def lion(model: Any) -> torch.optim.Optimizer:
    module = pytest.importorskip("lion_pytorch")
    made: torch.optim.Optimizer = module.Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
    return made


def torch_adafactor(model: Any) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Adafactor"):
        pytest.skip("this torch has no Adafactor")
    return torch.optim.Adafactor(model.parameters(), lr=1e-2)


def adafactor(**options: Any) -> Make:
    return lambda model: Adafactor(
        model.parameters(), lr=1e-3, relative_step=False, **{"scale_parameter": False, "eps": (1e-6, 1e-3), **options}
    )


def schedule_free(name: str, **options: Any) -> Make:
    def make(model: Any) -> torch.optim.Optimizer:
        module = pytest.importorskip("schedulefree")
        made: torch.optim.Optimizer = getattr(module, name)(model.parameters(), **options)
        return made

    return make


def of_bitsandbytes(name: str, **options: Any) -> Make:
    def make(model: Any) -> torch.optim.Optimizer:
        module = pytest.importorskip("bitsandbytes")
        eps = {} if "Lion" in name else {"eps": 1e-3}
        made: torch.optim.Optimizer = getattr(module.optim, name)(model.parameters(), lr=1e-3, **eps, **options)
        return made

    return make


FREE = [
    pytest.param(schedule_free("AdamWScheduleFree", lr=1e-2, eps=1e-3, warmup_steps=3, weight_decay=0.1), id="adamw"),
    pytest.param(schedule_free("SGDScheduleFree", lr=1e-1, warmup_steps=2), id="sgd"),
    pytest.param(schedule_free("RAdamScheduleFree", lr=1e-2, eps=1e-3, silent_sgd_phase=False), id="radam"),
]

OTHERS = [
    pytest.param(torch_adafactor, id="torch-adafactor"),
    pytest.param(adafactor(), id="adafactor"),
    pytest.param(adafactor(scale_parameter=True, beta1=0.9, weight_decay=0.1), id="adafactor-scaled"),
    pytest.param(of_bitsandbytes("AdamW"), id="bnb-adamw"),
    pytest.param(of_bitsandbytes("PagedAdam32bit"), id="bnb-paged-adam-32"),
]


def train(model: Any, optimizer: Any, data: List[Dict[str, torch.Tensor]]) -> None:
    for batch in data:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def script(model: Any, optimizer: Any) -> None:
    for part in (slice(0, 2), slice(2, 5)):
        train(model, optimizer, batches(5, model)[part])
        for group in optimizer.param_groups:
            group["lr"] *= 0.5


@pytest.mark.parametrize("make", OTHERS)
def test_as_on_one_machine(make: Make) -> None:
    assert_same_training(script, make, tolerance=2e-6)


def test_lion() -> None:
    """It goes by signs, also those of gradients that are nothing but rounding, as that of a key's bias."""
    assert_same_training(script, lion, tolerance=6e-4)


def wider() -> Any:
    """Matrices that are large enough for eight bits, in both halves."""
    return tiny_model(hidden_size=64, intermediate_size=96)


EIGHT = [
    pytest.param(of_bitsandbytes("AdamW8bit"), id="adamw8bit"),
    pytest.param(of_bitsandbytes("AdamW", optim_bits=8, is_paged=True), id="as-trainer-makes-it"),
    pytest.param(of_bitsandbytes("PagedLion8bit"), id="paged-lion8bit"),
]


@pytest.mark.parametrize("make", EIGHT[:2])
def test_eight_bits(make: Make) -> None:
    assert_same_training(script, make, model=wider(), tolerance=1e-4)


ON_EDGE, ON_CLOUD = "bert.embeddings.word_embeddings.weight", "bert.encoder.layer.2.output.dense.weight"


def now(model: Any) -> Dict[str, torch.Tensor]:
    """Two of its weights, and what it answers."""
    tensors = dict(model.named_parameters())
    if ON_CLOUD not in tensors:
        tensors = model.state_dict()
    model.eval()
    (batch,) = batches(1, model, labels=False)
    with torch.no_grad():
        logits = model(**batch).logits
    model.train()
    return {"edge": tensors[ON_EDGE].detach().clone(), "cloud": tensors[ON_CLOUD].detach().clone(), "logits": logits}


@pytest.mark.first_only
@pytest.mark.parametrize("make", FREE)
def test_both_halves_are_switched(make: Make) -> None:
    seen: List[Dict[str, torch.Tensor]] = []

    def script(model: Any, optimizer: Any) -> Any:
        optimizer.train()
        train(model, optimizer, batches(6, model)[:3])
        points = [now(model)]
        for mode in (optimizer.eval, optimizer.eval, optimizer.train, optimizer.eval):
            mode()
            points.append(now(model))
        optimizer.train()
        model(**batches(1, model)[0])  # nobody goes backward
        train(model, optimizer, batches(6, model)[3:])
        optimizer.eval()
        seen[:] = points
        return [*points, now(model)]

    assert_same_training(script, make, tolerance=2e-6)
    trains, averaged, again, back, last = seen
    for which in ("edge", "cloud", "logits"):
        assert not trains[which].allclose(averaged[which], atol=1e-5), which
        torch.testing.assert_close(back[which], trains[which], rtol=0, atol=1e-5)
        assert again[which].equal(averaged[which])
        torch.testing.assert_close(last[which], averaged[which], rtol=0, atol=1e-5)


def test_modes_change_nothing_of_other_optimizers() -> None:
    model = tiny_model()
    wire = Wire()
    with wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), transport=wire) as optimizer:
        optimizer.eval()
        train(model, optimizer, batches(1, model))
        optimizer.train()
        model.state_dict()
    assert not any(message.HasField("averaged") for message in wire.sent)


def test_what_does_not_go_with_a_switch() -> None:
    model = tiny_model()
    made = schedule_free("AdamWScheduleFree", lr=1e-2)(model)
    data = batches(2, model)
    with wrap(model, made) as optimizer:
        model(**data[0]).loss.backward()
        with pytest.raises(UsageError, match=r"in eval mode: call optim\.train\(\)"):
            optimizer.step()
        optimizer.train()
        logits = model(data[0]["input_ids"], data[0]["attention_mask"]).logits
        optimizer.eval()
        with pytest.raises(UsageError, match="before a state was loaded, or the optimizer's mode was switched"):
            logits.sum().backward()
        optimizer.train()
        train(model, optimizer, data)  # the session has not suffered


@pytest.mark.parametrize("ends_in", ["train", "eval"])
def test_a_switch_of_the_wrapped_optimizer_alone_is_refused(ends_in: str) -> None:
    model = tiny_model()
    made: Any = schedule_free("AdamWScheduleFree", lr=1e-2)(model)
    data = batches(3, model)
    with wrap(model, made) as optimizer:
        optimizer.train()
        train(model, optimizer, data[:2])
        model(**data[2]).loss.backward()
        made.eval()
        for crosses in (lambda: model(**data[2]), optimizer.step, model.state_dict, optimizer.state_dict):
            with pytest.raises(UsageError, match=r"call train\(\)/eval\(\) of the SFTOptimizer") as caught:
                crosses()
            assert "\n" not in str(caught.value)
        getattr(optimizer, ends_in)()
        optimizer.state_dict()
        model.state_dict()
        optimizer.train()
        train(model, optimizer, data[2:])


class OlderCloud(Wire):
    """It knows no lists with None."""

    def open_session(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        response = super().open_session(request)
        response.takes_mixed = False
        return response


def test_a_cloud_that_knows_no_none_among_numbers() -> None:
    model = tiny_model()
    torch_adafactor(model)  # or it is skipped
    other = torch.optim.Adafactor(model.parameters(), lr=1e-2, eps=(None, 1e-2))
    says = "takes no None among the numbers of an optimizer's setting"
    with pytest.raises(UsageError, match=says) as caught:
        wrap(model, other, transport=OlderCloud())
    assert "\n" not in str(caught.value)
    made = torch_adafactor(model)
    wire = OlderCloud()
    with wrap(model, made, transport=wire) as optimizer:
        assert not any("eps" in group.arguments for group in wire.requests[0].optimizer.groups)
        train(model, optimizer, batches(1, model))
        model(**batches(1, model)[0]).loss.backward()
        optimizer.param_groups[0]["eps"] = (None, 1e-2)
        with pytest.raises(UsageError, match=says):
            optimizer.step()
    model = tiny_model()
    wire = Wire()
    groups: Any = [{"params": [p]} for p in model.parameters()]
    groups[1]["eps"] = (None, 1e-2)
    with wrap(model, torch.optim.Adafactor(groups, lr=1e-2), transport=wire):
        assert all("eps" in group.arguments for group in wire.requests[0].optimizer.groups)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.1 opens its own files so
@pytest.mark.one_in(3)
@pytest.mark.parametrize("make", [*OTHERS[:3], pytest.param(lion, id="lion"), *FREE, *EIGHT])
@pytest.mark.parametrize("saves", ["train", "eval"])
def test_a_run_goes_on_in_another_session(make: Make, saves: str, request: pytest.FixtureRequest) -> None:
    is_free = request.node.callspec.params["make"] in [parameter.values[0] for parameter in FREE]
    if saves == "eval" and not is_free:
        pytest.skip("it has no modes")
    ends = []
    checkpoint: Any = None
    for again in (False, True):
        model = wider()
        data = batches(6, model)
        with wrap(model, make(model)) as optimizer:
            optimizer.train()
            if again:
                model.load_state_dict(checkpoint["model"])
                optimizer.load_state_dict(checkpoint["optimizer"])
            else:
                train(model, optimizer, data[:3])
                getattr(optimizer, saves)()
                checkpoint = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            optimizer.train()
            train(model, optimizer, data[3:])
            optimizer.eval()
            ends.append(model.state_dict())
    assert all(ends[1][name].equal(tensor) for name, tensor in ends[0].items())


def test_what_the_cloud_cannot_be_told() -> None:
    model = tiny_model()
    for made, says in (
        (Adafactor(model.parameters()), r"make it with scale_parameter=False, relative_step=False, lr=1e-3"),
        (of_bitsandbytes("AdamW8bit", min_8bit_size=16)(model), r"AdamW8bit keeps settings .*'args'"),
        (of_bitsandbytes("RMSprop")(model), r"RMSprop is none that it knows: use one of torch.optim's, transformers'"),
    ):
        with pytest.raises(UsageError, match=says) as caught:
            wrap(model, made, server="127.0.0.1:1")
        assert "\n" not in str(caught.value)
    decoupled = pytest.importorskip("lion_pytorch").Lion(model.parameters(), decoupled_weight_decay=True)
    with pytest.raises(UsageError, match="'decoupled_wd'"):
        wrap(model, decoupled, server="127.0.0.1:1")


def test_a_rate_that_lion_does_not_begin_with() -> None:
    model = tiny_model()
    made = lion(model)
    made.param_groups[0]["lr"] = 0.0
    with pytest.raises(UsageError, match=r"optimizer Lion: it refuses a setting of .*'lr': 0\.0"):
        wrap(model, made, server="127.0.0.1:1")


def test_a_model_saved_in_eval_mode_is_the_average() -> None:
    model = tiny_model()
    made: Make = schedule_free("AdamWScheduleFree", lr=1e-2, eps=1e-3)
    whole = one_machine(model, Cut("sft", 2, 4))
    plain: Any = made(whole)
    plain.train()
    train(whole, plain, batches(3, whole))
    plain.eval()
    with wrap(model, made(model)) as optimizer:
        optimizer.train()
        train(model, optimizer, batches(3, model))
        optimizer.eval()
        saved = model.state_dict()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(saved[name], parameter.detach(), rtol=0, atol=2e-6)
