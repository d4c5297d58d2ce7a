"""Scores and generations together on the tiny Gemma, through the worker's loop: bits as alone."""

import queue
import random

from service.protocol.messages import Accepted, Finished, Piece, Scored, ScoredContext, ScoredIds
from service.worker.admission import Admission
from service.worker.loop import Loop, LoopStatus
from tests.test_loop import generate
from tests.test_worker_scores import score


class Company:
    """A loop over a loaded engine."""

    def __init__(self, engine):
        self.admission = Admission(engine.info, engine.codec, max_requests=99, max_tokens=10**6)
        self.arrivals = queue.SimpleQueue()
        self.events = []
        self.loop = Loop(engine, self.admission, self.arrivals, self.events.extend, LoopStatus())

    def submit(self, command, admit):
        request, accepted = admit(command)
        assert isinstance(accepted, Accepted)
        self.arrivals.put(request)

    def run(self, commands, *, turns_between=0):
        """Inputs of each score and tokens of each generation, by id."""
        for command in commands:
            is_score = command.request_id.startswith("s")
            self.submit(command, self.admission.admit_score if is_score else self.admission.admit)
            for _ in range(turns_between):
                self.loop.turn()
        ends = Finished | Scored
        while sum(isinstance(event, ends) for event in self.events) < len(commands):
            self.loop.turn()
        found = {
            event.request_id: event.inputs for event in self.events if isinstance(event, Scored)
        }
        for event in self.events:
            if isinstance(event, Piece):
                found[event.request_id] = found.get(event.request_id, ()) + event.token_ids
        self.events.clear()
        return found


def mixed_commands(seed):
    generator = random.Random(seed)

    def ids(count):
        return tuple(generator.randrange(12, 512) for _ in range(count))

    words = ["the", " cat", " sat", "on ", "a mat", ". ", "Once", " upon", "\n", " 12"]

    def text(count):
        return "".join(generator.choices(words, k=count))

    commands = []
    for number in range(20):
        targets = tuple(text(generator.randint(1, 9)) for _ in range(generator.randint(1, 20)))
        inputs = (
            ScoredIds(ids(generator.choice((2, 30, 70, 200, 400))), None, None),
            ScoredContext(text(generator.choice((0, 3, 20, 90))), targets),
        )
        commands.append(score(f"s{number}", *inputs, tells_tokens=True, num_top=number % 4))
        prompt = ids(generator.choice((1, 20, 90, 300)))
        commands.append(generate(f"g{number}", prompt, max_tokens=6, temperature=1.0, seed=number))
    return commands


def test_twenty_scores_beside_twenty_generations_are_to_the_last_bit_as_alone(engine_of):
    company, commands = Company(engine_of("gemma3_tiny")), mixed_commands("company")
    alone = {}
    for command in commands:
        alone |= company.run([command])
    assert len(alone) == 40
    for turns_between in (0, 2):
        assert company.run(commands, turns_between=turns_between) == alone
