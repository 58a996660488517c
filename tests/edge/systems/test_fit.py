"""Tables that are fitted to activations: the same from the same rows, and good for rows like these."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sft.errors import UsageError
from sft.wire.codec.fitted import Fitted
from sft_edge.systems.fit import fit_tables, row_bytes_of

CPU = torch.device("cpu")


def activations(count: int, seed: int, width: int = 64) -> Tensor:
    """Of a dozen kinds, with channels that go together and a few that are much larger than the others."""
    fixed, drawn = (torch.Generator().manual_seed(number) for number in (7, seed))
    kinds = 3 * torch.randn(12, width, generator=fixed)
    mix = torch.randn(width, width, generator=fixed) * torch.logspace(0.5, -1.5, width)[:, None]
    chosen = kinds[torch.randint(12, (count,), generator=drawn)]
    return (chosen + torch.randn(count, width, generator=drawn) @ mix) * (1 + 20 * (torch.arange(width) % 50 == 3))


def error(x: Tensor, tables: dict[str, Tensor]) -> float:
    code = Fitted(tables, CPU)
    back = code.decode(code.encode(x), x.shape[1])
    return float((back - x).norm() / (x - x.mean(dim=0)).norm())


def test_rows_that_were_not_fitted_to_come_out_alike() -> None:
    tables = fit_tables(activations(3000, 0), 5)
    assert error(activations(500, 1), tables) < 0.25
    worse = fit_tables(activations(150, 0), 5)
    assert error(activations(500, 1), worse) > 1.2 * error(activations(500, 1), tables)


def test_the_same_rows_and_seed_give_the_same_tables() -> None:
    x = activations(600, 0)
    first, other = fit_tables(x, 5), fit_tables(x, 6)
    state = torch.get_rng_state()
    again = fit_tables(x.clone(), 5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["words"], other["words"])
    assert torch.equal(torch.get_rng_state(), state), "a run's own generator is left alone"


@pytest.mark.parametrize(("width", "size"), [(1, 2), (4, 2), (32, 5), (64, 10), (384, 60), (768, 120), (2048, 320)])
def test_bytes_of_a_row(width: int, size: int) -> None:
    assert row_bytes_of(width) == size
    if width <= 64:
        assert Fitted(fit_tables(activations(40, 0, width), 0), CPU).row_bytes(width) == size


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_rows_beside_those_with_a_massive_channel(spread: float) -> None:
    """As where GPT-2 and Llama rest their attention: thousands of times larger, in a row of twelve."""

    def rows(count: int, seed: int, massive: float) -> Tensor:
        x, drawn = activations(count, seed) / 50, torch.Generator().manual_seed(seed + 100)
        x[::12, 5] += massive * (1 + spread * torch.randn(len(x[::12]), generator=drawn))
        return x

    def error_of_others(massive: float) -> float:
        code, x = Fitted(fit_tables(rows(3000, 0, massive), 5), CPU), rows(600, 1, massive)
        others = torch.arange(600) % 12 > 0
        moved = code.decode(code.encode(x), 64) - x
        assert moved[~others].norm() < 0.05 * x[~others].norm() or not massive
        return float(moved[others].norm() / (x[others] - x[others].mean(dim=0)).norm())

    assert error_of_others(2000.0) < 1.25 * error_of_others(0.0)


@pytest.mark.parametrize("count", [1, 3, 300])
def test_few_rows_and_rows_that_are_alike(count: int) -> None:
    """Fewer than words, and none that varies: it is a code all the same."""
    x = activations(1, 0).expand(count, -1).contiguous()
    code = Fitted(fit_tables(x, 0), CPU)
    torch.testing.assert_close(code.decode(code.encode(x), 64), x, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, 7e4])
def test_what_cannot_be_written(value: float) -> None:
    x = activations(20, 0)
    x[3, 4] = value
    with pytest.raises(UsageError, match="no numbers, or too large, for --codec fitted: choose another"):
        fit_tables(x, 0)
