"""DICOM as archives export it: series are found by their tags at any depth, and every one of them is accounted for."""

import gc
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from samseg_monai.data import BRATS_SCANS as SCANS
from samseg_monai.data.files.cases import find_cases
from samseg_monai.data.files.dicom import read_series
from samseg_monai.data.files.pacs import link, rules_of
from samseg_monai.data.files.series_words import kind_of
from samseg_monai.errors import ConfigError, DataError
from tests.data.test_dicom import AXES, in_monai, object_without_image, write_series, write_slice

EXAM = {
    "t1n": "t1_mprage_sag", "t1c": "Ax T1 MPRAGE +C", "t2w": "t2_tse_tra", "t2f": "t2_tirm_tra_dark-fluid",
}  # fmt: skip


def tags_of(patient, study, number, description, modality="MR", kind="ORIGINAL\\PRIMARY\\M"):
    root = f"1.2.826.{patient}.{study}"
    return {
        "0010|0020": f"ID{patient}", "0010|0010": "DOE^JANE", "0020|000d": root, "0020|000e": f"{root}.{number}",
        "0020|0011": str(number), "0008|103e": description, "0008|0060": modality, "0008|0008": kind,
    }  # fmt: skip


def series(folder, patient=1, study=1, number=1, description="", seed=None, *, axes="axial", prefix="", **kind):
    """One series of five slices; with ``prefix`` its files are called so, so that several can share a folder."""
    array = np.random.default_rng(number if seed is None else seed).integers(1, 900, (7, 6, 5)).astype(np.int16)
    place = folder / f"{prefix}new" if prefix else folder
    write_series(place, array, AXES[axes], tags=tags_of(patient, study, number, description, **kind))
    if prefix:
        for path in place.iterdir():
            path.rename(folder / f"{prefix}{path.name}")
        place.rmdir()
    return array


def exam(folder, patient=1, study=1, scans=EXAM, flat=False):
    """All scans of an exam, its localizer, a map and a screen shot, in folders or in one."""
    arrays = {}
    for number, (scan, text) in enumerate(scans.items(), 2):
        place = folder if flat else folder / f"SE{number:06d}"
        arrays[scan] = series(place, patient, study, number, text, prefix=f"IM{number}_" if flat else "")
    more = folder if flat else folder / "SE000001"
    series(more, patient, study, 1, "localizer", prefix="L" if flat else "", kind="ORIGINAL\\PRIMARY\\LOCALIZER")
    more = folder if flat else folder / "SE000009"
    series(more, patient, study, 9, "ADC", prefix="D" if flat else "", kind="DERIVED\\PRIMARY\\ADC")
    return arrays


def names(cases):
    return [item["case"] for item in cases.good]


def passed(cases):
    return {reason: sorted(listed) for reason, listed in cases.passed.items()}


# --- descriptions


@pytest.mark.parametrize(("text", "kind"), [
    ("T1", "t1n"), ("t1_mprage_sag", "t1n"), ("AX T1 SE", "t1n"), ("T1 w/o contrast", "t1n"), ("T1 nativ", "t1n"),
    ("T1 pre contrast", "t1n"), ("T1 C-", "t1n"), ("t1n", "t1n"), ("T1w", "t1n"), ("T1 non-contrast", "t1n"),
    ("T1 posterior fossa", "t1n"), ("T1 C-spine", "t1n"), ("T1 ohne KM", "t1n"),
    ("T1 +C", "t1c"), ("T1 C+", "t1c"), ("t1c", "t1c"), ("T1ce", "t1c"), ("t1gd", "t1c"), ("AX T1 POST GAD", "t1c"),
    ("t1_mprage_tra_KM", "t1c"), ("T1 post", "t1c"), ("3D T1 with contrast", "t1c"), ("T1 MPRAGE Gd", "t1c"),
    ("t1_space_post_kontrastmittel", "t1c"), ("T1wCE", "t1c"), ("T1-c", "t1c"),
    ("T2", "t2w"), ("t2_tse_tra", "t2w"), ("T2w FSE", "t2w"), ("AX T2 PROPELLER", "t2w"),
    ("FLAIR", "t2f"), ("AX T2 FLAIR FS", "t2f"), ("t2f flair", "t2f"), ("t2_tirm_tra_dark-fluid", "t2f"),
    ("t2_spc_da-fl_sag", "t2f"),
    ("T1 pre and post", ""), ("T1 without and with contrast", ""), ("T1 FLAIR +C", ""), ("T2*", ""), ("T2star", ""),
    ("ADC", ""), ("ep2d_diff", ""), ("T1 map", ""), ("T1map_MOLLI", ""), ("T2 STIR", ""), ("t2_tirm_cor", ""),
    ("", ""), ("T10", ""), ("ct1", ""), ("SUB T1 post", ""), ("T1 T2", ""),
    # native, in several languages
    ("t1_tra vor KM", "t1n"), ("T1 non-enhanced", "t1n"), ("T1 not enhanced", "t1n"), ("T1 KM-frei", "t1n"),
    ("T1 tra KM frei", "t1n"), ("T1 before Gd", "t1n"), ("T1 before contrast", "t1n"), ("T1 unenhanced", "t1n"),
    ("T1 prior to contrast", "t1n"), ("T1 contrast no", "t1n"), ("T1 Gd neg", "t1n"), ("T1 sans gado", "t1n"),
    ("T1 avant gado", "t1n"), ("T1 sin gadolinio", "t1n"), ("T1 zonder contrast", "t1n"), ("T1 native", "t1n"),
    ("T1 precontrast", "t1n"), ("T1 pre", "t1n"), ("T1 without", "t1n"), ("T1 no contrast", "t1n"), ("T1C-", "t1n"),
    ("T1 tra KM-", "t1n"), ("t1wn", "t1n"), ("T1 w/o Gd", "t1n"), ("t1_ohne_km", "t1n"),
    ("T1 o. KM", "t1n"), ("T1 senza contrasto", "t1n"), ("T1 w/out contrast", "t1n"), ("T1 un-enhanced", "t1n"),
    ("T1 native water", "t1n"), ("T1 vor KM-Gabe", "t1n"),
    # after something that is no agent; the neck
    ("T1 MPRAGE post-op", ""), ("T1 postop", ""), ("T1 post RT", ""), ("T1 post-processed", ""), ("T1 post FS", ""),
    ("T1 post radiation", ""), ("T1 post surgery", ""), ("t1post-op", ""), ("T1 pre-op", ""), ("T1 sag C/S", ""),
    ("T1 HWS c", ""), ("T1 tra c", ""), ("T1C-spine", "t1n"), ("T1 + C-spine", ""), ("T1 C+T spine", ""),
    ("T1-C/S", ""),
    # words of none that belong to something else, or not alone
    ("T1 sans/avant gado", ""), ("T1 before/after Gd", ""), ("T1 vor/nach KM", ""), ("T1 w/wo contrast", ""),
    ("T1 with and without contrast", ""), ("T1 km no fat sat", ""), ("T1 +C w/o FS", ""), ("T1 before surgery", ""),
    ("T1 post-op native", ""), ("T1 -Gd", ""), ("T1 native, KM", ""), ("T1 contrast no fs", ""), ("T1 KM diff", ""),
    ("T1 +/- KM", ""), ("T1 +/-C", ""), ("T1 KM?", ""), ("T1 vor der KM-Gabe", ""), ("T1 no fat sat", ""),
    # plainly with an agent
    ("T1 post contrast", "t1c"), ("T1 post gd", "t1c"), ("T1 post km", "t1c"), ("T1 post C+", "t1c"), ("T1 c", "t1c"),
    ("T1 post-op +C", "t1c"), ("T1 C/S +C", "t1c"), ("T1+Gd", "t1c"), ("T1 tra nach KM", "t1c"), ("T1km", "t1c"),
    ("T1post", "t1c"), ("T1 postcontrast", "t1c"), ("T1 post injection", "t1c"), ("T1 posterior fossa +c", "t1c"),
    ("T1 Gd+", "t1c"), ("T1 enhanced", "t1c"), ("T1 KM free-breathing", "t1c"), ("T1 +C 3", "t1c"), ("T1 gado", "t1c"),
    # susceptibility is not T2
    ("T2 GRE", ""), ("t2*", ""), ("T2w *", ""), ("t2_fl2d_tra_hemo", ""), ("T2 hemo", ""), ("SWI", ""), ("T2 SWI", ""),
    ("T2 FFE", ""),
])  # fmt: skip
def test_descriptions_mean_a_scan_or_nothing(text, kind):
    assert kind_of(text) == kind


def test_an_agent_that_is_named_counts():
    assert kind_of("t1_mprage", contrast=True) == "t1c"
    assert kind_of("t1 native", contrast=True) == "" and kind_of("t1 vor KM", contrast=True) == ""
    assert kind_of("t1 post-op", contrast=True) == "t1c"
    assert kind_of("t2", contrast=True) == "t2w"


# --- trees


@pytest.mark.parametrize("flat", [False, True])
def test_patients_studies_and_series_become_cases(tmp_path, flat, caplog):
    arrays = {n: exam(tmp_path / f"PAT{n}" / "STUDY1", patient=n, flat=flat) for n in (1, 2)}
    cases = find_cases(tmp_path)
    assert names(cases) == ["PAT1", "PAT2"] and not cases.bad
    for n in (1, 2):
        for path, scan in zip(cases.good[n - 1]["image"], SCANS, strict=True):
            assert np.array_equal(read_series(path).array, arrays[n][scan])
    told = passed(cases)
    assert sorted(told) == ["series that are none of the scans", "series: localizers"]
    assert all(len(listed) == 2 for listed in told.values())
    assert '("ADC", series 9, DERIVED)' in told["series that are none of the scans"][0]
    assert "DOE" not in caplog.text and "ID1" not in caplog.text
    alone = find_cases(tmp_path / "PAT1" / "STUDY1")
    assert names(alone) == ["STUDY1"] and len(alone.good[0]["image"]) == 4


def test_one_scan_is_taken_out_of_a_whole_exam(tmp_path):
    arrays = exam(tmp_path / "PAT1" / "STUDY1")
    cases = find_cases(tmp_path, scans=("t1c",))
    assert names(cases) == ["PAT1"] and np.array_equal(read_series(cases.good[0]["image"]).array, arrays["t1c"])
    # of a study given by itself, what is another scan by its words is none, though each has a folder of its own
    study = find_cases(tmp_path / "PAT1" / "STUDY1", scans=("t1c",))
    assert names(study) == ["SE000003"]
    assert {"series: t1n by their description, not t1c", "series: localizers"} < study.passed.keys()
    assert "series: none of the scans by their description, not t1c" in study.passed
    asked = find_cases(tmp_path / "PAT1" / "STUDY1", scans=("t1c",), series={"name_by": "folder"})
    assert names(asked) == ["STUDY1"]


def test_a_cd_with_one_folder_for_all_is_named_by_the_patients_folder(tmp_path):
    for patient in (1, 2):
        exam(tmp_path / "DICOM" / f"PA{patient}" / "ST1", patient=patient)
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "AUTORUN.INF").write_text("x")
    cases = find_cases(tmp_path)
    assert names(cases) == ["PA1", "PA2"]
    assert passed(cases)["no images"] == ["AUTORUN.INF", "DICOMDIR"]


def test_two_studies_of_a_patient_are_two_cases(tmp_path):
    for study in (1, 2):
        exam(tmp_path / "deep" / "PAT1" / f"2020-0{study}", study=study)
    exam(tmp_path / "deep" / "PAT2", patient=2)
    assert names(find_cases(tmp_path)) == ["deep_PAT1_2020-01", "deep_PAT1_2020-02", "deep_PAT2"]
    assert names(find_cases(tmp_path / "deep")) == ["PAT1_2020-01", "PAT1_2020-02", "PAT2"]
    flat = tmp_path / "flat"
    for study in (1, 2):
        series(flat, 1, study, 3, "T1 +C", prefix=f"S{study}")
    assert names(find_cases(flat, scans=("t1c",))) == ["flat_1", "flat_2"]


def test_names_by_series_are_unique_and_safe(tmp_path):
    for patient in (1, 2):
        exam(tmp_path / f"PAT{patient}" / "S", patient=patient, scans={"t1c": "T1 +C: ../../ax?"})
    cases = find_cases(tmp_path, scans=("t1c",), series={"name_by": "series"})
    assert names(cases) == ["PAT1_T1_C_ax_2", "PAT2_T1_C_ax_2"]
    one = find_cases(tmp_path / "PAT1", scans=("t1c",), series={"name_by": "series"})
    assert names(one) == ["T1_C_ax_2"]
    series(tmp_path / "bare" / "S" / "x", number=4)
    assert names(find_cases(tmp_path / "bare", scans=("ct",), series={"name_by": "series"})) == ["4"]


def test_two_series_of_one_scan_are_named_and_a_text_chooses(tmp_path):
    first = series(tmp_path / "P" / "S" / "a", number=4, description="T1 MPRAGE +C")
    series(tmp_path / "P" / "S" / "b", number=7, description="T1  TSE  +C")
    with pytest.raises(
        DataError, match=r'a \("T1 MPRAGE \+C", series 4\) and b \("T1 TSE \+C", series 7\) may each be'
    ):
        find_cases(tmp_path, scans=("t1c",))
    cases = find_cases(tmp_path, scans=("t1c",), series={"texts": {"t1c": "mprage"}})
    assert np.array_equal(read_series(cases.good[0]["image"]).array, first)
    assert passed(cases) == {"series that are none of the scans": ['b ("T1 TSE +C", series 7)']}
    with pytest.raises(DataError, match=r'P: no series is t1c by its description, among a \("T1 MPRAGE'):
        find_cases(tmp_path, scans=("t1c",), series={"texts": {"t1c": "SPACE"}})
    with pytest.raises(DataError, match="one series is taken for several scans"):
        find_cases(tmp_path, scans=("t1c", "t1n"), series={"texts": {"t1c": "tse", "t1n": "t1 tse"}})


def test_a_bad_patient_costs_one_case(tmp_path):
    exam(tmp_path / "A" / "S", patient=1)
    exam(tmp_path / "B" / "S", patient=2, scans={scan: EXAM[scan] for scan in ("t1n", "t1c", "t2w")})
    exam(tmp_path / "C" / "S", patient=3)
    (tmp_path / "C" / "S" / "SE000003" / "CT.3").unlink()
    exam(tmp_path / "D" / "S", patient=4)
    damaged = tmp_path / "D" / "S" / "SE000002" / "CT.1"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    for number in (1, 2):
        series(tmp_path / "E" / "S" / f"x{number}", 5, 1, number, "Abdomen", modality="CT")
    series(tmp_path / "A" / "chest" / "x", 1, 2, 1, "Thorax", modality="CT")  # beside the exam that is meant
    cases = find_cases(tmp_path, modality="MR")
    assert names(cases) == ["A"] and cases.bad.keys() == {"B", "C", "D", "E"}
    assert cases.bad["B"].startswith('no series is t2f by its description, among SE000002 ("t1_mprage_sag", series 2)')
    assert "1 missing" in cases.bad["C"] and "truncated or damaged" in cases.bad["D"]
    assert "of another modality (CT)" in cases.bad["E"]
    assert passed(cases)["series: of another modality (CT)"][0] == 'x ("Thorax", series 1)'


def test_what_is_no_scan_is_passed_over_with_its_reason(tmp_path):
    place = tmp_path / "P" / "S"
    array = series(place / "t1c", number=1, description="T1 post")
    series(place / "mpr", number=2, description="T1 post MPR", kind="DERIVED\\SECONDARY\\REFORMATTED")
    series(place / "scout", number=3, description="3-plane scout", axes="sagittal")
    (place / "rt").mkdir()
    (place / "rt" / "x").write_bytes(object_without_image(b"1.2.840.10008.5.1.4.1.1.481.3"))
    (place / "one").mkdir()
    write_slice(place / "one" / "x", array[..., 0], (0, 0, 0), tags=tags_of(1, 1, 6, "T1 post key image"))
    (place / "shot").mkdir()
    write_slice(place / "shot" / "x", array[..., 0], (0, 0, 0), tags=tags_of(1, 1, 7, "Screen save", "OT"))
    shot = place / "shot" / "x"
    content = shot.read_bytes()
    for tag in (b"\x20\0\x32\0", b"\x20\0\x37\0"):  # position and orientation
        content = content.replace(tag, b"\x20\0\x31\0", 1)
    shot.write_bytes(content)
    (place / "t1c" / "notes.txt").write_text("x")
    cases = find_cases(tmp_path, scans=("t1c",), modality="MR")
    assert cases.good[0]["image"] == str(place / "t1c")
    told = passed(cases)
    assert told.keys() == {
        "series: localizers", "series that are none of the scans", "series: single images",
        "series: pictures without a place in the patient, such as secondary captures",
        "series: no images (a radiotherapy structure set (RTSTRUCT))",
    }  # fmt: skip
    # a person's text may name the derived one, and needs no words that are known
    derived = find_cases(tmp_path, scans=("t1c",), series={"texts": {"t1c": "MPR"}})
    assert derived.good[0]["image"] == str(place / "mpr")


@pytest.mark.parametrize("folder", ["S1", "t1c"])
def test_a_derived_series_is_taken_with_a_note_where_no_original_is(tmp_path, folder, caplog):
    derived = "DERIVED\\SECONDARY"
    place = tmp_path / "P" / "S"
    series(place / folder, number=1, description="t1 km", kind=derived)
    series(place / "S2", number=2, description="t2", kind=derived)
    cases = find_cases(tmp_path, scans=("t1c",))
    assert cases.good[0]["image"] == str(place / folder)
    note = f'{folder} ("t1 km", series 1, DERIVED) is taken for t1c, as no original is'
    assert cases.notes["P"][0].startswith(note) and f"P: {note}" in caplog.text
    series(place / "S3", number=3, description="t1 gd")  # an original goes before, unless the folder says so
    cases = find_cases(tmp_path, scans=("t1c",))
    assert cases.good[0]["image"] == str(place / ("S3" if folder == "S1" else folder))


def test_a_derived_series_that_leaves_a_doubt_is_named_as_one(tmp_path):
    derived = "DERIVED\\SECONDARY"
    series(tmp_path / "P" / "S" / "a", number=1, description="t1 km", kind=derived)
    series(tmp_path / "P" / "S" / "b", number=2, description="t1 gd cor", kind=derived)
    series(tmp_path / "Q" / "S" / "c", 2, number=3, description="t1 post-op", kind=derived)
    series(tmp_path / "R" / "S" / "d", 3, number=4, description="t1 km")
    cases = find_cases(tmp_path, scans=("t1c",))
    assert names(cases) == ["R"] and not cases.notes["R"]
    both = 'a ("t1 km", series 1, DERIVED) and b ("t1 gd cor", series 2, DERIVED) may each be t1c'
    assert both in cases.bad["P"] and "--scan t1c=TEXT" in cases.bad["P"]
    assert 'among c ("t1 post-op", series 3, DERIVED)' in cases.bad["Q"] and "--scan t1c=TEXT" in cases.bad["Q"]


def test_frames_in_one_file_are_refused_where_they_are_the_scan(tmp_path):
    for patient, text in ((1, "T1 +C"), (2, "angio")):
        place = tmp_path / f"P{patient}" / "S" / "frames"
        place.mkdir(parents=True)
        image = sitk.GetImageFromArray(np.zeros((4, 6, 7), np.uint8))
        for tag, value in tags_of(patient, 1, 8, text).items():
            image.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(place / "IM1.dcm"))
        writer.Execute(image)
        series(tmp_path / f"P{patient}" / "S" / "t1", patient, 1, 3, "T1 post" if patient == 2 else "T2")
    cases = find_cases(tmp_path, scans=("t1c",))
    assert names(cases) == ["P2"] and "IM1.dcm: holds 4 frames in one file" in cases.bad["P1"]


def test_slices_and_a_structure_set_in_one_folder_are_one_case(tmp_path):
    array = series(tmp_path / "P", number=1, description="Abdomen")
    (tmp_path / "P" / "RS.1").write_bytes(object_without_image(b"1.2.840.10008.5.1.4.1.1.481.3"))
    cases = find_cases(tmp_path, scans=("image",), modality="MR")
    assert names(cases) == ["P"] and np.array_equal(read_series(cases.good[0]["image"]).array, array)
    assert np.array_equal(in_monai(cases.good[0]["image"])[0].numpy(), array)
    place = Path(cases.good[0]["image"])
    assert place != tmp_path / "P" and len(list(place.iterdir())) == 5
    del cases
    gc.collect()
    assert not place.exists() and len(list((tmp_path / "P").iterdir())) == 6  # links went, files stay


def test_a_series_in_two_folders_is_one_and_a_copy_is_refused(tmp_path):
    array = series(tmp_path / "P" / "S" / "a", number=1, description="T1 +C")
    (tmp_path / "P" / "S" / "b").mkdir()
    for k in (0, 3):
        os.rename(tmp_path / "P" / "S" / "a" / f"CT.{k}", tmp_path / "P" / "S" / "b" / f"CT.{k}")
    cases = find_cases(tmp_path, scans=("t1c",))
    assert np.array_equal(read_series(cases.good[0]["image"]).array, array)
    shutil.copy(tmp_path / "P" / "S" / "a" / "CT.1", tmp_path / "P" / "S" / "b" / "copy")
    with pytest.raises(DataError, match="2 slices lie at the same position"):
        find_cases(tmp_path, scans=("t1c",))


def test_equal_ids_of_all_patients_do_not_join_them(tmp_path):
    """As tools leave behind that replace every id by one and the same."""
    for name in ("A", "B"):
        exam(tmp_path / name / "S", patient=0)
    cases = find_cases(tmp_path)
    assert names(cases) == ["A", "B"]
    write_series(tmp_path / "plain" / "p1")
    write_series(tmp_path / "plain" / "p2")
    assert names(find_cases(tmp_path / "plain", scans=("ct",))) == ["p1", "p2"]


def test_damaged_files_and_dead_links_are_not_lost(tmp_path):
    exam(tmp_path / "A" / "S")
    (tmp_path / "A" / "S" / "SE000002" / "x.dcm").write_bytes(b"rubbish")
    (tmp_path / "A" / "S" / "y.dcm").write_bytes(b"")
    (tmp_path / "A" / "S" / "z").symlink_to("nowhere")
    exam(tmp_path / "B" / "S", patient=2)
    cases = find_cases(tmp_path)
    assert names(cases) == ["B"]
    assert "not every file is a slice" in cases.bad["A"] and "x.dcm" in cases.bad["A"]
    assert "is a damaged DICOM file" in cases.bad["A/S/y.dcm"] and "leads nowhere" in cases.bad["A/S/z"]


def test_a_dead_link_among_files_of_several_series_is_told(tmp_path):
    exam(tmp_path / "A", flat=True)
    (tmp_path / "A" / "gone").symlink_to("nowhere")
    (tmp_path / "A" / "gone.nii.gz").symlink_to("nowhere")
    cases = find_cases(tmp_path)
    assert names(cases) == ["A"] and cases.bad.keys() == {"A/gone", "gone"}


def test_zips_that_are_called_alike_are_told(tmp_path):
    for place in ("a", "b"):
        series(tmp_path / place / "one", description="Abdomen")
        zipped(tmp_path / place / "x.zip", tmp_path / place / "one")
    cases = find_cases([tmp_path / "a" / "x.zip", tmp_path / "b" / "x.zip"], scans=("image",))
    assert names(cases) == ["x"] and "another case is called x too" in str(cases.bad)


def test_a_ring_of_links_ends_and_copies_replace_links(tmp_path, monkeypatch):
    exam(tmp_path / "A" / "S")
    (tmp_path / "A" / "S" / "again").symlink_to(tmp_path / "A")
    assert names(find_cases(tmp_path)) == ["A"]

    def refuse(*_):
        raise OSError("a privilege is not held")

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(Path, "symlink_to", refuse)
    link(tmp_path / "file", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "x" and not (tmp_path / "copy").is_symlink()


def test_rules_that_make_no_sense_are_told_together():
    with pytest.raises(ConfigError) as error:
        rules_of({"texts": {"t9": "x", "t1c": " "}, "name_by": "patient", "more": 1}, ("t1c",))
    for text in ("(4 problems)", "'t9': the network has t1c", "expected folder or series", "unknown key more"):
        assert text in str(error.value)
    with pytest.raises(ConfigError, match=r"expected \{scan: text\}"):
        rules_of({"texts": ["x"]}, ("t1c",))
    assert not rules_of({"texts": {}, "name_by": None}, ("t1c",)).asked


# --- ZIP files


def zipped(path, folder, **more):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
        for name, content in more.items():
            archive.writestr(name, content)
    return path


def test_a_zip_of_a_series_or_of_a_tree_is_read(tmp_path):
    array = series(tmp_path / "one", description="Abdomen")
    found = find_cases(zipped(tmp_path / "patient 7.zip", tmp_path / "one"), scans=("ct",))
    assert names(found) == ["patient 7"] and np.array_equal(read_series(found.good[0]["image"]).array, array)
    place = Path(found.good[0]["image"])
    del found
    gc.collect()
    assert not place.exists()
    for patient in (1, 2):
        exam(tmp_path / "tree" / f"PAT{patient}" / "S", patient=patient)
    path = zipped(tmp_path / "tree.ZIP", tmp_path / "tree", **{"__MACOSX/._x": b"", "PAT1/.DS_Store": b""})
    assert names(find_cases(path)) == ["PAT1", "PAT2"]
    beside = find_cases(tmp_path, scans=("image",))
    assert passed(beside)["ZIP files in a folder (unpack them, or give one)"] == ["patient 7.zip", "tree.ZIP"]


@pytest.mark.parametrize(("name", "reason"), [
    ("../escape", "points outside"), ("/etc/x", "points outside"), ("a\\..\\b", "points outside"),
    ("c:x", "points outside"), ("a/../../b", "points outside"), ("nul", "name of a device"), ("a//b", "another path"),
    ("IM1", "given twice"),
])  # fmt: skip
def test_a_zip_that_leads_out_of_its_folder_is_not_unpacked(tmp_path, name, reason, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("im1", b"x")
        archive.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(DataError, match=reason):
        find_cases(tmp_path / "a.zip", scans=("ct",))
    gc.collect()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / "a.zip"]


def test_links_bombs_and_damage_in_a_zip_are_refused(tmp_path, monkeypatch):
    symlink = zipfile.ZipInfo("link")
    symlink.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(symlink, "/etc/passwd")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", bytes(40 << 20))
    series(tmp_path / "one")
    good = zipped(tmp_path / "cut.zip", tmp_path / "one")
    content = bytearray(good.read_bytes())
    content[600] ^= 255
    good.write_bytes(content)
    (tmp_path / "text.zip").write_text("PK no")
    for name, reason in {
        "link": "a link or special file",
        "bomb": "a bomb",
        "cut": "damaged",
        "text": "no ZIP",
    }.items():
        with pytest.raises(DataError, match=reason):
            find_cases(tmp_path / f"{name}.zip", scans=("ct",))
    monkeypatch.setattr("samseg_monai.zips.MOST_FILES", 2)
    with pytest.raises(DataError, match="holds 5 files, expected at most 2"):
        find_cases(zipped(tmp_path / "many.zip", tmp_path / "one"), scans=("ct",))


@pytest.mark.realdata
def test_a_real_series_without_uids_goes_through_tree_and_zip(realdata, tmp_path):
    folder = realdata / "abdomen_ct" / "example_ct_dicom"
    (tmp_path / "PAT" / "STUDY").mkdir(parents=True)
    (tmp_path / "PAT" / "STUDY" / "SERIES").symlink_to(folder)
    wanted = read_series(folder).sha256
    cases = find_cases(tmp_path, scans=("ct",), modality="CT", series={"name_by": "series"})
    assert names(cases)[0].startswith("CT_Body_3_0") and read_series(cases.good[0]["image"]).sha256 == wanted
    cases = find_cases(tmp_path, scans=("ct",), modality="CT")
    assert names(cases) == ["PAT"]
    cases = find_cases(zipped(tmp_path / "p.zip", folder), scans=("ct",), modality="CT")
    assert names(cases) == ["p"] and read_series(cases.good[0]["image"]).sha256 == wanted
