"""Scores + cost + budget -> plan. Pure: nothing here ever sees an ``nn.Module``."""
