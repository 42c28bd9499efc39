"""What the description of an MR series says of it: which of BraTS's four scans it is, or nothing.

People type descriptions as they like. The words for contrast, and for none, are those that scanners and their users
write in English, German and some other languages of Europe. What leaves a doubt means nothing, since a native scan
taken for one with contrast is an error that no result shows.
"""

from __future__ import annotations

import re

_AGENT = r"(contrast\w*|contr|kontrast\w*|contraste|km|gad\w*|gd|ce|dotarem|enhanc\w*)"
_SPINE = r"[- ]*(sp|ws|\d|[-/&+]|[tl]\b)"  # behind a "c" that is the neck
_BEFORE = (
    r"(w/?o(ut)?|with?out|ohne|o\.?|vor|before|prior( to)?|minus|neg(ative?)?"
    r"|sans|avant|sin|zonder|senza|sem|bez|ut[ae]n|kein\w*|not|nicht)"
)
# plain words for none, by themselves only where nothing follows that they could belong to: "pre-op", "w/o fat sat"
_NATIVE = re.compile(
    rf"\b((pre|non?)[- ]*|{_BEFORE}[-. ]+)(iv[- ]*|i\.v\. *)?({_AGENT}|inj\w*|c(?!{_SPINE}))(?![\w+])"
    rf"|\b{_AGENT}[-: ]*(frei|free(?![- ]?breath)|(no|non|none|nein|neg(ative?|ativ)?)(?=\W*$))(?!\w)"
    r"|(?<![\w/])-c(?![-\w/+])|(?<![a-z])(c|gd|gad|km|ce)-(?!\w)|\bnativ\w*|\bun-?enhanced\b|\bt1 (n|nat)\b(?!\.)"
    r"|\b(pre|without|w/?o|ohne)\W*$"
)
# any other word of none, or of before, leaves a doubt
_NOT = re.compile(
    rf"\b({_BEFORE}|pre|non?|none|\w*frei|free(?![- ]?breath))(?!\w)|\bno[nt]-|\(-\)"
    rf"|\+/-|±|\b({_AGENT}|c) *\?|(?<!\w)-{_AGENT}\b"
)
_WITH = re.compile(r"\b(with|w|mit|avec|con|met|after|nach|apr[eè]s)\b|\bpost(?!eri)")  # beside a word of none
_CONTRAST = re.compile(
    rf"\+ *(c(?!\w|[- ]*(sp|ws)|[-/&])|{_AGENT}\b)|(?<![a-z])(c|gd|gad|km|ce)\+(?!\w)"
    rf"|\bt1 c\b(?!{_SPINE})|\b{_AGENT}(?!\w)"
    rf"|\bpost[- ]*({_AGENT}|inj\w*)(?!\w)|\bpost\W*$"
)
_DOUBT = re.compile(r"\bpost(?!eri)|\+ *c\b|\bc\b(?![- ]*sp)")  # after what? an agent, or the neck?
_T1 = re.compile(r"(?<![a-z0-9])t1(w(?!/|o|ith))?(?![0-9])-?")  # what is written right behind it counts: t1c, t1wgd
_T2 = re.compile(r"(?<![a-z0-9])t2(?![0-9])")
_FLAIR = re.compile(r"flair|dark[- ]?fluid|\bda[- ]fl\b|\bt2f\b")  # the latter two are Siemens' words
_OTHER_WORDS = re.compile(
    r"\b(adc|dwi|dti|swi|asl|perf\w*|dsc|dce|subtraction|sub|stir|mra|tof|diff\w*|subtr\w*)\b|map(s|ping)?\b"
    r"|t2w?[- ]*(\*|star)"
)
_T2_STAR = re.compile(r"\b(gre|ge|ffe|fl2d|me2d|merge|medic|swan|sw[ip]\w*|ha?emo\w*|epi|ep2d)\b")  # beside T2


def kind_of(text: str, *, contrast: bool = False) -> str:
    """Which of BraTS's four scans (t1c, t1n, t2w, t2f) a description, or another name of a scan, means.

    Args:
        text: ``Ax T1 MPRAGE +C``, ``t2_tse_tra``, ``FLAIR`` ...
        contrast: an agent is named elsewhere.
    Returns: "" where it means none of them, or leaves a doubt: several contrasts, "pre and post", "post-op", and any
        word of none that does not plainly belong to an agent.
    """
    plain = text.casefold().replace("_", " ")
    if _OTHER_WORDS.search(plain):
        return ""
    t1, t2, flair = _T1.search(plain), _T2.search(plain), _FLAIR.search(plain)
    if "tirm" in plain and not flair:  # an inversion recovery that may suppress fat as well
        return ""
    if t1 and not t2 and not flair:
        plain = " ".join(_T1.sub("t1 ", plain).split())
        rest = _NATIVE.sub(" | ", plain)
        without, agent = rest != plain, contrast or bool(_CONTRAST.search(rest))
        if _NOT.search(rest) or (without and (agent or _WITH.search(rest))):
            return ""
        return "t1c" if agent else "" if not without and _DOUBT.search(rest) else "t1n"
    if flair and not t1:
        return "t2f"
    return "t2w" if t2 and not t1 and not _T2_STAR.search(plain) else ""
