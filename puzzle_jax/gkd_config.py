"""How global distillation is done (paper section 6): the fields of `gkd` in a config."""

import dataclasses

import optax

from puzzle_jax.errors import PuzzleError, check_seed
from puzzle_jax.windows import ATTENTION

PARENTS = ("sharded", "whole")
TEACHERS = ("online", "cached")
STARTS = ("child", "random")


@dataclasses.dataclass(frozen=True)
class GKDConfig:
  """How the child is trained.

  Attributes:
    steps: optimiser steps; 0 leaves the child as it is assembled.
    batch_rows: packed rows a step.
    learning_rate: peak of warm-up and cosine.
    warmup_steps: of the learning rate.
    weight_decay: AdamW's.
    clip_norm: of the whole gradient.
    cosine_weight, kl_weight, lm_weight: the mix of losses.
    kl_temperature, kl_top_k: of the KL in the loss (`divergence.kl_and_nll`); 1 and 0: the KL itself.
    ema: decay of the moving average of the weights (less in the first steps), which then is the child; 0: none.
    eval_steps: steps between measurements of the KL on held-out rows, after which the best child is kept; 0: none, and
      the last one is.
    checkpoint_steps: steps between checkpoints.
    dtype: of the matrix products; weights and losses are fp32.
    divergence: the multiple of the best loss at which the training is stopped (`gkd_guard.Watch`); 0: never.
    teacher: "online", or "cached": the parent's `kl_top_k` likeliest tokens are written to the work directory before
      the first step and read from there. The cosine needs the parent's hidden states, which are not.
    start: "child", or "random" weights in its architecture, to see what the block library is worth.
    attention: "exact" keeps the documents of a row apart, by a mask; "fast" does not, and reads none; in both models.
    parent: "sharded" over the mesh as the child is, or "whole" on every device: faster where it fits.
    remat: recompute the whole inside of each block in the backward pass, not only what is cheap: less memory for a
      third more work.
    seed: of the order of rows.
  """

  steps: int = 100
  batch_rows: int = 2
  learning_rate: float = 2e-4
  warmup_steps: int = 10
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  cosine_weight: float = 1.0
  kl_weight: float = 1.0
  lm_weight: float = 0.0
  kl_temperature: float = 1.0
  kl_top_k: int = 0
  ema: float = 0.0
  eval_steps: int = 0
  checkpoint_steps: int = 50
  dtype: str = "float32"
  divergence: float = 3.0
  teacher: str = "online"
  start: str = "child"
  attention: str = "exact"
  parent: str = dataclasses.field(default="sharded", metadata={"result": False})
  remat: bool = True
  seed: int = 0

  def __post_init__(self) -> None:
    for name, known in (
      ("dtype", ("float32", "bfloat16")),
      ("attention", ATTENTION),
      ("parent", PARENTS),
      ("teacher", TEACHERS),
      ("start", STARTS),
    ):
      if getattr(self, name) not in known:
        raise PuzzleError(f"gkd.{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
    if self.steps < 0 or self.batch_rows < 1 or self.learning_rate <= 0 or self.checkpoint_steps < 1:
      raise PuzzleError(f"gkd: steps >= 0, batch_rows, checkpoint_steps >= 1, learning_rate > 0 needed; got {self}")
    if self.clip_norm <= 0 or self.warmup_steps < 0:
      raise PuzzleError(
        f"gkd: clip_norm > 0 and warmup_steps >= 0 needed; got clip_norm={self.clip_norm} (a large one clips nothing), "
        f"warmup_steps={self.warmup_steps}"
      )
    check_seed("gkd.seed", self.seed)
    if not 0 <= self.ema < 1 or self.eval_steps < 0:
      raise PuzzleError(
        f"gkd: 0 <= ema < 1 and eval_steps >= 0 needed; got ema={self.ema}, eval_steps={self.eval_steps}"
      )
    if min(self.cosine_weight, self.kl_weight, self.lm_weight) < 0 or not (
      self.cosine_weight + self.kl_weight + self.lm_weight
    ):
      raise PuzzleError("gkd: the loss weights must not be negative, and one of them must be above 0")
    if self.kl_temperature <= 0 or self.kl_top_k < 0:
      raise PuzzleError(
        f"gkd: kl_temperature > 0 and kl_top_k >= 0 needed; got kl_temperature={self.kl_temperature}, "
        f"kl_top_k={self.kl_top_k}"
      )
    if self.divergence and self.divergence <= 1:
      raise PuzzleError(f"gkd.divergence={self.divergence} must be above 1 (times the best loss), or 0: never")
    if self.teacher == "cached" and (self.cosine_weight or not self.kl_top_k):
      raise PuzzleError(
        "gkd.teacher='cached' keeps the parent's likeliest tokens and no hidden states: set gkd.cosine_weight=0 (it is "
        f"{self.cosine_weight}) and gkd.kl_top_k, such as 64 (it is {self.kl_top_k})"
      )

  def optimizer(self) -> optax.GradientTransformation:
    warmup = min(self.warmup_steps, self.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, max(self.steps, 1))
    return optax.chain(
      optax.clip_by_global_norm(self.clip_norm), optax.adamw(schedule, b2=0.95, weight_decay=self.weight_decay)
    )
