"""Run whole experiments: from full-precision weights to a table's row.

What is here puts the other packages together; nothing of them imports it.
"""
