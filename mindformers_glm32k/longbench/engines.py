"""Engines that answer prompts, behind one interface: this plugin's generator, and an OpenAI-compatible server with
concurrent requests and retries."""

from __future__ import annotations

import http.client
import json
import os
import queue
import random
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from mindformers_glm32k.errors import CommandFailed, InputError
from mindformers_glm32k.generation.network import Network
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        key: (data set, sample), which comes back with the answer.
        ids: the prompt as pred.py feeds it.
        text: the same, before the chat format; for servers that take no ids.
        chat: whether the chat format is put around the text.
        max_new_tokens: the longest answer.
        min_new_tokens: the shortest answer; stop ids have no effect before it.
        stop_ids: what ends an answer.
    """

    key: tuple[str, str]
    ids: list[int]
    text: str
    chat: bool
    max_new_tokens: int
    min_new_tokens: int
    stop_ids: tuple[int, ...]


class Engine(Protocol):
    """The interface that `predict` needs.

    Attributes:
        identity: what determines the answers, for the stamp: `engine`, `model` and the engine's options.
        differs: in which ways the answers may differ from pred.py's.
        room: tokens of prompt and answer together; None where it is not known.
        writes: whether this process writes the answers (of several that compute together, one does).
    """

    identity: dict
    differs: list[str]
    room: int | None
    writes: bool

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[tuple[str, str], str]]:
        """Yields (key, answer) of each request, in the order of completion."""


class LocalEngine:
    """The model of a YAML, through MindFormers' generator.

    Args:
        config_arguments: as for run_mindformer: --config YAML and overrides.
        checkpoint: file or folder; None: random weights.
        tokenizer_file: tokenizer.model.
        vocabulary: of that file.
        batch_size: prompts that are answered together; None: the YAML's batch_size.

    Raises:
        InputError: as run_mindformer.
    """

    differs: list[str] = []

    def __init__(
        self,
        config_arguments: list[str],
        checkpoint: str | None,
        tokenizer_file: str,
        vocabulary: Vocabulary,
        batch_size: int | None = None,
    ):
        from mindformers_glm32k.run_mindformer import read_prediction_config

        config = read_prediction_config(config_arguments, checkpoint, tokenizer_file)
        self._network = Network(config, batch_size)
        self._vocabulary = vocabulary
        self.room, self.identity, self.writes = self._network.room, self._network.identity, self._network.writes
        self.generate = self._network.generate

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[tuple[str, str], str]]:
        """Yields (key, answer), batch by batch in the order of the requests."""
        batch: list[Request] = []
        for request in requests:
            if batch and (not _alike(batch[0], request) or len(batch) == self._network.batch_size):
                yield from self._answer_batch(batch)
                batch = []
            batch.append(request)
        if batch:
            yield from self._answer_batch(batch)

    def _answer_batch(self, batch):
        ids = self.generate(
            [request.ids for request in batch], batch[0].max_new_tokens, batch[0].stop_ids, batch[0].min_new_tokens
        )
        for request, answer in zip(batch, ids):
            yield request.key, self._vocabulary.decode(answer, skip_special_tokens=True)


def _alike(one, other):
    same = ("max_new_tokens", "min_new_tokens", "stop_ids")
    # upstream counts a minimum length from the longest prompt of a batch, so such requests are not batched
    return not one.min_new_tokens and all(getattr(one, name) == getattr(other, name) for name in same)


_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP statuses that are worth a retry
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0  # seconds; each pause is twice the one before
_MESSAGE = 300  # characters shown of a server's answer


class EndpointEngine:
    """Asks `BASE_URL/completions`.

    Args:
        base_url: such as http://localhost:8000/v1.
        model: the served name; None: the first that the server lists.
        send: "ids": the prompt's token ids. "text": the text, which the server tokenizes; chats go to
            /chat/completions, where the server's template is put around them.
        standard: leave out what OpenAI's interface does not have: stop ids and minimum lengths (as vLLM has).
        concurrency: requests at a time.
        timeout: seconds without an answer after which a request is given up.
        retries: attempts after the first.
        vocabulary: decodes the answer's ids as pred.py does, where the server returns them (vLLM does). The server's
            text has an extra leading space and another number of replacement characters (U+FFFD).

    Raises:
        InputError: no such server or model.
    """

    room = None
    writes = True

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        send: str = "ids",
        standard: bool = False,
        concurrency: int = 16,
        timeout: float = 600.0,
        retries: int = 8,
        vocabulary: Vocabulary | None = None,
    ):
        if urllib.parse.urlsplit(base_url).scheme not in ("http", "https"):
            raise InputError(f"--base_url {base_url}: a URL such as http://localhost:8000/v1 is needed")
        self._url, self._send, self._standard = base_url.rstrip("/"), send, standard
        self._concurrency, self._timeout, self._retries = concurrency, timeout, retries
        self._vocabulary = vocabulary if send == "ids" else None
        self._stopped = threading.Event()
        self._said = 0.0
        self._model = model or self._first_model()
        self.identity = {"engine": "endpoint", "model": self._model, "send": send, "standard": standard}
        self.differs = ["the server stops at its own end tokens, too"]
        if send == "text":
            self.differs.append("the server's tokenizer and chat template make the ids out of the truncated text")
        if standard:
            self.differs.append("no stop ids and no least length; samsum stops at a line break in the text")

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[tuple[str, str], str]]:
        """Yields (key, answer) as answers arrive; at most 2 * concurrency requests are prepared at a time.

        Raises:
            InputError: the server refuses a request.
            CommandFailed: no attempt got an answer.
        """
        self._stopped.clear()
        todo: queue.SimpleQueue = queue.SimpleQueue()
        done: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(self._concurrency):  # daemons: an interrupted program does not wait for answers
            threading.Thread(target=self._work, args=(todo, done), daemon=True).start()
        waiting, error = 0, None
        try:
            for request in requests:
                todo.put(request)
                waiting += 1
                while error is None and (waiting >= 2 * self._concurrency or not done.empty()):
                    answer, error = done.get()
                    waiting -= 1
                    if error is None:
                        yield answer
                if error is not None:
                    break
            while waiting and (error is None or not done.empty()):  # after an error: only what is there
                answer, failed = done.get()
                waiting -= 1
                if failed is None:
                    yield answer
                error = error or failed
        finally:
            self._stopped.set()
            for _ in range(self._concurrency):
                todo.put(None)
        if error is not None:
            raise error

    def _work(self, todo, done):
        while (request := todo.get()) is not None and not self._stopped.is_set():
            try:
                done.put((self._ask(request), None))
            except Exception as error:
                self._stopped.set()
                done.put((None, error))

    def _ask(self, request):
        body = {"model": self._model, "max_tokens": request.max_new_tokens, "temperature": 0.0}
        if not self._standard:
            body |= {"stop_token_ids": list(request.stop_ids), "skip_special_tokens": True, "return_token_ids": True}
            if request.min_new_tokens:
                body["min_tokens"] = request.min_new_tokens
        elif request.min_new_tokens:
            body["stop"] = ["\n"]  # samsum, which alone has a minimum length and stops at line breaks
        if self._send == "text" and request.chat:
            path, body["messages"] = "/chat/completions", [{"role": "user", "content": request.text}]
        else:
            path, body["prompt"] = "/completions", request.text if self._send == "text" else request.ids
        reply = self._call(path, body)
        try:
            choice = reply["choices"][0]
            ids = choice.get("token_ids")
            text = choice["message"]["content"] if "message" in choice else choice["text"]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise CommandFailed(f"{self._url}{path}: no completion in the answer {reply!r:.{_MESSAGE}}") from error
        if ids and self._vocabulary is not None and not self._standard:
            text = self._vocabulary.decode(ids, skip_special_tokens=True)
        return request.key, text or ""

    def _first_model(self):
        reply = self._call("/models", None)
        try:
            return reply["data"][0]["id"]
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"{self._url}/models: lists no model; give --model NAME") from error

    def _call(self, path, body):
        for attempt in range(self._retries + 1):
            try:
                return self._call_once(path, body)
            except InputError:
                raise
            except urllib.error.HTTPError as error:
                problem, pause = self._http_problem(path, error)
            except (OSError, http.client.HTTPException, ValueError) as error:  # time-outs are OSErrors
                problem, pause = f"{type(error).__name__}: {error}", None
            if attempt == self._retries:
                break
            # jitter: half to all of the pause, so that retries do not come all at once
            longest = min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE)
            self._say(f"{self._url}{path}: {problem}; trying again")
            if self._stopped.wait(longest * random.uniform(0.5, 1.0) if pause is None else pause):
                break
        raise CommandFailed(
            f"{self._url}{path}: {problem}, after {attempt + 1} attempts; the same command goes on later"
        )

    def _call_once(self, path, body):
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        with urllib.request.urlopen(request, timeout=self._timeout) as reply:
            return json.loads(reply.read())

    def _http_problem(self, path, error):
        """(message, seconds of pause that the server asks for, or None); InputError where no retry will help."""
        text = error.read().decode("utf-8", errors="replace")[:_MESSAGE]
        problem = f"HTTP {error.code}: {' '.join(text.split())}"
        if error.code in _TRANSIENT:
            asked = error.headers.get("Retry-After", "")
            return problem, min(float(asked), _LONGEST_PAUSE) if asked.replace(".", "", 1).isdigit() else None
        hints = {
            401: "set OPENAI_API_KEY",
            403: "set OPENAI_API_KEY",
            404: "is this the URL of the interface, with /v1, and --model the name that it serves?",
        }
        hint = hints.get(error.code, "")
        if error.code in (400, 422):
            hint = "a server that takes no token ids needs --send text, one without vLLM's options --standard"
            if "context length" in text or "max_model_len" in text:
                hint = "the prompt is too long for the server: raise its longest length, or lower --max_length"
        raise InputError(f"{self._url}{path}: {problem}{f' ({hint})' if hint else ''}") from error

    def _say(self, text):
        if time.monotonic() - self._said > 5:
            self._said = time.monotonic()
            print(text, file=sys.stderr)
