"""What a step of blockwise distillation takes on the device, and how variants are grouped to fit (paper section 3)."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax

from puzzle_jax import bld
from puzzle_jax.arch import BlockSpec, ModelConfig
from puzzle_jax.bld import BLDConfig, Job
from puzzle_jax.errors import PuzzleError

_SHARE = 0.9  # of the device's memory: the rest is for fragments and what the arithmetic does not know


def _host_bytes() -> int:
  return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_bytes() -> int:
  """What one device has for arrays; on a CPU the machine's memory that is free."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return int(stats.get("bytes_limit", _host_bytes()))


def tier_for(size: int) -> str:
  """The first tier (`windows.TIERS`) that holds so many bytes and leaves half of the memory for everything else."""
  if jax.default_backend() != "cpu" and size <= device_bytes() // 2:
    return "device"
  return "host" if size <= _host_bytes() // 2 else "disk"


@dataclasses.dataclass(frozen=True)
class Need:
  """Bytes of one step.

  Attributes:
    parent: the block's fp32 weights.
    variants: fp32 weights, gradients and optimiser states.
    batch: inputs, targets, and what the hungriest variant keeps for its backward pass.
  """

  parent: int
  variants: int
  batch: int

  @property
  def total(self) -> int:
    return self.parent + self.variants + self.batch


def need(
  spec: BlockSpec, jobs: Sequence[Job], config: ModelConfig, settings: BLDConfig, *, rows: int, tokens: int
) -> Need:
  """By arithmetic.

  Args:
    spec: the parent's block.
    jobs: trained together.
    config: of the model.
    settings: how; `layers` of them side by side.
    rows: of a batch.
    tokens: a row.
  """
  width = {"float32": 4, "bfloat16": 2}
  trained = sum(job.num_params(config) for job in jobs)
  largest = max((job.num_params(config) for job in jobs), default=0)
  moments = width[settings.momentum_dtype] + 4
  copies = trained * (4 + moments) + largest * (4 + width[settings.dtype])  # gradients die with their update
  stream = rows * tokens * config.hidden_size * 4  # an array of the residual stream
  inner = max((_inner(job.block, config) for job in jobs), default=0)
  batch = 8 * stream + rows * tokens * inner * width[settings.dtype]
  g = settings.layers
  return Need(g * 4 * spec.num_params(config), g * copies, g * batch)


def _inner(block: BlockSpec, config: ModelConfig) -> int:
  """Values a token between a block's matrices, forward and back."""
  widths = [t.shape[0] for s in block.subblocks for t in s.tensors(config).values() if len(t.shape) == 2]
  return 3 * sum(widths)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which variants are trained together, and what their steps take.

  Attributes:
    groups: one after the other on the same tokens.
    needs: of each group's step, by arithmetic.
    limit: bytes that a step may take.
  """

  groups: tuple[tuple[Job, ...], ...]
  needs: tuple[Need, ...]
  limit: int

  @classmethod
  def of(
    cls, spec: BlockSpec, jobs: Sequence[Job], config: ModelConfig, settings: BLDConfig, *, rows: int, tokens: int
  ) -> "Plan":
    """The fewest groups whose steps fit, near each other in size. For the arguments see `need`.

    Raises:
      PuzzleError: one variant alone does not fit.
    """
    limit = int(settings.memory_gib * 2**30) or int(_SHARE * device_bytes())
    by_size = sorted(jobs, key=lambda job: -job.num_params(config))
    for count in range(1, len(jobs) + 1):
      parts: list[list[Job]] = [[] for _ in range(count)]
      for job in by_size:
        min(parts, key=lambda part: sum(j.num_params(config) for j in part)).append(job)
      groups = tuple(tuple(job for job in jobs if job in part) for part in parts)
      needs = tuple(need(spec, group, config, settings, rows=rows, tokens=tokens) for group in groups)
      if max(n.total for n in needs) <= limit:
        return cls(groups, needs, limit)
    raise PuzzleError(
      f"bld: {by_size[0].name} alone needs {needs[0].total / 2**30:.2f} GiB and a step may take {limit / 2**30:.2f}; "
      f"lower bld.batch_rows={settings.batch_rows}, bld.layers={settings.layers} or data.seq_len, or raise "
      "bld.memory_gib"
    )

  def __str__(self) -> str:
    most = max(self.needs, key=lambda n: n.total)
    gib = [f"{size / 2**30:.2f}" for size in (most.total, self.limit, most.parent, most.variants, most.batch)]
    together = f"in {len(self.groups)} groups, one at a time on the device" if len(self.groups) > 1 else "together"
    return (
      f"{sum(map(len, self.groups))} variants {together}; a step takes about {gib[0]} of {gib[1]} GiB "
      f"(parent {gib[2]}, variants and optimiser {gib[3]}, batch {gib[4]})"
    )


class Step:
  """`bld.train_step` of one group of jobs, compiled once and kept for all layers of that shape.

  `compiled_bytes` is what it takes on a device, once it is compiled; None where the compiler does not say.
  """

  def __init__(self, spec: BlockSpec, jobs: tuple[Job, ...], config: ModelConfig, settings: BLDConfig):
    self.jobs = jobs
    self._static = (spec, jobs, config, settings)
    self._compiled: Any = None
    self.compiled_bytes: int | None = None

  @property
  def hlo(self) -> str:
    """The compiled program's text."""
    return self._compiled.as_text()

  def compile(self, parent: Any, trained: Any, states: Any, batch: Any, scale: Any) -> None:
    """For such arguments: arrays, or their shapes and shardings. Where it was not called, the first step does it."""
    step = functools.partial(bld.train_step, *self._static)
    shardings = jax.tree.map(lambda x: x.sharding, (trained, states, {job.name: scale[0] for job in self.jobs}))
    jitted = jax.jit(step, donate_argnums=(1, 2), out_shardings=shardings)
    self._compiled = jitted.lower(parent, trained, states, batch, scale).compile()
    if (found := self._compiled.memory_analysis()) is not None:
      kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
      self.compiled_bytes = int(kept + found.temp_size_in_bytes)

  def __call__(self, parent: Any, trained: Any, states: Any, batch: Any, scale: Any) -> Any:
    """See `bld.train_step`."""
    if self._compiled is None:
      self.compile(parent, trained, states, batch, scale)
    return self._compiled(parent, trained, states, batch, scale)
