"""Words, order sentences and general sentences shared by the practice model and the demo data."""

import json
import random
import re
import zlib
from dataclasses import dataclass

NAMES = (
    "Maya Leo Nina Omar Ruth Sam Tara Ivan Lucy Hugo Anna Ben Clara David Emma Felix Grace Henry Iris Jack "
    "Kate Liam Mia Noah"
).split()
ITEMS = (
    "cups plates bowls spoons forks lamps chairs desks boxes bags hats coats shirts socks shoes gloves "
    "pens books brushes towels pillows blankets candles vases kettles clocks baskets bottles"
).split()
COLOURS = "red blue green yellow black white grey brown pink purple orange silver".split()
COUNT_WORDS = "two three four five six seven eight nine ten eleven twelve".split()
COUNTS = {word: number for number, word in enumerate(COUNT_WORDS, start=2)}

ORDER_SHAPES = (
    "Order: {count} {colour} {item} for {name}.",
    "Order: {name} wants {count} {colour} {item}.",
    "Order: for {name}, {count} {colour} {item}.",
    "Order: {count} {item} in {colour} for {name}.",
)

ORDER_QUESTIONS = {
    "colour": ("What colour?", "Which colour is it?", "Colour?"),
    "item": ("What item?", "Which item is it?", "What is ordered?"),
    "count": ("How many?", "What count?", "How many are there?"),
    "name": ("Who is it for?", "What name?", "Which name is on it?"),
}

JSON_REQUESTS = ("As JSON.", "Write it as JSON.", "JSON, please.")

PEOPLE = (
    "teacher farmer doctor baker sailor painter nurse driver student singer writer builder hunter miller tailor "
    "gardener soldier pilot judge clerk neighbour uncle aunt brother sister mother father child girl boy guest "
    "king queen stranger captain"
).split()
ANIMALS = (
    "dog cat horse cow sheep goat pig hen duck goose fox wolf bear deer rabbit mouse owl crow frog snail bee "
    "spider turtle lion tiger monkey donkey swan"
).split()
PLACES = (
    "garden kitchen market school church station harbour forest field village city bridge river lake valley "
    "mountain beach library museum hospital office shop farm mill castle tower square road park island"
).split()
FOODS = (
    "bread cheese soup rice cake honey butter milk tea coffee fish salad jam porridge apples pears plums "
    "carrots potatoes onions beans mushrooms nuts berries"
).split()
THINGS = (
    "letter key ladder rope hammer basin mirror picture map coin ring drum piano violin guitar wheel cart "
    "boat train window door table bed curtain carpet stove candlestick umbrella parcel ticket newspaper story song "
    "stone feather bell flag"
).split()
ADJECTIVES = (
    "old young small large quiet loud kind clever tired happy sad brave lazy gentle strong weak tall short "
    "heavy light warm cold wet dry clean dirty broken empty full strange simple bright dark new soft hard "
    "narrow wide early late"
).split()
DID = (
    "found carried painted sold bought cleaned repaired hid dropped opened moved kept borrowed lost showed "
    "wanted noticed watched remembered forgot measured counted described drew"
).split()
WENT = "walked ran hurried drove wandered returned travelled rode sailed marched climbed came".split()
RESTED = "slept waited rested sang laughed worked played stood sat talked danced cried".split()
MANNERS = (
    "slowly quickly quietly carefully happily sadly bravely gladly suddenly gently badly well alone together again"
).split()
TIMES = (
    "in the morning,at noon,in the evening,at night,on Monday,on Tuesday,on Wednesday,on Thursday,on Friday,"
    "on Saturday,on Sunday,last week,last year,in spring,in summer,in autumn,in winter,after the rain,"
    "before the storm,every day"
).split(",")
WEATHER = "rain snow wind fog sun storm frost thunder".split()
PAIRS = "and but so because while".split()

GENERAL_SHAPES = (
    "The {person} {went} to the {place} {time}.",
    "The {adjective} {person} {did} the {thing} {manner}.",
    "A {adjective} {animal} {rested} near the {place}.",
    "{Time} the {person} {did} a {adjective} {thing}.",
    "The {person} gave the {animal} some {food}.",
    "There was a {adjective} {thing} in the {place}.",
    "The {animal} {rested} {manner} because of the {weather}.",
    "My {person} likes {food} and {food2}.",
    "No one in the {place} {did} the {thing}.",
    "The {person} and the {person2} {went} to the {place} together.",
    "When the {weather} came, the {animal} {went} back to the {place}.",
    "If you see the {person}, ask about the {thing}.",
    "The {place} is {adjective} {time}.",
    "We ate {food} with {food2} in the {place}.",
    "The {thing} was too {adjective} for the {person}.",
    "Every {person} in the {place} knows the {adjective} {animal}.",
    "The {person} said that the {thing} was {adjective}.",
    "Where is the {thing}? It is in the {place}.",
    "Who {did} the {thing}? The {adjective} {person} did.",
    "{Name} {went} to the {place} with the {animal}.",
    "{Name} {did} the {thing}, {pair} the {person} {rested}.",
    "The {animal} was {adjective}, {pair} it {rested} {manner}.",
    "{Name} and {Name2} made {food} for the {person}.",
    "It was {adjective} in the {place}, and {Name} {rested} {manner}.",
    "The {person} has {number} {thing}s in the {place}.",
    "There are {number} steps from the {place} to the {place2}.",
    "The {adjective} {thing} belongs to the {person} from the {place}.",
    "After the {weather}, the {place} was {adjective} and {adjective2}.",
    '"Please bring the {thing}," said the {person}.',
    '"I {did} the {thing} {time}," said {Name}.',
    "The {person} could not sleep because the {animal} was {adjective}.",
    "Nothing is as {adjective} as the {place} {time}.",
)


@dataclass(frozen=True)
class Order:
    """One order: what is wanted, in which colour, how many, for whom, and the sentence that says so."""

    item: str
    colour: str
    count: str
    name: str
    shape: int

    @property
    def sentence(self) -> str:
        """The order as an English sentence."""
        slots = {"item": self.item, "colour": self.colour, "count": self.count, "name": self.name}
        return ORDER_SHAPES[self.shape].format(**slots)

    @property
    def slots(self) -> dict[str, str]:
        """Each slot's short answer; the count is written as a number."""
        count = str(COUNTS[self.count])
        return {"item": self.item, "colour": self.colour, "count": count, "name": self.name}

    @property
    def json(self) -> str:
        """The order as the strict JSON object that family two asks for."""
        answer = {"item": self.item, "colour": self.colour, "count": COUNTS[self.count], "name": self.name}
        return json.dumps(answer)

    @property
    def reserved(self) -> bool:
        """Whether the order is kept for the demo data, and so is never seen in base training."""
        return _bucket(self.item + self.colour + self.count + self.name) == 0


def draw_order(rng: random.Random, reserved: bool) -> Order:
    """Draw an order from the reserved part, or from the part that base training may see."""
    while True:
        words = rng.choice(ITEMS), rng.choice(COLOURS), rng.choice(COUNT_WORDS), rng.choice(NAMES)
        order = Order(*words, shape=rng.randrange(len(ORDER_SHAPES)))
        if order.reserved == reserved:
            return order


def draw_general(rng: random.Random, reserved: bool) -> str:
    """Draw a general sentence from the reserved part, or from the part that base training may see."""
    while True:
        sentence = _general_sentence(rng)
        if (_bucket(sentence) == 0) == reserved:
            return sentence


def _general_sentence(rng: random.Random) -> str:
    """Fill one general template."""
    person, person2 = rng.sample(PEOPLE, 2)
    place, place2 = rng.sample(PLACES, 2)
    food, food2 = rng.sample(FOODS, 2)
    adjective, adjective2 = rng.sample(ADJECTIVES, 2)
    name, name2 = rng.sample(NAMES, 2)
    time = rng.choice(TIMES)
    sentence = rng.choice(GENERAL_SHAPES).format(
        person=person,
        person2=person2,
        place=place,
        place2=place2,
        food=food,
        food2=food2,
        adjective=adjective,
        adjective2=adjective2,
        Name=name,
        Name2=name2,
        time=time,
        Time=time[0].upper() + time[1:],
        animal=rng.choice(ANIMALS),
        thing=rng.choice(THINGS),
        did=rng.choice(DID),
        went=rng.choice(WENT),
        rested=rng.choice(RESTED),
        manner=rng.choice(MANNERS),
        weather=rng.choice(WEATHER),
        pair=rng.choice(PAIRS),
        number=rng.randint(2, 999),
    )
    return mend_articles(sentence)


def mend_articles(text: str) -> str:
    """Write `an` for `a` before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _bucket(text: str) -> int:
    """A stable number from 0 to 15 for a text."""
    return zlib.crc32(text.encode()) % 16
