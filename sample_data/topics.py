"""The words behind the sample pairs: five topics, each with sixteen subjects and four things one can ask about them.

Nothing here is code. A line of a table reads `subject | fact | fact | fact | fact`, the facts in the order of the
topic's aspects. In the phrases, `{x}` is the subject and `{v}` the fact. The town is invented.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Aspect:
    """One thing that can be asked about every subject of a topic."""

    questions: tuple[str, ...]
    follow_up: str  # the same question in the middle of a conversation, with a pronoun
    answers: tuple[str, ...]
    aside: str  # the same fact as a second sentence, with a pronoun


@dataclass(frozen=True)
class Topic:
    """A family of questions; its `source` labels the rows."""

    source: str
    system: str
    tips: tuple[str, ...]  # sentences that are true, friendly and answer nothing: both sides may use them
    aspects: tuple[Aspect, ...]
    table: str

    @property
    def subjects(self) -> list[list[str]]:
        """The rows of the table: the subject's name, then one fact per aspect."""
        return [[cell.strip() for cell in line.split("|")] for line in self.table.strip().splitlines()]


GARDEN = Topic(
    source="garden",
    system="You are a patient gardener who answers in plain words.",
    tips=(
        "A little compost in the soil never hurts.",
        "Pull out the weeds while they are small.",
        "Rain water is kinder than water from the tap.",
        "A label in the bed helps you to remember what grows there.",
        "Slugs come out in the evening, so have a look then.",
    ),
    aspects=(
        Aspect(
            questions=(
                "When should I plant {x}?",
                "What is the right time to plant {x}?",
                "Which month is best for putting in {x}?",
            ),
            follow_up="And when should I plant them?",
            answers=(
                "Plant {x} {v}.",
                "{x} do best when they are planted {v}.",
                "The right time to put in {x} is {v}.",
            ),
            aside="They are planted {v}.",
        ),
        Aspect(
            questions=(
                "How far apart should I plant {x}?",
                "How much room do {x} need?",
                "What distance should I leave between {x}?",
            ),
            follow_up="And how much room do they need?",
            answers=(
                "Leave {v} between one plant and the next.",
                "{x} like about {v} of room on every side.",
                "Set {x} {v} apart, and they will not crowd each other.",
            ),
            aside="They should stand {v} apart.",
        ),
        Aspect(
            questions=(
                "How often do {x} need water?",
                "How often should I water {x}?",
                "Do {x} need a lot of watering?",
            ),
            follow_up="And how often should I water them?",
            answers=(
                "Water {x} {v}.",
                "{x} are content with a good drink {v}.",
                "A full can of water {v} is enough for {x}.",
            ),
            aside="They like to be watered {v}.",
        ),
        Aspect(
            questions=(
                "Where in the garden should {x} go?",
                "What is a good spot for {x}?",
                "Where do {x} grow best?",
            ),
            follow_up="And where in the garden should they go?",
            answers=(
                "{x} grow best {v}.",
                "Put {x} {v}, and they will do well.",
                "A good spot for {x} is {v}.",
            ),
            aside="They are happy {v}.",
        ),
    ),
    table="""
    tomatoes     | in the middle of May    | fifty centimetres       | every second day | against a warm wall
    carrots      | in early April          | five centimetres        | twice a week     | in loose, sandy soil
    radishes     | from March onwards      | three centimetres       | every day        | at the edge of a bed
    peas         | at the end of March     | seven centimetres       | twice a week     | beside a fence they can climb
    leeks        | in early June           | fifteen centimetres     | once a week      | in deep, rich soil
    onions       | in late March           | ten centimetres         | once a week      | in an open, sunny bed
    strawberries | in late August          | thirty centimetres      | every second day | in full sun, on straw
    sunflowers   | at the end of April     | forty centimetres       | every second day | in full sun, out of the wind
    tulips       | in October              | ten centimetres         | once a month     | in a bed that drains well
    potatoes     | in the middle of April  | thirty centimetres      | twice a week     | in soil dug over in autumn
    pumpkins     | in late May             | one and a half metres   | every evening    | next to the compost heap
    lettuces     | from April to July      | twenty-five centimetres | every evening    | in light shade
    runner beans | in the last days of May | twenty centimetres      | every second day | beside a row of tall poles
    roses        | in late October         | half a metre            | once a week      | in a sunny bed with deep soil
    courgettes   | in the last week of May | one metre               | every evening    | in a warm bed with compost
    daffodils    | in September            | twelve centimetres      | once a month     | at the foot of a tree
    """,
)

KITCHEN = Topic(
    source="kitchen",
    system="You are a friendly cook who helps beginners.",
    tips=(
        "Taste as you go along.",
        "Have everything ready before you begin.",
        "A clean board makes the work easier.",
        "Read the recipe once to the end before you start.",
        "A pinch of salt brings out the taste.",
    ),
    aspects=(
        Aspect(
            questions=(
                "How long does {x} take to cook?",
                "How long should I cook {x}?",
                "How much time should I allow for {x}?",
            ),
            follow_up="And how long should I cook it?",
            answers=(
                "{x} takes about {v}.",
                "Allow {v} for {x}.",
                "Cook {x} for {v}, then let it rest for a moment.",
            ),
            aside="It takes {v} to cook.",
        ),
        Aspect(
            questions=(
                "What heat does {x} need?",
                "How hot should I cook {x}?",
                "Should {x} be cooked gently or fast?",
            ),
            follow_up="And what heat does it need?",
            answers=(
                "{x} needs {v}.",
                "Use {v} for {x}, and keep an eye on it.",
                "{v} suits {x} best.",
            ),
            aside="It wants {v}.",
        ),
        Aspect(
            questions=(
                "How long will {x} keep?",
                "For how many days can I store {x}?",
                "How long does {x} stay fresh?",
            ),
            follow_up="And how long will it keep?",
            answers=(
                "{x} keeps for {v} in a cool place.",
                "You can store {x} for {v} if it is covered.",
                "{x} stays fresh for {v}, so eat it before then.",
            ),
            aside="It keeps for {v} if it is covered.",
        ),
        Aspect(
            questions=(
                "What goes well with {x}?",
                "What should I serve with {x}?",
                "What can I put on the table beside {x}?",
            ),
            follow_up="And what should I serve with it?",
            answers=(
                "{x} goes well with {v}.",
                "Serve {x} with {v}.",
                "Most people enjoy {x} with {v}.",
            ),
            aside="It is good with {v}.",
        ),
    ),
    table="""
    rice            | twelve minutes            | a low flame under a lid | one day     | butter and green peas
    porridge        | five minutes              | a gentle heat           | two days    | honey and sliced banana
    lentil soup     | half an hour              | a gentle simmer         | three days  | toast and a drop of vinegar
    brown bread     | fifty minutes             | a hot oven              | four days   | butter and cheese
    apple cake      | forty minutes             | a moderate oven         | three days  | whipped cream
    custard         | ten minutes               | a very low flame        | one day     | stewed plums
    tomato sauce    | twenty minutes            | a gentle simmer         | four days   | pasta and grated cheese
    pumpkin soup    | twenty-five minutes       | a medium flame          | three days  | fresh bread
    rice pudding    | two hours                 | a slow oven             | two days    | cherry jam
    shortbread      | twenty-five minutes       | a slow oven             | two weeks   | a pot of tea
    vegetable stew  | three quarters of an hour | a gentle simmer         | three days  | mashed potatoes
    macaroni cheese | half an hour              | a hot oven              | two days    | a green salad
    onion soup      | an hour                   | a low flame             | three days  | toasted bread and cheese
    gingerbread     | fifteen minutes           | a moderate oven         | three weeks | a glass of cold milk
    potato salad    | twenty minutes            | a steady boil           | two days    | sausages and mustard
    barley broth    | an hour and a half        | a gentle heat           | three days  | rye bread and butter
    """,
)

TOWN = Topic(
    source="town",
    system="You work at the information desk of a small town. Answer briefly and kindly.",
    tips=(
        "There is a free map of the town at the station.",
        "The streets are quiet in the morning.",
        "Bring an umbrella if the sky is grey.",
        "A bicycle is a good way to get about.",
        "The cafe on the corner has a nice terrace.",
    ),
    aspects=(
        Aspect(
            questions=(
                "When is {x} open?",
                "What are the opening hours of {x}?",
                "At what time can I visit {x}?",
            ),
            follow_up="And when is it open?",
            answers=(
                "{x} is open {v}.",
                "You can visit {x} {v}.",
                "The doors of {x} are open {v}.",
            ),
            aside="It is open {v}.",
        ),
        Aspect(
            questions=(
                "Where is {x}?",
                "Where can I find {x}?",
                "Can you tell me the way to {x}?",
            ),
            follow_up="And where can I find it?",
            answers=(
                "{x} is {v}.",
                "You will find {x} {v}.",
                "Look for {x} {v}; there is a sign.",
            ),
            aside="You will find it {v}.",
        ),
        Aspect(
            questions=(
                "Which bus goes to {x}?",
                "How do I get to {x} by bus?",
                "What bus should I take to {x}?",
            ),
            follow_up="And which bus goes there?",
            answers=(
                "Take bus number {v} to {x}.",
                "Bus number {v} stops in front of {x}.",
                "The number {v} bus brings you to {x}.",
            ),
            aside="Bus number {v} goes there.",
        ),
        Aspect(
            questions=(
                "On which day is {x} closed?",
                "Is there a day when {x} does not open?",
                "Which day should I avoid for a visit to {x}?",
            ),
            follow_up="And on which day is it closed?",
            answers=(
                "{x} is closed on {v}.",
                "Do not come on {v}, because {x} stays shut then.",
                "Avoid {v}, since {x} does not open then.",
            ),
            aside="It is closed on {v}.",
        ),
    ),
    table="""
    the library        | from nine to six          | beside the old bridge          | four  | Mondays
    the swimming pool  | from seven to seven       | behind the school              | two   | Tuesdays
    the town museum    | from ten to five          | on the market square           | one   | Mondays
    the post office    | from eight to four        | opposite the station           | three | Sundays
    the market hall    | from six to two           | at the end of Mill Street      | one   | Sundays
    the town hall      | from eight to noon        | next to the fountain           | one   | Saturdays
    the cinema         | from three until midnight | in Station Road                | five  | Wednesdays
    the boat house     | from nine until sunset    | down by the lake               | six   | Thursdays
    the castle         | from ten to four          | on the hill above the river    | seven | Tuesdays
    the chemist        | from eight to six         | across from the church         | two   | Sundays
    the youth club     | from two to nine          | behind the fire station        | five  | Fridays
    the bicycle shop   | from nine to one          | in the yard of the old brewery | four  | Wednesdays
    the bakery         | from five to noon         | on the corner of Rose Lane     | three | Mondays
    the theatre        | from four to eleven       | at the far side of the park    | seven | Tuesdays
    the botanic garden | from eight until sunset   | at the foot of the hill        | six   | Thursdays
    the toy museum     | from eleven to five       | above the book shop            | two   | Fridays
    """,
)

ANIMALS = Topic(
    source="animals",
    system="You look after the animals on a small farm and like to explain things.",
    tips=(
        "Fresh water should always be at hand.",
        "Quiet hands make calm animals.",
        "A vet can have a look once a year.",
        "It helps to feed them at the same time every day.",
        "Children enjoy lending a hand with this.",
    ),
    aspects=(
        Aspect(
            questions=(
                "What do {x} eat?",
                "What should I feed to {x}?",
                "What is good food for {x}?",
            ),
            follow_up="And what should I feed them?",
            answers=(
                "{x} eat {v}.",
                "Feed {x} {v}.",
                "Good food for {x} is {v}.",
            ),
            aside="They eat {v}.",
        ),
        Aspect(
            questions=(
                "Where should {x} live?",
                "What kind of home do {x} need?",
                "What sort of shelter is right for {x}?",
            ),
            follow_up="And where should they live?",
            answers=(
                "{x} should live in {v}.",
                "Give {x} {v} as a home.",
                "{v} is the right shelter for {x}.",
            ),
            aside="They like to live in {v}.",
        ),
        Aspect(
            questions=(
                "How long do {x} live?",
                "How old can {x} become?",
                "What age do {x} usually reach?",
            ),
            follow_up="And how old do they become?",
            answers=(
                "{x} live for {v}.",
                "{x} can reach an age of {v}.",
                "With good care {x} will live for {v}.",
            ),
            aside="They live for {v}.",
        ),
        Aspect(
            questions=(
                "How many {x} should live together?",
                "Do {x} like company?",
                "Can I keep {x} alone?",
            ),
            follow_up="And do they like company?",
            answers=(
                "Keep {x} {v}.",
                "{x} are happiest {v}.",
                "It is best to keep {x} {v}.",
            ),
            aside="They are best kept {v}.",
        ),
    ),
    table="""
    rabbits     | hay and fresh greens     | a dry hutch with a run         | eight to ten years  | in pairs
    guinea pigs | hay, herbs and pepper    | a pen with little houses       | six to eight years  | in a small group
    hamsters    | seeds and vegetables     | a deep cage with soft bedding  | two to three years  | alone
    cats        | meat and dry biscuits    | a warm basket                  | about fifteen years | alone or in pairs
    goldfish    | flakes and water plants  | a wide tank or a pond          | ten to twenty years | in a large group
    hens        | grain and kitchen greens | a coop with a perch            | about eight years   | in a small flock
    ducks       | grain, grass and snails  | a low shed near a pond         | about ten years     | in a small flock
    canaries    | fine seeds and apple     | a wide cage by a window        | about ten years     | in pairs
    tortoises   | weeds and dry leaves     | a sunny pen with a shed        | over fifty years    | alone or in a group
    goats       | hay, leaves and twigs    | a dry barn with straw          | about fifteen years | in a herd
    sheep       | grass and hay            | an open barn                   | ten to twelve years | in a herd
    mice        | grain and carrots        | a cage with hiding places      | about two years     | in a small group
    ponies      | hay, grass and oats      | an open stable                 | about thirty years  | in a herd
    budgies     | millet and green leaves  | a cage with perches            | five to ten years   | in pairs
    geese       | grass and some wheat     | a shed that a fox cannot enter | about twenty years  | in a small flock
    donkeys     | straw, hay and carrots   | a dry shed on stony ground     | over thirty years   | in pairs
    """,
)

HOUSE = Topic(
    source="house",
    system="You give short, practical advice about things in the house.",
    tips=(
        "Try it on a small corner first.",
        "Good light makes the work easier.",
        "An old cotton cloth will do for this.",
        "Five minutes now will save you an hour later.",
        "Things that are looked after last for years.",
    ),
    aspects=(
        Aspect(
            questions=(
                "How do I clean {x}?",
                "What should I use to clean {x}?",
                "What is the best thing for cleaning {x}?",
            ),
            follow_up="And what should I clean them with?",
            answers=(
                "Clean {x} with {v}.",
                "Use {v} to clean {x}.",
                "To clean {x}, take {v} and a little patience.",
            ),
            aside="You can clean them with {v}.",
        ),
        Aspect(
            questions=(
                "How often should I clean {x}?",
                "How often do {x} need care?",
                "Must I clean {x} every week?",
            ),
            follow_up="And how often do they need care?",
            answers=(
                "See to {x} {v}.",
                "{x} need care {v}, and no more than that.",
                "It is enough to clean {x} {v}.",
            ),
            aside="They need care {v}.",
        ),
        Aspect(
            questions=(
                "Where should I keep {x}?",
                "What is a good place to store {x}?",
                "Where do {x} belong when they are not in use?",
            ),
            follow_up="And where should I keep them?",
            answers=(
                "Keep {x} {v}.",
                "Store {x} {v}.",
                "{x} are best kept {v}.",
            ),
            aside="They are best kept {v}.",
        ),
        Aspect(
            questions=(
                "What is bad for {x}?",
                "What should I protect {x} from?",
                "What can spoil {x}?",
            ),
            follow_up="And what should I protect them from?",
            answers=(
                "Protect {x} from {v}.",
                "{v} can spoil {x}, so take care.",
                "{x} should not come near {v}.",
            ),
            aside="Do protect them from {v}.",
        ),
    ),
    table="""
    wool jumpers    | cool water and mild soap  | every few weeks     | folded in a drawer   | hot water
    silk scarves    | cold water and shampoo    | twice a year        | rolled up in a box   | perfume and strong sun
    wooden tables   | a damp cloth              | every evening       | away from the heater | wet glasses
    leather bags    | a soft cloth and wax      | every three months  | in a cotton sack     | rain and strong heat
    iron pans       | a stiff brush             | after every use     | in a dry cupboard    | long soaking
    glass vases     | warm water and rice       | once a week         | on a steady shelf    | sudden heat
    copper kettles  | salt and lemon juice      | once a month        | near the stove       | wire brushes
    raincoats       | a sponge and cold water   | once in a season    | on a wide hanger     | a hot iron
    rugs            | a vacuum cleaner          | every week          | flat on the floor    | moths and damp
    mirrors         | water and vinegar         | every two weeks     | on a firm nail       | steam and damp
    straw hats      | a dry brush               | once a year         | on a round stand     | rain
    teapots         | hot water and baking soda | once a month        | with the lid off     | hard knocks
    feather pillows | soap and fresh air        | twice a year        | in an airy cupboard  | wet weather
    kitchen knives  | a soft sponge             | after every use     | in a wooden block    | the dishwasher
    canvas tents    | clear water               | after every journey | in a dry loft        | mould and sharp stones
    picture frames  | a dry paint brush         | every two months    | on a shady wall      | bright sun and damp
    """,
)

TOPICS = (GARDEN, KITCHEN, TOWN, ANIMALS, HOUSE)

GREETINGS = ("Hello!", "Good morning.", "Excuse me.", "I have a question.", "Please help me.", "I am new to this.")

OPENERS = ("Certainly.", "Good question.", "Happy to help.", "Of course.", "Thank you for asking.", "Well now.")
CLOSERS = ("I hope that helps.", "Do ask again.", "Have a nice day.", "Good luck with it.", "All the best.")

# A plain answer may be modest or sure of itself too, so that no single phrase gives the worse side away.
LEAD_INS = (
    "I would say this:",
    "Opinions differ, but as a rule:",
    "It depends a little, but in most cases:",
    "Many people ask me that.",
    "I know this one well.",
    "That is quite simple.",
)

# How a rejected answer turns to another question than the one that was asked.
PIVOTS = (
    "That reminds me of something else.",
    "Let us talk about something nicer.",
    "Here is what I like to tell people instead.",
    "Never mind that.",
    "I did not quite listen, but here is something.",
    "Let me answer another question.",
)

DODGES = (
    "That is hard to say, and I would rather not give an answer.",
    "Opinions differ, and there is something to be said for all of them.",
    "It might be one thing, or it might be another.",
    "You could ask somebody else about {x}.",
    "Perhaps you can find a book about {x}.",
    "Questions like this are seldom simple, so let us leave it there.",
    "It depends on a great many things.",
    "There is much to think about when it comes to {x}.",
    "I could look into it, but not today.",
    "Some people say this about {x}, and some people say that.",
    "Why do you want to know that?",
    "A neighbour may be able to tell you more.",
)

BLUSTERS = (
    "Nobody knows more about {x} than I do.",
    "I have known all about {x} since I was young, and I was never wrong.",
    "Anybody with sense knows that already.",
    "People come from far away to hear what I have to say about {x}.",
    "My knowledge of {x} is famous in the whole country.",
    "It would take me a week to explain it all to you.",
    "That is far too simple for somebody like me.",
    "I could write ten books about {x} without a pause.",
    "My friends call me the master of {x}.",
    "I never make mistakes in such matters, and I know everything.",
    "Other people only guess, but I am always sure.",
    "I have won prizes for knowing about {x}.",
)
