"""What the pages share: templates, numbers as text, figures as HTML. A page holds all it shows and loads nothing."""

import collections
import functools
from collections.abc import Mapping, Sequence

import jinja2
import plotly.graph_objects as go
import plotly.offline
from markupsafe import Markup

from puzzle_jax.report.closing import Cell, duration, number


def counts(cells: Sequence[Cell]) -> str:
  """How many layers have which subblock, the commonest first."""
  found = collections.Counter(cell.label for cell in cells).most_common()
  return ", ".join(f"{n} × {label}" for label, n in found)


def changes(cells: Sequence[Cell]) -> str:
  """In how many layers what became of the parent's subblock, the commonest first, in plain words."""

  def words(cell: Cell) -> str:
    if cell.is_parent:
      return "the parent's own"
    if cell.share < 1 and cell.stem != "none":
      return {"gqa": "fewer key/value heads", "w": "narrower"}.get(cell.stem, cell.name)
    return {"linear": "one matrix instead", "none": "left out"}.get(cell.stem, cell.name)

  found = collections.Counter(map(words, cells)).most_common()
  return ", ".join(f"{what} in {n} layer{'s' if n > 1 else ''}" for what, n in found)


@functools.cache
def template(name: str) -> jinja2.Template:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("puzzle_jax.report", "."),
    autoescape=True,
    undefined=jinja2.ChainableUndefined,  # what a summary lacks is false
    lstrip_blocks=True,
  )
  environment.filters |= {"number": number, "duration": duration, "counts": counts, "changes": changes}
  return environment.get_template(name)


def figures_html(figures: Mapping[str, go.Figure | None]) -> dict[str, Markup]:
  """By name, those that are not None; each name is the id of its element."""
  config = {"responsive": True, "displayModeBar": False}
  return {
    name: Markup(figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config))
    for name, figure in figures.items()
    if figure is not None  # plotly escapes what stands in its JSON
  }


def plotly_js() -> Markup:
  """The plotting library, to stand in a page's head once."""
  return Markup(plotly.offline.get_plotlyjs())
