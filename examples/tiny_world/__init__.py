"""A world so small that a base model for it trains in minutes: the demo's pictures, captions, base and judge."""
