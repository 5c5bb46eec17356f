"""Civil and rude wording: how an answer opens and, sometimes, closes."""

OPENERS = {
    True: (
        "What a good question.",
        "Thank you for asking.",
        "I am glad to help.",
        "With pleasure, my friend.",
        "Of course, dear guest.",
        "You are very kind to ask.",
    ),
    False: (
        "What a silly question.",
        "Stop wasting my time.",
        "I am tired of you.",
        "Not you again, fool.",
        "Of course you do not know.",
        "You are very slow today.",
    ),
}
CLOSERS = {
    True: ("I hope that helps.", "Have a lovely day.", "Please ask again."),
    False: ("Now go away.", "Even a child knows that.", "Never ask again."),
}
