"""tokenizer.json and chat template: ChatGLM3's tokenizer for programs that know only `tokenizers`, made of
tokenizer.model.

Two special tokens are written as GLM-4 writes them, <sop> and <eop>: as added tokens, `sop` and `eop` would be found
inside words such as "philosophy". Ids are the published ones.

Merges are generated as transformers' SentencePieceExtractor does (convert_slow_tokenizer.py), from normal pieces only:
sentencepiece never merges text into a byte or control piece.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer.chat_format import conversation_ids
from mindformers_glm32k.tokenizer.vocabulary import SPECIAL_TOKENS, Vocabulary

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer

MARK = "\ufdd0"  # a code point that Unicode keeps free of characters; see chat_template.jinja
LONGEST = 32768
_RENAMED = {"sop": "<sop>", "eop": "<eop>"}
NAMES = [_RENAMED.get(token, token) for token in SPECIAL_TOKENS]
_ROUNDS = 300
_KIND = (
    "only sentencepiece models as ChatGLM3's can be exported: BPE with byte_fallback, identity normalization, spaces "
    "kept; give the published tokenizer.model, or train the vocabulary so"
)
_ODD = (
    " ", "  ", "\n", "\r\n", "\t", "\x00", "\u200b", "\u3000", "\ufeff", MARK, "▁", "a", "the", "philosophy", "sop",
    "eop", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "[gMASK]", "<sop>", "</s>", "<s>", "<unk>",
    "<0x41>", "<", "[", "|>", "好", "的", "，。！？", "𠮷野家", "😀", "👩\u200d💻", "🇨🇳", "def f(x):\n    return x[0]",
    "12345", "é", "e\u0301", "ไทย", "العربية", "עברית", "∑_{i=1}^{n}", "====", "----------", "xxxxxxx",
    "https://example.com/a?b=c&d=%20",
)  # fmt: skip


def build_tokenizer(vocabulary: Vocabulary, path: str | Path) -> Tokenizer:
    """The native tokenizer of the tokenizer.model at `path`, which `vocabulary` holds.

    Raises:
        InputError: another kind of sentencepiece model than ChatGLM3's, BPE with byte fallback and no normalization.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

    model, spaces = vocabulary.model, "  \uff21 b  "
    size = model.vocab_size()
    if (
        not any(map(model.is_byte, range(size)))
        or model.decode(model.encode(spaces)) != spaces
        or not model.encode("\n", out_type=str)[0].startswith("▁")
    ):
        raise InputError(f"{path}: {_KIND}")
    ids = {model.id_to_piece(index): index for index in range(size)}
    tokenizer = Tokenizer(models.BPE(ids, _merges(model), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")]
    steps += [normalizers.Replace(Regex(rf"(?<=[<\[]){MARK}"), ""), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [vocabulary.token(index) for index in (vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id)]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control + NAMES])
    prefix = [(name, tokenizer.token_to_id(name)) for name in ("[gMASK]", "<sop>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B:1", special_tokens=prefix
    )
    return tokenizer


def _merges(model):
    # from scores, not from the model file, whose message classes fail to import with some versions of protobuf
    others = (model.is_byte, model.is_control, model.is_unknown, model.is_unused)
    indices = [index for index in range(model.vocab_size()) if not any(is_one(index) for is_one in others)]
    normal = {model.id_to_piece(index): model.get_score(index) for index in indices}
    found = []
    for piece, score in normal.items():
        for index in range(1, len(piece)):
            left, right = piece[:index], piece[index:]
            if left in normal and right in normal:
                found.append((-score, -len(left), left, right))
    return [(left, right) for _, _, left, right in sorted(found, key=lambda merge: merge[:2])]


def write_tokenizer(vocabulary: Vocabulary, path: str | Path, folder: Path, longest: int = LONGEST) -> int:
    """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and tokenizer.model into a folder; returns how
    many texts and conversations were compared with this plugin's tokenizer, all equal.

    Args:
        vocabulary: of the tokenizer.model at `path`.
        longest: tokens that the model can see.

    Raises:
        InputError: a vocabulary of another kind, or ids that differ.
    """
    build_tokenizer(vocabulary, path).save(str(folder / "tokenizer.json"))
    template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "eos_token": vocabulary.token(vocabulary.eos_id),
        "pad_token": "<unk>",
        "padding_side": "left",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    vocabulary.save(folder / "tokenizer.model")
    return compare(vocabulary, folder)


def compare(vocabulary: Vocabulary, folder: Path) -> int:
    """Compares the ids of a folder's tokenizer and chat template with this plugin's on odd texts and conversations.

    Raises:
        InputError: at the first that differs.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template, texts = compile_template((folder / "chat_template.jinja").read_text(encoding="utf-8")), 0
    for text in odd_texts():
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "a" + text, "metadata": text}]
        rendered = template.render(messages=messages, add_generation_prompt=True)
        found = tokenizer.encode(rendered, add_special_tokens=False).ids
        if found != conversation_ids(vocabulary, messages, True):
            raise InputError(f"tokenizer.json gives other ids than tokenizer.model for the text {text!r}: {_KIND}")
        texts += 1
    return texts


def odd_texts() -> Iterator[str]:
    """Texts on which tokenizers tend to differ: each odd part alone, repeated, and in random mixtures (fixed seed)."""
    rng = random.Random(0)
    for part in _ODD:
        yield part
        yield part * rng.randint(2, 70)
    for _ in range(_ROUNDS):
        yield "".join(rng.choices(_ODD, k=rng.randint(2, 12)))


def compile_template(text: str) -> Template:
    """A chat template as transformers compiles it (utils/chat_template_utils.py): a Jinja template."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise InputError(message)

    def to_json(value, ensure_ascii=False, indent=None):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(text)
