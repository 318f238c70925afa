"""Nouns: frozen data that every other part speaks of. Nothing here knows an ``nn.Module``."""
