"""The chain turns twice (paper section 3): pairs of variants trained together, for the blocks that the search favours.

Decoupled distillation trains an attention variant in front of the parent's FFN and an FFN variant behind the parent's
attention. Once a search has said which pairs are worth it, those are trained as pairs, from their decoupled weights;
they are scored beside them, and the search chooses again.
"""

from typing import Any

import numpy as np

from puzzle_jax import activations, bld, distributed, scoring, search
from puzzle_jax import mesh as mesh_lib
from puzzle_jax.arch import BlockSpec
from puzzle_jax.bld import Job, JobWeights
from puzzle_jax.build_library import Builder
from puzzle_jax.errors import PuzzleError
from puzzle_jax.library import Library
from puzzle_jax.runs import Run
from puzzle_jax.search import Tables
from puzzle_jax.search.table import Table
from puzzle_jax.store import StageStore

WEIGHTS = "coupled"  # the name of these trainings in block tables


def favoured(run: Run, tables: Tables) -> list[tuple[Job, ...]]:
  """The pairs to train, by layer.

  Raises:
    PuzzleError: there are none.
  """
  config = run.config.coupled
  children: list[tuple[str, ...]] = []
  if config.solutions:
    found = search.solve(
      tables,
      run.config.search.searched,
      scenario=run.config.search.scenario or None,
      solutions=config.solutions,
      min_different_layers=config.min_different_layers,
    )
    children = [tuple(run.first_solution["blocks"]), *(child.blocks for child in found)]
  jobs = []
  for layer, space in enumerate(run.space.layers):
    names = dict.fromkeys([*config.blocks, *(child[layer] for child in children)])
    jobs.append(bld.coupled(space, tuple(map(BlockSpec.parse, names))))
  if not any(jobs):
    raise PuzzleError(
      f"coupled: no layer has a pair to train: coupled.blocks={config.blocks} names none of the space in which both "
      f"subblocks differ from the parent's, and the {len(children)} children of the search use none"
    )
  return jobs


def first_weights(library: Library, jobs: tuple[Job, ...], layer: int) -> JobWeights:
  """The decoupled weights of a layer's pairs."""
  variants = library.load_layer(layer)
  return {job.name: {s.slot: variants[s.id] for s in job.subblocks} for job in jobs}


def distil(run: Run, store: StageStore, jobs: list[tuple[Job, ...]]) -> Library:
  """Trains the pairs into a library of their own."""
  library, config = Library(store), run.config.coupled

  def start(layer: int) -> JobWeights:
    return first_weights(run.library, jobs[layer], layer)

  first: Any = start if config.from_library else None
  Builder(run, library, settings=config.bld, jobs=lambda layer: jobs[layer], first=first).build()
  return library


def score(run: Run, store: StageStore, library: Library, jobs: list[tuple[Job, ...]]) -> None:
  """Scores the pairs in the parent, a file a layer."""
  params, mesh = run.parent_on(run.mesh).params, run.mesh
  scorers = scoring.scorers_of(run, params)
  with run.progress.bar("coupled", total=sum(map(len, jobs)), unit="block") as bar:
    for layer, (space, some) in enumerate(zip(run.space.layers, jobs, strict=True)):
      file = f"scores/layer_{layer:02d}.json"
      if some and file not in store:
        inputs = {kind: activations.read(run.store("activations"), kind, layer) for kind in scorers}
        variants = mesh_lib.shard_weights(mesh, library.load_layer(layer))
        usable = [job for job in some if job.name in library.usable(layer)]
        blocks = [
          (job.block, scoring.block_weights(space, job.block, params["layers"][layer], variants, job=job))
          for job in usable
        ]
        scores = zip(usable, scoring.scores_by_all(scorers, layer, blocks, inputs), strict=True)
        found = {job.name: of_job for job, of_job in scores if np.isfinite(list(of_job.values())).all()}
        store.put_json(file, {"blocks": found})
      bar.update(len(some))


def table_with(run: Run, store: StageStore, jobs: list[tuple[Job, ...]]) -> dict[str, Any]:
  """The search's table with the pairs beside their decoupled selves."""
  table, metric = run.table.to_json(), run.config.scores.metric
  for layer, some in enumerate(jobs):
    if not some:
      continue
    rows = table["layers"][layer]["variants"]
    for name, scores in store.get_json(f"scores/layer_{layer:02d}.json")["blocks"].items():
      row = next((row for row in rows if f"{row['attention']}/{row['ffn']}" == name), None)
      if row is not None:
        own = {"weights": WEIGHTS, "score": scores[metric], "score_stderr": scores[f"{metric}_stderr"]}
        rows.append(row | own)
  return table


def again(run: Run, store: StageStore, choices: Any) -> search.Solution:
  """Distils, scores, and searches again.

  Args:
    run: whose library, scores and search are done.
    store: of the stage.
    choices: leaves of a table what may be chosen.
  """
  jobs = distributed.by_first(lambda: favoured(run, choices(run.table)))
  library = distil(run, store, jobs)
  score(run, store, library, jobs)
  table = table_with(run, store, jobs)
  store.put_json("table.json", table)
  config = run.config.search
  tables = choices(Table.from_json(table))
  found = distributed.by_first(lambda: search.solve(tables, config.searched, scenario=config.scenario or None))
  return found[0]
