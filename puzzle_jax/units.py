"""Bytes and seconds as people read them."""


def size(value: float) -> str:
  """`1.2 GiB`; `-` for less than a tenth of a MiB."""
  for unit, bytes_ in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
    if value >= bytes_ or (unit == "MiB" and value > bytes_ / 10):
      return f"{value / bytes_:.1f} {unit}"
  return "-"


def duration(seconds: float | None) -> str:
  """`2 h 05 min`, `3 min`, `12 s`; `-` for None."""
  if seconds is None:
    return "-"
  if seconds < 100:
    return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
  minutes = round(seconds / 60)
  return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
