"""From rules over names and widths per kind to the bounds of every group."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vitprune.config.targets import Rule
from vitprune.errors import BadInput
from vitprune.groups import Group
from vitprune.pruning.constraints import UNCONSTRAINED, Constraint

WIDTHS = ("ffn", "attention", "head", "residual")  # kinds whose number of units is a width of layers


def bounds_of(
    groups: Sequence[Group], rules: Sequence[Rule], round_to: Mapping[str, int], progress: float = 1.0
) -> dict[str, Constraint]:
    """Bounds of the groups that a rule or a width holds for; the first rule that fits a name holds alone.

    `progress` is how far a gradual run is: by so much are the fractions that have to go, and a `max_sparsity` is whole
    from the start.

    Raises:
        BadInput: a rule fits no group, or no number of a group's units is within its bounds.
    """
    expressions = [re.compile(rule.match) for rule in rules]
    for number, expression in enumerate(expressions):
        if not any(expression.fullmatch(group.name) for group in groups):
            kinds = ", ".join(dict.fromkeys(group.kind for group in groups))
            raise BadInput(
                f"prune.rules.{number}: {expression.pattern!r} is the whole name of no group of kind {kinds}, such as "
                f"{groups[0].name}; vitprune inspect lists them"
            )
    found = {}
    for group in groups:
        fitting = [number for number, expression in enumerate(expressions) if expression.fullmatch(group.name)]
        final = replace(_said(rules[fitting[0]]) if fitting else UNCONSTRAINED, multiple=round_to.get(group.kind, 1))
        if fitting:
            _refuse_empty(fitting[0], rules[fitting[0]], group, final)
        own = replace(final, min_sparsity=final.min_sparsity * progress)
        own = replace(own, max_sparsity=own.min_sparsity) if final.is_fixed else own
        if own != UNCONSTRAINED:
            found[group.name] = own
    return found


def _said(rule: Rule) -> Constraint:
    if rule.ignore:
        return Constraint(0.0, 0.0)
    if rule.sparsity is not None:
        return Constraint(rule.sparsity, rule.sparsity)
    most = 1.0 if rule.max_sparsity is None else rule.max_sparsity
    return Constraint(rule.min_sparsity or 0.0, most)


def _refuse_empty(number: int, rule: Rule, group: Group, bounds: Constraint) -> None:
    """Refuse bounds that leave no number of units, of heads' channels or of blocks."""
    each = group.shape[-1] if group.kind == "attention" else group.units
    fewest, most = bounds.window(each // 2 if group.kind == "block" else each)
    if fewest > most or (each < bounds.multiple and bounds.min_sparsity > 0):
        multiple = f" in multiples of {bounds.multiple}" if bounds.multiple > 1 else ""
        raise BadInput(
            f"prune.rules.{number}: {rule.match!r} leaves {group.name} no number of its {each} units{multiple}; "
            "widen what lies between its bounds, or ignore the group"
        )
