"""`capdist benchmark`: how fast capdist is, beside the textbook and the best that the device can do."""
