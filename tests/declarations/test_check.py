# ruff: noqa: E501 (a line a case)
"""Every error in a declaration is one sentence with file, line, what is wrong and an example of what is right."""

from __future__ import annotations

import re

import pytest
from declared import PROJECT as PROJECT_DIR
from declared import add_enrolments
from project_copies import Copy

from dagster_prefs.declarations.generate import plan_files
from dagster_prefs.declarations.names import QUERY_SUFFIX
from dagster_prefs.declarations.read import DeclarationError

TOPIC, TILE, VIEW = (
    "models/lesson_events.yml",
    "models/learner_lessons_1d.yml",
    "models/learner_progress_rolling.yml",
)
VIEW_SQL, PROJECT = "models/learner_progress_rolling.sql", "dbt_project.yml"
KEY = "{ learner_id: text }"
KEEP = "        time: last_event_at\n"


def problems(copy: Copy) -> list[str]:
    with pytest.raises(DeclarationError) as caught:
        plan_files(copy.folder)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize(
    ("path", "old", "new", "said", "example"),
    [
        # Topics.
        (TOPIC, "identity: event_id", "identity: id", "identity names 'id', which is not one of its columns", "identity: event_id"),
        (TOPIC, "identity: event_id", "identity: event_idd", r"not one of its columns \(did you mean 'event_id'\?\)", ""),
        (TOPIC, "          identity: event_id\n", "", "lesson_events: identity is missing", "identity: event_id"),
        (TOPIC, "identity: event_id", "idenity: event_id", r"meta.topic has no key 'idenity' \(did you mean 'identity'\?\)", ""),
        (TOPIC, "        topic:\n", "        tpoic:\n", r"meta has no key 'tpoic' \(did you mean 'topic'\?\)", "topic: {"),
        (TOPIC, "entity: learner", "entity: lerner", r"no entity 'lerner' \(did you mean 'learner'\?\)", "entity: learner"),
        (TOPIC, "          entity: learner\n", "", "a topic without an entity", "entity: learner"),
        (TOPIC, "time: happened_at", "time: seconds", "time names the column seconds, which must be timestamptz, not int", ""),
        (TOPIC, "name: learner_id, data_type: text", "name: learner_id, data_type: bigint", "learner_id, the key of entity learner, must be text, not bigint", "data_type: text"),
        (TOPIC, "name: learner_id", "name: learner", "has no column learner_id, the key of entity learner", "name: learner_id"),
        (TOPIC, "kafka_topic: lesson_events", "kafka_topic: lesson events", "'lesson events' is not the name of a Kafka topic", ""),
        (TOPIC, "          entity: learner\n", "          entity: learner\n          keep: latest\n", "keep must be `first` .*, not 'latest'", "keep: last"),
        (TOPIC, "          entity: learner\n", "          entity: learner\n          keep: last\n", "keep: last declares reference data, which cannot have entity", "keep: last"),
        (TOPIC, "error_seconds: 300", "error_seconds: 30", "freshness must be two numbers of seconds, warn_seconds not above error_seconds, not ", "warn_seconds: 3"),
        (TOPIC, "data_type: int", "data_type: float", "the type of lesson_events.seconds must be one of text, bigint.*, not float", "data_type: text"),
        (TOPIC, "optional: true, min: 0", "optional: true, minimum: 0", r"meta has no key 'minimum' \(did you mean", ""),
        (TOPIC, "optional: true, min: 0", "optional: true, max: 9", "max needs min", "min: 0, max: 9"),
        (TOPIC, "optional: true, min: 0", "optional: true, min: 5", "only `min: 0`", "min: 0"),
        (TOPIC, "optional: true, min: 0", "optional: true, min: 5, max: 4", "min 5 is above max 4", "min: 4, max: 5"),
        (TOPIC, "optional: true, min: 0", "optional: true, scale: 2", "scale is only for decimal, and this column is int", "data_type: decimal"),
        (TOPIC, "description: Identity of the event. }", "description: Identity., config: { meta: { max_bytes: 4000 } } }", "max_bytes must be from 1 to 2048, not 4000: an index and a key of DynamoDB cannot hold more", "max_bytes: 256"),
        (TOPIC, "description: Time of the event. }", "description: Time of the event., config: { meta: { optional: true } } }", "the identity, the key and the time of an event cannot be optional", ""),
        (TOPIC, "[started, finished, bookmarked]", "[started, 'it''s']", "accepted must be a list of texts without quotes, not .*it's", "accepted: [like, share]"),
        (TOPIC, "accepted: [started, finished, bookmarked]", "accepted_from: window", r"vars has no list or mapping of that name \(did you mean 'windows'\?\)", ""),
        (TOPIC, "name: subject, data_type", "name: payload, data_type", "the name is used by the platform", "lesson_events_payload"),
        # Tiles.
        (TILE, "day: lesson_date, ", "", "learner_lessons_1d: a tile without a day", "day: search_date"),
        (TILE, "day: lesson_date,", "day: day,", "day names 'day', which is not one of its columns", ""),
        (TILE, "metric: [seconds] }", "metric: [seconds] }\n        domain: { key: 'learning#tile' }", "a domain on a tile", "tile"),
        (TILE, "name: seconds, data_type: bigint", "name: seconds, data_type: double precision", "which a training table in Iceberg cannot store: use one of bigint, date", "data_type: bigint"),
        (TILE, "metric: [seconds]", "metric: [second]", "metric must be a list of columns of numbers .here lessons, seconds, finishes., not .*second", "metric: [lessons]"),
        (TILE, "metric: [seconds]", "metric: [seconds], at_most: [[finishes]]", "at_most must be a list of pairs of columns of numbers.*, not .*finishes", "at_most: [[completions, views]]"),
        # When a tile's values have drifted.
        (TILE, "metric: [seconds]", "metric: [seconds], drift: 3", "learner_lessons_1d: drift must be a mapping of limits, or false where nothing is to be judged, not 3", "drift: { rows: { warn: 2, error: 4 }"),
        (TILE, "metric: [seconds]", "metric: [seconds], drift: { row: { warn: 2, error: 4 } }", r"drift has no key 'row' \(did you mean 'rows'\?\)", "rows:"),
        (TILE, "metric: [seconds]", "metric: [seconds], drift: { rows: { warn: 4, error: 2 } }", "rows must be two numbers above 1, warn not above error, not .*4.*2", "rows: { warn: 2, error: 4 }"),
        (TILE, "metric: [seconds]", "metric: [seconds], drift: { min_rows: 0 }", "min_rows must be a whole number of at least 1, not 0", "min_rows: 100"),
        (TILE, "Seconds spent., config: { meta: { min: 0 } }", "Seconds., config: { meta: { drift: { psi: { warn: 0.1 } } } }", "learner_lessons_1d.seconds: drift: psi must be two numbers above 0, warn not above error, not .*warn", "psi: { warn: 0.1, error: 0.25 }"),
        (TILE, "Seconds spent., config: { meta: { min: 0 } }", "Seconds., config: { meta: { drift: { ks: { warn: 0.1, error: 2 } } } }", "ks must be two numbers above 0, at most 1, warn not above error", ""),
        (TILE, "description: The learner.", "description: The learner., config: { meta: { drift: { psi: { warn: 0.1, error: 0.2 } } } }", "learner_id: drift: the column is personal, and only numbers and texts that are not personal are judged", "drift: false"),
        (TILE, "Newest event of the day.", "Newest., config: { meta: { drift: { psi: { warn: 0.1, error: 0.2 } } } }", "last_event_at: drift: the column is a timestamptz, and only numbers and texts", "drift: false"),
        (TILE, "Seconds spent., config: { meta: { min: 0 } }", "Seconds., config: { meta: { pii: 1 } }", "seconds: pii must be true or false, not 1", "pii: true"),
        (TOPIC, "optional: true, min: 0", "optional: true, min: 0, pii: maybe", "lesson_events.seconds: pii must be true or false, not 'maybe'", "pii: true"),
        (VIEW, "description: Minutes spent in the 28-day window., data_tests: [not_null]", "description: Minutes spent., data_tests: [not_null], config: { meta: { pii: 'no' } }", "pii must be true or false, not 'no'", "pii: true"),
        (VIEW, "description: The learner., data_tests: [not_null, unique]", "description: The learner., data_tests: [not_null, unique], config: { meta: { pii: false } }", "learner_id: it is a key of an erasable entity, which is always personal: remove pii", "name: learner_id"),
        (TILE, "metric: [seconds]", "metric: [seconds], table: value_statistics", "value_statistics is the platform's table of statistics: use another name", "table: learner_lessons_1d"),
        (TILE, "      indexes: [{ columns: [learner_id, lesson_date], unique: true }, { columns: [lesson_date] }]\n", "", "a tile needs a unique index on its entity's keys and its day", "columns: [learner_id, lesson_date], unique: true"),
        (TILE, "last_event_at, data_type: timestamptz", "last_event, data_type: timestamptz", "a tile needs last_event_at", "data_type: timestamptz"),
        (TILE, "meta: { min: 0 } } }\n      - { name: seconds", "meta: { min: none } } }\n      - { name: seconds", "min must be a whole number, of a bigint or decimal column, not 'none'", "min: 0"),
        # Domains.
        (VIEW, 'key: "learning#progress"', "key: progress", "a domain's key is <product>#<domain> in lower case, not 'progress'", 'key: "engagement#search"'),
        (VIEW, 'data_type: "text[]"', "data_type: jsonb", "which a DynamoDB item cannot store: use one of bigint", "data_type: bigint"),
        (VIEW, "last_event_at, data_type: bigint", "last_event_at, data_type: timestamptz", "needs the column last_event_at, a bigint with a not_null test", "data_tests: [not_null]"),
        (VIEW, "name: lessons_7d", "name: lessons_9d", "the attribute lessons_9d says 9 days, and the windows of the view are of 7 and 28: rename it to lessons_7d or lessons_28d", "lessons_7d"),
        (VIEW, "unique: true", "unique: false", "which entity the domain is of is not clear", "entity: learner"),
        (VIEW_SQL, 'var("windows").short', "0", "a window must have at least 1 day, not 0", 'var("windows").long'),
        (VIEW_SQL, 'var("windows").short', 'var("windows").shrt', r"is not a variable with a number of days \(did you mean 'short'\?\)", ""),
        # The project.
        (PROJECT, "short: 7", "short: 0", "the window short must be a whole number of days, at least 1, not 0", "short: 7"),
        (PROJECT, KEY, "{ learner_id: integer }", "the type of key learner_id must be one of bigint, text, uuid, not 'integer'", "text"),
        (PROJECT, "table: learner_profiles, ", "", "entity learner has the domain learning#progress .* and no table", "table: learner_profiles"),
        (PROJECT, "erasable: true", "eraseable: true", r"entity learner has no key 'eraseable' \(did you mean 'erasable'\?\)", ""),
        (VIEW, "description: The learner., data_tests: [not_null, unique]", "description: The learner., data_tests: [not_null, unique], config: { meta: { retired: true } }", "learner_id: every item has this column, so it cannot be retired", "retired: true"),
        (VIEW, "description: Minutes spent in the 28-day window., data_tests: [not_null]", "description: Minutes spent., data_tests: [not_null], config: { meta: { retired: soon } }", "retired must be true or false, not 'soon'", "retired: true"),
        (VIEW, "description: Minutes spent in the 28-day window., data_tests: [not_null]", "description: Minutes spent., data_tests: [not_null], config: { meta: { null_elements: true } }", "null_elements must be true or false, of a list, and this is True of decimal", "null_elements: true"),
        # How views are kept current.
        (TILE, KEEP, f"{KEEP}        keep: {{ by: magic }}\n", "keep by must be one of rows, identity, key, merging, rebuilt, not 'magic'", "by: rebuilt"),
        (TILE, KEEP, f"{KEEP}        keep: {{ by: rebuilt }}\n", "every_seconds must be a whole number of at least 1 .*, not None", "every_seconds: 300"),
        (TILE, KEEP, f"{KEEP}        keep: {{ by: key, every_seconds: 5 }}\n", "every_seconds must be .* kept by rebuilt, and absent for any other, not 5", ""),
        (TILE, KEEP, f"{KEEP}        keep: {{ whole: [lesson_event] }}\n", r"whole must be a list of relations that the view reads .lesson_events., not \['lesson_event'\] \(did you mean 'lesson_events'\?\)", "whole: [items]"),
        (TILE, KEEP, f"{KEEP}        keep: {{ rows: true }}\n", "meta.keep has no key 'rows': known are by, whole, every_seconds", ""),
        (TOPIC, "        topic:\n", "        keep: { by: rows }\n        topic:\n", "meta.keep is only for materialized views that are written by hand, and this is a topic's typed model", ""),
        (PROJECT, 'macro-paths: ["macros", "generated"]', 'macro-paths: ["macros"]', "macro-paths lacks generated, the folder of the hashes by which dbt refuses", "macro-paths: [macros, generated]"),
        (PROJECT, "  entities:\n", "  entity:\n", "vars has no entities", "entities: { viewer"),
        ("models/exposures.yml", "owner: learning@example.com", "owners: learning@example.com", r"meta.contract has no key 'owners' \(did you mean 'owner'\?\)", "version: 1"),
    ],
)  # fmt: skip
def test_an_error_names_its_place_and_what_is_right(
    courses_copy: Copy, path: str, old: str, new: str, said: str, example: str
) -> None:
    courses_copy.change(path, old, new)
    found = problems(courses_copy)
    matching = [problem for problem in found if re.search(said, problem)]
    assert matching, "\n".join(found)
    place = re.match(r"(\S+):(\d+): .* \(example: `(.+)`\)$", matching[0])
    assert place, matching[0]
    lines = (courses_copy.folder / place[1]).read_text(encoding="utf-8").splitlines()
    assert 1 <= int(place[2]) <= len(lines)
    assert example in place[3]


def test_the_line_is_that_of_the_key(courses_copy: Copy) -> None:
    line = courses_copy.change(
        "models/lesson_events.yml", "          identity: event_id\n", "          identity: id\n"
    )
    (problem,) = problems(courses_copy)
    assert problem.startswith(f"models/lesson_events.yml:{line}: lesson_events: identity names 'id'")


def test_every_error_is_named_at_once_and_so_is_what_to_rename(courses_copy: Copy) -> None:
    courses_copy.change(PROJECT, "{ short: 7, long: 28 }", "{ short: 5, long: 30 }")
    found = problems(courses_copy)
    assert [re.search(r"rename it to (\S+) or (\S+),", problem).groups() for problem in found] == [  # type: ignore[union-attr]
        ("lessons_5d", "lessons_30d"),
        ("minutes_5d", "minutes_30d"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "models: [{ name: lesson_events }]",
            r"lesson_events is also declared in models/lesson_events.yml:4",
        ),
        (
            "models: [{ name: raw_lesson_events }]",
            r"raw_lesson_events is also declared in models/\S+: rename one of them",
        ),
        ("models: [{ name: rejected_events }]", r"rejected_events is a relation of the platform"),
        (
            "models: [{ name: a, name: b }]",
            r"models/other.yml:1: it is not YAML: 'name' is given twice, first in line 1",
        ),
        ("models: [{ description: a }]", r"models/other.yml:1: an entry of `models` has no name"),
        ("models: [", r"models/other.yml:2: it is not YAML"),
        ("- models", r"models/other.yml:1: a mapping is needed at the top"),
        (
            "models: [{ name: other, config: { meta: { topic: { kafka_topic: lesson.events, identity: event_id, entity: learner, "
            "time: at } } }, columns: [{ name: event_id, data_type: text }, { name: learner_id, data_type: text }, "
            "{ name: at, data_type: timestamptz }] }]",
            r"the setting PREFS_KAFKA_TOPIC_… LESSON_EVENTS is also declared in models/lesson_events.yml",
        ),
        (
            "exposures: [{ name: other, config: { meta: { contract: { version: 1 } } } }]",
            r"models/exposures.yml also declares meta.contract: keep one of them",
        ),
    ],
)
def test_a_name_that_two_use_and_what_is_no_declaration(courses_copy: Copy, text: str, said: str) -> None:
    courses_copy.write("models/other.yml", text + "\n")
    assert re.search(said, "\n".join(problems(courses_copy))), problems(courses_copy)


def test_two_domains_have_two_keys(courses_copy: Copy) -> None:
    for kind in ("yml", "sql"):
        text = (courses_copy.folder / f"models/learner_progress_rolling.{kind}").read_text()
        courses_copy.write(
            f"models/other_rolling.{kind}", text.replace("learner_progress_rolling", "other_rolling")
        )
    said = "\n".join(problems(courses_copy))
    assert "the domain learning#progress is also declared in" in said


def test_a_composite_key_is_declared_like_any_other(courses_copy: Copy) -> None:
    add_enrolments(courses_copy.folder)
    found = plan_files(courses_copy.folder)
    table = found.declarations.contract["tables"]["enrolment"]
    assert table["rest_keys"] == [{"name": "course_id", "type": "S"}]
    (sink,) = (text for name, text in found.models.items() if name.endswith("sink_learning_course.sql"))
    # Behind the keys, whose encoding makes the sort key.
    assert '"enrolment", ["course_lessons_7d", "course_minutes_28d", "last_event_at"])' in sink
    (tile,) = (tile.declared for tile in found.declarations.tiles if tile.declared.entity == "enrolment")
    assert tile.key == ("learner_id", "course_id")


COURSE_VIEW = "models/course_progress_rolling"
ENROLMENT = "    enrolment: { keys: { learner_id: text, course_id: text }, table: enrolment_profiles, erasable: true }"


@pytest.mark.parametrize(
    ("path", "old", "new", "said", "example"),
    [
        (TOPIC, "max_bytes: 100 }", "max_bytes: 400 }", r"the sort key of its items may have 1,216 bytes, and DynamoDB accepts 1,024: it holds learning#course and course_id", "max_bytes: 293"),
        (TOPIC, "name: course_id", "name: course", "entity enrolment: its key course_id is a field of no topic about its learner_id", "name: course_id"),
        (PROJECT, ENROLMENT, ENROLMENT.replace("true", "false"), "entity enrolment and entity learner have the first key learner_id, and one of them is erasable", "erasable: true"),
        (f"{COURSE_VIEW}.sql", '"learner_id", var("windows").long', '"course_id", var("windows").long', "the window is computed by course_id, and must be by learner_id, the first key of enrolment", "within_window"),
        (f"{COURSE_VIEW}.yml", "name: course_id, data_type: text, description: The course., data_tests: [not_null]", "name: course_id, data_type: text, description: The course.", "a domain needs the column course_id, a text with a not_null test", "not_null"),
        (TOPIC, "entity: learner", "entity: enrolment", "lesson_events.course_id: the identity, the key and the time of an event cannot be optional", "course_id"),
    ],
)  # fmt: skip
def test_an_error_about_a_composite_key(
    courses_copy: Copy, path: str, old: str, new: str, said: str, example: str
) -> None:
    add_enrolments(courses_copy.folder)
    courses_copy.change(path, old, new)
    found = problems(courses_copy)
    assert any(
        re.search(rf"\.yml:\d+: .*{said}|\.sql:\d+: .*{said}", one) and example in one for one in found
    ), found


def test_typed_sql_by_hand_is_in_the_way(courses_copy: Copy) -> None:
    courses_copy.write("models/lesson_events.sql", "select 1 as one")
    (problem,) = problems(courses_copy)
    assert "models/lesson_events.sql is written by hand: remove it" in problem


def test_an_index_whose_longest_row_does_not_fit_is_refused(courses_copy: Copy) -> None:
    """Of any view: by the fields of the topics that it reads, however far up, or by what its own YAML says."""
    courses_copy.write(
        "models/subjects.sql", 'select learner_id, subject, best from {{ ref("learner_lessons_1d") }}'
    )
    courses_copy.write(
        "models/subjects.yml",
        """\
models:
  - name: subjects
    description: Subjects of a learner.
    config:
      indexes: [{ columns: [best] }, { columns: [learner_id, subject, best], unique: true }]
    columns:
      - { name: learner_id, data_type: text, description: Who. }
      - { name: subject, data_type: text, description: What. }
      - { name: best, data_type: text, description: Computed. }
""",
    )
    plan_files(courses_copy.folder)
    subject = "max_bytes: 256 } } }\n      - { name: seconds"
    courses_copy.change(TOPIC, subject, subject.replace("256", "1400"))
    (problem,) = problems(courses_copy)
    assert problem.startswith(
        "models/subjects.yml:5: subjects: a row of the index on learner_id, subject, best may have 2712 bytes (texts "
        "of up to learner_id 256, subject 1400, best 1024), and an index of PostgreSQL takes 2704: lower max_bytes"
    )
    courses_copy.change(
        "models/subjects.yml",
        "description: Computed. }",
        "description: Computed., config: { meta: { max_bytes: 999 } } }",
    )
    plan_files(courses_copy.folder)


PREFERENCE = """\
models:
  - name: subjects
    description: Subjects of a learner.
    config:
      indexes: [{ columns: [learner_id, subject], unique: true }]
      meta: { preference: { entity: learner } }
    columns:
      - { name: learner_id, data_type: text, description: Who. }
      - { name: subject, data_type: text, description: What. }
      - { name: lessons, data_type: bigint, description: How many. }
"""


def test_a_preference_view_and_how_views_are_kept(courses_copy: Copy) -> None:
    sql = 'select learner_id, subject, count(*) as lessons from {{ ref("lesson_events") }} group by 1, 2'
    courses_copy.write("models/subjects.sql", sql)
    courses_copy.write("models/subjects.yml", PREFERENCE)
    found = plan_files(courses_copy.folder).declarations
    (view,) = found.preferences
    assert (view.relation, view.entity, view.reads) == ("subjects", "learner", ("subject", "lessons"))
    kept = {one.relation: one for one in found.kept}
    assert set(kept) == {"learner_lessons_1d", "learner_progress_rolling", "subjects"}
    assert (kept["subjects"].by, kept["subjects"].key, kept["subjects"].inputs) == (
        "key", ("learner_id",), ("lesson_events",),
    )  # fmt: skip

    for old, new, said in (
        ("entity: learner }", "entity: lerner }", "no entity 'lerner'"),
        (
            "learner }",
            "learner, reads: [lesson] }",
            r"reads must be a list of columns of the view.*, not \['lesson'\] \(did you mean 'lessons'\?\)",
        ),
        (
            "data_type: text, description: Who.",
            "data_type: bigint, description: Who.",
            "learner_id, the key of entity learner, must be text, not bigint",
        ),
        ("preference: {", "tile: { entity: learner, day: lessons }, preference: {", "a preference on a tile"),
        # Rows by subject alone follow from those of every learner.
        (
            "[learner_id, subject]",
            "[subject]",
            "the way to keep it current cannot be inferred from its YAML.*declare meta.keep",
        ),
    ):
        courses_copy.write("models/subjects.yml", PREFERENCE.replace(old, new))
        assert any(re.search(said, one) for one in problems(courses_copy)), said
    rebuilt = PREFERENCE.replace("[learner_id, subject]", "[subject]").replace(
        "meta: {", "meta: { keep: { by: rebuilt, every_seconds: 60 },"
    )
    courses_copy.write("models/subjects.yml", rebuilt)
    kept = {one.relation: one for one in plan_files(courses_copy.folder).declarations.kept}
    assert (kept["subjects"].by, kept["subjects"].every_seconds) == ("rebuilt", 60)
    # A plain view is computed when it is read.
    courses_copy.write("models/subjects.sql", '{{ config(materialized="view") }}\n' + sql)
    courses_copy.write("models/subjects.yml", PREFERENCE)
    assert "subjects" not in {one.relation for one in plan_files(courses_copy.folder).declarations.kept}


@pytest.mark.parametrize(
    ("path", "model", "length", "said"),
    [
        (VIEW, "learner_progress_rolling", 57, "`__query` goes behind a kept view's: use at most 56"),
        (TOPIC, "lesson_events", 50, "_parsed: PostgreSQL's have 63 bytes; .*: use at most 49"),
        (VIEW, "learner_progress_rolling", 56, ""),
    ],
)
def test_a_name_leaves_room_for_those_derived_from_it(
    courses_copy: Copy, path: str, model: str, length: int, said: str
) -> None:
    long = model.ljust(length, "x")
    line = courses_copy.change(path, f"name: {model}\n", f"name: {long}\n")
    sql = courses_copy.folder / f"models/{model}.sql"
    if sql.exists():
        sql.rename(sql.with_stem(long))
    try:
        plan_files(courses_copy.folder)
        found = []
    except DeclarationError as error:
        found = [problem for problem in error.problems if "too long a name" in problem]
    if said:
        (problem,) = found
        assert problem.startswith(f"{path}:{line}: {long} is too long a name")
        assert re.search(said, problem)
    else:
        assert found == []


def test_dbt_and_the_checks_agree_on_what_goes_behind_a_name() -> None:
    macro = (PROJECT_DIR / "macros/engine/kept.sql").read_text()
    assert f'{{{{ return("{QUERY_SUFFIX}") }}}}' in macro
