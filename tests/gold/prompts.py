"""The prompts of ``long_cases.json``: written or generated for this project, nothing quoted."""

import random

CODE_AND_SCRIPTS = '''\
def greet(name: str, *, language: str = "el") -> str:
    """Returns a greeting; raises KeyError for a language it does not know."""
    greetings = {
        "el": "Καλημέρα, {}! Τι κάνεις σήμερα;",
        "ru": "Доброе утро, {}! Как прошла ночь?",
        "ja": "{}さん、おはようございます。今日は雨が降りそうです。",
        "zh": "{}，早上好！今天的火车晚点了十五分钟。",
        "ar": "صباح الخير يا {}، هل وصل القطار؟",
        "hi": "सुप्रभात {}, आज मौसम बहुत अच्छा है।",
        "ko": "{} 님, 좋은 아침이에요. 커피 드실래요?",
        "he": "בוקר טוב {}, מה שלומך?",
        "th": "สวัสดีตอนเช้า {}",
    }
    return greetings[language].format(name)


for index, (name, language) in enumerate([("Zoë", "el"), ("Łukasz", "ru"), ("José", "ja")]):
    print(f"{index:>3}: {greet(name, language=language)}")  # naïve, but it works 🚂🌧️☕

assert 0x1F + 0b101 == 36 and 1e-3 < 2 ** -9 <= 0.001_953_125
'''

LIGHTHOUSE = """\
The lighthouse at the end of the long spit had been dark for eleven winters when Marta Iversen was \
asked to light it again. Nobody had planned it that way. The county wanted a museum, the fishermen \
wanted a lamp, and the money that was left after the new harbour wall would pay for exactly one of \
them. So a letter was sent to the only person on the island who had ever repaired a lens of that \
kind, and she read it twice at her kitchen table before she put on her boots.

The way out took two hours at low tide and could not be walked at all at high tide. She carried a \
bag with three things in it: a set of brass keys, a bottle of clear spirit for the glass, and a \
notebook in which her mother had written down every lamp she had looked after, with the colour of \
the light, the number of seconds between two flashes, and the name of the keeper. The first page \
was about this tower. White, it said, ten seconds, Anton Bragi. Below that, in pencil and in a \
smaller hand: he talks to the birds.

Inside, the air was cold and tasted of salt and old paint. On every landing there was a window no \
larger than a book, through which the sea looked further away and calmer than it was. At the top \
the door had swollen in its frame. She pushed, waited, and pushed again, and then the door gave \
way all at once and she stood in a room made of light.

The lens was taller than she was. Dust lay on it like flour, and two of the lower prisms were \
cracked, but the great bull's-eye in the middle was whole. She opened the bottle, poured a little \
onto a cloth, and began to clean it in small circles, from the middle outwards, as she had been \
taught.

There were four reasons why the lamp had gone out. First, the cable that brought the current had \
been laid too close to the channel, and a dredger had cut it. Second, the company that owned the \
cable had been sold, and the new owners wrote that they could find no record of it. Third, the \
last keeper had grown old and had moved in with his daughter on the mainland. And fourth, although \
nobody said so aloud, the ships no longer needed it: every one of them knew where it was to within \
three metres, by day and by night, and a lamp told them nothing that they did not know.

But the small boats did not know. In the autumn before, in a fog that lasted for six days, a boy \
of fourteen had rowed past the spit and out to sea because he was looking for a light that his \
grandfather had told him about. They found him in the morning in a bad temper. "It was supposed \
to be there," he said. "You said that it was there." And his grandfather, who was also the mayor, \
went home and wrote a letter.

So Marta wound up the clockwork, which still ran, and put a lamp of her own behind the lens, a \
plain one from a car, with a battery that would last until the morning. At nine o'clock she opened \
the shutters. For a moment nothing seemed to happen. Then the beam came round, over the rocks and \
the roofs and the water, and from the village she heard a sound that she could not explain at \
first, until she understood that they were all standing outside, and that every one of them was \
counting: one, two, three, four, five, six, seven, eight, nine, and at ten the light came back. \
She took the notebook, turned to the first page, and wrote below the pencilled line"""

_PLACES = ("the north quay", "Sandholm", "the salt works", "Pier 7", "the old dry dock", "Kvitberg")
_GOODS = ("timber", "dried cod", "lamp oil", "roof slates", "oranges", "sewing machines", "barley")
_WINDS = ("north-east", "south-west", "west by south", "north", "a light southerly")
_EVENTS = (
    "The cook found a cat among the {goods} and has named it Admiral.",
    "Two crates of {goods} were wet, and I have written to the owners at {place}.",
    "We lay at {place} until noon because the pilot was late; he blamed the {goods}.",
    "Passed a schooner bound for {place} with {goods}; she did not answer our flags.",
    "The mate says that the price of {goods} has doubled at {place} since the spring.",
    "Repaired the forward pump. The {goods} from {place} stayed dry after all.",
)
# How the entry after the last begins.
NEXT_ENTRY = "\nDay 33. Wind south-west, force 4; barometer 1002; run 88 miles. Passed"


def ships_log(seed: int, num_entries: int) -> str:
    """Entries of a ship's log: no two alike, much in common, numbers that can be continued."""
    draw = random.Random(seed)
    lines = []
    for day in range(1, num_entries + 1):
        event = draw.choice(_EVENTS)
        event = event.format(goods=draw.choice(_GOODS), place=draw.choice(_PLACES))
        lines.append(
            f"Day {day}. Wind {draw.choice(_WINDS)}, force {draw.randint(1, 9)}; "
            f"barometer {draw.randint(985, 1035)}; run {draw.randint(20, 190)} miles. {event}"
        )
    return "\n".join(lines)


def random_ids(seed: int, num_tokens: int, vocabulary_size: int) -> list[int]:
    """Bos and pieces from all over the vocabulary: rows of the table that no prose reaches."""
    draw = random.Random(seed)
    return [2, *(draw.randrange(300, vocabulary_size) for _ in range(num_tokens - 1))]
