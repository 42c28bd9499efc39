"""How far an exported file is from its network: the same slices and boxes through both, the largest difference told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch import Tensor

from samseg_monai.checkpoints import Network
from samseg_monai.errors import BundleError, raise_all
from samseg_monai.export.parts import Call, Part, parts_of, run_parts
from samseg_monai.networks import EMPTY_LOGIT, SamSegmenter
from samseg_monai.networks.scans import TOGETHER

# as a part of the largest value: float32 itself rounds at 6e-8 of a value
TOLERANCE = {"pth": 1e-4, "torch": 1e-5, "onnx": 1e-4, "samed": 1e-5, "peft": 1e-5}


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference between what is exported and what it was made of."""

    what: str
    largest: float  # infinite where shapes differ or numbers are not finite
    scale: float  # largest absolute value of what was expected
    allowed: float  # as a part of ``scale``

    @property
    def passes(self) -> bool:
        """Whether the difference is small enough."""
        return self.largest <= self.allowed * self.scale

    def __str__(self) -> str:
        if not math.isfinite(self.largest):
            return f"{self.what}: another shape than the network's, or numbers that are not finite"
        limit = self.allowed * self.scale
        return f"{self.what}: largest difference {self.largest:.1e}, allowed {limit:.1e}; values up to {self.scale:.3g}"


def difference(what: str, pairs: Iterable[tuple[Tensor, Tensor]], allowed: float) -> Difference:
    """Compare pairs of (got, expected)."""
    largest = scale = 0.0
    for got, expected in pairs:
        predicted = expected[expected.abs() != -EMPTY_LOGIT]  # those are set, not predicted
        scale = max(scale, float(predicted.abs().max()))
        found = float((got - expected).abs().max()) if got.shape == expected.shape else math.inf
        largest = max(largest, found if math.isfinite(found) else math.inf)
    return Difference(what, largest, scale, allowed)


def require(differences: Sequence[Difference]) -> None:
    """Raise BundleError listing every comparison that does not pass."""
    problems = [str(found) for found in differences if not found.passes]
    raise_all(problems, BundleError, "the exported files do not compute what the network computes; nothing was written")


def trials(network: Network, parts: Sequence[Part]) -> list[dict[str, Tensor]]:
    """Two batches for the inputs of ``parts``: a slice of full size; two oblong ones, the second without a box."""
    generator = torch.Generator().manual_seed(0)
    shape, (height, width) = next(p.inputs["image"] for p in parts if "image" in p.inputs), parts[0].frame
    free = isinstance(shape[-1], str)
    sizes = [(1, height, width), (2, max(1, height * 3 // 4), max(1, width // 2 + 1))]
    found = []
    for number, rows, columns in sizes:
        rows, columns = (rows, columns) if free else (int(shape[-2]), int(shape[-1]))
        image = torch.randn(number, network.scans, rows, columns, generator=generator)
        if network.input_scale != "zscore":
            image = (0.5 + 0.25 * image).clamp(0, 1) * (255 if network.input_scale == "sam" else 1)
        found.append({"image": image})
        if network.prompt == "box":
            corners = torch.tensor([[0.2, 0.3, 0.7, 0.8], [math.nan] * 4])[:number]
            found[-1]["boxes"] = corners * torch.tensor([columns, rows, columns, rows])
    return found


@torch.no_grad()
def compare_parts(
    network: Network, parts: Sequence[Part], calls: Mapping[str, Call], allowed: float
) -> list[Difference]:
    """Compare each part with the network's own, and all of them in turn with ``network(image, boxes)``."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {part.name: [] for part in parts}
    whole = []
    for tensors in trials(network, parts):
        got = run_parts(parts, calls, tensors)
        options = {name: value for name, value in tensors.items() if name != "image"}
        for part in parts:
            if part.name == "encoder" and isinstance(network, SamSegmenter):
                options["embedding"] = network.encode(tensors["image"])  # costly: once is enough
                own = {"embedding": options["embedding"].view_as(got["embedding"])}
            else:
                own = part.results(part.module, got)
            pairs[part.name] += [(got[name], expected) for name, expected in own.items()]
        height, width = tensors["image"].shape[-2:]
        whole.append((got["logits"][..., :height, :width], network(tensors["image"], **options)))
    measured = [difference(name, found, allowed) for name, found in pairs.items()]
    return [*measured, difference("all parts in turn", whole, allowed)]


@torch.no_grad()
def compare_predictor(network: SamSegmenter, sam: Sam, allowed: float) -> Difference:
    """Compare ``SamPredictor`` on segment_anything's own SAM with ``network``, on one square slice."""
    tensors = trials(network, parts_of(network))[0]
    image, boxes = tensors["image"], tensors.get("boxes")
    predictor, maps = SamPredictor(sam), []
    for view in image if network.scan_mode not in TOGETHER else image.flatten(0, 1)[:, None].expand(-1, 3, -1, -1):
        if network.input_scale != "sam":  # the predictor normalises what it gets
            view = view * sam.pixel_std + sam.pixel_mean
        predictor.set_torch_image(view[None], image.shape[-2:])
        maps.append(predictor.predict_torch(None, None, boxes, multimask_output=False, return_logits=True)[0])
    got = torch.cat(maps).mean(0, keepdim=True)
    return difference("SamPredictor", [(got, network(image, boxes))], allowed)
