"""Stories of the recall tasks: facts, what is asked about them, and filler, by a random generator alone.

```
needle     the code of one city among filler               RULER, arXiv 2404.06654
multikey   the codes of four cities, one asked             RULER
mqar       nothing but pairs of key and value; three are   Zoology, arXiv 2312.04927
           asked, the first two answered in the prompt
copy       eight random words, asked after the first one   Jelassi et al., arXiv 2402.01032
variables  two chains X = number, Y = X, Z = Y; one Z      RULER
babi       who went where and took what; where is it now   bAbI, arXiv 1502.05698
multivalue four codes of one city, all asked               RULER
multiquery the codes of four cities, all asked             RULER
cwe        ten common words among words that come once:    RULER
           the tenth, after nine of them
fwe        the three most frequent of many coded words     RULER
nolima     who lives beside a landmark; asked by its city  NoLiMa, arXiv 2502.05167: no word is shared
phonebook  nothing but names and numbers; one is asked     Jelassi et al.
```

What differs from RULER: a task with several answers gives the earlier ones before it asks for the next, so that one
forward pass scores all. The common and frequent words stand in the first three quarters, so that a window cannot count.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from linearize.evaluation.suite import DEFAULT_TEXT, read_text


def _words(text: str) -> list[str]:
    return text.split()


# Short common words: most tokenizers have a token for each, so that a prompt is cut within a few tokens of its length.
CITIES = _words("Paris London Rome Berlin Madrid Vienna Oslo Cairo Lima Tokyo Boston Dublin Prague Athens Moscow Delhi")
PEOPLE = _words("Anna Tom Mary John Emma Paul Lucy Mark Sara Peter Jane David")
ROOMS = _words("kitchen garden office bedroom hallway cellar school park library bathroom")
THINGS = _words("apple ball book lamp coat ring")
ADJECTIVES = _words(
    "red blue green old new big small long short dark light cold warm wet dry soft hard fast slow young quiet loud "
    "thin thick round flat clean rich poor sweet"
)
NOUNS = _words(
    "house door tree river stone bird horse field road bridge table chair window boat ship train box bag cup plate "
    "knife clock mirror picture letter paper pen shoe hat shirt glass bottle wall roof floor hill lake beach island "
    "forest farm cow dog cat fish sheep wolf bear lion mouse frog snake tower castle church market shop hotel station"
)
# Parts of a filler sentence. None of their words is an answer to anything.
FILLER = (
    ["The man", "The girl", "A boy", "The cook", "My friend", "A nurse", "The old lady", "Our guest", "A child"],
    ["saw", "liked", "passed", "found", "knew", "drew", "left", "wanted", "watched", "missed"],
    ["the sun", "a cloud", "the rain", "the fire", "some snow", "the sea", "a song", "the wind", "a game", "the moon"],
    ["at night", "by day", "all week", "in May", "with joy", "once more", "after lunch", "for hours", "by chance"],
)


COMMON, FREQUENT = 10, (24, 12, 6)
"""How often each of the common words comes, and each of the three most frequent ones."""
MORE_PEOPLE = _words("Alice Henry Laura George Helen Simon Julia Frank Nina Robert Clara Martin")
SURNAMES = _words(
    "Smith Jones Brown Taylor Wilson Evans Walker Wright Green Hall Wood Lewis Clark Young King Hill Scott Cook Ward "
    "Price Ross Long Gray Ford Stone Fox Cole Hunt Dean Lane West Moore Baker Cooper Parker Carter Turner Adams Allen"
)
# A landmark by its city, as texts name it: who knows both finds the one by the other.
LANDMARKS = {
    "Paris": "the Eiffel Tower",
    "London": "Buckingham Palace",
    "Rome": "the Colosseum",
    "Berlin": "the Brandenburg Gate",
    "Athens": "the Acropolis",
    "Moscow": "the Kremlin",
    "New York": "the Empire State Building",
    "San Francisco": "the Golden Gate Bridge",
    "Sydney": "the Opera House",
    "Washington": "the White House",
    "Istanbul": "the Hagia Sophia",
    "Agra": "the Taj Mahal",
}


@dataclass(frozen=True)
class Story:
    """What an item is made of, before filler brings it to its length.

    Attributes:
        head: what stands before the context.
        facts: sentences of the context that the answer needs, or that compete with it, in order.
        shares: of each fact, the share of the filler before it; None stands for the wanted depth.
        question: what stands after the context; the answer follows.
        answer: begins with a blank.
        filler: endless sentences.
        separator: between sentences.
        more: what follows the answer, and the answer after that; as often as there are further answers.
    """

    head: str
    facts: list[str]
    shares: list[float | None]
    question: str
    answer: str
    filler: Iterator[str]
    separator: str = " "
    more: tuple[tuple[str, str], ...] = ()


def sentences(rng: random.Random) -> Iterator[str]:
    """Filler without end, none of whose words is an answer to anything."""
    while True:
        yield " ".join(rng.choice(part) for part in FILLER) + "."


def filler_words(rng: random.Random) -> list[str]:
    """Words of one sentence more, the last of which fill a prompt up."""
    return next(sentences(rng)).split()


def _spread(rng: random.Random, count: int, end: float = 1.0) -> list[float | None]:
    return [*sorted(end * rng.random() for _ in range(count))]


def _needles(rng: random.Random, count: int) -> Story:
    cities, codes = rng.sample(CITIES, count), rng.sample(range(1000, 10000), count)
    facts = [f"The secret code of {city} is {code}." for city, code in zip(cities, codes, strict=True)]
    asked = f"the secret code of {cities[0]}"
    question = f"Question: What is {asked}? Answer: T{asked[1:]} is"
    shares = [None, *_spread(rng, count - 1)]
    return Story("Remember the codes in this text.", facts, shares, question, f" {codes[0]}", sentences(rng))


def _needle(rng: random.Random) -> Story:
    return _needles(rng, 1)


def _multikey(rng: random.Random) -> Story:
    return _needles(rng, 4)


def _mqar(rng: random.Random) -> Story:
    keys = [" ".join(pair) for pair in itertools.product(ADJECTIVES, NOUNS)]
    rng.shuffle(keys)
    pairs = [f"{key}: {rng.randint(10, 99)}" for key in keys]
    asked, answer = pairs[2].split(":")
    question = "\n".join(["Again:", *pairs[:2], f"{asked}:"])
    shares: list[float | None] = [rng.random() for _ in range(3)]
    filler = itertools.chain(pairs[3:], sentences(rng))
    return Story("All the numbers:", pairs[:3], shares, question, answer, filler, "\n")


def _copy(rng: random.Random) -> Story:
    first, *rest = rng.sample(NOUNS, 8)
    answer = " " + " ".join(rest)
    fact = f"The list of words is: {first}{answer}."
    question = f"Question: What is the list of words? Answer: The list of words is: {first}"
    return Story("Remember the list of words in this text.", [fact], [None], question, answer, sentences(rng))


def _variables(rng: random.Random) -> Story:
    names, values = rng.sample("BCDEFGHJKLMNPQRSTUVWXYZ", 6), rng.sample(range(1000, 10000), 2)
    chains = [
        [f"{x} = {value}.", f"{y} = {x}.", f"{z} = {y}."]
        for (x, y, z), value in zip((names[:3], names[3:]), values, strict=True)
    ]
    order = rng.sample([0, 0, 0, 1, 1, 1], 6)
    facts = [chains[chain][order[:i].count(chain)] for i, chain in enumerate(order)]
    question = f"Question: Which number is {names[2]}? Answer: The number {names[2]} is"
    head = "Remember the number of each letter in this text."
    return Story(head, facts, _spread(rng, 6), question, f" {values[0]}", sentences(rng))


def _babi(rng: random.Random) -> Story:
    people = rng.sample(PEOPLE, 3)
    rooms = {person: rng.sample(ROOMS, 2) for person in people}
    order = rng.sample(people * 2, 6)
    facts = [f"{person} went to the {rooms[person][order[:i].count(person)]}." for i, person in enumerate(order)]
    holder, asked, thing = people[0], rng.choice(people), rng.choice(THINGS)
    facts.insert(rng.randint(order.index(holder) + 1, 6), f"{holder} took the {thing}.")
    subject = f"the {thing}" if asked == holder else asked
    question = f"Question: Where is {subject}? Answer: {subject[0].upper()}{subject[1:]} is in the"
    head = "Remember where everybody goes in this text."
    return Story(head, facts, _spread(rng, 7), question, f" {rooms[asked][1]}", sentences(rng))


def _multivalue(rng: random.Random) -> Story:
    city, codes = rng.choice(CITIES), rng.sample(range(1000, 10000), 4)
    facts = [f"One secret code of {city} is {code}." for code in codes]
    question = f"Question: What are the secret codes of {city}? Answer: The secret codes of {city} are"
    more = tuple((",", f" {code}") for code in codes[1:])
    head = "Remember the codes in this text."
    return Story(head, facts, _spread(rng, 4), question, f" {codes[0]}", sentences(rng), more=more)


def _multiquery(rng: random.Random) -> Story:
    cities, codes = rng.sample(CITIES, 4), rng.sample(range(1000, 10000), 4)
    pairs = [*zip(cities, codes, strict=True)]
    facts = [f"The secret code of {city} is {code}." for city, code in pairs]
    (first, answer), *others = rng.sample(pairs, 4)
    asked = f"{', '.join([first, *(city for city, _ in others[:2])])} and {others[2][0]}"
    question = f"Question: What are the secret codes of {asked}? Answer: The secret code of {first} is"
    more = tuple((f". The secret code of {city} is", f" {code}") for city, code in others)
    head = "Remember the codes in this text."
    return Story(head, facts, _spread(rng, 4), question, f" {answer}", sentences(rng), more=more)


@cache
def _vocabulary() -> list[str]:
    """Plain words of the embedded text, each a few times in it."""
    counts = Counter(word for word in read_text(DEFAULT_TEXT)[0].split() if word.isascii() and word.isalpha())
    return sorted(word for word, count in counts.items() if word.islower() and 4 <= len(word) <= 7 and count > 4)


def _common_words(rng: random.Random) -> Story:
    words = rng.sample(_vocabulary(), len(_vocabulary()))
    common = words[:10]
    facts = rng.sample(common * COMMON, 10 * COMMON)
    question = f"Question: Which ten words come most often? Answer: They are {', '.join(common[:9])} and"
    head = "In this list some words come often."
    filler = itertools.cycle(words[10:])
    return Story(head, facts, _spread(rng, len(facts), 0.75), question, f" {common[9]}", filler)


def _frequent_words(rng: random.Random) -> Story:
    coded = ("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in itertools.count())
    top = [*itertools.islice(coded, 3)]
    facts = [word for word, count in zip(top, FREQUENT, strict=True) for _ in range(count)]
    rng.shuffle(facts)
    question = "Question: Which three words come most often? Answer: The three words that come most often are"
    head = "In this coded text some words come often."
    shares = _spread(rng, len(facts), 0.75)
    return Story(head, facts, shares, question, f" {top[0]}", coded, more=((",", f" {top[1]}"), (",", f" {top[2]}")))


def _no_shared_words(rng: random.Random) -> Story:
    people, asked = rng.sample(PEOPLE, 4), rng.sample(sorted(LANDMARKS), 4)
    facts = [f"{person} lives next to {LANDMARKS[city]}." for person, city in zip(people, asked, strict=True)]
    question = f"Question: Who lives in {asked[0]}? Answer: The one who lives in {asked[0]} is"
    shares = [None, *_spread(rng, 3)]
    head = "Remember where everybody lives in this text."
    return Story(head, facts, shares, question, f" {people[0]}", sentences(rng))


def _phonebook(rng: random.Random) -> Story:
    names = [" ".join(pair) for pair in itertools.product(PEOPLE + MORE_PEOPLE, SURNAMES)]
    rng.shuffle(names)
    entries = [f"{name}: {rng.randint(1000, 9999)}" for name in names]
    asked, answer = entries[0].split(":")
    question = "\n".join(["Again:", *entries[1:3], f"{asked}:"])
    shares = [None, *_spread(rng, 2)]
    filler = itertools.chain(entries[3:], sentences(rng))
    return Story("The phone book:", entries[:3], shares, question, answer, filler, "\n")


STORIES: dict[str, Callable[[random.Random], Story]] = {
    "needle": _needle,
    "multikey": _multikey,
    "mqar": _mqar,
    "copy": _copy,
    "variables": _variables,
    "babi": _babi,
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "cwe": _common_words,
    "fwe": _frequent_words,
    "nolima": _no_shared_words,
    "phonebook": _phonebook,
}
DEEP = ("needle", "multikey", "copy", "nolima", "phonebook")
"""Tasks that have a depth."""
