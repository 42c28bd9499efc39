"""Read a SAM weights file of any common layout into one flat state dict, or say what the file really is.

Official are the names of segment_anything (Kirillov et al. 2023). Known beside them: any prefix that all names share;
``SamModel`` of Hugging Face transformers; the files that SAMed (Zhang & Liu 2023, arXiv:2304.13785), SAM-LST (Chai et
al. 2023, arXiv:2306.12737) and H-SAM (Cheng et al. 2024, arXiv:2403.18271) write after training, whose names were read
in the authors' public code.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from samseg_monai.errors import FEW_TENSORS, WeightsError, raise_all
from samseg_monai.sam.spec import SPECS

MOST_LEVELS = 10  # of tables around a state dict
WRAPPER_KEYS = ("model", "state_dict", "model_state_dict", "model_state")  # MedSAM's, Lightning's, others'
ZIP_START, PICKLE_START = b"PK\x03\x04", b"\x80"  # torch.save since 1.6, and before
State = Mapping[str, torch.Tensor]

# First parts of a name that belong to a layout and not to what was wrapped around it: of SAM, of Hugging Face's, and of
# SAM-LST, whose network holds a SAM beside its ResNet.
ROOTS = {"image_encoder", "prompt_encoder", "mask_decoder", "vision_encoder", "shared_image_embedding", "CNN_encoder"}
ROOTS |= {"prompt_encoder2", "mask_decoder2"}  # of H-SAM
WRAPPERS = ("module.", "_orig_mod.", "sam.")  # DistributedDataParallel, torch.compile, a network that holds a SAM

_SAMED = re.compile(r"w_([ab])_(\d{3})")
_H_SAM = "mask_decoder2."
# what computes nothing in H-SAM: a softmax over one channel lies behind the self-attention, nobody calls the others
# (of eleven embeddings of points SAM has the first four)
_H_SAM_IDLE = re.compile(
    r"mask_decoder2\.((iou_prediction_head|self_attn2?|norm[12]|mlp|med_sel)\."
    r"|transformer2\.layers\.\d\.cross_attn_\w+\.norm[123]\.)|prompt_encoder\.point_embeddings\.([4-9]|10)\."
)
_SAMED_S = re.compile(r"(sa|cti|cit)_[ab]_\d{3}|fati_[qv][ab]")  # LoRA in the mask decoder, too
_IMAGE_WIDE = "shared_image_embedding.positional_embedding"
_GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
# Hugging Face's SamModel (transformers, models/sam/modeling_sam.py) to segment_anything: the first pattern that matches
# the start of a name is replaced. The numbers are positions in nn.Sequential, activations counted.
_HUGGING_FACE = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"shared_image_embedding\.positional_embedding$", _GAUSSIAN),
        (r"prompt_encoder\.shared_embedding\.positional_embedding$", _GAUSSIAN),
        (r"prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
        (r"prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
        (r"prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
        (r"prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
        (r"prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
        (r"prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
        (r"vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
        (r"vision_encoder\.layers\.(\d+)\.layer_norm([12])\.", r"image_encoder.blocks.\1.norm\2."),
        (r"vision_encoder\.layers\.", "image_encoder.blocks."),
        (r"vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
        (r"vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
        (r"vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
        (r"vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
        (r"vision_encoder\.", "image_encoder."),
        (r"(mask_decoder\.transformer\.layers\.\d+)\.layer_norm([1-4])\.", r"\1.norm\2."),
        (r"mask_decoder\.transformer\.layer_norm_final_attn\.", "mask_decoder.transformer.norm_final_attn."),
        (r"mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
        (r"mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
        (r"mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
        # SAM's heads have three layers each; here the first and the last have names of their own
        (r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.proj_in\.", r"\1.layers.0."),
        (r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.0\.", r"\1.layers.1."),
        (r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.proj_out\.", r"\1.layers.2."),
    )
]  # fmt: skip

# What tells one image encoder from another.
_TINY_VIT = "image_encoder.patch_embed.seq.0.c.weight"  # (32, 3, 3, 3) in MobileSAM
_VIT = "image_encoder.patch_embed.proj.weight"  # (embed_dim, 3, 16, 16)
_MOBILE_SAM_WIDTH = 32


# what a pickle calls to make a number or an array of numpy, in numpy 1 and 2
_OF_NUMPY = ("_codecs.encode", "numpy.dtype", "numpy.ndarray") + tuple(
    f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")
)


class Passed:
    """Stands for a value of numpy in a file of weights, whatever it was made of: nothing of it is made."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``.pth``/``.pt`` or ``.safetensors`` file by name, on the CPU, floating ones as float32.

    Knows plain SAM files, MedSAM's layouts (``{"model": ...}``, ``{"state_dict": ...}``), any prefix that all names
    share, and Hugging Face's names, which become SAM's own. Files of SAMed and SAM-LST keep their
    names. Never runs code from the file (``weights_only=True``).

    Raises: WeightsError if the file is absent, empty, truncated, a git-lfs pointer or a web page, or holds anything but
        tensors.
    """
    path = Path(path).expanduser()
    content = _unwrap(read_content(path))
    if not isinstance(content, Mapping) or not content:
        held = "an empty table" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise WeightsError(f"{path} holds no state dict but {held}: save the model's state_dict()")
    others = [str(name) for name, value in content.items() if not is_plain(value)]
    if others:
        raise WeightsError(
            f"{path} holds no state dict of tensors; these entries are none: {', '.join(others[:FEW_TENSORS])}"
            f"{f' and {len(others) - FEW_TENSORS} more' if len(others) > FEW_TENSORS else ''}. "
            "Save the model's state_dict()"
        )
    larger = [f"{name}: shape {tuple(value.shape)}" for name, value in content.items()
              if value.numel() * value.element_size() > value.untyped_storage().nbytes()]  # fmt: skip
    raise_all(larger, WeightsError, f"{path}: tensors of more values than the file holds of them")
    state = official_names({str(name): value for name, value in content.items()})
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def read_content(path: Path) -> object:
    """Whatever a file of safetensors or ``torch.save`` holds, read without running code from it.

    Values of numpy, such as a best score beside the weights, are nobody's weights: a ``Passed`` stands for each.

    Raises: WeightsError saying what the file really is, or that a check sum in it differs.
    """
    if not path.is_file():
        raise WeightsError(f"{path} does not exist")
    with path.open("rb") as stream:
        head = stream.read(512)
    size = path.stat().st_size
    if not head:
        raise WeightsError(f"{path} is empty (0 bytes): get the file again")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a git-lfs pointer of {size} bytes, not the weights: run 'git lfs pull' where it came from"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(
            f"{path} is a web page ({size} bytes) saved under the name of a weights file: download it again"
        )
    damaged = f"{path} cannot be read ({size:,} bytes); it looks truncated or damaged: get it again"
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightsError(f"{damaged} ({error})") from error
    archive = False
    with suppress(zipfile.BadZipFile):  # of an end that speaks of other disks
        archive = zipfile.is_zipfile(path)
    if head.startswith(ZIP_START) and not archive:  # the table of contents is at the end of a zip file
        raise WeightsError(f"{damaged} (the end of the archive is missing)")
    if not head.startswith((ZIP_START, PICKLE_START)):
        raise WeightsError(f"{damaged} (neither torch.save nor safetensors wrote it)")
    try:
        if archive:
            _check_sums(path)
        with torch.serialization.safe_globals([(Passed, name) for name in _OF_NUMPY]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is no file of tensors only, and reading anything else would run code from it: "
            f"save the model's state_dict() with torch.save ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:
        raise WeightsError(
            f"{damaged} ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def is_plain(value: object) -> bool:
    """Whether ``value`` is a tensor of real numbers, all of which it holds: not sparse, not quantised, not "meta"."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return False
    return not (value.is_complex() or value.is_quantized or value.is_meta)


def _check_sums(path: Path) -> None:
    """Raise ValueError for a ZIP in which a check sum differs: torch reads on without a word."""
    with zipfile.ZipFile(path) as archive:
        if (bad := archive.testzip()) is not None:
            raise ValueError(f"the check sum of {bad} differs")


def _unwrap(content: object) -> object:
    """The innermost state dict of a training checkpoint (next to which optimiser, epoch and the like are dropped)."""
    for _ in range(MOST_LEVELS):  # a table may be part of itself
        if not isinstance(content, Mapping):
            break
        inner = next((content[key] for key in WRAPPER_KEYS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    return content


def official_names(state: State) -> dict[str, torch.Tensor]:
    """The same tensors under segment_anything's names, as far as the layout is known; other names stay.

    Raises: WeightsError if two different tensors would get one name.
    """
    prefix = common_prefix(state)
    state = {name.removeprefix(prefix): value for name, value in state.items()}
    if not any(name.startswith("vision_encoder.") or name == _IMAGE_WIDE for name in state):
        return state
    named: dict[str, torch.Tensor] = {}
    problems = []
    for name, value in state.items():
        official = hugging_face_name(name)
        if official in named and not torch.equal(named[official], value):
            problems.append(f"{name}: another tensor of the file has the same place, {official}, and other values")
        named[official] = value
    raise_all(
        problems, WeightsError, "the file looks like a SamModel of Hugging Face, but does not fit one", most=FEW_TENSORS
    )
    return named


def common_prefix(names: Collection[str]) -> str:
    """What stands before every name and is no part of a known layout, with the dot at its end; "" if nothing does.

    ``model.net.image_encoder.pos_embed``, ``model.net.mask_decoder. ...`` give ``model.net.``. Without a known part
    behind it (any other network), only ``module.``, ``_orig_mod.`` and ``sam.`` count, in this order.
    """
    parts = [name.split(".") for name in names]
    shared: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1 or column[0] in ROOTS:
            break
        shared.append(column[0])
    ends = [row[len(shared)] for row in parts if len(row) > len(shared)]
    if shared and len(ends) == len(parts) and all(_is_root(end) for end in ends):
        return ".".join(shared) + "."
    prefix = ""
    for wrapper in WRAPPERS:
        if names and all(name.startswith(prefix + wrapper) for name in names):
            prefix += wrapper
    return prefix


def _is_root(part: str) -> bool:
    return part in ROOTS or part in ("sam", "sam_encoder") or bool(_SAMED.fullmatch(part) or _SAMED_S.fullmatch(part))


def hugging_face_name(name: str) -> str:
    """segment_anything's name of a tensor of Hugging Face's SamModel; a name that has none stays as it is."""
    for pattern, replacement in _HUGGING_FACE:
        if pattern.match(name):
            return pattern.sub(replacement, name, count=1)
    return name


def is_samed(state: Collection[str]) -> bool:
    """Whether the names are those of a SAMed file: LoRA tensors ``w_a_000 ...`` and a decoder, without an encoder."""
    return any(_SAMED.fullmatch(name) for name in state)


def is_h_sam(state: Collection[str]) -> bool:
    """Whether the names are those of an H-SAM file: as SAMed's, with a second decoder."""
    return is_samed(state) and any(name.startswith(_H_SAM) for name in state)


def is_samed_s(state: Collection[str]) -> bool:
    """Whether the names are those of SAMed's small variant, with LoRA in the mask decoder's transformer, too."""
    return any(_SAMED_S.fullmatch(name) for name in state)


def is_sam_lst(state: Collection[str]) -> bool:
    """Whether the names are those of a SAM-LST file: a whole network, a SAM (``sam.``) and a ResNet18 beside it."""
    return any(name.startswith("CNN_encoder.") for name in state)


def samed_tensors(state: State) -> Iterator[tuple[str, int, int, str]]:
    """Each LoRA tensor of a SAMed file: matrix ("a" or "b"), adapted block in order, 0 (q) or 1 (v), name in the file.

    ``w_a_{n}`` (rank, width) and ``w_b_{n}`` (width, rank): n = 2 * block is q, n = 2 * block + 1 is v.
    """
    for name in state:
        if match := _SAMED.fullmatch(name):
            block, part = divmod(int(match[2]), 2)
            yield match[1], block, part, name


def from_h_sam(state: State) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int | None]:
    """An H-SAM file as one of SAMed; its second decoder under the names of ``SamSegmenter.second``; the image's side.

    ``prompt_encoder2`` is a second name of ``prompt_encoder``. The side is what the self-attention, which computes
    nothing, was built for; None where it is not told.

    Raises: WeightsError if ``prompt_encoder2`` has values of its own.
    """
    first, second, problems = {}, {}, []
    for name, value in state.items():
        if name.startswith("prompt_encoder2."):
            twin = state.get(name.replace("2.", ".", 1))
            if twin is None or not torch.equal(twin, value):
                problems.append(f"{name}: it is not the same as that of prompt_encoder")
        elif _H_SAM_IDLE.match(name):
            continue
        elif name.startswith(_H_SAM):
            own = name.removeprefix(_H_SAM)
            second[re.sub(r"^(transformer|output_hypernetworks_mlps)2\.", r"\1.", own)] = value
        else:
            first[name] = value
    raise_all(problems, WeightsError, "the file has two different prompt encoders", most=FEW_TENSORS)
    positions = state.get(f"{_H_SAM}norm1.weight")
    return first, second, None if positions is None else 16 * math.isqrt(positions.numel())


def from_sam_lst(state: State) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Tensors of a SAM-LST file under the names of a SamSegmenter with a ladder, and the names passed over.

    ``sam.alpha`` is the gate, ``CNN_encoder`` the side network. Its ``layer4`` and ``fc`` compute nothing there, and
    ``sam_encoder`` is a second name of ``sam.image_encoder``.

    Raises: WeightsError if ``sam_encoder`` has values of its own.
    """
    named: dict[str, torch.Tensor] = {}
    passed_over, problems = [], []
    for name, value in state.items():
        if name.startswith(("CNN_encoder.layer4.", "CNN_encoder.fc.")):
            passed_over.append(name)
        elif name.startswith("sam_encoder."):
            twin = state.get("sam.image_encoder." + name.removeprefix("sam_encoder."))
            passed_over.append(name)
            if twin is None or not torch.equal(twin, value):
                problems.append(f"{name}: it is not the same as that of sam.image_encoder")
        else:
            gate = "side.alpha" if name == "sam.alpha" else name
            named[re.sub(r"^CNN_encoder\.", "side.net.", gate)] = value
    heading = "the file looks like one of SAM-LST, but has two different image encoders"
    raise_all(problems, WeightsError, heading, most=FEW_TENSORS)
    return named, tuple(passed_over)


def looks_like(state: State, network: State) -> str:
    """The likely variant of a file whose encoder is of another kind or width than the network's; "" if it is not.

    Args:
        state: the file's tensors, official names.
        network: those of the SAM it was meant for.
    """
    if _TINY_VIT in state:
        if _TINY_VIT in network and network[_TINY_VIT].shape == state[_TINY_VIT].shape:
            return ""
        return (
            "sam_variant 'vit_t'" if state[_TINY_VIT].shape[:1] == (_MOBILE_SAM_WIDTH,) else "a TinyViT of another size"
        )
    if _VIT not in state or (_VIT in network and network[_VIT].shape[:1] == state[_VIT].shape[:1]):
        return ""
    width = state[_VIT].shape[0] if state[_VIT].ndim else 0
    # MedSAM's is one of vit_b's
    likely = [name for name, spec in SPECS.items() if getattr(spec, "embed_dim", None) == width and name != "medsam"]
    return f"sam_variant {' or '.join(map(repr, likely))}" if likely else ""
