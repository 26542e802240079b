"""What `scoring.Evaluator` makes of a detector's answers: of each image once, of padding never, in its own pixels."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax import scoring
from fpn_jax.data.pipeline import PipelineOptions
from fpn_jax.scoring import Evaluator, Found
from fpn_jax.training import sharding
from fpn_jax.types import Batch, Detections
from tests.data_room.fake_split import make_split

# Pictures of 20 x 30 become twice as large.
OPTIONS = PipelineOptions(shorter=(40,), longest=60, buckets=((40, 64),), num_threads=0)


def evaluator(agnostic: bool = False) -> Evaluator:
    """Of seven images with two objects each in batches of three; it finds the objects."""
    split = make_split(7, sizes=((20, 30),), objects=lambda i: 2)
    detector = SimpleNamespace(class_agnostic=agnostic, counted_levels={"rpn": (2, 3)})
    made = Evaluator(detector, sharding.make_mesh(sharding.first_device()), split, OPTIONS, 3)
    vars(made)["_detect"] = find_objects
    vars(made)["_counts"] = lambda variables, batch: {"rpn": {"objects": jnp.ones((3, 1), int) * jnp.array([1, 10])}}
    return made


def find_objects(variables: None, batch: Batch) -> Detections:
    scores = jnp.broadcast_to(0.9 - 0.1 * jnp.arange(batch.labels.shape[1]), batch.labels.shape)
    return Detections(batch.boxes, scores, batch.labels, batch.valid)


def test_each_image_is_found_once_in_its_own_pixels():
    """The last batch has two rows of padding."""
    made = evaluator()
    found = made.detect(None)
    assert [x.image_id for x in found] == made.split.index.image_id.tolist()
    for i, x in enumerate(found):
        objects = made.split.objects(i)
        np.testing.assert_allclose(x.boxes, objects["boxes"], atol=1e-5)
        np.testing.assert_array_equal(x.labels, objects["labels"])
        assert x.scores.tolist() == pytest.approx([0.9, 0.8])


def test_proposals_as_rows_of_corner_sides_and_score():
    found = [
        Found(5, np.array([[1, 2, 4, 9], [0, 0, 3, 3]], np.float32), np.array([0.75, 0.5], np.float32), np.zeros(2)),
        Found(7, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0)),
    ]
    assert evaluator(agnostic=True).results(found).tolist() == [[5, 1, 2, 3, 7, 0.75], [5, 0, 0, 3, 3, 0.5]]
    assert evaluator(agnostic=True).results([]).shape == (0, 6)


@pytest.mark.parametrize(("asked", "images"), [(500, 7), (6, 6), (4, 6), (3, 3)])
def test_levels_are_counted_on_as_many_whole_batches_as_it_takes(monkeypatch, asked, images):
    monkeypatch.setattr(scoring, "_COUNTED", asked)
    counted = evaluator().count_levels(None)
    assert counted == {"rpn": {"levels": [2, 3], "images": images, "objects": [images, 10 * images]}}


@pytest.mark.parametrize("agnostic", [False, True])
def test_scores_and_the_analysis_have_what_the_log_shows(tmp_path, agnostic):
    made = evaluator(agnostic)
    found = made.detect(None)
    metrics = made.score(found)
    made.write(str(tmp_path), found, metrics)
    folder = tmp_path / "eval" / "train"
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert (folder / ("proposals.npz" if agnostic else "detections.json")).is_file()
    assert made.main_metric == ("AR1000" if agnostic else "AP") and metrics[made.main_metric] == pytest.approx(1.0)
    assert set(made.shown_metrics) <= metrics.keys()
    known = made.analyse(str(tmp_path), None, found)
    assert known == json.loads((folder / "analysis.json").read_text())
    assert set(known) == {"octaves", "levels"} | (set() if agnostic else {"errors"})


@pytest.mark.parametrize(("agnostic", "most"), [(False, 25), (True, 20)])
def test_pictures_are_spread_over_the_split_and_show_the_best_proposals(tmp_path, monkeypatch, agnostic, most):
    drawn = []

    def side_by_side(image, objects, shown, names, caption):
        drawn.append((caption, len(shown["boxes"]), names, objects["labels"].tolist()))
        return image

    monkeypatch.setattr(scoring.visualize, "side_by_side", side_by_side)
    made = evaluator(agnostic)
    boxes, scores = np.zeros((25, 4), np.float32), np.linspace(1, 0, 25)
    found = [Found(i, boxes, scores, np.zeros(25, int)) for i in made.split.index.image_id.tolist()]
    made.draw(str(tmp_path), found, 3)
    names = ["object"] if agnostic else list("abcd")
    labels = [[0, 0]] * 3 if agnostic else [[0, 1], [3, 0], [2, 3]]
    assert drawn == [(f"000{i}.png", most, names, own) for i, own in zip((0, 3, 6), labels, strict=True)]
    assert (tmp_path / "eval" / "train" / "overview.jpg").is_file()
