"""The results file: one CSV per device, rows only ever appended."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from bench.machine import ROOT

RESULTS = ROOT / "bench" / "results"


class BadFile(ValueError):
    """A results file that bench cannot read or append to; the message says which and what to do."""


MEASURED = ("weights_mb", "h2d_gbs")  # in the shape of a row, though not chosen


@dataclass(frozen=True)
class Row:
    """One provider at one point. Milliseconds; ``bytes`` and ``useful_flops`` are the least the op
    needs.
    """

    run: str
    op: str
    case: str
    impl: str
    peer_scope: str  # "same", "less", or empty for ours and for ceilings
    shape: str
    dtype: str
    ms_p20: float
    ms_p50: float
    ms_p80: float
    useful_flops: int
    bytes: int
    peak_mb: float | None  # extra memory in 1e6 bytes; None where it is not measured
    rel_err: float
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str

    @property
    def is_ours(self) -> bool:
        return self.impl.startswith("ours-")

    def size(self, key: str) -> str | None:
        """The value of ``key`` in ``shape``."""
        return dict(pair.split("=", 1) for pair in self.shape.split(";")).get(key)

    @property
    def point(self) -> tuple[str, ...]:
        """What was measured; of the shape, not what is itself a measurement."""
        pairs = [p for p in self.shape.split(";") if p.partition("=")[0] not in MEASURED]
        return self.op, self.case, ";".join(pairs), self.dtype


COLUMNS = tuple(field.name for field in fields(Row))
_FORMATS = {"ms_p20": ".5g", "ms_p50": ".5g", "ms_p80": ".5g", "peak_mb": ".1f", "rel_err": ".2e"}
_PARSERS = {"useful_flops": int, "bytes": int} | {name: float for name in _FORMATS}


def _to_csv(rows: Iterable[Row], header: bool) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(COLUMNS)
    for row in rows:
        values = ((name, getattr(row, name)) for name in COLUMNS)
        writer.writerow(
            "" if v is None else format(v, _FORMATS.get(name, "")) for name, v in values
        )
    return text.getvalue().encode()


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append whole rows in one write, after a check that the file has these columns; synced to
    disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as handle:
        handle.seek(0)
        content = handle.read()
        if content:
            first = content.split(b"\n", 1)[0].decode(errors="replace").rstrip("\r")
            if first != ",".join(COLUMNS):
                raise BadFile(
                    f"{path}: the first line is not the header that bench writes; "
                    f"move the file away or pass another --out"
                )
            if not content.endswith(b"\n"):
                raise BadFile(f"{path}: the last line is incomplete; remove it and run again")
        handle.write(_to_csv(rows, header=not content))
        handle.flush()
        os.fsync(handle.fileno())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[io.BufferedRandom]:
    with path.open("a+b") as handle:
        try:
            import fcntl
        except ImportError:  # Windows: one writer at a time is the user's business
            yield handle
            return
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle


def read_rows(path: Path) -> list[Row]:
    """Every row of one file. ``BadFile`` names the line that does not fit."""
    with path.open(newline="") as handle:
        reader = csv.DictReader(handle, strict=True)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise BadFile(f"{path}: its columns are not {','.join(COLUMNS)}")
        rows = []
        for record in reader:
            try:
                if None in record or None in record.values():
                    raise ValueError(f"expected {len(COLUMNS)} fields")
                values = {k: _PARSERS.get(k, str)(v) if v else None for k, v in record.items()}
                if any(values[k] is None for k in _PARSERS if k != "peak_mb"):
                    raise ValueError("a number is missing")
                values = {
                    k: "" if v is None and k not in _PARSERS else v for k, v in values.items()
                }
                rows.append(Row(**values))
            except ValueError as error:
                raise BadFile(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def latest(rows: Iterable[Row], op: str, run: str | None = None) -> list[list[Row]]:
    """The last measurement of every point of ``op``: rows run by run, the newest first, each with
    the ceilings of its run. All rows of a point are of one run. ``run`` takes that run only.
    """
    rows = [row for row in rows if run in (None, row.run)]
    last = {row.point: row.run for row in rows if row.op == op}
    return [
        [
            row
            for row in rows
            if row.run == found
            and (row.op == "ceiling" if row.op != op else last[row.point] == found)
        ]
        for found in reversed(dict.fromkeys(row.run for row in rows))
        if found in last.values()
    ]


def rate_unit(rows: Iterable[Row], amount: str) -> tuple[str, float]:
    """A readable unit for ``bytes`` or ``useful_flops`` over time: its name and the factor from
    amount per ms.
    """
    fastest = max((getattr(row, amount) / row.ms_p50 for row in rows), default=0.0)
    base = "B/s" if amount == "bytes" else "FLOP/s"
    return (f"T{base}", 1e-9) if fastest >= 5e8 else (f"G{base}", 1e-6)
