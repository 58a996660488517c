"""Requests to open a session: every field may be wrong."""

import json
import sys
import tracemalloc

import pytest
import torch

from sft.errors import CutError, ProtocolError, ServerFullError, SFTError, UnsupportedModelError, UsageError
from sft.models import Cut
from sft.optim.listed import LISTED
from sft.v1 import split_training_pb2 as pb
from sft.wire.cut import cut_to_proto
from sft.wire.protocol import PROTOCOL_VERSION
from sft_cloud.engine import build as building
from sft_cloud.engine.build import build, make_session
from sft_cloud.engine.request import check_request
from sft_cloud.engine.start import make_opener
from sft_cloud.engine.worker import at_once
from sft_cloud.errors import PreconditionError
from sft_cloud.identity import ANONYMOUS
from sft_cloud.options import LimitOptions, ServeOptions

CPU = torch.device("cpu")


def config(edge, **changes):
    """The configuration of `edge` with entries changed; None removes one."""
    values = {**json.loads(edge.config.to_json_string(use_diff=False)), **changes}
    return json.dumps({name: value for name, value in values.items() if value is not None})


def try_to_open(edge, **overrides):
    spec = check_request(edge.request(**overrides))
    return make_session(spec, build(spec, CPU), [*edge.weights, *edge.factors], CPU)


def test_a_sound_request(edge):
    spec = check_request(edge.request())
    assert (spec.head, spec.cut, spec.seed) == (edge.head, edge.cut, edge.seed)
    assert {**spec.config.to_dict(), "dtype": None} == {**edge.config.to_dict(), "dtype": None, "_name_or_path": ""}
    assert try_to_open(edge).next_step == 0


def test_another_version_is_refused_with_both_named(edge):
    says = rf"release 9\.9\) speaks protocol version 1, .* speaks version {PROTOCOL_VERSION};"
    with pytest.raises(PreconditionError, match=says):
        check_request(edge.request(protocol_version=1, package_version="9.9"))


@pytest.mark.parametrize(
    "name", ["/etc", "../model", "a/../b", "..", "a/b/c", "a b", "a\n", "C:\\x", "é", "https://hub/x"]
)
def test_model_names_that_could_be_paths(edge, name):
    with pytest.raises(ProtocolError, match="neither a hub id nor"):
        check_request(edge.request(model_name=name))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"head": pb.HEAD_UNSPECIFIED}, "unknown head 0"),
        ({"cut": pb.Cut(split_layer=1)}, "unknown mode 0"),
        ({"wire_data_type": pb.DATA_TYPE_UNSPECIFIED}, "unknown wire_data_type 0"),
        ({"wire_data_type": pb.DATA_TYPE_INT8}, "unknown wire_data_type 4"),
        ({"activation_codec": 77}, "unknown activation_codec 77"),
        ({"gradient_codec": 77}, "unknown gradient_codec 77"),
        ({"factors_sha256": ""}, "factors_sha256 must name a blob"),
        ({"cut": pb.Cut(mode=pb.MODE_SFT, split_layer=1)}, "unknown residual 0"),
        ({"cut": pb.Cut(mode=pb.MODE_SL, split_layer=2, residual=pb.RESIDUAL_NONE)}, "be empty for mode sl"),
        ({"cut": pb.Cut(mode=pb.MODE_SFT, layer_name="blocks.5.mlp.fc2")}, r'"blocks\.5\.mlp\.fc2" .* role="cloud"'),
        ({"factors_sha256": "../secret"}, "is not a SHA-256"),
        ({"weights_sha256": "A" * 64}, "is not a SHA-256"),
        ({"config_json": ""}, "config_json does not describe a model"),
        ({"config_json": "[]"}, "models of type 'None' cannot be cut"),
        ({"config_json": "3"}, "config_json does not describe a model"),
        ({"config_json": "[" * 100_000}, "config_json does not describe a model"),
        ({"config_json": "{}"}, "models of type 'None' cannot be cut"),
        ({"config_json": '{"model_type": "unheard-of"}'}, "models of type 'unheard-of' cannot be cut"),
        ({"config_json": '{"model_type": "t5"}'}, "models of type 't5' cannot be cut"),
        ({"config_json": " " * (2 << 20)}, "at most 1048576 are accepted"),
        ({"config_json": json.dumps(dict.fromkeys(map(str, range(1001)), 0))}, "has 1001 settings; at most 1000"),
        ({"optimizer": pb.Optimizer(groups=[pb.ParameterGroup()] * 1025)}, "1025 groups of parameters; at most"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_fields_that_make_no_sense(edge, overrides, says):
    with pytest.raises(SFTError, match=says) as caught:
        check_request(edge.request(**overrides))
    assert isinstance(caught.value, (ProtocolError, UnsupportedModelError))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"},
        {"hidden_size": -32},
        {"hidden_size": 33},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 2.5},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 257},
        {"num_labels": 10**9},
        {"num_labels": -1},
        {"num_labels": "many"},
        {"id2label": None, "num_labels": 0},
        {"id2label": 5},
        {"max_position_embeddings": 10**12},
        {"max_position_embeddings": "long"},
        {"hidden_act": "unheard-of"},
        {"layer_norm_eps": "small"},
        {"problem_type": "poetry"},
        {"problem_type": None},
        {"hidden_dropout_prob": 2.0},
    ],
    ids=str,
)
def test_configurations_that_give_no_model(edge, changes):
    with pytest.raises((ProtocolError, CutError)) as caught:
        try_to_open(edge, config_json=config(edge, **changes))
    assert len(str(caught.value)) < 500


def test_a_cloud_that_can_train_no_adapters_says_whose_that_is(edge, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PreconditionError, match=r"the cloud lacks peft.* whoever runs it has to install"):
        check_request(edge.request(lora_json="{}"))
    check_request(edge.request())


def test_what_is_not_installed_here_is_not_blamed_on_the_configuration(edge, monkeypatch):
    def build_net_2(*_):
        raise ModuleNotFoundError("Could not import module 'BertForSequenceClassification'")

    monkeypatch.setattr(building, "build_net_2", build_net_2)
    with pytest.raises(
        PreconditionError, match=r"this server has not installed what such a model needs: Could not imp"
    ):
        try_to_open(edge)


def test_the_library_makes_no_list_of_blocks_that_are_too_many(edge):
    values = {"model_type": "qwen2", "num_hidden_layers": 10**6}
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="num_hidden_layers"):
            check_request(edge.request(config_json=json.dumps(values)))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_question_answering_has_two_outputs(make_edge):
    edge = make_edge(num_labels=2, head="question-answering")
    assert try_to_open(edge).next_step == 0
    wrong = config(edge, id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    with pytest.raises(ProtocolError, match="num_labels 2"):
        check_request(edge.request(config_json=wrong))


def test_a_low_rank_residual_has_a_bias_of_its_own(make_edge):
    edge = make_edge(cut=Cut("sft", 2, 4, "low-rank"))
    assert check_request(edge.request()).cut == edge.cut
    assert "bert.encoder.layer.1.output.dense.ffn3.bias" in {t.name for t in try_to_open(edge).stored_parameters()}


def test_a_language_model_needs_a_decoder(edge):
    with pytest.raises(UnsupportedModelError, match="not trained with head 'causal-lm'"):
        build(check_request(edge.request(head=pb.HEAD_CAUSAL_LM)), CPU)


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}},
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"_attn_implementation_internal": "someone/kernel"},
        {"experts_implementation": "someone/kernel"},
        {"use_kernels": True},
        {"_name_or_path": "/etc"},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"torch_dtype": "float16"},
        {"dtype": "bfloat16"},
        {"return_dict": False},
        {"output_attentions": True},
    ],
    ids=str,
)
def test_settings_that_only_the_cloud_decides_are_ignored(edge, changes):
    session = try_to_open(edge, config_json=config(edge, **changes))
    assert {tensor.dtype for tensor in session.stored_parameters()} == {torch.float32}
    expected = try_to_open(edge)
    for mine, other in zip(session.stored_parameters(), expected.stored_parameters(), strict=True):
        assert torch.equal(mine.read(), other.read()), mine.name


@pytest.mark.parametrize(
    "cut", [Cut("sft", 0, 4), Cut("sft", 4, 4), Cut("sft", 2, 0), Cut("sft", 2, 33), Cut("sft", 2, 33, "low-rank")]
)
def test_cuts_that_the_model_does_not_have(edge, cut):
    wire = cut_to_proto(cut)
    with pytest.raises(CutError):
        build(check_request(edge.request(cut=wire)), CPU)


def test_a_model_that_the_machine_could_never_hold(edge):
    changes = {"hidden_size": 1 << 17, "intermediate_size": 1 << 19}
    with pytest.raises(ServerFullError, match="takes at least"):
        build(check_request(edge.request(config_json=config(edge, **changes))), CPU)


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (pb.Optimizer(), "no optimizer ''"),
        (pb.Optimizer(name="system"), "no optimizer 'system'"),
        (pb.Optimizer(name="os.system"), "no optimizer 'os.system'"),
        (pb.Optimizer(name="torch.nn.Linear"), r"no optimizer 'torch\.nn\.Linear'"),
        (pb.Optimizer(name="transformers.optimization.Adafactor"), "no optimizer 'transformers.optimization.Ada"),
        (pb.Optimizer(name="bitsandbytes.RMSprop"), "no optimizer 'bitsandbytes.RMSprop'"),
        (pb.Optimizer(name="Lion"), "no optimizer 'Lion'"),
        (pb.Optimizer(name="LBFGS"), "LBFGS"),
        (pb.Optimizer(name="AdamW"), "AdamW"),
        (pb.Optimizer(name="AdamW", groups=[pb.ParameterGroup(parameter_names=["bert.nothing"])]), "bert.nothing"),
        (
            pb.Optimizer(
                name="AdamW", groups=[pb.ParameterGroup(arguments={"magic": pb.OptimizerArgument(number=1.0)})]
            ),
            "magic",
        ),
        (
            pb.Optimizer(name="AdamW", groups=[pb.ParameterGroup(arguments={"lr": pb.OptimizerArgument(text="fast")})]),
            "AdamW",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_optimizers_that_do_not_exist(edge, optimizer, says):
    before = set(sys.modules)
    with pytest.raises(UsageError, match=says):
        try_to_open(edge, optimizer=optimizer)
    assert not {name for name in sys.modules.keys() - before if name.startswith(("bitsandbytes", "lion"))}


@pytest.mark.parametrize("name", LISTED)
def test_an_optimizer_whose_package_is_not_here(edge, monkeypatch, name):
    monkeypatch.setitem(sys.modules, LISTED[name].module, None)  # as if it were not installed
    says = rf"on the cloud there is no {name} here: .* `pip install {LISTED[name].package}`; or use AdamW"
    with pytest.raises(PreconditionError, match=says) as caught:
        check_request(edge.request(optimizer=pb.Optimizer(name=name)))
    assert "\n" not in str(caught.value)


def test_only_optimizers_of_torch_where_the_operator_says_so(edge, tmp_path):
    optimizer = pb.Optimizer(name="transformers.Adafactor", groups=[pb.ParameterGroup()])
    options = ServeOptions(device="cpu", state_dir=tmp_path)
    opener = make_opener(options, LimitOptions(only_torch_optimizers=True))
    with pytest.raises(PreconditionError, match="optimizers of torch alone, and no transformers"):
        opener.open(edge.request(optimizer=optimizer), ANONYMOUS, at_once)
    assert make_opener(options, LimitOptions()).open(edge.request(optimizer=optimizer), ANONYMOUS, at_once)


@pytest.mark.parametrize("value", [{"text": "a"}, {"flag": True}, {"mixed": pb.OptimizerArgument.Mixed()}])
def test_lists_of_something_else_than_numbers(edge, value):
    mixed = pb.OptimizerArgument.Mixed(values=[pb.OptimizerArgument(number=1.0), pb.OptimizerArgument(**value)])
    group = pb.ParameterGroup(arguments={"eps": pb.OptimizerArgument(mixed=mixed)})
    with pytest.raises(ProtocolError, match="a list of something else than numbers and None"):
        check_request(edge.request(optimizer=pb.Optimizer(name="Adafactor", groups=[group])))


def test_memory_that_runs_out_is_not_blamed_on_the_configuration(edge, monkeypatch):
    def no_memory(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(building, "fill_in_pieces", no_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        try_to_open(edge)
