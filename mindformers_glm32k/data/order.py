"""The order of the samples: the same for one process and for many, on any number of workers, after a resume too."""
import numpy as np
from mindspore.dataset import Sampler


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
        self._epoch = 0
        super().__init__(num_samples=size // num_shards)

    def __iter__(self):
        order = np.arange(self._size)
        if self._shuffle:
            order = np.random.default_rng((self._seed, self._epoch)).permutation(self._size)
        self._epoch += 1
        used = self._size // self._num_shards * self._num_shards
        return iter(order[self._shard_id:used:self._num_shards].tolist())
