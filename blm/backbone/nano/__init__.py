"""`nano`: the small backbone that is trained from random weights."""
