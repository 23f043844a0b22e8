"""GGUF exports: read back, held against llama.cpp's layout and against the parent's own file."""

import gguf
import numpy as np
import pytest
from children import LLAMACPP, byte_tokenizer, random_child
from test_parents import interleave
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers

from puzzle_jax import checkpoint, parents
from puzzle_jax.arch import Architecture, RopeScaling
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.parents import open_parent
from puzzle_jax.parents.gguf import GGUFFile
from puzzle_jax.serving import gguf_tokenizer
from puzzle_jax.serving.gguf_export import export_gguf
from puzzle_jax.tokenizer import PRE_TOKENIZERS, Tokenizer

TEXT = "the theft of 1234 things, \tand\n\n more: I'm naïve… 😀<|end|>x<think>"
SHAPE = {"hidden_size": 64, "head_dim": 16, "vocab_size": 264}


@pytest.fixture(scope="module")
def child(tmp_path_factory):
  folder = tmp_path_factory.mktemp("gguf") / "child"
  scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
  random_child(folder, byte_tokenizer(add_bos=True), LLAMACPP, **SHAPE, rope_scaling=scaling, qkv_bias=True)
  return folder


def raw(path):
  reader = gguf.GGUFReader(path)
  return {t.name: t for t in reader.tensors}, {k: f.contents() for k, f in reader.fields.items()}


def test_the_layout_is_llama_cpps(child, tmp_path):
  export_gguf(child, tmp_path / "child.gguf")
  tensors, fields = raw(tmp_path / "child.gguf")
  assert fields["general.architecture"] == "deci"
  assert fields["general.license"] == "apache-2.0"
  assert fields["deci.attention.head_count"] == [4, 4, 0, 0, 4]  # a linear attention has query heads
  assert fields["deci.attention.head_count_kv"] == [4, 0, 0, 0, 1]
  assert fields["deci.feed_forward_length"] == [320, 64, 128, 0, 32]
  assert [fields[f"deci.{k}"] for k in ("block_count", "context_length", "embedding_length")] == [5, 128, 64]
  read, names = checkpoint.read_checkpoint(child), gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, 5)
  linear = "model.layers.1.self_attn.linear_attn"  # the map knows it
  assert names.get_name(linear) == "blk.1.attn_output"
  biases = {f"blk.{i}.attn_{m}.bias" for i in (0, 4) for m in ("q", "k", "v", "output")}  # the output's are zeros
  expected = {f"{names.get_name(n.rpartition('.')[0])}.{n.rpartition('.')[2]}" for n in read.weights.shapes}
  assert tensors.keys() == expected | biases | {"rope_freqs.weight"}
  for name, heads in (("q", 4), ("k", 4)):
    stored = tensors[f"blk.0.attn_{name}.weight"]
    rows = interleave(read.layer(0)["attention"][name], heads)  # `permute` of llama.cpp's converter
    np.testing.assert_array_equal(stored.data, rows.astype(np.float16))
  gate = tensors["blk.0.ffn_gate.weight"].data
  np.testing.assert_array_equal(gate[:300], read.layer(0)["ffn"]["gate"].astype(np.float16))
  assert not gate[300:].any()
  assert {t.tensor_type.name for t in tensors.values() if len(t.shape) == 1} == {"F32"}


@pytest.mark.parametrize("config", [{}, {"tie_embeddings": True, "head_dim": 32}], ids=["plain", "tied"])
def test_an_export_can_be_a_parent(tmp_path, config):
  architecture = random_child(tmp_path / "child", byte_tokenizer(), LLAMACPP, **(SHAPE | config))
  export_gguf(tmp_path / "child", tmp_path / "child.gguf")
  parent = open_parent(str(tmp_path / "child.gguf"))
  parent.validate()
  blocks = ["gqa4/w320", "linear/w64", "none/w128", "none/none", "gqa1/w32"]
  assert ([b.name for b in parent.architecture.blocks], parent.license) == (blocks, "apache-2.0")
  assert parent.architecture.config == architecture.config
  tokens = np.arange(30)[None] * 7 % 264
  exact = LanguageModel.open(tmp_path / "child").logits(tokens)
  error = np.linalg.norm(LanguageModel.open(tmp_path / "child.gguf").logits(tokens) - exact) / np.linalg.norm(exact)
  assert error < 2e-3  # eleven bits


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0", "Q4_1"])
def test_types_of_tensors(child, tmp_path, dtype):
  export_gguf(child, tmp_path / "child.gguf", dtype=dtype)
  tensors, fields = raw(tmp_path / "child.gguf")
  assert gguf.LlamaFileType(fields["general.file_type"]).name == f"MOSTLY_{dtype}"
  kinds = {name: t.tensor_type.name for name, t in tensors.items() if len(t.shape) == 2}
  assert kinds.pop("output.weight") == "Q8_0"
  assert set(kinds.values()) == {dtype}
  head = checkpoint.read_checkpoint(child).head()
  data = gguf.quants.quantize(head["embed"], gguf.GGMLQuantizationType[dtype])
  np.testing.assert_array_equal(tensors["token_embd.weight"].data, data)


def test_rows_that_are_no_whole_blocks_and_a_tied_embedding(tmp_path):
  random_child(
    tmp_path / "child",
    byte_tokenizer(),
    ("gqa1/w32",),
    vocab_size=264,
    hidden_size=48,
    head_dim=16,
    tie_embeddings=True,
  )
  export_gguf(tmp_path / "child", tmp_path / "child.gguf", dtype="Q4_1")
  tensors, _ = raw(tmp_path / "child.gguf")
  kinds = {name: t.tensor_type.name for name, t in tensors.items() if len(t.shape) == 2}
  assert kinds.pop("blk.0.ffn_down.weight") == "Q4_1"  # rows of 32; of o 64, of the others 48
  assert kinds.pop("blk.0.attn_output.weight") == "Q4_1"
  assert set(kinds.values()) == {"F16"}
  assert "output.weight" not in tensors


def test_untouched_weights_and_the_tokenizer_of_a_gguf_parent_keep_their_bits(tmp_path):
  parent = open_parent(parents.EMBEDDED)
  file = parent.weights
  assert isinstance(file, GGUFFile)
  (tmp_path / "child").mkdir()
  two = Architecture(parent.architecture.config, parent.architecture.blocks[:2])
  layers = [parent.layer(i) for i in range(2)]
  checkpoint.write_checkpoint(tmp_path / "child", two, parent.head(), layers, tokenizer=parent.tokenizer())
  export_gguf(tmp_path / "child", tmp_path / "child.gguf", dtype="Q4_1", parent=file)
  ours, theirs = GGUFFile(tmp_path / "child.gguf"), file
  assert ours.shapes.keys() == two.checkpoint_shapes().keys()
  for name, t in ours._tensors.items():
    assert t.tensor_type == theirs._tensors[name].tensor_type
    np.testing.assert_array_equal(t.data, theirs._tensors[name].data, err_msg=name)
  keys = [k for k in theirs.fields if k.startswith("tokenizer.")]
  assert [k for k in ours.fields if k.startswith("tokenizer.")] == keys
  for key in keys:  # the bytes of the file: name, type, value
    found, wanted = (b"".join(part.tobytes() for part in r.fields[key].parts) for r in (ours, theirs))
    assert found == wanted, key
  derived = {e.key: e for e in gguf_tokenizer.derived(tmp_path / "child", two.config.vocab_size)}
  copied = {e.key: e for e in gguf_tokenizer.copied(file, two.config.vocab_size)}
  assert derived.keys() == copied.keys() - {"tokenizer.ggml.add_space_prefix"} | {"tokenizer.ggml.add_eos_token"}
  assert all(derived[key] == copied[key] for key in derived.keys() & copied.keys())


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_a_tokenizer_json_of_each_known_kind(tmp_path, pre):
  tokenizer = byte_tokenizer(add_bos=True)
  backend = tokenizer.backend
  backend.pre_tokenizer = pre_tokenizers.Sequence(list(PRE_TOKENIZERS[pre]))
  backend.model.ignore_merges = pre == "llama-bpe"
  tokenizer.save(tmp_path)
  fields = {e.key: e.value for e in gguf_tokenizer.derived(tmp_path, 264)}
  assert (fields["tokenizer.ggml.pre"], fields["tokenizer.ggml.model"]) == (pre, "gpt2")
  assert fields["tokenizer.ggml.tokens"][257:] == [
    "<|start|>",
    "<|end|>",
    "<think>",
    *(f"[PAD{i}]" for i in range(260, 264)),
  ]
  assert fields["tokenizer.ggml.token_type"][256:] == [1, 3, 3, 4, 5, 5, 5, 5]
  assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (True, False)
  assert fields["tokenizer.chat_template"] == tokenizer.chat_template
  again = Tokenizer.from_gguf(fields)
  assert again.encode(TEXT) == tokenizer.encode(TEXT)
  assert again.special_tokens == tokenizer.special_tokens


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Whitespace()), "a way to cut text .*Whitespace"),
    (lambda b: setattr(b, "normalizer", normalizers.NFC()), "a normalizer of type NFC"),
    (lambda b: setattr(b.model, "ignore_merges", True), "a way to cut text"),
    (lambda b: setattr(b, "model", models.BPE(vocab={"a": 0}, merges=[])), "a BPE model without merges"),
  ],
)
def test_a_tokenizer_that_llama_cpp_has_no_name_for(tmp_path, change, message):
  tokenizer = byte_tokenizer()
  change(tokenizer.backend)
  tokenizer.save(tmp_path)
  with pytest.raises(PuzzleError, match=f"tokenizer.json: {message}.* known: byte-level BPE cut as gpt-2, llama-bpe"):
    gguf_tokenizer.derived(tmp_path, 264)


def test_a_sentencepiece_tokenizer(tmp_path):
  backend = Backend(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("</s>", 0.0)], 0))
  backend.add_special_tokens(["</s>"])
  Tokenizer(backend, {"eos_token": "</s>"}, None, frozenset([2])).save(tmp_path)
  with pytest.raises(PuzzleError, match="a Unigram model cannot be written to a GGUF file"):
    gguf_tokenizer.derived(tmp_path, 264)


def test_refusals(child, tmp_path):
  with pytest.raises(PuzzleError, match="GGUF type 'Q5_K' is not supported; choose one of F16, Q8_0, Q4_0, Q4_1"):
    export_gguf(child, tmp_path / "x.gguf", dtype="Q5_K")
  with pytest.raises(PuzzleError, match=r"vLLM reads hf, not gguf; engines for gguf: llama_cpp"):
    export_gguf(child, tmp_path / "x.gguf", engine="vllm")
  random_child(tmp_path / "dropped", byte_tokenizer(), ("gqa4/none", "none/linear", "none/none"), **SHAPE)
  message = r"layer 0: attention without an FFN .*layer 1: linear in place of ffn .*layer 2: the last layer .*llama_cpp"
  with pytest.raises(PuzzleError, match=message):
    export_gguf(tmp_path / "dropped", tmp_path / "x.gguf")
  random_child(tmp_path / "small", byte_tokenizer(), ("gqa4/w32",), **(SHAPE | {"vocab_size": 64}))
  with pytest.raises(PuzzleError, match="the tokenizer has token 259, the embedding 64 rows; they do not match"):
    export_gguf(tmp_path / "small", tmp_path / "x.gguf")
  architecture = random_child(tmp_path / "large", byte_tokenizer(), ("gqa4/w32",), **SHAPE)
  read = checkpoint.read_checkpoint(tmp_path / "large")
  layer = read.layer(0)
  layer["ffn"]["up"][3, 4] = 1e6
  (tmp_path / "larger").mkdir()
  checkpoint.write_checkpoint(tmp_path / "larger", architecture, read.head(), [layer], tokenizer=tmp_path / "large")
  with pytest.raises(PuzzleError, match=r"blk.0.ffn_up.weight holds values up to 1e\+06, too large for F16; export as"):
    export_gguf(tmp_path / "larger", tmp_path / "x.gguf")
  layer["ffn"]["up"][3, 4] = np.nan
  checkpoint.write_checkpoint(tmp_path / "larger", architecture, read.head(), [layer], tokenizer=tmp_path / "large")
  with pytest.raises(PuzzleError, match=r"model.layers.0.mlp.up_proj.weight holds 1 values that are NaN"):
    export_gguf(tmp_path / "larger", tmp_path / "x.gguf")
  assert not list(tmp_path.glob("*x.gguf*"))
  (tmp_path / "x.gguf").touch()
  with pytest.raises(PuzzleError, match=r"x.gguf exists; name a new file"):
    export_gguf(child, tmp_path / "x.gguf")
