"""Tools of the makers of this package; no part of the wheel."""
