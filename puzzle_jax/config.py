"""The configuration of a run: frozen dataclasses that check themselves. ml_collections stays in `config_files`.

Each stage depends on the sections that `pipeline.STAGES` names, and on nothing else.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puzzle_jax.bld import BLDConfig, CoupledConfig
from puzzle_jax.costs import Scenario
from puzzle_jax.costs.jax_timing import TimingConfig
from puzzle_jax.data import documents
from puzzle_jax.data.sampling import SamplingConfig
from puzzle_jax.errors import PuzzleError, check_seed
from puzzle_jax.evaluation.suite import task_name
from puzzle_jax.gkd import GKDConfig
from puzzle_jax.mesh import MeshConfig
from puzzle_jax.rolling import ActivationsConfig
from puzzle_jax.scoring import GRANULARITIES, METRICS, PRECISIONS
from puzzle_jax.search import Limits
from puzzle_jax.search.baselines import BASELINES, MIP
from puzzle_jax.serving.engines import by_name
from puzzle_jax.serving.hf_export import DTYPES as EXPORT_DTYPES

DTYPES = ("float32", "bfloat16")
DEVICES = ("any", "gpu")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
  if value not in known:
    raise PuzzleError(f"{name}={value!r} is not one of {', '.join(known)}")


def _at_least(least: int, section: str, **values: float) -> None:
  for name, value in values.items():
    if value < least:
      raise PuzzleError(f"{section}.{name}={value} must be at least {least}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text and how it is packed.

  Attributes:
    source: `stdlib` (built in), a path or glob of .txt/.jsonl/.jsonl.gz, `tfds:NAME`, or `parent` (text that the parent
      writes); several, separated by commas, are mixed.
    shares: of the sources in every set, in proportion; empty: equal shares.
    heldout_shares: the same in the sets that nothing is trained on, where a small source may count for more; empty:
      as `shares`.
    text_field: of JSON lines.
    heldout_fraction: share of the documents that no training stage sees.
    seq_len: tokens a packed row.
    train_tokens: for the library (statistics, least squares, BLD).
    gkd_tokens: for global distillation; other rows than `train_tokens`.
    heldout_tokens: for scores.
    eval_tokens: for the evaluation; other rows than `heldout_tokens`.
    seed: of the order of documents.
    task: multiple-choice items (JSON lines; `evaluation.tasks`) whose accuracy is a score too; empty: none.
    task_items: how many of them.
    sampling: how the parent writes text.
  """

  source: str = "stdlib"
  shares: tuple[float, ...] = ()
  heldout_shares: tuple[float, ...] = ()
  text_field: str = "text"
  heldout_fraction: float = 0.1
  seq_len: int = 256
  train_tokens: int = 16_384
  gkd_tokens: int = 16_384
  heldout_tokens: int = 2_048
  eval_tokens: int = 4_096
  seed: int = 0
  task: str = ""
  task_items: int = 256
  sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)

  @property
  def sources(self) -> tuple[str, ...]:
    """Their names, one by one."""
    return documents.named(self.source)

  @property
  def shares_by_part(self) -> dict[str, tuple[float, ...]]:
    """Of the sources, adding up to 1, by the part of their documents: `train`, `heldout`."""
    equal = (1.0,) * len(self.sources)
    found = {"train": self.shares or equal, "heldout": self.heldout_shares or self.shares or equal}
    return {part: tuple(share / sum(shares) for share in shares) for part, shares in found.items()}

  def __post_init__(self) -> None:
    if not all(self.sources) or len(set(self.sources)) < len(self.sources):
      raise PuzzleError(f"data.source={self.source!r} must name sources, each once, separated by commas")
    for name in ("shares", "heldout_shares"):
      shares = getattr(self, name)
      if shares and (len(shares) != len(self.sources) or min(shares) <= 0):
        raise PuzzleError(f"data.{name}={shares} must be {len(self.sources)} numbers above 0, as data.source names")
    _at_least(2, "data", seq_len=self.seq_len)
    _at_least(1, "data", task_items=self.task_items)
    check_seed("data.seed", self.seed)
    for name in ("train_tokens", "heldout_tokens", "eval_tokens"):
      if getattr(self, name) < self.seq_len:
        raise PuzzleError(f"data.{name}={getattr(self, name)} is less than one row of data.seq_len={self.seq_len}")
    if not 0 < self.heldout_fraction < 1:
      raise PuzzleError(f"data.heldout_fraction={self.heldout_fraction} must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class SpaceConfig:
  """The search space; see `space.build`."""

  attention: tuple[str, ...] = ("gqa", "linear", "none")
  ffn: tuple[str | float, ...] = (0.87, 0.75, 0.5, 0.25, 0.2, 0.1, "linear", "none")
  ffn_multiple: int = 64
  layers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  engine: str = ""

  def __post_init__(self) -> None:
    _at_least(1, "space", ffn_multiple=self.ffn_multiple)
    if self.engine:
      by_name(self.engine)


@dataclasses.dataclass(frozen=True)
class ScoresConfig:
  """Replace-1-block; see `scoring`. `precision` is that of fp32 matrix products on a GPU."""

  granularity: str = "composed"
  metric: str = "kl"
  batch_rows: int = 4
  precision: str = "highest"

  def __post_init__(self) -> None:
    _one_of("scores.granularity", self.granularity, GRANULARITIES)
    _one_of("scores.metric", self.metric, METRICS)
    _one_of("scores.precision", self.precision, PRECISIONS)
    _at_least(1, "scores", batch_rows=self.batch_rows)


@dataclasses.dataclass(frozen=True)
class CostsConfig:
  """Where and for what costs are measured.

  Attributes:
    table: a cost table (JSON) measured elsewhere; empty: timed here in JAX.
    hardware: what will run the child, as the table names what it was measured on; empty: this machine.
    input_tokens, output_tokens: the scenario, a closed batch of equal requests.
    batches: to time; the search takes the best.
    timing: how.
  """

  table: str = ""
  hardware: str = dataclasses.field(default="", metadata={"result": False})
  input_tokens: int = 128
  output_tokens: int = 128
  batches: tuple[int, ...] = (1,)
  timing: TimingConfig = dataclasses.field(default_factory=TimingConfig)

  def __post_init__(self) -> None:
    _at_least(1, "costs", input_tokens=self.input_tokens, output_tokens=self.output_tokens)
    if not self.batches or min(self.batches) < 1:
      raise PuzzleError(f"costs.batches={self.batches} must name one batch size or more, each at least 1")

  @property
  def scenario(self) -> Scenario:
    return Scenario(f"{self.input_tokens}/{self.output_tokens}", self.input_tokens, self.output_tokens)


@dataclasses.dataclass(frozen=True)
class SearchConfig:
  """What the child must meet.

  Attributes:
    limits: see `search.Limits`.
    margin: share by which the search betters the limits on time, since costs are measured no more exactly than that.
    frontier: values of `limits.min_speedup` to solve for besides the target.
    engine: of `serving.engines.ENGINES`: choose only what it runs; empty: anything.
    refine_rounds: of scoring blocks in the search's child and searching again (`refine`).
    scenario: of the cost table, `IN/OUT`, in which the limits are met; empty: in each that it has.
    rule: "mip", or one of `search.baselines.BASELINES`, to see what the search is worth.
    seed: of the rule random_feasible.
  """

  limits: Limits = dataclasses.field(default_factory=Limits)
  margin: float = 0.0
  frontier: tuple[float, ...] = ()
  engine: str = ""
  refine_rounds: int = 0
  scenario: str = ""
  rule: str = MIP
  seed: int = 0

  def __post_init__(self) -> None:
    _at_least(0, "search", margin=self.margin, refine_rounds=self.refine_rounds)
    _one_of("search.rule", self.rule, (MIP, *BASELINES))
    if self.rule != MIP and self.refine_rounds:
      raise PuzzleError(f"search.rule={self.rule!r} does not refine; set search.refine_rounds=0")
    if self.engine:
      by_name(self.engine)

  @property
  def searched(self) -> Limits:
    """The limits that the search is given: those on time with the margin."""
    return self.limits.tightened(self.margin)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Held-out quality, tasks, and text of parent and child side by side.

  Attributes:
    batch_rows: rows of `data.seq_len` tokens, or as many tokens in other rows, on the device at once.
    prompts: chat messages that both answer.
    max_new_tokens: of an answer.
    contexts: lengths at which perplexity and KL are measured as well; empty: `data.seq_len`.
    texts: paths or globs of other texts to measure them on, `data.eval_tokens` of each.
    tasks: files of JSON lines (`evaluation.tasks`).
    task_items: of each task, the first; 0: all.
    timed: time parent and child in JAX, in the scenario and batch that the search chose. Where its costs are those of
      another engine, whose batch may be larger than JAX has room for, `experiments.serve_compare` measures instead.
  """

  batch_rows: int = 2
  prompts: tuple[str, ...] = ()
  max_new_tokens: int = 48
  contexts: tuple[int, ...] = ()
  texts: tuple[str, ...] = ()
  tasks: tuple[str, ...] = ()
  task_items: int = 0
  timed: bool = True

  def __post_init__(self) -> None:
    _at_least(1, "evaluation", batch_rows=self.batch_rows, max_new_tokens=self.max_new_tokens)
    _at_least(0, "evaluation", task_items=self.task_items)
    _at_least(2, "evaluation", contexts=min(self.contexts, default=2))
    names = [task_name(task) for task in self.tasks]
    if len(set(names)) < len(names):
      raise PuzzleError(f"evaluation.tasks={self.tasks} must name files of different names, folder and suffix aside")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """`dtype` of the exported weights; see `serving.hf_export`."""

  dtype: str = "bfloat16"

  def __post_init__(self) -> None:
    _one_of("export.dtype", self.dtype, EXPORT_DTYPES)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """A run: `parent` is a Hugging Face directory or hub id, a GGUF file, or `smollm2-135m` (built in).

  `device` "gpu" refuses to start where JAX finds no GPU.
  """

  name: str = "run"
  parent: str = "smollm2-135m"
  device: str = "any"
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  activations: ActivationsConfig = dataclasses.field(default_factory=ActivationsConfig)
  space: SpaceConfig = dataclasses.field(default_factory=SpaceConfig)
  bld: BLDConfig = dataclasses.field(default_factory=BLDConfig)
  scores: ScoresConfig = dataclasses.field(default_factory=ScoresConfig)
  costs: CostsConfig = dataclasses.field(default_factory=CostsConfig)
  search: SearchConfig = dataclasses.field(default_factory=SearchConfig)
  coupled: CoupledConfig = dataclasses.field(default_factory=CoupledConfig)
  gkd: GKDConfig = dataclasses.field(default_factory=GKDConfig)
  evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
  export: ExportConfig = dataclasses.field(default_factory=ExportConfig)

  def __post_init__(self) -> None:
    _one_of("device", self.device, DEVICES)
    batch = self.gkd.batch_rows * self.data.seq_len
    if self.gkd.steps and self.data.gkd_tokens < batch:
      raise PuzzleError(
        f"data.gkd_tokens={self.data.gkd_tokens} is less than one batch of gkd.batch_rows={self.gkd.batch_rows} rows "
        f"of data.seq_len={self.data.seq_len}; {batch} are needed"
      )
    if max(self.evaluation.contexts, default=0) > self.data.eval_tokens:
      raise PuzzleError(
        f"evaluation.contexts={self.evaluation.contexts} has a row longer than all of "
        f"data.eval_tokens={self.data.eval_tokens}; raise the latter"
      )
    names = [Path(name).name for name in (*self.data.sources, *self.evaluation.texts)]
    if len(set(names)) < len(names):
      raise PuzzleError(
        f"data.source={self.data.source!r} and evaluation.texts={self.evaluation.texts} are told apart by their names "
        "without folders; rename one"
      )
    if self.search.rule != MIP and self.coupled.wanted:
      raise PuzzleError(f"search.rule={self.search.rule!r} cannot choose among coupled pairs; leave one of them out")
    if self.scores.metric == "accuracy" and not self.data.task:
      raise PuzzleError("scores.metric='accuracy' needs a task; name a file of JSON lines with data.task")

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def results(self) -> dict[str, Any]:
    """The same without fields that no result depends on (where activations lie)."""
    values = self.to_dict()
    for section in dataclasses.fields(self):
      for field in dataclasses.fields(section.type) if dataclasses.is_dataclass(section.type) else ():
        if not field.metadata.get("result", True):
          del values[section.name][field.name]
    return values

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
    """From nested mappings, such as an ml_collections ConfigDict's.

    Raises:
      PuzzleError: an unknown key (names the nearest known one), or a value of the wrong type or out of range.
    """
    return _build(cls, values, "config")


def check_key(name: str) -> None:
  """Raises PuzzleError where `section.field` is none of the config's (names the nearest known one)."""
  hint, path = RunConfig, "config"
  for key in name.split("."):
    if not dataclasses.is_dataclass(hint):
      return
    hint, path = _hint(hint, key, path), f"{path}.{key}"


def _hint(cls: Any, key: str, path: str) -> Any:
  """The type of a dataclass's field."""
  hints = typing.get_type_hints(cls)
  if key not in hints:
    near = difflib.get_close_matches(key, hints, n=1)
    raise PuzzleError(
      f"unknown config key {path}.{key}; {f'did you mean {near[0]}? ' if near else ''}known: {', '.join(hints)}"
    )
  return hints[key]


def _build(cls: Any, values: Mapping[str, Any], path: str) -> Any:
  kwargs = {}
  for key, value in values.items():
    hint = _hint(cls, key, path)
    if dataclasses.is_dataclass(hint):
      if not isinstance(value, Mapping):
        raise PuzzleError(f"{path}.{key} must be a mapping of {', '.join(typing.get_type_hints(hint))}; got {value!r}")
      kwargs[key] = _build(hint, value, f"{path}.{key}")
    else:
      kwargs[key] = _checked(value, hint, f"{path}.{key}")
  return cls(**kwargs)


def _checked(value: Any, hint: Any, path: str) -> Any:
  """`value` as `hint`: lists become tuples, integers count as floats."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is tuple:
    if isinstance(value, (list, tuple)):
      return tuple(_checked(item, args[0], path) for item in value)
  elif origin in (typing.Union, types.UnionType):
    for option in args:
      try:
        return _checked(value, option, path)
      except PuzzleError:
        continue
  elif origin is not None:  # Mapping
    if isinstance(value, Mapping):
      return dict(value)
  elif hint is float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      return float(value)
  elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
    return value
  raise PuzzleError(f"{path}={value!r} is not of type {hint if origin else getattr(hint, '__name__', hint)}")
