"""CSV: cases and history of a run, tables of patients: encodings, quotes, columns, cells; judged by ``csv`` itself."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from pathlib import Path
from typing import Any

from samseg_monai.data.datalists.layouts import patients_in, read_csv
from samseg_monai.metrics.rows import write_rows
from samseg_monai.report.runs import RunResult
from tests.mutations.harness import Trial, damaged, pick

NUMBER = re.compile(r"\s*[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?\s*|\s*[-+]?(nan|inf|infinity)\s*", re.IGNORECASE)
FLAGS = ("excluded", "empty_prediction", "empty_reference")
CELLS = ("", "x", "nan", "inf", "-0.5", "1e3", "1_0", "0x10", "1,5", "=1+1", "'=1+1", "True", "true", "1", " 2",
         "\\x1b[31m",
         "é", "٣", "1e400", "a\nb", 'a"b', "p9", "None", "１")  # fmt: skip


def text_of(rows: list[list[str]], **how: Any) -> str:
    """The table as a text."""
    stream = io.StringIO()
    csv.writer(stream, **how).writerows(rows)
    return stream.getvalue()


def change(rows: list[list[str]], rng: random.Random) -> str:
    """Change one cell, row or column."""
    at, column = rng.randrange(len(rows)), rng.randrange(len(rows[0]))
    how = rng.randrange(8)
    if how < 4:
        column = min(column, len(rows[at]) - 1)
        rows[at][column] = rng.choice(CELLS)
        return f"cell {at}, {column} = {rows[at][column]!r}"
    if how == 4:
        for row in rows:
            del row[column : column + 1]
        return f"column {column} gone"
    if how == 5:
        rows[at] = rows[at][:-1] if rng.random() < 0.5 else [*rows[at], "7"]
        return f"row {at} has {len(rows[at])} cells"
    if how == 6:
        rows.insert(at, list(rows[at]))
        return f"row {at} twice"
    rows[0][column] = rng.choice(rows[0])
    return f"column {column} is called {rows[0][column]}"


def encoded(text: str, rng: random.Random) -> tuple[str, bytes]:
    """The bytes of the table: mostly UTF-8, now and then as spreadsheets and bad disks leave it."""
    how = rng.random()
    if how < 0.08:
        return "byte order mark", b"\xef\xbb\xbf" + text.encode()
    if how < 0.12:
        return "UTF-16", text.encode("utf-16")
    if how < 0.15:
        return "Latin-1", text.encode("latin1", "replace")
    if how < 0.25:
        return damaged(text.encode(), rng)
    if how < 0.28:
        return "no rows", text.splitlines()[0].encode() + b"\n"
    return "", text.encode()


def lines_of(content: bytes) -> tuple[str, list[str], list[tuple[int, list[str]]]]:
    """Why it is no table; its columns, and its rows that are not empty with their numbers."""
    try:
        text = content.decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""))
        rows = [(reader.line_num, row) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        return f"no table ({error})"[:100], [], []
    if not rows:
        return "", [], []
    return "", rows[0][1], rows[1:]


def spelt(text: str) -> str:
    """A text as it was before it was made safe for spreadsheets and terminals."""
    text = re.sub(r"\\(\\|[tnr]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})",
                  lambda m: m[0].encode("ascii").decode("unicode_escape"), text)  # fmt: skip
    bare = text.lstrip("'")
    return text[1:] if text != bare and bare[:1] in tuple("=+-@\t\r\n＝＋－＠") else text


def make_runs(folder: Path) -> Any:
    """``cases.csv`` and ``history.csv`` of a run, one of them changed."""
    (folder / "metrics.json").write_text("{}")
    (folder / "run_card.json").write_text(json.dumps({"strategy": "lora", "seed": 0}))
    row = {"class": "tumour", "dice": 0.5, "hd95_mm": 3.25, **dict.fromkeys(FLAGS, False), "prediction_ml": 1.0,
           "reference_ml": 2.0}  # fmt: skip
    write_rows([{"case": case, **row} for case in ("c1", "c2", "=c3", "c,4", 'c"5')], folder / "cases.csv")
    history = "epoch,iteration,name,value\n1,5,loss,0.5\n2,10,loss,0.25\n2,10,dice,nan\n"
    base = {"cases.csv": (folder / "cases.csv").read_text("utf-8"), "history.csv": history}

    def trial(rng: random.Random) -> Trial:
        file = rng.choice(sorted(base))
        for name, text in base.items():
            (folder / name).write_text(text)
        rows = [list(row) for row in csv.reader(io.StringIO(base[file], newline=""))]
        told = [change(rows, rng) for _ in range(rng.choice((0, 1, 1, 2))) if rows[0]]
        how, content = encoded(text_of(rows, lineterminator=rng.choice(("\n", "\r\n"))), rng)
        (folder / file).write_bytes(content)
        rule = (_cases_rule if file == "cases.csv" else _history_rule)(content)
        wrong = (lambda run: _wrong_cases(run, content)) if file == "cases.csv" else lambda run: ""
        return Trial(f"{file}: {'; '.join(told)} {how}", lambda: RunResult.load(folder), rule, wrong)

    return trial


def _cases_rule(content: bytes) -> str:
    problem, names, rows = lines_of(content)
    names = [spelt(name) for name in names]
    if problem or not rows:
        return problem or "no case"
    if len(set(names)) < len(names) or not {"case", "class", *FLAGS} <= set(names):
        return f"columns {names}"
    seen = set()
    for number, row in rows:
        if len(row) != len(names):
            return f"line {number} has {len(row)} cells"
        cells = dict(zip(names, row, strict=True))
        for name, cell in cells.items():
            good = (name in ("case", "class") or cell in ("True", "False") if name in FLAGS or name in ("case", "class")
                    else NUMBER.fullmatch(cell) and cell.isascii())  # fmt: skip
            if not good:
                return f"{name} = {cell!r}"
        key = (spelt(cells["case"]), spelt(cells["class"]))
        if key in seen:
            return f"{key} twice"
        seen.add(key)
    return ""


def _wrong_cases(run: RunResult, content: bytes) -> str:
    _, names, rows = lines_of(content)
    at = [spelt(name) for name in names].index("case")
    wanted = [spelt(row[at]) for _, row in rows]
    found = [row["case"] for row in run.rows]
    return "" if found == wanted else f"{found} for {wanted}"


def _history_rule(content: bytes) -> str:
    problem, names, rows = lines_of(content)
    names = [spelt(name) for name in names]
    if problem or not names:
        return problem
    if len(set(names)) < len(names):
        return f"columns {names}"
    for number, row in rows:
        cells = dict(zip(names, row, strict=False))
        if len(row) != len(names) or not {"epoch", "iteration", "name", "value"} <= set(cells):
            return f"line {number}: {row}"
        whole = re.compile(r"\s*[-+]?\d+\s*", re.ASCII)
        if not whole.fullmatch(cells["epoch"]) or not whole.fullmatch(cells["iteration"]):
            return f"line {number}: {row}"
        if not NUMBER.fullmatch(cells["value"]) or not cells["value"].isascii():
            return f"line {number}: {row}"
    return ""


def make_patients(folder: Path) -> Any:
    """A table of the patients of four cases."""
    cases = ["c0", "c1", "c2", "c3"]
    base = [["case", "patient", "age"], *[[case, f"p{n // 2}", "50"] for n, case in enumerate(cases)]]
    path = folder / "patients.csv"

    def trial(rng: random.Random) -> Trial:
        rows = [list(row) for row in base]
        if rng.random() < 0.2:
            for row in rows[1:]:
                row[0] = pick(rng, f"data\\{row[0]}.nii.gz", f"a/{row[0]}.nii", row[0])
        told = [change(rows, rng) for _ in range(rng.choice((0, 1, 1, 2))) if rows[0]]
        delimiter = rng.choice(",,;\t")
        how, content = encoded(text_of(rows, delimiter=delimiter, lineterminator=rng.choice(("\n", "\r\n"))), rng)
        path.write_bytes(content)
        expected: dict[str, str] = {}
        rule = _patients_rule(content, cases, expected)
        return Trial(f"{'; '.join(told)} {delimiter!r} {how}", lambda: patients_in(read_csv(path), cases, "t"), rule,
                     lambda found: "" if found == expected else f"{found} for {expected}")  # fmt: skip

    return trial


def _patients_rule(content: bytes, cases: list[str], expected: dict[str, str]) -> str | None:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "no UTF-8"
    first = (text.splitlines() or [""])[0]
    delimiter = max(",;\t", key=first.count)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if any(row)]
    except csv.Error as error:
        return f"no table ({error})"
    if len(rows) < 2:
        return "no rows"
    header = [name.strip().lower() for name in rows[0]]
    if len(set(header)) < len(header) or "" in header or any(len(row) != len(header) for row in rows):
        return f"columns {header}"
    key = next((name for name in ("case", "image", "name", "file") if name in header), None)
    owner = next((name for name in ("patient", "patient_id", "patientid", "subject", "subject_id", "group")
                  if name in header), None)  # fmt: skip
    if key is None or owner is None:
        return f"columns {header}"
    found: dict[str, set[str]] = {}
    for row in rows[1:]:
        cells = dict(zip(header, (cell.strip() for cell in row), strict=True))
        name = re.split(r"[/\\]", cells[key])[-1]
        found.setdefault(re.sub(r"\.nii(\.gz)?$", "", name), set()).add(cells[owner])
    for case in cases:
        if len(found.get(case, ())) != 1 or "" in found[case]:
            return f"{case} has no patient, or two"
        expected[case] = next(iter(found[case]))
    return ""
