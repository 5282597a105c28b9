"""The cells that a trainer wraps round a model: micro batches, interleaving, LoRA, columns chosen by name."""

from __future__ import annotations

from collections.abc import Iterator

from mindspore import nn
from mindspore.nn.wrap.cell_wrapper import GradAccumulationCell


def innermost_network(network: nn.Cell) -> nn.Cell:
    """The model inside the cells that a trainer wraps round it: a chain of `network` and `_backbone` attributes."""
    return list(_wrapped_cells(network))[-1]


def micro_batches(network: nn.Cell) -> int:
    """Micro batches whose losses a train-step cell adds up: of a pipeline, gradient accumulation, interleaving.

    1 where the loss is that of a whole batch, or a mean over all tokens (calculate_per_token_loss).
    """
    cells = list(_wrapped_cells(network))
    if any(getattr(cell, "calculate_per_token_loss", False) for cell in cells):
        return 1
    sizes = [cell.micro_size for cell in cells if hasattr(cell, "micro_size")]
    return (sizes[-1] if sizes else 1) * interleave_num(network)


def interleave_num(network: nn.Cell) -> int:
    """The number of parts into which `micro_batch_interleave_num` splits each (micro) batch of a wrapped network."""
    return next((cell.interleave_num for cell in _wrapped_cells(network) if hasattr(cell, "interleave_num")), 1)


def accumulation(network: nn.Cell) -> tuple[nn.Cell, int]:
    """The network in a GradAccumulationCell and its number of micro batches; else the network itself and 1."""
    if isinstance(network, GradAccumulationCell):
        return network.network, network.micro_size
    return network, 1


def index_of_input(network: nn.Cell, name: str, default: int) -> int:
    """The index of a wrapped network's input that becomes the argument `name` of the model's construct.

    `default` is its index where inputs become arguments in their order. Where the data set chose the order
    (`construct_args_key`) and has no such column, the name is added at the end.
    """
    for cell in _wrapped_cells(network):
        keys = getattr(cell, "construct_args_key", None)
        if keys:
            if name not in keys:
                cell.construct_args_key = [*keys, name]
            return cell.construct_args_key.index(name)
    return default


def _wrapped_cells(network: nn.Cell) -> Iterator[nn.Cell]:
    """The cell, the cell that it wraps, and so on."""
    while network is not None:
        yield network
        network = next((getattr(network, name) for name in ("network", "_backbone") if hasattr(network, name)), None)
