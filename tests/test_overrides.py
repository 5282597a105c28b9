"""Values that YAML reads as strings; overrides by dotted keys are tested with the launcher, in test_run_mindformer."""

import pytest
import yaml

from mindformers_glm32k.overrides import normalize_values, parse_value


@pytest.mark.parametrize(
    "text, number",
    [("1e-5", 1e-5), ("5E3", 5000.0), ("-2e+1", -20.0), ("+1.e2", 100.0), (".5e2", 50.0), ("6.02e23", 6.02e23)],
)
def test_scientific_notation_is_a_number(text, number):
    value = normalize_values(yaml.safe_load(f"lr: {text}"))["lr"]
    assert value == number and isinstance(value, float)


def test_none_is_null():
    assert normalize_values({"pre_seq_len": "None", "other": None}) == {"pre_seq_len": None, "other": None}


@pytest.mark.parametrize("text", ["e5", "1e", "1e5x", "1 e5", "v1e5", "none", "None of these", "", "12", "1.5"])
def test_other_strings_stay(text):
    assert normalize_values({"key": text}) == {"key": text}


@pytest.mark.parametrize("value", [3, 2.5, True, False, None])
def test_other_values_stay(value):
    assert normalize_values({"key": value})["key"] is value


def test_every_depth_is_reached_in_place():
    inner = ["None", {"eps": "1e-8"}]
    tree = {"optimizer": {"betas": inner}, "name": "AdamW"}
    assert normalize_values(tree) is tree
    assert tree == {"optimizer": {"betas": [None, {"eps": 1e-8}]}, "name": "AdamW"}
    assert tree["optimizer"]["betas"] is inner  # sections that two keys share (YAML anchors) stay shared


def test_a_mindformers_configuration_keeps_its_type():
    from mindformers.tools.register import MindFormerConfig

    config = MindFormerConfig(lr_schedule={"learning_rate": "1e-5"})
    normalize_values(config)
    assert config.lr_schedule.learning_rate == 1e-5 and isinstance(config.lr_schedule, MindFormerConfig)


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        ("-3", -3),
        ("0.5", 0.5),
        ("1e-5", 1e-5),
        ("True", True),
        ("false", False),
        ("None", None),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("[0.9, 1e-2, None]", [0.9, 1e-2, None]),
        ("{a: 1e3, b: [x]}", {"a": 1000.0, "b": ["x"]}),
        ("'12'", "12"),
        ("", None),
    ],
)
def test_command_line_values(text, value):
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "a/path.ckpt",
        "glm32k rank 0",
        "key: value",
        "- item",
        "2024-01-01",
        "*.jsonl",
        ".*dense.*",
        "@here",
        "[unclosed",
        "folder #1/tokenizer.model",
        "|",
        "> quoted",
        "&anchor",
        "!tag",
        "say 'hi'",
        "C:\\data",
        "a: b: c",
        "%d",
        "  two  ",
    ],
)
def test_text_stays_as_typed(text):
    assert parse_value(text) == text
