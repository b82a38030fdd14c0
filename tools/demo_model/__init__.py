"""The program that trains the embedded demo model: `python -m tools.demo_model.train --help`."""
