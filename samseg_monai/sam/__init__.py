"""Segment Anything (Kirillov et al. 2023, arXiv:2304.02643): segment_anything's modules, made trainable."""
