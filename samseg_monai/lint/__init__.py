"""``samseg lint``: look through a bundle from elsewhere before running it. Reads, and never executes.

A MONAI bundle is a program: ``_target_`` calls what it names, ``$`` is evaluated, pickles run code when they are read.
Deciding what such a program does is hopeless, so the linter allows a short list of forms, components and files, and
reports everything else. It needs nothing but the standard library: no torch, no MONAI, nothing that a bundle could get
hold of. What it does not judge: how much memory or time a bundle takes, whether what it computes is right, and what it
writes into the folders that its user gives it or, by a plain relative path, into the working directory.
"""

from samseg_monai.lint.bundle import lint_bundle
from samseg_monai.lint.finding import RULES, Finding, as_json, as_lines, as_table

__all__ = ["RULES", "Finding", "as_json", "as_lines", "as_table", "lint_bundle"]
