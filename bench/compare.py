# SPDX-License-Identifier: MIT
"""CSV files of bench.run for a person to read.

python -m bench.compare before.csv after.csv [--plot picture.png]    two runs side by side
python -m bench.compare rows.csv --report docs/benchmarks.md         one run as a page, with a picture beside it
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path
from typing import Any

Key = tuple[str, str, str]
Rows = dict[Key, dict[str, str]]


def read(path: Path) -> Rows:
    """Rows by (case, backend, pass)."""
    with path.open() as stream:
        return {(row["case"], row["backend"], row["pass"]): row for row in csv.DictReader(stream)}


def table(before: Rows, after: Rows) -> list[str]:
    """Markdown: the share of sgemm before and after, and their ratio (above 1: faster)."""
    lines = ["| case | backend | pass | of sgemm before | after | ratio |", "| --- | --- | --- | --- | --- | --- |"]
    for key in before:
        if key in after:
            old, new = float(before[key]["of_sgemm"]), float(after[key]["of_sgemm"])
            lines.append(f"| {' | '.join(key)} | {old:.3f} | {new:.3f} | {new / old:.2f} |")
    return lines


def page(rows: Rows, picture: str, roofline_picture: str) -> list[str]:
    """One run: how fast our op is as a share of sgemm, and how many times as long the others take."""
    first = next(iter(rows.values()))
    others = [name for name in dict.fromkeys(backend for _, backend, _ in rows) if name not in ("natten_ops", "copy")]
    lines = [
        "# Benchmarks",
        "",
        f"Written by `make bench` on {first['device']}, {first['threads']} thread(s), torch {first['torch']}, commit "
        f"{first['commit']}. Ratios of one process, contenders interleaved, medians; times of a shared machine mean little.",
        "",
        "`of sgemm`: useful FLOP/s (4 x heads x visible pairs x head dim; 3.5 times that with the backward) as a share of a",
        "float32 1024^3 matrix product on the same threads. The other columns: how many times as long they take.",
        "`dense_sdpa` attends to everything: another function, a floor. Empty: cannot do it, or would take minutes.",
        "",
        f"![share of sgemm]({picture})",
        "",
        "The roofline: where a case lies under the two floors of the machine, sgemm and a copy of its tensors.",
        "",
        f"![roofline]({roofline_picture})",
        "",
        f"| case | pass | ms | of sgemm | {' | '.join(others)} |",
        "| --- | --- | --- | --- |" + " --- |" * len(others),
    ]
    for (case, backend, kind), row in rows.items():
        if backend == "natten_ops":
            times = [
                rows[case, name, kind]["times_natten_ops"] if (case, name, kind) in rows else "" for name in others
            ]
            lines.append(f"| {case} | {kind} | {row['p50_ms']} | {row['of_sgemm']} | {' | '.join(times)} |")
    return lines


def plot(series: dict[str, Rows], keys: list[Key], path: Path) -> None:
    """Log bars of the share of sgemm, forward beside training, with a line at sgemm itself."""
    from matplotlib import pyplot

    cases = list(dict.fromkeys(case for case, _, _ in keys))
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 0.45 * len(cases) + 1.5), sharey=True, layout="constrained")
    width = 0.8 / len(series)
    for axes, kind in zip(panels, ("forward", "training")):
        for number, (label, rows) in enumerate(series.items()):
            shares = {i: rows.get((case, "natten_ops", kind)) for i, case in enumerate(cases)}
            present: dict[Any, float] = {
                i + (number + 0.5) * width - 0.4: float(r["of_sgemm"]) for i, r in shares.items() if r
            }
            axes.barh(list(present), list(present.values()), width, label=label)
        axes.axvline(1, color="black", linewidth=1)
        axes.set(title=kind, xscale="log", xlabel="useful FLOP/s as a share of sgemm 1024^3 (black line)")
    panels[0].set_yticks(range(len(cases)), cases)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(series))
    figure.savefig(path)


def roofline(rows: Rows, path: Path) -> None:
    """Share of sgemm over FLOPs a byte of query, key, value and output; lines at sgemm and at what a copy moves."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    copies, points = [], []
    for (case, backend, kind), row in rows.items():
        if kind != "forward" or backend not in ("natten_ops", "copy"):
            continue
        # `of_sgemm` of a copy is its time told in the case's FLOPs: divided by FLOPs a byte, bytes a sgemm FLOP.
        intensity = int(row["flops"]) / int(row["bytes"])
        if backend == "copy":
            copies.append(float(row["of_sgemm"]) / intensity)
            continue
        points.append((float(row["of_sgemm"]), intensity, case))
    free = 0.0  # from here up no name stands yet
    for share, intensity, case in sorted(points):
        axes.plot(intensity, share, "o", color="tab:blue")
        free = max(share, free)
        line = {"arrowstyle": "-", "color": "silver", "linewidth": 0.5}
        place = {"xytext": (1.15 * intensity, free), "textcoords": "data", "va": "center", "fontsize": 7}
        axes.annotate(case, (intensity, share), arrowprops=line, **place)
        free *= 1.05
    moved = statistics.median(copies)
    reach = [0.5 / moved, 2 * max(intensity for _, intensity, _ in points)]
    corner = 1 / moved
    axes.plot([reach[0], corner, reach[1]], [moved * reach[0], 1, 1], color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="useful FLOPs a byte of query, key, value and output")
    axes.set(ylabel="share of sgemm 1024^3", title="forward; black: a copy of the tensors, and sgemm")
    figure.savefig(path)


def by_backend(rows: Rows) -> tuple[dict[str, Rows], list[Key]]:
    """A run's rows as one series for each backend, all under the keys of ours."""
    series: dict[str, Rows] = {}
    for (case, backend, kind), row in rows.items():
        if backend == "copy":
            continue
        series.setdefault(backend, {})[case, "natten_ops", kind] = row
    return series, list(series["natten_ops"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    runs = [read(path) for path in options.files]
    if options.report:
        picture = options.report.parent / "images" / "benchmarks.png"
        plot(*by_backend(runs[0]), picture)
        roof = picture.with_name("roofline.png")
        roofline(runs[0], roof)
        lines = page(runs[0], f"images/{picture.name}", f"images/{roof.name}")
        options.report.write_text("\n".join(lines) + "\n")
    elif len(runs) == 2:
        print("\n".join(table(*runs)))
        if options.plot:
            plot({"before": runs[0], "after": runs[1]}, [key for key in runs[0] if key in runs[1]], options.plot)
    else:
        parser.error("give two files, or one with --report")


if __name__ == "__main__":
    main()
