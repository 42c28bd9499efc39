"""Augmentation by name: what each transform changes, what none may change, and sides that stay sides in a mirror."""

import itertools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd, RandBiasFieldd, RandFlipd
from monai.transforms.compose import Randomizable

from samseg_monai.bundles import build_bundle
from samseg_monai.bundles.running import _ids as ids_of
from samseg_monai.bundles.running import unknown_keys
from samseg_monai.data.slices.cache import describe
from samseg_monai.errors import ConfigError, DataError
from samseg_monai.transforms import RandBiasFromMinimumd, RandMirroredd, left_right_axis, named_transforms
from samseg_monai.workflow import run_workflow
from tests.conftest import TINY
from tests.docs.test_docs import value as value_of

KIDNEYS = [["left kidney", "right kidney"]]
GEOMETRIC = {("light", "affine"), ("strong", "mirror"), ("strong", "affine"), ("published", "one_of")}
INTENSITY = {("light", "intensity")} | {("strong", name) for name in ("intensity", "contrast", "bias_field", "noise")}
SCALES = {"zscore": (-0.8, 1.0), "unit": (0.0, 0.25), "sam": (0.0, 64.0)}  # lowest value, and a standard deviation


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("built")
    pairs = [("abdomen", "ladder"), ("abdomen", "ladder_paper"), ("meningioma", "lora"), ("hippocampus", "unet")]
    return {f"{task}_{strategy}": build_bundle(task, strategy, folder) for task, strategy in pairs}


@pytest.fixture(scope="module")
def read(built):
    """Parser of a bundle's training with some values changed, as the command line would."""

    def parser(bundle: str, **changes) -> ConfigParser:
        found = ConfigParser(ConfigParser.load_config_file(built[bundle] / "configs" / "train.json"))
        for key, value in changes.items():
            found[key] = value
        return found

    return parser


@pytest.fixture(scope="module")
def one(read):
    """One transform of a preset, always drawn; ``settings`` replace its own."""

    def transform(preset: str, name: str, *, scale: str = "unit", bundle: str = "abdomen_ladder_paper", **settings):
        parser = read(bundle, augmentation=preset, image_size=64, input_scale=scale)
        where = f"augmentations::{preset}::{name}"
        for key, value in {**({} if name == "one_of" else {"prob": 1.0}), **settings}.items():
            parser[f"{where}::{key}"] = value
        return parser.get_parsed_content(where)

    return transform


def presets(parser: ConfigParser) -> list[str]:
    return list(parser["augmentations"])


def whole(read, preset: str, *, bundle: str = "abdomen_ladder_paper", **changes) -> Compose:
    parser = read(bundle, augmentation=preset, **{"image_size": 64, **changes})
    return Compose(parser.get_parsed_content("augmentation_transforms"))


def plain(tensor) -> torch.Tensor:
    return torch.as_tensor(tensor).as_subclass(torch.Tensor)


def slice_with(*spots: tuple[int, int], scale: str = "unit", size: int = 64, channels: int = 1):
    """Image and label with bright 5 x 5 spots 1, 2, ... on a smooth ground that reaches the scale's lowest value."""
    low, unit = SCALES[scale]
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    image = (low + unit * (y + x)).repeat(channels, 1, 1)
    label = torch.zeros(1, size, size, dtype=torch.uint8)
    for number, (row, column) in enumerate(spots, start=1):
        label[0, row - 2 : row + 3, column - 2 : column + 3] = number
    return {"image": torch.where(label > 0, low + 4 * unit, image), "label": label}


def centre(mask: torch.Tensor) -> torch.Tensor:
    return torch.nonzero(plain(mask)[0]).double().mean(dim=0)


def drawn(transform, item, seed: int):
    transform.set_random_state(seed=seed)
    return {k: plain(v) for k, v in transform({k: v.clone() for k, v in item.items()}).items()}


# -- what each transform changes


def test_mirror_exchanges_sides_and_mirrors_all_arrays_alike():
    classes = ["spleen", "right kidney", "left kidney"]
    rng = torch.Generator().manual_seed(0)
    item = {key: torch.rand(1, 8, 10, generator=rng) for key in ("image", "prompt")}
    item["label"] = torch.randint(0, 4, (1, 8, 10), generator=rng).to(torch.uint8)
    mirror = RandMirroredd(["image", "label", "prompt", "box"], 1, classes, KIDNEYS, prob=1.0, allow_missing_keys=True)
    found = drawn(mirror, item, 0)
    for key in ("image", "prompt"):
        assert torch.equal(found[key], item[key].flip(2))
    flipped = item["label"].flip(2)
    expected = torch.where(flipped >= 2, 5 - flipped, flipped)  # 2 and 3 change places, 0 and 1 stay
    assert found["label"].dtype == torch.uint8 and torch.equal(found["label"], expected)
    twice = drawn(mirror, found, 0)
    assert all(torch.equal(twice[key], item[key]) for key in item)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_inverse_of_a_mirrored_slice_is_the_slice(prob):
    item = {key: MetaTensor(torch.arange(24.0).reshape(1, 4, 6) % 3) for key in ("image", "label")}
    mirror = RandMirroredd(["image", "label"], 1, ["left eye", "right eye"], [["left eye", "right eye"]], prob=prob)
    found = mirror({k: v.clone() for k, v in item.items()})
    assert torch.equal(found["label"], item["label"]) is (prob == 0)
    back = mirror.inverse(found)
    assert all(torch.equal(plain(back[key]), plain(item[key])) for key in item)


def test_rotation_turns_and_nothing_else(one):
    turn = one("strong", "affine", rotate_range=0.4, scale_range=[0.0, 0.0], shift=0.0)
    item = slice_with((32, 14), (32, 50))
    angles = []
    for seed in range(30):
        a, b = (centre(drawn(turn, item, seed)["label"] == n) for n in (1, 2))
        assert float(torch.linalg.norm(b - a)) == pytest.approx(36, abs=1.0)
        angles.append(float(torch.atan2(b[0] - a[0], b[1] - a[1])))
    assert 0.3 < max(angles) < 0.45 and -0.45 < min(angles) < -0.3


def test_scaling_keeps_directions(one):
    zoom = one("strong", "affine", rotate_range=0.0, scale_range=[0.2, 0.2], shift=0.0)
    item = slice_with((32, 20), (32, 44))
    factors = []
    for seed in range(30):
        a, b = (centre(drawn(zoom, item, seed)["label"] == n) for n in (1, 2))
        assert abs(float(b[0] - a[0])) < 0.5
        factors.append(float(b[1] - a[1]) / 24)
    assert 0.8 < min(factors) < 0.9 and 1.12 < max(factors) < 1.3  # 1 / 1.2 to 1 / 0.8


def test_shift_is_a_fortieth_of_the_slice_at_most(one):
    shift = one("strong", "affine", rotate_range=0.0, scale_range=[0.0, 0.0], shift=0.025)
    item = slice_with((30, 30))
    moves = torch.stack([centre(drawn(shift, item, seed)["label"] == 1) - 30 for seed in range(40)])
    assert 1 <= float(moves.abs().max()) <= 2.01 and bool((moves.amin(0) < 0).all() and (moves.amax(0) > 0).all())


@pytest.mark.parametrize("preset", ["light", "strong"])
@pytest.mark.parametrize("size", [(48, 32), (138, 202)])
def test_shift_is_measured_by_the_slice_not_by_the_networks_input(preset, size, one):
    """25 of 138 pixels it was, by an input of 1024."""
    shift = one(preset, "affine", rotate_range=0.0, scale_range=[0.0, 0.0])
    item = {"image": torch.rand(1, *size), "label": torch.zeros(1, *size, dtype=torch.uint8)}
    moves = []
    for seed in range(30):
        drawn(shift, item, seed)
        moves.append(shift.rand_affine.rand_affine_grid.translate_params)
    for axis, side in enumerate(size):
        most = max(abs(move[axis]) for move in moves)
        assert 0.02 * side < most <= 0.025 * side


@pytest.mark.parametrize("scale", SCALES)
def test_intensity_multiplies_by_one_factor(one, scale):
    factor, item = one("strong", "intensity", scale=scale), slice_with((20, 20), scale=scale)
    factors = []
    for seed in range(30):
        ratio = drawn(factor, item, seed)["image"] / item["image"]
        ratio = ratio[item["image"].abs() > 1e-3]
        assert float(ratio.max() - ratio.min()) < 1e-4
        factors.append(float(ratio.mean()))
    assert 0.8 <= min(factors) < 0.9 and 1.1 < max(factors) <= 1.2


@pytest.mark.parametrize("scale", SCALES)
def test_contrast_bends_the_scale_between_its_ends(one, scale):
    gamma, item = one("strong", "contrast", scale=scale), slice_with((20, 20), scale=scale)
    before = item["image"].flatten()
    middles = []
    for seed in range(30):
        after = drawn(gamma, item, seed)["image"].flatten()
        order = before.argsort()
        assert bool((after[order].diff() >= -1e-3 * SCALES[scale][1]).all())  # darker stays darker
        assert float(after.min()) == pytest.approx(float(before.min()), abs=1e-3 * SCALES[scale][1])
        assert float(after.max()) == pytest.approx(float(before.max()), rel=1e-4)
        middles.append(float((after.mean() - before.mean()) / SCALES[scale][1]))
    assert min(middles) < -0.05 and max(middles) > 0.05


@pytest.mark.parametrize("scale", SCALES)
def test_bias_field_is_smooth_and_multiplies_what_lies_above_the_minimum(one, scale):
    field = one("strong", "bias_field", scale=scale, bundle="meningioma_lora", coeff_range=[-0.15, 0.15])
    item = slice_with((20, 20), scale=scale)
    low = float(item["image"].min())
    y = np.linspace(-1, 1, 64)
    basis = [np.outer(y**i, y**j).ravel() for i in range(4) for j in range(4)]
    for seed in range(5):
        after = drawn(field, item, seed)["image"].double()
        above = item["image"].double() - low > 0.1 * SCALES[scale][1]
        log = torch.log((after - low)[above] / (item["image"].double() - low)[above]).numpy()
        design = np.stack(basis, axis=1)[above.flatten().numpy()]
        rest = log - design @ np.linalg.lstsq(design, log, rcond=None)[0]
        assert np.abs(rest).max() < 1e-3 < 0.05 < np.ptp(log)  # the spot is in it as little as the ground
        assert np.abs(log).max() < 10 * 0.15


def test_bias_field_commutes_with_the_normalisation_which_monais_own_does_not():
    raw = slice_with((20, 20), scale="sam")["image"]
    normalised = (raw - raw.mean()) / raw.std()
    found = {}
    for kind in (RandBiasFromMinimumd, RandBiasFieldd):
        field = kind("image", coeff_range=(-0.15, 0.15), prob=1.0)
        a, b = (drawn(field, {"image": image}, 3)["image"] for image in (raw, normalised))
        found[kind] = float(((a - raw.mean()) / raw.std() - b).abs().max())
    assert found[RandBiasFromMinimumd] < 1e-4 < 0.05 < found[RandBiasFieldd]


def test_bias_field_leaves_an_empty_background_empty():
    image = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
    image[:, :, :9] = 0.0
    found = drawn(RandBiasFromMinimumd("image", prob=1.0), {"image": image}, 0)["image"]
    assert bool((found[:, :, :9] == 0).all()) and not torch.allclose(found, image, atol=0.01)


def test_noise_is_white_and_as_strong_on_every_scale(one):
    strength = {}
    for scale, (_, unit) in SCALES.items():
        noise, item = one("strong", "noise", scale=scale), slice_with((20, 20), scale=scale)
        added = torch.stack([drawn(noise, item, seed)["image"] - item["image"] for seed in range(30)])
        added = added[:, 0].double() / unit
        spread = added.std((1, 2))
        assert float(spread.max()) < 0.21 and float(spread.max()) > 0.15 and float(spread.min()) < 0.05
        assert float(added.mean()) == pytest.approx(0, abs=0.005)
        neighbours = (added[:, 1:] * added[:, :-1]).mean() / (added**2).mean()
        assert abs(float(neighbours)) < 0.02
        strength[scale] = spread
    assert torch.allclose(strength["unit"], strength["sam"], rtol=1e-3)
    assert torch.allclose(strength["unit"], strength["zscore"], rtol=1e-3)


# -- what none may change


def test_every_offered_transform_is_tested(read):
    parser = read("abdomen_ladder_paper")
    offered = {(p, name) for p in presets(parser) for name in parser["augmentations"][p] if name != "label_type"}
    assert offered == GEOMETRIC | INTENSITY and presets(parser) == ["none", "light", "strong", "published"]


@pytest.mark.parametrize(("preset", "name"), sorted(GEOMETRIC))
def test_image_and_label_move_together(one, preset, name):
    transform = one(preset, name)
    item, moved = slice_with((26, 34)), 0
    for seed in range(30):
        found = drawn(transform, item, seed)
        image, label = found["image"][0], found["label"][0]
        assert set(label.unique().tolist()) <= {0, 1}
        bright = (image > 0.75)[None]
        assert float(torch.linalg.norm(centre(bright) - centre(label[None] == 1))) < 0.75
        moved += int(not torch.equal(label, item["label"][0].float()))
    assert moved > 10


@pytest.mark.parametrize(("preset", "name"), sorted(INTENSITY))
def test_intensities_change_and_labels_do_not(one, preset, name):
    transform = one(preset, name)
    item = slice_with((26, 34))
    for seed in range(10):
        found = drawn(transform, item, seed)
        assert torch.equal(found["label"], item["label"]) and found["label"].dtype == torch.uint8
        assert not torch.equal(found["image"], item["image"])
        spot, ring = found["image"][0, 24:29, 32:37], found["image"][0, 20:33, 28:41]
        assert float(spot.mean() - ring.mean()) > 0.4  # still bright where the label is


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("preset", ["none", "light", "strong", "published"])
def test_laws_of_every_augmentation(read, preset, scale):
    draw = whole(read, preset, input_scale=scale)
    item = slice_with((20, 20), (44, 30), (14, 44), scale=scale, channels=4)
    item["label"][0, 50:54, 10:14] = 8
    low, unit = SCALES[scale]
    results = []
    for seed in range(8):
        found, again = drawn(draw, item, seed), drawn(draw, item, seed)
        assert all(torch.equal(found[key], again[key]) for key in found)  # equal seeds, equal draws
        assert found["label"].dtype == torch.uint8 and found["image"].dtype == torch.float32
        assert found["label"].shape == item["label"].shape and found["image"].shape == item["image"].shape
        assert set(found["label"].unique().tolist()) <= {0, 1, 2, 3, 8}
        assert bool(torch.isfinite(found["image"]).all())
        assert low - 2 * unit < float(found["image"].min()) and float(found["image"].max()) < low + 9 * unit
        results.append(found["image"])
    different = sum(not torch.equal(a, b) for a, b in itertools.pairwise(results))
    assert different == 0 if preset == "none" else different >= 4
    constant = {"image": torch.full((4, 64, 64), low), "label": torch.zeros(1, 64, 64, dtype=torch.uint8)}
    assert all(bool(torch.isfinite(drawn(draw, constant, seed)["image"]).all()) for seed in range(8))


def test_every_draw_comes_from_the_random_state_of_the_compose(read):
    """A transform with a generator of its own would ignore (seed, epoch, item)."""
    for preset in ("light", "strong", "published"):
        draw = whole(read, preset)
        item = slice_with((20, 20))
        torch.manual_seed(1), np.random.seed(1)
        first = drawn(draw, item, 5)
        torch.manual_seed(2), np.random.seed(2)
        assert all(torch.equal(v, first[k]) for k, v in drawn(draw, item, 5).items())
        assert any(isinstance(t, Randomizable) for t in draw.transforms)


def test_epochs_differ_and_repeat_in_the_bundles_own_dataset(read, abdomen):
    def dataset():
        parser = read("abdomen_ladder", augmentation="strong", dataset_dir=str(abdomen), image_size=32)
        parser["slices::picker"] = {"_target_": "samseg_monai.data.slices.MaxArea"}
        return parser.get_parsed_content("train::dataset")

    first, second = dataset(), dataset()
    first.set_epoch(1)
    second.set_epoch(1)
    for index in (1, 0):
        assert torch.equal(first[index]["image"], second[index]["image"])
    image = first[0]["image"]
    first.set_epoch(2)
    assert not torch.equal(first[0]["image"], image)
    first.set_epoch(1)
    assert torch.equal(first[0]["image"], image)


# -- sides


@pytest.fixture(scope="module")
def kidneys(read, abdomen):
    """Slices of phantoms, as the bundle prepares them, in which both kidneys, liver and spleen can be seen."""
    parser = read("abdomen_ladder", dataset_dir=str(abdomen))
    classes = parser["classes"]
    prepare = parser.get_parsed_content("train::preprocessing")
    datalist = parser.get_parsed_content("train::dataset::data")
    wanted = [classes.index(name) + 1 for name in ("left kidney", "right kidney", "liver", "spleen")]
    found = []
    for case in datalist:
        volume = prepare(dict(case))
        label = plain(volume["label"])
        for z in range(label.shape[-1]):
            if all(int((label[..., z] == k).sum()) >= 6 for k in wanted):
                found.append({key: plain(volume[key])[..., z].clone() for key in ("image", "label")})
    assert len(found) >= 4
    return wanted, found[:: len(found) // 4]


def columns(label: torch.Tensor, wanted: list[int]) -> list[float]:
    """Mean position of each organ along the second axis, which runs to the patient's left."""
    return [float(centre(label == k)[1]) for k in wanted]


@pytest.mark.parametrize("preset", ["none", "light", "strong"])
def test_no_augmentation_changes_the_side_of_a_kidney(read, kidneys, preset):
    wanted, slices = kidneys
    draw = whole(read, preset, bundle="abdomen_ladder")
    mirrored = 0
    for item, seed in itertools.product(slices, range(12)):
        left, right, liver, spleen = columns(drawn(draw, item, seed)["label"], wanted)
        assert left > right
        mirrored += int(liver > spleen)
    share = mirrored / (12 * len(slices))
    assert 0.25 < share < 0.75 if preset == "strong" else share == 0  # liver and spleen tell that slices were mirrored


def test_a_flip_without_exchange_and_the_published_turns_do_change_sides(read, kidneys):
    """The law above can fail: the published protocol, kept as it is, makes right kidneys of left ones."""
    wanted, slices = kidneys
    flip = RandFlipd(["image", "label"], prob=1.0, spatial_axis=1)
    left, right, *_ = columns(drawn(flip, slices[0], 0)["label"], wanted)
    assert left < right
    published = whole(read, "published", bundle="abdomen_ladder_paper")
    sides = [columns(drawn(published, slices[0], seed)["label"], wanted)[:2] for seed in range(20)]
    assert any(left < right for left, right in sides)


@pytest.mark.parametrize("codes", ["".join(c) for c in itertools.permutations("RAS")] + ["PLS", "LPS", "ASL", "SLP"])
def test_left_right_axis_is_that_along_which_the_patients_x_runs(codes):
    axes = Orientationd("image", axcodes=codes, labels=None)
    volume = axes({"image": MetaTensor(torch.zeros(1, 4, 5, 6), affine=torch.eye(4))})["image"]
    expected = int(torch.argmax(volume.affine[0, :3].abs()))
    assert left_right_axis([axes]) == (expected if expected < 2 else None)


def test_volumes_without_a_known_orientation_have_no_left_right_axis():
    assert left_right_axis([]) is left_right_axis([RandFlipd("image")]) is None
    closest = Orientationd("image", as_closest_canonical=True, labels=None)
    assert left_right_axis([closest]) == 0


@pytest.mark.parametrize(
    ("bundle", "axis", "names"),
    [("abdomen_ladder", 1, True), ("meningioma_lora", 0, False), ("hippocampus_unet", 0, False)],
)
def test_bundles_mirror_along_their_own_axis(read, bundle, axis, names):
    parser = read(bundle, augmentation="strong")
    mirror = parser.get_parsed_content("augmentation_transforms")[0]
    assert type(mirror) is RandMirroredd and mirror.flipper.spatial_axis == axis and mirror.exchanges is names


def test_sagittal_slices_are_not_mirrored(read):
    sagittal = [{"_target_": "Orientationd", "keys": "image", "axcodes": "SPL", "labels": None}]
    found = read("meningioma_lora", augmentation="strong", orient_transforms=sagittal)
    kinds = [type(t).__name__ for t in found.get_parsed_content("augmentation_transforms")]
    assert "RandMirroredd" not in kinds and "RandShiftedAffined" in kinds


@pytest.mark.parametrize(
    ("axis", "classes", "pairs", "named"),
    [
        (None, ["a"], [], ["axis"]),
        (2, ["a"], [], ["axis", "2"]),
        (1, ["left lung", "heart", "Lung_Right"], None, ["left lung", "Lung_Right", "mirrored_classes"]),
        (1, ["left lung", "right lung"], [["left lung", "rigth lung"]], ["rigth lung", "left lung, right lung"]),
        (1, ["a", "b", "c"], [["a", "b"], ["b", "c"]], ["b: named twice"]),
        (1, ["a", "b", "c"], [["a", "b", "c"]], ["list of pairs"]),
        (1, ["left lung", "right lung"], ["left lung", "right lung"], ["'left lung': ", "'right lung': "]),
    ],
)
def test_mirrors_that_would_teach_a_wrong_side_are_refused(axis, classes, pairs, named):
    with pytest.raises(ConfigError) as caught:
        RandMirroredd(["image", "label"], axis, classes, pairs)
    assert all(name in str(caught.value) for name in named) and "heart" not in str(caught.value)


def test_sides_that_do_not_change_places_can_be_named():
    heart = RandMirroredd("label", 0, ["left atrium", "right atrium"], [], prob=1.0)
    label = torch.tensor([[[1, 0], [2, 0]]], dtype=torch.uint8)
    assert torch.equal(drawn(heart, {"label": label}, 0)["label"], label.flip(1))


def test_values_that_are_no_classes_are_refused():
    mirror = RandMirroredd("label", 0, ["left eye", "right eye"], [["left eye", "right eye"]], prob=1.0)
    with pytest.raises(DataError, match=r"0 to 7, classes are 0 to 2"):
        mirror({"label": torch.tensor([[[0, 7]]])})


# -- as a key of a bundle


def test_all_strategies_can_share_one_augmentation(read):
    found = {}
    for bundle in ("abdomen_ladder", "abdomen_ladder_paper"):
        found[bundle] = json.dumps(describe(whole(read, "strong", bundle=bundle)))
    assert found["abdomen_ladder"] == found["abdomen_ladder_paper"]
    own = {b: read(b)["augmentation"] for b in ("abdomen_ladder", "abdomen_ladder_paper", "meningioma_lora")}
    assert list(own.values()) == ["light", "published", "none"] and read("hippocampus_unet")["augmentation"] == "light"


def test_unknown_names_list_those_there_are(read):
    with pytest.raises(ConfigError, match=r"'storng', only none, light, strong"):
        named_transforms(read("abdomen_ladder")["augmentations"], "storng")


def test_a_ct_has_no_coil_and_no_bias_field(read):
    key = "augmentations::strong::bias_field::prob"
    assert (read("abdomen_ladder")[key], read("meningioma_lora")[key]) == (0.0, 0.3)


def test_every_override_that_the_page_shows_is_known_and_builds(built, read):
    page = (Path(__file__).parents[2] / "docs" / "learning_options.md").read_text(encoding="utf-8")
    shown = [shlex.split(code) for code in re.findall(r"`--([^`]* [^`]+)`", page)]
    overrides = [(key, value_of(text)) for key, text in shown if not text.isupper()]
    assert len(overrides) > 12
    known = ids_of(read("abdomen_ladder").get())
    for key, content in overrides:
        parser = read("abdomen_ladder", **{"augmentation": "strong", "image_size": 64, key: content})
        assert unknown_keys(parser.get(), known) == []
        loss = parser.get_parsed_content("train::criterion")
        draw = Compose(parser.get_parsed_content("augmentation_transforms"))
        logits, item = torch.zeros(1, 9, 64, 64), slice_with((20, 20), (40, 40))
        assert torch.isfinite(loss(logits, drawn(draw, item, 0)["label"][None]))


def test_class_weights_may_be_a_mapping_in_a_file(read):
    known = ids_of(read("abdomen_ladder").get())
    parser = read("abdomen_ladder", **{"loss::class_weights": {"gallbladder": 3}})
    assert unknown_keys(parser.get(), known) == []
    weights = parser.get_parsed_content("train::criterion").loss.weight
    assert float(weights[1 + parser["classes"].index("gallbladder")] / weights[0]) == 3
    wrong = {"loss": {"class_wieghts": {"gallbladder": 3}}}
    assert unknown_keys(wrong, known) == ["loss::class_wieghts (did you mean loss::class_weights?)"]


@pytest.mark.parametrize(
    ("bundle", "options"),
    [
        (
            "abdomen_ladder",
            {
                "augmentation": "strong",
                "augmentations::strong::noise::prob": 1.0,
                "loss::ce": 0.1,
                "loss::focal": 0.5,
                "loss::boundary": 0.2,
                "loss::class_weights": "gallbladder=3,background=0.5",
                "batch_size": 2,
                "strategy::side_weights": "random",
                "schedule::warmup": 0,
                "slices::picker::_target_": "samseg_monai.data.slices.MaxArea",
            },
        ),
        (
            "meningioma_lora",
            {
                "augmentation": "strong",
                "loss::dice": 1.0,
                "loss::class_weights": "tumour=3",
                "strategy::rank": 2,
            },
        ),
    ],
)
def test_options_train_and_are_recorded(built, bundle, options, phantoms_of, tmp_path):
    folder = phantoms_of(f"{bundle.partition('_')[0]}_segmentation_x")
    shared = {**TINY, "dataset_dir": str(folder), "output_dir": str(tmp_path), "epochs": 1, "val_interval": 0}
    run_workflow([built[bundle] / "configs" / "train.json"], {**shared, **options})
    card = json.loads((tmp_path / "run_card.json").read_text(encoding="utf-8"))
    assert card["status"] == "completed" and card["settings"]["augmentation"] == options["augmentation"]
    for key, value in options.items():
        if key.startswith("loss::"):
            assert card["settings"]["loss"][key.removeprefix("loss::")] == value


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("augmentation", "storng", "none, light, strong"),
        ("loss::focl", 0.5, "loss::focal"),
        ("augmentatoin", "strong", "augmentation"),
        ("loss::class_weights", "gallblader=3", "gallbladder"),
        ("loss::dice", -1, "dice"),
    ],
)
def test_mistakes_are_refused_by_name(built, key, value, named, abdomen, tmp_path):
    shared = {**TINY, "dataset_dir": str(abdomen), "output_dir": str(tmp_path), "strategy::side_weights": "random"}
    with pytest.raises(ConfigError) as caught:
        run_workflow([built["abdomen_ladder"] / "configs" / "train.json"], {**shared, "epochs": 1, key: value})
    assert named in str(caught.value)
