"""The tokenizer against llama.cpp (recorded: experiments/oracles/tokenizer_ids.py) and Transformers."""

import gzip
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import EMBEDDED, open_parent
from puzzle_jax.tokenizer import Tokenizer

ORACLE = json.loads(gzip.decompress((Path(__file__).parent / "testdata" / "tokenizer_ids.json.gz").read_bytes()))
CHAT = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "What is 2 + 2?"},
  {"role": "assistant", "content": "4"},
  {"role": "user", "content": "Ünïcode 😀 <|im_end|>"},
]


@pytest.fixture(scope="module")
def fields():
  return open_parent(EMBEDDED).weights.tokenizer_metadata()


@pytest.fixture(scope="module")
def smollm(fields):
  return Tokenizer.from_gguf(fields)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "gpt-2"])
def test_same_ids_as_llama_cpp(fields, pre):
  tokenizer = Tokenizer.from_gguf(fields | {"tokenizer.ggml.pre": pre})
  strings, ids = ORACLE["strings"], ORACLE["ids"][pre]
  assert len(set(strings)) == len(ids) == 1_000
  assert [tokenizer.encode(text, add_special=False) for text in strings] == ids
  assert tokenizer.encode_batch(strings, add_special=False) == ids


def test_the_kinds_of_pre_tokenizer_differ_on_the_oracle():
  smollm, llama, gpt2 = (ORACLE["ids"][pre] for pre in ("smollm", "llama-bpe", "gpt-2"))
  assert smollm != llama != gpt2 != smollm


def test_decoding_gives_the_text_back(smollm):
  """All but the control characters that the vocabulary has no token for: the parent never sees them."""
  alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  vocabulary = smollm.backend.get_vocab()
  lost = {chr(i) for i in range(128) if alphabet.pre_tokenize_str(chr(i))[0][0] not in vocabulary}
  assert {ord(c) for c in lost} == {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D}
  table = str.maketrans(dict.fromkeys(lost, ""))
  for text in ORACLE["strings"]:
    assert smollm.decode(smollm.encode(text)) == text.translate(table)


def test_digits_stand_alone(smollm):
  assert smollm.encode(" ½") == [216, 16738]
  assert [smollm.decode([i]) for i in smollm.encode("2024")] == list("2024")


def test_special_tokens_of_the_embedded_parent(smollm):
  assert (smollm.vocab_size, smollm.bos_id, smollm.eos_id, smollm.stop_ids) == (49_152, 1, 2, {0, 2})
  assert smollm.encode("<|im_start|>a<|im_end|>") == [1, *smollm.encode("a"), 2]
  assert smollm.decode([1, *smollm.encode("a"), 2], skip_special=True) == "a"


def test_transformers_loads_what_is_saved(smollm, tmp_path):
  smollm.save(tmp_path)
  theirs = AutoTokenizer.from_pretrained(tmp_path)
  assert [theirs(text).input_ids for text in ORACLE["strings"]] == ORACLE["ids"]["smollm"]
  ids = smollm.encode("A test , of <|im_end|> spaces !")
  assert theirs.decode(ids) == smollm.decode(ids)
  assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
  for prompt in (True, False):
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
    assert smollm.render_chat(CHAT, add_generation_prompt=prompt) == expected
  assert Tokenizer.from_folder(tmp_path).digest == smollm.digest


def test_llama_bpe_puts_bos_first_unless_told_otherwise(fields):
  bare = {k: v for k, v in fields.items() if k != "tokenizer.ggml.add_bos_token"}
  llama3 = Tokenizer.from_gguf(bare | {"tokenizer.ggml.pre": "llama-bpe"})
  assert llama3.encode("a") == [1, *llama3.encode("a", add_special=False)]
  assert Tokenizer.from_gguf(bare).encode("a") == llama3.encode("a", add_special=False)


def test_user_defined_tokens_are_kept_whole_and_are_not_special(fields):
  types = list(fields["tokenizer.ggml.token_type"])
  types[3] = 4
  tokenizer = Tokenizer.from_gguf(fields | {"tokenizer.ggml.token_type": types})
  assert tokenizer.encode("<repo_name>") == [3]
  assert tokenizer.decode([3], skip_special=True) == "<repo_name>"


@pytest.mark.parametrize(
  "change, message",
  [
    ({"tokenizer.ggml.model": "llama"}, "'gpt-2', 'llama-bpe', 'smollm'"),
    ({"tokenizer.ggml.pre": "tekken"}, "'tekken'.* is not supported"),
    ({"tokenizer.ggml.pre": ["smollm"]}, r"pre \['smollm'\]\) is not supported"),
    ({"tokenizer.ggml.eos_token_id": None}, "no EOS token"),
    ({"tokenizer.ggml.eos_token_id": -1}, "eos_token_id is -1, not a whole number below"),
    ({"tokenizer.ggml.eos_token_id": "2"}, "eos_token_id is '2', not a whole number below"),
    ({"tokenizer.ggml.add_bos_token": "false"}, "add_bos_token is 'false', not of type bool"),
    ({"tokenizer.chat_template": 3}, "chat_template is 3, not of type str"),
  ],
)
def test_gguf_errors(fields, change, message):
  with pytest.raises(PuzzleError, match=message):
    Tokenizer.from_gguf(fields | change)


def test_merges_into_no_token_panic_in_the_library(fields, tmp_path):
  change = {f"tokenizer.ggml.{key}": value for key, value in (("merges", ["a b"]), ("tokens", ["a", "b"]))}
  with pytest.raises(PuzzleError, match="the GGUF's tokenizer is damaged"):
    Tokenizer.from_gguf(fields | change)
  model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}
  (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
  with pytest.raises(PuzzleError, match=r"tokenizer\.json is no file of the tokenizers library"):
    Tokenizer.from_folder(tmp_path)


def test_gguf_without_merges(fields):
  with pytest.raises(PuzzleError, match=r"no tokenizer\.ggml\.merges"):
    Tokenizer.from_gguf({k: v for k, v in fields.items() if k != "tokenizer.ggml.merges"})


# Folders, on a tokenizer of one token a byte.


def write_folder(folder, *, bos_in_json=False, **files):
  """A Hugging Face folder; `files` by name without .json."""
  names = ["<s>", "</s>", "<pad>", "<|eot_id|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
  backend = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(names)}, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(names[:4])
  if bos_in_json:
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
  folder.mkdir(exist_ok=True)
  backend.save(str(folder / "tokenizer.json"))
  for name, content in files.items():
    (folder / f"{name}.json").write_text(json.dumps(content))
  return folder


BASE = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>"}}


IGNORED = {"add_bos_token": False, "add_eos_token": True}


@pytest.mark.parametrize(
  ("bos_in_json", "flags"),
  [(True, {}), (True, {"add_bos_token": True}), (True, IGNORED), (False, {}), (False, IGNORED)],
)
def test_bos_as_transformers_adds_it(tmp_path, bos_in_json, flags):
  folder = write_folder(tmp_path / "in", bos_in_json=bos_in_json, tokenizer_config=BASE | {"eos_token": "</s>"} | flags)
  tokenizer = Tokenizer.from_folder(folder)
  assert (tokenizer.encode("hi")[0] == tokenizer.bos_id) == bos_in_json
  expected = AutoTokenizer.from_pretrained(folder)("hi").input_ids
  assert tokenizer.encode("hi") == expected
  tokenizer.save(tmp_path / "out")
  assert AutoTokenizer.from_pretrained(tmp_path / "out")("hi").input_ids == expected
  assert Tokenizer.from_folder(tmp_path / "out").encode("hi") == expected


def test_stop_tokens_come_from_all_files(tmp_path):
  folder = write_folder(tmp_path, tokenizer_config=BASE, generation_config={"eos_token_id": [1, 2]})
  assert Tokenizer.from_folder(folder).stop_ids == {1, 2, 3}


def test_eos_from_the_other_files(tmp_path):
  assert Tokenizer.from_folder(write_folder(tmp_path / "a", generation_config={"eos_token_id": 1})).eos_id == 1
  folder = write_folder(tmp_path / "b", special_tokens_map={"eos_token": {"content": "</s>"}})
  assert Tokenizer.from_folder(folder).eos_id == 1


def test_chat_template_of_its_own_file_and_by_name(tmp_path):
  named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
  folder = write_folder(tmp_path, tokenizer_config=BASE | {"chat_template": named})
  assert Tokenizer.from_folder(folder).render_chat(CHAT) == "plain"
  (folder / "chat_template.jinja").write_text("file")
  assert Tokenizer.from_folder(folder).render_chat(CHAT) == "file"


TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {% generation %}
[{{ message['role'] | upper }}] {{ message | tojson }}{{ message.content.strip() }}
    {% endgeneration %}
    {%- set n = namespace(last=loop.last) %}
{%- endfor %}
{% if add_generation_prompt %}<bot>{{ eos_token }}{% endif %}
{% if tools is not none %}{{ tools }}{% endif %}
"""


def test_chat_templates_render_as_in_transformers(tmp_path):
  folder = write_folder(tmp_path, tokenizer_config=BASE | {"eos_token": "</s>", "chat_template": TEMPLATE})
  expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
  assert "[USER]" in expected
  assert Tokenizer.from_folder(folder).render_chat(CHAT) == expected


def test_what_a_chat_template_rejects_is_said(tmp_path):
  config = BASE | {"chat_template": "{{ raise_exception('roles must alternate') }}"}
  with pytest.raises(PuzzleError, match="roles must alternate"):
    Tokenizer.from_folder(write_folder(tmp_path, tokenizer_config=config)).render_chat(CHAT)
  with pytest.raises(PuzzleError, match="no chat template"):
    Tokenizer.from_folder(write_folder(tmp_path, tokenizer_config=BASE)).render_chat(CHAT)


def test_digest_tells_tokenizers_apart(tmp_path):
  plain = Tokenizer.from_folder(write_folder(tmp_path / "a", tokenizer_config=BASE))
  same = Tokenizer.from_folder(write_folder(tmp_path / "b", tokenizer_config=BASE))
  bos = Tokenizer.from_folder(write_folder(tmp_path / "c", tokenizer_config=BASE, bos_in_json=True))
  chat = Tokenizer.from_folder(write_folder(tmp_path / "d", tokenizer_config=BASE | {"chat_template": "x"}))
  assert plain.digest == same.digest
  assert len({plain.digest, bos.digest, chat.digest}) == 3


def test_folder_errors(tmp_path):
  with pytest.raises(PuzzleError, match=r"has no tokenizer\.json"):
    Tokenizer.from_folder(tmp_path)
  with pytest.raises(PuzzleError, match="names no EOS token"):
    Tokenizer.from_folder(write_folder(tmp_path))
  with pytest.raises(PuzzleError, match="eos_token '<end>' is not in"):
    Tokenizer.from_folder(write_folder(tmp_path, tokenizer_config={"eos_token": "<end>"}))
  (tmp_path / "tokenizer_config.json").write_text("{")
  with pytest.raises(PuzzleError, match=r"tokenizer_config\.json is not JSON"):
    Tokenizer.from_folder(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(PuzzleError, match="no file of the tokenizers library"):
    Tokenizer.from_folder(tmp_path)
