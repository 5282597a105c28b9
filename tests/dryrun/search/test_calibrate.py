"""The fitted estimate: its coefficients, its error on figures that are left out, and what it says of them."""

import math

import numpy as np
import pytest
from conftest import ROOT

from mindformers_glm32k.dryrun.report.estimate import FIGURES, FITTED, SPREAD, WORK, at_peak, estimate, fitted
from mindformers_glm32k.dryrun.search.calibrate import figures, fit, leave_one_out, spread


def test_figures_have_sources():
    found = figures()
    assert len(found) == FIGURES and all(figure.source and figure.speed > 1000 for figure in found)
    assert {1758, 1583, 1442, 2501} <= {figure.speed for figure in found}


def test_the_documents_say_how_many_figures_there_are():
    text = " ".join((ROOT / "docs" / "dryrun.md").read_text(encoding="utf-8").split())
    assert f"a least-squares fit to {FIGURES} figures" in text and f"a fit to the {FIGURES - 1} others" in text
    changes = " ".join((ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split())
    assert f"fitted to {FIGURES} published figures" in changes


def test_the_coefficients_are_those_of_the_fit():
    found = fit(figures())
    assert {kind: pytest.approx(value, abs=0.006) for kind, value in found.items()} == FITTED
    assert spread() == pytest.approx(SPREAD, abs=6e-4)


def test_every_coefficient_is_one_that_a_device_can_have():
    assert 1 < FITTED["matmul"] < 2 and 1 < FITTED["attention"] < 2.5
    assert 0 < FITTED["communication"] <= 1  # what is hidden behind other work takes no time


def test_a_figure_that_is_left_out_is_estimated_worse():
    """Leaving out costs something, and the fit is not one figure's."""
    apart = {figure.what: error for figure, error in leave_one_out()}
    within = {
        figure.what: fitted(figure.report)["tokens_per_second_per_device"] / figure.speed - 1 for figure in figures()
    }
    assert np.mean(np.abs(list(apart.values()))) > np.mean(np.abs(list(within.values())))
    assert max(map(abs, apart.values())) < 0.35


def test_nine_intervals_in_ten_hold_their_figure():
    held = [
        fitted(figure.report)["interval"][0] <= figure.speed <= fitted(figure.report)["interval"][1]
        for figure in figures()
    ]
    assert sum(held) >= 0.9 * len(held) - 1


def test_parts_at_the_peak_add_up_with_the_bubble():
    report = figures()[0].report
    assert sum(at_peak(report).values()) == pytest.approx(estimate(report, fraction=1.0)["step_seconds"])
    assert set(at_peak(report)) == set(WORK)
    found = fitted(report)
    low, high = found["interval"]
    assert math.sqrt(low * high) == pytest.approx(found["tokens_per_second_per_device"])
