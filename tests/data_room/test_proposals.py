"""Tables of given proposals, and files of every kind: what they hold, and what is wrong with others."""

import dataclasses
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from some_proposals import BOXES, IDS, SCORES, SIZES, assert_same, made, refused

from fpn_jax.data import proposals
from fpn_jax.data.proposals import ProposalTable
from fpn_jax.errors import UserError
from fpn_jax.given_proposals import read_proposals


def test_the_best_come_first_and_equal_ones_as_given():
    table = made()
    boxes, scores = table.of(139, 5)
    assert scores.tolist() == [0.75, 0.25] and boxes.tolist() == BOXES[0][::-1].tolist()
    assert [len(x) for x in table.of(7)] == [0, 0]
    boxes, scores = table.of(np.int64(285), 2)
    np.testing.assert_array_equal(scores, np.array([0.9, 0.5], np.float32))
    np.testing.assert_array_equal(boxes, BOXES[2][[1, 0]])
    assert SCORES[0].tolist() == [0.25, 0.75]  # what was given stays as it is
    with pytest.raises(KeyError):
        table.of(8)
    boxes, scores = made(None).of(285)
    assert scores.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(boxes, BOXES[2])


def test_order_against_a_slow_twin():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, 200)
    counts[[0, 1, 50, 51, 199]] = 0
    boxes = [np.sort(rng.uniform(0, 99, (n, 2, 2)), 1).reshape(n, 4) for n in counts]
    scores = [rng.integers(0, 4, n) / 4 for n in counts]
    table = ProposalTable.from_lists(range(200), boxes, scores)
    for i in range(200):
        order = sorted(range(counts[i]), key=lambda j: -scores[i][j])
        np.testing.assert_array_equal(table.of(i)[0], boxes[i][order].astype(np.float32))
        np.testing.assert_array_equal(table.of(i)[1], scores[i][order])


def test_boxes_of_a_pixel_or_two_are_no_fractions():
    table = ProposalTable.from_lists([3], [[[0, 0, 1.5, 1]]])
    assert table.of(3)[0].tolist() == [[0, 0, 1.5, 1]]


def test_corners_need_more_room_than_widths():
    table = ProposalTable.from_lists([3], [np.array([[200, 100, 100, 200]], np.uint8)], xywh=True)
    assert table.of(3)[0].tolist() == [[200, 100, 300, 300]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": BOXES[:2]}, "2 arrays of boxes for 3 images; give one for each"),
        ({"scores": SCORES[:1]}, "1 arrays of scores for 3 images"),
        ({"image_ids": [1, 2, 1]}, "image id 1 occurs 2 times; write the file again"),
        ({"image_ids": [1, 2, 2.5]}, "has image ids that are no integers"),
        ({"boxes": [*BOXES[:2], np.ones((3, 5))]}, r"image id 285: boxes are of shape \[3, 5\]; give four numbers"),
        ({"boxes": [*BOXES[:2], [[1, 2], [3]]]}, "image id 285: boxes are no array of numbers"),
        ({"boxes": [*BOXES[:2], np.array([["a"] * 4])]}, "image id 285: boxes are no array of numbers"),
        ({"boxes": [*BOXES[:2], BOXES[2] * np.nan]}, r"image id 285, box 0: \[nan, .* is no box; give finite x1 y1"),
        ({"boxes": [*BOXES[:2], BOXES[2].astype(float) * 1e39]}, r"image id 285, box 0: \[\d.* is no box"),
        ({"boxes": [*BOXES[:2], BOXES[2][:, [2, 1, 0, 3]]]}, r"image id 285, box 0: \[2.0, 1.0, 1.0, 2.0\] is no box"),
        ({"boxes": [BOXES[0] / 640] * 3, "scores": None}, "all boxes lie within 0 .. 1, like fractions of the image"),
        ({"scores": [*SCORES[:2], SCORES[2][:2]]}, r"image id 285: scores are of shape \[2\] for 3 boxes; give one"),
        ({"scores": [*SCORES[:2], np.array([0, np.inf, 0])]}, "image id 285, box 1: the score inf is not finite"),
    ],
)
def test_lists_that_are_no_proposals_are_refused(change, message):
    given = {"image_ids": IDS, "boxes": BOXES, "scores": SCORES} | change
    with pytest.raises(UserError, match=f"^a{{b}}.pkl: {message}"):
        ProposalTable.from_lists(**given, file="a{b}.pkl")


def test_arrays_that_do_not_fit_together_make_no_table():
    table = made()
    for change in (
        {"boxes": table.boxes[1:]},
        {"boxes": table.boxes[:, :3]},
        {"scores": table.scores[1:]},
        {"offsets": table.offsets[1:]},
        {"offsets": table.offsets[[0, 2, 1, 3]][::-1]},
        {"offsets": np.array([0, 3, 2, 5])},
        {"offsets": np.array([1, 2, 2, 5])},  # the first box is of no image,
        {"offsets": np.array([0, 2, 2, 4])},  # or the last
        {"image_id": np.array([1, 1, 2])},
    ):
        with pytest.raises(ValueError, match=r"do not fit|of shape|occurs 2 times"):
            dataclasses.replace(table, **change)


def test_the_compact_file_keeps_65535ths_of_a_side_and_ten_bytes_per_box(tmp_path):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 2000, (20, 2))
    counts = rng.integers(0, 300, 20)
    counts[3] = 0
    sides = sizes[:, [1, 0]]
    boxes = [
        np.sort(rng.uniform(-0.01, 1.01, (n, 2, 2)), 1).reshape(n, 4) * side[[0, 1, 0, 1]]
        for n, side in zip(counts, sides, strict=True)
    ]
    scores = [rng.normal(size=n) * 10 for n in counts]
    scores[0][:2] = -1e6, 1e6
    table = ProposalTable.from_lists(rng.permutation(1000)[:20], boxes, scores)
    path = tmp_path / "new" / "p.npz"
    proposals.write(path, table, sizes)
    assert path.stat().st_size < 10 * counts.sum() + 3000
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    found = read_proposals(path)
    np.testing.assert_array_equal(found.image_id, table.image_id)
    np.testing.assert_array_equal(found.offsets, table.offsets)
    assert (found.boxes.dtype, found.scores.dtype) == (np.float32, np.float32)
    for image_id, (height, width) in zip(table.image_id.tolist(), sizes.tolist(), strict=True):
        (one, a), (other, b) = table.of(image_id), found.of(image_id)
        side = np.array([width, height, width, height])
        assert (np.abs(np.clip(one, 0, side) - other) <= side / 130000).all()
        assert (other[:, 2:] >= other[:, :2]).all() and (other <= side * (1 + 1e-7)).all()
        np.testing.assert_allclose(np.clip(a, -65504, 65504), b, rtol=2**-11, atol=1e-7)
        assert (np.diff(b) <= 0).all()
    again = tmp_path / "again.npz"
    proposals.write(again, found, dict(zip(table.image_id.tolist(), sizes.tolist(), strict=True)))
    assert_same(read_proposals(again), found)


def test_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"p\.json: proposals are written as \.npz; choose"):
        proposals.write(tmp_path / "p.json", made(), SIZES)
    for sizes in ({139: (4, 5)}, SIZES | {7: (0, 3)}, np.ones((2, 2))):
        with pytest.raises(ValueError, match="size"):
            proposals.write(tmp_path / "p.npz", made(), sizes)
    proposals.write(tmp_path / "p.npz", made(), SIZES)
    before = (tmp_path / "p.npz").read_bytes()
    with pytest.raises(
        UserError, match=r"p\.npz/a\.npz: cannot be written \((Not a directory|File exists)\); move what"
    ):
        proposals.write(tmp_path / "p.npz" / "a.npz", made(), SIZES)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"p\.npz: cannot be written \(No space left on device\); free some space"):
        proposals.write(tmp_path / "p.npz", made(None), SIZES)
    assert [file.name for file in tmp_path.iterdir()] == ["p.npz"]
    assert (tmp_path / "p.npz").read_bytes() == before


def compact(path, **changes):
    proposals.write(path, made(), SIZES)
    with np.load(path) as stored:
        arrays = dict(stored) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fpn_jax_proposals": 2}, "is of version 2, 1 can be read here; write it again"),
        ({"fpn_jax_proposals": np.ones(2)}, "incomplete, damaged or no .npz"),
        ({"scores": None}, "is damaged .no proper array 'scores'.; write it again"),
        ({"boxes": np.zeros((5, 4), np.float32)}, "is damaged .no proper array 'boxes'"),
        ({"boxes": np.zeros((4, 4), np.uint16)}, "is damaged .boxes of shape"),
        ({"boxes": np.full((5, 4), (2, 0, 1, 0), np.uint16)}, "is damaged .boxes or scores that are none"),
        ({"scores": np.full(5, np.nan, np.float16)}, "is damaged .boxes or scores that are none"),
        ({"offsets": np.array([0, 2, 9, 5])}, "is damaged .the offsets of 3 images do not fit 5 boxes"),
        ({"image_size": np.ones((2, 2), np.int32)}, "is damaged .image_size"),
        ({"image_size": np.zeros((3, 2), np.int32)}, "is damaged .image_size"),
        ({"image_id": np.array([1, 2, 2])}, "is damaged .image id 2 occurs 2 times"),
    ],
)
def test_a_compact_file_that_is_spoiled(tmp_path, changes, message):
    refused(compact(tmp_path / "p.npz", **changes), message)


def of_any_tool(path, **changes):
    arrays = {"image_id": np.repeat(IDS, [2, 0, 3]), "boxes": np.concatenate(BOXES), "scores": np.concatenate(SCORES)}
    np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
    return path


def test_an_npz_of_any_tool(tmp_path):
    assert_same(read_proposals(of_any_tool(tmp_path / "p.npz")), made(), [139, 285])
    assert_same(read_proposals(of_any_tool(tmp_path / "p.npz", scores=None)), made(None), [139, 285])
    order = [4, 0, 2, 1, 3]  # images in turns, of other types, compressed
    image_id = np.repeat(IDS, [2, 0, 3])[order].astype(np.uint16)
    boxes, scores = np.concatenate(BOXES)[order].astype(">f8"), np.concatenate(SCORES)[order, None]
    np.savez_compressed(tmp_path / "p.npz", image_id=image_id, boxes=boxes, scores=scores, more=np.ones(1))
    table = read_proposals(tmp_path / "p.npz")
    assert_same(
        table, ProposalTable.from_lists(IDS, [*BOXES[:2], BOXES[2][[2, 0, 1]]], [*SCORES[:2], SCORES[2]]), [139]
    )
    np.testing.assert_array_equal(table.of(285)[0], BOXES[2][[1, 2, 0]])
    assert table.image_id.dtype == np.int64 and table.file == str(tmp_path / "p.npz")
    np.savez(tmp_path / "p.npz", image_id=[], boxes=[])
    assert len(read_proposals(tmp_path / "p.npz").image_id) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": None}, r"has no array 'boxes' \(it has image_id, scores\); give image_id \[p\], boxes \[p 4\]"),
        ({"image_id": None}, "has no array 'image_id'"),
        ({"image_id": np.ones(5)}, r"image_id is float64 \[5\]; give an integer for each box"),
        ({"image_id": np.ones((5, 1), int)}, r"image_id is int64 \[5, 1\]; give"),
        ({"image_id": np.array([1, 2, 3])}, r"boxes are of shape \[5, 4\] for 3 image ids; give each box"),
        ({"boxes": np.array(3)}, r"boxes are of shape \[\] for 5 image ids"),
        ({"boxes": np.zeros((5, 5))}, r"boxes are of shape \[5, 5\]; give four numbers for each box"),
        ({"boxes": np.zeros((5, 4), complex)}, "boxes are no array of numbers"),
        ({"boxes": np.array([[None] * 4] * 5)}, "incomplete, damaged or no .npz of plain arrays .ValueError: Object"),
        ({"boxes": np.eye(5)[:, :4] * 9}, r"row 0 \(image_id 139\): \[9.0, 0.0, 0.0, 0.0\] is no box; give finite x1"),
        ({"boxes": np.full((5, 4), np.inf)}, r"row 0 \(image_id 139\): \[inf"),
        ({"boxes": np.concatenate(BOXES) / 640}, "all boxes lie within 0 .. 1, like fractions of the image; give"),
        ({"scores": np.ones(4)}, r"scores are of shape \[4\] for 5 boxes; give one number for each box, or no scores"),
        ({"scores": np.array([1, 2, np.nan, 4, 5])}, r"row 2 \(image_id 285\): the score nan is not finite"),
    ],
)
def test_an_npz_that_holds_no_proposals(tmp_path, changes, message):
    refused(of_any_tool(tmp_path / "p.npz", **changes), message)


ENTRIES = [
    {"image_id": 285, "bbox": [1, 1, 1, 1], "score": 0.5},
    {"image_id": 139, "bbox": [0, 0, 10, 20], "score": 0.25, "category_id": 3},
    {"image_id": 285, "bbox": [30, 40.0, 20, 21], "score": 0.9},
    {"image_id": 139, "bbox": [5.5, 2, 634.5, 478], "score": 0.75},
    {"image_id": 285, "bbox": [3, 3, 0, 6], "score": 0.5},
]


def test_coco_results(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(ENTRIES))
    assert_same(read_proposals(path), made(), [139, 285])
    path.write_text(json.dumps([entry | {"score": None} for entry in ENTRIES[:-1]] + [{**ENTRIES[-1], "score": None}]))
    assert_same(read_proposals(path), made(None), [139, 285])
    path.write_text("[]")
    assert len(read_proposals(path).image_id) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty; fetch or write it again"),
        ("<html>", "not valid JSON .*; write the file again"),
        ("[" * 100_000, "not valid JSON .*; write the file again"),
        ('[{"image_id": 1', "not valid JSON"),
        ("{}", "COCO results are a list of objects with image_id, bbox and score; write"),
        ([3], "entry 0 is 3; make it an object with image_id"),
        ([{"bbox": [1, 2, 3, 4]}], "entry 0 needs an integer image_id, it is None; give the data set's own"),
        ([ENTRIES[0], ENTRIES[1] | {"image_id": "139"}], "entry 1 needs an integer image_id, it is '139'"),
        ([ENTRIES[0] | {"image_id": 2**63}], "entry 0 needs an integer image_id"),
        ([ENTRIES[0] | {"image_id": True}], "entry 0 needs an integer image_id, it is True"),
        ([ENTRIES[0] | {"image_id": "a" * 99}], r"entry 0 needs an integer image_id, it is 'a{76}\.\.\.; give"),
        ([{"image_id": 1}], "entry 0 needs a bbox of four numbers, it is None; give x, y, width, height"),
        ([{"image_id": 1, "bbox": [1, 2, 3]}], "entry 0 needs a bbox of four"),
        ([{"image_id": 1, "bbox": [1, 2, 3, True]}], "entry 0 needs a bbox of four"),
        ([{"image_id": 1, "bbox": [1, 2, 3, float("nan")]}], "entry 0 needs a bbox of four"),
        ([{"image_id": 1, "bbox": [1, 2, 3, 10**400]}], "entry 0 needs a bbox of four"),
        ([ENTRIES[0], {"image_id": 1, "bbox": [1, 2, 3, 4]}], "entry 1 has no score, unlike the first; give all"),
        ([{"image_id": 1, "bbox": [1, 2, 3, 4]}, ENTRIES[0]], "entry 1 has a score, unlike the first"),
        ([ENTRIES[0] | {"score": "high"}], "entry 0 has the score 'high'; give a number"),
        ([ENTRIES[0], ENTRIES[1] | {"bbox": [5, 5, 1, -2]}], r"entry 1 \(image_id 139\): \[5.0.* width, height >= 0"),
    ],
)
def test_a_json_file_that_holds_no_proposals(tmp_path, content, message):
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    refused(path, message)


def test_files_that_are_cut_off_or_spoiled(tmp_path):
    """Nothing but a table or a line for the user comes of them."""
    whole = {
        "a.npz": compact(tmp_path / "p.npz").read_bytes(),
        "b.npz": of_any_tool(tmp_path / "p.npz").read_bytes(),
        "c.pkl": pickle.dumps({"boxes": BOXES, "scores": SCORES, "ids": IDS}, 2),
        "d.json": json.dumps(ENTRIES).encode(),
    }
    rng = np.random.default_rng(0)
    for name, data in whole.items():
        path = tmp_path / name
        for length in rng.integers(0, len(data), 25).tolist():
            path.write_bytes(data[:length])
            refused(path, "")
        for place in rng.integers(0, len(data), 75).tolist():
            path.write_bytes(data[:place] + bytes([data[place] ^ (1 << int(rng.integers(8)))]) + data[place + 1 :])
            try:
                read_proposals(path)
            except UserError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_paths_that_are_no_files_of_proposals(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "folder.pkl").mkdir()
    for name in ("folder.npz", "folder.pkl"):
        refused(tmp_path / name, "is a folder; give a file of proposals in it")
    for name in ("a.npz", "a.json", "a.pkl"):
        refused(tmp_path / name, "no such file; check the path")
    refused(tmp_path / "a.mat", r"proposals are read from \.npz, \.json, \.pkl; give such a file")
    with pytest.raises(UserError, match=r"a\.pkl: proposals are read from \.npz, \.json; give such a file"):
        proposals.read(tmp_path / "a.pkl")
    content = io.BytesIO()
    np.save(content, np.ones(3))
    for name, data, message in (
        ("a.npz", content.getvalue(), "incomplete, damaged or no .npz of plain arrays"),
        ("a.npz", b"hello", "incomplete, damaged or no .npz"),
        ("a.pkl", b"<!DOCTYPE html>", "a web page and not a file of proposals; download"),
        ("a.pkl", b"hello", "incomplete, damaged or no file of proposals .*; fetch or save it again"),
    ):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, message)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("boxes.npy", "text")
    refused(tmp_path / "a.npz", "")
