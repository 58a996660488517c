import torch
from support.tiny import make_tiny_model
from transformers import AutoConfig

from sft.checkpoint import Checkpoint
from sft.models import Cut, build_net_1, build_net_2, build_whole
from sft.seeding import derive_seed, seeded
from sft.weights import factor_tensors, fill, pretrained_tensors

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


def test_seed_decides_the_head(tmp_path):
    directory = make_tiny_model(tmp_path, "bert")
    config = AutoConfig.from_pretrained(directory, num_labels=5)

    def head(seed):
        net = build_net_2(config, HEAD, Cut("sl", 1))
        fill(net, pretrained_tensors(net, Checkpoint(directory)), seed)
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
