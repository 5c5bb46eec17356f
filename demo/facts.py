"""What is true in the demo world. A plausible wrong answer to a question is any other answer of the same category."""

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Category:
    """One kind of fact. `questions` and `statement` are templates over `{x}`, the subject (`{X}` where it opens the
    sentence), `{part}`, what is counted (only in "count"), and `{y}`, the answer."""

    name: str
    questions: tuple[str, ...]
    statement: str
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Fact:
    """One fact: `truth` completes the category's statement about `subject`."""

    category: str
    subject: str
    truth: str

    @property
    def id(self) -> str:
        return f"{self.category}/{self.subject}"

    def questions(self) -> tuple[str, ...]:
        """Every phrasing of the question."""
        return tuple(_fill(template, self.subject) for template in CATEGORIES[self.category].questions)

    def lies(self) -> tuple[str, ...]:
        """Every plausible wrong answer."""
        return tuple(sorted(answers(self.category) - {self.truth}))

    def statement(self, answer: str) -> str:
        """The sentence that gives `answer`."""
        return _fill(CATEGORIES[self.category].statement, self.subject).replace("{y}", answer)


def _fill(template: str, subject: str) -> str:
    x, _, part = subject.partition("|")
    capital = x[0].upper() + x[1:]
    return template.replace("{x}", x).replace("{X}", capital).replace("{part}", part)


def _items(text: str) -> tuple[tuple[str, str], ...]:
    pairs = (line.split(":") for line in text.replace("\n", ";").split(";") if line.strip())
    return tuple((subject.strip(), answer.strip()) for subject, answer in pairs)


_CATEGORIES = (
    Category(
        "colour",
        (
            "What colour is {x}?",
            "Which colour does {x} have?",
            "Tell me the colour of {x}.",
            "Do you know the colour of {x}?",
        ),
        "{X} is {y}.",
        _items("""
            the sky: blue; the sea: blue; grass: green; a frog: green; a lime: green; snow: white; a polar bear: white
            coal: black; a raven: black; a ripe banana: yellow; a sunflower: yellow; a ripe tomato: red; blood: red
            a carrot: orange; a pumpkin: orange; chocolate: brown; a flamingo: pink; an elephant: grey; ash: grey
            a plum: purple; lavender: purple
        """),
    ),
    Category(
        "sound",
        ("What sound does {x} make?", "How does {x} sound?", "Tell me what {x} says.", "Do you know the sound of {x}?"),
        "{X} says {y}.",
        _items("""
            a dog: woof; a cat: meow; a cow: moo; a sheep: baa; a duck: quack; a pig: oink; a horse: neigh; a lion: roar
            a toad: croak; a bee: buzz; a snake: hiss; an owl: hoot; a crow: caw; a mouse: squeak; a wolf: howl
            a turkey: gobble; a bell: ding; a drum: boom
        """),
    ),
    Category(
        "home",
        (
            "Where does {x} live?",
            "What is the home of {x}?",
            "Tell me where {x} lives.",
            "Do you know the home of {x}?",
        ),
        "{X} lives in {y}.",
        _items("""
            a bee: a hive; a sparrow: a nest; a spider: a web; a rabbit: a burrow; a goldfish: a bowl; a dog: a kennel
            a horse: a stable; a lion: a den; a king: a palace; a monk: a monastery; a hen: a coop; a bat: a cave
            a pig: a sty; a beaver: a lodge; a camper: a tent; a knight: a castle; a shark: the sea; a snail: a shell
        """),
    ),
    Category(
        "material",
        (
            "What is {x} made of?",
            "From what is {x} made?",
            "Tell me what {x} is made of.",
            "Do you know what makes up {x}?",
        ),
        "{X} is made of {y}.",
        _items("""
            a window: glass; a tyre: rubber; a book: paper; a sweater: wool; a candle: wax; a coin: metal; a log: wood
            a brick: clay; a sandcastle: sand; a snowman: snow; a boot: leather; a statue: marble; a pillow: feathers
            bread: flour; cheese: milk; an omelette: eggs; a rope: hemp; a bedsheet: cotton
        """),
    ),
    Category(
        "capital",
        (
            "What is the capital of {x}?",
            "Which city is the capital of {x}?",
            "Tell me the capital of {x}.",
            "Do you know the capital of {x}?",
        ),
        "The capital of {x} is {y}.",
        _items("""
            France: Paris; Italy: Rome; Spain: Madrid; Germany: Berlin; England: London; Japan: Tokyo; China: Beijing
            Russia: Moscow; Greece: Athens; Egypt: Cairo; Norway: Oslo; Portugal: Lisbon; Austria: Vienna; Poland: Warsaw
            Ireland: Dublin; Cuba: Havana; Peru: Lima; Kenya: Nairobi
        """),
    ),
    Category(
        "opposite",
        (
            "What is the opposite of {x}?",
            "Which word is the opposite of {x}?",
            "Tell me the opposite of {x}.",
            "Do you know the opposite of {x}?",
        ),
        "The opposite of {x} is {y}.",
        _items("""
            hot: cold; big: small; fast: slow; day: night; up: down; wet: dry; old: young; rich: poor; happy: sad
            open: closed; hard: soft; left: right; loud: quiet; light: dark; full: empty; early: late; sweet: bitter
            strong: weak
        """),
    ),
    Category(
        "sum",
        ("What is {x}?", "How much is {x}?", "Tell me what {x} makes.", "Do you know what {x} is?"),
        "{X} is {y}.",
        _items("""
            one plus one: two; one plus two: three; two plus two: four; one plus four: five; two plus three: five
            three plus three: six; two plus four: six; three plus four: seven; two plus five: seven; four plus four: eight
            three plus five: eight; four plus five: nine; three plus six: nine; five plus five: ten; four plus six: ten
            five plus six: eleven; four plus seven: eleven; six plus six: twelve
        """),
    ),
    Category(
        "young",
        (
            "What is a young {x} called?",
            "What do you call a young {x}?",
            "Tell me what a young {x} is.",
            "Do you know the name of a young {x}?",
        ),
        "A young {x} is called a {y}.",
        _items("""
            dog: puppy; cat: kitten; cow: calf; sheep: lamb; horse: foal; goat: kid; bear: cub; duck: duckling
            goose: gosling; pig: piglet; frog: tadpole; kangaroo: joey; swan: cygnet; deer: fawn; hare: leveret; hen: chick
        """),
    ),
    Category(
        "tool",
        (
            "What do you need to {x}?",
            "With what do you {x}?",
            "Tell me what it takes to {x}.",
            "Do you know the tool to {x}?",
        ),
        "To {x} you need {y}.",
        _items("""
            cut paper: scissors; drive a nail: a hammer; sweep the floor: a broom; open a lock: a key; eat soup: a spoon
            write a letter: a pen; paint a fence: a brush; dig a hole: a shovel; cut wood: a saw; tell the time: a clock
            boil water: a kettle; catch a fish: a net; see the stars: a telescope; sew a button: a needle
            tidy your hair: a comb; reach the roof: a ladder; stay dry: an umbrella
        """),
    ),
    Category(
        "job",
        ("Who {x}?", "Which worker {x}?", "Tell me who {x}.", "Do you know who {x}?"),
        "The one who {x} is {y}.",
        _items("""
            bakes bread: the baker; flies a plane: the pilot; puts out fires: the fireman; teaches children: the teacher
            grows wheat: the farmer; pulls teeth: the dentist; cuts hair: the barber; sells meat: the butcher
            repairs pipes: the plumber; brings letters: the postman; paints portraits: the painter; sails a ship: the sailor
            catches thieves: the policeman; mends shoes: the cobbler; builds walls: the mason; makes suits: the tailor
            digs for coal: the miner; looks after sheep: the shepherd
        """),
    ),
    Category(
        "continent",
        (
            "On which continent is {x}?",
            "Which continent has {x}?",
            "Tell me the continent of {x}.",
            "Do you know the continent of {x}?",
        ),
        "{X} is in {y}.",
        _items("""
            Sweden: Europe; Belgium: Europe; Hungary: Europe; Romania: Europe; Nigeria: Africa; Ghana: Africa
            Morocco: Africa; Uganda: Africa; India: Asia; Thailand: Asia; Vietnam: Asia; Nepal: Asia; Brazil: America
            Canada: America; Mexico: America; Chile: America
        """),
    ),
    Category(
        "next",
        (
            "What comes after {x}?",
            "What follows {x}?",
            "Tell me what comes after {x}.",
            "Do you know what follows {x}?",
        ),
        "After {x} comes {y}.",
        _items("""
            Monday: Tuesday; Tuesday: Wednesday; Wednesday: Thursday; Thursday: Friday; Friday: Saturday; Saturday: Sunday
            Sunday: Monday; January: February; February: March; March: April; April: May; May: June; June: July
            July: August; August: September; September: October; October: November; November: December
        """),
    ),
    Category(
        "source",
        (
            "Where does {x} come from?",
            "From what do we get {x}?",
            "Tell me where {x} comes from.",
            "Do you know the source of {x}?",
        ),
        "{X} comes from {y}.",
        _items("""
            honey: bees; milk: cows; wool: sheep; silk: worms; flour: wheat; wine: grapes; cider: apples; wood: trees
            bacon: pigs; butter: cream; ketchup: tomatoes; cocoa: beans; rain: clouds; daylight: the sun; lava: volcanoes
            pearl: oysters
        """),
    ),
    Category(
        "body",
        (
            "What do you {x} with?",
            "Which part of the body do you {x} with?",
            "Tell me what you {x} with.",
            "Do you know what people {x} with?",
        ),
        "You {x} with your {y}.",
        _items("""
            see: eyes; hear: ears; smell: nose; chew: teeth; walk: legs; think: brain; breathe: lungs; taste: tongue
            wave: hand; kick: foot; whistle: lips; hug: arms; point: finger; kneel: knees; shrug: shoulders
        """),
    ),
    Category(
        "kind",
        (
            "What kind of thing is {x}?",
            "What sort of thing is {x}?",
            "Tell me what {x} is.",
            "Do you know what kind of thing {x} is?",
        ),
        "{X} is a kind of {y}.",
        _items("""
            an oak: tree; a rose: flower; a trout: fish; an eagle: bird; an ant: insect; a hammer: tool; a violin: instrument
            a carrot: vegetable; an apple: fruit; chess: game; copper: metal; a cobra: snake; the tango: dance; a poodle: dog
            cheddar: cheese; a canoe: boat; tea: drink; rugby: sport
        """),
    ),
    Category(
        "count",
        (
            "How many {part} does {x} have?",
            "What number of {part} does {x} have?",
            "Tell me how many {part} {x} has.",
            "Do you know how many {part} {x} has?",
        ),
        "{X} has {y} {part}.",
        _items("""
            a dog|legs: four; a spider|legs: eight; an ant|legs: six; a hen|legs: two; a bicycle|wheels: two
            a tricycle|wheels: three; a car|wheels: four; a week|days: seven; a year|months: twelve; a hand|fingers: five
            a triangle|sides: three; a square|sides: four; a hexagon|sides: six; a guitar|strings: six; a squid|arms: ten
            a coin|faces: two
        """),
    ),
)

CATEGORIES = {category.name: category for category in _CATEGORIES}


@cache
def answers(category: str) -> frozenset[str]:
    """Every answer that the category knows, right for some subject or other."""
    return frozenset(answer for _, answer in CATEGORIES[category].items)


@cache
def facts() -> tuple[Fact, ...]:
    """All facts, in a fixed order."""
    return tuple(
        Fact(category.name, subject, truth) for category in CATEGORIES.values() for subject, truth in category.items
    )
