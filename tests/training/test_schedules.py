"""Schedules against their closed formulas, torch's own, and SAMed's loop written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, PolynomialLR, SequentialLR

from samseg_monai.errors import ConfigError
from samseg_monai.training import warmup_schedule

BASE = 0.005


def rates(iterations: int, make=None, **options: object) -> list[float]:
    """The rate that each iteration runs with."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=BASE)
    schedule = make(optimizer) if make else warmup_schedule(optimizer, **options)
    seen = []
    for _ in range(iterations):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_poly_equals_the_published_loop_which_is_one_iteration_late():
    warmup, total, published, current = 25, 200, [], BASE / 25
    for it in range(total):
        published.append(current)  # SAMed and SAM-LST set the rate of the next iteration after the step
        current = BASE * (it + 1) / warmup if it < warmup else BASE * (1 - (it - warmup) / total) ** 0.9
    ours = rates(total, total=total, warmup=warmup)
    assert ours[:-1] == pytest.approx(published[1:], rel=1e-12)
    assert ours[0] == pytest.approx(published[0], rel=1e-12)


def test_the_first_step_learns_and_warm_up_ends_at_the_base_rate():
    seen = rates(10, total=40, warmup=4, decay="constant")
    assert seen[:5] == pytest.approx([BASE / 4, BASE / 2, 3 * BASE / 4, BASE, BASE])
    assert min(seen) > 0


def test_cosine_goes_from_the_base_rate_to_nothing():
    total, warmup = 50, 10
    seen = rates(total + 5, total=total, warmup=warmup, decay="cosine")
    expected = [BASE * 0.5 * (1 + math.cos(math.pi * (it - warmup) / (total - warmup))) for it in range(warmup, total)]
    assert seen[warmup:total] == pytest.approx(expected, rel=1e-12)
    assert seen[total:] == pytest.approx([0] * 5, abs=1e-18)


def torchs(optimizer, decay, total, warmup):
    later = {
        "poly": lambda: PolynomialLR(optimizer, total, power=0.9),
        "cosine": lambda: CosineAnnealingLR(optimizer, total - warmup),
        "constant": lambda: ConstantLR(optimizer, factor=1.0),
    }[decay]()
    first = LinearLR(optimizer, start_factor=1 / warmup, total_iters=max(1, warmup - 1))
    return SequentialLR(optimizer, [first, later], milestones=[warmup])


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("warmup", [1, 25])
@pytest.mark.parametrize("decay", ["poly", "cosine", "constant"])
def test_the_numbers_are_those_of_torchs_schedules_one_after_the_other(decay, warmup):
    ours = rates(200, total=200, warmup=warmup, decay=decay)
    theirs = rates(200, make=lambda optimizer: torchs(optimizer, decay, 200, warmup))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 2e-15 * BASE


@pytest.mark.parametrize("decay", ["poly", "cosine"])
def test_a_finished_training_that_is_given_more_iterations_goes_on_with_the_rates_of_the_longer_one(decay):
    weight = torch.nn.Parameter(torch.zeros(1))
    done, later = (torch.optim.SGD([weight], lr=BASE) for _ in range(2))
    schedule = warmup_schedule(done, total=20, warmup=3, decay=decay)
    for _ in range(20):
        done.step()
        schedule.step()
    longer = warmup_schedule(later, total=40, warmup=3, decay=decay)
    later.load_state_dict(done.state_dict())
    longer.load_state_dict(schedule.state_dict())
    later.step()
    longer.step()
    assert later.param_groups[0]["lr"] == rates(40, total=40, warmup=3, decay=decay)[21] > 0


def test_poly_without_warm_up_stays_at_zero_after_its_end():
    seen = rates(12, total=8, power=2.0)
    assert seen[:8] == pytest.approx([BASE * (1 - it / 8) ** 2 for it in range(8)])
    assert seen[8:] == [0.0] * 4


def test_all_bad_values_are_named_at_once():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    with pytest.raises(ConfigError) as caught:
        warmup_schedule(optimizer, total=10, warmup=10, decay="step", power=0)
    text = str(caught.value)
    assert "3 problems" in text
    for word in ("warmup", "'step'", "power"):
        assert word in text


def test_the_state_goes_through_a_weights_only_file_and_continues(tmp_path):
    whole = rates(20, total=20, warmup=3)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=BASE)
    schedule = warmup_schedule(optimizer, total=20, warmup=3)
    for _ in range(7):
        optimizer.step()
        schedule.step()
    torch.save({"schedule": schedule.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = torch.optim.SGD([weight], lr=BASE)
    again = warmup_schedule(fresh, total=20, warmup=3)
    fresh.load_state_dict(state["optimizer"])
    again.load_state_dict(state["schedule"])
    rest = []
    for _ in range(13):
        rest.append(fresh.param_groups[0]["lr"])
        fresh.step()
        again.step()
    assert rest == whole[7:]


def test_a_warm_up_longer_than_the_training_names_the_override():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE)
    with pytest.raises(ConfigError, match=r"0 to total - 1 = 1 iterations, got 250.*--schedule::warmup 0"):
        warmup_schedule(optimizer, total=2, warmup=250)
