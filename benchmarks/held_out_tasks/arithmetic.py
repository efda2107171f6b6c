"""Evaluates arithmetic that a model wrote: numbers, names, + - * /, squares and brackets, and nothing else."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LONGEST = 100


class ExpressionError(ValueError):
    """The text is no expression that can be evaluated; the message is a sentence that says why."""


def evaluate(text: str, names: Mapping[str, float]) -> float:
    """Evaluate an expression.

    Args:
        text: The expression, of at most 100 characters, so that no number in it grows beyond all bounds.
        names: The values of the names that may occur.

    Raises:
        ExpressionError: The text is something else, or divides by zero.
    """
    if len(text) > _LONGEST:
        raise ExpressionError(f"it has {len(text)} characters, and {_LONGEST} are allowed.")
    try:
        tree = ast.parse(text, mode="eval")
        return _value(tree.body, names)
    except SyntaxError as error:
        raise ExpressionError(f"it is not a Python expression ({error.msg}).") from None
    except ZeroDivisionError:
        raise ExpressionError("it divides by zero.") from None
    except (ValueError, OverflowError, MemoryError, RecursionError) as error:
        if isinstance(error, ExpressionError):
            raise
        raise ExpressionError("it is not a Python expression that can be read.") from None


def _value(node: ast.expr, names: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Name(id=name):
            if name not in names:
                raise ExpressionError(f"the name {name} is unknown; there is {', '.join(names)}.")
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=2)):
            return _value(left, names) ** 2
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, names), _value(right, names))
    raise ExpressionError(f"{ast.unparse(node)[:40]} is more than arithmetic.")
