"""Parts as files: ``torch.export`` programs (.pt2), the same programs as ONNX, and both read back to be run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from samseg_monai.errors import BundleError
from samseg_monai.export.parts import Call, Part

CARD = "export.json"  # beside the files, and what is known of them within each .pt2


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
    free = tuple({i: axes[axis] for i, axis in enumerate(s) if isinstance(axis, str)} for s in part.inputs.values())
    with torch.no_grad(), _told(part, "torch.export"):
        return torch.export.export(part.module, example, dynamic_shapes=free)


def write_program(program: ExportedProgram, path: Path, facts: Mapping[str, str]) -> None:
    """Save as .pt2; ``torch.export.load(path, extra_files=...)`` gives the facts back, one entry each."""
    torch.export.save(program, path, extra_files=dict(facts))


def read_program(path: Path) -> Call:
    """Load a .pt2 as a module."""
    return torch.export.load(path).module()


def write_onnx(program: ExportedProgram, part: Part, path: Path, facts: Mapping[str, str]) -> None:
    """Save as ONNX, with ``facts`` as its metadata. Above 1.5 GB the weights go into a second file beside it."""
    free = tuple({i: axis for i, axis in enumerate(s) if isinstance(axis, str)} for s in part.inputs.values())
    with torch.no_grad(), _told(part, "torch.onnx.export"):
        model = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_shapes=free,
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
