"""Which line of source made an operation: from the validated program as text, joined to the program by scope."""
import re
from pathlib import Path

_SCOPE = re.compile(r"# Fullname with scope: \((.*)\)\s*$")
# "# In file /a/b.py:12, 4~8/    x = y/" or ":12~14, 4~8/..."
_LINE = re.compile(r"# In file (\S+?):(\d+)(?:~\d+)?, \d+~\d+/(.*)/\s*$")
_OURS = ("mindformers_glm32k/", "mindformers/")


class SourceLines:
    """Looks up scopes in a program's text.

    Args:
        folder (pathlib.Path): holds the text that the frontend wrote, in any sub-folder; none is fine too.
    """

    def __init__(self, folder):
        self.lines = {}
        for path in sorted(Path(folder).rglob("*validate*.ir")):
            self._read(path)

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
                        self.lines[scope].append(found.groups())

    def of(self, node):
        """The innermost line in MindFormers or this package, else in MindSpore, else the scope.

        Args:
            node (Node): an operation.

        Returns:
            str: "package/file.py:LINE text", or the node's scope where no line is known.
        """
        calls = [(_short(path), line, text) for path, line, text in self.lines.get(node.scope, ())]
        ours = [call for call in calls if call[0].startswith(_OURS)]
        if not calls:
            return node.scope or node.op
        path, line, text = (ours or calls)[-1]
        return f"{path}:{line} {text.strip()}"


def _short(path):
    """The path from the package's name on."""
    for name in ("mindformers_glm32k/", "mindformers/", "mindspore/"):
        at = path.rfind("/" + name)
        if at >= 0:
            return path[at + 1:]
    return path
