"""What only developers run: ``python -m tools.NAME`` in a checkout, after ``make setup``."""
