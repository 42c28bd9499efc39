"""One bad case costs one case: a prediction that names what it could not do and goes on with the next."""

from __future__ import annotations

import logging
from typing import Any, cast

from monai.data import Dataset
from monai.engines import PrepareBatchExtraInput, SupervisedEvaluator

from samseg_monai.data.files.case_list import CaseList, noted
from samseg_monai.errors import reason_of

logger = logging.getLogger(__name__)
FAILED, NOTES = "failed", "notes"


class CaseDataset(Dataset):
    """MONAI's ``Dataset`` of cases, of which one that cannot be prepared becomes ``{"case": name, "failed": why}``.

    What is warned of on the way comes along as "notes", a line each: from a process of a DataLoader, too.
    """

    def _transform(self, index: int) -> Any:
        case = str(self.data[index]["case"])
        with noted(case) as notes:
            try:
                item: Any = super()._transform(index)
            except Exception as error:  # noqa: BLE001  whatever a transform raises is a problem of its case
                item = {"case": case, FAILED: reason_of(error)}
        return {**item, NOTES: "\n".join(notes)} if isinstance(item, dict) else item


class PrepareGiven(PrepareBatchExtraInput):
    """MONAI's ``PrepareBatchExtraInput`` of a mapping, without what a batch lacks: of a case's prompts there is either
    the mask of boxes, "prompt", or the rows with clicks, "boxes"."""

    def __call__(self, batchdata: dict[str, Any], *arguments: Any, **named: Any) -> tuple[Any, ...]:
        given = {name: key for name, key in cast(dict[str, str], self.extra_keys).items() if key in batchdata}
        return PrepareBatchExtraInput(given)(batchdata, *arguments, **named)


class CaseEvaluator(SupervisedEvaluator):
    """MONAI's ``SupervisedEvaluator`` for batches of one case, with which a bad case does not end the run.

    Args:
        cases: is told of each case that fails, in ``CaseDataset`` or in network, post-processing and writing, and why;
            its ``finish`` then fails the run. None: the first error ends the run, as an evaluation's has to, whose
            means would be of other cases.
        arguments: as of ``SupervisedEvaluator``.
    """

    def __init__(self, *arguments: Any, cases: CaseList | None = None, **named: Any) -> None:
        self.cases = cases
        super().__init__(*arguments, **named)

    def _iteration(self, engine: SupervisedEvaluator, batchdata: Any) -> dict[str, Any]:
        if self.cases is None:
            return super()._iteration(engine, batchdata)
        case = str(batchdata["case"][0])
        self.cases.note(case, "".join(batchdata.get(NOTES, "")).splitlines())
        if FAILED in batchdata:
            self.cases.fail(case, batchdata[FAILED][0])
            return {}
        try:
            with noted(case) as notes:
                result = super()._iteration(engine, batchdata)
            self.cases.note(case, notes)
            return result
        except Exception as error:  # of this case: the next may be a good one
            logger.debug("%s", case, exc_info=True)
            if not self.cases.fail(case, reason_of(error), error):
                engine.terminate()
            return {}
