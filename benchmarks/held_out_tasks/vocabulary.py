"""The words that the suite's questions are made of."""

from __future__ import annotations

_GROUPS = """
mammal: dog cat horse cow sheep goat pig lion tiger bear wolf fox rabbit mouse deer camel monkey zebra
fruit: apple pear plum peach grape lemon orange banana cherry melon mango lime apricot coconut kiwi fig
colour: red blue green yellow purple brown black white pink grey violet scarlet turquoise crimson
body part: hand foot knee elbow shoulder nose mouth finger thumb neck chin ankle wrist tongue
furniture: chair table sofa desk shelf bed bench cupboard stool wardrobe drawer armchair
vehicle: car bus train truck bicycle tram boat plane ship scooter van tractor taxi ferry
clothing: shirt coat hat shoe glove scarf sock jacket dress skirt belt sweater trousers boot
tool: hammer saw drill wrench pliers chisel axe shovel rake screwdriver ladder file
bird: eagle owl robin sparrow swan duck goose crow pigeon parrot falcon stork gull
instrument: piano violin guitar flute drum trumpet harp cello clarinet tuba trombone banjo
job: teacher doctor nurse farmer baker pilot lawyer butcher painter singer plumber soldier waiter
weather: rain snow wind storm fog hail thunder sunshine frost mist drizzle blizzard
food: bread cheese butter rice pasta soup honey cake pizza salad sausage pancake noodle
place: river mountain forest island desert beach valley lake garden village city castle harbour bridge
kitchen item: spoon fork knife plate cup bowl kettle pan oven toaster jug mug
plant: rose tulip daisy lily oak pine maple willow ivy fern moss cactus
"""
_NAMES = """
Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tom Vera
"""
_CITIES = """
Paris Rome Berlin Madrid London Oslo Vienna Prague Dublin Lisbon Athens Warsaw Cairo Tokyo Lima
"""

CATEGORIES: dict[str, list[str]] = {
    name: [str(word) for word in words.split()]
    for name, _, words in (line.partition(": ") for line in _GROUPS.strip().splitlines())
}
"""Groups of words that have something in common; no word is in two of them."""

TOO_ALIKE = [{"food", "fruit"}, {"mammal", "bird"}, {"fruit", "plant"}]
"""Groups of which one word would not stand out among those of the other."""

WORDS = [word for group in CATEGORIES.values() for word in group]
NAMES = _NAMES.split()
CITIES = _CITIES.split()
