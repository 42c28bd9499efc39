"""Ask MONAI Label for segmentations: ``PYTHON ask_monailabel.py JOBS``, JOBS a JSON list of ``{"bundle", "request"}``.

Runs where monailabel is installed, beside this package. Its answer is the last line: for each job the file that
``BundleInferTask`` wrote and its labels, or the text of the error.
"""

import json
import sys

from monailabel.tasks.infer.bundle import BundleInferTask


def ask(bundle: str, request: dict) -> dict:
    task = BundleInferTask(bundle, {})
    assert task.is_valid(), f"MONAI Label does not take {bundle}"
    try:
        file, told = task({"device": "cpu", "logging": "WARNING", **request})
    except Exception as error:  # noqa: BLE001  the test judges it
        return {"error": f"{type(error).__name__}: {error}", "options": task.config()}
    return {"file": file, "labels": told["label_names"], "type": task.type, "options": task.config()}


print(json.dumps([ask(**job) for job in json.loads(sys.argv[1])], default=str))
