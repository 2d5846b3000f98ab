"""Test wordings of the suite's tasks, by level; see `LEVELS`. They are never trained on."""

from __future__ import annotations

from collections.abc import Mapping

SUITE_PARAPHRASES: Mapping[str, Mapping[int, tuple[str, ...]]] = {
    "push_cube": {
        1: (
            "Push the blue brick onto the bullseye.",
            "Shove the blue box onto the dartboard ahead.",
            "Push the small blue die onto the red and white rings.",
            "Push the blue object forward onto the ringed spot.",
            "Slide the toy brick ahead onto the striped circle.",
        ),
        2: (
            "Propel the blue cube onto the red and white target.",
            "Bulldoze the cube onto the target circle.",
            "Thrust the blue block forward onto the round target.",
            "Drive the cube away from you onto the target.",
            "Advance the blue cube to the target ahead.",
        ),
        3: (
            "Onto the target ahead is where the blue cube must be pushed.",
            "How about pushing the blue cube onto the target?",
            "Blue cube, red and white target: push the first onto the second.",
            "What I want to see is the blue block being pushed onto the round target.",
            "Only once the blue cube has been pushed onto the target are you finished.",
        ),
        4: (
            "There is a blue cube lying on the table, and a bit farther from you there is a round target "
            "with red and white rings; what I would like is for the cube to be pushed along the table "
            "until it rests on that target.",
            "When you are ready, please move the gripper down to the side of the blue cube that faces you, "
            "and then keep pushing the cube forward over the table until it lies on the target.",
            "We are going to practise pushing today, so look for the small blue cube first, then look for "
            "the round target ahead of it, and finally push the cube along the table until it has come to "
            "lie on the target.",
            "It would be really helpful if you could take the time to push the blue block, slowly or "
            "quickly as you like, straight ahead over the table until it has arrived on the red and white "
            "target.",
            "As the last thing that has to be done on this table before we can stop, the blue cube, which "
            "still lies short of the round target, has to be pushed all the way onto it.",
        ),
        5: (
            "Push the blue cube onto its target; we will pick up the red one tomorrow.",
            "Do not pull or lift anything: push on until the blue cube is on the target.",
            "Although a yellow ball would roll more easily, it is the blue cube that you should push onto "
            "the target.",
            "My son wants to build a tower here later, so push the blue block out of the way, onto the red "
            "and white target.",
            "Because I need this side of the table for a green box, shove the blue cube ahead as far as "
            "the round target.",
        ),
    },
    "pull_cube": {
        1: (
            "Pull the blue brick onto the bullseye.",
            "Drag the blue box back onto the dartboard.",
            "Pull the small blue die onto the red and white rings.",
            "Pull the blue object back to the ringed spot.",
            "Slide the toy brick towards you onto the striped circle.",
        ),
        2: (
            "Haul the blue cube onto the red and white target.",
            "Tow the cube back to the target.",
            "Tug the blue block closer until it is on the round target.",
            "Reel in the blue cube until it is on the target circle.",
            "Rake the cube towards the robot and onto the target.",
        ),
        3: (
            "Onto the target near the robot is where the blue cube must be pulled.",
            "How about dragging the blue cube back to the target?",
            "Blue cube, red and white target: pull the first onto the second.",
            "What I want to see is the blue block being pulled onto the round target.",
            "Only once the blue cube has been dragged onto the target are you finished.",
        ),
        4: (
            "There is a blue cube lying on the table, and between it and you there is a round target with "
            "red and white rings; what I would like is for the cube to be pulled along the table until it "
            "rests on that target.",
            "When you are ready, please reach over the blue cube with the gripper, lower it on the other "
            "side, and then keep pulling the cube back over the table until it lies on the target.",
            "We are going to practise pulling today, so look for the small blue cube first, then look for "
            "the round target that lies closer to you, and finally pull the cube along the table until it "
            "has come to lie on the target.",
            "It would be really helpful if you could take the time to drag the blue block, slowly or "
            "quickly as you like, back over the table towards you until it has arrived on the red and white "
            "target.",
            "As the last thing that has to be done on this table before we can stop, the blue cube, which "
            "still lies beyond the round target, has to be pulled all the way back onto it.",
        ),
        5: (
            "Pull the blue cube onto its target; we will pick up the red one tomorrow.",
            "Do not push or lift anything: pull on until the blue cube is on the target.",
            "Although a yellow ball would roll more easily, it is the blue cube that you should pull onto "
            "the target.",
            "My son wants to build a tower over there later, so pull the blue block out of the way, onto "
            "the red and white target.",
            "Because I need the other side of the table for a green box, drag the blue cube back as far as "
            "the round target.",
        ),
    },
    "pick_cube": {
        1: (
            "Pick up the red brick and bring it to the green orb.",
            "Lift the red die to the green globe.",
            "Grasp the red box and hold it at the green bubble.",
            "Take the red object and move it to the green dot in the air.",
            "Grab the toy brick and bring it to the floating green spot.",
        ),
        2: (
            "Seize the red cube and deliver it to the green sphere.",
            "Hoist the red cube up to the green ball.",
            "Snatch the red block from the table and transport it to the green goal.",
            "Clutch the cube and suspend it at the green target.",
            "Fetch the red cube and park it at the green sphere in the air.",
        ),
        3: (
            "At the green sphere is where I want to see the red cube, held by you.",
            "How about lifting the red cube to the green goal?",
            "Red cube, green sphere: bring the first to the second and hold it there.",
            "Only when the gripper holds the red block at the green ball are you finished.",
            "What must be held at the green goal is the red cube.",
        ),
        4: (
            "There is a red cube lying on the table and a green sphere hanging somewhere over the table; "
            "what I would like is for you to take the cube between your fingers and keep it at that sphere.",
            "When you are ready, please open the gripper, lower it over the red cube, close it firmly, and "
            "then bring the cube through the air to the place of the green sphere, and wait there.",
            "We are going to practise holding things today, so look for the small red cube first, then look "
            "for the green ball, and finally pick the cube up and hold it still right at that ball.",
            "It would be really helpful if you could take the time to lift the red block off the table, "
            "slowly or quickly as you like, and to bring it all the way to the green goal, where you keep "
            "hold of it.",
            "As the last thing that has to be done here before we can stop, the red cube, which still lies "
            "on the table, has to be taken up and held at the green goal without being let go.",
        ),
        5: (
            "Pick the red cube up and take it to the green sphere; nobody needs the blue one today.",
            "Do not put it into a bin or onto a block: the red cube has to be held at the green goal.",
            "Now that the yellow ball has been put away, take hold of the red cube and bring it to the "
            "green ball.",
            "My colleague would rather push it, but what I want is the red block lifted to the green sphere.",
            "So that the camera can see it well, hold the red cube at the green target, whatever the colour "
            "of the table is.",
        ),
    },
    "stack_cube": {
        1: (
            "Stack the red brick on the green brick.",
            "Put the red box on top of the green box.",
            "Place the red die onto the green die.",
            "Set the red object on the green object and let go.",
            "Pick up the red toy brick and put it on the green one.",
        ),
        2: (
            "Balance the red cube on the green cube.",
            "Perch the red block on the green one.",
            "Deposit the red cube on top of the green cube.",
            "Pile the red cube onto the green cube.",
            "Rest the red block on the green block and leave it there.",
        ),
        3: (
            "On the green cube is where the red cube must be put.",
            "How about stacking the red cube on the green one?",
            "Red cube, green cube: put the first on top of the second.",
            "Only when the red block stands on the green one are you finished.",
            "What the green cube still needs is the red cube on top of it.",
        ),
        4: (
            "There are two cubes on the table, a red one and a green one; what I would like is for you to "
            "take hold of the red one, lift it over the green one, and let go of it there so that it stays "
            "on top.",
            "When you are ready, please open the gripper, lower it over the red cube, close it, move across "
            "to the green cube, and set the red one down on it gently before you let go.",
            "The green cube may stay exactly where it is on the table, but the red cube should be moved, "
            "and the place where it should come to rest, once you have let go of it, is on the green one.",
            "We are going to practise building today, so look for the red block first, then look for the "
            "green block, and finally put the first on the second in such a way that it does not fall off.",
            "It would be really helpful if, before we stop for the day, you could see to it that the red "
            "cube no longer lies on the table but stands on the green cube, without the gripper holding it.",
        ),
        5: (
            "Stack the red cube on its green neighbour; the blue one is for another day.",
            "Do not push the cubes together: the red one must go up on top of the green one.",
            "The table is dusty, so I would like to have the red block standing on the green block.",
            "Even if a yellow ball would look nicer there, it is the red cube that goes on the green cube.",
            "Forget the white bin and the peg from last time; today the red cube goes onto the green cube.",
        ),
    },
    "place_sphere": {
        1: (
            "Place the blue marble in the white dish.",
            "Put the blue orb in the white box.",
            "Drop the blue globe into the white tub.",
            "Pick up the blue bead and put it into the white saucer.",
            "Set the round blue object in the white basket.",
        ),
        2: (
            "Deposit the blue ball in the white bin.",
            "Pop the ball into the white tray.",
            "Stash the blue sphere in the bin.",
            "Insert the blue ball into the shallow bin.",
            "Fetch the ball and plop it into the white bin.",
        ),
        3: (
            "In the white bin is where the blue ball must lie.",
            "How about putting the ball into the tray?",
            "Blue ball, white bin: put the first into the second.",
            "Only when the blue sphere lies in the white bin are you finished.",
            "What the white bin still needs is the blue ball in it.",
        ),
        4: (
            "There is a blue ball on the table and a little farther on there is a shallow white bin; what I "
            "would like is for you to take the ball between your fingers, lift it over the rim, and leave "
            "it in the bin.",
            "When you are ready, please open the gripper, lower it over the ball, close it, move across to "
            "the white tray, go down until the ball is inside, and only then let go.",
            "Balls easily roll off a table, as you know, and that is why I would like the blue one to be "
            "put into the small white bin, where it can lie still after you have let go of it.",
            "We are going to tidy up a little, so look for the blue sphere first, then look for the shallow "
            "bin, and finally see to it that the sphere lies in the bin and no longer on the table.",
            "It would be really helpful if you could take the time to pick up the blue ball, carefully so "
            "that it does not roll away, to move it over the white bin, and to let go of it in there.",
        ),
        5: (
            "Put the blue ball into its white bin; the red cube may stay on the table.",
            "Do not push the ball around: it has to be lifted and put in the white bin.",
            "A green tray would have been nicer, but into the white one goes the blue ball, please.",
            "Before the cat finds it, get the blue sphere into the bin.",
            "Forget the cubes that we stacked yesterday; today the ball goes into the bin.",
        ),
    },
    "lift_peg_upright": {
        1: (
            "Stand the pole upright on the table.",
            "Set the red and blue stick on its end.",
            "Pick up the post and stand it on its end.",
            "Lift the baton and set it upright.",
            "Raise the lying beam until it stands.",
        ),
        2: (
            "Erect the red and blue peg on the table.",
            "Tip the peg up onto its end.",
            "Rotate the lying bar until it is upright.",
            "Hoist the rod and rest it on its end.",
            "Flip the bar up so that it stays upright.",
        ),
        3: (
            "Upright, not lying: that is how I want the peg.",
            "How about standing the peg on its end?",
            "From lying to standing: that is the change that the peg needs.",
            "Only when the bar is standing on its end are you finished.",
            "What should no longer lie on the table, but stand on it, is the peg.",
        ),
        4: (
            "There is a long peg lying flat on the table, half of it red and half of it blue; what I would "
            "like is for you to take hold of it, turn it by a quarter turn, and set it down so that it "
            "stands on its end.",
            "When you are ready, please lower the gripper to the peg, close it, raise the peg while you turn "
            "it, and put it down on the table again only when it points straight up to the ceiling.",
            "At the moment the bar takes up a lot of room because it is lying flat on the table, so I would "
            "like you to grasp it and to stand it on one of its two ends, no matter which.",
            "We are going to practise turning things today, so look for the red and blue peg first, then "
            "take hold of it near one end, and finally bring it into a position in which it stands on the "
            "table by itself.",
            "It would be really helpful if, before we stop for the day, you could see to it that the rod no "
            "longer lies on the table like a fallen tree but stands there like a growing one.",
        ),
        5: (
            "Stand the peg on end, please; the green cube has nothing to do with it.",
            "Do not push or roll the peg: what it has to do is stand upright.",
            "The red half and the blue half are equally heavy, so never mind which one is up when you make "
            "the peg stand.",
            "Now that the yellow ball is gone, there is room for the red and blue bar: stand it on its end.",
            "We stacked cubes here last time, but this time the peg has to be put upright.",
        ),
    },
}
"""Task of the suite -> level -> wordings."""
