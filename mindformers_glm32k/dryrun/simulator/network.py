"""The network of ranks: collectives, sends and receives as meetings of threads.

It finds what a real network leaves hanging: ranks of a group that do different things, and ranks that wait for each other.
"""

import threading
from collections import defaultdict, deque


class NetworkError(RuntimeError):
    """Ranks do not fit together. The message names group, ranks, operators and places."""


class PeerFailed(RuntimeError):
    """Another rank failed; its own error tells why."""


class Network:
    """Messages between ranks, one thread each.

    Args:
        world (int): number of ranks.
    """

    def __init__(self, world):
        self.world = world
        self.changed = threading.Condition()
        self.meetings = {}  # (group, ranks, number of the meeting) -> {rank: (what it brings, array)}
        self.counts = defaultdict(int)  # (group, rank) -> meetings so far
        self.boxes = defaultdict(deque)  # (source, destination, tag) -> arrays
        self.waiting = {}  # rank -> (condition, what it waits for)
        self.ended = set()
        self.failure = None

    def meet(self, rank, kind, group, ranks, array, details=""):
        """Brings an array to a collective and waits for the other ranks of the group.

        Args:
            rank (int): who comes.
            kind (str): "AllReduce", ….
            group (str): the group's name.
            ranks (sequence of int): its members.
            array (numpy.ndarray): what this rank brings.
            details: whatever must be equal on all ranks: dtype, reduction, axes.

        Returns:
            list[numpy.ndarray]: what each member brought, in the order of `ranks`.

        Raises:
            NetworkError: members bring different kinds, shapes, dtypes or details; not a member; deadlock.
            PeerFailed: another rank failed.
        """
        ranks = tuple(ranks)
        if rank not in ranks:
            raise NetworkError(f"{kind} of rank {rank} in group {group!r}, whose ranks are {list(ranks)}")
        with self.changed:
            number = self.counts[group, rank]
            self.counts[group, rank] += 1
            meeting = self.meetings.setdefault((group, number), {})
            brought = (kind, array.shape, str(array.dtype), str(details), ranks)
            meeting[rank] = (brought, array)
            self.changed.notify_all()
            self._check(group, number, meeting)
            what = f"{kind} number {number + 1} of group {group!r} (ranks {list(ranks)})"
            self._wait(
                rank,
                lambda: len(meeting) == len(ranks),
                lambda: f"{what}, for ranks {sorted(set(ranks) - set(meeting))}",
            )
            self._check(group, number, meeting)  # the last to come may be the one who differs
            result = [meeting[member][1] for member in ranks]
            if all(self.counts[group, member] > number for member in ranks):
                self.meetings.pop((group, number), None)
            return result

    def send(self, rank, destination, tag, array):
        """Leaves an array for another rank; does not wait.

        Args:
            rank (int), destination (int): from whom, to whom.
            tag: tells several messages between the two apart.
            array (numpy.ndarray): what is sent.
        """
        with self.changed:
            self.boxes[rank, destination, tag].append(array)
            self.changed.notify_all()

    def receive(self, rank, source, tag, spec=None):
        """Waits for an array of another rank.

        Args:
            rank (int), source (int): to whom, from whom.
            tag: as the sender's.
            spec (Spec): what the receiver's program expects.

        Returns:
            numpy.ndarray

        Raises:
            NetworkError: the array has another shape than expected; deadlock.
            PeerFailed: another rank failed.
        """
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

    def end(self, rank, error=None):
        """A rank's thread is over.

        Args:
            rank (int): which.
            error (Exception | None): why, if not because its program ended.
        """
        with self.changed:
            self.ended.add(rank)
            if error is not None and self.failure is None:
                self.failure = f"rank {rank}: {error}"
            self._find_deadlock()
            self.changed.notify_all()

    def unread(self):
        """list[str]: messages that nobody received."""
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
        """All that run are waiting, and nothing that they wait for has come."""
        if (
            self.failure is None
            and self.waiting
            and len(self.waiting) + len(self.ended) == self.world
            and not any(condition() for condition, _ in self.waiting.values())
        ):
            waits = [f"rank {rank} waits for {what()}" for rank, (_, what) in sorted(self.waiting.items())]
            over = [f"the program of rank {rank} has ended" for rank in sorted(self.ended)]
            self.failure = "deadlock: " + "; ".join(waits + over)
            self.changed.notify_all()

    @staticmethod
    def _check(group, number, meeting):
        if len({brought for brought, _ in meeting.values()}) == 1:
            return
        brings = "; ".join(
            f"rank {rank} brings {kind} of {dtype} {list(shape)} {details} in ranks {list(ranks)}"
            for rank, ((kind, shape, dtype, details, ranks), _) in sorted(meeting.items())
        )
        raise NetworkError(
            f"the ranks of group {group!r} do not meet in their collective number {number + 1}: {brings}"
        )
