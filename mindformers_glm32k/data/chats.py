"""Chat lines, as ChatGLM3's published fine-tuning data has them.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
    {"conversations": […], "tools": […]}

A message has `role` (system, user, assistant, observation, or tool) and `content`; an assistant's may have
`metadata` (the name of the tool it calls), a system message `tools`, any message `loss: false`, which keeps an
answer out of the loss. Sources: README and preprocess_utils.py of ChatGLM3's finetune_chatmodel_demo for
`conversations`, `tools` and the role `tool`; its PROMPT.md for metadata and observations.
"""

import json

from mindformers_glm32k.data.formats import Chat, Turn, text_field
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer.vocabulary import ROLES

TOOLS_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:"
_KEYS = ("role", "content", "metadata", "tools", "loss", "name", "parameters", "observation")
_HINT = 'a message looks like {"role": "user", "content": "…"}'


class ChatLayout:
    """Records with a list of messages; fields besides `messages` or `conversations`, and `tools`, are ignored."""

    name = "chat"
    fields = ("messages (or conversations)",)
    _LISTS = ("messages", "conversations")

    def matches(self, record):
        """bool: whether a record has one of the two lists."""
        return any(field in record for field in self._LISTS)

    def sample(self, record):
        """Turns a record into a Chat; InputError (without the place) when something is missing or wrong."""
        field = next((name for name in self._LISTS if name in record), None)
        if field is None:
            raise InputError(f"has neither 'messages' nor 'conversations'; {_HINT}")
        messages = record[field]
        if not isinstance(messages, list) or not messages:
            raise InputError(f"field {field!r} is {messages!r:.60}; a list with at least one message is needed")
        turns = []
        for number, message in enumerate(messages, 1):
            try:
                turns += _turns(message)
            except InputError as error:
                raise InputError(f"message {number} of {field!r}: {error}") from error
        if record.get("tools"):
            turns = _with_tools(turns, messages[0], record["tools"], is_own_message=field == "conversations")
        if not any(turn.learnt for turn in turns):
            raise InputError(f"field {field!r} has no assistant message to learn from; add one or remove the line")
        return Chat(tuple(turns))


def _turns(message):
    """[Turn] of one message; two of a `tool` message, which holds the call and what the tool returned."""
    if not isinstance(message, dict):
        raise InputError(f"is {type(message).__name__}, not an object; {_HINT}")
    unknown = [key for key in message if key not in _KEYS]
    if unknown:
        raise InputError(f"has the unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    role, loss = message.get("role"), message.get("loss")
    if not (loss is None or isinstance(loss, bool)):
        raise InputError(f"'loss' is {loss!r:.40}, neither true nor false")
    if role == "tool":
        return _tool_turns(message, loss is not False)
    if role not in ROLES:
        raise InputError(f"role is {role!r:.40}, not one of {', '.join(ROLES)}, tool")
    content = text_field(message, "content", _HINT, may_be_empty=True)
    metadata = message.get("metadata")
    metadata = "" if metadata is None else text_field(message, "metadata", _HINT, may_be_empty=True)
    if message.get("tools") is not None:
        if role != "system":
            raise InputError(f"'tools' belong to a system message; found in one of the role {role}")
        content += "\n" + _listed(message["tools"])
    return [Turn(role, content, metadata, learnt=role == "assistant" and loss is not False)]


def _tool_turns(message, learnt):
    name = text_field(message, "name", "a tool message has name, parameters and observation")
    parameters, observation = message.get("parameters"), message.get("observation")
    if not isinstance(parameters, dict):
        raise InputError(f"'parameters' of a tool message is {parameters!r:.40}; an object is needed")
    if not isinstance(observation, str):
        observation = json.dumps(observation, ensure_ascii=False)
    arguments = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
    return [
        Turn("assistant", f"```python\ntool_call({arguments})\n```", name, learnt),
        Turn("observation", observation),
    ]


def _with_tools(turns, first, tools, is_own_message):
    """Puts a record's tools in front: in a system message of their own, as ChatGLM3's own preprocessing does for
    `conversations`; for `messages` in the system message that is there, as its prompt format does."""
    if not is_own_message and turns[0].role == "system":
        if first.get("tools") is not None:
            raise InputError("tools are given twice, in the record and in its system message; remove one of them")
        system = turns[0]
        return [Turn("system", system.content + "\n" + _listed(tools), system.metadata)] + turns[1:]
    return [Turn("system", TOOLS_INTRODUCTION + "\n" + _listed(tools))] + turns


def _listed(tools):
    return json.dumps(tools, indent=4, ensure_ascii=False)
