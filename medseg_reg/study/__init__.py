"""Whether a method really helps: statistics over patients and seeds, and co-adaptation."""
