"""A project of other people, from its events to the training set: other topics, a text key, no shop and no viewers.

Beside the learners it has an entity with a composite key, a learner's enrolment in a course.
"""

from __future__ import annotations

import csv
import http.client
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from browser import CHROMIUM, opened_browser
from declared import add_enrolments

from dagster_prefs.events.schema_registry import UNDECODED
from dagster_prefs.platform import Platform
from dagster_prefs.serving import ProfileClient
from dagster_prefs.settings import load_settings
from dagster_prefs.training.parity import ParityReport
from dagster_prefs.training.windows import choose_features
from tests.console.conftest import serving
from tests.end_to_end.conftest import PROJECT, Place

pytestmark = pytest.mark.slow

COURSES = Path("tests") / "projects" / "courses"
LEARNERS = ("ana", "007", "Zoë / 7")
COURSES_TAKEN = ("algebra", "c#1 / 50%23")
ENROLMENTS = [(learner, course) for learner in LEARNERS for course in COURSES_TAKEN]
TODAY = datetime.now(UTC).date()


@dataclass(frozen=True)
class Lesson:
    """One event as its producer means it."""

    number: int
    learner: str
    kind: str
    subject: str
    seconds: int
    day: date

    @property
    def course(self) -> str:
        return COURSES_TAKEN[self.number % 3 % 2]

    def message(self) -> str:
        return json.dumps(
            {
                "event_id": f"e{self.number}",
                "learner_id": self.learner,
                "event_type": self.kind,
                "course_id": self.course,
                "lesson_id": f"l{self.number % 7}",
                "subject": self.subject,
                "seconds": self.seconds,
                "happened_at": f"{self.day}T00:00:01Z",
            }
        )


LESSONS = [
    Lesson(number, learner, ("started", "finished")[number % 2], ("math", "art", "music")[number % 3], 17 * number,
           TODAY - timedelta(days=days))
    for number, (learner, days) in enumerate(
        ((learner, days) for learner in LEARNERS for days in (0, 1, 3, 7, 8, 27, 28, 29, 40) for _ in range(2)), 1
    )
]  # fmt: skip
REJECTED = {
    '{"event_id": "x1", "learner_id": "ana", "event_type": "danced", "happened_at": "%s"}': "unknown event_type",
    '{"event_id": "x2", "event_type": "started", "happened_at": "%s"}': "missing learner_id",
    '{"event_id": "x3", "learner_id": "canary:x", "event_type": "started", "happened_at": "%s"}': (
        "reserved learner_id"
    ),
    # In Avro with a schema that nobody knew; what was decoded arrives as JSON.
    "\x00\x00\x00\x00\x07\x02": UNDECODED,
}


def expected(
    learner: str, today: date, days: int = 28, *, with_today: bool = True, course: str | None = None
) -> dict[str, Any]:
    """A learner's numbers in plain Python, or in one course; a training value leaves out the label's own day."""
    own = [lesson for lesson in LESSONS if lesson.learner == learner and (with_today or lesson.day < today)]
    if course is not None:
        own = [lesson for lesson in own if lesson.course == course]
    short = [lesson for lesson in own if lesson.day >= today - timedelta(days=7)]
    seconds = sum(lesson.seconds for lesson in own if lesson.day >= today - timedelta(days=days))
    prefix = "" if course is None else "course_"
    return {
        f"{prefix}lessons_7d": sum(lesson.kind == "started" for lesson in short),
        f"{prefix}minutes_{days}d": round(Decimal(seconds) / 60, 6),
    }


@dataclass
class World:
    """The project in a folder of its own, deployed with its events."""

    place: Place
    project: Path
    folder: Path

    def client(self, entity: str = "learner") -> ProfileClient:
        """A client of the project as it is declared now."""
        endpoint = f"http://127.0.0.1:{self.place.environment['PREFS_LOCAL_AWS_PORT']}"
        return ProfileClient(self.project, entity=entity, endpoint_url=endpoint, region="eu-central-1")

    def numbers(self, *names: str) -> dict[str, dict[str, Any]]:
        """What is served of each learner."""
        with self.client() as client:
            return {
                learner: {name: getattr(client.get(learner).progress, name) for name in names}
                for learner in LEARNERS
            }

    def enrolments(self) -> dict[tuple[str, str], dict[str, Any]]:
        """What is served of each learner in each course; nothing where there is no item."""
        with self.client("enrolment") as client:
            found = client.get_many(ENROLMENTS)
        return {
            id_: {} if one.cold_start else {name: getattr(one.course, name) for name in names(one.course)}
            for id_, one in found.items()
        }


def names(values: Any) -> list[str]:
    return [name for name in values.__slots__ if name != "last_event_at"]


@pytest.fixture(scope="module")
def world(new_place: Callable[..., Place], tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("elsewhere")
    # The project names the platform's macros by their place beside it.
    shutil.copytree(PROJECT / "dbt_project" / "macros", folder / "dbt_project" / "macros")
    project = folder / COURSES
    shutil.copytree(PROJECT / COURSES, project, ignore=shutil.ignore_patterns("target", "logs"))
    add_enrolments(project)
    declared = project / "models" / "lesson_events.yml"
    declared.write_text(declared.read_text().replace("format: json_schema", "format: avro"))
    place = new_place(PREFS_PROJECT_DIR=str(project))
    place.ok("prefs", "generate")
    file = folder / "lessons.jsonl"
    bad = [text.replace("%s", datetime.now(UTC).isoformat()) for text in REJECTED]
    file.write_text("\n".join([*(lesson.message() for lesson in LESSONS), LESSONS[0].message(), *bad]) + "\n")
    place.ok("prefs", "up")
    place.ok("prefs", "apply")
    place.ok("prefs", "ingest", str(file))
    place.ok("prefs", "refresh")
    return World(place, project, folder)


def test_the_story(world: World, free_port: Callable[[], int]) -> None:
    """One test, because each chapter stands on the one before."""
    place = world.place

    # What was rejected, with its reason.
    rejected = json.loads(place.ok("prefs", "rejected", "--json"))
    assert rejected == {"lesson_events": dict.fromkeys(REJECTED.values(), 1)}

    # Served from DynamoDB, by the command, the client and over HTTP.
    served = {learner: expected(learner, TODAY) for learner in LEARNERS}
    assert world.numbers("lessons_7d", "minutes_28d") == served
    with world.client() as client:
        assert sorted(client.get(LEARNERS[2]).progress.favorite_subjects) == ["art", "math", "music"]
        assert client.get("nobody").progress.favorite_subjects is None
    shown = json.loads(place.ok("prefs", "profile", LEARNERS[0], "--json"))
    assert shown["domains"]["progress"]["attributes"]["lessons_7d"] == served[LEARNERS[0]]["lessons_7d"]
    taken = {id_: expected(id_[0], TODAY, course=id_[1]) for id_ in ENROLMENTS}
    assert world.enrolments() == taken
    shown = json.loads(place.ok("prefs", "profile", "--entity", "enrolment", *ENROLMENTS[1], "--json"))
    assert (shown["learner_id"], shown["course_id"]) == ENROLMENTS[1]
    told = json.loads(
        place.ok("prefs", "why", "--entity", "enrolment", *ENROLMENTS[1], "course_minutes_28d", "--json")
    )
    assert (told["equal"], len(told["tiles"]["course_lessons_1d"])) == (True, len(tile_days(*ENROLMENTS[1])))
    one, enrolment = over_http(world, free_port(), [LEARNERS[2]], ENROLMENTS[-1])
    assert one["progress"]["attributes"]["minutes_28d"] == str(expected(LEARNERS[2], TODAY)["minutes_28d"])
    assert enrolment["course"]["attributes"]["course_minutes_28d"] == str(
        taken[ENROLMENTS[-1]]["course_minutes_28d"]
    )

    # Exported, and joined with labels as it was known on the label's day.
    place.ok("prefs", "export")
    labels = world.folder / "labels.csv"
    rows = [
        (learner, TODAY - timedelta(days=back)) for learner in (*LEARNERS, "nobody") for back in (0, 5, 30)
    ]
    labels.write_text(
        "learner_id,label_time,bought\n"
        + "".join(f'"{learner}",{day}T00:00:00Z,1\n' for learner, day in rows)
    )
    told = place.run(
        "prefs", "training-set", "--entity", "learner",
        "--labels", str(labels), "--output", str(world.folder / "set.csv"),
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    left_out = (
        "progress.favorite_subjects is left out: it is computed from lesson_events, which is not exported"
    )
    assert left_out in told.stderr
    with (world.folder / "set.csv").open() as lines:
        made = [
            {"lessons_7d": int(row["lessons_7d"]), "minutes_28d": Decimal(row["minutes_28d"])}
            for row in csv.DictReader(lines)
        ]
    assert made == [expected(learner, day, with_today=False) for learner, day in rows]
    cases = [
        (*id_, TODAY - timedelta(days=back)) for id_ in (*ENROLMENTS, ("ana", "none")) for back in (0, 5)
    ]
    labels.write_text(
        "learner_id,course_id,label_time,bought\n"
        + "".join(f'"{learner}","{course}",{day}T00:00:00Z,1\n' for learner, course, day in cases)
    )
    place.ok(
        "prefs", "training-set", "--entity", "enrolment",
        "--labels", str(labels), "--output", str(world.folder / "courses.csv"),
    )  # fmt: skip
    with (world.folder / "courses.csv").open() as lines:
        made = [
            {
                "course_lessons_7d": int(row["course_lessons_7d"]),
                "course_minutes_28d": Decimal(row["course_minutes_28d"]),
            }
            for row in csv.DictReader(lines)
        ]
    assert made == [expected(learner, day, with_today=False, course=course) for learner, course, day in cases]

    # What is served equals what the training tables say.
    report = parity(place, "enrolment")
    assert (report.subjects, report.passed) == (len(ENROLMENTS), True), report.worst
    report = parity(place, "learner")
    assert report.subjects == len(LEARNERS)
    assert {(one.domain, one.attribute, one.compared) for one in report.attributes} >= {
        ("progress", "lessons_7d", len(LEARNERS)),
        ("progress", "minutes_28d", len(LEARNERS)),
    }
    assert report.passed, report.worst

    # Erased from every store, and no old event brings it back.
    erased = json.loads(place.ok("prefs", "erase", "learner", "ana", "--json"))
    assert {one["after"] for one in erased["stores"]} == {0}
    assert any(one["before"] for one in erased["stores"])
    (world.folder / "again.jsonl").write_text(LESSONS[0].message().replace('"e1"', '"e1again"') + "\n")
    place.ok("prefs", "ingest", str(world.folder / "again.jsonl"))
    place.ok("prefs", "refresh")
    with world.client() as client:
        assert client.get("ana").cold_start
    # With all that other entities have with this learner's key.
    left = {id_: values for id_, values in taken.items() if id_[0] != "ana"}
    assert world.enrolments() == left | {id_: {} for id_ in ENROLMENTS if id_[0] == "ana"}

    # The console shows this project, and sends its events.
    if CHROMIUM is not None:
        sent_in_the_console(world, free_port())

    # A changed window: the name follows, the contract takes a new version, and what runs is replaced.
    edit(world.project / "dbt_project.yml", "long: 28", "long: 30")
    wrong = place.run("prefs", "generate")
    assert "rename it to minutes_7d or minutes_30d" in wrong.stderr
    for suffix in ("sql", "yml"):
        for view in ("learner", "course"):
            edit(world.project / "models" / f"{view}_progress_rolling.{suffix}", "minutes_28d", "minutes_30d")
    edit(world.project / "models" / "exposures.yml", "          version: 1\n", "          version: 2\n")
    place.ok("prefs", "generate")
    assert " unchanged, 2 changed" in place.run("prefs", "plan").stdout
    place.ok("prefs", "apply")
    served = {learner: expected(learner, TODAY, 30) for learner in LEARNERS[1:]}
    found = world.numbers("lessons_7d", "minutes_30d")
    assert {learner: found[learner] for learner in LEARNERS[1:]} == served


def sent_in_the_console(world: World, port: int) -> None:
    """Send an event about somebody new in a browser, and see her item come."""
    environment = {**world.place.environment, "PREFS_CONSOLE_SEND": "on"}
    with serving(world.place.warm, environment, port) as url, opened_browser() as browser:
        page = browser.new_page()
        page.goto(url)
        page.locator("main h1").get_by_text("Viewers").wait_for()
        assert page.get_by_role("link", name="Shop").count() == 0
        assert page.get_by_role("link", name="enrolment").count() == 1
        page.get_by_label("learner_id").fill("somebody new / 1")
        page.get_by_role("button", name="Show").click()
        progress = page.get_by_role("region", name="progress")
        progress.get_by_text("no item").wait_for()
        page.get_by_label("seconds").fill("90")
        page.get_by_role("button", name="Send").click()
        progress.get_by_role("row", name="minutes_28d 1.5").wait_for()
        page.locator('[data-role="way"]').get_by_role("row", name="read progress").wait_for()


def tile_days(learner: str, course: str) -> set[date]:
    """The days of a learner's lessons in a course that the longest window holds."""
    own = [lesson.day for lesson in LESSONS if (lesson.learner, lesson.course) == (learner, course)]
    return {day for day in own if day >= TODAY - timedelta(days=28)}


def parity(place: Place, entity: str) -> ParityReport:
    """Every id's served values beside the same values recomputed from the training tables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.environment.items():
            patch.setenv(name, value)
        platform = Platform(load_settings())
        return platform.parity(choose_features(platform.registry, entity), now=datetime.now(UTC), share=1)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def over_http(
    world: World, port: int, learner: Sequence[str], enrolment: Sequence[str]
) -> list[dict[str, Any]]:
    """The domains of a learner and of an enrolment as the feature server gives them."""
    server = world.place.start("prefs", "serve", "--port", str(port), "--only", "profiles")
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("serving at")
        found = []
        for path, id_ in (("/v1/profiles", learner), ("/v1/enrolment/profiles", enrolment)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/".join([path, *(quote(part, safe="") for part in id_)]))
            answer = connection.getresponse()
            body: dict[str, Any] = json.loads(answer.read())
            assert answer.status == 200, body
            found.append(body["domains"])
        return found
    finally:
        server.terminate()
        server.communicate()
