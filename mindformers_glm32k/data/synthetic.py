"""A long-context task that a tiny model can learn: find the value of a key among many sentences.

A context states a few facts ("The city is Oslo."), each several times, between irrelevant sentences.
The question names one key, the answer states its fact again. Keys and values are single words from small sets, so that
a few hundred steps of a tiny model show progress: first the form of the answers, then values of the right key, then the
value that the context states. The answer names the key before the value because a model learns that much sooner than
the bare value: with eight keys 35 of 40 held-out answers were right after 500 steps, against 14.

`write_task` writes a folder with the task and a vocabulary trained on it, built like the published one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path

DATASET = "kv_retrieval"
TEMPLATE = "{context}\n\nQuestion: {input}"
PIECES = 1000  # with the nine special tokens below 1024, the padded_vocab_size of the tiny configurations
MAX_TARGET_LENGTH = 15  # tokens of the answer in finetune_glm32k_tiny_cpu.yaml; the end token comes on top
_ATTEMPTS = 1000  # to draw a record that differs from all before

# key -> its values; no word occurs twice, here or below
FACTS = {
    "city": ("Oslo", "Paris", "Cairo", "Lima"),
    "animal": ("fox", "owl", "horse", "whale"),
    "colour": ("red", "green", "blue", "white"),
    "metal": ("iron", "gold", "copper", "tin"),
    "fruit": ("apple", "plum", "lemon", "grape"),
    "planet": ("Mars", "Venus", "Saturn", "Neptune"),
    "season": ("spring", "summer", "autumn", "winter"),
    "tool": ("hammer", "saw", "spade", "needle"),
}
_QUALITIES = ["old", "young", "quiet", "loud", "tall", "small", "kind", "slow", "quick", "tired", "clever", "shy"]
_PEOPLE = [
    "baker",
    "farmer",
    "teacher",
    "doctor",
    "sailor",
    "writer",
    "painter",
    "driver",
    "singer",
    "miller",
    "tailor",
    "judge",
    "guard",
    "clerk",
    "nurse",
    "pilot",
]
_DEEDS = ["sees", "meets", "calls", "helps", "thanks", "follows", "greets", "visits", "hears", "asks", "pays", "joins"]
_WHEN = ("today", "often", "again", "at night", "in the morning", "on Monday", "by the river", "near the bridge")


def fact(key: str, value: str) -> str:
    """The sentence that states the value of a key."""
    return f"The {key} is {value}."


def question(key: str) -> str:
    return f"What is the {key}?"


def filler(rng: random.Random) -> str:
    """A sentence that has nothing to do with the facts."""
    return (
        f"The {rng.choice(_QUALITIES)} {rng.choice(_PEOPLE)} {rng.choice(_DEEDS)} "
        f"the {rng.choice(_PEOPLE)} {rng.choice(_WHEN)}."
    )


def sentences(seed: int, count: int = 4000) -> list[str]:
    """Text that has every word of the task and `count` filler sentences, to train a vocabulary on."""
    rng = random.Random(f"{seed}/vocabulary")
    lines = [fact(key, value) for key, values in FACTS.items() for value in values] * 20
    lines += [TEMPLATE.format(context="", input=question(key)).strip() for key in FACTS] * 20
    return lines + [filler(rng) for _ in range(count)]


class RetrievalTask:
    """Makes records of the task with contexts of a given length.

    Args:
        count: text -> its tokens at the start of a line or after a space; must be additive over sentences, as it is
            for sentencepiece models that do not merge across spaces.
        prompt_tokens: tokens that the prompt's text may have at most.
        facts: most facts in a context, 1 to len(FACTS); each context states 1 to that many, about the first `facts`
            keys. Fewer keys are learned sooner.
        filler_share: part of the context that is filler, 0 <= share < 1.

    Raises:
        ValueError: not even one fact fits.
    """

    def __init__(self, count: Callable[[str], int], prompt_tokens: int, facts: int = 4, filler_share: float = 0.5):
        self._keys, self._filler_share = tuple(FACTS)[:facts], filler_share
        self._sizes = {fact(key, value): count(fact(key, value)) for key, values in FACTS.items() for value in values}
        # tokens after the context; counted behind a fact, because they begin with a line break and not with a space
        anchor = fact("city", "Oslo")
        self._tails = {
            key: count(TEMPLATE.format(context=anchor, input=question(key))) - count(anchor) for key in FACTS
        }
        rng = random.Random(0)
        pool = sorted({filler(rng) for _ in range(3000)})
        self._fillers = [(sentence, count(sentence)) for sentence in pool]
        self._prompt_tokens = prompt_tokens
        smallest = max(self._sizes.values()) + max(self._tails.values())
        if prompt_tokens < smallest:
            raise ValueError(f"a prompt needs at least {smallest} tokens")

    def record(self, rng: random.Random) -> dict:
        """One record: `input`, `context`, `answers`."""
        keys = rng.sample(self._keys, rng.randint(1, len(self._keys)))
        stated = {key: rng.choice(FACTS[key]) for key in keys}
        key = keys[0]  # the first is stated even where there is no room for all
        lines = [fact(*pair) for pair in stated.items()]
        room = self._prompt_tokens - self._tails[key]
        once, total = 0, 0  # tokens of the facts that fit when each is stated once, and of all of them
        for line in lines:
            total += self._sizes[line]
            once = total if total <= room else once
        fillers = min(int(room * self._filler_share), room - once)
        chosen, left = self._repeat(lines, room - fillers)
        while True:
            sentence, size = rng.choice(self._fillers)
            if size > left + fillers:
                break
            chosen.append(sentence)
            fillers -= size
        chosen += self._repeat(lines, left + fillers)[0]  # into room that no filler fits
        rng.shuffle(chosen)
        return {"input": question(key), "context": " ".join(chosen), "answers": [fact(key, stated[key])]}

    def _repeat(self, lines, room):
        """Repeats the sentences in turn while they fit; returns them and the room that is left, in tokens."""
        chosen = []
        while self._sizes[lines[len(chosen) % len(lines)]] <= room:
            chosen.append(lines[len(chosen) % len(lines)])
            room -= self._sizes[chosen[-1]]
        return chosen, room


def train_vocabulary(text: Iterable[str], path: str | os.PathLike, pieces: int = PIECES) -> None:
    """Writes a sentencepiece vocabulary with at most `pieces` pieces (> 256 + the characters of the text). The same
    text gives the same file.

    As in the published vocabulary: byte fallback, single digits, no normalization, and the ids 0, 1, 2 for <unk>, <s>,
    </s>.
    """
    from sentencepiece import SentencePieceTrainer

    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=file,
            model_type="bpe",
            vocab_size=pieces,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )


def write_task(
    folder: Path, seq_length: int, samples: int, eval_samples: int, facts: int, filler_share: float, seed: int
) -> int:
    """Writes tokenizer.model, dataset2prompt.json, train.jsonl and eval.jsonl into a folder, all or none.

    Records come close to `seq_length` tokens: prompt, answer (MAX_TARGET_LENGTH at most) and end token.
    No record is written twice, so none of eval.jsonl is in train.jsonl. The same arguments give the same files.

    Returns:
        size of the vocabulary, special tokens included.

    Raises:
        InputError: not even one fact fits into `seq_length`, or fewer different records than asked for.
    """
    from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

    # The vocabulary is needed to see whether a record fits, and nothing may be written before that is known.
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary_file = Path(scratch) / "tokenizer.model"
        train_vocabulary(sentences(seed), vocabulary_file)
        vocabulary = Vocabulary(vocabulary_file)
    task, seen = _task(vocabulary, seq_length, facts, filler_share), set()
    with contextlib.ExitStack() as stack:  # all files or none

        def new(name):
            return stack.enter_context(atomic_path(folder / name))

        vocabulary.save(new("tokenizer.model"))
        prompts = json.dumps({DATASET: TEMPLATE}, indent=4, ensure_ascii=False)
        new("dataset2prompt.json").write_text(prompts + "\n", encoding="utf-8")
        for name, records in (("eval", eval_samples), ("train", samples)):
            rng = random.Random(f"{seed}/{name}")
            with open(new(f"{name}.jsonl"), "w", encoding="utf-8") as file:
                for _ in tqdm(range(records), desc=f"{name}.jsonl", unit="record", disable=None):
                    file.write(json.dumps(_new_record(task, rng, seen), ensure_ascii=False) + "\n")
    return len(vocabulary)


def _task(vocabulary, seq_length, facts, filler_share):
    """The task with contexts that fill `seq_length` tokens."""
    from mindformers_glm32k.tokenizer import chat_format as chat

    empty = [{"role": "user", "content": ""}]
    around = len(chat.conversation_ids(vocabulary, empty, add_generation_prompt=True)) + MAX_TARGET_LENGTH + 1
    try:
        return RetrievalTask(lambda text: len(vocabulary.encode(text)), seq_length - around, facts, filler_share)
    except ValueError as error:
        raise InputError(
            f"--seq_length {seq_length}: too short, {error} and {around} go to the chat format and the answer"
        ) from error


def _new_record(task, rng, seen):
    """A record with the fields of LongBench and AdGen, its digest not yet in `seen`; the digest is added."""
    for _ in range(_ATTEMPTS):
        record = task.record(rng)
        content = TEMPLATE.format(**record)
        digest = hashlib.sha256(content.encode("utf-8")).digest()[:16]
        if digest not in seen:
            seen.add(digest)
            return {
                "content": content,
                "summary": record["answers"][0],
                **record,
                "length": len(record["context"].split()),
                "dataset": DATASET,
                "language": "en",
                "all_classes": None,
                "_id": digest.hex(),
            }
    raise InputError(
        f"no {len(seen) + 1} different records with these options; raise --seq_length, --filler or --facts, "
        "or ask for fewer --samples"
    )
