import errno
import functools
import json
import shutil
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny_coco import content, write_folder, write_images, write_json

from fpn_jax.data import coco_files
from fpn_jax.data.datasets import list_splits, open_split
from fpn_jax.data.preparation import prepare
from fpn_jax.errors import UserError

LAYOUTS = {
    "annotations and images by split": ("annotations/instances_{}.json", "images/{}"),
    "json at the top, images by split": ("instances_{}.json", "{}"),
    "one folder of images": ("annotations/instances_{}.json", "images"),
    "images beside the json": ("instances_{}.json", "."),
    "Roboflow": ("{}/_annotations.coco.json", "{}"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    annotations, images = LAYOUTS[layout]
    for split in ("train", "valid-2"):
        write_json(tmp_path / annotations.format(split), content())
        write_images(tmp_path / images.format(split))
    found = coco_files.folder_splits(tmp_path)
    assert [files.split for files in found] == ["train", "valid-2"]
    for files in found:
        assert files.images.missing(["003.jpg", "007.jpg", "1.jpg"]) == ["1.jpg"]
        assert files.images.read("003.jpg")[:2] == b"\xff\xd8"


def test_a_single_file_is_the_split_train(tmp_path):
    write_json(tmp_path / "instances.json", content())
    assert [files.split for files in coco_files.folder_splits(tmp_path)] == ["train"]


def test_a_split_finds_its_own_images_first(tmp_path):
    root = write_folder(tmp_path, ("train", "val"))
    (root / "images" / "train" / "003.jpg").write_bytes(b"of train")
    (root / "images" / "val" / "003.jpg").write_bytes(b"of val")
    (root / "003.jpg").write_bytes(b"of nobody")
    train, val = coco_files.folder_splits(root)
    assert (train.images.read("003.jpg"), val.images.read("003.jpg")) == (b"of train", b"of val")


def test_images_are_looked_for_from_the_splits_own_folder_outwards(tmp_path):
    write_json(tmp_path / "annotations" / "instances_train.json", content())
    folders = [tmp_path / name for name in ("images/train", "train", "images", "annotations", ".")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "003.jpg").write_text(str(folder))
    for folder in folders:
        (files,) = coco_files.folder_splits(tmp_path)
        assert files.images.read("003.jpg").decode() == str(folder)
        (folder / "003.jpg").unlink()
    assert coco_files.FolderImages([tmp_path / "no", tmp_path]).looked_in() == str(tmp_path)


def test_annotations_in_their_own_folder_come_first(tmp_path):
    for name in ("instances_old.json", "annotations/instances_new.json"):
        write_json(tmp_path / name, content())
    assert [files.split for files in coco_files.folder_splits(tmp_path)] == ["new"]


def test_folders_that_are_not_there_or_have_no_annotations(tmp_path):
    with pytest.raises(UserError, match=r"--source=.*/none: no such folder; give a COCO-format folder, coco/2017 or"):
        coco_files.folder_splits(tmp_path / "none")
    write_images(tmp_path / "images")
    with pytest.raises(UserError, match=r"no COCO annotations; looked for annotations/instances_SPLIT.json, "):
        coco_files.folder_splits(tmp_path)


def test_split_names_that_tfds_cannot_take(tmp_path):
    for name in ("all", "a b", "train[0]"):
        root = tmp_path / name
        write_json(root / f"instances_{name}.json", content())
        with pytest.raises(UserError, match=r"instances_.*: .* cannot be the name of a split; rename the file"):
            coco_files.folder_splits(root)


def test_a_split_may_begin_with_all(tmp_path):
    write_json(tmp_path / "instances_all_of_it.json", content())
    assert [files.split for files in coco_files.folder_splits(tmp_path)] == ["all_of_it"]


def test_half_of_coco_2017_is_a_folder_like_any_other(tmp_path):
    for split in ("val2017", "mine"):
        write_json(tmp_path / f"instances_{split}.json", content())
    assert [files.split for files in coco_files.folder_splits(tmp_path)] == ["mine", "val2017"]
    assert not coco_files.is_coco_2017(tmp_path)
    write_json(tmp_path / "instances_train2017.json", content())
    assert coco_files.is_coco_2017(tmp_path)


def _coco_2017(root):
    """The official archives' layout with three images in each."""
    for split in ("train2017", "val2017"):
        write_json(root / "annotations" / f"instances_{split}.json", content())
        write_json(root / "annotations" / f"captions_{split}.json", {})
        write_images(root / split)
    return root


def _zip(folder, archive, *names):
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as file:
        for name in names:
            for path in sorted((folder / name).rglob("*")):
                file.write(path, path.relative_to(folder))


@pytest.fixture
def mirror(tmp_path):
    """The address of a server of small archives on this machine, and the folder that it serves."""
    unpacked, served = _coco_2017(tmp_path / "unpacked"), tmp_path / "served"
    for split in ("train2017", "val2017"):
        _zip(unpacked, served / "zips" / f"{split}.zip", split)
    _zip(unpacked, served / "annotations" / "annotations_trainval2017.zip", "annotations")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            del args

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(served)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", served
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_folder_of_coco_2017_has_the_names_of_tfds(tmp_path):
    prepared = prepare(str(_coco_2017(tmp_path / "mscoco")), tmp_path / "data")
    assert prepared.dataset == "coco/2017"
    assert set(list_splits(tmp_path / "data", "coco/2017")) == {"train", "validation"}
    assert prepared.folder == tmp_path / "data" / "coco" / "2017" / "1.0.0" and prepared.folder.is_dir()


def test_coco_2017_is_fetched_read_from_the_archives_and_not_fetched_again(tmp_path, mirror):
    url, served = mirror
    data = tmp_path / "data"
    prepared = prepare("coco/2017", data, coco_url=url)
    assert prepared.dataset == "coco/2017" and prepared.written
    for split in ("train", "validation"):
        opened = open_split(data, "coco/2017", split)
        assert sorted(opened.index.image_id.tolist()) == [3, 5, 7]
        assert opened.category_ids == [4, 90]
        assert opened.source[0]["image"][:2] == b"\xff\xd8"
    shutil.rmtree(served)
    assert not prepare("coco/2017", data, coco_url=url).written  # nothing asks the server
    shutil.rmtree(data / "coco")
    assert prepare("coco/2017", data, coco_url=url).written  # from the archives in data/downloads


def test_failing_downloads_are_one_line(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(coco_files, "_RETRIES", 0)
    url, served = mirror
    (served / "zips" / "val2017.zip").unlink()
    with pytest.raises(UserError, match=r"the download failed .*404.*; try again, name a mirror with --coco_url=") as e:
        prepare("coco/2017", tmp_path / "data", coco_url=url)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"^http://127.0.0.1:9: the download failed"):
        prepare("coco/2017", tmp_path / "data", coco_url="http://127.0.0.1:9")
    assert not (tmp_path / "data" / "coco").exists()


def test_archives_are_fetched_smallest_first_and_each_split_reads_its_own_annotations(tmp_path, monkeypatch):
    unpacked, asked = _coco_2017(tmp_path / "unpacked"), []
    write_json(unpacked / "annotations" / "instances_val2017.json", {"of": "val"})

    def download(manager, url):
        asked.append(url.removeprefix("http://here/"))
        archive = tmp_path / asked[-1]
        _zip(unpacked, archive, "annotations" if "annotations" in archive.stem else archive.stem)
        return archive

    monkeypatch.setattr(coco_files.tfds.download.DownloadManager, "download", download)
    train, val = coco_files.coco_2017_splits(tmp_path / "data", "http://here/")
    assert asked == ["annotations/annotations_trainval2017.zip", "zips/val2017.zip", "zips/train2017.zip"]
    assert json.loads(train.read_annotations()) == json.loads(json.dumps(content()))
    assert json.loads(val.read_annotations()) == {"of": "val"}


def test_what_failed_a_download_is_told_in_its_own_words(tmp_path, monkeypatch):
    wrapped = RuntimeError("retried too often")  # as urllib3's, in an error of requests
    wrapped.reason = ValueError("no such host\nand much more")
    monkeypatch.setattr(coco_files.tfds.download.DownloadManager, "download", _raise(ConnectionError(wrapped)))
    with pytest.raises(UserError, match=r"download failed \(ConnectionError: no such host\); try again"):
        coco_files.coco_2017_splits(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_take_a_download_is_not_blamed_on_the_network(tmp_path, monkeypatch, number):
    monkeypatch.setattr(coco_files.tfds.download.DownloadManager, "download", _raise(OSError(number, "no")))
    with pytest.raises(OSError) as told:
        coco_files.coco_2017_splits(tmp_path)
    assert told.value.errno == number


def _raise(error):
    def download(*_):
        raise error

    return download


def test_damaged_archives_are_named(tmp_path, mirror):
    url, served = mirror
    archive = served / "zips" / "val2017.zip"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"val2017.*\.zip: not a whole zip archive .*; remove it and run this again"):
        prepare("coco/2017", tmp_path / "data", coco_url=url)
    shutil.rmtree(tmp_path / "data")
    spoiled = bytearray(whole)
    spoiled[len(whole) // 3] ^= 255
    archive.write_bytes(spoiled)
    with pytest.raises(UserError, match=r"val2017.*\.zip: val2017/\d+.jpg is damaged .*; remove the archive"):
        prepare("coco/2017", tmp_path / "data", coco_url=url)


def test_the_official_archives_are_checked(tmp_path, mirror, monkeypatch):
    """Where the address is the official one, an archive of another size or sum is refused."""
    monkeypatch.setattr(coco_files, "COCO_URL", mirror[0])
    with pytest.raises(UserError, match=r"the download failed \(NonMatchingChecksumError"):
        prepare("coco/2017", tmp_path / "data")


def test_sizes_and_sums_are_those_that_tfds_publishes():
    from tensorflow_datasets.core.download import checksums

    published = checksums.get_all_url_infos()
    for path, (size, sha256) in coco_files._ARCHIVES_2017.items():
        info = published[f"http://images.cocodataset.org/{path}"]
        assert (info.size, info.checksum) == (size, sha256)
