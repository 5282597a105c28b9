"""Questions: the conversations of a file, each with its key, and their ids, truncated where they do not fit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from mindformers_glm32k.data.chats import ChatLayout
from mindformers_glm32k.data.formats import QuestionLayout
from mindformers_glm32k.data.jsonl import JsonLines, Problems
from mindformers_glm32k.data.records import json_lines
from mindformers_glm32k.data.truncation import LEAST, halves, level
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import require_file
from mindformers_glm32k.tokenizer import chat_format as chat
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

ERROR, TRUNCATE = ON_LONG_PROMPT = ("error", "truncate")
_ANSWER = "\0answer"  # a field that no record has: layouts require an answer beside the question
_QUESTIONS = tuple(
    QuestionLayout(field, field, _ANSWER, details)
    for field, details in (
        ("prompt", ()),
        ("content", ()),  # AdGen's, as `glm32k preprocess` and `make-data` write it
        ("instruction", ("input", "context")),
        ("query", ()),
        ("question", ()),
    )
)
_FIELDS = "messages (or conversations), " + ", ".join(layout.name for layout in _QUESTIONS)


def messages_of(record: dict) -> list[dict]:
    """The conversation of a record, which the answer is to continue.

    Chats as training data has them (OpenAI's and ShareGPT's forms, too), or one question with `system`, `history` and
    `tools` where they are given.

    Raises:
        InputError: no known field, a wrong message, or a last message that needs no answer.
    """
    chats = ChatLayout()
    if chats.matches(record):
        turns = chats.turns(record)
    else:
        layout = next((layout for layout in _QUESTIONS if layout.question in record), None)
        if layout is None:
            hint = "; for LongBench's samples: glm32k longbench predict" if "context" in record else ""
            raise InputError(f"has the fields {', '.join(map(repr, record)) or '(none)'}; needed are {_FIELDS}{hint}")
        turns = list(layout.sample({**record, _ANSWER: "-"}).turns())[:-1]
        if record.get("tools"):
            said = [{"role": turn.role, "content": turn.content} for turn in turns]
            turns = chats.turns({"messages": said, "tools": record["tools"]})
    if turns[-1].role not in ("user", "observation"):
        raise InputError(f"the last message is one of the role {turns[-1].role}, which asks for nothing; remove it")
    return [{"role": turn.role, "metadata": turn.metadata, "content": turn.content} for turn in turns]


class QuestionFile:
    """The conversations of a file: JSON lines (or another format of data files), or text with one prompt a line.

    Attributes:
        digest: of the file's bytes.

    Raises:
        InputError: no such file, damaged lines (of which several are named), or a repeated `_id`.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = require_file(
            path, "--input", 'Give JSON lines with "prompt" or "messages", or prompts line by line.'
        )
        self.digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
        self._lines: JsonLines | None = None
        self._texts: list[str] = []
        if _is_text(self.path):
            self._texts = read_prompts(str(self.path))
        else:
            made = json_lines(self.path, lambda record: "messages" in record or "prompt" in record)
            shown, folder = (self.path, made.parent) if made else (None, None)
            self._lines = JsonLines(made or self.path, messages_of, folder, shown=shown)
        self.keys = [self._key(index) for index in range(len(self))]
        seen: dict[str, int] = {}
        for index, key in enumerate(self.keys):
            if key in seen:
                raise InputError(f"{self.location(index)}: the _id {key!r} is that of {self.location(seen[key])}, too")
            seen[key] = index

    def __len__(self) -> int:
        return len(self._texts) if self._lines is None else len(self._lines)

    def __getitem__(self, index: int) -> list[dict]:
        """The messages of one conversation."""
        if self._lines is None:
            return [{"role": "user", "content": self._texts[index]}]
        return messages_of(self._lines[index])

    def names(self, index: int) -> dict:
        """The field that identifies an answer: the record's `_id`, or its line number from 1."""
        if self._lines is None:
            return {"line": index + 1}
        record = self._lines[index]
        return {"line": self._lines.line(index)} if record.get("_id") is None else {"_id": record["_id"]}

    def location(self, index: int) -> str:
        """File and line, for messages."""
        if self._lines is None:
            return f"{self.path}, prompt {index + 1}"
        return f"{self.path}, {self._lines.unit} {self._lines.line(index)}"

    def _key(self, index):
        return key_of(self.names(index))


def key_of(row: dict) -> str:
    """The key of an answer's line; InputError where it has none."""
    if row.get("_id") is not None:
        return f"_id {row['_id']}"
    if isinstance(row.get("line"), int):
        return f"line {row['line']}"
    raise InputError("a line has neither _id nor line; is it an answer of `glm32k generate`? Move the file away")


def _is_text(path: Path) -> bool:
    """Whether a file is plain text, neither JSON nor another format of data files."""
    with open(path, "rb") as file:
        head = file.read(1 << 12)
    if path.suffix.lower() == ".txt" or not head.strip():
        return True
    known = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") or path.suffix.lower() != ""
    return not known and b"\0" not in head


def prompt_ids(vocabulary: Vocabulary, messages: Sequence[dict]) -> list[int]:
    """The ids that ask for an answer to a conversation."""
    return chat.conversation_ids(vocabulary, messages, add_generation_prompt=True)


def fitted_ids(vocabulary: Vocabulary, messages: Sequence[dict], room: int) -> list[int]:
    """As `prompt_ids`, at most `room` of them: the middle of user messages and tool results is left out.

    The longest are truncated first. As in LongBench's pred.py, the first and the last half are decoded, joined and
    tokenized again.

    Raises:
        InputError: what is never truncated is alone longer than the room.
    """
    ids = prompt_ids(vocabulary, messages)
    free = [index for index, message in enumerate(messages) if message["role"] in ("user", "observation")]
    texts = {index: vocabulary.encode(messages[index]["content"]) for index in free}
    fixed = len(ids) - sum(map(len, texts.values()))
    spare = room - fixed
    for _ in range(20):
        if len(ids) <= room:
            return ids
        if spare < sum(min(LEAST, len(text)) for text in texts.values()):
            raise InputError(f"system messages, answers and roles alone have {fixed} tokens, {room} fit; shorten them")
        shorter = list(messages)
        for index, share in zip(free, level([len(texts[index]) for index in free], spare)):
            if share < len(texts[index]):
                content = halves(texts[index], max(1, share // 2), vocabulary.decode)
                shorter[index] = {**messages[index], "content": content}
        ids = prompt_ids(vocabulary, shorter)
        spare -= max(1, len(ids) - room)  # tokenizing again may give some more tokens
    raise InputError(f"cannot be truncated to {room} tokens; shorten it")


def measured(questions: QuestionFile, vocabulary: Vocabulary, room: int, on_long_prompt: str) -> list[int]:
    """The tokens of each conversation, before any truncation.

    Raises:
        InputError: conversations that do not fit, of which the first are named, unless they are to be truncated.
    """
    lengths, problems = [], Problems(questions.path, "prompt")
    for index in range(len(questions)):
        lengths.append(len(prompt_ids(vocabulary, questions[index])))
        if lengths[-1] > room:
            if on_long_prompt == TRUNCATE:
                fitted_ids(vocabulary, questions[index], room)
            else:
                problems.add(index + 1, f"{lengths[-1]} tokens")
    if problems.count:
        raise InputError(
            f"{problems.text()}; {room} fit into seq_length beside the answer. Shorten them, lower --max_new_tokens, "
            "or give --on_long_prompt truncate, which leaves their middle out"
        )
    return lengths


def read_prompts(input_data: str | list[str]) -> list[str]:
    """Prompts from what `--predict_data` was given: a text, a list of texts, or a file with one prompt a line.

    Raises:
        InputError: nothing given, an empty prompt, an empty file, or not text.
    """
    if isinstance(input_data, str) and os.path.isfile(input_data):
        try:
            with open(input_data, encoding="utf-8-sig") as file:
                prompts = [line.rstrip("\n").replace(r"\n", "\n") for line in file if line.strip()]
        except UnicodeDecodeError as error:
            raise InputError(f"{input_data}: not UTF-8 ({error}); convert the file") from error
        if not prompts:
            raise InputError(f"{input_data}: no prompts; write one a line")
        return prompts
    prompts = [input_data] if isinstance(input_data, str) else input_data
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(
            f"no prompt to answer: found {type(input_data).__name__}; give --predict_data TEXT …, or a "
            "file with one prompt a line"
        )
    for count, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise InputError(f"prompt {count} is empty; give a text")
        if _names_a_file(prompt):
            one = "; one file alone is read" if len(prompts) > 1 else ""
            there = (
                "is a folder" if os.path.isdir(prompt) else "is a file" if os.path.isfile(prompt) else "no such file"
            )
            raise InputError(f"--predict_data {prompt}: {there}{one} (a path is no prompt; seen from {os.getcwd()})")
    return prompts


def _names_a_file(prompt):
    """Whether a prompt is probably a path: one that exists, or a single word that looks like one."""
    if "\n" in prompt or "\0" in prompt or len(prompt) > 1000:
        return False
    folder, name = os.path.split(prompt)
    spaces = any(map(str.isspace, prompt))
    known = Path(name).suffix.lower() in (".txt", ".json", ".jsonl", ".md", ".csv", ".tsv", ".text")
    if prompt.isascii() and not spaces and (known or prompt.startswith(("./", "../", "~/"))):
        return True
    return bool(folder.strip("./")) and os.path.isdir(folder) and (known or not spaces or os.path.exists(prompt))
