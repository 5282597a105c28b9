"""The search for prediction, over invented programs: memory linear in the prompts."""

import pytest
import yaml

from dryrun.search.invented import GIB
from dryrun.tiny import CONFIG
from mindformers_glm32k.dryrun.analysis.extrapolate import LAYERS
from mindformers_glm32k.dryrun.search import predict
from mindformers_glm32k.dryrun.search.results import misfit
from mindformers_glm32k.errors import InputError

YAML = yaml.safe_load(CONFIG.with_name("predict_glm32k.yaml").read_text(encoding="utf-8"))


class Invented:
    """12 GiB of weights and 1 GiB of cache a prompt at 28 layers; a token takes what reading that takes."""

    def __init__(self, folder, written):
        pass

    def shallow(self, config):
        rows = config["model"]["model_config"]["batch_size"]
        cards = config["parallel_config"]["model_parallel"]
        return [[self.program(phase, layers, rows, cards) for phase in predict.PHASES] for layers in LAYERS]

    def program(self, phase, layers, rows, cards):
        size = round((12 + rows) * GIB * layers / 28 / cards)
        work = {"matmul_flops": {}, "attention_flops": {}, "vector_bytes": size, "vector_operations": 1}
        return {
            "rank": 0,
            "stage": 0,
            "phase": phase,
            "compile_seconds": 1.0,
            "peak_rss_bytes": 1,
            "total_bytes_by_order": {"bfs": size, "dfs": size + GIB},
            "parameter_bytes": round(11 * GIB * layers / 28 / cards),
            "cache_bytes": round(rows * GIB * layers / 28 / cards),
            "work": work,
            "collectives": [],
        }


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    monkeypatch.setattr(predict, "Programs", Invented)


def test_the_largest_batch_that_fits_is_the_fastest(tmp_path):
    found = predict.search_prompts(YAML, YAML, 1, 30 * GIB, tmp_path)
    assert [item.setting.rows for item in found] == [18, 16, 8, 4, 2, 1, 19]
    best = found[0]
    assert best.bytes == pytest.approx(30 * GIB, rel=1e-6) and best.order == "bfs" and not best.compiled
    assert best.interval[0] < best.speed < best.interval[1]
    assert found[-1].bytes > 30 * GIB


def test_where_nothing_fits_the_largest_term_is_named(tmp_path):
    found = predict.search_prompts(YAML, YAML, 1, 10 * GIB, tmp_path)
    assert {name: pytest.approx(size / GIB) for name, size in found[0].terms.items()} == {
        "weights": 11,
        "activations": 1,
        "cache": 1,
    }
    line = misfit(found, 10 * GIB, tmp_path)
    assert "one_prompts1, the smallest, takes 13.0 GiB and is 3.0 GiB over, most of it weights: 11.0 GiB" in line


def test_two_cards_hold_more(tmp_path):
    found = predict.search_prompts(YAML, YAML, 2, 30.01 * GIB, tmp_path)  # sizes are rounded
    assert found[0].setting.rows == 48
    keys = found[0].setting.keys(found[0].order)
    assert keys["parallel_config.model_parallel"] == 2 and keys["model.model_config.qkv_concat"] is False
    assert keys["model.model_config.num_blocks"] == 48 * 2048 and keys["context.exec_order"] == "bfs"


def test_numbers_of_cards_that_prediction_does_not_take(tmp_path):
    with pytest.raises(InputError, match="--devices 8: model_config.multi_query_group_num=2"):
        predict.search_prompts(YAML, YAML, 8, 30 * GIB, tmp_path)
