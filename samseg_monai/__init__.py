"""Fine-tune the Segment Anything Model for medical images and ship the result as MONAI bundles."""

__version__ = "0.1.0"
