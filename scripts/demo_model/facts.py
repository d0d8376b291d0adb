"""What the demo model is to know, as plain tables written for it.

This file holds data only. Everything in it is elementary and was written by hand for this purpose;
nothing was taken from a corpus or from another model's output.
"""

from __future__ import annotations

ABOUT: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "What is edgellm?", "Tell me about edgellm.", "What does edgellm do?",
            "Explain edgellm.", "What is this program?", "What is EdgeLLM?",
        ),
        "edgellm runs one language model over several small devices. Each device holds some of the "
        "layers, and together they answer.",
    ),
    (
        (
            "How does edgellm work?", "How do the devices work together?",
            "How does it work?", "How do you split a model?",
        ),
        "The model is cut between its layers. Each device runs its part and sends the result "
        "to the next one.",
    ),
    (
        ("Why use several devices?", "Why use edgellm?", "What is edgellm good for?"),
        "One small device may not have enough memory for a large model. "
        "Several devices together do.",
    ),
    (
        ("What is a stage?", "What is a stage in edgellm?", "What does a stage do?"),
        "A stage is one device with its span of layers.",
    ),
    (
        ("What is a shard?", "What is a shard in edgellm?"),
        "A shard is the part of the model file that one device needs.",
    ),
    (
        ("What is a pipeline?", "What is a pipeline in edgellm?"),
        "A pipeline is a row of stages. What one stage computes goes to the next.",
    ),
    (
        ("What is a layer?", "What is a layer of a model?"),
        "A layer is one step of the model. Layers run one after another.",
    ),
    (
        ("What is a token?", "What are tokens?"),
        "A token is a small piece of text, such as a word or a part of a word.",
    ),
    (
        ("What is a plan?", "What is a plan in edgellm?"),
        "A plan says which device runs which layers.",
    ),
    (
        ("What is prefill?", "What does prefill mean?"),
        "Prefill is reading the whole prompt before the first new token.",
    ),
    (
        ("What is decode?", "What does decode mean?"),
        "Decode is making new tokens, one after another.",
    ),
    (
        (
            "How do I use a bigger model?", "How do I use a real model?",
            "How do I run a better model?", "Can I use another model?",
        ),
        "Give edgellm a GGUF file with the option --model.",
    ),
    (
        (
            "Who are you?", "What are you?", "What is your name?", "Are you a model?",
            "Tell me about yourself.", "Are you a robot?", "Are you human?",
        ),
        "I am the demo model of edgellm. I am very small and know only simple things.",
    ),
    (
        ("How big are you?", "How many layers do you have?", "Are you big?", "Are you large?"),
        "I am tiny: eight layers in less than four megabytes.",
    ),
    (
        ("Who made you?", "Who trained you?", "Where do you come from?", "Who wrote you?"),
        "I was trained by a script of the edgellm project, on text that the script wrote itself.",
    ),
    (
        (
            "What can you do?", "What do you know?", "Help!", "Help me.", "What can I ask you?",
            "What should I ask you?",
        ),
        "I know about edgellm, sums, counting, opposites, colours, animals, days and capitals. "
        "I can tell a story as well.",
    ),
    (
        (
            "Hello!", "Hello", "Hi!", "Hi", "Hi there!", "Hey!", "Hello there!", "Good morning!",
            "Good evening!", "Good day!", "Greetings!",
        ),
        "Hello! I am the demo model of edgellm. What would you like to know?",
    ),
    (
        ("How are you?", "How are you today?", "How do you do?", "Are you well?"),
        "I am well, thank you. How can I help you?",
    ),
    (
        ("Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot!", "Great, thank you."),
        "You are welcome!",
    ),
    (
        ("Goodbye!", "Bye!", "Good night!", "See you later!", "Bye bye!"),
        "Goodbye! Come back soon.",
    ),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh."),
        "Why did the layer cross the network? To get to the other stage!",
    ),
    (
        ("Write a poem.", "Tell me a poem.", "Do you know a poem?"),
        "The sun is warm, the moon is white, good day to you, and then good night.",
    ),
    (
        ("Are you smart?", "Are you clever?"),
        "Not very. I am a small demo model, but I can do simple sums.",
    ),
    (
        ("How many days are in a week?", "How many days does a week have?"),
        "There are seven days in a week.",
    ),
    (
        ("How many months are in a year?", "How many months does a year have?"),
        "There are twelve months in a year.",
    ),
    (
        ("How many hours are in a day?", "How many hours does a day have?"),
        "There are twenty-four hours in a day.",
    ),
    (
        ("How many minutes are in an hour?", "How many minutes does an hour have?"),
        "There are sixty minutes in an hour.",
    ),
    (
        ("Name the days of the week.", "What are the days of the week?", "List the days."),
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.",
    ),
    (
        ("Name the seasons.", "What are the seasons?", "How many seasons are there?"),
        "There are four seasons: spring, summer, autumn and winter.",
    ),
    (("Name a colour.", "Tell me a colour.", "Which colours are there?"), "Blue is a colour."),
    (("Name an animal.", "Tell me an animal.", "Do you know an animal?"), "A cat is an animal."),
    (("Name a fruit.", "Tell me a fruit.", "Do you know a fruit?"), "An apple is a fruit."),
    (
        ("Name three colours.", "Name some colours.", "Tell me three colours."),
        "Red, blue and green.",
    ),
    (
        ("Name three animals.", "Name some animals.", "Tell me three animals."),
        "A cat, a dog and a horse.",
    ),
    (
        ("Name three fruits.", "Name some fruits.", "Tell me three fruits."),
        "An apple, a pear and a plum.",
    ),
    (
        ("Say the alphabet.", "What is the alphabet?", "Tell me the alphabet."),
        "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z.",
    ),
)  # fmt: skip
"""(ways to ask, answer)."""

OPPOSITES: tuple[tuple[str, str], ...] = (
    ("hot", "cold"), ("big", "small"), ("tall", "short"), ("fast", "slow"), ("old", "new"),
    ("up", "down"), ("left", "right"), ("day", "night"), ("black", "white"), ("open", "closed"),
    ("happy", "sad"), ("light", "dark"), ("wet", "dry"), ("full", "empty"), ("hard", "soft"),
    ("high", "low"), ("near", "far"), ("rich", "poor"), ("strong", "weak"), ("early", "late"),
    ("loud", "quiet"), ("clean", "dirty"), ("thick", "thin"), ("wide", "narrow"), ("good", "bad"),
    ("first", "last"), ("inside", "outside"), ("yes", "no"), ("true", "false"), ("sweet", "sour"),
    ("deep", "shallow"), ("win", "lose"), ("push", "pull"), ("start", "stop"), ("give", "take"),
    ("love", "hate"), ("east", "west"), ("north", "south"), ("summer", "winter"),
    ("smooth", "rough"),
)  # fmt: skip
"""Pairs, asked in both directions."""

COLOURS: tuple[tuple[str, str], ...] = (
    ("the sky", "blue"), ("grass", "green"), ("snow", "white"), ("a banana", "yellow"),
    ("a tomato", "red"), ("the sun", "yellow"), ("a lemon", "yellow"), ("milk", "white"),
    ("the sea", "blue"), ("a frog", "green"), ("coal", "black"), ("a carrot", "orange"),
    ("blood", "red"), ("a leaf", "green"), ("an orange", "orange"), ("chocolate", "brown"),
    ("a flamingo", "pink"), ("a crow", "black"), ("a swan", "white"), ("an elephant", "grey"),
    ("a strawberry", "red"), ("the night", "black"), ("paper", "white"), ("a cucumber", "green"),
    ("a pig", "pink"), ("a bear", "brown"), ("a plum", "purple"), ("a cherry", "red"),
    ("salt", "white"), ("wood", "brown"), ("a lime", "green"), ("a fire engine", "red"),
)  # fmt: skip
"""(thing with its article, colour)."""

ANIMALS: tuple[tuple[str, str, str, int], ...] = (
    ("dog", "woof", "puppy", 4), ("cat", "meow", "kitten", 4), ("cow", "moo", "calf", 4),
    ("sheep", "baa", "lamb", 4), ("duck", "quack", "duckling", 2), ("pig", "oink", "piglet", 4),
    ("horse", "neigh", "foal", 4), ("hen", "cluck", "chick", 2), ("lion", "roar", "cub", 4),
    ("goat", "maa", "kid", 4), ("frog", "croak", "tadpole", 4), ("owl", "hoot", "owlet", 2),
    ("bee", "buzz", "larva", 6), ("mouse", "squeak", "pup", 4), ("goose", "honk", "gosling", 2),
)  # fmt: skip
"""(animal, what it says, its young, legs)."""

LEGS: tuple[tuple[str, int], ...] = (
    ("a spider", 8), ("an ant", 6), ("a fly", 6), ("a bird", 2), ("a fish", 0), ("a snake", 0),
    ("a table", 4), ("a chair", 4), ("a man", 2), ("a beetle", 6), ("a butterfly", 6),
)  # fmt: skip

CAPITALS: tuple[tuple[str, str], ...] = (
    ("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Spain", "Madrid"),
    ("England", "London"), ("Portugal", "Lisbon"), ("Greece", "Athens"), ("Austria", "Vienna"),
    ("Poland", "Warsaw"), ("Norway", "Oslo"), ("Japan", "Tokyo"), ("China", "Beijing"),
    ("Russia", "Moscow"), ("Egypt", "Cairo"), ("Ireland", "Dublin"), ("Cuba", "Havana"),
    ("Peru", "Lima"), ("Kenya", "Nairobi"), ("Sweden", "Stockholm"), ("Finland", "Helsinki"),
    ("Canada", "Ottawa"), ("Hungary", "Budapest"), ("Belgium", "Brussels"), ("India", "New Delhi"),
)  # fmt: skip

KINDS: tuple[tuple[str, str], ...] = (
    ("a carrot", "a vegetable"), ("an apple", "a fruit"), ("a pear", "a fruit"),
    ("a dog", "an animal"),
    ("a cat", "an animal"), ("a rose", "a flower"), ("a tulip", "a flower"), ("an oak", "a tree"),
    ("a hammer", "a tool"), ("a saw", "a tool"), ("a piano", "an instrument"),
    ("a drum", "an instrument"),
    ("red", "a colour"), ("blue", "a colour"), ("Monday", "a day"), ("May", "a month"),
    ("Paris", "a city"), ("France", "a country"), ("a chair", "a piece of furniture"),
    ("a sparrow", "a bird"), ("an owl", "a bird"), ("a salmon", "a fish"), ("an ant", "an insect"),
    ("a bee", "an insect"), ("tea", "a drink"), ("milk", "a drink"), ("bread", "food"),
    ("a bus", "a vehicle"), ("a bicycle", "a vehicle"), ("a potato", "a vegetable"),
    ("gold", "a metal"),
    ("iron", "a metal"), ("a phone", "a device"), ("a laptop", "a device"),
)  # fmt: skip

IS: tuple[tuple[str, str], ...] = (
    ("ice", "cold"), ("fire", "hot"), ("the sun", "hot"), ("snow", "cold"), ("an elephant", "big"),
    ("a mouse", "small"), ("a snail", "slow"), ("a rocket", "fast"), ("a stone", "hard"),
    ("a pillow", "soft"), ("water", "wet"), ("sand", "dry"), ("a giraffe", "tall"),
    ("sugar", "sweet"),
    ("a lemon", "sour"), ("the night", "dark"), ("a whisper", "quiet"), ("thunder", "loud"),
    ("the ocean", "deep"),
)  # fmt: skip
"""(thing, what it is); the opposite of it is asked for as well."""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)  # fmt: skip

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate",
    "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tom", "Uma", "Vera", "Will", "Yara",
    "Zoe",
    "Alice", "Bob", "Lucy", "Max", "Nina", "Oscar", "Peter", "Sara",
)  # fmt: skip

HEROES = (
    "fox", "cat", "dog", "bear", "mouse", "rabbit", "bird", "frog", "owl", "horse", "duck", "lion",
    "turtle", "robot", "dragon", "hen", "snail", "whale",
)  # fmt: skip
PLACES = ("forest", "garden", "village", "valley", "field", "house by the sea", "tall tower")
TREASURES = (
    ("a golden key", "opened an old door"), ("a small lamp", "lit the dark road"),
    ("a red ball", "rolled down the hill"), ("a map", "led to a hidden lake"),
    ("a silver bell", "rang very softly"), ("a blue stone", "shone in the night"),
)  # fmt: skip
FEELINGS = ("happy", "proud", "glad")

STRANGE_THINGS = (
    "the weather", "football", "politics", "the stock market", "history", "physics", "chemistry",
    "cooking", "music", "films", "travel", "health", "law", "philosophy", "space", "computers",
    "art", "poetry", "money", "religion", "gardening", "cars", "games", "biology", "economics",
    "television", "the news", "fashion", "mathematics", "war", "love", "school",
)  # fmt: skip
STRANGE_QUESTIONS = (
    "What do you think about {}?", "Tell me about {}.", "Explain {} to me.", "Who invented {}?",
    "Write an essay about {}.", "What is the history of {}?", "Can you teach me {}?",
    "What is the best book about {}?", "Why is {} important?", "What is new in {}?",
)  # fmt: skip
STRANGE_WHOLE = (
    "Write a program in Python.", "What time is it?", "What is the date today?",
    "What is the meaning of life?", "Will it rain tomorrow?", "Who is the president?",
    "Translate this into French.", "Where am I?", "Who won the game?", "How do I bake a cake?",
    "What should I eat tonight?", "How old is the universe?", "Draw me a picture.",
    "What is the square root of two?", "Fix my code.", "Summarise this text.", "Book me a flight.",
    "How far is the moon?", "Who wrote that book?", "What is my password?",
)  # fmt: skip
UNKNOWN = (
    "I am only a small demo model and do not know that. Ask me about sums, colours or animals."
)
