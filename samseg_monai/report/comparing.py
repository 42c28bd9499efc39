"""Whether two runs may be compared: everything but the method has to be equal, and what is not is named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from samseg_monai.report.names import ZERO_SHOT, fact_text
from samseg_monai.report.runs import RunResult, some

_POST = ("prediction_transforms", "postprocessing")  # overridden parts of a config
_LESIONS = "rules of lesions"


class Unequal(NamedTuple):
    """Two runs that are not compared, and what differs between them."""

    run: RunResult
    base: RunResult
    what: list[str]

    @property
    def text(self) -> str:
        """One line for readers."""
        return f"{self.run.title} and {self.base.title} are not compared; they differ in {'; '.join(self.what)}"


def unequal(runs: Sequence[RunResult], base: str = ZERO_SHOT) -> list[Unequal]:
    """Every run that cannot be compared with that called ``base`` or, without such a row, with the first."""
    base_run = next((run for run in runs if run.name == base), runs[0])
    found = [Unequal(run, base_run, what_differs(run, base_run)) for run in runs if run is not base_run]
    return [one for one in found if one.what]


def what_differs(run: RunResult, base: RunResult) -> list[str]:
    """What forbids a difference of two runs, a text for each; empty where one means something.

    Compared are the data (hash of the datalist), section, cases and classes, boxes, policy for empty masks, regions,
    rules of lesion-wise scores, what is done to predictions afterwards, and whether with int8; and weights must not
    have learnt from the cases. What neither card records is taken to be equal.
    """
    pairs = {key: (value, _conditions(base)[key]) for key, value in _conditions(run).items()}
    found = [
        f"{key} ({_short(one)} against {_short(other)})"
        for key, (one, other) in pairs.items()
        if one != other and not (key == _LESIONS and None in (one, other))
    ]
    if run.boxes != base.boxes:
        one, other = run.prompt_source, base.prompt_source
        if one == other:
            keys = [key for key in {**run.boxes, **base.boxes} if run.boxes.get(key) != base.boxes.get(key)]
            one, other = (", ".join(f"{key} {_short(of.boxes.get(key, 'off'))}" for key in keys) for of in (run, base))
        found.append(f"boxes ({one} against {other})")
    if set(run.classes) != set(base.classes):
        found.append(f"classes ({some(run.classes)} against {some(base.classes)})")
    for this, that in ((run, base), (base, run)):
        its = set(this.cases)
        if absent := [case for case in that.cases if case not in its]:
            found.append(f"cases ({this.title} lacks {some(absent)})")
        if learnt := this.seen.get("training"):
            found.append(f"training ({this.title} learnt from {len(learnt)} of these cases)")
    return found


def _conditions(run: RunResult) -> dict[str, Any]:
    settings = run.fact("settings") or {}
    changed = {key: value for key, value in settings.items() if key.startswith(_POST)}
    return {
        "data": run.fact("data_hash"),
        "data set": run.fact("dataset"),
        "section": settings.get("section"),
        "policy for empty masks": run.fact("policy", "settings.policy"),
        "regions": settings.get("regions") or "off",
        "smallest component kept": settings.get("min_component_mm3") or "off",
        "post-processing": changed or "as built",
        "precision": "int8" if run.fact("precision") == "int8" else "as trained",
        _LESIONS: settings.get("lesions") if settings.get("lesion_wise") else None,
    }


def _short(value: Any) -> str:
    """A fact of a line that tells a difference; of a hash its beginning."""
    text = fact_text(value)
    return text[:8] if re.fullmatch("[0-9a-f]{64}", text) else text
