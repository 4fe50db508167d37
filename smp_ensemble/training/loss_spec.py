"""The small language that losses are written in: `dice+bce`, `0.5*lovasz+0.5*focal(gamma=2,alpha=0.25)`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from smp_ensemble.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

Value = float | int | bool | str | list["Value"] | None
"""What a parameter may be: JSON's literals, without objects."""

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<string>"[^"]*"|'[^']*')
      | (?P<sign>[-+*(),=\[\]])
      | (?P<wrong>\S)
    )""",
    re.VERBOSE,
)
_WORDS: Mapping[str, Value] = {"true": True, "false": False, "null": None, "none": None}
_EXAMPLE = "write terms like '0.5*dice+0.5*focal(gamma=2)'"


@dataclass(frozen=True)
class Term:
    """One loss of a weighted sum: `weight * name(**parameters)`."""

    name: str
    weight: float = 1.0
    parameters: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


class _Parser:
    """Recursive descent over the tokens of one specification.

    A number takes a sign of its own only where a value may stand, so that `dice+0.5*bce` is two terms.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.at = 0
        self.token = self._read(signed=False)

    def _read(self, *, signed: bool) -> _Token:
        match = _TOKEN.match(self.spec, self.at)
        if match is None:
            return _Token("end", "", len(self.spec))
        kind = str(match.lastgroup)
        text, end = match.group(kind), match.end()
        if kind == "number" and text[0] in "+-" and not signed:
            kind, text, end = "sign", text[0], match.start(kind) + 1
        self.at = end
        return _Token(kind, text, match.start(match.lastgroup or 0))

    def fail(self, expected: str) -> NoReturn:
        came = f"'{self.token.text}'" if self.token.text else "the end"
        raise ConfigError(
            f"loss '{self.spec}': expected {expected}, came {came} at character {self.token.at + 1}: {_EXAMPLE}"
        )

    def take(self, sign: str) -> bool:
        """Passes over `sign` if it is next; a value may follow `=`, `[` and `,`, so these allow a signed number."""
        if self.token.kind != "sign" or self.token.text != sign:
            return False
        self.token = self._read(signed=sign in "=[,")
        return True

    def advance(self) -> str:
        text = self.token.text
        self.token = self._read(signed=False)
        return text

    def terms(self) -> tuple[Term, ...]:
        terms = [self.term()]
        while self.take("+"):
            terms.append(self.term())
        if self.token.kind != "end":
            self.fail("'+' or the end")
        return tuple(terms)

    def term(self) -> Term:
        weight = 1.0
        if self.token.kind == "number":
            weight = float(self.token.text)
            if not 0 < weight < float("inf"):
                self.fail("a positive weight")
            self.advance()
            if not self.take("*"):
                self.fail("'*' after a weight")
        if self.token.kind != "name":
            self.fail("a weight or the name of a loss")
        name = self.advance().lower()
        parameters: dict[str, Value] = {}
        if self.take("(") and not self.take(")"):
            self.parameter(parameters)
            while self.take(","):
                self.parameter(parameters)
            if not self.take(")"):
                self.fail("',' or ')'")
        return Term(name, weight, parameters)

    def parameter(self, parameters: dict[str, Value]) -> None:
        if self.token.kind != "name":
            self.fail("a parameter as name=value")
        if self.token.text in parameters:
            self.fail("each parameter once")
        key = self.advance()
        if not self.take("="):
            self.fail(f"'=' after '{key}'")
        parameters[key] = self.value()

    def value(self) -> Value:
        kind, text = self.token.kind, self.token.text
        if kind == "number":
            self.advance()
            return int(text) if text.lstrip("+-").isdigit() else float(text)
        if kind == "string":
            return self.advance()[1:-1]
        if kind == "name" and text.lower() in _WORDS:
            return _WORDS[self.advance().lower()]
        if self.take("["):
            items: list[Value] = []
            while not self.take("]"):
                if items and not self.take(","):
                    self.fail("',' or ']'")
                items.append(self.value())
            return items
        return self.fail('a value: a number, true, false, null, a "string" or a [list]')


def parse_loss(spec: str) -> tuple[Term, ...]:
    """Reads terms joined by `+`, each `weight*name(parameter=value,...)`, weight and parameters optional.

    Args:
        spec: What the user typed. Values are numbers, `true`, `false`, `null`, quoted strings or `[lists]` of these.

    Raises:
        ConfigError: It does not follow the grammar; the message says where and what was expected there.

    Example:
        >>> parse_loss("dice + 0.5*focal(gamma=2)")
        (Term(name='dice', weight=1.0, parameters={}), Term(name='focal', weight=0.5, parameters={'gamma': 2}))
    """
    return _Parser(spec).terms()
