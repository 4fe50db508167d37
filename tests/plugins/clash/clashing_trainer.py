"""Claims the name `snapshot`."""

raise AssertionError("nobody may import this: the name is taken")
