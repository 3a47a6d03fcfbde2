"""`redvtp eval` and `redvtp consistency`: what pruning costs in accuracy, what it saves, how steady it is."""
