"""Files of proposals of Detectron and detectron2: read, and nothing in them run."""

import enum
import os
import pickle
import struct
import sys
import types

import numpy as np
import pytest
from some_proposals import BOXES, IDS, SCORES, assert_same, made, refused

from fpn_jax.data.proposals import ProposalTable
from fpn_jax.given_proposals import read_proposals
from fpn_jax.weights.files import read_proposals_pickle


class BoxMode(enum.IntEnum):
    """detectron2's, as far as a pickle is concerned."""

    XYXY_ABS = 0
    XYWH_ABS = 1
    XYXY_REL = 2


BoxMode.__module__ = "detectron2.structures.boxes"


class ByName:
    """Pickled as Python 3.11.0 pickles a member of an enum: by getattr."""

    def __init__(self, kind, name):
        self.kind, self.name = kind, name

    def __reduce__(self):
        return getattr, (self.kind, self.name)


@pytest.fixture
def detectron2(monkeypatch):
    """pickle writes the members of BoxMode only if it finds where they claim to be from."""
    for name in ("detectron2", "detectron2.structures", "detectron2.structures.boxes"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["detectron2.structures.boxes"].BoxMode = BoxMode


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_detectron_and_detectron2(tmp_path, protocol, detectron2):
    path = tmp_path / "p.pkl"
    corners = {"boxes": BOXES, "scores": SCORES, "ids": IDS}
    sides = [np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1) for boxes in BOXES]
    for content in (
        corners | {"cfg": "MODEL:\n  FASTER_RCNN: True\n"},
        {"boxes": BOXES, "objectness_logits": SCORES, "ids": IDS, "bbox_mode": BoxMode.XYXY_ABS},
        {"boxes": sides, "objectness_logits": SCORES, "indexes": np.array(IDS), "bbox_mode": BoxMode.XYWH_ABS},
        {"boxes": sides, "scores": SCORES, "ids": IDS, "bbox_mode": ByName(BoxMode, "XYWH_ABS")},
        {"boxes": sides, "scores": SCORES, "ids": tuple(np.int64(x) for x in IDS), "bbox_mode": np.int64(1)},
        {"boxes": [x.tolist() for x in sides], "scores": SCORES, "ids": [str(x) for x in IDS], "bbox_mode": 1},
        {key.encode(): value for key, value in corners.items()},
    ):
        path.write_bytes(pickle.dumps(content, protocol))
        table = read_proposals(path)
        assert table.image_id.tolist() == IDS and table.file == str(path)
        assert_same(table, made())
    path.write_bytes(pickle.dumps({"boxes": np.stack([BOXES[0]] * 2), "ids": [1, 2]}, protocol))
    assert_same(read_proposals(path), ProposalTable.from_lists([1, 2], [BOXES[0]] * 2))
    assert read_proposals_pickle(path)["scores"] is None


def test_a_pickle_of_python_2(tmp_path):
    """As cPickle wrote Detectron's: text for names and for the bytes of arrays."""

    def text(content):
        return b"T" + struct.pack("<i", len(content)) + content

    def array(values):
        dtype = b"cnumpy\ndtype\n" + text(b"f4") + b"K\0K\x01\x87R(K\x03" + text(b"<") + b"NNNJ\xff\xff\xff\xff"
        dtype += b"J\xff\xff\xff\xffK\0tb"
        shape = b"(" + b"".join(b"K" + bytes([n]) for n in values.shape) + b"t"
        made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0t" + text(b"b") + b"tR"
        return made + b"(K\x01" + shape + dtype + b"\x89" + text(values.tobytes()) + b"tb"

    def listed(items):
        return b"](" + b"".join(items) + b"e"

    entries = [text(b"boxes"), listed(map(array, BOXES)), text(b"scores"), listed(map(array, SCORES))]
    entries += [text(b"ids"), listed(b"J" + struct.pack("<i", x) for x in IDS), text(b"cfg"), text(b"a\xfc")]
    (tmp_path / "p.pkl").write_bytes(b"\x80\x02}(" + b"".join(entries) + b"u.")
    assert_same(read_proposals(tmp_path / "p.pkl"), made())


class Command:
    """Pickled, it creates a file as soon as somebody loads it with pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_of_code_is_refused_and_not_run(tmp_path, protocol):
    path, command = tmp_path / "p.pkl", Command(tmp_path / "ran")
    for content in (
        {"boxes": BOXES, "scores": SCORES, "ids": IDS, "bbox_mode": command},
        {"boxes": [command], "ids": [1]},
    ):
        path.write_bytes(pickle.dumps(content, protocol))
        refused(
            path, r".* pickle calls \w+\.system, which could run any code and is refused; save a dict of boxes, scores"
        )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (b"cos\nsystem\n", "__call__"),
        (b"cbuiltins\nbytes\n", "join"),
        (b"cdetectron2.structures.boxes\nBoxMode\n", "__class__"),
        (b"cdetectron2.structures.boxes\nBoxMode\n", ["XYXY_ABS"]),
        (b"}", "get"),
    ],
)
def test_getattr_gives_members_of_box_mode_only(tmp_path, kind, name):
    names = pickle.dumps(name, 2)[2:-1]
    body = b"\x80\x02}X\x09\0\0\0bbox_modecbuiltins\ngetattr\n(" + kind + names + b"tRs."
    (tmp_path / "p.pkl").write_bytes(body)
    refused(tmp_path / "p.pkl", ".* calls .*, which could run any code and is refused; save a dict of boxes")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([BOXES], "holds a list; save a dict of boxes, scores and ids"),
        ({"boxes": BOXES, "scores": SCORES}, r"has no list of ids \(it has boxes, scores\); save"),
        ({"ids": IDS, "scores": SCORES}, "has no list of boxes"),
        ({"ids": IDS, "boxes": {}}, "has no list of boxes"),
        ({"ids": IDS, "boxes": BOXES, "scores": 3}, "has no list of scores"),
        ({"ids": [1, 2, "a.jpg"], "boxes": BOXES}, r"ids\[2\] is 'a.jpg'; image ids must be integers"),
        ({"ids": [1, 2.0, 3], "boxes": BOXES}, r"ids\[1\] is '2.0'; image ids must be integers"),
        ({"ids": [1, 1, 3], "boxes": BOXES}, "image id 1 occurs 2 times"),
        ({"ids": IDS, "boxes": BOXES[1:]}, "2 arrays of boxes for 3 images"),
        ({"ids": IDS, "boxes": BOXES, "bbox_mode": 2}, "bbox_mode is 2; save boxes in pixels, 0 .x1 y1 x2 y2. or 1"),
        ({"ids": IDS, "boxes": BOXES, "scores": BOXES}, r"image id 139: scores are of shape \[2, 4\] for 2 boxes"),
        ({"ids": [1], "boxes": [{"a": 3}]}, "image id 1: boxes are no array of numbers"),
        ({"ids": [1], "boxes": [np.array([None])]}, r"boxes\[0\] is a NumPy array of dtype O8"),
        (
            {"ids": [1], "boxes": [np.ones((2, 4)) * [9, 0, 1, 1]]},
            r"image id 1, box 0: \[9.0, 0.0, 1.0, 1.0\] is no box",
        ),
    ],
)
def test_a_pickle_that_holds_no_proposals(tmp_path, content, message):
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps(content, 4))
    refused(path, message)
