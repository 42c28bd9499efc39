"""Exit with 1 and name the file when a JSON file does not parse or gives a key twice."""

import sys
from pathlib import Path

from samseg_monai.errors import BundleError
from samseg_monai.files import read_json


def main(paths: list[str]) -> int:
    """Check the files and return the exit code."""
    failed = 0
    for path in paths:
        try:
            read_json(Path(path), BundleError, "file", "keep one of each")
        except BundleError as error:
            print(error)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
