"""Named arrays from checkpoint files and into them: torch's, safetensors', detectron2's and Detectron's pickles.

Reading runs nothing that a file holds. Torch is used where it is installed, and is not needed.
"""

import contextlib
import math
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.numpy

from fpn_jax.errors import UserError, remedy
from fpn_jax.weights import torch_files
from fpn_jax.weights.torch_files import FormatError

READABLE = (".pth", ".pt", ".bin", ".pkl", ".safetensors")
WRITABLE = (".pth", ".pt", ".safetensors")
# Where training scripts put the weights in a checkpoint, the first that is there. `blobs` is Detectron's. Averaged
# weights are taken where there are no others: the published files hold one set only.
_ENVELOPES = ("model", "state_dict", "model_state_dict", "model_state", "blobs", "model_ema")
_METADATA = (str, bytes, bool, int, float, type(None))
_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_STORAGES = {dtype: storage for dtype, (storage, code, _) in torch_files.DTYPES.items() if code}
_ALIGNMENT = 64  # bytes, of a tensor in torch's archive, for torch.load(mmap=True)


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The weights in a file, {name: array}, in its order; floats as float32, integers and booleans as they are.

    The file's content decides how it is read. Weights may lie under `model`, `state_dict`, `model_state_dict`,
    `model_state`, `blobs` or `model_ema`; what lies beside them (an optimizer's state, say) is dropped, as are texts
    and numbers among them, torch's `_extra_state` and the `*_momentum` of Detectron's pickles. The `module.` of
    DistributedDataParallel is taken off names that all have it.

    Raises `UserError` if the file is not there, not whole, not of weights, or holds anything but arrays and plain
    values: nothing that a pickle wants to call is ever called.
    """
    path = Path(path)
    kind = _kind(path, _read_head(path))
    with _faults_told(path, "weights"), _opened(path, kind) as tree:
        return _arrays(tree, drop_momentum=kind == "pickle")


def read_proposals_pickle(path: str | os.PathLike) -> dict[str, Any]:
    """What a file of proposals of Detectron or detectron2 holds, .pkl, for `data.proposals.ProposalTable.from_lists`.

        ids        n integers
        boxes      n arrays [n_i 4], of whatever shape and values the file has
        scores     n arrays [n_i], or None if it has none
        bbox_mode  0: boxes are x1 y1 x2 y2 (all of Detectron's), 1: x y width height

    Raises `UserError` if the file is not there, not whole, has other entries, or holds anything but arrays and plain
    values: nothing that a pickle wants to call is ever called.
    """
    path = Path(path)
    _read_head(path, "proposals", (".pkl",))
    with _faults_told(path, "proposals"):
        try:
            tree = torch_files.read_pickle(path.read_bytes())
        except FormatError as error:
            what = str(error).partition("; ")[0]  # what to do about it is another thing with weights
            raise FormatError(f"{what}; save a dict of boxes, scores and ids, lists of NumPy arrays") from None
        return _proposals(tree)


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays so that torch.load(path, weights_only=True) or safetensors give tensors of these names and values.

    The suffix decides: .pth or .pt, in the given order and without torch, or .safetensors. The file appears when it
    is whole; its folder is made. Raises `UserError` for another suffix, a dtype that the format lacks, and if the
    file cannot be written.
    """
    path = Path(path)
    if path.suffix not in WRITABLE:
        raise UserError(f"{path}: weights are written as {', '.join(WRITABLE)}; choose one of these suffixes")
    arrays = {name: _writable(path, name, array) for name, array in arrays.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if path.suffix == ".safetensors":
                file.write(safetensors.numpy.save(arrays, {"format": "pt"}))
            else:
                _write_torch(file, arrays)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {remedy(error)} or choose another folder") from None
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _faults_told(path: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a `UserError` about a file of weights or proposals."""
    try:
        yield
    except FormatError as error:
        raise UserError(_one_line(f"{path}: {error}")) from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(_one_line(f"{path}: cannot be read ({reason}); check the file and its permissions")) from None
    except Exception as error:  # torn or hostile bytes make parsers raise anything at all
        fault = f"incomplete, damaged or no file of {what} ({type(error).__name__}: {error})"
        raise UserError(_one_line(f"{path}: {fault[:300]}; fetch or save it again")) from error


def _read_head(path: Path, what: str = "weights", suffixes: tuple[str, ...] = READABLE) -> bytes:
    """The first bytes of a file that may be one of weights. Raises a `UserError` for what people give by mistake."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a file of {what} in it")
    if path.suffix not in suffixes:
        raise UserError(f"{path}: files of {what} end in {', '.join(suffixes)}; give such a file or rename it")
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
    if not head:
        raise UserError(f"{path}: the file is empty; fetch or save it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a pointer of git-lfs and not the file itself; run: git lfs pull")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path}: a web page and not a file of {what}; download the file that the page is about")
    return head


def _kind(path: Path, head: bytes) -> str:
    """zip and legacy are torch's formats since 1.6 and before."""
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[5:9] == b"\0\0\0{":  # eight bytes of length, then JSON
        return "safetensors"
    if torch_files.MAGIC.to_bytes(10, "little") in head[:20]:
        return "legacy"
    if head.startswith(b"\x80") or path.suffix == ".pkl":
        return "pickle"
    raise UserError(f"{path}: incomplete, damaged or no file of weights; fetch or save it again")


@contextlib.contextmanager
def _opened(path: Path, kind: str) -> Iterator[Any]:
    """What the file holds, with arrays readable inside the context."""
    loaded = _load_with_torch(path) if kind in ("zip", "legacy") else None
    if loaded is not None:
        yield loaded
    elif kind == "zip":
        with zipfile.ZipFile(path) as archive:
            yield torch_files.read_zip(archive)
    elif kind == "safetensors":
        yield {name: _Safetensor(**entry) for name, entry in safetensors.deserialize(path.read_bytes())}
    else:
        yield torch_files.read_pickle(path.read_bytes())


@dataclass
class _Safetensor:
    shape: list[int]
    dtype: str
    data: bytes

    def array(self) -> np.ndarray:
        """[*shape]"""
        dtype = _SAFETENSORS.get(self.dtype, self.dtype)
        return torch_files.Storage(dtype, math.prod(self.shape), lambda: self.data).values.reshape(self.shape)


def _load_with_torch(path: Path) -> Any:
    """What torch.load makes of a file; None if torch is not installed, too old, or refuses it."""
    try:
        import torch
    except ImportError:
        return None

    class Loaded:
        def __init__(self, tensor: torch.Tensor):
            self._tensor = tensor

        def array(self) -> np.ndarray:
            dtype = str(self._tensor.dtype).removeprefix("torch.")
            if dtype not in _STORAGES or self._tensor.layout is not torch.strided:
                dtype += "" if self._tensor.layout is torch.strided else f" ({self._tensor.layout})"
                raise FormatError(f"has dtype {dtype}, which cannot be used here; convert it to float32")
            tensor = self._tensor.detach().resolve_neg()
            return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    def wrapped(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: wrapped(value) for key, value in tree.items()}
        return Loaded(tree) if isinstance(tree, torch.Tensor) else tree

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return wrapped(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # whatever torch dislikes, our own reader puts into a line for the user, or reads
        return None


def _arrays(tree: Any, drop_momentum: bool) -> dict[str, np.ndarray]:
    entries = _entries(tree)
    arrays = {}
    for name, value in entries.items():
        is_metadata = isinstance(value, _METADATA) or name.endswith("_extra_state")
        if is_metadata or (drop_momentum and name.endswith("_momentum")):
            continue
        if not hasattr(value, "array"):
            raise FormatError(
                f"{name} is a {type(value).__name__} and no array; save the weights alone, by their names"
            )
        try:
            arrays[name] = _widened(value.array())
        except FormatError as error:
            raise FormatError(f"{name} {error}") from None
    if not arrays:
        shown = ", ".join(list(entries)[:5]) or "nothing"
        raise FormatError(f"has no arrays (it has {shown}); give a file of weights")
    if all(name.startswith("module.") for name in arrays):
        return {name.removeprefix("module."): array for name, array in arrays.items()}
    return arrays


def _entries(tree: Any) -> dict[str, Any]:
    """The innermost envelope's content."""
    for _ in range(4):  # a dict may hold itself
        if not isinstance(tree, dict):
            break
        entries = {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in tree.items()}
        envelope = next((name for name in _ENVELOPES if isinstance(entries.get(name), dict)), None)
        if envelope is None:
            return entries
        tree = entries[envelope]
    raise FormatError(f"holds a {type(tree).__name__} and not arrays by their names; save model.state_dict()")


def _proposals(tree: Any) -> dict[str, Any]:
    """The entries of a file of proposals. Raises `FormatError` for others."""
    if not isinstance(tree, dict):
        raise FormatError(f"holds a {type(tree).__name__}; save a dict of boxes, scores and ids")
    entries = {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in tree.items()}
    found = {}
    for name, other in (("ids", "indexes"), ("boxes", "boxes"), ("scores", "objectness_logits")):
        value = entries.get(name, entries.get(other))
        value = value.array() if hasattr(value, "array") else value
        if isinstance(value, list | tuple | np.ndarray):
            found[name] = value if isinstance(value, list) else list(value)
        elif name == "scores" and value is None:
            found[name] = None
        else:
            shown = ", ".join(list(entries)[:8]) or "nothing"
            raise FormatError(f"has no list of {name} (it has {shown}); save a dict of boxes, scores and ids")
    found["ids"] = [_image_id(value, i) for i, value in enumerate(found["ids"])]
    for name in ("boxes", "scores"):
        for i, value in enumerate(found[name] or ()):
            try:
                # In its place, so that what was read is not kept beside what comes of it.
                found[name][i] = value.array() if hasattr(value, "array") else value
            except FormatError as error:
                raise FormatError(f"{name}[{i}] {error}") from None
    mode = entries.get("bbox_mode", 0)
    mode = mode.array() if hasattr(mode, "array") else mode
    if mode not in (0, 1):
        raise FormatError(f"bbox_mode is {mode}; save boxes in pixels, 0 (x1 y1 x2 y2) or 1 (x y width height)")
    return found | {"bbox_mode": int(mode)}


def _image_id(value: Any, position: int) -> int:
    value = value.array() if hasattr(value, "array") else value
    text = value.decode("latin1") if isinstance(value, bytes) else str(value)  # some files have texts of digits
    if not re.fullmatch(r"-?\d{1,18}", text):
        raise FormatError(f"ids[{position}] is {text[:80]!r}; image ids must be integers, the data set's own")
    return int(text)


def _widened(array: np.ndarray) -> np.ndarray:
    """Floats as float32, everything in the machine's own byte order."""
    if array.dtype.kind != "f":
        return array.astype(array.dtype.newbyteorder("="))
    try:
        with np.errstate(over="raise", invalid="ignore"):
            return array.astype(np.float32)
    except FloatingPointError:
        raise FormatError("has values that are too large for float32; scale them") from None


def _writable(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """As both formats store it: contiguous, lowest byte first."""
    array = np.asarray(array)
    if array.dtype.name not in _STORAGES:
        raise UserError(f"{path}: {name} has dtype {array.dtype.name}, which cannot be written; convert it to float32")
    return array.astype(array.dtype.newbyteorder("<"), order="C")


def _write_torch(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """What torch.save of an OrderedDict of tensors with these names and values would write."""
    with zipfile.ZipFile(file, "w") as archive:
        _write_member(archive, "archive/data.pkl", _pickled(arrays))
        _write_member(archive, "archive/byteorder", b"little")
        for i, array in enumerate(arrays.values()):
            _write_member(archive, f"archive/data/{i}", array.tobytes())
        _write_member(archive, "archive/version", b"3\n")


def _write_member(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(name)  # without today's date: the same weights are the same file
    start = archive.fp.tell() + 30 + len(name) + 4  # behind the header, the name and the head of the padding
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(info, content)


def _pickled(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A pickle (protocol 2) of an OrderedDict, written opcode by opcode: pickle itself would look for torch."""
    ordered_dict = b"ccollections\nOrderedDict\n)R"
    parts = [b"\x80\x02", ordered_dict, b"("]
    for i, (name, array) in enumerate(arrays.items()):
        storage = f"ctorch\n{_STORAGES[array.dtype.name]}\n".encode()
        strides = [step // array.itemsize for step in array.strides]
        parts += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n("]
        parts += [b"(", _text("storage"), storage, _text(str(i)), _text("cpu"), _integer(array.size), b"tQ"]
        parts += [_integer(0), _integers(array.shape), _integers(strides), b"\x89", ordered_dict, b"tR"]
    return b"".join([*parts, b"u."])


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if value < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)


def _integers(values: Iterable[int]) -> bytes:
    return b"".join([b"(", *(_integer(value) for value in values), b"t"])


def _one_line(text: str) -> str:
    return " ".join(text.split())[:600]
