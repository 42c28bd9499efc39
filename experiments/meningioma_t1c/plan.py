"""Read the plan: runs in their order, cases and boxes of each fold, and the settings that a bundle is run with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samseg_monai.data.datalists import write_datalist
from samseg_monai.errors import ConfigError, raise_all

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results" / HERE.name
KINDS = ("meningioma", "glioma", "pituitary")
LABELS = {"0": "background", "255": "tumour"}


@dataclass(frozen=True)
class Run:
    """One training (or none) of a row on one fold with one seed; ``fold`` is 0 to 3, or "all" (transfer)."""

    row: Mapping[str, Any]
    fold: int | str
    seed: int
    name: str
    training: Mapping[str, Any]  # settings of train.json alone; empty where nothing learns
    search: bool = False  # a learning rate is tried: validation slices only

    @property
    def file(self) -> str:
        """Name of its result, below the folder of results, without suffix."""
        return f"{'search/' if self.search else ''}{self.name}_fold{self.fold}_seed{self.seed}"

    @property
    def prompted(self) -> bool:
        """Whether its network takes boxes."""
        return bool(self.row.get("boxes", True))


def read(name: str) -> Any:
    """A JSON file of this folder."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def runs_of(plan: Mapping[str, Any]) -> list[Run]:
    """All runs of the rows: every row with its first seed comes before any with its second; fold "all" has one."""
    found = [
        (number, Run(row, fold, seed, row["name"], _training(plan, row, fold)))
        for row in plan["rows"]
        for fold in row["folds"]
        for number, seed in enumerate(row["seeds"][: 1 if fold == "all" else None])  # one bundle is packed
    ]
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def searches_of(plan: Mapping[str, Any]) -> list[Run]:
    """All tries of learning rates."""
    rows = {row["name"]: row for row in plan["rows"]}
    return [
        Run(
            rows[one["row"]],
            one["fold"],
            one["seed"],
            f"{one['row']}_lr{one['training']['lr']:g}",
            {**_training(plan, rows[one["row"]], one["fold"]), **one["training"]},
            search=True,
        )
        for one in plan["search"]
    ]


def wanted(plan: Mapping[str, Any], rows: Sequence[str] | None, shard: str, *, search: bool) -> list[Run]:
    """The runs, or the tries, of the named rows (None: all); of these every N-th from the I-th on for shard "I/N".

    Raises:
        ConfigError: no such row.
    """
    known = [row["name"] for row in plan["rows"]]
    raise_all([row for row in rows or () if row not in known], ConfigError, f"no such rows; there are {known}")
    runs = [run for run in (searches_of(plan) if search else runs_of(plan)) if run.row["name"] in (rows or known)]
    start, step = map(int, shard.split("/"))
    return runs[start::step]


def _training(plan: Mapping[str, Any], row: Mapping[str, Any], fold: int | str) -> dict[str, Any]:
    if "training" not in row:
        return {}
    whole = {**row.get("final", {}), "val_interval": 0} if fold == "all" else {}
    return {**plan["training"], **row["training"], **whole}


def overrides_of(plan: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Settings of both train.json and evaluate.json, all but those of places."""
    sam = plan["sam"] if run.row.get("sam", True) else {}
    return {**plan["shared"], **sam, **run.row["overrides"], "seed": run.seed}


def settings_of(plan: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """All that the plan sets for a run; recorded with its results, so that a later plan can be told from theirs."""
    return {**overrides_of(plan, run), **run.training}


def outdated(plan: Mapping[str, Any], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Results that the plan does not have, or has with other settings."""
    known = {(run.name, run.fold, run.seed): settings_of(plan, run) for run in runs_of(plan)}
    return [
        f"{one['row']}_fold{one['fold']}_seed{one['seed']}"
        for one in facts
        if known.get((one["row"], one["fold"], one["seed"])) != one["settings"]
    ]


def sections_of(fold: int | str, folds: Mapping[str, Any] | None = None) -> dict[str, list[str]]:
    """Cases of each section. Fold "all" trains on all meningiomas and is tested on the two other kinds of tumour."""
    folds = folds or read("folds.json")
    if fold != "all":
        return dict(folds["folds"][fold])
    others = [case for kind in KINDS[1:] for case in read(f"boxes/{kind}_tight.json")]
    return {"training": [c for block in folds["blocks"].values() for c in block], "validation": [], "testing": others}


def block_names(folds: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Case -> name of its block; cases of the other kinds are their own blocks (their patients are unknown, too)."""
    folds = folds or read("folds.json")
    return {case: name for name, cases in folds["blocks"].items() for case in cases}


def write_inputs(work: Path, fold: int | str) -> Path:
    """Write the datalist of a fold and the box file of each law (all kinds in one) below ``work``.

    Returns:
        The datalist. Distances are in pixels: no spacing is given.
    """
    blocks = block_names()
    items = {
        section: [
            {
                "case": case,
                "patient": blocks.get(case, case),
                "image": f"images/{case}.png",
                "label": f"labels/{case}.png",
                "reference": f"labels/{case}.png",
            }
            for case in cases
        ]
        for section, cases in sections_of(fold).items()
    }
    header = {"kind": "images", "spacing_mm": None, "distance_unit": "px", "labels": LABELS, "scans": ["image"]}
    path = work / "datalists" / f"fold_{fold}.json"
    write_datalist({"name": "brain_tumour_t1c", **header, **items}, path)
    for law in read("plan.json")["boxes"]:
        files = [f"boxes/{law}.json", *(f"boxes/{kind}_{law}.json" for kind in KINDS[1:])]
        target = box_file(work, law)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({k: v for file in files for k, v in read(file).items()}), encoding="utf-8")
    return path


def box_file(work: Path, law: str) -> Path:
    """Where `write_inputs` puts the boxes of one law."""
    return work / "boxes" / f"{law}.json"


def evaluations_of(plan: Mapping[str, Any], run: Run) -> Iterator[tuple[str, str, str]]:
    """Section, law of the boxes and weights of each evaluation; "none" where there are no boxes, or no training.

    Validation slices are scored with loose boxes and the best epoch's weights, to choose a row by; a try of a learning
    rate sees no test slice.
    """
    laws = plan["boxes"] if run.prompted else ["none"]
    loose = "loose" if run.prompted else "none"
    kinds = ["none"] if not run.training else ["last"] if run.fold == "all" else ["best", "last"]
    if run.fold != "all":
        yield from (("validation", loose, weights) for weights in (kinds if run.search else kinds[:1]))
    if not run.search:
        yield from (("testing", law, weights) for weights in kinds for law in laws)
