"""Which cases train, validate and test: drawn by patient, cut in order, or read from a split file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from samseg_monai.errors import DataError, raise_all
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
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
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


def choose_split(
    good: Mapping[str, str],
    everyone: Mapping[str, str],
    split_file: str | Path | None,
    fractions: Sequence[float],
    seed: int,
    *,
    what: str = "patient",
) -> tuple[dict[str, list[str]], list[str], dict[str, Any]]:
    """Split by a file where there is one, else by fractions of the patients.

    The file is a JSON object with lists of cases or patients under the section names; another datalist works too.

    Args:
        good: case -> patient, of the usable cases.
        everyone: the same of all cases, which a file may name.
        split_file, fractions, seed: see ``split_by_patient``.
        what: how messages call a patient.

    Returns: section -> usable cases; the cases that a file does not name, as warnings; what the datalist says of it.

    Raises:
        DataError: as ``split_by_patient``; a file that is no JSON object with a section, every unknown name in it, and
            every patient that is in two sections.
    """
    if split_file is None:
        made_by = {"by": what, "seed": seed, "fractions": list(fractions)}
        return split_by_patient(good, fractions, seed=seed), [], made_by
    split = _read_split(Path(split_file), everyone, what)
    named = {case for members in split.values() for case in members}
    unused = [f"{case}: not named by the split file, not used" for case in everyone if case not in named]
    kept = {section: [case for case in cases if case in good] for section, cases in split.items()}
    return kept, unused, {"by": "file", "file": Path(split_file).name}


def _read_split(path: Path, patients: Mapping[str, str], what: str) -> dict[str, list[str]]:
    content = read_json(path, DataError, "split file", f"expected lists under {', '.join(SECTIONS)}")
    if not any(section in content for section in SECTIONS):
        raise DataError(f"split file {path}: expected a JSON object with lists under {', '.join(SECTIONS)}")
    by_patient: dict[str, list[str]] = {}
    for case, patient in patients.items():
        by_patient.setdefault(patient, []).append(case)
    split: dict[str, list[str]] = {section: [] for section in SECTIONS}
    homes: dict[str, list[str]] = {}
    problems = []
    for section in SECTIONS:
        entries = content.get(section, [])
        if not isinstance(entries, list):
            problems.append(f"{section}: expected a list of names, got a {type(entries).__name__}")
            continue
        for entry in entries:
            name = str(entry.get("case", entry) if isinstance(entry, dict) else entry)
            members = [name] if name in patients else by_patient.get(name, [])
            if not members:
                problems.append(f"{section}: unknown case or {what} {name}")
            split[section] += [case for case in members if case not in split[section]]
            homes.setdefault(patients[members[0]] if members else name, []).append(section)
    problems += in_two_sections(homes, what)
    raise_all(problems, DataError, f"split file {path} does not fit the cases")
    return split


def in_two_sections(homes: Mapping[str, Sequence[str]], what: str) -> list[str]:
    """One sentence for each name whose sections in ``homes`` are not one and the same."""
    found = {name: list(dict.fromkeys(sections)) for name, sections in homes.items()}
    return [f"{what} {name} is in {' and '.join(sections)}" for name, sections in found.items() if len(sections) > 1]
