"""A network cut into the parts that are exported (image encoder, side network and gate, mask decoder), and their files.

The encoder is the costly part and does not depend on the prompt: cut apart, it runs once per slice, whatever the number
of boxes. Every part takes batches of any length; encoder and side network take slices of any size up to the network's
square and pad them themselves.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from samseg_monai.checkpoints import Network
from samseg_monai.errors import BundleError, ConfigError
from samseg_monai.faults import writing
from samseg_monai.networks import PlainSegmenter, SamSegmenter
from samseg_monai.networks.common import empty_logits
from samseg_monai.networks.segmenter import LOW_RES

Shape = tuple[int | str, ...]
Call = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Part:
    """One module that is exported.

    Args:
        name: stem of its file.
        module: in evaluation mode; takes the ``inputs`` in order.
        inputs: shape by name. A word is an axis whose length is free: "batch"; "height" and "width" up to ``frame``.
        outputs: likewise.
        frame: height and width that slices are padded to.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    frame: tuple[int, int]

    def results(self, call: Call, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name of ``call``, which computes this part, on those of ``tensors`` that it takes."""
        outputs = call(*(tensors[name] for name in self.inputs))
        return dict(zip(self.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))


def parts_of(network: Network, size: tuple[int, int] | None = None) -> list[Part]:
    """Cut ``network`` (evaluation mode, float32) into parts that share its tensors.

    Args:
        size: height and width of the slices of a ``rectangular`` network, which pads to full patches only; None is
            its full square. Other networks take all sizes.

    Embeddings are (batch, V, C, gh, gw), V = ``network.views``; behind a side network they are called ``mixed``. A
    decoder's ``boxes`` are (batch, 4); NaN is no box.

    Raises:
        ConfigError: a size that does not fit, or one for a network that takes all.
    """
    side = network.image_size
    if isinstance(network, PlainSegmenter):
        _refuse_size(network, size)
        image: Shape = ("batch", network.scans, "height", "width")
        logits: Shape = ("batch", network.channels_out, side, side)
        return [Part("network", PlainPart(network), {"image": image}, {"logits": logits}, (side, side))]
    _refuse_size(network, size)
    given, frame = size or (side, side), (side, side)
    patch, views = network.spec.patch_size, network.views
    if network.sam.rectangular:
        frame = (-(-given[0] // patch) * patch, -(-given[1] // patch) * patch)
    grid = (frame[0] // patch, frame[1] // patch)
    extent: Shape = given if network.sam.rectangular else ("height", "width")
    image = ("batch", network.scans, *extent)
    embedding: Shape = ("batch", views, network.spec.prompt_dim, *grid)
    found = []
    if network.side is None or getattr(network.side, "needs_embedding", True):
        encoder = EmbeddingPart(network, "image_encoder")
        found.append(Part("encoder", encoder, {"image": image}, {"embedding": embedding}, frame))
    if network.side is not None:
        inputs = {"image": image, "embedding": embedding} if found else {"image": image}
        found.append(Part("side", EmbeddingPart(network, "side"), inputs, {"mixed": embedding}, frame))
    inputs = {"embedding" if network.side is None else "mixed": embedding}
    if network.prompt == "box":
        inputs["boxes"] = ("batch", 4)
    outputs: dict[str, Shape] = {
        "low_res": ("batch", network.channels_out, LOW_RES * grid[0], LOW_RES * grid[1]),
        "logits": ("batch", network.channels_out, *frame),
    }
    found.append(Part("decoder", DecoderPart(network, "prompt_encoder", "mask_decoder"), inputs, outputs, frame))
    return found


def run_parts(parts: Sequence[Part], calls: Mapping[str, Call], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run the parts in turn, each on the tensors it names, and return all tensors there are then.

    ``calls`` holds what computes a part, by its name: its module, or what was read back from a file.
    """
    known = dict(tensors)
    for part in parts:
        known |= part.results(calls[part.name], known)
    return known


def _refuse_size(network: Network, size: tuple[int, int] | None) -> None:
    if size is None:
        return
    if not (isinstance(network, SamSegmenter) and network.sam.rectangular):
        raise ConfigError(f"size: got {size}, but this network takes slices of all sizes; leave it out")
    if min(size) < 1 or max(size) > network.image_size:
        raise ConfigError(f"size: got {size}; height and width must be 1 to {network.image_size}")


class SamPart(nn.Module):
    """One step of a ``SamSegmenter``, with nothing in it but the modules of that step."""

    def __init__(self, network: SamSegmenter, *modules: str) -> None:
        super().__init__()
        self.network = _only(network, "sam", "second", *modules)
        self.network.sam = _only(network.sam, *modules)
        if "side" not in modules:
            self.network.side = None


class EmbeddingPart(SamPart):
    """Slices (B, S, h, w), and for a side network that wants them SAM's embeddings (B, V, C, gh, gw), to such."""

    def forward(self, image: Tensor, embedding: Tensor | None = None) -> Tensor:
        flat = None if embedding is None else embedding.flatten(0, 1)
        return self.network.mix(image, flat).unflatten(0, (-1, self.network.views))


class DecoderPart(SamPart):
    """Embeddings (B, V, C, gh, gw), and boxes (B, 4) of a prompted network, to logits at a quarter and at full size.

    Logits (B, K, 4 gh, 4 gw) and (B, K, *frame). Where a box is NaN they are those of an empty prediction.
    """

    def forward(self, embedding: Tensor, boxes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        flat = embedding.flatten(0, 1)
        if boxes is None:
            maps = self.network.decode(flat, None)
        else:
            absent = boxes.isnan().any(-1)[:, None]  # (B, 1)
            maps = self.network.decode(flat, torch.where(absent, torch.zeros_like(boxes), boxes))
            empty = empty_logits(maps[0], 1, self.network.num_classes, (1, 1))
            maps = [torch.where(absent[..., None, None], empty, low) for low in maps]
        return maps[0], self.network.enlarge(maps)


class PlainPart(nn.Module):
    """A network without SAM: (B, S, h, w) to logits (B, K, side, side) of the padded square."""

    def __init__(self, network: PlainSegmenter) -> None:
        super().__init__()
        self.net, self.side = network.net, network.image_size

    def forward(self, image: Tensor) -> Tensor:
        return self.net(F.pad(image, (0, self.side - image.shape[-1], 0, self.side - image.shape[-2])))


def _only(module: Any, *names: str) -> Any:
    """``module`` with these of its submodules alone; all else is shared."""
    found = copy.copy(module)
    found._modules = {name: child for name, child in module._modules.items() if name in names}
    return found


def to_program(part: Part) -> ExportedProgram:
    """Record a part with ``torch.export``, for all lengths of its free axes.

    Raises:
        BundleError: torch.export cannot record it (a side network of one's own may do what it does not know).
    """
    limits = {"height": part.frame[0], "width": part.frame[1]}
    lengths = {"batch": 2, **{name: max(1, 3 * limit // 4) for name, limit in limits.items()}}
    axes = {"batch": Dim("batch", min=1), **{name: Dim(name, min=1, max=limit) for name, limit in limits.items()}}
    example = tuple(
        torch.zeros([axis if isinstance(axis, int) else lengths[axis] for axis in shape])
        for shape in part.inputs.values()
    )
    with torch.no_grad(), _told(part, "torch.export"):
        return torch.export.export(part.module, example, dynamic_shapes=_free_axes(part, axes))


def _free_axes(part: Part, axes: Mapping[str, Any]) -> tuple[dict[int, Any], ...]:
    """Of every input the numbers of its free axes, and what stands in ``axes`` for them."""
    return tuple({i: axes[a] for i, a in enumerate(shape) if isinstance(a, str)} for shape in part.inputs.values())


def write_program(program: ExportedProgram, path: Path, facts: Mapping[str, str]) -> None:
    """Save as .pt2; ``torch.export.load(path, extra_files=...)`` gives the facts back, one entry each."""
    with writing(path), path.open("wb") as stream:  # torch's own stream does not say that the disk is full
        torch.export.save(program, stream, extra_files=dict(facts))


def read_program(path: Path) -> Call:
    """Load a .pt2 as a module."""
    return torch.export.load(path).module()


def write_onnx(program: ExportedProgram, part: Part, path: Path, facts: Mapping[str, str]) -> None:
    """Save as ONNX, with ``facts`` as its metadata. Above 1.5 GB the weights go into a second file beside it."""
    with torch.no_grad(), _told(part, "torch.onnx.export"):
        model = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_shapes=_free_axes(part, {name: name for name in ("batch", "height", "width")}),
            verbose=False,
        )
        assert model is not None  # with dynamo=True
        model.model.metadata_props.update(facts)
        model.save(path)


def read_onnx(path: Path) -> Call:
    """Load an ONNX file for the CPU with onnxruntime, with torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})
        return tuple(torch.from_numpy(output) for output in outputs)

    return call


@contextmanager
def _told(part: Part, what: str) -> Iterator[None]:
    """Turn what an exporter raises into one error that names the part, and keep its remarks for itself."""
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BundleError(f"{part.name}: {what} cannot record {type(part.module).__name__}: {reason}") from error
    finally:
        noisy.setLevel(level)
