"""One step of blockwise local distillation: tokens/s here, of a PyTorch peer, and of the device's matrix products.

    python -m experiments.benchmarks.bld --shapes=llama_8b        (one H100)
    python -m experiments.benchmarks.bld --shapes=smollm2 --dtype=float32   (two CPU cores)

All variants of one layer are trained in one step, decoupled, with random weights. The peer does the same in PyTorch:
torch.compile, autocast, fused AdamW, flash attention, the parent's attention computed once. `jax_attention` is this
project's step with attention variants held against the parent's attention alone, which needs no frozen FFN behind each
of them. Each side runs in a process of its own, one after the other. All are counted by the FLOPs that they need
(`puzzle_jax.flops`). Writes experiments/results/bld_SHAPES.json.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import app, flags

from experiments.benchmarks import sides
from puzzle_jax import flops
from puzzle_jax import space as space_lib
from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig, Tensor
from puzzle_jax.space import LayerSpace

_SHAPES = flags.DEFINE_enum("shapes", "smollm2", ["llama_8b", "llama_70b", "smollm2", "tiny"], "Of the block.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the matrix products.")
_STEPS = flags.DEFINE_integer("steps", 10, "Timed in a row.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "The fastest counts.")
_SIDES = flags.DEFINE_list("sides", ["jax", "jax_attention", "torch"], "What to run.")
_SIDE = flags.DEFINE_string("side", "", "Run one side in this process and print its figures as JSON.")

PAPER = {"attention": ("gqa", "linear", "none"), "ffn": (0.87, 0.75, 0.5, 0.25, 0.2, 0.1, "linear", "none")}
QUICKSTART = {"attention": ("linear", "none"), "ffn": (0.75, 0.5, 0.25, "linear", "none")}
SHAPES: dict[str, dict[str, Any]] = {  # sizes, the parent's block, [rows, tokens] of a step, what is trained
  "llama_8b": {"d": 4096, "heads": 32, "h": 128, "block": "gqa8/w14336", "batch": (4, 4096), "space": PAPER},
  "llama_70b": {"d": 8192, "heads": 64, "h": 128, "block": "gqa8/w28672", "batch": (2, 4096), "space": PAPER},
  "smollm2": {"d": 576, "heads": 9, "h": 64, "block": "gqa3/w1536", "batch": (4, 256), "space": QUICKSTART},
  "tiny": {"d": 64, "heads": 4, "h": 16, "block": "gqa2/w256", "batch": (2, 32), "space": PAPER},
}


def layer_space(name: str) -> tuple[ModelConfig, LayerSpace, tuple[int, int]]:
  """The model, the layer's variants, rows and tokens of a step."""
  s = SHAPES[name]
  config = ModelConfig(
    vocab_size=256, hidden_size=s["d"], num_heads=s["heads"], head_dim=s["h"], max_context=8192, rope_theta=5e5
  )
  parent = Architecture(config, (BlockSpec.parse(s["block"]),))
  return config, space_lib.build(parent, ffn_multiple=64, **s["space"]).layers[0], s["batch"]


def random_input(config: ModelConfig, shape: tuple[int, int]) -> np.ndarray:
  return np.random.default_rng(1).standard_normal((*shape, config.hidden_size), np.float32)


def draw(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
  """Random weights by name; NumPy, fp32. Norms are 1."""
  noise = np.random.default_rng(0).standard_normal(2**22, np.float32)  # repeated: billions of draws take minutes
  shapes = {name: t.shape for name, t in tensors.items()}
  scale = {k: s[-1] ** -0.5 for k, s in shapes.items()}
  return {k: np.ones(s, np.float32) if k == "norm" else np.resize(scale[k] * noise, s) for k, s in shapes.items()}


def random_weights(config: ModelConfig, space: LayerSpace) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
  """The parent's block by slot, and the variants by name."""
  variants = {s.id: draw(s.tensors(config)) for s in space.variants if s.tensors(config)}
  return {s.slot: draw(s.tensors(config)) for s in space.parent.subblocks}, variants


def run_jax(attention_target: str) -> dict[str, Any]:
  """This project's step, and the rate of a large matrix product."""
  import jax
  import jax.numpy as jnp

  from puzzle_jax import bld, memory
  from puzzle_jax.activations import Batch
  from puzzle_jax.model import decoder

  config, space, (rows, tokens) = layer_space(_SHAPES.value)
  settings = bld.BLDConfig(dtype=_DTYPE.value, steps=1000, attention_target=attention_target)
  parent, variants = jax.tree.map(lambda w: jnp.asarray(w[None]), random_weights(config, space))  # one layer
  jobs = tuple(job for job in bld.decoupled(space) if job.name in variants)  # not no-ops: nothing is trained there
  trained = bld.split({job.name: {job.replaced[0]: variants[job.name]} for job in jobs})
  x = jnp.asarray(random_input(config, (rows, tokens)))[None]
  context = decoder.context_of(config, jnp.broadcast_to(jnp.arange(tokens), (rows, tokens)))
  batch, scale = Batch(x, context, jnp.ones((rows, tokens))), (jnp.ones(1), jnp.ones(1))
  state = [trained, bld.init_states(settings, trained)]
  run = memory.Step(space.parent, jobs, config, settings)
  first: list[float] = []

  def step() -> None:
    state[0], state[1], losses = run(parent, state[0], state[1], batch, scale)
    if not first:
      first.append(float(sum(loss[0] for loss in losses.values())))

  seconds = sides.fastest(step, lambda: jax.block_until_ready(state), steps=_STEPS.value, repeats=_REPEATS.value)
  return {
    "first_loss": first[0],
    "seconds": seconds,
    **sides.of_device(),
    "matmul_flops_per_s": sides.matmul_flops_per_s(_DTYPE.value, steps=_STEPS.value, repeats=_REPEATS.value),
    "compiled_bytes": run.compiled_bytes,
    "planned_bytes": memory.need(space.parent, jobs, config, settings, rows=rows, tokens=tokens).total,
  }


def run_torch() -> dict[str, Any]:
  """The peer's step."""
  import torch
  import torch.nn.functional as F

  config, space, (rows, tokens) = layer_space(_SHAPES.value)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  dtype = getattr(torch, _DTYPE.value)
  parent_np, variants_np = random_weights(config, space)
  parent = {slot: {k: torch.tensor(w, device=device) for k, w in v.items()} for slot, v in parent_np.items()}
  frozen = {slot: {k: w.to(dtype) if w.ndim == 2 else w for k, w in v.items()} for slot, v in parent.items()}
  variants = {
    name: {k: torch.tensor(w, device=device, requires_grad=k != "norm") for k, w in v.items()}
    for name, v in variants_np.items()
  }
  half = config.head_dim // 2
  angle = torch.arange(tokens, device=device)[:, None] * config.rope_theta ** (
    -torch.arange(half, device=device) / half
  )
  cos, sin = (torch.cat([f(angle)] * 2, -1)[None, :, None] for f in (torch.cos, torch.sin))

  def norm(x: Any, scale: Any) -> Any:
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * scale).to(dtype)

  def rotate(x: Any) -> Any:
    first, second = x.float().chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(dtype)

  def attention(spec: Any, p: Any, x: Any) -> Any:
    h = norm(x, p["norm"])
    if spec.name == "linear":
      return F.linear(h, p["linear"].to(dtype))
    q, k, v = (F.linear(h, p[n].to(dtype)).view(rows, tokens, -1, config.head_dim) for n in "qkv")
    q, k, v = (t.transpose(1, 2) for t in (rotate(q), rotate(k), v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return F.linear(y.transpose(1, 2).reshape(rows, tokens, -1), p["o"].to(dtype))

  def ffn(spec: Any, p: Any, x: Any) -> Any:
    h = norm(x, p["norm"])
    if spec.name == "linear":
      return F.linear(h, p["linear"].to(dtype))
    gate, up = (F.linear(h, p[n].to(dtype)) for n in ("gate", "up"))
    return F.linear(F.silu(gate) * up, p["down"].to(dtype))

  specs = [s for s in space.variants if s.id in variants]

  def losses(x: Any) -> Any:
    with torch.no_grad():
      first = attention(space.attention[0], frozen["attention"], x)
      target = first.float() + ffn(space.ffn[0], frozen["ffn"], x + first)
      square = target.square().mean(-1)
      weight = torch.clamp(10.0 / square, max=1.0) / square.numel()
    total = 0.0
    for spec in specs:
      p = variants[spec.id]
      if spec.slot == "attention":
        delta = attention(spec, p, x)
        delta = delta.float() + ffn(space.ffn[0], frozen["ffn"], x + delta)
      else:
        delta = first.float() + ffn(spec, p, x + first)
      total = total + (weight * (delta - target).square().mean(-1)).sum()
    return total

  groups = {name: [w for k, w in v.items() if k != "norm"] for name, v in variants.items()}
  optimizer = torch.optim.AdamW([w for g in groups.values() for w in g], lr=1e-4, weight_decay=0.0, fused=True)
  compiled = torch.compile(losses)
  x = torch.tensor(random_input(config, (rows, tokens)), device=device)
  first_loss: list[float] = []

  def step() -> None:
    loss = compiled(x)
    if not first_loss:
      first_loss.append(float(loss))
    loss.backward()
    for weights in groups.values():
      torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  wait = torch.cuda.synchronize if device == "cuda" else lambda: None
  seconds = sides.fastest(step, wait, steps=_STEPS.value, repeats=_REPEATS.value)
  memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
  return {
    "first_loss": first_loss[0],
    "seconds": seconds,
    "peak_bytes": memory,
    "versions": {"torch": torch.__version__},
  }


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
  "jax": functools.partial(run_jax, "block"),
  "jax_attention": functools.partial(run_jax, "attention"),
  "torch": run_torch,
}


def main(argv: list[str]) -> None:
  del argv
  if _SIDE.value:
    print(json.dumps(RUNS[_SIDE.value]()))
    return
  config, space, (rows, tokens) = layer_space(_SHAPES.value)

  def needed(side: str) -> int:
    target = "attention" if side == "jax_attention" else "block"
    return flops.decoupled_step(space, config, context=tokens // 2, attention_target=target)

  sides.compare(
    "experiments.benchmarks.bld",
    f"bld_{_SHAPES.value}",
    flags=[f"--{f.name}={f.value}" for f in (_SHAPES, _DTYPE, _STEPS, _REPEATS)],
    needed={side: needed(side) for side in _SIDES.value},
    tokens=rows * tokens,
    tolerance=1e-4 if _DTYPE.value == "float32" else 1e-2,
    details={"shapes": _SHAPES.value, "variants": [s.id for s in space.variants]},
  )


if __name__ == "__main__":
  app.run(main)
