"""The look of the lessons' figures: a rung's colour, a legend beside the curves, whole numbers of steps."""

import re

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from measure.page import STYLE
from training.scenes import RUNGS

# A rung of the toy's ladder has one colour in all figures. It is that of the report.
RUNG_COLOURS = dict(zip(RUNGS, re.findall(r"--c\d: (#\w+)", STYLE)))


def put_legend_beside(ax: Axes) -> None:
    """Draws the legend on the right of the axes, where it hides no curve."""
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)


def count_in_whole_steps(ax: Axes) -> None:
    """Puts the ticks of the horizontal axis at whole numbers."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
