"""`python -m envoy_extproc` is the console script."""

from envoy_extproc.cli import main

if __name__ == "__main__":
    main()
