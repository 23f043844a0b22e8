"""A job of the full size on so many devices, on paper: time and bytes of each stage, and the split that ends first.

The parent's weights are not needed, nor any device. Bytes and FLOPs are those of `needs`, seconds follow from them at
the rates of `rates`. Each stage takes the split of the devices that ends it first among those that fit; a run goes on
with another mesh in the same directory, for no stage is made anew for it.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator

from puzzle_jax import rates
from puzzle_jax.errors import PuzzleError
from puzzle_jax.mesh import MeshConfig
from puzzle_jax.needs import STATE_COPIES, gkd_bytes, needs, rolling_bytes
from puzzle_jax.planned import Job, Stage, divisors

_FP32 = 4
_WINDOWS = tuple(2**i for i in range(9))


@dataclasses.dataclass(frozen=True)
class Window:
  """One row of what windows cost: tokens of each, their number, bytes of activations and of states, seconds in all."""

  tokens: int
  windows: int
  activation_bytes: float
  state_bytes: float
  seconds: float


def _first_done(candidates: Iterable[Stage]) -> Stage:
  """The stage that ends first among those that fit, on the fewest devices; if none fits, the smallest."""
  found = list(candidates)
  fitting = [s for s in found if s.fits]
  if not fitting:
    return min(found, key=lambda s: (s.memory_bytes, s.mesh.devices))
  return min(fitting, key=lambda s: (s.seconds or 0.0, s.mesh.devices, s.disk_bytes, s.memory_bytes))


def window_of(job: Job, windows: int) -> int:
  """Tokens of each of so many windows, in whole batches."""
  batch = job.config.bld.batch_rows * job.config.data.seq_len
  return math.ceil(job.config.data.train_tokens / batch / windows) * batch


def _state_bytes(job: Job, windows: int) -> float:
  """Of all layers' variants, for they wait on the disk from one window to the next."""
  variants = sum(s.num_params(job.parent.config) for layer in job.space.layers for s in layer.variants)
  return STATE_COPIES * _FP32 * variants * (windows > 1)


def library(job: Job, mesh: MeshConfig, *, windows: int, tier: str) -> Stage:
  """Blockwise distillation with `mesh.layer` layers side by side and batches cut over `mesh.data`.

  Args:
    job: the run.
    mesh: its devices.
    windows: that the training tokens are cut into.
    tier: where activations lie, "host" or "disk".
  """
  config, model, settings = job.config, job.parent.config, job.config.bld
  rate = rates.of_library(job.chip, job.measured, dtype=settings.dtype)
  groups = job.groups[mesh.data]
  tokens, layers = settings.batch_rows * config.data.seq_len, job.parent.num_layers
  forward = job.layer.parent.flops_per_token(model, context=config.data.seq_len // 2)
  trained = _FP32 * sum(s.num_params(model) for s in job.layer.variants)
  stored = rolling_bytes(config, job.parent, window_tokens=tokens, layers=0)  # a batch of what one layer reads
  on_disk = tier == "disk"

  computed = tokens / mesh.data * (job.step_flops_per_token + (groups.count - 1) * forward) / rate.flops_per_s
  updated = 8 * trained / job.chip.memory_bytes_per_s  # weights, gradients and AdamW's moments, read and written
  summed = 2 * trained * (mesh.data - 1) / mesh.data / job.chip.wire_bytes_per_s(mesh.devices)  # gradients over data
  read = on_disk * groups.count * mesh.layer * stored / job.storage_bytes_per_s
  step = max(max(computed, updated) + summed, read)
  train = math.ceil(layers / mesh.layer) * settings.steps * step

  passes = config.data.train_tokens * layers
  advance = max(  # layers side by side one after the other, for devices along `layer` do the same
    passes * forward / mesh.data / rate.flops_per_s,
    on_disk * 2 * passes / tokens * stored / job.storage_bytes_per_s,
  )
  rest = job.needs["library"].flops - passes * forward - settings.steps * tokens * layers * job.step_flops_per_token
  fit = max(rest, 0.0) / mesh.data / rate.flops_per_s
  states = _state_bytes(job, windows)
  swaps = 2 * (windows - 1) * states / job.storage_bytes_per_s
  activations = rolling_bytes(config, job.parent, window_tokens=window_of(job, windows), layers=mesh.layer)
  parts = {"training": train, "the parent's forward pass": advance, "states between windows": swaps}
  note = ", ".join(f"{name} {seconds / 3600:.1f} h" for name, seconds in parts.items() if seconds)
  return Stage(
    "library",
    mesh,
    job.needs["library"].flops,
    train + advance + fit + swaps,
    rate,
    groups.memory_bytes,
    trained * layers + states + activations * on_disk,
    groups.fits,
    note,
    windows,
    groups.count,
    tier,
  )


def _holds(job: Job, mesh: MeshConfig, windows: int) -> bool:
  """Whether the hosts' memory does: each has the rows of its devices."""
  size = rolling_bytes(job.config, job.parent, window_tokens=window_of(job, windows), layers=mesh.layer)
  hosts = min(mesh.data, math.ceil(mesh.devices / job.chip.per_host))
  return size / hosts <= job.host_bytes / 2


def best_library(job: Job) -> Stage:
  """Over meshes, numbers of windows and tiers.

  Raises:
    PuzzleError: nothing is small enough for the disk.
  """
  found = []
  for data in divisors(job.config.bld.batch_rows):
    for layer in range(1, min(job.parent.num_layers, job.devices // data) + 1):
      mesh = MeshConfig(data=data, layer=layer)
      for windows in _WINDOWS:
        tiers = ["disk", "host"] if _holds(job, mesh, windows) else ["disk"]
        found += [library(job, mesh, windows=windows, tier=tier) for tier in tiers]
  within = [s for s in found if s.disk_bytes <= job.disk_bytes]
  if not within:
    least = min(found, key=lambda s: s.disk_bytes)
    raise PuzzleError(
      f"the library takes {least.disk_bytes / 2**40:.2f} TiB of disk at least (in {least.windows} windows) and "
      f"{job.disk_bytes / 2**40:.2f} are allowed; raise --disk_tib or make the space smaller"
    )
  return _first_done(within)


def windows_table(job: Job, mesh: MeshConfig) -> list[Window]:
  """What windows of fewer tokens save and cost on the disk, on the library's mesh."""
  rows = []
  for windows in _WINDOWS[::2]:
    tokens = window_of(job, windows)
    activations = rolling_bytes(job.config, job.parent, window_tokens=tokens, layers=mesh.layer)
    seconds = library(job, mesh, windows=windows, tier="disk").seconds
    assert seconds is not None
    rows.append(Window(tokens, windows, activations, _state_bytes(job, windows), seconds))
  return rows


def gkd(job: Job, mesh: MeshConfig) -> Stage:
  """Global distillation, weights and states cut over all devices, rows over data, the inside of blocks over model.

  As `abstract.gkd_step` compiles it.
  """
  settings, need = job.config.gkd, job.needs["gkd"]
  rate = rates.of_products(job.chip, job.measured, "bfloat16" if settings.dtype == "bfloat16" else "highest")
  n, model = mesh.devices, mesh.model
  params = _FP32 * job.parent.num_params()
  wire = job.chip.wire_bytes_per_s(n)
  gathered = 4 * params / model * (mesh.data - 1) / mesh.data  # parent; child, again, and its gradients summed
  stream = settings.batch_rows / mesh.data * job.config.data.seq_len * job.parent.config.hidden_size * 2
  # Twice a block: parent, child, child again, and its backward pass; a sum sends everything twice.
  summed = 4 * 2 * job.parent.num_layers * 2 * stream * (model - 1) / model
  moved = gathered / wire + summed / job.chip.wire_bytes_per_s(model)
  seconds = settings.steps * max(need.flops / max(settings.steps, 1) / n / rate.flops_per_s, moved)
  bytes_ = gkd_bytes(job.config, job.parent, mesh)
  return Stage("gkd", mesh, need.flops, seconds, rate, bytes_, need.disk_bytes, bytes_ <= job.limit)


def best_gkd(job: Job) -> Stage:
  """Over meshes; where none fits, the note says how many devices would do."""
  best = _first_done(gkd(job, mesh) for mesh in _gkd_meshes(job))
  if best.fits:
    return best
  for devices in (2**i for i in range(job.devices.bit_length(), 14)):
    if _first_done(gkd(job, mesh) for mesh in _gkd_meshes(dataclasses.replace(job, devices=devices))).fits:
      return dataclasses.replace(best, note=f"fits on {devices} devices")
  return dataclasses.replace(best, note="fits on no number of devices: lower gkd.batch_rows or data.seq_len")


def _gkd_meshes(job: Job) -> Iterator[MeshConfig]:
  for data in divisors(job.config.gkd.batch_rows):
    for model in divisors(job.chip.per_host):
      if data * model <= job.devices and job.parent.config.num_heads % model == 0:
        yield MeshConfig(data=data, model=model)


def _plain(job: Job, name: str, mesh: MeshConfig, precision: str, note: str = "") -> Stage:
  """A stage whose seconds are those of its products."""
  config = dataclasses.replace(job.config, mesh=mesh)
  need = needs(config, job.parent, job.space)[name]
  rate = rates.of_products(job.chip, job.measured, precision) if need.flops else None
  seconds = need.flops / mesh.devices / rate.flops_per_s if rate else None
  return Stage(
    name, mesh, need.flops, seconds, rate, need.memory_bytes, need.disk_bytes, need.memory_bytes <= job.limit, note
  )


def _largest(n: int, at_most: int) -> int:
  return max(i for i in divisors(n) if i <= at_most)


def _forward(job: Job, name: str, rows: int, precision: str) -> Stage:
  """A stage that runs models forward, their weights cut over as few devices as they fit on, rows over the rest."""
  found = []
  for model in divisors(job.parent.config.num_heads):
    if model > job.devices:
      break
    mesh = MeshConfig(data=_largest(rows, job.devices // model), model=model)
    note = f"weights cut over {model} devices" if model > 1 else "every device holds the whole models in fp32"
    stage = _plain(job, name, mesh, precision, note)
    tokens = stage.flops / job.parent.flops_per_token(context=job.config.data.seq_len // 2) / mesh.data
    # Twice a block the stream is summed over `model`, and a sum sends everything twice.
    sent = 2 * 2 * _FP32 * tokens * job.parent.num_layers * job.parent.config.hidden_size * (model - 1) / model
    seconds = (stage.seconds or 0.0) + sent / job.chip.wire_bytes_per_s(model)
    found.append(dataclasses.replace(stage, seconds=seconds))
    if stage.fits:
      return found[-1]
  return _first_done(found)


def stages(job: Job) -> list[Stage]:
  """Every stage that the config asks for, each on its best split, in order."""
  config, one = job.config, MeshConfig()
  heldout_rows = config.data.heldout_tokens // config.data.seq_len
  result = {
    "data": _plain(job, "data", one, "highest", "tokenising on the host: not reckoned"),
    "costs": _plain(job, "costs", one, "highest", "products alone; decoding waits for memory"),
    "activations": _plain(
      job, "activations", MeshConfig(data=_largest(config.activations.batch_rows, job.devices)), "highest"
    ),
    "library": best_library(job),
    "scores": _forward(job, "scores", heldout_rows, config.scores.precision),
    "search": _plain(job, "search", one, config.scores.precision, "seconds on the host's CPU"),
    "coupled": _plain(job, "coupled", one, "highest", "how many pairs is known after the search"),
    "child": _plain(job, "child", one, "highest", "reads and writes files"),
    "gkd": best_gkd(job),
    "evaluation": _forward(job, "evaluation", config.evaluation.batch_rows, "highest"),
    "export": _plain(job, "export", one, "highest", "reads and writes files"),
  }
  if not config.coupled.wanted:
    del result["coupled"]
  if not config.gkd.steps:
    del result["gkd"]
  return list(result.values())
