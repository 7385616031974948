"""Words of the synthetic training text. None of them is among the evaluation's (`vllm_lsa/evaluation/words.py`)."""

NOUNS = tuple(
    """
    acorn airport alley anchor ankle anvil apron arch armor arrow ash attic badge bakery balcony bamboo banner barrel
    basement basin basket bay beacon beam beard beetle bell belt bench bicycle blade blanket blossom boat bolt bonnet
    boot bottle boulder bow bowl bracelet branch brass bread brick broom brush bubble bucket buckle bullet bundle
    butter button cabbage cabin cable cactus cage cake camel camera canal canoe canvas canyon carpet carriage cart
    cave cedar ceiling cellar chain chalk chapel cheese chest chimney church circle clay cliff cloak closet cloud coal
    coat coin collar column compass cone copper coral corn corner cottage cotton couch cradle crane crate creek crown
    cube cup curtain cushion dagger dairy deck deer desert diamond dice dish ditch dock dome donkey dough dove drawer
    dress drill drum duck dust eagle easel echo elbow engine envelope fabric falcon farm feather fence fern ferry
    fiddle finger flag flame flask flint flour flute fog forest fork fountain fox frame frost fur gallery garage gate
    gem ginger glacier globe glove glue goat gold goose gown grain granite grape gravel grove guitar gun hall hammer
    harbor hare harvest hat hawk hay hedge helmet herb hill hinge hive hook horn hose hotel ice iron island ivory ivy
    jacket jar jewel judge jug juice jungle kettle kite knee knife knot ladle lake lantern lawn leaf leather lemon
    letter lever lily lime linen lion lizard loaf lobster locket loom lumber magnet mango mantle marble market mast
    mat meadow medal melon metal mill mint mirror mitten moss moth motor mud mug mule mural nail napkin neck nest net
    nickel nut oar oat olive onion orchard organ otter oven owl ox oyster paddle pan paper parrot path peach peanut
    pebble pen pepper piano pickle pigeon pill pine pipe pistol plank plate plow plum pocket pond porch potato pottery
    prism puddle pulley pump purse quarry quartz quilt rabbit radish rail rake ramp raven razor reef ribbon rifle
    robe rocket roof rose rudder rug saddle sail salad salt sand sandal sauce saw scarf scroll seal shawl shed sheep
    shelf shield shirt shoe shovel shrimp silk sink skirt sled slipper smoke snail snake sofa soil spade spear spice
    sponge spool square stable stamp statue steam steel stem stew stove straw stream string sugar sword table tailor
    tank tar tavern tea temple thimble thorn thread throne thumb tile tin toad tomato torch tower trail tray trench
    trumpet trunk tub tulip tunnel turkey turtle valley vase vault veil velvet vest vine vinegar wallet walnut
    warehouse wasp watch wax well whale wheel whip whistle wick willow wire wolf wool wreath yacht yarn
    """.split()
)

NAMES = tuple(
    """
    Abel Agnes Albin Amira Anton Astrid Bruno Carmen Casper Cecile Conrad Dagmar Darius Edgar Elmo Elsa Emil Esther
    Farid Felix Flora Gideon Greta Hamid Hanna Hector Hilda Hugo Ines Ingrid Ivan Jasper Joel Judith Kamil Karin Lars
    Leila Lionel Lotte Lucia Magnus Malik Marta Milo Mira Nadia Nestor Nils Nora Olaf Olga Omar Oscar Paula Pavel
    Petra Quentin Rafael Regina Rosa Rufus Ruth Samir Selma Sigrid Silas Sonia Stefan Tamara Tobias Ulrich Ursula
    Viktor Vera Walter Wanda Xenia Yusuf Zelda
    """.split()
)

PLACES = tuple(
    """
    Aarhus Antwerp Ankara Basel Bergen Bilbao Bristol Cadiz Cairo Cork Cordoba Dakar Delft Dresden Dublin Fez Genoa
    Ghent Graz Haifa Havana Izmir Kazan Kyoto Lagos Leeds Leipzig Lima Linz Lyon Madras Malmo Milan Minsk Mumbai Nagoya
    Nantes Odessa Oporto Osaka Parma Perth Porto Pskov Quito Riga Rouen Salem Seville Siena Sofia Tampa Tartu Tunis
    Turin Utrecht Varna Verona Vilnius York Zagreb
    """.split()
)
