"""Run `prefs` as `python -m dagster_prefs`, for images that contain the code without installing it."""

from dagster_prefs.cli import main

main()
