"""An export from a run's work directory or any child's: which child it is, and what is known of it."""

import dataclasses
import os
from pathlib import Path

from puzzle_jax import checkpoint
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import is_gguf, open_parent
from puzzle_jax.parents.gguf import GGUFFile
from puzzle_jax.serving import engines, gguf_export, hf_export, model_card
from puzzle_jax.store import StageStore, read_json

FORMATS = {"hf": hf_export.DTYPES, "gguf": gguf_export.TYPES}  # the first type is the default


@dataclasses.dataclass(frozen=True)
class Child:
  """A child to export.

  Attributes:
    folder: `parents.open_model` takes it.
    workdir: of the run that it is of; None where it stands alone.
    before_gkd: whether it is the run's child as put together, before global distillation.
  """

  folder: Path
  workdir: Path | None = None
  before_gkd: bool = False


def find_child(path: str | os.PathLike[str]) -> Child:
  """The child of a work directory (the distilled one), of a run's folder `gkd` or `child`, of any folder, or an export.

  Raises:
    PuzzleError: there is none, it is not finished, or a file is not what the run wrote.
  """
  given = Path(path)
  folder = given
  for below in ("gkd/model", "model"):
    if not _is_model(folder) and (given / below).is_dir():
      folder = given / below
  if not _is_model(folder):
    raise PuzzleError(
      f"{given} holds no child ({checkpoint.ARCHITECTURE}, or an export's config.json); name a finished run's work "
      "directory or a child's directory"
    )
  stage = folder.resolve().parent
  if stage.name not in ("gkd", "child") or not (stage.parent / "config.json").is_file():
    return Child(folder)
  store = StageStore(stage)
  if not store.done:
    raise PuzzleError(f"{stage} is not finished; start the run again")
  for name in store.names:
    store.path(name)
  return Child(folder, stage.parent, before_gkd=stage.name == "child")


def _is_model(folder: Path) -> bool:
  """A child's directory or one in Hugging Face's format; a run has a config.json, too."""
  config = folder / "config.json"
  return (folder / checkpoint.ARCHITECTURE).is_file() or (config.is_file() and "model_type" in read_json(config))


def export(
  child: str | os.PathLike[str],
  out: str | os.PathLike[str],
  *,
  format: str = "",
  dtype: str = "",
  engine: str = "",
  parent: str = "",
) -> None:
  """Exports a child for an engine.

  Args:
    child: see `find_child`.
    out: a new folder (hf) or file (gguf).
    format: of `FORMATS`; empty: what the engine reads, hf without one.
    dtype: of the weights, one of the format's; empty: its first.
    engine: of `engines.ENGINES`; empty: any reader of the format.
    parent: the child's parent, if it is a GGUF file: the metadata of its tokenizer go into a GGUF. The run's is known.

  Raises:
    PuzzleError: bad input, before anything is written; an engine that would not run the child as it is.
  """
  format = format or (engines.by_name(engine).format if engine else "hf")
  if format not in FORMATS:
    raise PuzzleError(f"format {format!r} is unknown; known: {', '.join(FORMATS)}")
  found, dtype, out = find_child(child), dtype or FORMATS[format][0], Path(out)
  if format == "hf":
    figures = model_card.measured(found.workdir, before_gkd=found.before_gkd) if found.workdir else ""
    hf_export.export_hf(found.folder, out, dtype=dtype, engine=engine, workdir=found.workdir, figures=figures)
    return
  if not parent and found.workdir is not None:
    own = read_json(found.workdir / "config.json")["parent"]
    parent = own if is_gguf(own) else ""  # of others the child has the tokenizer
  weights = open_parent(parent).weights if parent else None
  source = weights if isinstance(weights, GGUFFile) else None
  gguf_export.export_gguf(found.folder, out, dtype=dtype, engine=engine, parent=source)
