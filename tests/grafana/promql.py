"""What a PromQL expression asks for: metrics, labels and joins, as a real parser sees them.

For the tests of rules and of dashboards. Grafana's variables (``$instance``, ``$__rate_interval``) are no PromQL: put
values in their place first. Functions raise ValueError for an expression that cannot be parsed, and for a label that
an expression groups, joins or matches by where it cannot be: such a query is no error to Prometheus, it finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Final, NamedTuple

import promql_parser as ast

NAME: Final = "__name__"
# A scrape gives these to every series.
TARGET_LABELS: Final = frozenset({"job", "instance"})
_SET_OPERATORS: Final = {"and", "or", "unless"}
# These give back series that they were given, with all labels.
_CHOOSING_AGGREGATIONS: Final = {"topk", "bottomk"}
_LABEL_MAKERS: Final = {"label_replace", "label_join"}


class Selector(NamedTuple):
    """A selector: a metric, and the names of the labels that it matches by."""

    metric: str
    labels: frozenset[str]


class Join(NamedTuple):
    """A binary operator between two vectors.

    ``on`` is None where it says ``ignoring``, or nothing; ``grouped`` tells whether it is group_left or group_right,
    and ``group_labels`` are those that it brings along.
    """

    operator: str
    on: frozenset[str] | None
    grouped: bool
    group_labels: frozenset[str]


def walk(expr: ast.Expr) -> Iterator[ast.Expr]:
    """Yield an expression and all expressions in it."""
    yield expr
    children: list[object] = []
    if isinstance(expr, ast.BinaryExpr):
        children = [expr.lhs, expr.rhs]
    elif isinstance(expr, ast.AggregateExpr):
        children = [expr.param, expr.expr]
    elif isinstance(expr, ast.Call):
        children = list(expr.args)
    elif isinstance(expr, ast.MatrixSelector):
        children = [expr.vector_selector]
    elif isinstance(expr, ast.ParenExpr | ast.UnaryExpr | ast.SubqueryExpr):
        children = [expr.expr]
    for child in children:
        if isinstance(child, ast.Expr):
            yield from walk(child)


def find_selectors(expr: str) -> list[Selector]:
    """Find the metrics that an expression asks for, each with the labels that it matches by."""
    return [
        Selector(_find_name(node), frozenset(matcher.name for matcher in node.matchers.matchers) - {NAME})
        for node in walk(ast.parse(expr))
        if isinstance(node, ast.VectorSelector)
    ]


def find_grouping_labels(expr: str) -> set[str]:
    """Find the labels that an expression aggregates, joins or groups by, and those that it brings along."""
    labels: set[str] = set()
    for node in walk(ast.parse(expr)):
        if isinstance(node, ast.AggregateExpr) and node.modifier:
            labels.update(node.modifier.labels)
    for join in find_joins(expr):
        labels |= join.group_labels | (join.on or frozenset())
    return labels


def find_joins(expr: str) -> list[Join]:
    """Find the operators between two vectors, ``and``, ``or`` and ``unless`` among them."""
    joins = []
    for node in walk(ast.parse(expr)):
        if isinstance(node, ast.BinaryExpr) and _is_vector(node.lhs) and _is_vector(node.rhs):
            modifier = node.modifier
            matching = modifier.matching if modifier else None
            on = matching and matching.type == ast.LabelModifierType.Include
            joins.append(
                Join(
                    operator=str(node.op),
                    on=frozenset(matching.labels) if matching and on else None,
                    grouped=_is_grouped(modifier),
                    group_labels=frozenset(modifier.group_labels or () if modifier else ()),
                )
            )
    return joins


def find_labels(
    expr: str, labels_of: Callable[[str], Collection[str]], target_labels: Collection[str] = TARGET_LABELS
) -> set[str]:
    """Find the labels that an expression's series can have; ``labels_of`` gives a metric's own.

    ``target_labels`` are on every series besides; there may be none, where ``labels_of`` knows better.
    Raises ValueError where the expression uses a label that is not there: in a matcher, in ``by``, in a join.
    """
    return _Labels(labels_of, target_labels).find(ast.parse(expr))


class _Labels:
    def __init__(self, labels_of: Callable[[str], Collection[str]], target_labels: Collection[str]) -> None:
        self._labels_of, self._target_labels = labels_of, target_labels

    def find(self, expr: ast.Expr) -> set[str]:
        """Return the labels of the series that ``expr`` gives."""
        match expr:
            case ast.VectorSelector():
                labels = self._find_in_selector(expr)
            case ast.MatrixSelector():
                labels = self.find(expr.vector_selector)
            case ast.ParenExpr() | ast.UnaryExpr() | ast.SubqueryExpr():
                labels = self.find(expr.expr)
            case ast.AggregateExpr():
                labels = self._find_in_aggregation(expr)
            case ast.BinaryExpr():
                labels = self._find_in_operation(expr)
            case ast.Call():
                labels = self._find_in_call(expr)
            case _:
                labels = set()
        return labels

    def _find_in_selector(self, selector: ast.VectorSelector) -> set[str]:
        labels = {*self._labels_of(_find_name(selector)), *self._target_labels}
        _require({matcher.name for matcher in selector.matchers.matchers} - {NAME}, labels, str(selector))
        return labels

    def _find_in_aggregation(self, expr: ast.AggregateExpr) -> set[str]:
        labels, operator = self.find(expr.expr), str(expr.op)
        if operator in _CHOOSING_AGGREGATIONS:
            return labels
        made = {expr.param.val} if operator == "count_values" and isinstance(expr.param, ast.StringLiteral) else set()
        if expr.modifier is None:
            return made
        named = set(expr.modifier.labels)
        _require(named, labels, operator)
        return made | (named if expr.modifier.type == ast.AggModifierType.By else labels - named)

    def _find_in_operation(self, expr: ast.BinaryExpr) -> set[str]:
        sides = [self.find(side) for side in (expr.lhs, expr.rhs) if _is_vector(side)]
        if len(sides) < 2:
            return sides[0] if sides else set()
        left, right = sides
        operator, modifier = str(expr.op), expr.modifier
        matching = modifier.matching if modifier else None
        named = set(matching.labels) if matching else set()
        on = matching is not None and matching.type == ast.LabelModifierType.Include
        if on:
            _require(named, left, f"the left side of {operator}")
            _require(named, right, f"the right side of {operator}")
        if operator in _SET_OPERATORS:
            return left | right if operator == "or" else left
        if modifier is None or not _is_grouped(modifier):
            return named if on else left - named
        many, one = (left, right) if modifier.card == ast.VectorMatchCardinality.ManyToOne else (right, left)
        brought = set(modifier.group_labels or ())
        _require(brought, one, f"what {operator} brings along")
        return many | brought

    def _find_in_call(self, call: ast.Call) -> set[str]:
        labels: set[str] = set()
        for argument in call.args:
            labels |= self.find(argument)
        name = call.func.name
        if name in {"absent", "absent_over_time"}:
            equal = [node for node in walk(call) if isinstance(node, ast.VectorSelector)]
            return {m.name for node in equal for m in node.matchers.matchers if m.op == ast.MatchOp.Equal} - {NAME}
        if name in _LABEL_MAKERS:
            texts = [argument.val for argument in call.args if isinstance(argument, ast.StringLiteral)]
            _require({texts[2]} if name == "label_replace" else set(texts[2:]), labels, name)
            return labels | {texts[0]}
        return set() if name == "scalar" else labels


def _require(wanted: set[str], labels: set[str], place: str) -> None:
    if missing := wanted - labels:
        raise ValueError(f"{place}: no label {', '.join(sorted(missing))} there, only {', '.join(sorted(labels))}")


def _find_name(selector: ast.VectorSelector) -> str:
    if selector.name:
        return selector.name
    return next((matcher.value for matcher in selector.matchers.matchers if matcher.name == NAME), "")


def _is_grouped(modifier: ast.BinModifier | None) -> bool:
    many = (ast.VectorMatchCardinality.ManyToOne, ast.VectorMatchCardinality.OneToMany)
    return modifier is not None and modifier.card in many


def _is_vector(expr: ast.Expr) -> bool:
    """Tell whether an expression gives a vector, and not a single number or a text."""
    if isinstance(expr, ast.ParenExpr | ast.UnaryExpr):
        return _is_vector(expr.expr)
    if isinstance(expr, ast.BinaryExpr):
        return _is_vector(expr.lhs) or _is_vector(expr.rhs)
    if isinstance(expr, ast.Call):
        return bool(expr.func.return_type == ast.ValueType.Vector)
    return not isinstance(expr, ast.NumberLiteral | ast.StringLiteral)
