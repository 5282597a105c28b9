"""The chat at a terminal: commands, the answer as it comes, Ctrl-C."""

from __future__ import annotations

import contextlib
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.generation.answers import Options
from mindformers_glm32k.generation.conversation import Conversation, read_document, title
from mindformers_glm32k.generation.streaming import AnswerStreamer, Stopped
from mindformers_glm32k.tokenizer.chat_format import stop_ids
from mindformers_glm32k.tokenizer.response import ToolCall, read_response
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

HELP = """\
/file PATH     put a text file before your next message
/system TEXT   the system prompt; /system alone shows it, /system off removes it
/tools FILE    tools as a JSON list; /tools off removes them
/context       tokens used, and what is in the context
/undo          take the last question and its answer back
/clear         begin anew; system prompt and tools stay
/save FILE     write the conversation as a JSON line
/help          this
/quit          leave; so does Ctrl-D. Ctrl-C stops an answer"""
COMMANDS = tuple(line.split()[0] for line in HELP.splitlines())
_TAKEN_BACK = "(stopped; the question is taken back)"
_WARN_FROM = 0.85  # of the context


class Chat:
    """A conversation with a model at a terminal.

    Args:
        network: the model that answers; see `Network`.
        vocabulary: of the model.
        options: of the answers.
        read: called with a prompt, returns a line; EOFError at the end, KeyboardInterrupt at Ctrl-C.
        out: where text goes.
        quiet: makes a context that keeps the libraries' output off the terminal and yields a stream to it.
    """

    def __init__(
        self,
        network: Any,
        vocabulary: Vocabulary,
        options: Options,
        read: Callable[[str], str],
        out: TextIO,
        quiet: Callable[[], contextlib.AbstractContextManager],
    ):
        self._network, self._vocabulary, self._options = network, vocabulary, options
        self._read, self._out, self._quiet = read, out, quiet
        self.conversation = Conversation(
            vocabulary, network.room, options.max_new_tokens, on_long_prompt=options.on_long_prompt
        )
        self._dropped = 0
        self._turn = 0

    def run(self) -> None:
        """Reads and answers until the user leaves."""
        while True:
            try:
                line = self._read("you> ")
            except EOFError:
                self._say("")
                return
            except KeyboardInterrupt:
                self._say("(/quit or Ctrl-D leaves)")
                continue
            text = line.strip()
            try:
                if text in ("/quit", "/exit"):
                    return
                if text.startswith("/") and text.split()[0] in COMMANDS:
                    self._command(*_split(text))
                elif text.startswith("/") and text.split()[0].count("/") == 1:
                    self._say(f"no command {text.split()[0]}; /help lists them")
                elif text:
                    self.conversation.ask(line)
                    self._answer()
            except (InputError, OSError) as error:
                self._say(f"error: {error}")
            except KeyboardInterrupt:  # before an answer begins, or between it and the next prompt
                taken_back = self.conversation.undo() if self.conversation.waits() else None
                self._say("(/quit or Ctrl-D leaves)" if taken_back is None else _TAKEN_BACK)

    def _say(self, text):
        print(text, file=self._out, flush=True)

    def _command(self, name, rest):
        conversation = self.conversation
        if name == "/help":
            self._say(HELP)
        elif name == "/file":
            self._file(rest)
        elif name == "/system":
            if rest:
                conversation.system = "" if rest == "off" else rest
            self._say(f"system prompt: {conversation.system or 'none'}")
        elif name == "/tools":
            self._tools(rest)
        elif name == "/context":
            self._context()
        elif name == "/undo":
            question = conversation.undo()
            self._say("nothing to take back" if question is None else f"taken back: {question[:60]}")
        elif name == "/clear":
            conversation.clear()
            self._say("a new conversation")
        elif name == "/save":
            if not rest:
                raise InputError("/save FILE: name the file")
            conversation.save(_path(rest))
            self._say(f"saved: {_path(rest)}")

    def _file(self, rest):
        if not rest:
            raise InputError("/file PATH: name a text file")
        path = Path(_path(rest))
        text = read_document(path)
        count = len(self._vocabulary.encode(text))
        self.conversation.documents.append((path.name, text))
        used = self.conversation.used()
        self._say(f"{path.name}: {count:,} tokens, goes before your next message (/clear drops it)")
        if used > self.conversation.most:
            alone = self.conversation.room - self.conversation.most
            self._say(
                f"warning: with it the context has {used:,} of {self.conversation.room:,} tokens, of which {alone:,} "
                "are kept for the answer; the oldest exchanges will be dropped"
            )

    def _tools(self, rest):
        if rest == "off":
            self.conversation.tools = None
        elif rest:
            path = Path(_path(rest))
            try:
                self.conversation.set_tools(read_document(path))
            except InputError as error:
                raise InputError(f"/tools {path}: {str(error).replace(f'{path}: ', '')}") from error
        names = [tool.get("function", tool)["name"] for tool in self.conversation.tools or ()]
        self._say(f"tools: {', '.join(names) or 'none'}")

    def _context(self):
        conversation = self.conversation
        fed, system = conversation.fed(), conversation.system_messages()
        self._say(
            f"{conversation.used():,} of {conversation.room:,} tokens used, "
            f"{conversation.room - conversation.most:,} are kept for an answer"
        )
        if system:
            self._say(f"  system prompt: {conversation.tokens(system):,}")
        for exchange in conversation.exchanges:
            gone = "" if any(exchange is one for one in fed) else " (dropped)"
            self._say(f"  {title(exchange)}: {conversation.tokens(exchange):,}{gone}")
        for name, text in conversation.documents:
            self._say(f"  {name}, for the next message: {len(self._vocabulary.encode(text)):,}")

    def _answer(self):
        """Answers the last question, and the observations of the tools that the answer calls."""
        while True:
            try:
                prompt = self.conversation.prompt()
            except InputError:
                self.conversation.undo()
                raise
            self._name_dropped()
            call = self._stream(prompt)
            self._warn()
            if call is None or not self._observed(call):
                return

    def _name_dropped(self):
        """Says what the context no longer holds, once for each exchange."""
        gone = self.conversation.exchanges[: len(self.conversation.exchanges) - len(self.conversation.fed())]
        for exchange in gone[self._dropped :]:
            self._say(
                f"the context is full, dropped: {title(exchange)} ({self.conversation.tokens(exchange):,} tokens)"
            )
        self._dropped = len(gone)

    def _warn(self):
        if not self.conversation.exchanges:
            return
        conversation = self.conversation
        used = conversation.used()
        # nearly full, or too full for another exchange like the last
        if used > min(
            _WARN_FROM * conversation.most, conversation.most - conversation.tokens(conversation.exchanges[-1])
        ):
            fed = conversation.fed()
            what = f"the next to be dropped is: {title(fed[0])} ({conversation.tokens(fed[0]):,} tokens)"
            self._say(f"warning: {used:,} of {conversation.room:,} tokens used; {what}")

    def _stream(self, prompt) -> ToolCall | None:
        self._turn += 1
        with self._quiet() as out, _interruptible(out) as interrupted:
            begun = time.monotonic()
            moments: list[float] = []

            def show(text: str) -> None:
                print(text, end="", file=out, flush=True)

            def stop() -> bool:
                moments.append(time.monotonic())
                return bool(interrupted)

            streamer = AnswerStreamer(self._vocabulary, show, stop)
            with contextlib.suppress(Stopped, KeyboardInterrupt):
                self._network.generate(
                    [prompt],
                    self._options.max_new_tokens,
                    stop_ids(self._vocabulary),
                    sampling=self._options.sampling,
                    seeds=[self._options.sampling.seed_of(f"turn {self._turn}")],
                    streamer=streamer,
                )
            streamer.end()
            if streamer.shown:
                print(file=out, flush=True)
        response = read_response(self._vocabulary, streamer.ids)
        if interrupted and not streamer.ids:
            self.conversation.undo()
            self._say(_TAKEN_BACK)
            return None
        self.conversation.answered(response)
        self._say(self._figures(len(prompt), begun, moments, response.ended, bool(interrupted)))
        return None if interrupted else response.tool_call

    def _figures(self, prompt_tokens, begun, moments, ended, interrupted):
        """An answer's tokens, speed and context use, as one line."""
        first = moments[0] - begun
        speed = f"{(len(moments) - 1) / (moments[-1] - moments[0]):.1f} tokens/s, " if len(moments) > 1 else ""
        end = "stopped, " if interrupted else "" if ended else "cut off at --max_new_tokens, "
        used = self.conversation.used()
        return (
            f"[{end}{len(moments)} tokens, {speed}first after {first:.1f} s for {prompt_tokens:,} tokens, "
            f"context {used:,} of {self.conversation.room:,}]"
        )

    def _observed(self, call):
        """Shows a tool call and asks the user for the tool's result; returns whether one was given."""
        if call.arguments is None:
            self._say(f"tool call: {call.name}\n{call.content}")
        else:
            arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
            self._say(f"tool call: {call.name}({arguments})")
        try:
            text = self._read("observation (empty: none)> ")
        except (EOFError, KeyboardInterrupt):
            text = ""
        if text.strip():
            self.conversation.observe(text)
        return bool(text.strip())


@contextlib.contextmanager
def _interruptible(out: TextIO) -> Iterator[list[bool]]:
    """The first Ctrl-C fills the list, so that generation stops after a token; the second raises KeyboardInterrupt."""
    interrupted: list[bool] = []

    def handle(_number: int, _frame: Any) -> None:
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(True)
        print(" (stopping)", file=out, flush=True)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _split(text):
    name, _, rest = text.partition(" ")
    return name, rest.strip()


def _path(text):
    """A path as one types it at a shell, with quotes or backslashes where it has spaces."""
    if Path(text).expanduser().exists():
        return text
    with contextlib.suppress(ValueError):
        words = shlex.split(text)
        if len(words) == 1:
            return words[0]
    return text
