"""Every architecture: the halves compute what the cut model in one piece does; without a cut that is the library's."""

from __future__ import annotations

from typing import Dict, List, NamedTuple

import pytest
import torch
from support.tiny import ARCHITECTURES, make_tiny_model, tiny_config
from torch import Tensor

from sft.batch import IGNORED, Batch, attention_mask
from sft.errors import CutError, UnsupportedModelError
from sft.models import HEADS, Cut, Net1, Net2, Whole, build_net_1, build_net_2, build_whole, heads_of
from sft.models.weights import factor_tensors, fill, pretrained_tensors
from sft.tensors.pretrained import PretrainedWeights

CUTS = [Cut("sft", 2, 4), Cut("sft", 2, 4, "low-rank"), Cut("sl", 2)]
EVERY = [(name, head) for name in ARCHITECTURES for head in heads_of(tiny_config(name))]
TWO = [(name, head) for name in ARCHITECTURES for head in heads_of(tiny_config(name))[:2]]
"""One with a row of logits for each token, one without: what depends on the blocks alone."""
SHARED = {"deberta-v2": {"rel_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias"}}


class Trio(NamedTuple):
    net_1: Net1
    net_2: Net2
    whole: Whole


def make_batch(head: str, pad: int = 0) -> Batch:
    """Three sequences of 7, 3 and 5 tokens, padded on the right."""
    ids_BS = torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    lengths = [7, 3, 5]
    for row, length in enumerate(lengths):
        ids_BS[row, length:] = pad
    labels: Dict[str, Dict[str, Tensor]] = {
        "sequence-classification": {"labels": torch.tensor([0, 2, 1])},
        "question-answering": {"start_positions": torch.tensor([1, 0, 2]), "end_positions": torch.tensor([3, 0, 2])},
        "causal-lm": {"labels": ids_BS.clone()},
        "token-classification": {"labels": (ids_BS % 4).masked_fill(ids_BS % 4 == 3, IGNORED)},
        "multiple-choice": {"labels": torch.tensor([1])},
        "masked-lm": {"labels": ids_BS.masked_fill(ids_BS % 3 == 0, IGNORED)},
    }
    return Batch({"input_ids": ids_BS}, lengths, labels[head])


def make_config(name: str, head: str, layers: int = 3) -> object:
    # Larger weights than the library draws: small ones hide what is left out.
    return tiny_config(name, layers, initializer_range=0.2, num_labels=2 if head == "question-answering" else 3)


def make_trio(name: str, head: str, cut: Cut, layers: int = 3) -> Trio:
    """Both halves and the whole, without dropout."""
    config, batch = make_config(name, head, layers), make_batch(head)
    for_edge, for_cloud = factor_tensors(config, head, cut, None, 3, [batch])
    trio = Trio(build_net_1(config, head, cut), build_net_2(config, head, cut), build_whole(config, head, cut))
    for net in trio:
        fill(net, [*for_edge, *for_cloud], seed=3)
        net.eval()
    return trio


def backward(trio: Trio, batch: Batch) -> Tensor:
    """Gradients of the halves; the loss."""
    a_BSR = trio.net_1(batch.inputs, batch.lengths)
    received = a_BSR.detach()
    for row, length in enumerate(batch.lengths):
        received[row, length:] = 0  # padding does not travel
    received.requires_grad_()
    loss = trio.net_2(received, batch.lengths, batch.labels).loss
    loss.backward()
    a_BSR.backward(received.grad)
    return loss.detach()


@pytest.mark.one_in(11)
@pytest.mark.parametrize("cut", CUTS, ids=["none", "low-rank", "sl"])
@pytest.mark.parametrize(("name", "head"), EVERY)
def test_halves_equal_the_whole(name: str, head: str, cut: Cut) -> None:
    trio, batch = make_trio(name, head, cut), make_batch(head)
    loss = backward(trio, batch)
    expected = trio.whole(*batch)
    expected.loss.backward()

    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
    with torch.no_grad():
        logits = trio.net_2(trio.net_1(batch.inputs, batch.lengths), batch.lengths, {}).logits
    for row, length in enumerate(batch.lengths):
        of_tokens = slice(0, length) if HEADS[head].per_token else slice(None)
        torch.testing.assert_close(logits[row][of_tokens], expected.logits[row][of_tokens], atol=1e-6, rtol=1e-5)
    lower, upper = trio.net_1.whole_parameters(), trio.net_2.whole_parameters()
    whole = trio.whole.whole_parameters()
    assert {**lower, **upper}.keys() == whole.keys()
    assert {one.split("encoder.")[1] for one in lower.keys() & upper.keys()} == SHARED.get(name, set())
    for one, parameter in whole.items():
        ours = upper.get(one, lower.get(one))
        assert torch.equal(ours, parameter), one
        assert parameter.requires_grad == ours.requires_grad == (not (one in lower and one in upper)), one
        if parameter.grad is not None or ours.grad is not None:
            torch.testing.assert_close(ours.grad, parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.one_in(11)
@pytest.mark.parametrize("mode", ["sft", "sl"])
@pytest.mark.parametrize("split_layer", [1, 3])
@pytest.mark.parametrize(("name", "head"), TWO)
def test_the_first_and_the_last_block_can_be_the_split_layer(name: str, head: str, split_layer: int, mode: str) -> None:
    trio, batch = make_trio(name, head, Cut(mode, split_layer, 2 if mode == "sft" else 0)), make_batch(head)
    assert backward(trio, batch).item() == pytest.approx(trio.whole(*batch).loss.item(), abs=1e-6)


@pytest.mark.one_in(11)
@pytest.mark.parametrize("residual", ["none", "low-rank"])
@pytest.mark.parametrize(("name", "head"), EVERY)
def test_three_steps_of_the_halves_are_three_of_the_whole(name: str, head: str, residual: str) -> None:
    trio, batch = make_trio(name, head, Cut("sft", 2, 4, residual)), make_batch(head)
    optimizers = [torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2) for net in trio]
    losses: List[float] = []
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = backward(trio, batch)
        expected = trio.whole(*batch)
        expected.loss.backward()
        assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
        halves = {**trio.net_1.whole_parameters(), **trio.net_2.whole_parameters()}
        for one, parameter in trio.whole.whole_parameters().items():
            if parameter.grad is not None:
                torch.testing.assert_close(halves[one].grad, parameter.grad, atol=1e-5, rtol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert len(set(losses)) == 3


@pytest.mark.one_in(11)
@pytest.mark.parametrize("residual", ["none", "low-rank"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dropout_is_where_it_was(name: str, residual: str) -> None:
    """One after the other the halves draw what the whole draws; what there is no dropout in, eval() does not change."""
    head = "sequence-classification"
    trio, batch = make_trio(name, head, Cut("sft", 2, 4, residual)), make_batch(head)
    without = trio.whole(*batch).loss
    for net in trio:
        net.train()
    torch.manual_seed(0)
    split = trio.net_2(trio.net_1(batch.inputs, batch.lengths), batch.lengths, batch.labels).loss
    torch.manual_seed(0)
    whole = trio.whole(*batch).loss
    assert split.item() == pytest.approx(whole.item(), abs=1e-6)
    has_dropout = name not in ("llama", "qwen2", "qwen3", "mistral", "gemma")
    assert (abs(whole.item() - without.item()) > 1e-4) == has_dropout


@pytest.mark.one_in(11)
@pytest.mark.parametrize(("name", "head"), EVERY)
def test_without_a_cut_it_is_the_librarys_model(tmp_path, name: str, head: str) -> None:
    config = make_config(name, head)
    overrides = {"initializer_range": 0.2, "num_labels": config.num_labels}
    directory = make_tiny_model(tmp_path, name, layers=3, head=head, **overrides)
    library = HEADS[head].auto_class.from_pretrained(directory).eval()
    whole = build_whole(library.config, head)
    fill(whole, pretrained_tensors(whole, PretrainedWeights(directory)), seed=0)
    batch = make_batch(head, pad=config.pad_token_id)
    with torch.no_grad():
        ours = whole.eval()(batch.inputs, batch.lengths, {}).logits
        given = {**batch.inputs, "attention_mask": attention_mask(batch.lengths, 7)}
        theirs = library(**{name: x[:, None] if head == "multiple-choice" else x for name, x in given.items()})
    if head == "question-answering":
        theirs = torch.stack([theirs.start_logits, theirs.end_logits], dim=-1)
    else:
        theirs = theirs.logits
    for row, length in enumerate(batch.lengths):
        of_tokens = slice(0, length) if HEADS[head].per_token else slice(None)
        torch.testing.assert_close(ours[row][of_tokens], theirs[row][of_tokens], atol=1e-6, rtol=1e-5)


@pytest.mark.one_in(11)
@pytest.mark.parametrize(("name", "head"), TWO)
@pytest.mark.parametrize("residual", ["full", "low-rank"])
def test_at_full_rank_with_the_residual_nothing_is_lost(name: str, head: str, residual: str) -> None:
    """All components of the sum, or all of W and the residual beside it: the undecomposed model."""
    config, batch = make_config(name, head), make_batch(head)
    cut, lengths = Cut("sft", 2, 32, residual), [7] * 3
    calibration = [batch._replace(lengths=lengths)]  # the very tokens; 32 components are more than they span
    for_edge, for_cloud = factor_tensors(config, head, cut, None, 3, calibration)
    cut_model, plain = build_whole(config, head, cut), build_whole(config, head, Cut("sl", 2))
    fill(cut_model, [*for_edge, *for_cloud], seed=3)
    fill(plain, [], seed=3)
    with torch.no_grad():
        logits = cut_model.eval()(batch.inputs, lengths, {}).logits
        expected = plain.eval()(batch.inputs, lengths, {}).logits
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)


TIED = [(name, head) for name, head in EVERY if HEADS[head].of_vocabulary]


@pytest.mark.parametrize(("name", "head"), TIED)
def test_a_tied_head_is_untied_by_the_cut(tmp_path, name: str, head: str) -> None:
    """From a checkpoint, which holds it once, and from the seed: the head starts as the embedding."""
    directory = make_tiny_model(tmp_path, name, layers=2, head=head, tie_word_embeddings=True)
    config = tiny_config(name, 2, tie_word_embeddings=True)
    tied = build_whole(config, head)
    (of_head,) = (one for one in dict(tied.model.named_parameters(remove_duplicate=False)) if is_head(tied.model, one))
    assert of_head not in tied.whole_parameters()
    for checkpoint in (PretrainedWeights(directory), None):
        net_1, net_2 = (build(config, head, Cut("sl", 1)) for build in (build_net_1, build_net_2))
        for net in (net_1, net_2, tied):
            fill(net, pretrained_tensors(net, checkpoint), seed=5)
        weight = net_2.whole_parameters()[of_head]
        assert torch.equal(weight, net_1.model.get_input_embeddings().weight)
        assert tied.model.get_output_embeddings().weight is tied.model.get_input_embeddings().weight
        upper = {**tied.whole_parameters(), of_head: tied.model.get_output_embeddings().weight}
        assert all(torch.equal(parameter, upper[one]) for one, parameter in net_2.whole_parameters().items())
        out = net_2.model.get_output_embeddings()
        if head == "masked-lm" and name not in ("distilbert", "electra"):
            (of_whole,) = (one for one, p in net_2.whole_parameters().items() if p is out.bias)
            assert of_whole.endswith(("predictions.bias", "lm_head.bias")), "the name that a checkpoint has"
        assert not net_2.model.config.tie_word_embeddings
    assert config.tie_word_embeddings


def is_head(model: object, name: str) -> bool:
    return name.endswith(".weight") and model.get_submodule(name[: -len(".weight")]) is model.get_output_embeddings()


def test_a_head_that_reads_the_embeddings_themselves() -> None:
    config = tiny_config("deberta-v2", legacy=False)
    if not hasattr(tiny_config("deberta-v2"), "legacy"):
        pytest.skip("this release knows no such head")
    with pytest.raises(UnsupportedModelError, match="reads the embeddings, which stay on the edge"):
        build_net_2(config, "masked-lm", Cut("sl", 1))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_padding_reaches_no_token(name: str) -> None:
    """What stands after a sequence does not count, whatever it is."""
    trio = make_trio(name, "sequence-classification", Cut("sft", 2, 4))
    one, other = make_batch("sequence-classification", pad=0), make_batch("sequence-classification", pad=9)
    logits = [trio.net_2(trio.net_1(b.inputs, b.lengths), b.lengths, {}).logits for b in (one, other)]
    torch.testing.assert_close(*logits)


def test_blocks_that_see_a_window_keep_it() -> None:
    """The upper blocks of such a Qwen2 attend to the last tokens alone; newer releases look up which by number."""
    window = {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 2}
    config = tiny_config("qwen2", 4, initializer_range=0.2, num_labels=3, **window)
    head, cut = "sequence-classification", Cut("sft", 1, 4)
    factors = factor_tensors(config, head, cut, None, 3)
    trio = Trio(build_net_1(config, head, cut), build_net_2(config, head, cut), build_whole(config, head, cut))
    for net in trio:
        fill(net, [*factors[0], *factors[1]], seed=3)
        net.eval()
    batch = make_batch(head)
    assert backward(trio, batch).item() == pytest.approx(trio.whole(*batch).loss.item(), abs=1e-6)


def test_deberta_with_a_convolution() -> None:
    """As deberta-v2-xlarge: it follows block 1, on the edge, so block 1 cannot be the one that is cut."""
    config = tiny_config("deberta-v2", 3, conv_kernel_size=3, conv_act="gelu", initializer_range=0.2)
    head, cut = "sequence-classification", Cut("sft", 2, 4)
    batch = make_batch(head)._replace(labels={"labels": torch.tensor([0, 1, 1])})
    factors = factor_tensors(config, head, cut, None, 3)
    trio = Trio(build_net_1(config, head, cut), build_net_2(config, head, cut), build_whole(config, head, cut))
    for net in trio:
        fill(net, [*factors[0], *factors[1]], seed=3)
        net.eval()
    assert backward(trio, batch).item() == pytest.approx(trio.whole(*batch).loss.item(), abs=1e-6)
    assert any(".conv." in one for one in trio.net_1.whole_parameters())
    assert not any(".conv." in one for one in trio.net_2.whole_parameters())
    for build in (build_net_1, build_net_2):
        with pytest.raises(CutError, match="choose split_layer 2 or more"):
            build(config, head, Cut("sft", 1, 4))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"do_layer_norm_before": False}, "blocks end in a norm .*opt-350m"),
        ({"word_embed_proj_dim": 16}, "projected to the model's width"),
        ({"layerdrop": 0.1}, "set layerdrop to 0"),
    ],
)
def test_members_of_a_family_that_cannot_be_cut(overrides: Dict[str, object], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        build_whole(tiny_config("opt", **overrides), "causal-lm")


def test_heads_that_an_architecture_is_not_trained_with() -> None:
    has = "sequence-classification, causal-lm, token-classification"
    with pytest.raises(UnsupportedModelError, match=f"'gpt2' .* 'question-answering'; heads that they have: {has}$"):
        build_whole(tiny_config("gpt2"), "question-answering")
    has = "sequence-classification, question-answering, token-classification, multiple-choice, masked-lm"
    with pytest.raises(UnsupportedModelError, match=f"'bert' .* 'causal-lm'; heads that they have: {has}$"):
        build_whole(tiny_config("bert"), "causal-lm")
    with pytest.raises(UnsupportedModelError, match=r"'opt' .* have: sequence-classification, causal-lm$"):
        build_whole(tiny_config("opt"), "token-classification")
