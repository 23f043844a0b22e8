"""Records llama.cpp's token ids of 1,000 varied strings: the oracle of tests/test_tokenizer.py.

Needs llama-cpp-python and gguf (recorded with the versions that the file names), in an environment of its own:

    pip install llama-cpp-python gguf
    python experiments/oracles/tokenizer_ids.py SmolLM2-135M-Instruct.Q4_1.gguf tests/testdata/tokenizer_ids.json.gz

The parent's own pre-tokenizer (`smollm`) gets all strings. The other kinds of pre-tokenizer are recorded on the same
vocabulary, by writing another name into a copy of the file.
"""

import argparse
import gzip
import importlib.metadata
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import llama_cpp

NUM_STRINGS = 1_000
PRE_TOKENIZERS = ("smollm", "llama-bpe", "gpt-2")

WORDS = """
the of and model attention distillation search Puzzle architecture inference don't they'll we're I'd it's he'S CAN'T
Straße naïve café résumé Zürich smørrebrød Ångström coöperate façade jalapeño žluťoučký kůň árvíztűrő
Привет мир Україна Ελληνικά γλώσσα שלום עולם مرحبا بالعالم नमस्ते दुनिया বাংলা தமிழ் ไทยภาษา ქართული Հայերեն አማርኛ
你好世界 中文分词 日本語テキスト ひらがな カタカナ ｶﾀｶﾅ 한국어 조선말 Tiếng Việt ᚠᚢᚦ ᏣᎳᎩ ꦗꦮ 𐍈𐌰 𝒳𝔘𝕏 ﬁ ǆ İstanbul ıI ẞ
"""
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇯🇵", "❤️", "1️⃣", "🧑🏿‍🚀", "☃", "⚙️", "🫠", "©️"]
MARKS = [
  "e\u0301",
  "n\u0303",
  "o\u0308\u0323",
  "Z\u0351\u036b\u0343",
  "\u0915\u094d\u0937\u093f",
  "\u0e01\u0e33",
  "\u1112\u1161\u11ab",
]
NUMBERS = [
  "0",
  "7",
  "42",
  "007",
  "1234567890",
  "3.14159",
  "1e-10",
  "1,000,000",
  "0x1F",
  "½",
  " ½",
  "¾ cup",
  "²³",
  "x²",
  "Ⅷ",
  "①②",
  "١٢٣",
  "४५६",
  "１２３",
  "๑๒",
  "十二",
  "12:30",
  "2024-05-17",
  "$9.99",
  "50%",
  "v1.2.3",
  "1st",
  "a1b2",
  "10 000",
  "𝟘𝟙",
]
SPACES = [
  " ",
  "  ",
  "   ",
  "    ",
  "\t",
  "\t\t",
  "\n",
  "\n\n",
  "\n\n\n",
  "\r\n",
  "\r\n\r\n",
  "\r",
  " \n",
  "\n ",
  "  \n  ",
  " \t ",
  "\u00a0",
  "\u3000",
  "\u2003",
  "\u200b",
  "\u2028",
  "\ufeff",
  "\x0b",
  "\x0c",
  "\x85",
  "        ",
]
PUNCTUATION = [
  "...",
  "!?",
  "—",
  "–",
  "“quoted”",
  "‘x’",
  "«»",
  "(a)",
  "[b]",
  "{c}",
  "#tag",
  "@name",
  "a/b",
  "a\\b",
  "&amp;",
  "**bold**",
  "_it_",
  "`x`",
  "->",
  "=>",
  "!=",
  "==",
  ":=",
  "::",
  "<<",
  "||",
  "~",
  "^",
  "€£¥",
  "±×÷",
  "∑∫√",
  "→",
  "•",
  "、。",
  "…",
  "؟",
  "‽",
  "'",
  '"',
  "''",
]
CODE = [
  "def f(x: int = 3) -> str:\n    return f'{x!r}'\n",
  "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}\n",
  "SELECT * FROM t WHERE id = 1;",
  "import numpy as np\n\nx = np.zeros((3, 4), dtype=np.float32)  # zeros\n",
  "#include <stdio.h>\nint main(void) { return 0; }\n",
  '{"a": [1, 2.5, null], "b": {"c": "\\u00e9"}}',
  '<div class="x">&nbsp;</div>',
  "let s = `a${b}c`; // note",
  "x_BTD = jnp.einsum('btd,df->btf', x, w)",
  "git commit -m 'msg' && ls -la | grep foo > /dev/null 2>&1",
  "\\frac{a}{b} = \\sum_{i=0}^{n} x_i^2",
  "https://example.org/a?b=c&d=%20#e",
  "class A(B):\n        pass\n\n\nif __name__ == '__main__':\n        A()\n",
]
SPECIAL = [
  "<|im_start|>",
  "<|im_end|>",
  "<|endoftext|>",
  "<|im_start|>user\n",
  "<|im_end|>\n",
  "<repo_name>",
  "<file_sep>",
  "<empty_output>",
  "<|im_start",
  "im_end|>",
  "<| im_start |>",
  "<|eot_id|>",
  "<s>",
  "</s>",
  "<unk>",
]


def strings() -> list[str]:
  """The same strings on every machine: every fragment alone, every control character, and random mixtures."""
  rng = random.Random(0)
  words = WORDS.split()
  fragments = [words, EMOJI, MARKS, NUMBERS, SPACES, PUNCTUATION, CODE, SPECIAL]
  result = [text for kind in fragments for text in kind]
  result += [f"a{chr(code)}b {chr(code)}{chr(code)}" for code in [*range(0x20), *range(0x7F, 0xA1)]]
  result += [" ".join(rng.choices(words, k=n)) for n in range(1, 40)]
  result += ["x" * n for n in (2, 7, 30, 100, 300)] + [
    "ab" * 100,
    "é" * 50,
    "中" * 40,
    "9" * 60,
    " " * 64,
    "\n" * 30,
    "!" * 70,
  ]
  result += ["<|im_start|>user\n" + w + "<|im_end|>\n<|im_start|>assistant\n" for w in rng.sample(words, 12)]
  scripts = [
    (0x21, 0x7E),
    (0xA1, 0x17F),
    (0x370, 0x3FF),
    (0x400, 0x4FF),
    (0x5D0, 0x5EA),
    (0x620, 0x64A),
    (0x905, 0x939),
    (0xE01, 0xE2E),
    (0x3041, 0x30FF),
    (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3),
    (0x2190, 0x22FF),
    (0x1F300, 0x1F64F),
  ]
  for first, last in scripts:
    result += ["".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 20))) for _ in range(12)]
  distinct = dict.fromkeys(result)
  while len(distinct) < NUM_STRINGS:
    kinds = rng.choices(fragments, k=rng.randint(2, 12))
    distinct[rng.choice(["", " "]).join(rng.choice(kind) for kind in kinds)] = None
  return list(distinct)


def record(model: pathlib.Path, texts: list[str]) -> list[list[int]]:
  llama = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
  return [llama.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("model", type=pathlib.Path)
  parser.add_argument("output", type=pathlib.Path)
  args = parser.parse_args()
  texts, ids = strings(), {}
  with tempfile.TemporaryDirectory() as folder:
    for pre in PRE_TOKENIZERS:
      copy = pathlib.Path(folder) / f"{pre}.gguf"
      command = ["gguf.scripts.gguf_new_metadata", "--force", "--pre-tokenizer", pre, str(args.model), str(copy)]
      subprocess.run([sys.executable, "-m", *command], check=True)
      ids[pre] = record(copy, texts)
  versions = {name: importlib.metadata.version(name) for name in ("llama-cpp-python", "gguf")}
  data = {"versions": versions, "model": args.model.name, "strings": texts, "ids": ids}
  args.output.parent.mkdir(parents=True, exist_ok=True)
  args.output.write_bytes(gzip.compress(json.dumps(data).encode(), mtime=0))


if __name__ == "__main__":
  main()
