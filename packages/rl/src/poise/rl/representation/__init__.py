"""What a value network makes of states and actions: its rank, and regularizers of it."""
