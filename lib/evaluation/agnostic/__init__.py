"""Agnostic: what similarities to generic prompts, that name no class, tell about the classes."""
