"""How a segmenter computes what it computes: 8-bit numbers, TF32, compiled blocks, the plain form of attention."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from samseg_monai.adapters.lora import LoRALinear
from samseg_monai.choices import Compute
from samseg_monai.networks.common import versions_of
from samseg_monai.products import int8_problem, round_to_int8
from samseg_monai.sam.attention import masked

if TYPE_CHECKING:
    from samseg_monai.networks.segmenter import SamSegmenter


NO_TRAINING = "compute::int8: got true in training, but 8-bit numbers cannot learn; leave it out"


def compute_problems(compute: Compute, *, autocast: str | None = None, device: str = "cpu") -> list[str]:
    """What of the settings is not possible here, a line each.

    Args:
        device: cpu or cuda, as far as it is known.
    """
    problems = []
    if compute.int8 and (reason := int8_problem()):
        problems.append(f"compute::int8: got true, but {reason}; leave it out")
    if compute.int8 and autocast is not None:
        problems.append(f"compute::int8: got true with autocast {autocast!r}; leave out one of the two")
    if compute.int8 and device != "cpu":
        problems.append(f"compute::int8: got true on {device}, but it is for CPUs; give device cpu, or leave it out")
    if compute.compile and (reason := _no_compiler(device)):
        problems.append(f"compute::compile: got true, but {reason}; leave it out")
    return problems


def _no_compiler(device: str) -> str | None:
    """Why torch.compile would fail at the first batch; None where it would not."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler (g++, or what CXX names)"
    return "there is no Triton" if device != "cpu" and find_spec("triton") is None else None


def apply_compute(network: SamSegmenter, compute: Compute) -> None:
    """Set up a new segmenter, before or after its weights are loaded; TF32 is the whole process's and stays.

    State-dict keys, tensors and hashes stay what they are.
    """
    encoder = network.sam.image_encoder
    if compute.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if compute.attention == "plain":
        for module in encoder.modules():
            if hasattr(module, "way"):  # MobileSAM's attention has one form only
                module.way = masked  # type: ignore[assignment]
    if compute.int8:
        round_to_int8(encoder)
        hold_updates(network, int8=True)
    if compute.compile:
        for _, block in encoder.named_blocks():
            block.compile()


def hold_updates(network: nn.Module, *, int8: bool = False) -> None:
    """Let layers with low-rank updates compute as one product wherever nothing learns; in memory only.

    The layers and their tensors stay, so that cards, hashes and ``disable_adapter`` do.
    """
    for layer in network.modules():
        if isinstance(layer, LoRALinear):
            setattr(layer, "forward", Held(layer, int8=int8))  # noqa: B010 a method, to mypy


class Held:
    """In place of the ``forward`` of a layer with low-rank updates: its merged form, made anew where a tensor changed.

    In training, with a gradient to one of its tensors, switched off, and compiled, the layer computes by itself.
    """

    def __init__(self, layer: LoRALinear, *, int8: bool) -> None:
        self.layer, self.int8 = layer, int8
        self.plain: nn.Linear | None = None
        self.versions: Any = None

    def __call__(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        layer = self.layer
        learning = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.parameters())
        if layer.training or not layer.enabled or learning or torch.compiler.is_compiling():
            return type(layer).forward(layer, input)
        versions = [versions_of(part) for part in (layer, *layer.shared)]
        if self.plain is None or self.versions != versions:
            with torch.inference_mode(False):  # its tensors would have no versions, and no use in a backward pass
                self.plain, self.versions = layer.merge(), versions
            if self.int8:
                round_to_int8(self.plain)
        return self.plain(input)
