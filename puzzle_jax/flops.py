"""The matrix-product FLOPs that distillation needs, whoever computes it (paper sections 3 and 6). No JAX.

Of blockwise local distillation is counted what the method cannot do without: the forward pass of every trained variant,
the gradients of its weights, and gradients of activations where a trained weight lies before them. The gradient of a
layer's input is not needed, since the input is data: a trained FFN costs 14·D·F a token, not 18. Norms, softmax and the
optimiser are not counted.
"""

from puzzle_jax.arch import Architecture, ModelConfig, Subblock
from puzzle_jax.space import LayerSpace


def trained(subblock: Subblock, config: ModelConfig, *, context: int = 0) -> int:
  """FLOPs a token of a training step of one subblock: forward, weights' gradients, and its inner activations'.

  Args:
    subblock: what is trained.
    config: of the model.
    context: tokens that a token attends to, on average.
  """
  forward = subblock.flops_per_token(config)
  inner = 0
  matrices = {name: t.shape for name, t in subblock.tensors(config).items() if len(t.shape) == 2}
  if len(matrices) > 1 and subblock.output is not None:  # what the last matrix multiplies depends on trained weights
    rows, columns = matrices[subblock.output]
    inner = 2 * rows * columns
  attention = subblock.flops_per_token(config, context=context) - forward
  return 2 * forward + inner + 3 * attention  # attention's backward pass is twice its forward


def decoupled_step(space: LayerSpace, config: ModelConfig, *, context: int = 0, attention_target: str = "block") -> int:
  """FLOPs a token of one step that trains all variants of a layer against the parent's block, decoupled.

  The parent's attention and FFN run once; behind each attention variant that is held against the parent's whole "block"
  the frozen FFN runs forward and back to its input (`bld.BLDConfig.attention_target`).
  """
  attention, ffn = space.parent.subblocks
  total = attention.flops_per_token(config, context=context) + ffn.flops_per_token(config)
  for variant in space.variants:
    if not variant.tensors(config):
      continue
    total += trained(variant, config, context=context)
    if variant.slot == "attention" and attention_target == "block":
      total += 2 * ffn.flops_per_token(config)
  return total


def global_step(child: Architecture, parent: Architecture, *, context: int = 0) -> int:
  """FLOPs a token of one step of global distillation: the child forward and back, the parent forward.

  Recomputation is not counted.
  """

  def forward(model: Architecture) -> int:
    head = 2 * model.config.vocab_size * model.config.hidden_size
    return head + sum(block.flops_per_token(model.config, context=context) for block in model.blocks)

  return 3 * forward(child) + forward(parent)
