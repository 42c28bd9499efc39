"""A plan of a comparison: which runs there are, and what is the same for all of them.

A plan is JSON, closed as settings are: tasks x rows x backbones x values x seeds x folds. What a run is known by is a
hash of everything that its numbers depend on (settings, data, weights), never its name: a row that is called otherwise
is not run again, one that learns otherwise is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from samseg_monai.bundles.build import PICKERS, RECIPES, component, compose, without_comments
from samseg_monai.choices import Model, Name, Place, Seed, Text, Variant
from samseg_monai.comparison.contents import Contents
from samseg_monai.errors import ConfigError, DataError, WeightsError, raise_all
from samseg_monai.files import known_hash, read_json
from samseg_monai.sam.weights import KNOWN, RANDOM, find_weights, sha256_of
from samseg_monai.settings import NOTHING, PLACES, BundleSettings, problems_of

PLANS = RECIPES / "plans"
Value = bool | int | float | str | list[Any] | dict[str, Any] | None
Overrides = dict[Annotated[str, Field(pattern=r"^[a-z_]+(::[a-z_0-9]+)*$", max_length=100)], Value]
_OF_ROWS = {"prompt::boxes", "strategy::side_weights", "embeddings::cache_dir", "slices::cache_dir"}
Datalists = Annotated[list[Place], Field(min_length=1, max_length=100)]


class TaskPlan(Model):
    """Data that all rows are compared on."""

    recipe: Annotated[str, Field(min_length=1, max_length=400)] = Field(examples=["meningioma"])
    """Name of a task, or path of a recipe."""
    name: Name | None = None
    """How tables call it; null: the recipe's."""
    dataset_dir: Place | None = None
    """Folder of the data; null: given on the command line."""
    datalists: Datalists | None = None
    """Datalists, one for each fold; null: datalist.json in ``dataset_dir``."""
    shared: Overrides = {}
    """Settings of every run on these data."""

    @property
    def called(self) -> str:
        """Its name in tables."""
        return self.name or Path(self.recipe).stem


class RowPlan(Model):
    """One row of the table, or one for each value of ``each``."""

    name: Name
    strategy: Annotated[str, Field(min_length=1, max_length=400)]
    """Name of a strategy, or path of a recipe."""
    title: Text | None = None
    """How the page calls it; null: made from its settings."""
    each: dict[str, Annotated[list[Value], Field(min_length=1, max_length=100)]] = Field(
        default={}, examples=[{"strategy::rank": [4, 16, 64]}]
    )
    """Key of a setting -> values, each of which makes a row."""
    shared: Overrides = {}
    """Settings of trainings and evaluations."""
    training: Overrides = {}
    """Settings of trainings alone."""
    evaluation: Overrides = {}
    """Settings of evaluations alone."""
    backbones: Annotated[list[Variant], Field(min_length=1)] | None = None
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=100)] | None = None


class Plan(Model):
    """``samseg compare PLAN.json``."""

    format: Literal[1] = 1
    title: Text = "Comparison"
    text: list[Text] = []
    """What a reader should know: what is as published, what is not."""
    tasks: Annotated[list[TaskPlan], Field(min_length=1, max_length=20)]
    rows: Annotated[list[RowPlan], Field(min_length=1, max_length=200)]
    backbones: Annotated[list[Variant], Field(min_length=1)] | None = None
    """SAMs of every row that has one; null: the task's own."""
    weights: dict[Variant, Place] = {}
    """File of each SAM's weights, or "random"; what is not named is looked up."""
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=100)] = [0]
    """Of trainings; where nothing learns the first one counts."""
    shared: Overrides = {}
    training: Overrides = {}
    evaluation: Overrides = {}
    baseline: Name | None = None
    """Row that the others are compared with; null: the first."""
    demo: bool = False
    """Run with each bundle's demo settings, which takes minutes and says little."""

    @model_validator(mode="after")
    def _fit(self) -> Plan:
        names = [row.name for row in self.rows]
        problems = [f"rows: two are called {name}" for name in sorted({n for n in names if names.count(n) > 1})]
        tasks = [task.called for task in self.tasks]
        problems += [f"tasks: two are called {name}" for name in sorted({n for n in tasks if tasks.count(n) > 1})]
        if self.baseline is not None and self.baseline not in names:
            problems.append(f"baseline: got {self.baseline}; the rows are {', '.join(names)}")
        for index, row in enumerate(self.rows):
            others = [self.shared, self.training, self.evaluation, row.shared, row.training, row.evaluation]
            others += [task.shared for task in self.tasks]
            twice = sorted(key for key in row.each if any(key in other for other in others))
            problems += [f"rows::{index}::each: {key} is set elsewhere in the plan, too; name it once" for key in twice]
        for place, given in self._overrides():
            taken = sorted({*given} & ({*PLACES} - _OF_ROWS))
            problems += [f"{place}: {key}: named elsewhere in a plan, or chosen by the run" for key in taken]
            for key, instead in {"seed": "seeds", "sam_variant": "backbones"}.items():
                problems += [f"{place}: {key}: name it under {instead!r}"] if key in given else []
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _overrides(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for part in ("shared", "training", "evaluation"):
            yield part, getattr(self, part)
            for index, row in enumerate(self.rows):
                yield f"rows::{index}::{part}", getattr(row, part)
        yield from ((f"rows::{index}::each", row.each) for index, row in enumerate(self.rows))
        yield from ((f"tasks::{index}::shared", task.shared) for index, task in enumerate(self.tasks))

    def runs(self, *, dataset_dir: Path | None = None, rows: Sequence[str] | None = None) -> list[Run]:
        """All runs: every row with its first seed before any with its second, so that a table is there early.

        Args:
            dataset_dir: folder of the data of tasks that name none.
            rows: names of the rows wanted; None: all.

        Raises:
            ConfigError: a row's settings are not those of its bundle; a value that no bundle takes.
            DataError: data that are not there; folds that test the same cases.
            WeightsError: files of weights that are not there.
        """
        known = [row.name for row in self.rows]
        unknown = [f"{name}: no such row" for name in rows or () if name not in known]
        raise_all(unknown, ConfigError, f"plan: its rows are {', '.join(known)}")
        problems: list[str] = []
        contents = cache(Contents)
        found = [
            (number, run)
            for task in self.tasks
            for row in self.rows
            if rows is None or row.name in rows
            for number, run in self._of_row(task, row, dataset_dir, problems, contents)
        ]
        raise_all(list(dict.fromkeys(problems)), DataError, "plan: its data are not there")
        lost = {run.weights for _, run in found if run.weights not in (None, RANDOM)}
        lost_files = [f"{path}: no such file" for path in sorted(filter(None, lost)) if not os.path.isfile(path)]
        raise_all(lost_files, WeightsError, "plan: weights that it names are not there")
        raise_all([line for task in self.tasks for line in self._tested_twice(task)], DataError, "plan: its folds")
        places = [(run.task_name, run.group, run.seed, run.fold) for _, run in found]
        counts = Counter(places)
        twice = [
            f"{run.row.name}: two runs are row {run.group} with seed {run.seed}"
            for (_, run), place in zip(found, places, strict=True)
            if counts[place] > 1
        ]
        raise_all(list(dict.fromkeys(twice)), ConfigError, "plan: a table cannot tell these runs apart")
        return [run for _, run in sorted(found, key=lambda pair: pair[0])]

    def _tested_twice(self, task: TaskPlan) -> Iterator[str]:
        """What is wrong with folds of which each case has to be tested in one alone."""
        section = str({**self.shared, **task.shared, **self.evaluation}.get("section", "testing"))
        lists = [read_json(path, DataError, "datalist", "write it again") for path in task.datalists or ()]
        cases = Counter(str(item["case"]) for one in lists for item in one.get(section, ()) if "case" in item)
        if twice := sorted(case for case, count in cases.items() if count > 1):
            where = f"in section {section} of several datalists"
            yield f"task {task.called}: {len(twice)} cases are {where}, first {twice[0]}"

    def _of_row(
        self,
        task: TaskPlan,
        row: RowPlan,
        dataset_dir: Path | None,
        problems: list[str],
        contents: Callable[[Path, Path], Contents],
    ) -> Iterator[tuple[int, Run]]:
        settings = compose(task.recipe, row.strategy)
        folder = Path(task.dataset_dir) if task.dataset_dir else dataset_dir
        if folder is None:
            problems.append(f"task {task.recipe}: no dataset_dir; name it in the plan, or give --dataset-dir")
            return
        datalists = [Path(one) for one in task.datalists or [str(folder / "datalist.json")]]
        absent = [f"{path}: no such file" for path in [*datalists] if not path.is_file()]
        absent += [] if folder.is_dir() else [f"{folder}: no such folder"]
        problems += absent
        chosen = row.backbones or self.backbones if settings.has_sam else None
        backbones: Sequence[str | None] = chosen or [None]
        names, values = list(row.each), list(itertools.product(*row.each.values()))
        seeds = (row.seeds or self.seeds) if settings.trains else (row.seeds or self.seeds)[:1]
        for backbone, picked, (number, seed), (fold, datalist) in itertools.product(
            backbones, values, enumerate(seeds), enumerate(datalists)
        ):
            if absent:
                continue
            given = dict(zip(names, picked, strict=True))
            shared = {**self.shared, **task.shared, **row.shared, **given}
            if backbone is not None:
                shared = {"sam_variant": backbone, **shared}
            yield (
                number,
                Run(
                    plan=self,
                    settings=settings,
                    task=task,
                    row=row,
                    backbone=backbone,
                    values=given,
                    seed=seed,
                    fold=fold if len(datalists) > 1 else None,
                    dataset_dir=folder,
                    datalist=datalist,
                    contents=contents(datalist, folder),
                    shared=shared,
                    training={**self.training, **row.training} if settings.trains else {},
                    evaluation={**self.evaluation, **row.evaluation},
                ),
            )


@dataclass(frozen=True, eq=False)
class Run:
    """A training, where the strategy learns, and its evaluation, with one seed on one fold."""

    plan: Plan = field(repr=False)
    settings: BundleSettings = field(repr=False)
    task: TaskPlan = field(repr=False)
    row: RowPlan = field(repr=False)
    backbone: str | None
    values: Mapping[str, Any]
    seed: int
    fold: int | None
    dataset_dir: Path
    datalist: Path
    contents: Contents = field(repr=False)
    shared: Mapping[str, Any]
    training: Mapping[str, Any]
    evaluation: Mapping[str, Any]

    @property
    def group(self) -> str:
        """Name of the table's row that it belongs to, with its backbone and values where the plan has several."""
        values = [f"{key.rpartition('::')[2]}{_word(value)}" for key, value in self.values.items()]
        return "_".join([self.row.name, *self._backbones, *values])

    def without(self, key: str) -> str:
        """``group`` without the value of one key of ``each``: what rows share that differ in it alone."""
        return replace(self, values={k: v for k, v in self.values.items() if k != key}).group

    @property
    def title(self) -> str | None:
        """How the page calls its row, where the plan says so."""
        if self.row.title is None:
            return None
        values = [f"{key.rpartition('::')[2].replace('_', ' ')} {_word(value)}" for key, value in self.values.items()]
        return ", ".join([self.row.title, *self._backbones, *values])

    @property
    def _backbones(self) -> list[str]:
        """Its backbone, where its row has several."""
        several = len(self.row.backbones or self.plan.backbones or []) > 1
        return [self.backbone] if several and self.backbone is not None else []

    @property
    def place(self) -> int:
        """Number of its row in the plan."""
        return self.plan.rows.index(self.row)

    @property
    def task_name(self) -> str:
        return self.task.called

    @property
    def name(self) -> str:
        """Name of its folder: for people, whereas the key at its end is what counts."""
        fold = "" if self.fold is None else f"_fold{self.fold}"
        return f"{self.task_name}_{self.group}{fold}_seed{self.seed}_{self.key}"

    @property
    def variant(self) -> str | None:
        """SAM of the run; None for a network without one."""
        demo = self.settings.demo if self.plan.demo else None
        in_demo = demo and getattr(demo.run, "sam_variant", None)
        return (self.backbone or in_demo or self.settings.run.sam_variant) if self.settings.has_sam else None

    @property
    def weights(self) -> str | None:
        """File of base weights, or "random"; None: looked up by name."""
        return None if self.variant is None else self.plan.weights.get(self.variant)  # type: ignore[call-overload]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the numbers of this run depend on, but the version of the package, as JSON values.

        Settings at their defaults are left out: a later version, which knows more of them, keeps what was run.
        """
        settings = self.settings.model_dump(mode="json", exclude_defaults=True, exclude={"engine", "name"})
        words = {"title", "text", "description", "references", "prepare", "phantoms"}
        for part in ("task", "strategy"):
            own = settings[part].items()
            settings[part] = {k: v for k, v in own if k not in words and not k.startswith("data_")}
        places = {**self.shared, **self.training, **self.evaluation}
        files = {key: _file_hash(str(value)) for key, value in places.items() if key in PLACES and value}
        given = {part: dict(getattr(self, part)) for part in ("shared", "training", "evaluation")}
        return {
            "settings": settings, "demo": self.plan.demo, "seed": self.seed, "files": files, **given,
            "datalist": _file_hash(str(self.datalist)), "weights": _weights_hash(self.variant, self.weights),
            "data": self.contents.sha256(self.sections),
        }  # fmt: skip

    @property
    def sections(self) -> list[str]:
        """Those of the datalist that its numbers depend on."""
        tested = str({**self.shared, **self.evaluation}.get("section", "testing"))
        return sorted({tested, *(("training", "validation") if self.settings.trains else ())})

    @property
    def newest(self) -> float:
        """When the youngest image or label that its numbers depend on was changed, in seconds since 1970."""
        return self.contents.newest(self.sections)

    @cached_property
    def key(self) -> str:
        """Twelve digits of the hash of its identity."""
        return _key(self.identity)

    @property
    def former_keys(self) -> list[str]:
        """What it was to earlier versions."""
        return [_key(one) for one in former(self.identity)]

    def overrides(self, folder: Path, kind: str, keys: Mapping[str, set[str]]) -> dict[str, Any]:
        """Values of a ``monai.bundle run`` of this run in ``folder``.

        Args:
            kind: "train" or "evaluate".
            keys: kind -> those of the bundle's config. What the plan names for both and only the other one has (a
                picker of training slices, say) is left out.
        """
        found: dict[str, Any] = {
            "dataset_dir": os.path.abspath(self.dataset_dir),
            "datalist": os.path.abspath(self.datalist),
            "output_dir": os.path.abspath(folder),
            "seed": self.seed,
        }
        if self.weights is not None:
            found["sam_checkpoint"] = self.weights if self.weights == RANDOM else os.path.abspath(self.weights)
        more = self.training if kind == "train" else self.evaluation
        elsewhere = set().union(*keys.values()) - keys[kind]
        shared = {key: value for key, value in self.shared.items() if key.split("::")[0] not in elsewhere}
        return {**found, **{key: _ready(key, value) for key, value in {**shared, **more}.items()}}


def _ready(key: str, value: Any) -> Any:
    """A value as MONAI takes it: paths in full, a picker by its class, null as an expression."""
    if value is None:
        return NOTHING
    if key in PLACES:
        return value if value == RANDOM else os.path.abspath(value)
    if key.endswith("::picker") and isinstance(value, dict) and "name" in value:
        return component(PICKERS, value)
    return value


def _word(value: Any) -> str:
    """A value as part of a name."""
    text = "-".join(map(str, value)) if isinstance(value, list) else "all" if value is None else str(value)
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text)[:40]


def former(identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An identity as earlier versions recorded it: without images and labels, and published weights by their name where
    they had not been downloaded yet."""
    plain = {key: value for key, value in identity.items() if key != "data"}
    names = [name for name, file in KNOWN.items() if file.sha256 and file.sha256 == plain.get("weights")]
    return [plain, *({**plain, "weights": f"weights of {name}"} for name in names)]


def _key(identity: Mapping[str, Any]) -> str:
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _file_hash(path: str) -> str:
    return RANDOM if path == RANDOM else known_hash(path) if os.path.isfile(path) else f"no file {Path(path).name}"


@cache
def _weights_hash(variant: str | None, given: str | None) -> str | None:
    """Hash of base weights: of published ones also before they are here; their name alone where it is not known."""
    if variant is None or given == RANDOM:
        return given
    try:
        path = str(find_weights(variant, given, download=False))
    except WeightsError:
        return (KNOWN[variant].sha256 if variant in KNOWN else None) or f"weights of {variant}"
    return RANDOM if path == RANDOM else sha256_of(path)


def plan_names() -> list[str]:
    """Plans that come with the package."""
    return sorted(path.stem for path in PLANS.glob("*.json"))


def read_plan(name: str | Path) -> Plan:
    """A plan by its path, or by the name of one that comes with the package; paths in a file are relative to it, those
    of the package's plans to the current folder.

    Raises:
        ConfigError: no such plan; everything that is wrong in it, at once.
    """
    path, folder = Path(name), Path(name).parent
    if path.suffix != ".json" and str(name) in plan_names():
        path, folder = PLANS / f"{name}.json", Path()
    if not path.is_file():
        raise ConfigError(f"no plan {str(name)!r}; give a .json file, or one of {', '.join(plan_names())}")
    value = without_comments(read_json(path, ConfigError, "plan", "correct it"))
    raise_all(problems_of(value, Plan), ConfigError, f"{path}: not a plan of a comparison")
    return Plan.model_validate(_placed(value, folder))


def _placed(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The plan with its relative paths made those of its own folder."""

    def at(place: str) -> str:
        try:
            return place if place == RANDOM else str(folder / Path(place).expanduser())
        except RuntimeError as error:
            raise ConfigError(f"{place}: nobody of that name has a home here; give the path in full") from error

    def recipe(name: str) -> str:
        return at(name) if name.endswith(".json") else name

    def overrides(given: dict[str, Any]) -> dict[str, Any]:
        return {k: at(v) if k in PLACES and isinstance(v, str) else v for k, v in given.items()}

    parts = ("shared", "training", "evaluation")
    tasks = [
        {
            **task,
            "recipe": recipe(task["recipe"]),
            **({"dataset_dir": at(task["dataset_dir"])} if task.get("dataset_dir") else {}),
            **({"datalists": [at(one) for one in task["datalists"]]} if task.get("datalists") else {}),
            **({"shared": overrides(task["shared"])} if "shared" in task else {}),
        }
        for task in plan["tasks"]
    ]
    rows = [
        {**row, "strategy": recipe(row["strategy"]), **{p: overrides(row[p]) for p in parts if p in row}}
        for row in plan["rows"]
    ]
    whole = {p: overrides(plan[p]) for p in parts if p in plan}
    weights = {variant: at(place) for variant, place in plan.get("weights", {}).items()}
    return {**plan, **whole, "tasks": tasks, "rows": rows, "weights": weights}
