"""Ours beside HAProxy and nginx: whatever one of them refuses and ours passes on, the RFC is on our side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from differential import (
    ALLOWED,
    MESSAGES,
    OTHER_STATUS,
    OTHER_WORDS,
    OTHERS,
    OURS_STRICTER,
    THEIRS_STRICTER,
    Difference,
    Outcome,
    Reach,
    answer_outcome,
    differences,
    kind_of_difference,
    play_all,
    program,
    request_outcome,
)
from messages import HOSTILE_ANSWERS, HOSTILE_BODIES, HOSTILE_HEADS, head

REFUSED = Outcome("400", Reach.NOTHING, ())
SERVED = Outcome("204", Reach.WHOLE, ("GET / HTTP/1.1 | host: a.test",))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Sequence[Outcome]]:
    return play_all(tmp_path_factory.mktemp("differential"))


@pytest.mark.parametrize("other", OTHERS)
def test_no_difference_is_a_laxness_of_ours(outcomes: Mapping[str, Sequence[Outcome]], other: str) -> None:
    """M 11.2: a message that two readers take for different ones is how requests are smuggled."""
    if not program(other):
        pytest.skip(f"{other} is not installed")
    laxnesses = [str(difference) for difference in differences(outcomes, other) if difference.is_laxness]
    assert not laxnesses, "\n".join(laxnesses)


def test_ours_refuses_each_hostile_message_and_no_other(outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    hostile = [hostile.octets for hostile in [*HOSTILE_HEADS, *HOSTILE_BODIES, *HOSTILE_ANSWERS]]
    for message, outcome in zip(MESSAGES, outcomes["ours"], strict=True):
        assert (outcome.reach is Reach.NOTHING) == (message.octets in hostile), (message, outcome)


def test_each_reason_is_that_of_one_message() -> None:
    names = [(message.section, message.name) for message in MESSAGES]
    assert len(set(names)) == len(names)
    assert set(ALLOWED) <= set(names)


@pytest.mark.parametrize(
    ("ours", "theirs", "kind"),
    [
        (REFUSED, REFUSED, ""),
        (SERVED, SERVED, ""),
        (REFUSED, SERVED, OURS_STRICTER),
        (REFUSED, REFUSED._replace(reach=Reach.PART), OURS_STRICTER),
        (SERVED, REFUSED, THEIRS_STRICTER),
        (REFUSED._replace(reach=Reach.PART), REFUSED, THEIRS_STRICTER),
        (REFUSED, REFUSED._replace(told="501"), OTHER_STATUS),
        (SERVED, SERVED._replace(passed=("GET / HTTP/1.0",)), OTHER_WORDS),
    ],
)
def test_differences_are_told_apart(ours: Outcome, theirs: Outcome, kind: str) -> None:
    assert kind_of_difference(ours, theirs) == kind


def test_what_another_refuses_is_a_laxness_unless_there_is_a_reason() -> None:
    without = next(message for message in MESSAGES if (message.section, message.name) not in ALLOWED)
    with_reason = next(message for message in MESSAGES if (message.section, message.name) in ALLOWED)
    assert Difference(without, "haproxy", THEIRS_STRICTER, SERVED, REFUSED).is_laxness
    assert not Difference(without, "haproxy", OURS_STRICTER, REFUSED, SERVED).is_laxness
    assert not Difference(with_reason, "haproxy", THEIRS_STRICTER, SERVED, REFUSED).is_laxness


def test_a_request_is_whole_at_the_backend_in_part_or_not_at_all() -> None:
    start = head("POST / HTTP/1.1", "Host: a.test", "X-A: 1", "Content-Length: 5")
    noted = "POST / HTTP/1.1 | content-length: 5 | host: a.test"
    assert request_outcome("400", []) == Outcome("400", Reach.NOTHING, ())
    assert request_outcome("400", [start + b"hell"]) == Outcome("400", Reach.PART, (noted,))
    assert request_outcome("204", [start + b"hello"]) == Outcome("204", Reach.WHOLE, (noted,))
    assert request_outcome("204", [start + b"hello" + start]) == Outcome("204", Reach.WHOLE, (noted, noted))


def test_an_answer_is_whole_at_the_client_in_part_or_not_at_all() -> None:
    start = head("HTTP/1.1 103 Early Hints") + head("HTTP/1.1 200 OK", "Content-Length: 5")
    noted = "HTTP/1.1 200 OK | content-length: 5"
    assert answer_outcome(b"") == Outcome("closed", Reach.NOTHING, ())
    assert answer_outcome(head("HTTP/1.1 502 Bad Gateway")) == Outcome("502", Reach.NOTHING, ())
    assert answer_outcome(start + b"hell") == Outcome("200", Reach.PART, (noted,))
    assert answer_outcome(start + b"hello") == Outcome("200", Reach.WHOLE, (noted,))
