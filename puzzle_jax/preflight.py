"""What is checked before any work of a run: that its config fits the parent, the data at hand and the machine."""

import contextlib
import os
import sys
from collections.abc import Collection
from pathlib import Path

import jax

from puzzle_jax import mesh
from puzzle_jax.costs import CostTable, check_target, jax_timing, other_version
from puzzle_jax.data import documents
from puzzle_jax.data.sampling import PARENT
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluation import tasks
from puzzle_jax.runs import Run
from puzzle_jax.store import file_digest


def memory_bytes() -> int:
  """Of the first device: its own, or the machine's where it has none of its own."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check(run: Run) -> None:
  """Refuses what a later stage could not make good.

  Raises:
    PuzzleError: names the value and the remedy.
  """
  _check_device(run)
  _check_cost_table(run)
  _check_context(run)
  _check_texts(run)
  _check_tasks(run)
  tokenizer, rows = run.tokenizer, run.parent.architecture.config.vocab_size
  if tokenizer.largest_id >= rows:
    raise PuzzleError(
      f"{run.config.parent}: its tokenizer gives ids up to {tokenizer.largest_id}, its embedding has {rows} rows: the "
      "tokenizer is another model's; put the parent's own tokenizer.json there"
    )
  if run.config.evaluation.prompts and tokenizer.chat_template is None:
    raise PuzzleError(
      "evaluation.prompts are chat messages, and the parent's tokenizer has no chat template; set "
      "--config.evaluation.prompts='()', or use an instruct parent"
    )
  limit, most = run.parent.architecture.config.max_context, run.config.evaluation.max_new_tokens
  for prompt in run.config.evaluation.prompts:
    tokens = len(tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": prompt}]), add_special=False))
    if tokens + most > limit:
      raise PuzzleError(
        f"evaluation.max_new_tokens={most} behind a prompt of {tokens} tokens ({prompt[:40]!r}) are more than the "
        f"parent's context of {limit}; lower it"
      )


def check_mesh(run: Run, stages: Collection[str]) -> None:
  """Refuses a mesh on which one of these stages, all made on it, could not run; says where it would be idle.

  Others may have been made on other meshes.

  Raises:
    PuzzleError: other devices than there are, or batches that `mesh.data` does not divide.
  """
  if not stages:
    return
  config = run.config
  mesh.build(config.mesh)
  data, rows = config.mesh.data, {"library": ("bld.batch_rows", config.bld.batch_rows)}
  if config.coupled.wanted:
    rows["coupled"] = ("coupled.bld.batch_rows", config.coupled.bld.batch_rows)
  for stage, (name, number) in rows.items():
    if stage in stages and number % data:
      raise PuzzleError(
        f"mesh.data={data} does not divide {name}={number}, and each device keeps its rows of a batch; set {name} to a "
        f"multiple of {data}, or mesh.data to a divisor of {number}"
      )
  if "gkd" in stages and config.gkd.steps and config.gkd.batch_rows % data:
    run.progress.say(
      f"warning: mesh.data={data} does not divide gkd.batch_rows={config.gkd.batch_rows}: each device will compute and "
      f"hold the whole batch; set gkd.batch_rows to a multiple of {data}, or run gkd by itself on another mesh"
    )


def _check_device(run: Run) -> None:
  install = "on a machine with an NVIDIA GPU, `pip install 'puzzle_jax[cuda]'` gives JAX what it needs"
  try:
    found = jax.devices()[0].platform
  except (RuntimeError, AssertionError) as e:  # JAX asserts where a platform's plugin is not installed
    asked = os.environ.get("JAX_PLATFORMS")
    raise PuzzleError(f"JAX finds no device of JAX_PLATFORMS={asked!r}; unset it, or: {install}") from e
  if run.config.device == "gpu" and found != "gpu":
    raise PuzzleError(
      f"the config {run.config.name} is for a GPU and JAX finds only {found}: {install}; "
      "--config.device=any (of a study --change.device=any) runs it here all the same"
    )


def _check_texts(run: Run) -> None:
  """None of the evaluation's may be one that is trained on; what a finished run has read need not be there any more."""
  found = [file for pattern in run.config.evaluation.texts for file in documents.find_files(pattern)]
  texts, sizes = {file_digest(file): file for file in found}, {file.stat().st_size for file in found}
  for name in run.config.data.sources:
    trained: list[Path] = []
    if name != PARENT and documents.of_files(name):
      with contextlib.suppress(PuzzleError):
        trained = documents.find_files(name)
    for file in trained:
      if file.stat().st_size in sizes and (text := texts.get(file_digest(file))) is not None:
        raise PuzzleError(
          f"evaluation.texts: {text} is of data.source={name!r}, which is trained on; the part of it that is held out "
          "is measured anyway: leave it out"
        )


def _check_tasks(run: Run) -> None:
  """Their items must be whole, and fit the context."""
  limit, config = run.parent.architecture.config.max_context, run.config
  if config.data.task and not run.store("data").done:
    tasks.pack(
      tasks.read_items(config.data.task, limit=config.data.task_items), run.tokenizer, seq_len=config.data.seq_len
    )
  for task in config.evaluation.tasks:
    items = tasks.read_items(task, targets=True)[: config.evaluation.task_items or None]
    # No text has more tokens than bytes, so that few items need the tokenizer.
    long = [item for item in items if max(len((item.context + choice).encode()) for choice in item.choices) > limit]
    for request in tasks.requests(long, run.tokenizer) if long else ():
      if len(request.ids) > limit + 1:
        raise PuzzleError(
          f"task {task} has an item of {len(request.ids)} tokens, more than the parent's context of {limit}; leave it "
          "out"
        )


def _check_cost_table(run: Run) -> None:
  costs = run.config.costs
  if not costs.table:
    return
  if not Path(costs.table).is_file():
    raise PuzzleError(f"costs.table={costs.table!r} is no file; leave it empty to time costs here")
  table = CostTable.read(Path(costs.table))
  check_target(table, hardware=costs.hardware or jax_timing.hardware(), engine=run.config.search.engine)
  if warning := other_version(table):
    print(f"warning: {warning}", file=sys.stderr)
  known = {s.name: (s.input_tokens, s.output_tokens) for s in table.scenarios}
  asked = costs.scenario
  if known.get(asked.name) != (asked.input_tokens, asked.output_tokens):
    raise PuzzleError(
      f"costs.table={costs.table!r} holds the scenarios {', '.join(known)} (input/output tokens), the config asks for "
      f"{asked.name}; set costs.input_tokens and costs.output_tokens to one of them, or measure anew"
    )


def _check_context(run: Run) -> None:
  limit, config = run.parent.architecture.config.max_context, run.config
  if config.data.seq_len > limit:
    raise PuzzleError(
      f"data.seq_len={config.data.seq_len} is more than the parent's context of {limit} tokens; lower it"
    )
  if max(config.evaluation.contexts, default=0) > limit:
    raise PuzzleError(
      f"evaluation.contexts={config.evaluation.contexts} has more than the parent's context of {limit} tokens; lower it"
    )
  if config.costs.scenario.tokens > limit:
    raise PuzzleError(
      f"costs.input_tokens + costs.output_tokens = {config.costs.scenario.tokens} is more than the parent's context of "
      f"{limit} tokens; lower them"
    )
