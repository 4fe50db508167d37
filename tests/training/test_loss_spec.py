"""The language of losses: what it reads, and what it says about what it cannot read."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.loss_spec import Term, parse_loss


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("dice", (Term("dice"),)),
        ("dice+bce", (Term("dice"), Term("bce"))),
        (" Dice + BCE ", (Term("dice"), Term("bce"))),
        ("dice()", (Term("dice"),)),
        ("2*dice", (Term("dice", 2.0),)),
        ("dice+.5*bce", (Term("dice"), Term("bce", 0.5))),
        ("1e-3*dice+1e+1*bce", (Term("dice", 1e-3), Term("bce", 10.0))),
        (
            "0.5*lovasz+0.5*focal(gamma=2,alpha=0.25)",
            (Term("lovasz", 0.5), Term("focal", 0.5, {"gamma": 2, "alpha": 0.25})),
        ),
        (
            "tversky(alpha = +.3, smooth=-1, log_loss=True, eps=1e-5)",
            (Term("tversky", 1.0, {"alpha": 0.3, "smooth": -1, "log_loss": True, "eps": 1e-5}),),
        ),
        ("focal(alpha=null)", (Term("focal", 1.0, {"alpha": None}),)),
        ("focal(reduction='sum')+bce", (Term("focal", 1.0, {"reduction": "sum"}), Term("bce"))),
        ('x(a="b+c)",b=[],c=[1,[2.5,"y"],-3])', (Term("x", 1.0, {"a": "b+c)", "b": [], "c": [1, [2.5, "y"], -3]}),)),
    ],
)
def test_reads(spec: str, terms: tuple[Term, ...]) -> None:
    assert parse_loss(spec) == terms


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "expected a weight or the name of a loss, came the end at character 1"),
        ("dice+", "expected a weight or the name of a loss, came the end at character 6"),
        ("+dice", r"came '\+' at character 1"),
        ("dice bce", r"expected '\+' or the end, came 'bce' at character 6"),
        ("dice-bce", r"expected '\+' or the end, came '-' at character 5"),
        ("0.5 dice", r"expected '\*' after a weight, came 'dice'"),
        ("0*dice", "expected a positive weight, came '0'"),
        ("1e999*dice", "expected a positive weight"),
        ("-1*dice", "came '-' at character 1"),
        ("dice*2", r"expected '\+' or the end, came '\*'"),
        ("focal(2)", "expected a parameter as name=value, came '2'"),
        ("focal(gamma)", r"expected '=' after 'gamma', came '\)'"),
        ("focal(gamma=)", r"expected a value: .*, came '\)'"),
        ("focal(gamma=two)", "expected a value: .*, came 'two' at character 13"),
        ("focal(gamma=2", r"expected ',' or '\)', came the end"),
        ("focal(gamma=2,)", "expected a parameter as name=value"),
        ("focal(gamma=2,gamma=3)", "expected each parameter once, came 'gamma' at character 15"),
        ("dice(classes=[1 2])", r"expected ',' or '\]', came '2'"),
        ("dice(classes=[1,])", r"expected a value: .*, came '\]'"),
        ("dice(classes=[1", r"expected ',' or '\]', came the end"),
        ('dice(reduction="sum)', "expected a value: .*, came '\"'"),
        ("__import__('os')", "expected a parameter as name=value"),
    ],
)
def test_says_where_and_what_was_expected(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_loss(spec)
    assert "\n" not in str(caught.value)


literals = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1000, 1000)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("abc +*()[],=", max_size=5),
    lambda items: st.lists(items, max_size=3),
    max_leaves=6,
)


@given(parameters=st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True), literals, max_size=3))
@settings(max_examples=50, deadline=None)
def test_reads_every_json_literal(parameters) -> None:
    """What JSON writes, apart from objects, comes back as it was."""
    spec = ",".join(f"{name}={json.dumps(value)}" for name, value in parameters.items())
    assert parse_loss(f"focal({spec})") == (Term("focal", 1.0, parameters),)


@given(spec=st.text("dice+bce*()[]=,.0123456789e- \"'", max_size=20))
@settings(max_examples=300, deadline=None)
def test_never_fails_otherwise(spec: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_loss(spec)
