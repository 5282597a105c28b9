"""All ranks of a layout at work: a thread each."""

import threading

from mindformers_glm32k.dryrun.simulator.network import PeerFailed


def run_world(machines, network, batches, on_step=None):
    """Executes steps on all ranks.

    Args:
        machines (list[Machine]): by rank.
        network (Network): that they were given.
        batches (list[list[list[numpy.ndarray]]]): per step and rank the program's inputs.
        on_step (callable | None): gets (rank, step) after each step of each rank.

    Returns:
        list[list]: per step and rank the program's result.

    Raises:
        ExecutionError, NetworkError: the first failure of any rank.
    """
    results = [[None] * len(machines) for _ in batches]
    errors = []

    def work(rank):
        error = None
        try:
            for step, inputs in enumerate(batches):
                results[step][rank] = machines[rank].run(inputs[rank])
                if on_step:
                    on_step(rank, step)
        except Exception as caught:  # whatever it is, the other ranks must not wait for this one
            error = caught
            errors.append(caught)
        network.end(rank, error)

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}") for rank in range(len(machines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = [error for error in errors if not isinstance(error, PeerFailed)]
    if own or errors:
        raise (own or errors)[0]
    return results
