"""`kvbench report`: results as a table, as a page to look at (page.py), and compared with earlier ones (compare.py)."""
