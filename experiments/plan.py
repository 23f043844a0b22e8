"""What a job of the full size needs, on paper: python -m experiments.plan --config=FILE.py --devices=N --chip=NAME

    python -m experiments.plan --config=configs/llama31_70b_h100.py --devices=64 --chip=h100

Prints memory, disk, FLOPs, time and cost of each stage, the split of the devices that ends it first, and what windows
of training tokens save. No device is needed, nor the parent's weights. The largest steps are compiled on shapes alone
(for TPUs by their own compiler, if the extra `tpu` is installed); --nocompile answers in seconds. What a run on the
machine at hand would do, `experiments.run --dry_run` says.
"""

import dataclasses
import json
from pathlib import Path

import jax
from absl import flags

from puzzle_jax import chips, forecast, space
from puzzle_jax.parents.known import architecture_of
from puzzle_jax.planned import Job

from . import launch  # relative: in the wheel, `experiments` lies in `puzzle_jax` (setup.py)

_CONFIG = launch.define_config()
flags.adopt_module_key_flags(launch)
_DEVICES = flags.DEFINE_integer("devices", 8, "That there are.", lower_bound=1)
_CHIP = flags.DEFINE_enum("chip", "h100", list(chips.CHIPS), "What they are.")
_DISK = flags.DEFINE_float("disk_tib", 30.0, "That the library may take of the work directory at once.")
_HOST = flags.DEFINE_float("host_gib", 1024.0, "Memory of one host.")
_STORAGE = flags.DEFINE_float("storage_gb_s", 10.0, "Rate of the work directory, GB/s for all hosts together.")
_PRICE = flags.DEFINE_float("price", 0.0, "Dollars a device and hour; 0: an assumed one.")
_COMPILE = flags.DEFINE_bool("compile", True, "Compile the largest steps, to hold their memory against the arithmetic.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(argv: list[str]) -> None:
  del argv
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", _DEVICES.value)  # virtual ones, to compile for
  config = launch.run_config(_CONFIG)
  parent = architecture_of(config.parent)
  job = Job(
    config,
    parent,
    space.build(parent, **dataclasses.asdict(config.space)),
    chips.CHIPS[_CHIP.value],
    devices=_DEVICES.value,
    host_bytes=_HOST.value * 2**30,
    storage_bytes_per_s=_STORAGE.value * 1e9,
    disk_bytes=_DISK.value * 2**40,
    records=Path(__file__).parent / "results",
  )
  found = forecast.make(job, dollars_per_hour=_PRICE.value, compiled=_COMPILE.value)
  print(json.dumps(found.to_json(), indent=1) if _JSON.value else found)


if __name__ == "__main__":
  launch.run(main)
