"""Tables that are fitted to activations: the same from the same rows, and good for rows like these."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sft.errors import UsageError
from sft.wire.codec.fitted import Fitted
from sft_edge.systems.fit import fit_tables, mean_row_bytes

CPU = torch.device("cpu")


def activations(count: int, seed: int, width: int = 64) -> Tensor:
    """Of a dozen kinds, with channels that go together and a few that are much larger than the others."""
    fixed, drawn = (torch.Generator().manual_seed(number) for number in (7, seed))
    kinds = 3 * torch.randn(12, width, generator=fixed)
    mix = torch.randn(width, width, generator=fixed) * torch.logspace(0.5, -1.5, width)[:, None]
    chosen = kinds[torch.randint(12, (count,), generator=drawn)]
    return (chosen + torch.randn(count, width, generator=drawn) @ mix) * (1 + 20 * (torch.arange(width) % 50 == 3))


def there_and_back(code: Fitted, x: Tensor) -> Tensor:
    return code.decode(code.encode(x), len(x), x.shape[1], CPU)


def error(x: Tensor, tables: dict[str, Tensor]) -> float:
    code = Fitted(tables, CPU)
    back = there_and_back(code, x)
    return float((back - x).norm() / (x - x.mean(dim=0)).norm())


def test_rows_that_were_not_fitted_to_come_out_alike() -> None:
    """In more bytes where tables were fitted to few rows, and not as near where they were to very few."""
    x, (many, some, few) = activations(500, 1), (fit_tables(activations(count, 0), 5) for count in (3000, 150, 24))
    assert error(x, many) < 0.12
    assert len(Fitted(some, CPU).encode(x)) > 1.3 * len(Fitted(many, CPU).encode(x))
    assert error(x, few) > 1.3 * error(x, many)


def test_the_same_rows_and_seed_give_the_same_tables() -> None:
    x = activations(600, 0)
    first, other = fit_tables(x, 5), fit_tables(x, 6)
    state = torch.get_rng_state()
    again = fit_tables(x.clone(), 5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["whole"], other["whole"])
    assert torch.equal(torch.get_rng_state(), state), "a run's own generator is left alone"


@pytest.mark.parametrize(("width", "size"), [(1, 6), (4, 6), (32, 6), (64, 9.6), (384, 57.6), (768, 115.2)])
def test_bytes_of_a_row(width: int, size: float) -> None:
    """About so many, of rows that were not fitted to."""
    assert mean_row_bytes(width) == pytest.approx(size)
    code, x = Fitted(fit_tables(activations(1500, 0, width), 0), CPU), activations(500, 1, width)
    assert 0.9 * size - 1 < len(code.encode(x)) / 500 < 1.1 * size


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
        moved = there_and_back(code, x) - x
        assert moved[~others].norm() < 0.05 * x[~others].norm() or not massive
        return float(moved[others].norm() / (x[others] - x[others].mean(dim=0)).norm())

    assert error_of_others(2000.0) < 1.25 * error_of_others(0.0)


@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("count", [1, 3, 8, 64, 200, 500])
def test_few_rows_and_rows_that_are_alike(count: int, kinds: int) -> None:
    """Fewer than words, and hardly one that differs: it is a code all the same."""
    x = activations(kinds, 0)[torch.arange(count) % kinds]
    back = there_and_back(Fitted(fit_tables(x, 0), CPU), x)
    if kinds == 1:
        torch.testing.assert_close(back, x, rtol=2e-3, atol=2e-3)
    assert back.isfinite().all()
    assert count < 64 or (back - x).norm() <= 0.1 * x.norm()


@pytest.mark.parametrize("row", [5, 7999])
def test_one_row_that_is_far_from_all_others(row: int) -> None:
    x = activations(8000, 0)
    x[row, 3] += 1000.0
    assert error(activations(500, 1), fit_tables(x, 5)) < 0.15


@pytest.mark.parametrize("value", [math.nan, math.inf, 7e4])
def test_what_cannot_be_written(value: float) -> None:
    x = activations(20, 0)
    x[3, 4] = value
    with pytest.raises(UsageError, match="no numbers, or too large, for --codec fitted: choose another"):
        fit_tables(x, 0)
