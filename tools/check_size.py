"""Exit with 1 and name the file when one is above 6 MB: weights larger than pico's do not belong in the repository."""

import sys
from pathlib import Path

LIMIT = 6_000_000


def main(paths: list[str]) -> int:
    """Check the files and return the exit code."""
    large = [
        f"{path}: {Path(path).stat().st_size} bytes, at most {LIMIT}"
        for path in paths
        if Path(path).stat().st_size > LIMIT
    ]
    print("\n".join(large))
    return int(bool(large))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
