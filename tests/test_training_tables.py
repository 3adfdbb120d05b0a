"""Tables and durations as text."""

import pytest

from training.tables import aligned_table, duration


def test_numbers_of_a_plain_table_stand_to_the_right():
    rows = [("a", "12", "GiB"), ("long", "3", "")]
    assert aligned_table(("name", "n", "unit"), rows, "<><") == "name   n  unit\na     12  GiB\nlong   3"
    assert aligned_table((), rows, "<") == "a     12  GiB\nlong   3"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(89, "89 s"), (600, "10 min"), (5400, "1 h 30 min"), (172800, "2.0 days"), (2e8, "2,314.8 days")],
)
def test_durations_as_people_read_them(seconds, text):
    assert duration(seconds) == text
