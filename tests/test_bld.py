"""Blockwise distillation: what it stores, what its losses are, and that its variants are independent jobs."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from puzzle_jax import activations, arch, bld, distil, memory, mesh, surgery
from puzzle_jax.bld import BLDConfig
from puzzle_jax.build_library import order
from puzzle_jax.data import PackedText
from puzzle_jax.distil import Distillation, Distilled
from puzzle_jax.errors import PuzzleError
from puzzle_jax.library import Library
from puzzle_jax.mesh import MeshConfig
from puzzle_jax.model import decoder, subblocks
from puzzle_jax.space import LayerSpace
from puzzle_jax.store import StageStore

SPACE = LayerSpace(
  (arch.GQA(2), arch.GQA(1), arch.LinearAttention(), arch.NoAttention()),
  (arch.SwiGLU(32), arch.SwiGLU(8), arch.LinearFFN(), arch.NoFFN()),
)
ONE_DEVICE = mesh.build(MeshConfig())
QUICK = BLDConfig(least_squares=False, steps=0)
TRAINING = BLDConfig(attention_target="block", steps=40, learning_rate=3e-3, warmup_steps=4)


@dataclasses.dataclass(frozen=True)
class Layer:
  """A parent's layer and what it reads: [64, 24, 32] for training, the same again held out."""

  config: arch.ModelConfig
  weights: dict[str, dict[str, np.ndarray]]
  packed: PackedText
  x: dict[str, np.ndarray]

  def batches(self, x: np.ndarray, *, rows: int = 16) -> list[activations.Batch]:
    return list(activations.batches(self.config, self.packed, [x], ONE_DEVICE, batch_rows=rows))

  def distil(
    self,
    settings: BLDConfig,
    *,
    space: LayerSpace = SPACE,
    jobs: tuple[bld.Job, ...] | None = None,
    groups: int = 1,
    layers: int = 1,
    rows: int = 16,
    x: dict[str, np.ndarray] | None = None,
  ) -> list[Distilled]:
    """Of some layers, all alike but for the first one's input, which is half of the others'."""
    x = x or self.x
    inputs = {name: [x[name] * (0.5 if layers > 1 and g == 0 else 1.0) for g in range(layers)] for name in x}
    jobs = bld.decoupled(space) if jobs is None else jobs
    first = []
    for g in range(layers):
      one = {name: [b.layer(0) for b in self.batches(inputs[name][g], rows=rows)] for name in x}
      variants = distil.first_weights(
        space,
        self.config,
        self.weights,
        settings=settings,
        statistics={"attention": np.ones(32), "ffn": np.arange(32.0)},
        train=lambda one=one: one["train"],
        heldout=lambda one=one: one["heldout"],
      )
      first.append({job.name: {s.slot: variants[s.id] for s in job.subblocks} for job in jobs})
    heldout = list(activations.batches(self.config, self.packed, inputs["heldout"], ONE_DEVICE, batch_rows=rows))
    train = list(activations.batches(self.config, self.packed, inputs["train"], ONE_DEVICE, batch_rows=16))
    distillation = Distillation(
      space.parent,
      self.config,
      [self.weights] * layers,
      ONE_DEVICE,
      jobs=jobs,
      settings=settings,
      heldout=lambda: heldout,
      first=first,
    )
    chosen = [train[i] for i in order(4, steps=settings.steps, seed=(0, 3))]
    for g in range(groups):
      group = distillation.trainable[g::groups]
      distillation.train(group, iter(chosen), memory.Step(space.parent, group, self.config, settings))
    return distillation.finish()


@pytest.fixture(scope="module")
def layer(model, packed) -> Layer:
  architecture, params = model("gqa2/w32", qkv_bias=True)
  rng = np.random.default_rng(0)
  mean = rng.standard_normal(32)
  x = {name: np.float32(rng.standard_normal((64, 24, 32)) + mean) for name in ("train", "heldout")}
  rows = PackedText(*(np.tile(array, (8, 1)) for array in packed))
  return Layer(architecture.config, jax.device_get(params["layers"][0]), rows, x)


@pytest.fixture(scope="module")
def trained(layer) -> Distilled:
  return layer.distil(TRAINING)[0]


@pytest.fixture(scope="module")
def untrained(layer) -> Distilled:
  return layer.distil(QUICK, rows=64)[0]


def test_bf16_training_ends_where_fp32_does(layer, trained):
  """Master weights and losses are fp32, so that small steps are not lost."""
  (rough,) = layer.distil(dataclasses.replace(TRAINING, dtype="bfloat16"))
  for name, losses in trained.losses.items():
    assert all(w.dtype == np.float32 for w in rough.weights[name].values())
    assert rough.losses[name]["delta_init"] == losses["delta_init"]
    assert rough.losses[name]["delta_trained"] == pytest.approx(losses["delta_trained"], rel=0.02)
  curves = [(rough.curve[name][-1], curve[-1]) for name, curve in trained.curve.items()]
  assert any(a != b for a, b in curves)


# What it stores


def test_activations_are_what_the_parent_computes(model, packed, quiet, tmp_path):
  architecture, params = model("gqa2/w48", "gqa2/w48", "none/linear")
  parent: Any = SimpleNamespace(
    architecture=architecture,
    head=lambda: {k: np.asarray(v) for k, v in params.items() if k != "layers"},
    layer=lambda i: params["layers"][i],
  )
  store = StageStore(tmp_path)
  store.begin({})
  activations.write(store, parent, {"heldout": packed}, ONE_DEVICE, batch_rows=4, progress=quiet)
  out = jax.jit(decoder.apply, static_argnums=0)(
    architecture, params, packed.tokens, positions_BT=packed.positions, segments_BT=packed.segment_ids
  ).layers_L
  for i, expected in enumerate([params["embed"][packed.tokens], *out]):
    np.testing.assert_allclose(activations.read(store, "heldout", i), expected, rtol=1e-5, atol=1e-5)

  content, seen = store.content(), []
  parent.layer = lambda i: seen.append(i) or params["layers"][i]
  store.remove(activations.layer_file("heldout", 2))
  activations.write(store, parent, {"heldout": packed}, ONE_DEVICE, batch_rows=4, progress=quiet)
  assert (store.content(), seen) == (content, [1])  # goes on where something is missing


def test_library_keeps_weights_losses_and_curves(trained, tmp_path):
  store = StageStore(tmp_path / "library")
  with pytest.raises(PuzzleError, match="holds no block library; run the stage `library` first"):
    Library.open(store.root)
  store.begin({})
  Library(store).put(3, trained)
  library = Library.open(store.root)
  assert library.layers == [3]
  assert 3 in library
  assert 2 not in library
  np.testing.assert_equal(library.load_layer(3), trained.weights)
  np.testing.assert_equal(library.load(3, "ffn.w8"), trained.weights["ffn.w8"])
  assert library.losses(3) == trained.losses
  assert library.curves(3)["ffn.w8"] == trained.curve["ffn.w8"]
  assert library.usable(3) == {s.id for s in SPACE.variants}
  assert library.timing == trained.timing
  assert 0 <= trained.timing["waited_s"] < trained.timing["trained_s"]
  content = store.content()
  library.store.put_json("layer_03.json", store.get_json("layer_03.json") | {"timing": {}})
  assert library.store.content() == content
  assert library.timing == {"trained_s": 0, "waited_s": 0}
  with pytest.raises(PuzzleError, match=r"layer 3 has no variant 'ffn.w9'; it has attention.gqa1, .*ffn.w8"):
    library.load(3, "ffn.w9")


# Jobs


def test_variants_in_groups_and_layers_side_by_side_are_trained_alike(layer, trained):
  """Jobs are independent: what is trained beside them changes nothing but rounding."""
  grouped = layer.distil(TRAINING, groups=2)[0]
  beside = layer.distil(TRAINING, layers=2)[1]
  for other in (grouped, beside):
    assert other.losses.keys() == trained.losses.keys()
    for name, losses in trained.losses.items():
      assert other.losses[name] == pytest.approx(losses, rel=1e-4, abs=1e-9)
    for name, curve in trained.curve.items():
      np.testing.assert_allclose(other.curve[name], curve, rtol=1e-4)
  assert layer.distil(TRAINING, layers=2)[0].losses["ffn.w8"] != beside.losses["ffn.w8"]


def test_a_coupled_pair_does_better_than_its_parts_together(layer, trained):
  jobs = bld.coupled(SPACE, tuple(map(arch.BlockSpec.parse, ("gqa1/w8", "gqa2/w8", "gqa1/w9"))))
  assert [job.name for job in jobs] == [
    "gqa1/w8"
  ]  # the others keep a subblock of the parent's, or are not in the space
  (pair,) = layer.distil(TRAINING, jobs=jobs)
  assert set(pair.weights) == {"attention.gqa1@gqa1/w8", "ffn.w8@gqa1/w8"}
  apart = Distillation(
    SPACE.parent,
    layer.config,
    [layer.weights],
    ONE_DEVICE,
    jobs=jobs,
    settings=QUICK,
    heldout=lambda: layer.batches(layer.x["heldout"]),
    first=[{"gqa1/w8": {s: trained.weights[f"{s}.{n}"] for s, n in (("attention", "gqa1"), ("ffn", "w8"))}}],
  )
  (decoupled,) = apart.finish()
  assert pair.losses["gqa1/w8"]["delta_trained"] < 0.98 * decoupled.losses["gqa1/w8"]["delta_init"]


def test_attention_alone_as_the_target_needs_no_ffn(layer, trained, matmul_flops):
  settings = dataclasses.replace(TRAINING, attention_target="attention")
  (alone,) = layer.distil(settings)
  for name, losses in alone.losses.items():
    if name.startswith("ffn"):
      assert losses == pytest.approx(trained.losses[name], rel=1e-4)
  gqa = alone.losses["attention.gqa1"]
  assert trained.losses["attention.gqa1"]["delta_trained"] < gqa["delta_trained"] < 0.9 * gqa["delta_init"]


def test_goes_on_in_a_second_window_as_if_it_were_one(layer, trained):
  jobs = bld.decoupled(SPACE)
  weights = {job.name: {s.slot: layer.distil(QUICK)[0].weights[s.id] for s in job.subblocks} for job in jobs}
  heldout = layer.batches(layer.x["heldout"])
  train = layer.batches(layer.x["train"])
  arguments: Any = {"jobs": jobs, "settings": dataclasses.replace(TRAINING, steps=8), "heldout": lambda: heldout}

  def begin(**kwargs: Any) -> Distillation:
    return Distillation(SPACE.parent, layer.config, [layer.weights], ONE_DEVICE, **arguments, **kwargs)

  def run(distillation: Distillation, batches: list[activations.Batch], *, ahead: bool = False) -> None:
    group = distillation.trainable
    step = memory.Step(SPACE.parent, group, layer.config, arguments["settings"])
    if ahead:
      distillation.compile(step, batches[0])
      assert step.compiled_bytes
      step.compile = None  # type: ignore[assignment, method-assign]  # not again
    distillation.train(group, iter(batches), step)

  whole, first = begin(first=[weights]), begin(first=[weights])
  run(whole, train * 2)
  run(first, train, ahead=True)
  second = begin(state=first.state())
  run(second, train)
  assert second.trained_s > first.trained_s  # of both windows
  (expected,), (found,) = whole.finish(), second.finish()
  np.testing.assert_equal(found.weights, expected.weights)
  assert (found.losses, found.curve) == (expected.losses, expected.curve)


def test_stopped_within_a_window_it_goes_on_as_if_it_were_not(layer, trained):
  """In two groups of eight steps each; held-out losses after every third, and an end where two bring nothing."""
  jobs = bld.decoupled(SPACE)
  weights = {job.name: {s.slot: trained.weights[s.id] for s in job.subblocks} for job in jobs}
  heldout, train = layer.batches(layer.x["heldout"]), layer.batches(layer.x["train"]) * 2
  settings = dataclasses.replace(TRAINING, steps=8, eval_steps=3, patience=2)
  arguments: Any = {"jobs": jobs, "settings": settings, "heldout": lambda: heldout}
  calls = 0

  def begin(**kwargs: Any) -> Distillation:
    return Distillation(SPACE.parent, layer.config, [layer.weights], ONE_DEVICE, **arguments, **kwargs)

  def run(distillation: Distillation, *, stop_at: int = 99) -> None:
    nonlocal calls
    calls = 0

    def stop() -> bool:
      return calls >= stop_at

    def counted(step: memory.Step, *args: Any) -> Any:
      nonlocal calls
      calls += 1
      return step(*args)

    for step in steps:
      todo = iter(train[distillation.steps_done(step.jobs) :])
      distillation.train(step.jobs, todo, functools.partial(counted, step), stop=stop)  # type: ignore[arg-type]
      if stop():
        break

  whole = begin(first=[weights])
  steps = [memory.Step(SPACE.parent, whole.trainable[g::2], layer.config, settings) for g in range(2)]
  run(whole)
  (expected,), total = whole.finish(), calls
  for stopped_after in (0, 2, 8, 11, total):
    first = begin(first=[weights])
    run(first, stop_at=stopped_after)
    assert calls == stopped_after
    second = begin(state=first.state(), within=True)
    run(second)
    assert calls == total - stopped_after
    (found,) = second.finish()
    np.testing.assert_equal(found.weights, expected.weights)
    assert (found.losses, found.curve) == (expected.losses, expected.curve)


def test_each_variant_keeps_its_best_weights_and_a_layer_without_gains_ends(layer):
  """At a rate that first helps and then ruins."""
  space = LayerSpace(SPACE.attention[:1], SPACE.ffn[:2])
  settings = dataclasses.replace(
    QUICK, steps=40, learning_rate=1.0, warmup_steps=20, eval_steps=1, patience=6, clip_norm=1e9
  )
  (found,) = layer.distil(settings, space=space)
  losses, steps = found.losses["ffn.w8"], len(found.curve["ffn.w8"])
  assert losses["delta_trained"] < losses["delta_init"]
  assert 6 < steps < 40


def test_learning_rates_by_variant(layer, trained):
  """A rate of nearly nothing leaves one variant where it began, and the others as they were."""
  (found,) = layer.distil(dataclasses.replace(TRAINING, learning_rates=("ffn.w*=1e-12", "ffn.*=1")))
  assert found.losses["ffn.w8"]["delta_trained"] == pytest.approx(found.losses["ffn.w8"]["delta_init"], rel=1e-6)
  assert found.losses["attention.gqa1"] == pytest.approx(trained.losses["attention.gqa1"], rel=1e-4)


# Losses


@pytest.mark.parametrize("kind", ["paper", "delta"])
def test_losses_are_the_definitions(layer, untrained, kind):
  """Of whole blocks, written out: errors of the outputs over what the definition divides by."""
  context = activations.to_context(layer.config, layer.packed, slice(None))
  x, real = layer.x["heldout"], layer.packed.segment_ids > 0
  apply = jax.jit(decoder.block_apply, static_argnums=(0, 1))

  def block(attention: arch.Subblock, ffn: arch.Subblock, changed: str = "") -> np.ndarray:
    weights = {s.slot: untrained.weights[s.id] if s.id == changed else layer.weights[s.slot] for s in (attention, ffn)}
    spec = arch.BlockSpec(attention, ffn)
    return np.asarray(apply(spec, layer.config, weights, x, context=context)[0])[real].astype(float)

  parent = block(*SPACE.parent.subblocks)
  squares = np.mean((parent - x[real]) ** 2, axis=-1)
  cap = 10 * np.median(squares)
  for spec in SPACE.variants:
    pair = (spec, SPACE.ffn[0]) if spec.slot == "attention" else (SPACE.attention[0], spec)
    error = np.mean((block(*pair, spec.id) - parent) ** 2, axis=-1)
    if kind == "paper":
      expected = error.mean() / np.mean(parent**2)
    else:
      expected = np.mean(error * np.minimum(1, cap / squares)) / np.mean(np.minimum(squares, cap))
    assert untrained.losses[spec.id][f"{kind}_init"] == pytest.approx(expected, rel=1e-4)


def test_a_variant_equal_to_the_parent_has_loss_0(layer):
  same = LayerSpace((arch.GQA(2), arch.GQA(2)), (arch.SwiGLU(32), arch.SwiGLU(32)))
  for losses in layer.distil(QUICK, space=same)[0].losses.values():
    assert max(losses.values()) < 1e-12


def test_a_pruned_channel_is_a_masked_one(layer):
  """The variant of eight channels computes what the parent computes with the other 24 silenced."""
  kept = surgery.initial(
    arch.SwiGLU(8),
    arch.SwiGLU(32),
    layer.weights["ffn"],
    config=layer.config,
    channel_mean=np.arange(32.0),
    method="truncate",
    seed=0,
  )
  down = layer.weights["ffn"]["down"] * (np.arange(32) < 8)
  context = activations.to_context(layer.config, layer.packed, slice(None))
  x = layer.x["train"]
  pruned, _ = subblocks.apply(arch.SwiGLU(8), layer.config, kept, x, context=context)
  masked, _ = subblocks.apply(arch.SwiGLU(32), layer.config, layer.weights["ffn"] | {"down": down}, x, context=context)
  np.testing.assert_allclose(pruned, masked, rtol=1e-5, atol=1e-6)


# Training


def test_training_lowers_the_loss(trained):
  for name in ("attention.gqa1", "ffn.w8"):
    losses, curve = trained.losses[name], trained.curve[name]
    assert losses["delta_trained"] < 0.8 * losses["delta_init"]
    assert len(curve) == 40
    assert np.mean(curve[-4:]) < 0.8 * np.mean(curve[:4])
  linear = trained.losses["ffn.linear"]  # least squares has left nothing to train
  assert linear["delta_trained"] == pytest.approx(linear["delta_init"], rel=0.01)
  assert trained.weights["ffn.none"] == {}


def test_training_never_ends_worse_than_it_began(layer):
  """A learning rate that ruins the variant: the first weights are kept."""
  space = LayerSpace(SPACE.attention[:1], SPACE.ffn[:2])
  (ruined,) = layer.distil(dataclasses.replace(QUICK, steps=3, learning_rate=10.0), space=space)
  assert ruined.losses["ffn.w8"]["delta_trained"] > 10 * ruined.losses["ffn.w8"]["delta_init"]
  np.testing.assert_equal(ruined.weights, layer.distil(QUICK, space=space)[0].weights)


def test_least_squares_beats_the_products_and_no_ffn(layer, untrained):
  """Of FFN variants, whose fit is to the loss itself; attention variants still have the parent's FFN behind them."""
  (fitted,) = layer.distil(dataclasses.replace(QUICK, least_squares=True), rows=64)
  loss = {name: losses["delta_init"] for name, losses in fitted.losses.items()}
  before = {name: losses["delta_init"] for name, losses in untrained.losses.items()}
  assert loss["ffn.w8"] < 0.95 * before["ffn.w8"]
  assert loss["ffn.linear"] < 0.95 * before["ffn.none"] < before["ffn.linear"]
  assert loss["ffn.none"] == before["ffn.none"]


def test_a_poisoned_variant_spoils_no_other(layer, trained, monkeypatch, tmp_path):
  initial = surgery.initial

  def poison(spec: arch.Subblock, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
    weights = initial(spec, *args, **kwargs)
    return weights | {"gate": np.full_like(weights["gate"], np.nan)} if spec.id == "ffn.w8" else weights

  monkeypatch.setattr(surgery, "initial", poison)
  (poisoned,) = layer.distil(TRAINING)
  assert np.isnan(poisoned.losses["ffn.w8"]["delta_trained"])
  for name in {s.id for s in SPACE.variants} - {"ffn.w8"}:
    np.testing.assert_equal(poisoned.weights[name], trained.weights[name])
    assert poisoned.losses[name] == trained.losses[name]

  store = StageStore(tmp_path)
  store.begin({})
  Library(store).put(3, poisoned)
  library = Library.open(tmp_path)
  assert library.usable(3) == {s.id for s in SPACE.variants} - {"ffn.w8"}
  assert library.losses(3)["ffn.w8"]["delta_init"] is None
  assert library.curves(3)["ffn.w8"] == [None] * 40


def test_padding_tokens_do_not_matter(layer, trained):
  noise = 100 * np.random.default_rng(9).standard_normal((64, 24, 32), np.float32)
  padding = (layer.packed.segment_ids == 0)[..., None]
  (other,) = layer.distil(TRAINING, x={name: np.where(padding, noise, x) for name, x in layer.x.items()})
  np.testing.assert_equal(other.weights, trained.weights)
  assert other.losses == trained.losses


@pytest.mark.parametrize(
  "change, message",
  [
    ({"loss": "mse"}, "bld.loss='mse' is not one of delta, paper"),
    ({"dtype": "int8"}, "bld.dtype='int8' is not one of float32, bfloat16"),
    ({"init": "best"}, "bld.init='best' is not one of paper, truncate, random"),
    ({"steps": -1}, "bld.steps=-1 must be at least 0"),
    ({"batch_rows": 0}, "bld.batch_rows=0 must be at least 1"),
    ({"learning_rate": 0.0}, "bld.learning_rate=0.0 must be above 0"),
    ({"learning_rates": ("ffn.linear",)}, r"bld.learning_rates: 'ffn.linear' is not of the form PATTERN=RATE"),
    ({"patience": 2}, "bld.patience=2 needs bld.eval_steps of at least 1"),
  ],
)
def test_refuses(change, message):
  with pytest.raises(PuzzleError, match=message):
    BLDConfig(**change)
