import json

import cv2
import numpy as np
import pytest

from fpn_jax import visualize
from fpn_jax.errors import UserError

NAMES = ["fish", "stingray", "shark"]
NOTHING = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)}


def grey(height, width):
    return np.full((height, width, 3), 128, np.uint8)


def count(picture, color):
    return int((picture == np.array(color, np.uint8)).all(-1).sum())


def test_classes_have_colours_of_their_own():
    colors = np.array([visualize.class_color(label) for label in range(80)])
    lab = cv2.cvtColor(np.float32(colors[None] / 255), cv2.COLOR_RGB2LAB)[0]
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1000 * np.eye(80)
    assert distance[:8, :8].min() > 50 and distance.min() > 10  # 2.3 is the least that people see
    assert visualize.class_color(80) == visualize.class_color(0)


def test_a_box_is_drawn_where_it_is_and_the_image_is_left_alone():
    image = grey(700, 800)
    picture = visualize.draw(image, [[100, 200, 400, 500]], [1], [0.87], NAMES)
    assert (image == 128).all() and picture.shape == image.shape
    color = visualize.class_color(1)
    for y, x in ((350, 100), (350, 400), (500, 250)):
        assert count(picture[y - 1 : y + 2, x - 1 : x + 2], color)
    ys, xs = np.nonzero((picture != 128).any(-1))
    assert xs.min() >= 95 and xs.max() <= 405 and ys.max() <= 505
    assert ys.min() > 160  # the label sits on the box


def test_the_label_depends_on_class_and_score():
    image, box = grey(700, 800), [[100, 200, 400, 500]]
    pictures = [visualize.draw(image, box, [1], scores, NAMES) for scores in (None, [0.87], [0.86])]
    assert not (pictures[0] == pictures[1]).all() and not (pictures[1] == pictures[2]).all()
    assert not (visualize.draw(image, box, [1], None, NAMES, crowd=[True]) == pictures[0]).all()


@pytest.mark.parametrize("shape", [(32, 48), (1, 1), (48, 2), (700, 700)])
def test_tiny_pictures_are_enlarged_with_their_boxes(shape):
    h, w = shape
    picture = visualize.draw(grey(h, w), [[0, 0, w / 2, h / 2]], [0], [1.0], NAMES)
    assert max(picture.shape[:2]) == max(640, *shape)
    assert picture.shape[0] / picture.shape[1] == pytest.approx(h / w, rel=0.02)
    quarter = picture[picture.shape[0] * 3 // 4 :, picture.shape[1] * 3 // 4 :]
    assert shape[0] < 32 or shape[1] < 32 or (quarter == 128).all()


@pytest.mark.parametrize("number", [0, 1, 19, 20, 300])
def test_any_number_of_boxes_anywhere(number):
    rng = np.random.default_rng(number)
    boxes = rng.uniform(-100, 700, (number, 4))  # beyond the edges and inverted, too
    labels = rng.integers(0, 3, number)
    picture = visualize.draw(grey(480, 640), boxes, labels, rng.random(number), NAMES)
    assert picture.shape == (480, 640, 3) and picture.dtype == np.uint8
    assert (picture != 128).any() == (number > 0)


def test_labels_do_not_cover_each_other():
    image, box = grey(700, 800), [100.0, 200.0, 400.0, 500.0]
    alone = visualize.draw(image, [box], [0], [0.9], NAMES)
    both = visualize.draw(image, [box, box], [0, 1], [0.9, 0.8], NAMES)
    patch = alone[160:195, 100:160]  # the better one's label: nothing of the other's lies on it
    assert count(patch, visualize.class_color(0)) > 200
    np.testing.assert_array_equal(both[160:195, 100:160], patch)
    assert count(both, visualize.class_color(1)) > 200


def test_side_by_side_shows_predictions_from_the_score_on():
    image = grey(300, 700)
    truth = {"boxes": np.array([[50, 50, 200, 200]]), "labels": np.array([0]), "crowd": np.array([False])}
    found = {"boxes": np.array([[300, 50, 450, 200]] * 2), "labels": np.array([1, 2]), "scores": np.array([0.6, 0.4])}
    picture = visualize.side_by_side(image, truth, found, NAMES, min_score=0.5, caption="a.jpg")
    left, right = picture[60:-34, :700], picture[60:-34, 712:]
    np.testing.assert_array_equal(left, visualize.draw(image, truth["boxes"], truth["labels"], None, NAMES))
    np.testing.assert_array_equal(right, visualize.draw(image, found["boxes"][:1], [1], [0.6], NAMES))
    key = picture[-34:]
    assert [count(key, visualize.class_color(label)) > 100 for label in range(3)] == [True, True, False]


def test_side_by_side_shrinks_large_pictures_with_their_boxes():
    objects = {"boxes": np.array([[0, 1000, 4000, 2000]]), "labels": np.array([0]), "scores": np.array([1.0])}
    picture = visualize.side_by_side(grey(2000, 4000), objects, objects, NAMES, longest=1000)
    assert picture.shape[1] == 2012
    half = picture[34:-34, :1000]
    assert count(half[245:256], visualize.class_color(0)) > 800  # the box's upper edge, at a quarter of 1000


@pytest.mark.parametrize("shape", [(600, 40), (40, 600), (8, 8), (1, 3000), (3000, 1)])
def test_side_by_side_without_any_object(shape):
    picture = visualize.side_by_side(grey(*shape), NOTHING, NOTHING, NAMES, caption="long/" * 50)
    assert picture.shape[1] >= 2 * min(40, shape[1])


@pytest.mark.parametrize("columns", [None, 1, 2, 9])
def test_a_contact_sheet_holds_every_picture_once(columns):
    shapes = [(60, 100), (200, 100), (30, 80), (60, 100), (100, 100)]
    pictures = [np.full((*shape, 3), 10 + 10 * i, np.uint8) for i, shape in enumerate(shapes)]
    sheet = visualize.contact_sheet(pictures, columns)
    for i, (h, w) in enumerate(shapes):
        assert count(sheet, [10 + 10 * i] * 3) == h * w
    assert count(sheet, (255, 255, 255)) == sheet.shape[0] * sheet.shape[1] - sum(h * w for h, w in shapes)


def test_a_contact_sheet_is_no_wider_than_asked():
    assert visualize.contact_sheet([grey(300, 1000)] * 7, width=900).shape[1] <= 900
    with pytest.raises(ValueError, match="no pictures"):
        visualize.contact_sheet([])


def test_save_keeps_rgb_and_explains_what_it_cannot_write(tmp_path):
    image = np.zeros((4, 5, 3), np.uint8) + np.array([250, 20, 5], np.uint8)
    visualize.save(tmp_path / "new" / "a.png", image)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "new" / "a.png"))[..., ::-1], image)
    with pytest.raises(UserError, match=r"a\.xyz: .*use \.jpg or \.png"):
        visualize.save(tmp_path / "a.xyz", image)
    with pytest.raises(UserError, match="another folder"):
        visualize.save(tmp_path / "new" / "a.png" / "b.png", image)


def run_of(steps):
    lines = [{"step": step, "time": 0.0, "loss": 3 / step, "learning_rate": 0.1} for step in range(1, steps + 1)]
    return [*lines, *({"step": s, "eval/AP": s / 200, "eval/AP50": s / 100} for s in range(20, steps + 1, 20))]


@pytest.mark.parametrize("rows", [[], run_of(1), run_of(100), [{"step": 1, "loss": None, "eval/AP": None}]])
def test_curves_of_any_run(tmp_path, rows):
    visualize.curves(rows, tmp_path / "curves.png")
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture.shape[0] > 600 and picture.std() > 5


def test_curves_read_the_file_of_a_run(tmp_path):
    rows = run_of(50)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 51, "lo')  # a run that is writing just now
    visualize.curves(tmp_path / "metrics.jsonl", tmp_path / "a.png")
    visualize.curves(rows, tmp_path / "b.png")
    visualize.curves(rows[:-3], tmp_path / "c.png")
    a, b, c = (cv2.imread(str(tmp_path / f"{name}.png")) for name in "abc")
    assert (a == b).all() and not (a == c).all()
    with pytest.raises(UserError, match=r"nowhere\.jsonl: No such file"):
        visualize.curves(tmp_path / "nowhere.jsonl", tmp_path / "d.png")
    (tmp_path / "metrics.jsonl").write_text('{"step": 51, "lo\n' + text)
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged .*; delete its broken line"):
        visualize.curves(tmp_path / "metrics.jsonl", tmp_path / "d.png")


def test_curves_of_an_rpn_are_of_its_recall(tmp_path):
    """AR100 is among a detector's scores, too, and not drawn there."""
    shown = []
    for ar1000 in ({"eval/AR1000": 0.75}, {}, {"eval/AR1000": 0.5}):
        rows = [{"step": 20, "eval/AR100": 0.25} | ar1000]
        visualize.curves(rows, tmp_path / "curves.png")
        shown.append(cv2.imread(str(tmp_path / "curves.png")))
    visualize.curves([], tmp_path / "curves.png")
    assert (shown[1] == cv2.imread(str(tmp_path / "curves.png"))).all()
    assert not (shown[0] == shown[1]).all() and not (shown[0] == shown[2]).all()


def test_series_keep_the_later_of_two_lines_and_leave_out_null():
    rows = [{"step": 3, "a": 1.0}, {"step": 1, "a": None}, {"step": 2, "b": 5.0}, {"step": 3, "a": 2.0}]
    steps, values = visualize._series([*rows, {"step": 4, "a": float("nan")}, {"step": 0, "a": 7}], "a")
    assert (steps.tolist(), values.tolist()) == ([0, 3], [7, 2])


@pytest.mark.parametrize("length", [1, 2, 41, 200])
def test_smooth_is_a_mean_over_a_window(length):
    values = np.random.default_rng(0).random(length)
    half = max(1, length // 40)
    slow = [values[max(0, i - half) : i + half + 1].mean() for i in range(length)]
    np.testing.assert_allclose(visualize._smooth(values), slow)
