import pytest
import torch
from support.tiny import ARCHITECTURES, make_tiny_model, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForSequenceClassification

from sft.batch import Batch
from sft.errors import UsageError
from sft.models import Cut, build_net_1, build_net_2, build_whole, matrix_of
from sft.models.seeding import derive_seed, seeded
from sft.models.weights import factor_tensors, fill, pretrained_tensors
from sft.tensors.pretrained import PretrainedWeights

CPU = torch.device("cpu")
HEAD = "sequence-classification"


def test_halves_draw_what_one_process_draws(tmp_path):
    """From a shape alone: every weight of either half is the one of the whole model, whichever is built first."""
    config = AutoConfig.from_pretrained(make_tiny_model(tmp_path, "bert"), num_labels=2)
    cut = Cut("sft", 2, 4)
    for_edge, for_cloud = factor_tensors(config, HEAD, cut, None, seed=5)
    whole, net_2, net_1 = build_whole(config, HEAD, cut), build_net_2(config, HEAD, cut), build_net_1(config, HEAD, cut)
    fill(whole, [*for_edge, *for_cloud], seed=5)
    fill(net_2, for_cloud, seed=5)
    torch.randn(3)
    fill(net_1, for_edge, seed=5)
    for name, parameter in {**net_1.whole_parameters(), **net_2.whole_parameters()}.items():
        assert torch.equal(parameter, whole.whole_parameters()[name]), name


def test_drawn_factors_are_those_of_the_drawn_layer(tmp_path):
    config = AutoConfig.from_pretrained(make_tiny_model(tmp_path, "bert"), num_labels=2)
    plain = build_whole(config, HEAD)
    fill(plain, [], seed=5)
    full = Cut("sft", 2, 32)
    for_edge, for_cloud = factor_tensors(config, HEAD, full, None, seed=5)
    ffn1, ffn2, ffn3 = (t.read() for t in [*for_edge, *[t for t in for_cloud if t.name.endswith("weight")]])
    torch.testing.assert_close(
        ffn3 @ ffn2 @ ffn1, plain.model.bert.encoder.layer[1].output.dense.weight.detach(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_low_rank_residual_is_fitted_to_the_blocks_output(tmp_path, family):
    """On the calibration tokens no R numbers a token say more: what is lost is the variance of the other components."""
    directory, layer = make_tiny_model(tmp_path, family, layers=3), {"bert": "encoder.layer.1", "gpt2": "h.1"}[family]
    config = AutoConfig.from_pretrained(directory, num_labels=2)
    batches = [make_batch(0), make_batch(1)]
    whole = build_whole(config, HEAD)
    fill(whole, pretrained_tensors(whole, PretrainedWeights(directory)), seed=5)
    y_TD = sums_of(whole.eval(), layer, batches)
    for_edge, for_cloud = factor_tensors(
        config, HEAD, Cut("sft", 2, 4, "low-rank"), PretrainedWeights(directory), 5, batches
    )
    moments = torch.cov(y_TD.T, correction=0)
    ffn2, ffn3, bias = (find(for_cloud, name) for name in ("ffn2.weight", "ffn3.weight", "ffn3.bias"))
    torch.testing.assert_close(ffn2.diagonal().square(), torch.linalg.eigvalsh(moments).flip(0)[:4])
    kept_DD = ffn3 @ ffn3.T
    torch.testing.assert_close(kept_DD @ moments, moments @ kept_DD, atol=1e-5, rtol=0)  # whole components
    ffn1 = find(for_edge, "ffn1.weight")
    assert ffn1.shape == (4, 64 + 32)
    torch.testing.assert_close(ffn1[:, 64:], torch.linalg.inv(ffn2) @ ffn3.T)
    w, b = matrix_of(whole.model.base_model.get_submodule(layer_w(layer))), layer_bias(whole, layer)
    torch.testing.assert_close(ffn1[:, :64], torch.linalg.inv(ffn2) @ ffn3.T @ w.T.detach(), atol=1e-5, rtol=1e-4)
    mean_D = y_TD.mean(0)
    torch.testing.assert_close(bias, mean_D + kept_DD @ (b - mean_D), atol=1e-5, rtol=1e-4)


def layer_w(layer):
    return {"encoder.layer.1": "encoder.layer.1.output.dense", "h.1": "h.1.mlp.c_proj"}[layer]


def layer_bias(whole, layer):
    return whole.model.base_model.get_submodule(layer_w(layer)).bias.detach()


def find(tensors, ending):
    (tensor,) = (tensor for tensor in tensors if tensor.name.endswith(ending))
    return tensor.read()


def make_batch(seed):
    ids_BS = torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(seed))
    return Batch({"input_ids": ids_BS}, [7, 3, 5], {})


def sums_of(whole, layer, batches):
    """What block 2 adds up, of tokens: a post-norm block's last norm takes it, a pre-norm block returns it."""
    seen, block = [], whole.model.base_model.get_submodule(layer)
    if layer == "h.1":
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    else:
        block.output.LayerNorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            whole(*batch)
    return torch.cat([row[:n] for y, batch in zip(seen, batches) for row, n in zip(y, batch.lengths)])


@pytest.mark.parametrize("calibration", [(), []])
def test_a_low_rank_residual_wants_data(calibration):
    config = tiny_config(layers=2)
    with pytest.raises(UsageError, match="give batches to calibrate with"):
        factor_tensors(config, HEAD, Cut("sft", 1, 4, "low-rank"), None, 0, calibration)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_drawn_weights_are_numbers(name):
    """Of every module, those among them that older releases leave to their constructors."""
    config = tiny_config(name, layers=2)
    net = build_whole(config, HEAD)
    fill(net, [], seed=0)
    library = AutoModelForSequenceClassification.from_config(config)
    for one, parameter in net.whole_parameters().items():
        assert bool(torch.isfinite(parameter).all()), one
        if parameter.ndim == 1:  # norms and biases: ones and zeros
            assert torch.equal(parameter, library.get_parameter(one)), one
    for one, buffer in net.model.named_buffers():
        assert torch.equal(buffer, library.get_buffer(one)), one


class _Largest(TorchDispatchMode):
    """Of all tensors that come to be on the CPU."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device == CPU:
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("pad_token_id", [None, -1, 0, 99_999])
def test_buffers_are_filled_without_the_rest_of_a_model(name, pad_token_id):
    config = tiny_config(name, layers=2)
    config.vocab_size, config.pad_token_id = 100_000, pad_token_id
    net = build_net_2(config, HEAD, Cut("sl", 1))
    with _Largest() as largest:
        fill(net, [], seed=0)
    assert largest.bytes <= max(4 * parameter.numel() for parameter in net.parameters())
    config.vocab_size, config.pad_token_id = 100, None
    expected = AutoModelForSequenceClassification.from_config(config)
    rotary = [name for name, _ in net.model.named_buffers() if name.endswith("rotary_emb.inv_freq")]
    assert rotary
    assert all(torch.equal(net.model.get_buffer(name), expected.get_buffer(name)) for name in rotary)


def test_seed_decides_the_head(tmp_path):
    directory = make_tiny_model(tmp_path, "bert")
    config = AutoConfig.from_pretrained(directory, num_labels=5)

    def head(seed):
        net = build_net_2(config, HEAD, Cut("sl", 1))
        fill(net, pretrained_tensors(net, PretrainedWeights(directory)), seed)
        return net.model.classifier.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_filling_leaves_the_global_generator_alone(tmp_path):
    config = AutoConfig.from_pretrained(make_tiny_model(tmp_path, "bert"))
    torch.manual_seed(0)
    expected = torch.randn(2)
    torch.manual_seed(0)
    fill(build_net_1(config, HEAD, Cut("sl", 1)), [], seed=1)
    assert torch.equal(torch.randn(2), expected)


def test_seeded_blocks_depend_on_nothing_else():
    def draw(*parts):
        with seeded(CPU, 3, *parts):
            return torch.rand(4)

    first = draw("net_2", 1, 0)
    torch.rand(9)
    assert torch.equal(draw("net_2", 1, 0), first)
    assert not torch.equal(draw("net_2", 1, 1), first)
    assert not torch.equal(draw("net_1", 1, 0), first)


def test_derived_seeds_are_the_same_everywhere():
    assert derive_seed(0, "net_1", 7, 0) == 6743721661156389479
    assert derive_seed(0, "1", "23") != derive_seed(0, "12", "3")
