"""The tokenizer's chat methods: prompts as batches of ids, and answers out of generated rows."""

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer import chat_format as chat


class ChatInput:
    """Mixin for a tokenizer with `vocabulary` and MindFormers' `pad`."""

    def build_single_message(self, role, metadata, message):
        """Returns the ids (list[int]) of one message, role token first; see `chat.message_ids`."""
        return chat.message_ids(self.vocabulary, role, metadata, message)

    def build_chat_input(self, query, history=None, role="user", return_tensors="np"):
        """Builds the prompt of one chat turn.

        Args:
            query (str): the text of the last message.
            history (list[dict] | None): the messages before it; see `chat.conversation_ids`.
            role (str): the role of the last message: "user", or "observation" for a tool's result.
            return_tensors (str | None): "np", "ms", or None for lists.

        Returns:
            BatchEncoding: input_ids, attention_mask, position_ids, each of shape (1, length).
        """
        return self.build_batch_input([query], [history], role, padding=False, return_tensors=return_tensors)

    def build_batch_input(self, queries, histories=None, roles="user", padding=True, return_tensors="np"):
        """Builds the prompts of several chats, padded to the longest on `padding_side`.

        Args:
            queries (str | list[str]): the last message of each chat.
            histories (list[list[dict] | None] | None): the messages before, one list for each chat.
            roles (str | list[str]): the role of each last message, or one for all.
            padding (bool | str): as in transformers; False together with return_tensors=None for ragged lists.
            return_tensors (str | None): "np", "ms", or None for lists.

        Returns:
            BatchEncoding: input_ids, attention_mask, position_ids, each of shape (chats, length).

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
        return self._batch(
            [
                chat.conversation_ids(
                    self.vocabulary,
                    [*(history or ()), {"role": role or "user", "content": query}],
                    add_generation_prompt=True,
                )
                for query, history, role in zip(queries, histories, roles)
            ],
            padding,
            return_tensors,
        )

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        add_generation_prompt=False,
        tokenize=True,
        padding=False,
        truncation=False,
        max_length=None,
        return_tensors=None,
        return_dict=False,
        tools=None,
    ):
        """Turns a whole conversation into ids, with no way through text: role tokens cannot be forged.

        Args:
            conversation (list[dict] | list[list[dict]]): messages with role and content, optionally metadata and
                (system) tools; or a batch of such lists; or an object with `messages`.
            add_generation_prompt (bool): whether <|assistant|> follows, to ask for an answer.
            tokenize (bool): False for the text that the ids stand for (to look at; encoding it again would not
                give role tokens).
            padding, max_length: as in transformers; padding goes to `padding_side`.
            return_tensors (str | None): "np" or "ms" for shape (batch, length).
            return_dict (bool): whether a BatchEncoding with mask and positions is returned.
            tools (list | None): tools to write into the system message, which must be there and have none.
            chat_template, truncation: refused when set: the format is fixed, and a cut breaks it.

        Returns:
            list[int], or list[list[int]] for a batch; array, BatchEncoding or str as asked for.

        Raises:
            InputError: a wrong message, or an argument that is refused.
        """
        if chat_template is not None or truncation:
            raise InputError(
                "chat_template and truncation are not supported: the format of ChatGLM3 is fixed, and "
                "cutting a conversation breaks it; shorten the messages"
            )
        conversation = getattr(conversation, "messages", conversation)
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise InputError(f"a conversation is a list of messages, at least one; found {conversation!r:.80}")
        batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
        rows = [
            chat.conversation_ids(
                self.vocabulary, chat.with_tools(getattr(one, "messages", one), tools), add_generation_prompt
            )
            for one in (conversation if batched else [conversation])
        ]
        if not tokenize:
            texts = [self.vocabulary.decode(row) for row in rows]
            return texts if batched else texts[0]
        encoded = self._batch(rows, padding, return_tensors, max_length)
        if not batched and return_tensors is None:
            encoded = type(encoded)({key: value[0] for key, value in encoded.items()})
        return encoded if return_dict else encoded["input_ids"]

    def answer_ids(self, ids, prompt_length=0):
        """Returns the ids (list[int]) behind the prompt up to the first stop token; see `chat.answer_ids`."""
        return chat.answer_ids(self.vocabulary, ids, prompt_length)

    def decode_answer(self, ids, prompt_length=0):
        """Returns the answer (str) in a row that `generate` returned: no prompt, no role tokens, no blank first line.

        Args:
            ids (Sequence[int]): the row, prompt first.
            prompt_length (int): how many ids of it are prompt.
        """
        return chat.answer_text(self.vocabulary.decode(self.answer_ids(ids, prompt_length), skip_special_tokens=True))

    def _batch(self, rows, padding, return_tensors, max_length=None):
        return self.pad({"input_ids": rows}, padding=padding, max_length=max_length, return_tensors=return_tensors)
