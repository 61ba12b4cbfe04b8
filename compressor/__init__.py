"""What to keep of a trained multi-task network: tasks, budgets, pruning, tickets, pathways."""
