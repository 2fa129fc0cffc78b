"""Slice stores: written once, verified, split by patient, read by memory map."""
