"""Shapes of the abdominal phantoms: body wall, lungs and the thirteen BTCV organs, drawn in millimetres.

Every organ is an implicit function that grows to a volume drawn beforehand: the free voxels with the lowest values are
taken, so that organs never overlap and keep their volumes on any grid, while neighbours dent each other. Positions
follow a supine adult of about 330 x 220 mm; volumes are typical of adults. Coordinates are mm to the patient's right,
front and head, from the middle of the field; the first axis of the grid runs from right to left, as in the BTCV files.

Left and right kidney and adrenal come from one law, mirrored: only the side, which the other organs tell, parts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from samseg_monai.demo.drawing import Grid

Mesh = tuple[np.ndarray, np.ndarray, np.ndarray]

(SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, GALLBLADDER, OESOPHAGUS, LIVER, STOMACH, AORTA, VENA_CAVA, PORTAL_VEIN, PANCREAS,
 RIGHT_ADRENAL, LEFT_ADRENAL) = range(1, 14)  # fmt: skip
# What carries no label; FAT also fills the cavity between the organs.
FAT, MUSCLE, BONE, MARROW, LUNG, HEART, BOWEL, CONTENT, STOMACH_CONTENT, GAS = range(20, 30)
AIR = 0
_CAVITY_MM = (128.0, 88.0)
_WALL_OF_BOWEL_MM = 3.0
_FAT_OF_KIDNEY_MM = 4.0

# Volume in ml (mean, spread between cases; cut at two spreads), in the order of growing: later ones give way.
_VOLUMES_ML = {
    RIGHT_KIDNEY: (165, 22), LEFT_KIDNEY: (165, 22), AORTA: (68, 11), VENA_CAVA: (58, 9), OESOPHAGUS: (15, 2.5),
    PORTAL_VEIN: (24, 4), RIGHT_ADRENAL: (4.5, 0.7), LEFT_ADRENAL: (4.5, 0.7), GALLBLADDER: (36, 9),
    PANCREAS: (84, 13), SPLEEN: (210, 45), STOMACH: (280, 65), LIVER: (1480, 150),
}  # fmt: skip
_THROUGH_DIAPHRAGM = (AORTA, VENA_CAVA, OESOPHAGUS)
# Control points (right, front, head) and radii in mm.
_TUBES = {
    AORTA: ([(-18, -26, 106), (-14, -23, 40), (-9, -21, -20), (-5, -20, -106)], [12, 11, 10, 9]),
    VENA_CAVA: ([(20, -24, -106), (21, -22, -30), (22, -20, 20), (19, -4, 66)], [11, 12, 12, 12]),
    OESOPHAGUS: ([(-2, -10, 106), (-8, -6, 72), (-24, 4, 50)], [8, 8, 9]),
    PORTAL_VEIN: (
        [(-78, -24, 28), (-45, -8, 20), (-8, -2, 8), (14, 0, 4), (30, 8, 18), (48, 12, 34)],
        [5, 5, 6, 7, 7, 6],
    ),
    GALLBLADDER: ([(48, 38, 2), (54, 56, -24)], [9, 15]),
    PANCREAS: ([(-82, -16, 26), (-50, 4, 20), (-14, 12, 6), (18, 12, -6), (28, 6, -26)], [11, 12, 11, 15, 15]),
    STOMACH: ([(-62, -4, 46), (-58, 22, 18), (-38, 46, -8), (-5, 50, -18), (22, 42, -12)], [34, 32, 26, 20, 14]),
}
# Bowel that looks like an organ: duodenum, ascending, transverse and descending colon; the last number is ml.
_BOWEL = (
    ([(34, 30, -8), (50, 8, -8), (48, -4, -40), (20, 2, -56), (-12, 4, -52)], [12, 12, 12, 11, 11], 65.0),
    ([(94, 2, -106), (96, 0, -55)], [24, 20], 110.0),
    ([(88, 30, -48), (40, 66, -52), (-30, 66, -48), (-88, 12, -18)], [19, 17, 17, 17], 190.0),
    ([(-98, -20, -20), (-102, -18, -106)], [16, 15], 75.0),
)


@dataclass(frozen=True)
class Shape:
    """Ellipsoids (centre, half axes, rotation) and one tube (points, radii), joined, less the ``cuts``; all in mm."""

    ellipsoids: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    radii: Sequence[float] = ()
    cuts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    waves: tuple[np.ndarray, np.ndarray] | None = None

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Corners in mm of a box that holds the shape with room to grow."""
        lows = [c - 1.15 * h.max() for c, h, _ in self.ellipsoids] + [p - r for p, r in self._knots()]
        highs = [c + 1.15 * h.max() for c, h, _ in self.ellipsoids] + [p + r for p, r in self._knots()]
        return np.min(lows, axis=0) - 12, np.max(highs, axis=0) + 12

    def distance(self, mesh: Mesh) -> np.ndarray:
        """About the distance to the surface in mm, negative inside: (X, Y, Z) float32 on an open ``mesh``."""
        parts = [_ellipsoid(mesh, *e) for e in self.ellipsoids]
        for (p, rp), (q, rq) in zip(self._knots()[:-1], self._knots()[1:], strict=True):
            parts.append(_capsule(mesh, p, q, rp, rq))
        value = parts[0]
        for other in parts[1:]:
            value = _smooth_minimum(value, other, reach_mm=8.0)
        for cut in self.cuts:
            # Steep, so that a shape which must grow does so elsewhere.
            value = np.maximum(value, -3 * _ellipsoid(mesh, *cut))
        if self.waves is not None:
            for wave, phase in zip(*self.waves, strict=True):
                value += 1.3 * np.sin(sum(k * m for k, m in zip(wave.astype(np.float32), mesh, strict=True)) + phase)
        return value

    def _knots(self) -> list[tuple[np.ndarray, float]]:
        return list(zip(self.points, self.radii, strict=True))


class Canvas:
    """A grid on which organs grow: ``tissue`` (X,Y,Z) uint8 and ``free`` bool, where an organ may still go."""

    def __init__(self, grid: Grid, free: np.ndarray) -> None:
        x, y, z = grid.mesh
        self.mesh: Mesh = (-x, y, z)
        self.axes = (-grid.axes[0], *grid.axes[1:])
        self.voxel_ml = float(np.prod(grid.spacing_mm)) / 1000
        self.spacing_mm = grid.spacing_mm
        self.free = free
        self.tissue = np.zeros(grid.shape, dtype=np.uint8)

    def grow(self, code: int, shape: Shape, volume_ml: float, *, side: int = 1) -> tuple[tuple[slice, ...], np.ndarray]:
        """Give ``code`` the ``volume_ml`` of free voxels that lie deepest in ``shape``, mirrored when ``side`` is -1.

        Returns:
            The window that holds the shape and, in it, the depth under the grown surface in mm (negative outside).
        """
        window = self._window(shape, side)
        r, a, s = (m[tuple(w if n > 1 else slice(None) for w, n in zip(window, m.shape, strict=True))]
                   for m in self.mesh)  # fmt: skip
        distance = shape.distance((side * r, a, s))
        open_voxels = np.flatnonzero(self.free[window])
        count = min(max(1, round(volume_ml / self.voxel_ml)), open_voxels.size)
        values = distance.ravel()[open_voxels]
        order = np.argpartition(values, count - 1)[:count]
        taken = np.zeros(distance.shape, dtype=bool)
        taken.flat[open_voxels[order]] = True
        self.tissue[window][taken] = code
        self.free[window][taken] = False
        return window, values[order].max() - distance

    def _window(self, shape: Shape, side: int) -> tuple[slice, ...]:
        low, high = shape.bounds()
        if side < 0:
            low, high = low * (-1, 1, 1), high * (-1, 1, 1)
            low, high = np.minimum(low, high), np.maximum(low, high)
        found = [np.flatnonzero((axis >= a) & (axis <= b)) for axis, a, b in zip(self.axes, low, high, strict=True)]
        return tuple(slice(int(f[0]), int(f[-1]) + 1) for f in found)


def _ellipsoid(mesh: Mesh, centre: np.ndarray, half: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """(|p| - 1) in units of the half axes, times their geometric mean: about mm near the surface."""
    d = [m - np.float32(c) for m, c in zip(mesh, centre, strict=True)]
    form = ((turn / half**2) @ turn.T).astype(np.float32)
    square = form[0, 0] * d[0] ** 2 + form[1, 1] * d[1] ** 2 + 2 * form[0, 1] * d[0] * d[1]
    square = square + form[2, 2] * d[2] ** 2 + 2 * (form[0, 2] * d[0] + form[1, 2] * d[1]) * d[2]
    return (np.sqrt(np.maximum(square, 0)) - 1) * np.float32(np.prod(half) ** (1 / 3))


def _capsule(mesh: Mesh, p: np.ndarray, q: np.ndarray, rp: float, rq: float) -> np.ndarray:
    """Distance in mm to a stretch of tube from ``p`` to ``q``, whose radius goes from ``rp`` to ``rq``."""
    d = [m - np.float32(c) for m, c in zip(mesh, p, strict=True)]
    axis = (q - p).astype(np.float32)
    length = float(axis @ axis)
    along = np.clip((d[0] * axis[0] + d[1] * axis[1] + d[2] * axis[2]) / length, 0, 1)
    square = sum((di - along * ai) ** 2 for di, ai in zip(d, axis, strict=True))
    return np.sqrt(square) - (np.float32(rp) + np.float32(rq - rp) * along)


def _smooth_minimum(a: np.ndarray, b: np.ndarray, *, reach_mm: float) -> np.ndarray:
    blend = np.maximum(reach_mm - np.abs(a - b), 0) / reach_mm
    return np.minimum(a, b) - blend**2 * np.float32(reach_mm / 4)


def rotation(x: float, y: float, z: float) -> np.ndarray:
    """Turn about the three axes in radians, first about x."""
    turns = np.eye(3)
    for axis, angle in enumerate((x, y, z)):
        one = np.eye(3)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        one[i, i] = one[j, j] = np.cos(angle)
        one[i, j], one[j, i] = -np.sin(angle), np.sin(angle)
        turns = one @ turns
    return turns


def random_waves(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Three plane waves of 45 to 100 mm that roughen a surface: wave vectors (3, 3) and phases."""
    direction = rng.standard_normal((3, 3))
    direction *= 2 * np.pi / rng.uniform(45, 100, (3, 1)) / np.linalg.norm(direction, axis=1, keepdims=True)
    return direction, rng.uniform(0, 2 * np.pi, 3).astype(np.float32)


def cut_normal(rng: np.random.Generator, shape: int | tuple[int, ...]) -> np.ndarray:
    return np.clip(rng.standard_normal(shape), -1.8, 1.8)


@dataclass(frozen=True)
class Abdomen:
    """``labels`` (X,Y,Z) uint8, BTCV coding; ``tissue`` uint8: the same, or what else there is (``FAT``, ...).

    ``loops`` (X,Y,Z) bool: fat between the organs in which small bowel lies.
    """

    labels: np.ndarray
    tissue: np.ndarray
    loops: np.ndarray


@dataclass(frozen=True)
class Frame:
    """Habitus of one case: half axes of the cavity, wall, fat, tops of the domes (all mm); exponent of the outline."""

    cavity_mm: tuple[float, float]
    wall_mm: float
    fat_mm: float
    domes_mm: tuple[float, float]
    power: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Frame:
        """Draw a habitus; the body stays within 344 x 272 mm."""
        width = rng.uniform(120, 138)
        depth = width * rng.uniform(0.64, 0.74)
        right = rng.uniform(80, 90)
        return cls(
            (width, depth),
            rng.uniform(7, 12),
            rng.uniform(6, 22),
            (right, right - rng.uniform(4, 14)),
            rng.uniform(1.95, 2.5),
        )

    def place(self, points: ArrayLike) -> np.ndarray:
        """Carry reference positions in mm, of a cavity of 128 x 88 mm, over to this body."""
        return np.asarray(points, float) * (self.cavity_mm[0] / _CAVITY_MM[0], self.cavity_mm[1] / _CAVITY_MM[1], 1)

    def inside(self, mesh: Mesh, extra_mm: float = 0.0) -> np.ndarray:
        """The cavity grown by ``extra_mm``: (X, Y, Z) bool; waist and chest are a little narrower than the middle."""
        r, a, s = mesh
        across, along = (half + extra_mm for half in self.cavity_mm)
        radius = (np.abs(r / across) ** self.power + np.abs(a / along) ** self.power) ** (1 / self.power)
        return radius < 1 - 0.0004 * np.abs(s)


def make_abdomen(grid: Grid, rng: np.random.Generator) -> Abdomen:
    """Draw one abdomen on ``grid``, whose first axis runs from the patient's right to the left."""
    frame = Frame.draw(rng)
    volumes = {label: mean + spread * np.clip(rng.standard_normal(), -2, 2)
               for label, (mean, spread) in _VOLUMES_ML.items()}  # fmt: skip
    volumes[LIVER] *= (np.prod(frame.cavity_mm) / np.prod(_CAVITY_MM)) ** 0.7  # a large liver needs a large body
    kidneys = {RIGHT_KIDNEY: kidney(frame, rng), LEFT_KIDNEY: kidney(frame, rng)}
    shapes = {RIGHT_ADRENAL: _adrenal(frame, rng), LEFT_ADRENAL: _adrenal(frame, rng),
              SPLEEN: _spleen(frame, rng), LIVER: _liver(frame, rng)}  # fmt: skip
    shapes |= {label: _tube(frame, rng, *tube) for label, tube in _TUBES.items()}

    canvas = Canvas(grid, np.zeros(grid.shape, dtype=bool))
    body, dome = _body(canvas, frame, rng)
    canvas.free = (body == FAT) & frame.inside(canvas.mesh)
    for label, shape in kidneys.items():
        window, depth = canvas.grow(label, shape, volumes[label], side=1 if label == RIGHT_KIDNEY else -1)
        # Fat all round both kidneys, at least a voxel of it: blur with a neighbour would tell the side by intensity.
        near = ndimage.binary_dilation(canvas.tissue[window] == label, structure=np.ones((3, 3, 3)))
        coat = (near | (depth > -_FAT_OF_KIDNEY_MM)) & (body[window] != AIR) & (canvas.tissue[window] == 0)
        canvas.free[window][coat] = False
        body[window][coat] = FAT
    for label in _THROUGH_DIAPHRAGM:
        canvas.grow(label, shapes[label], volumes[label])
    canvas.free &= canvas.mesh[2] < dome - 2
    for label in [label for label in _VOLUMES_ML if label not in (*kidneys, *_THROUGH_DIAPHRAGM)]:
        hollow = canvas.grow(label, shapes[label], volumes[label], side=-1 if label == LEFT_ADRENAL else 1)
        if label == STOMACH:
            stomach = hollow
    labels = canvas.tissue.copy()
    _fill(canvas, *stomach, STOMACH_CONTENT, gas=rng.uniform(0.05, 0.4), wall_mm=rng.uniform(3, 5))
    for points, radii, volume in _BOWEL:
        window, depth = canvas.grow(BOWEL, _tube(frame, rng, points, radii), volume * rng.uniform(0.7, 1.3))
        _fill(canvas, window, depth, CONTENT, gas=rng.uniform(0, 0.6), wall_mm=_WALL_OF_BOWEL_MM)
    r, a, s = canvas.mesh
    behind = -0.3 * frame.cavity_mm[1] + 8 * np.cos(r / 19 + rng.uniform(0, 6))
    loops = canvas.free & (a > behind) & (s < 8)
    return Abdomen(labels, np.where(canvas.tissue > 0, canvas.tissue, body), loops)


def kidney(frame: Frame, rng: np.random.Generator) -> Shape:
    """Draw a bean with its hilum towards the spine and the front, on the right side; the left is the same, mirrored."""
    centre = frame.place((64, -44, 0)) + (4, 4, 7) * cut_normal(rng, 3) + (0, 0, -20)
    half = np.array([26.0, 27.0, 55.0]) * (1 + 0.05 * cut_normal(rng, 3))
    turn = rotation(*(np.radians([10, 8, 25]) * (-1, -1, 1) + 0.09 * cut_normal(rng, 3)))
    sinus = centre + turn @ np.array([-25.0, 2.0, 0.0])
    return Shape(
        [(centre, half, turn)],
        cuts=[(sinus, np.array([17.0, 9.0, 19.0]) * rng.uniform(0.85, 1.15), turn)],
        waves=random_waves(rng),
    )


def _adrenal(frame: Frame, rng: np.random.Generator) -> Shape:
    centre = frame.place((38, -34, 36)) + 3 * cut_normal(rng, 3)
    return Shape([(centre, np.array([4.0, 14.0, 16.0]), rotation(0.2, 0.2, -0.4 + 0.2 * rng.standard_normal()))])


def _spleen(frame: Frame, rng: np.random.Generator) -> Shape:
    centre = frame.place((-99, -33, 24)) + (4, 5, 8) * cut_normal(rng, 3)
    turn = rotation(0.25 + 0.12 * rng.standard_normal(), 0.1 * rng.standard_normal(), 0.6 + 0.1 * rng.standard_normal())
    half = np.array([25.0, 42.0, 52.0]) * (1 + 0.07 * cut_normal(rng, 3))
    hollow = centre + turn @ np.array([62.0, 0.0, 0.0])
    return Shape([(centre, half, turn)], cuts=[(hollow, np.array([50.0, 44.0, 55.0]), turn)], waves=random_waves(rng))


def _liver(frame: Frame, rng: np.random.Generator) -> Shape:
    right = frame.place((72, -2, 12)) + 5 * cut_normal(rng, 3)
    left = frame.place((2, 46, 36)) + (10, 5, 6) * cut_normal(rng, 3)
    lobes = [
        (right, np.array([64.0, 86.0, 76.0]) * (1 + 0.06 * cut_normal(rng, 3)), rotation(0, 0.2, 0)),
        (left, np.array([74.0, 38.0, 34.0]) * (1 + 0.08 * cut_normal(rng, 3)), rotation(0, -0.15, 0.1)),
    ]
    # The bed of kidney and adrenal, behind the liver.
    bed = frame.place((46, -62, -20)), np.array([44.0, 44.0, 84.0]), rotation(0, 0, 0)
    return Shape(lobes, cuts=[bed], waves=random_waves(rng))


def _tube(frame: Frame, rng: np.random.Generator, points: Sequence, radii: Sequence[float]) -> Shape:
    """A tube of the tables above, shifted as a whole and bent at its control points."""
    placed = frame.place(points)
    loose = min(5.0, 0.3 * max(radii))
    placed = placed + loose * 0.7 * cut_normal(rng, 3) + loose * 0.7 * cut_normal(rng, placed.shape)
    return Shape(points=placed, radii=radii, waves=random_waves(rng) if max(radii) > 10 else None)


def _body(canvas: Canvas, frame: Frame, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Everything but organs and bowel: tissue (X,Y,Z) uint8, and the height of the diaphragm (X,Y,1) in mm."""
    r, a, s = canvas.mesh
    depth = frame.cavity_mm[1]

    def ring(extra_mm: float) -> np.ndarray:
        return frame.inside(canvas.mesh, extra_mm)

    tissue = np.full(canvas.tissue.shape, AIR, dtype=np.uint8)
    tissue[ring(frame.wall_mm + frame.fat_mm)] = FAT
    wall = ring(frame.wall_mm) & ~ring(0)
    tissue[wall] = MUSCLE
    domes = [top - 70 * (((r - side * 55) / 78) ** 2 + ((a - 5) / 92) ** 2)
             for side, top in zip((1, -1), frame.domes_mm, strict=True)]  # fmt: skip
    dome = np.maximum(*domes)
    mediastinum = (np.abs(r) < 26) & (a < 20)
    chest = ring(-1) & (s > dome) & ~mediastinum
    tissue[chest] = LUNG
    heart = ((r + 18) / 52) ** 2 + ((a - 30) / 40) ** 2 + ((s - 102) / 36) ** 2 < 1
    tissue[heart & (s > dome) & ring(-6)] = HEART
    tissue[(s > dome - 3) & (s <= dome) & ring(0) & ~mediastinum] = MUSCLE

    # Ribs fall towards the front and end at the costal arch.
    rise = s + 0.45 * a + rng.uniform(0, 26)
    rib = wall & (rise % 26 < 9) & (s > -40 + 0.62 * (a + depth)) & ring(frame.wall_mm - 1)
    tissue[rib] = BONE
    for side in (1, -1):
        psoas_mm = np.clip(10 - 0.15 * s, 5, 22)
        out_mm = 30 - 0.11 * s
        tissue[(np.hypot(side * r - out_mm, a + 0.56 * depth) < psoas_mm) & (s < 25)] = MUSCLE
        back = ((side * r - 30) / 26) ** 2 + ((a + 0.97 * depth) / 19) ** 2 < 1
        tissue[back & ring(frame.wall_mm + 0.6 * frame.fat_mm)] = MUSCLE
    _spine(tissue, canvas.mesh, depth, rng)
    return tissue, dome


def _spine(tissue: np.ndarray, mesh: Mesh, depth: float, rng: np.random.Generator) -> None:
    r, a, s = mesh
    period, middle = rng.uniform(31, 35), -0.62 * depth
    level = (s + rng.uniform(0, period)) % period
    pinch = 1 + 0.12 * np.abs(level / period - 0.62)
    radius = np.hypot(r / 23, (a - middle) / 17) * pinch
    tissue[radius < 1] = BONE
    tissue[radius < 0.84] = MARROW
    tissue[(radius < 0.98) & (level < 8)] = MUSCLE
    behind = middle - 26
    arch = np.hypot(r, a - behind)
    np.copyto(tissue, BONE, where=arch < 15)
    tissue[(np.abs(r) < 42 - np.abs(level - 20)) & (np.abs(a - behind + 2) < 4) & (np.abs(level - 20) < 7)] = BONE
    tissue[(np.abs(r) < 4) & (a < behind) & (a > behind - 32) & (level < 22)] = BONE
    np.copyto(tissue, MUSCLE, where=arch < 9)


def _fill(
    canvas: Canvas, window: tuple[slice, ...], depth: np.ndarray, content: int, *, gas: float, wall_mm: float
) -> None:
    """Fill what lies deeper than the wall with ``content``, and its foremost part (a supine patient) with gas."""
    code = canvas.tissue[window]
    inside = (depth > wall_mm) & np.isin(code, (STOMACH, BOWEL))
    if not inside.any():
        return
    front = np.broadcast_to(canvas.mesh[1][:, window[1]], inside.shape)
    level = np.quantile(front[inside], 1 - gas)
    code[inside] = content
    code[inside & (front > level)] = GAS
