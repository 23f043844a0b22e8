"""Shows what a run's directory holds, and frees space: python -m experiments.clean --workdir=runs/quickstart [--remove]

Removed are the stored activations and the weights of the block library: by far the most, and of no use to the report,
the export or the child. The stages stay done. A later start that needs them again (another target's child, for example)
makes them anew; one that does not, leaves them away.
"""

from pathlib import Path

from absl import flags

import puzzle_jax
from puzzle_jax import cleaning

from . import launch  # relative: in the wheel, `experiments` lies in `puzzle_jax` (setup.py)

_WORKDIR = flags.DEFINE_string("workdir", None, "A finished run.", required=True)
_REMOVE = flags.DEFINE_bool("remove", False, "Remove what is named, instead of only naming it.")


def _on_disk(folder: Path) -> int:
  return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def main(argv: list[str]) -> None:
  del argv
  run = puzzle_jax.open_run(_WORKDIR.value)
  print(f"{'':<14} {'MiB':>10} {'of which can go':>18}")
  folders = sorted((p for p in run.workdir.root.iterdir() if p.is_dir()), key=_on_disk, reverse=True)
  for folder in folders:
    store = run.store(folder.name)
    can_go = sum((folder / name).stat().st_size for name in cleaning.removable(store) if (folder / name).is_file())
    print(f"{folder.name:<14} {_on_disk(folder) / 2**20:>10,.1f} {can_go / 2**20:>18,.1f}".rstrip())
  if _REMOVE.value:
    print(f"removed {cleaning.clean(run) / 2**20:,.1f} MiB")


if __name__ == "__main__":
  launch.run(main)
