"""A trained network in the layouts of other projects: SAMed's ``.pth``, and Hugging Face's peft for ``SamModel``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from samseg_monai.adapters.lora import DoRALinear, LoRALinear
from samseg_monai.faults import writing
from samseg_monai.files import write_json
from samseg_monai.networks import SamSegmenter
from samseg_monai.networks.foreign import SAMED_HEADS, samed_values
from samseg_monai.networks.peft import PEFT_CONFIG, PEFT_TENSORS, peft_name, scaling_of
from samseg_monai.networks.scans import TOGETHER
from samseg_monai.products import Linear
from samseg_monai.sam.vit import ViTSpec
from samseg_monai.sam.weights.load import copy_tensors
from samseg_monai.strategies import FacT, LoRA

HUB = {"vit_b": "facebook/sam-vit-base", "vit_l": "facebook/sam-vit-large", "vit_h": "facebook/sam-vit-huge"}
_PREFIX = "base_model.model."  # what peft wraps a model in


def against_samed(network: SamSegmenter) -> list[str]:
    """Reasons why SAMed's layout cannot hold ``network``."""
    strategy = network.strategy
    if not isinstance(strategy, LoRA) or isinstance(strategy, FacT):
        return [f"{type(strategy).__name__}: SAMed's files hold low-rank updates and a mask decoder, nothing else"]
    reasons = _against_vit(network)
    if more := sorted(set(strategy.targets) - {"q", "v"}):
        reasons.append(f"targets {', '.join(more)}: SAMed adapts q and v only")
    if strategy.dora:
        reasons.append("dora: SAMed has no magnitudes")
    if network.second is not None:
        reasons.append(f"decoder {strategy.decoder!r}: SAMed has one decoder, here is a second one behind it")
    if network.num_classes == 1:
        reasons.append("one class: SAMed has a map of the background beside it, this network has one map")
    if network.prompt != "none":
        reasons.append(f"prompt {network.prompt!r}: SAMed takes no prompts")
    return reasons


def samed_state(network: SamSegmenter) -> dict[str, Tensor]:
    """State dict as SAMed saves it, which computes what ``network`` computes on the same base weights.

    ``w_a_{n}`` (rank, width) and ``w_b_{n}`` (width, rank): n = 2 * block is q, n = 2 * block + 1 is v. SAMed scales by
    1, so that a scaling goes into ``w_b``; what is not adapted is an update of zeros.
    """
    strategy: Any = network.strategy
    found: dict[str, dict[str, Tensor]] = {"a": {}, "b": {}}
    for block, (_, module) in enumerate(network.sam.image_encoder.named_blocks()):
        layer: Any = module.get_submodule("attn.qkv")
        for n, part in enumerate((0, 2)):
            name = f"{2 * block + n:03}"
            if isinstance(layer, LoRALinear) and part in layer.parts:
                a, b = layer.lora_a[str(part)], layer.scaling * layer.lora_b[str(part)]
            else:
                a, b = (
                    torch.zeros(strategy.rank, layer.in_features),
                    torch.zeros(layer.out_features // 3, strategy.rank),
                )
            found["a"][f"w_a_{name}"], found["b"][f"w_b_{name}"] = a, b
    plain = copy.deepcopy(network)
    plain.merge()  # updates in the mask decoder
    heads = {name: value for name, value in plain.sam.state_dict().items() if name.startswith(SAMED_HEADS)}
    return {name: t.detach().cpu().contiguous() for name, t in {**found["a"], **found["b"], **heads}.items()}


def samed_again(network: SamSegmenter, path: Path) -> SamSegmenter:
    """What SAMed computes with the file at ``path`` on the base weights of ``network``."""
    state = torch.load(path, weights_only=True)
    again = SamSegmenter(
        network.spec,
        LoRA(len(state["w_a_000"]), decoder="samed"),
        image_size=network.image_size,
        num_classes=network.num_classes,
        scans=network.scans,
        scan_mode=network.scan_mode,  # type: ignore[arg-type]
        input_scale=network.input_scale,  # type: ignore[arg-type]
        prompt="none",
        rectangular=network.sam.rectangular,
    )
    own = network.state_dict()
    copy_tensors(again, {name: own[name] for name in again.state_dict().keys() & own.keys() if "lora" not in name})
    copy_tensors(again, samed_values(again, state, str(path)))
    return again


def against_peft(network: SamSegmenter) -> list[str]:
    """Reasons why an adapter of peft for ``SamModel`` cannot hold ``network``."""
    strategy = network.strategy
    if not isinstance(strategy, LoRA) or isinstance(strategy, FacT):
        return [
            f"{type(strategy).__name__}: an adapter of peft for SamModel holds low-rank updates; what can be is the "
            "strategy lora, with decoder false or 'lora'"
        ]
    reasons = _against_vit(network)
    if network.num_classes > 1:
        reasons.append(f"{network.num_classes} classes: SamModel has the 4 masks of SAM")
    elif strategy.decoder not in (False, "lora"):
        reasons.append(
            f"decoder {strategy.decoder!r}: the mask decoder learnt as a whole, which is no low-rank update; train "
            "with decoder 'lora' (updates in its attention) or false"
        )
    if network.masks == "best":
        reasons.append("masks 'best': choose among SamModel's own masks (multimask_output=True); set masks to 'single'")
    return reasons


def _against_vit(network: SamSegmenter) -> list[str]:
    kind = type(network.spec).__name__
    return [] if isinstance(network.spec, ViTSpec) else [f"{network.spec.name}: its encoder ({kind}) is no ViT of SAM"]


def write_peft(network: SamSegmenter, folder: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, for ``PeftModel.from_pretrained``."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    layers = {name: layer for name, layer in network.sam.named_modules() if isinstance(layer, LoRALinear)}
    for name, layer in layers.items():
        a, b = layer.fused()
        kind = name.rpartition(".")[2]  # qkv, proj, lin1, lin2, q_proj, v_proj: all of a kind have one rank
        ranks[kind], alphas[kind] = len(a), layer.scaling * len(a)
        named = {"lora_A.weight": a, "lora_B.weight": b}
        if isinstance(layer, DoRALinear):  # peft turns all rows: those that did not learn keep their length
            plain = torch.linalg.vector_norm(layer.weight.float(), dim=1).chunk(layer.num_parts)
            lengths = [layer.magnitude[str(p)] if p in layer.parts else plain[p] for p in range(layer.num_parts)]
            named["lora_magnitude_vector"] = torch.cat(lengths)
        tensors |= {f"{_PREFIX}{peft_name(name)}.{key}": t.detach().cpu().contiguous() for key, t in named.items()}
    rank, alpha = min(ranks.values()), min(alphas.values())
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": HUB.get(network.spec.name),
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {kind: r for kind, r in ranks.items() if r != rank},
        "alpha_pattern": {kind: _whole(a) for kind, a in alphas.items() if a != alpha},
        "target_modules": [peft_name(name) for name in layers],
        "use_dora": any(isinstance(layer, DoRALinear) for layer in layers.values()),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    write_json(folder / PEFT_CONFIG, config)
    with writing(folder / PEFT_TENSORS):
        (folder / PEFT_TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def peft_again(network: SamSegmenter, tensors: dict[str, Tensor], config: dict[str, Any]) -> SamSegmenter:
    """``network`` with plain layers in place of its updates, with the weights that peft gives them by its definition.

    ``W + s B A``, and of DoRA ``m (W + s B A) / ||W + s B A||``, row by row.
    """
    plain = copy.deepcopy(network)
    for name, layer in list(plain.sam.named_modules()):
        if not isinstance(layer, LoRALinear):
            continue
        prefix = f"{_PREFIX}{peft_name(name)}."
        a, b = tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"]
        scaling = scaling_of(config, name, len(a))
        assert scaling is not None  # written just now
        weight = layer.weight + scaling * b @ a
        if config["use_dora"]:
            weight *= (tensors[f"{prefix}lora_magnitude_vector"] / torch.linalg.vector_norm(weight, dim=1))[:, None]
        linear = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = torch.nn.Parameter(weight, requires_grad=False), layer.bias
        parent, _, child = name.rpartition(".")
        setattr(plain.sam.get_submodule(parent), child, linear)
    return plain


def use_elsewhere(network: SamSegmenter, fmt: str) -> list[str]:
    """How SAMed's code ("samed"), or peft and transformers ("peft"), give the logits of ``network`` with its file."""
    strategy: Any = network.strategy
    size, native = network.image_size, network.spec.image_size
    if fmt == "samed":
        steps = [f"LoRA_Sam(sam, {strategy.rank}).load_lora_parameters(FILE), sam built for {size} pixels"]
        if network.input_scale != "unit":
            steps.append(
                f"SAMed shows its network intensities from 0 to 1; this one wants input_scale {network.input_scale}"
            )
    else:
        steps = ["PeftModel.from_pretrained(SamModel.from_pretrained(BASE), FOLDER)"]
        given = {"sam": "less SAM's mean, by its standard deviation", "slice": "0 to 1 in each slice"}.get(
            network.input_scale, "as they are"
        )
        steps.append(f"pixel_values: intensities {given}, then padded with zeros to the square")
        steps.append("multimask_output=False: only the first mask was trained")
        if size != native:
            steps.append(
                f"trained at {size} pixels, while SamModel works at {native}: its logits are others. To get the "
                f"network's own, give the folder as checkpoint at image_size {size}"
            )
    if network.scan_mode in TOGETHER:
        steps.append(
            f"every scan is a grey image: three equal channels; of several scans {TOGETHER[network.scan_mode]}"
        )
    return steps
