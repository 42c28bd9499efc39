"""For the site: sections of a docstring are set apart by an empty line, which the docstrings of this package save."""

import re
from typing import Any

import griffe

SECTION = re.compile(r"(?m)(?<=\S)\n(?=[ ]*(?:Args|Attributes|Returns|Raises|Shape):\s*$)")


class Sections(griffe.Extension):
    """Puts an empty line before each section, as Google's style wants it."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = SECTION.sub("\n\n", obj.docstring.value)
