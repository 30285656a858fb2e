"""The command line, `python -m aiter`; `main` has its commands."""
