"""Environments: conversations of several turns with games, tools and programs."""
