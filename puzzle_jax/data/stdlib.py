"""English technical prose that every Python brings along: its standard library's own documentation.

The embedded text needs no network and no licence of its own. Nothing is imported but `pydoc_data.topics`: the sources
are parsed, so no module's side effects happen. One document is a topic of the language reference or the docstrings of
one module. What repeats a paragraph seen before is dropped, so that no text of a held-out document is in another one.
The text is the same for the same Python version.
"""

import ast
import functools
import pydoc_data.topics
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from puzzle_jax.errors import PuzzleError

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_MIN_WORDS = 12  # of prose, for a docstring to be more than a label
_ROLE = re.compile(r":(?:[a-z]+:)?[a-z]+:`~?([^`<]+?)(?: <[^>`]+>)?`")  # :class:`~module.Name`
_RULE = re.compile(r"^\s*([=\-~*^+#._])\1{3,}\s*$", re.MULTILINE)  # what underlines a heading
_HYPHEN = re.compile(r"(?<=\w)-\n\s*(?=\w)")  # a compound that was broken over two lines
_CODE = re.compile(r"^(>>>|\.\.\. |\$ |#!|\||\+-)|::=|\t|\S {3,}\S")
_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*[A-Za-z]")


@functools.cache
def documents() -> tuple[str, ...]:
  """The documents, longest topics first; read once a process, which takes seconds.

  Raises:
    PuzzleError: this Python comes without its sources.
  """
  seen: set[str] = set()
  topics = pydoc_data.topics.topics
  longest_first = sorted(topics, key=lambda name: (-len(topics[name]), name))
  found = [text for name in longest_first if (text := _clean(topics[name], seen))]
  root = Path(sysconfig.get_path("stdlib"))
  paths = [p for p in sorted(root.rglob("*.py")) if not _SKIPPED_FOLDERS & set(p.relative_to(root).parts)]
  if not paths:
    raise PuzzleError(f"{root} holds no Python sources to take documentation from; name another --config.data.source")
  for path in paths:
    parts = [text for name, doc in _docstrings(path) if (text := _clean(doc, seen, title=name))]
    if parts:
      found.append("\n\n".join(parts))
  return tuple(found)


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
  """The docstrings of a source file, each with the name and arguments of what it documents."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # about other people's sources
      tree = ast.parse(path.read_bytes())
  except (SyntaxError, ValueError):  # some sources are made to be wrong
    return

  def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
      if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        name = prefix + child.name
        title = f"class {name}" if isinstance(child, ast.ClassDef) else f"{name}({ast.unparse(child.args)})"
        if doc := ast.get_docstring(child):
          yield title, doc
        yield from visit(child, f"{name}.")

  if doc := ast.get_docstring(tree):
    yield "", doc
  yield from visit(tree, "")


def _clean(text: str, seen: set[str], *, title: str = "") -> str:
  """The prose of a documentation text, a paragraph a line, and the code that it leads to; "" if that is too little."""
  text = _RULE.sub("", _ROLE.sub(r"\1", text.expandtabs().replace("``", "`")))
  kept: list[str] = []
  words = 0
  for paragraph in re.split(r"\n(?:[ ]*\n)+", text.strip("\n")):
    if not paragraph.strip() or paragraph.lstrip().startswith(".. "):
      continue
    line = " ".join(_HYPHEN.sub("-", paragraph).split())
    if line.casefold() in seen:
      continue
    leads_here = bool(kept) and kept[-1].endswith(":")
    if leads_here and (paragraph.startswith("    ") or not _is_prose(paragraph)):
      kept.append(paragraph)
    elif _is_prose(paragraph):
      words += len(_WORD.findall(line))
      kept.append(re.sub(r"::$", ":", line))
    seen.add(line.casefold())
  return "\n\n".join([title] * bool(title) + kept) if words >= _MIN_WORDS else ""


def _is_prose(paragraph: str) -> bool:
  """Whether most of a paragraph is English words."""
  if any(_CODE.search(line.strip()) for line in paragraph.splitlines()):
    return False
  letters = sum(map(len, _WORD.findall(paragraph)))
  return letters >= 0.6 * sum(not c.isspace() for c in paragraph)
