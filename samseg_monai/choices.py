"""What settings are made of: texts, bounded numbers, the closed lists of methods and slice pickers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

IGNORE = 255  # in labels that were recoded: nobody has judged this voxel, it is out of loss and scores
PICKED = "picked_"  # begins the names of scores that are of picked slices, not of whole volumes
IGNORE_NAMES = ("ignore", "ignored", "void")  # what datalists call the value of such voxels
_WORD = "[A-Za-z0-9][A-Za-z0-9_.-]*"

Name = Annotated[str, StringConstraints(pattern=f"^{_WORD}$", max_length=64)]
# of a class or channel: BraTS calls one "NCR/NET"; no slash begins or ends a word, so that it is no path
_SIGNS = "[A-Za-z0-9_.()+-]"
Label = Annotated[
    str, StringConstraints(pattern=f"^[A-Za-z0-9]{_SIGNS}*( {_SIGNS}+|/[A-Za-z0-9(]{_SIGNS}*)*$", max_length=64)
]
# a sentence: it begins like one, so that it is neither an expression nor a path
Text = Annotated[str, StringConstraints(pattern=r"""^[A-Za-z0-9"'(]""", max_length=4000)]
Pattern = Annotated[
    str, StringConstraints(pattern=r"^([A-Za-z0-9*][A-Za-z0-9_.*-]*|<norm>|<attention>)$", max_length=200)
]
Weights = Annotated[str, StringConstraints(pattern=f"^{_WORD}[ =,A-Za-z0-9_.+-]*$", max_length=4000)]
Place = Annotated[str, Field(min_length=1)]  # an empty one would mean the current folder
Two = Field(min_length=2, max_length=2)
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Cases = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Voxels = Annotated[int, Field(ge=1, le=8192)]
Workers = Annotated[int, Field(ge=0, le=64)]
Side = Annotated[int, Field(ge=16, le=2048)]  # twice SAM's own
Patch = Annotated[list[Annotated[int, Field(ge=8, le=512)]], Field(min_length=3, max_length=3)]
SECOND = ("hierarchical", "h_sam")  # values of a strategy's decoder that put another one behind SAM's
Variant = Literal["vit_b", "vit_l", "vit_h", "vit_t", "medsam", "pico", "tiny", "tiny_t"]  # of SAM


def is_label(text: str) -> bool:
    """Whether a class can have this name."""
    constraints = Label.__metadata__[0]  # type: ignore[attr-defined]
    return len(text) <= constraints.max_length and re.search(constraints.pattern, text) is not None


class Model(BaseModel):
    """A closed object: no unknown keys, no guessing of types, no NaN."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ResNetSide(Model):
    """``samseg_monai.adapters.ResNetSide``: ResNet18 up to its third stage."""

    name: Literal["resnet"] = "resnet"
    width: Annotated[int, Field(ge=1, le=512)] = 64
    """Channels of the first stage; 64 is ResNet18."""


class _Way(Model):
    """How SAM learns; the class of the same name in ``samseg_monai.strategies`` takes the other fields."""

    @property
    def frozen_encoder(self) -> bool:
        """SAM's image encoder stays as it is and is needed, so that embeddings can be stored."""
        return False

    @property
    def second_decoder(self) -> bool:
        """There is a decoder behind SAM's, which takes no prompts."""
        return getattr(self, "decoder", None) in SECOND

    @model_validator(mode="before")
    @classmethod
    def _has_decoder(cls, given: Any) -> Any:
        if "decoder" in cls.model_fields or not isinstance(given, dict) or "decoder" not in given:
            return given
        why = "no decoder learns in zero-shot" if cls is ZeroShot else "a network without SAM has none"
        raise ValueError(f"decoder: got {given['decoder']!r:.80}, but {why}; leave it out")


class ZeroShot(_Way):
    """SAM as it is: nothing learns."""

    name: Literal["zero_shot"]
    random_masks: bool = False
    """Several classes: allow masks that nobody has trained, whose scores are those of noise."""

    @property
    def frozen_encoder(self) -> bool:
        return True


Target = Literal["q", "k", "v", "proj", "lin1", "lin2"]
Blocks = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=1, max_length=256)]
Last = Annotated[float, Field(gt=0, le=1)]
Decoder = bool | Literal["hierarchical"]


def _chosen_once(way: Any) -> Any:
    if way.blocks is not None and way.last is not None:
        raise ValueError(f"blocks {way.blocks} and last {way.last} choose the same thing; give one of them")
    return way


class LoRA(_Way):
    """Low-rank updates in SAM's image encoder (LoRA; with ``dora`` DoRA; with ``decoder`` "samed" SAMed)."""

    name: Literal["lora"]
    rank: Annotated[int, Field(ge=1, le=1024)] = Field(default=4, examples=[16])
    alpha: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Scaling is alpha / rank; null: rank."""
    targets: Annotated[list[Target], Field(min_length=1, max_length=6)] = ["q", "v"]
    blocks: Blocks | None = None
    """Encoder blocks that are adapted, from 0; null: all."""
    last: Last | None = None
    """In place of blocks: this fraction of those with attention, from the end."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rank_stabilised: bool = False
    decoder: bool | Literal["lora", "samed", "hierarchical", "h_sam"] = False
    """Train the mask decoder, too; "lora": only low-rank updates in q and v of its attention; "samed": the decoder and
    the prompt encoder's no_mask_embed; "hierarchical": those and a second decoder, without prompts; "h_sam": as in
    H-SAM's code, for its files."""
    dora: bool = False
    """Learn the length of each adapted row beside its direction."""
    _fit = model_validator(mode="after")(_chosen_once)


class Adapter(_Way):
    """Bottlenecks of two linear layers in SAM's image encoder (Houlsby, AdaptFormer, Medical SAM Adapter)."""

    name: Literal["adapter"]
    width: Annotated[int, Field(ge=1, le=4096)] = Field(default=64, examples=[64])
    """Width of the bottleneck."""
    place: Literal["serial", "parallel", "both"] = "serial"
    """Behind attention and MLP, beside the MLP, or behind the attention and beside the MLP."""
    scale: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Factor of what a bottleneck adds; of "both" that beside the MLP."""
    blocks: Blocks | None = None
    """Encoder blocks with adapters, from 0; null: all."""
    last: Last | None = None
    """In place of blocks: this fraction of those with attention, from the end."""
    decoder: Decoder = False
    """Train the mask decoder, too; "hierarchical": with a second one behind it, without prompts."""
    depth: Annotated[int, Field(ge=1, le=32)] = 1
    """Slices of a slab, in which each attends to its neighbours; 1: each is alone. More with "both" alone."""
    _fit = model_validator(mode="after")(_chosen_once)

    @model_validator(mode="after")
    def _deep(self) -> Adapter:
        if self.depth > 1 and self.place != "both":
            raise ValueError(f"depth {self.depth} is for place 'both', not {self.place!r}; use 1")
        return self


class SSF(_Way):
    """A scale and a shift behind every layer of SAM's image encoder (SSF)."""

    name: Literal["ssf"]
    decoder: Decoder = False
    """Train the mask decoder, too; "hierarchical": with a second one behind it, without prompts."""


class FacT(_Way):
    """Low-rank updates of common factors in SAM's image encoder (FacT-TT)."""

    name: Literal["fact"]
    rank: Annotated[int, Field(ge=1, le=1024)] = Field(default=16, examples=[16])
    scale: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Factor of the updates."""
    targets: Annotated[list[Target], Field(min_length=1, max_length=6)] = ["q", "k", "v", "proj"]
    blocks: Blocks | None = None
    """Encoder blocks that are adapted, from 0; null: all."""
    last: Last | None = None
    """In place of blocks: this fraction of those with attention, from the end."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    decoder: Decoder = False
    """Train the mask decoder, too; "hierarchical": with a second one behind it, without prompts."""
    _fit = model_validator(mode="after")(_chosen_once)


class Ladder(_Way):
    """A network beside SAM's frozen encoder (SAM-LST), with its ablations."""

    name: Literal["ladder"]
    side: ResNetSide | None = ResNetSide()
    """The network beside; null only with mix "sam"."""
    mix: Literal["gate", "side", "sam"] = "gate"
    decoder: Literal["upscaling", "masks", "full", "hierarchical"] = "masks"
    """What learns of the mask decoder; "hierarchical": all, with a second one behind it (not with mix "side")."""
    masks: Literal["random", "sam"] = "sam"

    @model_validator(mode="after")
    def _with_sam(self) -> Ladder:
        if self.decoder == "hierarchical" and self.mix == "side":
            raise ValueError("decoder 'hierarchical' goes on from SAM's embedding, which mix 'side' leaves out")
        return self

    @property
    def frozen_encoder(self) -> bool:
        return self.mix != "side"


class Selective(_Way):
    """Some of SAM's own tensors learn, named by patterns."""

    name: Literal["selective"]
    label: Name = "selective"
    """How tables call it: full, decoder, attention, norm, bias."""
    patterns: Annotated[list[Pattern], Field(min_length=1, max_length=100)] = Field(examples=[["sam.mask_decoder"]])
    frozen: Annotated[list[Pattern], Field(max_length=100)] = []
    decoder: Decoder = False
    """Train the mask decoder, too; "hierarchical": with a second one behind it, without prompts."""

    @property
    def frozen_encoder(self) -> bool:
        return all(pattern.startswith(("sam.mask_decoder", "sam.prompt_encoder")) for pattern in self.patterns)


class Scratch(_Way):
    """A network without SAM, trained as a whole from a random start."""

    name: Literal["scratch"]
    label: Name = "scratch"
    """How tables call it."""


Method = Annotated[ZeroShot | LoRA | Adapter | SSF | FacT | Ladder | Selective | Scratch, Field(discriminator="name")]


class AllSlices(Model):
    name: Literal["AllSlices"]


class MaxArea(Model):
    name: Literal["MaxArea"]


class EveryNth(Model):
    name: Literal["EveryNth"]
    n: Count


class Foreground(Model):
    name: Literal["Foreground"]
    min_voxels: Count = 1


class RandomN(Model):
    name: Literal["RandomN"]
    n: Count
    min_voxels: Annotated[int, Field(ge=0, le=1_000_000)] = 1


class Patches(Model):
    """Not slices, but patches of volumes, for three-dimensional networks."""

    name: Literal["Patches"]
    n: Count = 1
    """How many of each volume, other ones in every epoch."""


Picker = Annotated[AllSlices | MaxArea | EveryNth | Foreground | RandomN | Patches, Field(discriminator="name")]


class Prompt(Model):
    """Where boxes come from."""

    source: Literal["label", "json", "mask", "image", "none"] = "label"
    """Simulated from the label; of a file; a coarse mask; the whole slice; no prompts."""
    kind: Literal["box", "points", "both"] = "box"
    """A box, clicks (points), or a box with clicks; clicks are for SAM."""
    inside: Annotated[int, Field(ge=1, le=100)] = 1
    """Simulated clicks inside of an object: the first in its depth, the others anywhere."""
    outside: Annotated[int, Field(ge=0, le=100)] = 0
    """Simulated clicks near an object, outside of all."""
    loosen: Annotated[list[Annotated[float, Field(ge=0, le=10)]], Two] = [0.0, 0.0]
    """Least and largest outward shift of each side of a simulated box, as a fraction of the box."""
    tight: Fraction = 0.0
    """Fraction of simulated boxes that stay tight (2-D images)."""
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Shift of a simulated box, as a fraction of its side (2-D images)."""
    shrink: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Each side of every box is moved inward by this fraction (2-D images)."""
    seed: Seed = 0
    per_component: bool = False
    """A box for each connected component."""
    propagate: Annotated[int, Field(ge=0, le=8192)] = 0
    """Slices that what was found is carried to at most, each way, as the next slice's box; 0: none (volumes).
    Evaluation then draws one box, where the label is largest; training and its validations go on with all boxes."""
    carried_loosen: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Outward shift of each side of a carried box, as a fraction of the side."""
    carried_stop: Fraction = 0.1
    """A box is carried no further from a slice with less than this fraction of what the first one held."""
    carried_most: Annotated[float, Field(ge=1, le=1000)] = 1.5
    """A slice with more than this multiple of it is left empty, and a box carried no further: the mask has leaked."""
    mask_values: Annotated[list[Annotated[int, Field(ge=1, le=65535)]], Field(min_length=1, max_length=256)] | None = (
        None
    )
    """Values of a coarse mask that are prompts (volumes); null: all above 0."""


def misfits_of_clicks(prompt: Prompt, method: Any, *, sam: bool, stored: bool) -> Iterator[str]:
    """What cannot be had with clicks, of a strategy with this ``method``, and slices ``stored`` at a size of theirs."""
    key, kind = "run::prompt::kind", prompt.kind
    if kind == "box":
        return
    if not sam or method.name == "ladder":
        yield f"{key}: got {kind!r}, but {'a ladder' if sam else 'a network without SAM'} takes no clicks; use 'box'"
    if stored:
        yield f"{key}: got {kind!r}, but clicks cannot follow slices to a store_size; set run::store_size to null"
    if prompt.source not in ("label", "json"):
        yield f"{key}: got {kind!r}, but the source {prompt.source!r} gives no clicks; use 'label' or 'json', or 'box'"
    if "sam.prompt_encoder" not in getattr(method, "frozen", ["sam.prompt_encoder"]) and any(
        pattern == "sam" or pattern.startswith(("<", "*", "sam.prompt")) for pattern in method.patterns
    ):
        yield f"{key}: got {kind!r}, but SAM's prompt encoder is trained for boxes; freeze it (strategy::frozen)"


class Intensity(Model):
    """How the intensities of a volume are scaled; ``RunSettings.input_scale`` says which of the ways is used."""

    window: Annotated[list[Annotated[float, Field(ge=-1e6, le=1e6)]], Two] | None = None
    """Lowest and highest intensity (CT: in HU) that become 0 and 1; null: percentiles of each volume."""
    percentiles: Annotated[list[Annotated[float, Field(ge=0, le=100)]], Two] = [0.5, 99.5]
    """Without a window: the two percentiles of a volume that become 0 and 1."""
    nonzero: bool = False
    """Mean and standard deviation of z-scores over voxels that are not 0: for skull-stripped brains."""
    after_crop: bool = False
    """Scale what the crop leaves, not the whole volume."""

    @model_validator(mode="after")
    def _fit(self) -> Intensity:
        for name, pair in {"window": self.window, "percentiles": self.percentiles}.items():
            if pair is not None and not pair[0] < pair[1]:
                raise ValueError(f"{name} {pair}: the smaller number comes first")
        return self


Sides = Annotated[list[Annotated[float, Field(gt=0, le=1000)]], Two]


class Spacing(Model):
    """In-plane spacing of the training cases in mm, along the first and second axis."""

    median: Sides
    min: Sides
    max: Sides


class Schedule(Model):
    """Learning rate over the iterations."""

    warmup: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """Iterations of linear warm-up."""
    decay: Literal["poly", "cosine", "constant"] = "constant"
    power: Annotated[float, Field(gt=0, le=100)] = 0.9
    epochs: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Its length, where a run ends before it; null, or fewer than the run's epochs: as long as the run."""


class Loss(Model):
    """Weights of the terms of the loss, and MONAI's options of Dice."""

    dice: Weight = 0.5
    ce: Weight = 0.5
    focal: Weight = 0.0
    boundary: Weight = 0.0
    focal_gamma: Annotated[float, Field(ge=0, le=100)] = 2.0
    class_weights: dict[Label, Positive] | Weights | None = Field(default=None, examples=["liver=1,pancreas=3"])
    """Class -> weight, as an object or, for command lines, a text."""
    batch: bool = False
    squared_pred: bool = False
    smooth_nr: Annotated[float, Field(ge=0, le=1)] = 1e-5
    smooth_dr: Annotated[float, Field(ge=0, le=1)] = 1e-5


class LearningRates(Model):
    """Rates of parts of the network."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    scale: list[Annotated[list[Pattern | Positive], Two]] = Field(
        default=[], max_length=100, examples=[[["side.alpha", 10]]]
    )
    """Pairs of a part's name and a factor of its rate, such as ["side.alpha", 10]."""
    weight_decay_matrices_only: bool = False


class Optimizer(Model):
    """Optimiser of torch; its rate is ``lr``."""

    name: Literal["Adam", "AdamW", "SGD"] = "Adam"
    weight_decay: Annotated[float, Field(ge=0, le=10)] | None = None
    """null: the optimiser's own default."""


class SliceSettings(Model):
    """Which slices are learnt from, and how they are held."""

    picker: Picker = MaxArea(name="MaxArea")
    cache: Literal["memory", "disk"] = "memory"
    num_workers: Workers = 0
    volume_cache_rate: Fraction | None = None
    """Fraction of the validation cases of which what is looked at stays in memory; null: as many as fit in 1 GB."""


class ValidationSettings(Model):
    """What the validations of a training look at."""

    picker: Picker | None = None
    """Volumes: these slices alone choose the epoch, and whole volumes are validated once, at the end; null: all."""


class EmbeddingSettings(Model):
    """Stored outputs of a frozen encoder."""

    variants: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Augmented looks of each slice that are encoded once."""


class Compute(Model):
    """How the network computes: other times and memory, and results that differ by no more than rounding does."""

    int8: bool = False
    """Linear layers of SAM's image encoder with 8-bit numbers; prediction and evaluation on a CPU with VNNI only."""
    tf32: bool = False
    """Let GPUs round the inputs of float32 products to 10 bits (TF32), for the whole process."""
    compile: bool = False
    """Compile the blocks of SAM's image encoder when they are first called; needs a C++ compiler."""
    attention: Literal["auto", "plain"] = "auto"
    """auto: in the way that was measured to be fastest; plain: with a whole matrix of logits, for checks."""

    @model_validator(mode="after")
    def _fit(self) -> Compute:
        if self.int8 and self.compile:
            raise ValueError("int8 and compile: the compiler knows nothing of these 8-bit products; use one of the two")
        return self


class Lesions(Model):
    """Rules of BraTS 2023's lesion-wise scores."""

    dilation: Annotated[int, Field(ge=1, le=20)] = 1
    ignored_mm3: Annotated[float, Field(ge=0, le=1e6)] = 50.0
    penalty_mm: Annotated[float, Field(gt=0, le=1e5)] = 374.0
