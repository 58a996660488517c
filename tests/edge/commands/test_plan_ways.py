"""Which ways to train are looked at."""

import pytest
from support.jobs import run_options
from support.tiny import tiny_config

from sft.errors import CutError, UsageError
from sft_edge.commands.plan.memory import Sizes, with_room
from sft_edge.commands.plan.ways import ends, ways
from sft_edge.model_files import Source
from sft_edge.options import PlanCutOptions, RunOptions

HEAD = "sequence-classification"
SOURCE = Source("", tiny_config(layers=3), None)


def options(**cut: object) -> RunOptions:
    values = {name: cut.pop(name) for name in list(cut) if name in ("labels", "lora_r", "lora_half")}
    return run_options(**values)._replace(cut=PlanCutOptions(**cut))  # type: ignore[arg-type]


def found(**cut: object):
    return [(w.mode, w.split_layer, w.split_rank, w.codec) for w in ways(options(**cut), SOURCE, HEAD)]


def test_all_that_train_takes():
    every = found()
    assert len(every) == len(set(every)) == 3 * (3 * 3 + 3 + 4) + 1
    assert ("local", None, 8, None) in every
    assert {way[3] for way in every if way[0] == "frozen"} == {"int8", "float32", "int4", "fitted"}
    assert {way[3] for way in every if way[0] == "sft"} == {"int8", "float32", "int4"}, "nothing is fitted to a rank"


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"mode": "sft", "codec": "int8"}, 9),
        ({"mode": "sft", "split_layer": 2, "split_rank": 5}, 3),
        ({"mode": "frozen", "split_layer": 2}, 4),
        ({"codec": "fitted"}, 3 + 1),
        ({"mode": "sl", "split_layer": 1, "codec": None}, 1),
        ({"freeze_edge": True}, 3 * (3 * 3 + 4 + 4)),
        ({"residual": "low-rank", "split_layer": 1}, 9),
    ],
)
def test_what_is_given_all_have(given, count):
    assert len(found(**given)) == count


def test_adapters_on_the_edge_are_for_an_edge_that_is_trained():
    assert {way[0] for way in found(lora_r=4)} == {"sft", "sl", "local"}
    assert {way[0] for way in found(lora_r=4, lora_half="cloud")} == {"sft", "sl", "frozen"}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"split_layer": 4}, CutError, "split_layer is 4, but this model has blocks 1 to 3"),
        ({"split_rank": 99}, CutError, "split_rank is 99, but this layer has ranks 1 to 32"),
        ({"mode": "frozen", "gradient_codec": "int8"}, UsageError, "--gradient-codec says nothing with --freeze-edge"),
    ],
)
def test_what_there_is_no_way_for(given, error, message):
    with pytest.raises(error, match=message):
        found(**given)


def test_of_a_model_that_is_decomposed_already_the_cut_that_it_has():
    from sft.models import Cut

    source = Source("", SOURCE.config, None, cut=Cut("sft", 2, 8))
    assert [(w.mode, w.split_layer) for w in ways(options(codec="int8"), source, HEAD)] == [("sft", 2), ("local", None)]


@pytest.mark.parametrize(
    ("layers", "measured"),
    [([1], (1, 1)), ([1, 2], (1, 2)), ([1, 2, 3], (1, 2)), (range(1, 13), (1, 11)), ([5], (5, 5)), ([2, 3], (2, 3))],
)
def test_what_is_measured(layers, measured):
    assert ends(layers) == measured


def test_what_the_device_has_no_memory_for_is_left_out():
    every = ways(options(), SOURCE, HEAD)
    sizes = Sizes(SOURCE.config, HEAD, [1, 2, 3])
    assert with_room(every, sizes, None) == with_room(every, sizes, 1 << 40) == every
    least = with_room(every, sizes, int(4 * sizes.edge(1) / 0.69))
    assert {(way.mode, way.split_layer) for way in least} == {("frozen", 1)}
    some = with_room(every, sizes, int(16 * sizes.edge(2) / 0.69))
    assert ("sft", 2) in {(way.mode, way.split_layer) for way in some}
    assert {way.mode for way in some if way.split_layer == 3} == {"frozen"}
    with pytest.raises(UsageError, match=r"this device has 1 kB of memory free, and the edge's half takes at least"):
        with_room(every, sizes, 1000)


def test_adapters_leave_room():
    """Beside them the weights have neither gradients nor states of an optimizer."""
    every = [way for way in ways(options(lora_r=4), SOURCE, HEAD) if way.mode == "sl"]
    sizes = Sizes(SOURCE.config, HEAD, [1, 2, 3])
    room = int(4 * sizes.edge(2) / 0.69)
    assert {way.split_layer for way in with_room(every, sizes, room, adapted=True)} == {1, 2}
    with pytest.raises(UsageError):
        with_room(every, sizes, room)


def test_of_a_run_that_is_to_leave_those_that_can():
    given = run_options(detach=True, server="cloud.example:1")._replace(cut=PlanCutOptions())
    assert {way.mode for way in ways(given, SOURCE, HEAD)} == {"frozen"}


def test_sizes_are_those_of_the_halves():
    from sft.models import Cut, build_net_1, build_net_2

    sizes = Sizes(SOURCE.config, HEAD, [1, 2, 3])
    for layer in (1, 2, 3):
        cut = Cut("sl", layer)
        assert sizes.edge(layer) == sum(one.numel() for one in build_net_1(SOURCE.config, HEAD, cut).parameters())
        assert sizes.cloud(layer) == sum(one.numel() for one in build_net_2(SOURCE.config, HEAD, cut).parameters())
    assert sizes.whole == sizes.edge(1) + sizes.cloud(1)
