"""Words: the tokeniser and the vocabulary."""
