"""Figures of one style, drawn without a display and without matplotlib's global state."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.rcsetup
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE: Any = {
  "axes.prop_cycle": matplotlib.rcsetup.cycler(color=COLORS),
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.alpha": 0.3,
  "font.size": 9,
  "legend.frameon": False,
  "savefig.dpi": 160,
}


def subplots(rows: int = 1, columns: int = 1, *, width: float = 4.5, height: float = 3.2) -> tuple[Figure, np.ndarray]:
  """A figure and its axes [rows, columns].

  Args:
    rows: of axes.
    columns: of axes.
    width: of one, in inches.
    height: of one, in inches.
  """
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def curves(
  axes: Axes,
  series: Mapping[str, tuple[Float[np.ndarray, " t"], Float[np.ndarray, "t *s"]]],
  *,
  xlabel: str = "",
  ylabel: str = "",
  title: str = "",
) -> None:
  """Lines with a band of one standard deviation over seeds.

  Args:
    axes: to draw on.
    series: label -> (x [T], y [T] or [T, seeds]), as `train.read_metrics` returns.
    xlabel: of the axis, with its unit.
    ylabel: of the axis, with its unit.
    title: of the axes.
  """
  with matplotlib.rc_context(_STYLE):
    for label, (x, y) in series.items():
      x, y = np.asarray(x), np.asarray(y, np.float64)
      if y.ndim not in (1, 2) or x.shape != y.shape[:1]:
        raise ValueError(f"series: got x {x.shape} and y {y.shape} for {label!r}, expected [T] and [T] or [T, seeds]")
      runs = y.reshape(len(x), -1)
      mean, std = runs.mean(1), runs.std(1, ddof=1) if runs.shape[1] > 1 else np.zeros(len(x))
      (line,) = axes.plot(x, mean, label=label)
      if runs.shape[1] > 1:
        axes.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(series) > 1:
      axes.legend()


def save(figure: Figure, path: str | os.PathLike) -> Path:
  """Writes a figure, replacing an older one at once; the suffix (`.png`, `.pdf`, `.svg`) is the format."""
  path = Path(path)
  formats = sorted(figure.canvas.get_supported_filetypes())
  if path.suffix.removeprefix(".") not in formats:
    raise ValueError(f"path: got {path.name}, expected a suffix of {', '.join(formats)}")
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  with matplotlib.rc_context(_STYLE):
    figure.savefig(temporary, format=path.suffix.removeprefix("."))
  temporary.replace(path)
  return path
