"""What each serving engine can run, as data; held against a child, or offered to the search as a restriction.

From reading the engines' sources, except where `seen` says that a child was run. Imports no JAX. Engines change: the
table is the one place to correct.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING

from puzzle_jax.arch import (
  GQA,
  Architecture,
  BlockSpec,
  LinearAttention,
  LinearFFN,
  NoAttention,
  NoFFN,
  Subblock,
  SwiGLU,
)
from puzzle_jax.errors import PuzzleError

if TYPE_CHECKING:  # cvxpy, which the search needs, imports JAX where there is one
  from puzzle_jax.search.table import Table, Variant

_BASIC: frozenset[type[Subblock]] = frozenset([GQA, NoAttention, SwiGLU, NoFFN])
_FLOATS = frozenset(["bfloat16", "float32"])
FP8 = frozenset(["float8_tensor", "float8_channel"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
  """An engine's capabilities; the defaults are those of one that runs whatever can be exported."""

  title: str
  subblocks: frozenset[type[Subblock]] = _BASIC | {LinearAttention, LinearFFN}
  attention_without_ffn: bool = True  # False: an FFN may be missing only where attention is missing too
  first_layer_without_attention: bool = True  # False: it must be gqaN
  last_layer_without_ffn: bool = True
  kv_heads_vary: bool = True  # False: all layers with attention have as many KV heads
  ffn_multiple: int = 256  # of which widths must be multiples; 1: any
  attention_bias: bool = True
  own_head_dim: bool = True  # False: the head size must be hidden_size / num_heads
  tied_embeddings: bool = True  # False: an export gives the LM head a copy of the embedding
  format: str = "hf"  # or gguf
  dtypes: frozenset[str] = _FLOATS  # of exported weights
  seen: str = ""  # what was run, with which version


ENGINES: dict[str, Engine] = {
  "tensorrt_llm": Engine(
    title="TensorRT-LLM (PyTorch backend)",
    attention_bias=False,
    tied_embeddings=False,  # its embedding is not split over GPUs as its LM head is, and it asserts that they match
    dtypes=_FLOATS | FP8,
  ),
  "tensorrt_llm_engine": Engine(
    title="TensorRT-LLM (engine builder)",
    attention_bias=False,
    own_head_dim=False,
    tied_embeddings=False,  # it reads lm_head.weight
  ),
  "vllm": Engine(
    title="vLLM",
    subblocks=_BASIC,
    first_layer_without_attention=False,
    ffn_multiple=1,  # it takes an exact `intermediate_size`
    dtypes=_FLOATS | FP8,
    seen="0.25.1: layers of 1 and of 3 KV heads mixed (on Hopper with the plugin below), attention left out in some, "
    "exact FFN widths",
  ),
  "sglang": Engine(
    title="SGLang",
    subblocks=_BASIC,
    first_layer_without_attention=False,
    kv_heads_vary=False,
    attention_bias=False,
    dtypes=_FLOATS | {"float8_tensor"},
  ),
  "llama_cpp": Engine(
    title="llama.cpp",
    subblocks=_BASIC | {LinearAttention},
    attention_without_ffn=False,  # it drops such a layer's attention without a word
    first_layer_without_attention=False,  # it takes the head size from there (linear attention would do)
    last_layer_without_ffn=False,  # it stops: that is where it picks the tokens whose logits are asked for
    ffn_multiple=32,  # a block of the quantised types
    format="gguf",
    dtypes=frozenset(["F16", "Q8_0", "Q4_0", "Q4_1"]),
    seen="llama-cpp-python 0.3.36: children with every block that it runs; what happens with those that it does not",
  ),
  "mlx_lm": Engine(
    title="mlx-lm",
    subblocks=_BASIC,  # it looks for linear subblocks under another tensor name
    own_head_dim=False,
  ),
  "transformers": Engine(  # by the modelling files that travel with the child
    title="Transformers",
    ffn_multiple=1,
    dtypes=_FLOATS | FP8,
    seen="5.23: children with every block",
  ),
  "torch": Engine(title="the built-in PyTorch engine", ffn_multiple=1),
  "portable": Engine(  # what all of these run
    title="every engine",
    subblocks=_BASIC,
    attention_without_ffn=False,
    first_layer_without_attention=False,
    last_layer_without_ffn=False,
    kv_heads_vary=False,
    attention_bias=False,
    own_head_dim=False,
    tied_embeddings=False,
  ),
}


def by_name(name: str) -> Engine:
  """The engine of a name; raises PuzzleError for one that is not in the table."""
  if name not in ENGINES:
    raise PuzzleError(f"engine {name!r} is unknown; known: {', '.join(ENGINES)}")
  return ENGINES[name]


def objection(engine: Engine, layer: int, block: str, *, num_layers: int) -> str:
  """Why the engine cannot run a block (attention/ffn) at a layer, and what it could; empty if it can."""
  spec = BlockSpec.parse(block)
  for subblock in spec.subblocks:
    if type(subblock) not in engine.subblocks:
      others = "gqaN or none" if subblock.slot == "attention" else "wN or none"
      return f"{subblock.name} in place of {subblock.slot} is not run; use {others}"
  if layer == 0 and not isinstance(spec.attention, GQA) and not engine.first_layer_without_attention:
    return "the first layer must have attention; keep it there"
  if isinstance(spec.ffn, NoFFN):
    if not isinstance(spec.attention, NoAttention) and not engine.attention_without_ffn:
      return "attention without an FFN is not run; keep an FFN, or leave the attention out too"
    if layer == num_layers - 1 and not engine.last_layer_without_ffn:
      return "the last layer must have an FFN; keep it there"
  if isinstance(spec.ffn, SwiGLU) and spec.ffn.width % engine.ffn_multiple:
    return f"the FFN's width is no multiple of {engine.ffn_multiple}; take one, which a padded export has anyway"
  return ""


def rejections(engine: Engine, blocks: Sequence[str]) -> list[str]:
  """What the engine would reject in a whole child, one sentence a reason with its layers and a remedy; empty: nothing.

  Args:
    engine: of `ENGINES`.
    blocks: attention/ffn of each layer.
  """
  reasons: dict[str, list[int]] = {}
  by_heads: dict[int, list[int]] = {}
  for layer, block in enumerate(blocks):
    if reason := objection(engine, layer, block, num_layers=len(blocks)):
      reasons.setdefault(reason, []).append(layer)
    if heads := _kv_heads(block):
      by_heads.setdefault(heads, []).append(layer)
  found = [f"{engine.title}: {_layers(layers)}: {reason}" for reason, layers in reasons.items()]
  if len(by_heads) > 1 and not engine.kv_heads_vary:
    listed = ", ".join(f"gqa{heads} in {_layers(layers)}" for heads, layers in sorted(by_heads.items(), reverse=True))
    found.append(f"{engine.title}: {listed}: all layers must have as many KV heads; keep one number")
  return found


def check_export(name: str, architecture: Architecture, *, format: str, dtype: str) -> None:
  """Refuses an export that an engine would reject or, worse, change silently.

  Args:
    name: of `ENGINES`.
    architecture: as exported, padding included.
    format: `hf` or `gguf`.
    dtype: of the exported weights.

  Raises:
    PuzzleError: with the layers and what to do: which restriction to give to the search, where that helps.
  """
  engine, c = by_name(name), architecture.config
  if format != engine.format:
    fitting = ", ".join(n for n, e in ENGINES.items() if e.format == format)
    raise PuzzleError(f"{engine.title} reads {engine.format}, not {format}; engines for {format}: {fitting}")
  if dtype not in engine.dtypes:
    raise PuzzleError(f"{engine.title} does not read {dtype} weights; it reads {', '.join(sorted(engine.dtypes))}")
  whole = []
  if (c.qkv_bias or c.o_bias) and not engine.attention_bias:
    whole.append("leaves out the biases of attention")
  if c.num_heads * c.head_dim != c.hidden_size and not engine.own_head_dim:
    whole.append(f"takes heads of {c.hidden_size} / {c.num_heads}, these have {c.head_dim} values")
  if whole:
    raise PuzzleError(
      f"{engine.title} {', and '.join(whole)}: the parent has that, no search helps; use another engine"
    )
  if found := rejections(engine, [b.name for b in architecture.blocks]):
    raise PuzzleError(
      f"{'; '.join(found)}. Search again under what it runs: --config.search.engine={name} (experiments.run) or "
      f"--engine={name} (experiments.search)"
    )


def check_ranks(name: str, architecture: Architecture, ranks: int, *, what: str = "the child") -> None:
  """Refuses a model that cannot be split over so many GPUs (tensor parallelism).

  Engines split query heads, KV heads and FFN channels evenly. Where a layer has fewer KV heads than there are GPUs,
  each GPU keeps a copy of one: the heads must divide the GPUs, and the KV cache does not shrink below one head a GPU
  (`kv_copies`).

  Raises:
    PuzzleError: with the layers and a remedy.
  """
  heads = architecture.config.num_heads
  if heads % ranks:
    raise PuzzleError(f"{what}: {heads} query heads are not to be split over {ranks} GPUs; take a divisor of {heads}")
  for i, block in enumerate(architecture.blocks):
    kv, width = _kv_heads(block.name), block.ffn.width if isinstance(block.ffn, SwiGLU) else 0
    if kv and kv % ranks and ranks % kv:
      raise PuzzleError(
        f"{what}: {by_name(name).title}: layer {i}: {kv} KV heads are neither to be split over {ranks} GPUs nor to be "
        "copied evenly; take numbers of heads that divide it or are multiples of it"
      )
    if width % ranks:
      raise PuzzleError(f"{what}: layer {i}: an FFN of {width} is not to be split over {ranks} GPUs; take a multiple")


def kv_copies(block: str, ranks: int) -> int:
  """How often each KV head of a block is kept over so many GPUs: more than once where they are more than its heads."""
  heads = _kv_heads(block)
  return max(1, ranks // heads) if heads else 1


def restrict(table: "Table", engine: Engine) -> list["Table"]:
  """The table less what the engine does not run.

  Returns:
    One table; or, where an engine needs as many KV heads in all layers, one for each number that every layer can do
    with. `search.solve` and its like take the list and find the best child of all.

  Raises:
    PuzzleError: a layer has nothing left.
  """

  def why_not(layer: int, variant: "Variant") -> str:
    return objection(engine, layer, variant.block, num_layers=table.num_layers)

  for layer in range(table.num_layers):
    if all(reasons := [why_not(layer, variant) for variant in table.choices(layer)]):
      why = "; ".join(f"{v.block}: {reason}" for v, reason in zip(table.choices(layer), reasons, strict=True))
      raise PuzzleError(f"layer {layer}: {engine.title} runs none of its variants ({why})")
  able = table.restrict(lambda layer, variant: not why_not(layer, variant))
  if engine.kv_heads_vary:
    return [able]
  found = []
  kv_heads = {v: _kv_heads(v.block) for layer in range(able.num_layers) for v in able.choices(layer)}
  for number in sorted(set(kv_heads.values()) - {0}, reverse=True) or [0]:
    keep = {variant for variant, heads in kv_heads.items() if heads in (0, number)}
    with contextlib.suppress(PuzzleError):  # a layer has neither attention of that number nor none
      found.append(able.restrict(_only(keep)))
  if not found:
    raise PuzzleError(f"{engine.title} needs as many KV heads in all layers; no number leaves a variant in each")
  return found


def _only(keep: Set["Variant"]) -> Callable[[int, "Variant"], bool]:
  return lambda layer, variant: variant in keep


def _kv_heads(block: str) -> int:
  """0 without a KV cache."""
  attention = BlockSpec.parse(block).attention
  return attention.kv_heads if isinstance(attention, GQA) else 0


def _layers(layers: Sequence[int]) -> str:
  return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
