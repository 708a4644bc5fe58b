"""Arenas, benchmarks and what their judges are worth."""

TIE_MARGIN = 0.1  # scores of a Writing RM that differ by no more are a tie, unless a recipe or an option says otherwise
