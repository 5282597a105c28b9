"""torch's zip-pickle files: values equal to safetensors', views of storages, and pickles that want to do something."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.checkpoint import open_source
from mindformers_glm32k.weights.torch_bin import read_torch
from weights.synthetic import state_dict_pickle, write_torch


def test_values_are_those_of_the_safetensors(reference):
    binary = open_source(reference / "tiny_hf" / "hf_bin_fp16").tensors
    safe = open_source(reference / "tiny_hf" / "hf_safetensors_fp32").tensors
    assert list(binary) and set(binary) == set(safe)
    for name, tensor in binary.items():
        assert tensor.crc32 is not None
        if not name.endswith("inv_freq"):  # a buffer, rounded in the fp16 folder
            assert np.array_equal(tensor.load().astype(np.float32), safe[name].load()), name


def test_views_of_storages(tmp_path):
    base = np.arange(24, dtype=np.float32)
    path = tmp_path / "views.bin"
    write_torch(
        path,
        {"whole": base, "rows": base, "turned": base, "scalar": base[:1]},
        views={
            "whole": (0, (4, 6), (6, 1)),
            "rows": (6, (2, 6), (6, 1)),
            "turned": (0, (6, 4), (1, 6)),
            "scalar": (0, (), ()),
        },
    )
    tensors = {tensor.name: tensor for tensor in read_torch(path)}
    matrix = base.reshape(4, 6)
    assert np.array_equal(tensors["whole"].load(), matrix) and tensors["whole"].crc32 is not None
    assert np.array_equal(tensors["rows"].load(), matrix[1:3]) and tensors["rows"].crc32 is None
    assert np.array_equal(tensors["turned"].load(), matrix.T)
    assert np.array_equal(
        np.concatenate([part.copy() for part in tensors["turned"].chunks(8, 16, 64)]), matrix.T[1:4].reshape(-1)
    )
    assert tensors["scalar"].load().shape == ()


def test_a_view_past_its_storage_is_refused(tmp_path):
    path = tmp_path / "past.bin"
    write_torch(path, {"w": np.zeros(8, np.float32)}, views={"w": (4, (2, 3), (3, 1))})
    with pytest.raises(InputError, match=r"past.bin: key 'w': shape \(2, 3\) reaches past the 8 values"):
        read_torch(path)


class _Evil:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _evil_pickles(witness):
    command = f"touch {witness}"
    text = command.encode()
    valid = state_dict_pickle({"w": np.zeros(2, np.float32)}, {})
    yield "posix.system", pickle.dumps({"w": _Evil(os.system, command)}, 2)
    yield "posix.system", pickle.dumps({"w": _Evil(os.system, command)}, 4)
    yield (
        "builtins.eval",
        pickle.dumps(_Evil(eval, f"__import__('os').system('{command}')"), 2).replace(b"__builtin__", b"builtins"),
    )
    yield "os.system", valid[:-1] + b"cos\nsystem\n(X" + len(text).to_bytes(4, "little") + text + b"tR."
    yield "operation INST", b"(X" + len(text).to_bytes(4, "little") + text + b"ios\nsystem\n."
    yield "operation OBJ", b"(cos\nsystem\n".replace(b"cos\nsystem", b"ccollections\nOrderedDict") + b"o."
    yield "torch.hub.load", b"\x80\x02ctorch.hub\nload\n)R."
    yield "collections.OrderedDict.__init__", b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93)R."
    yield "operation EXT1", b"\x80\x02\x82\x01."
    yield "state of a list", b"\x80\x02]}b."
    yield "to call 7", b"\x80\x02K\x07)R."
    yield "operation NEWOBJ", b"\x80\x02ccollections\nOrderedDict\n)\x81."


def test_a_malicious_pickle_executes_nothing(tmp_path):
    witness = tmp_path / "witness"
    for number, (named, data) in enumerate(_evil_pickles(witness)):
        path = tmp_path / f"evil{number}.bin"
        write_torch(path, {"w": np.zeros(2, np.float32)}, pickle=data)
        with pytest.raises(InputError, match="nothing was executed") as error:
            read_torch(path)
        assert named in str(error.value) and path.name in str(error.value)
        assert not witness.exists()


def test_control_the_first_pickle_does_act_when_executed(tmp_path):
    witness = tmp_path / "witness"
    pickle.loads(next(_evil_pickles(witness))[1])
    assert witness.exists()


@pytest.mark.parametrize(
    "data",
    (
        b"",
        b".",
        b"\x80\x02}",
        b"\x80\x02}q\xffh\x01.",
        b"\x80\x02(t\x86.",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"garbage",
        b"\x80\x02Q.",
        b"\x80\x02}K\x01K\x02u.",
        b"\x80\x02" + b"]" * 5000 + b"a" * 6000 + b".",
        b"\x80\x02h\x05.",
    ),
)
def test_a_broken_pickle_is_an_input_error(tmp_path, data):
    path = tmp_path / "broken.bin"
    write_torch(path, {"w": np.zeros(2, np.float32)}, pickle=data)
    with pytest.raises(InputError, match="broken.bin"):
        read_torch(path)


def _nested(depth):
    """A tuple that holds the one before it twice, `depth` times over: its hash and its text take 2^depth steps."""
    return b"\x80\x02)" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))


@pytest.mark.parametrize(
    "data, words",
    [
        (b"\x80\x02}r\xff\xff\xff\x7f.", None),  # a memo by index would take 32 GiB
        (b"\x80\x02}r\xff\xff\xff\xff" + b"h\x00.", "corrupt"),
        (b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f.", "operation BYTEARRAY8"),  # allocates before it reads
        (b"\x80\x02I" + b"9" * 1_000_000 + b"\n.", "operation INT"),  # quadratic in its digits
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "operation LONG4"),
        (b"\x80\x04\x95" + b"\xff" * 8 + b".", "corrupt"),  # a frame longer than memory
        (_nested(60) + b"}" + b"h\x3bK\x01s.", "a key that is a tuple"),
        (b"\x80\x02}" + _nested(60)[2:] + b"K\x01s.", "a key that is a tuple"),
        (_nested(60) + b")R.", "to call a tuple"),
        (_nested(60) + b"Q.", "corrupt"),
        (b"\x80\x02" + b")\x85" + b"\x85" * 300_000 + b"}" + b"h\x00.", "corrupt"),  # deeper than the C stack
        (b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"K\x01s.", "a key that is a tuple"),
    ],
    ids=range(12),
)
def test_pickles_that_would_take_all_memory_or_time(tmp_path, data, words):
    import resource
    import time

    path = tmp_path / "greedy.bin"
    write_torch(path, {"w": np.zeros(2, np.float32)}, pickle=data)
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if words is None:
        assert read_torch(path) == []
    else:
        with pytest.raises(InputError, match=f"greedy.bin: .*{words}") as error:
            read_torch(path)
        assert len(str(error.value)) < 2000
    assert time.perf_counter() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 << 10  # KB


def test_a_tensor_with_figures_beyond_any_file(tmp_path):
    """Products of a million large dimensions would take hours."""
    path = tmp_path / "figures.bin"
    good = state_dict_pickle({"w": np.zeros(2, np.float32)}, {})
    shape = b"(" + b"J\x02\x00\x00\x00" + b"t"
    assert good.count(shape) == 1
    large = b"\x8a\xff" + b"\xff" * 254 + b"\x7f"
    for wrong in (b"(" + large * 50_000 + b"t", b"(" + large + b"t", b"(" + b"K\x01" * 65 + b"t"):
        write_torch(path, {"w": np.zeros(2, np.float32)}, pickle=good.replace(shape, wrong))
        with pytest.raises(InputError, match="figures.bin: .*corrupt"):
            read_torch(path)


def test_a_repeated_key_is_refused(tmp_path):
    path = tmp_path / "twice.bin"
    tensors = {"v": np.zeros(2, np.float32), "w": np.ones(2, np.float32)}
    good = state_dict_pickle(tensors, {})
    write_torch(path, tensors, pickle=good.replace(b"X\x01\x00\x00\x00v", b"X\x01\x00\x00\x00w"))
    with pytest.raises(InputError, match="twice.bin: key 'w' stands twice"):
        read_torch(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_every_cut_and_many_flips_of_a_pickle_are_input_errors_or_harmless(tmp_path):
    """Nothing but InputError may come out of the machine, whatever the bytes are."""
    tensors = {"w": np.zeros((2, 2), np.float32), "v": np.zeros(3, np.float16)}
    good = state_dict_pickle(tensors, {})
    generator = np.random.default_rng(0)
    variants = [good[:length] for length in range(0, len(good), 7)]
    for _ in range(200):
        broken = bytearray(good)
        broken[generator.integers(len(good))] = generator.integers(256)
        variants.append(bytes(broken))
    refused = 0
    for data in variants:
        path = tmp_path / "flip.bin"
        write_torch(path, tensors, pickle=data)
        try:
            read_torch(path)
        except InputError:
            refused += 1
    assert refused > len(variants) // 2


def test_old_format_and_other_files(tmp_path):
    old = tmp_path / "old.bin"
    old.write_bytes(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19." + b"x" * 100)
    with pytest.raises(InputError, match="old.bin: PyTorch's format of before version 1.6"):
        read_torch(old)
    page = tmp_path / "page.bin"
    page.write_text("<html>404</html>")
    with pytest.raises(InputError, match="page.bin: not a PyTorch file"):
        read_torch(page)
    packed = tmp_path / "packed.bin"
    write_torch(tmp_path / "plain.bin", {"w": np.zeros(200, np.float32)})
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(InputError, match="packed.bin: key 'w': .*compressed"):
        read_torch(packed)


def test_wrapped_and_wrong_contents(tmp_path):
    inner = state_dict_pickle({"w": np.ones(4, np.float32)}, {})[2:-1]  # without PROTO and STOP
    write_torch(
        tmp_path / "wrapped.bin",
        {"w": np.ones(4, np.float32)},
        pickle=b"\x80\x02}X\x0a\x00\x00\x00state_dict" + inner + b"s.",
    )
    assert [tensor.name for tensor in read_torch(tmp_path / "wrapped.bin")] == ["w"]
    write_torch(tmp_path / "list.bin", {}, pickle=b"\x80\x02].")
    with pytest.raises(InputError, match="list.bin: holds a list"):
        read_torch(tmp_path / "list.bin")
    write_torch(tmp_path / "number.bin", {}, pickle=b"\x80\x02}X\x01\x00\x00\x00aK\x05s.")
    with pytest.raises(InputError, match="number.bin: key 'a' holds a int"):
        read_torch(tmp_path / "number.bin")


@pytest.mark.parametrize("damage", ["version", "name", "compressed"])
def test_damage_that_zipfile_does_not_call_a_bad_zip_file(tmp_path, damage):
    """NotImplementedError, UnicodeDecodeError and zlib.error: found by tests/fuzz."""
    path = tmp_path / "a.bin"
    write_torch(path, {"a": np.ones(3, np.float32)})
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    if damage == "version":
        data[central + 6] = 128  # version needed to extract, 12.8
    elif damage == "name":
        data[7] |= 8  # the local header of data.pkl says that its name is UTF-8
        data[30] = 0x85
    else:
        data[central + 10] = data[8] = 8  # deflated
        start = 30 + len("a/data.pkl")
        data[start : start + 4] = b"\xff" * 4
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"cut off or corrupt|is corrupt"):
        read_torch(path)
