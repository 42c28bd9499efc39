"""Data: files and cases, datalists, slices to learn from."""

BRATS_SCANS = ("t1n", "t1c", "t2w", "t2f")  # of BraTS 2023, in the order in which networks get them
BRATS_OLD = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}  # of BraTS 2012 to 2022 -> of 2023
IMAGES = "images"  # the kind of datalists and cases of 2-D images
CUT = ("image", "image_of", "label", "label_of")  # voxels that a crop leaves out of the foreground, and of how many
