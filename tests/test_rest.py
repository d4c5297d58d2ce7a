"""A worker gives back memory once it has had nothing to do for a second, and once for each rest."""

from service.worker.rest import Rest


def test_it_is_given_back_after_a_second_and_not_again():
    given = []
    rest = Rest(lambda: given.append(1))
    for now in (10.0, 10.5, 10.9):
        rest.note_idle(now)
    assert given == []
    rest.note_idle(11.0)
    rest.note_idle(20.0)
    assert given == [1]


def test_work_begins_the_second_anew():
    given = []
    rest = Rest(lambda: given.append(1))
    rest.note_idle(10.0)
    rest.note_work()
    rest.note_idle(11.5)
    assert given == []
    rest.note_idle(12.5)
    assert given == [1]
    rest.note_work()
    rest.note_idle(13.0)
    rest.note_idle(14.0)
    assert given == [1, 1]
