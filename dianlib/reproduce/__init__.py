"""Run a result of the book again, on the full data set, and write down what came out.

The book itself trains on small data, so that a page runs in seconds. What it says about the large data
sets was measured by the modules here, one for each experiment; ``dianlib reproduce mlp`` calls one.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from dianlib.data import DataError

# Each experiment is a module of this name with `add_options(parser)` and `run(options)`.
EXPERIMENTS = {
    "mlp": "93.9 % after a hundred epochs, and why",
    "search": "six depths, ten trials, one test set: what holds, measured again",
    "rnn": "recurrent networks on Fashion-MNIST, and a collapse",
    "recall": "how far recurrent networks remember: one symbol, 10 to 200 steps back",
    "translate": "Chinese to English: one fixed vector against attention",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``dianlib reproduce`` with these arguments and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="dianlib reproduce", description="Repeat an experiment of the book at full size."
    )
    commands = parser.add_subparsers(title="experiments", metavar="EXPERIMENT", required=True)
    for name, text in EXPERIMENTS.items():
        escaped = text.replace("%", "%%")  # argparse formats the help, and not the description
        command = commands.add_parser(name, help=escaped, description=text)
        module = importlib.import_module(f"{__name__}.{name}")
        module.add_options(command)
        command.add_argument(
            "--output",
            type=Path,
            default=Path("reproduced"),
            help="folder for the tables (default: reproduced)",
        )
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (DataError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"the tables cannot be written to {options.output}: {error.strerror}.", file=sys.stderr)
        return 2
    return 0
