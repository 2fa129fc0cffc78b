"""Readers and writers of medical volumes and images, and the grids they lie on."""
