"""Prompt templates: the same text as str.format, the place of the context, and errors."""

import json

import pytest

from mindformers_glm32k.data.prompts import PromptTemplates
from mindformers_glm32k.errors import InputError


def templates(tmp_path, content):
    path = tmp_path / "dataset2prompt.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return PromptTemplates(path)


def test_the_context_is_found_in_the_prompt(tmp_path):
    prompts = templates(tmp_path, {"qa": "Read {{this}}:\n{context}\nQ: {input}"})
    record = {"dataset": "qa", "context": "a {text} b", "input": "why {context}?"}
    text, (start, stop) = prompts.render(record)
    assert text == "Read {this}:\na {text} b\nQ: why {context}?"
    assert text[start:stop] == "a {text} b"


def test_without_a_context_all_of_the_prompt_is_context(tmp_path):
    text, span = templates(tmp_path, {"qa": "Q: {input}"}).render({"dataset": "qa", "input": "why?"})
    assert (text, span) == ("Q: why?", (0, 7))


def test_longbench_e_takes_the_prompt_of_the_data_set_it_comes_from(tmp_path):
    record = {"dataset": "qa_e", "input": "x"}
    assert templates(tmp_path, {"qa": "1 {input}"}).render(record)[0] == "1 x"
    assert templates(tmp_path, {"qa": "1 {input}", "qa_e": "2 {input}"}).render(record)[0] == "2 x"


def test_longbenchs_own_prompts_render_as_str_format(reference):
    path = reference / "longbench" / "dataset2prompt.json"
    prompts = PromptTemplates(path)
    for name, template in json.loads(path.read_text(encoding="utf-8")).items():
        record = {"dataset": name, "context": "C {0} 长\n", "input": "I {input}"}
        text, (start, stop) = prompts.render(record)
        assert text == template.format(**record)
        assert text[start:stop] == record["context"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[]", "a JSON object is needed"),
        ({"qa": 3}, "'qa' is int"),
        ({"qa": "{context"}, "wrong brace"),
        ({"qa": "{}"}, "the field {}"),
        ({"qa": "{context.real}"}, "the field {context.real}"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, message):
    with pytest.raises(InputError, match="dataset2prompt.json.*" + message):
        templates(tmp_path, content)


def test_an_unknown_data_set_is_named_with_those_there_are(tmp_path):
    with pytest.raises(InputError, match="no prompt for the data set 'trec'.*qa"):
        templates(tmp_path, {"qa": "{input}"}).render({"dataset": "trec", "input": ""})


def test_a_field_that_the_record_does_not_have_is_named(tmp_path):
    with pytest.raises(InputError, match="'title' is missing"):
        templates(tmp_path, {"qa": "{title}"}).render({"dataset": "qa"})
