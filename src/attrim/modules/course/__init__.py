"""The course of a network: its contractions, seen where the operators run, and what follows each of them."""
