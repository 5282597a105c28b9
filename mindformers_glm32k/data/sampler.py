"""The order of the samples: the same for one process and for many, on any number of workers, after a resume too."""

import numpy as np
from mindspore.dataset import Sampler

WINDOW = 50  # batches within which samples are sorted by size


class EpochSampler(Sampler):
    """Sample numbers of one rank, epoch by epoch.

    Each epoch has one order of all samples; rank r of n takes its places r, r + n, r + 2n, … The global batch of n
    ranks with b rows each is therefore the batch of one process with n * b rows. What does not divide by n is left
    out (when shuffled, other samples in each epoch), so that all ranks make equally many steps. MindSpore asks for
    every epoch's order, skipped ones included, so a resumed run continues where it stopped.

    MindSpore's own samplers do not do: the shuffled order with shards differs from the one without, and
    num_samples with shuffle draws with replacement.

    Args:
        size (int): number of samples.
        shuffle (bool): a new order in each epoch, or the files' order.
        seed (int): with the epoch's number it determines the order.
        num_shards (int): number of ranks that share the samples.
        shard_id (int): this rank, 0 <= shard_id < num_shards.
    """

    def __init__(self, size, shuffle, seed=0, num_shards=1, shard_id=0):
        self._size, self._shuffle, self._seed = size, shuffle, seed
        self._num_shards, self._shard_id = num_shards, shard_id
        self._sizes, self._batch = None, 1
        self._epoch = 0
        super().__init__(num_samples=size // num_shards)

    def sort_by(self, sizes, batch):
        """Lets samples of about the same size come together.

        Args:
            sizes (np.ndarray): (size,), sizes of the samples in any unit.
            batch (int): samples of a batch, those of all ranks counted.
        """
        self._sizes, self._batch = sizes, batch

    def order(self):
        """dict: shuffle, seed, num_shards and shard_id, as another sampler takes them."""
        return {
            "shuffle": self._shuffle,
            "seed": self._seed,
            "num_shards": self._num_shards,
            "shard_id": self._shard_id,
        }

    def __iter__(self):
        order = sample_order(self._size, self._shuffle, self._seed, self._epoch)
        if self._sizes is not None:
            order = _alike_together(order, self._sizes, self._batch, (self._seed, self._epoch), self._shuffle)
        self._epoch += 1
        used = self._size // self._num_shards * self._num_shards
        return iter(order[self._shard_id : used : self._num_shards].tolist())


class StreamSampler(Sampler):
    """Places in an endless stream, epoch by epoch: 0 … n - 1, then n … 2 n - 1, and so on.

    Args:
        rows_per_epoch (int): n, for one rank.
    """

    def __init__(self, rows_per_epoch):
        self._rows, self._epoch = rows_per_epoch, 0
        super().__init__(num_samples=rows_per_epoch)

    def __iter__(self):
        start, self._epoch = self._epoch * self._rows, self._epoch + 1
        return iter(range(start, start + self._rows))


def sample_order(size, shuffle, seed, epoch):
    """np.ndarray: int64 (size,), the order of all samples in one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(size) if shuffle else np.arange(size)


def _alike_together(order, sizes, batch, seed, shuffle):
    """Sorts by size within windows of WINDOW batches and, where shuffled, puts the batches in a random order again."""
    window = WINDOW * batch
    order = np.concatenate(
        [
            part[np.argsort(sizes[part], kind="stable")]
            for part in (order[at : at + window] for at in range(0, len(order), window))
        ]
    )
    if not shuffle:
        return order
    whole = len(order) // batch
    batches = order[: whole * batch].reshape(whole, batch)
    return np.concatenate(
        (batches[np.random.default_rng((*seed, 1)).permutation(whole)].reshape(-1), order[whole * batch :])
    )
