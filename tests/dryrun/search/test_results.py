"""What a search writes, and the command's errors."""

import json
from dataclasses import replace

import pytest
import yaml

from dryrun.search.invented import GIB, card, search
from dryrun.tiny import CONFIG
from mindformers_glm32k import cli
from mindformers_glm32k.dryrun.search import results


@pytest.fixture(scope="module")
def candidates():
    return search()[0].run()


def test_files(candidates, tmp_path):
    (tmp_path / "07_of_an_older_search.yaml").write_text("a: 1")
    text = results.write(candidates, card(), 56 * GIB, tmp_path, str(CONFIG))
    found = json.loads((tmp_path / "search.json").read_text())
    first = found["candidates"][0]
    assert {"config", "tokens_per_second_per_card", "interval", "peak_gib", "order", "compiled"} <= set(first)
    assert first["figures"] == "compiled in full" and found["candidates"][-1]["figures"] != "a guess"
    assert first["compiled"] is True and first["peak_gib"] <= 56 and found["nearest_misses"] == []
    speeds = [item["tokens_per_second_per_card"] for item in found["candidates"]]
    assert speeds == sorted(speeds, reverse=True)
    assert sorted(path.name for path in tmp_path.glob("*.yaml")) == [item["config"] for item in found["candidates"]]
    assert text == (tmp_path / "search.md").read_text() and candidates[0].setting.name in text
    assert (tmp_path / "search.png").stat().st_size > 10_000


def test_a_yaml_is_the_original_with_the_settings_keys(candidates, tmp_path):
    results.write(candidates, card(), 56 * GIB, tmp_path, str(CONFIG))
    for name, item in zip(sorted(path.name for path in tmp_path.glob("*.yaml")), candidates):
        written = yaml.safe_load((tmp_path / name).read_text())
        assert written == results.applied(card(), item.setting.keys(item.order))


def test_nothing_fits(tmp_path):
    candidates = search(limit=4)[0].run()
    text = results.write(candidates, card(), 4 * GIB, tmp_path, str(CONFIG))
    found = json.loads((tmp_path / "search.json").read_text())
    assert found["candidates"] == [] and found["nearest_misses"][0]["peak_gib"] > 4
    assert list(tmp_path.glob("*.yaml")) == [] and "too much" in text
    miss = found["nearest_misses"][0]
    assert sum(miss["gib_by_term"].values()) == pytest.approx(miss["peak_gib"], abs=0.05)
    line = results.misfit(candidates, 4 * GIB, tmp_path)
    term, size = max(miss["gib_by_term"].items(), key=lambda item: item[1])
    assert f"{miss['layout']}, the smallest, takes {miss['peak_gib']:.1f} GiB" in line and "\n" not in line
    assert f"{miss['peak_gib'] - 4:.1f} GiB over" in line and f": {size:.1f} GiB (" in line and "--devices" in line


@pytest.mark.parametrize(
    "term, words",
    [
        ("weights", "weights: 9.0 GiB"),
        ("optimizer", "optimizer states: 9.0 GiB (activations 1.0); more NPUs (--devices) share them out, LoRA"),
        ("logits", "logits and loss: 9.0 GiB (activations 1.0); a smaller model_config.loss_chunk_size"),
        ("gathered", "gathered weights: 9.0 GiB"),
        ("gradients", "--rows"),
    ],
)
def test_the_limiting_term_has_its_own_advice(candidates, term, words, tmp_path):
    terms = {term: 9 * GIB, "activations": GIB, "cache": 0.0}
    least = replace(candidates[0], bytes=10 * GIB, terms=terms)
    line = results.misfit([least], 8 * GIB, tmp_path)
    assert (
        words in line and "is 2.0 GiB over" in line and line.endswith(f"--memory 10 (table: {tmp_path / 'search.md'})")
    )


def test_nothing_that_compiles_is_said_too(tmp_path):
    assert "no layout compiles" in results.misfit([], 8 * GIB, tmp_path)


def test_the_command_ends_in_that_line(candidates, tmp_path, capsys, monkeypatch):
    import mindformers_glm32k.dryrun.search as package

    class Nothing:
        def __init__(self, *arguments):
            pass

        def run(self, quick):
            return [replace(candidates[0], bytes=70 * GIB)]

    monkeypatch.setattr(package, "Search", Nothing)
    command = ["dryrun", "--search", "--devices", "8", "--config", str(CONFIG), "--output_dir", str(tmp_path)]
    assert cli.main(command) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: --memory 56: nothing fits; ") and "14.0 GiB over" in error[-1]
    assert json.loads((tmp_path / "search.json").read_text())["candidates"] == []


def test_the_frontier_has_no_candidate_that_another_beats(candidates):
    best = results.frontier(candidates)
    assert best[-1].speed == max(item.speed for item in candidates)
    for item in best:
        assert not any(one.speed >= item.speed and one.bytes < item.bytes for one in candidates)


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--devices N"),
        (["--devices", "0"], "--devices 0: a whole number"),
        (["--devices", "8", "--memory", "0"], "--memory 0.0"),
        (["--devices", "8", "--minutes", "0"], "--minutes 0.0"),
        (["--devices", "8", "--rows", "-1"], "--rows -1"),
        (["--devices", "8", "--execute", "2"], "--search and --execute"),
    ],
)
def test_bad_options_end_in_one_line(options, message, capsys, tmp_path):
    command = ["dryrun", "--search", "--config", str(CONFIG), "--output_dir", str(tmp_path / "out"), *options]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
