"""Posts in other words than the TL;DR world's, written by hand: each with a summary, one fact in it `[right|wrong]`."""

POSTS = (
    (
        "SUBREDDIT: r/gardening TITLE: What is eating my tomatoes? POST: I planted six tomato vines along the garage in "
        "May. Since Sunday something has been chewing holes into the leaves at night. I looked with a torch and saw "
        "only slugs. Beer traps did nothing.",
        "Something eats the leaves of my [tomato|pepper] plants at night, and beer traps do not help.",
    ),
    (
        "SUBREDDIT: r/relationships TITLE: My roommate keeps using my bike POST: My roommate Paul borrows my bicycle "
        "without asking. Yesterday he brought it back with a flat tire and said nothing. I need it to get to class.",
        "Roommate borrows my bike without asking and returned it with a flat [tire|battery].",
    ),
    (
        "SUBREDDIT: r/AskCulinary TITLE: Bread will not rise POST: I followed my grandmother's recipe to the letter, but "
        "the dough just sits there. The kitchen is cold, about sixty degrees. The yeast is two years old.",
        "My dough does not rise; the yeast is [two|nine] years old and the kitchen is cold.",
    ),
    (
        "SUBREDDIT: r/travel TITLE: Missed connection in Frankfurt POST: Our plane from Lisbon was three hours late, so we "
        "missed the last flight to Oslo and slept at the airport in Frankfurt. The airline offers a voucher.",
        "We missed our flight to [Oslo|Cairo] because the first plane was late. Should we take the voucher?",
    ),
    (
        "SUBREDDIT: r/Pets TITLE: Cat hates the new sofa POST: We bought a green sofa and now our old cat refuses to enter "
        "the living room. She hisses at it. She loved the previous one, which was leather.",
        "Our [cat|dog] is afraid of the new sofa.",
    ),
    (
        "SUBREDDIT: r/personalfinance TITLE: Lent money to my brother POST: In spring I lent my brother four thousand "
        "dollars for his restaurant. It closed in August. He says he will pay me back when he can, but he just bought "
        "a boat.",
        "My [brother|boss] owes me money and bought a boat.",
    ),
    (
        "SUBREDDIT: r/legaladvice TITLE: Neighbour cut down my tree POST: I came home from holiday and the old oak behind "
        "my house was gone. The neighbour admits that his crew took it down by mistake.",
        "The neighbour's crew cut down my [oak|fence] by mistake while I was away.",
    ),
    (
        "SUBREDDIT: r/running TITLE: Knee pain before my first marathon POST: Three weeks before the race my left knee "
        "began to hurt on long runs. My doctor tells me to rest. I have trained since January.",
        "My left [knee|shoulder] hurts and the marathon is in three weeks. Do I run?",
    ),
    (
        "SUBREDDIT: r/college TITLE: Professor lost my essay POST: I handed in my history essay on paper, as she wanted. "
        "Now the professor cannot find it and wants to fail me. I still have the file with its date.",
        "Professor lost my [history|physics] essay and wants to fail me, but I can prove that I wrote it.",
    ),
    (
        "SUBREDDIT: r/techsupport TITLE: Laptop gets hot POST: Since the last update my laptop's fan runs all the time, even "
        "when nothing is open. I cleaned out the dust already. It is out of warranty.",
        "After an update my laptop's [fan|screen] never stops, though I cleaned it.",
    ),
    (
        "SUBREDDIT: r/weddingplanning TITLE: Sister wants to wear white POST: Our wedding is in October, and my sister has "
        "bought a long white dress for it. My mother says to let it go. I am furious.",
        "My [sister|cousin] plans to wear white at my wedding. Am I wrong to be angry?",
    ),
    (
        "SUBREDDIT: r/MechanicAdvice TITLE: Noise when braking POST: My old Honda squeals whenever I brake downhill. The pads "
        "were changed in March. The garage wants nine hundred dollars for new discs.",
        "My [Honda|Ford] squeals when I brake, although the pads are new. Are new discs worth it?",
    ),
    (
        "SUBREDDIT: r/Parenting TITLE: Son stopped eating vegetables POST: Our son is five and used to love carrots. Since he "
        "started school he will eat nothing but pasta. We tried games, and rewards.",
        "Our five year old eats only [pasta|soup] since he started school.",
    ),
    (
        "SUBREDDIT: r/Guitar TITLE: Fingers hurt POST: I started on my father's acoustic guitar a month ago, an hour every "
        "evening. The tips of my fingers are sore, and the F chord still buzzes.",
        "A month into [guitar|piano], my fingertips hurt and one chord buzzes. Does that get better?",
    ),
    (
        "SUBREDDIT: r/HomeImprovement TITLE: Water in the basement POST: After every heavy rain there is an inch of water in "
        "our basement. The gutters are clean. A friend says the ground slopes the wrong way.",
        "Our [basement|attic] floods after rain, though the gutters are clean.",
    ),
    (
        "SUBREDDIT: r/books TITLE: Library fine from my childhood POST: While I was moving I found a library book that was "
        "due in 1994. The library still exists. I would like to return it, but I fear the fine.",
        "I found a [library|school] book that was due decades ago. Will they fine me?",
    ),
)  # fmt: skip
