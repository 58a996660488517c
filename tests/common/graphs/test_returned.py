"""What a model returns besides one tensor, and what it returns where some arguments are not given."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import pytest
import torch
from support.own_models import Gpt, S, V, Vae, tokens, whole_model
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from sft.errors import CutError
from sft.graphs.cut import GraphCut, cut
from sft.models.decompose import decompose

B, D, R = 4, 8, 3
AT = "body.layers.1.feed.down"


def halves(model: nn.Module, name: str) -> Tuple[GraphCut, GraphCut]:
    lower, upper = (cut(copy.deepcopy(model), name, R) for _ in range(2))
    factors, bias = decompose(lower.layer.weight.T, R), lower.layer.bias.detach().clone()
    lower.keep_net_1().weight.data.copy_(factors.u_FR.T)
    ffn_2, ffn_3 = upper.keep_net_2()
    ffn_2.weight.data.copy_(factors.s_RR.T)
    ffn_3.weight.data.copy_(factors.v_RD.T)
    ffn_3.bias.data.copy_(bias)
    return lower, upper


class Both:
    """The halves as one model, and what crossed."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.lower, self.upper = halves(model, name)
        self.crossed: List[Tuple[int, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def cross(a: Tensor, variant: int) -> Tensor:
            assert a.shape[-1] == R
            y = self.upper.run_net_2(a, variant)
            self.crossed.append((variant, tuple(y.shape)))
            return y

        return self.lower.run(cross, args, kwargs)


def seeded(make: Any, *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return make(*args, **options)


def gradients(*models: nn.Module) -> Any:
    return {name: p.grad for model in models for name, p in model.named_parameters()}


@pytest.mark.parametrize("returns", ["tuple", "dict"])
@pytest.mark.parametrize(("shortens", "is_tied"), [(True, True), (False, False)])
def test_a_loss_that_is_computed_where_there_are_targets(returns: str, shortens: bool, is_tied: bool) -> None:
    options = {"returns": returns, "shortens": shortens, "is_tied": is_tied}
    whole = whole_model(seeded(Gpt, **options), AT, R)
    both = Both(seeded(Gpt, **options), AT)
    ids, targets = tokens(1)["ids"][0], tokens(1)["targets"][0]
    got, expected = both(ids, targets), whole(ids, targets)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert type(got) is type(expected)
    for output in (got, expected):
        (output["loss"] if returns == "dict" else output[1]).backward()
    torch.testing.assert_close(gradients(both.lower.model, both.upper.model), gradients(whole), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(both(ids=ids[:, :-1]), whole(ids[:, :-1]), rtol=0, atol=0)
    assert both.crossed == [(int(shortens), (B, S, V)), (0, (B, 1 if shortens else S - 1, V))]
    with pytest.raises(AssertionError, match="limit"):
        both(torch.zeros(1, S + 1, dtype=torch.int64))


def test_a_tied_head_becomes_a_parameter_of_its_own() -> None:
    model = seeded(Gpt)
    before = model.head.weight
    lower, upper = halves(model, AT)
    assert model.head.weight is before is model.body["tokens"].weight, "asked about, it is as it was"
    assert [str(tied) for tied in lower.tied] == [
        "'head.weight' is trained apart from 'body.tokens.weight', of which it begins as a copy"
    ]
    assert "body.tokens.weight" in lower.model.state_dict()
    assert "head.weight" not in lower.model.state_dict()
    assert "body.tokens.weight" not in upper.model.state_dict()
    assert upper.upper_names >= {"head.weight", "norm.weight"}
    assert upper.upper_tensors()["head.weight"] is upper.model.get_parameter("head.weight")
    assert upper.upper_tensors()["head.weight"].equal(before)
    frozen = seeded(Gpt)
    frozen.head.weight.requires_grad_(False)
    assert not halves(frozen, AT)[1].model.get_parameter("head.weight").requires_grad


def test_a_tied_parameter_goes_with_the_group_of_its_first_name() -> None:
    assert cut(seeded(Gpt), AT, R).factor_names["body.tokens.weight"] == ["body.tokens.weight", "head.weight"]

    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.tokens, self.b = nn.Linear(D, V, bias=False), nn.Embedding(V, D), nn.Linear(D, D)
            self.tokens.weight = self.head.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.b(self.tokens(ids)))

    split = cut(HeadFirst(), "b", R)
    assert split.factor_names["head.weight"] == ["head.weight", "tokens.weight"]
    assert split.upper_names == {"head.weight"}
    split.keep_net_1()
    assert [*dict(split.model.named_parameters())] == ["tokens.weight", "b.ffn1.weight"]


def test_values_from_below_the_cut() -> None:
    whole, both = whole_model(seeded(Vae), "out", R), Both(seeded(Vae), "out")
    x = torch.rand(B, 12)
    for model in (both, whole):
        recon, mu, logvar = model(x)
        (functional.binary_cross_entropy(recon, x) + mu.square().sum() + logvar.sum()).backward()
    torch.testing.assert_close(both(x), whole(x), rtol=0, atol=0)
    torch.testing.assert_close(gradients(both.lower.model, both.upper.model), gradients(whole), rtol=1e-6, atol=1e-7)


class Pair(NamedTuple):
    y: Tensor
    other: Any


@dataclass
class Told:
    y: Tensor
    loss: Optional[Tensor] = None


class Returns(nn.Module):
    """Linear layers and whatever a test does with them."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(D, 2 * D), nn.Linear(2 * D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.scale = nn.Parameter(torch.rand(D))
        self.register_buffer("weights", torch.rand(D))
        self.drop, self.criterion = nn.Dropout(0.0), nn.MSELoss()
        self.relu, self.gru = nn.ReLU(inplace=True), nn.GRU(D, D)
        self.attention = nn.MultiheadAttention(D, 2)
        self.what = forward

    def forward(self, x: Tensor, y: Optional[Tensor] = None, z: Optional[Tensor] = None) -> Any:
        return self.what(self, x, y, z)


def above(m: Any, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(x)))


def in_place(m: Any, x: Tensor, *_: Any) -> Any:
    h = above(m, x)
    h.mul_(2)
    return h, m.criterion(h.view(-1), x.view(-1))


def summed_in_place(m: Any, x: Tensor, *_: Any) -> Any:
    """Losses and other values that are made anew."""
    h = above(m, x)
    loss = nn.functional.mse_loss(x, h)
    loss += m.criterion(x, h)
    loss += x.mean()
    both = x + h.view(x.shape[0], -1)
    both /= 2
    return h, loss, m.relu(both)


def changed_before(m: Any, x: Tensor, *_: Any) -> Any:
    s = m.d(x)
    s.mul_(2)
    return above(m, x) + m.relu(s), s


def masked(m: Any, x: Tensor, *_: Any) -> Any:
    """In place, with what does not cross."""
    h = above(m, x)
    before = h.sum()
    h.masked_fill_(x > 0, 0.0)
    return h, h * 2, before


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x, y, z: {"y": above(m, x), "x": x, "n": 3, "nested": [(None, x)]},
        lambda m, x, y, z: [h := above(m, x), h.softmax(-1), x.shape[0], h.argmax(-1)],
        lambda m, x, y, z: Pair(above(m, x), x),
        lambda m, x, y, z: Told(h := above(m, x), m.criterion(h, x)),
        lambda m, x, y, z: Told(above(m, x)),
        lambda m, x, y, z: SequenceClassifierOutput(logits=(h := above(m, x)), loss=m.criterion(h, x)),
        lambda m, x, y, z: m.criterion(above(m, x) * m.weights, x),
        lambda m, x, y, z: (h := above(m, x), (h * m.scale).sum() + x.sum()),
        lambda m, x, y, z: (lambda h: torch.cat([m.c(h), m.d(h)], -1).split(D, -1))(m.b(m.a(x))),
        lambda m, x, y, z: above(m, x).split(D // 2, -1),
        lambda m, x, y, z: above(m, x).view(x.shape[0], -1),
        lambda m, x, y, z: (h := above(m, x), m.criterion(m.drop(h), x) if y is None else m.criterion(h, y)),
        lambda m, x, y, z: (above(m, x) if z is None else m.d(above(m, x)) + z, y),
        lambda m, x, y, z: (above(m, x), m.a.weight.square().sum()),
        in_place,
        summed_in_place,
        changed_before,
        masked,
        lambda m, x, y, z: m.gru(above(m, x))[0],
    ],
)  # fmt: skip
def test_what_can_be_returned(forward: Callable[..., Any]) -> None:
    whole = whole_model(seeded(Returns, forward), "b", R)
    both = Both(seeded(Returns, forward), "b")
    x, y = torch.randn(B, D), torch.randn(B, D)
    for more in ({}, {"y": y}, {"z": y}, {"y": y, "z": y}):
        for module in (whole, both.lower.model, both.upper.model):
            module.train(not more)
        got, expected = both(x, **more), whole(x, **more)
        assert type(got) is type(expected)
        for one, other in zip(*map(leaves, (got, expected))):
            torch.testing.assert_close(one, other)
    names = [set(dict(one.model.named_parameters())) for one in (both.lower, both.upper)]
    assert not names[0] & names[1]
    assert "b.ffn2.weight" in names[1]


def leaves(returned: Any) -> List[Any]:
    if isinstance(returned, Told):
        return [returned.y, returned.loss]
    if isinstance(returned, dict):
        return [one for value in returned.values() for one in leaves(value)]
    if isinstance(returned, (tuple, list)):
        return [one for value in returned for one in leaves(value)]
    return [returned]


def twice(m: Any, x: Tensor, *_: Any) -> Any:
    h = m.b(m.a(x))
    return m.c(h), m.d(h)


def changed_later(m: Any, x: Tensor, *_: Any) -> Any:
    h = above(m, x)
    before = h * 1
    h.mul_(2)
    return h, m.criterion(before, x)


def masked_before_weights(m: Any, x: Tensor, *_: Any) -> Any:
    h = m.b(m.a(x))
    h.masked_fill_(x > 0, 0.0)
    return m.c(h)


def changed_after_it_was_read(m: Any, x: Tensor, *_: Any) -> Any:
    s = m.d(x)
    out = above(m, x) + s
    s.mul_(0)
    return out, s


def changed_by_a_module(m: Any, x: Tensor, *_: Any) -> Any:
    s = m.d(x)
    return above(m, x) + s, m.relu(s)


def changed_through_a_view(m: Any, x: Tensor, *_: Any) -> Any:
    s, h = m.d(x), above(m, x)
    t = s.expand_as(h)
    t.mul_(h.detach())
    return h, t, s.sum()


def changed_through_a_view_by_a_module(m: Any, x: Tensor, *_: Any) -> Any:
    s, h = m.d(x), above(m, x)
    return h, m.relu(s.expand_as(h)), s.sum()


def summed_into_one_from_below(m: Any, x: Tensor, *_: Any) -> Any:
    loss = m.d(x).square().sum()
    loss += m.criterion(above(m, x), x)
    return loss


def changes_an_input(m: Any, x: Tensor, *_: Any) -> Any:
    h = above(m, x)
    x.mul_(h)
    return h, x


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (twice, "the output of 'c', the output of 'd'. needs several tensors of the cloud, and one comes back: return"),
        (changed_later, "needs several tensors"),
        (masked_before_weights, "'masked_fill_' .Tensor.masked_fill_. changes"),
        (changed_after_it_was_read, "'mul_' .Tensor.mul_. may change a value from below the layer in place"),
        (changed_by_a_module, "'relu' may change a value from below"),
        (changed_through_a_view, "'mul_' .Tensor.mul_. may change a value from below"),
        (changed_through_a_view_by_a_module, "'relu' may change a value from below"),
        (summed_into_one_from_below, "'iadd' .iadd. may change a value from below"),
        (lambda m, x, y, z: m.gru(above(m, x)), "the output of 'gru'. needs several tensors of the cloud"),
        (lambda m, x, y, z: m.attention(*[above(m, x)] * 3), "the output of 'attention'. needs several tensors"),
        (changes_an_input, "'mul_' .Tensor.mul_. changes"),
        (lambda m, x, y, z: (x, above(m, x).shape[1:] is None), "has to return something.* the input 'x', which comes"),
        (lambda m, x, y, z: m.d(above(m, x) + x), "the input 'x' is used above the cut at 'b', in 'add'"),
        (lambda m, x, y, z: (m.b(m.a(x)).mul(m.scale), x * m.scale), "both halves need the parameter 'scale'"),
    ],
)
def test_what_cannot(forward: Callable[..., Any], reason: str) -> None:
    with pytest.raises(CutError, match=reason) as refusal:
        cut(Returns(forward), "b", R)
    assert "\n" not in str(refusal.value)


def test_arguments_that_cannot_be_given() -> None:
    """They are refused when they are, with the reason."""

    def forward(m: Any, x: Tensor, y: Any, z: Any) -> Any:
        return above(m, x) if y is None else m.d(above(m, x) + y)

    both = Both(seeded(Returns, forward), "b")
    x = torch.randn(B, D)
    both(x)
    both(x, z=x)
    with pytest.raises(CutError, match="was not cut for calls with y: the input 'y' is used above the cut at 'b'"):
        both(x, x)
    assert [both.upper.has_variant(number) for number in range(5)] == [True, False, True, False, False]


def test_a_number_means_the_same_whatever_can_be_cut() -> None:
    """A side that cannot be cut for calls without optional arguments has no number 0."""

    def forward(m: Any, x: Tensor, y: Any, z: Any) -> Any:
        if y is None:
            raise ValueError("give y")
        return above(m, x) if z is None else m.d(above(m, x))

    both = Both(seeded(Returns, forward), "b")
    x = torch.randn(B, D)
    both(x, x)
    both(x, x, x)
    assert [number for number, _ in both.crossed] == [1, 3]
    assert [both.upper.has_variant(number) for number in range(4)] == [False, True, False, True]
    assert both.upper.run_net_2(torch.ones(B, R)).equal(both.upper.run_net_2(torch.ones(B, R), 1))
