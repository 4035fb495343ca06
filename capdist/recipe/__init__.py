"""The recipe: its sections and their rules, reading it, and its stages."""
