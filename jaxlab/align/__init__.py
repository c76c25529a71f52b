"""Brings models onto one another: permutations of hidden units, and what they allow."""
