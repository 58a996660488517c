"""Weights and optimizer state of a session: sent down, loaded back; settings that a commit changes."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sft.errors import ProtocolError, UsageError
from sft.models.lora import LoraSpec, lora_to_json
from sft.optim.state import MAX_SCALARS_BYTES, SCALARS, checked_state, stored_state
from sft.tensors.stream import safetensors_chunks, sha256_of
from sft.v1 import split_training_pb2 as pb
from sft_cloud.engine.build import build, make_session
from sft_cloud.engine.request import check_request
from sft_cloud.errors import PreconditionError
from sft_cloud.session.session import State

CPU = torch.device("cpu")


class Rig:
    """A session, and a store that holds what was put there."""

    def __init__(self, edge, directory, **request):
        spec = check_request(edge.request(**request))
        tensors = [*edge.weights, *edge.factors]
        self.edge, self.directory = edge, directory
        self.session = make_session(spec, build(spec, CPU), tensors, CPU, self.find)

    def find(self, sha256):
        path = self.directory / f"{sha256}.safetensors"
        return path if path.is_file() else None

    def put(self, stored):
        """As a download is put back; returns the hash."""
        sha256 = sha256_of(stored)
        (self.directory / f"{sha256}.safetensors").write_bytes(b"".join(safetensors_chunks(stored)))
        return sha256

    def put_tensors(self, tensors):
        sha256 = f"{len(list(self.directory.iterdir())):064x}"
        save_file(tensors, self.directory / f"{sha256}.safetensors")
        return sha256

    def load(self, sha256, optimizer_state=False, micro_batch=0):
        body = pb.LoadState(sha256=sha256, optimizer_state=optimizer_state)
        message = pb.EdgeMessage(step=self.session.next_step, micro_batch=micro_batch, load_state=body)
        return self.session.handle(message).committed

    def train(self, *steps):
        for step in steps:
            self.session.handle(self.edge.forward(step, activation=self.edge.activation(step)))
            self.session.handle(self.edge.commit(step))

    def weights(self):
        return {tensor.name: tensor.read().clone() for tensor in self.session.stored_parameters()}

    def state(self):
        return {tensor.name: tensor.read().clone() for tensor in self.session.stored_optimizer_state()}


@pytest.fixture
def rig(edge, tmp_path):
    return Rig(edge, tmp_path)


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adagrad", "NAdam", "ASGD", "Adafactor", "Rprop"])
def test_a_session_goes_on_from_what_another_one_sent(make_edge, tmp_path, optimizer):
    """Weights and optimizer state: the steps after are the same bits. Dropout off, as it goes by the step's number."""
    edge = make_edge(optimizer_name=optimizer, learning_rate=1e-3)
    edge.config.hidden_dropout_prob = edge.config.attention_probs_dropout_prob = 0.0
    for group in edge.groups:
        if optimizer == "Rprop":
            del group.arguments["weight_decay"]
        if optimizer == "SGD":
            group.arguments["momentum"] = 0.9
    first, second = Rig(edge, tmp_path), Rig(edge, tmp_path)
    first.train(0, 1)
    version = second.session.version
    committed = second.load(first.put(first.session.stored_parameters()))
    assert committed.next_step == 0
    second.load(first.put(first.session.stored_optimizer_state()), optimizer_state=True, micro_batch=1)
    assert second.session.version == version + 2
    assert second.session.state is State.READY
    assert same_bits(first.weights(), second.weights())
    assert same_bits(first.state(), second.state())
    for session, step in ((first.session, 2), (second.session, 0)):
        message = edge.forward(step, activation=edge.activation(9))
        session.handle(message)
        session.handle(edge.commit(step))
    assert same_bits(first.weights(), second.weights())
    assert same_bits(first.state(), second.state())


def test_a_fresh_state_can_be_sent_and_loaded(rig):
    before = rig.state()
    assert before.keys() == {SCALARS}
    sha256 = rig.put(rig.session.stored_optimizer_state())
    rig.train(0)
    assert rig.state().keys() > {SCALARS}
    rig.load(sha256, optimizer_state=True)
    assert same_bits(rig.state(), before)


def test_what_is_loaded_is_no_part_of_the_file(rig):
    """A blob may serve many sessions: nobody trains on its memory."""
    rig.train(0)
    sha256 = rig.put(rig.session.stored_optimizer_state())
    rig.load(sha256, optimizer_state=True)
    content = rig.find(sha256).read_bytes()
    rig.train(1)
    assert rig.find(sha256).read_bytes() == content
    again = Rig(rig.edge, rig.directory)
    again.load(sha256, optimizer_state=True)
    assert sha256_of(again.session.stored_optimizer_state()) == sha256


def refused(rig, sha256, says, optimizer_state=False):
    weights, state = rig.weights(), rig.state()
    with pytest.raises(ProtocolError, match=says):
        rig.load(sha256, optimizer_state)
    assert rig.session.state is State.READY
    assert same_bits(weights, rig.weights())
    assert same_bits(state, rig.state())


def test_blobs_that_are_no_parameters_of_this_half(rig):
    good = rig.weights()
    name = "classifier.weight"
    refused(rig, "0" * 64, "there is no blob 0000")
    refused(rig, "../../etc/passwd", "not a SHA-256")
    refused(rig, rig.put_tensors({n: x for n, x in good.items() if n != name}), "'classifier.weight' is missing")
    refused(rig, rig.put_tensors({**good, "stranger": torch.ones(1)}), "'stranger' does not belong there")
    refused(rig, rig.put_tensors({**good, name: torch.ones(1, 1)}), r"shape \[1, 1\], not \[3, 32\]")
    refused(rig, rig.put_tensors({**good, name: good[name].to(torch.int32)}), "type torch.int32")
    torn = rig.put_tensors(good)
    rig.find(torn).write_bytes(rig.find(torn).read_bytes()[:-1])
    refused(rig, torn, "not a safetensors file")
    assert rig.load(rig.put_tensors(good)).next_step == 0


def test_merged_weights_are_not_loaded_into_adapters(edge, tmp_path):
    lora = LoraSpec(2, 8, 0.0, False, True, ["bert.encoder.layer.2.attention.self.query"])
    rig = Rig(edge, tmp_path, lora_json=lora_to_json(lora))
    merged = rig.put(rig.session.stored_parameters())
    refused(rig, merged, "with adapters merged into them; this session trains adapters")
    parameters = {name: p.detach() + 1 for name, p in rig.session._half.whole_parameters().items()}
    assert rig.load(rig.put_tensors(parameters)).next_step == 0
    assert same_bits({n: p.detach() for n, p in rig.session._half.whole_parameters().items()}, parameters)


def scalars(values):
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


SCALAR_STEP = {SCALARS: scalars({"classifier.weight": {"step": 3}})}


@pytest.mark.first_only
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop(SCALARS), "no optimizer state"),
        (lambda state: state.update({SCALARS: torch.tensor(list(b"{"), dtype=torch.uint8)}), "no optimizer state"),
        (lambda state: state.update({SCALARS: torch.tensor(list(b"[]"), dtype=torch.uint8)}), "no optimizer state"),
        (lambda state: state.update({SCALARS: torch.ones(3)}), "no optimizer state"),
        (
            lambda state: state.update({SCALARS: scalars({"classifier.weight": {"x": [1]}})}),
            "no optimizer state",
        ),
        (lambda state: state.update({"stranger/exp_avg": torch.ones(1)}), "'stranger' that this half does not have"),
        (lambda state: state.update({"exp_avg": torch.ones(1)}), "'' that this half does not have"),
        (lambda state: state.update({"classifier.weight/exp_avg": torch.ones(7)}), r"shape \[7\]"),
        (lambda state: state.update({"classifier.weight/exp_avg": torch.ones(2, 3, 32)}), r"shape \[2, 3, 32\]"),
        (lambda state: state.update({"classifier.weight/exp_avg": torch.ones(1, 32)}), r"shape \[1, 32\], not"),
        (lambda state: state.update({"classifier.weight/step": torch.ones(32)}), r"'step' .* of shape \[32\], not"),
        (
            lambda state: state.update({"classifier.weight/step": torch.tensor(True)}),
            r"is a tensor of shape \[\], not a floating-point tensor",
        ),
        (lambda state: state.pop("classifier.weight/step"), "lacks 'step' for 'classifier.weight'"),
        (
            lambda state: state.update({f"classifier.weight/{i}": torch.ones(1) for i in range(20_000)}),
            "holds '0' for 'classifier.weight'",
        ),
        (lambda state: state.update({SCALARS: scalars({"classifier.weight": {"x": 1}})}), "holds 'x'"),
        (
            lambda state: state.update({SCALARS: torch.zeros(MAX_SCALARS_BYTES + 1, dtype=torch.uint8)}),
            "no optimizer state",
        ),
        (lambda state: (state.pop("classifier.weight/step"), state.update(SCALAR_STEP)), "'step' .* is a number, not"),
    ],
    ids=range(17),
)
def test_blobs_that_are_no_optimizer_state(rig, change, says):
    rig.train(0)
    state = rig.state()
    change(state)
    refused(rig, rig.put_tensors(state), says, optimizer_state=True)


@pytest.mark.parametrize("fields", [{"loss_scale": 0.0}, {"labels": None}], ids=str)
def test_a_state_is_loaded_while_nothing_waits(rig, fields):
    sha256 = rig.put(rig.session.stored_parameters())
    rig.train(0)
    rig.session.handle(rig.edge.forward(1, 0))
    rig.session.handle(rig.edge.forward(1, 1, **fields))
    gradients = [p.grad.clone() for p in rig.session._half.parameters()]
    with pytest.raises(PreconditionError, match=r"1 results of the model are waiting for a backward\(\)"):
        rig.load(sha256)
    body = pb.LoadState(sha256=sha256)
    dropped = [pb.Weight(micro_batch=1, dropped=True)]
    rig.session.handle(pb.EdgeMessage(step=1, weights=dropped, load_state=body))
    assert rig.session.state is State.ACCUMULATING
    assert rig.put(rig.session.stored_parameters()) == sha256
    assert all(p.grad.equal(before) for p, before in zip(rig.session._half.parameters(), gradients, strict=True))
    rig.session.handle(rig.edge.forward(1, 2))
    rig.session.handle(rig.edge.commit(1))
    assert rig.session.next_step == 2


def test_a_state_is_loaded_after_the_commit_that_comes_with_it(rig):
    sha256 = rig.put(rig.session.stored_parameters())
    rig.session.handle(rig.edge.forward(0, loss_scale=0.0))
    body = pb.LoadState(sha256=sha256)
    with pytest.raises(PreconditionError, match="step 5 came"):
        rig.session.handle(pb.EdgeMessage(step=5, load_state=body))
    rig.session.handle(pb.EdgeMessage(step=1, commit=rig.edge.commit_part(0), load_state=body))
    assert (rig.session.next_step, rig.session.state) == (1, State.READY)
    assert rig.put(rig.session.stored_parameters()) == sha256


class Averaging(torch.optim.Optimizer):
    """Keeps more than tensors."""

    def __init__(self, parameters, decay):
        super().__init__(parameters, {"decay": decay})

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.update(step=3, scale=0.5, done=True, buffer=None, mean=torch.zeros_like(parameter))


def test_numbers_that_are_no_tensors_travel_too():
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = Averaging([w], decay=0.5)
    optimizer.step()
    stored = {tensor.name: tensor.read() for tensor in stored_state(optimizer, {"w": w, "v": v})}
    assert stored.keys() == {SCALARS, "w/mean"}
    loaded = checked_state(optimizer, {"w": w, "v": v}, stored)
    assert loaded["state"].keys() == {0}
    assert {name: x for name, x in loaded["state"][0].items() if name != "mean"} == {
        "step": 3,
        "scale": 0.5,
        "done": True,
        "buffer": None,
    }
    with pytest.raises(ProtocolError, match="does not train"):
        checked_state(optimizer, {"w": w, "v": v}, {**stored, "v/mean": torch.ones(3)})
    optimizer.state[v] = {"history": [1, 2]}
    with pytest.raises(UsageError, match="'history', a list, which cannot be sent"):
        stored_state(optimizer, {"w": w, "v": v})


# Settings.


def group_arguments(*groups):
    return [
        pb.GroupArguments(arguments={name: pb.OptimizerArgument(**value) for name, value in group.items()})
        for group in groups
    ]


def test_a_commit_changes_settings_before_it_steps(make_edge, tmp_path):
    """As a schedule of momentum does; and they stay."""
    edge = make_edge(optimizer_name="SGD")
    for group in edge.groups:
        group.arguments["momentum"] = 0.5
    rig = Rig(edge, tmp_path)
    rig.session.handle(edge.forward(0))
    message = edge.commit(0)
    changed = group_arguments({"momentum": {"number": 0.25}, "nesterov": {"flag": True}}, {})
    message.commit.group_arguments.extend(changed)
    rig.session.handle(message)
    settings = [(group["momentum"], group["nesterov"]) for group in rig.session._optimizer.param_groups]
    assert settings == [(0.25, True), (0.5, False)]
    rig.train(1)
    assert rig.session._optimizer.param_groups[0]["momentum"] == 0.25


def test_settings_of_adam(rig):
    rig.session.handle(rig.edge.forward(0))
    message = rig.edge.commit(0)
    betas = {"numbers": pb.OptimizerArgument.Numbers(values=[0.5, 0.75])}
    message.commit.group_arguments.extend(group_arguments({"betas": betas}, {"eps": {"integer": 1}}))
    rig.session.handle(message)
    groups = rig.session._optimizer.param_groups
    assert [group["betas"] for group in groups] == [(0.5, 0.75), (0.9, 0.999)]
    assert groups[1]["eps"] == 1


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([{}], "for each of the 2 groups, or none"),
        ([{}, {}, {}], "for each of the 2 groups, or none"),
        ([{"magic": {"number": 1.0}}, {}], "no setting 'magic'"),
        ([{"lr": {"number": 1.0}}, {}], "no setting 'lr'"),
        ([{"params": {"number": 1.0}}, {}], "no setting 'params'"),
        ([{"eps": {"number": math.nan}}, {}], "'eps' must be finite"),
        ([{"betas": {"numbers": pb.OptimizerArgument.Numbers(values=[0.5, math.inf])}}, {}], "must be finite"),
        ([{"betas": {"numbers": pb.OptimizerArgument.Numbers(values=[0.5])}}, {}], "cannot become"),
        ([{"betas": {"number": 0.5}}, {}], "cannot become"),
        ([{}, {"eps": {"text": "small"}}], "cannot become"),
        ([{}, {"eps": {"flag": True}}], "cannot become"),
        ([{}, {"amsgrad": {"number": 1.0}}], "cannot become"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(rig, groups, says):
    rig.session.handle(rig.edge.forward(0))
    weights = rig.weights()
    message = rig.edge.commit(0)
    message.commit.group_arguments.extend(group_arguments(*groups))
    with pytest.raises(ProtocolError, match=says):
        rig.session.handle(message)
    assert (rig.session.next_step, rig.session.state) == (0, State.ACCUMULATING)
    assert same_bits(weights, rig.weights())
