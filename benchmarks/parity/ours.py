"""Every stage of our Faster R-CNN under the names that the stored torchvision results use, channels first.

body/C2 ... fpn/P2 ... rpn/obj_P2, rpn/delta_P2 ...      [n c h w], both images
rpn/proposals0, rpn/scores0, roi/class_logits0 ...       without padding rows; the number is the image's
out/boxes0, out/scores0, out/labels0                     in pixels of the original image, slots as labels
train/..., loss/...                                      of the training pass
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax.models.faster_rcnn import FasterRCNN
from fpn_jax.models.heads import box, rpn
from fpn_jax.models.pixels import normalize_pixels
from fpn_jax.types import Batch
from fpn_jax.weights import names

LOSSES = {  # torchvision's names
    "class": "loss/loss_classifier",
    "box": "loss/loss_box_reg",
    "rpn_objectness": "loss/loss_objectness",
    "rpn_box": "loss/loss_rpn_box_reg",
}
Arrays = dict[str, np.ndarray]


def inference(detector: FasterRCNN) -> Callable[..., dict[str, Any]]:
    """stages(variables, image [b h w 3], size [b 2], rois [b r 4]) -> arrays on the device, jitted; see `unpadded`.

    `rois` are boxes for the `roi/*_fixed` results, which no decision of the RPN comes before.
    """

    def stages(self: FasterRCNN, image, size, rois):
        batch = Batch(image, size, None, None, None)
        pixels = normalize_pixels(image, size, self.pixels, self.dtype)
        bottom_up = self.backbone(pixels)
        pyramid = self.neck(bottom_up)
        logits, deltas, anchors = self.predict_anchors(pyramid, image.shape[1:3])
        pooled = box.roi_features(self.box_settings, pyramid, rois)
        fixed_logits, fixed_deltas = self.box_head(pooled)
        return {
            "batch": pixels,
            "bottom_up": bottom_up,
            "pyramid": pyramid,
            "logits": logits,
            "deltas": deltas,
            "proposals": self.propose(logits, deltas, anchors, size),
            "pooled": pooled,
            "fixed": (fixed_logits, fixed_deltas),
            "detections": self.detect(batch),
        }

    return jax.jit(lambda variables, *args: detector.apply(variables, *args, method=stages))


def unpadded(detector: FasterRCNN, found: Mapping[str, Any]) -> Arrays:
    """The result of `inference` under the stored names; detections stay in pixels of the resized image."""
    found = jax.tree.map(np.asarray, dict(found))
    pyramid, result = found["pyramid"], {"batch": _nchw(found["batch"])}
    result |= {f"body/C{level}": _nchw(x) for level, x in found["bottom_up"].items()}
    result |= {f"fpn/P{level}": _nchw(x) for level, x in pyramid.items()}
    for level, logits in found["logits"].items():
        b, h, w = pyramid[level].shape[:3]
        result[f"rpn/obj_P{level}"] = _nchw(logits.reshape(b, h, w, -1))
        result[f"rpn/delta_P{level}"] = _nchw(found["deltas"][level].reshape(b, h, w, -1))
    detections, first = found["detections"], detector.box_settings.first_class
    for i, valid in enumerate(detections.valid):
        kept = found["proposals"].valid[i]
        result[f"rpn/proposals{i}"] = found["proposals"].boxes[i][kept]
        result[f"rpn/scores{i}"] = found["proposals"].scores[i][kept]
        result[f"out/boxes{i}"] = detections.boxes[i][valid]
        result[f"out/scores{i}"] = detections.scores[i][valid]
        result[f"out/labels{i}"] = detections.labels[i][valid] + first
    result["roi/align_fixed"] = found["pooled"].transpose(0, 1, 4, 2, 3)
    logits, deltas = found["fixed"]
    result["roi/class_logits_fixed"] = logits
    result["roi/box_deltas_fixed"] = deltas.reshape(*deltas.shape[:2], -1)
    return result


def training(detector: FasterRCNN) -> Callable[..., tuple[Any, Any]]:
    """stages(variables, batch) -> (losses and targets, gradients of the summed losses), jitted.

    The detector must sample in index order (`sampling="first"`), as the stored results did.
    """

    def targets(self: FasterRCNN, batch: Batch):
        pyramid = self.features(batch.image, batch.size, True)
        predicted = self.predict_anchors(pyramid, batch.image.shape[1:3])
        proposals = self.propose(*predicted, batch.size, True)
        anchors = self.anchor_grids(pyramid, batch.image.shape[1:3])

        def label(boxes, valid):
            matched = rpn.match_anchors(self.rpn_settings, anchors, boxes, valid)
            return matched, rpn.draw_matched(self.rpn_settings, matched, None)

        keys = jax.random.split(jax.random.key(0), batch.image.shape[0])  # unused: nothing is drawn
        rois = box.sample_rois(
            self.box_settings,
            self.box_head.num_classes,
            proposals.boxes,
            proposals.valid,
            batch.boxes,
            batch.labels,
            batch.valid,
            keys,
        )
        return proposals, jax.vmap(label)(batch.boxes, batch.valid), rois

    def loss(params, batch_stats, batch):
        variables = {"params": params, "batch_stats": batch_stats}
        (losses, _), _ = detector.apply(variables, batch, jax.random.key(0), method="losses", mutable=["batch_stats"])
        found, _ = detector.apply(variables, batch, method=targets, mutable=["batch_stats"])
        return sum(losses.values()), (losses, found)

    def stages(variables, batch):
        grads, found = jax.grad(loss, has_aux=True)(variables["params"], variables["batch_stats"], batch)
        return found, grads

    return jax.jit(stages)


def trained(detector: FasterRCNN, found: Any, grads: Any, format: Any) -> Arrays:
    """The result of `training` under the stored names; gradients as grad/<their name> in their layout."""
    losses, (proposals, anchors, rois) = jax.tree.map(np.asarray, found)
    result = {LOSSES[name]: value for name, value in losses.items()}
    matched, (index, positive, drawn) = anchors
    for i in range(len(matched)):
        result[f"train/proposals{i}"] = proposals.boxes[i][proposals.valid[i]]
        result[f"train/rpn_labels{i}"] = np.select([matched[i] >= 0, matched[i] == -1], [1, 0], -1)
        result[f"train/rpn_pos{i}"] = np.sort(index[i][positive[i] & drawn[i]])
        result[f"train/rpn_neg{i}"] = np.sort(index[i][~positive[i] & drawn[i]])
        result[f"train/roi_boxes{i}"] = rois.boxes[i][rois.valid[i]]
        result[f"train/roi_labels{i}"] = rois.labels[i][rois.valid[i]]
    size = detector.box_settings.pooled_size
    for path, x in flax.traverse_util.flatten_dict({"params": grads}).items():
        result[f"grad/{names.their_name(path, format)}"] = names.to_theirs(path, np.asarray(x), format, size)
    return result


def batch_of(images: np.ndarray, sizes: np.ndarray, boxes: list[np.ndarray], labels: list[np.ndarray]) -> Batch:
    """images [b h w 3], sizes [b 2], boxes [m 4] and labels [m] of each image -> a padded `Batch`."""
    most = max(max(map(len, boxes)), 1)
    valid = np.arange(most) < np.array([[len(x)] for x in boxes])
    padded = [np.zeros((len(images), most, 4), np.float32), np.zeros((len(images), most), np.int32)]
    for i in range(len(images)):
        padded[0][i, : len(boxes[i])], padded[1][i, : len(labels[i])] = boxes[i], labels[i]
    return Batch(
        image=jnp.asarray(images), size=jnp.asarray(sizes, jnp.int32), boxes=padded[0], labels=padded[1], valid=valid
    )


def _nchw(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 3, 1, 2)
