"""A project of one's own: created from an example, kept up with the package, and extended by scaffolds."""
