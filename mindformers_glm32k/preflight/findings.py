"""What a check found: severity, key, reason and fix, and the edit of the YAML that mends it where that is certain."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mindformers_glm32k.errors import InputError

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)
EMPTY = (None, "")
SET, REMOVE, MOVE = "set", "remove", "move"


@dataclass(frozen=True)
class Finding:
    """One finding.

    Args:
        severity: "error" (the run cannot start, or would not do what is written), "warning" or "note".
        key: dotted key of the configuration; items of lists by their number.
        message: what was found.
        fix: what to do.
        edit: ("set", value), ("remove",) or ("move", dotted key): what mends it for certain, else None.
    """

    severity: str
    key: str
    message: str
    fix: str = ""
    edit: tuple | None = None

    def line(self) -> str:
        sign = ", " if self.fix.startswith("did you mean") else "; "
        return f"{self.key}: {self.message}" + (sign + self.fix if self.fix else "")

    def as_json(self) -> dict[str, str]:
        return {"severity": self.severity, "key": self.key, "message": self.message, "fix": self.fix}


def raise_errors(findings: Iterable[Finding], where: str = "configuration") -> None:
    """Raises one InputError that names every error among the findings."""
    lines = [finding.line() for finding in findings if finding.severity == ERROR]
    if lines:
        raise InputError(f"{where}: " + "; ".join(lines))


def value_at(config: Any, dotted: str) -> Any:
    """The value of a dotted key; None where a section on the way is missing."""
    for key in dotted.split("."):
        if isinstance(config, list) and key.isdecimal() and int(key) < len(config):
            config = config[int(key)]
        else:
            config = config.get(key) if isinstance(config, Mapping) else None
    return config


def apply_edits(config: dict, findings: Iterable[Finding]) -> tuple[dict, list[str]]:
    """A copy of the configuration with all edits made, and a line for each. Items of lists go last: indices hold."""
    config, done, items = copy.deepcopy(config), [], []
    for finding in findings:
        if finding.edit is None:
            continue
        kind, *rest = finding.edit
        parent_key, _, leaf = finding.key.rpartition(".")
        parent = value_at(config, parent_key) if parent_key else config
        if kind == SET:
            set_value(config, finding.key, rest[0])
            done.append(f"{finding.key}: set to {rest[0]!r} ({finding.message})")
        elif isinstance(parent, list):
            items.append((parent, int(leaf), finding))
        elif isinstance(parent, dict) and leaf in parent:
            if kind == MOVE and value_at(config, rest[0]) not in EMPTY:
                continue  # which of the two is meant is not certain
            value = parent.pop(leaf)
            if kind == MOVE:
                set_value(config, rest[0], value)
            what = f"moved to {rest[0]}" if kind == MOVE else "removed"
            done.append(f"{finding.key}: {what} ({finding.message})")
    for parent, index, finding in sorted(items, key=lambda item: -item[1]):
        del parent[index]
        done.append(f"{finding.key}: removed ({finding.message})")
    return config, done


def set_value(config: Any, dotted: str, value: Any) -> None:
    """Sets a dotted key; creates sections that are missing, also in place of values that are no sections."""
    *sections, leaf = dotted.split(".")
    for section in sections:
        if isinstance(config, list):
            config = config[int(section)]
            continue
        if not isinstance(config.get(section), (Mapping, list)):
            config[section] = {}
        config = config[section]
    config[leaf] = value
