"""What the conversations of `chat` are about."""

from __future__ import annotations

TOPICS = (
    "volcanoes", "bread baking", "the French Revolution", "chess openings", "houseplants", "black holes",
    "marathon training", "the water cycle", "solar panels", "public speaking", "learning the guitar",
    "job interviews", "photosynthesis", "the Roman Empire", "budgeting", "coral reefs", "meditation",
    "the immune system", "hiking in the mountains", "electric cars", "coffee", "time management", "dinosaurs",
    "the stock market", "recycling", "watercolor painting", "the Silk Road", "beekeeping", "vaccines", "small talk",
    "earthquakes", "yoga", "the printing press", "cheese making", "penguins", "remote work", "the moon landing",
    "bicycle repair", "poetry", "antibiotics", "the Great Wall of China", "vegetable gardening", "machine learning",
    "sleep", "the Olympic Games", "tides", "knitting", "the human heart", "jazz music", "nuclear energy", "camping",
    "the Renaissance", "inflation", "bird watching", "swimming", "DNA", "online privacy", "the Amazon rainforest",
    "writing a novel", "lightning", "sushi", "the Cold War", "stress", "photography", "glaciers", "credit cards",
    "ancient Egypt", "dogs", "wind turbines", "friendship", "the periodic table", "opera", "deserts",
    "running a small business", "the United Nations", "vitamins", "sailing", "the Industrial Revolution",
    "artificial satellites", "homework", "elephants", "tea", "the brain", "moving to a new city", "wetlands",
    "origami", "democracy", "strength training", "comets", "cooking for one", "teamwork", "whales",
    "the Mongol Empire", "allergies", "board games", "the ozone layer", "learning Spanish", "compost", "skiing",
    "mirrors", "the Great Depression", "honey", "robots", "rice", "public libraries", "the Vikings", "headaches",
    "bridges", "pottery", "the Gold Rush", "ants", "classical music", "mortgages", "the speed of light", "city parks",
    "autumn leaves", "cryptography", "the Black Death", "migration of birds", "spices", "theatre", "rainbows",
    "blood pressure", "trains", "the Inca civilization", "soap", "video games", "desalination", "book clubs",
    "mountain goats", "gravity", "grammar", "the Suez Canal", "insurance", "cats", "fermentation",
    "weather forecasts", "museums", "tsunamis", "handwriting", "the Ottoman Empire", "pasta", "3D printing",
    "loneliness", "mushrooms", "the Wright brothers", "exercise at home", "clocks", "fashion", "caves", "maps",
    "breakfast", "the Great Barrier Reef", "negotiation", "atoms", "ballet", "the ice age", "wolves", "chocolate",
    "habits", "the telephone", "fire safety", "giraffes", "statistics", "lighthouses", "airports", "salt", "rivers",
)  # fmt: skip

QUESTIONS = (
    "What are the most important facts about {}?", "Explain {} to a ten-year-old.", "Why do people care about {}?",
    "Give me five tips about {}.", "Write a short story that has to do with {}.",
    "What is a common misconception about {}?", "How did our understanding of {} change over time?",
    "Write a friendly email to a colleague about {}.",
    "List three advantages and three disadvantages that people see in {}.", "I am new to {}. Where should I start?",
    "Write a poem about {}.", "Describe {} in one paragraph.", "What questions should I ask an expert on {}?",
    "Make a quiz with three questions about {}.", "Compare {} with something similar.",
    "Tell me something surprising about {}.", "What would the world be like without {}?",
    "Plan a one-hour lesson on {}.", "What words does one need to talk about {}?",
    "How is {} important for daily life?", "My friend asked me about {}. What should I tell her?",
    "Write a dialogue between two people about {}.", "Give a step-by-step guide for someone interested in {}.",
    "What is the history of {}?", "Write a title and an outline of an essay on {}.",
)  # fmt: skip

GENERAL = (
    "What is the capital of {}?", "Suggest a three-day trip to {}.", "What is {} known for?",
    "Which food is typical of {}?", "Write three sentences about the geography of {}.",
)  # fmt: skip
PLACES = (
    "Norway", "Peru", "Kenya", "Vietnam", "Portugal", "Canada", "Morocco", "New Zealand", "Turkey", "Mexico",
    "Iceland", "Thailand", "Austria", "Chile", "Egypt", "Scotland", "Indonesia", "Greece", "Brazil", "Japan",
    "Finland", "Cuba", "Nepal", "Ireland", "Argentina", "Poland", "South Korea", "Tanzania", "Hungary", "Jordan",
)  # fmt: skip

TASKS = (
    "counts how often each word occurs in a text", "checks whether a string is a palindrome",
    "reverses a linked list", "returns the n-th Fibonacci number", "merges two sorted lists",
    "finds the longest common prefix of some strings", "removes duplicates from a list and keeps the order",
    "computes the factorial of a number", "flattens a nested list", "checks whether two strings are anagrams",
    "reads a CSV file and returns its rows", "rotates a list by k places",
    "finds the second largest number of a list", "converts a Roman numeral to an integer", "transposes a matrix",
    "checks whether brackets are balanced", "computes the greatest common divisor of two numbers",
    "sorts a list with quicksort", "validates an email address", "counts the lines of a file",
    "searches a sorted list by bisection", "returns all prime numbers below n",
    "converts a temperature from Celsius to Fahrenheit", "multiplies two matrices",
    "groups a list of dictionaries by a key", "computes a moving average", "parses a date of the form YYYY-MM-DD",
    "generates a random password", "finds the intersection of two lists", "splits a list into chunks of n items",
    "computes the Levenshtein distance of two strings", "counts the vowels in a sentence",
    "capitalizes every word of a text", "converts a decimal number to binary",
    "finds the missing number in a sequence", "implements a stack with push and pop",
    "implements a queue with two stacks", "computes the sum of the digits of a number",
    "checks whether a year is a leap year", "returns the most common element of a list",
    "encodes a text with the Caesar cipher", "walks a binary tree in order", "computes the depth of a binary tree",
    "finds the shortest path in a grid", "sums the even numbers of a list", "removes vowels from a string",
    "checks whether a number is a perfect square", "computes compound interest", "merges overlapping intervals",
    "finds all permutations of a string", "splits a URL into its parts", "formats a number of bytes for people",
    "computes the median of a list", "computes the standard deviation of a list",
    "replaces tabs by spaces in every file of a folder", "compares two version numbers", "inverts a dictionary",
    "checks whether a word is in a sorted file", "draws a triangle of stars",
    "counts down from ten and prints each number", "simulates the throw of two dice", "plays rock, paper, scissors",
    "keeps a to-do list in a JSON file", "caches the results of another function",
    "measures how long a function takes", "retries a function that raises", "computes Pascal's triangle",
    "finds the largest product of two numbers of a list", "zips two lists into a dictionary",
    "trims a text to a number of words", "wraps a text at 80 columns",
    "compresses a string by counting repeated letters",
)  # fmt: skip
