"""Pictures of boxes, contact sheets of them, and the curves of a run.

Images are uint8 [h w 3] RGB, boxes float [n 4] xyxy in pixels of the image they are drawn on.
"""

import colorsys
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from fpn_jax.errors import UserError
from fpn_jax.storage import paths

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_SMALLEST = 640  # pictures whose longest side is below this are enlarged, or no label could be read
_CROWDED = 20  # boxes in a picture, from which on lines are thin and labels small
_TITLE, _ROW = 16, 26  # height of the letters and of the rows around a picture
_INK, _PAPER = (38, 38, 42), (255, 255, 255)


@functools.cache
def _palette(size: int = 80) -> np.ndarray:
    """Colours, uint8 RGB [size 3]: each the one of many bright ones that is farthest in Lab from those before it."""
    shades = (0.85, 1.0), (0.45, 1.0), (1.0, 0.75), (0.6, 0.75)
    rgb = np.array([colorsys.hsv_to_rgb((56 + hue) % 60 / 60, *shade) for shade in shades for hue in range(60)])
    lab = cv2.cvtColor(rgb[None].astype(np.float32), cv2.COLOR_RGB2LAB)[0]
    chosen, distance = [0], np.linalg.norm(lab - lab[0], axis=1)
    for _ in range(size - 1):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return (255 * rgb[chosen]).round().astype(np.uint8)


def class_color(label: int) -> tuple[int, int, int]:
    """RGB of a class: always the same for a label, well apart for the first ones; from the 80th on they come again."""
    return tuple(_palette()[label % len(_palette())].tolist())


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None,
    class_names: Sequence[str],
    crowd: np.ndarray | None = None,
    crowded: bool | None = None,
) -> np.ndarray:
    """A copy of the image with boxes and their classes (and scores, 0 .. 1), enlarged if it is tiny.

    boxes [n 4], labels [n] 0 .. k-1, scores [n] or None, crowd bool [n] or None (marks regions of many objects). A
    label that finds no place without covering another one is left out, those of lower scores first. crowded: thin lines
    and small labels, by default from 20 boxes on.
    """
    labels, boxes = np.asarray(labels), np.asarray(boxes, np.float64).reshape(-1, 4)
    canvas, scale = _enlarge(np.ascontiguousarray(image))
    order = np.argsort(-(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), kind="stable")
    corners = np.clip(np.rint(boxes * scale), 0, np.tile(canvas.shape[1::-1], 2) - 1).astype(int)
    crowded = len(boxes) >= _CROWDED if crowded is None else crowded
    line = max(1, round(max(canvas.shape) / 900)) if crowded else max(2, round(max(canvas.shape) / 500))
    for i in order:  # small ones last, so that large ones do not hide them
        start, end = corners[i, :2].tolist(), corners[i, 2:].tolist()
        if not crowded:
            cv2.rectangle(canvas, start, end, _INK, line + 2)
        cv2.rectangle(canvas, start, end, class_color(labels[i]), line)
    texts = [class_names[label] for label in labels]
    if crowd is not None:
        texts = [f"{text} (crowd)" if many else text for text, many in zip(texts, crowd, strict=True)]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores, strict=True)]
        order = np.argsort(-np.asarray(scores), kind="stable")
    height = max(10.0 if crowded else 13.0, max(canvas.shape) / (85 if crowded else 60))
    _draw_labels(canvas, corners[order], [texts[i] for i in order], labels[order], height)
    return canvas


def _enlarge(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy at least _SMALLEST long, and the factors for boxes [4]."""
    h, w = image.shape[:2]
    factor = max(1.0, _SMALLEST / max(h, w))
    if factor == 1.0:
        return image.copy(), np.ones(4)
    size = max(1, round(w * factor)), max(1, round(h * factor))
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), np.tile([size[0] / w, size[1] / h], 2)


def _draw_labels(
    canvas: np.ndarray, corners: np.ndarray, texts: Sequence[str], labels: np.ndarray, height: float
) -> None:
    """Write each text at its box [4], at the first of a few places that is free."""
    canvas_h, canvas_w = canvas.shape[:2]
    taken = np.zeros((canvas_h, canvas_w), bool)
    pad = max(2, round(height / 4))
    for (x1, y1, x2, y2), text, label in zip(corners.tolist(), texts, labels, strict=True):
        w, h = _text_size(text, height)
        w, h = w + 2 * pad, h + 2 * pad
        above, below, left, right = y1 - h, y2 + 1, x1, x2 - w + 1
        for x, y in ((left, above), (left, y1), (right, above), (left, below), (right, below), (left, y2 - h)):
            x, y = max(0, min(x, canvas_w - w)), max(0, min(y, canvas_h - h))
            if not taken[y : y + h, x : x + w].any():
                taken[y : y + h, x : x + w] = True
                color = class_color(label)
                cv2.rectangle(canvas, (x, y), (x + w - 1, y + h - 1), color, cv2.FILLED)
                _write(canvas, text, x + pad, y + pad, height, _ink_on(color))
                break


def _font(height: float) -> tuple[float, int]:
    """OpenCV's scale and stroke for letters of that many pixels."""
    return 10.0 * height / cv2.getTextSize("Hg", _FONT, 10.0, 1)[0][1], max(1, round(height / 14))


def _text_size(text: str, height: float) -> tuple[int, int]:
    """Width and height in pixels of a text, with what hangs below the line."""
    return cv2.getTextSize(text, _FONT, *_font(height))[0][0], round(1.3 * height)


def _write(canvas: np.ndarray, text: str, x: int, y: int, height: float, color: tuple[int, int, int]) -> None:
    """Write with the upper left corner at x, y."""
    scale, stroke = _font(height)
    cv2.putText(canvas, text, (x, y + round(height)), _FONT, scale, color, stroke, cv2.LINE_AA)


def _ink_on(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever reads better (luma of ITU-R BT.601)."""
    return _INK if np.dot(color, (0.299, 0.587, 0.114)) > 140 else _PAPER


def side_by_side(
    image: np.ndarray,
    ground_truth: Mapping[str, np.ndarray],
    predictions: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    min_score: float = 0.5,
    caption: str = "",
    longest: int = 900,
) -> np.ndarray:
    """Ground truth on the left, predictions from min_score on on the right, with titles and a key to the colours.

    ground_truth has boxes [n 4], labels [n] and may have crowd bool [n]; predictions has boxes [d 4], scores [d] and
    labels [d]. Boxes are in pixels of `image`; each half is as large as the image, at most `longest` pixels.
    """
    shown = np.asarray(predictions["scores"]) >= min_score
    found = {key: np.asarray(predictions[key])[shown] for key in ("boxes", "labels", "scores")}
    scale = min(1.0, longest / max(image.shape))
    if scale < 1.0:
        size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    count, crowd = len(ground_truth["labels"]), ground_truth.get("crowd")
    crowded = max(count, len(found["labels"])) >= _CROWDED  # the halves look alike
    truth = draw(image, _scaled(ground_truth, scale), ground_truth["labels"], None, class_names, crowd, crowded)
    guess = draw(image, _scaled(found, scale), found["labels"], found["scores"], class_names, None, crowded)
    titles = (
        f"ground truth: {count} object{'s' * (count != 1)}",
        f"predictions: {len(found['labels'])} with score >= {min_score:g}",
    )
    half = max(truth.shape[1], *(_text_size(title, _TITLE)[0] + 16 for title in titles))
    body = np.full((truth.shape[0], 2 * half + 12, 3), _PAPER, np.uint8)
    head = _strip(body.shape[1], 2 if caption else 1)
    for x, picture, title in ((0, truth, titles[0]), (half + 12, guess, titles[1])):
        body[:, x : x + picture.shape[1]] = picture
        _write(head, title, x + 8, head.shape[0] - _ROW, _TITLE, _INK)
    if caption:
        _write(head, caption, 8, 8, _TITLE, (110, 110, 118))
    labels = sorted({*np.asarray(ground_truth["labels"]).tolist(), *found["labels"].tolist()})
    return np.concatenate([head, body, _color_key(body.shape[1], labels, class_names)])


def _scaled(objects: Mapping[str, np.ndarray], scale: float) -> np.ndarray:
    return np.asarray(objects["boxes"], np.float64).reshape(-1, 4) * scale


def _strip(width: int, rows: int) -> np.ndarray:
    return np.full((8 + _ROW * rows, width, 3), _PAPER, np.uint8)


def _color_key(width: int, labels: Sequence[int], class_names: Sequence[str]) -> np.ndarray:
    """A patch of each class's colour with its name, in as many rows as they need."""
    places, x, row = [], 8, 0
    for label in labels:
        needed = 22 + _text_size(class_names[label], 14)[0] + 18
        if x > 8 and x + needed > width:
            x, row = 8, row + 1
        places.append((label, x, row))
        x += needed
    strip = _strip(width, row + 1)
    for label, x, row in places:
        y = 8 + _ROW * row
        cv2.rectangle(strip, (x, y), (x + 15, y + 15), class_color(label), cv2.FILLED)
        _write(strip, class_names[label], x + 22, y, 14, _INK)
    return strip


def contact_sheet(pictures: Sequence[np.ndarray], columns: int | None = None, width: int = 2400) -> np.ndarray:
    """Many pictures on one page, at most `width` pixels wide; columns by default so that it is about as wide as high.

    Each picture goes to the foot of the shortest column. Raises ValueError without pictures.
    """
    if not pictures:
        raise ValueError("no pictures for a contact sheet")
    if columns is None:
        columns = round(np.sqrt(sum(picture.shape[0] / picture.shape[1] for picture in pictures)))
    columns = max(1, min(columns, len(pictures)))
    gap = 16
    cell = min((width - gap) // columns - gap, max(picture.shape[1] for picture in pictures))
    heights, places = [gap] * columns, []
    for picture in (_fit_width(picture, cell) for picture in pictures):
        column = heights.index(min(heights))
        places.append((picture, heights[column], gap + column * (cell + gap)))
        heights[column] += picture.shape[0] + gap
    page = np.full((max(heights), gap + columns * (cell + gap), 3), _PAPER, np.uint8)
    for picture, y, x in places:
        page[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return page


def _fit_width(picture: np.ndarray, width: int) -> np.ndarray:
    if picture.shape[1] <= width:
        return picture
    size = width, max(1, round(picture.shape[0] * width / picture.shape[1]))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def save(path: str | os.PathLike, image: np.ndarray, quality: int = 95) -> None:
    """Write a picture; the name's ending says how (.jpg, .png). Raises `UserError` if that is not possible.

    quality: of a .jpg, 0 .. 100.
    """
    path = paths.path(path)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if path.suffix in (".jpg", ".jpeg") else []
    try:
        done, data = cv2.imencode(path.suffix, image[..., ::-1], options)
    except cv2.error:
        done = False
    if not done:
        raise UserError(f"{path}: cannot write pictures that end in {path.suffix!r}; use .jpg or .png")
    paths.write_atomically(path, lambda file: file.write(data.tobytes()), binary=True)


def curves(metrics: str | os.PathLike | Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Loss and AP, of an RPN its recall, over the steps of a run, as a PNG.

    metrics is WORKDIR/metrics.jsonl or its lines as dicts: {"step", "loss", ..., "eval/AP", "eval/AP50", ...}, null
    where a number has no meaning. Raises `UserError` if the file cannot be read or the picture not be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, as it takes every command half a second
    from matplotlib.figure import Figure

    rows = _read_lines(paths.path(metrics)) if isinstance(metrics, str | os.PathLike) else metrics
    figure = Figure(figsize=(9, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _plot_loss(upper, *_series(rows, "loss"))
    logged = {key for row in rows for key in row}
    recall = any(key.endswith("/AR1000") for key in logged)
    for name in ("AR1000", "AR100") if recall else ("AP50", "AP"):
        for key in sorted(key for key in logged if key.endswith(f"/{name}")):
            steps, values = _series(rows, key)
            split = key.removesuffix(f"/{name}").removeprefix("eval").strip("/")
            _plot_scores(lower, steps, values, f"{name} {split}".strip())
    upper.set_ylabel("training loss")
    lower.set_ylabel("average recall" if recall else "average precision")
    lower.set_ylim(0, 1)
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        else:
            axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color="grey")
    figure.canvas.draw()
    save(path, np.asarray(figure.canvas.buffer_rgba())[..., :3])


def _read_lines(path: Any) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the metrics.jsonl of a run") from None
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]  # one without is being written
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete its broken line") from None


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one metric; of a step that is there twice, the later line."""
    points = {row["step"]: row[key] for row in rows if row.get(key) is not None and np.isfinite(row[key])}
    steps = sorted(points)
    return np.array(steps, np.float64), np.array([points[step] for step in steps], np.float64)


def _plot_loss(axes: Any, steps: np.ndarray, loss: np.ndarray) -> None:
    if not len(steps):
        return
    many = len(steps) > 10
    style = {"alpha": 0.3, "linewidth": 0.8} if many else {"marker": "o"}
    axes.plot(steps, loss, color="tab:blue", label="each step", **style)
    if many:
        axes.plot(steps, _smooth(loss), color="tab:blue", linewidth=2, label="smoothed")
        # A few wild first steps would flatten all the rest.
        top = 1.5 * float(np.quantile(loss, 0.98))
        axes.set_ylim(0, top if 0 < top < loss.max() else None)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the run; at the ends, over what there is of it."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[end] - sums[start]) / (end - start)


def _plot_scores(axes: Any, steps: np.ndarray, values: np.ndarray, label: str) -> None:
    if not len(steps):
        return
    (line,) = axes.plot(steps, values, linewidth=2, marker="o", markersize=4, label=label)
    axes.annotate(
        f"{values[-1]:.3f}",
        (steps[-1], values[-1]),
        textcoords="offset points",
        xytext=(6, 3),
        color=line.get_color(),
    )
