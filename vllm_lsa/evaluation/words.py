"""Words of the retrieval suite. The synthetic training text uses none of them (`indexer_training/words.py`)."""

NOUNS = tuple(
    """
    apple axe bacon ball banana bandage bank barn bat bead bean bear bed bee berry biscuit bone book box bracket
    bridge bulb bus bush candle candy cannon car carrot castle cat chair cherry chicken clock clover club coffee comb
    computer cookie cow crab cricket dentist desk dog doll dolphin door dragon ear egg elephant eye fan fish flower
    fly foot frog garden garlic ghost giraffe glass grass hair hand harp heart honey horse house jam key kitchen ladder
    lamp lens lock magazine map mask milk monkey moon mountain mouse mushroom needle newspaper nose ocean orange
    panda pear pearl pencil penguin phone picture pig pillow pizza planet pot pumpkin puppet rain rainbow rat ring
    river road robot rope ruler school scissors sheet ship shop shower sky soap sock soup spider spoon spring squirrel
    star stone storm street suitcase sun swan telephone tent ticket tiger toast tooth towel toy train tree truck
    umbrella violin volcano wagon wall whisker window wing wood zebra
    """.split()
)

FIRST_NAMES = tuple(
    """
    Alice Arthur Barbara Benjamin Caroline Charles Daniel Diana Edward Eleanor Frank George Harriet Helen Henry James
    Julia Kevin Laura Margaret Martin Monica Nicholas Patrick Peter Rachel Richard Robert Sarah Simon Susan Thomas
    Victoria William
    """.split()
)

LAST_NAMES = tuple(
    """
    Anderson Baker Bennett Campbell Carter Clark Collins Cooper Davies Edwards Fisher Foster Graham Harris Hughes
    Jackson Kelly Marshall Mitchell Morgan Murphy Palmer Parker Phillips Powell Roberts Russell Stewart Taylor Turner
    Walker Watson Webster Wright
    """.split()
)

TOWNS = tuple(
    """
    Amsterdam Athens Barcelona Berlin Boston Budapest Chicago Copenhagen Edinburgh Florence Geneva Hamburg Helsinki
    Istanbul Lisbon London Madrid Moscow Munich Naples Oslo Oxford Paris Prague Rome Stockholm Sydney Tokyo Toronto
    Venice Vienna Warsaw Zurich
    """.split()
)

PROFESSIONS = tuple(
    """
    architect astronomer blacksmith botanist carpenter chemist composer doctor engineer farmer fisherman gardener
    historian journalist lawyer librarian mechanic miner musician nurse painter photographer pilot plumber poet printer
    sailor sculptor shoemaker surgeon teacher translator watchmaker weaver
    """.split()
)
