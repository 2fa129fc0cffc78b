"""Converters: one module a source, each of which writes a slice store."""
