import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.numpy

from fpn_jax.errors import UserError
from fpn_jax.weights import files, torch_files
from fpn_jax.weights.files import read_arrays, write_arrays


@pytest.fixture(autouse=True)
def without_torch(monkeypatch):
    """These tests are of our own reader, also where torch is installed."""
    monkeypatch.setattr(files, "_load_with_torch", lambda path: None)


@pytest.fixture
def written(data_dir):
    """The folder of files that torch wrote."""
    return data_dir / "weights"


def count(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def expected_state():
    base = count(6, 4)
    return {
        "plain": count(3, 4) - 0.5,
        "base": base,
        "transposed": base.T,
        "row": base[2],
        "column": base[1:, 3],
        "every_second": base.ravel()[1::2],
        "expanded": np.repeat(count(3)[:, None], 5, 1),
        "channels_last": count(2, 3, 2, 2),
        "parameter": count(5) / 4,
        "marked": count(2),
        "marked_parameter": count(3),
        "half": count(2, 3) / 8,
        "bfloat16": -count(7) / 4,
        "double": (np.arange(4) / 3).astype(np.float32),
        "bool": np.array([True, False, True]),
        "uint8": np.arange(5, dtype=np.uint8),
        "int32": -np.arange(4, dtype=np.int32).reshape(2, 2),
        "num_batches_tracked": np.array(12345678901, np.int64),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert found[name].flags.owndata or found[name].base.flags.owndata, name


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_what_torch_wrote(written, name):
    assert_same(read_arrays(written / name), expected_state())


def test_of_a_training_checkpoint_the_weights_are_read(written):
    expected = {
        "0.weight": count(2, 3),
        "0.bias": count(2) + 10,
        "1.weight": np.ones(2, np.float32),
        "1.bias": np.zeros(2, np.float32),
        "1.running_mean": np.zeros(2, np.float32),
        "1.running_var": np.ones(2, np.float32),
        "1.num_batches_tracked": np.array(1, np.int64),
    }
    assert_same(read_arrays(written / "training.pth"), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("module.pth", r"holds a whole model: its pickle calls torch.nn.modules.container.Sequential.*state_dict\(\)"),
        ("script.pt", "is a TorchScript archive, code and not weights; save"),
        ("complex.pth", "wave has dtype complex64, which cannot be used here; convert it to float32"),
        ("uint16.pth", "codes has dtype uint16, which cannot be used"),
    ],
)
def test_what_torch_wrote_and_cannot_be_read(written, name, message):
    with pytest.raises(UserError, match=f"{name}: {message}"):
        read_arrays(written / name)


class Command:
    """Pickled, it creates a file as soon as somebody loads it with pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def legacy(body, keys=(), storages=b""):
    """Torch's format before 1.6 around a pickle that is given as bytes."""
    header = [pickle.dumps(x, 2) for x in (torch_files.MAGIC, 1001, {"little_endian": True})]
    return b"".join([*header, body, pickle.dumps(list(keys), 2), storages])


def zipped(path, body, storages=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        for i, content in enumerate(storages):
            archive.writestr(f"archive/data/{i}", content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_code_is_refused_and_not_run(tmp_path, protocol):
    body = pickle.dumps({"weight": Command(tmp_path / "ran")}, protocol)
    (tmp_path / "a.pkl").write_bytes(body)
    (tmp_path / "old.pth").write_bytes(legacy(body))
    zipped(tmp_path / "new.pth", body)
    for name in ("a.pkl", "old.pth", "new.pth"):
        with pytest.raises(UserError, match=rf"{name}: .* pickle calls \w+.system, which could run any code and is re"):
            read_arrays(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "body",
    [
        b"\x80\x02cbuiltins\neval\n.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
        b"(S'ls'\nios\nsystem\n.",  # INST
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02ctorch.storage\n_load_from_bytes\n.",
        b"\x80\x02ctorch._utils\n__builtins__\n.",
        b"\x80\x02ccollections\nOrderedDict.__init__\n.",
        b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0zlib\x86R.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nU\x01a\x81.",
        b"\x80\x02}cnumpy\nndarray\nK\x01s.",
        b"Pid\n.",  # PERSID
        b"\x80\x02X\x01\0\0\0aQ.",  # BINPERSID
        b"\x80\x02ctorch\nTensor\n)R.",
        b"\x80\x02)R.",
        b"\x80\x02K\x05.",
        b"\x80\x02].",
        b"\x80\x02}.",
        b"\x80\x02r\xff\xff\xff\xff.",
        b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02}" + b")" + b"\x85" * 60_000 + b"K\x01s.",  # a tuple too deep to be hashed
        b"\x80\x02}q\0X\x05\0\0\0modelh\0s.",  # a dict that holds itself
        b"\x80\x02\x93.",
        b"\x80\x02cnumpy\ndtype\nX\x02\0\0\0O8\x85R.",
    ],
)
def test_pickles_that_weights_are_not_made_of(tmp_path, body):
    (tmp_path / "a.pkl").write_bytes(body)
    (tmp_path / "old.pth").write_bytes(legacy(body))
    zipped(tmp_path / "new.pth", body)
    for name in ("a.pkl", "old.pth", "new.pth"):
        with pytest.raises(UserError, match=f"{name}: ") as error:
            read_arrays(tmp_path / name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 700


STORAGE = "(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu{}tQ"
TENSOR = "ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + "{}({}t({}t\x89}}tR"


def tensor_file(path, numel="K\x06", offset="K\0", size="K\x06", stride="K\x01", stored=6):
    body = "\x80\x02}X\x01\0\0\0a" + TENSOR.format(numel, offset, size, stride) + "s."
    return zipped(path, body.encode("latin1"), [count(stored).tobytes()])


def test_a_view_never_reaches_outside_its_storage(tmp_path):
    path = tmp_path / "a.pth"
    assert_same(read_arrays(tensor_file(path)), {"a": count(6)})
    assert_same(read_arrays(tensor_file(path, offset="K\x01", size="K\x02", stride="K\x04")), {"a": count(6)[1::4]})
    minus_one, huge = "J\xff\xff\xff\xff", "\x8a\x08" + "\xff" * 7 + "\x7f"
    for wrong in (
        {"offset": "K\x01"},
        {"offset": minus_one},
        {"offset": huge},
        {"size": "K\x07"},
        {"size": minus_one},
        {"size": huge},
        {"size": huge, "stride": "K\0"},
        {"stride": "K\x02"},
        {"stride": minus_one},
        {"stride": huge},
        {"stride": ""},
        {"stored": 5},
        {"numel": "K\x07"},
        {"numel": minus_one},
        {"numel": huge},
        {"offset": "G" + "\0" * 8},  # 0.0
    ):
        with pytest.raises(UserError, match=r"a.pth: "):
            read_arrays(tensor_file(path, **wrong))


def test_an_old_file_with_a_part_of_a_storage(tmp_path):
    """Torch before 0.4 kept views of storages."""
    part = "(X\x01\0\0\0vK\x02K\x03t"
    body = "\x80\x02}X\x01\0\0\0a" + TENSOR.format("K\x06" + part, "K\x01", "K\x02", "K\x01") + "s."
    content = struct.pack("<q", 6) + count(6).tobytes()
    (tmp_path / "a.pth").write_bytes(legacy(body.encode("latin1"), ["0"], content))
    assert_same(read_arrays(tmp_path / "a.pth"), {"a": count(6)[3:5]})


def test_bytes_of_a_big_endian_machine(tmp_path):
    path = tensor_file(tmp_path / "a.pth")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    np.testing.assert_array_equal(read_arrays(path)["a"], count(6).byteswap())


def test_archives_that_are_not_as_torch_writes_them(tmp_path):
    path = tensor_file(tmp_path / "a.pth")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(UserError, match=r"b.pth: is a compressed archive"):
        read_arrays(tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        archive.writestr("resnet.pth", "")
    with pytest.raises(UserError, match=r"c.pth: is a zip archive that torch.save did not write; unpack it"):
        read_arrays(tmp_path / "c.pth")


ARRAYS = {
    "conv1_w": count(2, 3, 2, 2),
    "fortran": np.asfortranarray(count(3, 4)),
    "half": count(3).astype(np.float16),
    "big": count(3).astype(">f8"),
    "ints": np.arange(4, dtype=np.int64),
    "flags": np.array([True, False]),
    "scalar": np.float32(1.5),
    "none": np.zeros((0, 2), np.float32),
}


def as_read(arrays):
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in arrays.items()}


@pytest.mark.parametrize("protocol", range(1, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_pickles_of_numpy_arrays(tmp_path, protocol, module):
    contents = {
        "detectron2": {"model": ARRAYS, "__author__": "me", "matching_heuristics": True},
        "detectron": {"blobs": ARRAYS | {"conv1_w_momentum": count(2), "lr": 0.1}, "cfg": "MODEL:\n"},
        "imagenet": OrderedDict(ARRAYS),
        "bytes": {name.encode(): array for name, array in ARRAYS.items()},
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(
            pickle.dumps(content, protocol).replace(b"numpy._core", module)
            if protocol < 4
            else pickle.dumps(content, protocol)
        )
        assert_same(read_arrays(path), as_read(ARRAYS))


def test_a_pickle_of_python_2(tmp_path):
    """As cPickle wrote Detectron's files: bytes for text, and an array's content as text."""

    def text(content):
        return b"T" + struct.pack("<i", len(content)) + content

    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"f4")
        + b"K\0K\x01\x87R(K\x03"
        + text(b"<")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )
    values = np.array([[1.5, -2, 3e38], [200, 1e-30, -0.0]], np.float32)
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85" + text(b"b") + b"tR"
    array += b"(K\x01K\x02K\x03\x86" + dtype + b"\x89" + text(values.tobytes()) + b"tb"
    items = b"(" + text(b"conv1_w") + array + text(b"lr") + b"G" + struct.pack(">d", 0.1) + b"u"
    (tmp_path / "R-50.pkl").write_bytes(b"\x80\x02}" + text(b"blobs") + b"}" + items + b"s.")
    assert_same(read_arrays(tmp_path / "R-50.pkl"), {"conv1_w": values})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": np.array([{}, None])}, "a is a NumPy array of dtype O8; only numbers"),
        ({"a": np.array(["text"])}, "a is a NumPy array of dtype U4; only numbers"),
        ({"a": np.ones(2, np.complex64)}, "a is a NumPy array of dtype c8; only numbers"),
        ({"a": np.array([1e300])}, "a has values that are too large for float32"),
        ({"a": {"b": count(2)}}, "a is a dict and no array; save the weights alone"),
        ({"model": [count(2)]}, "model is a list and no array"),
        ({"epoch": 3, "cfg": "text"}, r"has no arrays \(it has epoch, cfg\)"),
        ([count(2)], "holds a list and not arrays by their names"),
    ],
)
def test_contents_that_are_not_weights(tmp_path, content, message):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=f"a.pkl: {message}"):
        read_arrays(tmp_path / "a.pkl")


def test_an_array_whose_bytes_do_not_fill_it(tmp_path):
    body = pickle.dumps({"a": count(2, 3)}, 3)
    (tmp_path / "a.pkl").write_bytes(body.replace(b"K\x02K\x03\x86", b"K\x02K\x04\x86"))
    with pytest.raises(UserError, match=r"a has 6 values for shape \(2, 4\); fetch or save"):
        read_arrays(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html><html>", "a web page and not a file of weights; download the file that"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a pointer of git-lfs .* run: git lfs pull"),
        (b"hello", "incomplete, damaged or no file of weights"),
        (b"PK", "incomplete, damaged or no file of weights"),
        (b"PK\x03\x04", "incomplete, damaged or no file of weights"),
    ],
)
def test_files_that_people_give_by_mistake(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=f"a.pth: {message}"):
        read_arrays(tmp_path / "a.pth")


def test_paths_that_are_no_files_of_weights(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "b.pth", "no such file"),
        (tmp_path / "a.txt", "end in"),
    ):
        with pytest.raises(UserError, match=f"{path}: .*{message}"):
            read_arrays(path)


def test_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    header = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]}}'
    content = (np.array([1.5, -2], "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    for length in (len(header), 0x80, 0x13C):  # the first byte of the latter two looks like a pickle and like HTML
        path.write_bytes(struct.pack("<Q", length) + header.ljust(length) + content)
        assert_same(read_arrays(path), {"a": np.array([[1.5], [-2]], np.float32)})
    path.write_bytes(path.read_bytes().replace(b"BF16", b"U16 "))
    with pytest.raises(UserError, match=r"a.safetensors: "):
        read_arrays(path)
    path.write_bytes(safetensors.numpy.save({"a": np.ones(2, np.uint16)}))
    with pytest.raises(UserError, match="a has dtype U16, which cannot be used"):
        read_arrays(path)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_writing_and_reading_again(tmp_path, suffix):
    path = tmp_path / "new" / f"a{suffix}"
    arrays = ARRAYS | {"every_second": count(9)[::2], "wide": np.broadcast_to(count(1), (2, 3)), "größe": count(300)}
    write_arrays(path, arrays)
    found = read_arrays(path)
    assert_same({name: found[name] for name in arrays}, as_read(arrays))
    assert suffix == ".safetensors" or list(found) == list(arrays)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    first = path.read_bytes()
    write_arrays(path, arrays)
    assert path.read_bytes() == first


def test_the_archive_is_laid_out_as_torch_does(tmp_path, written):
    """Uncompressed, each tensor at a multiple of 64 bytes, and with the opcodes of torch's own file."""
    write_arrays(tmp_path / "a.pth", expected_state())
    data = (tmp_path / "a.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
            assert (info.header_offset + 30 + name + extra) % 64 == 0 and info.compress_type == zipfile.ZIP_STORED
        names = archive.namelist()
    with zipfile.ZipFile(written / "zip.pth") as archive:
        theirs = {name.partition("/")[2] for name in archive.namelist()}
    assert {name.partition("/")[2] for name in names if "/data/" not in name} <= theirs


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_cannot_be_written(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"a{suffix}"
    for wrong in (np.array(["text"]), np.ones(1, np.complex64), np.array([None])):
        with pytest.raises(UserError, match=r": b has dtype \w+, which cannot be written; convert it to float32"):
            write_arrays(path, {"b": wrong})
    with pytest.raises(UserError, match=r"a.npz: weights are written as .pth, .pt, .safetensors; choose"):
        write_arrays(tmp_path / "a.npz", ARRAYS)
    write_arrays(path, {"a": count(2)})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        write_arrays(path, {"a": count(3)})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert_same(read_arrays(path), {"a": count(2)})


@pytest.fixture
def samples(written, tmp_path):
    """One small file of each kind: its suffix and content."""
    write_arrays(tmp_path / "a.safetensors", ARRAYS)
    return {
        "zip": (".pth", (written / "zip.pth").read_bytes()),
        "legacy": (".pth", (written / "legacy.pth").read_bytes()),
        "pickle 2": (".pkl", pickle.dumps({"model": ARRAYS}, 2)),
        "pickle 5": (".pkl", pickle.dumps({"model": ARRAYS}, 5)),
        "safetensors": (".safetensors", (tmp_path / "a.safetensors").read_bytes()),
    }


def test_a_file_that_was_cut_off(samples, tmp_path):
    rng = random.Random(0)
    for suffix, content in samples.values():
        path = tmp_path / f"cut{suffix}"
        lengths = {*range(40), *rng.sample(range(len(content)), 60), len(content) - 2, len(content) - 1}
        for length in lengths:
            path.write_bytes(content[:length])
            with pytest.raises(UserError, match=f"cut{suffix}: ") as error:
                read_arrays(path)
            assert "\n" not in str(error.value)


def test_a_file_with_wrong_bytes(samples, tmp_path):
    """Whatever is in a file, reading it gives arrays or one line."""
    rng = random.Random(1)
    for suffix, content in samples.values():
        path = tmp_path / f"spoiled{suffix}"
        for _ in range(150):
            spoiled = bytearray(content)
            for _ in range(rng.choice((1, 1, 3))):
                spoiled[rng.randrange(len(spoiled))] = rng.choice((0, 255, rng.randrange(256), ord("."), ord("R")))
            path.write_bytes(spoiled)
            try:
                found = read_arrays(path)
            except UserError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            else:
                assert all(isinstance(array, np.ndarray) for array in found.values())
