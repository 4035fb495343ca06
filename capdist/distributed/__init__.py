"""The processes of a launch: their devices, what they must do together, and signals to stop."""
