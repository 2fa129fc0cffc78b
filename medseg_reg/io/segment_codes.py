"""The coded terms by which DICOM names what a segment shows, found by the name of a class."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Keywords of pydicom's SNOMED CT dictionary, so that no number is typed here.
_STRUCTURES = {
    "adrenal gland": "AdrenalGland",
    "aorta": "Aorta",
    "bone": "Bone",
    "brain": "Brain",
    "colon": "Colon",
    "duodenum": "Duodenum",
    "esophagus": "Esophagus",
    "gallbladder": "Gallbladder",
    "glottis": "Glottis",
    "heart": "Heart",
    "hippocampus": "Hippocampus",
    "inferior vena cava": "InferiorVenaCava",
    "kidney": "Kidney",
    "larynx": "Larynx",
    "left atrium": "LeftAtrium",
    "left ventricle": "LeftVentricle",
    "liver": "Liver",
    "lung": "Lung",
    "muscle": "Muscle",
    "pancreas": "Pancreas",
    "portal vein": "PortalVein",
    "prostate": "Prostate",
    "rectum": "Rectum",
    "right atrium": "RightAtrium",
    "right ventricle": "RightVentricle",
    "skin": "Skin",
    "small intestine": "SmallIntestine",
    "spleen": "Spleen",
    "splenic vein": "SplenicVein",
    "stomach": "Stomach",
    "tooth": "Tooth",
    "trachea": "Trachea",
    "urinary bladder": "Bladder",
    "uterus": "Uterus",
    "vertebra": "Vertebra",
}
_LESIONS = {
    "cyst": "Cyst",
    "edema": "Edema",
    "lesion": "Lesion",
    "neoplasm": "Neoplasm",
}
_SYNONYMS = {
    "bladder": "urinary bladder",
    "cancer": "neoplasm",
    "gall bladder": "gallbladder",
    "gtv": "neoplasm",
    "oedema": "edema",
    "oesophagus": "esophagus",
    "small bowel": "small intestine",
    "teeth": "tooth",
    "tumor": "neoplasm",
    "tumour": "neoplasm",
}
_SIDES = {"left": "Left", "right": "Right"}


@dataclass(frozen=True)
class SegmentCode:
    """Coded terms by their keywords in pydicom's SNOMED CT dictionary.

    Attributes:
        category: of what kind the segment is.
        kind: what it shows.
        side: Left or Right; empty where the name of the class does not say.
    """

    category: str
    kind: str
    side: str = ""


GENERIC = SegmentCode("Tissue", "Tissue")


def segment_code(name: str) -> SegmentCode:
    """Return the terms for the name of a class; `GENERIC` where it is not known.

    Case, underscores, a plural s and a side before or after the name do not matter.

    >>> segment_code("pancreas")
    SegmentCode(category='AnatomicalStructure', kind='Pancreas', side='')
    >>> segment_code("kidney_left")
    SegmentCode(category='AnatomicalStructure', kind='Kidney', side='Left')
    >>> segment_code("class_1") == GENERIC
    True
    """
    words = re.findall(r"[a-z]+|\d+", name.lower())
    whole = _known(" ".join(words))
    if whole is not None:
        return whole
    for side, keyword in _SIDES.items():
        # The whole name came first, because a left ventricle is no ventricle on the left.
        rest = [word for word in words if word != side]
        if len(rest) == len(words) - 1 and (found := _known(" ".join(rest))) is not None:
            return SegmentCode(found.category, found.kind, keyword)
    return GENERIC


def _known(name: str) -> SegmentCode | None:
    for one in (name, name.removesuffix("s")):
        term = _SYNONYMS.get(one, one)
        if term in _STRUCTURES:
            return SegmentCode("AnatomicalStructure", _STRUCTURES[term])
        if term in _LESIONS:
            return SegmentCode("MorphologicallyAbnormalStructure", _LESIONS[term])
    return None
