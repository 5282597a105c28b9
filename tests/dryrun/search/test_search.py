"""The search over invented programs: what it learns, what it compiles, what it finds."""

from dataclasses import replace

import pytest

from dryrun.search.invented import GIB, search
from mindformers_glm32k.dryrun.search import search as module
from mindformers_glm32k.dryrun.search.figures import best_order, figures_of, fullest
from mindformers_glm32k.dryrun.search.space import Setting


def test_the_best_are_known_and_compiled_and_fit():
    found, invented = search()
    candidates = found.run()
    best = candidates[0]
    assert best.compiled and best.known and best.bytes <= 56 * GIB and best.order == "bfs"
    assert [item.speed for item in candidates] == sorted((item.speed for item in candidates), reverse=True)
    assert sum(name.startswith("full") for name in invented.asked) >= module.COMPILED
    assert all(low < item.speed < high for item in candidates for low, high in [item.interval])
    assert len(candidates) <= module.SHOWN


def test_what_is_extrapolated_is_what_the_whole_program_takes():
    found, invented = search()
    for item in found.run(quick=True):
        assert not item.compiled
        if item.known and not item.setting.recomputed:
            true = [figures_of(program) for program in invented.of(item.setting)]
            assert item.bytes == pytest.approx(fullest(true, best_order(true)), rel=0.01)


def test_nothing_faster_that_fits_is_missed():
    """With every program known, no setting beats the winner by more than a guess may be wrong."""
    found, invented = search()
    best = found.run(quick=True)[0]
    true = []
    for setting in found.settings:
        item = found.candidate(setting, [figures_of(program) for program in invented.of(setting)])
        if item.bytes <= 56 * GIB:
            true.append(item.speed)
    assert best.speed >= 0.98 * max(true)


def test_a_family_is_compiled_once():
    found, invented = search()
    found.run(quick=True)
    assert len(invented.asked) == len(set(invented.asked)) < 15


def test_less_memory_is_less_speed():
    speeds = []
    for limit in (32, 56):
        candidates = search(limit=limit)[0].run(quick=True)
        assert candidates[0].bytes <= limit * GIB
        speeds.append(candidates[0].speed)
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]


def test_layouts_that_do_not_compile_are_passed_over(capsys):
    found, _ = search(broken=lambda setting: setting.context_parallel > 1)
    candidates = found.run(quick=True)
    assert candidates and all(item.known and item.setting.context_parallel == 1 for item in candidates)
    assert "does not compile: model_config.something" in capsys.readouterr().err


def test_where_nothing_fits_the_nearest_misses_are_left():
    candidates = search(limit=4)[0].run()
    assert candidates and all(item.bytes > 4 * GIB and not item.compiled for item in candidates)
    assert candidates[0].bytes == min(item.bytes for item in candidates)


def test_one_look_is_enough_where_the_states_do_not_fit(capsys):
    found, invented = search(devices=1)
    candidates = found.run()
    assert len(invented.asked) == 1 and candidates[0].known and candidates[0].bytes > 56 * GIB
    assert list(candidates[0].terms)[:2] == ["update", "optimizer"]


def test_layers_are_recomputed_as_a_whole_until_it_fits():
    candidates = search(limit=45)[0].run(quick=True)
    mixed = [item for item in candidates if item.setting.recomputed]
    assert all(item.bytes <= 45.5 * GIB for item in mixed)


def test_other_chunks_are_compiled_only_where_they_limit():
    """Where the loss is not in the peak of the programs, no smaller chunk of it is tried."""
    found, invented = search(limit=45)
    found.run(quick=True)
    resized = [name for name in invented.asked if "_loss" in name or "chunk2048" in name or "chunk8192" in name]
    assert len(resized) <= module._RESIZED

    without, invented = search(limit=45, loss=False)
    without.run(quick=True)
    assert not any("_loss1024" in name for name in invented.asked)


def test_a_smaller_chunk_of_the_loss_makes_a_layout_fit():
    """By the programs that were compiled, the loss is what keeps the fastest layout from fitting."""
    found, invented = search()
    setting = next(one for one in found.settings if one.recompute == "whole" and one.data_parallel == 8)
    found._compile_shallow(setting.family)
    usual, smaller = (found.candidate(one) for one in (setting, replace(setting, loss_chunk=1024)))
    assert found.model.limited_by_loss(setting)
    assert not smaller.known and smaller.bytes < usual.bytes and 0.99 * usual.speed < smaller.speed < usual.speed
    found.limit = (usual.bytes + smaller.bytes) / 2
    (item,) = [item for item in found._resized(usual, usual) if item.setting.loss_chunk]
    assert item.setting.loss_chunk == 1024 and item.bytes <= found.limit
    true = [figures_of(program) for program in invented.of(item.setting)]
    assert item.bytes == pytest.approx(fullest(true, item.order), rel=0.02)


def test_virtual_stages_take_less_time_and_more_memory():
    found, _ = search()
    setting = Setting(2, 1, 1, 4, 8, (7, 7, 7, 7))
    plain, interleaved = (found.candidate(one) for one in (setting, replace(setting, interleave=2)))
    assert interleaved.speed > plain.speed and interleaved.bytes > plain.bytes
    assert interleaved.parts["bubble"] == pytest.approx(plain.parts["bubble"] / 2, rel=0.1)
    assert interleaved.parts["communication"] > plain.parts["communication"]


def test_the_terms_of_memory_add_up():
    for item in search()[0].run(quick=True):
        assert sum(item.terms.values()) == pytest.approx(item.bytes) and min(item.terms.values()) >= 0
        assert list(item.terms.values()) == sorted(item.terms.values(), reverse=True)


def test_no_compile_begins_after_the_minutes():
    found, invented = search(minutes=5)
    minutes = iter(range(1000))  # each look at the clock is a minute later
    found.progress.clock = lambda: 60 * next(minutes)
    found.progress.began = 0
    candidates = found.run()
    assert 0 < len(invented.asked) <= 3 and candidates and not any(item.compiled for item in candidates)


def test_time_left_is_said(capsys):
    search()[0].run(quick=True)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("search: 2 and 4 layers a stage of ") and line.endswith(" left") for line in lines)


@pytest.mark.parametrize("devices", [1, 2, 4, 16, 64])
def test_other_numbers_of_cards(devices):
    candidates = search(devices=devices, limit=60)[0].run(quick=True)
    assert all(item.setting.devices == devices for item in candidates)
