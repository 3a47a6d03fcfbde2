"""Which visual tokens survive: scores from attention, a budget, and the choice."""
