"""Facts of BTCV Abdomen ("Synapse multi-organ CT", syn3193805): published case ids, split and raw label coding.

Split: ``preprocess_data.py`` and ``lists/lists_Synapse`` of TransUNet (Chen et al., arXiv:2102.04306), the same files
in SAMed (arXiv:2304.13785) and SAM-LST (arXiv:2306.12737). Labels: the 13 organs of the challenge, "Multi-Atlas
Labeling Beyond the Cranial Vault", in the coding of its NIfTI files.
"""

from __future__ import annotations

TRAINING = (
    "0005", "0006", "0007", "0009", "0010", "0021", "0023", "0024", "0026",
    "0027", "0028", "0030", "0031", "0033", "0034", "0037", "0039", "0040",
)  # fmt: skip
TESTING = ("0001", "0002", "0003", "0004", "0008", "0022", "0025", "0029", "0032", "0035", "0036", "0038")

LABELS = {
    1: "spleen",
    2: "right kidney",
    3: "left kidney",
    4: "gallbladder",
    5: "oesophagus",
    6: "liver",
    7: "stomach",
    8: "aorta",
    9: "inferior vena cava",
    10: "portal and splenic vein",
    11: "pancreas",
    12: "right adrenal",
    13: "left adrenal",
}
