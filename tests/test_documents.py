"""README, docs/, the model card and the other documents: what they name exists, and the first screen stays one."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README, CARD = ROOT / "README.md", ROOT / "research" / "glm32k" / "README.md"
DOCUMENTS = [README, CARD, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]

# messages of MindFormers and MindSpore in docs/troubleshooting.md, and a text of the user's
OTHERS = (
    "Unsupported op [RmsNorm] on CPU",
    "[SplitWithSize]",
    "[NPUGetFloatStatusV2]",
    "… REGISTER_PATH must be specified",
    "does not contain strategy file of rank_1",
    "checkpoint_path is not a directory",
    "<\\|user\\|>",
)


def text_of(document):
    return document.read_text(encoding="utf-8")


def blocks(text):
    """The shell blocks of a Markdown document."""
    return re.findall(r"```(?:shell|bash)\n(.*?)```", text, flags=re.DOTALL)


def anchors(text):
    """The anchors that GitHub gives the headings of a Markdown document."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found = []
    for heading in re.findall(r"^#+ +(.*?) *$", prose, flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


def broken_links(document):
    """Relative links of a Markdown document whose file or anchor is not there, as they are written."""
    broken = []
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", text_of(document)):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors(text_of(target))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_relative_links_and_anchors_exist(document):
    assert broken_links(document) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "data.md").write_text("# Data\n\n## On 2 NPUs, upstream's\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# One\n[a](#one) [b](#two) [c](data.md#on-2-npus-upstreams) [d](data.md#no-heading) [e](no.md) [f](.)"
    )
    assert broken_links(page) == ["#two", "data.md#no-heading", "no.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_documents_name_files_and_commands_that_exist(document):
    from mindformers_glm32k.cli import COMMANDS

    text = text_of(document)
    paths = set(
        re.findall(r"(?<![\w/])((?:scripts|research|tests|benchmarks|docs|mindformers_glm32k)/[\w./-]*\w)", text)
    )
    assert not [path for path in paths if not (ROOT / path).exists()]
    commands = set(re.findall(r"\bglm32k ((?:make|dry)?-?[a-z]+(?:-[a-z]+)*)(?= |`|\n)", " ".join(blocks(text))))
    assert commands <= set(COMMANDS)
    if document in (README, CARD):
        assert paths and commands


def test_shipped_yamls_are_named_in_the_documents():
    """By the names in the tables and commands; those that are named nowhere would not be found."""
    text = "".join(map(text_of, DOCUMENTS))
    assert not [path.name for path in (ROOT / "research" / "glm32k").glob("*.yaml") if path.name not in text]


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_documents_use_options_that_the_launcher_knows(document):
    from mindformers_glm32k.run_mindformer import build_parser

    known = set(build_parser()._option_string_actions)
    for block in blocks(text_of(document)):
        for command in re.findall(r"run_mindformer(?:\.py)? (--config[^\"\n]*)", block.replace("\\\n", " ")):
            options = re.findall(r"(--[\w.]+)", command)
            assert [name for name in options if name not in known and "." not in name] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_documents_use_options_that_the_commands_know(document):
    """Dotted options and, beside --config, those of run_mindformer go through to the YAML."""
    import argparse
    import importlib

    from mindformers_glm32k.cli import COMMANDS
    from mindformers_glm32k.run_mindformer import build_parser

    launcher = set(build_parser()._option_string_actions)
    for block in blocks(text_of(document)):
        for name, rest in re.findall(r"^glm32k ([a-z-]+) ([^\n]*)", block.replace("\\\n", " "), flags=re.MULTILINE):
            parser = argparse.ArgumentParser()
            importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
            for action in parser._actions:  # of a command with commands of its own
                if isinstance(action, argparse._SubParsersAction):
                    parser = action.choices[rest.split()[0]]
            known = {*parser._option_string_actions, *(launcher if "--config" in rest else ())}
            unknown = [option for option in re.findall(r"(?<!\S)(--[\w.]+)", rest) if option not in known]
            assert [option for option in unknown if "." not in option] == []


def test_the_readme_is_a_first_screen():
    """At most 8 KB, with every command and a way to every document."""
    from mindformers_glm32k.cli import COMMANDS

    text = text_of(README)
    assert len(text.encode()) <= 8192
    assert not [name for name in COMMANDS if f"| `glm32k {name}` |" not in text]
    assert not [name for name in NAMES if name != "README.md" and f"]({name})" not in text]


def test_the_map_names_every_room():
    """README: every folder and module of the package. CONTRIBUTING: the floors, as test_architecture.py has them."""
    from test_architecture import FLOORS

    package = ROOT / "mindformers_glm32k"
    rooms = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    rooms |= {path.stem for path in package.glob("[a-z]*.py")}
    chart = text_of(README).partition("## Map")[2].partition("## ")[0]
    assert not [room for room in rooms if not re.search(rf"\b{room}\b", chart)]
    floors = re.search(r"^errors <[^`]*", text_of(ROOT / "CONTRIBUTING.md"), flags=re.MULTILINE).group()
    named = [floor for floor in FLOORS if "__main__" not in floor]
    assert [set(floor.replace(",", " ").split()) for floor in floors.split("<")] == [set(floor) for floor in named]


def messages():
    """All texts of the package and the scripts, with … in the place of values."""
    texts = [path.read_text() for path in (ROOT / "scripts").rglob("*.sh")]
    for path in (ROOT / "mindformers_glm32k").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_troubleshooting_quotes_messages_as_they_are():
    """Word for word between the values, which are … or numbers in the table."""
    table = re.findall(r"^\| (.*?[^\\]) \|", text_of(ROOT / "docs" / "troubleshooting.md"), flags=re.MULTILINE)
    quoted = [text for cell in table for text in re.findall(r"`([^`]+)`", cell)]
    assert set(OTHERS) <= set(quoted)
    texts = messages()
    unknown = []
    for text in quoted:
        fragments = [part.strip() for part in re.split(r"…|\b\d+\b|\bN\b|optimizer|'FP32StateAdamWeightDecay'", text)]
        inside = [part for part in fragments if len(part) > 3]
        if text not in OTHERS and not (inside and any(all(part in line for part in inside) for line in texts)):
            unknown.append(text)
    assert unknown == []


def test_ci_runs_the_readmes_test_command():
    command = re.search(r"python (-m pytest\b[^\n]*)", " \n".join(blocks(text_of(README)))).group(1)
    assert command.split("#")[0].strip() in (ROOT / ".ci" / "run").read_text()
