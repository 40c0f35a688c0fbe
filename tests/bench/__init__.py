"""`make bench`: what the agent costs, measured on the real process, against budgets."""
