"""The order in which a device executes a program, and the memory that each order takes.

MindSpore's backends (jit_level O0 and O1) reorder the kernels of a graph by `context.exec_order`: "bfs" (default)
or "dfs". Both are reproduced here from public sources (ExecOrderBuilder in mindspore/ccsrc/backend/common), over the
operations of a traced program with all calls inlined:

1.  Edges run from an operation to its users; users stand in the order in which a breadth-first walk from the program's
    result meets them. Tuples, Depend, Load and the like are virtual: they order kernels and do not run.
2.  A second walk from the result finds the operations without operands, such as a gather of weights. Each is made to
    wait for the operation that the walk reaches next, so that it does not run at the program's start.
3.  dfs follows each operation's users at once, as deep as they are ready. bfs queues them; the users of a communication
    wait until nothing else is ready, those of a fused communication until the next one of its group. Both kinds of
    users then go to a queue of their own, which is served first.

What is not reproduced: rewritten kernels (a backend's fusions), several streams, Depends marked `eager_depend`.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping

from mindformers_glm32k.dryrun.analysis.cost import COLLECTIVES
from mindformers_glm32k.dryrun.analysis.trace import Buffer, Event, Step, Trace

ORDERS = ("bfs", "dfs")
VIRTUAL = frozenset(("MakeTuple", "MakeList", "make_tuple", "TupleGetItem", "Depend", "UpdateState", "Load", "Partial"))
VIRTUAL |= {"Return", "return", "StateSetItem", "call"}


def execution_order(steps: list[Step], result: int, how: str = "bfs") -> list[int]:
    """The kernels in the order in which MindSpore executes them.

    Args:
        steps: nodes; each one's `sources` are indices of the list, None where it waits for nothing.
        result: index of the step that the program returns; steps that it does not need are not executed.
        how: one of ORDERS.

    Returns:
        Indices of `steps`, virtual ones left out.
    """
    links = _Links(steps, result)
    return links.depth_first() if how == "dfs" else links.breadth_first()


class _Links:
    """Dependencies between steps.

    Attributes:
        users: step -> the steps that read it, one entry for each operand.
        waits: step -> number of operands that are not computed yet.
        roots: steps that wait for nothing, last one first.
    """

    def __init__(self, steps, result):
        self.steps, self.result = steps, result
        self.sources = self._without_trivial()
        self.users, self.waits = defaultdict(list), defaultdict(int)
        self._link()
        self.roots = self._roots()

    def _without_trivial(self):
        """Sources of each step that depend on a kernel; one pass suffices, for steps come after their sources."""
        trivial, kept = [], []
        for step in self.steps:
            sources = [source for source in step.sources if source is not None and not trivial[source]]
            trivial.append(not sources and _is_virtual(step))
            kept.append(sources)
        return kept

    def _link(self):
        waiting, seen = deque([self.result]), {self.result}
        while waiting:
            step = waiting.popleft()
            for source in self.sources[step]:
                self.users[source].append(step)
                self.waits[step] += 1
                if source not in seen:
                    seen.add(source)
                    waiting.append(source)

    def _roots(self):
        unseen_users = {step: len(users) for step, users in self.users.items()}
        kernels, virtual, roots = deque(), deque([self.result]), []
        while kernels or virtual:
            step = (virtual or kernels).popleft()
            for source in reversed(self.sources[step]):
                unseen_users[source] -= 1
                if unseen_users[source]:
                    continue
                if _is_virtual(self.steps[source]):
                    virtual.append(source)
                    continue
                kernels.append(source)
                if roots:
                    held_back = roots.pop()
                    self.users[source].append(held_back)
                    self.waits[held_back] += 1
            if not self.sources[step]:
                roots.append(step)
        return roots

    def _ready(self, step):
        """The users that waited for nothing but this step."""
        for user in self.users[step]:
            if self.waits[user]:
                self.waits[user] -= 1
                if not self.waits[user]:
                    yield user

    def depth_first(self):
        order, waits_before = [], self.waits
        self.waits = dict(waits_before)
        for root in reversed(self.roots):
            stack = [iter((root,))]
            while stack:
                step = next(stack[-1], None)
                if step is None:
                    stack.pop()
                    continue
                if not _is_virtual(self.steps[step]):
                    order.append(step)
                stack.append(self._ready(step))
        return order

    def breadth_first(self):
        order, roots = [], list(self.roots)
        common, preferred = deque(), deque()
        delayed, fused, fused_group = deque(), None, ""
        while roots or fused is not None or delayed:
            if delayed:
                self._enqueue(delayed.popleft(), preferred, communication_first=False)
            elif fused is not None:
                self._enqueue(fused, preferred, communication_first=False)
                fused = None
            else:
                common.append(roots.pop())
            while common or preferred:
                queue = preferred or common
                step = queue.popleft()
                node = self.steps[step].node
                if not _is_virtual(self.steps[step]):
                    order.append(step)
                group = node.attributes.get("group", "")
                if _is_fused(node) and "sync_bn_group" not in group and fused_group in ("", group):
                    fused_group = group
                    if fused is not None:
                        self._enqueue(fused, preferred, communication_first=False)
                    fused = step
                elif node.op in COLLECTIVES:
                    delayed.append(step)
                else:
                    self._enqueue(step, queue, communication_first=True)
        return order

    def _enqueue(self, step, queue, communication_first):
        later = []
        for user in self._ready(step):
            if _is_virtual(self.steps[user]) or len(self.users[step]) == 1:
                queue.appendleft(user)
            elif (self.steps[user].node.op in COLLECTIVES) == communication_first:
                queue.append(user)
            else:
                later.append(user)
        queue.extend(later)


def _is_virtual(step):
    return step.node.op in VIRTUAL


def _is_fused(node):
    return node.op in COLLECTIVES and bool(node.attributes.get("fusion")) and "group" in node.attributes


def ordered_events(trace: Trace, how: str) -> list[Event]:
    """A trace's events as a device executes them. Those that the result does not need are left out."""
    order = execution_order(trace.steps, trace.result, how)
    return [trace.steps[step].event for step in order if trace.steps[step].event is not None]


def live_bytes(trace: Trace, events: Iterable[Event]) -> list[int]:
    """Bytes of the buffers alive while each event runs, the events being executed in the order given."""
    events = list(events)
    last = _last_uses(trace, events)
    released = defaultdict(int)
    for buffer, index in last.items():
        if buffer.kind == "activation":
            released[index] += buffer.spec.bytes
    curve, live = [], 0
    for index, event in enumerate(events):
        live += sum(buffer.spec.bytes for buffer in event.writes)
        curve.append(live)
        live -= released[index]
    return curve


def _last_uses(trace, events):
    """Storage -> index of the event that touches it last."""
    last = {}
    for index, event in enumerate(events):
        for buffer in (*event.reads, *event.writes):
            last[buffer.storage] = index
    for buffer in trace.results:
        last[buffer.storage] = len(events)
    return last


def alive_at(trace: Trace, events: list[Event], index: int) -> list[Buffer]:
    """The buffers alive while an event runs, the events being executed in the order given."""
    last = _last_uses(trace, events)
    return [buffer for event in events[: index + 1] for buffer in event.writes if last[buffer.storage] >= index]


def by_order(trace: Trace) -> dict[str, list[Event]]:
    """A trace's events in each of MindSpore's orders."""
    return {how: ordered_events(trace, how) for how in ORDERS}


def peaks(trace: Trace, ordered: Mapping[str, list[Event]] | None = None) -> dict[str, int]:
    """Peak of the activations in bytes by order: "file" (the program's own), "bfs", "dfs", and "best", the least of
    these and of `frugal_order`: an upper bound of the optimum, which is not known.

    `ordered` is `by_order` of the trace where already computed.
    """
    found = {"file": max(live_bytes(trace, trace.events), default=0)}
    for how, events in (ordered or by_order(trace)).items():
        found[how] = max(live_bytes(trace, events), default=0)
    candidates = [frugal_order(trace, patient) for patient in (False, True)]
    found["best"] = min([*found.values(), *(max(live_bytes(trace, order), default=0) for order in candidates)])
    return found


def frugal_order(trace: Trace, patient: bool = False) -> list[Event]:
    """A list schedule that always runs, of the events that are ready, the one that frees most.

    Args:
        trace: the program.
        patient: only tell whether an event makes memory grow, not by how much; then follow the file's order.
    """
    steps, needed = trace.steps, _needed(trace)
    users, waits = defaultdict(list), {}
    readers = defaultdict(set)  # buffer -> steps that still touch it
    for index in needed:
        sources = [source for source in steps[index].sources if source is not None]
        waits[index] = len(sources)
        for source in sources:
            users[source].append(index)
        for storage in _storages(steps[index].event):
            readers[storage].add(index)
    for buffer in trace.results:
        readers[buffer.storage].add(trace.result)

    def rank(index):
        event = steps[index].event
        grows = sum(buffer.spec.bytes for buffer in event.writes)
        grows -= sum(storage.spec.bytes for storage in _storages(event) if readers[storage] == {index})
        return (int(grows > 0) if patient else grows, index)

    heap, at_once = [], deque(index for index in needed if not waits[index])
    done, order = set(), []
    while at_once or heap:
        if at_once:
            index = at_once.popleft()
            if steps[index].event is not None:
                heapq.heappush(heap, rank(index))
                continue
        else:
            entry = heapq.heappop(heap)
            index = entry[-1]
            if index in done:
                continue
            done.add(index)
            order.append(steps[index].event)
            for storage in _storages(order[-1]):
                readers[storage].discard(index)
                if len(readers[storage]) == 1:  # the last one that touches it frees it
                    (last,) = readers[storage]
                    if steps[last].event is not None and not waits[last]:
                        heapq.heappush(heap, rank(last))
        for user in users[index]:
            waits[user] -= 1
            if not waits[user]:
                at_once.append(user)
    return order


def _storages(event):
    """The activations that an event touches."""
    buffers = (*event.reads, *event.writes) if event is not None else ()
    return {buffer.storage for buffer in buffers if buffer.storage.kind == "activation"}


def _needed(trace):
    """Indices of the steps that the result needs, in the file's order."""
    needed = {trace.result}
    for index in range(trace.result, -1, -1):
        if index in needed:
            needed.update(source for source in trace.steps[index].sources if source is not None)
    return sorted(needed)
