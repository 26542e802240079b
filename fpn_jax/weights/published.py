"""The weights that torchvision and detectron2 publish, by name, and how a file of weights is fetched."""

import contextlib
import difflib
import hashlib
import http.client
import os
import re
import secrets
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fpn_jax.errors import UserError, remedy

CACHE_VARIABLE = "FPN_JAX_WEIGHTS"
BASES = {
    "torchvision": "https://download.pytorch.org/models/",
    "detectron2": "https://dl.fbaipublicfiles.com/detectron2/",
}
_TIMEOUT = 60  # seconds without a byte
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Published:
    """A file below its publisher's base address, and what a detector's weights score on COCO val2017 by its word."""

    file: str
    box_ap: float | None = None


# model/weights as torchvision 0.28 calls them
TORCHVISION = {
    "fasterrcnn_resnet50_fpn/COCO_V1": Published("fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", 37.0),
    "fasterrcnn_resnet50_fpn_v2/COCO_V1": Published("fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth", 46.7),
    "fasterrcnn_mobilenet_v3_large_fpn/COCO_V1": Published("fasterrcnn_mobilenet_v3_large_fpn-fb6a3cc7.pth", 32.8),
    "fasterrcnn_mobilenet_v3_large_320_fpn/COCO_V1": Published(
        "fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth", 22.8
    ),
    "retinanet_resnet50_fpn/COCO_V1": Published("retinanet_resnet50_fpn_coco-eeacb38b.pth", 36.4),
    "retinanet_resnet50_fpn_v2/COCO_V1": Published("retinanet_resnet50_fpn_v2_coco-5905b1c5.pth", 41.5),
    "fcos_resnet50_fpn/COCO_V1": Published("fcos_resnet50_fpn_coco-99b0c9b7.pth", 39.2),
    "maskrcnn_resnet50_fpn/COCO_V1": Published("maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth", 37.9),
    "maskrcnn_resnet50_fpn_v2/COCO_V1": Published("maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth", 47.4),
    "resnet18/IMAGENET1K_V1": Published("resnet18-f37072fd.pth"),
    "resnet34/IMAGENET1K_V1": Published("resnet34-b627a593.pth"),
    "resnet50/IMAGENET1K_V1": Published("resnet50-0676ba61.pth"),
    "resnet50/IMAGENET1K_V2": Published("resnet50-11ad3fa6.pth"),
    "resnet101/IMAGENET1K_V1": Published("resnet101-63fe2227.pth"),
    "resnet101/IMAGENET1K_V2": Published("resnet101-cd907fc2.pth"),
    "resnet152/IMAGENET1K_V1": Published("resnet152-394f9c45.pth"),
    "resnet152/IMAGENET1K_V2": Published("resnet152-f82ba261.pth"),
    "resnext50_32x4d/IMAGENET1K_V1": Published("resnext50_32x4d-7cdf4587.pth"),
    "resnext50_32x4d/IMAGENET1K_V2": Published("resnext50_32x4d-1a0047aa.pth"),
    "resnext101_32x8d/IMAGENET1K_V1": Published("resnext101_32x8d-8ba56ff5.pth"),
    "resnext101_32x8d/IMAGENET1K_V2": Published("resnext101_32x8d-110c445d.pth"),
    "resnext101_64x4d/IMAGENET1K_V1": Published("resnext101_64x4d-173b62eb.pth"),
    "mobilenet_v3_large/IMAGENET1K_V1": Published("mobilenet_v3_large-8738ca79.pth"),
    "mobilenet_v3_large/IMAGENET1K_V2": Published("mobilenet_v3_large-5c1a4163.pth"),
}

# config -> the rest of the file's path below it, and the box AP: detectron2's model_zoo.py and MODEL_ZOO.md
_ZOO = {
    "COCO-Detection/faster_rcnn_R_50_FPN_1x": ("137257794/model_final_b275ba.pkl", 37.9),
    "COCO-Detection/faster_rcnn_R_50_FPN_3x": ("137849458/model_final_280758.pkl", 40.2),
    "COCO-Detection/faster_rcnn_R_101_FPN_3x": ("137851257/model_final_f6e8b1.pkl", 42.0),
    "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x": ("139173657/model_final_68b088.pkl", 43.0),
    "COCO-Detection/retinanet_R_50_FPN_1x": ("190397773/model_final_bfca0b.pkl", 37.4),
    "COCO-Detection/retinanet_R_50_FPN_3x": ("190397829/model_final_5bd44e.pkl", 38.7),
    "COCO-Detection/retinanet_R_101_FPN_3x": ("190397697/model_final_971ab9.pkl", 40.4),
    "COCO-Detection/rpn_R_50_FPN_1x": ("137258492/model_final_02ce48.pkl", None),
    "COCO-Detection/fast_rcnn_R_50_FPN_1x": ("137635226/model_final_e5f7ce.pkl", 37.8),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": ("137260431/model_final_a54504.pkl", 38.6),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x": ("137849600/model_final_f10217.pkl", 41.0),
    "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x": ("138205316/model_final_a3ec72.pkl", 42.9),
    "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x": ("139653917/model_final_2d9806.pkl", 44.3),
}
_BACKBONES = ("MSRA/R-50", "MSRA/R-101", "FAIR/X-101-32x8d")
DETECTRON2 = {name: Published(f"{name}/{rest}", ap) for name, (rest, ap) in _ZOO.items()} | {
    f"ImageNetPretrained/{name}.pkl": Published(f"ImageNetPretrained/{name}.pkl") for name in _BACKBONES
}
_TABLES = {"torchvision": TORCHVISION, "detectron2": DETECTRON2}


@dataclass(frozen=True)
class _Source:
    url: str
    place: str  # below the cache
    algorithm: str = ""  # of the hash that the file's name carries, "" if it carries none
    digest: str = ""  # how the hash begins


def fetch(address: str, cache_dir: str | os.PathLike | None = None, base: Mapping[str, str] | None = None) -> Path:
    """The local file for an address, downloaded unless it is in the cache.

    Args:
        address: a local path, which is returned as it is; torchvision://MODEL/WEIGHTS, the keys of `TORCHVISION`;
            detectron2://CONFIG, the keys of `DETECTRON2`, or detectron2:// and the path of any file of that zoo;
            or http(s)://...
        cache_dir: by default $FPN_JAX_WEIGHTS, or else ~/.cache/fpn_jax/weights.
        base: {"torchvision" or "detectron2": address of a mirror}, instead of `BASES`.

    A hash in the file's name is checked, also that of a file in the cache, which is fetched anew if it is damaged:
    NAME-<8 or more hex digits>.pth begins the SHA-256, as with torchvision and torch.hub (eight digits that are a date
    are none), and model_final_<6 hex digits>.pkl of detectron2's zoo the MD5, as its MODEL_ZOO.md says of every model.
    Other files are taken as they come.

    Raises `UserError` for a file that is not there, an unknown name, a failing download and a wrong hash.
    """
    scheme, separator, rest = str(address).partition("://")
    if not separator:
        path = Path(address).expanduser()
        if not path.is_file():
            known = ", ".join(f"{name}://" for name in (*BASES, "https"))
            raise UserError(f"{address}: no such file; give a file of weights or an address ({known}...)")
        return path
    source = _source(str(address), scheme, rest, dict(BASES) | dict(base or {}))
    folder = Path(cache_dir or os.environ.get(CACHE_VARIABLE) or "~/.cache/fpn_jax/weights").expanduser()
    path = folder / source.place
    if path.is_file() and _is_intact(path, source):
        return path
    _download(source, path)
    return path


def _source(address: str, scheme: str, rest: str, bases: Mapping[str, str]) -> _Source:
    if scheme in ("http", "https"):
        return _web_source(address)
    if scheme not in _TABLES:
        known = ", ".join(f"{name}://" for name in (*_TABLES, "https", "http"))
        raise UserError(f"{address}: addresses begin with {known}; or give a file's path")
    table = _TABLES[scheme]
    if rest in table:
        file = table[rest].file
    elif scheme == "detectron2" and rest.endswith(".pkl"):
        file = rest
    else:
        near = difflib.get_close_matches(rest, table, 4, 0.3) or list(table)[:4]
        raise UserError(f"{address}: no such published weights; the nearest are {', '.join(near)}")
    url = f"{bases[scheme].rstrip('/')}/{file}"
    return _Source(url, _place(scheme, file), *_hash_in_name(file, in_zoo=scheme == "detectron2"))


def _web_source(address: str) -> _Source:
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError as error:
        raise UserError(f"{address}: no address of a file ({error}); check it") from None
    if not parts.netloc or not parts.path.strip("/"):
        raise UserError(f"{address}: no address of a file; check it")
    place = _place(parts.netloc.rpartition("@")[2], parts.path)
    if parts.query:  # where the path is a script's, the query tells the files apart
        folder, _, name = place.rpartition("/")
        place = f"{folder}/{hashlib.sha256(parts.query.encode()).hexdigest()[:8]}/{name}"
    in_zoo = address.startswith(BASES["detectron2"])
    return _Source(address, place, *_hash_in_name(parts.path, in_zoo))


def _place(root: str, path: str) -> str:
    """Where a file lies in the cache; never above it."""
    parts = [re.sub(r"[^\w.+-]", "_", part) for part in (root, *path.split("/"))]
    return "/".join(part for part in parts if part.strip("."))


def _hash_in_name(file: str, in_zoo: bool) -> tuple[str, str]:
    name = file.rpartition("/")[2]
    if in_zoo and (match := re.fullmatch(r"model_\w+_([0-9a-f]{6})\.pkl", name)):
        return "md5", match[1]
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    if match and not re.fullmatch(r"(19|20)\d\d(0[1-9]|1[0-2])([0-2]\d|3[01])", match[1]):
        return "sha256", match[1]
    return "", ""


def _hasher(source: _Source) -> "hashlib._Hash":
    return hashlib.new(source.algorithm or "sha256", usedforsecurity=False)


def _is_intact(path: Path, source: _Source) -> bool:
    if not source.digest:
        return True
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: _hasher(source)).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
    return digest.startswith(source.digest)


def _download(source: _Source, path: Path) -> None:
    """Fetch to a name of this process's own, check, and rename: whoever reads `path` finds all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    hasher = _hasher(source)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            for chunk in _chunks(source.url):
                hasher.update(chunk)
                file.write(chunk)
        digest = hasher.hexdigest()
        if not digest.startswith(source.digest):
            raise UserError(
                f"{source.url}: what came has the {source.algorithm} {digest[: len(source.digest)]}... and not "
                f"{source.digest}...; {_by_hand('try again')}"
            )
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); {remedy(error)} or name another folder with "
            f"{CACHE_VARIABLE}=FOLDER"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _chunks(url: str) -> Iterator[bytes]:
    """The file's bytes; a bar on a terminal tells how far they are. Raises `UserError` if they do not all come."""
    received, total = 0, None
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "fpn_jax"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            length = response.headers.get("Content-Length") or ""
            total = int(length) if length.isdecimal() else None
            with tqdm(desc=url.rpartition("/")[2], total=total, unit="B", unit_scale=True, disable=None) as bar:
                while chunk := response.read(_CHUNK):
                    received += len(chunk)
                    bar.update(len(chunk))
                    yield chunk
    except urllib.error.HTTPError as error:
        with error:
            raise UserError(f"{url}: the server says {error.code} {error.reason}; {_by_hand('check it')}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())[:300]
        raise UserError(
            f"{url}: the download failed ({type(error).__name__}: {reason}); {_by_hand('try again')}"
        ) from None
    if total is not None and received != total:
        raise UserError(f"{url}: the download broke off after {received} of {total} bytes; {_by_hand('try again')}")


def _by_hand(first: str) -> str:
    return f"{first}, or download it yourself and give the path"
