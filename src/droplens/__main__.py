"""`python -m droplens` is `droplens`."""

from droplens.cli import main

if __name__ == "__main__":
    main()
