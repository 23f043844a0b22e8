"""Accelerators as their makers describe them, for jobs that are planned without any of them."""

import dataclasses

from puzzle_jax.errors import PuzzleError

PRECISIONS = ("bfloat16", "tensorfloat32", "highest")


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device, from its data sheet; the price is an assumption.

  Attributes:
    name: in JAX's `device_kind`, by which records of measurements are found.
    tpu: the name of its topologies for compilation without a device; empty: not a TPU.
    memory_bytes: its own.
    flops_per_s: dense, by precision of the matrix products (`PRECISIONS`).
    memory_bytes_per_s: of its own memory.
    link_bytes_per_s: that it receives from the others of its host.
    network_bytes_per_s: that it receives from those of other hosts.
    per_host: devices of one host.
    dollars_per_hour: assumed; prices differ several times between providers.
  """

  name: str
  tpu: str
  memory_bytes: float
  flops_per_s: dict[str, float]
  memory_bytes_per_s: float
  link_bytes_per_s: float
  network_bytes_per_s: float
  per_host: int
  dollars_per_hour: float

  def wire_bytes_per_s(self, devices: int) -> float:
    """What one of so many devices receives."""
    return self.link_bytes_per_s if devices <= self.per_host else self.network_bytes_per_s


def _gpu(
  name: str, memory: float, bf16: float, tf32: float, fp32: float, *, memory_rate: float, link: float, price: float
) -> Chip:
  """Eight a host, on NVLink; between hosts 400 Gbit/s a device."""
  flops = dict(zip(PRECISIONS, (bf16, tf32, fp32), strict=True))
  return Chip(name, "", memory, flops, memory_rate, link, 50e9, 8, price)


def _tpu(
  name: str, topology: str, memory: float, bf16: float, *, memory_rate: float, link: float, per_host: int, price: float
) -> Chip:
  """Products of more precision take three or six passes in bf16; hosts of a slice are on the same network as chips."""
  flops = dict(zip(PRECISIONS, (bf16, bf16 / 3, bf16 / 6), strict=True))
  return Chip(name, topology, memory, flops, memory_rate, link, link, per_host, price)


CHIPS = {
  "a100": _gpu("A100", 80e9, 312e12, 156e12, 19.5e12, memory_rate=2.04e12, link=300e9, price=2.0),
  "h100": _gpu("H100", 80e9, 989.4e12, 494.7e12, 66.9e12, memory_rate=3.35e12, link=450e9, price=3.0),
  "h200": _gpu("H200", 141e9, 989.4e12, 494.7e12, 66.9e12, memory_rate=4.8e12, link=450e9, price=3.8),
  "v5e": _tpu("TPU v5 lite", "v5e", 16 * 2**30, 197e12, memory_rate=0.82e12, link=180e9, per_host=4, price=1.2),
  "v5p": _tpu("TPU v5", "v5", 95 * 2**30, 459e12, memory_rate=2.77e12, link=540e9, per_host=4, price=4.2),
  "v6e": _tpu("TPU v6 lite", "v6e", 32 * 2**30, 918e12, memory_rate=1.64e12, link=360e9, per_host=4, price=2.7),
}


def by_name(name: str) -> Chip:
  """Raises PuzzleError where the chip is not known (names those that are)."""
  if name not in CHIPS:
    raise PuzzleError(f"--chip={name} is not known; known: {', '.join(CHIPS)}")
  return CHIPS[name]
