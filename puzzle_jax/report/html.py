"""Pieces of HTML for notebooks: a table of results, and a text coloured by how far a child strays from its parent."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from puzzle_jax.evaluation.tokens import TokenComparison
from puzzle_jax.report.closing import MISSING

_CELL = "padding: .2em .8em .2em 0; text-align: left; font-variant-numeric: tabular-nums"
_TEXT = "font: 15px/1.9 ui-monospace, 'DejaVu Sans Mono', monospace; white-space: pre-wrap; max-width: 60rem"


def _cell(value: Any) -> str:
  if value is None:
    return MISSING
  if isinstance(value, str) and (value != value.strip() or not value.isprintable()):
    return repr(value)  # a token: its spaces and line breaks are part of it
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Any]) -> Markup:
  """Dataclass instances of one kind, one a line, their fields as columns; empty for none."""
  if not rows:
    return Markup("")
  names = [field.name for field in dataclasses.fields(rows[0])]

  def line(tag: str, cells: Sequence[Any]) -> Markup:
    made = (Markup(f'<{tag} style="{_CELL}">{{}}</{tag}>').format(_cell(cell)) for cell in cells)
    return Markup("<tr>{}</tr>").format(Markup("").join(made))

  head = line("th", [name.replace("_", " ") for name in names])
  body = Markup("").join(line("td", [getattr(row, name) for name in names]) for row in rows)
  return Markup("<table>{}{}</table>").format(head, body)


def tokens(compared: Sequence[TokenComparison]) -> Markup:
  """A text, each token the darker the farther the child's prediction is from the parent's there (KL); underlined where
  the likeliest tokens differ. Hovering a token shows the numbers."""
  spans = []
  for t in compared:
    title = f"KL {t.kl:.3g} nats; of this token: parent {t.parent:.2g}, child {t.child:.2g}"
    title += f"; likeliest: parent {t.parent_best!r}, child {t.child_best!r}"
    style = f"background: rgba(213, 112, 59, {1 - math.exp(-t.kl):.2f})"  # half as dark as can be at 0.7 nats
    style += "; border-bottom: 2px solid #6d1a36" if t.disagree else ""
    spans.append(Markup('<span title="{}" style="{}">{}</span>').format(title, style, t.text))
  return Markup('<div style="{}">{}</div>').format(escape(_TEXT), Markup("").join(spans))
