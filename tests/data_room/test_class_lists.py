"""Published detectors' lists of classes, and data sets labelled by them: other labels, the same ids and scores."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_split import make_split
from tiny_coco import content, write_folder, write_json

from experiments.faster_rcnn_r50_fpn import get_config
from fpn_jax import common, evaluation, scoring
from fpn_jax.data.class_lists import CLASS_LISTS, class_list
from fpn_jax.data.pipeline import PipelineOptions, train_batches
from fpn_jax.data.preparation import prepare
from fpn_jax.errors import UserError
from fpn_jax.training import sharding
from fpn_jax.types import Batch, Detections

COCO = {1: "person", 6: "bus", 13: "stop sign", 90: "toothbrush"}
OPTIONS = PipelineOptions(shorter=(20,), longest=40, buckets=((24, 40), (40, 24)), flip=0.0, num_threads=0)


def coco_split(count=21, categories=COCO, **arguments):
    """The split of `fake_split` with four categories of COCO."""
    split = make_split(count, **arguments)
    ids = np.array(list(categories), np.int64)
    index = dataclasses.replace(split.index, category_id=ids[split.index.label])
    return dataclasses.replace(split, index=index, class_names=list(categories.values()), category_ids=ids.tolist())


def relabelled(split, name):
    return split.with_classes(class_list(name).names, class_list(name).category_ids)


def test_the_lists_are_cocos(data_dir):
    """Against the categories of its annotations; some of the labels that torchvision and detectron2 have by hand."""
    categories = json.loads((data_dir / "evaluator" / "instances.json").read_text())["categories"]
    named = {c["id"]: c["name"] for c in categories}
    eighty, ninety = CLASS_LISTS["coco_80"], CLASS_LISTS["coco_91"]
    assert list(zip(eighty.category_ids, eighty.names, strict=True)) == sorted(named.items())
    assert ninety.category_ids == tuple(range(1, 91))
    assert list(ninety.names) == [named.get(number, "N/A") for number in range(1, 91)]
    assert (len(eighty.names), ninety.names.count("N/A")) == (80, 10)
    assert [names.index("stop sign") for names in (ninety.names, eighty.names)] == [12, 11]
    assert [names[-1] for names in (ninety.names, eighty.names)] == ["toothbrush"] * 2


@pytest.mark.parametrize(("name", "labels"), [("coco_91", [0, 5, 12, 89]), ("coco_80", [0, 5, 11, 79])])
def test_labels_follow_the_ids(name, labels):
    split = coco_split(crowds=lambda i: i % 2)
    changed = relabelled(split, name)
    np.testing.assert_array_equal(changed.index.label, np.array(labels)[split.index.label])
    assert changed.index.label.dtype == np.int32
    assert (changed.class_names, changed.category_ids) == tuple(map(list, dataclasses.astuple(class_list(name))))
    before, after = split.ground_truth(), changed.ground_truth()
    assert (after["images"], after["annotations"]) == (before["images"], before["annotations"])
    assert [c["id"] for c in after["categories"]] == changed.category_ids
    batches = [next(train_batches(s, OPTIONS, 4, seed=0)) for s in (split, changed)]
    for one, other in zip(*(batch["labels"][batch["valid"]] for batch in batches), strict=True):
        assert other == labels[one]
    assert split.class_names == list(COCO.values()) and split.index.label.max() == 3  # as it was


def test_a_list_that_does_not_suit_is_refused_with_the_categories():
    split = coco_split(categories={1: "person", 12: "street sign", 91: "hair brush", 26: "hat"})
    message = (
        r"^data\.classes: the list lacks categories of fake: 12 'street sign', 91 'hair brush', 26 'hat'; set data\.cla"
    )
    with pytest.raises(UserError, match=message):
        relabelled(split, "coco_80")
    other = coco_split(categories={1: "Person", 2: "fish", 3: "car", 12: "street sign"})
    with pytest.raises(UserError, match=r"other names for categories of fake: 2 is 'fish', not 'bicycle', 12 is 'stre"):
        relabelled(other, "coco_91")
    many = coco_split(categories={i: str(i) for i in range(100, 108)})
    with pytest.raises(UserError, match=r"100 '100', 101 '101', 102 '102', 103 '103', 104 '104' and 3 more; set"):
        relabelled(many, "coco_91")


def test_an_unknown_list_names_those_there_are():
    with pytest.raises(UserError, match=r"data\.classes is 'coco'; choose one of coco_91, coco_80, or '' for the data"):
        class_list("coco")


def detect_some(variables, batch: Batch) -> Detections:
    """Two of three objects as they are, and half as sure, of the next label, the third."""
    place = jnp.arange(batch.labels.shape[1])
    wrong = (place + batch.size[:, :1]) % 3 == 0
    scores = jnp.where(wrong, 0.4, 0.8) / (1 + place)
    return Detections(batch.boxes, scores, jnp.where(wrong, variables[batch.labels], batch.labels), batch.valid)


def test_scores_and_results_are_the_same_with_any_list(tmp_path):
    """From batches through a detector's labels to COCO results, AP and pictures."""
    own = coco_split(objects=lambda i: i % 7, crowds=lambda i: i % 2)
    mesh = sharding.make_mesh()
    found = {}
    for name, split in (("", own), ("coco_91", relabelled(own, "coco_91")), ("coco_80", relabelled(own, "coco_80"))):
        following = np.arange(len(split.category_ids))
        labels = [split.category_ids.index(i) for i in COCO]
        following[labels] = labels[1:] + labels[:1]
        evaluator = scoring.Evaluator(SimpleNamespace(class_agnostic=False), mesh, split, OPTIONS, 8)
        vars(evaluator)["_detect"] = jax.jit(detect_some)
        of_images = evaluator.detect(jnp.asarray(following))
        found[name] = evaluator.results(of_images), evaluator.score(of_images)
        evaluator.draw(str(tmp_path / name), of_images, 2)
        assert (tmp_path / name / "eval" / "train" / "overview.jpg").exists()
    results, metrics = found[""]
    assert 0.2 < metrics["AP"] < 0.9
    for name in ("coco_91", "coco_80"):
        assert found[name][0] == results
        classes = found[name][1]["per_class"]
        assert {key: classes.pop(key) for key in COCO.values()} == metrics["per_class"]
        assert all(row["AP"] is None and row["num_objects"] == 0 for row in classes.values())
        assert {**found[name][1], "per_class": None} == {**metrics, "per_class": None}
    assert "N/A (12)" in evaluation.metrics_table(found["coco_91"][1])  # every row has a name of its own


def test_detections_of_a_label_that_the_data_never_has_do_not_count():
    split = relabelled(coco_split(), "coco_91")
    boxes, labels = split.objects(0)["boxes"], split.objects(0)["labels"]
    image, ones = int(split.index.image_id[0]), np.ones(len(labels))
    results = evaluation.coco_results(boxes, ones, labels, ones, image, split.category_ids)
    unused = evaluation.coco_results(boxes, ones, np.full(len(labels), 11), ones, image, split.category_ids)
    one, other = (evaluation.coco_metrics(split.ground_truth(), r) for r in (results, results + unused))
    assert one["AP"] == other["AP"] > 0


def test_open_data_takes_the_list_that_the_config_names(tmp_path, capsys):
    root = write_folder(tmp_path / "coco_like")
    changed = content() | {"categories": [{"id": 90, "name": "toothbrush"}, {"id": 4, "name": "motorcycle"}]}
    write_json(root / "annotations" / "instances_train.json", changed)
    prepare(str(root), tmp_path / "data")
    config = get_config()
    config.data.update(data_dir=str(tmp_path / "data"), dataset="coco_like")
    own = common.open_data(config, "train")
    assert (own.class_names, own.category_ids) == (["motorcycle", "toothbrush"], [4, 90])
    config.data.classes = "coco_91"
    listed = common.open_data(config, "train")
    assert len(listed.class_names) == 90 and set(listed.index.label.tolist()) == {3, 89}

    classes = common.Classes(listed.class_names, listed.category_ids)
    classes.write(str(tmp_path))
    assert common.Classes.read(str(tmp_path)) == classes
    common.check_classes(classes, common.open_data(config, "train"), str(tmp_path))
    assert not capsys.readouterr().err
    renamed = common.Classes(["bike", *classes.names[1:]], classes.category_ids)
    common.check_classes(renamed, common.open_data(config, "train"), str(tmp_path))
    assert f"warning: coco_like has other names for the categories of --workdir={tmp_path}: 1 is " in (
        capsys.readouterr().err
    )
    with pytest.raises(UserError, match="was trained on 90 classes"):
        common.check_classes(classes, own, str(tmp_path))

    del config.data.classes, config.data.pixels  # a workdir of before these keys
    assert common.open_data(config, "train").category_ids == [4, 90]
    assert common.pipeline_options(config).pixels == "uint8"
    with pytest.raises(UserError, match=r"no split 'valid' .*; it has train: set data\.eval_split to one of them"):
        common.open_data(config, "valid", "data.eval_split")
    config.data.classes = "coco_90"
    with pytest.raises(UserError, match=r"data\.classes is 'coco_90'"):
        common.open_data(config, "nothere")
