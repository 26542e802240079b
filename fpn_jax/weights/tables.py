"""How other frameworks call our modules: data only. `fpn_jax.weights.names` reads it, in both directions.

A table maps our module to theirs. {x} stands for a number and may stand in several places; {x-1} is one less. What the
leaves of a module are called (kernel, scale, mean ...) follows from their kind and is the same in all tables. To teach
this project another detector, write its table, add it to FORMATS, and put its names and shapes beside the others' in
tests/data/weights.
"""

from dataclasses import dataclass, field

from fpn_jax.models.backbones.mobilenet import LARGE, STEM

Table = dict[str, str]


@dataclass(frozen=True)
class Format:
    """The names of one framework's model."""

    framework: str
    name: str
    sign: tuple[str, ...]  # names of weights that together only such files have
    modules: Table
    # Regular expressions of weights that a detector has no use for: counters, constants, an ImageNet classifier.
    ignored: tuple[str, ...] = ()
    # Older names: regular expression -> what stands there now.
    renamed: Table = field(default_factory=dict)
    # What the running means and variances are where a file has none; None: it must have them.
    statistics: tuple[float, float] | None = None
    counters: bool = False  # whether live batch norms count their batches (`num_batches_tracked`)
    ours: bool = False  # our own: the paths of our variables, joined by slashes


def _prefixed(table: Table, ours: str, theirs: str) -> Table:
    return {ours + a: theirs + b for a, b in table.items()}


TORCHVISION_RESNET = {
    "stem_conv": "conv1",
    "stem_norm": "bn1",
    "stage{l}_block{i}/conv{n}": "layer{l-1}.{i}.conv{n}",
    "stage{l}_block{i}/norm{n}": "layer{l-1}.{i}.bn{n}",
    "stage{l}_block{i}/conv_shortcut": "layer{l-1}.{i}.downsample.0",
    "stage{l}_block{i}/norm_shortcut": "layer{l-1}.{i}.downsample.1",
}


def _mobilenet() -> Table:
    """The position of a convolution in a block depends on whether the block expands and squeezes."""
    table = {"stem_conv": "0.0", "stem_norm": "0.1"}
    channels = STEM
    for i, spec in enumerate(LARGE, start=1):
        expands = spec.expanded != channels
        parts = ["expand"] * expands + ["depth"] + ["squeeze"] * spec.squeezes + ["project"]
        for j, part in enumerate(parts):
            if part == "squeeze":
                table |= {
                    f"block{i:02d}/{a}": f"{i}.block.{j}.{b}" for a, b in {"squeeze": "fc1", "excite": "fc2"}.items()
                }
            else:
                table |= {
                    f"block{i:02d}/{part}_conv": f"{i}.block.{j}.0",
                    f"block{i:02d}/{part}_norm": f"{i}.block.{j}.1",
                }
        channels = spec.features
    last = len(LARGE) + 1
    return table | {"last_conv": f"{last}.0", "last_norm": f"{last}.1"}


TORCHVISION_MOBILENET = _mobilenet()


def _torchvision_neck(lowest: int) -> Table:
    """torchvision counts the levels from 0."""
    return {
        "neck/lateral{l}": f"backbone.fpn.inner_blocks.{{l-{lowest}}}.0",
        "neck/lateral_norm{l}": f"backbone.fpn.inner_blocks.{{l-{lowest}}}.1",
        "neck/smooth{l}": f"backbone.fpn.layer_blocks.{{l-{lowest}}}.0",
        "neck/smooth_norm{l}": f"backbone.fpn.layer_blocks.{{l-{lowest}}}.1",
    }


TORCHVISION_RPN = {
    "rpn_head/conv": "rpn.head.conv.0.0",
    "rpn_head/conv{n}": "rpn.head.conv.{n-1}.0",
    "rpn_head/objectness": "rpn.head.cls_logits",
    "rpn_head/deltas": "rpn.head.bbox_pred",
}
TORCHVISION_BOX = {
    "box_head/fc{n}": "roi_heads.box_head.fc{n+5}",
    "box_head/classes": "roi_heads.box_predictor.cls_score",
    "box_head/deltas": "roi_heads.box_predictor.bbox_pred",
}
TORCHVISION_BOX_V2 = TORCHVISION_BOX | {
    "box_head/conv{n}": "roi_heads.box_head.{n-1}.0",
    "box_head/norm{n}": "roi_heads.box_head.{n-1}.1",
    "box_head/fc{n}": "roi_heads.box_head.{n+4}",  # behind four convolutions and the flattening
}
# Checkpoints from before torchvision 0.14 lack the inner index.
TORCHVISION_RENAMED = {
    r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.(weight|bias)": r"backbone.fpn.\1_blocks.\2.0.\3",
    r"rpn\.head\.conv\.(weight|bias)": r"rpn.head.conv.0.0.\1",
}
COUNTERS = r".*\.num_batches_tracked"

DETECTRON2_RESNET = {
    "stem_conv": "stem.conv1",
    "stem_norm": "stem.conv1.norm",
    "stage{l}_block{i}/conv{n}": "res{l}.{i}.conv{n}",
    "stage{l}_block{i}/norm{n}": "res{l}.{i}.conv{n}.norm",
    "stage{l}_block{i}/conv_shortcut": "res{l}.{i}.shortcut",
    "stage{l}_block{i}/norm_shortcut": "res{l}.{i}.shortcut.norm",
}
DETECTRON2_NECK = {"neck/lateral{l}": "backbone.fpn_lateral{l}", "neck/smooth{l}": "backbone.fpn_output{l}"}
DETECTRON2_RPN = {
    "rpn_head/conv": "proposal_generator.rpn_head.conv",
    "rpn_head/objectness": "proposal_generator.rpn_head.objectness_logits",
    "rpn_head/deltas": "proposal_generator.rpn_head.anchor_deltas",
}
DETECTRON2_BOX = {
    "box_head/fc{n}": "roi_heads.box_head.fc{n}",
    "box_head/classes": "roi_heads.box_predictor.cls_score",
    "box_head/deltas": "roi_heads.box_predictor.bbox_pred",
}
# Constants that detectron2 keeps among the weights.
DETECTRON2_IGNORED = (r"pixel_(mean|std)", r"proposal_generator\.anchor_generator\.cell_anchors\.\d+")
# Detectron's ImageNet weights, which detectron2 starts from: one flat name each, batch norms folded to scale and shift.
_CAFFE2_LEAVES = {
    "w": "weight",
    "b": "bias",
    "bn_(?:s|gamma)": "norm.weight",
    "bn_(?:b|beta)": "norm.bias",
    "bn_(?:rm|running_mean)": "norm.running_mean",
    "bn_(?:riv|running_var)": "norm.running_var",
}
DETECTRON1_RENAMED = {
    **{rf"(?:res_)?conv1_{leaf}": f"stem.conv1.{name}" for leaf, name in _CAFFE2_LEAVES.items()},
    **{
        rf"res(\d)_(\d+)_branch{theirs}_{leaf}": rf"res\1.\2.{ours}.{name}"
        for theirs, ours in {"2a": "conv1", "2b": "conv2", "2c": "conv3", "1": "shortcut"}.items()
        for leaf, name in _CAFFE2_LEAVES.items()
    },
}

_RESNET_IN_DETECTOR = _prefixed(TORCHVISION_RESNET, "backbone/", "backbone.body.")

# The first whose sign a file bears is taken, so the more particular ones stand first.
FORMATS = (
    Format("fpn_jax", "fpn_jax detector", ("params/backbone/stem_conv/kernel",), {}, ours=True),
    Format(
        "torchvision",
        "torchvision Faster R-CNN v2, ResNet-FPN",
        ("backbone.body.conv1.weight", "roi_heads.box_head.0.0.weight"),
        _RESNET_IN_DETECTOR | _torchvision_neck(2) | TORCHVISION_RPN | TORCHVISION_BOX_V2,
        (COUNTERS,),
        counters=True,
    ),
    Format(
        "torchvision",
        "torchvision Faster R-CNN, ResNet-FPN",
        ("backbone.body.conv1.weight", "roi_heads.box_head.fc6.weight"),
        _RESNET_IN_DETECTOR | _torchvision_neck(2) | TORCHVISION_RPN | TORCHVISION_BOX,
        (COUNTERS,),
        TORCHVISION_RENAMED,
        counters=True,
    ),
    Format(
        "torchvision",
        "torchvision Faster R-CNN, MobileNetV3-Large-FPN",
        ("backbone.body.0.0.weight", "roi_heads.box_head.fc6.weight"),
        _prefixed(TORCHVISION_MOBILENET, "backbone/", "backbone.body.")
        | _torchvision_neck(5)
        | TORCHVISION_RPN
        | TORCHVISION_BOX,
        (COUNTERS,),
        TORCHVISION_RENAMED,
        counters=True,
    ),
    Format(
        "torchvision",
        "torchvision or timm ResNet",
        ("conv1.weight", "layer1.0.conv1.weight"),
        _prefixed(TORCHVISION_RESNET, "backbone/", ""),
        (COUNTERS, r"fc\.(weight|bias)"),
        counters=True,
    ),
    Format(
        "torchvision",
        "torchvision MobileNetV3-Large",
        ("features.0.0.weight", "features.16.0.weight"),
        _prefixed(TORCHVISION_MOBILENET, "backbone/", "features."),
        (COUNTERS, r"classifier\..*"),
        counters=True,
    ),
    Format(
        "detectron2",
        "detectron2 ResNet-FPN",
        ("backbone.bottom_up.stem.conv1.weight",),
        _prefixed(DETECTRON2_RESNET, "backbone/", "backbone.bottom_up.")
        | DETECTRON2_NECK
        | DETECTRON2_RPN
        | DETECTRON2_BOX,
        DETECTRON2_IGNORED,
    ),
    Format(
        "detectron2",
        "detectron2 ResNet",
        ("stem.conv1.weight", "res2.0.conv1.weight"),
        _prefixed(DETECTRON2_RESNET, "backbone/", ""),
        (
            r"stem\.fc\..*",
            r"(fc1000|pred)[._].*",
            r".*_momentum",
            r"(stem|res\d\.\d+)\.(conv\d|shortcut)\.bias",
            COUNTERS,
        ),
        DETECTRON1_RENAMED,
        statistics=(0.0, 1.0 - 1e-5),  # so that with eps 1e-5 the norm is its scale and shift alone, as there
    ),
)
