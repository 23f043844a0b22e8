"""The study of configs/ablations.py at a tiny size: arms from the base's stages, goes on by its record; its table."""

import dataclasses
import importlib
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from tiny_costs import write_costs

import puzzle_jax
from configs import ablations as config_file
from configs import flagship
from experiments import ablation_table, ablations, arms, paired, pictures, readme, tiny_parent
from puzzle_jax.arch import Architecture
from puzzle_jax.config import RunConfig
from puzzle_jax.costs import jax_timing
from puzzle_jax.errors import PuzzleError
from puzzle_jax.runs import Run
from puzzle_jax.serving.served import Figures, Served, kv_bytes_per_token
from puzzle_jax.store import write_json


def without_flags(module: types.ModuleType) -> types.ModuleType:
  """Other commands have flags of the same names."""
  for flag in flags.FLAGS.get_key_flags_for_module(module):
    delattr(flags.FLAGS, flag.name)
  return module


without_flags(ablations)
flagship_record = without_flags(importlib.import_module("experiments.flagship"))

TINY: dict[str, dict[str, Any]] = {
  "space": {"attention": ("none",), "ffn": (0.5, "none"), "ffn_multiple": 8},
  "data": {
    "seq_len": 32,
    "train_tokens": 256,
    "gkd_tokens": 256,
    "heldout_tokens": 256,
    "eval_tokens": 512,
  },
  "activations": {"batch_rows": 8},
  "bld": {"steps": 1, "batch_rows": 4, "dtype": "float32"},
  "scores": {"batch_rows": 8},
  "gkd": {"steps": 2, "batch_rows": 4, "warmup_steps": 1, "dtype": "float32"},
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("parent") / "parent"
  tiny_parent.write(folder)
  return folder


def shrink(values: Any, parent: Path, folder: Path, *, source: str = "stdlib") -> Any:
  """A config of the tests' size with a made-up cost table; `values` is changed in place."""
  for section, fields in TINY.items():
    values[section].update(fields)
  values.parent, values.device, values.data.source = str(parent), "any", source
  values.costs.hardware = jax_timing.hardware()
  values.costs.table = ""
  write_costs(folder / "costs.json", str(parent), RunConfig.from_dict(values.to_dict()))
  values.costs.table = str(folder / "costs.json")
  return values


def test_the_study_makes_children_once_and_takes_what_they_share(parent, tmp_path, monkeypatch):
  changed = shrink(config_file.get_config(), parent, tmp_path)
  made, study_rate = list[tuple[str, str | None]](), changed.gkd.learning_rate
  run = puzzle_jax.run

  def counted(config: RunConfig, folder: Path, **options: Any) -> Any:
    made.append((Path(folder).name, options.get("reuse") and Path(options["reuse"]).name))
    return run(config, folder, quiet=True, **options)

  monkeypatch.setattr(puzzle_jax, "run", counted)
  study = ablations.Study(tmp_path / "study", tmp_path / "record.json", changed)
  for arm, seed in (("base", 0), ("base", 1), ("gkd_none", 0)):
    study.make(arm, seed)
  files = ("library/layer_00.safetensors", "search/table.json", "gkd/history.json")
  assert [(tmp_path / "study" / "base_1" / file).stat().st_nlink for file in files] == [3, 3, 1]  # runs that hold it
  for arm in ("base", "gkd_none"):
    study.forget(arm)
  assert sorted(path.name for path in (tmp_path / "study").glob("*_*")) == ["base_0"]
  assert made[1:] == [("base_0", None), ("base_1", "base_0"), ("gkd_none_0", "base_0")]

  record = json.loads((tmp_path / "record.json").read_text())
  (text,) = record["texts"]
  assert len(record["texts"][text]["tokens"]) == 512 // 32 // ablations.BLOCK
  first, second, untrained = (
    record["arms"][a]["children"][s] for a, s in (("base", "0"), ("base", "1"), ("gkd_none", "0"))
  )
  assert first["blocks"] == second["blocks"]
  assert first["texts"] != second["texts"]  # another order of rows
  assert untrained["blocks"] == first["blocks"]
  assert untrained["last_step"] == {}
  assert all(child["speedup"] >= 1.5 for child in (first, second, untrained))

  again = ablations.Study(tmp_path / "study", tmp_path / "record.json", changed)
  assert [again.has("base", 1), again.has("base", 2), again.has("gkd_lm", 0)] == [True, False, False]
  header, rows = ablation_table.rows(record)
  assert [len(row) for row in rows] == [len(header)] * 2
  assert rows[0][:4] == ["`base`", "", "2", f"{first['speedup']:.2f}×"]
  assert rows[1][1] == "`base`"
  tokens, kl = sum(record["texts"][text]["tokens"]), sum(untrained["texts"][text]["kl"])
  assert rows[1][4] == f"{kl / tokens:.4f}"

  changed.gkd.learning_rate = -1.0  # a child that cannot be made is a result, too
  again.make("gkd_kl", 0)
  changed.gkd.learning_rate = study_rate
  record = json.loads((tmp_path / "record.json").read_text())
  _, (*_, row) = ablation_table.rows(record)
  assert row[:3] == ["`gkd_kl`", "", "0"]
  assert "learning_rate > 0 needed" in row[3]

  monkeypatch.setattr(readme, "_record", lambda name: record)
  page = readme.updated("<!-- table: ablations -->\n<!-- end -->")
  assert "4 children" in page
  assert "| `gkd_none` | `base` | 1 |" in page

  record["digests"] = {text: "of another text"}
  write_json(tmp_path / "other.json", record)
  with pytest.raises(PuzzleError, match=rf"{text} is not the text that .*other.json was measured on: name another"):
    ablations.Study(tmp_path / "study", tmp_path / "other.json", changed)

  changed.data.eval_tokens = 256
  with pytest.raises(PuzzleError, match=r"record.json is of another base config; name another --record"):
    ablations.Study(tmp_path / "study", tmp_path / "record.json", changed)


def test_an_arms_own_fields_stand():
  """Against those that are given for all; a mix keeps its parent beside the given text."""
  changed = config_file.get_config()
  changed.data.source, changed.gkd.steps, changed.bld.steps, changed.gkd.seed = "mine.txt", 8, 20, 0
  configs = {name: ablations.config_of(name, 1, changed) for name in config_file.ARMS}
  assert configs["base"].gkd.steps == 8
  assert configs["gkd_none"].gkd.steps == 0
  assert [configs[name].bld.steps for name in ("base", "bld_half", "bld_quarter", "bld_none")] == [20, 200, 100, 0]
  assert {name: configs[name].data.source for name in ("base", "data_parent", "data_mix")} == {
    "base": "mine.txt",
    "data_parent": "parent",
    "data_mix": "mine.txt,parent",
  }
  assert {config.gkd.seed for config in configs.values()} == {1}
  assert set(config_file.SEEDS) | set(config_file.AGAINST) <= set(config_file.ARMS)


def test_no_field_is_changed_where_none_was_given():
  base = config_file.get_config()
  for arm in config_file.ARMS:
    values = config_file.get_config(arm)
    assert arms.with_changes(values, base, config_file.get_config()) == RunConfig.from_dict(values.to_dict())


RNG = np.random.default_rng(0)
TOKENS = np.full(60, 100.0)


def children(mean: float, seeds: int, *, rows: np.ndarray, between: float = 0.0) -> np.ndarray:
  """Sums over rows that share what is hard about them."""
  moved = mean + between * RNG.standard_normal((seeds, 1))
  return TOKENS * (rows + moved + 0.02 * RNG.standard_normal((seeds, len(rows))))


def test_a_paired_difference_is_found_where_rows_differ_far_more():
  rows = RNG.uniform(0, 2, len(TOKENS))
  better, worse = children(0.0, 1, rows=rows), children(0.02, 1, rows=rows)
  found = paired.difference(worse, better, TOKENS)
  assert found.is_real
  assert found.low < found.mean < found.high
  assert found.mean == pytest.approx(0.02, abs=0.01)
  assert not paired.difference(children(0.0, 1, rows=rows), better, TOKENS).is_real


def test_seeds_that_differ_make_a_difference_less_sure():
  rows = RNG.uniform(0, 2, len(TOKENS))
  arms_SR = [children(0.0, 40, rows=rows, between=0.05) for _ in range(5)]
  noise = paired.seed_noise(arms_SR, TOKENS)
  assert noise.freedom == 5 * 39
  assert noise.variance == pytest.approx(0.05**2, rel=0.25)
  a, b = children(0.02, 2, rows=rows), children(0.0, 2, rows=rows)
  sure, unsure = (paired.difference(a, b, TOKENS, noise=v) for v in (None, noise))
  assert sure.is_real
  assert not unsure.is_real
  assert unsure.mean == sure.mean
  assert unsure.high - unsure.low == pytest.approx(2 * 1.96 * 0.05, rel=0.1)  # of two means of two


def test_few_seeds_are_less_sure_than_their_variance_and_one_says_nothing():
  rows = RNG.uniform(0, 2, len(TOKENS))
  a, b = children(0.02, 1, rows=rows), children(0.0, 1, rows=rows)
  widths = []
  for freedom in (1000, 2):
    found = paired.difference(a, b, TOKENS, noise=paired.SeedNoise(0.05**2, freedom))
    widths.append(found.high - found.low)
  assert widths[1] / widths[0] == pytest.approx(4.303 / 1.962, rel=0.1)  # of Student's distributions
  alone = paired.seed_noise([a, b], TOKENS)
  assert alone.freedom == 0
  assert not paired.difference(a, b, TOKENS, noise=alone).is_real


def test_the_interval_holds_the_truth_as_often_as_it_says():
  rng, hits, rows = np.random.default_rng(1), 0, 40
  for _ in range(60):
    a, b = rng.normal(0.1, 0.5, (2, 1, rows))
    hits += paired.difference(a, b, np.ones(rows)).is_real
  assert hits <= 8  # 3 expected


def flagship_config(parent: Path, folder: Path, speedup: float) -> RunConfig:
  """The flagship's at a tiny size: of both sources' text, with a task, another text and a made-up cost table."""
  (folder / "text.jsonl").write_text(
    "".join(json.dumps({"text": f"{i}: the quick brown fox number {i} jumps over it"}) + "\n" for i in range(200))
  )
  (folder / "other.txt").write_text("The sea is wide and blue. " * 40)
  (folder / "sea.jsonl").write_text('{"context": "a", "choices": [" b", " c"], "answer": 1}\n' * 6)
  values = flagship.get_config()
  values.data.shares = (3.0, 1.0)
  values.bld.fit_tokens, values.data.heldout_fraction, values.gkd.eval_steps = 256, 0.5, 0
  values.data.sampling.update({"kinds": ("start",), "max_tokens": 96, "batch_rows": 4, "dtype": "float32"})
  values.search.limits.min_speedup, values.search.frontier, values.search.scenario = speedup, (), "32/32"
  values.evaluation.update(
    {
      "prompts": (),  # tests/test_pipeline.py asks the models
      "contexts": (32,),
      "texts": (str(folder / "other.txt"),),
      "tasks": (str(folder / "sea.jsonl"),),
    }
  )
  values.costs.input_tokens = values.costs.output_tokens = 32
  shrink(values, parent, folder, source=f"parent,{folder / 'text.jsonl'}")
  return RunConfig.from_dict(values.to_dict())


def write_served(path: Path, run: Run, *, seconds: float) -> None:
  """As `experiments.serve_compare` does, made up: the child takes so many times the parent's seconds."""

  def model(architecture: Architecture, seconds: float) -> dict[str, Any]:
    figures = Figures(64 / seconds, 32 / seconds, 0.1 * seconds, 0.9 * seconds / 31)
    engine = {"name": "vLLM", "version": "0.25.1", "hardware": "1 x Fake GPU"}
    found = Served(1000, kv_bytes_per_token(architecture, 1), 4096, {"32/32": 64}, {"32/32": {"1": figures}}, engine)
    return dataclasses.asdict(found)

  parent, child = run.parent.architecture, run.child.architecture
  write_json(path, {"date": "2100-01-01", "parent": model(parent, 1.0), "child": model(child, seconds)})


def test_the_flagship_at_a_tiny_size(tmp_path, monkeypatch):
  """Two children that vLLM runs, from the parent to the record: one whole, one neither served nor evaluated yet."""
  parent, runs = tmp_path / "parent", tmp_path / "runs"
  tiny_parent.write(parent, layers=2)
  whole, bare = (runs / f"min_speedup={speedup}" for speedup in ("1.5", "1.25"))
  run = puzzle_jax.run(flagship_config(parent, tmp_path, 1.5), whole, quiet=True)
  assert not any("linear" in block for block in run.solution["blocks"])
  assert run.solution["blocks"][0].startswith("gqa")
  data = run.store("data").get_json("data.json")
  assert [source["rows"]["gkd"] for source in data["sources"]] == [6, 2]
  assert [source["rows"]["eval"] for source in data["sources"]] == [8, 8]
  config = flagship_config(parent, tmp_path, 1.25)
  puzzle_jax.run(config, bare, stages=ablations.SHARED, reuse=whole, quiet=True)
  write_served(tmp_path / "served" / whole.name / "served.json", run, seconds=0.625)

  record = flagship_record.collect(runs, tmp_path / "served")
  assert str(tmp_path) not in json.dumps(record)
  slow, fast = record["children"]
  assert [child["target"] for child in (slow, fast)] == [1.25, 1.5]
  assert not slow.keys() & {"served", "heldout", "tasks", "texts", "samples"}
  assert slow["speed"]["32/32"]["1"]["predicted_speedup"] >= 1.25 * (1 + config.search.margin)
  assert fast["blocks"] == list(run.solution["blocks"])
  speed = fast["speed"]["32/32"]["1"]
  assert speed["speedup"] == pytest.approx(1.6)
  assert speed["predicted"]["child"]["throughput"] == pytest.approx(run.solution["throughput"], rel=1e-6)
  assert speed["predicted"]["child"]["output_throughput"] == pytest.approx(run.solution["throughput"] / 2, rel=1e-6)
  evaluation = run.store("evaluation").get_json("evaluation.json")
  assert fast["heldout"]["before_gkd"]["kl"] == evaluation["before_gkd"]["kl"]
  assert fast["heldout"]["after_gkd"]["kl"] == evaluation["after_gkd"]["kl"]
  assert [text["text"] for text in fast["texts"]] == ["parent", "text.jsonl", "other.txt"]
  assert fast["tasks"]["tasks"]["sea"]["items"] == 6
  written = sum(source["rows"][name] for source in data["sources"][:1] for name in source["rows"]) * 32
  assert fast["tokens"] == {
    "written": written,
    "bld": 128,
    "bld_different": 128,
    "gkd": 256,
    "gkd_different": 256,
    "share": 384 / 2e12,
  }
  assert fast["stages"]["library"] == slow["stages"]["library"]  # made once
  assert "--config.search.limits.min_speedup=1.5 " in fast["command"]
  assert "--config.data.source=parent,text.jsonl " in fast["command"]

  fast["samples"] = [{"prompt": "How many?", "parent": "a|b <i>", "child": "1\n\n2"}]
  monkeypatch.setattr(readme, "_record", lambda name: record)
  names = ["flagship", *(name for name in readme.TABLES if name.startswith("flagship_") and "shipped" not in name)]
  page = readme.updated("".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in names))
  assert page.count("<!-- end -->") == len(names) == 7
  for line in (
    "measured in vLLM 0.25.1 on 1 x Fake GPU: 32/32 tokens, batch 1; the parent once for all",
    "| 1.5× |",
    "| 1.60× |",
    "| 1.600× |",
    "| 128 (128 different) |",
    "| **How many?** |  |\n| parent | a\\|b &lt;i&gt; |\n| 1.5× | 1<br>2 |",
  ):
    assert line in page
  assert "| `other.txt` | 32 |" in page
  assert set(pictures.flagship(record)) == {"flagship_1.25", "flagship_1.5", "flagship_frontier"}

  write_served(tmp_path / "served" / bare.name / "served.json", run, seconds=0.8)  # another's
  with pytest.raises(PuzzleError, match=r"min_speedup=1.25: what was served has another KV cache"):
    flagship_record.collect(runs, tmp_path / "served")
  with pytest.raises(PuzzleError, match="holds no run that has a child"):
    flagship_record.collect(tmp_path, tmp_path / "served")
