"""The model card of an export: README.md with YAML front matter, the run's figures and the parent's licence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from puzzle_jax.arch import Architecture
from puzzle_jax.parents.huggingface import is_hub_id
from puzzle_jax.serving import engines
from puzzle_jax.store import StageStore, read_json


def measured(workdir: Path, *, before_gkd: bool = False, times: bool = True) -> str:
  """What a run has measured of its child, as Markdown; empty where that, as it is now, has not been evaluated.

  Args:
    workdir: the run's.
    before_gkd: of the child as it was put together, before global distillation (which was not timed).
    times: False leaves out what another run of the same would measure otherwise.
  """
  store = StageStore(workdir / "evaluation")
  stage = "child" if before_gkd else "gkd"
  if not store.done or store.key["inputs"][stage] != StageStore(workdir / stage).content():
    return ""
  evaluation, costs = store.get_json("evaluation.json"), read_json(workdir / "config.json")["costs"]
  quality = evaluation["before_gkd" if before_gkd else "after_gkd"]
  rows = [
    ["perplexity", f"{quality['parent_perplexity']:.2f}", f"{quality['perplexity']:.2f}"],
    ["KL to the parent (nats a token)", "0", f"{quality['kl']:.4f} ± {quality['kl_stderr']:.4f}"],
  ]
  text = f"on {quality['tokens']:,.0f} tokens of held-out text, fp32"
  seconds = evaluation["timing"]["seconds"]
  if seconds and times and not before_gkd:
    for name, tokens in (("prefill", costs["input_tokens"]), ("decode", costs["output_tokens"])):
      speed = [f"{tokens / seconds[model][f'{name}_s']:,.1f}" for model in ("parent", "child")]
      rows.append([f"{name} (tokens/s of each request)", *speed])
    text += f"; times in JAX where it was made, {costs['input_tokens']} tokens in and {costs['output_tokens']} out"
  table = "\n".join(f"| {' | '.join(row)} |" for row in (["", "parent", "child"], ["---"] * 3, *rows))
  return f"Measured {text}, before export:\n\n{table}"


def model_card(
  architecture: Architecture, metadata: Mapping[str, Any], *, exported: Architecture, dtype: str, figures: str
) -> str:
  """README.md.

  Args:
    architecture: the child's.
    metadata: of the child; they name its parent and the parent's licence.
    exported: the architecture as exported, padding included.
    dtype: of the exported weights.
    figures: what was measured, Markdown.
  """
  parent, license = metadata.get("parent"), metadata.get("license")
  front = huggingface_hub.ModelCardData(
    library_name="transformers",
    pipeline_tag="text-generation",
    license=license,
    base_model=parent if parent and is_hub_id(parent) else None,
    tags=["puzzle", "nemotron-nas"],
  )
  blocks = [b.name for b in exported.blocks]
  readers = [e for e in engines.ENGINES.values() if e.format == "hf" and dtype in e.dtypes]
  able = [e.title for e in readers if not engines.rejections(e, blocks)]
  rows = "\n".join(f"| {i} | {b.attention.name} | {b.ffn.name} |" for i, b in enumerate(architecture.blocks))
  return f"""---
{front.to_yaml()}
---

# A Puzzle child{f" of {parent}" if parent else ""}

A language model of {architecture.num_params():,} parameters whose layers differ, derived from its parent by
distillation-based architecture search (Puzzle, arXiv 2411.19146). The weights are stored in {dtype}.
{f"The parent's licence, {license}, applies." if license else "The parent states no licence."}

{f"{figures}{chr(10)}{chr(10)}" if figures else ""}```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
```

Engines that run these blocks from such weights, by their sources: {", ".join(able)}.

`gqaN`: attention with N key/value heads; `wN`: a SwiGLU FFN of width N; `linear`: one matrix; `none`: nothing.

| layer | attention | FFN |
|---|---|---|
{rows}
"""
