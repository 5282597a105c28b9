"""The calibrated fraction, and what is said about it."""

import pytest

from mindformers_glm32k.dryrun.report.estimate import FRACTION, calibrate, errors, estimate, note, published

CARD, ULYSSES = published()[0].report, published()[-1].report

TOKENS, LAYERS, HIDDEN, FFN, VOCABULARY = 32768, 28, 4096, 13696, 65024
LAYER = 2 * TOKENS * HIDDEN * ((4096 + 2 * 256) + HIDDEN + 3 * FFN)  # products of a layer and sequence, forward
ATTENTION = 2 * TOKENS * (TOKENS + 1) * HIDDEN


def test_the_fraction_meets_the_figure_it_is_calibrated_on():
    assert pytest.approx(calibrate(), abs=6e-4) == FRACTION
    found = estimate(CARD)["tokens_per_second_per_device"]
    assert found == pytest.approx(published()[0].speed, rel=1e-3)


def test_work_of_the_stored_programs_is_that_of_the_formulas():
    """CARD's stage: 7 layers, 16 sequences, recomputed but for each layer's last product; ULYSSES: an eighth of 32."""
    kept = 2 * TOKENS * FFN * HIDDEN
    stage = CARD["programs"][1]["work"]
    assert stage["matmul_flops"]["float16"] == pytest.approx(7 * 16 * (4 * LAYER - kept), rel=0.001)
    assert stage["attention_flops"]["float16"] == pytest.approx(7 * 16 * 4.5 * ATTENTION, rel=0.001)
    ulysses = ULYSSES["programs"][0]["work"]
    output = 2 * TOKENS * HIDDEN * VOCABULARY
    assert ulysses["matmul_flops"]["float16"] == pytest.approx(32 * 3 * (LAYERS * LAYER + output) / 8, rel=0.03)
    assert ulysses["attention_flops"]["float16"] == pytest.approx(32 * LAYERS * 3.5 * ATTENTION / 8, rel=0.001)


def test_the_note_names_every_figure_and_its_error():
    text = note()
    assert "estimates, not a measurement" in text
    assert all(str(speed) in text for speed in (1758, 1442, 1583, 2501))
    for figure, found, error in errors():
        assert error == found / figure.speed - 1
        assert f"estimated {found:.0f} ({error:+.0%})" in text


def test_the_order_of_the_published_layouts_is_right():
    card, ulysses = (estimate(report)["tokens_per_second_per_device"] for report in (CARD, ULYSSES))
    assert ulysses > 1.1 * card
