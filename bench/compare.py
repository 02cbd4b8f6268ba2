# SPDX-License-Identifier: MIT
"""Two CSV files of bench/run.py side by side: python bench/compare.py before.csv after.csv [--plot picture.png]"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

Key = tuple[str, str, str]


def read(path: Path) -> dict[Key, dict[str, str]]:
    """Rows by (case, backend, pass)."""
    with path.open() as stream:
        return {(row["case"], row["backend"], row["pass"]): row for row in csv.DictReader(stream)}


def table(before: dict[Key, dict[str, str]], after: dict[Key, dict[str, str]]) -> list[str]:
    """Markdown: the share of sgemm before and after, and their ratio (above 1: faster)."""
    lines = ["| case | backend | pass | of sgemm before | after | ratio |", "| --- | --- | --- | --- | --- | --- |"]
    for key in before:
        if key in after:
            old, new = float(before[key]["of_sgemm"]), float(after[key]["of_sgemm"])
            lines.append(f"| {' | '.join(key)} | {old:.3f} | {new:.3f} | {new / old:.2f} |")
    return lines


def plot(before: dict[Key, dict[str, str]], after: dict[Key, dict[str, str]], path: Path) -> None:
    from matplotlib import pyplot

    keys = [key for key in before if key in after]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(keys) + 1))
    for shift, label, rows in ((-0.2, "before", before), (0.2, "after", after)):
        places = [place + shift for place in range(len(keys))]
        axes.barh(places, [float(rows[key]["of_sgemm"]) for key in keys], 0.4, label=label)
    axes.set_yticks(range(len(keys)), [" ".join(key) for key in keys])
    axes.invert_yaxis()
    axes.set_xlabel("useful FLOP/s as a share of sgemm 1024^3")
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    before, after = read(options.before), read(options.after)
    print("\n".join(table(before, after)))
    if options.plot:
        plot(before, after, options.plot)


if __name__ == "__main__":
    main()
