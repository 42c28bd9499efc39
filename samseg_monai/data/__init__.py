"""Lists of cases, their checks, slices and phantoms: everything between files on disk and the first transform."""
