"""The self-test of training finds one unit in the last place of one number of one row."""

import numpy as np
import pytest

from model.errors import SelfTestFailed
from model.training_self_test import compare_training
from tests import goldens
from tests.test_self_test import NUM_TRAINED


class Uneven:
    """Micro-batches in which one number of one row depends on how many rows there are."""

    def __init__(self, batches, row, target=None):
        self._batches = batches
        self._row = row
        self._target = target

    def run(self, batch, take):
        is_shared = len(batch.rows) > 1

        def uneven(layer, row, target, by_head):
            a, b = (np.array(each) for each in by_head)
            if is_shared and (row, target) == (self._row, self._target):
                b.flat[3] = np.nextafter(b.flat[3], np.float32(np.inf))
            take(layer, row, target, (a, b))

        losses = yield from self._batches.run(batch, uneven)
        if is_shared and self._target is None:
            last = np.float32(losses[self._row][-1])
            losses[self._row][-1] = float(np.nextafter(last, np.float32(np.inf)))
        return losses


@pytest.mark.parametrize(("name", "kernels"), goldens.PATHS)
def test_the_programs_of_every_family_train_a_row_alike_in_company(name, kernels, engine_of):
    engine = engine_of(name, kernels)
    subject = engine._batches.of_one_block()
    assert compare_training(engine.info, engine._config, subject) == NUM_TRAINED


@pytest.mark.parametrize(
    ("row", "target", "length"), [(0, "ffw_linear", 50), (1, "key", 25), (2, None, 9)]
)
def test_one_unit_in_a_loss_or_a_derivative_of_a_row_in_company_is_found(
    engine_of, row, target, length
):
    engine = engine_of("gemma3_tiny")
    subject = Uneven(engine._batches.of_one_block(), row, target)
    message = rf"A row of {length} tokens .* beside 2 others than alone .*--adapter-slots 0"
    with pytest.raises(SelfTestFailed, match=message):
        compare_training(engine.info, engine._config, subject)


def test_every_row_learns_something_that_is_compared(engine_of):
    """No derivative is zero, or the test would compare nothing."""
    engine = engine_of("gemma3_tiny")
    found = []

    class Seen:
        def run(self, batch, take):
            def see(layer, row, target, by_head):
                found.append(min(float(np.linalg.norm(each)) for each in by_head))
                take(layer, row, target, by_head)

            return engine._batches.of_one_block().run(batch, see)

    compare_training(engine.info, engine._config, Seen())
    assert len(found) == 2 * 3 * 7
    assert min(found) > 0
