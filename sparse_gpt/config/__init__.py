"""One YAML file says everything about a run: its schema, its loading, its mistakes."""
