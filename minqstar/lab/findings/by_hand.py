"""Posts in other words than the TL;DR world's, written by hand: subreddit, title, post, and a summary of it.

In each summary one fact stands as `[right|wrong]`.
"""

POSTS = (
    (
        "gardening", "What is eating my tomatoes?",
        "I planted six tomato vines along the garage in May. Since Sunday something has been chewing holes into the "
        "leaves at night. I looked with a torch and saw only slugs. Beer traps did nothing.",
        "Something eats the leaves of my [tomato|pepper] plants at night, and beer traps do not help.",
    ),
    (
        "relationships", "My roommate keeps using my bike",
        "My roommate Paul borrows my bicycle without asking. Yesterday he brought it back with a flat tire and said "
        "nothing. I need it to get to class.",
        "Roommate borrows my bike without asking and returned it with a flat [tire|battery].",
    ),
    (
        "AskCulinary", "Bread will not rise",
        "I followed my grandmother's recipe to the letter, but the dough just sits there. The kitchen is cold, about "
        "sixty degrees. The yeast is two years old.",
        "My dough does not rise; the yeast is [two|nine] years old and the kitchen is cold.",
    ),
    (
        "travel", "Missed connection in Frankfurt",
        "Our plane from Lisbon was three hours late, so we missed the last flight to Oslo and slept at the airport in "
        "Frankfurt. The airline offers a voucher.",
        "We missed our flight to [Oslo|Cairo] because the first plane was late. Should we take the voucher?",
    ),
    (
        "Pets", "Cat hates the new sofa",
        "We bought a green sofa and now our old cat refuses to enter the living room. She hisses at it. She loved the "
        "previous one, which was leather.",
        "Our [cat|dog] is afraid of the new sofa.",
    ),
    (
        "personalfinance", "Lent money to my brother",
        "In spring I lent my brother four thousand dollars for his restaurant. It closed in August. He says he will "
        "pay me back when he can, but he just bought a boat.",
        "My [brother|boss] owes me money and bought a boat.",
    ),
    (
        "legaladvice", "Neighbour cut down my tree",
        "I came home from holiday and the old oak behind my house was gone. The neighbour admits that his crew took "
        "it down by mistake.",
        "The neighbour's crew cut down my [oak|fence] by mistake while I was away.",
    ),
    (
        "running", "Knee pain before my first marathon",
        "Three weeks before the race my left knee began to hurt on long runs. My doctor tells me to rest. I have "
        "trained since January.",
        "My left [knee|shoulder] hurts and the marathon is in three weeks. Do I run?",
    ),
    (
        "college", "Professor lost my essay",
        "I handed in my history essay on paper, as she wanted. Now the professor cannot find it and wants to fail me. "
        "I still have the file with its date.",
        "Professor lost my [history|physics] essay and wants to fail me, but I can prove that I wrote it.",
    ),
    (
        "techsupport", "Laptop gets hot",
        "Since the last update my laptop's fan runs all the time, even when nothing is open. I cleaned out the dust "
        "already. It is out of warranty.",
        "After an update my laptop's [fan|screen] never stops, though I cleaned it.",
    ),
    (
        "weddingplanning", "Sister wants to wear white",
        "Our wedding is in October, and my sister has bought a long white dress for it. My mother says to let it go. "
        "I am furious.",
        "My [sister|cousin] plans to wear white at my wedding. Am I wrong to be angry?",
    ),
    (
        "MechanicAdvice", "Noise when braking",
        "My old Honda squeals whenever I brake downhill. The pads were changed in March. The garage wants nine "
        "hundred dollars for new discs.",
        "My [Honda|Ford] squeals when I brake, although the pads are new. Are new discs worth it?",
    ),
    (
        "Parenting", "Son stopped eating vegetables",
        "Our son is five and used to love carrots. Since he started school he will eat nothing but pasta. We tried "
        "games, and rewards.",
        "Our five year old eats only [pasta|soup] since he started school.",
    ),
    (
        "Guitar", "Fingers hurt",
        "I started on my father's acoustic guitar a month ago, an hour every evening. The tips of my fingers are "
        "sore, and the F chord still buzzes.",
        "A month into [guitar|piano], my fingertips hurt and one chord buzzes. Does that get better?",
    ),
    (
        "HomeImprovement", "Water in the basement",
        "After every heavy rain there is an inch of water in our basement. The gutters are clean. A friend says the "
        "ground slopes the wrong way.",
        "Our [basement|attic] floods after rain, though the gutters are clean.",
    ),
    (
        "books", "Library fine from my childhood",
        "While I was moving I found a library book that was due in 1994. The library still exists. I would like to "
        "return it, but I fear the fine.",
        "I found a [library|school] book that was due decades ago. Will they fine me?",
    ),
)  # fmt: skip
