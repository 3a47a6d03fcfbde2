"""What pruning costs in accuracy and what it saves, and how steady importance is over the steps."""
