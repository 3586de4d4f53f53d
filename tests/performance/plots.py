"""Shared by the plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """Return matplotlib's pyplot, set up to draw without a screen, and reproducibly."""
    import matplotlib as mpl

    mpl.use("Agg")
    # Otherwise, names in SVG files are random.
    mpl.rcParams["svg.hashsalt"] = "dsmq"
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    """Write a figure to an SVG or PNG file, without the date."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
