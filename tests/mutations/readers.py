"""All kinds of inputs, and how many of 10,000 are of each."""

from tests.mutations import (
    archives,
    caches,
    dicom,
    itk_files,
    jsons,
    labels,
    nifti,
    pictures,
    settings,
    tables,
    weights,
)
from tests.mutations.harness import Reader

READERS = [
    Reader("NIfTI", 1300, nifti.make),
    Reader("MHA and NRRD", 1000, itk_files.make),
    Reader("DICOM series", 500, dicom.make),
    Reader("2-D images", 900, pictures.make),
    Reader("labels", 700, labels.make),
    Reader("datalists", 900, jsons.make_datalists),
    Reader("dataset.json", 400, jsons.make_tables),
    Reader("split files", 400, jsons.make_splits),
    Reader("adapter cards", 500, jsons.make_cards),
    Reader("run cards", 600, jsons.make_runs),
    Reader("recipes", 700, settings.make_recipes),
    Reader("settings.json", 400, settings.make_settings),
    Reader("overrides", 300, settings.make_overrides),
    Reader("cases.csv and history.csv", 600, tables.make_runs),
    Reader("tables of patients", 400, tables.make_patients),
    Reader("caches", 300, caches.make),
    Reader("weights", 800, weights.make),
    Reader("bundles as ZIP", 600, archives.make),
    Reader("boxes", 700, jsons.make_boxes),
]
