"""Greedy decoding by compiled programs: "prefill" reads all prompts, "increment" one more token of each; or, without a
cache, "predict" reads all prompts and what they have got so far.

Around the programs this does what upstream's generator does: it deals blocks of the cache to prompts, says where each
token's keys and values go, and takes the word with the largest logit.

Letters: B prompts, N tokens to generate, S tokens of a row, V words.
"""

from dataclasses import dataclass

import numpy as np

from mindformers_glm32k.dryrun.simulator import state
from mindformers_glm32k.dryrun.simulator.interpreter import ExecutionError, Machine
from mindformers_glm32k.dryrun.simulator.network import Network
from mindformers_glm32k.dryrun.simulator.operators.values import NUMPY
from mindformers_glm32k.dryrun.simulator.world import run_world

PREFILL, INCREMENT, PREDICT = "prefill", "increment", "predict"
_PAD = 0  # behind the text of a row; no token sees what stands behind it
_CACHES = ("key_cache", "value_cache")


def is_cache(name):
    """bool: whether a parameter is a cache of keys or values."""
    return name.endswith(_CACHES)


class Blocks:
    """Which blocks of the cache belong to which prompt: the next free one, whenever a prompt's last block is full.

    Args:
        rows (int): prompts.
        width (int): blocks that a prompt can have.
        size (int): tokens of a block.
        blocks (int): there are.
    """

    def __init__(self, rows, width, size, blocks):
        self.width, self.size, self.blocks = width, size, blocks
        self.dealt = 0
        self.tables = [[] for _ in range(rows)]
        self.lengths = [0] * rows

    def extend(self, counts):
        """Makes room for more tokens.

        Args:
            counts (sequence of int): new tokens of each prompt.

        Returns:
            numpy.ndarray: (sum of counts) int32, the slot of each new token, counted over all blocks.

        Raises:
            ExecutionError: the cache, or a prompt's table, is full.
        """
        slots = []
        for row, count in enumerate(counts):
            table, start = self.tables[row], self.lengths[row]
            while len(table) * self.size < start + count:
                if self.dealt == self.blocks or len(table) == self.width:
                    raise ExecutionError(
                        f"prompt {row} of {start + count} tokens does not fit: the cache has {self.blocks} "
                        f"blocks of {self.size} tokens, {self.width} at most of a prompt"
                    )
                table.append(self.dealt)
                self.dealt += 1
            self.lengths[row] = start + count
            slots += [
                table[place // self.size] * self.size + place % self.size for place in range(start, start + count)
            ]
        return np.array(slots, np.int32)

    def table(self):
        """numpy.ndarray: (B, width) int32, the blocks of each prompt in order, -1 behind them."""
        return np.array([table + [-1] * (self.width - len(table)) for table in self.tables], np.int32)


class CachedGenerator:
    """One rank: both programs over the same weights and caches.

    Args:
        phases (dict[str, Program]): "prefill" and "increment".
        rank (int): who.
        network (Network): where the other ranks are.
        values (dict[str, numpy.ndarray]): by parameter name, the caches left out.
        watch (callable | None): see `Machine`.
    """

    def __init__(self, phases, rank, network, values, watch=None):
        caches = {
            name: np.zeros(spec.shape, NUMPY[spec.dtype])
            for program in phases.values()
            for name, spec in program.parameters.values()
            if is_cache(name)
        }
        prefill = Machine(phases[PREFILL], rank, network, {**values, **caches}, watch)
        increment = Machine(phases[INCREMENT], rank, network, {**values, **caches, **prefill.parameters}, watch)
        self.machines = {PREFILL: prefill, INCREMENT: increment}
        self.cache = next(
            parameter.value.shape[:2] for name, parameter in prefill.parameters.items() if is_cache(name)
        )  # blocks, tokens of a block

    def run(self, task):
        """Decodes greedily.

        Args:
            task (tuple): prompts, a list of B arrays of int32, as long together as the program was compiled for; N.

        Returns:
            tuple[numpy.ndarray, numpy.ndarray]: tokens (B, N) int32, logits (N, B, V).

        Raises:
            ExecutionError, NetworkError, PeerFailed: see `Machine.run`.
        """
        prompts, count = task
        machine = self.machines[PREFILL]
        width = _input(machine.program, "block_tables").shape[1]
        blocks = Blocks(len(prompts), width, self.cache[1], self.cache[0])
        ids, tokens, logits = np.concatenate(prompts)[None], [], []
        counts = [len(prompt) for prompt in prompts]
        for number in range(count):
            machine.step = number  # tokens are counted, whichever program makes them
            slots = blocks.extend(counts)
            logits.append(
                _call(
                    machine,
                    len(prompts),
                    input_ids=ids.astype(np.int32),
                    slot_mapping=slots,
                    block_tables=blocks.table(),
                    batch_valid_length=np.array([blocks.lengths], np.int32),
                )
            )
            tokens.append(logits[-1].argmax(-1).astype(np.int32))
            machine, ids, counts = self.machines[INCREMENT], tokens[-1][:, None], [1] * len(prompts)
        return np.stack(tokens, 1), np.stack(logits)


class UncachedGenerator:
    """One rank: a program that reads whole rows for each token.

    Args:
        phases (dict[str, Program]): "predict".
        rank, network, values, watch: see `CachedGenerator`.
    """

    def __init__(self, phases, rank, network, values, watch=None):
        self.machines = {PREDICT: Machine(phases[PREDICT], rank, network, values, watch)}

    def run(self, task):
        """Decodes greedily; see `CachedGenerator.run`."""
        prompts, count = task
        machine = self.machines[PREDICT]
        rows = np.full(_input(machine.program, "input_ids").shape, _PAD, np.int32)  # (B, S)
        ends = np.array([len(prompt) for prompt in prompts])
        for row, prompt in zip(rows, prompts):
            row[: len(prompt)] = prompt
        each, tokens, logits = np.arange(len(prompts)), [], []
        for _ in range(count):
            result = _call(machine, rows.size, input_ids=rows)
            logits.append(result.reshape(*rows.shape, -1)[each, ends - 1])
            tokens.append(logits[-1].argmax(-1).astype(np.int32))
            inside = ends < rows.shape[1]  # the last token needs no place
            rows[each[inside], ends[inside]] = tokens[-1][inside]
            ends += 1
        return np.stack(tokens, 1), np.stack(logits)


def _call(machine, rows, **inputs):
    """The logits of a program: (rows, V)."""
    names = [name.rsplit(":", 1)[-1] for name in machine.program.main.inputs]
    if set(names) != set(inputs):
        raise ExecutionError(f"rank {machine.rank}: the program's inputs are {names}, known are {sorted(inputs)}")
    result = machine.run([inputs[name] for name in names])
    result = result[0] if isinstance(result, tuple) else result
    if result.ndim != 2 or len(result) != rows:
        raise ExecutionError(f"rank {machine.rank}: logits of {list(result.shape)}, for {rows} tokens")
    return result


@dataclass
class Generated:
    """What an execution gave.

    Args:
        generators (list[CachedGenerator | UncachedGenerator]): by rank.
        tokens (list[numpy.ndarray]): by rank, (B, N).
        logits (list[numpy.ndarray]): by rank, (N, B, V).
        unread (list[str]): messages that nobody received.
    """

    generators: list
    tokens: list
    logits: list
    unread: list


def generate(programs, whole, prompts, count, make_watch=lambda: None):
    """Executes the programs of all ranks.

    Args:
        programs (list[Rehearsed]): by rank, each with `phases`, `layouts` and `state`; of one pipeline stage.
        whole (dict[str, numpy.ndarray]): whole parameters, the caches left out.
        prompts (list[numpy.ndarray]): B arrays of int32.
        count (int): tokens to generate.
        make_watch (callable): gives a rank's watch.

    Returns:
        Generated
    """
    network = Network(len(programs))
    generators = []
    for rank, rehearsed in enumerate(programs):
        values = {}
        for program in rehearsed.phases.values():
            weights = _without_caches(program)
            values.update(state.cut(weights, rank, rehearsed.layouts, whole, rehearsed.state))
        make = CachedGenerator if PREFILL in rehearsed.phases else UncachedGenerator
        generators.append(make(rehearsed.phases, rank, network, values, make_watch()))
    results = run_world(generators, network, [[(prompts, count)] * len(programs)])[0]
    return Generated(generators, [tokens for tokens, _ in results], [logits for _, logits in results], network.unread())


def _without_caches(program):
    """The program, without the parameters that every rank begins with zeros in."""
    parameters = {node: entry for node, entry in program.parameters.items() if not is_cache(entry[0])}
    return type(program)(program.main, program.graphs, parameters, program.inputs)


def _input(program, name):
    return next(spec for node, spec in program.inputs.items() if node.endswith(f":{name}"))
