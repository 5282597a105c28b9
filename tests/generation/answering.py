"""A network that answers at once, and a program, to be killed by tests, that answers a file with it."""

import sys
import time
from pathlib import Path

from mindformers_glm32k.generation import answers
from mindformers_glm32k.generation.questions import QuestionFile
from mindformers_glm32k.generation.sampling import Sampling
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary


class Echo:
    """Answers with the length of the prompt, with its seed where it samples, and the prompt's last tokens."""

    room, writes = 200, True

    def __init__(self, vocabulary, batch_size=3, delay=0.0, model="echo"):
        self.vocabulary, self.batch_size, self.delay = vocabulary, batch_size, delay
        self.identity = {"engine": "echo", "model": model}
        self.batches = []

    def generate(self, prompts, max_new_tokens, stop_ids, sampling=None, seeds=None):
        self.batches.append([len(prompt) for prompt in prompts])
        assert len(prompts) <= self.batch_size and max(map(len, prompts)) + max_new_tokens <= self.room
        time.sleep(self.delay)
        found = []
        for prompt, seed in zip(prompts, seeds):
            drawn = f" {seed}" if sampling.is_random else ""
            text = f"\n {len(prompt)}{drawn} {self.vocabulary.decode(prompt[-4:-1])} 奥斯陆"
            found.append([*self.vocabulary.encode(text), stop_ids[1]])
        return found


def run(folder, vocab_file, shard=(0, 1), network=None, options=None, **settings):
    """Answers folder/questions.jsonl into folder/answers.jsonl."""
    vocabulary = Vocabulary(vocab_file)
    network = network or Echo(vocabulary, **settings)
    options = options or answers.Options(16)
    questions = QuestionFile(folder / "questions.jsonl")
    stamp = answers.stamp_of(network, Path(vocab_file), questions, options)
    return answers.answer_file(questions, network, vocabulary, options, folder / "answers.jsonl", stamp, shard)


if __name__ == "__main__":
    run(
        Path(sys.argv[1]),
        sys.argv[2],
        (int(sys.argv[3]), int(sys.argv[4])),
        delay=0.02,
        options=answers.Options(16, Sampling(temperature=1.0, seed=7)),
    )
