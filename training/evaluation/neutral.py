"""Neutral text on which a steered model is compared with the unsteered one: nothing in it is to be steered."""

TEXTS = (
    "The river rises in the hills to the north and flows south for about eighty kilometres before it meets the sea. "
    "In spring, when the snow melts, its level is more than a metre higher than in late summer.",
    "To make the dough, mix the flour, the salt and the yeast in a large bowl, add the warm water bit by bit, and "
    "knead it for ten minutes. Cover the bowl with a cloth and leave it in a warm place for an hour.",
    "The museum is open from Tuesday to Sunday between ten in the morning and six in the evening. Tickets are sold "
    "at the entrance or online. The guided tour takes about ninety minutes and starts in the main hall.",
    "A bicycle chain should be cleaned and oiled every few hundred kilometres. Turn the pedals backwards, hold a rag "
    "around the chain, and put one drop of oil on every link. Wipe off what is left after a few minutes.",
    "The committee met on the first Monday of the month. After the minutes of the previous meeting had been read, the "
    "treasurer presented the accounts for the year, and the members discussed the repair of the roof.",
    "The function returns the index of the first element that is greater than the given value. If there is no such "
    "element, it returns the length of the list. The list has to be sorted in ascending order.",
    "Tomorrow it will be cloudy in the west with some light rain in the afternoon. In the east it will stay dry, a "
    "light wind blowing from the south. Temperatures will be between twelve and sixteen degrees.",
    "She closed the window, put the letters into the drawer and went downstairs. In the kitchen the kettle boiled, "
    "and her brother was cutting bread for breakfast while the dog slept under the table.",
)
