"""Files changed by the thousand: `make fuzz MINUTES=10`, or `python -m tests.fuzz.run --help`."""
