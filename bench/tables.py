"""Tables in README.md and docs/ from the results files: never typed, always regenerated."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path

from bench.ceilings import Roof
from bench.results import Row, latest, rate_unit, read_rows

# <!-- bench:OP -->, <!-- bench:OP/CASE -->, <!-- bench:OP@FILE -->, <!-- bench:OP/CASE@FILE -->:
# CASE and FILE (the stem of a results file) are patterns
_OPEN = re.compile(r"^[ \t]*<!--\s*bench:(?P<name>\S+)\s*-->[ \t]*$", re.M)
_CLOSE = re.compile(r"^[ \t]*<!--\s*/bench\s*-->[ \t]*$", re.M)


def update(root: Path, folder: Path, *, write: bool) -> list[Path]:
    """Bring the blocks of ``root/README.md`` and ``root/docs/*.md`` up to date; the files that
    differed.
    """
    files = {path.stem: read_rows(path) for path in sorted(folder.glob("*.csv"))}
    stale = []
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if not path.exists():
            continue
        before = path.read_text(encoding="utf-8")
        after = rewrite(before, files, str(path))
        if after != before:
            stale.append(path)
            if write:
                temporary = path.with_suffix(".md.tmp")
                temporary.write_text(after, encoding="utf-8")
                temporary.replace(path)
    return stale


def rewrite(text: str, files: dict[str, list[Row]], where: str = "text") -> str:
    """``text`` with every bench block filled from ``files`` (stem -> rows). ValueError on a block
    without an end.
    """
    parts, position = [], 0
    while opening := _OPEN.search(text, position):
        closing = _CLOSE.search(text, opening.end())
        following = _OPEN.search(text, opening.end())
        if closing is None or (following and following.start() < closing.start()):
            raise ValueError(f"{where}: the block bench:{opening['name']} has no <!-- /bench -->")
        parts += [text[position : opening.end()], "\n\n", render(opening["name"], files), "\n\n"]
        parts.append(closing[0])
        position = closing.end()
    return "".join(parts) + text[position:]


def render(name: str, files: dict[str, list[Row]]) -> str:
    """Markdown of one block: a table per run that is the last of some point, or a sentence."""
    selector, _, file_pattern = name.partition("@")
    op, _, case_pattern = selector.partition("/")
    blocks = []
    # GPUs first, then CPUs, each by name
    for stem in sorted(files, key=lambda stem: (stem.startswith("cpu-"), stem)):
        if not fnmatch.fnmatchcase(stem, file_pattern or "*"):
            continue
        for rows in latest(files[stem], op):
            own = [r for r in rows if r.op == op]
            shown = [r for r in own if fnmatch.fnmatchcase(r.case, case_pattern or "*")]
            if shown:
                blocks.append(_table(shown, Roof.of(rows)))
    if not blocks:
        return f"Not measured yet: `python -m bench {op}` adds the rows."
    return "\n\n".join(blocks)


def _table(rows: Sequence[Row], roof: Roof) -> str:
    first = rows[0]
    caption = f"{first.gpu}, torch {first.torch}"
    caption += f", Triton {first.triton}" if first.triton else ""
    caption += f", commit {first.commit}" if first.commit else ""
    caption += f", {first.date[:10]} (run {first.run}):"
    has_flops = any(row.useful_flops for row in rows)
    has_peak = any(row.peak_mb is not None for row in rows)
    has_roof = first.op != "ceiling" and any(roof.percent(row) is not None for row in rows)
    has_scope = any(row.peer_scope for row in rows)

    header = ["case", "shape", "implementation"]
    header += ["computes"] * has_scope + ["ms (p20 to p80)"]
    amount = "useful_flops" if has_flops else "bytes"
    unit, factor = rate_unit(rows, amount)
    header += [f"useful {unit}" if has_flops else unit] + ["% of roof"] * has_roof
    header += ["extra MB"] * has_peak + ["rel. error"]
    n_text = 4 if has_scope else 3
    lines = [header, ["---"] * n_text + ["---:"] * (len(header) - n_text)]
    points = dict.fromkeys((r.case, r.shape, r.dtype) for r in rows)  # in the order of the file
    for point in points:
        same = [r for r in rows if (r.case, r.shape, r.dtype) == point]
        for i, row in enumerate(sorted(same, key=lambda r: r.ms_p50)):
            shape = f"{row.shape.replace(';', ' ')} {row.dtype}"
            cells = [row.case, shape] if i == 0 else ["", ""]
            cells.append(f"**{row.impl}**" if row.is_ours else row.impl)
            if has_scope:
                cells.append({"same": "the same", "less": "less"}.get(row.peer_scope, ""))
            cells.append(f"{_ms(row.ms_p50)} ({_ms(row.ms_p20)} to {_ms(row.ms_p80)})")
            if row.useful_flops or not has_flops:
                cells.append(f"{factor * getattr(row, amount) / row.ms_p50:.3g}")
            else:  # a copy among GEMMs
                bytes_unit, bytes_factor = rate_unit([row], "bytes")
                cells.append(f"{bytes_factor * row.bytes / row.ms_p50:.3g} {bytes_unit}")
            if has_roof:
                percent = roof.percent(row)
                cells.append("" if percent is None else f"{percent:.0f}")
            if has_peak:
                cells.append("" if row.peak_mb is None else f"{row.peak_mb:,.0f}")
            cells.append(f"{row.rel_err:.0e}")
            lines.append(cells)
    return f"{caption}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ms(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.3g}"
