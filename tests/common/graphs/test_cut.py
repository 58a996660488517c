"""Any module in two: both halves together are the decomposed module in one piece."""

from __future__ import annotations

import copy
from typing import Any, Callable, Dict, Optional, Tuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.errors import CutError
from sft.graphs.cut import GraphCut, cut
from sft.models.decompose import decompose

B, S, D, F, R = 4, 5, 8, 16, 3


class Decomposed(nn.Module):
    """Eq. 3 on one machine."""

    def __init__(self, layer: nn.Linear, split_rank: int) -> None:
        super().__init__()
        factors = decompose(layer.weight.T, split_rank)
        self.ffn1 = nn.Linear(layer.in_features, split_rank, bias=False)
        self.ffn2 = nn.Linear(split_rank, split_rank, bias=False)
        self.ffn3 = nn.Linear(split_rank, layer.out_features, bias=layer.bias is not None)
        self.ffn1.weight.data = factors.u_FR.T.contiguous()
        self.ffn2.weight.data = factors.s_RR.T.contiguous()
        self.ffn3.weight.data = factors.v_RD.T.contiguous()
        if layer.bias is not None:
            self.ffn3.bias.data = layer.bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn3(self.ffn2(self.ffn1(x)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Its forward could not be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        if float(x.detach().abs().sum()) < 0:
            raise AssertionError
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = q @ k.transpose(-1, -2) / D**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -1e9)
        return self.out(scores.softmax(-1) @ v)


class Block(nn.Module):
    def __init__(self, pre_norm: bool, residual: bool = True) -> None:
        super().__init__()
        self.pre_norm, self.residual = pre_norm, residual
        self.attention, self.mlp = Attention(), Mlp()
        self.norm_1, self.norm_2 = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        if self.pre_norm:
            x = x + self.attention(self.norm_1(x), mask)
            y = self.mlp(self.norm_2(x))
            return x + y if self.residual else y
        x = self.norm_1(x + self.attention(x, mask))
        y = functional.dropout(self.mlp(x), 0.1, self.training)
        return self.norm_2(y + x) if self.residual else self.norm_2(y)


class Transformer(nn.Module):
    def __init__(self, pre_norm: bool = True, blocks: int = 3) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, D), nn.Embedding(S, D)
        self.blocks = nn.ModuleList([Block(pre_norm) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 2)

    def forward(self, ids: Tensor, mask: Optional[Tensor] = None, *, scale: float = 1.0) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for index, block in enumerate(self.blocks):
            x = block(x, mask if index == 0 else None)
        return self.head(self.norm(x).mean(1)) * scale


def drop_residual(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.get_submodule(name).residual = False

    return change


def halves(model: nn.Module, name: str, rank: int = R) -> Tuple[GraphCut, GraphCut]:
    """Edge and cloud, each with a model of its own."""
    lower, upper = (cut(copy.deepcopy(model), name, rank) for _ in range(2))
    factors = decompose(lower.layer.weight.T, rank)
    bias = None if lower.layer.bias is None else lower.layer.bias.detach().clone()
    lower.keep_net_1().weight.data.copy_(factors.u_FR.T)
    ffn_2, ffn_3 = upper.keep_net_2()
    ffn_2.weight.data.copy_(factors.s_RR.T)
    ffn_3.weight.data.copy_(factors.v_RD.T)
    if bias is not None:
        ffn_3.bias.data.copy_(bias)
    return lower, upper


def one_piece(model: nn.Module, name: str, change: Callable[[Any], None] = lambda model: None) -> nn.Module:
    whole = copy.deepcopy(model)
    change(whole)
    parent, _, child = name.rpartition(".")
    setattr(whole.get_submodule(parent), child, Decomposed(whole.get_submodule(name), R))
    return whole


def check_same(
    model: nn.Module, name: str, *inputs: Tensor, change: Callable[[Any], None] = lambda model: None, **named: Any
) -> Tuple[GraphCut, GraphCut]:
    """Same output and gradients, in both modes, and every parameter and buffer on one side alone, with its name."""
    lower, upper = halves(model, name)
    whole = one_piece(model, name, change)
    for training in (True, False):
        outputs = []
        for module in (whole, lower.model, upper.model):
            module.train(training)
            module.zero_grad()
        torch.manual_seed(7)
        outputs.append(whole(*inputs, **named))
        torch.manual_seed(7)
        outputs.append(lower.run(upper.run_net_2, inputs, named))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
        for output in outputs:
            output.square().sum().backward()
        gradients: Dict[str, Optional[Tensor]] = {}
        for half in (lower.model, upper.model):
            gradients.update({n: p.grad for n, p in half.named_parameters()})
        assert gradients.keys() == dict(whole.named_parameters()).keys()
        for own, parameter in whole.named_parameters():
            torch.testing.assert_close(
                gradients[own], parameter.grad, rtol=0, atol=0, msg=lambda m, own=own: f"{own}: {m}"
            )
    states = lower.model.state_dict(), upper.model.state_dict()
    assert not states[0].keys() & states[1].keys()
    assert states[0].keys() | states[1].keys() == whole.state_dict().keys()
    factors = {f"{name}.ffn2.weight", f"{name}.ffn3.weight", f"{name}.ffn3.bias"}
    assert set(states[1]) - factors == set(upper.upper_names)
    for own, tensor in whole.state_dict().items():
        torch.testing.assert_close({**states[0], **states[1]}[own], tensor, rtol=0, atol=0)
    return lower, upper


def nowhere(a: Tensor, variant: int) -> Tensor:
    raise AssertionError("nothing was to cross")


def ids() -> Tensor:
    return torch.randint(0, 20, (B, S), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("at", ["0", "2", "5", "7"])
def test_sequential_with_norm_and_dropout_in_either_half(at: str) -> None:
    model = nn.Sequential(
        nn.Linear(6, D), nn.BatchNorm1d(D), nn.Linear(D, F), nn.Dropout(0.0), nn.Tanh(), nn.Linear(F, F),
        nn.BatchNorm1d(F), nn.Linear(F, 3),
    )  # fmt: skip
    check_same(model, at, torch.randn(B, 6))


def test_dropout_is_that_of_its_half_and_off_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(D, F), nn.Dropout(0.5), nn.Linear(F, D), nn.Dropout(0.5), nn.Linear(D, 2))
    check_same(model, "2", torch.randn(B, D))


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_blocks(pre_norm: bool, block: int) -> None:
    """The residual around the layer is dropped, all others stay; functional dropout is on in training alone."""
    model = Transformer(pre_norm)
    lower, upper = check_same(model, f"blocks.{block}.mlp.fc2", ids(), change=drop_residual(f"blocks.{block}"))
    assert len(upper.dropped) == 1
    assert "blocks.2.mlp.fc1.weight" in (lower if block == 2 else upper).model.state_dict()


def test_the_first_matrix_of_an_ffn_can_be_cut_too() -> None:
    model = Transformer()
    model.blocks[1].residual = False  # it is not around that layer alone, and is not dropped
    check_same(model, "blocks.1.mlp.fc1", ids())


def test_several_inputs_below_the_cut() -> None:
    mask = torch.arange(S)[None] < torch.tensor([5, 3, 4, 1])[:, None]
    check_same(Transformer(), "blocks.0.mlp.fc2", ids(), mask, change=drop_residual("blocks.0"))
    check_same(Transformer(), "blocks.0.mlp.fc2", ids=ids(), mask=mask, change=drop_residual("blocks.0"))


def test_arguments_fixed_by_the_cut() -> None:
    lower, _ = halves(Transformer(), "blocks.0.mlp.fc2")
    assert lower.run(lambda a, _: a, (ids(),), {"scale": 1.0}).shape == (B, S, R)
    with pytest.raises(CutError, match=r"the argument scale was fixed at 1\.0"):
        lower.run(nowhere, (ids(),), {"scale": 2.0})
    with pytest.raises(TypeError, match="unexpected keyword"):
        lower.run(nowhere, (ids(),), {"other": 1})


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_own_encoder_with_a_mask(norm_first: bool) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, D)
            layer = nn.TransformerEncoderLayer(D, 2, F, 0.0, batch_first=True, norm_first=norm_first)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(D, 2)

        def forward(self, ids: Tensor, padding: Optional[Tensor] = None) -> Tensor:
            return self.head(self.encoder(self.embed(ids), src_key_padding_mask=padding)[:, 0])

    def change(model: Any) -> None:
        layer = model.encoder.layers[1]

        def forward(
            src: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
        ) -> Any:
            if norm_first:
                src = src + layer._sa_block(layer.norm1(src), src_mask, src_key_padding_mask)
                return layer._ff_block(layer.norm2(src))
            src = layer.norm1(src + layer._sa_block(src, src_mask, src_key_padding_mask))
            return layer.norm2(layer._ff_block(src))

        layer.forward = forward

    padding = torch.arange(S)[None] >= torch.tensor([5, 3, 4, 1])[:, None]
    torch.manual_seed(0)
    model = Classifier()
    lower, upper = halves(model, "encoder.layers.1.linear2")
    whole = one_piece(model, "encoder.layers.1.linear2", change).train()
    got = lower.run(upper.run_net_2, (ids(), padding), {})
    torch.testing.assert_close(got, whole(ids(), padding))
    with pytest.raises(CutError, match="not cut for calls with padding: the input 'padding' is used"):
        halves(model, "encoder.layers.0.linear2")[0].run(nowhere, (ids(), padding), {})


def test_what_the_model_has_besides_modules() -> None:
    """Parameters, buffers and tensors that a forward uses by itself go where they are needed."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.rand(F)), nn.Parameter(torch.rand(2))
            self.register_buffer("mean", torch.rand(D))
            self.register_buffer("table", torch.rand(2), persistent=False)
            self.plain = torch.rand(2)
            self.a, self.b, self.c = nn.Linear(D, F), nn.Linear(F, D, bias=False), nn.Linear(D, 2)
            self.unused = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x - self.mean) * self.scale
            x = x.mul_(2.0)
            x.clamp_(min=-1.0)
            y = self.c(self.b(x)) + self.shift * self.table * self.plain
            y.mul_(torch.tensor([1.0, 3.0]))
            return y

    torch.manual_seed(0)
    model = Odd()
    lower, upper = check_same(model, "b", torch.randn(B, D))
    assert upper.dropped == ()
    assert {"scale", "mean", "unused.weight"} <= lower.model.state_dict().keys()
    assert set(dict(upper.model.named_parameters())) == {
        "shift",
        "b.ffn2.weight",
        "b.ffn3.weight",
        "c.weight",
        "c.bias",
    }
    assert set(dict(model.named_buffers())) == {"mean", "table"}, "the model that was asked about is as it was"


def test_a_module_without_weights_may_be_in_both_halves() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Sequential(nn.ReLU(), nn.Dropout(0.0))
            self.a, self.b, self.c = nn.Linear(D, F), nn.Linear(F, D), nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.b(self.act(self.a(x)))))

    check_same(Shared(), "b", torch.randn(B, D))


def test_parameters_keep_their_objects_and_their_flags() -> None:
    model = nn.Sequential(nn.Linear(D, F), nn.Linear(F, D), nn.Linear(D, 2))
    model[1].weight.requires_grad_(False)
    before = dict(model.named_parameters())
    split = cut(model, "1", R)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert split.factor_names == {
        "1.weight": ["1.ffn1.weight", "1.ffn2.weight", "1.ffn3.weight"],
        "1.bias": ["1.ffn3.bias"],
    }
    assert split.upper_names == {"2.weight", "2.bias"}
    assert split.upper_tensors()["2.bias"] is before["2.bias"]
    assert not split.keep_net_1().weight.requires_grad
    assert [*dict(model.named_parameters())] == ["0.weight", "0.bias", "1.ffn1.weight"]
    assert model[0].weight is before["0.weight"]


def test_modes_of_modules_survive() -> None:
    model = Transformer().eval()
    model.blocks[1].train()
    modes = [module.training for module in model.modules()]
    cut(model, "blocks.1.mlp.fc2", R)
    assert [module.training for module in model.modules()] == modes


class Returns(nn.Module):
    """Two linear layers and whatever a test does with them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, F), nn.Linear(F, D), nn.Linear(D, D)
        self.side = nn.Linear(D, D)
        self.what = forward

    def forward(self, x: Tensor) -> Any:
        return self.what(self, x)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.c(torch.cat([m.b(m.a(x)), x])), "the input 'x' is used above the cut at 'b', in 'cat'"),
        (lambda m, x: m.c(m.b(m.a(x)) * m.a(x).mean()), "'mean' .Tensor.mean. is used above the cut"),
        (lambda m, x: m.c(m.b(m.a(x)).view(x.shape[0], -1)), "take sizes from a value that comes after the layer"),
        (lambda m, x: m.c(torch.add(m.b(m.a(x)), x, alpha=2)), "the input 'x' is used above the cut"),
        (lambda m, x: [m.a(x), m.b(m.a(x)) is None], "has to return something.* the output of 'a', which comes from"),
        (lambda m, x: (m.c(m.b(m.a(x))), m.b.out_features, m.side(m.b(m.a(x)))), "calls it 2 times"),
        (lambda m, x: (lambda h: (m.c(h), m.side(h)))(m.b(m.a(x))), "'c', the output of 'side'. needs several tensors"),
        (lambda m, x: m.c(x), "'b' cannot be cut: the model never calls it"),
        (lambda m, x: m.b(m.a(x)).sum() * 0 if m.b(m.a(x)) is None else m.b(m.a(m.b(m.a(x)))), "calls it 3 times"),
        (lambda m, x: m.b(m.a(x)) + m.b.weight.sum(), "the model uses its b.weight by itself"),
        (lambda m, x: m.b(m.a(x)) if x.sum() > 0 else x, "cannot be traced by torch.fx .TraceError"),
        (lambda m, x: m.b(m.a(x)) * torch.rand(1), "it draws random numbers itself"),
        (lambda m, x: m.c(m.b(m.a(m.c(x)))), "both halves need the parameter 'c.weight'"),
    ],
)  # fmt: skip
def test_what_cannot_cross(forward: Callable[[Any, Tensor], Any], reason: str) -> None:
    model = Returns(forward)
    before = vars(model).keys()
    with pytest.raises(CutError, match=reason):
        cut(model, "b", R)
    assert vars(model).keys() == before


def test_an_input_of_its_own_is_no_residual() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, F), nn.Linear(F, D)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.b(self.a(x)) + mask

    lower, _ = check_same(Biased(), "b", torch.randn(B, D), torch.randn(B, D))
    assert lower.dropped == ()


def test_a_norm_with_statistics_in_both_halves() -> None:
    norm = nn.BatchNorm1d(D, affine=False)
    model = nn.Sequential(norm, nn.Linear(D, D), norm)
    with pytest.raises(CutError, match="both halves need the buffer"):
        cut(model, "1", R)


@pytest.mark.parametrize(
    ("name", "rank", "reason"),
    [
        ("blocks.1.mlp.fc3", R, "no layer 'blocks.1.mlp.fc3' to cut; it has 13 nn.Linear layers, such as 'blocks"),
        ("", R, "no layer ''"),
        ("blocks.1.norm_1", R, "'blocks.1.norm_1' is a LayerNorm, not an nn.Linear"),
        ("blocks.1.mlp.fc2", 0, "split_rank is 0, but 'blocks.1.mlp.fc2' has ranks 1 to 8"),
        ("blocks.1.mlp.fc2", 9, "split_rank is 9"),
    ],
)  # fmt: skip
def test_no_such_layer_or_rank(name: str, rank: int, reason: str) -> None:
    with pytest.raises(CutError, match=reason):
        cut(Transformer(), name, rank)
