"""Report of a few runs: one self-contained HTML page, the same table as text and JSON, all from the runs' files."""
