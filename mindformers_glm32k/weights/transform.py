"""MindSpore's own transform_checkpoints, in a process of its own: what upstream's transform_ckpt calls.

`python -m mindformers.tools.transform_ckpt` holds the parts of all ranks in memory, several times over. Here the same
function is given a few tensors at a time (see pieces.py), by a process that stays and takes one order a line.
"""

import json
import os
import subprocess
import sys

from mindformers_glm32k.errors import CommandFailed

_REPLY = "transformed: "


class TransformFailed(CommandFailed):
    """MindSpore could not cut or join. The message holds what it said."""


class Transformer:
    """The process; it starts with the first order.

    Args:
        log (pathlib.Path): file for what MindSpore prints.
    """

    def __init__(self, log):
        self._log = log
        self._process = None

    def __enter__(self):
        return self

    def _start(self):
        with open(self._log, "wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mindformers_glm32k.weights.transform"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, "GLOG_v": "3"},
            )

    def __exit__(self, kind, error, trace):
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def run(self, source, target, cut_by=None, joined_from=None):
        """Cuts whole tensors for the ranks of a stage, or joins the ranks' parts.

        Args:
            source (pathlib.Path): folder with rank_0/*.ckpt, or rank_N/*.ckpt of all ranks.
            target (pathlib.Path): folder to write rank_N/checkpoint_N.ckpt to.
            cut_by, joined_from (pathlib.Path | None): the stage's strategy file, one of the two.

        Raises:
            TransformFailed: MindSpore raised an error or died.
        """
        if self._process is None:
            self._start()
        order = [str(source), str(target), "checkpoint_", joined_from and str(joined_from), cut_by and str(cut_by)]
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            reply = ""
            for line in self._process.stdout:
                if line.startswith(_REPLY):
                    reply = line[len(_REPLY) :].strip()
                    break
        except BrokenPipeError:
            reply = ""
        if reply != "done":
            self._process.kill()
            end = self._log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
            raise TransformFailed(
                f"MindSpore's transform_checkpoints failed: {reply or 'the process ended'}"
                + (f"\n{end}" if end else "")
            )


def main():
    """Reads orders from standard input until it is closed."""
    import mindspore

    for line in sys.stdin:
        try:
            mindspore.transform_checkpoints(*json.loads(line))
            reply = "done"
        except Exception as error:  # whatever it is goes to the command that gave the order
            reply = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(_REPLY + reply, flush=True)


if __name__ == "__main__":
    main()
