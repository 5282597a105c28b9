"""A long-context task that a tiny model can learn: find the value of a key among many sentences.

A context states a few facts ("The city is Oslo."), each several times, between sentences that matter to nobody.
The question names one key, the answer states its fact again. Keys and values are single words out of small sets, so
that a few hundred steps of a tiny model show: first the form of the answers, then values of the right key, then those
that the context states. The answer names the key before the value because that is learnt much sooner than the bare
value: with eight keys 35 of 40 held-out answers were right after 500 steps, against 14.
"""

import random

from sentencepiece import SentencePieceTrainer

from mindformers_glm32k.files import atomic_path

DATASET = "kv_retrieval"
TEMPLATE = "{context}\n\nQuestion: {input}"

# key -> its values; no word stands twice, here or below
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
_QUALITIES = ("old", "young", "quiet", "loud", "tall", "small", "kind", "slow", "quick", "tired", "clever", "shy")
_PEOPLE = (
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
)
_DEEDS = ("sees", "meets", "calls", "helps", "thanks", "follows", "greets", "visits", "hears", "asks", "pays", "joins")
_WHEN = ("today", "often", "again", "at night", "in the morning", "on Monday", "by the river", "near the bridge")


def fact(key, value):
    """str: the sentence that states the value of a key."""
    return f"The {key} is {value}."


def question(key):
    """str: asks for the value of a key."""
    return f"What is the {key}?"


def filler(rng):
    """str: a sentence that has nothing to do with the facts.

    Args:
        rng (random.Random)
    """
    return (
        f"The {rng.choice(_QUALITIES)} {rng.choice(_PEOPLE)} {rng.choice(_DEEDS)} "
        f"the {rng.choice(_PEOPLE)} {rng.choice(_WHEN)}."
    )


def sentences(seed, count=4000):
    """Text that has every word of the task, to train a vocabulary on.

    Args:
        seed (int): determines the sentences.
        count (int): number of filler sentences.

    Returns:
        list[str]
    """
    rng = random.Random(f"{seed}/vocabulary")
    lines = [fact(key, value) for key, values in FACTS.items() for value in values] * 20
    lines += [TEMPLATE.format(context="", input=question(key)).strip() for key in FACTS] * 20
    return lines + [filler(rng) for _ in range(count)]


class RetrievalTask:
    """Makes records of the task with contexts of a given length.

    Args:
        count (Callable[[str], int]): tokens of a text that starts a line or follows a space; must be additive over
            sentences, as it is for sentencepiece models that do not merge over spaces.
        prompt_tokens (int): tokens that the prompt's text may have at most.
        facts (int): most facts in a context, 1 to len(FACTS); each context states 1 to that many, of the first so
            many keys: few keys have few values, which are learnt sooner.
        filler_share (float): part of the context that is filler, 0 <= share < 1.

    Raises:
        ValueError: not even one fact fits.
    """

    def __init__(self, count, prompt_tokens, facts=4, filler_share=0.5):
        self._keys, self._filler_share = tuple(FACTS)[:facts], filler_share
        self._sizes = {fact(key, value): count(fact(key, value)) for key, values in FACTS.items() for value in values}
        # tokens of what stands behind the context, which begins with a line break and not with a space
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

    def record(self, rng):
        """Makes one record.

        Args:
            rng (random.Random): determines it.

        Returns:
            dict: `input`, `context`, `answers`.
        """
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
        chosen += self._repeat(lines, left + fillers)[0]  # what no filler fits into
        rng.shuffle(chosen)
        return {"input": question(key), "context": " ".join(chosen), "answers": [fact(key, stated[key])]}

    def _repeat(self, lines, room):
        """The sentences again and again while they fit; the room that is left."""
        chosen = []
        while self._sizes[lines[len(chosen) % len(lines)]] <= room:
            chosen.append(lines[len(chosen) % len(lines)])
            room -= self._sizes[chosen[-1]]
        return chosen, room


PIECES = 1000  # with the nine special tokens below 1024, the padded_vocab_size of the tiny configurations


def train_vocabulary(sentences, path, pieces=PIECES):
    """Writes a vocabulary with at most `pieces` pieces; the same sentences give the same file.

    As in the published vocabulary, any byte can be spelled, digits stand alone, nothing is normalised, and
    <unk>, <s>, </s> have the ids 0, 1, 2.

    Args:
        sentences (Iterable[str]): the text.
        path (str | os.PathLike): the file to write.
        pieces (int): upper bound, > 256 + the letters of the text.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
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
