"""``python -m samseg_monai`` is the command ``samseg``."""

from samseg_monai.cli import main

if __name__ == "__main__":
    main()
