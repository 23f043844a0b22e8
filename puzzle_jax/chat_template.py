"""Chat templates: Jinja sources that come with a parent, rendered as Transformers renders them."""

import datetime
import functools
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from puzzle_jax.errors import PuzzleError


def render(template: str, variables: Mapping[str, Any]) -> str:
  """The prompt that a template makes of `variables` (`messages`, `add_generation_prompt`, special tokens by role).

  Raises:
    PuzzleError: the template rejects the messages, or is none.
  """
  try:
    return _compile(template).render(tools=None, documents=None, **variables)
  except jinja2.TemplateError as e:
    raise PuzzleError(f"the parent's chat template does not accept these messages: {e}") from e


class _Generation(jinja2.ext.Extension):
  """The tag that marks the assistant's words in some templates; it changes nothing in the text."""

  tags = {"generation"}  # noqa: RUF012  (as the base class declares it)

  def parse(self, parser: Any) -> Any:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _compile(template: str) -> jinja2.Template:
  """With the environment that Transformers gives chat templates."""

  def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

  extensions = [_Generation, jinja2.ext.loopcontrols]
  env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
  env.globals["raise_exception"] = raise_exception
  env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  env.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
  return env.from_string(template)
