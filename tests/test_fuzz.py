"""Everything that is read from outside, damaged at random: it is read, or refused by PuzzleError; nothing else.

FUZZ_SECONDS=86 python -m pytest -rP tests/test_fuzz.py    # so many of each kind: ten minutes in all
"""

import copy
import itertools
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import gguf
import hypothesis
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from configs import tiny
from experiments import tiny_parent
from puzzle_jax import space
from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig
from puzzle_jax.config import RunConfig
from puzzle_jax.costs import CostTable, Scenario, block_table
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import open_parent
from puzzle_jax.search.table import Table
from puzzle_jax.serving.hf_export import export_hf

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))  # 0: so many cases of each kind
CASES = 150
_STRANGE: list[Any] = [None, -1, 0, 1, 3, 1e308, -0.5, float("inf"), float("nan"), "", "x", "gqa2/w64", [], [[]], {}]
_STRANGE += [{"a": 1}, True, False, 10**18, 2**31, 2**63, -(10**30), "\x00", "9" * 30, [1] * 5]
_KEYS = ["x", "attention_bias", "rope_scaling", "head_dim", "quantization_config", "auto_map", "sliding_window"]


def damaged_json(data: Any, rng: random.Random) -> Any:
  """One or two values replaced, removed, added or lengthened, wherever they lie."""
  data = copy.deepcopy(data)
  for _ in range(rng.choice([1, 1, 2])):
    node: Any = data
    while node:
      key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
      if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.75:
        node = node[key]
        continue
      kind = rng.random()
      if kind < 0.2:
        del node[key]
      elif kind < 0.3 and isinstance(node, dict):
        node[rng.choice(_KEYS)] = copy.deepcopy(rng.choice(_STRANGE))
      elif kind < 0.4 and isinstance(node[key], str):
        node[key] = node[key][: rng.randrange(len(node[key]) + 1)] + rng.choice(["é", "/", "../x", "\ud800"])
      else:
        node[key] = copy.deepcopy(rng.choice(_STRANGE))
      break
  return data


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
  """Bytes replaced, inserted, cut off, or made a large number; most of them in the first 2,000, where headers lie."""
  found = bytearray(data)
  for _ in range(rng.choice([1, 1, 2, 8])):
    at = rng.randrange(max(1, len(found) if rng.random() < 0.4 else min(len(found), 2000)))
    kind = rng.random()
    if kind < 0.5:
      found[at : at + 1] = rng.randbytes(1)
    elif kind < 0.65:
      del found[at:]
    elif kind < 0.8:
      found[at:at] = rng.randbytes(rng.randrange(1, 9))
    else:
      found[at : at + 8] = rng.choice([0, 1, 2**31, 2**40, 2**62, 2**64 - 1]).to_bytes(8, "little")
  return bytes(found)


def write_gguf(path: Path, weights: Path, changed: Mapping[str, Any] | None = None) -> None:
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_block_count(4)
  writer.add_context_length(256)
  writer.add_embedding_length(32)
  writer.add_feed_forward_length(64)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_layer_norm_rms_eps(1e-5)
  tokens = [*map(chr, range(97, 122)), "ab", "<s>", "</s>"]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(tokens)
  writer.add_token_types([1] * 26 + [3] * 2)
  writer.add_token_merges(["a b"])
  writer.add_bos_token_id(26)
  writer.add_eos_token_id(27)
  for key, value in (changed or {}).items():
    kind = gguf.GGUFValueType.get_type(value)
    writer.kv_data[0].pop(key, None)
    writer.add_key_value(key, value, gguf.GGUFValueType.INT64 if kind is gguf.GGUFValueType.INT32 else kind)
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
  for name, array in safetensors.numpy.load_file(weights).items():
    stem, _, kind = name.rpartition(".")
    writer.add_tensor(f"{names.get_name(stem)}.{kind}", array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A parent in each of the formats."""
  folder = tmp_path_factory.mktemp("whole")
  tiny_parent.write(folder / "child")
  export_hf(folder / "child", folder / "nas", dtype="float32")
  shutil.copytree(folder / "child", folder / "llama")
  (folder / "llama" / "architecture.json").unlink()
  config = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
  config |= {"num_hidden_layers": 4, "intermediate_size": 64, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
  vocabulary = open_parent(str(folder / "child")).architecture.config.vocab_size
  config |= {"vocab_size": vocabulary, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e4}}
  (folder / "llama" / "config.json").write_text(json.dumps(config))
  write_gguf(folder / "model.gguf", folder / "child" / "model.safetensors")
  return folder


def use(path: Path) -> None:
  """All that a run reads of a parent."""
  parent = open_parent(str(path))
  parent.validate()
  tokenizer = parent.tokenizer()
  tokenizer.decode(tokenizer.encode("Hello, wörld 12"))
  if tokenizer.chat_template is not None:
    tokenizer.render_chat([{"role": "user", "content": "hi"}])


@pytest.fixture
def bounded() -> Iterator[None]:
  """20 s a case, and half a GiB of memory besides what the process had."""

  def late(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("a case takes more than 20 s")

  before, peak = signal.signal(signal.SIGALRM, late), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**19  # KiB


def fuzz(case: Callable[[random.Random], None]) -> None:
  """Many cases; the seed of one that fails is in the message."""
  end = time.monotonic() + SECONDS
  for seed in itertools.count():
    if time.monotonic() > end if SECONDS else seed == CASES:
      break
    signal.alarm(20)
    try:
      case(random.Random(seed))
    except PuzzleError:
      pass
    except BaseException as e:
      raise AssertionError(f"case {seed}: {e!r}") from e
  print(f"{seed} cases")


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in gguf, which then reads out of range
@pytest.mark.parametrize("kind", ["child", "llama", "nas", "model.gguf"])
def test_parents(whole: Path, tmp_path: Path, bounded: None, kind: str) -> None:
  use(whole / kind)
  path = tmp_path / kind

  def case(rng: random.Random) -> None:
    if kind.endswith(".gguf"):
      path.unlink(missing_ok=True)  # never written over: the last case's reader may have it mapped into memory
      path.write_bytes(damaged_bytes((whole / kind).read_bytes(), rng))
    else:
      shutil.rmtree(path, ignore_errors=True)
      shutil.copytree(whole / kind, path)
      file = rng.choice(sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors", ".jinja")))
      if file.suffix == ".json" and rng.random() < 0.7:
        text = json.dumps(damaged_json(json.loads(file.read_text()), rng))
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
      else:
        file.write_bytes(damaged_bytes(file.read_bytes(), rng))
    use(path)

  fuzz(case)


def test_metadata_of_gguf(whole: Path, tmp_path: Path, bounded: None) -> None:
  """Values of any type in any place."""
  keys = ["general.name", "general.license", "general.architecture", "split.count", "tokenizer.chat_template"]
  keys += [f"llama.{key}" for key in ("block_count", "context_length", "embedding_length", "feed_forward_length")]
  keys += [f"llama.attention.{key}" for key in ("head_count", "head_count_kv", "key_length", "layer_norm_rms_epsilon")]
  keys += [f"llama.{key}" for key in ("rope.freq_base", "rope.dimension_count", "expert_count", "rope.scaling.type")]
  keys += [f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "token_type", "merges", "add_bos_token")]
  keys += [f"tokenizer.ggml.{role}_token_id" for role in ("bos", "eos", "eot", "unknown", "padding")]
  values = ["x", "deci", "gpt2", 0, -1, 1, 2, 4, 2**40, 1.5, float("nan"), True, False, [1, 2], ["a", "b"], [0.5] * 4]

  def case(rng: random.Random) -> None:
    path = tmp_path / f"{rng.random()}.gguf"
    changed = {rng.choice(keys): rng.choice(values) for _ in range(rng.choice([1, 1, 2]))}
    if rng.random() < 0.3:  # of a child that was exported
      changed = {"general.architecture": "deci"} | {k.replace("llama.", "deci."): v for k, v in changed.items()}
      for key, value in (("block_count", 4), ("context_length", 256), ("embedding_length", 32)):
        changed.setdefault(f"deci.{key}", value)
      for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        changed.setdefault(f"deci.{key}", [rng.choice([0, 1, 2, 4, -1, 64]) for _ in range(rng.choice([4, 4, 4, 3]))])
    write_gguf(path, whole / "child" / "model.safetensors", changed)
    try:
      use(path)
    finally:
      path.unlink()

  fuzz(case)


PARENT = Architecture(ModelConfig(64, 32, 4, 8, 256), (BlockSpec.parse("gqa2/w64"),) * 2)
SPACE = space.build(PARENT, ffn=(0.5, "none"), attention=("gqa", "none"), ffn_multiple=8)


def joined(costs: CostTable) -> dict[str, Any]:
  """The block table of some costs."""
  scores = [{b.name: (0.1 * (b != layer.parent), 0.01) for b in layer.blocks} for layer in SPACE.layers]
  return block_table(PARENT, SPACE, scores, costs)


def read_costs(data: Any) -> CostTable:
  """Reads a cost table and makes of it what the search needs."""
  costs = CostTable.from_json(data)
  Table.from_json(joined(costs))
  return costs


def tables() -> dict[str, Any]:
  """A block table, the costs it is made of, and a run's config, as JSON."""
  config = RunConfig.from_dict(tiny.get_config().to_dict())
  seconds = {"a": {"1": {"prefill_s": 1e-3, "decode_s": 1e-2}}}
  costs = CostTable(
    backend="given",
    hardware="none",
    versions={},
    bytes_per_value=4,
    scenarios=(Scenario("a", 32, 32),),
    subblocks={s.id: seconds for layer in SPACE.layers for s in (*layer.attention, *layer.ffn)},
    fixed=seconds,
    details={},
  )
  return {
    "config": config.to_dict(),
    "costs": costs.to_json(),
    "table": joined(costs),
  }


@pytest.mark.parametrize(
  "kind, read", [("config", RunConfig.from_dict), ("costs", read_costs), ("table", Table.from_json)]
)
def test_json(bounded: None, kind: str, read: Callable[[Any], Any]) -> None:
  data = json.loads(json.dumps(tables()[kind]))
  read(data)
  fuzz(lambda rng: read(json.loads(json.dumps(damaged_json(data, rng)))) and None)


_EXAMPLES = hypothesis.settings(
  max_examples=int(100 * SECONDS) or 50, deadline=None, derandomize=not SECONDS, database=None
)
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
_JSON = st.recursive(_SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3))
_PARTS = (
  st.sampled_from(["gqa", "linear", "none", "w", "/", "", "-"]) | st.integers(-1, 10**20).map(str) | st.text("é/w0")
)


@_EXAMPLES
@hypothesis.given(st.lists(_PARTS, max_size=5).map("".join))
def test_names_of_blocks(name: str) -> None:
  """Read as they are written, or refused."""
  try:
    block = BlockSpec.parse(name)
  except PuzzleError:
    return
  assert block.name == name


@pytest.mark.parametrize(
  "kind, read", [("config", RunConfig.from_dict), ("costs", read_costs), ("table", Table.from_json)]
)
def test_any_value_anywhere(kind: str, read: Callable[[Any], Any]) -> None:
  """What is read with any JSON value in any place is written and read again as the same."""
  data = json.loads(json.dumps(tables()[kind]))

  def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield from [path] if path else []
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
      yield from places(node[key], (*path, key))

  @_EXAMPLES
  @hypothesis.given(st.sampled_from(sorted(places(data), key=str)), _JSON)
  def replaced(path: tuple[Any, ...], value: Any) -> None:
    changed = copy.deepcopy(data)
    node = changed
    for key in path[:-1]:
      node = node[key]
    node[path[-1]] = value
    try:
      found = read(changed)
    except PuzzleError:
      return
    written = found.to_dict() if kind == "config" else found.to_json()
    again = read(json.loads(json.dumps(written)))
    assert (again.to_dict() if kind == "config" else again.to_json()) == written

  replaced()


def test_code_of_a_parent_is_never_run(whole: Path, tmp_path: Path) -> None:
  """Neither its modelling files nor pickled weights."""
  folder = Path(shutil.copytree(whole / "nas", tmp_path / "nas"))
  for file in folder.glob("*.py"):
    file.write_text("raise SystemExit('run')")
  use(folder)
  (folder / "pytorch_model.bin").write_bytes(np.random.default_rng(0).bytes(100))
  (folder / "model.safetensors").unlink()
  with pytest.raises(PuzzleError, match=r"pickled weights .* never read"):
    use(folder)
