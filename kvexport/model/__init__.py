"""The neutral decoder: checkpoint reader, families, reference model and Hugging Face writer."""
