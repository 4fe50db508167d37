"""The benchmarks that come as a suite: `--suite NAME`, and what is the suite's own in `--options`."""

from __future__ import annotations

import argparse
import importlib
import shlex

SUITES = {"accuracy": "accuracy", "large": "large_images", "speed": "speed"}
"""Names to the scripts beside this one; each has `main(arguments)`."""


def main(arguments: list[str] | None = None) -> None:
    """Runs one suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), default="speed")
    parser.add_argument("--options", default="", help="of the suite, as on its own command line")
    options = parser.parse_args(arguments)
    importlib.import_module(SUITES[options.suite]).main(shlex.split(options.options))


if __name__ == "__main__":
    main()
