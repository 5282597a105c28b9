"""Predictions of LongBench's samples as its pred.py makes them for chatglm3-6b-32k, resumable line by line."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from mindformers_glm32k.data.longbench import CONTEXT, PromptTemplates, document_key, plain_name
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.generation.journal import Progress
from mindformers_glm32k.longbench import samples
from mindformers_glm32k.longbench.engines import Engine, Request
from mindformers_glm32k.longbench.predictions import PredictionFile
from mindformers_glm32k.longbench.samples import WITHOUT_CHAT_FORMAT, build_prompt_ids
from mindformers_glm32k.tokenizer import chat_format as chat
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

PROTOCOL = "pred.py for chatglm3-6b-32k, 1"
MAX_LENGTH = 31500  # model2maxlen.json
# dataset2maxlen.json
MAX_NEW_TOKENS = {
    "narrativeqa": 128,
    "qasper": 128,
    "multifieldqa_en": 64,
    "multifieldqa_zh": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "musique": 32,
    "dureader": 128,
    "gov_report": 512,
    "qmsum": 512,
    "multi_news": 512,
    "vcsum": 512,
    "trec": 64,
    "triviaqa": 32,
    "samsum": 128,
    "lsht": 64,
    "passage_count": 32,
    "passage_retrieval_en": 32,
    "passage_retrieval_zh": 32,
    "lcc": 64,
    "repobench-p": 64,
}
_ROWS = "{content}"  # for records of `glm32k preprocess`, which hold whole prompts


@dataclass(frozen=True)
class Options:
    """What determines the predictions, beside the model.

    Attributes:
        max_length: tokens of a prompt without the chat format; a longer one loses its middle.
        max_new_tokens: longest answer of data sets that LongBench does not have.
        stop_at_roles: whether `<|user|>` and `<|observation|>` end an answer, too, as in a chat; not in pred.py.
    """

    max_length: int | None = MAX_LENGTH
    max_new_tokens: int = 64
    stop_at_roles: bool = False


class Prompts:
    """Builds the requests for samples.

    Args:
        vocabulary: of the model.
        templates: by data set; None where all records hold whole prompts.
        options: see `Options`.
    """

    def __init__(self, vocabulary: Vocabulary, templates: PromptTemplates | None, options: Options):
        self._vocabulary, self._templates, self._options = vocabulary, templates, options
        self._tokenizer = SimpleNamespace(vocabulary=vocabulary)

    def request(self, key: tuple[str, str], record: dict) -> Request:
        """The request of one sample; InputError where a field is missing."""
        name, ids = plain_name(record["dataset"]), self.ids(record)
        stops = [self._vocabulary.eos_id]
        if self._options.stop_at_roles:
            stops = list(chat.stop_ids(self._vocabulary))
        if name == "samsum":
            stops.append(self._vocabulary.encode("\n")[-1])
        prefix, suffix = self._around(name)
        return Request(
            key,
            ids,
            self._vocabulary.decode(ids[prefix : len(ids) - suffix]),
            name not in WITHOUT_CHAT_FORMAT,
            self.max_new_tokens(name),
            1 if name == "samsum" else 0,
            tuple(stops),
        )

    def ids(self, record: dict) -> list[int]:
        """The prompt's ids, those that pred.py feeds."""
        return build_prompt_ids(record, self.template(record), self._tokenizer, self._options.max_length)

    def template(self, record: dict) -> str:
        """The template of a record: the data set's, or `{content}` where the record holds its whole prompt."""
        if CONTEXT in record and self._templates is not None:
            return self._templates.template(record["dataset"]).text
        if "content" in record:
            return _ROWS
        raise InputError(f"{record['dataset']}: --prompt_config_file is needed, LongBench's dataset2prompt.json")

    def max_new_tokens(self, dataset: str) -> int:
        """The longest answer of a data set."""
        return MAX_NEW_TOKENS.get(plain_name(dataset), self._options.max_new_tokens)

    def _around(self, name):
        """Tokens before and behind the prompt's text."""
        if name in WITHOUT_CHAT_FORMAT:
            return len(chat.prefix_ids(self._vocabulary)), 0
        return self.chat_tokens() - 1, 1

    def chat_tokens(self) -> int:
        """How many tokens the chat format adds."""
        empty = [{"role": "user", "content": ""}]
        return len(chat.conversation_ids(self._vocabulary, empty, add_generation_prompt=True))


def fitted(options: Options, room: int | None, vocabulary: Vocabulary, datasets: Iterable[str]) -> Options:
    """The options with max_length set: as asked for; by default pred.py's, or less where the model has less room.

    Args:
        options: max_length may be None.
        room: tokens of prompt and answer together; None where it is not known.
        vocabulary: of the model.
        datasets: names; the longest answer among them has to fit.

    Raises:
        InputError: what is asked for does not fit.
    """
    asked, prompts = options.max_length, Prompts(vocabulary, None, options)
    most = MAX_LENGTH
    if room is not None:
        new_tokens = max(map(prompts.max_new_tokens, datasets))
        most = room - prompts.chat_tokens() - new_tokens
        if most < 2 or (asked or 0) > most:
            raise InputError(
                f"--max_length {asked or MAX_LENGTH}: beside {prompts.chat_tokens()} tokens of the chat format and "
                f"{new_tokens} of an answer the model's seq_length {room} has room for {most}; lower it"
            )
    return replace(options, max_length=asked or min(MAX_LENGTH, most))


def stamp_of(engine: Engine, tokenizer: Path, options: Options) -> dict:
    """What determines the predictions of all data sets, and in which ways they may differ from pred.py's."""
    differs = list(engine.differs)
    if options.max_length != MAX_LENGTH:
        differs.append(f"prompts are truncated to {options.max_length} tokens instead of {MAX_LENGTH}")
    if options.stop_at_roles:
        differs.append("answers end at role tokens, too")
    return {
        "protocol": PROTOCOL,
        **engine.identity,
        "tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest()[:16],
        "max_length": options.max_length,
        "stop_at_roles": options.stop_at_roles,
        "differs": differs,
    }


def predict(
    entries: list[samples.Entry],
    expected: dict[str, int],
    engine: Engine,
    prompts: Prompts,
    output_dir: Path,
    stamp: dict,
) -> dict[str, int]:
    """Predicts what is not predicted yet, one line a sample in `output_dir/DATASET.jsonl`.

    Args:
        entries: the samples of this process.
        expected: samples of each data set in all.
        engine: answers the requests.
        prompts: makes the requests.
        output_dir: made when it is not there.
        stamp: what determines the predictions; a digest of the template comes on top for each data set.

    Returns:
        How many samples of each data set are predicted now, by all processes.

    Raises:
        InputError: a record that lacks a field, or a file with lines of another stamp.
    """
    files, first = {}, {}
    for entry in entries:  # a file with another stamp is refused before anything is computed
        first.setdefault(entry.dataset, entry)
    for entry, record in samples.read(list(first.values())):
        template = prompts.template(record).encode()
        files[entry.dataset] = PredictionFile(
            output_dir / f"{entry.dataset}.jsonl",
            {
                **stamp,
                "prompt": hashlib.sha256(template).hexdigest()[:16],
                "max_new_tokens": prompts.max_new_tokens(entry.dataset),
                "samples": expected[entry.dataset],
            },
        )
    todo = [entry for entry in entries if entry.key not in files[entry.dataset]]
    progress = Progress(len(entries) - len(todo), len(entries))
    rows: dict[tuple[str, str], dict] = {}

    def requests() -> Iterator[Request]:
        for entry, record in samples.read(todo):
            key = (entry.dataset, entry.key)
            try:
                request = prompts.request(key, record)
                rows[key] = row_of(record, len(request.ids))
            except InputError as error:
                raise InputError(f"{entry.file}: line {entry.line}: {error}") from error
            yield request

    for key, answer in engine.answer(requests()):
        row = rows.pop(key)
        if engine.writes:
            files[key[0]].add(key[1], {"pred": answer, **row})
        progress.step(key[0])
    progress.end()
    return {name: len(file) for name, file in files.items()}


def row_of(record: dict, prompt_tokens: int) -> dict:
    """What is kept of a record beside its prediction: eval.py's fields, and what reports and manifests need."""
    begin, end = record.get("context_span", (0, None))
    document = record[CONTEXT] if CONTEXT in record else record["content"][begin:end]
    answers = record.get("answers", [record["summary"]] if "summary" in record else None)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise InputError("field 'answers' is no list of texts")
    length = record.get("length")
    return {
        "answers": answers,
        "all_classes": record.get("all_classes"),
        "length": length if isinstance(length, int) else len(document.split()),
        "dataset": record["dataset"],
        "language": record.get("language"),
        "input": record.get("input", ""),
        "document": document_key(document).hex(),
        "answer_depth": answer_depth(document, answers),
        "prompt_tokens": prompt_tokens,
    }


def answer_depth(document: str, answers: list[str]) -> float | None:
    """Relative position, 0 to 1, of the first verbatim answer in the document; None where there is none."""
    # "Paragraph 1" must not match "Paragraph 12"; one or two characters match everywhere
    places = [re.search(re.escape(answer) + r"(?!\d)", document) for answer in answers if len(answer) > 2]
    found = [place.start() for place in places if place]
    return round(min(found) / len(document), 4) if found else None
