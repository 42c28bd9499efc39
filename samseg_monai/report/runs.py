"""One evaluated run as the report sees it: its card, its metrics and its rows per case, read from files only.

A run folder holds ``run_card.json`` (provenance), ``metrics.json`` (aggregates and definitions), one CSV of cases
(one row per case and class) and, when something was trained, ``history.csv`` (epoch, iteration, name, value).
Facts that a card does not record are shown as "not recorded", never guessed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from samseg_monai.data.datalists import case_hash
from samseg_monai.errors import BundleError, raise_all
from samseg_monai.files import StrPath, read_json
from samseg_monai.metrics import read_history, read_rows
from samseg_monai.metrics.rows import HISTORY_FILE, spelt_out
from samseg_monai.report.names import (
    BOX_ELLIPSE,
    LADDER,
    LORA,
    NOT_RECORDED,
    SIDES,
    ZERO_SHOT,
    fact_text,
    prompt_text,
    sam_text,
    strategy_text,
)
from samseg_monai.sam.weights import RANDOM

CARD_FILE = "run_card.json"
ADAPTER_CARD = "card.json"  # beside the weights
METRICS_FILE = "metrics.json"
CASES_FILE = "cases.csv"
_HOW = (
    "run the bundle's evaluate.json (python -m monai.bundle run --config_file ...) with output_dir set to this folder"
)
Curves = dict[str, dict[int, float]]
MET = {"training": "were trained on", "validation": "chose the epoch (validation)"}  # parts that weights have met
# By source, the settings that decide where boxes lie; what only a law of drawing uses says nothing of given boxes.
_BOXES_GIVEN = ("shrink", "per_component", "mask_values", "propagate")
_OF_BOXES = ("loosen", "tight", "shift", "shrink")
_CLICKS = ("kind", "inside", "outside")
_BOXES = {"label": (*_OF_BOXES, *_CLICKS, "per_component", "propagate"), "json": (*_BOXES_GIVEN, "kind"), "none": ()}
_NAMED = 5  # cases in a line


@dataclass(frozen=True)
class RunResult:
    """One strategy evaluated on one task: its files in ``folder``, and its ``name`` in tables, figures and JSON.

    Args:
        card, training: contents of ``run_card.json``, and of that of the training, which lies beside its curves.
        adapter: contents of the weights' ``card.json``, in the folder or one up; empty without.
        metrics: contents of ``metrics.json``.
        rows: one mapping per case and class, as ``samseg_monai.metrics.read_rows`` gives them.
        history: curve name -> epoch -> value, finite ones; empty when nothing was trained.
        label: how the run is called on the page; made from ``name`` and the card when None.
        others: folders of more runs that are part of this row (seeds, folds); predictions are looked for there, too.
    """

    folder: Path
    name: str
    card: Mapping[str, Any]
    metrics: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    history: Curves = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None
    others: Sequence[Path] = ()

    @classmethod
    def load(
        cls,
        folder: StrPath,
        *,
        name: str | None = None,
        cases: StrPath | None = None,
        label: str | None = None,
    ) -> RunResult:
        """Read one run; its curves are in ``history.csv`` there or one folder up, where a training leaves it with a
        ``run_card.json`` of its own, or nowhere.

        Args:
            folder: run folder.
            name: key of the run; the card's strategy when None. ``"box_ellipse"`` marks the row without a network.
            cases: CSV of cases, relative to ``folder`` or absolute; the card's ``cases_file``, then ``cases.csv``.
            label: how the run is called on the page.

        Raises:
            BundleError: naming every missing file and how to make it, or one that is unreadable; a card with values of
                wrong types; a CSV without cases, or with two rows of one case and class (say, of two training seeds).
            DataError: the CSV of cases is not one (columns, numbers).
        """
        folder = Path(folder)
        card_path, metrics_path = folder / CARD_FILE, folder / METRICS_FILE
        card = _json(card_path) if card_path.is_file() else {}
        _check_types(card, card_path)
        told = str(card.get("cases_file") or CASES_FILE)
        if re.search(r"[/\\:]|^\.+$", told) or len(told) > 255:
            raise BundleError(f"{card_path}: cases_file is {told!r:.80}, no name of a file beside it; {_HOW}")
        cases_path = folder / (cases or told)
        missing = [f"{path}: no such file" for path in (card_path, metrics_path, cases_path) if not path.is_file()]
        raise_all(missing, BundleError, f"{folder}: run cannot be reported; {_HOW}")
        rows = read_rows(cases_path)
        if not rows:
            raise BundleError(f"{cases_path}: holds no case; {_HOW}")
        counts = Counter((row["case"], row["class"]) for row in rows)
        doubled = [f"case {case}, class {klass}: {count} rows" for (case, klass), count in counts.items() if count > 1]
        heading = f"{cases_path} counts cases twice; evaluate again, each training seed into an empty folder"
        raise_all(doubled, BundleError, heading)
        name = name or _strategy_name(card) or folder.name
        curves: Curves = {}
        training: dict[str, Any] = {}
        places = (folder, folder.absolute().parent)
        curves_path, adapter = (
            next((place / name for place in places if (place / name).is_file()), None)
            for name in (HISTORY_FILE, ADAPTER_CARD)
        )
        if curves_path is not None and name != BOX_ELLIPSE:
            points, problems = read_history(curves_path)
            raise_all(problems, BundleError, f"{curves_path} cannot be read; train again to write it")
            for (epoch, curve), (_, value) in points.items():
                if math.isfinite(value):
                    curves.setdefault(curve, {})[epoch] = value
            training_card = curves_path.parent / CARD_FILE
            if training_card.is_file() and training_card.resolve() != card_path.resolve():
                training = _json(training_card)
                _check_types(training, training_card)
        weights = {} if adapter is None else _json(adapter)
        return cls(folder, name, card, _json(metrics_path), rows, curves, training, weights, label)

    @property
    def title(self) -> str:
        """Label of the run for people, e.g. ``LoRA, rank 4``; what nobody could see in a name is spelt out."""
        how = " (int8)" if self.has_network and self.fact("precision") == "int8" else ""
        return spelt_out(self.label or self._title()) + how

    @property
    def short_title(self) -> str:
        """``title`` without what is in brackets."""
        return re.sub(r" \([^()]*\)", "", self.title)

    def _title(self) -> str:
        kind, _, share = self.name.partition("_late_")
        low_rank = kind in (LORA, "dora", "samed", "h_sam", "fact")
        base = strategy_text(kind if low_rank else self.name)
        side = str(self.fact("strategy.arguments.side") or "").rpartition(".")[2]
        if self.name == LADDER and side:
            built = self.fact("side_arguments") or {}
            words = [f"{key} {value}" for key, value in built.items() if isinstance(value, (bool, int, float, str))]
            base = f"Ladder ({', '.join([SIDES.get(side, side), *words])} beside SAM)"
        rank, depth = self.fact("strategy.arguments.rank"), self.fact("strategy.arguments.depth")
        decoder = self.fact("strategy.arguments.decoder")
        also = f" + {base} in the decoder" if decoder == "lora" else " + decoder" if decoder is True else ""
        also = " + second decoder" if decoder == "hierarchical" and kind != "h_sam" else also
        also = ", as published" if decoder == "h_sam" else also
        if not low_rank or rank is None:
            return f"{base}, slabs of {depth}{also}" if depth else base + also
        late = f", last {share} % of blocks" if share else ""
        return f"{base}, rank {rank}{late}{also}"

    @property
    def has_network(self) -> bool:
        """Whether a network made the predictions (the box ellipse needs none)."""
        return self.name != BOX_ELLIPSE

    @property
    def is_pico(self) -> bool:
        """Whether the numbers come from pico, the small stand-in of the demo and the tests."""
        return str(self.fact("sam_variant")).startswith("pico")

    @property
    def folders(self) -> list[Path]:
        return [self.folder, *self.others]

    @property
    def kind(self) -> str:
        """Strategy of the card, whatever the row is called."""
        return _strategy_name(self.card) or self.name

    @property
    def training_cases(self) -> int | None:
        """How many cases its weights have learnt from; None where no card tells."""
        record = self.training.get("cases") or self.fact("cases")
        known = record.get("training") if isinstance(record, Mapping) else None
        return len(known) if known else None

    @property
    def is_image(self) -> bool:
        """Whether its cases are 2-D images."""
        return self.fact("label_values") is not None or "reference_px" in self.rows[0]

    @property
    def is_phantom(self) -> bool:
        return bool(self.fact("phantoms")) or "phantom" in str(self.fact("dataset")).lower()

    @property
    def variant(self) -> str:
        """SAM variant of the run: ``pico, not SAM`` where it is pico; of MobileSAM, which file."""
        return sam_text(str(self.fact("sam_variant") or NOT_RECORDED), self.fact("base_sha256"))

    @property
    def sam(self) -> str:
        """Which SAM, for the table: every row of a pico run says so, that of the ellipse too."""
        return self.variant if self.has_network else f"no network (run: {self.variant})"

    @property
    def gate(self) -> float | None:
        """Share g of SAM in the ladder's mix, 0 to 1; None where the strategy has no gate."""
        return self.fact("gate")

    @property
    def split(self) -> str:
        """Which part of the data was evaluated and how the parts were made, as far as recorded."""
        made_by = self.fact("split.by", "split")
        parts = [str(part) for part in (self.fact("settings.section"), made_by) if part]
        return ", ".join(parts) or NOT_RECORDED

    @property
    def prompt_source(self) -> str:
        """Where the boxes came from, spelt out, with the law that they were drawn by or the file that they stand in."""
        source = self.fact("prompt_source")
        if source is None:
            return NOT_RECORDED
        return prompt_text(str(source), self._prompt, self.fact("boxes_sha256"), self.fact("prompts_from"))

    @property
    def _prompt(self) -> dict[str, Any]:
        """Settings of prompts, of boxes and of clicks only where there were some."""
        found = {"loosen": self.fact("prompt_loosen"), **(self.fact("settings.prompt") or {})}
        off = {"box": _CLICKS, "points": _OF_BOXES}.get(str(found.get("kind", "box")), ())
        return {key: value for key, value in found.items() if key not in off}

    @property
    def trainable(self) -> int | None:
        """Number of trainable parameters; 0 where no network is, None when not recorded."""
        return self.fact("trainable_parameters") if self.has_network else 0

    @property
    def seconds(self) -> float | None:
        """Wall-clock seconds of the evaluation's run; None when not recorded, or when there was no network."""
        return self.fact("seconds") if self.has_network else None

    @property
    def training_seconds(self) -> float | None:
        """Wall-clock seconds of the training's run; None when nothing was trained or it is not recorded."""
        return self.training.get("seconds")

    @cached_property
    def seen(self) -> dict[str, list[str]]:
        """Evaluated cases that the weights have met: ``training`` (learnt from) and ``validation`` (chose the epoch).

        Known by the hashed ids in ``cases`` on the card of the run, its weights or its training, else by the section.
        """
        if self.trainable == 0:
            return {}
        record = next((one["cases"] for one in (self.card, self.adapter, self.training) if "cases" in one), None)
        if not isinstance(record, Mapping):
            return {part: self.cases for part in MET if part == self.fact("settings.section")}
        ids = {part: {str(one) for one in record.get(part) or ()} for part in MET}
        met = {part: [case for case in self.cases if case_hash(case) in ids[part]] for part in MET}
        return {part: cases for part, cases in met.items() if cases}

    @property
    def held_out(self) -> bool:
        """Whether nothing says that the weights have met one of the evaluated cases."""
        return not self.seen and self.fact("settings.section") not in MET

    @property
    def warnings(self) -> list[str]:
        """What its cards say against the run: cases that its weights have met, random weights that nothing learnt from,
        a run that did not complete, a class that was predicted empty everywhere."""
        found = [
            f"{self.title}: section validation: {len(cases)} of {len(self.cases)} cases chose the epoch"
            if part == "validation" == self.fact("settings.section")
            else f"{self.title}: {len(cases)} of {len(self.cases)} evaluated cases {MET[part]}: {some(cases)}"
            for part, cases in self.seen.items()
        ]
        if self.has_network and self.trainable == 0 and self.fact("base_sha256") == RANDOM:
            found.append(
                f"{self.title}: SAM's weights are random, and nothing has learnt: its scores are those of noise"
            )
        for what, card in (("evaluation", self.card), ("training", self.training)):
            if card.get("status", "completed") != "completed":
                reason = card.get("error") or card.get("stop_reason")
                found.append(f"{self.title}: {what} is {card['status']}" + (f" ({reason})" if reason else ""))
            if card.get("collapsed_classes"):
                names = ", ".join(map(str, card["collapsed_classes"]))
                found.append(f"{self.title}: predicted empty everywhere in {what}: {names}")
        return found

    @cached_property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(str(row["case"]) for row in self.rows))

    @property
    def boxes(self) -> dict[str, Any]:
        """What decides where its boxes lie: source, file or law; settings that are off are left out."""
        source, settings = self.fact("prompt_source"), self._prompt
        carried = [key for key in settings if key.startswith("carried_") and settings.get("propagate")]
        found = {key: settings.get(key) for key in (*_BOXES.get(str(source), _BOXES_GIVEN), *carried)}
        found = {key: value for key, value in found.items() if (any(value) if isinstance(value, list) else value)}
        if any(key in found for key in ("loosen", "tight", "shift", "inside")):
            found["seed"] = settings.get("seed", 0)
        if source in ("json", "mask"):
            found["file"] = self.fact("boxes_sha256") or settings.get("boxes")
        return {"source": source, **found}

    @cached_property
    def classes(self) -> list[str]:
        return list(dict.fromkeys(str(row["class"]) for row in self.rows))

    def fact(self, *paths: str) -> Any:
        """First of the dotted ``paths`` that the card, then ``metrics.json``, records; None when none does."""
        for source in (self.card, self.metrics):
            for path in paths:
                value: Any = source
                for part in path.split("."):
                    value = value.get(part) if isinstance(value, Mapping) else None
                if value is not None:
                    return value
        return None


def check_runs(runs: Sequence[RunResult]) -> None:
    """Raise BundleError unless there is a run and every run has its own name."""
    if not runs:
        raise BundleError("no run to report; evaluate a bundle first and pass its output folder")
    doubled = [f"{name}: {count} runs" for name, count in Counter(run.name for run in runs).items() if count > 1]
    heading = "runs on one page need different names; give each folder once, or RunResult.load(folder, name=...)"
    raise_all(doubled, BundleError, heading)


def told_apart(runs: Sequence[RunResult], folders: Sequence[Path]) -> list[RunResult]:
    """The runs; where several are of one strategy each with its training seed in name and title, and where that is not
    enough with the name of its folder, and of those above it as far as it takes."""
    counts = Counter(run.name for run in runs)
    found = []
    for run in runs:
        seed = run.training.get("seed", run.fact("seed"))
        if counts[run.name] > 1 and seed is not None and run.name not in (ZERO_SHOT, BOX_ELLIPSE):
            run = replace(run, name=f"{run.name}_seed{seed}", label=f"{run.title}, seed {seed}")
        found.append(run)
    counts = Counter(run.name for run in found)
    places = [folder.absolute() for folder in folders]
    places = [place.parent if place.name == "evaluation" else place for place in places]
    alike = {place for run, place in zip(found, places, strict=True) if counts[run.name] > 1}
    length = next((n for n in range(1, 9) if len({place.parts[-n:] for place in alike}) == len(alike)), 9)
    own = ["_".join(place.parts[-length:]) for place in places]
    return [
        replace(run, name=f"{run.name}_{place}", label=f"{run.title} ({place})") if counts[run.name] > 1 else run
        for run, place in zip(found, own, strict=True)
    ]


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


# What the report reads from a card and its type; other keys are shown as they are.
_TYPES: dict[str, tuple[type, ...]] = {
    "settings": (Mapping,), "settings.prompt": (Mapping,), "cases": (Mapping,), "cases.training": (list,),
    "cases.validation": (list,), "cases_file": (str,), "policy": (str,), "collapsed_classes": (list,),
    "base_sha256": (str,), "settings.section": (str,), "prompt_loosen": (list,), "settings.prompt.loosen": (list,),
    **{f"{name}.{n}": (int, float) for name in ("prompt_loosen", "settings.prompt.loosen") for n in ("0", "1")},
    **{f"settings.prompt.{name}": (int, float) for name in ("tight", "shift", "shrink", "propagate")},
    "side_arguments": (Mapping,), "trainable_parameters": (int,), "gate": (int, float), "seconds": (int, float),
    "voxel_mm": (int, float),
}  # fmt: skip


def _check_types(card: Mapping[str, Any], path: Path) -> None:
    """Raise BundleError naming every value that has another type than this package writes."""
    problems = []
    for name, types in _TYPES.items():
        value: Any = card
        for part in name.split("."):
            inside = value if isinstance(value, Mapping) else dict(zip("01", value)) if isinstance(value, list) else {}  # noqa: B905
            value = inside.get(part)
        if value is not None and (isinstance(value, bool) or not isinstance(value, types)):
            wanted = " or ".join(one.__name__ for one in types)
            problems.append(f"{name}: expected {wanted}, got {fact_text(value)!r} ({type(value).__name__})")
    raise_all(problems, BundleError, f"{path} is no card of this package; evaluate again")


def _strategy_name(card: Mapping[str, Any]) -> str | None:
    """Strategy of a card: a name, a mapping with ``name``, or one with ``_target_`` (``ZeroShot`` -> ``zero_shot``)."""
    strategy = card.get("strategy")
    if isinstance(strategy, Mapping):
        strategy = strategy.get("name") or str(strategy.get("_target_", "")).rpartition(".")[2]
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", str(strategy)).lower() if strategy else None


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, BundleError, "run", "evaluate again")
