import os
import re

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT

from mindformers_glm32k import compat


@pytest.mark.parametrize("target, ascend", [("CPU", False), ("Ascend", True), ("GPU", False)])
def test_on_ascend(target, ascend, monkeypatch):
    monkeypatch.setattr(ms, "get_context", {"device_target": target}.get)
    assert compat.on_ascend() is ascend


def test_the_ledger_names_what_is_there():
    entries = re.findall(r"^\| ([\w./]+) \|", compat.__doc__, re.M)
    assert len(entries) > 8 and entries.pop(0) == "entry"
    for entry in entries:
        paths = [ROOT / "mindformers_glm32k" / entry, ROOT / "research" / "glm32k" / entry]
        assert hasattr(compat, entry) or any(path.is_file() for path in paths), entry


def test_config_folder_of_a_checkout():
    assert compat.config_folder() == ROOT / "research" / "glm32k"
    assert (compat.config_folder() / "register_glm32k.py").is_file()


def test_config_folder_of_a_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "__file__", str(tmp_path / "site-packages" / "mindformers_glm32k" / "compat.py"))
    monkeypatch.setattr(compat.sys, "prefix", str(tmp_path))
    assert compat.config_folder() == tmp_path / "share" / "mindformers_glm32k"


def test_portable_argmax():
    values = np.random.default_rng(0).normal(size=(3, 17)).astype(np.float32)
    for given in (values, ms.Tensor(values)):
        found = compat.portable_argmax(given)
        assert isinstance(found, ms.Tensor) and found.asnumpy().tolist() == values.argmax(-1).tolist()
    assert compat.portable_argmax(values, axis=0).asnumpy().tolist() == values.argmax(0).tolist()


def test_set_output_path(tmp_path, monkeypatch):
    from mindformers.tools.utils import get_output_root_path

    monkeypatch.setenv("LOCAL_DEFAULT_PATH", "elsewhere")
    compat.set_output_path(str(tmp_path / "results"))
    assert get_output_root_path() == os.path.realpath(tmp_path / "results")


@pytest.mark.parametrize(
    "config, path",
    [
        ({}, None),
        ({"load_checkpoint": ""}, None),
        ({"load_checkpoint": "a.ckpt"}, "a.ckpt"),
        ({"load_checkpoint": "", "checkpoint": {"load_path": "b"}}, "b"),
        ({"load_checkpoint": "a.ckpt", "checkpoint": {"load_path": ""}}, "a.ckpt"),
        ({"load_checkpoint": "a.ckpt", "checkpoint": None}, "a.ckpt"),
    ],
)
def test_checkpoint_path(config, path):
    assert compat.checkpoint_path(config) == path


def modules_with_barrier():
    """MindSpore's module of barriers, and those of MindFormers that took the name from it: up to 2.0 some, from 2.1 on
    none, because they took that of mint.distributed."""
    import sys

    import mindformers  # loads them
    from mindspore import mint
    from mindspore.communication import comm_func

    def users(barrier):
        modules = [module for name, module in sys.modules.items() if name.startswith("mindformers.")]
        return [module for module in modules if getattr(module, "barrier", None) is barrier]

    found, of_mint = users(comm_func.barrier), users(mint.distributed.barrier)
    is_newer = tuple(map(int, mindformers.__version__.split(".")[:2])) >= (2, 1)
    assert bool(of_mint) == is_newer and bool(found) != is_newer
    return [comm_func, *found], comm_func.barrier


def test_barriers_stay_in_one_process():
    modules, upstream = modules_with_barrier()
    with compat.barrier_on_cpu():
        assert all(module.barrier is upstream for module in modules)


@pytest.mark.parametrize("target, replaced", [("CPU", True), ("Ascend", False)])
def test_barriers_of_several_processes(target, replaced, monkeypatch):
    modules, upstream = modules_with_barrier()
    import mindspore.communication

    monkeypatch.setattr(mindspore.communication.GlobalComm, "INITED", True)
    monkeypatch.setattr(mindspore.communication, "get_group_size", lambda: 2)
    monkeypatch.setattr(ms, "get_context", {"device_target": target}.get)
    with pytest.raises(KeyError), compat.barrier_on_cpu():
        assert all((module.barrier is not upstream) == replaced for module in modules)
        raise KeyError
    assert all(module.barrier is upstream for module in modules)
