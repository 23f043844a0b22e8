"""How the commands that take a config start: what is wrong with their arguments is said in one line.

from experiments import launch

CONFIG = launch.define_config()
if __name__ == "__main__":
  launch.run(main)
"""

import difflib
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from absl import app, flags, logging
from ml_collections import config_flags

from puzzle_jax import distributed, preemption
from puzzle_jax.config import RunConfig, check_key
from puzzle_jax.errors import PuzzleError

_ROOT = Path(__file__).parent.parent  # `configs` lies beside `experiments`, in a checkout and where it is installed


_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, for several processes as one run.")
_PROCESSES = flags.DEFINE_integer("processes", 0, "How many there are; 0: one, or as Slurm or Kubernetes started them.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
_HEARTBEAT_S = flags.DEFINE_integer("heartbeat_s", 100, "Seconds of silence after which a process counts as dead.")


class ConfigFlag(Protocol):
  """The value of `--config`."""

  @property
  def value(self) -> Any: ...


def define_config() -> ConfigFlag:
  """The flag `--config=FILE.py:VARIANT`, with `--config.section.field=value` for each field."""
  flag = config_flags.DEFINE_config_file("config", None, "The experiment, such as configs/smollm2_135m.py:quickstart.")
  flags.mark_flag_as_required("config")
  return flag


def run_config(flag: ConfigFlag) -> RunConfig:
  """The config that the command line gives, checked."""
  return RunConfig.from_dict(flag.value.to_dict())


def run(main: Callable[[list[str]], int | None]) -> None:
  """Runs a command; errors of the user end it with one line."""

  def careful(argv: list[str]) -> int | None:
    logging.set_verbosity(logging.ERROR)  # libraries' chatter would tear the progress bars
    preemption.listen()
    try:
      distributed.start(
        coordinator=_COORDINATOR.value,
        processes=_PROCESSES.value,
        process=_PROCESS.value,
        heartbeat_s=_HEARTBEAT_S.value,
      )
      if len(argv) > 1:
        raise PuzzleError(f"unexpected arguments {' '.join(argv[1:])}; options start with --")
      return main(argv)
    except PuzzleError as e:
      sys.exit(f"error: {e}")
    except KeyboardInterrupt:
      sys.exit("\nstopped; the same command goes on from here")
    except preemption.PreemptedError:
      message = "\nstopped by SIGTERM; the same command goes on from here"
      if distributed.count() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        distributed.leave(preemption.EXIT_CODE, message)
      print(message, file=sys.stderr)
      sys.exit(preemption.EXIT_CODE)

  app.run(careful, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  try:
    for arg in argv:
      if match := re.match(r"--config\.([\w.]+)", arg):
        check_key(match[1])
    return flags.FLAGS([_with_config_path(arg) for arg in argv])
  except flags.Error as e:
    sys.exit(f"error: {_explained(e)}")
  except PuzzleError as e:
    sys.exit(f"error: {e}")


def _with_config_path(arg: str) -> str:
  """`--config=configs/x.py` names a file from here, or one of those that come along."""
  if not arg.startswith("--config="):
    return arg
  name, colon, variant = arg.removeprefix("--config=").partition(":")
  for root in (Path(), _ROOT):
    if (root / name).is_file():
      return f"--config={root / name}{colon}{variant}"
  known = sorted(f"configs/{p.name}" for p in (_ROOT / "configs").glob("*.py") if "get_config" in p.read_text())
  near = difflib.get_close_matches(name, known, n=1)
  hint = f"did you mean {near[0]}? " if near else ""
  raise PuzzleError(f"--config={name} is no file; {hint}those that come along: {', '.join(known)}")


def _explained(error: flags.Error) -> str:
  """What went wrong at first: absl and ml_collections wrap a config's own error in others, traceback and all."""
  cause: BaseException | None = error
  while cause is not None:
    if isinstance(cause, PuzzleError) and "Traceback" not in str(cause):
      return str(cause)
    if isinstance(cause, TypeError) and str(cause).startswith("get_config() takes 0 positional arguments"):
      return "this config has no variants; leave out the colon and what follows it"
    cause = cause.__context__
  return f"{error}; --help lists the flags" if "\n" not in str(error) else str(error)
