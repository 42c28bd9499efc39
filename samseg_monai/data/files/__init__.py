"""Files as they are stored: volumes, DICOM series, 2-D images, boxes, and the cases that they make up."""
