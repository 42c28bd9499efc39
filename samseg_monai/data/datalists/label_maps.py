"""Label codings by name: which number means which structure, since files cannot say it and several tables circulate.

Sources: ``btcv13`` are the labels of BTCV's ``RawData`` (syn3193805; "Multi-Atlas Labeling Beyond the Cranial Vault").
Three tables of eight organs are derived from it: ``samed`` (SAMed, SAM-LST and H-SAM: ``hashmap`` of the
preprocessing, ``class_to_name`` of ``test.py``), ``merit`` (MERIT and EMCAD: ``dataset_synapse.py``) and ``transunet``
(the files on TransUNet's Drive; no code names them: inferred from per-class logs that users of RWKV-UNet and CSWin-UNet
posted). ``totalsegmentator`` are the ids of TotalSegmentator's 117 classes, of which only the eight organs are told
apart. ``2023`` and ``2021`` are those of BraTS (LaBella et al., arXiv:2405.09787; the older one of 2017 to 2022 had
enhancing tumour as 4), ``gtv`` that of BraTS-MEN-RT (arXiv:2405.18383).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from samseg_monai.choices import IGNORE_NAMES, is_label
from samseg_monai.errors import ConfigError, raise_all

BTCV = {
    1: "spleen", 2: "right kidney", 3: "left kidney", 4: "gallbladder", 5: "oesophagus",
    6: "liver", 7: "stomach", 8: "aorta", 9: "inferior vena cava", 10: "portal and splenic vein",
    11: "pancreas", 12: "right adrenal", 13: "left adrenal",
}  # fmt: skip
# cases and split of TransUNet (``preprocess_data.py``, ``lists_Synapse``; arXiv:2102.04306), the same in SAMed
# (arXiv:2304.13785) and SAM-LST (arXiv:2306.12737)
BTCV_TRAINING = (
    "0005", "0006", "0007", "0009", "0010", "0021", "0023", "0024", "0026",
    "0027", "0028", "0030", "0031", "0033", "0034", "0037", "0039", "0040",
)  # fmt: skip
BTCV_TESTING = ("0001", "0002", "0003", "0004", "0008", "0022", "0025", "0029", "0032", "0035", "0036", "0038")

VALUE = re.compile("-?[0-9]{1,6}")  # of a label: what is larger is no label, and its table would fill the memory
ROUNDED = 1e-3  # what scaling and another format do to a whole number; resampling does more
BACKGROUND = "background"
OTHER = "other"
OWN_CODING = "own"  # of a table that has no name
# the order of the columns of SAMed and SAM-LST
ORGANS = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
_MERIT = ("spleen", "right kidney", "left kidney", "gallbladder", "pancreas", "liver", "stomach", "aorta")
_TOTAL = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "pancreas")
_TRANSUNET = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
ABDOMEN: dict[str, dict[int, str]] = {
    "btcv13": BTCV,
    "samed": dict(enumerate(ORGANS, 1)),
    "merit": dict(enumerate(_MERIT, 1)),
    "transunet": dict(enumerate(_TRANSUNET, 1)),
    "totalsegmentator": {**dict.fromkeys(range(1, 118), OTHER), **dict(enumerate(_TOTAL, 1)), 52: "aorta"},
}
BRATS: dict[str, dict[int, str]] = {
    "2023": {1: "non-enhancing core", 2: "oedema", 3: "enhancing tumour"},
    "2021": {1: "non-enhancing core", 2: "oedema", 4: "enhancing tumour"},
    "gtv": {1: "gross tumour volume"},
}
CODINGS = {**BRATS, **ABDOMEN}


def is_ignored(name: str) -> bool:
    """Whether a datalist's name of a value says that nobody has judged its voxels (``choices.IGNORE_NAMES``)."""
    return name.strip().lower() in IGNORE_NAMES


def labels_in(coding: str, among: Mapping[str, Mapping[int, str]] = CODINGS) -> dict[str, str]:
    """Table of a coding as datalists record it: ``{"0": "background", "1": "spleen", ...}``.

    Args:
        coding: one of the names of ``among``.
        among: codings that make sense where the question is asked.

    Raises:
        ConfigError: unknown coding; the known ones are listed.
    """
    if coding not in among:
        raise ConfigError(f"unknown label coding {coding!r}; choose one of {', '.join(among)}")
    return {"0": BACKGROUND, **{str(value): name for value, name in among[coding].items()}}


def fitting(values: Collection[int]) -> list[str]:
    """Names of the codings of abdomens in which all ``values`` are legal; 0 is legal in every one."""
    return [name for name, table in ABDOMEN.items() if set(values) <= {0, *table}]


def coding_hint(values: Collection[int], coding: str) -> str:
    """The codings other than ``coding`` in which ``values`` would be legal, as an advice; empty when there is none."""
    legal = [name for name in fitting(values) if name != coding]
    size = min((len(ABDOMEN[name]) for name in legal), default=0)
    others = [name for name in legal if len(ABDOMEN[name]) == size]  # the widest coding fits nearly everything
    if not others:
        return ""
    which = others[0] if len(others) == 1 else f"one of {', '.join(others)}"
    return f"looks like {which}: name it with --label-coding"


def implausible_sizes(voxels_of_cases: Sequence[Mapping[int, int]], coding: str) -> list[str]:
    """What speaks against ``coding`` in the sizes of the organs, one sentence each.

    Files whose numbers are legal in two codings can be told apart by anatomy alone: the liver is the largest of these
    organs, and a kidney is larger than the gallbladder.

    Args:
        voxels_of_cases: label -> voxels, one mapping per case.
        coding: one of ``CODINGS``.
    """
    value_of = {name: value for value, name in CODINGS[coding].items() if name != OTHER}
    cases = [{name: voxels.get(value, 0) for name, value in value_of.items()} for voxels in voxels_of_cases]
    odd = {}
    if "liver" in value_of:
        smaller = sum(case["liver"] < max(case.values()) for case in cases)
        odd[f"what it calls liver ({value_of['liver']}) is not the largest organ"] = smaller
    if {"gallbladder", "right kidney"} <= set(value_of):
        larger = sum(case["gallbladder"] > case["right kidney"] for case in cases)
        odd[f"what it calls gallbladder ({value_of['gallbladder']}) is larger than the right kidney"] = larger
    return [f"{text} in {count} of {len(cases)} cases" for text, count in odd.items() if 2 * count > len(cases)]


def absent_labels(voxels_of_cases: Sequence[Mapping[int, int]], names: Mapping[int, str]) -> list[str]:
    """One sentence on the labels that no case has; ``names`` maps the values that are expected to names."""
    present = {value for voxels in voxels_of_cases for value in voxels}
    absent = [f"{name} ({value})" for value, name in names.items() if value not in present and name != OTHER]
    return [f"no case has {', '.join(absent)}"] if voxels_of_cases and absent else []


def check_names(labels: Mapping[str, str]) -> None:
    """Refuse names that no settings may hold before anything is read: a task could not call its classes so.

    Raises:
        ConfigError: all of them at once.
    """
    wrong = [repr(name) for name in labels.values() if not is_label(name)]
    fix = "name each in letters, digits, blanks and . _ - + ( ) and / between words, with --labels '1=...,2=...'"
    raise_all(wrong, ConfigError, f"names that no class can have; {fix}")


def parse_labels(text: str) -> dict[str, str]:
    """``"1=anterior,2=posterior"`` as a table of labels.

    Raises:
        ConfigError: an entry without ``=``, a value that is no whole number of at most six digits, an empty name, or a
            value given twice.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    table = {value.strip(): name.strip() for value, _, name in pairs}
    if len(table) != len(pairs) or not all(VALUE.fullmatch(value) and name for value, name in table.items()):
        raise ConfigError(f"labels are given as '1=anterior,2=posterior', each value once, got {text!r}")
    return {str(int(value)): name for value, name in table.items()}
