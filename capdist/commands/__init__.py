"""What each verb of the `capdist` command does."""
