"""`python -m capdist` is the `capdist` command."""

from capdist.cli import main

if __name__ == "__main__":
    main()
