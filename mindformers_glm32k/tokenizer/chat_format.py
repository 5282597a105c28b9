"""Conversations as ids, in the format ChatGLM3 was trained on; role tokens are ids, never text.

    [gMASK] sop  then per message  <|role|> METADATA \\n CONTENT

A message ends where the next role token begins; there is no </s> between turns. `<|assistant|>` alone at the
end asks for an answer, which the model ends with one of `stop_ids`. Source: the tokenizer published with
THUDM/chatglm3-6b-32k (`build_chat_input`).
"""

import json
from collections.abc import Mapping

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer.vocabulary import ROLES

_MESSAGE_KEYS = ("role", "content", "metadata", "tools")


def prefix_ids(vocabulary):
    """Returns [gMASK] sop (list[int]), which every sequence begins with."""
    return [vocabulary.special["[gMASK]"], vocabulary.special["sop"]]


def stop_ids(vocabulary):
    """Returns the ids that end an answer: </s>, <|user|> and <|observation|> (list[int])."""
    return [vocabulary.eos_id, vocabulary.special["<|user|>"], vocabulary.special["<|observation|>"]]


def message_ids(vocabulary, role, metadata, content):
    """Returns the ids (list[int]) of one message: role token, metadata line, content.

    Args:
        vocabulary (Vocabulary): the vocabulary.
        role (str): system, user, assistant or observation.
        metadata (str | None): the rest of the role's line: the tool's name in a tool call, else empty.
        content (str): the text; role tokens in it stay plain characters.

    Raises:
        InputError: another role, or a content or metadata that is no text.
    """
    if role not in ROLES:
        raise InputError(f"role must be one of {', '.join(ROLES)}; found {role!r}")
    metadata = "" if metadata is None else metadata
    for name, value in (("metadata", metadata), ("content", content)):
        if not isinstance(value, str):
            raise InputError(
                f"the {name} of a {role} message must be text (str); found {type(value).__name__}: {value!r:.80}"
            )
    return [vocabulary.special[f"<|{role}|>"], *vocabulary.encode(f"{metadata}\n"), *vocabulary.encode(content)]


def conversation_ids(vocabulary, messages, add_generation_prompt=False):
    """Returns the ids (list[int]) of a whole conversation, prefix included.

    Args:
        vocabulary (Vocabulary): the vocabulary.
        messages (Sequence[dict]): each with `role` and `content`, optionally `metadata`, and in a system message
            `tools`, which is written as indented JSON below the content.
        add_generation_prompt (bool): whether <|assistant|> follows, to ask for an answer.

    Raises:
        InputError: a message that is not so built, named by its number (from 1).
    """
    ids = prefix_ids(vocabulary)
    for number, message in enumerate(messages, start=1):
        try:
            ids += message_ids(vocabulary, *_fields(message))
        except InputError as error:
            raise InputError(f"message {number}: {error}") from error
    if add_generation_prompt:
        ids.append(vocabulary.special["<|assistant|>"])
    return ids


def _fields(message):
    if not isinstance(message, Mapping):
        raise InputError(f"must be a dict with role and content; found {type(message).__name__}: {message!r:.80}")
    missing = [key for key in ("role", "content") if key not in message]
    unknown = [key for key in message if key not in _MESSAGE_KEYS]
    if missing or unknown:
        raise InputError(f"needs role and content, may have metadata and tools; found {list(message)}")
    role, content = message["role"], message["content"]
    if message.get("tools") is not None:
        if role != "system":
            raise InputError(f"tools belong to the system message; found in a {role} message")
        if isinstance(content, str):  # anything else is reported by message_ids
            content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
    return role, message.get("metadata"), content


def with_tools(messages, tools):
    """Returns the messages with `tools` (list | None) in the leading system message; InputError without one."""
    if tools is None:
        return messages
    first = messages[0] if messages else None
    if not isinstance(first, Mapping) or first.get("role") != "system" or first.get("tools") is not None:
        raise InputError(
            "tools need a system message without tools at the beginning of the conversation, which tells "
            "the model to use them"
        )
    return [{**first, "tools": tools}, *messages[1:]]


def answer_ids(vocabulary, ids, prompt_length=0):
    """Returns the generated ids (list[int]): what follows the prompt, up to the first stop token (left out).

    Args:
        vocabulary (Vocabulary): the vocabulary.
        ids (Sequence[int]): a row as `generate` returns it, prompt first.
        prompt_length (int): how many ids of the row are prompt (padding on its left included).
    """
    stops = set(stop_ids(vocabulary))
    answer = []
    for index in ids[prompt_length:]:
        if int(index) in stops:
            break
        answer.append(int(index))
    return answer


def answer_text(text):
    """Returns an answer's content: without its metadata line where that is blank, and stripped.

    A tool call keeps its first line, which names the tool.
    """
    metadata, newline, content = text.partition("\n")
    return (text if metadata.strip() or not newline else content).strip()
