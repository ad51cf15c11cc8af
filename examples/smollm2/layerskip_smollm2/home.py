"""The made-up home that fills the slots of the parsing task: the templates ship without areas, names and free texts."""

from __future__ import annotations

AREAS = (
    "kitchen", "living room", "bedroom", "bathroom", "office", "garage", "hallway", "dining room", "guest room",
    "attic", "basement", "laundry room", "nursery", "garden", "patio", "study", "playroom", "pantry", "workshop",
    "library", "master bedroom", "home theater", "sunroom", "entryway", "balcony", "gym", "cellar", "conservatory",
)  # fmt: skip

FLOORS = ("ground floor", "first floor", "second floor", "upstairs", "downstairs", "top floor")

NAMES: dict[str, tuple[str, ...]] = {
    "light": ("bedside lamp", "ceiling light", "desk lamp", "porch light", "reading lamp", "floor lamp", "fairy lights",
              "mirror light", "spotlight", "lava lamp"),
    "switch": ("coffee maker", "space heater", "christmas tree", "water pump", "charger", "toaster", "router"),
    "fan": ("ceiling fan", "tower fan", "extractor fan", "desk fan"),
    "media_player": ("tv", "soundbar", "kitchen speaker", "radio", "record player", "projector", "home cinema"),
    "input_boolean": ("guest mode", "vacation mode", "night mode"),
    "climate": ("thermostat", "air conditioner", "heat pump", "radiator", "boiler"),
    "scene": ("movie night", "good morning", "party time", "dinner", "bedtime", "romantic evening", "focus"),
    "cover": ("front blinds", "left curtain", "garage door", "skylight shade", "bay window shutter", "awning"),
    "lock": ("front door", "back door", "side gate", "garden gate", "shed lock"),
    "binary_sensor": ("doorbell button", "motion detector", "leak sensor", "smoke alarm", "phone"),
    "sensor": ("outdoor humidity", "power meter", "rain gauge", "air quality"),
    "valve": ("sprinkler valve", "main water valve", "gas valve", "irrigation valve"),
    "todo": ("groceries", "chores", "packing", "homework", "birthday", "weekend"),
    "vacuum": ("robot vacuum", "dusty", "roomba"),
    "lawn_mower": ("robot mower", "grassy"),
    "person": ("alice", "bob", "maria", "grandpa", "john"),
    "weather": ("london", "paris", "berlin", "new york", "home weather"),
    "button": ("reset button", "doorbell chime", "reboot router"),
    "input_button": ("panic button", "feeding button"),
    "script": ("water the plants", "close up", "feed the cat"),
}  # fmt: skip

_ITEMS = (
    "milk", "eggs", "bread", "butter", "apples", "olive oil", "coffee beans", "dish soap", "orange juice", "rice",
    "toilet paper", "dark chocolate", "batteries", "cat food", "tomatoes", "onions", "yogurt", "paper towels",
    "ground beef", "green tea", "pasta", "cheddar cheese", "bananas", "shampoo",
)  # fmt: skip

FREE_TEXTS: dict[str, tuple[str, ...]] = {
    "message": (
        "dinner is ready", "the taxi is here", "time for bed", "i am on my way", "we leave in ten minutes",
        "the laundry is done", "movie starts soon", "grandma is calling", "the cake is in the oven", "lunch is served",
        "breakfast is on the table", "the package has arrived", "practice the piano", "the dog needs a walk",
    ),
    "search_query": (
        "bohemian rhapsody", "the beatles", "abbey road", "morning jazz", "taylor swift", "planet earth", "star wars",
        "miles davis", "classical essentials", "daily news", "the office", "back in black", "daft punk",
        "road trip mix", "hotel california", "inception", "true crime weekly", "ocean sounds", "nina simone",
        "thriller",
    ),
    "zone": ("work", "school", "the gym", "grandma's house", "the airport", "downtown"),
    "timer_name": ("pizza", "pasta", "tea", "laundry", "workout", "nap", "cookies", "homework", "egg", "rice"),
    "timer_command": (
        "turn off the lights", "open the garage door", "lock the front door", "turn on the tv", "close the curtains",
        "start the dishwasher", "pause the music", "turn off the heater", "water the garden",
    ),
    "shopping_list_item": _ITEMS,
    "todo_list_item": (
        *_ITEMS[:8], "call the dentist", "pay the rent", "clean the windows", "fix the bike", "mow the lawn",
        "renew the passport", "book flights", "buy a gift", "return the books", "sort the mail",
    ),
}  # fmt: skip
