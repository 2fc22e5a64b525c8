"""Passages that everybody quotes, all in the public domain: a model trained on the web has seen them very often.

What lives here: text, with its author and year. Who audits it: `lmjax.reproduce.known_texts`.
"""

PASSAGES = {
    "Declaration of Independence, 1776":
        "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their "
        "Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of "
        "Happiness.--That to secure these rights, Governments are instituted among Men, deriving their just powers "
        "from the consent of the governed, --That whenever any Form of Government becomes destructive of these ends, "
        "it is the Right of the People to alter or to abolish it, and to institute new Government, laying its "
        "foundation on such principles and organizing its powers in such form, as to them shall seem most likely to "
        "effect their Safety and Happiness.",
    "Constitution of the United States, 1787":
        "We the People of the United States, in Order to form a more perfect Union, establish Justice, insure "
        "domestic Tranquility, provide for the common defence, promote the general Welfare, and secure the Blessings "
        "of Liberty to ourselves and our Posterity, do ordain and establish this Constitution for the United States "
        "of America.\n\nAll legislative Powers herein granted shall be vested in a Congress of the United States, "
        "which shall consist of a Senate and House of Representatives. The House of Representatives shall be "
        "composed of Members chosen every second Year by the People of the several States, and the Electors in each "
        "State shall have the Qualifications requisite for Electors of the most numerous Branch of the State "
        "Legislature.",
    "Lincoln, Gettysburg Address, 1863":
        "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in "
        "Liberty, and dedicated to the proposition that all men are created equal.\n\nNow we are engaged in a great "
        "civil war, testing whether that nation, or any nation so conceived and so dedicated, can long endure. We "
        "are met on a great battle-field of that war. We have come to dedicate a portion of that field, as a final "
        "resting place for those who here gave their lives that that nation might live. It is altogether fitting and "
        "proper that we should do this.\n\nBut, in a larger sense, we can not dedicate -- we can not consecrate -- "
        "we can not hallow -- this ground. The brave men, living and dead, who struggled here, have consecrated it, "
        "far above our poor power to add or detract.",
    "Genesis 1, King James Version, 1611":
        "In the beginning God created the heaven and the earth. And the earth was without form, and void; and "
        "darkness was upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God "
        "said, Let there be light: and there was light. And God saw the light, that it was good: and God divided the "
        "light from the darkness. And God called the light Day, and the darkness he called Night. And the evening "
        "and the morning were the first day. And God said, Let there be a firmament in the midst of the waters, and "
        "let it divide the waters from the waters.",
    "Psalm 23, King James Version, 1611":
        "The LORD is my shepherd; I shall not want. He maketh me to lie down in green pastures: he leadeth me beside "
        "the still waters. He restoreth my soul: he leadeth me in the paths of righteousness for his name's sake. "
        "Yea, though I walk through the valley of the shadow of death, I will fear no evil: for thou art with me; "
        "thy rod and thy staff they comfort me. Thou preparest a table before me in the presence of mine enemies: "
        "thou anointest my head with oil; my cup runneth over. Surely goodness and mercy shall follow me all the "
        "days of my life: and I will dwell in the house of the LORD for ever.",
    "John 1, King James Version, 1611":
        "In the beginning was the Word, and the Word was with God, and the Word was God. The same was in the "
        "beginning with God. All things were made by him; and without him was not any thing made that was made. In "
        "him was life; and the life was the light of men. And the light shineth in darkness; and the darkness "
        "comprehended it not. There was a man sent from God, whose name was John. The same came for a witness, to "
        "bear witness of the Light, that all men through him might believe. He was not that Light, but was sent to "
        "bear witness of that Light.",
    "Shakespeare, Hamlet, 1603":
        "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\nThe slings and "
        "arrows of outrageous fortune,\nOr to take arms against a sea of troubles\nAnd by opposing end them. To "
        "die--to sleep,\nNo more; and by a sleep to say we end\nThe heart-ache and the thousand natural shocks\nThat "
        "flesh is heir to: 'tis a consummation\nDevoutly to be wish'd. To die, to sleep;\nTo sleep, perchance to "
        "dream--ay, there's the rub:\nFor in that sleep of death what dreams may come,\nWhen we have shuffled off "
        "this mortal coil,\nMust give us pause.",
    "Shakespeare, Sonnet 18, 1609":
        "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\nRough winds do shake the "
        "darling buds of May,\nAnd summer's lease hath all too short a date;\nSometime too hot the eye of heaven "
        "shines,\nAnd often is his gold complexion dimm'd;\nAnd every fair from fair sometime declines,\nBy chance "
        "or nature's changing course untrimm'd;\nBut thy eternal summer shall not fade,\nNor lose possession of that "
        "fair thou ow'st;\nNor shall death brag thou wander'st in his shade,\nWhen in eternal lines to time thou "
        "grow'st:\nSo long as men can breathe or eyes can see,\nSo long lives this, and this gives life to thee.",
    "Austen, Pride and Prejudice, 1813":
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want "
        "of a wife.\n\nHowever little known the feelings or views of such a man may be on his first entering a "
        "neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is considered "
        "the rightful property of some one or other of their daughters.\n\n\"My dear Mr. Bennet,\" said his lady to "
        "him one day, \"have you heard that Netherfield Park is let at last?\"\n\nMr. Bennet replied that he had "
        "not.\n\n\"But it is,\" returned she; \"for Mrs. Long has just been here, and she told me all about it.\"",
    "Key, The Star-Spangled Banner, 1814":
        "O say can you see, by the dawn's early light,\nWhat so proudly we hailed at the twilight's last gleaming,\n"
        "Whose broad stripes and bright stars through the perilous fight,\nO'er the ramparts we watched, were so "
        "gallantly streaming?\nAnd the rockets' red glare, the bombs bursting in air,\nGave proof through the night "
        "that our flag was still there;\nO say does that star-spangled banner yet wave\nO'er the land of the free "
        "and the home of the brave?",
    "Poe, The Raven, 1845":
        "Once upon a midnight dreary, while I pondered, weak and weary,\nOver many a quaint and curious volume of "
        "forgotten lore--\nWhile I nodded, nearly napping, suddenly there came a tapping,\nAs of some one gently "
        "rapping, rapping at my chamber door.\n\"'Tis some visitor,\" I muttered, \"tapping at my chamber door--\n"
        "Only this and nothing more.\"\n\nAh, distinctly I remember it was in the bleak December;\nAnd each separate "
        "dying ember wrought its ghost upon the floor.\nEagerly I wished the morrow;--vainly I had sought to borrow\n"
        "From my books surcease of sorrow--sorrow for the lost Lenore--",
    "Melville, Moby-Dick, 1851":
        "Call me Ishmael. Some years ago--never mind how long precisely--having little or no money in my purse, and "
        "nothing particular to interest me on shore, I thought I would sail about a little and see the watery part "
        "of the world. It is a way I have of driving off the spleen and regulating the circulation. Whenever I find "
        "myself growing grim about the mouth; whenever it is a damp, drizzly November in my soul; whenever I find "
        "myself involuntarily pausing before coffin warehouses, and bringing up the rear of every funeral I meet;",
    "Dickens, A Tale of Two Cities, 1859":
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
        "foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it "
        "was the season of Darkness, it was the spring of hope, it was the winter of despair, we had everything "
        "before us, we had nothing before us, we were all going direct to Heaven, we were all going direct the other "
        "way--in short, the period was so far like the present period, that some of its noisiest authorities "
        "insisted on its being received, for good or for evil, in the superlative degree of comparison only.",
    "Carroll, Alice's Adventures in Wonderland, 1865":
        "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: "
        "once or twice she had peeped into the book her sister was reading, but it had no pictures or conversations "
        "in it, \"and what is the use of a book,\" thought Alice \"without pictures or conversations?\"\n\nSo she "
        "was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and "
        "stupid), whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking "
        "the daisies, when suddenly a White Rabbit with pink eyes ran close by her.",
    "Whitman, O Captain! My Captain!, 1865":
        "O Captain! my Captain! our fearful trip is done,\nThe ship has weather'd every rack, the prize we sought is "
        "won,\nThe port is near, the bells I hear, the people all exulting,\nWhile follow eyes the steady keel, the "
        "vessel grim and daring;\nBut O heart! heart! heart!\nO the bleeding drops of red,\nWhere on the deck my "
        "Captain lies,\nFallen cold and dead.\n\nO Captain! my Captain! rise up and hear the bells;\nRise up--for "
        "you the flag is flung--for you the bugle trills,\nFor you bouquets and ribbon'd wreaths--for you the shores "
        "a-crowding,",
    "Carroll, Jabberwocky, 1871":
        "'Twas brillig, and the slithy toves\nDid gyre and gimble in the wabe;\nAll mimsy were the borogoves,\nAnd "
        "the mome raths outgrabe.\n\n\"Beware the Jabberwock, my son!\nThe jaws that bite, the claws that catch!\n"
        "Beware the Jubjub bird, and shun\nThe frumious Bandersnatch!\"\n\nHe took his vorpal sword in hand:\nLong "
        "time the manxome foe he sought--\nSo rested he by the Tumtum tree,\nAnd stood awhile in thought.",
    "Doyle, A Scandal in Bohemia, 1891":
        "To Sherlock Holmes she is always the woman. I have seldom heard him mention her under any other name. In "
        "his eyes she eclipses and predominates the whole of her sex. It was not that he felt any emotion akin to "
        "love for Irene Adler. All emotions, and that one particularly, were abhorrent to his cold, precise but "
        "admirably balanced mind. He was, I take it, the most perfect reasoning and observing machine that the world "
        "has seen, but as a lover he would have placed himself in a false position.",
    "Frost, The Road Not Taken, 1916":
        "Two roads diverged in a yellow wood,\nAnd sorry I could not travel both\nAnd be one traveler, long I stood\n"
        "And looked down one as far as I could\nTo where it bent in the undergrowth;\n\nThen took the other, as just "
        "as fair,\nAnd having perhaps the better claim,\nBecause it was grassy and wanted wear;\nThough as for that "
        "the passing there\nHad worn them really about the same,\n\nAnd both that morning equally lay\nIn leaves no "
        "step had trodden black.\nOh, I kept the first for another day!\nYet knowing how way leads on to way,\nI "
        "doubted if I should ever come back.",
}
