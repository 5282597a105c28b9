"""Conversation records: ChatGLM3's published format, OpenAI's fine-tuning format and ShareGPT's."""

from __future__ import annotations

import json
from typing import Any

from mindformers_glm32k.data.formats import (
    Chat,
    Turn,
    carries_text,
    has_tools,
    json_value,
    text_field,
    unread,
    with_tools,
)
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer.chat_format import listed_tools
from mindformers_glm32k.tokenizer.vocabulary import ROLES

_KEYS = ("role", "content", "metadata", "tools", "loss", "name", "parameters", "observation")
_OPENAI_KEYS = ("weight", "tool_calls", "function_call", "tool_call_id", "id")
_HINT = 'a message looks like {"role": "user", "content": "…"}'
_CALL = "function_call"  # ShareGPT's role of a message that calls a tool
# Role names of all formats, in lower case -> the role they are read as.
_ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model", "ai"), "assistant"),
    "tool": "tool",
    **dict.fromkeys(("function", "function_response", "tool_response", "ipython"), "observation"),
    **dict.fromkeys((_CALL, "function-call", "tool_call"), _CALL),
}
_PAIR_KEYS = {"system": "system", "input": "user", "human": "user", "user": "user"}  # XTuner's and swift's turns
_PAIR_KEYS.update(output="assistant", assistant="assistant")


class ChatLayout:
    """Chats in the format of ChatGLM3's published fine-tuning data.

        {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
        {"conversations": […], "tools": […], "system": "…"}

    A message has `role` (system, user, assistant, observation, or tool) and `content`; an assistant's may have
    `metadata` (the name of the tool it calls), a system message `tools`, any message `loss: false`, which keeps an
    answer out of the loss. Sources: README and preprocess_utils.py of ChatGLM3's finetune_chatmodel_demo for
    `conversations`, `tools` and the role `tool`; its PROMPT.md for metadata and observations. All chat layouts accept
    the keys of OpenAI's and ShareGPT's formats as well.
    """

    name = "chat"
    fields = ("messages (or conversations)",)
    _LISTS = ("messages", "conversations", "conversation")
    _BESIDE = ("tools", "functions", "system")

    def matches(self, record: dict) -> bool:
        """Whether a record has one of the lists."""
        return any(field in record for field in self._LISTS)

    def sample(self, record: dict) -> Chat:
        """The record as a Chat; InputError, without file and line, where a field is missing or wrong."""
        turns = self.turns(record)
        if not any(turn.in_loss for turn in turns):
            field = self._list(record)
            raise InputError(f"field {field!r} has no assistant message to learn from; add one or remove the line")
        return Chat(tuple(turns))

    def turns(self, record: dict) -> list[Turn]:
        """The messages of a record, with or without an answer in the loss; raises as `sample`."""
        field = self._list(record)
        if field is None:
            raise InputError(f"has neither 'messages' nor 'conversations'; {_HINT}")
        messages = json_value(record[field])
        if not isinstance(messages, list) or not messages:
            raise InputError(f"field {field!r} is {messages!r:.60}; a list with at least one message is needed")
        turns, called, answered = [], set(), _ParallelCalls()
        for number, message in enumerate(messages, 1):
            try:
                for single in _single(message):
                    turns += answered.place(single, _turns(single, called))
            except InputError as error:
                raise InputError(f"message {number} of {field!r}: {error}") from error
        answered.require_all(field)
        if carries_text(record.get("system")):
            turns = _with_system(turns, text_field(record, "system", "a system prompt is a text"))
        if record.get("tools") and record.get("functions"):
            raise InputError("has both 'tools' and 'functions'; remove one of them")
        tools = record.get("tools") or record.get("functions")
        if has_tools(tools):
            own = field != "messages"
            if not own and turns[0].role == "system" and messages[0].get("tools") is not None:
                raise InputError("tools are given twice, in the record and in its system message; remove one of them")
            turns = with_tools(turns, tools, is_own_message=own)
        return turns

    def unused(self, record: dict) -> list[str]:
        """Names of the fields with text that the sample leaves out."""
        return unread(record, (self._list(record), *self._BESIDE))

    def _list(self, record):
        return next((name for name in self._LISTS if name in record), None)

    def _messages(self, record):
        messages = json_value(record.get(self._list(record)))
        return [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []


class ShareGPTLayout(ChatLayout):
    """{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}], "system": "…", "tools": "…"}

    Roles: human, gpt, system, observation, and function_call with the value {"name": …, "arguments": {…}}. Source:
    data/README.md of LLaMA-Factory.
    """

    name = "sharegpt"
    fields = ("conversations with from and value",)

    def matches(self, record: dict) -> bool:
        return any("from" in message for message in self._messages(record)[:1])


class OpenAILayout(ChatLayout):
    """OpenAI's fine-tuning format, recognised by `functions`, a developer message, `tool_calls`, content in parts or
    `weight`.

    Parallel calls in one message become consecutive calls, each with its result. What ChatGLM3's prompt format cannot
    express is refused: speakers' names, images.
    """

    name = "openai"
    fields = ("messages with functions, tool_calls, weight or content in parts",)

    def matches(self, record: dict) -> bool:
        messages = self._messages(record)
        return bool(record.get("functions") and messages) or any(
            message.get("role") in ("developer", "function")
            or isinstance(message.get("content"), list)
            or not message.keys().isdisjoint(_OPENAI_KEYS)
            for message in messages
        )


def _single(message):
    """The messages of one entry; two or three where the entry is a question with its answer (XTuner, ms-swift)."""
    if not isinstance(message, dict):
        raise InputError(f"is {type(message).__name__}, not an object; {_HINT}")
    if "from" in message and "role" not in message:
        names = {"from": "role", "value": "content"}
        return [{names.get(key, key): value for key, value in message.items()}]
    if message and "role" not in message and all(key in _PAIR_KEYS for key in message):
        given = {_PAIR_KEYS[key]: value for key, value in message.items() if value is not None and value != ""}
        return [{"role": role, "content": given[role]} for role in ("system", "user", "assistant") if role in given]
    return [message]


def _turns(message, called):
    """list[Turn] of one message; several where it has a call as well as text, or a call with its result.

    `called`: names of the tools called so far; those of this message are added.
    """
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    known = (*_KEYS, *_OPENAI_KEYS)
    unknown = [key for key, value in message.items() if key not in known and value not in ("", [], {})]
    if unknown:
        raise InputError(f"has the unknown key {unknown[0]!r}; known are {', '.join(known)}")
    named = message.get("role")
    role = _ROLE_NAMES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        raise InputError(f"role is {named!r:.40}, not one of {', '.join(ROLES)}, tool")
    if role == "tool" and "content" in message and message.keys().isdisjoint(("parameters", "observation")):
        role = "observation"  # a result as OpenAI writes it; ChatGLM3's message of this role has the call as well
    in_loss = _in_loss(message, role)
    if role == "tool":
        called.add(message.get("name"))
        return _tool_turns(message, in_loss)
    _refuse_keys(message, role, called)
    if role == _CALL:
        return [_call(json_value(message.get("content")), called, in_loss)]
    calls = _calls(message)
    content = _content(message, may_be_null=bool(calls))
    metadata = message.get("metadata")
    metadata = "" if metadata is None else text_field(message, "metadata", _HINT, may_be_empty=True)
    if message.get("tools") is not None:
        content += "\n" + listed_tools(message["tools"])
    turns = [Turn(role, content, metadata, in_loss)] if carries_text(content) or not calls else []
    if in_loss and turns and not carries_text(content):
        raise InputError("the answer is empty; fill it, set loss: false, or remove the line")
    return turns + [_call(call, called, in_loss) for call in calls]


def _in_loss(message, role):
    """Whether a message is in the loss: an assistant's is, unless its `loss` or `weight` is false or 0."""
    answers = role in ("assistant", "tool", _CALL)
    for key in ("loss", "weight"):
        if key not in message:
            continue
        if message[key] not in (0, 1):  # False == 0 and True == 1
            known = "neither true nor false" if key == "loss" else "neither 0 nor 1"
            raise InputError(f"{key!r} is {message[key]!r:.40}, {known}")
        if not message[key]:
            answers = False
        elif not answers and role in ROLES:
            raise InputError(f"{key!r} is {message[key]!r} in a message of the role {role}; only answers are learnt")
    return answers


def _refuse_keys(message, role, called):
    """Raises InputError for keys that a message of this role would lose."""
    for key in ("parameters", "observation"):
        if message.get(key) not in (None, "", {}):
            raise InputError(f"{key!r} belongs to a message of the role tool; found in one of the role {role}")
    name = message.get("name")
    if name and not (role == "observation" and (name in called or not called)):
        hint = (
            f"the tools called before are {', '.join(sorted(map(str, called)))}"
            if role == "observation"
            else "ChatGLM3's format has no names of speakers: say it in the content, or remove the key"
        )
        raise InputError(f"'name' is {name!r:.40} in a message of the role {role}; {hint}")
    if message.get("tools") is not None and role != "system":
        raise InputError(f"'tools' belong to a system message; found in one of the role {role}")
    if role != "assistant" and (message.get("tool_calls") or message.get("function_call")):
        raise InputError(f"a call belongs to an assistant message; found in one of the role {role}")


def _content(message, may_be_null):
    """The text of a message; content in parts is joined by line breaks."""
    content = message.get("content")
    if may_be_null and content is None:
        return ""
    if not isinstance(content, list):
        return text_field(message, "content", _HINT, may_be_empty=True)
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise InputError(f"'content' has the part {part!r:.60}; the model reads text only. Remove the part")
        texts.append(text)
    return text_field({"content": "\n".join(texts)}, "content", _HINT, may_be_empty=True)


def _calls(message):
    calls = json_value(message.get("tool_calls")) or []
    if not isinstance(calls, list):
        raise InputError(f"'tool_calls' is {calls!r:.60}; a list is needed")
    if message.get("function_call"):
        calls = [*calls, json_value(message["function_call"])]
    return calls


class _ParallelCalls:
    """Reorders parallel calls of one message into ChatGLM3's format: one call after the other, each with its result.

    The turns of such a message are held back until all results have come. A result is matched to its call by
    `tool_call_id`, by the tool's name, or in the order of the calls.
    """

    def __init__(self):
        self._waiting: dict[Any, Turn] = {}  # id, or position, of a call without a result -> the call
        self._order: list[Any] = []
        self._ids: set[Any] = set()  # of all calls so far
        self._calls: dict[Any, Turn] = {}
        self._results: dict[Any, Turn] = {}

    def place(self, message: dict, turns: list[Turn]) -> list[Turn]:
        """The turns that are complete now; InputError for a result without a call, or a call without its result."""
        calls = _calls(message)
        if self._waiting:
            if len(turns) != 1 or turns[0].role != "observation":
                raise InputError(self._missing())
            key = message.get("tool_call_id")
            if key is None:
                named = [one for one in self._waiting if self._calls[one].metadata == message.get("name")]
                key = next(iter(named or self._waiting))
            self._require_id(key in self._waiting, key)
            del self._waiting[key]
            self._results[key] = turns[0]
            if self._waiting:
                return []
            return [turn for one in self._order for turn in (self._calls[one], self._results[one])]
        self._ids.update(call["id"] for call in calls if isinstance(call, dict) and call.get("id") is not None)
        if len(calls) < 2:
            key = message.get("tool_call_id")
            self._require_id(key is None or not self._ids or key in self._ids, key)
            return turns
        text, made = turns[: -len(calls)], turns[-len(calls) :]
        ids = [call.get("id") if isinstance(call, dict) else None for call in calls]
        self._order = [place if one is None else one for place, one in enumerate(ids)]
        if len(set(self._order)) < len(calls):
            raise InputError("two of its calls have one id; give each its own")
        self._calls = dict(zip(self._order, made))
        self._waiting, self._results = dict(self._calls), {}
        return text

    def _require_id(self, is_there, key):
        if not is_there:
            raise InputError(f"'tool_call_id' is {key!r:.40}; no call before it that waits for a result has this id")

    def require_all(self, field: str) -> None:
        """InputError where a conversation ends before all calls of a message have their results."""
        if self._waiting:
            raise InputError(f"field {field!r}: {self._missing()}")

    def _missing(self):
        names = ", ".join(repr(call.metadata) for call in self._waiting.values())
        return (
            f"of {len(self._order)} calls in one message, {names} have no result; ChatGLM3's format has one call after "
            "the other, each with its result: put the results behind the message, or keep one call"
        )


def _call(call, called, in_loss):
    """The Turn of a call in OpenAI's or ShareGPT's format."""
    if isinstance(call, list):
        if len(call) > 1:
            raise InputError(f"has {len(call)} calls; ChatGLM3's format has one call in a message: split it")
        call = call[0] if call else None
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise InputError(f'the call {call!r:.60} is not understood; one looks like {{"name": "…", "arguments": {{…}}}}')
    arguments = json_value(function.get("arguments", function.get("parameters", {})))
    if arguments in ("", None):
        arguments = {}
    if not isinstance(arguments, dict):
        raise InputError(f"'arguments' of the call of {name!r:.40} are {arguments!r:.60}; an object is needed")
    called.add(name)
    return Turn("assistant", _call_text(arguments), name, in_loss)


def _call_text(arguments):
    return "```python\ntool_call(" + ", ".join(f"{key}={value!r}" for key, value in arguments.items()) + ")\n```"


def _tool_turns(message, in_loss):
    name = text_field(message, "name", "a tool message has name, parameters and observation")
    parameters, observation = json_value(message.get("parameters")), message.get("observation")
    if not isinstance(parameters, dict):
        raise InputError(f"'parameters' of a tool message is {parameters!r:.40}; an object is needed")
    if carries_text(message.get("content")):
        raise InputError("a tool message with parameters has its result in 'observation', and this one a 'content' too")
    if not isinstance(observation, str):
        observation = json.dumps(observation, ensure_ascii=False)
    return [Turn("assistant", _call_text(parameters), name, in_loss), Turn("observation", observation)]


def _with_system(turns, system):
    """Puts a record's system prompt first; InputError where the first message is a different one."""
    if turns and turns[0].role == "system" and turns[0].content.strip():
        if turns[0].content.strip() == system.strip():
            return turns
        raise InputError("a system prompt is given twice, in the record and as its first message; remove one of them")
    rest = turns[1:] if turns and turns[0].role == "system" else turns
    return [Turn("system", system), *rest]
