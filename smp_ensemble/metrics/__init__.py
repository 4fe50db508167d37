"""How good it is: streaming scores over all valid pixels."""
