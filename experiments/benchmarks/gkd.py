"""One step of global distillation: tokens/s here, of a PyTorch peer, and of the device's matrix products.

    python -m experiments.benchmarks.gkd --shapes=smollm2        (one H100)

The child has the shapes of the parent, the most work there can be, and other random weights; the parent runs online.
Rows are one document each (in `jax_documents` eight, which do not see each other), bf16 products, fp32 weights and
losses (cosine + KL). The peer does the first in PyTorch: torch.compile, flash attention, fused AdamW, the KL by chunks
of tokens that are computed again in the backward pass.
Each side runs in a process of its own. Both are counted by the FLOPs that are needed (`puzzle_jax.flops`). Writes
experiments/results/gkd_SHAPES.json.
"""

import json
from typing import Any

import numpy as np
from absl import app, flags

from experiments.benchmarks import sides
from puzzle_jax import flops
from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig

DOCUMENTS = {"jax": 1, "jax_documents": 8, "torch": 1}  # a row, by side

_SHAPES = flags.DEFINE_enum("shapes", "smollm2", ["smollm2", "tiny"], "Of parent and child.")
_ROWS = flags.DEFINE_integer("rows", 32, "Of a step.")
_TOKENS = flags.DEFINE_integer("tokens", 2048, "A row.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the matrix products.")
_REMAT = flags.DEFINE_bool("remat", False, "Compute the inside of each block again in the backward pass, here.")
_STEPS = flags.DEFINE_integer("steps", 5, "Timed in a row.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "The fastest counts.")
_SIDES = flags.DEFINE_list("sides", list(DOCUMENTS), "What to run.")
_SIDE = flags.DEFINE_string("side", "", "Run one side in this process and print its figures as JSON.")

SHAPES: dict[str, dict[str, Any]] = {
  "smollm2": {"v": 49152, "d": 576, "heads": 9, "h": 64, "block": "gqa3/w1536", "layers": 30},
  "tiny": {"v": 512, "d": 64, "heads": 4, "h": 16, "block": "gqa2/w256", "layers": 3},
}
_RATE, _CHUNK = 2e-4, 2048


def architecture() -> Architecture:
  s = SHAPES[_SHAPES.value]
  config = ModelConfig(
    vocab_size=s["v"],
    hidden_size=s["d"],
    num_heads=s["heads"],
    head_dim=s["h"],
    max_context=8192,
    rope_theta=1e5,
    tie_embeddings=True,
  )
  return Architecture(config, (BlockSpec.parse(s["block"]),) * s["layers"])


def random_weights(model: Architecture, seed: int) -> dict[str, Any]:
  """In the "layers" form, NumPy fp32."""
  rng, config = np.random.default_rng(seed), model.config

  def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name == "norm":
      return np.ones(shape, np.float32)
    return np.float32(shape[-1] ** -0.5) * rng.standard_normal(shape, np.float32)

  return {
    "embed": draw("embed", (config.vocab_size, config.hidden_size)),
    "norm": draw("norm", (config.hidden_size,)),
    "layers": [
      {s.slot: {k: draw(k, t.shape) for k, t in s.tensors(config).items()} for s in block.subblocks}
      for block in model.blocks
    ],
  }


def random_tokens(model: Architecture) -> np.ndarray:
  shape = (_ROWS.value, _TOKENS.value)
  return np.random.default_rng(2).integers(model.config.vocab_size, size=shape, dtype=np.int32)


def run_jax() -> sides.Figures:
  """This project's step."""
  import jax

  from puzzle_jax import gkd
  from puzzle_jax.data import PackedText
  from puzzle_jax.model import decoder

  model, tokens = architecture(), random_tokens(architecture())
  documents = DOCUMENTS[_SIDE.value]
  attention = "fast" if documents == 1 else "exact"
  config = gkd.GKDConfig(
    steps=1000, learning_rate=_RATE, warmup_steps=0, dtype=_DTYPE.value, attention=attention, remat=_REMAT.value
  )
  parent, child = (jax.device_put(decoder.stacked(model, random_weights(model, seed))) for seed in (0, 1))
  document, position = np.divmod(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape[1] // documents)
  batch = jax.device_put(PackedText(tokens, *(np.broadcast_to(row, tokens.shape) for row in (document + 1, position))))
  state = [gkd.State.first(child, config)]

  def step() -> None:
    state[0] = gkd.train_step(state[0], batch, parent, child=model, parent=model, config=config)

  seconds = sides.fastest(step, lambda: jax.block_until_ready(state), steps=_STEPS.value, repeats=_REPEATS.value)
  return {
    "first_loss": float(state[0].history[0, gkd.METRICS.index("loss")]),
    "seconds": seconds,
    **sides.of_device(),
    "matmul_flops_per_s": sides.matmul_flops_per_s(_DTYPE.value, steps=_STEPS.value, repeats=_REPEATS.value),
  }


def run_torch() -> sides.Figures:
  """The peer's step."""
  import torch
  import torch.nn.functional as F
  from torch.utils.checkpoint import checkpoint

  model = architecture()
  config = model.config
  device = "cuda" if torch.cuda.is_available() else "cpu"
  dtype = getattr(torch, _DTYPE.value)
  tokens = torch.tensor(random_tokens(model), device=device, dtype=torch.long)
  rows, length = tokens.shape
  half = config.head_dim // 2
  angle = torch.arange(length, device=device)[:, None] * config.rope_theta ** (
    -torch.arange(half, device=device) / half
  )
  cos, sin = (torch.cat([f(angle)] * 2, -1)[None, :, None] for f in (torch.cos, torch.sin))

  def weights(seed: int, train: bool) -> Any:
    def tensor(w: Any) -> Any:
      if isinstance(w, dict):
        return {k: tensor(v) for k, v in w.items()}
      if isinstance(w, list):
        return [tensor(v) for v in w]
      t = torch.tensor(w, device=device)
      return t.requires_grad_() if train else (t.to(dtype) if t.ndim == 2 and len(t) < config.vocab_size else t)

    return tensor(random_weights(model, seed))

  def norm(x: Any, scale: Any) -> Any:
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * scale).to(dtype)

  def rotate(x: Any) -> Any:
    first, second = x.float().chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(dtype)

  def block(p: Any, x: Any) -> Any:
    a, f = p["attention"], p["ffn"]
    h = norm(x, a["norm"])
    q, k, v = (F.linear(h, a[n].to(dtype)).view(rows, length, -1, config.head_dim) for n in "qkv")
    q, k, v = (t.transpose(1, 2) for t in (rotate(q), rotate(k), v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + F.linear(y.transpose(1, 2).reshape(rows, length, -1), a["o"].to(dtype))
    h = norm(x, f["norm"])
    gate, up = (F.linear(h, f[n].to(dtype)) for n in ("gate", "up"))
    return x + F.linear(F.silu(gate) * up, f["down"].to(dtype))

  def chunk_kl(hidden_q: Any, head_q: Any, hidden_p: Any, head_p: Any) -> Any:
    logits = (F.linear(h, w).float() for h, w in ((hidden_q, head_q), (hidden_p, head_p)))
    log_q, log_p = (F.log_softmax(x, -1) for x in logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1)

  def distance(a: Any, b: Any) -> Any:
    return (1 - F.cosine_similarity(a, b, dim=-1)).mean()

  run_block, run_kl, run_distance = (torch.compile(f) for f in (block, chunk_kl, distance))

  def forward(p: Any) -> tuple[Any, list[Any]]:
    x, outputs = p["embed"][tokens].float(), []
    for layer in p["layers"]:
      x = run_block(layer, x)
      outputs.append(x)
    return norm(x, p["norm"]).view(-1, config.hidden_size), outputs

  parent, child = weights(0, False), weights(1, True)
  leaves = [
    child["embed"],
    child["norm"],
    *(w for layer in child["layers"] for s in layer.values() for w in s.values()),
  ]
  optimizer = torch.optim.AdamW(leaves, lr=_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
  real = torch.ones((rows, length), device=device)
  real[:, -1] = 0
  first_loss: list[float] = []

  def step() -> None:
    with torch.no_grad():
      hidden_p, outputs_p = forward(parent)
    hidden_q, outputs_q = forward(child)
    head_q, head_p = child["embed"].to(dtype), parent["embed"].to(dtype)
    kl = torch.cat(
      [
        checkpoint(run_kl, q, head_q, p, head_p, use_reentrant=False)
        for q, p in zip(hidden_q.split(_CHUNK), hidden_p.split(_CHUNK), strict=True)
      ]
    )
    loss = (kl * real.view(-1)).sum() / real.sum()
    loss = loss + sum(run_distance(a, b) for a, b in zip(outputs_q, outputs_p, strict=True))
    if not first_loss:
      first_loss.append(float(loss))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(leaves, 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  wait = torch.cuda.synchronize if device == "cuda" else lambda: None
  seconds = sides.fastest(step, wait, steps=_STEPS.value, repeats=_REPEATS.value)
  return {
    "first_loss": first_loss[0],
    "seconds": seconds,
    "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    "versions": {"torch": torch.__version__},
  }


def main(argv: list[str]) -> None:
  del argv
  if _SIDE.value:
    print(json.dumps((run_torch if _SIDE.value == "torch" else run_jax)()))
    return
  model, tokens = architecture(), _ROWS.value * _TOKENS.value
  sides.compare(
    "experiments.benchmarks.gkd",
    f"gkd_{_SHAPES.value}",
    flags=[f"--{f.name}={f.value}" for f in (_SHAPES, _ROWS, _TOKENS, _DTYPE, _REMAT, _STEPS, _REPEATS)],
    needed={
      side: flops.global_step(model, model, context=_TOKENS.value // (2 * DOCUMENTS[side])) for side in _SIDES.value
    },
    tokens=tokens,
    tolerance=1e-4 if _DTYPE.value == "float32" else 1e-2,
    details={"shapes": _SHAPES.value},
  )


if __name__ == "__main__":
  app.run(main)
