"""Several processes as one run, through `jax.distributed`: the same command on every host.

Stages that use the mesh are made by all processes together, in lockstep. What is single is process 0's: `by_first` lets
it do some work while the others wait, and gives all of them what came of it, error or result. `anyone` and `everyone`
turn what one process sees (a signal, a clock, its own files) into what all act on. With one process they cost nothing.
`leave` ends all of them, wherever the others wait.

Imports JAX when there are several processes only: the work directory (`store`) is used without it, too.
"""

import atexit
import contextlib
import functools
import itertools
import json
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from puzzle_jax.errors import PuzzleError

_T = TypeVar("_T")
_POLL_MS = 1_000  # between looks for signals while another process works
_BARRIER_MS = 24 * 3_600 * 1_000  # a process that is gone is noticed by its heartbeat
_LEFT = "puzzle_jax/left"
_LEAVE_MS = 10_000  # for the others to be ready to end


class _State:
  """Of this process."""

  client: Any = None  # of the coordination service; None: a single process
  index = 0
  count = 1
  alone = False  # in the work of `by_first`
  leaving = threading.Lock()
  numbers = itertools.count()  # of what processes do together: the same in all of them


def start(*, coordinator: str = "", processes: int = 0, process: int | None = None, heartbeat_s: int = 100) -> None:
  """Joins the other processes of the run, if there are any; before anything touches a device.

  Without arguments they are found as JAX finds them where a scheduler started them: several tasks of a Slurm step, or
  an indexed Job or JobSet of Kubernetes (which needs `pip install kubernetes`).

  Args:
    coordinator: address and port of process 0, as in `10.0.0.1:1234`.
    processes: how many there are.
    process: this one's number, from 0.
    heartbeat_s: after so many seconds of silence a process counts as dead, and the others end.

  Raises:
    PuzzleError: some of the first three are missing, or the others are not reached.
  """
  given = (bool(coordinator), processes > 0, process is not None)
  if any(given) and not all(given):
    raise PuzzleError("--coordinator, --processes and --process belong together; give all three, or none")
  if _State.client is not None or not (all(given) or scheduled()):
    return
  if all(given) and not 0 <= (process or 0) < processes:
    raise PuzzleError(f"--process={process} must be from 0 to {processes - 1}, of --processes={processes}")
  import jax
  from jax._src import distributed as jax_distributed  # the client has no public name

  jax.config.update("jax_enable_preemption_service", False)  # `preemption` listens to SIGTERM
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
      coordinator or None,
      processes or None,
      process,
      heartbeat_timeout_seconds=heartbeat_s,
      shutdown_timeout_seconds=60,
    )
  except (RuntimeError, ValueError, KeyError) as e:
    raise PuzzleError(
      f"the processes of the run do not find each other ({e}); give each --coordinator=HOST:PORT, --processes=N and "
      "--process=0 to N-1"
    ) from e
  state = jax_distributed.global_state
  _State.index, _State.count = state.process_id, state.num_processes
  if _State.count > 1:
    _State.client = state.client
    over = threading.Event()
    watching = threading.Thread(target=_watch, args=(over,), daemon=True)
    watching.start()
    atexit.register(watching.join)  # none may ask when the interpreter ends
    atexit.register(over.set)  # comes before


def scheduled() -> bool:
  """Whether a scheduler started this process as one of several."""
  slurm_step = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1  # srun's; a batch script alone is one process
  return slurm_step or ("KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ)


def count() -> int:
  """How many processes work together at the moment: 1 within `by_first`."""
  return 1 if _State.alone else _State.count


def is_first() -> bool:
  """Whether this is process 0, which writes what is single."""
  return _State.index == 0


def _meet() -> str:
  """Waits for all processes; returns a name for what they do next."""
  name = f"puzzle_jax/{next(_State.numbers)}"
  _State.client.wait_at_barrier(name, _BARRIER_MS)
  return name


def anyone(flag: bool) -> bool:
  """Whether any process says so; all have to ask."""
  if count() == 1:
    return flag
  name = f"puzzle_jax/said/{next(_State.numbers)}"
  if flag:
    _State.client.key_value_set(f"{name}/{_State.index}", "")
  _State.client.wait_at_barrier(name, _BARRIER_MS)
  return bool(_State.client.key_value_dir_get(f"{name}/"))


def everyone(flag: bool) -> bool:
  """Whether all processes say so; all have to ask."""
  return not anyone(not flag)


def by_first(work: Callable[[], _T]) -> _T:
  """What comes of some work of process 0, in all processes; the others wait, and raise what it raises.

  Within the work, process 0 is alone: devices of other processes, and this function's waiting, are out of its way.
  The result has to be picklable.
  """
  if count() == 1:
    return work()
  name = _meet()  # nobody reads any more what the work may change
  if not is_first():
    return _outcome(name)
  _State.alone = True
  try:
    result = work()
  except BaseException as e:
    _tell(name, (None, e))
    raise
  finally:
    _State.alone = False
  _tell(name, (result, None))
  return result


def _tell(name: str, outcome: tuple[Any, BaseException | None]) -> None:
  try:
    data = pickle.dumps(outcome)
    pickle.loads(data)  # some errors are written and cannot be read
  except Exception:
    data = pickle.dumps((None, PuzzleError(f"process 0: {outcome[1] or outcome[0]!r}")))
  _State.client.key_value_set_bytes(name, data)


def _outcome(name: str) -> Any:
  while True:
    try:
      data = _State.client.blocking_key_value_get_bytes(name, _POLL_MS)
      break
    except Exception as e:
      if "DEADLINE_EXCEEDED" not in str(e):
        raise
  result, error = pickle.loads(data)
  if error is not None:
    raise error
  return result


def leave(status: int, message: str) -> NoReturn:
  """Ends all processes with a status and a message, wherever they are: what is not on the disk is given up.

  Without it, one that waits for another on a device or for its word, out of reach of signals to Python, would end by
  its heartbeat, as if killed.
  """
  with _State.leaving:  # for good
    with contextlib.suppress(Exception):  # the others may be gone, and then there is nobody to wait for
      _State.client.key_value_set(f"{_LEFT}/{_State.index}", json.dumps([status, message]))
      _State.client.wait_at_barrier(_LEFT, _LEAVE_MS)
      if is_first():  # whose end ends those that are still there
        time.sleep(1)
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _watch(over: threading.Event) -> None:
  """Leaves when another process does."""
  while not over.wait(_POLL_MS / 1_000):
    try:
      left = _State.client.key_value_dir_get(f"{_LEFT}/")
    except Exception:  # the run is over
      return
    if left:
      leave(*json.loads(left[0][1]))


def written_by_first(method: Callable[..., None]) -> Callable[..., None]:
  """For methods of an object that mirrors a file: process 0's call counts, then the others `reload()`."""

  @functools.wraps(method)
  def together(self: Any, *args: Any, **kwargs: Any) -> None:
    by_first(lambda: method(self, *args, **kwargs))
    if not is_first():
      self.reload()

  return together
