"""`python -m dagster_prefs` is `prefs`, for images that hold the code without installing it."""

from dagster_prefs.cli import main

main()
