"""The smallest data and networks that make sense, for Python and for the command line."""

import json

OPTIONS = {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}

DATA = ("--data", "synthetic:count=24,size=64,seed=5")
SHORT = ("--batch-size", "4", "--precision", "32", "--accelerator", "cpu")
NETWORK = ("--model-options", json.dumps(OPTIONS))
TINY = ("--crop-size", "32", *SHORT, *NETWORK)
