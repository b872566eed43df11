"""What IAM answers to a request, for the parts of the policy language that the module uses.

Written from AWS's description of the evaluation logic, and not from the module; anything it does not know
raises, so that a policy that grows beyond it cannot pass unread.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Context = Mapping[str, str | Sequence[str]]

ALLOWED = "allowed"
EXPLICITLY_DENIED = "explicitly denied"
NOT_ALLOWED = "not allowed"

_STATEMENT_KEYS = {"Sid", "Effect", "Action", "Resource", "Principal", "Condition"}


def decide(
    documents: Iterable[Mapping[str, Any]],
    action: str,
    resource: str | None = None,
    context: Context | None = None,
    principal: tuple[str, str] | None = None,
) -> str:
    """ALLOWED, EXPLICITLY_DENIED or NOT_ALLOWED for one request.

    `resource` is an ARN, None for a trust policy, which has no resource. `context` holds the request's
    condition keys, absent keys left out. `principal` is the caller as (kind, name), e.g.
    ("AWS", "arn:aws:iam::123456789012:role/api"), for policies that name principals.

    Raises ValueError for an element or operator of the policy language that is not covered here.
    """
    effects = set()
    for document in documents:
        if document.get("Version") != "2012-10-17":
            raise ValueError(f"policy version {document.get('Version')!r} has other rules")
        for statement in _list(document["Statement"]):
            unknown = set(statement) - _STATEMENT_KEYS
            if unknown:
                raise ValueError(f"statement elements not covered: {sorted(unknown)}")
            if (
                any(_matches(action, pattern, ignore_case=True) for pattern in _list(statement["Action"]))
                and _resource_matches(statement, resource)
                and _principal_matches(statement, principal)
                and _conditions_hold(statement.get("Condition", {}), context or {})
            ):
                effects.add(statement["Effect"])
    if "Deny" in effects:
        return EXPLICITLY_DENIED
    return ALLOWED if "Allow" in effects else NOT_ALLOWED


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _matches(text: str, pattern: str, *, ignore_case: bool = False) -> bool:
    if "${" in pattern:
        raise ValueError(f"policy variables are not covered: {pattern}")
    expression = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return re.fullmatch(expression, text, re.DOTALL | (re.IGNORECASE if ignore_case else 0)) is not None


def _resource_matches(statement: Mapping[str, Any], resource: str | None) -> bool:
    if "Resource" not in statement:
        return resource is None
    return resource is not None and any(_matches(resource, entry) for entry in _list(statement["Resource"]))


def _principal_matches(statement: Mapping[str, Any], principal: tuple[str, str] | None) -> bool:
    if "Principal" not in statement:
        return principal is None
    if principal is None:
        raise ValueError("the policy names principals: say who asks")
    if statement["Principal"] == "*":
        return True
    kind, name = principal
    for trusted in _list(statement["Principal"].get(kind, [])):
        if trusted in ("*", name):
            return True
        # An account stands for everybody in it whom its own policies let through.
        account = re.fullmatch(r"arn:[a-z-]+:iam::(\d{12}):root", trusted)
        if kind == "AWS" and account and re.match(rf"arn:[a-z-]+:(iam|sts)::{account[1]}:", name):
            return True
    return False


def _conditions_hold(block: Mapping[str, Mapping[str, Any]], context: Context) -> bool:
    present = {key.lower(): _list(list(value) if not isinstance(value, str) else value)
               for key, value in context.items()}  # fmt: skip
    return all(
        _condition_holds(operator, present.get(key.lower()), [str(entry) for entry in _list(wanted)])
        for operator, tests in block.items()
        for key, wanted in tests.items()
    )


def _condition_holds(operator: str, found: list[str] | None, wanted: list[str]) -> bool:
    if operator == "Null":
        return any((entry.lower() == "true") == (not found) for entry in wanted)
    quantifier, _, name = operator.rpartition(":")
    if_exists = name.endswith("IfExists")
    name = name.removesuffix("IfExists")
    one_holds = _OPERATORS.get(name)
    if one_holds is None or quantifier not in ("", "ForAllValues", "ForAnyValue"):
        raise ValueError(f"condition operator not covered: {operator}")
    if not found:
        return if_exists or quantifier == "ForAllValues"
    if not quantifier and len(found) > 1:
        raise ValueError(f"{operator} compares one value, the request has {len(found)}")
    hits = [any(one_holds(value, entry) for entry in wanted) for value in found]
    return any(hits) if quantifier == "ForAnyValue" else all(hits)


_OPERATORS = {
    "StringEquals": lambda value, entry: value == entry,
    "StringLike": lambda value, entry: _matches(value, entry),
    "Bool": lambda value, entry: value.lower() == entry.lower(),
    "NumericLessThan": lambda value, entry: float(value) < float(entry),
}
