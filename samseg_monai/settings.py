"""What makes one bundle differ from another, as typed values: task, strategy, run. No code, no path, no address.

``BundleSettings`` is ``configs/settings.json`` of a bundle; ``bundles.write_bundle`` makes its other files from it. A
settings file may come from anywhere, and MONAI evaluates what it finds in a config. So no string begins with ``$``,
``@`` or ``%`` or holds control characters, classes are named from closed lists and never by a dotted path, and nothing
says where files lie: those are the receiver's ``Places``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, create_model, model_validator

from samseg_monai.choices import (
    IGNORE_NAMES,
    Cases,
    Compute,
    Count,
    EmbeddingSettings,
    Intensity,
    Label,
    Ladder,
    LearningRates,
    Lesions,
    Loss,
    Method,
    Model,
    Name,
    Optimizer,
    Patch,
    Patches,
    Place,
    Prompt,
    Schedule,
    Seed,
    Side,
    SliceSettings,
    Spacing,
    Text,
    Two,
    ValidationSettings,
    Variant,
    Voxels,
    Workers,
    misfits_of_clicks,
)
from samseg_monai.errors import ConfigError, raise_all
from samseg_monai.network_choices import Network
from samseg_monai.refusals import TOO_MUCH, told, unsafe

NOTHING = "$None"  # null in an override: MONAI passes over one that is None itself


class TaskSettings(Model):
    """What is to be learnt, from which data."""

    name: Name
    """Name of the task, the first part of the bundle's name."""
    kind: Literal["volumes", "images"] = "volumes"
    """Volumes (NIfTI, MHA, NRRD, DICOM) or 2-D images (PNG, JPEG, TIFF)."""
    dataset: Name
    """Short name of the data set; the default ``dataset_dir`` is ``data/<dataset>``."""
    scans: Annotated[list[Name], Field(min_length=1, max_length=16)] = Field(examples=[["t1n", "t1c"]])
    """Names of the scans of a case in the order of the network's channels; a single file is ``["image"]``."""
    channels: Annotated[list[Label], Field(min_length=1, max_length=16)] | None = None
    """What the scans show, for the metadata (``["ct"]``); null: their names."""
    classes: Annotated[list[Label], Field(min_length=1, max_length=253)] = Field(examples=[["tumour"]])
    """Names of the classes without the background, in the order of the labels 1, 2, ... of predictions."""
    labels: Literal["named", "foreground"] = "named"
    """Label files: values named in the datalist, or everything above 0 is the one class."""
    modality: Name = Field(examples=["MR"])
    """Modality as DICOM abbreviates it: MR, CT, US, XC ..."""
    orientation: Annotated[str, StringConstraints(pattern="^[RLAPIS]{3}$")] | None = "RAS"
    """Axes of the volume (MONAI's axcodes); the last one is cut into slices. null for 2-D images."""
    intensity: Intensity = Intensity()
    label_values: dict[Annotated[str, StringConstraints(pattern="^-?[0-9]{1,9}$")], Label] | None = None
    """2-D images: value -> name of the label files, which predictions have, too; known once a run is packed."""
    trained_spacing: Spacing | None = None
    """Volumes: in-plane spacing of the training cases; known once a run is packed."""
    mirrored_classes: list[Annotated[list[Label], Two]] | None = None
    """Pairs of classes that change places in a mirror, for ``augmentation`` strong; ``[]``: none does."""
    title: Text = Field(examples=["Liver on abdominal CT"])
    text: Text
    """A few sentences on what is segmented; they have to name every class. Prompts and channels are added."""
    data_text: Text
    """Which data set, its layout, where to get it."""
    data_source: Text
    data_license: Annotated[list[Text], Field(min_length=1, max_length=20)]
    """Paragraphs of docs/data_license.txt."""
    references: Annotated[list[Text], Field(max_length=50)] = []
    prepare: Annotated[list[Text], Field(max_length=10)] = []
    """Command lines that write the datalist."""
    phantoms: Annotated[list[Text], Field(max_length=10)] = []
    """Command lines that draw phantoms for the demo, if there are any for this task."""


class StrategySettings(Model):
    """How it is learnt."""

    name: Name
    """Name of the strategy, the last part of the bundle's name."""
    method: Method
    network: Network | None = None
    """A network without SAM, with the method scratch; null: SAM."""
    title: Text
    text: Annotated[list[Text], Field(min_length=1, max_length=10)]
    """Paragraphs for the README; the values of the run are added."""
    description: Text
    """One sentence for the metadata."""
    references: Annotated[list[Text], Field(max_length=50)] = []

    @model_validator(mode="after")
    def _fit(self) -> StrategySettings:
        if (self.network is None) == (self.method.name == "scratch"):
            raise ValueError("method 'scratch' needs a network, and every other method is SAM's: leave network out")
        if isinstance(self.method, Ladder) and (self.method.side is None) != (self.method.mix == "sam"):
            raise ValueError("side is null with mix 'sam', and a network with every other mix")
        return self


class RunSettings(Model):
    """Everything that a run may set otherwise; each name is a key of the bundle's configs."""

    sam_variant: Variant | None = "vit_b"
    """Which SAM; null for networks without SAM."""
    image_size: Side = Field(default=1024, examples=[512])
    """Longest side in pixels that the network sees; for SAM a multiple of 16."""
    patch: Patch = [96, 96, 96]
    """Sides in voxels of what a three-dimensional network sees at once, along the axes of ``orientation``."""
    crop_mm: Annotated[list[Annotated[float, Field(gt=0, le=10_000)]], Two] | None = Field(
        default=None, examples=[[138.0, 202.0]]
    )
    """Crop of each slice in mm, first and second axis: in the middle, or where it cuts no prompt; null: none."""
    crop_size: Annotated[list[Voxels], Two] | None = Field(default=None, examples=[[138, 202]])
    """The crop in voxels of the spacing that was trained on, in place of ``crop_mm``; null: ``crop_mm`` counts."""
    resample: bool = True
    """Cases of another in-plane spacing than the trained (beyond its range by more than 5 %) are resampled to it."""
    batch_size: Cases = Field(default=1, examples=[4])
    seed: Seed = 0
    rectangular: bool = False
    """Pad slices to whole patches instead of to the square."""
    stretch: bool = False
    """Stretch slices to the square instead of padding them (MedSAM); boxes and predictions follow."""
    checkpointing: bool = False
    """Recompute activations instead of keeping them: less memory, more time."""
    autocast: Literal["bf16", "bf16_all"] | None = None
    compute: Compute = Compute()
    low_res_training: bool | Literal["corners"] = False
    """Compare the decoder's own logits with the label, one per 4 x 4 pixels (without prompts only); "corners": with the
    pixels of it that SAMed's and SAM-LST's code takes."""
    masks: Literal["single", "best"] = "single"
    """SAM's single mask, or the best rated of its three."""
    store_size: Annotated[int, Field(ge=16, le=1024)] | None = None
    """Side in pixels that slices are stored at before they are enlarged; null: none."""
    scan_mode: Literal["mean_logits", "mean_probabilities", "majority", "union", "channels", "neighbours"] = (
        "mean_logits"
    )
    """Each scan through SAM as grey image, and how they are put together; three scans as the colour channels; or each
    slice of one scan between its neighbours as these."""
    input_scale: Literal["zscore", "unit", "slice", "sam"] = "zscore"
    """Intensities as z-scores, from 0 to 1, the same in each slice by itself, or from 0 to 255 with SAM's own
    normalisation."""
    min_component_mm3: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Predicted components of a smaller volume are removed; null: none."""
    prompt: Prompt = Prompt()
    embeddings: EmbeddingSettings = EmbeddingSettings()
    epochs: Annotated[int, Field(ge=1, le=100_000)] = Field(default=50, examples=[20])
    lr: Annotated[float, Field(gt=0, le=100)] = Field(default=1e-4, examples=[0.001])
    """Learning rate."""
    steps_per_epoch: Count | None = Field(default=None, examples=[100])
    """Batches of an epoch, whatever the number of slices is: all of them in an order drawn anew, again and again, cut
    into epochs; null: an epoch is one pass over all slices."""
    training_cases: Count | None = Field(default=None, examples=[10])
    """Train on so many cases, the first of an order that the seed draws: 1 is among 5, 5 are among 10; null: all."""
    val_interval: Annotated[int, Field(ge=0, le=100_000)] = 2
    """Epochs between validations; 0: none, the last epoch is kept."""
    keep_last: bool = False
    """Keep the last epoch beside the best."""
    val_batch_size: Cases = 4
    early_stop: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Stop after so many validations without a better score."""
    accumulation_steps: Cases = 1
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Largest L2 norm of a step's gradient."""
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the average of the weights; null: no average."""
    augmentation: Name = "none"
    """Name of a list of random transforms: none, light, strong, published (samed, h_sam and ladder_paper only)."""
    learning_rates: LearningRates = LearningRates()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    loss: Loss = Loss()
    slices: SliceSettings = SliceSettings()
    validation: ValidationSettings = ValidationSettings()
    section: Literal["testing", "validation", "training"] = "testing"
    """Section of the datalist that is evaluated."""
    allow_seen: bool = False
    """Evaluate cases, too, that the network was trained on or, outside of section validation, that chose its epoch; run
    card and table say so."""
    policy: Literal["honest", "transunet"] = "honest"
    """What counts where a class is empty."""
    regions: Literal["brats"] | dict[Label, Annotated[list[Label], Field(min_length=1)]] | None = None
    """Unions of classes that are scored: WT, TC, ET of BraTS, or name -> classes."""
    lesion_wise: bool = False
    lesions: Lesions = Lesions()
    calibration: bool = False
    """Score the probability of the foreground, too: ECE and Brier score around reference and prediction."""
    save_predictions: bool = False
    num_workers: Workers = 0


class Places(BaseModel):
    """Where a run's files lie: the receiver's business, never part of a bundle's settings."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
    dataset_dir: Place
    """Folder of the data."""
    output_dir: Place
    """Folder of the run."""
    datalist: Place | None = None
    sam_checkpoint: Place | None = None
    """File of SAM's weights, or "random"; null: looked up by name."""
    checkpoint: Place | None = None
    results_dir: Place | None = None
    predictions_dir: Place | None = None
    boxes: Place | None = None
    prompts: Place | None = None
    prompt_boxes: Place | None = Field(default=None, alias="prompt::boxes")
    slices_cache_dir: Place | None = Field(default=None, alias="slices::cache_dir")
    embeddings_cache_dir: Place | None = Field(default=None, alias="embeddings::cache_dir")
    side_weights: Place | None = Field(default=None, alias="strategy::side_weights")
    """File of the side network's weights, or "random"; null: the published ones."""
    mlflow_uri: Place | None = Field(default=None, alias="mlflow::uri")
    mlflow_experiment: Place | None = Field(default=None, alias="mlflow::experiment")


PLACES = tuple(field.alias or name for name, field in Places.model_fields.items())


class _Patch(Model):
    # its keys bring their descriptions along: looking for them in the source takes seconds where much is imported
    model_config = ConfigDict(use_attribute_docstrings=False)


def _patch(model: type[BaseModel], *without: str) -> type[BaseModel]:
    """The same model with every key optional, groups of keys included: what a recipe's part may set."""
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if name in without:
            continue
        kind = field.annotation
        group = isinstance(kind, type) and issubclass(kind, BaseModel)
        fields[name] = (_patch(kind) if group else Annotated[field.rebuild_annotation(), field], None)  # type: ignore[arg-type]
    return create_model(f"{model.__name__}Patch", __base__=_Patch, __doc__=model.__doc__, **fields)


RunPatch = _patch(RunSettings, "optimizer")  # a component of train.json, which no overlay of inference.json can reach


class DemoSettings(Model):
    """What the demo sets otherwise, so that it runs in minutes on two cores."""

    run: RunPatch = RunPatch()  # type: ignore[valid-type]
    method: dict[Name, bool | int | Name] = {}
    """Arguments of the strategy's method, such as ``{"rank": 8}``."""
    network: dict[Name, bool | int | Name | list[int]] = {}
    """Arguments of the network without SAM, such as ``{"channels": [16, 32, 64, 128]}``."""


class BundleSettings(Model):
    """``configs/settings.json``: all that a bundle is made from."""

    format: Literal[1] = 1
    engine: Name
    """Version of samseg-monai whose templates made the configs."""
    name: Name = Field(examples=["meningioma_segmentation_lora"])
    task: TaskSettings
    strategy: StrategySettings
    run: RunSettings
    demo: DemoSettings | None = None
    """null: there is no demo.json."""

    @model_validator(mode="after")
    def _fit(self) -> BundleSettings:
        problems = [*_misfits(self)]
        if not problems and self.demo is not None:
            problems = [f"demo: {problem}" for problem in _demo_problems(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def has_sam(self) -> bool:
        """SAM is part of the network."""
        return self.strategy.network is None

    @property
    def trains(self) -> bool:
        """There is something to learn, and so a train.json."""
        return self.strategy.method.name != "zero_shot"

    @property
    def takes_boxes(self) -> bool:
        """The network can be given boxes."""
        net = self.strategy.network
        if net is not None:
            return getattr(net, "boxes", "given") != "none"
        return not self.run.low_res_training and not self.strategy.method.second_decoder

    @property
    def sees_volumes(self) -> bool:
        """The network is three-dimensional, and there are no slices."""
        return getattr(self.strategy.network, "spatial_dims", 2) == 3

    @property
    def frozen_encoder(self) -> bool:
        """SAM's image encoder stays as it is, so that embeddings can be stored."""
        return self.strategy.method.frozen_encoder


def _misfits(settings: BundleSettings) -> Iterator[str]:
    """Values that are each right and do not go together."""
    task, strategy, run = settings.task, settings.strategy, settings.run
    several = len(task.classes) > 1
    for key, names in {"task::classes": task.classes, "task::scans": task.scans}.items():
        if len(set(names)) < len(names):
            yield f"{key}: names given twice: {', '.join(sorted({name for name in names if names.count(name) > 1}))}"
    for name in sorted({"background", *IGNORE_NAMES} & set(task.classes)):
        yield f"task::classes: the {name} is not one of them; leave it out"
    if task.channels is not None and len(task.channels) != len(task.scans):
        yield f"task::channels: {len(task.channels)} names for {len(task.scans)} scans; give one each, or null"
    if missing := [name for name in task.classes if not _mentions(f"{task.title} {task.text}", name)]:
        yield f"task::text: it does not name {', '.join(missing)}; the text has to be about the task's classes"
    if task.labels == "foreground" and several:
        yield f"task::labels: 'foreground' makes one class of all labels; for {len(task.classes)} use 'named'"
    if (task.orientation is None) != (task.kind == "images"):
        yield "task::orientation: volumes need one, such as 'RAS'; 2-D images have none (null)"
    if task.orientation and len({axis // 2 for axis in map("RLAPIS".index, task.orientation)}) < 3:
        yield f"task::orientation: got {task.orientation!r}; one letter of R and L, one of A and P, one of I and S"
    if strange := {name for pair in task.mirrored_classes or () for name in pair} - set(task.classes):
        yield f"task::mirrored_classes: {', '.join(sorted(strange))}: not among the classes"
    if settings.has_sam == (run.sam_variant is None):
        yield "run::sam_variant: null is for networks without SAM, and only for them"
    if settings.has_sam and run.image_size % 16:
        yield f"run::image_size: got {run.image_size}; SAM needs a multiple of 16, such as 512"
    if run.scan_mode == "channels" and len(task.scans) != 3:
        yield f"run::scan_mode: 'channels' needs three scans, there are {len(task.scans)}; use 'mean_logits'"
    if run.scan_mode == "neighbours" and (task.kind == "images" or len(task.scans) > 1 or not settings.has_sam):
        found = "a 2-D image has none" if task.kind == "images" else f"there are {len(task.scans)} scans"
        found = found if settings.has_sam else "this network has no SAM"
        yield f"run::scan_mode: 'neighbours' is for slices of one scan as SAM's channels; {found}; use 'mean_logits'"
    if run.masks == "best" and (several or strategy.method.second_decoder):
        yield f"run::masks: 'best' is for one class (got {len(task.classes)}) and SAM's decoder alone; use 'single'"
    if run.stretch and (run.store_size is not None or not settings.has_sam):
        yield "run::stretch: for SAM, and without store_size, which keeps the sides as they are; use false"
    if run.input_scale == "slice" and not settings.has_sam:
        yield "run::input_scale: 'slice' is what SAM's network makes of each slice; use 'unit'"
    if run.prompt.source != "none" and not settings.takes_boxes:
        yield f"run::prompt::source: got {run.prompt.source!r}, but this network takes no boxes; use 'none'"
    if run.prompt.propagate and (run.prompt.source in ("none", "image") or task.kind == "images"):
        yield "run::prompt::propagate: boxes around objects are carried, in whole volumes; set it to 0"
    if run.prompt.source == "mask" and task.kind == "images":
        yield "run::prompt::source: 'mask' is for volumes; 2-D images take label, json, image or none"
    if run.validation.picker is not None and task.kind == "images":
        yield "run::validation::picker: a 2-D image is one slice, and all are validated; use null"
    if getattr(strategy.method, "depth", 1) > 1 and task.kind == "images":
        yield "strategy::method::depth: a 2-D image has no neighbours to attend to; use 1"
    if getattr(strategy.method, "depth", 1) > 1 and run.prompt.propagate:
        yield "run::prompt::propagate: boxes are carried slice by slice; set it to 0, or depth to 1"
    if run.prompt.loosen[0] > run.prompt.loosen[1]:
        yield f"run::prompt::loosen: got {run.prompt.loosen}; the smaller number comes first"
    if strategy.network is not None and strategy.network.name == "BoxEllipse" and several:
        yield f"strategy::network: the ellipse is for one class, there are {len(task.classes)}"
    yield from misfits_of_clicks(run.prompt, strategy.method, sam=settings.has_sam, stored=run.store_size is not None)
    yield from _network_misfits(strategy.network, len(task.scans), run)
    yield from _misfits_of_volumes(settings)
    if not (run.loss.dice or run.loss.ce or run.loss.focal):
        yield "run::loss: give dice, ce or focal a weight above 0"


def _network_misfits(net: Network | None, scans: int, run: RunSettings) -> Iterator[str]:
    """Sizes and channels that MONAI's network would refuse when it is built or first called."""
    if net is None or net.name == "BoxEllipse":
        return
    if net.name == "UNETR" and net.hidden_size % net.num_heads:
        yield f"strategy::network::num_heads: got {net.num_heads}, which does not divide hidden_size {net.hidden_size}"
    crop, volumes = net.boxes == "crop", net.spatial_dims == 3
    key = "run::patch" if volumes else "strategy::network::crop_size" if crop else "run::image_size"
    seen: Any = run.patch if volumes else net.crop_size if crop else run.image_size
    if needs := net.needs(seen if volumes else [seen, seen]):
        yield f"{key}: got {seen}; this {net.name} needs {needs}"
    inputs = scans + (net.boxes == "channel")
    if net.name == "VNet" and 16 % inputs:
        yield f"strategy::network: VNet takes 1, 2, 4, 8 or 16 channels; scans and the channel of boxes make {inputs}"


def _misfits_of_volumes(settings: BundleSettings) -> Iterator[str]:
    """What goes with slices alone, or with volumes alone."""
    net, run = settings.strategy.network, settings.run
    pickers = {"run::slices::picker": run.slices.picker, "run::validation::picker": run.validation.picker}
    if not settings.sees_volumes:
        for key, picker in pickers.items():
            if isinstance(picker, Patches):
                yield f"{key}: got 'Patches', which is for three-dimensional networks; this one sees slices"
        return
    if settings.task.kind == "images":
        yield "strategy::network::spatial_dims: got 3, but 2-D images are single slices; use 2"
    if (boxes := getattr(net, "boxes", "none")) != "none":
        yield f"strategy::network::boxes: got {boxes!r}, but a three-dimensional network takes no boxes; use 'none'"
    if not isinstance(run.slices.picker, Patches):
        got = run.slices.picker.name
        yield f"run::slices::picker: got {got!r}, but a three-dimensional network learns from 'Patches'"
    if run.validation.picker is not None:
        yield "run::validation::picker: a three-dimensional network is validated on whole volumes; use null"
    if run.store_size is not None:
        yield f"run::store_size: got {run.store_size}, but a three-dimensional network sees no slices; use null"
    if run.augmentation == "published":
        yield "run::augmentation: 'published' turns slices; a three-dimensional network takes none, light or strong"


def _mentions(text: str, name: str) -> bool:
    return all(word in text.lower() for word in name.lower().replace("_", " ").split())


def _demo_problems(settings: BundleSettings) -> list[str]:
    try:
        demonstrated(settings)
    except ValidationError as error:
        return told(error, BundleSettings)
    return []


def demonstrated(settings: BundleSettings) -> BundleSettings:
    """The settings as the demo changes them."""
    demo = settings.demo or DemoSettings()
    strategy: dict[str, Any] = {"method": demo.method, "network": demo.network or None}
    changes = {
        "run": demo.model_dump(exclude_unset=True).get("run", {}),
        "strategy": {k: v for k, v in strategy.items() if v},
    }
    return BundleSettings.model_validate(merged({**dump_settings(settings), "demo": None}, changes))


def merged(value: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` with ``changes`` put in, group by group; a choice by ``name`` with another name is replaced whole."""
    result = dict(value)
    for key, new in changes.items():
        old = result.get(key)
        group = (
            isinstance(old, Mapping)
            and isinstance(new, Mapping)
            and new.get("name", old.get("name")) == old.get("name")
        )
        result[key] = merged(old, new) if group else new  # type: ignore[arg-type]
    return result


def read_settings(value: Any, what: str) -> BundleSettings:
    """Check settings that may come from anywhere.

    Args:
        value: parsed JSON.
        what: where it is from, for the message.

    Raises:
        ConfigError: everything that is wrong, each with where, what was got and what is possible.
    """
    raise_all(problems_of(value, BundleSettings), ConfigError, f"{what}: not the settings of a bundle")
    return BundleSettings.model_validate(value)


def dump_settings(settings: BundleSettings) -> dict[str, Any]:
    """The settings as JSON values, every default written out: the same settings give the same bytes."""
    demo = settings.demo and settings.demo.model_dump(mode="json", exclude_unset=True)
    return {**settings.model_dump(mode="json", exclude={"demo"}), "demo": demo}


def json_schema() -> dict[str, Any]:
    """JSON Schema of settings.json, for editors."""
    return BundleSettings.model_json_schema()


def problems_of(value: Any, model: type[BaseModel], where: str = "") -> list[str]:
    """One line for each value that ``model`` refuses; empty for none.

    Args:
        value: JSON values, safe or not.
        model: ``RunSettings``, ``Places`` ...
        where: id of ``value``, put before what is named.
    """
    found = [] if model is Places else unsafe(value)
    if not found or (isinstance(value, dict) and not any(line.startswith(TOO_MUCH) for line in found)):
        named = {line.partition(": ")[0] for line in found}
        try:
            model.model_validate(value)
        except ValidationError as error:
            found += [line for line in told(error, model) if line.partition(": ")[0] not in named]
    return [f"{where}::{line}" if where else line for line in found]
