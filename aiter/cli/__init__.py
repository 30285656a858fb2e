"""The command line: `python -m aiter env|list|build|status|clean|demo`."""
