"""The demo model shipped with the package, and the script that trains it on the standard library's docstrings."""
