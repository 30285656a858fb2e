"""Are the reference's router logits what the contract says? By exact fractions, and by float64."""

from __future__ import annotations

from fractions import Fraction

import _checkout  # noqa: F401
import pytest
import torch
from router_calls import drawn

from aiter import reference
from aiter.reference import router as plain

INF = float("inf")
WIDTHS = (1, 7, 8, 9, 136, 1023, 1024, 1031, 2880)


def exact(number: float) -> Fraction:
    return Fraction.from_float(number)


def nearest_f32(number: Fraction) -> float:
    """Rounded to float32, ties to even: from the two neighbours of what float64 makes of it."""
    guess = torch.tensor(float(number)).item()
    close = [guess]
    for direction in (INF, -INF):
        close.append(torch.nextafter(torch.tensor(guess), torch.tensor(direction)).item())
    least = min(abs(exact(x) - number) for x in close)
    best = [x for x in close if abs(exact(x) - number) == least]
    even = [x for x in best if torch.tensor(x).view(torch.int32).item() % 2 == 0]
    return (even or best)[0]


def test_the_multiply_add_of_the_reference_rounds_once() -> None:
    """Also where a sum in float64 is rounded to the middle between two float32."""
    generator = torch.Generator().manual_seed(0)
    x, y, z = torch.randn(3, 4000, generator=generator)
    z[::2] *= torch.exp2(torch.randint(-40, 40, (2000,), generator=generator).float())
    # Products of 2^-24 (1 - 2^-46) and 2^-24 (1 + 2^-36), and what they are a middle's distance from.
    x[:4] = 2.0**-24 * torch.tensor([1 + 2.0**-23, 1 + 2.0**-12, -1 - 2.0**-23, -1 - 2.0**-12])
    y[:4] = torch.tensor([1 - 2.0**-23, 1 - 4095 * 2.0**-24]).repeat(2)
    z[:4] = torch.tensor([1 + 2.0**-23, 1.0, -1 - 2.0**-23, -1.0])
    x[5:40] *= 2.0**-75  # subnormal results
    y[5:40] *= 2.0**-66
    z[5:40] *= 2.0**-140
    got = plain._fma(x.double(), y.double(), z)
    wanted = [
        nearest_f32(exact(a) * exact(b) + exact(c))
        for a, b, c in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    ]
    assert torch.equal(got, torch.tensor(wanted))
    twice = (x.double() * y.double() + z.double()).float()
    assert torch.all(twice[:4] != got[:4])  # or the numbers show nothing


@pytest.mark.parametrize("width", WIDTHS)
def test_the_reference_is_near_float64(width: int) -> None:
    """Within the bound of the sum: a rounding for each item of a partial sum, and of the tree."""
    hidden, weight = drawn(7, 5, width, torch.float32)
    bias = torch.randn(5, generator=torch.Generator().manual_seed(1))
    got = reference.router_logits(hidden, weight, bias).double()
    wide = hidden.double() @ weight.double().T + bias.double()
    size = hidden.double().abs() @ weight.double().abs().T + bias.double().abs()
    roundings = 8 * -(-width // 1024) + 8
    assert torch.all((got - wide).abs() <= roundings * 2.0**-24 * 1.01 * size)
