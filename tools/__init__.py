"""Command-line tools. Each runs from a checkout: `python tools/NAME.py --help`."""
