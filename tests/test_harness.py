"""The adapter for lm-evaluation-harness against the harness's own Hugging Face backend on the exported checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import tiny_parent
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluation import likelihood
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.serving.hf_export import export_hf

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
pytest.importorskip("accelerate", reason="lm_eval's Hugging Face backend needs it")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it brings along

import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from puzzle_jax.evaluation.harness import HarnessModel  # noqa: E402

WORDS = ("the", "sea", "is", "wide", "and", "blue", "ships", "go", "over", "it", "to", "far", "lands", "old", "trees")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  path: Path = tmp_path_factory.mktemp("harness")
  tiny_parent.write(path / "model")
  export_hf(path / "model", path / "hf", dtype="float32")
  return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> HarnessModel:
  return HarnessModel(LanguageModel.open(folder / "model"), batch_tokens=1024, batch_rows=4, quiet=True)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
  return HFLM(str(folder / "hf"), batch_size=8, device="cpu", dtype="float32", trust_remote_code=True)


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
  return [Instance(kind, {}, a, i, metadata=("task", i, 1)) for i, a in enumerate(arguments)]


def sentence(rng: np.random.Generator, words: int) -> str:
  return " ".join(rng.choice(WORDS, words))


def test_likelihoods(ours: HarnessModel, theirs: Any) -> None:
  rng = np.random.default_rng(0)
  pairs = [(sentence(rng, int(rng.integers(1, 14))), " " + sentence(rng, int(rng.integers(1, 4)))) for _ in range(24)]
  pairs += [("", "the sea"), ("the sea ", "is"), ("", "<|end|>x"), ("the sea is", " e"), (sentence(rng, 90), " blue")]
  found, expected = (model.loglikelihood(instances("loglikelihood", pairs)) for model in (ours, theirs))
  np.testing.assert_allclose([p for p, _ in found], [p for p, _ in expected], rtol=1e-5, atol=1e-4)
  assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
  own = likelihood.encode(pairs, ours.model.tokenizer)[:28]  # what local tasks are encoded as
  model = (ours.model.architecture, ours.model.params)
  local = [one.log_p for one in likelihood.score_all(model, own, batch_tokens=512)]
  np.testing.assert_allclose(local, [p for p, _ in expected[:28]], rtol=1e-5, atol=1e-4)


def test_rolling_likelihoods(ours: HarnessModel, theirs: Any) -> None:
  rng = np.random.default_rng(1)
  texts = [(sentence(rng, words),) for words in (1, 9, 60, 130, 260)]
  assert len(ours.tok_encode(texts[-1][0])) > 3 * ours.max_length
  found, expected = (m.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for m in (ours, theirs))
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_answers(ours: HarnessModel, theirs: Any) -> None:
  rng = np.random.default_rng(2)
  free = {"until": [], "max_gen_toks": 24, "do_sample": False}
  prompts = [sentence(rng, words) for words in (1, 3, 8, 100)]
  found, expected = (
    m.generate_until(instances("generate_until", [(p, dict(free)) for p in prompts])) for m in (ours, theirs)
  )
  assert found == expected
  assert all(found)
  stop = found[1][3:5]
  short = ours.generate_until(instances("generate_until", [(prompts[1], free | {"until": [stop]})]))
  assert short == theirs.generate_until(instances("generate_until", [(prompts[1], free | {"until": [stop]})]))
  assert short == [found[1].partition(stop)[0]]


def test_drawn_answers_depend_on_the_prompt_and_the_seed(ours: HarnessModel) -> None:
  drawn = {"until": "zz", "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
  ask = instances("generate_until", [(p, dict(drawn)) for p in ("a", "b", "a")])
  first = ours.generate_until(ask)
  assert first[0] == first[2] != first[1]
  assert HarnessModel(ours.model, batch_rows=4, seed=1, quiet=True).generate_until(ask)[0] != first[0]


@pytest.mark.parametrize(
  "options, message",
  [
    ({"max_gen_toks": 256}, "max_gen_toks=256 must be at least 1 and leave room in the context of 256"),
    ({"max_gen_toks": 4, "do_sample": True, "temperature": 1.0, "top_p": 0.9}, "asks for top_p=0.9"),
    ({"max_gen_toks": 4, "num_beams": 4}, "asks for num_beams=4"),
  ],
)
def test_refuses(ours: HarnessModel, options: dict[str, Any], message: str) -> None:
  with pytest.raises(PuzzleError, match=message):
    ours.generate_until(instances("generate_until", [("a", options)]))


def test_a_task_is_judged_alike(
  ours: HarnessModel, theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """500 items: at most one may be judged differently."""
  monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
  rng = np.random.default_rng(3)
  items = [
    {"question": sentence(rng, 4), "choices": [sentence(rng, 2) for _ in range(4)], "gold": int(rng.integers(4))}
    for _ in range(500)
  ]
  (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
  (tmp_path / "sea.yaml").write_text(f"""
task: sea
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/items.jsonl}}, cache_dir: {tmp_path}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
  found, expected = (
    lm_eval.simple_evaluate(
      model=model,
      tasks=["sea"],
      task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
      bootstrap_iters=0,
      log_samples=True,
    )
    for model in (ours, theirs)
  )
  for metric in ("acc", "acc_norm"):
    one, other = ([sample[metric] for sample in result["samples"]["sea"]] for result in (found, expected))
    assert len(one) == 500
    assert sum(a != b for a, b in zip(one, other, strict=True)) <= 1
    assert 50 < sum(one) < 250
