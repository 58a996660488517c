"""What a cut would change without a word is refused instead, or kept."""

from __future__ import annotations

import copy
import random
import threading
import time
from typing import Any, Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.errors import CutError, UsageError
from sft.graphs.cut import cut
from sft.models.decompose import decompose

B, S, D, F, R = 4, 5, 8, 16, 8


class Model(nn.Module):
    """Linear layers and whatever a test does with them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.side = nn.Linear(D, F), nn.Linear(F, D), nn.Linear(D, D), nn.Linear(D, D)
        self.relu, self.drop, self.embed = nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Embedding(20, D)
        self.limit, self.mask = 6, nn.Parameter(torch.rand(D))
        self.register_buffer("scale", torch.ones(()))
        self.what = forward

    def forward(self, x: Tensor) -> Any:
        return self.what(self, x)


def check_same(forward: Callable[[Any, Tensor], Any], expected: Any = None, name: str = "b") -> str:
    """At full rank both halves are the model, or `expected`. Returns what was told."""
    torch.manual_seed(0)
    model = Model(forward)
    whole = copy.deepcopy(model)
    whole.what = expected or forward
    lower, upper = (cut(copy.deepcopy(model), name, R) for _ in range(2))
    factors = decompose(lower.layer.weight.T, R)
    bias = lower.layer.bias.detach().clone()
    lower.keep_net_1().weight.data.copy_(factors.u_FR.T)
    ffn_2, ffn_3 = upper.keep_net_2()
    ffn_2.weight.data.copy_(factors.s_RR.T)
    ffn_3.weight.data.copy_(factors.v_RD.T)
    ffn_3.bias.data.copy_(bias)
    for module in (whole, lower.model, upper.model):
        module.eval()
    x = torch.randn(B, S, D)
    got = lower.run(upper.run_net_2, (x.clone(),), {})
    torch.testing.assert_close(got, whole(x.clone()), rtol=1e-4, atol=1e-5)
    return str(upper)


def refuse(forward: Callable[[Any, Tensor], Any], reason: str, name: str = "b") -> None:
    with pytest.raises(CutError, match=reason):
        cut(Model(forward), name, R)


def block(m: Any, x: Tensor) -> Tensor:
    return x + m.drop(m.b(m.a(x)))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.b(m.a(x)) + m.side(x), "the output of 'side' is used above the cut.*around this very layer"),
        (lambda m, x: m.c(m.b(m.a(x)).relu()) + m.side(x), "the output of 'side' is used above"),
        (lambda m, x: m.c(m.b(m.a(x)).relu()) + x, "the input 'x' is used above"),
        (lambda m, x: m.b(m.a(x)) + m.embed(torch.arange(x.shape[1])), "the output of 'embed' is used above"),
        (lambda m, x: m.b(m.a(x)) + x.shape[1], "'getitem' .getitem. is used above"),
        (lambda m, x: m.b(m.a(m.c(x) * (x > 0))) + (x > 0), "'gt_1' .gt. is used above"),
        (lambda m, x: m.b(m.a(x.float() * 2)) + x.float() * 3, "'mul_1' .mul. is used above"),
    ],
)  # fmt: skip
def test_only_the_residual_of_the_layer_itself_is_dropped(forward: Callable[[Any, Tensor], Any], reason: str) -> None:
    refuse(lambda m, x: m.c(forward(m, x)), reason)
    told = check_same(forward)  # without weights after it, it is added on the edge
    assert told == "Model cut at 'b', rank 8"


def test_the_residual_of_the_layer_is_dropped_where_the_rest_is_added_on_the_edge() -> None:
    told = check_same(lambda m, x: m.c(block(m, x)) + x, lambda m, x: m.c(m.b(m.a(x))) + x)
    assert told == "Model cut at 'b', rank 8, without the input 'x', added in 'add' (add)"


def test_a_mask_of_the_scores_is_not_dropped() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        mask = (x[..., 0] == 0)[:, None, :].float() * -1e4
        q = m.b(m.a(x))
        return m.c((q @ q.transpose(1, 2) + mask).softmax(-1) @ q)

    refuse(forward, "'mul' .mul. is used above the cut")

    def as_it_comes(m: Any, x: Tensor) -> Tensor:
        mask = x[..., :1] * 2
        return m.c(m.b(m.a(m.side(x) + mask)) + mask)

    refuse(as_it_comes, "'mul' .mul. is used above the cut")


def test_what_was_dropped_is_told() -> None:
    told = check_same(block, lambda m, x: m.b(m.a(x)))
    assert told == "Model cut at 'b', rank 8, without the input 'x', added in 'add' (add)"
    later = check_same(
        lambda m, x: block(m, m.c(x)).transpose(0, 1) * 2 + m.mask,
        lambda m, x: m.b(m.a(m.c(x))).transpose(0, 1) * 2 + m.mask,
    )
    assert "the output of 'c'" in later
    assert check_same(lambda m, x: m.c(m.b(m.a(x)))) == "Model cut at 'b', rank 8"

    def both(m: Any, x: Tensor) -> Tensor:
        h = block(m, x)
        return h + m.c(h)  # a residual connection above the cut

    assert "without the input" in check_same(both, lambda m, x: m.b(m.a(x)) + m.c(m.b(m.a(x))))


@pytest.mark.parametrize(
    ("context", "what"),
    [
        (torch.no_grad, "torch.no_grad"),
        (torch.inference_mode, "torch.no_grad or the like switched"),
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "torch.autocast switched"),
    ],
)
def test_contexts_within_a_forward_method(context: Callable[[], Any], what: str) -> None:
    def below(m: Any, x: Tensor) -> Tensor:
        with context():
            h = m.a(x)
        return m.b(h)

    def above(m: Any, x: Tensor) -> Tensor:
        h = m.b(m.a(x))
        with context():
            gate = m.c(h)
        return h * gate

    refuse(below, f"the output of 'a' is computed with {what}.*module of its own that does not contain")
    refuse(above, f"the output of 'c' is computed with {what}")
    with context():
        cut(Model(block), "b", R)  # around all of it, it is no part of the model


def test_a_switch_that_is_left_is_put_back() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        return m.b(m.a(x))

    refuse(forward, "torch.no_grad or the like switched on or off")
    assert torch.is_grad_enabled()


def statement(*lines: Callable[[Any, Tensor], Any], above: bool = False) -> Callable[[Any, Tensor], Any]:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.c(m.b(m.a(x))) if above else m.a(x) * 1
        for line in lines:
            line(m, h)
        return h if above else m.c(m.b(h))

    return forward


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (lambda m, h: m.relu(h), "calls 'relu' without using what it returns, which would be lost"),
        (lambda m, h: m.relu(h).sum(), "'relu' changes a part of a value"),
        (lambda m, h: h[:, 0].mul_(5), "'mul_' .Tensor.mul_. changes a part of a value"),
        (lambda m, h: h.view(-1)[:4].zero_(), "'zero_' .Tensor.zero_. changes"),
        (lambda m, h: h.chunk(2, -1)[0].mul_(3.0), "'mul_' .Tensor.mul_. changes"),
        (lambda m, h: torch.relu_(h[0]), "'relu_' .relu_. changes"),
        (lambda m, h: m.scale.add_(1), "'add_' .Tensor.add_. changes"),
    ],
)
def test_a_change_in_place_is_not_lost(line: Callable[[Any, Tensor], Any], reason: str, above: bool) -> None:
    refuse(statement(line, above=above), reason)


@pytest.mark.parametrize("above", [False, True])
def test_changes_in_place_that_are_kept(above: bool) -> None:
    check_same(statement(lambda m, h: functional.relu(h, inplace=True), lambda m, h: h.mul_(2), above=above))

    def alias(m: Any, x: Tensor) -> Tensor:
        h = m.c(m.b(m.a(x))) if above else m.side(x)
        other = h
        h += 1
        h *= other
        y = h + other
        return y if above else m.b(m.a(y))

    check_same(alias)


def test_linear_layers_that_are_more_than_that() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 10

    model = nn.Sequential(nn.Linear(D, D), Scaled(D, D))
    with pytest.raises(CutError, match="'1' is a Scaled with a forward method of its own"):
        cut(model, "1", R)
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    model[1].forward = lambda x: x  # type: ignore[method-assign,assignment]
    with pytest.raises(CutError, match="a forward method of its own"):
        cut(model, "1", R)


@pytest.mark.parametrize(
    "add",
    [
        lambda layer: layer.register_forward_hook(lambda module, args, output: output * 10),
        lambda layer: layer.register_forward_pre_hook(lambda module, args: None),
        lambda layer: layer.register_full_backward_hook(lambda module, inputs, outputs: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda module, outputs: None),
        lambda layer: layer.weight.register_hook(lambda gradient: gradient * 2),
    ],
)
def test_hooks_of_the_layer(add: Callable[[nn.Linear], Any]) -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    handle = add(model[1])
    with pytest.raises(CutError, match="'1' has hooks, which the factors would not have"):
        cut(model, "1", R)
    handle.remove()
    cut(model, "1", R)


@pytest.fixture
def noise() -> Iterator[None]:
    """Another thread that draws, and runs modules."""
    end = threading.Event()
    broken = []
    layer, generator = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), torch.randn(1, 2)

    def draw() -> None:
        while not end.is_set():
            torch.randn(1)
            try:
                layer(generator)
            except Exception as error:
                broken.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    yield
    end.set()
    thread.join()
    assert broken == []


@pytest.mark.usefixtures("noise")
def test_other_threads_draw_and_compute_meanwhile() -> None:
    for _ in range(20):
        cut(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)), "1", 4)


def test_draws_of_its_own() -> None:
    generator = torch.Generator()
    refuse(lambda m, x: m.b(m.a(x)) * torch.randn(1, generator=generator), "draws random numbers itself")
    model = Model(lambda m, x: m.b(m.a(x)) * random.random() * torch.rand(1))
    python = Model(lambda m, x: m.b(m.a(x)) * random.random())
    before = torch.get_rng_state(), random.getstate()
    for one in (model, python):
        with pytest.raises(CutError, match="draws random numbers itself"):
            cut(one, "b", R)
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]


def test_two_cuts_at_a_time_leave_torch_as_it_was() -> None:
    before = torch.arange, torch.zeros, nn.Module.__call__
    inside, most = [], []

    def forward(m: Any, x: Tensor) -> Tensor:
        inside.append(1)
        time.sleep(0.02)
        most.append(len(inside))
        inside.pop()
        return block(m, x)

    threads = [threading.Thread(target=cut, args=(Model(forward), "b", R)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == (torch.arange, torch.zeros, nn.Module.__call__)
    assert set(most) == {1}, "what is replaced is the whole process's"


def test_assertions_about_sizes_are_those_of_the_halves() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        batch, t, width = x.size()
        assert t <= m.limit, f"{t} are too many"
        assert batch > 0 and width == D  # noqa: PT018
        h = m.b(m.a(x))
        assert h.dim() == 3
        return h * 2

    check_same(forward)
    lower = cut(Model(forward), "b", R)
    lower.keep_net_1()
    with pytest.raises(AssertionError, match=r"assert t <= m\.limit"):
        lower.run(lambda a, _: a, (torch.randn(B, 7, D),), {})
    model = Model(forward)
    upper = cut(model, "b", R)
    upper.keep_net_2()
    with pytest.raises(AssertionError, match="dim"):
        upper.run_net_2(torch.randn(B, R))

    def either(m: Any, x: Tensor) -> Tensor:
        assert x.shape[1] <= m.limit or x.shape[0] == 1
        return m.b(m.a(x))

    refuse(either, "of assertions about sizes those of plain comparisons in one line can stay")


def test_layers_whose_weight_is_not_their_own() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    model[1].weight = model[0].weight
    with pytest.raises(CutError, match=r"'0\.weight' and '1\.weight' are one parameter"):
        cut(model, "1", R)
    model = nn.Sequential(nn.Linear(D, D), nn.utils.parametrizations.orthogonal(nn.Linear(D, D)))
    with pytest.raises(CutError, match="is computed"):
        cut(model, "1", R)
    with pytest.raises(CutError, match="inside that it could be cut at"):
        cut(nn.Linear(D, D), "weight", R)
    with pytest.raises(UsageError, match="float32"):
        cut(nn.Sequential(nn.Linear(D, D)).double(), "0", R)


class Decodes(nn.Module):
    """A VAE's script calls the decoder by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, F), nn.Linear(F, D)

    def decode(self, z: Tensor) -> Tensor:
        return self.b(torch.relu(z))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.a(x))


def test_a_part_of_the_model_alone_is_refused_in_a_line() -> None:
    lower, upper = cut(Decodes(), "b", R), cut(Decodes(), "b", R)
    lower.keep_net_1()
    upper.keep_net_2()
    with pytest.raises(
        UsageError, match=r"^'b' is cut, and the rest is on the cloud: a part of the model does not run"
    ):
        lower.model.decode(torch.randn(B, F))
    with pytest.raises(UsageError, match=r"^'b' is cut, and what leads to it is on the edge: "):
        upper.model.decode(torch.randn(B, F))
