"""Pico SAM: the committed weights are what their card says, and the pre-training that made them works."""

import json
import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import samseg_monai.sam
from samseg_monai.errors import ConfigError, TrainingError
from samseg_monai.sam.build import build_sam
from samseg_monai.sam.spec import SPECS
from samseg_monai.sam.weights import find_weights, load_sam_weights, sha256_of
from tools.pico import HELD_OUT_SEED, Pretraining, Recipe, evaluate_pico, pretrain, write_weights
from tools.pico.__main__ import main
from tools.pico.evaluation import ShapeDataset, dice_of, inscribed_ellipse
from tools.pico.objective import learning_rate, mask_loss

FOLDER = Path(samseg_monai.sam.__file__).parent
TINY = Recipe(steps=6, batch_size=4, objects=2, warmup=2, lr=2e-3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the pre-training runs; on a busy machine two threads in such small operations only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def card():
    return json.loads((FOLDER / "pico.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pico():
    sam = build_sam("pico")
    load_sam_weights(sam, find_weights("pico"))
    return sam


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# --- the committed file


def test_the_card_belongs_to_the_file(card):
    assert card["sha256"] == sha256_of(FOLDER / "pico.safetensors")
    assert card["status"] == "final"
    assert card["steps_done"] == card["recipe"]["steps"] == Recipe().steps
    assert card["recipe"] == asdict(Recipe())  # `make pico` would train the same again


def test_the_card_describes_the_network(card, pico):
    assert card["architecture"] == json.loads(json.dumps(asdict(SPECS["pico"])))
    assert card["parameters"] == sum(p.numel() for p in pico.parameters()) <= 2_500_000


def test_the_file_is_small_and_half_precision():
    assert (FOLDER / "pico.safetensors").stat().st_size <= 6_000_000
    with safe_open(FOLDER / "pico.safetensors", "pt") as file:
        kinds = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118 - safe_open is no dict
    assert kinds == {torch.float16}


def test_held_out_dice_of_the_card_is_reproduced(card, pico):
    held_out = card["held_out"]
    assert held_out["images"] >= 256 and held_out["seed"] == HELD_OUT_SEED
    assert evaluate_pico(pico, n=held_out["first_images"]) == pytest.approx(held_out["dice_first_images"], abs=0.01)


def test_pico_is_better_than_what_the_box_gives_away(card):
    assert card["held_out"]["dice"] >= 0.87
    assert card["held_out"]["dice"] > card["held_out"]["box_ellipse_dice"] + 0.03


@torch.no_grad()
def test_the_box_decides_which_object_is_segmented(pico):
    own, other = [], []
    images = ShapeDataset(HELD_OUT_SEED, 0, 12, size=256, objects=2, jitter=0.05)
    for image, masks, boxes in (images[k] for k in range(len(images))):
        apart = (boxes[0, :2] > boxes[1, 2:]).any() or (boxes[1, :2] > boxes[0, 2:]).any()
        if apart:
            embedding = pico.embed(image[None]).expand(2, -1, -1, -1)
            logits = F.interpolate(pico.decode(embedding, boxes=boxes)[0], 256, mode="bilinear")[:, 0]
            own.append(dice_of(logits > 0, masks.bool()))
            other.append(dice_of(logits > 0, masks.bool().flip(0)))
    assert len(own) >= 6
    assert torch.cat(own).mean() > 0.8
    assert torch.cat(other).mean() < 0.05


# --- the pre-training


def test_a_run_that_is_interrupted_and_resumed_ends_with_the_same_weights(tmp_path):
    straight, first, second = (Pretraining(TINY, variant="tiny") for _ in range(3))
    for batch in straight.batches():
        straight.advance(batch)
    for batch, _ in zip(first.batches(), range(3), strict=False):
        first.advance(batch)
    first.save(tmp_path / "state.pt")
    second.resume(tmp_path / "state.pt")
    assert second.step == 3
    for batch in second.batches():
        second.advance(batch)
    assert second.step == straight.step == 6
    assert same(second.sam.state_dict(), straight.sam.state_dict())
    assert same(second.average.state_dict(), straight.average.state_dict())


def test_resuming_under_another_recipe_is_refused(tmp_path):
    Pretraining(TINY, variant="tiny").save(tmp_path / "state.pt")
    with pytest.raises(TrainingError, match="recipe"):
        Pretraining(Recipe(steps=7), variant="tiny").resume(tmp_path / "state.pt")


def test_pretraining_lowers_the_loss_and_leaves_a_card(tmp_path):
    run = Pretraining(Recipe(steps=30, batch_size=4, objects=2, warmup=3, lr=3e-3), variant="tiny")
    batch = next(run.batches())
    losses = [run.advance(batch) for _ in range(29)]
    assert losses[-1] < 0.5 * losses[0]
    written = pretrain(run, tmp_path, checkpoint=tmp_path / "state.pt", minutes=60, held_out=4)
    assert written["status"] == "final" and written["steps_done"] == 30
    assert written == json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
    assert written["sha256"] == sha256_of(tmp_path / "tiny.safetensors")
    sam = build_sam("tiny")
    load_sam_weights(sam, tmp_path / "tiny.safetensors")
    assert evaluate_pico(sam, n=4) == pytest.approx(written["held_out"]["dice"], abs=1e-4)


def test_both_halves_of_a_batch_count_the_same():
    run = Pretraining(TINY, variant="tiny")
    whole, parts = Pretraining(TINY, variant="tiny"), []
    batch = next(run.batches())
    parameters = list(whole.sam.parameters())
    for part in zip(*(tensor.chunk(2) for tensor in batch), strict=True):
        parts.append(whole.gradients(part, parameters)[1])
    run.advance(batch)
    for parameter, *gradients in zip(run.sam.parameters(), *parts, strict=True):
        if gradients[0] is None:
            assert parameter.grad is None
        else:  # advance() clips the norm: the direction is what must agree
            mean = (gradients[0] + gradients[1]) / 2
            assert F.cosine_similarity(parameter.grad.flatten(), mean.flatten(), dim=0) > 0.999 or (mean.norm() < 1e-6)


def test_every_trained_tensor_receives_a_gradient_except_those_of_other_prompts():
    run = Pretraining(TINY, variant="tiny")
    run.advance(next(run.batches()))
    silent = {name for name, p in run.sam.named_parameters() if p.requires_grad and p.grad is None}
    assert silent and all(name.startswith("prompt_encoder.") for name in silent)
    assert not any(name.startswith(("prompt_encoder.point_embeddings.2", "prompt_encoder.no_mask")) for name in silent)


def test_a_loss_that_is_not_finite_stops_the_run():
    run = Pretraining(TINY, variant="tiny")
    image, masks, boxes = next(run.batches())
    with pytest.raises(TrainingError, match="step 0"):
        run.advance((image * math.nan, masks, boxes))


def test_learning_rate_warms_up_and_ends_at_zero():
    recipe = Recipe(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(step, recipe) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0
    assert rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0)
    assert all(a >= b for a, b in pairwise(rates[9:]))


def test_mask_loss_by_hand():
    target = torch.zeros(1, 2, 4, 4)
    target[..., :2, :] = 1
    certain = 40 * (2 * target - 1)
    loss = mask_loss(torch.stack([certain[:, 0], -certain[:, 1]], 1), target, torch.tensor([0.5]))
    assert loss[0, 0] == pytest.approx(0, abs=1e-6)
    # all wrong: 40 per pixel, summed over 16 pixels, by the box's 8; Dice (0 + 1) / (8 + 8 + 1)
    assert loss[0, 1] == pytest.approx(80 + 1 - 1 / 17, rel=1e-5)


def test_dice_by_hand():
    a, b = torch.zeros(3, 4, 4, dtype=torch.bool), torch.zeros(3, 4, 4, dtype=torch.bool)
    a[0, 0, :4], b[0, 0, 2:] = True, True  # 2 of 4 and 2
    a[1, 0, 0] = True
    np.testing.assert_allclose(dice_of(a, b), [2 * 2 / 6, 0, 1], rtol=1e-6)


def test_the_inscribed_ellipse_fills_its_share_of_the_box():
    ellipse = inscribed_ellipse(torch.tensor([[10.0, 20, 110, 80]]), 128)[0]
    assert ellipse.sum() == pytest.approx(math.pi / 4 * 100 * 60, rel=0.01)
    assert not ellipse[:, :10].any() and not ellipse[:20].any() and ellipse[50, 10:110].all()


def test_no_run_trains_on_the_held_out_stream(tmp_path):
    with pytest.raises(ConfigError, match="held out"):
        main(["--output", str(tmp_path), "--seed", str(HELD_OUT_SEED)])


def test_evaluating_no_image_is_refused(pico):
    with pytest.raises(ConfigError, match="positive"):
        evaluate_pico(pico, n=0)


def test_the_command_writes_weights_that_load(tmp_path):
    run = Pretraining(Recipe(steps=1), variant="tiny")
    written = write_weights(run, tmp_path, held_out=2)
    assert written["status"] == "interim" and written["steps_done"] == 0
    report = load_sam_weights(build_sam("tiny"), tmp_path / "tiny.safetensors")
    assert report.loaded == len(build_sam("tiny").state_dict())
