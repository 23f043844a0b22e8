"""SIGTERM, by which schedulers take a machine back (Slurm, Kubernetes, spot instances): stop, and lose nothing.

Where what is finished lies on disk already, the signal ends the run at once. Where steps of a training would be lost,
it waits until they are saved:

    with deferred() as asked:
      for step in steps:
        ...
        if asked():
          save()
          break
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from puzzle_jax import distributed

EXIT_CODE = 128 + signal.SIGTERM


class PreemptedError(BaseException):
  """The process was asked to end and nothing is lost; not an Exception, so that no library takes it for a failure."""


_asked = _deferring = False


def _handle(number: int, frame: FrameType | None) -> None:
  global _asked
  del number, frame
  _asked = True
  if not _deferring:
    raise PreemptedError


def listen() -> None:
  """From now on SIGTERM raises PreemptedError in the main thread."""
  global _asked
  _asked = False
  signal.signal(signal.SIGTERM, _handle)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
  """Holds SIGTERM back; yields whether it has come, to any process. At the end of the body it is raised."""
  global _deferring
  _deferring = True
  try:
    yield lambda: distributed.anyone(_asked)
    asked = distributed.anyone(_asked)
  finally:
    _deferring = False
  if asked or _asked:  # the latter since the others were asked
    raise PreemptedError
