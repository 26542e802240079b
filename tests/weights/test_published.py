import functools
import hashlib
import os
import re
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fpn_jax.errors import UserError
from fpn_jax.weights import published
from fpn_jax.weights.published import BASES, DETECTRON2, TORCHVISION, fetch

CONTENT = bytes(range(256)) * 5000
SHA256, MD5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, /broken/... with half of what it promises, and /slow/... when a client waits long enough."""

    def log_message(self, *args):
        del args

    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path.startswith("/broken/"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[: len(CONTENT) // 2])
        elif self.path.startswith("/slow/"):
            self.server.stopped.wait(10)
        elif self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.end_headers()
        else:
            super().do_GET()


@pytest.fixture(autouse=True)
def without_proxies(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(tmp_path):
    """A server on this machine with `.url`, `.folder` that it serves and `.requests` that it got."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    server.url, server.folder = f"http://127.0.0.1:{server.server_port}", folder
    server.requests, server.stopped = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def serve(server, path, content=CONTENT):
    file = server.folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return f"{server.url}/{path}"


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_local_paths(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    path.write_bytes(b"")
    assert fetch(str(path)) == fetch(path) == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch("~/a.pth") == path
    for missing in (tmp_path / "b.pth", tmp_path):
        with pytest.raises(
            UserError, match=rf"^{missing}: no such file; give a file of weights or an address \(torchv"
        ):
            fetch(missing)


@pytest.mark.parametrize("way", ["", "moved/"])
def test_a_file_is_fetched_once(server, cache, way):
    serve(server, f"models/net-{SHA256[:8]}.pth")
    address = f"{server.url}/{way}models/net-{SHA256[:8]}.pth"
    path = fetch(address, cache)
    assert path.read_bytes() == CONTENT and path.suffix == ".pth" and cache in path.parents
    assert files_in(cache) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~current_umask()  # others may use a shared cache
    asked = len(server.requests)
    assert fetch(address, cache) == path
    assert len(server.requests) == asked


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_damaged_file_in_the_cache_is_fetched_anew(server, cache):
    address = serve(server, f"net-{SHA256[:8]}.pth")
    path = fetch(address, cache)
    path.write_bytes(CONTENT[:-1])
    assert fetch(address, cache).read_bytes() == CONTENT
    assert len(server.requests) == 2
    plain = serve(server, "plain.pth")
    fetch(plain, cache).write_bytes(b"mine")
    assert fetch(plain, cache).read_bytes() == b"mine"  # nothing tells that it is damaged


def test_a_wrong_hash(server, cache):
    address = serve(server, "net-0123abcd.pth")
    with pytest.raises(
        UserError, match=rf"^{address}: .* sha256 {SHA256[:8]}\.\.\. and not 0123abcd\.\.\.; try again, or"
    ):
        fetch(address, cache)
    assert files_in(cache) == []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("/broken/net.pth", rf"the download broke off after {len(CONTENT) // 2} of {len(CONTENT)} bytes; try again"),
        ("/broken/net-0123abcd.pth", "the download broke off after"),
        ("/net.pth", "the server says 404 File not found; check it"),
        ("/slow/net.pth", r"the download failed \(TimeoutError: timed out\); try again"),
        ("/a b.pth", r"the download failed \(InvalidURL: .*\)"),
    ],
)
def test_downloads_that_fail(server, cache, monkeypatch, address, message):
    monkeypatch.setattr(published, "_TIMEOUT", 0.2)
    with pytest.raises(UserError, match=f"^{server.url}{address}: {message}.* download it yourself and give the path$"):
        fetch(server.url + address, cache)
    assert files_in(cache) == []


def test_no_network(cache):
    with pytest.raises(
        UserError, match=r"the download failed \(URLError: .*refused\); try again, or download it yours"
    ):
        fetch("http://127.0.0.1:9/net.pth", cache)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://", "no address of a file"),
        ("https://a.org/", "no address of a file"),
        ("http://[a/b.pth", "no address of a file"),
        ("s3://bucket/a.pth", "addresses begin with torchvision://, detectron2://, https://, http://; or give a file"),
        ("torchvision://fasterrcnn_resnet50_fpn", "no such .* the nearest are fasterrcnn_resnet50_fpn/COCO_V1, "),
        ("torchvision://resnet50/IMAGENET1K_V3", "no such .* the nearest are .*resnet50/IMAGENET1K_V2"),
        ("torchvision://", "no such published weights; the nearest are "),
        ("detectron2://faster_rcnn_R_101_FPN_3x", "the nearest are .*COCO-Detection/faster_rcnn_R_101_FPN_3x"),
    ],
)
def test_addresses_that_name_nothing(cache, address, message):
    with pytest.raises(UserError, match=rf"^{re.escape(address)}: .*{message}"):
        fetch(address, cache)


def test_published_weights_from_a_mirror(server, cache, monkeypatch):
    """The real files' hashes cannot be met here: that the hash is known is seen by the refusal."""
    name = "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
    serve(server, f"tv/{name}")
    base = {"torchvision": f"{server.url}/tv/", "detectron2": f"{server.url}/d2"}
    with pytest.raises(UserError, match=rf"^{server.url}/tv/{name}: what came has the sha256 .* and not 258fb6c6"):
        fetch("torchvision://fasterrcnn_resnet50_fpn/COCO_V1", cache, base)
    zoo = "COCO-Detection/faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl"
    serve(server, f"d2/{zoo}")
    for address in (f"detectron2://{zoo}", "detectron2://COCO-Detection/faster_rcnn_R_50_FPN_1x"):
        with pytest.raises(
            UserError, match=rf"^{server.url}/d2/{zoo}: what came has the md5 {MD5[:6]}.* and not b275ba"
        ):
            fetch(address, cache, base)
    serve(server, f"d2/COCO-Detection/mine/1/model_final_{MD5[:6]}.pkl")
    assert fetch(f"detectron2://COCO-Detection/mine/1/model_final_{MD5[:6]}.pkl", cache, base).read_bytes() == CONTENT
    serve(server, "d2/ImageNetPretrained/MSRA/R-50.pkl")
    monkeypatch.setenv("FPN_JAX_WEIGHTS", str(cache))
    path = fetch("detectron2://ImageNetPretrained/MSRA/R-50.pkl", base=base)
    assert path == cache / "detectron2" / "ImageNetPretrained" / "MSRA" / "R-50.pkl"


def test_names_that_carry_no_hash(server, cache):
    for name in ("net-20240131.pth", "net-1234567.pth", "model_final_facade.pkl", "net-12345678"):
        assert fetch(serve(server, name), cache).read_bytes() == CONTENT


def test_each_address_has_its_own_place_in_the_cache(server, cache):
    addresses = [serve(server, f"{name}/model.pth", name.encode()) for name in "ab"]
    fetched = [fetch(address, cache) for address in [*addresses, *(f"{address}?v=2" for address in addresses)]]
    assert [path.read_bytes() for path in fetched] == [b"a", b"b", b"a", b"b"]
    assert len(set(fetched)) == 4 and all(path.name == "model.pth" for path in fetched)
    serve(server, "c.pth", b"c")
    path = fetch(f"{server.url}/../../../c.pth", cache)
    assert cache in path.resolve().parents


def test_two_at_once_do_not_spoil_each_other(server, cache):
    address = serve(server, f"net-{SHA256[:8]}.pth")
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: fetch(address, cache), range(4)))
    assert len(paths) == 1 and files_in(cache) == list(paths)
    assert paths.pop().read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"cannot be written .*; move what is in the way or name another folder with FPN_JAX_WE"
    ):
        fetch(serve(server, "net.pth"), tmp_path / "file")


def test_the_tables():
    """Torchvision's names end in a hash, detectron2's have the form of its zoo; both are below https addresses."""
    for name, weights in TORCHVISION.items():
        assert re.fullmatch(r"\w+/(COCO|IMAGENET1K)_V\d", name)
        assert published._hash_in_name(weights.file, in_zoo=False)[0] == "sha256"
        assert (weights.box_ap is None) == ("IMAGENET" in name)
    for name, weights in DETECTRON2.items():
        algorithm = published._hash_in_name(weights.file, in_zoo=True)[0]
        assert algorithm == ("" if "ImageNet" in name else "md5")
    assert all(base.startswith("https://") and base.endswith("/") for base in BASES.values())
