"""A file of questions to a file of answers: in batches of similar length, resumed, shared among processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path
from mindformers_glm32k.generation.journal import Journal, Progress, first_difference
from mindformers_glm32k.generation.questions import ERROR, QuestionFile, fitted_ids, key_of, measured
from mindformers_glm32k.generation.sampling import Sampling
from mindformers_glm32k.tokenizer.chat_format import stop_ids
from mindformers_glm32k.tokenizer.response import Response, read_response
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

PROTOCOL = "glm32k generate, 1"
_TOKEN_COST = 32  # cost of a generated token in prompt tokens, for the estimate of the time left


class Answers(Protocol):
    """The interface of a model that answers; see `Network`."""

    room: int
    batch_size: int
    identity: dict
    writes: bool

    def generate(self, prompts: list[list[int]], max_new_tokens: int, stop_ids: Sequence[int], **more: Any) -> list:
        """Ids of the answers."""


@dataclass(frozen=True)
class Options:
    """What determines the answers, beside model and questions.

    Attributes:
        max_new_tokens: the longest answer, in tokens.
        sampling: how tokens are chosen.
        on_long_prompt: "error", or "truncate": the middle is left out.
    """

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    on_long_prompt: str = ERROR


def room_for_prompts(room: int, max_new_tokens: int) -> int:
    """Tokens that a prompt may have; InputError where an answer leaves none."""
    if max_new_tokens >= room:
        raise InputError(f"--max_new_tokens {max_new_tokens}: seq_length {room} has no room for a prompt beside it")
    return room - max_new_tokens


def stamp_of(network: Answers, tokenizer: Path, questions: QuestionFile, options: Options) -> dict:
    """What determines the answers of a file, kept beside it; a run with another stamp is refused."""
    return {
        "protocol": PROTOCOL,
        **network.identity,
        "tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest()[:16],
        "input": questions.digest,
        "max_new_tokens": options.max_new_tokens,
        "on_long_prompt": options.on_long_prompt,
        **({"seq_length": network.room} if options.on_long_prompt != ERROR else {}),
        **options.sampling.stamp(),
    }


class AnswerFile(Journal):
    """A file of answers, with its stamp in `NAME.options.json` beside it.

    Args:
        path: the file; created if missing.
        stamp: see `stamp_of`.

    Raises:
        InputError: a damaged line, or answers with another stamp.
    """

    def __init__(self, path: Path, stamp: dict):
        super().__init__(path, key_of)
        beside = path.with_name(path.name + ".options.json")
        with self._locked():
            found = None
            if beside.is_file():
                try:
                    found = json.loads(beside.read_text(encoding="utf-8"))
                except ValueError as error:
                    raise InputError(f"{beside}: not JSON ({error}); remove it and the answers") from error
            if len(self) and found != stamp:
                raise InputError(
                    f"{path}: has answers that were made otherwise ({first_difference(found, stamp)}); give another "
                    "--output, or remove the file"
                )
            if found != stamp:
                with atomic_path(beside) as temporary:
                    temporary.write_text(json.dumps(stamp, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def answer_file(
    questions: QuestionFile,
    network: Answers,
    vocabulary: Vocabulary,
    options: Options,
    output: Path,
    stamp: dict,
    shard: tuple[int, int] = (0, 1),
    stream: TextIO | None = None,
) -> tuple[int, list[str]]:
    """Answers the questions without an answer and appends a line for each; once all are answered, sorts the lines.

    Prompts of similar length form a batch, the longest first. Batches are the same however often a run is interrupted.

    Args:
        questions: all of them.
        network: the model that answers.
        vocabulary: of the model.
        options: see `Options`.
        output: the file.
        stamp: see `AnswerFile`.
        shard: index and count of the processes that share the work.
        stream: for the progress.

    Returns:
        The number of answers in the file, by all processes; the locations of truncated prompts.

    Raises:
        InputError: prompts that do not fit, or answers with another stamp; before anything is computed.
    """
    room = room_for_prompts(network.room, options.max_new_tokens)
    file = AnswerFile(output, stamp)
    lengths = measured(questions, vocabulary, room, options.on_long_prompt)
    truncated = [questions.location(index) for index, length in enumerate(lengths) if length > room]
    order = sorted(range(len(questions)), key=lambda index: (-lengths[index], index))[shard[0] :: shard[1]]
    size = network.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    costs = {index: min(lengths[index], room) + _TOKEN_COST * options.max_new_tokens for index in order}
    todo = [index for index in order if questions.keys[index] not in file]
    progress = Progress(
        len(order) - len(todo), len(order), "prompts", work=sum(costs[index] for index in todo), stream=stream
    )
    for batch in batches:
        missing = [index for index in batch if questions.keys[index] not in file]
        if not missing:
            continue
        for index, row in _answered(batch, questions, network, vocabulary, options, lengths, room):
            if index in missing:
                if network.writes:
                    file.add(questions.keys[index], row)
                progress.step(work=costs[index])
    if todo:
        progress.end()
    if network.writes:
        file.put_in_order(questions.keys)
    return len(file), truncated


def _answered(batch, questions, network, vocabulary, options, lengths, room) -> Iterator[tuple[int, dict]]:
    prompts = [fitted_ids(vocabulary, questions[index], room) for index in batch]
    answers = network.generate(
        prompts,
        options.max_new_tokens,
        stop_ids(vocabulary),
        sampling=options.sampling,
        seeds=[options.sampling.seed_of(questions.keys[index]) for index in batch],
    )
    for index, prompt, ids in zip(batch, prompts, answers):
        row = {**questions.names(index), **answer_row(read_response(vocabulary, ids))}
        row.update(prompt_tokens=len(prompt), answer_tokens=len(ids))
        if lengths[index] > room:
            row["truncated_from"] = lengths[index]
        yield index, row


def answer_row(response: Response) -> dict:
    """An answer's fields in its line: content, finish_reason, and where there are any metadata, tool_call, messages."""
    row: dict[str, Any] = {"content": response.content}
    call = response.tool_call
    if call is not None:
        row["metadata"] = call.name
        row["tool_call"] = {"name": call.name, "arguments": call.arguments}
    if len(response.messages) > 1:
        row["messages"] = list(response.messages)
    row["finish_reason"] = "stop" if response.ended else "length"
    return row
