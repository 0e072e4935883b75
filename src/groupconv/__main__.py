"""``python -m groupconv``."""

from groupconv.cli import main

main()
