"""What a run may take of its link."""

import pytest

from sft.cli.options import parse
from sft.cli.sizes import Size
from sft.errors import UsageError
from sft_edge.options.budget import BudgetOptions
from sft_edge.options.link import LinkOptions
from sft_edge.options.lora import LoraOptions
from sft_edge.options.train import CutOptions, TrainingOptions, check_together


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BudgetOptions(data_cap=Size("0GB")), "--data-cap must be above 0"),
        (lambda: BudgetOptions(max_mbit=0.2), "--max-mbit must be 0.3 or more, not 0.2"),
        (lambda: parse((BudgetOptions,), ["--data-cap", "2G"], "x"), "--data-cap: '2G' is not a size such as 500MB"),
    ],
)
def test_what_makes_no_sense_is_named(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            BudgetOptions(data_cap=Size("2GB")),
            "--data-cap 2 GB needs --mode sft, sl or frozen: one process has no wire",
        ),
        (BudgetOptions(max_mbit=5.0), "--max-mbit 5.0 needs --mode sft, sl or frozen: one process has no wire"),
    ],
)
def test_a_budget_of_one_process(budget, message):
    with pytest.raises(UsageError, match=message):
        check_together(CutOptions("local"), LinkOptions(), TrainingOptions(), LoraOptions(), budget)
    check_together(CutOptions("sl", 3), LinkOptions(), TrainingOptions(), LoraOptions(), budget)


def test_an_edge_that_leaves_knows_no_cap():
    given = (CutOptions("frozen", 2), LinkOptions("cloud:1"), TrainingOptions(detach=True), LoraOptions())
    with pytest.raises(UsageError, match="--detach does not go with --data-cap"):
        check_together(*given, BudgetOptions(data_cap=Size("2GB")))
    check_together(*given, BudgetOptions(max_mbit=5.0))
