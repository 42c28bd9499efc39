"""How often a step or a predicted batch makes a GPU wait, counted without one: a law, not a time.

Every tensor counts as one of the device, until something brings it to the CPU, or makes it of such or of numbers alone.
"""

from __future__ import annotations

import traceback
from contextlib import contextmanager

import pytest
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.engines.utils import PrepareBatchExtraInput
from monai.transforms import Resized
from torch.overrides import TorchFunctionMode

from samseg_monai.handlers import EMA, CurveLog, GradientClip, GradientFlow, NonFiniteGuard, ValidationLoss
from samseg_monai.inferers import SliceVolumeInferer
from samseg_monai.networks import SamSegmenter
from samseg_monai.strategies import LoRA
from samseg_monai.training import OnLogitGrid, SegmentationLoss

TO_PYTHON = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__contains__", "is_nonzero"}
ASKING = {*TO_PYTHON, "cpu", "numpy", "nonzero", "argwhere", "masked_select", "equal", "allclose", "unique"}
FACTORIES = {"tensor", "zeros", "ones", "full", "empty", "arange", "eye", "from_numpy", "as_tensor"}
INDEXING = {"__getitem__", "__setitem__"}


class Waits(TorchFunctionMode):
    """Lists the places where Python asks a tensor of the device."""

    def __init__(self):
        super().__init__()
        self.places: list[str] = []
        self.host: dict[int, torch.Tensor] = {}  # by address, and kept alive, so that none is given twice

    def on_host(self, tensor):
        return not tensor.numel() or tensor.untyped_storage().data_ptr() in self.host

    def bring(self, *tensors):
        for tensor in tensors:
            self.host[tensor.untyped_storage().data_ptr()] = tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, given = getattr(func, "__name__", ""), list(_tensors((args, kwargs)))
        device = [tensor for tensor in given if not self.on_host(tensor)]
        asked = name in ASKING
        if name in INDEXING:
            asked = any(index.dtype is torch.bool for index in _tensors(args[1]) if not self.on_host(index))
        if name == "repeat_interleave":
            asked = len(given) > 1 and kwargs.get("output_size") is None
        if asked and device:
            frames = [f for f in traceback.extract_stack() if "samseg_monai/" in f.filename]
            self.places.append(f"{frames[-1].filename}:{frames[-1].name}:{name}" if frames else name)
        result = func(*args, **kwargs)
        if name == "cpu":
            result = result.clone()  # elsewhere, as it would be
        elif name == "to" and not device and given:
            return result.clone() if len(args) > 1 and not isinstance(args[1], torch.dtype) else result
        if name in ("cpu", "numpy") or (not device and (given or name in FACTORIES)):
            self.bring(*_tensors(result))
        return result


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@contextmanager
def counted():
    waits = Waits()
    with waits:
        yield waits


def network():
    torch.manual_seed(0)
    found = SamSegmenter("tiny", LoRA(rank=2), image_size=32, num_classes=1, scans=1)
    found.load_base("random")
    return found


def test_the_counting_sees_what_a_gpu_would_wait_for():
    x = torch.randn(3)
    with counted() as waits:
        moved = x.cpu()
        assert moved.sum().item() == moved.sum().item() and bool((moved > 0).any()) in (True, False)
        assert len(waits.places) == 1
        float(x.sum()), x[x > 0], x.tolist(), torch.zeros(3)[torch.zeros(3) > 0]
        assert waits.places[1:] == ["__float__", "__getitem__", "tolist"]


@pytest.mark.parametrize(("boxes", "most"), [(True, 3), (False, 2)])
def test_a_training_step_waits_once_for_boxes_once_for_the_label_and_once_at_its_end(boxes, most, tmp_path):
    net, batches = network(), []
    for _ in range(5):
        box = {"boxes": torch.tensor([[2.0, 3.0, 20.0, 24.0]] * 2)} if boxes else {}
        batches.append(
            {"image": torch.randn(2, 1, 32, 32), "label": torch.ones(2, 1, 32, 32, dtype=torch.uint8), **box}
        )
    loss = OnLogitGrid(SegmentationLoss(["tumour"]))
    run = SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=batches,
        network=net,
        optimizer=torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3),
        loss_function=loss,
        prepare_batch=PrepareBatchExtraInput({"boxes": "boxes"} if boxes else {}),
        decollate=False,
        train_handlers=[NonFiniteGuard(), GradientFlow(net), GradientClip(1.0), CurveLog(tmp_path), EMA(net, 0.9)],
    )
    counts = []

    def step(engine, batch, real=run._process_function):
        with counted() as waits:
            output = real(engine, batch)
        counts.append(waits.places)
        return output

    run._process_function = step
    run.run()
    assert all(len(places) <= most for places in counts[2:]), counts[-1]
    assert all(len(places) <= most + 1 for places in counts[:2]), counts[0]  # whether every tensor learns
    assert isinstance(run.state.output["loss"], torch.Tensor) and run.state.output["loss"].item() > 0


def test_a_predicted_volume_waits_once_for_its_slices_and_twice_a_batch():
    net, image = network(), torch.randn(1, 1, 40, 30, 9)
    prompt = torch.zeros(1, 1, 40, 30, 9)
    prompt[:, :, 5:20, 4:20, 1:8] = 1  # 7 slices
    resize = Resized(
        ["image", "prompt"], 32, size_mode="longest", mode=["bilinear", "nearest"], allow_missing_keys=True
    )
    for size, batches in ((7, 1), (3, 3)):
        inferer = SliceVolumeInferer([resize], batch_size=size, direct=True)
        with torch.no_grad(), counted() as waits:
            inferer(image, net, prompt=prompt)
        assert len(waits.places) <= 1 + 2 * batches, waits.places


def test_a_validation_loss_waits_for_nothing_before_the_end_of_all_cases():
    class Engine:
        state = type("State", (), {})()

    engine, tool = Engine(), ValidationLoss(OnLogitGrid(SegmentationLoss(["tumour"])))
    label = torch.zeros(1, 1, 16, 16, 6, dtype=torch.uint8)
    label[..., 2:5] = 1
    logits = torch.randn(1, 1, 16, 16, 6)
    engine.state.batch = {"case": ["a"], "label": MetaTensor(label), "prompt": label.clone()}
    engine.state.output = {"pred": logits, "label": label.clone()}
    with counted() as waits:
        waits.bring(engine.state.batch["label"], engine.state.batch["prompt"])
        tool._begin(engine)
        tool._collect(engine)
    assert waits.places == []
    engine.state.metrics = {}
    tool._publish(engine)
    mine = [SegmentationLoss(["tumour"])(logits[..., z], label[..., z]) for z in range(2, 5)]
    assert engine.state.metrics["val_loss"] == pytest.approx(float(torch.stack(mine).mean()), abs=1e-6)
