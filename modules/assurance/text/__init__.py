"""Texts that assurance asks with, and measures of texts: all authored here, seeded, torch and the standard library."""
