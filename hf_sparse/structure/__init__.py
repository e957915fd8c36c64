"""What a model is made of: families, parts, layers and units."""
