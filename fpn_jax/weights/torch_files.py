"""Torch's checkpoint files, read without torch, and pickles of arrays; nothing in them is ever run.

A pickle is a program: it names functions and calls them. The reader here knows by name the calls that tensors, NumPy
arrays and plain containers are made of and replaces each by one of its own; any other name is refused. A tensor stays
a note of where its bytes lie until `array()` asks for them, so that nobody reads the optimizer's state in vain.
"""

import io
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch's format before 1.6
_LEGACY_PROTOCOL = 1001
_MAX_EXPANDED = 1 << 24  # elements that a tensor may have beyond its storage's, by strides of zero
# torch's dtype -> its class of storages, NumPy's code (None: nothing here computes with it), bytes per element
DTYPES = {
    "float32": ("FloatStorage", "f4", 4),
    "float64": ("DoubleStorage", "f8", 8),
    "float16": ("HalfStorage", "f2", 2),
    "bfloat16": ("BFloat16Storage", "u2", 2),
    "int64": ("LongStorage", "i8", 8),
    "int32": ("IntStorage", "i4", 4),
    "int16": ("ShortStorage", "i2", 2),
    "int8": ("CharStorage", "i1", 1),
    "uint8": ("ByteStorage", "u1", 1),
    "bool": ("BoolStorage", "u1", 1),
    "complex128": ("ComplexDoubleStorage", None, 16),
    "complex64": ("ComplexFloatStorage", None, 8),
    "qint8": ("QInt8Storage", None, 1),
    "quint8": ("QUInt8Storage", None, 1),
    "qint32": ("QInt32Storage", None, 4),
    "quint4x2": ("QUInt4x2Storage", None, 1),
    "quint2x4": ("QUInt2x4Storage", None, 1),
}
_BOX_MODE = "detectron2.structures.boxes.BoxMode"  # an enum in its files of proposals, whose members count from 0
_BOX_MODES = ("XYXY_ABS", "XYWH_ABS", "XYXY_REL", "XYWH_REL", "XYWHA_ABS")
_STORAGES = {storage: dtype for dtype, (storage, _, _) in DTYPES.items()} | {"UntypedStorage": "uint8"}


class FormatError(Exception):
    """What is wrong with a file and what to do about it, without the file's name."""


@dataclass
class Storage:
    """`count` elements that several tensors may share; `read` gives their bytes."""

    dtype: str
    count: int
    read: Callable[[], bytes | memoryview]
    order: str = "<"

    @cached_property
    def values(self) -> np.ndarray:
        """[count] of NumPy's dtype; bfloat16 as float32. Raises `FormatError` if there is no such or too few bytes."""
        code, size = DTYPES.get(self.dtype, ("", None, 0))[1:]
        if code is None:
            raise FormatError(f"has dtype {self.dtype}, which cannot be used here; convert it to float32")
        raw = memoryview(self.read())
        if self.count < 0 or len(raw) < self.count * size:
            raise FormatError(f"has {len(raw)} bytes where {self.count * size} belong; fetch or save the file again")
        values = np.frombuffer(raw[: self.count * size], f"{self.order}{code}")
        if self.dtype == "bfloat16":  # the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values != 0 if self.dtype == "bool" else values

    def part(self, start: int, count: int, dtype: str) -> "Storage":
        """`count` elements from the `start`-th on."""
        if start < 0 or count < 0:
            raise FormatError("has an impossible part of a storage; fetch or save the file again")
        size = DTYPES[dtype][2]
        return Storage(dtype, count, lambda: self.read()[start * size : (start + count) * size], self.order)


@dataclass
class Tensor:
    """A view of a storage, everything counted in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self) -> np.ndarray:
        """[*size], a copy of its own. Raises `FormatError` if the view reaches outside the storage."""
        values, numel = self.storage.values, math.prod(self.size)
        if len(self.size) != len(self.stride) or min(self.offset, *self.size, *self.stride, 0) < 0:
            raise FormatError("has impossible sizes or strides; fetch or save the file again")
        if numel == 0:
            return np.empty(self.size, values.dtype)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if last >= len(values) or numel > len(values) + _MAX_EXPANDED:
            raise FormatError(f"reaches outside its {len(values)} stored elements; fetch or save the file again")
        strides = [step * values.itemsize * (n > 1) for n, step in zip(self.size, self.stride, strict=True)]
        return np.array(np.lib.stride_tricks.as_strided(values[self.offset :], self.size, strides, writeable=False))


class Dtype:
    """NumPy's dtype in a pickle: what it was made with, and the byte order told afterwards."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "<"

    def set_state(self, state: tuple) -> None:
        """(version, byte order, subarray, names, fields, ...)"""
        self.order = ">" if state[1] == ">" else "<"


class PickledArray:
    """NumPy's array in a pickle; the shape, dtype and bytes come after the array itself."""

    def __init__(self, shape: tuple = (), dtype: Dtype | None = None, raw: Any = b"", fortran: bool = False):
        self.shape, self.dtype, self.raw, self.fortran = shape, dtype, raw, fortran

    def set_state(self, state: tuple) -> None:
        """(version, shape, dtype, whether in Fortran order, bytes)"""
        _, self.shape, self.dtype, self.fortran, self.raw = state

    def array(self) -> np.ndarray:
        """[*shape], a copy of its own. Raises `FormatError` for objects, strings and the like."""
        code = str(self.dtype.code if self.dtype else None)
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise FormatError(f"is a NumPy array of dtype {code}; only numbers can be read")
        raw = self.raw.encode("latin1") if isinstance(self.raw, str) else self.raw  # Python 2 had no other bytes
        values = np.frombuffer(raw, "u1" if code == "b1" else f"{self.dtype.order}{code}")
        values = values != 0 if code == "b1" else values
        if len(values) != math.prod(self.shape):  # reshape would find out what a -1 stands for
            raise FormatError(f"has {len(values)} values for shape {self.shape}; fetch or save the file again")
        return np.array(values.reshape(self.shape, order="F" if self.fortran else "C"), order="C")


@dataclass(frozen=True)
class _Global:
    """Something that a pickle names, and what is done when it is called."""

    name: str
    call: Callable[..., Any] | None = None


def _dict(items: Any = ()) -> dict:
    result: dict = {}
    for key, value in items.items() if isinstance(items, dict) else items:
        _set_item(result, key, value)
    return result


def _set_item(target: dict, key: Any, value: Any) -> None:
    # Anything may stand here; hashing a tuple in a tuple in a tuple ... would overflow the stack.
    for part in key if isinstance(key, tuple) else [key]:
        if not isinstance(part, str | bytes | int | float | None):
            raise FormatError("has a dict with keys that are no names; save the weights alone")
    if not isinstance(target, dict):
        raise ValueError("an item of what is no dict")
    target[key] = value


def _tensor(storage: Storage, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    if len(rest) > 2 and rest[-1]:  # requires_grad, hooks, flags
        raise FormatError("has a tensor that is negated or conjugated lazily; save tensor.resolve_neg() instead")
    return Tensor(storage, offset, tuple(size), tuple(stride))


def _tensor_v3(storage: Storage, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: _Global, *rest):
    dtype_name = dtype.name.removeprefix("torch.")
    count = storage.count // DTYPES[dtype_name][2] if dtype_name in DTYPES else 0
    return _tensor(Storage(dtype_name, count, storage.read, storage.order), offset, size, stride, grad, hooks, *rest)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # how Python 3 writes bytes into a pickle for Python 2
        raise FormatError(f"wants to encode text as {encoding!r}; save the weights alone")
    return text.encode("latin1")


def _member(kind: Any, name: str) -> int:
    """What getattr is called for: some versions of Python pickle a member of an enum so."""
    if not isinstance(kind, _Global) or kind.name != _BOX_MODE or name not in _BOX_MODES:
        raise FormatError(
            "has a pickle that calls getattr, which could run any code and is refused; save the weights alone"
        )
    return _BOX_MODES.index(name)


_CALLS: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "argparse.Namespace": lambda *_: {},  # torchvision's training script puts its flags beside the weights
    _BOX_MODE: lambda value: int(value),  # its members are integers
    "builtins.getattr": _member,
    "builtins.set": list,
    "builtins.frozenset": list,
    "builtins.bytes": lambda: b"",  # protocol 2 has no bytes: these are none, _codecs.encode makes some
    "_codecs.encode": _encode,
    "torch.Size": tuple,
    "torch.device": lambda *parts: ":".join(str(part) for part in parts),
    "torch.Tensor": None,
    "torch._tensor.Tensor": None,
    "torch.nn.parameter.Parameter": None,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, args, state: _call(function, args),
    "numpy.ndarray": None,
    "numpy.dtype": Dtype,
    "numpy.core.multiarray._reconstruct": lambda *_: PickledArray(),
    "numpy.core.multiarray.scalar": lambda dtype, raw: PickledArray((), dtype, raw),
    "numpy.core.numeric._frombuffer": lambda raw, dtype, shape, order: PickledArray(shape, dtype, raw, order == "F"),
}


def _find(module: str, name: str) -> _Global:
    """The allow-list. Raises `FormatError` for everything else."""
    full = f"{module}.{name}".replace("__builtin__.", "builtins.").replace("numpy._core.", "numpy.core.")
    if full in _CALLS:
        return _Global(full, _CALLS[full])
    if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
        return _Global(_STORAGES[name])
    if module == "torch" and re.fullmatch(r"b?float\w+|u?int\d+|bool|complex\d+", name):
        return _Global(full)
    what = "holds a whole model" if module.startswith(("torch.nn.", "torchvision.")) else "holds more than weights"
    raise FormatError(
        f"{what}: its pickle calls {full}, which could run any code and is refused; "
        "save the weights alone: torch.save(model.state_dict(), FILE)"
    )


def _call(function: Any, args: Any) -> Any:
    if not isinstance(function, _Global) or function.call is None:
        raise FormatError("calls what is no function; fetch or save the file again")
    return function.call(*args)


class _Machine:
    """Runs the opcodes of one pickle; `find_storage` turns torch's persistent ids into storages."""

    def __init__(self, find_storage: Callable[[Any], Storage] | None = None):
        self._find_storage = find_storage
        self._stack: list = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:
        """What the pickle holds; the stream is left right behind it."""
        for opcode, value, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                break
            self._step(opcode.name, value)
        return self._stack.pop()

    def _step(self, name: str, value: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_DICT": dict}.get(name, list)())
            case "TUPLE" | "LIST" | "FROZENSET":
                items = self._pop_mark()
                stack.append(tuple(items) if name == "TUPLE" else items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(name[-1]))))
            case "DICT":
                items = self._pop_mark()
                stack.append(_dict(zip(items[::2], items[1::2], strict=True)))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = self._pop(1) if name == "APPEND" else self._pop_mark()
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._pop(2) if name == "SETITEM" else self._pop_mark()
                for key, item in zip(items[::2], items[1::2], strict=True):
                    _set_item(stack[-1], key, item)
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self._memo[len(self._memo) if name == "MEMOIZE" else value] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[value])
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._pop_mark()
            case "GLOBAL" | "INST":
                module, _, attribute = value.partition(" ")
                stack.append(_find(module, attribute))
                if name == "INST":
                    raise FormatError("makes objects; save the weights alone")
            case "STACK_GLOBAL":
                stack.append(_find(*self._pop(2)))
            case "REDUCE" | "NEWOBJ":
                stack.append(_call(*self._pop(2)))
            case "BUILD":
                (state,) = self._pop(1)
                if isinstance(stack[-1], Dtype | PickledArray):
                    stack[-1].set_state(state)  # for all else, attributes: a state dict's versions and the like
            case "BINPERSID" if self._find_storage is not None:
                stack.append(self._find_storage(*self._pop(1)))
            case _ if value is not None and not name.startswith(("EXT", "PERSID")):
                stack.append(value)  # numbers and strings, which come with their opcode
            case _:
                raise FormatError(f"has a pickle with {name}, which weights do not need; save the weights alone")

    def _pop(self, count: int) -> list:
        items = self._stack[-count:]
        if len(items) < count:
            raise ValueError("the pickle takes more than it has")
        del self._stack[-count:]
        return items

    def _pop_mark(self) -> list:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items


def _storage_id(persistent_id: Any) -> tuple[str, str, int, Any]:
    """dtype, key, number of elements, and (key, start, count) of a part or None."""
    kind, storage_type, key, _, count, *part = persistent_id
    if kind != "storage" or not isinstance(key, str) or not isinstance(count, int) or count < 0:
        raise FormatError("refers to what is no storage; fetch or save the file again")
    return storage_type.name, key, count, part[0] if part else None


def read_zip(archive: zipfile.ZipFile) -> Any:
    """What torch.save (1.6 and later) put into an archive, its tensors as `Tensor`s that read from it.

    Raises `FormatError` for what is no such archive or holds more than tensors, and whatever zipfile raises.
    """
    names = set(archive.namelist())
    found = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
    if any(name.endswith("/constants.pkl") for name in names):
        raise FormatError("is a TorchScript archive, code and not weights; save torch.jit.load(FILE).state_dict()")
    if len(found) != 1:
        raise FormatError("is a zip archive that torch.save did not write; unpack it and give the file in it")

    def read(name: str) -> bytes:
        if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:  # it might grow a thousandfold
            raise FormatError("is a compressed archive, which torch never writes; save it again with torch.save")
        return archive.read(name)

    root = found[0].removesuffix("data.pkl")
    order = ">" if f"{root}byteorder" in names and read(f"{root}byteorder") == b"big" else "<"
    storages: dict[tuple[str, str], Storage] = {}

    def find_storage(persistent_id: Any) -> Storage:
        dtype, key, count, _ = _storage_id(persistent_id)
        return storages.setdefault((dtype, key), Storage(dtype, count, lambda: read(f"{root}data/{key}"), order))

    return _Machine(find_storage).run(io.BytesIO(read(found[0])))


def read_pickle(data: bytes) -> Any:
    """What a pickle of NumPy arrays or a torch file from before 1.6 holds, its arrays as placeholders with `array()`.

    Raises `FormatError` for what is more than arrays, and whatever comes of damaged bytes.
    """
    stream = io.BytesIO(data)
    tree = _Machine().run(stream)
    if isinstance(tree, int) and tree == MAGIC:
        return _read_legacy(stream, data)
    return tree


def _read_legacy(stream: io.BytesIO, data: bytes) -> Any:
    """Behind the magic number: the protocol, the machine it was written on, the tree, the keys, the storages."""
    if _Machine().run(stream) != _LEGACY_PROTOCOL:
        raise FormatError("was written by an unknown version of torch; save it again with a newer one")
    _Machine().run(stream)
    storages: dict[str, Storage] = {}
    places: dict[str, memoryview] = {}

    def find_storage(persistent_id: Any) -> Storage:
        dtype, key, count, part = _storage_id(persistent_id)
        storage = storages.setdefault(key, Storage(dtype, count, lambda: places[key]))
        return storage if part is None else storage.part(part[1], part[2], dtype)

    tree = _Machine(find_storage).run(stream)
    keys, position = _Machine().run(stream), stream.tell()
    for key in keys:
        storage = storages[str(key)]
        (count,) = struct.unpack_from("<q", data, position)
        end = position + 8 + count * DTYPES[storage.dtype][2]
        if count != storage.count or end > len(data):
            raise FormatError("is incomplete or damaged; fetch or save it again")
        places[key] = memoryview(data)[position + 8 : end]
        position = end
    return tree
