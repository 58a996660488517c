"""Numbers that a program may be left to choose."""

import copy
import json
import pickle
from dataclasses import dataclass
from typing import Optional

import pytest

from sft.cli.options import options_of, parse
from sft.cli.whole_or_auto import AUTO, WholeOrAuto, is_auto
from sft.errors import UsageError


@dataclass
class Gearbox:
    """The gearbox."""

    gear: Optional[WholeOrAuto] = AUTO
    """which one"""


@pytest.mark.parametrize("text", ["3", "0", "-1"])
def test_a_number_is_a_plain_one(text):
    (box,) = parse((Gearbox,), ["--gear", text], "car")
    assert type(box.gear) is int
    assert not is_auto(box.gear)
    assert json.dumps(box.gear) == text


@pytest.mark.parametrize("flags", [[], ["--gear", "auto"]])
def test_auto_is_no_number_that_could_be_given(flags):
    (box,) = parse((Gearbox,), flags, "car")
    assert is_auto(box.gear)
    assert str(box.gear) == f"{box.gear}" == repr(box.gear) == "auto"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_copies_are_auto_too(protocol):
    for other in (copy.copy(AUTO), copy.deepcopy(Gearbox()).gear, pickle.loads(pickle.dumps(AUTO, protocol))):
        assert is_auto(other)
        assert str(other) == "auto"


def test_a_word_is_left_to_the_program_too():
    assert is_auto("auto")
    assert not is_auto("automatic")
    assert not is_auto(None)


def test_what_is_neither():
    with pytest.raises(UsageError, match="is not a whole number, nor auto"):
        parse((Gearbox,), ["--gear", "2.5"], "car")


def test_the_help_has_both():
    (option,) = options_of(Gearbox)
    assert option.metavar == "N|auto"
    assert option.help == "which one (default: auto)"
