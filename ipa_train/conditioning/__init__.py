"""Image encoders, and dropping conditions."""
