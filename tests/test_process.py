"""The machine's free memory, read from files as Linux writes them."""

import os

import pytest

from mindformers_glm32k.process import free_memory, resident_memory

MEMINFO = "MemTotal: 2000 kB\nMemFree: 100 kB\nMemAvailable: {available} kB\nSwapTotal: 80 kB\nSwapFree: {swap} kB\n"


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def machine(root, available=1000, swap=0, groups="0::/\n"):
    write(root, "proc/meminfo", MEMINFO.format(available=available, swap=swap))
    write(root, "proc/self/cgroup", groups)
    return root


def limit(root, group, most, used, cached, first=False):
    """A control group of the second version of Linux's, or of the first."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
    for name, value in zip(names, (most, used)):
        write(root, f"sys/fs/cgroup/{group}/{name}", f"{value}\n")
    fields = {"total_inactive_file" if first else "inactive_file": cached, "inactive_anon": 5}
    write(root, f"sys/fs/cgroup/{group}/memory.stat", "".join(f"{name} {value}\n" for name, value in fields.items()))


def test_what_is_available_and_swap(tmp_path):
    assert free_memory(machine(tmp_path, 1000, 24)) == 1024 * 1024


def test_the_limit_of_a_container(tmp_path):
    limit(machine(tmp_path), ".", 600_000, 200_000, 50_000)
    assert free_memory(tmp_path) == 450_000


def test_the_narrowest_of_nested_groups(tmp_path):
    machine(tmp_path, groups="0::/user/job\n")
    limit(tmp_path, "user", 600_000, 400_000, 0)
    limit(tmp_path, "user/job", "max", 100_000, 0)
    assert free_memory(tmp_path) == 200_000


def test_groups_of_the_first_version(tmp_path):
    machine(tmp_path, groups="9:cpu,memory:/job\n8:pids:/job\n0::/\n")
    limit(tmp_path, "memory/job", 500_000, 300_000, 10_000, first=True)
    limit(tmp_path, "memory", 2**63 - 4096, 400_000, 0, first=True)  # how that version writes "no limit"
    assert free_memory(tmp_path) == 210_000


def test_a_path_of_the_host_that_the_container_does_not_see(tmp_path):
    machine(tmp_path, groups="9:memory:/docker/abc\n")
    limit(tmp_path, "memory", 500_000, 300_000, 0, first=True)
    assert free_memory(tmp_path) == 200_000


def test_above_the_limit_nothing_is_left(tmp_path):
    limit(machine(tmp_path), ".", 1000, 2000, 0)
    assert free_memory(tmp_path) == 0


def test_a_system_that_does_not_tell(tmp_path):
    assert free_memory(tmp_path) is None


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="no /proc")
def test_this_machine():
    assert free_memory() > 2**20
    assert 2**20 < resident_memory(os.getpid()) < 2**40
    assert resident_memory(2**22 + 1) is None  # above the largest number of a process
