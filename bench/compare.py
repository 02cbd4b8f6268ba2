# SPDX-License-Identifier: MIT
"""CSV files of bench/run.py for a person to read.

python bench/compare.py before.csv after.csv [--plot picture.png]    two runs side by side
python bench/compare.py rows.csv --report docs/benchmarks.md         one run as a page, with a picture beside it
"""

from __future__ import annotations

import argparse
import csv
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


def page(rows: Rows, picture: str) -> list[str]:
    """One run: how fast our op is as a share of sgemm, and how many times as long the others take."""
    first = next(iter(rows.values()))
    others = [name for name in dict.fromkeys(backend for _, backend, _ in rows) if name != "natten_ops"]
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


def by_backend(rows: Rows) -> tuple[dict[str, Rows], list[Key]]:
    """A run's rows as one series for each backend, all under the keys of ours."""
    series: dict[str, Rows] = {}
    for (case, backend, kind), row in rows.items():
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
        options.report.write_text("\n".join(page(runs[0], f"images/{picture.name}")) + "\n")
    elif len(runs) == 2:
        print("\n".join(table(*runs)))
        if options.plot:
            plot({"before": runs[0], "after": runs[1]}, [key for key in runs[0] if key in runs[1]], options.plot)
    else:
        parser.error("give two files, or one with --report")


if __name__ == "__main__":
    main()
