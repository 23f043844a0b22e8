"""The table of docs/ablations.md, from the record of `experiments.ablations`."""

from typing import Any

import numpy as np

from configs.ablations import AGAINST, BASE
from experiments import paired

HEADER = ("arm", "held against", "children", "speed")


def rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Header and rows: of each text the KL, what it is more than that of what the arm is held against, and perplexity.

  A difference whose interval leaves 0 out is bold.
  """
  texts, arms = record["texts"], record["arms"]
  header = list(HEADER)
  for text in texts:
    header += [f"KL, {text}", "difference (95 %)", "perplexity"]
  noise = {text: _seed_noise(record, text) for text in texts}
  found = []
  for name, arm in arms.items():
    children = _made(arm)
    if not children:
      (error, *_) = (child["error"] for child in arm["children"].values())
      found.append([f"`{name}`", "", "0", error.replace("|", "/"), *[""] * (3 * len(texts))])
      continue
    against = AGAINST.get(name, BASE)
    compared = name != BASE and _made(arms.get(against, {"children": {}}))
    speed = np.mean([child["speedup"] for child in children])
    row = [f"`{name}`", f"`{against}`" if compared else "", str(len(children)), f"{speed:.2f}×"]
    for text, parent in texts.items():
      tokens = np.array(parent["tokens"])
      kl, nll = (_sums(arm, text, key) for key in ("kl", "nll"))
      row.append(f"{kl.sum(axis=1).mean() / tokens.sum():.4f}")
      if compared:
        other = _sums(arms[against], text, "kl")
        row.append(_written(paired.difference(kl, other, tokens, noise=noise[text])))
      else:
        row.append("")
      row.append(f"{np.exp(nll.sum(axis=1).mean() / tokens.sum()):.2f}")
    found.append(row)
  return header, found


def _written(difference: paired.Difference) -> str:
  mean = f"{difference.mean:+.4f}"
  if np.isinf(difference.high):
    return f"{mean} (one seed each)"
  return f"{f'**{mean}**' if difference.is_real else mean} ({difference.low:+.4f} to {difference.high:+.4f})"


def _made(arm: dict[str, Any]) -> list[dict[str, Any]]:
  """Its children, without what came to nothing."""
  return [child for child in arm["children"].values() if "error" not in child]


def _sums(arm: dict[str, Any], text: str, key: str) -> np.ndarray:
  """By child and block of rows."""
  return np.array([child["texts"][text][key] for child in _made(arm)])


def _seed_noise(record: dict[str, Any], text: str) -> paired.SeedNoise:
  """Of the KL; random children differ by more than the order of rows, and are left out."""
  several = [arm for name, arm in record["arms"].items() if len(_made(arm)) > 1 and name != "search_random"]
  return paired.seed_noise([_sums(arm, text, "kl") for arm in several], np.array(record["texts"][text]["tokens"]))
