"""Tokenizers and text towers: from words to what a network is told."""
