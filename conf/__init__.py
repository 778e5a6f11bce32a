"""What to run: one YAML group per choice a user makes. Holds no code; the schemas live beside their consumers."""
