"""The evaluator itself, against cases whose answers AWS's documentation gives."""

from __future__ import annotations

from typing import Any

import pytest
from iam_policy import ALLOWED, EXPLICITLY_DENIED, NOT_ALLOWED, decide

TABLE = "arn:aws:dynamodb:eu-central-1:123456789012:table/profiles"


def policy(*statements: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"Version": "2012-10-17", "Statement": list(statements)}]


def allow(**elements: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": "dynamodb:GetItem", "Resource": TABLE} | elements


@pytest.mark.parametrize(
    ("statements", "answer"),
    [
        ([], NOT_ALLOWED),
        ([allow()], ALLOWED),
        ([allow(Action=["dynamodb:PutItem", "DYNAMODB:getitem"])], ALLOWED),
        ([allow(Action="dynamodb:Get*")], ALLOWED),
        ([allow(Action="dynamodb:GetIte?")], ALLOWED),
        ([allow(Action="dynamodb:PutItem")], NOT_ALLOWED),
        ([allow(Action="dynamodb:Get")], NOT_ALLOWED),
        ([allow(Resource="*")], ALLOWED),
        ([allow(Resource=TABLE.upper())], NOT_ALLOWED),
        ([allow(Resource=TABLE + "/index/*")], NOT_ALLOWED),
        ([allow(), allow(Effect="Deny")], EXPLICITLY_DENIED),
        ([allow(Effect="Deny", Resource="*"), allow()], EXPLICITLY_DENIED),
        ([allow(), allow(Effect="Deny", Action="dynamodb:PutItem")], ALLOWED),
    ],
)
def test_effect_action_and_resource(statements: list[dict[str, Any]], answer: str) -> None:
    assert decide(policy(*statements), "dynamodb:GetItem", TABLE) == answer


@pytest.mark.parametrize(
    ("condition", "context", "holds"),
    [
        ({"StringEquals": {"kms:ViaService": ["a", "b"]}}, {"kms:viaservice": "b"}, True),
        ({"StringEquals": {"kms:ViaService": "a"}}, {"kms:ViaService": "A"}, False),
        ({"StringEquals": {"kms:ViaService": "a"}}, {}, False),
        ({"StringEquals": {"one": "a", "two": "b"}}, {"one": "a"}, False),
        ({"StringEquals": {"one": "a", "two": "b"}}, {"one": "a", "two": "b"}, True),
        ({"StringEqualsIfExists": {"select": "COUNT"}}, {}, True),
        ({"StringEqualsIfExists": {"select": "COUNT"}}, {"select": "COUNT"}, True),
        ({"StringEqualsIfExists": {"select": "COUNT"}}, {"select": "ALL"}, False),
        ({"StringLike": {"s3:prefix": ["warehouse", "warehouse/*"]}}, {"s3:prefix": "warehouse/a/b"}, True),
        ({"StringLike": {"s3:prefix": ["warehouse", "warehouse/*"]}}, {"s3:prefix": "warehouse2"}, False),
        ({"StringLike": {"s3:prefix": "a.c"}}, {"s3:prefix": "abc"}, False),
        ({"Bool": {"aws:SecureTransport": "false"}}, {"aws:SecureTransport": "false"}, True),
        ({"Bool": {"aws:SecureTransport": "false"}}, {"aws:SecureTransport": "true"}, False),
        ({"Bool": {"aws:SecureTransport": "false"}}, {}, False),
        ({"NumericLessThan": {"s3:TlsVersion": "1.2"}}, {"s3:TlsVersion": "1.1"}, True),
        ({"NumericLessThan": {"s3:TlsVersion": "1.2"}}, {"s3:TlsVersion": "1.2"}, False),
        ({"Null": {"keys": "false"}}, {"keys": "1"}, True),
        ({"Null": {"keys": "false"}}, {}, False),
        ({"Null": {"keys": "true"}}, {}, True),
        ({"ForAllValues:StringLike": {"keys": "-*"}}, {"keys": ["-1", "-2"]}, True),
        ({"ForAllValues:StringLike": {"keys": "-*"}}, {"keys": ["-1", "2"]}, False),
        ({"ForAllValues:StringLike": {"keys": "-*"}}, {}, True),
        ({"ForAnyValue:StringEquals": {"keys": "2"}}, {"keys": ["-1", "2"]}, True),
        ({"ForAnyValue:StringEquals": {"keys": "2"}}, {}, False),
    ],
)
def test_conditions(condition: dict[str, Any], context: dict[str, Any], holds: bool) -> None:
    answer = decide(policy(allow(Condition=condition)), "dynamodb:GetItem", TABLE, context)
    assert answer == (ALLOWED if holds else NOT_ALLOWED)


@pytest.mark.parametrize(
    ("trusted", "caller", "answer"),
    [
        ("*", ("AWS", "arn:aws:iam::1:user/x"), ALLOWED),
        ({"Service": "ec2.amazonaws.com"}, ("Service", "ec2.amazonaws.com"), ALLOWED),
        ({"Service": "ec2.amazonaws.com"}, ("Service", "lambda.amazonaws.com"), NOT_ALLOWED),
        ({"AWS": "arn:aws:iam::123456789012:root"}, ("AWS", "arn:aws:iam::123456789012:role/a"), ALLOWED),
        ({"AWS": "arn:aws:iam::123456789012:root"}, ("AWS", "arn:aws:iam::210987654321:role/a"), NOT_ALLOWED),
        (
            {"AWS": "arn:aws:iam::123456789012:role/a"},
            ("AWS", "arn:aws:iam::123456789012:role/b"),
            NOT_ALLOWED,
        ),
        ({"AWS": "arn:aws:iam::123456789012:role/a"}, ("Federated", "x"), NOT_ALLOWED),
    ],
)
def test_principals(trusted: Any, caller: tuple[str, str], answer: str) -> None:
    statement = {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": trusted}
    assert decide(policy(statement), "sts:AssumeRole", principal=caller) == answer


@pytest.mark.parametrize(
    "statement",
    [
        allow(NotAction="s3:*"),
        allow(Condition={"IpAddress": {"aws:SourceIp": "10.0.0.0/8"}}),
        allow(Resource="arn:aws:s3:::${aws:username}"),
        allow(Condition={"StringEquals": {"keys": "1"}}),
    ],
)
def test_what_is_not_covered_raises(statement: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"not covered|one value"):
        decide(policy(statement), "dynamodb:GetItem", TABLE, {"aws:SourceIp": "10.1.1.1", "keys": ["1", "1"]})
