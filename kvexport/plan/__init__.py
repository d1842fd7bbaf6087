"""Plans: from a model's config.json and a target's figures alone, what will fit and how fast it will be."""
