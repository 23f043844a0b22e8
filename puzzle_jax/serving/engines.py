"""What each serving engine can run, as data; held against a child, or offered to the search as a restriction.

From reading the engines' sources of the nemotron-nas dialect that `hf_export` writes, except where `seen` says that a
child was run. Imports no JAX. Engines change: the table is the one place to correct.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING

from puzzle_jax.arch import GQA, BlockSpec, LinearAttention, LinearFFN, NoAttention, NoFFN, Subblock, SwiGLU
from puzzle_jax.errors import PuzzleError

if TYPE_CHECKING:  # cvxpy, which the search needs, imports JAX where there is one
  from puzzle_jax.search.table import Table, Variant

_BASIC: frozenset[type[Subblock]] = frozenset([GQA, NoAttention, SwiGLU, NoFFN])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
  """An engine's capabilities; the defaults are those of one that runs whatever can be exported."""

  title: str
  subblocks: frozenset[type[Subblock]] = _BASIC | {LinearAttention, LinearFFN}
  attention_without_ffn: bool = True  # False: an FFN may be missing only where attention is missing too
  first_layer_without_attention: bool = True
  kv_heads_vary: bool = True  # False: all layers with attention have as many KV heads
  ffn_multiple: int = 256  # of which widths must be multiples; 1: any
  seen: str = ""  # what was run, with which version


ENGINES: dict[str, Engine] = {
  "tensorrt_llm": Engine(title="TensorRT-LLM (PyTorch backend)"),
  "tensorrt_llm_engine": Engine(title="TensorRT-LLM (engine builder)"),
  "vllm": Engine(
    title="vLLM",
    subblocks=_BASIC,
    first_layer_without_attention=False,
    ffn_multiple=1,  # it takes an exact `intermediate_size`
    seen="0.25.1: layers of 1 and of 3 KV heads mixed, attention left out in some, exact FFN widths",
  ),
  "sglang": Engine(title="SGLang", subblocks=_BASIC, first_layer_without_attention=False, kv_heads_vary=False),
  "llama_cpp": Engine(
    title="llama.cpp",
    subblocks=_BASIC | {LinearAttention},
    attention_without_ffn=False,  # it drops such a layer without a word
  ),
  "mlx_lm": Engine(title="mlx-lm", subblocks=_BASIC),  # it looks for linear subblocks under another tensor name
  "transformers": Engine(title="Transformers", ffn_multiple=1),  # by the modelling files that travel with the child
  "portable": Engine(  # what all of these run
    title="every engine",
    subblocks=_BASIC,
    attention_without_ffn=False,
    first_layer_without_attention=False,
    kv_heads_vary=False,
  ),
}


def by_name(name: str) -> Engine:
  """The engine of a name; raises PuzzleError for one that is not in the table."""
  if name not in ENGINES:
    raise PuzzleError(f"engine {name!r} is unknown; known: {', '.join(ENGINES)}")
  return ENGINES[name]


def objection(engine: Engine, layer: int, block: str) -> str:
  """Why the engine cannot run a block (attention/ffn) at a layer, and what it could; empty if it can."""
  spec = BlockSpec.parse(block)
  for subblock in spec.subblocks:
    if type(subblock) not in engine.subblocks:
      others = "gqaN or none" if subblock.slot == "attention" else "wN or none"
      return f"{subblock.name} in place of {subblock.slot} is not run; use {others}"
  if isinstance(spec.attention, NoAttention) and layer == 0 and not engine.first_layer_without_attention:
    return "the first layer must have attention; keep it there"
  if isinstance(spec.ffn, NoFFN) and not isinstance(spec.attention, NoAttention) and not engine.attention_without_ffn:
    return "attention without an FFN is not run; keep an FFN, or leave the attention out too"
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
    if reason := objection(engine, layer, block):
      reasons.setdefault(reason, []).append(layer)
    if heads := _kv_heads(block):
      by_heads.setdefault(heads, []).append(layer)
  found = [f"{engine.title}: {_layers(layers)}: {reason}" for reason, layers in reasons.items()]
  if len(by_heads) > 1 and not engine.kv_heads_vary:
    listed = ", ".join(f"gqa{heads} in {_layers(layers)}" for heads, layers in sorted(by_heads.items(), reverse=True))
    found.append(f"{engine.title}: {listed}: all layers must have as many KV heads; keep one number")
  return found


def restrict(table: "Table", engine: Engine) -> list["Table"]:
  """The table less what the engine does not run.

  Returns:
    One table; or, where an engine needs as many KV heads in all layers, one for each number that every layer can do
    with. `search.solve` and its like take the list and find the best child of all.

  Raises:
    PuzzleError: a layer has nothing left.
  """
  for layer in range(table.num_layers):
    blocks = [v.block for v in table.choices(layer)]
    if all(reasons := [objection(engine, layer, block) for block in blocks]):
      why = "; ".join(f"{block}: {reason}" for block, reason in zip(blocks, reasons, strict=True))
      raise PuzzleError(f"layer {layer}: {engine.title} runs none of its variants ({why})")
  able = table.restrict(lambda layer, variant: not objection(engine, layer, variant.block))
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
