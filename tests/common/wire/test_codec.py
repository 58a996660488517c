import pytest
import torch
from transformers import AutoConfig

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import decode_tensor, encode_tensor
from sft.wire.codec.messages import (
    decode_activation,
    decode_labels,
    decode_logits,
    encode_activation,
    encode_labels,
    encode_logits,
    outputs_of,
)
from sft.wire.codec.packing import pack, unpack
from sft.wire.codec.rows import NAMES

CPU = torch.device("cpu")
LENGTHS = [3, 1, 2]
DECODER = AutoConfig.for_model("gpt2", vocab_size=100)


def config(num_labels=3, problem_type="single_label_classification"):
    return AutoConfig.for_model("bert", num_labels=num_labels, problem_type=problem_type)


def test_float32_keeps_the_bits():
    x = torch.randn(3, 4)
    assert torch.equal(decode_tensor(encode_tensor(x), CPU), x)
    assert len(encode_tensor(x).data) == 48


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_types_take_half_the_bytes(name):
    x = torch.randn(3, 4)
    message = encode_tensor(x, NAMES[name])
    assert len(message.data) == 24
    assert torch.equal(decode_tensor(message, CPU), x.to(getattr(torch, name)).float())


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,)])
def test_small_shapes(shape):
    assert decode_tensor(encode_tensor(torch.ones(shape)), CPU).shape == shape


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (pb.Tensor(shape=[1], data=b"1234"), "unknown element type 0"),
        (pb.Tensor(data_type=9, shape=[1], data=b"1234"), "unknown element type 9"),
        (pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=[2], data=b"1234"), "needs 8 bytes, 4 came"),
        (pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=[2**31, 2**31], data=b""), "0 came"),
        (pb.Tensor(data_type=pb.DATA_TYPE_FLOAT16, shape=[1], data=b"1234"), "needs 2 bytes, 4 came"),
        (pb.Tensor(data_type=1, shape=[2**32 - 1] * 1_000_000), "of 1000000 dimensions; at most 16 are accepted"),
        (pb.Tensor(data_type=1, shape=[0, 2**32 - 1]), "too large, though it has no elements"),
        (pb.Tensor(data_type=1, shape=[0, 2**20, 2**20, 2**20, 2**20]), "too large, though it has no elements"),
    ],
)
def test_tensors_that_contradict_themselves(message, says):
    with pytest.raises(ProtocolError, match=says):
        decode_tensor(message, CPU)


def test_packing_leaves_padding_out_and_puts_zeros_back():
    x_BSR = torch.randn(3, 4, 2)
    packed = pack(x_BSR, LENGTHS)
    assert torch.equal(packed, torch.cat([x_BSR[0, :3], x_BSR[1, :1], x_BSR[2, :2]]))
    back = unpack(packed, LENGTHS, 4)
    assert torch.equal(back[0, :3], x_BSR[0, :3])
    assert not back[0, 3:].any()
    assert not back[1, 1:].any()
    assert not back[2, 2:].any()


def test_activation_round_trip():
    a_BSR = torch.randn(3, 4, 2)
    message = encode_activation(pack(a_BSR, LENGTHS), pb.DATA_TYPE_FLOAT32, LENGTHS, a_BSR.shape[1])
    assert len(message.packed.data) == sum(LENGTHS) * 2 * 4
    back, lengths = decode_activation(message, 2, 16, CPU)
    assert lengths == LENGTHS
    assert torch.equal(back, unpack(pack(a_BSR, LENGTHS), LENGTHS, 4))


def activation(rows=6, width=2, lengths=(3, 1, 2), padded_length=4):
    return pb.Activation(packed=encode_tensor(torch.zeros(rows, width)), lengths=lengths, padded_length=padded_length)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (activation(lengths=[]), "lengths must be"),
        (activation(lengths=[3, 0, 3]), "lengths must be"),
        (activation(lengths=[5, 1]), "lengths must be from 1 to the padded length 4"),
        (activation(lengths=[0] * 1_000_000, padded_length=0), "not a row for each token of 1000000 sequences"),
        (pb.Activation(packed=pb.Tensor(shape=[1] * 1000), lengths=[1], padded_length=4), "1, 1] and more, which is"),
        (activation(padded_length=17), "more than the model's 16"),
        (activation(rows=5), r"shape \[5, 2\], the lengths say \[6, 2\]"),
        (activation(width=3), r"shape \[6, 3\], the lengths say \[6, 2\]"),
    ],
)
def test_activations_that_contradict_themselves(message, says):
    with pytest.raises(ProtocolError, match=says):
        decode_activation(message, 2, 16, CPU)


@pytest.mark.parametrize(
    ("head", "shape", "rows"),
    [
        ("sequence-classification", (3, 5), 3),
        ("question-answering", (3, 4, 5), 6),
        ("causal-lm", (3, 4, 5), 6),
        ("token-classification", (3, 4, 5), 6),
        ("multiple-choice", (3, 5), 3),
    ],
)
def test_logits_round_trip(head, shape, rows):
    """Where every token has a row, padding does not travel, and comes back as zeros."""
    logits = torch.randn(shape)
    message = encode_logits(logits, LENGTHS, head, pb.DATA_TYPE_FLOAT32)
    assert list(message.shape) == [rows, 5]
    back = decode_logits(message, LENGTHS, 4, 5, head, CPU)
    expected = logits if logits.dim() == 2 else unpack(pack(logits, LENGTHS), LENGTHS, 4)
    assert torch.equal(back, expected)
    for wrong in (torch.zeros(rows, 4), torch.zeros(rows + 1, 5), torch.zeros(shape).unsqueeze(0)):
        with pytest.raises(ProtocolError, match=rf"it has to be \[{rows}, 5\]"):
            decode_logits(encode_tensor(wrong), LENGTHS, 4, 5, head, CPU)


def test_a_language_model_has_an_output_for_every_token():
    assert outputs_of(config(), "sequence-classification") == 3
    assert outputs_of(config(), "token-classification") == 3
    assert outputs_of(config(), "multiple-choice") == 1
    assert outputs_of(AutoConfig.for_model("gpt2", vocab_size=77), "causal-lm") == 77
    assert outputs_of(AutoConfig.for_model("bert", vocab_size=78), "masked-lm") == 78


@pytest.mark.parametrize(
    ("labels", "configuration", "head"),
    [
        ({"labels": torch.tensor([0, 2, 1])}, config(), "sequence-classification"),
        ({"labels": torch.tensor([0.5, -1.25, 5.0])}, config(1, "regression"), "sequence-classification"),
        (
            {"labels": torch.tensor([[0.0, 1, 1], [0, 0, 0], [1, 1, 1]])},
            config(3, "multi_label_classification"),
            "sequence-classification",
        ),
        (
            {"labels": torch.tensor([[0.0], [1.0], [1.0]])},
            config(1, "multi_label_classification"),
            "sequence-classification",
        ),
        (
            {"start_positions": torch.tensor([0, 1, 3]), "end_positions": torch.tensor([0, 2, 3])},
            config(2, None),
            "question-answering",
        ),
        (
            {"labels": torch.tensor([[5, -100, 7, -100], [0, -100, -100, -100], [-100, 9, -100, -100]])},
            DECODER,
            "causal-lm",
        ),
        ({"labels": torch.tensor([0, -100, 1])}, config(), "sequence-classification"),
        (
            {"labels": torch.tensor([[2, -100, 0, -100], [1, -100, -100, -100], [-100, 2, -100, -100]])},
            config(),
            "token-classification",
        ),
        ({"labels": torch.tensor([2])}, config(), "multiple-choice"),
        ({"labels": torch.tensor([0, -100, 0])}, config(), "multiple-choice"),
    ],
)
def test_labels_round_trip(labels, configuration, head):
    back = decode_labels(encode_labels(labels, LENGTHS), LENGTHS, 4, configuration, head)
    assert back.keys() == labels.keys()
    for name, y in labels.items():
        assert back[name].dtype == y.dtype
        assert torch.equal(back[name], y)


def test_labels_of_padding_do_not_travel():
    message = encode_labels({"labels": torch.arange(12).reshape(3, 4)}, LENGTHS)
    assert list(message.tokens.ids) == [0, 1, 2, 4, 8, 9]
    back = decode_labels(message, LENGTHS, 4, DECODER, "causal-lm")["labels"]
    assert back.tolist() == [[0, 1, 2, -100], [4, -100, -100, -100], [8, 9, -100, -100]]


def tokens(*ids):
    return pb.Labels(tokens=pb.Labels.Tokens(ids=ids))


def classes(*ids):
    return pb.Labels(classes=pb.Labels.Classes(ids=ids))


def values(columns, *numbers):
    return pb.Labels(values=pb.Labels.Values(values=numbers, columns=columns))


def spans(starts, ends):
    return pb.Labels(spans=pb.Labels.Spans(starts=starts, ends=ends))


@pytest.mark.parametrize(
    ("message", "configuration", "head", "says"),
    [
        (pb.Labels(), config(), "sequence-classification", "learns from classes, but the labels are None"),
        (values(0, 1, 2, 3), config(), "sequence-classification", "learns from classes"),
        (classes(0, 1, 2), config(1, "regression"), "sequence-classification", "learns from values"),
        (classes(0, 1, 2), config(), "question-answering", "learns from spans"),
        (classes(0, 1), config(), "sequence-classification", "3 labels expected, 2 came"),
        (classes(0, 1, 3), config(), "sequence-classification", "from 0 to 2"),
        (classes(0, -1, 1), config(), "sequence-classification", "from 0 to 2, or -100"),
        (classes(0, 1), config(), "multiple-choice", "3 labels expected, 2 came"),
        (classes(), config(), "multiple-choice", "3 labels expected, 0 came"),
        (classes(3), config(), "multiple-choice", "from 0 to 2, or -100"),
        (classes(0, 0, 1), config(), "multiple-choice", "from 0 to 0, or -100"),
        (tokens(0, 1, 2), config(), "multiple-choice", "learns from classes"),
        (classes(0, 1, 2), config(), "token-classification", "learns from tokens"),
        (tokens(0, 1, 2, 0, 1, 3), config(), "token-classification", "labels must be from 0 to 2, or -100"),
        (values(2, *[0.0] * 6), config(3, "multi_label_classification"), "sequence-classification", "2 columns"),
        (values(3, *[0.0] * 8), config(3, "multi_label_classification"), "sequence-classification", "9 labels"),
        (values(0, 1, float("nan"), 2), config(1, "regression"), "sequence-classification", "not a finite"),
        (spans([0, 0, 4], [1, 1, 1]), config(2), "question-answering", "beyond the padded length"),
        (spans([0, 0], [1, 1, 1]), config(2), "question-answering", "3 labels expected, 2 came"),
        (spans([0, 0, 0], [1, 1]), config(2), "question-answering", "3 labels expected, 2 came"),
        (classes(0, 1, 2), AutoConfig.for_model("gpt2"), "causal-lm", "learns from tokens"),
        (tokens(0, 1, 2, 3, 4, 5), config(), "sequence-classification", "learns from classes"),
        (tokens(0, 1, 2, 3, 4), DECODER, "causal-lm", "6 labels expected, 5 came"),
        (tokens(0, 1, 2, 3, 4, 100), DECODER, "causal-lm", "labels must be from 0 to 99, or -100"),
        (tokens(0, 1, 2, 3, 4, -1), DECODER, "causal-lm", "labels must be from 0 to 99, or -100"),
        (tokens(), DECODER, "causal-lm", "6 labels expected, 0 came"),
    ],
)
def test_labels_that_do_not_fit(message, configuration, head, says):
    with pytest.raises(ProtocolError, match=says):
        decode_labels(message, LENGTHS, 4, configuration, head)
