"""Training code of the demo model that ships with the package; see `python -m tools.demo_model.train --help`."""
