"""The halves of a cut model compute what the model in one piece computes, bit for bit."""

import pytest
import torch
from support.tiny import make_tiny_model, tiny_config
from transformers import AutoConfig

from sft.batch import Batch
from sft.errors import CutError, UnsupportedModelError, UsageError
from sft.models import Cut, build_net_1, build_net_2, build_whole
from sft.models.decompose import decompose, decompose_with_residual
from sft.models.weights import factor_tensors, fill, pretrained_tensors
from sft.tensors.pretrained import PretrainedWeights
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.messages import decode_activation, decode_labels, encode_activation, encode_labels
from sft.wire.codec.packing import pack

CPU = torch.device("cpu")
FAMILIES = ["bert", "roberta", "electra", "distilbert"]
HEADS = {
    "one label": ("sequence-classification", {"num_labels": 3, "problem_type": "single_label_classification"}),
    "several labels": ("sequence-classification", {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "regression": ("sequence-classification", {"num_labels": 1, "problem_type": "regression"}),
    "question answering": ("question-answering", {"num_labels": 2}),
}
LABELS = {
    "one label": {"labels": torch.tensor([0, 2, 1])},
    "several labels": {"labels": torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]])},
    "regression": {"labels": torch.tensor([0.5, 4.25, 5.0])},
    "question answering": {"start_positions": torch.tensor([1, 0, 2]), "end_positions": torch.tensor([3, 0, 2])},
}


def make_batch(kind="one label"):
    torch.manual_seed(1)
    lengths = [7, 3, 5]
    ids_BS = torch.randint(5, 40, (3, 7))
    for row, length in enumerate(lengths):
        ids_BS[row, length:] = 1
    return Batch({"input_ids": ids_BS}, lengths, LABELS[kind])


def build(directory, kind, cut):
    """net_1, net_2 and the same model in one piece, from one checkpoint and one seed."""
    head, overrides = HEADS[kind]
    config = AutoConfig.from_pretrained(directory, **overrides)
    checkpoint = PretrainedWeights(directory)
    for_edge, for_cloud = factor_tensors(config, head, cut, checkpoint, seed=3)
    net_1, net_2 = build_net_1(config, head, cut), build_net_2(config, head, cut)
    whole = build_whole(config, head, cut)
    fill(net_1, [*pretrained_tensors(net_1, checkpoint), *for_edge], seed=3)
    fill(net_2, [*pretrained_tensors(net_2, checkpoint), *for_cloud], seed=3)
    fill(whole, [*pretrained_tensors(whole, checkpoint), *for_edge, *for_cloud], seed=3)
    return net_1.eval(), net_2.eval(), whole.eval(), config


def build_whole_of(directory, cut):
    head, overrides = HEADS["one label"]
    config, checkpoint = AutoConfig.from_pretrained(directory, **overrides), PretrainedWeights(directory)
    whole = build_whole(config, head, cut)
    factors = factor_tensors(config, head, cut, checkpoint, seed=3)
    fill(whole, [*pretrained_tensors(whole, checkpoint), *factors[0], *factors[1]], seed=3)
    return whole.eval()


def across_the_wire(a_BSR, batch, net_2, config, head):
    activation = encode_activation(pack(a_BSR, batch.lengths), pb.DATA_TYPE_FLOAT32, batch.lengths, a_BSR.shape[1])
    received, lengths = decode_activation(activation, net_2.width, 64, CPU)
    labels = decode_labels(encode_labels(batch.labels), lengths, received.shape[1], config, head)
    return received.requires_grad_(), lengths, labels


@pytest.mark.one_in(7)
@pytest.mark.parametrize("mode", ["sft", "sl"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_halves_equal_the_whole(tmp_path, family, kind, mode):
    cut = Cut(mode, split_layer=2, split_rank=4 if mode == "sft" else 0)
    net_1, net_2, whole, config = build(make_tiny_model(tmp_path, family), kind, cut)
    batch = make_batch(kind)

    a_BSR = net_1(batch.inputs, batch.lengths)
    received, lengths, labels = across_the_wire(a_BSR, batch, net_2, config, HEADS[kind][0])
    split = net_2(received, lengths, labels)
    split.loss.backward()
    a_BSR.backward(received.grad)
    expected = whole(*batch)
    expected.loss.backward()

    assert a_BSR.shape[-1] == net_2.width == (4 if mode == "sft" else config.hidden_size)
    for row, length in enumerate(batch.lengths if kind == "question answering" else [None] * 3):
        assert torch.equal(split.logits[row][:length], expected.logits[row][:length])
    assert split.loss.item() == expected.loss.item()
    halves = {**net_1.whole_parameters(), **net_2.whole_parameters()}
    assert halves.keys() == whole.whole_parameters().keys()
    assert len(halves) == len(net_1.whole_parameters()) + len(net_2.whole_parameters())
    for name, parameter in whole.whole_parameters().items():
        assert torch.equal(halves[name], parameter), name
        assert torch.equal(halves[name].grad, parameter.grad), name


@pytest.mark.first_only
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_can_be_the_split_layer(tmp_path, family):
    directory = make_tiny_model(tmp_path, family, layers=3)
    batch = make_batch()
    for mode in ("sft", "sl"):
        for split_layer in (1, 2, 3):
            cut = Cut(mode, split_layer, 2 if mode == "sft" else 0)
            net_1, net_2, whole, _ = build(directory, "one label", cut)
            split = net_2(net_1(batch.inputs, batch.lengths), batch.lengths, batch.labels)
            assert split.loss.item() == whole(*batch).loss.item()


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_with_residual_is_the_undecomposed_model(tmp_path, family):
    directory = make_tiny_model(tmp_path, family)
    config = AutoConfig.from_pretrained(directory, **HEADS["one label"][1])
    decomposed = build_whole_of(directory, Cut("sft", 2, min(config.hidden_size, 64), "full"))
    plain = build_whole(config, "sequence-classification")
    fill(plain, pretrained_tensors(plain, PretrainedWeights(directory)), seed=3)
    batch = make_batch()
    torch.testing.assert_close(decomposed(*batch).logits, plain.eval()(*batch).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_types_count_where_the_model_has_them(tmp_path, family):
    net_1, _, whole, config = build(make_tiny_model(tmp_path, family), "one label", Cut("sl", 1))
    ids_BS, types_BS = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    plain = net_1({"input_ids": ids_BS}, [4])
    typed = net_1({"input_ids": ids_BS, "token_type_ids": types_BS}, [4])
    assert torch.equal(plain, typed) == (getattr(config, "type_vocab_size", 0) < 2) == (family == "distilbert")
    whole({"input_ids": ids_BS, "token_type_ids": types_BS}, [4], {})


def test_removing_the_residual_changes_the_model(tmp_path):
    directory = make_tiny_model(tmp_path, "bert")
    with_residual, without = (build_whole_of(directory, Cut("sft", 2, 4, residual)) for residual in ("full", "none"))
    batch = make_batch()
    assert not torch.allclose(with_residual(*batch).logits, without(*batch).logits, atol=1e-4)


def test_plain_split_learning_is_the_library_model(tmp_path):
    from transformers import AutoModelForQuestionAnswering

    directory = make_tiny_model(tmp_path, "bert")
    net_1, net_2, _, _ = build(directory, "question answering", Cut("sl", 2))
    library = AutoModelForQuestionAnswering.from_pretrained(directory).eval()
    batch = make_batch()
    for whole_name, parameter in net_2.whole_parameters().items():
        if whole_name.startswith("qa_outputs"):  # the checkpoint has no such head: give the library the one drawn
            library.get_parameter(whole_name).data.copy_(parameter.data)
    logits = net_2(net_1(batch.inputs, batch.lengths), batch.lengths, {}).logits
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1] * 5 + [0] * 2])
    expected = library(**batch.inputs, attention_mask=mask)
    assert torch.equal(logits[0, :, 0], expected.start_logits[0])
    assert torch.equal(logits[0, :, 1], expected.end_logits[0])


@pytest.mark.parametrize("mode", ["sft", "sl"])
def test_each_side_holds_only_its_own(tmp_path, mode):
    cut = Cut(mode, 2, 4 if mode == "sft" else 0)
    net_1, net_2, _, _ = build(make_tiny_model(tmp_path, "electra", layers=4), "one label", cut)
    on_edge, on_cloud = net_1.whole_parameters(), net_2.whole_parameters()
    assert any("embeddings.word" in name for name in on_edge)
    assert not any("embeddings" in name for name in on_cloud)
    assert not any("encoder.layer.2" in name or "encoder.layer.3" in name for name in on_edge)
    assert not any("encoder.layer.0" in name for name in on_cloud)
    of_block_2 = {name.split("layer.1.")[1] for name in on_cloud if "layer.1." in name}
    factors = {"output.dense.ffn2.weight", "output.dense.ffn3.weight", "output.dense.ffn3.bias"}
    norm = {"output.LayerNorm.weight", "output.LayerNorm.bias"}
    assert of_block_2 == (factors | norm if mode == "sft" else set())


@pytest.mark.parametrize("build_half", [build_net_1, build_net_2])
@pytest.mark.parametrize(
    ("cut", "says"),
    [
        (Cut("sft", 2, 4, "full"), "only one process can keep it: choose residual none or low-rank"),
        (Cut("sft", 2, 33, "low-rank"), "ranks 1 to 32"),
        (Cut("sft", 2, 4, "half"), "the residual can be none, low-rank, full, not 'half'"),
        (Cut("sl", 2, 0, "low-rank"), "mode sl cuts between two blocks"),
    ],
)
def test_residuals_that_halves_cannot_have(build_half, cut, says):
    with pytest.raises(CutError, match=says):
        build_half(tiny_config(), "sequence-classification", cut)


def test_decompose_full_rank_gives_the_matrix_back():
    w_FD = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    u_FR, s_RR, v_RD = decompose(w_FD, 7)
    torch.testing.assert_close(u_FR @ s_RR @ v_RD, w_FD, atol=1e-5, rtol=0)


def test_decompose_is_the_best_approximation_of_its_rank():
    w_FD = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    u_FR, s_RR, v_RD = decompose(w_FD, 3)
    assert (u_FR.shape, s_RR.shape, v_RD.shape) == ((12, 3), (3, 3), (3, 7))
    assert torch.equal(s_RR, torch.diag(s_RR.diagonal()))
    lost = torch.linalg.matrix_norm(w_FD - u_FR @ s_RR @ v_RD)
    torch.testing.assert_close(lost, torch.linalg.svdvals(w_FD)[3:].norm())  # Eckart and Young


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decompose_runs_in_float32(dtype):
    w_FD = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    factors = decompose(w_FD, 4)
    assert {factor.dtype for factor in factors} == {torch.float32}
    torch.testing.assert_close(factors.u_FR @ factors.s_RR @ factors.v_RD, w_FD.float(), atol=1e-5, rtol=0)


def sums(rows=400):
    """A layer with its input and the residual that is added to it; the moments of the sum."""
    generator = torch.Generator().manual_seed(0)
    w_FD, b_D = torch.randn(12, 7, generator=generator), torch.randn(7, generator=generator)
    x_TF = torch.randn(rows, 12, generator=generator)
    r_TD = 3 * torch.randn(rows, 7, generator=generator) @ torch.randn(7, 7, generator=generator) + 5
    y_TD = (x_TF @ w_FD + b_D + r_TD).double()
    return w_FD, b_D, x_TF, r_TD, y_TD, y_TD.mean(0), torch.cov(y_TD.T, correction=0)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("split_rank", [1, 3, 7])
def test_the_residual_is_kept_as_well_as_a_rank_allows(split_rank, with_bias):
    w_FD, b_D, x_TF, r_TD, y_TD, mean_D, covariance_DD = sums()
    if not with_bias:
        y_TD, mean_D, b_D = y_TD - b_D, mean_D - b_D, None
    (u, s_RR, v_RD), c_D = decompose_with_residual(w_FD, b_D, mean_D, covariance_DD, split_rank)
    a_TR = torch.cat([x_TF, r_TD], 1) @ u
    lost = (y_TD - (a_TR @ s_RR @ v_RD + c_D)).norm()
    expected = torch.linalg.svdvals(y_TD - mean_D)[split_rank:].norm()  # Eckart and Young
    torch.testing.assert_close(lost, expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(a_TR.var(0, unbiased=False), torch.ones(split_rank), atol=1e-3, rtol=0)


def test_components_without_spread_stay_finite():
    w_FD, b_D, x_TF, r_TD, y_TD, mean_D, covariance_DD = sums(rows=3)
    (u, s_RR, v_RD), c_D = decompose_with_residual(w_FD, b_D, mean_D, covariance_DD, 7)
    y = torch.cat([x_TF, r_TD], 1) @ u @ s_RR @ v_RD + c_D
    torch.testing.assert_close(y, y_TD.float(), atol=1e-3, rtol=1e-4)
    constant, _ = decompose_with_residual(w_FD, b_D, mean_D, torch.zeros(7, 7), 2)
    assert all(bool(torch.isfinite(factor).all()) for factor in constant)


def test_residuals_that_cannot_be_kept():
    w_FD, b_D, _, _, _, mean_D, covariance_DD = sums()
    for split_rank in (0, 8):
        with pytest.raises(CutError, match="1 to 7"):
            decompose_with_residual(w_FD, b_D, mean_D, covariance_DD, split_rank)
    with pytest.raises(UsageError, match="NaN or infinite"):
        decompose_with_residual(w_FD, b_D, mean_D, covariance_DD * float("nan"), 2)


@pytest.mark.parametrize("split_rank", [0, -1, 8])
def test_decompose_refuses_ranks_that_do_not_exist(split_rank):
    with pytest.raises(CutError, match="1 to 7"):
        decompose(torch.zeros(12, 7), split_rank)


@pytest.mark.parametrize("build_half", [build_net_1, build_net_2])
@pytest.mark.parametrize(
    ("cut", "says"),
    [
        (Cut("sft", 0, 4), "blocks 1 to 4"),
        (Cut("sft", 5, 4), "blocks 1 to 4"),
        (Cut("sl", 5), "blocks 1 to 4"),
        (Cut("sft", 2, 0), "ranks 1 to 32"),
        (Cut("sft", 2, 33), "ranks 1 to 32"),
        (Cut("local", 2, 4), "sft or sl"),
    ],
)
def test_cuts_that_do_not_exist(tmp_path, build_half, cut, says):
    config = AutoConfig.from_pretrained(make_tiny_model(tmp_path, "bert", layers=4))
    with pytest.raises(CutError, match=says):
        build_half(config, "sequence-classification", cut)


def test_models_and_heads_that_are_not_supported():
    config = AutoConfig.for_model("t5")
    with pytest.raises(UnsupportedModelError, match=r"'t5' cannot be cut; supported types: .*bert"):
        build_net_1(config, "sequence-classification", Cut("sft", 1, 1))
    with pytest.raises(UnsupportedModelError, match="no head 'poetry'"):
        build_whole(AutoConfig.for_model("bert"), "poetry")
