"""Laws of a bundle's settings: closed, typed, in range, nothing in them that MONAI would run."""

import copy
import json
from typing import get_args

import pytest

from samseg_monai.choices import Method
from samseg_monai.errors import ConfigError
from samseg_monai.refusals import MOST_LEVELS
from samseg_monai.settings import (
    BundleSettings,
    RunSettings,
    StrategySettings,
    dump_settings,
    json_schema,
    read_settings,
)

TASK = {
    "name": "liver", "dataset": "livers", "scans": ["t1", "t2", "t3"], "channels": ["T1", "T2", "T3"],
    "classes": ["liver", "left kidney", "right kidney"], "modality": "MR", "orientation": "LPS",
    "intensity": {"window": [-100.0, 200.0], "percentiles": [1.0, 99.0], "nonzero": True, "after_crop": True},
    "mirrored_classes": [["left kidney", "right kidney"]], "title": "Liver and kidneys", "text": "Left, right, liver.",
    "data_text": "Folders.", "data_source": "Drawn", "data_license": ["Free."], "references": ["A. Author. 2020."],
    "prepare": ["samseg prepare folders"], "phantoms": ["samseg phantom btcv"],
}  # fmt: skip
RUN = {
    "loss": {"class_weights": {"liver": 2.0}}, "learning_rates": {"layer_decay": 0.5, "scale": [["side.alpha", 10.0]]},
    "optimizer": {"name": "SGD", "weight_decay": 0.1}, "slices": {"picker": {"name": "RandomN", "n": 3}},
    "regions": {"kidneys": ["left kidney", "right kidney"]}, "min_component_mm3": 3.0, "crop_size": [3, 4], "ema": 0.9,
    "embeddings": {"variants": 3}, "early_stop": 3, "clip_norm": 1.0, "autocast": "bf16", "store_size": 64,
    "augmentation": "light",
}  # fmt: skip
METHODS = [
    {"name": "zero_shot"},
    {"name": "lora", "rank": 8, "alpha": 3.0, "targets": ["q", "lin1"], "blocks": [0, 1]},
    {"name": "ladder", "side": {"name": "resnet", "width": 32}},
    {"name": "selective", "label": "norm", "patterns": ["<norm>", "*.bias"], "frozen": ["sam.prompt_encoder"]},
]


def least(kind):
    """What a method needs at least: its name, and an example of each value without a default."""
    needed = {name: field for name, field in kind.model_fields.items() if field.is_required()}
    return {
        name: get_args(field.annotation)[0] if name == "name" else field.examples[0] for name, field in needed.items()
    }


# and whichever there is beside them; scratch comes with the networks
METHODS += [
    method
    for method in map(least, get_args(get_args(Method)[0]))
    if method["name"] not in ("scratch", *(known["name"] for known in METHODS))
]
NETWORKS = [
    {"name": "UNet", "channels": [8, 16], "strides": [2], "boxes": "crop"},
    {"name": "VNet", "boxes": "channel"},
    *({"name": n} for n in ("BasicUNetPlusPlus", "AttentionUnet", "UNETR", "SwinUNETR", "SegResNet", "DynUNet")),
]
HOSTILE = ["$x", "@x", "%x", "_target_", "../", "\x1b[2J", "a\x1bb", "x\n", " $x", "/etc/passwd", "$open('x', 'w')"]


def settings(method=METHODS[1], network=None, **run):
    method = {"name": "scratch", "label": "net"} if network else method
    words = {"title": "A title", "text": ["A text."], "description": "What it is.", "references": ["B. Author. 2021."]}
    strategy = {"name": "mine", "method": method, "network": network, **words}
    sam = {"sam_variant": None} if network else {"sam_variant": "vit_t"}
    prompt = {"prompt": {"source": "none"}} if network and network.get("boxes", "none") == "none" else {}
    run = {**copy.deepcopy(RUN), **sam, **prompt, **run}
    demo = {"run": {"image_size": 256, "prompt": {"seed": 3}}, "method": {"label": "demo"} if network else {}}
    strategy = copy.deepcopy(strategy)
    return {"format": 1, "engine": "0.1.0", "name": "liver_mine", "task": copy.deepcopy(TASK), "strategy": strategy,
            "run": run, "demo": demo}  # fmt: skip


EXAMPLES = [settings(method) for method in METHODS] + [settings(network=network) for network in NETWORKS]


def places(value, path=()):
    """Paths of every value, containers included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def put(value, path, new):
    result = copy.deepcopy(value)
    target = result
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = new
    return result


@pytest.mark.parametrize(
    "example", EXAMPLES, ids=lambda e: (e["strategy"]["network"] or e["strategy"]["method"])["name"]
)
def test_nothing_that_is_run_or_names_a_place_gets_into_any_field(example):
    full = dump_settings(read_settings(example, "example"))
    everywhere = example in (EXAMPLES[0], EXAMPLES[-1])  # task, run and demo of the others are the same
    paths = [path for path in places(full) if everywhere or path[:1] == ("strategy",)]
    assert len(paths) > (100 if everywhere else 10)
    for path in filter(None, paths):
        for text in HOSTILE:
            with pytest.raises(ConfigError):
                read_settings(put(full, path, text), "hostile")
    for path in paths:
        target = full
        for key in path:
            target = target[key]
        if isinstance(target, dict):
            for key in ("_target_", "+lr", "$x", "@x", "%x", "../", "\x1b", "_disabled_"):
                with pytest.raises(ConfigError):
                    read_settings(put(full, (*path, key), 1), "hostile")


def test_every_text_of_the_schema_has_a_pattern_or_a_list_of_values():
    def texts(part):
        if isinstance(part, dict):
            if part.get("type") == "string":
                yield part
            for value in part.values():
                yield from texts(value)
        elif isinstance(part, list):
            for value in part:
                yield from texts(value)

    found = list(texts(json_schema()))
    assert len(found) > 50
    assert [part for part in found if not {"pattern", "enum", "const"} & set(part)] == []


def test_every_number_of_the_schema_has_a_range():
    def numbers(part):
        if isinstance(part, dict):
            if part.get("type") in ("integer", "number") and not {"enum", "const"} & set(part):
                yield part
            for value in part.values():
                yield from numbers(value)
        elif isinstance(part, list):
            for value in part:
                yield from numbers(value)

    def limited(part):
        return {"minimum", "exclusiveMinimum"} & set(part) and {"maximum", "exclusiveMaximum"} & set(part)

    # arguments of the demo are checked where they are put: by the model of the strategy's own method
    free = [part for part in numbers(json_schema()) if not limited(part)]
    assert free == [{"type": "integer"}] * 3


@pytest.mark.parametrize("example", EXAMPLES)
def test_settings_survive_a_round_through_json(example):
    once = dump_settings(read_settings(example, "example"))
    again = dump_settings(read_settings(json.loads(json.dumps(once)), "again"))
    assert json.dumps(once) == json.dumps(again)


def test_all_problems_are_listed_with_the_nearest_key_and_an_example():
    wrong = settings(image_size="512", batch_size=0, epohcs=3, lr="$x")
    wrong["strategy"]["method"]["rnk"] = 3
    del wrong["task"]["modality"]
    with pytest.raises(ConfigError, match="6 problems") as caught:
        read_settings(wrong, "mine.json")
    text = str(caught.value)
    for part in ("mine.json", "epohcs: no such key; did you mean epochs?", "rnk: no such key; did you mean rank?",
                 "task::modality: missing; for example", "run::image_size: got '512'",
                 "run::lr", "batch_size: got 0"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("task", "classes"), ["spleen"], "does not name spleen"),
        (("task", "channels"), ["T1"], "1 names for 3 scans"),
        (("task", "mirrored_classes"), [["liver", "spleen"]], "spleen: not among"),
        (("task", "orientation"), None, "volumes need one"),
        (("run", "image_size"), 500, "multiple of 16"),
        (("run", "masks"), "best", "one class"),
        (("run", "prompt"), {"source": "image", "propagate": 2}, "around objects are carried"),
        (("run", "low_res_training"), True, "takes no boxes"),
        (("run", "sam_variant"), None, "without SAM"),
        (("strategy", "method"), {**METHODS[1], "last": 0.5}, r"blocks \[0, 1\] and last 0.5 choose the same"),
        (("strategy", "method"), {"name": "adapter", "blocks": [1], "last": 0.5}, "choose the same"),
        (("strategy", "method"), {"name": "lora", "decoder": "all"}, "strategy::method::decoder"),
        (("demo", "method"), {"rank": 0}, "demo: strategy::method::rank: got 0"),
        (("demo", "run"), {"image_size": 100}, "demo: run::image_size: got 100"),
    ],
)
def test_what_does_not_go_together_is_refused(where, value, said):
    with pytest.raises(ConfigError, match=said):
        read_settings(put(settings(), where, value), "mine")


def test_too_deep_and_too_large_are_refused_before_anything_else():
    deep = []
    for _ in range(MOST_LEVELS + 5):
        deep = [deep]
    with pytest.raises(ConfigError, match="levels"):
        read_settings(deep, "deep")
    with pytest.raises(ConfigError, match="bytes"):
        read_settings({"name": "x" * 2_000_000}, "large")
    for value in (None, 3, "x", [], {}):
        with pytest.raises(ConfigError):
            read_settings(value, "no settings")


def test_every_field_says_what_it_is():
    """Groups and choices have a docstring; what is no plain word has one of its own."""
    for model in (BundleSettings, RunSettings, StrategySettings):
        assert model.__doc__
    assert RunSettings.model_fields["crop_size"].description
