"""Conversations as ids, in the format ChatGLM3 was trained on; role tokens are ids, never text.

    [gMASK] sop  then per message  <|role|> METADATA \\n CONTENT

A message ends where the next role token begins; there is no </s> between turns. `<|assistant|>` alone at the
end asks for an answer, which the model ends with one of `stop_ids`. Source: the tokenizer published with
THUDM/chatglm3-6b-32k (`build_chat_input`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mindformers_glm32k.checks import UnusableJSON, parse_json
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer.vocabulary import ROLES, Vocabulary

if TYPE_CHECKING:
    import numpy as np
    from mindformers.models.tokenization_utils_base import BatchEncoding
    from mindspore import Tensor

_MESSAGE_KEYS = ("role", "content", "metadata", "tools")


def prefix_ids(vocabulary: Vocabulary) -> list[int]:
    """[gMASK] sop, which every sequence begins with."""
    return [vocabulary.special["[gMASK]"], vocabulary.special["sop"]]


def stop_ids(vocabulary: Vocabulary) -> list[int]:
    """The ids that end an answer: </s>, <|user|> and <|observation|>."""
    return [vocabulary.eos_id, vocabulary.special["<|user|>"], vocabulary.special["<|observation|>"]]


def message_ids(vocabulary: Vocabulary, role: str, metadata: str | None, content: str) -> list[int]:
    """The ids of one message: role token, metadata line, content.

    Args:
        vocabulary: gives the ids.
        role: system, user, assistant or observation.
        metadata: the rest of the role's line: the tool's name in a tool call, else empty.
        content: role tokens in it stay plain characters.

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


def conversation_ids(
    vocabulary: Vocabulary, messages: Sequence[Mapping], add_generation_prompt: bool = False
) -> list[int]:
    """The ids of a whole conversation, prefix included.

    Args:
        vocabulary: gives the ids.
        messages: each with `role` and `content`, optionally `metadata`, and in a system message `tools`, which is
            written as indented JSON below the content.
        add_generation_prompt: whether <|assistant|> follows, to ask for an answer.

    Raises:
        InputError: a malformed message, named by its number from 1.
    """
    ids = prefix_ids(vocabulary)
    for count, message in enumerate(messages, start=1):
        try:
            ids += message_ids(vocabulary, *_fields(message))
        except InputError as error:
            raise InputError(f"message {count}: {error}") from error
    if add_generation_prompt:
        ids.append(vocabulary.special["<|assistant|>"])
    return ids


def _fields(message: Any) -> tuple:
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
            content += "\n" + listed_tools(message["tools"])
    return role, message.get("metadata"), content


def listed_tools(tools: Any) -> str:
    """Tools as ChatGLM3 reads them, indented JSON.

    Args:
        tools: a list or an object, or the JSON text of one; an entry may also be JSON text, or OpenAI's
            {"type": "function", "function": {…}}, of which the function is taken.

    Raises:
        InputError: a text that is no JSON list or object.
    """
    if isinstance(tools, str):
        parsed = _parsed(tools)
        if not isinstance(parsed, (list, dict)):
            raise InputError(f"tools are the text {tools!r:.60}, which is no JSON list; give a list of tools")
        tools = parsed
    if isinstance(tools, list):
        tools = [_function(_parsed(tool) if isinstance(tool, str) else tool) for tool in tools]
    try:
        return json.dumps(tools, indent=4, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise InputError("tools hold NaN or Infinity, which JSON does not have; write a number or null") from error


def _parsed(text):
    """The list or object that a JSON text holds; any other text unchanged."""
    try:
        value = parse_json(text)
    except UnusableJSON as error:
        raise InputError(f"tools: {error}") from error
    except ValueError:
        return text
    return value if isinstance(value, (list, dict)) else text


def _function(tool):
    wrapped = isinstance(tool, dict) and tool.get("type") == "function" and isinstance(tool.get("function"), dict)
    return tool["function"] if wrapped else tool


def with_tools(messages: Sequence[Mapping], tools: list | str | None) -> Sequence[Mapping]:
    """The messages with `tools` in the leading system message; InputError without one."""
    if tools is None:
        return messages
    first = messages[0] if messages else None
    if not isinstance(first, Mapping) or first.get("role") != "system" or first.get("tools") is not None:
        raise InputError(
            "tools need a system message without tools at the beginning of the conversation, which tells "
            "the model to use them"
        )
    return [{**first, "tools": tools}, *messages[1:]]


def answer_ids(vocabulary: Vocabulary, ids: Sequence[int], prompt_length: int = 0) -> list[int]:
    """The generated ids: what follows the prompt, up to the first stop token (left out).

    Args:
        vocabulary: knows the stop tokens.
        ids: a sequence as `generate` returns it, prompt first.
        prompt_length: how many ids of it are prompt (padding on its left included).
    """
    stops = set(stop_ids(vocabulary))
    answer = []
    for index in ids[prompt_length:]:
        if int(index) in stops:
            break
        answer.append(int(index))
    return answer


def answer_text(text: str) -> str:
    """An answer's content: without its metadata line where that is blank, and stripped.

    A tool call keeps its first line, which names the tool.
    """
    metadata, newline, content = text.partition("\n")
    return (text if metadata.strip() or not newline else content).strip()


class ChatInput:
    """Chat methods for a tokenizer with `vocabulary` and MindFormers' `pad`: prompts as batches of ids, and answers out
    of generated sequences. Where `return_tensors` is "np" or "ms" they come as arrays or Tensors, else as lists.
    """

    def build_single_message(self, role: str, metadata: str | None, message: str) -> list[int]:
        """The ids of one message, role token first; see `message_ids`."""
        return message_ids(self.vocabulary, role, metadata, message)

    def build_chat_input(
        self, query: str, history: list[dict] | None = None, role: str = "user", return_tensors: str | None = "np"
    ) -> BatchEncoding:
        """Builds the prompt of one chat turn.

        Args:
            query: the text of the last message.
            history: the messages before it; see `conversation_ids`.
            role: of the last message: "user", or "observation" for a tool's result.
            return_tensors: "np", "ms" or None.

        Returns:
            input_ids, attention_mask, position_ids, each of shape (1, length).
        """
        return self.build_batch_input([query], [history], role, padding=False, return_tensors=return_tensors)

    def build_batch_input(
        self,
        queries: str | list[str],
        histories: list | None = None,
        roles: str | list[str] = "user",
        padding: bool | str = True,
        return_tensors: str | None = "np",
    ) -> BatchEncoding:
        """Builds the prompts of several chats, padded to the longest on `padding_side`.

        Args:
            queries: the last message of each chat.
            histories: the messages before, a list or None for each chat.
            roles: the role of each last message, or one for all.
            padding: as in transformers; False together with return_tensors=None for ragged lists.
            return_tensors: "np", "ms" or None.

        Returns:
            input_ids, attention_mask, position_ids, each of shape (chats, length).

        Raises:
            InputError: lists of different lengths, or a wrong message.
        """
        if isinstance(queries, str):
            queries = [queries]
            if histories and isinstance(histories[0], dict):
                histories = [histories]
        histories = [None] * len(queries) if histories is None else histories
        roles = [roles] * len(queries) if roles is None or isinstance(roles, str) else roles
        if not len(queries) == len(histories) == len(roles):
            raise InputError(
                f"as many histories and roles as queries are needed; found {len(queries)} queries, "
                f"{len(histories)} histories, {len(roles)} roles"
            )
        conversations = [
            [*(history or ()), {"role": role or "user", "content": query}]
            for query, history, role in zip(queries, histories, roles)
        ]
        sequences = [conversation_ids(self.vocabulary, messages, True) for messages in conversations]
        return self.pad({"input_ids": sequences}, padding=padding, return_tensors=return_tensors)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        tools: list | str | None = None,
    ) -> list | str | np.ndarray | Tensor | BatchEncoding:
        """Encodes a conversation without rendering it as text first, so that messages cannot forge role tokens.

        Args:
            conversation: messages with role and content, optionally metadata and (system) tools; or a batch of such
                lists; or an object with `messages`.
            chat_template, truncation: refused when set: the format is fixed, and truncation breaks it.
            add_generation_prompt: whether <|assistant|> follows, to ask for an answer.
            tokenize: False for the text that the ids stand for (to look at; encoding it again would not give role
                tokens).
            padding, max_length: as in transformers; padding goes to `padding_side`.
            return_tensors: "np" or "ms" for shape (batch, length).
            return_dict: whether a BatchEncoding with mask and positions is returned.
            tools: a list or its JSON text for the system message, which must exist and have none yet.

        Returns:
            ids, or a list of them for a batch; array, BatchEncoding or text as asked for.

        Raises:
            InputError: a wrong message, or an argument that is refused.
        """
        if chat_template is not None or truncation:
            raise InputError(
                "chat_template and truncation are not supported: the format of ChatGLM3 is fixed, and "
                "truncating a conversation breaks it; shorten the messages"
            )
        conversation = getattr(conversation, "messages", conversation)
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise InputError(f"a conversation is a list of messages, at least one; found {conversation!r:.80}")
        batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
        sequences = [
            conversation_ids(self.vocabulary, with_tools(getattr(one, "messages", one), tools), add_generation_prompt)
            for one in (conversation if batched else [conversation])
        ]
        if not tokenize:
            texts = [self.vocabulary.decode(ids) for ids in sequences]
            return texts if batched else texts[0]
        encoded = self.pad(
            {"input_ids": sequences}, padding=padding, max_length=max_length, return_tensors=return_tensors
        )
        if not batched and return_tensors is None:
            encoded = type(encoded)({key: value[0] for key, value in encoded.items()})
        return encoded if return_dict else encoded["input_ids"]

    def answer_ids(self, ids: Sequence[int], prompt_length: int = 0) -> list[int]:
        """The ids behind the prompt up to the first stop token; see the function `answer_ids`."""
        return answer_ids(self.vocabulary, ids, prompt_length)

    def decode_answer(self, ids: Sequence[int], prompt_length: int = 0) -> str:
        """The answer in what `generate` returned: no prompt, no role tokens, no blank first line.

        Args:
            ids: the sequence, prompt first.
            prompt_length: how many ids of it are prompt.
        """
        return answer_text(self.vocabulary.decode(self.answer_ids(ids, prompt_length), skip_special_tokens=True))
