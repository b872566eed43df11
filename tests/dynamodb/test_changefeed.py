"""The changefeed against a real DynamoDB interface; only RisingWave's cursor is scripted."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, ReadTimeoutError
from declared import enrolments
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_risingwave import ScriptedRisingWave
from shipped import LONG

from dagster_prefs.dynamodb import changefeed
from dagster_prefs.dynamodb.access import ItemAccess
from dagster_prefs.dynamodb.changefeed import ChangefeedReport, publish_changes
from dagster_prefs.dynamodb.lease import LEASE_IDS, LeaseState, read_lease
from dagster_prefs.dynamodb.publisher import PublishError
from dagster_prefs.dynamodb.store import DomainStore
from dagster_prefs.dynamodb.tables import dynamodb_client, provision

KEY = "engagement#interactions"
# How long a holder that died keeps others waiting in these tests.
PROMISE = 0.02


def row(likes: int, at: int = 1) -> tuple[int, int, int, int]:
    return (likes, 2, 3, at)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_prefs.dynamodb.lease.time.sleep", lambda seconds: None)


@pytest.fixture
def server(contract: Any) -> ScriptedRisingWave:
    return ScriptedRisingWave(contract, contract.domain("interactions"))


def publish(store: Any, server: Any, client: Any = None, **options: Any) -> ChangefeedReport:
    arguments: dict[str, Any] = {"mode": "once", "stop": threading.Event(), "label": "test", **options}
    (report,) = publish_changes(
        [replace(store.domain("interactions", client), engine=server)], lease_seconds=PROMISE, **arguments
    )
    return report


def likes(store: Any) -> dict[int, int]:
    """Viewer → likes of each item of the domain."""
    return {
        viewer: int(item[f"likes_{LONG}d"]["N"]) for (viewer, _), item in store.items("interactions").items()
    }


def wanted(server: ScriptedRisingWave) -> dict[int, int]:
    return {viewer: values[0] for viewer, values in server.rows.items()}


def lease(store: Any) -> LeaseState:
    found = read_lease(
        ItemAccess(store.client, store.contract.tables["viewer"], store.table.name),
        store.contract.domain("interactions"),
    )
    assert found is not None
    return found


class Wire:
    """The real client, with something in the way of its writes of items."""

    def __init__(self, client: Any, plan: Callable[[Callable[[], Any], int], Any]) -> None:
        self._client = client
        self._plan = plan
        self.calls = 0
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def transact_write_items(self, **request: Any) -> Any:
        self.calls += 1
        self.sizes.append(len(request["TransactItems"]))
        return self._plan(lambda: self._client.transact_write_items(**request), self.calls)


class Crash(BaseException):
    """The process dies here."""


class Mortal:
    """A client of a process that is killed around its n-th request that changes something."""

    def __init__(self, client: Any, dies_at: int, after: bool) -> None:
        self._client = client
        self.left = dies_at
        self.after = after

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)
        if name in ("exceptions", "meta"):
            return real

        def call(**request: Any) -> Any:
            if self.left < 0:
                raise Crash
            if name in ("put_item", "transact_write_items"):
                self.left -= 1
                if self.left < 0:
                    if self.after:
                        real(**request)
                    raise Crash
            return real(**request)

        return call


def cancelled(*codes: str) -> ClientError:
    return ClientError(
        {
            "Error": {"Code": "TransactionCanceledException", "Message": "cancelled"},
            "CancellationReasons": [{"Code": code, "Message": f"about {code}"} for code in codes],
        },  # type: ignore[typeddict-unknown-key]
        "TransactWriteItems",
    )


def test_changes_are_written_in_order_and_deletes_too(store: Any, server: ScriptedRisingWave) -> None:
    server.change({1: row(1), 2: row(1), 3: row(1)})
    first = publish(store, server)
    assert (first.upserts, first.deletes, first.resyncs) == (3, 0, 1)
    server.change({1: row(2), 2: None})
    server.change({1: row(3), 4: row(1)})
    server.change({4: None, 2: row(9)})
    server.page = 1
    second = publish(store, server)
    assert second.resyncs == 0
    assert likes(store) == wanted(server) == {1: 3, 2: 9, 3: 1}
    # The whole item, as the contract has it, and nothing else.
    assert store.items("interactions")[(2, KEY)] == {
        "viewer_id": {"N": "2"}, "domain_key": {"S": KEY}, f"likes_{LONG}d": {"N": "9"},
        f"shares_{LONG}d": {"N": "2"}, f"searches_{LONG}d": {"N": "3"}, "last_event_at": {"N": "1"},
    }  # fmt: skip


def test_changes_of_a_key_are_coalesced(store: Any, server: ScriptedRisingWave) -> None:
    publish(store, server)
    for number in range(1, 40):
        server.change({1: row(number), 2: None if number % 2 else row(number)})
    wire = Wire(store.client, lambda send, number: send())
    report = publish(store, server, wire)
    assert (report.upserts, report.deletes, wire.calls) == (1, 1, 2)
    assert likes(store) == {1: 39}


def test_transactions_keep_within_what_dynamodb_takes(
    store: Any, server: ScriptedRisingWave, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, server)
    moment = server.change({viewer: row(viewer) for viewer in range(12)})
    monkeypatch.setattr(changefeed, "TRANSACTION_ITEMS", 5)
    wire = Wire(store.client, lambda send, number: send())
    publish(store, server, wire)
    # The lease is one of the actions of each.
    assert wire.sizes == [6, 6, 3]
    assert lease(store).token == moment
    server.change({viewer: row(100 + viewer) for viewer in range(12)})
    # An item with its key and names weighs 90 bytes or so: two of them fit.
    monkeypatch.setattr(changefeed, "TRANSACTION_BYTES", 220)
    wire = Wire(store.client, lambda send, number: send())
    publish(store, server, wire)
    # Those of the token's own moment come again, and a later value of the same viewer replaces them.
    assert max(wire.sizes) == 3
    assert likes(store) == wanted(server)


def test_a_row_that_moves_within_the_view_keeps_its_item(store: Any, server: ScriptedRisingWave) -> None:
    server.change({1: row(1), 2: row(1)})
    publish(store, server)
    # The same viewer under another key of the view: the engine may tell its return before its removal.
    server.now += 1000
    server.log += [(server.now, "Insert", 1, row(5)), (server.now, "Delete", 1, row(1))]
    server.rows[1] = row(5)
    server.change({2: None})
    server.page = 1
    publish(store, server)
    assert likes(store) == {1: 5}


def test_an_older_token_replays_to_the_same_state(store: Any, server: ScriptedRisingWave) -> None:
    moments = [server.change({1: row(n), 2: row(n) if n % 3 else None, n: row(n)}) for n in range(3, 9)]
    server.change({5: None})
    publish(store, server)
    after = store.items("interactions")
    for moment in moments:
        store.client.update_item(
            TableName=store.table.name,
            Key={"viewer_id": {"N": str(LEASE_IDS["N"])}, "domain_key": {"S": f"publisher#{KEY}"}},
            UpdateExpression="set #t = :t",
            ExpressionAttributeNames={"#t": "token"},
            ExpressionAttributeValues={":t": {"N": str(moment)}},
        )
        assert publish(store, server).resyncs == 0
        assert store.items("interactions") == after


def test_an_expired_token_compares_the_whole_view(store: Any, server: ScriptedRisingWave) -> None:
    server.change({viewer: row(1) for viewer in range(5)})
    publish(store, server)
    other = {"viewer_id": {"N": "77"}, "domain_key": {"S": "engagement#watch"}}
    store.client.put_item(TableName=store.table.name, Item=other)
    server.change({1: row(2), 2: None, 9: row(1)})
    # Those changes are gone when the publisher comes back.
    server.log.clear()
    server.change({3: row(4)})
    server.retained_from = server.now
    report = publish(store, server)
    assert server.declared[-1].endswith("full")
    assert (report.resyncs, report.upserts, report.deletes, report.unchanged) == (1, 3, 1, 2)
    assert likes(store) == wanted(server) == {0: 1, 1: 2, 3: 4, 4: 1, 9: 1}
    assert store.items("watch") == {(77, "engagement#watch"): other}
    again = publish(store, server)
    # The moment of the token itself is read again.
    assert (again.resyncs, again.upserts, again.deletes) == (0, 1, 0)


@pytest.mark.parametrize("made", ["another subscription", "another view", "another table"])
def test_a_token_is_of_one_subscription_view_and_table(
    store: Any, server: ScriptedRisingWave, made: str
) -> None:
    server.change({1: row(1), 2: row(1)})
    publish(store, server)
    # Changes between the old subscription and the new one are in neither.
    server.rows = {1: row(8)}
    if made == "another table":
        store.recreate_table()
    else:
        subscription = (8, "made later", 5, server.domain.relation)
        server.subscription = (
            subscription if made == "another subscription" else (7, "made", 6, server.domain.relation)
        )
    assert publish(store, server).resyncs == 1
    assert likes(store) == {1: 8}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"subscription": None}, r"has no subscription sink_engagement_interactions: run `dbt run --select"),
        (
            {"subscription": (7, "made", 5, "content_interactions_rolling_old")},
            r"reads content_interactions_rolling_old and not content_interactions_rolling.*--full-refresh",
        ),
        ({"columns": {"viewer_id": "bigint"}}, r"is not as the contract says: domain_key is missing"),
        ({"kind": "local"}, r"set PREFS_PUBLISH=publisher"),
        ({"broken": 1}, r"the engine failed while its changes were read \(server closed the connection"),
    ],
)
def test_what_cannot_be_followed_is_one_sentence(
    store: Any, server: ScriptedRisingWave, damage: dict[str, Any], message: str
) -> None:
    server.change({1: row(1)})
    for name, value in damage.items():
        setattr(server, name, value)
    with pytest.raises(PublishError, match=message):
        publish(store, server)
    assert likes(store) == {}


def test_a_row_that_cannot_be_an_item_stops_no_other(store: Any, server: ScriptedRisingWave) -> None:
    server.change({1: row(1), 2: row(1)})
    publish(store, server)
    server.change({1: (None, 2, 3, 4), 2: row(2), 3: row(3)})
    with pytest.raises(PublishError, match=f"viewer 1: likes_{LONG}d is NULL"):
        publish(store, server)
    assert likes(store) == {1: 1, 2: 2, 3: 3}
    assert lease(store).refused == 1
    # Correct by now, and no change tells so: the refused row is looked at again.
    server.rows[1] = row(7)
    assert publish(store, server).refused == 0
    assert likes(store) == {1: 7, 2: 2, 3: 3}
    assert lease(store).refused == 0


def test_an_item_that_dynamodb_refuses_is_found_and_left_out(store: Any, server: ScriptedRisingWave) -> None:
    publish(store, server)
    server.change({viewer: row(viewer) for viewer in range(1, 6)})

    def refuse_one(client: Any) -> Any:
        def transact_write_items(**request: Any) -> Any:
            viewers = [
                action["Put"]["Item"]["viewer_id"]["N"]
                for action in request["TransactItems"]
                if "Put" in action
            ]
            if "3" in viewers:
                raise cancelled(*("ValidationError" if viewer == "3" else "None" for viewer in viewers))
            return client.transact_write_items(**request)

        return transact_write_items

    wire = Wire(store.client, lambda send, number: send())
    wire.transact_write_items = refuse_one(store.client)  # type: ignore[method-assign]
    with pytest.raises(PublishError, match="viewer 3: DynamoDB refused the item: about ValidationError"):
        publish(store, server, wire)
    assert likes(store) == {1: 1, 2: 2, 4: 4, 5: 5}


def test_throttling_is_waited_out_and_its_end_is_told(store: Any, server: ScriptedRisingWave) -> None:
    publish(store, server)
    server.change({1: row(1), 2: row(2)})
    before = lease(store).token

    def throttled(send: Callable[[], Any], number: int) -> Any:
        raise cancelled("None", "ThrottlingError", "None")

    with pytest.raises(PublishError, match=r"did not accept writes .*ThrottlingError"):
        publish(store, server, Wire(store.client, throttled))
    assert likes(store) == {}
    assert lease(store).token == before

    def twice(send: Callable[[], Any], number: int) -> Any:
        if number <= 2:
            raise cancelled("TransactionConflict", "None", "None")
        return send()

    assert publish(store, server, Wire(store.client, twice)).retries == 2
    assert likes(store) == {1: 1, 2: 2}


def test_a_lost_answer_is_not_taken_for_another_writer(store: Any, server: ScriptedRisingWave) -> None:
    publish(store, server)
    server.change({1: row(1)})

    def lose_the_answer(send: Callable[[], Any], number: int) -> Any:
        send()
        raise ReadTimeoutError(endpoint_url="http://127.0.0.1")

    sent = Wire(store.client, lambda send, number: lose_the_answer(send, number) if number == 1 else send())
    assert publish(store, server, sent).upserts == 1
    assert likes(store) == {1: 1}


def test_a_writer_that_wakes_up_late_overwrites_nothing(store: Any, server: ScriptedRisingWave) -> None:
    server.change({1: row(1), 2: row(1)})
    publish(store, server)
    server.change({1: row(2), 2: row(2)})
    asleep, awake = threading.Event(), threading.Event()

    def sleep_before_sending(send: Callable[[], Any], number: int) -> Any:
        asleep.set()
        assert awake.wait(30)
        return send()

    outcome: list[BaseException | ChangefeedReport] = []

    def old_writer() -> None:
        try:
            outcome.append(publish(store, server, Wire(store.client, sleep_before_sending), label="old"))
        except PublishError as error:
            outcome.append(error)

    thread = threading.Thread(target=old_writer)
    thread.start()
    assert asleep.wait(30)
    # It has checked everything there is to check; now its request only has to leave.
    server.change({1: row(3), 2: None})
    publish(store, server, label="new")
    assert likes(store) == {1: 3}
    moved = lease(store)
    awake.set()
    thread.join(30)
    assert isinstance(outcome[0], PublishError)
    assert "another publisher has taken over" in str(outcome[0])
    assert likes(store) == {1: 3}
    assert lease(store) == moved, "not even the progress of the new writer was touched"


@pytest.mark.parametrize("viewers", [0, 3])
def test_a_domain_that_never_changed_has_a_resume_point_when_it_first_waits(
    store: Any, server: ScriptedRisingWave, viewers: int
) -> None:
    if viewers:
        server.change({viewer: row(viewer) for viewer in range(viewers)})

    def die() -> None:
        raise Crash

    server.on_wait = die
    with pytest.raises(Crash):
        publish(store, server, mode="follow")
    server.on_wait = lambda: None
    assert lease(store).token == server.now
    server.change({9: row(9)})
    report = publish(store, server)
    assert (report.resyncs, report.upserts >= 1) == (0, True)
    assert likes(store) == wanted(server)


def test_a_resume_point_vouches_for_nothing_that_the_cursor_did_not_know(
    store: Any, server: ScriptedRisingWave
) -> None:
    server.change({1: row(1), 2: row(1)})
    server.lag()
    # Committed, but unknown to the frontend that answers the cursor.
    server.change({1: row(7), 2: None})
    server.change({3: row(3)})

    def die() -> None:
        raise Crash

    server.on_wait = die
    with pytest.raises(Crash):
        publish(store, server, mode="follow")
    server.on_wait = lambda: None
    server.lag()
    assert publish(store, server).resyncs == 0
    assert likes(store) == wanted(server) == {1: 7, 3: 3}


def test_a_second_publisher_is_told_who_works(store: Any, server: ScriptedRisingWave) -> None:
    stop = threading.Event()
    server.change({1: row(1)})
    follower = threading.Thread(
        target=publish, args=(store, server), kwargs={"mode": "follow", "stop": stop, "label": "host-1"}
    )
    follower.start()
    try:
        with pytest.raises(PublishError, match="host-1 already publishes it"):
            # A follower that works for once moves its lease many times within what it promised.
            publish_once_patiently(store, server)
    finally:
        stop.set()
        follower.join(30)
    assert lease(store).holder == ""
    publish(store, server)
    assert likes(store) == {1: 1}


def publish_once_patiently(store: Any, server: ScriptedRisingWave) -> None:
    from dagster_prefs.dynamodb.lease import Fenced, Lease

    waiting = Lease(store.domain("interactions"), label="host-2", mode="once", lease_seconds=PROMISE)
    poll = threading.Event()
    while not (found := read_lease(waiting.items, waiting.domain)) or not found.holder:
        poll.wait(0.01)
    frozen = iter(range(1_000_000))
    # On this clock no promise ever runs out, however slow the machine is.
    waiting._clock = lambda: next(frozen) * 1e-9
    try:
        waiting.acquire(threading.Event(), 0.0)
    except Fenced as error:
        raise PublishError(str(error)) from None


def test_a_follower_outlasts_the_engine_and_stops_in_order(
    store: Any, server: ScriptedRisingWave, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changefeed, "QUIET_SECONDS", 0.0)
    stop = threading.Event()
    told: list[str] = []
    server.change({1: row(1)})
    follower = threading.Thread(
        target=publish, args=(store, server), kwargs={"mode": "follow", "stop": stop, "notify": told.append}
    )
    follower.start()
    poll = threading.Event()

    def until(condition: Callable[[], bool]) -> None:
        for _ in range(3000):
            if condition():
                return
            poll.wait(0.01)
        raise AssertionError(f"it never became so: {told}, {likes(store)}, {lease(store)}")

    until(lambda: likes(store) == {1: 1})
    server.change({1: row(2), 2: row(2)})
    until(lambda: likes(store) == {1: 2, 2: 2})
    server.broken = 1
    server.change({2: None})
    until(lambda: likes(store) == {1: 2})
    # Nothing changes any more, and yet the token moves, so that it never falls out of the retention.
    server.now += 50_000
    until(lambda: lease(store).token == server.now)
    stop.set()
    follower.join(30)
    assert lease(store).holder == ""
    assert lease(store).mode == "follow"


change_sets = st.lists(
    st.dictionaries(st.integers(1, 4), st.none() | st.integers(0, 3), min_size=1, max_size=3),
    min_size=1,
    max_size=4,
)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    rounds=st.lists(
        st.tuples(
            change_sets, st.integers(0, 5), st.booleans(), st.booleans(), st.sampled_from([1, 2, 1000])
        ),
        min_size=1,
        max_size=3,
    )
)
def test_a_crash_at_any_point_ends_in_the_state_of_the_view(
    store: Any,
    rounds: list[tuple[list[dict[int, int | None]], int, bool, bool, int]],
) -> None:
    store.recreate_table()
    server = ScriptedRisingWave(store.contract, store.contract.domain("interactions"))
    store.client.put_item(
        TableName=store.table.name, Item={"viewer_id": {"N": "4"}, "domain_key": {"S": KEY}}
    )
    for changes, dies_at, after, expires, page in rounds:
        server.page = page
        for moment in changes:
            server.change({viewer: None if n is None else row(n) for viewer, n in moment.items()})
        if expires:
            server.log.clear()
            server.retained_from = server.now + 1000
            server.now += 1000
        try:
            publish(store, server, Mortal(store.client, dies_at, after))
        except Crash:
            continue
        assert likes(store) == wanted(server)
    publish(store, server)
    assert likes(store) == wanted(server)


def test_the_changes_of_a_composite_key_are_written(dynamodb_endpoint: str, tmp_path: Path) -> None:
    """Learner and course: items under the encoded rest of the key, alike in a change, a repair and a refusal."""
    contract = enrolments(tmp_path).contract
    domain, keys = contract.domain("course"), contract.tables["enrolment"]
    client = dynamodb_client(dynamodb_endpoint, "eu-central-1")
    tables = provision(client, contract, prefix=f"composite_{uuid.uuid4().hex[:12]}_")
    server: Any = ScriptedRisingWave(contract, domain)
    store = DomainStore(server, client, contract, domain, tables["enrolment"])

    def published() -> ChangefeedReport:
        (report,) = publish_changes(
            [store], mode="once", stop=threading.Event(), label="test", lease_seconds=PROMISE
        )
        return report

    def lessons() -> dict[Any, int]:
        """The learner and course of each item of the domain, and its count of lessons."""
        items = client.scan(TableName=store.table.name, ConsistentRead=True)["Items"]
        found = {keys.split_key(item): item for item in items if item["learner_id"]["S"] != LEASE_IDS["S"]}
        assert {key for _, key in found} <= {domain.key}
        return {id_: int(item["course_lessons_7d"]["N"]) for (id_, _), item in found.items()}

    def course(number: int) -> tuple[int, Decimal, int]:
        return (number, Decimal("1.5"), 1)

    # Pairs that would be one text if the separator were not encoded, and a text to be quoted.
    same = [("a", "b#c"), ("a#b", "c"), ("a", "b%23c"), ("a", "b"), ("it's, l", "c")]
    try:
        server.change({id_: course(number) for number, id_ in enumerate(same)})
        assert (published().resyncs, lessons()) == (1, {id_: number for number, id_ in enumerate(same)})
        # One course of a learner ends, another one changes, a third one is untouched.
        server.change({("a", "b#c"): None, ("a", "b"): course(7)})
        second = published()
        assert (second.resyncs, second.deletes) == (0, 1)
        assert lessons() == {("a#b", "c"): 1, ("a", "b%23c"): 2, ("a", "b"): 7, same[-1]: 4}
        assert client.get_item(
            TableName=store.table.name,
            Key={"learner_id": {"S": "a"}, "domain_key": {"S": "learning#course#b%2523c"}},
        )["Item"]["course_lessons_7d"] == {"N": "2"}
        # The changes are lost: the whole view is compared, and of a learner only the course without a row goes.
        server.change({("a", "b%23c"): None, same[-1]: course(9)})
        server.log.clear()
        server.change({("z", "z"): course(3)})
        server.retained_from = server.now
        report = published()
        assert (report.resyncs, report.deletes) == (1, 1)
        assert lessons() == {("a#b", "c"): 1, ("a", "b"): 7, same[-1]: 9, ("z", "z"): 3}
        # A row without one part of its key is nobody's.
        server.change({("a", None): course(1), ("a", "d"): course(2)})
        with pytest.raises(
            PublishError, match=r"domain course: a row has NULL in its key \(learner_id, course_id\)"
        ):
            published()
        assert lessons()["a", "d"] == 2
    finally:
        for table in tables.values():
            client.delete_table(TableName=table.name)
