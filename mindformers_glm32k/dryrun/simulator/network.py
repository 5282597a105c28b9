"""Runs all ranks of a layout, a thread each, and the network between them: collectives, sends and receives.

Raises what would hang on a cluster: collectives that do not match within a group, and deadlocks.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mindformers_glm32k.dryrun.analysis.mindir import Spec


class NetworkError(RuntimeError):
    """Ranks disagree on a collective, or wait for each other. The message names group, ranks, operators, locations."""


class PeerFailed(RuntimeError):
    """Another rank failed; its own error tells why."""


class Network:
    """Messages between `world_size` ranks, one thread each.

    All methods that wait raise NetworkError on a deadlock and PeerFailed when another rank failed.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.changed = threading.Condition()
        self.collectives = {}  # (group, index of the collective) -> {rank: (signature, array)}
        self.counts = defaultdict(int)  # (group, rank) -> collectives so far
        self.boxes = defaultdict(deque)  # (source, destination, tag) -> arrays
        self.waiting = {}  # rank -> (condition, what it waits for)
        self.ended = set()
        self.failure = None

    def collective(
        self, rank: int, kind: str, group: str, ranks: Sequence[int], array: np.ndarray, details: Any = ""
    ) -> list[np.ndarray]:
        """Contributes an array to a collective and waits for the other ranks of the group.

        Args:
            kind: "AllReduce", ….
            ranks: the members of `group`.
            details: whatever must be equal on all ranks: dtype, reduction, axes.

        Returns:
            The members' arrays, in the order of `ranks`.

        Raises:
            NetworkError: members differ in kind, shape, dtype or details; `rank` is not a member.
        """
        ranks = tuple(ranks)
        if rank not in ranks:
            raise NetworkError(f"{kind} of rank {rank} in group {group!r}, whose ranks are {list(ranks)}")
        with self.changed:
            index = self.counts[group, rank]
            self.counts[group, rank] += 1
            members = self.collectives.setdefault((group, index), {})
            brought = (kind, array.shape, str(array.dtype), str(details), ranks)
            members[rank] = (brought, array)
            self.changed.notify_all()
            self._check(group, index, members)
            what = f"{kind} number {index + 1} of group {group!r} (ranks {list(ranks)})"
            self._wait(
                rank,
                lambda: len(members) == len(ranks),
                lambda: f"{what}, for ranks {sorted(set(ranks) - set(members))}",
            )
            self._check(group, index, members)  # the last member to arrive may be the one that differs
            result = [members[member][1] for member in ranks]
            if all(self.counts[group, member] > index for member in ranks):
                self.collectives.pop((group, index), None)
            return result

    def send(self, rank: int, destination: int, tag: Any, array: np.ndarray) -> None:
        """Sends an array to another rank without waiting; `tag` tells messages between the two apart."""
        with self.changed:
            self.boxes[rank, destination, tag].append(array)
            self.changed.notify_all()

    def receive(self, rank: int, source: int, tag: Any, spec: Spec | None = None) -> np.ndarray:
        """Waits for an array of another rank; NetworkError where its shape is not that of `spec`."""
        with self.changed:
            box = self.boxes[source, rank, tag]
            self._wait(rank, lambda: box, lambda: f"a message from rank {source} (tag {tag})")
            array = box.popleft()
        if spec is not None and array.shape != tuple(spec.shape):
            raise NetworkError(
                f"rank {rank} receives {array.shape} from rank {source} (tag {tag}), its program "
                f"expects {tuple(spec.shape)}"
            )
        return array

    def end(self, rank: int, error: Exception | None = None) -> None:
        """Records the end of a rank's thread, with the error that ended it, if any."""
        with self.changed:
            self.ended.add(rank)
            if error is not None and self.failure is None:
                self.failure = f"rank {rank}: {error}"
            self._find_deadlock()
            self.changed.notify_all()

    def unread(self) -> list[str]:
        """Messages that nobody received."""
        return [
            f"rank {source} to rank {destination} (tag {tag}): {len(box)}"
            for (source, destination, tag), box in sorted(self.boxes.items(), key=str)
            if box
        ]

    def _wait(self, rank, condition, what):
        self.waiting[rank] = (condition, what)
        self._find_deadlock()
        try:
            while not condition():
                if self.failure is not None:
                    error = NetworkError if self.failure.startswith("deadlock") else PeerFailed
                    raise error(self.failure)
                self.changed.wait()
        finally:
            del self.waiting[rank]

    def _find_deadlock(self):
        """Records a deadlock: every running rank waits, and no rank's condition holds."""
        if (
            self.failure is None
            and self.waiting
            and len(self.waiting) + len(self.ended) == self.world_size
            and not any(condition() for condition, _ in self.waiting.values())
        ):
            waits = [f"rank {rank} waits for {what()}" for rank, (_, what) in sorted(self.waiting.items())]
            over = [f"the program of rank {rank} has ended" for rank in sorted(self.ended)]
            self.failure = "deadlock: " + "; ".join(waits + over)
            self.changed.notify_all()

    @staticmethod
    def _check(group: str, index: int, members: dict) -> None:
        if len({brought for brought, _ in members.values()}) == 1:
            return
        brings = "; ".join(
            f"rank {rank} brings {kind} of {dtype} {list(shape)} {details} in ranks {list(ranks)}"
            for rank, ((kind, shape, dtype, details, ranks), _) in sorted(members.items())
        )
        raise NetworkError(f"the ranks of group {group!r} differ in their collective number {index + 1}: {brings}")


def run_ranks(
    ranks: Sequence[Any],
    network: Network,
    batches: Sequence[Sequence[Any]],
    on_step: Callable[[int, int], None] | None = None,
) -> list[list[Any]]:
    """Runs all steps on all ranks, a thread each, and returns results by step and rank; raises the first failure.

    Args:
        ranks: one object per rank; its `run` takes the inputs of a step.
        batches: inputs by step and rank.
        on_step: gets (rank, step) after each step of each rank.
    """
    results = [[None] * len(ranks) for _ in batches]
    errors = []

    def work(rank):
        error = None
        try:
            for step, inputs in enumerate(batches):
                results[step][rank] = ranks[rank].run(inputs[rank])
                if on_step:
                    on_step(rank, step)
        except Exception as caught:  # whatever it is, the other ranks must not wait for this one
            error = caught
            errors.append(caught)
        network.end(rank, error)

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}") for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = [error for error in errors if not isinstance(error, PeerFailed)]
    if own or errors:
        raise (own or errors)[0]
    return results
