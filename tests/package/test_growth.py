"""Twice as many cases take twice the work, wherever the package goes over all of them: operations are counted.

Seconds would tell as much on a quiet machine only; ``benchmarks/growth.py`` takes them.
"""

import errno
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pydicom
import pytest

from samseg_monai.data.datalists import images, layouts
from samseg_monai.data.datalists.checks import CaseCheck, labelled
from samseg_monai.data.datalists.owners import owners_of
from samseg_monai.data.datalists.splits import choose_splits
from samseg_monai.data.files import case_list, pacs
from samseg_monai.data.files.case_list import CaseList
from samseg_monai.data.files.cases import find_cases
from samseg_monai.data.files.drawn_boxes import boxes_from_masks
from samseg_monai.handlers.predictions import TABLE, PredictionTable
from samseg_monai.report import comparing
from samseg_monai.report.runs import RunResult
from tests.data.test_dicom import write_series

MOST = 2.3  # times the work of half as many: linear but for the logarithm of sorting
N = 40


class Name(str):
    """A name that counts how often it is compared or hashed: what looks through a list of names for each name."""

    asked = 0

    def __eq__(self, other):
        Name.asked += 1
        return str.__eq__(self, other)

    def __hash__(self):
        Name.asked += 1
        return str.__hash__(self)


def asked(run):
    before = Name.asked
    run()
    return Name.asked - before


def calls(run):
    """Calls of functions, in Python or not."""
    count = 0

    def note(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    other = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(other)
    return count


def linear(few, many):
    assert few > 0 and many <= MOST * few, (few, many)


def names(count, kind=str):
    return [kind(f"case-{n:03d}") for n in range(count)]


@pytest.fixture
def listed(monkeypatch):
    """Number of entries of folders that were listed so far."""
    seen, real = [0], Path.iterdir

    def iterdir(self):
        for path in real(self):
            seen[0] += 1
            yield path

    monkeypatch.setattr(Path, "iterdir", iterdir)
    return seen


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(1, 9, (4, 4, 2)).astype(np.uint8)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


def test_cases_without_a_label_are_left_out():
    def run(count):
        checks = [CaseCheck(case, {"image": Path("a")}) for case in names(count, Name)]
        for check in checks[::2]:
            check.files["label"] = Path("b")
        return asked(lambda: labelled(checks, "label", Path("src")))

    linear(run(N), run(2 * N))


def test_a_split_file_names_patients(tmp_path):
    def run(count):
        cases = names(count, Name)
        everyone = {case: f"P{case}" for case in cases}
        split = {"training": [f"P{case}" for case in cases]}
        (tmp_path / "split.json").write_text(json.dumps(split))
        return asked(lambda: choose_splits(everyone, everyone, split_file=tmp_path / "split.json"))

    linear(run(N), run(2 * N))


def test_patients_are_joined_by_tags_and_folders():
    """Two exams of each patient in two top folders: every group joins two cases."""

    def run(count):
        cases = names(count, Name)
        ids, tops = ({case: f"{n // 2}" for n, case in enumerate(cases)}, {case: case for case in cases})
        found, _ = owners_of(ids, tops)
        assert [found[case] for case in cases] == [cases[n // 2 * 2] for n in range(count)]
        return asked(lambda: owners_of(ids, tops))

    linear(run(N), run(2 * N))


def test_patients_are_joined_in_chains():
    ids = {"a": "1", "b": "1", "c": "2", "d": "2", "e": "3", "f": "4"}
    owners, notes = owners_of(ids, {"a": "x", "b": "y", "c": "y", "d": "z", "e": "w", "f": "v"})
    assert owners == {"a": "a", "b": "a", "c": "a", "d": "a", "e": "e", "f": "f"} and len(notes) == 3


def test_labels_of_an_export_are_looked_for(tmp_path, monkeypatch):
    class Sorter:
        def __init__(self, rules, found, *, links):
            self.found, self.patients = found, {}

        def take(self, src, folders):
            for folder in folders:
                self.found.files[folder.name] = [folder / "series"]
                self.patients[folder.name] = ("", folder.name)

    monkeypatch.setattr(layouts, "Sorter", Sorter)

    def run(count):
        src = tmp_path / str(count)
        for case in names(count):
            (src / case / "series").mkdir(parents=True)
            (src / case / "seg.nii").touch()
        found = layouts.find_layout(src, scans={"t1": ""})
        assert all("label" in check.files for check in found.cases.values())
        return calls(lambda: layouts.find_layout(src, scans={"t1": ""}))

    linear(run(N), run(2 * N))


def test_masks_of_2d_images_are_matched(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "composed", Name)

    def run(count):
        for case in names(count):
            for place, name in (("images", f"{case}.png"), ("masks", f"{case}_mask.png")):
                (tmp_path / place).mkdir(exist_ok=True)
                (tmp_path / place / name).touch()
        found, _ = images._find_pairs(tmp_path / "images", tmp_path / "masks", None)
        assert [sorted(check.files) for check in found] == [["image", "label"]] * count
        return asked(lambda: images._find_pairs(tmp_path / "images", tmp_path / "masks", None))

    linear(run(N), run(2 * N))


def test_masks_are_found_for_images_and_images_for_masks(tmp_path, listed):
    def run(count):
        place = tmp_path / str(count)
        for n, case in enumerate(names(count)):
            save(place / "images" / f"{case}.nii", n)
            save(place / "masks" / f"{case}_seg.nii", n)
        listed[0] = 0
        found = find_cases(place / "images", scans=["ct"], prompts=place / "masks")
        assert [Path(item["prompt"]).name for item in found.good] == [f"{case}_seg.nii" for case in names(count)]
        prompts, listed[0] = listed[0], 0
        drawn = boxes_from_masks([place / "masks"], images=place / "images")
        assert list(drawn.boxes) == names(count) and not drawn.bad
        return prompts, listed[0]

    for few, many in zip(run(6), run(12), strict=True):
        linear(few, many)


def test_of_two_masks_in_a_folder_the_first_by_name_is_taken(tmp_path):
    save(tmp_path / "images" / "a.nii")
    for name in ("a_seg.nii.gz", "a-seg.nii", "a/a.nii"):
        save(tmp_path / "masks" / name)
    taken = find_cases(tmp_path / "images", scans=["ct"], prompts=tmp_path / "masks").good[0]["prompt"]
    assert Path(taken).name == "a-seg.nii"


def test_other_scans_of_cases_are_told_from_cases(tmp_path):
    from samseg_monai.data.files.cases import _group_named

    def run(count):
        cases = [case for case in names(count) for _ in range(2)]
        files = [tmp_path / f"{case}-{('t1c', 't1n')[n % 2]}.nii" for n, case in enumerate(cases)]
        found = CaseList()
        work = calls(lambda: _group_named(files, ["t1c"], found))
        assert sorted(found.files) == names(count) and not found.bad
        assert len(found.passed["scans that the network does not use"]) == count
        return work

    linear(run(N), run(2 * N))


def test_exams_get_names_and_series_are_passed_over():
    def run(count):
        exams, series = {}, []
        for n, case in enumerate(names(count)):
            tags = pydicom.Dataset()
            tags.StudyInstanceUID, tags.SeriesInstanceUID, tags.SeriesDescription = "1.2", f"1.2.{n}", "T1"
            one = pacs.Series(files=[Path(f"/d/{case}/x/1.dcm")], folders=[Path(f"/d/{case}/x")], tags=tags)
            exams["", "", str(n)] = [one]
            series.append(one)
        sorter = pacs.Sorter(pacs.rules_of(None, ["t1n"]), CaseList())
        assert sorter._names(Path("/d"), exams) == names(count)
        assert len(sorter._beside(series)) == count  # no place in the patient
        return calls(lambda: sorter._names(Path("/d"), exams)), calls(lambda: sorter._beside(series))

    for few, many in zip(run(N), run(2 * N), strict=True):
        linear(few, many)


def test_series_share_a_folder(tmp_path, monkeypatch):
    """An archive's export in one folder: its files are looked at a few times, not once for each series."""
    looked, real = [0], pacs.is_dicom

    def is_dicom(path):
        looked[0] += 1
        return real(path)

    monkeypatch.setattr(pacs, "is_dicom", is_dicom)

    def run(count):
        place = tmp_path / str(count)
        for n in range(count):
            array = np.full((4, 4, 2), n, np.int16) + np.arange(2, dtype=np.int16)
            tags = {"0020|000d": f"1.2.{n}", "0020|000e": f"1.2.{n}.1", "0010|0020": f"P{n}"}
            write_series(place / "new", array, tags=tags)
            for path in (place / "new").iterdir():
                path.rename(place / f"{n}{path.name}")
        (place / "new").rmdir()
        looked[0] = 0
        assert len(find_cases(place, scans=["image"]).good) == count
        return looked[0]

    linear(run(4), run(8))


class Results:
    """Stands for an evaluator: writes a file for each case, and every fourth case fails."""

    def __init__(self, cases, folder):
        self.cases, self.folder = cases, folder

    def run(self):
        for n, item in enumerate(list(self.cases.good)):
            if n % 4 == 3:
                self.cases.fail(item["case"], "odd")
            else:
                (self.folder / f"{item['case']}_seg.nii").touch()


def test_results_belong_to_cases_and_bad_ones_are_set_aside(tmp_path):
    def run(count):
        cases, folder = CaseList(), tmp_path / str(count)
        cases.good = [{"case": case} for case in names(count)]
        work = calls(lambda: cases.run(Results(cases, folder), folder))
        assert sorted(cases.bad) == names(count)[3::4] and len(cases.good) == count - len(cases.bad)
        return work

    linear(run(N), run(2 * N))
    of = case_list._owner
    assert of("a_b_seg.nii.gz", {"a_", "a_b_", "b_"}) == "a_b_" and not of("c_seg.nii", {"a_"})


def table_of(folder, count):
    cases = CaseList()
    table = PredictionTable(cases, folder, classes=("tumour",), prompt_source="none")
    table._start(SimpleNamespace(state=SimpleNamespace(device="cpu")))
    return cases, table


def lines(folder):
    return [line.partition(",")[0] for line in (folder / TABLE).read_text().splitlines()]


def test_the_table_of_predictions_gets_a_row_for_each_case(tmp_path):
    def run(count):
        cases, table = table_of(tmp_path / str(count), count)
        done = list(reversed(names(count)))

        def work():
            for n, case in enumerate(done):
                if n % 4 == 3:
                    cases.fail(case, "odd")
                else:
                    table.rows[case] = {"case": case}
                    table.write(case)
            assert lines(tmp_path / str(count)) == ["case", *done]  # as they were done: a kill now would cost nothing
            table.write()

        found = calls(work)
        assert lines(tmp_path / str(count)) == ["case", *names(count)]
        return found

    linear(run(N), run(2 * N))


def test_a_row_is_added_whole_or_not_at_all(tmp_path, monkeypatch):
    cases, table = table_of(tmp_path, 3)
    sync = os.fsync

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    for case, disk in zip(names(3), (sync, full, sync), strict=True):
        monkeypatch.setattr("samseg_monai.files.os.fsync", disk)
        table.rows[case] = {"case": case}
        table.write(case)
        assert lines(tmp_path) == ["case", *(names(3) if case == names(3)[2] else names(1))]
        assert bool(cases.lost) == (disk is full)
    table.rows[names(3)[0]]["seconds"] = 9.0
    cases.bad[names(3)[0]] = "its file was lost"
    table.write(names(3)[0])  # it has a row already, which is another one now
    assert lines(tmp_path) == ["case", *names(3)] and "its file was lost" in (tmp_path / TABLE).read_text()


def test_cases_of_two_runs_are_compared(monkeypatch):
    def run(count):
        made = []

        def counted(values=()):
            made.extend(found := list(values))
            return frozenset(found)

        monkeypatch.setattr(comparing, "set", counted, raising=False)
        rows = [{"case": case, "class": "tumour", "dice": 0.5} for case in names(count)]
        runs = [RunResult(Path("a"), name, {}, {}, rows) for name in ("zero_shot", "lora")]
        assert comparing.what_differs(*runs) == []
        return len(made)

    linear(run(N), run(2 * N))
