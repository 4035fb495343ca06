"""How fast capdist is, side by side with the textbook and with what the device can do: `capdist benchmark`."""
