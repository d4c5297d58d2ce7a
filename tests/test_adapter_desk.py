"""Which adapter has which slot: claimed ones stay; of the others the longest unused one goes."""

import hashlib

import pytest

from model.errors import AdapterUnfit
from model.slots import EngineOptions
from service.protocol.messages import AdapterCounts, AdapterSource
from service.worker.adapter_desk import AdapterDesk
from service.worker.adapter_store import AdapterStore
from tests.fakes.arithmetic_engine import ArithmeticEngine


def desk_of(directory, *numbers, slots=2):
    """A desk, and the digest of each number's adapter."""
    sources = []
    for number in numbers:
        path = directory / f"{number}.lora.h5"
        path.write_text(str(number))
        digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        sources.append(AdapterSource(digest, str(path)))
    engine = ArithmeticEngine(EngineOptions("x", 4, 64, directory, adapter_slots=slots))
    return AdapterDesk(engine, AdapterStore(sources)), [source.digest for source in sources]


def use(desk, digest):
    """The slot of one that is claimed for a moment."""
    assert desk.claim(digest)
    slot = desk.slot(digest)
    desk.release(digest)
    return slot


def test_the_base_needs_no_slot(tmp_path):
    desk, _ = desk_of(tmp_path, slots=0)
    assert desk.claim(None)
    assert desk.slot(None) == 0
    desk.release(None)
    assert desk.counts == AdapterCounts()


def test_an_adapter_that_is_there_is_not_read_again(tmp_path):
    desk, [one] = desk_of(tmp_path, 7)
    assert use(desk, one) == use(desk, one) == 1
    assert desk.counts == AdapterCounts(num_resident=1, num_loads=1)


def test_the_one_that_was_claimed_longest_ago_goes(tmp_path):
    desk, [a, b, c] = desk_of(tmp_path, 1, 2, 3)
    assert [use(desk, each) for each in (a, b, a, c)] == [1, 2, 1, 2]
    assert desk.counts == AdapterCounts(num_resident=2, num_loads=3, num_evictions=1)
    assert use(desk, a) == 1
    assert desk.counts.num_loads == 3
    assert use(desk, b) == 2


def test_one_that_is_claimed_stays_and_who_finds_no_slot_waits(tmp_path):
    desk, [a, b, c] = desk_of(tmp_path, 1, 2, 3)
    assert desk.claim(a)
    assert desk.claim(a)
    assert desk.claim(b)
    slots = desk.slot(a), desk.slot(b)
    assert not desk.claim(c)
    desk.release(a)
    assert not desk.claim(c), "one of two still uses it"
    desk.release(b)
    assert use(desk, c) == slots[1]
    assert desk.slot(a) == slots[0]


def test_a_claim_that_comes_to_nothing_leaves_its_slot(tmp_path):
    desk, [a, b] = desk_of(tmp_path, 1, 2, slots=1)
    (tmp_path / "1.lora.h5").write_text("other")
    assert desk.claim(a)
    with pytest.raises(AdapterUnfit, match="has changed"):
        desk.slot(a)
    desk.release(a)
    assert use(desk, b) == 1
    assert desk.counts == AdapterCounts(num_resident=1, num_loads=1)


def test_at_the_start_every_file_is_read_and_as_many_as_fit_are_there(tmp_path):
    desk, digests = desk_of(tmp_path, 1, 2, 3)
    desk.open_all()
    assert set(desk.store.digests) == set(digests)
    assert desk.counts == AdapterCounts(num_resident=2, num_loads=2)
    (tmp_path / "3.lora.h5").write_text("x")
    with pytest.raises(AdapterUnfit, match=r"3\.lora\.h5 has changed"):
        desk.open_all()
