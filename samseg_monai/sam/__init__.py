"""Segment Anything (Kirillov et al. 2023, arXiv:2304.02643), built from segment_anything's modules and made trainable."""
