"""The network of ranks: collectives that fit together or do not, and who waits for whom."""

import threading

import numpy as np
import pytest

from mindformers_glm32k.dryrun.simulator.network import Network, NetworkError, PeerFailed


def on_all_ranks(world, work):
    """Runs work(network, rank) on a thread per rank; returns results and errors by rank."""
    network, results, errors = Network(world), {}, {}

    def one(rank):
        error = None
        try:
            results[rank] = work(network, rank)
        except (NetworkError, PeerFailed) as caught:
            error = errors[rank] = caught
        network.end(rank, error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return network, results, errors


def test_everybody_gets_what_the_members_brought_in_their_order():
    network, results, errors = on_all_ranks(
        3, lambda net, rank: net.collective(rank, "AllGather", "all", (2, 0, 1), np.array([rank]))
    )
    assert not errors
    assert [int(array[0]) for array in results[1]] == [2, 0, 1]
    assert results[0][0] is results[2][0]
    assert not network.unread() and not network.collectives


def test_collectives_of_one_group_are_told_apart_by_their_index():
    def work(network, rank):
        return [
            int(sum(network.collective(rank, "AllReduce", "g", (0, 1), np.array(value))))
            for value in (rank, 10 * rank, 100 * rank)
        ]

    _, results, errors = on_all_ranks(2, work)
    assert not errors and results == {0: [1, 10, 100], 1: [1, 10, 100]}


@pytest.mark.parametrize(
    "theirs, words",
    [
        (("AllGather", np.zeros(4, np.float16), "sum"), "AllGather of float16 [4]"),
        (("AllReduce", np.zeros(2, np.float16), "sum"), "float16 [2]"),
        (("AllReduce", np.zeros(4, np.float32), "sum"), "float32 [4]"),
        (("AllReduce", np.zeros(4, np.float16), "max"), "max"),
    ],
)
def test_members_that_bring_different_things_are_told_what_and_where(theirs, words):
    def work(network, rank):
        kind, array, details = ("AllReduce", np.zeros(4, np.float16), "sum") if rank == 0 else theirs
        network.collective(rank, kind, "grads", (0, 1), array, details)

    _, _, errors = on_all_ranks(2, work)
    text = " ".join(map(str, errors.values()))
    assert "group 'grads'" in text and "number 1" in text and words in text and "rank 1 brings" in text


def test_a_swapped_pair_of_collectives_is_found():
    shapes = [(2,), (3,)]

    def work(network, rank):
        for shape in shapes if rank == 0 else shapes[::-1]:
            network.collective(rank, "AllReduce", "g", (0, 1), np.zeros(shape))

    _, _, errors = on_all_ranks(2, work)
    assert "differ in their collective number 1" in " ".join(map(str, errors.values()))


def test_a_rank_outside_the_group_is_refused():
    with pytest.raises(NetworkError, match="rank 5 in group 'g', whose ranks are"):
        Network(6).collective(5, "AllReduce", "g", (0, 1), np.zeros(1))


def test_messages_wait_for_their_receiver_in_order():
    def work(network, rank):
        if rank == 0:
            for value in (1, 2):
                network.send(0, 1, 7, np.array(value))
            return None
        return [int(network.receive(1, 0, 7)) for _ in range(2)]

    network, results, errors = on_all_ranks(2, work)
    assert not errors and results[1] == [1, 2] and not network.unread()


def test_messages_that_nobody_reads_are_listed():
    network, _, _ = on_all_ranks(2, lambda net, rank: net.send(rank, 1 - rank, 3, np.zeros(1)) if rank == 0 else None)
    assert network.unread() == ["rank 0 to rank 1 (tag 3): 1"]


def test_ranks_that_wait_for_each_other_are_named():
    def work(network, rank):
        network.receive(rank, 1 - rank, "forward")

    _, _, errors = on_all_ranks(2, work)
    text = str(errors[0])
    assert text.startswith("deadlock") and "rank 0 waits for a message from rank 1 (tag forward)" in text
    assert "rank 1 waits for a message from rank 0" in text


def test_waiting_for_a_program_that_has_ended_is_a_deadlock():
    def work(network, rank):
        if rank == 0:
            network.collective(0, "AllReduce", "g", (0, 1), np.zeros(1))

    _, _, errors = on_all_ranks(2, work)
    assert "AllReduce number 1 of group 'g'" in str(errors[0]) and "program of rank 1 has ended" in str(errors[0])


def test_a_failure_reaches_those_that_wait():
    network, errors = Network(2), []

    def waits():
        try:
            network.receive(0, 1, 0)
        except PeerFailed as error:
            errors.append(str(error))

    thread = threading.Thread(target=waits)
    thread.start()
    network.end(1, ValueError("no such operator"))
    thread.join(30)
    assert errors == ["rank 1: no such operator"]


def test_a_message_of_another_shape_is_refused():
    class Spec:
        shape = (2, 3)

    network = Network(2)
    network.send(0, 1, 0, np.zeros((3, 2)))
    with pytest.raises(NetworkError, match=r"receives \(3, 2\) from rank 0"):
        network.receive(1, 0, 0, Spec)
