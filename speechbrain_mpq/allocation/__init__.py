"""How many bits each cluster gets: scores, and plans under a budget.

Knows models and data, but no speech.
"""
