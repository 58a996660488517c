"""Models that return more than one tensor, or have tied weights, train split as they do on one machine."""

from __future__ import annotations

import io
import logging
import math
from typing import Any

import pytest
import torch
from support.closeness import assert_close, assert_same_state
from support.hosting_script import ScriptCloud
from support.own_models import B, D, Feed, Gpt, S, V, Vae, tokens, whole_model
from torch import nn
from torch.nn import functional

from sft import SFTOptimizer
from sft.errors import UsageError

AT, RANK, STEPS = "body.layers.1.feed.down", 3, 4


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)


def seeded(make: Any = Gpt, **options: Any) -> Any:
    torch.manual_seed(0)
    return make(**options)


def host(model: nn.Module, at: str = AT) -> ScriptCloud:
    return ScriptCloud(model, two_groups(model), split_at=at, split_rank=RANK)


def wrap(model: nn.Module, cloud: ScriptCloud, at: str = AT) -> SFTOptimizer:
    return SFTOptimizer(two_groups(model), role="edge", model=model, server=cloud.address, split_at=at, split_rank=RANK)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int = 0, last: int = STEPS) -> list[torch.Tensor]:
    """Clipped, and in every step two micro-batches and an evaluation: all that comes out."""
    data, told = tokens(2 * last), []
    for step in range(2 * first, 2 * last):
        ids, targets = data["ids"][step], data["targets"][step]
        logits, loss = model(ids, targets)
        assert logits.shape == (B, S, V)
        (loss / 2).backward()
        told += [loss.detach(), logits.detach()]
        if step % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.eval()
            with torch.no_grad():
                logits, loss = model(ids, targets=targets)
                told += [logits, loss]
                logits, nothing = model(ids[:, : S - 1])
                assert nothing is None
                told.append(logits)
            model.train()
    return told


@pytest.mark.parametrize("options", [{}, {"shortens": False, "is_tied": False}], ids=["last, tied", "all, untied"])
def test_a_language_model_that_returns_logits_and_loss(options: Any, caplog: pytest.LogCaptureFixture) -> None:
    whole = whole_model(seeded(**options), AT, RANK)
    expected = train(whole, two_groups(whole))
    model = seeded(**options)
    caplog.set_level(logging.INFO, "sft_edge")
    with host(seeded(**options)) as cloud, wrap(model, cloud) as optimizer:
        assert_close(train(model, optimizer), expected)
        assert_same_state(model, whole)
        assert cloud.model.state_dict().keys() < whole.state_dict().keys()
    told = "'head.weight' is trained apart from 'body.tokens.weight', of which it begins as a copy"
    assert [record.message for record in caplog.records].count(told) == (0 if options else 1)


@pytest.mark.first_only
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_that_is_compiled_runs_uncompiled(when: str) -> None:
    """As nanoGPT does."""
    told = []
    for compiles in (False, True):
        model = calls = seeded()
        upper = seeded()
        if compiles and when == "before":
            calls = torch.compile(model, backend="eager")
            upper = torch.compile(upper, backend="eager")
        with host(upper) as cloud, wrap(calls, cloud) as optimizer:
            if compiles and when == "after":
                calls = torch.compile(model, backend="eager")
            told.append(train(calls, optimizer, last=2))
        assert upper(torch.ones(B, S, RANK)).shape == (B, 1, V), "afterwards, too"
    assert_close(*told)


def test_a_run_goes_on_in_another_session() -> None:
    """A checkpoint's weights are loaded once the model is cut; they are those of both halves."""
    whole = whole_model(seeded(), AT, RANK)
    expected = train(whole, two_groups(whole))
    model, saved = seeded(), io.BytesIO()
    with host(seeded()) as cloud, wrap(model, cloud) as optimizer:
        told = train(model, optimizer, last=2)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved)
    again = seeded()
    with host(seeded()) as cloud, wrap(again, cloud) as optimizer:
        again.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        told += train(again, optimizer, first=2)
        assert_same_state(again, whole)
    assert_close(told, expected)


class Heads(nn.Module):
    """Two heads above the cut that are one parameter, and one module by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.feed = nn.Embedding(V, D), Feed()
        self.norm = self.last = nn.BatchNorm1d(D)
        self.head, self.out = nn.Linear(D, V), nn.Linear(D, V, bias=False)
        self.head.weight = self.out.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.feed(self.tokens(ids)).mean(1))
        logits: torch.Tensor = self.head(h) + self.out(h)
        return logits


def test_what_is_tied_above_the_cut_keeps_all_of_its_names() -> None:
    """A checkpoint goes to models that are cut, with all names or, as earlier releases wrote them, with one of each,
    and to those that are whole, tied or not."""
    data = tokens(1)
    whole = whole_model(seeded(Heads), "feed.down", RANK)
    model = seeded(Heads)
    with host(seeded(Heads), "feed.down") as cloud, wrap(model, cloud, "feed.down") as optimizer:
        for one, its in ((whole, two_groups(whole)), (model, optimizer)):
            functional.cross_entropy(one(data["ids"][0]), data["ids"][0, :, 0]).backward()
            its.step()
        assert_same_state(model, whole)
        state = model.state_dict()
        untied = whole_model(seeded(Heads), "feed.down", RANK)
        untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
        untied.load_state_dict(state)
        assert untied.head.weight.equal(untied.out.weight)
        doubled = {name: x * 2 for name, x in state.items()}
        lacking = {"out.weight": "head.weight", "last.running_mean": "norm.running_mean"}
        for names in ((), lacking.keys(), lacking.values()):
            model.load_state_dict(state)
            model.load_state_dict({name: x for name, x in doubled.items() if name not in names})
            assert all(x.equal(doubled[name]) for name, x in model.state_dict().items())
        diverged = {**state, "head.weight": state["head.weight"] * math.nan}
        for its_other_name in (diverged["head.weight"], diverged["head.weight"].clone()):
            model.load_state_dict({**diverged, "out.weight": its_other_name})
            assert model.state_dict()["out.weight"].isnan().all()
        model.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"out.weight and head.weight are one parameter, and differ"):
            model.load_state_dict({**state, "out.weight": state["out.weight"] + 1}, strict=False)
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "head.weight"'):
            model.load_state_dict(
                {name: x for name, x in state.items() if not name.endswith(("head.weight", "out.weight"))}
            )


def test_values_from_below_the_cut_are_returned_by_the_edge() -> None:
    x = torch.rand(STEPS, B, 12, generator=torch.Generator().manual_seed(1))

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        told = []
        for step in range(STEPS):
            optimizer.zero_grad()
            recon, mu, logvar = model(x[step])
            loss = functional.binary_cross_entropy(recon, x[step], reduction="sum")
            loss = loss - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
            loss.backward()
            optimizer.step()
            told += [loss.detach(), mu.detach()]
        return told

    whole = whole_model(seeded(Vae), "out", RANK)
    expected = run(whole, two_groups(whole))
    model = seeded(Vae)
    with host(seeded(Vae), "out") as cloud, wrap(model, cloud, "out") as optimizer:
        assert_close(run(model, optimizer), expected)
        assert_same_state(model, whole)


def test_what_an_older_cloud_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = seeded(), tokens(1)
    with host(seeded()) as cloud, wrap(model, cloud) as optimizer:
        monkeypatch.setattr(optimizer._role._cross.link, "takes_variants", False)
        assert model(data["ids"][0])[0].shape == (B, 1, V)
        with pytest.raises(Exception, match="the cloud's release takes one set of this model's optional arguments"):
            model(data["ids"][0], data["targets"][0])
        monkeypatch.undo()
        model(data["ids"][0], data["targets"][0])[1].backward()
        optimizer.step()


class Changed(nn.Module):
    """What comes from the cloud is changed in place on the edge, by the model or by its script."""

    def __init__(self, inside: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.inside = inside

    def forward(self, x: torch.Tensor) -> Any:
        h = self.c(self.b(self.a(x)))
        if self.inside:
            h += x
            h.masked_fill_(x > 0, 0.0)
        return h


@pytest.mark.parametrize("inside", [True, False])
def test_what_came_from_the_cloud_is_changed_in_place(inside: bool) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        told = []
        for step in range(STEPS):
            y = model(x[step])
            y /= 2
            y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            told.append(y.detach())
        return told

    x = torch.rand(STEPS, B, 6, generator=torch.Generator().manual_seed(1)) - 0.5
    whole = whole_model(seeded(Changed, inside=inside), "b", RANK)
    expected = run(whole, two_groups(whole))
    model = seeded(Changed, inside=inside)
    with host(seeded(Changed, inside=inside), "b") as cloud, wrap(model, cloud, "b") as optimizer:
        assert_close(run(model, optimizer), expected)
        assert_same_state(model, whole)


def test_a_loss_of_what_stayed_on_the_edge_alone() -> None:
    model, x = seeded(Vae), torch.rand(B, 12)
    with host(seeded(Vae), "out") as cloud, wrap(model, cloud, "out") as optimizer:
        recon, mu, _ = model(x)
        mu.sum().backward(retain_graph=True)
        with pytest.raises(UsageError, match="through the cloud since the last step; a loss of what stays on the edge"):
            optimizer.step()
        (mu.sum() + 0 * recon.sum()).backward()
        optimizer.step()
        model(x)[0].sum().backward()
        optimizer.zero_grad()
        model(x)[1].sum().backward()
        with pytest.raises(UsageError, match=r"they were zeroed after the last backward\(\) through it"):
            optimizer.step()


class Normed(nn.Module):
    """Norms on both sides, one dropout that both use, and another in what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.low, self.high = nn.Linear(6, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.b(self.drop(self.low(self.a(x))))
        return self.head(self.drop(self.high(h)))


def at_rest(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    model.drop.eval()
    model.head.eval()


@pytest.mark.parametrize("when", ["before it is cut", "in the loop"])
def test_modules_above_the_cut_are_in_the_modes_that_the_script_puts_them_into(when: str) -> None:
    x = torch.rand(STEPS, B, 6, generator=torch.Generator().manual_seed(1))

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        told = []
        for step in range(STEPS):
            if when == "in the loop":
                model.train()
                at_rest(model)
            optimizer.zero_grad()
            y = model(x[step])
            y.square().sum().backward()
            optimizer.step()
            told.append(y.detach())
        return told

    whole, model = whole_model(seeded(Normed), "b", RANK), seeded(Normed)
    if when != "in the loop":
        at_rest(whole)
        at_rest(model)
    expected = run(whole, two_groups(whole))
    with host(seeded(Normed), "b") as cloud, wrap(model, cloud, "b") as optimizer:
        assert_close(run(model, optimizer), expected)
        assert_same_state(model, whole)
        model.head.requires_grad_(False)  # of stand-ins
        with pytest.raises(UsageError, match=r"requires_grad of 'head\..*weight' has become False since the model was"):
            run(model, optimizer)
        model.head.requires_grad_()
        with pytest.raises(UsageError, match="this parameter is on the cloud"):
            torch.optim.SGD(model.head.parameters(), lr=0.1)
        with torch.no_grad():
            assert model.eval()(x[0]).equal(model(x[0]))
            model.head.train()  # to see how sure it is
            assert not model(x[0]).equal(model(x[0]))
        optimizer._role._cross.takes_modes = False
        with pytest.raises(UsageError, match=r"'head' is not in the model's mode, .*: update the cloud"):
            model(x[0])


class Detached(nn.Module):
    """Nothing below learns from the loss; of two heads one a call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.one, self.other = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, other: Any = None) -> torch.Tensor:
        h = self.b(self.a(x)).tanh().detach()
        return self.one(h) if other is None else self.other(h)


@pytest.mark.parametrize("to_none", [True, False])
def test_what_gets_no_gradient_is_left_alone(to_none: bool) -> None:
    """Neither decayed nor moved by what came before, on either side; with zeros it is, as on one machine."""
    x = torch.rand(STEPS, B, 6, generator=torch.Generator().manual_seed(1))

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        told = []
        for step in range(STEPS):
            y = model(x[step]) if step % 2 else model(x[step], other=True)
            y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
            told.append(y.detach())
        return told

    whole, model = whole_model(seeded(Detached), "b", RANK), seeded(Detached)
    before = model.a.weight.detach().clone()
    expected = run(whole, two_groups(whole))
    with host(seeded(Detached), "b") as cloud, wrap(model, cloud, "b") as optimizer:
        assert_close(run(model, optimizer), expected)
        assert_same_state(model, whole)
        assert model.a.weight.equal(before)
