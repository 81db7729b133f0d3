"""What mistakes say is written down, so that people read it."""

import pytest

from tests.mistakes import MISTAKES, PAGE, message_of, page


def test_the_page_of_errors_follows_from_the_code():
    assert PAGE.read_text() == page(), "run `python -m tests.mistakes`, and read what changed"


def test_there_are_many_and_each_says_something():
    codes = [code for group in MISTAKES.values() for code in group]
    assert len(codes) == len(set(codes)) >= 60
    for code in codes:
        message = message_of(code)
        assert message != "nothing", code
        assert "Tracer" not in message, code
        assert len(message) < 420, code


@pytest.mark.parametrize("code", ["pair.a", "altlora(1e-3)"])
def test_what_is_no_mistake_says_nothing(code):
    assert message_of(code) == "nothing"
