"""Where prompts come from: simulated from the label, or given by a person or another network.

Of volumes boxes from each source become one mask volume that travels through the same transforms as the image, and
boxes are computed last, so that none has to be transformed. Clicks, and boxes beside them, and all prompts of 2-D
images, volumes of one slice (C, H, W, 1), stay numbers from file or label to the network, never a mask and never
rounded: they follow any resize, crop, flip or exchange of axes that MONAI writes into the affine. Entries are called
"image", "label", "prompt", "boxes" and "case" (its name).
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImaged, MapTransform, RandomizableTransform

from samseg_monai.choices import IGNORE
from samseg_monai.data.files.boxes import Rectangle, clicked, is_number, rectangles, volume_boxes, volume_rows
from samseg_monai.errors import ConfigError, PromptError, raise_all
from samseg_monai.transforms.boxes import boxes_of, clip_boxes, inscribed, move_boxes, move_prompts
from samseg_monai.transforms.grids import CheckSameGridd, EachKeyd, foreground, name_of, on_grid_of
from samseg_monai.transforms.points import Random, draw_clicks, objects, prompted

_MOST = 1 << 24  # numbers of all prompts of a volume
WHOLE = "whole_slice"  # entry of a request that asks for the source "image", whatever the bundle's is


class _FromLabeld(RandomizableTransform, EachKeyd):
    """What simulated prompts share: their law, and where draws come from."""

    def __init__(self, source: str, loosen: Any, seed: int | None, per_component: bool, problems: list[str]) -> None:
        EachKeyd.__init__(self, "label")
        RandomizableTransform.__init__(self, prob=1.0)
        if not isinstance(loosen, Sequence) or len(loosen) != 2 or not all(map(is_number, loosen)):
            problems = [*problems, f"loosen is a pair of numbers (low, high), got {loosen!r}"]
        elif not 0 <= loosen[0] <= loosen[1]:
            problems = [*problems, f"loosen is a pair (low, high) with 0 <= low <= high, got {loosen!r}"]
        if seed is not None and seed < 0:
            problems = [*problems, f"seed must not be negative, got {seed}"]
        raise_all(problems, ConfigError, "prompts cannot be drawn from labels")
        self.source, self.seed, self.per_component = source, seed, per_component
        self.loosen = (float(loosen[0]), float(loosen[1]))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return super().__call__(data) if self.source == "label" else dict(data)

    def _random(self, d: Mapping[Hashable, Any], *numbers: int) -> Random:
        if self.seed is None:
            return self.R
        if "case" not in d:
            raise PromptError(f"seeded prompts need the name of the case under 'case', got keys {list(d)}")
        return np.random.default_rng((self.seed, zlib.crc32(name_of(d).encode()), *numbers))


class SimulatedPromptd(_FromLabeld):
    """Simulate a person's box: per slice the filled rectangle around ``label > 0``, each side moved outward at random.

    With ``seed``, the draws of a volume depend on (seed, case name, slice number) alone: the order of cases, other
    slices and an in-plane crop do not change them. Slices, and volumes without ``seed``, draw from ``self.R``.
    Of "label", a (C, H, W, D) volume or (C, H, W) slice, "prompt" is made: uint8, one channel, 0 or 1, geometry and
    history of the label.

    Args:
        source: with any other than "label" a case stays as it is.
        loosen: smallest and largest outward shift of a side, as a fraction of the box's length along that axis;
            0 <= low <= high. Shifts are rounded to pixels and clipped to the image. (0, 0) is the tight rectangle.
        seed: non-negative, see above.
        per_component: a rectangle for every connected component of the slice (rectangles that touch become one prompt).
        one_slice: of a volume, only the slice where ``label > 0`` is largest (of equal ones the first) has a prompt.
    Raises: ConfigError for a bad ``loosen`` or ``seed``; PromptError when ``seed`` is given and the case has no name.
    """

    def __init__(
        self,
        source: str = "label",
        *,
        loosen: Sequence[float] = (0.0, 0.0),
        seed: int | None = None,
        per_component: bool = False,
        one_slice: bool = False,
    ) -> None:
        super().__init__(source, loosen, seed, per_component, [])
        self.one_slice = one_slice

    def _change(self, d: dict[Hashable, Any], key: Hashable) -> None:
        mask = foreground(d[key]).any(dim=0).cpu()  # (C, H, W[, D]) -> (H, W[, D])
        prompt = torch.zeros(mask.shape, dtype=torch.uint8)
        if mask.ndim == 2:
            self._fill(prompt, mask, self.R)
        else:
            areas = mask.flatten(0, 1).sum(dim=0)
            largest = [int(areas.argmax())] if areas.any() else []
            for z in largest if self.one_slice else areas.nonzero()[:, 0].tolist():
                self._fill(prompt[..., z], mask[..., z], self._random(d, z))
        d["prompt"] = on_grid_of(d[key], prompt[None])

    def _fill(self, prompt: torch.Tensor, mask: torch.Tensor, random: Random) -> None:
        height, width = mask.shape
        for x0, y0, x1, y1 in rectangles(mask.numpy(), per_component=self.per_component):
            left, top, right, bottom = random.uniform(*self.loosen, size=4)
            x0, x1 = max(0, x0 - round(left * (x1 - x0))), min(width, x1 + round(right * (x1 - x0)))
            y0, y1 = max(0, y0 - round(top * (y1 - y0))), min(height, y1 + round(bottom * (y1 - y0)))
            prompt[y0:y1, x0:x1] = 1


class SimulatedBoxesd(_FromLabeld):
    """Boxes around ``label > 0``: tight, or with each side moved outward at random, shifted, and clipped to the image.

    With ``seed`` the boxes of an image depend on (seed, case name) and its label alone, those of a volume on the number
    of their slice, too; else they come from ``self.R``. The law is relative to the tight box, so that it is the same at
    every size of the image. Of "label", a slice (C, H, W) or volume of one slice (C, H, W, 1), "boxes" are made:
    float32 (N, 4); one row of NaN for an empty label. With clicks, inside and outside of each object as
    ``points.draw_clicks`` says, they are (N, 4 + 3 P). Of a volume (C, H, W, D) they are those of each slice, (D, N, 4)
    or (D, N, 4 + 3 P), with as many rows as the slice with most has, filled up with NaN.

    Args:
        source: with any other than "label" a case stays as it is.
        loosen: smallest and largest outward shift of a side, each drawn on its own, as a fraction of the tight box's
            length along that axis; 0 <= low <= high.
        tight: fraction of boxes that are the tight rectangle instead, 0 to 1.
        shift: the whole loosened box is moved along each axis by up to this fraction of its side, 0 to 0.5.
        seed: non-negative, see above.
        per_component: a box per 8-connected component, largest first.
        max_boxes: with ``per_component``, rows of the result: the largest are kept and NaN fills up, so that batches
            collate. None gives as many rows as there are boxes.
        kind: "box"; "points": clicks, and NaN in place of the box; "both".
        inside, outside: clicks inside, at least 1, and outside of each object.
        one_slice: of a volume, only the slice where ``label > 0`` is largest (of equal ones the first) has prompts.
    Raises: ConfigError listing all settings that are out of range; PromptError when ``seed`` is given and the case has
        no name, or when a person's boxes are there already.
    """

    def __init__(
        self,
        source: str = "label",
        *,
        loosen: Sequence[float] = (0.0, 0.0),
        tight: float = 0.0,
        shift: float = 0.0,
        seed: int | None = None,
        per_component: bool = False,
        max_boxes: int | None = None,
        kind: str = "box",
        inside: int = 1,
        outside: int = 0,
        one_slice: bool = False,
    ) -> None:
        problems = []
        if kind not in ("box", "points", "both") or inside < 1 or outside < 0:
            got = f"{kind}, {inside} and {outside}"
            problems.append(f"kind is box, points or both, with at least a click inside and none outside, got {got}")
        for name, value, most, what in (("tight", tight, 1, "the fraction of tight boxes"),
                                        ("shift", shift, 0.5, "a fraction of the box's side")):  # fmt: skip
            if not is_number(value):
                problems.append(f"{name} must be a number, got {value!r}")
            elif not 0 <= value <= most:
                problems.append(f"{name} is {what}, 0 to {most}, got {value!r}")
        if shift and isinstance(loosen, Sequence) and any(is_number(side) and side > 1 for side in loosen):
            problems.append(f"loosen of more than 1 together with shift may move boxes off the image, got {loosen!r}")
        if max_boxes is not None and max_boxes < 1:
            problems.append(f"max_boxes must be at least 1, got {max_boxes}")
        super().__init__(source, loosen, seed, per_component, problems)
        self.tight, self.shift, self.max_boxes = float(tight), float(shift), max_boxes
        self.kind, self.inside, self.outside, self.one_slice = kind, inside, outside, one_slice

    def _change(self, d: dict[Hashable, Any], key: Hashable) -> None:
        if isinstance(d.get("boxes"), (list, tuple)):
            raise PromptError(
                f"{name_of(d)}: boxes are given, but are to be drawn from 'label'; set prompt::source to 'json' or "
                "prompt::boxes to null"
            )
        mask = foreground(torch.as_tensor(d[key])).any(dim=0).cpu()  # (C, H, W[, D]) -> (H, W[, D])
        if mask.ndim == 3 and mask.shape[-1] > 1:
            areas = mask.flatten(0, 1).sum(dim=0)
            wanted = [int(areas.argmax())] if self.one_slice else areas.nonzero()[:, 0].tolist()
            drawn = {z: self._prompts(mask[..., z].numpy(), self._random(d, z)) for z in wanted}
            d["boxes"] = _filled_up(drawn, mask.shape[-1], self._width)
        else:
            drawn = {0: self._prompts(mask.reshape(mask.shape[:2]).numpy(), self._random(d))}
            [d["boxes"]] = _filled_up(drawn, 1, self._width, self.max_boxes if self.per_component else None)

    @property
    def _width(self) -> int:
        return 4 if self.kind == "box" else 4 + 3 * (self.inside + self.outside)

    def _prompts(self, plane: np.ndarray, random: Random) -> list[list[float]]:
        """Rows of the objects in a mask (H, W)."""
        if self.kind == "box":
            return [self._draw(r, plane.shape, random) for r in rectangles(plane, per_component=self.per_component)]
        found = objects(plane, per_component=self.per_component)
        boxes = [self._draw(rectangle, plane.shape, random) for rectangle, _ in found]
        boxes = boxes if self.kind == "both" else [[torch.nan] * 4] * len(found)
        clicks = [draw_clicks(own, r, plane, self.inside, self.outside, random) for r, own in found]
        return [[*box, *own] for box, own in zip(boxes, clicks, strict=True)]

    def _draw(self, rectangle: Rectangle, size: Sequence[int], random: Random) -> list[float]:
        # every box takes the same number of draws, so that one of them does not change the next
        chance = random.uniform()
        outward = random.uniform(*self.loosen, size=4)
        moved = random.uniform(-self.shift, self.shift, size=2)
        tight = np.array(rectangle, dtype=np.float64)
        if chance < self.tight:
            return tight.tolist()
        side = np.tile(tight[2:] - tight[:2], 2)  # width, height, width, height
        box = tight + outward * side * (-1, -1, 1, 1)
        box += np.tile(moved * (box[2:] - box[:2]), 2)
        height, width = size
        return np.clip(box, 0, (width, height, width, height)).tolist()


def _filled_up(
    drawn: Mapping[int, list[list[float]]], depth: int, width: int, count: int | None = None
) -> torch.Tensor:
    """Float32 (D, N, ``width``): rows of each slice, and NaN; N is ``count``, or as many as the slice with most has."""
    count = count or max((1, *map(len, drawn.values())))
    boxes = torch.full((depth, count, width), torch.nan)
    for z, rows in drawn.items():
        if rows:
            boxes[z, : len(rows)] = torch.tensor(rows[:count], dtype=torch.float32)
    return boxes


class GivenPromptd(EachKeyd):
    """The "prompt" that a person or another network gives, straight after loading, before any reorientation.

    It is uint8, 0 or 1, with geometry and history of "image" (C, H, W, D); one channel, or as many as the slice with
    most boxes has: each box of a slice is a prompt of its own.

    Args:
        source: "json": "boxes", a list of ``{"slice": k, "box": [i0, j0, i1, j1]}`` or ``{"slices": [k0, k1], "box":
            ...}``, in voxel indices along axes 0, 1 and (slices) 2 of the stored array, from 0, all ends included; an
            empty list is a case without prompts. The list is taken out of the case: it would not collate, and "boxes"
            names the slices' boxes later. With clicks it stays, for ``FinalBoxesd``, and there is no "prompt". "mask":
            a file under "prompt", on the image's grid. "image": the whole of each slice. Anything else leaves the case
            as it is.
        values: of a mask those that are the prompt; None: all above 0.
        clicks: whether there is a ``FinalBoxesd`` for clicks.
    Raises: PromptError naming the case and every bad box at once, or clicks; DataError for a mask on another grid.
    """

    def __init__(self, source: str, values: Sequence[int] | None = None, *, clicks: bool = False) -> None:
        super().__init__("image")
        self.source, self.values, self.clicks = source, values, clicks
        self.load = Compose([LoadImaged("prompt", ensure_channel_first=True), CheckSameGridd("prompt")])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        if self.source == "mask":
            if not data.get("prompt"):
                raise PromptError(f"{name_of(data)}: no coarse mask; give those of all cases (--prompts FOLDER)")
            d = dict(self.load(data))
            if self.values is not None:
                d["prompt"] = on_grid_of(
                    d["prompt"], torch.isin(d["prompt"], torch.as_tensor(self.values)).to(torch.uint8)
                )
            return d
        return super().__call__(data) if self.source in ("json", "image") else dict(data)

    def _change(self, d: dict[Hashable, Any], key: Hashable) -> None:
        shape = tuple(d[key].shape[1:])
        whole = self.source == "image" or bool(d.get(WHOLE))
        prompt = torch.full((1, *shape), whole, dtype=torch.uint8)
        if not whole:
            boxes = d.get("boxes")
            if not isinstance(boxes, (list, tuple)):
                how = "a file of boxes has to have this case, or in an evaluation its item of the datalist 'boxes'"
                raise PromptError(f"{name_of(d)}: boxes must be a list of boxes, got {boxes!r}; {how}")
            heading = f"{name_of(d)}: bad boxes for an image of {shape} voxels"
            rows = _in_channels(volume_boxes(boxes, shape, heading))
            if clicked(boxes) and not self.clicks:
                raise PromptError(f"{name_of(d)}: clicks are given, but this config takes boxes alone; build it again")
            if clicked(boxes):
                return
            del d["boxes"]
            prompt = prompt.repeat(max(1, len(rows)), 1, 1, 1)
            for row, found in zip(prompt, rows, strict=False):
                for i0, j0, i1, j1, k0, k1 in found:
                    row[i0 : i1 + 1, j0 : j1 + 1, k0 : k1 + 1] = 1
        d["prompt"] = on_grid_of(d[key], prompt)


def _in_channels(boxes: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Boxes (i0, j0, i1, j1, k0, k1) in as few rows as hold no two boxes of one slice."""
    rows: list[list[tuple[int, ...]]] = []
    for box in dict.fromkeys(boxes):
        free = (row for row in rows if all(box[5] < other[4] or other[5] < box[4] for other in row))
        row = next(free, None)
        if row is None:
            rows.append([box])
        else:
            row.append(box)
    return rows


class FinalBoxesd(MapTransform):
    """The "boxes" of a 2-D image as the network gets them, float32 (N, 4), with clicks (N, 4 + 3 P) as of ``points``.

    Of a volume with clicks they are those of each slice, (D, N, 4 + 3 P); one with a "prompt" stays as it is.

    Args:
        source: "json": those that a person gave in pixels of the stored image, a list of [x0, y0, x1, y1], moved to the
            image as it is now and clipped to it; of a volume as of ``GivenPromptd``. "image": the whole image is one
            box. "none": there are none. With any other they must be there already.
        shrink: each side is moved inwards by this fraction of the box's length along its axis, at least 0 and less than
            0.5, against boxes that are known to be drawn too large; the middle of a box stays.
        kind: of "json" each prompt has to be a "box", "points" (clicks), or "both"; None takes them as they are.
    Raises: ConfigError for another ``shrink``; PromptError, naming the case: no boxes, no numbers, a box that lies
        wholly outside, or prompts of another kind.
    """

    def __init__(self, source: str, shrink: float = 0.0, kind: str | None = None) -> None:
        super().__init__("boxes")
        if not is_number(shrink) or not 0 <= shrink < 0.5:
            raise ConfigError(f"shrink must be at least 0 and less than 0.5, got {shrink!r}")
        self.source, self.shrink, self.kind = source, float(shrink), kind

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if self.source == "none":
            return d
        boxes, masked = d.get("boxes"), "prompt" in d
        if self.source == "json":
            boxes = None if masked else boxes_on_image(d)
            kinds = {"box"} if boxes is None else _kinds(boxes.flatten(0, -2))
            if self.kind is not None and (found := sorted(kinds - {self.kind})):
                raise PromptError(
                    f"{name_of(d)}: prompts of the file are {' and '.join(found)}, but prompt::kind is {self.kind!r}; "
                    "set it to that of the file, whose prompts are all of one kind"
                )
        if masked:
            return d
        if self.source == "image":
            height, width = d["image"].shape[1:3]
            boxes = torch.tensor([[0, 0, width, height]], dtype=torch.float32)
        if not isinstance(boxes, torch.Tensor):
            raise PromptError(
                f"{name_of(d)}: there are no boxes; prompt::source of 2-D images is label, json (with a file of "
                "boxes), image or none"
            )
        low, high = boxes[..., :2], boxes[..., 2:4]
        inwards = self.shrink * (high - low)
        return {**d, "boxes": torch.cat([low + inwards, high - inwards, boxes[..., 4:]], dim=-1)}


def _kinds(boxes: torch.Tensor) -> set[str]:
    """Which of "box", "points" and "both" the prompts (N, 4 + 3 P) are."""
    given = boxes[prompted(boxes)]
    with_box = prompted(given[:, :4]).tolist()
    with_clicks = (~given[:, 4:].isnan()).any(1).tolist()
    return {"both" if box and click else "points" if click else "box"
            for box, click in zip(with_box, with_clicks, strict=True)}  # fmt: skip


def boxes_on_image(d: Mapping[Hashable, Any]) -> torch.Tensor:
    """The list of boxes in a case, (N, 4), on the image as it is now, whose file's affine is its ``original_affine``.

    With clicks they are (N, 4 + 3 P), as of ``points``; of a volume of several slices (D, N, 4 + 3 P), each in its
    slice. An empty list says that another network found nothing: one row of NaN, which is no box.

    Raises: PromptError, naming the case: no boxes, no numbers, or a box that lies wholly outside.
    """
    given, image = d.get("boxes"), d["image"]
    if given == []:
        return torch.full((1, 4), torch.nan)
    if isinstance(given, (list, tuple)) and all(isinstance(entry, Mapping) for entry in given):
        return _in_slices(d, given)
    try:
        boxes = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        boxes = torch.empty(0)
    clicked = boxes.ndim == 2 and boxes.shape[-1] > 4 and boxes.shape[-1] % 3 == 1
    whole = bool(prompted(boxes).all()) if clicked else boxes.ndim == 2 and boxes.shape[-1] == 4
    if not whole or not len(boxes) or (~boxes.isfinite() & ~(boxes.isnan() & clicked)).any():
        raise PromptError(
            f"{name_of(d)}: 'boxes' must be a list of boxes [x0, y0, x1, y1] in pixels, got {given!r}; set "
            "prompt::boxes to a file that has this case"
        )
    if not isinstance(image, MetaTensor) or "original_affine" not in image.meta:
        raise PromptError(f"{name_of(d)}: image has no affine of its file; load it with LoadImaged")
    moved = move_boxes(boxes, image.meta["original_affine"], image.affine)
    return clip_boxes(moved, (image.shape[1], image.shape[2]), name_of(d))


def _in_slices(d: Mapping[Hashable, Any], entries: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Prompts of a volume on the image as it is now: rows of each slice, (D, N, 4 + 3 P), of a single one (N, ...)."""
    image, (slices, given) = d["image"], volume_rows(entries)
    boxes = torch.tensor(given, dtype=torch.float64)
    moved, depths = move_prompts(boxes, slices, image.meta["original_affine"], image.affine)
    first, last = np.nanmin(depths, axis=1), np.nanmax(depths, axis=1)
    if np.ptp([first, last], axis=0).max() > 0.5:
        raise PromptError(
            f"{name_of(d)}: the network's slices do not run along the slices of the file, and the clicks (and box) of "
            "an entry lie in several of them; give each click inside in an entry of its own, without a box"
        )
    moved = clip_boxes(moved, (image.shape[1], image.shape[2]), name_of(d))
    drawn: dict[int, list[list[float]]] = {}
    for z, row in zip(np.rint(first).astype(int).tolist(), moved.tolist(), strict=True):
        drawn.setdefault(z, []).append(row)
    depth, width = image.shape[3], boxes.shape[1]
    if (size := depth * max(map(len, drawn.values())) * width) > _MOST:
        raise PromptError(f"{name_of(d)}: {size:,} numbers of clicks and boxes in all slices, more than anyone gives")
    rows = _filled_up(drawn, depth, width)
    return rows if depth > 1 else rows[0]


class BoxFromPromptd(EachKeyd):
    """Slice-level, the last of the slice transforms: put the box of "prompt" (1, H, W) under "boxes".

    Args:
        per_component: one box per connected component, see ``boxes_of``.
        max_boxes: rows when ``per_component``; the same for every slice, so that batches collate.
        allow_missing_keys: leave a slice without a prompt as it is.
    """

    def __init__(self, *, per_component: bool = False, max_boxes: int = 8, allow_missing_keys: bool = False) -> None:
        super().__init__("prompt", allow_missing_keys)
        self.per_component, self.max_boxes = per_component, max_boxes

    def _change(self, d: dict[Hashable, Any], key: Hashable) -> None:
        d["boxes"] = boxes_of(d[key], per_component=self.per_component, max_boxes=self.max_boxes)


class UnpromptedIgnoredd(MapTransform):
    """Leave slices without a box out of the loss: all of their "label" (1, H, W) becomes 255.

    A network that is asked by boxes does not look at such a slice, so that there is nothing to learn from it; its loss
    would be a constant. Slices without "boxes", (4,), (N, 4) or (N, 4 + 3 P) with NaN for none, stay as they are.
    """

    def __init__(self) -> None:
        super().__init__("label", allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        boxes = d.get("boxes")
        if isinstance(boxes, torch.Tensor) and not bool(prompted(boxes).any()):
            d["label"] = torch.full_like(d["label"], IGNORE)
        return d


class EllipseFromPromptd(EachKeyd):
    """The ellipse inscribed in the box of every slice: how good is the box alone, without any network?

    Args:
        prompt_key: prompt volume (N, H, W, D) or slice (N, H, W), a channel for each box of a slice; where there is
            none, boxes beside clicks are "boxes", as of ``EllipseFromBoxesd``.
        key: where the float32 mask of 0 and 1 goes, one channel; shape, metadata and history of the prompt else.
    """

    def __init__(self, prompt_key: str = "prompt", key: str = "ellipse") -> None:
        super().__init__(prompt_key)
        self.key = key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return super().__call__(data) if self.keys[0] in data else EllipseFromBoxesd(key=self.key)(data)

    def _change(self, d: dict[Hashable, Any], prompt_key: Hashable) -> None:
        prompt = d[prompt_key].as_subclass(torch.Tensor)
        planes = [prompt] if prompt.ndim == 3 else prompt.unbind(-1)
        ellipses = [inscribed(boxes_of(plane).reshape(-1, 4), plane.shape[-2:]) for plane in planes]
        d[self.key] = on_grid_of(d[prompt_key], torch.stack(ellipses, dim=-1).reshape(1, *prompt.shape[1:]))


class EllipseFromBoxesd(EachKeyd):
    """The ellipses inscribed in the "boxes" (N, 4) of an image, all together, as ``EllipseFromPromptd`` of volumes.

    Args:
        image_key: (C, H, W, 1) or (C, H, W), whose grid the boxes refer to; rows of NaN give nothing. Of (C, H, W, D)
            they are (D, N, 4 ...).
        key: where the float32 mask of 0 and 1 goes, (1, H, W[, D]), with geometry and history of the image.
    """

    def __init__(self, image_key: str = "image", key: str = "ellipse") -> None:
        super().__init__(image_key)
        self.key = key

    def _change(self, d: dict[Hashable, Any], image_key: Hashable) -> None:
        image = d[image_key]
        boxes = torch.as_tensor(d["boxes"])
        ellipses = [inscribed(rows, image.shape[1:3]) for rows in (boxes if boxes.ndim == 3 else [boxes])]
        d[self.key] = on_grid_of(image, torch.stack(ellipses, dim=-1).reshape(1, *image.shape[1:]))
