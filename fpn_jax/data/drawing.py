"""Scenes drawn from a seed: shapes of eight classes over textured ground, with clutter and occlusion.

Everything is computed in integers (positions in fixed point, colours in 0 .. 255), so that a seed gives the same
pixels on every machine and with every version of NumPy and OpenCV. A scene is painted back to front:

    ground (gradient, noise octaves, stripes) -> clutter -> objects, each with a soft shadow -> grain

An object's size is the longer side of its upright box, log-uniform over 8 .. 256 pixels: five octaves, one for every
level of the pyramid.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

CLASSES = ("disc", "ring", "square", "triangle", "star", "cross", "crescent", "arrow")
SIZES = (8, 256)  # smallest and largest longer side in pixels
FRAMES = ((320, 320), (288, 352), (352, 288), (256, 384), (384, 256))  # height, width
MAX_HIDDEN = 0.5  # an object may be covered, or lie outside the image, to this fraction of its area

_UNIT = 8192  # half the length of a shape in its own coordinates
_ROTATION = 15  # degrees either way
_EMPTY_PERCENT = 3  # of the scenes have no object
_PALETTE = np.array(
    [
        (214, 57, 48), (240, 134, 38), (246, 201, 68), (122, 182, 64), (34, 139, 84), (38, 166, 178),
        (58, 121, 208), (54, 66, 158), (138, 76, 178), (222, 98, 160), (122, 72, 46), (248, 244, 232),
        (38, 40, 52), (156, 212, 236),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene; `mask` bool [h w] is the part of it that can be seen."""

    label: int
    size: int  # longer side of the whole object, pixels
    mask: np.ndarray


def draw_scene(seed: int, split: int, index: int) -> tuple[np.ndarray, list[SceneObject]]:
    """Draw scene number `index` of a split: (uint8 [h w 3] RGB, objects in painting order).

    The three numbers (all >= 0) alone decide the picture.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, split, index])))
    height, width = FRAMES[0] if _chance(rng, 40) else FRAMES[_integer(rng, 1, len(FRAMES) - 1)]
    canvas = _ground(rng, height, width)
    for _ in range(_integer(rng, 2, 7)):
        _clutter(rng, canvas)
    owner = np.zeros((height, width), np.intp)  # 0 ground, i the object number i that is on top here
    labels, sizes, areas, seen = [], [], [], []
    for size in _object_sizes(rng, index):
        label = _integer(rng, 0, len(CLASSES) - 1)
        stamp = _shape(rng, label, size)
        place = _find_place(rng, stamp.solid, owner, areas, seen)
        if place is None:
            continue
        _paint(rng, canvas, stamp, place)
        window, cut = _windows(place, stamp.solid.shape, canvas.shape[1:])
        solid = stamp.solid[cut]
        hidden = np.bincount(owner[window][solid], minlength=len(areas) + 1)
        seen = [pixels - int(lost) for pixels, lost in zip(seen, hidden[1:], strict=True)]
        owner[window][solid] = len(areas) + 1
        seen.append(int(np.count_nonzero(solid)))
        labels.append(label)
        sizes.append(size)
        areas.append(int(np.count_nonzero(stamp.solid)))
    noise = np.frombuffer(rng.bytes(height * width), np.uint8).astype(np.int16).reshape(height, width)
    canvas += (noise & 7) + (noise >> 3 & 7) - 7  # film grain
    image = np.ascontiguousarray(np.moveaxis(np.clip(canvas, 0, 255).astype(np.uint8), 0, 2))
    objects = [SceneObject(labels[i], sizes[i], owner == i + 1) for i in range(len(areas))]
    return image, objects


def _integer(rng: np.random.Generator, low: int, high: int) -> int:
    """An integer of low .. high, both included."""
    return int(rng.integers(low, high + 1))


def _chance(rng: np.random.Generator, percent: int) -> bool:
    return _integer(rng, 0, 99) < percent


def _object_sizes(rng: np.random.Generator, index: int) -> list[int]:
    """Longer sides of a scene's objects, largest first, so that small ones are not painted over."""
    if _chance(rng, _EMPTY_PERCENT):
        return []
    count = _integer(rng, 5, 16)
    sizes = []
    for _ in range(count):
        octave = _integer(rng, 0, 1023) * 5 / 1024
        sizes.append(int(SIZES[0] * 2**octave + 0.5))
    return sorted(sizes, reverse=True)


# ---- ground and clutter -----------------------------------------------------------------------------------------


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """int16 [3 h w]: a muted colour gradient with noise of several octaves and, at times, stripes."""
    rows, columns = np.ogrid[:height, :width]
    value = _integer(rng, 60, 190)
    start, stop = (value + rng.integers(-28, 29, 3, dtype=np.int16) for _ in range(2))
    along, across = _integer(rng, 1, 256), _integer(rng, 1, 256)
    down = (along * rows * 256 // (height * (along + across))).astype(np.int16)
    ramp = down + (across * columns * 256 // (width * (along + across))).astype(np.int16)
    light = np.zeros((height, width), np.int16)
    for cells, strength in ((3, 40), (9, 26), (30, 16), (90, 10)):
        light += _noise(rng, cells, height, width) * np.int16(_integer(rng, strength // 3, strength)) >> 7
    if _chance(rng, 35):
        period = _integer(rng, 10, 60) * 256
        phase = (rows * _integer(rng, -256, 256)).astype(np.int32) + columns * np.int32(_integer(rng, -256, 256))
        wave = np.abs(phase % np.int32(period) - period // 2) - period // 4
        light += (wave * np.int32(_integer(rng, 6, 22)) // (period // 4)).astype(np.int16)
    tint = _noise(rng, 4, height, width)
    shades = rng.integers(-14, 15, 3, dtype=np.int16)
    canvas = [start[i] + ((stop[i] - start[i]) * ramp >> 8) + light + (tint * shades[i] >> 7) for i in range(3)]
    return np.stack(canvas)


def _noise(rng: np.random.Generator, cells: int, height: int, width: int) -> np.ndarray:
    """int16 [h w] in -128 .. 127, smooth over 1/cells of the image."""
    coarse = rng.integers(0, 256, (cells + 1, cells + 1), dtype=np.uint8)
    fine = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)  # exact: same everywhere
    return fine.astype(np.int16) - np.int16(128)


def _clutter(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Paint something that is no object: a line, a blob or a bent wire, in a colour close to the ground's."""
    y, x = (_integer(rng, 0, side - 1) for side in canvas.shape[1:])
    kind = _integer(rng, 0, 2)
    reach = (160, 70, 130)[kind]
    window = slice(max(y - reach, 0), y + reach), slice(max(x - reach, 0), x + reach)
    rows, columns = np.ogrid[: canvas.shape[1], : canvas.shape[2]]
    rows, columns = (rows[window[0]] - y).astype(np.int32), (columns[:, window[1]] - x).astype(np.int32)
    dx, dy = (_integer(rng, -64, 64) or 1 for _ in range(2))
    length = math.isqrt(dx * dx + dy * dy)
    across, along = rows * dx - columns * dy, rows * dy + columns * dx
    if kind == 0:  # a line
        inside = np.abs(across) <= _integer(rng, 1, 5) * length // 2
        inside &= np.abs(along) <= _integer(rng, 30, 155) * length
    elif kind == 1:  # a blob with a ragged edge
        radius = _integer(rng, 10, 45)
        ragged = _noise(rng, 10, *across.shape).astype(np.int32) * (radius * radius)
        inside = rows * rows + columns * columns + ragged // 192 <= radius * radius
    else:  # a piece of a thin wave
        bend = along * along // (length * _integer(rng, 40, 200))
        inside = np.abs(across - bend) <= _integer(rng, 1, 3) * length
        inside &= np.abs(along) <= _integer(rng, 20, 70) * length
    shift = _integer(rng, 18, 42) * (1 if _chance(rng, 50) else -1)
    canvas[:, *window] += inside * (shift + rng.integers(-10, 11, (3, 1, 1), dtype=np.int16))


# ---- objects ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stamp:
    """A shape on its own small canvas: coverage in 0 .. 256 and, per pixel, its own coordinates u and v."""

    coverage: np.ndarray  # int32 [h w]
    solid: np.ndarray  # bool [h w], at least half covered
    u: np.ndarray
    v: np.ndarray


def _inside(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether the points u, v (int32, v downwards) lie in the shape, whose corners are about _UNIT away.

    Numbers are chosen so that no product leaves int32 for points up to 3 _UNIT away.
    """
    across, down = np.abs(u), np.abs(v)
    if name == "square":
        return (across <= 7200) & (down <= 7200)
    if name == "triangle":
        return (v <= 6100) & (across * 22 <= 13 * (v + 8000))
    if name == "cross":
        return ((across <= 2650) & (down <= 8000)) | ((down <= 2650) & (across <= 8000))
    if name == "arrow":
        head = (v <= 480) & (across * 21 <= 17 * (v + 8000))
        return head | ((v > 0) & (v <= 8000) & (across <= 2550))
    if name == "star":  # every point of a pentagram is behind at least four of its five lines
        behind = np.zeros(u.shape, np.int8)
        for corner in range(5):
            cosine, sine = _direction(72 * corner - 90)
            behind += u * cosine + v * sine <= 3120 * 16384
        return behind >= 4
    square = u * u + v * v
    if name == "disc":
        return square <= _UNIT**2
    if name == "ring":
        return (square <= _UNIT**2) & (square >= 4320**2)
    if name == "crescent":
        return (square <= _UNIT**2) & ((u - 3750) ** 2 + v * v >= 6550**2)
    raise ValueError(name)


def _direction(degrees: int) -> tuple[int, int]:
    """Cosine and sine times 2**14: rounded, the last bit of the machine's own does not matter."""
    angle = math.radians(degrees)
    return round(math.cos(angle) * 16384), round(math.sin(angle) * 16384)


def _shape(rng: np.random.Generator, label: int, size: int) -> _Stamp:
    """Draw a shape of the class, turned and stretched a little, with a longer side of `size` pixels."""
    cosine, sine = _direction(_integer(rng, -_ROTATION, _ROTATION))
    stretch = _integer(rng, 820, 1220)  # of u against v, / 1000

    def local(n: int, scale: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Own coordinates of an n x n grid; `scale` is 2**14 of them per half-sample, `step` a point's half-samples."""
        axis = (np.arange(n, dtype=np.int64) * 2 + 1 - n) * (step * scale)
        x_u, y_u, x_v, y_v = (
            (axis * factor >> 28).astype(np.int32)
            for factor in (cosine * 1000 // stretch, sine * 1000 // stretch, -sine, cosine)
        )
        return x_u[None, :] + y_u[:, None], x_v[None, :] + y_v[:, None]

    # Measure on a coarse grid how far the shape reaches, then choose the scale that makes it `size` pixels long.
    probe = 96
    reach = 16384 * 3 * _UNIT // (2 * probe)
    rows, columns = np.nonzero(_inside(CLASSES[label], *local(probe, reach, 1)))
    top, left = int(rows.min()), int(columns.min())
    extent = max(int(rows.max()) - top, int(columns.max()) - left) + 1
    samples = 4 if size <= 64 else 2
    side = size * probe // extent + 3  # pixels of the stamp, with room for the part beyond the longer side
    scale = reach * extent // (size * samples)
    inside = _inside(CLASSES[label], *local(side * samples, scale, 1))
    counts = sum(inside.view(np.uint8)[i::samples] for i in range(samples))
    counts = sum(counts[:, i::samples] for i in range(samples))
    coverage = counts.astype(np.int32) * (256 // samples**2)
    solid = coverage >= 128
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    u, v = local(side, scale, samples)
    return _Stamp(coverage[box], solid[box], u[box], v[box])


def _windows(place: tuple[int, int], shape: tuple[int, int], canvas: tuple[int, int]) -> tuple:
    """The part of the canvas that a stamp at (top, left) covers, and that part of the stamp."""
    window, cut = [], []
    for start, length, limit in zip(place, shape, canvas, strict=False):
        low, high = max(start, 0), min(start + length, limit)
        window.append(slice(low, high))
        cut.append(slice(low - start, high - start))
    return tuple(window), tuple(cut)


def _find_place(
    rng: np.random.Generator, solid: np.ndarray, owner: np.ndarray, areas: list[int], seen: list[int]
) -> tuple[int, int] | None:
    """A (top, left) where enough of this object and of all those below it can be seen, or None.

    `areas` and `seen` are the pixels of the objects painted so far, in all and as far as they can be seen.
    """
    height, width = solid.shape
    whole = int(np.count_nonzero(solid))
    small = max(height, width) < 24  # these stay whole: a part of one cannot be recognised
    out_y, out_x = (height // 4, width // 4) if _chance(rng, 25) and not small else (0, 0)  # may lie partly outside
    allowed = MAX_HIDDEN if _chance(rng, 40) else 0.1
    for attempt in range(30):
        top = _integer(rng, -out_y, max(owner.shape[0] - height + out_y, -out_y))
        left = _integer(rng, -out_x, max(owner.shape[1] - width + out_x, -out_x))
        window, cut = _windows((top, left), solid.shape, owner.shape)
        hidden = np.bincount(owner[window][solid[cut]], minlength=len(areas) + 1)
        limit = allowed if attempt < 20 or small else MAX_HIDDEN
        if hidden.sum() >= whole * (1 - limit) and all(
            pixels - lost >= area * (1 - limit) or not lost
            for pixels, lost, area in zip(seen, hidden[1:], areas, strict=True)
        ):
            return top, left
    return None


def _paint(rng: np.random.Generator, canvas: np.ndarray, stamp: _Stamp, place: tuple[int, int]) -> None:
    """Lay the stamp's shadow, then the stamp in a colour that stands out from what is below it."""
    size = max(stamp.solid.shape)
    if size >= 16:
        offset = 1 + size // 24
        window, cut = _windows((place[0] + offset, place[1] + offset), stamp.solid.shape, canvas.shape[1:])
        canvas[:, *window] -= canvas[:, *window] * (stamp.coverage[cut] * 3) >> 11
    window, cut = _windows(place, stamp.solid.shape, canvas.shape[1:])
    solid = stamp.solid[cut]
    below = canvas[:, *window]
    ground = (below * solid).sum((1, 2), dtype=np.int64) // max(int(np.count_nonzero(solid)), 1)
    paint = _texture(rng, _colour(rng, ground), stamp, size)[:, *cut]
    canvas[:, *window] = below + ((paint - below) * stamp.coverage[cut] >> 8)


def _colour(rng: np.random.Generator, ground: np.ndarray) -> np.ndarray:
    """int32 [3] of the palette, at least 150 levels (summed over R, G, B) from the mean colour below."""
    best, distance = None, -1
    for _ in range(12):
        colour = _PALETTE[_integer(rng, 0, len(_PALETTE) - 1)] + rng.integers(-18, 19, 3)
        far = int(np.abs(colour - ground).sum())
        if far > distance:
            best, distance = colour, far
        if far >= 150:
            break
    return np.clip(best, 0, 255).astype(np.int32)


def _texture(rng: np.random.Generator, colour: np.ndarray, stamp: _Stamp, size: int) -> np.ndarray:
    """int32 [3 h w]: the colour with light falling on it and, on larger shapes, at times a pattern."""
    light_u, light_v = _integer(rng, -60, 60), _integer(rng, -60, 60)
    light = 256 + ((stamp.u * light_u + stamp.v * light_v) >> 13)
    if size >= 24 and _chance(rng, 55):
        period = _integer(rng, 1600, 5600)
        kind = _integer(rng, 0, 3)
        if kind == 0:
            pattern = (stamp.u + stamp.v) // period % 2
        elif kind == 1:
            pattern = (stamp.u // period + stamp.v // period) % 2
        elif kind == 2:
            pattern = stamp.v // period % 2
        else:
            pattern = (stamp.u % period - period // 2) ** 2 + (stamp.v % period - period // 2) ** 2 < period**2 // 10
        light = light + pattern * _integer(rng, 36, 80) * (1 if colour.sum() < 380 else -1)
    return np.clip(colour[:, None, None] * light >> 8, 0, 255)
