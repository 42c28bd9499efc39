"""Which cases train, validate and test: drawn by patient, cut in order, in folds, or read from a split file."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samseg_monai.errors import ConfigError, DataError, raise_all
from samseg_monai.files import read_json

SECTIONS = ("training", "validation", "testing")
DEFAULT_FRACTIONS = (0.7, 0.1, 0.2)


def split_by_patient(
    patients: Mapping[str, str], fractions: Sequence[float] = DEFAULT_FRACTIONS, *, seed: int = 0
) -> dict[str, list[str]]:
    """Split cases so that all cases of a patient share a section.

    Patients are ordered by a hash of seed and id: the order depends on no library, and adding patients leaves the
    order of the others unchanged.

    Args:
        patients: case -> patient.
        fractions: of patients, for training, validation, testing; they must sum to 1. A fraction of 0 leaves its
            section empty, any other gets at least one patient.
        seed: another seed, another split.

    Raises:
        DataError: fractions are not three non-negative numbers with sum 1, or there are too few patients.
    """
    order = shuffled(patients.values(), seed=seed)
    blocks = split_in_order(order, section_counts(len(order), fractions))
    section_of = {patient: section for section, block in blocks.items() for patient in block}
    split: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for case in sorted(patients):
        split[section_of[patients[case]]].append(case)
    return split


def shuffled(names: Iterable[str], *, seed: int = 0) -> list[str]:
    """Distinct ``names`` in the order of a hash of seed and name: no library and no other name changes it."""
    return sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())


def split_in_order(names: Sequence[str], counts: Sequence[int]) -> dict[str, list[str]]:
    """Consecutive blocks of ``names`` for training, validation and testing.

    Raises:
        DataError: not three counts >= 0 that sum to the number of names.
    """
    if len(counts) != 3 or min(counts) < 0 or sum(counts) != len(names):
        raise DataError(
            f"a split of {len(names)} cases needs three counts >= 0 with that sum (for {', '.join(SECTIONS)}), "
            f"got {', '.join(map(str, counts))} with sum {sum(counts)}"
        )
    ends = [sum(counts[: n + 1]) for n in range(3)]
    return {s: list(names[end - n : end]) for s, n, end in zip(SECTIONS, counts, ends, strict=True)}


def section_counts(total: int, fractions: Sequence[float]) -> list[int]:
    """Sizes of the three sections by largest remainders, at least 1 for every fraction that is not 0.

    Raises:
        DataError: fractions are not three non-negative numbers with sum 1, or ``total`` is too small for them.
    """
    fractions = tuple(float(f) for f in fractions)
    if len(fractions) != 3 or not min(fractions) >= 0 or not abs(sum(fractions) - 1) <= 1e-6:  # NaN is neither
        raise DataError(f"fractions must be three numbers >= 0 with sum 1 (for {', '.join(SECTIONS)}), got {fractions}")
    wanted = sum(f > 0 for f in fractions)
    if total < wanted:
        raise DataError(
            f"{total} patients cannot fill {wanted} sections; set fractions to 0 for some, such as 0.5,0.5,0"
        )
    shares = [total * f for f in fractions]
    counts = [max(int(share + 1e-9), 1 if share > 0 else 0) for share in shares]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        gaps = [step * (share - count) for share, count in zip(shares, counts, strict=True)]
        open_to = [i for i, f in enumerate(fractions) if f > 0 and counts[i] + step >= 1]
        counts[max(open_to, key=lambda i: gaps[i])] += step
    return counts


@dataclass(frozen=True)
class Split:
    """Section -> names of cases, and what a datalist says of how they were chosen."""

    sections: Mapping[str, Sequence[str]]
    made_by: Mapping[str, Any]


def choose_splits(
    good: Mapping[str, str],
    everyone: Mapping[str, str],
    *,
    split_file: str | Path | None = None,
    fractions: Sequence[float] | None = None,
    folds: int | None = None,
    seed: int = 0,
    what: str = "patient",
) -> tuple[list[Split], list[str]]:
    """Split by a file, into folds, or by fractions of the patients.

    The file is a JSON object with lists of cases or patients under the section names; another datalist works too.

    Args:
        good: case -> patient, of the usable cases.
        everyone: the same of all cases, which a file may name.
        split_file, folds, fractions: one of them at most; see ``split_by_patient`` and ``split_in_folds``.
        seed: of the order of patients.
        what: how messages call a patient.

    Returns: one split, or as many as folds; the cases that a file does not name, as warnings.

    Raises:
        ConfigError: several of the three.
        DataError: as ``split_by_patient``; a file that is no JSON object with a section, every unknown name in it, and
            every patient that is in two sections.
    """
    check_one_split(split_file=split_file, fractions=fractions, folds=folds)
    if folds is not None:
        parts = split_in_folds(good, folds, seed=seed)
        made_by = {"by": what, "seed": seed, "folds": folds}
        return [Split(part, {**made_by, "fold": number}) for number, part in enumerate(parts, 1)], []
    if split_file is None:
        fractions = DEFAULT_FRACTIONS if fractions is None else fractions
        made_by = {"by": what, "seed": seed, "fractions": list(fractions)}
        return [Split(split_by_patient(good, fractions, seed=seed), made_by)], []
    split = _read_split(Path(split_file), everyone, what)
    named = {case for members in split.values() for case in members}
    unused = [f"{case}: not named by the split file, not used" for case in everyone if case not in named]
    kept = {section: [case for case in cases if case in good] for section, cases in split.items()}
    return [Split(kept, {"by": "file", "file": Path(split_file).name})], unused


def check_one_split(**ways: Any) -> None:
    """Raise ConfigError where more than one way of splitting is not None; they are called like the options."""
    given = [f"--{name.replace('_', '-')}" for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: each says how to split; give one of them")


def split_in_folds(patients: Mapping[str, str], folds: int, *, seed: int = 0) -> list[dict[str, list[str]]]:
    """Cross-validation by patient: every case is tested in one fold, with a network whose epoch others chose.

    In fold k the k-th part of the patients tests, the next one validates, and the rest trains.

    Args:
        patients: case -> patient.
        folds: at least 3.
        seed: of the order of patients.

    Raises:
        ConfigError: fewer than three folds.
        DataError: fewer patients than folds.
    """
    if folds < 3:
        raise ConfigError(f"--folds {folds}: one part tests, one validates, the rest trains; give at least 3")
    order = shuffled(patients.values(), seed=seed)
    if len(order) < folds:
        raise DataError(f"{len(order)} patients cannot fill {folds} folds; give fewer folds")
    place = {patient: number % folds for number, patient in enumerate(order)}
    splits = []
    for fold in range(folds):
        section_of = {fold: "testing", (fold + 1) % folds: "validation"}
        split: dict[str, list[str]] = {section: [] for section in SECTIONS}
        for case in sorted(patients):
            split[section_of.get(place[patients[case]], "training")].append(case)
        splits.append(split)
    return splits


def _read_split(path: Path, patients: Mapping[str, str], what: str) -> dict[str, list[str]]:
    content = read_json(path, DataError, "split file", f"expected lists under {', '.join(SECTIONS)}")
    if not any(section in content for section in SECTIONS):
        raise DataError(f"split file {path}: expected a JSON object with lists under {', '.join(SECTIONS)}")
    by_patient: dict[str, list[str]] = {}
    for case, patient in patients.items():
        by_patient.setdefault(patient, []).append(case)
    split: dict[str, dict[str, None]] = {section: {} for section in SECTIONS}  # each case once, in the file's order
    homes: dict[str, list[str]] = {}
    problems = []
    for section in SECTIONS:
        entries = content.get(section, [])
        if not isinstance(entries, list):
            problems.append(f"{section}: expected a list of names, got a {type(entries).__name__}")
            continue
        for entry in entries:
            name = unicodedata.normalize("NFC", str(entry.get("case", entry) if isinstance(entry, dict) else entry))
            members = [name] if name in patients else by_patient.get(name, [])
            if not members:
                problems.append(f"{section}: unknown case or {what} {name}")
            split[section].update(dict.fromkeys(members))
            homes.setdefault(patients[members[0]] if members else name, []).append(section)
    problems += in_two_sections(homes, what)
    raise_all(problems, DataError, f"split file {path} does not fit the cases")
    return {section: list(cases) for section, cases in split.items()}


def in_two_sections(homes: Mapping[str, Sequence[str]], what: str) -> list[str]:
    """One sentence for each name whose sections in ``homes`` are not one and the same."""
    found = {name: list(dict.fromkeys(sections)) for name, sections in homes.items()}
    return [f"{what} {name} is in {' and '.join(sections)}" for name, sections in found.items() if len(sections) > 1]
