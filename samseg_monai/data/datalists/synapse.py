"""From BTCV's abdominal CTs to a datalist with the published 18 training and 12 test cases ("Synapse", TransUNet).

Layout: ``RawData/Training/img/img0001.nii.gz`` and ``label/label0001.nii.gz`` (synapse.org, syn3193805). The case lists
are those of TransUNet's ``lists_Synapse``, which SAMed and SAM-LST use as well; none of them has a validation part.
Its preprocessed slices are understood, too: see ``transunet``.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from samseg_monai.data.datalists.checks import CaseCheck, Summary, check_files, read_all, write_checked
from samseg_monai.data.datalists.label_maps import (
    ABDOMEN,
    BTCV_TESTING,
    BTCV_TRAINING,
    absent_labels,
    coding_hint,
    fitting,
    implausible_sizes,
    labels_in,
)  # fmt: skip
from samseg_monai.data.datalists.splits import Split, shuffled
from samseg_monai.data.datalists.transunet import VOLUMES, is_preprocessed, write_volumes
from samseg_monai.data.files.volumes import stem_of
from samseg_monai.errors import ConfigError, DataError

_LAYOUTS = (".", "Training", "RawData/Training", "Abdomen/RawData/Training", VOLUMES)


def prepare_synapse(
    src: str | Path,
    output: str | Path,
    *,
    label_coding: str = "btcv13",
    validation: int = 0,
    allow_missing: bool = False,
    seed: int = 0,
    **reading: Any,
) -> Summary:
    """Check every published case completely and write a datalist with paths relative to ``src``.

    Args:
        src: folder with ``img`` and ``label``, or ``RawData`` or ``RawData/Training`` above it; or TransUNet's folder
            with ``train_npz`` and ``test_vol_h5``, from which volumes are written into ``src/volumes``.
        output: datalist to write; its cases are called ``case0001`` as in the published lists.
        label_coding: name of the coding that the files are in (``label_maps.ABDOMEN``).
        validation: patients taken out of the training cases, chosen by a hash of seed and id; 0 as published.
        allow_missing: go on without cases of the published lists that are not there.
        seed: of the choice of validation patients.
        reading: ``skip_bad``, ``num_threads``, ``progress``, see ``checks.read_all``; a case needs up to 0.5 GB.

    Raises:
        ConfigError: unknown label coding, or more validation patients than would leave one to train with.
        DataError: no such layout, or all missing and all bad cases at once, among them labels in another coding.
    """
    labels, src = labels_in(label_coding, ABDOMEN), Path(src)
    slices = is_preprocessed(src)
    notes = write_volumes(src, progress=reading.get("progress", True)) if slices else []
    cases = _find_cases(src)
    published = (*BTCV_TRAINING, *BTCV_TESTING)
    missing = sorted(set(published) - set(cases))
    strangers = sorted(set(cases) - set(published))
    checks = [cases[case] for case in published if case in cases]
    if not checks:
        raise DataError(f"{src}: none of the 30 published cases is there (found {', '.join(strangers)})")
    _check_validation(validation, sum(case in BTCV_TRAINING for case in cases))
    absent = [f"no files of the published cases {', '.join(missing)}"] if missing else []
    fix = "; copy them too, or go on without them with --allow-missing"

    others = [] if allow_missing else [text + fix for text in absent]
    read = partial(
        check_files, label="label", legal={0, *ABDOMEN[label_coding]}, hint=partial(_hint, label_coding), modality="CT"
    )
    good, problems = read_all(checks, read, src, judge=lambda _: others, **reading)
    _refuse_narrower_coding(good, src, label_coding)
    voxels = [check.voxels_per_label for check in good]
    odd = [*implausible_sizes(voxels, label_coding), *absent_labels(voxels, ABDOMEN[label_coding])]
    warnings = [
        *notes,
        *(f"case {case} is not one of the 30 published ones: not used" for case in strangers),
        *absent,
        *(f"{text}: is {label_coding} the coding of these files?" for text in odd),
    ]
    header = {"name": "Synapse", "modality": "CT", "scans": ["image"], "labels": labels, "label_coding": label_coding}
    header |= {"distance_unit": "px"} if slices else {}
    made_by = {"by": "published 18/12", "validation": validation, "seed": seed}
    splits = [Split(_split([check.case for check in good], validation, seed), made_by)]
    return write_checked(output, src, good, splits, header=header, patient=str, warnings=warnings, left_out=problems)


def _find_cases(src: Path) -> dict[str, CaseCheck]:
    """Cases by id (four digits), with their files in ``img`` and ``label`` at or below ``src``.

    Raises:
        DataError: no such folders, or no file named ``img<id>`` or ``label<id>`` in them.
    """
    roots = [src / sub for sub in _LAYOUTS if (src / sub / "img").is_dir() and (src / sub / "label").is_dir()]
    if not roots:
        raise DataError(f"{src} holds no folders img and label (looked in {', '.join(_LAYOUTS)}); give BTCV's RawData")
    found: dict[str, dict[str, list[Path]]] = {}
    for folder in ("img", "label"):
        for path in sorted((roots[0] / folder).iterdir()):
            match = re.fullmatch(rf"{folder}(\d{{4}})", stem_of(path) or "")
            if match and not path.is_dir():
                found.setdefault(match[1], {}).setdefault(folder, []).append(path)
    if not found:
        raise DataError(f"{roots[0]}: no file is named like img/img0001.nii.gz and label/label0001.nii.gz")
    cases = {case: CaseCheck(f"case{case}") for case in sorted(found)}
    for case, check in cases.items():
        for kind, folder in (("image", "img"), ("label", "label")):
            absent = f"no file {folder}/{folder}{case}.nii.gz"
            paths = found[case].get(folder, [])
            several = f"several files: {', '.join(path.name for path in paths)}; keep one"
            check.take(kind, paths, absent=absent, several=several)
    return cases


def _hint(label_coding: str, check: CaseCheck, strange: list[int]) -> str:
    advice = coding_hint({*check.voxels_per_label}, label_coding)
    return f"; {advice}" if advice else ""


def _refuse_narrower_coding(checks: list[CaseCheck], src: Path, label_coding: str) -> None:
    """Thirteen labels of which none exceeds 8 are one of the tables of eight organs: legal, and all of it wrong."""
    present = {value for check in checks for value in check.voxels_per_label}
    if label_coding == "btcv13" and present != {0} and "samed" in fitting(present):
        raise DataError(
            f"{src}: no label exceeds {max(present)}, which is never so in {label_coding}: "
            f"{coding_hint(present, label_coding)}"
        )


def _split(cases: list[str], validation: int, seed: int) -> dict[str, list[str]]:
    training = [case for case in cases if case.removeprefix("case") in BTCV_TRAINING]
    _check_validation(validation, len(training))
    chosen = set(shuffled(training, seed=seed)[:validation])
    return {
        "training": [case for case in training if case not in chosen],
        "validation": [case for case in training if case in chosen],
        "testing": [case for case in cases if case.removeprefix("case") in BTCV_TESTING],
    }


def _check_validation(validation: int, training: int) -> None:
    if not 0 <= validation < max(1, training):
        raise ConfigError(
            f"validation patients are taken out of the {training} training cases: expected 0 to "
            f"{max(0, training - 1)}, got {validation}"
        )
