"""What an NPU of an Atlas 800T A2 can do, from public sources. Rates are per second and device; bytes are bytes.

Sources
    [model]  Ascend/msmodeling (Huawei's performance modelling tool), tensor_cast/device.py, profile ATLAS_800_A2_313T_64G:
             313 TFLOPS float16, 294.9 bfloat16, 83 float32; HBM 1.6 TiB/s, of which 0.6 is reached; full mesh of 8 NPUs with
             196 GB/s in each direction, that is 28 GB/s over each of 7 links; 25 GB/s between machines, of which 0.7 is
             reached; 10 microseconds to start a collective.
    [bench]  gameofdimension/limulidae, README: measured on 910B, all_gather of N bytes in N / (38, 64, 149 GB/s) over 2, 4, 8
             devices, all_reduce in N / (18, 30, 72 GB/s). With N / devices over each link at once this is 0.57 to 0.68 of
             28 GB/s a link.

The same server is sold with 376 and 280 TFLOPS too; which one the published figures come from is not known. The fraction of
the peak that `estimate` uses is calibrated against a published figure, so that another peak gives the same seconds.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Device:
    """One NPU and its links.

    Args:
        name (str): for the report.
        flops (dict[str, float]): peak FLOP/s of matrix products by element type.
        memory (float): bytes/s that memory-bound operators reach.
        link (float): bytes/s that one link between two NPUs of a machine reaches in one direction.
        network (float): bytes/s that an NPU's port to other machines reaches in one direction.
        start (float): seconds to start a collective.
        per_machine (int): NPUs of a machine.
    """

    name: str
    flops: dict = field(hash=False)
    memory: float
    link: float
    network: float
    start: float
    per_machine: int


ATLAS_800T_A2 = Device(
    name="Atlas 800T A2 (313 TFLOPS float16, 64 GB)",
    flops={"float16": 313e12, "bfloat16": 294.9e12, "float32": 83e12},
    memory=0.6 * 1.6 * 1024**4,  # [model]
    link=0.65 * 28e9,  # [model], the share from [bench]
    network=0.7 * 25e9,  # [model]
    start=10e-6,  # [model]
    per_machine=8,
)


def seconds_of_collective(device, kind, ranks, total_bytes, count):
    """Time that collectives of one kind over one group take, none of it hidden behind other work.

    Inside a machine every pair of NPUs has its own link, so a group of n moves n - 1 parts of 1/n at once. Between machines
    the parts that a machine's members share out go through one port each.

    Args:
        device (Device): the NPU.
        kind (str): "AllReduce", …; Send costs nothing here: the Receive on the other side is what a program waits for.
        ranks (sequence[int]): the group; with one rank it is a copy in the device's own memory.
        total_bytes (int): over all calls, of the larger of what a call reads and writes.
        count (int): calls.

    Returns:
        float: seconds.
    """
    if kind == "Send":
        return 0.0
    size = max(len(ranks), 1)
    if size == 1:
        return 2 * total_bytes / device.memory + count * device.start
    machines = len({rank // device.per_machine for rank in ranks})
    local = size / machines
    if kind in ("Receive", "Broadcast"):
        seconds = total_bytes / (device.link if machines == 1 else device.network)
    else:
        seconds = total_bytes / size / device.link if local > 1 else 0.0
        if machines > 1:
            moved = total_bytes if kind.lower().startswith("alltoall") else total_bytes / local
            seconds += moved * (machines - 1) / machines / device.network
        if kind == "AllReduce":  # scatter and gather
            seconds *= 2
    return seconds + count * device.start
