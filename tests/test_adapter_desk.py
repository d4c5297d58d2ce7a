"""Which adapter has which slot: claimed ones stay; of the others the longest unused one goes."""

import hashlib
import random

import pytest

from model.errors import AdapterUnfit
from model.slots import AdapterForm, EngineOptions
from service.protocol.messages import AdapterSource
from service.protocol.worker_counts import AdapterCounts
from service.worker.adapter_desk import AdapterDesk
from service.worker.adapter_store import ADAPTER_FILE, AdapterStore, digest_of
from tests.fakes.arithmetic_engine import ArithmeticEngine
from tests.fakes.arithmetic_trainer import adapter_bytes


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
    desk.begin_round(None)
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


# --- who waits --------------------------------------------------------------------------------


def test_while_somebody_waits_one_adapter_is_claimed_no_more_and_the_others_are(tmp_path):
    desk, [a, b, c, d] = desk_of(tmp_path, 1, 2, 3, 4)
    assert desk.claim(a)
    assert desk.claim(b)
    assert not desk.claim(c)
    assert not desk.claim(a), "its slot is for who waits"
    assert desk.claim(b)
    desk.begin_round(None)
    # In the next round those in front are asked first.
    assert desk.claim(a)
    assert not desk.claim(c)
    assert not desk.claim(b), "claimed longest ago now"
    assert desk.claim(a)
    assert not desk.claim(d), "two wait, for both slots"
    assert not desk.claim(a)


def test_whoever_waits_gets_a_slot_although_others_come_all_the_time(tmp_path):
    desk, [a, b, c] = desk_of(tmp_path, 1, 2, 3)
    running = [a, b]
    assert desk.claim(a)
    assert desk.claim(b)
    for _ in range(10):
        desk.begin_round(None)
        if desk.claim(c):
            break
        # Everybody else asks again before their own ends.
        for ended in tuple(running):
            if desk.claim(ended):
                running.append(ended)
            desk.release(ended)
            running.remove(ended)
    else:
        raise AssertionError("it waits for ever")


def test_two_lines_do_not_take_what_the_other_waits_for(tmp_path):
    desk, [a, b, c] = desk_of(tmp_path, 1, 2, 3, slots=1)
    assert desk.claim(a, "rows")
    assert desk.slot(a) == 1
    assert not desk.claim(b, "scores")
    desk.release(a)
    desk.begin_round("rows")
    assert not desk.claim(c, "rows")
    assert not desk.claim(a, "rows")
    desk.begin_round("scores")
    assert desk.claim(b, "scores")
    assert desk.slot(b) == 1
    assert not desk.claim(b, "scores"), "next is who waited meanwhile"
    desk.release(b)
    desk.begin_round("scores")
    desk.begin_round("rows")
    assert desk.claim(c, "rows")


# --- several together -------------------------------------------------------------------------


def test_several_are_claimed_together_or_none_of_them(tmp_path):
    desk, [a, b, c] = desk_of(tmp_path, 1, 2, 3)
    assert desk.claim(a)
    assert not desk.claim_all((b, None, c), "scores")
    assert desk.claim(b), "there is a slot, and nobody has it"
    assert (desk.slot(a), desk.slot(b)) == (1, 2)
    desk.release_all((a, b))
    desk.begin_round("scores")
    assert desk.claim_all((b, None, c), "scores")
    # One of them was there, and did not make room for the other.
    assert {desk.slot(b), desk.slot(c)} == {1, 2}
    assert desk.counts == AdapterCounts(num_resident=2, num_loads=3, num_evictions=1)
    desk.release_all((b, None, c))
    desk.begin_round(None)
    assert desk.claim_all((c, c, c))
    desk.release(c)


def test_slots_that_are_free_already_are_kept_for_who_waits_for_more(tmp_path):
    desk, [a, b, c, d, e] = desk_of(tmp_path, 1, 2, 3, 4, 5)
    assert desk.claim_all((a, b))
    assert {desk.slot(a), desk.slot(b)} == {1, 2}
    desk.release(b)
    assert not desk.claim_all((c, d), "scores")
    assert not desk.claim(e, "scores"), "neither behind it"
    assert not desk.claim(e, "rows"), "nor in another line"
    assert not desk.claim(b, "rows")
    desk.release(a)
    desk.begin_round("scores")
    assert desk.claim_all((c, d), "scores")


@pytest.mark.parametrize("num_slots", [1, 2, 3, 4])
def test_everybody_is_served_however_many_others_come_in_both_lines(tmp_path, num_slots):
    desk, digests = desk_of(tmp_path, *range(8), slots=num_slots)
    draw = random.Random(num_slots)
    waiting, running = {"rows": [], "scores": []}, []
    longest_wait = 0
    for turn in range(2000):
        for line, most in (("rows", 1), ("scores", num_slots)):
            if len(waiting[line]) < 6:
                wanted = tuple(draw.sample(digests, draw.randint(1, most)))
                waiting[line].append((turn, wanted))
        # Scores are not asked in every turn.
        lines = ("rows", "scores") if turn % 3 == 0 else ("rows",)
        for line in lines:
            desk.begin_round(line)
            for came, wanted in tuple(waiting[line]):
                if desk.claim_all(wanted, line):
                    slots = [desk.slot(digest) for digest in wanted]
                    assert len(set(slots)) == len(wanted)
                    waiting[line].remove((came, wanted))
                    running.append((turn + draw.randint(1, 4), wanted))
                    longest_wait = max(longest_wait, turn - came)
        for ends, wanted in tuple(running):
            if ends <= turn:
                desk.release_all(wanted)
                running.remove((ends, wanted))
    # Each of the twelve in front has its slots once the four turns are over of all who use them.
    assert longest_wait < 12 * 4 * 3


# --- versions that come and go ----------------------------------------------------------------


def bytes_of(number):
    return adapter_bytes(AdapterForm("keras", 8, 8.0, ("query",)), number)


def test_a_version_that_stands_in_memory_or_in_its_folder_is_opened(tmp_path):
    desk, _ = desk_of(tmp_path)
    made = desk.store.add_content(bytes_of(5))
    assert made in desk.store
    assert use(desk, made) == 1
    path = tmp_path / ADAPTER_FILE
    path.write_bytes(bytes_of(6))
    saved = digest_of(bytes_of(6))
    desk.store.add_source(AdapterSource(saved, str(path)))
    assert use(desk, saved) == 2
    path.write_bytes(bytes_of(7))
    assert use(desk, saved) == 2, "it is in the bank"
    with pytest.raises(AdapterUnfit, match="has changed"):
        desk.store.content(saved)


def test_one_that_is_forgotten_stays_for_those_who_hold_it(tmp_path):
    desk, _ = desk_of(tmp_path, slots=1)
    digest = desk.store.add_content(bytes_of(5))
    desk.hold(digest)
    desk.hold(digest)
    desk.store.forget(digest)
    desk.drop_forgotten(digest)
    assert digest not in desk.store
    assert use(desk, digest) == 1
    desk.let_go(digest)
    assert use(desk, digest) == 1
    desk.let_go(digest)
    assert desk.counts.num_resident == 0
    with pytest.raises(AdapterUnfit, match="not here"):
        desk.store.content(digest)
    other = desk.store.add_content(bytes_of(6))
    assert use(desk, other) == 1


def test_one_that_is_forgotten_and_made_again_is_there(tmp_path):
    desk, _ = desk_of(tmp_path)
    digest = desk.store.add_content(bytes_of(5))
    desk.hold(digest)
    desk.store.forget(digest)
    assert desk.store.add_content(bytes_of(5)) == digest
    desk.drop_forgotten(digest)
    desk.let_go(digest)
    assert digest in desk.store
    assert desk.store.content(digest) == bytes_of(5)
