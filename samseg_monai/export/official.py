"""A trained network as plain SAM: keys and shapes of the official ``.pth`` files, and segment_anything's own classes.

The official layout has one image size per variant, 1024. A network of another image size has position tables of another
size. They are brought back as the table that is closest to a starting table and that our loader, resizing it to the
network's image size again, turns into the trained table. The starting table is the base file's plus the trained change,
interpolated; without the base file it is the trained table, interpolated. Tables that did not learn thereby return as
they were in the base file.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor

from samseg_monai.networks import SamSegmenter
from samseg_monai.sam.backbone import Backbone, SamSpec
from samseg_monai.sam.build import build_sam, official_encoder
from samseg_monai.sam.spec import SPECS
from samseg_monai.sam.weights import read_state
from samseg_monai.sam.weights.load import resize_table


def official_shapes(spec: SamSpec) -> dict[str, torch.Size]:
    """Names and shapes of SAM's own state dict, at the variant's own image size and with SAM's four masks."""
    with torch.device("meta"):  # names and shapes only, no memory
        return {name: tensor.shape for name, tensor in build_sam(spec).state_dict().items()}


def official_state(network: SamSegmenter, base: str | Path | None = None) -> dict[str, Tensor]:
    """State dict of plain SAM that computes what ``network`` computes, in the official layout.

    Adapters are merged into their layers, on a copy: ``network`` stays as it is. ``obstacles`` says what cannot be.

    Args:
        network: of one class, without a side network.
        base: the file its training started from; read only where position tables have another size.
    """
    plain = copy.deepcopy(network)
    plain.merge()
    state, shapes = plain.sam.state_dict(), official_shapes(network.spec)
    other = [name for name, shape in shapes.items() if state[name].shape != shape]
    start = {} if base is None or not other else read_state(base)
    official = {
        name: (_enlarged(state[name], shape, start.get(name)) if name in other else state[name]).cpu().contiguous()
        for name, shape in shapes.items()
    }
    # MobileSAM's own builder loads strictly, and wants the classifier that its encoder was trained with and never uses
    return official | {name: torch.zeros(shape) for name, shape in _unused(network.sam.image_encoder).items()}


def _unused(encoder: Backbone) -> dict[str, tuple[int, ...]]:
    """Names in SAM's state dict, and shapes, of what published files hold and nobody uses."""
    return {f"image_encoder.{name}": shape for name, shape in encoder.unused_in_files.items()}


def _enlarged(table: Tensor, shape: torch.Size, base: Tensor | None) -> Tensor:
    """Position table (1, h, w, C) or (2 n - 1, C) in another size, such that resizing it back gives ``table`` again.

    With D the linear map that resizes, and t the table: ``s = base + up(t - D base)``, then the least change of s that
    gives ``D s = t``, ``s + D^+ (t - D s)``. Where D makes the table larger, D^+ is the best that can be done.
    """
    start = resize_table(table, shape)
    if base is not None and base.shape == shape:
        start = base + resize_table(table - resize_table(base, table.shape), shape)
    missing = (table - resize_table(start, table.shape)).double()
    for axis in (1, 2) if table.ndim == 4 else (0,):
        # bilinear interpolation works along each axis alone, so its matrix shows in a table of one column per row
        down = resize_table(torch.eye(shape[axis], dtype=torch.float64), table.shape[axis : axis + 1])
        missing = torch.tensordot(torch.linalg.pinv(down), missing, dims=([1], [axis])).movedim(0, axis)
    return (start + missing).float()


def official_sam(spec: SamSpec, path: str | Path) -> Sam:
    """segment_anything's own SAM with the weights of ``path``, loaded strictly.

    vit_b, vit_l and vit_h come from its ``sam_model_registry``; other sizes are made of its classes in the same way.
    It has no MobileSAM: that one gets this package's encoder, and what nobody uses of the file is passed over.
    """
    if SPECS.get(spec.name) == spec and spec.name in sam_model_registry:
        return sam_model_registry[spec.name](checkpoint=str(path))
    grid = spec.image_size // spec.patch_size
    sam = Sam(
        official_encoder(spec, spec.image_size),
        PromptEncoder(spec.prompt_dim, (grid, grid), (spec.image_size, spec.image_size), spec.mask_in_chans),
        MaskDecoder(
            transformer_dim=spec.prompt_dim,
            transformer=TwoWayTransformer(2, spec.prompt_dim, spec.decoder_heads, spec.decoder_mlp_dim),
            iou_head_hidden_dim=spec.iou_hidden_dim,
        ),
    )
    state = torch.load(path, weights_only=True)
    unused = _unused(sam.image_encoder) if isinstance(sam.image_encoder, Backbone) else {}
    sam.load_state_dict({name: tensor for name, tensor in state.items() if name not in unused})
    return sam.eval()
