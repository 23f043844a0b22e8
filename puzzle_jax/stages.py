"""What each stage of the pipeline does: reads files of earlier stages, writes its own."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from puzzle_jax import activations, bld, coupling, data, distributed, gkd, preemption, refine, report, scoring
from puzzle_jax import costs as costs_lib
from puzzle_jax import mesh as mesh_lib
from puzzle_jax import search as search_lib
from puzzle_jax.arch import Architecture, BlockSpec
from puzzle_jax.build_library import Builder
from puzzle_jax.checkpoint import open_checkpoint, write_checkpoint
from puzzle_jax.costs import CostTable, jax_timing
from puzzle_jax.data import sampling
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluation import quality, suite, tasks
from puzzle_jax.library import Library
from puzzle_jax.model import decoder
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.report.summary import summarise
from puzzle_jax.runs import Run
from puzzle_jax.search.baselines import chosen
from puzzle_jax.search.table import Table
from puzzle_jax.serving import engines, model_card
from puzzle_jax.serving.hf_export import export_hf
from puzzle_jax.store import StageStore, digest, file_digest
from puzzle_jax.weights import StoredModel

_T = TypeVar("_T")
_SAVE_EVERY_S = 10.0  # of what is scored within a layer


def make_data(run: Run, store: StageStore) -> None:
  config = run.config.data
  amounts = {
    "train": {"train": config.train_tokens, "gkd": config.gkd_tokens},
    "heldout": {"heldout": config.heldout_tokens, "eval": config.eval_tokens},
  }
  shares = config.shares_by_part
  with run.progress.bar("data", total=len(config.sources) + 1, unit="step") as bar:
    found: dict[int, data.DocumentSource] = {}

    def sources() -> Iterator[tuple[int, data.DocumentSource]]:
      for i, name in sorted(enumerate(config.sources), key=lambda named: named[1] == sampling.PARENT):
        if name == sampling.PARENT:
          wanted = {part: shares[part][i] * sum(sets.values()) for part, sets in amounts.items()}
          found[i] = _parent_text(run, wanted)
        else:
          found[i] = _documents(run, name)
        if found[i].forced and len(config.sources) > 1:
          raise PuzzleError(
            f"by their hashes, the documents of {name!r} are all learnt from or all held out, and one that had to "
            f"change sides could be learnt from in another source: set data.heldout_fraction={config.heldout_fraction} "
            "otherwise, or name more documents"
          )
        bar.update()
        yield i, found[i]

    made = data.pack_sets(
      sources(), shares, amounts, run.tokenizer, seq_len=config.seq_len, seed=config.seed, shuffled=("train",)
    )
    for name, mixed in made.items():
      store.put_arrays(f"{name}.safetensors", mixed.packed._asdict())
    bar.update()
  task = {}
  if config.task:
    items = tasks.read_items(config.task, limit=config.task_items)
    store.put_arrays("task.safetensors", tasks.pack(items, run.tokenizer, seq_len=config.seq_len).arrays())
    task = {"task": {"name": Path(config.task).name, "sha256": file_digest(Path(config.task)), "items": len(items)}}
  record = {
    "tokenizer": run.tokenizer.digest,
    "tokens": {name: mixed.packed.num_tokens for name, mixed in made.items()},
    "sources": [
      {
        "name": source.name,
        "digest": source.digest,
        "files": [file._asdict() for file in source.files],
        "rows": {name: mixed.rows_by_source[i] for name, mixed in made.items()},
      }
      for i, source in sorted(found.items())
    ],
  }
  store.put_json("data.json", record | task)


def _documents(run: Run, source: str) -> data.DocumentSource:
  config = run.config.data
  return data.load_documents(
    source,
    data_dir=run.workdir.scratch("datasets"),
    text_field=config.text_field,
    heldout_fraction=config.heldout_fraction,
  )


def _parent_text(run: Run, tokens: Mapping[str, float]) -> data.DocumentSource:
  """Text that the parent writes, with at least so many tokens by part."""
  config = run.config.data
  texts = [_documents(run, name) for name in config.sampling.sources if "text" in config.sampling.kinds]
  made_from = {
    "version": 2,  # raised when the code changes what is written
    "parent": run.parent.digest,
    "tokenizer": run.tokenizer.digest,
    "sampling": dataclasses.asdict(config.sampling),
    "prompts": [source.digest for source in texts],
    "seed": config.seed,
  }
  spare = 2 * config.seq_len  # shares are rounded to rows, in two sets a part

  def sampler() -> sampling.Sampler:
    # Not the run's own parent, which would stay on the device while blocks are distilled.
    parent = LanguageModel.open(run.config.parent, dtype=config.sampling.dtype)
    return sampling.Sampler(parent, config.sampling, [source.train for source in texts], seed=config.seed)

  return sampling.load(
    sampler,
    run.tokenizer,
    folder=run.workdir.scratch("datasets") / digest(made_from)[:16],
    part_documents=config.sampling.part_documents,
    train_tokens=math.ceil(tokens["train"]) + spare,
    heldout_tokens=math.ceil(tokens["heldout"]) + spare,
    heldout_fraction=config.heldout_fraction,
    progress=run.progress,
  )


def make_costs(run: Run, store: StageStore) -> None:
  config = run.config.costs
  if config.table:
    table = CostTable.read(Path(config.table))
  else:
    table = jax_timing.measure(
      run.parent.architecture,
      run.space,
      scenarios=[config.scenario],
      batches=config.batches,
      config=config.timing,
      progress=run.progress,
    )
  store.put_json("costs.json", table.to_json())


def check_target(run: Run) -> None:
  """Refuses a target that no child of the space can meet, before anything is distilled: the search without scores."""
  free = [{b.name: (0.0, 0.0) for b in layer.blocks} for layer in run.space.layers]
  blocks = costs_lib.block_table(run.parent.architecture, run.space, free, run.costs)
  config = run.config.search
  search_lib.solve(_choices(run, Table.from_json(blocks)), config.searched, scenario=config.scenario or None)


def make_activations(run: Run, store: StageStore) -> None:
  activations.write(
    store,
    run.parent,
    {"heldout": run.packed("heldout")} | ({"task": run.task.packed} if run.task else {}),
    run.mesh,
    batch_rows=run.config.activations.batch_rows,
    progress=run.progress,
  )


def make_library(run: Run, store: StageStore) -> None:
  jobs = [bld.decoupled(layer) for layer in run.space.layers]
  Builder(run, Library(store), settings=run.config.bld, jobs=lambda layer: jobs[layer]).build()


def make_scores(run: Run, store: StageStore) -> None:
  config, stored, library, mesh = run.config.scores, run.store("activations"), run.library, run.mesh
  params = run.parent_on(mesh).params
  scorers = scoring.scorers_of(run, params)
  todo = []
  for layer, layer_space in enumerate(run.space.layers):
    file = f"layer_{layer:02d}.json"
    found = store.get_json(file) if file in store else {"blocks": {}, "left_out": []}
    done = {*found["blocks"], *found["left_out"]}
    if missing := [b for b in scoring.blocks_to_score(layer_space, config.granularity) if b.name not in done]:
      todo.append((layer, file, found, missing))
    elif file not in store:  # nothing to choose there
      store.put_json(file, found)

  def load(layer: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return {kind: activations.read(stored, kind, layer) for kind in scorers}, library.load_layer(layer)

  with run.progress.bar("scores", total=sum(len(missing) for *_, missing in todo), unit="block") as bar:
    loaded = _one_ahead(load, [layer for layer, *_ in todo])
    for (layer, file, found, missing), arrays in zip(todo, loaded, strict=True):
      inputs, variants = arrays[0], mesh_lib.shard_weights(mesh, arrays[1])
      layer_space, usable, saved = run.space.layers[layer], library.usable(layer), time.monotonic()
      weights = {
        block: scoring.block_weights(layer_space, block, params["layers"][layer], variants)
        for block in missing
        if all(s in layer_space.parent.subblocks or s.id in usable for s in block.subblocks)
      }
      if layer == todo[0][0]:
        for kind, x in inputs.items():
          scorers[kind].compile(list(weights.items()), x)
      scores = scoring.scores_by_all(scorers, layer, weights.items(), inputs)
      with preemption.deferred() as preempted:
        for block in missing:
          score = next(scores) if block in weights else {}
          if score and np.isfinite(list(score.values())).all():
            found["blocks"][block.name] = score
          else:
            found["left_out"].append(block.name)
            run.progress.say(f"scores: layer {layer} {block.name}: not finite; it is left out of the search")
          bar.update()
          if preempted():
            break
          if distributed.anyone(time.monotonic() - saved > _SAVE_EVERY_S):
            store.put_json(file, found)
            saved = time.monotonic()
        store.put_json(file, found)


def _one_ahead(load: Callable[[int], _T], items: Sequence[int]) -> Iterator[_T]:
  """What `load` gives for each item, the next one read from disk while this one is used."""
  with ThreadPoolExecutor(1) as pool:
    loading = None
    for item in items:
      waiting, loading = loading, pool.submit(load, item)
      if waiting is not None:
        yield waiting.result()
    if loading is not None:
      yield loading.result()


def _choices(run: Run, table: Table) -> list[Table]:
  """What may be chosen of a table: all, or what the config's engine runs."""
  engine = run.config.search.engine
  return engines.restrict(table, engines.by_name(engine)) if engine else [table]


def make_search(run: Run, store: StageStore) -> None:
  config, metric = run.config.search, run.config.scores.metric
  scores = [
    scoring.compose(layer, measured, metric=metric)
    for layer, measured in zip(run.space.layers, run.scores, strict=True)
  ]
  store.put_json("table.json", costs_lib.block_table(run.parent.architecture, run.space, scores, run.costs))
  tables = _choices(run, run.table)
  with run.progress.bar("search", total=2 + config.refine_rounds if config.refine_rounds else 1, unit="step") as bar:
    where: dict[str, Any] = {"scenario": config.scenario or None}

    def solve() -> tuple[search_lib.Solution, list[search_lib.FrontierPoint]]:
      found = search_lib.frontier(tables, "min_speedup", config.frontier, limits=config.searched, **where)
      return chosen(tables, config.searched, rule=config.rule, seed=config.seed, **where), found

    solution, frontier = distributed.by_first(solve)
    points = [
      {"min_speedup": p.value} | {k: v for k, v in p.solution.to_json().items() if k != "timing"}
      for p in frontier
      if p.solution is not None
    ]
    store.put_json("frontier.json", {"points": points})
    bar.update()
    rounds = []
    if config.refine_rounds:
      children = refine.Children(run)
      for found in refine.refine(
        children,
        config.searched,
        rounds=config.refine_rounds,
        metric=metric,
        restrict=lambda t: _choices(run, t),
        **where,
      ):
        rounds.append(found)
        bar.set_postfix_str(f"{metric} {found.score:.4f}", refresh=False)
        bar.update()
      solution = min(rounds, key=lambda found: found.score).solution
  store.put_json(
    "solution_0.json",
    solution.to_json()
    | {
      "score": float(run.table.total_score(solution.choice)),
      "rounds": [{"blocks": list(r.solution.blocks), metric: r.score, "stderr": r.stderr} for r in rounds],
    },
  )
  run.progress.say(f"search: {' '.join(solution.blocks)}")


def make_coupled(run: Run, store: StageStore) -> None:
  if run.config.coupled.wanted:
    solution = coupling.again(run, store, lambda table: _choices(run, table))
    store.put_json("solution_0.json", solution.to_json())
    run.progress.say(f"coupled: {' '.join(solution.blocks)}; {solution.weights.count(coupling.WEIGHTS)} of them pairs")


def make_child(run: Run, store: StageStore) -> None:
  parent, solution = run.parent, run.solution
  blocks = tuple(BlockSpec.parse(name) for name in solution["blocks"])
  with run.progress.bar("child", total=len(blocks), unit="layer") as bar, store.put_folder("model") as folder:

    def layers() -> Iterator[dict[str, Any]]:
      for i, (layer, block) in enumerate(zip(run.space.layers, blocks, strict=True)):
        pairs = bld.coupled(layer, (block,)) if solution["weights"][i] == coupling.WEIGHTS else ()
        library = Library(run.store("coupled")) if pairs else run.library
        job = pairs[0] if pairs else None
        yield scoring.block_weights(layer, block, parent.layer(i, np.float32), library.load_layer(i), job=job)
        bar.update()

    write_checkpoint(
      folder,
      Architecture(parent.architecture.config, blocks),
      parent.head(np.float32),
      layers(),
      tokenizer=run.tokenizer,
      metadata={"parent": parent.name, "license": parent.license},
    )


def _read(model: StoredModel) -> tuple[Architecture, dict[str, Any]]:
  """A model's weights on the host, fp32, each layer read when it is asked for."""
  layers = (model.layer(i, np.float32) for i in range(model.architecture.num_layers))
  return model.architecture, {**model.head(np.float32), "layers": layers}


def make_gkd(run: Run, store: StageStore) -> None:
  child = open_checkpoint(run.store("child").folder("model"))
  checkpoints = store.root / "checkpoints"

  def keep(params: Any, history: list[dict[str, float]]) -> None:
    store.put_json("history.json", {"steps": history})
    distributed.by_first(functools.partial(write, params))
    store.reload()

  def write(params: Any) -> None:
    with store.put_folder("model") as folder:
      write_checkpoint(
        folder,
        child.architecture,
        decoder.head_of(params),
        params["layers"],
        tokenizer=run.tokenizer,
        metadata={"parent": run.parent.name, "license": run.parent.license},
      )

  with run.metrics("gkd") as log:
    gkd.train(
      _read(child),
      _read(run.parent),
      run.packed("gkd"),
      config=run.config.gkd,
      heldout=run.packed("heldout"),
      folder=checkpoints,
      progress=run.progress,
      mesh=run.mesh,
      log=log,
      keep=keep,
    )
  gkd.forget(checkpoints)


def make_evaluation(run: Run, store: StageStore) -> None:
  config, mesh, packed = run.config.evaluation, run.mesh, run.packed("eval")
  parent = run.parent_on(mesh)
  teacher = (parent.architecture, parent.params)

  def opened(stage: str) -> LanguageModel:
    return LanguageModel.open(run.store(stage).folder("model"), mesh=mesh)

  with run.progress.bar("evaluation", total=5 + 2 * len(config.prompts), unit="step") as bar:
    child = opened("child")  # one beside the parent at a time
    before_gkd = quality.compare((child.architecture, child.params), teacher, packed, batch_rows=config.batch_rows)
    bar.update()
    del child
    child = opened("gkd")
    student = (child.architecture, child.params)
    after_gkd = quality.compare(student, teacher, packed, batch_rows=config.batch_rows)
    bar.update()
    texts = suite.compare_texts(run, student, teacher)
    bar.update()
    of_tasks = suite.compare_tasks(run, student, teacher)
    bar.update()
    samples = []
    for prompt in config.prompts:
      sample = {"prompt": prompt}
      for name, model in (("parent", parent), ("child", child)):
        sample[name] = model.chat(prompt, max_new_tokens=config.max_new_tokens)
        bar.update()
      samples.append(sample)
    seconds = {}
    if config.timed:
      seconds = jax_timing.time_models(
        {"parent": teacher, "child": student},
        scenario=run.config.costs.scenario,
        batch=run.solution["batch"],
        config=run.config.costs.timing,
      )
    bar.update()
  if of_tasks.answers:
    store.put_arrays("answers.safetensors", of_tasks.answers)
  record = {"before_gkd": before_gkd, "after_gkd": after_gkd, "texts": texts, "tasks": of_tasks.to_json()}
  store.put_json("evaluation.json", record | {"samples": samples, "timing": {"seconds": seconds}})


def make_export(run: Run, store: StageStore) -> None:
  engine, root = run.config.search.engine, run.workdir.root
  with run.progress.bar("export", total=1, unit="model") as bar, store.put_folder("hf") as folder:
    export_hf(
      run.store("gkd").folder("model"),
      folder,
      dtype=run.config.export.dtype,
      engine=engine if engine and engines.by_name(engine).format == "hf" else "",
      workdir=root,
      figures=model_card.measured(root, times=False),  # runs alike give files alike
    )
    bar.update()


def make_report(run: Run, store: StageStore) -> None:
  with run.progress.bar("report", total=2, unit="file") as bar:
    summary = summarise(run)
    store.put_json("summary.json", summary)
    bar.update()
    store.put_text("report.html", report.render(summary))
    bar.update()
