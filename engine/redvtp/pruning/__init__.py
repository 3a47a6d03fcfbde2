"""Which visual tokens survive: scorers, budgets, and the policy of one request."""
