"""GLM32KTokenizer: the published ChatGLM3 tokenizer as a MindFormers tokenizer.

The ids come from `vocabulary.py` and `chat_format.py`, which has the chat methods too; this module is the interface
that MindFormers' YAMLs, Auto classes, Trainer and pipelines expect.

Upstream's ChatGLM3Tokenizer is not its base (1.6 to 1.9 alike): it pads on the right, never parses role tokens,
keeps their names in decoded answers, takes one message in apply_chat_template, cannot be saved as YAML, and lists
<sop> and <eop> as added tokens with the ids of <|assistant|> and <|observation|>.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from mindformers.models.glm2.glm_processor import GLMProcessor
from mindformers.models.tokenization_utils import PreTrainedTokenizer
from mindformers.models.tokenization_utils_base import PaddingStrategy, TruncationStrategy
from mindspore import Tensor

from mindformers_glm32k.checks import did_you_mean, parse_json
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer import chat_format as chat
from mindformers_glm32k.tokenizer.vocabulary import SPECIAL_TOKENS, Vocabulary

# Names of these tokens in YAMLs of ChatGLM2 and 3, accepted as aliases: the vocabulary fixes the ids.
_TOKEN_NAMES = {
    "bos_token": ("<s>", "<sop>", "sop"),
    "eos_token": ("</s>", "<eop>", "eop"),
    "end_token": ("</s>",),
    "mask_token": ("[MASK]",),
    "gmask_token": ("[gMASK]",),
    "pad_token": ("<unk>", "<pad>"),
    "unk_token": ("<unk>",),
}
_OWN = ("vocab_file", "encode_special_tokens", "padding_side", "clean_up_tokenization_spaces")
_PASSED_ON = tuple(
    "name_or_path model_max_length max_len truncation_side model_input_names processor_class verbose".split()
)
# Other keys of tokenizer_config.json files and MindFormers' loaders; without effect here.
_WITHOUT_EFFECT = tuple(
    "additional_special_tokens added_tokens_decoder auto_map chat_template do_lower_case remove_space "
    "special_tokens_map_file split_special_tokens tokenizer_class tokenizer_file type".split()
)
KNOWN_ARGUMENTS = frozenset((*_TOKEN_NAMES, *_OWN, *_PASSED_ON, *_WITHOUT_EFFECT))
_ENCODE_OPTIONS = tuple(
    "max_length stride pad_to_multiple_of return_tensors return_token_type_ids return_attention_mask "
    "return_overflowing_tokens return_special_tokens_mask return_length verbose".split()
)


class GLM32KTokenizer(chat.ChatInput, PreTrainedTokenizer):
    """Text and conversations -> ids, as the tokenizer published with THUDM/chatglm3-6b-32k.

    Args:
        vocab_file: `tokenizer.model`, the published one or any sentencepiece model.
        encode_special_tokens: whether <|system|>, <|user|>, <|assistant|> and <|observation|> in a text given
            to `encode` and its relatives become role tokens. Contents of chat messages never do.
        padding_side: "left" as published; "right" for MindFormers' generator, which expects pads there.
        clean_up_tokenization_spaces: whether decoding joins punctuation to the word before it.
        bos_token, eos_token, end_token, mask_token, gmask_token, pad_token, unk_token: accepted for the
            YAMLs that name them; the ids are the vocabulary's (1, 2, 0 for <s>, </s>, <unk> = pad).

    Raises:
        InputError: no usable vocabulary file, an unknown argument, or a name that the vocabulary does not have.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"
    _support_list = []

    def __init__(
        self,
        vocab_file: str | Path | None = None,
        encode_special_tokens: bool = False,
        padding_side: str = "left",
        clean_up_tokenization_spaces: bool = False,
        **kwargs: Any,
    ):
        _check_arguments(kwargs)
        if not vocab_file and kwargs.get("name_or_path"):  # from_pretrained of a folder without the file
            vocab_file = Path(kwargs["name_or_path"]) / self.vocab_files_names["vocab_file"]
        self.vocab_file = vocab_file
        self.vocabulary = Vocabulary(vocab_file)
        self.encode_special_tokens = encode_special_tokens
        name = self.vocabulary.token
        super().__init__(
            bos_token=name(self.vocabulary.bos_id),
            eos_token=name(self.vocabulary.eos_id),
            unk_token=name(self.vocabulary.unk_id),
            pad_token=name(self.vocabulary.unk_id),
            mask_token="[MASK]",
            additional_special_tokens=list(SPECIAL_TOKENS[1:]),
            encode_special_tokens=encode_special_tokens,
            padding_side=padding_side,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **{key: kwargs[key] for key in _PASSED_ON if key in kwargs},
        )

    @classmethod
    def _from_experimental_pretrained(cls, resolved_vocab_files, *args, **kwargs) -> GLM32KTokenizer:
        """Upstream's loader of a folder, without other programs' files of special tokens: newer transformers write
        lists of dictionaries there, which upstream cannot read, and the vocabulary fixes these tokens anyway."""
        files = dict(resolved_vocab_files)
        for key in ("special_tokens_map_file", "added_tokens_file", "tokenizer_file"):
            files.pop(key, None)
        path = files.get("tokenizer_config_file")
        config = {**(_read_tokenizer_config(path) if path else {}), "tokenizer_class": cls.__name__}
        with tempfile.TemporaryDirectory(prefix="glm32k_tokenizer_") as folder:
            files["tokenizer_config_file"] = str(Path(folder) / "tokenizer_config.json")
            Path(files["tokenizer_config_file"]).write_text(json.dumps(config), encoding="utf-8")
            return super()._from_experimental_pretrained(files, *args, **kwargs)

    # --- the vocabulary ---

    @property
    def vocab_size(self) -> int:
        """Pieces and special tokens together; the model's padded_vocab_size must not be smaller."""
        return len(self.vocabulary)

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids that end an answer: </s>, <|user|>, <|observation|>."""
        return chat.stop_ids(self.vocabulary)

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        return {self.vocabulary.token(index): index for index in range(self.vocab_size)}

    def get_command(self, token: str) -> int:
        """The id of a special token, <bos>, <eos>, <pad> or <unk>; InputError for others."""
        commands = {
            "<bos>": self.vocabulary.bos_id,
            "<eos>": self.vocabulary.eos_id,
            "<pad>": self.vocabulary.unk_id,
            "<unk>": self.vocabulary.unk_id,
            **self.vocabulary.special,
        }
        if token not in commands:
            raise InputError(f"no special token {token!r}; there are {', '.join(commands)}")
        return commands[token]

    def get_prefix_tokens(self) -> list[int]:
        """The ids of [gMASK] sop."""
        return chat.prefix_ids(self.vocabulary)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Writes tokenizer.model into the folder (or to the path given); returns its path in a tuple."""
        path = Path(save_directory)
        if path.is_dir():
            path /= (filename_prefix + "-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        self.vocabulary.save(path)
        return (str(path),)

    def _add_tokens(self, new_tokens, special_tokens=False):
        # The base class calls this for the special tokens, which the vocabulary already has.
        unknown = [str(token) for token in new_tokens or () if self.vocabulary.token_id(str(token)) is None]
        if unknown:
            raise InputError(f"GLM32K's vocabulary is fixed, tokens cannot be added to it: {', '.join(unknown)}")
        return 0

    def _convert_token_to_id(self, token):
        index = self.vocabulary.token_id(token)
        return self.vocabulary.unk_id if index is None else index

    def _convert_id_to_token(self, index):
        return self.vocabulary.token(index)

    # --- text ---

    def tokenize(
        self,
        text: str,
        pair: str | None = None,
        add_special_tokens: bool = False,
        encode_special_tokens: bool | None = None,
    ) -> list[str]:
        """The pieces of `text`, and of `pair` behind them, without the prefix."""
        parse = self.encode_special_tokens if encode_special_tokens is None else encode_special_tokens
        return [piece for part in (text, pair) if part is not None for piece in self.vocabulary.pieces(part, parse)]

    def encode_batch(self, texts: Sequence[str], num_threads: int = -1) -> list[list[int]]:
        """For each text what `encode(text, add_special_tokens=False)` gives, in parallel threads (-1: one per core)."""
        if self.encode_special_tokens:
            return [self.vocabulary.encode(text, parse_roles=True) for text in texts]
        return self.vocabulary.encode_batch(texts, num_threads)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """[gMASK] sop and the ids; a pair is joined and ends in </s>."""
        second = [] if token_ids_1 is None else [*token_ids_1, self.vocabulary.eos_id]
        return [*self.get_prefix_tokens(), *token_ids_0, *second]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for each special token of the sequence that is (to be) built, 0 for the others."""
        if not already_has_special_tokens:
            pair = [] if token_ids_1 is None else [0] * len(token_ids_1) + [1]
            return [1] * len(self.get_prefix_tokens()) + [0] * len(token_ids_0) + pair
        return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)

    def _encode_plus(
        self,
        text,
        text_pair=None,
        add_special_tokens=True,
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        truncation_strategy=TruncationStrategy.DO_NOT_TRUNCATE,
        is_split_into_words=False,
        return_offsets_mapping=False,
        encode_special_tokens=None,
        **options,
    ):
        _check_encode_options(options, return_offsets_mapping)
        first, second = self._text_ids(text, text_pair, is_split_into_words, encode_special_tokens)
        return self.prepare_for_model(
            first,
            second,
            add_special_tokens=add_special_tokens,
            padding=padding_strategy.value,
            truncation=truncation_strategy.value,
            prepend_batch_axis=True,
            **options,
        )

    def _batch_encode_plus(
        self,
        batch_text_or_text_pairs,
        add_special_tokens=True,
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        truncation_strategy=TruncationStrategy.DO_NOT_TRUNCATE,
        is_split_into_words=False,
        return_offsets_mapping=False,
        encode_special_tokens=None,
        **options,
    ):
        _check_encode_options(options, return_offsets_mapping)
        pairs = [
            self._text_ids(*_as_pair(item, is_split_into_words), is_split_into_words, encode_special_tokens)
            for item in batch_text_or_text_pairs
        ]
        return self._batch_prepare_for_model(
            pairs,
            add_special_tokens=add_special_tokens,
            padding_strategy=padding_strategy,
            truncation_strategy=truncation_strategy,
            **options,
        )

    def _text_ids(self, text, text_pair, is_split_into_words, encode_special_tokens):
        """Ids of a text and of its pair (None without one). Encoded directly, not via pieces: a piece named
        `sop` in a small vocabulary would become the special token."""
        parse = self.encode_special_tokens if encode_special_tokens is None else encode_special_tokens

        def ids_of(item):
            if isinstance(item, (list, tuple)):
                if all(isinstance(part, Integral) for part in item):
                    return [int(part) for part in item]
                if not is_split_into_words:
                    return self.convert_tokens_to_ids(list(item))
                return [index for part in item for index in self.vocabulary.encode(part, parse)]
            return self.vocabulary.encode(item, parse)

        return ids_of(text), None if text_pair is None else ids_of(text_pair)

    def decode(
        self,
        token_ids: int | Sequence[int] | np.ndarray | Tensor,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str | list[str]:
        """The text of one id or a sequence of ids; a list of texts for a batch. Ids without text are left out.

        Args:
            token_ids: one id, a sequence, or a batch.
            skip_special_tokens: leave special tokens out instead of writing their names.
            clean_up_tokenization_spaces: None for what the tokenizer was built with.
        """
        ids = [token_ids] if isinstance(token_ids, Integral) else token_ids
        return super().decode(ids, skip_special_tokens, clean_up_tokenization_spaces, **kwargs)

    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs):
        text = self.vocabulary.decode(token_ids, skip_special_tokens)
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean else text

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces."""
        return self.vocabulary.model.decode_pieces(tokens)

    def _pad(
        self,
        encoded_inputs,
        max_length=None,
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of=None,
        return_attention_mask=None,
    ):
        """Adds mask and positions to one sequence and pads all of it on `padding_side` (0 in mask and positions)."""
        length = len(encoded_inputs["input_ids"])
        if return_attention_mask is not False:
            encoded_inputs.setdefault("attention_mask", [1] * length)
        encoded_inputs.setdefault("position_ids", list(range(length)))
        if padding_strategy == PaddingStrategy.DO_NOT_PAD:
            return encoded_inputs
        target = length if padding_strategy == PaddingStrategy.LONGEST or max_length is None else max_length
        if pad_to_multiple_of:
            target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
        fillers = {
            "input_ids": self.pad_token_id,
            "attention_mask": 0,
            "position_ids": 0,
            "token_type_ids": 0,
            "special_tokens_mask": 1,
        }
        for key, filler in fillers.items():
            if key in encoded_inputs:
                ids, padding = list(encoded_inputs[key]), [filler] * (target - length)
                encoded_inputs[key] = padding + ids if self.padding_side == "left" else ids + padding
        return encoded_inputs


class GLM32KProcessor(GLMProcessor):
    """The `processor` section of the YAML, which MindFormers builds around a tokenizer: upstream's GLMProcessor, which
    accepts two other tokenizer classes only, for GLM32KTokenizer.

    Args:
        tokenizer: a GLM32KTokenizer.
        max_length: tokens that texts are padded to. Default 128.
        padding: "max_length" (default), "longest" or "do_not_pad".
        return_tensors: "ms" (default), "np", or None for lists.
    """

    tokenizer_class = "AutoTokenizer"


def _check_arguments(kwargs):
    """Raises InputError for constructor arguments that mean nothing here, or name another token."""
    problems = []
    for key, value in kwargs.items():
        if key in _TOKEN_NAMES:
            if value is not None and str(value) not in _TOKEN_NAMES[key]:
                problems.append(f"{key} {str(value)!r} is not ChatGLM3's ({' or '.join(_TOKEN_NAMES[key])})")
        elif key not in _PASSED_ON + _WITHOUT_EFFECT and "name_or_path" not in kwargs:
            # With name_or_path, the arguments come from a tokenizer_config.json that serves other programs, too.
            known = [*_TOKEN_NAMES, *_PASSED_ON, *_OWN]
            problems.append(f"unknown argument {key!r}{did_you_mean(key, known)}")
    if problems:
        raise InputError("; ".join(problems))


def _read_tokenizer_config(path):
    """The keys of a tokenizer_config.json that have an effect here; special tokens by name, also from dictionaries."""
    try:
        config = parse_json(Path(path).read_text(encoding="utf-8"))
        names = {key: config[key] for key in _TOKEN_NAMES if config.get(key) is not None}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: not a readable tokenizer_config.json ({error}); download it again") from error
    kept = {key: config[key] for key in (*_OWN, *_PASSED_ON) if key in config}
    return {**kept, **{key: name.get("content") if isinstance(name, dict) else name for key, name in names.items()}}


def _check_encode_options(options, return_offsets_mapping):
    unknown = sorted(set(options) - set(_ENCODE_OPTIONS))
    if unknown:
        raise TypeError(f"unexpected keyword arguments: {', '.join(unknown)}")
    if return_offsets_mapping:
        raise NotImplementedError("offsets of tokens in the text are not available")


def _as_pair(item, is_split_into_words):
    """One entry of a batch as (text, pair or None): a text, ids, words (when split), or a pair of these."""
    single = (
        not isinstance(item, (list, tuple))
        or not item
        or isinstance(item[0], Integral)
        or (is_split_into_words and not isinstance(item[0], (list, tuple)))
    )
    return (item, None) if single else tuple(item)
