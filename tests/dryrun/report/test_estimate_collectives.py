"""Times of collectives on the full mesh of a machine and between machines."""

import pytest

from mindformers_glm32k.dryrun.report.estimate import ATLAS_800T_A2, Device, seconds_of_collective

DEVICE = Device("test", {"float16": 1.0}, memory=1000.0, link=10.0, network=5.0, start=0.0, per_machine=4)


def seconds(kind, ranks, size=120, count=1):
    return seconds_of_collective(DEVICE, kind, ranks, size, count)


def test_inside_a_machine_every_pair_has_a_link():
    assert seconds("AllGather", (0, 1)) == 120 / 2 / 10
    assert seconds("ReduceScatter", (0, 1, 2, 3)) == 120 / 4 / 10
    assert seconds("AlltoAll", (0, 1, 2, 3)) == 120 / 4 / 10
    assert seconds("AllReduce", (0, 1, 2, 3)) == 2 * 120 / 4 / 10


def test_between_machines_through_the_port():
    assert seconds("AllGather", (0, 4)) == 120 / 2 / 5  # one member a machine: half of it comes from the other
    assert seconds("AllGather", (0, 1, 4, 5)) == 120 / 4 / 10 + 120 / 2 / 2 / 5
    assert seconds("AlltoAll", (0, 1, 4, 5)) == 120 / 4 / 10 + 120 / 2 / 5


def test_a_transfer_is_waited_for_once():
    assert seconds("Send", (0, 2)) == 0
    assert seconds("Receive", (0, 2)) == 120 / 10
    assert seconds("Receive", (0, 4)) == 120 / 5


def test_a_group_of_one_copies_in_its_own_memory():
    assert seconds("AllGather", (3,)) == 2 * 120 / 1000


def test_starting_costs_time():
    device = ATLAS_800T_A2
    assert seconds_of_collective(device, "AllReduce", (0, 1), 0, 100) == pytest.approx(100 * device.start)


@pytest.mark.parametrize(
    "kind, devices, rate",
    [
        ("AllGather", 2, 38e9),
        ("AllGather", 4, 64e9),
        ("AllGather", 8, 149e9),
        ("AllReduce", 2, 18e9),
        ("AllReduce", 4, 30e9),
        ("AllReduce", 8, 72e9),
    ],
)
def test_measured_rates_of_the_source_are_met_within_a_fifth(kind, devices, rate):
    size = 4e9
    assert seconds_of_collective(ATLAS_800T_A2, kind, range(devices), size, 1) == pytest.approx(size / rate, rel=0.2)
