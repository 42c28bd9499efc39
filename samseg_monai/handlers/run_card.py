"""``run_card.json``: what a run was, on what, with what result; written at its start and kept true to its end."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events

from samseg_monai.checkpoints import read_card
from samseg_monai.errors import CheckpointError
from samseg_monai.handlers import provenance
from samseg_monai.training.owned import count_trainable

logger = logging.getLogger(__name__)


class RunCard:
    """Writes the card with status ``running``, then ``completed``, ``interrupted`` or ``failed`` (with the message).

    Put it first among the handlers: of several handlers of an exception (MONAI's StatsHandler is one) ignite reaches
    only those before the first that raises, and this one raises the exception again, too. No absolute path and no user
    name gets into the card.

    Args:
        output_dir: folder of the run, made if need be.
        settings: values of the config's public keys; hashed (places left out) into ``config_hash``.
        seed: seed of the run.
        prompt_source: label, json, mask, image or none; recorded with every number.
        network: SamSegmenter (or DDP of it): strategy, SAM variant, base weights' hash and counts are read from it.
        evaluator: engine whose last and best metrics are recorded; not needed when attached to the evaluator.
        best: BestAdapter, whose epoch and score then count as the best.
        data_hash: hash of the data's contents; None hashes the file ``datalist``, if given.
        datalist: datalist JSON.
        cases_file: name of the CSV with per-case rows.
        facts: more keys for the card's top level, e.g. ``{"dataset": "phantoms", "phantoms": true}``.
        filename: name of the card.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        settings: Mapping[str, Any],
        seed: int | None = None,
        prompt_source: str | None = None,
        network: Any = None,
        evaluator: Any = None,
        best: Any = None,
        data_hash: str | None = None,
        datalist: str | os.PathLike[str] | None = None,
        cases_file: str | None = "cases.csv",
        facts: Mapping[str, Any] | None = None,
        filename: str = "run_card.json",
    ) -> None:
        self.path = Path(output_dir) / filename
        self.settings = dict(settings)
        self.seed = seed
        self.prompt_source = prompt_source
        self.network = network
        self.evaluator = evaluator
        self.best = best
        self.data_hash = data_hash
        self.datalist = datalist
        self.cases_file = cases_file
        self.facts = dict(facts or {})
        self.card: dict[str, Any] = {}
        self._began = 0.0
        self._before: dict[str, Any] = {}  # the card of the run that is resumed

    def attach(self, engine: Any) -> None:
        """Attach to the trainer, or to the evaluator of a run without training."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._progress)
        engine.add_event_handler(Events.COMPLETED, self.complete)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def start(self, engine: Any) -> None:
        """Write the card with all that is known beforehand."""
        self._began = time.perf_counter()
        resumed = engine.state.epoch if hasattr(engine, "optimizer") else 0
        data_hash = self.data_hash
        if data_hash is None and self.datalist is not None:
            data_hash = provenance.file_hash(self.datalist)
        self._before = provenance.read_json(self.path) if resumed else {}
        self.card = {
            **self.facts,
            "status": "running",
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "resumed_from_epoch": resumed or None,
            **_of_network(self.network),
            "prompt_source": self.prompt_source,
            "seed": self.seed,
            "settings": self.settings,
            "config_hash": provenance.config_hash(self.settings),
            "data_hash": data_hash,
            "versions": provenance.versions(),
            "git_commit": provenance.git_state(),
            "hardware": provenance.hardware(),
            "processes": idist.get_world_size(),
            "cases_file": self.cases_file,
        }
        if resumed:  # the next kill may come before the first epoch ends
            self.card.update(seconds=self._seconds(), epochs=resumed, **self._seen(engine))
        self._write()

    def _progress(self, engine: Any) -> None:
        # a run that is killed gets no chance to write its end
        self.card.update(seconds=self._seconds(), epochs=engine.state.epoch, **self._seen(engine))
        self._write()

    def complete(self, engine: Any) -> None:
        """Write results, time and memory."""
        self._finish(engine, "completed")
        self._write()

    def fail(self, engine: Any, error: BaseException) -> None:
        """Write why the run ended, and raise that again."""
        # ignite hands an error on through two levels: the first record is the true one
        if self.card and "error" not in self.card:
            interrupted = isinstance(error, KeyboardInterrupt)
            self._finish(engine, "interrupted" if interrupted else "failed")
            self.card["error"] = f"{type(error).__name__}: {error}"
            self._write()
        raise error

    def _finish(self, engine: Any, status: str) -> None:
        state = engine.state
        measured = (self.evaluator or engine).state
        if self.best is not None:
            best = {"metric": self.best.score, "epoch": self.best.epoch}
        elif getattr(measured, "best_metric_epoch", -1) >= 0:
            best = {"metric": measured.best_metric, "epoch": measured.best_metric_epoch}
        else:
            best = None
        self.card.update(
            status=status,
            seconds=self._seconds(),
            epochs=state.epoch,
            iterations=state.iteration,
            stop_reason=getattr(state, "stop_reason", None),
            peak_memory_mb=provenance.peak_memory_mb(),
            metrics=measured.metrics,
            best=best,
            **self._seen(engine),
            **self._learnt(),
        )

    def _seen(self, engine: Any) -> dict[str, Any]:
        """Reports that are made once, at the training's start or in its course: an earlier one stays after a resume."""
        collapsed = getattr((self.evaluator or engine).state, "collapsed", None)
        flow = self._before.get("gradient_flow") or getattr(engine.state, "gradient_flow", None)
        return {"gradient_flow": flow, "collapsed_classes": collapsed or self._before.get("collapsed_classes")}

    def _learnt(self) -> dict[str, Any]:
        """What the strategy says of the weights that are kept, such as the ladder's ``gate``.

        Those are the weights of the best epoch, or their average: the card of the adapter in the same folder knows.
        Without an adapter there (an evaluation) it is what the network says now.
        """
        try:
            saved = read_card(self.path.parent)
        except CheckpointError:
            saved = {}
        return {key: saved.get(key, value) for key, value in strategy_facts(self.network).items()}

    def _seconds(self) -> float:
        """Seconds of the whole training, those before a resume included."""
        earlier = self._before.get("seconds")
        earlier = float(earlier) if isinstance(earlier, (int, float)) else 0.0
        return round(earlier + time.perf_counter() - self._began, 2)

    def _write(self) -> None:
        if idist.get_rank() == 0:
            provenance.write_json(self.path, self.card)


def _of_network(network: Any) -> dict[str, Any]:
    """What the network says of itself, under the keys that tables read."""
    if network is None:
        return {}
    network = getattr(network, "module", network)
    strategy = getattr(network, "strategy", None)
    return {
        "sam_variant": getattr(getattr(network, "spec", None), "name", None),
        "base_sha256": getattr(network, "base_sha256", None),
        "image_size": getattr(network, "image_size", None),
        "strategy": None if strategy is None else {"name": strategy.name, "arguments": strategy.arguments()},
        "trainable_parameters": count_trainable(network),
    }


def strategy_facts(network: Any) -> dict[str, Any]:
    """What the strategy of a network (or DDP of it) says of what it has learnt, such as the ladder's ``gate``."""
    network = getattr(network, "module", network)
    strategy = getattr(network, "strategy", None)
    return {} if strategy is None else dict(strategy.facts(network))
