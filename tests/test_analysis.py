import json
from itertools import pairwise
from pathlib import Path

import hotcoco
import numpy as np
import pytest
from coco_oracle import mean, pycocotools, random_case

from fpn_jax import analysis, evaluation
from fpn_jax.errors import UserError

A, B, C = [0, 0, 40, 40], [200, 200, 40, 40], [400, 0, 40, 40]  # places of objects
NEAR_A, AT_A, NOWHERE = [20, 0, 40, 40], [2, 0, 40, 40], [400, 400, 40, 40]  # IoU with A: 1/3, 0.9, 0
OCTAVES = [*pairwise([0, 8, 16, 32, 64, 128, 256, 512]), (512, None)]
EDGE_AREAS = tuple(float(edge**2) for edge in (8, 16, 32, 64, 128, 256))


def scene(objects, detections, crowds=()):
    """One image of classes 1, 2, 3 from (class, box) and (class, score, box); crowds are numbers of objects."""
    annotations = [
        {"id": i, "image_id": 1, "category_id": k, "bbox": box, "area": box[2] * box[3], "iscrowd": int(i in crowds)}
        for i, (k, box) in enumerate(objects)
    ]
    truth = {"images": [{"id": 1, "height": 640, "width": 640, "file_name": "a.jpg"}], "annotations": annotations}
    results = [{"image_id": 1, "category_id": k, "score": score, "bbox": box} for k, score, box in detections]
    return truth | {"categories": [{"id": k, "name": f"class {k}"} for k in (1, 2, 3)]}, results


@pytest.fixture(scope="module")
def known():
    folder = Path(__file__).parent / "data" / "evaluator"
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("instances", "results")]


def assert_errors(errors, ap50, gains, counts):
    """`gains` and `counts` name what is not zero."""
    assert list(errors["dAP"]) == list(errors["count"]) == list(analysis.ERRORS)
    assert errors["count"] == dict.fromkeys(analysis.ERRORS, 0) | counts
    assert errors["dAP"] == pytest.approx(dict.fromkeys(analysis.ERRORS, 0) | gains, abs=1e-6)
    assert errors["AP50"] == pytest.approx(ap50, abs=1e-6)


# A mistake between two hits: precision 1 at the 51 recalls up to 0.5, 2/3 at the other 50.
ONE_WRONG = (51 + 50 * 2 / 3) / 101


@pytest.mark.parametrize(
    ("objects", "detections", "ap50", "gains", "counts"),
    [
        # One of each kind.
        ([(1, A)], [(1, 0.9, NEAR_A)], 0, {"Loc": 1}, {"Loc": 1, "FP": 1, "FN": 1}),
        (
            [(1, A), (2, B)],
            [(2, 0.9, A), (2, 0.8, B)],
            0.25,
            {"Cls": 0.75, "FP": 0.25, "FN": 0.25},
            {"Cls": 1, "FP": 1, "FN": 1},
        ),
        (
            [(1, A), (2, B)],
            [(2, 0.9, NEAR_A), (2, 0.8, B), (1, 0.7, NOWHERE)],
            0.25,
            {"Both": 0.25, "FP": 0.25},
            {"Both": 1, "Bkg": 1, "Miss": 1, "FP": 2, "FN": 1},
        ),
        (
            [(1, A), (1, B)],
            [(1, 0.9, A), (1, 0.8, AT_A), (1, 0.7, B)],
            ONE_WRONG,
            {"Dupe": 1 - ONE_WRONG, "FP": 1 - ONE_WRONG},
            {"Dupe": 1, "FP": 1},
        ),
        (
            [(1, A), (1, B)],
            [(1, 0.9, A), (1, 0.8, NOWHERE), (1, 0.7, B)],
            ONE_WRONG,
            {"Bkg": 1 - ONE_WRONG, "FP": 1 - ONE_WRONG},
            {"Bkg": 1, "FP": 1},
        ),
        ([(1, A), (1, B)], [(1, 0.9, A)], 51 / 101, {"Miss": 50 / 101, "FN": 50 / 101}, {"Miss": 1, "FN": 1}),
        # A class without detections is no longer asked for once its misses are forgiven; hotcoco gains nothing here.
        ([(1, A), (2, B)], [(1, 0.9, A)], 0.5, {"Miss": 0.5, "FN": 0.5}, {"Miss": 1, "FN": 1}),
        # A mistake in a class without objects.
        (
            [(1, A), (1, B)],
            [(1, 0.9, B), (3, 0.8, A)],
            51 / 101,
            {"Cls": 50 / 101, "FN": 50 / 101},
            {"Cls": 1, "FP": 1, "FN": 1},
        ),
        # Which object a mistake would find, from here on the numbers are tidecv's: a found one is not found again,
        (
            [(1, [10, 10, 40, 40]), (1, [120, 120, 40, 40])],
            [
                (1, 0.9, [10, 10, 40, 40]),
                (1, 0.8, [30, 30, 40, 40]),
                (1, 0.7, [300, 300, 40, 40]),
                (1, 0.6, [120, 120, 40, 40]),
            ],
            0.752475,
            {"Loc": 0.082508, "Bkg": 0.082508, "FP": 0.247525},
            {"Loc": 1, "Bkg": 1, "FP": 2},
        ),
        # and of two that aim at one only the better scored finds it,
        (
            [(1, A), (1, B), (1, C)],
            [(1, 0.9, [20, 20, 40, 40]), (1, 0.8, [300, 400, 40, 40]), (1, 0.7, NEAR_A), (1, 0.6, B)],
            0.084158,
            {"Loc": 0.470297, "Bkg": 0.028053, "Miss": 0.042079, "FP": 0.252475, "FN": 0.165842},
            {"Loc": 2, "Bkg": 1, "Miss": 1, "FP": 3, "FN": 2},
        ),
        # of whatever kind they are.
        (
            [(1, A), (1, B), (2, NOWHERE)],
            [(2, 0.9, A), (1, 0.8, [20, 20, 40, 40]), (1, 0.6, B), (2, 0.5, NOWHERE)],
            0.376238,
            {"Cls": 0.541254, "Loc": 0.126238, "FP": 0.376238, "FN": 0.123762},
            {"Cls": 1, "Loc": 1, "FP": 2, "FN": 1},
        ),
    ],
)
def test_each_kind_of_error(objects, detections, ap50, gains, counts):
    errors = analysis.error_types(*scene(objects, detections))
    assert_errors(errors, ap50, gains, counts)
    assert analysis.error_types(*scene(objects, detections[::-1])) == errors


@pytest.mark.parametrize(
    ("box", "counts"),
    [([84, 100, 20, 20], {"Bkg": 1, "FP": 1}), ([95, 150, 20, 20], {}), ([300, 300, 20, 20], {"Bkg": 1, "FP": 1})],
)
def test_a_crowd_hides_what_is_half_inside_and_nothing_else(box, counts):
    """The first lies with a fifth of its area in the crowd, which hotcoco takes for Loc."""
    crowd = (1, [100, 100, 100, 100])
    errors = analysis.error_types(*scene([(1, A), crowd], [(1, 0.9, A), (1, 0.8, box)], crowds=(1,)))
    assert_errors(errors, 1, {}, counts)
    alone = analysis.error_types(*scene([crowd], [(1, 0.8, box)], crowds=(0,)))
    assert (alone["AP50"], alone["count"]) == (None, dict.fromkeys(analysis.ERRORS, 0) | counts)


def test_what_lies_on_a_crowd_finds_no_object():
    """COCO matches it with the crowd all the same; taken for a hit it would find the only object."""
    errors = analysis.error_types(
        *scene([(1, A), (1, [100, 100, 100, 100])], [(1, 0.9, [95, 150, 20, 20])], crowds=(1,))
    )
    assert (errors["AP50"], errors["dAP"]["FP"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("objects", "detections", "ap50", "without"),
    [
        ([], [], None, analysis.ERRORS),
        ([], [(1, 0.9, A)], None, analysis.ERRORS),
        ([(1, A)], [], 0.0, ("Miss", "FN")),  # nothing would be left to find, and nothing is found
    ],
)
def test_a_gain_without_meaning_is_none(objects, detections, ap50, without):
    errors = analysis.error_types(*scene(objects, detections))
    assert errors["AP50"] == ap50
    assert errors["dAP"] == {name: None if name in without else 0.0 for name in analysis.ERRORS}
    assert errors["count"]["FP"] == len(detections) and errors["count"]["FN"] == len(objects)
    json.dumps(errors, allow_nan=False)
    assert analysis.error_table(errors)


def hotcoco_errors(ground_truth, results):
    truth = hotcoco.COCO(ground_truth)
    evaluator = hotcoco.COCOeval(truth, truth.load_res(results), "bbox")
    evaluator.evaluate()
    return evaluator.tide_errors()


@pytest.mark.parametrize("seed", range(60))
def test_as_hotcoco_where_it_is_right(seed):
    """Without crowds and ties, and with a detection of each class: then its TIDE is tidecv's."""
    rng = np.random.default_rng(seed)
    ground_truth, results = random_case(rng)
    ground_truth["annotations"] = [a for a in ground_truth["annotations"] if not a["iscrowd"]]
    nowhere = {"image_id": ground_truth["images"][0]["id"], "bbox": [390, 290, 5, 5]}
    results += [nowhere | {"category_id": category["id"]} for category in ground_truth["categories"]]
    ranks = rng.permutation(len(results)) / len(results)
    results = [result | {"score": float(rank)} for result, rank in zip(results, ranks, strict=True)]
    theirs, ours = hotcoco_errors(ground_truth, results), analysis.error_types(ground_truth, results)
    assert {name: ours["count"][name] for name in theirs["counts"]} == theirs["counts"]
    if ours["AP50"] is None:
        assert not ground_truth["annotations"]
        return
    assert ours["AP50"] == pytest.approx(theirs["ap_base"], abs=1e-12)
    assert ours["dAP"] == pytest.approx(theirs["delta_ap"], abs=1e-12)


HALF_A, TENTH_A = [0, 0, 40, 20], [0, 0, 40, 4]  # IoU with A: exactly 0.5 and 0.1


@pytest.mark.parametrize(
    ("detections", "kind"),
    [
        ([(1, 0.9, TENTH_A)], "Loc"),
        ([(1, 0.9, A), (1, 0.8, HALF_A)], "Loc"),  # and no Dupe
        ([(2, 0.9, HALF_A)], "Cls"),
        ([(2, 0.9, TENTH_A)], "Bkg"),
    ],
)
def test_the_ends_of_the_ious_belong_to_the_kinds_that_tide_gives_them_to(detections, kind):
    case = scene([(1, A)], detections)
    count, theirs = analysis.error_types(*case)["count"], hotcoco_errors(*case)["counts"]
    assert [name for name in analysis.FALSE_KINDS if count[name]] == [kind]
    assert {name: count[name] for name in theirs} == theirs


@pytest.mark.parametrize("seed", range(30))
def test_errors_add_up(seed):
    ground_truth, results = random_case(np.random.default_rng(seed))
    errors = analysis.error_types(ground_truth, results)
    metrics = evaluation.coco_metrics(ground_truth, results)
    assert errors["AP50"] == (metrics["AP50"] and pytest.approx(metrics["AP50"], abs=1e-12))
    count = errors["count"]
    assert count["FP"] == sum(count[name] for name in analysis.FALSE_KINDS) and count["Miss"] <= count["FN"]
    for gain in filter(None, errors["dAP"].values()):
        assert -1e-12 < gain <= 1 - errors["AP50"] + 1e-12


def test_errors_of_the_known_results(known):
    """The counts are tidecv's; 181 objects of 830 are not found."""
    errors = analysis.error_types(*known)
    counts = {"Cls": 83, "Loc": 1, "Both": 0, "Dupe": 1, "Bkg": 0, "Miss": 97, "FP": 85, "FN": 181}
    assert errors["count"] == counts
    lines = analysis.error_table(errors).splitlines()
    assert lines[0] == "AP50 0.697, and what it would gain without each kind of error (TIDE)"
    assert [line.split() for line in lines[2:]] == [
        list(counts),
        ["dAP", *(f"{errors['dAP'][name]:.3f}" for name in counts)],
        ["count", *map(str, counts.values())],
    ]
    assert len({len(line) for line in lines[2:]}) == 1


def test_results_that_do_not_belong_are_refused():
    ground_truth, results = scene([(1, A)], [(4, 0.9, A)])
    for analyse in (analysis.error_types, lambda *given: analysis.by_octave(*given, False)):
        with pytest.raises(UserError, match="category_id 4"):
            analyse(ground_truth, results)


def expected_octaves(ground_truth, results, proposals):
    """by_octave, by pycocotools: one run for each octave, ranges made anew."""
    rows = []
    for low, high in OCTAVES:
        inside = [
            a
            for a in ground_truth["annotations"]
            if not a["iscrowd"] and low**2 <= a["area"] and (high is None or a["area"] < high**2)
        ]
        if not inside:
            continue
        area = [float(low**2), np.inf if high is None else np.nextafter(float(high**2), 0)]
        limits = {"useCats": 0, "maxDets": [100, 1000]} if proposals else {"maxDets": [100]}
        scores = pycocotools(ground_truth, results, areaRng=[area], areaRngLbl=["octave"], **limits).eval
        precision, recall = scores["precision"], scores["recall"]
        row = {"from": low, "to": high, "num_objects": len(inside)}
        if proposals:
            row |= {"AR100": mean(recall[:, :, 0, 0]), "AR1000": mean(recall[:, :, 0, 1])}
        else:
            row |= {"AP": mean(precision), "AP50": mean(precision[0]), "AR100": mean(recall)}
        rows.append(row)
    return rows


@pytest.mark.parametrize("proposals", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_octaves_as_pycocotools_on_random_cases(seed, proposals):
    """A third of the objects lie on a border of octaves, and detections of rounded boxes do."""
    ground_truth, results = random_case(np.random.default_rng(seed), EDGE_AREAS)
    rows = analysis.by_octave(ground_truth, results, proposals)
    assert rows == expected_octaves(ground_truth, results, proposals)
    assert sum(row["num_objects"] for row in rows) == sum(not a["iscrowd"] for a in ground_truth["annotations"])


def test_octaves_of_the_known_results(known):
    ground_truth, results = known
    rows = analysis.by_octave(ground_truth, results, False)
    assert rows == expected_octaves(ground_truth, results, False)
    assert [row["num_objects"] for row in rows] == [30, 159, 218, 159, 143, 85, 34, 2]
    array = np.array([[result["image_id"], *result["bbox"], result["score"]] for result in results])
    of_proposals = analysis.by_octave(ground_truth, array, True)
    assert of_proposals == expected_octaves(ground_truth, results, True)
    lines = analysis.octave_table(rows).splitlines()
    assert lines[0].split() == ["size,", "px", "objects", "AP", "AP50", "AR100"]
    assert lines[-1].split() == ["512", "...", "2", "1.000", "1.000", "1.000"]
    assert lines[3].startswith("16 .. 32 ") and len({len(line) for line in lines}) == 1
    assert analysis.octave_table(of_proposals).splitlines()[0].split()[2:] == ["objects", "AR100", "AR1000"]


@pytest.mark.parametrize(
    ("side", "low", "high"), [(8, 8, 16), (32, 32, 64), (512, 512, None), (0.5, 0, 8), (7.9, 0, 8)]
)
def test_an_object_on_a_border_is_counted_once_in_the_octave_above(side, low, high):
    ground_truth, results = scene([(1, [5, 5, side, side])], [(1, 0.9, [5, 5, side, side]), (1, 0.8, NOWHERE)])
    row = {"from": low, "to": high, "num_objects": 1}
    found = {"AP": 1.0, "AP50": 1.0, "AR100": 1.0}
    (scores,) = analysis.by_octave(ground_truth, results, False)
    assert scores == pytest.approx(row | found)
    assert analysis.by_octave(ground_truth, results, True) == [row | {"AR100": 1.0, "AR1000": 1.0}]
    assert analysis.by_octave(ground_truth, [], False) == [row | dict.fromkeys(found, 0.0)]


def test_proposals_are_asked_up_to_the_thousandth():
    ground_truth, results = scene([(1, A)], [(1, 0.9, NOWHERE)] * 999 + [(1, 0.8, A)])
    rows = [analysis.by_octave(ground_truth, first + results, True)[0] for first in ([], results[:1])]
    assert [(row["AR100"], row["AR1000"]) for row in rows] == [(0.0, 1.0), (0.0, 0.0)]


@pytest.mark.parametrize("proposals", [False, True])
def test_no_octave_without_objects(proposals):
    crowd = scene([(1, A)], [(1, 0.9, A)], crowds=(0,))
    assert analysis.by_octave(*crowd, proposals) == [] == analysis.by_octave(*scene([], []), proposals)
    assert analysis.octave_table([]) == ""
