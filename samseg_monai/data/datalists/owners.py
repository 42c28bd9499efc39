"""Which cases of an archive's export are one patient's, by tags and folders; patients whose names look the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

_DATE = re.compile(r"(19|20)\d\d([-_.]?[01]\d([-_.]?[0-3]\d)?)?")
_SHOWN = 5


def few(names: Iterable[str]) -> str:
    """The first of some names, for a message."""
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (" ..." if len(listed) > _SHOWN else "")


def alike(names: Iterable[str]) -> list[str]:
    """A warning where patients differ only in the case of letters; empty where none do."""
    forms: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        forms.setdefault(name.casefold(), []).append(name)
    found = [" and ".join(map(repr, same)) for same in forms.values() if len(same) > 1]
    text = "patients that differ only in upper and lower case are split as two; if they are one, call them the same"
    return [f"{text}: {few(found)}"] if found else []


def top_folders(src: Path, homes: Mapping[str, Path]) -> dict[str, str]:
    """Case -> the top folder that may be a patient's: below folders that hold all cases or are called like dates.

    Where the series of exams lie side by side in ``src`` itself, no folder joins them.
    """
    parts = {case: home.relative_to(src).parts for case, home in homes.items()}
    depth = 0
    while parts and all(len(part) > depth + 1 for part in parts.values()):
        names = {part[depth] for part in parts.values()}
        if len(names) > 1 and not all(_DATE.fullmatch(name) for name in names):
            break
        depth += 1
    return {case: "/".join(part[: depth + 1]) or f"alone {case}" for case, part in parts.items()}


def owners_of(ids: Mapping[str, str], tops: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Which cases share a patient: those of one PatientID, and those of one top folder.

    Args:
        ids, tops: case -> PatientID, or "" for none, and the top folder; the order of ``ids`` is that of names.
    Returns: case -> name of its patient's first case, as ids stay where they are; warnings where the two differ.
    """
    by_id, by_top = _grouped(ids), _grouped(tops)
    missing = by_id.pop("", [])
    deeper = any("/" in top for top in tops.values())  # these may be the exams of one patient, whose id is no dummy
    if len(by_top) > 1 and (not by_id or (len(by_id) == 1 and not missing and not deeper)):
        what = "no case has a PatientID" if missing else "all cases have the same PatientID"
        taken = f"{what}: each top folder is taken for a patient: {few(by_top)}"
        return {case: by_top[tops[case]][0] for case in ids}, [taken]
    several = [members for members in by_top.values() if len({ids[case] for case in members} - {""}) > 1]
    partly = [members for members in by_top.values() if len(members) > 1 and any(not ids[case] for case in members)]
    spread = {number: members for number, members in by_id.items() if len({tops[case] for case in members}) > 1}
    owners = _joined(ids, [*by_id.values(), *by_top.values()])
    kept = "the split keeps them together; if they are not one patient's, give a --table of case and patient"
    if len(by_id) > 1 and len(set(owners.values())) == 1:
        alone = _grouped({case: tops[case] for case in missing})
        owners = _joined(ids, [*by_id.values(), *alone.values()])
        kept = "together they would join all cases, so that only a PatientID does; give a --table of case and patient"
    notes = [f"a top folder with several PatientIDs: {few(members)}: {kept}" for members in several]
    notes += [f"a top folder with cases that have no PatientID: {few(members)}: {kept}" for members in partly]
    notes += [
        f"PatientID {number!r} is in {count} top folders, as a dummy would be: {few(members)}: {kept}"
        if (count := len({tops[case] for case in members})) > 2
        else f"one PatientID in 2 top folders: {few(members)}: {kept}"
        for number, members in spread.items()
    ]
    if lone := [case for case in missing if len(by_top[tops[case]]) == 1]:
        notes.append(f"no PatientID: {few(lone)}: each is split as a patient of its own; a --table tells better")
    return owners, notes


def _grouped(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Value -> the cases that have it."""
    found: dict[str, list[str]] = {}
    for case, value in values.items():
        found.setdefault(value, []).append(case)
    return found


def _joined(cases: Iterable[str], groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """Case -> the first, by name, of all cases that groups with common members join it to."""
    above = {case: case for case in cases}  # each case, or one before it that it is joined to

    def first(case: str) -> str:
        while above[case] != case:
            above[case] = above[above[case]]
            case = above[case]
        return case

    for members in groups:
        met = {first(case) for case in members}
        above.update(dict.fromkeys(met, min(met)))
    return {case: first(case) for case in above}
