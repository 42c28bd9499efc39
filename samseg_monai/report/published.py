"""Rows of published tables on Synapse's eight organs, quoted with their source; nothing here was measured by this code.

They are of the 18/12 split: DSC in %, HD95 in voxels. Those marked 3D have metric code of their own. Figures are kept
as they were printed. A figure without a source is left out, and so are rows of another protocol (other classes, unknown
split); a dash in a table means "not known here", not "not published". In particular SAM-LST's values per organ are in
its paper's table, which was not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# columns in the order of the papers' tables
ORGANS = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")

_LST = "Chai et al. 2023, arXiv:2306.12737"
_LST_ABLATION = f"{_LST}, ablations"
_IN_LST = f"as given in {_LST}"
_SAMED = "Zhang and Liu 2023, arXiv:2304.13785: README of github.com/hitachinsk/SAMed at e351840"


@dataclass(frozen=True)
class Quoted:
    """One row of a published table.

    Args:
        method: as the paper calls it.
        dsc: mean DSC in %, as printed.
        hd95: mean HD95 in voxels, as printed; None where not known.
        source: where it was read.
        organs: DSC in % per organ, as printed; empty where not known.
        second_hand: whether it was read elsewhere than in what its authors wrote.
    """

    method: str
    dsc: str
    hd95: str | None
    source: str
    organs: Mapping[str, str] = field(default_factory=dict)
    second_hand: bool = False


def _organs(values: str) -> dict[str, str]:
    """Figures separated by spaces, in the order of ``ORGANS``."""
    return dict(zip(ORGANS, values.split(), strict=True))


PUBLISHED = (
    Quoted("SAM-LST", "79.45", "35.35", _LST),
    Quoted("SAM-LST, CNN only", "78.05", "29.11", _LST_ABLATION),
    Quoted("SAM-LST, SAM only", "58.97", "101.6", _LST_ABLATION),
    Quoted("SAM-LST, no fine-tuning", "1.73", "260.98", _LST_ABLATION),
    Quoted("SAMed", "81.88", "20.64", _SAMED, _organs("87.77 69.11 80.45 79.95 94.80 72.17 88.72 82.06")),
    Quoted("SAMed_s", "77.78", "31.72", _SAMED),
    Quoted("SAMed_h (ViT-H)", "84.30", "16.02", _SAMED, _organs("87.81 74.72 85.76 81.52 95.76 70.63 90.46 87.77")),
    Quoted(
        "H-SAM (ViT-L)", "86.49", None,
        "Cheng et al. 2024, arXiv:2403.18271: as listed by wizwand.com and quoted in H-SAM issue 23 (users get 84.89)",
        second_hand=True,
    ),
    Quoted("TransUNet", "77.48", "31.69", _IN_LST, second_hand=True),
    Quoted("Swin-Unet", "79.12", "21.55", _IN_LST, second_hand=True),
    Quoted("MISSFormer", "81.96", "18.20", _IN_LST, second_hand=True),
    Quoted(
        "MERIT", "84.90", "13.22", "as listed by hyper.ai; its code chooses the epoch on the test cases",
        second_hand=True,
    ),
    Quoted("nnFormer (3D)", "86.5", None, "as quoted in NexToU issue 4", second_hand=True),
    Quoted("UNETR++ (3D)", "87.2", None, "Shaker et al. 2022, arXiv:2212.04497, abstract"),
    Quoted("NexToU (3D)", "87.84", None, "as quoted in NexToU issue 4, where a user gets about 83", second_hand=True),
)  # fmt: skip
