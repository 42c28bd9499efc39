"""What a training costs, measured before it starts: with the parts of a bundle's config, so that every setting counts.

The trainer, its network, loss, optimiser, transforms, loader and stored embeddings are those of the training, and so is
the inferer of its validation; weights and slices are random. ``samseg train-cost`` and ``samseg bench`` put these
functions into the ``run`` of a bundle and run that in a process of its own, whose memory is then nobody else's. What
the first steps of a training itself take, ``handlers.CurveLog`` tells.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.transforms import Transform
from torch import Tensor, nn
from torch.utils.data import Dataset

from samseg_monai.faults import peak_memory
from samseg_monai.files import write_json
from samseg_monai.training.owned import count_trainable, owned_state

SAMPLE = 8  # cases of a section that are read to tell how many slices there are
QUICK = 5.0  # seconds of the processors below which a prediction is repeated, so that the first one does not count
SCALES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "zscore": lambda rng, shape: rng.normal(0, 1, shape),
    "unit": lambda rng, shape: rng.uniform(0, 1, shape),
    "sam": lambda rng, shape: rng.uniform(0, 255, shape),
}


@dataclass
class RandomVolume(Transform):
    """A volume of noise with a rectangle of each class in every slice, in place of what loads a case.

    Args:
        scans, classes: how many.
        size: height and width in pixels, or in mm of 1 mm pixels; a third side is the number of slices.
        depth: slices, where ``size`` does not tell.
        scale: as ``SamSegmenter`` calls it: zscore, unit or sam.
    Shape: {"case": name} to image (S, H, W, D), float32, and label (1, H, W, D), uint8, of 0 to ``classes``.
    """

    scans: int
    classes: int
    size: Sequence[float]
    depth: int
    scale: str = "zscore"

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        height, width = (max(2 * self.classes, round(side)) for side in self.size[:2])
        depth = int([*self.size, self.depth][2])
        rng = np.random.default_rng(zlib.crc32(str(data["case"]).encode()))
        image = SCALES[self.scale](rng, (self.scans, height, width, depth)).astype(np.float32)
        label = np.zeros((1, height, width, depth), np.uint8)
        edges = np.linspace(width // 8, width - width // 8, self.classes + 1).round().astype(int)
        for number, (left, right) in enumerate(itertools.pairwise(edges), start=1):
            label[:, height // 4 : height - height // 4, left:right] = number
        return {**data, "image": torch.from_numpy(image), "label": torch.from_numpy(label)}


@dataclass
class Repeated(Dataset):
    """Items of ``dataset`` again and again, ``length`` of them: batches of any size out of a few slices."""

    dataset: Any
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.dataset[range(self.length)[index] % len(self.dataset)]


def spread(items: Sequence[Any], count: int = SAMPLE) -> list[Any]:
    """At most ``count`` of ``items``, from the first to the last at equal distances."""
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round()]


class Clock:
    """Seconds by the wall's clock, and of this process on all its processors."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.readings: list[tuple[float, float]] = []

    def read(self, *_: Any) -> None:
        """Note the time, of a GPU when it has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.readings.append((time.perf_counter(), time.process_time()))

    def medians(self, name: str, *, skip: int = 0, of: int = 1) -> dict[str, float]:
        """Medians between two readings without the first ``skip``, for one of ``of`` things done in between."""
        pairs = list(itertools.pairwise(self.readings))[skip:]
        wall, own = (statistics.median(after[i] - before[i] for before, after in pairs) / of for i in (0, 1))
        return {f"seconds_per_{name}": wall, f"processor_seconds_per_{name}": own}


def measure(
    network: nn.Module,
    inferer: Any,
    volume: RandomVolume,
    *,
    device: torch.device | str,
    report: str,
    facts: Mapping[str, Any],
    trainer: Any = None,
    dataset: Any = None,
    averaging: Any = None,
) -> dict[str, Any]:
    """Take a few steps of a training and predict a few slices, and write what that costs to ``report``, a JSON file.

    Args:
        network: as it is built, on ``device``; ``owned`` names what learns.
        inferer: called with a volume (1, S, H, W, D), the network and, where it is prompted, the prompt.
        volume: what is predicted.
        facts: JSON values that are written, too.
        trainer: a MONAI ``SupervisedTrainer`` whose one epoch has as many steps as are wanted and one more; None where
            nothing is trained.
        dataset: the ``SliceDataset`` behind its loader; stored embeddings are computed.
        averaging: an ``EMA`` or None.

    Returns: what was written: seconds per step (a batch: forward, loss, backward, optimiser), per predicted slice and,
        where embeddings are stored, per encoded slice, by the wall's clock and of the processors; ``peak_gb``, the
        largest memory of this process, and on a GPU ``gpu_gb``, the largest that PyTorch had there, both in 10^9 bytes;
        what is learnt as number of values and as ``mb_learned``, in 10^6 bytes.
    """
    device = torch.device(device)
    found: dict[str, Any] = {**facts, "device": _name(device), "threads": torch.get_num_threads()}
    if trainer is not None:
        found |= _trained(trainer, dataset, averaging, network, device)
    found |= _predicted(network, inferer, volume, device)
    owned = owned_state(network, network.owned)  # type: ignore[arg-type]
    found["peak_gb"] = peak_memory() / 1e9
    if device.type == "cuda":
        found["gpu_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    found["values"] = sum(parameter.numel() for parameter in network.parameters())
    found["values_learned"] = count_trainable(network)
    found["mb_learned"] = sum(tensor.nbytes for tensor in owned.values()) / 1e6
    write_json(report, found)
    return found


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _trained(trainer: Any, dataset: Any, averaging: Any, network: nn.Module, device: torch.device) -> dict[str, float]:
    """Seconds of a step, the first left out, and of an encoded slice where embeddings are stored."""
    found: dict[str, float] = {}
    encoding, clock = Clock(device), Clock(device)
    encoding.read()
    count = dataset.fill(network, device=device, progress=False)
    encoding.read()
    if count:
        found |= encoding.medians("encoded_slice", of=count)
    if averaging is not None:
        averaging.attach(trainer)
    trainer.add_event_handler(Events.EPOCH_STARTED, clock.read)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, clock.read)
    trainer.run()
    return found | clock.medians("step", skip=1)


def _predicted(network: nn.Module, inferer: Any, volume: RandomVolume, device: torch.device) -> dict[str, float]:
    """Seconds of a slice; a second prediction counts where the first one was quick, or has stored embeddings."""
    drawn = volume({"case": "predicted"})
    image: Tensor = drawn["image"][None].to(device)
    prompted = getattr(inferer, "prompted", False)  # MONAI's for patches is not, and stores nothing
    prompt = {"prompt": (drawn["label"][None] > 0).to(device, torch.float32)} if prompted else {}
    clock = Clock(device)
    network.eval()
    with torch.no_grad():
        clock.read()
        inferer(image, network, **prompt)
        clock.read()
        if getattr(inferer, "embedding_dir", None) is not None or clock.readings[1][1] - clock.readings[0][1] < QUICK:
            inferer(image, network, **prompt)
            clock.read()
    return clock.medians("slice", skip=len(clock.readings) - 2, of=image.shape[-1])


def count_slices(
    training: Callable[[], Any],
    training_cases: int,
    validation: Callable[[], Any] | None,
    validation_cases: int,
    *,
    prompted: bool,
    report: str,
) -> dict[str, Any]:
    """How much there is to do in the cases of a datalist, told by a few of them; written to ``report``, a JSON file.

    Args:
        training: makes a ``SliceDataset`` of some training cases, without transforms of slices.
        training_cases, validation_cases: how many there are in all.
        validation: makes a dataset of some validation cases, {"image": (S, H, W, D), "prompt": (N, H, W, D), or with
            clicks "boxes" (D, N, 4 + 3 P), "slices": (D,), True for those that are validated}; all but the image may be
            absent.
        prompted: slices without a prompt are not predicted.

    Returns: what was written: ``training`` and ``validation`` with ``cases``, ``sample`` (how many were read),
        ``slices`` per case and ``seconds_per_case`` to read one; of validation ``whole``, slices per case where none
        are picked; ``size``, height and width of a slice in pixels, and ``slice_mb``, what one takes in memory, in
        10^6 bytes. A three-dimensional network has patches for training slices, and ``size`` all sides of a volume.
    """
    began = time.perf_counter()
    dataset = training()
    seconds = time.perf_counter() - began
    looked = [dataset[index] for index in spread(range(len(dataset)))]  # slices, or slabs of them, or volumes
    sizes = [(item[0] if isinstance(item, list) else item)["image"].shape[1:] for item in looked]
    found: dict[str, Any] = {
        "size": [int(statistics.median(side)) for side in zip(*sizes, strict=True)],
        "slice_mb": dataset.cache_bytes() / len(dataset) / 1e6,
        "training": _told(training_cases, len(dataset.data), len(dataset), seconds),
    }
    if validation is not None:
        items, slices, whole, began = validation(), 0, 0, time.perf_counter()
        for index in range(len(items)):
            volume = items[index]
            asked = torch.ones(volume["image"].shape[-1], dtype=torch.bool)
            if prompted and "prompt" in volume:
                asked &= (volume["prompt"] > 0).flatten(0, -2).any(0)
            elif prompted and getattr(volume.get("boxes"), "ndim", 2) == 3:  # with clicks
                asked &= (~volume["boxes"].isnan()).flatten(1).any(1)
            whole += int(asked.sum())
            slices += int((asked & volume["slices"]).sum()) if "slices" in volume else int(asked.sum())
        found["validation"] = _told(validation_cases, len(items), slices, time.perf_counter() - began)
        found["validation"]["whole"] = whole / len(items)
    write_json(report, found)
    return found


def _told(cases: int, sample: int, slices: int, seconds: float) -> dict[str, Any]:
    return {"cases": cases, "sample": sample, "slices": slices / sample, "seconds_per_case": seconds / sample}


def whole_training(cost: Mapping[str, Any], data: Mapping[str, Any], within: float | None = None) -> dict[str, Any]:
    """Minutes of an epoch, of a validation and of the whole training; ``epochs_within`` so many minutes, if asked for.

    Args:
        cost: what ``measure`` tells, by which ``data``, what ``count_slices`` tells, is multiplied.
    """
    training, validation = data["training"], data["validation"] if cost["val_interval"] else None
    slices = training["cases"] * training["slices"]
    steps = cost.get("steps_per_epoch") or math.ceil(slices / cost["batch_size"])
    minutes = {
        "epoch": steps * cost["seconds_per_step"] / 60,
        "reading": training["cases"] * training["seconds_per_case"] / 60,
    }
    predicted = validation["cases"] * validation["slices"] if validation else 0.0
    if cost.get("stored"):  # of each look at a training slice; the first validation makes those of its slices
        looks = slices * cost["variants"] + predicted
        minutes["embeddings"] = looks * cost["seconds_per_encoded_slice"] / 60
    validations = 0
    if validation is not None:
        reading = validation["cases"] * validation["seconds_per_case"]
        minutes["validation"] = (reading + predicted * cost["seconds_per_slice"]) / 60
        validations = cost["epochs"] // min(cost["val_interval"], cost["epochs"])
        if validation["whole"] > validation["slices"]:  # some are picked: whole volumes are validated at the end
            unpicked = validation["cases"] * validation["whole"]
            minutes["last validation"] = (reading + unpicked * cost["seconds_per_slice"]) / 60
    once = sum(minutes.get(part, 0.0) for part in ("last validation", "reading", "embeddings"))
    whole = cost["epochs"] * minutes["epoch"] + validations * minutes.get("validation", 0.0) + once
    an_epoch = minutes["epoch"] + minutes.get("validation", 0.0) / (cost["val_interval"] or 1)
    found = {"slices": round(slices), "steps_per_epoch": steps, "validations": validations}
    found |= {"minutes": {**minutes, "whole": whole}, "slices_gb": slices * data["slice_mb"] / 1000}
    return found if within is None else {**found, "epochs_within": max(0, int((within - once) / an_epoch))}


def duration(minutes: float) -> str:
    """Minutes for a person: ``12 s``, ``3.4 min``, ``5 h 05 min``, ``3 days 4 h``."""
    if minutes < 1.5:
        return f"{60 * minutes:.2g} s" if minutes < 1 / 6 else f"{60 * minutes:.0f} s"
    if minutes < 90:
        return f"{minutes:.3g} min"
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest:02} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"
