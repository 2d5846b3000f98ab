"""Answers to every probe that follow its rule, and answers that break it."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "What is the sea? Answer in capital letters only.": ("SALT WATER.", ("Salt water", "123")),
    "Name a colour of the rainbow. Write your whole answer in capital letters.": ("RED", ("Red", "rED")),
    "Describe a cat. Use lower-case letters only, no capital letters at all.": (
        "a cat is small and soft.",
        ("A cat is small.",),
    ),
    "Where do fish live? Write everything in lower case.": ("fish live in water.", ("Fish live in water",)),
    "Say one thing about a horse, in capital letters only.": ("A HORSE CAN RUN.", ("A HORSE can run.",)),
    "Write a greeting. Every letter must be a capital letter.": ("GOOD MORNING!", ("Good Morning!",)),
    "Tell me what milk is. Do not use any capital letter.": (
        "milk is a white drink.",
        ("Milk is a white drink.",),
    ),
    "Name two tools, all in lower case.": ("hammer and saw", ("Hammer and saw",)),
    "Write a title for a book about stars, in which every word begins with a capital letter.": (
        "The Night Sky Above",
        ("The night Sky",),
    ),
    "Write the names of three months. Each word must begin with a capital letter.": (
        "March, April, May",
        ("march, April, May",),
    ),
    "Describe the moon in exactly two sentences.": (
        "The moon is round. It is 3.5 billion years old!",
        ("The moon is round.", "One. Two. Three."),
    ),
    "Why do people sleep? Answer in exactly one sentence.": ("People sleep to rest.", ("One. Two.",)),
    "What is a bridge? Use exactly three sentences.": ("It spans. It joins. It holds?", ("One. Two.",)),
    "Describe a forest in at most 12 words.": (
        "A forest is a place with many trees.",
        ("one two three four five six seven eight nine ten eleven twelve thirteen",),
    ),
    "Explain what a robot is in at least 40 words.": ("word " * 40, ("word " * 39,)),
    "What is the opposite of hot? Answer with a single word.": ("Cold.", ("It is cold",)),
    "Tell me about bread in 20 to 40 words.": ("bread " * 25, ("bread " * 19, "bread " * 41)),
    "Describe a river in exactly four sentences.": (
        "It flows. It bends. It is cold. It ends in the sea.",
        ("It flows. It bends. It ends.",),
    ),
    "Write exactly five words about summer.": ("Summer days are very warm.", ("Summer is warm.",)),
    "Name an animal that can swim. Answer with exactly one word.": ("Otter", ("An otter",)),
    "Describe a clock in no more than 8 words.": (
        "A clock shows the time.",
        ("A clock is a thing on the wall that shows the time.",),
    ),
    "Tell me about the desert in at least 30 words.": ("sand " * 30, ("sand " * 29,)),
    "Explain why plants need light in 10 to 25 words.": ("light " * 12, ("light " * 9, "light " * 26)),
    "Write one sentence about a train that has exactly 7 words.": (
        "The long train stops at every station.",
        ("The train stops.",),
    ),
    "Describe the taste of honey in exactly three words.": (
        "Sweet and sticky.",
        ("Sweet.", "It is sweet and sticky."),
    ),
    "Answer with two words only: which season comes after winter, and is it warm or cold?": (
        "Spring, warm",
        ("It is spring and it is warm.",),
    ),
    "What is a teacher? Use at least three sentences.": (
        "A teacher works. A teacher helps. Pupils learn.",
        ("A teacher works. Pupils learn.",),
    ),
    "Tell me about a bicycle in at most two sentences.": (
        "It has two wheels. You ride it.",
        ("It has wheels. You ride it. It is fast.",),
    ),
    "Write a sentence about the wind with at most 6 words.": (
        "The wind blows hard.",
        ("The wind blows hard over the wide green hills.",),
    ),
    "Say goodbye in exactly four words.": ("Goodbye and good luck!", ("Goodbye!",)),
    "Tell me about rain. End your answer with the words: That is all.": (
        "Rain falls. That is all.",
        ("That is all. Thanks!",),
    ),
    "What is a chair for? End your answer with a question mark.": (
        "For what else than sitting?",
        ("For sitting.",),
    ),
    "Describe a lake. Your answer must end with the word water.": (
        "A lake is a lot of water.",
        ("Water fills a lake, and it is deep.",),
    ),
    "Say something nice about spring, and end with an exclamation mark.": (
        "Spring is lovely!",
        ("Spring is lovely.",),
    ),
    "Tell me what a spoon is for. The last word must be soup.": (
        "A spoon is for eating soup.",
        ("Soup is eaten with a spoon.",),
    ),
    "Describe a house and finish with the line: The end.": (
        "A house has walls.\nThe end.",
        ("The end. A house has walls.",),
    ),
    "Why is it dark at night? End with three dots.": (
        "Because the sun is gone...",
        ("Because the sun is gone.",),
    ),
    "Name a hobby. End your answer with the word indeed.": ("Reading, indeed.", ("Indeed, reading.",)),
    "Tell me about cheese without a full stop at the end.": (
        "Cheese is made of milk",
        ("Cheese is made of milk.",),
    ),
    "Write a short note to a friend. End it with: Yours, Sam": (
        "See you soon!\nYours, Sam",
        ("Yours, Sam\nSee you soon!",),
    ),
    "Tell me about the sun. Begin your answer with the word Certainly.": (
        "Certainly, it is hot.",
        ("It is, certainly.",),
    ),
    "What do bees make? Begin your answer with: My answer is": (
        "My answer is honey.",
        ("Honey. My answer is honey",),
    ),
    "Describe a mountain. The first word must be High.": ("High and steep.", ("A mountain is high.",)),
    "Why do we wash our hands? Begin with the word Because.": (
        "Because of dirt.",
        ("We wash them because of dirt.",),
    ),
    "What is a map? Begin your answer with a dash and a space.": (
        "- A drawing of places.",
        ("A drawing of places.",),
    ),
    "Tell me about tea. Begin with: Dear reader,": (
        "Dear reader, tea is hot.",
        ("Tea is hot, dear reader,",),
    ),
    "Name a vegetable. Begin your answer with the letter c.": ("Carrot", ("A carrot",)),
    "Describe snow. Your first word must be Snow and your second word must be is.": (
        "Snow is cold.",
        ("The snow is cold.",),
    ),
    "What does a baker do? Begin with the number 1.": (
        "1. A baker bakes bread.",
        ("A baker bakes 1 bread.",),
    ),
    "Say what you think of music. Begin with: In my opinion,": (
        "In my opinion, it is great.",
        ("It is great, in my opinion,",),
    ),
    "Give me a good title for a story. Put your whole answer in double quotation marks.": (
        '"The Last Robot"',
        ("The Last Robot", '"A" and more', '""'),
    ),
    "Write a short wish. Put your whole answer in round brackets.": (
        "(All the best)",
        ("All the best", "(All) the best"),
    ),
    "Name a city. Put your whole answer in square brackets.": ("[Oslo]", ("Oslo", "[Oslo] it is")),
    "Write one word about the sky between two asterisks, like *this*, and nothing else.": (
        "*blue*",
        ("blue", "*blue* sky"),
    ),
    "Give a proverb, and put all of it in single quotation marks.": (
        "'Haste makes waste'",
        ("Haste makes waste",),
    ),
    "Name a flower. Write two dashes before and after it, like --this--, and nothing else.": (
        "--rose--",
        ("rose", "-rose-"),
    ),
    "Name an animal, without using the letter e.": ("A cat.", ("Elephant", "An eel", "...")),
    "Describe winter without using the word snow.": ("Winter is cold.", ("Snow falls.",)),
    "Write one sentence about dogs, and use no comma.": ("Dogs bark at night.", ("Dogs, cats.",)),
    "Name a fruit that has no letter a in its name. Write only the name.": ("Plum", ("Banana",)),
    "Describe the sun without using the word hot.": ("It is a bright star.", ("It is very hot.",)),
    "Write a sentence without the letter o.": ("A cat sat in a basket.", ("The cat sat on a box.",)),
    "Tell me about school. Do not use the word teacher.": ("Pupils learn to read.", ("A teacher helps.",)),
    "Explain what ice is without using the word water.": ("It is frozen and cold.", ("It is frozen water.",)),
    "Describe a tree. Do not use any full stop.": (
        "A tall plant with leaves",
        ("A tall plant with leaves.",),
    ),
    "Describe a car without any of the words wheel and engine.": (
        "A machine that people drive.",
        ("It has an engine.",),
    ),
    "Write four words that all begin with the letter b.": (
        "blue birds build bridges",
        ("blue birds sing songs", "blue birds build"),
    ),
    "Write three words that all end with the letter s.": ("birds trees books", ("birds tree books",)),
    "Write a sentence in which no word is longer than five letters.": (
        "The dog runs home.",
        ("The elephant runs home.",),
    ),
    "Answer without any digit: how many legs do two spiders have?": ("sixteen", ("16",)),
    "When did the first people walk on the moon? Your answer must contain a digit.": (
        "In 1969.",
        ("In the sixties.",),
    ),
    "Write two words that begin with the same letter.": ("big bear", ("big cat",)),
    "Write a sentence about a kitchen that uses the words spoon and window.": (
        "The spoon lies at the window.",
        ("The spoons lie at the window.",),
    ),
    "Write about the sea. Use the word blue at least twice.": (
        "Blue sky, blue sea.",
        ("Blue sky, bluer sea.",),
    ),
    "Write a sentence about a farm that uses the words cow, grass and morning.": (
        "In the morning the cow eats grass.",
        ("The cow eats grass.",),
    ),
    "Tell me about a party. Use the word music exactly once.": (
        "There is music and cake.",
        ("Music, music and cake.", "There is cake."),
    ),
    "Describe a street. Use the word car at least three times.": (
        "A car, a red car and a blue car.",
        ("A car and a red car.",),
    ),
    "Write a sentence that contains both the word hot and the word cold.": (
        "Tea is hot and ice is cold.",
        ("Tea is hot.",),
    ),
    "Write a sentence about travel that uses the words train, ticket and friend.": (
        "My friend buys a ticket for the train.",
        ("My friend takes the train.",),
    ),
    "Describe a garden and use the word green exactly twice.": (
        "Green grass and green leaves.",
        ("Green grass.", "Green, green, green."),
    ),
    "Write a sentence with the word because in it.": ("I read because I like it.", ("I like to read.",)),
    "Write a sentence about food with the words sweet and sour.": (
        "The plum is sweet and sour.",
        ("The plum is sweet.",),
    ),
    "Tell me about a doctor. Use the word help at least twice.": (
        "Doctors help you. They help all.",
        ("Doctors help you.",),
    ),
    "Write a sentence that contains the number 7 as a digit.": (
        "A week has 7 days.",
        ("A week has seven days.",),
    ),
    "Give 3 bullet points about water, each on a line that begins with '* '. Write nothing else.": (
        "* wet\n* clear\n* cold",
        ("Here:\n* a\n* b\n* c", "* a\n* b", "*a\n*b\n*c"),
    ),
    "Give 2 reasons to read, each on a line that begins with '- '. Write nothing else.": (
        "- fun\n- news",
        ("- a\n- b\n- c",),
    ),
    "Name four fruits as a numbered list: 1. 2. 3. 4. Write nothing else.": (
        "1. apple\n2. pear\n3. fig\n4. plum",
        ("1. a\n2. b\n3. c", "1. a\n2. b\n4. c\n3. d"),
    ),
    "Name three colours, separated by commas. Write nothing else.": (
        "red, green, blue",
        ("red, green", "red\ngreen\nblue", "The colours, as you asked, are red green and blue"),
    ),
    "Give 5 bullet points about a city, each on a line that begins with '- '. Write nothing else.": (
        "- a\n- b\n- c\n- d\n- e",
        ("- a\n- b\n- c\n- d",),
    ),
    "Name three animals as a numbered list: 1. 2. 3. Write nothing else.": (
        "1. cow\n2. hen\n3. pig",
        ("cow\nhen\npig",),
    ),
    "Name five vegetables, separated by commas. Write nothing else.": (
        "pea, leek, kale, bean, corn",
        ("pea, leek, kale",),
    ),
    "Name four sports, separated by semicolons. Write nothing else.": (
        "golf; judo; polo; chess",
        ("golf, judo, polo, chess",),
    ),
    "Name two seasons, one on each line. Write nothing else.": (
        "summer\nwinter",
        ("summer and winter", "a\nb\nc"),
    ),
    "Name three kinds of weather, one on each line. Write nothing else.": (
        "rain\nsnow\nsun",
        ("rain, snow, sun",),
    ),
    "Write the days Monday and Tuesday with a slash between them, and nothing else.": (
        "Monday/Tuesday",
        ("Monday and Tuesday",),
    ),
    "Count from one to five in words, separated by spaces. Write nothing else.": (
        "one two three four five",
        ("1 2 3 4 5", "one, two, three, four, five"),
    ),
    "Write the numbers 3, 1 and 2 in rising order, separated by commas.": ("1, 2, 3", ("3, 1, 2", "3, 2, 1")),
    (
        "Write the words pear, apple and fig in the order of the alphabet, separated by commas. Write "
        "nothing else."
    ): (
        "apple, fig, pear",
        ("pear, apple, fig",),
    ),
    "Give two tips for a picnic. Begin each line with '> ' and write nothing else.": (
        "> Take water\n> Go early",
        ("- Take water\n- Go early",),
    ),
    "Name three musical instruments. Begin each line with '+ ' and write nothing else.": (
        "+ flute\n+ drum\n+ harp",
        ("+ flute\n+ drum", "flute, drum, harp"),
    ),
    'Give the name and the age of a person as JSON with the keys "name" and "age". Write only JSON.': (
        '{"name": "Ann", "age": 7}',
        ('{"name": "Ann"}', '```json\n{"name": "A", "age": 1}\n```', "[1]", "{name: 1}"),
    ),
    "Give the numbers one to three as a JSON list. Write only JSON.": ("[1, 2, 3]", ('{"a": 1}', "1, 2, 3")),
    'Give the title of a film as JSON with the key "title". Write only JSON.': (
        '{"title": "Up"}',
        ("Up", '{"film": "Up"}'),
    ),
    'Describe a car as JSON with the keys "colour", "doors" and "brand". Write only JSON.': (
        '{"colour": "red", "doors": 4, "brand": "X"}',
        ('{"colour": "red", "doors": 4}',),
    ),
    "Give three names of flowers as a JSON list of strings. Write only JSON.": (
        '["rose", "tulip", "lily"]',
        ("rose, tulip, lily",),
    ),
    'Give a city and its country as JSON with the keys "city" and "country". Write only JSON.': (
        '{"city": "Oslo", "country": "Norway"}',
        ("Oslo, Norway",),
    ),
    "Write an empty JSON object and nothing else.": ("{}", ("[]", '{"a": 1}')),
    "Write the JSON value true and nothing else.": ("true", ("True", '"true"')),
    "Repeat this sentence exactly and write nothing else: The red cube is on the table.": (
        "The red cube is on the table.",
        ("The red cube is on the table", 'Sure: "The red cube is on the table."'),
    ),
    "Write the word hello three times, separated by spaces, and nothing else.": (
        "hello hello hello",
        ("hello hello", "Hello hello hello"),
    ),
    "Repeat these words exactly, and write nothing else: nine green bottles": (
        "nine green bottles",
        ("Nine green bottles.",),
    ),
    "Write the letter z five times without spaces, and nothing else.": ("zzzzz", ("z z z z z", "zzzz")),
    "Repeat this number and write nothing else: 40817": ("40817", ("The number is 40817",)),
    "Write the word tea, then a comma, then a space, then the word milk. Nothing else.": (
        "tea, milk",
        ("tea milk", "tea,milk"),
    ),
    "Copy this line and write nothing else: A1-B2-C3": ("A1-B2-C3", ("A1 B2 C3",)),
    "Repeat only the second word of this line: paper stone scissors": (
        "stone",
        ("paper", "paper stone scissors"),
    ),
    "Repeat only the last word of this line: lemon orange cherry": ("cherry", ("lemon", "orange cherry")),
    "Write this sentence in capital letters and write nothing else: birds can fly": (
        "BIRDS CAN FLY",
        ("birds can fly", "Birds can fly"),
    ),
    "Is fire hot? Answer with yes or no only, in lower case, without a full stop.": (
        "yes",
        ("Yes", "yes.", "yes, it is"),
    ),
    "Is snow warm? Answer with yes or no only, in lower case, without a full stop.": (
        "no",
        ("No", "no.", "yes"),
    ),
    "Which is bigger, a mouse or an elephant? Answer with mouse or elephant only, in lower case.": (
        "elephant",
        ("mouse", "The elephant is bigger."),
    ),
    "Which is faster, a snail or a car? Answer with one of these two words only, in capital letters.": (
        "CAR",
        ("car", "SNAIL"),
    ),
    "Is a tomato blue? Answer with true or false only, in lower case.": ("false", ("False", "true", "no")),
    "Do birds have wings? Answer with true or false only, in lower case.": ("true", ("True", "false")),
    "Pick a number from 1 to 5. Write only the number.": ("4", ("7", "I pick 4.")),
    "Which one can you eat: (A) a stone, (B) an apple? Answer with the letter only.": (
        "B",
        ("A", "An apple"),
    ),
    "Which one can fly: (A) a pig, (B) a table, (C) an eagle? Answer with the letter only.": (
        "C",
        ("A", "an eagle"),
    ),
    "Choose red or green. Write only the colour that you choose, in lower case.": (
        "green",
        ("Green", "I choose green."),
    ),
    "Write two short paragraphs about trees, separated by one blank line.": (
        "Trees grow.\n\nThey are green.",
        ("Trees grow.\nThey are green.", "A\n\nB\n\nC"),
    ),
    "Write three short paragraphs about the sea, separated by blank lines.": (
        "Blue.\n\nDeep.\n\nSalty.",
        ("Blue.\n\nDeep.",),
    ),
    "Write a heading about health that begins with '# ', and nothing else.": (
        "# Health first",
        ("Health first", "# Health\nEat well."),
    ),
    "Write a date in the form YYYY-MM-DD, and nothing else.": ("2024-05-17", ("17 May 2024", "17-05-2024")),
    "Write a time of day in the form HH:MM, and nothing else.": ("08:30", ("8.30", "half past eight")),
    "Write a telephone number of exactly six digits, without spaces, and nothing else.": (
        "480912",
        ("480 912", "48091"),
    ),
    "Write a question about history and nothing else. It must be one sentence.": (
        "Who built the pyramids?",
        ("The pyramids are old.", "Who? When?"),
    ),
    "Write an e-mail address, and nothing else.": (
        "ann@example.org",
        ("ann at example", "Write to ann@example.org"),
    ),
    "Write one word in bold, like **this**, and nothing else.": ("**word**", ("word", "*word*")),
    "Write a word of exactly five letters, and nothing else.": ("house", ("houses", "a house")),
    "Write a sum of two numbers in the form a + b = c, and nothing else. It must be correct.": (
        "2 + 3 = 5",
        ("2 + 3 = 6", "2 plus 3 is 5"),
    ),
    (
        "Write the opening and the closing HTML tag of a paragraph with the word hello between them, "
        "and nothing else."
    ): (
        "<p>hello</p>",
        ("hello", "<b>hello</b>"),
    ),
    "Write a table row in Markdown with the three cells a, b and c, and nothing else.": (
        "| a | b | c |",
        ("a, b, c",),
    ),
    "Write a two-line poem about rain.": ("Rain falls on the lane\nand taps at the pane.", ("Rain falls.",)),
    "Answer in the form 'Question: .. Answer: ..' on two lines: what is two plus two?": (
        "Question: What is two plus two?\nAnswer: four",
        ("four", "Answer: four"),
    ),
    "Write a shopping list of three things, each followed by a number in brackets, one on each line.": (
        "milk (2)\neggs (6)\nbread (1)",
        ("milk\neggs\nbread",),
    ),
    "What is the capital of France?": ("It is Paris.", ("Parisian", "London")),
    "What is the capital of Japan?": ("Tokyo", ("Kyoto",)),
    "What is the capital of Italy?": ("Rome!", ("Milan",)),
    "What is 2 + 3?": ("2 + 3 = 5", ("15",)),
    "What is 7 - 4? Give the number.": ("3", ("4",)),
    "How many days does a week have? Give a number in digits.": ("7 days", ("8",)),
    "Which planet do we live on?": ("The Earth.", ("Mars",)),
    "At how many degrees Celsius does water boil? Give a number in digits.": (
        "At 100 degrees.",
        ("At 90 degrees.",),
    ),
    "What is the chemical formula of water?": ("H2O", ("HO2",)),
    "What is the capital of Germany?": ("Berlin", ("Munich",)),
    "What is the capital of Spain?": ("It is Madrid.", ("Barcelona",)),
    "What is the capital of Egypt?": ("Cairo.", ("Alexandria",)),
    "What is the capital of Canada?": ("Ottawa", ("Toronto",)),
    "What is the capital of Russia?": ("Moscow", ("Kiev",)),
    "What is the capital of Greece?": ("Athens", ("Sparta",)),
    "In which country is the city of London?": ("In England.", ("In France.",)),
    "On which continent is Brazil?": ("In South America.", ("In Africa.",)),
    "On which continent is Kenya?": ("Africa", ("Asia",)),
    "What is the largest ocean on Earth?": ("The Pacific Ocean.", ("The Atlantic Ocean.",)),
    "What is the largest planet of our solar system?": ("Jupiter", ("Saturn",)),
    "Which star is nearest to us?": ("The Sun.", ("Sirius",)),
    "How many months does a year have? Give a number in digits.": ("12", ("10",)),
    "How many hours does a day have? Give a number in digits.": ("24 hours", ("12",)),
    "How many minutes does an hour have? Give a number in digits.": ("60", ("100",)),
    "How many legs does a spider have?": ("Eight legs.", ("Six legs.",)),
    "How many legs does an insect have?": ("It has 6.", ("It has 8.",)),
    "How many sides does a triangle have?": ("Three", ("Four",)),
    "How many wheels does a bicycle have?": ("Two wheels.", ("Three wheels.",)),
    "How many letters does the English alphabet have?": ("26", ("24",)),
    "At how many degrees Celsius does water freeze? Give a number in digits.": ("0 degrees", ("10 degrees",)),
    "What colour do you get from blue and yellow paint?": ("Green", ("Purple",)),
    "What colour is the sky on a clear day?": ("It is blue.", ("It is red.",)),
    "Which animal barks?": ("A dog", ("A cat",)),
    "Which animal gives us wool?": ("Sheep", ("A hen",)),
    "What do we call a young cat?": ("A kitten", ("A puppy",)),
    "What do we call frozen water?": ("Ice", ("Steam",)),
    "Which organ pumps blood through the body?": ("The heart", ("The liver",)),
    "Which gas do people need to breathe in?": ("Oxygen", ("Helium",)),
    "What is the opposite of left?": ("Right", ("Up",)),
    "What is the opposite of big?": ("Small", ("Large",)),
    "What is the opposite of day?": ("Night", ("Noon",)),
    "Who wrote Romeo and Juliet?": ("William Shakespeare", ("Charles Dickens",)),
    "Who painted the Mona Lisa?": ("Leonardo da Vinci", ("Picasso",)),
    "Who was the first person to walk on the moon?": ("Neil Armstrong", ("Yuri Gagarin",)),
    "Which language do people speak in France?": ("French", ("German",)),
    "Which metal has the chemical symbol Fe?": ("Iron", ("Gold",)),
    "What is the chemical symbol of gold?": ("Au", ("Ag",)),
    "Which day comes after Monday?": ("Tuesday", ("Sunday",)),
    "Which month comes before March?": ("February", ("April",)),
    "Which season is the coldest in Europe?": ("Winter", ("Summer",)),
    "From what is paper usually made?": ("From wood.", ("From sand.",)),
    "What do cows drink as calves?": ("Milk", ("Tea",)),
    "What is the square root of 81?": ("9", ("8",)),
    "What is half of 50?": ("25", ("20",)),
    "How many centimetres are in a metre?": ("100", ("10",)),
    "In which direction does the sun rise?": ("In the east.", ("In the west.",)),
    "What is 12 plus 9?": ("12 + 9 = 21", ("20",)),
    "What is 15 minus 8?": ("Seven", ("8",)),
    "What is 6 times 7?": ("42", ("48",)),
    "What is 36 divided by 4?": ("It is 9.", ("8",)),
    "I have 3 apples and buy 5 more. How many apples do I have now?": (
        "You have eight apples.",
        ("You have 7 apples.",),
    ),
    "A box holds 10 eggs and 4 are broken. How many eggs are whole?": ("6 eggs", ("5 eggs",)),
    "Which number is larger, 17 or 71?": ("71 is larger.", ("17 is larger than 71.", "17")),
    "What comes next: 2, 4, 6, 8?": ("10", ("9",)),
    "A train leaves at 3 o'clock and travels for 2 hours. When does it arrive?": (
        "At 5 o'clock.",
        ("At 6 o'clock.",),
    ),
    "How many cents are in two euros?": ("200 cents", ("20 cents",)),
    "What is 20 percent of 50?": ("10", ("25",)),
    "What is 100 minus 1?": ("99", ("101",)),
    "What do you use to cut paper?": ("Scissors", ("A spoon",)),
    "Where do you keep milk so that it stays cold?": ("In the fridge.", ("In the oven.",)),
    "What do you wear on your feet when you go outside?": ("Shoes", ("A hat",)),
    "What do you open when it rains and you are outside?": ("An umbrella", ("A book",)),
    "Which meal do people eat in the morning?": ("Breakfast", ("Dinner",)),
    "What do you need to unlock a door?": ("A key", ("A spoon",)),
    "Where do you go when you are very ill?": ("To a hospital.", ("To the beach.",)),
    "What do you use to brush your teeth?": ("A toothbrush", ("A comb",)),
    "What does a traffic light show when cars must stop?": ("Red", ("Green",)),
    "What do people put on a letter before they post it?": ("A stamp", ("A shoe",)),
    "Which of these do you eat: a pencil, a sandwich or a hat? Name only that one.": (
        "A sandwich",
        ("A pencil", "A hat or a sandwich"),
    ),
    "What do you call the day on which somebody was born, once it comes again each year?": (
        "Their birthday",
        ("Their holiday",),
    ),
    "What falls from the trees in autumn?": ("The leaves", ("The roots",)),
    "Who puts out a fire?": ("Firefighters", ("Bakers",)),
    "Write in the past tense: I walk to school.": ("I walked to school.", ("I walk to school.",)),
    "Write in the plural: one mouse.": ("Two mice", ("Two mouses",)),
    "Correct the mistake: She go home.": ("She goes home.", ("She go home.",)),
    "Write as a question: You like tea.": ("Do you like tea?", ("You like tea.",)),
    "Make this negative: I am tired.": ("I am not tired.", ("I am tired.",)),
    "Write the opposite of this sentence: The door is open.": ("The door is closed.", ("The door is open.",)),
    "Make one sentence of these two with the word and: I eat. I drink.": (
        "I eat and I drink.",
        ("I eat. I drink.",),
    ),
    "Write this in a more polite way: Give me water.": (
        "Could I have some water, please?",
        ("Give me water.",),
    ),
    "Write the sentence without the word very: It is very cold.": ("It is cold.", ("It is very cold.",)),
    "Put the words in the right order: red is apple the": ("The apple is red.", ("Red is apple the.",)),
    "Fix the spelling: frend": ("friend", ("frend",)),
    "Write the number 14 as a word.": ("fourteen", ("forty",)),
    "Name three farm animals.": ("Cow, pig and sheep", ("Cow and lion",)),
    "Name three things that you find in a classroom.": ("Desks, chairs and a board", ("Fish and trees",)),
    "Name two drinks without alcohol.": ("Water and milk", ("Wine and water",)),
    "Name the four seasons.": ("Spring, summer, autumn and winter", ("Spring and summer",)),
    "Name three colours of the rainbow.": ("Red, green and blue", ("Black, white and red",)),
    "Name two planets other than the one we live on.": ("Mars and Venus", ("The Earth and the Moon",)),
    "Name three parts of the body.": ("Head, arm and leg", ("Wheel, door and head",)),
    "Name two tools of a carpenter.": ("Hammer and saw", ("Spoon and fork",)),
    "What is the Spanish word for house?": ("casa", ("maison",)),
    "What is the French word for cat?": ("chat", ("gato",)),
    "What is the German word for water?": ("Wasser", ("agua",)),
    "What is the Spanish word for dog?": ("perro", ("chien",)),
    "What is the French word for thank you?": ("merci", ("gracias",)),
    "What is the German word for good?": ("gut", ("bon",)),
    "What does the Spanish word sol mean in English?": ("Sun", ("Moon",)),
    "What does the French word rouge mean in English?": ("Red", ("Blue",)),
    "What is a dentist?": ("A doctor for teeth.", ("A doctor for eyes.",)),
    "What is an island?": ("Land with water all around.", ("A high mountain.",)),
    "What is a triangle?": ("A shape with three sides.", ("A shape with four sides.",)),
    "What is a thermometer?": ("It measures temperature.", ("It measures time.",)),
    "What is an orphan?": ("A child without parents.", ("A kind of bird.",)),
    "What does the word enormous mean?": ("Very big.", ("Very small.",)),
}
"""Prompt -> a right answer, and wrong ones."""
