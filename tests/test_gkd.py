"""Global distillation: its losses written out, what its gradient may reach, and the same child after a kill."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from puzzle_jax import answers, data, gkd, gkd_guard, preemption
from puzzle_jax.arch import Architecture
from puzzle_jax.errors import PuzzleError
from puzzle_jax.gkd import GKDConfig
from puzzle_jax.model import decoder
from puzzle_jax.progress import Progress
from puzzle_jax.store import CorruptFileError, StageStore

CONFIG = GKDConfig(steps=6, batch_rows=4, learning_rate=3e-3, warmup_steps=1, checkpoint_steps=2)

Model = tuple[Architecture, Any]
losses = jax.jit(
  lambda child, parent, batch, a, b, config=CONFIG: gkd.losses((a, child), (b, parent), batch, config),
  static_argnums=(3, 4, 5),
)


@pytest.fixture(scope="module")
def parent(model) -> Model:
  return model("gqa2/w48", "gqa2/w48", "gqa2/w48")


@pytest.fixture(scope="module")
def child(model, parent) -> Model:
  """Of the parent's own blocks but for the middle one."""
  architecture, other = model("gqa2/w48", "none/linear", "gqa2/w48", seed=1)
  layers = [parent[1]["layers"][0], other["layers"][1], parent[1]["layers"][2]]
  return architecture, parent[1] | {"layers": layers}


def run(model: Model, packed: data.PackedText) -> tuple[np.ndarray, np.ndarray]:
  """Log-probabilities and the output of each block, as float64."""
  architecture, params = model
  apply = jax.jit(decoder.apply, static_argnums=0)
  out = apply(architecture, params, packed.tokens, positions_BT=packed.positions, segments_BT=packed.segment_ids)
  logits = np.asarray(decoder.logits(params, out.hidden_BTD), np.float64)
  return scipy.special.log_softmax(logits, axis=-1), np.asarray(out.layers_L, np.float64)


def test_losses_are_the_definitions(child, parent, packed):
  log_q, hidden_q = run(child, packed)
  log_p, hidden_p = run(parent, packed)
  kl, lm, cosine = [], [], []
  for row, column in np.ndindex(*packed.tokens.shape):
    here, *after = packed.segment_ids[row, column : column + 2]
    if here and after == [here]:
      kl.append(np.sum(np.exp(log_p[row, column]) * (log_p[row, column] - log_q[row, column])))
      lm.append(-log_q[row, column, packed.tokens[row, column + 1]])
    if here:
      pairs = zip(hidden_q[:, row, column], hidden_p[:, row, column], strict=True)
      cosine.append(sum(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs))
  found = losses(child[1], parent[1], packed, child[0], parent[0])
  assert len(kl) < len(cosine) < packed.tokens.size
  assert min(np.mean(kl), np.mean(cosine)) > 0.1
  assert found["kl"] == pytest.approx(np.mean(kl), rel=1e-5)
  assert found["lm"] == pytest.approx(np.mean(lm), rel=1e-5)
  assert found["cosine"] == pytest.approx(np.mean(cosine), rel=1e-5)


def test_bf16_changes_the_losses_little(child, parent, packed):
  exact = losses(child[1], parent[1], packed, child[0], parent[0])
  rough = losses(child[1], parent[1], packed, child[0], parent[0], gkd.GKDConfig(dtype="bfloat16"))
  for name, value in exact.items():
    assert rough[name].dtype == jnp.float32
    assert rough[name] == pytest.approx(float(value), rel=0.02)
    assert rough[name] != value


def test_fast_attention_is_that_of_rows_of_one_document(child, parent, packed):
  tokens = packed.tokens
  whole = packed._replace(
    segment_ids=np.ones_like(tokens),
    positions=np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
  )
  fast = gkd.GKDConfig(attention="fast")
  found = [losses(child[1], parent[1], whole, child[0], parent[0], config) for config in (CONFIG, fast)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)
  assert losses(child[1], parent[1], packed, child[0], parent[0], fast)["kl"] != pytest.approx(float(found[0]["kl"]))


def test_a_gpu_runs_layer_by_layer_to_the_same_losses(child, parent, packed, monkeypatch):
  of_child, of_parent = (decoder.stacked(architecture, params) for architecture, params in (child, parent))

  def run() -> tuple[dict[str, jax.Array], int]:
    found = jax.jit(lambda q, p: gkd.losses((child[0], q), (parent[0], p), packed, CONFIG))
    program = found.lower(of_child, of_parent).as_text()
    return found(of_child, of_parent), program.count("stablehlo.while")

  on_cpu, loops = run()
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  on_gpu, fewer = run()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), on_cpu, on_gpu)
  assert fewer == loops - 4  # runs of one shape: three of the child's, one of the parent's


def test_an_identical_child_has_loss_0(parent, packed):
  """Stacked, so that another program computes it: to fp32's rounding of 1 − cos, three layers of it."""
  found = losses(jax.jit(decoder.stacked, static_argnums=0)(*parent), parent[1], packed, parent[0], parent[0])
  assert abs(float(found["kl"])) < 1e-6
  assert abs(float(found["cosine"])) < 1e-6
  assert found["lm"] > 1


def test_the_gradient_does_not_reach_the_parent(child, parent, packed):
  def total(params: Any) -> jax.Array:
    return sum(losses(params["child"], params["parent"], packed, child[0], parent[0]).values())

  gradient = jax.device_get(jax.jit(jax.grad(total))({"child": child[1], "parent": parent[1]}))
  assert all(np.any(g != 0) for g in jax.tree.leaves(gradient["child"]))
  assert all(np.all(g == 0) for g in jax.tree.leaves(gradient["parent"]))


def die() -> None:
  raise KeyboardInterrupt


@dataclasses.dataclass
class Training:
  """Trains a child in a folder; after `die_after` steps it dies, or what `by` does happens."""

  child: Model
  parent: Model
  packed: data.PackedText
  steps: int = 0

  def run(
    self,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    die_after: int = 99,
    by: Callable[[], None] = die,
    config: GKDConfig = CONFIG,
    quiet: bool = True,
    log: Callable[..., None] = lambda step, metrics: None,
  ) -> Any:
    step, self.steps = gkd.train_step, 0

    def counted(*args: Any, **kwargs: Any) -> gkd.State:
      if self.steps == die_after:
        by()
      self.steps += 1
      return step(*args, **kwargs)

    with monkeypatch.context() as patch:
      patch.setattr(gkd, "train_step", counted)
      return gkd.train(
        self.child,
        self.parent,
        self.packed,
        config=config,
        heldout=self.packed.rows(slice(3)),
        folder=folder,
        progress=Progress(quiet=quiet),
        log=log,
      )


@pytest.fixture(scope="module")
def training(child, parent, packed) -> Training:
  return Training(child, parent, packed)


@pytest.fixture(scope="module")
def undisturbed(training, tmp_path_factory) -> Any:
  with pytest.MonkeyPatch.context() as monkeypatch:
    return training.run(tmp_path_factory.mktemp("undisturbed"), monkeypatch)


def test_training_lowers_the_loss(child, parent, packed, undisturbed):
  params, history = undisturbed
  assert [sorted(row) for row in history] == [sorted(gkd.METRICS)] * 6
  for row in history:
    assert row["loss"] == pytest.approx(row["cosine"] + row["kl"], rel=1e-6)
  before = losses(child[1], parent[1], packed, child[0], parent[0])
  after = losses(params, parent[1], packed, child[0], parent[0])
  for name in ("kl", "cosine"):
    assert after[name] < 0.9 * before[name]
  assert np.all(np.isfinite(child[1]["embed"]))  # donated copies: the caller's parameters are still there


@pytest.mark.parametrize("die_after, redone", [(1, 6), (3, 4), (5, 2)])
def test_a_killed_training_goes_on_to_the_same_child(training, undisturbed, monkeypatch, tmp_path, die_after, redone):
  with pytest.raises(KeyboardInterrupt):
    training.run(tmp_path / "gkd", monkeypatch, die_after=die_after)
  params, history = training.run(tmp_path / "gkd", monkeypatch)
  assert training.steps == redone  # from the last checkpoint, not from the start
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((params, undisturbed[0])))
  assert history == undisturbed[1]
  gkd.forget(tmp_path / "gkd")
  assert not (tmp_path / "gkd").exists()


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_preempted_it_loses_no_step(training, undisturbed, monkeypatch, tmp_path, listening, steps):
  with pytest.raises(preemption.PreemptedError):
    training.run(tmp_path / "gkd", monkeypatch, die_after=steps, by=lambda: os.kill(os.getpid(), signal.SIGTERM))
  assert training.steps == steps + 1  # the one at work is finished
  listening()
  params, history = training.run(tmp_path / "gkd", monkeypatch)
  assert training.steps == 6 - steps - 1
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((params, undisturbed[0])))
  assert history == undisturbed[1]


def test_killed_between_a_checkpoint_and_its_note_it_loses_no_step(training, undisturbed, monkeypatch, tmp_path):
  with monkeypatch.context() as killed:
    killed.setattr(gkd, "note_checksums", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      training.run(tmp_path / "gkd", monkeypatch)
  assert [path.name for path in (tmp_path / "gkd").glob("[0-9]*")] == ["2"]
  params, history = training.run(tmp_path / "gkd", monkeypatch)
  assert training.steps == 4
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((params, undisturbed[0])))
  assert history == undisturbed[1]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "no checksums"])
def test_a_damaged_checkpoint_is_not_used(training, undisturbed, monkeypatch, tmp_path, capsys, damage):
  with pytest.raises(KeyboardInterrupt):
    training.run(tmp_path / "gkd", monkeypatch, die_after=5)
  checksums, *_ = tmp_path.glob("gkd.json")
  file = max((tmp_path / "gkd" / "4").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  {
    "flip": lambda: file.write_bytes(data),
    "cut": lambda: file.write_bytes(data[:-1]),
    "remove": file.unlink,
    "no checksums": lambda: checksums.write_text("{"),
  }[damage]()
  params, _ = training.run(tmp_path / "gkd", monkeypatch, quiet=False)
  assert training.steps == 6
  assert "the checkpoint" in capsys.readouterr().err
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((params, undisturbed[0])))


BEST = dataclasses.replace(CONFIG, eval_steps=2, ema=0.6)


def test_the_best_child_is_kept_and_a_kill_changes_nothing(training, child, parent, monkeypatch, tmp_path):
  """The fourth step and those behind it go uphill; the average is measured, and is what comes out."""
  uphill = optax.sgd(lambda step: jnp.where(step < 3, 0.05, -0.5))
  monkeypatch.setattr(GKDConfig, "optimizer", lambda self: uphill)
  params, history = training.run(tmp_path / "whole", monkeypatch, config=BEST)
  measured = {i: row["heldout_kl"] for i, row in enumerate(history, 1) if "heldout_kl" in row}
  assert [*measured] == [2, 4, 6]
  best = min(measured, key=lambda step: measured[step])
  assert best != 6  # else the last one would do
  heldout = training.packed.rows(slice(3))
  assert losses(params, parent[1], heldout, child[0], parent[0])["kl"] == pytest.approx(measured[best], rel=1e-4)
  with pytest.raises(KeyboardInterrupt):
    training.run(tmp_path / "killed", monkeypatch, die_after=5, config=BEST)
  again = training.run(tmp_path / "killed", monkeypatch, config=BEST)
  assert training.steps == 2
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((again[0], params)))
  assert again[1] == history


def test_the_average_is_that_of_the_steps(child, parent, packed):
  config = dataclasses.replace(CONFIG, ema=0.15)
  stacked, state = decoder.stacked(*parent), gkd.State.first(decoder.stacked(*child), config)
  expected = jax.device_get(state.params)
  for decay in (0.1, 0.15, 0.15):  # (1 + 0) / (10 + 0) at first
    state = gkd.train_step(state, packed.rows(slice(4)), stacked, child=child[0], parent=parent[0], config=config)
    new = jax.device_get(state.params)
    expected = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, expected, new)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.device_get(state.ema), expected)
  assert np.any(new["norm"] != expected["norm"])


def test_a_loss_that_is_not_finite_is_named(training, child, monkeypatch, tmp_path):
  bad = Training((child[0], child[1] | {"norm": jnp.full(32, jnp.nan)}), training.parent, training.packed)
  with pytest.raises(PuzzleError, match=r"the loss of step 1 is nan; .* lower gkd.learning_rate \(0.003\)"):
    bad.run(tmp_path / "gkd", monkeypatch)


def test_a_gradient_that_is_not_finite_is_named(training, monkeypatch, tmp_path):
  """The loss of its step is fine, the weights after it would be none: no checkpoint holds them."""
  step = gkd.train_step

  def spoilt(state: gkd.State, *args: Any, **kwargs: Any) -> gkd.State:
    at = int(state.step)  # before it is donated
    state = step(state, *args, **kwargs)
    if at < 3:
      return state
    history = state.history.at[at, gkd.METRICS.index("gradient_norm")].set(jnp.inf)
    return dataclasses.replace(state, history=history, params=jax.tree.map(jnp.zeros_like, state.params))

  monkeypatch.setattr(gkd, "train_step", spoilt)
  with pytest.raises(PuzzleError, match=r"norm of step 4 is inf; the last good checkpoint, of step 2, is kept in"):
    training.run(tmp_path / "gkd", monkeypatch)
  assert [path.name for path in (tmp_path / "gkd").glob("[0-9]*")] == ["2"]


def losses_until_stopped(training: Training, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], str]:
  """Of a training of up to 40 steps with a checkpoint every second, watched in windows of 4; and how it ended."""
  monkeypatch.setattr(gkd_guard, "WINDOW", 4)
  gkd.train_step.clear_cache()  # of another test's optimizer
  seen: list[float] = []
  watched = dataclasses.replace(CONFIG, steps=40, warmup_steps=2)
  with pytest.raises(PuzzleError) as error:
    training.run(folder, monkeypatch, config=watched, log=lambda step, metrics: seen.append(metrics["loss"]))
  return seen, str(error.value)


@pytest.mark.parametrize("rate", [-0.5, -50.0])
def test_a_loss_that_diverges_stops_and_no_checkpoint_of_it_is_kept(training, monkeypatch, tmp_path, rate):
  """Uphill from the ninth step on: slowly, and at once; the eighth ends with a checkpoint either way."""
  uphill = optax.sgd(lambda step: jnp.where(step < 8, 0.05, rate))
  monkeypatch.setattr(GKDConfig, "optimizer", lambda self: uphill)
  seen, message = losses_until_stopped(training, tmp_path / "gkd", monkeypatch)
  medians = [np.median(seen[i - 4 : i]) for i in range(4, len(seen) + 1)]
  best = min(medians)
  assert [m > 3 * best for m in medians] == [False] * (len(medians) - 1) + [True]  # at once, and not before
  (kept,) = (int(path.name) for path in (tmp_path / "gkd").glob("[0-9]*"))
  assert 8 <= kept < len(seen) - 1
  assert seen[kept] <= 3 * best  # the loss of its weights, on the next batch
  assert f"the loss diverges: {medians[-1]:.4g} up to step {len(seen)}" in message
  assert f"of step {kept}, is kept in {tmp_path / 'gkd'}; lower gkd.learning_rate (0.003)" in message


def test_weights_spoilt_by_one_step_are_not_kept(training, monkeypatch, tmp_path):
  """The eighth step throws them far off, after a loss that was good."""
  monkeypatch.setattr(GKDConfig, "optimizer", lambda self: optax.sgd(lambda step: jnp.where(step == 7, 1e3, 0.02)))
  seen, message = losses_until_stopped(training, tmp_path / "gkd", monkeypatch)
  assert max(seen[:8]) < 0.1 * seen[8]
  assert [path.name for path in (tmp_path / "gkd").glob("[0-9]*")] == ["6"]
  assert "of step 6, is kept in" in message


def test_a_loss_may_rise_while_the_learning_rate_does_and_one_batch_says_nothing():
  rise = [1.0] * 16 + [5.0] * 16 + [1.0] * 32
  watch = gkd_guard.Watch(3.0, warmup=40)
  for i, loss in enumerate(rise):
    watch.note(9.0 if i % 5 == 4 else loss)  # every fifth batch is odd
    assert not watch.diverged
  assert watch.best == 1.0
  assert not watch.is_good(3.1)
  assert watch.is_good(2.9)
  assert not gkd_guard.Watch(0.0, warmup=0, losses=[1.0] * 20 + [1e9] * 40).diverged
  assert not gkd_guard.Watch(3.0, warmup=0, losses=[1e-7] * 20 + [1e-3] * 40).diverged  # the parent itself


CACHED = dataclasses.replace(
  CONFIG, teacher="cached", cosine_weight=0.0, lm_weight=0.5, kl_temperature=2.0, kl_top_k=5, eval_steps=3
)


def test_kept_answers_train_the_same_child(training, child, parent, monkeypatch, tmp_path, capsys):
  """As the parent online with the same loss; killed while it answers and while it trains.

  The best child is chosen by the KL itself, whatever the loss's temperature and top-k are.
  """
  online = training.run(tmp_path / "online", monkeypatch, config=dataclasses.replace(CACHED, teacher="online"))
  heldout = losses(online[0], parent[1], training.packed.rows(slice(3)), child[0], parent[0])
  assert heldout["kl"] == pytest.approx(min(row.get("heldout_kl", 9) for row in online[1]), rel=1e-4)
  monkeypatch.setattr(answers, "_PART_TOKENS", 5 * 24)  # two parts of a batch each
  put, asked = StageStore.put_arrays, []

  def killed(self: StageStore, name: str, arrays: Any) -> None:
    put(self, name, arrays)
    asked.append(name)
    die()

  with monkeypatch.context() as patch:
    patch.setattr(StageStore, "put_arrays", killed)
    with pytest.raises(KeyboardInterrupt):
      training.run(tmp_path / "cached" / "gkd", monkeypatch, config=CACHED, quiet=False)
  assert "answers to 192 tokens, 5 likeliest each, take 0.00 GiB in" in capsys.readouterr().err
  forward = answers._answer
  monkeypatch.setattr(answers, "_answer", lambda *args: asked.append("forward") or forward(*args))
  with pytest.raises(KeyboardInterrupt):
    training.run(tmp_path / "cached" / "gkd", monkeypatch, config=CACHED, die_after=3)
  kept = sorted(path.name for path in (tmp_path / "cached" / "answers").glob("part*"))
  assert kept == ["part_00000.safetensors", "part_00001.safetensors"]
  params, history = training.run(tmp_path / "cached" / "gkd", monkeypatch, config=CACHED)
  assert asked == ["part_00000.safetensors", "forward"]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, online[0])
  for row, expected in zip(history, online[1], strict=True):
    assert row == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items() if name != "cosine"}
    assert row["loss"] == pytest.approx(row["kl"] + 0.5 * row["lm"], rel=1e-6)
  gkd.forget(tmp_path / "cached" / "gkd")
  assert not any((tmp_path / "cached").iterdir())


def test_damaged_answers_are_not_used(training, monkeypatch, tmp_path):
  with pytest.raises(KeyboardInterrupt):
    training.run(tmp_path / "gkd", monkeypatch, config=CACHED, die_after=3)
  part = tmp_path / "answers" / "part_00000.safetensors"
  part.write_bytes(part.read_bytes()[:-1] + b"\1")
  with pytest.raises(CorruptFileError, match=r"part_00000.safetensors is missing or corrupt"):
    training.run(tmp_path / "gkd", monkeypatch, config=CACHED)
  training.run(tmp_path / "gkd", monkeypatch, config=CACHED)  # as the driver does
  assert training.steps == 4


def test_a_random_start_forgets_the_child(training, child, monkeypatch, tmp_path):
  config = dataclasses.replace(CONFIG, steps=1, start="random", learning_rate=1e-9)
  params, _ = training.run(tmp_path / "gkd", monkeypatch, config=config)
  expected = decoder.init(child[0], jax.random.key(0))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected)


def test_no_steps_leave_the_child_as_it_is(training, child, monkeypatch, tmp_path):
  assert training.run(tmp_path / "gkd", monkeypatch, config=GKDConfig(steps=0)) == (child[1], [])


@pytest.mark.parametrize(
  "change, message",
  [
    ({"ema": 1.0}, "0 <= ema < 1 and eval_steps >= 0 needed; got ema=1.0"),
    ({"eval_steps": -1}, "got ema=0.0, eval_steps=-1"),
    ({"steps": -1}, "steps >= 0, batch_rows, checkpoint_steps >= 1, learning_rate > 0 needed"),
    ({"kl_weight": -1.0}, "the loss weights must not be negative"),
    ({"kl_weight": 0.0, "cosine_weight": 0.0}, "one of them must be above 0"),
    ({"kl_temperature": 0.0}, "kl_temperature > 0 and kl_top_k >= 0 needed; got kl_temperature=0.0"),
    ({"divergence": 0.5}, "gkd.divergence=0.5 must be above 1"),
    ({"start": "anew"}, "gkd.start='anew' is not one of child, random"),
    ({"teacher": "cached", "kl_top_k": 8}, r"set gkd.cosine_weight=0 \(it is 1.0\) and gkd.kl_top_k, such as 64"),
    ({"teacher": "cached", "cosine_weight": 0.0}, r"gkd.kl_top_k, such as 64 \(it is 0\)"),
  ],
)
def test_refuses(change, message):
  with pytest.raises(PuzzleError, match=message):
    GKDConfig(**change)
