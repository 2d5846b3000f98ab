"""Test wordings of the words tasks, by level (see `LEVELS`), and their held-out phrasings.

They are never trained on. They name no colour of the palette that the scene does not fix, because
a slot may be filled with any of them.
"""

from __future__ import annotations

from collections.abc import Mapping

HELD_OUT_WORDINGS: Mapping[str, tuple[str, ...]] = {
    "words_push_cube": (
        "Get the {color} cube to the disc ahead by pushing it.",
        "The {color} cube belongs on the farther disc: send it there.",
        "Forward with the {color} block, onto the disc.",
    ),
    "words_pull_cube": (
        "Get the {color} cube to the disc near the robot by pulling it.",
        "The {color} cube belongs on the nearer disc: take it there.",
        "Back towards the robot with the {color} block, onto the disc.",
    ),
    "words_pick_cube": (
        "Carry the {color} cube to where the green sphere floats.",
        "The {color} cube belongs at the green sphere: carry it there.",
        "Off the table with the {color} block, up to the green ball.",
    ),
    "words_stack_cube": (
        "Build a tower: {a} cube above, {b} cube below.",
        "The {a} cube belongs on the {b} cube: bring it there.",
        "Make the {b} block the bottom of a tower and the {a} block its top.",
    ),
    "words_place_sphere": (
        "The {color} sphere belongs in the {bin} box: bring it there.",
        "Carry the {color} ball over to the {bin} bin and leave it inside.",
        "Into the {bin} tray with the {color} ball.",
    ),
    "words_lift_peg_upright": (
        "Make the peg stand vertically, its {top} end above.",
        "The {top} half of the peg belongs at the top: stand it that way.",
        "Let the {top} end of the bar point to the ceiling.",
    ),
}
"""Words task -> held-out phrasings, in the sense of `TaskSpec.held_out_phrasings`."""
WORDS_PARAPHRASES: Mapping[str, Mapping[int, tuple[str, ...]]] = {
    "words_push_cube": {
        1: (
            "Push the {color} brick onto the plate ahead.",
            "Shove the {color} box forward onto the round mat.",
            "Push the {color} die onto the coaster ahead of it.",
            "Slide the {color} object ahead onto the round spot.",
            "Push the {color} toy brick to the pad that is farther away.",
        ),
        2: (
            "Propel the {color} cube onto the disc ahead.",
            "Bulldoze the {color} cube onto the far disc.",
            "Thrust the {color} block forward onto the disc.",
            "Drive the {color} cube away from you onto the target.",
            "Advance the {color} cube to the disc ahead of it.",
        ),
        3: (
            "Onto the disc ahead is where the {color} cube must be pushed.",
            "How about pushing the {color} cube onto the far disc?",
            "Far disc, {color} cube: push the second onto the first.",
            "What I want to see is the {color} block being pushed onto the disc.",
            "Only once the {color} cube has been pushed onto the disc are you finished.",
        ),
        4: (
            "You see two cubes on the table; leave one of them alone and take care of the {color} one, "
            "which I would like you to push along the table, away from yourself, until it rests on the disc "
            "ahead of it.",
            "When you are ready, please move the gripper down to the side of the {color} cube that faces "
            "you, and then keep pushing that cube forward over the table until it lies on the disc.",
            "We are going to practise pushing today, so look for the {color} cube first, then look for the "
            "disc ahead of it, and finally push the cube along the table until it has come to lie on it.",
            "It would be really helpful if you could take the time to push the {color} block, slowly or "
            "quickly as you like, straight ahead over the table until it has arrived on the far disc.",
            "Of all the things that could be done with the cubes on this table, the one that I have in mind "
            "is that the {color} cube is pushed ahead, all the way to the disc, and that it stays there.",
        ),
        5: (
            "Push the {color} cube onto its disc up ahead; the grey ball can wait.",
            "Do not pull or lift anything: push on until the {color} cube is on the disc.",
            "Yesterday you pulled it towards you, but today the {color} cube has to be pushed onto a disc.",
            "Leave the other cube where it is, for it is the {color} one that you should push ahead onto "
            "the disc.",
            "Because I need this side of the table for a brown box, shove the {color} block ahead as far as "
            "the disc.",
        ),
    },
    "words_pull_cube": {
        1: (
            "Pull the {color} brick onto the plate near the robot.",
            "Drag the {color} box back onto the round mat.",
            "Pull the {color} die onto the near coaster.",
            "Slide the {color} object towards you onto the round spot.",
            "Pull the {color} toy brick to the pad that is closer to the robot.",
        ),
        2: (
            "Haul the {color} cube onto the disc near the robot.",
            "Tow the {color} cube back to the disc.",
            "Tug the {color} block closer until it is on the disc.",
            "Reel in the {color} cube until it is on the near disc.",
            "Rake the {color} cube towards the robot and onto the target.",
        ),
        3: (
            "Onto the near disc is where the {color} cube must be pulled.",
            "How about dragging the {color} cube back to the disc?",
            "Near disc, {color} cube: pull the second onto the first.",
            "What I want to see is the {color} block being pulled onto the disc.",
            "Only once the {color} cube has been dragged onto the disc are you finished.",
        ),
        4: (
            "You see two cubes on the table; leave one of them alone and take care of the {color} one, "
            "which I would like you to pull along the table, towards yourself, until it rests on the disc "
            "that lies between it and you.",
            "When you are ready, please reach over the {color} cube with the gripper, lower it on the other "
            "side, and then keep pulling that cube back over the table until it lies on the disc.",
            "We are going to practise pulling today, so look for the {color} cube first, then for the disc "
            "that lies closer to you, and finally pull the cube along the table until it has come to lie on "
            "it.",
            "It would be really helpful if you could take the time to drag the {color} block, slowly or "
            "quickly as you like, back over the table towards you until it has arrived on the near disc.",
            "Of all the things that could be done with the cubes on this table, the one that I have in mind "
            "is that the {color} cube is pulled back, all the way to the disc, and that it stays there.",
        ),
        5: (
            "Pull the {color} cube back onto its disc; the grey ball can wait.",
            "Do not push or lift anything: pull on until the {color} cube is on the disc.",
            "Yesterday you pushed it away from you, but today the {color} cube has to be pulled onto a disc.",
            "Leave the other cube where it is, for it is the {color} one that you should pull back onto the "
            "disc.",
            "Because I need the other side of the table for a brown box, drag the {color} block back as far "
            "as the disc.",
        ),
    },
    "words_pick_cube": {
        1: (
            "Pick up the {color} brick and bring it to the green orb.",
            "Lift the {color} die to the green globe.",
            "Grasp the {color} box and hold it at the green bubble.",
            "Take the {color} object and move it to the green dot in the air.",
            "Grab the {color} toy brick and bring it to the floating green spot.",
        ),
        2: (
            "Seize the {color} cube and deliver it to the green sphere.",
            "Hoist the {color} cube up to the green ball.",
            "Snatch the {color} block from the table and transport it to the green goal.",
            "Clutch the {color} cube and suspend it at the green target.",
            "Fetch the {color} cube and park it at the green sphere in the air.",
        ),
        3: (
            "At the green sphere is where I want to see the {color} cube, held by you.",
            "How about lifting the {color} cube to the green goal?",
            "Green sphere, {color} cube: bring the second to the first and hold it there.",
            "Only when the gripper holds the {color} block at the green ball are you finished.",
            "What must be held at the green goal is the {color} cube.",
        ),
        4: (
            "You see two cubes on the table and a green sphere somewhere over it; leave one of the cubes "
            "alone and take the {color} one between your fingers, and then keep it at that sphere.",
            "When you are ready, please open the gripper, lower it over the {color} cube, close it firmly, "
            "and then bring the cube through the air to the place of the green sphere, and wait there.",
            "We are going to practise holding things today, so look for the {color} cube first, then look "
            "for the green ball, and finally pick the cube up and hold it still right at that ball.",
            "It would be really helpful if you could take the time to lift the {color} block off the table, "
            "slowly or quickly as you like, and to bring it all the way to the green goal, where you keep "
            "hold of it.",
            "Of all the things that could be done with the cubes on this table, the one that I have in mind "
            "is that the {color} cube is taken up and held at the green goal without being let go.",
        ),
        5: (
            "Pick the {color} cube up and take it to the green sphere; the other one stays here.",
            "Do not put it into a bin or onto a block: the {color} cube has to be held at the green goal.",
            "Now that the grey ball has been put away, take hold of the {color} cube and bring it to the "
            "green ball.",
            "My colleague would rather push it, but what I want is the {color} block lifted to the green "
            "sphere.",
            "Even if the other cube is easier to reach, it is the {color} one that I want at the green "
            "target.",
        ),
    },
    "words_stack_cube": {
        1: (
            "Stack the {a} brick on the {b} brick.",
            "Put the {a} box on top of the {b} box.",
            "Place the {a} die onto the {b} die.",
            "Set the {a} object on the {b} object and let go.",
            "Pick up the {a} toy brick and put it on the {b} one.",
        ),
        2: (
            "Balance the {a} cube on the {b} cube.",
            "Perch the {a} block on the {b} one.",
            "Deposit the {a} cube on top of the {b} cube.",
            "Pile the {a} cube onto the {b} cube.",
            "Rest the {a} block on the {b} block and leave it there.",
        ),
        3: (
            "On the {b} cube is where the {a} cube must be put.",
            "How about stacking the {a} cube on the {b} one?",
            "Two cubes, {b} and {a}: put the second on top of the first.",
            "Only when the {a} block stands on the {b} one are you finished.",
            "What the {b} cube still needs is the {a} cube on top of it.",
        ),
        4: (
            "There are two cubes on the table, one {a} and one {b}; what I would like is for you to take "
            "hold of the {a} one, lift it over the {b} one, and let go of it there so that it stays on top.",
            "When you are ready, please open the gripper, lower it over the {a} cube, close it, move across "
            "to the {b} cube, and set the {a} one down on it gently before you let go.",
            "The {b} cube may stay exactly where it is on the table, but the {a} cube should be moved, and "
            "the place where it should come to rest, once you have let go of it, is on the {b} one.",
            "We are going to practise building today, so look for the {a} block first, then look for the "
            "{b} block, and finally put the first on the second in such a way that it does not fall off.",
            "It would be really helpful if, before we stop for the day, you could see to it that the {a} "
            "cube no longer lies on the table but stands on the {b} cube, without the gripper holding it.",
        ),
        5: (
            "Stack the {a} cube on its {b} neighbour; the grey one is for another day.",
            "Do not push the cubes together: the {a} one must go up on top of the {b} one.",
            "The table is dusty, so I would like to have the {a} block standing on the {b} block.",
            "Last time it was the other way round, but now it is the {a} cube that goes on the {b} cube.",
            "Forget the brown bin and the peg from last time; today the {a} cube goes onto the {b} cube.",
        ),
    },
    "words_place_sphere": {
        1: (
            "Place the {color} marble in the {bin} dish.",
            "Put the {color} orb in the {bin} basket.",
            "Drop the {color} globe into the {bin} tub.",
            "Pick up the {color} bead and put it into the {bin} saucer.",
            "Set the round {color} object in the {bin} box.",
        ),
        2: (
            "Deposit the {color} ball in the {bin} bin.",
            "Pop the {color} ball into the {bin} tray.",
            "Stash the {color} sphere in the {bin} bin.",
            "Insert the {color} ball into the {bin} bin.",
            "Fetch the {color} ball and plop it into the {bin} bin.",
        ),
        3: (
            "In the {bin} bin is where the {color} ball must lie.",
            "How about putting the {color} ball into the {bin} tray?",
            "The bin that is {bin}: put the {color} ball into that one.",
            "Only when the {color} sphere lies in the {bin} bin are you finished.",
            "What the {bin} bin still needs is the {color} ball in it.",
        ),
        4: (
            "There are two balls and two bins on the table; what I would like is for you to take the "
            "{color} ball between your fingers, lift it over the rim of the {bin} bin, and leave it in "
            "there.",
            "When you are ready, please open the gripper, lower it over the {color} ball, close it, move "
            "across to the {bin} tray, go down until the ball is inside, and only then let go.",
            "Balls easily roll off a table, as you know, and that is why I would like the {color} one to be "
            "put into the {bin} bin, where it can lie still after you have let go of it.",
            "We are going to tidy up a little, so look for the {color} sphere first, then look for the "
            "{bin} bin, and finally see to it that the sphere lies in that bin and no longer on the table.",
            "It would be really helpful if you could take the time to pick up the {color} ball, carefully "
            "so that it does not roll away, to move it over the {bin} bin, and to let go of it in there.",
        ),
        5: (
            "Put the {color} ball into its {bin} bin; the grey cube may stay on the table.",
            "Do not push the ball around: the {color} one has to be lifted and put in the {bin} bin.",
            "The other bin is just as good, but into the {bin} one goes the {color} ball, please.",
            "Before the cat finds it, get the {color} sphere into the {bin} bin.",
            "Forget the cubes that we stacked yesterday; today the {color} ball goes into the {bin} bin.",
        ),
    },
    "words_lift_peg_upright": {
        1: (
            "Stand the pole upright with the {top} end up.",
            "Set the stick upright with the {top} tip on top.",
            "Pick up the post and put it upright with the {top} end on top.",
            "Raise the {top} end of the baton until it stands.",
            "Stand the beam on its end with the {top} side up.",
        ),
        2: (
            "Erect the peg with the {top} end up.",
            "Tip the peg up so that its {top} end is on top.",
            "Rotate the lying bar until the {top} end is up.",
            "Hoist the {top} end of the rod until the rod is upright.",
            "Flip the bar up so that it stays upright with the {top} end on top.",
        ),
        3: (
            "On top is where I want the {top} end of the peg, with the peg standing.",
            "How about standing the peg upright with its {top} end on top?",
            "From lying to standing, {top} end up: that is the change that the peg needs.",
            "Only when the bar is standing with its {top} end on top are you finished.",
            "What should point up, once the peg stands, is the {top} end.",
        ),
        4: (
            "There is a long peg lying flat on the table, and its two ends have different colours; what I "
            "would like is for you to take hold of it and to set it down so that it stands with the {top} "
            "end on top.",
            "When you are ready, please lower the gripper to the peg, close it, raise the peg while you turn "
            "it, and put it down on the table only when its {top} end points straight up to the ceiling.",
            "At the moment the bar takes up a lot of room because it is lying flat on the table, so I would "
            "like you to grasp it and to stand it up, but not just anyhow: the {top} end has to be on top.",
            "We are going to practise turning things today, so look for the {top} end of the peg first, then "
            "take hold of the peg, and finally bring it into a position in which it stands on the table by "
            "itself and that end is up.",
            "It would be really helpful if, before we stop for the day, you could see to it that the rod no "
            "longer lies on the table but stands there like a tree, with the {top} end as its crown.",
        ),
        5: (
            "Stand the peg on end, {top} side up, please; the grey cube has nothing to do with it.",
            "Do not push or roll the peg: what it has to do is stand with its {top} end up.",
            "Both ends are equally heavy, but the one that has to be on top when the peg stands is {top}.",
            "Now that the brown ball is gone, there is room for the bar to stand, its {top} end on top.",
            "Last time the other end was up, but this time make the peg stand with the {top} end up.",
        ),
    },
}
"""Words task -> level -> wordings."""
