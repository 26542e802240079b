"""Lists of classes that published detectors were trained on: what their labels 0 .. k-1 mean.

COCO numbers its 80 categories with gaps, 1 to 90. torchvision's detectors have a label for every number, so that
label = number - 1 and ten labels are never used; detectron2's have the 80 in the order of the numbers.
"""

from dataclasses import dataclass

from fpn_jax.errors import UserError


@dataclass(frozen=True)
class ClassList:
    """Labels are places in the list."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...]  # that annotations and results use


_UNUSED = "N/A"  # torchvision's word for it
_COCO = (  # category ids 1 .. 90
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", _UNUSED, "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep"),
    *("cow", "elephant", "bear", "zebra", "giraffe", _UNUSED, "backpack", "umbrella", _UNUSED, _UNUSED),
    *("handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat"),
    *("baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", _UNUSED, "wine glass", "cup", "fork"),
    *("knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza"),
    *("donut", "cake", "chair", "couch", "potted plant", "bed", _UNUSED, "dining table", _UNUSED, _UNUSED, "toilet"),
    *(_UNUSED, "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink"),
    *("refrigerator", _UNUSED, "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
_USED = [number for number, name in enumerate(_COCO, start=1) if name != _UNUSED]

CLASS_LISTS = {
    "coco_91": ClassList(_COCO, tuple(range(1, 91))),  # 91 with the background, which is no label here
    "coco_80": ClassList(tuple(_COCO[number - 1] for number in _USED), tuple(_USED)),
}


def class_list(name: str) -> ClassList:
    """The list of that name; raises a `UserError` that tells which there are."""
    if name not in CLASS_LISTS:
        raise UserError(
            f"data.classes is {name!r}; choose one of {', '.join(CLASS_LISTS)}, or '' for the data set's own classes"
        )
    return CLASS_LISTS[name]
