"""Which line of source made an operation: from the validated program as text, joined to the program by scope."""

from __future__ import annotations

import re
from pathlib import Path

from mindformers_glm32k.dryrun.analysis.mindir import Node, Program

_SCOPE = re.compile(r"# Fullname with scope: \((.*)\)\s*$")
# "# In file /a/b.py:12, 4~8/    x = y/" or ":12~14, 4~8/..."
_LINE = re.compile(r"# In file (\S+?):(\d+)(?:~\d+)?, \d+~\d+/(.*)/\s*$")
_OURS = ("mindformers_glm32k/", "mindformers/")


class SourceLines:
    """Looks up scopes in a program's text.

    Args:
        folder: holds the text that the frontend wrote, in any sub-folder; none is fine too.
        program: the program whose nodes are looked up.
    """

    def __init__(self, folder: Path, program: Program | None = None):
        self.lines = {}
        for path in sorted(Path(folder).rglob("*validate*.ir")):
            self._read(path)
        self.by_cell = {}
        for scope, lines in self.lines.items():
            if lines:
                self.by_cell.setdefault(_operation(scope), lines)
        if program is not None:
            self._renumber(program)

    def _renumber(self, program):
        """Operations of a kind in a cell are numbered on from text to program: the n-th there is the n-th here."""

        def by_kind(scopes):
            kinds = {}
            for scope in set(scopes):
                kind, _, number = scope.rpartition("-op")
                if kind and number.isdigit():
                    kinds.setdefault(kind, []).append(int(number))
            return {kind: sorted(numbers) for kind, numbers in kinds.items()}

        there = by_kind(node.scope for graph in (program.main, *program.graphs.values()) for node in graph.nodes)
        renumbered = {}
        for kind, numbers in by_kind(self.lines).items():
            if len(there.get(kind, ())) == len(numbers):
                for old, new in zip(numbers, there[kind]):
                    renumbered[f"{kind}-op{new}"] = self.lines[f"{kind}-op{old}"]
        self.lines = renumbered

    def _read(self, path):
        scope = None
        with open(path, encoding="utf-8", errors="replace") as text:
            for line in text:
                if "# " not in line:
                    scope = None if not line.lstrip().startswith(":") else scope
                    continue
                found = _SCOPE.search(line)
                if found:
                    scope = found.group(1)
                    self.lines.setdefault(scope, [])
                elif scope is not None:
                    found = _LINE.search(line)
                    if found:
                        path, line, code = found.groups()
                        self.lines[scope].append((path, line, code.split("/<~~", 1)[0]))  # a remark of the frontend's

    def of(self, node: Node) -> str:
        """Where a node comes from: "package/file.py:LINE text" of the innermost line in MindFormers or this package,
        else in MindSpore, else the node's scope."""
        lines = self.lines.get(node.scope) or self.by_cell.get(_operation(node.scope), ())
        calls = [(_short(path), line, text) for path, line, text in lines]
        ours = [call for call in calls if call[0].startswith(_OURS)]
        if not calls:
            return node.scope or node.op
        path, line, text = (ours or calls)[-1]
        return f"{path}:{line} {text.strip()}"


def _operation(scope):
    """(cell, operator) of the forward that an operation, its copy for recomputation or its gradient comes from."""
    cell, _, name = scope.rpartition("/")
    cell = cell[len("Gradients/") :] if cell.startswith("Gradients/") else cell
    cell = cell[len("recompute_") :] if cell.startswith("recompute_") else cell
    parent, _, last = cell.rpartition("/")
    if last.startswith("Grad_"):
        return parent, last[len("Grad_") :]
    return cell, re.sub(r"-op\d+$", "", name)


def _short(path):
    """The path from the package's name on."""
    for name in ("mindformers_glm32k/", "mindformers/", "mindspore/"):
        at = path.rfind("/" + name)
        if at >= 0:
            return path[at + 1 :]
    return path
